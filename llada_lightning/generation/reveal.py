"""Table 3, the reveal rules: which predictions of a step stay in the text. The others are masked again.

A rule is one function and one row of :data:`RULES`. Either it says how sure the model is of a prediction, and the
surest stay; or it chooses the positions before anything is predicted, and only these are predicted. A rule of yours
joins the table by :func:`register`, in a module that LLADA_PLUGINS names or your script imports; then `--remasking` and
`Sampling(remasking=...)` know its name::

    def left_to_right(state: State) -> Tensor:
        return state.candidates_RK & (state.candidates_RK.cumsum(1) <= state.counts_R[:, None])

    register("left_to_right", Rule(choice=left_to_right))

The names of the rules are read where torch is not loaded, so functions import it where they need it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from llada_lightning.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TIE = 1e-5
"""Confidences whose share of the highest differs by less are equal."""


@dataclass(frozen=True)
class State:
    """What a rule that chooses before the predictions can look at: R rows of the batch, K columns of the block.

    Args:
        candidates_RK: (R, K) bool, the positions that are still masked.
        counts_R: (R,) int64, the number of positions that the schedule reveals in this step.
        step: The step within the block, from 1.
        steps_R: (R,) int64, the number of steps of the block.
        uniform: A function that draws (R, K) float64 noise, uniform on [0, 1) at the candidates, each prompt's own.
    """

    candidates_RK: Tensor
    counts_R: Tensor
    step: int
    steps_R: Tensor
    uniform: Callable[[], Tensor]


@dataclass(frozen=True)
class Rule:
    """A row of the table; exactly one of the two functions is given.

    Args:
        confidence: ``(logits_MV, probability_M) -> (M,)`` float32: how sure the model is of each of M predictions,
            from the logits (of [MASK]: -inf) and the probability of the predicted token. The surest stay, of equals
            the first.
        choice: ``(state) -> (R, K)`` bool: the positions to reveal, all of them candidates.
        threshold: Whether the confidence is a share of 1, to which a threshold can be compared.
        released: Whether the authors' released sampler has the rule.
        scheduled: Whether the choice is of exactly as many positions as the schedule says, so that no step counts them.
    """

    confidence: Callable[[Tensor, Tensor], Tensor] | None = None
    choice: Callable[[State], Tensor] | None = None
    threshold: bool = False
    released: bool = False
    scheduled: bool = False

    def __post_init__(self) -> None:
        assert (self.confidence is None) != (self.choice is None), "a rule has a confidence or a choice"

    @property
    def by_schedule(self) -> bool:
        """Whether the schedule alone says how many positions a step reveals."""
        return self.choice is None or self.scheduled


# --- the rules --------------------------------------------------------------------------------------------------------


def token_probability(logits_MV: Tensor, probability_M: Tensor) -> Tensor:
    """The probability of the predicted token (Algorithm 5)."""
    return probability_M


def margin(logits_MV: Tensor, probability_M: Tensor) -> Tensor:
    """The difference between the probabilities of the likeliest token and of the second.

    On a grid of the likeliest one's :data:`TIE`: a narrow margin has few digits, and the others are rounding.
    """
    first_M, second_M = logits_MV.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    width_M = TIE * first_M
    return ((first_M - second_M) / width_M).round() * width_M


def negative_entropy(logits_MV: Tensor, probability_M: Tensor) -> Tensor:
    """Minus the entropy of the prediction, in nats."""
    import torch

    return -torch.special.entr(logits_MV.softmax(dim=-1)).sum(dim=-1)


def by_the_reverse_process(state: State) -> Tensor:
    """Each candidate with probability 1 - s / t (Algorithm 4, Eq. 10).

    Between t = (N - i + 1) / N and s = (N - i) / N of step i of N; the last step reveals all.
    """
    left_R1 = (state.steps_R - state.step)[:, None]
    return state.candidates_RK & (state.uniform() >= left_R1 / (left_R1 + 1))


def random_count(state: State) -> Tensor:
    """The scheduled number of candidates, by chance."""
    return most_confident(state.uniform(), state.candidates_RK, state.counts_R)


RULES: dict[str, Rule] = {
    "low_confidence": Rule(confidence=token_probability, threshold=True, released=True),
    "margin": Rule(confidence=margin, threshold=True),
    "entropy": Rule(confidence=negative_entropy),
    "random": Rule(choice=by_the_reverse_process, released=True),
    "random_count": Rule(choice=random_count, released=True, scheduled=True),
}
"""By the name that the setting `remasking` takes."""


def register(name: str, rule: Rule) -> None:
    """Adds a rule to the table; raises UserError where it has another one of this name."""
    if RULES.setdefault(name, rule) != rule:
        raise UserError(f"reveal rule '{name}': there is another one of this name; choose another name")


# --- how many stay, and which of the surest ---------------------------------------------------------------------------


Count = TypeVar("Count", "Tensor", int)


def counts_to_keep(masked: Count, step: int, steps: Count) -> Count:
    """The number of tokens to unmask in step i of N, from 1, of one row or of R rows, (R,) int64.

    After it floor(n i / N) of the n tokens are unmasked that were masked when the block began: Algorithm 5's n_un =
    floor(L (1 - s)), which is the number to keep (as printed, the algorithm would remask so many).
    """
    return masked * step // steps - masked * (step - 1) // steps


def most_confident(confidence_RK: Tensor, candidates_RK: Tensor, counts_R: Tensor) -> Tensor:
    """(R, K) bool: of the candidates of each row as many as ``counts_R`` says, the surest; of equals the first."""
    import torch

    least = torch.finfo(confidence_RK.dtype).min
    order_RK = (
        confidence_RK.clamp(min=least)
        .masked_fill(~candidates_RK, -torch.inf)
        .argsort(dim=1, descending=True, stable=True)
    )
    ranks_K = torch.arange(confidence_RK.shape[1], device=order_RK.device)
    chosen_RK = torch.zeros_like(candidates_RK).scatter(1, order_RK, ranks_K < counts_R[:, None])
    return chosen_RK & candidates_RK


def without_rounding(confidence_RK: Tensor, scale_R1: Tensor | None = None) -> Tensor:
    """Confidences on a grid from each row's highest down, so that what is equal but for rounding is equal.

    Where nothing but masks is seen, all positions get the same prediction. Which of them comes first must not depend
    on the last bit, which another batch rounds in another way. The grid's width is :data:`TIE` of the highest, or of a
    scale (R, 1) where the confidences are differences of larger numbers.
    """
    highest_R1 = confidence_RK.amax(dim=1, keepdim=True)
    width_R1 = (TIE * (highest_R1.abs() if scale_R1 is None else scale_R1)).clamp(min=1e-30)
    below_RK = ((highest_R1 - confidence_RK) / width_R1).round()
    return (highest_R1 - below_RK * width_R1).where(confidence_RK.isfinite(), confidence_RK)


def above_threshold(confidence_RK: Tensor, candidates_RK: Tensor, threshold: float) -> Tensor:
    """(R, K) bool: the candidates of more confidence than ``threshold``, and of every row the surest."""
    one_R = candidates_RK.any(dim=1).long()
    surest_RK = most_confident(without_rounding(confidence_RK), candidates_RK, one_R)
    return (candidates_RK & (confidence_RK > threshold)) | surest_RK


# --- as the authors' released code does, for compat="llada" -----------------------------------------------------------


def released_counts_to_keep(masked: int, step: int, steps: int) -> int:
    """As :func:`counts_to_keep`, but the remainder of an uneven division goes to the first steps."""
    return masked // steps + (step <= masked % steps)


def released_choice(
    confidence_RK: Tensor, candidates_RK: Tensor, counts: Sequence[int], begin: int, length: int
) -> Tensor:
    """The surest by ``topk`` over the canvas of ``length`` columns: of equals, frequent in bfloat16, those it gives."""
    import torch

    confidence_RL = torch.full((len(confidence_RK), length), -torch.inf, device=confidence_RK.device)
    columns = slice(begin, begin + confidence_RK.shape[1])
    confidence_RL[:, columns] = confidence_RK.float().masked_fill(~candidates_RK, -torch.inf)
    chosen_RL = torch.zeros_like(confidence_RL, dtype=torch.bool)
    for row, count in enumerate(counts):
        chosen_RL[row, confidence_RL[row].topk(count).indices] = True
    return chosen_RL[:, columns] & candidates_RK
