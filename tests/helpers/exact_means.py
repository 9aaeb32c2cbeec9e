"""The predictor of uniform-state diffusion that no other one is better than, of small data by enumeration."""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def exact_mean(data: Array, t: float) -> Array:
    """The logarithm of the distribution of each token given the noisy tokens at the other positions.

    Args:
        data: The distribution of L tokens of V words, (V,) * L.
        t: The noise level.

    Returns:
        (V,) * L + (L, V): an axis of words for each noisy token, then (position, word).
    """
    length, words = data.ndim, data.shape[0]
    found = np.empty((words,) * length + (length, words))
    kernel_VV = (1 - t) * np.eye(words) + t / words  # of the noisy token by the true one
    for z_L in product(range(words), repeat=length):
        for i in range(length):
            others = [j for j in range(length) if j != i]
            joint = data
            for j in others:
                shape = [1] * length
                shape[j] = words
                joint = joint * kernel_VV[:, z_L[j]].reshape(shape)
            own_V = joint.sum(axis=tuple(others))
            found[z_L][i] = np.log(own_V / own_V.sum())
    return found
