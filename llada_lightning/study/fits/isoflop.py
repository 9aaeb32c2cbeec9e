"""A parabola of log loss in log N at each budget, and the power laws of its optimum (Hoffmann et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.linalg import block_diag

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.study.fits.least_squares import (
    INTERVAL,
    MIN_BUDGETS,
    Estimate,
    LossCurve,
    PowerLaw,
    fit_linear,
    linear_spread,
    loss_curve,
    power_law,
    solver,
)
from llada_lightning.study.fits.runs import (
    TokenCost,
    Unit,
    budget_members,
    counted_conventions,
    flops_column,
    is_budget,
    losses,
    planned_convention,
)
from llada_lightning.study.fits.uncertainty import UNKNOWN, Array, Noise, Spread

MIN_SHAPES = 3
"""A parabola has three parameters."""

_NOT_PLANNED = "they were not planned to be equal by it"

MIN_SHAPES_FOR_CHECK = 5
"""A cubic has four parameters, and a parabola without the outermost two shapes needs three others."""


@dataclass(frozen=True)
class IsoflopBudget:
    """The parabola of one budget: log loss = c[0] + c[1] x + c[2] x^2, x = log N - center."""

    flops: float
    """Geometric mean of the runs' training FLOPs."""
    rows: npt.NDArray[np.intp] = field(repr=False)
    """The positions of its runs in the objective's table."""
    runs: tuple[str, ...]
    log_n: Array
    """The logarithm of the non-embedding parameters of each run."""
    center: float
    coefficients: Array
    n_opt: Estimate
    d_opt: Estimate
    tokens_per_param: Estimate
    loss_opt: Estimate
    interior: bool
    """Whether the optimum lies between the smallest and the largest shape; if not, the laws leave it out."""
    grid_sensitivity: float | None
    """The largest relative change of N_opt by a cubic term or without the outermost shapes; None below 5 shapes."""
    bias: float | None
    """The largest of those changes that goes beyond its own interval and N_opt's; None if none does."""
    draws: Array = field(repr=False, compare=False)
    """Bootstrapped coefficients (samples, 3)."""

    def curve(self, n: npt.ArrayLike) -> Array:
        """Loss at N non-embedding parameters."""
        x = np.log(np.asarray(n, float)) - self.center
        return np.exp(np.polynomial.polynomial.polyval(x, self.coefficients))

    @property
    def drawn_log_n_opt(self) -> Array:
        """log N_opt in every draw, no further out of the grid than the grid is wide: (samples,)."""
        return self.center + _vertex(self.draws, self.log_n - self.center)

    @property
    def drawn_log_loss_opt(self) -> Array:
        """Log of the loss at the optimum in every draw: (samples,)."""
        return _at(self.draws, self.drawn_log_n_opt - self.center)

    def as_dict(self) -> dict[str, Any]:
        estimates = ("n_opt", "d_opt", "tokens_per_param", "loss_opt")
        return {
            "flops": self.flops,
            "runs": list(self.runs),
            "center_log_n": self.center,
            "coefficients": self.coefficients.tolist(),
            **{name: getattr(self, name).as_dict() for name in estimates},
            **{name: getattr(self, name) for name in ("interior", "grid_sensitivity", "bias")},
            "biased": self.bias is not None,
        }


@dataclass(frozen=True)
class IsoflopFit:
    """One objective's parabolas and, given three budgets with an optimum inside, the laws of N_opt, D_opt and loss.

    ``loss_curve`` is what the compute multiplier reads: a loss with an irreducible part is no power law.
    """

    convention: Convention
    budgets: list[IsoflopBudget]
    note: str | None = None
    n_law: PowerLaw | None = None
    d_law: PowerLaw | None = None
    loss_law: PowerLaw | None = None
    loss_curve: LossCurve | None = None

    @property
    def flops_range(self) -> tuple[float, float]:
        """The smallest and the largest training FLOPs of the budgets that the laws go through."""
        flops = [budget.flops for budget in self.budgets if budget.interior]
        return min(flops), max(flops)

    def as_dict(self) -> dict[str, Any]:
        laws = {name: getattr(self, name) for name in ("n_law", "d_law", "loss_law", "loss_curve")}
        return {
            "convention": self.convention,
            "budgets": [budget.as_dict() for budget in self.budgets],
            **{name: law.as_dict() for name, law in laws.items() if law},
            **({"note": self.note} if self.note else {}),
        }


# --- fitting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Budget:
    """The runs of one budget, before the fit."""

    rows: npt.NDArray[np.intp]
    flops: float
    x: Array
    """log N - center."""
    center: float
    log_loss: Array

    @property
    def design(self) -> Array:
        return np.stack([np.ones_like(self.x), self.x, self.x**2], axis=1)

    @property
    def cubic_design(self) -> Array:
        """The design of a cubic; that of the parabola where there are too few shapes for a cubic."""
        enough = len(np.unique(self.x)) >= MIN_SHAPES_FOR_CHECK
        return np.column_stack([self.design, self.x**3]) if enough else self.design


def parabola_spread(runs: pd.DataFrame, convention: Convention, unit: Unit, noise: Noise) -> Spread:
    """The residual spread of one objective's runs about their budgets' parabolas, one number for all budgets.

    Unknown where there are no more runs than the parabolas have parameters.
    """
    groups, _ = _budgets_of(runs, convention, unit)
    return linear_spread(*_pooled(groups, noise)) if groups else UNKNOWN


def _pooled(groups: list[_Budget], noise: Noise) -> tuple[Array, Array, Noise]:
    """The parabolas of all budgets as one linear fit: design, log losses and their noise."""
    design = block_diag(*(group.design for group in groups))
    log_loss = np.concatenate([group.log_loss for group in groups])
    return design, log_loss, noise.take(np.concatenate([group.rows for group in groups]))


def fit_isoflop(
    runs: pd.DataFrame,
    convention: Convention,
    unit: Unit,
    noise: Noise,
    seed: int = 0,
    *,
    borrowed: Spread = UNKNOWN,
) -> IsoflopFit:
    """Parabolas of log loss in log N at every budget, and the laws of their optima.

    The spread between runs is one number for all budgets: a single budget has too few runs to tell it. Runs that were
    planned to be equal by the other convention do not form budgets by this one; the fit then holds a note instead.
    The arguments are as for ``fit_objective``; ``borrowed`` is the residual spread of another fit, for where this fit
    has no degrees of freedom.
    """
    groups, notes = _budgets_of(runs, convention, unit)
    if not groups:
        return IsoflopFit(convention, [], "no fit: " + "; ".join(notes))
    design, log_loss, pooled = _pooled(groups, noise)
    fit = fit_linear(design, log_loss, pooled, borrowed=borrowed)
    if not fit.spread.known:
        notes.append("no intervals: three shapes a budget leave no scatter to judge by; add shapes")
    # A cubic term is judged by the scatter about cubics: the scatter about parabolas contains the skew.
    cubic = fit_linear(block_diag(*(group.cubic_design for group in groups)), log_loss, pooled, borrowed=fit.spread)
    places = np.split(np.arange(len(log_loss)), np.cumsum([len(group.rows) for group in groups])[:-1])
    weights = pooled.weights(np.nan_to_num(fit.spread.tau))
    cost = TokenCost.of_runs(runs, convention)
    budgets = []
    for group, own in zip(groups, places, strict=True):
        errors = [pooled.draws(found.spread, own) for found in (fit, cubic)]
        budgets.append(_fit_budget(group, runs.iloc[group.rows], cost, weights[own], *errors))
    return _with_laws(convention, budgets, cost, notes, seed)


def _budgets_of(runs: pd.DataFrame, convention: Convention, unit: Unit) -> tuple[list[_Budget], list[str]]:
    """The budgets with enough shapes, and notes on the others."""
    flops = runs[flops_column(convention)].to_numpy(float)
    log_n = np.log(runs["params_nonembedding"].to_numpy(float))
    log_loss = np.log(losses(runs, unit)[0])
    groups, few, apart = [], [], list[int]()
    for rows in budget_members(flops):
        shapes = len(np.unique(log_n[rows]))
        if not is_budget(flops[rows]) or shapes == 1:
            apart += rows.tolist()
        elif shapes < MIN_SHAPES:
            few.append(f"{flops[rows[0]]:.2g} ({shapes})")
        else:
            center = float(log_n[rows].mean())
            budget = float(np.exp(np.log(flops[rows]).mean()))
            groups.append(_Budget(rows, budget, log_n[rows] - center, center, log_loss[rows]))
    notes = []
    name = CONVENTION_NAMES[convention]
    if len(np.unique(log_n)) == 1:
        notes.append(f"all runs are of one shape; a parabola needs at least {MIN_SHAPES} at a budget; add shapes")
    elif apart and not groups:
        planned = planned_convention(runs, counted_conventions(runs)) == convention
        why = "others of these budgets are not finished, or none are planned" if planned else _NOT_PLANNED
        notes.append(f"runs of several shapes do not share budgets by {name}: {why}")
    elif apart:
        notes.append(f"{len(apart)} runs left out: by {name} they share no budget with runs of other shapes")
    if few:
        shown = ", ".join(few[:4]) + (", …" if len(few) > 4 else "")
        notes.append(f"budgets (shapes): {shown}; a parabola needs at least {MIN_SHAPES} shapes; add shapes")
    return groups, notes


def _fit_budget(
    group: _Budget, runs: pd.DataFrame, cost: TokenCost, weights: Array, errors: Array, cubic_errors: Array
) -> IsoflopBudget:
    solve = solver(group.design, weights)
    coefficients = solve @ group.log_loss
    draws = coefficients + errors @ solve.T
    x_opt, drawn_x = _vertex(coefficients, group.x), _vertex(draws, group.x)
    log_n, drawn_n = group.center + float(x_opt), group.center + _opened(drawn_x, group.x)
    log_d, drawn_d = (np.log(group.flops) - cost(value) for value in (log_n, drawn_n))
    n_opt = Estimate.of(float(np.exp(log_n)), np.exp(drawn_n))
    drawn_by_cubic = _vertex(coefficients + cubic_errors @ solve.T, group.x)
    shifts = _grid_shifts(group, weights, cubic_errors, float(x_opt), drawn_by_cubic)
    moved = [
        shift
        for shift in shifts
        if not shift.covers(0.0) and not n_opt.covers(n_opt.value * float(np.exp(shift.value)))
    ]
    return IsoflopBudget(
        flops=group.flops,
        rows=group.rows,
        runs=tuple(runs["run"].astype(str)),
        log_n=group.x + group.center,
        center=group.center,
        coefficients=coefficients,
        n_opt=n_opt,
        d_opt=Estimate.of(float(np.exp(log_d)), np.exp(drawn_d)),
        tokens_per_param=Estimate.of(float(np.exp(log_d - log_n)), np.exp(drawn_d - drawn_n)),
        loss_opt=Estimate.of(float(np.exp(_at(coefficients, x_opt))), np.exp(_at(draws, drawn_x))),
        interior=bool(coefficients[2] > 0 and group.x.min() < x_opt < group.x.max()),
        grid_sensitivity=_largest(shifts),
        bias=_largest(moved),
        draws=draws,
    )


def _vertex(coefficients: Array, x: Array) -> Array:
    """Where a parabola is lowest, (..., 3) -> (...); no further out of the grid than the grid is wide.

    A draw that opens downwards falls towards one side without an end: it is put at that side's bound.
    """
    _, slope, curvature = np.moveaxis(coefficients, -1, 0)
    width = np.ptp(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = np.where(curvature > 0, -slope / (2 * curvature), -np.sign(slope) * np.inf)
    return np.clip(vertex, x.min() - width, x.max() + width)


def _at(coefficients: Array, x: Array) -> Array:
    return coefficients[..., 0] + coefficients[..., 1] * x + coefficients[..., 2] * x**2


def _opened(drawn_x: Array, x: Array) -> Array:
    """Draws of the vertex with those at its bounds as infinite: the data do not say how far out they are."""
    width = np.ptp(x)
    opened = np.where(drawn_x <= x.min() - width, -np.inf, drawn_x)
    return np.where(drawn_x >= x.max() + width, np.inf, opened)


def _grid_shifts(group: _Budget, weights: Array, errors: Array, x_opt: float, drawn_x: Array) -> list[Estimate]:
    """How far log N_opt moves with a cubic term, and without the outermost shapes, each with its own interval.

    A skewed loss curve pulls the vertex of a parabola to one side, the more so the further the grid's centre is off.
    """
    sizes = np.unique(group.x)
    if len(sizes) < MIN_SHAPES_FOR_CHECK:
        return []
    shifts = []
    cubic = solver(group.cubic_design, weights)
    theta = cubic @ group.log_loss
    inner = (group.x > sizes[0]) & (group.x < sizes[-1])
    shorter = solver(group.design[inner], weights[inner])
    short_theta = shorter @ group.log_loss[inner]
    for other, drawn in (
        (_cubic_minimum(theta), _cubic_minimum(theta + errors @ cubic.T)),
        (_vertex(short_theta, group.x), _vertex(short_theta + errors[:, inner] @ shorter.T, group.x)),
    ):
        if np.isfinite(other):
            low, high = np.nanpercentile(drawn - drawn_x, INTERVAL)
            shifts.append(Estimate(float(other) - x_opt, float(low), float(high)))
    return shifts


def _largest(shifts: list[Estimate]) -> float | None:
    """The largest of some shifts of log N, as a relative change of N; None where there is none."""
    return max((float(np.expm1(abs(shift.value))) for shift in shifts), default=None)


def _cubic_minimum(coefficients: Array) -> Array:
    """Where a cubic has its minimum, (..., 4) -> (...); NaN where it has none."""
    _, first, second, third = np.moveaxis(coefficients, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return -first / (second + np.sqrt(second**2 - 3 * first * third))


def _with_laws(
    convention: Convention, budgets: list[IsoflopBudget], cost: TokenCost, notes: list[str], seed: int
) -> IsoflopFit:
    inside = [budget for budget in budgets if budget.interior]
    outside = [f"{budget.flops:.2g}" for budget in budgets if not budget.interior]
    if outside:
        notes.append(f"optimum outside of the grid at {', '.join(outside)} FLOPs, left out of the laws; move the grid")
    if len(inside) < MIN_BUDGETS:
        notes.append(
            f"no laws, budgets with an optimum inside the grid: {len(inside)}; at least {MIN_BUDGETS} are needed"
        )
        return IsoflopFit(convention, budgets, "; ".join(notes))
    log_c = np.log([budget.flops for budget in inside])
    log_n = np.log([budget.n_opt.value for budget in inside])
    log_loss = np.log([budget.loss_opt.value for budget in inside])
    drawn_n = np.stack([budget.drawn_log_n_opt for budget in inside], axis=1)
    drawn_loss = np.stack([budget.drawn_log_loss_opt for budget in inside], axis=1)
    noise_n, noise_loss = Noise.of_draws(log_n, drawn_n, seed), Noise.of_draws(log_loss, drawn_loss, seed + 1)
    noise_d = Noise.of_draws(log_c - cost(log_n), log_c - cost(drawn_n), seed)
    loss_law = power_law(log_c, log_loss, noise_loss)
    return IsoflopFit(
        convention,
        budgets,
        n_law=power_law(log_c, log_n, noise_n, sign=1),
        d_law=power_law(log_c, log_c - cost(log_n), noise_d, sign=1),
        loss_law=loss_law,
        loss_curve=loss_curve(log_c, log_loss, noise_loss, loss_law),
        note="; ".join(notes) or None,
    )
