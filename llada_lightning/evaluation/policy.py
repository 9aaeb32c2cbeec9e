"""The exact log-likelihood of a text under a deterministic decoding policy (DUEL, arXiv:2603.01367).

A policy chooses which masked positions a sampler reveals next, from what is revealed and from the model's predictions.
Together with the model it is a sampler: in each step, the tokens at the chosen positions are drawn from the
predictions, each independently of the others. The positions of a step are a function of the tokens before it. So a text
can be drawn in one way only, and its probability is the product of the probabilities of the tokens that the steps
reveal:

    log p(x) = sum over steps k, and over the positions S_k that step k reveals, of log p(x_i | revealed before)

This is no bound. Each policy, with each number of tokens a step, is a distribution of its own over the texts of a
length, whose probabilities add up to 1. With several tokens a step, the value is the likelihood of that faster and
coarser sampler, and is exact, too. Positions are chosen by the prediction at each of them, never by the true token,
which the sampler does not know.

The order may be random, too: :data:`RANDOM_ORDER` reveals one token a step, at a position drawn uniformly at random. A
text can then be drawn in L! ways. Its probability is still exact for up to ``MOST_IN_RANDOM_ORDER`` tokens, or for
blocks of so many. Let H(M) be the probability of the tokens of a set M of masked positions, revealed in random order:

    H(M) = mean over i in M of p(x_i | all but M) H(M without i),   H(empty) = 1,   p(x) = H(all).

That takes a prediction for each set M, 2^L - 1 in all.

By another policy, a text of L tokens costs L / k predictions. Predictions come one after the other, so many texts go
through the model at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Protocol

from llada_lightning.generation.reveal import most_confident, without_rounding
from llada_lightning.objectives import Objective
from llada_lightning.support.errors import UserError

if TYPE_CHECKING:  # the names of the policies are read where torch is not loaded
    from torch import Tensor

    from llada_lightning.evaluation.scorer import ScoredInput, Scorer

LEFT_TO_RIGHT, RANDOM_ORDER = "left_to_right", "random_order"

MOST_IN_RANDOM_ORDER = 8
"""The most tokens that are decoded together in random order: 2^8 - 1 = 255 predictions."""


def likeliest(log_p_MV: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) each: the probability of the likeliest token, which is the confidence, and its scale."""
    first_M = log_p_MV.amax(dim=-1).exp()
    return first_M, first_M


def margin(log_p_MV: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) each: the probability of the likeliest token less that of the second, and the scale: the likeliest one's."""
    first_M, token_M = log_p_MV.max(dim=-1)
    second_M = log_p_MV.scatter_(1, token_M[:, None], -float("inf")).amax(dim=-1)  # in place: they are not read again
    return first_M.exp() - second_M.exp(), first_M.exp()


POLICIES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]] | None] = {
    LEFT_TO_RIGHT: None,
    "confidence": likeliest,
    "margin": margin,
}
"""The policies by their names: a function from the log-probabilities (M, V) of the predictions, which it may overwrite,
to how sure the model is of each, as the reveal rules `low_confidence` and `margin` have it, and to the size of the
numbers that this is computed from. The surest are revealed. Confidences that differ by less than ``reveal.TIE`` of that
size are equal, and of equals the first is revealed. None: the first are revealed."""

NAMES = (*POLICIES, RANDOM_ORDER)
"""The names of all policies."""

_LOGITS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Logits that are made and used before the next are: on a CPU what stays near its caches."""


@dataclass(frozen=True)
class Policy:
    """A decoding policy.

    Args:
        name: One of :data:`NAMES`.
        tokens_per_step: The number of tokens that a step reveals; the last one reveals what is left.

    Raises:
        UserError: There is no policy of this name, or it cannot reveal so many tokens a step.
    """

    name: str
    tokens_per_step: int = 1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            near = get_close_matches(str(self.name), NAMES, 1)
            nearest = f"the nearest is '{near[0]}'; " if near else ""
            raise UserError(f"policy: '{self.name}' is not known; {nearest}choose from {', '.join(NAMES)}")
        if type(self.tokens_per_step) is not int or self.tokens_per_step < 1:
            raise UserError(
                f"policy {self.name}: {self.tokens_per_step} tokens a step given; it must be a whole number of at "
                "least 1"
            )
        if self.name == RANDOM_ORDER and self.tokens_per_step > 1:
            raise UserError(
                f"policy {RANDOM_ORDER}: {self.tokens_per_step} tokens a step given; it reveals one a step, so give 1"
            )

    @property
    def label(self) -> str:
        """The name with the tokens of a step, such as `confidence@1`, by which tables and curves know its values."""
        return f"{self.name}@{self.tokens_per_step}"

    @property
    def kind(self) -> str:
        """What a likelihood by it is called."""
        return f"exact (policy {self.label})"

    def check(self, facts: Objective, longest: int) -> None:
        """Refuses a model or a length that the policy cannot decode.

        Args:
            facts: The facts of the model's objective.
            longest: The tokens of the longest text; of a model that predicts in blocks, of the longest block.

        Raises:
            UserError: The model has no [MASK], and the policy is not its own order or it has none; a step reveals more
                tokens than there are; or too many tokens are decoded together in random order.
        """
        if facts.replaces:
            raise UserError(
                f"policy {self.label}: {facts.name} has no [MASK] and no order in which tokens are revealed; its "
                "likelihood is the bound alone"
            )
        if not facts.masks and (self.name != LEFT_TO_RIGHT or self.tokens_per_step > 1):
            raise UserError(
                f"policy {self.label}: {facts.name} has no [MASK] and predicts one token after the other; its own "
                f"policy is {LEFT_TO_RIGHT}@1, by which its likelihood is exact"
            )
        if self.tokens_per_step > longest:
            raise UserError(
                f"policy {self.name}: {self.tokens_per_step} tokens a step given, and the longest text has {longest}; "
                "lower it"
            )
        if self.name == RANDOM_ORDER and longest > MOST_IN_RANDOM_ORDER:
            raise UserError(
                f"policy {RANDOM_ORDER}: {longest} tokens are decoded together, which takes 2^{longest} - 1 = "
                f"{2.0**longest - 1:.3g} predictions; its likelihood is computed for blocks and continuations of up to "
                f"{MOST_IN_RANDOM_ORDER} tokens (255 predictions), so take another policy"
            )

    def predictions(self, most: int) -> int:
        """The number of predictions that a text, or a block, of ``most`` tokens takes."""
        return 2**most - 1 if self.name == RANDOM_ORDER else -(-most // self.tokens_per_step)


def policies_of(given: Mapping[str, int] | None, facts: Objective, longest: int) -> tuple[Policy, ...]:
    """The policies of a setting that maps names to tokens a step; arguments and errors as of :class:`Policy`."""
    found = tuple(Policy(name, count) for name, count in (given or {}).items())
    for policy in found:
        policy.check(facts, longest)
    return found


class States(Protocol):
    """How a model predicts the masked positions of a batch of states.

    Attributes:
        vocab_size: The width of its logits.
    """

    vocab_size: int

    def hidden(self, inputs_RL: Tensor, wanted_RL: Tensor, rows_R: Tensor) -> Tensor:
        """(G, M, D), what the M wanted positions are predicted from.

        Args:
            inputs_RL: (R, L) int64, the tokens, [MASK] where still masked.
            wanted_RL: (R, L) bool, the M positions.
            rows_R: (R,) int64, the place of these rows in the batch.
        """

    def logits(self, hidden_GMD: Tensor) -> Tensor:
        """(M, V) float32 of some of them; -inf where a token gets no probability."""


def policy_log_likelihood(
    policy: Policy, tokens_BL: Tensor, masked_BL: Tensor, mask_token_id: int, states: States, passes: int | None = None
) -> Tensor:
    """The log-likelihood of the masked tokens of each text under a policy.

    Args:
        policy: The policy.
        tokens_BL: (B, L) int64, the true tokens.
        masked_BL: (B, L) bool, the positions to decode; the others are given from the start.
        mask_token_id: The id of [MASK].
        states: The model.
        passes: The number of predictions to make, where another process must make as many; None: as many as needed.

    Returns:
        (B,) float64, nats; 0 where nothing is masked.
    """
    if policy.name == RANDOM_ORDER:
        return _in_random_order(tokens_BL, masked_BL, mask_token_id, states, passes)
    return revealed_log_probs(policy, tokens_BL, masked_BL, mask_token_id, states, passes).sum(dim=1)


def most_masked(masked_BL: Tensor) -> int:
    """The number of masked positions of the row of (B, L) that has most of them."""
    return int(masked_BL.sum(dim=1).max()) if len(masked_BL) else 0


def revealed_log_probs(
    policy: Policy, tokens_BL: Tensor, masked_BL: Tensor, mask_token_id: int, states: States, passes: int | None = None
) -> Tensor:
    """The log-probability of each token in the step in which the policy reveals it, on the true tokens. Arguments as of
    :func:`policy_log_likelihood`.

    Returns:
        (B, L) float64, nats; 0 at the positions that were given.
    """
    import torch

    rule, k = POLICIES[policy.name], policy.tokens_per_step
    masked_BL = masked_BL.clone()
    log_p_BL = torch.zeros(tokens_BL.shape, dtype=torch.float64, device=tokens_BL.device)
    for _ in range(policy.predictions(most_masked(masked_BL)) if passes is None else passes):
        rows_R = masked_BL.any(dim=1).nonzero()[:, 0]
        if not len(rows_R):  # another process is not done, and a sharded model predicts in all of them at once
            rows_R = rows_R.new_zeros(1)
        candidates_RL, true_RL = masked_BL[rows_R], tokens_BL[rows_R]
        chosen_RL = candidates_RL & (candidates_RL.cumsum(dim=1) <= k) if rule is None else None
        wanted_RL = candidates_RL if chosen_RL is None else chosen_RL
        hidden_GMD = states.hidden(true_RL.masked_fill(candidates_RL, mask_token_id), wanted_RL, rows_R)
        log_p_M, confidence_M, scale_M = _predicted(hidden_GMD, true_RL[wanted_RL], states, rule)
        if chosen_RL is None:
            confidence_RL, scale_RL = (
                torch.full(wanted_RL.shape, lowest, device=tokens_BL.device) for lowest in (-torch.inf, 0.0)
            )
            confidence_RL[wanted_RL], scale_RL[wanted_RL] = confidence_M, scale_M
            confidence_RL = without_rounding(confidence_RL, scale_RL.amax(dim=1, keepdim=True))
            chosen_RL = most_confident(confidence_RL, candidates_RL, torch.full_like(rows_R, k))
        row_N, column_N = chosen_RL.nonzero(as_tuple=True)
        place_N = rows_R[row_N], column_N
        log_p_BL[place_N] = log_p_M[chosen_RL[wanted_RL]].double()
        masked_BL[place_N] = False
    return log_p_BL


def _in_random_order(
    tokens_BL: Tensor, masked_BL: Tensor, mask_token_id: int, states: States, passes: int | None
) -> Tensor:
    """(B,) float64: log H(all), see the top; arguments as of :func:`policy_log_likelihood`."""
    import torch

    rank_BL, counts_B = masked_BL.cumsum(dim=1) - 1, masked_BL.sum(dim=1)
    most = most_masked(masked_BL)
    log_h_SB = torch.zeros((1 << most, len(tokens_BL)), dtype=torch.float64, device=tokens_BL.device)
    for number in range(1, 1 + (Policy(RANDOM_ORDER).predictions(most) if passes is None else passes)):
        # Bit j of the number: whether the masked position of rank j belongs to the set M.
        rows_R = (counts_B >= number.bit_length()).nonzero()[:, 0]
        if not len(rows_R):  # another process is not done, and a sharded model predicts in all of them at once
            rows_R = rank_BL.new_zeros(1)
        of_row_RL, true_RL = rank_BL[rows_R], tokens_BL[rows_R]
        set_RL = masked_BL[rows_R] & (number >> of_row_RL.clamp(min=0) & 1).bool()
        hidden_GMD = states.hidden(true_RL.masked_fill(set_RL, mask_token_id), set_RL, rows_R)
        log_p_M = _predicted(hidden_GMD, true_RL[set_RL], states, None)[0].double()
        if number < len(log_h_SB):
            without_RI = torch.stack([log_h_SB[number ^ 1 << j, rows_R] for j in _bits(number)], dim=1)
            log_h_RI = log_p_M.view(len(rows_R), -1) + without_RI
            log_h_SB[number, rows_R] = log_h_RI.logsumexp(dim=1) - math.log(log_h_RI.shape[1])
    whole_B = (1 << counts_B) - 1
    return log_h_SB.gather(0, whole_B[None])[0]


def _bits(number: int) -> list[int]:
    """The places of the bits of a number that are 1, in ascending order."""
    return [j for j in range(number.bit_length()) if number >> j & 1]


def _predicted(
    hidden_GMD: Tensor,
    true_M: Tensor,
    states: States,
    rule: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
) -> tuple[Tensor, ...]:
    """(M,) float32 each: the log-probabilities of the true tokens, the confidences of the predictions and their scale.

    All logits together would be the largest tensor of all, so they are made some at a time. Without a rule there are
    no confidences, and what stands in their place is not read.
    """
    import torch

    parts = []
    at_once = max(1, _LOGITS_AT_ONCE.get(true_M.device.type, 1 << 26) // states.vocab_size)
    for begin in range(0, max(1, len(true_M)), at_once):
        these = slice(begin, begin + at_once)
        log_p_MV = states.logits(hidden_GMD[:, these]).log_softmax(dim=-1)
        log_p_M = log_p_MV.gather(1, true_M[these, None])[:, 0]
        parts.append((log_p_M, *((log_p_M, log_p_M) if rule is None else rule(log_p_MV))))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


# --- through a model for inference ------------------------------------------------------------------------------------


def policy_log_probs(scorer: Scorer, inputs: Sequence[ScoredInput], policy: Policy) -> list[float]:
    """The log-likelihood of each input's targets under a policy, nats, in their order.

    Args:
        scorer: The model, which has a [MASK], with its guidance and its batches.
        inputs: The true tokens, and the positions that are decoded.
        policy: The policy.
    """
    import torch

    mask_token_id = scorer.lm.mask_token_id
    assert mask_token_id is not None
    results = [0.0] * len(inputs)
    scorer.progress.expect(len(inputs))
    for batch in scorer.batches(inputs):
        with torch.inference_mode():
            states = _ScoredStates(scorer, [inputs[i] for i in batch])
            log_p_B = policy_log_likelihood(policy, states.tokens_BT, states.targets_BT, mask_token_id, states)
        for i, value in zip(batch, log_p_B.tolist(), strict=True):
            results[i] = value
        scorer.progress.advance(len(batch))
    return results


class _ScoredStates:
    """The states of a batch of inputs, of which the first is the longest."""

    def __init__(self, scorer: Scorer, rows: Sequence[ScoredInput]) -> None:
        import torch

        self._scorer, self._lm, device = scorer, scorer.lm, scorer.lm.device
        self.vocab_size = self._lm.model.vocab_size
        tokens_BT, self._real_BT = scorer.padded(rows)
        self.tokens_BT = torch.from_numpy(tokens_BT).to(device)
        targets_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
        for targets_T, row in zip(targets_BT, rows, strict=True):
            targets_T[torch.from_numpy(row.positions)] = True
        self.targets_BT = targets_BT.to(device)
        prompt_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
        for prompt_T, row in zip(prompt_BT, rows, strict=True):
            prompt_T[row.prompt] = True
        self._prompt_BT = prompt_BT.to(device)

    def hidden(self, inputs_RL: Tensor, wanted_RL: Tensor, rows_R: Tensor) -> Tensor:
        import torch

        branches = [inputs_RL]
        if self._scorer.cfg_scale:
            assert self._lm.mask_token_id is not None
            branches.append(inputs_RL.masked_fill(self._prompt_BT[rows_R], self._lm.mask_token_id))
        tokens_RL = torch.cat(branches)
        if self._lm.shift_targets:  # a token is predicted from the position before it, and the first one is given
            wanted_RL = torch.nn.functional.pad(wanted_RL[:, 1:], (0, 1))
        real_RL = None if self._real_BT is None else self._real_BT[rows_R].repeat(len(branches), 1)
        columns, positions_RL = wanted_RL.any(dim=0).nonzero()[:, 0].tolist(), None
        span = slice(columns[0], columns[-1] + 1)  # the last block computes no other
        counts_R = wanted_RL.sum(dim=1)
        if (most := int(counts_R.max())) < span.stop - span.start:
            # Attention does not know the order of its columns, only their positions: so the wanted ones go first.
            order_RL = wanted_RL.logical_not().int().argsort(dim=1, stable=True)
            positions_RL = order_RL.repeat(len(branches), 1)
            tokens_RL = tokens_RL.gather(1, positions_RL)
            real_RL = None if real_RL is None else real_RL.gather(1, positions_RL)
            span = slice(0, most)
            wanted_RL = torch.arange(wanted_RL.shape[1], device=wanted_RL.device) < counts_R[:, None]
        hidden_RLD = self._lm.model.hidden(
            tokens_RL,
            causal=False,
            attention_mask_BL=real_RL,
            positions_BL=positions_RL,
            pattern=self._lm.pattern(positions_RL),
            queries=span,
        )
        return hidden_RLD.unflatten(0, (len(branches), -1))[:, wanted_RL[:, span]]

    def logits(self, hidden_GMD: Tensor) -> Tensor:
        logits_MV = self._scorer.logits(hidden_GMD)
        if self._lm.excluded_token_id is not None:
            logits_MV[:, self._lm.excluded_token_id] = -float("inf")
        return logits_MV
