"""Llama by `transformers`: its folders give our logits its values, and ours give its logits ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.small_checkpoints import GROUPED, changed_config, described, in_memory, written
from llada_lightning import load_model
from llada_lightning.checkpoints.convert import convert
from llada_lightning.checkpoints.stored_model import open_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "eos_token_id": [95, 94],
    "bos_token_id": 93,
}
HEADS = {"multi-head": 6, "grouped": 2, "multi-query": 1}


def theirs(folder: Path, **others: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **others})).eval()
    for name, weight in model.named_parameters():  # larger than at initialisation, so that the logits tell
        torch.nn.init.normal_(weight, mean=float(name.endswith("norm.weight")), std=0.3)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def greedy(logits_of: Any, prompt_BL: torch.Tensor, length: int) -> list[list[int]]:
    for _ in range(length):
        prompt_BL = torch.cat([prompt_BL, logits_of(prompt_BL)[:, -1:].argmax(-1)], dim=1)
    return prompt_BL.tolist()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_their_folder_gives_their_logits(tmp_path: Path, heads: str, theta: float) -> None:
    parameters = {"rope_type": "default", "rope_theta": theta}
    model = theirs(tmp_path, num_key_value_heads=HEADS[heads], rope_parameters=parameters, rms_norm_eps=1e-3)
    assert (tmp_path / "model.safetensors.index.json").exists()
    lm = load_model(tmp_path, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(tokens()), model(tokens()).logits, rtol=0, atol=2e-5)
    assert greedy(lm.logits, tokens()[:, :5], 20) == greedy(lambda t: model(t).logits, tokens()[:, :5], 20)
    assert (lm.objective, lm.compat, lm.mask_token_id, lm.start_token_id) == ("arm", None, None, None)
    assert (lm.eos_token_id, lm.end_token_ids, lm.context_length) == (95, (95, 94), 128)


def test_theta_and_eps_matter_and_are_read_as_older_versions_wrote_them(tmp_path: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    model = theirs(tmp_path, rope_parameters=parameters, rms_norm_eps=1e-3)
    with torch.no_grad():
        golden_BLV = model(tokens()).logits
    changed_config(tmp_path, rope_parameters=..., rope_theta=500_000.0, rope_scaling=None)
    torch.testing.assert_close(load_model(tmp_path, device="cpu").logits(tokens()), golden_BLV, rtol=0, atol=2e-5)
    changed_config(tmp_path, rope_theta=10_000.0)
    assert (load_model(tmp_path, device="cpu").logits(tokens()) - golden_BLV).abs().max() > 1e-2
    changed_config(tmp_path, rope_theta=500_000.0, rms_norm_eps=...)  # LlamaConfig's 1e-6
    assert load_model(tmp_path, device="cpu").model.norm_eps == 1e-6


def test_a_tied_head_is_the_embedding_and_is_copied(tmp_path: Path) -> None:
    model = theirs(tmp_path / "tied", tie_word_embeddings=True)
    lm = load_model(tmp_path / "tied", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(tokens()), model(tokens()).logits, rtol=0, atol=2e-5)
    before = lm.model.embedding.weight.clone()
    lm.model.head.weight.zero_()
    assert torch.equal(lm.model.embedding.weight, before)
    convert(open_checkpoint(tmp_path / "tied"), tmp_path / "untied", "hf-llama")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "untied").eval()
    assert again.lm_head.weight.data_ptr() != again.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_our_folder_gives_them_our_logits(tmp_path: Path, kv_heads: int) -> None:
    from dataclasses import replace

    shape = replace(GROUPED, n_kv_heads=kv_heads)
    folder = written(tmp_path / "out", "hf-llama", "arm", shape=shape, norm_eps=1e-4)
    model, report = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    lm = load_model(folder, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, lm.logits(tokens()), rtol=0, atol=2e-5)
    assert greedy(lm.logits, tokens()[:, :5], 20) == greedy(lambda t: model(t).logits, tokens()[:, :5], 20)
    assert (model.config.eos_token_id, model.config.bos_token_id) == (256, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_in_a_smaller_type_are_read_by_them_in_that_type(tmp_path: Path, dtype: torch.dtype) -> None:
    done = convert(in_memory(described("arm")), tmp_path / "out", "hf-llama", dtype=dtype, max_shard_bytes=20_000)
    assert sum(name.endswith(".safetensors") for name in done.files) > 2
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    ours = load_model(tmp_path / "out", device="cpu").model.state_dict()
    assert torch.equal(ours["blocks.1.attention.out_proj.weight"], model.model.layers[1].self_attn.o_proj.weight)


def test_old_tables_of_the_rotary_embedding_are_no_extra_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = written(tmp_path / "out", "hf-llama", "arm")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    assert load_model(folder, device="cpu").objective == "arm"


def test_the_ends_of_a_chat_model_come_from_both_files(tmp_path: Path) -> None:
    import json

    folder = written(tmp_path / "out", "hf-llama", "arm")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 12, 13]}))
    assert load_model(folder, device="cpu").end_token_ids == (256, 12, 13)
