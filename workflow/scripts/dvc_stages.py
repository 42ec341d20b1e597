"""Write a profile's dvc.yaml from Snakemake's own graph: one stage per job, with the job's files and sections of the profile.

    python workflow/scripts/dvc_stages.py [--profile NAME] [--check | --inputs DIGEST]

The Snakefile is the only description of the pipeline. This asks it for every job (a forced dry run), so a stage names
exactly what its rule names. The default profile's stages are in ./dvc.yaml, those of others in pipelines/NAME/dvc.yaml, so
that a bare `dvc repro` runs the default profile alone. `--check` writes nothing and exits 1 when the file is out of date.
`--inputs` exits 1 when settings or code are no longer those of DIGEST, which the rule `record` took when its run began:
then DVC must not record.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ebjdat.files import digest
from ebjdat.settings import Profile, join_overrides, load, merge, read_layers, section, section_names

DEFAULT = "digits"
HEAD = """\
# Made by workflow/scripts/dvc_stages.py from the Snakefile; the rule `record` keeps it current. Do not edit.
# Each stage asks Snakemake for one rule's target and for nothing else, so that both tools see every run.
"""
ORDER = ["prepare", "pretrain", "finetune", "attack", "generate", "energy", "reliability", "report"]
CURVES = {"validation_clean_acc": "Validation accuracy", "loss": "Training loss"}
BARS = {
    "clean_acc": "Clean accuracy",
    "pgd20_acc": "Accuracy under PGD-20",
    "autoattack_acc": "Accuracy under AutoAttack",
}
PICTURES = ("samples.png", "energy.png")


def target(profile: str) -> Path:
    """The profile's dvc.yaml."""
    return Path("dvc.yaml") if profile == DEFAULT else Path("pipelines", profile, "dvc.yaml")


def recorded(profile: str) -> str:
    """Output of the rule `record`: whoever recorded last touches it."""
    return f".dvc/tmp/recorded-{profile}"


def dry_run(profile: str, overrides: Sequence[str], *options: str, **environment: str) -> str:
    """Snakemake's plan, with the jobs' commands."""
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--nolock", "--nocolor", "--printshellcmds", *options]
    command += config(profile, overrides)
    environment = {**os.environ, **environment}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"snakemake cannot plan the profile {profile}:\n{done.stdout}")
    return done.stdout


@cache
def whole(profile: str, overrides: tuple[str, ...]) -> str:
    """The plan of everything but `record`, which DVC_STAGE leaves out of the graph. Asked once per process: results do not change it."""
    return dry_run(profile, overrides, "--forceall", DVC_STAGE="none")


def config(profile: str, overrides: Sequence[str] = ()) -> list[str]:
    """Snakemake's options for a profile and what is laid over it."""
    return ["--config", f"profile={profile}", *([f"overrides={join_overrides(overrides)}"] if overrides else [])]


def current_inputs(profile: str) -> str:
    """Digest of settings and code as they are now; the same as INPUTS of workflow/rules/common.smk."""
    settings = merge({}, *(layer for _, layer in read_layers(f"params/{profile}.yaml")))
    code = sorted({Path(name) for job in jobs(profile) for name in job["input"] if name.startswith("src/")})
    return digest(settings, *code)[:16]


def jobs(profile: str, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every job of a profile: rule, wildcards, inputs, outputs, log, command."""
    return parsed(whole(profile, tuple(overrides)))


def planned(profile: str, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Those jobs that Snakemake would run now."""
    return parsed(dry_run(profile, overrides))


def parsed(text: str) -> list[dict[str, Any]]:
    """The jobs in what a dry run says."""
    found = []
    for block in re.split(r"^(?=(?:local)?rule \w+:$)", text, flags=re.M)[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block)
        assert rule
        fields = dict(re.findall(r"^(?:    )?(input|output|wildcards|log|Shell command): (.*)$", block, re.M))
        if rule[1] == "all":
            continue
        wildcards = dict(pair.split("=", 1) for pair in re.split(r", ", fields["wildcards"])) if "wildcards" in fields else {}
        files = {kind: [f for f in dict.fromkeys(fields.get(kind, "").split(", ")) if f] for kind in ("input", "output")}
        told = {"log": fields.get("log", ""), "command": fields.get("Shell command", "")}
        found.append({"rule": rule[1], "wildcards": wildcards, **files, **told})
    return found


def title(job: dict[str, Any]) -> str:
    """A job's name: "finetune-eb_jdat-seed0"."""
    where = [job["wildcards"][k] for k in ("experiment", "pretraining", "seed") if k in job["wildcards"]]
    return "-".join([job["rule"], *(f"seed{w}" if w.isdigit() else w for w in where)])


def sections() -> dict[str, list[str]]:
    """Rule -> sections of the params file, read from the rules' own `sections(...)`."""
    found = {}
    for file in sorted(Path("workflow/rules").glob("*.smk")):
        for block in re.split(r"^(?=rule \w+:$)", file.read_text(encoding="utf-8"), flags=re.M)[1:]:
            name = re.match(r"rule (\w+):", block)
            call = re.search(r"sections=sections\(([^)]*)\)", block, re.S)
            if name and call:
                found[name[1]] = re.findall(r'"([^"]+)"', call[1])
    return found


def content(folder: Path) -> set[str]:
    """What DVC hashes of a folder (.dvcignore leaves compiled files out)."""
    return {str(p) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def folded(files: list[str]) -> list[str]:
    """The same files, shorter: a code folder stands for its files where all of them are named."""
    named = set(files)
    whole = {str(d) for d in Path("src").rglob("*") if d.is_dir() and d.name != "__pycache__" and content(d) and content(d) <= named}
    top = {d for d in whole if not any(str(parent) in whole for parent in Path(d).parents)}
    inside = {name: next((str(d) for d in Path(name).parents if str(d) in top), name) for name in files}
    return list(dict.fromkeys(inside[name] for name in files))


def stage(job: dict[str, Any], paths: list[str], name: str, profile: Profile, raw: dict[str, Any]) -> dict[str, Any]:
    options = "" if name == DEFAULT else f" --config profile={name}"
    command = f"snakemake --allowed-rules {job['rule']} --cores all{options} -- {job['output'][0]}"
    # DVC records its own runs; this tells the rule `record` so.
    told = f"mkdir -p .dvc/tmp && touch {recorded(name)}"
    result: dict[str, Any] = {"cmd": [command, told] if job["rule"] == "report" else command}
    if name != DEFAULT:
        result["wdir"] = "../.."
    result["deps"] = folded(job["input"])
    # Folders of images: the rules have a digest of their listing among their params.
    folder = {"prepare": profile.data.path, "reliability": profile.evaluation.reliability.ood_path}.get(job["rule"])
    if folder and Path(folder).is_dir():
        result["deps"].append(folder)
    needed = [p.format(**section_names(profile, job["wildcards"])) for p in paths]
    result["params"] = [{f"params/{name}.yaml": [p for p in needed if section(raw, p) is not None]}]  # DVC: a missing one is an error
    result["outs"] = [o for o in job["output"] if not o.endswith("/metrics.json")]
    metrics = [o for o in job["output"] if o.endswith("/metrics.json")]
    return result | ({"metrics": metrics} if metrics else {})


def plots(name: str, profile: Profile) -> list[dict[str, Any]]:
    """What `dvc plots` shows: a training's curves beside each other, accuracies by experiment, pictures; of the first seed."""
    root = "" if name == DEFAULT else "../../"  # `wdir` does not hold for plots
    results = f"{root}results/{name}"
    folders = [f"{results}/{experiment}/seed{profile.seeds[0]}" for experiment in profile.experiments]
    found: list[dict[str, Any]] = []
    for column, title in CURVES.items():
        curves = {f"{folder}/finetune_curve.csv": column for folder in folders}
        found.append({title: {"template": "curves", "x": "epoch", "y": curves, "title": title, "x_label": "epoch", "y_label": title}})
    for column, title in BARS.items():
        if column == "autoattack_acc" and not profile.evaluation.attack.standard.n:
            continue
        bars = {"template": "fractions", "x": column, "y": {f"{results}/table.csv": "experiment"}}
        found.append({title: {**bars, "title": title, "x_label": title, "y_label": "experiment"}})
    return [*found, *({f"{folder}/{picture}": None} for picture in PICTURES for folder in folders)]


def stages(name: str) -> dict[str, dict[str, Any]]:
    """Stage name -> what stands in dvc.yaml, in the order of the chain."""
    params = f"params/{name}.yaml"
    paths, profile, raw = sections(), load(params), merge({}, *(layer for _, layer in read_layers(params)))
    found = {}
    for job in jobs(name):
        assert title(job) not in found, title(job)
        found[title(job)] = stage(job, paths[job["rule"]], name, profile, raw)
    return dict(sorted(found.items(), key=lambda item: (ORDER.index(item[0].split("-")[0]), item[0])))


def render(name: str) -> str:
    content = {"stages": stages(name), "plots": plots(name, load(f"params/{name}.yaml"))}
    return HEAD + yaml.safe_dump(content, sort_keys=False, width=120)


def write(name: str) -> None:
    """Bring the profile's dvc.yaml up to date, if it is not."""
    text, file = render(name), target(name)
    if file.exists() and text == file.read_text(encoding="utf-8"):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(f"wrote {file}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a profile's dvc.yaml from the Snakefile.")
    parser.add_argument("--profile", default=DEFAULT)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when it is out of date")
    parser.add_argument("--inputs", help="exit 1 when settings or code are no longer those of this digest")
    asked = parser.parse_args()
    if asked.inputs and current_inputs(asked.profile) != asked.inputs:
        print("settings or code changed while this ran: nothing is recorded; run snakemake again", file=sys.stderr)
        return 1
    if asked.check:
        file = target(asked.profile)
        if file.exists() and render(asked.profile) == file.read_text(encoding="utf-8"):
            return 0
        print(f"{file} is out of date with the Snakefile and params/{asked.profile}.yaml; run `make dvc.yaml`", file=sys.stderr)
        return 1
    write(asked.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
