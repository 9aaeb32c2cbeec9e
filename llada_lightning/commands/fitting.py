"""What `llada curves` and `llada report` share: the options of the fits, and from a results table to its fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from llada_lightning.compute.flops import CONVENTION_NAMES, CONVENTIONS
from llada_lightning.objectives import REFERENCE
from llada_lightning.support.command_line import CommandParser, add_draws
from llada_lightning.support.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from llada_lightning.study.fits import StudyFits

PUBLISHED = "published"
"""In place of a table's path: the published isoFLOP study that the package holds."""


@dataclass(frozen=True)
class ReadTable:
    """A results table with the losses by its yardstick, and the covariance of them."""

    table: pd.DataFrame
    covariance: pd.DataFrame | None
    """None where no file beside the table holds it."""
    covariance_file: Path | None
    notes: list[str]
    """What the yardstick and the FLOPs of the weights that runs started from changed."""


def add_fit_options(parser: CommandParser) -> None:
    """Adds the options of the fits: what is counted, compared and held equal, in which unit, and the draws."""
    parser.add_argument(
        "--convention",
        choices=CONVENTIONS,
        default="6nd",
        help="FLOPs that are drawn and printed: 6ND, or with attention and head; the fits are made by both",
    )
    parser.add_argument(
        "--reference",
        type=str,
        metavar="OBJECTIVE",
        help=f"objective that compute multipliers divide by (default: {REFERENCE}); with its variant in brackets "
        "where the results hold several",
    )
    parser.add_argument(
        "--yardstick",
        type=str,
        metavar="NAME",
        help="loss that is held equal: that under a decoding policy which runs have measured, such as confidence@1 "
        "(default: the validation loss)",
    )
    parser.add_argument(
        "--source-flops",
        action="store_true",
        help="count the training FLOPs, by 6ND, of the weights that runs start from (model.weights), too",
    )
    parser.add_argument(
        "--unit", choices=("nats_per_token", "bits_per_byte"), default="nats_per_token", help="unit of the loss"
    )
    add_draws(parser)


def read_table(results: str, yardstick: str | None = None, source_flops: bool = False) -> ReadTable:
    """Reads a results table, or the published one, and the covariance file beside it.

    Raises:
        UserError: One of the files cannot be read, or the table lacks losses by the yardstick.
    """
    from llada_lightning.study.fits.runs import with_source_flops
    from llada_lightning.study.results import covariance_path, read_covariance, read_results
    from llada_lightning.study.yardstick import with_yardstick

    path: Path | None = None
    if results == PUBLISHED:
        from llada_lightning.study.reference import published_isoflop

        table = published_isoflop()
    else:
        table, path = _with_scores(read_results(results)), covariance_path(Path(results), yardstick)
    table, notes = (table, []) if yardstick is None else with_yardstick(table, yardstick)
    table, of_sources = with_source_flops(table, source_flops)
    file = path if path is not None and path.is_file() else None
    return ReadTable(table, None if file is None else read_covariance(file), file, [*notes, *of_sources])


def _with_scores(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the scores of its ``task_`` columns as numbers."""
    import pandas as pd

    scores = {}
    for column in table.columns[table.columns.str.startswith("task_")]:
        try:
            scores[column] = pd.to_numeric(table[column]).astype(float)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"results: {column} holds values that are no numbers ({reason}); correct the table"
            ) from error
    return table.assign(**scores)


def unfinished(results: str) -> str | None:
    """How many of a study's runs are done, as a sentence, where the sweep's file lies beside its table; None if all."""
    from llada_lightning.study.collect import gather
    from llada_lightning.study.sweep import COPY_SUFFIX

    folder = Path(results).parent
    beside = results != PUBLISHED and any(folder.glob(f"*{COPY_SUFFIX}"))
    return gather([folder]).report.missing if beside else None


def fits_of(verb: str, read: ReadTable, options: Namespace) -> StudyFits:
    """The fits of a table by the options of ``add_fit_options``.

    Raises:
        UserError: The table cannot be fitted, or lacks the FLOPs of the convention; it names the verb.
    """
    from llada_lightning.study.fits import fit_table

    how = {name: options[name] for name in ("unit", "samples", "seed", "reference")}
    fits = fit_table(read.table, covariance=read.covariance, **how)
    if options.convention not in fits.conventions:
        counted = " and ".join(fits.conventions)
        name = CONVENTION_NAMES[options.convention]
        raise UserError(f"{verb}: --convention {options.convention}: the table lacks FLOPs by {name}; it has {counted}")
    return replace(fits, notes=[*read.notes, *fits.notes])
