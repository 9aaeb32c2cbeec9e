"""Whole `llada fit`s: their logged rate, their time by part, and whether they repeat and resume bit for bit.

- `rates`: a short fit of each size with each value of `--speed.graph`, and the rate that it logs after its warm-up.
- `twice`: one fit, two times, each in an interpreter of its own: seconds of each part, and rows that differ.
- `killed`: a fit that is killed with -9 and resumed beside one that is not, and rows that differ.
- `fsdp2`: a fit with `--trainer.strategy=fsdp2` on one process beside one without, and how far apart their losses are.

All fits but those of `twice` are forked from one process that has imported the libraries. Each action is done as far as
it can be, whatever becomes of the others. Run: python benchmarks/fit_check.py DATA --do twice killed --shapes 2.66m
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench_report import caption, circumstances, write_result
from llada_lightning.commands.main import main as command
from llada_lightning.commands.sweep import PRELOADED
from llada_lightning.records import METRICS_FILE, metrics_rows
from llada_lightning.support.forks import ForkedProcess, ForkServer
from processes import child_environment, finish
from step_sizes import SIZES, SMALL_STEPS, Size

ROWS, WARM_ROWS = 28, 25
"""Logged rows of a fit whose rate is measured, and with how many of them the rate counts: it is taken over 20."""
SECONDS = 150.0
"""A fit that takes longer is ended."""
PARTS = {
    "read": "interpreter, imports, settings",
    "training": "data, model, optimizer",
    "first_step": "first step, compiling",
    "last_step": "other steps, their validations and checkpoints",
    "fitted": "last validation of the fit, last checkpoint",
    "validated": "final validation",
    "exit": "record, end of process",
}
"""What has passed at each mark (see ``step_marks``) since the one before."""


@dataclass(frozen=True)
class Fits:
    """Fits of `llada` on one corpus, in folders of their own.

    Attributes:
        data: prepared.
        folder: for runs and logs.
        server: of the process that they are forked from.
    """

    data: Path
    folder: Path
    server: ForkServer

    def words(self, name: str, size: Size, steps: int, *extra: str) -> list[str]:
        """`fit` and its arguments; ``extra`` overrules."""
        given = {
            "model": "LladaModule",
            "model.shape": size.shape,
            "model.vocab_size": size.vocab_size,
            "model.schedule.lr": 1e-3,
            "data.path": self.data,
            "data.sequence_length": size.sequence_length,
            "data.global_batch": size.micro_batch,
            "trainer.max_steps": steps,
            "trainer.enable_progress_bar": "false",
            "trainer.log_every_n_steps": 1,
            "run.root": self.folder,
            "run.study": "check",
            "run.name": name,
        }
        return ["fit", *(f"--{key}={value}" for key, value in given.items()), *extra]

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / "check" / name

    @property
    def environment(self) -> dict[str, str]:
        """Of a fit: threads as a user's run has them."""
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
        return child_environment(self.folder / "tmp", trusted="step_marks") | threads

    def start(self, name: str, size: Size, steps: int, *extra: str) -> ForkedProcess:
        """Fork a fit; its output is appended to its log."""
        words = self.words(name, size, steps, *extra)
        with self.log(name).open("a") as log:
            log.write(f"$ llada {' '.join(words)}\n")
            log.flush()
            return self.server.start(command, words, self.environment, log.fileno())

    def log(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}.log"

    def end(self, name: str, process: ForkedProcess) -> Path:
        """Wait for a good end.

        Returns:
            The folder of the run.

        Raises:
            RuntimeError: The fit ended badly, or not in time.
        """
        try:
            code: int | None = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill_group()
        if code != 0:
            lines = [line.strip() for line in self.log(name).read_text(errors="replace").splitlines() if line.strip()]
            what = f"exit code {code}" if code is not None else f"no end within {SECONDS:.0f} s"
            raise RuntimeError(f"{what}: {lines[-1]}")
        return self.run(name)


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The logged rows of a run; none before it has written some."""
    with suppress(FileNotFoundError), (folder / METRICS_FILE).open(newline="") as file:
        return metrics_rows(file)
    return []


def step_of(folder: Path) -> int:
    """The last step that a run has logged; 0 before."""
    rows = rows_of(folder)
    return int(rows[-1]["step"]) if rows else 0


def differing(one: Path, other: Path) -> dict[str, int]:
    """Over how many logged rows two runs were compared, and in how many a loss, a norm or a rate is another."""
    names = ("step", "tokens", "train_nats_per_token", "grad_norm", "lr", "val_nats_per_token")
    first, second = ([tuple(row.get(name) for name in names) for row in rows_of(folder)] for folder in (one, other))
    unequal = sum(a != b for a, b in zip(first, second, strict=False)) + abs(len(first) - len(second))
    return {"rows": min(len(first), len(second)), "rows_that_differ": unequal}


def few(size: Size) -> tuple[str, ...]:
    """For validations that take no time: as many sequences as a step has."""
    return (f"--data.val_sequences={size.micro_batch}",)


def passed(moments: dict[str, float]) -> dict[str, float]:
    """Seconds of each of :data:`PARTS`."""
    names = ["start", *PARTS]
    return {PARTS[name]: moments[name] - moments[before] for before, name in pairwise(names)}


# --- what is done ----------------------------------------------------------------------------------------------------


def rates(fits: Fits, options: argparse.Namespace, report: Callable[[Any], None]) -> list[dict[str, Any]]:
    """A row for each size and value of the setting; one that fails says why, and the others follow."""
    found: list[dict[str, Any]] = []
    for size in options.sizes:
        for graph in options.graph:
            row: dict[str, Any] = {"shape": size.shape, "graph": graph}
            try:
                row |= {"status": "measured", **rate_of(fits, size, graph, options.rows)}
            except RuntimeError as error:
                row["status"] = f"failed: {error}"
            found.append(row)
            report(found)
    return found


def rate_of(fits: Fits, size: Size, graph: str, rows: int) -> dict[str, float]:
    """The rate that a fit logs in the end, over its last 20 logged rows."""
    # To log a step, the host waits for the device: often enough for a window of rows, and no more.
    every = 10 if size in SMALL_STEPS else 1 if size.tokens > 2**14 else 2
    steps, name = every * rows, f"rate-{size.shape}-{graph}"
    extra = [f"--trainer.log_every_n_steps={every}", f"--trainer.val_check_interval={steps}"]
    extra += ["--trainer.enable_checkpointing=false", *few(size), f"--speed.graph={graph}"]
    process, ended = fits.start(name, size, steps, *extra), ""
    try:
        fits.end(name, process)
    except RuntimeError as error:  # after the last step, or in it
        ended = str(error)
    logged = [row for row in rows_of(fits.run(name)) if row.get("tokens_per_second")]
    if not logged or (ended and len(logged) < min(rows, WARM_ROWS)):
        raise RuntimeError(ended or "no rate was logged")
    last = logged[-1]
    rate = float(last["tokens_per_second"])
    row = {"tokens_per_second": rate, "step_seconds": size.tokens / rate, "steps": int(last["step"])}
    return row | ({"mfu": float(last["mfu"])} if last.get("mfu") else {})


def twice(fits: Fits, options: argparse.Namespace, report: Callable[[Any], None]) -> dict[str, Any]:
    """The second fit finds what the first one has compiled."""
    size, found = options.sizes[0], []
    for name in ("first", "second"):
        marks = fits.folder / f"{name}.jsonl"
        callback = {"class_path": "step_marks.StepMarks", "init_args": {"path": str(marks)}}
        extra = [f"--trainer.callbacks={json.dumps([callback])}", f"--trainer.log_every_n_steps={options.log_every}"]
        extra += [f"--data.val_sequences={options.val_sequences}"] if options.val_sequences else []
        begin = time.time()
        if options.forked:
            fits.end(name, fits.start(name, size, options.steps, *extra))
        else:
            finish(fits.words(name, size, options.steps, *extra), fits.log(name), fits.environment, SECONDS)
        end = time.time()
        moments = {line["name"]: line["time"] for line in map(json.loads, marks.read_text().splitlines())}
        rate = float(rows_of(fits.run(name))[-1]["tokens_per_second"])
        wall, training = end - begin, options.steps * size.tokens / rate
        parts = passed({"start": begin, **moments, "exit": end})
        found.append({"wall": wall, "training": training, "tokens_per_second": rate, "parts": parts})
        report({"fits": found})
    return {"fits": found, **differing(fits.run("first"), fits.run("second"))}


def killed(fits: Fits, options: argparse.Namespace, report: Callable[[Any], None]) -> dict[str, Any]:
    """The kill falls behind a checkpoint and some further steps, which are made again."""
    size, every = options.sizes[0], max(2, options.steps // 4)
    extra = (f"--run.checkpoint_every_steps={every}", f"--trainer.val_check_interval={every}", *few(size))
    whole = fits.start("whole", size, options.steps, *extra)
    broken = fits.start("broken", size, options.steps, *extra)
    folder = fits.run("broken")
    deadline = time.monotonic() + SECONDS
    while broken.poll() is None and time.monotonic() < deadline:
        if (folder / "checkpoints" / f"step={every:08d}.ckpt").exists() and step_of(folder) > every:
            break
        time.sleep(0.002)
    at = step_of(folder)
    broken.kill_group()
    with suppress(subprocess.TimeoutExpired):
        broken.wait(30)
    if (folder / "result.json").exists() or at <= every:
        fits.end("whole", whole)  # where both fail, this one says why
        raise RuntimeError(f"the fit was at step {at} when it was to be killed, between {every} and {options.steps}")
    resumed = fits.start("broken", size, options.steps, *extra)
    fits.end("broken", resumed), fits.end("whole", whole)
    return {"killed_at": at, **differing(fits.run("whole"), folder)}


def fsdp2(fits: Fits, options: argparse.Namespace, report: Callable[[Any], None]) -> dict[str, Any]:
    """In fp32, where the losses of both may be compared."""
    size = options.sizes[0]
    exact = ("--trainer.precision=32-true", *few(size))
    strategies = {"one": (), "sharded": ("--trainer.strategy=fsdp2", "--trainer.devices=1")}
    started = {name: fits.start(name, size, 20, *exact, *extra) for name, extra in strategies.items()}
    one, sharded = (rows_of(fits.end(name, process)) for name, process in started.items())
    pairs = [
        (float(a["train_nats_per_token"]), float(b["train_nats_per_token"])) for a, b in zip(one, sharded, strict=True)
    ]
    return {"rows": len(pairs), "loss_difference": max(abs(a - b) for a, b in pairs)}


ACTIONS: dict[str, Callable[..., Any]] = {"rates": rates, "twice": twice, "killed": killed, "fsdp2": fsdp2}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder that `llada prepare` has written")
    parser.add_argument("--do", nargs="+", choices=ACTIONS, default=list(ACTIONS))
    parser.add_argument("--shapes", nargs="+", choices=SIZES, default=["2.66m"], help="of rates; the others: the first")
    parser.add_argument("--graph", nargs="+", choices=("true", "false"), default=["true", "false"])
    parser.add_argument("--rows", type=int, default=ROWS, help="logged in a fit whose rate is measured")
    parser.add_argument("--steps", type=int, default=308, help="of the fits by part, and of the one that is killed")
    parser.add_argument("--log-every", type=int, default=10, help="steps between rows of the fits by part")
    parser.add_argument("--val-sequences", type=int, help="of the fits by part, instead of the command's own")
    parser.add_argument("--forked", action="store_true", help="fork the fits by part, too, where only the way is tried")
    parser.add_argument("--json", type=Path, help="write the figures here, as far as they are there")
    options = parser.parse_args(arguments)
    options.sizes = [SIZES[shape] for shape in options.shapes]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    server = ForkServer([PRELOADED])
    result: dict[str, Any] = circumstances(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory(prefix="fits-") as name:
        fits = Fits(options.data.resolve(), Path(name), server)
        for action in options.do:

            def report(found: Any, action: str = action) -> None:
                result[action] = found
                write_result(options.json, result)

            begin = time.monotonic()
            try:
                report(ACTIONS[action](fits, options, report))
            except Exception as error:  # what the others show must not be lost
                before = result.get(action)
                reason = " ".join(str(error).split()) or type(error).__name__
                report({**(before if isinstance(before, dict) else {}), "status": f"failed: {reason}"})
            print(f"{action}, {time.monotonic() - begin:.1f} s: {json.dumps(result[action])}", flush=True)
    print(caption(result))
    return int(any("failed" in str(result[action]) for action in options.do))


if __name__ == "__main__":
    sys.exit(main())
