"""The drawing of a sampling process: in a file, and on a terminal while an answer is denoised."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers.speaking_models import tokenizer
from llada_lightning.generation.drawing import (
    BLOCK,
    MASKED,
    Aligner,
    Dialogue,
    Unfolding,
    answer,
    check_drawing_path,
    coloured,
    question,
    shade,
    write_drawing,
)
from llada_lightning.generation.sampling import Generation, Snapshot
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import visible

SVG = "{http://www.w3.org/2000/svg}"


def encoded(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


# --- the text of each token -------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(exclude_characters="\N{REPLACEMENT CHARACTER}", exclude_categories=["Cs"])))
def test_pieces_join_to_the_text_and_hold_each_token_once(text: str) -> None:
    ids = encoded(text)
    pieces = Aligner(tokenizer()).pieces(ids)
    assert "".join(piece.text for piece in pieces) == text
    assert [place for piece in pieces for place in range(piece.begin, piece.end)] == list(range(len(ids)))


@given(st.lists(st.integers(MASKED, 310), max_size=40))
def test_any_tokens_at_all_have_pieces_without_replacement_characters(ids: list[int]) -> None:
    pieces = Aligner(tokenizer()).pieces(ids)
    assert [place for piece in pieces for place in range(piece.begin, piece.end)] == list(range(len(ids)))
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(piece.text for piece in pieces)
    assert [piece.text for piece in pieces if ids[piece.begin] == MASKED] == [""] * ids.count(MASKED)


@pytest.mark.parametrize(("character", "tokens"), [("诗", 3), ("😀", 4), ("é", 2), ("x", 1)])
def test_a_character_of_several_tokens_is_one_piece(character: str, tokens: int) -> None:
    ids = encoded(character)
    assert len(ids) == tokens
    assert Aligner(tokenizer()).pieces(ids) == [(character, 0, tokens)]


def test_bytes_that_are_no_character_are_shown_as_ids() -> None:
    first, second, third = encoded("诗")
    pieces = Aligner(tokenizer()).pieces([second, first, MASKED, first, second, *encoded("a")])
    assert [piece.text for piece in pieces] == [f"⟨{second}⟩", f"⟨{first}⟩", "", f"⟨{first}⟩", f"⟨{second}⟩", "a"]
    assert third not in (first, second)


def test_special_tokens_go_by_their_names_and_unknown_ids_by_their_numbers() -> None:
    pieces = Aligner(tokenizer()).pieces([tokenizer().token_to_id("[EOS]"), 100_000])
    assert [piece.text for piece in pieces] == ["[EOS]", "⟨100000⟩"]


def test_without_a_tokenizer_tokens_are_their_ids() -> None:
    assert [piece.text for piece in Aligner(None).pieces([7, MASKED, 12])] == ["7 ", "", "12 "]


def test_a_word_keeps_the_space_before_it_where_a_tokenizer_drops_that_of_the_first() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "▁a": 1, "▁cat": 2, "▁sat": 3}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    assert words.decode([2, 3]) == "cat sat"
    assert [piece.text for piece in Aligner(words).pieces([2, 3])] == [" cat", " sat"]


def test_what_would_act_on_a_terminal_is_seen_instead() -> None:
    assert visible("a\x1b[31m\r\x00\x7f\x9b\u202eb\n\tc") == "a␛[31m␍␀␡··b\n\tc"
    assert visible("Füße 诗 😀") == "Füße 诗 😀"


# --- colours ----------------------------------------------------------------------------------------------------------


def colours(style: Style) -> tuple[str, str]:
    """The background and the ink."""
    assert style.color is not None and style.bgcolor is not None
    return style.bgcolor.get_truecolor().hex, style.color.get_truecolor().hex


def contrast(one: str, other: str) -> float:
    """Ratio of luminances (WCAG 2.1)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("steps", [2, 7, 128, 1001])
def test_a_later_step_is_darker_and_its_text_readable(steps: int) -> None:
    shades = [colours(shade(step, steps)) for step in range(1, steps + 1)]
    against_black = [contrast(background, "#000000") for background, _ in shades]
    assert against_black == sorted(against_black, reverse=True)
    assert against_black[0] > 15 and against_black[-1] < 1.6
    assert all(contrast(background, ink) >= 4.5 for background, ink in shades)


def test_one_step_is_light() -> None:
    assert shade(1, 1) == shade(1, 9)
    assert shade(12, 9) == shade(9, 9)


# --- files ------------------------------------------------------------------------------------------------------------


def drawn(text: str, prompt: str = "one", steps: list[int] | None = None) -> Dialogue:
    ids = encoded(text)
    steps = steps or list(range(len(ids), 0, -1))
    made = Generation(
        prompts=[encoded(prompt)],
        tokens=[ids],
        text=[text],
        step_of_token=[steps],
        confidence=[[0.5] * len(ids)],
        finish=["length"],
        steps=len(ids),
        forward_passes=len(ids),
        seconds=1.0,
    )
    return Dialogue([question(prompt), answer(made, 0, Aligner(tokenizer()), "llada")], "random, 9 steps")


class Page(HTMLParser):
    """The text of a page and its tags; ``coloured`` holds its text with a background, by the colour."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.coloured: dict[str, str] = {}
        self._classes: list[str] = []
        self._rules: dict[str, str] = {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._classes.append(str(dict(attrs).get("class", tag)))

    def handle_endtag(self, tag: str) -> None:
        self._classes.pop()

    def handle_data(self, data: str) -> None:
        if self._classes[-1:] == ["style"]:
            self._rules = {line.split()[0]: line for line in data.splitlines() if "background-color: " in line}
            return
        self.text += data
        rule = self._rules.get(f".{self._classes[-1]}") if self._classes else None
        if rule is not None:
            colour = rule.split("background-color: ")[1][:7]
            self.coloured[colour] = self.coloured.get(colour, "") + data


def texts(path: Path) -> str:
    return "".join(ElementTree.parse(path).getroot().itertext()).replace("\xa0", " ")


@pytest.mark.parametrize(("ending", "environment"), [(".html", {}), (".svg", {"NO_COLOR": "1", "TERM": "dumb"})])
def test_tokens_have_the_colour_of_their_step_whatever_the_terminal(
    ending: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / f"a{ending}"
    write_drawing(path, [drawn("xyzab", steps=[1, 2, 3, 0, 4])])
    content = path.read_text(encoding="utf-8")
    for step in range(1, 5):
        assert colours(shade(step, 4))[0] in content
    if ending == ".html":
        found = Page(path).coloured
        assert [found[colours(shade(step, 4))[0]].strip() for step in range(1, 5)] == ["x", "y", "z", "b"]


def test_a_page_holds_prompt_answer_legend_and_facts_and_no_markup_acts(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    write_drawing(path, [drawn("one 诗\n<two>& :smile: [bold]x[/bold]", prompt="<b>hi</b> [red]\x1b[2J"), drawn("b")])
    page = Page(path)
    count = len(encoded("one 诗\n<two>& :smile: [bold]x[/bold]"))
    meaning = f"step {count}: the darker, the later; given text has no colour"
    for words in ("User", "llada", "one 诗↵", "<two>& :smile: [bold]x[/bold]", "<b>hi</b> [red]␛[2J", meaning):
        assert words in page.text
    assert page.text.count("random, 9 steps") == 2 and "all tokens at once" in page.text
    assert not page.tags & {"script", "link", "img", "b"}


def test_a_dialogue_whose_turns_took_different_steps_says_last_step(tmp_path: Path) -> None:
    turns = [*drawn("one").turns, *drawn("three").turns]
    write_drawing(tmp_path / "a.html", [Dialogue(turns)])
    assert "last step: the darker, the later" in Page(tmp_path / "a.html").text
    write_drawing(tmp_path / "b.html", [Dialogue([question("given\n\n")])])
    assert "step" not in Page(tmp_path / "b.html").text


def test_an_svg_keeps_its_text_and_its_bytes_and_loads_nothing(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        write_drawing(tmp_path / name, [drawn("one 诗 $x_1$ & <two>", prompt="{key} & <b>")])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    for words in ("诗$x_1$&<two>", "{key} & <b>", "User", "llada"):  # a token that is a space is a place without text
        assert words in texts(tmp_path / "a.svg")
    content = (tmp_path / "a.svg").read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http" not in content and "url(#" in content


@settings(deadline=None)
@given(st.lists(st.text("ab  诗\t\n", min_size=1, max_size=12), min_size=1, max_size=12))
def test_no_character_is_lost_and_no_line_too_wide(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    text = "".join(parts) + "w" * 120 + "诗" * 60
    path = tmp_path_factory.mktemp("wide") / "a.html"
    write_drawing(path, [drawn(text)])
    page = Page(path).text
    assert all(cell_len(line) <= 100 for line in page.strip().splitlines())
    kept = "".join(page.split("step 1")[0].split("llada", 1)[1].replace("↵", "").split())
    assert kept == "".join(text.split())


def test_wide_characters_have_two_cells_in_an_svg(tmp_path: Path) -> None:
    write_drawing(tmp_path / "a.svg", [drawn("a", prompt="诗诗 a")])
    [width] = [
        float(found.attrib["textLength"])
        for found in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}text")
        if str(found.text).startswith("诗")
    ]
    [one] = {
        float(found.attrib["textLength"])
        for found in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}text")
        if found.text == "a"
    }
    assert width % one == pytest.approx(0, abs=1e-3) or width % one == pytest.approx(one, abs=1e-3)
    assert width >= 6 * one - 1e-3


@pytest.mark.parametrize(
    ("name", "words"), [("a.png", "none of .html, .svg"), ("no/a.svg", "no folder"), ("a", "ending")]
)
def test_a_drawing_that_cannot_be_written_is_refused_first(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_drawing_path(str(tmp_path / name))
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        check_drawing_path(str(tmp_path / "folder.svg"))


# --- on a terminal ----------------------------------------------------------------------------------------------------


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
