"""What an edit makes out of date, stage by stage; and that nothing is executed that the digest does not hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from ebjdat import codehash, registry
from ebjdat.jobs import NAMED_BY, STAGES
from ebjdat.registry import Entry
from ebjdat.settings import Profile, load

from .conftest import ROOT

Edit = Callable[[str], str]
Changed = Callable[[str | None, Edit], set[tuple[str, str]]]
Digests = dict[tuple[str, str], str]
SADAJEM = {("finetune", "sadajem"), ("finetune", "eb_jdat_sadajem"), ("generate", "sadajem"), ("generate", "eb_jdat_sadajem")}


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load(ROOT / "params/digits-full.yaml")


def digests(profile: Profile) -> Digests:
    """(stage, experiment or pretraining) -> digest of its code."""
    names = {"prepare": [""], "report": [""], "pretrain": [*profile.pretraining]}
    return {
        (stage, name): spec.digest(profile, name)
        for stage, spec in STAGES.items()
        for name in names.get(stage, [*profile.experiments])
        if spec.needs(profile, name)
    }


@pytest.fixture(scope="module")
def before(profile: Profile) -> Digests:
    return digests(profile)


@pytest.fixture
def changed(profile: Profile, before: Digests, monkeypatch: pytest.MonkeyPatch) -> Changed:
    """Jobs that are out of date after an edit of a module's text, or of all modules' (None)."""
    source, parsed = codehash.source, codehash.parsed

    def after(module: str | None, edit: Edit) -> set[tuple[str, str]]:
        monkeypatch.setattr(codehash, "source", lambda name: edit(source(name).decode()).encode())
        anew = cache(parsed.__wrapped__)
        monkeypatch.setattr(codehash, "parsed", lambda name: anew(name) if module in (None, name) else parsed(name))
        now = digests(profile)
        return {job for job in before if now[job] != before[job]}

    return after


def replaced(module: str, old: str, new: str) -> Edit:
    assert old in codehash.source(module).decode()
    return lambda text: text.replace(old, new)


def of(before: Digests, *stages: str) -> set[tuple[str, str]]:
    return {job for job in before if job[0] in stages}


NOTHING = {
    "a docstring": ("ebjdat.training.state", '"""The best checkpoint', '"""The very best checkpoint'),
    "a comment": ("ebjdat.samplers.starts", "# added to the diagonal", "# is added to the diagonal"),
    "a message": ("ebjdat.errors", "def brief", "import os\n\n\ndef brief"),
    "an annotation": ("ebjdat.objectives.recipes", "def eb_jdat(model: nn.Module,", "def eb_jdat(model: torch.nn.Module,"),
    "a validator": ("ebjdat.settings.evaluation", "both", "the two"),
    "a new setting": ("ebjdat.settings.evaluation", "    steps: Steps = 20\n", "    steps: Steps = 20\n    momentum: float = 0.0\n"),
    "the command line": ("ebjdat.cli", "def attack(", "def attack_(a: int) -> None: ...\n\n\ndef attack("),
    "the report": ("ebjdat.report.page", "def write(", "def write_(a: int) -> None: ...\n\n\ndef write("),
    "MLflow": ("ebjdat.tracking.tracker", "def numbers(", "def more(a: int) -> None: ...\n\n\ndef numbers("),
    "a function that no stage uses": ("ebjdat.bench.naive", "import", "import os\nimport"),
    "a new strategy": ("ebjdat.samplers.sgld", "def sgld(", "def other(x):\n    return x\n\n\ndef sgld("),
}


@pytest.mark.parametrize("edit", NOTHING.values(), ids=NOTHING)
def test_these_edits_make_nothing_out_of_date(edit: tuple[str, str, str], changed: Changed) -> None:
    assert changed(edit[0], replaced(*edit)) == set()


def test_formatting_makes_nothing_out_of_date(changed: Changed) -> None:
    def narrow(text: str) -> str:
        command = [str(Path(sys.executable).parent / "ruff"), "format", "--isolated", "--line-length", "50", "-"]
        formatted = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
        assert formatted != text or text.count("\n") < 10 or "# fmt: off" in text
        return formatted

    assert changed(None, narrow) == set()


def test_a_sampler_is_for_the_trainings_and_chains_that_name_it(changed: Changed) -> None:
    edit = ("ebjdat.samplers.sgld", "x = x.clamp(*INTERNAL)", "x = x.clamp(-1, 1)")
    assert changed(edit[0], replaced(*edit)) == SADAJEM


@pytest.mark.parametrize(
    ("module", "old", "new", "stages"),
    [
        ("ebjdat.training.validation", "BATCH = ", "BATCH = 0 + ", ("pretrain", "finetune")),
        ("ebjdat.models.wrn", "relu(", "relu(0 + ", ("pretrain", "finetune", "attack", "generate", "energy", "reliability")),
        ("ebjdat.evaluation.checks", "POINT = ", "POINT = 0 + ", ("attack",)),
        ("ebjdat.evaluation.autoattack", "TIE = ", "TIE = 0 + ", ("attack",)),
        ("ebjdat.evaluation.calibration", "return ", "return 0 or ", ("reliability",)),
        ("ebjdat.evaluation.frechet", "def frechet_distance(", "@torch.no_grad()\ndef frechet_distance(", ("generate",)),
        # every training is validated under it; the other stages attack with it
        (
            "ebjdat.samplers.pgd",
            "F.cross_entropy(model",
            "0 + F.cross_entropy(model",
            ("pretrain", "finetune", "attack", "energy", "reliability"),
        ),
        ("ebjdat.report.figures", '"font.size": 9', '"font.size": 8', ("generate", "energy", "reliability", "report")),
        ("ebjdat.data.sources", "def digits(", "@staticmethod\ndef digits(", ("prepare",)),
        ("ebjdat.data.decode", "return ", "return 0 or ", ("reliability",)),  # of a folder of OOD images; digits are no files
    ],
)
def test_code_is_for_the_stages_that_execute_it(
    module: str, old: str, new: str, stages: tuple[str, ...], before: Digests, changed: Changed
) -> None:
    assert changed(module, replaced(module, old, new)) == of(before, *stages)


def test_an_objective_is_for_its_method(changed: Changed) -> None:
    edit = ("ebjdat.objectives.recipes", "weights.beta * kl", "kl * weights.beta")
    assert changed(edit[0], replaced(*edit)) == {("finetune", "trades")}


def test_what_settings_compute_counts(before: Digests, changed: Changed) -> None:
    edit = ("ebjdat.settings.evaluation", "def pgd_step(self) -> float:\n", "def pgd_step(self) -> float:\n        1 + 1\n")
    found = changed(edit[0], replaced(*edit))
    assert of(before, "attack") <= found
    assert not found & of(before, "prepare", "pretrain", "finetune", "generate")


def test_what_a_strategys_row_says_counts_but_not_where_it_comes_from() -> None:
    row, digest = registry.METHODS["jempp"], partial(codehash.digest, ["ebjdat.stages.train:finetune"])
    for change, same in (
        ({"samples": ()}, False),
        ({"selection": "robust"}, False),
        ({"reads": ("steps",)}, False),
        ({"source": "x"}, True),
    ):
        assert (digest([replace(row, **change)]) == digest([row])) == same


def test_templates_count_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = [text for text in STAGES["report"].texts if "/" in text]
    assert all(any((ROOT / "src/ebjdat").glob(pattern)) for pattern in patterns)
    monkeypatch.setattr(codehash.ebjdat, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "report").mkdir()
    digests = []
    for content in ("one", "two"):
        (tmp_path / "report/page.html.j2").write_text(content)
        digests.append(codehash.digest([], texts=patterns))
    assert digests[0] != digests[1]


def test_every_registry_of_strategies_is_asked() -> None:
    """A strategy that settings name through a registry that is not asked would be executed, and not held."""
    registries = [r for r in vars(registry).values() if isinstance(r, dict) and any(isinstance(e, Entry) for e in r.values())]
    assert len(registries) > 10
    assert [r for r in registries if r is not registry.SAMPLES and not any(r is asked for asked in NAMED_BY.values())] == []


def test_a_stage_that_is_not_there_is_no_digest() -> None:
    with pytest.raises(LookupError, match="train defines no finetunes"):
        codehash.digest(["ebjdat.stages.train:finetunes"])


def test_the_package_imports_itself_in_the_forms_that_are_followed() -> None:
    """`from ebjdat.a import name`, `from ebjdat import module` or `import ebjdat.a as name`; other forms would go unseen."""
    root = ROOT / "src/ebjdat"
    wrong = []
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                wrong += [(file, a.name) for a in node.names if a.name.startswith("ebjdat.") and not a.asname]
            if isinstance(node, ast.ImportFrom):
                below = root.joinpath(*(node.module or "").split(".")[1:])
                own = (node.module or "").split(".")[0] == "ebjdat"
                packages = {a.name for a in node.names if (below / a.name).is_dir() and f"ebjdat.{a.name}" not in codehash.WITHOUT_EFFECT}
                wrong += [(file, a.name) for a in node.names if node.level or (own and a.name in packages | {"*"})]
    assert wrong == []
