"""What the tables of the second study say: every number of its report that is not a single result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from llada_lightning.compute.flops import Convention, head_flops_per_token
from llada_lightning.compute.shapes import get_shape
from llada_lightning.study.fits import (
    BUDGET_TOLERANCE,
    EnvelopePoint,
    Estimate,
    LossLine,
    Method,
    Multiplier,
    StudyFits,
    compute_multipliers,
    fit_table,
    usable_runs,
)
from llada_lightning.study.fits.envelope import ReadOff
from llada_lightning.study.fits.rules import ObjectiveRules, fit_rules
from llada_lightning.study.fits.runs import budget_members, is_budget
from llada_lightning.study.forecast import Forecast, Scored, read_forecast, score
from llada_lightning.study.results import covariance_path, read_covariance, read_results
from llada_lightning.study.yardstick import with_yardstick, yardstick_names
from outcomes import Few, few

NAMES = {
    "arm": "arm",
    "llada": "llada",
    "llada [density=range(low=0.05,high=0.6);loss_weight=ce]": "easy",
    "block [block_length=4]": "block 4",
    "block": "block 16",
    "uniform": "uniform",
}
"""The names of the report by those of the fits."""
FULL_NAMES = {short: full for full, short in NAMES.items()}
LEFT_THE_PLATEAU = 2e12
"""The total FLOPs from which on the growth of a multiplier is told."""
POLICIES = {"llada": "confidence@1", "easy": "confidence@1", "block 4": "random_order@1"}
"""The exact yardstick that is measured of an objective."""


@dataclass
class Study:
    """The tables of the study in a folder, and what the fits say of them."""

    folder: Path

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.folder / name).exists()

    def table(self, name: str) -> pd.DataFrame:
        return read_results(self.folder / f"{name}.csv")

    def covariance(self, name: str, yardstick: str | None = None) -> pd.DataFrame:
        return read_covariance(covariance_path(self.folder / f"{name}.csv", yardstick))

    @cached_property
    def fits(self) -> StudyFits:
        return fit_table(self.table("results"), covariance=self.covariance("results"))

    @cached_property
    def results(self) -> pd.DataFrame:
        return usable_runs(self.table("results"))

    @cached_property
    def others(self) -> list[str]:
        """The objectives beside `arm`, by the names of the report."""
        return [NAMES[name] for name in self.fits.compared]

    # --- the compute multiplier ---

    def multipliers(
        self, name: str, convention: Convention, method: Method = "read-off", fits: StudyFits | None = None
    ) -> list[Multiplier]:
        """The multipliers over `arm` at the budgets of an objective, as far as both losses are measured."""
        wanted = (FULL_NAMES[name], convention, method)
        return [
            entry
            for entry in (fits or self.fits).multiplier_at_own_budgets
            if (entry.objective, entry.convention, entry.method) == wanted and not entry.extrapolated
        ]

    def _joined(self, name: str, convention: Convention = "total") -> ReadOff:
        joined = self.fits.objectives[FULL_NAMES[name]].envelope[convention].read_off
        assert joined is not None
        return joined

    @cached_property
    def total(self) -> dict[str, list[Multiplier]]:
        """The multipliers of all objectives in total FLOPs, read off."""
        return {name: self.multipliers(name, "total") for name in self.others}

    def at(self, name: str, flops: float) -> Multiplier | None:
        """The multiplier over `arm` at a budget of the objective, in total FLOPs, read off."""
        return next((own for own in self.total[name] if is_budget([own.objective_flops, flops])), None)

    def uncorrected(self, name: str) -> float:
        """The multiplier at the largest budget, read off the lowest means as they are, with their luck."""
        own, arm = (self._uncorrected_line(one) for one in (name, "arm"))
        return over(own, arm, self.best(name).flops)[0].multiplier

    def lowered(self, name: str, by: float) -> float:
        """The multiplier at the largest budget if the best losses were lower by some nats per token."""
        joined = self._joined(name)
        own = replace(joined, log_loss=np.log(np.exp(joined.log_loss) - by)).line()
        return over(own, self._joined("arm").line(), self.best(name).flops)[0].multiplier

    def _uncorrected_line(self, name: str) -> LossLine:
        means = np.log([point.loss for point in self._points(name)])
        return replace(self._joined(name), log_loss=means).line()

    def computed(self, name: str) -> float:
        """The share of the total FLOPs of the best shape at the largest budget that its runs compute.

        A budget counts every block whole. In the last block, masked and block diffusion compute the output projection
        of attention and the feed-forward layer of scored positions alone, and of a clean copy only keys and values.
        """
        if name == "uniform":  # which scores all positions
            return 1.0
        run = self.results[self.results["run"] == self.best(name).run].iloc[0]
        shape = get_shape(run["shape"])
        projection, feed_forward = shape.d_model**2, 3 * shape.d_model * shape.d_ff
        scored = run["flops_head"] / head_flops_per_token(shape, run["vocab_size"]) / run["tokens"]
        copied = (run["flops_total"] - run[["flops_6nd", "flops_attention", "flops_head"]].sum()) / run["flops_6nd"]
        left_out = (1 - scored) * (projection + feed_forward) + copied * (2 * projection + feed_forward)
        return float(1 - 6 * left_out * run["tokens"] / run["flops_total"])

    def best(self, name: str) -> EnvelopePoint:
        """The best shape of the largest budget."""
        return self._points(name)[-1]

    def tokens(self, run: str) -> float:
        """The tokens that a run reads."""
        return float(self.results.loc[self.results["run"] == run, "tokens"].iloc[0])

    def loss(self, name: str) -> float:
        """The best loss of the largest budget as it is read off: less the luck of the best."""
        return float(np.exp(self._joined(name).log_loss[-1]))

    def joint(self, name: str) -> Estimate | None:
        """The multiplier by the joint law at the largest budget."""
        found = self.multipliers(name, "total", "joint")
        return found[-1].estimate if found else None

    def laws(self, name: str) -> tuple[float, float] | None:
        """The least and the largest multiplier of the other methods at the largest budget."""
        methods: tuple[Method, ...] = ("isoflop", "parametric", "envelope")
        values = [found[-1].multiplier for own in methods if (found := self.multipliers(name, "total", own))]
        return (min(values), max(values)) if values else None

    def over_llada(self, name: str, convention: Convention) -> Estimate | None:
        """FLOPs of an objective over `llada`'s for the loss that the worse of the two reaches at its last budget."""
        own, llada = self._joined(name, convention), self._joined("llada", convention)
        if own.log_loss[-1] > llada.log_loss[-1]:
            found = over(own.line(), llada.line(), np.exp(own.log_c[-1]))
        else:
            found = [entry.inverse() for entry in over(llada.line(), own.line(), np.exp(llada.log_c[-1]))]
        return found[0].estimate if found else None

    def loss_over_llada(self, name: str) -> tuple[float, Estimate]:
        """By how much the mean loss exceeds that of `llada` at the largest budget of the objective.

        Of either it is that of the best shape with several seeds.

        Returns:
            The total FLOPs, and the difference in nats per token with Welch's 95 % interval over the seeds.
        """
        flops = self.best(name).flops
        return flops, welch(self.seeds(name, flops), self.seeds("llada", flops))

    def _points(self, name: str) -> list[EnvelopePoint]:
        return self.fits.objectives[FULL_NAMES[name]].envelope["total"].points

    def one_seed(self, name: str, flops: float) -> bool:
        """Whether the best shape of a budget was run once."""
        return any(point.replicates == 1 for point in self._points(name) if is_budget([point.flops, flops]))

    def seeds(self, name: str, flops: float) -> np.ndarray:
        """The losses of the best shape with several seeds at a budget."""
        shapes = of_budget(runs_of(self.results, name), flops).groupby("shape")["val_nats_per_token"]
        several = [own.to_numpy(float) for _, own in shapes if len(own) > 1]
        return min(several, key=np.mean)

    def growth(self, name: str) -> Estimate | None:
        """The exponent of the multiplier in the objective's own total FLOPs, from where it has left the plateau on."""
        kept = [own for own in self.total[name] if own.objective_flops > LEFT_THE_PLATEAU / BUDGET_TOLERANCE]
        return exponent(kept) if len(kept) > 1 else None

    def growing(self) -> dict[bool, list[str]]:
        """The objectives whose multiplier grows for certain from there on, and the others."""
        certain = {name: (own := self.growth(name)) is not None and own.low > 0 for name in self.others}
        return {told: [name for name in self.others if certain[name] == told] for told in (True, False)}

    # --- yardsticks ---

    @cached_property
    def exact(self) -> dict[str, list[tuple[float, Estimate, Estimate, Estimate]]]:
        """What the exact loss makes of the multipliers, by the objectives that have one."""
        return {name: self._exact(name) for name in POLICIES}

    def _exact(self, name: str) -> list[tuple[float, Estimate, Estimate, Estimate]]:
        """Over the results that have an exact loss.

        Returns:
            The budgets of the objective, the multiplier by the bound, that by the exact loss, and their quotient.
        """
        table, policy = self.results, POLICIES[name]
        if policy not in {own for names in yardstick_names(table).values() for own in names}:
            return []
        pair = table[table["objective"].isin([FULL_NAMES[name], "arm"])]
        exact, _ = with_yardstick(pair, policy)
        same = pair[pair["run"].isin(exact["run"])]
        covariances = self.covariance("results"), self.covariance("results", policy)
        bound, measured = (
            self.multipliers(name, "total", fits=fit_table(part, covariance=covariance, conventions=("total",)))
            for part, covariance in zip((same, exact), covariances, strict=True)
        )
        rows = []
        for first, second in zip(bound, measured, strict=True):
            assert first.draws is not None and second.draws is not None
            both = closed(first.draws) & closed(second.draws)
            drawn = second.draws[both] / first.draws[both]
            ratio = Estimate.of(second.multiplier / first.multiplier, drawn)
            rows.append((first.objective_flops, first.estimate, second.estimate, ratio))
        return rows

    # --- tuning ---

    @cached_property
    def rules(self) -> dict[str, ObjectiveRules]:
        """The optima of the tuning studies, by the names of the report."""
        found = fit_rules(self.table("tune"), covariance=self.covariance("tune")).objectives
        return {NAMES[name]: own for name, own in found.items()}

    def tuned_flops(self, name: str) -> float:
        """The largest budget of an objective's tuning study, in total FLOPs."""
        return float(runs_of(self.tuned, name)["flops_total"].max())

    @cached_property
    def tuned(self) -> pd.DataFrame:
        """The results of the tuning studies."""
        return usable_runs(self.table("tune"))

    def gains(self, name: str) -> list[tuple[float, Estimate]]:
        """What the tuned rates and batches are worth against the rules that ship with the package.

        Returns:
            By budget the total FLOPs, and the mean loss by the package's rules less that of the main grid at the same
            shape, in nats per token, with Welch's 95 % interval over seeds.
        """
        beside = self._beside_main(usable_runs(self.table("rules")), name)
        return [(flops, welch(by_rules, main)) for flops, by_rules, main in beside]

    def behind_tuning(self, name: str) -> list[tuple[float, float, float]]:
        """By budget how far the main grid is above the best run of the tuning study.

        Returns:
            Total FLOPs, and by how many nats per token two mean losses of the main grid exceed the lowest of tuning:
            that of the shape that was tuned, and that of the best shape.
        """
        rows = []
        for flops, tuned, main in self._beside_main(self.tuned, name):
            best = [point.loss for point in self._points(name) if is_budget([point.flops, flops])]
            if len(main) and best:
                rows.append((flops, float(main.mean() - tuned.min()), float(best[0] - tuned.min())))
        return rows

    def elsewhere(self) -> dict[str, list[tuple[float, int, float]]]:
        """Other rates and batches at the largest budget, by objective.

        Returns:
            The rate, the batch in sequences, and the loss less that of the main grid with the same shape and seed.
        """
        rows: dict[str, list[tuple[float, int, float]]] = {}
        for _, run in self._over_main("largest").sort_values(["lr", "global_batch_tokens"]).iterrows():
            batch = int(run["global_batch_tokens"] // run["sequence_length"])
            rows.setdefault(NAMES[run["objective"]], []).append((float(run["lr"]), batch, float(run["above"])))
        return rows

    def half_warmup(self) -> dict[str, list[tuple[float, list[float]]]]:
        """The main grid's rate and batch with half of its warmup, by objective.

        Returns:
            By budget the total FLOPs and, seed by seed, the loss less that of the main grid with the same shape.
        """
        rows: dict[str, list[tuple[float, list[float]]]] = {}
        for name, runs in self._over_main("warmup").sort_values("seed").groupby("objective"):
            for members in budget_members(runs["flops_total"]):
                own = runs.iloc[np.sort(members)]
                rows.setdefault(NAMES[name], []).append((float(own["flops_total"].mean()), list(own["above"])))
        return rows

    def _over_main(self, name: str) -> pd.DataFrame:
        """The runs of a table that the main grid has, too, with the same budget, shape and seed.

        Their column ``above`` has their loss less that of the main grid.
        """
        runs = usable_runs(self.table(name))
        runs = runs.merge(self.results, on=["objective", "shape", "seed"], suffixes=("", "_main"))
        runs = runs[[is_budget(pair) for pair in runs[["flops_total", "flops_total_main"]].to_numpy()]]
        return runs.assign(above=runs["val_nats_per_token"] - runs["val_nats_per_token_main"])

    def _beside_main(self, table: pd.DataFrame, name: str) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
        """By budget the total FLOPs, the losses of a table, and those of the main grid at the same shape."""
        runs, main = runs_of(table, name), runs_of(self.results, name)
        main = main[main["shape"] == runs["shape"].iloc[0]]
        for members in budget_members(runs["flops_total"]):
            own = runs.iloc[members]
            flops = float(own["flops_total"].mean())
            losses = (part["val_nats_per_token"].to_numpy(float) for part in (own, of_budget(main, flops)))
            yield flops, *losses

    # --- few distinct tokens ---

    def few_tuned(self) -> dict[tuple[int, str], list[Few]]:
        """All recipes at the smallest number of distinct tokens, with the seed that chose among them."""
        table = usable_runs(self.table("few"))
        return few(table[table["seed"] == 0])

    def few(self) -> dict[tuple[int, str], list[Few]]:
        """The chosen recipes at every number of distinct tokens, with seeds that had no part in the choice."""
        table = usable_runs(self.table("few"))
        return few(table[table["seed"] > 0])

    # --- the forecast ---

    @cached_property
    def forecast(self) -> Forecast | None:
        """The forecast that was written before the largest budgets were run; None where it is of other data."""
        path = self.folder / "forecast.json"
        forecast = read_forecast(path) if path.exists() else None
        same = forecast and (self.results["data_fingerprint"] == forecast.data["data_fingerprint"]).all()
        return forecast if same else None

    @cached_property
    def scored(self) -> list[Scored]:
        """The predictions of the forecast beside the losses, as far as their budgets are run."""
        assert self.forecast is not None
        return [own for own in score(self.forecast, self.fits, self.results) if own.observed is not None]

    def errors(self, name: str) -> dict[Method, str]:
        """The errors of the forecast by method; marked where the loss is outside, or a test had failed before."""
        return {
            own.prediction.method: f"{own.prediction.loss - own.observed:+.3f}"
            f"{'' if own.inside else ' †'}{' ‡' if own.prediction.passed is False else ''}"
            for own in (self.scored if self.forecast else [])
            if NAMES[own.prediction.objective] == name and own.observed is not None
        }


def over(own: LossLine, other: LossLine, flops: float) -> list[Multiplier]:
    """FLOPs of an objective over those of another one, at the loss that it reaches at FLOPs of its own.

    Returns:
        One multiplier, or none where a loss is not measured.
    """
    # As the other one over this one, since the loss is that of a budget of this one.
    found = compute_multipliers("other", "own", "total", "read-off", (other, own), [flops])
    return [entry.inverse() for entry in found if not entry.extrapolated]


def exponent(multipliers: Sequence[Multiplier]) -> Estimate:
    """The exponent of a multiplier in the objective's own FLOPs, by least squares of the logarithms.

    Args:
        multipliers: The multipliers at two budgets or more, with their draws.
    """
    x = np.log([own.objective_flops for own in multipliers])
    values = np.log([own.multiplier for own in multipliers])
    drawn = np.stack([own.draws for own in multipliers if own.draws is not None], axis=1)
    y = np.vstack([values, np.log(drawn[closed(drawn).all(axis=1)])])
    slopes = y @ (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    return Estimate.of(float(slopes[0]), slopes[1:])


def runs_of(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The usable runs of an objective."""
    return table[table["objective"] == FULL_NAMES[name]]


def of_budget(table: pd.DataFrame, flops: float) -> pd.DataFrame:
    """The results of a budget in total FLOPs."""
    return table[np.array([is_budget([own, flops]) for own in table["flops_total"]], bool)]


def welch(first: np.ndarray, second: np.ndarray) -> Estimate:
    """The difference of two means with Welch's 95 % interval."""
    ends = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return Estimate(float(first.mean() - second.mean()), float(ends.low), float(ends.high))


def closed(draws: np.ndarray) -> np.ndarray:
    """Which draws of a multiplier reach the loss: the others are 0 or infinite."""
    return (draws > 0) & np.isfinite(draws)
