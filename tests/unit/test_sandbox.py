"""Programs that nobody has read: what ends well, and each limit that a program can meet."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from xquant_gguf.tasks import sandbox
from xquant_gguf.tasks.sandbox import ends_well


@pytest.mark.parametrize(
    "program",
    ["assert 1 == 1", "print('no line end', end='')", "import math, json, re", 'if __name__ == "__main__":\n    1 / 0'],
)
def test_it_ends_well(program: str) -> None:
    assert ends_well(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "this is no Python",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "x = bytearray(2 << 30)",
        "open('file', 'w').write('x' * (2 << 20))",
        "print('x' * (2 << 20))",
        "import os\nfor i in range(100): os.open('.', 0)",
        "raise SystemExit",
    ],
)
def test_it_does_not(program: str) -> None:
    assert not ends_well(program)


def test_time_is_limited() -> None:
    start = time.monotonic()
    assert not ends_well("while True: pass", {"RLIMIT_CPU": 1})
    assert not ends_well("import time\ntime.sleep(60)", seconds=1)
    assert time.monotonic() - start < 20


def test_where_it_runs(tmp_path: Path) -> None:
    """An empty folder that is gone afterwards, nothing of our environment, no module from where we are."""
    told = tmp_path / "told"
    told.touch()
    program = f"""
import os, sys
assert os.listdir() == ["program.py"]
assert set(os.environ) <= {{"LC_CTYPE"}}, os.environ  # Python sets it
assert not any(path in ("", os.getcwd()) for path in sys.path)
open("left", "w").write("behind")
open({str(told)!r}, "w").write(os.getcwd())
"""
    assert ends_well(program)
    assert told.read_text()
    assert not Path(told.read_text()).exists()


def test_no_network_where_linux_allows_it() -> None:
    """Without a network there is not even a way to this machine's own address."""
    if not sandbox.namespaces():
        pytest.skip("this machine lets its users make no namespaces")
    listening = "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\n"
    assert not ends_well(listening + "socket.create_connection(s.getsockname(), 5)")
    assert ends_well("import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']")


def test_without_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "namespaces", lambda: ())
    assert ends_well("x = 1")
    assert not ends_well("1 / 0")
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "NAMESPACES", ("no-such-program",))
    sandbox.namespaces.cache_clear()
    assert sandbox.namespaces() == ()
    sandbox.namespaces.cache_clear()


def test_no_process_stays_behind(tmp_path: Path) -> None:
    """Root can make processes where others cannot; they end with the program, also those that leave its group."""
    if not sandbox.namespaces():
        pytest.skip("this machine lets its users make no namespaces")
    told = tmp_path / "told"
    told.touch()
    later = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1)\n"
    later += f"    open({str(told)!r}, 'w').write('x')\n    os._exit(0)\n"
    assert ends_well(later) == (os.geteuid() == 0)
    time.sleep(2)
    assert told.read_text() == ""


def test_without_limits_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(OSError, match="are not run on Windows"):
        ends_well("pass")
