"""What a run records of decoding policies: the exact loss of its validation sequences, which changes nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.small_models import random_model
from helpers.tiny_runs import fit, fit_arguments, fit_process, losses, metrics, record, timeless, validation_tokens
from llada_lightning.checkpoints import load_model
from llada_lightning.commands.main import main
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.policy import Policy
from llada_lightning.objectives.batches import ValidationBatch
from llada_lightning.records import POLICY_KEYS, read_records, read_validation
from llada_lightning.training.fit import run_folder
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.modules import ArmModule, LladaModule
from llada_lightning.training.validation import policy_nll

SHORT = ("--trainer.max_steps=3", "--data.val_sequences=12")
POLICIES = "--run.policies={confidence: 1, margin: 5}"


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("llada", prepared, tmp_path_factory.mktemp("policies"), *SHORT, POLICIES)


def test_the_record_holds_the_exact_loss_of_the_validation_sequences(run: Path, prepared: Path) -> None:
    lm, texts = load_model(run), validation_tokens(prepared, 12)
    measured = record(run)["val_policies"]
    assert list(measured) == ["confidence@1", "margin@5"]
    for policy in (Policy("confidence"), Policy("margin", 5)):
        loss = measured[policy.label]
        scores = log_likelihood(lm, [([], text) for text in texts], policy=policy)
        assert loss["nats_per_token"] == pytest.approx(-np.mean([score.mean for score in scores]) / 32, abs=1e-5)
        assert tuple(loss) == POLICY_KEYS
        assert loss["bits_per_byte"] / loss["nats_per_token"] == pytest.approx(
            record(run)["val_bits_per_byte"] / record(run)["val_nats_per_token"]
        )
        table, total = read_validation(run, policy=policy.label), read_validation(run)
        for column in ("steps", "document", "sequences"):
            assert table[column].tolist() == total[column].tolist()
        assert np.average(table["nats_per_token"], weights=table["sequences"]) == pytest.approx(loss["nats_per_token"])
        assert (loss["documents"], loss["sequences"]) == (len(table), 12)
        assert float(metrics(run)[-1][f"policy_nats_per_token/{policy.label}"]) == loss["nats_per_token"]


def test_policies_change_neither_the_run_nor_its_numbers(run: Path, prepared: Path, tmp_path: Path) -> None:
    without = fit("llada", prepared, tmp_path, *SHORT)
    assert losses(without) == losses(run)
    plain, measured = timeless(without), timeless(run)
    assert [each.pop("val_policies") for each in plain] == [None]
    assert all(each.pop("val_policies") for each in measured)
    assert plain == measured  # the names with their hashes, too
    assert not (without / "policies").exists()
    assert (without / "validation.csv").read_bytes() == (run / "validation.csv").read_bytes()
    base = [word for word in fit_arguments("llada", prepared, tmp_path, *SHORT) if not word.startswith("--run.name")]
    assert run_folder([*base, POLICIES]) == run_folder(base)


def test_validate_adds_to_the_record_of_a_run_that_is_done(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit("llada", prepared, tmp_path, *SHORT)
    config, before = f"--config={folder / 'config.yaml'}", record(folder)
    capsys.readouterr()
    assert main(["fit", config, "--run.policies={left_to_right: 4}"]) == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("note: a run that is done measures no further policy (left_to_right@4); `llada validate")
    for given, name in (("{left_to_right: 4}", "left_to_right@4"), ("{confidence: 32}", "confidence@32")):
        assert main(["validate", config, f"--run.policies={given}"]) == 0
        out, err = capsys.readouterr()
        assert f"policy {name}: " in out and "(exact)" in out
        assert f"recorded: {folder / 'result.json'}" in err
    after = record(folder)
    assert list(after["val_policies"]) == ["left_to_right@4", "confidence@32"]
    assert {**after, "val_policies": None} == before
    assert len(read_validation(folder, policy="confidence@32")) == len(read_validation(folder))
    assert main(["validate", config, "--run.policies={margin: 1}", "--data.val_seed=5"]) == 0
    assert "not recorded: the result of step 3 in" in capsys.readouterr().err
    assert record(folder) == after and not (folder / "policies" / "margin@1.csv").exists()


def test_each_budget_and_branch_has_its_own(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budgets = ("--trainer.max_steps=-1", "--budget.flops=[1e8, 2e8]", "--data.val_sequences=6")
    folder = fit("llada", prepared, tmp_path, *budgets, "--run.policies={left_to_right: 8}")
    first, last = read_records(folder)
    table = read_validation(folder, policy="left_to_right@8")
    assert set(table["steps"]) == {first["steps"], last["steps"]}
    assert first["val_policies"] != last["val_policies"]
    branch = folder / "branches" / str(first["steps"]) / "checkpoints" / f"step={first['steps']:08d}.ckpt"
    again = ("--run.policies={left_to_right: 8, margin: 16}", f"--ckpt_path={branch}")
    assert main(["validate", f"--config={folder / 'config.yaml'}", *again]) == 0
    one, two = read_records(folder)
    assert one["val_policies"]["left_to_right@8"] == first["val_policies"]["left_to_right@8"]
    assert "margin@16" in one["val_policies"] and two == last


def test_the_own_order_of_arm_is_its_validation_loss(prepared: Path, tmp_path: Path) -> None:
    found = record(fit("arm", prepared, tmp_path, *SHORT, "--run.policies={left_to_right: 1}"))
    loss = found["val_policies"]["left_to_right@1"]
    values = {f"val_{key}": loss[key] for key in ("nats_per_token", "stderr", "bits_per_byte")}
    assert values == {key: found[key] for key in values}


@pytest.mark.parametrize(
    ("objective", "given", "words"),
    [
        ("llada", "{confidnce: 1}", "policy: 'confidnce' is not known; the nearest is 'confidence'"),
        (
            "llada",
            "{confidence: 0}",
            "policy confidence: 0 tokens a step given; it must be a whole number of at least 1",
        ),
        (
            "llada",
            "{confidence: 33}",
            "policy confidence: 33 tokens a step given, and the longest text has 32; lower it",
        ),
        ("llada", "{confidence: many}", "run.policies: many given; expected int"),
        ("arm", "{confidence: 1}", "policy confidence@1: arm has no [MASK]"),
    ],
)
def test_a_policy_that_cannot_be_is_one_line(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str, given: str, words: str
) -> None:
    assert main(fit_arguments(objective, prepared, tmp_path, f"--run.policies={given}")) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: {re.escape(words)}", line), line
    assert not (tmp_path / "test").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_find_what_one_does(run: Path, prepared: Path, tmp_path: Path, strategy: str) -> None:
    devices = ("--trainer.devices=2", f"--trainer.strategy={strategy}")
    done = fit_process("llada", prepared, tmp_path, *SHORT, POLICIES, *devices)
    assert done.returncode == 0, done.stderr
    mine, theirs = record(tmp_path / "test" / "run")["val_policies"], record(run)["val_policies"]
    for name, loss in theirs.items():
        assert mine[name] == pytest.approx(loss, abs=1e-4)


# --- a batch of a module, without a run -------------------------------------------------------------------------------


def module_of(kind: type[LanguageModule], **settings: Any) -> LanguageModule:
    """A module with the weights of the small random model."""
    lm = random_model(kind.objective)
    settings = {"vocab_size": 40, "mask_token_id": 39, "eos_token_id": 38, **settings}
    module = kind(shape=json.loads(json.dumps(vars(lm.model.shape))), **settings)
    module.model = lm.model
    return module


def batch_of(tokens_BL: torch.Tensor, **fields: torch.Tensor) -> ValidationBatch:
    rows = len(tokens_BL)
    masked_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    return ValidationBatch(tokens_BL, masked_BL, torch.ones(rows, dtype=torch.bool), torch.arange(rows), **fields)


@torch.no_grad()
def test_responses_are_decoded_given_their_prompts() -> None:
    """Responses of several lengths in padded rows: a row that is done waits for the others."""
    tokens_BL = torch.from_numpy(np.random.default_rng(0).integers(38, size=(3, 12)))
    ends = ((2, 9), (5, 7), (0, 12))
    response_BL, real_BL = (torch.zeros(3, 12, dtype=torch.bool) for _ in range(2))
    for row, (begin, end) in enumerate(ends):
        response_BL[row, begin:end], real_BL[row, :end] = True, True
    batch = batch_of(tokens_BL, response_BL=response_BL, attention_mask_BL=real_BL)
    requests = [(text[:begin], text[begin:end]) for text, (begin, end) in zip(tokens_BL.tolist(), ends, strict=True)]
    for policy in (Policy("confidence"), Policy("margin", 3), Policy("left_to_right", 2)):
        nll_B = policy_nll(module_of(LladaModule), batch, policy)
        scores = log_likelihood(random_model(), requests, policy=policy)
        assert nll_B.tolist() == pytest.approx([-score.mean for score in scores], abs=2e-4)


@torch.no_grad()
def test_attention_stays_within_documents() -> None:
    tokens_BL = torch.from_numpy(np.random.default_rng(1).integers(38, size=(1, 10)))
    documents_BL = torch.tensor([[0] * 4 + [1] * 6])
    nll_B = policy_nll(module_of(LladaModule), batch_of(tokens_BL, documents_BL=documents_BL), Policy("left_to_right"))
    parts = [([], tokens_BL[0, :4].tolist()), ([], tokens_BL[0, 4:].tolist())]
    scores = log_likelihood(random_model(), parts, policy=Policy("left_to_right"))
    assert float(nll_B) == pytest.approx(-sum(score.mean for score in scores), abs=2e-4)


@torch.no_grad()
def test_a_module_without_mask_has_its_own_order() -> None:
    batch = batch_of(torch.from_numpy(np.random.default_rng(2).integers(38, size=(2, 8))))
    module = module_of(ArmModule)
    assert torch.equal(policy_nll(module, batch, Policy("left_to_right")), module.sequence_nll(batch))
