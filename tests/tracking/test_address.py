"""What is shown of an address, and SQLite files that cannot be used."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ebjdat.cli import app
from ebjdat.tracking import address as addresses
from ebjdat.tracking import journal

from .conftest import run_stage


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://someone:SECRET@127.0.0.1:5432/mlflow?password=SECRET&sslmode=require", "postgresql://127.0.0.1:5432/mlflow"),
        ("http://someone:SECRET@127.0.0.1:9", "http://127.0.0.1:9"),
        ("https://host:5000/a/b?api_key=SECRET#SECRET", "https://host:5000/a/b"),
        ("https://host/a;token=SECRET", "https://host/a"),
        ("https://SECRET@[::1]:5000/x", "https://[::1]:5000/x"),
        ("http://someone:SEC/SECRET@host/x", "http://…"),
        ("http://someone:p?SECRET@host/x", "http://…"),
        ("http://host/?token=a@SECRET", "http://…"),
        ("http://host:SECRET/x", "http://…"),
        ("SECRET@host", "…"),
        ("someone:SECRET@host:80/x", "…"),
        ("someone:SECRET@host?x=@SECRET", "…"),
        ("databricks", "databricks"),
        ("databricks://SECRET", "databricks://…"),
        ("databricks://someone:SECRET@adb-1.azuredatabricks.net", "databricks://…"),
        ("uc:SECRET", "…"),
        ("s3://SECRET@bucket/x", "s3://…"),
        ("sqlite+pysqlcipher://:SECRET@//folder/x.db?cipher=SECRET", "sqlite+pysqlcipher:////folder/x.db"),
        ("sqlite:////folder/x.db", "sqlite:////folder/x.db"),
        ("/folder/mlruns", "/folder/mlruns"),
        ("localhost:5000", "localhost:5000"),
        ("http://host/\x1b[2J", "http://host/\\x1b[2J"),
    ],
)
def test_of_an_address_only_scheme_host_and_path_are_shown(monkeypatch: pytest.MonkeyPatch, address: str, shown: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert addresses.shown_uri() == shown
    for text in (f"no answer from {address}: refused", f"url: /?{address.partition('?')[2]}/api/2.0", f"('{address}')"):
        assert "SECRET" not in addresses.without_secrets(text)


def test_secrets_are_not_in_what_other_programs_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host/?api_key=hunter22")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "dapi0123")
    told = "url: /?api_key=hunter22/api (hunter22, Bearer dapi0123), access_key='AKIA1', me:pw@other.net, https://a:b@c.d/e?sig=1 failed"
    kept = addresses.without_secrets(told)
    assert not any(secret in kept for secret in ("hunter22", "dapi0123", "AKIA1", "me:pw", "a:b@", "sig=1"))
    assert all(word in kept for word in ("other.net", "https://c.d/e", "failed"))


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("sqlite:///folder", "folder is a folder; name a file: sqlite:///folder/mlflow.db"),
        ("sqlite:///{here}/folder", "is a folder"),
        ("sqlite+pysqlite:///folder?timeout=5", "is a folder"),
        ("sqlite:///fifo", "is not a plain file"),
        ("sqlite:///nowhere/mlflow.db", "the folder nowhere does not exist"),
        ("sqlite:///notes.txt", "notes.txt is not an SQLite database"),
        ("sqlite://", "in memory keeps nothing"),
        ("sqlite:///:memory:", "in memory keeps nothing"),
        ("sqlite:///file:x.db?mode=ro&uri=true", "itself makes it read-only"),
        ("sqlite:////proc/version", "is not writable|is not an SQLite database"),
        (f"sqlite:///{'a' * 300}", "File name too long"),
    ],
)
def test_a_file_that_cannot_take_anything_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, why: str) -> None:
    """Before MLflow sees it, which would try for minutes; every journal is kept."""
    Path("folder").mkdir()
    os.mkfifo("fifo")
    Path("notes.txt").write_text("twenty characters of text")
    run_stage()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(here=tmp_path))
    began = time.monotonic()
    told = CliRunner().invoke(app, ["sync"])
    assert told.exit_code == 1
    assert re.search(why, told.output)
    assert "Every journal is kept" in told.output
    assert time.monotonic() - began < 2
    assert len(list(journal.finished())) == 1
