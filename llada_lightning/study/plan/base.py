"""The base configuration of a plan: what a plan reads from it, and the settings that it must not have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada_lightning.objectives.density_settings import density_setting
from llada_lightning.run import DataFacts, Source, Stream, sequences_read
from llada_lightning.support.command_line import refuse_unusable
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import read_yaml

_SCHEDULE, _DATA, _MODEL = "model.init_args.schedule", "data.init_args", "model.init_args"

_DECIDED = {
    "budget": ("flops", "tokens", "milestones"),
    "trainer": ("max_steps",),
    _SCHEDULE: ("decay_steps", "decay_tokens", "plateaus", "total_steps"),
}
"""The settings that would change what the plan has counted."""

_CHOSEN = {
    _SCHEDULE: {"lr": "lr", "warmup_steps": "warmup_steps", "decay_fraction": "decay_fraction"},
    _DATA: {"global_batch": "batch"},
    _MODEL: {"shape": "shapes"},
}
"""The settings that the plan writes for every run, each with its option: the plan would overrule those of the base."""


@dataclass(frozen=True)
class Base:
    """A base configuration."""

    content: Mapping[str, Any]

    def section(self, name: str) -> Mapping[str, Any]:
        """A section by its dotted name; empty where the configuration has none."""
        section: Any = self.content
        for key in name.split("."):
            section = section.get(key)
            if not isinstance(section, dict):
                return {}
        return section

    @property
    def data(self) -> Mapping[str, Any]:
        return self.section(_DATA)

    def number(self, section: str, key: str) -> float | None:
        """The number that the ``init_args`` of ``model`` or ``data`` give for a key, or None.

        Raises:
            UserError: The value is not a finite number.
        """
        value = self.section(f"{section}.init_args").get(key)
        try:
            number = None if value is None else float(value)  # YAML 1.1 reads 1e-3 as a string
        except (TypeError, ValueError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise UserError(f"base: {section}.init_args.{key} {value!r} is not a number; give one, or leave it out")
        return number

    def count(self, section: str, key: str) -> int | None:
        """The positive whole number that the ``init_args`` of ``model`` or ``data`` give for a key, or None.

        Raises:
            UserError: The value is not such a number.
        """
        number = self.number(section, key)
        if number is not None and not (number.is_integer() and number >= 1):
            raise UserError(f"base: {section}.init_args.{key} {number:g} is not a whole number from 1 on; fix it")
        return None if number is None else int(number)


def read_base(path: Path | str | None, chosen: Mapping[str, Any]) -> Base:
    """Read the base configuration of a plan, an empty one without a path.

    ``chosen`` are the values of the plan's options, by the names of the options.

    Raises:
        UserError: The file cannot be read, sets what the plan decides, or sets a value that the plan would overrule.
    """
    content: Any = {} if path is None else read_yaml(path) or {}
    refuse_unusable(content, "base")
    if not isinstance(content, dict):
        raise UserError(f"plan: --base {path} holds no mapping; give one of llada fit's")
    base = Base(_in_full(content, str(path)))
    for section, keys in _DECIDED.items():
        for key in keys:
            if base.section(section).get(key) not in (None, [], -1):
                raise UserError(f"plan: --base {path} sets {section}.{key}, which the plan decides; leave it out")
    for section, options in _CHOSEN.items():
        for key, option in options.items():
            value = base.section(section).get(key)
            if value is not None and not _is_same(value, chosen[option]):
                raise UserError(
                    f"plan: --base {path} sets {section}.{key} to {shortened(value, 80)}, which the plan would "
                    f"overrule; leave it out, or give the plan the same by --{option.replace('_', '-')}"
                )
    return base


def _in_full(content: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A configuration with ``class_path`` and ``init_args``, of what `llada fit` takes for short.

    That is: a dotted key, the name of a class for ``data`` or ``model``, and the arguments of ``data`` alone, whose
    class has a default.

    Raises:
        UserError: ``llada fit`` would refuse the section.
    """
    full: dict[str, Any] = {}
    for key, value in sorted(content.items(), key=lambda item: str(item[0]).count(".")):
        *above, last = str(key).split(".")
        if above and above[0] in ("data", "model") and not {"class_path", "init_args"} & {*above, last}:
            above.insert(1, "init_args")
        inner = full
        for name in above:
            inner[name] = dict(inner[name]) if isinstance(inner.get(name), dict) else {}
            inner = inner[name]
        inner[last] = _section_in_full(last, value, path) if not above and last in ("data", "model") else value
    return full


def _section_in_full(name: str, section: Any, path: str) -> Any:
    """The section ``data`` or ``model`` with ``class_path`` and ``init_args``."""
    if isinstance(section, str):
        return {"class_path": section}
    if not isinstance(section, dict) or set(section) <= {"class_path", "init_args"}:
        return section
    if name == "data" and not {"class_path", "init_args"} & set(section):
        return {"init_args": section}
    raise UserError(
        f"plan: --base {path} gives settings of {name} in a form that llada fit refuses; write "
        f"`{name}: {{class_path: ..., init_args: {{...}}}}`"
    )


def _is_same(value: Any, chosen: Any) -> bool:
    try:
        return float(value) == float(chosen)  # YAML 1.1 reads 1e-3 as a string
    except (TypeError, ValueError):
        return [value] == chosen  # of shapes


def planned_stream(
    base: Base,
    facts: DataFacts | None,
    vocab_size: int | None,
    sequence_length: int,
    block_length: int | None = None,
) -> Stream:
    """The training stream of a plan's runs; ``vocab_size`` is the model's, by default that of the data.

    Raises:
        UserError: The vocabulary is not known, or is smaller than the data's, or the base has a density that is none.
    """
    if facts is not None and vocab_size is not None and vocab_size < facts.vocab_size:
        raise UserError(
            f"plan: --vocab-size {vocab_size} is below the {facts.vocab_size} vocabulary entries of the data; "
            "leave it out"
        )
    if vocab_size is None and facts is None:
        raise UserError("plan: the vocabulary is not known; give --data DIR, or --vocab-size")
    length_share, mask_eps = base.number("data", "random_length_share"), base.number("data", "mask_eps")
    setting = density_setting(base.data.get("density"), "base: data.init_args.density")
    sources: tuple[Source, ...] = ()
    if facts is not None:  # a limit on distinct tokens leaves fewer sequences of each source
        present, weights = [each.sequences for each in facts.sources], [each.weight for each in facts.sources]
        left = sequences_read(present, weights, sequence_length, base.count("data", "train_tokens"))
        sources = tuple(Source(weight, sequences) for weight, sequences in zip(weights, left, strict=True))
        vocab_size = facts.vocab_size if vocab_size is None else vocab_size
    assert vocab_size is not None
    return Stream(
        vocab_size,
        sequence_length,
        random_length_share=Stream.random_length_share if length_share is None else length_share,
        mask_eps=Stream.mask_eps if mask_eps is None else mask_eps,
        sources=sources,
        density=None if setting is None else setting.density,
        block_length=block_length,
    )


def check_data_path(path: Any, name: str) -> None:
    """Raise UserError unless the path of a setting is a string, a mapping of folders to weights above 0, or None."""
    weights = list(path.values()) if isinstance(path, dict) else []
    is_mixture = weights and all(isinstance(weight, (int, float)) and weight > 0 for weight in weights)
    if path is not None and not isinstance(path, str) and not is_mixture:
        given = shortened(repr(path))
        raise UserError(f"{name} {given} is neither a folder nor a mapping from folders to weights above 0")
