"""What applications do with a cache, scripted once and run on every cache type: where F16 works, XQuant works.

A tiny random model, so that a scenario takes a fraction of a second; "close" compares with the same cache type fed in
one go, so that what is compared is the operation and not the loss of the type.
"""

from __future__ import annotations

import ast
import inspect
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_cache import LlamaDiskCache, LlamaRAMCache
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
from numpy.typing import NDArray

from support import tiny_gguf
from support.contexts import Context, last_logits
from support.tiny_gguf import text
from xquant_gguf import Llama
from xquant_gguf.llama import llama_cpp

KV_TYPES = ("f16", "q8_0", "q4_0", "xquant")
TOKENS = np.random.default_rng(21).integers(3, tiny_gguf.N_VOCAB, 1400).tolist()
Make = Callable[..., Llama]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    for name, shape in (("plain", tiny_gguf.Shape()), ("other", tiny_gguf.Shape(arch="qwen2", n_embd=256, seed=9))):
        tiny_gguf.write(folder / f"{name}.gguf", shape, tiny_gguf.random_weights(shape))
    return folder


@pytest.fixture(params=KV_TYPES)
def kv_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(folder: Path, kv_type: str) -> Make:
    def llama(**options: Any) -> Llama:
        given = {"kv_type": kv_type, "n_ctx": 1024, "n_batch": 64, "n_ubatch": 64, "n_threads": 1}
        return Llama(str(folder / "plain.gguf"), **{**given, "verbose": False, "logits_all": True, **options})

    return llama


def close(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Measured: at most 0.034 (XQuant seals pages again); 0.17 with the adapter of test_lora."""
    error = float(np.sqrt(((a - b) ** 2).mean()) / b.std())
    return error < 0.1


def fed_in_one_go(make: Make, tokens: Sequence[int]) -> NDArray[np.float32]:
    llm = make()
    llm.eval(tokens)
    out = last_logits(llm)
    llm.close()
    return out


def evaluated(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that llm decodes from now on."""
    sizes: list[int] = []
    decode = llm._ctx.decode

    def counted(batch: Any) -> None:
        sizes.append(batch.n_tokens())
        decode(batch)

    monkeypatch.setattr(llm._ctx, "decode", counted)
    return sizes


def test_a_chat_reuses_its_prefix(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make(chat_format="chatml")
    sizes = evaluated(llm, monkeypatch)
    talk = [{"role": "user", "content": text(300, seed=1)}]
    answer = llm.create_chat_completion(talk, max_tokens=20, temperature=0)["choices"][0]["message"]["content"]
    first = sum(sizes)
    talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": text(50, seed=2)}]
    llm.create_chat_completion(talk, max_tokens=20, temperature=0)
    assert sum(sizes) - first < 200 < first
    assert close(last_logits(llm), fed_in_one_go(make, llm.input_ids[: llm.n_tokens].tolist()))


def test_a_reused_prefix_may_end_anywhere(make: Make) -> None:
    llm = make()
    llm.create_completion(text(600), max_tokens=10, temperature=0)
    for n in (500, 200, 130, 20):
        llm.create_completion(text(n) + text(30, seed=n), max_tokens=2, temperature=0)
        assert close(last_logits(llm), fed_in_one_go(make, llm.input_ids[: llm.n_tokens].tolist()))


def test_a_saved_state_goes_on_as_it_would_have(make: Make) -> None:
    llm = make()
    llm.eval(TOKENS[:500])
    state = llm.save_state()
    llm.eval(TOKENS[500:520])
    want = last_logits(llm)
    llm.reset()
    llm.eval(TOKENS[700:900])
    llm.load_state(state)
    assert llm.n_tokens == 500
    llm.eval(TOKENS[500:520])
    assert np.array_equal(last_logits(llm), want)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_prompt_caches(make: Make, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()
    llm.set_cache(LlamaRAMCache() if kind == "ram" else LlamaDiskCache(str(tmp_path)))
    llm.create_completion(text(400), max_tokens=4, temperature=0)
    llm.reset()
    llm.eval(TOKENS[:500])
    sizes = evaluated(llm, monkeypatch)
    llm.create_completion(text(400) + text(20, seed=6), max_tokens=4, temperature=0)
    assert sum(sizes) < 40
    assert close(last_logits(llm), fed_in_one_go(make, llm.input_ids[: llm.n_tokens].tolist()))


class Draft(LlamaDraftModel):
    """Proposes what another Llama would say next."""

    def __init__(self, llm: Llama) -> None:
        self.llm = llm

    def __call__(self, input_ids: NDArray[np.intc], /, **_: Any) -> NDArray[np.intc]:
        tokens = self.llm.generate(input_ids.tolist(), temp=0)
        return np.array([token for token, _ in zip(tokens, range(4), strict=False)], dtype=np.intc)


@pytest.mark.parametrize("draft", ["prompt lookup", "a model"])
def test_speculative_decoding(make: Make, draft: str) -> None:
    """Tokens that are rejected leave the cache again; what comes out is still the likeliest."""
    lookup = LlamaPromptLookupDecoding(num_pred_tokens=6)
    drafts = lookup if draft == "prompt lookup" else Draft(make(kv_type="q8_0"))
    llm = make(draft_model=drafts)
    prompt = [1, *TOKENS[:40] * 8]
    out = [token for token, _ in zip(llm.generate(prompt, temp=0), range(40), strict=False)]
    plain = make()
    plain.eval(prompt + out)
    logits = np.array(plain.scores[len(prompt) - 1 : len(prompt) + len(out) - 1])
    chosen = logits[np.arange(len(out)), out]
    assert ((logits.max(axis=1) - chosen) / logits.std() < 0.1).all()


def test_a_full_cache_is_an_error_and_the_context_goes_on(make: Make) -> None:
    llm = make(n_ctx=512)
    llm.eval(TOKENS[:500])
    with pytest.raises(RuntimeError, match="llama_decode returned 1"):
        llm.eval(TOKENS[500:540])
    llm.eval(TOKENS[500:510])
    assert close(last_logits(llm), fed_in_one_go(make, TOKENS[:510]))


def test_reset_starts_afresh(make: Make) -> None:
    llm = make()
    llm.eval(TOKENS[:600])
    llm.reset()
    llm.eval(TOKENS[600:900])
    assert close(last_logits(llm), fed_in_one_go(make, TOKENS[600:900]))


def test_logits_of_all_tokens(make: Make) -> None:
    """Those of the tokens told are the model's own, and these do not depend on how the prompt came in."""
    llm, plain = make(), make()
    out = llm.create_completion(text(300), max_tokens=5, temperature=0, logprobs=3, echo=True)
    tokens = llm._input_ids.tolist()
    plain.eval(tokens)
    got, want = (np.array(x.scores[: len(tokens)]) for x in (llm, plain))
    assert close(got, want)
    logp = got - np.logaddexp.reduce(got, axis=1, keepdims=True)
    want_logp = logp[np.arange(len(tokens) - 1), tokens[1:]]
    told = out["choices"][0]["logprobs"]["token_logprobs"]  # of all tokens but the first special one
    assert told[0] is None
    assert len(want_logp) > 300
    np.testing.assert_allclose(told[1 : len(want_logp)], want_logp[1:], atol=1e-4)  # measured: 3e-6


def test_grammar(make: Make) -> None:
    llm = make()
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= ("yes" | "no") "."', verbose=False)
    out = llm.create_completion(text(300), max_tokens=8, grammar=grammar)["choices"][0]["text"]
    assert out in ("yes.", "no.")


def test_embeddings(make: Make, folder: Path) -> None:
    llm = make(embedding=True, n_batch=512, n_ubatch=512)
    plain = Llama(str(folder / "plain.gguf"), embedding=True, n_ctx=1024, verbose=False)
    texts = [text(n, seed=n) for n in (40, 300, 5)]
    got, want = (np.array([np.mean(x.embed(t), axis=0) for t in texts]) for x in (llm, plain))
    assert close(got, want)


def test_lora(make: Make, tmp_path: Path) -> None:
    """An adapter changes the logits, and they do not depend on how the prompt came in."""
    shape = tiny_gguf.Shape()
    n_keys = shape.n_head_kv * shape.key_length
    path = tiny_gguf.write_lora(tmp_path / "lora.gguf", shape.arch, shape.n_layer, shape.n_embd, n_keys)

    def adapted() -> Llama:
        return make(lora_path=str(path))

    llm = adapted()
    for i in range(0, 400, 50):
        llm.eval(TOKENS[i : i + 50])
    assert close(last_logits(llm), fed_in_one_go(adapted, TOKENS[:400]))
    assert not close(last_logits(llm), fed_in_one_go(make, TOKENS[:400]))


@pytest.mark.parametrize("unified", [True, False])
def test_several_sequences_in_one_batch(folder: Path, kv_type: str, unified: bool) -> None:
    """Three users with a common beginning, each with an end of its own, take turns in mixed batches."""
    with Context(folder / "plain.gguf", kv_type, n_ctx=6144, n_seq=3, unified=unified) as context:
        context.decode(TOKENS[:400], 0, [0])
        for s in (1, 2):
            llama_cpp.llama_memory_seq_cp(context.memory, 0, s, -1, -1)
        for i in range(0, 60, 20):
            rows = [(TOKENS[500 + 100 * s + j], 400 + j, [s]) for j in range(i, i + 20) for s in range(3)]
            context.decode_mixed(rows)
        llama_cpp.llama_memory_seq_rm(context.memory, 1, -1, -1)
        for s in (0, 2):
            end = TOKENS[500 + 100 * s : 560 + 100 * s]
            got = context.decode(TOKENS[1000:1010], 460, [s])
            with Context(folder / "plain.gguf", kv_type) as alone:
                alone.decode([*TOKENS[:400], *end], 0)
                assert close(got, alone.decode(TOKENS[1000:1010], 460))


def remove(p0: int, p1: int) -> Callable[[Any], int]:
    def operation(memory: Any) -> int:
        assert llama_cpp.llama_memory_seq_rm(memory, 0, p0, p1)
        return p0 if p1 < 0 else 900

    return operation


def shift(memory: Any) -> int:
    remove(64, 400)(memory)
    assert llama_cpp.llama_memory_can_shift(memory)
    llama_cpp.llama_memory_seq_add(memory, 0, 400, -1, -336)
    return 900 - 336


def divide(memory: Any) -> int:
    llama_cpp.llama_memory_seq_div(memory, 0, 0, -1, 2)
    return 450


def copy_and_keep(memory: Any) -> int:
    """Another sequence gets a part, and is removed again; a third one's cells are forgotten."""
    llama_cpp.llama_memory_seq_cp(memory, 0, 1, 0, 500)
    llama_cpp.llama_memory_seq_keep(memory, 0)
    return 900


def nothing(memory: Any) -> int:
    return 900


# Each beside what it is compared with, after how many tokens: a cut alone changes what the next tokens see.
OPERATIONS: dict[str, tuple[Callable[[Any], int], Callable[[Any], int], int]] = {
    "remove the head": (remove(0, 200), nothing, 900),
    "remove the middle": (remove(200, 700), nothing, 900),
    "remove the tail": (remove(650, -1), remove(650, -1), 650),
    "copy and keep": (copy_and_keep, nothing, 900),
    "shift": (shift, remove(64, 400), 900),
    "divide": (divide, nothing, 900),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_a_sequence(folder: Path, kv_type: str, name: str) -> None:
    """The cache does no more harm to logits after an operation than before it, and tells the same positions as F16.

    XQuant has no window here: without a tail, it would read the newest tokens from codes where it otherwise does not.
    """

    def run(kv: str, operation: Callable[[Any], int], n: int) -> tuple[NDArray[np.float32], tuple[int, int]]:
        with Context(folder / "plain.gguf", kv, n_seq=2, overrides={"xquant.window": 0}) as context:
            context.decode(TOKENS[:n], 0)
            end = operation(context.memory)
            ends = (llama_cpp.llama_memory_seq_pos_min, llama_cpp.llama_memory_seq_pos_max)
            positions = tuple(f(context.memory, 0) for f in ends)
            return context.decode(TOKENS[900:950], end), (positions[0], positions[1])

    def harm(operation: Callable[[Any], int], n: int) -> float:
        (got, positions), (want, expected) = run(kv_type, operation, n), run("f16", operation, n)
        assert positions == expected
        return float(np.abs(got - want).mean())

    operation, other, n = OPERATIONS[name]
    assert harm(operation, 900) <= 1.3 * harm(other, n)  # measured: at most 1.23, q4_0; XQuant 1.18


def test_embeddings_as_input(folder: Path, kv_type: str) -> None:
    """What an image is to the cache: embeddings instead of tokens, which may see each other in both directions."""
    table = tiny_gguf.random_weights(tiny_gguf.Shape())["token_embd.weight"]
    with Context(folder / "plain.gguf", kv_type) as mixed, Context(folder / "plain.gguf", kv_type) as plain:
        for context in (mixed, plain):
            context.decode(TOKENS[:300], 0)
        mixed.decode_embeddings(table[TOKENS[300:400]], 300)
        plain.decode(TOKENS[300:400], 300)
        assert close(*(c.decode(TOKENS[400:450], 400) for c in (mixed, plain)))

    def rows(kv: str, causal: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The first half of what may see the other one, and tokens behind all of it."""
        with Context(folder / "plain.gguf", kv) as context:
            context.decode(TOKENS[:450], 0)
            llama_cpp.llama_set_causal_attn(context.ctx, causal)
            out = context.decode_embeddings(table[TOKENS[450:570]], 450)[:60]
            llama_cpp.llama_set_causal_attn(context.ctx, True)
            return out, context.decode(TOKENS[570:700], 570)

    both_ways, one_way, ours = rows("f16", False), rows("f16", True), rows(kv_type, False)
    # measured: 0.03 to 0.4 of what seeing later rows changes
    assert np.abs(ours[0] - both_ways[0]).mean() < 0.6 * np.abs(both_ways[0] - one_way[0]).mean()
    # and behind it, where every position sees what is before it again
    assert close(ours[1], both_ways[1])  # measured: at most 0.007


def test_models_and_contexts_in_any_order_and_from_several_threads(folder: Path, kv_type: str) -> None:
    paths = [folder / "plain.gguf", folder / "other.gguf"]
    contexts = [Context(paths[i % 2], kv_type, n_ctx=1024) for i in range(6)]
    logits: dict[int, NDArray[np.float32]] = {}

    def work(i: int) -> None:
        if i % 3 == 0:  # a context of the thread's own beside the given one
            with Context(paths[0], kv_type, n_ctx=512) as own:
                own.decode(TOKENS[:300], 0)
        contexts[i].decode(TOKENS[:500], 0)
        logits[i] = contexts[i].decode(TOKENS[500:520], 500)
        if i in (1, 2):
            contexts[i].close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2, 6):
        assert np.array_equal(logits[i], logits[i % 2])
    for i in (5, 0, 4, 3):
        contexts[i].close()


# Rows of the table in docs/operations.md, and the tests that each stands for; those of another file by their names.
TABLE: dict[str, list[Callable[..., None] | str]] = {
    "remove a head, middle or tail; copy, keep, shift and divide positions": [test_operations_on_a_sequence],
    "several sequences in a batch, one cache or one stream each": [test_several_sequences_in_one_batch],
    "a full cache is an error, and the context goes on": [test_a_full_cache_is_an_error_and_the_context_goes_on],
    "prefix reuse between calls, reset": [
        test_a_chat_reuses_its_prefix, test_a_reused_prefix_may_end_anywhere, test_reset_starts_afresh,
    ],
    "save and load: `save_state`, RAM and disk prompt caches": [
        test_a_saved_state_goes_on_as_it_would_have, test_prompt_caches,
    ],
    "speculative decoding: prompt lookup, a draft model with its own cache": [test_speculative_decoding],
    "embeddings, logits of all tokens, grammar, LoRA": [
        test_embeddings, test_logits_of_all_tokens, test_grammar, test_lora,
    ],
    "embeddings as input, attention in both directions": [test_embeddings_as_input],
    "prompts with images, by llama_cpp's handlers": ["test_images.test_a_question_about_an_image"],
    "several models and contexts, any order, several threads": [
        test_models_and_contexts_in_any_order_and_from_several_threads,
    ],
}  # fmt: skip
# What F16 cannot: test_robust.py.
OURS_ALONE = {"copy a part of a sequence between streams"}


def arguments(test: Callable[..., None] | str) -> set[str]:
    """Names of what a test asks for, here or in a file beside this one."""
    if not isinstance(test, str):
        return set(inspect.signature(test).parameters)
    file, name = test.split(".")
    tree = ast.parse(Path(__file__).with_name(f"{file}.py").read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return {argument.arg for argument in found.args.args}


def test_the_table_of_operations_says_what_is_tested() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    section = page.split("# Operations\n")[1].split("\n## ")[0]
    table = section[section.index("|") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0][1:] == ["F16", "q8_0", "q4_0", "XQuant"]
    assert {row[0] for row in rows[2:]} == TABLE.keys() | OURS_ALONE
    for name, *cells in rows[2:]:
        assert cells[3].startswith("yes")
        assert set(cells[:3]) == {"yes" if name in TABLE else "no, stops the process"}
    fixtures = [arguments(test) for tests in TABLE.values() for test in tests]
    assert all("kv_type" in names or "make" in names for names in fixtures)
