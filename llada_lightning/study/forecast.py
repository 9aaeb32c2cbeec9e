"""Forecasts: the best loss at budgets that are not yet run, written before they are, and scored when they are.

A forecast file says what every method predicts, from which table, and when. It holds a hash of all that, so that a
forecast that was changed afterwards is told from one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import METHODS, Estimate, Method, StudyFits, Unit
from llada_lightning.study.fits.held_out import is_inside
from llada_lightning.study.fits.least_squares import interval
from llada_lightning.study.fits.multiplier import EXTRAPOLATION
from llada_lightning.study.fits.runs import BUDGET_TOLERANCE
from llada_lightning.study.fits.uncertainty import drawn_tau
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import json_sha256, strict_json, write_json
from llada_lightning.support.reading import read_json

FORMAT = "llada-lightning forecast"
VERSION = 1
DATA_COLUMNS = ("data_fingerprint", "tokenizer", "sequence_length")
"""What the losses of a table are of; a forecast is scored against the same alone."""


@dataclass(frozen=True)
class Prediction:
    """The best loss of an objective at a budget, with the 95 % interval for the measured loss."""

    objective: str
    method: Method
    flops: float
    loss: float
    low: float
    high: float
    passed: bool | None
    """Whether the method passed its held-out test on the table; None where it had none."""

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.loss, self.low, self.high)


@dataclass(frozen=True)
class Forecast:
    """What a table of results makes expect of budgets that it does not have."""

    created: str
    """The time of writing, UTC."""
    results: dict[str, Any]
    """Of the table: its name, the SHA-256 of its file, the number of its runs and the largest budgets."""
    data: dict[str, Any]
    """The data that the losses are of."""
    unit: Unit
    convention: Convention
    samples: int
    seed: int
    predictions: tuple[Prediction, ...]
    yardstick: str | None = None
    sha256: str = field(default="", compare=False)
    """The hash of all else."""


@dataclass(frozen=True)
class Scored:
    """A prediction and what was measured since."""

    prediction: Prediction
    observed: float | None
    """The best measured loss at the budget; None: the budget is not run yet."""

    @property
    def inside(self) -> bool | None:
        """Whether the measured loss is within the interval."""
        return None if self.observed is None else is_inside(self.observed, self.prediction.estimate)

    def as_dict(self) -> dict[str, Any]:
        error = None if self.observed is None else self.prediction.loss / self.observed - 1
        return {**asdict(self.prediction), "observed": self.observed, "relative_error": error, "inside": self.inside}


def make_forecast(
    fits: StudyFits, table: pd.DataFrame, flops: Sequence[float], convention: Convention, source: dict[str, Any]
) -> Forecast:
    """The forecast of every objective by every method that has a law, at FLOPs by a convention.

    Args:
        fits: The fits of the table.
        table: The usable runs.
        flops: The budgets.
        convention: The convention by which the budgets are counted.
        source: The name of the table (``file``) and the SHA-256 of its file (``sha256``).

    Raises:
        UserError: A budget is not beyond the largest of any objective, or too far, or no method has a law.
    """
    fits.check_counted(convention)
    largest = {name: own.envelope[convention].flops_range[1] for name, own in fits.objectives.items()}
    predictions = [
        prediction
        for budget in sorted(flops)
        for name in _within_reach(budget, largest)
        for prediction in _predicted(fits, name, budget, convention)
    ]
    if not predictions:
        raise UserError("forecast: no method has a law; it needs three budgets of an objective, so run more budgets")
    results = {**source, "runs": len(table), "largest_budgets": largest}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    settings = (fits.unit, convention, fits.samples, fits.seed)
    return Forecast(now, results, _data_of(table), *settings, tuple(predictions), fits.yardstick)


def _data_of(table: pd.DataFrame) -> dict[str, Any]:
    """What the losses of a table are of, as JSON holds it."""
    return {column: table[column].astype(object).tolist()[0] for column in DATA_COLUMNS}


def _within_reach(budget: float, largest: dict[str, float]) -> list[str]:
    """The objectives whose loss at a budget is predicted: it is beyond their largest one, and not too far.

    Raises:
        UserError: There is none.
    """
    found = [name for name, flops in largest.items() if BUDGET_TOLERANCE * flops < budget <= EXTRAPOLATION * flops]
    if not found:
        shown = ", ".join(f"{flops:.3g} of {name}" for name, flops in largest.items())
        raise UserError(
            f"forecast: {budget:.3g} FLOPs cannot be predicted; give --flops of {BUDGET_TOLERANCE:g} to "
            f"{EXTRAPOLATION:g} times a largest budget of the results ({shown})"
        )
    return found


def _predicted(fits: StudyFits, name: str, budget: float, convention: Convention) -> list[Prediction]:
    found = []
    others = [name] if name != fits.reference else fits.compared[:1] or [name]
    generator = np.random.default_rng(fits.seed)
    uniforms = generator.uniform(size=(2, fits.samples))
    normals = generator.standard_normal((3, fits.samples))
    own_fits = fits.objectives[name]
    for method in METHODS:
        line = fits.line(name, method, convention, others[0])
        if line is None or not line.decades:
            continue
        # The measured loss has its own error and the spread of its run, and the law misses points by its own scatter.
        beside = own_fits.error * normals[2]
        for spread, own, normal in zip((line.scatter, own_fits.spread), uniforms, normals, strict=False):
            beside += np.nan_to_num(drawn_tau(spread, own)) * normal
        low, high = np.exp(interval(np.log(line.drawn([budget])[:, 0]) + beside))
        tests = [
            own.inside
            for own in fits.held_out
            if (own.objective, own.method, own.convention) == (name, method, convention)
        ]
        passed = None if not tests else all(tests)
        found.append(Prediction(name, method, budget, float(line.loss([budget])[0]), float(low), float(high), passed))
    return found


def score(forecast: Forecast, fits: StudyFits, table: pd.DataFrame) -> list[Scored]:
    """Each prediction beside the measured loss, as far as the table has its budget.

    Args:
        forecast: The forecast.
        fits: The fits of the later table.
        table: The usable runs of the later table.

    Raises:
        UserError: The table's losses are of other data, in another unit or by another yardstick.
    """
    for column, own in _data_of(table).items():
        if own != forecast.data.get(column):
            raise UserError(
                f"forecast: it is of {column} {forecast.data.get(column)!r}, and the results are of {own!r}; "
                "score it with results of the same data"
            )
    for name in ("unit", "yardstick"):
        if getattr(forecast, name) != getattr(fits, name):
            given, own = getattr(forecast, name), getattr(fits, name)
            raise UserError(f"forecast: its {name} is {given}, and that of the fits is {own}; give --{name} {given}")
    fits.check_counted(forecast.convention)
    found = []
    for prediction in forecast.predictions:
        own = fits.objectives.get(prediction.objective)
        points = own.envelope[forecast.convention].points if own else []
        distance = [abs(np.log(point.flops / prediction.flops)) for point in points]
        near = points and min(distance) < np.log(BUDGET_TOLERANCE)
        observed = points[int(np.argmin(distance))].loss if near else None
        found.append(Scored(prediction, observed))
    return found


# --- the file --------------------------------------------------------------------------------------------------------


def write_forecast(path: Path, forecast: Forecast) -> None:
    """Writes a forecast as JSON with the hash of its content. A file that is there is kept.

    Raises:
        UserError: There is such a file: a forecast is not written twice.
    """
    if path.exists():
        raise UserError(f"{path}: a forecast is there already, and is not changed; give another --out")
    content = _content(forecast)
    write_json(path, {"format": FORMAT, "version": VERSION, **content, "sha256": json_sha256(content)})


def read_forecast(path: Path) -> Forecast:
    """Reads a forecast.

    Raises:
        UserError: It is no forecast of this version, or was changed after it was written.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: no forecast; `llada forecast` writes one")
    if found.get("version") != VERSION:
        raise UserError(f"{path}: a forecast of version {found.get('version')}; this program reads version {VERSION}")
    content = {name: value for name, value in found.items() if name not in ("format", "version", "sha256")}
    if json_sha256(content) != found.get("sha256"):
        raise UserError(f"{path}: it was changed after it was written (its hash does not match); it is not scored")
    predictions = tuple(Prediction(**entry) for entry in content.pop("predictions"))
    return Forecast(**cast(dict[str, Any], content), predictions=predictions, sha256=found["sha256"])


def _content(forecast: Forecast) -> dict[str, Any]:
    """What the hash is of, as JSON holds it."""
    return {name: strict_json(value) for name, value in asdict(forecast).items() if name != "sha256"}
