"""The predictions of the Transformer for the tokens of a canvas that are still masked.

The logits of a block are computed with guidance and with caches. Tokens are drawn by noise that is each prompt's own,
so that an answer does not depend on the rest of the batch.

How many tokens a step predicts is a number on the host. Where the schedule says it, no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llada_lightning.generation.canvas import Canvas, Places, is_any_of
from llada_lightning.generation.reveal import RULES
from llada_lightning.generation.sampling import Sampling
from llada_lightning.model.attention import KeyValueCache
from llada_lightning.objectives.noise import Purpose, random_words

if TYPE_CHECKING:
    from llada_lightning.checkpoints.language_model import LanguageModel

LOWEST = -1e3
"""A confidence below all others, and above that of what must not be chosen."""

LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits that are made before the next are: on a CPU what keeps the product quick, elsewhere what fits the memory."""

PREDICTED_AT_ONCE = {"cpu": 1 << 18}
"""Logits that are read together: a softmax and an argmax of them stay within a core's cache. Elsewhere all of them."""

ARGMAX_GROUP = 128
"""Logits of which the largest is found first (see :func:`argmax`)."""


# --- noise ------------------------------------------------------------------------------------------------------------


class NoiseByPrompt:
    """A generator for each prompt of a batch, keyed by the seed of the call and the number of the prompt.

    ``first`` is the number of the batch's first prompt. Other kinds of device draw other noise.
    """

    def __init__(self, seed: int, first: int, batch: int, device: torch.device) -> None:
        keys = [int(random_words(seed, Purpose.GENERATION, first + row, 1)[0] >> 1) for row in range(batch)]
        self._generators = [torch.Generator(device).manual_seed(key) for key in keys]
        self._device = device

    def gumbel(self, places: Places, vocab_size: int) -> Tensor:
        """(M, V) float64, standard Gumbel, for M positions; rows in ascending order."""
        # Below float64 the tails of the noise are cut, which lowers the temperature (Zheng et al. 2024).
        noise_MV = torch.empty(len(places.rows), vocab_size, dtype=torch.float64, device=self._device)
        for place, row in enumerate(places.rows):  # one by one: however many are asked for at a time
            noise_MV[place].exponential_(generator=self._generators[row])
        return -noise_MV.log()

    def uniform(self, rows: Sequence[int], candidates_RK: Tensor, counts: Sequence[int], begin: int) -> Tensor:
        """Noise for the columns from ``begin`` on of R rows.

        Args:
            rows: R rows of the canvas.
            candidates_RK: (R, K) bool, where noise is wanted.
            counts: The number of candidates of each row.

        Returns:
            (R, K) float64, uniform on [0, 1) at the candidates, 0 elsewhere.
        """
        drawn = [
            torch.empty(count, dtype=torch.float64, device=self._device).uniform_(generator=self._generators[row])
            for row, count in zip(rows, counts, strict=True)
        ]
        noise_RK = torch.zeros(candidates_RK.shape, dtype=torch.float64, device=self._device)
        return noise_RK.masked_scatter_(candidates_RK, torch.cat(drawn))


class ReleasedNoise:
    """The draws of the authors' released code: of the whole canvas, from torch's own generator, in its order."""

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        self._batch, self._length, self._device = batch, length, device

    def gumbel(self, places: Places, vocab_size: int) -> Tensor:
        shape = self._batch, self._length, vocab_size
        uniform_BLV = torch.rand(shape, dtype=torch.float64, device=self._device)
        return -torch.log(-torch.log(uniform_BLV[places.rows_M, places.columns_M]))

    def uniform(self, rows: Sequence[int], candidates_RK: Tensor, counts: Sequence[int], begin: int) -> Tensor:
        end = begin + candidates_RK.shape[1]
        return torch.rand(self._batch, self._length, device=self._device)[list(rows), begin:end]


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

    def __call__(self, rows_R: Tensor, place_M: Tensor, column_M: Tensor) -> Tensor:
        """What M positions of the block are predicted from.

        Args:
            rows_R: (R,) int64, rows of the canvas.
            place_M, column_M: (M,) int64, the place of each position's row among the R, and its column of the block.

        Returns:
            (G, M, D), for :meth:`logits`; G is 2 with guidance, else 1.
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
        return hidden_RKD.unflatten(0, (-1, self._rows))[:, place_M, column_M]

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
    places: Places,
    settings: Sampling,
    noise: SamplerNoise,
) -> tuple[Tensor, Tensor, Tensor]:
    """Predict M tokens, some at a time: all their logits would be the largest tensor of all.

    Args:
        hidden_GMD: The hidden states that ``logits_of`` takes, (G, m, D) to (m, V).
        places: The positions of the canvas.

    Returns:
        (M,) each: the drawn tokens, int64; the probability that the model gives each of them, float32; the confidence
        by which predictions are kept or masked again, float32.
    """
    count, vocab_size, kind = max(1, hidden_GMD.shape[1]), lm.model.vocab_size, hidden_GMD.device.type
    at_once = max(1, LOGITS_AT_ONCE.get(kind, 1 << 26) // vocab_size)
    few = max(1, PREDICTED_AT_ONCE.get(kind, 1 << 60) // vocab_size)
    if settings.compat is not None and settings.temperature > 0:
        at_once = few = count  # its noise is drawn once a step, also where nothing is left to predict
    parts = []
    for begin in range(0, count, at_once):
        logits_MV = logits_of(hidden_GMD[:, begin : begin + at_once])
        for first in range(0, max(1, len(logits_MV)), few):
            part_MV, gumbel_MV = logits_MV[first : first + few], None
            if settings.temperature > 0:
                gumbel_MV = noise.gumbel(places.part(begin + first, begin + first + len(part_MV)), vocab_size)
            parts.append(_predict(part_MV, gumbel_MV, settings, lm.end_token_ids))
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
        confidence_M = confidence_M.masked_fill(is_any_of(tokens_M, end_token_ids), LOWEST)
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
        return argmax(logits_MV)
    return argmax(logits_MV.double() + temperature * gumbel_MV)


def argmax(logits_MV: Tensor) -> Tensor:
    """(M,) int64: the largest entry of each row, of equals the first.

    On a CPU torch's ``argmax`` takes one number after the other, but ``amax`` several at once. So the group that holds
    the largest entry is found first.
    """
    count, vocab_size = logits_MV.shape
    if logits_MV.device.type != "cpu" or vocab_size % ARGMAX_GROUP:
        return logits_MV.argmax(dim=-1)
    groups_MGE = logits_MV.view(count, vocab_size // ARGMAX_GROUP, ARGMAX_GROUP)
    group_M = groups_MGE.amax(dim=-1).argmax(dim=-1)
    within_M = groups_MGE[torch.arange(count), group_M].argmax(dim=-1)
    return group_M * ARGMAX_GROUP + within_M


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
