"""What the loaders hand to the modules: tokens beside their noise."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TrainingBatch(NamedTuple):
    """A micro-batch of B sequences of length L.

    Attributes:
        tokens_BL: (B, L) int64; EOS where padded.
        attention_mask_BL: (B, L) bool, False where padded; None where every sequence is full.
        masked_BL: (B, L) bool: what the forward process masks, padding never. `arm` leaves it unread.
        p_B: (B,) float32: the probability with which each sequence's tokens were masked.
        ordinals_B: (B,) int64.
        denominator: tokens of the global batch over the number of its micro-batches (see ``objectives.losses``).
        global_tokens: tokens of the global batch, padding not counted.
        documents_BL: (B, L) int64: the document of its sequence that each token belongs to; None: attention crosses
            documents.
    """

    tokens_BL: Tensor
    attention_mask_BL: Tensor | None
    masked_BL: Tensor
    p_B: Tensor
    ordinals_B: Tensor
    denominator: float
    global_tokens: int
    documents_BL: Tensor | None = None


class ValidationBatch(NamedTuple):
    """B full sequences of length L.

    Attributes:
        tokens_BL: (B, L) int64.
        masked_BL: (B, L) bool: exactly l masked a row (Eq. 14).
        counted_B: (B,) bool, False where a row only fills up the batch of a rank that ran out.
        documents_B: (B,) int64: equal for sequences that begin in the same document.
        documents_BL: as in :class:`TrainingBatch`.
    """

    tokens_BL: Tensor
    masked_BL: Tensor
    counted_B: Tensor
    documents_B: Tensor
    documents_BL: Tensor | None = None
