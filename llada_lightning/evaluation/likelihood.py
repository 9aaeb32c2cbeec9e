"""Log-likelihoods of continuations given prompts (paper, Eq. 6 and Algorithm 3; for `arm` the exact value)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.bound import (
    REPLICATES,
    AnyBound,
    BoolArray,
    Bound,
    BoundByNoise,
    NoisyTokens,
    bound_of,
    check_sampling,
    requests_by_block,
)
from llada_lightning.evaluation.policy import Policy, policy_log_probs
from llada_lightning.evaluation.requests import FloatArray, Ids, Request, Score, Truncation, check_request
from llada_lightning.generation.predictor import guide
from llada_lightning.model.head import token_nll
from llada_lightning.objectives.forward_process import Alphabet
from llada_lightning.objectives.uniform import integrand, levels
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import people_console

IntArray = npt.NDArray[np.int64]

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, 65_536
_LOGITS_AT_ONCE = 2**25  # 128 MiB in fp32
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


# --- from requests to rows of the model -------------------------------------------------------------------------------


def exact_scores(scorer: Scorer, requests: Sequence[Request]) -> dict[Request, Score]:
    """The exact scores of a model without [MASK], which predicts from left to right; equal requests once."""
    distinct = list(dict.fromkeys(requests))
    sums = iter(scorer.log_probs([_causal_input(scorer.lm, request) for request in distinct if request.continuation]))
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
        policy_log_probs(scorer, [_whole_input(scorer.lm, part) for own in parts.values() for part in own], policy)
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


@dataclass(frozen=True)
class ScoredInput:
    """One sequence through the model, and the tokens whose log-probability is wanted.

    Args:
        tokens: (T,) The input ids.
        positions, targets: (M,) The positions in ``tokens`` of the wanted logits, and the ids wanted there.
        prompt: The part of the tokens that guidance replaces by [MASK].
        level: The noise level of tokens of which some are replaced by random ones. What is wanted at each position is
            the integrand of their bound, with its sign changed.
    """

    tokens: IntArray
    positions: IntArray
    targets: IntArray
    prompt: slice = field(default_factory=lambda: slice(0, 0))
    level: float | None = None


def noisy_input(request: Request, noise: NoisyTokens) -> ScoredInput:
    prompt, continuation = (np.array(ids, dtype=np.int64) for ids in (request.prompt, request.continuation))
    return ScoredInput(
        tokens=np.concatenate([prompt, noise.tokens_L]),
        positions=len(prompt) + np.arange(len(continuation)),
        targets=continuation,
        prompt=slice(0, len(prompt)),
        level=noise.level,
    )


def masked_input(lm: LanguageModel, request: Request, mask_L: BoolArray) -> ScoredInput:
    """The continuation with its masked tokens, which are the targets."""
    assert lm.mask_token_id is not None
    whole = _whole_input(lm, request)
    tokens, positions = whole.tokens.copy(), whole.positions[mask_L]
    tokens[positions] = lm.mask_token_id
    return ScoredInput(tokens, positions - lm.shift_targets, whole.targets[mask_L], whole.prompt)


def _whole_input(lm: LanguageModel, request: Request) -> ScoredInput:
    """The true tokens, nothing masked yet; the positions are those of the tokens of the continuation."""
    start = _start(lm, request) if lm.shift_targets else ()
    tokens = np.array((*start, *request.prompt, *request.continuation), dtype=np.int64)
    first = len(tokens) - len(request.continuation)
    return ScoredInput(tokens, np.arange(first, len(tokens)), tokens[first:], slice(len(start), first))


def _start(lm: LanguageModel, request: Request) -> tuple[int, ...]:
    """What stands before a prompt where a token is predicted from the one before it."""
    if lm.start_token_id is not None:
        return (lm.start_token_id,)
    return () if request.prompt else (*lm.text_prefix_ids, lm.eos_token_id)[:1]  # the first token needs one before it


def _causal_input(lm: LanguageModel, request: Request) -> ScoredInput:
    start = _start(lm, request)
    tokens = np.array((*start, *request.prompt, *request.continuation[:-1]), dtype=np.int64)
    length = len(request.continuation)
    return ScoredInput(tokens, np.arange(len(tokens) - length, len(tokens)), np.array(request.continuation))


# --- through the model ------------------------------------------------------------------------------------------------


class Scorer:
    """Runs inputs through a model; for its settings see :func:`log_likelihood`."""

    def __init__(
        self, lm: LanguageModel, cfg_scale: float, batch_tokens: int | None, progress: ScoringProgress
    ) -> None:
        self.lm, self.cfg_scale, self.progress = lm, cfg_scale, progress
        self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if lm.device.type == "cpu" else GPU_BATCH_TOKENS)

    def log_probs(self, inputs: Sequence[ScoredInput]) -> list[FloatArray]:
        """(M,) float64 nats for each input, in their order. What an input gives does not depend on the others."""
        results: list[FloatArray] = [np.empty(0)] * len(inputs)
        self.progress.expect(len(inputs))
        for batch in self.batches(inputs):
            values = self._batch([inputs[i] for i in batch])
            ends = np.cumsum([len(inputs[i].positions) for i in batch])
            for i, value in zip(batch, np.split(values, ends[:-1]), strict=True):
                results[i] = value
            self.progress.advance(len(batch))
        return results

    def padded(self, rows: Sequence[ScoredInput]) -> tuple[IntArray, Tensor | None]:
        """(B, T) tokens of rows of which the first is the longest, and (B, T) bool: no padding; None where none is."""
        width = len(rows[0].tokens)
        lengths_B = np.array([len(row.tokens) for row in rows])
        tokens_BT = np.full((len(rows), width), self.lm.eos_token_id, dtype=np.int64)
        for b, row in enumerate(rows):
            tokens_BT[b, : len(row.tokens)] = row.tokens
        padded = bool((lengths_B < width).any())
        real_BT = torch.from_numpy(np.arange(width) < lengths_B[:, None]).to(self.lm.device) if padded else None
        return tokens_BT, real_BT

    def batches(self, inputs: Sequence[ScoredInput]) -> Iterator[list[int]]:
        """Indices of inputs that go together, longest first: so what does not fit into memory fails at once."""
        tokens_each = self.batch_tokens // (2 if self.cfg_scale else 1)
        batch: list[int] = []
        for i in sorted(range(len(inputs)), key=lambda i: -len(inputs[i].tokens)):
            if batch and (len(batch) + 1) * len(inputs[batch[0]].tokens) > tokens_each:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def _batch(self, rows: list[ScoredInput]) -> FloatArray:
        """The log-probabilities of the rows' targets, one row behind the other; the first row is the longest."""
        device, width = self.lm.device, len(rows[0].tokens)
        tokens_BT, real_BT = self.padded(rows)
        at_M = torch.from_numpy(np.concatenate([b * width + row.positions for b, row in enumerate(rows)])).to(device)
        targets_M = torch.from_numpy(np.concatenate([row.targets for row in rows])).to(device)
        branches = [tokens_BT]
        if self.cfg_scale:
            assert self.lm.mask_token_id is not None
            without_BT = tokens_BT.copy()
            for without_T, row in zip(without_BT, rows, strict=True):
                without_T[row.prompt] = self.lm.mask_token_id
            branches.append(without_BT)
        hidden_BTD = self.lm.model.hidden(
            torch.from_numpy(np.concatenate(branches)).to(device),
            causal=self.lm.causal,
            attention_mask_BL=None if real_BT is None else real_BT.repeat(len(branches), 1),
            pattern=self.lm.pattern(),
        )
        hidden_NMD = hidden_BTD.unflatten(0, (len(branches), -1)).flatten(1, 2)[:, at_M]
        step = max(1, _LOGITS_AT_ONCE // self.lm.model.vocab_size // len(branches))
        given: tuple[Tensor, ...] = ()
        if self.lm.facts.replaces:
            levels_M = np.concatenate([np.full(len(row.positions), row.level) for row in rows])
            entries = Alphabet(self.lm.model.vocab_size, self.lm.mask_token_id).size
            noisy_M = torch.from_numpy(tokens_BT).flatten().to(device)[at_M]
            given = noisy_M, *levels(torch.from_numpy(levels_M).to(device), entries)
        parts = [
            self._losses(hidden_NMD[:, m : m + step], targets_M[m : m + step], *(x[m : m + step] for x in given))
            for m in range(0, len(targets_M), step)
        ]
        return -torch.cat(parts).double().cpu().numpy()

    def _losses(self, hidden_NMD: Tensor, targets_M: Tensor, *given: Tensor) -> Tensor:
        """(M,) the negative log-likelihoods, or the integrands of the bound of noisy tokens."""
        logits_MV, excluded = self.logits(hidden_NMD), self.lm.excluded_token_id
        if not given:
            return token_nll(logits_MV, targets_M, excluded)
        if excluded is not None:
            logits_MV[:, excluded] = -torch.inf
        return integrand(logits_MV, targets_M, *given)

    def logits(self, hidden_NMD: Tensor) -> Tensor:
        """(M, V) float32; of two branches the guided ones (Eq. 16)."""
        logits_NMV = self.lm.model.head(hidden_NMD).float()
        if len(logits_NMV) == 1:
            return logits_NMV[0]
        return guide(logits_NMV[0], logits_NMV[1], self.cfg_scale)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} rows/s", style="progress.data.speed")


class ScoringProgress:
    """Rows done and to do, their rate and the time left, on stderr (by default where that is a terminal)."""

    def __init__(self, enabled: bool | None = False, what: str = "scoring") -> None:
        console = people_console(stderr=True)
        shown = console.is_terminal if enabled is None else enabled
        columns = ("{task.description}", BarColumn(bar_width=24), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not shown)
        self._task, self._total = self._bar.add_task(what, total=0), 0

    def __enter__(self) -> ScoringProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, rows: int) -> None:
        self._total += rows
        self._bar.update(self._task, total=self._total)

    def advance(self, rows: int) -> None:
        self._bar.advance(self._task, rows)
