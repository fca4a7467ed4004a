"""LlamaIndex's LlamaCPP with the XQuant cache: one environment variable, no other change.

    XQUANT_KV_TYPE=xquant python examples/llama_index_llamacpp.py MODEL.gguf

Needs: pip install llama-index-llms-llama-cpp
"""

from __future__ import annotations

import sys

from llama_index.llms.llama_cpp import LlamaCPP


def main() -> None:
    llm = LlamaCPP(model_path=sys.argv[1], context_window=4096, max_new_tokens=16, temperature=0.0, verbose=False)
    print(llm.complete("The capital of France is").text)


if __name__ == "__main__":
    main()
