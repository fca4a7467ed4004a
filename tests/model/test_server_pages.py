"""llama-server over long texts: what clients do to each other's sealed pages, with an XQuant cache as with F16.

A random model has probabilities that depend on every page. They are compared behind each letter of an answer that a
grammar dictates, by the measure of how far those behind another text are.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from support import tiny_gguf
from support.llama_server import Server, needs_programs, running
from xquant_gguf import synthetic

pytestmark = needs_programs
N_SLOT = 2048
ANSWER = tiny_gguf.text(20, seed=9)
DICTATED: dict[str, Any] = {"grammar": f'root ::= "{ANSWER}"', "n_probs": tiny_gguf.N_VOCAB, "n_predict": len(ANSWER)}
# each letter is a token, and a byte: that one is forbidden, or a tie between them would decide what follows
DICTATED["logit_bias"] = [[len(synthetic.SPECIAL) + ord(letter), False] for letter in set(ANSWER)]
TEXTS = [tiny_gguf.text(n, seed=n) for n in (650, 700, 750, 800)]
Array = NDArray[np.float32]


@contextmanager
def serving(model: str, kv_type: str, folder: Path, *options: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "xquant_gguf", "server", model, "--kv-type", kv_type, "-t", "1", "-b", "128"]
    command += ["-ub", "128", "--no-webui", "--metrics", "--slots", *options]
    with running(command, folder) as server:
        yield server


@pytest.fixture(scope="module", params=["f16", "xquant", "xquant --kv-unified"])
def kind(request: pytest.FixtureRequest) -> list[str]:
    """A type of cache, and whether slots share one stream of it."""
    return str(request.param).split()


@pytest.fixture(scope="module")
def kv_type(kind: list[str]) -> str:
    return kind[0]


@pytest.fixture(scope="module")
def server(tiny: str, kind: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Four slots; what leaves them is forgotten."""
    kv_type, *more = kind
    folder = tmp_path_factory.mktemp(kv_type)
    options = ["-c", str(4 * N_SLOT), "-np", "4", "--cache-ram", "0", "--slot-save-path", str(folder), *more]
    with serving(tiny, kv_type, folder, *options) as it:
        yield it


def fresh(server: Server, prompt: Any, **body: Any) -> dict[str, Any]:
    """The dictated answer to a prompt of which nothing is in the cache."""
    answer = server.complete(prompt, cache_prompt=False, **{**DICTATED, **body})
    assert answer["timings"]["cache_n"] == 0
    return answer


def probabilities(answer: dict[str, Any]) -> Array:
    """Logarithms by letter of the answer and token."""
    places = answer["completion_probabilities"]
    out = np.zeros((len(places), tiny_gguf.N_VOCAB), np.float32)
    for row, place in zip(out, places, strict=True):
        for token in place["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    return out


@pytest.fixture(scope="module")
def alone(server: Server) -> list[Array]:
    """What each text gets when no other client is there."""
    return [probabilities(fresh(server, text)) for text in TEXTS]


def distance(a: Array, b: Array) -> float:
    return float(np.abs(a - b).mean())


def near(answer: dict[str, Any], want: Array, alone: list[Array]) -> bool:
    """Whether probabilities are within a tenth of the way to those behind another text."""
    got = probabilities(answer)
    return distance(got, want) < 0.1 * min(distance(a, b) for a, b in combinations(alone, 2))


def pages(server: Server, state: str) -> float:
    """How many are in a state, now."""
    time.sleep(1.1)  # the numbers may be a second old
    server.complete("a", n_predict=1, id_slot=3, cache_prompt=False)
    return server.metrics()[f"xquant_pages_{state}"]


def test_clients_get_what_they_get_alone(server: Server, alone: list[Array], kv_type: str) -> None:
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        answers = list(pool.map(lambda text: fresh(server, text), TEXTS))
    assert len({answer["id_slot"] for answer in answers}) == 4
    assert all(near(answer, want, alone) for answer, want in zip(answers, alone, strict=True))
    assert kv_type == "f16" or pages(server, "sealed") >= 2 * 3


def test_the_measure_sees_a_page(server: Server, alone: list[Array]) -> None:
    """One of other letters than a text's own, early in it."""
    assert not near(fresh(server, TEXTS[0][:128] + TEXTS[1][:128] + TEXTS[0][256:]), alone[0], alone)


def test_several_answers_to_one_prompt(server: Server, alone: list[Array]) -> None:
    """Their slots get copies of the prompt's pages."""
    response = server.post("/completion", prompt=TEXTS[1], temperature=0, n_cmpl=3, cache_prompt=False, **DICTATED)
    assert response.status_code == 200, response.text
    assert len(response.json()) == 3
    assert all(near(answer, alone[1], alone) for answer in response.json())


def test_a_client_leaves_within_its_prompt(server: Server, alone: list[Array]) -> None:
    """The slot is free soon, and what was computed of the prompt serves the next client."""
    text = tiny_gguf.text(2000, seed=8)
    want = probabilities(fresh(server, text, id_slot=0))
    fresh(server, "a", id_slot=0)
    body = {"prompt": text, "stream": True, "return_progress": True, "id_slot": 0, **DICTATED}
    with httpx.stream("POST", f"{server.url}/completion", json=body, timeout=60) as response:
        lines = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: "))
        assert any(line["prompt_progress"]["processed"] > 300 for line in lines)
    while server.get("/slots").json()[0]["is_processing"]:
        time.sleep(0.01)
    again = server.complete(text, id_slot=0, **DICTATED)
    assert 300 < again["timings"]["cache_n"] < 1900
    assert near(again, want, alone)


def test_pages_of_an_erased_slot_are_free(server: Server, alone: list[Array], kv_type: str) -> None:
    fresh(server, TEXTS[0], id_slot=1)
    held = pages(server, "free") if kv_type == "xquant" else 0
    assert server.post("/slots/1?action=erase").json()["n_erased"] > len(TEXTS[0])
    assert kv_type == "f16" or pages(server, "free") >= held + len(TEXTS[0]) // 128
    again = server.complete(TEXTS[0], id_slot=1, **DICTATED)
    assert again["timings"]["cache_n"] == 0
    assert near(again, alone[0], alone)


def test_a_saved_slot_whose_file_changed_is_refused(server: Server, alone: list[Array], kv_type: str) -> None:
    """And the slots stay as they are; the file as it was goes on where it ended."""
    if kv_type == "f16":
        pytest.skip("llama.cpp's own states have no checksum")
    fresh(server, TEXTS[0], id_slot=0)
    saved = server.post("/slots/0?action=save", filename="pages.bin").json()
    file = server.log_file.parent / "pages.bin"
    whole = file.read_bytes()
    fresh(server, TEXTS[1], id_slot=1)
    for place in (len(whole) // 3, len(whole) * 2 // 3, len(whole) - 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        assert server.post("/slots/1?action=restore", filename="pages.bin").status_code == 400
    assert near(server.complete(TEXTS[1], id_slot=1, **DICTATED), alone[1], alone)
    file.write_bytes(whole)
    assert server.post("/slots/1?action=restore", filename="pages.bin").json()["n_restored"] == saved["n_saved"]
    again = server.complete(TEXTS[0], id_slot=1, **DICTATED)
    assert again["timings"]["prompt_n"] == 1
    assert near(again, alone[0], alone)


def test_an_answer_ends_where_the_slot_does(server: Server, alone: list[Array]) -> None:
    """Without context shift; what is in the slot then is still there."""
    n_slot = server.get("/props").json()["default_generation_settings"]["n_ctx"]  # more where slots share a stream
    text = tiny_gguf.text(n_slot - 100, seed=7)
    want = probabilities(fresh(server, text, id_slot=2))
    answer = fresh(server, text, id_slot=2, n_predict=2 * n_slot, grammar="root ::= [a-z]+", n_probs=0)
    assert answer["tokens_evaluated"] + answer["tokens_predicted"] == n_slot
    assert answer["truncated"]
    assert answer["stop_type"] == "limit"
    again = server.complete(text, id_slot=2, **DICTATED)
    assert again["timings"]["prompt_n"] == 1
    assert near(again, want, alone)
    refused = server.post("/completion", prompt=2 * text, n_predict=1, id_slot=2)
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "exceed_context_size_error"


def test_a_draft_model_changes_nothing(tiny: str, server: Server, kv_type: str, tmp_path: Path) -> None:
    """Its tokens that are refused leave open pages, behind many sealed ones; where two tokens tie, it may decide."""
    shape = tiny_gguf.Shape()
    weights = tiny_gguf.random_weights(shape)
    weights["output.weight"] += 0.7 * tiny_gguf.random_weights(replace(shape, seed=1))["output.weight"]
    draft = str(tiny_gguf.write(tmp_path / "draft.gguf", shape, weights))
    options = ["-md", draft, "--spec-type", "draft-simple", "--spec-draft-n-max", "6"]
    options += ["-ctkd", kv_type, "-ctvd", kv_type]
    free: dict[str, Any] = {"grammar": "", "n_predict": 120, "n_probs": 0, "return_tokens": True, "ignore_eos": True}
    prompt = server.post("/tokenize", content=TEXTS[2], add_special=True).json()["tokens"]
    with serving(tiny, kv_type, tmp_path, "-c", str(N_SLOT), "-np", "1", *options) as speculating:
        got = fresh(speculating, prompt, **free)
    assert got["timings"]["draft_n"] - 20 > got["timings"]["draft_n_accepted"] > 20
    want = fresh(server, prompt, **free)["tokens"]
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(got["tokens"], want, strict=True)))
    if n < len(want):
        place = fresh(server, prompt + want[:n], grammar="", n_predict=1, n_probs=2)["completion_probabilities"][0]
        assert place["top_logprobs"][0]["logprob"] - place["top_logprobs"][1]["logprob"] < 0.05


@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
def test_texts_come_back(tiny: str, kv_type: str, tmp_path: Path) -> None:
    """Their pages as they were, when another text had the slot; and without their middle: what follows it moves down.

    Keys are then turned in their pages.
    """
    options = ["-c", str(N_SLOT), "-np", "1", "--cache-ram", "64", "--cache-reuse", "64"]
    with serving(tiny, kv_type, tmp_path, *options) as server:
        alone = [probabilities(fresh(server, text)) for text in TEXTS]
        again = server.complete(TEXTS[1], **DICTATED)
        assert again["timings"]["prompt_n"] == 1
        assert near(again, alone[1], alone)

        text = tiny_gguf.text(1500, seed=5)
        rest = text[:400] + text[900:]
        want = probabilities(fresh(server, rest))
        whole = fresh(server, text)
        assert not near(whole, want, alone)
        again = server.complete(rest, **DICTATED)
        assert again["timings"]["prompt_n"] == 1
        assert near(again, want, alone)
