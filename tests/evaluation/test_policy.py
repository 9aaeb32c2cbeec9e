"""The exact likelihood under a decoding policy: a distribution over texts, equal to brute force, however batched."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.small_models import AtItsOwnPlace, ids, masked_log_prob, random_model, shifted_model
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.any_order import any_order_log_likelihood
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.policy import POLICIES, RANDOM_ORDER, Policy, policies_of, revealed_log_probs
from llada_lightning.evaluation.scoring import rolling_log_likelihood
from llada_lightning.generation.reveal import TIE
from llada_lightning.objectives import get_objective
from llada_lightning.support.errors import UserError

LLADA = random_model()
TINY = random_model(vocab_size=4, scale=3.0, mask_token_id=3, eos_token_id=2)
"""Three words, and [MASK] as the fourth."""


def by_hand(
    lm: LanguageModel | AtItsOwnPlace, policy: Policy, prompt: Sequence[int], answer: Sequence[int], w: float = 0.0
) -> float:
    """One sequence, one step after the other, probabilities in fp64; the surest positions by sorting."""
    masked, total = list(range(len(answer))), 0.0
    while masked:
        tokens = [*prompt, *(lm.mask_token_id if i in masked else token for i, token in enumerate(answer))]
        logits_LV = lm.logits(torch.tensor([tokens]))[0].double()
        if w:
            bare_LV = lm.logits(torch.tensor([[lm.mask_token_id] * len(prompt) + tokens[len(prompt) :]]))[0].double()
            logits_LV = bare_LV + (1 + w) * (logits_LV - bare_LV)
        if lm.excluded_token_id is not None:
            logits_LV[:, lm.excluded_token_id] = -math.inf
        p_LV = logits_LV.softmax(-1)[len(prompt) :]
        first, second = p_LV.topk(2).values.unbind(-1)
        sure = {"left_to_right": -torch.arange(len(answer)), "confidence": first, "margin": first - second}[policy.name]
        highest, scale = (max(float(of[i]) for i in masked) for of in (sure, first))
        # What is equal but for rounding is equal, and the first goes first.
        order = sorted(masked, key=lambda i: (round((highest - float(sure[i])) / (TIE * scale)), i))
        for i in order[: policy.tokens_per_step]:
            total += math.log(float(p_LV[i, answer[i]]))
            masked.remove(i)
    return total


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_it_is_what_decoding_step_by_step_gives(name: str, k: int) -> None:
    requests = [(ids(3, 40), ids(7, 41)), (ids(6, 42), ids(9, 43)), ([], ids(8, 44))]
    policy = Policy(name, k)
    for (prompt, answer), score in zip(requests, log_likelihood(LLADA, requests, policy=policy), strict=True):
        assert score.mean == pytest.approx(by_hand(LLADA, policy, prompt, answer), abs=1e-4)
        assert (score.kind, score.method, score.stderr) == (f"exact (policy {name}@{k})", "policy", 0.0)
        assert (score.samples, score.tokens, score.exact) == (-(-len(answer) // k), len(answer), True)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("length", [2, 3, 4])
def test_the_probabilities_of_all_texts_of_a_length_add_up_to_one(name: str, length: int) -> None:
    """The law that proves it: positions are chosen by what a sampler knows, so the policy is a distribution."""
    texts = [(prompt, list(text)) for prompt in ([], [2, 0]) for text in itertools.product(range(3), repeat=length)]
    for k in range(1, length + 1):
        scores = log_likelihood(TINY, texts, policy=Policy(name, k))
        for part in (scores[: len(scores) // 2], scores[len(scores) // 2 :]):
            assert sum(math.exp(score.mean) for score in part) == pytest.approx(1.0, abs=1e-5)
            assert len({round(score.mean, 6) for score in part}) > 1


@pytest.mark.parametrize("block_length", [None, 1, 2, 3])
def test_in_random_order_it_is_the_mean_over_all_orders(block_length: int | None) -> None:
    lm = LLADA if block_length is None else random_model("block", block_length=block_length)
    requests = [(ids(3, 40), ids(5, 41)), (ids(6, 42), ids(4, 43)), ([], ids(1, 44)), (ids(2, 45), [])]
    scores = log_likelihood(lm, requests, policy=Policy(RANDOM_ORDER))
    for (prompt, answer), score in zip(requests[:3], scores, strict=False):
        [expected] = any_order_log_likelihood(lm, [(prompt, answer)], orders=4)
        assert score.mean == pytest.approx(expected.exact, abs=1e-5)
        assert (score.kind, score.method, score.stderr) == ("exact (policy random_order@1)", "policy", 0.0)
    assert scores[0].samples == {None: 31, 1: 5, 2: 3 + 3 + 1, 3: 7 + 3}[block_length] or block_length is not None
    assert (scores[3].mean, scores[3].samples) == (0.0, 0)


def test_in_random_order_the_probabilities_of_all_texts_of_a_length_add_up_to_one() -> None:
    texts = [([2], list(text)) for text in itertools.product(range(3), repeat=3)]
    scores = log_likelihood(TINY, texts, policy=Policy(RANDOM_ORDER))
    assert sum(math.exp(score.mean) for score in scores) == pytest.approx(1.0, abs=1e-5)


def test_positions_chosen_by_the_true_token_would_be_no_distribution() -> None:
    """What the law rules out: this is the highest of all orders' likelihoods at each step, and its sum is above 1."""
    total = 0.0
    for text in itertools.product(range(3), repeat=2):
        one, two = (masked_log_prob_of(text, first) for first in (0, 1))
        total += math.exp(max(one, two))
    assert total > 1.001


def masked_log_prob_of(text: tuple[int, ...], first: int) -> float:
    """log p of a text of two tokens, one position first."""
    total = 0.0
    for masked, position in (((0, 1), first), ((1 - first,), 1 - first)):
        tokens = [TINY.mask_token_id if i in masked else token for i, token in enumerate(text)]
        logits_V = TINY.logits(torch.tensor([tokens]))[0, position, :3].double()
        total += float(logits_V.log_softmax(-1)[text[position]])
    return total


def test_all_tokens_in_one_step_are_one_prediction() -> None:
    prompt, answer = ids(4, 50), ids(6, 51)
    for name in POLICIES:
        [score] = log_likelihood(LLADA, [(prompt, answer)], policy=Policy(name, 6))
        assert score.mean == pytest.approx(masked_log_prob(LLADA, prompt, answer, range(6)), abs=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=2, max_size=7),
    k=st.integers(1, 3),
    name=st.sampled_from(list(POLICIES)),
    batch_tokens=st.sampled_from([1, 30, 4096]),
)
def test_what_else_is_scored_changes_nothing(
    lengths: list[tuple[int, int]], k: int, name: str, batch_tokens: int
) -> None:
    policy = Policy(name, min(k, *(answer for _, answer in lengths)))
    requests = [(ids(prompt, 3 * n), ids(answer, 7 * n + 1)) for n, (prompt, answer) in enumerate(lengths)]
    together = log_likelihood(LLADA, requests, policy=policy, batch_tokens=batch_tokens)
    for request, score in zip(requests, together, strict=True):
        assert score.mean == pytest.approx(log_likelihood(LLADA, [request], policy=policy)[0].mean, abs=2e-4)


def test_the_own_order_of_arm_is_its_exact_likelihood() -> None:
    arm = random_model("arm")
    requests = [(ids(3, 60), ids(7, 61)), ([], ids(5, 62))]
    own = log_likelihood(arm, requests, policy=Policy("left_to_right"))
    assert own == log_likelihood(arm, requests)
    assert {score.kind for score in own} == {"exact"}


def test_mask_is_no_answer_but_for_compat_llada() -> None:
    released = random_model(compat="llada")
    prompt, answer = ids(4, 72), ids(9, 73)
    for name in POLICIES:
        [ours], [theirs] = (log_likelihood(lm, [(prompt, answer)], policy=Policy(name)) for lm in (LLADA, released))
        assert ours.mean == pytest.approx(by_hand(LLADA, Policy(name), prompt, answer), abs=1e-4)
        assert theirs.mean == pytest.approx(by_hand(released, Policy(name), prompt, answer), abs=1e-4)
        assert name != "left_to_right" or theirs.mean < ours.mean - 1e-3  # of the same positions


def test_guidance_is_another_distribution() -> None:
    prompt, answer, policy = ids(4, 80), ids(5, 81), Policy("confidence", 2)
    [score] = log_likelihood(LLADA, [(prompt, answer)], policy=policy, cfg_scale=0.7)
    assert score.mean == pytest.approx(by_hand(LLADA, policy, prompt, answer, 0.7), abs=2e-4)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
@pytest.mark.parametrize("name", POLICIES)
def test_with_shifted_targets_it_is_that_of_the_position_before(name: str, cfg_scale: float) -> None:
    lm, policy = shifted_model(), Policy(name, 2)
    requests = [(ids(3, 40), ids(7, 41)), (ids(6, 42), ids(4, 43)), ([], ids(5, 44))]
    for (prompt, answer), score in zip(
        requests, log_likelihood(lm, requests, policy=policy, cfg_scale=cfg_scale), strict=True
    ):
        expected = by_hand(AtItsOwnPlace(lm), policy, prompt, answer, cfg_scale)
        assert score.mean == pytest.approx(expected, abs=2e-4)


def test_a_text_in_windows_has_the_kind_of_its_policy() -> None:
    texts, policy = [ids(30, 90), ids(11, 91)], Policy("margin", 4)
    rolling = rolling_log_likelihood(LLADA, texts, 16, 8, policy=policy)
    assert rolling.kind == "exact (policy margin@4)"
    assert rolling.monte_carlo_stderr == 0
    pairs = [([], texts[0][:16]), (texts[0][8:16], texts[0][16:24]), (texts[0][16:24], texts[0][24:]), ([], texts[1])]
    total = sum(by_hand(LLADA, policy, *pair) for pair in pairs)
    assert rolling.nats_per_token == pytest.approx(-total / 41, abs=1e-4)


def test_empty_and_equal_continuations() -> None:
    request = (ids(3, 1), ids(4, 2))
    empty, one, two = log_likelihood(LLADA, [(request[0], []), request, request], policy=Policy("confidence"))
    assert (empty.mean, empty.kind, empty.method, empty.samples) == (0.0, "exact", "empty", 0)
    assert one == two
    assert log_likelihood(LLADA, [], policy=Policy("confidence")) == []


@pytest.mark.parametrize(
    ("name", "k", "objective", "words"),
    [
        ("confidnce", 1, "llada", "policy: 'confidnce' is not known; the nearest is 'confidence'; choose from left_to"),
        (
            "fastest",
            1,
            "llada",
            "policy: 'fastest' is not known; choose from left_to_right, confidence, margin, ra",
        ),
        ("margin", 0, "llada", "policy margin: 0 tokens a step given; it must be a whole number of at least 1"),
        ("margin", 6, "llada", "policy margin: 6 tokens a step given, and the longest text has 5; lower it"),
        (
            "margin",
            1,
            "arm",
            "policy margin@1: arm has no [MASK] and predicts one token after the other; its own policy",
        ),
        ("left_to_right", 2, "arm", "policy left_to_right@2: arm has no [MASK]"),
        ("random_order", 1, "arm", "policy random_order@1: arm has no [MASK]"),
        ("random_order", 2, "llada", "policy random_order: 2 tokens a step given; it reveals one a step, so give 1"),
    ],
)
def test_a_policy_that_cannot_be_is_one_line(name: str, k: int, objective: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        log_likelihood(random_model(objective), [([1], ids(5, 3)), ([1], ids(2, 3))], policy=Policy(name, k))
    with pytest.raises(UserError, match=re.escape(words)):
        policies_of({"left_to_right": 1, name: k}, get_objective(objective), 5)


def test_random_order_says_what_too_many_tokens_would_cost() -> None:
    words = (
        "policy random_order: 9 tokens are decoded together, which takes 2^9 - 1 = 511 predictions; its likelihood is "
        "computed for blocks and continuations of up to 8 tokens (255 predictions), so take another policy"
    )
    with pytest.raises(UserError, match=re.escape(words)):
        log_likelihood(LLADA, [([1], ids(9, 3))], policy=Policy(RANDOM_ORDER))
    blocks = random_model("block", block_length=4)
    assert log_likelihood(blocks, [([1], ids(9, 3))], policy=Policy(RANDOM_ORDER))[0].exact


def test_a_setting_of_several_policies() -> None:
    found = policies_of({"confidence": 2, "left_to_right": 1}, get_objective("llada"), 8)
    assert [policy.label for policy in found] == ["confidence@2", "left_to_right@1"]
    assert policies_of(None, get_objective("llada"), 8) == ()


# --- data of known entropy --------------------------------------------------------------------------------------------


class MarkovStates:
    """The true conditionals of a Markov source of three words, for texts of five: a perfect model's predictions."""

    vocab_size = 4  # [MASK] is the last
    first = (0.5, 0.3, 0.2)
    then = ((0.7, 0.2, 0.1), (0.1, 0.3, 0.6), (0.25, 0.5, 0.25))

    def __init__(self) -> None:
        self.texts_NL = torch.tensor(list(itertools.product(range(3), repeat=5)))
        first, then = torch.tensor(self.first).double(), torch.tensor(self.then).double()
        self.p_N = first[self.texts_NL[:, 0]] * then[self.texts_NL[:, :-1], self.texts_NL[:, 1:]].prod(dim=1)

    def hidden(self, inputs_RL: torch.Tensor, wanted_RL: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        fits_RN = ((inputs_RL[:, None] == self.texts_NL) | (inputs_RL[:, None] == 3)).all(dim=2)
        p_RN = (fits_RN * self.p_N) / (fits_RN * self.p_N).sum(dim=1, keepdim=True)
        p_RLV = torch.stack([p_RN @ (self.texts_NL == word).double() for word in range(4)], dim=2)
        return p_RLV[wanted_RL][None]

    def logits(self, hidden_GMD: torch.Tensor) -> torch.Tensor:
        return hidden_GMD[0].log().float()


@pytest.mark.parametrize("name", POLICIES)
def test_a_perfect_model_reaches_the_entropy_at_one_token_a_step_and_stays_above_it_at_more(name: str) -> None:
    states = MarkovStates()
    masked_NL = torch.ones_like(states.texts_NL, dtype=torch.bool)
    entropy = float(-(states.p_N * states.p_N.log()).sum())
    losses = []
    for k in range(1, 6):
        log_p_NL = revealed_log_probs(Policy(name, k), states.texts_NL, masked_NL, 3, states)
        losses.append(float(-(states.p_N * log_p_NL.sum(dim=1)).sum()))
        assert float(log_p_NL.sum(dim=1).exp().sum()) == pytest.approx(1.0, abs=1e-5)
        if k == 1:  # the chain rule holds in every order
            assert log_p_NL.sum(dim=1).tolist() == pytest.approx(states.p_N.log().tolist(), abs=1e-5)
    assert losses[0] == pytest.approx(entropy, abs=1e-5)
    assert all(loss > entropy + 0.01 for loss in losses[1:])
