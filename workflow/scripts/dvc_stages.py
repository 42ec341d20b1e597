"""A profile's dvc.yaml, one stage per job, from the table of stages (src/ebjdat/jobs.py).

    python workflow/scripts/dvc_stages.py [--profile NAME] [--check | --digests | --recordable]

The default profile's stages are in ./dvc.yaml, those of others in pipelines/NAME/dvc.yaml, so that a bare `dvc repro` runs the
default profile alone. `--check` writes nothing and exits 1 when the file is out of date. `--digests` is DVC's first stage: it
writes, for each job, what code and settings its results depend on, and exits 1 while Snakemake is at work here. `--recordable`
exits 1 when code or settings are no longer those that the run of Snakemake began with: then DVC must not record.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # the code beside this file: DVC runs experiments in copies of the checkout

import at_work
import yaml

from ebjdat import jobs
from ebjdat.errors import UserError
from ebjdat.files import write_text
from ebjdat.layout import Layout, place
from ebjdat.metrics import BARS
from ebjdat.settings import Profile, load

DEFAULT = "digits"
DIGESTS = "digests"
HEAD = """\
# Made by workflow/scripts/dvc_stages.py from src/ebjdat/jobs.py; the rule `record` keeps it current. Do not edit.
# Each stage asks Snakemake for one job and for nothing else, so that both tools see every run. The first stage always runs: it
# writes what code and settings each job's results depend on.
"""
CURVES = {"validation_clean_acc": "Validation accuracy", "loss": "Training loss"}
PICTURES = ("samples.png", "energy.png")


def target(profile: str) -> Path:
    """The profile's dvc.yaml."""
    return Path("dvc.yaml") if profile == DEFAULT else Path("pipelines", profile, "dvc.yaml")


def recorded(profile: str) -> str:
    """Output of the rule `record`: whoever recorded last touches it."""
    return f".dvc/tmp/recorded-{profile}"


def folder_of(profile: Profile, job: jobs.Job) -> list[str]:
    """The folders of images that the job reads. (The rules have a digest of its listing among their params.)"""
    named = {"prepare": (profile.data.path, profile.data.extra), "reliability": (profile.evaluation.reliability.ood_path,)}
    return [path for path in named.get(job.stage, ()) if path and Path(path).is_dir()]


def stage(job: jobs.Job, name: str, profile: Profile) -> dict[str, Any]:
    layout = Layout(name)
    files = list(jobs.outputs(layout, job).values())
    options = "" if name == DEFAULT else f" --config profile={name}"
    command = f"snakemake --allowed-rules {job.stage} --cores all{options} -- {files[0]}"
    read = [file for group in jobs.inputs(profile, layout, job).values() for file in group]
    # DVC records its own runs; this tells the rule `record` so.
    note = f"mkdir -p .dvc/tmp && touch {recorded(name)}"
    result: dict[str, Any] = {"cmd": [command, note] if job.stage == "report" else command}
    if name != DEFAULT:
        result["wdir"] = "../.."
    result["deps"] = [layout.digest(job.title), *dict.fromkeys(read), *folder_of(profile, job)]
    result["outs"] = [file for file in files if not file.endswith("/metrics.json")]
    metrics = [file for file in files if file.endswith("/metrics.json")]
    return result | ({"metrics": metrics} if metrics else {})


def digests_stage(name: str, profile: Profile) -> dict[str, Any]:
    options = "" if name == DEFAULT else f" --profile {name}"
    return {
        "cmd": f"python workflow/scripts/dvc_stages.py --digests{options}",
        **({} if name == DEFAULT else {"wdir": "../.."}),
        "always_changed": True,
        "outs": [{Layout(name).digest(job.title): {"cache": False}} for job in jobs.jobs(profile)],
    }


def plots(name: str, profile: Profile) -> list[dict[str, Any]]:
    """What `dvc plots` shows: a training's curves beside each other, accuracies by experiment, pictures; of the first seed."""
    root, layout = "" if name == DEFAULT else "../../", Layout(name)  # `wdir` does not hold for plots
    places = [place(experiment, profile.seeds[0]) for experiment in profile.experiments]
    result: list[dict[str, Any]] = []
    for column, title in CURVES.items():
        curves = {f"{root}{layout.result(p, 'finetune_curve.csv')}": column for p in places}
        result.append({title: {"template": "curves", "x": "epoch", "y": curves, "title": title, "x_label": "epoch", "y_label": title}})
    for column, title in BARS.items():
        if column == "autoattack_acc" and not profile.evaluation.attack.standard.n:
            continue
        bars = {"template": "fractions", "x": column, "y": {f"{root}{layout.result('', 'table.csv')}": "experiment"}}
        result.append({title: {**bars, "title": title, "x_label": title, "y_label": "experiment"}})
    return [*result, *({f"{root}{layout.result(p, picture)}": None} for picture in PICTURES for p in places)]


def stages(name: str) -> dict[str, dict[str, Any]]:
    """Stage name -> its entry in dvc.yaml, in the order of the chain."""
    profile = load(f"params/{name}.yaml")
    return {DIGESTS: digests_stage(name, profile), **{job.title: stage(job, name, profile) for job in jobs.jobs(profile)}}


def render(name: str) -> str:
    root = "" if name == DEFAULT else "../../"
    content = {"params": [f"{root}params/{name}.yaml"], "stages": stages(name), "plots": plots(name, load(f"params/{name}.yaml"))}
    return HEAD + yaml.safe_dump(content, sort_keys=False, width=120)


def write(name: str) -> None:
    """Bring the profile's dvc.yaml up to date, if it is not."""
    text, file = render(name), target(name)
    if file.exists() and text == file.read_text(encoding="utf-8"):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(f"wrote {file}")


def digests(name: str, profile: Profile | None = None) -> dict[Path, str]:
    """File -> what code and settings the results of its job depend on now."""
    profile = profile or load(f"params/{name}.yaml")
    return {Path(Layout(name).digest(job.title)): jobs.as_text(jobs.depends_on(profile, job)) for job in jobs.jobs(profile)}


def write_digests(content: dict[Path, str]) -> None:
    for file, text in content.items():
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)


def changed(content: dict[Path, str]) -> list[Path]:
    return [file for file, text in content.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]


def fail(text: str) -> int:
    print(text, file=sys.stderr)
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a profile's dvc.yaml from the table of stages.")
    parser.add_argument("--profile", default=DEFAULT)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when it is out of date")
    parser.add_argument("--digests", action="store_true", help="write what each job depends on; exit 1 while Snakemake is at work here")
    parser.add_argument("--recordable", action="store_true", help="exit 1 when code or settings changed since Snakemake's run began")
    options = parser.parse_args()
    name, file = options.profile, target(options.profile)
    try:
        if options.digests:
            if busy := at_work.by_another():
                return fail(busy)
            write_digests(digests(name))
        elif options.check:
            if not file.exists() or render(name) != file.read_text(encoding="utf-8"):
                return fail(f"{file} is out of date with src/ebjdat/jobs.py and params/{name}.yaml; run `make dvc.yaml`")
        else:
            if options.recordable and changed(digests(name)):
                return fail("settings or code changed while this ran: nothing is recorded; run snakemake again")
            write(name)
    except UserError as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    sys.exit(main())
