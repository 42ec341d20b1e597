"""Names, settings and code lists that every rule uses. `--config profile=NAME` picks params/NAME.yaml;
`overrides=` takes YAML files and key.path=value words, separated by spaces; a value with spaces is quoted:
`overrides="data.path='my images.tar.xz'"`. A list of words is taken as it is."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

if ".dvc/tmp/exps/" in f"{workflow.basedir}/":
    # DVC runs an experiment in a copy of the checkout, with its programs but the copy's code.
    sys.path.insert(0, f"{workflow.basedir}/src")
try:
    from ebjdat import settings
    from ebjdat.checkout import CheckoutError, refuse_another
    from ebjdat.files import digest, git_commit

    refuse_another(Path(workflow.basedir))
except ModuleNotFoundError as error:
    if not str(error.name).startswith("ebjdat"):
        raise
    raise WorkflowError(
        f"the package of this checkout is not what {sys.executable} finds: `make install` here, then use its .venv/bin"
    ) from None
except CheckoutError as error:
    raise WorkflowError(str(error)) from None

config.setdefault("profile", "digits")
config.setdefault("overrides", "")

PARAMS = f"params/{config['profile']}.yaml"
try:
    OVERRIDES = config["overrides"] or []
    if not isinstance(OVERRIDES, list):
        OVERRIDES = settings.split_overrides(str(OVERRIDES))
    PROFILE = settings.load(PARAMS, OVERRIDES)
    RUN = settings.run_name(PARAMS, OVERRIDES)
    settings.require_files(PROFILE)
except settings.ParamsError as error:
    raise WorkflowError(str(error)) from None
RAW = settings.merge(
    {}, *(layer for _, layer in settings.read_layers(PARAMS, OVERRIDES))
)


def SETTINGS(wildcards):
    """The options that name the settings. (In a text that is no function's, Snakemake takes braces for wildcards.)"""
    words = ["--params", PARAMS, *(w for o in OVERRIDES for w in ("--override", o))]
    return shlex.join(words)


EXPERIMENTS = list(PROFILE.experiments)
SEEDS = list(PROFILE.seeds)
THREADS = PROFILE.runtime.threads
# GPU jobs run one at a time (profiles/default/config.yaml), CPU jobs side by side.
GPU = int(
    PROFILE.runtime.device == "cuda"
    or (PROFILE.runtime.device == "auto" and shutil.which("nvidia-smi") is not None)
)

# An archive of images is an input; where it is missing, the command says so better than Snakemake would.
ARCHIVE = [p for p in [PROFILE.data.path] if p and Path(p).is_file()]
OOD_PATH = PROFILE.evaluation.reliability.ood_path
INCEPTION = PROFILE.evaluation.generate.inception_weights
for path in (PROFILE.data.path, OOD_PATH, INCEPTION):
    if path and re.search(r"[{}]|, ", path):
        raise WorkflowError(
            f"{path!r}: braces and ', ' in a path mean something else to Snakemake and DVC; rename it"
        )
DATA = f"data/{RUN}/data.npz"
CARD = f"data/{RUN}/card.json"
CHECKPOINTS = f"checkpoints/{RUN}"
RESULTS = f"results/{RUN}"
LOGS = f"logs/{RUN}"
BENCHMARKS = f"benchmarks/{RUN}"
REFERENCE = PROFILE.evaluation.generate.reference
TRANSFER = [
    f"{CHECKPOINTS}/{run.experiment}/seed{run.seed}.safetensors"
    for run in [PROFILE.evaluation.attack.transfer]
    if run is not None
]
REPORT = {
    "summary": f"{RESULTS}/summary.csv",
    "metrics": f"{RESULTS}/metrics.json",
    "table_csv": f"{RESULTS}/table.csv",
    "table_md": f"{RESULTS}/table.md",
    "html": f"{RESULTS}/report.html",
    "audit_html": f"{RESULTS}/audit.html",
    "audit_md": f"{RESULTS}/audit.md",
    "journal": f"{RESULTS}/report.journal.jsonl",
}


def package(*parts):
    """Source files of these modules and packages, sorted: their change reruns a rule. dvc.yaml names the same."""
    root = Path("src/ebjdat")
    found = []
    for part in parts:
        path = root / part
        found += [path] if path.suffix == ".py" else path.rglob("*.py")
    return sorted(str(p) for p in found)


BASE = (
    "errors.py",
    "settings",
    "yamlfile.py",
    "registry.py",
    "pixels.py",
    "files.py",
    "stages/context.py",
)
EVALUATION = (
    *BASE,
    "intervals.py",
    "names.py",
    "data",
    "models",
    "samplers",
    "evaluation",
    "training/checkpoint.py",
)
CODE = {
    "prepare": package(
        *BASE,
        "data/sources.py",
        "data/members.py",
        "data/decode.py",
        "data/prepared.py",
        "stages/prepare.py",
    ),
    "train": package(
        *BASE, "data", "models", "samplers", "objectives", "training", "stages/train.py"
    ),
    "attack": package(*EVALUATION, "stages/attack.py"),
    "draw": package(*EVALUATION, "stages/evaluate.py", "report/figures.py"),
    "reliability": package(*EVALUATION, "stages/reliability.py", "report/figures.py"),
    "report": [
        *package(
            *BASE,
            "intervals.py",
            "metrics.py",
            "names.py",
            "report",
            "stages/report.py",
        ),
        *sorted(str(p) for p in Path("src/ebjdat/report").glob("*.j2")),
        "src/ebjdat/report/paper.yaml",
    ],
}


# Jobs run the package of this checkout, whose files the rules name, whatever else is installed. `record` is told what
# settings and code were when the run began (not as its parameter: it would then run again on its own).
INPUTS = digest(RAW, *sorted({Path(f) for group in CODE.values() for f in group}))[:16]
# Jobs run this Python, also where its folder is not on PATH.
os.environ.update(
    PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
)
if workflow.is_main_process and git_commit() == "unknown":
    os.environ.update(
        EBJDAT_COMMIT="unknown"
    )  # why was said; each job would say it again
shell.prefix(
    f"set -euo pipefail; export EBJDAT_INPUTS={INPUTS}; "
    "export PYTHONPATH=$PWD/src${{PYTHONPATH:+:$PYTHONPATH}}; "
)


def sections(*paths):
    """A `params:` function: these sections of the profile as canonical JSON, so that key order means nothing.

    "{name}" in a path is the rule's wildcard, or "{base}", the row of the JEM family that the job's training stands on.
    dvc.yaml names the same sections.
    """

    def get(wildcards):
        found = {}
        for path in paths:
            path = path.format(
                **settings.section_names(PROFILE, dict(wildcards.items()))
            )
            found[path] = settings.section(RAW, path)
        return json.dumps(found, sort_keys=True)

    return get


def listing(path):
    """Digest of a folder of images (names, sizes, times), so that replaced images are noticed; "" for anything else."""
    folder = Path(path or "")
    if not path or not folder.is_dir():
        return ""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return digest([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])


def initial_checkpoint(wildcards):
    name = PROFILE.experiments[wildcards.experiment].pretraining
    return f"{CHECKPOINTS}/pretraining/{name}/seed{wildcards.seed}.safetensors"


def per_result(*files):
    return expand(
        f"{RESULTS}/{{experiment}}/seed{{seed}}/{{file}}",
        experiment=EXPERIMENTS,
        seed=SEEDS,
        file=files,
    )


wildcard_constraints:
    experiment="|".join(map(re.escape, EXPERIMENTS)),
    pretraining="|".join(map(re.escape, PROFILE.pretraining)),
    seed="|".join(map(str, SEEDS)),
