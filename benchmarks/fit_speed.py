"""All fits of a 60-run study of two objectives, by every method and both conventions: seconds for 4000 bootstraps."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.studies import CHINCHILLA, simulated_study
from llada_lightning.study.fits import fit_table


def seconds(samples: int) -> float:
    table, covariance = simulated_study(CHINCHILLA)
    assert len(table) == 60
    start = time.perf_counter()
    fit_table(table, samples=samples, covariance=covariance)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    result = {"samples": arguments.samples, "all": seconds(arguments.samples), "few": seconds(100)}
    print(
        f"{result['samples']} draws of 60 runs: {result['all']:.1f} s; 100 draws: {result['few']:.1f} s "
        f"({os.cpu_count()} cores)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
