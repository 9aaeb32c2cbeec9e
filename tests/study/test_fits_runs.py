"""Which runs a fit sees, the budgets that they form, and what a token costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.studies import CHINCHILLA, record, simulated_study
from llada_lightning.study.fits import best_of_budgets, budget_groups, check_comparable, fit_table, usable_runs
from llada_lightning.study.fits.runs import TokenCost, flops_column, is_budget, planned_convention, with_source_flops
from llada_lightning.study.results import read_results, table_of_records, write_results
from llada_lightning.support.errors import UserError


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
    assert best_of_budgets(runs, "nats_per_token") == [0, 3]


def test_unfinished_and_diverged_runs_are_not_fitted() -> None:
    records = [record("arm", "107k", 1e12, 4.0), record("arm", "443k", 1e12, 1.0, status="running")]
    records.append(record("arm", "214k", 1e12, float("nan")))
    assert list(usable_runs(table_of_records(records))["shape"]) == ["107k"]
    with pytest.raises(UserError, match="none of 2 rows"):
        fit_table(table_of_records(records[1:]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": "other"}, "tokenizer is mixed"),
        ({"data_fingerprint": "other"}, "data_fingerprint is mixed"),
        ({"objective": "mamba"}, r"objective 'mamba' of \S+ is not known"),
        ({"val_kind": "bound"}, "val_kind of arm is 'bound'; it must be 'exact'"),
    ],
)
def test_losses_that_cannot_be_compared_are_refused(change: dict[str, str], words: str) -> None:
    records = [record("arm", "107k", 1e12, 4.0), {**record("arm", "443k", 1e12, 4.0), **change}]
    with pytest.raises(UserError, match=words):
        check_comparable(table_of_records(records))


@pytest.mark.parametrize(
    ("change", "unit", "words"),
    [
        ({"tokens": None}, "nats_per_token", "tokens of 1 runs is missing"),
        ({"val_nats_per_token": -1.0}, "nats_per_token", "val_nats_per_token of 1 runs"),
        ({"val_bits_per_byte": None}, "bits_per_byte", "val_bits_per_byte of 1 runs"),
    ],
)
def test_a_run_without_what_fits_read_is_named(change: dict[str, object], unit: str, words: str) -> None:
    records = [record("arm", "107k", 1e12, 4.0), {**record("arm", "443k", 1e12, 4.0, run="lame"), **change}]
    with pytest.raises(UserError, match=rf"{words}.*\(lame\)"):
        fit_table(table_of_records(records), unit=unit)  # type: ignore[arg-type]


def test_a_table_without_any_flops_is_refused() -> None:
    with pytest.raises(UserError, match="flops are missing by 6nd and by total"):
        fit_table(table_of_records([record("arm", "107k", 1e12, 4.0, flops_6nd=None, flops_total=None)]))


def test_the_convention_by_which_runs_were_planned_is_found() -> None:
    table, _ = simulated_study(CHINCHILLA)
    arm = table[table["objective"] == "arm"]
    assert planned_convention(arm, ("6nd", "total")) == "6nd"
    swapped = arm.assign(flops_6nd=arm["flops_total"], flops_total=arm["flops_6nd"])
    assert planned_convention(swapped, ("6nd", "total")) == "total"


def test_a_cloud_without_gaps_is_no_budget() -> None:
    cloud = 1e12 * 1.05 ** np.arange(20)
    assert len(set(budget_groups(cloud))) == 1
    assert not is_budget(cloud)
    assert is_budget(cloud[:2])


def test_the_cost_of_a_token_goes_through_the_studys_own_shapes() -> None:
    table, _ = simulated_study(CHINCHILLA)
    llada = table[table["objective"] == "llada"].reset_index(drop=True)
    log_n = np.log(llada["params_nonembedding"].to_numpy(float))
    for convention, column in (("6nd", "flops_6nd"), ("total", "flops_total")):
        cost = TokenCost.of_runs(llada, convention)  # type: ignore[arg-type]
        np.testing.assert_allclose(cost(log_n), np.log(llada[column] / llada["tokens"]), rtol=1e-6)
    beyond = log_n.max() + np.array([0.5, 1.0])
    slope = np.diff(TokenCost.of_runs(llada, "total")(beyond))[0] / 0.5
    assert 0.6 < slope < 1.0  # 6N and a part that grows as N^0.55


def test_two_shapes_of_nearly_one_size_do_not_tell_what_other_sizes_cost() -> None:
    table, _ = simulated_study(CHINCHILLA)
    llada = table[table["objective"] == "llada"].reset_index(drop=True)
    largest = llada.loc[[llada["params_nonembedding"].idxmax()]]
    for factor, dearer in ((1.002, 1.3), (1.05, 1.3), (1.05, 0.8)):  # another depth at nearly the same N
        twin = largest.assign(
            params_nonembedding=(largest["params_nonembedding"] * factor).round(),
            flops_total=largest["flops_total"] * dearer,
        )
        cost = TokenCost.of_runs(pd.concat([llada, twin], ignore_index=True), "total")
        ends = cost(np.log(float(largest["params_nonembedding"].item())) + np.array([1.0, 3.0]))
        assert 0.5 <= np.diff(ends)[0] / 2 <= 1.0
    lone = TokenCost.of_runs(llada.iloc[[0]], "total")
    assert np.diff(lone(np.array([10.0, 12.0])))[0] == pytest.approx(2.0)


def test_results_that_stand_twice_are_counted_once() -> None:
    table, _ = simulated_study(CHINCHILLA)
    doubled = pd.concat([table, table.iloc[[3, 40]]], ignore_index=True)
    fits = fit_table(doubled, samples=100)
    assert "2 rows left out: their results are in the table twice (run, steps, seed)" in fits.notes
    once = fit_table(table, samples=100).as_dict()
    assert {**fits.as_dict(), "notes": fits.notes[1:]} == once
    names = table.assign(run="one name for all")  # as tables of others may have it
    assert not any("twice" in note for note in fit_table(names, samples=100).notes)
    assert len(fit_table(names, samples=100).held_out) == len(fits.held_out)


# --- what runs started from ------------------------------------------------------------------------------------------


def started() -> pd.DataFrame:
    """A run from scratch, two that began as an `arm`, of which one's FLOPs are known, and one from its own kind."""
    own = {"variant": "weights=arm"}
    return table_of_records([
        record("llada", "107k", 3e11, 4.5),
        record("llada", "107k", 3e11, 4.2, run="b", source_flops=2e11, **own),
        record("llada", "107k", 3e11, 4.3, run="c", **own),
        record("llada", "107k", 1e12, 4.1, run="d", source_flops=5e11),
    ])  # fmt: skip


def test_flops_of_the_weights_that_runs_started_from_are_noted_and_not_counted() -> None:
    table, notes = with_source_flops(started(), counted=False)
    pd.testing.assert_frame_equal(table, started())
    assert notes == [
        "llada: the 5e+11 FLOPs (6ND) of the weights that 1 run starts from are not counted; --source-flops adds them",
        "llada [weights=arm]: the 2e+11 FLOPs (6ND) of the weights that 1 run starts from are not counted; "
        "--source-flops adds them",
        "llada [weights=arm]: 1 run starts from weights whose FLOPs are not known and are not counted",
    ]
    scratch = started().iloc[:1]
    assert with_source_flops(scratch, counted=False)[1] == with_source_flops(scratch, counted=True)[1] == []


def test_where_they_are_counted_6nd_stays_6nd() -> None:
    before = started()
    table, notes = with_source_flops(before, counted=True)
    more = table["flops_6nd"] - before["flops_6nd"]
    assert more.tolist() == pytest.approx([0, 2e11, 0, 5e11])
    assert (table["flops_total"] - before["flops_total"]).tolist() == pytest.approx(more.tolist())
    assert table["tokens"].dtype == "Int64"
    six_nd = 6.0 * table["params_nonembedding"] * table["tokens"]
    assert six_nd.tolist() == pytest.approx(table["flops_6nd"].tolist(), rel=1e-5)
    assert notes[0] == "llada: the 5e+11 FLOPs (6ND) of the weights that 1 run starts from are counted, by 6ND"
    assert flops_column("6nd") in table


def test_an_older_table_without_the_column_stays_readable(tmp_path: Path) -> None:
    path = write_results(started().drop(columns="source_flops"), tmp_path / "old.csv")
    assert read_results(path)["source_flops"].isna().all()
    assert with_source_flops(started().drop(columns="source_flops"), counted=True)[1] == []
    again = read_results(write_results(started(), tmp_path / "new.csv"))
    assert again["source_flops"].tolist() == pytest.approx([np.nan, 2e11, np.nan, 5e11], nan_ok=True)
