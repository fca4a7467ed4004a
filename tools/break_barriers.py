"""Whether tests notice a barrier that decode attention on a GPU lacks: break_barriers.py [--jobs 16].

No tool checks these barriers for us: racecheck loses count where teams of warps meet (tools/sanitize_cuda.sh).
native/cuda/attend_page.cuh says why two a page are enough; here each barrier of the kernel for heads of 128 is taken
out in turn, and kernel tests must fail.  Needs nvcc, a GPU, and a build with CUDA in xquant_gguf/lib, which is put
back.

Two more barriers stand behind the pages, for a team's sums of p and for the states of all teams.  Warps come there in
step: without them tests passed on an H200, so that they are not in the list.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "xquant_gguf" / "lib" / "libxquant_cuda.so"
KERNEL = "attend_decode_128_few"  # heads of 128, one token
TESTS = "(many_pages and 128-128-1) or (beside_a_far and 2) or (overtakes and decode)"
BARRIERS = (  # file, the line, which of those that are alike
    ("page_list.cuh", "    __syncthreads();", 1, "the list of pages is there"),
    ("attend_page.cuh", "    warp.meet();", 0, "the maximum of a page is there"),
    ("attend_page.cuh", "    warp.meet();", 1, "p of a page is there"),
    ("attend_decode.cuh", "    __syncthreads(); // pages lay there", 0, "pages are done with"),
)
LINK = ["nvcc", "-shared", "-cudart", "static", "-Xlinker", "-rpath,$ORIGIN"]
FLAGS = ["-O3", "-DNDEBUG", "-DXQUANT_WGMMA", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def compile_file(source: Path, to: Path) -> None:
    """One file of native/cuda, as native/CMakeLists.txt has it."""
    native = source.parent.parent
    suffix = "a" if source.stem == "prompt_attend" else ""
    exact = ["-fmad=false"] if source.stem in ("update", "unpack", "keys") else []
    folders = [f"-I{native / name}" for name in ("include", "common", "cuda")]
    target = f"-gencode=arch=compute_90{suffix},code=sm_90{suffix}"
    subprocess.run(["nvcc", "-c", *FLAGS, *exact, target, *folders, source, "-o", to], check=True)


def without(number: int, folder: Path) -> Path:
    """The kernel's object file without that barrier."""
    name, line, which, _ = BARRIERS[number]
    native = folder / f"native-{number}"
    shutil.copytree(ROOT / "native", native)
    path = native / "cuda" / name
    lines = path.read_text().splitlines()
    at = [i for i, text in enumerate(lines) if text == line][which]
    lines[at] = ""
    path.write_text("\n".join(lines) + "\n")
    out = folder / f"without-{number}.o"
    compile_file(native / "cuda" / f"{KERNEL}.cu", out)
    return out


def passes() -> bool:
    """Whether the tests do with the library that is there."""
    command = [sys.executable, "-m", "pytest", "-qxm", "cuda", "-k", TESTS, "tests/kernels/test_cuda_kernels.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=300).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=16)
    jobs = parser.parse_args().jobs
    if not passes():
        raise SystemExit("tests fail before anything is broken")
    unseen = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        broken = [pool.submit(without, number, folder) for number in range(len(BARRIERS))]
        others = [source for source in (ROOT / "native" / "cuda").glob("*.cu") if source.stem != KERNEL]
        objects = [folder / f"{source.stem}.o" for source in others]
        list(pool.map(compile_file, others, objects))
        kept = folder / LIBRARY.name
        shutil.copy(LIBRARY, kept)
        try:
            for number, (where, _, _, why) in enumerate(BARRIERS):
                parts = [*objects, broken[number].result()]
                subprocess.run([*LINK, "-o", LIBRARY, *parts, f"-L{LIBRARY.parent}", "-lxquant"], check=True)
                seen = not passes()
                print(f"{where:18} {why:32} {'noticed' if seen else 'NOT noticed'}", flush=True)
                unseen += [] if seen else [why]
        finally:
            shutil.copy(kept, LIBRARY)
    if unseen:
        raise SystemExit(f"not noticed: {', '.join(unseen)}")


if __name__ == "__main__":
    main()
