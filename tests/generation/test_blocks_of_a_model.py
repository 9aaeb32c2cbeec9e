"""Sampling from a model that predicts in blocks, against its logits step by step."""

from __future__ import annotations

import pytest
import torch

from helpers.devices import DEVICES
from helpers.small_models import MASK, ids, random_model
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation import generate
from llada_lightning.support.errors import UserError

BLOCK = 4


def block_model(block_length: int = BLOCK) -> LanguageModel:
    return random_model("block", block_length=block_length)


def greedy(lm: LanguageModel, prompt: list[int], length: int) -> list[int]:
    """One token a step, the surest of the block first, from the logits of the whole text up to the block's end."""
    assert lm.block_length is not None
    text, end = list(prompt), len(prompt) + length
    while len(text) < end:
        last = min(end, (len(text) // lm.block_length + 1) * lm.block_length)
        masked = list(range(len(text), last))
        text += [MASK] * len(masked)
        while masked:
            logits_LV = lm.logits(torch.tensor([text]))[0].clone()
            logits_LV[:, MASK] = -torch.inf
            p_M, token_M = logits_LV[masked].softmax(-1).max(-1)
            best = int(p_M.argmax())
            text[masked.pop(best)] = int(token_M[best])
    return text[len(prompt) :]


def upto_eos(lm: LanguageModel, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(lm.eos_token_id) + 1] if lm.eos_token_id in tokens else tokens


@pytest.mark.parametrize("cache", ["kv", "none"])
@pytest.mark.parametrize("prompt_length", [1, 3, 4, 6])  # without one, all masks of a block are alike
def test_an_answer_is_what_the_logits_say_block_by_block(cache: str, prompt_length: int) -> None:
    lm, prompt = block_model(), ids(prompt_length, 1)
    found = generate(lm, [prompt], length=12, cache=cache)
    assert found.tokens[0] == upto_eos(lm, greedy(lm, prompt, 12))
    assert found.settings["strategy"] == "block_diffusion" and found.settings["block_length"] == BLOCK


@DEVICES
def test_an_answer_depends_neither_on_the_other_prompts_nor_on_the_cache(device: str) -> None:
    lm = block_model().to(device)
    prompts = [ids(length, seed) for seed, length in enumerate([5, 9, 1, 2, 6, 0, 3])]
    together = generate(lm, prompts, length=8, temperature=1.0, seed=3)
    for number, prompt in enumerate(prompts):
        alone = generate(lm, [prompt], length=8, temperature=1.0, seed=3, first=number)
        assert alone.tokens[0] == together.tokens[number]
    assert generate(lm, prompts, length=8, temperature=1.0, seed=3, cache="none").tokens == together.tokens


def test_one_block_of_the_whole_text_is_masked_diffusion() -> None:
    whole, llada = block_model(48), random_model("llada")
    for prompt_length in (0, 5):
        prompt = ids(prompt_length, 2)
        text = [*prompt, *[MASK] * (48 - prompt_length)]
        ours, theirs = whole.logits(torch.tensor([text])), llada.logits(torch.tensor([text]))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_length": 8}, "block_length: 8 given, but '.*' predicts blocks of 4; leave it out"),
        ({"strategy": "diffusion"}, "strategy 'diffusion': '.*' is of block, which predicts one block after the other"),
        ({"cache": "dual"}, "cache 'dual': '.*' is of block"),
        ({"compat": "llada"}, "compat 'llada': '.*' is of block"),
        ({"length": 10}, "block_length: 4 does not divide length 10; the nearest lengths are 8 and 12"),
    ],
)
def test_mistakes_are_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(block_model(), [[1, 2]], **{"length": 8, **settings})


@pytest.mark.parametrize("prompt_length", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("per_block", [1, 2, 3, 4])
def test_a_block_that_the_prompt_shares_has_its_share_of_the_steps(prompt_length: int, per_block: int) -> None:
    steps = 3 * per_block
    found = generate(block_model(), [ids(prompt_length, 1)], length=3 * BLOCK, steps=steps, cache="none", seed=1)
    shared = prompt_length % BLOCK > 0
    assert found.steps <= steps + (shared and per_block == 1)  # each part of a block needs one step
    if len(found.tokens[0]) == 3 * BLOCK:
        assert found.steps == steps + (shared and per_block == 1)
        assert f" {found.steps} steps, " in found.facts
