"""The kill matrix: what it compares, when it kills, and that nothing escapes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kill_matrix
from helpers.tiny_runs import fit
from kill_fits import CellReport, Kill, cells
from kill_moments import aims, look
from processes import Start
from run_state import differences, read_state


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("llada", prepared, tmp_path_factory.mktemp("trained"), "--trainer.max_steps=6")


def edit_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return edit


def edit_rows(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "metrics.csv"
        file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")

    return edit


def edit_tensor(part: str) -> Callable[[Path], None]:
    """Move one number by as little as can be."""

    def edit(folder: Path) -> None:
        file = folder / "checkpoints" / "step=00000006.ckpt"
        content = torch.load(file)
        tensors = content["state_dict"] if part == "weights" else content["optimizer_states"][0]["state"][3]
        tensor = list(tensors.values())[-1]
        tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(torch.inf))
        torch.save(content, file)

    return edit


def with_other_clock(rows: list[str]) -> list[str]:
    place = rows[0].split(",").index("seconds")
    cells_ = rows[2].split(",")
    cells_[place] = "123.5"
    return [*rows[:2], ",".join(cells_), *rows[3:]]


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (edit_rows(lambda rows: rows), set()),
        (edit_rows(with_other_clock), set()),
        (edit_text("result.json", '"wall_seconds": ', '"wall_seconds": 9'), set()),
        (edit_rows(lambda rows: [*rows[:3], *rows[4:]]), {"curve"}),
        (edit_rows(lambda rows: [*rows, rows[-1]]), {"curve"}),
        (edit_rows(lambda rows: [rows[0], rows[2], rows[1], *rows[3:]]), {"curve"}),
        (edit_tensor("weights"), {"weights"}),
        (edit_tensor("moments"), {"optimizer"}),
        (edit_text("result.json", '"tokens": ', '"tokens": 1'), {"result"}),
        (edit_text("validation.csv", ".", ".0"), {"result"}),
    ],
)
def test_every_difference_is_seen_and_the_clock_is_none(
    trained: Path, tmp_path: Path, edit: Callable[[Path], None], found: set[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    edit(copy)
    assert set(differences(read_state(copy), read_state(trained))) == found


def test_a_folder_shows_what_is_lost_and_what_is_being_done(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    done = look(copy)
    assert (done.saved, done.lost, done.newest, done.saving) == (6, 0, 6, False)
    assert (done.moment(0.0), done.moment(2e12)) == ("after a result", "start-up")
    (copy / "result.json").unlink()
    assert look(copy).moment(0.0) == "result"
    (copy / "validation.csv").unlink()
    last = copy / "checkpoints" / "step=00000006.ckpt"
    last.rename(last.with_name(last.name + ".partial"))
    half = look(copy)
    assert (half.saved, half.lost, half.moment(0.0)) == (5, 1, "save")
    assert look(tmp_path / "nothing").moment(0.0) == "start-up"


@given(st.integers(0, 500), st.integers(1, 40))
def test_shares_are_whole_and_equal(total: int, parts: int) -> None:
    found = kill_matrix.shares(total, parts)
    assert sum(found) == total and max(found) - min(found) <= 1


def test_a_hundred_kills_fall_everywhere() -> None:
    """On every cell, at all that is aimed at; the cells hold all that is promised."""
    matrix = cells()
    kills = [aims(count, n) for n, count in enumerate(kill_matrix.shares(100, len(matrix)))]
    assert min(map(len, kills)) >= 4
    counted = Counter(aim for chosen in kills for aim in chosen)
    assert min(counted[aim] for aim in ("life", "training", "save", "validation", "result")) >= 8
    single = {(c.objective, c.workers, c.mixture) for c in matrix if c.strategy is None}
    assert single == {(o, w, m) for o in ("arm", "llada") for w in (0, 1, 2) for m in (False, True)}
    for objective in ("arm", "llada"):
        own = [cell for cell in matrix if cell.objective == objective]
        assert {cell.accumulation for cell in own} == {1, 3}
        assert {cell.strategy for cell in own} == {None, "ddp", "fsdp2"}
        assert any(cell.budgets for cell in own)
    assert len({cell.name for cell in matrix}) == len(matrix)


def test_no_process_escapes(tmp_path: Path) -> None:
    """A child in a session of its own whose parent has died is still found by its tag."""
    script = (
        "import subprocess, sys; wait = 'import sys, signal; signal.pause()'; "
        "subprocess.Popen([sys.executable, '-I', '-S', '-c', wait], start_new_session=True)"
    )
    (tmp_path / "log").touch()
    environment = {"LLADA_BENCHMARK_TAG": "tag-of-this-test"}
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", script], env=environment, stdout=subprocess.DEVNULL)
    run = Start(process, "tag-of-this-test", tmp_path / "log")
    process.wait(30)
    [orphan] = run.members()
    assert orphan != process.pid
    assert run.outlived(0.0)
    run.kill()
    assert not run.members()
    assert not run.outlived(0.0)


def report(name: str, **others: object) -> CellReport:
    kills = [Kill("life", "all", 1.0, "start-up", 0), Kill("save", "rank 1", 9.0, "save", 4)]
    return CellReport(name, **{"kills": kills, "runs": 1, "restarts": 2, **others})  # type: ignore[arg-type]


def test_the_report_counts_and_names_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [report("good"), report("bad", different={"weights": "of run"}), report("hung", findings=["a hang"])]
    lines = kill_matrix.table(reports).splitlines()
    head, sums = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], lines[-1]))
    row = dict(zip(head, sums, strict=True))
    wanted = {"kills": "6", "start-up": "3", "save": "3", "one rank": "3", "restarts": "6", "steps lost": "2.0"}
    assert {key: row[key] for key in wanted} == wanted
    assert (row["curve"], row["weights"]) == ("3", "2")
    assert [r.good for r in reports] == [True, False, False]

    monkeypatch.setattr(kill_matrix, "prepare_corpora", lambda folder: None)
    monkeypatch.setattr(kill_matrix, "plan", lambda options, references: ({}, []))
    for found, code in ((reports[:1], 0), (reports, 1)):
        monkeypatch.setattr(kill_matrix, "run_jobs", lambda *_, found=found: found)
        out = tmp_path / str(code)
        assert kill_matrix.main(["--out", str(out)]) == code
        content = json.loads((out / "kill_matrix.json").read_text())
        assert content["equal"] == (code == 0)
        text = (out / "kill_matrix.md").read_text()
        assert ("of run" in text) == ("a hang" in text) == (code == 1)


def test_mistakes_are_refused_before_anything_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").touch()
    for words, said in ((["--only", "sgd"], "no cell is called sgd"), ([], "is not empty")):
        out = tmp_path if not words else tmp_path / "new"
        with pytest.raises(SystemExit):
            kill_matrix.main(["--out", str(out), *words])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
