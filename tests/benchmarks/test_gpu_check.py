"""The check of a GPU: every row is there whatever happens to its part, and tiny sizes run without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fit_check import PARTS
from gpu_check import Check, main, row_of, table, wheels_part
from gpu_figures import FIT_PARTS, Figure, Missing, Results, best, fit_rate, number, over, step, suite_figures
from gpu_parts import Part, full_parts, gpu_tests, tiny_parts
from processes import Start, child_environment
from step_sizes import EVERYTHING, GRAPHED, LARGE_STEPS, SMALL_STEPS

ROOT = Path(__file__).parents[2]
TITLES = ["part", "figure", "value", "unit", "goal", "verdict"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a check of tiny sizes prints, and its file."""
    out = tmp_path_factory.mktemp("check")
    command = [sys.executable, "benchmarks/gpu_check.py", "--tiny", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "gpu_check.md").read_text() in done.stdout
    return done.stdout, json.loads((out / "gpu_check.json").read_text())


def test_without_a_gpu_its_rows_are_missing(checked: tuple[str, dict[str, Any]]) -> None:
    _, result = checked
    expected = [
        (part.name, figure.name) for part in full_parts(Path("o"), Path("d")) if part.gpu for figure in part.figures
    ]
    missing = [row for row in result["rows"] if row["reason"] == "no CUDA device"]
    assert [(row["part"], row["figure"]) for row in missing] == expected
    assert all(row["verdict"] == "missing" and row["value"] is None and row["command"] for row in missing)
    goals = {row["figure"]: row["goal"] for row in missing if row["goal"]}
    assert goals["853k: graphs over compiled"] == "at least 5"
    assert goals["llada-1b: `llada`, compiled or graphs"] == "at least 0.5"
    assert goals["second fit, had these taken 10 s"] == "at most 20"


def test_tiny_sizes_run_without_a_gpu(checked: tuple[str, dict[str, Any]]) -> None:
    _, result = checked
    rows = {row["figure"]: row for row in result["rows"] if row["figure"].startswith("tiny: ")}
    flash = rows.pop("tiny: attention by flash")
    assert flash["verdict"] == "missing" and "CUDA" in flash["reason"]
    values = {name.removeprefix("tiny: "): row["value"] for name, row in rows.items()}
    assert all(value is not None for value in values.values()), rows
    assert values.pop("repeated: logged rows that differ") == 0
    assert values.pop("killed with -9 and resumed: logged rows that differ") == 0
    assert values.pop("fsdp2: largest difference of losses, fp32") < 1e-4
    assert all(value > 0 for value in values.values())
    assert all(row["seconds"] > 0 for row in rows.values())


def test_the_table_has_a_line_for_each_row(checked: tuple[str, dict[str, Any]]) -> None:
    printed, result = checked
    lines = [cells(line) for line in printed.splitlines() if line.startswith("| ")]
    assert lines[0] == TITLES and {len(line) for line in lines} == {len(TITLES)}
    assert [line[:2] for line in lines[2:]] == [[row["part"], row["figure"]] for row in result["rows"]]
    assert result["versions"]["torch"] in printed and result["date"] in printed
    assert {"hardware", "git_commit", "command", "seconds", "cuda"} <= result.keys()


# --- rows ------------------------------------------------------------------------------------------------------------


def part(figure: Figure, *command: str, limit: float = 60.0, name: str = "one", together: str = "") -> Part:
    return Part(name, command, Path("none"), (figure,), limit, together)


def row(figure: Figure, results: Results) -> dict[str, Any]:
    return row_of(part(figure, "-c", "pass"), figure, results, 1.0)


def test_goals_are_met_or_not_or_there_is_none() -> None:
    results = Results({"one": {"figures": {"rate": 5.0}}})
    rate = number("one", "figures", "rate")
    verdicts = [row(Figure("rate", "x", rate, **goal), results)["verdict"] for goal in GOALS]
    assert verdicts == ["met", "not met", "met", "not met", None]
    assert row(Figure("rate", "x", rate, least=5.5), results)["goal"] == "at least 5.5"


GOALS: list[dict[str, float]] = [{"least": 5}, {"least": 5.1}, {"most": 5}, {"most": 4.9}, {}]


def test_a_figure_that_there_is_not_says_why() -> None:
    rows = [
        {"shape": "853k", "objective": "llada", "variant": EVERYTHING, "status": "missing: Triton is missing"},
        {"shape": "2.66m", "objective": "llada", "variant": EVERYTHING, "status": "measured", "mfu": None},
    ]
    results = Results({"steps": {"rows": rows}}, {"steps": "ended after its 90 s", "fits": "exit code 1: no memory"})
    reasons = {
        size.shape: row(Figure("", "", step("steps", size, EVERYTHING, "mfu")), results)["reason"]
        for size in SMALL_STEPS
    }
    assert reasons == {
        "853k": "Triton is missing",
        "2.66m": "the peak of this device is not known",
        "14.2m": "ended after its 90 s",
    }
    both = over(number("fits", "rate"), number("steps", "rate"))
    assert row(Figure("", "", both), results)["reason"] == "exit code 1: no memory"
    assert row(Figure("", "", number("others", "rate")), results)["reason"] == "not measured by the part 'others'"


def test_an_action_that_failed_keeps_what_it_had() -> None:
    results = Results({"fit": {"twice": {"fits": [1], "status": "failed: no end within 150 s"}}})
    assert results.of("fit", "twice", "fits") == [1]
    with pytest.raises(Missing, match="no end within 150 s"):
        results.of("fit", "twice", "rows")


def test_graphs_are_compared_with_the_compiled_step_of_the_same_check() -> None:
    figures = {(f.name, f.unit): f for p in full_parts(Path("o"), Path("d")) for f in p.figures}
    loop = {"shape": "85m", "objective": "llada", "status": "measured"}
    compiled = {**loop, "variant": EVERYTHING, "step_seconds": 0.05, "mfu": 0.3}
    results = Results({"large steps": {"rows": [compiled]}})
    most = figures["85m: `llada`, compiled or graphs", "MFU"]
    assert most.find(results) == 0.3
    results.written["large steps"]["rows"] += [{**loop, "variant": GRAPHED, "step_seconds": 0.02, "mfu": 0.45}]
    assert figures["85m: graphs over compiled", "times the speed"].find(results) == 2.5
    assert most.find(results) == 0.45 and most.met(0.45)
    fit = {"shape": "85m", "graph": "true", "status": "measured", "step_seconds": 0.025}
    results.written["large fits"] = {"rates": [fit]}
    rate = figures["85m: fit with graphs over its bare loop", "times the speed"]
    assert rate.find(results) == pytest.approx(0.8) and rate.met(0.8) is False
    seconds = fit_rate("large fits", LARGE_STEPS[0], True, "step_seconds")
    assert best(number("none", "mfu"), seconds)(results) == 0.025


def test_tests_that_did_not_all_run_are_no_success() -> None:
    [failed, *_] = suite_figures("tests")
    counts = {"failed": 0, "passed": 3, "skipped": 0}
    assert row(failed, Results({"tests": counts}))["verdict"] == "met"
    cut = row(failed, Results({"tests": counts}, {"tests": "ended after its 110 s"}))
    assert cut["verdict"] == "missing" and '"passed": 3' in cut["reason"]
    assert row(failed, Results({"tests": {**counts, "failed": 1}}, {"tests": "exit code 1"}))["verdict"] == "not met"


def test_the_parts_of_a_fit_have_the_names_of_its_benchmark() -> None:
    assert tuple(PARTS.values()) == FIT_PARTS


def test_every_command_is_one_that_its_script_takes() -> None:
    """The options of the full parts, which no CPU runs."""
    import fit_check
    import train_speed

    parts = [*full_parts(Path("/o"), Path("/d")), *tiny_parts(Path("/o"), Path("/d"), "cuda")]
    words = {f"{each.name} {each.limit}": list(each.command) for each in parts}
    for command in words.values():
        if command[0] == "benchmarks/train_speed.py":
            options = train_speed.parse(command[1:])
            assert list(train_speed.workloads(options, train_speed.PRESETS[options.preset]))
        elif command[0] == "benchmarks/fit_check.py":
            assert fit_check.parse(command[1:]).sizes
        elif command[0].startswith("benchmarks/"):
            source = (ROOT / command[0]).read_text()
            assert all(f'"{word}"' in source for word in command if word.startswith("--"))
    assert "tests/model/test_attention.py" in gpu_tests()


def test_bars_in_a_reason_do_not_break_the_table() -> None:
    line = table([row(Figure("a", "x", number("none", "rate")), Results(reasons={"none": "a | b"}))]).splitlines()[2]
    assert "a \\| b" in line


# --- parts -----------------------------------------------------------------------------------------------------------


def checking(folder: Path, minutes: float = 1.0) -> Check:
    (folder / "gpu_check").mkdir()
    check = Check(folder, folder, minutes, [])
    check.environment = child_environment(folder / "tmp")
    return check


def writing(path: Path, then: str = "") -> tuple[str, ...]:
    return ("-c", f"open({str(path)!r}, 'w').write('{{\"rate\": 2.0}}'); {then}")


def test_a_part_that_fails_or_hangs_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it has written before counts. The clock stands still until the part that hangs does."""
    hung = tmp_path / "hangs.json"
    monkeypatch.setattr(Start, "seconds", property(lambda _: 31.0 if hung.exists() and hung.read_text() else 0.0))
    ends = {
        "hangs": "import signal; signal.pause()",
        "fails": "import sys; sys.exit('no | memory')",
        "works": "print('done')",
    }
    parts = []
    for name, end in ends.items():
        path = tmp_path / f"{name}.json"
        figures = (Figure("rate", "x", number(name, "rate")), Figure("other", "x", number(name, "other")))
        limit = 30.0 if name == "hangs" else 60.0
        parts.append(Part(name, writing(path, end), path, figures, limit, "at once" if name != "works" else ""))
    check = checking(tmp_path)
    check.run(parts)
    found = {(row["part"], row["figure"]): (row["value"], row["reason"]) for row in check.rows}
    assert {key: value for key, (value, _) in found.items() if key[1] == "rate"} == dict.fromkeys(
        ((name, "rate") for name in ends), 2.0
    )
    assert found["hangs", "other"][1] == "ended after its 30 s"
    assert found["fails", "other"][1] == "exit code 1: no | memory"
    assert found["works", "other"][1] == "not measured by the part 'works'"
    assert check.failed == ["fails"]
    assert "| no | memory" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu_check.json").read_text())["rows"] == check.rows


def test_when_time_is_up_nothing_is_begun(tmp_path: Path) -> None:
    check = checking(tmp_path, minutes=0.01)
    check.run([part(Figure("rate", "x", number("one", "rate")), "-c", "raise SystemExit(3)")])
    [row] = check.rows
    assert row["reason"] == "no time was left of 0.01 minutes" and row["seconds"] is None
    assert not check.failed


def test_parts_that_were_not_asked_for_are_missing(tmp_path: Path) -> None:
    check = checking(tmp_path)
    check.wanted = ["two"]
    check.run([part(Figure("rate", "x", number("one", "rate")), "-c", "pass")])
    assert check.rows[0]["reason"] == "not asked for"


def test_wheels_are_installed_without_what_they_ask_for(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "small_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small_thing.py", "answer = 42\n")
        info = "small_thing-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0\nRequires-Dist: absent\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"small_thing.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    check = checking(tmp_path)
    check.run([wheels_part(wheels, site)])
    assert [(row["value"], row["reason"]) for row in check.rows] == [(1.0, None)]
    assert (site / "small_thing.py").exists()


def test_an_unmet_goal_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.json"
    for least, code in ((1.0, 0), (3.0, 1)):
        figures = (Figure("rate", "x", number("one", "rate"), least=least),)
        made = [Part("one", writing(path), path, figures, 60)]
        monkeypatch.setattr("gpu_check.full_parts", lambda *_: [])
        monkeypatch.setattr("gpu_check.tiny_parts", lambda *_, made=made: made)
        monkeypatch.setattr("gpu_check.machine_part", lambda _: Part("machine", writing(path), path, (), 60))
        assert main(["--out", str(tmp_path)]) == code
