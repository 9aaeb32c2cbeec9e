"""The estimator of Eq. 6 for one continuation: unbiased, and with an honest standard error. Without torch.

For a mask S of l tokens let f(S) = L / l times the sum over S of log p(x_i | prompt, the tokens outside of S). Eq. 6 is
the mean of f over l in 1..L and over the masks of l tokens. Four things make its estimate precise:

1. *Enumeration.* Where all 2^L - 1 masks are no more than the samples, all are scored and nothing is left to chance.
2. *Exact ends.* One mask has l = L, and L masks have l = 1: these l are scored in full and not drawn. (l = 1 where
   L is at most twice the samples. Its f varies the most, because it tells of a single token.)
3. *A control variate.* How hard a token is varies more between tokens than between masks. The ends tell log p of each
   token with nothing seen (l = L) and with all else seen (l = 1); between them c_l(i) interpolates linearly in l. Only
   f(S) minus L / l times the sum of c_l over S is left to Monte Carlo; what was taken away has a known mean: the sum of
   c_l over all tokens.
4. *Even replicates* (:func:`replicate_masks`): l from a shifted grid, every token masked about as often.

Samples within a replicate are not independent, so its own scatter tells nothing. Replicates are independent of each
other and each is unbiased: the estimate is the mean of R of them and its standard error their standard deviation over
the root of R, whose square is unbiased too. There are 16 where the samples allow: an interval is the mean plus or minus
Student's t of R - 1 degrees of freedom times the error (2.1 for 95 % at 16; 2.4 at 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llada_lightning.evaluation.requests import FloatArray, Method, Request, Score
from llada_lightning.objectives.forward_process import Alphabet, drawn_levels
from llada_lightning.objectives.noise import Purpose, random_words, words_to_uniform
from llada_lightning.support.errors import UserError

if TYPE_CHECKING:
    from llada_lightning.checkpoints.language_model import LanguageModel

BoolArray = npt.NDArray[np.bool_]

REPLICATES = 16
"""Independent parts of a sample, where the samples allow: their scatter tells the error."""


class Bound:
    """The lower bound of one request as far as it is known; more samples can be added.

    Args:
        request: The request, with a continuation of L >= 0 tokens.
        samples: The number of masks of the first round, at least 1.
        seed: The seed of the noise.
        enumerate_masks: Whether all masks are scored where there are no more of them than samples to draw.
        all_up_to: The number of masks up to which all of them are scored at once, however few samples are asked for.
    """

    def __init__(
        self, request: Request, samples: int, seed: int, enumerate_masks: bool = True, all_up_to: int = 0
    ) -> None:
        self.request, self.seed, self.enumerates, self.all_up_to = request, seed, enumerate_masks, all_up_to
        self.length = len(request.continuation)
        self._first_samples, self._first_replicates = samples, min(samples, REPLICATES)
        self._both_ends = self.length <= 2 * samples
        self._inner = range(2 if self._both_ends else 1, self.length)
        self._ends_LL: tuple[FloatArray, FloatArray] | None = None  # log p of each token at l = 1 and at l = L
        self._exact_mean = 0.0 if self.length == 0 else None
        self._values: list[float] = []
        self._all_planned = False

    @property
    def parts(self) -> list[Bound]:
        """What masks are planned for, and log-probabilities are added to."""
        return [self]

    @property
    def exact(self) -> bool:
        return self._exact_mean is not None

    @property
    def values(self) -> FloatArray:
        """(R,) independent unbiased estimates in nats, one a replicate; (1,) the value itself where exact."""
        return np.array(self._values if self._exact_mean is None else [self._exact_mean])

    @property
    def samples(self) -> int:
        """Masks drawn so far; all there are where exact."""
        return 2**self.length - 1 if self.exact else sum(map(self._size, range(len(self._values))))

    @property
    def score(self) -> Score:
        values = self.values
        return Score(
            mean=float(values.mean()),
            stderr=0.0 if self.exact else stderr_of_mean(values),
            exact=self.exact,
            samples=self.samples,
            tokens=self.length,
            method=self._method,
            truncated=self.request.truncated,
        )

    @property
    def _method(self) -> Method:
        if self.length < 2:
            return "one pass" if self.length else "empty"
        return "enumerated" if self.exact else "monte carlo"

    def plan(self, samples: int) -> BoolArray:
        """(N, L) masks to score until ``samples`` are drawn, in whole rounds of as many as the first; N may be 0."""
        if self.exact:
            return np.empty((0, self.length), dtype=bool)
        to_draw = samples - self.samples if self.enumerates else 0
        self._all_planned = 2**self.length - 1 <= max(to_draw, self.all_up_to)
        if self._all_planned:
            return all_masks(self.length)
        masks = [] if self._ends_LL else [np.ones((1, self.length), dtype=bool)]
        if not self._ends_LL and self._both_ends:
            masks.append(np.eye(self.length, dtype=bool))
        if self._inner:
            total = self._first_replicates * (samples // self._first_samples)
            masks += [
                replicate_masks(self.seed, self.request.noise_key, r, self._size(r), self.length, self._inner)
                for r in range(len(self._values), total)
            ]
        return np.concatenate([np.empty((0, self.length), dtype=bool), *masks])

    def add(self, masks_NL: BoolArray, log_probs_NL: FloatArray) -> None:
        """Takes in what the model gave for planned masks (N, L): the log-probabilities in nats, 0 where not masked."""
        assert not self.exact
        counts_N, sums_N = masks_NL.sum(axis=1), log_probs_NL.sum(axis=1)
        if self._all_planned:
            counts = range(1, self.length + 1)
            mean_by_count = [self.length / count * sums_N[counts_N == count].mean() for count in counts]
            self._exact_mean = float(np.mean(mean_by_count))
            return
        if self._ends_LL is None:
            ends = 1 + (self.length if self._both_ends else 0)
            unseen_L = log_probs_NL[0]
            seen_L = log_probs_NL[1:ends].diagonal() if self._both_ends else unseen_L
            self._ends_LL = seen_L, unseen_L
            masks_NL, counts_N, sums_N = masks_NL[ends:], counts_N[ends:], sums_N[ends:]
        seen_L, unseen_L = self._ends_LL
        known = float(seen_L.sum() + unseen_L.sum()) / 2  # the mean over l of the sum of c_l
        if not self._inner:
            self._exact_mean = known
            return
        share_unseen_N1 = (counts_N[:, None] - 1) / (self.length - 1)
        control_N = (masks_NL * (seen_L + share_unseen_N1 * (unseen_L - seen_L))).sum(axis=1)
        residual_N = self.length / counts_N * (sums_N - control_N)
        start = 0
        while start < len(residual_N):
            end = start + self._size(len(self._values))
            self._values.append(known + len(self._inner) / self.length * float(residual_N[start:end].mean()))
            start = end

    def _size(self, replicate: int) -> int:
        """Masks of a replicate; those of a round are as many as the samples of the first."""
        size, more = divmod(self._first_samples, self._first_replicates)
        return size + (replicate % self._first_replicates < more)


def stderr_of_mean(values_R: FloatArray) -> float:
    """The standard error of the mean of (R,) independent values; NaN of one."""
    return float(values_R.std(ddof=1)) / math.sqrt(len(values_R)) if len(values_R) > 1 else math.nan


def requests_by_block(request: Request, block_length: int | None) -> list[Request]:
    """The parts of a request that a model predicts one after the other, each with what is before it as its prompt.

    They are the blocks of the sequence, the first of which may begin within the prompt; None: the whole continuation.
    """
    if block_length is None:
        return [request] if request.continuation else []
    whole, begin = (*request.prompt, *request.continuation), len(request.prompt)
    edges = [begin, *range((begin // block_length + 1) * block_length, len(whole), block_length), len(whole)]
    return [Request(whole[:first], whole[first:last]) for first, last in pairwise(edges) if last > first]


class BoundOfBlocks:
    """The lower bound of one request to a model that predicts in blocks: the sum of the bounds of its blocks.

    Each is given the prompt and the clean blocks before it (:func:`requests_by_block`).

    Args:
        request: The request.
        block_length: The number of tokens of a block.
        settings: The arguments of :class:`Bound` behind the request.
    """

    def __init__(self, request: Request, block_length: int, *settings: Any, **named: Any) -> None:
        self.request, self.length = request, len(request.continuation)
        self.parts = [Bound(part, *settings, **named) for part in requests_by_block(request, block_length)]

    @property
    def exact(self) -> bool:
        return all(part.exact for part in self.parts)

    @property
    def values(self) -> FloatArray:
        """(R,) independent unbiased estimates in nats, one a replicate; (1,) the value itself where exact."""
        return np.sum(np.broadcast_arrays(*(part.values for part in self.parts)), axis=0) if self.parts else np.zeros(1)

    @property
    def score(self) -> Score:
        scores, values = [part.score for part in self.parts], self.values
        methods: tuple[Method, ...] = ("monte carlo", "enumerated", "one pass")
        found = [method for method in methods if any(score.method == method for score in scores)]
        return Score(
            mean=float(values.mean()),
            stderr=0.0 if self.exact else stderr_of_mean(values),
            exact=self.exact,
            samples=max((score.samples for score in scores), default=0),
            tokens=self.length,
            method=found[0] if found else "empty",
            truncated=self.request.truncated,
        )


class NoisyTokens(NamedTuple):
    """A continuation of which some tokens are replaced by random ones.

    Args:
        level: The noise level t.
        density: The density with which it was drawn.
        tokens_L: (L,) int64, the noisy tokens.
    """

    level: float
    density: float
    tokens_L: npt.NDArray[np.int64]


class BoundByNoise:
    """The lower bound of one request to a model of uniform-state diffusion: Monte Carlo over noise levels and tokens.

    Only the continuation is replaced. The levels of a replicate are a shifted grid, as the l of :class:`Bound`; the
    replicates are independent, and their scatter tells the error.

    Args:
        request: The request, with a continuation of L >= 0 tokens.
        alphabet: The entries that noise is drawn from.
        samples: The number of noisy continuations of the first round, at least 1.
        seed: The seed of the noise.
    """

    def __init__(self, request: Request, alphabet: Alphabet, samples: int, seed: int) -> None:
        self.request, self.seed, self._alphabet = request, seed, alphabet
        self.length = len(request.continuation)
        self._first_samples, self._first_replicates = samples, min(samples, REPLICATES)
        self._values: list[float] = []

    @property
    def parts(self) -> list[Bound]:
        """None: no masks are planned."""
        return []

    @property
    def exact(self) -> bool:
        return self.length == 0

    @property
    def values(self) -> FloatArray:
        """(R,) independent unbiased estimates in nats, one a replicate; (1,) the value itself where exact."""
        return np.array([0.0] if self.exact else self._values)

    @property
    def score(self) -> Score:
        values = self.values
        return Score(
            mean=float(values.mean()),
            stderr=0.0 if self.exact else stderr_of_mean(values),
            exact=self.exact,
            samples=sum(map(self._size, range(len(self._values)))),
            tokens=self.length,
            method="empty" if self.exact else "monte carlo",
            truncated=self.request.truncated,
        )

    def plan(self, samples: int) -> list[NoisyTokens]:
        """The noisy continuations to score until ``samples`` are drawn, in whole rounds of as many as the first."""
        if self.exact:
            return []
        replicates = range(len(self._values), self._first_replicates * (samples // self._first_samples))
        return [noisy for r in replicates for noisy in self._replicate(r)]

    def add(self, plan: Sequence[NoisyTokens], log_probs_N: FloatArray) -> None:
        """Takes in what the model gave for planned continuations (N,): the integrands' sums, their sign changed."""
        weighted_N, start = log_probs_N / np.array([noisy.density for noisy in plan]), 0
        while start < len(plan):
            end = start + self._size(len(self._values))
            self._values.append(float(weighted_N[start:end].mean()))
            start = end

    def _replicate(self, replicate: int) -> list[NoisyTokens]:
        size, length = self._size(replicate), self.length
        words = random_words(
            self.seed, Purpose.LIKELIHOOD, self.request.noise_key, 1 + 2 * size * length, sub_ordinal=replicate
        )
        uniform = words_to_uniform(words)
        levels_K, densities_K = drawn_levels((np.arange(size) + uniform[0]) / size)
        chosen_KL, drawn_KL = uniform[1:].reshape(2, size, length)
        tokens_L = np.array(self.request.continuation, dtype=np.int64)
        noisy_KL = np.where(chosen_KL < levels_K[:, None], self._alphabet.ids(drawn_KL), tokens_L)
        return [NoisyTokens(float(t), float(q), z_L) for t, q, z_L in zip(levels_K, densities_K, noisy_KL, strict=True)]

    def _size(self, replicate: int) -> int:
        """Continuations of a replicate; those of a round are as many as the samples of the first."""
        size, more = divmod(self._first_samples, self._first_replicates)
        return size + (replicate % self._first_replicates < more)


AnyBound = Bound | BoundOfBlocks | BoundByNoise


def bound_of(lm: LanguageModel, request: Request, *settings: Any, **named: Any) -> AnyBound:
    """The bound of a request to a model; settings as of :class:`Bound`, of which noise takes the first two."""
    if lm.facts.replaces:
        return BoundByNoise(request, Alphabet(lm.model.vocab_size, lm.mask_token_id), *settings[:2])
    if lm.block_length is None:
        return Bound(request, *settings, **named)
    return BoundOfBlocks(request, lm.block_length, *settings, **named)


def all_masks(length: int) -> BoolArray:
    """Every mask of at least one token: (2^L - 1, L)."""
    return (np.arange(1, 2**length)[:, None] >> np.arange(length) & 1).astype(bool)


def replicate_masks(seed: int, key: int, replicate: int, samples: int, length: int, counts: range) -> BoolArray:
    """(K, L) bool, the K = ``samples`` masks of one replicate: a pure function of the arguments.

    Replicates are independent of each other. The mean over one is as Eq. 6 would have it: a mask taken at random out of
    the K has l uniform over ``counts`` (consecutive values within 1..L) and, given l, positions uniformly without
    replacement. The k-th mask is not so: its l comes from the k-th part of a grid with one random shift, so that every
    part of ``counts`` has its share. The positions are windows that follow each other around one random order of the
    continuation, so every token is masked about as often as any other.
    """
    words = random_words(seed, Purpose.LIKELIHOOD, key, 1 + length, sub_ordinal=replicate)
    shift = words_to_uniform(words[:1])
    grid_K = (np.arange(samples) + shift) / samples
    # floor, not round: rounding half to even favours even l. The last point may round up to 1.
    counts_K = counts[0] + np.minimum(np.floor(grid_K * len(counts)).astype(np.int64), len(counts) - 1)
    place_L = np.argsort(np.argsort(words[1:], kind="stable"), kind="stable")
    first_K = np.cumsum(counts_K) - counts_K
    return (place_L[None] - first_K[:, None]) % length < counts_K[:, None]


def check_sampling(
    samples: int,
    max_samples: int | None = None,
    target_stderr: float | None = None,
    confidence: float | None = None,
    cfg_scale: float = 0.0,
    batch_tokens: int | None = None,
) -> None:
    """Raises UserError for an option out of range; arguments as of ``log_likelihood`` and ``rank_candidates``.

    What stops by an estimated error, a target or a ranking, needs a first round of as many samples as replicates.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1")
    if target_stderr is not None and not target_stderr > 0:
        raise UserError(f"target_stderr is {target_stderr}; it must be above 0 (nats)")
    if confidence is not None and not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}; it must lie between 0 and 1, as 0.99")
    if confidence is not None and samples < REPLICATES:
        raise UserError(f"samples is {samples}; a ranking needs at least {REPLICATES} to tell its error")
    first = samples if target_stderr is None else max(samples, REPLICATES)
    if max_samples is not None and max_samples < first:
        raise UserError(f"max_samples is {max_samples}, fewer than the {first} samples of the first round; raise it")
    if not cfg_scale >= 0:
        raise UserError(f"cfg_scale is {cfg_scale}; it must be at least 0")
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(f"batch_tokens is {batch_tokens}; it must be at least 1")
