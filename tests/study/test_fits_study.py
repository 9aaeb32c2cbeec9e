"""A study's fits as a whole: what fits.json holds, what changes nothing, what is held out and flagged."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.studies import CHINCHILLA, LAWS, Chinchilla, record, simulated_study, study
from llada_lightning.study.fits import METHODS, Estimate, StudyFits, fit_table
from llada_lightning.study.fits.agreement import MATERIAL
from llada_lightning.study.reference import published_isoflop
from llada_lightning.study.results import table_of_records
from llada_lightning.support.files import strict_json

STUDY, _ = simulated_study(CHINCHILLA, shapes=5, budgets=tuple(np.geomspace(1e17, 1e19, 5)))
FITS = fit_table(STUDY, samples=100)
factors = st.floats(1e-2, 1e2)


def numbers(fits: StudyFits) -> dict[str, float]:
    """Every exponent and multiplier with its interval: what no unit may change."""
    found: dict[str, float] = {}
    for name, own in fits.objectives.items():
        assert own.parametric
        estimates = {
            "envelope": own.envelope["6nd"].law.exponent if own.envelope["6nd"].law else None,
            "isoflop": own.isoflop["6nd"].n_law.exponent if own.isoflop["6nd"].n_law else None,
            "alpha": own.parametric.alpha,
            "beta": own.parametric.beta,
        }
        for key, estimate in estimates.items():
            assert estimate
            found |= {f"{name} {key} {end}": getattr(estimate, end) for end in ("value", "low", "high")}
    for entry in fits.compute_multiplier:
        key = f"{entry.convention} {entry.method} {entry.reference_flops:.4g}"
        found |= {f"{key} {end}": getattr(entry, end) for end in ("multiplier", "low", "high")}
    return found


def assert_same(fits: StudyFits, rel: float, *, by_position: bool = False) -> None:
    one, other = numbers(FITS), numbers(fits)
    if by_position:  # the keys hold FLOPs, which have changed
        assert list(other.values()) == pytest.approx(list(one.values()), rel=rel)
    else:
        assert other == pytest.approx(one, rel=rel)


def test_notes_of_one_run_of_each_objective_say_what_is_missing() -> None:
    table = table_of_records([record("arm", "107k", 1e10, 5.1), record("llada", "107k", 1e10, 5.9)])
    notes = fit_table(table, samples=100, conventions=("6nd",)).notes
    assert notes[0].startswith(
        "no common loss by 6ND: arm's loss is 5.100, llada's 5.900, so no multiplier is measured"
    )
    few = "all runs are of one shape; a parabola needs at least 3 at a budget; add shapes"
    assert f"arm, isoflop, 6nd: no fit: {few}" in notes
    assert any(note.startswith("arm, parametric: no fit: 1 run of 1 N and 1 D; at least 6 runs") for note in notes)


@given(st.permutations(range(len(STUDY))))
@settings(max_examples=3, deadline=None)
def test_the_order_of_rows_changes_nothing(order: list[int]) -> None:
    assert fit_table(STUDY.iloc[order], samples=100).as_dict() == FITS.as_dict()


@given(factors)
@settings(max_examples=4, deadline=None)
def test_the_unit_of_loss_changes_no_exponent_and_no_multiplier(factor: float) -> None:
    columns = ["val_nats_per_token", "val_stderr"]
    assert_same(fit_table(STUDY.assign(**{name: STUDY[name] * factor for name in columns}), samples=100), 1e-3)


def test_bits_per_byte_give_the_same_exponents() -> None:
    bits = fit_table(STUDY, unit="bits_per_byte", samples=100)
    assert_same(bits, 1e-3)
    for own, other in zip(FITS.objectives.values(), bits.objectives.values(), strict=True):
        assert own.parametric and other.parametric
        assert other.parametric.E.value == pytest.approx(0.45 * own.parametric.E.value, rel=1e-3)


@given(st.integers(1, 1000))
@settings(max_examples=4, deadline=None)
def test_the_unit_of_data_changes_no_exponent_and_no_multiplier(factor: int) -> None:
    columns = ["tokens", "flops_6nd", "flops_total"]
    scaled = STUDY.assign(**{name: STUDY[name] * factor for name in columns})
    assert_same(fit_table(scaled, samples=100), 1e-3, by_position=True)


def test_a_study_gives_back_its_laws_and_their_multiplier() -> None:
    fits = fit_table(study(budgets=(1e11, 3e11, 1e12, 3e12, 1e13), noise=0.003))
    for objective, (a, b) in LAWS.items():
        law = fits.objectives[objective].envelope["6nd"].law
        assert law is not None
        assert law.interval_b[0] < b < law.interval_b[1]
        assert law.loss(1e12) == pytest.approx(a, rel=0.01)
    truth = (LAWS["llada"][0] / LAWS["arm"][0]) ** (1 / 0.08)  # equal exponents: the same at every loss
    assert fits.compute_multiplier
    for entry in fits.compute_multiplier:
        if entry.method == "envelope" and entry.convention == "6nd":
            assert entry.low < truth < entry.high
            assert entry.low < entry.multiplier < entry.high
            assert entry.extrapolated == (entry.reference_flops * entry.multiplier > 1.01e13)


def test_without_a_common_loss_there_is_no_multiplier() -> None:
    table = study()
    llada = table["objective"] == "llada"
    table.loc[llada, "val_nats_per_token"] *= 2
    fits = fit_table(table, samples=100)
    assert fits.compute_multiplier == []
    assert fits.notes[0].startswith("no common loss by 6ND: ")
    assert fits.notes[1].startswith("no common loss by 6ND + attention + head: ")
    assert "so no multiplier is measured; add smaller budgets for arm or larger ones for llada" in fits.notes[0]


def test_one_objective_alone_is_fitted() -> None:
    fits = fit_table(STUDY[STUDY["objective"] == "arm"], samples=100)
    assert list(fits.objectives) == ["arm"]
    assert fits.compute_multiplier == []
    assert not any("multiplier" in note for note in fits.notes)


def test_a_convention_that_is_not_counted_is_left_out_with_a_note() -> None:
    fits = fit_table(STUDY.assign(flops_total=np.nan), samples=100)
    assert fits.conventions == ("6nd",)
    assert "not counted by 6ND + attention + head" in fits.notes[0]
    assert set(fits.as_dict()["arm"]["envelope"]) == {"6nd"}


def test_fits_json_keeps_its_contract() -> None:
    written = FITS.as_dict()
    assert set(written) == {
        "settings", "arm", "llada", "joint", "headlines", "common", "contrasts",
        "compute_multiplier", "multiplier_curve", "multiplier_at_own_budgets", "held_out",
        "disagreements", "notes",
    }  # fmt: skip
    assert set(written["arm"]) == {"parametric", "isoflop", "envelope"}
    for method in ("isoflop", "envelope"):
        assert set(written["arm"][method]) == {"6nd", "total"}
    assert set(written["arm"]["parametric"]["alpha"]) == {"value", "low", "high", "interval"}
    assert set(written["compute_multiplier"][0]) >= {
        "convention", "method", "arm_flops", "objective_flops", "multiplier", "low", "high",
    }  # fmt: skip
    assert set(written["settings"]) >= {
        "unit", "samples", "seed", "huber_delta", "exponent_grid", "interval_percentiles", "noise_model",
    }  # fmt: skip
    again = fit_table(STUDY, samples=100, seed=0).as_dict()
    assert again == written
    assert fit_table(STUDY, samples=100, seed=1).as_dict() != written
    json.dumps(strict_json(plain(written)), allow_nan=False)


def plain(value: Any) -> Any:
    """Fails on anything that a JSON writer would not know, as numpy's own numbers."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    assert value is None or type(value) in (str, int, float, bool), type(value)
    return value


# --- checks ---


def test_the_largest_budget_is_predicted_by_the_methods_whose_model_holds() -> None:
    held = {(entry.objective, entry.method): entry for entry in FITS.held_out if entry.convention == "6nd"}
    assert set(held) == {(name, method) for name in LAWS for method in METHODS if method != "read-off"}
    for (objective, method), entry in held.items():
        assert entry.flops == pytest.approx(1e19, rel=1e-3)
        assert entry.observed == pytest.approx(CHINCHILLA[objective].best(1e19), rel=0.01)
        assert entry.relative_error == pytest.approx(entry.predicted / entry.observed - 1)
        assert entry.inside == (entry.low <= entry.observed <= entry.high)
        if method != "envelope":  # a parabola has no E
            assert entry.inside


def test_a_budget_that_breaks_the_trend_is_outside() -> None:
    table = STUDY.copy()
    table.loc[table["flops_6nd"] > 9e18, "val_nats_per_token"] *= 0.93
    held = [entry for entry in fit_table(table, samples=100).held_out if entry.method == "parametric"]
    assert held
    assert not any(entry.inside for entry in held)


def test_two_budgets_hold_nothing_out() -> None:
    assert fit_table(study(budgets=(3e11, 1e12)), samples=100).held_out == []


def test_methods_that_differ_in_their_draws_are_named() -> None:
    found = fit_table(published_isoflop(), samples=300).disagreements
    assert {entry.methods for entry in found} == {("read-off", "joint"), ("read-off", "parametric")}
    for entry in found:
        own, other = entry.values
        assert entry.quantity == "compute multiplier"
        assert max(own / other, other / own) > MATERIAL
        assert entry.flops == pytest.approx(3e18, rel=0.01)
    right = {"isoflop", "parametric"}  # of the methods whose model holds, none
    assert not [entry for entry in FITS.disagreements if set(entry.methods) <= right]


def test_an_extra_column_or_index_does_no_harm() -> None:
    odd = STUDY.assign(colour="red").set_index(pd.Index(range(100, 100 + len(STUDY))))
    assert fit_table(odd, samples=100).as_dict() == FITS.as_dict()


def test_held_out_is_the_largest_budget_that_has_enough_shapes() -> None:
    lonely = STUDY[STUDY["objective"] == "arm"].iloc[[-1]]
    larger = lonely.assign(run="lonely", tokens=lonely["tokens"] * 10, flops_6nd=lonely["flops_6nd"] * 10)
    fits = fit_table(pd.concat([STUDY, larger], ignore_index=True), samples=100, conventions=("6nd",))
    held = [entry for entry in fits.held_out if entry.objective == "arm"]
    assert [entry.flops for entry in held] == pytest.approx([1e19] * 4, rel=1e-3)
    before = [entry for entry in FITS.held_out if (entry.objective, entry.convention) == ("arm", "6nd")]
    assert [entry.predicted for entry in held] == pytest.approx([entry.predicted for entry in before], rel=1e-3)


def test_a_law_that_misses_its_own_points_predicts_with_a_wide_interval() -> None:
    bent = {"arm": Chinchilla(2.0, 4e4, 0.6, 2e6, 0.6)}
    held = {
        e.method: e for e in fit_table(simulated_study(bent, noise=1e-4)[0], samples=100, conventions=("6nd",)).held_out
    }
    envelope, parametric = held["envelope"], held["parametric"]
    assert envelope.high - envelope.low > 2 * (parametric.high - parametric.low)
    assert parametric.inside


def test_open_and_unknown_intervals_are_told_apart() -> None:
    kinds = [Estimate(1.0, *ends).as_dict()["interval"] for ends in ((0.5, 2.0), (0.5, np.inf), (0, 2), (np.nan,) * 2)]
    assert kinds == ["known", "open", "open", "unknown"]
    assert {entry["interval"] for entry in FITS.as_dict()["compute_multiplier"]} <= {"known", "open"}
    assert {"interval"} <= set(FITS.as_dict()["held_out"][0]) & set(FITS.as_dict()["arm"]["envelope"]["6nd"])
