"""``llada curves``: from a results table to fits, figures and a table for people."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from llada_lightning.command_line import CommandParser, add_json, people_console, print_json
from llada_lightning.errors import UserError
from llada_lightning.files import write_json
from llada_lightning.scaling.fits import (
    MIN_BUDGETS,
    OBJECTIVES,
    UNIT_NAMES,
    UNITS,
    Fits,
    best_of_budgets,
    budget_groups,
    fit_table,
    flops_column,
    losses,
    usable_runs,
)
from llada_lightning.scaling.flops import CONVENTION_NAMES, CONVENTIONS, Convention
from llada_lightning.scaling.results import read_results
from llada_lightning.scaling.shapes import format_count


def curves_command(argv: list[str]) -> int:
    """``llada curves results.csv --out DIR``: a results table -> ``fits.json``, ``scaling.png`` and a table of runs.

    Raises:
        UserError: the table cannot be read, or holds no usable run, or losses that cannot be compared.
    """
    parser = CommandParser(prog="llada curves", description="Fit and draw loss against training FLOPs.")
    parser.add_argument("results", type=str, metavar="RESULTS", help="table that `llada collect` wrote")
    parser.add_argument("--out", type=str, required=True, metavar="DIR", help="folder of fits.json and scaling.png")
    parser.add_argument(
        "--convention", choices=CONVENTIONS, default="6nd", help="FLOPs counted: 6ND, or with attention and head"
    )
    parser.add_argument("--unit", choices=UNITS, default="nats_per_token", help="unit of the loss")
    parser.add_argument("--samples", type=int, default=4000, help="bootstrap draws")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    add_json(parser)
    options = parser.parse_args(argv)
    if options.samples < 100:
        raise UserError(f"curves: --samples is {options.samples}; 95 % intervals need at least 100")
    table = read_results(options.results)
    fits = fit_table(table, options.convention, options.unit, samples=options.samples, seed=options.seed)
    left_out = len(table) - len(usable_runs(table))
    if left_out:
        people_console(stderr=True).print(f"{left_out} of {len(table)} rows left out: not done, or no finite loss")
    files = _write_curves(table, fits, Path(options.out))
    if options.json:
        print_json({**files, "left_out": left_out, **fits.as_dict()})
    else:
        _print_curves(table, fits, files)
    return 0


def _write_curves(table: pd.DataFrame, fits: Fits, folder: Path) -> dict[str, str]:
    from llada_lightning.scaling.plots import scaling_curve  # matplotlib takes a second to import

    fits_path, figure_path = folder / "fits.json", folder / "scaling.png"
    write_json(fits_path, fits.as_dict())
    scaling_curve(table, fits, figure_path, fits.convention, fits.unit)
    return {"fits": str(fits_path), "figure": str(figure_path)}


def _print_curves(table: pd.DataFrame, fits: Fits, files: dict[str, str]) -> None:
    console = people_console()
    console.print(runs_table(table, fits.convention), end="\n\n")
    for objective, fit in fits.envelopes.items():
        if fit.law is None:
            console.print(
                f"{objective}: no fit, budgets on the envelope: {len(fit.points)}; at least {MIN_BUDGETS} are needed"
            )
            continue
        low, high = fit.law.interval_b
        law = f"{fit.law.a:.3f} {UNIT_NAMES[fits.unit]} x (C / {fit.law.c0:.3g})^-{fit.law.b:.4f}"
        console.print(f"{objective}: loss = {law}, exponent's 95 % interval {low:.4f} to {high:.4f}", soft_wrap=True)
    for entry in fits.compute_multiplier:
        console.print(
            f"compute multiplier of llada at arm's {entry.arm_flops:.3g} FLOPs ({CONVENTION_NAMES[entry.convention]}): "
            f"{entry.multiplier:.2f}, 95 % interval {entry.low:.2f} to {entry.high:.2f}",
            soft_wrap=True,
        )
    if len(fits.envelopes) == len(OBJECTIVES) and not fits.compute_multiplier:
        console.print("compute multiplier: none, the fits are missing or reach no common loss")
    console.print(f"-> {escape(files['fits'])}, {escape(files['figure'])}", soft_wrap=True)


def runs_table(table: pd.DataFrame, convention: Convention = "6nd") -> Table:
    """The usable runs as a table for people (80 columns wide), the best of each objective's budgets marked."""
    title = f"Budgets in training FLOPs ({CONVENTION_NAMES[convention]})"
    picture = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), show_edge=False)
    picture.add_column("objective", no_wrap=True)
    picture.add_column("shape", overflow="fold")
    for name in ("budget", "N", "tokens", "loss ± s.e."):
        picture.add_column(name, justify="right", no_wrap=True)
    picture.add_column("kind", no_wrap=True)
    for name in ("bits/byte", "tokens/s"):
        picture.add_column(name, justify="right", no_wrap=True)
    picture.add_column("best", no_wrap=True)
    runs = usable_runs(table)
    for objective in OBJECTIVES:
        members = _in_order(runs[runs["objective"] == objective], convention)
        best = set(best_of_budgets(members, convention, "nats_per_token"))
        for row in range(len(members)):
            picture.add_row(*_row(members.iloc[row], convention), "best" if row in best else "")
        picture.add_section()
    return picture


def _in_order(runs: pd.DataFrame, convention: Convention) -> pd.DataFrame:
    """By budget, then by size: the FLOPs themselves differ within a budget by a part of a step."""
    ordered = runs.assign(_budget=budget_groups(runs[flops_column(convention)]))
    return ordered.sort_values(["_budget", "params_nonembedding"], ignore_index=True)


def _row(run: Any, convention: Convention) -> list[str]:
    loss, stderr = (values[0] for values in losses(run.to_frame().T, "nats_per_token"))
    return [
        run["objective"],
        escape(str(run["shape"])),
        f"{run[flops_column(convention)]:.1e}".replace("e+", "e"),
        format_count(run["params_nonembedding"]),
        format_count(run["tokens"]),
        f"{loss:.3f} ± {stderr:.3f}" if math.isfinite(stderr) else f"{loss:.3f}",
        run["val_kind"],
        f"{run['val_bits_per_byte']:.3f}",
        f"{run['tokens_per_second']:,.0f}",
    ]
