"""Generation: chains seen on their way, sample metrics against slow loops, protocols of what is measured against what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor, nn
from typer.testing import CliRunner

from ebjdat import registry
from ebjdat import settings as params
from ebjdat.cli import app
from ebjdat.data import prepared
from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.evaluation import fidelity, frechet, generate
from ebjdat.evaluation.frechet import Features, frechet_distance
from ebjdat.evaluation.generate import Samples
from ebjdat.files import read_json
from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet, build
from ebjdat.report.figures import animate
from ebjdat.samplers.chains import run_chain, strides
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import ChainSettings, GenerateSettings, ParamsError, Profile
from ebjdat.training import checkpoint

from .conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def pool(digits: Prepared, train_data: DeviceData) -> StartPool:
    return StartPool.of(train_data, torch.from_numpy(digits.class_mean))


@pytest.fixture(scope="module")
def flat(digits: Prepared) -> np.ndarray:
    """Pixels of every digit as features: float64 (1797, 64) in [0, 1]."""
    return digits.images.reshape(len(digits.images), -1) / 255.0


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", registry.SAMPLERS)
def test_a_walk_in_single_steps_is_the_same_walk(
    name: str, conditional: bool, network: WideResNet, train_data: DeviceData, rng: torch.Generator
) -> None:
    """Bit for bit: no sampler keeps anything from step to step but x and its noise."""
    spec = ChainSettings(sampler=name, conditional=conditional, steps=4, step_size=0.3, noise=0.05)
    x, y = train_data.internal(slice(12)), train_data.labels[:12]
    with frozen_parameters(network, "train"):
        end = run_chain(network, x, y, spec, rng)
        seen = list(strides(network, x, y, spec, torch.Generator().manual_seed(0)))
    assert len(seen) == 4
    assert torch.equal(seen[-1], end)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("conditional", [False, True])
def test_watched_chains_are_the_fresh_ones(conditional: bool, network: WideResNet, pool: StartPool) -> None:
    settings = GenerateSettings(n=50, steps=3, batch_size=20)
    chain = ChainSettings(sampler="sgld", noise=0.05, step_size=0.5)
    ends, starts = generate.fresh_chains(network, pool, chain, settings, conditional=conditional)
    frames, seen_at = generate.watched_chains(network, pool, chain, settings, conditional=conditional)
    assert frames.shape == (4, 20, 1, 8, 8)
    assert seen_at == [0, 1, 2, 3]
    assert torch.equal(frames[0], starts.images[:20])
    assert torch.equal(frames[-1], ends.images[:20])
    assert not torch.equal(frames[1], frames[2])


def test_of_a_long_chain_evenly_spaced_steps_are_kept(network: WideResNet, pool: StartPool) -> None:
    settings = GenerateSettings(n=10, steps=60)
    frames, seen_at = generate.watched_chains(network, pool, ChainSettings(step_size=0.1), settings)
    ends, _ = generate.fresh_chains(network, pool, ChainSettings(step_size=0.1), settings)
    assert len(frames) == len(seen_at) == 25
    assert (seen_at[0], seen_at[-1]) == (0, 60)
    assert set(np.diff(seen_at)) == {2, 3}
    assert torch.equal(frames[-1], ends.images)


def test_conditional_chains_share_their_starts_and_go_down_their_own_energy(network: WideResNet, pool: StartPool) -> None:
    settings = GenerateSettings(n=40, steps=20)
    free_chain, bound_chain = (ChainSettings(sampler="sgld", step_size=1.0, mode="eval", conditional=bound) for bound in (False, True))
    free, free_starts = generate.fresh_chains(network, pool, free_chain, settings)
    bound, bound_starts = generate.fresh_chains(network, pool, free_chain, settings, conditional=True)
    assert torch.equal(free_starts.images, bound_starts.images)
    assert torch.equal(free.images, generate.fresh_chains(network, pool, bound_chain, settings)[0].images)  # whatever training did

    def joint(of: Samples) -> Tensor:
        with torch.no_grad():
            return -network.eval()(of.images.float() / 127.5 - 1)[range(40), of.labels]

    assert (joint(bound) < joint(free)).float().mean() > 0.9


def slow_kid(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD by its definition, one pair at a time."""

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def within(s: np.ndarray) -> float:
        return sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))

    return within(a) + within(b) - 2 * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))


def test_kid_against_a_slow_loop(flat: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = flat[:40], 1 - flat[100:140]
    monkeypatch.setattr(fidelity, "KID_SHARE", 1)  # every subset is the whole set
    mean, spread, size = fidelity.kernel_distance(a, b)
    assert size == 40
    assert mean == pytest.approx(slow_kid(a, b), rel=1e-9)
    assert spread == pytest.approx(0, abs=1e-12)


def test_kid_over_subsets_is_unbiased_and_its_subsets_follow_the_smaller_set(flat: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = flat[:300], 0.7 * flat[300:1000]
    mean, spread, size = fidelity.kernel_distance(a, b)
    assert size == 30
    assert fidelity.kernel_distance(a, b) == (mean, spread, size)
    assert mean == pytest.approx(slow_kid(a[:150], b[:150]), rel=0.2)  # another estimate of the same number
    assert 0 < spread < mean
    same, _, _ = fidelity.kernel_distance(flat[:800], flat[800:1600])
    assert abs(same) < 0.05 * mean
    assert fidelity.kernel_distance(flat[:3], flat[:700])[2] == 2
    monkeypatch.setattr(fidelity, "KID_SUBSETS", 1)
    assert fidelity.kernel_distance(np.zeros((20_000, 2)), np.ones((15_000, 2)))[2] == 1000


def test_precision_and_recall_against_a_slow_loop(flat: np.ndarray) -> None:
    samples = np.concatenate([0.9 * flat[:40], 1 - flat[40:50]])  # ten lie nowhere near a digit
    real = flat[200:320]

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radius = [sorted(np.linalg.norm(c - other) for other in centres)[3] for c in centres]  # the nearest is c itself
        return sum(any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius, strict=True)) for p in points) / len(points)

    found = fidelity.precision_recall(samples, real)
    assert found == pytest.approx((covered(samples, real), covered(real, samples)), abs=1e-6)  # float32 means
    assert found is not None
    assert abs(found[0] - found[1]) > 0.05  # else they could be exchanged
    assert fidelity.precision_recall(samples[:3], real) is None


def test_precision_and_recall_of_a_large_set_are_those_of_its_parts(flat: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fidelity.precision_recall(0.9 * flat[:100], flat[300:500])
    monkeypatch.setattr(fidelity, "CHUNK", 30)
    assert fidelity.precision_recall(0.9 * flat[:100], flat[300:500]) == pytest.approx(whole, abs=0.011)  # one point at a ball's edge


def numpy_score(logits: np.ndarray) -> float:
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return float(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))


def test_class_score_against_its_formula() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 10)) * 3
    shuffled = logits[np.random.RandomState(2020).permutation(200)]  # torch-fidelity's own order
    parts = [numpy_score(part) for part in np.split(shuffled, 10)]
    assert fidelity.class_score(logits) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-9)
    assert fidelity.class_score(np.tile(60 * np.eye(10), (1, 1)))[0] == pytest.approx(1)  # ten splits of one image
    assert fidelity.class_score(logits[:3])[0] >= 1


def test_a_score_has_its_extractors_name(flat: np.ndarray) -> None:
    features = Features(lambda images: flat, lambda seen: seen[:, :10] * 20)
    for own, other in (("inception", "reference"), ("reference", "inception")):
        found = fidelity.compare(flat[:50], flat[50:200], own, features)
        assert tuple(found) == fidelity.MEASURES
        assert found[f"{own}_score"] == fidelity.class_score(flat[:50, :10] * 20)[0]
        assert found[f"{own}_score_std"] == fidelity.class_score(flat[:50, :10] * 20)[1]
        assert found[f"{other}_score"] is None
        assert found["frechet"] == frechet_distance(flat[:50], flat[50:200])
    few = fidelity.compare(flat[:3], flat[50:200], "reference", features)
    assert few["frechet"] is not None
    assert few["precision"] is None
    assert set(fidelity.compare(flat[:1], flat, "reference", features).values()) == {None}
    assert fidelity.compare(None, flat, "reference", features) == dict.fromkeys(fidelity.MEASURES)


def test_logits_read_from_features_are_the_extractors_own(
    network: WideResNet, digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = torch.from_numpy(digits.images[:30])
    reference = frechet.reference_features(network, GenerateSettings(n=2, steps=1), CPU)
    with torch.no_grad():
        assert np.allclose(reference.logits(reference(images)), network.eval()(images.float() / 127.5 - 1).numpy(), atol=1e-4)

    with monkeypatch.context() as patch:  # random weights: a file of the right tensors
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        random = FeatureExtractorInceptionV3("inception-v3-compat", ["logits_unbiased"])
    torch.save(random.state_dict(), tmp_path / "weights.pth")
    settings = GenerateSettings(n=2, steps=1, extractor="inception", inception_weights=str(tmp_path / "weights.pth"))
    inception = frechet.inception_features(None, settings, CPU)
    colours = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = random(colours)[0].detach().numpy()
    assert np.allclose(inception.logits(inception(colours)), expected, atol=1e-4 * np.abs(expected).max())


class Brightness(nn.Module):
    """Three classes by the mean of [0, 1] images; the farther from the borders, the surer."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return 30 * torch.stack([-mean, -(mean - 0.5).abs() - 0.1, mean - 1], 1)


def test_the_released_selection_against_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy((rng.uniform(0, 1, (83, 1, 1, 1)) * np.ones((1, 1, 4, 4)) * 255).astype(np.uint8))
    with torch.no_grad():
        p = Brightness()(images.float() / 255).softmax(1).numpy()
    expected: set[int] = set()
    for k in range(3):
        mine = sorted((i for i in range(83) if p[i].argmax() == k), key=lambda i: -p[i].max())
        assert len(mine) > 10
        expected |= set(mine[: int(len(mine) * 0.9)])
    found = generate.most_confident(Brightness(), images, 0.9, batch_size=20).tolist()
    assert len(found) == len(set(found)) == len(expected) < 0.9 * 83
    assert set(found) == expected


def test_protocols_say_what_is_measured_against_what(network: WideResNet, digits: Prepared, flat: np.ndarray) -> None:
    """Under pixels as features every number can be recomputed; each set differs, so that none stands for another."""
    features = Features(lambda images: images.numpy().reshape(len(images), -1) / 255.0, lambda seen: seen[:, 20:30] * 9)
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.labels)

    def some(n: int, factor: float) -> Samples:
        return Samples((images[:n] * factor).byte(), labels[:n])

    samples = {"fresh": some(200, 0.9), "conditional": some(180, 0.8), "buffer": some(160, 0.7)}
    starts, real = some(200, 0.5), {"train": flat[digits.train], "all": flat}
    settings = GenerateSettings(n=200, steps=1, protocols={"whole_buffer": {"like": "released", "select": 1.0}})
    found = generate.measure(network, samples, starts, real, "reference", features, settings)

    train = flat[digits.train]
    for suffix, name in (("", "fresh"), ("_conditional", "conditional"), ("_buffer", "buffer")):
        expected = fidelity.compare(features(samples[name].images), train, "reference", features)
        assert {key: found[f"{key}{suffix}"] for key in expected} == expected
    assert found["frechet_start"] == frechet_distance(features(starts.images), train)
    assert (found["n_samples"], found["n_conditional"], found["n_buffer"], found["n_reference"]) == (200, 180, 160, 1170)
    assert (found["frechet_against"], found["frechet_extractor"]) == ("train", "reference")

    class OfUnit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network(x * 2 - 1)

    kept = generate.most_confident(OfUnit(), samples["buffer"].images, 0.9, 50)
    released = features(samples["buffer"].images[kept])
    assert found["released_n_samples"] == len(kept) < 160
    assert found["released_n_reference"] == 1797
    assert found["released_frechet_against"] == "all"
    assert found["released_frechet"] == frechet_distance(released, flat)
    assert found["released_precision"] == fidelity.precision_recall(released, flat)[0]
    assert found["whole_buffer_n_samples"] == 160
    assert found["whole_buffer_frechet"] == frechet_distance(features(samples["buffer"].images), flat)
    assert len({found[key] for key in found if "frechet" in key and isinstance(found[key], float)}) == 6

    without = generate.measure(network, {**samples, "buffer": None}, starts, real, "reference", features, settings)
    assert {key for key in found if key.startswith("released_") or key.endswith("_buffer")} <= without.keys()
    assert {value for key, value in without.items() if key.startswith(("released_", "whole_buffer_"))} == {None}
    assert {value for key, value in without.items() if key.endswith("_buffer") and key != "n_buffer"} == {None}
    assert without["n_buffer"] == 0
    assert without["frechet"] == found["frechet"]
    with torch.no_grad():
        agree = (network(samples["conditional"].images.float() / 127.5 - 1).argmax(1) == samples["conditional"].labels).float().mean()
    assert found["class_agreement_conditional"] == pytest.approx(float(agree))


def test_the_frechet_distance_falls_with_n_and_kid_does_not(flat: np.ndarray) -> None:
    """Halves of one data set: the true distance is 0, and what is found depends on n. So every distance has its n beside it."""
    found = {n: frechet_distance(flat[:n], flat[900:]) for n in (40, 200, 800)}
    assert found[40] > 1.8 * found[200] > 1.8 * 1.8 * found[800] > 0
    kid, spread, _ = fidelity.kernel_distance(flat[:40], flat[900:])
    assert abs(kid) < spread


def profile_problems(**generate_settings: Any) -> str:
    with pytest.raises(ParamsError) as error:
        params.load(ROOT / "params/digits.yaml", [f"evaluation.generate.{k}={v}" for k, v in generate_settings.items()])
    return str(error.value)


def test_protocols_of_samples_are_data(profile: Profile) -> None:
    assert {k: v.model_dump(exclude={"like"}) for k, v in profile.evaluation.generate.protocols.items()} == {
        "standard": {"source": "fresh", "select": 1.0, "against": "train"},
        "released": {"source": "buffer", "select": 0.9, "against": "all"},
    }
    own = params.load(
        ROOT / "params/digits.yaml", ["evaluation.generate.protocols={released: null, bound: {like: standard, source: conditional}}"]
    ).evaluation.generate.protocols
    assert list(own) == ["standard", "bound"]
    assert (own["bound"].source, own["bound"].select, own["bound"].against) == ("conditional", 1.0, "train")
    same = params.load(ROOT / "params/digits.yaml", ["evaluation.generate.protocols.released.like=released"])
    assert same.evaluation.generate.protocols["released"].select == 0.9


@pytest.mark.parametrize(
    ("protocols", "expected"),
    [
        ("{released: {select: 0.5}}", "protocols.released: its values are what its name means; add a protocol `like: released`"),
        ("{standard: {against: all}}", "protocols.standard: its values are what its name means"),
        ("{standard: null}", "'standard' cannot be left out"),
        ("{mine: {source: buffer}}", "'mine' needs `like`, the row that it stands on; allowed: standard, released"),
        ("{mine: {like: releasd}}", "'mine' needs `like`"),
        ("{ema: {like: released, select: 0.5}}", "results of averaged weights are named ema_"),
        ("{mine: {like: released, select: 0}}", "protocols.mine.select: input should be greater than 0"),
        ("{mine: {like: released, slect: 0.5}}", "unknown key; did you mean 'select'?"),
        ("{Mine: {like: released}}", "should match pattern"),
        ("{mine: 3}", "protocols.mine"),
        ("[released]", "valid mapping"),
    ],
)
def test_impossible_protocols_of_samples(protocols: str, expected: str) -> None:
    assert expected in profile_problems(protocols=protocols)


def chains(frames: int, channels: int, side: int, classes: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 5 * classes, channels, side, side)).astype(np.uint8)


def test_the_gif_shows_the_chains_pixel_by_pixel(tmp_path: Path) -> None:
    shown = {"down E(x)": chains(6, 1, 8), "down E(x, y)": 255 - chains(6, 1, 8)}
    for name in ("a.gif", "b.gif"):
        animate(shown, [0, 1, 2, 3, 4, 5], 10, tmp_path / name)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    with Image.open(tmp_path / "a.gif") as gif:
        seen = [(np.array(frame.convert("L")), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0
    assert [duration for _, duration in seen] == [1000, 250, 250, 250, 250, 2500]
    for t, (picture, _) in enumerate(seen):
        assert picture.shape == (2 * (16 + 4 * 9 * 5), 10 * 9 * 5)
        for block, images in enumerate(shown.values()):
            for row, k in ((0, 0), (3, 9), (1, 4)):  # row r, column k: the r-th chain of class k
                top, left = 16 + block * (16 + 180) + row * 45, k * 45
                tile = np.kron(images[t, row * 10 + k, 0], np.ones((5, 5)))
                assert np.array_equal(picture[top : top + 40, left : left + 40], tile)


@pytest.mark.parametrize(
    ("frames", "side", "classes"), [(25, 8, 10), (11, 32, 10), (25, 32, 10), (11, 64, 10), (11, 32, 100), (25, 64, 10)]
)
def test_the_gif_of_pure_noise_is_below_a_megabyte(frames: int, side: int, classes: int, tmp_path: Path) -> None:
    images = chains(frames, 1 if side == 8 else 3, side, classes)
    animate({"down E(x)": images, "down E(x, y)": images}, list(range(frames)), classes, tmp_path / "c.gif")
    assert (tmp_path / "c.gif").stat().st_size < 1_000_000
    with Image.open(tmp_path / "c.gif") as gif:
        assert gif.n_frames == frames
        assert 300 <= gif.width <= 500 or (frames, side) == (25, 64)  # few columns fit there


def saved(path: Path, profile: Profile, data: Prepared, seed: int, buffer: Samples | None) -> WideResNet:
    """A network's checkpoint; its head is scaled so that what it says of images is not all alike."""
    settings = profile.model
    network = build(settings, 1, 10, seed)
    with torch.no_grad():
        network.head.weight *= 20
    header = checkpoint.Header(
        title="test",
        run="digits",
        method="eb_jdat",
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
