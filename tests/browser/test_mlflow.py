"""The MLflow UI over a store like the project's: runs are listed, compared by chosen metrics, and their pictures open."""

from __future__ import annotations

import json

from .conftest import Browser, Store
from .store import METRICS

OPTION = """const found = [...document.querySelectorAll("[class*=select-item-option]")].find((o) => o.textContent === "pgd20_acc");
found?.click(); return Boolean(found);"""
RUNS = "[role=gridcell] a[href*='/runs/']"


def test_the_runs_are_listed(browser: Browser, mlflow_ui: Store) -> None:
    browser.open(f"{mlflow_ui.address}/#/experiments/{mlflow_ui.experiment}/runs?workflowType=machine_learning")
    names = browser.wait(lambda: browser.texts(RUNS), "runs")
    assert set(names) == set(METRICS)
    assert "digits" in browser.one("main, body").text


def test_runs_are_compared_by_chosen_metrics(browser: Browser, mlflow_ui: Store) -> None:
    chosen = {name: mlflow_ui.runs[name] for name in ("pgd_at/seed0", "eb_jdat/seed0")}
    query = f"runs={json.dumps(list(chosen.values()))}&experiments={json.dumps([mlflow_ui.experiment])}"
    browser.open(f"{mlflow_ui.address}/#/compare-runs?{query}")
    table = browser.wait(lambda: browser.one("body").text.split("\nMetrics\nShow diff only\n")[1].split("\nArtifacts")[0], "metrics")
    metrics = sorted(METRICS["eb_jdat/seed0"])
    values = [METRICS[name][metric] for metric in metrics for name in chosen]
    assert table.splitlines() == [*metrics, *map(str, values)]  # a row per metric, a column per run
    assert browser.texts(".axis-title") == ["clean_acc"]
    browser.all("[role=combobox]")[1].click()  # parameters are the first
    browser.wait(lambda: browser.js(OPTION), "the other metric to choose")
    browser.wait(lambda: browser.texts(".axis-title") == metrics, "an axis per chosen metric")


def test_a_picture_of_a_run_opens(browser: Browser, mlflow_ui: Store) -> None:
    run = mlflow_ui.runs["eb_jdat/seed0"]
    browser.open(f"{mlflow_ui.address}/#/experiments/{mlflow_ui.experiment}/runs/{run}/artifacts/samples.png")
    widths = "return [...document.images].map((image) => image.naturalWidth)"
    browser.wait(lambda: 40 in browser.js(widths), "the picture, 40 pixels wide")
