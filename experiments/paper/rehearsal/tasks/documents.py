"""Documents of the rehearsal's tasks: small questions of the same kinds as those of the paper's six tasks."""

from __future__ import annotations

import itertools
from typing import Any

from datasets import Dataset

Documents = dict[str, Dataset]

THINGS = ("cup", "door", "hat", "bird", "ship", "coat")
COLORS = ["red", "blue", "green", "black"]
HEAVY, LIGHT = ("stone", "iron", "truck", "whale"), ("leaf", "paper", "feather", "straw")
NUMERALS = "零一二三四五六七八九"


def _split(documents: list[dict[str, Any]], shots: int = 0) -> Documents:
    parts = {"shots": documents[:shots], "test": documents[shots:]}
    return {name: Dataset.from_list(part) for name, part in parts.items() if part}


def mmlu(**_: Any) -> Documents:
    """Sums with four choices, five of them for the prompt."""
    sums = [(a, b, (a * b) % 4) for a in range(1, 7) for b in range(1, 6)]
    return _split(
        [
            {"question": f"{a} + {b} =", "choices": [str(a + b + k - shift) for k in range(4)], "answer": shift}
            for a, b, shift in sums
        ],
        shots=5,
    )


def cmmlu(**_: Any) -> Documents:
    """Chinese numerals with four choices, five of them for the prompt."""
    numbers = [(n, shift) for n in range(1, 9) for shift in range(3)]
    return _split(
        [
            {"question": f"{n} 写作", "choices": [NUMERALS[(n + k - shift) % 10] for k in range(4)], "answer": shift}
            for n, shift in numbers
        ],
        shots=5,
    )


def arc_challenge(**_: Any) -> Documents:
    """Colors named in the question, without examples."""
    return _split([
        {"question": f"The {thing} is {color}. The color of the {thing} is", "choices": COLORS, "answer": n}
        for thing in THINGS for n, color in enumerate(COLORS)
    ])  # fmt: skip


def piqa(**_: Any) -> Documents:
    """Which of two things is heavy, without examples."""
    return _split([
        {"question": "A thing that is heavy is a", "choices": [heavy, light] if n % 2 else [light, heavy],
         "answer": 1 - n % 2}
        for n, (heavy, light) in enumerate(itertools.product(HEAVY, LIGHT))
    ])  # fmt: skip


def gsm8k(**_: Any) -> Documents:
    """Sums whose answer is written, four of them for the prompt."""
    pairs = [(a, b) for a in range(2, 6) for b in range(2, 6)]
    return _split([{"question": f"{a} plus {b}?", "answer": f"{a} + {b} #### {a + b}"} for a, b in pairs], shots=4)


def humaneval(**_: Any) -> Documents:
    """Functions whose body is written and then run."""
    return _split([
        {"prompt": f"def add{n}(x):\n    return x +", "test": f"assert add{n}(1) == {n + 1}"} for n in range(1, 9)
    ])  # fmt: skip
