"""Real fits and commands that are killed with SIGKILL and started again until they are done lose nothing.

The curve of metrics.csv, the hashes of weights and optimizer, and the result equal those of an undisturbed run.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch

from helpers.killed_fits import AIMS, Cell, Undisturbed, cells, half_saved, kill, until, wait_for
from helpers.run_state import differences, read_state
from helpers.tiny_runs import fit
from processes import Start, child_environment, finish, start
from small_fits import Corpora, run_folder, write_sweep

Runs = Callable[[Cell], Undisturbed]
KILLS = len(AIMS)
"""Kills of each fit and of each command: a hundred over all cells."""


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


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells(), ids=str)
def test_a_killed_fit_ends_as_an_undisturbed_one(
    cell: Cell, undisturbed: Runs, corpora: Corpora, tmp_path: Path
) -> None:
    """A run that ends before its next kill is compared, and another one is begun."""
    whole, rng, aims = undisturbed(cell), random.Random(str(cell)), list(AIMS)
    environment = child_environment(tmp_path / "tmp")
    for number in count():
        root = tmp_path / str(number)
        while True:
            run = start(cell.words(corpora, root), root / "log", environment)
            try:
                if aims and wait_for(aims[0], run, run_folder(root), whole.seconds, rng):
                    aims.pop(0)
                    kill(run, rank=rng.randrange(2) if cell.strategy is not None and len(aims) % 2 else None)
                    continue
                run.process.wait(600)
            finally:
                run.kill()
            assert run.process.returncode == 0, run.last_line()
            break
        assert differences(read_state(run_folder(root)), whole.state) == {}
        assert half_saved(run_folder(root)) == []
        if not aims:
            break


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "convert", "collect"])
def test_a_killed_command_leaves_no_part_of_its_output(name: str, undisturbed: Runs, tmp_path: Path) -> None:
    """Killed anywhere, or while its output is being written, in turns."""
    trained = undisturbed(Cell("llada")).folder
    corpus = ["--source", "python-stdlib", "--max-bytes", "3000000", "--vocab-size", "512", "--shard-tokens", "50000"]

    def words(out: Path) -> list[str]:
        return {
            "prepare": ["prepare", *corpus, "--out", str(out)],
            "convert": ["convert", str(trained), str(out), "--max-shard-size", "50KB"],
            "collect": ["collect", str(trained), "--out", str(out)],
        }[name]

    environment, log, rng = child_environment(tmp_path / "tmp"), tmp_path / "log", random.Random(name)
    whole, out = (tmp_path / kind / ("results.csv" if name == "collect" else "out") for kind in ("whole", "killed"))
    whole.parent.mkdir()
    out.parent.mkdir()
    seconds = finish(words(whole), log, environment).seconds
    beside, expected = siblings(whole), hashes(whole)
    for number in range(KILLS):
        run = start(words(out), log, environment)
        with suppress(subprocess.TimeoutExpired):
            if number % 2:
                until(run, lambda: bool(siblings(out) - beside))
            run.process.wait(rng.random() * (0.01 if number % 2 else seconds))
        run.kill()
        assert not out.exists() or hashes(out) == expected
        if out.is_dir():
            shutil.rmtree(out)  # the next call would find it done
    finish(words(out), log, environment)
    assert hashes(out) == expected


@pytest.mark.slow
def test_a_killed_sweep_is_finished_by_the_next_calls(undisturbed: Runs, corpora: Corpora, tmp_path: Path) -> None:
    """All of its processes are killed, or its own only, whose fits then run on: the next sweep calls them failed."""
    whole = {objective: undisturbed(Cell(objective)) for objective in ("arm", "llada")}
    environment, rng, orphaning = child_environment(tmp_path / "tmp"), random.Random("sweep"), list[Start]()
    file = write_sweep(tmp_path / "two.yaml", corpora.first, tmp_path)
    for number in count():
        run = start(["sweep", "run", str(file), "--jobs", "2"], tmp_path / "log", environment)
        with suppress(subprocess.TimeoutExpired):
            run.process.wait(2 * whole["arm"].seconds * rng.random() if number < KILLS else 600)
        code = run.process.poll()
        if code is None and number % 2:
            run.process.kill()
            run.process.wait()
            orphaning.append(run)
            continue
        if code is not None:
            assert code == 0 or (code == 1 and orphaning), run.last_line()
        for other in orphaning:
            assert not other.outlived(300)
        orphaning.clear()
        run.kill()
        if code == 0:
            break
    results = {json.loads(path.read_text())[0]["objective"]: path for path in tmp_path.glob("kills/*/result.json")}
    assert set(results) == set(whole)
    for objective, path in results.items():
        assert differences(read_state(path.parent), whole[objective].state) == {}


def hashes(path: Path) -> dict[str, str]:
    """sha256 of a file, or of each file of a folder by its relative name."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def siblings(path: Path) -> set[str]:
    """Names beside a path."""
    return {other.name for other in path.parent.iterdir()} - {path.name}
