"""Layers on a worker of llama.cpp's RPC: the same answers as on one machine, and nothing that ends the process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import llama_server, nodes, tiny_gguf, workers
from support.contexts import Context, Logits
from support.workers import Proxy, Stranger, Worker
from xquant_gguf import Llama, fork
from xquant_gguf.session import DecodeError

KV_TYPES = ("f16", "xquant")
SLOW = pytest.mark.skipif(not os.environ.get("XQUANT_SLOW"), reason="XQUANT_SLOW=1: it takes 40 seconds")
PROMPT = [3 + (7 * i * i + i) % 250 for i in range(450)]
# Largest difference of a logit over their standard deviation: the same kernels in the same order, but the operations
# that a scheduler puts on either side may be fused in other ways.  Measured: 0.
SAME = 1e-5


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with workers.running() as it:
        yield it


def greedy(context: Context, first: int, token: int, n: int) -> tuple[list[int], Logits]:
    """The next n tokens after one at a position, and the logits that chose them."""
    out, rows = [], []
    for i in range(n):
        row = context.decode([token], first + i)[-1]
        token = int(row.argmax())
        out.append(token)
        rows.append(row)
    return out, np.array(rows)


def both(path: Path, worker: Worker, kv_type: str, **options: Any) -> tuple[Context, Context]:
    """A context with all layers on the worker, and one with all here."""
    return (Context(path, kv_type, rpc_servers=worker.endpoint, **options), Context(path, kv_type, **options))


def difference(a: Logits, b: Logits) -> float:
    return float(np.abs(a - b).max() / b.std())


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("name", ["plain", "sliding"])
def test_the_same_tokens(paths: dict[str, Path], worker: Worker, name: str, kv_type: str) -> None:
    """Prompts in micro-batches of more and of fewer rows than a GPU unpacks pages for, then token by token."""
    there, here = both(paths[name], worker, kv_type, n_ctx=1024)
    with there, here:
        answers = []
        for context in (there, here):
            prompt = context.decode(PROMPT[:400], 0)[-1]
            short = context.decode(PROMPT[400:405], 400)[-1]
            tokens, logits = greedy(context, 405, 9, 150)
            answers.append((tokens, np.array([prompt, short, *logits])))
            if kv_type == "xquant":
                assert fork.info(context.ctx)["pages_sealed"] >= 2  # type: ignore[index]
                assert fork.info(context.ctx)["n_nonfinite"] == 0  # type: ignore[index]
        assert answers[0][0] == answers[1][0]
        assert difference(answers[0][1], answers[1][1]) < SAME


@pytest.mark.cuda
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_worker_with_a_gpu(paths: dict[str, Path], kv_type: str) -> None:
    """As with the GPU in this process: pages unpacked for a prompt, few rows, single tokens, a state, a shift."""
    with (
        workers.running(kind=workers.GPU) as far,
        Context(paths["plain"], kv_type, n_ctx=1024, rpc_servers=far.endpoint) as there,
        Context(paths["plain"], kv_type, n_ctx=1024, n_gpu_layers=99) as here,
    ):
        found = []
        for context in (there, here):
            rows = [context.decode(PROMPT[:400], 0)[-1], context.decode(PROMPT[400:405], 400)[-1]]
            rows += [context.decode([9 + i], 405 + i)[-1] for i in range(60)]
            state = context.save(0)
            context.session.clear()
            assert context.load(state, 0) == len(state)
            assert context.session.remove(0, 130, 170)
            context.session.shift(0, 170, -1, -40)
            rows.append(context.decode([5, 6, 7], 425)[-1])
            found.append(np.array(rows))
    print(f"{kv_type}: {difference(found[0], found[1]):.1e}")
    assert difference(found[0], found[1]) < SAME


@pytest.mark.parametrize("unified", [True, False])
def test_many_sequences(paths: dict[str, Path], worker: Worker, unified: bool) -> None:
    """Rows grow into larger tensors, sequences are copied, also between streams."""
    there, here = both(paths["plain"], worker, "xquant", n_ctx=2048, n_seq=3, unified=unified)
    with there, here:
        found = []
        for context in (there, here):
            rows = [context.decode(PROMPT[:300], 0, (0,))[-1], context.decode(PROMPT[50:350], 0, (1,))[-1]]
            context.session.copy(0, 2, -1, -1)
            rows += [context.decode([5, 6, 7], 300, (s,))[-1] for s in range(3)]
            found.append(np.array(rows))
        assert difference(found[0], found[1]) < SAME


def test_the_cache_lies_on_the_worker(
    paths: dict[str, Path], worker: Worker, capfd: pytest.CaptureFixture[str]
) -> None:
    llm = Llama(str(paths["plain"]), kv_type="xquant", n_ctx=1024, rpc_servers=worker.endpoint)
    lines = [line for line in capfd.readouterr().err.splitlines() if "xquant: " in line and " KV " in line]
    llm.close()
    assert len(lines) == 2, lines  # blocks, rows
    assert all(f"RPC0[{worker.endpoint}]" in line and "4 layers" in line for line in lines)


def test_no_more_bytes_than_with_f16(paths: dict[str, Path], worker: Worker) -> None:
    """A token, on average over two pages, with what seals them."""
    counts = {}
    for kv_type in KV_TYPES:
        with Proxy(worker.endpoint) as proxy, Context(
            paths["plain"], kv_type, n_ctx=1024, rpc_servers=proxy.endpoint
        ) as context:  # fmt: skip
            context.decode(PROMPT[:384], 0)
            before = proxy.n_bytes
            greedy(context, 384, 9, 256)
            counts[kv_type] = (proxy.n_bytes - before) / 256
    print(f"bytes a token: {counts}")
    assert counts["xquant"] <= counts["f16"]


@pytest.mark.parametrize("sequence", [None, 0])
def test_states_go_both_ways(paths: dict[str, Path], worker: Worker, sequence: int | None) -> None:
    """Saved with the cache on a worker and loaded here, and back: what was saved, and the same tokens."""
    there, here = both(paths["plain"], worker, "xquant", n_ctx=1024)
    with there, here:
        there.decode(PROMPT, 0)
        state = there.save(sequence)
        want, _ = greedy(there, len(PROMPT), 9, 20)
        assert here.load(state, sequence) == len(state)
        assert here.save(sequence) == state
        assert greedy(here, len(PROMPT), 9, 20)[0] == want
        state = here.save(sequence)
        there.session.clear()
        assert there.load(state, sequence) == len(state)
        assert there.save(sequence) == state
        goes_on = [greedy(context, len(PROMPT) + 20, want[-1], 20)[0] for context in (there, here)]
        assert goes_on[0] == goes_on[1]


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_context_shift(paths: dict[str, Path], worker: Worker, kv_type: str) -> None:
    there, here = both(paths["plain"], worker, kv_type, n_ctx=512)
    with there, here:
        found = []
        for context in (there, here):
            context.decode(PROMPT, 0)
            context.session.remove(0, 20, 220)
            context.session.shift(0, 220, -1, -200)
            found.append(greedy(context, len(PROMPT) - 200, 9, 30))
        assert found[0][0] == found[1][0]
        assert difference(found[0][1], found[1][1]) < SAME


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_killed_worker_is_an_error(paths: dict[str, Path], kv_type: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Of the call, which names it; everything else goes on, and a new worker at its place is one like any other."""
    with workers.running() as worker:
        context = Context(paths["plain"], kv_type, n_ctx=1024, rpc_servers=worker.endpoint)
        context.decode(PROMPT, 0)
        worker.kill()
        for position in (450, 451):
            with pytest.raises(DecodeError, match="llama_decode: -3"):
                context.decode([9], position)
        with pytest.raises(RuntimeError, match=f"the worker at {worker.endpoint} is lost"):
            context.save()
    assert f"the worker at {worker.endpoint} is lost" in capfd.readouterr().err
    with pytest.raises(ValueError, match=f"no worker answers at {worker.endpoint}"):
        Context(paths["plain"], kv_type, rpc_servers=worker.endpoint)
    with workers.running(worker.endpoint), Context(paths["plain"], kv_type, rpc_servers=worker.endpoint) as again:
        with Context(paths["plain"], kv_type) as here:
            assert greedy(again, 0, 9, 5)[0] == greedy(here, 0, 9, 5)[0]
        with pytest.raises(DecodeError, match="llama_decode: -3"):
            context.decode([9], 452)
    context.close()


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_worker_that_dies_at_work(tmp_path: Path, kv_type: str) -> None:
    """In the middle of a graph, whose answer is waited for."""
    shape = tiny_gguf.Shape(n_layer=8, n_embd=512, n_ff=2048, n_head=8)
    path = tiny_gguf.write(tmp_path / "large.gguf", shape, tiny_gguf.random_weights(shape))
    options: dict[str, Any] = {"n_ctx": 4096, "n_ubatch": 2048}
    with workers.running() as worker, Context(path, kv_type, rpc_servers=worker.endpoint, **options) as context:
        context.decode(PROMPT[:10], 0)
        timer = threading.Timer(0.5, worker.kill)
        timer.start()
        start = time.monotonic()
        with pytest.raises(DecodeError, match="llama_decode: -3"):
            context.decode((PROMPT * 10)[:4000], 10)
        assert time.monotonic() - start > 0.4, "it was done too soon"
        timer.join()


def test_python_says_which_worker(paths: dict[str, Path]) -> None:
    with workers.running() as worker:
        llm = Llama(str(paths["plain"]), kv_type="xquant", n_ctx=512, verbose=False, rpc_servers=[worker.endpoint])
        llm.eval(PROMPT[:100])
        worker.kill()
        with pytest.raises(RuntimeError, match=f"llama_decode returned -3.*the worker at {worker.endpoint} is lost"):
            llm.eval([9])
        with pytest.raises(RuntimeError, match=f"the worker at {worker.endpoint} is lost"):
            llm.save_state()
        llm.close()


def test_workers_of_other_versions_are_refused(paths: dict[str, Path], worker: Worker) -> None:
    """llama.cpp's own says nothing of our operations; F16 needs none."""
    # 77: of llama.cpp's, whose operations have other numbers
    for at, said, reason in ((3, 0, "has no XQuant"), (3, 0x7E, "is of another version of xq"), (2, 77, "has no XQ")):
        with Proxy(worker.endpoint, workers.says(at, said)) as proxy:
            with pytest.raises(ValueError, match=f"the worker at {proxy.endpoint} {reason}"):
                Llama(str(paths["plain"]), kv_type="xquant", n_ctx=512, verbose=False, rpc_servers=proxy.endpoint)
            with Context(paths["plain"], "f16", rpc_servers=proxy.endpoint) as context:
                context.decode(PROMPT[:10], 0)
    with Proxy(worker.endpoint, workers.says(0, 1)) as proxy, pytest.raises(ValueError, match="another version"):
        Llama(str(paths["plain"]), rpc_servers=proxy.endpoint, verbose=False)


@pytest.mark.parametrize("servers", ["", "localhost", "localhost:x", "localhost:0", "a:1,,b:2", []])
def test_what_is_no_endpoint(paths: dict[str, Path], servers: Any) -> None:
    with pytest.raises(ValueError, match="rpc_servers"):
        Llama(str(paths["plain"]), rpc_servers=servers)


def test_hostile_graphs_leave_a_worker_alive(worker: Worker) -> None:
    """A node that is not true of its tensors ends the connection, no more; so does a client that just goes away."""
    with Stranger(worker.endpoint) as client:
        buffer, base = client.alloc(1 << 20)
        ones = (1, 1, 1, 1)
        small = [workers.rpc_tensor(i, nodes.F32, ones, (4, 4, 4, 4), buffer, base + 64 * i) for i in range(1, 9)]
        node = workers.rpc_tensor(
            99, nodes.F32, ones, (4, 4, 4, 4), buffer, base, nodes.operation("ATTEND"), b"\xff" * 64, range(1, 9)
        )
        client.send(client.GRAPH, workers.graph(99, [node, *small]))
        assert not client.is_answered()
    for ne, data in (((1, 1, 1, 1), 1 << 62), ((2**31, 1, 1, 1), 0), ((1 << 18, 1, 1, 1), 4096)):
        with Stranger(worker.endpoint) as client:
            buffer, base = client.alloc(1 << 20)
            tensor = workers.rpc_tensor(9, nodes.F32, ne, (4, 4, 4, 4), buffer, base + data)
            client.send(client.GRAPH, workers.graph(9, [tensor]))
            assert not client.is_answered()
    with Stranger(worker.endpoint) as client:
        buffer, base = client.alloc(1 << 24)
        wanted = workers.rpc_tensor(9, nodes.I8, (1 << 24, 1, 1, 1), (1, 1 << 24, 1 << 24, 1 << 24), buffer, base)
        for _ in range(20):  # its answers find nobody
            client.send(8, wanted + (0).to_bytes(8, "little") + (1 << 24).to_bytes(8, "little"))
    with Stranger(worker.endpoint) as client:
        assert client.is_answered()
    assert worker.process.poll() is None


@llama_server.needs_programs
def test_llama_server_outlives_its_worker(smollm2: str, tmp_path: Path) -> None:
    options = ["-ngl", "99", "-c", "512", "-t", "1", "--no-webui", "--no-warmup"]
    with workers.running() as worker:
        command = [sys.executable, "-m", "xquant_gguf", "server", smollm2, *options, "--rpc", worker.endpoint]
        with llama_server.running(command, tmp_path) as server:
            answer = server.complete("The capital of France is", n_predict=8)
            assert "Paris" in answer["content"]
            worker.kill()
            response = server.post("/completion", prompt="The capital of Spain is", n_predict=8)
            assert response.status_code == 500, response.text
            assert server.get("/health").status_code == 200
            assert f"the worker at {worker.endpoint} is lost" in server.log
    endpoint = f"127.0.0.1:{workers.free_port()}"
    command = [sys.executable, "-m", "xquant_gguf", "server", smollm2, *options, "--rpc", endpoint]
    refused = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert refused.returncode == 1
    assert f"no RPC worker answers at {endpoint}" in refused.stderr


# ---- three machines ----

CLIENT = """
import sys
from pathlib import Path
from xquant_gguf import Llama
path, kv_type, servers = sys.argv[1:]
llm = Llama(path, kv_type=kv_type, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False,
            rpc_servers=servers or None)
llm.eval(llm.tokenize(Path(sys.argv[0]).with_name("text").read_bytes())[:300])
interfaces = [p for p in Path("/sys/class/net").iterdir() if p.name != "lo"]
count = lambda: sum(int((p / "statistics" / f"{d}_bytes").read_text()) for p in interfaces for d in ("rx", "tx"))
before, tokens = count(), []
for _ in range(200):
    tokens.append(llm.sample(temp=0.0))
    llm.eval(tokens[-1:])
print(tokens)
print(count() - before)
"""


@pytest.fixture
def network() -> Iterator[dict[str, str]]:
    """Three hosts of a network, by the names of their namespaces: their addresses."""
    names = {f"xq{i}": f"10.77.0.{i}" for i in (1, 2, 3)}

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("netns", "add", "xqbridge")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs root and the command ip")
    try:
        ip("-n", "xqbridge", "link", "add", "bridge", "type", "bridge")
        ip("-n", "xqbridge", "link", "set", "bridge", "up")
        for name, address in names.items():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "add", "eth", "type", "veth", "peer", name, "netns", "xqbridge")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth")
            ip("-n", name, "link", "set", "eth", "up")
            ip("-n", "xqbridge", "link", "set", name, "master", "bridge")
            ip("-n", "xqbridge", "link", "set", name, "up")
        yield names
    finally:
        for name in (*names, "xqbridge"):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@SLOW
def test_three_machines(network: dict[str, str], smollm2: str, prose: str, tmp_path: Path) -> None:
    """Half of a real model's layers on each of two workers: tokens as on one machine, and bytes as with F16."""
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    (tmp_path / "text").write_text(prose)
    client, *others = network
    endpoints = [f"{network[name]}:50052" for name in others]

    def ask(kv_type: str, servers: str) -> tuple[str, int]:
        command = ["ip", "netns", "exec", client, sys.executable, str(script), smollm2, kv_type, servers]
        done = subprocess.run(command, env=workers.ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        tokens, n_bytes = done.stdout.splitlines()
        return tokens, int(n_bytes)

    prefixes = [["ip", "netns", "exec", name] for name in others]
    with workers.running(endpoints[0], prefix=prefixes[0]), workers.running(endpoints[1], prefix=prefixes[1]):
        there = {kv_type: ask(kv_type, ",".join(endpoints)) for kv_type in KV_TYPES}
    here = {kv_type: ask(kv_type, "") for kv_type in KV_TYPES}
    print({kv_type: n / 200 for kv_type, (_, n) in there.items()})
    for kv_type in KV_TYPES:
        assert there[kv_type][0] == here[kv_type][0]
    assert there["xquant"][1] <= there["f16"][1]


GONE = """
import sys, time
from xquant_gguf import Llama
path, endpoint = sys.argv[1:]
llm = Llama(path, kv_type="xquant", n_ctx=512, verbose=False, rpc_servers=endpoint)
llm.eval(list(range(3, 103)))
print("ready", flush=True)
sys.stdin.readline()
start = time.monotonic()
try:
    llm.eval([9])
except RuntimeError as error:
    print(error)
print(time.monotonic() - start)
"""


@SLOW
def test_a_machine_that_is_gone(network: dict[str, str], paths: dict[str, Path], tmp_path: Path) -> None:
    """Nothing says that a cable is cut: after 40 seconds of silence the call fails."""
    script = tmp_path / "client.py"
    script.write_text(GONE)
    client, other, _ = network
    endpoint = f"{network[other]}:50052"
    command = ["ip", "netns", "exec", client, sys.executable, str(script), str(paths["plain"]), endpoint]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with workers.running(endpoint, prefix=["ip", "netns", "exec", other]):
        with subprocess.Popen(command, env=workers.ENVIRONMENT, **pipes) as process:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            subprocess.run(["ip", "-n", "xqbridge", "link", "set", other, "down"], check=True)
            said, _ = process.communicate("\n", timeout=300)
        assert process.returncode == 0
        error, seconds = said.splitlines()
        assert f"the worker at {endpoint} is lost" in error
        assert 30 < float(seconds) < 100
