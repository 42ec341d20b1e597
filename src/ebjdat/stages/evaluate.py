"""Stages `generate` and `energy`: checkpoint -> measurements, samples, figures.

matplotlib and scipy take a second each to import, so only the stages that use them do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebjdat.data import prepared
from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.evaluation import frechet, robust
from ebjdat.evaluation import generate as generation
from ebjdat.files import git_commit, read_npz, reading, write_atomic, write_npz, write_result
from ebjdat.models.modes import UnitRange
from ebjdat.pixels import unit_from_uint8
from ebjdat.samplers.starts import StartPool
from ebjdat.stages.context import Context
from ebjdat.training import checkpoint


def generate(
    context: Context,
    experiment: str,
    seed: int,
    data_path: Path,
    weights: Path,
    reference: Path,
    out: Path,
    samples_out: Path,
    grid_out: Path,
    chains_out: Path,
    threads: int | None,
) -> None:
    from ebjdat.report import figures

    data = prepared.load(data_path)
    device = context.device(threads)
    loaded = checkpoint.load_for(context.profile, experiment, weights, data)
    settings = context.profile.evaluation.generate
    train = DeviceData(data, "train", device)
    with context.track_result(experiment, seed, "generate", data, out) as tracker:
        model = loaded.network(device)
        ruler = checkpoint.load(reference, data_hash=data.data_hash).network(device)
        name, features = frechet.choose_extractor(ruler, settings, device, data.image_shape[0])  # before chains that it could waste
        pool = StartPool.of(train, torch.from_numpy(data.class_mean))
        chain, title = loaded.header.training.chain, f"{experiment}/seed{seed}"
        fresh, starts = generation.fresh_chains(model, pool, chain, settings, title)
        conditional, _ = generation.fresh_chains(model, pool, chain, settings, f"{title}, conditional", conditional=True)
        buffer = None
        if loaded.buffer is not None and loaded.buffer_labels is not None:
            buffer = generation.Samples(loaded.buffer, loaded.buffer_labels)
        every = features(torch.from_numpy(data.images))
        real = {"train": every[data.train], "all": every}
        samples = {"fresh": fresh, "conditional": conditional, "buffer": buffer}
        result = generation.measure(model, samples, starts, real, name, features, settings)
        if loaded.ema is not None:
            averaged = loaded.network(device, loaded.ema)
            again, _ = generation.fresh_chains(averaged, pool, chain, settings, f"{title}, averaged")
            result["ema_frechet"] = frechet.frechet_distance(features(again.images), real["train"])

        arrays = {"images": fresh.images, "labels": fresh.labels, "conditional": conditional.images}
        write_npz(samples_out, {key: value.cpu().numpy() for key, value in arrays.items()})
        panels = {"training images": data.split("train")}
        shown = {
            f"{experiment}, seed {seed}: fresh chains down E(x)": fresh,
            "fresh chains down E(x, y)": conditional,
            "replay buffer": buffer,
        }
        panels |= {key: (of.images.cpu().numpy(), of.labels.cpu().numpy()) for key, of in shown.items() if of is not None}
        write_atomic(grid_out, lambda path: figures.save(figures.sample_grids(panels, data.classes, settings.grid, columns=2), path))
        watched = {}
        for key, bound in (("E(x)", False), ("E(x, y)", True)):
            frames, steps = generation.watched_chains(model, pool, chain, settings, conditional=bound)
            watched[f"down {key}"] = frames.cpu().numpy()
        write_atomic(chains_out, lambda path: figures.animate(watched, steps, len(data.classes), path))
        write_result(out, {**result, "git_commit": git_commit()}, [samples_out, grid_out, chains_out])
        tracker.final(result)
        tracker.artifact(grid_out)
        tracker.artifact(chains_out)


def _samples(path: Path, data: Prepared) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) of samples.npz and the classes (N,) they began at. Raises FileError where they are not of these data."""
    found = read_npz(path, ["images", "labels"])
    with reading(path, largest=None):
        images, labels = found["images"], found["labels"]
        if images.dtype != np.uint8 or images.shape[1:] != data.image_shape or labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"uint8 images of shape {data.image_shape} and their int64 classes are needed")
        if not len(labels) or labels.min() < 0 or labels.max() >= len(data.classes):
            raise ValueError(f"classes 0 to {len(data.classes) - 1} are needed")
        return torch.from_numpy(images), torch.from_numpy(labels)


def energy(
    context: Context,
    experiment: str,
    seed: int,
    data_path: Path,
    weights: Path,
    samples: Path,
    out: Path,
    values_out: Path,
    figure_out: Path,
    threads: int | None,
) -> None:
    from ebjdat.evaluation import energy as energy_landscape
    from ebjdat.report import figures

    data = prepared.load(data_path)
    device = context.device(threads)
    loaded = checkpoint.load_for(context.profile, experiment, weights, data)
    settings, attack_settings = context.profile.evaluation.energy, context.profile.evaluation.attack
    with context.track_result(experiment, seed, "energy", data, out) as tracker:
        model = UnitRange(loaded.network(device)).eval()
        test = DeviceData(data, "test", device, settings.n)
        x, y = test.unit(), test.labels
        moved = robust.pgd_examples(model, x, y, attack_settings.standard, attack_settings.seed, attack_settings.batch_size)
        images, labels = _samples(samples, data)
        generated = unit_from_uint8(images.to(device))
        groups = {"clean": (x, y), "adversarial": (moved, y), "generated": (generated, labels.to(device))}
        marginal, joint = {}, {}
        for name, (points, classes) in groups.items():
            marginal[name], joint[name] = energy_landscape.energies(model, points, classes, settings.batch_size)
        result = energy_landscape.landscape(**marginal)
        result |= {f"joint_{k}": v for k, v in energy_landscape.landscape(**joint).items() if k.startswith("energy_gap")}

        write_npz(values_out, {**marginal, **{f"joint_{k}": v for k, v in joint.items()}})
        title = f"{experiment}, seed {seed}"
        write_atomic(figure_out, lambda path: figures.save(figures.energy_histograms({title: marginal}, {title: joint}), path))
        write_result(out, {**result, "git_commit": git_commit()}, [values_out, figure_out])
        tracker.final(result)
        tracker.artifact(figure_out)
