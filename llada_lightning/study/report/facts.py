"""What a report says beside the fits: what is left out, how things were counted, settings, versions, limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from rich.table import Table

from llada_lightning.compute.flops import CONVENTION_NAMES
from llada_lightning.compute.shapes import format_count
from llada_lightning.objectives import OBJECTIVES
from llada_lightning.records import DONE
from llada_lightning.study.fits import NOISE_MODELS, StudyFits, named_variants, objective_names, usable_runs
from llada_lightning.study.fits.runs import base_objective, flops_column
from llada_lightning.study.report.verdict import FEW, number, span
from llada_lightning.study.tables.style import titled
from llada_lightning.support.printing import listed

MOST_VALUES = 6
"""Of more distinct numbers than this only the least and the largest are told."""
MOST_COLUMNS = 6
"""More objectives than this share one column of settings."""

# --- what is left out ------------------------------------------------------------------------------------------------


def left_out_table(table: pd.DataFrame) -> Table:
    """The rows that no fit sees, each with the reason."""
    printed = titled("Results that no fit sees", "run", "steps", "status", "why", left=4)
    usable = usable_runs(table.assign(_row=range(len(table))))["_row"]
    finite = np.isfinite(table["val_nats_per_token"].to_numpy(float, na_value=np.nan))
    for row in sorted(set(range(len(table))) - set(usable)):
        own = table.iloc[row]
        status = _text(own["status"])
        reasons = {"it is not done": status != DONE, "its loss is not finite": not finite[row]}
        why = next((reason for reason, holds in reasons.items() if holds), "the same result is there before")
        printed.add_row(_text(own["run"]), _text(own["steps"]), status, why)
    return printed


def gathered(notes: Sequence[str], names: Sequence[str]) -> list[str]:
    """Notes, of which those that say the same of several objectives are one.

    Args:
        notes: The notes, some of which begin with the name of an objective.
        names: The names of all objectives.
    """
    groups: dict[str, list[str]] = {}
    for note in notes:
        own = [name for name in names if note.startswith((f"{name}, ", f"{name}: "))]
        name = max(own, key=len, default="")
        groups.setdefault(note.removeprefix(name), []).append(name)
    return [f"{_some(own, len(names))}{rest}" for rest, own in groups.items()]


def _some(own: Sequence[str], all_names: int) -> str:
    if len(own) <= FEW:
        return listed(own)
    return f"all {len(own)} objectives" if len(own) == all_names else f"{len(own)} objectives ({own[0]}, {own[1]}, …)"


# --- how it was counted ----------------------------------------------------------------------------------------------


def flops_counting(table: pd.DataFrame) -> list[tuple[str, str]]:
    """How training FLOPs were counted: terms and their meaning."""
    names = objective_names(table)
    masked = [name for name in names if name in OBJECTIVES and OBJECTIVES[name].masks]
    others = [name for name in names if name not in masked]
    positions = [f"all positions for {listed(others)}"] * bool(others)
    positions += [f"for {listed(masked)} the masked ones, in expectation"] * bool(masked)
    where = f": {', and '.join(positions)}" if positions else ""
    copies = [name for name in names if name in OBJECTIVES and OBJECTIVES[name].in_blocks]
    copy = f" and, for {listed(copies)}, 6N for each position of the clean copy of the sequence" if copies else ""
    found = [
        ("6ND", "6 × non-embedding parameters N × training tokens D. It leaves out attention and the output head."),
        ("attention", "12 × layers × width × length for each token, half of it where attention is causal."),
        ("output head", f"6 × width × vocabulary for each position whose logits are computed{where}."),
        (CONVENTION_NAMES["total"], f"The sum of these three{copy}."),
    ]
    if ratios := _ratios(table):
        found.append(("total over 6ND", f"{'; '.join(ratios)}."))
    if table["source_flops"].notna().any():
        found.append((
            "source FLOPs",
            "The training FLOPs, by 6ND, of the weights that runs started from. The notes of the fits say whether they "
            "are counted.",
        ))  # fmt: skip
    return found


def _ratios(table: pd.DataFrame) -> list[str]:
    """By what factor the total exceeds 6ND, for each base objective."""
    found = []
    total, six = (table[flops_column(name)].to_numpy(float, na_value=np.nan) for name in ("total", "6nd"))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = total / six
    for name in objective_names(table):
        own = ratio[(table["objective"] == name).fillna(False).to_numpy(bool) & np.isfinite(ratio)]
        if len(own):
            found.append(f"{_between(own, '.2f')} for {name}")
    return found


def loss_counting(table: pd.DataFrame, fits: StudyFits | None) -> list[tuple[str, str]]:
    """How losses were counted, and their errors: terms and their meaning."""
    kinds = {
        "exact": "The negative log-likelihood of every token of the validation sequences.",
        "bound": "An upper bound on the negative log-likelihood, estimated with noise that runs of one validation seed "
        "share. The likelihood itself may be better, by how much is not known.",
    }
    found = []
    for kind, meaning in kinds.items():
        own = table[(table["val_kind"] == kind).fillna(False).to_numpy(bool)]
        if not own.empty:
            found.append((f"{kind} ({listed(objective_names(own))})", meaning))
    if fits is not None and fits.yardstick is not None:
        found.append((
            f"yardstick {fits.yardstick}",
            "The exact loss of decoding by this policy, in place of the validation loss.",
        ))  # fmt: skip
    found += [
        ("nats per token", "The mean over all validation tokens. It depends on the tokenizer."),
        (
            "bits per byte",
            "Nats per token over ln 2 and over the bytes per token of the validation split. It is empty where the "
            "tokenizer does not give the text back.",
        ),
        (
            "standard error (± s.e.)",
            "One standard error of the loss over validation documents: sequences that begin in one document count as "
            "one cluster. Runs share the documents, so the difference of two losses is known better.",
        ),
    ]
    if fits is not None:
        found.append((
            "interval",
            f"95 % of {fits.samples} bootstrap draws (seed {fits.seed}), both objectives drawn together. Errors: "
            f"{NOISE_MODELS[fits.noise_model]}.",
        ))  # fmt: skip
    return found


# --- settings and versions -------------------------------------------------------------------------------------------

_BY_OBJECTIVE = {
    "shape": "shapes", "steps": "optimizer steps", "global_batch_tokens": "tokens of a batch",
    "lr": "peak learning rate", "schedule": "schedule", "warmup_steps": "warmup steps", "decay_steps": "decay steps",
    "seed": "seeds", "epochs": "passes over the training data",
}  # fmt: skip
_OF_ALL = {
    "data_fingerprint": "fingerprint of the data", "tokenizer": "tokenizer", "vocab_size": "vocabulary entries",
    "sequence_length": "tokens of a sequence", "precision": "precision", "device": "device", "git_commit": "git commit",
    "status": "status",
}  # fmt: skip


def settings_table(table: pd.DataFrame) -> Table:
    """What was set for the runs of each objective, or for all of them where objectives are many."""
    table = named_variants(table)
    names = objective_names(table)
    parts = {name: table[(table["objective"] == name).fillna(False).to_numpy(bool)] for name in names}
    if len(names) > MOST_COLUMNS:
        parts = {f"all {len(names)} objectives": table}
    printed = titled("Settings of the runs", "setting", *parts, left=1 + len(parts))
    for column, words in _BY_OBJECTIVE.items():
        printed.add_row(words, *(_values(own[column]) for own in parts.values()))
    return printed


def variants_table(settings: Mapping[str, str]) -> Table:
    """The settings in full of the variants that this page calls by a short name."""
    printed = titled("Variants", "name", "settings", left=2)
    for name, own in settings.items():
        printed.add_row(name, own)
    return printed


def provenance_table(table: pd.DataFrame) -> Table:
    """What all runs share, or where they differ: data, tokenizer, machine, commit and versions."""
    printed = titled("Data, machines and versions", "what", "value", left=2)
    for column, words in _OF_ALL.items():
        printed.add_row(words, _values(table[column]))
    versions: dict[str, list[str]] = {}
    for value in table["versions"].dropna():
        for name, version in _mapping(value).items():
            versions.setdefault(str(name), []).append(str(version))
    for name in sorted(versions):
        printed.add_row(f"version of {name}", _values(pd.Series(versions[name], dtype="string")))
    return printed


def _mapping(value: object) -> dict[str, object]:
    """The mapping that a cell of a table holds as JSON; a damaged one is told as it is."""
    try:
        found = json.loads(str(value))
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"all": value}


def _values(column: pd.Series) -> str:
    """The distinct values of a column: of many numbers the ends, of several texts how often each is there."""
    known = column.dropna()
    if known.empty:
        return "not known"
    lacking = f"; not known of {len(column) - len(known)}" if len(known) < len(column) else ""
    if pd.api.types.is_numeric_dtype(known):
        form = ",d" if pd.api.types.is_integer_dtype(known) else ".4g"
        values = np.unique(known.to_numpy())
        if len(values) > MOST_VALUES:
            return f"{_between(values, form)} ({len(values)} values){lacking}"
        return ", ".join(format(value, form) for value in values.tolist()) + lacking
    counts = known.astype(object).map(str).value_counts(sort=False)
    if len(counts) == 1:
        return f"{counts.index[0]}{lacking}"
    return ", ".join(f"{value} ({number(count, 'result')})" for value, count in counts.items()) + lacking


def _between(values: np.ndarray, form: str) -> str:
    return span(*(format(end, form) for end in (values.min().item(), values.max().item())))


def _text(value: object) -> str:
    return "" if value is None or value is pd.NA else str(value)


# --- limits ----------------------------------------------------------------------------------------------------------


def limits(table: pd.DataFrame, fits: StudyFits | None, collected: bool) -> list[str]:
    """What a reader cannot conclude.

    Args:
        table: The table that was fitted.
        fits: Its fits; None where nothing could be fitted.
        collected: Whether the table was collected from folders for this report.
    """
    runs = usable_runs(table)
    found = []
    if fits is not None:
        bounds = [name for name in fits.objectives if fits.kind(name) == "bound"]
        if bounds and len(bounds) < len(fits.objectives):
            found.append(
                "A bound is compared with an exact loss. A multiplier holds the gap between the bound and the "
                "likelihood as well."
            )
        found.append(
            "A multiplier holds at the loss, the data, the tokenizer and the sizes that it was measured with. It may "
            "change with the budget, and nothing here is measured beyond the largest one."
        )
        sizes = span(*(format_count(float(end)) for end in runs["params_nonembedding"].agg(["min", "max"])))
        found.append(f"Models of this size ({sizes} non-embedding parameters) say nothing about large ones.")
        found.append(
            "The intervals hold the errors of the losses and the spread between runs. They do not hold a choice that "
            "all runs of an objective share, such as a learning rate that suits one objective better."
        )
    found += [
        "The table does not say how learning rates and batches were chosen, or whether they were tuned for each "
        "objective.",
        "A run that was planned and never started leaves no result, and is known here by the file of its sweep alone."
        if collected
        else "The table is all that this page knows: what was left out before it was written is not named here.",
    ]
    limit = {
        name: OBJECTIVES[base].max_epochs
        for name in objective_names(runs)
        if (base := base_objective(name)) in OBJECTIVES
    }
    for name, most in limit.items():
        epochs = runs.loc[(runs["objective"] == name).to_numpy(bool), "epochs"].max()
        if epochs > (1.0 if most is None else most):
            worth = (
                "how little that costs is not known for it"
                if most is None
                else f"passes beyond {most:g} are worth less than new data"
            )
            found.append(f"Runs of {name} read their training data up to {epochs:.3g} times; {worth}.")
    return found
