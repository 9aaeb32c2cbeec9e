"""The hypotheses of the second study beside what was measured, in the order of the design (README.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from llada_lightning.compute.shapes import format_count
from llada_lightning.study.fits import Estimate
from llada_lightning.study.fits.runs import base_objective
from llada_lightning.support.printing import listed

if TYPE_CHECKING:
    from measured import Study

JUDGED_AT = 2e12
"""The budget that the first hypothesis is about, in total FLOPs of the objective."""
FORECAST_ERROR = 0.05
"""The error of a forecast that was expected, in nats per token."""


@dataclass(frozen=True)
class Outcome:
    """What a hypothesis said, and what came of it."""

    expected: str
    measured: str
    verdict: str


def judged(found: Estimate | None, low: float, high: float) -> str:
    """The verdict on an expected range, by the 95 % interval of what was measured."""
    if found is None:
        return "undecided"
    if found.high < low or found.low > high:
        return "refuted"
    return "as expected" if low <= found.low and found.high <= high else "undecided"


def worst(*verdicts: str) -> str:
    """The verdict on a hypothesis of several parts."""
    return max(verdicts, key=("as expected", "undecided", "refuted").index)


def told(found: Estimate, form: str) -> str:
    """A value with its 95 % interval in brackets."""
    value, low, high = (f"{number:{form}}" for number in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})".replace("inf", "∞")


def text(found: Estimate | None, form: str = ".3g") -> str:
    """A value with its 95 % interval, if there is one."""
    return "not measured" if found is None else told(found, form)


def outcomes(study: Study) -> Iterator[Outcome]:
    """The hypotheses one after the other."""
    at = study.at("llada", JUDGED_AT)
    multiplier = at and at.estimate
    yield Outcome("`llada` needs 30 to 90 times `arm`'s FLOPs at 2e12", text(multiplier), judged(multiplier, 30, 90))
    easy = study.over_llada("easy", "total")
    yield Outcome("`easy` needs 0.45 to 0.8 of `llada`'s FLOPs", text(easy), judged(easy, 0.45, 0.8))
    four, sixteen = (study.over_llada(name, "total") for name in ("block 4", "block 16"))
    yield Outcome(
        "`block 4` needs at most 0.5 of `llada`'s FLOPs, and `block 16` 0.7 to 1.3",
        listed([text(four), text(sixteen)]),
        worst(judged(four, 0, 0.5), judged(sixteen, 0.7, 1.3)),
    )
    uniform = study.over_llada("uniform", "total")
    yield Outcome("`uniform` needs more than twice `llada`'s FLOPs", text(uniform), judged(uniform, 2, np.inf))
    exponent = study.growth("llada")
    yield Outcome(
        "`llada`'s multiplier goes as its FLOPs to a power of -0.25 to +0.25",
        text(exponent, "+.2f"),
        judged(exponent, -0.25, 0.25),
    )
    slack = {name: rows[-1][-1] if (rows := study.exact[name]) else None for name in ("llada", "block 4")}
    yield Outcome(
        "the exact loss lowers the multiplier of `llada` to 0.75 to 0.95 of that by the bound, and of `block 4` to "
        "0.55 to 0.85",
        listed([text(found) for found in slack.values()]),
        worst(judged(slack["llada"], 0.75, 0.95), judged(slack["block 4"], 0.55, 0.85)),
    )
    if study.has("rules.csv"):
        gains = {name: study.gains(name)[-1][-1] for name in ("llada", "arm")}
        yield Outcome(
            "tuning lowers the loss of `llada` by 0.1 nats or more, and that of `arm` by at most 0.1",
            listed([text(found, "+.3f") for found in gains.values()]),
            worst(judged(gains["llada"], 0.1, np.inf), judged(gains["arm"], -np.inf, 0.1)),
        )
    if study.forecast:
        yield forecast(study)
    if study.has("few.csv"):
        yield crossover(study.few())


def forecast(study: Study) -> Outcome:
    """The forecast by the joint law."""
    joint = [own for own in study.scored if own.prediction.method == "joint"]
    errors = [abs(own.prediction.loss - own.observed) for own in joint if own.observed is not None]
    expected = (
        "the forecast by L(N, D) errs by less than 0.05 nats for each objective, and its intervals hold the losses"
    )
    if not errors:
        return Outcome(expected, "its budgets are not run", "undecided")
    inside = [own.inside is True for own in joint]
    measured = f"errors of {min(errors):.3f} to {max(errors):.3f} (joint law); {sum(inside)} of {len(inside)} inside"
    return Outcome(expected, measured, "as expected" if max(errors) < FORECAST_ERROR and all(inside) else "refuted")


def crossover(few: Mapping[tuple[int, str], Sequence[Few]]) -> Outcome:
    """Where `arm` with its best recipe, stopped in time, falls behind `llada` with its own."""
    best = {key: recipes[0] for key, recipes in few.items()}
    sizes = sorted({unique for unique, _ in best})
    behind = [unique for unique in sizes if best[unique, "llada"].best < best[unique, "arm"].best]
    outcome = (
        f"falls behind at {listed([format_count(unique) for unique in behind])}" if behind else "is ahead everywhere"
    )
    # Where `llada` is behind and still gains, longer runs might have crossed.
    open_ones = [unique for unique in sizes if unique not in behind and best[unique, "llada"].gains]
    still = f"; `llada` still gains at {listed([format_count(unique) for unique in open_ones])}" if open_ones else ""
    expected = [round(unique, -3) for unique in behind] == [25_000]
    return Outcome(
        "with few distinct tokens `arm` stays ahead down to 50 thousand, and falls behind at 25 thousand",
        f"of {listed([format_count(unique) for unique in sizes])}, `arm` {outcome}, by `llada`'s bound{still}",
        "as expected" if expected else "undecided" if min(sizes) in open_ones else "refuted",
    )


# --- few distinct tokens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Few:
    """What an objective reaches with so many distinct tokens by one recipe, as a mean over seeds."""

    recipe: str
    losses: Mapping[int, float]
    """The loss in nats per token by the tokens that are read in all; each length is a run with a decay of its own."""
    apart: float
    """How far the seeds lie apart at the best length, from the lowest to the highest loss."""

    @property
    def best(self) -> float:
        """The loss of the best length."""
        return min(self.losses.values())

    @property
    def gains(self) -> bool:
        """Whether the longest run is the best."""
        return self.losses[max(self.losses)] == self.best


def few(table: pd.DataFrame) -> dict[tuple[int, str], list[Few]]:
    """The recipes of each number of distinct tokens and objective, the best first.

    Args:
        table: Results of runs of several lengths, each with its own decay. Those that read no token twice are left out,
            as they do not tell how many tokens they were allowed.
    """
    repeated = table[table["epochs"] > 1].assign(variant=table["variant"].fillna(""))
    repeated["objective"] = repeated["objective"].map(base_objective)
    found: dict[tuple[int, str], list[Few]] = {}
    for (unique, objective, variant), own in repeated.groupby(["unique_tokens", "objective", "variant"]):
        losses = own.groupby("tokens")["val_nats_per_token"].agg(["mean", "min", "max"])
        best = losses.loc[losses["mean"].idxmin()]
        recipe = str(variant).replace("optimizer.", "").replace("_", " ").replace(";", ", ")
        means = {int(tokens): float(mean) for tokens, mean in losses["mean"].items()}
        found.setdefault((int(unique), str(objective)), []).append(
            Few(recipe or "none of these", means, float(best["max"] - best["min"]))
        )
    return {key: sorted(recipes, key=lambda one: one.best) for key, recipes in sorted(found.items())}
