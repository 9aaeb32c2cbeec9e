"""The best of several continuations, with no more samples than it takes to be sure.

The candidates of a question share their random numbers, so their differences are taken replicate by replicate. After
each look at the samples a candidate is out where some other is better: where the mean difference exceeds Student's t
times its standard error. The t-quantile is of a chance of (1 - confidence) / (looks x (candidates - 1)): the truly best
one can go out wrongly in each of the looks and against each of the others, so by the union bound it does so, ever, with
a probability of at most 1 - confidence (as far as the replicates' means are normal, which averages of masks nearly
are). Only candidates that are still in are given more samples.

Few tokens have few masks: 16 replicates of one mask each then easily miss a rare one, or all give the same, and their
scatter is too small. So candidates of at most 7 tokens are scored by all their masks at the first look, which leaves
no error (6 and 7 tokens only where ``max_samples`` allows their 63 and 127 masks). Replicates of longer ones that give
the very same value tell no error, so they put nobody out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from scipy.stats import t as student_t

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.bound import AnyBound, bound_of, check_sampling
from llada_lightning.evaluation.likelihood import check_guidance, draw, exact_scores
from llada_lightning.evaluation.requests import FloatArray, Ids, Score, Truncation, check_question
from llada_lightning.evaluation.scorer import Scorer, ScoringProgress
from llada_lightning.support.errors import UserError

Normalisation = Literal["none", "token", "byte"]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)
Question = tuple[Ids, Sequence[Ids]]

_ALL_MASKS_UP_TO = 127  # 7 tokens
_ALL_MASKS_ALWAYS = 31  # 5 tokens; hardly more than the first look's 16 masks and the ends


@dataclass(frozen=True)
class Ranking:
    """The candidates of one question.

    Args:
        best: The index of the candidate with the highest value; of equal ones the first.
        settled: Whether every other candidate is worse at the confidence asked for.
        scores: The score of each candidate. Candidates that were ruled out early have fewer samples.
        values: What was compared: the mean by the normalisation, in nats (per token, per byte).
    """

    best: int
    settled: bool
    scores: list[Score]
    values: list[float]


@dataclass
class _Question:
    bounds: list[AnyBound]
    sizes: FloatArray
    contenders: list[int]

    @property
    def ranking(self) -> Ranking:
        scores = {bound: bound.score for bound in self.bounds}
        return rank_scores([scores[bound] for bound in self.bounds], self.sizes, self.contenders)

    def look(self, chance: float) -> None:
        """Puts out whom another contender beats, each comparison wrong with at most ``chance``."""
        values = {c: self.bounds[c].values / self.sizes[c] for c in self.contenders}
        out = {c for c in self.contenders if any(_exceeds(values[b] - values[c], chance) for b in self.contenders)}
        self.contenders = [c for c in self.contenders if c not in out]


def rank_candidates(
    lm: LanguageModel,
    questions: Sequence[Question],
    confidence: float = 0.99,
    *,
    normalisation: Normalisation = "none",
    byte_lengths: Sequence[Sequence[int]] | None = None,
    samples: int = 16,
    max_samples: int = 1024,
    cfg_scale: float = 0.0,
    seed: int = 0,
    truncate: Truncation | None = None,
    batch_tokens: int | None = None,
    progress: bool | None = False,
) -> list[Ranking]:
    """The best candidate of each question, sampled until it is settled.

    Args:
        lm: The model. With an `arm` every value is exact and nothing is sampled.
        questions: The token ids of a prompt, and of each of its candidates.
        confidence: The least probability with which the winner is the candidate with the highest value of Eq. 6.
        normalisation: The value that is compared: the log-likelihood, or that per token, or per byte.
        byte_lengths: The number of bytes of each candidate, for `byte`; None: those of its text as the tokenizer
            decodes it.
        samples: The number of samples of the first look, at least 16; doubled for each look that follows.
        max_samples: The number of samples after which a question is left open, with its best candidate so far.
        truncate: The handling of prompts that do not fit the context. `left` cuts the prompt of a question by what its
            longest candidate needs.
        cfg_scale: The weight of guidance. This setting and the next three are those of
            :func:`likelihood.log_likelihood`.
        seed: The seed of the masks.
        batch_tokens: The number of tokens of one forward pass.
        progress: Whether a progress bar is shown.

    Raises:
        UserError: As there; no candidates; an empty one; one without text under a normalisation.
    """
    check_sampling(samples, max_samples, None, confidence, cfg_scale, batch_tokens)
    check_guidance(lm, cfg_scale)
    requests = [
        check_question(
            lm, prompt, candidates, truncate, [f"question {n}, candidate {k}" for k in range(len(candidates))]
        )
        for n, (prompt, candidates) in enumerate(questions)
    ]
    sizes = candidate_sizes(lm, questions, normalisation, byte_lengths)
    with ScoringProgress(progress) as bar:
        scorer = Scorer(lm, cfg_scale, batch_tokens, bar)
        if not lm.facts.denoises:
            known = exact_scores(scorer, [request for group in requests for request in group])
            return [rank_scores([known[r] for r in group], size) for group, size in zip(requests, sizes, strict=True)]
        all_up_to = min(_ALL_MASKS_UP_TO, max(_ALL_MASKS_ALWAYS, max_samples))
        bounds = {r: bound_of(lm, r, samples, seed, all_up_to=all_up_to) for group in requests for r in group}
        every = [
            _Question([bounds[r] for r in group], size, list(range(len(group))))
            for group, size in zip(requests, sizes, strict=True)
        ]
        still_open, looks = every, 1 + math.ceil(math.log2(max_samples / samples))
        for look in range(looks):
            wanted = dict.fromkeys(question.bounds[c] for question in still_open for c in question.contenders)
            draw(scorer, list(wanted), min(samples << look, max_samples))
            for question in still_open:
                question.look((1 - confidence) / (looks * max(1, len(question.bounds) - 1)))
            still_open = [question for question in still_open if not question.ranking.settled]
    return [question.ranking for question in every]


def _exceeds(differences: FloatArray, chance: float) -> bool:
    """Whether the mean of the differences is above 0, said wrongly with a probability of at most ``chance``."""
    mean = float(differences.mean())
    if len(differences) == 1:  # both exact
        return mean > 0
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return error > 0 and mean > _quantile(chance, len(differences) - 1) * error


@cache
def _quantile(chance: float, degrees: int) -> float:
    return float(student_t.isf(chance, degrees))


def rank_scores(scores: list[Score], sizes: FloatArray, contenders: Sequence[int] | None = None) -> Ranking:
    """The ranking of candidates as they are scored, divided by their sizes; None: all are contenders.

    It is settled with one contender, with exact scores, and with one score given several times, as for equal requests,
    which no sample can separate.
    """
    values = [score.mean / size for score, size in zip(scores, sizes.tolist(), strict=True)]
    left = list(range(len(scores)) if contenders is None else contenders)
    settled = all(scores[c].exact for c in left) or all(scores[c] is scores[left[0]] for c in left)
    return Ranking(max(left, key=values.__getitem__), settled, scores, values)


def candidate_sizes(
    lm: LanguageModel,
    questions: Sequence[Question],
    normalisation: Normalisation,
    byte_lengths: Sequence[Sequence[int]] | None = None,
) -> list[FloatArray]:
    """What the log-likelihood of each candidate is divided by; arguments as those of :func:`rank_candidates`."""
    if normalisation not in NORMALISATIONS:
        raise UserError(f"normalisation is {normalisation!r}; choose from {', '.join(NORMALISATIONS)}")
    every = []
    for n, (_, candidates) in enumerate(questions):
        if not len(candidates):
            raise UserError(f"question {n} has no candidates; give at least one")
        tokens = list(map(len, candidates))
        if 0 in tokens:
            name = f"question {n}, candidate {tokens.index(0)}"
            raise UserError(f"{name} is empty and would be the best always; give it a token")
        sizes = tokens if normalisation == "token" else [1] * len(tokens)
        if normalisation == "byte" and byte_lengths is None:
            sizes = [len(lm.decode(list(candidate)).encode()) for candidate in candidates]
        elif normalisation == "byte" and byte_lengths is not None:
            sizes = list(byte_lengths[n])
        if 0 in sizes:
            raise UserError(
                f"question {n}, candidate {sizes.index(0)} has no text, so nothing can be told per {normalisation}; "
                "use normalisation 'none'"
            )
        every.append(np.array(sizes, dtype=np.float64))
    return every
