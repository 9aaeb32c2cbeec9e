"""The log-likelihood of short continuations in random order, between a lower bound and an upper bound.

A masked diffusion model that decodes one token a step, in an order drawn uniformly at random, gives a text the
probability

    p(x) = mean over all orders o of p(x | o),   p(x | o) = product over j of p(x_o(j) | x_o(1), ..., x_o(j-1)).

Eq. 6 is the mean over the orders of log p(x | o), so by Jensen's inequality it is a lower bound on log p(x). Of up to 8
tokens p(x) itself is known by 2^L - 1 predictions, one for each set of masked tokens. Let F(S) be the mean, over the
orders of a set S of positions, of the probability of its tokens when they are decoded first and in this order:

    F(S) = mean over i in S of F(S without i) p(x_i | S without i),   F(empty) = 1,   p(x) = F(all).

A model that predicts in blocks decodes the tokens of each block in random order, and its p(x) is the product over the
blocks: of blocks of up to 8 tokens it is known, however long the text is.

Of longer texts there is an upper bound. The logarithm lies below its tangents: log p <= log u + p / u - 1 for every
u > 0, with equality at u = p (TUBE, arXiv:2605.24292). The mean of p(x | o) over drawn orders estimates p without bias,
and so the right side, as long as u does not depend on these orders. Here u is the mean of p(x | o) over as many other
orders. The probabilities of orders differ by large factors, so the bound is of use for short texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.bound import all_masks, requests_by_block, stderr_of_mean
from llada_lightning.evaluation.policy import MOST_IN_RANDOM_ORDER
from llada_lightning.evaluation.requests import FloatArray, Ids, Request, check_request
from llada_lightning.evaluation.scorer import Scorer, ScoringProgress, masked_input
from llada_lightning.objectives.noise import Purpose, random_words
from llada_lightning.support.errors import UserError


@dataclass(frozen=True)
class AnyOrderScore:
    """The log-likelihood of one continuation in random order, in nats.

    Args:
        exact: The value; None where the continuation, or a block of it, has more than ``MOST_IN_RANDOM_ORDER`` tokens.
        lower, lower_stderr: The lower bound of Eq. 6, estimated from the orders drawn, and its standard error.
        upper, upper_stderr: The tangent upper bound, and its standard error given the tangent's point. Both estimates
            are unbiased, so a single one may lie on the wrong side of `exact`.
        tokens: The number of tokens.
        orders: The number of orders drawn.
    """

    exact: float | None
    lower: float
    lower_stderr: float
    upper: float
    upper_stderr: float
    tokens: int
    orders: int


def any_order_log_likelihood(
    lm: LanguageModel,
    requests: Sequence[tuple[Ids, Ids]],
    orders: int = 64,
    *,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: bool | None = False,
) -> list[AnyOrderScore]:
    """The log-likelihood of each continuation given its prompt, decoded in random order, with both bounds.

    Args:
        lm: A model with a [MASK].
        requests: The pairs of token ids: (prompt, continuation), no continuation empty.
        orders: The number of orders that are drawn, at least 4: one half places the tangent, the other half is
            averaged. Each costs as many predictions as there are tokens.
        seed: The seed of the orders.
        batch_tokens: The number of tokens of one forward pass, as of :func:`likelihood.log_likelihood`.
        progress: Whether a progress bar is shown, as there.

    Raises:
        UserError: The model has no [MASK], there are too few orders, or a request cannot be scored.
    """
    if not lm.facts.masks:
        has = "no order of its tokens; its log_likelihood is a bound"
        if not lm.facts.denoises:
            has = "one order only; its log_likelihood is exact"
        raise UserError(f"any order: {lm.objective} has no [MASK] and {has}")
    if orders < 4:
        raise UserError(f"orders is {orders}; it must be at least 4, for a mean and its error from each half")
    checked = [check_request(lm, *pair, None, f"request {n}") for n, pair in enumerate(requests)]
    if empty := [n for n, request in enumerate(checked) if not request.continuation]:
        raise UserError(f"request {empty[0]}: the continuation is empty; give at least one token")
    with ScoringProgress(progress) as bar:
        scorer = Scorer(lm, 0.0, batch_tokens, bar)
        return [
            _of_blocks([_scored(scorer, part, orders, seed) for part in requests_by_block(request, lm.block_length)])
            for request in checked
        ]


def _of_blocks(scores: list[AnyOrderScore]) -> AnyOrderScore:
    """The score of a continuation from those of its blocks, each given the ones before it: values and bounds add up."""
    exact = [score.exact for score in scores]
    return AnyOrderScore(
        exact=None if None in exact else math.fsum(value for value in exact if value is not None),
        lower=math.fsum(score.lower for score in scores),
        lower_stderr=math.hypot(*(score.lower_stderr for score in scores)),
        upper=math.fsum(score.upper for score in scores),
        upper_stderr=math.hypot(*(score.upper_stderr for score in scores)),
        tokens=sum(score.tokens for score in scores),
        orders=scores[0].orders,
    )


def _scored(scorer: Scorer, request: Request, orders: int, seed: int) -> AnyOrderScore:
    length = len(request.continuation)
    drawn_KL = np.array([drawn_order(seed, request.noise_key, k, length) for k in range(orders)])
    # Before step j of an order, the tokens from o(j) on are masked.
    place_KL = np.argsort(drawn_KL, axis=1)
    masks_NL = (place_KL[:, None, :] >= np.arange(length)[:, None]).reshape(-1, length)
    if length <= MOST_IN_RANDOM_ORDER:
        masks_NL = np.concatenate([masks_NL, all_masks(length)])
    distinct_ML, of_N = np.unique(masks_NL, axis=0, return_inverse=True)
    values_ML = np.zeros(distinct_ML.shape)
    rows = scorer.log_probs([masked_input(scorer.lm, request, mask_L) for mask_L in distinct_ML])
    values_ML[distinct_ML] = np.concatenate(rows)
    values_KJL = values_ML[of_N.reshape(-1)[: orders * length]].reshape(orders, length, length)
    log_p_K = np.take_along_axis(values_KJL, drawn_KL[:, :, None], axis=2).sum(axis=(1, 2))
    half = orders // 2
    log_u = _log_mean_exp(log_p_K[:half])
    tangent_K = log_u + np.exp(log_p_K[half:] - log_u) - 1
    return AnyOrderScore(
        exact=exact_in_random_order(distinct_ML, values_ML) if length <= MOST_IN_RANDOM_ORDER else None,
        lower=float(log_p_K.mean()),
        lower_stderr=stderr_of_mean(log_p_K),
        upper=float(tangent_K.mean()),
        upper_stderr=stderr_of_mean(tangent_K),
        tokens=length,
        orders=orders,
    )


def drawn_order(seed: int, key: int, number: int, length: int) -> np.ndarray:
    """(L,) int64, a uniformly random order of the positions, a pure function of the arguments."""
    words = random_words(seed, Purpose.LIKELIHOOD, key, length, sub_ordinal=number)
    return np.argsort(words, kind="stable")


def exact_in_random_order(masks_ML: np.ndarray, log_probs_ML: FloatArray) -> float:
    """log p(x) in nats, from the log-probabilities of the masked tokens under every mask of L tokens.

    Args:
        masks_ML: (M, L) bool, every mask of at least one token; others are not read.
        log_probs_ML: (M, L) float64, nats, of the masked tokens.
    """
    length = masks_ML.shape[1]
    weight_L = 1 << np.arange(length)
    row = {int(weight_L @ mask_L): number for number, mask_L in enumerate(masks_ML)}
    everything = (1 << length) - 1
    log_f = np.full(1 << length, -math.inf)
    log_f[0] = 0.0
    for revealed in range(1, 1 << length):
        members = [i for i in range(length) if revealed >> i & 1]
        parts = [log_f[revealed ^ 1 << i] + log_probs_ML[row[everything ^ revealed | 1 << i], i] for i in members]
        log_f[revealed] = _log_mean_exp(np.array(parts))
    return float(log_f[everything])


def _log_mean_exp(values_K: FloatArray) -> float:
    highest = float(values_K.max())
    return highest + math.log(float(np.exp(values_K - highest).mean()))
