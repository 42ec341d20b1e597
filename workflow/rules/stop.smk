"""Ctrl-C and SIGTERM: what is done is kept, which is said instead of every job's files."""

import logging
import signal
import sys

from snakemake.logging import logger

STOPPED = []  # signals that asked this run to stop, first one first
STARTED = []  # whether jobs may be at work
GOES_ON = "stopped: nothing is half-written, and the same command goes on where it was"


def heard(number):
    """From now on, jobs that end with an error were stopped: Snakemake need not list what they are."""
    if not STOPPED:
        logger.addFilter(lambda record: record.levelno < logging.ERROR)
    STOPPED.append(number)


def interrupted(number, frame):
    """Snakemake, too, ends with SystemExit as it does with KeyboardInterrupt: its jobs first."""
    heard(number)
    if not STARTED:
        print(GOES_ON, file=sys.stderr)
    raise SystemExit(128 + number)


def hear_everything():
    """Called when jobs begin. At SIGTERM Snakemake waits for those that run, and begins no others."""
    STARTED.append(True)
    waits = signal.getsignal(signal.SIGTERM)

    def terminated(number, frame):
        heard(number)
        if callable(waits):
            waits(number, frame)

    signal.signal(signal.SIGTERM, terminated)


def end_if_stopped():
    if STOPPED:
        print(GOES_ON, file=sys.stderr)
        sys.exit(128 + STOPPED[0])


if workflow.is_main_process:
    signal.signal(signal.SIGINT, interrupted)
