"""Whoever imports llama_cpp, before or after xquant_gguf, gets the fork; where that cannot be, one error says why.

Every test starts Python in a new environment, in whose site-packages xquant_gguf.pth lies as the wheel installs it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import llama_cpp
import pytest

import xquant_gguf
from xquant_gguf import native

PACKAGE = Path(xquant_gguf.__file__).parent
PTH = Path(__file__).parents[2] / "xquant_gguf_hook" / "xquant_gguf.pth"
BINDINGS = Path(llama_cpp.__file__).parent
TELL = """
import json, os, sys
from pathlib import Path
from llama_cpp import llama_cpp as bindings, mtmd_cpp
print(json.dumps([str(Path(x._name).parent) for x in (bindings._lib, mtmd_cpp._libmtmd)]))
"""
FIRST, LAST = "import llama_cpp, xquant_gguf", "import xquant_gguf, llama_cpp"


@dataclass
class Environment:
    """A Python environment with bindings of llama_cpp of its own, and what the tests were installed with besides."""

    folder: Path
    bindings: Path
    pth: bool = True

    def __post_init__(self) -> None:
        venv.create(self.folder, symlinks=True)
        (self.site,) = self.folder.glob("lib/python*/site-packages")
        paths = [self.bindings, PACKAGE.parent, *(path for path in sys.path if path.endswith("-packages"))]
        (self.site / "a.pth").write_text("".join(f"{path}\n" for path in paths))
        if self.pth:
            shutil.copy(PTH, self.site)

    def run(self, program: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a program."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLAMA", "XQUANT"))}
        command = [str(self.folder / "bin" / "python"), "-c", program]
        return subprocess.run(
            command, cwd=self.folder, env={**own, **env}, capture_output=True, text=True, check=False, timeout=120
        )

    def folders(self, program: str, **env: str) -> set[str]:
        """Where the libraries lie that llama_cpp has loaded after the program."""
        out = self.run(f"{program}\n{TELL}", **env)
        assert out.returncode == 0, out.stderr
        return set(json.loads(out.stdout.splitlines()[-1]))


def write_bindings(folder: Path, *, own: bool) -> Path:
    """llama_cpp's Python part, with or without libraries of its own."""
    (folder / "llama_cpp").mkdir(parents=True)
    for entry in BINDINGS.iterdir():
        if entry.name not in ("lib", "__pycache__"):
            (folder / "llama_cpp" / entry.name).symlink_to(entry)
    if own:
        shutil.copytree(native.LIBRARY_DIR, folder / "llama_cpp" / "lib")
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """As installed with CMAKE_ARGS=-DLLAMA_BUILD=OFF."""
    folder = tmp_path_factory.mktemp("bare")
    return Environment(folder / "venv", write_bindings(folder / "site", own=False))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """llama_cpp with libraries of its own."""
    folder = tmp_path_factory.mktemp("full")
    return Environment(folder / "venv", write_bindings(folder / "site", own=True))


OURS = {str(native.LIBRARY_DIR)}


@pytest.mark.parametrize("order", [FIRST, LAST])
@pytest.mark.parametrize("kind", ["bare", "full"])
def test_both_orders_work(kind: str, order: str, request: pytest.FixtureRequest) -> None:
    environment: Environment = request.getfixturevalue(kind)
    assert environment.folders(f"{order}\nassert issubclass(xquant_gguf.Llama, llama_cpp.Llama)") == OURS


def test_llama_cpp_alone_is_given_the_fork(full: Environment) -> None:
    """As a library that never heard of us imports it; other programs inherit nothing from it."""
    quiet = "import llama_cpp, os\nassert not [name for name in os.environ if name.startswith(('LLAMA', 'MTMD'))]"
    assert full.folders(quiet) == OURS


def own(environment: Environment) -> str:
    return str(environment.bindings / "llama_cpp" / "lib")


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"XQUANT_HOOK": "0"}, "XQUANT_HOOK is 0"),
        ({"LLAMA_CPP_LIB_PATH": "OWN"}, "LLAMA_CPP_LIB_PATH is set"),
        ({"MTMD_CPP_LIB": "OWN"}, "MTMD_CPP_LIB is set"),
    ],
)
def test_who_chose_a_library_keeps_it(full: Environment, env: dict[str, str], reason: str) -> None:
    env = {name: value.replace("OWN", own(full)) for name, value in env.items()}
    assert full.folders("import llama_cpp", **env) == {own(full)}
    out = full.run(FIRST, **env)
    assert out.returncode == 1
    told = f"llama_cpp was imported before xquant_gguf and has loaded {own(full)}/libllama.so, since {reason}"
    assert told in out.stderr
    assert f"needs the libraries in {native.LIBRARY_DIR}: import xquant_gguf before" in out.stderr
    assert full.folders(LAST, **env) == OURS  # whoever says xquant_gguf first means it


def test_backends_that_ours_lack_are_not_taken_away(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", write_bindings(tmp_path / "site", own=True))
    (Path(own(environment)) / "libggml-vulkan.so").touch()
    (Path(own(environment)) / "libggml-cpu-haswell.so").touch()
    assert environment.folders("import llama_cpp") == {own(environment)}
    out = environment.run(FIRST)
    assert "since it has what xquant_gguf's build lacks (ggml-vulkan; XQUANT_HOOK=1 disregards that)" in out.stderr
    assert environment.folders(FIRST, XQUANT_HOOK="1") == OURS
    assert environment.folders(LAST) == OURS


def test_another_version_is_left_alone(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", write_bindings(tmp_path / "site", own=True))
    info = environment.bindings / "llama_cpp_python-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.1.0\n")
    assert environment.folders("import llama_cpp") == {own(environment)}
    assert "since llama-cpp-python is 0.1.0, xquant_gguf's libraries fit" in environment.run(FIRST).stderr
    out = environment.run(LAST)
    assert "ImportError: llama-cpp-python is 0.1.0; the fork is built from" in out.stderr


def test_without_the_pth_file_xquant_gguf_must_come_first(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", write_bindings(tmp_path / "site", own=True), pth=False)
    assert environment.folders(LAST) == OURS
    assert "no xquant_gguf.pth in site-packages told Python of it" in environment.run(FIRST).stderr


def test_python_starts_with_one_small_module_more(bare: Environment, tmp_path: Path) -> None:
    plain = Environment(tmp_path / "venv", bare.bindings, pth=False)
    tell = "import sys; print(*sys.modules)"
    found, expected = (set(environment.run(tell).stdout.split()) for environment in (bare, plain))
    assert found - expected <= {"xquant_gguf_hook", "__future__"}
    assert "xquant_gguf_hook" in found


def test_the_wheel_has_the_pth_file() -> None:
    """And it lies where Python looks for it."""
    installed = distribution("xquant-gguf")
    if not (installed.files and PACKAGE.samefile(str(installed.locate_file("xquant_gguf")))):
        pytest.skip("xquant_gguf was not imported from where it is installed")
    (path,) = (file for file in installed.files if file.name == "xquant_gguf.pth")
    assert Path(str(installed.locate_file(path))).parent == PACKAGE.parent
    assert path.read_text() == PTH.read_text()


# ---- editable installs: sources here, libraries where the build installed them ----


@pytest.mark.parametrize("editable", [True, False])
def test_editable_installs_find_their_libraries(editable: bool, tmp_path: Path) -> None:
    source, site = tmp_path / "source with spaces", tmp_path / "site"
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    for package in ("xquant_gguf", "xquant_gguf_hook"):
        shutil.copytree(PACKAGE.parent / package, source / package, ignore=ignored)
    info = site / "xquant_gguf-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xquant-gguf\nVersion: 0.1.0\n")
    direct = {"url": source.as_uri(), "dir_info": {"editable": editable}}
    (info / "direct_url.json").write_text(json.dumps(direct))
    shutil.copytree(native.LIBRARY_DIR, site / "xquant_gguf" / "lib")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(site), *sys.path])}
    program = "from xquant_gguf import Llama, native; print(native.LIBRARY_DIR)"
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    if editable:
        assert out.stdout.strip() == str(site / "xquant_gguf" / "lib"), out.stderr
    else:  # libraries of another installation may not fit these sources
        missing = source / "xquant_gguf" / "lib" / "version.json"
        assert f"OSError: {missing} is missing: build the package" in out.stderr
