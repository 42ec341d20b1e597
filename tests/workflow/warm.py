"""Starts `python -m ebjdat` and `snakemake` in forks of a process that has imported their libraries: seconds less for each stage.

The package itself is imported in the fork, from the checkout that it runs in. Commands reach it through a `python` and a `snakemake`
that stand first on PATH (CLIENT), with their arguments, folder, environment and open files; every other call of that `python` is the
real one's.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

LIBRARIES = (
    *("numpy", "scipy.stats", "scipy.linalg", "scipy.optimize", "torch", "torch._dynamo", "torch_fidelity", "sklearn.calibration"),
    *("sklearn.datasets", "pandas", "pyarrow.parquet", "matplotlib.pyplot", "PIL.Image", "safetensors.torch", "pydantic", "typer"),
    "snakemake.cli",
)

CLIENT = """#!{python} -IS
import json, os, socket, sys
if sys.argv[0].endswith("snakemake"):
    module, arguments = "snakemake", sys.argv[1:]
elif sys.argv[1:3] in (["-m", "ebjdat"], ["-m", "snakemake"]):
    module, arguments = sys.argv[2], sys.argv[3:]
else:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"x"], [0, 1, 2])
    order = {{"module": module, "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}}
    server.sendall(json.dumps(order).encode())
    server.shutdown(socket.SHUT_WR)
    status = server.recv(16)
sys.exit(int(status or 1))
"""


def client(folder: Path, address: Path) -> None:
    """Write the `python` and the `snakemake` that ask the server at this address."""
    folder.mkdir()
    for name in ("python", "snakemake"):
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=str(address)))
        (folder / name).chmod(0o755)


def serve(address: str) -> str:
    """Until standard input ends. Returns in every fork that is to run a command, prepared for it, the module to run."""
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
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    module: str = order["module"]
    sys.argv = [module, *order["arguments"]]
    sys.executable = str(Path(address).parent / "bin/python")  # whose folder Snakemake puts before all others
    here = [os.getcwd()] if module == "ebjdat" else []  # as `python -m` does
    sys.path[:0] = [*here, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    return module


if __name__ == "__main__":
    for name in LIBRARIES:
        importlib.import_module(name)
    assert "ebjdat" not in sys.modules
    gc.collect()
    gc.freeze()  # what was imported is neither looked through nor taken down in the forks: that would copy all of it
    asked = serve(sys.argv[1])
    try:
        runpy.run_module(asked, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else end.code is not None)
