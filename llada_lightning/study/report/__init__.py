"""The report of a study: one page with its verdict, figures, tables, settings and limits, as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from rich.table import Table

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.study.fits import NO_COMMON_LOSS, StudyFits
from llada_lightning.study.names import table_with_short_names, variant_settings, with_short_names
from llada_lightning.study.report.facts import (
    flops_counting,
    gathered,
    left_out_table,
    limits,
    loss_counting,
    provenance_table,
    settings_table,
    variants_table,
)
from llada_lightning.study.report.figures import Drawing, drawings
from llada_lightning.study.report.verdict import verdict, verdict_without_fits
from llada_lightning.study.tables.study import (
    held_out_table,
    judged_lines,
    multipliers_table,
    notes_by,
    optima_table,
    parameters_table,
    runs_table,
)
from llada_lightning.study.tables.style import with_short_powers


@dataclass(frozen=True)
class Source:
    """Where the numbers of a report are from."""

    title: str
    created: str
    """The time of writing, UTC."""
    versions: Mapping[str, str]
    """The versions of this package, of Python and of the libraries of fits and figures."""
    table: str
    """The name of the results table."""
    hashes: Mapping[str, str]
    """File -> its SHA-256."""
    command: str
    """The command that makes the same fits of the table."""
    collected: Sequence[str] | None = None
    """What was found beside sound results where the table was collected for the report; None: it was given."""
    unfinished: str | None = None
    """How many of the study's runs are done, as a sentence; None where all are, or where that is not known."""


@dataclass(frozen=True)
class Report:
    """The content of a report, in the order of the page. Empty parts are left out of it."""

    source: Source
    verdict: tuple[str, ...]
    figures: list[Drawing]
    headlines: list[str]
    """What the methods say of each pair and way of counting FLOPs, in words."""
    multipliers: list[Table]
    fits: list[Table]
    refused: dict[str, list[str]]
    """A heading -> what was refused, left out or doubted, and why."""
    left_out: Table
    flops: list[tuple[str, str]]
    losses: list[tuple[str, str]]
    settings: list[Table]
    limits: list[str]
    runs: Table | None
    """All usable runs; None where there are none."""


def make_report(table: pd.DataFrame, fits: StudyFits | None, convention: Convention, source: Source) -> Report:
    """The report of a results table, in which variants have their short names.

    Args:
        table: The table that was fitted.
        fits: The fits of the table; None where it has no finished run with a finite loss.
        convention: The convention by which figures and laws count FLOPs. Multipliers are shown by all.
        source: Where the table is from.
    """
    variants = variants_table(variant_settings(table))
    table, fits = (table_with_short_names(table), None) if fits is None else with_short_names(table, fits)
    tables: tuple[list[Table], list[Table]] = ([], [])
    if fits is not None:
        laws = (optima_table(fits, convention), parameters_table(fits, convention), held_out_table(fits, convention))
        conventions = fits.conventions if fits.reference else ()
        multipliers = [multipliers_table(fits, name, own_budgets=own) for name in conventions for own in (False, True)]
        tables = multipliers, list(laws)
    said = verdict_without_fits(table) if fits is None else verdict(table, fits, convention)
    return Report(
        source=source,
        verdict=(*([source.unfinished] if source.unfinished else []), *said),
        figures=[] if fits is None else drawings(table, fits, convention),
        headlines=[] if fits is None else _answers(fits),
        multipliers=[own for own in tables[0] if own.row_count],
        fits=[own for own in tables[1] if own.row_count],
        refused=_refused(fits, convention, source),
        left_out=left_out_table(table),
        flops=flops_counting(table),
        losses=loss_counting(table, fits),
        settings=[*([variants] if variants.row_count else []), settings_table(table), provenance_table(table)],
        limits=limits(table, fits, source.collected is not None),
        runs=None if fits is None else runs_table(table, convention, whole=True),
    )


def _answers(fits: StudyFits) -> list[str]:
    """What is said in words by every convention, each sentence once."""
    words = [line for name in fits.conventions for line in fits.answers(name)]
    return [with_short_powers(line) for line in dict.fromkeys(words)]


def _refused(fits: StudyFits | None, convention: Convention, source: Source) -> dict[str, list[str]]:
    """What was refused, left out or doubted, by heading."""
    found: dict[str, list[str]] = {}
    if fits is not None:
        names = list(fits.objectives)
        notes = gathered(notes_by(fits, convention), names)
        found["No common loss"] = [note for note in notes if note.startswith(NO_COMMON_LOSS)]
        for counted in fits.conventions:
            found[f"Multipliers by {CONVENTION_NAMES[counted]}"] = judged_lines(fits, counted)
        found["Notes of the fits"] = [note for note in notes if not note.startswith(NO_COMMON_LOSS)]
    found["Found when the runs were collected"] = list(source.collected or [])
    return {heading: lines for heading, lines in found.items() if lines}
