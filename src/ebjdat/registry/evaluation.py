"""How networks are measured: attacks, protocols, features of images."""

from __future__ import annotations

from collections.abc import Mapping

from ebjdat.registry.entries import RELEASE, Entry, Preset

# Attacks of an ensemble, cheapest first.
ATTACKS: Mapping[str, Entry] = {
    "apgd_ce": Entry("ebjdat.evaluation.autoattack:apgd_ce", "APGD on cross-entropy, arXiv 2003.01690; pyautoattack", reads=("steps",)),
    "apgd_dlr": Entry("ebjdat.evaluation.autoattack:apgd_dlr", "APGD on DLR, untargeted, arXiv 2003.01690; pyautoattack", reads=("steps",)),
    "apgd_t": Entry(
        "ebjdat.evaluation.autoattack:apgd_t", "APGD on targeted DLR, arXiv 2003.01690; pyautoattack", reads=("steps", "targets")
    ),
    "fab": Entry("ebjdat.evaluation.autoattack:fab", "FAB, untargeted, arXiv 1907.02044; pyautoattack", reads=("steps", "range")),
    "fab_t": Entry(
        "ebjdat.evaluation.autoattack:fab_t", "FAB, targeted, arXiv 1907.02044; pyautoattack", reads=("steps", "targets", "range")
    ),
    "square": Entry("ebjdat.evaluation.autoattack:square", "Square, arXiv 1912.00049; pyautoattack", reads=("queries",)),
}
# Attacks that know what the network is, and come after a protocol's ensemble: reported beside it, never as part of it.
ADAPTIVE: Mapping[str, Entry] = {
    "energy_ce": Entry(
        "ebjdat.evaluation.adaptive:energy_ce", "PGD on CE - weight E and on CE + weight E", reads=("steps", "restarts", "weight")
    ),
}
FEWEST_CLASSES: Mapping[str, int] = {"apgd_t": 4, "apgd_dlr": 3}  # with fewer, the attack's loss is undefined

# Evaluation protocols. A profile's protocol of the same name, or one that is `like` it, starts from these values.
_UNIT = {"norm": "Linf", "range": "unit", "noise": 0.0, "pgd": {"steps": 20}}
PROTOCOLS: Mapping[str, Preset] = {
    "standard": Preset(
        "RobustBench, arXiv 2010.09670: PGD-20 and AutoAttack standard, arXiv 2003.01690",
        {
            **_UNIT,
            "attacks": {
                "apgd_ce": {"steps": 100},
                "apgd_t": {"steps": 100, "targets": 9},
                "fab_t": {"steps": 100, "targets": 9},
                "square": {"queries": 5000},
            },
        },
    ),
    "standard_binary": Preset(
        "for two or three classes: `standard` with those attacks of AutoAttack, arXiv 2003.01690, whose losses are defined there",
        {
            **_UNIT,
            "attacks": {"apgd_ce": {"steps": 100}, "fab": {"steps": 100}, "square": {"queries": 5000}},
        },
    ),
    "released": Preset(
        f"the evaluation of {RELEASE}: half the radius, noise (none on SADA-JEM), a weaker ensemble",
        {
            "norm": "Linf",
            "range": "internal",
            "noise": 0.03,
            "noise_on": {"sadajem": 0.0},
            "pgd": {"steps": 20},
            "attacks": {
                "apgd_ce": {"steps": 20},
                "apgd_dlr": {"steps": 20},
                "fab_t": {"steps": 20, "targets": 9, "range": "internal"},
                "square": {"queries": 5000},
            },
        },
    ),
}

EXTRACTORS: Mapping[str, Entry] = {
    "inception": Entry("ebjdat.evaluation.frechet:inception_features", "torch-fidelity, Inception-v3 pool3 (FID)"),
    "reference": Entry("ebjdat.evaluation.frechet:reference_features", "penultimate features of the reference classifier"),
}

# Which samples are measured, against which images. A profile's protocol that is `like` one starts from its values.
SAMPLE_PROTOCOLS: Mapping[str, Preset] = {
    "standard": Preset(
        "Heusel et al. 2017, arXiv 1706.08500: fresh samples, none discarded", {"source": "fresh", "select": 1.0, "against": "train"}
    ),
    "released": Preset(
        f"the evaluation of {RELEASE}: the most confident of the training buffer, against every image there is",
        {"source": "buffer", "select": 0.9, "against": "all"},
    ),
}
