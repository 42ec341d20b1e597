"""The logged model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ebjdat.data.prepared import Prepared
from ebjdat.models.modes import UnitRange
from ebjdat.models.wrn import WideResNet
from ebjdat.settings import ModelSettings, Profile
from ebjdat.tracking.tracker import About, Subject, track
from ebjdat.training import checkpoint
from ebjdat.training.checkpoint import Checkpoint, Header

from .conftest import CURRENT, TAGS, Mlflow, tracked


def save_checkpoint(network: WideResNet, profile: Profile, digits: Prepared, path: Path) -> None:
    model = ModelSettings(depth=10, width=1)
    header = Header(
        "eb_jdat/seed0", "digits", "eb_jdat", 0, model, profile.training_settings("eb_jdat"), (1, 8, 8), digits.classes, "d", "p", "c", {}
    )
    checkpoint.save(Checkpoint(header, network.state_dict(), None, None), path)


def test_the_logged_model_classifies_images_in_the_unit_range(
    store: Mlflow, digits: Prepared, profile: Profile, network: WideResNet
) -> None:
    save_checkpoint(network, profile, digits, Path("c.safetensors"))
    with tracked(file="f") as tracker:
        tracker.model(Path("c.safetensors"))
    store.sync()
    import mlflow

    (run,) = store.runs(CURRENT)
    loaded = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    images = digits.images[:7].astype(np.float32) / 255
    with torch.no_grad():
        logits = UnitRange(network).eval()(torch.from_numpy(images))
    found = loaded.predict(images)
    assert list(found["class"]) == logits.argmax(1).tolist()
    assert list(found["name"]) == [digits.classes[i] for i in logits.argmax(1)]
    np.testing.assert_allclose(found["probability"], logits.softmax(1).amax(1), rtol=1e-5)
    np.testing.assert_allclose(found["energy"], -logits.logsumexp(1), rtol=1e-5)
    assert loaded.metadata.signature.inputs.inputs[0].shape == (-1, 1, 8, 8)
    assert loaded.input_example is not None
    # Other settings of an evaluation: a new run, whose training is the old one's.
    with track(Subject("digits", "eb_jdat", 0, "energy"), About({}, {**TAGS, "params_hash": "q"}), Path("results/e.journal.jsonl")):
        pass
    with track(
        Subject("digits", "report", 0, "report", "report"), About({}, {"data_hash": "d"}), Path("results/r.journal.jsonl")
    ) as tracker:
        tracker.result("eb_jdat", 0, {"params_hash": "q", "data_hash": "d"}, {}, [], Path("c.safetensors"))
    store.sync()
    (new,) = store.runs(CURRENT)
    assert new.info.run_id != run.info.run_id
    again = mlflow.pyfunc.load_model(f"runs:/{new.info.run_id}/model")
    assert list(again.predict(images)["class"]) == list(found["class"])
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\] are needed, found 0 to 255"):
        loaded.predict(images * 255)
