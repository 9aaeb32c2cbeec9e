"""The other commands that write - prepare, convert, collect, sweep - killed with -9 and started again."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kill_fits import Cell, CellReport, Kill, References, temporary_files
from processes import Start, finish, start
from run_state import differences, read_state
from small_fits import MODELS, write_sweep

_POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Command:
    """A command that writes one output.

    Args:
        name: of the command.
        words: from the output's path to the command's arguments.
        output: name of the output.
    """

    name: str
    words: Callable[[Path], list[str]]
    output: str


def commands(references: References) -> list[Command]:
    """The commands of the matrix, on the references' corpora and runs."""
    trained = references.run_of(Cell("llada"))
    corpus = ["--source", "python-stdlib", "--max-bytes", "3000000", "--vocab-size", "512", "--shard-tokens", "50000"]
    return [
        Command("prepare", lambda out: ["prepare", *corpus, "--out", str(out)], "data"),
        Command("convert", lambda out: ["convert", str(trained), str(out), "--max-shard-size", "50KB"], "model"),
        Command("collect", lambda out: ["collect", str(references.folder), "--out", str(out)], "results.csv"),
    ]


def kill_command(
    command: Command, kills: int, references: References, folder: Path, seed: int, advance: Callable[[], None]
) -> CellReport:
    """Kill a command ``kills`` times: half of them anywhere, half while its output is being written.

    Its output must never be there in part, and must in the end be that of an undisturbed call.

    Args:
        references: for the environment.
        folder: for outputs and logs.
        seed: of all choices.
        advance: called after each kill.
    """
    report, rng = CellReport(command.name), random.Random(f"{seed} {command.name}")
    environment, log = references.environment, folder / f"{command.name}.log"
    whole, out = (folder / command.name / kind / command.output for kind in ("undisturbed", "killed"))
    out.parent.mkdir(parents=True, exist_ok=True)
    whole.parent.mkdir(parents=True, exist_ok=True)
    life = finish(command.words(whole), log, environment).seconds
    expected, beside = files_of(whole), siblings(whole)
    for number in range(kills):
        run = start(command.words(out), log, environment)
        aimed = bool(number % 2)
        with suppress(subprocess.TimeoutExpired):
            if aimed:
                _wait_for_writing(run, out, beside)
                run.process.wait(rng.random() * 0.01)
            else:
                run.process.wait(rng.random() * life)
        hit = "after a result" if run.ended else "save" if siblings(out) - beside else "start-up"
        run.kill()
        report.kills.append(Kill("save" if aimed else "life", "all", round(run.seconds, 2), hit, 0))
        advance()
        if out.exists() and files_of(out) != expected:
            report.findings.append(f"kill {number + 1} left a part of {out}")
        if out.exists() and out.is_dir():
            out.rename(folder / command.name / f"killed-{number}")  # the next call would find it done
    finish(command.words(out), log, environment)
    report.runs, report.restarts = 1, kills
    if files_of(out) != expected:
        report.different["result"] = f"{out} is not {whole}"
    report.left = sorted(siblings(out) - beside)
    return report


def files_of(path: Path) -> dict[str, str]:
    """sha256 of a file, or of each file of a folder by its relative name."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def siblings(path: Path) -> set[str]:
    """Names beside a path."""
    return {other.name for other in path.parent.iterdir()} - {path.name}


def _wait_for_writing(run: Start, out: Path, beside: set[str]) -> None:
    while not run.ended and not siblings(out) - beside:
        time.sleep(_POLL_SECONDS)


class SweepKiller:
    """Kills `llada sweep run` with two fits at once: all of its processes, or its own only, whose fits then go on.

    The same command is given again until all is done. A sweep that finds a run in other hands calls it failed.
    """

    def __init__(self, references: References, folder: Path, seed: int, advance: Callable[[], None]) -> None:
        self.references, self.advance = references, advance
        self.root, self.log = folder / "sweep", folder / "sweep.log"
        self.report, self.rng = CellReport("sweep"), random.Random(f"{seed} sweep")
        self.orphaning: list[Start] = []

    def run(self, kills: int) -> CellReport:
        cells = {objective: Cell(objective) for objective in MODELS}
        states = {objective: self.references.get(cell)[0] for objective, cell in cells.items()}
        pace = self.references.get(cells["arm"])[1]
        file = write_sweep(self.root / "two.yaml", self.references.corpora.first, self.root)
        words = ["sweep", "run", str(file), "--jobs", "2"]
        while not self._done(words, kills, life=2 * pace.startup + pace.training):
            pass
        self.report.runs = 1
        for result in self.root.glob("kills/*/result.json"):
            [record] = json.loads(result.read_text())
            expected = states.pop(record["objective"])
            self.report.different |= differences(read_state(result.parent), expected)
        self.report.left = temporary_files(self.root / "kills")
        if states:
            self.report.different["result"] = f"no result of {', '.join(states)}"
        return self.report

    def _done(self, words: list[str], kills: int, life: float) -> bool:
        """One call of the sweep; whether it was the last."""
        run = start(words, self.log, self.references.environment)
        count = len(self.report.kills)
        with suppress(subprocess.TimeoutExpired):
            run.process.wait(life * self.rng.random() if count < kills else 600)
        code = run.process.returncode
        if code is None and count < kills:
            self._kill(run, alone=bool(count % 2))
            return False
        run.kill()
        if code == 1 and self.orphaning:  # a fit of a sweep that was killed had its run
            self._wait_for_orphans()
        elif code != 0:
            self.report.findings.append(f"exit code {code}: {run.last_line()} ({self.log})")
        return code == 0 or bool(self.report.findings)

    def _kill(self, run: Start, alone: bool) -> None:
        seconds = run.seconds
        if alone:
            run.process.kill()
            run.process.wait()
            self.orphaning.append(run)
        else:
            self._wait_for_orphans()
            run.kill()
        target = "the sweep alone" if alone else "all"
        self.report.kills.append(Kill("life", target, round(seconds, 2), "training", 0))
        self.report.restarts += 1
        self.advance()

    def _wait_for_orphans(self) -> None:
        for run in self.orphaning:
            if run.outlived(300):
                self.report.findings.append("the fits of a killed sweep did not end within 300 s")
            run.kill()
        self.orphaning.clear()
