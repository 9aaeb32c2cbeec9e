"""Where a step of pure diffusion spends its time: ours, and the released sampler's way of working.

Seconds of the CPU of each part, with as many masked positions as a step of a generation has on average. The parts of
both are measured in turns, and the quickest of some repeats counts. The whole step is a generation over its steps.

    OMP_NUM_THREADS=1 python benchmarks/sampler_parts.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llada_lightning.checkpoints import LanguageModel
from llada_lightning.generation import generate
from llada_lightning.generation.predictor import LOGITS_AT_ONCE, PREDICTED_AT_ONCE, argmax
from released_sampler import sample_plainly
from sampler_speed import prompts_for, random_model


def parts_of(lm: LanguageModel, batch: int, prompt: int, length: int, steps: int) -> dict[str, list[Callable[[], Any]]]:
    """By the name of a part: the plain loop's way of computing it, and ours."""
    words, masked = lm.model.vocab_size, batch * length * (steps + 1) // (2 * steps)
    tokens_BL = prompts_for(lm, batch, prompt + length, None)
    hidden_MD = lm.model.hidden(tokens_BL, causal=False).flatten(0, 1)
    logits_MV: Tensor = lm.model.head(hidden_MD)
    at_once, few = (max(1, logits["cpu"] // words) for logits in (LOGITS_AT_ONCE, PREDICTED_AT_ONCE))
    answer = slice(prompt, prompt + length)

    def each(function: Callable[[Tensor], Tensor], rows_MX: Tensor, size: int) -> Callable[[], None]:
        def run() -> None:
            for part_MX in rows_MX.split(size):
                function(part_MX)

        return run

    ours_MV = logits_MV[:masked]
    return {
        "blocks": [
            lambda: lm.model.hidden(tokens_BL, causal=False),
            lambda: lm.model.hidden(tokens_BL, causal=False, queries=answer),
        ],
        "output head": [lambda: lm.model.head(hidden_MD), each(lm.model.head, hidden_MD[:masked], at_once)],
        "softmax": [lambda: logits_MV.softmax(dim=-1), each(lambda x: x.softmax(dim=-1), ours_MV, few)],
        "argmax": [lambda: logits_MV.argmax(dim=-1), each(argmax, ours_MV, few)],
    }


def wholes(lm: LanguageModel, batch: int, prompt: int, length: int, steps: int) -> list[Callable[[], Any]]:
    """A generation by the plain loop, and by ours with the same tokens."""
    prompts_BP = prompts_for(lm, batch, prompt, None)
    sizes = {"length": length, "steps": steps, "block_length": length}
    return [
        lambda: sample_plainly(lambda x: lm.model(x, causal=False), prompts_BP, lm.mask_token_id or 0, **sizes),
        lambda: generate(lm, prompts_BP, compat="llada", **sizes),
    ]


def quickest(functions: list[Callable[[], Any]], repeats: int) -> list[float]:
    """The least seconds of the CPU of each, taken in turns."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for place, function in enumerate(functions):
            begin = time.process_time()
            function()
            best[place] = min(best[place], time.process_time() - begin)
    return best


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="10.2m")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    lm = random_model(arguments.shape, arguments.vocab_size, "cpu", torch.float32)
    sizes = arguments.batch, arguments.prompt_length, arguments.length, arguments.steps
    print("| part of a step | plain loop, seconds | ours, seconds | share of ours |\n|---|---|---|---|")
    whole = [seconds / arguments.steps for seconds in quickest(wholes(lm, *sizes), arguments.repeats)]
    rows = {name: quickest(ways, arguments.repeats) for name, ways in parts_of(lm, *sizes).items()}
    rows["the rest"] = [whole[i] - sum(pair[i] for pair in rows.values()) for i in range(2)]
    for name, (plain, ours) in (rows | {"whole step": whole}).items():
        print(f"| {name} | {plain:.3f} | {ours:.3f} | {ours / whole[1]:.0%} |", flush=True)


if __name__ == "__main__":
    main()
