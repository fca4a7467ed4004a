"""make demo: a question about the beginning of a text, with F16 and with XQuant."""

from __future__ import annotations

import pytest

import demo


def test_both_caches_remember_the_password(smollm2: str) -> None:
    f16, xquant = (demo.ask(smollm2, kv_type, 4096, 800) for kv_type in ("f16", "xquant"))
    for told in (f16, xquant):
        assert told.prompt_tokens > 850
        assert all("marigold" in answer for answer in told.answers)
        assert told.decoded_tokens >= 4
        assert min(told.prompt_time, told.decode_time) > 0
    shown = demo.report(f16, xquant, 4096)
    assert "cache for 4096 tokens" in shown
    assert "3.8 times less" in shown  # as docs/measurements.md says
    agree = sum(a == b for a, b in zip(f16.answers, xquant.answers, strict=True))
    assert f"the answers agree to the letter: {agree} of 2" in shown


def test_answers_that_differ_are_counted() -> None:
    one = demo.Told("f16", 300, 10, 1.0, 20, 2.0, ["yes", "no"])
    other = demo.Told("xquant", 100, 10, 0.5, 20, 0.5, ["yes", "maybe"])
    shown = demo.report(one, other, 4096)
    assert "3.0 times less" in shown
    assert shown.count("2.0 times as fast") == 1
    assert shown.count("4.0 times as fast") == 1
    assert "the answers agree to the letter: 1 of 2" in shown


def test_the_help_tells_the_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["demo.py", "--help"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "--kv-type" in capsys.readouterr().out
