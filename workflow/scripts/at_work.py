"""Who is at work in this folder: Snakemake holds a lock file as long as its jobs may run, also when DVC has called it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

LOCK = Path("state/at-work")


def hold() -> IO[str] | None:
    """Hold the lock as long as the returned file is open; the system releases it when this process ends, however it does. None: taken."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    file = LOCK.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"`{'dvc repro' if 'DVC_STAGE' in os.environ else 'snakemake'}` (process {os.getpid()})")
    file.flush()
    return file


def by_another(tool: str = "") -> str:
    """What to tell the user when another process is at work here (`tool`: one that this program began); "" when none is."""
    if not LOCK.is_file():
        return ""
    with LOCK.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(200)
            return f"{holder} is at work in this folder; wait for it, or stop it, and rerun" if holder.startswith(f"`{tool}") else ""
    return ""
