"""Counter-based noise: every random number is a pure function of (seed, purpose, ordinal).

Philox (Salmon et al. 2011) maps a key and a counter to random words without any state. The key is the seed and the
purpose (what the noise is for), the counter holds the ordinal of the sequence: so the noise of a sequence does not
depend on devices, workers, micro-batches or on what was drawn before, and nothing of it is ever saved.
Only raw words of the bit generator are used: NumPy promises these to be stable between versions.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15
"""The golden ratio's fractional part in units of 2^-64: the step of the Weyl sequence."""

_WORD = 2**64


class Purpose(IntEnum):
    """What the noise is for; the noise of two purposes is independent."""

    ORDER = 1
    LENGTH = 2
    TIME = 3
    MASK = 4
    VALIDATION_TIME = 5
    VALIDATION_MASK = 6
    GENERATION = 7
    LIKELIHOOD = 8
    TURN = 9
    HELD_OUT = 10
    FACTS = 11
    TOKEN = 12
    VALIDATION_TOKEN = 13


def random_words(seed: int, purpose: Purpose, ordinal: int, count: int, sub_ordinal: int = 0) -> npt.NDArray[np.uint64]:
    """``count`` random words of 64 bits for one ordinal, a pure function of the other arguments."""
    # The counter's lowest word counts the blocks within one draw; the ordinals are in the words above it. The
    # highest word keeps these draws apart from those of `uniform_by_ordinal`.
    counter = np.array([0, ordinal, sub_ordinal, 1], dtype=np.uint64)
    return _philox(seed, purpose, counter).random_raw(count)


def uniform(seed: int, purpose: Purpose, ordinal: int, count: int, sub_ordinal: int = 0) -> npt.NDArray[np.float64]:
    """``count`` uniform numbers in [0, 1) for one ordinal, a pure function of the other arguments."""
    return words_to_uniform(random_words(seed, purpose, ordinal, count, sub_ordinal))


def uniform_by_ordinal(seed: int, purpose: Purpose, ordinals: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Four uniform numbers in [0, 1) for each of many ordinals: (B, 4).

    The four words of the Philox block whose counter is the ordinal, so a range of ordinals is one draw; everything
    between the lowest and the highest is drawn.
    """
    first = int(ordinals.min())
    counter = np.array([first, 0, 0, 0], dtype=np.uint64)
    words = _philox(seed, purpose, counter).random_raw(4 * (int(ordinals.max()) - first + 1))
    return words_to_uniform(words.reshape(-1, 4)[ordinals - first])


def words_to_uniform(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Words of 64 bits to uniform numbers in [0, 1), by their upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def weyl(seed: int, purpose: Purpose, ordinals: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The Weyl sequence frac(u0 + n * golden ratio) at the given ordinals n, with u0 drawn by the seed.

    Any window of consecutive ordinals is stratified over [0, 1), and each value is uniform over seeds. The product
    is taken modulo 2^64 in whole numbers, so it is as exact at n = 10^12 as at 0.
    """
    start = random_words(seed, purpose, 0, 1)
    return words_to_uniform(start + ordinals.astype(np.uint64) * np.uint64(GOLDEN_RATIO_64))


def _philox(seed: int, purpose: Purpose, counter: npt.NDArray[np.uint64]) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed % _WORD, purpose], dtype=np.uint64), counter=counter)
