"""What a run costs beside its steps, which a sweep pays for each of its runs: start to first step, last step to exit.

Real `llada fit` processes of one step: eager; compiled, with nothing in the compile cache; compiled, with what the run
before has left there. Then what the imports take, package by package.
Run: python benchmarks/start_cost.py
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from bench_report import caption, circumstances, markdown, write_result
from processes import child_environment, finish
from small_fits import fit_words, prepare_corpora, run_folder

CASES = {"eager": False, "compiled, cold cache": True, "compiled, warm cache": True}
AIMS = {"eager": 15.0, "compiled, cold cache": 30.0, "compiled, warm cache": 30.0}
"""Seconds, start to first step and last step to exit together."""
PARTS = {
    "read": "interpreter, imports, settings",
    "training": "data, model, optimizer",
    "first_step": "first step, compiling",
    "fitted": "validation in the fit, last checkpoint",
    "validated": "final validation",
    "exit": "record, end of process",
}
"""What has passed at each mark since the one before."""
IMPORTS = "import llada_lightning.training.fit"


def fit(case: str, shape: str, data: Path, folder: Path, cache: Path) -> dict[str, float]:
    """Seconds of the parts of a fit of one step.

    Args:
        case: of :data:`CASES`.
        shape: of the model.
        data: prepared.
        folder: for the run, must be new.
        cache: of what is compiled.
    """
    folder.mkdir(parents=True)
    marks = folder / "marks.jsonl"
    callback = {"class_path": "step_marks.StepMarks", "init_args": {"path": str(marks)}}
    words = fit_words(
        "llada",
        data,
        folder,
        f"--model.shape={shape}",
        "--data.global_batch=16",
        "--data.sequence_length=128",
        "--trainer.max_steps=1",
        "--trainer.val_check_interval=1",
        f"--speed.compile={str(CASES[case]).lower()}",
        f"--trainer.callbacks={json.dumps([callback])}",
    )
    environment = child_environment(folder / "tmp", trusted="step_marks")
    # The compiler's processes and the step take the threads that a user's run has.
    environment |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "XDG_CACHE_HOME": str(cache)}
    running = finish(words, folder / "log", environment)
    end = time.time()
    assert (run_folder(folder) / "result.json").exists()
    found = {line["name"]: line["time"] for line in map(json.loads, marks.read_text().splitlines())}
    return parts_of({"start": running.began_at, **found, "exit": end})


def parts_of(moments: dict[str, float]) -> dict[str, float]:
    """Seconds of each of :data:`PARTS`; `start_to_first_step`, `end_to_exit`, and `fixed`, the two together."""
    passed, before = {}, moments["start"]
    for name in PARTS:
        passed[name] = moments[name] - before
        before = moments[name]
    start, end = moments["first_step"] - moments["start"], moments["exit"] - moments["last_step"]
    return {**passed, "start_to_first_step": start, "end_to_exit": end, "fixed": start + end}


def import_seconds(module_line: str = IMPORTS) -> dict[str, float]:
    """Seconds that each package takes of an import, its own modules only, the dearest first; `all` first of all."""
    command = [sys.executable, "-X", "importtime", "-c", module_line]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stderr
    own: dict[str, float] = defaultdict(float)
    for microseconds, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)", text):
        own[name.partition(".")[0]] += int(microseconds) / 1e6
    return {"all": sum(own.values()), **dict(sorted(own.items(), key=lambda item: -item[1]))}


def table(cases: dict[str, dict[str, float]]) -> str:
    """Seconds of each part, a column for each case."""
    lines = [[what, *(f"{found[name]:.1f}" for found in cases.values())] for name, what in PARTS.items()]
    sums = {"start_to_first_step": "start to first step", "end_to_exit": "last step to exit", "fixed": "both"}
    lines += [[f"**{what}**", *(f"{found[name]:.1f}" for found in cases.values())] for name, what in sums.items()]
    verdicts = [f"{AIMS[case]:.0f}: {'met' if cases[case]['fixed'] < AIMS[case] else 'not met'}" for case in cases]
    return markdown(["seconds", *cases], [*lines, ["to reach", *verdicts]])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.28m")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each case; the median counts")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    taken: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare_corpora(folder).first
        for turn in range(options.repeats):
            for number, case in enumerate(CASES):
                cache = folder / f"cache{turn}"
                taken[case].append(fit(case, options.shape, data, folder / f"{turn}-{number}", cache))
    cases = {case: {key: median(run[key] for run in runs) for key in runs[0]} for case, runs in taken.items()}
    imports = import_seconds()
    result = {**circumstances(torch.device("cpu")), "shape": options.shape, "cases": cases, "runs": taken}
    write_result(options.json, {**result, "imports": imports})
    dearest = ", ".join(f"{name} {seconds:.1f}" for name, seconds in list(imports.items())[1:9])
    print(f"{caption(result)}\n\n{table(cases)}\n\nImports: {imports['all']:.1f} s, of which {dearest}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
