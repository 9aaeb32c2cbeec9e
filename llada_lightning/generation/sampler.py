"""`generate`: answers to prompts by any sampler, from any model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.diffusion import Denoiser, ReleasedDenoiser, denoise
from llada_lightning.generation.predictor import Noise, NoiseByPrompt, ReleasedNoise, predict_tokens
from llada_lightning.generation.prompts import Prompts, as_batches, check_context, prompt_ids
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
    """
    if not isinstance(lm, LanguageModel):
        raise UserError(f"lm: {str(lm)[:60]!r} given for the model; give what load_model returns of it")
    sampling = replace(sampling or Sampling(), **settings)
    rows = prompt_ids(lm, prompts, attention_mask, sampling.infill)
    if first < 0:
        raise UserError(f"first: {first} given; prompts are numbered from 0")
    length = sampling.length
    if sampling.infill:
        if length is not None:
            raise UserError(f"length: {length} given; the gaps of a text say how many tokens are filled; leave it out")
        length = max(row.count(-1 if lm.mask_token_id is None else lm.mask_token_id) for row in rows)
    elif length is None:
        length = default_length(lm.context_length - max(map(len, rows)), sampling.block_length)
    run = replace(sampling, length=length).resolved(lm)
    check_context(lm, rows, 0 if run.infill else length)
    began = time.perf_counter()
    parts = [_batch(lm, part, run, first, start, on_step) for start, part in as_batches(rows, batch_size)]
    _synchronise(lm.device)
    seconds = time.perf_counter() - began
    answers = [answer for _, canvas in parts for answer in _answers(lm, canvas, run)]
    tokens, step_of_token, confidence, finish = (list(column) for column in zip(*answers, strict=True))
    return Generation(
        prompts=rows,
        tokens=tokens,
        text=None if lm.tokenizer is None else [text_before(lm.decode(ids), run.stop) for ids in tokens],
        step_of_token=step_of_token,
        confidence=confidence,
        finish=finish,
        steps=max(int(canvas.step_BL.max()) for _, canvas in parts),
        forward_passes=sum(passes for passes, _ in parts),
        seconds=seconds,
        cache=str(run.cache),
        settings=vars(run) | {"first": first},
    )


def _batch(
    lm: LanguageModel,
    rows: list[list[int]],
    settings: Sampling,
    first: int,
    start: int,
    on_step: Observer | None,
) -> tuple[int, Canvas]:
    """Sample one batch; returns its forward passes and its canvas."""
    if settings.infill:
        assert lm.mask_token_id is not None
        canvas = Canvas.with_gaps(rows, lm.mask_token_id, lm.device)
    else:
        canvas = Canvas.of([_begun(lm, row) for row in rows], settings.length or 0, lm.mask_token_id or 0, lm.device)
    noise: Noise = NoiseByPrompt(settings.seed, first + start, len(rows), lm.device)
    if settings.compat is not None:
        noise = ReleasedNoise(len(rows), canvas.length, lm.device)

    def show(step: int) -> None:
        if on_step is not None:
            on_step(canvas.snapshot(step, settings.most_steps, start))

    if only_left_to_right(lm):
        return write(lm, canvas, settings, noise, show), canvas
    kind = Denoiser if settings.compat is None else ReleasedDenoiser
    return denoise(kind(lm, canvas, settings, noise), show), canvas


def _begun(lm: LanguageModel, row: list[int]) -> list[int]:
    """A prompt as the model sees it: an `arm` of ours has learnt to begin with EOS."""
    return row if lm.start_token_id is None else [lm.start_token_id, *row]


def _answers(
    lm: LanguageModel, canvas: Canvas, settings: Sampling
) -> list[tuple[list[int], list[int], list[float], Finish]]:
    """Tokens, steps, confidences and what ended it, of each answer."""
    answers: list[tuple[list[int], list[int], list[float], Finish]] = []
    columns = (canvas.tokens_BL, canvas.step_BL, canvas.confidence_BL)
    for padding, *lists in zip(canvas.padding_B.tolist(), *(x.tolist() for x in columns), strict=True):
        start = max(canvas.answer, padding)
        tokens, steps, confidence = (values[start:] for values in lists)
        count, finish = (len(tokens), "length")
        if not settings.infill and settings.compat is None:
            count, finish = cut(lm, tokens, settings.stop)
        answers.append((tokens[:count], steps[:count], confidence[:count], finish))  # type: ignore[arg-type]
    return answers


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cut(lm: LanguageModel, tokens: list[int], stop: Sequence[str]) -> tuple[int, Finish]:
    """How many tokens of an answer count, and what ended it: its first end token or stop string, both included."""
    ends = [i for i, token in enumerate(tokens) if token in lm.end_token_ids]
    count, finish = (ends[0] + 1, "eos") if ends else (len(tokens), "length")
    if any(text in lm.decode(tokens[:count]) for text in stop):
        count = next(i for i in range(count + 1) if any(text in lm.decode(tokens[:i]) for text in stop))
        return count, "stop"
    return count, finish  # type: ignore[return-value]


def text_before(text: str, stop: Sequence[str]) -> str:
    """A text without its first stop string and what follows."""
    found = [place for place in (text.find(string) for string in stop) if place >= 0]
    return text[: min(found)] if found else text


def write(lm: LanguageModel, canvas: Canvas, settings: Sampling, noise: Noise, on_step: Callable[[int], None]) -> int:
    """Fill the answers of a canvas token by token, as `arm` does; returns the number of forward passes.

    A row whose answer has ended leaves the batch. Arguments as those of ``diffusion.denoise``.
    """
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
        place = rows_R, torch.full_like(rows_R, column)
        prediction = predict_tokens(
            hidden_RTD[:, -1][None], logits_of, lm.model.vocab_size, place, settings, noise, lm.end_token_ids
        )
        step = column - canvas.answer + 1
        canvas.commit(*place, prediction.tokens_M, prediction.probability_M, torch.full_like(rows_R, step))
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
