"""Autoregression: causal attention and next-token prediction (paper, Eq. 2). Its validation loss is exact."""

from __future__ import annotations

import torch
from torch import Tensor

from llada_lightning.objectives.batches import Predictor, TrainingBatch, ValidationBatch


def training_loss(model: Predictor, batch: TrainingBatch) -> Tensor:
    """The loss of Eq. 2 of a micro-batch, in nats per token of the global batch."""
    if batch.response_BL is not None:
        weights_BL = batch.response_BL / batch.response_BL.sum(dim=1, keepdim=True)
    elif batch.attention_mask_BL is not None:
        weights_BL = batch.attention_mask_BL.float()
    else:
        weights_BL = torch.ones_like(batch.tokens_BL, dtype=torch.float32)
    return _nll(model, batch, weights_BL)[0] / batch.denominator


def sequence_nll(model: Predictor, batch: ValidationBatch) -> Tensor:
    """(B,) float64: the negative log-likelihood of each sequence or response, in nats."""
    ones_BL = torch.ones_like(batch.tokens_BL, dtype=torch.float32)
    nll_BL = _nll(model, batch, ones_BL)[1].view_as(ones_BL).double()
    return nll_BL.sum(dim=1) if batch.response_BL is None else (nll_BL * batch.response_BL).sum(dim=1)


def shift_right(tokens_BL: Tensor, start_token_id: int) -> Tensor:
    """The input of next-token prediction: EOS, then every token but the last.

    EOS is put before the first token because it precedes every document. So `arm` predicts all L tokens of a sequence,
    the same ones as `llada`, and both losses are means over the same tokens.
    """
    start_B1 = tokens_BL.new_full((tokens_BL.shape[0], 1), start_token_id)
    return torch.cat([start_B1, tokens_BL[:, :-1]], dim=1)


def _nll(model: Predictor, batch: TrainingBatch | ValidationBatch, weights_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of the negative log-likelihoods, and (B L,) of every token."""
    tokens_BL, start_ids = batch.tokens_BL, model.start_ids(batch)
    seen_BL, ordinals_B = tokens_BL, None
    if isinstance(batch, TrainingBatch):
        seen_BL, ordinals_B = tokens_BL if batch.noisy_BL is None else batch.noisy_BL, batch.ordinals_B
    # Right padding lies in the future of every token that counts: causal attention needs no mask for it.
    if start_ids:
        inputs_BL = shift_right(seen_BL, start_ids[-1])
        hidden_BLD = model.hidden_after(
            start_ids[:-1], inputs_BL, batch.documents_BL, causal=True, ordinals_B=ordinals_B
        )
    else:  # the first token is given and has no weight: what is put at its place does not matter
        hidden_BLD = model.hidden_after((), seen_BL, batch.documents_BL, causal=True, ordinals_B=ordinals_B)
        hidden_BLD = hidden_BLD.roll(1, dims=1)
    return model.head_nll(hidden_BLD.flatten(0, 1), tokens_BL.flatten(), weights_BL.flatten())
