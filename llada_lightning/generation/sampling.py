"""`generate`: answers to prompts by any sampler, from any model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation.autoregressive import write
from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.diffusion import Denoiser, denoise
from llada_lightning.generation.finish import cut, text_before
from llada_lightning.generation.noise import Noise, NoiseByPrompt, ReleasedNoise
from llada_lightning.generation.prompts import Prompts, as_batches, check_context, prompt_ids
from llada_lightning.generation.released import ReleasedDenoiser
from llada_lightning.generation.result import Finish, Generation, Observer
from llada_lightning.generation.settings import Cache, Remasking, Settings, Strategy, default_length, resolve_settings
from llada_lightning.support.errors import UserError


@torch.inference_mode()
def generate(
    lm: LanguageModel,
    prompts: Prompts,
    *,
    length: int | None = None,
    steps: int | None = None,
    block_length: int | None = None,
    strategy: Strategy | None = None,
    remasking: Remasking = "low_confidence",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cfg_scale: float = 0.0,
    threshold: float | None = None,
    zero_eos_confidence: bool = False,
    stop: str | Sequence[str] | None = (),
    infill: bool = False,
    cache: Cache | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    first: int = 0,
    batch_size: int | None = None,
    compat: Literal["llada"] | None = None,
    on_step: Observer | None = None,
) -> Generation:
    """Sample an answer to each prompt.

    An answer depends on its prompt, the settings, the seed and the prompt's number (its place in the list), and on
    nothing else of the batch, but for rounding: a tie within it, next to unknown in float32, may fall another way in
    bfloat16. Tokens behind EOS are discarded.

    Args:
        lm: as ``load_model`` gives it.
        prompts: a text, texts, lists of ids, or a tensor (B, P); an empty one writes from nothing.
        length: tokens of the answer; by default 128, or what the context leaves of that beside the longest prompt. With
            ``infill`` the prompts say it.
        steps: of the whole generation, evenly spread over its blocks; by default one for each token.
        block_length: divides ``length``; by default all of it.
        strategy: see :class:`~llada_lightning.generation.settings.Settings`, also for what follows; by default
            `diffusion` for `llada`, `autoregressive` for `arm`.
        attention_mask: (B, P), where a tensor of prompts is padded, on either side.
        seed: of the noise.
        first: number of the first prompt, from 0: prompt i of a batch gets its answer alone with ``first=i``.
        batch_size: prompts at a time; by default all.
        compat: `llada` repeats the authors' released sampler token for token, [MASK]'s logit and torch's generator
            included (``seed`` is not used: call ``torch.manual_seed``; an answer depends on its batch), and discards
            nothing.
        on_step: called after every step that unmasked something.

    Raises:
        UserError: a setting or a prompt that cannot be, see there.
    """
    if not isinstance(lm, LanguageModel):
        raise UserError(f"lm: {str(lm)[:60]!r} given for the model; give what load_model returns of it")
    rows = prompt_ids(lm, prompts, attention_mask, infill)
    if first < 0:
        raise UserError(f"first: {first} given; prompts are numbered from 0")
    if infill:
        if length is not None:
            raise UserError(f"length: {length} given; the gaps of a text say how many tokens are filled; leave it out")
        length = max(row.count(-1 if lm.mask_token_id is None else lm.mask_token_id) for row in rows)
    elif length is None:
        length = default_length(lm.context_length - max(map(len, rows)), block_length)
    settings = resolve_settings(
        lm,
        length=length,
        steps=steps,
        block_length=block_length,
        strategy=strategy,
        remasking=remasking,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        cfg_scale=cfg_scale,
        threshold=threshold,
        zero_eos_confidence=zero_eos_confidence,
        stop=stop,
        infill=infill,
        cache=cache,
        compat=compat,
    )
    check_context(lm, rows, 0 if infill else length)
    began = time.perf_counter()
    parts = [_batch(lm, part, settings, seed, first, start, on_step) for start, part in as_batches(rows, batch_size)]
    _synchronise(lm.device)
    seconds = time.perf_counter() - began
    answers = [answer for _, canvas in parts for answer in _answers(lm, canvas, settings)]
    tokens, step_of_token, confidence, finish = (list(column) for column in zip(*answers, strict=True))
    return Generation(
        prompts=rows,
        tokens=tokens,
        text=None if lm.tokenizer is None else [text_before(lm.decode(ids), settings.stop) for ids in tokens],
        step_of_token=step_of_token,
        confidence=confidence,
        finish=finish,
        steps=max(int(canvas.step_BL.max()) for _, canvas in parts),
        forward_passes=sum(passes for passes, _ in parts),
        seconds=seconds,
        cache=settings.cache,
        settings=vars(settings) | {"seed": seed, "first": first},
    )


def _batch(
    lm: LanguageModel,
    rows: list[list[int]],
    settings: Settings,
    seed: int,
    first: int,
    start: int,
    on_step: Observer | None,
) -> tuple[int, Canvas]:
    """Sample one batch; returns its forward passes and its canvas."""
    if settings.infill:
        assert lm.mask_token_id is not None
        canvas = Canvas.with_gaps(rows, lm.mask_token_id, lm.device)
    else:
        canvas = Canvas.of([_begun(lm, row) for row in rows], settings.length, lm.mask_token_id or 0, lm.device)
    noise: Noise = NoiseByPrompt(seed, first + start, len(rows), lm.device)
    if settings.compat is not None:
        noise = ReleasedNoise(len(rows), canvas.length, lm.device)

    def show(step: int) -> None:
        if on_step is not None:
            on_step(canvas.snapshot(step, settings.most_steps, start))

    if lm.causal:
        return write(lm, canvas, settings, noise, show), canvas
    kind = Denoiser if settings.compat is None else ReleasedDenoiser
    return denoise(kind(lm, canvas, settings, noise), show), canvas


def _begun(lm: LanguageModel, row: list[int]) -> list[int]:
    """A prompt as the model sees it: an `arm` of ours has learnt to begin with EOS."""
    return row if lm.start_token_id is None else [lm.start_token_id, *row]


def _answers(
    lm: LanguageModel, canvas: Canvas, settings: Settings
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
