"""Text to ids and back: bounded in time and memory whatever the tokenizer, and what does not come back is counted."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from llada_lightning.data import encoding
from llada_lightning.data.encoding import decode, encode, encode_batch, load, lost_bytes
from llada_lightning.data.tokenizers import train_tokenizer
from llada_lightning.support.errors import LibraryPanicError, UserError, panics_as_exceptions

TEXT = "the cat sat on the mat, 12 times"
PLAIN = json.loads(train_tokenizer([TEXT * 9], 300).to_str())
ENDLESS = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
GROWING = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 30}] * 4


def other(**parts: Any) -> Tokenizer:
    """The byte-level tokenizer with some parts exchanged."""
    return load(json.dumps({**PLAIN, **parts}), "tokenizer.json")


def split(pattern: str) -> Tokenizer:
    byte_level = {**PLAIN["pre_tokenizer"], "use_regex": False}
    pretokenizers = [{**ENDLESS, "pattern": {"Regex": pattern}}, byte_level]
    return other(pre_tokenizer={"type": "Sequence", "pretokenizers": pretokenizers})


def process_of(tokenizer: Tokenizer) -> Any:
    process = encoding._process_of(tokenizer)
    assert process is not None
    return process._process


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_byte_level_bpe_works_in_this_process() -> None:
    tokenizer = other()
    assert encoding._process_of(tokenizer) is None
    assert decode(tokenizer, encode(tokenizer, TEXT)) == TEXT


@pytest.mark.parametrize("special", [False, True])
def test_a_child_process_gives_what_the_library_gives(special: bool) -> None:
    tokenizer = split(r"\s+|\w+|.")
    tokenizer.encode_special_tokens = special
    texts = [TEXT, "", "é 海 [MASK]", "\n\0\u2028"]
    expected = [each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert encode_batch(tokenizer, texts) == expected
    assert [encode(tokenizer, text) for text in texts] == expected
    for skip in (False, True):
        found = [decode(tokenizer, ids, skip_special_tokens=skip) for ids in expected]
        assert found == tokenizer.decode_batch(expected, skip_special_tokens=skip)
    assert process_of(tokenizer).poll() is None


def test_a_child_process_that_cannot_be_started_is_no_fault_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    tokenizer = split(r"\s+|\w+|.")
    monkeypatch.setattr("llada_lightning.support.limited_process.subprocess.Popen", full)
    with pytest.raises(OSError, match="Too many open files"):  # which a command says with its own remedy
        encode(tokenizer, TEXT)


def test_an_endless_regular_expression_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = other(pre_tokenizer=ENDLESS)
    assert decode(tokenizer, encode(tokenizer, "a" * 20)) == "a" * 20
    message = refusal(lambda: encode(tokenizer, "a" * 4000 + "b"))
    assert message.startswith("the tokenizer cannot encode a text of 4,001 characters: Onig: ")
    assert capfd.readouterr().err == ""  # where Rust prints the stack of a panic
    assert encode(tokenizer, "a")


def test_a_normalizer_that_grows_is_ended_by_the_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MEMORY_BYTES", 1 << 28)
    tokenizer = other(normalizer={"type": "Sequence", "normalizers": GROWING})
    assert "takes more than 256 MiB of memory" in refusal(lambda: encode(tokenizer, "a" * 64))
    monkeypatch.undo()
    assert encode(tokenizer, "b") == encode(other(), "b")  # by another process


def test_a_decoder_that_grows_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MEMORY_BYTES", 1 << 28)
    tokenizer = other(decoder={"type": "Sequence", "decoders": GROWING})
    ids = encode(tokenizer, "a b")
    monkeypatch.setattr(encoding, "BYTES_PER_CHARACTER", 0)
    assert "the tokenizer cannot decode" in refusal(lambda: decode(tokenizer, ids * 400))


def test_a_model_that_needs_the_square_of_a_word_is_ended_by_the_limit_of_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "CPU_SECONDS", 1)
    monkeypatch.setattr(encoding, "CHARACTERS_PER_CPU_SECOND", 1 << 30)
    words = models.WordPiece({"[UNK]": 0, "b": 1}, unk_token="[UNK]", max_input_chars_per_word=1 << 30)
    tokenizer = load(Tokenizer(words).to_str(), "tokenizer.json")
    assert "takes more than 1 seconds of CPU time" in refusal(lambda: encode(tokenizer, "a" * 400_000))


def test_a_process_that_is_killed_is_begun_again() -> None:
    tokenizer = split(".")
    ids = encode(tokenizer, TEXT)
    process = process_of(tokenizer)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert encode(tokenizer, TEXT) == ids


def test_the_process_ends_with_its_tokenizer() -> None:
    tokenizer = split(".")
    encode(tokenizer, TEXT)
    process = process_of(tokenizer)
    del tokenizer
    assert process.wait(60) == -signal.SIGKILL


def test_a_fork_begins_a_process_of_its_own() -> None:
    tokenizer = split(".")
    ids, process = encode(tokenizer, TEXT), process_of(tokenizer)
    fork = os.fork()
    if fork == 0:
        os._exit(0 if encode(tokenizer, TEXT) == ids and process_of(tokenizer) is not process else 1)
    assert os.waitpid(fork, 0)[1] == 0
    assert encode(tokenizer, TEXT) == ids
    assert process_of(tokenizer) is process


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        (json.dumps({**PLAIN, "model": {"type": "Other"}}), "is not a tokenizer.json"),
        (json.dumps({**PLAIN, "pre_tokenizer": {**ENDLESS, "pattern": {"Regex": "("}}}), "is not a tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer(text: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(lambda: load(text, "my.json"))
    assert capfd.readouterr().err == ""


def test_a_panic_becomes_an_exception_and_others_stay() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(LibraryPanicError, match="gave up here"), panics_as_exceptions():
        raise panic("gave up\nhere")
    for error in (KeyboardInterrupt, SystemExit, ValueError):
        with pytest.raises(error), panics_as_exceptions():
            raise error


@pytest.mark.parametrize(
    ("text", "decoded", "lost"),
    [
        ("the sea", "the sea", 0),
        ("The SEA", "the sea", 4),  # capitals
        ("a\n\n\nb", "a b", 3),  # white space joined
        ("it's", "it ' s", 2),  # white space put in
        ("海 b", " b", 3),  # unknown
        ("ab", "ba", 1),  # the same characters otherwise
        ("a", "a [UNK] and more", 1),  # at most all
        ("", " ", 0),
    ],
)
def test_lost_bytes(text: str, decoded: str, lost: int) -> None:
    assert lost_bytes(text, decoded) == lost
