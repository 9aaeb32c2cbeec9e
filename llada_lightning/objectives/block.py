"""Block diffusion: masked diffusion within blocks, autoregression from block to block (Arriola et al. 2025,
arXiv:2503.09573). Its validation loss is the sum over the blocks of the bound of Eq. 14.

A sequence of L tokens is L/L' blocks of L' tokens. Each has a mask ratio of its own, and is predicted from what is not
masked of itself and from the clean blocks before it. One block is `llada`; blocks of one token are an autoregressive
factorisation, whose bound is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llada_lightning.model.patterns import block_diffusion
from llada_lightning.objectives import llada
from llada_lightning.objectives.batches import LevelSums, Predictor, TrainingBatch, ValidationBatch
from llada_lightning.objectives.llada import BOUND, LossWeight


def training_loss(
    model: Predictor,
    batch: TrainingBatch,
    block_length: int,
    weight: LossWeight = BOUND,
    levels: LevelSums | None = None,
) -> Tensor:
    """The loss of Eq. 3 within each block of a micro-batch, in nats per token of the global batch."""
    hidden_MD = _hidden(model, batch, block_length, batch.scored_M)
    return llada.masked_loss(model, batch, hidden_MD, weight, block_length, levels)


def sequence_nll(
    model: Predictor, batch: ValidationBatch, block_length: int, levels: LevelSums | None = None
) -> Tensor:
    """(B,) float64: a sample of the bound of each sequence or response, summed over its blocks, in nats."""
    return llada.masked_nll(model, batch, _hidden(model, batch, block_length), block_length, levels)


def copied_positions(length: int, block_length: int) -> int:
    """The positions of the clean copy: all blocks but the last, which no other block sees."""
    return (-(-length // block_length) - 1) * block_length


def _hidden(
    model: Predictor, batch: TrainingBatch | ValidationBatch, block_length: int, rows_M: Tensor | None = None
) -> Tensor:
    """(B L, D), or (M, D) of some of these rows: what the head makes logits of."""
    assert model.mask_token_id is not None
    noisy_BL = batch.tokens_BL.masked_fill(batch.masked_BL, model.mask_token_id)
    hidden = hidden_beside_copy(
        model,
        noisy_BL,
        batch.tokens_BL,
        block_length,
        batch.documents_BL,
        batch.attention_mask_BL,
        batch.ordinals_B if isinstance(batch, TrainingBatch) else None,
        rows_M,
    )
    return hidden.flatten(0, 1) if rows_M is None else hidden


def hidden_beside_copy(
    model: Predictor,
    noisy_BL: Tensor,
    tokens_BL: Tensor,
    block_length: int,
    documents_BL: Tensor | None = None,
    attention_mask_BL: Tensor | None = None,
    ordinals_B: Tensor | None = None,
    rows_M: Tensor | None = None,
) -> Tensor:
    """The normalised residual stream of a noisy sequence, by one pass over it and its clean copy behind it.

    Args:
        model: The model.
        noisy_BL: (B, L) int64, the sequences with [MASK] where something is to be predicted.
        tokens_BL: (B, L) int64, the sequences themselves.
        block_length: The number of tokens of a block.
        documents_BL: (B, L) int64, the document of each token; None: attention crosses documents.
        attention_mask_BL: (B, L) bool, False where a token is padding.
        ordinals_B: (B,) int64, the ordinals of a training batch, which decide what dropout drops; None: nothing.
        rows_M: (M,) int64, the rows of the flattened (B L) that are wanted; None: all.

    Returns:
        (B, L, D) or (M, D), each position by its own noisy block and the clean blocks before it.
    """
    length = tokens_BL.shape[1]
    copied = copied_positions(length, block_length)
    if not copied:  # `llada`, to the last bit
        given = (noisy_BL, documents_BL, attention_mask_BL)
        return model.hidden_after((), *given, causal=False, ordinals_B=ordinals_B, rows_M=rows_M)

    def with_copy(first_BL: Tensor, clean_BL: Tensor) -> Tensor:
        return torch.cat([first_BL, clean_BL[:, :copied]], dim=1)

    positions_L = torch.arange(length, device=tokens_BL.device)
    return model.hidden_after(
        (),
        with_copy(noisy_BL, tokens_BL),
        None if documents_BL is None else with_copy(documents_BL, documents_BL),
        None if attention_mask_BL is None else with_copy(attention_mask_BL, attention_mask_BL),
        causal=False,
        pattern=block_diffusion(length, block_length),
        positions_L=torch.cat([positions_L, positions_L[:copied]]),
        queries=slice(0, length),
        ordinals_B=ordinals_B,
        rows_M=rows_M,
    )
