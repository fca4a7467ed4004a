"""llama.cpp's own tests of states, threads and recurrent models against the fork: what F16 passes, XQuant passes.

The programs are built once from the pinned source (tests/upstream), of which nothing is kept here. Each runs with an
F16 cache and with XQuant, as it comes and with plans that seal pages as early as they can, on random models that
llama.cpp's own generator writes, one for each kind of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from support import tiny_gguf, upstream

# one name a kind: plain, experts, biases, windows (iSWA), windows with sinks, ALiBi
PLAIN = ("llama-dense", "llama-moe", "qwen2-dense", "gemma3-dense", "gpt-oss-moe", "bloom-dense")
# a name for each kind of recurrent layer that llama.cpp can roll back: convolution, Mamba2, delta net
HYBRID = ("lfm2-dense", "nemotron_h-dense", "qwen35-dense")

XQUANT = ("-ctk", "xquant", "-ctv", "xquant")
TYPES: dict[str, tuple[str, ...]] = {
    "f16": ("-ctk", "f16", "-ctv", "f16"),
    "xquant": XQUANT,
    "sealed": (*XQUANT, "--override-kv", "xquant.window=int:0", "--override-kv", "xquant.pinned=int:0"),
}
# what makes pages enough that some are sealed, by program
LONG = {
    "test-save-load-state": ("-c", "1024", "-b", "500", "-ub", "128"),
    "test-state-restore-fragmented": ("-c", "512", "-ub", "32", "-np", "6"),
    "test-thread-safety": ("-c", "1024", "-ub", "32", "-np", "4", "-t", "2", "-n", "150", "-p", tiny_gguf.text(400)),
}
CASES = ("f16", "f16-long", "xquant", "sealed-long")
Programs = Callable[..., upstream.Run]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Runs program(name, model, case, more arguments), once for each combination."""
    built = upstream.build(upstream.ROOT / "build" / "upstream")
    folder = tmp_path_factory.mktemp("upstream")
    upstream.make_models(folder, PLAIN + HYBRID)
    tiny = tiny_gguf.MODELS["plain"]
    tiny_gguf.write(folder / "tiny.gguf", tiny, tiny_gguf.random_weights(tiny))

    @cache
    def program(name: str, model: str, case: str, *arguments: str) -> upstream.Run:
        kind, *long = case.split("-")
        options = ("-m", f"{folder / model}.gguf", *TYPES[kind], *(LONG[name] if long else arguments))
        run = upstream.run(built / name, ("-t", "1", *options), folder)
        # not assertions: a test that is expected to fail must not pass for one of these
        if run.status < 0:
            raise RuntimeError(f"ended by signal {-run.status}:\n{run.text[-4000:]}")
        if not run.refused and bool(run.sealed) != (kind != "f16"):
            raise RuntimeError(f"another cache than {kind} ran:\n{run.text[-4000:]}")
        if kind == "sealed" and max(run.sealed) < 2:
            raise RuntimeError(f"too few pages were sealed: {run.sealed}")
        return run

    return program


# ---- states ----

PARTS = {
    1: "decode and save",
    2: "a sequence removed beside another",
    3: "load a file",
    4: "copy through host memory",
    5: "copy on the device",
    6: "restore into scattered cells",
    7: "restore into scattered cells on the device",
    8: "a round trip changes no byte",
    9: "a damaged state is refused",
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("case", CASES)
def test_save_load_state(programs: Programs, case: str, part: int) -> None:
    for model in PLAIN:
        run = programs("test-save-load-state", model, case)
        # the first part says nothing when it passes, but the third to fifth run only then
        passed = 3 in run.parts if part == 1 else "PASS" in run.parts.get(part, "")
        assert passed, f"{model}: {PARTS[part]}: {run.parts.get(part, run.text)[-4000:]}"


@pytest.mark.parametrize("case", CASES)
def test_state_restore_fragmented(programs: Programs, case: str) -> None:
    run = programs("test-state-restore-fragmented", "tiny", case)
    assert run.status == 0, run.text[-2000:]
    assert "SUCCESS" in run.text


# ---- threads ----


@pytest.mark.parametrize("case", CASES)
def test_thread_safety(programs: Programs, case: str) -> None:
    """Two models of four contexts, all decoding at once."""
    short = ("-c", "256", "-ub", "32", "-np", "4", "-t", "2", "-n", "128", "-p", "The meaning of life is")
    run = programs("test-thread-safety", "tiny", case, *short)
    assert run.status == 0, run.text[-2000:]
    assert "All threads finished without errors" in run.text


# ---- recurrent models ----


@pytest.mark.parametrize("model", HYBRID)
@pytest.mark.parametrize("case", ["f16", "xquant"])
def test_recurrent_state_rollback(programs: Programs, case: str, model: str) -> None:
    run = programs("test-recurrent-state-rollback", model, case)
    assert run.status == 0, run.text[-2000:]
    # one fill of the cache's memory after the other; models that cannot be rolled back would be skipped
    assert run.text.count("checkpoint restored successfully") == 2
    assert run.text.count("split replay matched") == 2
