"""How often the intervals of each method hold the true multiplier, over synthetic studies of twelve kinds.

    python experiments/estimators/calibration.py [--studies 100] [--samples 500] [--jobs 2] [--out FOLDER]

Writes `coverage.csv`, one row for each world, method and place (within the budgets, or beyond them), and the figure
`coverage.png`. Coverage is the share of the multipliers that are told whose 95 % interval holds the truth; what is
withheld is counted in the column `told`. Bias and width are of the logarithm.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from worlds import WORLDS, covariance, study, true_multipliers

from llada_lightning.study.fits import METHODS, fit_table
from llada_lightning.study.plots.style import GREY, INK, StudyFigure, dress, new_figure, write_figure
from llada_lightning.study.plots.style import METHODS as STYLES


def told(name: str, seed: int, samples: int) -> list[dict[str, object]]:
    """The multipliers of one study, each with the truth."""
    world, number = WORLDS[name], list(WORLDS).index(name)
    table = study(world, 1000 * number + seed)
    how = {"samples": samples, "seed": seed, "covariance": covariance(world, table)}
    fits = fit_table(table, conventions=(world.convention,), **how)
    entries = fits.compute_multiplier
    truths = true_multipliers(world, [entry.reference_flops for entry in entries]) if entries else []
    return [
        {
            "world": name,
            "seed": seed,
            "method": entry.method,
            "reference_flops": entry.reference_flops,
            "beyond": entry.extrapolated,
            "told": entry.shown,
            "trusted": entry.trusted,
            "held": entry.low <= truth <= entry.high,
            "error": np.log(entry.multiplier / truth),
            "width": np.log(entry.high / max(entry.low, 1e-300)) if entry.shown else np.nan,
        }
        for entry, truth in zip(entries, truths, strict=True)
    ]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Coverage, bias and width by world, method and place."""
    found = []
    for (world, method, beyond), group in rows.groupby(["world", "method", "beyond"], sort=False):
        shown = group[group["told"]]
        # Multipliers of one study err together: the standard error is that of the studies' own shares.
        shares = shown.groupby("seed")["held"].mean()
        found.append({
            "world": world,
            "method": method,
            "place": "beyond" if beyond else "within",
            "multipliers": len(group),
            "told": len(shown) / len(group),
            "coverage": shown["held"].mean(),
            "coverage_stderr": shares.std(ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else np.nan,
            "bias": shown["error"].median(),
            "width": shown["width"].median(),
        })  # fmt: skip
    table = pd.DataFrame(found)
    order = {method: number for number, method in enumerate(METHODS)}
    worlds = {world: number for number, world in enumerate(WORLDS)}
    keys = table["place"].eq("beyond"), table["world"].map(worlds), table["method"].map(order)
    return table.iloc[np.lexsort(tuple(reversed(keys)))].reset_index(drop=True)


def markdown(table: pd.DataFrame, place: str) -> str:
    """The table of ``docs/estimators.md``: coverage by world and method, and in brackets the share that is told."""
    methods = [method for method in METHODS if ((table["method"] == method) & (table["place"] == place)).any()]
    lines = ["| world | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    found = table[table["place"] == place].set_index(["world", "method"])
    for world in WORLDS:
        cells = []
        for method in methods:
            own = found.loc[(world, method)] if (world, method) in found.index else None
            known = own is not None and np.isfinite(own["coverage"])
            cells.append(f"{own['coverage']:.2f} ({own['told']:.0%})" if known else "none told")
        lines.append(f"| {world} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(table: pd.DataFrame) -> StudyFigure:
    """Coverage by world, a panel for each method: filled within the budgets, hollow beyond them."""
    methods = [method for method in METHODS if (table["method"] == method).any()]
    drawn = new_figure(2.0 * len(methods) + 2.6, 4.6)
    panels = drawn.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    places = {world: -number for number, world in enumerate(WORLDS)}
    for panel, method in zip(panels, methods, strict=True):
        style = STYLES[method]
        panel.axvspan(0.90, 0.99, color=style.color, alpha=0.12, linewidth=0)
        panel.axvline(0.95, color=GREY, linewidth=1)
        for place, face, shift in (("within", style.color, 0.12), ("beyond", "white", -0.12)):
            own = table[(table["method"] == method) & (table["place"] == place)]
            heights = [places[world] + shift for world in own["world"]]
            panel.errorbar(
                own["coverage"], heights, xerr=2 * own["coverage_stderr"], fmt=style.marker, color=style.color,
                markerfacecolor=face, markersize=5, linewidth=1.2,
            )  # fmt: skip
        panel.set_xlim(0.35, 1.03)
        panel.set_title(style.label, fontsize=9, color=INK)
        panel.set_xlabel("coverage", color=INK)
        dress(panel)
    panels[0].set_yticks(list(places.values()), list(places))
    return drawn


def run(studies: int, samples: int, jobs: int, worlds: list[str], first: int = 0) -> pd.DataFrame:
    """The multipliers of so many studies of each world."""
    cells = [(name, seed) for seed in range(first, first + studies) for name in worlds]
    with ProcessPoolExecutor(jobs) as pool:
        found = pool.map(partial(_of_cell, samples), cells, chunksize=1)
        return pd.DataFrame([row for rows in found for row in rows])


def _of_cell(samples: int, cell: tuple[str, int]) -> list[dict[str, object]]:
    return told(*cell, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    rows = run(options.studies, options.samples, options.jobs, options.worlds)
    table = summary(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(options.out / "multipliers.csv", index=False)
    table.round(4).to_csv(options.out / "coverage.csv", index=False)
    write_figure(figure(table), options.out, "coverage")
    for place in ("within", "beyond"):
        print(markdown(table, place), end="\n\n")


if __name__ == "__main__":
    main()
