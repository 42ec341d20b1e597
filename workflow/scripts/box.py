"""A profile's stages, taken to a machine that has torch and a few small packages, and their results back from there.

    python workflow/scripts/box.py pack BOX [--profile NAME] [--overrides "..."] [--experiments A B] [--stages attack] [--also PATH]
    python workflow/scripts/box.py take BOX [--force]

`pack` writes a folder with the stages' commands (src/ebjdat/jobs.py), the package, the settings and what is here already of their
inputs. There `python run.py` (workflow/scripts/box_run.py) runs them. `take` checks the folder that came back against itself and
against this checkout, puts results where the rules expect them, and has Snakemake and DVC take them over: all that was finished
there, or nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import at_work
import box_run
import dvc_results
import dvc_stages
from box_run import Done, Stage, read, sha256

from ebjdat import jobs
from ebjdat.checkout import refuse_another
from ebjdat.errors import UserError, brief, in_a_line, message
from ebjdat.files import git_commit, write_json, write_text
from ebjdat.layout import Layout
from ebjdat.registry import SOURCES
from ebjdat.settings import AUTO, Profile, flat, join_overrides, load, nearest, require_files, run_name, split_overrides

FORMAT = 3
AT_HOME = "report"  # needs every experiment, and packages that the other stages do not
MOST_LISTED = 12  # problems in a message
# What the stages import; the box asks for all but the first two in the versions of requirements.lock.
NEEDED = (
    *("torch", "torchvision"),
    *("joblib", "matplotlib", "numpy", "pillow", "psutil", "pyarrow", "pyautoattack", "pydantic", "pyyaml", "rich", "safetensors"),
    *("scikit-learn", "scipy", "torch-fidelity", "typer"),
)
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn", "torch-fidelity": "torch_fidelity"}  # others: as the package
PACKAGES = (*NEEDED[2:], "nvidia-ml-py")  # the last, the GPU's load in the journals, may be missing

Plan = dict[jobs.Job, Stage]


def refuse(problems: Iterable[str], advice: str = "") -> None:
    """Raises UserError if there are any problems: one per line, then the advice."""
    if lines := list(dict.fromkeys(problems)):
        more = [f"… and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
        raise UserError("\n  ".join([*lines[:MOST_LISTED], *more]) + (f"\n{advice}" if advice else ""))


def plan(profile_name: str, overrides: Sequence[str]) -> Plan:
    """The profile's stages as box.json has them, but for those that stay here."""
    params = f"params/{profile_name}.yaml"
    profile, layout = load(params, overrides), Layout(run_name(params, overrides))
    options = ["--params", params, *(word for item in overrides for word in ("--override", item))]
    return {
        job: {
            "name": job.title,
            "command": ["-m", "ebjdat", *jobs.command(profile, layout, job, options)],
            "log": layout.log(job.place, job.stage),
            "inputs": [file for group in jobs.inputs(profile, layout, job).values() for file in group],
            "outputs": list(jobs.outputs(layout, job).values()),
            **jobs.depends_on(profile, job),
        }
        for job in jobs.jobs(profile)
        if job.stage != AT_HOME
    }


def with_needed(stages: Plan, wanted: Iterable[jobs.Job], without: Collection[jobs.Job] = ()) -> Plan:
    """These jobs in this order, each after those that it reads from; not those `without`, nor what only these need."""
    maker = {file: job for job, stage in stages.items() for file in stage["outputs"]}
    found: Plan = {}

    def add(job: jobs.Job) -> None:
        if job not in found and job not in without:
            for file in stages[job]["inputs"]:
                if file in maker:
                    add(maker[file])
            found[job] = stages[job]

    for job in wanted:
        add(job)
    return found


def config(profile: str, overrides: Sequence[str]) -> list[str]:
    """Snakemake's options for a profile and its overrides."""
    return ["--config", f"profile={profile}", *([f"overrides={join_overrides(overrides)}"] if overrides else [])]


def current(profile: str, overrides: Sequence[str], stages: Plan) -> set[jobs.Job]:
    """Jobs whose outputs are here and up to date, as Snakemake judges."""
    rows = dvc_results.run("snakemake", "--summary", "--nolock", *config(profile, overrides)).splitlines()
    here = {row.split("\t")[0] for row in rows if row.endswith("\tno update")}
    return {job for job, stage in stages.items() if here.issuperset(stage["outputs"]) and all(map(os.path.isfile, stage["outputs"]))}


def files_below(name: str) -> list[str]:
    """The file, or all files in the folder."""
    found = [Path(name), *Path(name).rglob("*")]
    return sorted(str(path) for path in found if path.is_file() and "__pycache__" not in path.parts)


def copy(source: Path, target: Path) -> str:
    """Copy a file's content; its sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return sha256(target)


def by_hand(profile: Profile, rules: Collection[str], root: Path) -> str:
    """What to do about image sets that these stages read from `data.root`, which a box does not hold by itself."""
    data, ood = profile.data, profile.evaluation.reliability.ood
    names = [*([data.source] if "prepare" in rules else []), *(ood if "reliability" in rules else [])]
    colour = data.record.shape is None or data.record.shape[0] == 3  # only then `auto` looks for image sets
    sets = ", ".join(name for name in names if (name == AUTO and colour) or (name in SOURCES and SOURCES[name].downloads))
    advice = f"put image sets ({sets}) into {root} if that machine cannot download them, or pack with --also {data.root}"
    return f"{advice}\n" if sets else ""


def wrong_options(options: argparse.Namespace, names: Sequence[str], rules: Sequence[str]) -> Iterator[str]:
    """What the options of `pack` name that is not there, or is there already."""
    if Path(options.box).exists():
        yield f"{options.box} is there already; take it, delete it, or give another name (BOX=…)"
    yield from (f"{name!r}: {nearest(name, names)}" for name in options.experiments if name not in names)
    yield from (f"{name!r}: {nearest(name, rules)}" for name in options.stages if name not in rules)
    yield from (f"--also {path}: is not here" for path in options.also if not Path(path).exists())


def pack(options: argparse.Namespace) -> None:
    """Write the box. Raises UserError, and writes nothing, where something cannot be packed."""
    box, overrides, params = Path(options.box), split_overrides(options.overrides), f"params/{options.profile}.yaml"
    profile = load(params, overrides)
    require_files(profile)
    names, seeds, rules = list(profile.experiments), list(profile.seeds), [rule for rule in jobs.STAGES if rule != AT_HOME]
    refuse(wrong_options(options, names, rules))

    def turn(job: jobs.Job) -> tuple[int, ...]:
        """All of an experiment before the next, all experiments of a seed; what they share is run where it is needed."""
        return (0, seeds.index(job.seed), names.index(job.name)) if jobs.STAGES[job.stage].of == "experiment" else (1,)

    stages = plan(options.profile, overrides)
    here = current(options.profile, overrides, stages)
    wanted = [job for job in stages if job.name in (options.experiments or [job.name]) and job.stage in (options.stages or rules)]
    chosen = with_needed(stages, sorted(wanted, key=turn), here)
    to_run, packed_rules = list(chosen.values()), {job.stage for job in chosen}
    refuse([] if to_run else ["everything that was asked for is up to date here: nothing to pack"])
    reliability = profile.evaluation.reliability
    images = [
        ("prepare", "data.path", profile.data.path),
        ("prepare", "data.extra", profile.data.extra),
        ("reliability", "evaluation.reliability.ood_path", reliability.ood_path),
    ]
    refuse(
        f"{key}: {path} is not a file here; name an archive of the images, or, for those of `data`, make the prepared data here first"
        for rule, key, path in images
        if rule in packed_rules and path and not Path(path).is_file()
    )
    made = {file for stage in to_run for file in stage["outputs"]}
    files = [params, *(item for item in overrides if "=" not in item), *files_below("src/ebjdat")]
    files += [file for stage in to_run for file in stage["inputs"] if file not in made]
    also = [file for path in options.also for file in files_below(path)]
    outside = [name for name in (*files, *also) if Path(name).is_absolute() or ".." in Path(name).parts]
    refuse(f"{name} is not below this folder, so the box would not find it" for name in outside)
    run, note = run_name(params, overrides), by_hand(profile, packed_rules, box / profile.data.root)
    locked = [(line.split("==")[0], line) for line in Path("requirements.lock").read_text(encoding="utf-8").splitlines()]
    making = box.with_name(f".{box.name}.{os.getpid()}.tmp")
    try:
        for name in also:
            copy(Path(name), making / name)
        manifest = {
            "format": FORMAT,
            "profile": options.profile,
            "overrides": overrides,
            "run": run,
            "commit": git_commit(),
            "stages": to_run,
            "files": {name: copy(Path(name), making / name) for name in files},
            "imports": {MODULES.get(name, name): line.split(" ;")[0] for name, line in locked if name in NEEDED},
        }
        write_json(making / "box.json", manifest)
        copy(Path(box_run.__file__), making / "run.py")
        write_text(making / "requirements.txt", "".join(f"{line}\n" for name, line in locked if name in PACKAGES))
        write_text(making / "README.md", f"# {run}: {len(to_run)} stages\n\n{box_run.__doc__}\n{note}")
        write_text(making / ".gitignore", "*\n")  # it ignores itself
        os.rename(making, box)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    size = sum(p.stat().st_size for p in box.rglob("*") if p.is_file()) / 1e6
    print(f"{box}: {len(to_run)} stages of {run}, {size:.1f} MB" + (f"; {len(here)} are up to date here" if here else ""))
    print(f"{note}copy it to the other machine, run `python {box.name}/run.py` there, copy it back, then `make unbox BOX={box}`")


# ---- and back


def problems(box: Path, packed: dict[str, str], done: Done, stages: Plan, here: set[jobs.Job], force: bool) -> Iterator[str]:
    """What keeps these results from being taken. packed: files of the box and their sha256. here: jobs that are up to date."""
    own = {stage["name"]: stage for stage in stages.values()}
    brought = {file: entry["files"][file] for entry in done.values() for file in entry["stage"]["outputs"]}
    stale = {file for job, stage in stages.items() if job not in here for file in stage["outputs"]} - brought.keys()
    for name, content in packed.items():
        if sha256(box / name) not in ("", content):
            yield f"{name}: changed in the box since it was packed; undo it there and rerun"
    for name, entry in done.items():
        if name not in own:
            yield f"{name}: this profile has no such stage here"
            continue
        was, now = flat(entry["stage"]), flat(own[name])
        for key in {**now, **was}:
            if (a := was.get(key)) != (b := now.get(key)):
                yield f"{name}: {key.removeprefix('settings.')} was {brief(a, 100)} in the box, is {brief(b, 100)} here"
        for file in entry["stage"]["inputs"]:
            content = brought.get(file) or sha256(Path(file))
            if entry["files"][file] != content:
                yield f"{file}: {f'{name} was run with another one' if content else 'was packed, is not here any more'}"
            elif file in stale:
                yield f"{file}: what wrote it would run again here"
        for file in entry["stage"]["outputs"]:
            if (content := sha256(box / file)) != brought[file]:
                how = f"changed or truncated since {name} wrote it" if content else "missing"
                yield f"{file}: {how}; copy the box here again, or rerun {name} there"
            elif not force and os.path.lexists(file) and sha256(Path(file)) != content:
                yield f"{file}: another one is here; move it away, or take these all the same: --force (make unbox FORCE=1)"


def place(box: Path, taken: Sequence[Stage], done: Done) -> int:
    """Copy what was made, and only then move it all to where it belongs. Returns how many files were not here already."""
    wanted = {file: done[stage["name"]]["files"][file] for stage in taken for file in stage["outputs"]}
    wanted |= {stage["log"]: content for stage in taken if (content := sha256(box / stage["log"]))}
    wanted = {file: content for file, content in wanted.items() if sha256(Path(file)) != content}
    copies = {file: Path(file).with_name(f".{Path(file).name}.{os.getpid()}.box") for file in wanted}
    try:
        refuse([f"{file}: changed while it was taken" for file, path in copies.items() if copy(box / file, path) != wanted[file]])
        for file, path in copies.items():
            os.replace(path, file)
    finally:
        for path in copies.values():
            path.unlink(missing_ok=True)
    return len(wanted)


def adopt(profile: str, overrides: Sequence[str], stages: Plan, taken: list[jobs.Job], before: set[jobs.Job]) -> None:
    """Have Snakemake, and DVC where it versions this profile, adopt what was placed. before: what was up to date, maybe unknown to DVC."""
    if not overrides and Path(".dvc/config").exists() and Path(".git").exists():
        dvc_stages.write(profile)
        dvc_stages.write_digests(dvc_stages.digests(profile))
        known = [stages[job]["name"] for job in with_needed(stages, taken) if job in before or job in taken]
        dvc_results.run("dvc", "commit", "--force", *(f"{dvc_stages.target(profile)}:{name}" for name in (dvc_stages.DIGESTS, *known)))
        print(dvc_results.adopt_dvc_outputs(profile) or "Snakemake and DVC know them already")
    else:
        targets = [file for job in taken for file in stages[job]["outputs"]]
        dvc_results.run("snakemake", "--touch", *config(profile, overrides), "--forcerun", *targets, "--", *targets)
    now = current(profile, overrides, stages)
    missed = [stages[job]["name"] for job in taken if job not in now]
    refuse(f"{name}: placed, but Snakemake would make it again; `snakemake -n --quiet host` says why" for name in missed)


def take(options: argparse.Namespace) -> None:
    """Check a box and take its results. Raises UserError, and changes nothing, where something is not as it has to be."""
    box = Path(options.box)
    manifest = read(box / "box.json", "is this what `make box` wrote? Copy it here again")
    entries = read(box / "done.json", "run the box, then copy it here again")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{box}: of format {manifest.get('format')}; this version takes format {FORMAT}")
    if busy := at_work.by_another():
        raise UserError(busy)
    try:
        profile, overrides, packed = str(manifest["profile"]), list(manifest["overrides"]), dict(manifest["files"])
        done = {name: entry for name, entry in entries.items() if entry["files"].keys() >= set(entry["stage"]["outputs"])}
        names = [f"params/{profile}.yaml", *(item for item in overrides if "=" not in item), *packed]
        names += [file for entry in done.values() for file in (*entry["stage"]["outputs"], entry["stage"]["log"])]
        strays = [name for name in names if not Path(box, name).is_relative_to(box) or Path(box, name).resolve() != box.resolve() / name]
        refuse(f"{name!r} leads out of the box, or is a link" for name in strays)
        refuse([] if done else [f"{box}: no stage was finished in it"])
        stages = plan(profile, overrides)
        here = current(profile, overrides, stages)
        found = list(problems(box, packed, done, stages, here, options.force))
        machines = {f"{entry['machine']['device']}, torch {entry['machine']['torch']}" for entry in done.values()}
        seconds = sum(float(entry["seconds"]) for entry in done.values())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{box}: box.json or done.json is damaged ({in_a_line(error)}); copy the box here again") from None
    refuse(found, f"it was packed at commit {manifest['commit']}, here is {git_commit()}; docs/box.md says what to do")
    taken = [job for job, stage in stages.items() if stage["name"] in done]
    count = place(box, [stages[job] for job in taken], done)
    adopt(profile, overrides, stages, taken, here)
    summary = f"{'; '.join(sorted(machines))}; {seconds:.0f} s"
    print(message(f"took {len(taken)} of {len(manifest['stages'])} stages, {count} new files ({summary})"))
    rest = shlex.join(["snakemake", *config(profile, overrides)])
    print(f"`ebjdat sync` sends their metrics to MLflow, `{rest}` makes what is left, for example the report")


def main() -> int:
    parser = argparse.ArgumentParser(description="Stages to another machine, and their results back.")
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="write the folder to be copied to the other machine")
    packing.add_argument("box")
    packing.add_argument("--profile", default=dvc_stages.DEFAULT)
    packing.add_argument("--overrides", default="", help="YAML files and key.path=value words, quoted as in a shell")
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
    except (UserError, dvc_results.DvcError, OSError) as error:
        print(message(f"error: {error}"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
