"""The paper's benchmarks as suites, and the tables of their results. A suite names for each benchmark the task of
lm-evaluation-harness, the number of shots and the settings of sampling.

Shots are those of the paper's Tables 1 and 2, lengths and steps those of Appendix B.6. What the paper leaves open, and
where lm-evaluation-harness (0.4.13) has the task in another form:

- The paper does not say which metric of a task it prints. Chosen here: ARC-C, HellaSwag and PIQA by `acc_norm`,
  TruthfulQA by MC2, GSM8K by `flexible-extract`, other tasks of likelihood by `acc`.
- `math` is `minerva_math`, four worked examples, as the paper's four shots; needs `pip install lm-eval[math]`.
- `mbpp` has three worked examples in lm-evaluation-harness; the paper prints four shots. Three are given.
- `ceval` is `ceval-valid`: the test split's answers are not public.
- `gpqa` is the main set (448 questions).
- HumanEval-FIM was measured with two shots by a library of the authors. Here it is `humaneval_infilling` without shots,
  and `llada` fills a gap of as many [MASK]s as the reference has tokens. An `arm` continues the suffix and the prompt.
- Of the instruct model all tasks are generated, by a library of the authors. Here they are lm-evaluation-harness's
  generative tasks, with its wording. HellaSwag has none there: ours is in ``tasks/`` beside this file.

The paper's Tables 6 to 10 are suites, too: rows of settings under which tasks of the user's choice are measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llada_lightning.support.errors import UserError

Settings = dict[str, Any]
"""The settings of ``generation.Sampling`` that a benchmark sets, by their names; the task sets the others."""


@dataclass(frozen=True)
class Benchmark:
    """One row of a suite.

    Args:
        name: The name in our tables. The column of a results table is ``task_<name>``.
        task: The name in lm-evaluation-harness of a task, a group or a tag.
        metric: The metric of that task, as ``metric,filter``; None: its first.
        shots: The number of examples in the prompt; None: the number that the task sets.
        sampling: The sampling settings of the answers, where they are generated.
        infill: Whether `llada` fills the gap between the fields `prompt` and `suffix`.
        row, group: The names of the row of a table of settings and of its group, of which the best row is shown.
    """

    name: str
    task: str
    metric: str | None = None
    shots: int | None = None
    sampling: Settings = field(default_factory=dict)
    infill: bool = False
    row: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Suite:
    """Benchmarks that are measured together; with `chat` their prompts go through the chat template."""

    benchmarks: tuple[Benchmark, ...]
    chat: bool = False


MONTE_CARLO = 128
"""Masks of a continuation of several tokens (paper, B.6). One token is scored exactly by one pass."""

BASE = {"length": 1024, "steps": 1024, "remasking": "low_confidence"}
"""Pure diffusion, one token a step (B.6)."""


def _instruct(length: int, zero_eos: bool = False) -> Settings:
    """As many steps as tokens; EOS kept last where B.4 has it so."""
    return {"length": length, "steps": length, "remasking": "low_confidence", "zero_eos_confidence": zero_eos}


_FLEXIBLE = "exact_match,flexible-extract"
_MMLU = Benchmark("mmlu", "mmlu", "acc,none", 5)
_CMMLU = Benchmark("cmmlu", "cmmlu", "acc,none", 5)
_ARC_C = Benchmark("arc_c", "arc_challenge", "acc_norm,none", 0)
_PIQA = Benchmark("piqa", "piqa", "acc_norm,none", 0)
_GSM8K = Benchmark("gsm8k", "gsm8k", _FLEXIBLE, 4, BASE)
_HUMANEVAL = Benchmark("humaneval", "humaneval", "pass@1,create_test", 0, BASE)

SUITES: dict[str, Suite] = {
    "paper-base": Suite((
        _MMLU,
        Benchmark("bbh", "bbh", "exact_match,get-answer", 3, BASE),
        _ARC_C,
        Benchmark("hellaswag", "hellaswag", "acc_norm,none", 0),
        Benchmark("truthfulqa", "truthfulqa_mc2", "acc,none", 0),
        Benchmark("winogrande", "winogrande", "acc,none", 5),
        _PIQA,
        _GSM8K,
        Benchmark("math", "minerva_math", "exact_match,none", 4, BASE),
        Benchmark("gpqa", "gpqa_main_n_shot", "acc,none", 5),
        _HUMANEVAL,
        Benchmark("humaneval_fim", "humaneval_infilling", "pass@1,create_test", 0, {"length": 1024}, infill=True),
        Benchmark("mbpp", "mbpp", "pass_at_1,none", 3, BASE),
        _CMMLU,
        Benchmark("ceval", "ceval-valid", "acc,none", 5),
    )),
    "paper-instruct": Suite((
        Benchmark("mmlu", "mmlu_generative", "exact_match,get_response", 5, _instruct(3)),
        Benchmark("mmlu_pro", "mmlu_pro", "exact_match,custom-extract", 0, _instruct(256)),
        Benchmark("hellaswag", "hellaswag_generative", "exact_match,letter", 0, _instruct(3)),
        Benchmark("arc_c", "arc_challenge_chat", "exact_match,remove_whitespace", 0, _instruct(512)),
        Benchmark("gsm8k", "gsm8k", _FLEXIBLE, 4, _instruct(512, zero_eos=True)),
        Benchmark("math", "minerva_math", "exact_match,none", 0, _instruct(512, zero_eos=True)),
        Benchmark("gpqa", "gpqa_main_generative_n_shot", _FLEXIBLE, 5, _instruct(64, zero_eos=True)),
        Benchmark("humaneval", "humaneval_instruct", "pass@1,create_test", 0, _instruct(512, zero_eos=True)),
        Benchmark("mbpp", "mbpp_instruct", "pass_at_1,extract_code", 3, _instruct(256, zero_eos=True)),
    ), chat=True),
    "scalability": Suite((_MMLU, _CMMLU, _ARC_C, _PIQA, _GSM8K, _HUMANEVAL)),
}  # fmt: skip
"""By name: Table 1, Table 2, and the six tasks of Figure 3."""


# --- tables of settings -----------------------------------------------------------------------------------------------

VALUE: Any = object()
"""In the settings of a row: the row is there once for each value of its table."""


@dataclass(frozen=True)
class Ablation:
    """A table of the paper: rows of settings under which tasks of the user's choice are measured.

    Args:
        table: The number of the table.
        question: What is varied, for the title of the table.
        scored: Whether the settings are of likelihoods or of sampled answers.
        rows: The settings of each row by its name, which holds ``{value}`` where a setting is :data:`VALUE`.
        values: The values of the paper for :data:`VALUE`; those of the user replace them.
        group: The name of the rows with a value together, where the best of them is shown as well (Table 6).
    """

    table: int
    question: str
    scored: Literal["likelihood", "generation"]
    rows: dict[str, Settings]
    values: tuple[float, ...] = ()
    group: str | None = None

    @property
    def title(self) -> str:
        return f"Table {self.table}: {self.question}"

    @property
    def varied(self) -> set[str]:
        """The names of the settings in the rows."""
        return {name for settings in self.rows.values() for name in settings}

    def suite(self, tasks: Sequence[Benchmark], values: Sequence[float] = ()) -> Suite:
        """The tasks under the settings of each row, row by row.

        Raises:
            UserError: The table has no values to replace, or a value is out of range.
        """
        if values and not self.values:
            raise UserError(f"--values: Table {self.table} has none to replace; leave it out")
        whole = all(isinstance(value, int) for value in self.values)
        for value in values:
            if not value > 0 or (whole and value != int(value)):
                raise UserError(
                    f"--values {value:g}: give {'whole numbers of at least 1' if whole else 'scales above 0'}"
                )
        chosen = [int(value) if whole else value for value in values or self.values]
        benchmarks = []
        for name, settings in self.rows.items():
            several = VALUE in settings.values()
            for value in chosen if several else [0]:
                sampling = {key: value if setting is VALUE else setting for key, setting in settings.items()}
                row, group = name.format(value=f"{value:g}"), self.group if several else None
                benchmarks += [replace(task, sampling=sampling, row=row, group=group) for task in tasks]
        return Suite(tuple(benchmarks))


_PURE: Settings = {"strategy": "diffusion", "block_length": None}
_BLOCKWISE: dict[str, Settings] = {
    "autoregressive": {"strategy": "autoregressive", "block_length": None},
    "block diffusion, L' = {value}": {"strategy": "block_diffusion", "block_length": VALUE},
    "block diffusion LLaDA, L' = {value}": {"strategy": "diffusion", "block_length": VALUE},
}

ABLATIONS: dict[str, Ablation] = {
    "ablate-guidance": Ablation(
        6, "classifier-free guidance", "likelihood",
        {"w/o CFG": {"cfg_scale": 0.0}, "CFG, w = {value}": {"cfg_scale": VALUE}},
        (0.5, 1.0, 1.5, 2.0), group="w/ CFG",
    ),
    "ablate-strategies": Ablation(
        7, "sampling strategies", "generation", _BLOCKWISE | {"pure diffusion": _PURE}, (2, 4, 8, 32)
    ),
    "ablate-strategies-instruct": Ablation(
        8, "sampling strategies after SFT", "generation",
        _BLOCKWISE | {"pure diffusion": _PURE | {"zero_eos_confidence": True}}, (32,),
    ),
    "ablate-remasking": Ablation(9, "remasking", "generation", {
        "random remasking": _PURE | {"remasking": "random"},
        "low-confidence remasking": _PURE | {"remasking": "low_confidence"},
    }),
    "ablate-length": Ablation(
        10, "generation length", "generation",
        {"length {value}": _PURE | {"length": VALUE, "steps": VALUE}}, (256, 512, 1024),
    ),
}  # fmt: skip
"""By name: Tables 6 to 10. The scales are those of B.3. After SFT pure diffusion keeps EOS last (B.4)."""


def chosen_suite(
    name: str | None, tasks: str | None, shots: int | None, values: Sequence[float], varied: Collection[str]
) -> Suite:
    """The suite that options of `llada evaluate` say.

    Args:
        name: The name of the suite, if any.
        tasks: The names of tasks with commas between them: instead of a suite, or for a table of settings.
        shots: The number of examples in the prompts of these tasks; None: the number that each task sets.
        values: The values of a table of settings, instead of the paper's.
        varied: The settings of sampling that other options say, which a table of settings must not vary.
    """
    known: dict[str, Suite | Ablation] = {**SUITES, **ABLATIONS}
    if name is not None and name not in known:
        raise UserError(f"--suite '{name}' is not known; choose from {', '.join(known)}")
    chosen = None if name is None else known[name]
    if values and not isinstance(chosen, Ablation):
        raise UserError(f"--values is of the suites {', '.join(ABLATIONS)}; leave it out, or name one")
    if isinstance(chosen, Suite):
        if tasks is not None:
            raise UserError("evaluate: --suite and --tasks: both given; give one of them")
        if shots is not None:
            raise UserError(f"--shots {shots}: the suite says its own; leave it out, or name --tasks")
        return chosen
    if tasks is None:
        if chosen is None:
            raise UserError("evaluate: --suite and --tasks: neither given; give one of them")
        raise UserError(f"--suite {name}: which tasks? give them with --tasks, as --tasks gsm8k")
    names = list(dict.fromkeys(task.strip() for task in tasks.split(",") if task.strip()))
    if not names:
        raise UserError(f"--tasks '{tasks}' names no task; give names, as --tasks piqa,arc_challenge")
    benchmarks = tuple(Benchmark(task, task, shots=shots) for task in names)
    if chosen is None:
        return Suite(benchmarks)
    for setting in sorted(chosen.varied & set(varied)):
        raise UserError(f"--{setting.replace('_', '-')} is what Table {chosen.table} varies; leave it out")
    return chosen.suite(benchmarks, values)


# --- what came out ----------------------------------------------------------------------------------------------------

SHARES = frozenset({"acc", "acc_norm", "acc_mutual_info", "exact_match", "em", "f1", "pass@1", "pass_at_1"})
"""Metrics between 0 and 1 of which more is better: those that a results table takes, in percent."""

_MOST_PARTS = 10
"""Tasks of a group that are shown below it; the JSON has all."""


@dataclass(frozen=True)
class Outcome:
    """What a benchmark gave.

    Args:
        name, task: The name in our tables, and the task of lm-evaluation-harness.
        metric: The metric that counts, as ``metric,filter``.
        value: The value of the metric, as lm-evaluation-harness returns it.
        stderr: The standard error of the value over documents; NaN where there is none. For `llada` it includes the
            scatter of the Monte Carlo estimates only as far as that makes answers right or wrong.
        n: The number of documents.
        shots: The number of examples in the prompt; None where the tasks of a group differ.
        metrics: The value and the standard error of every metric.
        parts: The metrics of each task of a group.
        sampling: The settings as they were used. Where the requests of a task differ, as in the length of an answer,
            the least and the greatest value.
        row: The name of the row of a table of settings.
        best_of: The name of the row with the highest value, in the row that shows the best of a group.
    """

    name: str
    task: str
    metric: str
    value: float
    stderr: float
    n: int
    shots: int | None
    metrics: dict[str, dict[str, float]]
    parts: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    row: str | None = None
    best_of: str | None = None

    @property
    def is_share(self) -> bool:
        return self.metric.split(",")[0] in SHARES

    def as_row(self, steps: int, settings: str) -> dict[str, Any]:
        """A share as a row of a run's evaluations, in percent."""
        return {
            "steps": steps, "task": self.name, "score": 100 * self.value, "stderr": 100 * self.stderr, "n": self.n,
            "metric": self.metric, "settings": settings,
        }  # fmt: skip


def best_rows(outcomes: Sequence[Outcome], groups: dict[str, str]) -> list[Outcome]:
    """For each group of rows (by the row's name) and each task the best row, chosen by the values shown: optimistic."""
    best: dict[tuple[str, str], Outcome] = {}
    for outcome in outcomes:
        if outcome.row in groups:
            key = groups[outcome.row], outcome.name
            if key not in best or outcome.value > best[key].value:
                best[key] = outcome
    return [replace(each, row=f"{group} (the best)", best_of=each.row) for (group, _), each in best.items()]


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each benchmark, and below a group its tasks."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("metric", overflow="fold")
    for name in ("shots", "n", "value ± s.e."):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        metric, unit = outcome.metric, " %" if outcome.is_share else ""
        name, shots = metric.removesuffix(",none"), "" if outcome.shots is None else str(outcome.shots)
        value = _value(outcome.value, outcome.stderr, outcome.is_share) + unit
        table.add_row(outcome.name, name, shots, str(outcome.n), value)
        for part, metrics in outcome.parts.items() if len(outcome.parts) <= _MOST_PARTS else ():
            if metric in metrics:
                value = _value(metrics[metric]["value"], metrics[metric]["stderr"], outcome.is_share) + unit
                table.add_row(f"  {part}", name, "", "", value)
    return table


def row_table(title: str, outcomes: Sequence[Outcome]) -> Table:
    """Rows of settings and, in columns, tasks; shares in percent."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False, title=f"{title}, % ± s.e.", title_justify="left")
    table.add_column("", no_wrap=True)
    tasks = list(dict.fromkeys(outcome.name for outcome in outcomes))
    for task in tasks:
        table.add_column(task, justify="right")
    sampled = any("length" in outcome.sampling for outcome in outcomes)
    for name in ("tokens", "steps") if sampled else ():
        table.add_column(name, justify="right", no_wrap=True)
    for row in dict.fromkeys(outcome.row or "" for outcome in outcomes):
        cells = {outcome.name: outcome for outcome in outcomes if outcome.row == row}
        settings = merged_settings([outcome.sampling for outcome in cells.values()])
        counts = [_number(settings.get(name)) for name in ("length", "steps")] if sampled else []
        table.add_row(row, *(_cell(cells[task]) if task in cells else "" for task in tasks), *counts)
    return table


def merged_settings(used: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings of batches of requests, one value each; where they differ, the least and the greatest."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in used for name in each):
        values = [each[name] for each in used if name in each]
        distinct = sorted({one for value in values for one in (value if isinstance(value, list) else [value])})
        merged[name] = distinct[0] if len(distinct) == 1 else [distinct[0], distinct[-1]]
    return merged


def _number(value: Any) -> str:
    return "" if value is None else "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(outcome: Outcome) -> str:
    text = _value(outcome.value, outcome.stderr, outcome.is_share, digits=1)
    return text if outcome.best_of is None else f"{text} ({outcome.best_of})"


def _value(value: float, stderr: float, is_share: bool, digits: int = 2) -> str:
    scale = 100 if is_share else 1
    if is_share and stderr == 0:  # all answers are alike: how many others there are, they do not tell
        return f"{scale * value:.{digits}f} ± n/a"
    text = f"{scale * value:.{digits}f}"
    return f"{text} ± {scale * stderr:.{digits}f}" if math.isfinite(stderr) else text
