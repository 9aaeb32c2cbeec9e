"""What `llada generate`, `chat`, `evaluate` and `score` share: options of the model and of the sampler, and `--out`."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from llada_lightning.generation.sampling import Sampling, choices_of_settings
from llada_lightning.support.command_line import CommandParser, unescaped
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import require_replaceable, strict_json, written_atomically
from llada_lightning.support.printing import people_console

if TYPE_CHECKING:
    from rich.console import Console

    from llada_lightning.checkpoints import LanguageModel
    from llada_lightning.evaluation.policy import Policy
    from llada_lightning.generation.sampling import Generation

DTYPES = ("float32", "bfloat16", "float16")

SAMPLING = tuple(field.name for field in fields(Sampling) if field.name != "infill")
"""The settings of the sampler that are options. Gaps are another kind of prompt, which only `generate` takes."""


def add_model_options(parser: CommandParser) -> None:
    """Adds the options that say which model, and where it runs."""
    parser.add_argument(
        "checkpoint",
        type=str,
        metavar="CKPT",
        help="run folder, .ckpt, folder of `llada convert`, or Hugging Face folder of LLaDA or Llama",
    )
    add = parser.add_argument_group("model").add_argument
    add("--tokenizer", type=str, help="instead of the checkpoint's: tokenizer.json, folder")
    add("--device", type=str, help="cpu, cuda, cuda:1 …; by default a GPU where there is one")
    add("--dtype", choices=DTYPES, help="of the weights; by default as they are stored")


def add_sampling_options(group: Any, names: Iterable[str] = SAMPLING, *, unset: bool = False) -> None:
    """Adds an option for each named setting of :class:`Sampling`, with its type, its default and its text.

    Where they are ``unset``, options have no defaults, so that only what a user gives is set.
    """
    types, choices, defaults = get_type_hints(Sampling), choices_of_settings(), vars(Sampling())
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(Sampling) or "", re.MULTILINE)
    texts = {name: " ".join(text.split()).replace("`", "").removesuffix(".") for name, text in entries}
    for name in names:
        default = None if unset else defaults[name]
        text = re.sub(r"[;.] [Bb]y default [^.]*", "", texts[name]) if unset else texts[name]
        kind: dict[str, Any] = {"type": types[name] | None if unset else types[name]}
        if name in choices:
            kind = {"choices": choices[name]}
        elif types[name] is bool:
            kind, default = {"action": "store_true"}, False
        elif name == "stop":
            kind, default = {"type": str, "action": "append", "metavar": "TEXT"}, None
        group.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **kind)


def given_settings(options: Mapping[str, Any], names: Iterable[str] = SAMPLING) -> dict[str, Any]:
    """The settings of the sampler that the options say, by their names in :class:`Sampling`."""
    settings = {name: options[name] for name in names if options[name] is not None and options[name] is not False}
    if "stop" in settings:
        settings["stop"] = [unescaped(text) for text in settings["stop"]]
    return settings


def load(options: Mapping[str, Any]) -> LanguageModel:
    """The model that the options name."""
    from llada_lightning.checkpoints.language_model import load_model

    return load_model(
        options["checkpoint"], tokenizer=options["tokenizer"], device=options["device"], dtype=options["dtype"]
    )


def sample(
    lm: LanguageModel, prompts: Any, sampling: Sampling, names: Sequence[str], console: Console | None, **more: Any
) -> Generation:
    """Calls ``generate``; on a terminal the answers are shown while they are sampled, each of several below its name.

    The seed holds for the authors' released sampler (``compat``) too, which draws from torch's global generator.
    """
    import torch

    from llada_lightning.generation.drawing import Aligner, Unfolding
    from llada_lightning.generation.sampler import generate

    if sampling.compat is not None:
        torch.manual_seed(sampling.seed)
    if console is None or not console.is_terminal:
        return generate(lm, prompts, sampling, **more)
    grows = sampling.strategy_for(lm) != "diffusion"
    with Unfolding(Aligner(lm.tokenizer), names, console, grows=grows) as unfolding:
        return generate(lm, prompts, sampling, on_step=unfolding.observe, **more)


def print_answer(lm: LanguageModel, generation: Generation, index: int, console: Console) -> None:
    """An answer on stdout; on a terminal each token in the colour of its step. Without a tokenizer its ids."""
    from llada_lightning.generation.drawing import Aligner, coloured

    tokens, steps = generation.tokens[index], generation.step_of_token[index]
    if console.is_terminal:
        console.print(coloured(Aligner(lm.tokenizer), tokens, steps, max(steps, default=0)))
    else:
        print(" ".join(map(str, tokens)) if generation.text is None else generation.text[index], flush=True)


def note(text: str, style: str | None = None) -> None:
    """Says something beside the answers, on stderr."""
    people_console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def check_out(command: str, out: Path) -> None:
    """Raises UserError, before hours of work, where results cannot be written to the file of `--out`."""
    require_replaceable(out)
    folder = Path(os.path.realpath(out)).parent  # a link's own folder does not matter
    if not folder.is_dir():
        raise UserError(f"{command}: --out {out}: there is no folder {folder}; make it, or choose another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{command}: --out {out} cannot be written into {folder}; choose another file")


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes the file of `--out`, a JSON object a line; raises UserError where the system refuses it."""
    lines = [json.dumps(strict_json(record), allow_nan=False, ensure_ascii=False) + "\n" for record in records]
    try:
        with written_atomically(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out '{path}' cannot be written ({error.strerror}); choose another file") from error


def add_policy_options(group: Any) -> None:
    """Adds `--policy` and `--tokens-per-step` to a group of likelihoods."""
    from llada_lightning.evaluation.policy import NAMES

    group.add_argument(
        "--policy",
        type=str | None,
        help=f"exact likelihood of decoding by a policy instead of the bound (llada): {', '.join(NAMES)}",
    )
    group.add_argument("--tokens-per-step", type=int | None, help="tokens that a step of --policy reveals; 1")


def chosen_policy(command: str, options: Any) -> Policy | None:
    """The policy that `--policy` and `--tokens-per-step` name.

    Raises:
        UserError: There is none of this name, or one of the options has no effect.
    """
    from llada_lightning.evaluation.policy import Policy

    if options.policy is None and options.tokens_per_step is not None:
        raise UserError(f"{command}: --tokens-per-step does nothing without --policy; give one, or leave it out")
    if options.policy is None:
        return None
    return Policy(options.policy, 1 if options.tokens_per_step is None else options.tokens_per_step)
