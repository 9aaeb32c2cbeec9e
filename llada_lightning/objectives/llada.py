"""Masked diffusion: full attention and the loss of Eq. 3. Its validation loss is the bound of Eq. 14."""

from __future__ import annotations

import torch
from torch import Tensor

from llada_lightning.objectives.batches import Predictor, TrainingBatch, ValidationBatch


def training_loss(model: Predictor, batch: TrainingBatch) -> Tensor:
    """The loss of Eq. 3 of a micro-batch (Eq. 5 of responses), in nats per token of the global batch."""
    hidden_ND = _hidden(model, batch)
    hidden_MD, targets_M = (x.index_select(0, batch.scored_M) for x in (hidden_ND, batch.tokens_BL.flatten()))
    rows_M = batch.scored_M // batch.tokens_BL.shape[1]
    weights_M = masked_diffusion_weights(batch.p_B[rows_M], batch.scored)
    if batch.response_lengths_B is not None:
        weights_M = weights_M / batch.response_lengths_B[rows_M]
    return model.head_nll(hidden_MD, targets_M, weights_M)[0] / batch.denominator


def sequence_nll(model: Predictor, batch: ValidationBatch) -> Tensor:
    """(B,) float64: a sample of the bound of each sequence (Eq. 14) or response (Eq. 6), in nats."""
    masked_N = batch.masked_BL.flatten()
    hidden_MD = _hidden(model, batch)[masked_N]
    targets_M = batch.tokens_BL.flatten()[masked_N]
    _, nll_M = model.head_nll(hidden_MD, targets_M, torch.ones_like(targets_M, dtype=torch.float32))
    return nll_bound(nll_M, batch.masked_BL, batch.scored_counts())


def masked_diffusion_weights(p_M: Tensor, scored: int) -> Tensor:
    """What the loss of Eq. 3 weighs the masked tokens' negative log-likelihoods by; that of Eq. 2 takes each once.

    Args:
        p_M: (M,) probability with which each of them was masked.
        scored: The number of masked tokens, which come first; what follows only fills up a shape, and counts nothing.

    Returns:
        (M,) 1/p, and 0 behind the scored ones.
    """
    fills_M = torch.arange(len(p_M), device=p_M.device) >= scored
    return p_M.reciprocal().masked_fill(fills_M, 0.0)


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


def _hidden(model: Predictor, batch: TrainingBatch | ValidationBatch) -> Tensor:
    """(B L, D): what the head makes logits of."""
    assert model.mask_token_id is not None
    inputs_BL = batch.tokens_BL.masked_fill(batch.masked_BL, model.mask_token_id)
    hidden_BLD = model.hidden_after(
        model.start_ids(batch),
        inputs_BL,
        batch.documents_BL,
        batch.attention_mask_BL,
        causal=False,
        ordinals_B=batch.ordinals_B if isinstance(batch, TrainingBatch) else None,
    )
    return hidden_BLD.flatten(0, 1)
