"""The workflow's stages: what each reads, writes and runs. The rules, DVC and the box read this table. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebjdat import codehash, registry
from ebjdat.layout import Layout, place, pretraining_place
from ebjdat.registry import Entry
from ebjdat.settings import STANDARD, Profile, flat

# Where settings name a strategy: the end of the key's path, or what is followed by the strategies' own keys.
NAMED_BY: Mapping[str, Mapping[str, Entry]] = {
    "method": registry.METHODS,
    "chain.sampler": registry.SAMPLERS,
    "chain.start": registry.STARTS,
    "adversary.score": registry.SCORES,
    "adversary.budget.name": registry.BUDGETS,
    "update.name": registry.UPDATES,
    "weights.examples.name": registry.WEIGHTINGS,
    "optimizer.name": registry.OPTIMIZERS,
    "schedule.name": registry.SCHEDULES,
    "attacks": registry.ATTACKS,
    "adaptive_attacks": registry.ADAPTIVE,
    "data.source": registry.SOURCES,
    "data.extra": registry.EXTRA,
    "generate.extractor": registry.EXTRACTORS,
    "reliability.ood": registry.OOD_SETS,
    "contrast.ood": registry.MADE_SETS,
}
# Of a stage's files, those that its command takes no option for.
NO_OPTION = ("journal", "archive", "results", "pretraining")


# What a method that samples none of them does not execute: settings of how -> what is sampled. (Budgets are made for every method.)
SAMPLED_BY = {".chain.": {"negatives"}, ".adversary.score": {"adversarial", "policy"}, ".contrast.": {"contrast"}}


def named(settings: Mapping[str, Any]) -> Iterator[Entry]:
    """Registry entries that resolved settings name, and what a method samples and keeps. A name like "auto" is all of them."""
    method = registry.METHODS.get(settings.get("method", ""))
    unused = [part for part, samples in SAMPLED_BY.items() if method and not samples & {*method.samples}]
    for key, value in flat(settings).items():
        for end, entries in NAMED_BY.items():
            _, match, below = f".{key}.".partition(f".{end}.")
            names = [below.split(".")[0]] if below else value if isinstance(value, tuple | list) else [value]
            if match and value is not None and not any(part in f".{key}" for part in unused):
                yield from (entries[name] for name in names) if all(name in entries for name in names) else entries.values()
    yield from (registry.SAMPLES[name] for name in (method.samples if method else ()))
    yield from [Entry(method.state, method.source)] if method and method.state else []


@dataclass(frozen=True)
class Job:
    """A stage at work. name: an experiment or a pretraining, or a wildcard ("{experiment}"), as seed; "" where a run has one such job."""

    stage: str
    name: str = ""
    seed: int | str = ""

    @property
    def title(self) -> str:
        """ "finetune-eb_jdat-seed0" """
        return f"{self.stage}-{self.name}-seed{self.seed}" if self.name else self.stage

    @property
    def place(self) -> str:
        if not self.name:
            return ""
        return pretraining_place(self.name, self.seed) if STAGES[self.stage].of == "pretraining" else place(self.name, self.seed)


Files = dict[str, list[str]]


@dataclass(frozen=True)
class Stage:
    """of: what there is one job for, and each seed: "experiment" or "pretraining"; "run" for one job in all.

    code: its function, and the classes of objects that it is given, "module:name". also: strategies that its code names.
    texts: modules whose text it shows, and other files of the package.
    reads: (profile, experiment or pretraining) -> resolved settings. inputs, outputs: option of its command -> files.
    """

    of: str
    code: tuple[str, ...]
    reads: Callable[[Profile, str], Mapping[str, Any]]
    inputs: Callable[[Profile, Layout, Job], Files]
    outputs: Callable[[Layout, Job], dict[str, str]]
    also: tuple[Entry, ...] = ()
    texts: tuple[str, ...] = ()
    calls_strategies: bool = True  # those that its settings name
    needs: Callable[[Profile, str], bool] = lambda profile, name: True  # whether it is done for this experiment or pretraining

    def strategies(self, profile: Profile, name: str) -> list[Entry]:
        return [*(named(self.reads(profile, name)) if self.calls_strategies else ()), *self.also]

    def digest(self, profile: Profile, name: str) -> str:
        """Digest of what the stage can execute for this experiment or pretraining."""
        return codehash.digest(self.code, self.strategies(profile, name), self.texts)


def measured(profile: Profile, experiment: str) -> list[str]:
    """The stages that are done for an experiment."""
    return [stage for stage, spec in STAGES.items() if spec.of == "experiment" and spec.needs(profile, experiment)]


def jobs(profile: Profile) -> list[Job]:
    """All jobs of a profile, stage by stage, each after those that it reads from."""
    names: dict[str, list[str]] = {"run": [], "pretraining": list(profile.pretraining), "experiment": profile.teachers_first()}
    used = {experiment.pretraining for experiment in profile.experiments.values()}
    names["pretraining"] = [name for name in names["pretraining"] if name in used]
    return [
        job
        for stage, spec in STAGES.items()
        for job in (
            [Job(stage)]
            if spec.of == "run"
            else [Job(stage, name, seed) for name in names[spec.of] if spec.needs(profile, name) for seed in profile.seeds]
        )
    ]


def inputs(profile: Profile, layout: Layout, job: Job) -> Files:
    return STAGES[job.stage].inputs(profile, layout, job)


def outputs(layout: Layout, job: Job) -> dict[str, str]:
    return STAGES[job.stage].outputs(layout, job)


def depends_on(profile: Profile, job: Job) -> dict[str, Any]:
    """What makes a job's results out of date, beside its inputs: {"code": digest, "settings": resolved}."""
    spec = STAGES[job.stage]
    return {"code": spec.digest(profile, job.name), "settings": spec.reads(profile, job.name)}


def command(profile: Profile, layout: Layout, job: Job, settings: Sequence[str]) -> list[str]:
    """Words after `python -m ebjdat`, without --threads. settings: the options that name the settings."""
    words = [job.stage, *settings]
    if job.name:
        words += [f"--{STAGES[job.stage].of}", job.name, "--seed", str(job.seed)]
    files = inputs(profile, layout, job) | {option: [file] for option, file in outputs(layout, job).items()}
    for option, group in files.items():
        if option not in NO_OPTION and group:
            words += [word for file in group for word in (f"--{option.replace('_', '-')}", file)]
    return words


def as_text(content: Mapping[str, Any]) -> str:
    """Canonical JSON: the order of keys means nothing."""
    return json.dumps(content, sort_keys=True)


# ---- what each stage reads


def _training(profile: Profile, name: str) -> dict[str, Any]:
    entry = profile.experiments[name]
    network = profile.model_settings(entry.pretraining).model_dump(mode="json")
    return {"model": network, "method": entry.method, "training": profile.training_settings(name).model_dump(mode="json")}


def _pretraining(profile: Profile, name: str) -> dict[str, Any]:
    network = profile.model_settings(name).model_dump(mode="json")
    settings = profile.pretraining_settings(name).model_dump(mode="json")
    return {"model": network, "method": profile.pretraining[name].method, "training": settings}


def _attack(profile: Profile, name: str) -> dict[str, Any]:
    return {"attack": profile.attack_settings(name).model_dump(mode="json")}


OF_ENSEMBLE = ("n", "attacks", "adaptive_attacks")  # of a protocol's settings


def _pgd(profile: Profile, name: str, *protocols: str) -> dict[str, Any]:
    """Of the attack's settings, those of its PGD under these protocols (none named: under all)."""
    attack = profile.attack_settings(name).model_dump(mode="json", include={"protocols", "seed", "batch_size"})
    chosen = {k: attack["protocols"][k] for k in protocols or attack["protocols"]}
    return {"attack": {**attack, "protocols": {k: {key: v for key, v in p.items() if key not in OF_ENSEMBLE} for k, p in chosen.items()}}}


def _generate(profile: Profile, name: str) -> dict[str, Any]:
    chain = profile.training_settings(name).chain
    generate = profile.evaluation.generate.model_dump(mode="json")
    return {"chain": {"sampler": chain.sampler, "start": chain.start}, "generate": generate}


def _energy(profile: Profile, name: str) -> dict[str, Any]:
    return {"energy": profile.evaluation.energy.model_dump(mode="json"), **_pgd(profile, name, STANDARD)}


def _reliability(profile: Profile, name: str) -> dict[str, Any]:
    settings = profile.evaluation.reliability.model_dump(mode="json")
    return {"reliability": settings, "root": profile.data.root, **_pgd(profile, name)}


def _teacher(profile: Profile, name: str) -> dict[str, Any]:
    settings, teacher = profile.evaluation.teacher, profile.training_settings(name).teacher
    return {
        "teaching": settings.model_dump(mode="json") if settings else None,
        "teacher": teacher.model_dump(mode="json") if teacher else None,
        **_pgd(profile, name, STANDARD),
    }


def _report(profile: Profile, _: str) -> dict[str, Any]:
    """All that pages show of settings; of bases, what experiments inherit from them."""
    shown = ("base", "form", "pretraining", "note", "control", "own", "resolved")
    experiments = {name: {key: getattr(entry, key) for key in shown} for name, entry in profile.experiments.items()}
    sections = {"data": profile.data, "model": profile.model, "evaluation": profile.evaluation, "report": profile.report}
    return {**{name: part.model_dump(mode="json") for name, part in sections.items()}, "seeds": profile.seeds, "experiments": experiments}


# ---- and which files


def _given(path: str | None) -> list[str]:
    """A file that settings name. Where it is missing, the stage itself says so better than a workflow tool would."""
    return [path] if path and Path(path).is_file() else []


def _with_weights(_: Profile, layout: Layout, job: Job) -> Files:
    return {"data": [layout.data], "weights": [layout.checkpoint(job.place)]}


def _results(layout: Layout, job: Job, **files: str) -> dict[str, str]:
    of_stage = {"out": f"{job.stage}.json", "journal": f"{job.stage}.journal.jsonl"}
    return {option: layout.result(job.place, file) for option, file in (of_stage | files).items()}


def _trained(layout: Layout, job: Job) -> dict[str, str]:
    files = {"metrics": f"{job.stage}.json", "journal": f"{job.stage}.journal.jsonl", "curve": f"{job.stage}_curve.csv"}
    return {"out": layout.checkpoint(job.place)} | {option: layout.result(job.place, file) for option, file in files.items()}


def _finetune_inputs(profile: Profile, layout: Layout, job: Job) -> Files:
    entry = profile.experiments[job.name]
    start, teacher = pretraining_place(entry.pretraining, job.seed), entry.training.teacher
    files = _given(teacher.weights) if teacher else []
    if teacher and teacher.experiment:
        files = [layout.checkpoint(place(teacher.experiment, job.seed if teacher.seed is None else teacher.seed))]
    return {"data": [layout.data], "initial": [layout.checkpoint(start)], "teacher": files}


def _attack_inputs(profile: Profile, layout: Layout, job: Job) -> Files:
    source = profile.evaluation.attack.transfer
    return {**_with_weights(profile, layout, job), "source": [layout.checkpoint(place(source.experiment, source.seed))] if source else []}


def _generate_inputs(profile: Profile, layout: Layout, job: Job) -> Files:
    settings = profile.evaluation.generate
    reference = layout.checkpoint(place(settings.reference.experiment, settings.reference.seed))
    return {**_with_weights(profile, layout, job), "reference": [reference], "archive": _given(settings.inception_weights)}


def _energy_inputs(profile: Profile, layout: Layout, job: Job) -> Files:
    return {**_with_weights(profile, layout, job), "samples": [layout.result(job.place, "samples.npz")]}


def _reliability_inputs(profile: Profile, layout: Layout, job: Job) -> Files:
    return {**_with_weights(profile, layout, job), "archive": _given(profile.evaluation.reliability.ood_path)}


def _teacher_inputs(profile: Profile, layout: Layout, job: Job) -> Files:
    settings = profile.evaluation.teacher
    recipes = [layout.checkpoint(place(settings.recipe, seed)) for seed in profile.seeds] if settings else []
    curve = [layout.result(job.place, "finetune_curve.csv")]
    teacher = _finetune_inputs(profile, layout, job)["teacher"]
    return {**_with_weights(profile, layout, job), "curve": curve, "teacher": teacher, "recipe": recipes}


def _report_inputs(profile: Profile, layout: Layout, job: Job) -> Files:
    made = {job: outputs(layout, job) for job in jobs(profile) if job.stage not in ("prepare", "report")}
    return {
        "card": [layout.card],
        "results": [f for job, files in made.items() for o, f in files.items() if job.stage != "pretrain" and (job.stage, o) not in UNREAD],
        "pretraining": [files["metrics"] for job, files in made.items() if job.stage == "pretrain"],
    }


def _report_outputs(layout: Layout, job: Job) -> dict[str, str]:
    files = {
        "summary": "summary.csv",
        "metrics": "metrics.json",
        "table_csv": "table.csv",
        "table_md": "table.md",
        "html": "report.html",
        "audit_html": "audit.html",
        "audit_md": "audit.md",
        "journal": "report.journal.jsonl",
    }
    return {option: layout.result("", file) for option, file in files.items()}


CONTEXT = "ebjdat.stages.context:Context"
VALIDATION = (registry.SCORES["ce"],)  # every method is validated under the same attack
# What the report does not read of what stages write: (stage, option).
UNREAD = {
    *((stage, "journal") for stage in ("finetune", "attack", "generate", "energy", "reliability", "teacher")),
    *{("finetune", "out"), ("generate", "samples"), ("energy", "figure"), ("reliability", "values"), ("teacher", "values")},
}
SHOWN_ROWS = ("ebjdat.registry.methods", "ebjdat.registry.strategies", "ebjdat.registry.evaluation", "ebjdat.registry.data")

STAGES: Mapping[str, Stage] = {
    "prepare": Stage(
        "run",
        ("ebjdat.stages.prepare:run",),
        lambda profile, _: {"data": profile.data.model_dump(mode="json")},
        lambda profile, layout, job: {"archive": _given(profile.data.path) + _given(profile.data.extra)},
        lambda layout, job: {"out": layout.data, "card": layout.card},
    ),
    "pretrain": Stage(
        "pretraining",
        ("ebjdat.stages.train:pretrain", CONTEXT),
        _pretraining,
        lambda profile, layout, job: {"data": [layout.data]},
        _trained,
        VALIDATION,
    ),
    "finetune": Stage("experiment", ("ebjdat.stages.train:finetune", CONTEXT), _training, _finetune_inputs, _trained, VALIDATION),
    "attack": Stage(
        "experiment",
        ("ebjdat.stages.attack:run", CONTEXT),
        _attack,
        _attack_inputs,
        lambda layout, job: _results(layout, job, verdicts="verdicts.parquet"),
    ),
    "generate": Stage(
        "experiment",
        ("ebjdat.stages.evaluate:generate", CONTEXT),
        _generate,
        _generate_inputs,
        lambda layout, job: _results(layout, job, samples="samples.npz", grid="samples.png", chains="chains.gif"),
    ),
    "energy": Stage(
        "experiment",
        ("ebjdat.stages.evaluate:energy", CONTEXT),
        _energy,
        _energy_inputs,
        lambda layout, job: _results(layout, job, values="energy.npz", figure="energy.png"),
    ),
    "reliability": Stage(
        "experiment",
        ("ebjdat.stages.reliability:run", CONTEXT),
        _reliability,
        _reliability_inputs,
        lambda layout, job: _results(layout, job, values="reliability.npz", figure="reliability.png"),
    ),
    "teacher": Stage(
        "experiment",
        ("ebjdat.stages.teacher:run", CONTEXT),
        _teacher,
        _teacher_inputs,
        lambda layout, job: _results(layout, job, values="teacher.npz"),
        needs=lambda profile, name: profile.evaluation.teacher is not None and profile.training_settings(name).teacher is not None,
    ),
    "report": Stage(
        "run",
        ("ebjdat.stages.report:run", CONTEXT),
        _report,
        _report_inputs,
        _report_outputs,
        texts=(
            *(f"ebjdat.registry.{part}" for part in ("methods", "strategies", "evaluation", "data")),
            "report/*.j2",
            "report/paper.yaml",
        ),
        calls_strategies=False,
    ),
}
