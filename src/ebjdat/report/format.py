"""Cells, headings and tables of text, table.md and audit.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ebjdat.errors import printable
from ebjdat.files import write_text
from ebjdat.metrics import COLUMNS, GROUPS, PANELS, TABLE, VOCABULARY
from ebjdat.names import STANDARD, flat_name
from ebjdat.registry import BASES, METHODS, RELEASE
from ebjdat.report.collect import RunResult, metrics_of
from ebjdat.report.pairs import Comparison
from ebjdat.report.summary import Estimate, estimate
from ebjdat.settings import Profile, ProtocolSettings, flat
from ebjdat.vocabulary import Column, Metric

NOT_MEASURED = "–"
WHAT_WAS_READ = (
    f'"Released" is {RELEASE}. The paper links another address, and a later release may differ. The form `released` runs its default '
    "lines; `released_ce` runs the cross-entropy step that is commented out beside them."
)


def markdown(text: object) -> str:
    """Text that Markdown shows literally: neither markup nor HTML, in one line."""
    return re.sub(r"([\\`*_<>\[\]|&~#$])", r"\\\1", printable(text))


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(printable(cell).replace("|", "\\|").replace("<", "\\<") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def number(value: float | None, form: str, scale: float = 1, spread: float | None = None, n: int | None = None) -> str:
    if value is None:
        return NOT_MEASURED
    text = f"{value * scale:{form}}"
    text += f" ± {spread * scale:{form}}" if spread is not None else ""
    return text + (f" (n = {n})" if n else "")


def cell_parts(record: pd.Series, metric: Metric) -> list[str]:
    """A value, its spread (several seeds: ± sd; one: its interval) and the paper's number, each where there is one."""
    value = record.get(metric.name)
    if value is None or pd.isna(value):
        return [NOT_MEASURED]
    scale = 100 if metric.percent else 1
    form = ".1f" if metric.percent else ".2f" if abs(value) < 100 else ".0f" if abs(value) < 1e5 else ".2g"
    parts = [f"{value * scale:{form}}"]
    sd, low, high, paper = (record.get(f"{metric.name}_{part}") for part in ("sd", "low", "high", "paper"))
    if sd is not None and not pd.isna(sd):
        parts.append(f"± {sd * scale:{form}}")
    elif low is not None and not pd.isna(low):
        parts.append(f"[{low * scale:{form}}, {high * scale:{form}}]")
    if paper is not None and not pd.isna(paper):
        parts.append(f"(paper {paper * scale:{form}})")
    return parts


def cell(record: pd.Series, metric: Metric) -> str:
    return " ".join(cell_parts(record, metric))


def header_parts(metric: Metric, table: pd.DataFrame) -> list[str]:
    """Column title (for the Fréchet distance with its extractor), and n."""
    label = metric.label
    if metric.name == "frechet":
        extractors = sorted(set(table["frechet_extractor"]))
        label = "FID" if extractors == ["inception"] else f"Fréchet ({', '.join(extractors)})"
    n = f"{metric.name}_n"
    if n in table and table[n].notna().any():
        return [label, f"n={'/'.join(map(str, sorted({int(v) for v in table[n].dropna()})))}"]
    return [label]


def header(metric: Metric, table: pd.DataFrame) -> str:
    return ", ".join(header_parts(metric, table))


def collapse_cell(record: pd.Series) -> str:
    """In how many of the seeds training diverged, in which epochs first, and how often it recovered."""
    if not record["collapses"]:
        return NOT_MEASURED
    text = f"{record['collapses']} of {record['seeds']}: epoch {record['collapse_epochs'].replace(' ', ', ')}"
    return f"{text}; {record['recoveries']} healed" if record["recoveries"] else f"{text}; recorded"


def differences(profile: Profile, experiment: str) -> str:
    """What defines an experiment besides its method's source: its base, its form, and its own settings."""
    entry = profile.experiments[experiment]
    method, base = METHODS[entry.method], entry.base
    parts = [f"on {BASES[base].source}"] if base and len(method.bases) > 1 else []
    form = entry.form
    parts += [f"{form} form"] if form else []
    parts += [f"{name} = {value}" for name, value in flat(entry.own).items()]
    return ", ".join(parts)


def protocol_note(profile: Profile, card: Mapping[str, Any]) -> str:
    """What the numbers of the main table mean, in a paragraph."""
    standard, generate = profile.evaluation.attack.standard, profile.evaluation.generate
    spread = "± standard deviation over seeds" if len(profile.seeds) > 1 else "brackets: 95 % intervals (accuracies: Wilson)"
    aa = f"AutoAttack standard on the first {standard.n} of them" if standard.n else "AutoAttack not run"
    aa += " (searched in bf16, verified in fp32)" if profile.evaluation.attack.search == "bf16" else ""
    return (
        f"Data {card['name']} ({card['data_hash']}), test split, {len(profile.seeds)} seed(s), {spread}. "
        f"Protocol standard: {standard.norm} eps = {standard.eps:.4g} in [0, 1] pixels, no noise, eval mode; PGD-20 with step "
        f"{standard.pgd.step_size:.4g} on all test examples, {aa}. Fréchet distance of {generate.n} fresh chains, none discarded, to the "
        "training split; it is called FID only with Inception's features, and is biased in n. Gaps: mean |E(x) - E(adversarial)| over "
        "pairs; |mean E(x) - mean E(generated)|."
    )


def write_markdown(table: pd.DataFrame, runs: Sequence[RunResult], profile: Profile, card: dict[str, Any], path: Path) -> None:
    """table.md: the main table, what its numbers mean, and averaged weights."""
    rows = [["experiment", *(header(m, table) for m in TABLE), "diverged"]]
    rows += [[record["experiment"], *(cell(record, m) for m in TABLE), collapse_cell(record)] for _, record in table.iterrows()]
    note = protocol_note(profile, {**card, "name": markdown(card["name"]), "data_hash": markdown(card["data_hash"])})
    text = [*markdown_table(rows), "", note, ""]
    averaged = averaged_weights(runs)
    if averaged:
        text += ["Averaged weights (EMA) beside the raw ones:", "", *markdown_table(averaged), ""]
    write_text(path, "\n".join(text))


def averaged_weights(runs: Sequence[RunResult]) -> list[list[str]]:
    """Heading and a row per run whose training kept averaged weights: raw -> averaged."""
    rows = []
    for run in runs:
        if flat_name("acc", "clean", averaged=True) in run.metrics:
            cells = []
            for metric in PANELS:
                raw, averaged = run.metrics.get(metric.name), run.metrics.get(flat_name(metric.name, averaged=True))
                form, scale = _number_format(metric)
                cells.append(NOT_MEASURED if raw is None or averaged is None else f"{raw * scale:{form}} → {averaged * scale:{form}}")
            rows.append([run.experiment, str(run.seed), *cells])
    return [["experiment", "seed", *(metric.label for metric in PANELS)], *rows] if rows else []


def _number_format(metric: Metric) -> tuple[str, float]:
    """Format and scale of a number: fractions in percent."""
    return (".1f", 100) if metric.percent else (".2f", 1)


def seed_table(table: str, corner: str, details: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """Heading, then a line per experiment: the columns of the metrics that name this table, of one seed.

    corner: heading of the experiments. details: experiment -> metrics; the first decides for which places there are columns.
    """
    columns: dict[str, list[tuple[Metric, Column, str]]] = {}
    for title, metric, column, name in _named_columns(table, next(iter(details.values()))):
        columns.setdefault(title, []).append((metric, column, name))
    lines = [[corner, *columns]]
    for experiment, values in details.items():
        cells = (next(filter(None, (_seed_cell(*option, values) for option in options)), NOT_MEASURED) for options in columns.values())
        lines.append([experiment, *cells])
    return lines


def measured(table: list[list[str]]) -> list[list[str]]:
    """A table of `seed_table` without the columns of what nobody measured; nothing where none is left."""
    heads, *lines = table
    kept = [i for i in range(len(heads)) if i == 0 or any(line[i] != NOT_MEASURED for line in lines)]
    return [[line[i] for i in kept] for line in table] if len(kept) > 1 else []


def _named_columns(table: str, measured: Mapping[str, Any]) -> Iterator[tuple[str, Metric, Column, str]]:
    """(title, metric, column, name) of each column; a name with a `<place>` once for each that was measured."""
    for metric, column in COLUMNS:
        if column.table == table:
            name = column.name or metric.plain
            pattern = VOCABULARY.pattern(name)
            matches = [
                match for other in measured if "<" in name and (match := pattern.fullmatch(other)) and VOCABULARY.find(other) == metric
            ]
            yield from ((column.title.format(**match.groupdict()), metric, column, match[0]) for match in matches)
            if "<" not in name:
                yield column.title, metric, column, name


def _seed_cell(metric: Metric, column: Column, name: str, values: Mapping[str, Any]) -> str | None:
    """The cell's text; None where it was not measured."""
    form, scale = _number_format(metric)
    form, scale = column.form or form, column.scale or scale
    if values.get(name) is None:
        return None
    if not column.interval:
        return number(values[name], form, scale, values.get(column.spread), values.get(column.n))
    stem = name.removesuffix("_acc")  # attack's results are <attack>_acc, <attack>_low, <attack>_high
    value, low, high = values[name], values.get(f"{stem}_low"), values.get(f"{stem}_high")
    return None if low is None or high is None else f"{scale * value:{form}} [{scale * low:{form}}, {scale * high:{form}}]"


def effective_radius(profile: Profile, name: str) -> str:
    """A protocol's ball as its column's heading states it: norm and radius in [0, 1] pixels."""
    protocol = profile.evaluation.attack.protocols[name]
    whole = protocol.radius * 255
    size = f"{whole:.0f}/255" if protocol.norm == "Linf" and abs(whole - round(whole)) < 1e-6 else f"{protocol.radius:.4g}"
    return f"{'L∞' if protocol.norm == 'Linf' else 'L2'} {size}"


def side_by_side(profile: Profile, runs: Sequence[RunResult]) -> list[list[str]]:
    """Heading and a row per experiment: PGD and ensemble under every protocol, and the difference from the standard one, in points.

    Where a protocol has adaptive attacks: the accuracy after each, and what it alone broke, over all seeds.
    """
    protocols = profile.evaluation.attack.protocols
    same_norm = {name for name, p in protocols.items() if name != STANDARD and p.norm == protocols[STANDARD].norm}
    shown = [("PGD", name, p) for name, p in protocols.items()]
    shown += [("ensemble", name, p) for name, p in protocols.items() if p.attacks and p.n]
    heads = ["experiment"]
    for kind, name, protocol in shown:
        heads.append(_protocol_heading(profile, kind, name, protocol))
        heads += [f"{name} − standard, {kind}"] if name in same_norm else []
    adaptive = [(name, attack, p) for name, p in protocols.items() if p.n for attack in p.adaptive_attacks]
    for name, attack, protocol in adaptive:
        heads += [f"{name}: ensemble, then {attack} %, n={protocol.n}", f"{name}: broken by {attack} alone"]
    lines = [heads]
    for experiment in profile.experiments:
        line, standard = [experiment], dict[str, Estimate | None]()
        for kind, name, protocol in shown:
            attack = f"pgd{protocol.pgd.steps}" if kind == "PGD" else "autoattack"
            own = estimate(metrics_of(runs, experiment), f"{attack}_acc", name)
            if name == STANDARD:
                standard[kind] = own
            line.append(own.percent() if own else NOT_MEASURED)
            if name in same_norm:
                reference = standard.get(kind)
                line.append(f"{100 * (own.value - reference.value):+.1f}" if own and reference else NOT_MEASURED)
        for name, attack, _ in adaptive:
            seeds = metrics_of(runs, experiment)
            after = estimate(seeds, f"{attack}_acc", name)
            line += [after.percent(), _broken_alone(seeds, name, attack)] if after else [NOT_MEASURED] * 2
        lines.append(line)
    return lines


def head_and_tail(profile: Profile, runs: Sequence[RunResult]) -> list[list[str]]:
    """Heading and a row per experiment: accuracy on frequent and on rare classes under every protocol; [] where it was not measured."""
    columns = [
        (f"{name}: {title} %, {group}", f"{attack}_{group}_acc", name)
        for name, protocol in profile.evaluation.attack.protocols.items()
        for title, attack in (("clean", "clean"), (f"PGD-{protocol.pgd.steps}", f"pgd{protocol.pgd.steps}"), ("ensemble", "autoattack"))
        for group in GROUPS
    ]
    found = {
        experiment: [estimate(metrics_of(runs, experiment), metric, protocol) for _, metric, protocol in columns]
        for experiment in profile.experiments
    }
    shown = [i for i in range(len(columns)) if any(row[i] for row in found.values())]
    rows = [[name, *((own.percent() if (own := row[i]) else NOT_MEASURED) for i in shown)] for name, row in found.items()]
    return [["experiment", *(columns[i][0] for i in shown)], *rows] if shown else []


def _broken_alone(seeds: Sequence[Mapping[str, Any]], protocol: str, attack: str) -> str:
    """How many images of all seeds an adaptive attack broke and the ensemble did not, of how many."""
    alone = [seed[flat_name("alone", attack, protocol)] for seed in seeds]
    return f"{sum(alone)} of {sum(seed[flat_name('n_attack', protocol=protocol)] for seed in seeds)}"


def _protocol_heading(profile: Profile, kind: str, name: str, protocol: ProtocolSettings) -> str:
    label = f"PGD-{protocol.pgd.steps}" if kind == "PGD" else "AutoAttack standard" if name == STANDARD else "ensemble"
    n = f", n={protocol.n}" if kind == "ensemble" else ""
    return f"{name}: {label} %, radius {effective_radius(profile, name)}{n}"


def write_audit_markdown(
    findings: Sequence[Any], comparisons: Sequence[Comparison], side: Sequence[Sequence[str]], checks: Sequence[dict[str, Any]], path: Path
) -> None:
    """audit.md: claims, methods beside their controls, robustness under every protocol, and the checks that failed.

    findings: of report.claims.judge. comparisons: of report.pairs.with_controls.
    """
    rows = [[f.claim, f"**{f.verdict}**", f.paper, f.measured, f.protocol, f.why] for f in findings]
    text = ["# Which claims hold?", "", *markdown_table([["claim", "verdict", "the paper", "measured here", "protocol", "why"], *rows]), ""]
    text += [WHAT_WAS_READ, ""]
    if comparisons:
        beside = [[c.a, c.b, c.title, c.points, f"{c.p:.2g}", str(c.n), str(c.seeds), f"**{c.outcome}**"] for c in comparisons]
        heading = ["experiment", "control", "accuracy", "difference, points", "p", "n", "seeds", "outcome"]
        text += ["# Methods and their controls", "", *markdown_table([heading, *beside]), ""]
    text += ["# Robustness under every protocol", "", *markdown_table(side), "", "# Integrity checks that failed", ""]
    failed = [check for check in checks if check["passed"] is False]
    text += [
        f"- {c['experiment']}, seed {c['seed']}: {markdown(c['name'])}{' [' + c['protocol'] + ']' if c['protocol'] else ''}: "
        f"{number(c['value'], '.3g')}, limit {number(c['limit'], '.3g')} ({markdown(c['says'])})"
        for c in failed
    ] or [f"None of {len(checks)}."]
    write_text(path, "\n".join(text) + "\n")
