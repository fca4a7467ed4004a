"""Stand-ins for models of a hub: llama-server takes them for the ones that its tests name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from support import hub, tiny_gguf
from support.llama_server import needs_programs, running

pytestmark = needs_programs


def test_a_server_finds_them(tiny: str, tmp_path: Path) -> None:
    """One that sees pictures, one that ranks by what lies in its pages."""
    hub.write(tmp_path / "hub", Path(tiny), 2)
    environment = {**os.environ, "LLAMA_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "xquant_gguf", "server", "--offline", "-c", "1024", "-np", "1", "-t", "1"]

    sees = ["--hf-repo", f"{hub.ORGANIZATION}/tinygemma3-GGUF:Q8_0"]
    with running([*command, *sees], tmp_path, environment) as server:
        props = server.get("/props").json()
    assert props["modalities"]["vision"]
    assert len(props["xquant"]["layers"]) == 2

    ranks = ["--hf-repo", f"{hub.ORGANIZATION}/models", "--hf-file", "jina-reranker-v1-tiny-en/ggml-model-f16.gguf"]
    with running([*command, *ranks, "--reranking"], tmp_path, environment) as server:
        assert "xquant" in server.get("/props").json()
        texts = [tiny_gguf.text(n, seed=n) for n in (500, 600)]
        answer = server.post("/rerank", query="a", documents=texts).json()
    assert len({result["relevance_score"] for result in answer["results"]}) == 2
