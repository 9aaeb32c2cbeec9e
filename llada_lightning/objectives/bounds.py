"""The bound on the negative log-likelihood (Eq. 14), and a mean with its standard error by document."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def nll_bound(nll_M: Tensor, masked_BL: Tensor) -> Tensor:
    """One Monte Carlo sample of Eq. 14 for each sequence: L / l times the sum over its l masked tokens.

    Args:
        nll_M: (M,) negative log-likelihood of the masked tokens, in the order of ``masked_BL.nonzero()``.
        masked_BL: (B, L) bool, at least one True a row.

    Returns:
        (B,) float64, nats per sequence.
    """
    counts_B = masked_BL.sum(dim=1)
    assert bool((counts_B > 0).all()), "Eq. 14 masks at least one token"
    rows_M = masked_BL.nonzero()[:, 0]
    sums_B = torch.zeros(masked_BL.shape[0], dtype=torch.float64, device=nll_M.device)
    sums_B.index_add_(0, rows_M, nll_M.double())
    return sums_B * masked_BL.shape[1] / counts_B


def clustered_mean_and_stderr(values_N: Tensor, clusters_N: Tensor) -> tuple[float, float]:
    """Mean of N values and its standard error, where values of one cluster are alike.

    Sequences of one document share its style and subject: taken as independent they would claim too small an error.
    So the error is that of the documents' sums (the linearised ratio estimator of cluster sampling; Cochran 1977,
    Sec. 11): the root of G / (G - 1) times the sum over the G documents of (the sum of their deviations / N)^2.

    Args:
        values_N: (N,) float64.
        clusters_N: (N,) int64.

    Returns:
        mean, standard error; the latter NaN with fewer than two clusters.
    """
    mean = values_N.mean()
    _, cluster_of_N = clusters_N.unique(return_inverse=True)
    groups = int(cluster_of_N.max()) + 1
    sums_G = torch.zeros(groups, dtype=torch.float64, device=values_N.device)
    sums_G.index_add_(0, cluster_of_N, (values_N - mean).double())
    if groups < 2:
        return float(mean), math.nan
    variance = groups / (groups - 1) * (sums_G / len(values_N)).square().sum()
    return float(mean), math.sqrt(float(variance))


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
