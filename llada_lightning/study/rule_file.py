"""Rules of learning rate and batch that a tuning study has measured, as a file that `llada plan --rule` reads.

`llada curves --rules` writes it. Each objective has two laws y = a (x / c0)^b, the rate by the FLOPs and the batch by
the tokens of a run, with 95 % intervals, and the sizes that they were fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llada_lightning.compute.rules import Range, Size
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import write_json
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import read_json

FORMAT = "llada-lightning rules"
VERSION = 1
RULE_FILE = "rules.json"

Variable = Literal["flops", "tokens"]


@dataclass(frozen=True)
class Law:
    """A hyperparameter as a power law of the size of a run: a (x / c0)^b.

    Args:
        variable: What of the size x is: `flops`, by 6ND, or `tokens`.
        a: The value at c0.
        b: The exponent.
        c0: The geometric mean of the x that it was fitted on.
        interval_a: The ends of the 95 % interval of a.
        interval_b: The ends of the 95 % interval of b.
    """

    variable: Variable
    a: float
    b: float
    c0: float
    interval_a: tuple[float, float]
    interval_b: tuple[float, float]

    def __call__(self, size: Size) -> float:
        x = size.flops if self.variable == "flops" else size.tokens
        return float(self.a * (x / self.c0) ** self.b)


@dataclass(frozen=True)
class FittedRules:
    """The rules of one objective.

    Args:
        lr: The peak learning rate.
        batch: The tokens of a global batch; None: batches were not varied.
        fitted_on: The sizes of the runs that were tuned. The shapes of a plan are around those, so that their N and D
            are usually beyond; what counts are the FLOPs.
        optima: What each of them gave, for people: a list of records.
    """

    lr: Law
    batch: Law | None
    fitted_on: Range
    optima: Sequence[Mapping[str, Any]] = ()

    @property
    def budgets(self) -> Range:
        """The FLOPs that they were fitted on."""
        return Range(flops=self.fitted_on.flops)


@dataclass(frozen=True)
class RuleFile:
    """The rules of several objectives, and what they were measured with.

    Args:
        objectives: The rules by the name of the objective.
        vocab_size: The number of vocabulary entries of the models.
        sequence_length: The number of tokens of a sequence.
        tokenizer: The fingerprint of the tokenizer, if it is known.
        data_fingerprint: The fingerprint of the data, if it is known.
        table: The name of the results table.
        table_sha256: The SHA-256 of the results table.
        package: The version of the package that fitted them.
    """

    objectives: Mapping[str, FittedRules]
    vocab_size: int
    sequence_length: int
    tokenizer: str | None
    data_fingerprint: str | None
    table: str
    table_sha256: str
    package: str

    def name_of(self, objective: str) -> str | None:
        """The name under which the file holds the rules of an objective, or of the only variant of it that it has."""
        variants = [name for name in self.objectives if name.partition(" [")[0] == objective]
        return objective if objective in self.objectives else variants[0] if len(variants) == 1 else None

    def check(
        self,
        path: str,
        objectives: Sequence[str],
        vocab_size: int,
        sequence_length: int,
        tokenizer: str | None = None,
    ) -> None:
        """Refuse to plan what the rules were not measured for.

        Args:
            path: The path of the file, for messages.
            objectives: The names of the objectives that are planned.
            vocab_size: The number of vocabulary entries of their models.
            sequence_length: The number of tokens of their sequences.
            tokenizer: The fingerprint of the tokenizer of their data; None: not known.

        Raises:
            UserError: Names what differs.
        """
        measured = f"plan: --rule {shortened(path)} was measured"
        if vocab_size != self.vocab_size:
            raise UserError(f"{measured} with {self.vocab_size} vocabulary entries, and the plan has {vocab_size}")
        if None not in (tokenizer, self.tokenizer) and tokenizer != self.tokenizer:
            raise UserError(
                f"{measured} with another tokenizer than that of the plan's data, so that a token is another piece of "
                "text; give data of the same tokenizer (`llada prepare --tokenizer`), or tune anew (--tune)"
            )
        if sequence_length != self.sequence_length:
            raise UserError(
                f"{measured} at sequence length {self.sequence_length}, and the plan has {sequence_length}; give "
                f"--sequence-length {self.sequence_length}, or tune anew (--tune)"
            )
        missing = [name for name in objectives if self.name_of(name) is None]
        if missing:
            raise UserError(
                f"{measured} for {', '.join(self.objectives)}, and not for {', '.join(missing)}; tune it too (--tune), "
                "or leave it out of --objectives"
            )


def write_rule_file(path: Path, rules: RuleFile) -> None:
    """Write a rule file, atomically."""
    write_json(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "convention": "6nd",
            **{key: value for key, value in vars(rules).items() if key != "objectives"},
            "objectives": {name: _as_dict(own) for name, own in rules.objectives.items()},
        },
    )


def _as_dict(rules: FittedRules) -> dict[str, Any]:
    return {
        "lr": vars(rules.lr),
        "batch_tokens": vars(rules.batch) if rules.batch else None,
        "fitted_on": vars(rules.fitted_on),
        "optima": list(rules.optima),
    }


def read_rule_file(path: str) -> RuleFile:
    """Read a rule file.

    Raises:
        UserError: It cannot be read, or is not one that this version wrote.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"'{shortened(path)}' is no rule file; give one that `llada curves --rules` wrote")
    if content.get("version") != VERSION:
        raise UserError(
            f"'{shortened(path)}' is a rule file of version {shortened(content.get('version'), 20)}, and this package "
            f"reads version {VERSION}; write it again with `llada curves --rules`"
        )
    try:
        objectives = {str(name): _rules(own) for name, own in content["objectives"].items()}
        if not objectives:
            raise ValueError
        return RuleFile(
            objectives=objectives,
            vocab_size=int(content["vocab_size"]),
            sequence_length=int(content["sequence_length"]),
            tokenizer=content["tokenizer"],
            data_fingerprint=content["data_fingerprint"],
            table=str(content["table"]),
            table_sha256=str(content["table_sha256"]),
            package=str(content["package"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"'{shortened(path)}' is damaged: a value is missing or is not a number; write it again with "
            "`llada curves --rules`"
        ) from error


def _rules(content: Mapping[str, Any]) -> FittedRules:
    ends = {key: None if own is None else _pair(own) for key, own in content["fitted_on"].items()}
    batch = content["batch_tokens"]
    return FittedRules(
        lr=_law(content["lr"], "flops"),
        batch=None if batch is None else _law(batch, "tokens"),
        fitted_on=Range(**ends),
        optima=tuple(content["optima"]),
    )


def _law(content: Mapping[str, Any], variable: Variable) -> Law:
    a, b, c0 = (float(content[key]) for key in ("a", "b", "c0"))
    if content["variable"] != variable or not (a > 0 and c0 > 0 and all(map(math.isfinite, (a, b, c0)))):
        raise ValueError
    return Law(variable, a, b, c0, _pair(content["interval_a"]), _pair(content["interval_b"]))


def _pair(content: Sequence[Any]) -> tuple[float, float]:
    low, high = (math.nan if end is None else float(end) for end in content)
    return low, high
