"""The wheels in dist (`make wheels`), or in the folder that XQUANT_WHEELS names, in environments with nothing else.

`make test` names the folder of the one wheel that `make` built with this machine's compiler and for this machine alone;
those of dist are for any Linux. Skipped where there are none. XQUANT_PYTHONS names the interpreters to try, with blanks
between them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from macholib import mach_o
from macholib.MachO import MachO

import library_needs
from support.llama_server import needs_programs, running
from support.wine import wine
from xquant_gguf import programs

ROOT = Path(__file__).resolve().parents[2]
WHEELS = Path(os.environ.get("XQUANT_WHEELS", ROOT / "dist"))
PYTHONS = os.environ.get("XQUANT_PYTHONS", sys.executable).split()
PROGRAMS = ("llama-server", "llama-cli", "llama-bench", "llama-perplexity", "ggml-rpc-server")
FILES = {"win": ("", ".dll", ".exe"), "macosx": ("lib", ".dylib", "")}  # before and behind names; those of programs
GLIBC = ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux")
COMPILERS = ("libgomp.so.1", "libcuda.so", "libcudart.so", "libcublas", "libnccl.so")  # with -DGGML_CUDA=ON
OWN = (*GLIBC, "libstdc++.so.6", "libgcc_s.so.1", *COMPILERS)  # of a wheel that this machine's compiler built
SYSTEM = {"manylinux": GLIBC, "musllinux": ("libc.musl-",), "linux": OWN}  # what every system of a tag has
TEXT = ROOT / "tests" / "support" / "prose.txt"
NEWCOMER = ROOT / "tests" / "wheels" / "newcomer.py"
XQUANT = programs.cache_arguments(None)
X86 = {"avx512", "avxvnni", "avx2"}
VARIANTS = {"x86_64": {"amx", *X86}, "amd64": X86, "aarch64": {"neon-i8mm", "neon-dotprod"}}
VARIANTS["arm64"] = VARIANTS["aarch64"]
MUSL = Path("/lib/ld-musl-x86_64.so.1")

wheels = sorted(WHEELS.glob("xquant_gguf-*.whl"))


def wheel_of(tag: str) -> Path:
    """The wheel with a tag that a regular expression fits; the test is skipped if there is none."""
    for wheel in wheels:
        if re.search(rf"-{tag}\.whl$", wheel.name):
            return wheel
    pytest.skip(f"no wheel for {tag} in {WHEELS}: make wheels")


def clean() -> dict[str, str]:
    """This environment without what points to other packages and libraries."""
    names = ("PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD")
    return {k: v for k, v in os.environ.items() if k not in names and not k.startswith(("XQUANT", "LLAMA", "COV"))}


def run(*command: str | Path, timeout: float = 600) -> str:
    """What a command prints; the test fails with all that it said if it does."""
    out = subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=timeout, check=False)
    assert out.returncode == 0, f"{command}: {out.stdout[-3000:]}{out.stderr[-3000:]}"
    return out.stdout


PIP = ("--only-binary", ":all:", "--find-links", str(WHEELS))


@pytest.fixture(scope="module", params=PYTHONS)
def bin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of programs of a virtual environment in which the wheel is installed by its name, without a compiler."""
    wheel = wheel_of(rf"(manylinux_\d+_\d+|linux)_{platform.machine()}")
    folder = tmp_path_factory.mktemp("environment")
    run(request.param, "-m", "venv", folder)
    run(folder / "bin" / "pip", "install", "-q", *PIP, wheel)
    return folder / "bin"


def check_answers(told: dict[str, Any]) -> None:
    """What newcomer.py must print."""
    for kv_type in ("f16", "xquant"):
        assert told[kv_type]["answer"] == "The capital of France is Paris."
        assert told[kv_type]["goes_on"].strip()
        if told["threads"] is not None:  # threads wait for the next token
            assert told[kv_type]["threads"] > told["threads"]
    assert told["xquant"]["bytes"] < told["f16"]["bytes"]
    # open: the first page, the window, a micro-batch, and the page that is not full
    assert told["xquant"]["sealed"] >= told["xquant"]["prompt_tokens"] // 128 - 4 > 2


def test_there_are_wheels() -> None:
    """Where a folder is named, there must be some."""
    if "XQUANT_WHEELS" not in os.environ:
        pytest.skip("XQUANT_WHEELS names no folder")
    assert wheels, f"{WHEELS} holds no xquant_gguf-*.whl: make wheels"


@pytest.mark.parametrize("wheel", wheels, ids=lambda wheel: wheel.name)
def test_a_wheel_holds_what_it_needs(wheel: Path, tmp_path: Path) -> None:
    """One wheel for all versions of Python; every library that one of its own needs is in it or in the system."""
    *named, python, abi, tag = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    for_cuda = len(named) == 3  # a number of the build
    by_zig = not for_cuda and not tag.startswith("linux")
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: info for info in archive.infolist()}
        archive.extractall(tmp_path)
    assert {name.split("/")[0] for name in files} == {
        "xquant_gguf", "xquant_gguf_hook", "xquant_gguf.pth", "-".join(named[:2]) + ".dist-info",
    }  # fmt: skip
    licences = {name.rpartition("/")[2] for name in files if "licenses" in name}
    assert {"LICENSE", "llama.cpp-LICENSE"} <= licences
    if by_zig:  # a C++ runtime of its own
        assert {"llvm-LICENSE", "zig-LICENSE"} <= licences
        assert ("mingw-w64-LICENSE" in licences) == tag.startswith("win")
    prefix, suffix, program = FILES.get(tag.partition("_")[0], ("lib", ".so", ""))
    for name in PROGRAMS:
        assert files[f"xquant_gguf/lib/{name}{program}"].external_attr >> 16 & 0o111 == 0o111, name
    folder = tmp_path / "xquant_gguf" / "lib"
    for name in ("xquant", "llama", "mtmd", "ggml", "ggml-base", "ggml-cpu", "ggml-rpc"):
        assert (folder / f"{prefix}{name}{suffix}").exists()
    prefix += "xquant-cpu-"
    variants = {path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*{suffix}")}
    (kinds,) = (kinds for processor, kinds in VARIANTS.items() if tag.endswith(processor))
    if tag.startswith("linux"):  # this machine's compiler may not know them all
        assert kinds & {"avx2", "neon-dotprod"} <= variants <= kinds
    else:
        assert variants == kinds
    if tag.startswith(("win", "macosx")):
        assert library_needs.lacking(folder) == []
        if version := re.match(r"macosx_(\d+)_(\d+)_", tag):
            check_macos(folder, (int(version[1]), int(version[2])))
    else:
        check_elf(folder, OWN if for_cuda else SYSTEM[tag.partition("_")[0]], for_cuda)


def check_elf(folder: Path, system: tuple[str, ...], for_cuda: bool) -> None:
    """Libraries and programs need each other and the system, and were stripped."""
    for path in (path for path in folder.iterdir() if path.read_bytes()[:4] == b"\x7fELF"):
        dynamic = run("readelf", "-d", path)
        for line in dynamic.splitlines():
            if "(NEEDED)" in line:
                needed = line.partition("[")[2].rstrip("]")
                assert (folder / needed).exists() or needed.startswith(system), f"{path.name} needs {needed}"
            if "PATH)" in line:
                beside = re.sub(r":\$ORIGIN/../../nvidia/\w+/lib", "", line) if for_cuda else line
                assert beside.endswith("[$ORIGIN]"), f"{path.name}: {line}"
        assert ".debug_info" not in run("readelf", "-S", "-W", path), path.name


def check_macos(folder: Path, system: tuple[int, int]) -> None:
    """Libraries and programs for ARM are signed, without which no such Mac runs them, and find each other."""
    binaries = [path for path in folder.iterdir() if path.suffix in ("", ".dylib")]
    for path in binaries:
        (header,) = MachO(str(path)).headers
        commands = {command.cmd: (body, data) for command, body, data in header.commands}
        assert mach_o.LC_CODE_SIGNATURE in commands, path.name
        oldest = commands[mach_o.LC_BUILD_VERSION][0].minos
        assert (oldest >> 16, oldest >> 8 & 0xFF) <= system, path.name
        if path.name != "libxquant_cxx.dylib":  # needs none of the others
            assert commands[mach_o.LC_RPATH][1].rstrip(b"\0") == b"@loader_path", path.name


def test_auditwheel_names_the_oldest_system() -> None:
    """Of the wheel that `make` built: its symbols are those of some glibc, and it wants no library but compilers' own.

    tools/wheels.py asks the same of the wheels for any Linux, which must want none, and names them so.
    """
    wheel = wheel_of(f"linux_{platform.machine()}")
    told = json.loads(run(sys.executable, "-m", "auditwheel", "show", "--json", wheel))
    assert [name for name in told["external_libs"] if not name.startswith(COMPILERS)] == []
    oldest = re.fullmatch(r"manylinux_2_(\d+)_" + platform.machine(), told["sym_tag"])
    assert oldest, told
    assert 17 <= int(oldest[1]) <= int(platform.libc_ver()[1].split(".")[1])
    assert not told["unsupported_isa"]


def test_it_answers(bin: Path, smollm2: str) -> None:
    told = json.loads(run(bin / "python", "-I", NEWCOMER, smollm2, TEXT))
    check_answers(told)
    assert Path(told["library"]).is_relative_to(bin.parent)
    assert Path(told["package"]).is_relative_to(bin.parent)
    # chosen at run time: all that this processor has
    flags = Path("/proc/cpuinfo").read_text()
    assert {"scalar", *({"avx2"} if " avx2" in flags else ()), *({"avx512"} if "avx512_vnni" in flags else ())} <= {
        *told["kernels"]
    }
    if "avx512_vnni" in flags:
        several = any(Path(told["library"]).parent.glob("libxquant-cpu-*.so"))
        assert told["llama_kernels"] in (("amx", "avx512") if several else ("avx2",))


@pytest.mark.cuda
def test_it_answers_on_a_gpu(bin: Path, smollm2: str) -> None:
    """A wheel that `make wheels TARGET=cuda` built on this machine: XQUANT_WHEELS=dist/cu130, say."""
    told = json.loads(run(bin / "python", "-I", NEWCOMER, smollm2, TEXT, "-1"))
    if not any(Path(told["library"]).parent.glob("libggml-cuda.so")):
        pytest.skip("the wheel is for CPUs alone")
    assert told["gpu"]
    check_answers(told)


def ask_server(
    command: Sequence[str | Path], folder: Path, environment: dict[str, str] | None = None, status: int = 0
) -> None:
    """Starts a server, asks it four things at once, and something wrong."""
    command = [*command, "-c", "4096", "-np", "2", "-t", "1", "--no-webui"]
    with running(command, folder, environment or clean(), status) as server, ThreadPoolExecutor(4) as pool:

        def ask(city: str) -> str:
            talk = [{"role": "user", "content": "Where?"}]
            response = server.post("/v1/chat/completions", messages=talk, grammar=f'root ::= "{city}"')
            assert response.status_code == 200, response.text
            return str(response.json()["choices"][0]["message"]["content"])

        cities = ["Berlin", "Madrid", "Tokyo", "Cairo"]
        assert list(pool.map(ask, cities)) == cities
        # an exception that one library throws and another catches
        assert server.post("/completion", prompt="a", grammar="root ::= [").status_code == 400
        assert server.get("/props").json()["xquant"]["layers"]


def test_it_serves(bin: Path, smollm2: str, tmp_path: Path) -> None:
    ask_server([bin / "xquant-gguf", "server", smollm2], tmp_path)


def test_a_bad_option_is_a_message(bin: Path) -> None:
    """The programs' own libraries throw it, the program catches it."""
    command = ("run", "llama-server", "--ctx-size", "many")
    out = subprocess.run([bin / "xquant-gguf", *command], capture_output=True, text=True, env=clean(), check=False)
    assert out.returncode == 1
    assert 'error while handling argument "--ctx-size"' in out.stderr


def install(wheel: Path, site: Path, version: str, *platforms: str) -> None:
    """Installs a wheel and its requirements for another system into a folder; the programs can be run."""
    pip = (sys.executable, "-m", "pip", "install", "-q", "--target", str(site))
    run(*pip, *(f"--platform={name}" for name in platforms), f"--python-version={version}", *PIP, wheel)


def run_newcomer(python: Sequence[str | Path], site: Path, smollm2: str, timeout: float) -> dict[str, Any]:
    """What newcomer.py prints in another system's Python, with what a folder holds."""
    script = f"import sys, runpy; sys.path.insert(0, {str(site)!r}); sys.argv = sys.argv[1:]; "
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    told: dict[str, Any] = json.loads(run(*python, "-I", "-c", script, NEWCOMER, smollm2, TEXT, timeout=timeout))
    check_answers(told)
    assert Path(told["library"]).is_relative_to(site)
    return told


def test_musl_programs(smollm2: str, tmp_path: Path) -> None:
    """The programs of the musl wheel under Debian's musl: its threads have small stacks."""
    wheel = wheel_of(r"musllinux_\d+_\d+_x86_64")
    if not MUSL.exists():
        pytest.skip("on Debian: apt-get install musl")
    shutil.unpack_archive(wheel, tmp_path, "zip")
    lib = tmp_path / "xquant_gguf" / "lib"
    for name in PROGRAMS:
        (lib / name).chmod(0o755)
    ask_server([lib / "llama-server", "-m", smollm2, *XQUANT], tmp_path)


def test_musl_python(smollm2: str, tmp_path: Path) -> None:
    """The musl wheel in a Python that was built with musl (musl_python.sh); threads have stacks of 128 KiB there."""
    wheel = wheel_of(r"musllinux_\d+_\d+_x86_64")
    interpreters = sorted(Path(os.environ.get("XQUANT_MUSL_PYTHON", "none")).glob("bin/python3.*[0-9]"))
    if not interpreters:
        pytest.skip("needs XQUANT_MUSL_PYTHON=folder that musl_python.sh filled")
    platforms = ("musllinux_1_2_x86_64", "musllinux_1_1_x86_64")
    install(wheel, tmp_path / "site", interpreters[0].name.removeprefix("python"), *platforms)
    told = run_newcomer(interpreters[:1], tmp_path / "site", smollm2, 600)
    assert "scalar" in told["kernels"]


def test_aarch64(smollm2: str, tmp_path: Path) -> None:
    """The ARM wheel in an unpacked Debian (arm64_root.sh), under an emulator."""
    wheel = wheel_of(r"manylinux_\d+_\d+_aarch64")
    root = Path(os.environ.get("XQUANT_ARM64_ROOT", "none"))
    interpreters = sorted(root.glob("usr/bin/python3.*[0-9]"))
    if not interpreters or shutil.which("qemu-aarch64-static") is None:
        pytest.skip("needs qemu-user-static, and XQUANT_ARM64_ROOT=folder that arm64_root.sh filled")
    site = tmp_path / "site"
    platforms = [f"{name}_aarch64" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    install(wheel, site, interpreters[0].name.removeprefix("python"), *platforms)
    emulated: list[str | Path] = ["qemu-aarch64-static", "-cpu", "cortex-a76", "-L", root]
    told = run_newcomer([*emulated, interpreters[0]], site, smollm2, 3000)
    assert told["kernels"] == ["neon-dotprod", "neon", "scalar"]
    lib = site / "xquant_gguf" / "lib"
    ask_server([*emulated, lib / "llama-server", "-m", smollm2, *XQUANT], tmp_path)


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Folder of the programs of the wheel for Windows, where wine runs them."""
    wheel = wheel_of("win_amd64")
    if shutil.which("wine") is None:
        pytest.skip("on Debian: apt-get install wine")
    shutil.unpack_archive(wheel, tmp_path, "zip")
    return tmp_path / "xquant_gguf" / "lib"


def test_windows_server(windows: Path, smollm2: str, tmp_path: Path) -> None:
    """An exception that one of its libraries throws is caught by another; wine's programs die of the signal to end."""
    ask_server(wine(windows / "llama-server.exe", "-m", smollm2, *XQUANT), tmp_path, status=-signal.SIGTERM)


@needs_programs
@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
def test_windows_goes_on_as_linux_does(kv_type: str, windows: Path, smollm2: str, tmp_path: Path) -> None:
    """The same tokens behind a text of which most lies in codes, with the same of llama.cpp's kernels."""
    options = ["-m", smollm2, "-c", "4096", "-np", "1", "-t", "2", "--no-webui", "--metrics"]
    options += programs.cache_arguments(kv_type)
    here: list[str | Path] = [programs.path("llama-server"), *options]
    there = wine(windows / "llama-server.exe", *options)
    told = []
    for command, status in ((here, 0), (there, -signal.SIGTERM)):
        with running(command, tmp_path, {**clean(), "XQUANT_CPU_VARIANT": "avx2"}, status) as server:
            answer = server.complete(TEXT.read_text()[:10000], n_predict=64, return_tokens=True)
            assert len(answer["tokens"]) == 64
            sealed = server.metrics().get("xquant_pages_sealed", 0)
            assert (sealed > 10) == (kv_type == "xquant")
            told.append((answer["tokens_evaluated"], answer["tokens"], sealed))
    assert told[0] == told[1]


def test_windows_install(tmp_path: Path) -> None:
    """Pip takes the wheel, and finds all that it requires, for a Python on Windows."""
    install(wheel_of("win_amd64"), tmp_path, "3.11", "win_amd64")
    assert (tmp_path / "xquant_gguf" / "lib" / "llama.dll").exists()
    assert (tmp_path / "llama_cpp").is_dir()


@pytest.mark.parametrize("winmode", [[], ["default"]])
def test_windows_libraries(winmode: list[str], windows: Path, tmp_path: Path) -> None:
    """Opened by a program elsewhere, as Python would: they find each other, and the CPU's kernels."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("pip install ziglang")
    program = tmp_path / "loader.exe"
    compiler = (sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-windows-gnu")
    run(*compiler, ROOT / "tests" / "wheels" / "loader.c", "-o", program)
    # as wine calls it; libraries are looked for in paths with a letter
    folder = "Z:" + str(windows).replace("/", "\\")
    assert run(*wine(program, folder, *winmode)).strip() in (*X86, "sse42")


def test_windows_command_line(windows: Path) -> None:
    """A bad option, which one library refuses and another reports."""
    command = wine(windows / "llama-server.exe", "--ctx-size", "many")
    out = subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=300, check=False)
    assert out.returncode == 1
    assert 'error while handling argument "--ctx-size"' in out.stderr
