"""Written and read again: bit for bit through every layout, whatever the shape and the size of the shards."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.small_checkpoints import GOLDEN, GROUPED, described, golden_copy, in_memory, tokenizer_folder, written
from llada_lightning import load_model
from llada_lightning.checkpoints import convert as convert_module
from llada_lightning.checkpoints.convert import bytes_of, convert
from llada_lightning.checkpoints.stored_model import StoredModel, open_checkpoint
from llada_lightning.checkpoints.stored_tensors import of_tensor, read_folder
from llada_lightning.compute.shapes import Shape
from llada_lightning.support.errors import UserError


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv_heads, groups, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    heads = kv_heads * groups
    return Shape(draw(st.integers(1, 3)), heads * head_dim, heads, kv_heads, draw(st.integers(1, 20)))


def same(left: StoredModel, right: StoredModel) -> None:
    assert left.description == right.description
    assert list(left.weights) == list(right.weights)
    for name, weight in left.weights.items():
        assert weight.dtype == right.weights[name].dtype
        assert torch.equal(weight.read(), right.weights[name].read()), name


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes(),
    objective=st.sampled_from(["arm", "llada"]),
    vocab_size=st.integers(258, 300),
    shard_bytes=st.integers(1, 60_000),
    facts=st.fixed_dictionaries(
        {
            "rope_theta": st.floats(1, 1e7),
            "norm_eps": st.floats(1e-8, 1e-2),
            "compat": st.sampled_from([None, "llada"]),
            "start_token_id": st.sampled_from([None, 3, 256]),
            "bos_token_id": st.sampled_from([None, 4]),
            "pad_token_id": st.sampled_from([5, 256]),
            "text_prefix_ids": st.sampled_from([(), (7,), (7, 8)]),
            "end_token_ids": st.sampled_from([(), (256, 1), (9,)]),
            "source": st.sampled_from([{}, {"run": "a", "step": 3}]),
        }
    ),
)
def test_ours_to_theirs_to_ours_loses_nothing(
    shape: Shape, objective: Any, vocab_size: int, shard_bytes: int, facts: dict[str, Any]
) -> None:
    model = in_memory(described(objective, shape, vocab_size, **facts))
    there: Any = {"arm": "hf-llama", "llada": "hf-llada"}[objective]
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / name for name in ("ours", "theirs", "again")]
        for folder, to in zip(folders, ("llada", there, "llada"), strict=True):
            convert(model, folder, to, max_shard_bytes=shard_bytes)
            opened = open_checkpoint(folder)
            same(model, opened)
            model = opened
        first, last = (json.loads((folder / "config.json").read_text()) for folder in (folders[0], folders[2]))
        assert first == last


def test_the_golden_folder_comes_back_as_the_released_code_reads_it(tmp_path: Path) -> None:
    convert(open_checkpoint(GOLDEN), tmp_path / "ours", "llada")
    convert(open_checkpoint(tmp_path / "ours"), tmp_path / "theirs", "hf-llada")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN, tmp_path / "theirs"))
    places = after.pop("auto_map")
    assert places == {**before.pop("auto_map"), "AutoModel": "modeling_llada.LLaDAModelLM"}
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {"torch_dtype", "llada_lightning"}
    old, new = read_folder(GOLDEN), read_folder(tmp_path / "theirs")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name].read(), new[name].read()) for name in old)
    assert load_model(tmp_path / "ours", device="cpu").compat == "llada"


def test_modelling_code_goes_along_where_the_folder_has_it(tmp_path: Path) -> None:
    folder = golden_copy(tmp_path / "in")
    (folder / "modeling_llada.py").write_text("raise SystemExit")
    convert(open_checkpoint(folder), tmp_path / "out", "hf-llada", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "configuration_llada.LLaDAConfig"
    assert (config["torch_dtype"], config["precision"]) == ("bfloat16", "amp_bf16")
    assert (tmp_path / "out" / "modeling_llada.py").read_text() == "raise SystemExit"
    convert(open_checkpoint(folder), tmp_path / "ours", "llada")
    assert not (tmp_path / "ours" / "modeling_llada.py").exists()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llada_with_grouped_heads_is_the_same_function_in_either_layout(tmp_path: Path, kv_heads: int) -> None:
    shape = replace(GROUPED, n_kv_heads=kv_heads)
    tokens_BL = torch.randint(0, 272, (2, 30), generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        load_model(written(tmp_path / to, to, "llada", shape=shape), device="cpu") for to in ("llada", "hf-llada")
    )
    assert torch.equal(ours.logits(tokens_BL), theirs.logits(tokens_BL))
    assert (ours.compat, theirs.compat) == (None, None)


def test_no_file_is_larger_than_asked_and_the_index_is_true(tmp_path: Path) -> None:
    done = convert(in_memory(described("llada")), tmp_path / "out", "hf-llada", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_folder(tmp_path / "out")
    size = {name: tensor.elements * tensor.dtype.itemsize for name, tensor in tensors.items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(size.values()) == done.parameters * 4
    files = {file: [n for n, place in index["weight_map"].items() if place == file] for file in done.files}
    for file, names in files.items():
        assert sum(size[name] for name in names) <= 40_000 or len(names) <= 1, file
    shards = [file for file in done.files if file.endswith(".safetensors")]
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert len(shards) > 2
    assert oct((tmp_path / "out" / shards[0]).stat().st_mode) == oct((tmp_path / "out" / "config.json").stat().st_mode)


def test_a_tokenizer_goes_along_unchanged(tmp_path: Path) -> None:
    tokenizer = tokenizer_folder(tmp_path / "tokenizer")
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "[EOS]", "chat_template": "{{ messages }}"}')
    folder = written(tmp_path / "ours", "llada", "arm", tokenizer)
    convert(open_checkpoint(folder), tmp_path / "theirs", "hf-llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tokenizer / name).read_bytes()
    assert load_model(tmp_path / "theirs", device="cpu").chat_template == "{{ messages }}"


def test_values_beyond_a_type_are_refused(tmp_path: Path) -> None:
    model = in_memory(described("arm"))
    large = {**model.weights, "norm.weight": of_tensor(torch.full((32,), 1e5))}
    with pytest.raises(UserError, match=r"model.norm.weight holds values beyond float16's 65504; choose .* bfloat16"):
        convert(replace(model, weights=large), tmp_path / "out", "hf-llama", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llada_lightning.checkpoints.convert.save_file", lambda *a, **k: full())
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device.*; free space"):
        convert(in_memory(described("arm")), tmp_path / "out", "llada")
    monkeypatch.undo()
    monkeypatch.setattr(convert_module, "write_json", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device.*; free space"):
        convert(in_memory(described("arm")), tmp_path / "out", "llada")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("10kb", 10_000), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "big", "-5GB", "0", "5TB", "0.1", "9" * 400, "1e5", "10000000000GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--max-shard-size: '.{0,40}' is no size of a file; give .* 200MB"):
        bytes_of(text)
