"""The sampler against itself written down plainly: one prompt, all logits, nothing kept from step to step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.sampler_toys import EOS, MASK, WORDS, random_model
from llada_lightning.generation import generate
from llada_lightning.generation.reveal import without_rounding

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], []]
LENGTH = 16


def plainly(
    prompt: list[int], rule: str, steps: int, block_length: int, threshold: float | None, late_eos: bool
) -> tuple[list[int], list[int]]:
    """The tokens and their steps, at temperature 0, up to the first EOS."""
    lm, begin = random_model(), len(prompt)
    tokens, step_of = torch.tensor([*prompt, *[MASK] * LENGTH]), torch.full((begin + LENGTH,), -1)
    number, blocks = 0, LENGTH // block_length
    for block in range(blocks):
        first = begin + block * block_length
        for step in range(1, (steps // blocks if threshold is None else block_length) + 1):
            masked = [i for i in range(first, first + block_length) if step_of[i] < 0]
            answer = list(zip(tokens[begin:].tolist(), step_of[begin:].tolist(), strict=True))
            whole = answer[: next((i for i, (_, at) in enumerate(answer) if at < 0), LENGTH)]
            if not masked or EOS in [token for token, _ in whole]:
                break
            number += 1
            n, per_block = block_length, steps // blocks
            count = n * step // per_block - n * (step - 1) // per_block
            if threshold is None and not count:
                continue
            logits = lm.model(tokens[None], causal=False)[0]
            logits[:, MASK] = -torch.inf
            p = logits.softmax(dim=-1)
            best = p.argmax(dim=-1)
            first_p, second_p = p.topk(2, dim=-1).values.unbind(dim=-1)
            sure = {"margin": first_p - second_p, "entropy": (p * p.clamp(min=1e-38).log()).sum(dim=-1)}.get(
                rule, first_p
            )
            order = {i: float(sure[i]) for i in masked}
            if late_eos:
                order = {i: -1e3 if best[i] == EOS else value for i, value in order.items()}
            grid = dict(zip(order, without_rounding(torch.tensor([list(order.values())]))[0].tolist(), strict=True))
            ranked = sorted(grid, key=lambda i: (-grid[i], i))
            chosen = ranked[:count]
            if threshold is not None:
                chosen = [i for i in masked if order[i] > threshold] or ranked[:1]
            tokens[chosen], step_of[chosen] = best[chosen], number
    end = next((i + 1 for i, token in enumerate(tokens[begin:].tolist()) if token == EOS), LENGTH)
    return tokens[begin : begin + end].tolist(), step_of[begin : begin + end].tolist()


@pytest.mark.parametrize("block_length", [LENGTH, 4])
@pytest.mark.parametrize(
    ("rule", "steps", "threshold", "late_eos"),
    [
        ("low_confidence", 16, None, False),
        ("low_confidence", 12, None, False),
        ("low_confidence", 4, None, True),
        ("margin", 8, None, False),
        ("entropy", 8, None, True),
        ("low_confidence", 16, 0.2, False),
    ],
)
@torch.inference_mode()
def test_tokens_and_steps_of_the_plain_sampler(
    rule: str, steps: int, threshold: float | None, late_eos: bool, block_length: int
) -> None:
    settings: dict[str, Any] = {"steps": steps} if threshold is None else {"threshold": threshold}
    found = generate(
        random_model(),
        PROMPTS,
        length=LENGTH,
        remasking=rule,
        block_length=block_length,
        zero_eos_confidence=late_eos,
        **settings,
    )
    expected = [plainly(prompt, rule, steps, block_length, threshold, late_eos) for prompt in PROMPTS]
    assert list(zip(found.tokens, found.step_of_token, strict=True)) == expected
    assert all(token < WORDS for row in found.tokens for token in row)
