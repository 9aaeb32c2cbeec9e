"""Shapes, FLOP counts and budgets against the paper's numbers."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_lightning.compute.flops import MAX_STEPS, TrainingFlops, flops_6nd, flops_per_token, steps_for_budget
from llada_lightning.compute.shapes import (
    PAPER_SHAPES,
    PAPER_VOCAB_SIZE,
    Shape,
    format_count,
    get_shape,
    ladder,
    named_shapes,
    proposable_shapes,
    propose_shape,
    shape_name,
)
from llada_lightning.objectives import get_objective
from llada_lightning.support.errors import UserError


def paper_rows() -> list[dict[str, str]]:
    """Training tokens and FLOPs as printed in Tables 18 and 19 of "Large Language Diffusion Models" (Nie et al.
    2025, arXiv:2502.09992); the tables' accuracies are left out."""
    with Path(__file__).with_name("paper_flops.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("name", "total", "nonembedding"),
    [("arm-1b", 1.49, 0.97), ("llada-1b", 1.49, 0.97), ("arm-7b", 6.83, 5.80), ("llada-8b", 8.02, 6.98)],
)
def test_table_5_counts_to_the_printed_digits(name: str, total: float, nonembedding: float) -> None:
    shape = get_shape(name)
    assert round(shape.params_total(PAPER_VOCAB_SIZE) / 1e9, 2) == total
    assert round(shape.params_nonembedding / 1e9, 2) == nonembedding


def test_all_rows_of_tables_18_and_19_by_6nd() -> None:
    rows = paper_rows()
    assert [sum(row["table"] == table for row in rows) for table in ("18", "19")] == [20, 21]
    for row in rows:
        counted = flops_6nd(get_shape(row["model"]).params_nonembedding, float(row["tokens"]))
        assert counted == pytest.approx(float(row["flops"]), rel=0.005), row


def test_ladder_names_state_true_counts_in_rising_order() -> None:
    counts = [shape.params_nonembedding for shape in ladder().values()]
    assert counts == sorted(counts)
    assert counts[0] < 1.2e5
    assert counts[-1] > 1.9e9
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    for name, shape in ladder().items():
        assert float(name[:-1]) * units[name[-1]] == pytest.approx(shape.params_nonembedding, rel=0.005)


def test_every_name_leads_to_a_shape_and_back_to_an_equal_one() -> None:
    for name, shape in named_shapes().items():
        assert get_shape(name) == shape
        assert get_shape(shape_name(shape)) == shape  # two names of the paper share a shape


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 64), st.integers(1, 8), st.integers(1, 10**5))
def test_any_shape_has_a_name_of_one_word(n_layers: int, half_head: int, kv: int, groups: int, d_ff: int) -> None:
    shape = Shape(n_layers, 2 * half_head * kv * groups, kv * groups, kv, d_ff)
    assert get_shape(shape_name(shape)) == shape


def test_dimensions_that_make_no_shape_are_refused_by_name_too() -> None:
    with pytest.raises(UserError, match="head dimension"):
        get_shape("L2-d65-h2-kv2-ff192")
    with pytest.raises(UserError, match="not known"):
        get_shape("L2-d64-h2-kv2")


SIZES = st.floats(math.log(1.4e4), math.log(6.4e10)).map(math.exp)


@settings(deadline=None)  # the first example makes the list of shapes
@given(SIZES, SIZES)
def test_a_larger_size_gets_no_smaller_shape(size: float, other: float) -> None:
    smaller, larger = sorted([size, other])
    assert propose_shape(smaller).params_nonembedding <= propose_shape(larger).params_nonembedding


@settings(deadline=None)  # the first example makes the list of shapes
@given(st.floats(math.log(1e6), math.log(6.3e10)).map(math.exp))
def test_a_proposal_is_near_in_size_and_in_width_over_depth(size: float) -> None:
    shape = propose_shape(size)
    assert shape.params_nonembedding == pytest.approx(size, rel=0.06)
    rule = 64 * (shape.params_nonembedding / 85e6) ** 0.1
    assert 1 / 1.5 <= shape.d_model / shape.n_layers / rule <= 1.5
    assert 2.3 < shape.d_ff / shape.d_model < 3.6


def test_the_rule_passes_near_known_models() -> None:
    assert propose_shape(85e6) == get_shape("85m")  # GPT-2 small: 12 blocks of 768
    for name in ("llada-1b", "llada-8b"):  # Table 5
        known = get_shape(name)
        proposed = propose_shape(known.params_nonembedding)
        assert proposed.d_model == pytest.approx(known.d_model, rel=0.15)
        assert proposed.n_layers == pytest.approx(known.n_layers, rel=0.35)


def test_proposals_have_dimensions_that_kernels_like() -> None:
    for shape in proposable_shapes():
        assert shape.d_model % (32 if shape.d_model < 256 else 64 if shape.d_model <= 1024 else 128) == 0
        assert shape.head_dim == (32 if shape.d_model < 256 else 64 if shape.d_model < 2048 else 128)
        assert shape.d_ff % (64 if shape.d_model <= 1024 else 256) == 0


@pytest.mark.parametrize("size", [100, 1e12])
def test_sizes_far_outside_of_what_is_proposed_are_refused(size: float) -> None:
    with pytest.raises(UserError, match="outside of what is proposed"):
        propose_shape(size)


@pytest.mark.parametrize(("objective", "ratio"), [("llada", 1.65), ("arm", 1.46)])
def test_true_cost_over_6nd_at_1b(objective: str, ratio: float) -> None:
    shape = PAPER_SHAPES[f"{objective}-1b"]
    per_token = flops_per_token(shape, PAPER_VOCAB_SIZE, 4096, causal=get_objective(objective).causal)
    assert round(per_token.flops_total / per_token.flops_6nd, 2) == ratio


def test_only_computed_logits_cost() -> None:
    shape = get_shape("llada-1b")
    full = flops_per_token(shape, PAPER_VOCAB_SIZE, 4096, causal=False)
    half = flops_per_token(shape, PAPER_VOCAB_SIZE, 4096, causal=False, logit_share=0.5)
    assert half.flops_head == full.flops_head / 2
    assert (half.flops_6nd, half.flops_attention) == (full.flops_6nd, full.flops_attention)


@given(flops=st.floats(1e3, 1e24), cost=st.floats(1.0, 1e12), batch=st.integers(1, 10**6))
def test_steps_come_nearest_to_the_budget(flops: float, cost: float, batch: int) -> None:
    per_token = TrainingFlops(cost, cost, cost)
    per_step = cost * batch
    if flops < per_step:
        with pytest.raises(UserError, match="below one step"):
            steps_for_budget(flops, per_token, batch)
        return
    if round(flops / per_step) > MAX_STEPS:
        with pytest.raises(UserError, match="are the most"):
            steps_for_budget(flops, per_token, batch)
        return
    steps = steps_for_budget(flops, per_token, batch)
    assert steps >= 1
    assert abs(steps * per_step - flops) <= per_step * (0.5 + 1e-9 * steps)


def test_convention_decides_what_a_budget_buys() -> None:
    per_token = TrainingFlops(flops_6nd=1.0, flops_attention=0.5, flops_head=0.5)
    assert steps_for_budget(1000, per_token, 10, "6nd") == 100
    assert steps_for_budget(1000, per_token, 10, "total") == 50


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("llada-9b", "not known"),
        ({"n_layers": 2}, "missing or unknown"),
        ({"n_layers": 0, "d_model": 64, "n_heads": 2, "n_kv_heads": 2, "d_ff": 128}, "n_layers is 0"),
        ({"n_layers": 2, "d_model": 65, "n_heads": 2, "n_kv_heads": 2, "d_ff": 128}, "head dimension"),
        ({"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 3, "d_ff": 128}, "must divide"),
    ],
)
def test_wrong_shapes_are_refused(spec: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        get_shape(spec)  # type: ignore[arg-type]


@given(st.floats(1e3, 9e10))
def test_format_count_keeps_three_digits(count: float) -> None:
    text = format_count(count)
    value = float(text[:-1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[text[-1]]
    assert math.isclose(value, count, rel_tol=0.0051)
