"""Studies that grow: what an appended sweep plans and trains, and files that are not overwritten once edited."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_runs import metrics, timeless
from llada_lightning.commands.main import main
from llada_lightning.compute.shapes import shape_name
from llada_lightning.study.plan import Grid, Plan, Recipe, Stream, TuningGrid, plan_study
from llada_lightning.study.plan.extension import extend, is_unedited, sealed
from llada_lightning.study.plan.outputs import Destination, run_config, run_values
from llada_lightning.study.sweep import check_unchanged, read_sweep
from llada_lightning.support.errors import UserError

SHAPES = ["L1-d32-h1-kv1-ff64", "L2-d32-h1-kv1-ff64", "L3-d32-h1-kv1-ff64"]
DESTINATION = Destination("study", data="data/x")
EXACT = (
    "run",
    "val_nats_per_token",
    "val_stderr",
    "tokens",
    "unique_tokens",
    "flops_total",
    "lr",
    "warmup_steps",
    "steps",
)


def planned(budgets: list[float], separate: bool = False, **recipe: Any) -> Plan:
    """One objective, three shapes."""
    made = Recipe(**recipe)
    return plan_study(
        budgets, Stream(512, 64), grid=Grid(shapes=SHAPES), recipe=made, objectives=["arm"], separate=separate
    )


def results(plan: Plan) -> set[tuple[Any, ...]]:
    columns = ["objective", "shape", "seed", "budget", "steps", "decay_steps", "lr", "global_batch", "warmup_steps"]
    return set(plan.table()[columns].itertuples(index=False, name=None))


# --- what joins a plan -----------------------------------------------------------------------------------------------


def test_a_larger_budget_starts_from_the_last_fork_and_keeps_rate_batch_and_warmup() -> None:
    before = planned([1e10, 2e10])
    after = extend(before, [8e10, 4e10], [])
    assert after.trunks[:3] == before.trunks and len(after.trunks) == 6
    for old, new in zip(before.trunks, after.trunks[3:], strict=True):
        assert (new.shape, new.lr, new.global_batch, new.warmup_steps) == (
            old.shape, old.lr, old.global_batch, old.warmup_steps,
        )  # fmt: skip
        assert [branch.budget for branch in new.branches] == [4e10, 8e10]
        assert new.start_step == old.branches[-1].fork_step
        assert new.continues == ((1e10, 2e10),)
        decays = sum(branch.decay_steps for branch in new.branches)
        assert new.trunk_steps == new.branches[-1].fork_step - old.branches[-1].fork_step + decays
    alone = planned([4e10, 8e10])
    assert {trunk.lr for trunk in after.trunks[3:]} != {trunk.lr for trunk in alone.trunks}
    config = run_config(after, after.trunks[3], after.trunks[3].branches, DESTINATION)
    assert config["budget"] == {"flops": [4e10, 8e10], "convention": "6nd", "trunks": [[1e10, 2e10]]}


def test_budgets_between_start_from_the_fork_before_them_and_smaller_ones_from_the_beginning() -> None:
    after = extend(planned([2e10, 8e10]), [1e10, 3e10, 4e10, 1.6e11], [])
    [first, *_] = after.trunks
    parts = [trunk for trunk in after.trunks[3:] if trunk.shape == first.shape]
    assert [[branch.budget for branch in part.branches] for part in parts] == [[1e10], [3e10, 4e10], [1.6e11]]
    assert [part.start_step for part in parts] == [0, *(branch.fork_step for branch in first.branches)]
    assert [part.continues for part in parts] == [(), ((2e10, 8e10),), ((2e10, 8e10),)]
    again = extend(after, [3.2e11], [])
    assert again.trunks[-3].continues == ((2e10, 8e10), (1e10,), (3e10, 4e10), (1.6e11,))
    assert again.trunks[-3].start_step == parts[-1].branches[-1].fork_step


def test_a_run_of_one_budget_keeps_the_fork_from_which_it_can_be_continued() -> None:
    after = extend(planned([2e10, 8e10]), [1.6e11], [])
    kept = [run_config(after, trunk, branches, DESTINATION)["run"].get("keep_fork") for trunk, branches in after.runs()]
    assert kept == [None] * 3 + [True] * 3
    constant = planned([2e10], decay_fraction=0.0)
    assert "keep_fork" not in run_values(constant, DESTINATION)[0]


@settings(max_examples=20)
@given(st.sets(st.integers(0, 12), min_size=2, max_size=8), st.data())
def test_in_whatever_order_a_study_grows_it_has_the_results_of_one_plan(powers: set[int], data: st.DataObject) -> None:
    """The runs of before stay as they are, and each (shape, seed, budget) is trained once."""
    budgets = [1e10 * 1.5**power for power in data.draw(st.permutations(sorted(powers)))]
    cut = data.draw(st.integers(1, len(budgets) - 1))
    recipe = {"lr": 1e-3, "batch": 4, "warmup_steps": 2}
    plan = planned(budgets[:1], **recipe)
    for added, seeds in ((budgets[1:cut], []), ([], [5]), (budgets[cut:], [])):
        if added or seeds:
            values = run_values(plan, DESTINATION)
            plan = extend(plan, added, seeds, "all")
            assert run_values(plan, DESTINATION)[: len(values)] == values
    whole = planned(budgets, **recipe)
    every = {(*row[:2], seed, *row[3:]) for row in results(whole) for seed in (0, 5)}
    assert results(plan) == every and len(plan.table()) == len(every)
    for trunk in plan.trunks:
        assert 0 <= trunk.start_step < trunk.branches[0].fork_step


def test_a_plan_with_lowered_budgets_of_the_reference_lowers_the_new_ones_alike() -> None:
    stream, grid = Stream(300, 32), Grid(shapes=SHAPES)
    plan = plan_study([1e9, 2e9], stream, grid=grid, overlap=True, multiplier=4.0)
    grown = extend(plan, [4e9], [])
    assert grown.budgets_of("llada") == (1e9, 2e9, 4e9)
    assert grown.budgets_of("arm") == (2.5e8, 5e8, 1e9)  # 1e9 is a budget of llada, and new for arm
    assert grown.trunks[: len(plan.trunks)] == plan.trunks
    with pytest.raises(UserError, match=r"--flops 2e[+]09 is in the sweep already"):
        extend(plan, [2e9], [])
    between = extend(plan, [5e8], [])  # which is a budget of arm, whose own for it is new
    assert (between.budgets_of("llada"), between.budgets_of("arm")) == ((5e8, 1e9, 2e9), (1.25e8, 2.5e8, 5e8))


def test_a_budget_that_some_objectives_have_joins_the_others() -> None:
    plan = plan_study([1e9, 2e9], Stream(300, 32), grid=Grid(shapes=SHAPES), objectives=["arm", "llada"])
    one = extend(plan, [4e9], [], shapes=[SHAPES[0]])
    both = extend(one, [4e9], [])
    assert len(one.trunks) == len(plan.trunks) + 2 and len(both.trunks) == len(plan.trunks) + 6
    assert results(both) == results(extend(plan, [4e9], []))


def test_a_tuning_study_is_planned_again() -> None:
    plan = plan_study([1e9], Stream(300, 32), grid=Grid(shapes=SHAPES[:1]), tuning=TuningGrid([0.5, 1.0], [1.0]))
    with pytest.raises(UserError, match="--append to a tuning study; plan another one"):
        extend(plan, [2e9], [])


def test_seeds_join_at_cheap_points_and_new_budgets_join_the_seeds_that_are_everywhere() -> None:
    plan = planned([1e10, 2e10, 4e10, 8e10])
    cheap = extend(plan, [], [5])
    rows = cheap.table()[len(plan.table()) :]
    assert sorted(rows["budget"]) == [1e10, 2e10, 4e10]
    assert rows["shape"].nunique() == 1 and set(rows["seed"]) == {5}
    whole = extend(cheap, [], [7], "all")
    assert len(whole.table()) - len(cheap.table()) == len(plan.table())
    grown = extend(whole, [1.6e11], []).table()[len(whole.table()) :]
    assert set(grown["seed"]) == {0, 7}


def test_a_new_budget_can_be_for_some_shapes_alone() -> None:
    before = planned([1e10, 2e10])
    after = extend(before, [4e10], [], shapes=[SHAPES[2], SHAPES[1]])
    [*_, second, third] = after.trunks
    assert after.trunks[:3] == before.trunks and len(after.trunks) == 5
    assert [shape_name(own.shape) for own in (second, third)] == SHAPES[1:]
    assert (second.start_step, second.continues) == (before.trunks[1].branches[-1].fork_step, ((1e10, 2e10),))
    all_of_them = extend(before, [4e10], []).trunks
    assert (second, third) == all_of_them[4:]


def test_a_shape_that_is_new_to_the_plan_can_have_budgets_that_others_have() -> None:
    wider = "L1-d64-h1-kv1-ff128"
    after = extend(planned([1e10, 2e10], lr=1e-3, batch=4), [2e10, 4e10], [], shapes=[wider])
    assert [shape_name(own.shape) for own in after.trunks[3:]] == [wider]
    assert [branch.budget for branch in after.trunks[3].branches] == [2e10, 4e10]
    assert after.trunks[3].start_step == 0
    with pytest.raises(UserError, match=r"--flops 2e[+]10 is in the sweep already"):
        extend(after, [2e10], [], shapes=[wider])


def test_new_seeds_can_be_for_some_shapes_alone() -> None:
    plan = planned([1e10, 2e10])
    rows = extend(plan, [], [5, 6], "all", [SHAPES[0]]).table()[len(plan.table()) :]
    assert set(rows["shape"]) == {SHAPES[0]}
    assert sorted(zip(rows["seed"], rows["budget"], strict=True)) == [(5, 1e10), (5, 2e10), (6, 1e10), (6, 2e10)]
    with pytest.raises(UserError, match="no run for --shapes L9-d32-h1-kv1-ff64, to which --seeds would add"):
        extend(plan, [], [5], "all", ["L9-d32-h1-kv1-ff64"])


def test_a_seed_of_some_points_joins_the_others() -> None:
    plan = planned([1e10, 2e10, 4e10, 8e10])
    cheap = extend(plan, [], [5])
    best = extend(cheap, [], [5], "all", [SHAPES[0]])
    whole = extend(best, [], [5], "all")
    assert results(whole) == results(extend(plan, [], [5], "all"))
    assert len(whole.table()) == len(set(whole.table()[["shape", "seed", "budget"]].itertuples(index=False)))
    for seeds, budgets, shapes in (([5], [], []), ([5], [], [SHAPES[0]]), ([0], [1.6e11], [])):
        with pytest.raises(UserError, match=f"--seeds {seeds[0]} is in the sweep already"):
            extend(whole, budgets, seeds, "all", shapes)


def test_a_shape_as_the_table_prints_it_is_that_of_the_sweep() -> None:
    own = ["L1-d32-h1-kv1-ff96", "L2-d32-h1-kv1-ff96", "L2-d32-h1-kv1-ff64", "L3-d32-h1-kv1-ff64"]
    plan = plan_study([1e10], Stream(512, 64), grid=Grid(shapes=own), objectives=["arm"])
    assert shape_name(extend(plan, [2e10], [], shapes=["1x32"]).trunks[-1].shape) == own[0]
    with pytest.raises(UserError, match=f"--shapes 2x32 stands for 2 shapes of the sweep; name one of {own[2]} and"):
        extend(plan, [2e10], [], shapes=["2x32"])


def test_separate_runs_are_appended_as_separate_runs() -> None:
    after = extend(planned([1e10, 2e10], separate=True), [4e10], [3], "all")
    assert len(after.runs()) == 6 + 3 + 9
    assert all(trunk.start_step == 0 and trunk.continues == () for trunk in after.trunks)


@pytest.mark.parametrize(
    ("budgets", "seeds", "said"),
    [
        ([], [], "adds nothing"),
        ([2e10], [], "--flops 2e+10 is in the sweep already"),
        ([4e10, 4e10], [], "--flops 4e+10 is given twice"),
        ([2.0000001e10], [], "makes as many steps of arm-L1-d32-h1-kv1-ff64-s0 as 2e+10, which the sweep has"),
        ([], [0], "--seeds 0 is in the sweep already"),
        ([], [1, 1], "give each once"),
        ([], [-1], "--seeds: -1 given"),
        ([float("nan")], [], "--flops: nan is not a number"),
    ],
)
def test_what_cannot_join_is_one_line(budgets: list[float], seeds: list[int], said: str) -> None:
    with pytest.raises(UserError) as raised:
        extend(planned([1e10, 2e10]), budgets, seeds)
    assert said in str(raised.value) and "\n" not in str(raised.value)


# --- files -----------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=50), st.integers(0, 1000))
def test_a_seal_finds_every_edit(body: str, where: int) -> None:
    text = f"# made by: x\nname: y\n{body}"
    whole = sealed(text, "a,b\n")
    assert is_unedited(whole) and not is_unedited(text)
    at = where % len(whole)
    other = "0" if whole[at] != "0" else "1"
    assert (
        not is_unedited(whole[:at] + other + whole[at + 1 :]) or whole[:at].count("\n") == 1
    )  # in the seal's own line


@pytest.fixture
def sweep(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A planned sweep with its table and its job array."""
    monkeypatch.chdir(tmp_path)
    assert main(words(prepared)) == 0
    return tmp_path / "s.yaml"


def words(prepared: Path, *extra: str) -> list[str]:
    given = ["--data", str(prepared), "--sequence-length", "32", "--objectives", "arm", "--shapes", *SHAPES]
    return ["plan", "--flops", "1e8", "2e8", "--batch", "4", *given, "--out", "s.yaml", "--slurm", "s.sh", *extra]


@pytest.mark.parametrize("name", ["s.yaml", "s.csv", "s.sh"])
def test_a_file_that_was_edited_is_not_overwritten(
    name: str, prepared: Path, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = words(prepared, "--lr", "1e-3")
    assert main(other) == 0  # nothing was edited
    path = sweep.with_name(name)
    path.write_text(path.read_text().replace("arm", "my arm", 1) if name != "s.yaml" else path.read_text() + "# mine\n")
    before = {own: (sweep.parent / own).read_bytes() for own in ("s.yaml", "s.csv", "s.sh")}
    capsys.readouterr()
    assert main(words(prepared)) == 2
    shown = capsys.readouterr().err
    assert f"'{name}' was edited since it was planned" in shown and "--force" in shown and shown.count("\n") == 1
    assert {own: (sweep.parent / own).read_bytes() for own in before} == before
    assert main(words(prepared, "--force")) == 0
    assert main(words(prepared)) == 0


def test_runs_that_were_appended_are_not_planned_away(
    prepared: Path, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--append", "s.yaml", "--flops", "4e8"]) == 0
    before = sweep.read_bytes()
    capsys.readouterr()
    assert main(words(prepared)) == 2
    shown = capsys.readouterr().err
    assert "'s.yaml' holds runs that --append has added" in shown and shown.count("\n") == 1
    assert sweep.read_bytes() == before
    assert main(words(prepared, "--force")) == 0
    assert b"appended by" not in sweep.read_bytes()
    assert main(words(prepared)) == 0


def test_a_table_of_another_program_is_not_overwritten(
    prepared: Path, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.with_name("results.csv").write_text("run,loss\na,1\n")
    assert main([word.replace("s.yaml", "results.yaml").replace("s.sh", "r.sh") for word in words(prepared)]) == 2
    assert "'results.csv' was edited since it was planned, or is no file" in capsys.readouterr().err
    assert not sweep.with_name("results.yaml").exists()


def test_an_appended_file_says_its_commands_and_its_study_goes_on(
    sweep: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, first = sweep.parent / "study", read_sweep(sweep).points
    assert check_unchanged(read_sweep(sweep), study, by_index=True) == 0
    assert main(["plan", "--append", "s.yaml", "--flops", "4e8"]) == 0
    assert "added: runs 3 to 5" in capsys.readouterr().out
    assert main(["plan", "--append", "s.yaml", "--seeds", "7", "8", "--seeds-at", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["added"] == "runs 6 to 11 (--index of llada sweep run)" and found["totals"]["results"] == 27
    for file in (sweep, sweep.with_name("s.sh")):
        lines = file.read_text().splitlines()
        [made] = [line for line in lines if line.startswith("# made by: ")]
        assert made.startswith("# made by: llada plan --flops 1e8 2e8 ")
        assert [line for line in lines if line.startswith("# appended by: ")] == [
            "# appended by: llada plan --append s.yaml --flops 4e8",
            "# appended by: llada plan --append s.yaml --seeds 7 8 --seeds-at all --json",
        ]
    assert "--array=0-11" in sweep.with_name("s.sh").read_text()
    assert len(sweep.with_name("s.csv").read_text().splitlines()) == 1 + 27
    grown = read_sweep(sweep)
    assert grown.points[:3] == first and len(grown.points) == 12
    assert check_unchanged(grown, study, by_index=True) == 9  # the numbers of the first runs hold


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--flops", "2e8"], "--flops 2e+08 is in the sweep already"),
        (["--seeds", "0"], "--seeds 0 is in the sweep already"),
        (["--flops", "4e8", "--shapes", "9x9"], "--shapes 9x9 is no shape that the planner chooses itself"),
        ([], "adds nothing"),
        (["--flops", "4e8", "--lr", "1e-3"], "unrecognized arguments: --lr"),
    ],
)
def test_what_cannot_be_appended_is_one_line(
    extra: list[str], said: str, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sweep.read_bytes()
    capsys.readouterr()
    assert main(["plan", "--append", "s.yaml", *extra]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1
    assert sweep.read_bytes() == before


def test_only_an_unedited_sweep_of_this_version_can_be_appended_to(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append = ["plan", "--append", "s.yaml", "--flops", "4e8"]
    made = sweep.read_text()

    def refused(text: str, said: str) -> bool:
        sweep.write_text(text)
        capsys.readouterr()
        assert main(append) == 2
        shown = capsys.readouterr().err
        return said in shown and shown.count("\n") == 1 and sweep.read_text() == text

    assert refused(made.replace("warmup_steps: ", "warmup_steps: 1"), "'s.yaml' was edited since it was planned")
    assert refused("method: grid\n", "'s.yaml' was edited since it was planned, or is no sweep")
    lines = [line for line in made.splitlines() if not line.startswith("# sha256")]
    config = yaml.safe_load("\n".join(lines))
    config["parameters"]["config"]["values"].pop()
    other = sealed(lines[0] + "\n" + yaml.safe_dump(config))
    assert refused(other, "its commands no longer make its runs: it is of another version")
    sweep.unlink()
    assert main(append) == 2
    assert "'s.yaml' cannot be read" in capsys.readouterr().err


# --- what is trained -------------------------------------------------------------------------------------------------


def records(folder: Path) -> list[dict[str, Any]]:
    return [{key: record[key] for key in EXACT} for record in timeless(folder)]


@pytest.mark.slow
def test_a_study_that_grows_twice_repeats_no_run_and_ends_as_one_planned_at_once(
    prepared: Path, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one shape: a budget joins its trunk, then a seed; the results are bit for bit those of a single plan."""

    def run(name: str, index: int) -> Path:
        before = set(sweep.parent.glob("runs/*/arm-*"))
        assert main(["sweep", "run", name, "--index", str(index), "--", "--data.val_sequences=24"]) == 0
        [folder] = set(sweep.parent.glob("runs/*/arm-*")) - before or [None]
        return folder  # type: ignore[return-value]

    old = run("s.yaml", 0)
    before = (old / "result.json").read_bytes()
    assert main(["plan", "--append", "s.yaml", "--flops", "4e8"]) == 0
    assert run("s.yaml", 0) is None  # done: there is no new folder
    assert (old / "result.json").read_bytes() == before
    larger = run("s.yaml", 3)
    assert main(["plan", "--append", "s.yaml", "--seeds", "1", "--seeds-at", "all"]) == 0
    assert [run("s.yaml", index) for index in (0, 3)] == [None, None]
    seed = run("s.yaml", 6)

    [fork] = {record["steps"] - record["decay_steps"] for record in timeless(old)[-1:]}
    trunk, continued = [[int(row["step"]) for row in metrics(folder)] for folder in (old, larger)]
    assert trunk == list(range(1, fork + 1))  # beside it only decays are trained
    assert continued == list(range(fork + 1, timeless(larger)[0]["steps"] + 1))

    row = next(csv.DictReader(sweep.with_suffix(".csv").open()))
    rates = ["--lr", row["lr"], "--warmup-steps", row["warmup_steps"], "--seeds", "0", "1", "--seeds-at", "all"]
    once = [word.replace("s.yaml", "once.yaml").replace("s.sh", "once.sh") for word in words(prepared, *rates)]
    assert main([*once[:4], "4e8", *once[4:]]) == 0
    planned_at_once = [run("once.yaml", index) for index in (0, 1)]
    assert records(old) + records(larger) == records(planned_at_once[0])
    assert records(seed) == records(planned_at_once[1])
    assert {record["seed"] for record in timeless(seed)} == {1}
