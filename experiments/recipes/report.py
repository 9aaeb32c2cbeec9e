"""The losses and compute multipliers of all recipes: `report.py RESULTS.csv [OUT]`.

It prints tables as Markdown and draws a figure into the folder OUT.
"""

from __future__ import annotations

import re
import sys

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.interpolate import PchipInterpolator

from llada_lightning.objectives import BLOCK_LENGTH
from llada_lightning.study.fits.runs import named_variants
from llada_lightning.study.plots.style import (
    INK,
    StudyFigure,
    dress,
    interval_bars,
    label_plain,
    new_figure,
    objective_styles,
    write_figure,
)
from llada_lightning.study.results import read_results
from llada_lightning.study.yardstick import with_yardstick, yardstick_names

REFERENCE, MASKED = "arm", "llada"
DRAWS = 4_000
BLOCK = re.compile(r"block \[block_length=(\d+)\]")


def best_of_recipes(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and deviation over the seeds, at the best learning rate of each recipe and budget.

    Of a recipe the rates with the most seeds are compared, by the mean over their seeds. Budgets are told apart by the
    FLOPs (6ND + attention + head), to a tenth of a power of ten.

    Args:
        results: A results table.

    Returns:
        By rising budget and loss, the columns ``objective`` (with its variant), ``budget`` (log10 of its FLOPs),
        ``lr``, ``mean``, ``std``, ``seeds``, ``tokens`` and ``flops_total``.
    """
    table = named_variants(results[results["status"] == "done"])
    table["budget"] = np.log10(table["flops_total"]).round(1)
    losses = table.groupby(["objective", "budget", "lr"], as_index=False).agg(
        mean=("val_nats_per_token", "mean"),
        std=("val_nats_per_token", "std"),
        seeds=("seed", "nunique"),
        tokens=("tokens", "mean"),
        flops_total=("flops_total", "mean"),
    )
    most = losses.groupby(["objective", "budget"])["seeds"].transform("max")
    losses = losses[losses["seeds"] == most]
    best = losses.loc[losses.groupby(["objective", "budget"])["mean"].idxmin()]
    return best.sort_values(["budget", "mean"], ignore_index=True)


def with_multipliers(best: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The FLOPs of each recipe over those with which ``arm`` reaches its loss, read off without a law.

    The losses of ``arm`` are joined by a monotone interpolation (PCHIP) of log FLOPs over the loss. The 95 % interval
    is that of draws of all losses with their standard errors over seeds, for which the deviation of a seed is pooled
    over all recipes of a budget.

    Args:
        best: What :func:`best_of_recipes` returns.
        seed: The seed of the draws.

    Returns:
        The rows, with ``multiplier``, ``low`` and ``high``, and the same over the multiplier of ``llada`` at the budget
        (``share``, ``share_low``, ``share_high``); NaN where ``arm`` does not reach the loss within its own budgets.
    """
    rng = np.random.default_rng(seed)
    variances = best.assign(sum=best["std"] ** 2 * (best["seeds"] - 1), dof=best["seeds"] - 1).groupby("budget")
    pooled = best["budget"].map(variances["sum"].sum() / variances["dof"].sum().clip(lower=1))
    errors = np.sqrt(pooled / best["seeds"]).to_numpy()
    means, flops = best["mean"].to_numpy(), best["flops_total"].to_numpy()
    reference = np.flatnonzero((best["objective"] == REFERENCE).to_numpy())
    drawn = np.vstack([means, means + errors * rng.standard_normal((DRAWS, len(best)))])
    found = np.array([flops / _flops_for(losses[reference], flops[reference], losses) for losses in drawn])
    masked = {budget: n for n, (name, budget) in enumerate(best[["objective", "budget"]].to_numpy()) if name == MASKED}
    of_masked = [masked.get(budget, -1) for budget in best["budget"]]
    shares = np.where(np.array(of_masked) < 0, np.nan, found / found[:, of_masked])
    columns = {"multiplier": found[0], "share": shares[0]}
    columns["low"], columns["high"] = _interval(found[1:])
    columns["share_low"], columns["share_high"] = _interval(shares[1:])
    return best.assign(**columns)


def _interval(drawn_SN: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """95 % intervals (N,); NaN where an end of one lies beyond the reference's budgets."""
    missing = np.isnan(drawn_SN)
    low, high = np.quantile(np.where(missing, np.inf, drawn_SN), [0.025, 0.975], axis=0, method="nearest")
    outside = missing.mean(axis=0) > 0.025
    return np.where(outside, np.nan, low), np.where(outside, np.nan, high)


def _flops_for(
    losses_R: npt.NDArray[np.float64], flops_R: npt.NDArray[np.float64], losses_N: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """(N,) FLOPs with which the reference reaches each loss; NaN outside of its own losses."""
    order = np.argsort(flops_R)
    falling = np.minimum.accumulate(losses_R[order])  # more FLOPs are never worse: the run of fewer could be taken
    kept = np.concatenate([[True], np.diff(falling) < 0])
    log_flops = PchipInterpolator(falling[kept][::-1], np.log(flops_R[order][kept][::-1]), extrapolate=False)
    return np.exp(log_flops(losses_N))


def table(best: pd.DataFrame, what: str) -> str:
    """The rows as Markdown, by rising budget and loss."""
    lines = [
        f"| FLOPs (6ND + attention + head) | recipe | rate | tokens | {what}, nats/token | seeds | multiplier | over "
        f"that of `{MASKED}` |"
    ]
    lines.append("|---" * 8 + "|")
    for row in best.itertuples():
        spread = "" if np.isnan(row.std) else f" ± {row.std:.3f}"
        cells = [f"{row.flops_total:.3g}", f"`{row.objective}`", f"{row.lr:.3g}", f"{row.tokens:.3g}"]
        cells += [f"{row.mean:.3f}{spread}", str(row.seeds), _told(row.multiplier, row.low, row.high)]
        lines.append("| " + " | ".join([*cells, _told(row.share, row.share_low, row.share_high)]) + " |")
    return "\n".join(lines)


def _told(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return ""
    return f"{value:.3g} " + ("(no interval)" if np.isnan(low) else f"({low:.3g} to {high:.3g})")


def by_block_length(bounds: pd.DataFrame, exact: pd.DataFrame, budgets: list[float], length: int) -> StudyFigure:
    """Loss at equal FLOPs, and compute multiplier, against the block length: by the bound and by the exact loss.

    Args:
        bounds, exact: What :func:`with_multipliers` returns, by the bound and by an exact loss.
        budgets: The budgets (log10 of their FLOPs), a colour each.
        length: The sequence length, which is the block length of ``llada``.
    """
    figure = new_figure(9.6, 3.9)
    axes = figure.subplots(1, 2)
    colours = [objective_styles([name])[name].color for name in ("llada", "arm")]
    for budget, colour in zip(budgets, colours, strict=True):
        arm = bounds[(bounds["objective"] == REFERENCE) & (bounds["budget"] == budget)]
        name = f"{arm['flops_total'].iloc[0]:.2g} FLOPs"
        axes[0].axhline(arm["mean"].iloc[0], color=colour, linestyle=":", linewidth=1.5, label=f"arm, {name}")
        for rows, marker, face, what in ((bounds, "s", "white", "bound"), (exact, "D", colour, "exact, random order")):
            own = _blocks(rows[rows["budget"] == budget], length)
            if own.empty:
                continue
            style = {"color": colour, "markerfacecolor": face, "markersize": 5.5, "capsize": 3}
            line = f"{marker}{'--' if what == 'bound' else '-'}"
            axes[0].errorbar(
                own["length"], own["mean"], yerr=own["std"].fillna(0), fmt=line, label=f"{what}, {name}", **style
            )
            bars = interval_bars(own["multiplier"], own["low"], own["high"])
            axes[1].errorbar(own["length"], own["multiplier"], yerr=bars, fmt=line, **style)
    for panel in axes:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_xlabel(f"block length (tokens; {length}: llada)", color=INK)
    label_plain(axes[0].yaxis)
    axes[0].set_ylabel("validation loss (nats/token)", color=INK)
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=20))
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set_ylabel("compute multiplier over arm", color=INK)
    for panel in axes:
        dress(panel)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _blocks(rows: pd.DataFrame, length: int) -> pd.DataFrame:
    """The rows of block diffusion and of `llada`, which is one block, with their block length, by rising length."""
    own = {"llada": length, "block": BLOCK_LENGTH}
    lengths = [int(found[1]) if (found := BLOCK.fullmatch(name)) else own.get(name, 0) for name in rows["objective"]]
    return rows.assign(length=lengths).query("length > 0").sort_values("length")


def main(path: str, out: str | None = None) -> None:
    results = read_results(path)
    bounds = with_multipliers(best_of_recipes(results))
    print(table(bounds, "validation loss"))
    measured = sorted({name for names in yardstick_names(results).values() for name in names})
    by_yardstick = {}
    for name in measured:
        has = results["objective"].map(lambda own, name=name: own == REFERENCE or name in yardstick_names(results)[own])
        exact, notes = with_yardstick(results[has].reset_index(drop=True), name)
        by_yardstick[name] = with_multipliers(best_of_recipes(exact))
        print(f"\nBy {name} ({'; '.join(notes)}):\n\n" + table(by_yardstick[name], f"exact loss by {name}"))
    if out is not None:
        budgets = sorted(bounds.loc[bounds["objective"] == "llada", "budget"].unique())
        empty = bounds.iloc[:0]
        print(
            write_figure(by_block_length(bounds, by_yardstick.get("random_order@1", empty), budgets, 64), out, "blocks")
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
