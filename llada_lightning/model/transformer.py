"""THE Transformer: one module for both objectives (paper, B.2).

Pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases, untied embeddings. Whether attention
is causal is an argument of the forward pass.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llada_lightning.compute.shapes import Shape
from llada_lightning.model import patterns
from llada_lightning.model.attention import (
    ALL,
    KERNELS,
    Attention,
    Backend,
    KeyValueCache,
    Mask,
    rope_tables,
)
from llada_lightning.model.dropout import dropout_keys, dropped
from llada_lightning.model.graphs import PassGraphs
from llada_lightning.model.head import OutputHead
from llada_lightning.model.patterns import Pattern
from llada_lightning.model.sharding import fill
from llada_lightning.support.torch_internals import ATTENTION_PRODUCTS

NORM_EPS = 1e-5
ROPE_THETA = 10_000.0

POSITIVE = "it must be a finite number above 0, also in 32 bits"
"""The condition of ``is_positive``, for messages."""


def is_positive(value: Any) -> bool:
    """Whether a value is a number above 0 that float32 holds, so neither infinite nor NaN."""
    limits = torch.finfo(torch.float32)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and limits.tiny <= value <= limits.max


Recompute = Literal["none", "selective", "full"]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020).

    Attributes:
        padding: The number of zeros by which the inner width is longer within the products: a GPU multiplies widths
            that are no multiple of 64 more slowly. They change no result.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.up_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.down_proj = nn.Linear(shape.d_ff, shape.d_model, bias=False)
        self.padding = 0

    def forward(self, x_BLD: Tensor) -> Tensor:
        if self.padding:
            gate_FD, up_FD = (F.pad(layer.weight, (0, 0, 0, self.padding)) for layer in (self.gate_proj, self.up_proj))
            inner_BLF = F.silu(F.linear(x_BLD, gate_FD)) * F.linear(x_BLD, up_FD)
            return F.linear(inner_BLF, F.pad(self.down_proj.weight, (0, self.padding)))
        return self.down_proj(F.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and beside the residual stream.

    Attributes:
        recompute: What the backward pass computes again instead of keeping it: nothing, all but products and
            attention, or everything between the block's input and output.
        dropout: The probability with which a value of either part's output is dropped before it joins the residual
            stream, where keys say which.
        sequence_rank: Which of equal parts of the positions this process has; 0 where it has all.
    """

    def __init__(self, shape: Shape, layer: int, norm_eps: float, qk_norm: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.d_model, eps=norm_eps)
        self.attention = Attention(shape, layer, norm_eps if qk_norm else None)
        self.feed_forward_norm = nn.RMSNorm(shape.d_model, eps=norm_eps)
        self.feed_forward = FeedForward(shape)
        self.recompute: Recompute = "none"
        self.dropout, self.sequence_rank = 0.0, 0

    def forward(self, x_BLD: Tensor, *arguments: Any) -> Tensor:
        """Arguments as ``_forward`` has them."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._forward(x_BLD, *arguments)
        contexts: dict[str, Any] = {"context_fn": _keep_products} if self.recompute == "selective" else {}
        return checkpoint(self._forward, x_BLD, *arguments, use_reentrant=False, preserve_rng_state=False, **contexts)

    def _forward(
        self,
        x_BLD: Tensor,
        rope: tuple[Tensor, Tensor],
        causal: bool,
        mask: Mask,
        cache: KeyValueCache | None = None,
        queries: slice = ALL,
        dropout_keys_SB: Tensor | None = None,
        rows_M: Tensor | None = None,
    ) -> Tensor:
        if rows_M is not None:
            attended_MD = self.attention(self.attention_norm(x_BLD), rope, causal, mask, cache, queries, rows_M)
            x_MD = x_BLD[:, queries].flatten(0, 1).index_select(0, rows_M) + attended_MD
            return x_MD + self.feed_forward(self.feed_forward_norm(x_MD))
        # In this order, in which gradients are added up: another one would round them otherwise.
        x_BLD = x_BLD[:, queries] + self._dropped(
            self.attention(self.attention_norm(x_BLD), rope, causal, mask, cache, queries), dropout_keys_SB, 0
        )
        return x_BLD + self._dropped(self.feed_forward(self.feed_forward_norm(x_BLD)), dropout_keys_SB, 1)

    def _dropped(self, x_BLD: Tensor, keys_SB: Tensor | None, site: int) -> Tensor:
        if keys_SB is None:
            return x_BLD
        return dropped(x_BLD, keys_SB[site], self.dropout, self.sequence_rank * x_BLD.shape[1])


_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, *ATTENTION_PRODUCTS}
"""The operations that take most of a block's time."""


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


class Transformer(nn.Module):
    """The mask predictor of `llada` and the next-token predictor of `arm`.

    Args:
        shape: The dimensions.
        vocab_size: The number of vocabulary entries, [MASK] and EOS among them.
        rope_theta: The base of the rotary frequencies (10,000; LLaDA-8B: 500,000).
        norm_eps: The number added within the root of every RMSNorm (1e-5; some checkpoints of Llama: 1e-6).
        qk_norm: Whether queries and keys are normalised before they are rotated (see ``model.attention.Attention``).

    Attributes:
        dropout_seed: The seed of the masks of dropout (see :meth:`drop`).
        pass_graphs: What passes without gradients go through where they repeat (see ``model.graphs``); None: nothing.
    """

    def __init__(
        self,
        shape: Shape,
        vocab_size: int,
        rope_theta: float = ROPE_THETA,
        norm_eps: float = NORM_EPS,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.vocab_size, self.rope_theta, self.norm_eps = shape, vocab_size, rope_theta, norm_eps
        self.qk_norm = qk_norm
        self.embedding = nn.Embedding(vocab_size, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape, layer, norm_eps, qk_norm) for layer in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.d_model, eps=norm_eps)
        self.head = OutputHead(shape.d_model, vocab_size)
        self.attention_backend: Backend = "sdpa"
        self.dropout_seed = 0
        self.pass_graphs: PassGraphs | None = None

    def drop(self, rate: float, seed: int) -> None:
        """Let passes that are given ordinals drop values of the blocks' outputs (see ``model.dropout``).

        Args:
            rate: The probability with which a value is dropped.
            seed: The seed of the masks.
        """
        self.dropout_seed = seed
        for block in self.blocks:
            block.dropout = rate  # type: ignore[assignment]

    def attend_with(self, backend: Backend) -> None:
        """Compute attention by another back end (see ``model.attention``): the same numbers but for rounding.

        ``check_backend`` finds out beforehand whether it serves.
        """
        self.attention_backend = backend
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernel = KERNELS[backend]

    def hidden(
        self,
        tokens_BL: Tensor,
        *,
        causal: bool,
        attention_mask_BL: Tensor | None = None,
        documents_BL: Tensor | None = None,
        pattern: Pattern | None = None,
        positions_BL: Tensor | None = None,
        cache: KeyValueCache | None = None,
        queries: slice = ALL,
        dropped_ordinals_B: Tensor | None = None,
        rows_M: Tensor | None = None,
    ) -> Tensor:
        """The normalised residual stream before the output head.

        Args:
            tokens_BL: (B, L) int64.
            causal: Whether a position attends to earlier positions only, or to all.
            attention_mask_BL: (B, L) bool, False where a key is padding, on either side; with a cache (B, S), of all
                its keys after this pass.
            documents_BL: (B, L) int64, equal for tokens of one document: attention stays within it. Positions run on
                over the whole sequence, which changes nothing, because RoPE sees differences only. Not with a cache.
            pattern: The keys that a query may see (see ``model.patterns``).
            positions_BL: (B, L) int64, the position of each token; by default one after the other from 0, or from where
                the cache is written.
            cache: The keys and values of other positions to attend to; those of ``tokens_BL`` are written at its
                ``position``.
            queries: The positions whose result is wanted, one after the other; the last block computes no other. Not
                where causal.
            dropped_ordinals_B: (B,) int64, the ordinals of the sequences, which decide what :meth:`drop` drops; None:
                nothing. With queries from the first position on only.
            rows_M: (M,) int64, the rows of the flattened (B L), or of the queries, whose result is wanted: the last
                block computes nothing but attention for others. Not with a cache or dropout. None: all.

        Returns:
            (B, L, D), or as many positions as wanted, or (M, D), in the parameters' type; ``head`` makes logits of any
            selection of its rows.
        """
        assert rows_M is None or (cache is None and dropped_ordinals_B is None)
        assert queries == ALL or not causal, "a causal pass wants all positions"
        assert cache is None or documents_BL is None, "documents are of these tokens, and a cache holds others"
        arguments: dict[str, Any] = {
            "tokens_BL": tokens_BL,
            "causal": causal,
            "attention_mask_BL": attention_mask_BL,
            "documents_BL": documents_BL,
            "pattern": pattern,
            "positions_BL": positions_BL,
            "queries": queries,
        }
        alone = cache is None and rows_M is None and dropped_ordinals_B is None and not torch.is_grad_enabled()
        if self.pass_graphs is not None and alone:
            hidden_BLD = self.pass_graphs(self._pass, **arguments)
            if hidden_BLD is not None:
                return hidden_BLD
        return self._pass(**arguments, cache=cache, dropped_ordinals_B=dropped_ordinals_B, rows_M=rows_M)

    def _pass(
        self,
        tokens_BL: Tensor,
        causal: bool,
        attention_mask_BL: Tensor | None,
        documents_BL: Tensor | None,
        pattern: Pattern | None,
        positions_BL: Tensor | None,
        queries: slice,
        cache: KeyValueCache | None = None,
        dropped_ordinals_B: Tensor | None = None,
        rows_M: Tensor | None = None,
    ) -> Tensor:
        """What :meth:`hidden` returns, computed operation by operation."""
        length = tokens_BL.shape[1]
        start = 0 if cache is None else cache.position
        keys = length if cache is None else cache.keys_after(length)
        x_BLD = self.embedding(tokens_BL)
        cos, sin = rope_tables(keys, self.shape.head_dim, self.rope_theta, tokens_BL.device)
        if positions_BL is None:
            rope = cos[start : start + length], sin[start : start + length]
        else:
            rope = cos[positions_BL][:, None], sin[positions_BL][:, None]
        causal = causal and length > 1  # a single query is the last: it sees every key
        seen = patterns.combined(causal, attention_mask_BL, documents_BL, pattern)
        mask = self._mask(seen, tokens_BL, keys, start, ALL, whole=cache is None)
        wanted = mask if queries == ALL else self._mask(seen, tokens_BL, keys, start, queries, whole=cache is None)
        layers = len(self.blocks)
        keys_LSB: Any = [None] * layers
        if dropped_ordinals_B is not None:
            assert not queries.start and cache is None, "positions are counted from the first"
            keys_LSB = dropout_keys(self.dropout_seed, dropped_ordinals_B, layers)
        *blocks, last = self.blocks
        for layer, block in enumerate(blocks):
            x_BLD = block(x_BLD, rope, causal, mask, cache, ALL, keys_LSB[layer])
        chosen = () if rows_M is None else (rows_M,)  # compiled blocks share a graph where all are called alike
        result: Tensor = self.norm(last(x_BLD, rope, causal, wanted, cache, queries, keys_LSB[-1], *chosen))
        return result

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        causal: bool,
        attention_mask_BL: Tensor | None = None,
        documents_BL: Tensor | None = None,
        pattern: Pattern | None = None,
    ) -> Tensor:
        """Logits (B, L, V) of every position; arguments as in :meth:`hidden`."""
        given = {"attention_mask_BL": attention_mask_BL, "documents_BL": documents_BL, "pattern": pattern}
        return self.head(self.hidden(tokens_BL, causal=causal, **given))  # type: ignore[arg-type]

    def _mask(
        self, seen: Pattern | None, tokens_BL: Tensor, keys: int, start: int, queries: slice, whole: bool
    ) -> Mask:
        """As the back end takes it; None where nothing is hidden, or only what is not yet written."""
        batch, length = tokens_BL.shape
        if seen is None:
            return None
        first, end, _ = queries.indices(length)
        if self.attention_backend == "flex" and whole and first == 0:
            return patterns.block_sparse(seen, batch, end, keys, tokens_BL.device)
        if seen is patterns.earlier_or_same and start == 0:
            return None  # the others have a way of their own for it
        return patterns.dense(seen, batch, end - first, keys, tokens_BL.device, start + first)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights by OLMo's "mitchell" scheme (Groeneveld et al. 2024), which LLaDA's released config names.

        Truncated normals at 3 standard deviations, 1/sqrt(fan-in); the two projections that write to the residual
        stream of block i (from 1) are smaller by sqrt(2 i), so that its variance grows slowly with depth.
        """
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        _init_normal(self.embedding.weight, 1 / math.sqrt(self.shape.d_model), generator)
        _init_normal(self.head.weight, 1 / math.sqrt(self.shape.d_model), generator)
        for i, block in enumerate(self.blocks, start=1):
            for name, weight in block.named_parameters():
                if weight.ndim == 2:
                    writes_residual = name.endswith(("out_proj.weight", "down_proj.weight"))
                    std = 1 / math.sqrt(weight.shape[1] * (2 * i if writes_residual else 1))
                    _init_normal(weight, std, generator)


def _init_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    if isinstance(weight, DTensor):  # every process draws the whole, as one alone would, and keeps its shard
        whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        _init_normal(whole, std, generator)
        fill(weight, whole)
        return
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
