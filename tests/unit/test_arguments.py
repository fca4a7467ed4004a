"""Arguments of Llama without a model: their names and types, typing mistakes, numbers out of range; types of caches."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

import llama_cpp
import pytest

from xquant_gguf import Llama, fork
from xquant_gguf.arguments import KNOWN, LlamaOptions
from xquant_gguf.kv_types import LLAMA_TYPES, described, number_of


def test_options_are_those_of_llama_cpp() -> None:
    """Name for name and type for type, so that type checkers know what llama_cpp takes."""
    signature = inspect.signature(llama_cpp.Llama.__init__)
    theirs = typing.get_type_hints(llama_cpp.Llama.__init__, vars(llama_cpp.llama))
    ours = typing.get_type_hints(LlamaOptions)
    names = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert set(names) == set(ours) == KNOWN
    for name in names:
        assert _members(ours[name]) == _members(theirs[name]), name


def _members(annotation: Any) -> set[Any]:
    """The types of a union, containers without what they hold: list[float] | None is {list, NoneType}."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return {typing.get_origin(kind) or kind for kind in (typing.get_args(annotation) if union else (annotation,))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_typ": "xquant-tiny"}, r"Llama has no argument 'kv_typ': did you mean 'kv_type'\?"),
        ({"kv_type": "xquant", "kvplan": {"window": 512}}, r"'kvplan': did you mean 'kv_plan'\?"),
        ({"type_kv": "xquant"}, r"Llama has no argument 'type_kv': did you mean 'type_v'\?"),
        ({"n_ctxx": 99}, r"'n_ctxx': did you mean 'n_ctx'\?"),
        ({"zzzzzz": 1}, "Llama has no argument 'zzzzzz'$"),
    ],
)
def test_misspelt_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Llama("no-such-model.gguf", **options)
    with pytest.raises(TypeError, match=message):  # before anything is downloaded
        Llama.from_pretrained("nobody/nothing", "*.gguf", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": -1}, "n_ctx is -1, must be an integer from 0 to 2147483647"),
        ({"n_ctx": 2**31}, "n_ctx is 2147483648, must be an integer from 0 to 2147483647"),
        ({"n_ctx": "4096"}, "n_ctx is '4096', must be an integer from 0"),
        ({"n_batch": 0}, "n_batch is 0, must be an integer from 1"),
        ({"n_ubatch": -3}, "n_ubatch is -3, must be an integer from 1"),
        ({"n_threads": -1}, "n_threads is -1, must be an integer from 0"),
        ({"n_threads_batch": 2.5}, "n_threads_batch is 2.5, must be an integer from 0"),
        ({"n_gpu_layers": -2}, "n_gpu_layers is -2, must be an integer from -1"),
        ({"kv_type": "q2"}, "kv_type is 'q2', must be one of xquant, xquant-small"),
    ],
)
def test_numbers_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama("no-such-model.gguf", **options)
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained("nobody/nothing", "*.gguf", **options)


def test_types_of_caches_are_ggml_s() -> None:
    """Numbers as llama_cpp's bindings have them; bits as llama.cpp's documentation has them."""
    bits = {
        "f32": 32,
        "f16": 16,
        "bf16": 16,
        "q8_0": 8.5,
        "q5_1": 6,
        "q5_0": 5.5,
        "q4_1": 5,
        "iq4_nl": 4.5,
        "q4_0": 4.5,
    }
    assert {name: found.bits for name, found in LLAMA_TYPES.items()} == bits
    for name, found in LLAMA_TYPES.items():
        bound = getattr(llama_cpp, f"GGML_TYPE_{name.upper()}", 30)  # the bindings have no name for bf16
        assert found.number == bound == number_of(name)
        assert described(found.number) == (name, found.bits)
    assert described(fork.GGML_TYPE_XQUANT) == ("xquant", 0.0)
    assert {number_of("xquant"), number_of("xquant-tiny")} == {fork.GGML_TYPE_XQUANT}
    for number in (-1, 4, 31, fork.GGML_TYPE_XQUANT + 1):  # no types, types that are gone, nothing
        with pytest.raises(ValueError, match=f"cache type {number} is unknown to ggml"):
            described(number)
