"""Build wheels for many systems on one Linux machine, with Zig as the compiler: wheels.py [--out dist] [TARGET ...].

The target cuda is another matter: a wheel for NVIDIA's GPUs, built with this machine's compiler and its CUDA toolkit.

Zig (PyPI's package ziglang) compiles for any version of glibc, for musl, for Windows and macOS, and for other
processors.  A wheel is built by pip as any other, with tools/zig/toolchain.cmake.  Then auditwheel checks that it needs
no newer Linux than its name says, and no library that is not in it; of the other systems, which auditwheel does not
know, library_needs.py checks the latter.  Beside them goes a wheel of llama-cpp-python's Python part.

Needs what pyproject.toml lists in the dependency group wheels: `make wheels`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import library_needs
import llama_source

ROOT = Path(__file__).resolve().parent.parent
ZIG = ROOT / "tools" / "zig"
TOOLCHAIN = ZIG / "toolchain.cmake"
RUNTIME = {"Linux": "libxquant_cxx.so", "Darwin": "libxquant_cxx.dylib"}
# beside the interpreter first: a virtual environment that was not activated
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


@dataclass(frozen=True)
class Target:
    """A platform tag of wheels, what Zig calls it, and its processor.

    by_name: built when it is named alone: what is in the wheel was not run by a Python of that system.
    """

    tag: str
    zig: str
    processor: str
    system: str = "Linux"  # as CMake calls it
    options: tuple[str, ...] = ()
    by_name: bool = False

    @property
    def is_musl(self) -> bool:
        return self.zig.endswith("musl")


TARGETS = (
    Target("manylinux_2_28_x86_64", "x86_64-linux-gnu.2.28", "x86_64"),
    Target("manylinux_2_28_aarch64", "aarch64-linux-gnu.2.28", "aarch64"),
    Target("musllinux_1_2_x86_64", "x86_64-linux-musl", "x86_64"),
    Target("win_amd64", "x86_64-windows-gnu", "x86_64", "Windows", by_name=True),
    # what Zig has of macOS is the C library alone
    Target("macosx_11_0_arm64", "aarch64-macos.11.0", "aarch64", "Darwin",
           ("GGML_METAL=OFF", "GGML_ACCELERATE=OFF", "GGML_BLAS=OFF"), by_name=True),
)  # fmt: skip
OPTIONS = ("XQUANT_PROGRAMS=ON", "XQUANT_CPU_VARIANTS=ON", "GGML_OPENMP=OFF")
"""CMake options of every wheel. Zig has no OpenMP: llama.cpp's own threads do the same."""
CUDA_LIBRARIES = ("libcuda.so.*", "libcudart.so.*", "libcublas.so.*", "libcublasLt.so.*")
"""What a CUDA wheel leaves to the driver and to NVIDIA's packages (the extras cuda12 and cuda13)."""

COMPILER = """\
#!/bin/sh
# {version}
for argument; do
  shift
  case $argument in
    # Zig names a processor's extensions behind the processor, where GCC and Clang name architectures, and as LLVM does
    -march=armv8.2-a*)
      argument=$(echo "-mcpu=generic+v8_2a${{argument#-march=armv8.2-a}}" | sed s/+fp16/+fullfp16/) ;;
  esac
  set -- "$@" "$argument"
done
exec "{zig}" {tool} -target {target} {flags} "$@"
"""


def ziglang() -> Path:
    """Folder of the ziglang package."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise SystemExit("wheels: ziglang is not installed: `make wheels` installs what is needed")
    return Path(spec.origin).parent


def write_script(path: Path, text: str) -> None:
    """Writes an executable script, unless it is there: CMake builds anew what a new compiler built."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def write_compilers(folder: Path, target: Target) -> None:
    """Writes clang, clang++ and the like for a target; ccache knows the compilers by these names."""
    folder.mkdir(parents=True, exist_ok=True)
    zig, flags = ziglang() / "zig", "-dynamic" if target.is_musl else ""
    for name, tool in (("clang", "cc"), ("clang++", "c++")):
        fields = {"version": f"ziglang {version('ziglang')}", "zig": zig, "target": target.zig, "flags": flags}
        write_script(folder / name, COMPILER.format(tool=tool, **fields))
    for tool in ("ar", "ranlib", "rc"):
        write_script(folder / tool, f'#!/bin/sh\nexec "{zig}" {tool} "$@"\n')
    write_script(folder / "strip", "#!/bin/sh\n# the linker has done it\n")
    # CMake wants it for macOS, where all is linked with the paths that it will have
    write_script(folder / "install_name_tool", "#!/bin/sh\nexit 1\n")


def toolchain_variables(target: Target, compilers: Path) -> dict[str, str]:
    """Environment variables that TOOLCHAIN reads, still without a C++ runtime."""
    return {
        "ZIG_BIN": str(compilers),
        "ZIG_SYSTEM": target.system,
        "ZIG_PROCESSOR": target.processor,
        "ZIG_RUNTIME": "",
    }


def run(command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
    """Runs a command with more environment; ends everything if it fails."""
    print("+", *command, flush=True)
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False)
    if done.returncode != 0:
        raise SystemExit(f"wheels: {command[0]} ended with status {done.returncode}")


def one_wheel(folder: Path) -> Path:
    """The wheel of a folder that holds one."""
    (wheel,) = folder.glob("*.whl")
    return wheel


def pip_wheel(folder: str, source: str | Path, environment: Mapping[str, str], *options: str) -> Path:
    """Builds the wheel of a source with what is installed here; its path in folder."""
    pip: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run([*pip, *options, "-w", folder, source], environment)
    return one_wheel(Path(folder))


def cmake_args(options: Sequence[str]) -> str:
    """CMAKE_ARGS with more options, before the user's own."""
    return " ".join((*options, os.environ.get("CMAKE_ARGS", "")))


def retag(wheel: Path, *tags: str) -> Path:
    """Gives the one wheel of a folder other tags; its path."""
    run([sys.executable, "-m", "wheel", "tags", "--remove", *tags, wheel], {})
    return one_wheel(wheel.parent)


def audit(wheel: Path, *excluded: str) -> Path:
    """Lets auditwheel find the oldest system that a wheel runs on, which may lack what is excluded; its path."""
    checked = wheel.parent / "checked"
    # auto: its other names are those of the machine that it runs on
    repair: list[str | Path] = ["auditwheel", "repair", "--only-plat", "--plat", "auto", "-w", checked]
    run([*repair, *(f"--exclude={name}" for name in excluded), wheel], {"PATH": PATH})
    return one_wheel(checked)


def keep(wheel: Path, out: Path) -> Path:
    """Moves a wheel to a folder, which is made if need be; its path."""
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(wheel, out / wheel.name))


def build(target: Target, out: Path) -> Path:
    """Builds and checks the wheel of a target; its path in out."""
    work = ROOT / "build" / "wheels" / target.tag
    write_compilers(work / "zig", target)
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}"
    environment = {"PATH": PATH, **toolchain_variables(target, work / "zig")}
    options = [toolchain, *(f"-D{option}" for option in (*OPTIONS, *target.options))]
    licences = work / "licenses"
    licences.mkdir(parents=True, exist_ok=True)
    texts = {"zig": "LICENSE", "llvm": "lib/libcxx/LICENSE.TXT"}
    if target.system == "Windows":  # what starts programs, and threads
        texts["mingw-w64"] = "lib/libc/mingw/COPYING"
    for name, licence in texts.items():
        shutil.copyfile(ziglang() / licence, licences / f"{name}-LICENSE")
    options.append(f"-DXQUANT_RUNTIME_LICENSES={licences}")
    if target.system in RUNTIME:
        environment["ZIG_RUNTIME"] = str(build_runtime(target, work / "runtime", toolchain, environment))
        options.append(f"-DXQUANT_CXX_RUNTIME={environment['ZIG_RUNTIME']}")
    environment["CMAKE_ARGS"] = cmake_args(options)
    with tempfile.TemporaryDirectory() as folder:
        wheel = pip_wheel(folder, ".", environment, "-v", f"--config-settings=build-dir={work / 'fork'}")
        return (check if target.system == "Linux" else check_elsewhere)(target, wheel, out)


def build_runtime(target: Target, folder: Path, toolchain: str, environment: Mapping[str, str]) -> Path:
    """Builds the C++ runtime that libraries of a wheel share; its path in folder."""
    configure: list[str | Path] = ["cmake", "-G", "Ninja", "-S", ZIG / "runtime", "-B", folder, toolchain]
    configure += [f"-DZIG_LIB={ziglang() / 'lib'}", f"-DZIG_TARGET={target.zig}", "-DCMAKE_BUILD_TYPE=Release"]
    configure.append("-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY")  # programs want the runtime that is to be built
    run(configure, environment)
    run(["cmake", "--build", folder], environment)
    return folder / RUNTIME[target.system]


def check(target: Target, wheel: Path, out: Path) -> Path:
    """Lets auditwheel find the oldest system that a wheel runs on, and names the wheel after its target; it in out."""
    # scikit-build-core names the machine that it runs on
    wheel = retag(wheel, f"--platform-tag=linux_{target.processor}")
    if target.is_musl:
        wheel = name_musl(wheel, target)
    checked = audit(wheel)
    found, wanted = (re.search(r"(manylinux|musllinux)_(\d+)_(\d+)_(\w+)", name) for name in (checked.name, target.tag))
    assert wanted is not None
    if found is None or found[1] != wanted[1] or found[4] != wanted[4]:
        raise SystemExit(f"wheels: {checked.name} is no wheel for {target.tag}")
    if (int(found[2]), int(found[3])) > (int(wanted[2]), int(wanted[3])):
        raise SystemExit(f"wheels: {checked.name} needs a newer system than {target.tag}")
    return keep(retag(checked, f"--platform-tag={target.tag}"), out)


def cuda_release() -> tuple[int, int]:
    """Version of the CUDA toolkit whose nvcc CMake will find."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        said = subprocess.run([nvcc, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    except OSError as error:
        raise SystemExit(f"wheels: {nvcc} does not run ({error}): a CUDA wheel needs the CUDA toolkit") from None
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise SystemExit(f"wheels: {nvcc} --version names no release: {said.strip()}")
    return int(found[1]), int(found[2])


def build_cuda(out: Path) -> Path:
    """Builds the wheel for NVIDIA's GPUs; its path in a folder of out of its own, since pip would take it for any.

    Without CMAKE_ARGS it has code for all GPUs that llama.cpp and our kernels know; -DCMAKE_CUDA_ARCHITECTURES=90 and
    -DXQUANT_CUDA_ARCHITECTURES=90 in it are for one and build in a fraction of the time.
    """
    major, minor = cuda_release()
    # NCCL is for layers that are split among GPUs row by row alone, and one more library to install
    options = [f"-D{option}" for option in (*OPTIONS, "GGML_CUDA=ON", "GGML_CUDA_NCCL=OFF")]
    environment = {"PATH": PATH, "CMAKE_ARGS": cmake_args(options)}
    build_dir = ROOT / "build" / "wheels" / "cuda"
    with tempfile.TemporaryDirectory() as folder:
        wheel = pip_wheel(folder, ".", environment, "-v", f"--config-settings=build-dir={build_dir}")
        release = f"cu{major}{minor}"
        return keep(retag(audit(wheel, *CUDA_LIBRARIES), f"--build=1{release}"), out / release)


def check_elsewhere(target: Target, wheel: Path, out: Path) -> Path:
    """Names a wheel for Windows or macOS after its target, if it needs nothing that is not there; it in out."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(wheel, folder, "zip")
        libraries = Path(folder) / "xquant_gguf" / "lib"
        if lacking := library_needs.lacking(libraries):
            raise SystemExit(f"wheels: {target.tag} lacks {', '.join(lacking)}")
    return keep(retag(wheel, f"--platform-tag={target.tag}"), out)


def name_musl(wheel: Path, target: Target) -> Path:
    """Calls the C library as distributions with musl do, and as auditwheel expects; Zig calls it libc.so."""
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "wheel", "unpack", "-d", folder, wheel], {})
        (tree,) = Path(folder).iterdir()
        for file in (tree / "xquant_gguf" / "lib").iterdir():
            if file.read_bytes()[:4] == b"\x7fELF":
                name = f"libc.musl-{target.processor}.so.1"
                run(["patchelf", "--replace-needed", "libc.so", name, file], {"PATH": PATH})
        wheel.unlink()
        run([sys.executable, "-m", "wheel", "pack", "-d", wheel.parent, tree], {})
    return one_wheel(wheel.parent)


def build_bindings(out: Path) -> Path:
    """Builds the Python part of the pinned llama-cpp-python, which is published as source alone; its wheel in out.

    Pip takes it from there in place of the source, which would want a compiler.
    """
    release = llama_source.read_release()
    if ready := sorted(out.glob(f"llama_cpp_python-{release.version}-1xquant-*.whl")):
        return ready[0]
    sdist = llama_source.fetch(release)
    with tempfile.TemporaryDirectory() as folder:
        wheel = pip_wheel(folder, sdist, {"PATH": PATH, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"})
        with zipfile.ZipFile(wheel) as archive:
            if libraries := [name for name in archive.namelist() if ".so" in name]:
                raise SystemExit(f"wheels: {wheel.name} holds {libraries[0]}: LLAMA_BUILD=OFF did not leave it out")
        # the number of the build says that it is not the authors' own
        return keep(retag(wheel, "--build=1xquant", "--platform-tag=any"), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [target.tag for target in TARGETS]
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join(names)}, or cuda; those for Linux if there is none"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheels")
    args = parser.parse_args()
    if unknown := set(args.targets) - {*names, "cuda"}:
        parser.error(f"unknown target {sorted(unknown)[0]!r}: must be of {', '.join(names)}, cuda")
    wheels = [build_bindings(args.out)]
    if "cuda" in args.targets:
        wheels.append(build_cuda(args.out))
    linux = [target.tag for target in TARGETS if not target.by_name]
    wheels += [build(target, args.out) for target in TARGETS if target.tag in (args.targets or linux)]
    for wheel in wheels:
        print(f"{wheel}  {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
