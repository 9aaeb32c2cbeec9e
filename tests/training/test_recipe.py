"""The switches of the recipe: off by default and in no name, on they keep what a run promises."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_runs import fit, fit_arguments, fit_process, kill_at, losses, metrics, record, weights
from llada_lightning import generate, load_model, log_likelihood
from llada_lightning.commands.main import main
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch, scored_positions
from llada_lightning.support.errors import UserError
from llada_lightning.training.cli import LladaCLI
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.modules import ArmModule, LladaModule
from llada_lightning.training.replay import replay_step

SWITCHES = {
    "qk_norm": ("--model.qk_norm=true",),
    "z_loss": ("--model.z_loss=0.001",),
    "dropout": ("--model.dropout=0.1",),
    "token_noise": ("--model.token_noise=0.2",),
    "decay": ("--model.optimizer.decay_embeddings=false",),
    "muon": ("--model.optimizer.name=muon",),
    "nadam": ("--model.optimizer.name=torch.optim.NAdam",),
}
ALL = tuple(word for name, words in SWITCHES.items() if name not in ("muon", "nadam") for word in words)
SHARDED = ("--trainer.devices=2", "--trainer.strategy=fsdp2")
WARMUP = "--model.schedule.warmup_steps=2"
SHORT = ("--trainer.max_steps=12", "--run.checkpoint_every_steps=3")
EOS, MASK, VOCAB, LENGTH = 0, 22, 23, 12
SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `arm` run with all switches that one run can have."""
    return fit("arm", prepared, tmp_path_factory.mktemp("whole"), *SHORT, *ALL)


def assert_resumes(whole: Path, prepared: Path, root: Path, *words: str) -> None:
    killed = fit_process("arm", prepared, root, *SHORT, *words, kill_at(7))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = fit("arm", prepared, root, *SHORT, *words)
    assert losses(folder) == losses(whole)
    assert [row["grad_norm"] for row in metrics(folder)] == [row["grad_norm"] for row in metrics(whole)]
    mine, theirs = (torch.load(each / "checkpoints" / "step=00000012.ckpt") for each in (folder, whole))
    assert all(torch.equal(mine["state_dict"][key], value) for key, value in theirs["state_dict"].items())
    [ours], [others] = mine["optimizer_states"], theirs["optimizer_states"]
    assert ours["param_groups"] == others["param_groups"]
    for number, state in others["state"].items():
        assert all(
            torch.equal(torch.as_tensor(ours["state"][number][key]), torch.as_tensor(state[key])) for key in state
        )
    assert record(folder)["val_nats_per_token"] == record(whole)["val_nats_per_token"]


def test_a_killed_run_with_all_switches_ends_bit_for_bit(whole: Path, prepared: Path, tmp_path: Path) -> None:
    assert_resumes(whole, prepared, tmp_path, *ALL)


@pytest.mark.parametrize(
    "name", [name if name == "muon" else pytest.param(name, marks=pytest.mark.slow) for name in SWITCHES]
)
def test_a_killed_run_with_one_switch_ends_bit_for_bit(name: str, prepared: Path, tmp_path: Path) -> None:
    alone = fit("arm", prepared, tmp_path / "whole", *SHORT, *SWITCHES[name])
    assert_resumes(alone, prepared, tmp_path / "killed", *SWITCHES[name])


def test_accumulation_changes_no_mask_and_no_noise(whole: Path, prepared: Path, tmp_path: Path) -> None:
    split = ("--trainer.accumulate_grad_batches=4", "--data.workers=1")
    folder = fit("arm", prepared, tmp_path, *SHORT, *ALL, *split)
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    assert record(folder)["run"] == record(whole)["run"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["arm", "llada"])
@pytest.mark.parametrize(
    ("strategy", "optimizer", "tolerance"),
    [("ddp", (), 1e-5), ("fsdp2", (), 1e-5), ("fsdp2_tp2", (), 1e-5), ("fsdp2", SWITCHES["muon"], 1e-3),
     ("fsdp2_tp2", SWITCHES["muon"], 1e-3), ("fsdp2", SWITCHES["nadam"], 1e-5)],
)  # fmt: skip
def test_two_processes_make_the_same_run_and_one_goes_on(
    objective: str, strategy: str, optimizer: tuple[str, ...], tolerance: float, prepared: Path, tmp_path: Path
) -> None:
    """Muon's iteration is in bf16, which makes more of the rounding of a sum."""
    grouped = "--model.shape={n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64}"
    words = (grouped, *SHORT, *SWITCHES["qk_norm"], *SWITCHES["z_loss"], *SWITCHES["dropout"], *optimizer)
    words += SWITCHES["token_noise"] if objective == "arm" else ()
    one = fit(objective, prepared, tmp_path / "one", *words)
    two = ("--trainer.devices=2", f"--trainer.strategy={strategy}")
    done = fit_process(objective, prepared, tmp_path / "two", *words, *two)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two" / "test" / "run") == pytest.approx(losses(one), abs=tolerance)
    killed = fit_process(objective, prepared, tmp_path / "killed", *words, *two, kill_at(7))
    assert killed.returncode != 0
    folder = fit(objective, prepared, tmp_path / "killed", *words)
    assert losses(folder) == pytest.approx(losses(one), abs=tolerance)


@pytest.mark.slow
def test_a_run_of_one_process_with_muon_goes_on_in_shards(prepared: Path, tmp_path: Path) -> None:
    whole = fit("arm", prepared, tmp_path / "whole", *SHORT, *SWITCHES["muon"])
    assert fit_process("arm", prepared, tmp_path, *SHORT, *SWITCHES["muon"], kill_at(7)).returncode != 0
    done = fit_process("arm", prepared, tmp_path, *SHORT, *SWITCHES["muon"], *SHARDED)
    assert done.returncode == 0 and "going on from" in done.stderr, done.stderr
    assert losses(tmp_path / "test" / "run") == pytest.approx(losses(whole), abs=1e-3)


@pytest.mark.slow
def test_a_branch_of_a_trunk_with_all_switches_is_the_run_of_its_budget(prepared: Path, tmp_path: Path) -> None:
    """With Muon, too: the state of both its parts is in the checkpoint that a branch starts from."""
    steps = 6.0 * 2 * 12_288 * 8 * 32
    common = (*ALL[:-1], *SWITCHES["muon"], "--trainer.max_steps=-1", "--data.random_length_share=0")
    family = fit("arm", prepared, tmp_path / "family", *common, f"--budget.flops=[{8 * steps}, {16 * steps}]", WARMUP)
    alone = fit("arm", prepared, tmp_path / "alone", *common, f"--budget.flops={16 * steps}", WARMUP)
    first, second = json.loads((family / "result.json").read_text())
    assert second["val_nats_per_token"] == record(alone)["val_nats_per_token"] != first["val_nats_per_token"]
    assert second["steps"] == record(alone)["steps"] > first["steps"]


def test_a_step_is_replayed_with_its_noise(whole: Path) -> None:
    """The parts of the sequences, whose masks are theirs alone, add up to the loss of the step, without the z-loss."""
    replayed = replay_step(whole, 8)
    assert (replayed.loss, replayed.grad_norm) == (replayed.seen_loss, replayed.seen_grad_norm)
    assert sum(sequence.loss for sequence in replayed.sequences) == pytest.approx(replayed.loss, rel=1e-5)


def test_only_what_is_on_is_in_the_name_and_in_the_variant(whole: Path, prepared: Path, tmp_path: Path) -> None:
    def made(*words: str) -> LladaCLI:
        return LladaCLI(fit_arguments("arm", prepared, tmp_path, *words), execute=False)

    plain = made()
    arguments = plain.phases[0].identity["model"]["init_args"]
    assert not {"qk_norm", "z_loss", "dropout", "token_noise"} & set(arguments)
    assert set(arguments["optimizer"]) == {"betas", "eps", "weight_decay"}
    off = ("--model.qk_norm=false", "--model.z_loss=0", "--model.dropout=0", "--model.optimizer.name=adamw")
    assert made(*off).run_name == plain.run_name
    names = [plain.run_name, *(made(*words).run_name for words in SWITCHES.values())]
    assert len(set(names)) == len(names)
    assert record(whole)["variant"] == (
        "dropout=0.1;optimizer.decay_embeddings=false;qk_norm=true;token_noise=0.2;z_loss=0.001"
    )


@pytest.mark.parametrize(
    ("words", "variant"),
    [
        (
            ("--model.optimizer.name=muon", "--model.optimizer.weight_decay=0", "--model.optimizer.muon.momentum=0.9"),
            "optimizer.muon.momentum=0.9;optimizer.name=muon;optimizer.weight_decay=0",
        ),
        (
            ("--model.optimizer.name=torch.optim.NAdam", "--model.optimizer.arguments={betas: [0.9, 0.99]}"),
            "optimizer.arguments.betas=[0.9,0.99];optimizer.name=torch.optim.NAdam",
        ),
    ],
    ids=["muon", "nadam"],
)
def test_an_optimizer_is_named_in_the_variant(
    words: tuple[str, ...], variant: str, prepared: Path, tmp_path: Path
) -> None:
    folder = fit("arm", prepared, tmp_path, "--trainer.max_steps=2", *words)
    assert record(folder)["variant"] == variant
    (folder / "result.json").unlink()
    assert main(["fit", f"--config={folder / 'config.yaml'}"]) == 0, "its own config.yaml names the same run"
    assert record(folder)["variant"] == variant


# --- normalised queries and keys in checkpoints ----------------------------------------------------------------------


def test_normalised_queries_and_keys_are_a_part_of_the_model(
    whole: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loaded from a run and from a converted folder alike; sampled from, scored, and started from."""
    gains = {
        name: value for name, value in weights(whole, 12).items() if name.endswith(("q_norm.weight", "k_norm.weight"))
    }
    assert len(gains) == 4 and all(bool((gain != 1).any()) for gain in gains.values())
    assert main(["convert", str(whole), str(tmp_path / "ours")]) == 0
    run, folder = load_model(whole), load_model(tmp_path / "ours")
    tokens_BL = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    assert run.model.qk_norm and torch.equal(run.logits(tokens_BL), folder.logits(tokens_BL))
    with torch.no_grad():
        for block in run.model.blocks:
            block.attention.q_norm.weight.fill_(1.0)  # type: ignore[union-attr, operator]
    assert not torch.equal(run.logits(tokens_BL), folder.logits(tokens_BL))
    [scored] = log_likelihood(folder, [([5, 6], [7, 8, 9])])
    logits_LV = folder.logits(torch.tensor([[folder.eos_token_id, 5, 6, 7, 8]]))[0].clone()
    if folder.excluded_token_id is not None:
        logits_LV[:, folder.excluded_token_id] = -torch.inf
    expected = logits_LV.log_softmax(-1)[[2, 3, 4], [7, 8, 9]].sum()
    assert scored.mean == pytest.approx(float(expected), rel=1e-4)
    out = generate(folder, [[5, 6, 7]], length=4)
    assert out.tokens
    capsys.readouterr()
    assert main(["convert", str(whole), str(tmp_path / "theirs"), "--to", "hf-llama"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "normalises queries and keys (qk_norm), and a Hugging Face Llama has no such norm; choose --to llada" in line
    assert not (tmp_path / "theirs").exists()
    begun = fit("arm", prepared, tmp_path / "begun", f"--model.weights={whole}", "--model.shape=443k", *NO_STEP)
    first = weights(begun, 1)
    assert all(torch.equal(first[name], value) for name, value in weights(whole, 12).items())
    assert "qk_norm=true" in record(begun)["variant"]


NO_STEP = ("--trainer.max_steps=1", "--model.schedule.warmup_steps=1", "--model.schedule.decay_steps=0")
"""The first rate is 0, so that the weights stay."""


# --- the modules by themselves ---------------------------------------------------------------------------------------


def module(kind: type[LanguageModule], **settings: Any) -> LanguageModule:
    made = kind(SHAPE, vocab_size=VOCAB, mask_token_id=MASK, eos_token_id=EOS, **settings)
    made.configure_model()
    return made


def batches() -> tuple[TrainingBatch, ValidationBatch]:
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(1, MASK, (4, LENGTH), generator=generator)
    masked_BL = torch.rand(4, LENGTH, generator=generator) < 0.5
    masked_BL[:, 0] = True
    ordinals_B, documents_B = torch.arange(10, 14), torch.arange(4)
    scored, size = scored_positions(masked_BL), 4 * LENGTH
    training = TrainingBatch(tokens_BL, None, masked_BL, torch.full((4,), 0.5), ordinals_B, *scored, float(size), size)
    return training, ValidationBatch(tokens_BL, masked_BL, torch.ones(4, dtype=torch.bool), documents_B)


@pytest.mark.parametrize("kind", [ArmModule, LladaModule])
def test_validation_drops_nothing_and_training_does(kind: type[LanguageModule]) -> None:
    plain, dropping = module(kind), module(kind, dropout=0.3)
    training, validation = batches()
    assert torch.equal(plain.sequence_nll(validation), dropping.eval().sequence_nll(validation))
    dropping.train()
    loss = dropping.training_loss(training)
    assert loss != plain.training_loss(training)
    parts = [dropping.training_loss(training.rows(slice(row, row + 1))) for row in range(4)]
    torch.testing.assert_close(torch.stack(parts).sum(), loss)
    assert module(kind, dropout=0.3, seed=1).training_loss(training) != loss


@pytest.mark.parametrize("loss", ["chunked", "plain"])
@pytest.mark.parametrize("kind", [ArmModule, LladaModule])
def test_the_z_loss_is_no_part_of_the_reported_loss(kind: type[LanguageModule], loss: Any) -> None:
    plain, drifting = module(kind), module(kind, z_loss=0.1)
    for each in (plain, drifting):
        each.speed.loss = loss
    training, _ = batches()
    values = [each.training_loss(training) for each in (plain, drifting)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
    gradients = [
        torch.autograd.grad(v, each.model.head.weight)[0] for v, each in zip(values, (plain, drifting), strict=True)
    ]
    assert float((gradients[0] - gradients[1]).norm()) > 1e-2 * float(gradients[0].norm())


def test_an_objective_that_gives_no_ordinals_is_refused_instead_of_trained_without_dropout() -> None:
    dropping = module(ArmModule, dropout=0.3)
    with pytest.raises(
        UserError, match=r"model.dropout: 0.3 given, but the training loss of arm gives .* no ordinals_B"
    ):
        dropping.hidden_after((EOS,), batches()[0].tokens_BL, None, causal=True)


@pytest.mark.parametrize(
    ("kind", "settings", "complaint"),
    [
        (ArmModule, {"dropout": 1.0}, r"model.dropout: 1.0 given; it must lie in \[0, 1\)"),
        (ArmModule, {"token_noise": 1.0}, r"model.token_noise: 1.0 given; it must lie in \[0, 1\)"),
        (LladaModule, {"token_noise": 0.1}, "model.token_noise: 0.1 given, but llada corrupts its inputs itself"),
        (ArmModule, {"z_loss": -1e-4}, r"model.z_loss: -0.0001 given; it must lie in \[0, 1\]"),
    ],
)
def test_switches_that_cannot_be(kind: type[LanguageModule], settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        module(kind, **settings)
