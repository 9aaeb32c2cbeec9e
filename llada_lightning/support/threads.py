"""How many threads a run on the CPU computes with: one rule for ``llada fit`` and for the runs of a sweep.

What the user sets for OpenMP or for MKL counts for both: with different numbers each product waits for threads that the
other library keeps busy. Where nothing is set, a run has its share of the cores at most, and ``training.machine``
chooses within that share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

LIBRARIES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""The variables of the environment by which a user sets the number of threads; the first that is set counts."""

CORES = "LLADA_CORES"
"""The variable by which whoever starts several runs at once tells each how many cores it may use."""


def threads_set(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of threads that the user has set, for OpenMP or for MKL; None: neither."""
    # OpenMP takes a list, one number for each level of nested regions.
    given = (environment.get(name, "").split(",")[0].strip() for name in LIBRARIES)
    return next((int(number) for number in given if number.isdecimal() and int(number) > 0), None)


def usable_cores(environment: Mapping[str, str] = os.environ) -> int:
    """The number of cores that this process may use, of those that the system lets it use."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = environment.get(CORES, "")
    return min(there, int(share)) if share.isdecimal() and int(share) > 0 else there


def shared_among(runs: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of one of several runs at once: ours, with its share of the cores, and one number of threads."""
    threads = threads_set(environment)
    numbers = {} if threads is None else dict.fromkeys(LIBRARIES, str(threads))
    return {**environment, **numbers, CORES: str(max(1, usable_cores(environment) // runs))}
