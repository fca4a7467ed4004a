"""What the tests share: models, contexts, oracles, cases; imported as `from support import tiny_gguf`."""

import xquant_gguf  # noqa: F401  (before llama_cpp, whose libraries it chooses)
