"""``compat="llada"`` gives the tokens of the authors' released sampler."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from llada_lightning.generation import generate
from released_sampler import sample_plainly
from sampler_toys import GOLDEN, MASK, WORDS, random_model, released_model

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
    torch.manual_seed(5)
    plain_BA = sample_plainly(lambda x: lm.model(x, causal=False), prompt_BP, MASK, **settings)
    torch.manual_seed(5)
    assert generate(lm, prompt_BP, compat="llada", **settings).tokens == plain_BA.tolist()


def test_padding_changes_nothing() -> None:
    prompts = RECORDED["prompt"]
    padded = torch.tensor([[7, 7, *prompts[0]], [7, 7, *prompts[1]]])
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    settings: dict[str, Any] = {"length": 32, "steps": 16, "cfg_scale": 1.5, "compat": "llada"}
    result = generate(released_model(), padded, attention_mask=mask, **settings)
    assert [[*p, *t] for p, t in zip(prompts, result.tokens, strict=True)] == RECORDED["generate"]["cfg_1.5"]["tokens"]
