"""What the MLflow UI is to show: a store that the project's own tracking filled, with metrics, stages and a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ebjdat.tracking import journal
from ebjdat.tracking.journal import Subject
from ebjdat.tracking.publish import Publisher
from ebjdat.tracking.tracker import Tracker

METRICS = {
    "classifier/seed0": {"clean_acc": 0.986, "pgd20_acc": 0.133},
    "pgd_at/seed0": {"clean_acc": 0.990, "pgd20_acc": 0.835},
    "eb_jdat/seed0": {"clean_acc": 0.988, "pgd20_acc": 0.809},
}


def fill_store(uri: str, folder: Path) -> tuple[str, dict[str, str]]:
    """Fill a new store; returns the id of its experiment "digits" and those of the experiments' runs by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EBJDAT_TRACKING", "0")
        Image.new("RGB", (40, 20), "orange").save("samples.png")
        for title, metrics in METRICS.items():
            name = title.split("/")[0]
            params, tags, where = (
                {"training": {"lr": 0.1}},
                {"params_hash": name, "data_hash": "d"},
                Path(f"results/{title}/attack.journal.jsonl"),
            )
            with Tracker(Subject("digits", name, 0, "attack"), params, tags, where) as tracker:
                tracker.final(metrics)
                tracker.artifact(Path("samples.png"))
        outcome = Publisher(uri).publish(journal.finished())
    assert outcome.errors == []
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("digits").experiment_id
    runs = client.search_runs([experiment], "tags.kind = 'result'")
    return str(experiment), {run.info.run_name: run.info.run_id for run in runs}
