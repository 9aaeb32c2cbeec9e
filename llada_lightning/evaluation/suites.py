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
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llada_lightning.support.errors import UserError

Sampling = dict[str, Any]
"""Keyword arguments of ``generate``; `length` and `steps` count tokens and steps of an answer."""


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
    """

    name: str
    task: str
    metric: str | None = None
    shots: int | None = None
    sampling: Sampling = field(default_factory=dict)
    infill: bool = False


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


def _instruct(length: int, zero_eos: bool = False) -> Sampling:
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


def suite_named(name: str) -> Suite:
    """A suite.

    Raises:
        UserError: there is no suite of this name.
    """
    if name not in SUITES:
        raise UserError(f"--suite '{name}' is not known; choose from {', '.join(SUITES)}")
    return SUITES[name]
