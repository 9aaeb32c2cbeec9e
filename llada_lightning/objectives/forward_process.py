"""The forward process of pre-training: how much of a sequence is masked, and where (paper, Eq. 7 and 8).

All draws are pure functions of (seed, ordinal), made beside the sequence in the loader (see ``noise``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from llada_lightning.compute.flops import MASK_EPS
from llada_lightning.objectives import noise
from llada_lightning.objectives.densities import Density
from llada_lightning.objectives.noise import Purpose

TimeSampling = Literal["weyl", "iid"]
TIME_SAMPLINGS: tuple[TimeSampling, ...] = get_args(TimeSampling)

SMALLEST_QUANTILE = 2.0**-53
"""What stands for a point of 0, whose quantile is the end of the density: the smallest point above it.

Below it, scipy's inverse of the beta distribution is NaN for some exponents."""


def mask_ratio(seed: int, ordinals: npt.NDArray[np.int64], sampling: TimeSampling = "weyl") -> npt.NDArray[np.float64]:
    """t of each sequence, uniform on [0, 1): stratified over consecutive ordinals (``weyl``) or independent (``iid``).

    Returns:
        (B,) float64.
    """
    if sampling == "weyl":
        return noise.weyl(seed, Purpose.TIME, ordinals)
    return noise.uniform_by_ordinal(seed, Purpose.TIME, ordinals)[:, 0]


def drawn_ratio(
    seed: int,
    ordinals: npt.NDArray[np.int64],
    sampling: TimeSampling,
    density: Density | None,
    global_batch: int,
    block_length: int | None = None,
    longest: int = 0,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
    """t of each sequence, or of each of its blocks, drawn from a density: its quantiles at :func:`mask_ratio`'s points.

    With blocks, the k-th of the K blocks of sequence n has the point of the ordinal n K + k. So each block has a ratio
    of its own (Arriola et al. 2025), the blocks of a sequence are stratified, too, and one block has the ratio of the
    sequence.

    Args:
        seed: The seed of the noise.
        ordinals: (B,) int64.
        sampling: How the points are drawn.
        density: The density; None: uniform.
        global_batch: The sequences of a step, by which the step of an ordinal, and so of a curriculum, follows.
        block_length: The number of tokens of a block; None: the whole sequence.
        longest: The tokens of the longest sequence, by which a sequence has K blocks.

    Returns:
        (B,) float64 t; (B,) float64 q(t), None where the density is uniform. With blocks (B, K).
    """
    if block_length is not None:
        blocks = -(-longest // block_length)
        of_blocks_N = (ordinals[:, None] * blocks + np.arange(blocks)).ravel()
        t_N, q_N = drawn_ratio(seed, of_blocks_N, sampling, density, global_batch * blocks)
        return t_N.reshape(-1, blocks), None if q_N is None else q_N.reshape(-1, blocks)
    t_B = mask_ratio(seed, ordinals, sampling)
    if density is None:
        return t_B, None
    u_B, q_B, steps_B = np.maximum(t_B, SMALLEST_QUANTILE), np.empty_like(t_B), ordinals // global_batch
    for step in np.unique(steps_B).tolist():
        own = steps_B == step
        t_B[own], q_B[own] = density.at(step).draw(u_B[own])
    return t_B, q_B


def mask_probability(t: npt.NDArray[np.float64], eps: float = MASK_EPS) -> npt.NDArray[np.float64]:
    """p = (1 - eps) t + eps, the probability with which each token of the sequence is masked."""
    return (1 - eps) * t + eps


def random_mask(
    seed: int,
    ordinals: npt.NDArray[np.int64],
    p_B: npt.NDArray[np.float64],
    sequence_length: int,
    block_length: int | None = None,
) -> npt.NDArray[np.bool_]:
    """Mask each token independently with the probability of its sequence (Eq. 8), or (B, K) of its block.

    Returns:
        (B, L) bool, True where masked.
    """
    uniform_BL = np.stack([noise.uniform(seed, Purpose.MASK, int(n), sequence_length) for n in ordinals])
    if block_length is None:
        return uniform_BL < p_B[:, None]
    return uniform_BL < p_B[:, np.arange(sequence_length) // block_length]


def stratified_mask_counts(seed: int, ordinals: npt.NDArray[np.int64], sequence_length: int) -> npt.NDArray[np.int64]:
    """l of each sequence for Eq. 14: uniform on 1..L, stratified over consecutive ordinals.

    floor, not round: rounding half to even favours even counts.

    Returns:
        (B,) int64.
    """
    u_B = noise.weyl(seed, Purpose.VALIDATION_TIME, ordinals)
    return 1 + np.floor(u_B * sequence_length).astype(np.int64)


def fixed_count_mask(
    seed: int, ordinals: npt.NDArray[np.int64], counts_B: npt.NDArray[np.int64], sequence_length: int
) -> npt.NDArray[np.bool_]:
    """Mask exactly l tokens of each sequence, uniformly without replacement (Eq. 14).

    Returns:
        (B, L) bool, True where masked.
    """
    words_BL = np.stack([noise.random_words(seed, Purpose.VALIDATION_MASK, int(n), sequence_length) for n in ordinals])
    return _first_in_order(words_BL, counts_B)


def validation_mask(
    seed: int,
    ordinals: npt.NDArray[np.int64],
    length: int,
    block_length: int | None = None,
    first: int = 0,
    longest: int | None = None,
) -> npt.NDArray[np.bool_]:
    """The masks of Eq. 14: l tokens of each sequence, or of each block, l stratified over consecutive ordinals.

    With blocks, the k-th of the K blocks of sequence n has the l of the ordinal n K + k. One block is the sequence.

    Args:
        seed: The seed of the noise.
        ordinals: (B,) int64.
        length: The number of tokens that may be masked.
        block_length: The number of tokens of a block; None: the whole sequence.
        first: The position of the first of these tokens, where tokens before it are never masked.
        longest: The tokens of the longest sequence, by which a sequence has K blocks; None: that of this one.

    Returns:
        (B, length) bool, True where masked.
    """
    if block_length is None:
        return fixed_count_mask(seed, ordinals, stratified_mask_counts(seed, ordinals, length), length)
    words_BL = np.stack([noise.random_words(seed, Purpose.VALIDATION_MASK, int(n), length) for n in ordinals])
    blocks = -(-(longest or first + length) // block_length)
    masked_BL = np.empty(words_BL.shape, dtype=np.bool_)
    for k in range(first // block_length, -(-(first + length) // block_length)):
        of_block = slice(max(0, k * block_length - first), min(length, (k + 1) * block_length - first))
        counts_B = stratified_mask_counts(seed, ordinals * blocks + k, of_block.stop - of_block.start)
        masked_BL[:, of_block] = _first_in_order(words_BL[:, of_block], counts_B)
    return masked_BL


def _first_in_order(words_BL: npt.NDArray[np.uint64], counts_B: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """(B, L) bool: as many of the smallest words of each row as are wanted."""
    ranks_BL = np.argsort(np.argsort(words_BL, axis=1, kind="stable"), axis=1, kind="stable")
    return ranks_BL < counts_B[:, None]


def random_lengths(
    seed: int, ordinals: npt.NDArray[np.int64], sequence_length: int, share: float
) -> npt.NDArray[np.int64]:
    """Length of each sequence: full, but for a ``share`` of them whose length is uniform on 1..L (paper, Sec. 2.2).

    Returns:
        (B,) int64.
    """
    if share == 0:
        return np.full(len(ordinals), sequence_length, dtype=np.int64)
    u_B4 = noise.uniform_by_ordinal(seed, Purpose.LENGTH, ordinals)
    short = 1 + np.floor(u_B4[:, 1] * sequence_length).astype(np.int64)
    return np.where(u_B4[:, 0] < share, short, sequence_length)


def noisy_tokens(
    seed: int,
    ordinals: npt.NDArray[np.int64],
    tokens_BL: npt.NDArray[np.int64],
    share: float,
    vocab_size: int,
    special_ids: tuple[int, ...],
) -> npt.NDArray[np.int64]:
    """Replace each token independently, with probability ``share``, by a token drawn evenly from the vocabulary.

    Special tokens are neither replaced nor drawn, so that documents and padding stay. A drawn token may be the same.

    Args:
        tokens_BL: (B, L) int64.
        vocab_size: The number of ids, special ones included.
        special_ids: The ids of the special tokens.

    Returns:
        (B, L) int64.
    """
    plain_V = np.setdiff1d(np.arange(vocab_size), special_ids)
    assert len(plain_V), "a vocabulary has tokens that are not special"
    count = tokens_BL.shape[1]
    uniform_B2L = np.stack([noise.uniform(seed, Purpose.TOKEN, int(n), 2 * count) for n in ordinals])
    chosen_BL, drawn_BL = uniform_B2L[:, :count], uniform_B2L[:, count:]
    replaced_BL = (chosen_BL < share) & ~np.isin(tokens_BL, special_ids)
    return np.where(replaced_BL, plain_V[np.floor(drawn_BL * len(plain_V)).astype(np.int64)], tokens_BL)


# --- uniform-state diffusion ------------------------------------------------------------------------------------------

SMALLEST_LEVEL = 2.0**-40
"""The smallest noise level t; a smaller one is taken for it. What the bound loses below is beyond float64."""


@dataclass(frozen=True)
class Alphabet:
    """The entries of a vocabulary that noise is drawn from: all but [MASK].

    Args:
        vocab_size: The number of entries of the vocabulary.
        mask_token_id: The id of [MASK]; None: there is none.
    """

    vocab_size: int
    mask_token_id: int | None

    @property
    def size(self) -> int:
        """The number of entries that can be drawn, V."""
        return self.vocab_size - (self.mask_token_id is not None)

    def ids(self, uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The entries at uniform numbers in [0, 1), of any shape."""
        drawn = np.minimum(np.floor(uniform * self.size).astype(np.int64), self.size - 1)
        return drawn if self.mask_token_id is None else drawn + (drawn >= self.mask_token_id)


def replaced_tokens(
    seed: int,
    purpose: Purpose,
    ordinals: npt.NDArray[np.int64],
    tokens_BL: npt.NDArray[np.int64],
    resampled_BL: npt.NDArray[np.bool_],
    alphabet: Alphabet,
) -> npt.NDArray[np.int64]:
    """(B, L) int64: tokens, each resampled one replaced by an entry that is drawn evenly, which may be the same.

    A draw is a pure function of (seed, purpose, ordinal, position).
    """
    length = tokens_BL.shape[1]
    uniform_BL = np.stack([noise.uniform(seed, purpose, int(n), length) for n in ordinals])
    return np.where(resampled_BL, alphabet.ids(uniform_BL), tokens_BL)


def drawn_levels(u_B: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Noise levels of uniform numbers in [0, 1), for estimates of the bound with an error, and their density.

    Near t = 0 a share t of the tokens is replaced, each of which adds about 1/t to the integrand. With t uniform its
    variance would be the integral of 1/t, which has no limit, so that no standard error would hold. With t = v^4 and v
    uniform, the fourth moment, by which an error is known, is finite, too; but its weights differ much between levels.
    So one half of the numbers gives a uniform t, and the other half such a one.

    Returns:
        (B,) float64 t, (B,) float64 q(t) = (1 + t^(-3/4) / 4) / 2.
    """
    t_B = np.maximum(np.where(u_B < 0.5, 2 * u_B, (2 * u_B - 1) ** 4), SMALLEST_LEVEL)
    return t_B, (1 + t_B**-0.75 / 4) / 2
