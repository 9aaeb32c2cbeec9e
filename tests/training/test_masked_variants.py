"""Runs with another density of the mask ratio or another weight of the loss: names, columns, resuming, FLOPs."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from helpers.tiny_runs import fit, fit_arguments, fit_process, kill_at, metrics, record, timeless
from llada_lightning.commands.main import main
from llada_lightning.compute.shapes import Shape
from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.data.manifest import read_data_facts
from llada_lightning.objectives import OBJECTIVES
from llada_lightning.objectives.density_settings import density_setting
from llada_lightning.study.fits.runs import base_objective, named_variants
from llada_lightning.study.plan import plan_study
from llada_lightning.study.plan.base import planned_stream, read_base
from llada_lightning.study.plan.trunk import Grid, Recipe
from llada_lightning.support.errors import UserError
from llada_lightning.training.cli import LladaCLI
from llada_lightning.training.modules import ArmModule, LladaModule

Captured = pytest.CaptureFixture[str]
SHAPE = Shape(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64)
CURRICULUM = {
    "name": "curriculum",
    "start": {"name": "range", "low": 0.05, "high": 0.4},
    "end": {"name": "beta", "a": 1.2, "b": 0.8},
    "steps": 15,
}
VARIANT = "density=curriculum(start=range(low=0.05,high=0.4),end=beta(a=1.2,b=0.8),steps=15)"
DENSITY = f"--data.density={json.dumps(CURRICULUM)}"
WHOLE = (DENSITY, "--data.random_length_share=0")


def surrogates(folder: Path) -> list[float]:
    return [float(row["train_surrogate"]) for row in metrics(folder)]


def weights_of(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / f"step={steps:08d}.ckpt")["state_dict"]


def budgets(*steps: int) -> list[str]:
    given = [6.0 * SHAPE.params_nonembedding * 8 * 32 * n for n in steps]
    return [f"--budget.flops={given if len(given) > 1 else given[0]}", "--trainer.max_steps=-1", *WHOLE,
            "--model.schedule.warmup_steps=2"]  # fmt: skip


@pytest.fixture(scope="module")
def family(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk with two branches, whose curriculum ends between the two budgets."""
    return fit("llada", prepared, tmp_path_factory.mktemp("family"), *budgets(12, 24))


def test_a_curriculum_that_is_killed_ends_bit_for_bit_as_an_uninterrupted_one(
    prepared: Path, tmp_path: Path, family: Path
) -> None:
    killed = fit_process("llada", prepared, tmp_path, *budgets(12, 24), kill_at(13))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = fit("llada", prepared, tmp_path, *budgets(12, 24))
    assert timeless(folder) == timeless(family)
    assert surrogates(folder) == surrogates(family)
    for steps in (12, 24):
        place = Path("branches") / str(steps)
        mine, theirs = weights_of(folder / place, steps), weights_of(family / place, steps)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_branch_of_a_curriculum_is_the_run_that_its_budget_alone_would_be(
    prepared: Path, tmp_path: Path, family: Path, capsys: Captured
) -> None:
    alone = fit("llada", prepared, tmp_path, *budgets(12))
    assert "surrogate loss " in capsys.readouterr().err
    [separate], [branch, longer] = (json.loads((run / "result.json").read_text()) for run in (alone, family))
    same = ("run", "val_nats_per_token", "val_stderr", "tokens", "flops_6nd", "flops_head", "flops_total", "variant")
    assert [branch[key] for key in same] == [separate[key] for key in same]
    assert separate["variant"] == VARIANT and separate["val_kind"] == "bound"
    mine, theirs = weights_of(family / "branches" / "12", 12), weights_of(alone, 12)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    # The head's FLOPs are those of the mean mask ratio over the run's own steps, which grows in this curriculum.
    setting = density_setting(CURRICULUM)
    assert setting is not None
    for result in (branch, longer):
        mean = sum(setting.density.at(step).mean_ratio for step in range(result["steps"])) / result["steps"]
        probability = 0.999 * mean + 0.001
        assert result["flops_head"] == pytest.approx(6 * 32 * 384 * probability * result["tokens"], rel=1e-12)
    assert longer["flops_head"] / longer["tokens"] > 1.1 * branch["flops_head"] / branch["tokens"]


def test_another_number_of_micro_batches_draws_the_same(prepared: Path, tmp_path: Path, family: Path) -> None:
    folder = fit("llada", prepared, tmp_path, *budgets(12, 24), "--trainer.accumulate_grad_batches=4")
    assert surrogates(folder) == pytest.approx(surrogates(family), abs=1e-5)


def test_a_step_of_a_curriculum_is_replayed(family: Path, capsys: Captured) -> None:
    capsys.readouterr()
    assert main(["replay", str(family), "--step", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "surrogate"
    assert found["loss"] == found["seen_loss"] == surrogates(family)[7]
    setting = density_setting(CURRICULUM)
    assert setting is not None
    low, high = setting.density.at(7).support
    assert all(low <= one["t"] + 1e-6 and one["t"] <= high for one in found["sequences"])
    assert main(["replay", str(family), "--step", "8"]) == 0
    assert "step 8: surrogate loss " in capsys.readouterr().out


# --- names and columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "variant", "kind"),
    [
        (["--data.density=uniform"], None, "bound"),
        (["--data.density={name: beta, a: 1.5, b: 1}"], "density=beta(a=1.5,b=1)", "bound"),
        (["--model.loss_weight=ce"], "loss_weight=ce", "surrogate"),
        (
            ["--model.loss_weight=clipped", "--model.loss_weight_limit=5", "--data.density=logit_normal"],
            "density=logit_normal(mean=0,deviation=1);loss_weight=clipped;loss_weight_limit=5",
            "surrogate",
        ),
        (["--model.loss_weight=per_masked_token"], "loss_weight=per_masked_token", "surrogate"),
    ],
)
def test_a_run_is_named_and_logged_as_what_it_is(
    settings: list[str], variant: str | None, kind: str, prepared: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = fit("llada", prepared, tmp_path, "--trainer.max_steps=2", *settings)
    shown = capsys.readouterr().err
    [first, _] = metrics(folder)
    assert record(folder)["variant"] == variant
    assert ("train_surrogate" in first, "train_nats_per_token" in first) == (kind == "surrogate", kind == "bound")
    assert list(first)[7] == ("train_surrogate" if kind == "surrogate" else "train_nats_per_token")
    assert ("surrogate loss" in shown, "training loss" in shown) == (kind == "surrogate", kind == "bound")
    identity = torch.load(folder / "checkpoints" / "step=00000002.ckpt")["identity"]
    assert ("density" in identity["data"]) == ("density=" in (variant or ""))
    assert ("loss_weight" in identity["model"]["init_args"]) == ("loss_weight=" in (variant or ""))
    assert (variant is None) == (record(folder)["run"] == name_of(prepared, "--trainer.max_steps=2"))


def name_of(prepared: Path, *settings: str) -> str:
    """The name of a run, which is not started."""
    return str(LladaCLI(fit_arguments("llada", prepared, Path("nowhere"), *settings), execute=False).run_name)


def test_settings_that_mean_the_same_have_one_name(prepared: Path) -> None:
    first, same, other = (
        name_of(prepared, f"--data.density={density}")
        for density in ("{name: beta, a: 2, b: 1.0}", "{b: 1, a: 2.0, name: beta}", "{name: beta, a: 2, b: 1.5}")
    )
    assert first == same != other


def test_a_density_of_ones_own_may_be_a_part_of_a_curriculum(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """From a file, and from the run's own configuration again."""
    own = "from llada_lightning.objectives.densities import Beta\nclass Mine(Beta):\n    pass\n"
    (tmp_path / "mine_density.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    start = {"class_path": "mine_density.Mine", "init_args": {"a": 0.5, "b": 1}}
    density = {"name": "curriculum", "start": start, "end": "uniform", "steps": 4}
    (tmp_path / "own.yaml").write_text(json.dumps({"data": {"init_args": {"density": density}}}))
    words = [f"--config={tmp_path / 'own.yaml'}", "--trainer.max_steps=2"]
    assert main(fit_arguments("llada", prepared, tmp_path, *words)) == 2
    assert "data.density.start: 'mine_density.Mine' is not of llada_lightning" in capsys.readouterr().err
    monkeypatch.setenv("LLADA_TRUSTED_MODULES", "mine_density")
    folder = fit("llada", prepared, tmp_path, *words)
    assert record(folder)["variant"] == ("density=curriculum(start=mine_density.Mine(a=0.5,b=1),end=uniform,steps=4)")
    assert main(["fit", f"--config={folder / 'config.yaml'}"]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_a_variant_is_an_objective_of_its_own_in_a_table() -> None:
    table = pd.DataFrame({"objective": ["llada", "llada"], "variant": [None, f"{VARIANT};loss_weight=ce"]})
    [plain, own] = named_variants(table)["objective"]
    assert (plain, own) == ("llada", f"llada [{VARIANT};loss_weight=ce]")
    assert base_objective(own) == "llada"


def test_modules_say_what_their_loss_is() -> None:
    partly = density_setting({"name": "range", "low": 0.1, "high": 1})
    assert ArmModule("107k").training_kind() == ArmModule("107k").training_kind(partly) == "exact"
    assert (LladaModule("107k").training_kind(), LladaModule("107k").training_kind(partly)) == ("bound", "surrogate")
    assert LladaModule("107k", 512, loss_weight="ce").training_kind() == "surrogate"
    assert LladaModule("107k", 512, loss_weight="ce").arguments["vocab_size"] == 512


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def test_a_plan_counts_what_the_fit_counts(prepared: Path, tmp_path: Path) -> None:
    """A budget of all three FLOPs: so its steps follow from the mean mask ratio over those steps."""
    data = {"density": CURRICULUM, "random_length_share": 0, "sequence_length": 32}
    (tmp_path / "base.yaml").write_text(json.dumps({"data": {"init_args": data}}))
    base = read_base(tmp_path / "base.yaml", {"batch": 8})
    stream = planned_stream(base, read_data_facts(str(prepared), 32), None, 32)
    shapes = [SHAPE, replace(SHAPE, n_layers=3), replace(SHAPE, n_layers=4)]
    budget = 4e8
    recipe = Recipe(lr=0.01, batch=8, warmup_steps=2)
    plan = plan_study(
        [budget], stream, objectives=["llada"], grid=Grid(shapes=shapes), recipe=recipe, convention="total"
    )
    row = plan.table().iloc[0]
    uniform = replace(stream, density=None)
    [trunk, *_] = plan_study(
        [budget], uniform, objectives=["llada"], grid=Grid(shapes=shapes), recipe=recipe, convention="total"
    ).trunks
    assert row.steps != trunk.branches[0].steps, "the test is to see the density"
    length = (f"--budget.flops={budget}", "--budget.convention=total", "--trainer.max_steps=-1")
    found = record(fit("llada", prepared, tmp_path, *length, *WHOLE, "--model.schedule.warmup_steps=2"))
    assert found["steps"] == row.steps
    for count in ("flops_6nd", "flops_attention", "flops_head", "flops_total"):
        assert found[count] == pytest.approx(row[count], rel=1e-12)
    assert found["flops_total"] == pytest.approx(budget, rel=0.5 / row.steps)


def test_only_objectives_that_mask_as_the_data_say_have_other_flops() -> None:
    masked, own = OBJECTIVES["llada"], replace(OBJECTIVES["llada"], logit_share=lambda mask_eps: 0.3)
    for objective, shares in ((masked, (0.5005, 0.2008)), (own, (0.3, 0.3)), (OBJECTIVES["arm"], (1, 1))):
        heads = [objective.flops_per_token(SHAPE, 100, 32, 1e-3, mean_ratio=mean).flops_head for mean in (None, 0.2)]
        assert heads == pytest.approx([6 * 32 * 100 * share for share in shares], rel=1e-12)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--data.density=bta"], "data.density: 'bta' is no density; the nearest is beta; choose from"),
        (
            ["--data.density={name: range, low: 0.6, high: 0.5}"],
            "data.density: range: low: 0.6 given; it must be below",
        ),
        (["--data.density={name: beta, a: 0, b: 1}"], "data.density: beta: a: 0 given; it must be above 0"),
        (["--data.density={class_path: os.system}"], "data.density: 'os.system' is not of llada_lightning"),
        (
            ["--data.density={name: beta, a: 3, b: 1}"],
            "data.density: beta(a=3,b=1) falls to 0 at t = 0 faster than in proportion to the distance, so that "
            "model.loss_weight elbo, 1/(p q(t)), is infinite there",
        ),
        (["--data.density=logit_normal"], "data.density: logit_normal(mean=0,deviation=1) falls to 0 at t = 0"),
        (["--model.loss_weight=clipped"], "model.loss_weight_limit: none given; loss_weight clipped needs a number"),
        (
            ["--model.loss_weight=clipped", "--model.loss_weight_limit=0"],
            "model.loss_weight_limit: 0 given; loss_weight clipped needs a number above 0",
        ),
        (["--model.loss_weight_limit=5"], "model.loss_weight_limit: 5 given, but loss_weight elbo has no limit"),
        (["--model.loss_weight=elb"], "model.loss_weight: elb given; expected"),
    ],
)
def test_what_makes_no_loss_is_one_line(
    settings: list[str], said: str, prepared: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert main(fit_arguments("llada", prepared, tmp_path / "runs", *settings)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {said}") and shown.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_same_is_refused_from_python(prepared: Path) -> None:
    made: list[Any] = [
        (lambda: LladaModule("107k", loss_weight="cee"), "model.loss_weight: 'cee' is no weight; the nearest is ce; "),  # type: ignore[arg-type]
        (lambda: LladaModule("107k", loss_weight="clipped", loss_weight_limit=-1), "model.loss_weight_limit: -1 given"),
        (lambda: TokenDataModule(str(prepared), density={"name": "beta", "a": 1}), "data.density: beta: missing"),
    ]
    for make, said in made:
        with pytest.raises(UserError) as caught:
            make()
        assert str(caught.value).startswith(said)


def test_a_base_with_a_density_that_is_none_is_refused_by_the_plan(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "base.yaml").write_text("data: {init_args: {density: {name: range, low: 2, high: 3}}}")
    words = ["plan", "--flops", "1e12", "--vocab-size", "384", "--base", str(tmp_path / "base.yaml")]
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: base: data.init_args.density: range: low: 2 given; it must lie")
