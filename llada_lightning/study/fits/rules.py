"""The learning rate and the batch of lowest loss at each budget of a tuning study, and their laws.

At every budget and shape a quadratic is fitted to the log losses of the grid (``quadratic``), and its minimum is the
optimum. The quadratics of an objective are fitted together. Each has its own height and slopes, and all have the same
curvature, because the few noisy runs of one budget do not determine six coefficients well. Two power laws go through
the optima, by least squares that weighs each by its own error: the rate by C, 6ND, as in Bi et al. 2024
(arXiv:2401.02954, Eq. 1), and the tokens of a global batch by D, as in Li et al. 2025 (arXiv:2503.04715).

Errors are drawn as in ``uncertainty``. All runs of a budget share the validation set, so its error is nearly the same
for all of them and moves no optimum. Where the covariance of the losses is not known, the scatter about the quadratics
is all that counts, because the table's standard errors are mostly that common part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.linalg import block_diag

import llada_lightning
from llada_lightning.compute.rules import Range
from llada_lightning.study.fits.least_squares import (
    MIN_BUDGETS,
    Estimate,
    PowerLaw,
    linear_spread,
    power_law,
    solver,
)
from llada_lightning.study.fits.quadratic import FAR, MIN_VALUES, Grid, TuningOptimum, grid_of, optimum
from llada_lightning.study.fits.runs import (
    budget_groups,
    check_comparable,
    check_complete,
    in_canonical_order,
    noise_of_runs,
    objective_names,
    planned_flops,
    runs_without,
    usable_runs,
)
from llada_lightning.study.fits.uncertainty import UNKNOWN, Array, Noise, Spread, best_known
from llada_lightning.study.rule_file import FittedRules, Law, RuleFile, Variable
from llada_lightning.support.errors import UserError

MISFIT = 0.05
"""A law is said to miss its optima where errors alone would do so with a smaller probability."""


@dataclass(frozen=True)
class ObjectiveRules:
    """The optima of one objective, and the laws through those inside of their grids; None where there are too few."""

    name: str
    optima: list[TuningOptimum]
    lr_law: PowerLaw | None
    batch_law: PowerLaw | None
    spread: Spread
    """Of the log losses about the quadratics, beyond their known errors."""
    notes: list[str]

    @property
    def inside(self) -> list[TuningOptimum]:
        return [own for own in self.optima if own.inside]

    def as_dict(self) -> dict[str, Any]:
        return {
            "optima": [own.as_dict() for own in self.optima],
            "lr_law": self.lr_law and self.lr_law.as_dict(),
            "batch_law": self.batch_law and self.batch_law.as_dict(),
            "spread": self.spread.tau,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class TuningFits:
    """The rules of every objective of a tuning study, and what they were measured with."""

    objectives: dict[str, ObjectiveRules]
    vocab_size: int
    sequence_length: int
    tokenizer: str | None
    data_fingerprint: str | None
    notes: list[str]

    def rule_file(self, table: str, table_sha256: str) -> RuleFile | None:
        """The rules of the objectives that have laws, as ``llada plan --rule`` reads them; None where none has.

        Args:
            table: The name of the results table.
            table_sha256: Its SHA-256.
        """
        rules = {}
        for name, own in self.objectives.items():
            if own.lr_law is not None:
                sizes = {
                    quantity: _ends([getattr(optimum, quantity) for optimum in own.inside])
                    for quantity in ("params_nonembedding", "tokens", "flops")
                }
                optima = tuple(optimum.as_dict() for optimum in own.optima)
                batch = None if own.batch_law is None else _as_law(own.batch_law, "tokens")
                rules[name] = FittedRules(_as_law(own.lr_law, "flops"), batch, Range(**sizes), optima)
        if not rules:
            return None
        data = (self.vocab_size, self.sequence_length, self.tokenizer, self.data_fingerprint)
        return RuleFile(rules, *data, table, table_sha256, llada_lightning.__version__)


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _as_law(law: PowerLaw, variable: Variable) -> Law:
    return Law(variable, law.a, law.b, law.c0, law.interval_a, law.interval_b)


def fit_rules(
    table: pd.DataFrame, *, covariance: pd.DataFrame | None = None, samples: int = 4000, seed: int = 0
) -> TuningFits:
    """Fits the optimal rate and batch of every objective of a results table, and their laws.

    Args:
        table: A results table. Runs that are unfinished or diverged are left out.
        covariance: The covariance of the losses, as for ``fit_table``.
        samples: The number of bootstrap draws.
        seed: The seed of the draws.

    Raises:
        UserError: No budget has enough rates and batches, or the runs cannot be compared.
    """
    runs = _checked(table)
    vocab_size, sequence_length = (_the_only(runs, column) for column in ("vocab_size", "sequence_length"))
    lacking = runs_without(covariance, runs) if covariance is not None else []
    notes = [f"covariance not used: it lacks {len(lacking)} of {len(runs)} runs ({lacking[0]} …)"] if lacking else []
    known = covariance is not None and not lacking
    none = np.zeros((len(runs), len(runs)))
    noise = noise_of_runs(runs, covariance, samples, seed) if known else Noise.of(none, "scatter", samples, seed)
    grids = {
        name: _grids(runs, np.flatnonzero((runs["objective"] == name).to_numpy(bool))) for name in objective_names(runs)
    }
    if not any(found for found, _ in grids.values()):
        raise UserError(
            f"results: no budget has {MIN_VALUES} rates, and {MIN_VALUES} batches or one, at one shape; `llada plan "
            "--tune` writes a sweep of such runs"
        )
    spreads = {name: _spread(found, noise) for name, (found, _) in grids.items()}
    objectives = {}
    for number, (name, (found, few)) in enumerate(grids.items()):
        spread = best_known(spreads[name], *(own for other, own in spreads.items() if other != name))
        objectives[name] = _fit_objective(name, found, few, noise, spread, seed + 10 * number)
    text = {column: next(iter(runs[column].dropna().unique()), None) for column in ("tokenizer", "data_fingerprint")}
    return TuningFits(objectives, vocab_size, sequence_length, **text, notes=notes)


_COLUMNS = [
    "run", "objective", "shape", "params_nonembedding", "tokens", "steps", "flops_6nd", "flops_total", "lr",
    "global_batch_tokens", "sequence_length", "vocab_size", "tokenizer", "data_fingerprint", "val_nats_per_token",
    "val_stderr", "seed", "parent_checkpoint",
]  # fmt: skip


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """The usable runs of a table with the columns that are read here, in an order that does not depend on the table's.

    Raises:
        UserError: There are none, they cannot be compared, or a number is missing.
    """
    runs = usable_runs(table)
    if runs.empty:
        raise UserError(f"results: none of {len(table)} rows is a finished run with a finite loss; nothing to fit")
    check_comparable(runs)
    check_complete(runs, "nats_per_token")
    for column in ("lr", "global_batch_tokens", "flops_6nd"):
        values = runs[column].to_numpy(float, na_value=np.nan)
        wrong = ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            name = runs.loc[wrong, "run"].iloc[0]
            raise UserError(f"results: {column} of {wrong.sum()} runs is missing ({name}); correct the table")
    return in_canonical_order(runs)[_COLUMNS]


def _the_only(runs: pd.DataFrame, column: str) -> int:
    values = sorted(runs[column].dropna().unique())
    if len(values) != 1:
        shown = ", ".join(map(str, values)) or "missing"
        raise UserError(f"results: {column} is {shown}; rules are measured with one: collect the runs of one study")
    return int(values[0])


def _grids(runs: pd.DataFrame, members: npt.NDArray[np.intp]) -> tuple[list[Grid], list[str]]:
    """The grids of one objective by rising budget and size, and notes on what is too small to be one."""
    own = runs.iloc[members]
    budgets, sizes = budget_groups(planned_flops(own)), own["params_nonembedding"].to_numpy(float)
    found, notes = [], []
    for budget, size in sorted(set(zip(budgets.tolist(), sizes.tolist(), strict=True))):
        rows = members[(budgets == budget) & (sizes == size)]
        grid = grid_of(runs, rows)
        if isinstance(grid, Grid):
            found.append(grid)
        else:
            notes.append(grid)
    return found, notes


def _pooled(grids: list[Grid], noise: Noise) -> tuple[Array, Array, Noise]:
    """The quadratics of all budgets as one linear fit: design, log losses and their noise.

    The columns of the design are the height and the slopes of each grid, grid by grid, and then the curvature that all
    of them share. Those of a batch that was not varied are zero.
    """
    planes, curvatures = zip(*(np.split(grid.design, 2, axis=1) for grid in grids), strict=True)
    design = np.hstack([block_diag(*planes), np.vstack(curvatures)])
    return design, np.concatenate([g.log_losses for g in grids]), noise.take(np.concatenate([g.rows for g in grids]))


def _spread(grids: list[Grid], noise: Noise) -> Spread:
    if not grids:
        return UNKNOWN
    design, log_losses, pooled = _pooled(grids, noise)
    return linear_spread(design[:, design.any(axis=0)], log_losses, pooled)


def _fit_objective(
    name: str, grids: list[Grid], notes: list[str], noise: Noise, spread: Spread, seed: int
) -> ObjectiveRules:
    if not grids:
        return ObjectiveRules(name, [], None, None, UNKNOWN, notes)
    design, log_losses, pooled = _pooled(grids, noise)
    solve = np.zeros(design.shape[::-1])
    fitted = design.any(axis=0)
    solve[fitted] = solver(design[:, fitted], pooled.weights(np.nan_to_num(spread.tau)))
    theta = solve @ log_losses
    drawn = theta + pooled.draws(spread) @ solve.T
    places = [[*range(3 * k, 3 * k + 3), -3, -2, -1] for k in range(len(grids))]
    optima = [optimum(grid, theta[place], drawn[:, place]) for grid, place in zip(grids, places, strict=True)]
    notes = [*notes, *_notes_of(name, optima)]
    if not spread.known:
        notes.append(f"{name}: no intervals: as many coefficients as runs leave no scatter to judge by; add rates")
    inside = [own for own in optima if own.inside]
    budgets = len(set(budget_groups([own.flops for own in inside]).tolist())) if inside else 0
    if budgets < MIN_BUDGETS:
        notes.append(
            f"{name}: no laws, budgets with an optimum inside of the grid: {budgets}; {MIN_BUDGETS} are needed"
        )
        return ObjectiveRules(name, optima, None, None, spread, notes)
    lr_law = _law([own.flops for own in inside], [own.lr for own in inside], [own.drawn_log_lr for own in inside], seed)
    batch_law = None
    if all(own.batch_varied for own in inside):
        drawn_batches = [own.drawn_log_batch for own in inside]
        batch_law = _law([own.tokens for own in inside], [own.batch for own in inside], drawn_batches, seed + 1)
    for what, law in {"rate": lr_law, "batch": batch_law}.items():
        if law is not None and law.misfit < MISFIT:
            notes.append(f"{name}: the law of the {what} misses its optima (p = {law.misfit:.2g}); do not rely on it")
    return ObjectiveRules(name, optima, lr_law, batch_law, spread, notes)


def _law(sizes: list[float], optima: list[Estimate], drawn: list[Array], seed: int) -> PowerLaw:
    values = np.log([own.value for own in optima])
    return power_law(np.log(sizes), values, Noise.of_draws(values, np.stack(drawn, axis=1), seed), sign=1)


def _notes_of(name: str, optima: list[TuningOptimum]) -> Iterator[str]:
    for own in optima:
        if not own.inside:
            yield (
                f"{name} at {own.flops:.2g} FLOPs, {own.shape}: the lowest loss is not inside of the grid, and is left "
                f"out of the laws; go on with {' and '.join(own.continue_with)} (llada plan --tune)"
            )
    left_out = sum(own.left_out for own in optima)
    if left_out:
        yield f"{name}: {left_out} runs left out of the quadratics, {FAR:.0%} and more above the best of their budget"
