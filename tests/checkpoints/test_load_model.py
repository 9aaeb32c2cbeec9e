"""`load_model`: the released layout's golden logits, and what the model knows of itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.forked import exit_codes
from helpers.small_checkpoints import (
    EOS,
    GOLDEN,
    GROUPED,
    MASK,
    described,
    golden_copy,
    in_memory,
    tokenizer_folder,
    training_content,
    write_shards,
    written,
)
from llada_lightning import load_model
from llada_lightning.compute.shapes import Shape
from llada_lightning.support.errors import UserError


def test_the_golden_folder_gives_the_released_logits() -> None:
    lm = load_model(GOLDEN, device="cpu")
    tokens_BL = torch.tensor(json.loads((GOLDEN / "input_ids.json").read_text()))
    golden_BLV = torch.tensor(np.load(GOLDEN / "logits.npy"))
    torch.testing.assert_close(lm.logits(tokens_BL), golden_BLV, rtol=0, atol=1e-5)
    assert (lm.objective, lm.causal, lm.compat, lm.excluded_token_id) == ("llada", False, "llada", None)
    assert (lm.mask_token_id, lm.eos_token_id, lm.end_token_ids, lm.start_token_id) == (319, 318, (318,), None)
    assert (lm.context_length, lm.tokenizer, lm.name) == (256, None, str(GOLDEN))
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    with pytest.raises(UserError, match="has no tokenizer"):
        lm.encode_prompt("text")


@pytest.mark.parametrize("objective", ["arm", "llada"])
def test_a_folder_of_ours_gives_what_was_written(tmp_path: Path, objective: str) -> None:
    tokenizer = tokenizer_folder(tmp_path / "tokenizer")
    lm = load_model(written(tmp_path / "out", "llada", objective, tokenizer), device="cpu")
    model = in_memory(described(objective))
    for name, weight in lm.model.state_dict().items():
        assert torch.equal(weight, model.weights[name].read()), name
    assert lm.objective == objective and lm.compat is None and lm.excluded_token_id == MASK
    assert lm.start_token_id == (EOS if objective == "arm" else None)
    assert lm.encode_prompt("a [MASK]") == lm.encode("a [MASK]") and MASK not in lm.encode("a [MASK]")
    assert lm.decode(lm.encode("a [MASK]é")) == "a [MASK]é"


def test_weights_come_in_the_type_that_is_asked_for() -> None:
    stored, half = load_model(GOLDEN, device="cpu"), load_model(GOLDEN, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in stored.model.parameters()} == {torch.float32}
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert load_model(GOLDEN, device="cpu", dtype=torch.float64).model.head.weight.dtype == torch.float64
    with pytest.raises(UserError, match="dtype: 'int8' is not known; choose from float64, float32"):
        load_model(GOLDEN, dtype="int8")


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "", "meta", "meta:0", "hpu"])
def test_a_device_that_cannot_be_used(device: str) -> None:
    with pytest.raises(
        UserError, match=rf"^--device '{device}' cannot be used \(.+\); give cpu, or leave it out"
    ) as error:
        load_model(GOLDEN, device=device)
    assert "\n" not in str(error.value)


def test_mixed_types_become_the_widest(tmp_path: Path) -> None:
    folder = golden_copy(tmp_path / "mixed")
    weights = load_file(folder / "model.safetensors")
    halves = {name: w if name.endswith("norm.weight") else w.bfloat16() for name, w in weights.items()}
    save_file(halves, folder / "model.safetensors")
    lm = load_model(folder, device="cpu")
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}
    assert lm.logits(torch.tensor([[1, 2, 319]])).isfinite().all()


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def measure(small: Path, large: Path, out: Path) -> None:
    """Write how many times its weights the loading of a checkpoint takes; for a process that has done little else."""
    load_model(small, device="cpu")  # what the libraries take for themselves
    before = peak()
    weights = list(load_model(large, device="cpu").model.parameters())
    sum(float(weight.sum()) for weight in weights)  # the pages of a mapped file count once they are touched
    out.write_text(str((peak() - before) / sum(weight.nbytes for weight in weights)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak memory there")
@pytest.mark.parametrize("kind", ["safetensors", "training", "shards"])
def test_loading_holds_one_copy_of_the_weights(tmp_path: Path, kind: str) -> None:
    """85 MB of weights, beside twice that of an optimizer's moments in the training checkpoints."""
    for name, shape, words in (("small", GROUPED, 272), ("large", Shape(4, 512, 8, 8, 1408), 8192)):
        description = described("llada", shape, words)
        if kind == "safetensors":
            written(tmp_path / name, "llada", "llada", shape=shape, vocab_size=words)
        elif kind == "training":
            torch.save(training_content(description, moments=True), tmp_path / name)
        else:
            write_shards(tmp_path / name, training_content(description, moments=True))
    assert exit_codes(measure, (tmp_path / "small", tmp_path / "large", tmp_path / "out")) == [0]
    assert 0.9 < float((tmp_path / "out").read_text()) < 1.4
