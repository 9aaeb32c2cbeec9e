"""The rules of a tuning study, as ``llada curves --rules`` prints them."""

from __future__ import annotations

from rich.table import Table

from llada_lightning.study.fits import Estimate
from llada_lightning.study.fits.rules import TuningFits
from llada_lightning.study.tables.style import captioned, flops_text, interval_short, short_shape, titled
from llada_lightning.support.printing import people_console

EDGE = "‡"


def print_rules(fits: TuningFits, files: list[str]) -> None:
    """Prints the optimal rate and batch of every budget of a tuning study, and their laws."""
    console = people_console()
    console.print(rules_table(fits))
    console.print()
    for line in law_lines(fits):
        console.print(line, highlight=False, soft_wrap=True)
    notes = [*fits.notes, *(note for own in fits.objectives.values() for note in own.notes)]
    if notes:
        console.print("To note:")
    for note in notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    console.print(f"-> {', '.join(files)}", soft_wrap=True)


def rules_table(fits: TuningFits) -> Table:
    """The optimum of every budget and shape; one that is not inside of its grid is marked."""
    printed = titled(
        "Lowest loss over rates and batches (budgets by 6ND; intervals at 95 %)",
        *("objective", "budget ", "shape", "rate", "", "batch", "", "loss"),
    )
    for name, rules in fits.objectives.items():
        for own in rules.optima:
            rate, batch = own.lr, own.batch
            batches = Estimate(*(value / fits.sequence_length for value in (batch.value, batch.low, batch.high)))
            printed.add_row(
                *(name, flops_text(own.flops), short_shape(own.shape), f"{rate.value:.2g}{'' if own.inside else EDGE}"),
                f"({interval_short(rate)})",
                f"{batches.value:.3g}",
                f"({interval_short(batches)})" if own.batch_varied else "",
                f"{own.loss.value:.3f}",
            )
        printed.add_section()
    marked = any(not own.inside for rules in fits.objectives.values() for own in rules.optima)
    return captioned(printed, f"batches in sequences{f'; {EDGE} not inside of the grid' if marked else ''}")


def law_lines(fits: TuningFits) -> list[str]:
    """The laws in words, with the intervals of value and exponent."""
    lines = []
    for name, rules in fits.objectives.items():
        laws = (("rate", "C", rules.lr_law, 1), ("batch", "D", rules.batch_law, fits.sequence_length))
        for what, symbol, law, unit in laws:
            if law is not None:
                value = Estimate(*(end / unit for end in (law.a, *law.interval_a)))
                unit_name = "" if unit == 1 else " sequences"
                lines.append(
                    f"{name}: {what} = {value.value:.3g} ({interval_short(value)}){unit_name} × "
                    f"({symbol} / {flops_text(law.c0)})^{law.b:.3f} ({interval_short(law.exponent)})"
                )
    return lines
