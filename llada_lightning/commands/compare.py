"""``llada compare``: from argv to the difference of two results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llada_lightning.data.manifest import FEW_DOCUMENTS
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import people_console

if TYPE_CHECKING:
    from llada_lightning.study.compare import Compared, Comparison, Difference
    from llada_lightning.study.results import Row


def main(argv: list[str]) -> int:
    """``llada compare RUN RUN [--json]``: the paired difference of two validation losses, A minus B, with its error."""
    parser = CommandParser(
        prog="llada compare",
        description="The difference of two validation losses, A minus B, with its standard error over the documents "
        "that both were validated on: in total, for each source of a mixture, and for each held-out corpus.",
    )
    which = "two run folders, or FOLDER/RESULT where one holds several; the second loss is taken off the first"
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN", help=which)
    add_json(parser)
    options = parser.parse_args(argv)
    if len(options.runs) != 2:
        raise UserError(f"compare: {len(options.runs)} result{'s' * (len(options.runs) != 1)} given; give two")
    from llada_lightning.study.compare import compare, find_result  # after the parser: --help answers at once

    comparison = compare(*map(find_result, options.runs))
    if options.json:
        print_json(comparison.as_dict())
    else:
        _print(comparison)
    return 0


def _print(comparison: Comparison) -> None:
    from rich.table import Table

    console = people_console()
    for letter, row in (("A", comparison.a), ("B", comparison.b)):
        console.print(f"{letter}: {_described(row)}", soft_wrap=True)
    console.print(f"{comparison.kind_note}; the intervals are of 95 %", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("", "A", "B", "A - B", "interval"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for corpus in comparison.corpora:
        title = "total" if corpus.name is None else f"{corpus.of} {corpus.name}"
        for unit, difference in (("nats/token", corpus.nats_per_token), ("bits/byte", corpus.bits_per_byte)):
            if difference is not None:
                table.add_row(title, unit, *_cells(difference))
                title = ""
    console.print(table)
    for corpus in comparison.corpora:
        console.print(_pairing(corpus), soft_wrap=True)
    for name, reason in comparison.left_out.items():
        console.print(f"{name} is not compared: {reason}", soft_wrap=True)


def _described(row: Row) -> str:
    """A result in a line: its name, its steps, and what kind of loss it has."""
    record = row.record
    variant = f" ({record['variant']})" if record["variant"] else ""
    spent = "" if record["flops_6nd"] is None else f", {record['flops_6nd']:.3g} FLOPs (6ND)"
    return (
        f"{row.folder}, {record['steps']} steps of {record['objective']} {record['shape']}{variant}{spent}, "
        f"loss {record['val_kind']}"
    )


def _cells(difference: Difference) -> list[str]:
    error = "n/a" if difference.stderr is None else f"{difference.stderr:.4f}"
    interval = "" if difference.interval is None else "{:+.4f} to {:+.4f}".format(*difference.interval)
    return [f"{difference.a:.4f}", f"{difference.b:.4f}", f"{difference.difference:+.4f} ± {error}", interval]


def _pairing(corpus: Compared) -> str:
    """What the documents are that the results share, and what the pairing of them is worth."""
    name = "total" if corpus.name is None else f"{corpus.of} {corpus.name}"
    nats, plural = corpus.nats_per_token, "s" * (corpus.documents != 1)
    line = f"{name}: the same {corpus.documents} document{plural} ({corpus.sequences} sequences)"
    if nats.unpaired_stderr is not None:
        gain = "" if nats.gain is None else f", {nats.gain:.2g} times as much"
        line += f"; unpaired, the error would be {nats.unpaired_stderr:.4f} nats/token{gain}"
    few = corpus.documents < FEW_DOCUMENTS
    return f"{line}; so few documents tell little of the error" if few else line
