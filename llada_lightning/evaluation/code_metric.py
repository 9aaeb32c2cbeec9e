"""pass@k of programs, in the sandbox: takes the place of the metric that runs them within this process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llada_lightning.evaluation.sandbox import Limits, Verdict, run_program, say_what_is_not_held


class SandboxedCodeEval:
    """What `evaluate.load("code_eval")` gives to lm-evaluation-harness, with every program in a sandbox."""

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008  (immutable)
        self.limits = limits

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1,),
        **_: object,
    ) -> tuple[dict[str, float], dict[int, list[Verdict]]]:
        """The mean of pass@k over problems.

        Args:
            references: tests of each problem.
            predictions: candidates of each problem.
            k: of pass@k; those above the number of candidates are left out.

        Returns:
            ``pass@k`` for each k, and the verdicts of each problem.
        """
        verdicts = [
            [run_program(candidate, self.limits, tests).verdict for candidate in candidates]
            for tests, candidates in zip(references, predictions, strict=True)
        ]
        passed = [verdict.count("passed") for verdict in verdicts]
        fewest = min((len(verdict) for verdict in verdicts), default=0)
        scores = {
            f"pass@{n}": sum(pass_at(n, len(v), p) for v, p in zip(verdicts, passed, strict=True)) / len(verdicts)
            for n in k
            if n <= fewest
        }
        return scores, dict(enumerate(verdicts))


def pass_at(k: int, samples: int, passed: int) -> float:
    """The chance that one of k candidates, of the samples at random, passes: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


@contextmanager
def sandboxed_code_eval() -> Iterator[None]:
    """Tasks that load the metric `code_eval` within the block get the sandboxed one; says what that does not hold."""
    import evaluate

    say_what_is_not_held()
    original = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return SandboxedCodeEval() if path == "code_eval" else original(path, *arguments, **options)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original
