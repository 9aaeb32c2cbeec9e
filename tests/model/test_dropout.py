"""Dropout: which values are dropped is a function of seed, ordinal, layer, site and place, and of nothing else."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer
from llada_lightning.model.dropout import SITES, check_dropout, dropout_keys, dropped
from llada_lightning.support.errors import UserError

SHAPE = Shape(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)


def mask(seed: int, ordinals: list[int], layer: int = 0, site: int = 0, rate: float = 0.5) -> Tensor:
    """(B, 64, 128) bool, True where kept."""
    keys_LSB = dropout_keys(seed, torch.tensor(ordinals), 3)
    return dropped(torch.ones(len(ordinals), 64, 128), keys_LSB[layer, site], rate) != 0


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**12), st.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_as_many_values_are_dropped_as_asked_for(seed: int, ordinal: int, rate: float) -> None:
    kept_BLD = mask(seed, [ordinal], rate=rate)
    count, p = kept_BLD.numel(), 1 - rate
    assert abs(int(kept_BLD.sum()) - count * p) < 6 * (count * p * rate) ** 0.5


def test_masks_of_any_two_places_are_independent() -> None:
    """Of neighbours in each of the counters, whose words differ in few bits."""
    masks = [mask(seed, [n], layer, site)[0] for seed in (0, 1) for n in (0, 1) for layer in (0, 1) for site in (0, 1)]
    count = masks[0].numel()
    for left, right in combinations(masks, 2):
        assert abs(int((left == right).sum()) - count / 2) < 6 * (count / 4) ** 0.5
    for shift in (1, 2, 64):
        for axis in (0, 1):
            alike = masks[0] == masks[0].roll(shift, axis)
            assert shift % masks[0].shape[axis] == 0 or abs(float(alike.float().mean()) - 0.5) < 0.05


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=4, unique=True), st.integers(0, 63))
def test_a_mask_does_not_depend_on_the_batch_or_on_where_the_positions_are_cut(ordinals: list[int], cut: int) -> None:
    together = mask(7, ordinals)
    assert all(torch.equal(together[row], mask(7, [n])[0]) for row, n in enumerate(ordinals))
    keys_B = dropout_keys(7, torch.tensor(ordinals), 3)[0, 0]
    behind = dropped(torch.ones(len(ordinals), 64 - cut, 128), keys_B, 0.5, first=cut)
    assert torch.equal(behind != 0, together[:, cut:])


def test_what_is_kept_is_divided_by_its_probability() -> None:
    x_BLD = torch.randn(2, 5, 8, requires_grad=True)
    y_BLD = dropped(x_BLD, dropout_keys(0, torch.arange(2), 1)[0, 0], 0.25)
    kept_BLD = y_BLD != 0
    torch.testing.assert_close(y_BLD[kept_BLD], x_BLD[kept_BLD] / 0.75)
    (gradient,) = torch.autograd.grad(y_BLD.sum(), x_BLD)
    torch.testing.assert_close(gradient, kept_BLD / 0.75)


def test_a_model_drops_at_two_places_of_each_block_and_only_where_it_is_given_ordinals() -> None:
    model = Transformer(SHAPE, 23)
    model.initialise(torch.Generator().manual_seed(0))
    tokens_BL, ordinals_B = torch.randint(23, (2, 8)), torch.tensor([5, 6])
    plain = model.hidden(tokens_BL, causal=True)
    model.drop(0.5, seed=3)
    assert torch.equal(model.hidden(tokens_BL, causal=True), plain)
    once, again = (model.hidden(tokens_BL, causal=True, dropped_ordinals_B=ordinals_B) for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once, plain)
    # Without what both parts write, the residual stream is the embedding: a block drops nothing else.
    for block in model.blocks:
        block.dropout = 1 - 2**-30  # type: ignore[assignment]
    nothing = model.hidden(tokens_BL, causal=True, dropped_ordinals_B=ordinals_B)
    torch.testing.assert_close(nothing, model.norm(model.embedding(tokens_BL)))
    assert SITES == 2


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_block_that_is_computed_again_drops_the_same(recompute: str) -> None:
    model = Transformer(SHAPE, 23)
    model.initialise(torch.Generator().manual_seed(0))
    model.drop(0.3, seed=3)
    tokens_BL, ordinals_B = torch.randint(23, (2, 8)), torch.tensor([5, 6])

    def gradients() -> tuple[Tensor, ...]:
        hidden = model.hidden(tokens_BL, causal=False, dropped_ordinals_B=ordinals_B)
        return torch.autograd.grad(hidden.square().sum(), list(model.blocks.parameters()))

    expected = gradients()
    for block in model.blocks:
        block.recompute = recompute  # type: ignore[assignment]
    assert all(torch.equal(*pair) for pair in zip(gradients(), expected, strict=True))


@pytest.mark.slow  # it compiles
def test_a_compiled_block_drops_the_same() -> None:
    model = Transformer(SHAPE, 23)
    model.initialise(torch.Generator().manual_seed(0))
    model.drop(0.3, seed=3)
    tokens_BL, ordinals_B = torch.randint(23, (2, 8)), torch.tensor([5, 6])
    expected = model.hidden(tokens_BL, causal=False, dropped_ordinals_B=ordinals_B)
    for block in model.blocks:
        block.compile(dynamic=False)
    found = model.hidden(tokens_BL, causal=False, dropped_ordinals_B=ordinals_B)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_a_rate_that_is_none_is_one_line(rate: float) -> None:
    with pytest.raises(UserError, match=rf"model.dropout: {rate} given; it must lie in \[0, 1\)"):
        check_dropout(rate)
