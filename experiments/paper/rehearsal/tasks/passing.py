"""How the rehearsal's code is judged, as lm-evaluation-harness judges HumanEval."""

from __future__ import annotations

from typing import Any

import evaluate

code_eval = evaluate.load("code_eval")  # when the task is read: `llada evaluate` gives the one in a sandbox


def build_predictions(responses: list[list[str]], documents: list[dict[str, Any]]) -> list[list[str]]:
    """Whole functions of what the model wrote."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(responses, documents, strict=True)]


def pass_at_k(references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
    """The share of functions that pass their test, run in the sandbox."""
    return code_eval.compute(references=references, predictions=predictions, k=k)[0]
