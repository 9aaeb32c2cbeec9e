"""What `make setup` installs, and by what, with stand-ins for Python and uv that write down how they are called."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
(TORCH,) = re.findall(r'^  "(torch>=.+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
PYTHON = """#!/bin/sh
echo "python $*" >> "$CALLS"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"config list"*) echo "$SETTINGS" ;;
esac
"""
UV = """#!/bin/sh
echo "uv $*" >> "$CALLS"
exit "$UV_EXIT"
"""


def make(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("UV", "MAKEFLAGS", "TORCH_BACKEND")}
    environment = kept | {"CALLS": str(folder / "calls"), **variables}
    asked = ["make", *words, f"VENV={folder / 'venv'}"]
    return subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)


def installed(folder: Path, target: str, settings: str = "", uv_exit: int = 0, *words: str) -> list[str]:
    """Who installed what, such as "uv torch>=2": the calls that `make TARGET` made, in order."""
    for name, script in (("python", PYTHON), ("uv", UV)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    words = (target, f"PYTHON={folder / 'python'}", *(words or (f"UV={folder / 'uv'}",)))
    done = make(folder, *words, SETTINGS=settings, UV_EXIT=str(uv_exit))
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in (folder / "calls").read_text().splitlines()]
    return [f"{call[0].replace('python', 'pip')} {call[-1]}" for call in calls if "install" in call]


@pytest.mark.parametrize(
    ("settings", "uv_exit", "expected"),
    [
        ("", 0, [f"uv {TORCH}", f"pip {TORCH}", "uv ."]),
        ("global.find-links='/wheels'\nglobal.extra-index-url='file:///wheels'", 0, [f"pip {TORCH}", "uv ."]),
        (":env:.index-url='file:///mirror'", 0, [f"pip {TORCH}", "pip ."]),
        ("global.no-index='true'", 0, [f"pip {TORCH}", "pip ."]),
        ("", 2, [f"uv {TORCH}", f"pip {TORCH}", "uv .", "pip ."]),
    ],
    ids=["nothing set", "wheels of this machine", "another index", "no index", "uv fails"],
)
def test_pips_settings_decide_between_uv_and_pip(
    tmp_path: Path, settings: str, uv_exit: int, expected: list[str]
) -> None:
    assert installed(tmp_path, "setup", settings, uv_exit) == expected
    calls = (tmp_path / "calls").read_text()
    assert ("--torch-backend auto" in calls) == (f"uv {TORCH}" in expected)


def test_pip_brings_uv_unless_it_is_refused(tmp_path: Path) -> None:
    absent = f"UV={tmp_path / 'venv' / 'bin' / 'uv'}"
    assert installed(tmp_path, "setup", "", 0, absent) == ["pip uv", f"pip {TORCH}", "pip ."]
    (tmp_path / "calls").unlink()
    (tmp_path / "venv" / ".ready").unlink()
    assert installed(tmp_path, "setup", "", 0, "UV=false") == [f"pip {TORCH}", "pip ."]


def test_the_tests_add_to_the_environment_of_the_main_job(tmp_path: Path) -> None:
    assert installed(tmp_path, "setup-dev")[-2:] == ["uv .", "uv .[dev]"]
    (tmp_path / "calls").write_text("")
    assert installed(tmp_path, "setup-dev") == []  # nothing is installed twice


def test_the_site_adds_its_own_packages_and_fails_at_a_warning(tmp_path: Path) -> None:
    assert installed(tmp_path, "docs")[-2:] == ["uv .", "uv .[docs]"]
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "python -m mkdocs build --strict"


def test_the_quickstart_and_the_studies_need_no_tools_of_development(tmp_path: Path) -> None:
    def needs(target: str) -> bool:
        return ".[dev]" in make(tmp_path, "-n", target).stdout

    assert not any(map(needs, ("quickstart", "study-cpu", "study-gpu", "study-report")))
    assert all(map(needs, ("test", "test-slow", "lint", "format", "notebooks", "bench", "paper-rehearsal")))


def test_an_old_python_is_one_line(tmp_path: Path, old_python: dict[str, str]) -> None:
    done = make(tmp_path, "setup", f"PYTHON={sys.executable}", **old_python)
    error, of_make = done.stderr.strip().splitlines()
    assert error == f"error: {sys.executable} is older than Python 3.10; name another one: make PYTHON=python3.11"
    assert "Error 1" in of_make and not (tmp_path / "venv").exists()


def test_help_lists_each_target_once_with_no_variable_left(tmp_path: Path) -> None:
    done = make(tmp_path, "help", TABLES="tables/here")
    assert done.returncode == 0 and "$" not in done.stdout
    named = re.findall(r"^  make ([a-z0-9-]+) +\S", done.stdout, re.MULTILINE)
    [listed] = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(listed.split())
    assert done.stdout.count(": tables/here/report.md") == 2
