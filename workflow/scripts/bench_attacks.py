"""How fast the standard ensemble is here against plain pyautoattack: the same network, examples and threads, one after the other.

    python workflow/scripts/bench_attacks.py --checkpoint FILE --data data/digits/data.npz --eps 0.15
    python workflow/scripts/bench_attacks.py --model package.module:factory --weights FILE --data FILE [--n 500] [--threads 2]

plain: AutoAttack(model.eval(), version="standard").run_standard_evaluation, as its users call it. fp32, bf16: what `ebjdat attack` runs,
its PGD-20 and the start of its processes included. Prints seconds, the speed-up and the share of equal verdicts for each
arithmetic of the search, and saves them with --json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from pyautoattack import AutoAttack
from torch import Tensor, nn

from ebjdat.data import external
from ebjdat.evaluation import robust
from ebjdat.models.modes import UnitRange
from ebjdat.pixels import parse_budget, unit_from_uint8
from ebjdat.settings import STANDARD, ProtocolSettings, usual_protocols
from ebjdat.stages.attack import external_model
from ebjdat.training import checkpoint


def plain(model: nn.Module, x: Tensor, y: Tensor, protocol: ProtocolSettings) -> Tensor:
    """Which examples are still robust, at pyautoattack's own batch size."""
    whole = AutoAttack(model, norm=protocol.norm, eps=protocol.radius, seed=0, version="standard", device=x.device)
    targets = min(9, model(x[:1]).shape[1] - 1)
    whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = targets
    moved, _ = whole.run_standard_evaluation(x, y, batch_size=250)
    return robust.predictions(model, moved, 250) == y


def main(
    data: Annotated[Path, typer.Option(help="As for `ebjdat attack --data`.")],
    checkpoint_file: Annotated[Path | None, typer.Option("--checkpoint", help="A checkpoint of this project.")] = None,
    model: Annotated[str | None, typer.Option(help="package.module:function, instead of --checkpoint.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights for --model.")] = None,
    size: Annotated[int | None, typer.Option(help="Scale and crop images of a folder.")] = None,
    n: Annotated[int, typer.Option(help="Examples.")] = 500,
    eps: Annotated[str, typer.Option(help="Radius in [0, 1] pixels.")] = "8/255",
    norm: Annotated[str, typer.Option(help="Linf or L2.")] = "Linf",
    batch_size: Annotated[int, typer.Option(help="At most so many examples per batch here; plain keeps its 250.")] = 250,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    search: Annotated[list[str], typer.Option(help="fp32, bf16 or both.")] = ["fp32", "bf16"],  # noqa: B006 (typer copies it)
    json_out: Annotated[Path | None, typer.Option("--json", help="Save the figures.")] = None,
) -> None:
    """Time the standard ensemble against plain pyautoattack."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if checkpoint_file is not None:
        network: nn.Module = UnitRange(checkpoint.load(checkpoint_file).network(device)).eval()
        network = network.to(memory_format=torch.contiguous_format)  # plain users do not change it
    else:
        network = external_model(str(model), weights).to(device)
    images, labels, _ = external.images_of(data, size)
    x, y = unit_from_uint8(torch.from_numpy(images[:n])).to(device), torch.from_numpy(labels[:n]).to(device)
    settings = usual_protocols(len(x)).model_copy(update={"batch_size": batch_size})
    protocol = settings.standard.model_copy(update={"eps": parse_budget(eps), "norm": norm})
    protocol = protocol.model_copy(update={"pgd": protocol.pgd.model_copy(update={"step_size": protocol.eps / 4})})
    settings = settings.model_copy(update={"protocols": {STANDARD: protocol}})

    seconds, robust_by = {}, {}
    for way in ("plain", *search):
        started = time.perf_counter()
        if way == "plain":
            robust_by[way] = plain(network, x, y, protocol)
        else:
            asked = settings.model_copy(update={"search": way})
            found = robust.evaluate(network, x, y, STANDARD, asked, title=way, workers=threads)
            robust_by[way] = found.robust_under(list(protocol.attacks))
        seconds[way] = time.perf_counter() - started
        print(f"{way:5s} {int(robust_by[way].sum())} of {len(x)} robust, {seconds[way]:.1f} s", flush=True)
    result = {
        "n": len(x),
        "threads": threads,
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seconds": seconds,
        "robust": {way: int(verdicts.sum()) for way, verdicts in robust_by.items()},
        "speedup": {way: seconds["plain"] / seconds[way] for way in search},
        "equal_verdicts": {way: float((robust_by[way] == robust_by["plain"]).float().mean()) for way in search},
    }
    for way in search:
        print(f"{way}: {result['speedup'][way]:.2f} x plain, {100 * result['equal_verdicts'][way]:.2f} % of {len(x)} verdicts equal")
    if json_out is not None:
        json_out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
