"""Starts `python -m ebjdat`, `python -m pytest`, a script, `snakemake` and `dvc` in forks of a process that has imported their
libraries: seconds less for each.

The package itself is imported in the fork, from the checkout that it runs in. Commands reach it through programs that stand first on
PATH (CLIENT), with their arguments, folder, environment, open files and limit of file sizes; every other call of that `python` is
the real one's.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

LIBRARIES = (
    *("numpy", "scipy.stats", "scipy.linalg", "scipy.optimize", "torch", "torch._dynamo", "torch_fidelity", "sklearn.calibration"),
    *("sklearn.datasets", "pandas", "pyarrow.parquet", "matplotlib.pyplot", "PIL.Image", "safetensors.torch", "pydantic", "typer"),
    *("snakemake.cli", "dvc.cli.parser", "dvc.repo.reproduce", "dvc.repo.index", "dvc.repo.experiments", "dvc_data.index.checkout"),
)
MODULES = ("ebjdat", "pytest")  # of `python -m`
PROGRAMS = ("snakemake", "dvc")

CLIENT = """#!{python} -IS
import json, os, resource, socket, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if name != "python":
    order = {{"module": name, "arguments": words}}
elif words[:1] == ["-m"] and words[1] in {modules!r}:
    order = {{"module": words[1], "arguments": words[2:]}}
elif words[:1] and words[0].endswith(".py"):
    order = {{"script": words[0], "arguments": words[1:]}}
else:
    os.execv({python!r}, [{python!r}, *words])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"x"], [0, 1, 2])
    order |= {{"folder": os.getcwd(), "environment": dict(os.environ), "file_size": resource.getrlimit(resource.RLIMIT_FSIZE)}}
    server.sendall(json.dumps(order).encode())
    server.shutdown(socket.SHUT_WR)
    status = server.recv(16)
sys.exit(int(status or 1))
"""


def client(folder: Path, address: Path) -> None:
    """Write the programs that ask the server at this address."""
    folder.mkdir()
    for name in ("python", *PROGRAMS):
        text = CLIENT.format(python=sys.executable, address=str(address), modules=(*MODULES, *PROGRAMS))
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@cache
def programs() -> Path:
    """The folder of these programs, first on PATH where they are used; what serves them ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="ebjdat-warm-"))
    atexit.register(shutil.rmtree, folder)
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, str(folder / "asked")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.kill)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    client(folder / "bin", folder / "asked")
    return folder / "bin"


def serve(address: str) -> Callable[[], object]:
    """Until it is killed. Returns, in every fork that is to run a command, that command."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
        print("ready", flush=True)
        while True:
            asked, _ = listening.accept()
            if os.fork():
                asked.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _, files, _, _ = socket.recv_fds(asked, 1, 3)
            with asked.makefile("rb") as file:
                order = json.load(file)
            if worker := os.fork():
                with contextlib.suppress(BrokenPipeError):
                    asked.sendall(str(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])).encode())
                os._exit(0)
            asked.close()
            break
    for number, kept in enumerate(files):
        os.dup2(kept, number)
        os.close(kept)
    resource.setrlimit(resource.RLIMIT_FSIZE, order["file_size"])
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.executable = str(Path(address).parent / "bin/python")  # whose folder Snakemake puts before all others
    paths, script = os.environ.get("PYTHONPATH", "").split(":"), order.get("script")
    # What `python` puts first: the script's folder, the working folder for -m, and nothing for a program.
    first = [str(Path(script).parent.absolute())] if script else [os.getcwd()] if order["module"] in MODULES else []
    sys.path[:0] = [*first, *filter(None, paths)]
    sys.argv = [script or order["module"], *order["arguments"]]
    if script:
        return lambda: runpy.run_path(script, run_name="__main__")
    return lambda: runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in LIBRARIES:
        importlib.import_module(name)
    assert "ebjdat" not in sys.modules
    gc.collect()
    gc.freeze()  # what was imported is neither looked through nor taken down in the forks: that would copy all of it
    command = serve(sys.argv[1])
    try:
        command()
    except SystemExit as end:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else end.code is not None)
