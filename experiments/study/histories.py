"""Losses along the way of runs, as one table: `python experiments/study/histories.py STUDY OUT.csv`.

STUDY holds run folders. A row is a step of a run: of the training loss 32 rows, spread evenly over the logarithm of the
tokens (means since the row before), and every validation. Losses are in nats per token.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from llada_lightning.compute.shapes import get_shape, shape_name
from llada_lightning.support.files import written_atomically

ROWS = 32
COLUMNS = ["step", "tokens", "train_nats_per_token", "val_nats_per_token", "val_stderr"]


def history(metrics: Path) -> pd.DataFrame:
    """A run's history, with its objective, shape, seed and the tokens that it was allowed to read (empty: all)."""
    config = yaml.safe_load((metrics.parent / "config.yaml").read_text())
    rows = pd.read_csv(metrics)[COLUMNS]
    last = rows["tokens"].iloc[-1]
    edges = np.unique(np.searchsorted(rows["tokens"], np.geomspace(last / 1000, last, ROWS)))
    means = rows.groupby(np.searchsorted(edges, np.arange(len(rows)))).agg(
        {"step": "last", "tokens": "last", "train_nats_per_token": "mean"}
    )
    validations = rows.dropna(subset="val_nats_per_token")[["step", "tokens", "val_nats_per_token", "val_stderr"]]
    own = pd.concat([means, validations]).sort_values(["step", "val_nats_per_token"], ignore_index=True)
    objective = "llada" if "Llada" in config["model"]["class_path"] else "arm"
    shape, allowed = config["model"]["init_args"]["shape"], config["data"]["init_args"]["train_tokens"]
    own.insert(0, "train_tokens", allowed)
    own.insert(0, "seed", config["seed_everything"])
    own.insert(0, "shape", shape_name(get_shape(shape)))
    own.insert(0, "objective", objective)
    return own


def main(study: Path, out: Path) -> None:
    found = pd.concat([history(path) for path in sorted(study.glob("*/metrics.csv"))], ignore_index=True)
    with written_atomically(out) as temporary:
        found.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
