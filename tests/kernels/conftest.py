"""The devices that the kernel tests run on."""

from __future__ import annotations

import os
from typing import Any

import pytest

from support import remote
from support.devices import Cpu, Device, device
from xquant_gguf import codec


def device_names(arm: tuple[str, ...]) -> list[Any]:
    """Each kernel set of this machine, here and on Windows, sets for ARM, and a GPU."""
    return [
        *(pytest.param(f"cpu-{name}") for name in codec.kernel_sets()),
        *(pytest.param(f"arm-{name}", marks=pytest.mark.arm) for name in arm),
        *(pytest.param(f"wine-{name}", marks=pytest.mark.wine) for name in codec.kernel_sets()),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]


@pytest.fixture(params=device_names(("neon-i8mm", "neon-dotprod", "neon", "scalar")))
def on(request: pytest.FixtureRequest) -> Device:
    """Each test runs on each device."""
    return device(request.param)


@pytest.fixture(params=device_names(("neon", "scalar")))
def coder(request: pytest.FixtureRequest) -> Device:
    """As `on`, for what the sets for ARM have in common: all but attention."""
    return device(request.param)


@pytest.fixture(params=["cpu-scalar", pytest.param("cuda", marks=pytest.mark.cuda)])
def any_one(request: pytest.FixtureRequest) -> Device:
    """A device of each backend: what is refused does not depend on kernel sets."""
    return device(request.param)


@pytest.fixture
def here() -> Cpu:
    """One whose memory tests can look into."""
    on = device("cpu-scalar")
    assert isinstance(on, Cpu)
    return on


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without compiler or emulator the tests of ARM are skipped, or fail where they must run; likewise of Windows."""
    if item.get_closest_marker("arm") and (missing := remote.missing()):
        reason = f"on Debian: apt-get install {' '.join(missing)}"
        if os.environ.get("XQUANT_AARCH64") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    if item.get_closest_marker("wine") and (missing := remote.missing_for_windows()):
        reason = "; ".join(missing)
        if os.environ.get("XQUANT_WINE") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
