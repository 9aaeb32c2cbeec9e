"""Every command of the README is run here, or is a target of the Makefile that CI or the quickstart's test runs."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from llada_lightning.commands.main import main
from llada_lightning.study.results import read_results

ROOT = Path(__file__).parents[1]
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.strip().splitlines()
]
PYTHON = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))


def recipe(target: str) -> list[str]:
    """The commands that `make TARGET` would run."""
    shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return shown.splitlines()


def run_llada(line: str) -> int:
    return main(shlex.split(line.split("-m llada_lightning", 1)[-1].removeprefix("llada")))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from where README's paths lead to this checkout's files."""
    for name in ("experiments", "sweeps"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_known_to_these_tests() -> None:
    assert {line.split()[0] for line in COMMANDS} == {"make", "llada"}
    assert [line for line in COMMANDS if line.startswith("make")] == ["make quickstart", "make test"]


def test_ci_runs_the_readmes_test_command() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] in COMMANDS


def test_the_tour_by_hand(checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `llada` command in README's order: two runs by hand, a planned study, the published one."""
    tour = [line for line in COMMANDS if line.startswith("llada")]
    assert [line.split()[1] for line in tour] == [
        "prepare", "fit", "fit", "validate", "collect", "curves", "fit", "prepare", "replay",
        "generate", "generate", "generate", "generate", "chat",
        "score", "score", "score", "convert", "convert", "generate",
        "fit", "evaluate", "evaluate", "prepare", "evaluate", "evaluate", "prepare",
        "plan", "sweep", "sweep", "collect", "curves", "curves", "fit",
    ]  # fmt: skip
    said = {}
    monkeypatch.setattr("sys.stdin", io.StringIO("def read(\n/exit\n"))  # what `llada chat` reads
    for line in tour:
        assert run_llada(line) == 0, capsys.readouterr().err
        said[line] = capsys.readouterr().out
    assert "6 runs: 6 done" in next(out for line, out in said.items() if "sweep show" in line)
    runs = checkout / "runs"
    for study, rows in {"tour": 2, "small": 18}.items():
        table = read_results(runs / study / "results.csv")
        assert len(table) == rows
        assert dict(table[["objective", "val_kind"]].drop_duplicates().to_numpy()) == {"arm": "exact", "llada": "bound"}
    for study in ("tour", "small", "published"):
        assert (runs / study / "scaling.png").stat().st_size > 10_000
        assert (runs / study / "fits.json").exists()
    assert (runs / "published" / "multiplier.png").exists()
    assert "<html" in (runs / "tour" / "read.html").read_text()
    assert "tokens/s" in (runs / "tour" / "profiled" / "profile" / "summary.md").read_text()
    exec(compile(PYTHON, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_quickstart_in_small(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its four commands as they stand in the Makefile, with smaller budgets and one shape in the sweep file."""
    commands = [line for line in recipe("quickstart") if "-m llada_lightning" in line]
    assert [line.split("llada_lightning ")[1].split()[0] for line in commands] == [
        "prepare", "sweep", "collect", "curves",
    ]  # fmt: skip
    sweep = yaml.safe_load((ROOT / "sweeps" / "quickstart.yaml").read_text())
    sweep["parameters"]["budget.flops"] = {"values": [2e9, 6e9, 2e10]}
    sweep["parameters"]["model.init_args.shape"] = {"value": "107k"}
    sweep["parameters"]["data.init_args.val_sequences"] = {"value": 64}
    (checkout / "sweeps").unlink()
    (checkout / "sweeps").mkdir()
    (checkout / "sweeps" / "quickstart.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    for line in commands:
        assert run_llada(line) == 0, capsys.readouterr().err
    assert (checkout / "runs" / "quickstart" / "scaling.png").exists()
    table = read_results(checkout / "runs" / "quickstart" / "results.csv")
    assert len(table) == 6
    capsys.readouterr()
    assert run_llada(commands[1]) == 0
    assert "6 done before" in capsys.readouterr().out
