"""`llada plan` from the command line: tables, JSON, files, and one line for a mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.tuning_studies import tuning_study
from llada_lightning.commands.main import main
from llada_lightning.study.plan import Grid, Stream, plan_study
from llada_lightning.study.results import write_results
from llada_lightning.study.sweep import fit_arguments, read_sweep, render_command

QUICK = ["--sequence-length", "64", "--shapes", "107k", "214k", "443k"]


def plan(*words: str) -> list[str]:
    return ["plan", "--flops", "2e11", "1e11", *words]


def test_the_table_fits_100_columns_and_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--vocab-size",
        "126464",
        "--sequence-length",
        "4096",
        "--device",
        "H100",
        "--devices",
        "8",
        "--mfu",
        "0.4",
    ]
    assert main(["plan", "--flops", "1e18", "1e22", *words]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.rstrip()[-1:].isdigit() and "x" in line]
    assert len(rows) >= 20 and max(map(len, rows)) <= 100
    assert "…" not in out
    for word in ("arm", "llada", "1e+22 FLOPs", "trunks save", "H100-hours"):
        assert word in out


def notes_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["plan", "--vocab-size", "4096", *QUICK, *words]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


def test_a_plan_says_what_rate_llada_wants(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str) -> bool:
        return any("--lr-scale-llada 0.3" in line for line in notes_of(capsys, "--flops", "1e11", *words))

    assert told()
    assert not told("--lr-scale-llada", "0.3")
    assert not told("--lr", "1e-3")
    assert not told("--lr-rule", "kaplan")
    assert not told("--objectives", "arm")


def test_a_plan_says_by_what_factor_its_budgets_miss_a_common_loss(capsys: pytest.CaptureFixture[str]) -> None:
    (note,) = (line for line in notes_of(capsys, "--flops", "1e11", "4e11") if "share no loss" in line)
    assert "they span a factor of 4, and llada needs about 38 times arm's FLOPs" in note
    assert "docs/study.md" in note
    assert "A factor of 9.5 is missing: plan arm from 1.1e+10 or llada up to 3.8e+12 FLOPs" in note
    assert not any("share no loss" in line for line in notes_of(capsys, "--flops", "1e11", "4e12"))
    assert not any("share no loss" in line for line in notes_of(capsys, "--flops", "1e11", "--objectives", "llada"))


def test_a_large_plan_is_judged_by_the_published_study() -> None:
    shapes = Grid(shapes=["107k", "214k", "443k"])
    (note,) = (line for line in plan_study([1e19, 4e19], Stream(512, 64), grid=shapes).warnings() if "no loss" in line)
    assert "about 20 times arm's FLOPs for arm's loss (the published table" in note and "factor of 5 is" in note
    by_total = plan_study([1e11, 4e11], Stream(512, 64), grid=shapes, convention="total")
    assert any("about 20 times" in line and "6ND + attention + head" in line for line in by_total.warnings())


def test_json_is_one_object_with_the_runs(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan("--data", str(prepared), *QUICK, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 12 == found["totals"]["results"]
    assert found["runs"][0]["objective"] == "arm" and found["runs"][0]["wall_hours"] is None
    assert any("--lr-scale-llada 0.3" in line for line in found["warnings"])
    assert found["totals"]["tokens_present"] > 0 and found["totals"]["epochs"] > 0


def test_files_are_written_and_named(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, script = tmp_path / "sweeps" / "mine.yaml", tmp_path / "mine.sbatch"
    words = ["--data", str(prepared), *QUICK, "--out", str(out), "--slurm", str(script), "--objectives", "llada"]
    assert main(plan(*words)) == 0
    shown = capsys.readouterr().out
    assert all(str(path) in shown for path in (out, script, out.with_suffix(".csv")))
    [config, *_] = yaml.safe_load(out.read_text())["parameters"]["config"]["values"]
    assert yaml.safe_load(config)["run"] == {"study": "mine"}
    assert out.read_text().splitlines()[0].startswith("# made by: llada plan --flops 2e11 1e11 --data")
    first = out.read_bytes()
    assert main(plan(*words)) == 0
    assert out.read_bytes() == first


def test_a_base_gives_data_lengths_study_and_convention(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.yaml"
    data = {"path": {str(prepared): 2.0}, "sequence_length": 32, "random_length_share": 0.5, "micro_batch": 2}
    content = {"data": {"init_args": data}, "run": {"study": "ours"}, "budget": {"convention": "total"}}
    base.write_text(yaml.safe_dump(content))
    out = tmp_path / "s.yaml"
    assert main(plan("--base", str(base), "--out", str(out), "--shapes", "107k", "214k", "443k", "--json")) == 0
    row = json.loads(capsys.readouterr().out)["runs"][0]
    assert row["tokens"] == pytest.approx(row["steps"] * row["global_batch"] * (0.5 * 32 + 0.5 * 33 / 2))
    assert abs(row["flops_total"] - row["budget"]) <= row["flops_total"] / row["steps"] / 2
    sweep = yaml.safe_load(out.read_text())
    assert sweep["command"] == ["llada", "fit", "--config", str(base), "${args}"]
    config = yaml.safe_load(sweep["parameters"]["config"]["values"][0])
    assert config["run"] == {"study": "ours"} and config["budget"]["convention"] == "total"
    assert config["trainer"]["accumulate_grad_batches"] * 2 == config["data"]["init_args"]["global_batch"]


def test_few_unique_tokens_of_a_base_are_read_many_times(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.yaml"
    data = {"path": str(prepared), "sequence_length": 32, "train_tokens": 1600, "random_length_share": 0.0}
    base.write_text(yaml.safe_dump({"data": {"init_args": data}}))
    assert main(plan("--base", str(base), "--shapes", "107k", "214k", "443k", "--json")) == 0
    row = json.loads(capsys.readouterr().out)["runs"][0]
    assert row["epochs"] == pytest.approx(row["tokens"] / 1600)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the vocabulary is not known"),
        (["--vocab-size", "512", "--out", "sweep.txt"], "must end in .yaml"),
        (["--vocab-size", "512", "--out", "sweep.yaml"], "needs the data"),
        (["--vocab-size", "512", "--slurm", "x.sbatch"], "give --out too"),
        (["--vocab-size", "512", "--base", "nowhere.yaml"], "'nowhere.yaml' cannot be read"),
        (["--vocab-size", "512", "--measured", "nowhere.csv"], "no such file"),
        (["--vocab-size", "512", "--lr-rule", "luck"], "invalid choice: 'luck'"),
        (["--vocab-size", "512", "--sequence-length", "0"], "--sequence-length 0"),
        (["--vocab-size", "512", "--shapes", "9k", "107k", "214k"], "'9k' is not known"),
        (["--data", "nowhere"], "data folder 'nowhere' does not exist"),
        (["--vocab-size", "512", "--out", "s.yaml", "--slurm", "./s.yaml"], "is the sweep's own file or its table's"),
        (["--vocab-size", "512", "--out", "s.yaml", "--slurm", "s.csv"], "is the sweep's own file or its table's"),
        (["--vocab-size", "0"], "--vocab-size: 0 given"),
        (["--data", "{}"], "plan: --data {} is neither a folder nor a mapping from folders to weights above 0"),
        (["--data", "{a: -1}"], "plan: --data {'a': -1.0} is neither a folder"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(plan(*words)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not captured.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"budget": {"flops": 1e12}}, "sets budget.flops"),
        ({"trainer": {"max_steps": 10}}, "sets trainer.max_steps"),
        ({"trainer": {"accumulate_grad_batches": 4}}, "give --micro-batch"),
        ({"model": {"init_args": {"schedule": {"decay_steps": 0}}}}, "sets model.init_args.schedule.decay_steps"),
        (["no mapping"], "holds no mapping"),
        ({"data": {"init_args": {"sequence_length": "long"}}}, "data.init_args.sequence_length 'long' is not a number"),
        ({"data": {"init_args": {"micro_batch": "few"}}}, "data.init_args.micro_batch 'few' is not a number"),
        ({"data": {"init_args": {"micro_batch": 1.5}}}, "data.init_args.micro_batch 1.5 is not a whole number"),
        ({"data": {"init_args": {"random_length_share": "half"}}}, "random_length_share 'half' is not a number"),
        ({"data": {"init_args": {"random_length_share": 5}}}, "random_length_share 5 must lie between 0 and 1"),
        ({"data": {"init_args": {"mask_eps": 7}}}, "mask_eps 7 must lie between 0 and 1"),
        ({"budget": {"convention": "8nd"}}, "budget.convention '8nd' is not known"),
        ({"budget.flops": 1e12}, "sets budget.flops"),
        ({"data": {"global_batch": 8}}, "sets data.init_args.global_batch to 8, which the plan would"),
        (
            {"model": {"shape": "107k"}},
            "settings of model in a form that llada fit refuses; write `model: {class_path:",
        ),
        ({"data": {"init_args": {}, "path": "x"}}, "settings of data in a form that llada fit refuses"),
        ({"data": {"path": []}}, "base: data.init_args.path [] is neither a folder nor a mapping"),
        (
            {"model": {"init_args": {"schedule": {"lr": "3e-4"}}}},
            "sets model.init_args.schedule.lr to 3e-4, which the plan would overrule; leave it out, or give the plan "
            "the same by --lr",
        ),
        ({"model": {"init_args": {"schedule": {"warmup_steps": 5}}}}, "the same by --warmup-steps"),
        ({"model": {"init_args": {"schedule": {"decay_fraction": 0.5}}}}, "the same by --decay-fraction"),
        ({"data": {"init_args": {"global_batch": 8}}}, "sets data.init_args.global_batch to 8, which the plan would"),
        ({"model": {"init_args": {"shape": "107k"}}}, "the same by --shapes"),
    ],
)
def test_a_base_that_sets_what_the_plan_decides_is_refused(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(content))
    assert main(plan("--vocab-size", "512", "--base", str(base))) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    "short",
    [
        {"data": {"path": "MIXTURE", "sequence_length": 32}},
        {"data": "TokenDataModule", "data.path": "MIXTURE", "data.sequence_length": 32},
        {"data.init_args.path": "MIXTURE", "data": {"sequence_length": 32}, "model": "ArmModule"},
    ],
)
def test_a_base_may_be_short_as_llada_fit_takes_it(
    short: dict[str, Any], prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan and a fit read the same of a short form as of the full one."""
    from llada_lightning.training.cli import LladaCLI

    mixture, out, base = {str(prepared): 2.0}, tmp_path / "s.yaml", tmp_path / "base.yaml"
    full = {"data": {"init_args": {"path": "MIXTURE", "sequence_length": 32}}}
    found = []
    for content in (full, short):
        base.write_text(yaml.safe_dump(content).replace("MIXTURE", json.dumps(mixture)))
        assert main(plan("--base", str(base), "--shapes", "107k", "214k", "443k", "--out", str(out), "--json")) == 0
        planned, sweep = json.loads(capsys.readouterr().out), read_sweep(out)
        settings = LladaCLI(fit_arguments(render_command(sweep, sweep.points[0])), execute=False).settings
        assert (settings.data.init_args.path, settings.data.init_args.sequence_length) == (mixture, 32)
        found.append((planned["runs"], planned["totals"], sweep.points))
    assert found[0] == found[1]


def test_a_mixture_is_given_as_llada_fit_takes_it(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other", tmp_path / "s.yaml"
    shutil.copytree(prepared, other)
    mixture = {str(prepared): 3.0, str(other): 1.0}
    assert main(plan("--data", json.dumps(mixture), *QUICK, "--out", str(out), "--json")) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert main(plan("--data", str(prepared), *QUICK, "--json")) == 0
    alone = json.loads(capsys.readouterr().out)["totals"]
    assert totals["tokens_present"] == 2 * alone["tokens_present"]
    assert totals["epochs"] == pytest.approx(0.75 * alone["epochs"])
    configs = yaml.safe_load(out.read_text())["parameters"]["config"]["values"]
    assert all(yaml.safe_load(config)["data"]["init_args"]["path"] == mixture for config in configs)


def test_a_base_may_repeat_what_the_plan_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.yaml"
    schedule = {"lr": "3e-4", "warmup_steps": 5, "decay_fraction": 0.2}
    base.write_text(
        yaml.safe_dump({"model": {"init_args": {"schedule": schedule}}, "data": {"init_args": {"global_batch": 8}}})
    )
    same = ("--lr", "0.0003", "--warmup-steps", "5", "--batch", "8")
    assert main(plan("--vocab-size", "512", "--base", str(base), *same, "--json")) == 0
    assert {run["lr"] for run in json.loads(capsys.readouterr().out)["runs"]} == {3e-4}


def test_a_vocabulary_below_the_datas_is_refused(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan("--data", str(prepared), "--vocab-size", "100")) == 2
    assert "--vocab-size 100 is below the" in capsys.readouterr().err


# --- tuning ----------------------------------------------------------------------------------------------------------


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["plan", "--vocab-size", "512", "--sequence-length", "64", "--json", *words]) == 0, (
        capsys.readouterr().err
    )
    return json.loads(capsys.readouterr().out)


def test_a_plan_without_a_rule_file_is_what_it_was_before_there_were_any() -> None:
    """Rates, batches, warmups and steps as version 0.1 planned them, and so the names of the runs."""
    found = plan_study([1e11, 4e11], Stream(512, 64), grid=Grid(shapes=["107k", "214k", "443k"])).trunks
    assert [(own.lr, own.global_batch, own.warmup_steps, own.branches[-1].steps) for own in found] == 2 * [
        (0.0121, 32, 8, 306),
        (0.0121, 16, 8, 306),
        (0.0121, 8, 7, 295),
    ]


def test_overlap_lowers_the_references_budgets_and_a_multiplier_says_by_how_much(
    capsys: pytest.CaptureFixture[str],
) -> None:
    by_number = planned(capsys, "--flops", "1e12", "2e12", "--overlap", "--multiplier", "10")
    budgets = {(run["objective"], run["budget"]) for run in by_number["runs"]}
    assert budgets == {("arm", 1e11), ("arm", 2e11), ("llada", 1e12), ("llada", 2e12)}
    measured = planned(capsys, "--flops", "1e12", "2e12", "--overlap")
    assert {run["budget"] for run in measured["runs"] if run["objective"] == "arm"} == {2.63e10, 5.26e10}
    assert not any("share no loss" in note for note in measured["warnings"])


def test_a_tuning_plan_overlaps_by_itself_where_there_are_objectives_to_compare(
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = planned(capsys, "--tune", "--flops", "1e12", "2e12", "4e12")
    assert len(both["runs"]) == 72
    assert {run["budget"] for run in both["runs"] if run["objective"] == "arm"} == {2.63e10, 5.26e10, 1.05e11}
    alone = planned(capsys, "--tune", "--flops", "1e12", "2e12", "4e12", "--objectives", "arm")
    assert {run["budget"] for run in alone["runs"]} == {1e12, 2e12, 4e12}
    chosen = planned(
        capsys, "--tune", "--flops", "1e12", "--tune-rates", "1", "2", "--tune-batches", "1", "--points", "2"
    )
    assert len(chosen["runs"]) == 2 * 2 * 2


def test_a_tuning_study_its_rules_and_the_plan_by_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a results table to a plan: the rates of the plan are the laws', and other vocabularies are refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llada_lightning.study.plots.write_figure", lambda figure, folder, name: Path(folder) / name)
    write_results(tuning_study(noise=0.0)[0], "results.csv")
    assert main(["curves", "results.csv", "--rules", "--out", "out", "--samples", "200"]) == 0
    assert "arm: rate = 0.00325 " in capsys.readouterr().out  # 4e-3 x 4^-0.15
    words = ["plan", "--flops", "4e12", "--rule", "out/rules.json", "--sequence-length", "128", "--json"]
    assert main([*words, "--vocab-size", "1024"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {run["lr"] for run in found["runs"] if run["objective"] == "arm"} == {0.00325}
    assert not any("rules were fitted on" in note for note in found["warnings"])
    for wrong, message in {
        ("--vocab-size", "512"): "was measured with 1024 vocabulary entries, and the plan has 512",
        ("--vocab-size", "1024", "--sequence-length", "64"): "was measured at sequence length 128",
    }.items():
        assert main([*words, *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "nowhere.json"], "'nowhere.json' cannot be read"),
        (["--tune", "--tune-rates", "-1"], "--tune-rates -1 must be a number above 0"),
        (["--tune", "--points", "0"], "--points 0 is below 1"),
        (["--points", "2"], "--points 2 is below 3, which a parabola needs"),
        (["--overlap", "--objectives", "arm"], "--objectives names arm: give arm and another one"),
        (["--overlap", "--multiplier", "0"], "--multiplier 0 must be a number above 0"),
        (["--overlap", "--multiplier", "1e9"], "is below one step of arm"),
    ],
)
def test_a_mistake_in_tuning_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan("--vocab-size", "512", "--sequence-length", "64", *words)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_without_a_budget_the_ways_to_give_one_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--vocab-size", "512"]) == 2
    given = "give --flops C ..., or --paper, or --append FILE"
    assert capsys.readouterr().err == f"error: plan: no budget is given; {given}\n"


def test_a_device_that_is_not_known_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for device, nearest in (("RTX4090", "RTX 4090"), ("H20", "H200")):
        assert main(plan("--vocab-size", "512", "--device", device)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: plan: --device {device} is not known; the nearest is {nearest}; known: H200, ")
        assert error.endswith("for another device leave it out, and give --measured RESULTS\n")


def test_a_run_has_the_number_by_which_a_sweep_knows_it(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.yaml"
    assert main(plan("--data", str(prepared), "--sequence-length", "32", "--out", str(out))) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" *[\d.]+[km] ", line)]
    numbers = list(dict.fromkeys(int(row[-1]) for row in rows))
    assert sorted(numbers) == list(range(len(read_sweep(out).points)))
