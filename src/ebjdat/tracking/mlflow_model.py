"""A checkpoint as an MLflow model: `mlflow.pyfunc.load_model(...)` and `mlflow models serve` classify images in [0, 1].

MLflow keeps this file as the model's code, beside the package and the checkpoint; nothing is pickled.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.models import ModelSignature, set_model
from mlflow.types.schema import ColSpec, Schema, TensorSpec

from ebjdat.models.energy import marginal_energy
from ebjdat.models.logits import NO_CLASS, predicted
from ebjdat.models.modes import UnitRange
from ebjdat.training import checkpoint

REQUIREMENTS = ("torch", "numpy", "pandas", "pydantic", "pyyaml", "safetensors")  # what loading and classifying import
BATCH = 500


class Classifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Images (B, C, H, W), float32 in [0, 1] -> a row per image: class index, its name, its probability, E(x).

    Where the logits are not finite: class -1, no name, no probability.
    """

    def load_context(self, context: Any) -> None:
        loaded = checkpoint.load(Path(context.artifacts["checkpoint"]))
        self._classes = loaded.header.classes
        self._model = UnitRange(loaded.network(torch.device("cpu"))).eval()

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def] # MLflow takes hints for a schema
        images = np.asarray(model_input, dtype=np.float32)
        if images.size and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"pixels in [0, 1] are needed, found {images.min():.4g} to {images.max():.4g}")
        with torch.no_grad():
            logits = torch.cat([self._model(part) for part in torch.from_numpy(images).split(BATCH)])
        probability, index = logits.softmax(1).amax(1), predicted(logits)
        return pd.DataFrame(
            {
                "class": index.numpy(),
                "name": [self._classes[i] if i != NO_CLASS else "" for i in index],
                "probability": probability.numpy().astype(np.float64),
                "energy": marginal_energy(logits).numpy().astype(np.float64),
            }
        )


def log(run: str, path: Path, sha256: str) -> None:
    """Log the checkpoint as model "model" of a run, with signature and input example. sha256: of the file; the model's tag."""
    header = checkpoint.load(path).header
    shape = header.image_shape
    columns = {"class": "long", "name": "string", "probability": "double", "energy": "double"}
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.float32), (-1, *shape))]), Schema([ColSpec(kind, name) for name, kind in columns.items()])
    )
    with mlflow.start_run(run_id=run):
        mlflow.pyfunc.log_model(
            name="model",
            python_model=__file__,
            artifacts={"checkpoint": str(path)},
            code_paths=[str(Path(__file__).parents[1])],
            signature=signature,
            tags={"sha256": sha256},
            input_example=np.zeros((1, *shape), dtype=np.float32),
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
            metadata={"title": header.title, "method": header.method, "data_hash": header.data_hash, "git_commit": header.git_commit},
        )


set_model(Classifier())
