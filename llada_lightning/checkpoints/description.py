"""The description of a checkpoint's model (all but weights and tokenizer), and our own ``config.json``.

The values of a ``config.json`` are checked when they are asked for.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llada_lightning.compute.shapes import Shape, get_shape
from llada_lightning.model import Transformer
from llada_lightning.model.transformer import NORM_EPS, POSITIVE, is_positive
from llada_lightning.objectives import OBJECTIVES, get_objective
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import read_json

MODEL_TYPE = "llada_lightning"
"""The ``model_type`` of our own ``config.json``, and the key of our own values in those of other layouts."""

FORMAT = 1
"""The version of our own ``config.json``."""


@dataclass(frozen=True)
class Description:
    """The description of a model: everything but weights and tokenizer.

    Args:
        objective: The name of the objective, such as `llada`.
        shape: The dimensions of the model.
        vocab_size: The number of rows of the embedding and of the output head.
        eos_token_id: The id of EOS, which ends a text.
        mask_token_id: The id of [MASK]; None where an `arm` has none.
        context_length: The largest number of tokens, prompt and answer together, that it was trained on.
        rope_theta: The base of the rotary frequencies.
        norm_eps: The number that is added within the root of every RMSNorm.
        end_token_ids: The ids of all tokens that end an answer; EOS is always one of them.
        start_token_id: The id of the token before every sequence, as in the training of our `arm`; None: no such token.
        text_prefix_ids: The token ids before a text, such as the BOS that a tokenizer puts before one; None: those that
            the tokenizer adds.
        compat: The objective whose released code is followed: `llada` where [MASK] had a logit in training.
        bos_token_id, pad_token_id: The ids as they are written for other programs; nothing here uses them.
        block_length: The number of tokens of a block, of an objective that predicts in blocks; None of others.
        qk_norm: Whether queries and keys are normalised before they are rotated.
        shift_targets: Whether a masked token is predicted from the position before it.
        source: The run, its step, the hash of its identity and the training FLOPs by 6ND, where they are known.

    Raises:
        UserError: A value is of the wrong kind, an id lies outside of the vocabulary, or [MASK] is missing where the
            objective needs it.
    """

    objective: str
    shape: Shape
    vocab_size: int
    eos_token_id: int
    mask_token_id: int | None
    context_length: int
    rope_theta: float = 10_000.0
    norm_eps: float = NORM_EPS
    end_token_ids: tuple[int, ...] = ()
    start_token_id: int | None = None
    text_prefix_ids: tuple[int, ...] | None = None
    compat: Literal["llada"] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    block_length: int | None = None
    qk_norm: bool = False
    shift_targets: bool = False
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.objective, str) or self.objective not in OBJECTIVES:
            known = " or ".join(OBJECTIVES)
            raise mistake("objective", self.objective, f"it must be {known}, or of a module in LLADA_PLUGINS")
        if self.compat not in (None, "llada"):
            raise mistake("compat", self.compat, "it must be null or llada")
        for key in ("qk_norm", "shift_targets"):
            if not isinstance(value := getattr(self, key), bool):
                raise mistake(key, value, "it must be true or false")
        if not isinstance(self.source, dict):
            raise mistake("source", self.source, "it must be a mapping")
        for key in ("vocab_size", "context_length"):
            if not is_whole(value := getattr(self, key), 1):
                raise mistake(key, value, "it must be a whole number of at least 1")
        if get_objective(self.objective).in_blocks and not is_whole(self.block_length, 1):
            raise mistake("block_length", self.block_length, "it must be a whole number of at least 1")
        if self.shift_targets and (not get_objective(self.objective).masks or self.block_length is not None):
            raise mistake("shift_targets", True, f"{self.objective} has no shifted targets; it must be false")
        for key in ("rope_theta", "norm_eps"):
            if not is_positive(value := getattr(self, key)):
                raise mistake(key, value, POSITIVE)
            object.__setattr__(self, key, float(value))
        if get_objective(self.objective).masks and self.mask_token_id is None:
            raise mistake("mask_token_id", None, f"give the id of [MASK], which a {self.objective} model needs")
        optional = ("mask_token_id", "start_token_id", "bos_token_id", "pad_token_id")
        ids = {
            "eos_token_id": (self.eos_token_id, *self.end_token_ids),
            "text_prefix_ids": self.text_prefix_ids or (),
            **{key: (getattr(self, key),) for key in optional if getattr(self, key) is not None},
        }
        for key, values in ids.items():
            for value in values:
                if not is_whole(value, 0) or value >= self.vocab_size:
                    raise mistake(key, value, f"it must be an id of the vocabulary, 0 to {self.vocab_size - 1}")
        object.__setattr__(self, "end_token_ids", tuple(dict.fromkeys((self.eos_token_id, *self.end_token_ids))))

    @classmethod
    def of(cls, where: Path, shape: Any, **values: Any) -> Description:
        """The description that a file gives; a mistake in it names the file."""
        try:
            return cls(shape=get_shape(shape), **values)
        except UserError as error:
            raise UserError(f"'{where}': {error}") from error

    def transformer(self) -> Transformer:
        """The Transformer, on the device and in the type of the context, with torch's initial weights."""
        return Transformer(self.shape, self.vocab_size, self.rope_theta, self.norm_eps, self.qk_norm)


def excluded_token_id(compat: str | None, mask_token_id: int | None) -> int | None:
    """The token that gets no probability: [MASK], unless the model is trained with a logit for it (``compat``)."""
    return None if compat == "llada" else mask_token_id


def write_config(description: Description, dtype: str) -> dict[str, Any]:
    """Our own ``config.json``."""
    values = asdict(description)
    if description.block_length is None:  # so that versions before it read the file
        del values["block_length"]
    for name in ("qk_norm", "shift_targets"):
        if not values[name]:  # so that versions before it read the file
            del values[name]
    return {"model_type": MODEL_TYPE, "format": FORMAT, **values, "dtype": dtype}


def read_config(config: ConfigFile) -> Description:
    """The description in our own ``config.json``."""
    if config.get("format") != FORMAT:
        raise config.mistake("format", f"this version reads {FORMAT}; use the version that wrote it")
    shape = config.get("shape")
    if not isinstance(shape, dict):
        raise config.mistake("shape", f"it must hold {', '.join(Shape.__dataclass_fields__)}")
    plain = ("objective", "vocab_size", "eos_token_id", "context_length", "rope_theta", "norm_eps")
    return Description.of(
        config.path,
        shape,
        **{key: config.get(key) for key in plain},
        **{key: config.told_id(key, config.whole("vocab_size")) for key in ("bos_token_id", "pad_token_id")},
        end_token_ids=config.several("end_token_ids"),
        block_length=config.get("block_length", None),
        qk_norm=config.get("qk_norm", False),
        shift_targets=config.get("shift_targets", False),
        **_ours_alone(config),
    )


_OURS_ALONE = ("mask_token_id", "start_token_id", "text_prefix_ids", "compat", "source")
"""The values for which other layouts have no name."""


def _ours_alone(config: ConfigFile) -> dict[str, Any]:
    """The values for which other layouts have no name: of our own ``config.json``, or of our key in another's."""
    prefix = None if config.get("text_prefix_ids") is None else config.several("text_prefix_ids")
    values = {key: config.get(key) for key in _OURS_ALONE}
    return {**values, "text_prefix_ids": prefix, "source": config.get("source", {})}


def extra_key(description: Description) -> dict[str, Any]:
    """The values to write under our key of another layout's ``config.json``."""
    values = asdict(description)
    return {MODEL_TYPE: {key: values[key] for key in _OURS_ALONE}}


def read_extra_key(config: ConfigFile) -> dict[str, Any] | None:
    """The values under our key of another layout's ``config.json``; None where there are none."""
    extra = config.get(MODEL_TYPE)
    if extra is None:
        return None
    if not isinstance(extra, dict):
        raise config.mistake(MODEL_TYPE, "it must be a mapping")
    return _ours_alone(ConfigFile(config.path, extra))


CONFIG_NAME = "config.json"

NO_TOKEN = -1
"""The id that some configurations give for a token that the model does not have."""


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number of 64 bits, and not too small."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def mistake(key: str, value: Any, fix: str) -> UserError:
    """The error for a value that cannot be used."""
    return UserError(f"{key} is {shortened(json.dumps(value))}; {fix}")


@dataclass(frozen=True)
class ConfigFile:
    """The values of a JSON file, and errors that name it."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """The content of a file, which must be a JSON object."""
        values = read_json(path)
        if not isinstance(values, dict):
            raise UserError(f"'{path}' holds {type(values).__name__}, not an object; copy the checkpoint again")
        return cls(path, values)

    def get(self, key: str, absent: Any = None) -> Any:
        """The value of a key; ``absent`` where it is null or not there."""
        value = self.values.get(key)
        return absent if value is None else value

    def mistake(self, key: str, fix: str) -> UserError:
        """The error for a value that cannot be used; it names the file."""
        return UserError(f"'{self.path}': {mistake(key, self.values.get(key), fix)}")

    def whole(self, key: str, absent: int | None = None) -> int:
        """A whole number of at least 1; ``absent`` where it is null or not there."""
        value = self.get(key, absent)
        if not is_whole(value, 1):
            raise self.mistake(key, "it must be a whole number of at least 1")
        return int(value)

    def number(self, key: str, absent: float | None = None) -> float:
        """A positive number; ``absent`` where it is null or not there."""
        value = self.get(key, absent)
        if not is_positive(value):
            raise self.mistake(key, POSITIVE)
        return float(value)

    def several(self, key: str) -> tuple[Any, ...]:
        """The values of a key that holds one, a list or null."""
        value = self.get(key, [])
        return tuple(value) if isinstance(value, list) else (value,)

    def token_ids(self, key: str) -> tuple[Any, ...]:
        """The token ids of a key that holds one, a list or null; -1 means that there is none, as in LLaMA-1's files."""
        return tuple(value for value in self.several(key) if is_whole(value, 0) or value != NO_TOKEN)

    def told_id(self, key: str, vocab_size: int) -> int | None:
        """A token id that only other programs use; None where it is null or -1.

        An id outside of the vocabulary is left out, too, with a note on stderr: the weights are whole without it.
        """
        value = self.get(key, NO_TOKEN)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.mistake(key, f"it must be an id of the vocabulary, 0 to {vocab_size - 1}, or null")
        if 0 <= value < vocab_size:
            return value
        if value != NO_TOKEN:
            print(
                f"note: '{self.path}': {key} {shortened(value, 40)} is outside of the vocabulary of {vocab_size} and "
                "is left out; nothing uses it here",
                file=sys.stderr,
            )
        return None

    def refuse(self, required: dict[str, tuple[Any, ...]], absent: dict[str, Any]) -> None:
        """Refuse a model whose mathematics differs from our Transformer's.

        Args:
            required: The values of each key that are ours; null is the absence of the key.
            absent: The values that the absence of a key means, where that is not one of ours.
        """
        for key, ours in required.items():
            value = self.get(key, absent.get(key, ours[0]))
            if value not in ours:
                known = " or ".join(json.dumps(v) for v in ours if v is not None) or "null"
                if key not in self.values:
                    raise UserError(
                        f"'{self.path}': {key} is absent, which means {json.dumps(value)}; only {known} is supported"
                    )
                raise self.mistake(key, f"only {known} is supported")


def read_generation_ends(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids in the ``generation_config.json`` of a model's folder that end an answer; none without the file."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    config = ConfigFile.read(path)
    ends = config.token_ids("eos_token_id")
    if not all(is_whole(end, 0) and end < vocab_size for end in ends):
        raise config.mistake("eos_token_id", f"it must hold ids of the vocabulary, 0 to {vocab_size - 1}")
    return ends
