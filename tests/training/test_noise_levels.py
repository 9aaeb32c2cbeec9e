"""The loss by noise level: by hand, the same however a batch is cut, and through interruptions and restarts."""

from __future__ import annotations

import math
import signal
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.run_state import curve
from helpers.tiny_runs import fit, fit_process, kill_at, metrics
from llada_lightning.model.patterns import block_causal
from llada_lightning.objectives import block, llada
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch, scored_positions
from llada_lightning.objectives.forward_process import drawn_ratio, mask_probability, random_mask, validation_mask
from llada_lightning.records import NOISE_LEVELS, level_columns
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.modules import ArmModule, BlockDiffusionModule, LladaModule
from llada_lightning.training.noise_levels import UNITS_PER_NAT, LevelLosses

CPU = torch.device("cpu")
LENGTH, VOCAB_SIZE, MASK, EOS, ROWS = 12, 20, 19, 18, 5
SHAPE = {"n_layers": 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 32}
KINDS = [(LladaModule, None), (BlockDiffusionModule, 4), (BlockDiffusionModule, 5), (BlockDiffusionModule, 1)]
"""Modules with their block lengths, of which one does not divide the length, as in fine-tuning."""


# --- the sums --------------------------------------------------------------------------------------------------------


def test_the_columns_are_named_by_the_middles_of_the_bins() -> None:
    assert level_columns("train")[:2] == ("train_nats_at_t05", "train_nats_at_t15")
    assert level_columns("val")[-1] == "val_nats_at_t95" and len(level_columns("val")) == NOISE_LEVELS


def test_a_bin_holds_its_upper_end_and_one_without_tokens_is_left_out() -> None:
    levels = LevelLosses("val")
    levels.add(torch.tensor([1e-3, 0.1, 0.11, 0.7, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    levels.add(torch.arange(1, 11) / 10, torch.zeros(10), torch.tensor([1, *[0] * 9]))
    found = levels.take(CPU)
    assert found == {"val_nats_at_t05": 1.0, "val_nats_at_t15": 3.0, "val_nats_at_t65": 4.0, "val_nats_at_t95": 5.0}
    assert levels.take(CPU) == {}


def test_sums_over_tokens_count_as_the_tokens() -> None:
    each, sums = LevelLosses("train"), LevelLosses("train")
    each.add(torch.tensor([0.25, 0.25, 0.25, 0.85]), torch.tensor([1.0, 2.0, 6.0, 4.0]))
    nats_N = torch.tensor([9.0, 4.0], dtype=torch.float64)
    sums.add(torch.tensor([0.25, 0.85]), nats_N, torch.tensor([3, 1]))
    assert torch.equal(each.totals(CPU), sums.totals(CPU))
    assert sums.take(CPU) == {"train_nats_at_t25": 3.0, "train_nats_at_t85": 4.0}
    assert nats_N.tolist() == [9.0, 4.0], "what is handed over stays as it is"
    for _ in range(40):  # more often than is summed up at once
        sums.add(torch.tensor([0.5]), torch.tensor([0.25]))
    assert sums.totals(CPU).sum(dim=1).tolist() == [10 * UNITS_PER_NAT, 40]


@given(st.lists(st.tuples(st.floats(1e-3, 1), st.floats(0, 60, width=32)), min_size=1, max_size=40), st.randoms())
def test_the_sums_do_not_depend_on_the_order_or_on_the_cuts(tokens: list[tuple[float, float]], random: object) -> None:
    together, cut = LevelLosses("train"), LevelLosses("train")
    together.add(*torch.tensor(tokens).T.contiguous())
    shuffled = random.sample(tokens, len(tokens))  # type: ignore[attr-defined]
    middle = random.randint(0, len(tokens))  # type: ignore[attr-defined]
    for part in (shuffled[:middle], shuffled[middle:]):
        cut.add(*torch.tensor(part).reshape(-1, 2).T.contiguous())
        saved = cut.totals(CPU)
        cut = LevelLosses("train")
        cut.go_on_from(saved, first=True)
    units_T, tokens_T = together.totals(CPU)
    assert torch.equal(cut.totals(CPU), torch.stack([units_T, tokens_T]))
    assert tokens_T.sum() == len(tokens)
    total = math.fsum(np.float32(nats) for _, nats in tokens)
    assert float(units_T.sum()) / UNITS_PER_NAT == pytest.approx(total, abs=len(tokens) / UNITS_PER_NAT)
    assert cut.take(CPU) == together.take(CPU)


def test_a_loss_that_is_no_number_shows_in_its_own_bin() -> None:
    levels = LevelLosses("train")
    levels.add(torch.tensor([0.35, 0.95, 0.95]), torch.tensor([2.0, math.nan, 1.0]))
    found = levels.take(CPU)
    assert found["train_nats_at_t35"] == 2.0 and math.isnan(found["train_nats_at_t95"])
    levels.add(torch.tensor([0.95]), torch.tensor([1.0]))
    assert levels.take(CPU) == {"train_nats_at_t95": 1.0}


# --- by hand ---------------------------------------------------------------------------------------------------------


def module(kind: type[LanguageModule], block_length: int | None, **settings: Any) -> LanguageModule:
    blocks = {} if block_length is None else {"block_length": block_length}
    made = kind(SHAPE, VOCAB_SIZE, MASK, EOS, seed=3, **blocks, **settings)
    made.configure_model()
    return made


def batches(block_length: int | None, responses: bool) -> tuple[TrainingBatch, ValidationBatch]:
    """The last row of validation only fills up the batch; with responses, only the tokens from the fourth on are
    noised, and the last two of each second row are padding."""
    n_B, positions_L = np.arange(40, 40 + ROWS), torch.arange(LENGTH)
    tokens_BL = torch.from_numpy(np.random.default_rng(5).integers(EOS, size=(ROWS, LENGTH)))
    t_B, _ = drawn_ratio(5, n_B, "weyl", None, ROWS, block_length, LENGTH)
    p_B = mask_probability(t_B)
    masked_BL = torch.from_numpy(random_mask(5, n_B, p_B, LENGTH, block_length))
    for_validation_BL = torch.from_numpy(validation_mask(5, n_B, LENGTH, block_length))
    response_BL = real_BL = lengths_B = None
    if responses:
        real_BL = positions_L < torch.tensor([LENGTH, LENGTH - 2, LENGTH, LENGTH - 2, LENGTH])[:, None]
        response_BL = real_BL & (positions_L >= 3)
        lengths_B = response_BL.sum(dim=1)
        masked_BL, for_validation_BL = masked_BL & response_BL, for_validation_BL & response_BL
        for row_L, own_L in zip(for_validation_BL, response_BL, strict=True):
            for begin in range(0, LENGTH, block_length or LENGTH):  # at least one token of each block of a response
                of_block = slice(begin, begin + (block_length or LENGTH))
                if not row_L[of_block].any():
                    row_L[of_block] = own_L[of_block]
    scored_M, scored = scored_positions(masked_BL)
    training = TrainingBatch(
        tokens_BL, real_BL, masked_BL, torch.from_numpy(p_B).float(), torch.from_numpy(n_B), scored_M, scored,
        float(ROWS), ROWS * LENGTH, response_BL=response_BL, response_lengths_B=lengths_B,
    )  # fmt: skip
    counted_B = torch.arange(ROWS) < ROWS - 1
    validation = ValidationBatch(
        tokens_BL, for_validation_BL, counted_B, torch.arange(ROWS), None, real_BL, response_BL
    )
    return training, validation


def nll_of_row(made: LanguageModule, tokens_L: Tensor, masked_L: Tensor, block_length: int | None) -> dict[int, float]:
    """The negative log-likelihood of each masked token of a sequence without padding, a pass for each block."""
    width, found = block_length or len(tokens_L), {}
    for begin in range(0, len(tokens_L), width):
        end = min(begin + width, len(tokens_L))
        noisy_L = tokens_L[:end].masked_fill(masked_L[:end] & (torch.arange(end) >= begin), MASK)
        logits_LV = made.model(noisy_L[None], causal=False, pattern=block_causal(width))[0].detach()
        logits_LV[:, MASK] = -torch.inf
        log_p_LV = logits_LV.double().log_softmax(-1)
        found |= {i: -float(log_p_LV[i, tokens_L[i]]) for i in range(begin, end) if masked_L[i]}
    return found


def means(values: Iterable[tuple[float, float]], split: str) -> dict[str, float]:
    """The mean of the values of each bin by its column, from pairs of a level and a value."""
    of_bin: dict[int, list[float]] = defaultdict(list)
    for level, value in values:
        of_bin[math.ceil(round(10 * level, 6)) - 1].append(value)
    return {f"{split}_nats_at_t{10 * n + 5:02d}": sum(own) / len(own) for n, own in of_bin.items()}


@pytest.mark.parametrize("responses", [False, True])
@pytest.mark.parametrize(("kind", "block_length"), KINDS)
def test_training_and_validation_by_hand(kind: type[LanguageModule], block_length: int | None, responses: bool) -> None:
    made = module(kind, block_length)
    training, validation = batches(block_length, responses)
    loss, nll_B = made.training_loss(training), made.sequence_nll(validation)
    expected: dict[str, list[tuple[float, float]]] = {"train": [], "val": []}
    width = block_length or LENGTH
    for row in range(ROWS):
        length = LENGTH if training.attention_mask_BL is None else int(training.attention_mask_BL[row].sum())
        tokens_L, may_L = training.tokens_BL[row, :length], torch.ones(length, dtype=torch.bool)
        if training.response_BL is not None:
            may_L = training.response_BL[row, :length]
        p_K = training.p_B[row].reshape(-1)
        for i, nats in nll_of_row(made, tokens_L, training.masked_BL[row, :length], block_length).items():
            expected["train"].append((float(p_K[i // width]), nats))
        masked_L = validation.masked_BL[row, :length]
        if row == ROWS - 1:
            continue
        for i, nats in nll_of_row(made, tokens_L, masked_L, block_length).items():
            of_block = slice(i // width * width, (i // width + 1) * width)
            expected["val"].append((int(masked_L[of_block].sum()) / int(may_L[of_block].sum()), nats))
    for split, levels in (("train", made.train_levels), ("val", made.val_levels)):
        own = expected[split]
        units_T, tokens_T = levels.totals(CPU)
        mean = float(units_T.sum() / tokens_T.sum()) / UNITS_PER_NAT
        assert tokens_T.sum() == len(own)
        assert mean == pytest.approx(sum(nats for _, nats in own) / len(own), abs=1e-5)
        assert levels.take(CPU) == pytest.approx(means(own, split), abs=1e-5)

    # What is handed over changes no bit of a loss.
    if block_length is None:
        again = llada.training_loss(made, training), llada.sequence_nll(made, validation)
    else:
        again = block.training_loss(made, training, block_length), block.sequence_nll(made, validation, block_length)
    assert torch.equal(again[0], loss) and torch.equal(again[1], nll_B)
    assert made.train_levels.take(CPU) == made.val_levels.take(CPU) == {}


@pytest.mark.parametrize(("kind", "block_length"), KINDS[:2])
def test_the_weight_of_the_loss_is_not_in_its_values(kind: type[LladaModule], block_length: int | None) -> None:
    training, _ = batches(block_length, responses=False)
    dense = training._replace(density_B=torch.full_like(training.p_B, 1.5))
    given = ({}, {"loss_weight": "ce"}, {"loss_weight": "clipped", "loss_weight_limit": 2.0})
    made = [module(kind, block_length, **weight) for weight in given]
    losses = [float(each.training_loss(dense).detach()) for each in made]
    assert len(set(losses)) == len(losses)
    made[0].training_loss(training)
    [first, *others] = [each.train_levels.totals(CPU) for each in made]
    assert all(torch.equal(2 * other, first) for other in others)  # the first had the batch twice


def test_an_objective_that_hands_over_nothing_has_no_losses_by_level() -> None:
    class Own(LanguageModule):
        """Masked diffusion in a module of one's own, with the functions of `llada`."""

        objective = "llada"
        sequence_nll = llada.sequence_nll

        def training_loss(self, batch: TrainingBatch) -> Tensor:
            return llada.training_loss(self, batch)

    made, (training, validation) = module(Own, None), batches(None, responses=False)
    made.training_loss(training)
    made.sequence_nll(validation)
    assert not made.by_noise_level and not ArmModule.by_noise_level
    assert made.train_levels.take(CPU) == made.val_levels.take(CPU) == {}


# --- runs ------------------------------------------------------------------------------------------------------------

SPARSE = ("--trainer.log_every_n_steps=4", "--run.checkpoint_every_steps=5", "--trainer.val_check_interval=6")
"""Checkpoints lie within the windows of the log."""
BOTH = (*level_columns("train"), *level_columns("val"))


def by_level(folder: Path) -> list[dict[str, float]]:
    return [{name: float(row[name]) for name in BOTH if row[name]} for row in metrics(folder)]


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process; a row of the log is a window of four steps."""
    return fit("llada", prepared, tmp_path_factory.mktemp("levels"), *SPARSE)


def test_the_log_has_training_windows_and_validations(run: Path) -> None:
    rows = metrics(run)
    assert tuple(rows[0])[-len(BOTH) :] == BOTH
    assert [int(row["step"]) for row in rows] == [4, 6, 8, 12, 16, 18, 20, 24]
    trained = [any(row[name] for name in level_columns("train")) for row in rows]
    validated = [any(row[name] for name in level_columns("val")) for row in rows]
    assert trained == [bool(row["train_nats_per_token"]) for row in rows]
    assert validated == [bool(row["val_nats_per_token"]) for row in rows]
    # The bound of Eq. 14 is the mean over l of the nats per masked token: 24 sequences have 2 or 3 of them in each bin.
    last = [float(rows[-1][name]) for name in level_columns("val")]
    assert sum(last) / len(last) == pytest.approx(float(rows[-1]["val_nats_per_token"]), abs=0.3)


def test_a_window_lies_between_its_steps(run: Path, prepared: Path, tmp_path: Path) -> None:
    every_step = by_level(fit("llada", prepared, tmp_path, *SPARSE, "--trainer.log_every_n_steps=1"))
    windows = {int(row["step"]): found for row, found in zip(metrics(run), by_level(run), strict=True)}
    for step in range(4, 25, 4):
        for name in level_columns("train"):
            values = [row[name] for row in every_step[step - 4 : step] if name in row]
            assert (name in windows[step]) == bool(values)
            if values:
                assert min(values) - 1e-9 <= windows[step][name] <= max(values) + 1e-9


@pytest.mark.parametrize(("objective", "step"), [("llada", 17), pytest.param("block", 13, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_within_a_window_to_the_same_bits(
    prepared: Path, run: Path, tmp_path: Path, objective: str, step: int
) -> None:
    whole = run if objective == "llada" else fit(objective, prepared, tmp_path / "whole", *SPARSE)
    killed = fit_process(objective, prepared, tmp_path / "killed", *SPARSE, kill_at(step))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = fit(objective, prepared, tmp_path / "killed", *SPARSE)
    assert curve(folder) == curve(whole)
    assert all(any(name in row for name in BOTH) for row in by_level(folder))


def test_micro_batches_and_loader_processes_do_not_matter(run: Path, prepared: Path, tmp_path: Path) -> None:
    halves = ("--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=12", "--data.workers=1")
    cut = fit("llada", prepared, tmp_path, *SPARSE, *halves)
    for found, expected in zip(by_level(cut), by_level(run), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_two_processes_are_one_and_go_on_after_a_kill(run: Path, prepared: Path, tmp_path: Path) -> None:
    two = (*SPARSE, "--trainer.devices=2", "--trainer.strategy=ddp")
    done = fit_process("llada", prepared, tmp_path / "two", *two)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "two" / "test" / "run"
    for found, expected in zip(by_level(whole), by_level(run), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert fit_process("llada", prepared, tmp_path / "killed", *two, kill_at(17)).returncode != 0
    assert fit_process("llada", prepared, tmp_path / "killed", *two).returncode == 0
    assert curve(tmp_path / "killed" / "test" / "run") == curve(whole)


@pytest.mark.slow
def test_shards_keep_the_window_too(run: Path, prepared: Path, tmp_path: Path) -> None:
    two = (*SPARSE, "--trainer.devices=2", "--trainer.strategy=fsdp2")
    assert fit_process("llada", prepared, tmp_path, *two, kill_at(17)).returncode != 0
    folder = fit("llada", prepared, tmp_path, *SPARSE)  # on one process from there on
    for found, expected in zip(by_level(folder), by_level(run), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_held_out_corpora_are_left_out_and_arm_has_no_columns(
    run: Path, prepared: Path, prepared_second: Path, tmp_path: Path
) -> None:
    both = fit("llada", prepared, tmp_path, *SPARSE, f"--data.held_out={{more: {prepared_second}}}")
    assert by_level(both) == by_level(run)
    assert "held_out_nats_per_token/more" in metrics(both)[0]
    arm = fit("arm", prepared, tmp_path / "arm", "--trainer.max_steps=2")
    assert not set(metrics(arm)[0]) & set(BOTH)


def test_a_log_and_a_checkpoint_of_an_earlier_version_go_on(run: Path, prepared: Path, tmp_path: Path) -> None:
    """The columns are added; of the window in which the run goes on, the steps from there on are known."""
    begun = fit_process("llada", prepared, tmp_path, *SPARSE, kill_at(17))
    assert begun.returncode == -signal.SIGKILL
    folder = tmp_path / "test" / "run"
    checkpoint = folder / "checkpoints" / "step=00000015.ckpt"
    content = torch.load(checkpoint)
    assert content.pop("train_levels").shape == (2, NOISE_LEVELS)
    torch.save(content, checkpoint)
    lines = [line.split(",")[: -len(BOTH)] for line in (folder / "metrics.csv").read_text().splitlines()]
    (folder / "metrics.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    fit("llada", prepared, tmp_path, *SPARSE)
    known = [bool(row) for row in by_level(folder)]
    assert known == [int(row["step"]) >= 16 for row in metrics(folder)]
    assert by_level(folder)[-3:] == by_level(run)[-3:]
    kept = ("step", "train_nats_per_token", "val_nats_per_token")
    assert [[row[key] for key in kept] for row in metrics(folder)] == [[row[k] for k in kept] for row in metrics(run)]
