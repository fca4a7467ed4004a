"""What lies in examples/ runs with the real packages, each where its package is installed, and gets our cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.llama_server import needs_programs, running

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAID = "xquant_gguf: XQUANT_KV_TYPE=xquant: 3.25 bits per value, "


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    out = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=600)
    assert out.returncode == 0, out.stderr
    return out


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if not installed(module)]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: not installed")


def without_the_hook(program: str, *arguments: str) -> list[str]:
    """A Python program's command line where xquant_gguf.pth is not installed: what it imports is imported first."""
    start = "import runpy, sys, xquant_gguf_hook; sys.argv = sys.argv[1:]; "
    return [sys.executable, "-c", f"{start}runpy.run_path(sys.argv[0], run_name='__main__')", program, *arguments]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("langchain_llamacpp.py", marks=needs("langchain_community")),
        pytest.param("llama_index_llamacpp.py", marks=needs("llama_index.llms.llama_cpp")),
    ],
)
def test_frameworks_get_the_cache(name: str, smollm2: str) -> None:
    out = run(without_the_hook(str(EXAMPLES / name), smollm2), XQUANT_KV_TYPE="xquant")
    assert SAID in out.stderr
    assert "Paris" in out.stdout


@needs("llm_gguf")
def test_the_llm_command(smollm2: str, tmp_path: Path) -> None:
    """llm starts Python itself, where xquant_gguf.pth brings the hook; here a sitecustomize does."""
    (tmp_path / "sitecustomize.py").write_text("import xquant_gguf_hook\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    env = {"PYTHONPATH": paths, "LLM_USER_PATH": str(tmp_path / "llm"), "XQUANT_KV_TYPE": ""}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    out = run([str(EXAMPLES / "llm_command.sh"), smollm2, "What is the capital of France?"], **env)
    assert SAID in out.stderr
    assert "Paris" in out.stdout


@needs("outlines", "numba")
def test_outlines(smollm2: str) -> None:
    """A model that may only write what fits; a small one may still be wrong."""
    city, country = run([sys.executable, str(EXAMPLES / "outlines_llamacpp.py"), smollm2]).stdout.splitlines()
    assert city.startswith("name='Paris' country='")
    assert country in ("France", "Spain")


def test_the_notebook(smollm2: str) -> None:
    """Its cells one after the other; the picture is drawn, and shown to nobody."""
    cells = json.loads((EXAMPLES / "memory_and_quality.ipynb").read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    out = run([sys.executable, "-c", program], MODEL=smollm2, MPLBACKEND="Agg").stdout
    assert re.search(r"^xquant-tiny +7\.9 .* 84\.2$", out, re.MULTILINE)
    kld = dict(re.findall(r"^(\S+) .*divergence (.*)$", out, re.MULTILINE))
    q4_0, ours = (float(kld[kind]) for kind in ("q4_0", "xquant"))
    assert 0 < ours < q4_0 / 3


@contextmanager
def serving(model: str, folder: Path) -> Iterator[str]:
    """The address of an OpenAI-compatible server with our cache."""
    command = [sys.executable, "-m", "xquant_gguf", "server", model, "-c", "2048", "-t", "2", "--no-webui"]
    with running(command, folder) as server:
        assert "xquant" in server.get("/props").json()
        yield f"{server.url}/v1"


@needs_programs
def test_the_openai_client(smollm2: str, tmp_path: Path) -> None:
    with serving(smollm2, tmp_path) as url:
        out = run([sys.executable, str(EXAMPLES / "openai_client.py"), url])
    answer, told = out.stdout.rsplit("\ncalls ", 1)
    assert len(answer.split()) > 3
    assert told.startswith(("weather {", "nothing, says: "))  # SmolLM2's template knows no tools


@needs("instructor")
@needs_programs
def test_instructor(smollm2: str, tmp_path: Path) -> None:
    with serving(smollm2, tmp_path) as url:
        whole, *parts = run([sys.executable, str(EXAMPLES / "instructor_client.py"), url]).stdout.splitlines()
    assert re.fullmatch("name='.+' country='.+'", whole)
    assert len(parts) > 2
    assert parts[-1] == f"so far {whole}"
