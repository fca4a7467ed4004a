"""xquant-gguf server: llama-server with an XQuant cache does what it does with F16."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from support.llama_server import Server, needs_programs, running
from xquant_gguf import Llama, codec, fork
from xquant_gguf.plan import Plan, Shape

pytestmark = needs_programs
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
        },
    },
}
CITIES = ["Berlin", "Madrid", "Tokyo", "Cairo", "Kyiv", "Lima"]


def fork_plan(model: str) -> tuple[Plan, list[Shape], list[int]]:
    """The plan that a cache follows where nothing says which."""
    llm = Llama(model, kv_type="xquant", n_ctx=512, verbose=False)
    found = fork.plan(llm.ctx, "xquant")
    llm.close()
    assert found is not None
    return found


@pytest.fixture(scope="module", params=["f16", "xquant"])
def server(request: pytest.FixtureRequest, smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Four slots of 1,024 tokens each."""
    folder = tmp_path_factory.mktemp(request.param)
    options = ["-c", "4096", "-np", "4", "-t", "1", "-b", "128", "-ub", "128", "--no-webui", "--metrics"]
    options += ["--slot-save-path", str(folder), "--context-shift", "--kv-type", request.param]
    with running([sys.executable, "-m", "xquant_gguf", "server", smollm2, *options], folder) as it:
        assert ("xquant" in it.get("/props").json()) == (request.param == "xquant")
        yield it


def test_several_clients_at_once(server: Server, prose: str) -> None:
    """More than there are slots, each behind a text of its own that the cache has sealed."""
    pieces = [prose[1200 * i : 1200 * i + 2500] for i in range(len(CITIES))]

    def ask(i: int) -> str:
        answer = server.complete(pieces[i], n_predict=30, grammar=f'root ::= "{CITIES[i]}"')
        assert answer["tokens_evaluated"] > 400
        return str(answer["content"])

    with ThreadPoolExecutor(len(CITIES)) as pool:
        assert list(pool.map(ask, range(len(CITIES)))) == CITIES


def test_the_official_client_streams(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=30,
            stream=True,
            extra_body={"grammar": 'root ::= "Paris, of course."'},
        )
        parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len([part for part in parts if part]) > 2
    assert "".join(parts) == "Paris, of course."


def test_slots_are_saved_and_restored(server: Server, prose: str) -> None:
    """What was saved goes on as it would have, in another slot, and only the new tokens are computed."""
    text = prose[4000:6500]
    first = server.complete(text, n_predict=8, id_slot=0, cache_prompt=True)
    n = first["tokens_evaluated"]
    assert n > 400
    saved = server.post("/slots/0?action=save", filename="talk.bin")
    assert saved.status_code == 200, saved.text
    goes_on = server.complete(text + first["content"], n_predict=8, id_slot=0, cache_prompt=True)
    assert server.post("/slots/0?action=erase").status_code == 200

    restored = server.post("/slots/1?action=restore", filename="talk.bin")
    assert restored.status_code == 200, restored.text
    assert restored.json()["n_restored"] == saved.json()["n_saved"]
    again = server.complete(text + first["content"], n_predict=8, id_slot=1, cache_prompt=True)
    assert again["timings"]["prompt_n"] <= 8
    assert again["content"] == goes_on["content"]


def test_a_damaged_slot_file_is_an_error(server: Server, prose: str) -> None:
    """Of the request alone: what the slot held goes on."""
    text = prose[:2500]
    server.complete(text, n_predict=1, id_slot=2, cache_prompt=True)
    assert server.post("/slots/2?action=save", filename="damaged.bin").status_code == 200
    file = server.log_file.parent / "damaged.bin"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert server.post("/slots/3?action=restore", filename="damaged.bin").status_code == 400
    assert server.complete(text, n_predict=1, id_slot=2, cache_prompt=True)["timings"]["prompt_n"] <= 4


def test_the_context_shifts(server: Server, prose: str) -> None:
    """Past its end a slot forgets what is old, and goes on."""
    answer = server.complete(prose[:4150], n_predict=100, ignore_eos=True)
    assert 1024 > answer["tokens_evaluated"] > 1024 - 100
    assert answer["tokens_predicted"] == 100
    assert answer["truncated"]


def test_metrics_count(server: Server) -> None:
    before = server.metrics()
    server.complete("One two three four five", n_predict=7, ignore_eos=True, cache_prompt=False)
    after = server.metrics()
    assert after["tokens_predicted_total"] - before["tokens_predicted_total"] == 7
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == 5
    assert after["requests_processing"] == 0


def test_the_cache_is_told(smollm2: str, server: Server, prose: str) -> None:
    """Its pages and bytes in /metrics, its plan in /props; of other caches neither."""
    server.complete(prose[:3500], n_predict=1, id_slot=0)
    time.sleep(1.1)  # the numbers may be a second old
    server.complete("One", n_predict=1, id_slot=1)
    found, props = server.metrics(), server.get("/props").json()
    if "xquant" not in props:  # as the fixture has seen: F16
        assert not [name for name in found if name.startswith("xquant_")]
        return
    plan, shapes, layers = fork_plan(smollm2)
    assert found["xquant_pages_sealed"] > 3
    # four streams of 1,024 tokens
    assert sum(found[f"xquant_pages_{state}"] for state in ("open", "sealed", "free")) == 4 * 8
    assert 0 < found["xquant_bytes_used"] <= found["xquant_bytes_allocated"]
    assert found["xquant_bytes_allocated"] == pytest.approx(props["xquant"]["bytes"], rel=1e-5)  # written in 6 digits
    assert found["xquant_nonfinite"] == 0
    assert props["xquant"]["window"] == plan.window
    assert props["xquant"]["kernels"] == codec.kernels()
    bits = [{"layer": i, "k_bits": x.k.bits, "v_bits": x.v.bits} for i, x in zip(layers, plan.layers, strict=True)]
    assert props["xquant"]["layers"] == bits
    assert len(shapes) == 30


def test_numbers_are_read_while_others_decode(server: Server, prose: str) -> None:
    """Forty requests for metrics beside four texts: every answer is whole."""
    with ThreadPoolExecutor(6) as pool:
        texts = [pool.submit(server.complete, prose[i * 700 : i * 700 + 1500], n_predict=20) for i in range(4)]
        reads = [pool.submit(server.metrics) for _ in range(40)]
        assert all("tokens_predicted_total" in read.result() for read in reads)
        assert all(text.result()["tokens_predicted"] > 0 for text in texts)


def test_a_wrong_request_is_the_clients_error(server: Server) -> None:
    """An exception of one library that another catches; the server goes on."""
    for body in ({"grammar": "root ::= ["}, {"n_predict": "many"}, {"json_schema": {"type": "no such type"}}):
        assert server.post("/completion", prompt="a", **body).status_code == 400, body
    assert server.complete("a", n_predict=1)["tokens_predicted"] == 1


def test_a_preset_is_named(smollm2: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xquant_gguf", "server", smollm2, "--kv-type", "xquant-tiny", "-c", "2048"]
    with running([*command, "--no-webui", "-t", "1"], tmp_path) as it:
        assert it.complete("One two three four", n_predict=1)["tokens_predicted"] == 1
        assert {layer["k_bits"] for layer in it.get("/props").json()["xquant"]["layers"]} == {2}


def asked_before() -> list[dict[str, Any]]:
    """Two questions for which the tool was called, and a third."""
    talk: list[dict[str, Any]] = []
    for i, city in enumerate(CITIES[:2]):
        call = {"name": "weather", "arguments": json.dumps({"city": city, "unit": "C"})}
        talk.append({"role": "user", "content": f"What is the weather in {city}?"})
        talk.append({"role": "assistant", "tool_calls": [{"id": f"call{i}", "type": "function", "function": call}]})
        talk.append({"role": "tool", "tool_call_id": f"call{i}", "content": "Rain, 12 C"})
        talk.append({"role": "assistant", "content": f"It rains in {city}."})
    return [*talk, {"role": "user", "content": "What is the weather in Tokyo?"}]


@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
def test_a_required_tool_is_called(smollm2: str, tmp_path: Path, kv_type: str) -> None:
    """Whole and streamed, with arguments as its schema wants them.

    SmolLM2's own template leaves tools out, and llama-server then ignores tool_choice; ours names them. Before a call
    that is required llama-server lets a model talk: one that saw calls before does not.
    """
    template = Path(__file__).parents[1] / "support" / "tools.jinja"
    options = ["-c", "2048", "-np", "1", "-t", "1", "--no-webui", "--chat-template-file", str(template)]
    command = [sys.executable, "-m", "xquant_gguf", "server", smollm2, "--kv-type", kv_type, *options]
    with running(command, tmp_path) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        request: Any = {"model": "any", "messages": asked_before(), "tools": [WEATHER], "temperature": 0}
        request |= {"tool_choice": "required", "max_tokens": 100}
        (choice,) = client.chat.completions.create(**request).choices
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert call.function.name == "weather"
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == {"city", "unit"}
        assert arguments["unit"] in ("C", "F")

        name, streamed, parts = "", "", 0
        for chunk in client.chat.completions.create(**request, stream=True):
            for delta in chunk.choices[0].delta.tool_calls or ():
                name += delta.function.name or ""
                streamed += delta.function.arguments or ""
                parts += 1
        assert (name, json.loads(streamed)) == ("weather", arguments)
        assert parts > 2
