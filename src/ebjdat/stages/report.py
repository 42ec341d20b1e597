"""Stage `report`: result files -> summary, tables, one HTML page; and every final metric on the experiments' MLflow runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ebjdat.files import read_json
from ebjdat.report import page, tables
from ebjdat.stages.context import Context
from ebjdat.tracking.runs import Subject


@dataclass(frozen=True)
class Outputs:
    summary: Path
    table_csv: Path
    table_markdown: Path
    html: Path


def run(context: Context, results: Path, card_path: Path, out: Outputs) -> None:
    card = read_json(card_path)
    rows = tables.collect(context.profile, results, card["data_hash"])
    tables.write_summary(rows, out.summary)
    table = tables.aggregate(context.profile, rows)
    tables.write_csv(table, out.table_csv)
    tables.write_markdown(table, rows, context.profile, card, out.table_markdown)
    page.write(context.profile, context.run, results, card, rows, table, out.html)
    print(out.table_markdown.read_text(encoding="utf-8"))
    for row in rows:
        with context.track_result(row.experiment, row.seed, None, card["data_hash"]) as tracker:
            tracker.final(row.metrics)
    with context.track(Subject(context.run, "report", 0, "report", kind="report"), {}, {"data_hash": card["data_hash"]}) as tracker:
        for path in (out.html, out.table_csv, out.summary):
            tracker.artifact(path)
