"""The short names of variants."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from helpers.studies import VALLEYS, simulated_study, study
from llada_lightning.study.fits import fit_table, usable_runs
from llada_lightning.study.names import short_names, table_with_short_names, variant_settings, with_short_names

CURRICULUM = "density=curriculum(start=range(low=0.05,high=0.3),end=range(low=0.05,high=0.6),steps=1000);loss_weight=ce"


@pytest.mark.parametrize(
    ("settings", "short"),
    [
        (CURRICULUM, "ce, t 0.05-0.3 to 0.05-0.6"),
        ("density=curriculum(start=range(low=0,high=0.3),end=uniform,steps=1000)", "t 0-0.3 to uniform"),
        ("density=logit_normal(mean=-0.5,deviation=1);loss_weight=ce", "ce, t logit_normal -0.5 1"),
        ("density=beta(a=2,b=2)", "t beta 2 2"),
        ("loss_weight=clipped;loss_weight_limit=5", "clipped, limit 5"),
        ("block_length=4", "block 4"),
        ("compat=llada;weight_decay=0", "compat=llada, weight_decay=0"),
        ("module=mine.Module", "module=mine.Module"),
    ],
)
def test_a_variant_has_a_short_name(settings: str, short: str) -> None:
    full = f"llada [{settings}]"
    assert short_names(["llada", full]) == {"llada": "llada", full: f"llada [{short}]"}
    assert short_names([f"llada [{short}]"]) == {f"llada [{short}]": f"llada [{short}]"}  # a second time


def test_variants_that_a_short_name_does_not_tell_apart_keep_the_full_one() -> None:
    starts = [f"llada [density=curriculum(start=uniform,end=range(low=0,high=1),steps={steps})]" for steps in (10, 20)]
    assert short_names(starts) == {name: name for name in starts}
    assert short_names(starts[:1]) == {starts[0]: "llada [t uniform to 0-1]"}


def test_people_read_short_names_and_files_keep_the_full_ones() -> None:
    table = simulated_study(VALLEYS, noise=0.001, budgets=(1e17, 1e18, 1e19))[0]
    other = table[table["objective"] == "llada"]
    others = [
        other.assign(variant=variant, val_nats_per_token=factor * other["val_nats_per_token"])
        for variant, factor in ((CURRICULUM, 0.98), ("block_length=4", 0.99))
    ]
    table = pd.concat([table, *others], ignore_index=True)
    fits = fit_table(table, samples=100, conventions=("6nd",))
    full, short = f"llada [{CURRICULUM}]", "llada [ce, t 0.05-0.3 to 0.05-0.6]"
    assert full in fits.as_dict() and short not in str(fits.as_dict())
    brief, shown = with_short_names(table, fits)
    assert list(shown.objectives) == ["arm", "llada", "llada [block 4]", short]  # as tables of runs list them
    assert list(usable_runs(brief)["objective"].unique()) == ["arm", "llada", short, "llada [block 4]"]
    assert CURRICULUM not in str(shown.as_dict())
    assert shown.kind(short) == "bound" and shown.line(short, "joint", "6nd", short) is not None
    for before, after in zip(fits.compute_multiplier, shown.compute_multiplier, strict=True):
        assert replace(after, objective="", doubt=None, withheld=None) == replace(
            before, objective="", doubt=None, withheld=None
        )
    assert variant_settings(table) == {short: CURRICULUM, "llada [block 4]": "block_length=4"}
    again = with_short_names(brief, shown)
    assert again[0] is brief and again[1] is shown and variant_settings(brief) == {}


def test_a_table_without_variants_stays_as_it_is() -> None:
    table = study()
    assert table_with_short_names(table) is table
