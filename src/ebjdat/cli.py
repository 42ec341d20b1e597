"""`ebjdat`: one thin command per stage. Each reads and writes only the files that its options name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ebjdat import tools
from ebjdat.settings import ParamsError
from ebjdat.terminal import NO_OVERRIDES, Overrides, ParamsFile, Threads, friendly, known

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Seed = Annotated[int, typer.Option(help="Seed of the run.", min=0)]
Name = Annotated[str, typer.Option("--experiment", help="An experiment of the profile.")]
Data = Annotated[Path, typer.Option(help="Prepared data (npz).")]
Weights = Annotated[Path, typer.Option(help="Checkpoint (safetensors).")]
Out = Annotated[Path, typer.Option(help="Where the result goes (JSON).")]


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
    train.pretrain(context, known(pretraining, context.profile.pretraining), seed, data, train.Outputs(out, metrics, curve), threads)


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
    teacher: Annotated[Path | None, typer.Option(help="Weights of its teacher (training.teacher): a checkpoint, or any file.")] = None,
    override: Overrides = NO_OVERRIDES,
    threads: Threads = None,
) -> None:
    """Train an experiment from its pretraining."""
    from ebjdat.stages import train
    from ebjdat.stages.context import Context

    context = Context.load(params, override)
    outputs = train.Outputs(out, metrics, curve)
    train.finetune(context, known(experiment, context.profile.experiments), seed, data, initial, outputs, threads, teacher)


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
    from ebjdat.stages.context import Context, device_for
    from ebjdat.stages.evaluation import Task

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
    name = known(experiment, context.profile.experiments)
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
    from ebjdat.stages.context import Context
    from ebjdat.stages.evaluation import Task

    context = Context.load(params, override)
    name = known(experiment, context.profile.experiments)
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
    from ebjdat.stages.context import Context
    from ebjdat.stages.evaluation import Task

    context = Context.load(params, override)
    name = known(experiment, context.profile.experiments)
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
    """Calibration, and detection of out-of-distribution and adversarial images."""
    from ebjdat.stages import reliability as stage
    from ebjdat.stages.context import Context
    from ebjdat.stages.evaluation import Task

    context = Context.load(params, override)
    name = known(experiment, context.profile.experiments)
    outputs = {"out": out, "values": values, "figure": figure}
    stage.run(context, Task(name, seed, {"data": data, "weights": weights}, outputs, threads))


@app.command()
@friendly
def teacher(
    params: ParamsFile,
    experiment: Name,
    seed: Seed,
    data: Data,
    weights: Weights,
    curve: Annotated[Path, typer.Option(help="The student's curve (CSV).")],
    recipe: Annotated[list[Path], typer.Option(help="A checkpoint of the recipe (evaluation.teacher.recipe); repeat for each seed.")],
    out: Out,
    values: Annotated[Path, typer.Option(help="What was measured on every training image (npz).")],
    teacher: Annotated[Path | None, typer.Option(help="The teacher's weights.")] = None,
    override: Overrides = NO_OVERRIDES,
    threads: Threads = None,
) -> None:
    """How sure a student's teacher is of training images that a recipe of adversarial training does not learn."""
    from ebjdat.stages import teacher as stage
    from ebjdat.stages.context import Context
    from ebjdat.stages.evaluation import Task

    context = Context.load(params, override)
    name = known(experiment, context.profile.experiments)
    if context.profile.evaluation.teacher is None or context.profile.training_settings(name).teacher is None:
        raise ParamsError(f"{experiment} has no teacher to measure: training.teacher and evaluation.teacher name it and the recipe")
    inputs = {"data": data, "weights": weights, "curve": curve, **({"teacher": teacher} if teacher else {})}
    stage.run(context, Task(name, seed, inputs, {"out": out, "values": values}, threads), recipe)


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


for command in tools.COMMANDS:
    app.command()(friendly(command))

if __name__ == "__main__":
    app()
