"""Stage `report`: result files -> summary, tables, the HTML pages; and every final metric on the experiments' MLflow runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ebjdat.errors import printable
from ebjdat.files import write_json
from ebjdat.report import claims, page, tables
from ebjdat.stages.context import Context
from ebjdat.tracking.tracker import Subject

# What each experiment's run in MLflow shows.
FIGURES = ("samples.png", "chains.gif", "energy.png", "reliability.png", "finetune_curve.csv")


@dataclass(frozen=True)
class Outputs:
    summary: Path
    metrics: Path
    table_csv: Path
    table_markdown: Path
    html: Path
    audit_html: Path
    audit_markdown: Path


def run(context: Context, results: Path, card_path: Path, out: Outputs) -> None:
    card = tables.read_card(card_path)
    rows = tables.collect(context.profile, results, card["data_hash"])
    tables.write_summary(rows, out.summary)
    write_json(out.metrics, tables.headline(rows))
    table = tables.aggregate(context.profile, rows)
    tables.write_csv(table, out.table_csv)
    tables.write_markdown(table, rows, context.profile, card, out.table_markdown)
    findings = claims.judge(claims.Evidence(context.profile, rows, results))
    page.write(context.profile, context.run, results, card, rows, table, findings, out.html, context.overrides)
    page.write_audit(context.profile, context.run, results, card, rows, findings, out.audit_html)
    tables.write_audit_markdown(findings, tables.side_by_side(context.profile, rows), tables.checks_of(rows), out.audit_markdown)
    print(printable(out.table_markdown.read_text(encoding="utf-8"), keep="\n"))
    subject = Subject(context.run, "report", 0, "report", kind="report")
    with context.track(subject, {}, {"data_hash": card["data_hash"]}, out.html) as tracker:
        for row in rows:
            hashes, place = {"params_hash": row.params_hash, "data_hash": row.data_hash}, f"{row.experiment}/seed{row.seed}"
            files = [results / place / file for file in FIGURES]
            weights = Path("checkpoints") / context.run / f"{place}.safetensors"
            tracker.result(row.experiment, row.seed, hashes, row.metrics, files, weights)
        for path in (out.html, out.audit_html, out.table_csv, out.summary):
            tracker.artifact(path)
