"""The reverse process of `llada`: pure, in blocks of a fixed length, or in blocks that grow (Sec. 2.4, B.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.finish import holds_stop
from llada_lightning.generation.noise import Noise
from llada_lightning.generation.predictor import Predictor
from llada_lightning.generation.remasking import (
    above_threshold,
    by_the_reverse_process,
    counts_to_keep,
    most_confident,
    released_counts_to_keep,
)
from llada_lightning.generation.settings import Settings
from llada_lightning.generation.tokens import LOWEST, confidence, draw_tokens, likeliest, probability


@dataclass(frozen=True)
class Block:
    """Tokens that are denoised together.

    Args:
        begin, end: the columns that hold them.
        members_BL: (B, L) bool, which tokens they are.
        steps: 0 where a threshold decides.
    """

    begin: int
    end: int
    members_BL: Tensor
    steps: int


def denoise(lm: LanguageModel, canvas: Canvas, settings: Settings, noise: Noise, on_step: Callable[[int], None]) -> int:
    """Fill the masked tokens of a canvas; returns the number of the model's forward passes.

    A row whose answer has ended leaves the batch: what is still masked behind its EOS would be discarded.

    Args:
        on_step: called with the number of each step that unmasked something.
    """
    predictor = Predictor(lm, canvas, settings)
    done_B = torch.zeros(len(canvas.tokens_BL), dtype=torch.bool, device=lm.device)
    steps_before = 0
    for block in blocks_of(canvas, settings):
        rows_R = (~done_B & (canvas.masked_BL & block.members_BL).any(dim=1)).nonzero()[:, 0]
        if not len(rows_R):
            continue
        predictor.open_block(block.begin, block.end, block.end if settings.grows else canvas.length)
        masked_R = block.members_BL[rows_R].sum(dim=1)
        step = 0
        while len(rows_R):
            step += 1
            if _step(lm, canvas, block, settings, noise, predictor, rows_R, masked_R, step, steps_before + step):
                on_step(steps_before + step)
            if settings.compat is None and not settings.infill:
                done_B |= canvas.ended(lm.end_token_ids)
            goes_on_R = ~done_B[rows_R] & (canvas.masked_BL & block.members_BL)[rows_R].any(dim=1)
            if not bool(goes_on_R.all()):
                predictor.keep_rows(goes_on_R.nonzero()[:, 0])
                rows_R, masked_R = rows_R[goes_on_R], masked_R[goes_on_R]
        steps_before += block.steps or step
        if settings.stop:
            done_B |= holds_stop(lm, canvas, settings.stop)
    return predictor.passes


def blocks_of(canvas: Canvas, settings: Settings) -> Iterator[Block]:
    """The blocks from left to right: columns of the answers, or as many masked tokens of the texts to be filled."""
    size = settings.block_length
    if not settings.infill:
        columns_L = torch.arange(canvas.length, device=canvas.tokens_BL.device)
        for begin in range(canvas.answer, canvas.length, size):
            members_L = (columns_L >= begin) & (columns_L < begin + size)
            yield Block(begin, begin + size, members_L.expand_as(canvas.masked_BL), settings.steps_per_block)
        return
    masked_BL = canvas.masked_BL.clone()
    number_BL = (masked_BL.cumsum(dim=1) - 1) // size
    for number in range(int(number_BL.max()) + 1):
        yield Block(0, canvas.length, masked_BL & (number_BL == number), settings.steps_per_block)


def _step(
    lm: LanguageModel,
    canvas: Canvas,
    block: Block,
    settings: Settings,
    noise: Noise,
    predictor: Predictor,
    rows_R: Tensor,
    masked_R: Tensor,
    step: int,
    number: int,
) -> bool:
    """One step from t to s within a block; False where it unmasks nothing, and so needs no prediction."""
    columns = slice(block.begin, block.end)
    candidates_RK = (canvas.masked_BL & block.members_BL)[rows_R, columns]
    released = settings.compat is not None
    if block.steps:
        count = released_counts_to_keep if released else counts_to_keep
        counts_R = count(masked_R, step, block.steps)
    chosen_RK: Tensor | None = None
    if settings.random and not released:  # what stays does not depend on what is predicted
        uniform_RK = noise.uniform(rows_R, block.begin, block.end)
        if settings.remasking == "random":
            chosen_RK = by_the_reverse_process(uniform_RK, candidates_RK, step, block.steps)
        else:
            chosen_RK = most_confident(uniform_RK, candidates_RK, counts_R)
        wanted_RK = chosen_RK
    else:
        wanted_RK = candidates_RK & (counts_R > 0)[:, None] if block.steps else candidates_RK
    if not bool(wanted_RK.any()):
        return False

    logits_MV = predictor(rows_R, wanted_RK)
    place_M, column_M = wanted_RK.nonzero(as_tuple=True)
    row_M, column_M = rows_R[place_M], column_M + block.begin
    gumbel_MV = noise.gumbel(row_M, column_M, logits_MV.shape[1]) if settings.temperature > 0 else None
    allowed_MV = likeliest(logits_MV, settings.temperature, settings.top_k, settings.top_p)
    tokens_M = draw_tokens(allowed_MV, settings.temperature, gumbel_MV)
    probability_M = probability(logits_MV, tokens_M)

    if chosen_RK is None:
        if settings.random:
            confidence_RK = noise.uniform(rows_R, block.begin, block.end)
        else:
            confidence_M = _confidence(lm, settings, logits_MV, tokens_M, probability_M)
            confidence_RK = torch.full(wanted_RK.shape, -torch.inf, device=lm.device)
            confidence_RK[wanted_RK] = confidence_M
        if settings.threshold is not None:
            chosen_RK = above_threshold(confidence_RK, wanted_RK, settings.threshold)
        else:
            chosen_RK = most_confident(confidence_RK, wanted_RK, counts_R)
    kept_M = chosen_RK[wanted_RK]
    canvas.commit(row_M[kept_M], column_M[kept_M], tokens_M[kept_M], probability_M[kept_M], number)
    return True


def _confidence(
    lm: LanguageModel, settings: Settings, logits_MV: Tensor, tokens_M: Tensor, probability_M: Tensor
) -> Tensor:
    if not settings.zero_eos_confidence:
        return confidence(logits_MV, probability_M, settings.remasking)
    ends = list(lm.end_token_ids)
    if settings.compat is not None:
        # Released: EOS loses its logit once the token is chosen, and at temperature 0 alone.
        if settings.temperature == 0:
            logits_MV[:, ends] = -torch.inf
        return probability(logits_MV, tokens_M)
    confidence_M = confidence(logits_MV, probability_M, settings.remasking)
    return confidence_M.masked_fill(torch.isin(tokens_M, torch.tensor(ends, device=lm.device)), LOWEST)
