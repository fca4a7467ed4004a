"""LangChain's LlamaCpp with the XQuant cache: one environment variable, no other change.

    XQUANT_KV_TYPE=xquant python examples/langchain_llamacpp.py MODEL.gguf

Needs: pip install langchain-community
"""

from __future__ import annotations

import sys

from langchain_community.llms import LlamaCpp


def main() -> None:
    llm = LlamaCpp(model_path=sys.argv[1], n_ctx=4096, max_tokens=16, temperature=0.0, verbose=False)
    print(llm.invoke("The capital of France is"))
    for part in llm.stream("The capital of Italy is"):
        print(part, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
