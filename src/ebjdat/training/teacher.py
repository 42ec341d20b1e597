"""The frozen network that a distilled training learns from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ebjdat.data.prepared import Prepared
from ebjdat.files import digest
from ebjdat.models.external import external_model
from ebjdat.models.modes import InternalRange
from ebjdat.settings import TeacherSettings
from ebjdat.training import checkpoint
from ebjdat.training.state import TrainingError


@dataclass(frozen=True)
class Teacher:
    """network: takes images in [-1, 1], in eval mode, without gradients for its parameters. digest: of its weights."""

    network: nn.Module
    digest: str

    @classmethod
    def load(cls, settings: TeacherSettings, file: Path | None, data: Prepared, device: torch.device) -> Teacher:
        """The network that the settings name. file: the checkpoint of the experiment; an external network's weights, those of the settings.

        Raises CheckpointError for a checkpoint of other data, ModelError for a network that cannot be made, TrainingError for one that
        does not classify these images into these classes, and where the checkpoint is not given.
        """
        network: nn.Module
        if settings.model is None:
            if file is None:
                raise TrainingError(f"training.teacher: the checkpoint of {settings.experiment} is needed; give it with --teacher")
            network = checkpoint.load(file, data_hash=data.data_hash, image_shape=data.image_shape, classes=data.classes).network(device)
        else:
            named = Path(settings.weights) if settings.weights else None  # a missing file is refused, not left out
            network = InternalRange(external_model(settings.model, file or named, settings.weights_key, device)).eval()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        name = settings.model or settings.experiment
        try:
            with torch.no_grad():
                logits = network(torch.zeros(2, *data.image_shape, device=device))
            shape = tuple(logits.shape)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise TrainingError(f"training.teacher: {name} cannot take images {data.image_shape}: {error}") from error
        if shape != (2, len(data.classes)):
            raise TrainingError(f"training.teacher: {name} gives {shape} for 2 images; these data have {len(data.classes)} classes")
        parts = [checkpoint.content(v).tobytes() for v in network.state_dict().values() if isinstance(v, Tensor)]
        return cls(network, digest(*parts))
