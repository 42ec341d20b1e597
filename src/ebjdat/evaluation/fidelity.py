"""How samples compare with real images, from features alone: torch-fidelity's own Fréchet distance, KID, precision, recall, class score.

Under Inception's features they are FID, KID and IS; under any other extractor they are not, and every result names it. All
of it is computed on the CPU, wherever the features were.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ebjdat.evaluation.frechet import Array, Features, frechet_distance

FEWEST = 2  # a spread needs two
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # at most; both are torch-fidelity's defaults
KID_SHARE = 10  # a subset is a tenth of the smaller set at most, so that subsets differ: 10,000 images give the usual 1000
NEIGHBOURS = 3  # of precision and recall; torch-fidelity's default
SCORE_SPLITS = 10  # torch-fidelity's default
MEASURES = (
    *("frechet", "kid", "kid_std", "kid_subset_size", "precision", "recall"),
    *("inception_score", "inception_score_std", "reference_score", "reference_score_std"),
)
CHUNK = 1000  # rows of the distance matrix at a time: 45,000 training images are 0.4 GB


def kernel_distance(a: Array, b: Array) -> tuple[float, float, int]:
    """Squared MMD under the kernel (x.y / F + 1)^3 of two feature sets (N, F): mean and spread over subsets, and their size.

    Unbiased, so it may be slightly negative, and its mean does not depend on N as the Fréchet distance does; its spread
    falls with the subsets' size. Source: Bińkowski et al. 2018, arXiv 1801.01401.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = max(FEWEST, min(KID_SUBSET_SIZE, len(a) // KID_SHARE, len(b) // KID_SHARE))
    values = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False)
    return values[KEY_METRIC_KID_MEAN], values[KEY_METRIC_KID_STD], size


def precision_recall(samples: Array, real: Array) -> tuple[float, float] | None:
    """Fraction of samples (N, F) within a real image's ball, and of real images within a sample's ball; both in [0, 1].

    A ball reaches to the third nearest neighbour of its own set. None where a set has fewer than four. Both depend on both
    N. Source: Kynkäänniemi et al. 2019, arXiv 1904.06991.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if min(len(samples), len(real)) <= NEIGHBOURS:
        return None
    values = prc_features_to_metric(
        torch.from_numpy(samples),
        torch.from_numpy(real),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=CHUNK,
        save_cpu_ram=True,
        verbose=False,
    )
    return values[KEY_METRIC_PRECISION], values[KEY_METRIC_RECALL]


def class_score(logits: Array) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || mean p(y|x))) of class logits (N, K), in [1, K]: mean and spread over ten splits.

    It is the Inception Score only of Inception's logits. Source: Salimans et al. 2016, arXiv 1606.03498.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    values = isc_features_to_metric(torch.from_numpy(logits), splits=min(SCORE_SPLITS, len(logits)))
    return values[KEY_METRIC_ISC_MEAN], values[KEY_METRIC_ISC_STD]


def compare(samples: Array | None, real: Array, extractor: str, features: Features) -> dict[str, float | int | None]:
    """Every measure of samples (N, F) against real images (M, F) under a named extractor; None where it is undefined.

    frechet (lower is better, biased upward in N), kid, kid_std, kid_subset_size, precision, recall, and the class score under
    its extractor's name: inception_score or reference_score, the other is None. Below two samples everything is None; nan
    where a feature is not finite.
    """
    measures: dict[str, float | int | None] = dict.fromkeys(MEASURES)
    if samples is None or len(samples) < FEWEST:
        return measures
    if not (np.isfinite(samples).all() and np.isfinite(real).all()):
        own = {f"{extractor}_score", f"{extractor}_score_std"}
        return {name: math.nan if name in own or not name.endswith(("_score", "_score_std")) else None for name in measures}
    measures["frechet"] = frechet_distance(samples, real)
    measures["kid"], measures["kid_std"], measures["kid_subset_size"] = kernel_distance(samples, real)
    measures["precision"], measures["recall"] = precision_recall(samples, real) or (None, None)
    measures[f"{extractor}_score"], measures[f"{extractor}_score_std"] = class_score(features.logits(samples))
    return measures
