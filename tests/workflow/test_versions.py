"""DVC's side of the pipeline, with the real programs on one experiment: graphs, clones, branches, profiles, experiments, links, kills.

Each test has a copy of one checkout whose chain has run once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from ..conftest import ROOT
from .conftest import Project, checkout, ran

LATE = {"energy": 1, "report": 1, "record": 1, "all": 1}  # what a change of evaluation.energy makes run


@pytest.fixture
def project(after_dvc: Project) -> Project:
    """The checkout at its first results."""
    return after_dvc


def clone(project: Project, folder: Path) -> Project:
    subprocess.run(["git", "clone", "-q", str(project.folder), str(folder)], check=True)
    made = Project(folder)
    for key, value in (("user.name", "t"), ("user.email", "t@t.example")):
        made.run("git", "config", key, value)
    return made


def snakemakes_graph(*config: str) -> tuple[set[tuple[str, str]], dict[str, set[str]]]:
    """(edges between jobs, each named by its first output; what each job reads), from a forced dry run."""
    command = [sys.executable, "-m", "snakemake", "-n", "--forceall", "--nolock", "--nocolor", *config]
    text = subprocess.run(command, cwd=ROOT, env={**os.environ, "DVC_STAGE": "none"}, capture_output=True, text=True, check=True).stdout
    jobs = [dict(re.findall(r"^    (input|output): (.*)$", block, re.M)) for block in re.split(r"^(?:local)?rule ", text, flags=re.M)[1:]]
    reads = {job["output"].split(", ")[0]: set(job.get("input", "").split(", ")) - {""} for job in jobs if "output" in job}
    maker = {name: job["output"].split(", ")[0] for job in jobs if "output" in job for name in job["output"].split(", ")}
    return {(maker[name], job) for job, names in reads.items() for name in names if name in maker}, reads


def dvcs_graph() -> tuple[set[tuple[str, str]], dict[str, set[str]]]:
    """The same from DVC's own index. A folder is read as the files that git knows below it."""
    from dvc.repo import Repo

    def name(path: object) -> str:
        return os.path.relpath(str(path), ROOT)

    def files(path: str) -> set[str]:
        if not (ROOT / path).is_dir():
            return {path}
        return set(subprocess.run(["git", "ls-files", "-co", path], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())

    with Repo(str(ROOT)) as repo:
        graph = repo.index.graph
        first = {stage: name(stage.outs[0].fs_path) for stage in graph}
        reads = {
            first[s]: {f for dep in s.deps if not hasattr(dep, "params") for f in files(name(dep.fs_path)) if "__pycache__" not in f}
            for s in graph
        }
        return {(first[needed], first[stage]) for stage, needed in graph.edges}, reads


def test_after_dvc_repro_from_clean_neither_tool_has_anything_to_do(project: Project) -> None:
    """(After `snakemake` from clean: test_two_tools.py.)"""
    assert project.planned() == {}
    assert project.status() == {}
    assert (project.folder / "results/digits/summary.csv").read_text().count("\n") == 2
    assert not list((project.folder / "state").rglob("*.pt"))


def test_dvc_and_snakemake_have_the_same_graph_edge_by_edge() -> None:
    """Beside DVC's first stage, on which all others depend."""
    edges, reads = snakemakes_graph()
    assert len(edges) > 60
    dvc_edges, dvc_reads = dvcs_graph()
    (first,) = {needed for needed, _ in dvc_edges if needed.startswith("digests/")}
    assert {stage for needed, stage in dvc_edges if needed == first} == set(reads)
    assert {edge for edge in dvc_edges if edge[0] != first} == edges
    del dvc_reads[first]
    assert {stage: {f for f in files if not f.startswith("digests/")} for stage, files in dvc_reads.items()} == reads


def test_shipped_profiles_are_pipelines_of_their_own_for_dvc(tmp_path: Path) -> None:
    """Also those whose data is not here; one of each kind, since each takes Snakemake's plan."""
    from dvc.repo import Repo

    project = checkout(tmp_path / "checkout", "classifier")
    names = {"cifar10", "cifar10-folder", "imagenet_subset", "digits-full"}
    for name in sorted(names):
        project.run("python", "workflow/scripts/dvc_stages.py", "--profile", name)
    with Repo(str(project.folder)) as repo:
        assert len(repo.index.graph) == len(repo.index.stages) > 300  # DVC raises when outputs overlap or edges make a circle
        stages = {Path(s.path_in_repo).parent.name or "digits": s for s in repo.index.stages}
        assert {s.wdir for s in stages.values()} == {str(project.folder)}
        assert set(stages) == names | {"digits"}
        commands = {c for s in repo.index.stages if "pipelines/cifar10/" in s.path_in_repo for c in [s.cmd] if isinstance(c, str)}
    assert {command for command in commands if " --config profile=cifar10 -- " not in command} == {
        "python workflow/scripts/dvc_stages.py --digests --profile cifar10"
    }
    assert project.run("git", "check-ignore", "pipelines/cifar10/dvc.yaml", ok=False) == ""


def test_metrics_params_and_plots_show_what_changed(project: Project) -> None:
    shown = json.loads(project.run("dvc", "metrics", "show", "--json"))
    ((file, found),) = shown[""]["data"].items()
    assert file == "results/digits/metrics.json"
    assert 0 < found["data"]["classifier"]["clean_acc"] <= 1
    assert 6 <= len(found["data"]["classifier"]) <= 12
    project.change(evaluation={"energy": {"n": 20}})
    assert ran(project.run("dvc", "repro")) == {"energy-classifier-seed0", "report"}
    differences = json.loads(project.run("dvc", "metrics", "diff", "HEAD", "--json"))["results/digits/metrics.json"]
    assert set(differences) >= {"classifier.energy_gap_adversarial"}
    assert "classifier.clean_acc" not in differences
    params = json.loads(project.run("dvc", "params", "diff", "HEAD", "--json"))["params/digits.yaml"]
    assert params == {"evaluation.energy.n": {"old": None, "new": 20}}
    project.run("dvc", "plots", "diff", "HEAD", "--out", "plots")
    page = (project.folder / "plots/index.html").read_text()
    for title in ("Validation accuracy", "Training loss", "Clean accuracy", "Accuracy under PGD-20"):
        assert f'"{title}"' in page
    assert page.count("samples.png") >= 1
    assert page.count("energy.png") >= 2  # before and after


def test_a_clone_that_pulled_has_nothing_to_run_and_old_results_never_pass_for_new(project: Project, tmp_path: Path) -> None:
    made = clone(project, tmp_path / "clone")
    made.run("dvc", "pull")
    text = made.run("snakemake", "--dry-run")
    assert "8 of 8 stages are taken over from DVC" in text
    assert "Nothing to be done" in text
    assert made.status() == {}
    assert "<html" in (made.folder / "results/digits/report.html").read_text()
    # MLflow's runs came along, as journals: `make ui` fills its store from them.
    assert "journals -> sqlite:" in made.run("python", "-m", "ebjdat", "sync")
    client = MlflowClient(f"sqlite:///{made.folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    stages = ("finetune", "attack", "generate", "energy", "reliability")
    ours = {"classifier/seed0", *(f"classifier/seed0/{stage}" for stage in stages)}
    assert {r.info.run_name for r in runs} == {*ours, "scratch/seed0/pretrain", "report/seed0/report"}
    (result,) = [r for r in runs if r.data.tags["kind"] == "result"]
    shown = json.loads((made.folder / "results/digits/metrics.json").read_text())["classifier"]
    assert {name: result.data.metrics[name] for name in shown} == pytest.approx(shown, rel=1e-5)  # six digits are written
    # Snakemake knows them now as if they were made here.
    made.change(evaluation={"energy": {"n": 20}})
    assert made.planned() == LATE
    # Without ever having been asked before the change: the same, not "up to date".
    shutil.rmtree(made.folder / ".snakemake")
    made.run("dvc", "checkout", "--force", "--relink")
    text = made.run("snakemake", "--dry-run")
    assert "2 hold results of other settings, code or data" in text
    assert made.jobs(text) == LATE
    made.run("git", "checkout", "params")
    assert made.planned() == {}


def test_s3_remote(project: Project, tmp_path: Path) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        boto3.client("s3", endpoint_url=address, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1").create_bucket(
            Bucket="results"
        )
        made = clone(project, tmp_path / "clone")
        for repository in (project, made):
            repository.run("dvc", "remote", "add", "bucket", "s3://results/ebjdat")
            repository.run("dvc", "remote", "modify", "bucket", "endpointurl", address)
        project.run("dvc", "push", "--remote", "bucket", **keys)
        made.run("dvc", "pull", "--remote", "bucket", **keys)
    finally:
        server.stop()
    assert made.status() == {}
    assert broken(made) == []


def test_branches_with_results_of_their_own_are_switched_by_dvc_checkout_alone(project: Project) -> None:
    project.run("git", "checkout", "-qb", "other")
    project.change(evaluation={"energy": {"n": 20}})
    project.run("snakemake", "--cores", "2")
    project.commit("other results")
    for branch in ("main", "other"):
        project.run("git", "checkout", "-q", branch)
        project.run("dvc", "checkout")
        assert project.planned() == {}, branch
    # Both moved on between two calls of Snakemake: results of main, settings and dvc.lock of other.
    project.run("git", "checkout", "-q", "main")
    project.run("dvc", "checkout")
    project.run("git", "checkout", "-q", "other")
    assert project.planned() == LATE
    # Results of main again, by its dvc.lock, with settings of other.
    project.run("git", "checkout", "main", "--", "dvc.lock")
    project.run("dvc", "checkout")
    assert project.planned() == LATE


def test_experiments_of_dvc_from_a_clone(project: Project, tmp_path: Path) -> None:
    made = clone(project, tmp_path / "clone")
    made.run("dvc", "pull")
    text = made.run("dvc", "exp", "run", "-n", "fewer", "-S", "params/digits.yaml:evaluation.energy.n=20")
    assert ran(text) == {"energy-classifier-seed0", "report"}
    made.run("git", "checkout", "-q", "params", "dvc.lock")
    made.run("dvc", "checkout")
    made.run("dvc", "exp", "run", "--queue", "-n", "cifar10", "-S", "params/digits.yaml:report.paper=cifar10")
    made.run("dvc", "exp", "run", "--run-all")
    (baseline,) = [e for e in json.loads(made.run("dvc", "exp", "show", "--json")) if e["rev"] != "workspace"]
    found = {e["name"]: e["revs"][0]["data"] for e in baseline["experiments"]}
    shown = {}
    for name, data in found.items():
        params = data["params"]["params/digits.yaml"]["data"]
        gap = data["metrics"]["results/digits/metrics.json"]["data"]["classifier"]["energy_gap_adversarial"]
        shown[name] = (params["evaluation"]["energy"]["n"], params["report"]["paper"], gap)
    assert {name: values[:2] for name, values in shown.items()} == {
        "fewer": (20, None),
        "cifar10": (None, "cifar10"),
    }
    assert shown["cifar10"][2] != shown["fewer"][2]
    made.run("dvc", "exp", "apply", "fewer")
    assert made.planned() == {}
    assert made.status() == {}


def test_a_second_profile_is_recorded_beside_the_first(project: Project) -> None:
    """With the first one's settings, so that its results are the second's, too, and only the report has to run."""
    second, file = ("--config", "profile=second"), "pipelines/second/dvc.yaml"
    params = project.folder / "params/second.yaml"
    shutil.copy(project.folder / "params/digits.yaml", params)
    for place in ("data", "checkpoints", "results"):
        shutil.copytree(project.folder / place / "digits", project.folder / place / "second")
    project.run("python", "workflow/scripts/dvc_stages.py", "--profile", "second")
    project.run("python", "workflow/scripts/dvc_stages.py", "--profile", "second", "--digests")
    project.run("dvc", "commit", "--force", file)
    assert project.planned(*second) == {}
    params.write_text(params.read_text().replace("paper: null", "paper: cifar10"))
    text = project.run("snakemake", "--cores", "2", *second)
    assert project.jobs(text) == {"report": 1, "record": 1, "all": 1}
    assert project.status() == {}
    params.write_text(params.read_text().replace("paper: cifar10", "paper: cifar100"))
    assert ran(project.run("dvc", "repro")) == set()  # the default profile alone
    assert {stage.split(":")[-1] for stage in ran(project.run("dvc", "repro", file))} == {"report"}
    assert project.planned(*second) == {}
    assert project.planned() == {}


def broken(project: Project) -> list[str]:
    """Files in DVC's cache whose content is no longer what they are named by."""
    files = [p for p in (project.folder / ".dvc/cache/files/md5").glob("??/*") if p.is_file()]
    assert files
    return [str(p) for p in files if hashlib.md5(p.read_bytes()).hexdigest() != (p.parent.name + p.name).removesuffix(".dir")]


def test_reruns_do_not_write_through_links_into_the_cache(project: Project) -> None:
    linked = project.folder / "results/digits/classifier/seed0/energy.json"
    project.run("dvc", "config", "cache.type", "hardlink")
    project.run("dvc", "checkout", "--relink")
    assert linked.stat().st_nlink == 2
    project.change(evaluation={"energy": {"n": 20}})
    project.run("snakemake", "--cores", "2")
    assert json.loads(linked.read_text())["n_energy_clean"] == 20
    assert broken(project) == []
    project.run("dvc", "config", "cache.type", "symlink")
    project.run("dvc", "checkout", "--relink")
    assert linked.is_symlink()
    project.change(report={"paper": "cifar10"})
    assert ran(project.run("dvc", "repro")) == {"report"}
    assert project.planned() == {}
    assert broken(project) == []


def killed_in_training(project: Project, *command: str) -> str:
    """Start it, wait until its training has kept a state, kill its whole process group; what the other tool said meanwhile."""
    log = project.folder.parent / "killed.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=project.folder, env=project.environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + 120
    while not re.search(r"epoch +\d", log.read_text()) or not list((project.folder / "state/digits/classifier").rglob("*.pt")):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    other = ("snakemake", "--dry-run") if command[0] == "dvc" else ("dvc", "repro")
    busy = project.run(*other, ok=False)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return busy


def locked(project: Project) -> dict[str, object]:
    """What dvc.lock has, but for DVC's first stage, which had finished."""
    stages = yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"]
    return {name: entry for name, entry in stages.items() if name != "digests"}


def test_a_killed_stage_leaves_no_entry_and_both_tools_continue_its_training(project: Project) -> None:
    project.change(
        experiments={"classifier": {"training": {"epochs": 150, "selection": {"after": 0.99}}}}, runtime={"checkpoint_minutes": 0.0001}
    )
    before = locked(project)
    stage = "finetune-classifier-seed0"
    busy = killed_in_training(project, "dvc", "repro", stage)
    assert "is at work in this folder; wait for it" in busy
    assert locked(project) == before
    assert stage in project.run("dvc", "status", stage)
    project.run("snakemake", "--unlock")
    busy = killed_in_training(project, "snakemake", "--cores", "1", "results/digits/classifier/seed0/finetune.json")
    assert re.search(r"`snakemake` \(process \d+\) is at work in this folder; wait for it", busy)
    assert "continues at epoch" in (project.folder.parent / "killed.log").read_text()
    project.run("snakemake", "--unlock")
    text = project.run("dvc", "repro", stage)
    assert "continues at epoch" in text
    made_from = json.loads((project.folder / f"digests/digits/{stage}.json").read_text())
    assert made_from["settings"]["training"]["epochs"] == 150
    assert not list((project.folder / "state").rglob("*.pt"))
