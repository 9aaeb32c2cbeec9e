"""The paper's scalability study: every row of Tables 18 and 19, as plan, configurations and sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llada_lightning.commands.main import main
from llada_lightning.compute.hardware import Machine
from llada_lightning.compute.schedule import Plateau
from llada_lightning.study.plan.paper import PAPER_RUNS, paper_plan
from llada_lightning.study.reference import paper_scalability
from llada_lightning.study.sweep import read_sweep

ROOT = Path(__file__).parents[2]
CLUSTER = Machine(device="H100", devices=64, mfu=0.45)


def test_every_row_of_both_tables_is_planned_within_half_a_percent() -> None:
    plan, printed = paper_plan(CLUSTER), paper_scalability()
    assert len(plan) == len(printed) == 41
    assert list(plan["tokens"]) == list(printed["tokens"]) and list(plan["model"]) == list(printed["model"])
    assert plan["deviation"].abs().max() < 0.005
    assert list(plan["flops_6nd"]) == pytest.approx(list(printed["flops_6nd"]), rel=0.005)
    # 17.30B tokens of the ARM 7B are 1,000 steps of 4,224 sequences of 4,096 tokens.
    assert plan[plan["model"] == "ARM 7B"]["steps"].iloc[0] == 1000


def test_hours_follow_from_all_flops_and_memory_from_the_division() -> None:
    plan = paper_plan(CLUSTER)
    seconds = plan["flops_total"] / (64 * 0.45 * 989e12)
    assert list(plan["wall_hours"]) == pytest.approx(list(seconds / 3600))
    assert list(plan["device_hours"]) == pytest.approx(list(64 * seconds / 3600))
    assert (plan["memory_gib"] < 0.9 * 80e9 / 2**30).all()
    larger = paper_plan(Machine(device="H100", devices=512, mfu=0.45))
    assert list(larger["device_hours"]) == pytest.approx(list(plan["device_hours"]))
    # 512 does not divide 1,280 or 4,224 sequences; groups of 2 and 4 devices make 256 and 128 that do.
    assert larger.groupby("model", sort=False)["tensor_parallel"].first().to_dict() == {
        "ARM 1B": 2, "ARM 7B": 4, "LLaDA 1B": 2, "LLaDA 8B": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--device", "H100", "--devices", "2"],
            "plan: arm-7b does not fit 2 x H100: a device needs 82 GiB of 67 usabl",
        ),
        (["--device", "H100", "--devices", "2"], "the least that holds all four models is 4"),
        (
            ["--devices", "96"],
            "does not divide the 1280 sequences of a batch of arm-1b, nor does it in groups of up to 8",
        ),
        (["--flops", "1e18"], "--paper has the paper's budgets and files"),
        (["--mfu", "0.4"], "--mfu needs --device"),
    ],
)
def test_clusters_that_do_not_fit_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--paper", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_is_advised_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    for device, devices, advised in (("H100", 2, 4), ("A100", 1, 8), ("H100", 96, 64)):
        assert main(["plan", "--paper", "--device", device, "--devices", str(devices)]) == 2
        assert capsys.readouterr().err.strip().endswith(f" {advised}")
        assert main(["plan", "--paper", "--device", device, "--devices", str(advised)]) == 0
        capsys.readouterr()
    assert main(["plan", "--paper", "--device", "B100"]) == 2
    assert "plan: --device B100 is not known; the nearest is H100; known: " in capsys.readouterr().err


def test_the_table_is_printed_with_how_it_was_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--paper", "--device", "H100", "--devices", "64", "--mfu", "0.45"]) == 0
    printed = capsys.readouterr().out
    assert "LLaDA 8B: 56 GiB a device, micro-batch 2" in printed
    assert "hours: at 45.0% of the dense bf16 peak; all four runs, one after another, take 1,891 hours" in printed
    assert main(["plan", "--paper"]) == 0
    assert "hours: n/a; give --device and --mfu" in capsys.readouterr().out


def test_the_sweep_runs_the_plan() -> None:
    """The sweep's four configurations are those that the plan counts, with a milestone at each row."""
    sweep, printed = read_sweep(ROOT / "sweeps" / "paper-scalability.yaml"), paper_scalability()
    paths = [point["config"] for point in sweep.points]
    assert [Path(path).stem.replace("_", "-") for path in paths] == [run.shape for run in PAPER_RUNS]
    for path, run in zip(paths, PAPER_RUNS, strict=True):
        config = yaml.safe_load((ROOT / path).read_text())
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        rows = list(printed[printed["shape"] == run.shape]["tokens"])
        *milestones, last = rows if run.tokens is None else [*rows, run.tokens]
        assert config["budget"] == {"tokens": last, "milestones": milestones}
        assert model["shape"] == run.shape and data["global_batch"] == run.global_batch
        assert data["random_length_share"] == run.random_length_share
        given = {**model["schedule"], "plateaus": [Plateau(**each) for each in model["schedule"].get("plateaus", [])]}
        assert {name: getattr(run.schedule, name) for name in given} == given
