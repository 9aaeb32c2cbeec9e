"""The exact likelihood under a decoding policy, one sequence at a time and many at once: sequences a CPU second.

Both ways compute the same: sequences of 64 tokens, one token a step, so 64 predictions each. The plain way takes one
sequence at a time, and logits of every position. Ours takes many sequences at once, and logits of the positions that
the policy chooses among. The column between them is ours with one sequence at a time. The largest difference of the two
values, in nats, is printed beside. On a CPU the seconds are those of this process, on one thread.

    python benchmarks/policy_speed.py --shape 107k --sequences 64

The default is a model of 53,440 parameters without embeddings.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llada_lightning.checkpoints.language_model import LanguageModel, load_model
from llada_lightning.compute.shapes import get_shape
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.policy import POLICIES, Policy
from llada_lightning.generation.reveal import most_confident, without_rounding
from llada_lightning.model import Transformer

LENGTH = 64


def random_model(shape: str, vocab_size: int, device: str) -> LanguageModel:
    """A `llada` with random weights, the head scaled so that its predictions are not flat."""
    model = Transformer(get_shape(shape), vocab_size)
    model.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight *= 4
    name = f"random, {shape}, {vocab_size} vocabulary entries"
    return LanguageModel("llada", model.eval(), vocab_size - 1, vocab_size - 2, LENGTH, name=name).to(device)


@torch.inference_mode()
def plain(lm: LanguageModel, policy: Policy, tokens: list[int]) -> float:
    """The log-likelihood of one sequence, by one forward pass a step and the logits of every position."""
    rule, k = POLICIES[policy.name], policy.tokens_per_step
    assert lm.mask_token_id is not None
    tokens_L = torch.tensor(tokens, device=lm.device)
    masked_L = torch.ones_like(tokens_L, dtype=torch.bool)
    total = 0.0
    while bool(masked_L.any()):
        logits_LV = lm.model(tokens_L.masked_fill(masked_L, lm.mask_token_id)[None], causal=False)[0].float()
        if lm.excluded_token_id is not None:
            logits_LV[:, lm.excluded_token_id] = -torch.inf
        log_p_LV = logits_LV.log_softmax(dim=-1)
        order_1L = -torch.arange(len(tokens), device=lm.device, dtype=torch.float32)[None]
        if rule is not None:
            sure_L, scale_L = rule(log_p_LV.clone())  # which it may overwrite
            scale_11 = scale_L[masked_L].amax()[None, None]
            order_1L = without_rounding(sure_L.masked_fill(~masked_L, -torch.inf)[None], scale_11)
        chosen_L = most_confident(order_1L, masked_L[None], torch.tensor([k], device=lm.device))[0]
        total += float(log_p_LV[chosen_L, tokens_L[chosen_L]].double().sum())
        masked_L &= ~chosen_L
    return total


def timed(work: Any, device: torch.device) -> tuple[float, Any]:
    """Seconds of the process on a CPU, so that other work on the machine counts less; of the clock on a GPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def compare(lm: LanguageModel, sequences: int, alone: int, tokens_per_step: int, repeats: int) -> list[dict[str, Any]]:
    """For each policy the sequences a second of the three ways: the best of the repeats, which take turns.

    Other work on the machine only slows a repeat down, and the ways differently: it takes their caches.
    """
    rng = np.random.default_rng(0)
    texts = rng.integers(0, lm.model.vocab_size - 2, size=(sequences, LENGTH)).tolist()
    found = []
    for name in POLICIES:
        policy = Policy(name, tokens_per_step)
        requests: list[tuple[list[int], list[int]]] = [([], text) for text in texts]

        def by_ones(policy: Policy = policy) -> list[float]:
            return [plain(lm, policy, text) for text in texts[:alone]]

        def ours_by_ones(policy: Policy = policy, requests: Any = requests) -> list[float]:
            return [log_likelihood(lm, [request], policy=policy)[0].mean for request in requests[:alone]]

        def ours(policy: Policy = policy, requests: Any = requests) -> list[float]:
            return [score.mean for score in log_likelihood(lm, requests, policy=policy)]

        seconds: dict[str, list[float]] = {"plain": [], "ours, one at a time": [], "ours": []}
        values: dict[str, list[float]] = {}
        for _ in range(repeats):
            for way, work, count in (
                ("plain", by_ones, alone),
                ("ours, one at a time", ours_by_ones, alone),
                ("ours", ours, sequences),
            ):
                spent, values[way] = timed(work, lm.device)
                seconds[way].append(spent / count)
        best = {way: min(own) for way, own in seconds.items()}
        found.append(
            {
                "policy": policy.label,
                "sequences_per_second": {way: 1 / own for way, own in best.items()},
                "ratio": best["plain"] / best["ours"],
                "largest_difference": float(np.abs(np.subtract(values["plain"], values["ours"][:alone])).max()),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="a llada checkpoint instead of random weights")
    parser.add_argument("--shape", default="L1-d64-h2-kv2-ff192")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=64, help="decoded at once")
    parser.add_argument("--alone", type=int, default=4, help="decoded one at a time")
    parser.add_argument("--tokens-per-step", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the result here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.checkpoint:
        lm = load_model(given.checkpoint, device=given.device)
    else:
        lm = random_model(given.shape, given.vocab_size, given.device)
    results = compare(lm, given.sequences, given.alone, given.tokens_per_step, given.repeats)
    print(
        f"{lm.name}; {lm.device.type}; torch {torch.__version__}; {LENGTH} tokens, {given.sequences} sequences at once"
    )
    ways = list(results[0]["sequences_per_second"])
    print(f"{'sequences/s':18}" + "".join(f"{way:>22}" for way in ways) + f"{'ratio':>8}{'difference, nats':>18}")
    for each in results:
        rates = "".join(f"{each['sequences_per_second'][way]:22.2f}" for way in ways)
        print(f"{each['policy']:18}{rates}{each['ratio']:8.1f}{each['largest_difference']:18.1e}")
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
