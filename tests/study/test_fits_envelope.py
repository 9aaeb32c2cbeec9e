"""The envelope: the best shape of each planned budget, whichever FLOPs are read off it, and no luck of the draw."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from helpers.studies import CHINCHILLA, independent_errors, record, simulated_study, true_multiplier
from llada_lightning.study.fits import EnvelopeFit, Estimate, fit_envelope, fit_table
from llada_lightning.study.fits.runs import in_canonical_order, noise_of_runs
from llada_lightning.study.results import table_of_records

BUDGETS = (1e11, 3e11, 1e12, 3e12, 1e13)


def test_a_run_that_a_cheaper_one_beats_is_not_on_the_envelope() -> None:
    records = [record("arm", "107k", budget, loss) for budget, loss in [(3e11, 4.4), (1e12, 4.5), (3e12, 4.0)]]
    (envelope,) = fit_table(table_of_records(records)).envelopes("6nd").values()
    assert [point.loss for point in envelope.points] == pytest.approx([4.4, 4.0])
    assert envelope.law is None
    assert "at least 3 are needed" in envelope.as_dict()["note"]
    assert not {"a", "b", "interval_b"} & set(envelope.as_dict())


def test_by_the_other_convention_the_best_of_each_planned_budget_is_read_off() -> None:
    table, _ = simulated_study(CHINCHILLA, noise=1e-9)
    fits = fit_table(table, samples=200)
    for name, own in fits.objectives.items():
        runs = table[table["objective"] == name]
        planned, total = own.envelope["6nd"].points, own.envelope["total"].points
        assert [point.run for point in total] == [point.run for point in planned]
        for point in total:
            assert point.flops == runs.loc[runs["run"] == point.run, "flops_total"].item()
    # The parametric law is exact here; a power law is nearest to it in the middle of the budgets.
    entries = {(e.method, e.reference_flops): e for e in fits.compute_multiplier if e.convention == "total"}
    middle = sorted({flops for _, flops in entries})[2]
    envelope, parametric = (entries[method, middle] for method in ("envelope", "parametric"))
    assert envelope.multiplier == pytest.approx(parametric.multiplier, rel=0.05)


# --- seeds and shapes ---


def seeded(spread: float, seeds: dict[str, int], number: int) -> pd.DataFrame:
    """Both objectives follow one law; two shapes are equally good at every budget; each is run with several seeds."""
    generator = np.random.default_rng(number)
    records = [
        record(
            objective, shape, budget, 4.0 * (budget / 1e12) ** -0.08 * np.exp(spread * generator.standard_normal()),
            run=f"{objective}-{shape}-{budget:.0e}-{seed}", seed=seed, val_stderr=1e-4,
        )
        for objective, count in seeds.items()
        for budget in BUDGETS
        for shape in ("107k", "443k")
        for seed in range(count)
    ]  # fmt: skip
    return table_of_records(records)


def middle_multiplier(table: pd.DataFrame) -> Estimate:
    entries = fit_table(table, samples=300, conventions=("6nd",)).compute_multiplier
    return min(entries, key=lambda entry: abs(np.log(entry.reference_flops / 1e12))).estimate


def test_runs_of_one_shape_are_averaged() -> None:
    table = seeded(0.02, {"arm": 4}, 0)
    (envelope,) = fit_table(table, samples=200, covariance=independent_errors(table)).envelopes("6nd").values()
    means = np.log(table["val_nats_per_token"]).to_numpy().reshape(len(BUDGETS), 2, 4).mean(axis=2)
    assert np.exp(means.min(axis=1)) == pytest.approx([point.loss for point in envelope.points])
    assert {point.replicates for point in envelope.points} == {4}
    assert envelope.points[0].stderr == pytest.approx(0.5e-4, rel=0.01)


def test_more_seeds_or_lucky_shapes_move_no_multiplier() -> None:
    uneven = [middle_multiplier(seeded(0.01, {"arm": 1, "llada": 4}, number)) for number in range(40)]
    assert np.mean([estimate.covers(1.0) for estimate in uneven]) >= 0.85
    logs = np.log([estimate.value for estimate in uneven])
    assert abs(logs.mean()) < 3 * logs.std() / np.sqrt(len(logs))


def arm_envelope(table: pd.DataFrame) -> EnvelopeFit:
    arm = in_canonical_order(table[table["objective"] == "arm"])
    return fit_envelope(arm, "6nd", "6nd", "nats_per_token", noise_of_runs(arm, None, 2000, 0))


def test_the_choice_of_the_best_is_in_the_interval() -> None:
    one_shape, two_shapes = (
        [arm_envelope(table[table["shape"].isin(shapes)]) for table in (seeded(0.02, {"arm": 1}, n) for n in range(40))]
        for shapes in (["107k"], ["107k", "443k"])
    )
    for fits in (one_shape, two_shapes):  # the loss at the middle, 4.0 whatever was chosen
        at_middle = [(fit.law.loss(1e12), *fit.law.band([1e12])) for fit in fits if fit.law]
        assert len(at_middle) == 40
        assert np.mean([low[0] <= 4.0 <= high[0] for _, low, high in at_middle]) >= 0.85


def test_a_multiplier_of_exact_losses_is_the_true_one_where_a_power_law_holds_nearly() -> None:
    near = {name: type(law)(0.0, law.A, 0.3, law.B, 0.3) for name, law in CHINCHILLA.items()}
    fits = fit_table(simulated_study(near, noise=1e-9)[0], samples=200, conventions=("6nd",))
    entries = [entry for entry in fits.compute_multiplier if entry.method == "envelope"]
    assert len(entries) >= 4
    for entry in entries:
        assert entry.multiplier == pytest.approx(true_multiplier(near, entry.reference_flops), rel=0.02)
