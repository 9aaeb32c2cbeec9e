"""The parts of `gpu_check.py`: the processes that it runs, at full size and at a tiny one; without torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_figures import (
    Figure,
    Results,
    attention_figures,
    fit_figures,
    fit_rate,
    number,
    rate_figures,
    rows_that_differ,
    sampler_figures,
    scoring_figures,
    sharded_figures,
    step,
    step_figures,
    suite_figures,
    thousand,
)
from step_sizes import EAGER, FLASH, LARGE_STEPS, SMALL_STEPS, TINY_STEPS

ROOT = Path(__file__).parents[1]
AT_ONCE = "at once"


@dataclass(frozen=True)
class Part:
    """A process, the file that it writes, and the figures in that.

    Attributes:
        command: behind the interpreter.
        limit: Seconds after which it is ended.
        together: Parts that follow one another and have the same text here run at the same time: none is timed.
        gpu: Whether it needs a GPU.
    """

    name: str
    command: tuple[str, ...]
    result: Path
    figures: tuple[Figure, ...]
    limit: float
    together: str = ""
    gpu: bool = False

    @property
    def file_name(self) -> str:
        """For its log and its figures, without an ending."""
        return self.name.replace(" ", "-")

    @property
    def shown(self) -> str:
        """The command, as a person would type it."""
        return shlex.join(["python", *self.command])

    def read(self) -> dict[str, Any]:
        """What it has written; nothing where there is no whole file."""
        try:
            if self.result.suffix == ".xml":
                return junit(self.result)
            found: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        except (OSError, ValueError, ElementTree.ParseError):
            return {}
        return found


def junit(path: Path) -> dict[str, int]:
    """How many tests failed, passed and were skipped, by pytest's report."""
    suites = ElementTree.parse(path).getroot().iter("testsuite")
    counts = [{key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} for suite in suites]
    tests, failures, errors, skipped = (sum(count[key] for count in counts) for key in counts[0])
    return {"failed": failures + errors, "passed": tests - failures - errors - skipped, "skipped": skipped}


def gpu_tests() -> list[str]:
    """The files with tests that are marked `gpu`; the others would be read for nothing."""
    files = (path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8"))
    return sorted(str(path.relative_to(ROOT)) for path in files)


def full_parts(out: Path, data: Path) -> list[Part]:
    """What a GPU is checked by; what has goals comes first.

    Args:
        out: The folder for what the parts write.
        data: A folder that does not exist yet, for the corpus.
    """
    part = partial(_part, out, gpu=True)
    shapes = [size.shape for size in (*SMALL_STEPS, *LARGE_STEPS)]
    small, large, middle, first = " ".join(shapes[:3]), " ".join(shapes[3:]), SMALL_STEPS[1], LARGE_STEPS[0]
    steps, fits = "benchmarks/train_speed.py --device cuda --preset", f"benchmarks/fit_check.py {data} --do"
    sampled = "--dtype bfloat16 --vocab-size 126464 --length 128 --block-lengths 32 --steps 32"
    samplers, batches = ("llada-1b", "llada-8b"), (1, 8)
    tests, report = " ".join(gpu_tests()), out / "tests.xml"
    marked = f"-m pytest -q -p no:cacheprovider -m 'gpu and not slow' --junitxml={report} {tests}"
    broken = rows_that_differ("resume", "killed", "killed with -9 and resumed: logged rows that differ")
    return [
        _prepare(data, "--vocab-size 4096 --max-bytes 16000000 --val-fraction 0.05", 60),
        part(
            "small steps",
            f"{steps} small-steps --objectives llada --only compiled graphs",
            step_figures("small steps", SMALL_STEPS, large=False),
            90,
        ),
        part(
            "large steps",
            f"{steps} large-steps --only compiled graphs",
            step_figures("large steps", LARGE_STEPS, large=True),
            150,
        ),
        part(
            "small fits",
            f"{fits} rates --shapes {small}",
            rate_figures("small fits", "small steps", SMALL_STEPS, graphs=(True, False)),
            100,
        ),
        part(
            "large fits",
            f"{fits} rates --shapes {large} --graph true",
            rate_figures("large fits", "large steps", LARGE_STEPS, graphs=(True,)),
            100,
        ),
        part("fit", f"{fits} twice --shapes {middle.shape}", fit_figures("fit", "small steps", middle), 100),
        Part("tests", tuple(shlex.split(marked)), report, tuple(suite_figures("tests")), 140, AT_ONCE, gpu=True),
        part("resume", f"{fits} killed --shapes {middle.shape}", [broken], 110, AT_ONCE),
        part("fsdp2", f"{fits} fsdp2 --shapes {middle.shape}", sharded_figures("fsdp2"), 110, AT_ONCE),
        part(
            "sampler",
            f"benchmarks/sampler_speed.py --device cuda --shapes {' '.join(samplers)} --batches 1 8 {sampled}",
            sampler_figures("sampler", samplers, batches, block=32),
            80,
        ),
        part("scoring", "benchmarks/scoring_speed.py --device cuda --repeats 3", scoring_figures("scoring"), 40),
        part(
            "attention",
            f"{steps} large-steps --shapes {first.shape} --objectives llada --only flash flex",
            attention_figures("attention", "large steps", first),
            60,
        ),
    ]


def tiny_parts(out: Path, data: Path, device: str) -> list[Part]:
    """The same ways at sizes of a CPU, where a figure says no more than that the way can be gone.

    Args:
        out, data: As of :func:`full_parts`.
        device: The device, `cpu` or `cuda`.
    """
    part, [size] = partial(_part, out, limit=120.0, together=AT_ONCE, prefix="tiny: "), TINY_STEPS
    graphs = ["true", "false"] if device == "cuda" else ["false"]
    short = f"--graph {' '.join(graphs)} --rows 3 --steps 16 --log-every 4 --val-sequences 8 --forked"
    answers = "--vocab-size 512 --prompt-length 4 --length 8 --block-lengths 4 --steps 4"
    fit_rows = [
        *(
            Figure(f"fit, graphs {name}", "ms a step", thousand(fit_rate("fits", size, name == "true", "step_seconds")))
            for name in graphs
        ),
        Figure("second fit, whole", "s", lambda results: float(results.of("fits", "twice", "fits")[1]["wall"])),
        rows_that_differ("fits", "twice", "repeated: logged rows that differ"),
        rows_that_differ("fits", "killed", "killed with -9 and resumed: logged rows that differ"),
        *sharded_figures("fits"),
    ]
    step_rows = [Figure(name, "ms a step", _tiny_step(name)) for name in (EAGER, FLASH)]
    return [
        _prepare(data, f"--vocab-size {size.vocab_size} --max-bytes 1000000 --val-fraction 0.1", 120),
        part("fits", f"benchmarks/fit_check.py {data} --shapes {size.shape} {short}", fit_rows),
        part(
            "steps",
            f"benchmarks/train_speed.py --device {device} --preset tiny-steps --objectives llada --only flash",
            step_rows,
        ),
        part(
            "sampler",
            f"benchmarks/sampler_speed.py --device {device} --shapes {size.shape} --batches 1 2 {answers}",
            sampler_figures("sampler", [size.shape], (1, 2), block=4),
        ),
        part(
            "scoring",
            f"benchmarks/scoring_speed.py --device {device} --questions 1 --repeats 2 --shape {size.shape} "
            f"--vocab-size {size.vocab_size}",
            scoring_figures("scoring"),
        ),
    ]


def _part(
    out: Path,
    name: str,
    command: str,
    figures: Iterable[Figure],
    limit: float,
    together: str = "",
    prefix: str = "",
    gpu: bool = False,
) -> Part:
    """A part whose command takes `--json`. The figures of a prefix have no goals."""
    path = out / f"{prefix.partition(':')[0]}{name.replace(' ', '-')}.json"
    words = (*shlex.split(command), "--json", str(path))
    if prefix:
        figures = (Figure(prefix + figure.name, figure.unit, figure.find) for figure in figures)
    return Part(name, words, path, tuple(figures), limit, together, gpu)


def _prepare(data: Path, settings: str, limit: float) -> Part:
    """The corpus of the fits, which is there on every machine."""
    command = f"-m llada_lightning prepare --source python-stdlib --out {data} {settings} --quiet"
    tokens = Figure("training tokens of the corpus", "tokens", number("prepare", "splits", "train", "tokens"))
    return Part("prepare", tuple(shlex.split(command)), data / "manifest.json", (tokens,), limit)


def _tiny_step(variant: str) -> Callable[[Results], float]:
    return thousand(step("steps", TINY_STEPS[0], variant, "step_seconds"))
