"""Whatever an external network does: the same verdicts, or an error in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebjdat.errors import AttackError
from ebjdat.evaluation import robust
from ebjdat.evaluation.audit import audit
from ebjdat.settings import AttackSettings

from ..conftest import Linear
from ..networks import N, Of, images, labelled, plain, refusing, settings


class InPlace(nn.Module):
    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.network, self.change = plain(), change

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        return self.network(x)


class Uncopied(nn.Module):
    """Holds what cannot be copied or pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.generator = plain(), (i for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def normed(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Used once in train mode, so that old hooks keep a result of a pass."""
    model = plain()
    model[1] = wrap(model[1])
    model.train()(images())
    return model.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: normed(nn.utils.spectral_norm),
        lambda: normed(nn.utils.weight_norm),
        lambda: normed(nn.utils.parametrizations.spectral_norm),
        lambda: normed(nn.utils.parametrizations.weight_norm),
        lambda: nn.DataParallel(plain()),
        lambda: torch.jit.trace(plain(), images()),
        lambda: InPlace(lambda x: x.mul_(1.0)),
        Uncopied,
    ],
    ids=["spectral, hook", "weight, hook", "spectral", "weight", "parallel", "TorchScript", "in place", "not copied"],
)
def test_verdicts_are_those_of_the_plain_network(make: Callable[[], nn.Module]) -> None:
    """Also by two processes, of which some networks cannot be handed to any. The network is left as it was."""
    torch.manual_seed(0)
    model, x = make(), images(30)

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x.clone())

    with torch.no_grad():
        y = labelled(model, x.clone())
        before = model(x.clone())
    model.train()
    given = x.clone()
    asked = settings(0.012, 30, batch_size=10)
    quick = asked.protocols["quick"].model_copy(update={"attacks": {"apgd_ce": asked.protocols["quick"].attacks["apgd_ce"]}})
    asked = asked.model_copy(update={"protocols": {"standard": settings(0.012, 0).standard, "quick": quick}})
    found = robust.evaluate(model, given, y, "quick", asked, workers=2 if isinstance(model, Uncopied) else 1)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    expected = robust.evaluate(Plain().eval(), x, y, "quick", asked)
    assert torch.equal(given, x)
    assert all(torch.equal(found.robust[name], expected.robust[name]) for name in expected.robust)
    assert 0 < int(found.robust_under(["pgd20", "apgd_ce"]).sum()) < 26
    with torch.no_grad():
        assert torch.equal(model(x.clone()), before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (InPlace(lambda x: x.data.sub_(0.02)), r"changes the images it is given; let its forward begin with x = x.clone\(\)"),
        (InPlace(lambda x: x.sub_(0.5).div_(0.5)), "changes the images it is given"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()),
            r"failed on images of shape \(1, 1, 4, 4\), in \[0, 1\]: RuntimeError: Given groups=1",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), "returned one logit; two classes need two"),
        (InPlace(lambda x: {}["setting"]), "failed on images of shape .*: KeyError: 'setting'"),
        (Of(Linear(), lambda z: z[:, :0]), "the network returned no logits; two classes need two"),
        (Of(Linear(), lambda z: z / 0), "not finite"),
        (nn.Identity(), "logits of shape"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
            "'standard': apgd_t needs at least 4 classes, the data have 3; set its n to 0; .*use protocols.standard_binary={eps: 0.01, ",
        ),
    ],
)
def test_networks_that_cannot_be_evaluated_are_refused_in_a_line(model: nn.Module, message: str) -> None:
    x = images()
    before = x.clone()
    with pytest.raises(AttackError, match=message) as raised:
        robust.evaluate(model.eval(), x, torch.zeros(len(x), dtype=torch.int64), "standard", settings(0.01))
    assert str(raised.value).isprintable()
    assert torch.equal(x, before)


class Backward(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        raise ctx.error


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class After(nn.Module):
    """A network with something on the way out, once it was called `late` times."""

    def __init__(self, change: Callable[[Tensor], Any], late: int = 0) -> None:
        super().__init__()
        self.network, self.change, self.late, self.calls = plain(), change, late, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        logits = self.network(x)
        return self.change(logits) if self.calls > self.late else logits


@pytest.mark.parametrize("late", [0, 4, 30])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: Backward.apply(z, ValueError("once\nonly")), "no gradient can be taken through the network: ValueError: once only"),
        (lambda z: Backward.apply(z, SystemExit(3)), "no gradient can be taken through the network: SystemExit: 3"),
        (lambda z: sys.exit(3), r"the network failed on images of shape \(\d+, 1, 4, 4\), in \[0, 1\]: SystemExit: 3"),
        (lambda z: z[: len(z) // 2], r"returned a tensor of shape \(\d+, 10\) for .*; logits of shape \(\d+, classes\) are needed"),
        (lambda z: z[:, : 10 - (len(z) > 1)], r"returned \d+ logits for each of .*, and \d+ before"),
        (lambda z: {"logits": z}, "returned dict for"),
        (lambda z: z[..., None, None], r"returned a tensor of shape \(\d+, 10, 1, 1\) for"),
        (lambda z: z.to(torch.complex64), r"returned a tensor of complex64 of shape \(\d+, 10\)"),
        (lambda z: z.round().long(), r"returned a tensor of int64 of shape \(\d+, 10\)"),
        (lambda z: refusing(Wordless())(), r"the network failed on images of shape \(\d+, 1, 4, 4\), in \[0, 1\]: Wordless$"),
        (lambda z: z.detach(), "passes no gradient on to its input"),
    ],
)
def test_whatever_a_network_does_whenever_is_one_line(change: Callable[[Tensor], Any], message: str, late: int) -> None:
    """At the first call, or in the midst of an attack."""
    x = images(30)
    asked = settings(0.012, 0, batch_size=16)
    with pytest.raises(AttackError, match=message) as raised:
        robust.evaluate(After(change, late).eval(), x, plain()(x).argmax(1), "standard", asked)
    assert str(raised.value).isprintable()


def test_a_key_stops_also_a_network() -> None:
    x = images()
    for change in (lambda z: refusing(KeyboardInterrupt())(), lambda z: Backward.apply(z, KeyboardInterrupt())):
        with pytest.raises(KeyboardInterrupt):
            robust.evaluate(After(change).eval(), x, torch.zeros(len(x), dtype=torch.int64), "standard", settings(0.01, 0))


@pytest.mark.parametrize("change", [Tensor.bfloat16, Tensor.half, Tensor.double, lambda z: z.as_subclass(type("Kind", (Tensor,), {}))])
def test_logits_of_another_kind_are_as_good(change: Callable[[Tensor], Tensor]) -> None:
    """As those that are rounded alike and then made fp32."""
    x = images(30)
    y = plain()(x).argmax(1)
    asked = settings(0.012, 0)
    both = (change, lambda z: change(z).as_subclass(Tensor).float())
    found, expected = (robust.evaluate(After(f).eval(), x, y, "standard", asked) for f in both)
    assert torch.equal(found.prediction, expected.prediction)
    assert torch.equal(found.robust["pgd20"], expected.robust["pgd20"])
    assert 0 < int(found.robust_under(["pgd20"]).sum()) < 30


def test_a_network_that_sets_the_seed_of_attacks_is_refused() -> None:
    """Square would draw the same squares at every step. One that puts the generator back is fine."""
    x = images()
    y = plain()(x).argmax(1)

    def seeded(z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return z

    def own(z: Tensor) -> Tensor:
        with torch.random.fork_rng():
            return seeded(z)

    before = torch.get_rng_state()
    with pytest.raises(AttackError, match="sets torch's random seed"):
        robust.evaluate(After(seeded).eval(), x, y, "standard", settings(0.01, 0))
    robust.evaluate(After(own).eval(), x, y, "standard", settings(0.01, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_are_shown_once_before_an_attack() -> None:
    """One pass under each protocol; what changes its images is refused in it, before any attack."""
    x, seen = images(40), []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Linear()

        def forward(self, x: Tensor) -> Tensor:
            if not x.requires_grad:
                seen.append(len(x))
            return self.network(x)

    one = {"eps": 0.01, "n": 0, "pgd": {"step_size": 0.01}}
    asked = AttackSettings.model_validate({"protocols": {"standard": one, "released": one}, "batch_size": 40})
    y = (Linear()(x).argmax(1) + 1) % 10  # nothing stands, nothing is attacked
    audit(Counted().eval(), x, y, asked, with_checks=False)
    assert sum(n for n in seen if n == 40) == 2 * 40


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.arange(N) % 10 + 1, "labels go up to 10, but the network has 10 classes; they seem to start at 1"),
        (torch.arange(N) % 12, "labels go up to 11, but the network has 10 classes$"),
        (torch.arange(N) % 10 - 1, "labels go down to -1, but the network has 10 classes$"),
    ],
)
def test_labels_that_are_not_the_networks_classes_are_refused(y: Tensor, message: str) -> None:
    with pytest.raises(AttackError, match=message):
        robust.evaluate(Linear().eval(), images(), y, "standard", settings(0.01, 0))
