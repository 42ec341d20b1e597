"""What the MLflow UI is to show: a store with an experiment's runs, their metrics and a picture."""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient
from PIL import Image

METRICS = {
    "classifier/seed0": {"clean_acc": 0.986, "pgd20_acc": 0.133},
    "pgd_at/seed0": {"clean_acc": 0.990, "pgd20_acc": 0.835},
    "eb_jdat/seed0": {"clean_acc": 0.988, "pgd20_acc": 0.809},
}


def fill_store(uri: str, artifacts: Path) -> tuple[str, dict[str, str]]:
    """Fill a new store; returns the id of its experiment "digits" and those of its runs by name."""
    client = MlflowClient(uri)
    experiment = client.create_experiment("digits", artifacts.as_uri(), tags={"mlflow.experimentKind": "custom_model_development"})
    picture = artifacts.parent / "samples.png"
    Image.new("RGB", (40, 20), "orange").save(picture)
    runs = {}
    for name, metrics in METRICS.items():
        runs[name] = run = client.create_run(experiment, run_name=name).info.run_id
        for metric, value in metrics.items():
            client.log_metric(run, metric, value)
        client.log_artifact(run, str(picture))
        client.set_terminated(run)
    return str(experiment), runs
