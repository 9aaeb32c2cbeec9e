"""Supervised fine-tuning from a checkpoint: the losses by hand, a killed run, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.tiny_runs import EVERY_MODEL, fit, kill_at, losses, record, run_processes, weights
from llada_lightning.checkpoints import load_model
from llada_lightning.commands.main import main
from llada_lightning.data.chat import Message
from llada_lightning.data.datasets import PairDataset
from llada_lightning.data.loading import LanguageDataModule
from llada_lightning.data.sft import SftDataModule
from llada_lightning.generation.prompts import conversation_ids
from llada_lightning.model.patterns import block_causal
from llada_lightning.objectives.arm import shift_right
from llada_lightning.objectives.batches import TrainingBatch
from llada_lightning.objectives.forward_process import mask_ratio
from llada_lightning.objectives.llada import LossWeight, WeightName
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.modules import ArmModule, BlockDiffusionModule, LladaModule

SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64}
PAIRS = [{"question": f"{a} plus {b}", "answer": f"is {a + b}" + "!" * (a % 4)} for a in range(8) for b in range(5)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    return path


@pytest.fixture(scope="module", params=["arm", "llada"])
def base(request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An objective, and a run of it that has learned next to nothing."""
    root = tmp_path_factory.mktemp(f"base_{request.param}")
    return request.param, fit(request.param, prepared, root, "--data.sequence_length=128", "--trainer.max_steps=3")


def arguments(objective: str, start: Path, pairs: Path, root: Path, *extra: str) -> list[str]:
    return [
        "fit",
        f"--config=experiments/sft/{objective}.yaml",
        f"--model.weights={start}",
        f"--data.path={pairs}",
        "--data.epochs=4",
        "--data.global_batch=8",
        "--data.val_fraction=0.1",
        "--model.schedule.lr=0.01",
        "--model.schedule.final_lr=0.001",
        "--model.schedule.warmup_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.log_every_n_steps=1",
        f"--run.root={root}",
        "--run.study=test",
        "--run.name=run",
        "--run.checkpoint_every_steps=5",
        *extra,
    ]


def module_of(kind: type[LanguageModule], data: LanguageDataModule) -> LanguageModule:
    ids = data.tokenizer
    module = kind(SHAPE, ids.vocab_size, ids.mask_id, ids.eos_id)
    module.configure_model()
    return module


def data_of(prepared: Path, pairs: Path) -> SftDataModule:
    return SftDataModule(str(pairs), tokenizer=str(prepared), context_length=128, global_batch=8)


def batch_of(data: SftDataModule) -> TrainingBatch:
    dataset = PairDataset(data.stream, data.tokenizer.eos_id, data.mask_eps, data.time_sampling, data.global_batch)
    return dataset.__getitems__(list(range(8)))


def test_the_loss_of_llada_is_equation_5_by_hand(prepared: Path, pairs: Path) -> None:
    data = data_of(prepared, pairs)
    module, batch = module_of(LladaModule, data), batch_of(data)
    total = torch.zeros(())
    for i in range(8):
        own = slice(None) if batch.attention_mask_BL is None else batch.attention_mask_BL[i]
        tokens_L, masked_L = batch.tokens_BL[i, own], batch.masked_BL[i, own]
        logits_LV = module.model(tokens_L.masked_fill(masked_L, data.tokenizer.mask_id)[None], causal=False)[0]
        logits_LV[:, data.tokenizer.mask_id] = -torch.inf
        nll_L = -logits_LV.log_softmax(-1).gather(1, tokens_L[:, None])[:, 0]
        prompt = int(np.flatnonzero(batch.response_BL[i])[0])
        total = total + (nll_L * masked_L).sum() / batch.p_B[i] / (len(tokens_L) - prompt)
    assert float(module.training_loss(batch).detach()) == pytest.approx(float(total.detach()) / 8, rel=1e-5)


def test_the_loss_of_block_is_equation_5_within_each_block_by_hand(prepared: Path, pairs: Path) -> None:
    data, size = data_of(prepared, pairs), 4
    data.block_length = size
    ids = data.tokenizer
    module = BlockDiffusionModule(SHAPE, ids.vocab_size, ids.mask_id, ids.eos_id, block_length=size)
    module.configure_model()
    dataset = PairDataset(data.stream, ids.eos_id, data.mask_eps, data.time_sampling, 8, None, size)
    batch, total = dataset.__getitems__(list(range(8))), torch.zeros(())
    assert batch.p_B.shape == (8, -(-int(data.stream.pairs.lengths.max()) // size))
    for i in range(8):
        own = slice(None) if batch.attention_mask_BL is None else batch.attention_mask_BL[i]
        tokens_L, masked_L = batch.tokens_BL[i, own], batch.masked_BL[i, own]
        prompt = int(np.flatnonzero(batch.response_BL[i])[0])
        for k in range(-(-len(tokens_L) // size)):
            end = min((k + 1) * size, len(tokens_L))
            noisy_L = tokens_L[:end].masked_fill(masked_L[:end] & (torch.arange(end) >= k * size), ids.mask_id)
            logits_LV = module.model(noisy_L[None], causal=False, pattern=block_causal(size))[0, k * size :]
            logits_LV[:, ids.mask_id] = -torch.inf
            nll_L = -logits_LV.log_softmax(-1).gather(1, tokens_L[k * size : end, None])[:, 0]
            total = total + (nll_L * masked_L[k * size : end]).sum() / batch.p_B[i, k] / (len(tokens_L) - prompt)
    assert float(module.training_loss(batch).detach()) == pytest.approx(float(total.detach()) / 8, rel=1e-5)


@pytest.mark.parametrize(("objective", "own"), [("block", ["--model.block_length=4"]), ("uniform", [])])
def test_the_others_are_fine_tuned_and_validated(
    prepared: Path, pairs: Path, tmp_path: Path, objective: str, own: list[str]
) -> None:
    start = fit(objective, prepared, tmp_path / "base", *own, "--trainer.max_steps=3")
    given = (f"--model={EVERY_MODEL[objective]}", *own, "--data.epochs=1", "--data.context_length=128")
    assert main(arguments("llada", start, pairs, tmp_path, *given)) == 0
    folder = tmp_path / "test" / "run"
    assert record(folder)["objective"] == objective and record(folder)["val_nats_per_token"] > 0
    assert load_model(folder).block_length == (4 if own else None)


@pytest.mark.parametrize("weight", [("elbo", None), ("ce", None), ("clipped", 3.0), ("per_masked_token", None)])
def test_densities_and_weights_hold_for_responses_by_hand(
    prepared: Path, pairs: Path, weight: tuple[WeightName, float | None]
) -> None:
    given = {"name": "beta", "a": 1.5, "b": 0.8}
    data = SftDataModule(str(pairs), str(prepared), context_length=128, global_batch=8, density=given)
    setting, module = data.density_setting, module_of(LladaModule, data)
    assert setting is not None and isinstance(module, LladaModule)
    module.loss_weight = LossWeight(*weight)
    dataset = PairDataset(data.stream, data.tokenizer.eos_id, data.mask_eps, data.time_sampling, 8, data.density)
    batch = dataset.__getitems__(list(range(8)))
    points_B = mask_ratio(data.seed, np.arange(8), data.time_sampling)
    t_B, q_B = setting.density.draw(points_B)
    p_B = 0.999 * t_B + 0.001
    np.testing.assert_allclose(batch.p_B, p_B, rtol=1e-6)
    logits_BLV = module.model(batch.tokens_BL.masked_fill(batch.masked_BL, data.tokenizer.mask_id), causal=False,
                              attention_mask_BL=batch.attention_mask_BL)  # fmt: skip
    logits_BLV[..., data.tokenizer.mask_id] = -torch.inf
    nll_BL = -logits_BLV.log_softmax(-1).gather(2, batch.tokens_BL[..., None])[..., 0]
    sums_B = (nll_BL * batch.masked_BL).sum(dim=1).detach().numpy()
    lengths_B, counts_B = batch.response_lengths_B.numpy(), batch.masked_BL.sum(dim=1).numpy()
    weight_B = {
        "elbo": 1 / (p_B * q_B),
        "ce": 1.0,
        "clipped": np.minimum(1 / (p_B * q_B), 3.0),
        "per_masked_token": lengths_B / np.maximum(counts_B, 1),
    }[weight[0]]
    expected = float((weight_B * sums_B / lengths_B).mean())
    assert float(module.training_loss(batch).detach()) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_arm_is_of_responses_and_one_eos_by_hand(prepared: Path, pairs: Path) -> None:
    data = data_of(prepared, pairs)
    module, batch = module_of(ArmModule, data), batch_of(data)
    logits_BLV = module.model(shift_right(batch.tokens_BL, data.tokenizer.eos_id), causal=True)
    logits_BLV[..., data.tokenizer.mask_id] = -torch.inf
    nll_BL = -logits_BLV.log_softmax(-1).gather(2, batch.tokens_BL[..., None])[..., 0]
    each = [float(nll_L[own].mean().detach()) for nll_L, own in zip(nll_BL, batch.response_BL, strict=True)]
    assert float(module.training_loss(batch).detach()) == pytest.approx(sum(each) / 8, rel=1e-5)


def test_a_run_starts_from_the_weights_learns_and_chats(base: tuple[str, Path], pairs: Path, tmp_path: Path) -> None:
    objective, start = base
    assert main(arguments(objective, start, pairs, tmp_path)) == 0
    folder = tmp_path / "test" / "run"
    assert losses(folder)[-1] < 0.8 * losses(folder)[0]
    done = record(folder)
    assert done["steps"] == round(4 * 36 / 8) and done["epochs"] == 4
    assert done["vocab_size"] == record(start)["vocab_size"] and done["shape"] == record(start)["shape"]
    lm = load_model(folder)
    assert lm.context_length == 128 and lm.chat_template is not None
    prompt = conversation_ids(lm, [Message("user", "3 plus 4")])
    assert lm.decode(prompt) == "user:\n3 plus 4\n\nassistant:\n"


def test_a_killed_run_ends_bit_for_bit_as_an_uninterrupted_one(
    base: tuple[str, Path], pairs: Path, tmp_path: Path
) -> None:
    objective, start = base
    assert main(arguments(objective, start, pairs, tmp_path / "whole")) == 0
    command = arguments(objective, start, pairs, tmp_path / "killed")
    assert run_processes([*command, kill_at(8)], 1).returncode == -signal.SIGKILL
    assert main(command) == 0
    whole, folder = tmp_path / "whole" / "test" / "run", tmp_path / "killed" / "test" / "run"
    assert losses(folder) == losses(whole)
    mine, theirs = weights(folder, 18), weights(whole, 18)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_what_contradicts_the_weights_is_refused(
    base: tuple[str, Path], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective, start = base
    wrong = {
        "model.shape: 107k is not that of model.weights": (objective, start, ("--model.shape=107k",)),
        "does not exist": (objective, tmp_path / "nowhere", ()),
        "budget: given beside data.epochs": (objective, start, ("--budget.flops=1e9",)),
        "writes <|end_header_id|>, <|eot_id|>": (objective, start, ("--data.chat_template=llada",)),
        "has none; choose plain or llada": (objective, start, ("--data.chat_template=tokenizer",)),
        "pairs.jsonl:1: prompt of": (objective, start, ("--data.context_length=20",)),
    }
    if objective == "llada":  # and `llada` may begin as an `arm`
        wrong[f"model.weights: '{start}' is of llada, not of arm"] = ("arm", start, ())
    for message, (kind, checkpoint, extra) in wrong.items():
        assert main(arguments(kind, checkpoint, pairs, tmp_path, *extra)) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_are_those_of_the_checkpoint_and_part_of_the_identity(
    base: tuple[str, Path], pairs: Path, tmp_path: Path
) -> None:
    objective, start = base
    still = ("--model.schedule.lr=1e-30", "--model.schedule.final_lr=1e-31", "--data.epochs=1")
    assert main(arguments(objective, start, pairs, tmp_path, *still)) == 0
    folder = tmp_path / "test" / "run"
    mine, theirs = weights(folder, round(36 / 8)), weights(start, 3)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in theirs)
    saved = torch.load(next((folder / "checkpoints").glob("*.ckpt")))["identity"]
    assert len(saved["weights"]) == 64 and "weights" not in saved["model"]["init_args"]
    assert saved["model"]["objective"] == objective
