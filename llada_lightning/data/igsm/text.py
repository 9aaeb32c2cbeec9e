"""A problem in English: the question, and the solution step by step up to ``#### answer``."""

from __future__ import annotations

from llada_lightning.data.igsm.problem import MODULUS, Parameter, Problem, Step

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def name(parameter: Parameter) -> str:
    return f"{parameter.parent}'s {parameter.child}"


def question(problem: Problem) -> str:
    sentences = [f"The number of each {name(s.parameter)} equals {_stated(s)}." for s in _stated_steps(problem)]
    asked = problem.steps[-1].parameter
    return " ".join([*sentences, f"How many {asked.child} does {asked.parent} have?"])


def solution(problem: Problem) -> str:
    letters = {step.parameter: _LETTERS[i] for i, step in enumerate(problem.steps)}
    values = {step.parameter: step.value for step in problem.steps}
    lines = [_solved(step, letters, values) for step in problem.steps]
    return "\n".join([*lines, f"#### {problem.answer}"])


def _stated_steps(problem: Problem) -> list[Step]:
    return [problem.steps[i] for i in problem.stated]


def _stated(step: Step) -> str:
    if not step.terms:
        return str(step.constant or step.value)
    parts = [*([str(step.constant)] if step.constant else []), *(f"each {name(p)}" for p in step.terms)]
    whole = parts[0] if len(parts) == 1 else "the sum of " + " and ".join(parts)
    return whole if step.factor == 1 else f"{step.factor} times as much as {whole}"


def _solved(step: Step, letters: dict[Parameter, str], values: dict[Parameter, int]) -> str:
    letter = letters[step.parameter]
    head = f"Define {name(step.parameter)} as {letter}; so {letter} = "
    if not step.terms:
        return f"{head}{step.value}."
    constant = [str(step.constant)] if step.constant else []
    symbols = " + ".join([*constant, *(letters[p] for p in step.terms)])
    numbers = " + ".join([*constant, *(str(values[p]) for p in step.terms)])
    if step.factor != 1:
        symbols, numbers = f"{step.factor} * ({symbols})", f"{step.factor} * ({numbers})"
    assert 0 <= step.value < MODULUS
    worked = symbols if numbers == str(step.value) else f"{symbols} = {numbers}"  # of one term: b = a = 4
    return f"{head}{worked} = {step.value}."
