"""Stages `generate` and `energy`: checkpoint -> measurements, samples, figures.

matplotlib and scipy take a second each to import, so only the stages that use them do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.evaluation import frechet, robust
from ebjdat.evaluation import generate as generation
from ebjdat.files import read_npz, reading, write_atomic, write_npz
from ebjdat.models.modes import UnitRange
from ebjdat.pixels import unit_from_uint8
from ebjdat.samplers.starts import StartPool
from ebjdat.stages.context import Context
from ebjdat.stages.evaluation import Task, open_evaluation
from ebjdat.training import checkpoint


def generate(context: Context, task: Task) -> None:
    """Run fresh chains; measure them and the replay buffer.

    Inputs: data, weights, reference (the reference classifier's checkpoint). Outputs: out, samples, grid, chains.
    """
    from ebjdat.report import figures

    settings = context.profile.evaluation.generate
    with open_evaluation(context, task, "generate") as evaluation:
        data, device, loaded = evaluation.data, evaluation.device, evaluation.checkpoint
        model = loaded.network(device)
        reference = checkpoint.load(task.inputs["reference"], data_hash=data.data_hash).network(device)
        # before the chains: their time would be wasted without an extractor
        name, features = frechet.choose_extractor(reference, settings, device, data.image_shape[0])
        pool = StartPool.of(DeviceData(data, "train", device), torch.from_numpy(data.class_mean))
        chain = loaded.header.training.chain
        fresh, starts = generation.fresh_chains(model, pool, chain, settings, evaluation.title)
        conditional, _ = generation.fresh_chains(model, pool, chain, settings, f"{evaluation.title}, conditional", conditional=True)
        buffer = None
        if loaded.buffer is not None and loaded.buffer_labels is not None:
            buffer = generation.Samples(loaded.buffer, loaded.buffer_labels)
        every = features(torch.from_numpy(data.images))
        real = {"train": every[data.train], "all": every}
        samples = {"fresh": fresh, "conditional": conditional, "buffer": buffer}
        evaluation.metrics = generation.measure(model, samples, starts, real, name, features, settings)
        if loaded.ema is not None:
            averaged = loaded.network(device, loaded.ema)
            of_ema, _ = generation.fresh_chains(averaged, pool, chain, settings, f"{evaluation.title}, averaged")
            evaluation.metrics["ema_frechet"] = frechet.frechet_distance(features(of_ema.images), real["train"])

        arrays = {"images": fresh.images, "labels": fresh.labels, "conditional": conditional.images}
        write_npz(task.outputs["samples"], {key: value.cpu().numpy() for key, value in arrays.items()})
        panels = {"training images": data.split("train")}
        titled = {
            f"{task.experiment}, seed {task.seed}: fresh chains down E(x)": fresh,
            "fresh chains down E(x, y)": conditional,
            "replay buffer": buffer,
        }
        panels |= {title: (of.images.cpu().numpy(), of.labels.cpu().numpy()) for title, of in titled.items() if of is not None}
        grid = figures.sample_grids(panels, data.classes, settings.grid, columns=2)
        write_atomic(task.outputs["grid"], lambda path: figures.save(grid, path))
        watched = {}
        for title, of_class in (("down E(x)", False), ("down E(x, y)", True)):
            frames, steps = generation.watched_chains(model, pool, chain, settings, conditional=of_class)
            watched[title] = frames.cpu().numpy()
        write_atomic(task.outputs["chains"], lambda path: figures.animate(watched, steps, len(data.classes), path))


def energy(context: Context, task: Task) -> None:
    """Energies of clean, adversarial and generated images, and their gaps.

    Inputs: data, weights, samples (of `generate`). Outputs: out, values, figure.
    """
    from ebjdat.evaluation import energy as energy_landscape
    from ebjdat.report import figures

    settings, attack = context.profile.evaluation.energy, context.profile.evaluation.attack
    with open_evaluation(context, task, "energy") as evaluation:
        model = UnitRange(evaluation.checkpoint.network(evaluation.device)).eval()
        test = DeviceData(evaluation.data, "test", evaluation.device, settings.n)
        x, y = test.unit(), test.labels
        adversarial = robust.pgd_examples(model, x, y, attack.standard, attack.seed, attack.batch_size)
        images, labels = read_samples(task.inputs["samples"], evaluation.data)
        generated = unit_from_uint8(images.to(evaluation.device))
        groups = {"clean": (x, y), "adversarial": (adversarial, y), "generated": (generated, labels.to(evaluation.device))}
        marginal, joint = {}, {}
        for name, (points, classes) in groups.items():
            marginal[name], joint[name] = energy_landscape.energies(model, points, classes, settings.batch_size)
        evaluation.metrics = energy_landscape.landscape(**marginal)
        gaps = energy_landscape.landscape(**joint)
        evaluation.metrics |= {f"joint_{k}": v for k, v in gaps.items() if k.startswith("energy_gap")}
        attacked = {energy_landscape.UNTARGETED: marginal["adversarial"]}
        for name, score in energy_landscape.ATTACKS.items():
            moved = robust.pgd_examples(model, x, y, attack.standard, attack.seed, attack.batch_size, score)
            attacked[name], _ = energy_landscape.energies(model, moved, y, settings.batch_size)
        evaluation.metrics |= energy_landscape.changes(marginal["clean"], attacked)

        write_npz(task.outputs["values"], {**marginal, **{f"joint_{k}": v for k, v in joint.items()}})
        title = f"{task.experiment}, seed {task.seed}"
        histograms = figures.energy_histograms({f"{title}: E(x)": marginal, f"{title}: E(x, y)": joint})
        write_atomic(task.outputs["figure"], lambda path: figures.save(histograms, path))


def read_samples(path: Path, data: Prepared) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) of samples.npz and the classes (N,) of their starts. Raises FileError where they are not of these data."""
    arrays = read_npz(path, ["images", "labels"])
    with reading(path, largest=None):
        images, labels = arrays["images"], arrays["labels"]
        if images.dtype != np.uint8 or images.shape[1:] != data.image_shape or labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"uint8 images of shape {data.image_shape} and their int64 classes are needed")
        if not len(labels) or labels.min() < 0 or labels.max() >= len(data.classes):
            raise ValueError(f"classes 0 to {len(data.classes) - 1} are needed")
        return torch.from_numpy(images), torch.from_numpy(labels)
