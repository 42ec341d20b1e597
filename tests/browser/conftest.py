"""One browser and one MLflow server for all tests here; a test waits for what it needs and never sleeps blindly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from ebjdat.report import page
from ebjdat.report.summary import aggregate
from ebjdat.settings import Profile

from ..report.results import fill, site_of
from ..tracking.server import Server
from .store import fill_store

PATIENCE = 30  # seconds, for a slow machine; nothing waits that long otherwise
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


@dataclass(frozen=True)
class Browser:
    """Chromium, and the little that the tests ask of it."""

    driver: Chrome

    def open(self, url: str, width: int = 1280, dark: bool = False, script: bool = True) -> None:
        """A fresh page, with empty logs."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.cdp("Emulation.setScriptExecutionDisabled", value=not script)
        self.driver.get("about:blank")  # else another #part of the same page would not load it again
        self.requests(), self.driver.get_log("browser")
        self.driver.get(url)

    def cdp(self, command: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)

    def js(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """Text of what is visible."""
        return [element.text for element in self.all(selector) if element.is_displayed()]

    def wait(self, condition: Any, what: str) -> Any:
        """What the condition gives as soon as it is true; errors of a page still loading are not yet failures."""
        return WebDriverWait(self.driver, PATIENCE, 0.1, ignored_exceptions=[Exception]).until(lambda _: condition(), f"never came: {what}")

    def requests(self) -> list[str]:
        """Addresses asked for since the last look."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


@dataclass(frozen=True)
class Store:
    """What the MLflow server at `address` shows: an experiment's id, and its runs' by name."""

    address: str
    experiment: str
    runs: dict[str, str]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chrome = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chrome is None or driver is None:
        missing = "chromium and chromedriver are not both on the PATH"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    options = Options()
    options.binary_location = chrome
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = Chrome(options=options, service=Service(driver))  # given both, selenium looks for and downloads nothing
    chromium.set_page_load_timeout(PATIENCE)
    yield Browser(chromium)
    chromium.quit()


@pytest.fixture(scope="session")
def site(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with report.html and audit.html, made of small result files."""
    folder = tmp_path_factory.mktemp("site")
    fill(profile, folder)
    made = site_of(profile, folder)
    page.write(made, aggregate(profile, made.runs), folder / "report.html")
    page.write_audit(made, folder / "audit.html")
    return folder


@pytest.fixture(scope="session")
def mlflow_ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A real server, started as `make ui` starts it, over a store with three runs."""
    folder = tmp_path_factory.mktemp("mlflow")
    server = Server(folder, f"sqlite:///{folder}/mlflow.db")
    experiment, runs = fill_store(server.store, folder)
    server.start()
    try:
        server.wait()
        yield Store(server.uri, experiment, runs)
    finally:
        server.stop()
