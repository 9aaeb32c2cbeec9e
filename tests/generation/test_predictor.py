"""From logits to tokens: noise, nucleus, guidance, the largest logit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.sampler_toys import WORDS, random_model
from llada_lightning.generation import generate, predictor
from llada_lightning.generation.canvas import Places
from llada_lightning.generation.predictor import ARGMAX_GROUP, NoiseByPrompt, argmax, draw_tokens, guide, likeliest

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])


def places(rows: list[int]) -> Places:
    """Positions of rows; the columns do not matter."""
    return Places(rows, torch.tensor(rows), torch.zeros(len(rows), dtype=torch.int64))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_draws_follow_the_softmax_at_a_temperature(temperature: float) -> None:
    draws = 40_000
    noise = NoiseByPrompt(0, 0, 1, torch.device("cpu"))
    gumbel = noise.gumbel(places([0] * draws), 5)
    assert gumbel.dtype == torch.float64
    seen = draw_tokens(LOGITS.expand(draws, -1), temperature, gumbel).bincount(minlength=5)
    expected = draws * (LOGITS[0].double() / temperature).softmax(-1)
    assert seen[4] == 0
    assert float(((seen - expected)[:4] ** 2 / expected[:4]).sum()) < 16.3  # 3 degrees of freedom, p = 0.001


def test_noise_belongs_to_seed_and_prompt() -> None:
    def draw(seed: int, first: int, row: int, batch: int) -> list[float]:
        return NoiseByPrompt(seed, first, batch, torch.device("cpu")).gumbel(places([row]), 4)[0].tolist()

    assert draw(1, 0, 2, 3) == draw(1, 2, 0, 1)
    assert len({tuple(draw(seed, first, 0, 1)) for seed in (1, 2) for first in (0, 1)}) == 4


def test_noise_does_not_depend_on_how_much_is_drawn_at_once() -> None:
    whole = NoiseByPrompt(0, 0, 2, torch.device("cpu")).gumbel(places([0, 0, 0, 1, 1]), 33)
    noise = NoiseByPrompt(0, 0, 2, torch.device("cpu"))
    parts = torch.cat([noise.gumbel(places([0, 0]), 33), noise.gumbel(places([0, 1, 1]), 33)])
    assert torch.equal(whole, parts)


def test_uniform_noise_is_each_rows_own_and_lies_at_the_candidates() -> None:
    candidates = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    found = NoiseByPrompt(0, 0, 3, torch.device("cpu")).uniform([0, 1, 2], candidates, [2, 0, 3], 0)
    assert found.dtype == torch.float64 and torch.equal(found > 0, candidates)
    alone = NoiseByPrompt(0, 2, 1, torch.device("cpu")).uniform([0], candidates[2:], [3], 0)
    assert torch.equal(alone, found[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("words", [ARGMAX_GROUP, 3 * ARGMAX_GROUP, 3 * ARGMAX_GROUP + 1])
def test_the_largest_logit_is_the_one_that_torch_finds(words: int, dtype: torch.dtype) -> None:
    """The first of equals; next to infinities and to what is not a number, too."""
    generator = torch.Generator().manual_seed(0)
    equals = torch.randint(4, (20, words), generator=generator).to(dtype)
    spread = torch.randn(20, words, generator=generator).to(dtype)
    infinite = torch.full((3, words), -torch.inf, dtype=dtype)
    infinite[1, words // 2], infinite[2, -1] = torch.inf, torch.nan
    logits = torch.cat([equals, spread, infinite])
    assert torch.equal(argmax(logits), logits.argmax(dim=-1))
    assert argmax(logits[:0]).tolist() == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy"])
def test_predictions_do_not_depend_on_how_many_are_made_at_once(
    remasking: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample() -> tuple[list[list[int]], list[list[float]]]:
        result = generate(
            random_model(), [[5, 6, 7], []], length=16, steps=4, remasking=remasking, temperature=temperature
        )
        return result.tokens, result.confidence

    together = sample()
    monkeypatch.setattr(predictor, "PREDICTED_AT_ONCE", {"cpu": 3 * WORDS})
    assert sample() == together


def allowed(top_k: int | None, top_p: float | None, temperature: float = 1.0) -> list[int]:
    return likeliest(LOGITS, temperature, top_k, top_p)[0].isfinite().nonzero()[:, 0].tolist()


def test_top_k_and_top_p_by_hand() -> None:
    # p = 0.644, 0.237, 0.087, 0.032
    assert allowed(None, None) == [0, 1, 2, 3]
    assert allowed(2, None) == [0, 1]
    assert allowed(None, 0.6) == [0] and allowed(None, 0.65) == [0, 1] and allowed(None, 0.9) == [0, 1, 2]
    assert allowed(3, 0.99) == [0, 1, 2]
    assert allowed(None, 0.6, temperature=10.0) == [0, 1, 2]  # flatter: the share needs more tokens


def test_top_k_of_equals_is_k() -> None:
    assert likeliest(torch.tensor([[1.0, 1.0, 0.0]]), 1.0, 1, None).isfinite().sum() == 1


def test_likeliest_keeps_the_order_of_unsorted_words() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 4.9]])
    assert likeliest(logits, 1.0, None, 0.7).isfinite().tolist() == [[False, True, False], [True, False, True]]


@given(st.floats(0, 4), st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=6))
def test_guidance_is_equation_16(w: float, pairs: list[tuple[float, float]]) -> None:
    with_prompt, without = (
        torch.tensor([column], dtype=torch.float64).log_softmax(-1) for column in zip(*pairs, strict=True)
    )
    ratio = with_prompt.exp() ** (1 + w) / without.exp() ** w
    torch.testing.assert_close(guide(with_prompt, without, w).softmax(-1), ratio / ratio.sum())
