"""What the tests share: models, contexts, oracles, cases; imported as `from support import tiny_gguf`."""
