"""A folder that is not whole, or not ours to read: one line that names it, exit code 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.small_checkpoints import GOLDEN, changed_config, golden_copy, written
from llada_lightning import load_model
from llada_lightning.commands.main import main
from llada_lightning.support.errors import UserError


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Converts a folder, which must fail as a user's mistake; returns the one line."""

    def run(folder: Path, *arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(["convert", str(folder), str(tmp_path / "out"), *arguments]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return line

    return run


def rewritten(folder: Path, **changes: Any) -> Path:
    """The golden folder with tensors changed; None removes one."""
    weights = {**load_file(GOLDEN / "model.safetensors"), **changes}
    golden_copy(folder)
    save_file({name: w for name, w in weights.items() if w is not None}, folder / "model.safetensors")
    return folder


def test_missing_and_extra_tensors_are_listed_and_counted(refused, tmp_path: Path) -> None:
    blocks = {f"model.transformer.blocks.0.{name}.weight": None for name in ("q_proj", "k_proj", "v_proj")}
    extra = {f"extra.{n}": torch.ones(2) for n in range(6)}
    line = refused(rewritten(tmp_path / "in", **blocks, **extra))
    assert "as Hugging Face LLaDA: tensors 3 missing: model.transformer.blocks.0.k_proj.weight, " in line
    assert "6 too many: extra.0, extra.1, extra.2, extra.3, and 2 more; config.json and weights do not belong" in line


def test_a_bias_is_no_tensor_of_ours(refused, tmp_path: Path) -> None:
    line = refused(rewritten(tmp_path / "in", **{"model.transformer.blocks.0.q_proj.bias": torch.ones(64)}))
    assert "1 too many: model.transformer.blocks.0.q_proj.bias" in line


def test_a_wrong_shape_is_named_with_both(refused, tmp_path: Path) -> None:
    name = "model.transformer.blocks.1.up_proj.weight"
    line = refused(rewritten(tmp_path / "in", **{name: torch.ones(160, 32)}))
    assert f"{name} has shape [160, 32], expected [160, 64]" in line
    line = refused(golden_copy(tmp_path / "heads", n_kv_heads=2))
    assert "k_proj.weight has shape [64, 64], expected [32, 64]" in line


def test_numbers_that_are_no_weights(refused, tmp_path: Path) -> None:
    name = "model.transformer.ln_f.weight"
    line = refused(rewritten(tmp_path / "in", **{name: torch.ones(64, dtype=torch.int8)}))
    assert f"{name} is stored as int8; save it as float64 or float32 or bfloat16 or float16" in line


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(refused, tmp_path: Path, number: float) -> None:
    folder = written(tmp_path / "in", "hf-llama", "arm")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][0, 0] = number
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = f"'{folder}': {name} holds NaN or infinite numbers; take another checkpoint"
    assert refused(folder, "--to", "llada") == f"error: {message}"
    with pytest.raises(UserError) as error:
        load_model(folder, device="cpu")
    assert str(error.value) == message


LLADA_REFUSED = {
    "include_qkv_bias": True,
    "include_bias": True,
    "bias_for_layer_norm": True,
    "layer_norm_type": "low_precision",
    "layer_norm_with_affine": False,
    "activation_type": "gelu",
    "block_type": "sequential",
    "alibi": True,
    "rope": False,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "input_emb_norm": True,
    "scale_logits": True,
    "attention_layer_norm": True,
    "block_group_size": 2,
    "architectures": ["LLaDAMoEModelLM"],
    "quantization_config": {"bits": 4},
}


@pytest.mark.parametrize("key", LLADA_REFUSED)
def test_other_mathematics_is_refused_by_name_and_value(refused, tmp_path: Path, key: str) -> None:
    line = refused(golden_copy(tmp_path / "in", **{key: LLADA_REFUSED[key]}))
    assert f"{key} is {json.dumps(LLADA_REFUSED[key])}; only " in line and line.endswith("is supported")


@pytest.mark.parametrize(("key", "means"), [("activation_type", "swiglu"), ("layer_norm_type", "default")])
def test_a_key_that_is_absent_means_what_it_means_to_the_released_code(
    refused, tmp_path: Path, key: str, means: str
) -> None:
    assert f'{key} is absent, which means "{means}"; only' in refused(golden_copy(tmp_path / "in", **{key: ...}))


@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_heads": None, "multi_query_attention": False},
        {"n_kv_heads": ..., "mlp_hidden_size": None, "mlp_ratio": 2.5},
        {"embedding_size": None, "weight_tying": ..., "max_sequence_length": ..., "include_bias": ...},
        {"vocab_size": 300, "architectures": ...},
    ],
)
def test_keys_that_may_be_null_or_absent(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain, lm = (load_model(path, device="cpu") for path in (GOLDEN, golden_copy(tmp_path / "in", **changes)))
    tokens_BL = torch.tensor([[1, 2, 319, 4]])
    assert torch.equal(lm.logits(tokens_BL), plain.logits(tokens_BL))


def test_multi_query_attention_and_heads_that_disagree(refused, tmp_path: Path) -> None:
    assert "n_kv_heads is 4; but multi_query_attention means 1" in refused(
        golden_copy(tmp_path / "in", multi_query_attention=True)
    )


def test_tied_weights_of_the_released_layout(tmp_path: Path) -> None:
    tied = rewritten(tmp_path / "in", **{"model.transformer.ff_out.weight": None})
    with pytest.raises(UserError, match=r"1 missing: model.transformer.ff_out.weight"):
        load_model(tied)
    for weight_tying in (True, ...):
        lm = load_model(changed_config(tied, weight_tying=weight_tying), device="cpu")
        assert torch.equal(lm.model.head.weight, lm.model.embedding.weight)


LLAMA_REFUSED = {
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4},
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "architectures": ["LlamaForSequenceClassification"],
}


@pytest.mark.parametrize("key", LLAMA_REFUSED)
def test_another_llama_is_refused_by_name_and_value(refused, tmp_path: Path, key: str) -> None:
    folder = changed_config(written(tmp_path / "in", "hf-llama", "arm"), rope_parameters=...)
    line = refused(changed_config(folder, **{key: LLAMA_REFUSED[key]}))
    assert f"{key} is {json.dumps(LLAMA_REFUSED[key])}; only " in line and line.endswith("is supported")


@pytest.mark.parametrize("model_type", ["mistral", None])
def test_an_unknown_architecture(refused, tmp_path: Path, model_type: str | None) -> None:
    line = refused(golden_copy(tmp_path / "in", model_type=model_type))
    assert f"model_type is {json.dumps(model_type)}; an unknown architecture; these are known: llada_light" in line


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"d_model": ...}, "d_model is null; it must be a whole number of at least 1"),
        ({"n_layers": "4"}, 'n_layers is "4"; it must be a whole number'),
        ({"n_layers": 10**7}, "n_layers is 10000000; it must be at most 10000"),
        ({"rope_theta": -1}, "rope_theta is -1; it must be a finite number above 0"),
        ({"mask_token_id": 320}, "mask_token_id is 320; it must be an id of the vocabulary, 0 to 319"),
        ({"pad_token_id": "<pad>"}, 'pad_token_id is "<pad>"; it must be an id'),
        ({"rope_theta": float("inf")}, "rope_theta is Infinity; it must be a finite number"),
        ({"mlp_hidden_size": None, "mlp_ratio": 1e307}, "mlp_ratio is 1e+307; it must be a number such as 4"),
        ({"mlp_hidden_size": 10**18}, "shape: d_ff is 1000000000000000000; it must be at most 1048576"),
        ({"model_type": ["llada"]}, 'model_type is ["llada"]; an unknown architecture'),
        ({"eos_token_id": [318, 400]}, "eos_token_id is 400; it must be an id of the vocabulary"),
        ({"eos_token_id": "318"}, 'eos_token_id is "318"; it must be an id of the vocabulary'),
        ({"n_heads": 7}, "shape: d_model 64 over n_heads 7 must give a whole, even head dimension"),
        ({"llada_lightning": 3}, "llada_lightning is 3; it must be a mapping"),
        ({"llada_lightning": {"compat": "other"}}, "compat"),
    ],
)
def test_a_value_that_does_not_serve(refused, tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    line = refused(golden_copy(tmp_path / "in", **changes))
    assert part in line and f"'{tmp_path / 'in' / 'config.json'}'" in line


def test_an_end_of_generation_outside_of_the_vocabulary(refused, tmp_path: Path) -> None:
    folder = golden_copy(tmp_path / "in")
    (folder / "generation_config.json").write_text('{"eos_token_id": [318, 400]}')
    assert "generation_config.json': eos_token_id is [318, 400]; it must hold ids of the vocabulary" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"format": 2}, "format is 2; this version reads 1"),
        ({"shape": {"n_layers": 2}}, "missing or unknown; a shape has ['n_layers', 'd_model', 'n_heads'"),
        ({"shape": [2]}, "shape is [2]; it must hold n_layers, d_model, n_heads, n_kv_heads, d_ff"),
        ({"compat": "other"}, 'compat is "other"; it must be null or llada'),
        ({"norm_eps": None}, "norm_eps is null; it must be a finite number above 0"),
        ({"text_prefix_ids": [[1]]}, "text_prefix_ids is [1]; it must be an id of the vocabulary, 0 to 271"),
        ({"objective": "bert"}, 'objective is "bert"; it must be arm or llada'),
        ({"source": 3}, "source is 3; it must be a mapping"),
        ({"start_token_id": 999}, "start_token_id is 999; it must be an id"),
        ({"qk_norm": "yes"}, 'qk_norm is "yes"; it must be true or false'),
        ({"shift_targets": 1}, "shift_targets is 1; it must be true or false"),
        ({"shift_targets": True}, "shift_targets is true; arm has no shifted targets; it must be false"),
    ],
)
def test_a_value_of_our_own_that_does_not_serve(refused, tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    line = refused(changed_config(written(tmp_path / "in", "llada", "arm"), **changes))
    assert part in line and f"'{tmp_path / 'in' / 'config.json'}'" in line


@pytest.mark.parametrize("text", ["{", "[1]", "", "[" * 100_000], ids=["open", "list", "empty", "deep"])
def test_a_damaged_config(refused, tmp_path: Path, text: str) -> None:
    folder = golden_copy(tmp_path / "in")
    (folder / "config.json").write_text(text)
    assert "config.json' " in refused(folder)


def test_half_written_folders(refused, tmp_path: Path) -> None:
    whole = GOLDEN / "model.safetensors"
    cut = golden_copy(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(whole.read_bytes()[:-100])
    assert "model.safetensors' is damaged or half-written" in refused(cut)
    none = golden_copy(tmp_path / "none")
    (none / "model.safetensors").unlink()
    assert "holds no model.safetensors: it is half-written; copy it again" in refused(none)
    alone = golden_copy(tmp_path / "alone")
    (alone / "config.json").unlink()
    assert "holds weights and no config.json: it is half-written" in refused(alone)
    assert "holds weights only; give the folder, with its config.json" in refused(alone / "model.safetensors")


def test_an_index_and_what_is_not_there(refused, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    assert main(["convert", str(GOLDEN), str(folder), "--to=hf-llada", "--max-shard-size=200KB"]) == 0
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    content = (folder / last).read_bytes()
    (folder / last).unlink()
    assert f"lacks {last}, one of 1 missing of the " in refused(folder)
    (folder / last).write_bytes(content[: len(content) // 2])
    assert f"{last}' is damaged or half-written" in refused(folder)
    names = [name for name, file in index["weight_map"].items() if file == last]
    save_file({"something": torch.ones(2)}, folder / last)
    assert f"{len(names)} missing: " in refused(folder)
    for weight_map in ({}, {"a": "../model.safetensors"}, {"a": 3}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert "model.safetensors.index.json' names no files of its folder" in refused(folder)


def test_pickled_weights_alone_are_refused_with_the_mend(refused, tmp_path: Path) -> None:
    folder = golden_copy(tmp_path / "in")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    line = refused(folder)
    assert "holds its weights as pickles only" in line and "save_pretrained(..., safe_serialization=True)" in line


def test_what_is_no_checkpoint(refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is no checkpoint: it has no config.json and no checkpoints/step=" in refused(tmp_path / "empty")
    assert "nowhere' does not exist; give a run's folder" in refused(tmp_path / "nowhere")
    assert refused(Path("owner/Name")).endswith("is fetched first: hf download owner/Name --local-dir Name")
    assert "hub" not in refused(Path("runs/absent/llada"))


def test_the_layout_of_the_other_objective(refused, tmp_path: Path) -> None:
    arm, llada = (written(tmp_path / name, "llada", name) for name in ("arm", "llada"))  # type: ignore[arg-type]
    assert "--to hf-llama: " in (line := refused(llada, "--to=hf-llama"))
    assert line.endswith("is of llada; choose --to hf-llada or --to llada")
    assert refused(arm, "--to=hf-llada").endswith("is of arm; choose --to hf-llama or --to llada")


def test_an_output_that_is_a_file(refused, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "out' is a file; give the name of a folder" in refused(GOLDEN, "--to=hf-llada")


def test_an_output_that_is_taken(refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert "out' is there already and is not empty; choose another name" in refused(GOLDEN, "--to=hf-llada")
    (tmp_path / "out" / "file").unlink()
    assert main(["convert", str(GOLDEN), str(tmp_path / "out"), "--to=hf-llada"]) == 0  # an empty folder will do


def test_an_output_that_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, link = tmp_path / "here", tmp_path / "link"
    here.mkdir()
    link.symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(here)
    for out in (".", "", str(here), str(link)):
        assert main(["convert", str(GOLDEN), out]) == 2
        error = capsys.readouterr().err
        assert error.endswith("is the folder you are in, or a link, and cannot be replaced; choose a new name\n"), error
    assert sorted(tmp_path.rglob("*")) == [here, link]


@pytest.mark.parametrize("arguments", [("--to=gguf",), ("--dtype=int4",), ("--max-shard-size=big",), ("--too=llada",)])
def test_options_that_are_none(refused, arguments: tuple[str, ...]) -> None:
    value = arguments[0].split("=")[1]
    assert value in refused(GOLDEN, *arguments) or "--too" in arguments[0]
