"""A plain Lightning Trainer, from Python: the same run as by the command, with checkpoints that everything reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from helpers.tiny_runs import fit as fit_by_command
from llada_lightning import fit, load_model
from llada_lightning.checkpoints.run_folder import last_checkpoint, saved_identity
from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.identity import differences, identity_hash
from llada_lightning.support.errors import UserError
from llada_lightning.training import ArmModule, LladaModule

SHAPE = {"n_layers": 1, "d_model": 16, "n_heads": 2, "n_kv_heads": 2, "d_ff": 32}


def trainer(**settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**{**quiet, "enable_checkpointing": False, "limit_val_batches": 0, "max_steps": 6, **settings})


def data(prepared: Path, **settings: Any) -> TokenDataModule:
    return TokenDataModule(str(prepared), **{"sequence_length": 32, "global_batch": 4, "val_sequences": 8, **settings})


@pytest.mark.parametrize("kind", [ArmModule, LladaModule])
def test_vocabulary_schedule_and_identity_follow_from_data_and_trainer(kind: type, prepared: Path) -> None:
    module, run, tokens = kind(SHAPE), trainer(), data(prepared, global_batch=None)
    run.fit(module, tokens)
    assert run.global_step == 6
    assert module.vocab_size == tokens.tokenizer.vocab_size
    assert (module.schedule.total_steps, module.schedule.warmup_steps, module.schedule.decay_steps) == (6, 1, 1)
    assert module.schedule.lr is not None and module.identity["model"]["objective"] == module.objective
    assert module.identity["data"]["global_batch"] == tokens.batch


@pytest.mark.parametrize("kind", [ArmModule, LladaModule])
def test_its_checkpoints_load_and_resume(kind: type, prepared: Path, tmp_path: Path) -> None:
    whole = kind(SHAPE)
    run = trainer()
    run.fit(whole, data(prepared))
    path = tmp_path / "mine.ckpt"
    run.save_checkpoint(path)
    lm = load_model(path)
    assert lm.objective == whole.objective
    tokens_BL = torch.arange(6)[None]
    logits_BLV = lm.logits(tokens_BL)
    assert logits_BLV.shape == (1, 6, whole.vocab_size)

    half, stopped = kind(SHAPE), trainer()
    stopped.should_stop = False
    stopped.fit_loop.epoch_loop.max_steps = 6

    half.on_train_batch_end = lambda *_: setattr(stopped, "should_stop", stopped.global_step >= 3)  # type: ignore[method-assign]
    stopped.fit(half, data(prepared))
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    assert stopped.global_step == 3
    resumed = kind(SHAPE)
    trainer().fit(resumed, data(prepared), ckpt_path=str(tmp_path / "half.ckpt"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
    with pytest.raises(UserError) as refused:
        trainer().fit(kind(SHAPE, seed=1), data(prepared), ckpt_path=str(path))
    assert str(refused.value).startswith(f"checkpoint: '{path}' is of another run (model.init_args.seed was 0, is 1; ")
    assert str(refused.value).endswith("); restore these settings, or give another ckpt_path")


def test_it_is_the_run_that_the_command_makes(prepared: Path, tmp_path: Path) -> None:
    folder = fit_by_command("llada", prepared, tmp_path, "--trainer.max_steps=6", "--trainer.precision=32-true")
    saved = last_checkpoint(folder / "checkpoints")
    assert saved is not None
    by_command = saved_identity(saved)
    model, tokens = by_command["model"]["init_args"], by_command["data"]
    module = LladaModule(model["shape"], seed=by_command["seed"])
    module.schedule.lr = model["schedule"]["lr"]
    names = ("sequence_length", "global_batch", "val_sequences", "seed", "val_seed", "random_length_share")
    settings = {name: tokens[name] for name in names if name in tokens}
    run = trainer(gradient_clip_val=by_command["trainer"]["gradient_clip_val"])
    run.fit(module, TokenDataModule(str(prepared), **settings))
    mine = torch.load(saved, weights_only=True)["state_dict"]
    assert differences(by_command, module.identity) == []
    assert identity_hash(module.identity) == identity_hash(by_command)
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, mine[name])


def test_a_trainer_without_our_data_or_without_a_length_is_refused_in_one_line(prepared: Path) -> None:
    with pytest.raises(UserError, match=r"^trainer: nothing says how long to train; give Trainer\(max_steps=\.\.\.\)$"):
        trainer(max_steps=-1, max_epochs=-1).fit(LladaModule(SHAPE), data(prepared))
    with pytest.raises(UserError, match=r"^trainer: fit without a data module; give datamodule=TokenDataModule"):
        trainer().fit(LladaModule(SHAPE), train_dataloaders=torch.utils.data.DataLoader([1]))  # type: ignore[arg-type]


def test_fit_does_what_the_command_does_and_returns_the_records(prepared: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": {"class_path": "LladaModule", "init_args": {"shape": SHAPE}},
        "data": {"path": str(prepared), "sequence_length": 32, "global_batch": 4, "val_sequences": 8},
        "budget": {"flops": [2e7, 4e7]},
        "trainer": {"precision": "32-true", "accelerator": "cpu", "enable_progress_bar": False},
        "run": {"study": "mine", "root": str(tmp_path)},
    }
    records = fit(**settings)
    assert [record["status"] for record in records] == ["done", "done"]
    assert records == fit(**settings)  # done: nothing is trained again
    with pytest.raises(UserError, match=r"^budget\.flops: 1 is below one step of llada"):
        fit(**{**settings, "budget": {"flops": 1}})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budgets": {"flops": 1e9}}, "budgets.flops: there is no such setting; the nearest is budget.flops"),
        ({"zzz": 1}, "zzz: there is no such setting"),
        (
            {"data": {"pth": "x"}},
            "data: Option 'pth' is not accepted; the nearest is data.path; see 'llada fit --data.help TokenDataModule'",
        ),
    ],
)
def test_a_misspelt_setting_is_told_the_nearest_key(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        fit(model="LladaModule", **settings)
    assert str(refused.value) == said
