"""The plan that a GGUF file carries: the keys xquant.*, how they are written, read, copied and removed.

The fork reads the same keys (native/llama/xquant-metadata.cpp).  Arrays have one entry for each layer of the model; a
layer without keys and values in the cache has a K group of 0.
"""

from __future__ import annotations

import re
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGUFValueType

from xquant_gguf.gguf_file import MAGIC, NUMBERS, GGUFFile
from xquant_gguf.plan import Layer, Plan, Side, ValueMap, renumbered, shortest

VERSION = 1
PREFIX = "xquant."
I32, F32, BOOL, STRING = GGUFValueType.INT32, GGUFValueType.FLOAT32, GGUFValueType.BOOL, GGUFValueType.STRING
_BOTH = {"bits": I32, "group": I32, "owner": I32, "eta": F32, "fit": STRING, "scale": STRING}
ARRAYS = {"k": {**_BOTH, "rotate": BOOL}, "v": {**_BOTH, "rotate": BOOL, "source": I32}}
SINCE = {"k.rotate": False}
"""What arrays say that files lack which came before them."""
ABSENT = Side(0, 0)
"""What the arrays say of a layer that the cache does not hold."""
_FIELDS = {"scale": "param"}  # keys whose name is not that of the field of Side


@dataclass(frozen=True)
class Provenance:
    """What produced a plan: the tool, and the text's SHA-256 and length in tokens."""

    tool: str
    text_sha256: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class Key:
    """One metadata key: a number, a string, or an array of them (sub: the type of its entries)."""

    type: GGUFValueType
    value: Any
    sub: GGUFValueType | None = None


def plan_keys(
    plan: Plan, model_layers: Sequence[int], n_layers: int, made_by: Provenance | None = None
) -> dict[str, Key]:
    """The keys of a plan; model_layers: the model's number of each layer of the plan; n_layers: of the model."""
    if len(model_layers) != len(plan.layers) or any(not 0 <= i < n_layers for i in model_layers):
        raise ValueError(f"the plan has {len(plan.layers)} layers, the model's cache has layers {list(model_layers)}")
    layers = [Layer(ABSENT, ABSENT)] * n_layers
    for i, layer in zip(model_layers, plan.layers, strict=True):
        layers[i] = renumbered(layer, model_layers)
    keys = {
        "version": Key(GGUFValueType.UINT32, VERSION),
        "window": Key(I32, plan.window),
        "pinned": Key(I32, plan.pinned),
        "open_bits": Key(I32, plan.open_bits),
    }
    for side, kinds in ARRAYS.items():
        for name, kind in kinds.items():
            values = [getattr(getattr(layer, side), _FIELDS.get(name, name)) for layer in layers]
            keys[f"{side}.{name}"] = Key(GGUFValueType.ARRAY, values, kind)
    for i, value_map in sorted(plan.maps.items()):
        keys[f"map.{model_layers[i]}.heads"] = Key(GGUFValueType.ARRAY, list(value_map.heads), I32)
        keys[f"map.{model_layers[i]}.weight"] = _halves_key(value_map.weight)
    for i, weight in sorted(plan.transforms.items()):
        keys[f"transform.{model_layers[i]}.weight"] = _halves_key(weight)
    if plan.expected_kld is not None:
        keys["calibration.expected_kld"] = Key(F32, plan.expected_kld)
    if made_by is not None:
        keys["calibration.tool"] = Key(STRING, made_by.tool)
        keys["calibration.text_sha256"] = Key(STRING, made_by.text_sha256)
        keys["calibration.tokens"] = Key(GGUFValueType.UINT32, made_by.tokens)
    return {PREFIX + name: key for name, key in keys.items()}


def _halves_key(weight: bytes) -> Key:
    """F16 numbers as GGUF arrays can hold them: their bits."""
    return Key(GGUFValueType.ARRAY, np.frombuffer(weight, "<u2").tolist(), GGUFValueType.UINT16)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _values(values: Sequence[Any], kind: GGUFValueType) -> bytes:
    return b"".join(map(_string, values)) if kind == STRING else np.asarray(values, NUMBERS[kind]).tobytes()


def packed(keys: Mapping[str, Key]) -> bytes:
    """The bytes of keys as they stand in a GGUF file."""
    out = []
    for name, key in keys.items():
        out += [_string(name), struct.pack("<I", key.type)]
        if key.sub is None:
            out.append(_values([key.value], key.type))
        else:
            out += [struct.pack("<IQ", key.sub, len(key.value)), _values(key.value, key.sub)]
    return b"".join(out)


def plan_block(keys: Mapping[str, Key]) -> bytes:
    """A GGUF file of keys alone, in memory: what the fork is given as a plan."""
    return struct.pack("<4sIQQ", MAGIC, 3, 0, len(keys)) + packed(keys)


# ---- reading ----


class _Keys:
    """The keys of a file, with checks: every reader raises ValueError that names file, key, value and what may be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)

    def __contains__(self, key: str) -> bool:
        return PREFIX + key in self.file.keys

    def bad(self, key: str, found: object, allowed: object) -> ValueError:
        return ValueError(f"{self.path}: {PREFIX}{key} is {found}, must be {allowed}")

    def get(self, key: str, kind: GGUFValueType, sub: GGUFValueType | None = None) -> Any:
        if key not in self:
            raise ValueError(f"{self.path}: {PREFIX}{key} is missing")
        found = self.file.keys[PREFIX + key]
        if (found.type, found.sub) != (kind, sub):
            raise self.bad(key, _type_name(found.type, found.sub), _type_name(kind, sub))
        return self.file.value(PREFIX + key)

    def array(self, key: str, sub: GGUFValueType, length: int | None = None) -> list[Any]:
        if key in SINCE and key not in self:
            return [SINCE[key]] * (length or 0)
        found = self.get(key, GGUFValueType.ARRAY, sub)
        if length is not None and len(found) != length:
            raise self.bad(key, f"{len(found)} entries long", length)
        return found if isinstance(found, list) else list(found.tolist())

    def halves(self, key: str) -> bytes:
        """The F16 numbers whose bits an array holds."""
        found = self.get(key, GGUFValueType.ARRAY, GGUFValueType.UINT16)
        if not np.isfinite(found.view("<f2")).all():
            raise self.bad(key, "not finite", "finite numbers")
        return bytes(found.tobytes())


def _type_name(kind: GGUFValueType, sub: GGUFValueType | None) -> str:
    return kind.name.lower() if sub is None else f"an array of {sub.name.lower()}"


def read_plan(path: str | Path) -> tuple[Plan, list[int], int, Provenance] | None:
    """The plan of a GGUF file, the model's numbers of its layers, the number of layers of the model, and its origin.

    None if the file has none.  ValueError names a bad key, its value and what is allowed.
    """
    keys = _Keys(Path(path))
    if "version" not in keys:
        return None
    version = keys.get("version", GGUFValueType.UINT32)
    if version != VERSION:
        raise keys.bad("version", version, f"{VERSION}: another version of xquant_gguf wrote it")
    n_layers = len(keys.array("k.bits", I32))
    sides = []
    for side, kinds in ARRAYS.items():
        columns = {_FIELDS.get(name, name): keys.array(f"{side}.{name}", t, n_layers) for name, t in kinds.items()}
        columns["eta"] = [shortest(x) for x in columns["eta"]]
        sides.append([Side(**{name: column[i] for name, column in columns.items()}) for i in range(n_layers)])
    held = [i for i in range(n_layers) if sides[0][i].group != 0]
    place = {layer: i for i, layer in enumerate(held)}
    for i in held:
        for name, stored in zip("kv", (sides[0][i], sides[1][i]), strict=True):
            for what in ("owner", "source"):
                other = getattr(stored, what)
                if other != -1 and (other not in place or other >= i):
                    raise keys.bad(f"{name}.{what}[{i}]", other, "an earlier layer of the cache, or -1")
    place[-1] = -1
    layers = tuple(
        Layer(*(replace(s[i], owner=place[s[i].owner], source=place[s[i].source]) for s in sides)) for i in held
    )
    maps = {}
    for i, layer in enumerate(layers):
        if layer.v.source >= 0:
            weight = keys.halves(f"map.{held[i]}.weight")
            maps[i] = ValueMap(tuple(keys.array(f"map.{held[i]}.heads", I32)), weight)
    names = {i: f"transform.{layer}.weight" for i, layer in enumerate(held)}
    transforms = {i: keys.halves(name) for i, name in names.items() if name in keys}
    kld = None
    if "calibration.expected_kld" in keys:
        kld = shortest(keys.get("calibration.expected_kld", F32))
        if not 0 <= kld < float("inf"):
            raise keys.bad("calibration.expected_kld", kld, "a number of at least 0")
    open_bits = keys.get("open_bits", I32) if "open_bits" in keys else 16  # as files that came before the key
    window, pinned = keys.get("window", I32), keys.get("pinned", I32)
    plan = Plan("calibrated", layers, window, pinned, maps, kld, open_bits, transforms)
    try:
        plan.check()
    except ValueError as error:
        raise ValueError(f"{path}: xquant metadata: {error}") from error
    kinds = {"tool": STRING, "text_sha256": STRING, "tokens": GGUFValueType.UINT32}
    known = {name: keys.get(f"calibration.{name}", t) for name, t in kinds.items() if f"calibration.{name}" in keys}
    made_by = Provenance(**{"tool": "", **known})
    return plan, held, n_layers, made_by


def carried_keys(path: str | Path) -> dict[str, Any]:
    """The xquant.* keys of a GGUF file, arrays as lists, but the numbers of maps only counted; nothing is checked."""
    file = GGUFFile(path)
    out: dict[str, Any] = {}
    for name, entry in file.keys.items():
        if name.startswith(PREFIX):
            if name.endswith(".weight"):
                out[name] = f"{entry.count} numbers"
            else:
                value = file.value(name)
                out[name] = value.tolist() if isinstance(value, np.ndarray) else value
    return out


# ---- copying ----


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A name to write to; it becomes `path` when all went well, and nothing is left behind otherwise.

    The name is known before there is such a file, so that Ctrl-C at any moment finds it.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.touch(exist_ok=False)
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def splits(path: Path) -> list[Path]:
    """All files of a model: itself, or those of a split one, whose first part must be named."""
    match = SPLIT.fullmatch(path.name)
    if not match or int(match[3]) < 2:
        return [path]
    if int(match[2]) != 1:
        raise ValueError(f"{path} is part {int(match[2])} of a split model: name its first part")
    return [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1)]


def _copy_bytes(src: BinaryIO, dst: BinaryIO, first: int, end: int, moved: Callable[[int], object]) -> None:
    src.seek(first)
    while first < end:
        chunk = src.read(min(1 << 24, end - first))
        if not chunk:
            raise ValueError(f"{src.name} ends at byte {first}, must have {end}")
        dst.write(chunk)
        first += len(chunk)
        moved(len(chunk))


def copy_with_keys(
    source: str | Path, target: str | Path, keys: Mapping[str, Key], moved: Callable[[int], object] = lambda n: None
) -> None:
    """Copies a GGUF model without its xquant.* keys, and with these instead; moved: told of bytes that were copied.

    All tensors stay byte for byte, all other keys as they are and in order.  A split model is named by its first part,
    and so is the copy.  Files are written beside and renamed when complete.
    """
    source, target = Path(source), Path(target)
    parts, copies = splits(source), splits(target)
    if len(parts) != len(copies):
        example = SPLIT.sub(r"NAME-\2-of-\3.gguf", parts[0].name)
        raise ValueError(f"{target}: {source} is a model of {len(parts)} files, so name the copy like {example}")
    for part, copy in zip(parts, copies, strict=True):
        if copy.exists() and part.exists() and copy.samefile(part):
            raise ValueError(f"{copy} is the model itself: name another file")
    file = GGUFFile(source)
    if file.n_tensors == 0:
        raise ValueError(f"{source} has no tensors: name a model")
    kept = [entry for name, entry in file.keys.items() if not name.startswith(PREFIX)]
    with ExitStack() as stack:
        out = [stack.enter_context(written_beside(copy)) for copy in copies]
        with source.open("rb") as src, out[0].open("wb") as dst:
            dst.write(struct.pack("<4sIQQ", MAGIC, file.version, file.n_tensors, len(kept) + len(keys)))
            for entry in kept:
                _copy_bytes(src, dst, entry.start, entry.end, moved)
            dst.write(packed(keys))
            _copy_bytes(src, dst, *file.tensors, moved)
            dst.write(bytes(-dst.tell() % file.alignment))
            _copy_bytes(src, dst, file.data, source.stat().st_size, moved)
        for part, copy in zip(parts[1:], out[1:], strict=True):
            with part.open("rb") as src, copy.open("wb") as dst:
                _copy_bytes(src, dst, 0, part.stat().st_size, moved)
