"""A soak: `llada sweep run` with many short fits, of which some are killed at random; one at a time, then two at once.

The sweep's process, which lives all the while, and its folders must not grow. Then a second call finishes what was
killed, and some of it is compared with runs that nobody disturbed.
Run: python benchmarks/soak.py --minutes 30 --out FOLDER
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from llada_lightning.study.plots.style import write_figure
from llada_lightning.support.files import write_json, written_atomically
from processes import child_environment, finish, start
from run_state import differences, read_state
from small_fits import MODELS, prepare_corpora, write_sweep
from soak_watch import Sample, as_dicts, children, grown, look, soak_figure, summarise, table

KILLED_SHARE = 0.35
"""Of the fits."""
FIT = ("--trainer.max_steps=60", "--data.workers=1")
LEAST_SECONDS_OF_A_FIT = 5.0
"""No start-up is faster: it bounds the number of points that a sweep needs."""


@dataclass
class Killer:
    """Chooses, of the fits that a sweep starts, which to kill and when."""

    rng: random.Random
    life: float = 10.0
    killed: list[list[str]] = field(default_factory=list)
    """`fit` and its arguments, of each fit that was killed."""
    _ends: dict[int, float] = field(default_factory=dict)
    _began: dict[int, float] = field(default_factory=dict)

    def tend(self, fits: list[int]) -> None:
        """Look at the fits that run now; kill those whose time has come."""
        now = time.monotonic()
        for pid in set(self._began) - set(fits):
            ended = now - self._began.pop(pid)
            if pid not in self._ends:
                self.life = 0.8 * self.life + 0.2 * ended
        for pid in fits:
            if pid not in self._began:
                self._began[pid] = now
                if self.rng.random() < KILLED_SHARE:
                    self._ends[pid] = now + self.rng.random() * self.life
            if self._ends.get(pid, now) < now:
                self._kill(pid)

    def _kill(self, pid: int) -> None:
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
            if "fit" not in words:  # forked, and not yet the fit
                return
            os.kill(pid, signal.SIGKILL)
            self.killed.append(words[words.index("fit") :])
        self._ends[pid] = float("inf")


class Soak:
    """One sweep for some minutes, and what comes after it.

    Args:
        jobs: runs at once.
        minutes: for the sweep.
        data: prepared.
        out: folder for all of it.
        seed: of the kills.
        began: time.monotonic() at the soak's beginning.
    """

    def __init__(self, jobs: int, minutes: float, data: Path, out: Path, seed: int, began: float) -> None:
        self.jobs, self.minutes, self.data, self.began = jobs, minutes, data, began
        self.root, self.temporary, self.log = out / f"jobs{jobs}", out / f"jobs{jobs}" / "tmp", out / f"jobs{jobs}.log"
        self.environment = child_environment(self.temporary)
        self.killer = Killer(random.Random(f"{seed} {jobs}"))
        self.rng = random.Random(f"{seed} {jobs} sample")
        self.samples: list[Sample] = []
        self.findings: list[str] = []

    def run(self, every: float, bar: Progress) -> None:
        """The sweep, watched and disturbed; its samples begin with its first fit."""
        points = int(self.minutes * 60 * self.jobs / LEAST_SECONDS_OF_A_FIT)
        file = self._sweep_file(max(1, points // len(MODELS)))
        run = start(["sweep", "run", str(file), "--jobs", str(self.jobs)], self.log, self.environment)
        task = bar.add_task(f"sweep with {self.jobs} at once", total=self.minutes * 60)
        try:
            deadline, due = None, 0.0
            while not run.ended and (deadline is None or time.monotonic() < deadline):
                fits = [pid for pid, state in children(run.process.pid).items() if state != "Z"]
                self.killer.tend(fits)
                if deadline is None and fits:
                    deadline = time.monotonic() + self.minutes * 60
                if deadline is not None and time.monotonic() >= due:
                    due = time.monotonic() + every
                    self._sample(run.process.pid)
                    bar.update(task, completed=self.minutes * 60 - (deadline - time.monotonic()))
                time.sleep(0.1)
            run.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                run.process.wait(90)
            if run.process.returncode not in (1, 130):
                self.findings.append(f"the sweep ended with {run.process.returncode}: {run.last_line()} ({self.log})")
        finally:
            run.kill()
        bar.remove_task(task)

    def finish(self, compared: int) -> None:
        """Finish what was begun, by a second sweep of only that, and compare some of the killed runs."""
        begun = self.log.read_text(errors="replace").count("\nstarted  ")
        file = self._sweep_file(-(-begun // len(MODELS)))
        words = ["sweep", "run", str(file), "--jobs", "2", "--edited"]
        try:
            finish(words, self.log, self.environment, timeout=3600)
        except RuntimeError as error:
            self.findings.append(f"the second sweep: {error}")
            return
        chosen = self.rng.sample(self.killer.killed, min(compared, len(self.killer.killed)))
        for words in chosen:
            self._compare(words)
        if left := [path.name for path in (self.root / "kills").rglob("*.partial")]:
            self.findings.append(f"half a checkpoint is left behind: {', '.join(left)}")

    def _compare(self, words: list[str]) -> None:
        other = self.root / "undisturbed"
        before = set(other.glob("kills/*"))
        finish([*words, f"--run.root={other}"], self.log, self.environment)
        for folder in set(other.glob("kills/*")) - before:
            mine = self.root / "kills" / folder.name
            for key, what in differences(read_state(mine), read_state(folder)).items():
                self.findings.append(f"{mine}: {key}: {what}")

    def _sweep_file(self, seeds: int) -> Path:
        return write_sweep(self.root / "soak.yaml", self.data, self.root, *FIT, seeds=seeds)

    def _sample(self, pid: int) -> None:
        found = look(pid, self.root / "kills", self.temporary, time.monotonic() - self.began, self.jobs)
        if found is not None:
            self.samples.append(found)

    def report(self, allowed_mib: float) -> dict[str, Any]:
        """Counts, measures, and what was found."""
        summary = summarise(self.samples)
        grew = [f"grew: {line}" for line in grown(summary, allowed_mib)]
        return {
            "jobs": self.jobs,
            "samples": len(self.samples),
            "killed": len(self.killer.killed),
            "done": self.samples[-1].done,
            "done_at_last": len(list((self.root / "kills").glob("*/result.json"))),
            "left_hidden": len(list((self.root / "kills").rglob(".*"))),
            "measures": summary,
            "findings": [*self.findings, *grew],
        }


def write_report(out: Path, soaks: list[Soak], reports: list[dict[str, Any]]) -> str:
    """`soak.json`, `soak.md` and `soak.png`; returns the table and what was found."""
    samples = [sample for soak in soaks for sample in soak.samples]
    write_json(out / "soak.json", {"parts": reports, "samples": as_dicts(samples)})
    write_figure(soak_figure(samples), out, "soak")
    lines = [
        f"{report['jobs']} at once: {report['done']} runs done and {report['killed']} killed by the end of the sweep, "
        f"{report['done_at_last']} done after the second; " + ("; ".join(report["findings"]) or "nothing grew")
        for report in reports
    ]
    text = "\n\n".join([table({f"{report['jobs']} at once": report["measures"] for report in reports}), *lines])
    with written_atomically(out / "soak.md") as path:
        path.write_text(text + "\n")
    return text


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if nothing grew and every compared run is equal, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="all parts together, without what comes after them")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="runs at once, part by part")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--compared", type=int, default=4, help="killed runs of each part to compare")
    parser.add_argument("--allowed-mib", type=float, default=8.0, help="growth of memory, and of disk, that is none")
    parser.add_argument("--out", type=Path, required=True, help="a new folder, for everything")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out: {out} is not empty; name a new folder")
    data, began = prepare_corpora(out / "data").first, time.monotonic()
    minutes = options.minutes / len(options.jobs)
    soaks = [Soak(jobs, minutes, data, out, options.seed, began) for jobs in options.jobs]
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        for soak in soaks:
            soak.run(options.every, bar)
            soak.finish(options.compared)
    reports = [soak.report(options.allowed_mib) for soak in soaks]
    print(write_report(out, soaks, reports))
    return 1 if any(report["findings"] for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
