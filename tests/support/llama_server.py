"""A llama-server of its own for a test: started on a free port, asked, ended."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.workers import free_port
from xquant_gguf import native, programs

needs_programs = pytest.mark.skipif(
    not (native.LIBRARY_DIR / programs.PROGRAMS["llama-server"]).exists(), reason="built without -DXQUANT_PROGRAMS=ON"
)


@dataclass(frozen=True)
class Server:
    """Its address, and the file that it logs into."""

    url: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=120)

    def metrics(self) -> dict[str, float]:
        """Numbers of /metrics by name, without llama.cpp's prefix."""
        lines = [line.split() for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("llamacpp:"): float(value) for name, value in lines}

    def post(self, path: str, **body: Any) -> httpx.Response:
        """The response, whatever its status is."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=300)

    def complete(self, prompt: str, **body: Any) -> dict[str, Any]:
        """What /completion answers; greedy."""
        response = self.post("/completion", prompt=prompt, temperature=0, **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


@contextmanager
def running(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None = None, status: int = 0
) -> Iterator[Server]:
    """Starts a command line of llama-server, to which host and port are added; it must end well when it is told to.

    status: what it ends with then.
    """
    port = free_port()
    server = Server(f"http://127.0.0.1:{port}", folder / "log")
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with server.log_file.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as it:
        try:
            deadline = time.monotonic() + 300
            while not _answers(server):
                assert it.poll() is None, server.log
                assert time.monotonic() < deadline, server.log
                time.sleep(0.1)
            yield server
            assert it.poll() is None, server.log
        finally:
            it.terminate()
    assert it.returncode == status, server.log


def _answers(server: Server) -> bool:
    """Whether the model is loaded: until then there is no server, or one that says that it is loading."""
    try:
        return server.get("/health").status_code == 200
    except httpx.TransportError:
        return False
