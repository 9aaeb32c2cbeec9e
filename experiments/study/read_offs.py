"""The compute multiplier of one study read off its envelopes (``matched``), as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

import matched
from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.study.fits import Estimate, Spread, budget_groups, flops_column, noise_of_runs
from report_text import flops, grid, interval

OBJECTIVES = ("arm", "llada")
"""The two objectives of this study: the reference, and the one that is compared with it."""


@dataclass(frozen=True, eq=False)
class ReadOffs:
    """The read-off of a results table, with the joint errors of its losses and the spread over seeds."""

    results: pd.DataFrame
    covariance: pd.DataFrame
    seeds: dict[str, Spread]
    samples: int

    @cache  # noqa: B019 - as long-lived as the report
    def envelopes(self, convention: Convention, by_trunk: bool = True) -> dict[str, matched.Envelope]:
        noise, found = noise_of_runs(self.results, self.covariance, self.samples, seed=0), {}
        for objective in OBJECTIVES:
            rows = np.flatnonzero(self.results["objective"] == objective)
            runs, own = self.results.iloc[rows], noise.take(rows)
            found[objective] = matched.Envelope.of(runs, own, self.seeds[objective], convention, by_trunk=by_trunk)
        return found

    @cache  # noqa: B019
    def at(self, convention: Convention, *, by_trunk: bool = True, last: bool = True) -> matched.ReadOff:
        """``last``: with ``llada``'s largest budget."""
        arm, llada = (self.envelopes(convention, by_trunk)[objective] for objective in OBJECTIVES)
        return matched.read_off(arm, llada if last else llada.without(len(llada.flops) - 1))

    def table(self, convention: Convention = "6nd") -> str:
        """The multipliers, and their range where any one of ``arm``'s budgets is left out."""
        arm, llada = (self.envelopes(convention)[objective] for objective in OBJECTIVES)
        without = [matched.multipliers(arm.without(budget), llada) for budget in range(len(arm.flops))]
        rows = []
        for one in self.at(convention).rows:
            found = [by_flops[one.llada_flops] for by_flops in without if one.llada_flops in by_flops]
            cells = [flops(one.llada_flops), f"{one.loss:.3f}", flops(one.arm_flops), interval(one.multiplier)]
            none = " or none" if len(found) < len(without) else ""
            rows.append([*cells, f"{min(found):.3g} to {max(found):.3g}{none}"])
        head = [f"FLOPs of `llada` ({CONVENTION_NAMES[convention]})", "its best loss", "FLOPs of `arm` for that loss",
                "multiplier", "with a budget of `arm` left out"]  # fmt: skip
        return grid(head, rows)

    def growths(self) -> str:
        """How the multiplier changes with ``llada``'s FLOPs."""
        rows = []
        for convention, name in CONVENTION_NAMES.items():
            found = {
                "all": self.at(convention),
                "without the last": self.at(convention, last=False),
                "all, an error of seeds for each run": self.at(convention, by_trunk=False),
            }
            rows += [[name, used, interval(one.growth), interval(one.exponent, "+.2f")] for used, one in found.items()]
        return grid(["FLOPs", "rows", "last row over first", "exponent in `llada`'s FLOPs"], rows)

    def at_equal_flops(self) -> dict[str, Estimate]:
        """Exponents of the best losses over the budgets (6ND) that both objectives have, and their difference."""
        found = [self.envelopes("6nd")[objective] for objective in OBJECTIVES]
        pairs = zip(*matched.shared_budgets(*(own.flops for own in found)), strict=True)
        (arm, arm_draws), (llada, llada_draws) = (
            own.take(budgets).exponent() for own, budgets in zip(found, pairs, strict=True)
        )
        return {
            "arm": Estimate.of(arm, arm_draws),
            "llada": Estimate.of(llada, llada_draws),
            "difference": Estimate.of(llada - arm, llada_draws - arm_draws),
        }

    def near_best(self, convention: Convention = "total") -> str:
        """At ``llada``'s largest budget the multipliers of the shapes within a seed's deviation of the best."""
        arm, llada = (self.envelopes(convention)[objective] for objective in OBJECTIVES)
        runs = self.results[self.results["objective"] == "llada"]
        groups = budget_groups(runs["flops_6nd"])
        runs = runs[groups == groups.max()]
        losses, spent = (runs[name].to_numpy(float) for name in ("val_nats_per_token", flops_column(convention)))
        near = np.log(losses / losses.min()) < self.seeds["llada"].tau
        goals = losses[near] * llada.losses[-1] / losses.min()
        found = spent[near] / np.exp(matched.log_flops_for(goals[None], arm.flops, arm.losses[None])[0])
        return f"{found.min():.3g} to {found.max():.3g}"

    def range_of(self, objective: str, column: str, form: str = ",.0f") -> str:
        """Of the best runs between which it is read off, by 6ND; ``ratio`` is FLOPs over 6ND, ``head`` its share."""
        own, rows = self.envelopes("6nd")[objective].flops, self.at("6nd").rows
        used = [row.arm_flops if objective == "arm" else row.llada_flops for row in rows]
        first = max(int(np.searchsorted(own, min(used), side="right")) - 1, 0)
        kept = own[first : int(np.searchsorted(own, max(used) * (1 - 1e-9))) + 1]
        runs = self.results[(self.results["objective"] == objective) & self.results["flops_6nd"].isin(kept)]
        runs = runs.assign(ratio=runs["flops_total"] / runs["flops_6nd"], head=runs["flops_head"] / runs["flops_total"])
        return f"{runs[column].min():{form}} to {runs[column].max():{form}}"
