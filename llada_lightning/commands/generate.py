"""``llada generate``: answers of a checkpoint to prompts, printed, drawn, written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from llada_lightning.commands import model_options as shared
from llada_lightning.generation.prompts import Prompt, given_prompts, holds_gap, with_gaps
from llada_lightning.generation.sampling import DEFAULT_LENGTH, Generation, Sampling
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, require_replaceable
from llada_lightning.support.printing import people_console, visible

if TYPE_CHECKING:
    from rich.console import Console

    from llada_lightning.checkpoints import LanguageModel


def generate_parser() -> CommandParser:
    """The options of ``llada generate``."""
    parser = CommandParser(
        prog="llada generate",
        description="Answers of a checkpoint to prompts; on a terminal they unfold while they are denoised.",
    )
    shared.add_model_options(parser)
    add = parser.add_argument_group(
        "prompts", "without any, and nothing piped in, text is written from nothing"
    ).add_argument
    add(
        "--prompt",
        type=str,
        action="append",
        metavar="TEXT",
        help="may be given again; - reads one prompt from stdin, as does piping without any prompt",
    )
    add(
        "--prompts-file",
        type=str,
        metavar="FILE",
        help='.txt: one a line; .jsonl: {"prompt": "a text"} or {"prompt": [token ids]} a line',
    )
    add(
        "--infill",
        action="store_true",
        help="fill gaps anywhere in the prompts: [MASK:12] in a text is a gap of 12 tokens, [MASK] (or the tokenizer's "
        "own mask token) of one; the gaps say the length",
    )
    shared.add_sampling_options(parser.add_argument_group("sampling"))
    parser.add_argument("--batch-size", type=int | None, help="prompts at a time; by default all")
    add = parser.add_argument_group("output").add_argument
    add("--picture", type=str, metavar="FILE", help="draw the process, darker = later: .html, .svg")
    add("--out", type=str, metavar="FILE", help=".jsonl with one answer a line")
    add_json(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs ``llada generate`` with its arguments; returns the exit code.

    Answers go to stdout; the line of facts, which is no part of them, to stderr.

    Raises:
        UserError: an option, a file, the checkpoint or a prompt is not right.
    """
    options = vars(generate_parser().parse_args(argv))
    picture, out = _targets(options)
    given = given_prompts(options["prompt"] or [], options["prompts_file"])
    if options["batch_size"] is not None and options["batch_size"] < 1:
        raise UserError(f"--batch-size {options['batch_size']}: give at least 1, or leave it out")
    sampling = Sampling(**shared.given_settings(options), infill=options["infill"])
    lm = shared.load(options)
    prompts = given or [_nothing(lm, sampling)]
    if not options["infill"] and any(isinstance(prompt, str) and holds_gap(prompt) for prompt in prompts):
        _note("note: [MASK] in a prompt is read as plain text; --infill fills it")
    console = people_console()
    generation = _sample(lm, prompts, sampling, options["batch_size"], console, quiet=options["json"])
    if options["length"] is None and not options["infill"]:
        _note_length(lm, generation)
    if options["json"]:
        print_json(record(lm, options["checkpoint"], prompts, generation))
    else:
        _print_answers(lm, prompts, generation, console)
        _note(generation.facts, style="dim")
    if out is not None:
        _write_answers(out, record(lm, options["checkpoint"], prompts, generation))
    if picture is not None:
        _draw(picture, lm, prompts, generation)
    return 0


def _note(text: str, style: str | None = None) -> None:
    """Says something beside the answers."""
    people_console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _note_length(lm: LanguageModel, generation: Generation) -> None:
    length = generation.settings["length"]
    if length < DEFAULT_LENGTH:
        _note(f"note: --length {length}: the context of {lm.context_length} tokens leaves no more of {DEFAULT_LENGTH}")


def _targets(options: dict[str, Any]) -> tuple[Path | None, Path | None]:
    """Where the picture and the answers go, found out before the model is read."""
    picture = out = None
    if options["picture"] is not None:
        from llada_lightning.generation.drawing import check_drawing_path

        picture = check_drawing_path(options["picture"])
    if options["out"] is not None:
        out = expanded(options["out"])
        if out.suffix != ".jsonl" or out.is_dir() or not out.parent.is_dir():
            raise UserError(f"--out '{options['out']}': give a .jsonl file in a folder that exists")
        require_replaceable(out)
        if options["prompts_file"] and out.exists() and out.samefile(expanded(options["prompts_file"])):
            raise UserError(f"--out '{options['out']}' is the file of the prompts; choose another file")
    return picture, out


def _nothing(lm: LanguageModel, sampling: Sampling) -> Prompt:
    if sampling.infill:
        raise UserError("--infill: no prompt given; give a text with a gap, such as 'one [MASK:3] four'")
    return "" if lm.tokenizer is not None else []


def _sample(
    lm: LanguageModel,
    prompts: list[Prompt],
    sampling: Sampling,
    batch_size: int | None,
    console: Console,
    *,
    quiet: bool,
) -> Generation:
    from llada_lightning.generation.drawing import Aligner, Unfolding

    if sampling.infill and lm.tokenizer is not None and lm.mask_token_id is not None:
        mask_token = str(lm.tokenizer.id_to_token(lm.mask_token_id))
        prompts = [with_gaps(prompt, mask_token) if isinstance(prompt, str) else prompt for prompt in prompts]
    if quiet or not console.is_terminal:
        return shared.sample(lm, prompts, sampling, batch_size=batch_size)
    names, grows = [_shown(prompt) for prompt in prompts], sampling.strategy_for(lm) != "diffusion"
    with Unfolding(Aligner(lm.tokenizer), names, console, grows=grows) as unfolding:
        return shared.sample(lm, prompts, sampling, batch_size=batch_size, on_step=unfolding.observe)


def _shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def answers(generation: Generation) -> list[str]:
    """The text of each answer; its ids where there is no tokenizer."""
    return generation.text or [" ".join(map(str, ids)) for ids in generation.tokens]


def _print_answers(lm: LanguageModel, prompts: list[Prompt], generation: Generation, console: Console) -> None:
    """The answers; each below its prompt where there are several; in colour on a terminal."""
    from llada_lightning.generation.drawing import Aligner, coloured

    aligner = Aligner(lm.tokenizer)
    for i, (prompt, text) in enumerate(zip(prompts, answers(generation), strict=True)):
        if len(prompts) > 1:
            console.print(Text(f"[{i + 1}] {visible(_shown(prompt))}", "bold"), soft_wrap=True)
        if console.is_terminal:
            steps = generation.step_of_token[i]
            console.print(coloured(aligner, generation.tokens[i], steps, max(steps, default=0)))
        else:
            print(text, flush=True)


def record(lm: LanguageModel, checkpoint: str, prompts: list[Prompt], generation: Generation) -> dict[str, Any]:
    """Answers in plain values: what ``--json`` prints. Lists run over the prompts."""
    lists = {name: value for name, value in vars(generation).items() if name not in ("prompts", "settings")}
    return {
        "checkpoint": checkpoint,
        "objective": lm.objective,
        "settings": generation.settings,
        "prompts": prompts,
        "prompt_tokens": generation.prompts,
        **lists,
        "tokens_per_second": generation.tokens_per_second,
    }


def _write_answers(path: Path, whole: dict[str, Any]) -> None:
    """One line a prompt: what is its own, then what is common to all."""
    lists = ("prompts", "prompt_tokens", "text", "tokens", "step_of_token", "confidence", "finish")
    common = {name: whole[name] for name in ("checkpoint", "objective", "settings", "cache")}
    records = []
    for i in range(len(whole["prompts"])):
        own = {name: None if whole[name] is None else whole[name][i] for name in lists}
        records.append({"prompt": own.pop("prompts"), **own, **common})
    shared.write_lines(path, records)


def _draw(path: Path, lm: LanguageModel, prompts: list[Prompt], generation: Generation) -> None:
    from llada_lightning.generation.drawing import Aligner, Dialogue, answer, question, write_drawing

    aligner = Aligner(lm.tokenizer)
    turns = [[question(_shown(p)), answer(generation, i, aligner, lm.objective)] for i, p in enumerate(prompts)]
    write_drawing(path, [Dialogue(pair, generation.facts) for pair in turns])
