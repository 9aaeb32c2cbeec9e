"""The masks of Eq. 6: exactly l of L tokens, uniformly without replacement."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llada_lightning.objectives.noise import Stream, random_words, words_to_uniform

BoolArray = npt.NDArray[np.bool_]

REPLICATES = 16
"""Independent parts of a sample, where the samples allow: their scatter tells the error."""


def all_masks(length: int) -> BoolArray:
    """Every mask of at least one token: (2^L - 1, L)."""
    return (np.arange(1, 2**length)[:, None] >> np.arange(length) & 1).astype(bool)


def replicate_masks(seed: int, key: int, replicate: int, samples: int, length: int, counts: range) -> BoolArray:
    """The masks of one replicate, a pure function of the arguments; replicates are independent of each other.

    The mean over a replicate is as Eq. 6 would have it: a mask taken at random out of the K has l uniform over
    ``counts`` and, given l, positions uniformly without replacement. The k-th mask is not so: its l comes from the k-th
    part of a grid with one random shift, so that every part of ``counts`` has its share. The positions are windows that
    follow each other around one random order of the continuation, so every token is masked about as often as any other.

    Args:
        seed: of the noise.
        key: of the request (64 bits).
        replicate: ordinal of the replicate.
        samples: K, masks in the replicate.
        length: L, tokens of the continuation.
        counts: consecutive l to draw from, within 1..L.

    Returns:
        (K, L) bool, True where masked.
    """
    words = random_words(seed, Stream.LIKELIHOOD, key, 1 + length, sub_ordinal=replicate)
    shift = words_to_uniform(words[:1])
    grid_K = (np.arange(samples) + shift) / samples
    # floor, not round: rounding half to even favours even l. The last point may round up to 1.
    counts_K = counts[0] + np.minimum(np.floor(grid_K * len(counts)).astype(np.int64), len(counts) - 1)
    place_L = np.argsort(np.argsort(words[1:], kind="stable"), kind="stable")
    first_K = np.cumsum(counts_K) - counts_K
    return (place_L[None] - first_K[:, None]) % length < counts_K[:, None]
