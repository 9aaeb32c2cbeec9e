"""Ordinals, noise and losses side by side: what is written down, and what counts as the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_change import BATCH, CHANGED, STEPS, WHOLE, Consumed, Leg, compare, noise_of, ranges, table
from helpers.tiny_runs import fit


def read_back(folder: Path) -> list[Consumed]:
    return [Consumed(**json.loads(line)) for file in folder.iterdir() for line in file.read_text().splitlines()]


def test_ordinals_and_noise_of_a_real_run(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into other micro-batches, each sequence has its noise; with another seed it has another."""
    monkeypatch.setenv("LLADA_TRUSTED_MODULES", "ordinal_log")
    found = {}
    for name, words in {
        "whole": [],
        "cut": ["--trainer.accumulate_grad_batches=4"],
        "other": ["--seed_everything=1"],
    }.items():
        callback = {"class_path": "ordinal_log.OrdinalLog", "init_args": {"folder": str(tmp_path / name), "leg": 1}}
        callbacks = f"--trainer.callbacks={json.dumps([callback])}"
        fit("llada", prepared, tmp_path / "runs" / name, "--trainer.max_steps=3", callbacks, *words)
        found[name] = read_back(tmp_path / name)
    assert [len(found[name]) for name in ("whole", "cut")] == [3, 12]
    assert [(batch.step, batch.ordinals) for batch in found["whole"]] == [
        (step, list(range((step - 1) * 8, step * 8))) for step in (1, 2, 3)
    ]
    assert noise_of(found["cut"]) == noise_of(found["whole"])
    assert not any(noise_of(found["other"])[n] & noise_of(found["whole"])[n] for n in range(24))


def consumed(legs: tuple[Leg, ...]) -> list[Consumed]:
    """What a run of these legs would write down, steps that are trained again included."""
    found, first = [], 1
    for number, leg in enumerate(legs, start=1):
        last = leg.stop_step or STEPS
        for step in range(first, last + 1):
            for micro in range(leg.processes * leg.accumulation):
                start = (step - 1) * BATCH + micro * leg.micro_batch
                ordinals = list(range(start, start + leg.micro_batch))
                found.append(Consumed(number, micro % leg.processes, step, ordinals, [f"n{n}" for n in ordinals]))
        first = last + 1 if leg.signal_name == "SIGTERM" else last - 1  # killed: from the checkpoint before
    return found


def test_the_same_is_told_from_what_is_not() -> None:
    whole, changed = consumed(WHOLE), consumed(CHANGED)
    losses = ([2.0] * STEPS, [2.0] * (STEPS - 1) + [2.5])

    def verdicts(batches: list[Consumed]) -> tuple[bool, bool]:
        result: dict[str, Any] = compare(whole, batches, losses)
        assert result["largest_difference"] == 0.5
        return result["same_ordinals"], result["same_noise"]

    assert verdicts(changed) == (True, True)
    last = changed[-1]
    assert verdicts([*changed[:-1], replace(last, noise=["?", *last.noise[1:]])]) == (True, False)
    assert verdicts(changed[:-1])[0] is False  # missing
    assert verdicts([*changed, last])[0] is False  # twice
    again = next(batch for batch in changed if batch.leg == 2 and batch.step == 17)
    with_other_noise = [replace(again, noise=["?"] * 3) if batch is again else batch for batch in changed]
    assert verdicts(with_other_noise) == (True, False)  # also where the step was trained again


def test_the_table_shows_both_ranks() -> None:
    result = compare(consumed(WHOLE), consumed(CHANGED), ([2.0] * STEPS, [2.0] * STEPS))
    lines = table(result).splitlines()
    assert lines[2].startswith("| 1 | 1 | 0-11 | 0-5 | 6-11 | 2.0000000 |")
    assert lines[11].startswith("| 10 | 2 | 108-119 | 108-119 |  |")
    assert lines[-1].startswith(f"| {STEPS} | 3 | 276-287 | 276-277, 280-281, 284-285 | 278-279, 282-283, 286-287 |")
    assert ranges([3, 4, 9, 1]) == "3-4, 9-9, 1-1"
