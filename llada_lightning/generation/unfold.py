"""An answer unfolding on a terminal: each token in the colour of its step, a dim block where it is still masked."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from llada_lightning.generation.drawing import BLOCK, Aligner, coloured
from llada_lightning.generation.sampling import Snapshot
from llada_lightning.support.printing import visible

_SECONDS_BETWEEN_FRAMES = 1 / 15
_LARGEST_SHARE = 0.1
"""Of the time, that drawing may take from sampling."""
_LINES_BESIDE = 3
"""Of the screen, left free for the line of the step and the shell's prompt."""


class Unfolding:
    """Shows the snapshots of a sampling, where the console is a terminal; a context manager.

    What it shows goes away at its end; who called prints the answer.

    Args:
        aligner: of the model's tokenizer.
        prompts: a line for each answer, to tell several apart.
        console: where to draw.
        grows: answers grow to the right, so masked tokens at their ends are not shown.
    """

    def __init__(self, aligner: Aligner, prompts: Sequence[str], console: Console, *, grows: bool = False) -> None:
        self._aligner = aligner
        self._prompts = prompts
        self._console = console
        self._grows = grows
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._answers: dict[int, Text] = {}
        self._next_frame = -math.inf

    def __enter__(self) -> Unfolding:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def observe(self, snapshot: Snapshot) -> None:
        """What ``generate`` calls after each step; draws at most 15 times a second and a tenth of the time."""
        began = time.monotonic()
        if self._live is None or began < self._next_frame:
            return
        for i, (tokens, steps) in enumerate(zip(snapshot.tokens, snapshot.step_of_token, strict=True)):
            text = coloured(self._aligner, tokens, steps, snapshot.steps)
            if self._grows:
                text.right_crop(len(text) - len(text.plain.rstrip(BLOCK)))
            self._answers[snapshot.first + i] = text
        self._live.update(self._frame(snapshot), refresh=True)
        ended = time.monotonic()
        self._next_frame = max(began + _SECONDS_BETWEEN_FRAMES, ended + (ended - began) / _LARGEST_SHARE)

    def _frame(self, snapshot: Snapshot) -> Group:
        """The step, and as many lines as the screen has, ending where the last token stands."""
        lines: list[Text] = []
        for number, text in sorted(self._answers.items()):
            if len(self._prompts) > 1:
                lines.append(Text(visible(self._prompts[number]).replace("\n", "↵"), "dim", no_wrap=True))
                lines[-1].truncate(self._console.width, overflow="ellipsis")
            lines += text.wrap(self._console, self._console.width, overflow="fold")
        room = max(1, self._console.height - _LINES_BESIDE)
        known = [n for n, line in enumerate(lines, 1) if line.plain.strip(BLOCK + " ")]
        end = max(known[-1] if known else 0, room)
        return Group(*lines[:end][-room:], Text(f"step {snapshot.step} of {snapshot.steps}", "dim"))
