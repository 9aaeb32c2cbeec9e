"""Fits of validation loss against training FLOPs, and the ratio of compute between the two objectives.

First version: the envelope (the best loss at each budget) with a power law through it, and the compute multiplier
interpolated between two envelopes. Every interval is at 95 % and comes from a parametric bootstrap over the runs'
own standard errors of validation: it holds no spread over seeds, and none over the choice of shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from llada_lightning.errors import UserError
from llada_lightning.scaling.flops import Convention
from llada_lightning.scaling.results import DONE

Unit = Literal["nats_per_token", "bits_per_byte"]
UNITS: tuple[Unit, ...] = get_args(Unit)
UNIT_NAMES: dict[Unit, str] = {"nats_per_token": "nats/token", "bits_per_byte": "bits/byte"}

OBJECTIVES = ("arm", "llada")
VAL_KINDS = {"arm": "exact", "llada": "bound"}

MIN_BUDGETS = 3
"""A line has two parameters: with fewer than three budgets nothing is left to judge it by."""

BUDGET_TOLERANCE = 1.1
"""Runs whose FLOPs differ by less than this factor belong to one budget: whole steps cannot hit it exactly."""

INTERVAL = (2.5, 97.5)
"""Percentiles of a 95 % interval."""

Array = npt.NDArray[np.float64]


# --- which runs ------------------------------------------------------------------------------------------------------


def usable_runs(table: pd.DataFrame) -> pd.DataFrame:
    """The finished runs with a finite loss, the only ones that a fit may see."""
    finite = np.isfinite(table["val_nats_per_token"].to_numpy(float, na_value=np.nan))
    return table[(table["status"] == DONE).fillna(False).to_numpy(bool) & finite].reset_index(drop=True)


def check_comparable(table: pd.DataFrame) -> None:
    """Raises UserError where the losses of a table cannot stand on one axis.

    That is: several tokenizers, data fingerprints or sequence lengths, an unknown objective, or a ``val_kind`` that
    is not the objective's own (``arm`` is exact, ``llada`` a bound).
    """
    for column in ("tokenizer", "data_fingerprint", "sequence_length"):
        kinds = sorted(table[column].dropna().unique())
        if len(kinds) > 1:
            raise UserError(f"results: {column} is mixed ({', '.join(map(str, kinds))}); collect runs on the same data")
    for objective, kind in table[["objective", "val_kind"]].drop_duplicates().itertuples(index=False):
        if objective not in OBJECTIVES:
            raise UserError(f"results: objective {objective!r} is not known; it is one of {', '.join(OBJECTIVES)}")
        if kind != VAL_KINDS[objective]:
            raise UserError(f"results: val_kind of {objective} is {kind!r}; it must be {VAL_KINDS[objective]!r}")


def flops_column(convention: Convention) -> str:
    """The column that counts a run's FLOPs by a convention."""
    return "flops_6nd" if convention == "6nd" else "flops_total"


def losses(table: pd.DataFrame, unit: Unit) -> tuple[Array, Array]:
    """Loss and its standard error, in ``unit``; the error is NaN where the run reports none."""
    nats = table["val_nats_per_token"].to_numpy(float, na_value=np.nan)
    stderr = table["val_stderr"].to_numpy(float, na_value=np.nan)
    if unit == "nats_per_token":
        return nats, stderr
    bits = table["val_bits_per_byte"].to_numpy(float, na_value=np.nan)
    return bits, stderr * bits / nats


def budget_groups(flops: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """For each run the ordinal of its budget, cheapest first: a gap above ``BUDGET_TOLERANCE`` starts a new one."""
    values = np.log(np.asarray(flops, float))
    order = np.argsort(values, kind="stable")
    groups = np.empty(len(values), np.int64)
    groups[order] = np.cumsum(np.diff(values[order], prepend=values[order][:1]) > np.log(BUDGET_TOLERANCE))
    return groups


# --- envelope --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvelopePoint:
    """The best run of a budget: its training FLOPs, its loss with standard error (NaN if unknown), its names."""

    flops: float
    loss: float
    stderr: float
    run: str
    shape: str


def best_of_budgets(runs: pd.DataFrame, convention: Convention, unit: Unit) -> list[int]:
    """Row positions of the best run of each budget, cheapest budget first. ``runs`` are of one objective."""
    groups = budget_groups(runs[flops_column(convention)])
    loss, _ = losses(runs, unit)
    return [int(members[np.argmin(loss[members])]) for members in map(np.flatnonzero, _masks(groups))]


def _masks(groups: npt.NDArray[np.int64]) -> list[npt.NDArray[np.bool_]]:
    return [groups == group for group in range(groups.max() + 1)] if len(groups) else []


def envelope_points(runs: pd.DataFrame, convention: Convention, unit: Unit) -> list[EnvelopePoint]:
    """The best run of each budget that no cheaper run beats.

    The second half matters where runs were planned to be equal by the other convention: by this one they then do not
    fall into budgets, and the envelope is the edge of the cloud.
    """
    flops = runs[flops_column(convention)].to_numpy(float)
    loss, stderr = losses(runs, unit)
    points: list[EnvelopePoint] = []
    for row in best_of_budgets(runs, convention, unit):
        if not points or loss[row] < points[-1].loss:
            names = runs.iloc[row]
            points.append(EnvelopePoint(flops[row], loss[row], stderr[row], str(names["run"]), str(names["shape"])))
    return points


# --- power law -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """loss = a * (C / c0)^-b, fitted in log space."""

    a: float
    b: float
    c0: float
    interval_a: tuple[float, float]
    interval_b: tuple[float, float]
    residual: float
    """Root mean square of the residuals of log loss."""
    error_scale: float
    """Factor by which the standard errors were scaled up: the root of the reduced chi-square, at least 1."""
    draws: Array = field(repr=False, compare=False)
    """Bootstrapped (log a, b), one row a draw."""

    def loss(self, flops: npt.ArrayLike) -> Array:
        """The loss at given training FLOPs."""
        return self.a * (np.asarray(flops, float) / self.c0) ** -self.b

    def flops(self, loss: npt.ArrayLike) -> Array:
        """The training FLOPs at which a loss is reached."""
        return self.c0 * (np.asarray(loss, float) / self.a) ** (-1 / self.b)

    def band(self, flops: npt.ArrayLike) -> tuple[Array, Array]:
        """Lower and upper end of the 95 % interval of the loss at given FLOPs."""
        distance = np.log(np.asarray(flops, float) / self.c0)
        low, high = np.percentile(np.exp(self.draws[:, :1] - self.draws[:, 1:] * distance), INTERVAL, axis=0)
        return low, high


def fit_power_law(
    flops: npt.ArrayLike,
    loss: npt.ArrayLike,
    stderr: npt.ArrayLike,
    *,
    c0: float | None = None,
    samples: int = 4000,
    seed: int = 0,
) -> PowerLaw:
    """Weighted least squares of log loss on log FLOPs.

    Each point weighs by the inverse square of its relative standard error; if any error is missing or zero, all weigh
    the same. Where the points scatter about the line by more than their errors explain, the errors are scaled up by
    the root of the reduced chi-square (the Birge ratio; Particle Data Group, Review of Particle Physics,
    Introduction, Sec. 5.2.2), so that a law that does not hold does not get a narrow interval.

    Args:
        flops: training FLOPs of each point.
        loss: loss of each point.
        stderr: one standard error of each loss.
        c0: reference FLOPs; the geometric mean by default, where a and b are nearly uncorrelated.
        samples: bootstrap draws, each a new loss for every point from its (scaled) standard error.
        seed: of the draws.

    Raises:
        UserError: fewer than three points.
    """
    x, y = np.log(np.asarray(flops, float)), np.log(np.asarray(loss, float))
    if len(x) < MIN_BUDGETS:
        raise UserError(f"fit: {len(x)} budgets, a power law needs at least {MIN_BUDGETS}; run more budgets")
    log_c0 = float(np.log(c0)) if c0 else float(x.mean())
    sigma, known = _relative_errors(np.asarray(loss, float), np.asarray(stderr, float))
    design = np.stack([np.ones_like(x), log_c0 - x], axis=1)
    solve = (
        np.linalg.pinv(design / sigma[:, None]) / sigma
    )  # weighted least squares as a matrix: (log a, b) = solve @ y
    log_a, b = solve @ y
    residuals = y - design @ (log_a, b)
    chi_square = float(np.sum((residuals / sigma) ** 2)) / (len(x) - 2)
    scale = max(1.0, chi_square**0.5) if known else chi_square**0.5
    noise = np.random.default_rng(seed).standard_normal((samples, len(x))) * sigma * scale
    draws = (y + noise) @ solve.T
    low, high = np.percentile(draws, INTERVAL, axis=0)
    return PowerLaw(
        a=float(np.exp(log_a)),
        b=float(b),
        c0=float(np.exp(log_c0)),
        interval_a=(float(np.exp(low[0])), float(np.exp(high[0]))),
        interval_b=(float(low[1]), float(high[1])),
        residual=float(np.sqrt(np.mean(residuals**2))),
        error_scale=scale,
        draws=draws,
    )


def _relative_errors(loss: Array, stderr: Array) -> tuple[Array, bool]:
    """Standard errors of log loss, and whether they are known; ones if not."""
    known = bool(np.all(np.isfinite(stderr) & (stderr > 0)))
    return (stderr / loss, True) if known else (np.ones_like(loss), False)


# --- both objectives -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvelopeFit:
    """One objective's envelope and, given enough budgets, the power law through it."""

    convention: Convention
    points: list[EnvelopePoint]
    law: PowerLaw | None

    @property
    def flops_range(self) -> tuple[float, float]:
        return self.points[0].flops, self.points[-1].flops

    def as_dict(self) -> dict[str, Any]:
        points = [{key: getattr(point, key) for key in EnvelopePoint.__dataclass_fields__} for point in self.points]
        fit: dict[str, Any] = {"convention": self.convention, "points": points}
        if self.law is None:
            return {**fit, "note": f"no fit, budgets on the envelope: {len(points)}; at least {MIN_BUDGETS} are needed"}
        names = ("a", "b", "c0", "interval_a", "interval_b", "residual", "error_scale")
        return {**fit, **{name: getattr(self.law, name) for name in names}}


@dataclass(frozen=True)
class Multiplier:
    """FLOPs that ``llada`` needs over FLOPs that ``arm`` needs for equal loss, with a 95 % interval."""

    convention: Convention
    method: str
    arm_flops: float
    multiplier: float
    low: float
    high: float


@dataclass(frozen=True)
class Fits:
    """All fits of a results table under one convention and unit, with their settings."""

    convention: Convention
    unit: Unit
    samples: int
    seed: int
    envelopes: dict[str, EnvelopeFit]
    compute_multiplier: list[Multiplier]

    def as_dict(self) -> dict[str, Any]:
        """What ``fits.json`` holds: only what was computed."""
        settings = {"convention": self.convention, "unit": self.unit, "samples": self.samples, "seed": self.seed}
        return {
            "settings": {**settings, "interval_percentiles": INTERVAL},
            **{objective: {"envelope": fit.as_dict()} for objective, fit in self.envelopes.items()},
            "compute_multiplier": [vars(multiplier) for multiplier in self.compute_multiplier],
        }


def fit_table(
    table: pd.DataFrame,
    convention: Convention = "6nd",
    unit: Unit = "nats_per_token",
    *,
    samples: int = 4000,
    seed: int = 0,
) -> Fits:
    """Fits every objective of a results table.

    Args:
        table: a results table; runs that are unfinished or diverged are left out.
        convention: which FLOPs a budget counts.
        unit: of the losses.
        samples: bootstrap draws.
        seed: of the first objective's draws; the others count on from it.

    Raises:
        UserError: the table has no usable run, or its losses cannot be compared.
    """
    runs = usable_runs(table)
    if runs.empty:
        raise UserError(f"results: none of {len(table)} rows is a finished run with a finite loss; nothing to fit")
    check_comparable(runs)
    envelopes: dict[str, EnvelopeFit] = {}
    for number, objective in enumerate(name for name in OBJECTIVES if (runs["objective"] == name).any()):
        points = envelope_points(runs[runs["objective"] == objective], convention, unit)
        law = _law_of(points, samples, seed + number) if len(points) >= MIN_BUDGETS else None
        envelopes[objective] = EnvelopeFit(convention, points, law)
    multipliers = compute_multipliers(envelopes["arm"], envelopes["llada"]) if len(envelopes) == 2 else []
    return Fits(convention, unit, samples, seed, envelopes, multipliers)


def _law_of(points: list[EnvelopePoint], samples: int, seed: int) -> PowerLaw:
    columns = ([point.flops for point in points], [point.loss for point in points], [point.stderr for point in points])
    return fit_power_law(*columns, samples=samples, seed=seed)


def compute_multipliers(arm: EnvelopeFit, llada: EnvelopeFit) -> list[Multiplier]:
    """The compute multiplier at every budget of either objective whose loss both envelopes reach: no extrapolation.

    Empty where a law is missing, does not fall, or the losses do not overlap.
    """
    if arm.law is None or llada.law is None or min(arm.law.b, llada.law.b) <= 0:
        return []
    shared = np.concatenate([
        arm.law.loss([point.flops for point in arm.points]), llada.law.loss([point.flops for point in llada.points]),
    ])  # fmt: skip
    reached = [loss for loss in shared if _reaches(arm, loss) and _reaches(llada, loss)]
    return [_multiplier(arm.convention, arm.law, llada.law, loss) for loss in sorted(reached, reverse=True)]


def _reaches(fit: EnvelopeFit, loss: float) -> bool:
    assert fit.law is not None
    low, high = fit.flops_range
    rounding = 1 + 1e-9
    return bool(low / rounding <= fit.law.flops(loss) <= high * rounding)


def _multiplier(convention: Convention, arm: PowerLaw, llada: PowerLaw, loss: float) -> Multiplier:
    arm_flops = float(arm.flops(loss))
    drawn_loss = arm.draws[:, 0] - arm.draws[:, 1] * np.log(arm_flops / arm.c0)
    log_a, b = llada.draws.T
    with np.errstate(divide="ignore", over="ignore"):
        drawn = np.exp((log_a - drawn_loss) / b) * llada.c0 / arm_flops
    drawn = np.where(b > 0, drawn, np.inf)  # a law that does not fall never gets there
    low, high = np.percentile(drawn, INTERVAL)
    return Multiplier(convention, "envelope", arm_flops, float(llada.flops(loss)) / arm_flops, float(low), float(high))
