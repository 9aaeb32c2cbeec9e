"""How well the losses are known: the one noise model behind every interval.

All fits are of log loss. The covariance of the n log losses is V + tau^2 I. V are the runs' own validation errors. Runs
that share a validation set err together, so that differences are known far better than single losses: V is the full
matrix where it is given. Where only standard errors are known, all runs have one error in common. What of their
errors is not in common shows in the scatter, and is then a part of tau; taken as independent, the errors would
explain a scatter that is the runs' own. tau is the spread between runs beyond
that: seeds, tuning, a law that does not hold. It is estimated from a fit's own residuals by moments (DerSimonian and
Laird 1986); where no errors are known V is zero and tau holds all. The branches of one trunk have the trunk's seed and
data in common, so that a share of their spread may be one number. It is estimated by moments, too: the identity I is
then (1 - share) I + share K, where K has ones between the runs of a trunk.

A bootstrap draw is: fitted values + N(0, V + tau*^2 I), then a refit. tau*^2 is drawn anew each time as
dof tau^2 / chi^2_dof, so that few degrees of freedom give wide intervals, as Student's t does. So an interval holds
over runs and over each run's own error, and counts no noise twice. A fit that goes through all its points tells no
spread: it borrows that of another fit (``best_known``), and has no intervals where nothing can be borrowed. Cases are
not resampled: of five runs of a budget a resample often keeps fewer than the three that a parabola needs, or all on
one side of its minimum.

Draws are many: 2,000 runs in 4,000 draws are 64 MB for each kind of number. So they are made once, fits take columns of
them without a copy, and what is computed from them is computed in blocks of draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.optimize import nnls

Array = npt.NDArray[np.float64]

NoiseModel = Literal["covariance", "standard errors", "scatter"]
NOISE_MODELS: dict[NoiseModel, str] = {
    "covariance": "covariance of the runs' validation errors, and the spread of runs beyond it",
    "standard errors": "each run's own standard error, taken as the same for all runs, which share their validation "
    "set, and the spread of runs beyond it (no covariance beside the table)",
    "scatter": "the scatter of runs about each fit (no standard errors in the table)",
}


@dataclass(frozen=True)
class Spread:
    """Standard deviation of log loss beyond the known errors (NaN: not known), and what it was estimated with."""

    tau: float
    dof: float
    """Degrees of freedom; fewer than points less parameters where points share a trunk (Satterthwaite 1946)."""
    reduced_chi_square: float
    """Squared residuals over what the known errors alone make expect; NaN where none are known."""
    shared: float = 0.0
    """The share of tau^2 that the runs of one trunk have in common."""

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.tau))

    def at_most(self, tau: float) -> Spread:
        return replace(self, tau=min(self.tau, tau)) if self.known else self

    def beyond(self, runs: Spread) -> Spread:
        """The residual spread of a law less that of its runs, which their own errors hold already."""
        return replace(self, tau=float(np.sqrt(max(0.0, self.tau**2 - runs.tau**2)))) if runs.known else self


UNKNOWN = Spread(np.nan, 0, np.nan)
NOTHING = Spread(0.0, 0, np.nan)
"""No spread beyond the known errors."""

ENOUGH_DOF = 3
"""With fewer degrees of freedom tau is hardly known: with one, a 95 % interval is six times as wide as with many."""


def best_known(*spreads: Spread) -> Spread:
    """The first spread of enough degrees of freedom; if none has them, the one of most."""
    known = [spread for spread in spreads if spread.known]
    enough = [spread for spread in known if spread.dof >= ENOUGH_DOF]
    return enough[0] if enough else max(known, key=lambda spread: spread.dof, default=UNKNOWN)


MOST_NUMBERS = 2**18
"""Numbers of a block: 2 MB, of which a fit holds some thirty at once."""


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of an array of ``columns`` columns, each of at most ``MOST_NUMBERS`` numbers or of one row."""
    length = max(1, MOST_NUMBERS // max(1, columns))
    return (slice(start, min(start + length, rows)) for start in range(0, rows, length))


@dataclass(frozen=True)
class Draws:
    """What was drawn for m log losses: three arrays (samples, m), which every fit of them shares."""

    errors: Array
    """Draws from N(0, V). Runs that err together do so in every draw, over all objectives."""
    normals: Array
    """Normals for the spread of each run by itself, with the deviation of its scale: 1 where seeds tell none."""
    of_trunks: Array
    """Such normals for the spread that the runs of a trunk have in common: one number for all columns of a trunk."""
    uniforms: Array
    """Uniform draws for the uncertainty of the spread itself."""


@dataclass(frozen=True)
class Noise:
    """Errors of n log losses: their covariance, and their columns of the draws."""

    model: NoiseModel
    covariance: Array
    """V (n, n), of log loss; zero where errors are not known."""
    drawn: Draws
    columns: npt.NDArray[np.intp]
    """Where the n losses are among the m that were drawn."""
    shares: Array
    """The share of tau^2 in the variance of each loss (n,): the square of its scale, and 1/k of it for k runs."""
    kinship: Array
    """K (n, n), the product of the scales of two runs of a trunk, and the same for means of runs."""

    @classmethod
    def of(
        cls,
        covariance: Array,
        model: NoiseModel,
        samples: int,
        seed: int,
        trunks: npt.NDArray[np.intp] | None = None,
        scales: Array | None = None,
    ) -> Noise:
        """The noise of n log losses with a covariance (n, n).

        ``trunks`` (n,) are the numbers of their trunks, and ``scales`` (n,) the spread of each over that of all.
        """
        runs = len(covariance)
        trunks, scales = np.arange(runs) if trunks is None else trunks, np.ones(runs) if scales is None else scales
        generator = np.random.default_rng(seed)
        draws, normals = (generator.standard_normal((samples, runs)) for _ in range(2))
        _, first, groups = np.unique(trunks, return_index=True, return_inverse=True)
        values, vectors = np.linalg.eigh(covariance)
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T  # the one root that is symmetric
        uniforms = generator.uniform(size=(samples, runs))
        normals *= scales
        of_trunks = normals
        if len(first) < runs:
            of_trunks = generator.standard_normal((samples, len(first)))[:, groups] * scales
        drawn = Draws(draws @ root, normals, of_trunks, uniforms)
        kinship = (trunks[:, None] == trunks) * np.outer(scales, scales)
        return cls(model, covariance, drawn, np.arange(runs), scales**2, kinship)

    @classmethod
    def of_draws(cls, values: Array, draws: Array, seed: int) -> Noise:
        """Errors of numbers that carry draws already (samples, n); by their scatter alone where draws are NaN."""
        samples, count = draws.shape
        errors = draws - values
        covariance = np.atleast_2d(np.cov(errors, rowvar=False))
        if not np.all(np.diagonal(covariance) > 1e-24):  # NaN, or numbers that are exact
            return cls.of(np.zeros((count, count)), "scatter", samples, seed)
        generator = np.random.default_rng(seed)
        normals = generator.standard_normal((samples, count))
        drawn = Draws(errors, normals, normals, generator.uniform(size=(samples, count)))
        return cls("covariance", covariance, drawn, np.arange(count), np.ones(count), np.eye(count))

    @property
    def known(self) -> bool:
        """Whether the errors of the differences between losses are known: standard errors alone do not tell them."""
        return self.model == "covariance"

    @property
    def samples(self) -> int:
        return len(self.drawn.errors)

    @property
    def errors(self) -> Array:
        """Draws from N(0, V): (samples, n), a copy."""
        return self.drawn.errors[:, self.columns]

    def between(self, shared: float) -> Array:
        """Draws of the spread in units of tau, of which trunks have a share in common: (samples, n), a copy."""
        return self._between(slice(None), self.columns, shared)

    @property
    def variances(self) -> Array:
        return np.diagonal(self.covariance)

    def take(self, rows: npt.ArrayLike) -> Noise:
        """The noise of some of the runs, with their draws."""
        rows = np.asarray(rows, np.intp)
        square = np.ix_(rows, rows)
        return replace(
            self,
            covariance=self.covariance[square],
            columns=self.columns[rows],
            shares=self.shares[rows],
            kinship=self.kinship[square],
        )

    def averaged(self, groups: Sequence[npt.NDArray[np.intp]]) -> Noise:
        """The noise of the means of log losses over groups of runs."""
        means = np.zeros((len(groups), len(self.covariance)))
        for row, members in zip(means, groups, strict=True):
            row[members] = 1 / len(members)
        uniforms = self.drawn.uniforms[:, self.columns[[members[0] for members in groups]]]
        of_trunks = self.drawn.of_trunks[:, self.columns] @ means.T
        drawn = Draws(self.errors @ means.T, self.drawn.normals[:, self.columns] @ means.T, of_trunks, uniforms)
        covariance, kinship = (means @ matrix @ means.T for matrix in (self.covariance, self.kinship))
        return Noise(self.model, covariance, drawn, np.arange(len(groups)), means**2 @ self.shares, kinship)

    def weights(self, tau: float = 0.0) -> Array:
        """Inverse variances of the log losses; where errors are not known, one for each run of a mean.

        The diagonal alone: weighing by the whole inverse of an estimated, nearly singular matrix can put a fit
        outside of its points (Peelle's pertinent puzzle). Correlations enter by the draws.
        """
        return 1 / (self.variances + tau**2 * self.shares) if self.known else 1 / self.shares

    def spread(self, residuals: Array, design: Array) -> Spread:
        """tau from the residuals of a least-squares fit with ``weights()``, by moments.

        tau^2 = max(0, (RSS - tr(M V)) / tr(M I)), RSS weighted and M the residual maker of the weighted problem. Where
        runs share trunks, the sum of products of residuals within trunks is the second moment, for the share of tau^2
        that they have in common. Unknown where as many parameters as points leave nothing to judge by. ``residuals``
        are (n,), and ``design`` the derivatives of the fitted values by the parameters (n, p).
        """
        weights = self.weights()
        root = np.sqrt(weights)
        count, parameters = design.shape
        if count <= parameters:
            return UNKNOWN
        basis, _ = np.linalg.qr(root[:, None] * design)
        maker = np.eye(count) - basis @ basis.T
        known = maker @ (root[:, None] * self.covariance * root)
        alone = maker @ np.diag(weights * self.shares)
        squares, expected = float(np.sum(weights * residuals**2)), float(np.trace(known))
        chi_square = squares / expected if self.known else np.nan
        within = self.kinship - np.diag(np.diagonal(self.kinship))
        if not within.any():
            tau = np.sqrt(max(0.0, squares - expected) / np.trace(alone))
            return Spread(float(tau), count - parameters, chi_square)
        common = maker @ (root[:, None] * self.kinship * root)
        products = float(root * residuals @ within @ (root * residuals)) - float(np.sum(within * (known @ maker)))
        moments = np.array([
            [np.trace(alone), np.trace(common)],
            [np.sum(within * (alone @ maker)), np.sum(within * (common @ maker))],
        ])  # fmt: skip
        parts, _ = nnls(moments, np.array([max(0.0, squares - expected), products]))
        total = float(parts.sum())
        shared = float(parts[1] / total) if total > 0 else 0.0
        mixed = (1 - shared) * alone + shared * common
        dof = (count - parameters) * _freedom(mixed) / _freedom(alone)
        return Spread(float(np.sqrt(total)), dof, chi_square, shared)

    def draws(self, spread: Spread, rows: npt.NDArray[np.intp] | None = None) -> Array:
        """Errors of the log losses, or of some rows of them, in every draw: (samples, n). NaN where nothing is known.

        They are N(0, V + tau*^2 I); a draw's tau* is the same for all rows.
        """
        columns = self.columns if rows is None else self.columns[rows]
        return self._errors(slice(None), columns, self.drawn_tau(spread), spread.shared)

    def drawn_tau(self, spread: Spread) -> Array:
        """tau* of every draw (samples,), the same for all rows."""
        return drawn_tau(spread, self.drawn.uniforms[:, self.columns[0]])

    def blocks_of_draws(self, spread: Spread) -> Iterator[Array]:
        """``draws`` of all rows in blocks (samples of the block, n), so that not all are in memory at once."""
        tau = self.drawn_tau(spread)
        return (
            self._errors(block, self.columns, tau, spread.shared) for block in blocks(self.samples, len(self.columns))
        )

    def _errors(self, block: slice, columns: npt.NDArray[np.intp], tau: Array, shared: float) -> Array:
        errors = self._between(block, columns, shared)
        errors *= tau[block, None]
        errors += self.drawn.errors[block, columns]
        return errors

    def _between(self, block: slice, columns: npt.NDArray[np.intp], shared: float) -> Array:
        alone = self.drawn.normals[block, columns]
        if not shared:
            return alone
        return np.asarray(np.sqrt(1 - shared) * alone + np.sqrt(shared) * self.drawn.of_trunks[block, columns])

    def misfit(self, log_losses: Array, design: Array, spread: Spread = NOTHING) -> float:
        """How often errors alone would scatter about a linear fit as much as log losses (n,) do: a p-value.

        The test of lack of fit: the weighted sum of squares that least squares on the design (n, p) leaves, against
        those that it leaves of each draw of the errors. Correlations and the spread's own uncertainty are in the
        draws. NaN where no error is known, or nothing is left to judge by.
        """
        if len(log_losses) <= design.shape[1] or not (spread.known and (self.known or spread.tau > 0)):
            return np.nan
        root = np.sqrt(self.weights(spread.tau))
        basis, _ = np.linalg.qr(root[:, None] * design)

        def left(errors: Array) -> Array:
            weighted = root * errors
            return np.asarray(np.sum((weighted - (weighted @ basis) @ basis.T) ** 2, axis=-1))

        drawn = np.concatenate([left(block) for block in self.blocks_of_draws(spread)])
        return float(np.mean(drawn >= left(log_losses)))


def drawn_tau(spread: Spread, uniforms: Array) -> Array:
    """tau* of every draw: dof tau^2 / chi^2_dof, the spread's own uncertainty."""
    if not spread.tau > 0:  # zero, or NaN
        return np.full(len(uniforms), spread.tau)
    return spread.tau * np.sqrt(spread.dof / stats.chi2.ppf(uniforms, spread.dof))


def _freedom(matrix: Array) -> float:
    """Satterthwaite's degrees of freedom of a quadratic form: tr(A)^2 / tr(A^2)."""
    return float(np.trace(matrix) ** 2 / np.sum(matrix * matrix.T))
