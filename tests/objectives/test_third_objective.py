"""A third objective from one file goes through every command; nothing else of the package names an objective."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import llada_lightning
from llada_lightning.commands.main import main
from llada_lightning.objectives import OBJECTIVES, get_objective
from llada_lightning.objectives.batches import ValidationBatch
from llada_lightning.training.modules import ArmModule, LladaModule

HERE = Path(__file__).parent
PACKAGE = Path(llada_lightning.__file__).parent
TOY = "toy_objective"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment that makes `toy` known; afterwards it is unknown again."""
    monkeypatch.setenv("LLADA_PLUGINS", TOY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(PACKAGE.parent)]))
    monkeypatch.syspath_prepend(HERE)
    yield
    OBJECTIVES.pop("toy", None)
    sys.modules.pop(TOY, None)


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command prints with `--json`."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_file_goes_through_every_command(
    plugin: None, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = {
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
        "data": {"class_path": "TokenDataModule", "init_args": {"val_sequences": 8, "workers": 0}},
    }
    Path("base.yaml").write_text(yaml.safe_dump(base))
    shapes = [f"L1-d{width}-h2-kv1-ff{2 * width}" for width in (8, 16, 32)]
    plan = as_json(
        capsys, "plan", "--objectives", "toy", "--flops", "1e7", "2e7", "--shapes", *shapes, "--data", prepared,
        "--sequence-length", 16, "--batch", 4, "--lr", 0.01, "--base", "base.yaml", "--study", "s", "--out", "s.yaml",
    )  # fmt: skip
    assert {run["objective"] for run in plan["runs"]} == {"toy"}
    share = plan["runs"][0]["flops_head"] / plan["runs"][0]["tokens"] / (6 * 8 * 384)
    assert share == pytest.approx(0.3)
    assert all(f"{TOY}.ToyModule" in config for config in read_configs("s.yaml"))

    for index in range(3):  # as the tasks of a job array, in this process
        assert main(["sweep", "run", "s.yaml", "--index", str(index)]) == 0
    assert len(as_json(capsys, "sweep", "run", "s.yaml")["skipped"]) == 3
    as_json(capsys, "collect", "runs/s", "--out", "results.csv")
    curves = as_json(capsys, "curves", "results.csv", "--out", "curves", "--samples", 100)
    assert curves["toy"] and "arm" not in curves and Path("curves/scaling.png").is_file()

    run = next(Path("runs/s").glob("toy-*"))
    [first, *_] = json.loads((run / "result.json").read_text())
    assert (first["objective"], first["val_kind"], first["status"]) == ("toy", "bound", "done")
    score = as_json(capsys, "score", run, "--pairs", pairs(tmp_path), "--samples", 16)
    assert (score["objective"], score["kind"]) == ("toy", "bound")
    answer = as_json(capsys, "generate", run, "--prompt", "one plus", "--length", 4, "--steps", 2)
    assert answer["objective"] == "toy"
    assert main(["convert", str(run), "ours"]) == 0
    again = as_json(capsys, "score", "ours", "--pairs", pairs(tmp_path), "--samples", 16)
    assert again["results"] == score["results"]
    assert main(["convert", str(run), "theirs", "--to", "hf-llama"]) == 2
    assert "is of toy; choose --to llada" in capsys.readouterr().err


def read_configs(path: str) -> list[str]:
    values: list[str] = yaml.safe_load(Path(path).read_text())["parameters"]["config"]["values"]
    return values


def pairs(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "1 plus", "continuation": " 2 is 3"}) + "\n")
    return path


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("no_such_module", "LLADA_PLUGINS: module 'no_such_module' cannot be imported (ModuleNotFoundError: No module"),
        ("a b", "LLADA_PLUGINS: 'a b' is not the name of a module of yours; give names such as mine,yours.part"),
        ("second_arm", "(objective: 'arm' is in the table already; choose another name); correct it"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(
    named: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "second_arm.py").write_text(
        "from dataclasses import replace\nfrom llada_lightning.objectives import OBJECTIVES, register\n"
        "register(replace(OBJECTIVES['arm'], label='mine'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LLADA_PLUGINS", named)
    assert main(["plan", "--flops", "1e12", "--vocab-size", "384"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("name", ["arm", "llada"])
def test_what_a_position_sees_is_what_the_table_says(name: str) -> None:
    """The loss of the first token knows the last one, unless attention is causal."""
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
    module = {"arm": ArmModule, "llada": LladaModule}[name](shape, vocab_size=9, mask_token_id=8, eos_token_id=0)
    module.configure_model()
    first_BL = torch.tensor([[True, False, False]])

    def nll(last: int) -> float:
        tokens_BL, one_B = torch.tensor([[1, 2, last]]), torch.ones(1, dtype=torch.bool)
        batch = ValidationBatch(tokens_BL, first_BL, one_B, torch.zeros(1, dtype=torch.long), response_BL=first_BL)
        return float(module.sequence_nll(batch).detach())

    assert (nll(3) == nll(4)) == get_objective(name).causal


# --- nothing else names an objective ---------------------------------------------------------------------------------

NAMES = {
    "checkpoints.convert": "the layout `llada` of `llada convert --to`",
    "checkpoints.description": "compat `llada`",
    "checkpoints.hugging_face": "model_type and compat of the authors' format, and the objective of each format",
    "checkpoints.language_model": "compat `llada`",
    "checkpoints.stored_model": "model_type of the authors' format, and the layout `llada`",
    "commands.convert": "the layout `llada` of `llada convert --to`",
    "commands.plan": "the name of the program",
    "commands.sweep": "the name of the program",
    "data.sft": "the chat template `llada`",
    "generation.sampling": "compat `llada`",
    "identity": "the names in the hashed text of an identity, which never change",
    "objectives": "the table",
    "study.plan.outputs": "the name of the program",
    "study.reference": "the published numbers of the two",
    "study.sweep": "the name of the program",
    "training.modules": "the two module classes, and compat `llada`",
}
"""The modules with a string "arm" or "llada", each with what it means there."""


@pytest.fixture(scope="module")
def naming() -> dict[str, list[ast.AST]]:
    """The modules that hold one of the two strings, each with the nodes of its source."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if any(string in text for string in ('"arm"', "'arm'", '"llada"', "'llada'")):
            module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
            found[module] = list(ast.walk(ast.parse(text)))
    return found


def test_nothing_else_names_an_objective(naming: dict[str, list[ast.AST]]) -> None:
    def is_name(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and node.value in ("arm", "llada")

    assert {module for module, nodes in naming.items() if any(map(is_name, nodes))} == set(NAMES)


def test_nothing_compares_an_objective_with_a_name(naming: dict[str, list[ast.AST]]) -> None:
    """A module that may hold the two strings may not ask whether an objective is one of them."""
    for module, nodes in naming.items():
        for text in (ast.unparse(node) for node in nodes if isinstance(node, ast.Compare)):
            assert not ("objective" in text and ("'arm'" in text or "'llada'" in text)), f"{module}: {text}"
