"""The reader of GGUF heads: every type of value, and counts that lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFValueType, GGUFWriter

from support.lying_gguf import LIES
from xquant_gguf.gguf_file import GGUFFile


def test_reader_of_heads_takes_every_type(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    writer = GGUFWriter(path, "llama")
    numbers = [t for t in GGUFValueType if t not in (GGUFValueType.STRING, GGUFValueType.ARRAY)]
    for t in numbers:
        writer.add_key_value(f"one.{t.name}", 1, t)
        writer.add_key_value(f"two.{t.name}", [1, 0], GGUFValueType.ARRAY, t)
    writer.add_key_value("two.STRING", ["a", ""], GGUFValueType.ARRAY, GGUFValueType.STRING)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    head = GGUFFile(path)
    for t in numbers:
        assert head.value(f"one.{t.name}") == 1
        assert list(head.value(f"two.{t.name}")) == [1, 0]
    assert head.value("two.STRING") == ["a", ""]


@pytest.mark.parametrize("name", LIES)
def test_counts_sizes_and_alignments_that_lie_are_errors(tmp_path: Path, name: str) -> None:
    path = tmp_path / "lies.gguf"
    raw, message = LIES[name]
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        GGUFFile(path)
