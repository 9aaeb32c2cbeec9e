"""A training step of each objective at equal tokens, as ratios to those of `llada` and of `arm` in one run.

A step is the loss of one micro-batch, its gradient and the optimizer's update. Block diffusion computes a clean copy of
each sequence beside it, so it may take up to twice as long as `llada`. `uniform` predicts all positions, as `arm` does,
and sums over the vocabulary at each. On a CPU the seconds are those of this process, on one thread.

    python benchmarks/objective_speed.py --shape 853k --sequences 32

The steps of the objectives take turns, and each ratio is of their medians.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from llada_lightning.compute.flops import MASK_EPS
from llada_lightning.objectives.batches import TrainingBatch, scored_positions
from llada_lightning.objectives.forward_process import drawn_ratio, mask_probability, random_mask
from llada_lightning.objectives.uniform import with_training_noise
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.modules import ArmModule, BlockDiffusionModule, LladaModule, UniformDiffusionModule


def batch_of(sequences: int, length: int, module: LanguageModule, device: str) -> TrainingBatch:
    """Random tokens, with the noise of an objective."""
    assert module.vocab_size is not None
    vocab_size, block_length = module.vocab_size, module.block_length
    n_B = np.arange(sequences)
    tokens_BL = torch.from_numpy(np.random.default_rng(0).integers(0, vocab_size - 2, size=(sequences, length)))
    t_B, _ = drawn_ratio(0, n_B, "weyl", None, sequences, block_length, length)
    p_B = mask_probability(t_B, MASK_EPS)
    masked_BL = torch.from_numpy(random_mask(0, n_B, p_B, length, block_length))
    scored_M, scored = scored_positions(masked_BL)
    tokens = sequences * length
    batch = TrainingBatch(
        tokens_BL, None, masked_BL, torch.from_numpy(p_B).float(), torch.from_numpy(n_B), scored_M, scored,
        float(tokens), tokens,
    )  # fmt: skip
    if isinstance(module, UniformDiffusionModule):
        batch = with_training_noise(batch, 0, module.alphabet)
    moved: dict[str, Any] = {n: x.to(device) for n, x in batch._asdict().items() if isinstance(x, torch.Tensor)}
    return batch._replace(**moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="853k")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 4, 16, 64], help="block lengths; several or none")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the result here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    arguments = (given.shape, given.vocab_size, given.vocab_size - 1, given.vocab_size - 2)
    blocks: dict[str, LanguageModule] = {
        f"block {length}": BlockDiffusionModule(*arguments, block_length=length) for length in given.blocks
    }
    modules: dict[str, LanguageModule] = {
        "llada": LladaModule(*arguments),
        "arm": ArmModule(*arguments),
        "uniform": UniformDiffusionModule(*arguments),
        **blocks,
    }
    work = {}
    for name, module in modules.items():
        module.configure_model()
        module.to(given.device)
        optimizer = module.optimizer_settings.build(list(module.named_parameters()))
        work[name] = (
            module,
            optimizer,
            batch_of(given.sequences, given.length, module, given.device),
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
    ratios = {other: {name: own / medians[other] for name, own in medians.items()} for other in ("llada", "arm")}
    tokens = given.sequences * given.length
    sizes = f"{given.sequences} x {given.length} tokens, {given.vocab_size} words"
    print(f"{given.shape}, {sizes}; {given.device}, one thread")
    for name, own in medians.items():
        to_llada, to_arm = (ratios[other][name] for other in ("llada", "arm"))
        print(f"{name:10}{tokens / own:12,.0f} tokens/s   {to_llada:.2f} of llada's step, {to_arm:.2f} of arm's")
    if given.json:
        given.json.write_text(
            json.dumps({"seconds": medians, "ratio_to_llada": ratios["llada"], "ratio_to_arm": ratios["arm"]}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main()
