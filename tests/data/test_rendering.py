"""Templates of strangers: what transformers allows them, and that they end within their limits."""

from __future__ import annotations

import os
import signal

import pytest

from llada_lightning.data import rendering
from llada_lightning.data.rendering import RenderingError, render
from llada_lightning.support.limited_process import LimitedProcess


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little time."""
    monkeypatch.setattr(rendering, "CPU_SECONDS", 0.3)


def outcome(template: str, **variables: object) -> str:
    """The text, or the error."""
    (found,) = render(template, [variables])
    return f"error: {found}" if isinstance(found, RenderingError) else found


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a{% generation %}{{ x }}{% endgeneration %}b", "a<é>b"),
        ("{% generation %}{% set y = 1 %}{% endgeneration %}{{ y }}", ""),  # a scope of its own, as in transformers
        ("{% for i in [1, 2] %}{% generation %}{{ i }}{{ loop.last }}{% endgeneration %}{% endfor %}", "1False2True"),
        ("{% if true %}\n  a\n{% endif %}\nb", "  a\nb"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'b': x, 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 2, 'a': 1} | tojson(false, none, [',', ':'], true) }}", '{"a":1,"b":2}'),
        ("{{ strftime_now('%%') }}{{ missing }}", "%"),
    ],
)
def test_a_template_is_rendered_as_transformers_renders_it(template: str, text: str) -> None:
    assert outcome(template, x="<é>") == text


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('no\n such') }}", "no such"),
        ("{% for %}", "Expected an expression"),
        ("{{ 'n: ' + 1 }}", 'TypeError: can only concatenate str (not "int") to str'),
        ("{% include 'x' %}", "TypeError: no loader for this environment specified"),
        ("{{ range(10**9) }}", "OverflowError: Range too big"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ 'a'.index('b') }}", "ValueError: substring not found"),
        ("{{ x.y.z }}", "'x' is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% break %}", "SyntaxError"),
        ("{{ '\\ud800' }}", "half of a surrogate pair"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 'a' * 10**10 }}", "it needs more than 1,024 MiB of memory"),
        ("{{ 'a' * 10**7 }}", "it writes 10,000,000 characters"),
    ],
)
def test_whatever_a_template_raises_is_one_line(template: str, error: str) -> None:
    said = outcome(template)
    assert said.startswith("error: ") and error in said and "\n" not in said


@pytest.mark.parametrize(
    "template",
    ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 10**(10**8) }}"],
)
def test_a_template_that_does_not_end_is_ended(template: str, hurried: None) -> None:
    with pytest.raises(RenderingError, match=r"it takes more than 0.3 seconds"):
        render(template, [{}])
    assert outcome("{{ x }}", x=1) == "1"


def test_a_template_nested_beyond_measure_is_refused() -> None:
    try:
        said = outcome("{{ " + "(" * 100_000)
    except RenderingError as error:
        said = f"error: {error}"
    assert said.startswith("error: ")
    assert outcome("{{ x }}", x=2) == "2"


def test_one_process_serves_all_renderings_and_another_takes_over_where_it_ended() -> None:
    render("a", [{}])
    first = rendering._process._process
    assert first is not None and render("b", [{}, {}]) == ["b", "b"] and rendering._process._process is first
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert render("c", [{}]) == ["c"]


def test_without_a_process_nothing_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_process", LimitedProcess(rendering.__name__))
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(RenderingError, match=r"no process can be started to render it \(No such file"):
        render("a", [{}])
