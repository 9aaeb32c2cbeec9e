"""Tokenizers: what they promise about text, [MASK] and EOS."""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llada_lightning.data.encoding import pieces
from llada_lightning.data.tokenizers import (
    TokenizerFiles,
    load_tokenizer,
    tokenizer_info,
    train_tokenizer,
)
from llada_lightning.support.errors import UserError

SAMPLE = [Path(__file__).read_text()]
TRAINED = train_tokenizer(SAMPLE, 300)

spelled = st.text() | st.lists(st.sampled_from(["[MASK]", "[EOS]", " ", "[", "MASK", "a", "\n"])).map("".join)


def foreign_tokenizer(folder: Path, *tokens: str, special: bool = True, vocab: dict[str, int] | None = None) -> Path:
    """A byte-level tokenizer as another project would save it: truncating, padding, with its own added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {**{letter: number for number, letter in enumerate(alphabet)}, **(vocab or {})}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=special, normalized=False) for token in tokens]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@given(spelled)
def test_any_text_comes_back_and_never_holds_a_special_id(text: str) -> None:
    tokens = ids(TRAINED, text)
    assert TRAINED.decode(tokens, skip_special_tokens=False) == text
    assert not {0, 1} & set(tokens)


def test_the_trained_vocabulary_counts_its_special_tokens(tmp_path: Path) -> None:
    info = tokenizer_info(TRAINED)
    assert (info.vocab_size, info.eos_id, info.mask_id) == (300, 0, 1)
    assert (info.eos_token, info.mask_token) == ("[EOS]", "[MASK]")
    assert train_tokenizer(SAMPLE, 300).to_str() == TRAINED.to_str()
    with pytest.raises(UserError, match="257 is below 258"):
        train_tokenizer(SAMPLE, 257)


def test_a_saved_tokenizer_read_again_is_the_same(tmp_path: Path) -> None:
    TRAINED.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_info(TokenizerFiles.of_path(tmp_path / "tokenizer.json").tokenizer) == tokenizer_info(TRAINED)
    tokenizer, info = load_tokenizer(str(tmp_path))
    assert info == tokenizer_info(TRAINED)
    assert ids(tokenizer, "the [MASK]") == ids(TRAINED, "the [MASK]")
    # The layout of the file does not count, its content does.
    record = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(record, sort_keys=True))
    assert load_tokenizer(str(tmp_path))[1].fingerprint == info.fingerprint
    assert tokenizer_info(train_tokenizer(SAMPLE, 299)).fingerprint != info.fingerprint


@given(st.text(st.sampled_from("ab .\n\té"), max_size=200), st.integers(1, 40))
def test_pieces_join_to_the_text_and_have_a_size(text: str, size: int) -> None:
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts) or parts == [""]


@given(st.lists(st.sampled_from(["the", "cat's", "x1", "==", "[MASK]", "été"]), min_size=1, max_size=60))
def test_pieces_cut_between_words_have_the_tokens_of_the_whole(words: list[str]) -> None:
    text = " ".join(words)
    assert [token for part in pieces(text, 16) for token in ids(TRAINED, part)] == ids(TRAINED, text)


def test_tokens_are_found_by_configuration_then_by_their_usual_names(tmp_path: Path) -> None:
    path = foreign_tokenizer(tmp_path, "<|endoftext|>", "<|mdm_mask|>", "<end>", "<hole>")
    info = load_tokenizer(str(path))[1]
    assert (info.eos_token, info.eos_id, info.mask_token, info.mask_id) == ("<|endoftext|>", 256, "<|mdm_mask|>", 257)
    assert info.vocab_size == 260
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<|mdm_mask|>", "eos_token": "<end>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "<hole>"}}))
    info = load_tokenizer(str(tmp_path))[1]
    assert (info.eos_token, info.mask_token) == ("<end>", "<hole>")
    info = load_tokenizer(str(tmp_path), mask_token="<|mdm_mask|>", eos_token="<|endoftext|>")[1]
    assert (info.eos_token, info.mask_token) == ("<|endoftext|>", "<|mdm_mask|>")


@given(text=spelled | st.just("x<|endoftext|>y<mask>"))
def test_a_given_tokenizer_neither_truncates_nor_pads_nor_reads_special_tokens(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = foreign_tokenizer(tmp_path_factory.getbasetemp(), "<|endoftext|>", "<mask>", special=False)
    tokenizer, info = load_tokenizer(str(path))
    tokens = ids(tokenizer, text)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    assert len(tokens) == len(text.encode())
    assert not {info.eos_id, info.mask_id} & set(tokens)


def test_without_a_mask_token_the_mend_is_named_and_works(tmp_path: Path) -> None:
    path = str(foreign_tokenizer(tmp_path, "</s>", "<gap>"))
    with pytest.raises(UserError, match=r"has no \[MASK\].*--mask-token.*--add-mask-token"):
        load_tokenizer(path)
    with pytest.raises(UserError, match=r"'<none>' is in it.*--add-mask-token"):
        load_tokenizer(path, mask_token="<none>")
    assert load_tokenizer(path, mask_token="<gap>")[1].mask_id == 257
    tokenizer, info = load_tokenizer(path, add_mask_token=True)
    assert (info.mask_token, info.mask_id, info.vocab_size) == ("[MASK]", 258, 259)
    assert 258 not in ids(tokenizer, "a [MASK] b")
    assert load_tokenizer(path, add_mask_token=True, mask_token="<new>")[1].mask_token == "<new>"


def test_without_an_end_of_text_token_the_mend_is_named(tmp_path: Path) -> None:
    path = str(foreign_tokenizer(tmp_path, "[MASK]", "<stop>"))
    with pytest.raises(UserError, match=r"no end-of-text token.*--eos-token"):
        load_tokenizer(path)
    assert load_tokenizer(path, eos_token="<stop>")[1].eos_token == "<stop>"
    with pytest.raises(UserError, match="both"):
        load_tokenizer(path, eos_token="<stop>", mask_token="<stop>")


def test_a_mask_token_that_text_can_become_is_refused(tmp_path: Path) -> None:
    path = str(foreign_tokenizer(tmp_path, "[MASK]", "[EOS]"))
    with pytest.raises(UserError, match="encodes the text 'm'"):
        load_tokenizer(path, mask_token="m")


@pytest.mark.parametrize("spec", ["missing.json", "./missing", "/a/b/c", "a/b/c"])
def test_a_missing_file(spec: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load_tokenizer(spec)


def test_a_folder_without_and_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign_tokenizer(tmp_path, "</s>", "<hole>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<hole>"}))

    def download(name: str, file: str) -> str:
        if name != "owner/name" or not (tmp_path / file).exists():
            raise ConnectionError("out of reach")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_tokenizer("owner/name")[1] == load_tokenizer(str(path))[1]
    with pytest.raises(UserError, match=r"hub does not provide it \(ConnectionError: out of reach\)"):
        load_tokenizer("other")
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING), "retries are told"
