"""Which of llama.cpp's nodes of attention are handed to attend_rows, and with what; a backend that only notes it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from support import nodes
from support.nodes import F16, F32, PAGE, Tensor
from xquant_gguf import native

WIDTH, N_HEAD, N_HEAD_KV, N_TOKENS, N_PAGES, N_STREAMS = 64, 6, 2, 5, 3, 2
SCRATCH, STREAM = 0x1000, 0x2000


def swapped(tensor: Tensor) -> Any:
    """A view of it whose axes 1 and 2 have changed places."""
    ffi, _ = nodes.load()
    view = ffi.new("struct ggml_tensor *", tensor.c[0])
    for axes in (view.ne, view.nb):
        axes[1], axes[2] = axes[2], axes[1]
    view.view_src = tensor.c
    return view


class Prompt:
    """A node of attention over unpacked pages, and what the backend was asked."""

    def __init__(self, has_sinks: bool = True) -> None:
        ffi, _ = native.load()
        self.memory = {
            "q": Tensor(F32, [WIDTH, N_HEAD, N_TOKENS, N_STREAMS]),
            "k": Tensor(F16, [WIDTH, N_HEAD_KV, N_PAGES * PAGE, N_STREAMS]),
            "v": Tensor(F16, [WIDTH, N_HEAD_KV, N_PAGES * PAGE, N_STREAMS]),
            "mask": Tensor(F16, [N_PAGES * PAGE, N_TOKENS + 2, 1, N_STREAMS]),
            "sinks": Tensor(F32, [N_HEAD]),
            "result": Tensor(F32, [WIDTH, N_HEAD, N_TOKENS, N_STREAMS]),
        }
        self.tensors = {name: swapped(x) if name in "qkv" else x.c for name, x in self.memory.items()}
        for name in "kv":
            self.memory[name].c.op = nodes.operation("UNPACK")
        self.node = self.tensors["result"]
        for i, name in enumerate(("q", "k", "v", "mask", "sinks")[: 4 + has_sinks]):
            self.node.src[i] = self.tensors[name]
        self.parameters(0.25, 0.0, 0.0)
        self.args: list[Any] = []
        self.stream = 0
        self.callbacks = [
            ffi.callback("int64_t(const xq_rows_args *)", self.rows_scratch),
            ffi.callback("int(const xq_rows_args *, const xq_exec *)", self.attend_rows),
        ]
        self.backend = ffi.new("xq_backend *")
        self.backend.rows_scratch, self.backend.attend_rows = self.callbacks

    def parameters(self, *values: float) -> None:
        """scale, max_bias, softcap"""
        for i, word in enumerate(struct.unpack("3i", struct.pack("3f", *values))):
            self.node.op_params[i] = word

    def noted(self, args: Any) -> None:
        ffi, _ = native.load()
        self.args.append(ffi.new("xq_rows_args *", args[0]))

    def rows_scratch(self, args: Any) -> int:
        self.noted(args)
        return 77

    def attend_rows(self, args: Any, at: Any) -> int:
        self.noted(args)
        self.stream = int(native.load()[0].cast("intptr_t", at.cuda_stream))
        return 0

    def scratch(self) -> int:
        """What is asked before the node is run."""
        ffi, lib = nodes.load()
        return int(lib.xquant_prompt_scratch(ffi.cast("void *", self.address()), self.node))

    def run(self) -> bool:
        ffi, lib = nodes.load()
        at = ffi.cast("void *", self.address())
        return bool(lib.xquant_prompt(at, self.node, ffi.cast("void *", SCRATCH), ffi.cast("void *", STREAM)))

    def address(self) -> int:
        return int(native.load()[0].cast("intptr_t", self.backend))


@pytest.mark.parametrize("has_sinks", [True, False])
def test_what_attend_rows_is_told(has_sinks: bool) -> None:
    ffi, _ = native.load()
    prompt = Prompt(has_sinks)
    assert prompt.scratch() == 77
    assert prompt.run()
    assert prompt.stream == STREAM
    asked, told = prompt.args
    assert (ffi.cast("intptr_t", asked.scratch), ffi.cast("intptr_t", told.scratch)) == (0, SCRATCH)
    row, cells = 4 * WIDTH, N_PAGES * PAGE
    numbers = {
        **{"q_head_stride": row, "q_token_stride": row * N_HEAD, "q_stream_stride": row * N_HEAD * N_TOKENS},
        **{"mask_token_stride": 2 * cells, "mask_stream_stride": 2 * cells * (N_TOKENS + 2)},
        **{"width": WIDTH, "n_head": N_HEAD, "n_head_kv": N_HEAD_KV, "n_tokens": N_TOKENS, "n_streams": N_STREAMS},
        **{"n_kv_pages": N_PAGES, "scale": 0.25},
    }
    for args in prompt.args:
        assert {name: getattr(args, name) for name in numbers} == numbers
        for name in ("q", "k", "v", "mask", "sinks"):
            there = name != "sinks" or has_sinks
            want = prompt.memory[name].array.ctypes.data if there else 0
            assert int(ffi.cast("intptr_t", getattr(args, name))) == want, name
        assert int(ffi.cast("intptr_t", args.out)) == prompt.memory["result"].array.ctypes.data


def set_field(name: str, field: str, value: Any) -> Callable[[Prompt], None]:
    return lambda prompt: setattr(prompt.tensors[name], field, value)


def set_axis(name: str, field: str, axis: int, value: int) -> Callable[[Prompt], None]:
    def change(prompt: Prompt) -> None:
        getattr(prompt.tensors[name], field)[axis] = value

    return change


def no_source(i: int) -> Callable[[Prompt], None]:
    def change(prompt: Prompt) -> None:
        prompt.node.src[i] = nodes.load()[0].NULL

    return change


def from_a_cache(name: str) -> Callable[[Prompt], None]:
    """F16 rows of a cache, or another node's."""
    return lambda prompt: setattr(prompt.memory[name].c, "op", 0)


def parameters(*values: float) -> Callable[[Prompt], None]:
    return lambda prompt: prompt.parameters(*values)


NOT_OURS: dict[str, Callable[[Prompt], None]] = {
    **{f"source {i} is missing": no_source(i) for i in range(4)},
    "ALiBi": parameters(0.25, 8.0, 0.0),
    "a soft cap": parameters(0.25, 0.0, 30.0),
    **{f"{name} is not unpacked": from_a_cache(name) for name in "kv"},
    **{f"{name} is no view": set_field(name, "view_src", nodes.load()[0].NULL) for name in "kv"},
    **{f"{name} of another type": set_field(name, "type", F16) for name in ("q", "sinks", "result")},
    **{f"{name} of another type": set_field(name, "type", F32) for name in ("k", "v", "mask")},
    **{f"{name} of another width": set_axis(name, "ne", 0, 32) for name in "qkv"},
    **{f"{name} of fewer cells": set_axis(name, "ne", 1, 2 * PAGE) for name in "kv"},
    **{f"{name} with gaps": set_axis(name, "nb", 1, 512) for name in "kv"},
    **{f"{name} of another head first": set_axis(name, "nb", 2, 256) for name in "kv"},
    "q with gaps between channels": set_axis("q", "nb", 0, 8),
    "a mask of fewer cells": set_axis("mask", "ne", 0, 2 * PAGE),
    "a mask of fewer tokens": set_axis("mask", "ne", 1, N_TOKENS - 1),
    "a mask for each head": set_axis("mask", "ne", 2, N_HEAD),
    "one mask for all streams": set_axis("mask", "ne", 3, 1),
    "sinks of fewer heads": set_axis("sinks", "ne", 0, N_HEAD - 1),
    "a result of fewer tokens": set_axis("result", "ne", 2, N_TOKENS - 1),
    "a result with gaps": set_axis("result", "nb", 1, 512),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_stays_with_llama_cpp(name: str) -> None:
    """The backend is not even asked."""
    prompt = Prompt()
    NOT_OURS[name](prompt)
    assert prompt.scratch() == -1
    assert not prompt.run()
    assert prompt.args == []


def test_a_part_of_a_page() -> None:
    prompt = Prompt()
    for name in "kv":
        prompt.tensors[name].ne[1] = PAGE + 64
    prompt.tensors["mask"].ne[0] = PAGE + 64
    assert prompt.scratch() == -1
