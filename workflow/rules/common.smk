"""Settings, and what rules take from the table of stages (src/ebjdat/jobs.py). `--config profile=NAME` picks params/NAME.yaml;
`overrides=` takes YAML files and key.path=value words, separated by spaces; a value with spaces is quoted:
`overrides="data.path='my images.tar.xz'"`. A list of words is taken as it is."""

import atexit
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
    from ebjdat import jobs, settings
    from ebjdat.checkout import CheckoutError, refuse_another
    from ebjdat.files import digest, git_commit
    from ebjdat.layout import Layout

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
LAYOUT = Layout(RUN)
SETTINGS = [
    "--params",
    PARAMS,
    *(word for o in OVERRIDES for word in ("--override", o)),
]
EXPERIMENTS = list(PROFILE.experiments)
SEEDS = list(PROFILE.seeds)
THREADS = PROFILE.runtime.threads
# GPU jobs run one at a time (profiles/default/config.yaml), CPU jobs side by side.
GPU = int(
    PROFILE.runtime.device == "cuda"
    or (PROFILE.runtime.device == "auto" and shutil.which("nvidia-smi") is not None)
)

for path in (
    PROFILE.data.path,
    PROFILE.data.extra,
    PROFILE.evaluation.reliability.ood_path,
    PROFILE.evaluation.generate.inception_weights,
):
    if path and re.search(r"[{}]|, ", path):
        raise WorkflowError(
            f"{path!r}: braces and ', ' in a path mean something else to Snakemake and DVC; rename it"
        )


def job(stage, wildcards=None):
    """The stage's job of these wildcards; without them the pattern of all its jobs."""
    of = jobs.STAGES[stage].of
    if of == "run":
        return jobs.Job(stage)
    found = wildcards or {of: f"{{{of}}}", "seed": "{seed}"}
    return jobs.Job(stage, found[of], found["seed"])


def inputs(stage):
    if jobs.STAGES[stage].of == "run":
        return lambda wildcards: jobs.inputs(PROFILE, LAYOUT, job(stage))
    return lambda wildcards: jobs.inputs(
        PROFILE, LAYOUT, job(stage, dict(wildcards.items()))
    )


def outputs(stage, category=None, **captions):
    """The stage's files by option. captions: those that Snakemake's own report shows, with a page of workflow/report."""
    files, one = jobs.outputs(LAYOUT, job(stage)), job(stage)
    for option, caption in captions.items():
        labels = {"what": caption}
        if one.name:
            labels |= {"experiment": "{experiment}", "seed": "{seed}"}
        files[option] = report(
            files[option],
            caption=f"../report/{caption}.rst",
            category=category,
            labels=labels,
        )
    return files


def log_of(stage):
    return LAYOUT.log(job(stage).place, stage)


def benchmark_of(stage):
    return LAYOUT.benchmark(job(stage).place, stage)


def command(stage):
    """A `params:` function: the words after `python -m ebjdat`. (In a function's text, braces are no wildcards.)"""
    return lambda wildcards: shlex.join(
        jobs.command(PROFILE, LAYOUT, job(stage, dict(wildcards.items())), SETTINGS)
    )


def depends_on(stage):
    """A `params:` function: code and settings that the job's results depend on; their change makes it run again.

    Processes of single jobs take what the run was planned with, from the files that `write_digests` wrote.
    """

    def get(wildcards):
        one = job(stage, dict(wildcards.items()))
        planned = Path(LAYOUT.digest(one.title))
        if not workflow.is_main_process and planned.is_file():
            return planned.read_text(encoding="utf-8")
        return jobs.as_text(jobs.depends_on(PROFILE, one))

    return get


def listing(*paths):
    """Digest of folders of images (names, sizes, times), so that replaced images are noticed; "" without any folder."""
    folders = [Path(path) for path in paths if path and Path(path).is_dir()]
    if not folders:
        return ""
    files = sorted(p for folder in folders for p in folder.rglob("*") if p.is_file())
    return digest([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])


# Jobs run this Python, also where its folder is not on PATH.
os.environ.update(
    PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
)
if workflow.is_main_process and git_commit() == "unknown":
    os.environ.update(
        EBJDAT_COMMIT="unknown"
    )  # why was said; each job would say it again
shell.prefix(
    "set -euo pipefail; export PYTHONPATH=$PWD/src${{PYTHONPATH:+:$PYTHONPATH}}; "
)


wildcard_constraints:
    experiment="|".join(map(re.escape, EXPERIMENTS)),
    pretraining="|".join(map(re.escape, PROFILE.pretraining)),
    seed="|".join(map(str, SEEDS)),
