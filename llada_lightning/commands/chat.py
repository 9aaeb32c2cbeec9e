"""``llada chat``: a conversation with a checkpoint."""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llada_lightning.commands import shared
from llada_lightning.generation.prompts import check_text, fitting_ids
from llada_lightning.generation.sampling import DEFAULT_LENGTH, Sampling, default_length
from llada_lightning.support.command_line import CommandParser
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import people_console

if TYPE_CHECKING:
    from llada_lightning.checkpoints import LanguageModel

_LONGEST_LINE = 1_000_000

HELP = """\
/help           this
/reset          begin anew
/settings       how answers are sampled
/set NAME VALUE change that, e.g. /set steps 64; without a value: the default
/picture FILE   draw how the answers came to be, darker = later: .html, .svg
/exit           leave, as does Ctrl-D; Ctrl-C ends an answer
//TEXT          say a text that begins with /"""


def chat_parser() -> CommandParser:
    """The options of ``llada chat``."""
    parser = CommandParser(
        prog="llada chat",
        description="A conversation with a checkpoint, by its chat template; without one the model continues the "
        "plain text. /help lists what can be done in it. Lines piped in are the user's; a mistake in one ends it, "
        "as nobody is there to correct it, with exit code 2.",
    )
    shared.add_model_options(parser)
    parser.add_argument("--system", type=str, help="message that stands before the conversation")
    shared.add_sampling_options(parser.add_argument_group("sampling"))
    return parser


def main(argv: list[str]) -> int:
    """Runs ``llada chat`` with its arguments until its input ends; returns the exit code.

    Answers go to stdout; what is said about them to stderr. A mistake in a line that is piped in ends it.
    """
    options = vars(chat_parser().parse_args(argv))
    if sys.stdin is None:
        raise UserError("chat: stdin is closed; start it in a terminal, or pipe lines in")
    sampling = Sampling(**shared.given_settings(options))
    chat = Chat(shared.load(options), sampling, options["system"])
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # where there is none, lines cannot be edited
            import readline  # noqa: F401
    while True:
        try:
            if not chat.take(_line("you> " if interactive else "")):
                return 0
        except EOFError:
            return 0
        except (UserError, KeyboardInterrupt) as error:
            if not interactive:
                raise
            why = f"error: {error}" if isinstance(error, UserError) else "\ninterrupted: not kept; Ctrl-D leaves"
            shared.note(why, "dim")


def _line(prompt: str) -> str:
    """The next line of stdin; refused where tokenizing it would take minutes."""
    try:
        line = input(prompt)
    except UnicodeDecodeError as error:
        raise UserError(f"chat: a line of stdin is not UTF-8 ({error.reason}); convert it to UTF-8") from error
    if len(line) > _LONGEST_LINE:
        raise UserError(f"chat: a line has {len(line):,} characters; give at most {_LONGEST_LINE:,}")
    return line


class Chat:
    """A conversation with a model.

    Args:
        lm: The model, which needs a tokenizer.
        sampling: The settings of the sampler, which `/set` changes.
        system: The message with the role `system` before the conversation, if any.
    """

    def __init__(self, lm: LanguageModel, sampling: Sampling, system: str | None = None) -> None:
        from llada_lightning.data.chat import Message
        from llada_lightning.generation.drawing import Aligner, Turn

        lm.encode("")  # raises where there is no tokenizer
        self._lm, self._aligner = lm, Aligner(lm.tokenizer)
        self._begin = [] if system is None else [Message("system", system)]
        self._messages: list[Message] = list(self._begin)
        self._turns: list[Turn] = []
        self._change(sampling)
        length = self._sampling.length
        if sampling.length is None and length is not None and length < DEFAULT_LENGTH:
            shared.note(f"length is {length}: half of the context of {lm.context_length} tokens", "dim")
        if lm.chat_template is None:
            shared.note("no chat template: the model continues plain text", "dim")

    def take(self, line: str) -> bool:
        """Does what a line says; returns False where it ends the conversation.

        Raises:
            UserError: A command or setting that does not exist, or a question that cannot be answered.
        """
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line.removeprefix("/"))
            return True
        name, _, rest = line[1:].strip().partition(" ")
        if name == "exit":
            return False
        if name == "help":
            shared.note(HELP, "dim")
            return True
        commands = {"reset": self._reset, "settings": self._tell, "set": self._set, "picture": self._draw}
        if name not in commands:
            raise UserError(f"'/{name}' is no command; /help lists them, //{name} says it")
        commands[name](rest.strip())
        return True

    def _ask(self, text: str) -> None:
        from llada_lightning.data.chat import Message
        from llada_lightning.generation.drawing import answer, question

        check_text(text)
        assert self._sampling.length is not None
        messages = [*self._messages, Message("user", text)]
        ids, left_out = fitting_ids(self._lm, messages, self._sampling.length)
        if left_out:
            turns = "the oldest turn is" if left_out == 1 else f"the {left_out} oldest turns are"
            shared.note(f"the context of {self._lm.context_length} tokens is full: {turns} left out", "dim")
        asked, console = len(self._turns) // 2, people_console()
        generation = shared.sample(self._lm, [ids], self._sampling, [text], console, first=asked)
        assert generation.text is not None
        shared.print_answer(self._lm, generation, 0, console)
        shared.note(generation.facts, "dim")
        self._messages = [*messages, Message("assistant", generation.text[0])]
        self._turns += [question(text), answer(generation, 0, self._aligner, self._lm.objective)]

    def _reset(self, _: str) -> None:
        self._messages, self._turns = list(self._begin), []
        shared.note("the conversation begins anew", "dim")

    def _tell(self, _: str) -> None:
        shared.note("\n".join(f"{name:<20} {self._shown(name)}" for name in shared.SAMPLING), "dim")

    def _set(self, rest: str) -> None:
        try:
            name, *values = shlex.split(rest, posix=True)
        except ValueError as error:  # nothing, or a quotation without end
            raise UserError(f"{f'/set {rest}'.strip()}: give a setting and its value, e.g. /set steps 64") from error
        name = name.replace("-", "_")
        if name not in shared.SAMPLING:
            raise UserError(f"/set: '{name}' is no setting; choose from {', '.join(shared.SAMPLING)}")
        self._change(replace(self._given, **{name: _parsed(name, values)}))
        shared.note(f"{name} is {self._shown(name)}", "dim")

    def _change(self, given: Sampling) -> None:
        """Takes settings over, once checked. A length that nobody gave leaves half of the context to the turns."""
        length = given.length or default_length(self._lm.context_length // 2, given.block_length)
        sampling = replace(given, length=length)
        sampling.resolved(self._lm)
        self._given, self._sampling = given, sampling

    def _shown(self, name: str) -> str:
        value = getattr(self._sampling, name)
        return "-" if value in (None, ()) else str(list(value) if isinstance(value, tuple) else value)

    def _draw(self, rest: str) -> None:
        from llada_lightning.generation.drawing import Dialogue, check_drawing_path, write_drawing

        path = check_drawing_path(rest)
        if not self._turns:
            raise UserError("/picture: nothing was said yet; ask something first")
        write_drawing(path, [Dialogue(self._turns, self._lm.name)])
        shared.note(f"drawn: {path}", "dim")


def _parsed(name: str, values: list[str]) -> Any:
    """The value of a setting as the command line reads it; its default where there is none."""
    default = getattr(Sampling(), name)
    if isinstance(default, bool):  # a flag
        if values not in ([], ["true"], ["false"]):
            raise UserError(f"/set {name}: {' '.join(values)} given; it is true or false")
        return values == ["true"]
    parser = CommandParser(prog="/set")
    shared.add_sampling_options(parser, [name])
    option = f"--{name.replace('_', '-')}"
    try:
        options = vars(parser.parse_args([part for value in values for part in (option, value)]))
    except UserError as error:
        raise UserError(str(error).removesuffix("; see '/set --help'")) from error
    return shared.given_settings(options, [name]).get(name, default)
