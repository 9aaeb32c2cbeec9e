"""The optimizers: what each updates, how a bad step is skipped, and what survives in a checkpoint."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.poison import callbacks, poison
from helpers.tiny_runs import fit, fit_arguments, metrics, record
from llada_lightning.commands.main import main
from llada_lightning.compute.schedule import WSD
from llada_lightning.records import read_faults
from llada_lightning.support.errors import UserError
from llada_lightning.training.modules import ArmModule
from llada_lightning.training.optimizers import GuardedOptimizer, Muon, OptimizerSettings

SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}


def other(name: str, **arguments: Any) -> OptimizerSettings:
    return OptimizerSettings(name=name, arguments=arguments)


KINDS = [OptimizerSettings(name="muon"), other("torch.optim.NAdam", betas=[0.9, 0.99]), other("torch.optim.Adafactor")]
NAMES = ["muon", "nadam", "adafactor"]


def built(settings: OptimizerSettings) -> tuple[ArmModule, torch.optim.Optimizer]:
    module = ArmModule(SHAPE, vocab_size=23, optimizer=settings, schedule=WSD(lr=0.1).resolve(10, 100.0, 1.0))
    module.configure_model()
    return module, module.configure_optimizers()["optimizer"]


def set_gradients(module: nn.Module, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = factor * torch.randn(parameter.shape, generator=generator)


def same(left: Any, right: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def test_an_embedding_that_is_not_decayed_stands_with_the_gains() -> None:
    module, optimizer = built(OptimizerSettings(decay_embeddings=False))
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in module.named_parameters()}
    assert {names[p] for p in others["params"] if p.ndim == 2} == {"model.embedding.weight"}
    assert "model.head.weight" in {names[p] for p in decayed["params"]}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_muon_updates_matrices_as_torchs_does_and_the_rest_by_adamw(adjust_lr: Any) -> None:
    settings = OptimizerSettings(eps=1e-6, weight_decay=0.2, name="muon", muon=Muon(momentum=0.9, adjust_lr=adjust_lr))
    module, optimizer = built(settings)
    twin = copy.deepcopy(module)
    inner = [p for name, p in twin.named_parameters() if ".blocks." in name and p.ndim == 2]
    outer = [twin.model.embedding.weight, twin.model.head.weight]
    gains = [p for p in twin.parameters() if p.ndim == 1]
    assert len(inner) + len(outer) + len(gains) == len(list(twin.parameters()))
    muon = torch.optim.Muon(inner, lr=1.0, momentum=0.9, weight_decay=0.2, adjust_lr_fn=adjust_lr)
    groups = [{"params": outer, "weight_decay": 0.2}, {"params": gains, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-6, fused=True)
    for step in range(3):
        for one in (optimizer, muon, adamw):
            for group in one.param_groups:
                group["lr"] = 0.1 / (step + 1)
        for one in (module, twin):
            set_gradients(one, step)
        for one in (optimizer, muon, adamw):
            one.step()
    assert same(module.state_dict(), twin.state_dict())


@pytest.mark.parametrize("settings", KINDS, ids=NAMES)
def test_a_verdict_holds_for_one_step(settings: OptimizerSettings) -> None:
    """Weights, moments and step counts stay, whatever the gradients are; the next step is made."""
    module, optimizer = built(settings)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    set_gradients(module, 0)
    optimizer.step()
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))

    def closure() -> float:
        set_gradients(module, 1, factor=math.nan)
        optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
        return 4.5

    assert optimizer.step(closure) == 4.5
    assert same((module.state_dict()), before[0]) and same(optimizer.state_dict(), before[1])
    set_gradients(module, 2)
    optimizer.step()
    assert not same(module.state_dict(), before[0])
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


@pytest.mark.parametrize("settings", KINDS, ids=NAMES)
def test_a_loaded_state_goes_on_bit_for_bit_in_every_part(settings: OptimizerSettings) -> None:
    module, optimizer = built(settings)
    for step in range(2):
        set_gradients(module, step)
        optimizer.step()
    twin, other = built(settings)
    twin.load_state_dict(module.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(other, GuardedOptimizer)
    for one, of in ((module, optimizer), (twin, other)):
        for group in of.param_groups:  # what a schedule does
            group["lr"] = 0.03
        set_gradients(one, 5)
        of.step()
    assert same(module.state_dict(), twin.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    "words",
    [
        ("--model.optimizer.name=muon",),
        pytest.param(("--model.optimizer.name=torch.optim.NAdam",), marks=pytest.mark.slow),
        pytest.param(("--model.optimizer.name=torch.optim.Adafactor",), marks=pytest.mark.slow),
    ],
    ids=NAMES,
)
def test_a_skipped_step_leaves_weights_and_state_and_moves_everything_else(
    prepared: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    short = ("--trainer.max_steps=6", "--run.checkpoint_every_steps=1", "--run.keep_checkpoints=9", *words)
    folder = fit("arm", prepared, tmp_path, *short, callbacks(poison(gradients=(1, 4))))
    saved = [torch.load(folder / "checkpoints" / f"step={step:08d}.ckpt") for step in range(1, 7)]
    before, after, later = saved[2], saved[3], saved[4]
    assert same(before["state_dict"], after["state_dict"]) and not same(after["state_dict"], later["state_dict"])
    states = [each["optimizer_states"][0]["state"] for each in saved]
    assert same(states[2], states[3]) and not same(states[3], states[4])
    assert [each["lr_schedulers"][0]["last_epoch"] for each in saved] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_faults(folder)] == ["1", "4"]
    assert [row["skipped_updates"] for row in metrics(folder)] == list("111222")
    assert len({row["lr"] for row in metrics(folder)}) > 1
    assert record(folder)["status"] == "done"


OWN_OPTIMIZER = """
import torch
from llada_lightning.training.modules import ArmModule

class Sgd(ArmModule):
    def configure_optimizers(self):
        return torch.optim.{optimizer}(self.parameters(), lr=0.1{arguments})
"""


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("SGD", ", momentum=0.9, weight_decay=0.1"),
        pytest.param("Adam", ", fused=True", marks=pytest.mark.slow),
        pytest.param("RMSprop", "", marks=pytest.mark.slow),
    ],
)
def test_the_optimizer_of_a_module_of_ones_own_is_held_back_by_the_guard_too(
    optimizer: str, arguments: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_{optimizer.lower()}"
    (tmp_path / f"{name}.py").write_text(OWN_OPTIMIZER.format(optimizer=optimizer, arguments=arguments))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LLADA_TRUSTED_MODULES", f"helpers,{name}")
    short = ("--trainer.max_steps=5", "--run.checkpoint_every_steps=1", "--run.keep_checkpoints=9")
    words = fit_arguments("arm", prepared, tmp_path, *short, callbacks(poison(gradients=(2,))))
    assert main([f"--model={name}.Sgd" if word == "--model=ArmModule" else word for word in words]) == 0
    folder = tmp_path / "test" / "run"
    saved = [torch.load(folder / "checkpoints" / f"step={step:08d}.ckpt") for step in range(1, 6)]
    assert same(saved[1]["state_dict"], saved[0]["state_dict"])
    assert same(saved[1]["optimizer_states"][0]["state"], saved[0]["optimizer_states"][0]["state"])
    assert not same(saved[2]["state_dict"], saved[1]["state_dict"])
    assert [row["step"] for row in read_faults(folder)] == ["2"]
    assert record(folder)["variant"] == f"module={name}.Sgd"
    module, _ = built(OptimizerSettings())
    assert not module.builds_own_optimizer


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (OptimizerSettings(betas=(0.9, 1.0)), r"model.optimizer: .*; betas must lie in \[0, 1\), eps above 0"),
        (OptimizerSettings(name="muon", muon=Muon(momentum=1.0)), r"model.optimizer.muon: .*; momentum must lie in"),
        (OptimizerSettings(name="muon", muon=Muon(ns_steps=0)), r"model.optimizer.muon: .*; momentum must lie in"),
        (OptimizerSettings(muon=Muon(momentum=0.9)), r"model.optimizer.muon: .* given, but the optimizer is adamw"),
        (
            OptimizerSettings(name="muon", arguments={"nesterov": False}),
            "arguments: .* but muon has settings of its own",
        ),
        (
            OptimizerSettings(name="torch.optim.SGD", weight_decay=0.0),
            "torch.optim.SGD reads nothing but its arguments; give",
        ),
        (other("lion"), "model.optimizer.name: 'lion' is not known; give adamw, muon, or the path of a class"),
        (
            other("torch.optim.Nope"),
            "model.optimizer.name: torch.optim.Nope is no optimizer; give adamw, muon, or the path",
        ),
        (other("torch.nn.Linear"), "model.optimizer.name: torch.nn.Linear is no optimizer"),
        (other("torch.optim.Muon"), "torch.optim.Muon updates matrices only; give muon, which adds AdamW"),
        (other("torch.optim.LBFGS"), "torch.optim.LBFGS computes the loss several times a step"),
        (other("torch.optim.SparseAdam"), "torch.optim.SparseAdam fails with .*dense gradients"),
        (other("torch.optim.SGD", momentu=1), "torch.optim.SGD fails with .*unexpected keyword"),
        (other("torch.optim.SGD", momentum=-1), "torch.optim.SGD fails with .*Invalid momentum"),
        (other("torch.optim.SGD", lr=1), "model.optimizer.arguments: lr 1 given; give --model.schedule"),
        (other("antigravity.Fly"), "'antigravity.Fly' is not of llada_lightning, lightning or torch"),
        (other("torch.hub.load"), "'torch.hub.load' is not of .*, or may run commands"),
    ],
)
def test_settings_that_cannot_be(settings: OptimizerSettings, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as raised:
        settings.check()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("{muon: {momentum: x}}", "model.optimizer.muon.momentum: x given; expected float"),
        ("{momentum: 0.9}", "model: Group 'optimizer' does not accept option 'momentum'; the nearest is"),
        ("{name: torch.optim.LBFGS}", "model.optimizer.name: torch.optim.LBFGS computes the loss several times"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_before_anything_is_written(
    word: str, complaint: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments("arm", prepared, tmp_path, f"--model.optimizer={word}")) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {complaint}")
    assert not list(tmp_path.iterdir())
