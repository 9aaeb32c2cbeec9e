"""``llada chat`` with lines piped in, and its conversation by itself."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from helpers.speaking_models import CHAT_TEMPLATE, speaking_model
from llada_lightning.checkpoints import LanguageModel
from llada_lightning.commands import shared as options
from llada_lightning.commands.chat import Chat, chat_parser
from llada_lightning.commands.main import main
from llada_lightning.data.chat import Message
from llada_lightning.generation import Sampling, generate
from llada_lightning.generation.prompts import conversation_ids
from llada_lightning.support.errors import UserError

Captured = pytest.CaptureFixture[str]
LENGTH = 8


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch):
    """Runs the command on a model with some lines as its input; returns the exit code."""

    def run(lm: LanguageModel, *lines: str, arguments: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(options, "load", lambda _: lm)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return main(["chat", "small", f"--length={LENGTH}", *arguments])

    return run


def begun(lm: LanguageModel, *arguments: str) -> Chat:
    given = options.given_settings(vars(chat_parser().parse_args(["small", f"--length={LENGTH}", *arguments])))
    return Chat(lm, Sampling(**given))


def answer(lm: LanguageModel, *said: str, first: int) -> str:
    """What a model answers where these were said in turns."""
    messages = [Message("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(said)]
    text = generate(lm, [conversation_ids(lm, messages)], length=LENGTH, first=first).text
    assert text is not None
    return text[0]


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_answers_follow_from_the_whole_conversation(chat, template: str | None, capsys: Captured) -> None:
    lm = speaking_model(template=template)
    assert chat(lm, "one two", "", "three", "/exit", "never") == 0
    out, err = capsys.readouterr()
    first = answer(lm, "one two", first=0)
    second = answer(lm, "one two", first, "three", first=1)
    assert out == f"{first}\n{second}\n"
    assert err.count("no chat template: the model continues plain text") == (template is None)
    assert err.count("tokens/s") == 2


def test_a_conversation_begins_anew_and_a_slash_can_be_said(chat, capsys: Captured) -> None:
    lm = speaking_model(template=CHAT_TEMPLATE)
    assert chat(lm, "one", "/reset", "//one") == 0
    assert capsys.readouterr().out == f"{answer(lm, 'one', first=0)}\n{answer(lm, '/one', first=0)}\n"


def test_a_system_message_stands_before_and_stays(chat, capsys: Captured) -> None:
    lm = speaking_model(template=CHAT_TEMPLATE)
    assert chat(lm, "one", "/reset", "one", arguments=("--system", "be brief")) == 0
    ids = conversation_ids(lm, [Message("system", "be brief"), Message("user", "one")])
    text = generate(lm, [ids], length=LENGTH).text
    assert text is not None
    assert capsys.readouterr().out == f"{text[0]}\n" * 2


def test_settings_are_told_changed_and_checked(chat, capsys: Captured) -> None:
    lm = speaking_model()
    assert chat(lm, "/set length 4", "/set remasking random", "/set steps 2", r'/set stop "\n" x', "/settings") == 0
    err = capsys.readouterr().err
    for line in ("length is 4", "length               4", "remasking            random", "cache                -"):
        assert line in err
    assert "['\\n', 'x']" in err
    chat_ = begun(lm)
    chat_.take("/set zero-eos-confidence true")
    chat_.take("/set steps 4")
    for line, words in (
        ("/set steps many", "steps: many given; expected int or null$"),
        ("/set steps 0", "at least 1"),
        ("/set remasking random", "knows no confidence"),
        ("/set colour red", "'colour' is no setting; choose from length"),
        ("/set", "^/set: give a setting"),
        ("/set zero_eos_confidence maybe", "true or false"),
        ("/sett steps 4", "'/sett' is no command"),
    ):
        with pytest.raises(UserError, match=words) as mistake:
            chat_.take(line)
        assert len(str(mistake.value).splitlines()) == 1
    capsys.readouterr()
    chat_.take("/settings")
    err = capsys.readouterr().err
    assert "steps                4" in err and "low_confidence" in err and "zero_eos_confidence  True" in err
    chat_.take("/set steps")
    assert "steps is -" in capsys.readouterr().err


def test_the_dialogue_is_drawn(chat, tmp_path: Path) -> None:
    path = tmp_path / "dialogue.html"
    assert chat(speaking_model(), "one", "/set steps 4", "two", f"/picture {path}") == 0
    page = path.read_text()
    assert page.count("User") == page.count("llada") == 2 and page.count("</span>") > 8
    assert "last step: the darker, the later" in page


def test_mistakes_of_piped_lines_end_it(chat, capsys: Captured, tmp_path: Path) -> None:
    for line, words in (
        ("/picture", "its ending is none of"),
        (f"/picture {tmp_path}/a.html", "nothing was said yet"),
        ("/dance", "/help lists them"),
        ("a" * 400, "was trained on"),
        ("a\udcff", "not UTF-8"),
    ):
        assert chat(speaking_model(template=CHAT_TEMPLATE), line, "one") == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and words in err and len(err.splitlines()) == 1


def test_a_full_context_leaves_out_the_oldest_turns_and_says_so(chat, capsys: Captured) -> None:
    assert chat(speaking_model(context_length=48), *("five six seven" for _ in range(5))) == 0
    err = capsys.readouterr().err
    assert "the context of 48 tokens is full: the oldest turn is left out" in err
    assert "oldest turns are left out" in err
    assert err.count("tokens/s") == 5


def test_a_person_at_a_terminal_reads_mistakes_interrupts_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    lm = speaking_model(template=CHAT_TEMPLATE)
    said = iter(["/dance", KeyboardInterrupt, "never ending", "one", EOFError])
    sample = options.sample

    def impatiently(given: LanguageModel, prompts: list[list[int]], *more: object, **named: object) -> object:
        if "never ending" in given.decode(prompts[0]):
            raise KeyboardInterrupt
        return sample(given, prompts, *more, **named)  # type: ignore[arg-type]

    def line(prompt: str) -> str:
        assert prompt == "you> "
        what = next(said)
        if isinstance(what, str):
            return what
        raise what

    monkeypatch.setattr(options, "load", lambda _: lm)
    monkeypatch.setattr(options, "sample", impatiently)
    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert main(["chat", "small", f"--length={LENGTH}"]) == 0
    out, err = capsys.readouterr()
    assert out == answer(lm, "one", first=0) + "\n"
    assert "error: '/dance' is no command" in err
    assert err.count("interrupted: not kept; Ctrl-D leaves\n") == 2


def test_an_interrupt_ends_what_is_piped_in(chat, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "sample", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert chat(speaking_model(template=CHAT_TEMPLATE), "one", "two") == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_default_length_leaves_half_of_a_short_context(
    chat, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "load", lambda _: speaking_model(context_length=40))
    monkeypatch.setattr("sys.stdin", io.StringIO("/set length 8\n/set length\none\n"))
    assert main(["chat", "small"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("length is 20: half of the context of 40 tokens\n")
    assert "length is 8\nlength is 20\n" in err and ", 20 steps, " in err


def test_help_lists_every_command(chat, capsys: Captured) -> None:
    assert chat(speaking_model(), "/help") == 0
    err = capsys.readouterr().err
    for name in ("/reset", "/settings", "/set ", "/picture", "/exit", "Ctrl-C", "Ctrl-D"):
        assert name in err


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (None, "chat: stdin is closed; start it in a terminal, or pipe lines in"),
        (io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"), "chat: a line of stdin is not UTF-8 ("),
        (io.StringIO("a" * 1_000_001 + "\n"), "chat: a line has 1,000,001 characters; give at most 1,000,000"),
    ],
)
def test_an_input_that_cannot_be_read_is_one_line(
    stdin: io.TextIOBase | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(options, "load", lambda _: speaking_model())
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["chat", "small", f"--length={LENGTH}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
