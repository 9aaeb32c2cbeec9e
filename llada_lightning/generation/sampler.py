"""`generate`: answers to prompts, token by token (`arm`), by the reverse process of `llada`: pure, in blocks of a fixed
length, or in blocks that grow (Sec. 2.4, B.4); or from random tokens (`uniform`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation import reveal
from llada_lightning.generation.ancestral import refine
from llada_lightning.generation.predictor import (
    STILL_MASKED,
    BlockPredictor,
    Canvas,
    NoiseByPrompt,
    ReleasedNoise,
    SamplerNoise,
    predict_tokens,
)
from llada_lightning.generation.prompts import Prompts, check_context, prompt_ids
from llada_lightning.generation.sampling import (
    Finish,
    Generation,
    Observer,
    Sampling,
    default_length,
    only_left_to_right,
)
from llada_lightning.model.attention import KeyValueCache
from llada_lightning.support.errors import UserError


@torch.inference_mode()
def generate(
    lm: LanguageModel,
    prompts: Prompts,
    sampling: Sampling | None = None,
    *,
    attention_mask: Tensor | None = None,
    first: int = 0,
    batch_size: int | None = None,
    on_step: Observer | None = None,
    **settings: Any,
) -> Generation:
    """Sample an answer to each prompt.

    An answer depends on its prompt, the settings, the seed and the prompt's number (its place in the list), and on
    nothing else of the batch, but for rounding: a tie within it, next to unknown in float32, may fall another way in
    bfloat16. Tokens behind EOS are discarded.

    Args:
        lm: The model, as ``load_model`` gives it.
        prompts: A text, texts, lists of ids, or a tensor (B, P); an empty one writes from nothing.
        sampling: The settings; by default those of :class:`Sampling`.
        attention_mask: (B, P), where a tensor of prompts is padded, on either side.
        first: The number of the first prompt, from 0: prompt i of a batch gets its answer alone with ``first=i``.
        batch_size: The number of prompts at a time; by default all.
        on_step: A function that is called after every step that unmasked something.
        settings: Settings by their names in :class:`Sampling`, instead of those in ``sampling``. With
            ``compat="llada"`` the seed is not used: call ``torch.manual_seed``.

    Raises:
        UserError: A setting or a prompt is not possible, see there.
        TypeError: There is no setting of a name; the message says the nearest.
    """
    if not isinstance(lm, LanguageModel):
        raise UserError(f"lm: {str(lm)[:60]!r} given for the model; give what load_model returns of it")
    known = [field.name for field in fields(Sampling)]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise TypeError(f"generate: '{name}' is no setting" + (f"; the nearest is '{near[0]}'" if near else ""))
    sampling = replace(sampling or Sampling(), **settings)
    rows = prompt_ids(lm, prompts, attention_mask, sampling.infill)
    if first < 0:
        raise UserError(f"first: {first} given; prompts are numbered from 0")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise UserError(f"batch_size: {batch_size} given; it must be a whole number of at least 1")
    length = sampling.length
    if sampling.infill:
        if length is not None:
            raise UserError(f"length: {length} given; the gaps of a text say how many tokens are filled; leave it out")
        length = max(row.count(-1 if lm.mask_token_id is None else lm.mask_token_id) for row in rows)
    elif length is None:
        room = lm.context_length - max(map(len, rows))
        length = default_length(room, sampling.block_length or lm.block_length)
    run = replace(sampling, length=length).resolved(lm)
    check_context(lm, rows, 0 if run.infill else length)
    began, size = time.perf_counter(), batch_size or len(rows)
    parts = [_batch(lm, rows[start:end], run, first, start, on_step) for start, end in _batches(lm, rows, size)]
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    seconds = time.perf_counter() - began
    answers = [answer for _, canvas in parts for answer in _answers(lm, canvas, run)]
    tokens, step_of_token, confidence, finish = (list(column) for column in zip(*answers, strict=True))
    return Generation(
        prompts=rows,
        tokens=tokens,
        text=None if lm.tokenizer is None else [_text_before(lm.decode(ids), run.stop) for ids in tokens],
        step_of_token=step_of_token,
        confidence=confidence,
        finish=finish,
        steps=max(int(canvas.step_BL.max()) for _, canvas in parts),
        forward_passes=sum(passes for passes, _ in parts),
        seconds=seconds,
        cache=str(run.cache),
        settings=vars(run) | {"first": first},
    )


def _batches(lm: LanguageModel, rows: list[list[int]], size: int) -> Iterator[tuple[int, int]]:
    """The first and the last prompt, exclusive, of each batch.

    The blocks of a model that predicts in blocks must lie at the same columns in all rows of a batch.
    """
    start = 0
    for end in range(1, len(rows) + 1):
        whole = end == len(rows) or end - start == size
        if whole or (lm.block_length is not None and (len(rows[end]) - len(rows[start])) % lm.block_length):
            yield start, end
            start = end


def _batch(
    lm: LanguageModel, rows: list[list[int]], settings: Sampling, first: int, start: int, on_step: Observer | None
) -> tuple[int, Canvas]:
    """Sample one batch; returns its forward passes and its canvas."""
    started = int(lm.start_token_id is not None)
    if lm.start_token_id is not None:  # an `arm` of ours, and what began as one, has learnt to begin with EOS
        rows = [[lm.start_token_id, *row] for row in rows]
    length = None if settings.infill else settings.length
    canvas = Canvas.of(rows, length, lm.mask_token_id or 0, lm.device, started)
    noise: SamplerNoise = NoiseByPrompt(settings.seed, first + start, len(rows), lm.device)
    if settings.compat is not None:
        noise = ReleasedNoise(len(rows), canvas.length, lm.device)

    def show(step: int) -> None:
        if on_step is not None:
            on_step(canvas.snapshot(step, settings.most_steps, start))

    if lm.facts.replaces:
        return refine(lm, canvas, settings, noise, show), canvas
    if only_left_to_right(lm):
        return write(lm, canvas, settings, noise, show), canvas
    kind = Denoiser if settings.compat is None else ReleasedDenoiser
    return kind(lm, canvas, settings, noise).denoise(show), canvas


def _answers(
    lm: LanguageModel, canvas: Canvas, settings: Sampling
) -> list[tuple[list[int], list[int], list[float], Finish]]:
    """Tokens, steps, confidences and what ended it, of each answer."""
    answers = []
    columns = (canvas.tokens_BL, canvas.step_BL, canvas.confidence_BL)
    for start, *lists in zip(canvas.starts, *(x.tolist() for x in columns), strict=True):
        tokens, steps, confidence = (values[start:] for values in lists)
        count, finish = len(tokens), cast(Finish, "length")
        if not settings.infill and settings.compat is None:
            count, finish = _cut(lm, tokens, settings.stop)
        answers.append((tokens[:count], steps[:count], confidence[:count], finish))
    return answers


def _cut(lm: LanguageModel, tokens: list[int], stop: Sequence[str]) -> tuple[int, Finish]:
    """How many tokens of an answer count, and what ended it: its first end token or stop string, both included."""
    end = next((i for i, token in enumerate(tokens, 1) if token in lm.end_token_ids), None)
    answer = tokens[:end]
    if any(text in lm.decode(answer) for text in stop):
        return next(i for i in range(len(answer) + 1) if any(text in lm.decode(answer[:i]) for text in stop)), "stop"
    return len(answer), "length" if end is None else "eos"


def _text_before(text: str, stop: Sequence[str]) -> str:
    """A text without its first stop string and what follows."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


# --- token by token ---------------------------------------------------------------------------------------------------


def write(
    lm: LanguageModel, canvas: Canvas, settings: Sampling, noise: SamplerNoise, on_step: Callable[[int], None]
) -> int:
    """Fill the answers of a canvas token by token, as `arm` does; returns the number of forward passes."""
    rows_R = torch.arange(len(canvas.tokens_BL), device=lm.device)
    mask_BL, positions_BL = canvas.attention_mask, canvas.positions
    cache = KeyValueCache(canvas.length) if settings.cache == "kv" else None
    passes = 0

    def logits_of(hidden_GRD: Tensor) -> Tensor:
        logits_RV: Tensor = lm.model.head(hidden_GRD[0]).float()
        if lm.mask_token_id is not None:
            logits_RV[:, lm.mask_token_id] = -torch.inf
        return logits_RV

    for column in range(canvas.answer, canvas.length):
        first = cache.position if cache is not None else 0
        hidden_RTD = lm.model.hidden(
            canvas.tokens_BL[rows_R, first:column],
            causal=True,
            attention_mask_BL=None if mask_BL is None else mask_BL[rows_R, :column],
            positions_BL=None if positions_BL is None else positions_BL[rows_R, first:column],
            cache=cache,
        )
        passes += 1
        if cache is not None:
            cache.advance(column - first)
        place, step = (rows_R, torch.full_like(rows_R, column)), column - canvas.answer + 1
        tokens_R, probability_R, _ = predict_tokens(hidden_RTD[:, -1][None], logits_of, lm, place, settings, noise)
        canvas.commit(*place, tokens_R, probability_R, torch.full_like(rows_R, step))
        on_step(step)

        done_B = canvas.ended(lm.end_token_ids)
        if settings.stop:
            done_B |= canvas.holds_stop(lm, settings.stop)
        goes_on_R = ~done_B[rows_R]
        if not bool(goes_on_R.any()):
            break
        if not bool(goes_on_R.all()):
            if cache is not None:
                cache.keep_rows(goes_on_R.nonzero()[:, 0])
            rows_R = rows_R[goes_on_R]
    return passes


# --- the reverse process ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockRows:
    """The rows of the batch that a block still works on: (R,) int64 each.

    Args:
        rows_R: Their rows of the canvas.
        masked_R: The tokens of the block that were masked when it began.
        steps_R: The steps of the block.
    """

    rows_R: Tensor
    masked_R: Tensor
    steps_R: Tensor


class Denoiser:
    """Fills the masked tokens of a canvas, one block at a time; ``rows`` is None when a block is done."""

    takes_every_step = False
    """Whether also a step that unmasks nothing asks the model."""

    def __init__(self, lm: LanguageModel, canvas: Canvas, settings: Sampling, noise: SamplerNoise) -> None:
        self.lm, self.canvas, self.settings, self.noise = lm, canvas, settings, noise
        self.predictor = BlockPredictor(lm, canvas, settings)
        self.rule = reveal.RULES[settings.remasking]
        self.done_B = torch.zeros(len(canvas.tokens_BL), dtype=torch.bool, device=lm.device)
        self.steps_B = torch.zeros(len(canvas.tokens_BL), dtype=torch.int64, device=lm.device)
        self.rows: BlockRows | None = None

    def denoise(self, on_step: Callable[[int], None]) -> int:
        """Denoise block by block; returns the number of the model's forward passes.

        A row whose answer has ended leaves the batch: what is still masked behind its EOS would be discarded.
        ``on_step`` is called with the number of each step that revealed something.
        """
        settings, steps_before = self.settings, 0
        for number, (begin, end) in enumerate(self._blocks()):
            self._open_block(begin, end, number)
            steps_done = 0
            while self.rows is not None:
                steps_done += 1
                if self._step(self.rows, steps_done):
                    on_step(steps_before + steps_done)
            steps_before += settings.steps_per_block or steps_done
        return self.predictor.passes

    def _blocks(self) -> list[tuple[int, int]]:
        """The columns of each block, first and behind the last."""
        canvas, settings = self.canvas, self.settings
        # Texts with gaps are one block: of all columns, of which what is not masked stays.
        size = canvas.length if settings.infill or settings.block_length is None else settings.block_length
        begin = first = canvas.answer or int(self.lm.shift_targets)  # with them the first column is given
        if self.lm.block_length is not None:  # the blocks of the text, of which the prompt has a part of one
            first -= (first - int(canvas.padding_B[0])) % size
        edges = [begin, *range(first + size, canvas.length, size), canvas.length]
        return list(pairwise(edges))

    def _open_block(self, begin: int, end: int, number: int) -> None:
        """Turn to the columns ``begin`` to ``end``, the block of this number."""
        masked_B = self.canvas.masked_BL[:, begin:end].sum(dim=1)
        rows_R = (~self.done_B & (masked_B > 0)).nonzero()[:, 0]
        masked_R, steps = masked_B[rows_R], self.settings.steps_per_block
        if steps is not None:
            self.steps_B.fill_(number * steps)
        if not len(rows_R):
            self.rows = None
            return
        # One token a step where nothing else is said: of texts with gaps each has its own number of them.
        self.rows = BlockRows(rows_R, masked_R, masked_R if steps is None else torch.full_like(masked_R, steps))
        self.begin, self.end = self.first_column(begin), end
        self.predictor.open_block(self.begin, end, end if self.settings.grows else self.canvas.length)

    def _step(self, rows: BlockRows, step: int) -> bool:
        """One step from t to s, the number ``step`` of its block; False where it unmasks nothing and so needs no
        prediction."""
        self.steps_B[rows.rows_R] += 1
        candidates_RK = self.canvas.masked_BL[rows.rows_R, self.begin : self.end]
        counts_R = self.counts(rows, step)
        chosen_RK, wanted_RK = self.before_predicting(rows, candidates_RK, counts_R, step)
        if not self.takes_every_step and not bool(wanted_RK.any()):
            return False
        place_M, column_M = wanted_RK.nonzero(as_tuple=True)
        row_M, column_M = rows.rows_R[place_M], column_M + self.begin
        hidden_GMD = self.predictor(rows.rows_R, wanted_RK)
        tokens_M, probability_M, confidence_M = predict_tokens(
            hidden_GMD, self.predictor.logits, self.lm, (row_M, column_M), self.settings, self.noise
        )
        if chosen_RK is None:
            chosen_RK = self.surest(rows, wanted_RK, confidence_M, counts_R)
        kept_M = chosen_RK[wanted_RK]
        row_M, column_M = row_M[kept_M], column_M[kept_M]
        self.canvas.commit(row_M, column_M, tokens_M[kept_M], probability_M[kept_M], self.steps_B[row_M])
        self.after(rows, step)
        return True

    def first_column(self, begin: int) -> int:
        """Where the columns to predict begin."""
        return begin

    def counts(self, rows: BlockRows, step: int) -> Tensor:
        """(R,) tokens that the schedule unmasks in a step."""
        return reveal.counts_to_keep(rows.masked_R, step, rows.steps_R)

    def before_predicting(
        self, rows: BlockRows, candidates_RK: Tensor, counts_R: Tensor, step: int
    ) -> tuple[Tensor | None, Tensor]:
        """What this step unmasks, where that does not depend on the predictions; and what has to be predicted."""
        if self.settings.threshold is not None:
            return None, candidates_RK
        if self.rule.choice is None:
            return None, candidates_RK & (counts_R > 0)[:, None]

        def uniform() -> Tensor:
            return self.noise.uniform(rows.rows_R, candidates_RK, self.begin)

        chosen_RK = self.rule.choice(reveal.State(candidates_RK, counts_R, step, rows.steps_R, uniform))
        return chosen_RK, chosen_RK

    def surest(self, rows: BlockRows, candidates_RK: Tensor, confidence_M: Tensor, counts_R: Tensor) -> Tensor:
        """(R, K) bool: the predictions that stay, by their confidence."""
        confidence_RK = self.spread(candidates_RK, confidence_M)
        if self.settings.threshold is not None:
            return reveal.above_threshold(confidence_RK, candidates_RK, self.settings.threshold)
        return reveal.most_confident(reveal.without_rounding(confidence_RK), candidates_RK, counts_R)

    def spread(self, candidates_RK: Tensor, confidence_M: Tensor) -> Tensor:
        """(R, K) float32 of M confidences; -inf where nothing was predicted."""
        confidence_RK = torch.full(candidates_RK.shape, -torch.inf, device=confidence_M.device)
        confidence_RK[candidates_RK] = confidence_M
        return confidence_RK

    def after(self, rows: BlockRows, step: int) -> None:
        """Rows whose block is done, or whose answer has ended, leave."""
        masked_BK = self.canvas.masked_BL[:, self.begin : self.end]
        if not self.settings.infill:
            self.done_B |= self.canvas.ended(self.lm.end_token_ids)
            if self.settings.stop and not bool(masked_BK[~self.done_B].any()):
                self.done_B |= self.canvas.holds_stop(self.lm, self.settings.stop)
        goes_on_R = ~self.done_B[rows.rows_R] & masked_BK[rows.rows_R].any(dim=1)
        if bool(goes_on_R.all()):
            return
        index_R = goes_on_R.nonzero()[:, 0]
        self.predictor.keep_rows(index_R)
        left = BlockRows(rows.rows_R[index_R], rows.masked_R[index_R], rows.steps_R[index_R])
        self.rows = left if len(index_R) else None


class ReleasedDenoiser(Denoiser):
    """As the authors' released sampler, for ``compat="llada"``.

    Reads off the tokens what is masked, so that a drawn [MASK] is predicted again, and takes all steps of a block.

    The number of tokens to unmask is that of the block; candidates are also the [MASK]s that earlier blocks have left.
    """

    takes_every_step = True

    def first_column(self, begin: int) -> int:
        return int(self.canvas.masked_BL.any(dim=0).nonzero()[0])

    def counts(self, rows: BlockRows, step: int) -> Tensor:
        return reveal.released_counts_to_keep(rows.masked_R, step, rows.steps_R)

    def before_predicting(
        self, rows: BlockRows, candidates_RK: Tensor, counts_R: Tensor, step: int
    ) -> tuple[Tensor | None, Tensor]:
        return None, candidates_RK

    def surest(self, rows: BlockRows, candidates_RK: Tensor, confidence_M: Tensor, counts_R: Tensor) -> Tensor:
        if self.rule.choice is not None:  # chance is a confidence
            confidence_RK = self.noise.uniform(rows.rows_R, candidates_RK, self.begin)
        else:
            confidence_RK = self.spread(candidates_RK, confidence_M)
        return reveal.released_choice(confidence_RK, candidates_RK, counts_R, self.begin, self.canvas.length)

    def after(self, rows: BlockRows, step: int) -> None:
        canvas = self.canvas
        canvas.masked_BL = canvas.tokens_BL.eq(self.predictor.mask_token_id) & ~canvas.given_BL
        canvas.step_BL[canvas.masked_BL], canvas.confidence_BL[canvas.masked_BL] = STILL_MASKED, 0.0
        if step == self.settings.steps_per_block:
            self.rows = None
