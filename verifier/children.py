"""Processes that serve this one and end with it, however it ends: each watches a pipe that its parent holds open."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from threading import Thread

GRACE = 10.0  # seconds between asking and killing


class Child:
    """A module run as a process; `ensure` starts it, and again if it has died."""

    def __init__(self, module: str, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._environ = dict(environ)
        self._process: subprocess.Popen[bytes] | None = None

    def ensure(self) -> bool:
        """Start it unless it runs; whether it had died."""
        died = self._process is not None and self._process.poll() is not None
        if self._process is None or died:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                env=self._environ,
                start_new_session=True,  # Ctrl-C is for the parent, who stops its children in order
            )
        return died

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def stop(self) -> None:
        if self._process is None:
            return
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def end_with_parent() -> None:
    """In a child: ask this process to stop when the parent is gone."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()
