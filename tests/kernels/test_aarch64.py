"""The kernel sets for 64-bit ARM under qemu, on a CPU for each: the bytes of x86's scalar set, float64's attention."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support import emulated
from support.attention_cases import CASES, TOLERANCE, Array, Case, Head, expected
from support.codec_rows import GOLDEN, KINDS, Rows, made_rows
from xquant_gguf import codec, reference
from xquant_gguf.plan import PAGE, Side

# qemu's CPUs, and the sets that each can run, best first
CPUS = {
    "cortex-a72": ("neon", "scalar"),  # Raspberry Pi 4
    "cortex-a76": ("neon-dotprod", "neon", "scalar"),  # Raspberry Pi 5
    "max": ("neon-i8mm", "neon-dotprod", "neon", "scalar"),
}
SETS = CPUS["max"]
ALL = np.ones(PAGE, bool)


@pytest.fixture(scope="module")
def runner() -> Path:
    """The cross-built runner; without compiler or emulator the tests are skipped, or fail where they must run."""
    if missing := emulated.missing():
        reason = f"on Debian: apt-get install {' '.join(missing)}"
        if os.environ.get("XQUANT_AARCH64") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    return emulated.build(emulated.ROOT / "build" / "aarch64")


def forced(runner: Path, kernels: str, calls: list[emulated.Call], cpu: str = "max") -> list[emulated.Result]:
    """The results with that set, of which it is proved that it ran and no other."""
    force = (b"force", kernels.encode())
    counts = [(b"calls", name.encode()) for name in SETS]
    results = emulated.run(runner, cpu, [force, *calls, *counts])
    ran = [name for name, (count, _) in zip(SETS, results[-len(SETS) :], strict=True) if count > 0]
    assert ran == [kernels]
    return results[1 : -len(SETS)]


# ---- which set runs ----


@pytest.mark.parametrize("cpu", CPUS)
def test_each_cpu_runs_what_it_has(runner: Path, cpu: str) -> None:
    available, kernels = emulated.run(runner, cpu, [(b"available",), (b"kernels",)])
    assert available == (0, [",".join(CPUS[cpu]).encode()])
    assert kernels == (0, [CPUS[cpu][0].encode()])
    (kernels,) = emulated.run(runner, cpu, [(b"kernels",)], kernels="scalar")
    assert kernels == (0, [b"scalar"])


@pytest.mark.parametrize("cpu", CPUS)
def test_forcing_a_set_that_the_cpu_lacks_is_an_error(runner: Path, cpu: str) -> None:
    lacking = [name for name in SETS if name not in CPUS[cpu]]
    for name, what in [(name, "needs instructions that this machine lacks") for name in lacking] + [
        ("avx2", "is unknown")
    ]:
        message = f'kernel set "{name}" {what}; this machine can run {",".join(CPUS[cpu])}'
        status, outputs = emulated.run(runner, cpu, [(b"force", name.encode())])[0]
        assert status < 0
        assert outputs == [f"xq_kernels_force: {message}".encode()]
        status, outputs = emulated.run(runner, cpu, [(b"kernels",)], kernels=name)[0]
        assert status < 0
        assert outputs[0] == f"XQUANT_KERNELS: {message}".encode()


@pytest.mark.parametrize("cpu", CPUS)
def test_the_best_set_of_each_cpu_attends_there(runner: Path, cpu: str) -> None:
    """No instruction that the CPU lacks: qemu stops at them."""
    case = CASES["default"]
    head = Head(case)
    for kernels in CPUS[cpu]:
        ((status, outputs),) = forced(runner, kernels, [emulated.attend(case, head, ())], cpu)
        assert status == 0
        out = np.frombuffer(outputs[0], np.float32).reshape(case.n_rows, case.e)
        right = expected(case, head)
        assert np.abs(out - right).max() <= TOLERANCE[kernels] * np.abs(right).max()


# ---- codec ----


@pytest.mark.parametrize("kernels", SETS)
def test_golden_vectors(runner: Path, kernels: str) -> None:
    calls, stored = [], []
    for case in json.loads(GOLDEN.read_text()):
        rows = np.frombuffer(bytes.fromhex(case["rows"]), np.float16).reshape(PAGE, -1)
        owner = None if case["owner_codes"] is None else bytes.fromhex(case["owner_codes"])
        codes, param = bytes.fromhex(case["codes"]), bytes.fromhex(case["param"])
        calls.append(emulated.seal(case["name"], Side(**case["side"]), rows, (len(codes), len(param)), None, owner))
        stored.append((0, [codes, param]))
    assert forced(runner, kernels, calls) == stored


def random_side(rng: np.random.Generator, is_k: bool) -> tuple[Side, int]:
    """A valid side that owns its codes or borrows them, and a head width."""
    width, bits = int(rng.choice((16, 64, 80, 96, 128, 256))), int(rng.integers(5))
    borrows = bits > 0 and rng.random() < 0.3
    groups = [g for g in (32, 64, 128) if is_k or width % g == 0 or g > width] + ([] if is_k else [0])
    fit = str(rng.choice(("paper", "minmax", "lsq") if borrows else ("paper", "minmax", "clip", "lloyd")))
    param = "f16" if borrows else str(rng.choice(("f16", "log8")))
    rotate, eta = not is_k and bool(rng.random() < 0.5), float(rng.choice((0.0, 0.02, 0.09, 1 / 6, 0.3)))
    return Side(bits, int(rng.choice(groups)), fit, param, rotate, 0 if borrows else -1, eta), width


def made_calls(n: int) -> Iterator[tuple[emulated.Call, emulated.Result]]:
    """Seals, predictions and ways back of random pages, with what the scalar set of this machine gives."""
    rng = np.random.default_rng(6)
    for i in range(n):
        name = "kv"[i % 2]
        side, width = random_side(rng, name == "k")
        kind = KINDS[i % len(KINDS)]
        rows: Rows = made_rows(kind, width, i)
        valid = rng.random(PAGE) < rng.choice((0.1, 0.9, 1))
        owner = None
        if side.owner >= 0:
            plain = Side(side.bits, side.group)
            owner = getattr(codec, f"seal_{name}")(plain, made_rows("normal", width, 1000))[0]
        predicted = None
        if name == "v" and owner is None and rng.random() < 0.4:
            bits = int(rng.integers(5))
            source = Side(bits, 0, "lloyd", "log8", True, -1, 0.09) if bits else Side(0, 0)
            stored = codec.seal_v(source, made_rows("normal", width, i + 500))
            weight = (rng.standard_normal((width, width)) / width**0.5).astype(np.float32)
            predicted = codec.predict_v(source, width, *stored, weight)
            yield emulated.predict_v(source, width, *stored, weight), (0, [predicted.tobytes()])
        more = () if name == "k" else (predicted,)
        codes, param = getattr(codec, f"seal_{name}")(side, rows, valid, owner, *more)
        sizes = len(codes), len(param)
        yield emulated.seal(name, side, rows, sizes, valid, owner, predicted), (0, [codes, param])
        read = codes if owner is None else owner
        out = getattr(codec, f"unseal_{name}")(side, width, read, param, *more)
        yield emulated.unseal(name, side, width, read, param, predicted), (0, [out.tobytes()])


@pytest.mark.parametrize("kernels", SETS)
def test_the_bytes_are_those_of_the_scalar_set_here(runner: Path, kernels: str) -> None:
    with codec.force_kernels("scalar"):
        calls, right = zip(*made_calls(140), strict=True)
    for i, (got, wanted) in enumerate(zip(forced(runner, kernels, list(calls)), right, strict=True)):
        assert got == wanted, calls[i][:3]


@pytest.mark.parametrize("kernels", ["neon", "scalar"])
def test_inputs_that_are_not_finite_are_counted(runner: Path, kernels: str) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((PAGE, 96)).astype(np.float16)
    for value in (np.nan, np.inf, -np.inf, 65504):
        rows[rng.integers(PAGE, size=5), rng.integers(96, size=5)] = value
    calls, right = [], []
    for name, side in (
        ("k", Side(3, 32, "clip", "log8")),
        ("v", Side(2, 0, "lloyd", "log8", True)),
        ("k", Side(0, 64)),
    ):
        codes, param, bad = getattr(reference, f"seal_{name}")(side, rows, ALL)
        calls.append(emulated.seal(name, side, rows, (len(codes), len(param))))
        right.append((bad, [codes, param]))
    assert forced(runner, kernels, calls) == right


@pytest.mark.parametrize("kernels", ["neon", "scalar"])
def test_every_half_and_every_log8_parameter(runner: Path, kernels: str) -> None:
    """All finite F16 numbers, as the means that 0 bits keep; e and q of all values, one pair a channel."""
    width, calls, right = 512, [], []
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    for row in halves[np.isfinite(halves)].reshape(-1, width):
        calls.append(emulated.unseal("k", Side(0, 128), width, b"", row.tobytes()))
        right.append((0, [np.tile(row, PAGE).tobytes()]))
    side = Side(1, 128, "minmax", "log8")
    e, q = np.meshgrid(np.arange(1, 256), np.arange(-127, 128, 2))
    pairs = np.stack([e.ravel(), q.ravel()]).astype(np.uint8)
    codes = np.random.default_rng(0).bytes(PAGE // 16 * 64 * width // 32)
    for i in range(0, pairs.shape[1] - width, width):
        param = pairs[:, i : i + width].tobytes()
        exact = np.clip(reference.dequantize_k(side, width, codes, param), -65504, 65504).astype(np.float16)
        calls.append(emulated.unseal("k", side, width, codes, param))
        right.append((0, [exact.tobytes()]))
    assert forced(runner, kernels, calls) == right


# ---- attention ----


class Attention:
    """All cases of test_attention.py: what float64 says, and what each kernel set says, asked once."""

    def __init__(self, runner: Path) -> None:
        self.runner = runner
        self.heads = [(case, Head(case)) for case in CASES.values()]
        self.right = [expected(case, head) for case, head in self.heads]
        self.results: dict[str, list[Array]] = {}

    def of(self, kernels: str) -> list[Array]:
        """Results of all cases, each twice: the pages in one part, and cut into three."""
        if kernels not in self.results:
            parts = [((), (1, len(case.states) - 1)) for case, _ in self.heads]
            calls = [emulated.attend(*head, p) for head, both in zip(self.heads, parts, strict=True) for p in both]
            results = forced(self.runner, kernels, calls)
            assert all(status == 0 for status, _ in results)
            self.results[kernels] = [np.frombuffer(outputs[0], np.float32).astype(np.float64) for _, outputs in results]
        return self.results[kernels]


@pytest.fixture(scope="module")
def attention(runner: Path) -> Attention:
    return Attention(runner)


@pytest.mark.parametrize("kernels", SETS)
def test_attention_matches_float64_and_the_exact_set(attention: Attention, kernels: str) -> None:
    results, exact = attention.of(kernels), attention.of("scalar")
    for i, (name, case) in enumerate(CASES.items()):
        right = attention.right[i]
        only_open = all(state != -1 for state in case.states)
        # mapped values are read from two sets of codes: two roundings add up
        bound = TOLERANCE["scalar" if only_open else kernels] * (1 if case.source is None else 2) * np.abs(right).max()
        for out, scalar in zip(results[2 * i : 2 * i + 2], exact[2 * i : 2 * i + 2], strict=True):
            assert np.abs(out - right.ravel()).max() <= bound, name
            assert np.abs(out - scalar).max() <= bound, name


def test_the_three_instructions_give_the_same_sums(attention: Attention) -> None:
    """smlal, sdot and smmla add whole numbers: nothing differs."""
    for other in ("neon-dotprod", "neon-i8mm"):
        assert all(np.array_equal(a, b) for a, b in zip(attention.of("neon"), attention.of(other), strict=True))


@pytest.mark.parametrize("kernels", SETS)
def test_what_is_masked_may_be_anything(runner: Path, kernels: str) -> None:
    case = Case(states=(0, -1, 1), n_rows=5, masked=False)
    head = Head(case)
    head.mask[:, 10:50] = -np.inf
    head.mask[:, 2 * PAGE + 100 :] = -np.inf
    head.hidden = head.mask == -np.inf
    right = expected(case, head)
    for window in head.windows:
        window[0, 10:50] = np.nan
        window[1, 100:] = np.inf
    ((_, outputs),) = forced(runner, kernels, [emulated.attend(case, head, ())])
    out = np.frombuffer(outputs[0], np.float32).reshape(right.shape)
    assert np.abs(out - right).max() <= TOLERANCE[kernels] * np.abs(right).max()


# ---- what is refused ----


def test_big_endian_machines_are_refused_at_compile_time(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    native = emulated.ROOT / "native"
    flags = ["-std=c++17", f"-I{native / 'include'}", f"-I{native / 'common'}", "-U__BYTE_ORDER__"]
    command = [compiler, *flags, "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__", "-E", native / "cpu" / "codec_scalar.cpp"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert out.returncode != 0
    assert "big-endian machines are not supported" in out.stderr
