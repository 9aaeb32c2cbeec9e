"""A progress bar for work whose amount grows while it is done."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from llada_lightning.support.printing import people_console


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} rows/s", style="progress.data.speed")


class ScoringProgress:
    """Rows done and to do, their rate and the time left, on stderr; a context manager.

    Args:
        enabled: None: where stderr is a terminal.
        what: is done.
    """

    def __init__(self, enabled: bool | None = False, what: str = "scoring") -> None:
        console = people_console(stderr=True)
        shown = console.is_terminal if enabled is None else enabled
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not shown)
        self._task = self._bar.add_task(what, total=0)
        self._total = 0

    def __enter__(self) -> ScoringProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, rows: int) -> None:
        """More rows are to be done."""
        self._total += rows
        self._bar.update(self._task, total=self._total)

    def advance(self, rows: int) -> None:
        """Rows are done."""
        self._bar.advance(self._task, rows)
