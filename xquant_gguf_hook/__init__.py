"""Makes `import llama_cpp` load xquant_gguf's build of llama.cpp, whoever imports it and when.

The wheel installs a file xquant_gguf.pth, which imports this module whenever Python starts.  That adds one finder to
sys.meta_path and does nothing else until llama_cpp is imported; so this module imports nothing that costs time.

llama_cpp looks for its libraries in folders that environment variables name.  The finder sets these variables while
the modules that read them are loaded, and puts them back: other programs that this one starts do not inherit them.

Until `import xquant_gguf` asks for it, llama_cpp is left as it is where the user chose its libraries (the variables
are set), where our libraries are missing or made for another version of llama_cpp, and where llama_cpp has backends of
its own that ours lack (a CUDA build beside our CPU one).  XQUANT_HOOK=0 switches the finder off, XQUANT_HOOK=1 makes
it disregard backends.

XQUANT_KV_TYPE=xquant (or another kv_type) gives that cache to every llama_cpp.Llama (xquant_gguf/environment.py).
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType
    from typing import Any

SWITCH = "XQUANT_HOOK"
KV_TYPE = "XQUANT_KV_TYPE"
CLASS = "llama_cpp.llama"
"""The module of llama_cpp.Llama, which KV_TYPE concerns."""
VARIABLES = {"llama_cpp.llama_cpp": "LLAMA_CPP_LIB_PATH", "llama_cpp.mtmd_cpp": "MTMD_CPP_LIB"}
"""What each module that loads a library reads."""


FILES = ("lib{}.so", "lib{}.dylib", "{}.dll")
"""How a library's file is called on Linux, macOS and Windows."""


def library_folders() -> list[Path]:
    """Where our libraries may lie: beside the package; for an editable install, where the build installed them."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from pathlib import Path
    from urllib.parse import unquote, urlsplit

    root = Path(os.path.abspath(__file__)).parent.parent
    folders = [root / "xquant_gguf" / "lib"]
    try:
        installed = distribution("xquant-gguf")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return folders
    source = Path(unquote(urlsplit(origin.get("url", "")).path))
    if origin.get("dir_info", {}).get("editable") and source.resolve() == root.resolve():
        folders.append(Path(str(installed.locate_file("xquant_gguf"))) / "lib")
    return folders


def library_folder() -> Path | None:
    """The folder in which our libllama lies; None if it was not built."""
    for folder in library_folders():
        if any((folder / file.format("llama")).exists() for file in FILES):
            return folder
    return None


def _wrong_version() -> str:
    """What is wrong with the installed llama_cpp's version; empty if our libraries fit it."""
    from importlib.metadata import PackageNotFoundError, requires, version

    try:
        found, required = version("llama-cpp-python"), requires("xquant-gguf") or []
    except PackageNotFoundError:  # of a source tree nothing is known; xquant_gguf itself checks again
        return ""
    pinned = next((line.partition("==")[2] for line in required if line.startswith("llama-cpp-python==")), found)
    wanted = pinned.partition(";")[0].strip()
    return "" if found == wanted else f"llama-cpp-python is {found}, xquant_gguf's libraries fit {wanted} alone"


def _more_backends(theirs: Path, ours: Path) -> str:
    """Names of the backends that llama_cpp's own libraries have and ours do not; kinds of CPU apart."""
    names = [{file.name.split(".")[0].removeprefix("lib") for file in f.glob("*ggml-*")} for f in (theirs, ours)]
    return ", ".join(sorted(name for name in names[0] - names[1] if not name.startswith("ggml-cpu")))


class Finder:
    """The finder for VARIABLES' modules.

    folder: where llama_cpp looks for libraries; None: where it does by itself.  reason: why it is None.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self.reason = "no xquant_gguf.pth in site-packages told Python of it"
        self._insisted = False

    def insist(self, folder: str) -> None:
        """From now on llama_cpp loads the libraries of this folder, whatever else is set."""
        self.folder, self._insisted = folder, True

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, with a loader that sets its variable; None: as if there were no such finder."""
        if name not in VARIABLES and (name != CLASS or not os.environ.get(KV_TYPE)):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        if not self._insisted and name == "llama_cpp.llama_cpp":  # the others follow it
            self._choose(spec)
        if name == CLASS:
            spec.loader = _ClassLoader(spec.loader, self)  # type: ignore[assignment]
        elif self.folder is not None:
            spec.loader = _Loader(spec.loader, VARIABLES[name], self.folder)  # type: ignore[assignment]
        return spec

    def _choose(self, spec: ModuleSpec) -> None:
        from pathlib import Path

        self.folder, ours = None, library_folder()
        switch = os.environ.get(SWITCH, "")
        named = [variable for variable in VARIABLES.values() if variable in os.environ]
        more = _more_backends(Path(spec.origin or "").parent / "lib", ours) if ours and switch != "1" else ""
        if switch == "0":
            self.reason = f"{SWITCH} is 0"
        elif named:
            self.reason = f"{named[0]} is set"
        elif ours is None:
            self.reason = "xquant_gguf has no libraries"
        elif wrong := _wrong_version():
            self.reason = wrong
        elif more:
            self.reason = f"it has what xquant_gguf's build lacks ({more}; {SWITCH}=1 disregards that)"
        else:
            self.folder = str(ours)


class _Around:
    """Another loader, around which something is done."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module


class _Loader(_Around):
    """Sets an environment variable while the module is executed."""

    def __init__(self, loader: Any, variable: str, folder: str) -> None:
        super().__init__(loader)
        self._variable, self._folder = variable, folder

    def exec_module(self, module: ModuleType) -> None:
        before = os.environ.get(self._variable)
        os.environ[self._variable] = self._folder
        try:
            self._loader.exec_module(module)
        finally:
            if before is None:
                del os.environ[self._variable]
            else:
                os.environ[self._variable] = before


class _ClassLoader(_Around):
    """Lets llama_cpp.Llama be made with the cache that KV_TYPE names, where it has our libraries."""

    def __init__(self, loader: Any, of: Finder) -> None:
        super().__init__(loader)
        self._finder = of

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if self._finder.folder is None:
            said = f"llama_cpp keeps libraries without this cache, since {self._finder.reason}"
            print(f"xquant_gguf: {KV_TYPE}={os.environ[KV_TYPE]}: {said}", file=sys.stderr)
            return
        from functools import wraps

        original = module.Llama.__init__

        @wraps(original)
        def init(self: Any, model_path: str, **options: Any) -> None:
            from xquant_gguf import environment

            environment.make(original, self, model_path, options)

        module.Llama.__init__ = init


finder = Finder()
sys.meta_path.insert(0, finder)
