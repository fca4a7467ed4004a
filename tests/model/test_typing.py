"""What a user's type checker says of our Llama: a misspelt argument is an error, and what is right is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import xquant_gguf

PROGRAM = """
from xquant_gguf import Llama

def load() -> Llama:
    return Llama.from_pretrained("owner/name", "*.gguf", kv_type="xquant", n_ctx=4096)

llm = Llama("m.gguf", kv_type="xquant", n_ctx=4096, tensor_split=[1.0], kv_overrides={"a": 1}, flash_attn=True)
print(llm.kv_cache_info()["true_bits"])
llm.load_state(llm.save_state())
Llama("m.gguf", kv_typ="xquant")
Llama("m.gguf", n_ctx="4096")
Llama.from_pretrained("owner/name", "*.gguf", n_ctxx=4096)
"""


def test_a_type_checker_finds_misspelt_arguments(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="the extra `test` has it")
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {**os.environ, "MYPYPATH": "", "PYTHONPATH": str(Path(xquant_gguf.__file__).parent.parent)}
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file=", "program.py"]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    errors = [line.split(": ", 2) for line in out.stdout.splitlines() if ": error: " in line]
    found = {int(where.partition(":")[2]): message for where, _, message in errors}
    assert set(found) == {10, 11, 12}, out.stdout + out.stderr
    assert 'Unexpected keyword argument "kv_typ" for "Llama"' in found[10]
    assert '"n_ctx" to "Llama" has incompatible type "str"; expected "int"' in found[11]
    assert 'Unexpected keyword argument "n_ctxx" for "from_pretrained"' in found[12]
