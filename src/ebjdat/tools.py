"""Commands beside the stages: check and show a profile, send results to MLflow, list names and methods, look into checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ebjdat.errors import TrackingError, UserError, brief, message, printable
from ebjdat.settings import ParamsError
from ebjdat.terminal import NO_OVERRIDES, Overrides, ParamsFile, Threads, console, known, plain

FEW = 200  # rows of a section, and entries of a list, that are printed of a checkpoint


def check(params: ParamsFile, override: Overrides = NO_OVERRIDES) -> None:
    """Check a profile; list everything that is wrong with it, and whether the files that it names are there."""
    from ebjdat.settings import load, missing_files, named_files, too_few_classes

    profile = load(params, override)
    problems, named = missing_files(profile), list(named_files(profile))
    images = [Path(file.path) for file in named if file.key == "data.path" and file.exists]
    folders = [item for path in images for item in path.glob("train/*") if item.is_dir()]
    if folders and (problem := too_few_classes(profile.evaluation.attack, len(folders))):  # an archive is counted by `prepare`
        problems.append(f"evaluation.attack: {problem}")
    if problems:
        raise ParamsError("\n".join(problems))
    seeds = f"{len(profile.experiments)} experiments x {len(profile.seeds)} seeds"
    typer.echo(printable(f"{params}: fine; {seeds} on {profile.data.name}"))
    for file in named:
        typer.secho(printable(file), fg=None if file.exists else "yellow", err=not file.exists)
    generate = profile.evaluation.generate
    if generate.extractor == "inception" and generate.inception_weights is None:
        from ebjdat.evaluation.frechet import kept_weights

        here = (weights := kept_weights()).is_file()
        where = f"Inception's weights: {weights} is {'here' if here else 'not here yet; `prepare` fetches it'}"
        typer.secho(printable(f"evaluation.generate.extractor: {where}"), fg=None if here else "yellow", err=not here)


def show(
    params: ParamsFile,
    override: Overrides = NO_OVERRIDES,
    overrides: Annotated[str, typer.Option(help="All of them in one text, quoted as in a shell.")] = "",
) -> None:
    """Print a finished profile's table, and where its report and the MLflow UI are."""
    from rich.table import Column, Table

    from ebjdat.layout import Layout
    from ebjdat.metrics import TABLE
    from ebjdat.report.collect import collect, read_card
    from ebjdat.report.format import cell_parts, header_parts
    from ebjdat.report.summary import aggregate
    from ebjdat.settings import load, run_name, split_overrides

    override = [*override, *split_overrides(overrides)]
    profile, run = load(params, override), run_name(params, override)
    layout = Layout(run)
    results = Path(layout.result("", "table.csv")).parent
    if not (results / "table.csv").exists():
        raise ParamsError(f"{results}/table.csv: this profile has not been run yet; `make reproduce` runs it")
    frame = aggregate(profile, collect(profile, results, read_card(Path(layout.card))["data_hash"]))
    heads = [Column(plain(*header_parts(m, frame))) for m in TABLE]
    table = Table("experiment", *heads, title=plain(results.name), title_justify="left", show_lines=True, padding=(0, 0, 0, 1))
    for _, record in frame.iterrows():
        table.add_row(plain(record["experiment"]), *(plain(*cell_parts(record, m)) for m in TABLE))
    console(120).print(table)
    typer.echo(printable(f"report:    {results / 'report.html'} (open in a browser; needs no network)"))
    typer.echo(printable(f"claims:    {results / 'audit.html'} (or audit.md): what holds, fails, is open"))
    typer.echo(printable(f"for programs: {results / 'summary.csv'}"))
    typer.echo("all runs:  make ui, then http://127.0.0.1:5000")


def sync() -> None:
    """Send every journal of this checkout to MLflow: what a server missed, and results that came from elsewhere."""
    from ebjdat.tracking import background, journal
    from ebjdat.tracking.address import shown_uri, tracking_uri, unusable

    paths = [*journal.unfinished(), *journal.finished()]
    if not paths:
        typer.echo("no journals under state/tracking or results: nothing has run here")
        return
    if why := unusable(tracking_uri()):
        raise TrackingError(f"{shown_uri()}: {why}. Every journal is kept; is MLFLOW_TRACKING_URI right?")
    try:
        from ebjdat.tracking.publish import Publisher
    except ModuleNotFoundError as error:
        raise TrackingError(
            f"nothing can be sent from here: {error.name} is not installed (`make install` does it). Every journal is kept"
        ) from error

    typer.echo(printable(f"{len(paths)} journals -> {shown_uri()}"))
    with background.publishing():
        outcome = Publisher(tracking_uri()).publish(paths)
    for line in outcome.notes:
        typer.secho(printable(line), fg="yellow", err=True)
    background.note(outcome.errors[0] if outcome.errors else None)
    if outcome.errors:
        raise TrackingError(
            f"{len(outcome.errors)} journals could not be sent ({outcome.errors[0]}). They are kept; is the server up, "
            "and MLFLOW_TRACKING_URI right?"
        )
    typer.echo(f"sent what was new in {outcome.journals} journals" if outcome.journals else "everything was there already")


def bench(
    params: ParamsFile = Path("params/cifar10.yaml"),
    experiment: Annotated[str, typer.Option(help="An experiment of the profile: its method and settings.")] = "eb_jdat",
    model: Annotated[str | None, typer.Option(help="Network as DEPTH-WIDTH, e.g. 28-10; default: the experiment's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step; default: the experiment's.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto; default: the profile's.")] = None,
    against: Annotated[str | None, typer.Option(help="naive: also time a naive step, in turn.")] = None,
    repeats: Annotated[int, typer.Option(help="Timings of each; medians and quartiles are over these.", min=3)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where it is saved; default: benchmarks/steps/NAME.json.")] = None,
    override: Overrides = NO_OVERRIDES,
    threads: Threads = None,
) -> None:
    """Time a training step in its parts, and say what share of the machine's matrix rate it uses (docs/performance.md)."""
    import json

    from rich.table import Table

    from ebjdat.stages import bench as stage
    from ebjdat.stages.context import Context

    if against not in (None, "naive"):
        raise UserError(f"--against {against!r}; allowed: naive")
    known(experiment, Context.load(params, override).profile.experiments)
    asked = [*override]
    if model is not None:
        depth, _, width = model.partition("-")
        asked += [f"model.depth={depth}", f"model.width={width}"]
    if batch is not None:
        asked.append(f"experiments.{experiment}.training.batch_size={batch}")
    if device is not None:
        asked.append(f"runtime.device={device}")
    found, path = stage.run(Context.load(params, asked), experiment, against is not None, repeats, out, threads)
    if as_json:
        typer.echo(json.dumps(found))
        return
    title = f"{experiment}, {found['case']['model']}, batch {found['case']['batch_size']}, {found['machine']['device']}"
    table = Table(title=plain(title))
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column(f"quartiles of {found['n']}", justify="right")
    for name, text in stage.table_rows(found):
        table.add_row(*map(plain, (name, *text)))
    console(100).print(table)
    if found["mfu"] > 1 or max(found["spread"]["images_per_s"]) > 1.5 * min(found["spread"]["images_per_s"]):
        typer.secho("timings vary a lot, or exceed the machine's own rate: other programs are running; rerun", fg="yellow", err=True)
    typer.echo(f"saved in {path}")


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="docs/methods.md.")] = False,
) -> None:
    """List every method, row of settings, sampler and update with its source and defaults."""
    import json

    from ebjdat.settings import catalogue, flat, strategies

    if as_markdown:
        typer.echo(strategies.markdown(), nl=False)
        return
    content = catalogue()
    if as_json:
        typer.echo(json.dumps(content, indent=1))
        return
    from rich.table import Table

    screen = console(160)
    for kind, entries in content.items():
        table = Table(kind, "source", "defaults", title_justify="left", show_lines=True)
        for name, entry in entries.items():
            values = {k: v for k, v in entry.items() if k not in ("source", "implementation", "defaults") and v}
            values |= flat(entry["defaults"])
            table.add_row(plain(name), plain(entry["source"]), plain(*(f"{k}: {json.dumps(v)}" for k, v in values.items())))
        screen.print(table)


def metrics(
    name: Annotated[str | None, typer.Argument(help="One name, e.g. released_pgd20_acc; default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="docs/metrics.md.")] = False,
) -> None:
    """Explain every name in result files, DVC, MLflow and the report, or one: meaning, unit, which direction is better."""
    import json
    from dataclasses import asdict

    from ebjdat.metrics import METRICS, STAGES, describe, markdown

    chosen = METRICS if name is None else (describe(name),)
    if as_markdown:
        typer.echo(markdown(), nl=False)
        return
    if as_json:
        typer.echo(json.dumps([asdict(metric) for metric in chosen], indent=1, ensure_ascii=False))
        return
    from rich.table import Table

    screen = console(160)
    for stage in dict.fromkeys(metric.stage for metric in chosen):
        rows = [metric for metric in chosen if metric.stage == stage]
        table = Table("name", "meaning", "unit", "better", "only where", title=stage, title_justify="left", caption=STAGES[stage])
        for q in rows:
            table.add_row(*map(plain, (q.name, q.meaning, q.unit, q.better, q.only)))
        screen.print(table)


def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint (safetensors).", metavar="CHECKPOINT")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what made a checkpoint and what it holds, and verify its digests; exit code 1 when they do not fit."""
    import json

    from ebjdat.settings import flat
    from ebjdat.training.checkpoint import inspect as read

    header = read(file)
    if as_json:
        typer.echo(json.dumps(header, indent=1))
        raise typer.Exit(1 if header["problems"] else 0)
    from rich.table import Column, Table

    table = Table("", Column(plain(file)), title_justify="left", show_header=True)
    sections = ("model", "training", "metrics")
    for key, value in list(header.items())[:FEW]:
        if key not in ("tensors", "problems", *sections):
            table.add_row(plain(key), plain(_few(value)))
    for section in sections:
        table.add_section()
        values = flat(header[section]) if isinstance(header.get(section), dict) else {}
        for key, value in list(values.items())[:FEW]:
            table.add_row(plain(f"{section}.{key}"), plain(_few(value)))
    table.add_section()
    for part, what in (("model.", "weights"), ("ema.", "averaged weights"), ("buffer.", "replay buffer")):
        shapes = {name: entry["shape"] for name, entry in header["tensors"].items() if name.startswith(part)}
        if shapes:
            table.add_row(what, f"{len(shapes)} tensors, {sum(math.prod(shape) for shape in shapes.values()):,} numbers")
    console(120).print(table)
    if header["problems"]:
        typer.secho(message("\n".join(f"NOT AS IT WAS WRITTEN: {problem}" for problem in header["problems"])), fg="red", err=True)
        raise typer.Exit(1)
    typer.secho("every digest fits: header and tensors are as they were written", fg="green")


def _few(value: Any) -> str:
    """A value of a header in a line or two, however much there is of it."""
    if not isinstance(value, list):
        return brief(value, 300)
    more = f", … ({len(value):,} in all)" if len(value) > FEW else ""
    return brief(", ".join(map(str, value[:FEW])), 2000) + more


COMMANDS = (check, show, sync, bench, methods, metrics, inspect)
