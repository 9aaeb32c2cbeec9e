"""Fits: they recover laws that are known, obey the laws of a power law, and refuse what cannot be compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_lightning.errors import UserError
from llada_lightning.files import strict_json
from llada_lightning.scaling.fits import (
    PowerLaw,
    best_of_budgets,
    budget_groups,
    check_comparable,
    fit_power_law,
    fit_table,
    usable_runs,
)
from llada_lightning.scaling.results import table_of_records
from studies import LAWS, record, study

BUDGETS = np.geomspace(1e15, 1e18, 7)
factors = st.floats(1e-3, 1e3)


def noisy_fit(seed: int, a: float = 3.0, b: float = 0.1, error: float = 0.01) -> PowerLaw:
    generator = np.random.default_rng(seed)
    truth = a * (BUDGETS / 3e16) ** -b
    loss = truth * (1 + error * generator.standard_normal(len(BUDGETS)))
    return fit_power_law(BUDGETS, loss, error * truth, c0=3e16, samples=400)


def test_an_exact_law_is_recovered_exactly() -> None:
    law = fit_power_law(BUDGETS, 3.0 * (BUDGETS / 3e16) ** -0.1, 0.01 * np.ones(7), c0=3e16)
    assert law.a == pytest.approx(3.0)
    assert law.b == pytest.approx(0.1)
    assert law.residual < 1e-12
    assert law.error_scale == 1.0
    assert law.flops(law.loss(5e17)) == pytest.approx(5e17)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    fits = [noisy_fit(seed) for seed in range(200)]
    covers_a = np.mean([law.interval_a[0] <= 3.0 <= law.interval_a[1] for law in fits])
    covers_b = np.mean([law.interval_b[0] <= 0.1 <= law.interval_b[1] for law in fits])
    bands = [law.band([1e18]) for law in fits]
    truth = 3.0 * (1e18 / 3e16) ** -0.1
    covers_loss = np.mean([low[0] <= truth <= high[0] for low, high in bands])
    # 95 %, with a binomial standard error of 1.5 points; the scaled-up errors of scattered points only add.
    assert min(covers_a, covers_b, covers_loss) >= 0.90


@given(factor=factors)
@settings(max_examples=30)
def test_the_reference_flops_do_not_change_the_law(factor: float) -> None:
    one = noisy_fit(1)
    other = fit_power_law(BUDGETS, one.loss(BUDGETS), 0.01 * np.ones(7), c0=one.c0 * factor, samples=100)
    np.testing.assert_allclose(other.loss(BUDGETS), one.loss(BUDGETS), rtol=1e-9)
    assert other.b == pytest.approx(one.b)


@given(flops_factor=factors, loss_factor=factors)
@settings(max_examples=30)
def test_units_do_not_change_the_exponent(flops_factor: float, loss_factor: float) -> None:
    generator = np.random.default_rng(2)
    loss = 3.0 * (BUDGETS / 3e16) ** -0.1 * np.exp(0.02 * generator.standard_normal(7))
    stderr = loss * generator.uniform(0.01, 0.03, 7)
    one = fit_power_law(BUDGETS, loss, stderr, samples=200)
    other = fit_power_law(BUDGETS * flops_factor, loss * loss_factor, stderr * loss_factor, samples=200)
    assert other.b == pytest.approx(one.b, rel=1e-9)
    assert other.a == pytest.approx(one.a * loss_factor)
    np.testing.assert_allclose(other.interval_b, one.interval_b, rtol=1e-9)


def test_a_point_weighs_by_its_error() -> None:
    loss = 3.0 * (BUDGETS / 3e16) ** -0.1
    loss[0] *= 1.2
    trusted = fit_power_law(BUDGETS, loss, 0.01 * loss)
    doubted = fit_power_law(BUDGETS, loss, np.where(np.arange(7) == 0, 1.0, 1e-3) * loss)
    assert abs(doubted.b - 0.1) < 1e-3 < abs(trusted.b - 0.1)


def test_errors_grow_where_the_law_does_not_hold() -> None:
    bent = 2.0 + 3.0 * (BUDGETS / 3e16) ** -0.3
    law = fit_power_law(BUDGETS, bent, 1e-4 * bent)
    assert law.error_scale > 10
    assert law.interval_b[1] - law.interval_b[0] > 0.01


@pytest.mark.parametrize("missing", [np.nan, 0.0])
def test_unknown_errors_are_taken_from_the_scatter(missing: float) -> None:
    generator = np.random.default_rng(3)
    loss = 3.0 * (BUDGETS / 3e16) ** -0.1 * np.exp(0.01 * generator.standard_normal(7))
    law = fit_power_law(BUDGETS, loss, np.full(7, missing))
    assert law.interval_b[0] < 0.1 < law.interval_b[1]
    assert law.interval_b[1] - law.interval_b[0] < 0.02


def test_too_few_points_say_how_many_are_needed() -> None:
    with pytest.raises(UserError, match="2 budgets, a power law needs at least 3"):
        fit_power_law([1.0, 2.0], [2.0, 1.0], [0.1, 0.1])


# --- budgets and envelope ---


@given(st.lists(st.floats(1e9, 1e24), min_size=1, max_size=6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_groups_do_not_depend_on_the_order_of_rows(budgets: list[float], repeats: int, shuffle: object) -> None:
    flops = [budget * (1 + 0.01 * number) for budget in budgets for number in range(repeats)]
    groups = dict(zip(flops, budget_groups(flops), strict=True))
    shuffle.shuffle(flops)  # type: ignore[attr-defined]
    assert dict(zip(flops, budget_groups(flops), strict=True)) == groups
    assert sorted(set(groups.values())) == list(range(max(groups.values()) + 1))


def test_whole_steps_do_not_split_a_budget() -> None:
    flops = [3.0e11, 2.95e11, 3.1e11, 1e12, 1.04e12]
    assert list(budget_groups(flops)) == [0, 0, 0, 1, 1]


def test_the_best_run_of_each_budget() -> None:
    runs = table_of_records([
        record("arm", "107k", 3e11, 4.4), record("arm", "443k", 3e11, 4.5),
        record("arm", "107k", 1e12, 4.1), record("arm", "443k", 1e12, 4.0),
    ])  # fmt: skip
    assert best_of_budgets(runs, "6nd", "nats_per_token") == [0, 3]


def test_a_run_that_a_cheaper_one_beats_is_not_on_the_envelope() -> None:
    records = [record("arm", "107k", budget, loss) for budget, loss in [(3e11, 4.4), (1e12, 4.5), (3e12, 4.0)]]
    (envelope,) = fit_table(table_of_records(records)).envelopes.values()
    assert [point.loss for point in envelope.points] == [4.4, 4.0]
    assert envelope.law is None
    assert "at least 3 are needed" in envelope.as_dict()["note"]
    assert not {"a", "b", "interval_b"} & set(envelope.as_dict())


def test_unfinished_and_diverged_runs_are_not_fitted() -> None:
    records = [record("arm", "107k", 1e12, 4.0), record("arm", "443k", 1e12, 1.0, status="running")]
    records.append(record("arm", "214k", 1e12, float("nan")))
    assert list(usable_runs(table_of_records(records))["shape"]) == ["107k"]
    with pytest.raises(UserError, match="none of 2 rows"):
        fit_table(table_of_records(records[1:]))


# --- both objectives ---


def test_a_study_gives_back_its_laws_and_their_multiplier() -> None:
    fits = fit_table(study(budgets=(1e11, 3e11, 1e12, 3e12, 1e13), noise=0.003))
    for objective, (a, b) in LAWS.items():
        law = fits.envelopes[objective].law
        assert law is not None
        assert law.interval_b[0] < b < law.interval_b[1]
        assert law.loss(1e12) == pytest.approx(a, rel=0.01)
    truth = (LAWS["llada"][0] / LAWS["arm"][0]) ** (1 / 0.08)  # equal exponents: the same at every loss
    assert fits.compute_multiplier
    for entry in fits.compute_multiplier:
        assert entry.low < truth < entry.high
        assert entry.low < entry.multiplier < entry.high
        assert 0.99e11 < entry.arm_flops < 1.01e13 / entry.multiplier  # no extrapolation


def test_without_a_common_loss_there_is_no_multiplier() -> None:
    table = study()
    llada = table["objective"] == "llada"
    table.loc[llada, "val_nats_per_token"] *= 2
    assert fit_table(table).compute_multiplier == []


def test_the_unit_changes_the_scale_and_nothing_else() -> None:
    nats, bits = fit_table(study(), unit="nats_per_token"), fit_table(study(), unit="bits_per_byte")
    for one, other in zip(nats.envelopes.values(), bits.envelopes.values(), strict=True):
        assert one.law is not None
        assert other.law is not None
        assert other.law.b == pytest.approx(one.law.b)
        assert other.law.a == pytest.approx(0.45 * one.law.a)


def test_the_total_convention_counts_more_flops() -> None:
    by_6nd, total = fit_table(study(), "6nd"), fit_table(study(), "total")
    for objective in LAWS:
        assert total.envelopes[objective].points[0].flops > by_6nd.envelopes[objective].points[0].flops


def test_fits_json_is_strict_and_repeatable() -> None:
    written = fit_table(study(), seed=5).as_dict()
    assert written == fit_table(study(), seed=5).as_dict()
    assert json.loads(json.dumps(strict_json(written), allow_nan=False))["settings"]["seed"] == 5
    assert set(written) == {"settings", "arm", "llada", "compute_multiplier"}
    assert set(written["arm"]["envelope"]["points"][0]) == {"flops", "loss", "stderr", "run", "shape"}
    assert set(written["compute_multiplier"][0]) == {
        "convention", "method", "arm_flops", "multiplier", "low", "high",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": "other"}, "tokenizer is mixed"),
        ({"data_fingerprint": "other"}, "data_fingerprint is mixed"),
        ({"objective": "mamba"}, "objective 'mamba' is not known"),
        ({"val_kind": "bound"}, "val_kind of arm is 'bound'; it must be 'exact'"),
    ],
)
def test_losses_that_cannot_be_compared_are_refused(change: dict[str, str], words: str) -> None:
    records = [record("arm", "107k", 1e12, 4.0), {**record("arm", "443k", 1e12, 4.0), **change}]
    with pytest.raises(UserError, match=words):
        check_comparable(table_of_records(records))
