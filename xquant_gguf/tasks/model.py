"""Asking a model: greedy answers through its chat template, and the cache put back between questions."""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from xquant_gguf.llama import Llama
from xquant_gguf.plan import PAGE


def chat_prompt(llm: Llama, text: str) -> list[int]:
    """Tokens of a question as the model's chat template words it; of the plain text if the model has none."""
    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        return list(llm.tokenize(text.encode(), add_bos=True, special=False))
    bos, eos = (_special(llm, token) for token in (llm.token_bos(), llm.token_eos()))
    formatter = Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)
    prompt = formatter(messages=[{"role": "user", "content": text}]).prompt
    return list(llm.tokenize(prompt.encode(), add_bos=False, special=True))


def _special(llm: Llama, token: int) -> str:
    return llm.detokenize([token], special=True).decode() if token >= 0 else ""


def greedy_answer(llm: Llama, prompt: Sequence[int], max_tokens: int) -> str:
    """The likeliest continuation, token by token, of a prompt that is read from its first token on."""
    llm.reset()  # no prefix of an earlier prompt is reused: an answer must not depend on what was asked before
    answer: list[int] = []
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if llama_cpp.llama_vocab_is_eog(vocab, token):
            break
        answer.append(token)
        if len(answer) == max_tokens:
            break
    return llm.detokenize(answer).decode(errors="replace").strip()


class Snapshot:
    """The cache as it is now, to be put back bit for bit.

    Cutting it back would keep pages sealed that a longer continuation sealed, so that an answer would depend on the
    ones before it.
    """

    def __init__(self, llm: Llama) -> None:
        self._session = llm.session
        self._state = self._session.save(0)

    def restore(self) -> None:
        """Puts it back."""
        self._session.clear()
        self._session.load(self._state, 0)


def sealed_tokens(llm: Llama) -> int:
    """Tokens of the cache that are read from codes."""
    return int(llm.kv_cache_info()["pages_sealed"]) * PAGE
