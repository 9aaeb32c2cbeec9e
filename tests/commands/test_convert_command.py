"""`llada convert`: what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.small_checkpoints import GOLDEN, golden_copy, tokenizer_folder, written
from llada_lightning import load_model
from llada_lightning.commands.main import main


def test_the_table_says_what_it_was_and_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(GOLDEN), str(tmp_path / "out"), "--max-shard-size=300KB"]) == 0
    printed = capsys.readouterr()
    text = " ".join(printed.out.split())
    assert "Hugging Face LLaDA" in text and "inference checkpoint of llada-lightning, llada" in text
    for figure in ("n_kv_heads 4", "[MASK] 319, end 318", "39", "229,952", "float32", "4 of weights"):
        assert figure in text, figure
    assert printed.err == "note: there is no tokenizer; give --tokenizer to add the model's\n"


def test_json_is_one_object_with_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(GOLDEN), str(tmp_path / "out"), "--to=hf-llada", "--dtype=bfloat16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["was"], told["is"], told["objective"], told["dtype"]) == ("hf-llada", "hf-llada", "llada", "bfloat16")
    assert (told["tensors"], told["parameters"], told["tokenizer"]) == (39, 229_952, False)
    assert told["files"] == ["README.md", "config.json", "model.safetensors"] and told["pushed"] is None
    assert told["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert told["end_token_ids"] == [318] and told["mask_token_id"] == 319


def test_notes_tell_what_other_programs_have_to_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "arm", "llada", "arm", tokenizer_folder(tmp_path / "tokenizer"))
    assert main(["convert", str(folder), str(tmp_path / "theirs"), "--to=hf-llama"]) == 0
    [note] = capsys.readouterr().err.splitlines()
    assert "without a probability for [MASK] (257)" in note and note.endswith("(transformers' generate does not)")
    assert main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().err == ""
    (folder / "tokenizer.json").unlink()
    assert main(["convert", str(folder), str(tmp_path / "bare"), "--to=hf-llama"]) == 0
    _, second, third = capsys.readouterr().err.splitlines()
    assert "with token 256 before every sequence; other programs must put it there" in second
    assert "there is no tokenizer" in third


def test_a_note_tells_how_transformers_loads_a_llada(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a folder"
    assert main(["convert", str(GOLDEN), str(out), "--to=hf-llada"]) == 0
    note, _ = capsys.readouterr().err.splitlines()
    files = "configuration_llada.py modeling_llada.py"
    assert f"fetch it with: hf download GSAI-ML/LLaDA-8B-Base {files} --local-dir '{out}' (in an environment" in note
    assert "transformers 4.57.6 reads the tokenizer; the authors ask for 4.38.2" in note
    coded = golden_copy(tmp_path / "coded")
    for file in files.split():
        (coded / file).write_text("# the authors' code")
    assert main(["convert", str(coded), str(tmp_path / "out"), "--to=hf-llada"]) == 0
    assert "authors" not in capsys.readouterr().err


def test_a_tokenizer_can_be_added(tmp_path: Path) -> None:
    folder, tokenizer = written(tmp_path / "in", "llada", "llada"), tokenizer_folder(tmp_path / "tokenizer")
    assert main(["convert", str(folder), str(tmp_path / "out"), f"--tokenizer={tokenizer}"]) == 0
    assert load_model(tmp_path / "out", device="cpu").decode([97 - 33]) == "a"
