"""The tokens of a batch while they are denoised, and the predictions of the Transformer for them.

The logits of a block are computed with guidance and with caches. Tokens are drawn by noise that is each prompt's own,
so that an answer does not depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llada_lightning.generation.reveal import RULES
from llada_lightning.generation.sampling import Sampling, Snapshot
from llada_lightning.model.attention import KeyValueCache
from llada_lightning.objectives.noise import Purpose, random_words

if TYPE_CHECKING:
    from llada_lightning.checkpoints.language_model import LanguageModel

STILL_MASKED = -1

LOWEST = -1e3
"""A confidence below all others, and above that of what must not be chosen."""

LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits that are made and used before the next are: on a CPU what fits its caches, elsewhere the memory."""


@dataclass
class Canvas:
    """A batch of sequences of L columns. Prompts end at the same column: what is missing is padded on the left.

    What is masked is carried here and never read off the tokens.

    Args:
        tokens_BL: (B, L) int64, the tokens.
        masked_BL: (B, L) bool, whether a position is still to be predicted.
        given_BL: (B, L) bool, whether a position is a prompt's, which classifier-free guidance masks.
        padding_B: (B,) int64, the columns of padding before each sequence.
        step_BL: (B, L) int64, the step at which each token appeared; 0 where given, -1 where still masked.
        confidence_BL: (B, L) float32, the probability of each token when it appeared.
        answer: The first column of the answers.
        started: The number of tokens before each text with gaps that are no part of it.
    """

    tokens_BL: Tensor
    masked_BL: Tensor
    given_BL: Tensor
    padding_B: Tensor
    step_BL: Tensor
    confidence_BL: Tensor
    answer: int
    started: int = 0

    @classmethod
    def of(
        cls, rows: list[list[int]], length: int | None, mask_token_id: int, device: torch.device, started: int = 0
    ) -> Canvas:
        """Prompts, and behind each of them ``length`` masked tokens.

        Without a length the rows are texts with gaps: their [MASK]s are masked, and all of each is its answer. The
        first ``started`` tokens of each row are the model's own, which guidance leaves.
        """
        longest, more = max(map(len, rows)), length or 0
        padded = [[mask_token_id] * (longest - len(row)) + row + [mask_token_id] * more for row in rows]
        tokens_BL = torch.tensor(padded, dtype=torch.int64).view(len(rows), longest + more).to(device)
        padding_B = torch.tensor([longest - len(row) for row in rows], device=device)
        columns_L = torch.arange(longest + more, device=device)
        if length is None:
            masked_BL = (tokens_BL == mask_token_id) & (columns_L >= padding_B[:, None])
        else:
            masked_BL = (columns_L >= longest).repeat(len(rows), 1)
        own_BL = (columns_L >= padding_B[:, None]) & (columns_L < padding_B[:, None] + started)
        return cls(
            tokens_BL=tokens_BL,
            masked_BL=masked_BL,
            given_BL=~masked_BL & ~own_BL,
            padding_B=padding_B,
            step_BL=masked_BL * STILL_MASKED,
            confidence_BL=torch.ones_like(tokens_BL, dtype=torch.float32),
            answer=0 if length is None else longest,
            started=started,
        )

    @property
    def length(self) -> int:
        return self.tokens_BL.shape[1]

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, L) bool, False at the padding; None where there is none."""
        if not bool(self.padding_B.any()):
            return None
        return torch.arange(self.length, device=self.tokens_BL.device) >= self.padding_B[:, None]

    @property
    def starts(self) -> list[int]:
        """The first column of each answer."""
        return [max(self.answer, padding + self.started) for padding in self.padding_B.tolist()]

    @property
    def positions(self) -> Tensor | None:
        """(B, L) int64, positions in the unpadded sequence; None where they are the columns."""
        if not bool(self.padding_B.any()):
            return None
        columns_L = torch.arange(self.length, device=self.tokens_BL.device)
        return (columns_L - self.padding_B[:, None]).clamp(min=0)

    def commit(self, rows_M: Tensor, columns_M: Tensor, tokens_M: Tensor, confidence_M: Tensor, step_M: Tensor) -> None:
        """Unmask M tokens."""
        place = rows_M, columns_M
        self.tokens_BL[place] = tokens_M
        self.confidence_BL[place] = confidence_M
        self.step_BL[place] = step_M
        self.masked_BL[place] = False

    def ended(self, end_token_ids: tuple[int, ...]) -> Tensor:
        """(B,) bool: whether an answer holds a token that ends it, and nothing before that is still masked."""
        ends = torch.tensor(end_token_ids, device=self.tokens_BL.device)
        masked_BA = self.masked_BL[:, self.answer :]
        ends_BA = torch.isin(self.tokens_BL[:, self.answer :], ends) & ~masked_BA
        return (ends_BA & (masked_BA.cumsum(1) == 0)).any(1)

    def holds_stop(self, lm: LanguageModel, stop: Sequence[str]) -> Tensor:
        """(B,) bool: the text of an answer, up to what is still masked, holds a stop string."""
        whole_BA = self.masked_BL[:, self.answer :].cumsum(dim=1) == 0
        answers = [
            lm.decode(row[whole].tolist())
            for row, whole in zip(self.tokens_BL[:, self.answer :], whole_BA, strict=True)
        ]
        return torch.tensor([any(text in answer for text in stop) for answer in answers], device=lm.device)

    def snapshot(self, step: int, steps: int, first: int) -> Snapshot:
        """The answers as they stand."""
        return Snapshot(
            tokens=[row[start:] for row, start in zip(self.tokens_BL.tolist(), self.starts, strict=True)],
            step_of_token=[row[start:] for row, start in zip(self.step_BL.tolist(), self.starts, strict=True)],
            step=step,
            steps=steps,
            first=first,
        )


# --- noise ------------------------------------------------------------------------------------------------------------


class NoiseByPrompt:
    """A generator for each prompt of a batch, keyed by the seed of the call and the number of the prompt.

    ``first`` is the number of the batch's first prompt. Other kinds of device draw other noise.
    """

    def __init__(self, seed: int, first: int, batch: int, device: torch.device) -> None:
        keys = [int(random_words(seed, Purpose.GENERATION, first + row, 1)[0] >> 1) for row in range(batch)]
        self._generators = [torch.Generator(device).manual_seed(key) for key in keys]
        self._device = device

    def gumbel(self, rows_M: Tensor, columns_M: Tensor, vocab_size: int) -> Tensor:
        """(M, V) float64, standard Gumbel, for M positions; rows in ascending order."""
        # Below float64 the tails of the noise are cut, which lowers the temperature (Zheng et al. 2024).
        noise_MV = torch.empty(len(rows_M), vocab_size, dtype=torch.float64, device=self._device)
        for place, row in enumerate(rows_M.tolist()):  # one by one: however many are asked for at a time
            noise_MV[place].exponential_(generator=self._generators[row])
        return -noise_MV.log()

    def uniform(self, rows_R: Tensor, candidates_RK: Tensor, begin: int) -> Tensor:
        """(R, K) float64, uniform on [0, 1) where ``candidates_RK`` is, for the columns from ``begin`` on of R rows."""
        noise_RK = torch.zeros(candidates_RK.shape, dtype=torch.float64, device=self._device)
        for row_K, wanted_K, row in zip(noise_RK, candidates_RK, rows_R.tolist(), strict=True):
            row_K[wanted_K] = row_K[wanted_K].uniform_(generator=self._generators[row])
        return noise_RK


class ReleasedNoise:
    """The draws of the authors' released code: of the whole canvas, from torch's own generator, in its order."""

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        self._batch, self._length, self._device = batch, length, device

    def gumbel(self, rows_M: Tensor, columns_M: Tensor, vocab_size: int) -> Tensor:
        shape = self._batch, self._length, vocab_size
        uniform_BLV = torch.rand(shape, dtype=torch.float64, device=self._device)
        return -torch.log(-torch.log(uniform_BLV[rows_M, columns_M]))

    def uniform(self, rows_R: Tensor, candidates_RK: Tensor, begin: int) -> Tensor:
        end = begin + candidates_RK.shape[1]
        return torch.rand(self._batch, self._length, device=self._device)[rows_R, begin:end]


SamplerNoise = NoiseByPrompt | ReleasedNoise


# --- predictions ------------------------------------------------------------------------------------------------------


class BlockPredictor:
    """Predicts masked tokens of the columns of one block at a time.

    With a cache, the first pass over a block computes the whole canvas. Later ones take from that pass the keys and
    values of the columns before the block (`prefix`), or also of those behind it (`dual`), although they would have
    changed with the block: an approximation (Wu et al. 2025). A model that predicts in blocks sees nothing behind a
    block, so that what is before it stays: `kv` is exact.
    """

    def __init__(self, lm: LanguageModel, canvas: Canvas, settings: Sampling) -> None:
        assert lm.mask_token_id is not None
        self._lm, self._canvas, self._settings = lm, canvas, settings
        self.mask_token_id = lm.mask_token_id
        self._positions_BL, self._attention_mask_BL = canvas.positions, canvas.attention_mask
        self._shift = int(lm.shift_targets)  # a token is predicted from so many columns before it
        self.passes = 0

    def open_block(self, begin: int, end: int, visible: int) -> None:
        """Turn to the columns ``begin`` to ``end`` of a canvas of which the first ``visible`` columns exist."""
        self._begin, self._end, self._visible = begin, end, visible
        # Where keys and values change with the block, of which the prompt may have a part (of a model of blocks).
        self._changes = begin - self._shift
        if self._lm.block_length is not None:
            self._changes -= (begin - int(self._canvas.padding_B[0])) % self._lm.block_length
        self._cache = KeyValueCache(visible) if self._settings.cache != "none" else None
        self._fresh = True

    def keep_rows(self, index_R: Tensor) -> None:
        """Go on with some of the rows of the last pass, by their place in it."""
        if self._cache is not None and not self._fresh:
            if self._settings.cfg_scale > 0:
                index_R = torch.cat([index_R, index_R + self._rows])
            self._cache.keep_rows(index_R)

    def __call__(self, rows_R: Tensor, wanted_RK: Tensor) -> Tensor:
        """What the wanted columns of the block (R, K) are predicted from, for rows (R,) of the canvas.

        Returns:
            (G, M, D) in the order of ``wanted_RK.nonzero()``, for :meth:`logits`; G is 2 with guidance, else 1.
        """
        first, last = 0, self._visible
        if self._cache is not None:
            if not self._fresh:  # the rest is held
                first, last = self._changes, self._end if self._settings.cache == "dual" else self._visible
            self._cache.position = first
        tokens_RT = self._canvas.tokens_BL[rows_R, first:last]
        self._rows = len(rows_R)
        if self._settings.cfg_scale > 0:
            without_RT = tokens_RT.masked_fill(self._canvas.given_BL[rows_R, first:last], self.mask_token_id)
            tokens_RT = torch.cat([tokens_RT, without_RT])
            rows_R = torch.cat([rows_R, rows_R])
        mask_BL, positions_BL = self._attention_mask_BL, self._positions_BL
        hidden_RKD = self._lm.model.hidden(
            tokens_RT,
            causal=False,
            attention_mask_BL=None if mask_BL is None else mask_BL[rows_R, : self._visible],
            positions_BL=None if positions_BL is None else positions_BL[rows_R, first:last],
            pattern=self._lm.pattern(None if positions_BL is None else positions_BL[rows_R]),
            cache=self._cache,
            queries=slice(self._begin - self._shift - first, self._end - self._shift - first),
        )
        if self._cache is not None and self._fresh:
            self._cache.advance(last)
        self._fresh = False
        self.passes += 1
        return hidden_RKD.unflatten(0, (-1, self._rows))[:, wanted_RK]

    def logits(self, hidden_GMD: Tensor) -> Tensor:
        """(M, V) float32; [MASK]'s is -inf. As the released code takes them: in the model's type, [MASK]'s included."""
        logits_GMV: Tensor = self._lm.model.head(hidden_GMD)
        if self._settings.compat is None:
            logits_GMV = logits_GMV.float()
        logits_MV = logits_GMV[0]
        if self._settings.cfg_scale > 0:
            logits_MV = guide(logits_MV, logits_GMV[1], self._settings.cfg_scale)
        if self._settings.compat is None:
            logits_MV[:, self.mask_token_id] = -torch.inf
        return logits_MV


def predict_tokens(
    hidden_GMD: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    lm: LanguageModel,
    place: tuple[Tensor, Tensor],
    settings: Sampling,
    noise: SamplerNoise,
) -> tuple[Tensor, Tensor, Tensor]:
    """Predict M tokens, some at a time: all their logits would be the largest tensor of all.

    Args:
        hidden_GMD: The hidden states that ``logits_of`` takes, (G, m, D) to (m, V).
        place: The rows and the columns of the canvas, (M,) int64 each.

    Returns:
        (M,) each: the drawn tokens, int64; the probability that the model gives each of them, float32; the confidence
        by which predictions are kept or masked again, float32.
    """
    count, vocab_size = hidden_GMD.shape[1], lm.model.vocab_size
    at_once = max(1, LOGITS_AT_ONCE.get(hidden_GMD.device.type, 1 << 26) // vocab_size)
    if settings.compat is not None:
        at_once = max(1, count)  # its noise is drawn once a step, also where nothing is left to predict
    parts = []
    for begin in range(0, max(1, count), at_once):
        these = slice(begin, begin + at_once)
        logits_MV, gumbel_MV = logits_of(hidden_GMD[:, these]), None
        if settings.temperature > 0:
            gumbel_MV = noise.gumbel(place[0][these], place[1][these], vocab_size)
        parts.append(_predict(logits_MV, gumbel_MV, settings, lm.end_token_ids))
    tokens_M, probability_M, confidence_M = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens_M, probability_M, confidence_M


def _predict(
    logits_MV: Tensor, gumbel_MV: Tensor | None, settings: Sampling, end_token_ids: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their probabilities and confidences, each (M,)."""
    allowed_MV = logits_MV
    if gumbel_MV is not None:
        allowed_MV = likeliest(logits_MV, settings.temperature, settings.top_k, settings.top_p)
    tokens_M = draw_tokens(allowed_MV, settings.temperature, gumbel_MV)
    probability_M = probability(logits_MV, tokens_M)
    rule = RULES[settings.remasking]
    confidence_M = probability_M if rule.confidence is None else rule.confidence(logits_MV, probability_M)
    if settings.zero_eos_confidence and settings.compat is None:
        ends_E = torch.tensor(end_token_ids, device=tokens_M.device)
        confidence_M = confidence_M.masked_fill(torch.isin(tokens_M, ends_E), LOWEST)
    elif settings.zero_eos_confidence:
        # Released: once the tokens are drawn, the end of a turn loses its logit, and EOS at temperature 0 alone.
        eos, *others = end_token_ids
        logits_MV[:, [eos, *others] if settings.temperature == 0 else others] = -torch.inf
        confidence_M = probability(logits_MV, tokens_M)
    return tokens_M, probability_M.float(), confidence_M.float()


def guide(logits_MV: Tensor, unconditional_MV: Tensor, scale: float) -> Tensor:
    """Unsupervised classifier-free guidance (Eq. 16): p(r | prompt)^(1 + w) / p(r | masks)^w, unnormalised."""
    return unconditional_MV + (1 + scale) * (logits_MV - unconditional_MV)


def draw_tokens(logits_MV: Tensor, temperature: float, gumbel_MV: Tensor | None) -> Tensor:
    """(M,) int64: the likeliest of (M, V) logits, or one drawn by the Gumbel-max trick with (M, V) noise in float64."""
    if gumbel_MV is None:
        return logits_MV.argmax(dim=-1)
    return (logits_MV.double() + temperature * gumbel_MV).argmax(dim=-1)


def likeliest(logits_MV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The logits with -inf for all but the ``top_k`` likeliest, and the fewest that hold ``top_p`` of what is left.

    ``top_p`` counts the probabilities at the temperature, from which is drawn.
    """
    if top_k is not None and top_k < logits_MV.shape[-1]:
        values_MK, order_MK = logits_MV.topk(top_k, dim=-1)  # of equals only as many as asked for
        logits_MV = torch.full_like(logits_MV, -torch.inf).scatter(1, order_MK, values_MK)
    if top_p is not None and top_p < 1 and temperature > 0:
        sorted_MV, order_MV = logits_MV.sort(dim=-1, descending=True)
        p_MV = (sorted_MV.double() / temperature).softmax(dim=-1)
        superfluous_MV = p_MV.cumsum(dim=-1) - p_MV >= top_p  # those before hold the share already
        superfluous_MV = torch.zeros_like(superfluous_MV).scatter(1, order_MV, superfluous_MV)
        logits_MV = logits_MV.masked_fill(superfluous_MV, -torch.inf)
    return logits_MV


def probability(logits_MV: Tensor, tokens_M: Tensor) -> Tensor:
    """(M,) float32: the model's probability of each token."""
    return logits_MV.softmax(dim=-1).gather(1, tokens_M[:, None])[:, 0]
