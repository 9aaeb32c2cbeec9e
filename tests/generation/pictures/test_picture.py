"""Pictures of a sampling process: what they hold, and what cannot be drawn."""

from __future__ import annotations

import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from helpers.speaking_models import tokenizer
from llada_lightning.generation.pictures.alignment import Aligner
from llada_lightning.generation.pictures.dialogue import Dialogue, Mark, Turn, answer, question
from llada_lightning.generation.pictures.ink import shade
from llada_lightning.generation.pictures.picture import check_picture_path, write_picture
from llada_lightning.generation.result import Generation
from llada_lightning.support.errors import UserError


def generation(text: str, steps: list[int] | None = None, prompt: str = "one") -> Generation:
    ids = tokenizer().encode(text, add_special_tokens=False).ids
    steps = steps or list(range(len(ids), 0, -1))
    return Generation(
        prompts=[tokenizer().encode(prompt, add_special_tokens=False).ids],
        tokens=[ids],
        text=[text],
        step_of_token=[steps],
        confidence=[[0.5] * len(ids)],
        finish=["length"],
        steps=len(ids),
        forward_passes=len(ids),
        seconds=1.0,
    )


def drawn(text: str, prompt: str = "one") -> Dialogue:
    made = generation(text)
    return Dialogue([question(prompt), answer(made, 0, Aligner(tokenizer()), "llada")], "random, 9 steps")


class Page(HTMLParser):
    """Tokens of a page (text, style, title), its text, and the tags that it uses."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str, str]] = []
        self.text = ""
        self.tags: set[str] = set()
        self._open: list[dict[str, str | None]] = []
        self._in_style = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._in_style = tag in ("style", "title")
        if tag == "span":
            self._open.append(dict(attrs))
            self.tokens.append(("", str(dict(attrs)["style"]), str(dict(attrs).get("title"))))

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False
        if tag == "span":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text += data
        if self._open:
            text, style, title = self.tokens.pop()
            self.tokens.append((text + data, style, title))


def test_a_page_colours_tokens_by_step_and_tells_step_and_confidence(tmp_path: Path) -> None:
    assert write_picture(tmp_path / "a.html", [drawn("one 诗\n<two>&", prompt="<b>hi</b>")]) == ""
    page = Page(tmp_path / "a.html")
    tokens = [token for token in page.tokens if token[2] != "None"]
    assert "".join(text for text, _, _ in tokens) == "one 诗\n<two>&"
    count = len(tokenizer().encode("one 诗\n<two>&", add_special_tokens=False).ids)
    assert tokens[0][2] == f"step {count} of {count}, confidence 0.500"
    assert f"background:{shade(count, count)[0]};color:#ffffff" in tokens[0][1]
    assert f"background:{shade(1, count)[0]};color:#000000" in tokens[-1][1]
    (poem,) = (title for text, _, title in tokens if text == "诗")
    assert poem.startswith("steps ") and poem.endswith("confidence 0.500, 0.500, 0.500")
    for words in ("User", "LLaDA", "<b>hi</b>", "step 1", f"step {count}", "random, 9 steps"):
        assert words in page.text
    assert not page.tags & {"script", "link", "img"}
    assert "prefers-color-scheme: dark" in (tmp_path / "a.html").read_text()


def test_given_tokens_have_no_colour(tmp_path: Path) -> None:
    made = generation("one two", steps=[0, 1])
    turn = answer(made, 0, Aligner(tokenizer()), "arm")
    assert turn.speaker == "ARM"
    assert [mark.step for mark in turn.marks] == [0, 1]
    write_picture(tmp_path / "a.html", [Dialogue([turn])])
    assert len([token for token in Page(tmp_path / "a.html").tokens if token[2] != "None"]) == 1


def test_a_png_holds_the_colours_of_its_steps(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", [drawn("one two three")])
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
    present = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.unique(image, axis=0)}
    count = len(generation("one two three").tokens[0])
    assert {shade(step, count)[0] for step in range(1, count + 1)} <= present


def test_a_longer_answer_gives_a_higher_picture(tmp_path: Path) -> None:
    heights = []
    for n, text in enumerate(["one", "one\ntwo\nthree", "two " * 100]):
        write_picture(tmp_path / f"{n}.png", [drawn(text)])
        heights.append(Image.open(tmp_path / f"{n}.png").size[1])
    assert heights == sorted(set(heights))


def test_an_svg_keeps_its_text_and_its_bytes(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        write_picture(tmp_path / name, [drawn("one 诗 $x_1$ & <two>")])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    texts = "".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    for words in ("诗", "$", "<", "&", "User", "LLaDA"):
        assert words in texts


def test_what_no_font_has_is_a_box_in_a_png_and_said_once(tmp_path: Path) -> None:
    unassigned = "\U000e0fff\u0378"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note = write_picture(tmp_path / "a.png", [Dialogue([question(f"a{unassigned}b")])])
        assert write_picture(tmp_path / "a.svg", [Dialogue([question(f"a{unassigned}b")])]) == ""
    assert "no installed font has" in note and "\u0378" in note
    assert len(note.splitlines()) == 1


def test_dollars_are_no_mathematics(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", [Dialogue([question(r"$\frac{$ and $$")])])


def test_a_dialogue_whose_turns_took_different_steps_says_last_step() -> None:
    turns = [Turn("LLaDA", [Mark("a", 1)], steps) for steps in (4, 8)]
    assert Dialogue(turns).last_step == "last step"
    assert Dialogue(turns[1:]).last_step == "step 8"
    assert Dialogue([question("a")]).steps == 0


@pytest.mark.parametrize(("name", "words"), [("a.gif", "ending"), ("no/a.png", "no folder"), ("a", "ending")])
def test_a_picture_that_cannot_be_written_is_refused_first(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_picture_path(str(tmp_path / name))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        check_picture_path(str(tmp_path / "folder.png"))


def test_a_png_beyond_what_can_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"too many for a PNG; write \.html"):
        write_picture(tmp_path / "a.png", [Dialogue([question("a\n" * 3000 + "b")])])
    assert not list(tmp_path.iterdir())
