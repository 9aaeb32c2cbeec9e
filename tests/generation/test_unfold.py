"""What a terminal shows while an answer is denoised."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.style import Style

from helpers.speaking_models import tokenizer
from llada_lightning.generation.drawing import BLOCK, Aligner, Unfolding, coloured, shade
from llada_lightning.generation.sampling import Snapshot


def encoded(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


def terminal(height: int = 12) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=40, height=height, color_system="truecolor")


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tokens_have_the_colour_of_their_step_and_masked_ones_a_dim_block() -> None:
    ids = encoded("xyz")
    assert len(ids) == 3
    text = coloured(Aligner(tokenizer()), [0, *ids], [-1, 1, 4, 0], 4)
    assert text.plain == f"{BLOCK}xyz"
    (blank, first, last) = (span.style for span in text.spans)
    assert isinstance(blank, Style) and blank.dim
    assert (first, last) == (shade(1, 4), shade(4, 4))
    assert len(text.spans) == 3  # the given token has none


def test_the_model_cannot_drive_the_terminal() -> None:
    assert "\x1b" not in coloured(Aligner(tokenizer()), encoded("a\x1b[2Jb"), [1] * 6, 1).plain


def test_a_frame_shows_the_answer_the_step_and_goes_away_at_the_end() -> None:
    console = terminal()
    with Unfolding(Aligner(tokenizer()), ["p"], console) as unfolding:
        ids = encoded("ab")
        unfolding.observe(Snapshot([[*ids, 1]], [[1, 2, -1]], 2, 3))
        assert "step 2 of 3" in shown(console) and BLOCK in shown(console)
    assert shown(console).endswith("\x1b[2K")  # the line erased


@pytest.mark.parametrize(("seconds_a_frame", "least", "most"), [(0.0, 40, 46), (0.05, 5, 7)])
def test_frames_are_left_out_where_they_come_too_fast_or_cost_too_much(
    seconds_a_frame: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 steps in three seconds."""
    now = 0.0
    monkeypatch.setattr("llada_lightning.generation.drawing.time.monotonic", lambda: now)
    console = terminal()
    frame = Unfolding._frame

    def slow(self: Unfolding, snapshot: Snapshot) -> object:
        nonlocal now
        now += seconds_a_frame
        return frame(self, snapshot)

    monkeypatch.setattr(Unfolding, "_frame", slow)
    with Unfolding(Aligner(tokenizer()), ["p"], console) as unfolding:
        for step in range(1, 301):
            now = max(now, step / 100)
            unfolding.observe(Snapshot([encoded("ab")], [[1, 2]], step, 300))
    assert least <= sum(f"step {step} of 300" in shown(console) for step in range(1, 301)) <= most


def test_without_a_terminal_nothing_is_written() -> None:
    console = Console(file=io.StringIO())
    with Unfolding(Aligner(tokenizer()), ["p"], console) as unfolding:
        unfolding.observe(Snapshot([encoded("ab")], [[1, 2]], 1, 2))
    assert shown(console) == ""


def test_a_long_answer_shows_its_end_and_several_their_prompts() -> None:
    console = terminal(height=8)
    lines = encoded("".join(f"line{n}\n" for n in range(30)))
    with Unfolding(Aligner(tokenizer()), ["p"], console, grows=True) as unfolding:
        unfolding.observe(Snapshot([[*lines, 0, 0, 0]], [[1] * len(lines) + [-1] * 3], 1, 2))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(console))
    assert "line29" in plain and "line24" not in plain and BLOCK not in plain
    assert all(frame.count("\n") <= 6 for frame in plain.split("\r"))
    console = terminal()
    with Unfolding(Aligner(tokenizer()), ["first\nprompt", "other"], console) as unfolding:
        unfolding.observe(Snapshot([encoded("a")], [[1]], 1, 1, first=1))
    assert "other" in shown(console) and "first" not in shown(console)
