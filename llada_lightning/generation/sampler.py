"""`generate`: answers to prompts, token by token (`arm`), by the reverse process of `llada`: pure, in blocks of a fixed
length, or in blocks that grow (Sec. 2.4, B.4); or from random tokens (`uniform`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation.ancestral import refine
from llada_lightning.generation.canvas import Canvas, LateFlags, Places
from llada_lightning.generation.denoiser import Denoiser, ReleasedDenoiser
from llada_lightning.generation.predictor import NoiseByPrompt, ReleasedNoise, SamplerNoise, predict_tokens
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
from llada_lightning.model.graphs import passes_as_graphs
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
            on_step(canvas.snapshot(step, max(step, settings.most_steps), start))

    with passes_as_graphs(lm.model):
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
    rows = list(range(len(canvas.tokens_BL)))
    rows_R, flags = torch.arange(len(rows), device=lm.device), LateFlags(lm.device)
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
        places, step = Places(rows, rows_R, torch.full_like(rows_R, column)), column - canvas.answer + 1
        tokens_R, probability_R, _ = predict_tokens(hidden_RTD[:, -1][None], logits_of, lm, places, settings, noise)
        kept_R = torch.ones_like(rows_R, dtype=torch.bool)
        canvas.reveal(places, kept_R, tokens_R, probability_R, torch.full_like(rows_R, step))
        on_step(step)

        done_B = canvas.ended(lm.end_token_ids)
        if settings.stop:
            done_B |= canvas.holds_stop(lm, settings.stop)
        done = flags.exchange(done_B)
        index = [place for place, row in enumerate(rows) if not done[row]]
        if not index:
            break
        if len(index) < len(rows):
            rows, index_R = [rows[place] for place in index], torch.tensor(index, device=lm.device)
            rows_R = rows_R[index_R]
            if cache is not None:
                cache.keep_rows(index_R)
    return passes
