"""The samplers of uniform-state diffusion: all tokens of an answer begin as random ones, and each may change at every
step.

With noise levels t of a step and s < t of the next, a = 1 - t, the model's mean p and the noisy token z, a token y of
the next step has the probability (Austin et al. 2021, "D3PM"; Sahoo et al. 2025, "Duo")

    posterior(y) ~ (a_t/a_s [y = z] + (1 - a_t/a_s)/V) (a_s p_y + s/V).

Its second factor is the forward process at level s of the mean. By itself it forgets z, and so corrects tokens that
were drawn wrongly: the predictor-corrector sampler takes it in a share 1 - kappa of the steps (Deschenaux et al. 2026,
"Psi-samplers"). With kappa = 1 all steps are ancestral.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.predictor import LOGITS_AT_ONCE, SamplerNoise, likeliest, probability
from llada_lightning.generation.sampling import Sampling
from llada_lightning.objectives.forward_process import Alphabet

if TYPE_CHECKING:
    from llada_lightning.checkpoints.language_model import LanguageModel


def refine(
    lm: LanguageModel, canvas: Canvas, settings: Sampling, noise: SamplerNoise, on_step: Callable[[int], None]
) -> int:
    """Fill the answers of a canvas, from random tokens in equal steps of the noise level; returns the forward passes.

    The step of a token is the last one at which it changed, or 1; its confidence is the probability that the model gave
    it at the last step.
    """
    assert settings.steps is not None
    begin, steps = canvas.answer, settings.steps
    all_RK = torch.ones_like(canvas.masked_BL[:, begin:])
    rows, counts = list(range(len(all_RK))), [all_RK.shape[1]] * len(all_RK)
    alphabet = Alphabet(lm.model.vocab_size, lm.mask_token_id)
    random_RK = alphabet.ids(noise.uniform(rows, all_RK, counts, begin).cpu().numpy())
    canvas.tokens_BL[:, begin:] = torch.from_numpy(random_RK).to(lm.device)
    canvas.masked_BL[:, begin:], canvas.step_BL[:, begin:] = False, 1
    for step in range(1, steps + 1):
        hidden_RKD = lm.model.hidden(
            canvas.tokens_BL,
            causal=False,
            attention_mask_BL=canvas.attention_mask,
            positions_BL=canvas.positions,
            queries=slice(begin, canvas.length),
        )
        seen_RK = canvas.tokens_BL[:, begin:]
        levels = 1 - (step - 1) / steps, 1 - step / steps
        uniform_RK = noise.uniform(rows, all_RK, counts, begin)
        tokens_M, p_M = _next_tokens(lm, hidden_RKD.flatten(0, 1), seen_RK.flatten(), levels, uniform_RK, settings)
        tokens_RK = tokens_M.view_as(seen_RK)
        canvas.step_BL[:, begin:].masked_fill_(tokens_RK != seen_RK, step)
        canvas.tokens_BL[:, begin:], canvas.confidence_BL[:, begin:] = tokens_RK, p_M.view_as(seen_RK)
        on_step(step)
    return steps


def _next_tokens(
    lm: LanguageModel,
    hidden_MD: Tensor,
    seen_M: Tensor,
    levels: tuple[float, float],
    uniform_RK: Tensor,
    settings: Sampling,
) -> tuple[Tensor, Tensor]:
    """(M,) the tokens of the next step, and the probability that the model gives each; some positions at a time."""
    at_once = max(1, LOGITS_AT_ONCE.get(hidden_MD.device.type, 1 << 26) // lm.model.vocab_size)
    parts = []
    drawn_V = torch.ones(lm.model.vocab_size, dtype=torch.bool, device=hidden_MD.device)
    if lm.mask_token_id is not None:
        drawn_V[lm.mask_token_id] = False
    for begin in range(0, len(seen_M), at_once):
        these = slice(begin, begin + at_once)
        logits_MV = lm.model.head(hidden_MD[these]).float().masked_fill(~drawn_V, -torch.inf)
        next_MV = next_probabilities(_mean(logits_MV, settings), seen_M[these], levels, settings.kappa, drawn_V)
        tokens_M = at_quantiles(next_MV, uniform_RK.flatten()[these])
        parts.append((tokens_M, probability(logits_MV, tokens_M)))
    tokens_M, probability_M = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens_M, probability_M


def _mean(logits_MV: Tensor, settings: Sampling) -> Tensor:
    """(M, V) float64: the model's mean at the temperature; at 0 the likeliest token alone."""
    if settings.temperature == 0:
        return torch.nn.functional.one_hot(logits_MV.argmax(dim=1), logits_MV.shape[1]).double()
    allowed_MV = likeliest(logits_MV, settings.temperature, settings.top_k, settings.top_p)
    return (allowed_MV.double() / settings.temperature).softmax(dim=1)


def next_probabilities(
    p_MV: Tensor, seen_M: Tensor, levels: tuple[float, float], kappa: float, drawn_V: Tensor
) -> Tensor:
    """The distribution of the tokens of the next step.

    Args:
        p_MV: (M, V) float64, the model's mean.
        seen_M: (M,) int64, the noisy tokens.
        levels: The noise level t of these tokens, and that of the next step, s.
        kappa: The share of the posterior; the rest is of the forward process at level s.
        drawn_V: (V,) bool, the entries that noise is drawn from.

    Returns:
        (M, V) float64; each row sums to 1.
    """
    t, s = levels
    kept = (1 - t) / (1 - s)
    forward_MV = (1 - s) * p_MV + s / drawn_V.sum() * drawn_V
    ways_MV = torch.zeros_like(p_MV) + (1 - kept) / drawn_V.sum(dtype=torch.float64)
    ways_MV.scatter_add_(1, seen_M[:, None], torch.full_like(p_MV[:, :1], kept))
    posterior_MV = forward_MV * ways_MV
    return kappa * posterior_MV / posterior_MV.sum(dim=1, keepdim=True) + (1 - kappa) * forward_MV


def at_quantiles(p_MV: Tensor, uniform_M: Tensor) -> Tensor:
    """(M,) int64: the entries at which the sums of probabilities (M, V) pass uniform numbers (M,) in [0, 1)."""
    sums_MV = p_MV.cumsum(dim=1)
    places_M1 = uniform_M[:, None] * sums_MV[:, -1:] * (1 - 2.0**-52)  # below the last sum, however it is rounded
    return torch.searchsorted(sums_MV, places_M1, right=True)[:, 0]
