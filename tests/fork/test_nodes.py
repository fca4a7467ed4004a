"""What a worker refuses of a node that came over a network: everything that is not true of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from support import nodes
from support.nodes import HEADS, PAGES, SLOTS, STREAMS, Node

KINDS = tuple(Node.SOURCES)
LAYERS = ("own", "borrows", "mapped")
ALL = [(kind, layer) for kind in KINDS for layer in LAYERS]
Change = Callable[[Node], None]
FREE = {"input": (0,), "moves": (1,), "mask": (0, 1)}  # axes that may be longer than what is read, or shorter
STRIDED = ("k_cur", "v_cur", "q", "mask", "keys")


def wrong_tensors(kind: str, layer: str) -> Iterator[tuple[str, Change]]:
    """Each field of each tensor with values that it cannot have."""
    ffi, _ = nodes.load()
    for name, tensor in Node(kind, layer).tensors.items():
        if name == "result" and kind in ("rows", "moves", "write_keys"):
            continue  # is not looked at

        def of(node: Node, name: str = name) -> nodes.Tensor:
            return node.tensors[name]

        if name not in ("result", "sinks"):
            yield f"{name} is missing", lambda node, name=name: node.source(name, ffi.NULL)
        for other in (0, 1, 24, 26, 2, 39, -1, 1000):
            if other != tensor.c.type:
                yield f"{name}.type {other}", lambda node, other=other, of=of: setattr(of(node).c, "type", other)
        for address in (0, 1, int(ffi.cast("intptr_t", tensor.c.data)) + 1):
            data = ffi.cast("void *", address)
            yield f"{name}.data {address}", lambda node, data=data, of=of: setattr(of(node).c, "data", data)
        for axis in range(4):
            n = tensor.c.ne[axis]
            sizes = [0, -1, 1 << 62, *([] if axis in FREE.get(name, ()) else [n + 1, n - 1])]
            for size in sizes:
                if 0 < size < n and name == "result" and kind == "unpack" and axis > 0:
                    continue  # less is unpacked then
                yield f"{name}.ne[{axis}] {size}", lambda node, axis=axis, size=size, of=of: of(node).c.ne.__setitem__(
                    axis, size
                )
            element = tensor.c.nb[0]
            packed = name not in STRIDED or (name == "result" and kind == "read_keys")
            strides = [1 << 62, (1 << 64) - element, *([0, element // 2, tensor.c.nb[axis] + element] if packed else [])]
            for stride in [*strides, tensor.c.nb[axis] + 1]:
                if n > 1 and not (element == 1 and stride == tensor.c.nb[axis]):
                    yield f"{name}.nb[{axis}] {stride}", lambda node, axis=axis, stride=stride, of=of: of(
                        node
                    ).c.nb.__setitem__(axis, stride)


def wrong_parameters(kind: str, layer: str) -> Iterator[tuple[str, Change]]:
    """Each parameter with values that it cannot have."""
    p = Node(kind, layer).params
    values: dict[str, list[float]] = {
        "d": [0, 16, 48, 60, 576, 592, 65535], "e": [0, 16, 48, 60, 576, 592, 65535],
        "n_head_kv": [0, 1, 3, 4, 32768, 65535], "n_pages": [-1, 0, 2, 4, 1 << 22, 2**31 - 1, -(2**31)],
    }  # fmt: skip
    if kind == "attend":
        values |= {"number": [-1, 0, 1, 3, 32767, 32768, 2**31 - 1], "latent": [8, 16, 32, 576, 65535]}
        values |= {"scale": [0.0, -1.0, float("nan")]}
    if kind == "moves":
        values |= {"number": [-1, 3, 2**31 - 1, -(2**31)]}
    if kind == "unpack":
        values |= {"number": [-1, 1, HEADS, 2**31 - 1], "flags": [0]}  # values are not as wide as keys
    if layer != "own":
        values |= {"other_codes": [0xFFFF, 0xFFFE, 1000]}
    if layer == "mapped":
        values |= {"other_param": [0xFFFF, 0xFFFE, 1000]}
    for name, wrong in values.items():
        for value in wrong:
            if value != getattr(p, name):
                yield f"{name} {value}", lambda node, name=name, value=value: setattr(node.params, name, value)
    fields: dict[str, list[float]] = {
        "bits": [0, 1, 4, 5, 255], "group": [3, 5, 255], "fit": [5, 255], "eta": [0.5, -1, float("nan")],
    }  # fmt: skip
    sides = ["k", "v", *(["source"] if layer == "mapped" else [])]
    for side in sides:
        for name, wrong in fields.items():
            for value in wrong:
                if name == "bits" and value < 5 and (side == "source" or layer == "borrows"):
                    continue  # so many lie within a block, too
                yield f"{side}.{name} {value}", lambda node, side=side, name=name, value=value: setattr(
                    getattr(node.params, side), name, value
                )
        for flags in (4, 8, 12):
            if flags != getattr(p, side).flags:
                yield f"{side}.flags {flags}", lambda node, side=side, flags=flags: setattr(
                    getattr(node.params, side), "flags", flags
                )


def wrong_indices(kind: str, layer: str) -> Iterator[tuple[str, Change]]:
    """Numbers of streams, pages, slots and rows that there are not."""

    def at(name: str, index: int, value: int) -> tuple[str, Change]:
        return f"{name}[{index}] {value}", lambda node: node.tensors[name].array.reshape(-1).__setitem__(index, value)

    most, least = 2**31 - 1, -(2**31)
    if kind in ("attend", "unpack"):
        yield from (at("input", 0, value) for value in (-1, 1, most, least))
        yield from (at("input", 4 + i, value) for i in (0, 5) for value in (-3, SLOTS, most, least))
    if kind == "rows":
        yield from (at("input", 4 + STREAMS * PAGES, value) for value in (-1, STREAMS * SLOTS * 128, most, least))
    name = {"moves": "moves", "read_keys": "pages", "write_keys": "pages"}.get(kind)
    if name:
        for word, limit in enumerate((STREAMS, PAGES, SLOTS)):
            yield from (at(name, i + word, value) for i in (0, 7) for value in (-2, limit, most, least))
    if layer == "mapped":

        def head(value: int) -> Change:
            return lambda node: node.tensors["aux"].array.reshape(-1)[64:68].view(np.int32).__setitem__(0, value)

        yield from ((f"map head {value}", head(value)) for value in (-1, HEADS, most, least))


def overlapping(kind: str, layer: str) -> Iterator[tuple[str, Change]]:
    """What is written lies over what says where."""
    indices = [n for n in ("input", "moves", "pages", "aux") if n in Node(kind, layer).tensors]
    written = ["rows", "blocks", "aux", *(["result"] if kind in ("attend", "unpack", "read_keys") else [])]
    for a in written:
        for b in indices:
            if a != b:
                # the shorter lies at the end of the longer, which so much memory has
                def change(node: Node, a: str = a, b: str = b) -> None:
                    long, short = sorted((node.tensors[a], node.tensors[b]), key=lambda t: -t.array.nbytes)
                    address = (long.array.ctypes.data + long.array.nbytes - short.array.nbytes) & ~63
                    short.c.data = nodes.load()[0].cast("void *", address)

                yield f"{a} over {b}", change


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
    n = 0
    for n, (what, change) in enumerate(wrong(kind, layer), 1):
        node = Node(kind, layer)
        change(node)
        before = {name: tensor.array.tobytes() for name, tensor in node.tensors.items()}
        if node.run():
            ran.append(what)
        else:
            assert before == {name: node.tensors[name].array.tobytes() for name in before}, what
    assert not ran
    assert n > 0
