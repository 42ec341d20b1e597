"""A golden record: what a profile's whole chain makes, as digests of tensors and verdicts and as every figure.

    EBJDAT_TRACKING=0 snakemake --cores all --config profile=digits overrides=tests/golden/digits.yaml
    python -m tests.golden.record digits            # compares with tests/golden/digits.json; --write replaces it

A change of code that is not meant to change results leaves the record equal, on the machine that made it: other processors and
versions of torch round differently. Times, hashes of code and settings, and commits are left out. tiny.json is of the two
experiments in tests/workflow, which compare with it; `--root` says where such a checkout is.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from ebjdat.settings import flat, run_name

HERE = Path(__file__).parent
LONGEST = 200  # characters of a value that is kept as it is; longer ones as digests
ABSENT = "nothing"
# What may differ between two runs of the same code, by the end of its name.
VOLATILE = ("seconds", "git_commit", "params_hash", "digest", "files", "version")


def machine() -> dict[str, str]:
    """What the last bits depend on."""
    cpu = Path("/proc/cpuinfo")
    found = dict(re.findall(r"^(model name|flags)\s*: (.*)$", cpu.read_text() if cpu.exists() else "", re.M))
    processor = f"{found.get('model name', platform.processor())}, features {digest(found.get('flags', '').encode())}"
    return {"torch": torch.__version__, "processor": processor}


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def of_array(name: str, array: np.ndarray[Any, Any]) -> str:
    values = json.dumps(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()
    return digest(name.encode(), str(array.dtype).encode(), str(array.shape).encode(), values)


def checkpoint(file: Path) -> dict[str, Any]:
    """Digest of the tensors below each first word of their names: model, ema, buffer."""
    groups: dict[str, list[bytes]] = {}
    with safe_open(file, framework="numpy") as tensors:
        for name in sorted(tensors.keys()):
            groups.setdefault(name.split(".")[0], []).append(of_array(name, tensors.get_tensor(name)).encode())
    return {group: digest(*found) for group, found in groups.items()}


def kept(value: Any) -> Any:
    """Without what may differ, and what is long as a digest."""
    if isinstance(value, Mapping):
        value = {k: kept(v) for k, v in value.items() if not k.endswith(VOLATILE)}
    elif isinstance(value, list):
        value = [kept(v) for v in value]
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= LONGEST or (isinstance(value, Mapping) and value) else digest(text.encode())


def figures(file: Path) -> dict[str, Any]:
    found = kept(json.loads(file.read_text()))
    assert isinstance(found, dict)
    return found


def table(file: Path) -> dict[str, Any]:
    """A CSV's columns as digests."""
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    names = [name for name in (rows[0] if rows else {}) if not name.endswith(VOLATILE)]
    return {name: digest(*(str(row[name]).encode() for row in rows)) for name in names}


def arrays(file: Path) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as found:
        return {name: of_array(name, found[name]) for name in found.files}


def verdicts(file: Path) -> dict[str, Any]:
    found = pd.read_parquet(file)
    return {str(name): of_array(str(name), found[name].to_numpy()) for name in found}


READERS = {".safetensors": checkpoint, ".json": figures, ".csv": table, ".npz": arrays, ".parquet": verdicts}


def record(root: Path, run: str) -> dict[str, Any]:
    """{"machine": ..., "data/card.json": {...}, "checkpoints/eb_jdat/seed0.safetensors": {...}, ...} of a run's files below root."""
    found: dict[str, Any] = {"machine": machine()}
    for place in ("data", "checkpoints", "results"):
        files = sorted(p for p in (root / place / run).rglob("*") if p.suffix in READERS)
        if not files:
            raise SystemExit(f"{place}/{run} is not there: run the profile first")
        for file in files:
            found[f"{place}/{file.relative_to(root / place / run)}"] = READERS[file.suffix](file)
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each value of the record that is another one or missing; what the record has not, a metric added later, is none.

    The machine is not compared.
    """
    old, new = (flat({k: v for k, v in tree.items() if k != "machine"}) for tree in (before, now))
    return [f"{key}: {value} -> {new.get(key, ABSENT)}" for key, value in old.items() if value != new.get(key, ABSENT)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(p.stem for p in HERE.glob("*.json")))
    parser.add_argument("--write", action="store_true", help="replace the record")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout whose results are looked at")
    asked = parser.parse_args()
    file, overrides = HERE / f"{asked.name}.json", HERE / f"{asked.name}.yaml"
    run = run_name(f"params/{asked.name}.yaml", [str(overrides.relative_to(Path.cwd()))]) if overrides.exists() else "digits"
    now = record(asked.root, run)
    if asked.write:
        file.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        print(f"wrote {file}: {len(now) - 1} files")
        return 0
    before = json.loads(file.read_text())
    if before["machine"] != now["machine"]:
        print(f"made on another machine ({before['machine']}; here {now['machine']}): the last digits may differ", file=sys.stderr)
    found = differences(before, now)
    print("\n".join([*found[:50], f"{len(found)} differences in {len(now) - 1} files"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
