"""Feature extractors, and the Fréchet distance against the matrix square root."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from ebjdat.data.prepared import Prepared
from ebjdat.evaluation import frechet
from ebjdat.evaluation.frechet import ExtractorError
from ebjdat.models.wrn import WideResNet
from ebjdat.settings import GenerateSettings

CPU = torch.device("cpu")


def test_frechet_distance_against_the_matrix_square_root() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    sa, sb = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(sa @ sb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa + sb - 2 * root)
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_reference_features_are_what_the_head_reads_and_lead_to_its_logits(network: WideResNet, digits: Prepared) -> None:
    network.eval()
    images = torch.from_numpy(digits.images[:30])
    reference = frechet.reference_features(network, GenerateSettings(n=2, steps=1, batch_size=7), CPU)
    features = reference(images)
    with torch.no_grad():
        logits = network(images.float() / 127.5 - 1)
        assert torch.allclose(network.head(torch.from_numpy(features).float()), logits, atol=1e-4)
    assert np.allclose(reference.logits(features), logits.numpy(), atol=1e-4)


def asked(path: Path, extractor: str = "inception") -> GenerateSettings:
    return GenerateSettings(n=2, steps=1, batch_size=2, extractor=extractor, inception_weights=str(path))  # type: ignore[arg-type]


def test_inception_without_weights_is_a_clear_error_or_a_named_fallback(
    tmp_path: Path, network: WideResNet, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "weights.pth"
    broken.write_bytes(b"not weights")
    with pytest.raises(ExtractorError, match=r"Inception's weights are unavailable from .*weights\.pth.*'reference'"):
        frechet.choose_extractor(network, asked(broken), CPU, 3)
    name, _ = frechet.choose_extractor(network, asked(broken, "auto"), CPU, 3)
    assert name == "reference"
    assert "it is not an FID" in capsys.readouterr().out
    grey = GenerateSettings(n=2, steps=1, extractor="auto")
    assert frechet.choose_extractor(network, grey, CPU, 1)[0] == "reference"


def compressed(path: Path) -> None:
    good = path.with_suffix(".good")
    torch.save({"weight": torch.zeros(2**20)}, good)
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (compressed, r"Inception's weights are unavailable from .*is compressed, which torch\.save never does"),
        (lambda path: torch.save([torch.zeros(3)], path), r"weights\.pth \(a state dict is needed, found list\)"),
        (
            lambda path: torch.save({"weight": torch.zeros(3), "losses": np.arange(3)}, path),
            r"RuntimeError: Error.* in loading state_dict",
        ),
    ],
)
def test_a_file_of_inceptions_weights_is_not_unpacked_or_run(
    write: Callable[[Path], None], message: str, tmp_path: Path, network: WideResNet
) -> None:
    """Neither what expands nor what calls; nor is a file read again by torch-fidelity, which would run it."""
    write(tmp_path / "weights.pth")
    with pytest.raises(ExtractorError, match=message):
        frechet.choose_extractor(network, asked(tmp_path / "weights.pth"), CPU, 3)


@pytest.mark.slow
def test_inceptions_features_and_logits_from_a_weights_file(tmp_path: Path, network: WideResNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity's own network with random weights from a file: the whole path but the published numbers."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with monkeypatch.context() as patch:  # build one without weights, to have a file of the right tensors
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        random = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    torch.save(random.state_dict(), tmp_path / "weights.pth")
    name, features = frechet.choose_extractor(network, asked(tmp_path / "weights.pth"), CPU, 3)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert name == "inception"
    pooled, logits = (value.detach().numpy() for value in random(images))
    found = features(images)
    assert found.shape == (3, 2048)
    assert np.allclose(found, pooled, atol=1e-5)
    assert np.allclose(features.logits(found), logits, atol=1e-4 * np.abs(logits).max())
