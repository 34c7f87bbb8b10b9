"""Python in processes of its own, forked from one that has imported torch and transformers: that takes four seconds, and tests need it a hundred times."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    [
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "outgrow.lab.execute",
        "outgrow.cli",
        "torch._inductor",
    ]
)
COMMAND_LINE = ("-c", "from outgrow.cli import main; main()")


class Process:
    """`python ARGUMENTS` at work; what tests need of `subprocess.Popen`. Arguments are a script or `-c CODE`, and what `sys.argv` holds after it."""

    def __init__(self, *arguments: Any, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self.args = tuple(map(str, arguments))
        with tempfile.NamedTemporaryFile(delete=False) as out, tempfile.NamedTemporaryFile(delete=False) as err:
            self._files = Path(out.name), Path(err.name)
        self._forked = _FORKED.Process(target=_python, args=(self.args, *self._files, cwd or Path.cwd(), {**os.environ, **(env or {})}))
        self._forked.start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error:
            self.kill()
        self.wait()

    def send_signal(self, which: int) -> None:
        if self._forked.is_alive():
            os.kill(self._forked.pid, which)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        return self._forked.exitcode

    @property
    def returncode(self) -> int | None:
        return self._forked.exitcode

    def printed(self) -> str:
        """Its output so far."""
        return self._files[0].read_text()

    def wait(self, timeout: float = 300) -> int:
        self._forked.join(timeout)
        if self._forked.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout, *(path.read_text() for path in self._files))
        return self._forked.exitcode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it has printed on either stream by its end."""
        self.wait(timeout)
        out, err = (path.read_text() for path in self._files)
        for path in self._files:
            path.unlink()
        return out, err


def python(*arguments: Any, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, to its end."""
    process = Process(*arguments, cwd=cwd, env=env)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def outgrow(*arguments: Any, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user's shell would; a warning is an error."""
    return python(*COMMAND_LINE, *arguments, cwd=cwd, env=env)


def on_ranks(count: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` on so many ranks, as torchrun starts them: where one fails, the others are killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [Process(*arguments, env={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(0.02)
    failed = next((rank.poll() for rank in ranks if rank.poll()), 0)
    for rank in ranks:
        rank.kill()
    outs, errs = zip(*(rank.communicate() for rank in ranks), strict=True)
    return subprocess.CompletedProcess(ranks[0].args, failed, "".join(outs), "".join(errs))


def _python(arguments: tuple[str, ...], out: Path, err: Path, cwd: Path, environment: dict[str, str]) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("error")
    first, *rest = arguments
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
