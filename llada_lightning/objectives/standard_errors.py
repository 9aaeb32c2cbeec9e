"""Means and ratios with their standard errors, where values of one document are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def ratio_and_stderr(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """The ratio of two sums over independent units (documents, requests) and its linearised standard error.

    Units differ in size, so the error is not that of a mean of ratios: it follows from each unit's deviation,
    numerator - ratio x denominator (Cochran 1977, Sec. 6.4): the root of G / (G - 1) times the sum over the G units
    of (deviation / sum of denominators)^2.

    Returns:
        ratio, standard error; the latter NaN with fewer than two units, both where the denominators sum to 0.
    """
    numerators_G, denominators_G = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    units, total = len(numerators_G), float(denominators_G.sum())
    if total == 0:
        return math.nan, math.nan
    ratio = float(numerators_G.sum()) / total
    if units < 2:
        return ratio, math.nan
    deviations_G = (numerators_G - ratio * denominators_G) / total
    return ratio, math.sqrt(units / (units - 1) * float(np.square(deviations_G).sum()))


def clustered_mean_and_stderr(values_N: Tensor, clusters_N: Tensor) -> tuple[float, float]:
    """Mean of N values and its standard error, where values of one cluster are alike.

    Sequences of one document share its style and subject: taken as independent they would claim too small an error.
    So the units are the documents (cluster sampling; Cochran 1977, Sec. 11).

    Args:
        values_N: (N,) float64.
        clusters_N: (N,) int64.

    Returns:
        mean, standard error; the latter NaN with fewer than two clusters.
    """
    _, counts_G, means_G = mean_by_cluster(values_N, clusters_N)
    return ratio_and_stderr((means_G * counts_G).tolist(), counts_G.tolist())


def mean_by_cluster(values_N: Tensor, clusters_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the error of a mean, and of a difference of two, follows from.

    Args:
        values_N: (N,) float64.
        clusters_N: (N,) int64.

    Returns:
        (G,) int64 clusters in ascending order, (G,) int64 values of each, (G,) float64 mean of each.
    """
    clusters_G, cluster_of_N, counts_G = clusters_N.unique(return_inverse=True, return_counts=True)
    sums_G = torch.zeros(len(clusters_G), dtype=torch.float64, device=values_N.device)
    sums_G.index_add_(0, cluster_of_N, values_N.double())
    return clusters_G, counts_G, sums_G / counts_G
