"""Stage `teacher`: what a student's teacher says of the training images that a recipe of adversarial training does not learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from ebjdat.data.batches import DeviceData
from ebjdat.errors import DataError
from ebjdat.evaluation import teaching
from ebjdat.evaluation.detection import finite_rows, logits_of
from ebjdat.files import write_npz
from ebjdat.models.modes import UnitRange
from ebjdat.progress import Bar
from ebjdat.report.collect import read_curve
from ebjdat.stages.context import Context
from ebjdat.stages.evaluation import Task, open_evaluation
from ebjdat.training import checkpoint
from ebjdat.training.teacher import Teacher


def run(context: Context, task: Task, recipes: Sequence[Path]) -> None:
    """Entropy and confidence of the teacher on what `recipes`, checkpoints of one experiment, learn of the training images and do not.

    Inputs: data, weights and curve of the student, teacher. Outputs: out, values (arrays over the training images). Raises DataError
    where the teacher's logits are not finite.
    """
    settings, attack = context.profile.evaluation.teacher, context.profile.attack_settings(task.experiment)
    named = context.profile.training_settings(task.experiment).teacher
    assert settings is not None
    assert named is not None
    protocol = attack.standard.model_copy(update={"pgd": attack.standard.pgd.model_copy(update={"steps": settings.steps})})
    with open_evaluation(context, task, "teacher") as evaluation:
        data, device, size = evaluation.data, evaluation.device, settings.batch_size
        train = DeviceData(data, "train", device, settings.n)
        x, y = train.unit(), train.labels
        teacher = Teacher.load(named, task.inputs.get("teacher"), data, device)
        with Bar(f"{evaluation.title}: PGD on training images", len(recipes)) as bar:

            def networks() -> Iterator[nn.Module]:
                for path in recipes:
                    yield UnitRange(checkpoint.load(path, data_hash=data.data_hash).network(device)).eval()
                    bar.advance()

            found = teaching.learned(networks(), x, y, protocol, attack.seed, size)
        logits = logits_of(UnitRange(teacher.network).eval(), x, size)
        if not finite_rows(logits).all():
            raise DataError("the teacher's logits are not finite on training images; nothing can be learned from it")
        best = read_curve(task.inputs["curve"]).get("validation_robust_acc")
        sets = teaching.sets_of(found, attack.seed)
        evaluation.metrics = {
            "n_teaching": len(x),
            "n_recipes": found.networks,
            "teaching_steps": settings.steps,
            **teaching.certainty(logits, sets),
            "robust_overfitting": None if best is None or not len(best) else float(best.max() - best.iloc[-1]),
        }
        write_npz(task.outputs["values"], {"robust": found.robust, "cross_entropy": found.cross_entropy, "logits": logits, **sets})
