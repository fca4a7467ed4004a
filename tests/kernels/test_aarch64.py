"""Which kernel sets for 64-bit ARM run on which CPU, under qemu; what they compute is tested with the other devices."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from support import remote
from support.devices import Refused
from support.pages_of_codes import made, tolerance

# qemu's CPUs, and the sets that each can run, best first
CPUS = {
    "cortex-a72": ("neon", "scalar"),  # Raspberry Pi 4
    "cortex-a76": ("neon-dotprod", "neon", "scalar"),  # Raspberry Pi 5
    "max": ("neon-i8mm", "neon-dotprod", "neon", "scalar"),
}


@pytest.mark.arm
@pytest.mark.parametrize("cpu", CPUS)
def test_each_cpu_runs_what_it_has(cpu: str) -> None:
    with remote.Runner(remote.qemu(cpu)) as runner:
        assert runner.ask(b"available", gives=True).decode() == ",".join(CPUS[cpu])
        assert runner.ask(b"kernels", gives=True).decode() == CPUS[cpu][0]
    with remote.Runner(remote.qemu(cpu), "scalar") as runner:
        assert runner.ask(b"kernels", gives=True) == b"scalar"


@pytest.mark.arm
@pytest.mark.parametrize("cpu", CPUS)
def test_forcing_a_set_that_the_cpu_lacks_is_an_error(cpu: str) -> None:
    lacking = [name for name in CPUS["max"] if name not in CPUS[cpu]]
    for name, what in [(name, "needs instructions that this machine lacks") for name in lacking] + [
        ("avx2", "is unknown")
    ]:
        message = f'kernel set "{name}" {what}; this machine can run {",".join(CPUS[cpu])}'
        with remote.Runner(remote.qemu(cpu), name) as runner:
            with pytest.raises(Refused, match=f"^xq_kernels_force: {message}$"):
                runner.ask(b"force", name.encode())
            with pytest.raises(Refused, match=f"^XQUANT_KERNELS: {message}$"):
                runner.ask(b"kernels", gives=True)


@pytest.mark.arm
@pytest.mark.parametrize("cpu", CPUS)
def test_the_sets_of_each_cpu_attend_there(cpu: str) -> None:
    """No instruction that the CPU lacks: qemu stops at them."""
    m = made("default")
    for kernels in CPUS[cpu]:
        on = remote.Remote(cpu, remote.qemu(cpu), kernels)
        out = m.attend(m.put(on), 3)
        assert on.ran == {kernels}
        assert np.abs(out - m.right).max() <= tolerance(kernels, m.table[0]) * np.abs(m.right).max()
        on.runner.close()


def test_big_endian_machines_are_refused_at_compile_time(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    native = remote.ROOT / "native"
    flags = ["-std=c++17", f"-I{native / 'include'}", f"-I{native / 'common'}", "-U__BYTE_ORDER__"]
    source = str(native / "cpu" / "codec_scalar.cpp")
    command = [compiler, *flags, "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__", "-E", source]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert out.returncode != 0
    assert "big-endian machines are not supported" in out.stderr
