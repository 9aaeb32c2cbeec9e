"""The picture of a sampling process as one page of HTML, without scripts and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from llada_lightning.generation.pictures.dialogue import Dialogue, Mark, Turn
from llada_lightning.generation.pictures.ink import shade

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --dim: #666; --line: #ddd; --edge: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171b; --ink: #e6e6e6; --dim: #9a9a9a; --line: #3a3d44; --edge: #5b6270; }
}
body { background: var(--page); color: var(--ink); font: 16px/1.9 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
section { border-top: 2px solid var(--line); padding: .5rem 0 1rem; }
.turn { display: grid; grid-template-columns: 5rem 1fr; border-bottom: 1px solid var(--line); padding: .5rem 0; }
.turn b { font-weight: 600; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; min-width: 0;
  font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .92rem; }
.text span { box-shadow: inset 0 0 0 1px var(--edge); border-radius: 4px; padding: .16em 0;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.text i::after { content: "↵"; opacity: .65; font-style: normal; }
.facts, .legend { color: var(--dim); font-size: .85rem; margin: .3rem 0; }
.legend span { display: inline-block; width: 1.5em; height: 1em; vertical-align: -.15em; }
""".strip()

_SWATCHES = 12
"""The most patches of a legend."""


def html_page(dialogues: Sequence[Dialogue]) -> str:
    """A page with a section for each dialogue; each token tells its step and confidence where the mouse rests on it."""
    sections = "\n".join(_section(dialogue) for dialogue in dialogues)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Sampling process</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n{sections}\n</body>\n</html>\n"
    )


def _section(dialogue: Dialogue) -> str:
    turns = "\n".join(_turn(turn) for turn in dialogue.turns)
    facts = f'<p class="facts">{escape(dialogue.facts)}</p>\n' if dialogue.facts else ""
    return f"<section>\n{turns}\n{_legend(dialogue)}{facts}</section>"


def _turn(turn: Turn) -> str:
    marks = "".join(_mark(mark, turn.steps) for mark in turn.marks)
    return f'<div class="turn"><b>{escape(turn.speaker)}</b><p class="text">{marks}</p></div>'


def _mark(mark: Mark, steps: int) -> str:
    # The sign of a new line is drawn by the style sheet, so that a copied text does not hold it.
    if not mark.step:
        return escape(mark.text)
    text = escape(mark.text).replace("\n", "<i></i>\n")
    background, ink = shade(mark.step, steps)
    return f'<span style="background:{background};color:{ink}" title="{escape(mark.note)}">{text}</span>'


def _legend(dialogue: Dialogue) -> str:
    if not dialogue.steps:
        return ""
    count = min(dialogue.steps, _SWATCHES)
    patches = "".join(f'<span style="background:{shade(n + 1, count)[0]}"></span>' for n in range(count))
    meaning = f"{dialogue.last_step}: the darker, the later" if dialogue.steps > 1 else "all at once"
    return f'<p class="legend">step 1 {patches} {meaning}</p>\n'
