"""Tokenizers beside a model: what stands before a text, what ends an answer, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from helpers.small_checkpoints import BOS, EOS, MASK, SPECIAL, changed_config, described, tokenizer_folder, written
from llada_lightning import load_model
from llada_lightning.checkpoints.convert import tokenizer_files
from llada_lightning.data.tokenizers import TokenizerFiles
from llada_lightning.support.errors import UserError


def hf_llama(folder: Path, bos: bool = False, **tokenizer_config: Any) -> Path:
    """A Llama's folder as others write it: without our key."""
    tokenizer = tokenizer_folder(folder / "tokenizer", bos)
    if tokenizer_config:
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    model = written(folder / "model", "hf-llama", "arm", tokenizer, start_token_id=None)
    return changed_config(model, llada_lightning=...)


def test_bos_stands_before_a_text_as_the_post_processor_puts_it(tmp_path: Path) -> None:
    lm = load_model(hf_llama(tmp_path, bos=True), device="cpu")
    assert lm.text_prefix_ids == (BOS,) and lm.start_token_id is None
    assert lm.encode_prompt("ab") == [BOS, *lm.encode("ab")] and BOS not in lm.encode("ab")
    assert lm.encode_prompt("ab") == AutoTokenizer.from_pretrained(tmp_path / "model")("ab").input_ids


@pytest.mark.parametrize(
    ("bos", "config", "prefix"),
    [
        (False, {}, ()),
        (False, {"bos_token": "<bos>", "add_bos_token": True}, (BOS,)),
        (True, {"bos_token": {"content": "<bos>"}, "add_bos_token": False}, ()),
        (True, {"bos_token": "<bos>", "add_bos_token": True}, (BOS,)),
        (True, {"bos_token": "<bos>"}, (BOS,)),
    ],
)
def test_add_bos_token_counts_before_the_post_processor(
    tmp_path: Path, bos: bool, config: dict[str, Any], prefix: tuple[int, ...]
) -> None:
    assert load_model(hf_llama(tmp_path, bos, **config), device="cpu").text_prefix_ids == prefix


def test_a_model_of_ours_puts_nothing_before_a_text_whatever_its_tokenizer_says(tmp_path: Path) -> None:
    """Prepared data holds no BOS, also where its tokenizer was made for a model that has one."""
    tokenizer = tokenizer_folder(tmp_path / "tokenizer", bos=True)
    for to in ("llada", "hf-llama"):
        lm = load_model(written(tmp_path / to, to, "arm", tokenizer), device="cpu")
        assert lm.text_prefix_ids == () and lm.start_token_id == EOS


def test_the_chat_template_and_the_ends_of_a_turn(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    tokenizer = tokenizer_folder(tmp_path / "tokenizer", special=(*SPECIAL, "<|eot_id|>", "<|im_end|>"))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[EOS]", "chat_template": template}))
    folder = written(tmp_path / "model", "hf-llada", "llada", tokenizer)
    lm = load_model(folder, device="cpu")
    assert lm.chat_template == template
    assert lm.end_token_ids == (EOS, 259)  # <|im_end|>, 260, is not in the template
    (folder / "chat_template.jinja").write_text("another")
    lm = load_model(folder, device="cpu")
    assert lm.chat_template == "another" and lm.end_token_ids == (EOS,)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_model(folder, device="cpu").chat_template == "yes"


def test_another_eos_in_a_folders_own_configuration_ends_an_answer_too(tmp_path: Path) -> None:
    """A chat model's `eos_token` is often the end of a turn, where config.json has the end of a text."""
    folder = hf_llama(tmp_path, eos_token="<bos>")
    assert load_model(folder, device="cpu").end_token_ids == (EOS, BOS)


def test_text_never_becomes_a_special_token_though_the_file_has_it_as_a_plain_one(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "hf-llada", "llada", tokenizer_folder(tmp_path / "tokenizer"))
    record = json.loads((folder / "tokenizer.json").read_text())
    for entry in record["added_tokens"]:
        entry["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(record))
    assert MASK in Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a[MASK]").ids  # the library's own way
    lm = load_model(folder, device="cpu")
    assert not {EOS, MASK} & set(lm.encode("a[MASK] [EOS]")) and lm.decode(lm.encode("a[MASK]")) == "a[MASK]"


def test_transformers_reads_the_tokenizer_that_stood_alone(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "hf-llama", "arm", tokenizer_folder(tmp_path / "tokenizer"))
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_model(folder, device="cpu")
    assert (theirs.eos_token_id, theirs.mask_token_id, theirs.bos_token_id) == (EOS, MASK, EOS)
    assert theirs("12 plus é").input_ids == [EOS, *ours.encode("12 plus é")]


def test_special_ids_that_config_json_does_not_say_are_the_tokenizers(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "hf-llada", "llada", tokenizer_folder(tmp_path / "tokenizer"))
    changed_config(folder, mask_token_id=None, eos_token_id=..., llada_lightning=...)
    lm = load_model(folder, device="cpu")
    assert (lm.mask_token_id, lm.eos_token_id) == (MASK, EOS)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"config.json': eos_token_id is null; write the id"):
        load_model(folder)
    with pytest.raises(UserError, match=r"mask_token_id is null; give the id of \[MASK\]"):
        load_model(changed_config(folder, eos_token_id=EOS))


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (("[EOS]",), r"has 257 ids and no 257, the model's \[MASK\]; give the model's own with --tokenizer"),
        ((), r"has 256 ids and no 256, the model's EOS; give"),
        (("[MASK]", "[EOS]"), r"has EOS as 257, the model as 256; give"),
        (("[EOS]", "<x>", "[MASK]"), r"has \[MASK\] as 258, the model as 257; give"),
        (tuple(f"<{n}>" for n in range(40)), r"has ids up to 295, the model only 272; give"),
    ],
)
def test_a_tokenizer_that_is_not_the_models(tmp_path: Path, special: tuple[str, ...], message: str) -> None:
    folder = written(tmp_path / "model", "llada", "llada")
    other = tokenizer_folder(tmp_path / "other", special=special)
    with pytest.raises(UserError, match=message):
        load_model(folder, tokenizer=other)
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    if "has EOS" not in message:  # a folder's own may name a turn's end
        with pytest.raises(UserError, match=message):
            load_model(folder)


def test_a_given_tokenizer_comes_with_what_stands_beside_it(tmp_path: Path) -> None:
    folder = changed_config(written(tmp_path / "model", "hf-llama", "arm"), llada_lightning=...)
    given = tokenizer_folder(tmp_path / "given", bos=True)
    (given / "chat_template.jinja").write_text("{{ messages }}")
    for spec in (given, given / "tokenizer.json"):
        lm = load_model(folder, tokenizer=spec, device="cpu")
        assert lm.chat_template == "{{ messages }}" and lm.text_prefix_ids == (BOS,)
    with pytest.raises(UserError, match=r"holds no tokenizer.json"):
        load_model(folder, tokenizer=folder)
    (given / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json' is not JSON: Expecting property name"):
        load_model(folder, tokenizer=given)


def test_a_tokenizer_with_a_configuration_is_written_as_it_is(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    alone = TokenizerFiles.of_path(folder)
    made = json.loads(tokenizer_files(alone, described("llada"), "llada")["tokenizer_config.json"])
    assert (made["mask_token"], made["eos_token"], made["pad_token"]) == ("[MASK]", "[EOS]", "[EOS]")
    assert "bos_token" not in made and made["model_max_length"] == 64
    (folder / "tokenizer_config.json").write_text("{}")
    files = TokenizerFiles.of_path(folder)
    assert tokenizer_files(files, described("llada"), "llada")["tokenizer_config.json"] == b"{}"


TWO = [{"name": "rag", "template": "x"}, {"name": "default", "template": "{{ messages }}"}]


@pytest.mark.parametrize(("template", "read"), [(TWO, "{{ messages }}"), (TWO[:1], None), ([], None), (None, None)])
def test_of_several_chat_templates_the_default(tmp_path: Path, template: Any, read: str | None) -> None:
    assert load_model(hf_llama(tmp_path, chat_template=template), device="cpu").chat_template == read


@pytest.mark.parametrize("template", [5, {"default": "x"}, ["x"], [{"name": [], "template": "x"}], [{"name": "a"}]])
def test_a_chat_template_of_another_form(tmp_path: Path, template: Any) -> None:
    message = r"tokenizer.json': tokenizer_config.json beside it has a chat_template that is neither text nor a list"
    with pytest.raises(UserError, match=message):
        load_model(hf_llama(tmp_path, chat_template=template), device="cpu")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", b"\xff\xfe", r"chat_template.jinja beside it is not UTF-8; copy it again"),
        ("tokenizer_config.json", b"[1]", r"tokenizer_config.json beside it is damaged; copy it again"),
        ("tokenizer_config.json", b"[" * 100_000, r"tokenizer_config.json' is nested too deeply; at most 100 levels"),
        ("special_tokens_map.json", b"[" * 100_000, r"special_tokens_map.json' is nested too deeply; at most 100"),
        (
            "special_tokens_map.json",
            b'{"a": 1,\n"a": 2}',
            r"map.json': the key 'a' is given in line 1 and again in line 2",
        ),
    ],
)
def test_a_companion_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = hf_llama(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_model(folder, device="cpu")
