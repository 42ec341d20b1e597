"""The workflow's stages: which function each runs, and which of a profile's settings it reads. No import of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ebjdat import codehash, registry
from ebjdat.registry import Entry
from ebjdat.settings import Profile, flat

# Where settings name a strategy: the end of the key's path, or what is followed by the strategies' own keys.
NAMED_BY: Mapping[str, Mapping[str, Entry]] = {
    "method": registry.METHODS,
    "chain.sampler": registry.SAMPLERS,
    "chain.start": registry.STARTS,
    "adversary.score": registry.SCORES,
    "update.name": registry.UPDATES,
    "optimizer.name": registry.OPTIMIZERS,
    "schedule.name": registry.SCHEDULES,
    "attacks": registry.ATTACKS,
    "data.source": registry.SOURCES,
    "generate.extractor": registry.EXTRACTORS,
    "reliability.ood": registry.OOD_SETS,
}


def named(settings: Mapping[str, Any]) -> Iterator[Entry]:
    """Registry entries that resolved settings name, and what a method draws. A name like "auto" is all of them."""
    for key, value in flat(settings).items():
        for end, entries in NAMED_BY.items():
            _, found, below = f".{key}.".partition(f".{end}.")
            names = [below.split(".")[0]] if below else value if isinstance(value, tuple | list) else [value]
            if found:
                yield from (entries[name] for name in names) if all(name in entries for name in names) else entries.values()
    if settings.get("method") in registry.METHODS:
        yield from (registry.SAMPLES[draw] for draw in registry.METHODS[settings["method"]].samples)


@dataclass(frozen=True)
class Stage:
    """code: its function, and the classes of objects that it is given, "module:name". also: strategies that its code names.

    reads: (profile, experiment or pretraining) -> resolved settings.
    """

    code: tuple[str, ...]
    reads: Callable[[Profile, str], Mapping[str, Any]]
    also: tuple[Entry, ...] = ()

    def strategies(self, profile: Profile, name: str) -> list[Entry]:
        return [*named(self.reads(profile, name)), *self.also]

    def digest(self, profile: Profile, name: str) -> str:
        """Digest of what the stage can execute for this experiment or pretraining."""
        return codehash.digest(self.code, self.strategies(profile, name))


def _training(profile: Profile, name: str) -> dict[str, Any]:
    entry = profile.experiments[name]
    network = profile.model_settings(entry.pretraining).model_dump()
    return {"model": network, "method": entry.method, "training": profile.training_settings(name).model_dump()}


def _pretraining(profile: Profile, name: str) -> dict[str, Any]:
    network = profile.model_settings(name).model_dump()
    return {"model": network, "method": profile.pretraining[name].method, "training": profile.pretraining_settings(name).model_dump()}


def _attack(profile: Profile, name: str) -> dict[str, Any]:
    return {"attack": profile.attack_settings(name).model_dump()}


def _pgd(profile: Profile, name: str) -> dict[str, Any]:
    """Of the attack's settings, those of its PGD."""
    attack = profile.attack_settings(name).model_dump(include={"protocols", "seed", "batch_size"})
    protocols = {k: {key: v for key, v in p.items() if key not in ("n", "attacks")} for k, p in attack["protocols"].items()}
    return {"attack": {**attack, "protocols": protocols}}


def _generate(profile: Profile, name: str) -> dict[str, Any]:
    chain = profile.training_settings(name).chain
    return {"chain": {"sampler": chain.sampler, "start": chain.start}, "generate": profile.evaluation.generate.model_dump()}


CONTEXT = "ebjdat.stages.context:Context"
VALIDATION = (registry.SCORES["ce"],)  # every method is validated under the same attack

STAGES: Mapping[str, Stage] = {
    "prepare": Stage(("ebjdat.stages.prepare:run",), lambda profile, _: {"data": profile.data.model_dump()}),
    "pretrain": Stage(("ebjdat.stages.train:pretrain", CONTEXT), _pretraining, VALIDATION),
    "finetune": Stage(("ebjdat.stages.train:finetune", CONTEXT), _training, VALIDATION),
    "attack": Stage(("ebjdat.stages.attack:run", CONTEXT), _attack),
    "generate": Stage(("ebjdat.stages.evaluate:generate", CONTEXT), _generate),
    "energy": Stage(
        ("ebjdat.stages.evaluate:energy", CONTEXT),
        lambda profile, name: {"energy": profile.evaluation.energy.model_dump(), **_pgd(profile, name)},
    ),
    "reliability": Stage(
        ("ebjdat.stages.reliability:run", CONTEXT),
        lambda profile, name: {"reliability": profile.evaluation.reliability.model_dump(), **_pgd(profile, name)},
    ),
}
