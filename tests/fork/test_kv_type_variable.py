"""XQUANT_KV_TYPE: a program that knows nothing of xquant_gguf gets the cache that it names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xquant_gguf import fork, native

PROGRAM = """
import xquant_gguf_hook  # as xquant_gguf.pth does when Python starts
import json, pickle, sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=2048, verbose=False, **json.loads(sys.argv[2]))
for _ in range(2):
    p = llm.context_params
    llm.eval([5 + i % 200 for i in range(1200)])
    assert llm.n_tokens == 1200
    print(json.dumps([p.type_k, p.type_v, llm.kv_overrides]))
    llm = pickle.loads(pickle.dumps(llm))
"""


def told(model: Path, variable: str, program: str = PROGRAM, **options: object) -> subprocess.CompletedProcess[str]:
    """What the program says of its cache, twice: of its own and of a copy's."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XQUANT", "LLAMA"))}
    command = [sys.executable, "-c", program, str(model), json.dumps(options)]
    return subprocess.run(
        command, env={**env, "XQUANT_KV_TYPE": variable}, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize(
    ("kv_type", "number", "overrides", "said"),
    [
        ("xquant", fork.GGML_TYPE_XQUANT, None, "3.25 bits per value"),
        ("xquant-tiny", fork.GGML_TYPE_XQUANT, {"xquant.preset": "xquant-tiny"}, "1.75 bits per value"),
        ("q8_0", 8, None, "8.50 bits per value"),
    ],
)
def test_the_program_gets_that_cache(
    paths: dict[str, Path], kv_type: str, number: int, overrides: dict[str, str] | None, said: str
) -> None:
    out = told(paths["plain"], kv_type)
    assert out.returncode == 0, out.stderr
    assert [json.loads(line) for line in out.stdout.splitlines()] == [[number, number, overrides]] * 2
    first = out.stderr.splitlines()[0]
    assert first.startswith(f"xquant_gguf: XQUANT_KV_TYPE={kv_type}: {said}, ")
    assert out.stderr.count("MiB of KV cache") == 1


def test_nothing_happens_without_it(paths: dict[str, Path]) -> None:
    out = told(paths["plain"], "")
    assert [json.loads(line)[:2] for line in out.stdout.splitlines()] == [[1, 1], [1, 1]]
    assert out.stderr == ""


def test_what_the_program_chose_stays(paths: dict[str, Path]) -> None:
    out = told(paths["plain"], "xquant", type_k=1)
    assert json.loads(out.stdout.splitlines()[0])[:2] == [1, 1]
    assert "XQUANT_KV_TYPE=xquant: the program chose type_k=1 itself, which stays" in out.stderr


def test_our_own_class_is_left_alone(paths: dict[str, Path]) -> None:
    program = PROGRAM.replace("from llama_cpp import Llama", "from xquant_gguf import Llama")
    out = told(paths["plain"], "xquant", program, kv_type="f16")
    assert [json.loads(line)[:2] for line in out.stdout.splitlines()] == [[1, 1], [1, 1]], out.stderr
    assert out.stderr == ""


def test_a_wrong_name_is_an_error(paths: dict[str, Path]) -> None:
    out = told(paths["plain"], "xquant-hug")
    assert "ValueError: XQUANT_KV_TYPE: kv_type is 'xquant-hug', must be one of xquant, xquant-small" in out.stderr


def test_a_model_that_cannot_have_it_is_an_error(paths: dict[str, Path]) -> None:
    out = told(paths["plain"], "xquant", attention_type=1, kv_overrides={"xquant.preset": "none"})
    assert out.returncode == 1
    assert f"ValueError: {paths['plain']} with XQUANT_KV_TYPE=xquant: " in out.stderr


def test_libraries_without_it_are_named(paths: dict[str, Path]) -> None:
    """Where llama_cpp keeps libraries that were chosen for it, a line says why; they happen to be ours here."""
    program = f"import os\nos.environ['LLAMA_CPP_LIB_PATH'] = {str(native.LIBRARY_DIR)!r}\n{PROGRAM}"
    out = told(paths["plain"], "xquant", program)
    assert [json.loads(line)[:2] for line in out.stdout.splitlines()] == [[1, 1], [1, 1]], out.stderr
    want = "XQUANT_KV_TYPE=xquant: llama_cpp keeps libraries without this cache, since LLAMA_CPP_LIB_PATH is set"
    assert out.stderr.splitlines() == [f"xquant_gguf: {want}"]
