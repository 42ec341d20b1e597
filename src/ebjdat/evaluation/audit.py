"""The whole robustness evaluation of one network: every protocol, the integrity checks, and a table of verdicts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor, nn

from ebjdat.evaluation import checks, robust
from ebjdat.files import write_atomic
from ebjdat.settings import AttackSettings


@dataclass(frozen=True)
class Audit:
    """metrics: what robust.summary and checks.run say, flat. table: a row per protocol and example (see docs/results-format.md)."""

    metrics: dict[str, Any]
    table: pa.Table


def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    settings: AttackSettings,
    source: nn.Module | None = None,
    state: Path | None = None,
    title: str = "attack",
    with_checks: bool = True,
    workers: int = 1,
) -> Audit:
    """Evaluate any network under every protocol of the settings, and check the evaluation.

    model: images (N, C, H, W) in [0, 1] -> logits (N, K); its own preprocessing inside. It is copied, and left as it is.
    x: such images; y: labels (N,) int64, on the model's device. source: a network whose adversarial examples are tried on the
    model. state: folder of finished batches, from which an interrupted evaluation goes on. workers: as for robust.evaluate.
    Raises AttackError as robust.fit does.
    """
    settings = limited(settings, len(x))
    with robust.fp32_eval_copy(model) as judge:  # under every protocol, before the first one takes hours
        fitted = {name: robust.fit(judge, x, y, name, settings) for name in settings.protocols}
    if source is not None:
        with robust.fp32_eval_copy(source) as judge:
            robust.classes_of(judge, x, y)
    verdicts = {name: robust.evaluate(model, x, y, name, settings, state, title, workers, fitted[name]) for name in settings.protocols}
    metrics: dict[str, Any] = {}
    for name, protocol in settings.protocols.items():
        metrics |= robust.summary(name, protocol, verdicts[name])
    if with_checks:
        metrics |= checks.run(model, x, y, settings, verdicts, source)
    tables = [pa.table(robust.columns(name, protocol, verdicts[name])) for name, protocol in settings.protocols.items()]
    return Audit(metrics, pa.concat_tables(tables, promote_options="default"))


def limited(settings: AttackSettings, n: int) -> AttackSettings:
    """The settings for n images: no protocol asks for more than there are."""
    protocols = {name: p.model_copy(update={"n": min(p.n, n)}) for name, p in settings.protocols.items()}
    return settings.model_copy(update={"protocols": protocols})


def write_table(table: pa.Table, path: Path, about: dict[str, Any]) -> None:
    """Parquet, with what the verdicts are about (settings, data, weights) as JSON in its metadata under "ebjdat"."""
    described = table.replace_schema_metadata({b"ebjdat": json.dumps(about, sort_keys=True).encode()})
    write_atomic(path, lambda temporary: pq.write_table(described, temporary))
