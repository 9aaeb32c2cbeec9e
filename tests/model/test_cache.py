"""Keys and values kept between passes, and positions that are not computed."""

from __future__ import annotations

import pytest
import torch

from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer
from llada_lightning.model.attention import KeyValueCache

WORDS, LENGTH = 23, 12
MODEL = Transformer(Shape(n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48), WORDS).eval()
MODEL.initialise(torch.Generator().manual_seed(0))
TOKENS_BL = torch.randint(WORDS, (3, LENGTH), generator=torch.Generator().manual_seed(0))
MASK_BL = torch.arange(LENGTH) >= torch.tensor([0, 2, 5])[:, None]
POSITIONS_BL = (torch.arange(LENGTH) - torch.tensor([0, 2, 5])[:, None]).clamp(min=0)
padded = pytest.mark.parametrize("padded", [False, True])


def keywords(padded: bool, end: int = LENGTH, begin: int = 0) -> dict[str, torch.Tensor]:
    if not padded:
        return {}
    return {"attention_mask_BL": MASK_BL[:, :end], "positions_BL": POSITIONS_BL[:, begin:end]}


@padded
@pytest.mark.parametrize("pieces", [[5, 1, 1, 1, 1, 1, 1, 1], [1, 4, 4, 3], [12]])
def test_a_causal_pass_in_pieces_is_the_pass(pieces: list[int], padded: bool) -> None:
    whole_BLD = MODEL.hidden(TOKENS_BL, causal=True, **keywords(padded))
    cache, parts, start = KeyValueCache(LENGTH), [], 0
    for size in pieces:
        end = start + size
        parts.append(MODEL.hidden(TOKENS_BL[:, start:end], causal=True, cache=cache, **keywords(padded, end, start)))
        cache.advance(size)
        start = end
    real = MASK_BL if padded else torch.ones_like(MASK_BL)
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole_BLD[real], rtol=1e-4, atol=1e-5)


@padded
@pytest.mark.parametrize(("begin", "end"), [(4, 8), (4, 12), (0, 12), (11, 12)])
def test_a_block_beside_its_own_keys_is_the_full_pass(begin: int, end: int, padded: bool) -> None:
    """Prefix and dual cache, where nothing has changed since they were filled."""
    whole_BLD = MODEL.hidden(TOKENS_BL, causal=False, **keywords(padded))
    cache = KeyValueCache(LENGTH)
    MODEL.hidden(TOKENS_BL, causal=False, cache=cache, **keywords(padded))
    cache.advance(LENGTH)
    cache.position = begin
    mask = {"attention_mask_BL": MASK_BL, "positions_BL": POSITIONS_BL[:, begin:end]} if padded else {}
    block_BKD = MODEL.hidden(TOKENS_BL[:, begin:end], causal=False, cache=cache, **mask)
    real = MASK_BL[:, begin:end] if padded else torch.ones_like(MASK_BL[:, begin:end])
    torch.testing.assert_close(block_BKD[real], whole_BLD[:, begin:end][real], rtol=1e-4, atol=1e-5)


def test_rows_can_leave() -> None:
    cache = KeyValueCache(LENGTH)
    MODEL.hidden(TOKENS_BL[:, :-1], causal=True, cache=cache)
    cache.advance(LENGTH - 1)
    rows = torch.tensor([0, 2])
    cache.keep_rows(rows)
    last_BD = MODEL.hidden(TOKENS_BL[rows, -1:], causal=True, cache=cache)[:, 0]
    torch.testing.assert_close(last_BD, MODEL.hidden(TOKENS_BL, causal=True)[rows, -1], rtol=1e-4, atol=1e-5)


@padded
def test_positions_that_are_not_asked_for(padded: bool) -> None:
    whole_BLD = MODEL.hidden(TOKENS_BL, causal=False, **keywords(padded))
    part_BKD = MODEL.hidden(TOKENS_BL, causal=False, queries=slice(6, 10), **keywords(padded))
    torch.testing.assert_close(part_BKD, whole_BLD[:, 6:10], rtol=1e-4, atol=1e-5)


def test_positions_shift_nothing() -> None:
    """Rotary positions are relative: left padding with positions of its own gives what no padding gives."""
    padded_BLD = MODEL.hidden(TOKENS_BL, causal=False, **keywords(True))
    alone_LD = MODEL.hidden(TOKENS_BL[2:, 5:], causal=False)[0]
    torch.testing.assert_close(padded_BLD[2, 5:], alone_LD, rtol=1e-4, atol=1e-5)
