"""XQuant: an ultra-low-bit KV cache for llama.cpp and its Python users."""

from importlib.metadata import PackageNotFoundError, version

from xquant_gguf import fork

fork.use()  # first of all: whatever imports llama_cpp from here on gets our libraries

from xquant_gguf.llama import Llama  # noqa: E402
from xquant_gguf.plan import Layer, Plan, Side  # noqa: E402

try:
    __version__ = version("xquant-gguf")
except PackageNotFoundError:  # used from a source tree
    __version__ = "0"

__all__ = ["Layer", "Llama", "Plan", "Side", "__version__"]
