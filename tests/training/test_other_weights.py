"""Masked and block diffusion from the weights of an `arm`: what is taken over, shifted, opened, counted and refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from helpers.small_checkpoints import BOS, changed_config, tokenizer_folder, written
from helpers.tiny_runs import fit, fit_arguments, fit_process, kill_at, losses, record, weights
from llada_lightning import load_model, log_likelihood
from llada_lightning.checkpoints.stored_model import open_checkpoint
from llada_lightning.commands.main import main
from llada_lightning.compute.schedule import WSD
from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.data.prepare import prepare
from llada_lightning.evaluation.policy import POLICIES, Policy
from llada_lightning.model.patterns import window_ahead
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch, scored_positions
from llada_lightning.support.errors import UserError
from llada_lightning.training.cli import LladaCLI
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.modules import ArmModule, BlockDiffusionModule, LladaModule
from llada_lightning.training.replay import replay_step
from llada_lightning.training.validation import policy_nll

SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
EOS, MASK, VOCAB, LENGTH = 0, 22, 23, 12
SHIFT, OPEN = "--model.shift_targets=true", "--model.open_attention_steps=9"
SHORT = ("--trainer.max_steps=12", "--run.checkpoint_every_steps=3")
NO_STEP = ("--trainer.max_steps=1", "--model.schedule.warmup_steps=1", "--model.schedule.decay_steps=0")
"""The first rate is 0, so that the weights stay."""


# --- the modules by themselves ---------------------------------------------------------------------------------------


def module(kind: type[LanguageModule], step: int = 0, **settings: Any) -> LanguageModule:
    """A module with the weights that all modules here have, after ``step`` optimizer steps."""
    made = kind(SHAPE, vocab_size=VOCAB, mask_token_id=MASK, eos_token_id=EOS, seed=3, **settings)
    made.configure_model()
    with torch.no_grad():
        made.model.head.weight *= 4
    made._trainer = SimpleNamespace(global_step=step, datamodule=SimpleNamespace(sequence_length=LENGTH))  # type: ignore[assignment]
    return made


def batches(masked: bool = True, documents: bool = False) -> tuple[TrainingBatch, ValidationBatch]:
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(1, MASK, (4, LENGTH), generator=generator)
    masked_BL = (torch.rand(4, LENGTH, generator=generator) < 0.5) & masked
    masked_BL[:, 0] = masked
    documents_BL = (torch.arange(LENGTH) >= 5).long().expand(4, -1) if documents else None
    scored, size, p_B = scored_positions(masked_BL), 4 * LENGTH, torch.full((4,), 0.5)
    training = TrainingBatch(
        tokens_BL, None, masked_BL, p_B, torch.arange(4), *scored, float(size), size, documents_BL=documents_BL
    )
    counted_B = torch.ones(4, dtype=torch.bool)
    return training, ValidationBatch(tokens_BL, masked_BL, counted_B, torch.arange(4), documents_BL)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("prefix", [None, [7], [7, 8]])
def test_a_causal_pass_with_shifted_targets_and_no_mask_is_that_of_arm(
    prefix: list[int] | None, documents: bool
) -> None:
    batch, _ = batches(masked=False, documents=documents)
    arm = module(ArmModule, text_prefix_ids=prefix)
    shifted = module(LladaModule, text_prefix_ids=prefix, shift_targets=True, open_attention_steps=100)
    start_ids = shifted.start_ids(batch)
    assert start_ids == arm.start_ids(batch) == tuple(prefix or [EOS])
    inputs_BL = torch.cat([batch.tokens_BL.new_full((4, 1), start_ids[-1]), batch.tokens_BL[:, :-1]], dim=1)
    theirs = arm.hidden_after(start_ids[:-1], inputs_BL, batch.documents_BL, causal=True)
    given = (start_ids, batch.tokens_BL, batch.documents_BL)
    ours = shifted.hidden_after(*given, causal=False, ordinals_B=batch.ordinals_B)
    torch.testing.assert_close(shifted.model.head(ours), arm.model.head(theirs))
    opened = shifted.eval().hidden_after(*given, causal=False)
    assert (opened - theirs).abs().max() > 1e-3, "full attention, as in validation, sees more"


def logits_at(
    made: LanguageModule, start: list[int], noisy_BL: Tensor, shift: int, mask: Tensor | None = None
) -> Tensor:
    """(B, L, V) log-probabilities of each token at its place, by a pass with a dense mask."""
    whole_BL = torch.cat([torch.tensor([start], dtype=torch.long).expand(4, -1), noisy_BL], dim=1)
    pattern = None if mask is None else (lambda b, h, q, kv: mask[q, kv])
    hidden_BLD = made.model.hidden(whole_BL, causal=False, pattern=pattern)[:, len(start) - shift :][:, :LENGTH]
    return made.model.head(hidden_BLD).index_fill(2, torch.tensor(MASK), -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_loss_is_that_of_the_position_before_by_hand(shift: int) -> None:
    made, (training, validation) = module(LladaModule, shift_targets=bool(shift)), batches()
    log_p_BLV = logits_at(made, [EOS] * shift, training.tokens_BL.masked_fill(training.masked_BL, MASK), shift)
    nll_BL = -log_p_BLV.gather(2, training.tokens_BL[..., None])[..., 0] * training.masked_BL
    torch.testing.assert_close(made.training_loss(training), nll_BL.sum() / 0.5 / (4 * LENGTH))
    expected_B = nll_BL.double().sum(1) * LENGTH / validation.masked_BL.sum(1)
    torch.testing.assert_close(made.sequence_nll(validation), expected_B, atol=1e-4, rtol=0)


@pytest.mark.parametrize("step", [0, 1, 5, 8, 9])
def test_attention_opens_by_the_step_and_validation_sees_all(step: int) -> None:
    made, (training, validation) = module(LladaModule, step, open_attention_steps=8, shift_targets=True), batches()
    window = LENGTH * step // 8
    i = torch.arange(LENGTH + 1)
    log_p_BLV = logits_at(
        made, [EOS], training.tokens_BL.masked_fill(training.masked_BL, MASK), 1, i <= i[:, None] + window
    )
    nll_BL = -log_p_BLV.gather(2, training.tokens_BL[..., None])[..., 0] * training.masked_BL
    torch.testing.assert_close(made.training_loss(training), nll_BL.sum() / 0.5 / (4 * LENGTH))
    full = module(LladaModule, shift_targets=True)
    assert torch.equal(made.eval().sequence_nll(validation), full.sequence_nll(validation))
    assert (made.training_loss(training) == full.training_loss(training)) == (step >= 8)


def test_the_blocks_of_block_diffusion_open_up_to_their_length() -> None:
    training, validation = batches()
    p_BK = training.p_B[:, None].expand(-1, 3)
    training = training._replace(p_B=p_BK)
    losses_by_step = {}
    for step in range(6):
        made = module(BlockDiffusionModule, step, block_length=4, open_attention_steps=4)
        losses_by_step[step] = float(made.training_loss(training).detach())
    full = module(BlockDiffusionModule, block_length=4)
    assert losses_by_step[4] == losses_by_step[5] == float(full.training_loss(training).detach())
    # A window of 3 of 4 is full within a block.
    assert losses_by_step[3] == pytest.approx(losses_by_step[4], rel=1e-5)
    assert len({round(losses_by_step[step], 5) for step in range(4)}) == 4
    assert torch.equal(made.eval().sequence_nll(validation), full.sequence_nll(validation))
    # At first each token sees what is before it in its block, and the clean blocks before.
    causal = module(BlockDiffusionModule, 0, block_length=4, open_attention_steps=4)
    q, kv = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    noisy_BL, total = training.tokens_BL.masked_fill(training.masked_BL, MASK), torch.zeros(())
    for k in range(3):
        seen_BL = torch.where(kv // 4 < k, training.tokens_BL, noisy_BL)
        log_p_BLV = logits_at(causal, [], seen_BL, 0, kv <= q)
        nll_BL = -log_p_BLV.gather(2, training.tokens_BL[..., None])[..., 0] * training.masked_BL
        total = total + nll_BL[:, 4 * k : 4 * k + 4].sum()
    assert losses_by_step[0] == pytest.approx(float(total.detach()) / 0.5 / (4 * LENGTH), rel=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_the_likelihood_of_a_policy_in_validation_is_that_of_scoring(name: str, tmp_path: Path) -> None:
    made, (_, validation) = module(LladaModule, shift_targets=True), batches()
    from helpers.small_models import shifted_model

    lm = shifted_model(vocab_size=VOCAB, mask_token_id=MASK, eos_token_id=EOS)
    lm = type(lm)(**{**vars(lm), "model": made.model.eval(), "start_token_id": EOS, "end_token_ids": (EOS,)})
    with torch.no_grad():
        mine_B = policy_nll(made, validation, Policy(name, 2))
    scores = log_likelihood(lm, [([], row) for row in validation.tokens_BL.tolist()], policy=Policy(name, 2))
    assert mine_B.tolist() == pytest.approx([-score.mean for score in scores], abs=2e-4)


def test_an_objective_that_gives_no_ordinals_is_refused_instead_of_trained_with_full_attention() -> None:
    made = module(LladaModule, open_attention_steps=5)
    with pytest.raises(UserError, match=r"model.open_attention_steps: 5 given, but the training loss of llada gives"):
        made.hidden_after((), batches()[0].tokens_BL, None, causal=False)


def test_the_window_is_a_function_of_the_step() -> None:
    assert [window_ahead(step, 4, 10) for step in range(6)] == [0, 2, 5, 7, None, None]
    assert window_ahead(0, 0, 10) is None
    windows = [window_ahead(step, 1000, 7) for step in range(1000)]
    assert windows == sorted(windows) and set(windows) == set(range(7))  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("kind", "settings", "complaint"),
    [
        (ArmModule, {"shift_targets": True}, "shift_targets: true given, but arm predicts the next token already; le"),
        (
            ArmModule,
            {"open_attention_steps": 9},
            "open_attention_steps: 9 given, but the attention of arm stays causal",
        ),
        (
            LladaModule,
            {"open_attention_steps": -1},
            "open_attention_steps: -1 given; it must be at least 0, and 0 is f",
        ),
        (
            BlockDiffusionModule,
            {"shift_targets": True},
            "shift_targets: true given, but block would predict the first token of a block from the clean token before",
        ),
    ],
)
def test_switches_that_cannot_be(kind: type[LanguageModule], settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=rf"^model.{complaint}"):
        module(kind, **settings)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arm(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps."""
    return fit("arm", prepared, tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="module")
def opened(arm: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llada` from its weights, with shifted targets and attention that opens over 9 of 12 steps."""
    root = tmp_path_factory.mktemp("opened")
    return fit("llada", prepared, root, f"--model.weights={arm}", SHIFT, OPEN, *SHORT)


def test_the_weights_are_taken_and_mask_becomes_the_mean_of_all_others(
    arm: Path, prepared: Path, tmp_path: Path
) -> None:
    theirs, mask = weights(arm), load_model(arm).mask_token_id
    assert mask is not None
    others = torch.arange(record(arm)["vocab_size"]) != mask
    for objective in ("llada", "block"):
        begun = fit(objective, prepared, tmp_path / objective, f"--model.weights={arm}", *NO_STEP)
        for name, value in weights(begun, 1).items():
            if name in ("model.embedding.weight", "model.head.weight"):
                assert torch.equal(value[others], theirs[name][others])
                torch.testing.assert_close(value[mask], theirs[name][others].mean(0))
            else:
                assert torch.equal(value, theirs[name])
    lm = load_model(begun)
    assert (lm.start_token_id, lm.text_prefix_ids, lm.shift_targets) == (None, (), False)
    back = fit("llada", prepared, tmp_path / "back", f"--model.weights={begun}", *NO_STEP)
    assert all(torch.equal(value, weights(begun, 1)[name]) for name, value in weights(back, 1).items())
    assert record(back)["variant"] == "weights=block", "what has learned [MASK] keeps it"


def test_the_record_tells_what_it_began_as_and_what_that_cost(arm: Path, opened: Path, tmp_path: Path) -> None:
    first, second = record(arm), record(opened)
    assert first["source_flops"] is None and first["variant"] is None
    assert second["variant"] == "open_attention_steps=9;shift_targets=true;weights=arm"
    assert second["source_flops"] == first["flops_6nd"] > 0
    assert open_checkpoint(opened).description.source["flops_6nd"] == first["flops_6nd"] + second["flops_6nd"]
    assert main(["convert", str(opened), str(tmp_path / "ours")]) == 0
    told = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert told["source"]["flops_6nd"] == first["flops_6nd"] + second["flops_6nd"] and told["shift_targets"] is True


def test_flops_of_the_source_add_up_and_shifted_targets_stay(opened: Path, prepared: Path, tmp_path: Path) -> None:
    again = fit("llada", prepared, tmp_path, f"--model.weights={opened}", *NO_STEP)
    found = record(again)
    assert found["source_flops"] == record(opened)["source_flops"] + record(opened)["flops_6nd"]
    assert found["variant"] == "shift_targets=true"
    lm = load_model(again)
    assert lm.shift_targets and lm.start_token_id == lm.eos_token_id
    first = weights(again, 1)
    assert all(torch.equal(first[name], value) for name, value in weights(opened, 12).items())


def test_what_validation_measures_is_what_scoring_gives(opened: Path, tmp_path: Path) -> None:
    """The converted folder, too; and a layout that cannot say it refuses in a line."""
    assert main(["convert", str(opened), str(tmp_path / "ours")]) == 0
    run, folder = load_model(opened), load_model(tmp_path / "ours")
    tokens_BL = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    assert run.shift_targets and torch.equal(run.logits(tokens_BL), folder.logits(tokens_BL))
    requests = [([5, 6], [7, 8, 9])]
    assert log_likelihood(run, requests) == log_likelihood(folder, requests)


def test_other_layouts_cannot_say_it(opened: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(opened), str(tmp_path / "theirs"), "--to", "hf-llada"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "predicts a token from the position before it (shift_targets), which a Hugging Face LLaDA cannot say" in line
    assert not (tmp_path / "theirs").exists()


def test_a_run_killed_while_attention_opens_ends_bit_for_bit(
    arm: Path, opened: Path, prepared: Path, tmp_path: Path
) -> None:
    words = (f"--model.weights={arm}", SHIFT, OPEN, *SHORT)
    assert fit_process("llada", prepared, tmp_path, *words, kill_at(7)).returncode == -signal.SIGKILL
    folder = fit("llada", prepared, tmp_path, *words)
    assert losses(folder) == losses(opened)
    mine, theirs = weights(folder, 12), weights(opened, 12)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert record(folder)["val_nats_per_token"] == record(opened)["val_nats_per_token"]


def test_micro_batches_only_cut_the_same_batches(arm: Path, opened: Path, prepared: Path, tmp_path: Path) -> None:
    cut = ("--trainer.accumulate_grad_batches=4", "--data.workers=1", "--speed.recompute=full")
    folder = fit("llada", prepared, tmp_path, f"--model.weights={arm}", SHIFT, OPEN, *SHORT, *cut)
    assert losses(folder) == pytest.approx(losses(opened), abs=1e-5)
    assert record(folder)["run"] == record(opened)["run"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("objective", ["llada", "block"])
def test_two_processes_make_the_same_run(
    objective: str, strategy: str, arm: Path, prepared: Path, tmp_path: Path
) -> None:
    words = (f"--model.weights={arm}", OPEN, *SHORT, *([SHIFT] if objective == "llada" else []))
    one = fit(objective, prepared, tmp_path / "one", *words)
    two = ("--trainer.devices=2", f"--trainer.strategy={strategy}")
    done = fit_process(objective, prepared, tmp_path / "two", *words, *two)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two" / "test" / "run") == pytest.approx(losses(one), abs=1e-5)


def test_a_step_of_the_opening_is_replayed(opened: Path) -> None:
    replayed = replay_step(opened, 5)
    assert (replayed.loss, replayed.grad_norm) == (replayed.seen_loss, replayed.seen_grad_norm)
    assert sum(sequence.loss for sequence in replayed.sequences) == pytest.approx(replayed.loss, rel=1e-5)


def test_only_what_is_on_is_in_the_name(prepared: Path, tmp_path: Path) -> None:
    def made(*words: str) -> LladaCLI:
        return LladaCLI(fit_arguments("llada", prepared, tmp_path, *words), execute=False)

    plain = made()
    assert not {"shift_targets", "open_attention_steps"} & set(plain.phases[0].identity["model"]["init_args"])
    assert made("--model.shift_targets=false", "--model.open_attention_steps=0").run_name == plain.run_name
    assert len({plain.run_name, made(SHIFT).run_name, made(OPEN).run_name}) == 3


def test_a_run_is_validated_by_its_own_config(opened: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--config", str(opened / "config.yaml")]) == 0
    assert f"{record(opened)['val_nats_per_token']:.4f}" in capsys.readouterr().out


# --- a Llama of others -----------------------------------------------------------------------------------------------

LLAMA_SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it comes: no [MASK], BOS before a text, embeddings for its 259 tokens and no more."""
    root = tmp_path_factory.mktemp("llama")
    folder = written(root / "llama", "hf-llama", "arm", vocab_size=259)
    changed_config(folder, llada_lightning=..., bos_token_id=BOS)
    return tokenizer_folder(folder, bos=True, special=("[EOS]", "<turn>", "<bos>"))


@pytest.fixture(scope="module")
def in_its_tokens(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in the tokens of the Llama, with a [MASK] behind them."""
    from helpers.small_corpora import write_corpus

    root = tmp_path_factory.mktemp("bytes")
    tokenizer = {"tokenizer": str(llama), "eos_token": "[EOS]", "add_mask_token": True}
    text = str(write_corpus(root / "text"))
    prepare(text, str(root / "data"), **tokenizer, val_fraction=0.15, shard_tokens=2048, progress=False)
    return root / "data"


def test_a_llama_gets_a_row_for_mask_and_keeps_its_bos(llama: Path, in_its_tokens: Path, tmp_path: Path) -> None:
    shape = "--model.shape=443k"  # the default, which the weights' own replaces
    words = (f"--model.weights={llama}", shape, "--model.shift_targets=true", *NO_STEP)
    begun = fit("llada", in_its_tokens, tmp_path, *words)
    first, source = weights(begun, 1), open_checkpoint(llama).weights
    for name in ("embedding.weight", "head.weight"):
        assert torch.equal(first[f"model.{name}"][:259], source[name].read())
        torch.testing.assert_close(first[f"model.{name}"][259], source[name].read().mean(0))
    lm = load_model(begun)
    assert (lm.mask_token_id, lm.text_prefix_ids, lm.start_token_id) == (259, (BOS,), None)
    assert record(begun)["vocab_size"] == 260 and record(begun)["source_flops"] is None
    assert record(begun)["variant"] == "rope_theta=500000;shift_targets=true;weights=arm"
    (begun / "result.json").unlink()
    assert main(["fit", f"--config={begun / 'config.yaml'}"]) == 0, "its own config.yaml names the same run"
    block = fit("block", in_its_tokens, tmp_path / "block", f"--model.weights={llama}", shape, *NO_STEP)
    assert load_model(block).text_prefix_ids == ()


# --- by a plain Trainer ----------------------------------------------------------------------------------------------


def test_a_plain_trainer_starts_from_an_arm_alike(arm: Path, prepared: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"shift_targets": True, "open_attention_steps": 3, "weights": str(arm)}
    made = LladaModule(schedule=WSD(lr=0.01), **settings)
    data = TokenDataModule(str(prepared), sequence_length=32, global_batch=8, val_sequences=24, random_length_share=0.1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    nothing_else: dict[str, Any] = {**quiet, "enable_checkpointing": False, "limit_val_batches": 0}
    trainer = Trainer(max_steps=4, accelerator="cpu", gradient_clip_val=1.0, **nothing_else)
    trainer.fit(made, data)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    words = (f"--model.weights={arm}", SHIFT, "--model.open_attention_steps=3", "--trainer.max_steps=4")
    command = load_model(fit("llada", prepared, tmp_path, *words))
    mine = load_model(tmp_path / "mine.ckpt")
    tokens_BL = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    assert mine.shift_targets and torch.equal(mine.logits(tokens_BL), command.logits(tokens_BL))


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def fine_tuning(start: Path, root: Path, *extra: str) -> list[str]:
    pairs = root / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"{n}+1", "response": f"{n + 1}"}) + "\n" for n in range(40)))
    return [
        "fit",
        "--model=LladaModule",
        "--data=SftDataModule",
        f"--model.weights={start}",
        f"--data.path={pairs}",
        "--data.context_length=64",
        "--data.global_batch=8",
        "--data.epochs=2",
        "--model.schedule.warmup_steps=1",
        "--model.schedule.lr=0.01",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.log_every_n_steps=1",
        f"--run.root={root}",
        "--run.study=test",
        "--run.name=run",
        *extra,
    ]


@pytest.mark.parametrize("given", [(), (SHIFT, "--model.open_attention_steps=3")])
def test_an_arm_is_fine_tuned_as_llada(given: tuple[str, ...], arm: Path, tmp_path: Path) -> None:
    assert main(fine_tuning(arm, tmp_path, *given)) == 0
    folder = tmp_path / "test" / "run"
    assert losses(folder)[-1] < losses(folder)[0]
    assert record(folder)["source_flops"] == record(arm)["flops_6nd"]
    lm = load_model(folder)
    assert lm.start_token_id == (lm.eos_token_id if given else None)


def test_a_llama_is_fine_tuned_with_one_of_its_tokens_as_mask(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fine_tuning(llama, tmp_path)) == 2
    assert "has no [MASK], which llada needs; name one of its tokens with --data.mask_token" in capsys.readouterr().err
    assert main(fine_tuning(llama, tmp_path, SHIFT, "--data.mask_token=<turn>")) == 0
    lm = load_model(tmp_path / "test" / "run")
    assert (lm.mask_token_id, lm.model.vocab_size, lm.text_prefix_ids, lm.start_token_id) == (257, 259, (BOS,), None)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_line(
    arm: Path,
    opened: Path,
    llama: Path,
    in_its_tokens: Path,
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = fit("llada", prepared, tmp_path / "plain", "--trainer.max_steps=1")
    capsys.readouterr()
    shape, root = "--model.shape=443k", tmp_path / "refused"
    wrong: list[tuple[str, Path, tuple[str, ...], str]] = [
        ("arm", prepared, (f"--model.weights={opened}", shape), f"model.weights: '{opened}' is of llada, not of arm"),
        ("arm", prepared, (SHIFT,), "model.shift_targets: true given, but arm predicts the next token already"),
        ("llada", prepared, (f"--model.weights={arm}", "--model.shape=107k"), "model.shape: 107k is not that of model"),
        (
            "llada",
            prepared,
            (f"--model.weights={llama}", shape),
            f"model.weights: '{llama}' has 259 tokens, and the data's tokenizer has 384; prepare the data with",
        ),
        (
            "llada",
            in_its_tokens,
            (f"--model.weights={arm}", shape),
            f"model.weights: '{arm}' has EOS as token 0, and the data's tokenizer as 256; prepare the data with the",
        ),
        ("llada", prepared, (f"--model.weights={plain}", shape, SHIFT), "model.shift_targets: true given, but model.w"),
        ("block", prepared, (f"--model.weights={plain}", shape, OPEN), "model.open_attention_steps: 9 given, but mode"),
        ("block", prepared, (f"--model.weights={opened}", shape), f"model.weights: '{opened}' predicts a token"),
        ("llada", prepared, ("--model.open_attention_steps=-1",), "model.open_attention_steps: -1 given; it must be "),
        ("llada", prepared, ("--model.open_attention_steps=25",), "model.open_attention_steps: 25 given, but the f"),
        (
            "llada",
            prepared,
            (SHIFT, "--trainer.devices=2", "--trainer.strategy=fsdp2_tp2",
             "--model.shape={n_layers: 2, d_model: 32, n_heads: 2, n_kv_heads: 2, d_ff: 64}"),
            "trainer.strategy: fsdp2_tp2 given, but llada with shift_targets needs whole sequences on each device; use",
        ),
    ]  # fmt: skip
    for objective, data, words, message in wrong:
        assert main(fit_arguments(objective, data, root, *words)) == 2, words
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}"), words
    assert not root.exists()


def test_a_tokenizer_with_other_tokens_is_refused(
    arm: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = json.loads((prepared / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    first, second = sorted(ids, key=ids.__getitem__)[40:42]
    ids[first], ids[second] = ids[second], ids[first]
    from helpers.small_corpora import write_corpus

    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    other = {"tokenizer": str(tmp_path / "tokenizer.json"), "val_fraction": 0.15, "shard_tokens": 2048}
    prepare(str(write_corpus(tmp_path / "text")), str(tmp_path / "data"), **other, progress=False)
    capsys.readouterr()
    words = (f"--model.weights={arm}", "--model.shape=443k")
    assert main(fit_arguments("llada", tmp_path / "data", tmp_path / "runs", *words)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: model.weights: '{arm}' has token {ids[second]} as {first!r}, and the data as")
