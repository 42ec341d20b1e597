"""How fast the ensemble of a protocol is against plain pyautoattack: the same network, examples, batches, seed and threads.

    python workflow/scripts/bench_attacks.py --model package.module:factory --weights FILE --data FILE [--n 500] [--threads 2]
    python workflow/scripts/bench_attacks.py --checkpoint checkpoints/digits/pgd_at/seed0.safetensors --data data/digits/data.npz

Plain: AutoAttack(model.eval(), version="standard").run_standard_evaluation, as its users call it. Attacks are timed one by one,
ours and plain in turn, so that what else the machine does meets both. Prints seconds, the speed-up and the share of equal
verdicts for each arithmetic of the search, and saves them with --json.
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

from ebjdat import registry
from ebjdat.data import outside
from ebjdat.evaluation import ensemble, robust
from ebjdat.models.modes import UnitRange
from ebjdat.params import ProtocolSettings, usual_protocols
from ebjdat.pixels import parse_budget, unit_from_uint8
from ebjdat.stages.attack import outside_model
from ebjdat.training import checkpoint

PLAIN = {"apgd_ce": "apgd-ce", "apgd_t": "apgd-t", "fab_t": "fab-t", "square": "square"}


def ours(network: ensemble.FastNetwork, model: nn.Module, x: Tensor, y: Tensor, name: str, protocol: ProtocolSettings, size: int) -> Tensor:
    """Which of the examples still stand after one attack."""
    attack, settings = registry.load(registry.ATTACKS, name), protocol.attacks[name]
    stands = []
    for px, py in zip(x.split(size), y.split(size), strict=True):
        moved = attack(network, px, py, settings, protocol, 0)
        inside = robust.outside(moved, px, protocol.norm, protocol.radius) <= robust.SLACK
        stands.append((robust.predictions(model, moved, size) == py) | ~inside)
    return torch.cat(stands)


def plain(model: nn.Module, x: Tensor, y: Tensor, name: str, protocol: ProtocolSettings, size: int) -> Tensor:
    whole = AutoAttack(model, norm=protocol.norm, eps=protocol.radius, seed=0, version="standard", device=x.device)
    whole.attacks_to_run = [PLAIN[name]]
    targets = min(9, model(x[:1]).shape[1] - 1)
    whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = targets
    moved, _ = whole.run_standard_evaluation(x, y, batch_size=size)
    return robust.predictions(model, moved, size) == y


def main(
    data: Annotated[Path, typer.Option(help="As for `ebjdat attack --data`.")],
    checkpoint_file: Annotated[Path | None, typer.Option("--checkpoint", help="A checkpoint of this project.")] = None,
    model: Annotated[str | None, typer.Option(help="package.module:function, instead of --checkpoint.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights for --model.")] = None,
    size: Annotated[int | None, typer.Option(help="Scale and crop images of a folder.")] = None,
    n: Annotated[int, typer.Option(help="Examples.")] = 500,
    eps: Annotated[str, typer.Option(help="Radius in [0, 1] pixels.")] = "8/255",
    norm: Annotated[str, typer.Option(help="Linf or L2.")] = "Linf",
    batch_size: Annotated[int, typer.Option(help="Of the attacks, both ways; 250 is pyautoattack's own.")] = 250,
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
        network = outside_model(str(model), weights).to(device)
    images, labels = outside.images_of(data, size)
    x, y = unit_from_uint8(torch.from_numpy(images[:n])).to(device), torch.from_numpy(labels[:n]).to(device)
    protocol = usual_protocols(len(x)).standard.model_copy(update={"eps": parse_budget(eps), "norm": norm})

    right = robust.predictions(network, x, batch_size) == y
    ways = ["plain", *search]
    fast = {way: ensemble.FastNetwork(network, x[:batch_size], way == "bf16") for way in search}
    standing = {way: right.clone() for way in ways}
    seconds: dict[str, dict[str, float]] = {way: {} for way in ways}
    for name in protocol.attacks:
        for way in ways:
            rows = standing[way].nonzero().squeeze(1)
            if not len(rows):
                seconds[way][name] = 0.0
                continue
            started = time.perf_counter()
            if way == "plain":
                stands = plain(network, x[rows], y[rows], name, protocol, batch_size)
            else:
                stands = ours(fast[way], network, x[rows], y[rows], name, protocol, batch_size)
            seconds[way][name] = time.perf_counter() - started
            standing[way][rows[~stands]] = False
            print(f"{name:8s} {way:5s} {int(standing[way].sum()):5d} of {len(x)} stand  {seconds[way][name]:8.1f} s", flush=True)
    result = {
        "n": len(x),
        "clean": int(right.sum()),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seconds": seconds,
        "robust": {way: int(standing[way].sum()) for way in ways},
        "speedup": {way: sum(seconds["plain"].values()) / sum(seconds[way].values()) for way in search},
        "equal_verdicts": {way: float((standing[way] == standing["plain"]).float().mean()) for way in search},
    }
    for way in search:
        print(f"{way}: {result['speedup'][way]:.2f} x plain, {100 * result['equal_verdicts'][way]:.2f} % of {len(x)} verdicts equal")
    if json_out is not None:
        json_out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
