"""Uniform-state diffusion: tokens are replaced by random ones, without a [MASK] (Sahoo et al. 2025, "Duo",
arXiv:2506.10892; von Ruette et al. 2025, "GIDD", arXiv:2503.04482). Its validation loss is an upper bound.

A token x is kept with probability a = 1 - t, else replaced by one of the V entries that can be drawn, itself among
them: q(y | x) = a [y = x] + t / V. The model sees the noisy tokens z, without t, by full attention, and gives a mean p
of each token. With r_y = q(y | x) / q(z | x), and r^_y the same of the mean, q^(y) = a p_y + t / V, the bound is

    E_t E_z 1/(a V) sum over y of [r_y log(r_y / r^_y) - r_y + r^_y],   t uniform on (0, 1),

summed over all positions, also over those whose token was kept: which those are, the model does not know. The optimal
mean is the distribution of the token given the noisy tokens at the *other* positions. V counts the entries of the
vocabulary but [MASK], which is neither a token of a text nor drawn, and which the mean gives no probability.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llada_lightning.model.head import RowLoss
from llada_lightning.objectives import noise
from llada_lightning.objectives.batches import LevelSums, Predictor, TrainingBatch, ValidationBatch
from llada_lightning.objectives.densities import end_without_mass
from llada_lightning.objectives.density_settings import DensitySetting
from llada_lightning.objectives.forward_process import SMALLEST_LEVEL, Alphabet, drawn_levels, replaced_tokens
from llada_lightning.objectives.noise import Purpose
from llada_lightning.support.errors import UserError

SMALLEST_SHARE = 2.0**-25
"""The smallest share a of kept tokens, of levels that float32 rounds to 1. The integrand falls to 0 there."""


def check_density(density: DensitySetting | None) -> None:
    """Refuse a density with which the weight 1/q(t) of the training loss has no limit that a run could average over.

    Raises:
        UserError: Names the setting. See ``densities.end_without_mass``.
    """
    end = None if density is None else end_without_mass(density.density)
    if end is not None:
        raise UserError(
            f"data.density: {density} falls to 0 at t = {end:g} faster than in proportion to the distance, so that the "
            "average of the loss, whose weight is 1/q(t), does not settle; take a density with more mass at that end "
            "(of beta: a and b up to 2)"
        )


# --- the forward process ----------------------------------------------------------------------------------------------


def with_training_noise(batch: TrainingBatch, seed: int, alphabet: Alphabet) -> TrainingBatch:
    """A micro-batch on the host with ``noisy_BL``: what it says is masked is resampled."""
    tokens_BL, masked_BL = batch.tokens_BL.numpy(), batch.masked_BL.numpy()
    noisy_BL = replaced_tokens(seed, Purpose.TOKEN, batch.ordinals_B.numpy(), tokens_BL, masked_BL, alphabet)
    return batch._replace(noisy_BL=torch.from_numpy(noisy_BL))


def with_validation_noise(batch: ValidationBatch, alphabet: Alphabet) -> ValidationBatch:
    """A validation batch on the host with a noise level t of each sequence, and with its noisy tokens.

    The levels are stratified over consecutive ordinals on all of (0, 1) (:func:`drawn_levels`), and the tokens of a
    level t are resampled independently with probability t. So the mean over seeds is the bound, of which nothing is
    left out.
    """
    assert batch.ordinals_B is not None, "the data set of a validation gives its ordinals"
    seed, n_B, tokens_BL = batch.noise_seed, batch.ordinals_B.numpy(), batch.tokens_BL.numpy()
    t_B, q_B = drawn_levels(noise.weyl(seed, Purpose.VALIDATION_TIME, n_B))
    uniform_BL = np.stack([noise.uniform(seed, Purpose.VALIDATION_MASK, int(n), tokens_BL.shape[1]) for n in n_B])
    resampled_BL = uniform_BL < t_B[:, None]
    if batch.response_BL is not None:
        resampled_BL &= batch.response_BL.numpy()
    noisy_BL = replaced_tokens(seed, Purpose.VALIDATION_TOKEN, n_B, tokens_BL, resampled_BL, alphabet)
    return batch._replace(
        masked_BL=torch.from_numpy(resampled_BL),
        p_B=torch.from_numpy(t_B).float(),
        noisy_BL=torch.from_numpy(noisy_BL),
        density_B=torch.from_numpy(q_B).float(),
    )


# --- the loss ---------------------------------------------------------------------------------------------------------


def training_loss(model: Predictor, batch: TrainingBatch, entries: int, levels_of: LevelSums | None = None) -> Tensor:
    """A sample of the bound of a micro-batch, in nats per token of the global batch.

    Args:
        model: The model.
        batch: The micro-batch, with ``noisy_BL``.
        entries: The number of entries that noise is drawn from, V.
        levels_of: What the integrand at the positions of each sequence is handed to, with its noise level.
    """
    scored_BL = _may_be_noisy(batch)
    weights_BL = scored_BL.float()
    if batch.density_B is not None:
        weights_BL = weights_BL / batch.density_B[:, None]
    if batch.response_lengths_B is not None:
        weights_BL = weights_BL / batch.response_lengths_B[:, None]
    total, values_BL = _bound(model, batch, weights_BL, entries)
    if levels_of is not None:
        levels_of.add(batch.p_B, (values_BL * scored_BL).sum(dim=1), scored_BL.sum(dim=1))
    return total / batch.denominator


def sequence_nll(model: Predictor, batch: ValidationBatch, entries: int, levels_of: LevelSums | None = None) -> Tensor:
    """(B,) float64: a sample of the bound of each sequence or response, in nats; arguments as of the training loss."""
    assert batch.density_B is not None and batch.p_B is not None
    scored_BL = _may_be_noisy(batch)
    values_BL = _bound(model, batch, scored_BL.float(), entries)[1].double()
    nats_B = (values_BL * scored_BL).sum(dim=1)
    if levels_of is not None:
        counted_B = batch.counted_B
        levels_of.add(batch.p_B[counted_B], nats_B[counted_B], scored_BL.sum(dim=1)[counted_B])
    return nats_B / batch.density_B


def _may_be_noisy(batch: TrainingBatch | ValidationBatch) -> Tensor:
    """(B, L) bool: the positions that the forward process may replace, which are those that the bound sums over."""
    may_BL = torch.ones_like(batch.masked_BL) if batch.attention_mask_BL is None else batch.attention_mask_BL
    if batch.response_BL is None:
        return may_BL
    return may_BL & (batch.response_BL.cumsum(dim=1) > 0)  # padding EOS behind a response belongs to it in training


def _bound(
    model: Predictor, batch: TrainingBatch | ValidationBatch, weights_BL: Tensor, entries: int
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the integrand over all positions, and (B, L) the integrand at each."""
    assert batch.noisy_BL is not None and batch.p_B is not None
    hidden_BLD = model.hidden_after(
        model.start_ids(batch),
        batch.noisy_BL,
        batch.documents_BL,
        batch.attention_mask_BL,
        causal=False,
        ordinals_B=batch.ordinals_B if isinstance(batch, TrainingBatch) else None,
    )
    t_BL = batch.p_B[:, None].expand_as(batch.tokens_BL)
    total, values_N = model.head_nll(
        hidden_BLD.flatten(0, 1),
        batch.tokens_BL.flatten(),
        weights_BL.flatten(),
        BOUND,
        (batch.noisy_BL.flatten(), *levels(t_BL.flatten(), entries)),
    )
    return total, values_N.view_as(weights_BL)


def levels(t_N: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """What the integrand takes of noise levels.

    Args:
        t_N: (N,) the probability with which each token was resampled, any floating type.
        entries: The number of entries that noise is drawn from, V.

    Returns:
        (N,) float64 t, and (N,) float64 a V / t: how often likelier than another entry a token itself is, less 1.
    """
    t_N = t_N.double().clamp(SMALLEST_LEVEL, 1 - SMALLEST_SHARE)
    return t_N, (1 - t_N) * entries / t_N


def integrand(logits_NV: Tensor, targets_N: Tensor, noisy_N: Tensor, t_N: Tensor, c_N: Tensor) -> Tensor:
    """The integrand of the bound at each position, in nats.

    With c = a V / t, q(y | x) is t/V times 1, and times 1 + c for y = x; q^(y) is t/V times 1 + c p_y. The terms of
    first order in a cancel in the sum over y, which rounded ones would not; so they are taken out by hand. With
    omega = q(z | x) V / t, which is 1, or 1 + c for z = x, and d = log(q(z | x) / q^(z)), what is left is

        [k / c + (e^d - 1 - d) / a] / (t omega),
        k = -(1 + c) log1p(-c/(1 + c) (1 - p_x)) - sum over y but x of log1p(c p_y).

    Args:
        logits_NV: (N, V), any floating type; -inf for an entry that is not drawn.
        targets_N: (N,) int64, the true tokens x.
        noisy_N: (N,) int64, the noisy tokens z.
        t_N, c_N: (N,) float64, of :func:`levels`.

    Returns:
        (N,) float32, or float64 of such logits; differentiable by the logits.
    """
    p_NV = _probabilities(logits_NV)
    p_x_N, p_z_N = _at(p_NV, targets_N), _at(p_NV, noisy_N)
    sum_N = _sum_log1p(p_NV * c_N[:, None].to(p_NV.dtype))
    return _values(sum_N, p_x_N, p_z_N, noisy_N == targets_N, t_N, c_N)[0].to(p_NV.dtype)


def chunk_gradient(
    logits_CV: Tensor,
    targets_C: Tensor,
    weights_C: Tensor,
    z_loss: float,
    noisy_C: Tensor,
    t_C: Tensor,
    c_C: Tensor,
) -> tuple[Tensor, Tensor]:
    """:func:`integrand` (C,), and the gradient of its weighted sum by the logits (C, V), in their type.

    By p_y the integrand has the derivative -1/(t omega (1 + c p_y)), and more at y = x and y = z. With r_y =
    c p_y / (1 + c p_y), the derivative by the logits is -r_y / (c t omega) + X [y = x] + Z [y = z] less p_y times the
    sum of these over y. Little is allocated: on a CPU, memory that is new costs more than the arithmetic.
    """
    p_CV = _probabilities(logits_CV)
    p_x_C, p_z_C = _at(p_CV, targets_C), _at(p_CV, noisy_C)
    odds_CV = p_CV.mul_(c_C[:, None].to(p_CV.dtype))
    values_C, d_C, scale_C = _values(_sum_log1p(odds_CV), p_x_C, p_z_C, noisy_C == targets_C, t_C, c_C)
    r_CV = odds_CV + 1
    torch.div(odds_CV, r_CV, out=r_CV)
    at_x_C = -scale_C * _at(r_CV, targets_C)
    at_z_C = -scale_C * _at(r_CV, noisy_C) * torch.expm1(d_C) / (1 - t_C)
    all_C = at_x_C + at_z_C - scale_C * r_CV.sum(dim=1) / c_C
    if z_loss:
        all_C = all_C - 2 * z_loss * logits_CV.to(r_CV.dtype).logsumexp(dim=1)

    def weighted(x_C: Tensor) -> Tensor:
        return (x_C * weights_C).to(r_CV.dtype)[:, None]

    grad_CV = r_CV.mul_(weighted(-scale_C / c_C)).addcmul_(odds_CV, weighted(-all_C / c_C))
    grad_CV.scatter_add_(1, targets_C[:, None], weighted(at_x_C))
    grad_CV.scatter_add_(1, noisy_C[:, None], weighted(at_z_C))
    return values_C.to(r_CV.dtype), grad_CV.to(logits_CV.dtype)


BOUND = RowLoss(integrand, chunk_gradient, buffers=4)


def _values(
    sum_N: Tensor, p_x_N: Tensor, p_z_N: Tensor, kept_N: Tensor, t_N: Tensor, c_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) float64 each: the integrand, d, and 1 / (t omega); of the sum over all y of log1p(c p_y)."""
    p_x_N, p_z_N = p_x_N.double(), p_z_N.double()
    log_x_N = torch.log1p(-c_N / (1 + c_N) * (1 - p_x_N))  # of q^(x) / q(x | x)
    d_N = -torch.where(kept_N, log_x_N, torch.log1p(c_N * p_z_N))
    scale_N = 1 / (t_N * torch.where(kept_N, 1 + c_N, 1.0))
    k_N = torch.log1p(c_N * p_x_N) - (1 + c_N) * log_x_N - sum_N.double()
    return scale_N * (k_N / c_N + (torch.expm1(d_N) - d_N) / (1 - t_N)), d_N, scale_N


def _probabilities(logits_NV: Tensor) -> Tensor:
    """(N, V) float32, or float64 of such logits."""
    return torch.softmax(logits_NV, dim=1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))


def _at(values_NV: Tensor, ids_N: Tensor) -> Tensor:
    return values_NV.gather(1, ids_N[:, None])[:, 0]


def _sum_log1p(values_NV: Tensor) -> Tensor:
    """(N,) the sum of log(1 + v) over each row, by half as many logarithms: (1 + v)(1 + w) is 1 + (v + w + v w)."""
    half = values_NV.shape[1] // 2
    first_NH, second_NH, odd_N1 = values_NV.split([half, half, values_NV.shape[1] - 2 * half], dim=1)
    pairs_NH = (first_NH + second_NH).addcmul_(first_NH, second_NH)
    logs_NH = torch.log1p(pairs_NH) if pairs_NH.requires_grad else pairs_NH.log1p_()
    return logs_NH.sum(dim=1) + torch.log1p(odd_N1).sum(dim=1)
