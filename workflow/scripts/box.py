"""Take a profile's stages to a machine that has torch and a few small packages, and their results back from there.

    python workflow/scripts/box.py pack BOX [--profile NAME] [--overrides "..."] [--experiments A B] [--stages attack] [--also PATH]
    python workflow/scripts/box.py take BOX [--force]

`pack` asks the Snakefile what is to be run, and writes a folder with the stages' commands, the package, the settings and what
is here already of their inputs. There `python run.py` (workflow/scripts/box_run.py) runs them. `take` checks the folder that
came back against itself and against this checkout, puts results where the rules expect them, and has Snakemake and DVC take
them over. It takes all that was done there, or nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import dvc_results
import dvc_stages

from ebjdat.checkout import refuse_another
from ebjdat.errors import UserError
from ebjdat.files import git_commit, read_json, write_json
from ebjdat.registry import SOURCES
from ebjdat.settings import Profile, flat, load, merge, nearest, read_layers, run_name, section, section_names, split_overrides

FORMAT = 1
MADE = ("data", "checkpoints", "results")  # folders of what stages write
AT_HOME = "report"  # wants every experiment, and packages that the others do not
MANY = 12  # problems in a message
# What the stages import beside torch and torchvision: module -> distribution. Versions are those of requirements.lock.
IMPORTS = {
    "joblib": "joblib",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "PIL": "pillow",
    "psutil": "psutil",
    "pyarrow": "pyarrow",
    "pyautoattack": "pyautoattack",
    "pydantic": "pydantic",
    "rich": "rich",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
    "typer": "typer",
    "yaml": "pyyaml",
}
OPTIONAL = ("nvidia-ml-py",)  # the GPU's load in the journals
README = """\
# {run}: {stages} stages to be run on another machine

It needs Linux, Python 3.11 or newer, torch 2.11 or newer and torchvision, and what requirements.txt lists:

    python -m pip install -r requirements.txt

Where there is no network: `pip install --target site --python-version 3.12 --only-binary :all: --no-deps NAME==VERSION …` for
what is missing, on a machine that has one; packages in the folder `site`, here, are found.

    python run.py                 # everything, one stage after another; again after any interruption
    python run.py --minutes 9     # stop in time, keep the state; exit code 75: run again to go on
    python run.py --status

Then copy this folder back (`src` and `site` may stay) and, in the checkout that it came from, `make unbox BOX=…`.
{notes}"""


class BoxError(UserError):
    """What keeps a box from being packed or taken: one problem per line."""

    def __init__(self, problems: Iterable[str], end: str = "") -> None:
        found = list(dict.fromkeys(problems))
        more = [f"… and {len(found) - MANY} more"] if len(found) > MANY else []
        super().__init__("\n  ".join(["", *found[:MANY], *more]).lstrip() if len(found) > 1 else found[0])
        self.end = end


@dataclass(frozen=True)
class Stage:
    """One job. command: arguments of python; inputs and outputs: files; settings: the sections of the profile that it reads."""

    name: str
    rule: str
    wildcards: Mapping[str, str]
    command: tuple[str, ...]
    log: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: Mapping[str, Any]

    def told(self) -> dict[str, Any]:
        """What the box is told of it."""
        return {
            "name": self.name,
            "command": list(self.command),
            "log": self.log,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "settings": self.settings,
        }


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_inside(name: str) -> bool:
    """Whether a path stays within the folder that it is relative to."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def command_of(job: Mapping[str, Any]) -> tuple[str, ...]:
    """A job's command without the shell's part of it, and without its number of threads: on the box it is the profile's."""
    words = shlex.split(job["command"])
    ends = [i for i, word in enumerate(words) if word in ("2>&1", ">", "|")]
    words = words[: min(ends, default=len(words))]
    if "--threads" in words:
        at = words.index("--threads")
        words = words[:at] + words[at + 2 :]
    if words[:3] != ["python", "-m", "ebjdat"]:
        raise BoxError([f"{dvc_stages.title(dict(job))}: its command is none of this package: {job['command'][:200]}"])
    return tuple(words[1:])


def plan(profile_name: str, overrides: Sequence[str]) -> dict[str, Stage]:
    """Stages by name, as the Snakefile has them now; each after those that it reads from, one seed and experiment after another."""
    params = f"params/{profile_name}.yaml"
    profile, raw = load(params, overrides), merge({}, *(layer for _, layer in read_layers(params, overrides)))
    paths = dvc_stages.sections()
    found = {}
    for job in dvc_stages.jobs(profile_name, overrides):
        if job["rule"] == AT_HOME:
            continue
        names = section_names(profile, job["wildcards"])
        settings = {path: section(raw, path) for path in (p.format(**names) for p in paths[job["rule"]])}
        name = dvc_stages.title(job)
        found[name] = Stage(
            name, job["rule"], job["wildcards"], command_of(job), job["log"], tuple(job["input"]), tuple(job["output"]), settings
        )
    return in_order(found, profile)


def in_order(stages: Mapping[str, Stage], profile: Profile) -> dict[str, Stage]:
    """What is finished first is whole: all stages of an experiment, all experiments of a seed."""
    experiments, seeds = list(profile.experiments), [str(seed) for seed in profile.seeds]
    maker = makers(stages)
    ordered: dict[str, Stage] = {}

    def put(stage: Stage) -> None:
        for name in stage.inputs:
            if name in maker:
                put(stages[maker[name]])
        ordered.setdefault(stage.name, stage)

    def rank(stage: Stage) -> tuple[int, int, int]:
        seed, experiment = stage.wildcards.get("seed"), stage.wildcards.get("experiment")
        place = experiments.index(experiment) if experiment in experiments else len(experiments)
        return seeds.index(seed) if seed in seeds else 0, place, dvc_stages.ORDER.index(stage.rule)

    for stage in sorted(stages.values(), key=rank):
        put(stage)
    return ordered


def makers(stages: Mapping[str, Stage]) -> dict[str, str]:
    """File -> name of the stage that writes it."""
    return {name: stage.name for stage in stages.values() for name in stage.outputs}


def current(profile_name: str, overrides: Sequence[str], stages: Mapping[str, Stage]) -> set[str]:
    """Names of the stages whose outputs are here and up to date, as Snakemake judges."""
    planned = {dvc_stages.title(job) for job in dvc_stages.planned(profile_name, overrides)}
    return {name for name, stage in stages.items() if name not in planned and all(map(os.path.isfile, stage.outputs))}


def chosen(stages: Mapping[str, Stage], here: set[str], experiments: Sequence[str], rules: Sequence[str]) -> dict[str, Stage]:
    """The stages of these experiments and rules (none: all) and whatever they need, without those that are up to date here."""
    maker = makers(stages)
    wanted: set[str] = set()

    def want(name: str) -> None:
        if name not in here and name not in wanted:
            wanted.add(name)
            for file in stages[name].inputs:
                if file in maker:
                    want(maker[file])

    for stage in stages.values():
        experiment = stage.wildcards.get("experiment")
        if (not experiments or experiment in experiments) and (not rules or stage.rule in rules):
            want(stage.name)
    return {name: stage for name, stage in stages.items() if name in wanted}


def requirements() -> dict[str, list[str]]:
    """Distribution -> its lines of requirements.lock."""
    found: dict[str, list[str]] = {}
    for line in Path("requirements.lock").read_text(encoding="utf-8").splitlines():
        found.setdefault(line.split("==")[0], []).append(line)
    return found


def data_notes(profile: Profile, stages: Mapping[str, Stage], root: Path) -> list[str]:
    """What has to be put into the box by hand. Raises BoxError for data that cannot be taken there as they are."""
    rules, notes, wrong = {stage.rule for stage in stages.values()}, [], []
    first = "make the prepared data here first (snakemake … data/…/data.npz) and pack again: they are taken along"
    ood = profile.evaluation.reliability
    for rule, key, path, help_ in (
        ("prepare", "data.path", profile.data.path, first),
        ("reliability", "evaluation.reliability.ood_path", ood.ood_path, "name an archive in this folder"),
        ("generate", "evaluation.generate.inception_weights", profile.evaluation.generate.inception_weights, "name a file in this folder"),
    ):
        if rule not in rules or not path:
            continue
        if not is_inside(path):
            wrong.append(f"{key} is {path}, which is not below this folder, so the box would not find it; {help_}")
        elif Path(path).is_dir():
            wrong.append(f"{key} is a folder ({path}); an archive of it can be packed, or {help_}")
        elif not Path(path).is_file():
            wrong.append(f"{key}: {path} is not here; put it here, or {help_}")
    if wrong:
        raise BoxError(wrong)
    if "prepare" in rules and profile.data.record.downloads:
        notes.append(
            f"data: the box downloads {profile.data.source} to {root / profile.data.root}; where it has no network, put the official "
            f"archive there (or pack with --also {profile.data.root}), or {first}"
        )
    shape = profile.data.record.shape
    beside_colour = "auto" in ood.ood and (shape is None or shape[0] == 3)  # `auto` looks for other colour images
    if "reliability" in rules and (beside_colour or any(name in SOURCES and SOURCES[name].downloads for name in ood.ood)):
        notes.append(
            f"out-of-distribution sets ({', '.join(ood.ood)}) are looked for in {root / profile.data.root}: put there what you have "
            f"(or pack with --also {profile.data.root})"
        )
    return notes


def pack(asked: argparse.Namespace) -> None:
    """Write the box. Raises BoxError, and writes nothing, where something cannot be packed."""
    box, overrides = Path(asked.box), split_overrides(asked.overrides)
    if box.exists():
        raise BoxError([f"{box} is there already; take it, delete it, or give another name (BOX=…)"])
    params = f"params/{asked.profile}.yaml"
    profile = load(params, overrides)
    rules = [rule for rule in dvc_stages.ORDER if rule != AT_HOME]
    unknown = [f"{n!r}: {nearest(n, list(profile.experiments))}" for n in asked.experiments if n not in profile.experiments]
    if unknown := unknown + [f"{n!r}: {nearest(n, rules)}" for n in asked.stages if n not in rules]:
        raise BoxError(unknown)
    stages = plan(asked.profile, overrides)
    here = current(asked.profile, overrides, stages)
    to_run = chosen(stages, here, asked.experiments, asked.stages)
    if not to_run:
        raise BoxError(["everything that was asked for is up to date here: nothing to pack"])
    notes = data_notes(profile, to_run, box)
    settings_files = [params, *(item for item in overrides if "=" not in item)]
    made_there = makers(to_run)
    inputs = {name for stage in to_run.values() for name in stage.inputs if name not in made_there}
    code = {str(p) for p in Path("src/ebjdat").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    if absent := [path for path in asked.also if not Path(path).exists()]:
        raise BoxError([f"--also {path}: is not here" for path in absent])
    also = {str(p) for path in map(Path, asked.also) for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()}
    files = sorted({*settings_files, *inputs, *code, *also})
    outside = [f"{name} is not below this folder, so the box would not find it" for name in files if not is_inside(name)]
    if outside:
        raise BoxError(outside)
    locked = requirements()
    making = box.with_name(f".{box.name}.{os.getpid()}.tmp")
    try:
        packed = {name: copy(Path(name), making / name) for name in files}
        manifest = {
            "format": FORMAT,
            "profile": asked.profile,
            "overrides": overrides,
            "run": run_name(params, overrides),
            "commit": git_commit(),
            "settings_files": settings_files,
            "stages": [stage.told() for stage in to_run.values()],
            "files": packed,
            "imports": {"torch": "torch", "torchvision": "torchvision"} | {m: locked[d][0].split(" ;")[0] for m, d in IMPORTS.items()},
        }
        write_json(making / "box.json", manifest)
        copy(Path(__file__).with_name("box_run.py"), making / "run.py")
        lines = [line for name in sorted({*IMPORTS.values(), *OPTIONAL}) for line in locked[name]]
        (making / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        told = "".join(f"\n- {note}" for note in notes)
        text = README.format(run=manifest["run"], stages=len(to_run), notes=f"\nTo be put here by hand:\n{told}\n" if notes else "")
        (making / "README.md").write_text(text, encoding="utf-8")
        (making / ".gitignore").write_text("*\n", encoding="utf-8")  # it ignores itself
        os.rename(making, box)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    size = sum(p.stat().st_size for p in box.rglob("*") if p.is_file()) / 1e6
    print(f"{box}: {len(to_run)} stages of {manifest['run']}, {size:.1f} MB" + (f"; {len(here)} are up to date here" if here else ""))
    for note in notes:
        print(f"  {note}")
    print(f"copy it to the other machine, run `python {box.name}/run.py` there, copy it back, then `make unbox BOX={box}`")


def copy(source: Path, target: Path) -> str:
    """Copy a file's content; its sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    total = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as written:
        while part := read.read(1 << 20):
            total.update(part)
            written.write(part)
    return total.hexdigest()


# ---- and back


@dataclass(frozen=True)
class Returned:
    """A box that came back. done: stage -> what the runner noted of it, of stages that it finished."""

    box: Path
    manifest: Mapping[str, Any]
    done: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, box: Path) -> Returned:
        """Raises BoxError where it is no box, nothing was run in it, or a file in it names a place outside."""
        if not (box / "box.json").is_file():
            raise BoxError([f"{box}: not a box (no box.json)"])
        if not (box / "done.json").is_file():
            raise BoxError([f"{box}: nothing was run in it (no done.json)"])
        try:
            manifest, entries = read_json(box / "box.json"), read_json(box / "done.json")["stages"]
            formed = {name: entry for name, entry in entries.items() if "outputs" in entry}
            names = [manifest["run"], manifest["profile"], *manifest["files"], *manifest["settings_files"]]
            names += [name for s in manifest["stages"] for name in (s["log"], *s["inputs"], *s["outputs"])]
            names += [name for e in formed.values() for key in ("inputs", "outputs", "log") for name in e[key]]
            names += [item for item in manifest["overrides"] if "=" not in item]
            told = manifest["format"]
            for entry in formed.values():
                float(entry["seconds"]), dict(entry["machine"]), list(entry["command"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BoxError([f"{box}: box.json or done.json is damaged ({type(error).__name__}: {error})"]) from None
        if told != FORMAT:
            raise BoxError([f"{box}: of format {told}; this version takes format {FORMAT}"])
        outside = [f"{name!r} leads out of the box" for name in names if not is_inside(str(name))]
        outside += [f"{name} is a link" for name in dict.fromkeys(map(str, names)) if is_inside(name) and has_link(box, name)]
        if outside:
            raise BoxError(outside)
        if not formed:
            raise BoxError([f"{box}: no stage was finished in it"])
        return cls(box, manifest, formed)


def has_link(box: Path, name: str) -> bool:
    path = box / name
    return any(p.is_symlink() for p in (path, *path.parents) if p != box and p.is_relative_to(box))


def own_problems(returned: Returned) -> list[str]:
    """How the box is not as it was packed, or not as its runner left it."""
    box, wrong = returned.box, []
    for name, content in returned.manifest["files"].items():
        fixed = name.startswith("src/") or name in returned.manifest["settings_files"]
        if fixed and (box / name).is_file() and sha256(box / name) != content:
            wrong.append(f"{name}: changed in the box since it was packed")
    known = {stage["name"]: stage for stage in returned.manifest["stages"]}
    for stage, entry in returned.done.items():
        theirs = known.get(stage, {"outputs": (), "log": "", "command": ()})
        written = {*entry["outputs"], *entry["log"]}
        if written != {*theirs["outputs"], theirs["log"]} or entry["command"] != theirs["command"]:
            wrong.append(f"{stage}: not as box.json has it")
        for name, content in {**entry["outputs"], **entry["log"]}.items():
            if not (box / name).is_file():
                wrong.append(f"{name}: missing")
            elif sha256(box / name) != content:
                wrong.append(f"{name}: changed or truncated since {stage} wrote it")
        for name, content in entry["inputs"].items():
            if name in returned.manifest["settings_files"] and content != returned.manifest["files"].get(name):
                wrong.append(f"{name}: {stage} was run with others than were packed")
    return wrong


def home_problems(returned: Returned, stages: Mapping[str, Stage], here: set[str]) -> list[str]:
    """How settings, code and inputs of what was run differ from those of this checkout."""
    wrong: list[str] = []
    packed = {stage["name"]: stage for stage in returned.manifest["stages"]}
    maker = makers(stages)
    brought = {name: content for entry in returned.done.values() for name, content in entry["outputs"].items()}
    hashes: dict[str, str] = {}
    for name, entry in returned.done.items():
        stage = stages.get(name)
        if stage is None:
            wrong.append(f"{name}: this profile has no such stage here")
            continue
        theirs = packed[name]
        other = differences(theirs["settings"], stage.settings)
        wrong += [f"{name}: {what}" for what in other]
        if not other and (tuple(theirs["command"]), theirs["log"]) != (stage.command, stage.log):
            wrong.append(f"{name}: its command is another here: python {shlex.join(stage.command)}")
        if set(theirs["outputs"]) != set(stage.outputs):
            wrong.append(f"{name}: it writes other files here")
        read = {file: content for file, content in entry["inputs"].items() if file not in returned.manifest["settings_files"]}
        for file in sorted(set(stage.inputs) ^ set(read)):
            wrong.append(f"{file}: {name} {'reads it here, not in the box' if file in stage.inputs else 'read it in the box, not here'}")
        for file in sorted(set(stage.inputs) & set(read)):
            if file not in brought and file not in hashes:
                hashes[file] = sha256(Path(file)) if Path(file).is_file() else ""
            content = brought.get(file, hashes.get(file))
            if not content:
                wrong.append(f"{file}: was packed, is not here any more")
            elif content != read[file]:
                wrong.append(f"{file}: {name} was run with another one")
            if file in maker and file not in brought and content and maker[file] not in here:
                wrong.append(f"{file}: {maker[file]}, which wrote it, would run again here")
    return wrong


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Settings that differ, in words."""
    a, b = flat(theirs), flat(ours)
    return [f"{key} was {a.get(key)!r} in the box, is {b.get(key)!r} here" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def conflicts(returned: Returned) -> list[str]:
    """Other results that lie where these belong."""
    files = [(name, content) for entry in returned.done.values() for name, content in entry["outputs"].items()]
    return [f"{name}: another one is here" for name, content in files if os.path.lexists(name) and not holds(Path(name), content)]


def holds(path: Path, content: str) -> bool:
    return path.is_file() and sha256(path) == content


def place(returned: Returned) -> int:
    """Copy what was made, and only then move it all to where it belongs. Returns how many files were not here already."""
    wanted = {name: content for entry in returned.done.values() for name, content in {**entry["outputs"], **entry["log"]}.items()}
    wanted = {name: content for name, content in wanted.items() if not holds(Path(name), content)}
    copies = {name: Path(name).with_name(f".{Path(name).name}.{os.getpid()}.box") for name in wanted}
    try:
        changed = [f"{name}: changed while it was taken" for name in wanted if copy(returned.box / name, copies[name]) != wanted[name]]
        if changed:
            raise BoxError(changed)
        for name, path in copies.items():
            os.replace(path, name)
    finally:
        for path in copies.values():
            path.unlink(missing_ok=True)
    return len(wanted)


def take_over(profile_name: str, overrides: Sequence[str], stages: Mapping[str, Stage], names: Sequence[str], before: set[str]) -> None:
    """Have Snakemake, and DVC where it versions this profile, take the placed outputs for their own.

    before: stages that were up to date here, of which DVC may not know yet.
    """
    if not overrides and Path(".dvc/config").exists() and Path(".git").exists():
        dvc_stages.write(profile_name)
        file, maker = dvc_stages.target(profile_name), makers(stages)
        known = {*names}
        for name in names:
            known |= {maker[f] for f in ancestors(stages, name) if maker.get(f) in before}
        dvc_results.run("dvc", "commit", "--force", *(f"{file}:{name}" for name in stages if name in known))
        print(dvc_results.settle(profile_name) or "Snakemake and DVC know them already")
    else:
        targets = [file for name in names for file in stages[name].outputs]
        dvc_results.run("snakemake", "--touch", *dvc_stages.config(profile_name, overrides), "--forcerun", *targets, "--", *targets)
    left = current(profile_name, overrides, stages)
    if missed := [name for name in names if name not in left]:
        raise BoxError([f"{name}: placed, but Snakemake would make it again; `snakemake -n --quiet host` says why" for name in missed])


def ancestors(stages: Mapping[str, Stage], name: str) -> set[str]:
    """All files that a stage, or one before it, reads."""
    maker, found, waiting = makers(stages), set[str](), [name]
    while waiting:
        for file in stages[waiting.pop()].inputs:
            if file not in found:
                found.add(file)
                waiting += [maker[file]] if file in maker else []
    return found


def take(asked: argparse.Namespace) -> None:
    """Check a box and take its results. Raises BoxError, and changes nothing, where something is not as it has to be."""
    returned = Returned.read(Path(asked.box))
    if wrong := own_problems(returned):
        raise BoxError(wrong, "the box is not as it was left: copy it back again, or run those stages there again")
    if not asked.force and (wrong := conflicts(returned)):
        raise BoxError(wrong, "move them away, or take these all the same: --force (make unbox FORCE=1)")
    dvc_results.refuse_beside_dvc()
    if any(Path(".snakemake/locks").glob("*")):
        raise BoxError(["a snakemake is at work in this folder (or was killed: `make unlock`); wait for it"])
    manifest = returned.manifest
    profile, overrides = str(manifest["profile"]), list(manifest["overrides"])
    stages = plan(profile, overrides)
    before = current(profile, overrides, stages)
    if wrong := home_problems(returned, stages, before):
        was = f"it was packed at commit {manifest['commit']}, here is {git_commit()}"
        raise BoxError(wrong, f"{was}: go to that code and those settings, or pack and run again")
    names = [name for name in stages if name in returned.done]
    count = place(returned)
    take_over(profile, overrides, stages, names, before)
    machines = {re.sub(r"\s+", " ", f"{e['machine'].get('device')}, torch {e['machine'].get('torch')}") for e in returned.done.values()}
    seconds = sum(entry["seconds"] for entry in returned.done.values())
    print(f"took {len(names)} of {len(manifest['stages'])} stages, {count} new files ({'; '.join(sorted(machines))}; {seconds:.0f} s)")
    rest = shlex.join(["snakemake", *dvc_stages.config(profile, overrides)])
    print(f"`ebjdat sync` sends their metrics to MLflow, `{rest}` makes what is left, for example the report")


def main() -> int:
    parser = argparse.ArgumentParser(description="Stages to another machine, and their results back.")
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="write the folder to be copied to the other machine")
    packing.add_argument("box")
    packing.add_argument("--profile", default=dvc_stages.DEFAULT)
    packing.add_argument("--overrides", default="", help="YAML files and key.path=value words, as a shell parts them")
    packing.add_argument("--experiments", nargs="*", default=[], help="these and what they need; default: all")
    packing.add_argument(
        "--stages", nargs="*", default=[], help="these (finetune, attack, …) and what they need; default: all but the report"
    )
    packing.add_argument("--also", nargs="*", default=[], metavar="PATH", help="further files and folders, for example datasets")
    packing.set_defaults(command=pack)
    taking = commands.add_parser("take", help="check a folder that came back and take its results")
    taking.add_argument("box")
    taking.add_argument("--force", action="store_true", help="also in place of other results")
    taking.set_defaults(command=take)
    asked = parser.parse_args()
    try:
        refuse_another(Path.cwd())
        asked.command(asked)
    except (UserError, dvc_results.BusyError, dvc_results.DvcError) as error:
        end = getattr(error, "end", "")
        print(f"error: {error}" + (f"\n{end}" if end else ""), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
