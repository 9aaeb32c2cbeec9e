"""Log-likelihoods of continuations given prompts (paper, Eq. 6 and Algorithm 3; for `arm` the exact value)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.bound import REPLICATES, BoolArray, Bound, check_sampling
from llada_lightning.evaluation.forward import Row, Scorer, ScoringProgress
from llada_lightning.evaluation.requests import Ids, Request, Score, Truncation, check_request
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
        batch_tokens: The number of tokens of one forward pass, padding included; None: a number that suits the device.
        progress: Whether a progress bar is shown on stderr; None: where that is a terminal.

    Raises:
        UserError: no model, a request that is no pair, no token of the vocabulary, [MASK] within a
            continuation, more tokens than the context, or an option out of range.
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
    with ScoringProgress(progress) as bar:
        scorer = Scorer(lm, cfg_scale, batch_tokens, bar)
        if not lm.facts.masks:
            scores = exact_scores(scorer, checked)
        else:
            bounds = {request: Bound(request, samples, seed, exact) for request in dict.fromkeys(checked)}
            _until_precise(scorer, list(bounds.values()), samples, target_stderr, max_samples or 32 * samples)
            scores = {request: bound.score for request, bound in bounds.items()}
    return [scores[request] for request in checked]


def exact_scores(scorer: Scorer, requests: Sequence[Request]) -> dict[Request, Score]:
    """The exact scores of a model without [MASK], which predicts from left to right; equal requests once."""
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
    """Adds samples to every bound until it has ``samples``, in passes of many requests.

    A mask that is drawn twice is scored once.
    """
    for wave in _waves(bounds, samples):
        distinct = [np.unique(masks_NL, axis=0, return_inverse=True) for _, masks_NL in wave]
        rows = [
            _masked_row(scorer.lm, bound.request, mask_L)
            for (bound, _), (masks_NL, _) in zip(wave, distinct, strict=True)
            for mask_L in masks_NL
        ]
        log_probs = iter(scorer.log_probs(rows))
        for (bound, plan_NL), (masks_NL, inverse_N) in zip(wave, distinct, strict=True):
            values_NL = np.zeros(masks_NL.shape)
            values_NL[masks_NL] = np.concatenate([next(log_probs) for _ in masks_NL])
            bound.add(plan_NL, values_NL[inverse_N.reshape(-1)])


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


def _waves(bounds: Sequence[Bound], samples: int) -> Iterator[list[tuple[Bound, BoolArray]]]:
    """Bounds with their planned masks, longest first, in groups whose rows fit into memory."""
    wave: list[tuple[Bound, BoolArray]] = []
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


def _until_precise(
    scorer: Scorer, bounds: list[Bound], samples: int, target_stderr: float | None, max_samples: int
) -> None:
    draw(scorer, bounds, samples)
    while target_stderr is not None and samples < max_samples:
        samples = min(2 * samples, max_samples)
        bounds = [bound for bound in bounds if bound.score.stderr > target_stderr]
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
    start: tuple[int, ...] = () if lm.start_token_id is None else (lm.start_token_id,)
    if not start and not request.prompt:  # the first token needs one before it
        start = (*lm.text_prefix_ids, lm.eos_token_id)[:1]
    tokens = np.array((*start, *request.prompt, *request.continuation[:-1]), dtype=np.int64)
    length = len(request.continuation)
    return Row(tokens, np.arange(len(tokens) - length, len(tokens)), np.array(request.continuation))
