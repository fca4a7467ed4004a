"""What a newcomer does with an installed wheel: newcomer.py MODEL TEXT [GPU_LAYERS].

Run where nothing else is installed.  Answers a question behind a long text with an F16 cache and with XQuant; prints
one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from xquant_gguf import Llama, __version__, codec, fork

QUESTION = "What is the capital of France?"
CITIES = ("London", "Paris", "Rome", "Madrid")


def answer(model: str, text: str, kv_type: str, n_gpu_layers: int) -> dict[str, Any]:
    """The answer, and where the cache's pages are."""
    from llama_cpp import LlamaGrammar

    llm = Llama(
        model, kv_type=kv_type, n_ctx=2048, n_batch=128, n_ubatch=128, n_threads=2, n_gpu_layers=n_gpu_layers,
        verbose=False,
    )  # fmt: skip
    talk = [{"role": "user", "content": f"Read this:\n{text}"}, {"role": "assistant", "content": "I have read it."}]
    talk.append({"role": "user", "content": QUESTION})
    cities = " | ".join(f'"{city}"' for city in CITIES)
    grammar = LlamaGrammar.from_string(f'root ::= "The capital of France is " ({cities}) "."', verbose=False)
    out = llm.create_chat_completion(talk, max_tokens=30, temperature=0, grammar=grammar)
    info = llm.kv_cache_info()
    waiting = n_threads()
    goes_on = shift(llm)
    llm.close()
    return {
        "answer": out["choices"][0]["message"]["content"],
        "prompt_tokens": out["usage"]["prompt_tokens"],
        "bytes": info["bytes_allocated"],
        "sealed": info.get("pages_sealed", 0),
        "goes_on": goes_on,
        "threads": waiting,
    }


def n_threads() -> int | None:
    """Of this process; None: this system does not say it."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else None


def shift(llm: Llama) -> str:
    """Forgets tokens behind the first page, moves the others down, as chat front ends do; the text that follows.

    This turns keys in threads of llama.cpp, whose stacks are small where Python does not say otherwise (musl).
    """
    import llama_cpp

    memory = llama_cpp.llama_get_memory(llm.ctx)
    assert llama_cpp.llama_memory_seq_rm(memory, 0, 128, 384)
    llama_cpp.llama_memory_seq_add(memory, 0, 384, -1, -256)
    llm.n_tokens -= 256
    tokens: list[int] = []
    for _ in range(4):
        llm.eval(tokens[-1:] or llm.tokenize(b" It", add_bos=False))
        tokens.append(llm.sample(temp=0))
    return llm.detokenize(tokens, special=True).decode(errors="replace")  # a small model may end here


def main() -> None:
    model, text = sys.argv[1], Path(sys.argv[2]).read_text()[:5000]
    n_gpu_layers = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    import llama_cpp.llama_cpp

    before = n_threads()
    told: dict[str, Any] = {kv_type: answer(model, text, kv_type, n_gpu_layers) for kv_type in ("f16", "xquant")}
    told["gpu"] = bool(fork.gpus())
    told["library"] = llama_cpp.llama_cpp._lib._name
    told["package"] = fork.__file__
    told["threads"] = before
    told["version"] = __version__
    told["kernels"] = codec.kernel_sets()
    told["llama_kernels"] = fork.cpu_variant()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
