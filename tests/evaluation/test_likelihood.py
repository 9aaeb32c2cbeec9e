"""Scores of real models: against brute force, one at a time against together, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llada_lightning
from helpers.devices import DEVICES
from helpers.small_models import (
    EOS,
    MASK,
    AtItsOwnPlace,
    exact_bound,
    ids,
    masked_log_prob,
    random_model,
    shifted_model,
)
from llada_lightning.checkpoints.language_model import LanguageModel, load_model
from llada_lightning.evaluation import likelihood
from llada_lightning.evaluation.bound import all_masks
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.requests import monte_carlo_stderr
from llada_lightning.support.errors import UserError

LLADA, ARM = random_model(), random_model("arm")


def pairs(number: int = 9) -> list[tuple[list[int], list[int]]]:
    """Requests of many lengths, short prompts and none among them."""
    return [(ids(3 * n % 7, n), ids(1 + 2 * n, 100 + n)) for n in range(number)]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("compat", [None, "llada"])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_enumeration_equals_brute_force(length: int, compat: str | None, cfg_scale: float) -> None:
    lm = replace(LLADA, compat=compat)
    prompt, answer = ids(5, 1), ids(length, 2)
    score = log_likelihood(lm, [(prompt, answer)], cfg_scale=cfg_scale)[0]
    assert score.mean == pytest.approx(exact_bound(lm, prompt, answer, cfg_scale), rel=1e-5)
    assert (score.exact, score.stderr, score.tokens) == (True, 0.0, length)
    assert (score.kind, score.method) == (("exact", "one pass") if length == 1 else ("bound", "enumerated"))


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("prompt_length", [0, 5])
def test_with_shifted_targets_a_token_is_scored_at_the_position_before_it(prompt_length: int, cfg_scale: float) -> None:
    lm, prompt, answer = shifted_model(), ids(prompt_length, 1), ids(4, 2)
    score = log_likelihood(lm, [(prompt, answer)], cfg_scale=cfg_scale)[0]
    expected = exact_bound(AtItsOwnPlace(lm), prompt, answer, cfg_scale)
    assert score.mean == pytest.approx(expected, rel=1e-5)
    llama = replace(lm, start_token_id=None)  # of a Llama without a start of its own: EOS where nothing else stands
    assert log_likelihood(llama, [([EOS, *prompt], answer)])[0].mean == pytest.approx(
        log_likelihood(lm, [(prompt, answer)])[0].mean, rel=1e-5
    )
    assert log_likelihood(llama, [([], answer)]) == log_likelihood(lm, [([], answer)])


def test_sampling_agrees_with_enumeration_of_a_model() -> None:
    prompt, answer = ids(5, 1), ids(6, 2)
    exact = log_likelihood(LLADA, [(prompt, answer)], samples=63)[0].mean
    drawn = [log_likelihood(LLADA, [(prompt, answer)], samples=16, exact=False, seed=seed)[0] for seed in range(40)]
    means = np.array([score.mean for score in drawn])
    assert not any(score.exact for score in drawn)
    assert abs(means.mean() - exact) < 4 * means.std() / math.sqrt(40)
    assert 0.5 < np.mean([score.stderr**2 for score in drawn]) / means.var() < 2


def test_one_token_is_one_pass_whatever_the_samples() -> None:
    prompt, answer = ids(7, 1), ids(1, 2)
    expected = masked_log_prob(LLADA, prompt, answer, [0])
    for samples in (1, 128):
        assert log_likelihood(LLADA, [(prompt, answer)], samples)[0].mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "lm",
    [LLADA, ARM, replace(ARM, start_token_id=None), shifted_model()],
    ids=["llada", "arm", "llama", "shifted"],
)
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_together_equals_one_at_a_time_in_any_order(lm: Any, cfg_scale: float) -> None:
    scale = cfg_scale if lm.objective == "llada" else 0.0
    requests = pairs()
    alone = [log_likelihood(lm, [request], samples=20, cfg_scale=scale)[0] for request in requests]
    for batch_tokens in (1, 100, 100_000):
        together = log_likelihood(lm, requests[::-1], samples=20, cfg_scale=scale, batch_tokens=batch_tokens)[::-1]
        for one, other in zip(alone, together, strict=True):
            assert other.mean == pytest.approx(one.mean, rel=1e-5)
            assert other.stderr == pytest.approx(one.stderr, rel=1e-3, abs=1e-5)
            assert (other.samples, other.method) == (one.samples, one.method)


@DEVICES
@pytest.mark.parametrize("objective", ["llada", "arm"])
def test_every_device_gives_the_same_scores(objective: str, device: str) -> None:
    """The masks do not depend on the device."""
    here, there = (log_likelihood(random_model(objective).to(name), pairs()) for name in ("cpu", device))
    for one, other in zip(here, there, strict=True):
        assert other.mean == pytest.approx(one.mean, rel=1e-4)
        assert other.stderr == pytest.approx(one.stderr, rel=1e-2, abs=1e-4)
        assert (other.samples, other.method, other.tokens) == (one.samples, one.method, one.tokens)


def test_the_seed_decides_the_numbers() -> None:
    request = [(ids(4, 1), ids(9, 2))]
    first, again, other = (log_likelihood(LLADA, request, samples=16, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first.mean != other.mean


def test_guidance_of_zero_is_none_and_without_a_prompt_does_nothing() -> None:
    request = [([], ids(9, 2))]
    plain = log_likelihood(LLADA, request, samples=16)[0].mean
    assert log_likelihood(LLADA, request, samples=16, cfg_scale=3.0)[0].mean == pytest.approx(plain, rel=1e-5)
    prompted = [(ids(4, 1), ids(9, 2))]
    without = log_likelihood(LLADA, prompted, samples=16)
    assert log_likelihood(LLADA, prompted, samples=16, cfg_scale=0.0) == without
    assert log_likelihood(LLADA, prompted, samples=16, cfg_scale=1.0)[0].mean != pytest.approx(
        without[0].mean, rel=1e-3
    )


@settings(max_examples=20, deadline=None)
@given(prompt=st.lists(st.integers(0, EOS), max_size=9), answer=st.lists(st.integers(0, EOS), min_size=1, max_size=9))
def test_arm_is_the_chain_rule(prompt: list[int], answer: list[int]) -> None:
    tokens = [EOS, *prompt, *answer]
    logits_LV = ARM.logits(torch.tensor([tokens[:-1]]))[0].clone()
    logits_LV[:, MASK] = -math.inf
    log_p_LV = logits_LV.double().log_softmax(-1)
    expected = sum(float(log_p_LV[i - 1, tokens[i]]) for i in range(1 + len(prompt), len(tokens)))
    score = log_likelihood(ARM, [(prompt, answer)])[0]
    assert score.mean == pytest.approx(expected, rel=1e-5)
    assert (score.exact, score.stderr, score.samples, score.method) == (True, 0.0, 1, "autoregressive")


def test_a_llama_is_given_a_start_only_where_nothing_else_stands_there() -> None:
    llama, answer = replace(ARM, start_token_id=None), ids(5, 2)
    behind_eos = log_likelihood(llama, [([EOS], answer)])[0].mean
    assert log_likelihood(llama, [([], answer)])[0].mean == pytest.approx(behind_eos, rel=1e-6)
    assert log_likelihood(llama, [([3], answer)])[0].mean != pytest.approx(behind_eos, rel=1e-3)


@pytest.mark.parametrize("lm", [LLADA, ARM], ids=["llada", "arm"])
def test_an_empty_continuation_has_probability_one(lm: Any) -> None:
    empty, full = log_likelihood(lm, [(ids(3, 1), []), (ids(3, 1), [5])])
    assert (empty.mean, empty.stderr, empty.exact, empty.tokens, empty.method) == (0.0, 0.0, True, 0, "empty")
    assert full.mean < 0
    assert log_likelihood(lm, []) == []


def test_samples_grow_until_the_error_is_reached_or_the_most_are_drawn() -> None:
    requests = [(ids(4, 1), ids(3, 2)), (ids(4, 2), ids(12, 3)), (ids(4, 3), ids(14, 4))]
    first = log_likelihood(LLADA, requests, samples=16)
    target = 0.4 * max(score.stderr for score in first)
    grown = log_likelihood(LLADA, requests, samples=16, target_stderr=target)
    assert grown[0] == first[0] and grown[0].exact
    assert all(score.stderr <= target for score in grown)
    assert max(score.samples for score in grown) >= 64
    stopped = log_likelihood(LLADA, requests, samples=16, target_stderr=1e-9, max_samples=40)
    assert [score.samples for score in stopped[1:]] == [32, 32]  # whole rounds of 16


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_a_target_is_judged_by_16_replicates_however_few_samples_come_first(samples: int) -> None:
    request = [(ids(4, 2), ids(12, 3))]
    easy = log_likelihood(LLADA, request, samples, target_stderr=1e9)[0]
    assert easy == log_likelihood(LLADA, request, samples=16)[0]  # the same ends as well
    exact = log_likelihood(LLADA, request, samples=2**12)[0]
    assert exact.exact
    found = [
        log_likelihood(LLADA, request, samples, target_stderr=0.7 * easy.stderr, seed=seed)[0] for seed in range(40)
    ]
    error = math.sqrt(np.mean([(score.mean - exact.mean) ** 2 for score in found]))
    claimed = math.sqrt(np.mean([score.stderr**2 for score in found]))
    assert error < 1.6 * claimed
    with pytest.raises(UserError, match="max_samples is 8, fewer than the 16 samples of the first round"):
        log_likelihood(LLADA, request, samples, target_stderr=0.1, max_samples=8)


def test_what_does_not_fit_at_once_goes_in_waves_with_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = pairs()
    target = {"samples": 16, "target_stderr": 0.3, "max_samples": 64}
    whole = log_likelihood(LLADA, requests, **target)  # type: ignore[arg-type]
    calls: list[int] = []
    log_probs = likelihood.Scorer.log_probs
    monkeypatch.setattr(
        likelihood.Scorer, "log_probs", lambda self, rows: (calls.append(_tokens(rows)), log_probs(self, rows))[1]
    )
    monkeypatch.setattr(likelihood, "_TOKENS_AT_ONCE", 1500)
    parts = log_likelihood(LLADA, requests, **target)  # type: ignore[arg-type]
    assert len(calls) > 6
    # More than the bound only where one request alone needs it: 32 masks of 17 + 6 tokens in its last round.
    assert max(calls) <= 1500
    for one, other in zip(whole, parts, strict=True):
        assert other.mean == pytest.approx(one.mean, rel=1e-5) and other.samples == one.samples


def _tokens(rows: Any) -> int:
    return sum(len(row.tokens) for row in rows)


def test_candidates_of_one_prompt_share_their_random_numbers() -> None:
    """So the difference of two that are nearly alike is far more precise than the two are."""
    prompt, answer = ids(5, 1), ids(12, 2)
    close = [*answer[:-1], (answer[-1] + 1) % EOS]
    together, apart = [], []
    for seed in range(30):
        first, second, other = (
            log_likelihood(LLADA, [(p, c)], samples=16, seed=s)[0].mean
            for p, c, s in ((prompt, answer, seed), (prompt, close, seed), (prompt, close, 1000 + seed))
        )
        together.append(first - second)
        apart.append(first - other)
    assert np.var(together) < 0.6 * np.var(apart)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_a_pass_holds_no_more_tokens_than_said_with_the_unguided_branch(
    monkeypatch: pytest.MonkeyPatch, cfg_scale: float
) -> None:
    sizes: list[int] = []
    hidden = type(LLADA.model).hidden
    monkeypatch.setattr(
        type(LLADA.model), "hidden", lambda self, x, **kw: (sizes.append(x.numel()), hidden(self, x, **kw))[1]
    )
    log_likelihood(LLADA, pairs(), samples=16, cfg_scale=cfg_scale, batch_tokens=200)
    assert 150 < max(sizes) <= 200


def test_equal_requests_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    hidden = type(LLADA.model).hidden
    monkeypatch.setattr(
        type(LLADA.model), "hidden", lambda self, x, **kw: (rows.append(len(x)), hidden(self, x, **kw))[1]
    )
    scores = log_likelihood(LLADA, [(ids(4, 1), ids(3, 2))] * 5)
    assert sum(rows) == 7  # 2^3 - 1
    assert len(scores) == 5 and len(set(scores)) == 1


def test_the_error_of_a_sum_knows_that_equal_requests_share_their_estimate() -> None:
    a, b = ([1, 2], ids(12, 2)), ([1, 3], ids(12, 3))
    one, other = log_likelihood(LLADA, [a, b], samples=16)
    assert monte_carlo_stderr([a] * 9, [one] * 9) == pytest.approx(9 * one.stderr)
    expected = math.hypot(2 * one.stderr, other.stderr)
    assert monte_carlo_stderr([a, b, a], [one, other, one]) == pytest.approx(expected)


def test_a_cut_prompt_keeps_what_the_tokenizer_puts_first() -> None:
    llama, prompt, answer = replace(ARM, start_token_id=None, text_prefix_ids=(7,)), ids(50, 1), ids(8, 2)
    cut = log_likelihood(llama, [([7, *prompt], answer)], truncate="left")[0]
    assert cut.truncated == 11
    kept = log_likelihood(llama, [([7, *prompt[11:]], answer)])[0]
    assert replace(cut, truncated=0) == kept


def test_logits_are_made_only_where_tokens_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    LLADA.model.head.register_forward_hook(lambda module, args, out: made.append(out.shape[:-1].numel()))
    try:
        log_likelihood(LLADA, [(ids(30, 1), ids(3, 2))])
    finally:
        LLADA.model.head._forward_hooks.clear()
    assert sum(made) == 3 * 4  # each of 3 tokens is masked in 4 of the 7 masks


def test_a_prompt_is_cut_on_its_left_only_when_asked() -> None:
    prompt, answer = ids(50, 1), ids(8, 2)
    with pytest.raises(UserError, match=r"request 1: a prompt of 50 and a continuation of 8 .* context of 48; .*left"):
        log_likelihood(LLADA, [([], [1]), (prompt, answer)])
    cut = log_likelihood(LLADA, [(prompt, answer)], samples=8, truncate="left")[0]
    assert cut.truncated == 10
    kept = log_likelihood(LLADA, [(prompt[10:], answer)], samples=8)[0]
    assert replace(cut, truncated=0) == kept
    with pytest.raises(UserError, match="continuation of 49 tokens"):
        log_likelihood(LLADA, [([1], ids(49, 1))], truncate="left")


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [
        (([1], [2, MASK]), {}, r"request 0: continuation: token 1 is \[MASK\] \(39\)"),
        (([40], [2]), {}, "request 0: prompt: id 40 is outside of the vocabulary of 40"),
        (([1], [-1]), {}, "continuation: id -1"),
        (("text", [1]), {}, "'text' is no list of token ids"),
        (([1], [0.5]), {}, "no list of token ids"),
        (([1], [2]), {"samples": 0}, "samples is 0"),
        (([1], [2]), {"samples": 8, "max_samples": 4}, "max_samples is 4"),
        (([1], [2]), {"target_stderr": 0.0}, "target_stderr is 0.0"),
        (([1], [2]), {"target_stderr": math.nan}, "target_stderr is nan"),
        (([1], [2]), {"cfg_scale": -1.0}, "cfg_scale is -1.0"),
        (([1], [2]), {"batch_tokens": 0}, "batch_tokens is 0"),
    ],
)
def test_mistakes_are_told_in_one_line(request_: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        log_likelihood(LLADA, [request_], **options)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("pair", [([1, 2], [3]), ([1, 2], [3, 4]), ([1], [2, 3, 4])])
def test_a_pair_outside_of_a_list_and_a_path_for_a_model_are_refused(pair: Any) -> None:
    with pytest.raises(UserError, match=r"request 0: .+ is no pair; give a list of pairs of token ids"):
        log_likelihood(LLADA, pair)
    with pytest.raises(UserError, match=r"lm is 'runs/tour/llada', no model; give what load_model returns"):
        log_likelihood("runs/tour/llada", [pair])  # type: ignore[arg-type]


def test_guidance_of_an_arm_is_refused() -> None:
    with pytest.raises(UserError, match="guidance"):
        log_likelihood(ARM, [([1], [2])], cfg_scale=1.0)


def test_the_package_offers_it() -> None:
    assert llada_lightning.log_likelihood is log_likelihood


# --- against the released estimator -----------------------------------------------------------------------------------

# The released l stands on a grid of (by its default) 16 points that is rounded half to even: over a continuation of 3
# tokens l = 1 comes 17 times in 48 and l = 3 only 15 times, over 8 tokens even l three times as often as odd ones.
# So its expected value is another one than Eq. 6. It can be computed, and the released numbers agree with it.
GOLDEN = Path(__file__).parents[1] / "model" / "golden_llada_mha"
CASES = json.loads((GOLDEN / "log_likelihood.json").read_text())
RELEASED_MASK = 319


def name(case: dict[str, Any]) -> str:
    return f"length {len(case['answer'])}"


@pytest.fixture(scope="module")
def released() -> LanguageModel:
    return load_model(GOLDEN)


def released_shares(length: int, batch: int = 16) -> np.ndarray:
    """How often the released grid gives each l."""
    counts = np.zeros(length)
    for start in range(1, length + 1):
        grid = np.round(start + np.arange(batch) * (length / batch)).astype(int)
        counts += np.bincount((grid - 1) % length, minlength=length)
    return counts / counts.sum()


def mean_by_count(lm: LanguageModel, prompt: list[int], answer: list[int]) -> np.ndarray:
    """(L,) the mean of Eq. 6's summand over all masks of l tokens."""
    length, masks = len(answer), all_masks(len(answer))
    tokens_NL = torch.where(torch.from_numpy(masks), RELEASED_MASK, torch.tensor(answer))
    tokens_NT = torch.cat([torch.tensor(prompt).expand(len(masks), -1), tokens_NL], dim=1)
    log_p_NLV = lm.logits(tokens_NT)[:, len(prompt) :].double().log_softmax(-1)
    log_p_NL = log_p_NLV[:, torch.arange(length), torch.tensor(answer)].numpy()
    counts, sums = masks.sum(axis=1), (log_p_NL * masks).sum(axis=1)
    return np.array([length / c * sums[counts == c].mean() for c in range(1, length + 1)])


@pytest.mark.parametrize("case", CASES[:3], ids=name)
def test_enumerated_and_the_released_bias_explained(released: LanguageModel, case: dict[str, Any]) -> None:
    score = log_likelihood(released, [(case["prompt"], case["answer"])], samples=255)[0]
    means_L = mean_by_count(released, case["prompt"], case["answer"])
    assert score.exact and score.mean == pytest.approx(means_L.mean(), rel=1e-6)
    expected = means_L @ released_shares(len(means_L))
    assert abs(expected - case["mean"]) < 2 * case["stderr"] + 1e-6 * abs(expected)


@pytest.mark.parametrize("case", [case for case in CASES if len(case["answer"]) != 3], ids=name)
def test_within_the_errors_of_the_released_estimator(released: LanguageModel, case: dict[str, Any]) -> None:
    score = log_likelihood(released, [(case["prompt"], case["answer"])], samples=255)[0]
    assert abs(score.mean - case["mean"]) < 4 * math.hypot(score.stderr, case["stderr"]) + 1e-6 * abs(case["mean"])
    released_error = case["stderr"] * math.sqrt(3072 / 255)  # of as many masks
    assert score.stderr < released_error / 2 or len(case["answer"]) == 1


def test_without_a_logit_of_mask_the_numbers_differ(released: LanguageModel) -> None:
    request = [(CASES[0]["prompt"], CASES[0]["answer"])]
    other = log_likelihood(replace(released, compat=None), request)[0]
    assert other.mean > CASES[0]["mean"] + 1e-4
