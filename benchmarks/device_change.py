"""A run that goes on on another number of processes, workers and micro-batches: the same sequences, noise and losses.

A run of two processes is stopped by SIGTERM, goes on on one, is killed, and goes on on two again, each time with other
loader workers and micro-batches at the same global batch, as replicas (DDP) and in shards (FSDP2). Beside it stands one
process that nobody stopped. Run: python benchmarks/device_change.py --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llada_lightning.support.files import write_json, written_atomically
from processes import child_environment, finish, start
from run_state import curve
from small_fits import BATCH, MODELS, Corpora, fit_words, prepare_corpora, run_folder

STEPS = 24


@dataclass(frozen=True)
class Leg:
    """One start of a run, and how it ends: in the middle of ``stop_step``, by a signal; None: at the run's end."""

    processes: int
    accumulation: int
    workers: int
    stop_step: int | None = None
    signal_name: str = "SIGTERM"

    @property
    def micro_batch(self) -> int:
        return BATCH // self.processes // self.accumulation

    def __str__(self) -> str:
        return f"{self.processes} x {self.accumulation} x {self.micro_batch}, {self.workers} workers"


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


def run_legs(legs: tuple[Leg, ...], objective: str, strategy: str, corpora: Corpora, root: Path) -> list[Consumed]:
    """Run a run leg by leg.

    Raises:
        RuntimeError: a leg did not end as it should.
    """
    environment = child_environment(root / "tmp", trusted="ordinal_log")
    for number, leg in enumerate(legs, start=1):
        log = {"folder": str(root / "ordinals"), "leg": number, "stop_step": leg.stop_step}
        callback = {"class_path": "ordinal_log.OrdinalLog", "init_args": {**log, "signal_name": leg.signal_name}}
        words = [
            f"--data.workers={leg.workers}",
            f"--data.micro_batch={leg.micro_batch}",
            f"--trainer.max_steps={STEPS}",
            f"--trainer.callbacks={json.dumps([callback])}",
        ]
        if leg.processes > 1:
            words += [f"--trainer.devices={leg.processes}", f"--trainer.strategy={strategy}"]
        arguments = fit_words(objective, corpora.mixture, root, *words, accumulation=leg.accumulation)
        if leg.stop_step is None:
            finish(arguments, root / "log", environment)
            continue
        run = start(arguments, root / "log", environment)
        try:
            code = run.process.wait(600)
        finally:
            run.kill()
        if code != (143 if leg.signal_name == "SIGTERM" else -9):
            raise RuntimeError(f"leg {number} ended with exit code {code}: {run.last_line()} ({root}/log)")
    lines = [line for file in sorted((root / "ordinals").glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [Consumed(**json.loads(line)) for line in lines]


def noise_of(consumed: list[Consumed]) -> dict[int, set[str]]:
    """The hashes under which each ordinal was trained on, repeats included."""
    found: dict[int, set[str]] = defaultdict(set)
    for batch in consumed:
        for ordinal, noise in zip(batch.ordinals, batch.noise, strict=True):
            found[ordinal].add(noise)
    return found


def last_leg_of(consumed: list[Consumed]) -> dict[int, dict[int, list[int]]]:
    """Step -> rank -> ordinals in order, of the last leg that trained the step."""
    final: dict[int, int] = {}
    for batch in consumed:
        final[batch.step] = max(final.get(batch.step, 0), batch.leg)
    found: dict[int, dict[int, list[int]]] = {step: {} for step in sorted(final)}
    for batch in consumed:
        if batch.leg == final[batch.step]:
            found[batch.step].setdefault(batch.rank, []).extend(batch.ordinals)
    return found


def compare(whole: list[Consumed], changed: list[Consumed], losses: tuple[list[float], list[float]]) -> dict[str, Any]:
    """Side by side: ordinals and losses of each step, the largest difference, and whether the noise was the same."""
    legs = {batch.step: batch.leg for batch in sorted(changed, key=lambda batch: batch.leg)}
    mine, theirs = last_leg_of(changed), last_leg_of(whole)
    rows = [
        {
            "step": step,
            "leg": legs[step],
            "undisturbed": ranges(theirs[step][0]),
            "ranks": [ranges(mine[step][rank]) for rank in sorted(mine[step])],
            "loss_undisturbed": losses[0][step - 1],
            "loss_changed": losses[1][step - 1],
        }
        for step in mine
    ]
    expected = {step: list(range((step - 1) * BATCH, step * BATCH)) for step in range(1, STEPS + 1)}
    flat = {step: sorted(n for ordinals in ranks.values() for n in ordinals) for step, ranks in mine.items()}
    noise, noise_theirs = noise_of(changed), noise_of(whole)
    return {
        "rows": rows,
        "same_ordinals": flat == expected == {step: sorted(ranks[0]) for step, ranks in theirs.items()},
        "same_noise": noise == noise_theirs and all(len(hashes) == 1 for hashes in noise.values()),
        "ordinals": len(noise),
        "largest_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


def ranges(ordinals: list[int]) -> str:
    """`0-5, 12-14`: consecutive ordinals together, in the order in which they were trained on."""
    parts: list[list[int]] = []
    for n in ordinals:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][-1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{first}-{last}" for first, last in parts)


def table(found: dict[str, Any]) -> str:
    """A comparison as a Markdown table."""
    lines = ["| step | leg | 1 process | rank 0 | rank 1 | loss, 1 process | loss, changed | difference |"]
    lines.append("|" + "---|" * 8)
    for row in found["rows"]:
        ranks = [*row["ranks"], ""][:2]
        a, b = row["loss_undisturbed"], row["loss_changed"]
        cells = [row["step"], row["leg"], row["undisturbed"], *ranks, f"{a:.7f}", f"{b:.7f}", f"{b - a:.1e}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def summary(name: str, found: dict[str, Any]) -> str:
    """A comparison in a line."""
    yes = {True: "the same", False: "NOT the same"}
    return (
        f"{name}: {len(found['rows'])} steps, {found['ordinals']} sequences: ordinals {yes[found['same_ordinals']]}, "
        f"noise {yes[found['same_noise']]}, losses differ by at most {found['largest_difference']:.1e} nats/token"
    )


def losses_of(root: Path) -> list[float]:
    return [float(row["train_nats_per_token"]) for row in curve(run_folder(root))]


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if ordinals and noise are the same and the losses equal to rounding, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder, for everything")
    parser.add_argument("--objectives", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--strategies", nargs="+", choices=["ddp", "fsdp2"], default=["ddp", "fsdp2"])
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the losses, nats per token")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out: {out} is not empty; name a new folder")
    corpora = prepare_corpora(out / "data")
    results: dict[str, Any] = {}
    for objective in options.objectives:
        root = out / f"{objective}-1"
        whole = run_legs(WHOLE, objective, "", corpora, root)
        for strategy in options.strategies:
            other = out / f"{objective}-{strategy}"
            changed = run_legs(CHANGED, objective, strategy, corpora, other)
            name = f"{objective}, 2 -> 1 -> 2 processes, {strategy}"
            results[name] = compare(whole, changed, (losses_of(root), losses_of(other)))
            print(f"{table(results[name])}\n\n{summary(name, results[name])}\n", flush=True)
    legs = [{**asdict(leg), "micro_batch": leg.micro_batch} for leg in CHANGED]
    write_json(out / "device_change.json", {"global_batch": BATCH, "legs": legs, "results": results})
    named = [f"leg {number}: {leg}" for number, leg in enumerate(CHANGED, start=1)]
    text = [f"Legs as processes x accumulation x micro-batch. {'; '.join(named)}."]
    text += [f"{summary(name, found)}\n\n{table(found)}" for name, found in results.items()]
    with written_atomically(out / "device_change.md") as path:
        path.write_text("\n\n".join(text) + "\n")
    same = all(found["same_ordinals"] and found["same_noise"] for found in results.values())
    return 0 if same and all(r["largest_difference"] <= options.tolerance for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
