"""Stage `generate` through the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor, nn
from typer.testing import CliRunner

from ebjdat.cli import app
from ebjdat.data import prepared
from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.evaluation import fidelity, frechet, generate
from ebjdat.evaluation.frechet import frechet_distance
from ebjdat.evaluation.generate import Samples
from ebjdat.files import read_json
from ebjdat.models.wrn import WideResNet, build
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import Profile
from ebjdat.training import checkpoint

from ..conftest import ROOT

CPU = torch.device("cpu")


def saved(path: Path, profile: Profile, data: Prepared, seed: int, buffer: Samples | None, method: str = "eb_jdat") -> WideResNet:
    """A network's checkpoint; its head is scaled so that what it says of images is not all alike."""
    settings = profile.model
    network = build(settings, 1, 10, seed)
    with torch.no_grad():
        network.head.weight *= 20
    header = checkpoint.Header(
        title="test",
        run="digits",
        method=method,
        seed=seed,
        model=settings,
        training=profile.training_settings("eb_jdat"),
        image_shape=data.image_shape,
        classes=data.classes,
        data_hash=data.data_hash,
        params_hash="none",
        git_commit="none",
        metrics={},
    )
    images, labels = (None, None) if buffer is None else (buffer.images, buffer.labels)
    averaged = build(settings, 1, 10, seed + 10).state_dict()
    checkpoint.save(checkpoint.Checkpoint(header, network.state_dict(), images, labels, averaged), path)
    return network.eval()


@pytest.mark.slow
def test_the_stage_writes_measures_samples_and_pictures(tmp_path: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command line; what is in the files is recomputed from the samples and the checkpoints.

    Relative tolerance 1e-4: features are float32 and the stage's networks have another memory layout.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    data, card = prepared.prepare(profile.data)
    prepared.save(data, card, tmp_path / "data.npz", tmp_path / "card.json")
    buffer = Samples(torch.from_numpy(data.images[:128] // 2), torch.from_numpy(data.labels[:128]))
    model = saved(tmp_path / "model.safetensors", profile, data, 0, buffer)
    ruler = saved(tmp_path / "ruler.safetensors", profile, data, 1, None)
    words = {"data": "data.npz", "weights": "model.safetensors", "reference": "ruler.safetensors", "out": "g.json"}
    words |= {"samples": "s.npz", "grid": "g.png", "chains": "c.gif", "experiment": "eb_jdat", "seed": "0"}
    words |= {"params": str(ROOT / "params/digits.yaml"), "override": str(ROOT / "params/overrides/ci.yaml")}
    done = CliRunner().invoke(app, ["generate", *(part for key, value in words.items() for part in (f"--{key}", value))])
    assert done.exit_code == 0, done.output

    result, samples = read_json(tmp_path / "g.json"), np.load(tmp_path / "s.npz", allow_pickle=False)
    assert samples["images"].shape == samples["conditional"].shape == (100, 1, 8, 8)
    assert samples["labels"].tolist() == [i % 10 for i in range(100)]
    assert not np.array_equal(samples["images"], samples["conditional"])
    settings = profile.evaluation.generate
    features = frechet.reference_features(ruler, settings, CPU)
    every = features(torch.from_numpy(data.images))
    seen = {name: features(torch.from_numpy(samples[name])) for name in ("images", "conditional")}
    assert result["frechet"] == pytest.approx(frechet_distance(seen["images"], every[data.train]), rel=1e-4)
    assert result["frechet_conditional"] == pytest.approx(frechet_distance(seen["conditional"], every[data.train]), rel=1e-4)
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    pool = StartPool.of(DeviceData(data, "train", CPU), torch.from_numpy(data.class_mean))
    again, _ = generate.fresh_chains(loaded.network(CPU, loaded.ema), pool, loaded.header.training.chain, settings)
    assert result["ema_frechet"] == pytest.approx(frechet_distance(features(again.images), every[data.train]), rel=1e-4)
    assert result["ema_frechet"] != result["frechet"]
    assert result["kid"] == pytest.approx(fidelity.kernel_distance(seen["images"], every[data.train])[0], rel=1e-4)

    class OfUnit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x * 2 - 1)

    kept = generate.most_confident(OfUnit(), buffer.images, 0.9, 250)
    assert result["released_n_samples"] == len(kept)
    assert result["released_n_reference"] == len(data.images) == 1170 + 130 + 100
    assert result["released_frechet"] == pytest.approx(frechet_distance(features(buffer.images[kept]), every), rel=1e-4)
    with Image.open(tmp_path / "c.gif") as gif, Image.open(tmp_path / "g.png") as grid:
        assert gif.n_frames == profile.evaluation.generate.steps + 1
        assert 300 <= gif.width <= 500
        assert grid.format == "PNG"
        last = list(ImageSequence.Iterator(gif))[-1].convert("L")
    tile = np.kron(samples["images"][0, 0], np.ones((5, 5)))
    assert np.array_equal(np.array(last)[16:56, :40], tile)
