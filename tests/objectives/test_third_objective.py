"""A third objective from one file goes through every command; nothing else of the package names an objective."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import llada_lightning
from helpers.every_command import through_every_command
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


def test_one_file_goes_through_every_command(
    plugin: None, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    walk = through_every_command("toy", prepared, capsys, generate_options=("--steps", 2))
    first = walk.plan["runs"][0]
    assert first["flops_head"] / first["tokens"] / (6 * 8 * 384) == pytest.approx(0.3)
    assert all(f"{TOY}.ToyModule" in config for config in read_configs("s.yaml"))
    assert walk.curves["toy"] and "arm" not in walk.curves


def read_configs(path: str) -> list[str]:
    values: list[str] = yaml.safe_load(Path(path).read_text())["parameters"]["config"]["values"]
    return values


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
    "checkpoints.card": "the layout `llada` of `llada convert --to`",
    "checkpoints.convert": "the layout `llada` of `llada convert --to`",
    "checkpoints.description": "compat `llada`",
    "checkpoints.hugging_face": "model_type and compat of the authors' format, and the objective of each format",
    "checkpoints.language_model": "compat `llada`",
    "checkpoints.stored_model": "model_type of the authors' format, and the layout `llada`",
    "commands.convert": "the layout `llada` of `llada convert --to`",
    "commands.plan": "the name of the program",
    "commands.sweep": "the name of the program",
    "commands.report": "the name of the program",
    "data.sft": "the chat template `llada`",
    "generation.sampling": "compat `llada`",
    "identity": "the names in the hashed text of an identity, which never change",
    "objectives": "the table",
    "study.plan.outputs": "the name of the program",
    "study.reference": "the published numbers of the two",
    "study.sweep": "the name of the program",
    "training.language_module": "compat `llada`",
    "training.modules": "the module classes",
}
"""The modules with a string "arm" or "llada", each with what it means there."""


@pytest.fixture(scope="module")
def naming() -> dict[str, list[ast.AST]]:
    """The modules that hold the name of an objective as a string, each with the nodes of its source."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if any(f'"{name}"' in text or f"'{name}'" in text for name in OBJECTIVES):
            module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
            found[module] = list(ast.walk(ast.parse(text)))
    return found


def test_nothing_else_names_an_objective(naming: dict[str, list[ast.AST]]) -> None:
    def is_name(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and node.value in ("arm", "llada")

    assert {module for module, nodes in naming.items() if any(map(is_name, nodes))} == set(NAMES)


def test_nothing_compares_an_objective_with_a_name(naming: dict[str, list[ast.AST]]) -> None:
    """A module that may hold such a string may not ask whether an objective has this name."""
    for module, nodes in naming.items():
        for text in (ast.unparse(node) for node in nodes if isinstance(node, ast.Compare)):
            named = any(f"'{name}'" in text for name in OBJECTIVES)
            assert not ("objective" in text and named), f"{module}: {text}"
