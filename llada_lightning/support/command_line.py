"""What the commands beside ``llada fit`` share: the parser, its reader of YAML, and the options."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from llada_lightning.support.errors import UserError
from llada_lightning.support.files import strict_json
from llada_lightning.support.jsonargparse_internals import option_names
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import FormatError, check_yaml
from llada_lightning.support.security import not_trusted

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\f": "\f", r"\0": "\0"}


_load_yaml = get_loader("yaml")


def _load_checked_yaml(text: str) -> Any:
    try:
        check_yaml(text, "the configuration")
    except FormatError as error:
        # The parser takes a value that is no YAML as a string, as it should a prompt that looks like a mapping.
        raise yaml.YAMLError(str(error)) from error
    value = _load_yaml(text)
    if _has_long_list(value):
        raise yaml.YAMLError(f"the configuration has a list of more than {_MOST_ITEMS:,} values")
    return value


_MOST_ITEMS = 1000
"""Most values of a list in a configuration: the time of the parser grows with their number squared."""


def _has_long_list(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_long_list, value.values()))
    return isinstance(value, list) and (len(value) > _MOST_ITEMS or any(map(_has_long_list, value)))


set_loader("yaml", _load_checked_yaml, (yaml.YAMLError,))


class CommandParser(ArgumentParser):
    """A parser whose errors are UserErrors of one line, and that takes no abbreviated options.

    The inherited ``error`` prints pages of usage before the mistake and leaves the process; here the mistake alone
    goes to whoever called, who prints it and chooses the exit code.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UserError: the command, what is wrong, and where to read the options."""
        raise UserError(one_line(message, self.prog, option_names(self))) from ex

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """As inherited; raises UserError for values that no option can take (:func:`refuse_unusable`)."""
        options = super().parse_args(*args, **kwargs)
        for name, value in vars(options).items():
            refuse_unusable(value, f"{self.prog.split()[-1]}: --{name.replace('_', '-')}")
        return options


_LARGEST = 2**63 - 1
"""Largest whole number of torch and NumPy."""


def refuse_unusable(value: Any, name: str) -> None:
    """Refuse, in a value and all below it, what no setting can take: NaN, infinity, huge whole numbers, NUL characters.

    Objects that Lightning builds from a `class_path` are left out: a callback may well wait for an infinite value.

    Args:
        value: A setting, or a mapping or list of settings.
        name: The name of the setting, for messages.

    Raises:
        UserError: Names the setting and the value.
    """
    if isinstance(value, (dict, Namespace)):
        items = dict(value.items()) if isinstance(value, dict) else vars(value)
        if name.startswith("trainer.") and "class_path" in items:
            return
        for key, item in items.items():
            below = name if key == "init_args" else f"{name}.{shortened(key)}".removeprefix(".")
            refuse_unusable(item, below)
    elif isinstance(value, (list, tuple)):
        for item in value:
            refuse_unusable(item, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}: {value} given; it must be a finite number")
    elif isinstance(value, int) and not -_LARGEST - 1 <= value <= _LARGEST:
        raise UserError(f"{name}: {shortened(value, 40)} given; it must lie within 64 bits, at most {_LARGEST}")
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{name}: '{shortened(value)}' given; text must not contain the NUL character")


def one_line(message: str, command: str, options: Iterable[str] = ()) -> str:
    """The parser's report of several lines as one: the key, the value, what was expected.

    Args:
        message: The message of jsonargparse. For a key within a class it holds, indented, what this function made of
            the cause.
        command: The command whose ``--help`` lists the options.
        options: The names of the parser's options, of which a misspelt one is told the nearest.
    """
    key = re.search(r'Parser key "([^"]+)"', message)
    causes = rf"\S+: .* given; expected .*|\S+: .* was not imported; .*|(?:{_UNKNOWN}).*|{_REQUIRED}.*"
    within = re.search(rf"^ +- ({causes})$", message, re.MULTILINE)
    value = re.search(r"(?:Given|Got) value: (.+)", message)
    expected = re.findall(r"Expected an? (?:<class '([\w.]+)'>|(\w[\w.]*\[.*\]|tuple with \d+ elements))", message)
    nested = re.search(r"Given value: NestedArg\(key='([\w.]+)', val='?(.+?)'?\)$", message, re.MULTILINE)
    unnamed = re.search(r"required: (?:\w+\.)?model$", message.strip())
    if unnamed:
        return "model: which one is not said; give --model ArmModule or LladaModule, or --config of a run"
    see = f"; see '{command} --help'"
    valueless = re.fullmatch(r"argument (\S+): expected (?:one|at least one) argument", message.strip())
    if valueless:
        option = valueless[1]
        return f"{option}: it has no value; a value that begins with '-' is written {option}=VALUE{see}"
    missing = re.search(r"(File does not exist|Path is not a file): '(.+)'", message)
    if key and missing:
        problem = "is no file" if missing[1].startswith("Path") else "does not exist"
        fix = "give the path of a configuration, such as a run's config.yaml"
        return f"{key[1]}: '{shortened(missing[2])}' {problem}; {fix}"
    untrusted = re.search(r"Importing '([^']+)' is not allowed", message)
    if untrusted:
        return f"{key[1] if key else 'class_path'}: {not_trusted(untrusted[1])}"
    if key and value and "int too large to convert" in message:
        name, given = (f"{key[1]}.{nested[1]}", nested[2]) if nested else (key[1], value[1])
        return f"{name}: {shortened(given, 40)} given; it must be a smaller number"
    if key and within:  # ends with `see` already
        inner = within[1]
        if inner.startswith(_REQUIRED):
            missing_names = inner.removeprefix(_REQUIRED).removesuffix(see).split(", ")
            given = re.search(r"Given value: \[?Namespace\(class_path='([\w.]+)'", message)
            who = given[1].rpartition(".")[2] if given else "its class"
            return f"{key[1]}: {who} lacks {', '.join(missing_names)}; give --{key[1]}.{missing_names[0]}{see}"
        if not re.match(_UNKNOWN, inner):
            return f"{key[1]}.{inner}"
        inner = inner.removesuffix(see).replace(" --", f" --{key[1]}.") + see
        return inner if inner.startswith(_UNRECOGNIZED) else f"{key[1]}: {inner}"
    if key and key[1] == "model":
        given = f"{shortened(value[1])} given" if value and "NestedArg" not in value[1] else "which one is not said"
        return f"model: {given}; expected ArmModule, LladaModule or the path of a class of yours{see}"
    if key and value and expected:
        types = dict.fromkeys((name or union.removeprefix("typing.")) for name, union in expected)
        return f"{key[1]}: {shortened(value[1])} given; expected {' or '.join(types).replace('NoneType', 'null')}{see}"
    return " ".join(message.split()).rstrip(".") + _nearest(message, list(options)) + see


_REQUIRED = "the following arguments are required: "
_UNRECOGNIZED = "unrecognized arguments: "
_UNKNOWN = rf"{_UNRECOGNIZED}|Option '\S+' is not accepted|(?:Group|Subcommand) '\S+' does not accept option '\S+'"
"""How the parser's reports of options that it does not have begin."""


def _unknown_options(message: str) -> list[str]:
    """The names of the options that a report of the parser says it does not have; none in another report."""
    if message.startswith(_UNRECOGNIZED):
        words = message.removeprefix(_UNRECOGNIZED).partition("; ")[0].split()
        return [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    if not re.match(_UNKNOWN, message):
        return []
    group, name = re.fullmatch(r"(?:Group '(\S+)')?.*[Oo]ption '(\S+)'.*", message, re.DOTALL).groups()  # type: ignore[union-attr]
    return [name if group is None else f"{group}.{name}"]


def _nearest(message: str, options: Sequence[str]) -> str:
    """What a message about misspelt options adds: the nearest that there are, where some are near."""
    plain = [name for name in options if not name.endswith(".help")]
    # An option that takes a class, whose arguments are not among the options, has a help of its own.
    classes = [name for name in plain if "." not in name and f"{name}.help" in options]
    near: list[str] = []
    for name in _unknown_options(message):
        first, _, rest = name.partition(".")
        of_class = get_close_matches(first, classes, 1) if rest and first not in classes else []
        near += [f"{of_class[0]}.{rest}"] if of_class else get_close_matches(name, plain, 1)
    return f"; the nearest is {', '.join(f'--{name}' for name in dict.fromkeys(near))}" if near else ""


def unbuilt(message: str) -> str:
    """The parser's report of a class that cannot be built as the class and the first cause; another one on one line."""
    first = re.search(r"^ *Errors:\n *- (.+?)(?=\n *- )", message, re.MULTILINE | re.DOTALL)
    named = re.search(r"^ *Given value: \[?Namespace\(class_path='([\w.]+)'", message, re.MULTILINE)
    if first is None or named is None:
        return " ".join(message.split())
    cause = re.sub(r"^Problem with given class_path '\S+':\s*", "", first[1])
    reason = shortened(" ".join(cause.split()).rstrip("."), 300)
    return f"'{named[1]}' cannot be built ({reason}); correct its arguments, or install what it needs"


def as_keys(message: str) -> str:
    """A message about options that there are not, as one about the keys of nested settings; another one as it is."""
    message = re.sub("(?<=; the nearest is )--", "", message)
    names = _unknown_options(message) if message.startswith(_UNRECOGNIZED) else []
    if not names:
        return message
    near = re.search(r"; the nearest is .*(?=; see ')", message)
    return f"{', '.join(names)}: there is no such setting{near[0] if near else ''}"


def unescaped(text: str) -> str:
    r"""The text that an option means: a shell hands on ``\n`` as two characters."""
    for written, meant in _ESCAPES.items():
        text = text.replace(written, meant)
    return text


def add_json(parser: CommandParser) -> None:
    """The option that every sibling of ``llada fit`` has."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def add_draws(parser: CommandParser) -> None:
    """The options of the bootstrap's draws; ``check_draws`` refuses values that they cannot take."""
    parser.add_argument("--samples", type=int, default=4000, help="bootstrap draws")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")


def check_draws(verb: str, options: Namespace) -> None:
    """Refuse too few draws, and a negative seed.

    Raises:
        UserError: Names the verb, the option and its value.
    """
    if options.samples < 100:
        raise UserError(f"{verb}: --samples is {options.samples}; 95 % intervals need at least 100")
    if options.seed < 0:
        raise UserError(f"{verb}: --seed is {options.seed}; it must be at least 0")


def print_json(value: dict[str, Any]) -> None:
    """One strict JSON object on stdout."""
    print(json.dumps(strict_json(value), allow_nan=False))
