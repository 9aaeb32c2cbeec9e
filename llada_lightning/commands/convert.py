"""``llada convert``: the command around :func:`llada_lightning.checkpoints.convert.convert`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table

from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import people_console, warn

if TYPE_CHECKING:
    from llada_lightning.checkpoints.convert import Written
    from llada_lightning.checkpoints.stored_model import StoredModel

_KINDS = {
    "training": "training checkpoint",
    "llada": "inference checkpoint of llada-lightning",
    "hf-llada": "Hugging Face LLaDA",
    "hf-llama": "Hugging Face Llama",
}


def convert_parser() -> CommandParser:
    """The options of ``llada convert``."""
    parser = CommandParser(
        prog="llada convert",
        description="Writes a checkpoint of any kind as an inference checkpoint of ours, or for Hugging Face.",
    )
    parser.add_argument(
        "input",
        type=str,
        help="a run's folder (its last checkpoint), a training checkpoint, an inference checkpoint of ours, a Hugging "
        "Face LLaDA or Llama folder",
    )
    parser.add_argument("output", type=str, help="folder to write; it appears when it is complete")
    parser.add_argument(
        "--to",
        choices=("llada", "hf-llada", "hf-llama"),
        default="llada",
        help="ours; GSAI-ML/LLaDA-8B's layout (for llada); transformers' Llama (for arm)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; as stored by default, bit for bit"
    )
    parser.add_argument(
        "--tokenizer",
        type=str,
        help="to take instead of the checkpoint's: tokenizer.json, a folder with one, or a name on the hub",
    )
    parser.add_argument("--max-shard-size", type=str, default="5GB", help="of a file of weights, such as 200MB")
    parser.add_argument(
        "--push",
        type=str,
        metavar="USER/NAME",
        help="repository of the Hugging Face Hub to upload the folder to",
    )
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is not public")
    add_json(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs ``llada convert`` with its arguments; returns the exit code."""
    options = convert_parser().parse_args(argv)
    if options.private and options.push is None:
        raise UserError("--private: nothing is uploaded; add --push USER/NAME")
    from llada_lightning.checkpoints.convert import bytes_of, convert
    from llada_lightning.checkpoints.hub import check_push, push
    from llada_lightning.checkpoints.stored_model import open_checkpoint
    from llada_lightning.checkpoints.stored_tensors import dtype_named

    dtype, largest = dtype_named(options.dtype), bytes_of(options.max_shard_size)
    token = None if options.push is None else check_push(options.push)
    model = open_checkpoint(options.input, options.tokenizer)
    total = sum(weight.elements * (dtype or weight.dtype).itemsize for weight in model.weights.values())
    columns = ("{task.description}", BarColumn(bar_width=24), DownloadColumn(), TimeRemainingColumn())
    console = people_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing", total=total)
        out = expanded(options.output)
        written = convert(model, out, options.to, dtype, largest, lambda size: bar.advance(task, size))
    for note in _notes(model, options.to, written, out):
        warn(f"note: {note}")
    if options.push is not None:
        warn(
            f"note: the card (README.md of {options.push}) states no licence and does not describe the training data; "
            "add both"
        )
    pushed = None if token is None else push(out, options.push, token, options.private)
    if options.json:
        print_json(summary(model, options.to, written, options.output, pushed))
    else:
        people_console().print(_table(model, options.to, written, options.output, pushed))
    return 0


def summary(model: StoredModel, to: str, written: Written, out: str, pushed: str | None = None) -> dict[str, Any]:
    """What was read and written in plain values: what ``--json`` prints."""
    description, names = model.description, ("vocab_size", "context_length", "mask_token_id", "end_token_ids")
    return {
        "input": str(model.path),
        "was": model.kind,
        "output": out,
        "is": to,
        "objective": description.objective,
        "shape": vars(description.shape),
        **{name: getattr(description, name) for name in names},
        "tokenizer": model.tokenizer is not None,
        **vars(written),
        "pushed": pushed,
    }


def _table(model: StoredModel, to: str, written: Written, out: str, pushed: str | None) -> Table:
    table = Table(title=out, show_header=False)
    table.add_column("", style="bold")
    table.add_column("", overflow="fold")
    description = model.description
    shape, ends = vars(description.shape), ", ".join(map(str, description.end_token_ids))
    shards = [file for file in written.files if file.endswith(".safetensors")]
    others = [file for file in written.files if file not in shards]
    rows = {
        "was": f"{_KINDS[model.kind]}: {model.path}",
        "is": f"{_KINDS[to]}, {description.objective}",
        "shape": ", ".join(f"{key} {value}" for key, value in shape.items()),
        "tokens": f"vocabulary {description.vocab_size:,}, [MASK] {description.mask_token_id}, end {ends}",
        "tokenizer": "none" if model.tokenizer is None else model.tokenizer.name,
        "tensors": f"{written.tensors:,}",
        "parameters": f"{written.parameters:,}",
        "size": f"{decimal(written.bytes)}, {written.dtype}",
        "files": ", ".join([shards[0] if len(shards) == 1 else f"{len(shards)} of weights", *others]),
        **({} if pushed is None else {"pushed": pushed}),
    }
    for row in rows.items():
        table.add_row(*row)
    return table


def _notes(model: StoredModel, to: str, written: Written, out: Path) -> list[str]:
    """What others' programs will do differently with the model, and what they need besides."""
    from llada_lightning.checkpoints.card import CODE_FILES, CODE_TRANSFORMERS, TOKENIZER_TRANSFORMERS, code_command

    description = model.description
    notes = []
    if to != "llada" and description.mask_token_id is not None and description.compat is None:
        notes.append(
            f"this model was trained without a probability for [MASK] ({description.mask_token_id}); other programs "
            "must not let it be drawn" + (" (transformers' generate does not)" if to == "hf-llama" else "")
        )
    if to == "hf-llama" and description.start_token_id is not None and model.tokenizer is None:
        notes.append(
            f"this model was trained with token {description.start_token_id} before every sequence; other programs "
            "must put it there"
        )
    if to == "hf-llada" and not set(CODE_FILES) <= set(written.files):
        notes.append(
            f"transformers loads this folder with the authors' code, which is not ours to ship; fetch it with: "
            f"{code_command(shlex.quote(str(out)))} (in an environment of its own: transformers "
            f"{TOKENIZER_TRANSFORMERS} reads the tokenizer; the authors ask for {CODE_TRANSFORMERS}; their code was "
            "tried with neither)"
        )
    if model.tokenizer is None:
        notes.append("there is no tokenizer; give --tokenizer to add the model's")
    return notes
