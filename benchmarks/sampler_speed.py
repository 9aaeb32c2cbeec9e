"""Our sampler against the released sampler's way of working, each a ratio in one run.

Without a checkpoint: random weights of a shape and a vocabulary, which says all about speed with a fixed number of
steps, and nothing about what caches and parallel decoding change in the answers. With --llada (and --judge, an `arm`)
it says that, too: how many tokens are the exact sampler's, and the judge's nats per token of the answers.

    python benchmarks/sampler_speed.py
    python benchmarks/sampler_speed.py --llada runs/STUDY/LLADA --judge runs/STUDY/ARM --prompts FILE.txt
    python benchmarks/sampler_speed.py --device cuda --dtype bfloat16 --shapes llada-1b llada-8b --vocab-size 126464 \
        --batches 1 8
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench_report import circumstances, write_result
from llada_lightning import load_model, log_likelihood
from llada_lightning.checkpoints import LanguageModel
from llada_lightning.compute.shapes import get_shape
from llada_lightning.generation import generate
from llada_lightning.model import Transformer
from released_sampler import sample_plainly

BLOCK = 32


def random_model(shape: str, words: int, device: str, dtype: torch.dtype) -> LanguageModel:
    """Weights as training would begin with them, drawn on the device in fp32: a CPU takes minutes for billions."""
    with torch.device("meta"):
        model = Transformer(get_shape(shape), words).eval()
    model.to_empty(device=device)
    model.initialise(torch.Generator(device).manual_seed(0))
    return LanguageModel("llada", model, words - 1, words - 2, 4096, name=f"random {shape}").to(device, dtype)


def prompts_for(lm: LanguageModel, batch: int, length: int, path: Path | None) -> Tensor:
    """(B, P): cut from a text, or random tokens."""
    if path is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(lm.model.vocab_size - 2, (batch, length), generator=generator).to(lm.device)
    ids = lm.encode(path.read_text(encoding="utf-8"))
    begins = torch.linspace(0, len(ids) - length, batch).long().tolist()
    return torch.tensor([ids[begin : begin + length] for begin in begins], device=lm.device)


def seconds(lm: LanguageModel, sample: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The quickest of some runs, and what the last gave. On a CPU in seconds of the CPU: other work takes none."""
    clock, times = (time.perf_counter if lm.device.type == "cuda" else time.process_time), []
    for _ in range(repeats):
        begin = clock()
        answers = sample()
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - begin)
    return min(times), answers


def same(answers: list[list[int]], others: list[list[int]]) -> float:
    """The share of tokens that are equal; where only one answer has ended, the other's are not."""
    pairs = [pair for both in zip(answers, others, strict=True) for pair in zip_longest(*both)]
    return sum(x == y for x, y in pairs) / len(pairs)


def judged(judge: LanguageModel | None, prompts_BP: Tensor, answers: list[list[int]]) -> tuple[float, float] | None:
    """The judge's nats per token of the answers, and the standard error over answers."""
    if judge is None:
        return None
    requests = [(prompt, ids) for prompt, ids in zip(prompts_BP.tolist(), answers, strict=True) if ids]
    scores = log_likelihood(judge, requests)
    each = torch.tensor([-score.mean / len(ids) for score, (_, ids) in zip(scores, requests, strict=True)])
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def measure(
    lm: LanguageModel, judge: LanguageModel | None, batch: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row for each way; ``speed`` is over the plain loop with these blocks and all steps, in this run."""
    prompts_BP = prompts_for(lm, batch, arguments.prompt_length, arguments.prompts)
    for block in arguments.block_lengths or (arguments.length, BLOCK):
        shared: dict[str, Any] = {"length": arguments.length, "block_length": block}

        def plain(steps: int = arguments.steps, block: int = block) -> Tensor:
            sizes = {"length": arguments.length, "steps": steps, "block_length": block}
            return sample_plainly(lambda x: lm.model(x, causal=False), prompts_BP, lm.mask_token_id or 0, **sizes)

        few = arguments.length // block
        plain(few)  # warm, as the next one
        generate(lm, prompts_BP, **{**shared, "steps": few}, compat="llada")
        base, plain_BA = seconds(lm, plain, arguments.repeats)
        name = "pure" if block == arguments.length else f"blocks of {block}"
        kinds: list[tuple[str, dict[str, Any]]] = [(f"{name}, as released", {"compat": "llada"}), (name, {})]
        if block == BLOCK:
            kinds += [(f"{name}, {cache} cache", {"cache": cache}) for cache in ("prefix", "dual")]
            for fewer in (arguments.steps // 2, arguments.steps // 4):
                kinds.append((f"{name}, dual cache, {fewer} steps", {"cache": "dual", "steps": fewer}))
            if arguments.llada:
                kinds.append((f"{name}, threshold 0.9", {"threshold": 0.9}))
                kinds.append((f"{name}, dual cache, threshold 0.5", {"cache": "dual", "threshold": 0.5}))
        exact: list[list[int]] = []
        row = {"way": f"{name}, plain loop", "seconds": base, "speed": 1.0, "passes": arguments.steps}
        yield row | {"judge": judged(judge, prompts_BP, plain_BA.tolist())}
        for way, more in kinds:
            settings = {**shared, **({} if "threshold" in more else {"steps": arguments.steps}), **more}
            took, result = seconds(lm, lambda s=settings: generate(lm, prompts_BP, **s), arguments.repeats)
            if "compat" in more:
                equal = same(result.tokens, plain_BA.tolist())
            else:
                exact = exact or result.tokens
                equal = same(result.tokens, exact)
            row = {"way": way, "seconds": took, "speed": base / took, "passes": result.forward_passes}
            yield row | {"same_tokens": equal, "judge": judged(judge, prompts_BP, result.tokens)}


def _line(row: dict[str, Any]) -> str:
    equal = f"{row['same_tokens']:.1%}" if "same_tokens" in row else ""
    judge = "{:.3f} ± {:.3f}".format(*row["judge"]) if row.get("judge") else ""
    return f"| {row['way']} | {row['seconds']:.2f} | {row['speed']:.2f} | {row['passes']} | {equal} | {judge} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llada", help="a checkpoint; without it random weights of --shapes and --vocab-size")
    parser.add_argument("--judge", help="an arm with the same tokenizer")
    parser.add_argument("--prompts", type=Path, help="a text that prompts are cut from; without it random tokens")
    parser.add_argument("--shapes", nargs="+", default=["10.2m"], help="one after the other")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--batches", nargs="+", type=int, default=[8], help="prompts at once, one after the other")
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--block-lengths", nargs="+", type=int, help=f"instead of the whole length, then {BLOCK}")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="write the result here, too, as far as it is there")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    judge = load_model(arguments.judge, device=arguments.device) if arguments.judge else None
    facts = {key: str(value) for key, value in vars(arguments).items()}
    result: dict[str, Any] = {**circumstances(torch.device(arguments.device)), "settings": facts, "rows": []}
    for shape in arguments.shapes[: 1 if arguments.llada else None]:
        if arguments.llada:
            lm = load_model(arguments.llada, device=arguments.device, dtype=dtype)
        else:
            lm = random_model(shape, arguments.vocab_size, arguments.device, dtype)
        for batch in arguments.batches:
            print(
                f"{lm.name}: {lm.model.shape}, {lm.model.vocab_size} words, batch {batch}, prompt "
                f"{arguments.prompt_length}, length {arguments.length}, {arguments.steps} steps, {arguments.dtype}, "
                f"{result['hardware']['device']}, torch {torch.__version__}\n"
                "| way | seconds | times the plain loop's speed | forward passes | tokens as exact "
                "| judge, nats/token |\n"
                "|---|---|---|---|---|---|"
            )
            for row in measure(lm, judge, batch, arguments):
                print(_line(row), flush=True)
                result["rows"].append({"model": lm.name, "batch": batch, **row})
                write_result(arguments.json, result)
        del lm  # before the next one is drawn


if __name__ == "__main__":
    main()
