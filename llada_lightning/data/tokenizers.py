"""Tokenizers: a byte-level BPE is trained, or a given tokenizer is loaded and checked for [MASK] and EOS.

Two promises hold for every tokenizer of this module. Text is never encoded to the ids of [MASK] and EOS, even where it
spells them out: such text is ordinary text. And nothing is added to text: no special tokens, padding or truncation.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from llada_lightning.data.encoding import encode, load
from llada_lightning.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, TokenizerInfo, tokenizer_fingerprint
from llada_lightning.support.errors import LibraryPanicError, UserError, panics_as_exceptions
from llada_lightning.support.files import expanded
from llada_lightning.support.reading import read_json, read_text

EOS_TOKEN = "[EOS]"
MASK_TOKEN = "[MASK]"
KNOWN_MASK_TOKENS = (MASK_TOKEN, "<|mdm_mask|>", "<mask>", "<|mask|>")
KNOWN_EOS_TOKENS = (EOS_TOKEN, "<|endoftext|>", "</s>")
SMALLEST_VOCABULARY = 256 + 2
"""The number of bytes, plus EOS and [MASK]."""

LARGEST_VOCABULARY = 1 << 24
"""The largest vocabulary that is trained; the trainer reserves memory for all of it before it begins."""

PIECE_CHARS = 1 << 16
"""The largest number of characters of a piece of text that is encoded at once."""

_CONFIG_NAMES = ("tokenizer_config.json", "special_tokens_map.json")


def pieces(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    """Cuts a long text into pieces of at most ``size`` characters that join to it again.

    The encoder holds about 100 bytes for each token of a text, and gives a text to one core; a document of a gigabyte
    would fill the memory. Where possible a cut is before a single space between two words: there pre-tokenizers like
    that of GPT-2, ours among them, cut anyway, so the tokens are those of the whole text. Elsewhere (no such space in
    65,536 characters, or another kind of tokenizer) the words at a cut may be tokenized differently than in the whole
    text, but always in the same way, and they decode to the same text.

    Args:
        text: The text.
        size: The largest number of characters of a piece.
    """
    begin = 0
    while len(text) - begin > size:
        end = _cut(text, begin, begin + size)
        yield text[begin:end]
        begin = end
    yield text[begin:] if begin else text


def _cut(text: str, begin: int, end: int) -> int:
    """The last good place to cut in (begin, end]."""
    space = text.rfind(" ", begin + 1, end)
    while space > begin:
        if not text[space - 1].isspace() and not text[space + 1].isspace():
            return space
        space = text.rfind(" ", begin + 1, space)
    newline = text.rfind("\n", begin + 1, end)
    return newline if newline > begin else end


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer with ``[EOS]`` (id 0) and ``[MASK]`` (id 1).

    Args:
        texts: The texts that the tokenizer is trained on.
        vocab_size: The size of the vocabulary with both special tokens; a small sample may give fewer tokens.

    Raises:
        UserError: ``vocab_size`` is smaller than the number of bytes and special tokens, or is too large.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocabulary size {vocab_size} is below {SMALLEST_VOCABULARY} (256 bytes and two special tokens); raise "
            "--vocab-size"
        )
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"vocabulary size {vocab_size} is above {LARGEST_VOCABULARY:,}; lower --vocab-size")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, MASK_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    try:
        with panics_as_exceptions():
            tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    except LibraryPanicError as error:
        raise UserError(f"no tokenizer can be trained ({error}); lower --vocab-size or --tokenizer-bytes") from error
    return _plain(tokenizer)


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Encodes special tokens that a text spells as text; neither truncates nor pads. (The file has no such flag.)"""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_from_file(path: str | os.PathLike[str]) -> Tokenizer:
    """Returns the tokenizer of a ``tokenizer.json``, set so that a text which spells a special token stays text.

    Args:
        path: The path of the file.

    Raises:
        UserError: the file is missing or is not a tokenizer.
    """
    return tokenizer_from_text(read_text(path), str(path))


def tokenizer_from_text(text: str, name: str) -> Tokenizer:
    """Returns the tokenizer of the text of a ``tokenizer.json``; see :func:`tokenizer_from_file`.

    Args:
        text: The text of the file.
        name: The name of the file, for messages.

    Raises:
        UserError: the text is not a tokenizer, or loading it exceeds the limits of time or memory.
    """
    return _plain(load(text, name))


def load_tokenizer(
    spec: str,
    *,
    mask_token: str | None = None,
    eos_token: str | None = None,
    add_mask_token: bool = False,
    need_mask: bool = True,
    vocab_size: int | None = None,
    option: str = "--{}-token",
) -> tuple[Tokenizer, TokenizerInfo]:
    """Returns a given tokenizer, in which text never becomes [MASK] or EOS, and its special tokens.

    Args:
        spec: The path of a ``tokenizer.json`` or of a folder with one (of a Hugging Face tokenizer, or a prepared data
            folder), or a name on the Hugging Face hub.
        mask_token: The name of the mask token; None: the one that its configuration names, else one of
            ``KNOWN_MASK_TOKENS``; '': none.
        eos_token: The name of the end-of-text token; None: found in the same way, among ``KNOWN_EOS_TOKENS``.
        add_mask_token: Whether a mask token is added, with the last id, where there is none.
        need_mask: Whether a tokenizer without a mask token is refused.
        vocab_size: The size of a model's vocabulary; special tokens that it has no embedding for are left out.
        option: The option that names a token (`mask` or `eos`) in the current command, for messages.

    Raises:
        UserError: there is no such tokenizer, it lacks [MASK] or EOS, or text can be encoded to one of them.
    """
    path = tokenizer_file(spec)
    tokenizer = tokenizer_from_file(path)
    named = named_tokens(path.parent)
    if vocab_size is not None:
        tokenizer, _ = without_special_beyond(tokenizer, vocab_size)
    eos = _find(tokenizer, eos_token, named.get("eos_token"), KNOWN_EOS_TOKENS)
    if eos is None:
        wanted = repr(eos_token) if eos_token else f"none of {', '.join(KNOWN_EOS_TOKENS)}"
        raise UserError(
            f"tokenizer '{spec}' has no end-of-text token ({wanted} is in it); name one with {option.format('eos')}"
        )
    mask = None if mask_token == "" else _find(tokenizer, mask_token, named.get("mask_token"), KNOWN_MASK_TOKENS)
    if mask is None and add_mask_token:
        mask = mask_token or MASK_TOKEN
        tokenizer.add_special_tokens([AddedToken(mask, special=True, normalized=False)])
    if mask is None and (need_mask or mask_token):
        wanted = repr(mask_token) if mask_token else f"none of {', '.join(KNOWN_MASK_TOKENS)}"
        add = ", or add one with --add-mask-token" if need_mask else ""
        raise UserError(
            f"tokenizer '{spec}' has no [MASK] ({wanted} is in it); name one with {option.format('mask')}{add}"
        )
    tokenizer = as_special(tokenizer, (eos,) if mask is None else (eos, mask))
    info = tokenizer_info(tokenizer, eos_token=eos, mask_token=mask)
    _check_apart(tokenizer, info, spec, option)
    return tokenizer, info


def _find(tokenizer: Tokenizer, wanted: str | None, named: str | None, known: tuple[str, ...]) -> str | None:
    candidates = (wanted,) if wanted else (named, *known)
    return next((token for token in candidates if token and tokenizer.token_to_id(token) is not None), None)


def tokenizer_file(spec: str) -> Path:
    """Returns the path of a ``tokenizer.json``, which is downloaded from the hub if necessary.

    Args:
        spec: The tokenizer, as :func:`load_tokenizer` takes it.

    Raises:
        UserError: there is no such file.
    """
    path = expanded(spec)
    if path.is_dir():
        if not (path / TOKENIZER_NAME).is_file():
            raise UserError(f"tokenizer folder '{spec}' holds no {TOKENIZER_NAME}; save a fast tokenizer there")
        return path / TOKENIZER_NAME
    # A name on the hub is "name" or "owner/name"; anything else can only be a path.
    local = path.suffix == ".json" or spec.startswith((".", "/", "~")) or spec.count("/") > 1
    if path.exists() or local or ("/" in spec and path.parent.is_dir()):
        if not path.is_file():
            raise UserError(f"tokenizer '{spec}': no such file or folder; give a tokenizer.json, a folder or a name")
        return path
    return _hub_file(spec)


def _hub_file(name: str) -> Path:
    """Downloads a tokenizer and its configuration from the hub into its cache."""
    from huggingface_hub import hf_hub_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry has two lines; the last reason is below
    try:
        with panics_as_exceptions():
            path = hf_hub_download(name, TOKENIZER_NAME)
    except Exception as error:  # no such name, no tokenizer.json, no network, no access
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"tokenizer '{name}': no such file or folder, and the Hugging Face hub does not provide it "
            f"({type(error).__name__}: {reason}); give a tokenizer.json or a folder"
        ) from error
    for config in _CONFIG_NAMES:
        try:
            hf_hub_download(name, config)
        except Exception:  # both are optional; without them the tokens are looked for by their usual names
            continue
    return Path(path)


def named_tokens(folder: Path) -> dict[str, str]:
    """Returns ``eos_token`` and ``mask_token`` as the files beside a ``tokenizer.json`` name them.

    Args:
        folder: The folder of the file.

    Raises:
        UserError: a file is damaged.
    """
    found: dict[str, str] = {}
    for name in (*_CONFIG_NAMES, MANIFEST_NAME):
        if not (folder / name).is_file():
            continue
        record = read_json(folder / name)
        if name == MANIFEST_NAME and isinstance(record, dict):
            record = record.get("tokenizer")
        for key in ("eos_token", "mask_token"):
            value = record.get(key) if isinstance(record, dict) else None
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found.setdefault(key, value)
    return found


def as_special(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> Tokenizer:
    """Returns a tokenizer in which the given tokens are special, so that text never becomes them."""
    record = json.loads(tokenizer.to_str())
    added = {entry["content"]: entry for entry in record["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for token in tokens:
        added[token] = {
            **plain,
            **added.get(token, {"id": tokenizer.token_to_id(token), "content": token}),
            "special": True,
        }
    record["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
    return _plain(Tokenizer.from_str(json.dumps(record, ensure_ascii=False)))


def without_special_beyond(tokenizer: Tokenizer, vocab_size: int) -> tuple[Tokenizer, list[str]]:
    """Returns a tokenizer without the special tokens that a model has no embedding for, and the names of these.

    Text never becomes one of them, so it is encoded as before. Usually it is a `<pad>` that was added to the tokenizer,
    but not to its model.

    Args:
        tokenizer: The tokenizer.
        vocab_size: The size of the model's vocabulary.
    """
    added = tokenizer.get_added_tokens_decoder().items()
    beyond = {token.content for token_id, token in added if token_id >= vocab_size and token.special}
    if not beyond:
        return tokenizer, []
    record = json.loads(tokenizer.to_str())
    record["added_tokens"] = [entry for entry in record["added_tokens"] if entry["content"] not in beyond]
    return _plain(Tokenizer.from_str(json.dumps(record, ensure_ascii=False))), sorted(beyond)


def _check_apart(tokenizer: Tokenizer, info: TokenizerInfo, spec: str, option: str) -> None:
    tokens = {info.eos_token: info.eos_id}
    if info.mask_token is not None and info.mask_id is not None:
        tokens = {info.mask_token: info.mask_id, **tokens}
    mask_option, eos_option = option.format("mask"), option.format("eos")
    for token, token_id in tokens.items():
        for text in (token, f" {token} ", f"a{token}b", f"\n{token}\n"):
            if token_id in encode(tokenizer, text):
                raise UserError(
                    f"tokenizer '{spec}' encodes the text {text!r} to its special token '{token}'; use a tokenizer "
                    f"that has it as an added token, or another {mask_option} / {eos_option}"
                )
    if info.mask_id == info.eos_id:
        raise UserError(f"tokenizer '{spec}': [MASK] and EOS are both '{info.mask_token}'; name two with {mask_option}")


def tokenizer_info(
    tokenizer: Tokenizer, *, eos_token: str = EOS_TOKEN, mask_token: str | None = MASK_TOKEN
) -> TokenizerInfo:
    """Returns the vocabulary size, the special ids and the fingerprint of a tokenizer.

    Args:
        tokenizer: The tokenizer.
        eos_token: The name of the token that ends a text.
        mask_token: The name of [MASK]; None: it has none.

    Raises:
        UserError: the tokenizer lacks one of these tokens.
    """
    eos_id, mask_id = (None if token is None else tokenizer.token_to_id(token) for token in (eos_token, mask_token))
    if eos_id is None or (mask_id is None and mask_token is not None):
        raise UserError(f"the tokenizer lacks '{eos_token if eos_id is None else mask_token}'; use one that has it")
    # Ids may have holes, and a model needs a row for each up to the largest.
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    fingerprint = tokenizer_fingerprint(tokenizer.to_str(), eos_id, mask_id)
    return TokenizerInfo(vocab_size, eos_token, eos_id, mask_token, mask_id, fingerprint)
