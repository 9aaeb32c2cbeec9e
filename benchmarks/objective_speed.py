"""A training step of each objective at equal tokens, as ratios to `llada`'s in one run.

A step is the loss of one micro-batch, its gradient and the optimizer's update. Block diffusion computes a clean copy of
each sequence beside it, so it may take up to twice as long. On a CPU the seconds are those of this process, on one
thread.

    python benchmarks/objective_speed.py --shape 853k --sequences 32

The steps of the objectives take turns, and each ratio is of their medians.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from llada_lightning.compute.flops import MASK_EPS
from llada_lightning.objectives.batches import TrainingBatch, scored_positions
from llada_lightning.objectives.forward_process import drawn_ratio, mask_probability, random_mask
from llada_lightning.training.modules import ArmModule, BlockDiffusionModule, LanguageModule, LladaModule


def batch_of(sequences: int, length: int, vocab_size: int, block_length: int | None, device: str) -> TrainingBatch:
    """Random tokens, with the noise of an objective."""
    n_B = np.arange(sequences)
    tokens_BL = torch.from_numpy(np.random.default_rng(0).integers(0, vocab_size - 2, size=(sequences, length)))
    t_B, _ = drawn_ratio(0, n_B, "weyl", None, sequences, block_length, length)
    p_B = mask_probability(t_B, MASK_EPS)
    masked_BL = torch.from_numpy(random_mask(0, n_B, p_B, length, block_length))
    scored_M, scored = scored_positions(masked_BL)
    tokens = sequences * length
    return TrainingBatch(
        tokens_BL.to(device), None, masked_BL.to(device), torch.from_numpy(p_B).float().to(device),
        torch.from_numpy(n_B).to(device), scored_M.to(device), scored, float(tokens), tokens,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="853k")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4, 16, 64], help="block lengths")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the result here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    arguments = (given.shape, given.vocab_size, given.vocab_size - 1, given.vocab_size - 2)
    blocks: dict[str, LanguageModule] = {
        f"block {length}": BlockDiffusionModule(*arguments, block_length=length) for length in given.blocks
    }
    modules: dict[str, LanguageModule] = {"llada": LladaModule(*arguments), "arm": ArmModule(*arguments), **blocks}
    work = {}
    for name, module in modules.items():
        module.configure_model()
        module.to(given.device)
        optimizer = module.optimizer_settings.build(list(module.named_parameters()))
        work[name] = (
            module,
            optimizer,
            batch_of(given.sequences, given.length, given.vocab_size, module.block_length, given.device),
        )
    clock = time.perf_counter if given.device == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for step in range(given.steps + 1):  # the first is not counted
        for name, (module, optimizer, batch) in work.items():
            start = clock()
            module.training_loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if given.device == "cuda":
                torch.cuda.synchronize()
            if step:
                seconds[name].append(clock() - start)
    medians = {name: median(own) for name, own in seconds.items()}
    ratios = {name: own / medians["llada"] for name, own in medians.items()}
    tokens = given.sequences * given.length
    sizes = f"{given.sequences} x {given.length} tokens, {given.vocab_size} words"
    print(f"{given.shape}, {sizes}; {given.device}, one thread")
    for name, ratio in ratios.items():
        print(f"{name:10}{tokens / medians[name]:12,.0f} tokens/s   {ratio:.2f} of llada's step")
    if given.json:
        given.json.write_text(json.dumps({"seconds": medians, "ratio_to_llada": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
