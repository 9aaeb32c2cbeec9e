"""Which keys a query may see: functions ``(b, h, q, kv) -> bool`` of indices, as `flex_attention` takes them.

A pattern is put together by ``and_masks`` and ``or_masks``, and made dense (:func:`dense`, for SDPA) or block-sparse
(:func:`block_sparse`, for flex_attention). Indices are int tensors that broadcast against one another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, or_masks

Pattern = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def earlier_or_same(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """Causal: a query sees its own position and those before."""
    return kv <= q


def itself(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """A query sees its own position."""
    return kv == q


def window_ahead(step: int, steps: int, length: int) -> int | None:
    """How many positions ahead a query may see after ``step`` of ``steps`` steps in which attention is opened.

    None: all of them, from step ``steps`` on. A pure function, so that a resumed run goes on as it would have.

    Args:
        step: The number of optimizer steps that have been taken.
        steps: The number of steps after which attention is full; 0: it always is.
        length: The number of positions that see each other in the end.
    """
    return None if step >= steps else length * step // steps


def ahead(window: Tensor, positions_L: Tensor | None = None) -> Pattern:
    """A query sees what is before it, itself, and some positions behind it.

    Args:
        window: () int64, the number of positions behind it; 0 is causal. A tensor, so that kernels which are compiled
            for one window serve all.
        positions_L: (L,) int64, the position of each index in its text; None: the index itself.
    """

    def near(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if positions_L is not None:
            q, kv = positions_L[q], positions_L[kv]
        return kv <= q + window

    return near


def real_keys(attention_mask_BS: Tensor) -> Pattern:
    """No query sees padding.

    Args:
        attention_mask_BS: (B, S) bool, False where a key is padding.
    """

    def real(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return attention_mask_BS[b, kv]

    return real


def same_document(documents_BL: Tensor) -> Pattern:
    """Attention stays within a packed document.

    Args:
        documents_BL: (B, L) int64, equal for positions of one document.
    """

    def same(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return documents_BL[b, q] == documents_BL[b, kv]

    return same


def block_causal(block_length: int, positions_BL: Tensor | None = None) -> Pattern:
    """A token sees all of its own block and of those before (semi-autoregressive; Arriola et al. 2025).

    Args:
        block_length: The number of tokens of a block.
        positions_BL: (B, L) int64, the position of each index in its text; None: the index itself.
    """
    assert block_length > 0

    def causal_between_blocks(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if positions_BL is not None:
            q, kv = positions_BL[b, q], positions_BL[b, kv]
        return kv // block_length <= q // block_length

    return causal_between_blocks


@cache
def block_diffusion(length: int, block_length: int) -> Pattern:
    """The training pattern of BD3-LM (Arriola et al. 2025, "Block Diffusion", arXiv:2503.09573).

    The input is a noisy sequence and, behind it, its clean copy: 2 ``length`` positions, of which both halves are at
    0..length-1 for RoPE. A noisy block sees itself and the clean blocks before it: what it sees when it is generated.
    A clean block sees the clean blocks up to itself. So one pass trains all blocks.

    Args:
        length: L, of the sequence.
        block_length: The number of tokens of a block.
    """
    assert length > 0 and block_length > 0

    def noisy_beside_clean(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        q_clean, kv_clean = q >= length, kv >= length
        q_block, kv_block = q % length // block_length, kv % length // block_length
        within_noisy = ~q_clean & ~kv_clean & (kv_block == q_block)
        noisy_to_clean = ~q_clean & kv_clean & (kv_block < q_block)
        within_clean = q_clean & kv_clean & (kv_block <= q_block)
        return within_noisy | noisy_to_clean | within_clean

    return noisy_beside_clean


def combined(
    causal: bool, attention_mask_BS: Tensor | None, documents_BL: Tensor | None, further: Pattern | None
) -> Pattern | None:
    """What all of the given rules allow; None: everything.

    Where padding comes with another rule, every query sees itself: else a row of padding would see nothing, and its
    softmax would be undefined.
    """
    rules = [] if further is None else [further]
    if causal:
        rules.append(earlier_or_same)
    if documents_BL is not None:
        rules.append(same_document(documents_BL))
    if attention_mask_BS is not None:
        rules.append(real_keys(attention_mask_BS))
    if len(rules) < 2:
        return rules[0] if rules else None
    allowed = and_masks(*rules)
    return allowed if attention_mask_BS is None else or_masks(allowed, itself)


def dense(pattern: Pattern, batch: int, queries: int, keys: int, device: torch.device, start: int = 0) -> Tensor:
    """A pattern as SDPA takes it: bool that broadcasts to (batch, 1, queries, keys).

    A dimension that the pattern does not depend on is 1: padding alone is (batch, 1, 1, keys).

    Args:
        start: The index of the first query, where keys of earlier positions are cached.
    """
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    q = torch.arange(start, start + queries, device=device)[:, None]
    return pattern(b, h, q, torch.arange(keys, device=device)[None, None, None])


def block_sparse(pattern: Pattern, batch: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    """A pattern as flex_attention takes it, of the first ``queries`` positions and all keys.

    On CUDA it is compiled, because it would else hold all of (batch, queries, keys).
    """
    make = _compiled_create_block_mask() if device.type == "cuda" else create_block_mask
    return make(pattern, batch, None, queries, keys, device=device)


@cache
def _compiled_create_block_mask() -> Any:
    return torch.compile(create_block_mask)
