"""Who sees whom: each pattern as a table, by torch's own reading of it, and what every pattern keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from llada_lightning.model import patterns
from llada_lightning.model.patterns import Pattern, combined, dense

CPU = torch.device("cpu")


def table(pattern: Pattern, queries: int, keys: int | None = None) -> list[str]:
    """Rows of queries, of the first sequence."""
    mask = dense(pattern, 1, queries, keys or queries, CPU).expand(1, 1, queries, keys or queries)
    return ["".join("x" if seen else "." for seen in row) for row in mask[0, 0].tolist()]


def test_causal_with_padding_on_the_left_lets_each_query_see_itself() -> None:
    attention_mask_BS = torch.tensor([[False, True, True]])
    pattern = combined(True, attention_mask_BS, None, None)
    assert pattern is not None
    assert table(pattern, 3) == ["x..", ".x.", ".xx"]


def test_padding_alone_is_one_row_for_all_queries() -> None:
    attention_mask_BS = torch.tensor([[False, True, True], [True, False, True]])
    pattern = combined(False, attention_mask_BS, None, None)
    assert pattern is not None
    assert torch.equal(dense(pattern, 2, 5, 3, CPU), attention_mask_BS[:, None, None, :])


def test_nothing_said_is_no_pattern() -> None:
    assert combined(False, None, None, None) is None
    assert combined(True, None, None, None) is patterns.earlier_or_same


def test_same_document() -> None:
    pattern = patterns.same_document(torch.tensor([[0, 0, 1, 1, 1, 2]]))
    assert table(pattern, 6) == ["xx....", "xx....", "..xxx.", "..xxx.", "..xxx.", ".....x"]


def test_block_causal_with_a_last_block_that_is_cut() -> None:
    assert table(patterns.block_causal(2), 5) == ["xx...", "xx...", "xxxx.", "xxxx.", "xxxxx"]
    assert table(patterns.block_causal(1), 3) == table(patterns.earlier_or_same, 3)


def test_block_diffusion_is_the_figure_of_the_paper() -> None:
    """Noisy half first; three blocks of two."""
    assert table(patterns.block_diffusion(6, 2), 12) == [
        "xx..........",
        "xx..........",
        "..xx..xx....",
        "..xx..xx....",
        "....xxxxxx..",
        "....xxxxxx..",
        "......xx....",
        "......xx....",
        "......xxxx..",
        "......xxxx..",
        "......xxxxxx",
        "......xxxxxx",
    ]


@pytest.mark.parametrize(("window", "first"), [(0, "x...."), (2, "xxx.."), (9, "xxxxx")])
def test_ahead_is_causal_and_a_window(window: int, first: str) -> None:
    rows = table(patterns.ahead(torch.tensor(window)), 5)
    assert rows == [("x" * i + first)[:5] for i in range(5)]
    in_their_text = patterns.ahead(torch.tensor(window), torch.tensor([0, 1, 2, 0, 1]))
    assert [row[:3] for row in table(in_their_text, 5)] == [rows[i][:3] for i in (0, 1, 2, 0, 1)]


def test_a_window_is_block_sparse_as_it_is_dense() -> None:
    """200 positions are two blocks of 128; the window is a tensor, which the kernel reads when it runs."""
    window = torch.tensor(0)
    pattern = patterns.ahead(window)
    assert patterns.block_sparse(pattern, 1, 200, 200, CPU).to_dense()[0, 0].tolist() == [[1, 0], [1, 1]]
    window.fill_(1)
    assert patterns.block_sparse(pattern, 1, 200, 200, CPU).to_dense()[0, 0].tolist() == [[1, 1], [1, 1]]
    assert table(pattern, 3) == ["xx.", "xxx", "xxx"]


BATCH, LENGTH = 2, 9


def bits(shape: tuple[int, int]) -> st.SearchStrategy[Tensor]:
    size = shape[0] * shape[1]
    return st.lists(st.booleans(), min_size=size, max_size=size).map(lambda found: torch.tensor(found).view(shape))


@settings(max_examples=30, deadline=None)
@given(
    causal=st.booleans(),
    padding_BS=st.none() | bits((BATCH, LENGTH)),
    ends_BL=st.none() | bits((BATCH, LENGTH)),
    further=st.sampled_from(
        [None, patterns.block_causal(4), patterns.block_diffusion(5, 2), patterns.ahead(torch.tensor(2))]
    ),
)
def test_any_combination_is_what_torch_makes_of_it(
    causal: bool, padding_BS: Tensor | None, ends_BL: Tensor | None, further: Pattern | None
) -> None:
    """By torch's own expansion, index by index; and no query is blind, but where padding is the only rule."""
    documents_BL = None if ends_BL is None else ends_BL.long().cumsum(dim=1)
    pattern = combined(causal, padding_BS, documents_BL, further)
    if pattern is None:
        assert not causal and padding_BS is None and documents_BL is None and further is None
        return
    mask = dense(pattern, BATCH, LENGTH, LENGTH, CPU).expand(BATCH, 1, LENGTH, LENGTH)
    assert torch.equal(mask, create_mask(pattern, BATCH, 1, LENGTH, LENGTH, device="cpu"))
    if padding_BS is None or causal or documents_BL is not None or further is not None:
        assert mask.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("start", [0, 3, 8])
def test_queries_behind_a_cache_see_what_they_see_in_the_whole(start: int) -> None:
    attention_mask_BS = torch.tensor([[False, True, True, True, True, False, True, True, True]])
    for pattern in (combined(True, attention_mask_BS, None, None), patterns.block_causal(4)):
        assert pattern is not None
        whole = dense(pattern, 1, 9, 9, CPU)
        assert torch.equal(dense(pattern, 1, 9 - start, 9, CPU, start), whole[:, :, start:])


def test_a_block_sparse_pattern_leaves_out_what_no_query_sees() -> None:
    """300 positions are three blocks of 128: the first document is the first block, the second the others."""
    documents_BL = (torch.arange(300) >= 128).long()[None]
    mask = patterns.block_sparse(patterns.same_document(documents_BL), 1, 300, 300, CPU)
    assert mask.to_dense()[0, 0].tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert mask.shape == (1, 1, 300, 300)
