"""Asking a model: greedy answers through its chat template, and the cache put back between questions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from xquant_gguf.llama import Llama
from xquant_gguf.plan import PAGE


def chat_prompt(llm: Llama, text: str, question: str = "") -> list[int]:
    """Tokens of a message, text and question, as the model's chat template words it; as it is if the model has none.

    What stands before the question is tokenized for itself: it is the same tokens whatever the question is.
    """
    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        whole = text + question
    else:
        bos, eos = (_special(llm, token) for token in (llm.token_bos(), llm.token_eos()))
        formatter = Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)
        whole = formatter(messages=[{"role": "user", "content": text + question}]).prompt
    special = template is not None
    cut = whole.rindex(question) if question else len(whole)
    tokens = list(llm.tokenize(whole[:cut].encode(), add_bos=not special, special=special))
    return tokens + (llm.tokenize(whole[cut:].encode(), add_bos=False, special=special) if question else [])


def common(*texts: Sequence[int]) -> int:
    """How many tokens are the same in all texts, from the first on."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))


def _special(llm: Llama, token: int) -> str:
    return llm.detokenize([token], special=True).decode() if token >= 0 else ""


def greedy(llm: Llama, tokens: Sequence[int], n_past: int, max_tokens: int) -> list[int]:
    """The likeliest tokens behind tokens at positions n_past .., up to the end of generation or so many."""
    session, vocab, n_batch = llm.session, llama_cpp.llama_model_get_vocab(llm.model), llm.session.n_batch
    made: list[int] = []
    while len(made) < max_tokens:
        for first in range(0, len(tokens), n_batch):
            piece = tokens[first : first + n_batch]
            session.decode([(token, n_past + i, (0,)) for i, token in enumerate(piece)], "last")
            n_past += len(piece)
        token = int(session.logits(1)[0].argmax())
        if llama_cpp.llama_vocab_is_eog(vocab, token):
            break
        made.append(token)
        tokens = [token]
    return made


def text_of(llm: Llama, tokens: Sequence[int]) -> str:
    """What tokens spell, without white space at its ends."""
    return str(llm.detokenize(list(tokens)).decode(errors="replace").strip())


def greedy_answer(llm: Llama, prompt: Sequence[int], max_tokens: int) -> str:
    """The likeliest continuation, token by token, of a prompt that is read from its first token on."""
    llm.reset()
    llm.session.clear()  # an answer must not depend on what was asked before
    return text_of(llm, greedy(llm, prompt, 0, max_tokens))


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


class ReadOnce:
    """What many questions share is read once a model, and the cache behind it put back for each of them."""

    def __init__(self) -> None:
        self._of: tuple[Llama, list[int], Snapshot] | None = None

    def read(self, llm: Llama, tokens: list[int]) -> None:
        """The cache then holds these tokens and nothing else."""
        if self._of is None or self._of[0] is not llm or self._of[1] != tokens:
            self._of = None  # a state of many tokens is large
            llm.reset()
            llm.eval(tokens)
            self._of = (llm, tokens, Snapshot(llm))
        self._of[2].restore()


def sealed_tokens(llm: Llama) -> int:
    """Tokens of the cache that are read from codes."""
    return int(llm.kv_cache_info()["pages_sealed"]) * PAGE
