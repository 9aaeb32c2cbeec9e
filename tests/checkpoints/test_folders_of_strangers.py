"""Folders that transformers reads, and what is said of those that are no model, or another one than they look."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from helpers.small_checkpoints import EOS, changed_config, golden_copy, tokenizer_folder, written
from llada_lightning import load_model
from llada_lightning.checkpoints.convert import convert
from llada_lightning.checkpoints.stored_model import open_checkpoint
from llada_lightning.support.errors import UserError


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama without a tokenizer and without keys of ours."""
    return changed_config(written(tmp_path / "llama", "hf-llama", "arm"), llada_lightning=...)


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_model(folder, device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_ids_that_nothing_uses_refuse_no_model(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed_config(llama, pad_token_id=-1, bos_token_id=-1)
    (llama / "generation_config.json").write_text('{"eos_token_id": -1}')
    description = open_checkpoint(llama).description
    assert (description.pad_token_id, description.bos_token_id, description.end_token_ids) == (None, None, (EOS,))
    assert capsys.readouterr().err == ""
    changed_config(llama, pad_token_id=272)
    assert open_checkpoint(llama).description.pad_token_id is None
    assert (
        "config.json': pad_token_id 272 is outside of the vocabulary of 272 and is left out" in capsys.readouterr().err
    )


def test_a_special_token_without_an_embedding_is_left_out(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_folder(llama, special=("[EOS]", *(f"<{n}>" for n in range(15)), "<pad>"))
    lm = load_model(llama, device="cpu")
    assert lm.tokenizer is not None and lm.tokenizer.token_to_id("<pad>") is None
    assert lm.decode(lm.encode("a <pad>")) == "a <pad>" and max(lm.encode("a <pad>")) < 256
    assert "<pad> is left out, because the model has no embedding for ids from 272 on" in capsys.readouterr().err


def test_a_head_that_is_stored_counts_though_the_configuration_ties_it(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_config(llama, tie_word_embeddings=True)
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    tokens_BL = torch.arange(40)[None]
    lm = load_model(llama, device="cpu")
    assert "ties the output head to the embedding" in (note := capsys.readouterr().err) and "stored head counts" in note
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(tokens_BL), model(tokens_BL).logits, rtol=0, atol=1e-4)
    convert(open_checkpoint(llama), tmp_path / "out", "hf-llama")
    stored = load_file(llama / "model.safetensors")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in stored)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, llama / "model.safetensors")
    capsys.readouterr()
    load_model(llama, device="cpu")
    assert capsys.readouterr().err == ""


def test_the_released_code_leaves_a_stored_head_out_and_so_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = load_model(golden_copy(tmp_path / "in", weight_tying=True), device="cpu")
    assert torch.equal(lm.model.head.weight, lm.model.embedding.weight)
    assert "the embedding is the head, as in the released code" in capsys.readouterr().err


def test_an_adapter_is_no_model(llama: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_config.json").write_text("{}")
    shutil.copy(llama / "model.safetensors", alone / "adapter_model.safetensors")
    line = refused(alone)
    assert "holds an adapter (adapter_config.json, adapter_model.safetensors)" in line and "merge it" in line
    shutil.copy(alone / "adapter_config.json", llama)
    assert "holds an adapter (adapter_config.json)" in refused(llama)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.fp16.safetensors",
            "holds no model.safetensors, but model.fp16.safetensors; if that is the whole model",
        ),
        ("consolidated.safetensors", "holds no model.safetensors, but consolidated.safetensors, which is its authors'"),
        ("model-00001-of-00002.safetensors", "and no model.safetensors.index.json: it is half-written"),
    ],
)
def test_weights_by_another_name_are_named(llama: Path, name: str, message: str) -> None:
    (llama / "model.safetensors").rename(llama / name)
    assert message in refused(llama)
    (llama / "config.json").unlink()
    assert "no config.json" in refused(llama)


@pytest.mark.parametrize(
    ("old", "new"),
    [("", "_orig_mod."), ("", "module."), ("model.", "model._orig_mod.")],
    ids=["compiled", "ddp", "inner"],
)
def test_names_that_a_wrapper_changed(llama: Path, old: str, new: str) -> None:
    weights = load_file(llama / "model.safetensors")
    renamed = {name.replace(old, new, 1) if name.startswith(old) else name: w for name, w in weights.items()}
    save_file(renamed, llama / "model.safetensors")
    line = refused(llama)
    assert f"'{new.removeprefix(old)}'" in line and "the copy is incomplete" not in line


def test_a_byte_order_mark_and_keys_that_stand_twice(llama: Path) -> None:
    path = llama / "config.json"
    text = path.read_text()
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert load_model(llama, device="cpu").objective == "arm"
    path.write_text('{"rms_norm_eps": 1,\n' + text.removeprefix("{"))
    assert "the key 'rms_norm_eps' is given in line 1 and again in line 2" in refused(llama)
    path.write_text(text)
    (llama / "generation_config.json").write_text('{"eos_token_id": 1,\n"eos_token_id": 2}')
    assert "generation_config.json': the key 'eos_token_id' is given in line 1 and again" in refused(llama)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rms_norm_eps", float("nan"), "rms_norm_eps is NaN; it must be a finite number above 0"),
        ("rms_norm_eps", 0, "rms_norm_eps is 0; it must be a finite number"),
        ("rope_theta", 1e-300, "rope_theta is 1e-300; it must be a finite number above 0, also in 32 bits"),
        ("num_hidden_layers", 10**8, "n_layers is 100000000; it must be at most 10000"),
    ],
)
def test_numbers_that_no_model_has(llama: Path, key: str, value: float, message: str) -> None:
    assert message in refused(changed_config(llama, rope_parameters=..., **{key: value}))
