"""Programs that end well, badly, never, and those that reach for what is not theirs or for the verdict."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from llada_lightning.evaluation import sandbox
from llada_lightning.evaluation.sandbox import Limits, SandboxedCodeEval, is_isolated, pass_at, run_program

SHORT = Limits(seconds=1.5)
ADD = "def add(a, b):\n    return a + b\n"

isolated = pytest.mark.skipif(not is_isolated(), reason="this system gives users no namespaces")


@pytest.fixture(params=["namespaces", "a user's namespaces", "none"])
def each_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox as this system makes it for this user, as for one who is not root, and without namespaces."""
    if request.param == "none":
        monkeypatch.setattr(sandbox, "_isolation", tuple)
    elif request.param != "namespaces":
        if not is_isolated() or os.geteuid() != 0:
            pytest.skip("the same as the first, or this system gives users no namespaces")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        command = sandbox._isolation.__wrapped__()
        if not command:
            pytest.skip("this system gives users no namespaces")
        assert "--user" in command
        monkeypatch.setattr(sandbox, "_isolation", lambda: command)


def verdict(program: str, tests: str, limits: Limits = Limits()) -> str:  # noqa: B008 (immutable)
    return run_program(program, limits, tests).verdict


# --- right and wrong --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_kind")
def test_a_right_answer_passes_and_a_wrong_one_does_not() -> None:
    assert verdict(ADD, "assert add(2, 3) == 5") == "passed"
    wrong = run_program(ADD, tests="assert add(2, 3) == 6")
    assert wrong.verdict == "failed" and "AssertionError" in wrong.errors
    broken = run_program("def f(:", tests="pass")
    assert broken.verdict == "failed" and "SyntaxError" in broken.errors


def test_a_program_without_tests_passes_where_it_ends() -> None:
    assert run_program(ADD).verdict == "passed"
    failed = run_program("assert False, 'no'")
    assert failed.verdict == "failed" and "AssertionError: no" in failed.errors


HUMANEVAL = """
METADATA = {'author': 'x', 'dataset': 'test'}

def check(candidate):
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) is False
    assert all(candidate([n, n + 1.0], 2.0) for n in range(3))

check(close)
"""


def test_a_test_of_humaneval() -> None:
    program = """
from typing import List

def close(numbers: List[float], threshold: float) -> bool:
    pairs = [(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1:]]
    return any(abs(a - b) < threshold for a, b in pairs)
"""
    assert verdict(program, HUMANEVAL) == "passed"
    assert verdict(program.replace("<", ">"), HUMANEVAL) == "failed"


VALUES = [
    "-3", "True", "None", "2**200", "-(2**70)", "1.5", "float('inf')", "1 + 2j", "'a\\ud800\\n'", "b'\\xff'",
    "(1, (2,))", "[1, [2, ()]]", "{3, 'x'}", "frozenset({1})", "{'k': {(1, 2): [None]}}", "range(2, 9, 3)", "int", "[]",
    "",
    "__import__('decimal').Decimal('1.20')", "__import__('fractions').Fraction(1, 3)",
    "__import__('datetime').datetime(2020, 2, 29, 1)", "__import__('collections').OrderedDict(a=1)",
    "__import__('collections').Counter('aab')", "__import__('collections').namedtuple('P', 'x y')(1, 2)",
]  # fmt: skip


def test_values_come_back_as_they_were() -> None:
    program = "def same(x): return x\n" + "".join(
        f"def f{i}(): return {value or 'None'}\n" for i, value in enumerate(VALUES)
    )
    tests = "import math\nassert math.isnan(same(float('nan')))\n"
    for i, value in enumerate(VALUES):
        tests += f"x = {value or 'None'}\nassert f{i}() == x and same(x) == x, ({i}, f{i}(), x)\n"
        tests += f"assert type(same(x)) in type(x).__mro__, {i}\n"
    result = run_program(program, tests=tests)
    assert result.verdict == "passed", result.errors


def test_objects_iterators_exceptions_and_functions_work_across_the_processes() -> None:
    program = """
import math
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def __len__(self): return 2
    def __getitem__(self, key): return (self.a, self.b)[key]
    def __str__(self): return f"<{self.a}, {self.b}>"
class Own(Exception): pass
def smallest(pairs): return min(pair.a for pair in pairs)
def count(n): yield from range(n)
def apply(function, values): return [function(value) for value in values]
def fail(kind):
    if kind: raise kind("why")
    raise Own("mine")
def named(*, function, operation): return function, operation
"""
    tests = """
pair = Pair(3, 4)
pair.b = 5
assert (pair.a, pair.b, pair[0], len(pair), str(pair)) == (3, 5, 3, 2, "<3, 5>")
assert smallest([Pair(5, 24), Pair(2, 25)]) == 2
assert list(count(3)) == [0, 1, 2] and 2 in count(3) and next(count(1)) == 0
assert apply(lambda value: value + 1, map(abs, [-1, 2])) == [2, 3]
assert math.isclose(apply(math.sqrt, [2])[0] ** 2, 2)
assert named(function=1, operation=2) == (1, 2)
for kind in (ValueError, KeyError, UnicodeDecodeError):
    try:
        fail(kind)
    except kind as error:
        assert "why" in str(error)
    except TypeError:
        assert kind is UnicodeDecodeError
    else:
        assert False
try:
    fail(None)
except Exception as error:
    assert "mine" in str(error)
"""
    result = run_program(program, tests=tests)
    assert result.verdict == "passed", result.errors


def test_an_object_of_the_program_can_be_copied() -> None:
    program = "class Pair:\n    def __init__(self): self.a = 3\n\ndef pair(): return Pair()\n"
    tests = "import copy\nfound = pair()\nassert copy.copy(found).a == found.a == 3"
    result = run_program(program, tests=tests)
    assert result.verdict == "passed", result.errors


def test_a_function_may_have_the_name_of_one_that_is_built_in() -> None:
    """As of MBPP's task 126."""
    assert verdict("def sum(a, b): return 6", "assert sum(10, 15) == 6\nassert sum(1, 2) == 6") == "passed"


# --- the verdict ------------------------------------------------------------------------------------------------------

FORGERIES = {
    "leaves with 0": "import os; os._exit(0)",
    "exits": "import sys; sys.exit(0)",
    "raises SystemExit": "raise SystemExit",
    "leaves when called": "import os\ndef f(x): os._exit(0)",
    "exits when called": "def f(x): raise SystemExit(0)",
    "leaves at its end": "import atexit, os; atexit.register(os._exit, 0)",
    "equals everything": "class A:\n    __eq__ = lambda *a: True\n    __hash__ = None\n    __ne__ = lambda *a: False\n"
    "def f(x): return A()",
    "an int that equals everything": "class A(int):\n    __eq__ = lambda *a: True\n    __hash__ = int.__hash__\n"
    "def f(x): return A(7)",
    "built-ins patched": "import builtins\nbuiltins.AssertionError = ValueError\n"
    "builtins.abs = lambda x: 0\nbuiltins.all = lambda x: True\ndef f(x): return 7",
    "built-ins hidden": "def abs(x): return 0\ndef all(x): return True\ndef check(f): pass\ndef f(x): return 7",
    "a module of its own": "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 7",
    "another module under its name": "import unittest.mock as math\ndef f(x): return 7",
    "says that it passed": 'import os\nfor n in range(20):\n    try: os.write(n, b\'{"passed": true, "errors": ""}\')\n'
    "    except OSError: pass\nos._exit(0)",
    "reads the order": "import sys, os\nmain = sys.modules['__main__']\norder = vars(main).get('order')\n"
    "os.write(vars(main).get('said', 1), str((order or {}).get('word')).encode())\nos._exit(0)",
    "answers before it is asked": "import json, os, struct\n"
    "one = json.dumps(['result', True]).encode()\n"
    "for n in range(20):\n    try: os.write(n, (struct.pack('>I', len(one)) + one) * 99)\n    except OSError: pass\n"
    "os._exit(0)",
    "makes a class there": """
import gc
def f(x):
    peer = next(each for each in gc.get_objects() if type(each).__name__ == "Peer")
    kind = peer.ask("call", type, "A", (object,), {"__eq__": lambda other: True})
    return peer.ask("call", kind)
""",
    "raises what ends an iteration": "def f(x): raise StopIteration",
    "looks for the tests": "import gc, sys\nfound = [o for o in gc.get_objects() if type(o) is dict and 'tests' in o]\n"
    "frame = sys._getframe()\nwhile frame.f_back: frame = frame.f_back; frame.f_globals['__name__']\n"
    "assert not found\ndef f(x): return 7",
}


@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES.keys())
def test_no_program_says_that_it_has_passed(program: str) -> None:
    tests = "import math\ndef check(g):\n    y = g(1)\n"
    tests += "    assert abs(y - 2.5) < 1e-6 and all([y == 2.5]) and math.isclose(y, 2.5)\ncheck(f)"
    assert verdict(program, "assert f(1) == 2.5") == "failed"
    assert verdict(program, tests) == "failed"
    assert verdict(program, "assert all(map(f, [1])) and f(1) == 2.5 or list(map(f, [1])) == []") == "failed"


@pytest.mark.parametrize("leave", ["import os; os._exit(0)", "raise SystemExit", "raise KeyboardInterrupt"])
def test_no_test_of_an_exception_takes_leaving_for_one(leave: str) -> None:
    tests = "try:\n    f()\n    assert False\nexcept Exception:\n    pass"
    assert verdict(f"def f(): {leave}", tests) == "failed"
    assert verdict("def f(): raise ValueError", tests) == "passed"


def test_only_the_tests_of_a_module_that_is_theirs_decide() -> None:
    """A program that a test needs `math` of may import it, and cannot make it say what it likes."""
    honest = "import math\ndef f(x): return 2.5"
    assert verdict(honest, "assert math.isclose(f(1), 2.5)") == "passed"
    for own in ("class math:\n    isclose = staticmethod(lambda *a, **k: True)\n", "import unittest.mock as math\n"):
        assert verdict(own + "def f(x): return 7", "assert math.isclose(f(1), 2.5)") == "failed"


# --- time and memory --------------------------------------------------------------------------------------------------


def test_an_endless_loop_is_ended() -> None:
    assert verdict("while True: pass", "", SHORT) == "timed out"
    assert verdict("def f():\n    while True: pass", "f()", SHORT) == "timed out"
    slow_clock = Limits(seconds=30.0, cpu_seconds=1)
    assert verdict("while True: pass", "", slow_clock) == "failed"


@pytest.mark.usefixtures("each_kind")
def test_memory_is_limited() -> None:
    result = run_program("x = bytearray(2**31)")
    assert result.verdict == "failed" and "MemoryError" in result.errors
    assert verdict("def f(): return 'x' * 2**26", "f()") == "failed"
    nested = "def f():\n    x = []\n    for _ in range(10**6): x = [x]\n    return x"
    assert verdict(nested, "f()") == "failed"


LEFTOVERS = {
    "links": "for n in ('errors', 'said'):\n    if os.path.exists(n): os.remove(n)\n    os.symlink('/dev/zero', n)",
    "pipes": "for n in ('errors', 'said'):\n    if os.path.exists(n): os.remove(n)\n    os.mkfifo(n)",
    "a sparse file": "open('errors', 'wb').truncate(2**20)",
    "deep folders": "for _ in range(3000): os.mkdir('d'); os.chdir('d')",
    "a folder without rights": "os.mkdir('d'); open('d/x', 'w'); os.chmod('d', 0)",
    "much said": "for n in (1, 2):\n    for _ in range(100): os.write(n, b'x' * 2**20)",
}


@isolated
@pytest.mark.parametrize("leave", LEFTOVERS.values(), ids=LEFTOVERS.keys())
def test_nothing_that_it_leaves_behind_is_read(leave: str) -> None:
    began = time.monotonic()
    assert verdict(f"import os\ndef f(): return 1\n{leave}", "assert f() == 1") == "passed"
    assert time.monotonic() - began < Limits().seconds


@isolated
def test_its_folder_is_small_empty_and_vanishes() -> None:
    look = "import os; assert os.listdir('.') == [], os.listdir('.'); open('mine', 'w').write('x')"
    assert run_program(look).verdict == "passed"
    assert run_program(look).verdict == "passed"  # nothing is left of the first
    assert run_program("open('big', 'wb').write(bytes(2**21))").verdict == "failed"
    full = "for n in range(100): open(str(n), 'wb').write(bytes(2**20))"
    result = run_program(full)
    assert result.verdict == "failed" and "No space left" in result.errors


@isolated
@pytest.mark.usefixtures("each_kind")
def test_what_it_started_ends_with_it() -> None:
    """Also where it leaves its group and wants to outlive who started it; the pipe that it holds open tells."""
    if not sandbox._isolation():
        pytest.skip("not held without namespaces")
    reading, writing = os.pipe()
    program = """
import ctypes, os, time
ctypes.CDLL(None).prctl(1, 0)
os.setsid()
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
def f(): return 1
"""
    start = sandbox._start

    def start_with_pipe(*arguments, **streams):  # type: ignore[no-untyped-def]
        return start(*arguments, **{**streams, "pass_fds": (*streams.get("pass_fds", ()), writing)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "_start", start_with_pipe)
        assert verdict(program, "assert f() == 1") == "passed"
        assert verdict(program + "while True: pass", "", SHORT) == "timed out"
    os.close(writing)
    assert os.read(reading, 1) == b""  # comes back when nobody holds the other end
    os.close(reading)


@isolated
def test_its_processes_are_limited() -> None:
    program = "import os, time\nfor _ in range(200):\n    if os.fork() == 0: time.sleep(60)"
    result = run_program(program)
    assert result.verdict == "failed" and "BlockingIOError" in result.errors


# --- what is not its own ----------------------------------------------------------------------------------------------


@isolated
@pytest.mark.usefixtures("each_kind")
def test_it_cannot_reach_the_users_files(tmp_path: Path) -> None:
    if not sandbox._isolation():
        pytest.skip("not held without namespaces")
    tmp_path.chmod(0o777)
    mine = tmp_path / "mine"
    mine.write_text("before")
    mine.chmod(0o666)
    tried = "\n".join(
        f"try:\n    {each}\nexcept OSError: pass\nelse: found.append({each!r})"
        for each in (
            f"open({str(mine)!r}, 'w')", f"open({str(mine)!r}, 'a')", f"os.remove({str(mine)!r})",
            f"open({str(mine)!r})", f"os.mkdir({str(tmp_path / 'd')!r})", "open('/usr/x', 'w')", "open('/x', 'w')",
            "open('/etc/hostname', 'a')",
            "os.listdir('/proc/1')", "os.listdir('/home')", "os.setuid(1)", "os.chroot('..')",
        )
    )  # fmt: skip
    program = f"""
import ctypes, os, sys
found = []
libc = ctypes.CDLL(None, use_errno=True)
for name, call in (
    ("remount", lambda: libc.mount(None, b"/", None, ctypes.c_ulong(32 | 4096), None)),
    ("writable", lambda: libc.syscall(442, -100, b"/", 0x8000, bytes(8) + (1).to_bytes(8, "little") + bytes(16), 32)),
    ("umount", lambda: libc.umount2(b"/", 2)),
    ("user namespace", lambda: libc.unshare(0x10000000)),
    ("attach", lambda: libc.ptrace(16, os.getppid(), 0, 0)),
):
    if call() == 0: found.append(name)
{tried}
def reached(): return found
"""
    result = run_program(program, tests="assert reached() == [], reached()")
    assert result.verdict == "passed", result.errors
    assert mine.read_text() == "before" and list(tmp_path.iterdir()) == [mine]


def test_without_namespaces_it_writes_nothing_and_the_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "_isolation", tuple)
    mine = tmp_path / "mine"
    mine.write_text("before")
    result = run_program(f"with open({str(mine)!r}, 'a') as file: file.write('x')")
    assert result.verdict == "failed" and "File too large" in result.errors
    assert mine.read_text() == "before"
    sandbox.say_what_is_not_held.cache_clear()
    sandbox.say_what_is_not_held()
    sandbox.say_what_is_not_held()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "forge a verdict; use a container" in said
    sandbox.say_what_is_not_held.cache_clear()
    monkeypatch.setattr(sandbox, "_isolation", lambda: ("unshare",))
    sandbox.say_what_is_not_held()
    assert capsys.readouterr().err == ""
    sandbox.say_what_is_not_held.cache_clear()


@pytest.mark.usefixtures("each_kind")
def test_it_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    program = "import os\ndef seen(): return sorted(os.environ)"
    result = run_program(program, tests="assert not {'WANDB_API_KEY'} & set(seen()) and 'HOME' in seen()")
    assert result.verdict == "passed", result.errors


@isolated
def test_there_is_no_network() -> None:
    program = "import socket\ndef names(): return [name for _, name in socket.if_nameindex()]"
    assert verdict(program, "assert set(names()) <= {'lo'}, names()") == "passed"


def test_pass_at_k_over_problems() -> None:
    right, wrong = "def f(): return 1", "def f(): return 2"
    scores, verdicts = SandboxedCodeEval().compute(
        ["assert f() == 1", "assert f() == 1"], [[right, wrong], [wrong, wrong]], k=[1, 2, 4]
    )
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert verdicts == {0: ["passed", "failed"], 1: ["failed", "failed"]}
    assert pass_at(1, 10, 3) == pytest.approx(0.3)
