"""xquant-gguf serve on a free port: the official client, curl's requests, several clients at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from llama_cpp.server.settings import ServerSettings

from support import tiny_gguf, workers
from xquant_gguf import cli, serve

TALK = [{"role": "user", "content": "What is the capital of France?"}]


@contextmanager
def serving(model: str, folder: Path, *options: str, **env: str) -> Iterator[tuple[str, Path]]:
    """The address of a server of its own, and its log."""
    port = workers.free_port()
    log, url = folder / "log", f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "xquant_gguf", "serve", model, *options, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--n_batch", "128", "--n_ubatch=128", "--verbose", "false"]
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, env={**os.environ, **env}) as server,
    ):
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    httpx.get(f"{url}/v1/models")
                    break
                except httpx.ConnectError:
                    assert server.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.2)
            yield url, log
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def url(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = ["--kv-type", "xquant", "--n-ctx", "1024", "--model-alias", "small"]
    with serving(smollm2, tmp_path_factory.mktemp("serve"), *options) as (address, log):
        assert '"preset": "xquant", "equivalent_bits": 3.0, "true_bits": 3.25' in log.read_text()
        yield address


def say(words: str) -> dict[str, object]:
    """What leaves the model only one answer, so that a test knows it: a small model says this, or that."""
    return {"grammar": f'root ::= "{words}"', "max_tokens": 30, "temperature": 0}


def test_the_official_client_streams(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        grammar = {"grammar": say(" Paris, of course.")["grammar"]}
        stream = client.chat.completions.create(
            model="small", messages=TALK, max_tokens=30, stream=True, extra_body=grammar
        )
        parts = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert len(parts) > 4
        assert "".join(parts) == " Paris, of course."
        whole = client.chat.completions.create(model="small", messages=TALK, max_tokens=30, extra_body=grammar)
        assert whole.choices[0].message.content == " Paris, of course."


def test_curl_streams(url: str) -> None:
    body = {"prompt": "One two three four", "stream": True, **say(" five six seven")}
    command = ["curl", "-sN", "-H", "Content-Type: application/json", "-d", json.dumps(body), f"{url}/v1/completions"]
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    lines = [line for line in out.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])
    assert len(lines) > 3
    assert text == " five six seven"


def test_several_clients_at_once(url: str) -> None:
    def ask(city: str) -> str:
        body = {"messages": TALK, **say(city), "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
        return "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines)

    cities = ["Berlin", "Madrid", "Tokyo", "Cairo", "Kyiv", "Lima"]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, cities)) == cities


def test_the_cache_is_told(url: str) -> None:
    info = httpx.get(f"{url}/extras/kv_cache").json()
    assert info["model"] == "small"
    assert info["preset"] == "xquant"
    assert 0 < info["bytes_used"] <= info["bytes_allocated"]
    assert info["pages_open"] + info["pages_sealed"] + info["pages_free"] == 8


def test_asking_for_the_cache_ends_no_answer(smollm2: str, tmp_path: Path) -> None:
    """Nor does any other request, unless --interrupt-requests is true, which is llama_cpp's default.

    $HOST, which some compilers' environments set to something else, does not count beside --host.
    """
    body = {"prompt": "One two three", "max_tokens": 80, "stream": True, "temperature": 0}
    body["logit_bias"] = {"0": -100, "2": -100}  # no end of text
    with serving(smollm2, tmp_path, "--n-ctx", "1024", HOST="x86_64-conda-linux-gnu") as (address, _):
        used = [httpx.get(f"{address}/extras/kv_cache").json()["bytes_used"]]
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=120) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: "))
            told = [next(lines)]
            used.append(httpx.get(f"{address}/extras/kv_cache").json()["bytes_used"])
            told += lines
        used.append(httpx.get(f"{address}/extras/kv_cache").json()["bytes_used"])
    assert told[-1] == "data: [DONE]"
    assert len(told) > 80
    assert used[0] < used[1] <= used[2]


def test_a_grammar_that_is_none_is_the_clients_error(url: str) -> None:
    for grammar in ("root ::= [", 'other ::= "a"'):
        for path, prompt in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": TALK})):
            body = {**prompt, "grammar": grammar, "max_tokens": 3}
            response = httpx.post(f"{url}/v1/{path}", json=body, timeout=60)
            assert response.status_code == 400, response.text
            assert "the grammar cannot be parsed" in response.text
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=60).status_code == 200


def test_models_that_cannot_have_our_cache_are_served_with_f16(tmp_path: Path, smollm2: str) -> None:
    """With a warning, before anything is asked; a cache that was asked for stays."""
    shape = tiny_gguf.Shape(key_length=40, value_length=40)
    path = str(tiny_gguf.write(tmp_path / "odd.gguf", shape, tiny_gguf.random_weights(shape)))
    models = [serve.Model(model=path), serve.Model(model=smollm2), serve.Model(model=smollm2, kv_type="q8_0")]
    with pytest.warns(UserWarning, match="odd.gguf.* it is served with an F16 cache"):
        serve.application(ServerSettings(), models)
    assert [model.kv_type for model in models] == ["f16", "xquant", "q8_0"]


def test_options_go_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOST", "x86_64-conda-linux-gnu")
    monkeypatch.setenv("PORT", "99")
    server, _ = serve.settings_of(["model.gguf", "--host", "127.0.0.1"])
    assert (server.host, server.port) == ("127.0.0.1", 99)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"host": "127.0.0.2", "models": [{"model": "a.gguf"}]}))
    server, _ = serve.settings_of(["--config-file", str(path)])
    assert (server.host, server.port) == ("127.0.0.2", 99)


def test_workers_are_handed_on(paths: dict[str, Path]) -> None:
    """All layers go to them, where nothing else is said."""
    settings = {"model": str(paths["plain"]), "kv_type": "xquant", "n_ctx": 512, "verbose": False}
    with workers.running() as worker, workers.Proxy(worker.endpoint) as proxy:
        serve.application(ServerSettings(), [serve.Model(**settings, rpc_servers=proxy.endpoint)])
        assert proxy.n_bytes > 0.6 * paths["plain"].stat().st_size
    with pytest.raises(ValueError, match=f"no worker answers at {proxy.endpoint}"):
        serve.application(ServerSettings(), [serve.Model(**settings, rpc_servers=proxy.endpoint)])


def test_configuration_files_name_caches(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    models = [{"model": "a.gguf", "kv_type": "xquant-small"}, {"model": "b.gguf", "kv_plan": "plan.json", "n_ctx": 99}]
    path.write_text(json.dumps({"port": 77, "models": models}))
    server, (a, b) = serve.settings_of(["--config-file", str(path)])
    assert server.port == 77
    assert (a.kv_type, b.kv_plan, b.n_ctx) == ("xquant-small", "plan.json", 99)


def test_options_are_those_of_llama_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    for name in (
        "--kv_type",
        "--kv_plan",
        "--n_ctx",
        "--cache_type",
        "--draft_model",
        "--ssl_keyfile",
        "--config_file",
    ):
        assert name in text
    assert cli.main(["serve"]) == 1
    assert "name a model, or a --config_file" in capsys.readouterr().err
    assert cli.main(["serve", "missing.gguf", "--kv-type", "q7"]) == 1
    assert "kv_type is 'q7', must be one of xquant" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", "x.gguf", "--port", "1"])


def test_without_the_extra_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(\"No module named 'uvicorn'\", name='uvicorn')")
    command = [sys.executable, "-m", "xquant_gguf", "serve", "x.gguf"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert out.returncode == 1
    assert "serve needs uvicorn, which is not there: pip install 'xquant-gguf[server]'" in out.stderr
