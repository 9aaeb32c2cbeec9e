"""Every configuration under experiments/ loads, and the paper's say what the paper says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llada_lightning.commands.main import main
from llada_lightning.compute.flops import expected_length
from llada_lightning.compute.schedule import WSD, Plateau
from llada_lightning.compute.shapes import PAPER_SHAPES, PAPER_VOCAB_SIZE
from llada_lightning.study.sweep import SHIPPED, read_sweep, render_command
from llada_lightning.training import ArmModule, LladaModule

ROOT = Path(__file__).parents[2]
PAPER = ("llada_8b", "llada_1b", "arm_1b", "arm_7b")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "experiments" / "paper" / f"{name}.yaml").read_text())


CONFIGURATIONS = sorted(
    path for path in (ROOT / "experiments").rglob("*.yaml") if path.parent.name not in ("evaluation", "tasks")
)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_configuration_loads(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = path.parents[1] / path.name
    below = [f"--config={base}"] if base.exists() else []  # an overlay of the rehearsal
    model = [] if "model" in yaml.safe_load(path.read_text()) else ["--model=LladaModule"]
    assert main(["fit", *below, f"--config={path}", *model, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"].endswith("Module")


@pytest.mark.parametrize("name", PAPER)
def test_each_paper_model_builds_on_the_meta_device(name: str) -> None:
    arguments = read(name)["model"]["init_args"]
    module_class = {"LladaModule": LladaModule, "ArmModule": ArmModule}[read(name)["model"]["class_path"]]
    with torch.device("meta"):
        module = module_class(**{key: arguments[key] for key in ("shape", "vocab_size", "rope_theta")})
        module.configure_model()
    shape = PAPER_SHAPES[name.replace("_", "-")]
    assert arguments["vocab_size"] == PAPER_VOCAB_SIZE
    assert sum(p.numel() for p in module.model.parameters()) == shape.params_total(PAPER_VOCAB_SIZE)
    assert module.objective == name.split("_")[0]


@pytest.mark.parametrize("name", PAPER)
def test_each_paper_configuration_has_the_papers_hyperparameters(name: str) -> None:
    config = read(name)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert data["sequence_length"] == 4096
    assert data["global_batch"] == (4224 if name == "arm_7b" else 1280)
    assert data["micro_batch"] == 4
    assert data["random_length_share"] == (0.0 if name == "arm_7b" else 0.01)
    assert sorted(data["path"].values()) == [11, 28, 61]
    assert model["optimizer"]["weight_decay"] == 0.1
    assert model["schedule"]["warmup_steps"] == 2000
    assert model["schedule"]["lr"] == (4.2e-4 if name == "arm_7b" else 4e-4)


def test_llada_8b_has_the_papers_rates() -> None:
    config = read("llada_8b")
    data, given = config["data"]["init_args"], dict(config["model"]["init_args"]["schedule"])
    given["plateaus"] = [Plateau(**plateau) for plateau in given["plateaus"]]
    tokens_per_step = data["global_batch"] * expected_length(data["sequence_length"], data["random_length_share"])
    steps = round(config["budget"]["tokens"] / tokens_per_step)
    schedule = WSD(**given).resolve(steps, tokens_per_step, default_lr=0.0)

    def after(tokens: float) -> float:
        """The rate of the first step that begins with so many tokens processed."""
        return schedule.at(-int(-tokens // tokens_per_step))

    assert schedule.at(0) == 0
    assert schedule.at(1000) == pytest.approx(2e-4)
    assert schedule.at(2000) == 4e-4
    assert after(1.2e12 - 2 * tokens_per_step) == 4e-4
    assert after(1.2e12) == after(1.3e12) == after(2.0e12 - 2 * tokens_per_step) == 1e-4
    assert after(2.0e12) == pytest.approx(1e-4, rel=1e-4)
    assert after(2.15e12) == pytest.approx(5.5e-5, rel=1e-3)
    assert after(2.3e12) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("path", [*sorted((ROOT / "sweeps").glob("*.yaml")), *SHIPPED.values()], ids=str)
def test_each_sweep_renders_to_commands_that_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = read_sweep(path)
    command = render_command(sweep, sweep.points[-1])
    assert [word for word in command if word not in ("launch", "--")][:2] == ["llada", "fit"]
    arguments = [str(ROOT / a) if a.startswith("experiments/") else a for a in command[1:]]
    assert main([*arguments, "--print_config"]) == 0


def test_the_quickstart_has_three_shapes_and_budgets_and_two_seeds_of_each_recipe() -> None:
    configs = [yaml.safe_load(str(point["config"])) for point in read_sweep(SHIPPED["quickstart"]).points]
    recipes = {(one["model"]["class_path"], one["model"]["init_args"].get("loss_weight")) for one in configs}
    assert recipes == {("ArmModule", None), ("LladaModule", None), ("LladaModule", "ce")}
    for kind, weight in recipes:
        own = [one for one in configs if one["model"]["class_path"] == kind]
        own = [one for one in own if one["model"]["init_args"].get("loss_weight") == weight]
        assert len({flops for one in own for flops in one["budget"]["flops"]}) >= 3
        assert len({one["model"]["init_args"]["shape"] for one in own}) == 3
        assert len({one["seed_everything"] for one in own}) >= 2
