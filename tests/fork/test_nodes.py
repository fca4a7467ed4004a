"""What a worker refuses of a node that came over a network: everything that is not true of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from support import nodes
from support.nodes import HEADS, PAGES, SLOTS, SOURCE_HEADS, STAGED, STREAMS, Node

KINDS = tuple(Node.SOURCES)
LAYERS = ("own", "borrows", "mapped")
ALL = [(kind, layer) for kind in KINDS for layer in LAYERS]
Change = Callable[[Node], None]
FREE = {
    "input": (0,),
    "moves": (1,),
    "cleared": (1,),
    "mask": (0, 1),
}  # axes that may be longer than what is read, or shorter
STRIDED = ("k_cur", "v_cur", "q", "mask", "keys")


def set_source(name: str, value: Any, node: Node) -> None:
    node.source(name, value)


def set_field(name: str, field: str, value: Any, node: Node) -> None:
    setattr(node.tensors[name].c, field, value)


def set_axis(name: str, field: str, axis: int, value: int, node: Node) -> None:
    getattr(node.tensors[name].c, field)[axis] = value


def set_parameter(name: str, value: float, node: Node) -> None:
    setattr(node.params, name, value)


def set_side(side: str, name: str, value: float, node: Node) -> None:
    setattr(getattr(node.params, side), name, value)


def set_element(name: str, index: int, value: int, node: Node) -> None:
    """Of 32 bits."""
    node.tensors[name].array.reshape(-1).view(np.int32)[index] = value


def wrong_tensors(kind: str, layer: str) -> Iterator[tuple[str, Change]]:
    """Each field of each tensor with values that it cannot have."""
    ffi, _ = nodes.load()
    for name, tensor in Node(kind, layer).tensors.items():
        if name == "result" and kind in ("rows", "moves", "clear", "write_keys"):
            continue  # is not looked at
        if name not in ("result", "sinks") and (kind, name) != ("clear", "input"):
            yield f"{name} is missing", partial(set_source, name, ffi.NULL)
        for other in (0, 1, 24, 26, 2, 39, -1, 1000):
            if other != tensor.c.type:
                yield f"{name}.type {other}", partial(set_field, name, "type", other)
        for address in (0, 1, int(ffi.cast("intptr_t", tensor.c.data)) + 1):
            yield f"{name}.data {address}", partial(set_field, name, "data", ffi.cast("void *", address))
        for axis in range(4):
            yield from wrong_axes(kind, name, tensor.c, axis)


def wrong_axes(kind: str, name: str, tensor: Any, axis: int) -> Iterator[tuple[str, Change]]:
    n, element, stride = tensor.ne[axis], tensor.nb[0], tensor.nb[axis]
    for size in [0, -1, 1 << 62, *([] if axis in FREE.get(name, ()) else [n + 1, n - 1])]:
        if not (0 < size < n and name == "result" and kind == "unpack" and axis > 0):  # less is unpacked then
            yield f"{name}.ne[{axis}] {size}", partial(set_axis, name, "ne", axis, size)
    packed = name not in STRIDED
    for wrong in [1 << 62, (1 << 64) - element, stride + 1, *([0, element // 2, stride + element] if packed else [])]:
        if n > 1 and wrong != stride:
            yield f"{name}.nb[{axis}] {wrong}", partial(set_axis, name, "nb", axis, wrong)


def wrong_parameters(kind: str, layer: str) -> Iterator[tuple[str, Change]]:
    """Each parameter with values that it cannot have.  More pages than there are blocks: the first ones have none."""
    p = Node(kind, layer).params
    values: dict[str, list[float]] = {
        "d": [0, 16, 48, 60, 576, 592, 65535], "e": [0, 16, 48, 60, 576, 592, 65535],
        "n_head_kv": [0, 1, 3, 4, 32768, 65535], "n_pages": [-1, 0, 2, 300, 1 << 22, 2**31 - 1, -(2**31)],
        "n_bytes": [-1, 0, 2, 1 << 22, (1 << 22) + 1, 2**31 - 1, -(2**31)],
    }  # fmt: skip
    if kind == "attend":
        values |= {"number": [-1, 0, 1, 3, 32767, 32768, 2**31 - 1], "latent": [8, 16, 32, 576, 65535]}
        values |= {"scale": [0.0, -1.0, float("nan")]}
    if kind in ("rows", "attend"):
        values |= {"flags": [4]}  # still to be rotated: what a GPU does
    if kind in ("moves", "clear"):
        values |= {"number": [-1, 3, 2**31 - 1, -(2**31)]}
    if kind == "staged":
        values |= {"flags": [0]}  # rows of a stage that is not made
    if kind == "unpack":
        values |= {"number": [-1, 1, HEADS, 2**31 - 1], "flags": [0]}  # values are not as wide as keys
    if layer != "own":
        values |= {"other_codes": [0xFFFF, 0xFFFE, 1000]}
    if layer == "mapped":
        values |= {"other_param": [0xFFFF, 0xFFFE, 1000], "other_heads": [0, 1, 4, 32768, 65535]}
    for name, wrong in values.items():
        yield from ((f"{name} {x}", partial(set_parameter, name, x)) for x in wrong if x != getattr(p, name))
    fields: dict[str, list[float]] = {
        "bits": [0, 1, 4, 5, 255], "group": [3, 5, 255], "fit": [5, 255], "eta": [0.5, -1, float("nan")],
        "flags": [4, 8, 12],
    }  # fmt: skip
    for side in ["k", "v", *(["source"] if layer == "mapped" else [])]:
        for name, wrong in fields.items():
            if name == "bits" and (side == "source" or layer == "borrows"):
                wrong = [5, 255]  # fewer lie within a block, too
            yield from (
                (f"{side}.{name} {x}", partial(set_side, side, name, x))
                for x in wrong
                if x != getattr(getattr(p, side), name)
            )


def wrong_indices(kind: str, layer: str) -> Iterator[tuple[str, Change]]:
    """Numbers of streams, pages, slots and rows that there are not."""
    most, least = 2**31 - 1, -(2**31)
    wrong: list[tuple[str, int, tuple[int, ...]]] = []
    if kind in ("attend", "unpack"):
        wrong += [("input", 0, (-1, 1)), *(("input", 4 + i, (-4, SLOTS + STAGED)) for i in (0, 5))]
    if kind in ("rows", "staged"):
        n_slots = STREAMS * SLOTS + (STAGED if kind == "staged" else 0)
        wrong += [("input", 4 + STREAMS * PAGES, (-1, n_slots * 128))]
    if kind in ("moves", "read_keys", "write_keys"):
        name = "moves" if kind == "moves" else "pages"
        wrong += [(name, i + word, (-4, n)) for word, n in enumerate((STREAMS, PAGES, SLOTS)) for i in (0, 9)]
    if kind == "moves":
        wrong += [("moves", i + 8, (-4, -2, 0)) for i in (0, 9)]  # there is one byte slot
    if kind == "clear":
        wrong += [("cleared", word, (-4, n)) for word, n in enumerate((STREAMS, PAGES, SLOTS + STAGED))]
        wrong += [
            ("cleared", 3, (-1, SLOTS - 1, SLOTS + STAGED)),
            ("cleared", 2, (SLOTS,)),
        ]  # the stage is not refilled
    if layer == "mapped":
        wrong += [("aux", 16, (-1, SOURCE_HEADS))]
    for name, index, values in wrong:
        for value in (*values, most, least):
            yield f"{name}[{index}] {value}", partial(set_element, name, index, value)


def lay_over(a: str, b: str, node: Node) -> None:
    """The shorter lies at the end of the longer, which so much memory has."""
    longer, shorter = sorted((node.tensors[a], node.tensors[b]), key=lambda t: -t.array.nbytes)
    address = (longer.array.ctypes.data + longer.array.nbytes - shorter.array.nbytes) & ~63
    shorter.c.data = nodes.load()[0].cast("void *", address)


def overlapping(kind: str, layer: str) -> Iterator[tuple[str, Change]]:
    """What is written lies over what says where."""
    there = Node(kind, layer).tensors
    indices = [n for n in ("input", "moves", "cleared", "pages", "aux") if n in there]
    written = ["rows", "blocks", "aux", *(["result"] if kind in ("staged", "attend", "unpack", "read_keys") else [])]
    pairs: list[tuple[str, str]] = [(a, b) for a in written for b in indices if a != b]
    stage = "result" if kind == "staged" else "stage"
    pairs += [(stage, b) for b in ("rows", "blocks", *indices) if stage in there and (stage, b) not in pairs]
    return ((f"{a} over {b}", partial(lay_over, a, b)) for a, b in pairs)


@pytest.mark.parametrize(("kind", "layer"), ALL)
def test_true_ones_are_run(kind: str, layer: str) -> None:
    assert Node(kind, layer).run()


@pytest.mark.parametrize(("kind", "layer"), ALL)
@pytest.mark.parametrize("wrong", [wrong_tensors, wrong_parameters, wrong_indices, overlapping])
def test_false_ones_are_refused(
    kind: str, layer: str, wrong: Callable[[str, str], Iterator[tuple[str, Change]]]
) -> None:
    """And nothing is written."""
    ran = []
    changes = list(wrong(kind, layer))
    assert changes
    for what, change in changes:
        node = Node(kind, layer)
        change(node)
        before = {name: tensor.array.tobytes() for name, tensor in node.tensors.items()}
        if node.run():
            ran.append(what)
        else:
            assert before == {name: node.tensors[name].array.tobytes() for name in before}, what
    assert not ran
