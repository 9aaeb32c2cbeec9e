"""Eq. 3, 14 and 15 by exhaustive enumeration, and the estimators against it.

The predictor is arbitrary: a random table that holds, for each partially masked context, a categorical for each
position. For one sequence x_0 all that matters is ``nll_SL``: for each set of masked positions (a bit set S) and each
position i the negative log-likelihood of x_0^i given the rest of x_0.
"""

from __future__ import annotations

from itertools import permutations, product
from math import comb, factorial, log

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import beta, log_softmax

from llada_lightning.compute.flops import MASK_EPS
from llada_lightning.model.head import token_nll
from llada_lightning.objectives.batches import TrainingBatch, scored_positions
from llada_lightning.objectives.densities import Beta, Curriculum, Density, LogitNormal, Range, Uniform
from llada_lightning.objectives.density_settings import density_setting
from llada_lightning.objectives.forward_process import (
    TIME_SAMPLINGS,
    TimeSampling,
    drawn_ratio,
    fixed_count_mask,
    mask_probability,
    mask_ratio,
    random_mask,
    stratified_mask_counts,
)
from llada_lightning.objectives.llada import LossWeight, masked_diffusion_weights, nll_bound, training_loss

WORDS = 3
MASK = WORDS
Array = npt.NDArray[np.float64]

predictors = st.builds(
    lambda length, seed, scale: random_table(length, seed) * scale,
    length=st.integers(2, 4),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)


def random_table(length: int, seed: int) -> Array:
    """Logits: one axis of words and [MASK] for each position of the context, then (position, word)."""
    return np.random.default_rng(seed).normal(size=(WORDS + 1,) * length + (length, WORDS + 1))


def length_of(table: Array) -> int:
    return table.ndim - 2


def mask_sets(length: int) -> npt.NDArray[np.bool_]:
    """(2^L, L): row S holds the bits of S."""
    return (np.arange(2**length)[:, None] >> np.arange(length) & 1).astype(bool)


def nll_by_set(table: Array, x0_L: npt.NDArray[np.int64]) -> Array:
    """(2^L, L) in fp64; [MASK] itself gets no probability."""
    contexts_SL = np.where(mask_sets(len(x0_L)), MASK, x0_L)
    logits_SLV = table[tuple(contexts_SL.T)][..., :WORDS]
    return -log_softmax(logits_SLV, axis=-1)[:, np.arange(len(x0_L)), x0_L]


def masked_sums(nll_SL: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """Of each set: how many are masked, and the sum of their nll."""
    sets_SL = mask_sets(nll_SL.shape[1])
    return sets_SL.sum(axis=1), (nll_SL * sets_SL).sum(axis=1)


def moment_of_eq_3(nll_SL: Array, eps: float, power: int = 1) -> float:
    """E[(sum of the masked / p)^power] over t and masks, by Gauss-Legendre quadrature in log p (smooth for 1/p too)."""
    length = nll_SL.shape[1]
    counts_S, sums_S = masked_sums(nll_SL)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    p_T1 = np.exp(log(eps) * (1 - nodes) / 2)[:, None]
    probability_TS = p_T1**counts_S * (1 - p_T1) ** (length - counts_S)
    integrand_T = (probability_TS * (sums_S / p_T1) ** power).sum(axis=1)
    return float((weights * integrand_T * p_T1[:, 0]).sum() * -log(eps) / 2 / (1 - eps))


def eq_3(nll_SL: Array) -> float:
    """Its limit eps -> 0: a set of m masked tokens weighs the integral of t^(m-1) (1-t)^(L-m), a beta function."""
    counts_S, sums_S = masked_sums(nll_SL)
    return float((beta(counts_S[1:], nll_SL.shape[1] - counts_S[1:] + 1) * sums_S[1:]).sum())


def moment_of_eq_14(nll_SL: Array, power: int = 1) -> float:
    """E[(L / l times the sum of the masked)^power] over l, uniform on 1..L, and over all sets of l."""
    length = nll_SL.shape[1]
    counts_S, sums_S = masked_sums(nll_SL)
    values_S = length * sums_S[1:] / counts_S[1:]
    return sum(float(v) ** power / length / comb(length, m) for m, v in zip(counts_S[1:], values_S, strict=True))


def eq_15(nll_SL: Array) -> float:
    """Mean over all L! orders: position pi(i) is predicted where pi(i), pi(i+1), ... are masked."""
    length = nll_SL.shape[1]
    total = 0.0
    for order in permutations(range(length)):
        total += sum(float(nll_SL[sum(1 << j for j in order[i:]), order[i]]) for i in range(length))
    return total / factorial(length)


@settings(max_examples=20, deadline=None)
@given(predictors)
def test_equations_3_14_and_15_are_equal_for_any_predictor_and_sequence(table: Array) -> None:
    for x0 in product(range(WORDS), repeat=length_of(table)):
        nll_SL = nll_by_set(table, np.array(x0))
        assert moment_of_eq_14(nll_SL) == pytest.approx(eq_3(nll_SL), rel=1e-12)
        assert eq_15(nll_SL) == pytest.approx(eq_3(nll_SL), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(predictors)
def test_eq_3_approaches_its_limit_linearly_in_eps(table: Array) -> None:
    # (1 - eps) E_eps = E_0 - the integral from 0 to eps, whose integrand at 0 is the sum over single masks.
    nll_SL = nll_by_set(table, np.zeros(length_of(table), dtype=np.int64))
    limit, single_masks = eq_3(nll_SL), sum(nll_SL[1 << i, i] for i in range(length_of(table)))
    for eps in (1e-3, 1e-4, 1e-5, 1e-6):
        bias = moment_of_eq_3(nll_SL, eps) - limit
        scale = nll_SL.sum()
        assert bias == pytest.approx(eps * (limit - single_masks), abs=10 * eps**2 * scale + 1e-12 * scale)


@settings(max_examples=50, deadline=None)
@given(predictors)
def test_variance_of_eq_14_is_below_that_of_eq_3(table: Array) -> None:
    # A law, while log(1/eps) > 1 + H(L-1): sets of m have weights L/m^2 and L/(m(m-1)) in the second moments, those
    # of one token L and about L (log(1/eps) - H(L-1)); the means are equal up to eps.
    assert log(1 / MASK_EPS) > 1 + sum(1 / k for k in range(1, length_of(table)))
    nll_SL = nll_by_set(table, np.zeros(length_of(table), dtype=np.int64))
    assert variance_of_eq_14(nll_SL) < variance_of_eq_3(nll_SL)


def variance_of_eq_3(nll_SL: Array) -> float:
    return moment_of_eq_3(nll_SL, MASK_EPS, power=2) - moment_of_eq_3(nll_SL, MASK_EPS) ** 2


def variance_of_eq_14(nll_SL: Array) -> float:
    return moment_of_eq_14(nll_SL, power=2) - moment_of_eq_14(nll_SL) ** 2


LENGTH = 4
RUNS, WINDOW = 300, 64
X0_L = np.array([2, 0, 1, 1])


def masked_nll(table: Array, masked_BL: npt.NDArray[np.bool_]) -> torch.Tensor:
    """(M,) by the package's ``token_nll``."""
    contexts_BL = np.where(masked_BL, MASK, X0_L)
    logits_BLV = torch.tensor(table[tuple(contexts_BL.T)])
    targets_BL = torch.tensor(X0_L).expand(masked_BL.shape)
    masked = torch.tensor(masked_BL)
    return token_nll(logits_BLV[masked], targets_BL[masked], excluded_token_id=MASK)


def estimates_of_eq_3(table: Array, sampling: TimeSampling) -> Array:
    """(runs, window): one sample of the loss for each ordinal of a window, for each of many seeds."""
    n_B = np.arange(7000, 7000 + WINDOW)
    values = []
    for seed in range(RUNS):
        p_B = mask_probability(mask_ratio(seed, n_B, sampling))
        masked_BL = random_mask(seed, n_B, p_B, LENGTH)
        rows_M = masked_BL.nonzero()[0]
        nll_M, p_M = masked_nll(table, masked_BL), torch.tensor(p_B)[rows_M]
        loss_M = nll_M * masked_diffusion_weights(p_M, len(p_M))
        values.append([float(loss_M[rows_M == b].sum()) for b in range(WINDOW)])
    return np.array(values)


def estimates_of_eq_14(table: Array) -> Array:
    n_B = np.arange(7000, 7000 + WINDOW)
    values = []
    for seed in range(RUNS):
        masked_BL = fixed_count_mask(seed, n_B, stratified_mask_counts(seed, n_B, LENGTH), LENGTH)
        values.append(nll_bound(masked_nll(table, masked_BL), torch.tensor(masked_BL)).numpy())
    return np.array(values)


def assert_unbiased(values_RB: Array, expected: float) -> None:
    """Within 4 standard errors. Runs are independent, the values of one (stratified) run are not."""
    means_R = values_RB.mean(axis=1)
    assert abs(means_R.mean() - expected) < 4 * means_R.std(ddof=1) / np.sqrt(RUNS)


@pytest.mark.parametrize("sampling", TIME_SAMPLINGS)
def test_training_loss_is_an_unbiased_estimate_of_eq_3(sampling: TimeSampling) -> None:
    table = random_table(LENGTH, seed=1)
    nll_SL = nll_by_set(table, X0_L)
    values_RB = estimates_of_eq_3(table, sampling)
    assert_unbiased(values_RB, moment_of_eq_3(nll_SL, MASK_EPS))
    squares_RB = (values_RB - moment_of_eq_3(nll_SL, MASK_EPS)) ** 2
    assert_unbiased(squares_RB, variance_of_eq_3(nll_SL))


def test_bound_is_an_unbiased_estimate_of_all_three() -> None:
    table = random_table(LENGTH, seed=1)
    nll_SL = nll_by_set(table, X0_L)
    values_RB = estimates_of_eq_14(table)
    assert_unbiased(values_RB, eq_3(nll_SL))
    assert_unbiased((values_RB - eq_3(nll_SL)) ** 2, variance_of_eq_14(nll_SL))


def test_stratified_t_takes_its_own_part_out_of_the_variance_of_a_windows_mean() -> None:
    counts_S, sums_S = masked_sums(nll_by_set(random_table(LENGTH, seed=1), X0_L))
    n_B = np.arange(WINDOW)
    variances = {}
    for sampling in TIME_SAMPLINGS:
        p_RB1 = np.stack([mask_probability(mask_ratio(seed, n_B, sampling)) for seed in range(RUNS)])[..., None]
        expected_given_t_RB = (p_RB1 ** (counts_S - 1.0) * (1 - p_RB1) ** (LENGTH - counts_S) * sums_S).sum(axis=-1)
        variances[sampling] = expected_given_t_RB.mean(axis=1).var()
    assert variances["weyl"] < 0.05 * variances["iid"]


def test_exact_counts_lower_the_variance_of_a_windows_mean() -> None:
    table = random_table(LENGTH, seed=1)
    means_14, means_3 = (v_RB.mean(axis=1) for v_RB in (estimates_of_eq_14(table), estimates_of_eq_3(table, "weyl")))
    assert means_14.var() < 0.1 * means_3.var()


# --- other densities of the mask ratio, and other weights ------------------------------------------------------------

WITH_MASS: dict[str, Density] = {
    "uniform": Uniform(),
    "beta at the ends": Beta(0.5, 0.7),
    "beta": Beta(1.5, 1.2),
    "beta to the limit": Beta(2, 2),
    "logit-normal": LogitNormal(-0.5, 4.0),
    "whole range": Range(0, 1),
    "in a curriculum": Curriculum(Beta(0.7, 1), Beta(1.5, 1), steps=8).at(3),
}
"""Densities with which the weight `elbo` gives the bound."""
WEIGHTS = {
    "elbo": LossWeight(),
    "ce": LossWeight("ce"),
    "clipped": LossWeight("clipped", 3.0),
    "per_masked_token": LossWeight("per_masked_token"),
}


class TablePredictor:
    """The arbitrary predictor in the place of a Transformer; it keeps what each token adds to the loss."""

    mask_token_id = MASK

    def __init__(self, table: Array) -> None:
        self.logits = torch.tensor(table)
        self.parts_M = torch.zeros(0)

    def start_ids(self, batch: object) -> tuple[int, ...]:
        return ()

    def hidden_after(
        self,
        start_ids: tuple[int, ...],
        inputs_BL: torch.Tensor,
        *others: object,
        causal: bool,
        rows_M: torch.Tensor | None = None,
        **named: object,
    ) -> torch.Tensor:
        assert not causal
        logits_BLV = self.logits[tuple(inputs_BL.T)]
        return logits_BLV if rows_M is None else logits_BLV.flatten(0, 1)[rows_M]

    def head_nll(
        self, hidden_MD: torch.Tensor, targets_M: torch.Tensor, weights_M: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nll_M = token_nll(hidden_MD, targets_M, excluded_token_id=MASK)
        self.parts_M = nll_M * weights_M
        return self.parts_M.sum(), nll_M


def loss_by_row(
    table: Array, x0_L: npt.NDArray[np.int64], masked_BL: npt.NDArray[np.bool_], p_B: Array, q_B: Array | None,
    weight: LossWeight,
) -> Array:  # fmt: skip
    """(B,) the training loss of each row of a micro-batch, as the package computes it."""
    rows, length = masked_BL.shape
    masked = torch.tensor(masked_BL)
    batch = TrainingBatch(
        tokens_BL=torch.tensor(x0_L).repeat(rows, 1),
        attention_mask_BL=None,
        masked_BL=masked,
        p_B=torch.tensor(p_B).float(),
        ordinals_B=torch.arange(rows),
        denominator=1.0,
        global_tokens=rows * length,
        density_B=None if q_B is None else torch.tensor(q_B).float(),
        **dict(zip(("scored_M", "scored"), scored_positions(masked), strict=True)),
    )
    predictor = TablePredictor(table)
    total = training_loss(predictor, batch, weight)
    sums_B = torch.zeros(rows, dtype=torch.float64)
    sums_B.index_add_(0, batch.scored_M // length, predictor.parts_M.double())
    assert float(total) == pytest.approx(float(sums_B.sum()), rel=1e-4, abs=1e-5)
    return sums_B.numpy()


def expected_loss(
    table: Array, x0_L: npt.NDArray[np.int64], density: Density, weight: LossWeight, eps: float = MASK_EPS
) -> float:
    """The expectation of the training loss: over all masks by enumeration, over t by double exponential quadrature."""
    x_K = np.arange(-3.0, 3.0, 1 / 32)
    u_K = 1 / (1 + np.exp(-np.pi * np.sinh(x_K)))
    node_weights_K = np.pi * np.cosh(x_K) * u_K * (1 - u_K) / 32
    t_K, q_K = density.draw(u_K)
    p_K, sets_SL = mask_probability(t_K, eps), mask_sets(len(x0_L))
    counts_S = sets_SL.sum(axis=1)
    probability_KS = p_K[:, None] ** counts_S * (1 - p_K[:, None]) ** (len(x0_L) - counts_S)
    nodes, sets = len(u_K), len(sets_SL)
    loss_N = loss_by_row(table, x0_L, np.tile(sets_SL, (nodes, 1)), np.repeat(p_K, sets), np.repeat(q_K, sets), weight)
    return float((node_weights_K[:, None] * probability_KS * loss_N.reshape(nodes, sets)).sum())


@settings(max_examples=3, deadline=None)
@given(predictors)
@pytest.mark.parametrize("name", WITH_MASS)
def test_the_loss_of_every_density_with_mass_everywhere_has_the_expectation_of_eq_3(name: str, table: Array) -> None:
    x0_L = np.arange(length_of(table)) % WORDS
    expected = moment_of_eq_3(nll_by_set(table, x0_L), MASK_EPS)
    assert expected_loss(table, x0_L, WITH_MASS[name], WEIGHTS["elbo"]) == pytest.approx(expected, rel=5e-6, abs=1e-5)


@pytest.mark.parametrize("sampling", TIME_SAMPLINGS)
@pytest.mark.parametrize("name", WITH_MASS)
def test_the_loss_of_every_density_with_mass_everywhere_is_unbiased(name: str, sampling: TimeSampling) -> None:
    table = random_table(LENGTH, seed=1)
    n_B = np.arange(7000, 7000 + WINDOW)
    values = []
    for seed in range(RUNS):
        t_B, q_B = drawn_ratio(seed, n_B, sampling, WITH_MASS[name], global_batch=WINDOW)
        p_B = mask_probability(t_B)
        values.append(loss_by_row(table, X0_L, random_mask(seed, n_B, p_B, LENGTH), p_B, q_B, LossWeight()))
    assert_unbiased(np.array(values), moment_of_eq_3(nll_by_set(table, X0_L), MASK_EPS))


@settings(max_examples=3, deadline=None)
@given(predictors)
@pytest.mark.parametrize("name", ["ce", "clipped", "per_masked_token"])
def test_other_weights_have_the_expectation_of_their_formula(name: str, table: Array) -> None:
    """Of t on a range, by Gauss-Legendre quadrature."""
    low, high = 0.05, 0.6
    length = length_of(table)
    x0_L = np.zeros(length, dtype=np.int64)
    counts_S, sums_S = masked_sums(nll_by_set(table, x0_L))
    nodes, node_weights = np.polynomial.legendre.leggauss(200)
    p_T1 = mask_probability((low + (high - low) * (nodes + 1) / 2)[:, None])
    weight_TS = {
        "ce": np.ones_like(p_T1),
        "clipped": np.minimum((high - low) / p_T1, 3.0),
        "per_masked_token": length / np.maximum(counts_S, 1),
    }[name]
    probability_TS = p_T1**counts_S * (1 - p_T1) ** (length - counts_S)
    formula = float((node_weights / 2 * (probability_TS * weight_TS * sums_S).sum(axis=1)).sum())
    assert expected_loss(table, x0_L, Range(low, high), WEIGHTS[name]) == pytest.approx(formula, rel=1e-3, abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(predictors)
def test_the_mean_of_masked_tokens_is_nearly_the_bound_where_t_is_uniform(table: Array) -> None:
    """Then l is uniform on 0..L, and that of Eq. 14 on 1..L: L/(L+1) of the bound, for a smallest probability of 0."""
    length = length_of(table)
    x0_L = np.full(length, 1)
    mean = expected_loss(table, x0_L, Uniform(), WEIGHTS["per_masked_token"], eps=1e-9)
    assert mean == pytest.approx(length / (length + 1) * moment_of_eq_14(nll_by_set(table, x0_L)), rel=5e-6, abs=1e-5)


def test_a_loss_is_called_a_bound_where_its_expectation_is_that_of_eq_3_and_nowhere_else() -> None:
    """One table tells the expectations apart; what `kind` says is what they are."""
    table = random_table(3, seed=2)
    bound = moment_of_eq_3(nll_by_set(table, X0_L[:3]), MASK_EPS)
    settings_of = {
        "beta": {"name": "beta", "a": 1.5, "b": 1.2},
        "range": {"name": "range", "low": 0.05, "high": 0.6},
        "most of the range": {"name": "range", "low": 0, "high": 0.9},
    }
    for given_setting in (None, *settings_of.values()):
        setting = density_setting(given_setting)
        density = Uniform() if setting is None else setting.density
        for weight in WEIGHTS.values():
            is_bound = expected_loss(table, X0_L[:3], density, weight) == pytest.approx(bound, rel=1e-5)
            assert weight.kind(setting) == ("bound" if is_bound else "surrogate")
