"""Our Transformer gives the logits of the authors' released modelling code.

`golden_llada_mha/` holds a tiny model in the layout of GSAI-ML/LLaDA-8B with random weights (4 layers, width 64,
vocabulary 320), and the logits that the released code gave for three sequences on a CPU in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer

GOLDEN = Path(__file__).with_name("golden_llada_mha")

MODEL_NAMES = {"wte": "embedding", "ln_f": "norm", "ff_out": "head"}
BLOCK_NAMES = {
    "attn_norm": "attention_norm",
    "q_proj": "attention.q_proj",
    "k_proj": "attention.k_proj",
    "v_proj": "attention.v_proj",
    "attn_out": "attention.out_proj",
    "ff_norm": "feed_forward_norm",
    "ff_proj": "feed_forward.gate_proj",  # released: ff_out(silu(ff_proj(x)) * up_proj(x))
    "up_proj": "feed_forward.up_proj",
    "ff_out": "feed_forward.down_proj",
}


def our_name(released: str) -> str:
    parts = released.removeprefix("model.transformer.").split(".")
    if parts[0] == "blocks":
        return f"blocks.{parts[1]}.{BLOCK_NAMES[parts[2]]}.weight"
    return f"{MODEL_NAMES[parts[0]]}.weight"


@pytest.fixture(scope="module")
def released_model() -> Transformer:
    config = json.loads((GOLDEN / "config.json").read_text())
    names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "mlp_hidden_size")
    model = Transformer(Shape(*(config[name] for name in names)), config["vocab_size"], config["rope_theta"])
    weights = load_file(GOLDEN / "model.safetensors")
    model.load_state_dict({our_name(name): weight for name, weight in weights.items()})
    return model


def test_logits_of_the_released_code(released_model: Transformer) -> None:
    tokens_BL = torch.tensor(json.loads((GOLDEN / "input_ids.json").read_text()))
    golden_BLV = torch.tensor(np.load(GOLDEN / "logits.npy"))
    with torch.no_grad():
        logits_BLV = released_model(tokens_BL, causal=False)
        causal_BLV = released_model(tokens_BL, causal=True)
    torch.testing.assert_close(logits_BLV, golden_BLV, rtol=0, atol=1e-4)
    assert (causal_BLV - golden_BLV).abs().max() > 0.1  # and the numbers can tell
