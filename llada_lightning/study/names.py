"""Short names of variants, for tables, figures and sentences: `llada [ce, t 0.05-0.3 to 0.05-0.6]`.

Files (`results.csv`, `fits.json`) and `--reference` keep the full names, which hold each setting as it was given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pandas as pd

from llada_lightning.study.fits import StudyFits, named_variants, objective_names
from llada_lightning.study.fits.runs import base_objective

_FORMS = {"loss_weight": "{}", "loss_weight_limit": "limit {}", "density": "t {}", "block_length": "block {}"}
"""How the short name tells a setting, in this order, before the other settings, which it tells as `name=value`."""

_RANGE = re.compile(r"\brange\(low=([^,()]+),high=([^,()]+)\)")
_CURRICULUM = re.compile(r"\bcurriculum\(start=(.+),end=(.+),steps=[^,()]+\)")
_CALL = re.compile(r"\b(\w+)\(([^()]*)\)")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The short name of each name of ``named_variants``; the full one where two would have the same."""
    found = {name: _short(name) for name in names}
    times = Counter(found.values())
    return {name: short if times[short] == 1 else name for name, short in found.items()}


def _short(name: str) -> str:
    base, settings = base_objective(name), _settings(name)
    if not settings:
        return name
    pairs = dict(setting.partition("=")[::2] for setting in settings.split(";"))
    told = [form.format(_compact(pairs.pop(key))) for key, form in _FORMS.items() if pairs.get(key)]
    return f"{base} [{', '.join([*told, *(f'{key}={value}' if value else key for key, value in pairs.items())])}]"


def _settings(name: str) -> str:
    return name.removeprefix(base_objective(name)).removeprefix(" [").removesuffix("]")


def _compact(value: str) -> str:
    """A value without the names of arguments: `0.05-0.6` of a range, `beta 2 2` of `beta(a=2,b=2)`."""
    value = _CURRICULUM.sub(r"\1 to \2", _RANGE.sub(r"\1-\2", value))
    return _CALL.sub(lambda call: " ".join([call[1], *re.sub(r"\w+=", "", call[2]).split(",")]), value)


def with_short_names(table: pd.DataFrame, fits: StudyFits) -> tuple[pd.DataFrame, StudyFits]:
    """A results table and its fits as people read them: every variant by its short name, in texts, too.

    A second time it changes nothing.
    """
    short = short_names(objective_names(named_variants(table)))
    if all(name == own for name, own in short.items()):
        return table, fits
    return table_with_short_names(table), _renamed_fits(fits, short)


def table_with_short_names(table: pd.DataFrame) -> pd.DataFrame:
    """A results table whose variants have the settings of their short names."""
    full = named_variants(table)["objective"]
    short = short_names(objective_names(named_variants(table)))
    if all(name == own for name, own in short.items()):
        return table
    settings = [
        own if pd.isna(name) else _settings(short[name]) for name, own in zip(full, table["variant"], strict=True)
    ]
    return table.assign(variant=pd.Series(settings, table.index, table["variant"].dtype))


def _renamed_fits(fits: StudyFits, short: Mapping[str, str]) -> StudyFits:
    names = objective_names(pd.DataFrame({"objective": [short.get(name, name) for name in fits.objectives]}))
    objectives = {
        short.get(name, name): replace(own, objective=short.get(name, name)) for name, own in fits.objectives.items()
    }
    others = {
        field.name: renamed(getattr(fits, field.name), short) for field in fields(fits) if field.name != "objectives"
    }
    return replace(fits, **others, objectives={name: objectives[name] for name in names})


def renamed(value: Any, short: Mapping[str, str]) -> Any:
    """A text, or lists, mappings and records of texts, with the short names in place of the full ones."""
    if isinstance(value, str):
        for full, own in short.items():
            value = value.replace(full, own) if full != own else value
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(renamed(item, short) for item in value)
    if isinstance(value, dict):
        return {renamed(key, short): renamed(item, short) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        texts = {field.name: renamed(getattr(value, field.name), short) for field in fields(value) if field.init}
        return replace(value, **texts)
    return value


def variant_settings(table: pd.DataFrame) -> dict[str, str]:
    """The settings in full of each variant that has a short name, as `--reference` takes them within brackets."""
    names = short_names(objective_names(named_variants(table)))
    return {short: _settings(name) for name, short in names.items() if short != name}
