"""Settings: what is accepted, and that every problem of a file is reported at once and where it is."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ebjdat import registry
from ebjdat import settings as params
from ebjdat.cli import app
from ebjdat.evaluation.frechet import ExtractorError
from ebjdat.pixels import parse_budget
from ebjdat.settings import ParamsError, merge, run_name
from ebjdat.stages import prepare

from .conftest import ROOT

PROFILES = sorted((ROOT / "params").glob("*.yaml"))


@pytest.fixture
def raw() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "params/digits.yaml").read_text())
    return content


def problems(tmp_path: Path, raw: dict[str, Any]) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError) as caught:
        params.load(file)
    return str(caught.value)


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_shipped_profiles_are_valid(path: Path) -> None:
    assert params.load(path).experiments


def test_all_problems_at_once_with_file_key_path_and_what_is_allowed(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"]["epocs"] = 3
    raw["training"]["batch_size"] = "many"
    raw["evaluation"]["attack"]["protocols"]["standard"]["eps"] = -0.1
    raw["experiments"]["pgd_at"]["method"] = "pgdat"
    raw["experiments"]["jempp"]["pretraining"] = "claen"
    raw["experiments"]["eb_jdat"]["training"] = {"adversary": {"eps": 1.5}}
    text = problems(tmp_path, raw)
    assert "training.epocs: unknown key; did you mean 'epochs'?" in text
    assert "training.batch_size: " in text
    assert "found 'many'" in text
    assert "evaluation.attack.protocols.standard.eps: input should be greater than 0, found -0.1" in text
    assert "experiments.pgd_at.method: 'pgdat' is unknown; did you mean 'pgd_at'?" in text
    assert "experiments.jempp.pretraining: 'claen' is not under `pretraining`; did you mean 'clean'?" in text
    assert all(line.strip().startswith(str(tmp_path / "mine.yaml")) for line in text.splitlines()[1:])


def test_overrides_of_experiments_are_checked_where_they_stand(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["experiments"]["eb_jdat"]["training"] = {"adversary": {"eps": 1.5, "stepz": 3}, "schedule": {"name": "cosine"}}
    text = problems(tmp_path, raw)
    assert "experiments.eb_jdat.training.adversary.eps: input should be less than or equal to 1, found 1.5" in text
    assert "experiments.eb_jdat.training.adversary.stepz: unknown key; did you mean 'step" in text
    assert "experiments.eb_jdat.training.schedule.name: 'cosine' is unknown; " in text
    assert text.count("\n") == 3


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("training.batch_size", 5000, "training.batch_size: 5000 is larger than the training split (1170 images)"),
        ("evaluation.attack.protocols.standard.eps", 0, "evaluation.attack.protocols.standard.eps: input should be greater than 0"),
        (
            "evaluation.attack.protocols.standard.eps",
            "300/255",
            "evaluation.attack.protocols.standard.eps: input should be less than or equal to 1",
        ),
        ("evaluation.attack.protocols.released.eps", "8/0", "a number or a fraction such as"),
        ("evaluation.attack.protocols.standard_l2.eps", True, "a number or a fraction such as"),
        ("evaluation.attack.protocols.released.n", 498, "more than the test split has; allowed: 0 to 497"),
        ("evaluation.attack.protocols.standard.pgd.step_size", 0.31, "more than the diameter"),
        ("evaluation.attack.protocols.standard.noise", 0.03, "are what its name means; add a protocol `like: standard`"),
        ("evaluation.attack.protocols.standard.attacks.square", None, "are what its name means"),
        ("evaluation.attack.protocols.standard.pgd.steps", 10, "are what its name means"),
        ("evaluation.attack.protocols.standard.norm", "L2", "are what its name means"),
        ("evaluation.attack.protocols.released.range", "unit", "protocols.released: norm, range, noise"),
        ("evaluation.attack.protocols.ema", {"like": "standard", "eps": 0.1, "pgd": {"step_size": 0.1}, "n": 1}, "use another name"),
        ("evaluation.attack.protocols.standard", None, "protocols: 'standard' is missing"),
        ("evaluation.attack.protocols.mine", {"eps": 0.1}, "protocol 'mine' needs `like`, the row that it stands on; allowed: standard"),
        ("evaluation.attack.protocols.standard_l2.attacks.square", {"steps": 3}, "attacks.square does not read steps; it reads queries"),
        ("evaluation.attack.protocols.released.attacks.cw", {}, "'cw' is unknown"),
        ("evaluation.attack.protocols.standard_l2.attacks.sqare", None, "'sqare' is unknown; did you mean 'square'"),
        ("evaluation.attack.protocols.standard_l2.like", "standrd", "`like` 'standrd' is unknown; did you mean 'standard'"),
        ("evaluation.attack.transfer.experiment", "nobody", "evaluation.attack.transfer.experiment: 'nobody' is not an experiment"),
        ("evaluation.generate.extractor", "inception", "Inception is for natural images"),
        ("evaluation.generate.reference.experiment", "nobody", "not an experiment of this profile"),
        ("evaluation.generate.reference.seed", 7, "not one of the profile's seeds"),
        ("model.depth", 12, "6 n + 4"),
        ("data.validation", 1300, "leave no training images"),
        ("data.test", None, "needs `test`"),
        ("data.source", "folder", "needs `path`"),
        ("data.source", "mnist", "'mnist' is unknown"),
        ("seeds", [0, 0], "each seed may stand once"),
        ("seeds", [-1], "greater than or equal to 0"),
        ("seeds", [], "at least 1 item"),
        ("training.epochs", True, "a number is allowed, found True"),
        ("training.batch_size", "64", "a number is allowed, found '64'"),
        ("training.augment.flip", 1, "valid boolean"),
        ("training.adversary.step_size", 0.31, "more than the diameter"),
        ("experiments.pgd_at.training.batch_size", 5000, "experiments.pgd_at.training.batch_size: 5000 is larger"),
        ("evaluation.energy.n", 600, "more than the test split has; allowed: 1 to 497"),
        ("evaluation.generate.n", 1, "greater than or equal to 2"),
        ("pretraining.clean.training.epochs", 3, "one level too deep; set pretraining.clean.epochs"),
        ("experiments.a.b", {"method": "classifier", "pretraining": "scratch"}, "unknown key"),
        ("training.optimizer.lr", float("nan"), "finite"),
        ("pretraining.other", {"method": "pgd_at", "epochs": 0}, "the same settings as pretraining."),
        ("experiments.pretraining", {"method": "classifier", "pretraining": "scratch"}, "kept for the shared"),
        ("experiments.a/b", {"method": "classifier", "pretraining": "scratch"}, "should match pattern"),
        ("training.schedule", {"name": "multistep", "milestones": [20]}, "at or after the last epoch"),
        ("training.chain.steps", 3, "training.chain.steps: is never used, since every row of the JEM family sets it; set bases.<base>"),
        ("training.chain.inner_steps", 3, "training.chain.inner_steps: is never used"),
        ("training.chain.clamp", 0.5, "training.chain.clamp: is never used"),
        ("experiments.jempp.base", "jempp", None),
        ("experiments.eb_jdat.training", {"chain": {"sampler": "sgld", "clamp": 0.1}}, "chain.clamp: is not read by sampler 'sgld'"),
        ("training.adversary", {"score": "kl", "start": "clean"}, "score 'kl' has no gradient at the clean image"),
        ("training.optimizer.momentum", 1, "less than 1"),
        ("bases.jempp.chain.stps", 3, "bases.jempp.chain.stps: unknown key; did you mean 'steps'?"),
        ("bases.jemp", {}, "'jemp' is unknown; did you mean 'jem"),
        ("experiments.jempp.base", "jem", "method 'jempp' has no base 'jem'; allowed: jempp"),
        ("experiments.pgd_at.form", "released", "method 'pgd_at' has no form 'released'; allowed: none"),
        ("experiments.eb_jdat.form", "papper", "'papper' is unknown; did you mean 'paper'?"),
        ("pretraining.clean.model", {"depth": 11}, "pretraining.clean.model: depth 11"),
        ("training.ema", 1, "less than 1"),
        ("data.size", 8, "`size` is for source 'folder'"),
    ],
)
def test_impossible_values(tmp_path: Path, raw: dict[str, Any], path: str, value: Any, expected: str | None) -> None:
    content: dict[str, Any] = {}
    inner = content
    *parents, last = path.split(".")
    for key in parents:
        inner = inner.setdefault(key, {})
    inner[last] = value
    if expected is None:  # a neighbour of an impossible value that is fine
        (tmp_path / "fine.yaml").write_text(yaml.safe_dump(merge(raw, content)))
        params.load(tmp_path / "fine.yaml")
    else:
        assert expected in problems(tmp_path, merge(raw, content))


def test_keys_that_stand_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("seeds: [0]\nseeds: [1]\n")
    with pytest.raises(ParamsError, match="'seeds' stands twice"):
        params.load(tmp_path / "p.yaml")


def test_missing_profile_names_the_nearest() -> None:
    with pytest.raises(ParamsError, match="did you mean 'digits'"):
        params.load(ROOT / "params/digts.yaml")


def test_problem_names_the_override_it_comes_from() -> None:
    with pytest.raises(ParamsError, match=r"override 'training.epochs=-1': training.epochs: "):
        params.load(ROOT / "params/digits.yaml", ["training.epochs=-1"])


def test_overrides_and_method_defaults_reach_the_training() -> None:
    profile = params.load(ROOT / "params/digits.yaml", ["training.epochs=7", "experiments.pgd_at.training.epochs=3"])
    assert profile.training_settings("eb_jdat").epochs == 7
    assert profile.training_settings("pgd_at").epochs == 3
    assert profile.training_settings("eb_jdat").adversary.score == "energy"
    assert profile.training_settings("pgd_at").adversary.score == "ce"
    own = params.load(ROOT / "params/digits.yaml", ["experiments.eb_jdat.training.adversary.score=ce"])
    assert own.training_settings("eb_jdat").adversary.score == "ce"


def test_rows_of_the_family_stand_between_the_profile_and_the_experiment() -> None:
    """training < published row < the profile's bases < method < form < the experiment's own."""
    path = ROOT / "params/digits-full.yaml"
    full = params.load(path)
    sada = full.training_settings("eb_jdat_sadajem")
    assert (sada.chain.sampler, sada.update.name, sada.augment.density) == ("clipped_sgld", "sam", "plain")  # the row's
    assert (sada.chain.step_size, sada.update.rho) == (0.5, 0.5)  # the profile's, over the row's 1.0 and 2.0
    assert sada.chain.buffer == 1000  # the profile's training
    own = params.load(path, ["experiments.eb_jdat_sadajem.training.chain.step_size=0.7"])
    assert own.training_settings("eb_jdat_sadajem").chain.step_size == 0.7
    released = full.training_settings("eb_jdat_released")
    assert (released.weights.w2, released.adversary.score, released.adversary.project) == (-0.1, "released", False)
    assert full.training_settings("eb_jdat_ce").adversary.score == "ce"
    assert full.training_settings("pgd_at").chain.sampler == "pyld"  # unused there
    assert full.model_settings("clean_no_norm").norm == "none"
    assert full.model_settings("clean").norm == "batch"
    assert full.resolved("jem")["model"]["norm"] == "none"
    assert full.training_settings("trades").adversary.start == "gaussian"
    soft = params.load(path, ["training.weights.beta=3"])
    assert soft.training_settings("trades").weights.beta == 3


def test_the_rows_are_those_of_the_published_table() -> None:
    """JEM: SGLD, step 1, noise 0.01, 20 steps, uniform, eval; JEM++: PYLD, 10 x 5 of 0.2; SADA-JEM: 5 of 1.0, SAM rho 2 adaptive."""
    chains = {name: row.defaults["chain"] for name, row in registry.BASES.items()}
    jem, jempp, sada = chains["jem"], chains["jempp"], chains["sadajem"]
    assert (jem["sampler"], jem["step_size"], jem["noise"], jem["steps"], jem["start"], jem["mode"]) == (
        "sgld",
        1,
        0.01,
        20,
        "uniform",
        "eval",
    )
    assert registry.BASES["jem"].defaults["optimizer"] == {"name": "adam", "lr": 1e-4, "momentum": 0.9, "weight_decay": 0}
    assert (jempp["sampler"], jempp["steps"], jempp["inner_steps"], jempp["step_size"], jempp["clamp"]) == ("pyld", 10, 5, 0.2, 1)
    assert (sada["sampler"], sada["steps"], sada["step_size"], sada["clamp"]) == ("clipped_sgld", 5, 1, 1)
    assert {c["start"] for c in (jempp, sada)} == {"class_gaussians"}
    assert {c["noise"] for c in (jempp, sada)} == {0}
    assert {c["mode"] for c in (jempp, sada)} == {"train"}


def test_every_method_with_chains_stands_on_a_row() -> None:
    for name, method in registry.METHODS.items():
        assert bool(method.bases) == ("negatives" in method.samples), name
        assert set(method.bases) <= set(registry.BASES)
        assert set(method.forms) <= set(registry.FORMS)


def test_check_says_what_a_profile_is_and_whether_its_images_are_there(tmp_path: Path) -> None:
    words = ["check", "--params", str(ROOT / "params/cifar10-folder.yaml"), "--override"]
    absent = CliRunner().invoke(app, [*words, f"data.path={tmp_path / 'images.tar.xz'}"])
    assert absent.exit_code == 0
    assert "fine; " in absent.stdout
    assert "images.tar.xz is not here yet" in absent.stderr
    assert CliRunner().invoke(app, [*words, f"data.path={tmp_path}"]).stderr == ""


def test_check_says_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "images/train" / name).mkdir(parents=True)
    words = [f"data.path={tmp_path}/images", f"evaluation.reliability.ood_path={tmp_path}/gone"]
    options = [option for word in words for option in ("--override", word)]
    told = CliRunner().invoke(app, ["check", "--params", str(ROOT / "params/cifar10-folder.yaml"), *options])
    assert told.exit_code == 1
    assert f"evaluation.reliability.ood_path: {tmp_path}/gone is not here" in told.stderr
    assert "needs at least 4 classes, here are 2" in told.stderr
    told = CliRunner().invoke(
        app, ["check", "--params", str(ROOT / "params/cifar10-folder.yaml"), *options, "--override", f"data.path={'x' * 300}"]
    )
    assert told.exit_code == 1
    assert "data.path: xxx" in told.stderr
    assert "File name too long" in told.stderr
    assert f"evaluation.reliability.ood_path: {tmp_path}/gone is not here" in told.stderr


def test_an_override_that_is_neither_a_setting_nor_a_file_is_told_what_is_allowed() -> None:
    with pytest.raises(ParamsError, match=r"^training\.epochs: there is no such file; key\.path=value or a YAML file is allowed$"):
        params.load(ROOT / "params/digits.yaml", ["training.epochs"])
    with pytest.raises(ParamsError, match=r"^checks\.n: there is no such file; key\.path=value or a YAML file is allowed$"):
        params.usual_protocols(10, ["checks.n"])
    with pytest.raises(ParamsError, match=r"params/digit\.yaml: there is no such file; .*digits"):
        params.load(ROOT / "params/digit.yaml", [])
    with pytest.raises(ParamsError, match=r"params/digit: there is no such file; .*digits"):
        params.load(ROOT / "params/digit", [])


def test_the_catalogue_lists_everything_with_source_and_defaults() -> None:
    """What `ebjdat methods --json` prints, against the registry."""
    done = subprocess.run([sys.executable, "-m", "ebjdat", "methods", "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for kind in ("methods", "bases", "forms", "samplers", "starts", "scores", "updates", "optimizers", "schedules"):
        assert set(found[kind]) == set(getattr(registry, kind.upper()))
        assert all(entry["source"] and "defaults" in entry for entry in found[kind].values())
    assert found["methods"]["sadajem"]["defaults"]["update"] == {"name": "sam", "rho": 2.0, "adaptive": True}
    assert found["methods"]["trades"]["defaults"]["adversary"]["score"] == "kl"
    assert found["methods"]["eb_jdat"]["bases"] == ["jempp", "jem", "sadajem"]
    assert found["samplers"]["pyld"]["defaults"] == {"steps": 10, "inner_steps": 5, "step_size": 0.2, "noise": 0.0, "clamp": 1.0}
    assert found["updates"]["sam"]["defaults"] == {"rho": 2.0, "adaptive": True}


def test_params_hash_follows_what_determines_the_result() -> None:
    base = params.load(ROOT / "params/digits.yaml")

    def changed(*overrides: str) -> set[str]:
        other = params.load(ROOT / "params/digits.yaml", overrides)
        return {e for e in base.experiments if other.params_hash(e, 0) != base.params_hash(e, 0)}

    assert changed("runtime.threads=2", "runtime.device=auto", "report.paper=null") == set()
    assert changed("experiments.eb_jdat.training.epochs=2") == {"eb_jdat"}
    assert changed("pretraining.clean.epochs=2") == {"pgd_at", "jempp", "eb_jdat"}
    assert (
        changed("evaluation.attack.protocols.standard.eps=0.1")
        == changed("model.width=1")
        == changed("data.split_seed=1")
        == set(base.experiments)
    )
    assert changed("data.path=elsewhere", "data.label=mine") == set()
    assert changed("experiments.jempp.method=eb_jdat") == {"jempp"}
    assert changed("pretraining.clean.method=pgd_at") == {"pgd_at", "jempp", "eb_jdat"}
    assert base.params_hash("eb_jdat", 0) != base.params_hash("eb_jdat", 1)


def test_run_names_keep_overridden_results_apart() -> None:
    assert run_name("params/digits.yaml") == "digits"
    assert run_name("params/digits.yaml", ["params/overrides/ci.yaml"]) == "digits+ci"
    assert run_name("params/digits.yaml", ["a.b=1"]) != run_name("params/digits.yaml", ["a.b=2"])


def test_every_registered_strategy_can_be_imported() -> None:
    registries = [v for k, v in vars(registry).items() if k.isupper() and k[0] != "_" and k not in ("RELEASE", "FEWEST_CLASSES")]
    assert len(registries) >= 9
    for entries in registries:
        for name, entry in entries.items():
            assert isinstance(entry, registry.Preset) or callable(registry.load(entries, name)), name
            assert entry.source


@given(st.integers(0, 255), st.integers(1, 255))
def test_budgets_as_fractions(a: int, b: int) -> None:
    assert parse_budget(f"{a}/{b}") == a / b == parse_budget(f" {a} / {b} ")


@given(st.dictionaries(st.sampled_from("abc"), st.integers() | st.dictionaries(st.sampled_from("abc"), st.integers())))
def test_merge_leaves_its_arguments_alone(content: dict[str, Any]) -> None:
    before = copy.deepcopy(content)
    merged = merge(content, {"a": {"b": 1}})
    assert content == before
    assert merged["a"]["b"] == 1


def test_protocols_stand_on_their_rows_and_say_their_radius() -> None:
    attack = params.load(ROOT / "params/cifar10.yaml").evaluation.attack
    standard, released, l2 = (attack.protocols[name] for name in ("standard", "released", "standard_l2"))
    assert list(standard.attacks) == ["apgd_ce", "apgd_t", "fab_t", "square"]
    assert [standard.attacks[name].steps for name in ("apgd_ce", "apgd_t", "fab_t")] == [100, 100, 100]
    assert standard.attacks["square"].queries == 5000
    assert (standard.radius * 255, standard.pgd_step * 255) == (pytest.approx(8), pytest.approx(2))
    assert list(released.attacks) == ["apgd_ce", "apgd_dlr", "fab_t", "square"]
    assert [released.attacks[name].steps for name in ("apgd_ce", "apgd_dlr", "fab_t")] == [20, 20, 20]
    assert (released.attacks["fab_t"].range, released.attacks["fab_t"].targets) == ("internal", 9)
    assert (released.radius * 255, released.pgd_step * 255) == (pytest.approx(4), pytest.approx(0.5))  # half of what it states
    assert l2.attacks == standard.attacks
    assert (l2.norm, l2.radius) == ("L2", 0.5)
    without = params.load(ROOT / "params/cifar10.yaml", ["evaluation.attack.protocols.standard_l2.attacks.fab_t=null"])
    assert list(without.evaluation.attack.protocols["standard_l2"].attacks) == ["apgd_ce", "apgd_t", "square"]


def test_files_that_settings_name_are_looked_for_before_anything_trains(tmp_path: Path) -> None:
    profile = ROOT / "params/cifar10-folder.yaml"
    there, gone = tmp_path / "there.pth", tmp_path / "gone.pth"
    there.write_bytes(b"no weights")
    told = CliRunner().invoke(app, ["check", "--params", str(ROOT / "params/cifar10.yaml"), "--override", f"data.root={tmp_path}"])
    assert told.exit_code == 0
    assert f"data.root: {tmp_path}/cifar-10-batches-py is not here yet; cifar10 is fetched" in told.stderr
    (tmp_path / "cifar-10-batches-py").mkdir()
    told = CliRunner().invoke(app, ["check", "--params", str(ROOT / "params/cifar10.yaml"), "--override", f"data.root={tmp_path}"])
    assert f"data.root: {tmp_path}/cifar-10-batches-py is here" in told.stdout
    for key, more in (("generate.inception_weights", ["evaluation.generate.extractor=inception"]), ("reliability.ood_path", [])):
        words = [f"data.path={tmp_path}", *more]
        with pytest.raises(ParamsError, match=rf"evaluation.{key}: {gone} is not here; put the f"):
            prepare.run(params.load(profile, [*words, f"evaluation.{key}={gone}"]), tmp_path / "data.npz", tmp_path / "card.json")
        for path, code, text in ((gone, 1, "is not here; put the f"), (there, 0, "is here")):
            options = [o for word in (*words, f"evaluation.{key}={path}") for o in ("--override", word)]
            told = CliRunner().invoke(app, ["check", "--params", str(profile), *options])
            assert (told.exit_code, f"evaluation.{key}: {path} {text}" in told.output) == (code, True)
    junk = params.load(profile, [f"evaluation.generate={{extractor: inception, inception_weights: {there}}}"])
    with pytest.raises(ExtractorError, match=r"Inception's weights are unavailable from .*there\.pth"):
        prepare.run(junk, tmp_path / "data.npz", tmp_path / "card.json")
    assert not (tmp_path / "data.npz").exists()


PATHS = {
    "check": "--params=params/cifar10-folder.yaml --override=data.path={}",
    "check_root": "--params=params/cifar10.yaml --override=data.root={}",
    "check_ood": "--params=params/digits.yaml --override=evaluation.reliability.ood_path={}",
    "check_params": "--params={}",
    "check_override": "--params=params/digits.yaml --override={}",
    "prepare": "--params=params/digits.yaml --out={} --card=card.json",
    "inspect": "{}",
    "attack": "--model=torch.nn:Identity --weights={} --data=none.npz --out=out.json",
    "attack_data": "--model=torch.nn:Identity --data={} --out=out.json",
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_no_file_can_have_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    told = CliRunner().invoke(app, [name.partition("_")[0], *PATHS[name].format("a" * 300).split()])
    assert (told.exit_code, type(told.exception)) == (1, SystemExit)
    assert told.stderr.count("\n") == 1
    assert "aaaa" in told.stderr
    assert "File name too long" in told.stderr


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.batch_size=1000000000000"], "training.batch_size: input should be less than or equal to 1000000"),
        (["training.epochs=1e9"], "training.epochs: input should be less than or equal to 100000"),
        (["model.depth=1000000"], "model.depth: input should be less than or equal to 1000"),
        (["runtime.threads=1e6"], "runtime.threads: input should be less than or equal to 1000"),
        ([f"seeds=[{2**70}]"], "seeds.0: input should be less than 4294967296"),
        (["evaluation.generate.n=1e12"], "evaluation.generate.n: input should be less than or equal to 100000000"),
        (["training.optimizer.lr=1e300"], "training.optimizer.lr: input should be less than or equal to 1000000"),
        (["training.adversary.eps=1e999999999/255"], "training.adversary.eps: '1e999999999/255' is not a number; a number or a fraction"),
        (["training.adversary.eps='1e999999999'"], "training.adversary.eps: '1e999999999' is not a number"),
        (["training.adversary.eps='8 8/255'"], "training.adversary.eps: '8 8/255' is not a number"),
        (["seeds=[0, 0.0]"], "seeds: each seed may stand once"),
        (["seeds=[1, true]"], "seeds.1: a number is allowed, found True"),
        (['seeds=["0"]'], "seeds.0: a number is allowed, found '0'"),
        (["data={source: folder, test: null, path: x, size: 1e6}"], "data.size: input should be less than or equal to 1024"),
        (["data={source: folder, test: null, path: x, channels: true}"], "data.channels: a number is allowed, found True"),
        (['data.root="a\\nb"'], "data.root: printable characters on one line are allowed"),
        (["data.root=''"], "data.root: string should have at least 1 character"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_never_work_is_refused_at_once(overrides: list[str], expected: str) -> None:
    with pytest.raises(ParamsError) as caught:
        params.load(ROOT / "params/digits.yaml", overrides)
    assert f"override {overrides[-1]!r}: {expected}" in str(caught.value) or f'override "{overrides[-1]}": {expected}' in str(caught.value)


def test_a_slip_in_a_common_part_does_not_fill_pages(tmp_path: Path, raw: dict[str, Any]) -> None:
    text = problems(tmp_path, {**raw, **{f"slip{i}": 1 for i in range(300)}})
    assert text.startswith("300 problems in the settings:\n")
    assert text.endswith("\n  and 250 more")
    assert len(text.splitlines()) == 52


@pytest.mark.parametrize("name", ["a b", "a+b", "-a", ".a", "{a}", "a;b", "ä", "x" * 101])
def test_files_whose_names_cannot_name_folders_are_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text("runtime: {threads: 2}")
    done = CliRunner().invoke(app, ["check", "--params", str(ROOT / "params/digits.yaml"), "--override", str(file)])
    assert done.exit_code == 1
    assert "a file's name becomes part of folders' names" in done.output


def test_the_released_protocol_has_a_noise_for_each_base() -> None:
    """0.03 for JEM and JEM++, none for SADA-JEM; 0.03 for what stands on none of them, and for any other network."""
    full = params.load(ROOT / "params/digits-full.yaml")
    noise = {name: full.attack_settings(name).protocols["released"].noise for name in full.experiments}
    without = {"sadajem", "eb_jdat_sadajem"}
    assert noise == {name: 0.0 if name in without else 0.03 for name in full.experiments}
    assert all(full.attack_settings(name).protocols[p].noise == 0 for name in full.experiments for p in ("standard", "standard_l2"))
    assert params.usual_protocols(10).protocols["released"].noise == 0.03
    own = ["evaluation.attack.protocols.mine={like: released, eps: 0.1, pgd: {step_size: 0.1}, n: 0, noise: 0.1, noise_on: {jem: 0.2}}"]
    mine = params.load(ROOT / "params/digits-full.yaml", own)
    found = [mine.attack_settings(name).protocols["mine"].noise for name in ("jem", "jempp", "sadajem", "pgd_at")]
    assert found == [0.2, 0.1, 0.0, 0.1]
    for value, said in (("{jem: 0}", "noise_on"), ("{gem: 0.1}", "'gem' is unknown; did you mean 'jem'"), ("{jem: -1}", "greater than")):
        with pytest.raises(ParamsError, match=said):
            params.load(ROOT / "params/digits-full.yaml", [f"evaluation.attack.protocols.released.noise_on={value}"])


def test_forms_on_each_base() -> None:
    """As the release's three trainers have it: alignment, its clean images, noise on labelled images, inner step and budget."""
    for form, score in (("released", "released"), ("released_ce", "released_ce")):
        for base, weights, noise in (("jem", (0.45, -0.05, 0.45), 0.03), ("jempp", (1, -0.1, 1), 0.03), ("sadajem", (1, -0.1, 1), 0.0)):
            own = [f"experiments.eb_jdat.form={form}", f"experiments.eb_jdat.base={base}"]
            t = params.load(ROOT / "params/digits.yaml", own).training_settings("eb_jdat")
            assert (t.weights.w1, t.weights.w2, t.weights.w3) == weights
            assert (t.weights.align, t.density_batch, t.augment.labelled_noise, t.chains) == ("density", "own", noise, 64)
            walk = t.adversary
            assert (walk.score, walk.start, walk.project, walk.range, walk.mode) == (score, "uniform", False, "internal", "eval")
    paper = params.load(ROOT / "params/digits.yaml").training_settings("eb_jdat")
    assert (paper.weights.align, paper.density_batch, paper.augment.labelled_noise, paper.own_density) == ("paired", "labelled", 0, None)


def test_the_papers_profile_has_the_recipes_as_published() -> None:
    cifar = params.load(ROOT / "params/cifar10.yaml")
    assert {cifar.model_settings(name).variant for name in cifar.pretraining} == {"jem"}
    assert params.load(ROOT / "params/digits.yaml").model.variant == "wrn"
    sizes = {name: (t.batch_size, t.own_density, t.chains) for name in cifar.experiments for t in [cifar.training_settings(name)]}
    assert sizes["sadajem"] == sizes["eb_jdat_sadajem"] == sizes["eb_jdat_sadajem_released"] == (128, 64, 64)
    assert sizes["jempp"] == sizes["eb_jdat"] == sizes["eb_jdat_released_ce"] == (64, 64, 64)
    assert sizes["eb_jdat_jem"] == (128, 128, 128)
    assert sizes["pgd_at"] == (128, None, 128)
    for name, noise in {"jem": 0.03, "jempp": 0.03, "eb_jdat": 0.03, "sadajem": 0, "eb_jdat_sadajem": 0, "pgd_at": 0}.items():
        assert cifar.training_settings(name).augment.labelled_noise == noise
    for name in ("jem", "eb_jdat_jem"):
        t = cifar.training_settings(name)
        assert (t.epochs, t.schedule.milestones, t.schedule.factor) == (200, (160, 180), 0.3)
    assert cifar.training_settings("sadajem").epochs * (45_000 // 128) == 70_200  # 390 steps of 50,000 images in the release


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.density_batch_size=32", "density_batch_size is for density_batch 'own'"),
        ("training={density_batch: own, density_batch_size: 2000}", "density_batch_size: 2000 is larger than the training split"),
        ("training={density_batch: own, density_batch_size: 63, compute: {accumulate: 2}}", "density_batch_size 63 is no multiple"),
        ("training.density_batch=other", "'labelled' or 'own'"),
        ("training.augment.labelled_noise=-0.1", "greater than or equal to 0"),
        ("training.weights.align=unpaired", "'paired' or 'density'"),
        ("model.variant=yopo", "'wrn' or 'jem'"),
    ],
)
def test_settings_of_the_released_code_are_checked(override: str, said: str) -> None:
    with pytest.raises(ParamsError, match=said):
        params.load(ROOT / "params/digits.yaml", [override])
