"""Marks for what does not hold yet; whoever repairs it finds the mark, since it may not pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Fault:
    """Why something fails, and with which exception: any other is a failure of the test."""

    reason: str
    raises: type[Exception] = AssertionError

    def param(self, *values: Any) -> Any:
        """A set of parameters that fails so."""
        return pytest.param(*values, marks=pytest.mark.xfail(strict=True, reason=self.reason, raises=self.raises))


def cache_types(**faults: Fault) -> list[Any]:
    """f16 and xquant as parameters; faults: what does not hold with them yet."""
    return [faults[name].param(name) if name in faults else name for name in ("f16", "xquant")]
