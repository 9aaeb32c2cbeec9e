"""Hugging Face LLaDA as it was published: key names, configuration, and the authors' classes in the folder's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from helpers.small_checkpoints import GOLDEN, described, in_memory, tokenizer_folder, written
from llada_lightning import load_model
from llada_lightning.checkpoints.card import CODE_FILES
from llada_lightning.checkpoints.convert import convert
from llada_lightning.checkpoints.stored_tensors import read_folder
from llada_lightning.compute.shapes import Shape

OF_THE_GOLDEN = Shape(n_layers=4, d_model=64, n_heads=4, n_kv_heads=4, d_ff=160)
OF_A_MODEL = {
    "vocab_size", "embedding_size", "max_sequence_length", "eos_token_id", "pad_token_id", "mask_token_id",
}  # fmt: skip
"""The keys whose values are those of a model and its tokenizer, and not of the architecture."""

CONFIGURATION = """
from transformers import PretrainedConfig


class LLaDAConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(self, d_model=1, n_layers=1, **others):
        super().__init__(**others)
        self.d_model, self.n_layers = d_model, n_layers
"""
MODELING = """
import torch
from transformers import PreTrainedModel

from .configuration_llada import LLaDAConfig


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig

    def __init__(self, config, *others, **more):
        super().__init__(config)
        transformer = torch.nn.Module()
        transformer.wte = torch.nn.Embedding(config.embedding_size, config.d_model)
        self.model = torch.nn.Module()
        self.model.transformer = transformer
        self.post_init()

    def forward(self, input_ids):
        return self.model.transformer.wte(input_ids)
"""


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code of a folder to a place of its own before it imports it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def test_a_model_of_ours_has_the_keys_and_the_values_that_were_published(tmp_path: Path) -> None:
    folder = written(tmp_path / "theirs", "hf-llada", "llada", shape=OF_THE_GOLDEN)
    published, ours = config_of(GOLDEN), config_of(folder)
    assert set(ours) - set(published) == {"torch_dtype", "llada_lightning"} and set(published) <= set(ours)
    assert {key: type(value) for key, value in published.items()} == {key: type(ours[key]) for key in published}
    of_the_architecture = set(published) - OF_A_MODEL - {"auto_map"}
    assert {key: ours[key] for key in of_the_architecture} == {key: published[key] for key in of_the_architecture}
    assert published["auto_map"].items() <= ours["auto_map"].items()
    assert [ours[key] for key in sorted(OF_A_MODEL)] == [272, 256, 257, 64, 256, 272]


def test_the_tensors_have_the_published_names_and_dimensions(tmp_path: Path) -> None:
    ours = read_folder(written(tmp_path / "theirs", "hf-llada", "llada", shape=OF_THE_GOLDEN))
    published = read_folder(GOLDEN)
    assert ours.keys() == published.keys()
    sizes = {320: 272}  # the vocabularies
    for name, tensor in published.items():
        assert ours[name].shape == tuple(sizes.get(size, size) for size in tensor.shape), name


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "float32"), (torch.bfloat16, "amp_bf16")])
def test_precision_names_the_type_as_the_authors_do(tmp_path: Path, dtype: torch.dtype, precision: str) -> None:
    convert(in_memory(described("llada")), tmp_path / "theirs", "hf-llada", dtype=dtype)
    assert config_of(tmp_path / "theirs")["precision"] == precision


def test_transformers_finds_the_classes_once_the_two_files_are_there(tmp_path: Path) -> None:
    folder = written(tmp_path / "a_llada_with_code", "hf-llada", "llada", tokenizer_folder(tmp_path / "tokenizer"))
    for name, code in zip(CODE_FILES, (CONFIGURATION, MODELING), strict=True):
        (folder / name).write_text(code)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (type(config).__name__, config.d_model, config.mask_token_id) == ("LLaDAConfig", 32, 257)
    lm = load_model(folder, device="cpu")
    for automatic in (AutoModel, AutoModelForCausalLM):
        model = automatic.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__name__ == "LLaDAModelLM"
        assert torch.equal(model.model.transformer.wte.weight, lm.model.embedding.weight)
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("ab").input_ids == lm.encode("ab")


def test_without_the_files_the_tokenizer_loads_all_the_same(tmp_path: Path) -> None:
    """The classes of the model do not, and the message names the file that is missing."""
    folder = written(tmp_path / "a_llada_without", "hf-llada", "llada", tokenizer_folder(tmp_path / "tokenizer"))
    ids = load_model(folder, device="cpu").encode("ab")
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("ab").input_ids == ids
    assert PreTrainedTokenizerFast.from_pretrained(folder)("ab").input_ids == ids  # which asks nothing
    for automatic in (AutoConfig, AutoModel):
        with pytest.raises(OSError, match=r"does not appear to have a file named configuration_llada\.py"):
            automatic.from_pretrained(folder, trust_remote_code=True)
