"""The losses of each recipe at its better learning rate: `table.py RESULTS.csv`, Markdown on stdout."""

from __future__ import annotations

import sys

import pandas as pd

from llada_lightning.study.fits.runs import named_variants
from llada_lightning.study.results import read_results


def best_of_recipes(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and deviation over the seeds at the better rate of each recipe and budget, by rising loss.

    Args:
        results: A results table of runs with two budgets each.

    Returns:
        The columns ``objective`` (with its variant), ``budget`` (its number, from 0), ``lr``, ``mean``, ``std``,
        ``seeds``, ``tokens`` and ``flops_total``.
    """
    table = named_variants(results[results["status"] == "done"]).sort_values("steps")
    table["budget"] = table.groupby(["objective", "lr", "seed"]).cumcount()
    losses = table.groupby(["objective", "budget", "lr"], as_index=False).agg(
        mean=("val_nats_per_token", "mean"),
        std=("val_nats_per_token", "std"),
        seeds=("seed", "nunique"),
        tokens=("tokens", "mean"),
        flops_total=("flops_total", "mean"),
    )
    best = losses.loc[losses.groupby(["objective", "budget"])["mean"].idxmin()]
    return best.sort_values(["budget", "mean"], ignore_index=True)


def main(path: str) -> None:
    print("| FLOPs (6ND + attention + head) | recipe | learning rate | tokens | nats/token | seeds |")
    print("|---|---|---|---|---|---|")
    for row in best_of_recipes(read_results(path)).itertuples():
        loss = f"{row.mean:.3f} ± {row.std:.3f}"
        print(f"| {row.flops_total:.3g} | `{row.objective}` | {row.lr:.3g} | {row.tokens:.3g} | {loss} | {row.seeds} |")


if __name__ == "__main__":
    main(sys.argv[1])
