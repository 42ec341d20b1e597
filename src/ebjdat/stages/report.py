"""Stage `report`: result files -> summary, tables, the HTML pages; and every final metric on the experiments' MLflow runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ebjdat.errors import printable
from ebjdat.files import write_json
from ebjdat.layout import Layout, place
from ebjdat.report import claims, page, pairs
from ebjdat.report.collect import checks_of, collect, read_card
from ebjdat.report.format import side_by_side, write_audit_markdown, write_markdown
from ebjdat.report.summary import aggregate, headline, write_csv, write_summary
from ebjdat.stages.context import Context
from ebjdat.tracking.journal import Subject

# Files shown with each experiment's run in MLflow.
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
    profile = context.profile
    card = read_card(card_path)
    runs = collect(profile, results, card["data_hash"])
    table = aggregate(profile, runs)
    write_summary(runs, out.summary)
    write_json(out.metrics, headline(runs))
    write_csv(table, out.table_csv)
    write_markdown(table, runs, profile, card, out.table_markdown)
    findings = claims.judge(claims.Evidence(profile, runs, results))
    comparisons = pairs.with_controls(profile, results)
    site = page.Site(profile, context.run, results, card, runs, findings, comparisons)
    page.write(site, table, out.html, context.overrides)
    page.write_audit(site, out.audit_html)
    write_audit_markdown(findings, comparisons, side_by_side(profile, runs), checks_of(runs), out.audit_markdown)
    print(printable(out.table_markdown.read_text(encoding="utf-8"), keep="\n"))
    subject = Subject(context.run, "report", 0, "report", kind="report")
    with context.track(subject, {}, {"data_hash": card["data_hash"]}, out.html) as tracker:
        for result in runs:
            hashes, at = {"params_hash": result.params_hash, "data_hash": result.data_hash}, place(result.experiment, result.seed)
            files, weights = [results / at / file for file in FIGURES], Path(Layout(context.run).checkpoint(at))
            tracker.result(result.experiment, result.seed, hashes, result.metrics, files, weights)
        for path in (out.html, out.audit_html, out.table_csv, out.summary):
            tracker.artifact(path)
