"""Tasks measured while a run trains: the same scores as afterwards, and the same training as without."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.local_tasks import choice_task

pytest.importorskip("lm_eval")

import datasets

from helpers.tiny_runs import fit, losses
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.commands.main import main
from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.data.sft import SftDataModule
from llada_lightning.records import read_evaluations
from llada_lightning.support.errors import UserError
from llada_lightning.training.callbacks import evaluate_tasks
from llada_lightning.training.callbacks.evaluate_tasks import EvaluateTasks
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.modules import ArmModule, BlockDiffusionModule, LladaModule


@pytest.mark.parametrize("objective", [pytest.param("arm", marks=pytest.mark.slow), "llada"])
def test_scores_in_training_are_those_of_the_checkpoint(
    prepared: Path, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    choice_task(tmp_path / "tasks")
    arguments = {"tasks": ["local_choice"], "every_n_steps": 2, "include_path": str(tmp_path / "tasks")}
    arguments |= {"sampling": {"length": 4}}
    where = "llada_lightning.training.callbacks.evaluate_tasks.EvaluateTasks"
    callback = json.dumps([{"class_path": where, "init_args": arguments}])
    run = fit(objective, prepared, tmp_path / "with", "--trainer.max_steps=4", f"--trainer.callbacks={callback}")
    plain = fit(objective, prepared, tmp_path / "without", "--trainer.max_steps=4")
    assert losses(run) == losses(plain)
    rows = read_evaluations(run)
    assert rows["steps"].tolist() == [2, 4]
    assert json.loads(rows["settings"].tolist()[0]) == {
        "monte_carlo": 16, "limit": 200, "in_training": True, "length": 4
    }  # fmt: skip
    capsys.readouterr()
    command = ["evaluate", str(run), "--tasks", "local_choice", "--include-path", str(tmp_path / "tasks"), "--quiet"]
    assert main([*command, "--monte-carlo", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["results"][0]
    assert rows["score"].tolist()[-1] == pytest.approx(100 * result["value"])


@pytest.mark.parametrize("option", ["every_n_steps", "limit", "monte_carlo"])
def test_counts_below_one_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"EvaluateTasks: {option} is 0; it must be at least 1"):
        EvaluateTasks(["piqa"], **{option: 0})  # type: ignore[arg-type]


def test_a_fine_tuning_is_measured_with_its_own_tokenizer_and_the_context_of_its_weights(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``load_model`` reads a checkpoint of the run. Its data module has no prepared folder with a tokenizer."""
    before = {"end_token_ids": [0, 5], "context_length": 512}
    monkeypatch.setattr(evaluate_tasks, "inherited", lambda path: before)
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"{n}?", "response": "yes"}) for n in range(4)))
    data = SftDataModule(str(rows), tokenizer=str(prepared), context_length=64, global_batch=2)
    ids = data.tokenizer
    shape = {"n_layers": 1, "d_model": 8, "n_heads": 1, "n_kv_heads": 1, "d_ff": 8}
    module = ArmModule(shape, ids.vocab_size, ids.mask_id, ids.eos_id)
    module.configure_model()
    lm = evaluate_tasks._language_model(SimpleNamespace(datamodule=data), module)  # type: ignore[arg-type]
    assert lm.decode(lm.encode("def f(x):")) == "def f(x):"
    assert (lm.context_length, lm.start_token_id) == (64, ids.eos_id)
    module.weights = "a checkpoint"
    lm = evaluate_tasks._language_model(SimpleNamespace(datamodule=data), module)  # type: ignore[arg-type]
    assert (lm.context_length, lm.end_token_ids) == (512, (0, 5))


def test_a_model_is_measured_as_it_predicts(prepared: Path) -> None:
    data = TokenDataModule(str(prepared), sequence_length=32)
    ids = data.tokenizer
    shape = {"n_layers": 1, "d_model": 8, "n_heads": 1, "n_kv_heads": 1, "d_ff": 8}

    def measured(kind: type[LanguageModule], **settings: Any) -> LanguageModel:
        module = kind(shape, ids.vocab_size, ids.mask_id, ids.eos_id, **settings)
        module.configure_model()
        return evaluate_tasks._language_model(SimpleNamespace(datamodule=data), module)  # type: ignore[arg-type]

    lm = measured(LladaModule, shift_targets=True)
    assert (lm.shift_targets, lm.start_token_id, lm.block_length) == (True, ids.eos_id, None)
    lm = measured(BlockDiffusionModule, block_length=4)
    assert (lm.shift_targets, lm.start_token_id, lm.block_length) == (False, None, 4)
