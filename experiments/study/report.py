"""The study's report and its figures, from its tables.

    python experiments/study/report.py [--cpu FOLDER] [--gpu FOLDER] [--out REPORT.md]

Every number and table of the report comes from here; the words stand in `study.md.jinja`. A folder holds what
`make study-cpu` or `make study-gpu` collects; both default to the committed ones, and so does the report's place.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy import stats

import figures
from llada_lightning.compute.flops import Convention
from llada_lightning.compute.shapes import format_count
from llada_lightning.study.fits import (
    EnvelopePoint,
    Estimate,
    JointFit,
    Multiplier,
    Spread,
    StudyFits,
    budget_groups,
    fit_table,
    planned_flops,
    run_names,
)
from llada_lightning.study.reference import published_isoflop
from llada_lightning.study.results import covariance_path, read_covariance, read_results
from llada_lightning.study.tables import study as curves_report
from llada_lightning.support.files import written_atomically
from matched import Envelope, Matched, multipliers, shared_budgets, slope_weights
from read_offs import OBJECTIVES, ReadOffs
from report_text import flops, grid, interval, markdown, plus_minus, short_shape

HERE = Path(__file__).parent


@dataclass
class Study:
    """The tables of one study in a folder, and what the fits say of them."""

    folder: Path

    @cached_property
    def table(self) -> pd.DataFrame:
        return self.read("results")

    def read(self, name: str) -> pd.DataFrame:
        return read_results(self.folder / f"{name}.csv")

    def covariance(self, name: str) -> pd.DataFrame:
        return read_covariance(covariance_path(self.folder / f"{name}.csv"))

    @cached_property
    def fits(self) -> StudyFits:
        return fit_table(self.table, covariance=self.covariance("results"))

    @cached_property
    def variance(self) -> dict[str, Any]:
        return json.loads((self.folder / "variance.json").read_text())

    # --- tables as `llada curves` prints them ---

    def optima(self, convention: Convention = "6nd") -> str:
        return markdown(curves_report.optima_table(self.fits, convention))

    def laws(self, convention: Convention = "6nd") -> str:
        return markdown(curves_report.parameters_table(self.fits, convention))

    def multipliers(self, convention: Convention = "6nd") -> str:
        return markdown(curves_report.multiplier_table(self.fits, convention, "llada"))

    def held_out(self, convention: Convention = "6nd") -> str:
        return markdown(curves_report.held_out_table(self.fits, convention))

    def notes(self) -> str:
        doubts = [line for name in self.fits.conventions for line in curves_report.doubt_lines(self.fits, name)]
        return "\n".join(f"- {note}" for note in [*doubts, *self.fits.notes])

    # --- tables of its own ---

    def spent(self) -> str:
        """Training FLOPs behind all results of the main grid, shared trunks counted for each."""
        return f"{flops(self.table['flops_6nd'].sum())} and {flops(self.table['flops_total'].sum())}"

    def versions(self) -> str:
        found = json.loads(self.table["versions"].mode()[0])
        return ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "lightning"))

    def runs(self) -> str:
        """Every run of the main grid."""
        budgets = budget_groups(planned_flops(self.table))
        runs = self.table.assign(budget=budgets).sort_values(["objective", "budget", "params_nonembedding"])
        rows = [
            [
                *(run.objective, short_shape(run.shape), format_count(run.params_nonembedding)),
                *(flops(run.flops_6nd), flops(run.flops_total), format_count(run.tokens)),
                *(f"{run.epochs:.2g}", f"{run.lr:.2g}", plus_minus(run.val_nats_per_token, run.val_stderr)),
                f"{run.val_bits_per_byte:.3f}",
            ]
            for run in runs.itertuples()
        ]
        head = ["objective", "shape", "N", "6ND", "all FLOPs", "tokens", "epochs", "rate", "loss ± s.e.", "bits/byte"]
        return grid(head, rows)

    def tuning(self) -> str:
        """Loss by shape and learning rate, at the tuning's one budget."""
        table = self.read("tune")
        found = table.pivot_table(index=["objective", "shape"], columns="lr", values="val_nats_per_token")
        rates = [f"{rate:g}" for rate in found.columns]
        rows = []
        for (objective, shape), losses in found.iterrows():
            best = losses.min()
            cells = ["" if np.isnan(loss) else f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for loss in losses]
            rows.append([objective, short_shape(shape), *cells])
        return grid(["objective", "shape", *rates], rows)

    def seeds(self, objective: str) -> pd.DataFrame:
        """The runs of the noise floor: those of the seeds' table, and the main grid's at the same point."""
        own = _of(self.read("seeds"), objective)
        return pd.concat([same_point(self.table, own.iloc[0]), own], ignore_index=True).sort_values("seed")

    def noise_floor(self) -> str:
        rows = []
        for objective in OBJECTIVES:
            runs = self.seeds(objective)
            losses = runs["val_nats_per_token"]
            spread = Estimate.of(losses.std(ddof=1), deviations(losses.std(ddof=1), len(losses)))
            taus = (self.seed_spreads[objective].tau, self.fits.objectives[objective].spread.tau)
            point = f"{short_shape(runs['shape'].iloc[0])}, {flops(runs['flops_6nd'].iloc[0])}"
            numbers = (interval(spread, ".4f"), *(f"{value:.4f}" for value in (runs["val_stderr"].mean(), *taus)))
            rows.append([objective, point, ", ".join(f"{loss:.4f}" for loss in losses), *numbers])
        head = ["objective", "point", "losses", "s.d. over seeds", "s.e. over books", "s.d. over seeds of log loss",
                "the fits' spread of log loss beyond books"]  # fmt: skip
        return grid(head, rows)

    def repeats(self) -> pd.DataFrame:
        """Loss by distinct tokens, at the end and at best on the way; last the main grid's run, of fresh tokens."""
        runs, along = self.read("repeats"), pd.read_csv(self.folder / "repeats-history.csv")
        covariance = self.covariance("repeats")
        fresh = pd.concat([same_point(self.table, _of(runs, objective).iloc[0]) for objective in OBJECTIVES])
        rows = []
        for unique in sorted(runs["unique_tokens"].unique()):
            members = runs[runs["unique_tokens"] == unique].set_index("objective")
            error = difference_error(covariance, *run_names(members.loc[list(OBJECTIVES)]))
            limits = along[(along["train_tokens"] // 1000) == round(unique / 1000)]
            best = limits.groupby("objective")["val_nats_per_token"].min()
            rows.append(_repeat(members, error, best))
        main = fresh.set_index("objective")
        error = difference_error(self.covariance("results"), *run_names(main.loc[list(OBJECTIVES)]))
        rows.append(_repeat(main, error, main["val_nats_per_token"]))
        return pd.DataFrame(rows)

    def crossover(self) -> float:
        """Distinct tokens at which the two final losses meet, by a straight line over their logarithm."""
        found = self.repeats()
        after = int(np.argmax(found["difference"] > 0))
        tokens, gaps = (found[name].to_numpy(float)[after - 1 : after + 1] for name in ("unique", "difference"))
        return float(np.exp(np.interp(0.0, gaps, np.log(tokens))))

    def repeats_table(self) -> str:
        rows = []
        for row in self.repeats().to_dict("records"):
            losses = [plus_minus(row[name], row[f"{name}_stderr"]) for name in (*OBJECTIVES, "difference")]
            best = [f"{row[f'{name}_best']:.3f}" for name in OBJECTIVES]
            rows.append([format_count(row["unique"]), f"{row['epochs']:.3g}", *losses, *best])
        head = ["distinct tokens", "epochs", "`arm`", "`llada`", "`llada` − `arm`", "`arm`, best on the way",
                "`llada`, best on the way"]  # fmt: skip
        return grid(head, rows)

    def ablation(self, name: str) -> Estimate:
        """Mean difference in final loss from the reference over seeds, with Welch's 95 % interval."""
        changed, reference = (runs["val_nats_per_token"].to_numpy() for runs in (self.read(name), self.seeds("llada")))
        ends = stats.ttest_ind(changed, reference, equal_var=False).confidence_interval(0.95)
        return Estimate(float(changed.mean() - reference.mean()), float(ends.low), float(ends.high))

    def scatter_test(self, name: str) -> float:
        """p of Brown and Forsythe's test that an ablation's losses scatter over seeds as the reference's do."""
        runs = (self.read(name), self.seeds("llada"))
        return float(stats.levene(*(one["val_nats_per_token"] for one in runs), center="median").pvalue)

    def gaps(self) -> str:
        """By how much ``llada``'s best loss exceeds ``arm``'s at each budget that both have."""
        best = [self.fits.envelopes("6nd")[name].points for name in OBJECTIVES]
        covariance, rows = self.covariance("results"), []
        for pair in shared_budgets(*([point.flops for point in points] for points in best)):
            points = [own[budget] for own, budget in zip(best, pair, strict=True)]
            runs = self.table.set_index("run").loc[[point.run for point in points]].reset_index()
            error = difference_error(covariance, *run_names(runs))
            losses = [f"{plus_minus(own.loss, own.stderr)} ({short_shape(own.shape)})" for own in points]
            gap = plus_minus(points[1].loss - points[0].loss, error)
            rows.append([flops(points[0].flops), *losses, gap])
        return grid(["FLOPs (6ND)", "best `arm`", "best `llada`", "difference"], rows)

    @cached_property
    def read_offs(self) -> ReadOffs:
        """The multiplier with no law."""
        return ReadOffs(self.table, self.covariance("results"), self.seed_spreads, self.fits.samples)

    @cached_property
    def short_runs(self) -> pd.DataFrame:
        """The main grid and ``arm``'s short runs tuned anew, with their budgets by number."""
        runs = self.read("short")
        return runs.assign(budget=budget_groups(planned_flops(runs)))

    @cached_property
    def short_read_offs(self) -> ReadOffs:
        """Of the better of both for each shape and budget."""
        runs = self.short_runs.sort_values("val_nats_per_token")
        best = runs.drop_duplicates(["objective", "shape", "budget"]).sort_index(ignore_index=True)
        return ReadOffs(best, self.covariance("short"), self.seed_spreads, self.fits.samples)

    @cached_property
    def short_losses(self) -> pd.DataFrame:
        """``arm``'s best loss over rates by budget: in the main grid, and of the short runs by shape and sequences."""
        runs = _of(self.short_runs, "arm")
        batch = (runs["global_batch_tokens"] / runs["sequence_length"]).round().astype(int)
        how = runs["shape"].map(short_shape) + ", " + batch.astype(str)
        runs = runs.assign(how=how.mask(runs["run"].isin(self.table["run"]), "main grid"))
        found = runs.pivot_table(index="budget", columns="how", values="val_nats_per_token", aggfunc="min").dropna()
        found.insert(0, "main grid", found.pop("main grid"))
        return found.set_index(runs.groupby("budget")["flops_6nd"].mean().loc[found.index])

    def short_gain(self) -> str:
        """Range over budgets of what the short runs' best is below the main grid's."""
        losses = self.short_losses
        gains = losses["main grid"] - losses.drop(columns="main grid").min(axis=1)
        return f"{gains.min():.2f} to {gains.max():.2f}"

    def short(self) -> str:
        rows = [[flops(spent), *(f"{loss:.3f}" for loss in own)] for spent, own in self.short_losses.iterrows()]
        return grid(["FLOPs (6ND)", *self.short_losses.columns], rows)

    # --- single numbers ---

    def n_opt(self, objective: str, budget: float) -> str:
        """N at the IsoFLOP optimum nearest to a budget (6ND)."""
        budgets = self.fits.objectives[objective].isoflop["6nd"].budgets
        found = min(budgets, key=lambda own: abs(np.log(own.flops / budget))).n_opt
        return f"{format_count(found.value)} ({format_count(found.low)} to {format_count(found.high)})"

    def seed_deviation(self, objective: str) -> float:
        """Standard deviation of the final loss over the noise floor's seeds."""
        return float(self.seeds(objective)["val_nats_per_token"].std(ddof=1))

    def seeds_error(self) -> float:
        """What seeds add to the error of a difference between the objectives, nats."""
        return float(np.hypot(*(self.seed_deviation(objective) for objective in OBJECTIVES)))

    def best(self, objective: str, budget: float) -> EnvelopePoint:
        """The best measured run at the budget (6ND) nearest to some FLOPs."""
        points = self.fits.envelopes("6nd")[objective].points
        return min(points, key=lambda point: abs(np.log(point.flops / budget)))

    def not_reached_at(self, arm_flops: float) -> float:
        """Most FLOPs of ``llada`` over those of an ``arm`` whose measured loss it does not reach with them (6ND)."""
        arm, llada = self.best("arm", arm_flops), self.fits.envelopes("6nd")["llada"].points[-1]
        assert llada.loss > arm.loss
        return llada.flops / arm.flops

    @property
    def joint(self) -> JointFit:
        """The joint law of both objectives."""
        return self.fits.joint["llada"]

    def rejected(self, objective: str) -> str:
        """p-value of the lack of fit of an envelope's law (6ND)."""
        return f"{self.fits.envelopes('6nd')[objective].law.misfit:.1g}"

    def n_exponents(self, objective: str) -> dict[str, Estimate]:
        """Exponent of N_opt (6ND) with the optima weighted by their errors, and with all of one weight."""
        fit = self.fits.objectives[objective].isoflop["6nd"]
        assert fit.n_law is not None
        inside = [budget for budget in fit.budgets if budget.interior]
        slope = slope_weights(np.log([budget.flops for budget in inside]))
        drawn = np.stack([budget.drawn_log_n_opt for budget in inside], axis=1) @ slope
        value = slope @ np.log([budget.n_opt.value for budget in inside])
        return {"weighted": fit.n_law.exponent, "unweighted": Estimate.of(value, drawn)}

    def misfit(self) -> str:
        """log loss of ``arm``'s four least budgets less the law of its envelope."""
        envelope = self.fits.envelopes("6nd")["arm"]
        assert envelope.law is not None
        law, points = envelope.law, envelope.points[:4]
        return ", ".join(f"{np.log(point.loss / law.loss(point.flops)):+.3f}" for point in points)

    @cached_property
    def seed_spreads(self) -> dict[str, Spread]:
        """The same of log loss, with its degrees of freedom, by objective."""
        losses = {name: self.seeds(name)["val_nats_per_token"] for name in OBJECTIVES}
        return {name: Spread(float(np.log(own).std(ddof=1)), len(own) - 1, np.nan) for name, own in losses.items()}

    def ratio(self, kind: str, state: str, quantity: str) -> Estimate:
        """Variance with independent t over that with stratified t."""
        return _estimate(self.variance[kind][state]["iid_over_weyl"][quantity])

    def bound(self, estimator: str) -> Estimate:
        """Variance of a bound's estimator over that of Eq. 14 with stratified l."""
        return _estimate(self.variance["bound"]["over_eq14_stratified"][estimator])

    def trend(self, convention: Convention = "6nd") -> Estimate:
        """Exponent of the multiplier in the FLOPs of ``llada``, by the envelopes' laws."""
        arm, llada = (self.fits.envelopes(convention)[name].law for name in OBJECTIVES)
        return Estimate.of(1 - llada.b / arm.b, 1 - llada.draws[:, 1] / arm.draws[:, 1])

    def multiplier(self, arm_flops: float, convention: Convention = "6nd") -> Multiplier:
        return multiplier_at(self.fits, arm_flops, convention)


def multiplier_at(fits: StudyFits, arm_flops: float, convention: Convention = "6nd") -> Multiplier:
    """By the joint law, at the budget of ``arm`` nearest to some FLOPs."""
    entries = [m for m in fits.compute_multiplier if (m.convention, m.method) == (convention, "joint")]
    return min(entries, key=lambda entry: abs(np.log(entry.reference_flops / arm_flops)))


def read_off_points(fits: StudyFits) -> list[Matched]:
    """The multiplier (6ND) at ``arm``'s measured best losses, between two of ``llada``'s; of a study without errors."""
    points = [fits.envelopes("6nd")[name].points for name in OBJECTIVES]
    found = [[np.array([getattr(point, name) for point in own]) for name in ("flops", "loss")] for own in points]
    arm, llada = (Envelope(flops, losses, losses[None]) for flops, losses in found)
    shares = multipliers(llada, arm)  # FLOPs of arm over those of llada
    return [
        Matched(flops / shares[flops], loss, flops, Estimate(1 / shares[flops], np.nan, np.nan))
        for flops, loss in zip(arm.flops.tolist(), arm.losses.tolist(), strict=True)
        if flops in shares
    ]


def range_by_method(fits: StudyFits) -> str:
    """Of the multipliers by all methods (6ND) where both objectives reach the loss within their budgets."""
    shown = [m for m in fits.compute_multiplier if m.convention == "6nd" and m.shown and not m.extrapolated]
    values = [m.multiplier for m in shown]
    return f"{min(values):.3g} to {max(values):.3g}"


def _estimate(entry: dict[str, float]) -> Estimate:
    return Estimate(entry["value"], entry["low"], entry["high"])


def _of(table: pd.DataFrame, objective: str) -> pd.DataFrame:
    return table[table["objective"] == objective]


def same_point(table: pd.DataFrame, run: pd.Series) -> pd.DataFrame:
    """The main grid's one run of an objective, shape and number of steps."""
    same = np.logical_and.reduce([table[name] == run[name] for name in ("objective", "shape", "steps")])
    assert same.sum() == 1, f"{run['run']} has no counterpart in the main grid"
    return table[same]


def difference_error(covariance: pd.DataFrame, first: str, second: str) -> float:
    """Standard error of the difference of two losses over the validation documents that they share."""
    variance = covariance.loc[first, first] + covariance.loc[second, second] - 2 * covariance.loc[first, second]
    return float(np.sqrt(variance))


def deviations(sample_deviation: float, count: int) -> np.ndarray:
    """The two ends of a standard deviation's 95 % interval, from the chi-square of a normal sample."""
    degrees = count - 1
    return sample_deviation * np.sqrt(degrees / stats.chi2.ppf([0.975, 0.025], degrees))


def _repeat(members: pd.DataFrame, error: float, best: pd.Series) -> dict[str, float]:
    losses, stderr = members["val_nats_per_token"], members["val_stderr"]
    return {
        "unique": float(members["unique_tokens"].iloc[0]),
        "epochs": float(members["epochs"].iloc[0]),
        **{name: losses[name] for name in OBJECTIVES},
        **{f"{name}_stderr": stderr[name] for name in OBJECTIVES},
        **{f"{name}_best": best[name] for name in OBJECTIVES},
        "difference": losses["llada"] - losses["arm"],
        "difference_stderr": error,
    }


def published_fits() -> StudyFits:
    return fit_table(published_isoflop())


def write(report: Path, cpu: Path, gpu: Path) -> None:
    """Draws the figures into the folders of tables, and writes the report, which shows them."""
    studies = {"cpu": Study(cpu), "gpu": Study(gpu)}
    published = published_fits()
    figures.draw(studies["cpu"], studies["gpu"], read_off_points(published), report.with_suffix(""))
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    environment.filters |= {"interval": interval, "flops": flops, "count": format_count, "num": "{:.3g}".format}
    places = {f"{name}_folder": os.path.relpath(study.folder, report.parent) for name, study in studies.items()}
    text = environment.get_template("study.md.jinja").render(
        **studies,
        **places,
        own_folder=report.stem,
        published_at=partial(multiplier_at, published),
        published_read=read_off_points(published)[0],
        published_range=range_by_method(published),
    )
    with written_atomically(report) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", type=Path, default=HERE / "cpu")
    parser.add_argument("--gpu", type=Path, default=HERE / "gpu")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "study.md")
    options = parser.parse_args()
    write(options.out, options.cpu, options.gpu)
