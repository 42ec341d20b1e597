"""Stage `teacher` through the command line, on real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from ebjdat import jobs
from ebjdat.cli import app
from ebjdat.data.prepared import Prepared, save
from ebjdat.evaluation import robust
from ebjdat.files import read_json, read_npz
from ebjdat.layout import Layout
from ebjdat.metrics import describe
from ebjdat.models.modes import UnitRange
from ebjdat.report.collect import stage_result
from ebjdat.settings import load

from ..conftest import ROOT
from .test_evaluate import saved

STUDENT = {"method": "ard", "pretraining": "clean", "training": {"teacher": {"experiment": "classifier"}}}
MORE = {"experiments": {"student": STUDENT}, "evaluation": {"teacher": {"recipe": "pgd_at", "n": 60, "steps": 4}}, "seeds": [0, 1]}


def test_a_teachers_certainty_on_what_a_recipe_does_not_learn(digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is the one of the plan. Against the networks, attacked one by one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    Path("more.yaml").write_text(yaml.safe_dump(MORE))
    settings = ["--params", str(ROOT / "params/digits.yaml"), "--override", "more.yaml"]
    profile, layout = load(ROOT / "params/digits.yaml", ["more.yaml"]), Layout("digits")
    job = jobs.Job("teacher", "student", 1)
    assert [j for j in jobs.jobs(profile) if j.stage == "teacher"] == [jobs.Job("teacher", "student", 0), job]
    files = jobs.inputs(profile, layout, job)
    assert len(files["recipe"]) == 2
    save(digits, {}, Path(layout.data), Path(layout.card))
    networks = {path: saved(Path(path), profile, digits, seed, None) for seed, path in enumerate((*files["recipe"], *files["teacher"]))}
    saved(Path(files["weights"][0]), profile, digits, 9, None, "ard")
    Path(files["curve"][0]).parent.mkdir(parents=True)
    Path(files["curve"][0]).write_text("epoch,validation_robust_acc\n1,0.5\n2,0.75\n3,0.625\n")
    done = CliRunner().invoke(app, jobs.command(profile, layout, job, settings))
    assert done.exit_code == 0, done.output
    out = Path(jobs.outputs(layout, job)["out"])
    result, values = read_json(out), read_npz(out.with_suffix(".npz"))
    assert {describe(name).stage for name in result} == {"teacher", "provenance"}
    assert stage_result(out, "teacher", ())["n_teaching"] == 60

    images, labels = digits.split("train", 60)
    x, y = torch.from_numpy(images).float() / 255, torch.from_numpy(labels)
    standard = profile.evaluation.attack.standard
    protocol = standard.model_copy(update={"pgd": standard.pgd.model_copy(update={"steps": 4})})
    right = np.zeros(60, int)
    for path in files["recipe"]:
        model = UnitRange(networks[path]).eval()
        moved = robust.pgd_examples(model, x, y, protocol, profile.evaluation.attack.seed, 250)
        right += (model(moved).argmax(1) == y).numpy()
    assert (values["robust"] == right).all()
    assert result["n_unlearned"] == (right == 0).sum() > 0
    with torch.no_grad():
        p = UnitRange(networks[files["teacher"][0]]).eval()(x).double().softmax(1)
    entropy = -(p * p.log()).sum(1).numpy()
    assert result["teacher_entropy_unlearned"] == pytest.approx(entropy[right == 0].mean(), rel=1e-4)
    assert result["robust_overfitting"] == 0.125
    assert (result["n_recipes"], result["teaching_steps"]) == (2, 4)


def test_it_is_refused_where_there_is_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--experiment", "pgd_at", "--seed", "0", "--data", "d", "--weights", "w", "--curve", "c", "--recipe", "r"]
    done = CliRunner().invoke(app, ["teacher", "--params", str(ROOT / "params/digits.yaml"), *words, "--out", "o", "--values", "v"])
    assert done.exit_code == 1
    assert "pgd_at has no teacher to measure" in done.output
