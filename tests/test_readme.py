"""Every command of the README and of the documents is run here, or is a target of the Makefile that CI runs."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import llada_lightning
from helpers.tuning_studies import Bowl, finish_tuning_runs
from llada_lightning.commands import VERBS
from llada_lightning.commands.main import main
from llada_lightning.study.results import read_results
from llada_lightning.study.sweep import SHIPPED

ROOT = Path(__file__).parents[1]
PACKAGE = Path(llada_lightning.__file__).parent
TUNED = {
    "arm": Bowl(lr=9.5e-3, lr_exponent=-0.1, batch=400, batch_exponent=0.2),
    "llada": Bowl(lr=3e-3, lr_exponent=-0.12, batch=900, batch_exponent=0.2, loss=5.0),
}
"""The losses of the tuning study of study-howto.md, whose runs are not trained here."""
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOUR = ("corpus", "training", "variants", "runs", "sft", "evaluation", "sampling", "serving", "python")
"""The documents that follow one another: what one makes the next ones use."""


def document(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    return [line for block in blocks(text, "bash") for line in block.strip().splitlines()]


def recipe(target: str) -> list[str]:
    """The commands that `make TARGET` would run."""
    shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return shown.splitlines()


def run_llada(line: str) -> int:
    return main(shlex.split(line.split("-m llada_lightning", 1)[-1].removeprefix("llada")))


def run_document(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Run the commands of a document, then its Python; returns what each printed."""
    printed = {}
    monkeypatch.setattr("sys.stdin", io.StringIO("def read(\n/exit\n"))  # what `llada chat` reads
    for line in commands(document(name)):
        assert run_llada(line) == 0, capsys.readouterr().err
        printed[line] = capsys.readouterr().out
    for block in blocks(document(name), "python"):
        exec(compile(block, f"{name}.md", "exec"), {})
        printed[block] = capsys.readouterr().out
    return printed


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from where the paths of the documents lead to this checkout's files."""
    for name in ("experiments", "sweeps"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what the README says of the code --------------------------------------------------------------------------------


def test_the_readme_is_short_and_its_commands_are_those_of_the_makefile() -> None:
    assert len(README.splitlines()) < 200
    assert commands(README) == ["make quickstart", "make test"]
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] in commands(README)


def test_the_readme_has_the_table_of_verbs() -> None:
    rows = re.findall(r"^\| `([a-z]+)` \| (.+) \|$", README.partition("## What a number means")[0], re.MULTILINE)
    assert rows == [(verb.name, verb.help) for verb in VERBS]


def test_the_readmes_file_tree_is_the_package() -> None:
    lines = re.findall(r"^(│? *)[├└]── (\S+?)/? +\S", README, re.MULTILINE)
    top = [name for indent, name in lines if not indent]
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(top) == sorted(folders | {path.name for path in PACKAGE.glob("*.py") if path.name[0] != "_"})
    below = {name for indent, name in lines if indent}
    assert below == {path.parent.name for path in (PACKAGE / "study").glob("*/__init__.py")}


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_the_modules_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.py)(?:::\w+)?`", text):
        if "/" in name:
            assert (PACKAGE / name).exists() or (ROOT / name).exists(), name


def test_every_command_of_the_documents_is_run() -> None:
    with_commands = {path.stem for path in (ROOT / "docs").glob("*.md") if blocks(path.read_text(), "bash")}
    assert with_commands <= {*TOUR, "study-howto", "speed", "extending"}  # the last: tests/test_extending.py
    shown = {line.split()[1] for name in (*TOUR, "study-howto") for line in commands(document(name))}
    assert shown | {"test", "predict", "launch"} == {verb.name for verb in VERBS}


# --- the commands ----------------------------------------------------------------------------------------------------


def test_the_tour_from_a_corpus_to_text(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documents from corpus.md to python.md, in one folder, and the settings that speed.md shows."""
    printed = {name: run_document(name, capsys, monkeypatch) for name in TOUR}
    tour = checkout / "runs" / "tour"
    table = read_results(tour / "results.csv")
    assert dict(table[["objective", "val_kind"]].to_numpy()) == {"arm": "exact", "llada": "bound"}
    assert (tour / "scaling.png").stat().st_size > 10_000
    assert (tour / "fits.json").exists()
    assert "<html" in (tour / "read.html").read_text()
    assert "tokens/s" in (tour / "profiled" / "profile" / "summary.md").read_text()
    checkpoint, trained, record, results = list(printed["python"].values())
    assert len(checkpoint.splitlines()) == 3
    assert trained.splitlines()[-1] == "llada"
    assert record.split()[-1] == "bound"
    assert len(results.splitlines()) == 3

    shutil.copy(tour / "llada" / "config.yaml", "run.yaml")
    for line in commands(document("speed")):  # many devices: only resolved here
        if line.startswith("llada fit"):
            assert run_llada(f"{line} --print_config") == 0, capsys.readouterr().err
        else:
            assert line.startswith(("make bench", "llada plan")), line


@pytest.mark.slow
def test_the_study_by_hand(checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_llada(commands(document("corpus"))[0]) == 0
    (tuning,) = (line for line in commands(document("study-howto")) if "--tune " in line)
    assert run_llada(tuning) == 0
    assert finish_tuning_runs("runs/tune.yaml", TUNED) == 72  # in place of the training, which takes minutes
    capsys.readouterr()
    printed = run_document("study-howto", capsys, monkeypatch)
    assert "72 done before" in next(out for line, out in printed.items() if "sweep run runs/tune.yaml" in line)
    rules = next(out for line, out in printed.items() if "--rules" in line)
    assert "‡" not in rules and "llada: batch = " in rules
    assert "6 runs: 6 done" in next(out for line, out in printed.items() if "sweep show" in line)
    table = read_results(checkout / "runs" / "small" / "results.csv")
    added = [out for line, out in printed.items() if "--append" in line]
    assert "added: runs 6 to 11 " in added[0]
    assert re.search(r"added: runs 12 to 1[2-7] ", added[1])  # the trunks of a few cheap points
    scored = next(out for line, out in printed.items() if "--forecast" in line)
    assert "Forecasts of the best loss" in scored and "not run" not in scored
    assert len(table) == 24 and table.run.is_unique
    assert dict(table[["objective", "val_kind"]].drop_duplicates().to_numpy()) == {"arm": "exact", "llada": "bound"}
    for study in ("small", "published"):
        assert (checkout / "runs" / study / "scaling.png").stat().st_size > 10_000
        assert (checkout / "runs" / study / "fits.json").exists()
    assert (checkout / "runs" / "published" / "multiplier.png").exists()


@pytest.mark.slow
def test_the_quickstart_in_small(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its commands as the Makefile has them, with one shape and seed in the sweep file, and less of `llada`."""
    steps = [line for line in recipe("quickstart") if "-m llada_lightning" in line]
    assert [line.split("llada_lightning ")[1].split()[0] for line in steps] == [
        "prepare", "sweep", "collect", "curves", "report",
    ]  # fmt: skip
    sweep = yaml.safe_load(SHIPPED["quickstart"].read_text())
    configs = [yaml.safe_load(text) for text in sweep["parameters"]["config"]["values"]]
    configs = [one for one in configs if "d32" in one["model"]["init_args"]["shape"] and one["seed_everything"] == 0]
    for one in configs:
        if one["model"]["class_path"] == "LladaModule":
            one["budget"]["flops"] = [flops / 10 for flops in one["budget"]["flops"]]
    sweep["parameters"]["config"] = {"values": [json.dumps(one) for one in configs]}
    sweep["parameters"]["data.init_args.val_sequences"] = {"value": 64}
    (checkout / "quickstart").write_text(yaml.safe_dump(sweep, sort_keys=False))  # comes before the package's
    for line in steps:
        assert run_llada(line) == 0, capsys.readouterr().err
    for file in ("scaling.png", "report.html", "report.md"):
        assert (checkout / "runs" / "quickstart" / file).exists()
    table = read_results(checkout / "runs" / "quickstart" / "results.csv")
    assert table.groupby("objective").size().to_dict() == {"arm": 5, "llada": 6}
    assert table["variant"].nunique(dropna=False) == 2  # the default recipe, which is a missing value, and another one
    capsys.readouterr()
    assert run_llada(steps[1]) == 0
    assert "3 done before" in capsys.readouterr().out
