"""`ebjdat`: one thin command per stage. Each reads the files it is given and writes the files it is told to."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebjdat.checkout import refuse_another
from ebjdat.errors import TrackingError, UserError, brief, message, printable
from ebjdat.settings import ParamsError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

ParamsFile = Annotated[Path, typer.Option("--params", help="Profile, e.g. params/digits.yaml.")]
Overrides = Annotated[list[str], typer.Option("--override", help="A YAML file laid over the profile, or key.path=value; repeatable.")]
Seed = Annotated[int, typer.Option(help="Seed of the run.", min=0)]
Name = Annotated[str, typer.Option("--experiment", help="An experiment of the profile.")]
Data = Annotated[Path, typer.Option(help="Prepared data (npz).")]
Weights = Annotated[Path, typer.Option(help="Checkpoint (safetensors).")]
Out = Annotated[Path, typer.Option(help="Where the result goes (JSON).")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: the profile's runtime.threads.", min=1)]
NO_OVERRIDES: list[str] = []


def _here() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise UserError("the folder that this runs in was deleted: change to another") from None


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Expected errors end with their message and exit code 1; Ctrl-C says that what was done is kept.

    Expected are also another checkout's code, and what the operating system says of a file, as "File name too long".
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            refuse_another(_here())
            command(*args, **kwargs)
        except UserError as error:
            typer.secho(message(f"error: {error}"), fg="red", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.secho(
                "stopped; nothing is half-written, and training continues where it was when the same command runs again",
                fg="yellow",
                err=True,
            )
            raise typer.Exit(130) from None
        except OSError as error:
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                raise
            typer.secho(message(f"error: {error}; nothing was left half-written, run again when it is mended"), fg="red", err=True)
            raise typer.Exit(1) from None

    return run


@app.command()
@friendly
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


@app.command()
@friendly
def prepare(
    params: ParamsFile,
    out: Annotated[Path, typer.Option(help="Prepared arrays (npz).")],
    card: Annotated[Path, typer.Option(help="Data card (JSON).")],
    override: Overrides = NO_OVERRIDES,
) -> None:
    """Read the source, fix the splits, write arrays and data card."""
    from ebjdat.settings import load
    from ebjdat.stages import prepare as stage

    stage.run(load(params, override), out, card)


@app.command()
@friendly
def pretrain(
    params: ParamsFile,
    pretraining: Annotated[str, typer.Option(help="A pretraining of the profile.")],
    seed: Seed,
    data: Data,
    out: Weights,
    metrics: Out,
    curve: Annotated[Path, typer.Option(help="One line per epoch (CSV).")],
    override: Overrides = NO_OVERRIDES,
    threads: Threads = None,
) -> None:
    """Make the checkpoint that several experiments start from."""
    from ebjdat.stages import train
    from ebjdat.stages.context import Context

    context = Context.load(params, override)
    train.pretrain(context, _known(pretraining, context.profile.pretraining), seed, data, train.Outputs(out, metrics, curve), threads)


@app.command()
@friendly
def finetune(
    params: ParamsFile,
    experiment: Name,
    seed: Seed,
    data: Data,
    initial: Annotated[Path, typer.Option(help="Checkpoint of the experiment's pretraining.")],
    out: Weights,
    metrics: Out,
    curve: Annotated[Path, typer.Option(help="One line per epoch (CSV).")],
    override: Overrides = NO_OVERRIDES,
    threads: Threads = None,
) -> None:
    """Train an experiment from its pretraining."""
    from ebjdat.stages import train
    from ebjdat.stages.context import Context

    context = Context.load(params, override)
    outputs = train.Outputs(out, metrics, curve)
    train.finetune(context, _known(experiment, context.profile.experiments), seed, data, initial, outputs, threads)


@app.command()
@friendly
def attack(
    data: Annotated[
        Path, typer.Option(help="Prepared data (npz); with --model also any npz of images and labels, a folder or an archive.")
    ],
    out: Out,
    params: Annotated[
        Path | None, typer.Option(help="Profile, e.g. params/digits.yaml; with --model its evaluation.attack is used.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="An experiment of the profile.")] = None,
    seed: Seed = 0,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint (safetensors); with --model any file of weights.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Network of the transferred attack: a checkpoint; with --model another package.module:function.")
    ] = None,
    verdicts: Annotated[Path | None, typer.Option(help="Every verdict (Parquet); default: beside --out.")] = None,
    model: Annotated[str | None, typer.Option(help="Any network: package.module:function that makes one for images in [0, 1].")] = None,
    n: Annotated[int | None, typer.Option(help="With --model and no profile: images for each ensemble (default 1000).", min=1)] = None,
    size: Annotated[int | None, typer.Option(help="With --model: scale and crop images of a folder to this size.", min=8)] = None,
    classes: Annotated[
        Path | None, typer.Option(help="With --model and class folders: a text file with a class name per line, in the network's order.")
    ] = None,
    weights_key: Annotated[
        str | None, typer.Option(help="With --model: which of several weights in the file, e.g. state_dict_ema; a message lists them.")
    ] = None,
    override: Overrides = NO_OVERRIDES,
    threads: Threads = None,
) -> None:
    """Robustness under every protocol, with integrity checks: of a profile's experiment, or of any network (--model)."""
    from ebjdat.settings import usual_protocols
    from ebjdat.stages import attack as stage
    from ebjdat.stages.context import Context, Task, device_for

    verdicts = verdicts or out.with_suffix(".parquet")
    if verdicts.resolve() == out.resolve():
        raise ParamsError(f"--out {out} is where the verdicts go; end it in .json, or name another file with --verdicts")
    if model is not None:
        if experiment is not None or (n is not None and params is not None):
            raise ParamsError("with --model: --experiment means nothing, and --n nothing beside --params (set the protocols' n there)")
        context = Context.load(params, override) if params else None
        settings = context.profile.evaluation.attack if context else usual_protocols(n or 1000, override)
        device = context.device(threads) if context else device_for("auto", threads or os.cpu_count() or 1)
        network = stage.ExternalNetwork(model, weights, weights_key, source)
        stage.run_external(network, stage.Images(data, size, classes), settings, device, out, verdicts)
        return
    if classes is not None or weights_key is not None or size is not None:
        raise ParamsError("--classes, --weights-key and --size are for networks from elsewhere, with --model")
    if params is None or experiment is None or weights is None:
        raise ParamsError("--params, --experiment and --weights are needed, or --model for a network from elsewhere")
    context = Context.load(params, override)
    name = _known(experiment, context.profile.experiments)
    inputs = {"data": data, "weights": weights, **({"source": Path(source)} if source else {})}
    stage.run(context, Task(name, seed, inputs, {"out": out, "verdicts": verdicts}, threads))


@app.command()
@friendly
def generate(
    params: ParamsFile,
    experiment: Name,
    seed: Seed,
    data: Data,
    weights: Weights,
    reference: Annotated[Path, typer.Option(help="Checkpoint of the reference classifier.")],
    out: Out,
    samples: Annotated[Path, typer.Option(help="The fresh chains' images (npz).")],
    grid: Annotated[Path, typer.Option(help="Picture of samples (PNG).")],
    chains: Annotated[Path, typer.Option(help="Chains on their way (GIF).")],
    override: Overrides = NO_OVERRIDES,
    threads: Threads = None,
) -> None:
    """Run fresh chains, unconditional and class-conditional; measure them and the replay buffer."""
    from ebjdat.stages import evaluate
    from ebjdat.stages.context import Context, Task

    context = Context.load(params, override)
    name = _known(experiment, context.profile.experiments)
    inputs = {"data": data, "weights": weights, "reference": reference}
    outputs = {"out": out, "samples": samples, "grid": grid, "chains": chains}
    evaluate.generate(context, Task(name, seed, inputs, outputs, threads))


@app.command()
@friendly
def energy(
    params: ParamsFile,
    experiment: Name,
    seed: Seed,
    data: Data,
    weights: Weights,
    samples: Annotated[Path, typer.Option(help="Fresh chains of `generate` (npz).")],
    out: Out,
    values: Annotated[Path, typer.Option(help="Every energy (npz).")],
    figure: Annotated[Path, typer.Option(help="Histograms (PNG).")],
    override: Overrides = NO_OVERRIDES,
    threads: Threads = None,
) -> None:
    """Energies of clean, adversarial and generated images, and their gaps."""
    from ebjdat.stages import evaluate
    from ebjdat.stages.context import Context, Task

    context = Context.load(params, override)
    name = _known(experiment, context.profile.experiments)
    inputs = {"data": data, "weights": weights, "samples": samples}
    evaluate.energy(context, Task(name, seed, inputs, {"out": out, "values": values, "figure": figure}, threads))


@app.command()
@friendly
def reliability(
    params: ParamsFile,
    experiment: Name,
    seed: Seed,
    data: Data,
    weights: Weights,
    out: Out,
    values: Annotated[Path, typer.Option(help="Scores of every image (npz).")],
    figure: Annotated[Path, typer.Option(help="Reliability diagram (PNG).")],
    override: Overrides = NO_OVERRIDES,
    threads: Threads = None,
) -> None:
    """Calibration, and how well out-of-distribution and adversarial images are told from test images."""
    from ebjdat.stages import reliability as stage
    from ebjdat.stages.context import Context, Task

    context = Context.load(params, override)
    name = _known(experiment, context.profile.experiments)
    outputs = {"out": out, "values": values, "figure": figure}
    stage.run(context, Task(name, seed, {"data": data, "weights": weights}, outputs, threads))


@app.command()
@friendly
def report(
    params: ParamsFile,
    card: Annotated[Path, typer.Option(help="Data card (JSON).")],
    summary: Annotated[
        Path, typer.Option(help="summary.csv, a row per experiment and seed; the stages' results are read from its folder.")
    ],
    metrics: Annotated[Path, typer.Option(help="Headline metrics of each experiment, means over seeds (JSON).")],
    table_csv: Annotated[Path, typer.Option(help="The table with intervals (CSV).")],
    table_md: Annotated[Path, typer.Option(help="The table (Markdown).")],
    html: Annotated[Path, typer.Option(help="The report page.")],
    audit_html: Annotated[Path, typer.Option(help="The audit page: claims, checks, pairs of models.")],
    audit_md: Annotated[Path, typer.Option(help="The claims (Markdown).")],
    override: Overrides = NO_OVERRIDES,
) -> None:
    """Tables, the HTML report and the audit from the result files."""
    from ebjdat.stages import report as stage
    from ebjdat.stages.context import Context

    outputs = stage.Outputs(summary, metrics, table_csv, table_md, html, audit_html, audit_md)
    stage.run(Context.load(params, override), summary.parent, card, outputs)


@app.command()
@friendly
def show(
    params: ParamsFile,
    override: Overrides = NO_OVERRIDES,
    overrides: Annotated[str, typer.Option(help="All of them in one text, quoted as in a shell.")] = "",
) -> None:
    """Print a finished profile's table, and where its report and the MLflow UI are."""
    from rich.table import Column, Table

    from ebjdat.metrics import TABLE
    from ebjdat.report.collect import collect, read_card
    from ebjdat.report.format import cell_parts, header_parts
    from ebjdat.report.summary import aggregate
    from ebjdat.settings import load, run_name, split_overrides

    override = [*override, *split_overrides(overrides)]
    profile, run = load(params, override), run_name(params, override)
    results = Path("results") / run
    if not (results / "table.csv").exists():
        raise ParamsError(f"{results}/table.csv: this profile has not been run yet; `make reproduce` runs it")
    frame = aggregate(profile, collect(profile, results, read_card(Path("data") / run / "card.json")["data_hash"]))
    heads = [Column(_plain(*header_parts(m, frame))) for m in TABLE]
    table = Table("experiment", *heads, title=_plain(results.name), title_justify="left", show_lines=True, padding=(0, 0, 0, 1))
    for _, record in frame.iterrows():
        table.add_row(_plain(record["experiment"]), *(_plain(*cell_parts(record, m)) for m in TABLE))
    _console(120).print(table)
    typer.echo(printable(f"report:    {results / 'report.html'} (open in a browser; needs no network)"))
    typer.echo(printable(f"claims:    {results / 'audit.html'} (or audit.md): what holds, fails, is open"))
    typer.echo(printable(f"for programs: {results / 'summary.csv'}"))
    typer.echo("all runs:  make ui, then http://127.0.0.1:5000")


@app.command()
@friendly
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
    typer.echo(f"sent {outcome.values} values of {outcome.journals} journals" if outcome.journals else "everything was there already")


@app.command()
@friendly
def bench(
    params: ParamsFile = Path("params/cifar10.yaml"),
    experiment: Annotated[str, typer.Option(help="An experiment of the profile: its method and settings.")] = "eb_jdat",
    model: Annotated[str | None, typer.Option(help="Network as DEPTH-WIDTH, e.g. 28-10; default: the experiment's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step; default: the experiment's.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto; default: the profile's.")] = None,
    against: Annotated[str | None, typer.Option(help="naive: also time a plainly written step, taking turns.")] = None,
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
    _known(experiment, Context.load(params, override).profile.experiments)
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
    table = Table(title=_plain(title))
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column(f"quartiles of {found['n']}", justify="right")
    for name, text in stage.table_rows(found):
        table.add_row(*map(_plain, (name, *text)))
    _console(100).print(table)
    if found["mfu"] > 1 or max(found["spread"]["images_per_s"]) > 1.5 * min(found["spread"]["images_per_s"]):
        typer.secho("timings differ much, or exceed the machine's own rate: other programs are at work; run again", fg="yellow", err=True)
    typer.echo(f"saved in {path}")


@app.command()
@friendly
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """List every method, row of settings, sampler and update with its source and defaults."""
    import json

    from ebjdat.settings import catalogue, flat

    content = catalogue()
    if as_json:
        typer.echo(json.dumps(content, indent=1))
        return
    from rich.table import Table

    console = _console(160)
    for kind, entries in content.items():
        table = Table(kind, "source", "defaults", title_justify="left", show_lines=True)
        for name, entry in entries.items():
            values = {k: v for k, v in entry.items() if k not in ("source", "implementation", "defaults") and v}
            values |= flat(entry["defaults"])
            table.add_row(_plain(name), _plain(entry["source"]), _plain(*(f"{k}: {json.dumps(v)}" for k, v in values.items())))
        console.print(table)


@app.command()
@friendly
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

    console = _console(160)
    for stage in dict.fromkeys(metric.stage for metric in chosen):
        rows = [metric for metric in chosen if metric.stage == stage]
        table = Table("name", "meaning", "unit", "better", "only where", title=stage, title_justify="left", caption=STAGES[stage])
        for q in rows:
            table.add_row(*map(_plain, (q.name, q.meaning, q.unit, q.better, q.only)))
        console.print(table)


@app.command()
@friendly
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint (safetensors).", metavar="CHECKPOINT")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what made a checkpoint and what it holds, and verify its digests; exit code 1 when they do not fit."""
    import json

    from ebjdat.settings import flat
    from ebjdat.training.checkpoint import inspect as read

    told = read(file)
    if as_json:
        typer.echo(json.dumps(told, indent=1))
        raise typer.Exit(1 if told["problems"] else 0)
    from rich.table import Column, Table

    table = Table("", Column(_plain(file)), title_justify="left", show_header=True)
    sections = ("model", "training", "metrics")
    for key, value in list(told.items())[:FEW]:
        if key not in ("tensors", "problems", *sections):
            table.add_row(_plain(key), _plain(_few(value)))
    for section in sections:
        table.add_section()
        values = flat(told[section]) if isinstance(told.get(section), dict) else {}
        for key, value in list(values.items())[:FEW]:
            table.add_row(_plain(f"{section}.{key}"), _plain(_few(value)))
    table.add_section()
    for part, what in (("model.", "weights"), ("ema.", "averaged weights"), ("buffer.", "replay buffer")):
        shapes = {name: entry["shape"] for name, entry in told["tensors"].items() if name.startswith(part)}
        if shapes:
            table.add_row(what, f"{len(shapes)} tensors, {sum(math.prod(shape) for shape in shapes.values()):,} numbers")
    _console(120).print(table)
    if told["problems"]:
        typer.secho(message("\n".join(f"NOT AS IT WAS WRITTEN: {problem}" for problem in told["problems"])), fg="red", err=True)
        raise typer.Exit(1)
    typer.secho("every digest fits: header and tensors are as they were written", fg="green")


FEW = 200  # rows of a section, and entries of a list, that are printed of a checkpoint


def _few(value: Any) -> str:
    """A value of a header in a line or two, however much there is of it."""
    if not isinstance(value, list):
        return brief(value, 300)
    more = f", … ({len(value):,} in all)" if len(value) > FEW else ""
    return brief(", ".join(map(str, value[:FEW])), 2000) + more


def _plain(*lines: object) -> Text:
    """A cell of a table, as it stands: without this rich reads "[red]" and ":x:" as markup, and a terminal what is not printable."""
    from rich.text import Text

    return Text("\n".join(map(printable, lines)))


def _console(width: int) -> Console:
    """What prints tables; width: in characters, where it is no terminal, which has its own."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width)


def _known(name: str, names: dict[str, Any]) -> str:
    from ebjdat.settings import nearest

    if name not in names:
        raise ParamsError(f"{name!r} is not in this profile; {nearest(name, list(names))}")
    return name


if __name__ == "__main__":
    app()
