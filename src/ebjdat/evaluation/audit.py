"""The whole robustness evaluation of one network: every protocol, the integrity checks, and a table of verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor, nn

from ebjdat.evaluation import checks, robust, verdicts
from ebjdat.evaluation.verdicts import ProtocolResult
from ebjdat.files import write_atomic
from ebjdat.names import flat_results
from ebjdat.settings import AttackSettings


@dataclass(frozen=True)
class Audit:
    """results: by protocol. checks: what checks.run returns. table: a row per protocol and example (docs/results-format.md)."""

    results: Mapping[str, ProtocolResult]
    checks: Mapping[str, Any]
    table: pa.Table

    @property
    def metrics(self) -> dict[str, Any]:
        """Everything by the flat names of result files."""
        return {**flat_results({name: result.statistics() for name, result in self.results.items()}), **self.checks}


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

    model: images (N, C, H, W) in [0, 1] -> logits (N, K); its own preprocessing inside. It is copied, and not changed.
    x: such images; y: labels (N,) int64, on the model's device. source: a network whose adversarial examples are tried on the
    model. state: folder of finished batches, from which an interrupted evaluation continues. workers: as for robust.evaluate.
    Raises AttackError as robust.check_network does.
    """
    settings = limited(settings, len(x))
    with robust.fp32_eval_copy(model) as network:  # under every protocol, before the first one takes hours
        checked = {name: robust.check_network(network, x, y, name, settings) for name in settings.protocols}
    if source is not None:
        with robust.fp32_eval_copy(source) as network:
            robust.number_of_classes(network, x, y)
    by_protocol = {name: robust.evaluate(model, x, y, name, settings, state, title, workers, checked[name]) for name in settings.protocols}
    results = {name: verdicts.result(protocol, by_protocol[name]) for name, protocol in settings.protocols.items()}
    findings = checks.run(model, x, y, settings, by_protocol, source) if with_checks else {}
    tables = [pa.table(verdicts.columns(name, protocol, by_protocol[name])) for name, protocol in settings.protocols.items()]
    return Audit(results, findings, pa.concat_tables(tables, promote_options="default"))


def limited(settings: AttackSettings, n: int) -> AttackSettings:
    """The settings for n images: no protocol asks for more than there are."""
    protocols = {name: p.model_copy(update={"n": min(p.n, n)}) for name, p in settings.protocols.items()}
    return settings.model_copy(update={"protocols": protocols})


def write_table(table: pa.Table, path: Path, provenance: Mapping[str, Any]) -> None:
    """Parquet, with the verdicts' provenance (settings, data, weights) as JSON in its metadata under "ebjdat"."""
    described = table.replace_schema_metadata({b"ebjdat": json.dumps(provenance, sort_keys=True).encode()})
    write_atomic(path, lambda temporary: pq.write_table(described, temporary))
