"""Everything about this package that only a GPU can show, in one command of at most eight minutes, as one table.

Each part is a process with a time limit of its own; one that fails, hangs or finds nothing to run on leaves rows that
say so, and the others go on. Without a GPU its rows are marked as missing, and what a CPU can do runs at a tiny size.
Run: python benchmarks/gpu_check.py --wheels DIR --out runs/benchmarks

The machine needs torch, lightning, torchmetrics and transformers, and no network. Wheels of what it lacks are installed
from a folder, into one that is removed in the end. No data is loaded: the corpus is Python's standard library.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the package is not installed

from bench_report import caption, markdown, write_result
from gpu_figures import Figure, Missing, Results
from gpu_parts import ROOT, Part, full_parts, tiny_parts
from llada_lightning.support.source import git_commit
from processes import Start, child_environment, launch

MACHINE, WHEELS = "machine", "wheels"
NO_GPU, TINY = "no CUDA device", "tiny sizes were asked for"
LEAST_SECONDS = 5.0
"""A part that has less time left is not begun."""
GRACE_SECONDS = 5.0
"""After an interrupt a part may write down what it has found."""
LAST_LINES = 12
"""Lines of the log of a part that fails, to be shown."""


class Check:
    """The parts, one after the other, and the rows of the table so far.

    Attributes:
        results: what the parts have written.
        rows: of the table; the file of them is written anew after each part.
        failed: the names of parts that ended badly.
    """

    def __init__(self, out: Path, work: Path, minutes: float, wanted: Sequence[str]) -> None:
        self.out, self.work, self.wanted = out, work, wanted
        self.began, self.deadline = time.monotonic(), time.monotonic() + 60 * minutes
        self.minutes = minutes
        self.results = Results()
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.facts: dict[str, Any] = {}
        self.environment: dict[str, str] = {}

    def run(self, parts: Sequence[Part]) -> None:
        """Run parts in their order, those that belong together at the same time, and add their rows."""
        chosen = [part for part in parts if not self.wanted or part.name in self.wanted]
        self.leave_out([part for part in parts if part not in chosen], "not asked for")
        for _, group in groupby(chosen, key=lambda part: part.together or part.name):
            self._run_at_once(list(group))

    def leave_out(self, parts: Sequence[Part], reason: str) -> None:
        """Add the rows of parts that are not run."""
        for part in parts:
            self.results.reasons[part.name] = reason
            self.rows += [missing_row(part, figure, reason) for figure in part.figures]
        self.write()

    def _run_at_once(self, parts: Sequence[Part]) -> None:
        running: dict[Part, tuple[Start, float]] = {}
        for part in parts:
            left = self.deadline - time.monotonic()
            if left < LEAST_SECONDS:
                self.leave_out([part], f"no time was left of {self.minutes:g} minutes")
                continue
            limit = min(part.limit, left)
            part.result.unlink(missing_ok=True)  # of an earlier check
            log = self.out / "gpu_check" / f"{part.file_name}.log"
            log.unlink(missing_ok=True)
            say(f"{part.name}: at most {limit:.0f} s")
            command = [sys.executable, *part.command]
            running[part] = (launch(command, part.shown, log, self.environment, ROOT), limit)
        try:
            while running:
                for part, (process, limit) in list(running.items()):
                    if process.ended or process.seconds > limit:
                        self._finish(part, process, limit)
                        del running[part]
                time.sleep(0.02)
        finally:  # where this process is interrupted
            for process, _ in running.values():
                process.kill()

    def _finish(self, part: Part, process: Start, limit: float) -> None:
        """End a part where it has not ended, and take what it has written."""
        code = process.process.poll()
        if code is None:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.kill(process.process.pid, signal.SIGINT)
                process.process.wait(GRACE_SECONDS)
        seconds = process.seconds
        process.kill()
        self.results.written[part.name] = part.read()
        self.results.reasons.pop(part.name, None)
        if code is None:
            self.results.reasons[part.name] = f"ended after its {limit:.0f} s"
        elif code != 0:
            self.results.reasons[part.name] = f"exit code {code}: {process.last_line()}"
            self.failed.append(part.name)
        reason = self.results.reasons.get(part.name)
        say(f"{part.name}: {seconds:.1f} s" + (f", {reason}" if reason else ""))
        if reason:
            for line in process.log.read_text(errors="replace").splitlines()[-LAST_LINES:]:
                say(f"  | {line}")
        self.rows += [row_of(part, figure, self.results, seconds) for figure in part.figures]
        self.write()

    def write(self) -> None:
        """The table's rows, and where they come from."""
        facts = {**self.facts, "seconds": round(time.monotonic() - self.began, 1), "rows": self.rows}
        write_result(self.out / "gpu_check.json", facts)


def say(line: str) -> None:
    print(line, flush=True)


def row_of(part: Part, figure: Figure, results: Results, seconds: float) -> dict[str, Any]:
    """A row for the file: `verdict` is `met`, `not met`, `missing`, or None where there is no goal."""
    try:
        value = figure.find(results)
    except Missing as missing:
        return missing_row(part, figure, str(missing), seconds)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:  # what a part has written is not as expected
        return missing_row(part, figure, f"not found: {type(error).__name__}: {error}", seconds)
    met = figure.met(value)
    verdict = None if met is None else "met" if met else "not met"
    return missing_row(part, figure, None, seconds) | {"value": value, "verdict": verdict}


def missing_row(part: Part, figure: Figure, reason: str | None, seconds: float | None = None) -> dict[str, Any]:
    """A row without a value, and why."""
    return {
        "part": part.name,
        "figure": figure.name,
        "value": None,
        "unit": figure.unit,
        "goal": figure.goal,
        "verdict": "missing",
        "reason": reason,
        "seconds": seconds,
        "command": part.shown,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = []
    for row in rows:
        value = "" if row["value"] is None else f"{row['value']:,.4g}" if row["value"] < 1e4 else f"{row['value']:,.0f}"
        verdict = row["verdict"] or ""
        verdict += f": {row['reason']}" if row["reason"] else ""
        cells = [row["part"], row["figure"], value, row["unit"], row["goal"] or "", verdict]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    return markdown(["part", "figure", "value", "unit", "goal", "verdict"], lines)


# --- the machine -----------------------------------------------------------------------------------------------------


def machine_part(out: Path) -> Part:
    """What this machine is. It says whether there is a GPU: this process never touches one."""
    path = out / "machine.json"
    return Part(MACHINE, ("benchmarks/bench_report.py", str(path)), path, (), 60)


def wheels_part(wheels: Path, site: Path) -> Part:
    """Installs the packages of a folder, and nothing that they ask for beside it."""
    names = sorted({path.name.partition("-")[0] for path in wheels.glob("*.whl")})
    words = ("--no-index", "--no-deps", "--no-compile", "--quiet", "--disable-pip-version-check")
    command = ("-m", "pip", "install", *words, "--find-links", str(wheels), "--target", str(site), *names)
    installed = Figure("packages installed", "packages", lambda results: float(len(list(site.glob("*.dist-info")))))
    return Part(WHEELS, command, site / "none", (installed,), 90)


def environment(work: Path, site: Path, own_threads: bool) -> dict[str, str]:
    """Of all parts: what is compiled is shared by them, and nothing asks the network.

    Args:
        work: The folder that is removed in the end.
        site: The folder of installed wheels.
        own_threads: Whether the processes take as many threads as they like; else one.
    """
    found = child_environment(work / "tmp", trusted="helpers,step_marks")
    found["PYTHONPATH"] += f"{os.pathsep}{site}"
    if own_threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            found.pop(name)
            found |= {name: os.environ[name]} if name in os.environ else {}
    quiet = {"PYTHONUNBUFFERED": "1", "LITDATA_DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    return found | quiet | {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="a folder with wheels of what this machine lacks")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "benchmarks", help="for the table, the file, the logs"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes, on a GPU as well: whether all ways can be gone"
    )
    parser.add_argument("--parts", nargs="+", default=[], help="these only, by the names that a check prints")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--commit", default=git_commit(), help="of this source, where git does not know it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a goal is not met or a part ended badly, else 0."""
    options = parse(arguments)
    out: Path = options.out.resolve()
    (out / "gpu_check").mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    check = Check(out, work, options.minutes, options.parts)
    try:
        site, data = work / "site", work / "data"
        check.environment = environment(work, site, own_threads=not options.tiny)
        before = [machine_part(out / "gpu_check")]
        if options.wheels is not None:
            before.insert(0, wheels_part(options.wheels.resolve(), site))
        check.wanted = []
        check.run(before)
        check.wanted = options.parts
        machine = {key: value for key, value in check.results.written[MACHINE].items() if key != "command"}
        words = shlex.join(sys.argv[1:] if arguments is None else map(str, arguments))
        command = f"python benchmarks/gpu_check.py {words}".strip()
        check.facts = {**machine, "command": command, "git_commit": options.commit}
        cuda, files = bool(machine.get("cuda")), out / "gpu_check"
        parts = full_parts(files, data)
        if cuda and not options.tiny:
            check.run(parts)
        else:
            reason = TINY if cuda else check.results.reasons.get(MACHINE, NO_GPU)
            check.leave_out([part for part in parts if part.gpu], reason)
            check.run(tiny_parts(files, data, "cuda" if cuda else "cpu"))
        text = f"{caption_of(check.facts)}\n\n{table(check.rows)}\n"
        (out / "gpu_check.md").write_text(text, encoding="utf-8")
        say(f"\n{text}")
        say(f"{time.monotonic() - check.began:.0f} s; {out / 'gpu_check.json'}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return int(bool(check.failed) or any(row["verdict"] == "not met" for row in check.rows))


def caption_of(facts: dict[str, Any]) -> str:
    """Hardware, versions, date, commit and command, as far as they are known."""
    if "versions" not in facts:
        return f"commit {facts['git_commit']}\n\n```\n{facts['command']}\n```"
    return f"commit {facts['git_commit']}; {caption(facts)}"


if __name__ == "__main__":
    sys.exit(main())
