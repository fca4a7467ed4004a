"""The sign test: against all ways in which coins can fall, and against numbers worked out by hand."""

from __future__ import annotations

from itertools import product

import pytest

from xquant_gguf.tasks.paired import paired, sign_test


@pytest.mark.parametrize(("worse", "better"), [(w, n - w) for n in range(9) for w in range(n + 1)])
def test_it_counts_coins(worse: int, better: int) -> None:
    """The share of all throws of n coins that part at least as unevenly."""
    n, uneven = worse + better, abs(worse - better)
    throws = [abs(2 * sum(coins) - n) >= uneven for coins in product((0, 1), repeat=n)]
    assert sign_test(worse, better) == sum(throws) / len(throws)


def test_by_hand() -> None:
    assert sign_test(6, 0) == 2 / 64
    assert sign_test(8, 2) == 2 * (1 + 10 + 45) / 1024
    assert sign_test(0, 0) == 1
    assert sign_test(600, 400) == pytest.approx(2.7e-10, rel=0.1)  # 6.3 standard deviations, as a normal one has it


def test_items_that_are_alike_do_not_count() -> None:
    assert paired([0, 0, 1, 1, 1], [1, 1, 0, 1, 1]) == {"worse": 2, "better": 1, "p": 1.0}
    assert paired([0.5, 0.2], [0.5, 0.2]) == {"worse": 0, "better": 0, "p": 1.0}
    with pytest.raises(ValueError, match="zip"):
        paired([1], [1, 0])
