"""What the loss of an objective is computed from: the batches, and the model that is trained."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llada_lightning.model.head import RowLoss
from llada_lightning.model.patterns import Pattern

BUCKET = 64
"""Counts of scored positions are rounded up to multiples of it: fewer shapes, of a size that GPUs multiply well."""


class TrainingBatch(NamedTuple):
    """A micro-batch of B sequences of length L.

    Attributes:
        tokens_BL: (B, L) int64; EOS where padded.
        attention_mask_BL: (B, L) bool, False where padded; None where every sequence is full.
        masked_BL: (B, L) bool: what the forward process masks, padding never. `arm` leaves it unread.
        p_B: (B,) float32: the probability with which each sequence's tokens were masked; (B, K) that of each of its K
            blocks, where blocks have probabilities of their own.
        ordinals_B: (B,) int64.
        scored_M: (M,) int64: where masked tokens lie in the flattened (B L), then zeros up to a multiple of ``BUCKET``.
            Known to the host, so that the device is not waited for.
        scored: The number of masked tokens among them, which come first. It and ``denominator`` are numbers of the
            host, and tensors () of the device where a graph of the step reads them.
        denominator: The tokens of the global batch over the number of its micro-batches. A loss is a weighted sum over
            it. The mean over micro-batches and ranks, which Lightning and DDP take, is then the loss per token of the
            global batch, however it was split.
        global_tokens: The number of tokens of the global batch, padding not counted.
        documents_BL: (B, L) int64: the document of its sequence that each token belongs to; None: attention crosses
            documents.
        response_BL: (B, L) bool: the response and the one EOS that ends it, which are what `arm` learns of a pair;
            None: there is no prompt, and every token is learned.
        response_lengths_B: (B,) int64: tokens that the forward process may mask, padding EOS included (Eq. 5); None
            with ``response_BL``. Each response's loss is divided by its own length, and ``denominator`` is B.
        noisy_BL: (B, L) int64: what the model sees in place of ``tokens_BL``, which stay the targets; None: the same.
        density_B: (B,) or (B, K) float32: the density q(t) of the mask ratio t, at the t of each p; None: 1, as t is
            uniform.
    """

    tokens_BL: Tensor
    attention_mask_BL: Tensor | None
    masked_BL: Tensor
    p_B: Tensor
    ordinals_B: Tensor
    scored_M: Tensor
    scored: int | Tensor
    denominator: float | Tensor
    global_tokens: int
    documents_BL: Tensor | None = None
    response_BL: Tensor | None = None
    response_lengths_B: Tensor | None = None
    density_B: Tensor | None = None
    noisy_BL: Tensor | None = None

    def rows(self, rows: slice, masked_BL: Tensor | None = None) -> TrainingBatch:
        """Some of the sequences, masked as they are or as given (of these rows); the denominator stays."""
        own = [name for name in self._fields if name.endswith(("_B", "_BL"))]
        cut: dict[str, Any] = {name: getattr(self, name) for name in own}
        cut = {name: None if value is None else value[rows] for name, value in cut.items()}
        if masked_BL is not None:
            cut["masked_BL"] = masked_BL
        scored_M, scored = scored_positions(cut["masked_BL"])
        return self._replace(**cut, scored_M=scored_M, scored=scored)


def scored_positions(masked_BL: Tensor) -> tuple[Tensor, int]:
    """``TrainingBatch.scored_M`` and ``scored`` of a mask."""
    positions_M = masked_BL.flatten().nonzero()[:, 0]
    filled = bucketed(len(positions_M))
    return torch.nn.functional.pad(positions_M, (0, filled - len(positions_M))), len(positions_M)


def bucketed(count: int) -> int:
    """A count, rounded up to a multiple of ``BUCKET``."""
    return -(-count // BUCKET) * BUCKET


class ValidationBatch(NamedTuple):
    """B sequences of length L.

    Attributes:
        tokens_BL: (B, L) int64.
        masked_BL: (B, L) bool: exactly l masked a row, or a block (Eq. 14).
        counted_B: (B,) bool, False where a row only fills up the batch of a rank that ran out.
        documents_B: (B,) int64: equal for sequences that begin in the same document.
        documents_BL, attention_mask_BL, response_BL: As in :class:`TrainingBatch`; ``masked_BL`` masks responses only.
        ordinals_B: (B,) int64, from which an objective with a noise of its own draws it; None: the batch has no number.
        noise_seed: The seed of that noise.
        p_B: (B,) float32: the probability with which each sequence's tokens were corrupted, by such an objective.
        noisy_BL: (B, L) int64: what the model sees in place of ``tokens_BL``, by such an objective.
        density_B: (B,) float32: the density of that probability, at each of ``p_B``.
    """

    tokens_BL: Tensor
    masked_BL: Tensor
    counted_B: Tensor
    documents_B: Tensor
    documents_BL: Tensor | None = None
    attention_mask_BL: Tensor | None = None
    response_BL: Tensor | None = None
    ordinals_B: Tensor | None = None
    noise_seed: int = 0
    p_B: Tensor | None = None
    noisy_BL: Tensor | None = None
    density_B: Tensor | None = None

    def scored_counts(self) -> Tensor:
        """(B,) int64: tokens whose likelihood is asked for."""
        if self.response_BL is None:
            return torch.full_like(self.documents_B, self.tokens_BL.shape[1])
        return self.response_BL.sum(dim=1)


class LevelSums(Protocol):
    """What a loss hands its values to, so that they can be shown by the noise level of their tokens."""

    def add(self, levels_N: Tensor, nats_N: Tensor, counts_N: Tensor | None = None) -> None:
        """Add the values of N tokens, or sums over several tokens of one level.

        Args:
            levels_N: (N,) float, in (0, 1]: the probability with which the tokens were noised in training; in
                validation the share of noised tokens of the sequence or block.
            nats_N: (N,) float: the unweighted negative log-likelihood of each token, or their sum.
            counts_N: (N,): the number of tokens that each value is the sum of; None: 1.
        """


class Predictor(Protocol):
    """What a loss asks of the model that is trained: the base class of all modules provides it."""

    mask_token_id: int | None

    def start_ids(self, batch: TrainingBatch | ValidationBatch) -> tuple[int, ...]:
        """The token ids before the sequences of a batch, none of which is predicted."""

    def hidden_after(
        self,
        start_ids: tuple[int, ...],
        inputs_BL: Tensor,
        documents_BL: Tensor | None,
        attention_mask_BL: Tensor | None = None,
        *,
        causal: bool,
        pattern: Pattern | None = None,
        positions_L: Tensor | None = None,
        queries: slice = slice(None),
        ordinals_B: Tensor | None = None,
        rows_M: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D): the normalised residual stream of inputs that see the token ids before them.

        Ordinals are those of a training batch, which decide what dropout drops; None: nothing. With rows of the
        flattened (B L) the result is (M, D): nothing else is wanted.
        """

    def head_nll(
        self,
        hidden_MD: Tensor,
        targets_M: Tensor,
        weights_M: Tensor,
        loss: RowLoss | None = None,
        rows: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of negative log-likelihoods, with a gradient, and each of them (M,), in nats.

        Another loss takes further tensors of the positions, ``rows``.
        """
