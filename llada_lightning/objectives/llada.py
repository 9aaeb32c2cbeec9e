"""Masked diffusion: full attention and the loss of Eq. 3. Its validation loss is the bound of Eq. 14."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

import torch
from torch import Tensor

from llada_lightning.objectives import TrainingKind
from llada_lightning.objectives.batches import LevelSums, Predictor, TrainingBatch, ValidationBatch
from llada_lightning.objectives.densities import covers_all_ratios, end_without_mass
from llada_lightning.objectives.density_settings import DensitySetting
from llada_lightning.support.errors import UserError

WeightName = Literal["elbo", "ce", "clipped", "per_masked_token"]


@dataclass(frozen=True)
class LossWeight:
    """What the training loss weighs each masked token by.

    Args:
        name: `elbo`: 1/(p q(t)), so that the expectation of the loss is that of Eq. 3 whatever the density q of the
            mask ratios; `clipped`: the same, at most ``limit``; `ce`: 1; `per_masked_token`: the length of the sequence
            over the number of its masked tokens, which gives their mean (MaskGIT: Chang et al. 2022).
        limit: The largest weight of `clipped`; the others have none.

    Raises:
        UserError: There is no such weight, or the limit does not fit it.
    """

    name: WeightName = "elbo"
    limit: float | None = None

    def __post_init__(self) -> None:
        names = get_args(WeightName)
        if self.name not in names:
            near = get_close_matches(str(self.name), names, 1)
            nearest = f"the nearest is {near[0]}; " if near else ""
            raise UserError(f"model.loss_weight: '{self.name}' is no weight; {nearest}choose from {', '.join(names)}")
        if self.name == "clipped" and (self.limit is None or not 0 < self.limit < math.inf):
            given = "none given" if self.limit is None else f"{self.limit:g} given"
            raise UserError(f"model.loss_weight_limit: {given}; loss_weight clipped needs a number above 0, such as 5")
        if self.name != "clipped" and self.limit is not None:
            raise UserError(
                f"model.loss_weight_limit: {self.limit:g} given, but loss_weight {self.name} has no limit; leave it "
                "out, or give loss_weight clipped"
            )

    def kind(self, density: DensitySetting | None) -> TrainingKind:
        """Whether the loss estimates the bound without bias. None is the uniform density."""
        bound = self.name == "elbo" and covers_all_ratios(None if density is None else density.density)
        return "bound" if bound else "surrogate"

    def check(self, density: DensitySetting | None) -> None:
        """Refuse a density with which the weight has no limit that a run could average over.

        Raises:
            UserError: Names both settings.
        """
        end = None if self.name != "elbo" or density is None else end_without_mass(density.density)
        if end is not None:
            raise UserError(
                f"data.density: {density} falls to 0 at t = {end:g} faster than in proportion to the distance, so that "
                "model.loss_weight elbo, 1/(p q(t)), is infinite there and its average does not settle; take a density "
                "with more mass at that end (of beta: a and b up to 2), or another loss_weight: clipped, ce, "
                "per_masked_token"
            )

    def divisors(self, batch: TrainingBatch) -> Tensor:
        """(B,) float32: 1 over the weight of the masked tokens of each sequence."""
        if self.name == "ce":
            return torch.ones_like(batch.p_B)
        if self.name == "per_masked_token":
            if batch.response_lengths_B is not None:
                lengths_B = batch.response_lengths_B
            elif batch.attention_mask_BL is not None:
                lengths_B = batch.attention_mask_BL.sum(dim=1)
            else:
                lengths_B = torch.full_like(batch.ordinals_B, batch.tokens_BL.shape[1])
            return batch.masked_BL.sum(dim=1) / lengths_B
        divisors_B = batch.p_B if batch.density_B is None else batch.p_B * batch.density_B
        return divisors_B if self.limit is None else divisors_B.clamp(min=1 / self.limit)


BOUND = LossWeight()
"""The weight of Eq. 3."""


def training_loss(
    model: Predictor, batch: TrainingBatch, weight: LossWeight = BOUND, levels: LevelSums | None = None
) -> Tensor:
    """The loss of Eq. 3 of a micro-batch (Eq. 5 of responses), in nats per token of the global batch.

    With a weight other than that of the bound it is a surrogate loss. ``levels`` is handed the unweighted values.
    """
    return masked_loss(model, batch, _hidden(model, batch, batch.scored_M), weight, levels=levels)


def sequence_nll(model: Predictor, batch: ValidationBatch, levels: LevelSums | None = None) -> Tensor:
    """(B,) float64: a sample of the bound of each sequence (Eq. 14) or response (Eq. 6), in nats."""
    return masked_nll(model, batch, _hidden(model, batch), levels=levels)


def masked_loss(
    model: Predictor,
    batch: TrainingBatch,
    hidden_MD: Tensor,
    weight: LossWeight,
    block_length: int | None = None,
    levels: LevelSums | None = None,
) -> Tensor:
    """The weighted loss of the masked tokens of a micro-batch, in nats per token of the global batch.

    Args:
        model: The model.
        batch: The micro-batch.
        hidden_MD: (M, D) hidden states of the positions ``scored_M``.
        weight: The weight of each masked token.
        block_length: The number of tokens that share a mask ratio; None: those of a sequence.
        levels: What the negative log-likelihood of each masked token is handed to, with its mask probability.
    """
    targets_M = batch.tokens_BL.flatten().index_select(0, batch.scored_M)
    length = batch.tokens_BL.shape[1]
    rows_M = batch.scored_M // length

    def of_tokens(values: Tensor) -> Tensor:
        """(M,): the value of the sequence (B,), or of the block (B, K), that each token belongs to."""
        values_M = values[rows_M]
        if values_M.ndim == 1:
            return values_M
        assert block_length is not None
        return values_M.gather(1, (batch.scored_M % length // block_length)[:, None])[:, 0]

    divisors = weight.divisors(batch)
    divisors_M = of_tokens(divisors)
    weights_M = masked_diffusion_weights(divisors_M, batch.scored)
    if batch.response_lengths_B is not None:
        weights_M = weights_M / batch.response_lengths_B[rows_M]
    total, nll_M = model.head_nll(hidden_MD, targets_M, weights_M)
    if levels is not None:
        p_M = divisors_M if divisors is batch.p_B else of_tokens(batch.p_B)
        counted_M = weights_M > 0  # what fills up weighs nothing
        levels.add(p_M, nll_M.masked_fill(~counted_M, 0.0), counted_M)
    return total / batch.denominator


def masked_nll(
    model: Predictor,
    batch: ValidationBatch,
    hidden_ND: Tensor,
    block_length: int | None = None,
    levels: LevelSums | None = None,
) -> Tensor:
    """(B,) float64: a sample of the bound of each sequence or response, or the sum of those of its blocks, in nats.

    ``levels`` is handed the negative log-likelihood of each masked token that counts, with the share of masked tokens.
    """
    masked_N = batch.masked_BL.flatten()
    hidden_MD, targets_M = hidden_ND[masked_N], batch.tokens_BL.flatten()[masked_N]
    _, nll_M = model.head_nll(hidden_MD, targets_M, torch.ones_like(targets_M, dtype=torch.float32))
    may_be_masked_BL = torch.ones_like(batch.masked_BL) if batch.response_BL is None else batch.response_BL
    if levels is not None:
        shares_M = masked_shares(batch.masked_BL, may_be_masked_BL, block_length).flatten()[masked_N]
        counted_M = batch.counted_B[batch.masked_BL.nonzero()[:, 0]]
        levels.add(shares_M[counted_M], nll_M[counted_M])
    if block_length is None:
        return nll_bound(nll_M, batch.masked_BL, batch.scored_counts())
    return nll_bound_of_blocks(nll_M, batch.masked_BL, may_be_masked_BL, block_length)


def masked_diffusion_weights(divisors_M: Tensor, scored: int | Tensor) -> Tensor:
    """What the loss of Eq. 3 weighs the masked tokens' negative log-likelihoods by; that of Eq. 2 takes each once.

    Args:
        divisors_M: (M,) the probability p with which each of them was masked (:meth:`LossWeight.divisors`).
        scored: The number of masked tokens, which come first; what follows only fills up a shape, and counts nothing.

    Returns:
        (M,) 1/p, and 0 behind the scored ones.
    """
    fills_M = torch.arange(len(divisors_M), device=divisors_M.device) >= scored
    return divisors_M.reciprocal().masked_fill(fills_M, 0.0)


def nll_bound(nll_M: Tensor, masked_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    """One Monte Carlo sample of Eq. 14 for each sequence, or of Eq. 6 for each response: its length over l times the
    sum over its l masked tokens.

    Args:
        nll_M: (M,) negative log-likelihood of the masked tokens, in the order of ``masked_BL.nonzero()``.
        masked_BL: (B, L) bool, at least one True a row.
        lengths_B: (B,) int64: The tokens of each response; None: L.

    Returns:
        (B,) float64, nats per sequence or response.
    """
    counts_B = masked_BL.sum(dim=1)
    assert bool((counts_B > 0).all()), "Eq. 14 masks at least one token"
    rows_M = masked_BL.nonzero()[:, 0]
    sums_B = torch.zeros(masked_BL.shape[0], dtype=torch.float64, device=nll_M.device)
    sums_B.index_add_(0, rows_M, nll_M.double())
    return sums_B * (masked_BL.shape[1] if lengths_B is None else lengths_B) / counts_B


def nll_bound_of_blocks(nll_M: Tensor, masked_BL: Tensor, may_be_masked_BL: Tensor, block_length: int) -> Tensor:
    """The sum over the blocks of each sequence of :func:`nll_bound`, each given the blocks before it.

    Args:
        nll_M: (M,) negative log-likelihood of the masked tokens, in the order of ``masked_BL.nonzero()``.
        masked_BL: (B, L) bool, at least one True in each block that has tokens which may be masked.
        may_be_masked_BL: (B, L) bool, the tokens whose likelihood is asked for.
        block_length: The number of tokens of a block.

    Returns:
        (B,) float64, nats per sequence or response.
    """
    rows, length = masked_BL.shape
    blocks = -(-length // block_length)
    of_block_N = (
        torch.arange(rows, device=masked_BL.device)[:, None] * blocks
        + torch.arange(length, device=masked_BL.device) // block_length
    ).flatten()
    counts_K, lengths_K = (
        torch.bincount(of_block_N[chosen_BL.flatten()], minlength=rows * blocks)
        for chosen_BL in (masked_BL, may_be_masked_BL)
    )
    assert bool((counts_K[lengths_K > 0] > 0).all()), "Eq. 14 masks at least one token of each block"
    sums_K = torch.zeros(rows * blocks, dtype=torch.float64, device=nll_M.device)
    sums_K.index_add_(0, of_block_N[masked_BL.flatten()], nll_M.double())
    return (sums_K * lengths_K / counts_K.clamp(min=1)).view(rows, blocks).sum(dim=1)


def masked_shares(masked_BL: Tensor, may_be_masked_BL: Tensor, block_length: int | None = None) -> Tensor:
    """(B, L) float32: the share of masked tokens of the sequence, or of the block, that each position belongs to.

    Args:
        masked_BL: (B, L) bool.
        may_be_masked_BL: (B, L) bool, the tokens that are counted; without one the share is NaN.
        block_length: The number of tokens of a block; None: all of them.
    """
    length = masked_BL.shape[1]
    width = block_length or length
    counts_BK, lengths_BK = (
        torch.nn.functional.pad(chosen_BL, (0, -length % width)).unflatten(1, (-1, width)).sum(dim=2)
        for chosen_BL in (masked_BL, may_be_masked_BL)
    )
    return (counts_BK / lengths_BK).repeat_interleave(width, dim=1)[:, :length]


def _hidden(model: Predictor, batch: TrainingBatch | ValidationBatch, rows_M: Tensor | None = None) -> Tensor:
    """(B L, D), or (M, D) of some of these rows: what the head makes logits of."""
    assert model.mask_token_id is not None
    inputs_BL = batch.tokens_BL.masked_fill(batch.masked_BL, model.mask_token_id)
    hidden = model.hidden_after(
        model.start_ids(batch),
        inputs_BL,
        batch.documents_BL,
        batch.attention_mask_BL,
        causal=False,
        ordinals_B=batch.ordinals_B if isinstance(batch, TrainingBatch) else None,
        rows_M=rows_M,
    )
    return hidden.flatten(0, 1) if rows_M is None else hidden
