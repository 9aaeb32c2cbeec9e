"""The output head: logits of positions, or at once their cross-entropies."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llada_lightning.model.linear_cross_entropy import linear_cross_entropy
from llada_lightning.model.word_shards import WordShards


class OutputHead(nn.Linear):
    """A linear layer from the normalised residual stream to the words, without bias.

    Attributes:
        compiled: fuse the parts of the cross-entropy by ``torch.compile``.
    """

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__(d_model, vocab_size, bias=False)
        self.compiled = False

    def nll(
        self, hidden_MD: Tensor, targets_M: Tensor, weights_M: Tensor, excluded_token_id: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the negative log-likelihoods, and each of them; the M x V logits never stand in memory.

        Args:
            hidden_MD: (M, D).
            targets_M: (M,) int64.
            weights_M: (M,) float32.
            excluded_token_id: a word that gets no probability.

        Returns:
            () float32 with a gradient; (M,) float32, nats, without.
        """
        weight_VD: Tensor = self.weight
        shards = None
        if isinstance(weight_VD, DTensor):  # tensor parallelism: this process has some of the words
            shards = WordShards.of(weight_VD)
            weight_VD = weight_VD.to_local()
        return linear_cross_entropy(
            hidden_MD, weight_VD, targets_M, weights_M, excluded_token_id, self.compiled, shards
        )
