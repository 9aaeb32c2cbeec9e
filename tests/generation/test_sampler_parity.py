"""``compat="llada"`` gives the tokens of the authors' released sampler."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.sampler_toys import EOS, GOLDEN, MASK, WORDS, random_model, released_model
from llada_lightning.generation import generate
from released_sampler import sample_plainly

RECORDED = json.loads((GOLDEN / "generations.json").read_text())


@pytest.mark.parametrize("name", RECORDED["generate"])
def test_generations_that_the_released_code_gave(name: str) -> None:
    case = RECORDED["generate"][name]
    settings = {key: case["settings"][key] for key in ("steps", "block_length")}
    result = generate(
        released_model(),
        torch.tensor(RECORDED["prompt"]),
        length=case["settings"]["gen_length"],
        cfg_scale=case["settings"].get("cfg_scale", 0.0),
        compat="llada",
        **settings,
    )
    assert [[*p, *t] for p, t in zip(result.prompts, result.tokens, strict=True)] == case["tokens"]
    assert result.forward_passes == settings["steps"]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "block_length": 8, "steps": 9},
        {"remasking": "random", "steps": 12},
        {"remasking": "random", "temperature": 1.0, "block_length": 12, "steps": 10},
        {"temperature": 0.5, "cfg_scale": 2.0},
        {"cfg_scale": 1.0, "remasking": "random", "block_length": 6},
        {"steps": 48},
        {"steps": 48, "temperature": 1.0, "block_length": 12},
        {"steps": 12, "late": True},
        {"steps": 12, "late": True, "temperature": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_of_the_released_way_of_working(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """In bfloat16 many confidences are equal, and the same of them must stay."""
    lm = random_model()
    if dtype != torch.float32:
        lm = replace(lm, model=deepcopy(lm.model).to(dtype))
    settings = {"length": 24, "steps": 24, "block_length": 24, **settings}
    prompt_BP = torch.randint(2, WORDS, (3, 5), generator=torch.Generator().manual_seed(1))
    late = (EOS, 20) if settings.pop("late", False) else ()
    lm = replace(lm, end_token_ids=(EOS, 20))  # 20 is likely
    torch.manual_seed(5)
    plain_BA = sample_plainly(
        lambda x: lm.model(x, causal=False), prompt_BP, MASK, late_token_ids=(EOS, 20) if late else (), **settings
    )
    torch.manual_seed(5)
    assert (
        generate(lm, prompt_BP, compat="llada", zero_eos_confidence=bool(late), **settings).tokens == plain_BA.tolist()
    )


def test_padding_changes_nothing() -> None:
    prompts = RECORDED["prompt"]
    padded = torch.tensor([[7, 7, *prompts[0]], [7, 7, *prompts[1]]])
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    settings: dict[str, Any] = {"length": 32, "steps": 16, "cfg_scale": 1.5, "compat": "llada"}
    result = generate(released_model(), padded, attention_mask=mask, **settings)
    assert [[*p, *t] for p, t in zip(prompts, result.tokens, strict=True)] == RECORDED["generate"]["cfg_1.5"]["tokens"]


@pytest.mark.parametrize("block_length", [4, 16])
def test_prompts_of_other_lengths_get_the_answers_they_get_alone(block_length: int) -> None:
    """Without a [MASK] drawn among the padding: only what is to be answered is ever predicted again."""
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [4] * 12]
    settings: dict[str, Any] = {"length": 16, "block_length": block_length, "compat": "llada"}
    together = generate(released_model(), prompts, **settings)
    assert together.tokens == [generate(released_model(), [prompt], **settings).tokens[0] for prompt in prompts]


def test_a_mask_that_was_drawn_says_so() -> None:
    """The released sampler may leave one in the answer, or predict it again with a later block."""
    torch.manual_seed(0)
    prompts = [[5, 6]] * 40
    result = generate(random_model(), prompts, length=16, block_length=8, temperature=1.5, compat="llada")
    columns = (result.tokens, result.step_of_token, result.confidence)
    rows = [zip(*row, strict=True) for row in zip(*columns, strict=True)]
    left = [(step, confidence) for row in rows for token, step, confidence in row if token == MASK]
    assert left and set(left) == {(-1, 0.0)}
