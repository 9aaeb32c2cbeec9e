"""``llada generate``: answers of a checkpoint to prompts, printed, drawn, written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from llada_lightning.commands import shared
from llada_lightning.generation.prompts import Prompt, given_prompts, holds_gap, with_gaps
from llada_lightning.generation.sampling import DEFAULT_LENGTH, Generation, Sampling
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import people_console, visible

if TYPE_CHECKING:
    from llada_lightning.checkpoints import LanguageModel


def generate_parser() -> CommandParser:
    """The options of ``llada generate``."""
    parser = CommandParser(
        prog="llada generate",
        description="Answers of a checkpoint to prompts; on a terminal they unfold while they are denoised.",
    )
    shared.add_model_options(parser)
    nothing = "without any, and nothing piped in, text is written from nothing"
    add = parser.add_argument_group("prompts", nothing).add_argument
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
    """
    options = vars(generate_parser().parse_args(argv))
    picture, out = _targets(options)
    given = given_prompts(options["prompt"] or [], options["prompts_file"])
    if options["batch_size"] is not None and options["batch_size"] < 1:
        raise UserError(f"--batch-size {options['batch_size']}: give at least 1, or leave it out")
    sampling = Sampling(**shared.given_settings(options), infill=options["infill"])
    if not given and sampling.infill:
        raise UserError("--infill: no prompt given; give a text with a gap, such as 'one [MASK:3] four'")
    lm = shared.load(options)
    prompts: list[Prompt] = given or ["" if lm.tokenizer is not None else []]
    filled = prompts
    if sampling.infill and lm.tokenizer is not None and lm.mask_token_id is not None:
        mask_token = str(lm.tokenizer.id_to_token(lm.mask_token_id))
        filled = [with_gaps(prompt, mask_token) if isinstance(prompt, str) else prompt for prompt in prompts]
    elif not sampling.infill and any(isinstance(prompt, str) and holds_gap(prompt) for prompt in prompts):
        shared.note("note: [MASK] in a prompt is read as plain text; --infill fills it")
    console, size = people_console(), options["batch_size"]
    names = [prompt if isinstance(prompt, str) else " ".join(map(str, prompt)) for prompt in prompts]
    generation = shared.sample(lm, filled, sampling, names, None if options["json"] else console, batch_size=size)
    length, room = generation.settings["length"], lm.context_length
    if options["length"] is None and not sampling.infill and length < DEFAULT_LENGTH:
        shared.note(f"note: --length {length}: the context of {room} tokens leaves no more of {DEFAULT_LENGTH}")
    whole = record(lm, options["checkpoint"], prompts, generation)
    if options["json"]:
        print_json(whole)
    else:
        for index, name in enumerate(names):
            if len(names) > 1:
                console.print(Text(f"[{index + 1}] {visible(name)}", "bold"), soft_wrap=True)
            shared.print_answer(lm, generation, index, console)
        shared.note(generation.facts, style="dim")
    if out is not None:
        _write_answers(out, whole)
    if picture is not None:
        from llada_lightning.generation.drawing import Aligner, Dialogue, answer, question, write_drawing

        aligner = Aligner(lm.tokenizer)
        turns = [[question(name), answer(generation, i, aligner, lm.objective)] for i, name in enumerate(names)]
        write_drawing(picture, [Dialogue(pair, generation.facts) for pair in turns])
    return 0


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
        shared.check_out("generate", out)
        if options["prompts_file"] and out.exists() and out.samefile(expanded(options["prompts_file"])):
            raise UserError(f"--out '{options['out']}' is the file of the prompts; choose another file")
    return picture, out


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
