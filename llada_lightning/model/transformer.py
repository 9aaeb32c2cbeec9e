"""THE Transformer: one module for both objectives (paper, B.2).

Pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases, untied embeddings. Whether attention
is causal is an argument of the forward pass.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llada_lightning.model.rope import apply_rope, rope_tables
from llada_lightning.scaling.shapes import Shape

NORM_EPS = 1e-5


class Attention(nn.Module):
    """Grouped-query attention through ``scaled_dot_product_attention``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        kv_width = shape.n_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.k_proj = nn.Linear(shape.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.d_model, kv_width, bias=False)
        self.out_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.grouped = shape.n_kv_heads != shape.n_heads

    def forward(self, x_BLD: Tensor, rope: tuple[Tensor, Tensor], causal: bool, mask: Tensor | None) -> Tensor:
        q, k, v = (self._heads(projection(x_BLD)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        grouped = self.grouped
        if grouped and mask is not None:
            # On CUDA no kernel but the plain one takes groups and a mask together, and it keeps all L x L scores.
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            grouped = False
        # SDPA takes a mask or is_causal, not both: a mask already holds the causal part.
        out_BHLD = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped
        )
        return self.out_proj(out_BHLD.transpose(1, 2).flatten(2))

    def _heads(self, x_BLE: Tensor) -> Tensor:
        return x_BLE.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.up_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.down_proj = nn.Linear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and beside the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.d_model, eps=NORM_EPS)
        self.attention = Attention(shape)
        self.feed_forward_norm = nn.RMSNorm(shape.d_model, eps=NORM_EPS)
        self.feed_forward = FeedForward(shape)

    def forward(self, x_BLD: Tensor, rope: tuple[Tensor, Tensor], causal: bool, mask: Tensor | None) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rope, causal, mask)
        return x_BLD + self.feed_forward(self.feed_forward_norm(x_BLD))


class Transformer(nn.Module):
    """The mask predictor of `llada` and the next-token predictor of `arm`.

    Args:
        shape: the dimensions.
        vocab_size: words of the embedding and of the output head, [MASK] and EOS among them.
        rope_theta: base of the rotary frequencies (10 000; LLaDA-8B: 500 000).
    """

    def __init__(self, shape: Shape, vocab_size: int, rope_theta: float = 10_000.0) -> None:
        super().__init__()
        self.shape, self.vocab_size, self.rope_theta = shape, vocab_size, rope_theta
        self.embedding = nn.Embedding(vocab_size, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.d_model, eps=NORM_EPS)
        self.head = nn.Linear(shape.d_model, vocab_size, bias=False)

    def hidden(self, tokens_BL: Tensor, *, causal: bool, attention_mask_BL: Tensor | None = None) -> Tensor:
        """The normalised residual stream before the output head.

        Args:
            tokens_BL: (B, L) int64.
            causal: attend to earlier positions only, or to all.
            attention_mask_BL: (B, L) bool, False where a key is padding, on either side.

        Returns:
            (B, L, D) in the parameters' type; ``head`` makes logits of any selection of its rows.
        """
        x_BLD = self.embedding(tokens_BL)
        rope = rope_tables(tokens_BL.shape[1], self.shape.head_dim, self.rope_theta, tokens_BL.device)
        mask = None if attention_mask_BL is None else attention_pattern(attention_mask_BL, causal)
        for block in self.blocks:
            x_BLD = block(x_BLD, rope, causal, mask)
        return self.norm(x_BLD)

    def forward(self, tokens_BL: Tensor, *, causal: bool, attention_mask_BL: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of every position; arguments as in :meth:`hidden`."""
        return self.head(self.hidden(tokens_BL, causal=causal, attention_mask_BL=attention_mask_BL))

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


def attention_pattern(attention_mask_BL: Tensor, causal: bool) -> Tensor:
    """Which keys each query sees: (B, 1, 1 or L, L) bool.

    Where causal, every query sees itself: else a row of padding on the left would see nothing, and its softmax would
    be undefined.
    """
    length = attention_mask_BL.shape[1]
    keys_B11L = attention_mask_BL[:, None, None, :]
    if not causal:
        return keys_B11L
    lower_LL = torch.ones(length, length, dtype=torch.bool, device=attention_mask_BL.device).tril()
    itself_LL = torch.eye(length, dtype=torch.bool, device=attention_mask_BL.device)
    return (keys_B11L & lower_LL) | itself_LL


def _init_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    if isinstance(weight, DTensor):  # every process draws the whole, as one alone would, and keeps its shard
        whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        _init_normal(whole, std, generator)
        weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None))
        return
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
