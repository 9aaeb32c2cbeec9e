"""Programs that end well, badly, never, and those that reach for what is not theirs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llada_lightning.evaluation.code_metric import SandboxedCodeEval, pass_at
from llada_lightning.evaluation.sandbox import Limits, is_isolated, run_program

SHORT = Limits(seconds=1.0)


def test_a_right_answer_passes_and_a_wrong_one_does_not() -> None:
    add = "def add(a, b):\n    return a + b\n"
    assert run_program(add + "assert add(2, 3) == 5").verdict == "passed"
    wrong = run_program(add + "assert add(2, 3) == 6")
    assert wrong.verdict == "failed" and "AssertionError" in wrong.errors
    assert run_program("def f(:").verdict == "failed"


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_before_the_tests_is_no_pass(leave: str) -> None:
    assert run_program(f"{leave}\nassert False").verdict == "failed"


def test_an_endless_loop_is_ended() -> None:
    assert run_program("while True: pass", SHORT).verdict == "timed out"
    slow_clock = Limits(seconds=30.0, cpu_seconds=1)
    assert run_program("while True: pass", slow_clock).verdict == "failed"


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    program = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    while True:
        open({str(lives)!r}, "a").write(".")
        time.sleep(0.01)
while not os.path.exists({str(lives)!r}):
    time.sleep(0.01)
"""
    if not is_isolated():
        pytest.skip("this system gives users no namespaces")
    assert run_program(program, Limits(seconds=20.0)).verdict == "passed"
    size = lives.stat().st_size
    assert size > 0
    run_program("pass")  # as long as many of its rounds
    assert lives.stat().st_size == size


def test_memory_is_limited() -> None:
    result = run_program("x = bytearray(2**31)")
    assert result.verdict == "failed" and "MemoryError" in result.errors


def test_it_works_in_an_empty_folder_that_vanishes_and_files_are_limited() -> None:
    look = "import os; assert os.listdir('.') == ['errors'], os.listdir('.'); open('mine', 'w').write('x')"
    assert run_program(look).verdict == "passed"
    assert run_program(look).verdict == "passed"  # nothing is left of the first
    assert run_program("open('big', 'wb').write(bytes(2**21))").verdict == "failed"


def test_it_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    program = "import os; assert 'WANDB_API_KEY' not in os.environ; assert os.environ['HOME'] == os.getcwd()"
    assert run_program(program).verdict == "passed"
    assert os.environ["WANDB_API_KEY"] == "secret"


def test_there_is_no_network() -> None:
    if not is_isolated():
        pytest.skip("this system gives users no namespaces")
    names = "import socket; names = [name for _, name in socket.if_nameindex()]; assert set(names) <= {'lo'}, names"
    assert run_program(names).verdict == "passed"


def test_what_it_writes_to_its_stdout_is_no_pass() -> None:
    assert run_program("print('x' * 100_000); raise ValueError").verdict == "failed"


def test_pass_at_k_over_problems() -> None:
    right, wrong = "def f(): return 1", "def f(): return 2"
    scores, verdicts = SandboxedCodeEval().compute(
        ["assert f() == 1", "assert f() == 1"], [[right, wrong], [wrong, wrong]], k=[1, 2, 4]
    )
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert verdicts == {0: ["passed", "failed"], 1: ["failed", "failed"]}
    assert pass_at(1, 10, 3) == pytest.approx(0.3)
