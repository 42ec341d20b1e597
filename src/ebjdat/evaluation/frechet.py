"""Fréchet distance between sets of images under a named feature extractor. Only Inception's is called FID."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebjdat import registry
from ebjdat.errors import UserError, in_a_line
from ebjdat.models.weights import ModelError, read_weights
from ebjdat.models.wrn import WideResNet
from ebjdat.pixels import internal_from_unit, unit_from_uint8
from ebjdat.settings import GenerateSettings

Array = NDArray[np.float64]
INCEPTION = 96 * 2**20  # bytes of its weights


@dataclass(frozen=True)
class Features:
    """An extractor: uint8 images (N, C, H, W) -> features (N, F), and features -> the class logits (N, K) they lead to."""

    extract: Callable[[Tensor], Array]
    logits: Callable[[Array], Array]

    def __call__(self, images: Tensor) -> Array:
        return self.extract(images)


class ExtractorError(UserError):
    """The features cannot be computed here; says what is missing."""


def reference_features(network: WideResNet, settings: GenerateSettings, device: torch.device) -> Features:
    """Penultimate features (before the head) of the profile's reference classifier, in eval mode, and its own logits."""
    network = network.to(device).eval()
    weight, bias = (value.detach().double().cpu().numpy() for value in (network.head.weight, network.head.bias))

    @torch.no_grad()
    def extract(images: Tensor) -> Array:
        parts = [
            network.features(internal_from_unit(unit_from_uint8(part.to(device)))).double().cpu()
            for part in images.split(settings.batch_size)
        ]
        return torch.cat(parts).numpy()

    return Features(extract, lambda features: features @ weight.T + bias)


def kept_weights() -> Path:
    """Where torch-fidelity keeps the weights that it downloads."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError as error:
        raise ExtractorError('the extractor "inception" needs the package torch-fidelity') from error
    return Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)


def inception_features(network: WideResNet | None, settings: GenerateSettings, device: torch.device) -> Features:
    """Inception-v3 pool3 features (2048) of torch-fidelity, the extractor of FID, and its `logits_unbiased`, those of IS.

    Weights: the file `settings.inception_weights`, else torch-fidelity's own download. Raises ExtractorError when they
    are unavailable. torch-fidelity itself would unpickle anything, so it gets only the tensors of a file.
    """
    path = settings.inception_weights
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        weights = None if path is None else _tensors_of(Path(path))
        extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except ImportError as error:
        raise ExtractorError('the extractor "inception" needs the package torch-fidelity') from error
    except Exception as error:  # urllib, zip, pickle and key errors mean the same to the user
        where = f"from {path}" if path else "by download"
        reason = str(error).removeprefix(f"{path}: ") if isinstance(error, ModelError) else in_a_line(error).split(". ")[0]
        raise ExtractorError(
            f"Inception's weights are unavailable {where} ({reason}). Set "
            "evaluation.generate.inception_weights to a file of them, or the extractor to 'reference'."
        ) from error
    extractor = extractor.to(device).eval()
    weight = extractor.fc.weight.detach().double().cpu().numpy()

    @torch.no_grad()
    def extract(images: Tensor) -> Array:
        parts = []
        for part in images.split(settings.batch_size):
            rgb = part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part
            parts.append(extractor(rgb.to(device))[0].double().cpu())
        return torch.cat(parts).numpy()

    return Features(extract, lambda features: features @ weight.T)


def _tensors_of(path: Path) -> io.BytesIO:
    """The state dict in a file, as a file of torch.save that holds nothing else. Raises ModelError."""
    content = read_weights(path, INCEPTION)
    if not isinstance(content, Mapping):
        raise ModelError(f"{path}: a state dict is needed, found {type(content).__name__}")
    file = io.BytesIO()
    torch.save({str(name): value for name, value in content.items() if isinstance(value, Tensor)}, file)
    file.seek(0)
    return file


def choose_extractor(network: WideResNet, settings: GenerateSettings, device: torch.device, channels: int) -> tuple[str, Features]:
    """(name, features) of the settings' extractor. "auto": Inception for RGB images when its weights are available."""
    if settings.extractor == "reference" or (settings.extractor == "auto" and channels != 3):
        return "reference", registry.load(registry.EXTRACTORS, "reference")(network, settings, device)
    try:
        return "inception", registry.load(registry.EXTRACTORS, "inception")(network, settings, device)
    except ExtractorError as error:
        if settings.extractor == "inception":
            raise
        print(f"WARNING: {error}\nWARNING: the distance below is under the reference classifier's features; it is not an FID.", flush=True)
        return "reference", reference_features(network, settings, device)


def frechet_distance(a: Array, b: Array) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two feature sets (N, F), at least 2 rows each.

    nan where a feature is not finite. Source: Heusel et al. 2017, arXiv 1706.08500, eq. 6; torch-fidelity's implementation.
    Biased upward for small N: only compare distances of the same N.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics: list[Any] = [fid_features_to_statistics(torch.from_numpy(part)) for part in (a, b)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])
