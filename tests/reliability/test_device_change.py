"""A run resumes on another number of processes, workers and micro-batches: the same sequences, noise and losses."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.run_state import curve
from helpers.tiny_runs import EVERY_MODEL, fit
from processes import child_environment, start
from small_fits import BATCH, Corpora, fit_words, run_folder

STEPS = 24


@dataclass(frozen=True)
class Leg:
    """One start of a run, and how it ends: in the middle of ``stop_step``, by a signal; None: at the run's end."""

    processes: int
    accumulation: int
    workers: int
    stop_step: int | None = None
    signal_name: str = "SIGTERM"


WHOLE = (Leg(1, 1, 0),)
CHANGED = (Leg(2, 1, 0, stop_step=8), Leg(1, 4, 2, stop_step=17, signal_name="SIGKILL"), Leg(2, 3, 1))
"""The first ends with step 8 saved; the second within step 17, and step 15 is the last that it saved."""


@dataclass(frozen=True)
class Consumed:
    """What a process of a leg trained on in a step: ordinals, and a hash of each one's tokens, t and mask."""

    leg: int
    rank: int
    step: int
    ordinals: list[int]
    noise: list[str]


def logging_to(folder: Path, leg: int = 1, **others: object) -> str:
    arguments = {"folder": str(folder), "leg": leg, **others}
    callback = {"class_path": "helpers.ordinal_log.OrdinalLog", "init_args": arguments}
    return f"--trainer.callbacks={json.dumps([callback])}"


def read_back(folder: Path) -> list[Consumed]:
    return [Consumed(**json.loads(line)) for file in folder.iterdir() for line in file.read_text().splitlines()]


def noise_of(consumed: list[Consumed]) -> dict[int, set[str]]:
    """The hashes under which each ordinal was trained on, repeats included."""
    found: dict[int, set[str]] = defaultdict(set)
    for batch in consumed:
        for ordinal, noise in zip(batch.ordinals, batch.noise, strict=True):
            found[ordinal].add(noise)
    return found


def ordinals_of(consumed: list[Consumed]) -> dict[int, list[int]]:
    """Step -> the ordinals of all ranks, sorted, of the last leg that trained the step."""
    last = {batch.step: batch.leg for batch in sorted(consumed, key=lambda batch: batch.leg)}
    found: dict[int, list[int]] = defaultdict(list)
    for batch in consumed:
        if batch.leg == last[batch.step]:
            found[batch.step] += batch.ordinals
    return {step: sorted(ordinals) for step, ordinals in found.items()}


def test_ordinals_and_noise_of_a_real_run(prepared: Path, tmp_path: Path) -> None:
    """Cut into other micro-batches, each sequence has its noise; with another seed it has another."""
    found = {}
    for name, words in {
        "whole": [],
        "cut": ["--trainer.accumulate_grad_batches=4"],
        "other": ["--seed_everything=1"],
    }.items():
        callbacks = logging_to(tmp_path / name)
        fit("llada", prepared, tmp_path / "runs" / name, "--trainer.max_steps=3", callbacks, *words)
        found[name] = read_back(tmp_path / name)
    assert [len(found[name]) for name in ("whole", "cut")] == [3, 12]
    assert [(batch.step, batch.ordinals) for batch in found["whole"]] == [
        (step, list(range((step - 1) * 8, step * 8))) for step in (1, 2, 3)
    ]
    assert noise_of(found["cut"]) == noise_of(found["whole"])
    assert not any(noise_of(found["other"])[n] & noise_of(found["whole"])[n] for n in range(24))


def run_legs(legs: tuple[Leg, ...], objective: str, strategy: str, corpora: Corpora, root: Path) -> list[Consumed]:
    """Run a run leg by leg; each must end as it should."""
    environment = child_environment(root / "tmp", trusted="helpers")
    for number, leg in enumerate(legs, start=1):
        words = [
            f"--data.workers={leg.workers}",
            f"--data.micro_batch={BATCH // leg.processes // leg.accumulation}",
            f"--trainer.max_steps={STEPS}",
            logging_to(root / "ordinals", number, stop_step=leg.stop_step, signal_name=leg.signal_name),
        ]
        if leg.processes > 1:
            words += [f"--trainer.devices={leg.processes}", f"--trainer.strategy={strategy}"]
        arguments = fit_words(objective, corpora.mixture, root, *words, accumulation=leg.accumulation)
        run = start(arguments, root / "log", environment)
        try:
            code = run.process.wait(600)
        finally:
            run.kill()
        assert code == (0 if leg.stop_step is None else 143 if leg.signal_name == "SIGTERM" else -9), run.last_line()
    return read_back(root / "ordinals")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("objective", list(EVERY_MODEL))
def test_two_then_one_then_two_processes(objective: str, strategy: str, corpora: Corpora, tmp_path: Path) -> None:
    whole = run_legs(WHOLE, objective, "", corpora, tmp_path / "whole")
    changed = run_legs(CHANGED, objective, strategy, corpora, tmp_path / "changed")
    expected = {step: list(range((step - 1) * BATCH, step * BATCH)) for step in range(1, STEPS + 1)}
    assert ordinals_of(changed) == ordinals_of(whole) == expected
    assert noise_of(changed) == noise_of(whole)
    assert {len(hashes) for hashes in noise_of(changed).values()} == {1}
    losses = [
        [float(row["train_nats_per_token"]) for row in curve(run_folder(tmp_path / name))]
        for name in ("changed", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-4)
