"""Text on terminals: encodings that lack characters, control characters and markup of files, long values."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from llada_lightning.commands import main as cli
from llada_lightning.support import printing
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import people_console, print_what_the_encoding_holds, shortened, visible

Captured = pytest.CaptureFixture[str]
CLEAR = "\x1b[2J"


@given(st.text())
def test_visible_text_holds_no_character_that_acts(text: str) -> None:
    seen = visible(text)
    assert len(seen) == len(text)
    assert not any((ord(c) < 0x20 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 for c in seen)
    assert visible(seen) == seen


@given(st.text(), st.integers(4, 50))
def test_a_shortened_value_is_one_line_of_bounded_length(text: str, length: int) -> None:
    short = shortened(text, length)
    assert len(short) <= length + 1
    assert len(short.splitlines()) <= 1


def test_a_short_value_is_whole() -> None:
    assert shortened("a\nb é") == "a b é"
    assert shortened("x" * 10_000) == "x" * 100 + "…" + "x" * 100


def test_an_ascii_stream_takes_every_character(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(f"sys.{name}", stream)

    def work(_: list[str]) -> int:
        print("1.5 ± 0.1 ▒")
        people_console().print("1.5 ± 0.1 ▒")
        raise UserError("'é' is not there")

    monkeypatch.setattr(cli, "_dispatch", work)
    assert cli.main([]) == 2
    written = {name: (stream.flush(), stream.buffer.getvalue())[1] for name, stream in streams.items()}  # type: ignore[attr-defined]
    assert written == {"stdout": b"1.5 ? 0.1 ?\n" * 2, "stderr": b"error: '?' is not there\n"}


def test_what_a_user_chose_for_errors_of_encoding_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", stream)
    print_what_the_encoding_holds()
    assert stream.errors == "backslashreplace"


def test_control_characters_of_files_do_not_act(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    table = Table("column", title=f"title{CLEAR}")
    table.add_row(f"cell{CLEAR}")
    console = people_console()
    console.print(f"line{CLEAR}", style="dim", markup=False)
    console.print(table)

    def refuse(_: list[str]) -> int:
        raise UserError(f"'file{CLEAR}' is damaged")

    monkeypatch.setattr(cli, "_dispatch", refuse)
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    for part in ("line␛[2J", "title␛[2J", "cell␛[2J"):
        assert part in captured.out
    assert captured.err == "error: 'file␛[2J' is damaged\n"


MARKUP = "data/[bold]books[en] :smile: [/b]"


def test_markup_in_names_does_not_act(capsys: Captured) -> None:
    table = Table(f"header {MARKUP}", title=f"title {MARKUP}", caption=f"caption {MARKUP}", width=100)
    table.add_row(f"cell {MARKUP}")
    console = people_console()
    console.print(table)
    console.print(f"line {MARKUP}", soft_wrap=True)
    shown = capsys.readouterr().out
    for place in ("header", "title", "caption", "cell", "line"):
        assert f"{place} {MARKUP}" in shown


def test_no_module_has_a_console_or_markup_of_its_own() -> None:
    package = Path(printing.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert not [path for path, text in sources.items() if re.search(r"= (rich\.\w+\.)?Console\(", text)]
    assert not [path for path, text in sources.items() if "rich.markup" in text or "markup=True" in text]


def test_styles_of_our_own_do_act(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    console = people_console()
    with console.capture() as shown:
        console.print(Text("word", "bold"))
    assert shown.get().startswith("\x1b[1mword")
