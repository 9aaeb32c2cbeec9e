"""Log-likelihoods of continuations given prompts (paper, Eq. 6 and Algorithm 3; for `arm` the exact value)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.bound import (
    REPLICATES,
    AnyBound,
    Bound,
    BoundByNoise,
    bound_of,
    check_sampling,
    requests_by_block,
)
from llada_lightning.evaluation.policy import Policy, policy_log_probs
from llada_lightning.evaluation.requests import Ids, Request, Score, Truncation, check_request
from llada_lightning.evaluation.scorer import (
    Scorer,
    ScoringProgress,
    causal_input,
    masked_input,
    noisy_input,
    whole_input,
)
from llada_lightning.support.errors import UserError

_TOKENS_AT_ONCE = 2**24  # of one wave's rows: bounds the memory (about 0.5 GiB), and is far more than a pass takes


def log_likelihood(
    lm: LanguageModel,
    requests: Sequence[tuple[Ids, Ids]],
    samples: int = 128,
    target_stderr: float | None = None,
    *,
    max_samples: int | None = None,
    exact: bool = True,
    cfg_scale: float = 0.0,
    seed: int = 0,
    truncate: Truncation | None = None,
    policy: Policy | None = None,
    batch_tokens: int | None = None,
    progress: bool | None = False,
) -> list[Score]:
    """The log-likelihood of each continuation given its prompt, in nats.

    `arm`: exact. `llada`: the lower bound whose negative is Eq. 6, estimated without bias (``bound.Bound``): exact for
    one token, and where all masks are no more than the samples. `uniform`: a lower bound, by Monte Carlo over noisy
    continuations (``bound.BoundByNoise``). With a policy it is the exact log-likelihood of the sampler that decodes the
    continuation by it (``evaluation.policy``), and nothing is drawn. An empty continuation has log-likelihood 0. An
    empty prompt is scored as the start of a text: behind EOS for an `arm` of ours, behind its BOS (or EOS) for a Llama,
    behind nothing for `llada`.

    A score depends on the seed and on its request's content alone, and to rounding not on what else is scored. Requests
    with one prompt share their random numbers, which makes differences between them more precise. Equal requests are
    scored once.

    Args:
        lm: The model.
        requests: The pairs of token ids: (prompt, continuation).
        samples: The number of masks that are drawn for each continuation. The masks of l = 1 (where there are no more
            than twice the samples) and of l = L are scored in addition.
        target_stderr: The standard error to reach, in nats. The samples of each request are doubled until its standard
            error is no more. The first round then has at least 16 samples: the error of fewer replicates is too rough
            to stop by. Because the data decide when to stop, the mean is no longer exactly unbiased, and the error by
            which sampling stops is a little too small on the average.
        max_samples: The number of samples where doubling ends, in whole multiples of the first round; None: 32 times as
            many. `Score.samples` holds the number that was drawn, `Score.stderr` the error that was reached.
        exact: Whether all masks are scored where there are no more of them than samples; otherwise masks are always
            drawn.
        cfg_scale: The scale w of unsupervised classifier-free guidance (Eq. 16). Its unconditional branch has [MASK]s
            for a prompt. Only `llada` has it.
        seed: The seed of the masks.
        truncate: The handling of prompts that do not fit the context. `left` cuts them; `Score.truncated` holds the
            number of tokens cut.
        policy: The decoding policy whose likelihood is wanted; None: the bound. `arm` has its own order
            only, `Policy("left_to_right")`.
        batch_tokens: The number of tokens of one forward pass, padding included; None: a number that suits the device.
        progress: Whether a progress bar is shown on stderr; None: where that is a terminal.

    Raises:
        UserError: No model, a request that is no pair, no token of the vocabulary, [MASK] within a
            continuation, more tokens than the context, a policy that the model cannot decode by, or an option out of
            range.
    """
    if not isinstance(lm, LanguageModel):
        raise UserError(f"lm is {str(lm)[:60]!r}, no model; give what load_model returns for it")
    check_sampling(samples, max_samples, target_stderr, cfg_scale=cfg_scale, batch_tokens=batch_tokens)
    check_guidance(lm, cfg_scale)
    if target_stderr is not None:
        samples = max(samples, REPLICATES)
    checked = [
        check_request(lm, *_pair(request, f"request {n}"), truncate, f"request {n}")
        for n, request in enumerate(requests)
    ]
    if policy is not None:
        longest = max((len(request.continuation) for request in checked), default=0) or lm.context_length
        policy.check(lm.facts, min(longest, lm.block_length or longest))
    with ScoringProgress(progress) as bar:
        scorer = Scorer(lm, cfg_scale, batch_tokens, bar)
        if not lm.facts.denoises:
            scores = exact_scores(scorer, checked)
        elif policy is not None:
            scores = policy_scores(scorer, checked, policy)
        else:
            bounds = {request: bound_of(lm, request, samples, seed, exact) for request in dict.fromkeys(checked)}
            wanted, most = list(bounds.values()), max_samples or 32 * samples
            draw(scorer, wanted, samples)
            while target_stderr is not None and samples < most:
                samples = min(2 * samples, most)
                wanted = [bound for bound in wanted if bound.score.stderr > target_stderr]
                draw(scorer, wanted, samples)
            scores = {request: bound.score for request, bound in bounds.items()}
    return [scores[request] for request in checked]


def document_log_likelihoods(lm: LanguageModel, texts_ids: Sequence[Ids], **options: Any) -> list[float]:
    """The log-likelihood of each text, nats, in disjoint windows of the context length; options of the windows."""
    length = lm.context_length
    numbered = [(n, pair) for n, ids in enumerate(texts_ids) for pair in windows(ids, length, length)]
    totals = [0.0] * len(texts_ids)
    for (n, _), score in zip(numbered, log_likelihood(lm, [pair for _, pair in numbered], **options), strict=True):
        totals[n] += score.mean
    return totals


def windows(ids: Ids, window: int, stride: int) -> Iterator[tuple[Ids, Ids]]:
    """(context, tokens to score) of each window of a document: ``window`` tokens, then ``stride`` new ones each."""
    yield ids[:0], ids[:window]
    for start in range(window, len(ids), stride):
        yield ids[start - (window - stride) : start], ids[start : start + stride]


def check_guidance(lm: LanguageModel, cfg_scale: float) -> None:
    """Raises UserError where guidance is asked of a model without [MASK]."""
    if cfg_scale and not lm.facts.masks:
        raise UserError(
            f"cfg_scale is {cfg_scale}, but guidance (Eq. 16) needs [MASK], which {lm.objective} has not; leave it at 0"
        )


def _pair(request: tuple[Ids, Ids], name: str) -> tuple[Ids, Ids]:
    try:
        prompt, continuation = request
        len(prompt), len(continuation)
    except (TypeError, ValueError) as error:  # a pair outside of a list: its ids
        raise UserError(
            f"{name}: {str(request)[:40]!r} is no pair; give a list of pairs of token ids, [(prompt, continuation), …]"
        ) from error
    return prompt, continuation


def exact_scores(scorer: Scorer, requests: Sequence[Request]) -> dict[Request, Score]:
    """The exact scores of a model without [MASK], which predicts from left to right; equal requests once."""
    distinct = list(dict.fromkeys(requests))
    sums = iter(scorer.log_probs([causal_input(scorer.lm, request) for request in distinct if request.continuation]))
    return {
        request: Score(
            float(next(sums).sum()), 0.0, True, 1, len(request.continuation), "autoregressive", request.truncated
        )
        if request.continuation
        else Score(0.0, 0.0, True, 0, 0, "empty", request.truncated)
        for request in distinct
    }


def policy_scores(scorer: Scorer, requests: Sequence[Request], policy: Policy) -> dict[Request, Score]:
    """The exact scores of a masked diffusion model under a policy; equal requests once."""
    parts = {request: requests_by_block(request, scorer.lm.block_length) for request in dict.fromkeys(requests)}
    sums = iter(
        policy_log_probs(scorer, [whole_input(scorer.lm, part) for own in parts.values() for part in own], policy)
    )
    return {
        request: Score(
            mean=sum(next(sums) for _ in own),
            stderr=0.0,
            exact=True,
            samples=sum(policy.predictions(len(part.continuation)) for part in own),
            tokens=len(request.continuation),
            method="policy" if request.continuation else "empty",
            truncated=request.truncated,
            policy=policy.label if request.continuation else None,
        )
        for request, own in parts.items()
    }


def draw(scorer: Scorer, bounds: Sequence[AnyBound], samples: int) -> None:
    """Adds samples to every bound until it has ``samples``, in passes of many requests.

    A mask that is drawn twice is scored once.
    """
    if scorer.lm.facts.replaces:
        return _draw_noise(scorer, [bound for bound in bounds if isinstance(bound, BoundByNoise)], samples)
    for wave in _waves([part for bound in bounds for part in bound.parts], samples):
        distinct = [np.unique(masks_NL, axis=0, return_inverse=True) for _, masks_NL in wave]
        inputs = [
            masked_input(scorer.lm, bound.request, mask_L)
            for (bound, _), (masks_NL, _) in zip(wave, distinct, strict=True)
            for mask_L in masks_NL
        ]
        log_probs = iter(scorer.log_probs(inputs))
        for (bound, plan_NL), (masks_NL, inverse_N) in zip(wave, distinct, strict=True):
            values_NL = np.zeros(masks_NL.shape)
            values_NL[masks_NL] = np.concatenate([next(log_probs) for _ in masks_NL])
            bound.add(plan_NL, values_NL[inverse_N.reshape(-1)])


def _draw_noise(scorer: Scorer, bounds: Sequence[BoundByNoise], samples: int) -> None:
    """Adds noisy continuations to every bound until it has ``samples``."""
    for wave in _waves(bounds, samples):
        inputs = [noisy_input(bound.request, noise) for bound, plan in wave for noise in plan]
        values = iter(scorer.log_probs(inputs))
        for bound, plan in wave:
            bound.add(plan, np.array([next(values).sum() for _ in plan]))


AnyPart = TypeVar("AnyPart", Bound, BoundByNoise)


def _waves(bounds: Sequence[AnyPart], samples: int) -> Iterator[list[tuple[AnyPart, Any]]]:
    """Bounds with what they plan, longest first, in groups whose rows fit into memory."""
    wave: list[tuple[AnyPart, Any]] = []
    tokens = 0
    for bound in sorted(bounds, key=lambda bound: -len(bound.request.prompt) - bound.length):
        plan_NL = bound.plan(samples)
        more = len(plan_NL) * (len(bound.request.prompt) + bound.length)
        if not more:
            continue
        if wave and tokens + more > _TOKENS_AT_ONCE:
            yield wave
            wave, tokens = [], 0
        wave.append((bound, plan_NL))
        tokens += more
    if wave:
        yield wave
