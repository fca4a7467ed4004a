"""Copies of large models: little memory, and nothing left behind by Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from xquant_gguf.gguf_file import GGUFFile

MIB = 1 << 20
N_MIB = 256
PEAK = """
import resource, sys
from xquant_gguf.metadata import Key, VERSION, copy_with_keys
from gguf import GGUFValueType
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
copy_with_keys(sys.argv[1], sys.argv[2], {"xquant.version": Key(GGUFValueType.UINT32, VERSION)})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model of one tensor, mostly a hole in the file; its last bytes are not zero."""
    path = tmp_path / "large.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor_info("token_embd.weight", (N_MIB, MIB), np.dtype(np.int8), N_MIB * MIB)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    end = GGUFFile(path).data + N_MIB * MIB
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end - 4)
        file.write(b"last")
    return path


def test_copies_take_little_memory(large: Path) -> None:
    out = large.with_name("out.gguf")
    command = [sys.executable, "-c", PEAK, str(large), str(out)]
    told = subprocess.run(command, cwd=large.parent, capture_output=True, text=True, check=True).stdout
    assert int(told) < 64 * 1024, f"{told} KiB for a copy of {N_MIB} MiB"
    assert bytes(GGUFReader(out).tensors[0].data.reshape(-1)[-4:]) == b"last"
    assert "xquant.version" in GGUFFile(out).keys


def test_ctrl_c_leaves_nothing(large: Path) -> None:
    out = large.with_name("out.gguf")
    command = [sys.executable, "-m", "xquant_gguf", "strip", str(large), str(out)]
    # tests that a shell runs in the background ignore the signal, and what they start would too
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=large.parent, stderr=subprocess.PIPE, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not list(large.parent.glob("out.gguf.*.part")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(large.parent.iterdir()) == [large]
