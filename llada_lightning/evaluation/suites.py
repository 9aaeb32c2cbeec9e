"""The paper's benchmarks as named suites: which task of lm-evaluation-harness, how many shots, how answers are sampled.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llada_lightning.support.errors import UserError

Settings = dict[str, Any]
"""Settings of ``generation.Sampling`` that a benchmark says, by their names; the others are left to the task."""


@dataclass(frozen=True)
class Benchmark:
    """One row of a suite.

    Args:
        name: in our tables: a results table's column is ``task_<name>``.
        task: of lm-evaluation-harness: a task, a group or a tag.
        metric: of that task, as ``metric,filter``; None: its first.
        shots: examples in the prompt; None: as the task says.
        sampling: of the answers, where they are generated.
        infill: `llada` fills the gap between the fields `prompt` and `suffix`.
        row: The name of the row of a table of settings; None elsewhere.
        group: The group of that row: of each group the best row is shown as well.
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
    """Benchmarks that are measured together.

    Args:
        benchmarks: in the paper's order.
        chat: prompts go through the checkpoint's chat template.
    """

    benchmarks: tuple[Benchmark, ...]
    chat: bool = False


BASE = {"length": 1024, "steps": 1024, "remasking": "low_confidence"}
"""Pure diffusion, one token a step (B.6)."""


def _instruct(length: int, zero_eos: bool = False) -> Settings:
    """As many steps as tokens; EOS kept last where B.4 says so."""
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
class Row:
    """A row of a table, or one row for each value of the table.

    Args:
        name: The name as in the paper, with ``{value}`` where there is a value.
        sampling: The settings of the likelihoods (guidance) or of ``generate``; :data:`VALUE` is replaced.
        group: The group of the row: of each group the best row is shown as well, as Table 6 does over scales.
    """

    name: str
    sampling: Settings
    group: str | None = None


@dataclass(frozen=True)
class Ablation:
    """A table of the paper: rows of settings under which tasks of the user's choice are measured.

    Args:
        table: The number of the table.
        question: What is varied, for the title of the table.
        scored: Whether the settings are of likelihoods or of sampled answers.
        rows: The rows, which differ in what is varied and in nothing else.
        values: The values of the paper for :data:`VALUE`; those of the user replace them.
    """

    table: int
    question: str
    scored: Literal["likelihood", "generation"]
    rows: tuple[Row, ...]
    values: tuple[float, ...] = ()

    @property
    def title(self) -> str:
        return f"Table {self.table}: {self.question}"

    @property
    def varied(self) -> set[str]:
        """The names of the settings that the rows say."""
        return {name for row in self.rows for name in row.sampling}

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
        rows = [each for row in self.rows for each in _filled_in(row, chosen)]
        return Suite(
            tuple(replace(task, sampling=row.sampling, row=row.name, group=row.group) for row in rows for task in tasks)
        )


def _filled_in(row: Row, values: Sequence[float]) -> Iterator[Row]:
    if VALUE not in row.sampling.values():
        yield row
        return
    for value in values:
        sampling = {name: value if setting is VALUE else setting for name, setting in row.sampling.items()}
        yield replace(row, name=row.name.format(value=f"{value:g}"), sampling=sampling)


_PURE = {"strategy": "diffusion", "block_length": None}
_BLOCKWISE = (
    Row("autoregressive", {"strategy": "autoregressive", "block_length": None}),
    Row("block diffusion, L' = {value}", {"strategy": "block_diffusion", "block_length": VALUE}),
    Row("block diffusion LLaDA, L' = {value}", {"strategy": "diffusion", "block_length": VALUE}),
)

ABLATIONS: dict[str, Ablation] = {
    "ablate-guidance": Ablation(6, "classifier-free guidance", "likelihood", (
        Row("w/o CFG", {"cfg_scale": 0.0}),
        Row("CFG, w = {value}", {"cfg_scale": VALUE}, group="w/ CFG"),
    ), (0.5, 1.0, 1.5, 2.0)),
    "ablate-strategies": Ablation(7, "sampling strategies", "generation", (
        *_BLOCKWISE, Row("pure diffusion", _PURE),
    ), (2, 4, 8, 32)),
    "ablate-strategies-instruct": Ablation(8, "sampling strategies after SFT", "generation", (
        *_BLOCKWISE, Row("pure diffusion", {**_PURE, "zero_eos_confidence": True}),
    ), (32,)),
    "ablate-remasking": Ablation(9, "remasking", "generation", (
        Row("random remasking", {**_PURE, "remasking": "random"}),
        Row("low-confidence remasking", {**_PURE, "remasking": "low_confidence"}),
    )),
    "ablate-length": Ablation(10, "generation length", "generation", (
        Row("length {value}", {**_PURE, "length": VALUE, "steps": VALUE}),
    ), (256, 512, 1024)),
}  # fmt: skip
"""By name: Tables 6 to 10. The scales are those of B.3. After SFT pure diffusion keeps EOS last (B.4)."""


def suite_named(name: str) -> Suite | Ablation:
    """A suite.

    Raises:
        UserError: there is no suite of this name.
    """
    known: dict[str, Suite | Ablation] = {**SUITES, **ABLATIONS}
    if name not in known:
        raise UserError(f"--suite '{name}' is not known; choose from {', '.join(known)}")
    return known[name]
