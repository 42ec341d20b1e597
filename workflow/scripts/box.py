"""Take a profile's stages to a machine that has torch and a few small packages, and their results back from there.

    python workflow/scripts/box.py pack BOX [--profile NAME] [--overrides "..."] [--experiments A B] [--stages attack] [--also PATH]
    python workflow/scripts/box.py take BOX [--force]

`pack` writes a folder with the stages' commands (src/ebjdat/jobs.py), the package, the settings and what is here already of their
inputs. There `python run.py` (workflow/scripts/box_run.py) runs them. `take` checks the folder that came back against itself and
against this checkout, puts results where the rules expect them, and has Snakemake and DVC take them over: all that was finished
there, or nothing.
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
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import at_work
import dvc_results
import dvc_stages

from ebjdat import jobs
from ebjdat.checkout import refuse_another
from ebjdat.errors import UserError
from ebjdat.files import git_commit, read_json, write_json
from ebjdat.layout import Layout
from ebjdat.registry import SOURCES
from ebjdat.settings import Profile, flat, join_overrides, load, nearest, run_name, split_overrides

FORMAT = 2
AT_HOME = "report"  # needs every experiment, and packages that the other stages do not
MOST_LISTED = 12  # problems in a message
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
    python run.py --minutes 9     # stop in time, keep the state; exit code 75: run it again to continue
    python run.py --status

Then copy this folder back (`src` and `site` may stay) and, in the checkout that it came from, `make unbox BOX=…`.
{notes}"""


class BoxError(UserError):
    """What keeps a box from being packed or taken: one problem per line."""

    def __init__(self, problems: Iterable[str], end: str = "") -> None:
        lines = list(dict.fromkeys(problems))
        more = [f"… and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
        super().__init__("\n  ".join(["", *lines[:MOST_LISTED], *more]).lstrip() if len(lines) > 1 else lines[0])
        self.end = end


@dataclass(frozen=True)
class Stage:
    """One job. command: arguments of python; inputs, outputs: files; code, settings: what its results depend on beside them."""

    name: str
    command: list[str]
    log: str
    inputs: list[str]
    outputs: list[str]
    code: str
    settings: dict[str, Any]


def plan(profile_name: str, overrides: Sequence[str]) -> dict[jobs.Job, Stage]:
    """Each stage after those that it reads from: all of an experiment before the next, all experiments of a seed."""
    params = f"params/{profile_name}.yaml"
    profile = load(params, overrides)
    layout = Layout(run_name(params, overrides))
    options = ["--params", params, *(word for item in overrides for word in ("--override", item))]
    stages = {}
    for job in jobs.jobs(profile):
        if job.stage != AT_HOME:
            words = ["-m", "ebjdat", *jobs.command(profile, layout, job, options)]
            inputs = [file for group in jobs.inputs(profile, layout, job).values() for file in group]
            outputs = list(jobs.outputs(layout, job).values())
            stages[job] = Stage(job.title, words, layout.log(job.place, job.stage), inputs, outputs, **jobs.depends_on(profile, job))
    order: dict[jobs.Job, Stage] = {}
    experiments, seeds = list(profile.experiments), list(profile.seeds)

    def put(job: jobs.Job) -> None:
        for before in needs(stages, job):
            put(before)
        order.setdefault(job, stages[job])

    shared = [job for job in stages if job.name not in experiments or jobs.STAGES[job.stage].of != "experiment"]
    for job in sorted(stages.keys() - set(shared), key=lambda j: (seeds.index(j.seed), experiments.index(j.name), [*stages].index(j))):
        put(job)
    for job in shared:
        put(job)
    return order


def needs(stages: Mapping[jobs.Job, Stage], job: jobs.Job) -> list[jobs.Job]:
    """Jobs whose outputs a job reads."""
    return [other for other, stage in stages.items() if set(stage.outputs).intersection(stages[job].inputs)]


def current(profile_name: str, overrides: Sequence[str], stages: Mapping[jobs.Job, Stage]) -> set[jobs.Job]:
    """Jobs whose outputs are here and up to date, as Snakemake judges."""
    rows = dvc_results.run("snakemake", "--summary", "--nolock", *config(profile_name, overrides)).splitlines()
    here = {row.split("\t")[0] for row in rows if row.endswith("\tno update")}
    return {job for job, stage in stages.items() if here.issuperset(stage.outputs) and all(map(os.path.isfile, stage.outputs))}


def config(profile: str, overrides: Sequence[str]) -> list[str]:
    """Snakemake's options for a profile and what is laid over it."""
    return ["--config", f"profile={profile}", *([f"overrides={join_overrides(overrides)}"] if overrides else [])]


def with_needed(stages: Mapping[jobs.Job, Stage], wanted: Iterable[jobs.Job], without: set[jobs.Job]) -> list[jobs.Job]:
    """These jobs and those before them, in the plan's order; not what is up to date, nor what only that needs."""
    waiting, chosen = list(wanted), set[jobs.Job]()
    while waiting:
        job = waiting.pop()
        if job not in chosen and job not in without:
            chosen.add(job)
            waiting += needs(stages, job)
    return [job for job in stages if job in chosen]


def data_notes(profile: Profile, rules: set[str], root: Path) -> list[str]:
    """What has to be put into the box by hand. Raises BoxError for data that cannot be taken there as they are."""
    notes, problems = [], []
    first = "make the prepared data here first (snakemake … data/…/data.npz) and pack again: they are taken along"
    ood, weights = profile.evaluation.reliability, profile.evaluation.generate.inception_weights
    for rule, key, path, advice in (
        ("prepare", "data.path", profile.data.path, first),
        ("reliability", "evaluation.reliability.ood_path", ood.ood_path, "name an archive in this folder"),
        ("generate", "evaluation.generate.inception_weights", weights, "name a file in this folder"),
    ):
        if rule not in rules or not path:
            continue
        if not is_inside(path):
            problems.append(f"{key} is {path}, which is not below this folder, so the box would not find it; {advice}")
        elif Path(path).is_dir():
            problems.append(f"{key} is a folder ({path}); an archive of it can be packed, or {advice}")
        elif not Path(path).is_file():
            problems.append(f"{key}: {path} is not here; put it here, or {advice}")
    if problems:
        raise BoxError(problems)
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


def is_inside(name: str) -> bool:
    """Whether a path stays within the folder that it is relative to."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def sha256(path: Path) -> str:
    """ "" where there is no file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(path: Path) -> list[str]:
    return [str(p) for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]


def pack(options: argparse.Namespace) -> None:
    """Write the box. Raises BoxError, and writes nothing, where something cannot be packed."""
    box, overrides = Path(options.box), split_overrides(options.overrides)
    if box.exists():
        raise BoxError([f"{box} is there already; take it, delete it, or give another name (BOX=…)"])
    params = f"params/{options.profile}.yaml"
    profile = load(params, overrides)
    rules = [rule for rule in jobs.STAGES if rule != AT_HOME]
    unknown = [f"{n!r}: {nearest(n, list(profile.experiments))}" for n in options.experiments if n not in profile.experiments]
    unknown += [f"{n!r}: {nearest(n, rules)}" for n in options.stages if n not in rules]
    unknown += [f"--also {path}: is not here" for path in options.also if not Path(path).exists()]
    if unknown:
        raise BoxError(unknown)
    stages = plan(options.profile, overrides)
    here = current(options.profile, overrides, stages)
    names, kinds = options.experiments, options.stages
    wanted = [job for job in stages if (not names or job.name in names) and (not kinds or job.stage in kinds)]
    chosen = with_needed(stages, wanted, here)
    to_run = [stages[job] for job in chosen]
    if not to_run:
        raise BoxError(["everything that was asked for is up to date here: nothing to pack"])
    notes = data_notes(profile, {job.stage for job in chosen}, box)
    settings_files = [params, *(item for item in overrides if "=" not in item)]
    made_there = {file for stage in to_run for file in stage.outputs}
    inputs = {file for stage in to_run for file in stage.inputs if file not in made_there}
    code = files_below(Path("src/ebjdat"))
    files = sorted({*settings_files, *inputs, *code, *(name for path in options.also for name in files_below(Path(path)))})
    if beyond := [f"{name} is not below this folder, so the box would not find it" for name in files if not is_inside(name)]:
        raise BoxError(beyond)
    locked: dict[str, list[str]] = {}
    for line in Path("requirements.lock").read_text(encoding="utf-8").splitlines():
        locked.setdefault(line.split("==")[0], []).append(line)
    making = box.with_name(f".{box.name}.{os.getpid()}.tmp")
    try:
        manifest = {
            "format": FORMAT,
            "profile": options.profile,
            "overrides": overrides,
            "run": run_name(params, overrides),
            "commit": git_commit(),
            "fixed": sorted({*settings_files, *code}),
            "stages": [asdict(stage) for stage in to_run],
            "files": {name: copy(Path(name), making / name) for name in files},
            "imports": {"torch": "torch", "torchvision": "torchvision"} | {m: locked[d][0].split(" ;")[0] for m, d in IMPORTS.items()},
        }
        write_json(making / "box.json", manifest)
        copy(Path(__file__).with_name("box_run.py"), making / "run.py")
        lines = [line for name in sorted({*IMPORTS.values(), *OPTIONAL}) for line in locked[name]]
        (making / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        by_hand = "".join(["\nTo be put here by hand:\n", *(f"\n- {note}" for note in notes), "\n"]) if notes else ""
        (making / "README.md").write_text(README.format(run=manifest["run"], stages=len(to_run), notes=by_hand), encoding="utf-8")
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
    shutil.copyfile(source, target)
    return sha256(target)


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
        for name, what in (("box.json", "not a box"), ("done.json", "nothing was run in it")):
            if not (box / name).is_file():
                raise BoxError([f"{box}: {what} (no {name})"])
        try:
            manifest, entries = read_json(box / "box.json"), read_json(box / "done.json")["stages"]
            done = {name: entry for name, entry in entries.items() if "outputs" in entry}
            names = [manifest["run"], manifest["profile"], *manifest["files"], *manifest["fixed"]]
            names += [name for s in manifest["stages"] for name in (s["log"], *s["inputs"], *s["outputs"])]
            names += [name for e in done.values() for key in ("inputs", "outputs", "log") for name in e[key]]
            names += [item for item in manifest["overrides"] if "=" not in item]
            version = manifest["format"]
            for entry in done.values():
                float(entry["seconds"]), dict(entry["machine"]), list(entry["command"]), str(entry["fixed"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BoxError([f"{box}: box.json or done.json is damaged ({type(error).__name__}: {error})"]) from None
        if version != FORMAT:
            raise BoxError([f"{box}: of format {version}; this version takes format {FORMAT}"])
        problems = [f"{name!r} leads out of the box" for name in names if not is_inside(str(name))]
        problems += [f"{name} is a link" for name in dict.fromkeys(map(str, names)) if is_inside(name) and has_link(box, name)]
        if problems or not done:
            raise BoxError(problems or [f"{box}: no stage was finished in it"])
        return cls(box, manifest, done)


def has_link(box: Path, name: str) -> bool:
    path = box / name
    return any(p.is_symlink() for p in (path, *path.parents) if p != box and p.is_relative_to(box))


def problems_of_box(returned: Returned) -> list[str]:
    """How the box is not as it was packed, or not as its runner left it."""
    box, packed = returned.box, returned.manifest["files"]
    changed = [name for name in returned.manifest["fixed"] if (box / name).is_file() and sha256(box / name) != packed.get(name)]
    problems = [f"{name}: changed in the box since it was packed" for name in changed]
    fixed = hashlib.sha256("\n".join(packed[name] for name in returned.manifest["fixed"]).encode()).hexdigest()
    stages = {stage["name"]: stage for stage in returned.manifest["stages"]}
    for name, entry in returned.done.items():
        stage = stages.get(name, {"outputs": (), "inputs": (), "log": "", "command": ()})
        files = {**entry["outputs"], **entry["log"]}
        same = [set(files) == {*stage["outputs"], stage["log"]}, set(entry["inputs"]) == {*stage["inputs"]}]
        if not all(same) or entry["command"] != stage["command"]:
            problems.append(f"{name}: not as box.json has it")
        if entry["fixed"] != fixed:
            problems.append(f"{name}: was run with other code or settings than were packed")
        for file, content in files.items():
            if (now := sha256(box / file)) != content:
                problems.append(f"{file}: {f'changed or truncated since {name} wrote it' if now else 'missing'}")
    return problems


def problems_here(returned: Returned, stages: Mapping[jobs.Job, Stage], here: set[jobs.Job]) -> list[str]:
    """How settings, code and inputs of what was run differ from those of this checkout."""
    problems: list[str] = []
    packed = {stage["name"]: stage for stage in returned.manifest["stages"]}
    own = {stage.name: (job, stage) for job, stage in stages.items()}
    brought = {file: content for entry in returned.done.values() for file, content in entry["outputs"].items()}
    up_to_date = {file for job in here for file in stages[job].outputs}
    made = {file for stage in stages.values() for file in stage.outputs}
    for name, entry in returned.done.items():
        if name not in own:
            problems.append(f"{name}: this profile has no such stage here")
            continue
        stage, before = own[name][1], packed[name]
        a, b = flat(before["settings"]), flat(stage.settings)
        other = [f"{key} was {a.get(key)!r} in the box, is {b.get(key)!r} here" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
        problems += [f"{name}: {what}" for what in other]
        if before["code"] != stage.code:
            problems.append(f"{name}: code that it executes is another here")
        same = [before[key] == getattr(stage, key) for key in ("command", "log", "inputs", "outputs")]
        if not other and not all(same):
            problems.append(f"{name}: its command or its files are others here: python {shlex.join(stage.command)}")
        for file, content in entry["inputs"].items():
            now = brought.get(file) or sha256(Path(file))
            if now != content:
                problems.append(f"{file}: {f'{name} was run with another one' if now else 'was packed, is not here any more'}")
            if file in made and file not in brought and file not in up_to_date:
                problems.append(f"{file}: what wrote it would run again here")
    return problems


def place(returned: Returned) -> int:
    """Copy what was made, and only then move it all to where it belongs. Returns how many files were not here already."""
    wanted = {name: content for entry in returned.done.values() for name, content in {**entry["outputs"], **entry["log"]}.items()}
    wanted = {name: content for name, content in wanted.items() if sha256(Path(name)) != content}
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


def take_over(
    profile: str, overrides: Sequence[str], stages: Mapping[jobs.Job, Stage], taken: list[jobs.Job], before: set[jobs.Job]
) -> None:
    """Have Snakemake, and DVC where it versions this profile, take the placed outputs for their own.

    before: jobs whose results were up to date here, of which DVC may not know yet.
    """
    if not overrides and Path(".dvc/config").exists() and Path(".git").exists():
        dvc_stages.write(profile)
        dvc_stages.write_digests(dvc_stages.digests(profile))
        known = [job for job in with_needed(stages, taken, set()) if job in before or job in taken]
        file = dvc_stages.target(profile)
        dvc_results.run("dvc", "commit", "--force", *(f"{file}:{name}" for name in (dvc_stages.DIGESTS, *(stages[j].name for j in known))))
        print(dvc_results.adopt_dvc_outputs(profile) or "Snakemake and DVC know them already")
    else:
        targets = [file for job in taken for file in stages[job].outputs]
        dvc_results.run("snakemake", "--touch", *config(profile, overrides), "--forcerun", *targets, "--", *targets)
    here = current(profile, overrides, stages)
    if missed := [stages[job].name for job in taken if job not in here]:
        raise BoxError([f"{name}: placed, but Snakemake would make it again; `snakemake -n --quiet host` says why" for name in missed])


def take(options: argparse.Namespace) -> None:
    """Check a box and take its results. Raises BoxError, and changes nothing, where something is not as it has to be."""
    returned = Returned.read(Path(options.box))
    if problems := problems_of_box(returned):
        raise BoxError(problems, "the box is not as it was left: copy it back again, or run those stages there again")
    outputs = {name: content for entry in returned.done.values() for name, content in entry["outputs"].items()}
    conflicts = [
        f"{name}: another one is here" for name, content in outputs.items() if os.path.lexists(name) and sha256(Path(name)) != content
    ]
    if conflicts and not options.force:
        raise BoxError(conflicts, "move them away, or take these all the same: --force (make unbox FORCE=1)")
    if busy := at_work.by_another():
        raise BoxError([busy])
    manifest = returned.manifest
    profile, overrides = str(manifest["profile"]), list(manifest["overrides"])
    stages = plan(profile, overrides)
    before = current(profile, overrides, stages)
    if problems := problems_here(returned, stages, before):
        commits = f"it was packed at commit {manifest['commit']}, here is {git_commit()}"
        raise BoxError(problems, f"{commits}: go to that code and those settings, or pack and run again")
    taken = [job for job, stage in stages.items() if stage.name in returned.done]
    count = place(returned)
    take_over(profile, overrides, stages, taken, before)
    machines = {re.sub(r"\s+", " ", f"{e['machine'].get('device')}, torch {e['machine'].get('torch')}") for e in returned.done.values()}
    seconds = sum(entry["seconds"] for entry in returned.done.values())
    print(f"took {len(taken)} of {len(manifest['stages'])} stages, {count} new files ({'; '.join(sorted(machines))}; {seconds:.0f} s)")
    rest = shlex.join(["snakemake", *config(profile, overrides)])
    print(f"`ebjdat sync` sends their metrics to MLflow, `{rest}` makes what is left, for example the report")


def main() -> int:
    parser = argparse.ArgumentParser(description="Stages to another machine, and their results back.")
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="write the folder to be copied to the other machine")
    packing.add_argument("box")
    packing.add_argument("--profile", default=dvc_stages.DEFAULT)
    packing.add_argument("--overrides", default="", help="YAML files and key.path=value words, as a shell parts them")
    packing.add_argument("--experiments", nargs="*", default=[], help="these and what they need; default: all")
    packing.add_argument("--stages", nargs="*", default=[], help="these (finetune, …) and what they need; default: all but the report")
    packing.add_argument("--also", nargs="*", default=[], metavar="PATH", help="further files and folders, for example datasets")
    packing.set_defaults(command=pack)
    taking = commands.add_parser("take", help="check a folder that came back and take its results")
    taking.add_argument("box")
    taking.add_argument("--force", action="store_true", help="also in place of other results")
    taking.set_defaults(command=take)
    options = parser.parse_args()
    try:
        refuse_another(Path.cwd())
        options.command(options)
    except (UserError, dvc_results.DvcError) as error:
        end = getattr(error, "end", "")
        print(f"error: {error}" + (f"\n{end}" if end else ""), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
