"""Sampling from a masked diffusion model whose targets are shifted, against its logits step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.small_models import EOS, MASK, AtItsOwnPlace, ids, shifted_model
from llada_lightning.generation import Snapshot, generate
from llada_lightning.support.errors import UserError

LM = shifted_model()


def filled(text: list[int], cfg_scale: float = 0.0, prompt: int = 0) -> list[int]:
    """The gaps of a text, one a step, the surest first, by the logits of the position before each."""
    text, masked = list(text), [i for i, token in enumerate(text) if token == MASK]
    while masked:
        logits_LV = AtItsOwnPlace(LM).logits(torch.tensor([text]))[0].clone()
        if cfg_scale:
            bare_LV = AtItsOwnPlace(LM).logits(torch.tensor([[MASK] * prompt + text[prompt:]]))[0]
            logits_LV = bare_LV + (1 + cfg_scale) * (logits_LV - bare_LV)
        logits_LV[:, MASK] = -torch.inf
        p_M, token_M = logits_LV[masked].softmax(-1).max(-1)
        best = int(p_M.argmax())
        text[masked.pop(best)] = int(token_M[best])
    return text


def upto_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
@pytest.mark.parametrize("prompt_length", [1, 5])
def test_an_answer_is_what_the_logits_say(prompt_length: int, cfg_scale: float) -> None:
    prompt = ids(prompt_length, 1)
    found = generate(LM, [prompt], length=9, cfg_scale=cfg_scale)
    assert found.tokens[0] == upto_eos(filled([*prompt, *[MASK] * 9], cfg_scale, prompt_length)[prompt_length:])
    assert found.prompts == [prompt]


@pytest.mark.parametrize(
    "settings", [{"strategy": "block_diffusion", "block_length": 3}, {"strategy": "autoregressive"}]
)
def test_blocks_grow_behind_one_another(settings: dict[str, object]) -> None:
    grown, size = ids(4, 2), int(str(settings.get("block_length", 1)))
    for _ in range(9 // size):
        grown = filled([*grown, *[MASK] * size])
    assert generate(LM, [grown[:4]], length=9, **settings).tokens[0] == upto_eos(grown[4:])


def test_gaps_are_filled_also_at_the_beginning_of_a_text() -> None:
    texts = [[MASK, 3, MASK, 5], [7, MASK, MASK, MASK, 1, 2], [4, MASK]]
    seen: list[Snapshot] = []
    found = generate(LM, texts, infill=True, on_step=seen.append)
    assert found.tokens == [filled(text) for text in texts]
    assert [[len(row) for row in snapshot.tokens] for snapshot in seen] == [[4, 6, 2]] * len(seen)


@pytest.mark.parametrize("settings", [{}, {"block_length": 4, "cache": "prefix"}, {"block_length": 4, "cache": "dual"}])
def test_an_answer_does_not_depend_on_the_other_prompts(settings: dict[str, object]) -> None:
    prompts = [ids(length, seed) for seed, length in enumerate([5, 9, 1, 2, 6, 0, 3])]
    together = generate(LM, prompts, length=8, temperature=1.0, seed=3, **settings)
    for number, prompt in enumerate(prompts):
        alone = generate(LM, [prompt], length=8, temperature=1.0, seed=3, first=number, **settings)
        assert alone.tokens[0] == together.tokens[number]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_block_of_one_step_is_predicted_alike_with_and_without_a_cache(cache: str) -> None:
    """The first pass over a block computes all; what follows is the approximation."""
    prompt = ids(6, 5)
    plain = generate(LM, [prompt], length=8, block_length=4, steps=2)
    assert generate(LM, [prompt], length=8, block_length=4, steps=2, cache=cache).tokens == plain.tokens
    approximate = generate(LM, [prompt], length=8, block_length=4, cache=cache)
    assert approximate.cache == cache and len(approximate.tokens[0]) <= 8


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"compat 'llada': '.*' predicts a token from the one before it, which the rel"):
        generate(LM, [[1, 2]], length=8, compat="llada")
    llama = replace(LM, start_token_id=None)
    with pytest.raises(UserError, match=r"^prompt 1: begins with a gap, and '.*' predicts a token from the one before"):
        generate(llama, [[MASK, 2]], infill=True)
    with pytest.raises(UserError, match=r"^prompt 2: an empty one gives '.*' nothing to begin with"):
        generate(llama, [[1], []], length=4)
    assert generate(llama, [[1, MASK]], infill=True).tokens[0][0] == 1
