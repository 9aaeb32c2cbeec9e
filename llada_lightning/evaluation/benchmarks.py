"""Benchmarks through lm-evaluation-harness: tasks found, loaded, measured, and joined to the results of a run."""

from __future__ import annotations

import difflib
import json
import logging
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.checkpoints.run_folder import (
    CONFIG,
    final_checkpoint,
    result_checkpoints,
    run_folder_of,
    saved_step,
)
from llada_lightning.evaluation.harness import HarnessModel, said
from llada_lightning.evaluation.sandbox import sandboxed_code_eval
from llada_lightning.evaluation.suites import Ablation, Benchmark, Outcome, merged_settings
from llada_lightning.generation.sampling import Sampling
from llada_lightning.records import read_evaluations, write_evaluations
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import warn

OUR_TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Loaded:
    """A benchmark with its data: the tasks as ``TaskManager.load`` returns them, and those of the whole tree."""

    benchmark: Benchmark
    tasks: list[Any]
    parts: list[Any]


def task_manager(
    benchmarks: Sequence[Benchmark], include_path: Path | None, metadata: Mapping[str, Any] | None = None
) -> TaskManager:
    """An index that knows the benchmarks' tasks, and those of a folder of the user.

    Reading lm-evaluation-harness's own thousands of tasks takes seconds: left out where the folders hold all.
    The metadata go to the functions that make a task's documents.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path '{include_path}': no such folder; give one with task YAML files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [benchmark.task for benchmark in benchmarks]
    options: dict[str, Any] = {
        "include_path": list(filter(None, [OUR_TASKS, include_path])),
        "metadata": metadata or {},
    }
    manager = TaskManager(include_defaults=False, **options)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(**options)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            fix = f"did you mean {', '.join(near)}?" if near else "see `lm-eval ls tasks`, or give --include-path"
            raise UserError(f"task '{name}' is not known to lm-evaluation-harness; {fix}")
    return manager


def runs_code(manager: TaskManager, task: str | Mapping[str, Any]) -> bool:
    """Whether a task, group or tag (by name, or written out within a group) executes what the model wrote."""
    config = task
    if isinstance(task, str):
        entry = manager.task_index.get(task)
        if entry is None:
            return False
        config = {"task": sorted(entry.tags)} if entry.cfg is None else entry.cfg  # None: a tag
    assert not isinstance(config, str)
    inner = config.get("task", [])
    if not isinstance(inner, list):  # the name of the task itself, or of the one that a group changes
        inner = [] if isinstance(task, str) else [inner]
    return bool(config.get("unsafe_code")) or any(runs_code(manager, part) for part in inner)


def load_benchmarks(
    benchmarks: Sequence[Benchmark],
    include_path: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    unsafe_code: bool = False,
    left_out: Callable[[UserError], None] | None = None,
) -> list[Loaded]:
    """The benchmarks with their data; a task has several of them in a table of settings.

    Args:
        benchmarks, include_path, metadata: As of :func:`task_manager`.
        unsafe_code: Whether tasks may execute what the model writes.
        left_out: A function that is told why a task cannot be loaded, and then it is left out; None: that is an error.
    """
    manager = task_manager(benchmarks, include_path, metadata)
    once = {benchmark.task: benchmark for benchmark in benchmarks}
    if left_out is None:
        for benchmark in once.values():  # before gigabytes are loaded
            _require_code_allowed(manager, benchmark, unsafe_code)
    read = {}
    for task, benchmark in once.items():
        try:
            read[task] = load_benchmark(manager, benchmark, unsafe_code)
        except UserError as error:
            if left_out is None:
                raise
            left_out(error)
    if not read:
        raise UserError("evaluate: no task is left")
    return [replace(read[each.task], benchmark=each) for each in benchmarks if each.task in read]


def _require_code_allowed(manager: TaskManager, benchmark: Benchmark, unsafe_code: bool) -> None:
    if not unsafe_code and runs_code(manager, benchmark.task):
        raise UserError(
            f"task '{benchmark.task}' executes what the model writes; give --unsafe-code to run that in a sandbox, or "
            "leave the task out (--skip-missing)"
        )


def load_benchmark(manager: TaskManager, benchmark: Benchmark, unsafe_code: bool) -> Loaded:
    """The benchmark with its data, as its shots say.

    Raises:
        UserError: It executes code and that is not asked for, its data cannot be reached, a package is missing, or it
            has fewer documents than shots.
    """
    _require_code_allowed(manager, benchmark, unsafe_code)
    executes = runs_code(manager, benchmark.task)
    try:
        with _seeded(), sandboxed_code_eval() if executes else nullcontext():
            found = manager.load([benchmark.task])
    except UserError:  # of a function that makes a task's documents
        raise
    except (ImportError, AssertionError) as error:
        raise UserError(
            f"task '{benchmark.task}' needs a package ({_first_line(error)}); pip install 'lm-eval[math]' or that one"
        ) from error
    except Exception as error:  # whatever datasets, its hub and its network raise
        raise UserError(
            f"task '{benchmark.task}': its data cannot be reached ({_first_line(error)}); run once where there is a "
            "network, with HF_HOME=FOLDER and --limit 1, copy FOLDER here, set HF_HOME=FOLDER and HF_HUB_OFFLINE=1"
        ) from error
    inner = {child for children in found["group_map"].values() for child in children}
    top = [group for name, group in found["groups"].items() if name not in inner]
    parts = list(found["tasks"].values())
    for task in parts:
        _check_shots(task, benchmark)
    return Loaded(benchmark, top or parts, parts)


def _check_shots(task: Any, benchmark: Benchmark) -> None:
    """Refuses more examples in a prompt than there are documents to draw them from."""
    own = task.get_config("num_fewshot")
    shots = own if benchmark.shots is None or own == 0 else benchmark.shots  # a task may allow none
    if not shots:
        return
    # Where examples come from the documents that are asked, the one that is asked is left out.
    most = len(task.fewshot_docs()) - (task.get_config("fewshot_split") == task.get_config("test_split"))
    if shots > most:
        raise UserError(
            f"task '{task.config.task}': {shots} shots wanted, and it has {most} documents for them; give fewer shots"
        )


def check_varied(ablation: Ablation, lm: LanguageModel, loaded: Sequence[Loaded]) -> None:
    """Refuses a table of settings that asks nothing of this model or of these tasks."""
    if not lm.facts.masks:
        raise UserError(
            f"'{lm.name}' is an {lm.objective}, which has no {ablation.question} to vary; give a llada checkpoint"
        )
    for each in loaded:
        generated = any(part.OUTPUT_TYPE == "generate_until" for part in each.parts)
        if generated != (ablation.scored == "generation"):
            kind = "sampled answers" if generated else "likelihoods"
            raise UserError(
                f"task '{each.benchmark.name}' is of {kind}, and Table {ablation.table} varies the {ablation.scored}; "
                "name another task"
            )


def measure(
    model: HarnessModel,
    loaded: Loaded,
    *,
    limit: int | None = None,
    chat: bool = False,
    sampling: Sampling | Mapping[str, Any] | None = None,
    unsafe_code: bool = False,
) -> list[Outcome]:
    """Runs a benchmark; of a tag, which has no score of its own, one outcome for each task. Empty but on rank 0.

    Args:
        model: The model. Its sampling, and its guidance where the benchmark sets one, are set to those of the
            benchmark.
        loaded: The benchmark.
        limit: The number of documents of each task, taken from its beginning; None: all.
        chat: Whether the prompts go through the chat template.
        sampling: The settings that go before the benchmark's, as those of :class:`HarnessModel`.
        unsafe_code: Whether tasks may execute, in the sandbox, what the model wrote.
    """
    benchmark = loaded.benchmark
    model.sampling = benchmark.sampling | said(sampling)
    guidance = {name: value for name, value in model.sampling.items() if name == "cfg_scale"}
    if guidance:
        model.scoring |= guidance
    model.infill, model.used = benchmark.infill, []
    model.greedy = any(task.OUTPUT_TYPE == "loglikelihood" for task in loaded.parts)
    with _seeded():
        found = simple_evaluate(
            model,
            tasks=loaded.tasks,
            num_fewshot=benchmark.shots,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=unsafe_code,
            task_manager=TaskManager(include_defaults=False),
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    if found is None:
        return []
    used = merged_settings(model.used or [guidance])  # used: where answers were sampled
    return [replace(each, sampling=used) for each in _outcomes(benchmark, found)]


def _outcomes(benchmark: Benchmark, found: Mapping[str, Any]) -> Iterator[Outcome]:
    results, counts = found["results"], found["n-samples"]
    whole = benchmark.task in results
    for task in [benchmark.task] if whole else results:
        metrics = dict(_metrics(results[task]))
        metric = benchmark.metric or next(iter(metrics))
        if metric not in metrics:
            raise UserError(f"task '{task}' has no metric '{metric}'; it has {', '.join(metrics)}")
        n = sum(count["effective"] for count in counts.values()) if whole else counts[task]["effective"]
        parts = {name: dict(_metrics(results[name])) for name in counts} if whole and task not in counts else {}
        yield Outcome(
            benchmark.name if whole else task,
            task,
            metric,
            value=metrics[metric]["value"],
            stderr=metrics[metric]["stderr"],
            n=n,
            shots=found["n-shot"].get(task),
            metrics=metrics,
            parts=parts,
            row=benchmark.row,
        )


def _metrics(result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """(``metric,filter``, its value and standard error) of one task."""
    for key, value in result.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, (int, float)):
            error = result.get(f"{name}_stderr,{filtered}")
            yield key, {"value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else math.nan}


def join_run(checkpoint: str, outcomes: Sequence[Outcome], settings: Mapping[str, Any]) -> Path | None:
    """Adds scores in percent, measured under ``settings``, to the evaluations of the run that a checkpoint lies in.

    An evaluation under settings that a table varies is no result of a run, and stays out. Returns the file; None where
    there is no run, or nothing to add.
    """
    path = Path(checkpoint)
    stored = final_checkpoint(path) if path.is_dir() and (path / CONFIG).is_file() else path
    run = None if stored is None else run_folder_of(stored)
    shares = [outcome for outcome in outcomes if outcome.is_share and outcome.row is None]
    if stored is None or run is None or not shares:
        return None
    step = saved_step(stored)
    return write_evaluations(run, [outcome.as_row(step, _told(settings)) for outcome in shares])


def unmeasured_results(folder: Path, names: Collection[str], settings: Mapping[str, Any]) -> list[str]:
    """The checkpoint of each result of a run that lacks a score of a benchmark under these settings.

    Args:
        folder: The folder of the run.
        names: The names of the benchmarks.
        settings: The settings of :func:`join_run`; with a limit nothing is joined, so everything is measured again.
    """
    table = read_evaluations(folder)
    known = table[table["settings"] == _told(settings)]
    found = [
        str(path) for path in result_checkpoints(folder)
        if not set(names) <= set(known[known["steps"] == saved_step(path)]["task"])
    ]  # fmt: skip
    if not found:
        warn(f"note: every result of {folder} has been measured under these settings; nothing to do")
    return found


def _told(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


@contextmanager
def _seeded() -> Iterator[None]:
    """Global generators as lm-evaluation-harness seeds them, and afterwards as they were.

    Tasks shuffle choices when they are loaded (GPQA), which the harness's own seeding, later, would not reach.
    """
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}".rstrip(".: ")
