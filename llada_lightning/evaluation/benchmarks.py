"""Benchmarks through lm-evaluation-harness: tasks found, loaded, measured."""

from __future__ import annotations

import difflib
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from llada_lightning.evaluation.harness import HarnessModel, said
from llada_lightning.evaluation.outcomes import Outcome, merged_settings
from llada_lightning.evaluation.sandbox import sandboxed_code_eval
from llada_lightning.evaluation.suites import Benchmark
from llada_lightning.generation.sampling import Sampling
from llada_lightning.support.errors import UserError

OUR_TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Loaded:
    """A benchmark with its data.

    Args:
        benchmark: The benchmark that is measured.
        tasks: The tasks, as ``TaskManager.load`` returns them.
        parts: The task objects of the whole tree.
    """

    benchmark: Benchmark
    tasks: list[Any]
    parts: list[Any]


def task_manager(
    benchmarks: Sequence[Benchmark], include_path: Path | None, metadata: Mapping[str, Any] | None = None
) -> TaskManager:
    """An index that knows the benchmarks' tasks.

    Reading lm-evaluation-harness's own thousands of tasks takes seconds: left out where the folder holds all.

    Args:
        benchmarks: The benchmarks that are measured.
        include_path: A folder with task files of the user.
        metadata: The options for the functions that make a task's documents.

    Raises:
        UserError: a task is unknown, or the folder is not there.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path '{include_path}': no such folder; give one with task YAML files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [benchmark.task for benchmark in benchmarks]
    folders = [OUR_TASKS, *([] if include_path is None else [include_path])]
    told = dict(metadata or {})
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=told)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folders, metadata=told)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            fix = f"did you mean {', '.join(near)}?" if near else "see `lm-eval ls tasks`, or give --include-path"
            raise UserError(f"task '{name}' is not known to lm-evaluation-harness; {fix}")
    return manager


def runs_code(manager: TaskManager, name: str) -> bool:
    """Whether a task, or one of a group's, executes what the model wrote."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    config = entry.cfg or {}
    parts = config.get("task")
    inner = parts if isinstance(parts, list) else []
    if entry.cfg is None:  # a tag
        inner = sorted(entry.tags)
    return bool(config.get("unsafe_code")) or any(_part_runs_code(manager, part) for part in inner)


def _part_runs_code(manager: TaskManager, part: Any) -> bool:
    """Of what a group lists: a name, or a group or task written out within it."""
    if isinstance(part, str):
        return runs_code(manager, part)
    inner = part.get("task", [])
    return bool(part.get("unsafe_code")) or any(
        _part_runs_code(manager, each) for each in (inner if isinstance(inner, list) else [inner])
    )


def require_code_allowed(manager: TaskManager, benchmark: Benchmark, unsafe_code: bool) -> None:
    """Needs no data.

    Raises:
        UserError: the task executes what the model writes, and that is not asked for.
    """
    if not unsafe_code and runs_code(manager, benchmark.task):
        raise UserError(
            f"task '{benchmark.task}' executes what the model writes; give --unsafe-code to run that in a sandbox, or "
            "leave the task out (--skip-missing)"
        )


def load_benchmark(manager: TaskManager, benchmark: Benchmark, unsafe_code: bool) -> Loaded:
    """The benchmark with its data, as its shots say.

    Raises:
        UserError: it executes code and that is not asked for, its data cannot be reached, a package is missing, or it
            has fewer documents than shots.
    """
    require_code_allowed(manager, benchmark, unsafe_code)
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
    groups = found["groups"]
    inner = {child for children in found["group_map"].values() for child in children}
    top = [group for name, group in groups.items() if name not in inner]
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


def measure(
    model: HarnessModel,
    loaded: Loaded,
    *,
    limit: int | None = None,
    chat: bool = False,
    sampling: Sampling | Mapping[str, Any] | None = None,
    unsafe_code: bool = False,
) -> list[Outcome]:
    """Runs a benchmark; of a tag, which has no score of its own, one outcome for each task. Nothing off the first rank.

    Args:
        model: The model. Its sampling, and its guidance where the benchmark sets one, are set to those of the
            benchmark.
        loaded: The benchmark.
        limit: The number of documents of each task, taken from its beginning; None: all.
        chat: Whether the prompts go through the chat template.
        sampling: The settings that go before the benchmark's, as those of :class:`HarnessModel`.
        unsafe_code: Whether tasks may execute, in the sandbox, what the model wrote.

    Raises:
        UserError: the task has no such metric, or as the model's methods.
    """
    benchmark = loaded.benchmark
    model.sampling = benchmark.sampling | said(sampling)
    guidance = {name: value for name, value in model.sampling.items() if name == "cfg_scale"}
    if guidance:
        model.cfg_scale = guidance["cfg_scale"]
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
