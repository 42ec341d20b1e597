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
from ebjdat.training import checkpoint
from ebjdat.training.checkpoint import Checkpoint, Header

from .conftest import Mlflow, run_stage, tracked
from .test_publish import store_with_a_loss

CHECKPOINT = Path("c.safetensors")


@pytest.fixture(autouse=True)
def journal_with_a_model(fresh_folder: None, network: WideResNet, profile: Profile, digits: Prepared) -> None:
    settings, model = profile.training_settings("eb_jdat"), ModelSettings(depth=10, width=1)
    header = Header("eb_jdat/seed0", "digits", "eb_jdat", 0, model, settings, (1, 8, 8), digits.classes, "d", "p", "c", {})
    checkpoint.save(Checkpoint(header, network.state_dict(), None, None), CHECKPOINT)
    with tracked() as tracker:
        tracker.model(CHECKPOINT)


@pytest.mark.slow
def test_the_logged_model_classifies_images_in_the_unit_range(store: Mlflow, digits: Prepared, network: WideResNet) -> None:
    import mlflow

    store.sync()
    run = store.run()
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
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\] are needed, found 0 to 255"):
        loaded.predict(images * 255)
    # Other settings of an evaluation: a new run, whose training is the old one's.
    run_stage("energy", {"steps": 3})
    with tracked("report", name="report", kind="report") as tracker:
        tracker.result("eb_jdat", 0, {"params_hash": '{"steps": 3}', "data_hash": "d"}, {}, [], CHECKPOINT)
    store.sync()
    new = store.run()
    assert new.info.run_id != run.info.run_id
    again = mlflow.pyfunc.load_model(f"runs:/{new.info.run_id}/model")
    assert list(again.predict(images)["class"]) == list(found["class"])


@pytest.mark.slow
def test_a_model_is_logged_once_whichever_call_is_lost(empty_store: bytes, tmp_path: Path) -> None:
    """Every call from the one on that asks for a model fails in turn, before it is done; then all is sent again."""

    def sent(fatal: int) -> list[str]:
        store, calls = store_with_a_loss(tmp_path / f"{fatal}/mlflow.db", empty_store, fatal, after=False)
        experiment = store.client.get_experiment_by_name("digits").experiment_id
        assert len(store.client.search_logged_models([experiment])) == 1, f"call {fatal} of {calls}"
        return calls

    calls = sent(0)
    for fatal in range(calls.index("get_run") + 1, len(calls) + 1):
        sent(fatal)
