"""Write dvc.yaml from Snakemake's own graph: one stage per job, with the job's files and sections of the profile.

    python workflow/scripts/dvc_stages.py [--check | --inputs DIGEST]

The Snakefile is the only description of the pipeline. This asks it for every job (a forced dry run), so a stage names
exactly what its rule names. `--check` writes nothing and exits 1 when dvc.yaml is out of date. `--inputs` exits 1 when
settings or code are no longer those of DIGEST, which the rule `record` took when its run began: then DVC must not record.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from ebjdat.files import digest
from ebjdat.params import Profile, load, merge, read_layers, section, section_names

TARGET = Path("dvc.yaml")
PARAMS = "params/digits.yaml"
HEAD = """\
# Made by workflow/scripts/dvc_stages.py from the Snakefile; the rule `record` keeps it current. Do not edit.
# Each stage asks Snakemake for one rule's target and for nothing else, so that both tools see every run.
"""
# DVC records its own runs; this tells the rule `record` so.
RECORDED = "mkdir -p .dvc/tmp && touch .dvc/tmp/recorded"
METRICS = re.compile(r"/(finetune|pretrain|attack|generate|energy|reliability)\.json$")
CURVES = re.compile(r"_curve\.csv$")


def dry_run() -> str:
    """Snakemake's plan of everything but `record`."""
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--forceall", "--nolock", "--nocolor"]
    environment = {**os.environ, "DVC_STAGE": "none"}  # leaves `record` out of the graph
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"snakemake cannot plan the default profile:\n{done.stdout}")
    return done.stdout


def current_inputs() -> str:
    """Digest of settings and code as they are now; the same as INPUTS of workflow/rules/common.smk."""
    settings = merge({}, *(layer for _, layer in read_layers(PARAMS)))
    code = sorted({Path(name) for job in jobs() for name in job["input"] if name.startswith("src/")})
    return digest(settings, *code)[:16]


def jobs() -> list[dict[str, Any]]:
    """Every job of the default profile: rule, wildcards, inputs, outputs, sections of the params file."""
    text = dry_run()
    found = []
    for block in re.split(r"^(?=(?:local)?rule \w+:$)", text, flags=re.M)[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block)
        assert rule
        fields = dict(re.findall(r"^    (input|output|wildcards): (.*)$", block, re.M))
        if rule[1] == "all":
            continue
        wildcards = dict(pair.split("=", 1) for pair in re.split(r", ", fields["wildcards"])) if "wildcards" in fields else {}
        files = {kind: list(dict.fromkeys(fields.get(kind, "").split(", "))) for kind in ("input", "output")}
        found.append({"rule": rule[1], "wildcards": wildcards, **files})
    return found


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


def stage(job: dict[str, Any], paths: list[str], profile: Profile, raw: dict[str, Any]) -> dict[str, Any]:
    target = job["output"][0]
    command = f"snakemake --allowed-rules {job['rule']} --cores all -- {target}"
    result: dict[str, Any] = {"cmd": [command, RECORDED] if job["rule"] == "report" else command}
    result["deps"] = job["input"]
    named = [p.format(**section_names(profile, job["wildcards"])) for p in paths]
    result["params"] = [{PARAMS: [p for p in named if section(raw, p) is not None]}]  # DVC takes a missing one for an error
    outs = [o for o in job["output"] if not METRICS.search(o) and not CURVES.search(o)]
    metrics = [o for o in job["output"] if METRICS.search(o)]
    curves = [o for o in job["output"] if CURVES.search(o)]
    if outs:
        result["outs"] = outs
    if metrics:
        result["metrics"] = metrics
    if curves:
        result["plots"] = [{c: {"x": "epoch", "y": "loss"}} for c in curves]
    return result


def render() -> str:
    paths = sections()
    profile, raw = load(PARAMS), merge({}, *(layer for _, layer in read_layers(PARAMS)))
    stages = {}
    for job in jobs():
        where = [job["wildcards"][k] for k in ("experiment", "pretraining", "seed") if k in job["wildcards"]]
        name = "-".join([job["rule"], *(f"seed{w}" if w.isdigit() else w for w in where)])
        assert name not in stages, name
        stages[name] = stage(job, paths[job["rule"]], profile, raw)
    order = ["prepare", "pretrain", "finetune", "attack", "generate", "energy", "reliability", "report"]
    by_rule = sorted(stages.items(), key=lambda item: (order.index(item[0].split("-")[0]), item[0]))
    return HEAD + yaml.safe_dump({"stages": dict(by_rule)}, sort_keys=False, width=120)


def main() -> int:
    if "--inputs" in sys.argv[1:] and current_inputs() != sys.argv[sys.argv.index("--inputs") + 1]:
        print("settings or code changed while this ran: nothing is recorded; run snakemake again", file=sys.stderr)
        return 1
    text = render()
    current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
    if text == current:
        return 0
    if "--check" in sys.argv[1:]:
        print("dvc.yaml is out of date with the Snakefile and params/digits.yaml; run `make dvc.yaml`", file=sys.stderr)
        return 1
    TARGET.write_text(text, encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
