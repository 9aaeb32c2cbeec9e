"""Rules that turn a size into hyperparameters; each is a default that a configuration may replace."""

from __future__ import annotations

import math


def learning_rate(params_nonembedding: float) -> float:
    """Peak learning rate for a model of N non-embedding parameters: 0.003239 - 0.0001395 ln N.

    Kaplan et al. 2020, Eq. D.1, fitted to autoregressive models from 10^4 to 10^9 parameters; used for both
    objectives until a study has tuned its own. Never below 1e-4.
    """
    return max(1e-4, 0.003239 - 0.0001395 * math.log(params_nonembedding))
