"""What people see on a terminal: colours, tables, the live view. Through a real pseudo-terminal."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import struct
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from termios import TIOCSWINSZ

import pytest

from tests.cli import driver
from tests.cli.conftest import Shop

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07")


class Terminal:
    """A command on a terminal of its own, and what it has drawn so far."""

    def __init__(self, shop: Shop, *args: str) -> None:
        self.master, slave = pty.openpty()
        ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            [*driver.COMMAND, *args],
            cwd=shop.folder,
            env=driver.environment(shop.env | {"TERM": "xterm-256color"}),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.raw = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end in the middle of a character

    @property
    def text(self) -> str:
        """What it has drawn, without the codes that move and colour."""
        return ESCAPES.sub("", self.raw).replace("\r", "")

    def read_until(self, text: str | None) -> None:
        """Read until `text` was drawn; None means until the command ends."""
        give_up_at = time.monotonic() + driver.DEADLINE_SECONDS
        while text is None or text not in self.text:
            ready, _, _ = select.select([self.master], [], [], max(0.0, give_up_at - time.monotonic()))
            assert ready, f"no {text!r} in {driver.DEADLINE_SECONDS} s: {self.text}"
            try:
                read = os.read(self.master, 65536)
            except OSError:  # Linux reports the end of a terminal as an error
                read = b""
            if not read:
                assert text is None, f"ended without {text!r}: {self.text}"
                return
            self.raw += self._decoder.decode(read)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(driver.DEADLINE_SECONDS)
        os.close(self.master)


@contextmanager
def terminal(shop: Shop, *args: str) -> Iterator[Terminal]:
    opened = Terminal(shop, *args)
    try:
        yield opened
    finally:
        opened.close()


def draw(shop: Shop, *args: str, code: int = 0) -> Terminal:
    """Run a command on a terminal to its end."""
    with terminal(shop, *args) as drawn:
        drawn.read_until(None)
        assert drawn.process.wait(driver.DEADLINE_SECONDS) == code, drawn.text
    return drawn


@pytest.fixture
def id() -> str:
    return f"run-{uuid.uuid4().hex[:8]}"


def test_a_run_on_a_terminal(served: Shop, id: str) -> None:
    started = draw(served, "start", "fulfil", '"o-1"', "--id", id)
    assert f"Follow it with: streamflow watch {id} --app shop" in started.text

    with terminal(served, "watch", id) as live:
        live.read_until("signal approved")
        live.read_until("charge")
        assert "1 of 2" in live.text and "━" in live.text
        assert driver.run(served.folder, "signal", id, "approved", "true", env=served.env).returncode == 0
        live.read_until(None)
        assert live.process.wait(driver.DEADLINE_SECONDS) == 0
    picture = live.text[live.text.rindex(id) :]
    assert "completed" in picture and '"payment": "paid 5 for o-1"' in picture
    assert "\x1b[32m" in live.raw  # green
    assert live.raw.count("\x1b[?25l") == live.raw.count("\x1b[?25h") == 1  # the cursor is back

    status = draw(served, "status", id)
    assert "completed" in status.text and re.search(r"\((now|.+ ago)\)", status.text) and "\x1b[" in status.raw
    steps = draw(served, "steps", id)
    assert "charge" in steps.text and "─" in steps.text
    assert "payment" in draw(served, "result", id).text
    assert "RunCompleted" in draw(served, "history", id).text
    assert id in draw(served, "list").text
    assert '\n  "id": ' in draw(served, "status", id, "--json").text


def test_waiting_for_a_start_is_live_and_leaves_the_result(served: Shop, id: str) -> None:
    with terminal(served, "start", "fulfil", '"o-1"', "--id", id, "--wait") as live:
        live.read_until("signal approved")
        assert driver.run(served.folder, "signal", id, "approved", "7", env=served.env).returncode == 0
        live.read_until(None)
        assert live.process.wait(driver.DEADLINE_SECONDS) == 0
    assert live.text.endswith('\n{\n  "payment": "paid 5 for o-1",\n  "note": 7\n}\n')
    failed = draw(served, "start", "broken", '"no stock"', "--wait", "-v", code=1)
    assert "Traceback" in failed.text and "ValueError: no stock" in failed.text.splitlines()[-1]


def test_ctrl_c_leaves_the_terminal_as_it_was(served: Shop, id: str) -> None:
    assert driver.run(served.folder, "start", "patient", "3600", "--id", id, env=served.env).returncode == 0
    with terminal(served, "watch", id) as live:
        live.read_until("sleep until")
        live.process.send_signal(2)
        live.read_until(None)
        assert live.process.wait(driver.DEADLINE_SECONDS) == 130
    assert live.raw.rindex("\x1b[?25h") > live.raw.rindex("\x1b[?25l")
    assert "Traceback" not in live.text


def test_no_colour_and_a_dumb_terminal(served: Shop, id: str) -> None:
    assert driver.run(served.folder, "start", "add", "1", "1", "--id", id, "--wait", env=served.env).returncode == 0
    plain = Shop(served.folder, served.env | {"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[3\dm", draw(plain, "status", id).raw)
