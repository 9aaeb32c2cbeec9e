"""The loss curves of the fast and the plain ways to compute a step, same seed, on real text, laid over each other.

Real `llada fit`s on the standard library's text, one for each way; a picture of all curves with their differences from
the plain one below, and the largest differences. Run: python benchmarks/curves_overlay.py --out FOLDER
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from bench_report import caption, circumstances, markdown, write_result
from llada_lightning.data.prepare import prepare
from llada_lightning.study.plots.style import dress, new_figure, write_figure
from llada_lightning.training.callbacks.loggers import read_rows
from processes import child_environment, finish
from small_fits import fit_words, run_folder

PLAIN = "fp32, all logits at once, eager"
WAYS = {
    PLAIN: ("32-true", "plain", False),
    "fp32, chunked loss": ("32-true", "chunked", False),
    "fp32, chunked loss, compiled": ("32-true", "chunked", True),
    "bf16-mixed, chunked loss, compiled": ("bf16-mixed", "chunked", True),
}
"""Precision, loss, compilation."""
FIRST_STEPS, AGREE = 10, 1e-4
"""For so many steps the fp32 ways must agree as closely as this, in nats a token."""


def fit(way: str, objective: str, data: Path, shape: str, steps: int, folder: Path) -> list[float]:
    """The training loss of each step of a fit, nats a token."""
    precision, loss, compiled = WAYS[way]
    words = fit_words(
        objective,
        data,
        folder,
        f"--model.shape={shape}",
        "--model.schedule.lr=0.002",
        "--data.sequence_length=128",
        "--data.global_batch=16",
        "--data.random_length_share=0.01",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        f"--trainer.precision={precision}",
        f"--speed.loss={loss}",
        f"--speed.compile={str(compiled).lower()}",
        f"--run.checkpoint_every_steps={steps}",
    )
    finish(words, folder / "log", child_environment(folder / "tmp"), timeout=3600)
    rows = read_rows(run_folder(folder) / "metrics.csv")
    return [float(row["train_nats_per_token"]) for row in rows if "train_nats_per_token" in row]


def beside_plain(curves: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Each way's largest differences from the plain one's curve, in the first steps and in all of them."""
    plain = np.array(curves[PLAIN])
    found = {}
    for way, losses in curves.items():
        difference = np.abs(np.array(losses) - plain)
        first = float(difference[:FIRST_STEPS].max())
        found[way] = {
            "first_steps": first,
            "all_steps": float(difference.max()),
            "mean": float(difference.mean()),
            "last_loss": losses[-1],
            "agrees": first <= AGREE if way.startswith("fp32") and way != PLAIN else None,
        }
    return found


def table(objective: str, found: dict[str, dict[str, Any]]) -> str:
    """The differences as Markdown."""
    header = [
        objective,
        f"first {FIRST_STEPS} steps",
        "all steps",
        "mean",
        "last loss",
        f"to reach: {AGREE:g} at first",
    ]
    verdicts = {True: "met", False: "not met", None: ""}
    return markdown(
        header,
        [
            [
                way,
                *(f"{one[key]:.1e}" for key in ("first_steps", "all_steps", "mean")),
                f"{one['last_loss']:.4f}",
                verdicts[one["agrees"]],
            ]
            for way, one in found.items()
        ],
    )


def figure(curves: dict[str, dict[str, list[float]]]) -> Figure:
    """Above the curves, each thinner than the one below it; below their differences; a column for each objective."""
    picture = new_figure(3.6 * len(curves), 4.2)
    axes = picture.subplots(2, len(curves), sharex=True, squeeze=False, height_ratios=(2, 1))
    for (above, below), (objective, ways) in zip(axes.T, curves.items(), strict=True):
        plain = np.array(ways[PLAIN])
        for number, (way, losses) in enumerate(ways.items()):
            steps = np.arange(1, len(losses) + 1)
            color = f"C{number}"
            above.plot(steps, losses, color=color, linewidth=2.5 - 0.6 * number, label=way)
            if way != PLAIN:
                below.semilogy(steps, np.maximum(np.abs(np.array(losses) - plain), 1e-8), color=color, linewidth=0.8)
        dress(above)
        dress(below)
        above.set_title(objective)
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("nats a token")
    axes[1, 0].set_ylabel("difference")
    axes[0, 0].legend(fontsize=6, frameon=False)
    return picture


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", choices=("llada", "arm"), default=["llada", "arm"])
    parser.add_argument("--shape", default="443k")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="folder of the picture and the figures"
    )
    options = parser.parse_args(arguments)
    curves: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        size = options.vocab_size
        prepare("python-stdlib", str(data), vocab_size=size, max_bytes=8_000_000, val_fraction=0.1, progress=False)
        for objective in options.objectives:
            curves[objective] = {}
            for number, way in enumerate(WAYS):
                folder = Path(name) / f"{objective}{number}"
                curves[objective][way] = fit(way, objective, data, options.shape, options.steps, folder)
    found = {objective: beside_plain(ways) for objective, ways in curves.items()}
    result = {**circumstances(torch.device("cpu")), "shape": options.shape, "differences": found, "curves": curves}
    write_result(options.out / "curves_overlay.json", result)
    path = write_figure(figure(curves), options.out, "curves_overlay")
    tables = "\n\n".join(table(objective, ways) for objective, ways in found.items())
    print(f"{caption(result)}\n\n{tables}\n\n{path}")
    return 0 if all(one["agrees"] is not False for ways in found.values() for one in ways.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
