"""``llada replay``: from argv to what was in one step of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.libraries import quiet_libraries
from llada_lightning.support.printing import people_console

if TYPE_CHECKING:
    from llada_lightning.training.replay import StepReplay

_LEAST_CHARACTERS, _OTHER_COLUMNS = 16, 72
"""The least characters of a sequence's text, and those of a line that the other columns take."""


def main(argv: list[str]) -> int:
    """``llada replay RUN_FOLDER --step S [--json] [-- FIT'S SETTINGS]``: a step trained again, its sequences shown."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = CommandParser(
        prog="llada replay",
        description="Train a run again in memory, from its nearest checkpoint to one step, and show what was in it: "
        "its loss and gradient norm, and each of its sequences. Nothing is written. After `--` come settings of "
        "`llada fit`, such as --trainer.accelerator=cpu.",
    )
    parser.add_argument("folder", type=str, metavar="RUN_FOLDER", help="of a run, or of one of its branches")
    parser.add_argument("--step", type=int, required=True, help="counted from 1, as in metrics.csv and faults.csv")
    add_json(parser)
    options = parser.parse_args(argv[:cut])
    quiet_libraries()
    from llada_lightning.training.replay import replay_step  # after the parser: --help answers at once

    replay = replay_step(Path(options.folder), options.step, argv[cut + 1 :])
    if options.json:
        print_json({"folder": options.folder, **asdict(replay)})
    else:
        _print(replay)
    return 0


def _print(replay: StepReplay) -> None:
    from rich.table import Table

    console = people_console()
    done = "update skipped" if replay.skipped else "update made"
    loss = f"{replay.loss:.6f}"
    named = f"surrogate loss {loss}" if replay.kind == "surrogate" else f"loss {loss} nats/token"
    console.print(
        f"step {replay.step}: {named}, gradient norm {replay.grad_norm:.6g}, learning rate {replay.lr:.4g}: {done}",
        soft_wrap=True,
    )
    if replay.seen_loss is not None and replay.seen_grad_norm is not None:
        console.print(f"the run saw: loss {replay.seen_loss:.6f}, gradient norm {replay.seen_grad_norm:.6g}")
    sources = list(dict.fromkeys(one.source for one in replay.sequences))
    console.print(f"from {', '.join(sources)}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for name in (
        "sequence",
        *["source"] * (len(sources) > 1),
        "item",
        "length",
        "t",
        "masked",
        "part of loss",
        "share",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("begins", no_wrap=True)
    characters = max(_LEAST_CHARACTERS, console.width - _OTHER_COLUMNS)
    for one in replay.sequences:
        table.add_row(
            str(one.ordinal),
            *[Path(one.source).name] * (len(sources) > 1),
            str(one.item),
            str(one.length),
            "" if one.t is None else f"{one.t:.4f}",
            "" if one.masked is None else str(one.masked),
            f"{one.loss:.4f}",
            f"{one.loss / replay.loss:.1%}" if one.finite else "not finite",
            " ".join(one.text.split())[:characters],
        )
    console.print(table)
