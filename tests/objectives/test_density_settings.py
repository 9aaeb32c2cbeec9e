"""`data.density`: one setting however it is written, and what is no density."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.objectives import density_settings
from llada_lightning.objectives.densities import (
    Between,
    Curriculum,
    Density,
    Range,
    Uniform,
    covers_all_ratios,
    end_without_mass,
)
from llada_lightning.objectives.density_settings import density_setting
from llada_lightning.support.errors import UserError
from tests.objectives.test_densities import steady


def test_a_setting_is_the_same_however_it_is_written() -> None:
    spellings: list[Any] = [
        {"name": "curriculum", "start": {"name": "range", "low": 0, "high": "3e-1"}, "end": "uniform", "steps": 100},
        {
            "steps": 100.0,
            "end": {"name": "uniform"},
            "start": {"high": 0.3, "low": 0.0, "name": "range"},
            "name": "curriculum",
        },
    ]
    found = [density_setting(spelling) for spelling in spellings]
    assert found[0] == found[1]
    assert str(found[0]) == "curriculum(start=range(low=0,high=0.3),end=uniform,steps=100)"
    assert found[0] is not None and found[0].density == Curriculum(Range(0, 0.3), Uniform(), 100)
    assert density_setting(None) is density_setting("uniform") is density_setting({"name": "uniform"}) is None
    assert str(density_setting("logit_normal")) == "logit_normal(mean=0,deviation=1)"


OWN = '''
import numpy as np
from llada_lightning.objectives.densities import Density

class Steps(Density):
    """Twice as much mass below 1/2 as above it."""
    def __init__(self, low_share: float = 2 / 3, factor: float = 1.0, quiet: bool = True):
        self.share, self.factor = low_share, factor
        if not 0 < low_share < 1:
            raise ValueError("low_share must lie between 0 and 1")
    def draw(self, u_B):
        low_B = u_B < self.share
        t_B = np.where(low_B, u_B / self.share / 2, 0.5 + (u_B - self.share) / (1 - self.share) / 2)
        return t_B, self.factor * np.where(low_B, 2 * self.share, 2 * (1 - self.share))

class Gap(Density):
    def draw(self, u_B):
        return np.where(u_B < 0.5, 0.6 * u_B, 0.4 + 0.6 * u_B), np.full_like(u_B, 1 / 0.6)

class Half(Density):
    def draw(self, u_B):
        return u_B / 2, np.full_like(u_B, 2.0)

class Beyond(Density):
    def draw(self, u_B):
        return 2 * u_B, np.full_like(u_B, 0.5)

class One(Density):
    def draw(self, u_B):
        return u_B, 1.0
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_densities.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LLADA_TRUSTED_MODULES", "own_densities")


def test_a_class_of_ones_own_is_a_density(own: None) -> None:
    found = density_setting({"class_path": "own_densities.Steps", "init_args": {"low_share": "0.75"}})
    assert found is not None
    assert found.settings == {
        "class_path": "own_densities.Steps",
        "init_args": {"low_share": 0.75, "factor": 1.0, "quiet": True},
    }
    assert str(found) == "own_densities.Steps(low_share=0.75,factor=1,quiet=True)"
    assert found.density.mean_ratio == pytest.approx(0.375, abs=1e-4)
    assert covers_all_ratios(found.density) and end_without_mass(found.density) is None


@pytest.mark.parametrize(
    ("given_setting", "said"),
    [
        ("unifrom", "'unifrom' is no density; the nearest is uniform; choose from uniform, beta, logit_normal, range"),
        (3, "3 given; it must be a name with its arguments, such as {name: beta, a: 1.5, b: 1}"),
        ({"a": 1}, "{'a': 1} given; it must be a name"),
        ({"name": "beta", "class_path": "x.Y"}, "it must be a name"),
        ({"name": "beta", "a": 0, "b": 1}, "beta: a: 0 given; it must be above 0"),
        ({"name": "beta", "a": 1, "b": -1}, "beta: b: -1 given; it must be above 0"),
        ({"name": "beta", "a": 1}, "beta: missing a required argument: 'b'; it takes a, b"),
        ({"name": "beta", "a": 1, "b": True}, "beta: b: True given; it must be a number"),
        ({"name": "beta", "a": 1, "b": float("nan")}, "beta: b: nan given; it must be a number"),
        ({"name": "logit_normal", "deviaton": 1}, "logit_normal has no argument 'deviaton'; the nearest is deviation"),
        ({"name": "logit_normal", "deviation": 0}, "logit_normal: deviation: 0 given; it must be above 0"),
        ({"name": "range", "low": 0.5, "high": 0.5}, "range: low: 0.5 given; it must be below high, 0.5"),
        ({"name": "range", "low": 0.5, "high": 1.5}, "range: high: 1.5 given; it must lie within 0 and 1"),
        ({"name": "range", "low": -1, "high": 0.5}, "range: low: -1 given; it must lie within 0 and 1"),
        (
            {"name": "curriculum", "start": "uniform", "end": "uniform", "steps": 0},
            "curriculum: steps: 0 given; it must",
        ),
        ({"name": "curriculum", "start": "uniform", "end": "uniform", "steps": 1.5}, "it must be a whole number"),
        (
            {"name": "curriculum", "start": "rang", "end": "uniform", "steps": 1},
            r"start: 'rang' is no density; the nearest",
        ),
        (
            {
                "name": "curriculum",
                "start": {"name": "curriculum", "start": "uniform", "end": "uniform", "steps": 1},
                "end": "uniform",
                "steps": 1,
            },
            "curriculum: start: a curriculum given",
        ),
        ({"class_path": "os.system"}, "'os.system' is not of llada_lightning"),
        ({"class_path": "llada_lightning.run.Stream"}, "'llada_lightning.run.Stream' is no subclass of"),
        ({"class_path": "own_densities.Nothing"}, "'own_densities.Nothing' cannot be imported (AttributeError"),
        ({"class_path": "own_densities.Steps", "args": {}}, "beside class_path there is init_args, a mapping"),
        (
            {"class_path": "own_densities.Steps", "init_args": {"low_shar": 1}},
            "has no argument 'low_shar'; the nearest is low_share",
        ),
        (
            {"class_path": "own_densities.Steps", "init_args": {"low_share": 2}},
            "own_densities.Steps fails (ValueError: low_share must lie between 0 and 1); correct it",
        ),
        (
            {"class_path": "own_densities.Steps", "init_args": {"factor": 1.2}},
            "own_densities.Steps: draw gives t and q(t) of which q(t) dt is not du, near u = 0.0001221; correct one",
        ),
        (
            {"class_path": "own_densities.Gap"},
            "own_densities.Gap: draw gives t and q(t) of which q(t) dt is not du, near u = 0.4999",
        ),
        ({"class_path": "own_densities.Half"}, "it has no mass between its support's end 1 and 0.5; correct `support`"),
        ({"class_path": "own_densities.Beyond"}, "draw gives mask ratios outside of (0, 1)"),
        ({"class_path": "own_densities.One"}, "draw gives shapes (4098,) and () for 4098 quantiles"),
    ],
)
def test_what_is_no_density_is_one_line(own: None, given_setting: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        density_setting(given_setting)
    assert str(caught.value).startswith("data.density") and said in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.one_of(steady, st.builds(Between, steady, steady, st.floats(0, 1))))
def test_the_check_of_a_class_of_ones_own_passes_every_density_of_ours(density: Density) -> None:
    density_settings._check_consistent(density)
