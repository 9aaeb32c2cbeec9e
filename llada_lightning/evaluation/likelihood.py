"""Log-likelihoods of continuations given prompts (paper, Eq. 6 and Algorithm 3; for `arm` the exact value)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.errors import UserError
from llada_lightning.evaluation.bound import Bound
from llada_lightning.evaluation.forward import Row, Scorer
from llada_lightning.evaluation.masks import BoolArray
from llada_lightning.evaluation.progress import ScoringProgress
from llada_lightning.evaluation.requests import Ids, Request, Score, Truncation, check_request

_MASKS_AT_ONCE = 2**15  # of one wave: bounds the memory, and is far more than a pass takes


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
    batch_tokens: int | None = None,
    progress: bool | None = False,
) -> list[Score]:
    """The log-likelihood of each continuation given its prompt, in nats.

    `arm`: exact. `llada`: the lower bound whose negative is Eq. 6, estimated without bias (``bound.Bound``): exact for
    one token, and where all masks are no more than the samples. An empty continuation has log-likelihood 0. An empty
    prompt is scored as the start of a text: behind EOS for an `arm` of ours, behind its BOS (or EOS) for a Llama,
    behind nothing for `llada`.

    A score depends on the seed and on its request's content alone, and to rounding not on what else is scored. Requests
    with one prompt share their random numbers, which makes differences between them more precise. Equal requests are
    scored once.

    Args:
        lm: the model.
        requests: pairs of ids: prompt, continuation.
        samples: masks that are drawn for each continuation; its exact ends come in addition, at most L + 1 passes.
        target_stderr: nats; samples are doubled for each request until its standard error is no more. An estimated
            error by which sampling stops is a little too small on the average.
        max_samples: where doubling ends, in whole multiples of ``samples``; by default 32 times as many.
            `Score.samples` tells what was drawn, `Score.stderr` what was reached.
        exact: score all masks where that takes no more of them than the samples; without it they are always drawn.
        cfg_scale: w of unsupervised classifier-free guidance (Eq. 16); its unconditional branch has [MASK]s for a
            prompt. Only `llada` has it.
        seed: of the masks.
        truncate: `left` cuts prompts that do not fit the context; `Score.truncated` tells by how many tokens.
        batch_tokens: tokens of one forward pass, padding included; by default what suits the device.
        progress: a bar on stderr; None: where that is a terminal.

    Raises:
        UserError: no token of the vocabulary, [MASK] within a continuation, more tokens than the context, or an option
            out of range.
    """
    check_options(lm, samples, max_samples, cfg_scale, batch_tokens)
    if target_stderr is not None and not target_stderr > 0:
        raise UserError(f"target_stderr is {target_stderr}; it must be above 0 (nats)")
    checked = [
        check_request(lm, prompt, continuation, truncate, f"request {n}")
        for n, (prompt, continuation) in enumerate(requests)
    ]
    with ScoringProgress(progress) as bar:
        scorer = Scorer(lm, cfg_scale, batch_tokens, bar)
        if lm.objective == "arm":
            scores = exact_scores(scorer, checked)
        else:
            bounds = {request: Bound(request, samples, seed, exact) for request in dict.fromkeys(checked)}
            for wave in waves(list(bounds.values()), samples):
                _until_precise(scorer, wave, samples, target_stderr, max_samples or 32 * samples)
            scores = {request: bound.score for request, bound in bounds.items()}
    return [scores[request] for request in checked]


def exact_scores(scorer: Scorer, requests: Sequence[Request]) -> dict[Request, Score]:
    """The scores of an `arm`; equal requests are scored once."""
    distinct = list(dict.fromkeys(requests))
    rows = [_causal_row(scorer.lm, request) for request in distinct if request.continuation]
    sums = iter([float(log_probs.sum()) for log_probs in scorer.log_probs(rows)])
    empty = Score(0.0, 0.0, exact=True, samples=0, tokens=0, method="empty")
    return {
        request: Score(next(sums), 0.0, True, 1, len(request.continuation), "autoregressive", request.truncated)
        if request.continuation
        else replace(empty, truncated=request.truncated)
        for request in distinct
    }


def draw(scorer: Scorer, bounds: Sequence[Bound], samples: int) -> None:
    """Adds samples to every bound until it has ``samples``, all in passes of many requests.

    A mask that is drawn twice is scored once.
    """
    plans = [bound.plan(samples) for bound in bounds]
    distinct = [np.unique(masks_NL, axis=0, return_inverse=True) for masks_NL in plans]
    rows = [
        _masked_row(scorer.lm, bound.request, mask_L)
        for bound, (masks_NL, _) in zip(bounds, distinct, strict=True)
        for mask_L in masks_NL
    ]
    log_probs = iter(scorer.log_probs(rows))
    for bound, plan_NL, (masks_NL, inverse_N) in zip(bounds, plans, distinct, strict=True):
        if not len(plan_NL):
            continue
        values_NL = np.zeros(masks_NL.shape)
        values_NL[masks_NL] = np.concatenate([next(log_probs) for _ in masks_NL])
        bound.add(plan_NL, values_NL[inverse_N.reshape(-1)])


def waves(bounds: Sequence[Bound], samples: int) -> Iterator[list[Bound]]:
    """The bounds in groups of like lengths, each of as many masks as memory takes."""
    wave: list[Bound] = []
    masks = 0
    for bound in sorted(bounds, key=lambda bound: -len(bound.request.prompt) - bound.length):
        cost = samples + min(bound.length, samples) + 1
        if wave and masks + cost > _MASKS_AT_ONCE:
            yield wave
            wave, masks = [], 0
        wave.append(bound)
        masks += cost
    if wave:
        yield wave


def check_options(
    lm: LanguageModel, samples: int, max_samples: int | None, cfg_scale: float, batch_tokens: int | None
) -> None:
    """Raises UserError for an option out of range."""
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1")
    if max_samples is not None and max_samples < samples:
        raise UserError(f"max_samples is {max_samples}, fewer than samples, {samples}; raise it or lower samples")
    if not cfg_scale >= 0:
        raise UserError(f"cfg_scale is {cfg_scale}; it must be at least 0")
    if cfg_scale and lm.objective == "arm":
        raise UserError(f"cfg_scale is {cfg_scale}, but guidance (Eq. 16) is of llada, and this is arm; leave it at 0")
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(f"batch_tokens is {batch_tokens}; it must be at least 1")


def _until_precise(
    scorer: Scorer, bounds: list[Bound], samples: int, target_stderr: float | None, max_samples: int
) -> None:
    draw(scorer, bounds, samples)
    if target_stderr is None:
        return
    while samples < max_samples:
        samples = min(2 * samples, max_samples)
        bounds = [bound for bound in bounds if not bound.score.stderr <= target_stderr]  # NaN is not precise
        draw(scorer, bounds, samples)


def _masked_row(lm: LanguageModel, request: Request, mask_L: BoolArray) -> Row:
    assert lm.mask_token_id is not None
    continuation_L = np.array(request.continuation)
    prompt = np.array(request.prompt, dtype=np.int64)
    return Row(
        tokens=np.concatenate([prompt, np.where(mask_L, lm.mask_token_id, continuation_L)]),
        positions=len(prompt) + mask_L.nonzero()[0],
        targets=continuation_L[mask_L],
        prompt_length=len(prompt),
    )


def _causal_row(lm: LanguageModel, request: Request) -> Row:
    start = () if lm.start_token_id is None else (lm.start_token_id,)
    if not start and not request.prompt:  # the first token needs one before it
        start = (*getattr(lm, "text_prefix_ids", ()), lm.eos_token_id)[:1]
    tokens = np.array((*start, *request.prompt, *request.continuation[:-1]), dtype=np.int64)
    length = len(request.continuation)
    return Row(tokens, np.arange(len(tokens) - length, len(tokens)), np.array(request.continuation))
