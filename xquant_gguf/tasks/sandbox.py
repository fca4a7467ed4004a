"""Runs a Python program that nobody has read, in a process of its own with limits.

It keeps out accidents: endless loops, too much memory, large files, many processes; and, where Linux lets users make
namespaces, the network and processes that stay behind.  It does not keep out an attack: the program may read what its
user may read, and delete or empty what its user may write.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

LIMITS = {
    "RLIMIT_CPU": 10,  # seconds
    "RLIMIT_AS": 1 << 30,  # bytes
    "RLIMIT_FSIZE": 1 << 20,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
    "RLIMIT_NPROC": 0,  # no further processes or threads; root may make them nevertheless, outside of a namespace
}
SECONDS = 30
"""Time until a program is ended, whatever it waits for."""

LAUNCHER = """
import json, resource, runpy, sys
for name, value in json.loads(sys.argv[1]).items():
    resource.setrlimit(getattr(resource, name), (value, value))
runpy.run_path(sys.argv[2], run_name="program")
"""
NAMESPACES = ("unshare", "--user", "--net", "--ipc", "--pid", "--fork", "--kill-child")


@functools.cache
def namespaces() -> tuple[str, ...]:
    """What a command begins with to run without a network and to leave no process behind; empty if this cannot be."""
    try:
        done = subprocess.run([*NAMESPACES, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return NAMESPACES if done.returncode == 0 else ()


def ends_well(program: str, limits: dict[str, int] | None = None, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end: without an exception, an exit before its end, or a limit that it meets.

    limits: by name of the module resource; those not named are LIMITS'.  OSError on Windows.
    """
    if sys.platform == "win32":
        raise OSError("programs that a model wrote are not run on Windows, which has no such limits for them")
    word = secrets.token_hex(16)  # what only the end of the program says
    with (
        tempfile.TemporaryDirectory(prefix="xquant-gguf-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as out,
    ):
        path = Path(folder, "program.py")
        path.write_text(f"{program}\n\nprint('\\n' + {word!r}, flush=True)\n")
        limited = json.dumps({**LIMITS, **(limits or {})})
        command = [*namespaces(), sys.executable, "-I", "-B", "-c", LAUNCHER, limited, str(path)]
        started = subprocess.Popen(
            command, cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            started.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        out.seek(0)
        return out.read(1 << 21).rstrip().endswith(b"\n" + word.encode())
