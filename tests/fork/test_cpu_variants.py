"""llama.cpp's CPU kernels: which build of them runs is told, is one that the CPU has, and is the only one.

A build without XQUANT_CPU_VARIANTS has one, and the tests of several find nothing to do.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import xquant_gguf_hook
from support import tiny_gguf
from support.llama_server import needs_programs
from support.oracle_cases import Bounds, describe, deviation
from xquant_gguf import native, programs, synthetic

VARIABLE = "XQUANT_CPU_VARIANT"
AVX2 = {"avx2", "fma", "f16c", "bmi2"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"}
NEEDED = {
    "amx": AVX512 | {"avx512vbmi", "avx512_bf16", "amx_tile", "amx_int8"},
    "avx512": AVX512,
    "avxvnni": AVX2 | {"avx_vnni"},
    "avx2": AVX2,
    "sse42": {"ssse3", "sse4_1", "sse4_2", "popcnt"},
    "neon-i8mm": {"asimddp", "asimdhp", "i8mm"},
    "neon-dotprod": {"asimddp", "asimdhp"},
    "neon": set[str](),
    "built-in": set[str](),
}
"""What Linux must say of a CPU; the best variant first."""
LIBRARIES = {path.stem.removeprefix("libxquant-cpu-"): path for path in native.LIBRARY_DIR.glob("libxquant-cpu-*.so")}
LINKED = "neon" if platform.machine() == "aarch64" else "sse42"
"""The last choice, where there are others."""


def cpu_has() -> set[str]:
    """The instructions that Linux lets programs use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next(line for line in lines if line.startswith(("flags", "Features"))).partition(":")[2].split())


RUNNING = [name for name in NEEDED if name in LIBRARIES and NEEDED[name] <= cpu_has()]
several = pytest.mark.skipif(not RUNNING, reason="a build without XQUANT_CPU_VARIANTS, or a CPU that has none of them")


def python(
    program: str, *arguments: str | Path, folder: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own: what runs is chosen once."""
    own = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env={**own, **(env or {})}, capture_output=True, text=True, check=False, timeout=300
    )


TELL = """
import json
from xquant_gguf import fork
ffi, lib = fork.load()
devices = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
import llama_cpp
system = llama_cpp.llama_print_system_info().decode()
print(fork.cpu_variant(), sum(lib.ggml_backend_dev_type(d) == 0 for d in devices), "AVX512_VNNI = 1" in system)
"""


def told(env: Mapping[str, str] | None = None) -> list[str]:
    """The variant, the number of CPU backends, and whether llama.cpp says that it was compiled for AVX512-VNNI."""
    out = python(TELL, env=env)
    assert out.returncode == 0, out.stderr
    return out.stdout.split()


def test_the_best_that_the_cpu_has_is_taken() -> None:
    name, n, vnni = told()
    assert name == (RUNNING[0] if RUNNING else name)
    assert name in NEEDED
    assert NEEDED[name] <= cpu_has()
    assert n == "1"
    if name != "built-in":
        assert vnni == str(name in ("amx", "avx512"))


@several
@pytest.mark.parametrize("name", RUNNING)
def test_another_is_taken_if_asked_for(name: str) -> None:
    assert told({VARIABLE: name}) == [name, "1", str(name in ("amx", "avx512"))]


WRITE = """
import sys
import numpy as np
from xquant_gguf import Llama
options = {"kv_type": sys.argv[3], "n_ctx": 1024, "n_batch": 128, "n_ubatch": 128, "n_threads": 2}
llm = Llama(sys.argv[1], logits_all=True, verbose=False, **options)
llm.eval([3 + 7 * i % 250 for i in range(500)])
llm.eval([9])  # a product with one row has kernels of its own
np.save(sys.argv[2], llm.scores[400:501])
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model whose matrices are q8_0 and q4_K, and the same in F16."""
    folder = tmp_path_factory.mktemp("variants")
    name, n_layer = "smollm2-135m", 2
    small = synthetic.write(folder / "small.gguf", name, n_layer, "q4_k")
    writer = gguf.GGUFWriter(folder / "f16.gguf", "llama")
    shape = replace(synthetic.SHAPES[name], n_layer=n_layer)
    synthetic.add_shape(writer, shape, synthetic.N_CTX_TRAIN)
    n_named = shape.n_vocab - len(synthetic.SPECIAL) - synthetic.N_BYTES
    synthetic.add_vocabulary(writer, [f"<unused {i}>" for i in range(n_named)], gguf.TokenType.UNUSED)
    for tensor in gguf.GGUFReader(small).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values if values.ndim == 1 else values.astype(np.float16))
    tiny_gguf.finish(writer, {})
    return {"small": small, "f16": folder / "f16.gguf"}


@several
@pytest.mark.parametrize(("kv_type", "model"), [("f16", "f16"), ("f16", "small"), ("xquant", "small")])
def test_all_compute_the_same(models: dict[str, Path], tmp_path: Path, kv_type: str, model: str) -> None:
    """What is computed with the same weights in F16, but for rounding: of activations, and then of keys and values.

    By the largest deviation of a position's 49,152 logits; that of AVX2 is 8e-2 for small weights, 0.2 with codes.
    """

    def logits(model: str, name: str) -> NDArray[np.float64]:
        file = tmp_path / f"{model}-{name}.npy"
        out = python(WRITE, models[model], file, kv_type, env={VARIABLE: name, "XQUANT_KERNELS": "scalar"})
        assert out.returncode == 0, out.stderr
        found: NDArray[np.float64] = np.load(file).astype(np.float64)
        return found

    exact = logits("f16", RUNNING[-1])
    found = {name: deviation(logits(model, name), exact) for name in RUNNING}
    last = found[RUNNING[-1]]
    # F16 weights measured: 3.3e-3, 4.8e-3
    bounds = Bounds(1e-2, 3e-2) if model == "f16" else Bounds(1.2 * float(np.median(last)), 1.5 * float(last.max()))
    for name, off in found.items():
        print(kv_type, model, name, describe(off))
        assert bounds.hold(off), f"{name}: {describe(off)}; {RUNNING[-1]}: {describe(last)}"


def test_a_name_that_is_none_is_an_error(paths: dict[str, Path]) -> None:
    env = {VARIABLE: "mmx"}
    message = f'{VARIABLE}: "mmx" is not one of llama.cpp\'s CPU kernels that this build has'
    out = python("import sys\nfrom xquant_gguf import Llama\nLlama(sys.argv[1])", paths["plain"], env=env)
    assert out.returncode == 1
    assert out.stderr.splitlines()[-1].startswith(f"ValueError: {message}")
    for command in (["inspect", str(paths["plain"])], ["bench", str(paths["plain"]), "--depths", "0"]):
        run = "import sys\nfrom xquant_gguf.cli import main\nsys.exit(main(sys.argv[1:]))"
        out = python(run, *command, env=env)
        assert out.returncode == 1, out.stdout
        assert message in out.stderr.splitlines()[-1]


def copied(folder: Path) -> Path:
    """The package with libraries of its own."""
    shutil.copytree(native.LIBRARY_DIR.parent, folder / "xquant_gguf")
    shutil.copytree(Path(xquant_gguf_hook.__file__).parent, folder / "xquant_gguf_hook")
    return folder


@several
def test_a_library_that_cannot_be_loaded_is_passed_over(tmp_path: Path) -> None:
    site = copied(tmp_path)
    library = site / "xquant_gguf" / "lib" / LIBRARIES[RUNNING[0]].name
    library.write_bytes(b"\x7fELF")
    out = python(TELL, env={"PYTHONPATH": str(site)})
    assert out.stdout.split()[:2] == [[*RUNNING, LINKED][1], "1"]
    assert f"xquant: {library} cannot be loaded: {library}: file too short" in out.stderr


@several
def test_other_libraries_do_not_matter(tmp_path: Path) -> None:
    """A backend of llama.cpp's in the folder where a program runs, and one that a variable names."""
    other = tmp_path / "libggml-cpu-other.so"
    shutil.copy(LIBRARIES[RUNNING[-1]], other)
    out = python(TELL, folder=tmp_path, env={"GGML_BACKEND_PATH": str(other)})
    assert out.returncode == 0, out.stderr
    assert out.stdout.split()[:2] == [RUNNING[0], "1"]


@several
@needs_programs
@pytest.mark.parametrize("name", RUNNING)
def test_programs_take_the_same(models: dict[str, Path], name: str) -> None:
    command: list[str | Path] = [programs.path("llama-bench"), "-m", models["small"]]
    command += ["-p", "64", "-n", "1", "-t", "2", "-r", "1", "-v"]
    env = {**os.environ, VARIABLE: name}
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    assert f"xquant: llama.cpp's CPU kernels are those for {name}" in out.stderr
    # it lays out weights as it likes them
    assert ("AMX model buffer size" if name == "amx" else "CPU_REPACK model buffer size") in out.stderr


def names(library: Path, *options: str) -> set[str]:
    out = subprocess.run(["nm", "-D", *options, library], capture_output=True, text=True, check=True)
    return {line.split()[-1].partition("@")[0] for line in out.stdout.splitlines()}


@several
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_calls_its_own_functions(name: str) -> None:
    """In a program, libggml-cpu's would take the place of those that it names: it names none."""
    assert names(LIBRARIES[name], "--defined-only") == {"xquant_cpu_variant"}
    linked = {found for found in names(native.library_path("ggml-cpu"), "--defined-only") if "ggml" in found}
    assert "ggml_backend_cpu_reg" in linked
    assert not names(LIBRARIES[name]) & linked
