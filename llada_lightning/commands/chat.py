"""``llada chat``: a conversation with a checkpoint."""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

from llada_lightning.commands import model_options as shared
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
        "as nobody is there to mend it, with exit code 2.",
    )
    shared.add_model_options(parser)
    parser.add_argument("--system", type=str, default=None, help="message that stands before the conversation")
    shared.add_sampling_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs ``llada chat`` with its arguments until its input ends; returns the exit code.

    Answers go to stdout; what is said about them to stderr.

    Raises:
        UserError: an option or the checkpoint is not right; where lines are piped in, also one of these.
    """
    options = vars(chat_parser().parse_args(argv))
    if sys.stdin is None:
        raise UserError("chat: stdin is closed; start it in a terminal, or pipe lines in")
    chat = Chat(shared.load(options), options, options["system"])
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
            chat.note(f"error: {error}" if isinstance(error, UserError) else "\ninterrupted: not kept; Ctrl-D leaves")


def _line(prompt: str) -> str:
    """Returns the next line of stdin.

    Raises:
        EOFError: there is none.
        UserError: it is not UTF-8, or so long that tokenizing it would take minutes.
    """
    try:
        line = input(prompt)
    except UnicodeDecodeError as error:
        raise UserError(f"chat: a line of stdin is not UTF-8 ({error.reason}); convert it to UTF-8") from error
    if len(line) > _LONGEST_LINE:
        raise UserError(f"chat: a line has {len(line):,} characters; give at most {_LONGEST_LINE:,}")
    return line


class Chat:
    """A conversation that goes on.

    Args:
        lm: the model.
        options: of the command line; the sampler's may change on the way.
        system: the message before the conversation, if any.

    Raises:
        UserError: the model has no tokenizer, or the settings do not go together.
    """

    def __init__(self, lm: LanguageModel, options: dict[str, Any], system: str | None = None) -> None:
        from llada_lightning.data.chat import Message
        from llada_lightning.generation.drawing import Aligner, Turn
        from llada_lightning.generation.settings import DEFAULT_LENGTH

        lm.encode("")
        self._lm = lm
        self._options = dict(options)
        self._aligner = Aligner(lm.tokenizer)
        self._begin = [] if system is None else [Message("system", system)]
        self._messages: list[Message] = list(self._begin)
        self._turns: list[Turn] = []
        self._console, self._aside = people_console(), people_console(stderr=True)
        self._check_settings()
        length = self._settings()["length"]
        if options["length"] is None and length < DEFAULT_LENGTH:
            self.note(f"length is {length}: half of the context of {lm.context_length} tokens")
        if lm.chat_template is None:
            self.note("no chat template: the model continues plain text")

    def take(self, line: str) -> bool:
        """Does what a line says; returns False where it ends the conversation.

        Raises:
            UserError: a command or setting that does not exist, or a question that cannot be answered.
        """
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line.removeprefix("/"))
            return True
        name, _, rest = line[1:].strip().partition(" ")
        if name == "exit":
            return False
        commands = {"help": self._help, "reset": self._reset, "settings": self._tell, "set": self._set}
        commands["picture"] = self._draw
        if name not in commands:
            raise UserError(f"'/{name}' is no command; /help lists them, //{name} says it")
        commands[name](rest.strip())
        return True

    def note(self, text: str) -> None:
        """Says something that is no part of the conversation."""
        self._aside.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _ask(self, text: str) -> None:
        from llada_lightning.data.chat import Message
        from llada_lightning.generation.conversation import fitting_ids
        from llada_lightning.generation.drawing import answer, coloured, question
        from llada_lightning.generation.prompt_files import check_text
        from llada_lightning.generation.unfold import Unfolding

        check_text(text)
        settings = self._settings()
        messages = [*self._messages, Message("user", text)]
        ids, left_out = fitting_ids(self._lm, messages, settings["length"])
        if left_out:
            turns = "the oldest turn is" if left_out == 1 else f"the {left_out} oldest turns are"
            self.note(f"the context of {self._lm.context_length} tokens is full: {turns} left out")
        grows, asked = shared.strategy_of(self._lm, settings) != "diffusion", len(self._turns) // 2
        with Unfolding(self._aligner, [text], self._console, grows=grows) as unfolding:
            generation = shared.sample(self._lm, [ids], settings, first=asked, on_step=unfolding.observe)
        assert generation.text is not None
        if self._console.is_terminal:
            steps = generation.step_of_token[0]
            self._console.print(coloured(self._aligner, generation.tokens[0], steps, max(steps, default=0)))
        else:
            print(generation.text[0], flush=True)
        self.note(shared.facts(self._lm, settings, generation))
        self._messages = [*messages, Message("assistant", generation.text[0])]
        self._turns += [question(text), answer(generation, 0, self._aligner, self._lm.objective)]

    def _help(self, _: str) -> None:
        self.note(HELP)

    def _reset(self, _: str) -> None:
        self._messages, self._turns = list(self._begin), []
        self.note("the conversation begins anew")

    def _tell(self, _: str) -> None:
        settings = self._settings()
        self.note("\n".join(f"{name:<20} {'-' if value in (None, []) else value}" for name, value in settings.items()))

    def _set(self, rest: str) -> None:
        try:
            name, *values = shlex.split(rest, posix=True)
        except ValueError as error:  # nothing, or a quotation without end
            raise UserError(f"{f'/set {rest}'.strip()}: give a setting and its value, e.g. /set steps 64") from error
        name = name.replace("-", "_")
        if name not in shared.SAMPLING:
            raise UserError(f"/set: '{name}' is no setting; choose from {', '.join(shared.SAMPLING)}")
        before = self._options
        self._options = {**before, name: _parsed(name, values)}
        try:
            self._check_settings()
        except UserError:
            self._options = before
            raise
        value = self._settings()[name]
        self.note(f"{name} is {'-' if value in (None, []) else value}")

    def _settings(self) -> dict[str, Any]:
        """Of the sampler; a length that nobody gave leaves half of the context to the conversation."""
        from llada_lightning.generation.settings import default_length

        settings = shared.sampling_settings(self._options)
        if settings["length"] is None:
            settings["length"] = default_length(self._lm.context_length // 2, settings["block_length"])
        return settings

    def _check_settings(self) -> None:
        from llada_lightning.generation.settings import resolve_settings

        settings = self._settings()
        del settings["seed"]
        resolve_settings(self._lm, infill=False, **settings)

    def _draw(self, rest: str) -> None:
        from llada_lightning.generation.drawing import Dialogue, check_drawing_path, write_drawing

        path = check_drawing_path(rest)
        if not self._turns:
            raise UserError("/picture: nothing was said yet; ask something first")
        write_drawing(path, [Dialogue(self._turns, self._lm.name)])
        self.note(f"drawn: {path}")


def _parsed(name: str, values: list[str]) -> Any:
    """The value of a setting as the command line reads it; its default where there is none."""
    parser = CommandParser(prog="/set")
    shared.add_sampling_options(parser)
    option = f"--{name.replace('_', '-')}"
    if name == "zero_eos_confidence":  # a flag
        if values not in ([], ["true"], ["false"]):
            raise UserError(f"/set {name}: {' '.join(values)} given; it is true or false")
        return values == ["true"]
    try:
        return vars(parser.parse_args([part for value in values for part in (option, value)]))[name]
    except UserError as error:
        raise UserError(str(error).removesuffix("; see '/set --help'")) from error
