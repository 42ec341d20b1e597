"""Result files -> one row per experiment and seed (summary.csv), one row per experiment (table), with intervals."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, Field, ValidationError

from ebjdat.errors import brief, printable
from ebjdat.files import FILES, FileError, read_result, reading, write_text
from ebjdat.intervals import mcnemar, normal, over_seeds, wilson
from ebjdat.metrics import Quantity, describe, find
from ebjdat.registry import BASES, METHODS, RELEASE
from ebjdat.settings import STANDARD, Profile, base_of, flat, form_of, form_values, prefix_of

# The contract with other programs: columns of summary.csv, in this order. Listed in docs/results-format.md, explained in docs/metrics.md.
SUMMARY_COLUMNS = (
    "experiment",
    "method",
    "seed",
    "n_test",
    "clean_acc",
    "pgd20_acc",
    "n_attack",
    "autoattack_acc",
    "frechet",
    "frechet_extractor",
    "n_samples",
    "energy_gap_adversarial",
    "energy_gap_generated",
    "train_seconds",
    "params_hash",
    "data_hash",
    "git_commit",
    "collapse_epoch",
    "recoveries",
    "released_pgd20_acc",
    "released_autoattack_acc",
    "checks_failed",
    "ece",
)
STAGES = ("finetune", "attack", "generate", "energy", "reliability")

# What tables and pages cannot do without, by the stage whose file holds it.
NEEDED: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("pretrain_seconds",),
    "finetune": ("finetune_seconds", "selected_epoch", "epochs", "git_commit"),
    "attack": ("n_test", "clean_acc", "pgd20_acc", "n_attack", "checks_failed", "checks", "sweep", "git_commit"),
    "generate": (
        "frechet",
        "frechet_start",
        "frechet_buffer",
        "frechet_extractor",
        "n_samples",
        "n_buffer",
        "class_agreement",
        "git_commit",
    ),
    "energy": (
        *(f"energy_{which}" for which in ("clean", "adversarial", "generated")),
        *(f"energy_{measure}_{which}" for measure in ("gap", "overlap", "wasserstein") for which in ("adversarial", "generated")),
        *("energy_gap_adversarial_se", "energy_gap_generated_se", "n_energy_clean", "n_energy_generated", "git_commit"),
    ),
    "reliability": ("ece", "ece_scaled", "temperature", "nll", "ood_missing", "git_commit"),
}
# and of these a value, not null
NOT_NULL = (
    "checks",
    "sweep",
    "ood_missing",
    "git_commit",
    "frechet_extractor",
    "pretrain_seconds",
    "finetune_seconds",
    "selected_epoch",
    "epochs",
    "n_test",
    "n_attack",
    "n_samples",
    "n_energy_clean",
    "n_energy_generated",
)
MANY = 10_000  # names in a result file; ours have hundreds
MOST_VERDICTS = 20_000_000  # rows of a verdicts.parquet: of 50,000 images, 400 protocols


class CheckRow(BaseModel, strict=True):
    """An integrity check, as attack.json says it."""

    name: str
    protocol: str | None
    passed: bool | None
    value: float | None
    limit: float | None
    says: str


class Nested(BaseModel, strict=True):
    """What result files hold that is neither a number nor a text."""

    checks: list[CheckRow] | None = None
    sweep: Annotated[list[Annotated[list[float], Field(min_length=2, max_length=2)]], Field(min_length=1)] | None = None
    events: list[str] | None = None
    ood_missing: dict[str, str] | None = None


@dataclass(frozen=True)
class Row:
    """One experiment and seed. metrics: everything its stages measured, by name."""

    experiment: str
    method: str
    seed: int
    params_hash: str
    data_hash: str
    git_commit: str
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A column of the table: where its n and its interval come from; what it means is the vocabulary's to say.

    correct: the count it is a fraction of `n` from; se: its standard error; paper: its name among the paper's numbers.
    """

    name: str
    n: str = ""
    correct: str | None = None
    se: str | None = None
    paper: str | None = None

    @property
    def quantity(self) -> Quantity:
        return describe(self.name)

    @property
    def label(self) -> str:
        return self.quantity.label

    @property
    def percent(self) -> bool:
        return self.quantity.percent

    @property
    def better(self) -> str:
        return self.quantity.better


METRICS = (  # metrics.TABLE, in its order
    Metric("clean_acc", "n_test", "clean_correct", paper="clean"),
    Metric("pgd20_acc", "n_test", "pgd20_correct", paper="pgd20"),
    Metric("autoattack_acc", "n_attack", "autoattack_correct", paper="autoattack"),
    Metric("frechet", "n_samples", paper="fid"),
    Metric("energy_gap_adversarial", "n_energy_clean", se="energy_gap_adversarial_se"),
    Metric("energy_gap_generated", "n_energy_generated", se="energy_gap_generated_se"),
    Metric("train_seconds"),
)


def collect(profile: Profile, results: Path, data_hash: str) -> list[Row]:
    """Rows of all experiments and seeds, from `results/<experiment>/seed<k>/<stage>.json`.

    train_seconds is the experiment's fine-tuning plus its (shared) pretraining.
    """
    rows = []
    for name, experiment in profile.experiments.items():
        for seed in profile.seeds:
            folder = results / name / f"seed{seed}"
            protocols = profile.evaluation.attack.protocols.keys() | profile.evaluation.generate.protocols.keys()
            parts = {stage: stage_result(folder / f"{stage}.json", stage, protocols) for stage in STAGES}
            before = stage_result(results / "pretraining" / experiment.pretraining / f"seed{seed}" / "pretrain.json", "pretrain", protocols)
            metrics: dict[str, Any] = {"collapse_epoch": None}
            for part in parts.values():
                metrics |= {k: v for k, v in part.items() if k not in ("method", "data_hash", "git_commit", FILES)}
            metrics["pretrain_seconds"] = before["pretrain_seconds"]
            metrics["train_seconds"] = round(metrics["finetune_seconds"] + metrics["pretrain_seconds"], 3)
            events = [f"pretraining {experiment.pretraining}, {event}" for event in before.get("events") or []]
            metrics["events"] = events + (metrics.get("events") or [])
            commit = parts["finetune"]["git_commit"]
            rows.append(Row(name, experiment.method, seed, profile.params_hash(name, seed), data_hash, commit, metrics))
    return rows


class Card(BaseModel, strict=True):
    """What tables and pages read of the data card."""

    name: str
    data_hash: str
    image_shape: list[int]
    classes: Annotated[list[str], Field(min_length=1)]
    sizes: dict[str, int]


def read_card(path: Path) -> dict[str, Any]:
    """The data card. Raises FileError."""
    found = read_result(path)
    with reading(path):
        _valid(Card, found)
    return found


def _valid(model: type[BaseModel], found: Mapping[str, Any]) -> None:
    try:
        model.model_validate(found)
    except ValidationError as error:
        one = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, one['loc']))}: {one['msg']}") from None


def stage_result(path: Path, stage: str, protocols: Collection[str]) -> dict[str, Any]:
    """A stage's result file. Raises FileError where it is damaged, lacks what is needed, or a value is not what its name says."""
    found = read_result(path)
    with reading(path):
        if len(found) > MANY:
            raise ValueError(f"{len(found):,} names")
        if not found.get(FILES):
            raise ValueError(f"without {FILES}, so of an earlier version")
        missing = [name for name in NEEDED[stage] if name not in found or (found[name] is None and name in NOT_NULL)]
        if missing:
            raise ValueError(f"without {', '.join(missing)}")
        for name, value in found.items():
            quantity = find(name, protocols)
            if quantity is not None and value is not None and not _is_a(value, quantity.kind):
                raise ValueError(f"{name} is {brief(repr(value), 60)}, where its unit is {quantity.unit}")
        _valid(Nested, found)
    return found


def _is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def read_curve(path: Path) -> pd.DataFrame:
    """A training's curve: numbers, a row per epoch. Raises FileError."""
    with reading(path):
        frame = pd.read_csv(path)
        wrong = [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])]
        if wrong:
            raise ValueError(f"{', '.join(map(str, wrong))} should be numbers")
        if "epoch" not in frame:
            raise ValueError("without epoch")
        return frame


def markdown(text: object) -> str:
    """Text that Markdown shows as it stands: neither markup nor HTML, in one line."""
    return re.sub(r"([\\`*_<>\[\]|&~#$])", r"\\\1", printable(text))


def spreadsheet(frame: pd.DataFrame, **options: Any) -> str:
    """A table as CSV. Text that a spreadsheet would compute (= + - @ begin it) has an apostrophe before it; numbers stay."""

    def safe(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return f"'{printable(value)}" if value.lstrip().startswith(tuple("=+-@＝＋－＠")) else printable(value)

    return frame.map(safe).to_csv(index=False, **options)


def write_summary(rows: Sequence[Row], path: Path) -> None:
    """summary.csv: accuracies as fractions; a value that was not measured is empty."""
    frame = pd.DataFrame([{**row.metrics, **vars(row)} for row in rows]).reindex(columns=list(SUMMARY_COLUMNS))
    write_text(path, spreadsheet(frame))


# What DVC shows and compares (`dvc metrics show`): names of summary.csv.
HEADLINE = (
    "clean_acc",
    "pgd20_acc",
    "autoattack_acc",
    "released_pgd20_acc",
    "released_autoattack_acc",
    "frechet",
    "energy_gap_adversarial",
    "energy_gap_generated",
    "ece",
    "checks_failed",
    "recoveries",
    "train_seconds",
)


def headline(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Experiment -> headline metric -> mean over seeds, to six digits; without what was not measured for every seed."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row.experiment for row in rows):
        mine = [row.metrics for row in rows if row.experiment == name]
        measured = [metric for metric in HEADLINE if all(m.get(metric) is not None for m in mine)]
        found[name] = {metric: float(f"{np.mean([m[metric] for m in mine]):.6g}") for metric in measured}
    return found


def interval_of(metric: Metric, metrics: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """95 % interval: over seeds when there are several; else Wilson over examples, or normal from a standard error."""
    values = [m[metric.name] for m in metrics]
    if len(values) > 1:
        return over_seeds(values)
    if metric.correct and metrics[0].get(metric.correct) is not None:
        return wilson(metrics[0][metric.correct], metrics[0][metric.n])
    if metric.se and metrics[0].get(metric.se) is not None:
        low, high = normal(values[0], metrics[0][metric.se])
        return max(0.0, low), high  # a gap is not negative
    return None


def aggregate(profile: Profile, rows: Sequence[Row]) -> pd.DataFrame:
    """One row per experiment: mean over seeds, 95 % interval, standard deviation over seeds, n, and the paper's number."""
    is_fid = {row.metrics["frechet_extractor"] for row in rows} == {"inception"}  # else the paper's FID is another quantity
    records = []
    for name, experiment in profile.experiments.items():
        mine = [row.metrics for row in rows if row.experiment == name]
        record: dict[str, Any] = {"experiment": name, "method": experiment.method, "seeds": len(mine)}
        paper = paper_numbers(profile, name)
        for metric in METRICS:
            values = [m[metric.name] for m in mine if m.get(metric.name) is not None]
            if len(values) < len(mine):
                continue
            record[metric.name] = float(np.mean(values))
            interval = interval_of(metric, mine)
            if interval:
                record[f"{metric.name}_low"], record[f"{metric.name}_high"] = interval
            if len(mine) > 1:
                record[f"{metric.name}_sd"] = float(np.std(values, ddof=1))
            if metric.n:
                record[f"{metric.name}_n"] = int(mine[0][metric.n])
            theirs = paper.get(metric.paper or "")
            if theirs is not None and (metric.name != "frechet" or is_fid):
                record[f"{metric.name}_paper"] = theirs / 100 if metric.percent else theirs
        record["frechet_extractor"] = mine[0]["frechet_extractor"]
        collapses = [m["collapse_epoch"] for m in mine if m.get("collapse_epoch") is not None]
        record["collapses"] = len(collapses)
        record["collapse_epochs"] = " ".join(str(epoch) for epoch in collapses)
        record["recoveries"] = sum(m.get("recoveries") or 0 for m in mine)
        records.append(record)
    return pd.DataFrame(records)


def collapse_cell(record: pd.Series) -> str:
    """In how many of the seeds training diverged, in which epochs first, and how often it was brought back."""
    if not record["collapses"]:
        return "–"
    text = f"{record['collapses']} of {record['seeds']}: epoch {record['collapse_epochs'].replace(' ', ', ')}"
    return f"{text}; {record['recoveries']} healed" if record["recoveries"] else f"{text}; recorded"


def differences(profile: Profile, experiment: str) -> str:
    """What an experiment is, beside its method's source: its base, its form, and its own settings."""
    entry = profile.experiments[experiment]
    method, row = METHODS[entry.method], base_of(entry.method, entry.base)
    parts = [f"on {BASES[row].source}"] if row and len(method.bases) > 1 else []
    form = form_of(entry.method, entry.form)
    parts += [f"{form} form"] if form else []
    parts += [f"{name} = {value}" for name, value in flat(entry.own).items()]
    return ", ".join(parts)


def paper_numbers(profile: Profile, experiment: str) -> dict[str, float]:
    """The paper's numbers for an experiment, when the profile's data set is the paper's; nothing where it reports none.

    EB-JDAT's are by base, and for its ablation by (w1, w2, w3). Its main numbers stand beside every form, since the paper
    defines one, its code computes another, and nothing says which lines made them; not beside variants that none has.
    """
    if profile.report.paper is None:
        return {}
    everything = yaml.safe_load(resources.files("ebjdat.report").joinpath("paper.yaml").read_text(encoding="utf-8"))
    entry, settings = profile.experiments[experiment], profile.training_settings(experiment)
    rows: dict[str, dict[str, float]] = {row["method"]: row for row in everything[profile.report.paper]["rows"]}
    name = form_of(entry.method, entry.form)
    if name is None:
        return rows.get(entry.method, {})
    base = base_of(entry.method, entry.base)
    form = form_values(name, base)
    if settings.adversary.score != form["adversary"]["score"]:
        return {}
    weights = [settings.weights.w1, settings.weights.w2, settings.weights.w3]
    if weights == [form.get("weights", {}).get(name, 1.0) for name in ("w1", "w2", "w3")]:
        return rows.get(f"{entry.method}_{base}", {})
    ablation = everything[profile.report.paper].get(f"ablation_{base}", [])
    return next((row for row in ablation if row["w"] == weights), {})


def cell_parts(record: pd.Series, metric: Metric) -> list[str]:
    """A value, its spread (several seeds: +- sd; one: its interval) and the paper's number, each where there is one."""
    value = record.get(metric.name)
    if value is None or pd.isna(value):
        return ["–"]
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
        names = sorted(set(table["frechet_extractor"]))
        label = "FID" if names == ["inception"] else f"Fréchet ({', '.join(names)})"
    n = f"{metric.name}_n"
    if n in table and table[n].notna().any():
        return [label, f"n={'/'.join(map(str, sorted({int(v) for v in table[n].dropna()})))}"]
    return [label]


def header(metric: Metric, table: pd.DataFrame) -> str:
    return ", ".join(header_parts(metric, table))


def write_csv(table: pd.DataFrame, path: Path) -> None:
    write_text(path, spreadsheet(table, float_format="%.6g"))


def write_markdown(table: pd.DataFrame, rows: Sequence[Row], profile: Profile, card: dict[str, Any], path: Path) -> None:
    heads = ["experiment", *(header(m, table) for m in METRICS), "diverged"]
    lines = markdown_table(
        [heads, *([record["experiment"], *(cell(record, m) for m in METRICS), collapse_cell(record)] for _, record in table.iterrows())]
    )
    text = [*lines, "", protocol(profile, {**card, "name": markdown(card["name"]), "data_hash": markdown(card["data_hash"])}), ""]
    averaged = averaged_weights(rows)
    if averaged:
        text += ["Averaged weights (EMA) beside the raw ones:", "", *markdown_table(averaged), ""]
    write_text(path, "\n".join(text))


def averaged_weights(rows: Sequence[Row]) -> list[list[str]]:
    """Header and a row per run whose training kept averaged weights: raw -> averaged."""
    names = ("clean_acc", "pgd20_acc", "autoattack_acc", "frechet")
    found = []
    for row in rows:
        if "ema_clean_acc" in row.metrics:
            cells = []
            for name in names:
                raw, averaged = row.metrics.get(name), row.metrics.get(f"ema_{name}")
                scale, digits = (1, 2) if name == "frechet" else (100, 1)
                cells.append("–" if raw is None or averaged is None else f"{raw * scale:.{digits}f} → {averaged * scale:.{digits}f}")
            found.append([row.experiment, str(row.seed), *cells])
    return [["experiment", "seed", *(describe(name).label for name in names)], *found] if found else []


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(printable(cell).replace("|", "\\|").replace("<", "\\<") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def protocol(profile: Profile, card: dict[str, Any]) -> str:
    """What the numbers of the table mean, in a paragraph."""
    standard, generate = profile.evaluation.attack.standard, profile.evaluation.generate
    spread = "± standard deviation over seeds" if len(profile.seeds) > 1 else "brackets: 95 % intervals (accuracies: Wilson)"
    aa = f"AutoAttack standard on the first {standard.n} of them" if standard.n else "AutoAttack not run"
    aa += " (searched in bf16, judged in fp32)" if profile.evaluation.attack.search == "bf16" else ""
    return (
        f"Data {card['name']} ({card['data_hash']}), test split, {len(profile.seeds)} seed(s), {spread}. "
        f"Protocol standard: {standard.norm} eps = {standard.eps:.4g} in [0, 1] pixels, no noise, eval mode; PGD-20 with step "
        f"{standard.pgd.step_size:.4g} on all test examples, {aa}. Fréchet distance of {generate.n} fresh chains, none discarded, to the "
        "training split; it is called FID only with Inception's features, and is biased in n. Gaps: mean |E(x) - E(adversarial)| over "
        "pairs; |mean E(x) - mean E(generated)|."
    )


@dataclass(frozen=True)
class Measured:
    """A mean over seeds with its 95 % interval (over seeds, or of one seed's count) and what it was measured on."""

    value: float
    low: float
    high: float
    n: int

    def percent(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def accuracy(rows: Sequence[Row], experiment: str, name: str, n: str) -> Measured | None:
    """An accuracy of an experiment: `name` as in "released_pgd20" (its `_acc` and `_correct`), n the count's name; None if not measured."""
    mine = [row.metrics for row in rows if row.experiment == experiment and row.metrics.get(f"{name}_acc") is not None]
    if not mine:
        return None
    values, size = [m[f"{name}_acc"] for m in mine], int(mine[0][n])
    low, high = over_seeds(values) if len(values) > 1 else wilson(mine[0][f"{name}_correct"], size)
    return Measured(float(np.mean(values)), low, high, size)


def effective_radius(profile: Profile, name: str) -> str:
    """A protocol's ball, as its column is headed: norm and radius in [0, 1] pixels."""
    protocol = profile.evaluation.attack.protocols[name]
    whole = protocol.radius * 255
    size = f"{whole:.0f}/255" if protocol.norm == "Linf" and abs(whole - round(whole)) < 1e-6 else f"{protocol.radius:.4g}"
    return f"{'L∞' if protocol.norm == 'Linf' else 'L2'} {size}"


def side_by_side(profile: Profile, rows: Sequence[Row]) -> list[list[str]]:
    """Header and a row per experiment: PGD and ensemble under every protocol, and what each differs from the standard one, in points."""
    protocols = profile.evaluation.attack.protocols
    heads, lines = ["experiment"], []
    for kind in ("PGD", "ensemble"):
        for name, protocol in protocols.items():
            count = len(protocol.attacks) and protocol.n
            label = f"PGD-{protocol.pgd.steps}" if kind == "PGD" else "AutoAttack standard" if name == STANDARD else "ensemble"
            if kind == "ensemble" and not count:
                continue
            heads.append(f"{name}: {label} %, radius {effective_radius(profile, name)}" + (f", n={count}" if kind == "ensemble" else ""))
            if name != STANDARD and protocol.norm == protocols[STANDARD].norm:
                heads.append(f"{name} − standard, {kind}")
    for experiment in profile.experiments:
        line = [experiment]
        for kind in ("PGD", "ensemble"):
            standard = None
            for name, protocol in protocols.items():
                if kind == "ensemble" and not (len(protocol.attacks) and protocol.n):
                    continue
                prefix = prefix_of(name)
                metric = f"{prefix}pgd{protocol.pgd.steps}" if kind == "PGD" else f"{prefix}autoattack"
                found = accuracy(rows, experiment, metric, f"{prefix}{'n_test' if kind == 'PGD' else 'n_attack'}")
                standard = found if name == STANDARD else standard
                line.append(found.percent() if found else "–")
                if name != STANDARD and protocol.norm == protocols[STANDARD].norm:
                    line.append(f"{100 * (found.value - standard.value):+.1f}" if found and standard else "–")
        lines.append(line)
    return [heads, *lines]


def checks_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every integrity check of every experiment and seed, with `experiment` and `seed`."""
    return [{"experiment": row.experiment, "seed": row.seed, **check} for row in rows for check in row.metrics.get("checks", [])]


def stands_of(results: Path, experiment: str, seed: int, column: str) -> list[bool]:
    """Which test examples the raw weights get right under the standard protocol, in their order.

    column: of verdicts.parquet, "clean", "pgd20" or "autoattack". What was wrong already was not attacked, so it is null under
    pgd20 and counts as wrong; under autoattack null is beyond the first n, and is left out.
    """
    path = results / experiment / f"seed{seed}" / "verdicts.parquet"
    with reading(path, largest=None):
        rows = pq.ParquetFile(path).metadata.num_rows  # a few bytes can stand for any number of equal rows
        if rows > MOST_VERDICTS:
            raise ValueError(f"{rows:,} rows")
        frame = pd.read_parquet(path, columns=["weights", "protocol", "index", column])
        values = frame[(frame["weights"] == "raw") & (frame["protocol"] == STANDARD)].sort_values("index")[column]
        values = values.fillna(value=False) if column == "pgd20" else values.dropna()
        if not len(values) or not values.isin([True, False]).all():
            raise ValueError(f"no verdicts of {STANDARD!r} in {column}")
        return [bool(value) for value in values]


def stands_together(results: Path, experiments: Iterable[str], seed: int, column: str) -> dict[str, list[bool]]:
    """stands_of for each of these. Raises FileError where they are not of equally many examples."""
    stands = {name: stands_of(results, name, seed, column) for name in experiments}
    sizes = {name: len(verdicts) for name, verdicts in stands.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} has {n}" for name, n in sizes.items())
        raise FileError(f"{results}/*/seed{seed}/verdicts.parquet: not of the same examples ({column}: {told}); run the attack stage again")
    return stands


def pairwise(profile: Profile, results: Path, seed: int, column: str) -> list[dict[str, Any]]:
    """Every two experiments on the same examples of one seed: McNemar's counts and p, Holm's correction over all pairs.

    column: as for stands_of.
    """
    stands = stands_together(results, profile.experiments, seed, column)
    found: list[dict[str, Any]] = []
    for a, b in itertools.combinations(stands, 2):
        only_a, only_b, p = mcnemar(stands[a], stands[b])
        found.append({"a": a, "b": b, "n": len(stands[a]), "only_a": only_a, "only_b": only_b, "p": p})
    running = 0.0
    for rank, pair in enumerate(sorted(found, key=lambda pair: pair["p"])):
        running = max(running, min(1.0, pair["p"] * (len(found) - rank)))
        pair["p_holm"] = running
    return found


def sample_table(details: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """Heads, then a line per experiment: how samples compare, of one seed. details: experiment -> metrics."""
    heads = ["experiment", *(describe(name).label for name in ("frechet", "kid", "precision", "recall", "reference_score"))]
    heads += [f"{describe('frechet').label}, {kind}" for kind in ("E(x, y) chains", "buffer", "released")]
    lines = [heads]
    for name, d in details.items():
        score = "inception_score" if d.get("inception_score") is not None else "reference_score"
        line = [
            name,
            number(d["frechet"], ".2f", n=d["n_samples"]),
            number(d.get("kid"), ".2f", 1000, spread=d.get("kid_std")),
            number(d.get("precision"), ".1f", 100),
            number(d.get("recall"), ".1f", 100),
            number(d.get(score), ".2f", spread=d.get(f"{score}_std")),
            number(d.get("frechet_conditional"), ".2f", n=d.get("n_conditional")),
            number(d.get("frechet_buffer"), ".2f", n=d.get("n_buffer")),
            number(d.get("released_frechet"), ".2f", n=d.get("released_n_samples")),
        ]
        lines.append(line)
    return lines


def reliability_table(details: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """Heads, then a line per experiment: calibration and detection, of one seed. details: experiment -> metrics."""
    first = next(iter(details.values()))
    asked = {"ood_auroc_energy_": "OOD: ", "detect_auroc_energy_": "PGD, "}
    columns = {
        key: label + key.removeprefix(start)
        for start, label in asked.items()
        for key in first
        if key.startswith(start) and not key.endswith(("_low", "_high"))
    }
    heads = ["experiment", *(describe(name).label for name in ("ece", "ece_scaled", "temperature", "nll"))]
    heads += [f"{label} (energy)" for label in columns.values()]
    lines = [heads]
    for name, d in details.items():
        line = [
            name,
            number(d["ece"], ".1f", 100),
            number(d["ece_scaled"], ".1f", 100),
            number(d["temperature"], ".2f"),
            number(d["nll"], ".3f"),
        ]
        for key in columns:
            value, low, high = (d.get(f"{key}{end}") for end in ("", "_low", "_high"))
            line.append("–" if value is None or low is None or high is None else f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append(line)
    return lines


def number(value: float | None, form: str, scale: float = 1, spread: float | None = None, n: int | None = None) -> str:
    if value is None:
        return "–"
    text = f"{value * scale:{form}}"
    text += f" ± {spread * scale:{form}}" if spread is not None else ""
    return text + (f" (n = {n})" if n else "")


WHAT_WAS_READ = (
    f'"Released" is {RELEASE}. The paper links another address, and a later release may differ. The form `released` runs its default '
    "lines; `released_ce` the cross-entropy step that stands beside them, commented out."
)


def write_audit_markdown(findings: Sequence[Any], side: Sequence[Sequence[str]], checks: Sequence[dict[str, Any]], path: Path) -> None:
    """audit.md: the claims, both protocols side by side, and the checks that failed. findings: of report.claims.judge."""
    rows = [[f.claim, f"**{f.verdict}**", f.paper, f.measured, f.protocol, f.why] for f in findings]
    text = ["# Which claims hold?", "", *markdown_table([["claim", "verdict", "the paper", "measured here", "protocol", "why"], *rows]), ""]
    text += [WHAT_WAS_READ, ""]
    text += ["# Robustness under every protocol", "", *markdown_table(side), "", "# Integrity checks that failed", ""]
    failed = [check for check in checks if check["passed"] is False]
    text += [
        f"- {c['experiment']}, seed {c['seed']}: {markdown(c['name'])}{' [' + c['protocol'] + ']' if c['protocol'] else ''}: "
        f"{number(c['value'], '.3g')}, limit {number(c['limit'], '.3g')} ({markdown(c['says'])})"
        for c in failed
    ] or [f"None of {len(checks)}."]
    write_text(path, "\n".join(text) + "\n")
