"""The samplers: batches, blocks, ends of answers, gaps, guidance, caches, what the result says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from helpers.devices import DEVICES
from helpers.recorded_operations import RecordedOperations
from helpers.sampler_toys import EOS, MASK, ExactPredictor, ScriptedPredictor, letters, random_model, toy
from llada_lightning.generation import Sampling, Snapshot, generate
from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.predictor import BlockPredictor
from llada_lightning.model.graphs import PassGraphs
from llada_lightning.support.errors import UserError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [4] * 12, []]
LLADA_SETTINGS: list[dict[str, Any]] = [
    {},
    {"steps": 8},
    {"block_length": 4, "steps": 8, "temperature": 1.0},
    {"remasking": "random", "temperature": 1.0},
    {"remasking": "random_count", "steps": 8},
    {"remasking": "margin", "steps": 8},
    {"remasking": "entropy", "temperature": 0.7, "top_k": 5},
    {"threshold": 0.2},
    {"threshold": 0.4, "block_length": 8},
    {"threshold": 0.6, "block_length": 8, "cache": "dual", "cfg_scale": 0.5},
    {"remasking": "random", "block_length": 4},
    {"cfg_scale": 1.0, "block_length": 8, "cache": "prefix"},
    {"threshold": 0.2, "block_length": 4, "cache": "dual", "cfg_scale": 0.5},
    {"cfg_scale": 1.0, "temperature": 1.0, "top_p": 0.8},
    {"block_length": 4, "cache": "prefix"},
    {"strategy": "block_diffusion", "block_length": 4, "steps": 8},
    {"strategy": "block_diffusion", "block_length": 4, "cache": "dual", "temperature": 0.8},
    {"strategy": "autoregressive", "temperature": 1.0},
    {"zero_eos_confidence": True, "temperature": 1.0},
]
ARM_SETTINGS: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"cache": "none"}, {"temperature": 0.9, "top_k": 4}]
CASES = [("llada", settings) for settings in LLADA_SETTINGS] + [("arm", settings) for settings in ARM_SETTINGS]
each = pytest.mark.parametrize(("objective", "settings"), CASES, ids=lambda x: str(x))


@each
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(objective: str, settings: dict[str, Any]) -> None:
    lm = random_model(objective)
    together = generate(lm, PROMPTS, length=16, **settings)
    in_pairs = generate(lm, PROMPTS, length=16, batch_size=2, **settings)
    assert (together.tokens, together.step_of_token) == (in_pairs.tokens, in_pairs.step_of_token)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(lm, [prompt], length=16, first=i, **settings)
        assert alone.tokens[0] == together.tokens[i]
        assert alone.step_of_token[0] == together.step_of_token[i]
        assert alone.confidence[0] == pytest.approx(together.confidence[i], rel=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("objective", ["llada", "arm"])
def test_padded_tensors_are_the_lists_they_hold(objective: str, side: str) -> None:
    lm, longest = random_model(objective), max(map(len, PROMPTS))
    rows, mask = [], []
    for prompt in PROMPTS:
        gap = [3] * (longest - len(prompt))
        rows.append(gap + prompt if side == "left" else prompt + gap)
        mask.append([0] * len(gap) + [1] * len(prompt) if side == "left" else [1] * len(prompt) + [0] * len(gap))
    padded = generate(lm, torch.tensor(rows), attention_mask=torch.tensor(mask), length=16)
    assert padded.tokens == generate(lm, PROMPTS, length=16).tokens
    assert padded.prompts == PROMPTS


@each
def test_what_a_result_says(objective: str, settings: dict[str, Any]) -> None:
    seen: list[Snapshot] = []
    result = generate(random_model(objective), PROMPTS, length=16, on_step=seen.append, **settings)
    assert result.text is None and result.seconds > 0
    assert result.tokens_per_second == sum(map(len, result.tokens)) / result.seconds  # none was given
    for tokens, steps, confidence, finish in zip(
        result.tokens, result.step_of_token, result.confidence, result.finish, strict=True
    ):
        assert MASK not in tokens and len(tokens) == len(steps) == len(confidence) <= 16
        assert all(1 <= step <= result.steps for step in steps) and all(0 < p <= 1 for p in confidence)
        assert (finish == "eos") == (tokens[-1] == EOS) and EOS not in tokens[:-1]
        assert finish == "eos" or len(tokens) == 16
    assert result.forward_passes == len(seen)
    assert "threshold" in settings or len(seen) <= result.steps  # there each answer takes its own
    assert all(0 < p < 1 for row in result.confidence for p in row)
    for before, after in pairwise(seen):
        assert before.step < after.step
        pairs = zip(before.step_of_token[0], before.tokens[0], after.tokens[0], strict=True)
        assert all(old == new for step, old, new in pairs if step >= 0)
    final = [row[: len(tokens)] for row, tokens in zip(seen[-1].tokens, result.tokens, strict=True)]
    assert final == result.tokens


def test_guidance_of_zero_is_none_and_more_is_not() -> None:
    lm = random_model()
    # 1e-12 goes through both branches, and takes nothing of the one without the prompt
    plain, none, strong = (generate(lm, PROMPTS[:3], length=16, cfg_scale=w).tokens for w in (0.0, 1e-12, 3.0))
    assert plain == none != strong


def test_guided_batches_of_other_lengths_equal_single_prompts_without_padding() -> None:
    lm = random_model()
    together = generate(lm, PROMPTS[:3], length=16, cfg_scale=1.5, steps=4)
    for i, prompt in enumerate(PROMPTS[:3]):
        assert generate(lm, torch.tensor([prompt]), length=16, cfg_scale=1.5, steps=4).tokens[0] == together.tokens[i]


@DEVICES
def test_one_step_a_block_needs_no_guess_of_a_cache(device: str) -> None:
    """A cache is filled by the first pass over a block: with one step a block it changes nothing."""
    lm = random_model().to(device)
    exact = generate(lm, PROMPTS, length=16, block_length=4, steps=4)
    for cache in ("prefix", "dual"):
        assert generate(lm, PROMPTS, length=16, block_length=4, steps=4, cache=cache).tokens == exact.tokens  # type: ignore[arg-type]


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
@pytest.mark.parametrize(("cache", "columns"), [("prefix", 24), ("dual", 8)])
def test_a_cache_of_what_has_not_changed_is_exact_and_reads_less(
    cache: str, columns: int, cfg_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass over a block that is as it was gives what the first gave, also once a row has left."""
    lm = random_model()
    settings = Sampling(length=32, block_length=8, cfg_scale=cfg_scale, cache=cache).resolved(lm)  # type: ignore[arg-type]
    canvas = Canvas.of(PROMPTS[:3], 32, MASK, lm.device)
    predictor, begin = BlockPredictor(lm, canvas, settings), canvas.answer + 8
    read: list[tuple[int, ...]] = []
    hidden = lm.model.hidden
    monkeypatch.setattr(lm.model, "hidden", lambda x, **more: (read.append(tuple(x.shape)), hidden(x, **more))[1])
    predictor.open_block(begin, begin + 8, canvas.length)
    rows, all_of = torch.arange(3), torch.ones(3, 8).nonzero().unbind(1)
    fresh = predictor(rows, *all_of).unflatten(1, (3, 8))
    torch.testing.assert_close(predictor(rows, *all_of).unflatten(1, (3, 8)), fresh, rtol=1e-4, atol=1e-4)
    left, all_of = torch.tensor([0, 2]), torch.ones(2, 8).nonzero().unbind(1)
    predictor.keep_rows(left)
    torch.testing.assert_close(predictor(left, *all_of).unflatten(1, (2, 8)), fresh[:, left], rtol=1e-4, atol=1e-4)
    branches = 2 if cfg_scale else 1
    assert read == [(3 * branches, canvas.length), (3 * branches, columns), (2 * branches, columns)]


@pytest.mark.parametrize("settings", [{}, {"block_length": 8, "cfg_scale": 0.5}, {"remasking": "random"}], ids=str)
def test_steps_through_graphs_give_the_same_answers(settings: dict[str, Any]) -> None:
    lm = random_model()
    expected = generate(lm, PROMPTS, length=32, **settings)
    lm.model.pass_graphs = graphs = PassGraphs(RecordedOperations)
    try:
        found = generate(lm, PROMPTS, length=32, **settings)
    finally:
        lm.model.pass_graphs = None
    assert graphs.replayed > expected.forward_passes // 2
    assert (found.tokens, found.step_of_token, found.confidence, found.forward_passes) == (
        expected.tokens, expected.step_of_token, expected.confidence, expected.forward_passes,
    )  # fmt: skip


def test_caches_are_approximations_of_their_own() -> None:
    lm = random_model()
    exact, prefix, dual = (
        generate(lm, PROMPTS, length=32, block_length=8, cache=cache)  # type: ignore[arg-type]
        for cache in ("none", "prefix", "dual")
    )
    assert exact.forward_passes == prefix.forward_passes == dual.forward_passes == 32
    assert prefix.tokens != exact.tokens != dual.tokens != prefix.tokens
    assert (exact.cache, prefix.cache, dual.cache) == ("none", "prefix", "dual")


@DEVICES
def test_a_key_value_cache_is_exact(device: str) -> None:
    lm = random_model("arm").to(device)
    for settings in ({}, {"temperature": 1.0}):
        with_cache, without = (generate(lm, PROMPTS, length=24, cache=c, **settings) for c in ("kv", "none"))  # type: ignore[arg-type]
        assert with_cache.tokens == without.tokens


def test_pure_diffusion_counts_of_algorithm_5() -> None:
    result = generate(random_model(), [[5, 6]], length=10, steps=4, zero_eos_confidence=True)
    assert sorted(result.step_of_token[0]) == [1] * 2 + [2] * 3 + [3] * 2 + [4] * 3  # floor(10 i / 4)


def test_blocks_are_filled_from_left_to_right() -> None:
    for strategy in ("diffusion", "block_diffusion"):
        result = generate(random_model(), [[9]], length=12, block_length=4, steps=6, strategy=strategy)  # type: ignore[arg-type]
        blocks = [{(step - 1) // 2 for step in result.step_of_token[0][i : i + 4]} for i in range(0, 12, 4)]
        assert blocks == [{0}, {1}, {2}]


def test_a_growing_answer_does_not_see_what_is_not_there_yet() -> None:
    """The first block of a growing answer is that of an answer of one block."""
    lm = random_model()
    growing = generate(lm, PROMPTS, length=16, block_length=4, strategy="block_diffusion")
    short = generate(lm, PROMPTS, length=4)
    fixed = generate(lm, PROMPTS, length=16, block_length=4)
    assert [row[:4] for row in growing.tokens] == short.tokens != [row[:4] for row in fixed.tokens]


def test_a_threshold_takes_what_is_sure_and_at_least_one() -> None:
    model = ScriptedPredictor([(2, 0.95), (3, 0.5), (4, 0.97), (5, 0.6)], prompt_length=1)
    result = generate(toy(model), [[7]], length=4, threshold=0.9)
    assert result.tokens == [[2, 3, 4, 5]]
    assert result.step_of_token == [[1, 3, 1, 2]] and result.forward_passes == 3
    assert result.confidence[0] == pytest.approx([0.95, 0.5, 0.97, 0.6], rel=1e-5)


def test_margin_and_entropy_have_orders_of_their_own() -> None:
    first = torch.tensor([0.5, 0.49, 0.01]).log()
    second = torch.tensor([0.4, 0.3, 0.3]).log()

    class Two(ScriptedPredictor):
        def log_probabilities(self, row: list[int]) -> torch.Tensor:
            logs = torch.full((2, 8), -torch.inf)
            logs[0, 2:5], logs[1, 2:5] = first, second
            return logs[: len(row)]

    orders = {}
    for remasking in ("low_confidence", "margin", "entropy"):
        orders[remasking] = generate(toy(Two([], 0)), [[]], length=2, remasking=remasking).step_of_token[0]  # type: ignore[arg-type]
    assert orders == {"low_confidence": [1, 2], "margin": [2, 1], "entropy": [1, 2]}


ENDING = [(2, 0.9), (3, 0.8), (EOS, 0.7), (4, 0.6), (EOS, 0.95), (6, 0.5)]


def test_tokens_behind_eos_are_discarded_and_not_waited_for() -> None:
    result = generate(toy(ScriptedPredictor(ENDING, 0), letters()), [[]], length=6)
    assert result.tokens == [[2, 3, EOS]] and result.text == ["ab"] and result.finish == ["eos"]
    assert result.forward_passes == 4  # the last EOS, a, b, the first EOS


def test_any_end_token_ends_an_answer() -> None:
    """A chat model ends its turn by another token than a text; both are kept for last where EOS is."""
    script = [(2, 0.9), (5, 0.95), (3, 0.8), (EOS, 0.99)]
    lm = replace(toy(ScriptedPredictor(script, 0)), end_token_ids=(EOS, 5))
    assert lm.end_token_ids == (EOS, 5)
    result = generate(lm, [[]], length=4)
    assert result.tokens == [[2, 5]] and result.finish == ["eos"] and result.step_of_token == [[3, 2]]
    assert generate(lm, [[]], length=4, zero_eos_confidence=True).step_of_token == [[1, 3]]


def test_a_growing_answer_ends_with_the_block_that_holds_eos() -> None:
    model = ScriptedPredictor(ENDING, 0)
    result = generate(toy(model), [[]], length=6, block_length=3, strategy="block_diffusion")
    assert result.tokens == [[2, 3, EOS]] and result.forward_passes == 3


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_eos_is_taken_last_at_any_temperature(temperature: float) -> None:
    script = [(EOS, 0.99), (2, 0.5), (3, 0.6)]
    plain = generate(toy(ScriptedPredictor(script, 0)), [[]], length=3, temperature=temperature)
    late = generate(
        toy(ScriptedPredictor(script, 0)), [[]], length=3, temperature=temperature, zero_eos_confidence=True
    )
    assert plain.step_of_token == [[1]] and late.step_of_token == [[3]]


def test_stop_strings_end_an_answer() -> None:
    script = [(2, 0.9), (3, 0.8), (4, 0.7), (5, 0.6), (6, 0.5), (7, 0.4)]
    for settings in ({}, {"block_length": 3}, {"strategy": "autoregressive"}):
        lm = toy(ScriptedPredictor(script, 0), letters())
        result = generate(lm, [[]], length=6, stop=["xyz", "bc"], **settings)  # type: ignore[arg-type]
        assert result.text == ["a"] and result.tokens == [[2, 3, 4]] and result.finish == ["stop"]
        assert result.forward_passes == (6 if not settings else 3)
    lm = toy(ScriptedPredictor(script, 0), letters())
    assert generate(lm, [[]], length=6, stop=["ef", "bc"]).text == generate(lm, [[]], length=6, stop=["bc", "ef"]).text
    lm = toy(ScriptedPredictor(script, prompt_length=1), letters())
    assert generate(lm, "f", length=6, stop="zz").finish == ["length"]


def test_gaps_anywhere_are_filled_and_nothing_else_is_touched() -> None:
    lm, texts = random_model(), [[5, MASK, MASK, 6, 7], [MASK] * 4 + [8, 9], [10, MASK] * 9]
    for settings in ({}, {"temperature": 1.0}, {"steps": 3}, {"remasking": "random"}, {"threshold": 0.3}):
        result = generate(lm, texts, infill=True, **settings)  # type: ignore[arg-type]
        for i, text in enumerate(texts):
            assert [a for a, b in zip(result.tokens[i], text, strict=True) if b != MASK] == [
                x for x in text if x != MASK
            ]
            assert MASK not in result.tokens[i]
            assert [step == 0 for step in result.step_of_token[i]] == [token != MASK for token in text]
            assert generate(lm, [text], infill=True, first=i, **settings).tokens[0] == result.tokens[i]  # type: ignore[arg-type]


def test_gaps_in_words() -> None:
    model = ScriptedPredictor([(2, 0.9), (3, 0.9), (4, 0.9), (5, 0.9)], 0)
    result = generate(toy(model, letters()), "a[MASK][MASK]f", infill=True)
    assert result.text == ["abcf"] and result.step_of_token[0][0] == result.step_of_token[0][3] == 0


def test_mask_is_never_drawn() -> None:
    script = [(MASK, 0.9)] * 4
    for settings in ({}, {"temperature": 5.0}, {"strategy": "autoregressive"}):
        assert MASK not in generate(toy(ScriptedPredictor(script, 0)), [[]], length=4, **settings).tokens[0]  # type: ignore[arg-type]
    arm = replace(random_model("arm"), mask_token_id=20)
    assert all(20 not in row for row in generate(arm, PROMPTS, length=40, temperature=3.0).tokens)


def test_confidence_is_what_the_model_says_whatever_may_be_drawn() -> None:
    lm = random_model()
    free, narrow = (generate(lm, PROMPTS, length=4, steps=1, temperature=1e-3, top_k=k) for k in (None, 1))
    assert narrow.tokens == free.tokens and narrow.confidence == free.confidence


def test_snapshots_of_batches_know_their_prompts() -> None:
    seen: list[Snapshot] = []
    generate(random_model(), PROMPTS, length=4, batch_size=3, on_step=seen.append)
    assert {(snapshot.first, len(snapshot.tokens)) for snapshot in seen} == {(0, 3), (3, 1)}


def test_a_full_context_is_not_too_full() -> None:
    lm = random_model()
    assert len(generate(lm, [[5] * 100], length=28, steps=1).tokens[0]) > 0
    with pytest.raises(UserError, match="set length to at most 28"):
        generate(lm, [[5] * 100], length=29)


def test_speed_counts_what_was_made() -> None:
    result = generate(random_model(), [[5, MASK, 6, MASK]], infill=True)
    assert result.tokens_per_second * result.seconds == pytest.approx(2)


def test_seeds_draw_other_answers() -> None:
    lm, settings = random_model(), {"length": 16, "temperature": 1.0}
    first, again, other = (generate(lm, PROMPTS, seed=seed, **settings).tokens for seed in (1, 1, 2))  # type: ignore[arg-type]
    assert first == again != other
    same = generate(lm, [PROMPTS[0]] * 3, **settings).tokens  # type: ignore[arg-type]
    assert len(set(map(tuple, same))) == 3


def test_steps_that_unmask_nothing_cost_nothing() -> None:
    result = generate(random_model(), [[5]], length=4, steps=16, zero_eos_confidence=True)
    assert result.forward_passes == 4 and result.step_of_token[0] != [1, 2, 3, 4]


# --- the distribution of what is drawn (paper, Sec. 2.4 and A.2) ------------------------------------------------------

DRAWS = 3000
BOUND = 54.1
"""Of chi-square with 26 degrees of freedom, p = 0.001."""


def chi_square(answers: list[list[int]], expected: dict[tuple[int, ...], float]) -> float:
    seen = Counter(map(tuple, answers))
    assert set(seen) <= set(expected)
    return sum((seen[text] - len(answers) * p) ** 2 / (len(answers) * p) for text, p in expected.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"remasking": "random_count"},
        {"strategy": "autoregressive"},
        {"block_length": 1},
        {"remasking": "random", "steps": 150},
    ],
    ids=str,
)
def test_one_token_a_step_draws_from_the_models_distribution(settings: dict[str, Any]) -> None:
    """Algorithm 4 takes two tokens in one step of 150 in two answers of a hundred."""
    model = ExactPredictor()
    result = generate(toy(model), [[]] * DRAWS, length=3, temperature=1.0, **settings)
    assert chi_square(result.tokens, model.expected()) < BOUND


def test_all_tokens_in_one_step_do_not() -> None:
    """So the test above can fail: a single step draws each token from its marginal."""
    model = ExactPredictor()
    result = generate(toy(model), [[]] * DRAWS, length=3, steps=1, temperature=1.0, remasking="random_count")
    assert chi_square(result.tokens, model.expected()) > 3 * BOUND


def test_a_lower_temperature_is_less_diverse() -> None:
    model = ExactPredictor()
    settings: dict[str, Any] = {"length": 3, "remasking": "random_count"}
    kinds = [
        len(set(map(tuple, generate(toy(model), [[]] * 300, temperature=t, **settings).tokens)))
        for t in (1.0, 0.2, 0.0)
    ]
    assert kinds[0] > kinds[1] > kinds[2] >= 1


def test_steps_of_random_remasking_are_equally_likely() -> None:
    result = generate(random_model(), [[]] * 500, length=16, steps=4, remasking="random")
    seen = torch.tensor([step for row in result.step_of_token for step in row]).bincount(minlength=5)[1:]
    expected = seen.sum() / 4
    assert float(((seen - expected) ** 2 / expected).sum()) < 16.3  # 3 degrees of freedom, p = 0.001


def test_gaps_are_filled_from_the_conditional_distribution() -> None:
    model = ExactPredictor()
    draws = generate(toy(model), [[MASK, 3, MASK]] * DRAWS, infill=True, temperature=1.0, remasking="random_count")
    given = {text: p for text, p in model.expected().items() if text[1] == 3}
    share = sum(given.values())
    assert chi_square(draws.tokens, {text: p / share for text, p in given.items()}) < 26.1  # 8 degrees of freedom
