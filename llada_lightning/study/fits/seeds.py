"""How the spread between seeds changes over the runs of an objective, as points of several seeds tell it.

The spread of a fit's residuals is one number for all runs of an objective. Seeds at several points tell more: near a
plateau, and for some sizes, runs scatter more than elsewhere. At a point of k seeds the variance s^2 of log loss has
k - 1 degrees of freedom; its logarithm is taken as linear in log N and in the height of the loss above the objective's
best, h = log(L / L_best). A normal prior holds both slopes near zero, so that a few seeds change little.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from llada_lightning.study.fits.uncertainty import Array

MIN_POINTS = 3
"""With fewer points of several seeds nothing is told of how the spread changes."""

PRIOR = 1.0
"""The standard deviation of the prior of the logarithm of the variance's ratio over the range of the points."""


RANDOM_LENGTHS = 0.25
"""The share by which random lengths may change the number of tokens of a run."""


def tokens_by_steps(runs: pd.DataFrame) -> Array:
    """(n,) the tokens of the steps of each run, full sequences of them: equal for runs that differ in seed alone.

    Sequences of random length make the tokens that are read depend on the seed. The number itself is taken where steps
    or batch are not known, or do not account for it, as where the tokens of other weights are counted.
    """
    tokens = runs["tokens"].to_numpy(float, na_value=np.nan)
    steps, batch = (runs[name].to_numpy(float, na_value=np.nan) for name in ("steps", "global_batch_tokens"))
    full = steps * batch
    return np.where(np.abs(tokens / full - 1) < RANDOM_LENGTHS, full, tokens)


def seed_scales(runs: pd.DataFrame) -> Array:
    """(n,) the spread of each run over the root mean square of its objective's runs; 1 where seeds tell nothing.

    ``runs`` are the usable runs of all objectives.
    """
    scales = np.ones(len(runs))
    for _, rows in runs.groupby("objective", sort=False).indices.items():
        scales[rows] = _of_objective(runs.iloc[rows])
    return scales


def _of_objective(runs: pd.DataFrame) -> Array:
    log_loss = np.log(runs["val_nats_per_token"].to_numpy(float))
    features = np.stack([np.log(runs["params_nonembedding"].to_numpy(float)), log_loss - log_loss.min()], axis=1)
    same = ["params_nonembedding", "tokens", "lr", "global_batch_tokens"]
    told = runs.assign(tokens=tokens_by_steps(runs))
    numbers = told.groupby(same, sort=False, dropna=False).ngroup().to_numpy()
    points = [rows for number in np.unique(numbers) if len(rows := np.flatnonzero(numbers == number)) > 1]
    if len(points) < MIN_POINTS:
        return np.ones(len(runs))
    dof = np.array([len(rows) - 1.0 for rows in points])
    variances = np.maximum([log_loss[rows].var(ddof=1) for rows in points], 1e-12)
    at_points = np.array([features[rows].mean(axis=0) for rows in points])
    ranges = np.ptp(at_points, axis=0)
    unit = np.where(ranges > 0, ranges, np.inf)  # a feature that does not change has no slope
    x, every = ((own - at_points.mean(axis=0)) / unit for own in (at_points, features))

    def loss(theta: Array) -> tuple[float, Array]:
        """Minus the logarithms of the likelihood of the variances, which are chi-square, and of the prior."""
        log_variance = theta[0] + x @ theta[1:]
        ratio = variances * np.exp(-log_variance)
        slope = dof / 2 * (1 - ratio)
        prior = theta[1:] / PRIOR**2
        value = np.sum(dof / 2 * (log_variance + ratio)) + theta[1:] @ prior / 2
        return float(value), np.concatenate([[slope.sum()], x.T @ slope + prior])

    start = np.array([np.log(variances.mean()), 0.0, 0.0])
    slopes = minimize(loss, start, jac=True, method="BFGS").x[1:]
    # Runs beyond the points keep the spread of the nearest end: a straight line tells little there.
    scales = np.exp(np.clip(every, x.min(axis=0), x.max(axis=0)) @ slopes / 2)
    return np.asarray(scales / np.sqrt(np.mean(scales**2)), np.float64)
