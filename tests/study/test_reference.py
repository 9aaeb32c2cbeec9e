"""The numbers that ship with the package are those of their sources."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path

import pytest

from llada_lightning.compute.flops import flops_per_token
from llada_lightning.compute.shapes import PAPER_SHAPES
from llada_lightning.records import RESULT_COLUMNS
from llada_lightning.study.reference import PAPER_TASKS, paper_scalability, published_isoflop
from llada_lightning.study.results import read_results, write_results

TASKS = [f"task_{name}" for name in PAPER_TASKS]


def test_the_paper_has_twenty_one_checkpoints_of_arm_and_twenty_of_llada() -> None:
    table = paper_scalability()
    counts = {"ARM 1B": 3, "ARM 7B": 18, "LLaDA 1B": 6, "LLaDA 8B": 14}
    assert table["model"].value_counts().to_dict() == counts
    assert table["objective"].value_counts().to_dict() == {"arm": 21, "llada": 20}


def test_6nd_gives_every_printed_entry() -> None:
    table = paper_scalability()
    counted = 6 * table["params_nonembedding"] * table["tokens"]
    assert (counted / table["flops_6nd"] - 1).abs().max() < 0.005


@pytest.mark.parametrize(
    ("model", "tokens", "flops", "scores"),
    [
        ("ARM 7B", 2214.59e9, 7.71e22, (49.26, 52.08, 53.56, 77.69, 27.37, 17.07)),
        ("LLaDA 8B", 1975.52e9, 8.27e22, (58.52, 57.87, 50.68, 75.35, math.nan, 19.51)),
        ("LLaDA 1B", 37.75e9, 2.20e20, (25.52, 25.95, 25.17, 59.41, 1.82, 0.00)),
    ],
)
def test_rows_are_as_printed(model: str, tokens: float, flops: float, scores: tuple[float, ...]) -> None:
    table = paper_scalability()
    row = table[(table["model"] == model) & (table["tokens"] == tokens)].iloc[0]
    assert row["flops_6nd"] == flops
    assert row[TASKS].tolist() == pytest.approx(scores, nan_ok=True)


def test_the_total_adds_attention_and_head_of_the_shape_at_length_4096() -> None:
    row = paper_scalability().iloc[-1]
    by_hand = 12 * 32 * 4096 * 4096 + 6 * 4096 * 126_464
    assert row["flops_total"] - row["flops_6nd"] == pytest.approx(by_hand * 1975.52e9, rel=1e-12)
    arm = flops_per_token(PAPER_SHAPES["arm-7b"], 126_464, 4096, causal=True)
    assert arm.flops_attention == 6 * 28 * 4096 * 4096  # half of the keys: causal


def test_the_published_isoflop_study_is_a_results_table(tmp_path: Path) -> None:
    table = published_isoflop()
    assert tuple(table.columns) == RESULT_COLUMNS
    again = read_results(write_results(table, tmp_path / "published.csv"))
    assert again.dtypes.equals(table.dtypes)
    assert again.equals(table)


def test_the_published_isoflop_study_has_133_runs_at_seven_budgets() -> None:
    table = published_isoflop()
    assert table["run"].is_unique
    assert table["objective"].value_counts().to_dict() == {"llada": 68, "arm": 65}
    budgets = [3e18, 6e18, 1e19, 3e19, 6e19, 1e20, 3e20]
    assert sorted(table["flops_6nd"].unique()) == budgets
    assert dict(table[["objective", "val_kind"]].drop_duplicates().itertuples(index=False)) == {
        "arm": "exact",
        "llada": "bound",
    }
    counted = 6.0 * table["params_nonembedding"].astype(float) * table["tokens"].astype(float)
    assert (counted / table["flops_6nd"] - 1).abs().max() < 1e-8
    assert table[["val_stderr", "flops_total", "seed"]].isna().all(axis=None)


def test_published_losses_are_those_of_the_source() -> None:
    table = published_isoflop().set_index("run")["val_nats_per_token"]
    assert table["arm-106M-3e+18flops"] == 3.380
    assert table["arm-1107M-3e+20flops"] == 2.619
    assert table["llada-771M-3e+20flops"] == 3.081


def test_data_and_their_sources_ship_with_the_package() -> None:
    folder = files("llada_lightning.study.reference")
    sources = folder.joinpath("README.md").read_text(encoding="utf-8")
    shipped = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"llada_lightning.study.reference" = ["*.csv", "README.md"]' in shipped
    for file in folder.iterdir():
        if file.name.endswith(".csv"):
            assert f"`{file.name}`" in sources
