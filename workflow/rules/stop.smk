"""Ctrl-C and SIGTERM: what is done is kept, which is said instead of every job's files."""

import logging
import signal
import sys

from snakemake.logging import logger

STOPPED = []  # signals that asked this run to stop, first one first
STARTED = []  # whether jobs may be at work
CONTINUES = (
    "stopped: nothing is half-written, and the same command continues where it was"
)


def note_stop(number):
    """From now on, jobs that end with an error were stopped: Snakemake need not list what they are."""
    if not STOPPED:
        logger.addFilter(lambda record: record.levelno < logging.ERROR)
    STOPPED.append(number)


def interrupted(number, frame):
    """Snakemake, too, ends with SystemExit as it does with KeyboardInterrupt: its jobs first."""
    note_stop(number)
    if not STARTED:
        print(CONTINUES, file=sys.stderr)
    raise SystemExit(128 + number)


def watch_signals():
    """Called when jobs begin. At SIGTERM Snakemake waits for those that run, and begins no others."""
    STARTED.append(True)
    waits = signal.getsignal(signal.SIGTERM)

    def terminated(number, frame):
        note_stop(number)
        if callable(waits):
            waits(number, frame)

    signal.signal(signal.SIGTERM, terminated)


def end_if_stopped():
    if STOPPED:
        print(CONTINUES, file=sys.stderr)
        sys.exit(128 + STOPPED[0])


if workflow.is_main_process:
    signal.signal(signal.SIGINT, interrupted)
