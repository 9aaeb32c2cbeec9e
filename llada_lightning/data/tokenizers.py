"""Tokenizers: one is trained, or a given one is loaded, with what the files beside it say, and checked for its tokens.

Two promises hold for every tokenizer of this module. Text is never encoded to the ids of [MASK] and EOS, even where it
spells them out: such text is ordinary text. And nothing is added to text: no special tokens, padding or truncation.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from llada_lightning.data import (
    MANIFEST_NAME,
    ROLES_NAME,
    TEMPLATE_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    TokenizerInfo,
    tokenizer_fingerprint,
)
from llada_lightning.data.encoding import encode, load, pieces
from llada_lightning.data.start_token import without_start_token
from llada_lightning.support.errors import LibraryPanicError, UserError, panics_as_exceptions
from llada_lightning.support.files import expanded, local_path
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import parse_json, read_json, read_text

EOS_TOKEN = "[EOS]"
MASK_TOKEN = "[MASK]"
_KNOWN = {
    "eos_token": (EOS_TOKEN, "<|endoftext|>", "</s>"),
    "mask_token": (MASK_TOKEN, "<|mdm_mask|>", "<mask>", "<|mask|>"),
}
"""The common names of the tokens, by the keys under which the files name them."""
_SMALLEST_VOCABULARY = 256 + 2  # bytes, EOS and [MASK]
_LARGEST_VOCABULARY = 1 << 24  # the trainer reserves memory for all of it before it begins

GENERATION_CONFIG_NAME = "generation_config.json"
_COMPANIONS = (TOKENIZER_CONFIG_NAME, ROLES_NAME, TEMPLATE_NAME, GENERATION_CONFIG_NAME)
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")
"""Tokens that end a turn where a chat template has them, whatever the configuration calls EOS."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer with ``[EOS]`` (id 0) and ``[MASK]`` (id 1).

    ``vocab_size`` counts both special tokens; a small sample of texts may give fewer tokens.

    Raises:
        UserError: ``vocab_size`` is smaller than the number of bytes and special tokens, or is too large.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(
            f"vocabulary size {vocab_size} is below {_SMALLEST_VOCABULARY} (256 bytes and two special tokens); raise "
            "--vocab-size"
        )
    if vocab_size > _LARGEST_VOCABULARY:
        raise UserError(f"vocabulary size {vocab_size} is above {_LARGEST_VOCABULARY:,}; lower --vocab-size")
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


def tokenizer_from_text(text: str, name: str) -> Tokenizer:
    """Returns the tokenizer of the text of a ``tokenizer.json``, in which a spelled special token is text.

    Raises:
        UserError: The text is not a tokenizer, or loading it exceeds the limits of time or memory.
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
        mask_token: The name of the mask token; None: the one that its configuration names, else a common one; '': none.
        eos_token: The name of the end-of-text token; None: found in the same way.
        add_mask_token: Whether a mask token is added, with the last id, where there is none.
        need_mask: Whether a tokenizer without a mask token is refused.
        vocab_size: The size of a model's vocabulary; special tokens that it has no embedding for are left out.
        option: The option that names a token (`mask` or `eos`) in the current command, for messages.

    Raises:
        UserError: There is no such tokenizer, it lacks [MASK] or EOS, or text can be encoded to one of them.
    """
    files = TokenizerFiles.of_path(spec)
    tokenizer = files.tokenizer
    if vocab_size is not None:
        tokenizer, _ = without_special_beyond(tokenizer, vocab_size)

    def found(key: str, wanted: str | None) -> str | None:
        names = (wanted,) if wanted else (files.named.get(key), *_KNOWN[key])
        return next((name for name in names if name and tokenizer.token_to_id(name) is not None), None)

    def lacks(what: str, key: str, wanted: str | None, add: str = "") -> UserError:
        names = repr(wanted) if wanted else f"none of {', '.join(_KNOWN[key])}"
        name_one = f"name one with {option.format(key.removesuffix('_token'))}{add}"
        return UserError(f"tokenizer '{spec}' has no {what} ({names} is in it); {name_one}")

    eos = found("eos_token", eos_token)
    if eos is None:
        raise lacks("end-of-text token", "eos_token", eos_token)
    mask = None if mask_token == "" else found("mask_token", mask_token)
    if mask is None and add_mask_token:
        mask = mask_token or MASK_TOKEN
        tokenizer.add_special_tokens([AddedToken(mask, special=True, normalized=False)])
    if mask is None and (need_mask or mask_token):
        raise lacks("[MASK]", "mask_token", mask_token, ", or add one with --add-mask-token" if need_mask else "")
    tokenizer = as_special(tokenizer, (eos,) if mask is None else (eos, mask))
    info = tokenizer_info(tokenizer, eos_token=eos, mask_token=mask)
    _check_apart(tokenizer, info, spec, option)
    return tokenizer, info


def tokenizer_file(spec: str) -> Path:
    """Returns the path of the ``tokenizer.json`` of a ``spec`` (:func:`load_tokenizer`), from the hub if necessary."""
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
        raise UserError(
            f"tokenizer '{name}': no such file or folder, and the Hugging Face hub does not provide it "
            f"({type(error).__name__}: {shortened(error)}); give a tokenizer.json or a folder"
        ) from error
    for config in (TOKENIZER_CONFIG_NAME, ROLES_NAME):
        try:
            hf_hub_download(name, config)
        except Exception:  # both are optional; without them the tokens are looked for by their usual names
            continue
    return Path(path)


def _named_tokens(folder: Path) -> dict[str, str]:
    """Returns ``eos_token`` and ``mask_token`` as the files beside a ``tokenizer.json`` name them."""
    found: dict[str, str] = {}
    for name in (TOKENIZER_CONFIG_NAME, ROLES_NAME, MANIFEST_NAME):
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
        known = added.get(token, {"id": tokenizer.token_to_id(token), "content": token})
        added[token] = {**plain, **known, "special": True}
    record["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
    return _plain(Tokenizer.from_str(json.dumps(record, ensure_ascii=False)))


def without_special_beyond(tokenizer: Tokenizer, vocab_size: int) -> tuple[Tokenizer, list[str]]:
    """Returns a tokenizer without the special tokens that a model has no embedding for, and the names of these.

    Text never becomes one of them, so it is encoded as before. Usually it is a `<pad>` that was added to the tokenizer,
    but not to its model.
    """
    added = tokenizer.get_added_tokens_decoder().items()
    beyond = {token.content for token_id, token in added if token_id >= vocab_size and token.special}
    if not beyond:
        return tokenizer, []
    record = json.loads(tokenizer.to_str())
    record["added_tokens"] = [entry for entry in record["added_tokens"] if entry["content"] not in beyond]
    return _plain(Tokenizer.from_str(json.dumps(record, ensure_ascii=False))), sorted(beyond)


def _check_apart(tokenizer: Tokenizer, info: TokenizerInfo, spec: str, option: str) -> None:
    """Refuses tokens that are one, or that some text is encoded to."""
    mask_option, eos_option = option.format("mask"), option.format("eos")
    for token, token_id in ((info.mask_token, info.mask_id), (info.eos_token, info.eos_id)):
        for text in () if token is None else (token, f" {token} ", f"a{token}b", f"\n{token}\n"):
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
    """Returns the vocabulary size, the special ids and the fingerprint of a tokenizer; without [MASK] by None."""
    eos_id, mask_id = (None if token is None else tokenizer.token_to_id(token) for token in (eos_token, mask_token))
    if eos_id is None or (mask_id is None and mask_token is not None):
        raise UserError(f"the tokenizer lacks '{eos_token if eos_id is None else mask_token}'; use one that has it")
    # Ids may have holes, and a model needs a row for each up to the largest.
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    fingerprint = tokenizer_fingerprint(tokenizer.to_str(), eos_id, mask_id)
    return TokenizerInfo(vocab_size, eos_token, eos_id, mask_token, mask_id, fingerprint)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer, which encodes special tokens that a text spells as text, and the files it came in.

    Args:
        tokenizer: The tokenizer.
        files: The content of ``tokenizer.json`` and of the files beside it, by file name.
        named: The names of ``eos_token`` and ``mask_token`` in the files.
        name: The name of the tokenizer, for messages.
    """

    tokenizer: Tokenizer
    files: dict[str, bytes]
    named: dict[str, str]
    name: str

    @classmethod
    def of_text(cls, text: str, name: str) -> TokenizerFiles:
        """Returns the tokenizer of the text of a ``tokenizer.json`` without other files."""
        return cls(tokenizer_from_text(text, name), {TOKENIZER_NAME: text.encode()}, {}, name)

    @classmethod
    def of_path(cls, spec: str | Path) -> TokenizerFiles:
        """Returns a tokenizer, as :func:`load_tokenizer` takes it, with the files beside it.

        The token that :func:`~llada_lightning.data.start_token.with_start_token` has put before every text is left out.

        Raises:
            UserError: There is no such tokenizer, or a file cannot be read.
        """
        path = tokenizer_file(str(spec))
        text, beside = read_text(path), [path.with_name(name) for name in _COMPANIONS]
        try:
            companions = {file.name: file.read_bytes() for file in beside if file.is_file()}
        except OSError as error:
            raise UserError(f"tokenizer '{path}' cannot be read ({error}); give a tokenizer.json") from error
        files = without_start_token({TOKENIZER_NAME: text.encode(), **companions})
        alone = cls.of_text(files[TOKENIZER_NAME].decode(), str(path))
        return replace(alone, files=files, named=_named_tokens(path.parent))

    def with_template_of(self, folder: str) -> TokenizerFiles:
        """Returns the same with the chat template and the roles of special tokens that a local folder holds, if any."""
        place = local_path(folder)
        paths = [] if place is None else [Path(place) / name for name in (TEMPLATE_NAME, ROLES_NAME)]
        found = {path.name: path.read_bytes() for path in paths if path.is_file()}
        return replace(self, files={**self.files, **found})

    @cached_property
    def named_ids(self) -> dict[str, int]:
        """The ids of ``eos_token`` and ``mask_token``: by the names in the files, else by the common names."""
        found = {key: self.candidates(key) for key in _KNOWN}
        return {key: ids[0] for key, ids in found.items() if ids}

    def candidates(self, key: str) -> list[int]:
        """Returns the ids that may be ``eos_token`` or ``mask_token``: the named one first, then the common names."""
        ids = (self.tokenizer.token_to_id(token) for token in (self.named.get(key, ""), *_KNOWN[key]))
        return [token_id for token_id in ids if token_id is not None]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of ``tokenizer_config.json``; empty where there is no such file."""
        return self._object(TOKENIZER_CONFIG_NAME)

    def _object(self, companion: str) -> Mapping[str, Any]:
        try:
            values = parse_json(self.files.get(companion, b"{}"), companion)
        except UserError as error:
            raise self._damaged(companion) from error
        if not isinstance(values, dict):
            raise self._damaged(companion)
        return values

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens by role (``bos_token``, ...) as the files name them; "" where one says there is none."""
        files = [self.config, self._object(ROLES_NAME)]
        if "added_tokens_decoder" not in self.config:  # then transformers, too, believes special_tokens_map.json first
            files.reverse()
        found: dict[str, str] = {}
        for key, value in (item for file in files for item in file.items() if item[0].endswith("_token")):
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str) or token is None:
                found[key] = found.get(key) or token or ""
        return {**self.named, **found}

    def _damaged(self, companion: str, what: str = "is damaged; copy it again") -> UserError:
        return UserError(f"'{self.name}': {companion} beside it {what}")

    @property
    def chat_template(self) -> str | None:
        """The chat template: the file beside the tokenizer, else the (default) one of its configuration."""
        if TEMPLATE_NAME in self.files:
            try:
                return self.files[TEMPLATE_NAME].decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise self._damaged(TEMPLATE_NAME, "is not UTF-8; copy it again") from error
        template = self.config.get("chat_template")
        try:
            if isinstance(template, list):
                template = {entry["name"]: entry["template"] for entry in template}.get("default")
            if not isinstance(template, str | None):
                raise TypeError
        except (TypeError, LookupError) as error:
            what = "has a chat_template that is neither text nor a list of named ones; correct it"
            raise self._damaged(TOKENIZER_CONFIG_NAME, what) from error
        return template

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids before a text: by ``add_bos_token``, else those that the tokenizer's post-processor adds."""
        bos = self.config.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        bos_id = self.tokenizer.token_to_id(bos) if isinstance(bos, str) else None
        adds = self.config.get("add_bos_token")
        if adds is False:
            return ()
        if adds is True and bos_id is not None:
            return (bos_id,)
        plain, full = (encode(self.tokenizer, "a", special=add) for add in (False, True))
        starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
        return tuple(full[: starts[0]]) if plain and starts else ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end an answer besides those of the model: the configuration's EOS and the end of a turn."""
        template = self.chat_template or ""
        tokens = [self.named.get("eos_token", ""), *(token for token in _TURN_ENDS if token in template)]
        ids = (self.tokenizer.token_to_id(token) for token in tokens)
        return tuple(token_id for token_id in ids if token_id is not None)
