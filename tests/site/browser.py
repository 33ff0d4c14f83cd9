"""A headless Chromium, driven by its DevTools protocol over two pipes.

With ``--remote-debugging-pipe`` Chromium reads commands from file descriptor 3 and writes replies and events to 4.
Each is a JSON object that a zero byte ends. This needs no package and no port.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-headless-shell", "google-chrome")
SECONDS = 30.0  # How long one reply or event may take.
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--hide-scrollbars",
    # The pages need no other host; a request to one fails at once.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class BrowserError(Exception):
    """Chromium is missing, or it does not answer."""


def find_chromium() -> str:
    """Find a Chromium on PATH.

    Returns:
        The path of the program.

    Raises:
        BrowserError: There is none.
    """
    for name in NAMES:
        if found := shutil.which(name):
            return found
    raise BrowserError(
        f"None of {', '.join(NAMES)} is on PATH; install one of them, "
        "on Debian by `apt-get install chromium-headless-shell`."
    )


def _high(descriptor: int) -> int:
    """Move a file descriptor out of the way of 3 and 4."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


class Browser:
    """A running Chromium, which ends with the ``with`` block.

    Attributes:
        events: The events that came while the browser waited for something else, oldest first.
    """

    def __init__(self, program: str) -> None:
        """Start Chromium.

        Args:
            program: The path of the program.
        """
        self.events: deque[dict[str, Any]] = deque()
        self._folder = tempfile.TemporaryDirectory(prefix="site-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name) / "chromium.log"
        self._last = 0
        self._pending = b""
        theirs_in, self._write = map(_high, os.pipe())
        self._read, theirs_out = map(_high, os.pipe())
        words = [program, *FLAGS, f"--user-data-dir={self._folder.name}/profile"]
        if os.geteuid() == 0:
            words.append("--no-sandbox")  # As root its sandbox does not start.
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._process = os.posix_spawn(
            program,
            [*words, "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self._log), append, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, theirs_in, 3),
                (os.POSIX_SPAWN_DUP2, theirs_out, 4),
            ],
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def __enter__(self) -> Browser:
        """Return the browser itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End Chromium, and remove its profile."""
        os.close(self._write)  # Chromium quits when its pipe ends.
        os.close(self._read)
        end = time.monotonic() + 5
        while os.waitpid(self._process, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)
                break
            time.sleep(0.05)
        self._folder.cleanup()

    def _gone(self) -> BrowserError:
        """Make the error for a browser that ended, with the last line that it wrote."""
        lines = self._log.read_text("utf-8", "replace").split("\n") if self._log.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "nothing")
        return BrowserError(f"Chromium ended early; the last that it wrote is: {last}")

    def _message(self, end: float) -> dict[str, Any]:
        """Read the next reply or event."""
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise BrowserError(
                    f"Chromium did not answer for {SECONDS:g} seconds; run the check once more."
                )
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise self._gone()
            self._pending += piece
        text, _, self._pending = self._pending.partition(b"\0")
        return json.loads(text)

    def call(
        self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None
    ) -> dict[str, Any]:
        """Send a command, and wait for its result.

        Args:
            method: The command, such as ``Page.navigate``.
            parameters: What it is called with.
            session: The tab that it is for, or None for the browser.

        Returns:
            The result.

        Raises:
            BrowserError: Chromium refuses the command, ends or does not answer.
        """
        self._last += 1
        command: dict[str, Any] = {"id": self._last, "method": method, "params": parameters or {}}
        if session is not None:
            command["sessionId"] = session
        data = json.dumps(command).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self._write, data) :]
        except BrokenPipeError:
            raise self._gone() from None
        end = time.monotonic() + SECONDS
        while (message := self._message(end)).get("id") != self._last:
            self.events.append(message)
        if "error" in message:
            raise BrowserError(f"Chromium refused {method}: {message['error']['message']}.")
        return message["result"]

    def wait(self, event: str) -> None:
        """Wait until an event comes, and keep those before it.

        Args:
            event: The name, such as ``Page.loadEventFired``.

        Raises:
            BrowserError: Chromium ends, or the event does not come.
        """
        end = time.monotonic() + SECONDS
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._message(end))
