"""A ratio of two sums, as nats per token or bits per byte are, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def ratio_and_stderr(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """The ratio of two sums over independent units (documents, requests) and its linearised standard error.

    Units differ in size, so the error is not that of a mean of ratios: it follows from each unit's deviation,
    numerator - ratio x denominator (Cochran 1977, Sec. 6.4).

    Returns:
        ratio, standard error; the latter NaN with fewer than two units, both where the denominators sum to 0.
    """
    numerators_N, denominators_N = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    units, total = len(numerators_N), float(denominators_N.sum())
    if total == 0:
        return math.nan, math.nan
    ratio = float(numerators_N.sum()) / total
    if units < 2:
        return ratio, math.nan
    deviations_N = (numerators_N - ratio * denominators_N) / total
    return ratio, math.sqrt(units / (units - 1) * float(np.square(deviations_N).sum()))
