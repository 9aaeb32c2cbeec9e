"""The record of a finished run: everything that a table of results needs to know about it."""

from __future__ import annotations

import inspect
import json
import math
import platform
import pydoc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning import Trainer

import llada_lightning
from llada_lightning.compute.rules import DECAY_FRACTION
from llada_lightning.compute.shapes import shape_name
from llada_lightning.data.loading import LanguageDataModule
from llada_lightning.data.manifest import FEW_DOCUMENTS
from llada_lightning.objectives import OBJECTIVES
from llada_lightning.records import (
    DIVERGED,
    DONE,
    read_records,
    read_validation,
    write_records,
    write_validation,
)
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import strict_json
from llada_lightning.support.signals import say
from llada_lightning.support.source import git_commit
from llada_lightning.training.callbacks.accounting import Accounting, by_count, device_name
from llada_lightning.training.callbacks.loggers import SafeWandbLogger
from llada_lightning.training.first_weights import source_flops, source_objective
from llada_lightning.training.language_module import VALIDATION_METRICS, LanguageModule
from llada_lightning.training.validation import DocumentLosses

SAME_LOSS = 1e-3
"""The relative difference of two losses of a document up to which they are of one model: rounding is far below, and
other weights, or another draw of the noise, are above for some document."""

_VERSIONED = ("torch", "lightning", "litdata", "tokenizers", "numpy")


def result_record(
    run: str,
    trainer: Trainer,
    module: LanguageModule,
    data: LanguageDataModule,
    accounting: Accounting,
    decay_steps: int | None,
    parent_checkpoint: str | None = None,
) -> dict[str, Any]:
    """One record of ``result.json`` (keys and units: ``records.RESULT_COLUMNS``) of a run that has been validated.

    Args:
        run: The name of the run, which holds the hash of its configuration.
        trainer, module, data, accounting: The parts of the run, after its last step.
        decay_steps: The number of steps over which the rate has fallen; 0 at a milestone.
        parent_checkpoint: ``content_hash`` of the checkpoint of another run, or of the trunk, that it started from.
    """
    steps, schedule, validation = trainer.global_step, module.schedule, module.validation
    assert module.vocab_size is not None
    finite = math.isfinite(validation["val_nats_per_token"])
    return {
        "run": run,
        "objective": module.objective,
        # A run of one or two steps is too short for the default decay.
        "variant": variant(module, data, decayed=decay_steps != 0 or round(DECAY_FRACTION * steps) == 0),
        "shape": shape_name(module.shape),
        "params_total": module.shape.params_total(module.vocab_size),
        "params_nonembedding": module.shape.params_nonembedding,
        "tokens": accounting.tokens,
        "unique_tokens": min(accounting.tokens, data.unique_tokens(steps)),
        "epochs": data.epochs(steps),
        "steps": steps,
        "global_batch_tokens": data.batch * data.sequence_length,
        "sequence_length": data.sequence_length,
        **by_count(accounting.flops),
        "lr": schedule.lr,
        "schedule": "wsd",
        "warmup_steps": schedule.warmup_steps,
        "decay_steps": decay_steps,
        "seed": module.seed,
        "parent_checkpoint": parent_checkpoint,
        "data_fingerprint": data.fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "vocab_size": module.vocab_size,
        **{name: validation.get(name) for name in VALIDATION_METRICS},
        "val_kind": module.facts.val_kind,
        "tokens_per_second": accounting.mean_tokens_per_second(),
        "mfu": accounting.mean_mfu(trainer),
        "device": describe_devices(trainer),
        "precision": str(trainer.precision),
        "wall_seconds": accounting.wall_seconds,
        "versions": versions(),
        "git_commit": git_commit(),
        "status": DONE if finite else DIVERGED,
        "val_by_source": module.val_by_source or None,
        "val_held_out": module.val_held_out or None,
        "val_policies": module.policy_losses.measured or None,
        "source_flops": None if module.weights is None else source_flops(module.weights),
    }


def add_record(
    folder: Path,
    record: dict[str, Any],
    by_document: DocumentLosses,
    held_out_by_document: Mapping[str, DocumentLosses],
    by_policy: Mapping[str, DocumentLosses],
    wandb: SafeWandbLogger | None,
    several: bool,
) -> None:
    """Write a record into W&B's summary and the folder of its run, and say where it is.

    Of several budgets, the summary holds the figures of the largest one, and all of them below one key.
    """
    write_validation(folder, record["steps"], by_document)
    for name, documents in held_out_by_document.items():
        write_validation(folder, record["steps"], documents, held_out=name)
    for name, documents in by_policy.items():
        write_validation(folder, record["steps"], documents, policy=name)
    records = sorted([*read_records(folder), record], key=lambda known: int(known["steps"]))
    if wandb is not None:
        everything = {"records": json.dumps(strict_json(records))} if several else {}
        wandb.update_summary({**records[-1], **everything})
    path = write_records(folder, records)  # last: from here on the budget counts as reached
    say(
        f"{record['run']}: {describe_result(record)}, {record['flops_6nd']:.3g} FLOPs (6ND), "
        f"{record['wall_seconds']:.0f} s; {path}"
    )
    for line in describe_corpora(record["val_by_source"], record["val_held_out"], record["val_kind"]):
        say(line)
    for line in describe_policies(record["val_policies"]):
        say(line)


_AXES = frozenset({
    "shape", "vocab_size", "mask_token_id", "eos_token_id", "text_prefix_ids", "schedule", "weights", "seed",
})  # fmt: skip
"""Settings of a module that other columns of a record tell: the axes of a study, its data, and the first weights."""

_CORRUPTION = ("mask_eps", "time_sampling")
"""Settings of the data that belong to an objective which masks: how the mask ratio is drawn."""


def variant(module: LanguageModule, data: LanguageDataModule, decayed: bool = True) -> str | None:
    """What tells a run from the default recipe of its objective, such as `compat=llada;optimizer.weight_decay=0`.

    The pairs are sorted: the class of the module where it is not the objective's own, and each setting that is not at
    its default: of the module and its optimizer, and of how the data draw the mask ratio. A run from the weights of
    another objective has `weights=` with its name. A result of a constant rate, as at a milestone, has `decay_steps=0`.
    None where all are at their defaults.
    """
    kind, objective = type(module), OBJECTIVES.get(module.objective)
    given = _flat(module.identity.get("model", {}).get("init_args", {}))
    defaults = _flat(_defaults(kind))
    if objective is None or objective.denoises:
        given |= {name: getattr(data, name) for name in _CORRUPTION}
        defaults |= {name: _defaults(type(data)).get(name) for name in _CORRUPTION}
        if data.density_setting is not None:
            given["density"] = str(data.density_setting)
    found = {
        name: _shown(value)
        for name, value in given.items()
        if name.partition(".")[0] not in _AXES and (name not in defaults or value != defaults[name])
    }
    if objective is None or pydoc.locate(objective.module) is not kind:
        found["module"] = f"{kind.__module__}.{kind.__qualname__}"
    if module.weights is not None and (begun := source_objective(module.weights)) != module.objective:
        found["weights"] = begun
    if not decayed:
        found["decay_steps"] = "0"
    return ";".join(f"{name}={value}" for name, value in sorted(found.items())) or None


def _defaults(kind: type) -> dict[str, Any]:
    """The defaults of a class's arguments, those that it passes on to its parents included."""
    found: dict[str, Any] = {}
    for parent in kind.__mro__:
        if "__init__" in vars(parent):
            for name, parameter in inspect.signature(vars(parent)["__init__"]).parameters.items():
                if parameter.default is not parameter.empty:
                    found.setdefault(name, parameter.default)
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, each as JSON holds it: a tuple is a list there."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        if isinstance(plain, Mapping):
            found |= _flat(plain, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(plain) if isinstance(plain, tuple) else plain
    return found


def _shown(value: Any) -> str:
    """A setting as text: the same for 0 and 0.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)


def without_validation(module: LanguageModule) -> None:
    """Give a module, in place, the validation of a run that broke off: it has no loss at its budget."""
    module.validation = dict.fromkeys(VALIDATION_METRICS, math.nan)
    module.val_by_document = []
    module.val_by_source, module.val_held_out, module.held_out_by_document = {}, {}, {}
    module.policy_losses.clear()


def describe_devices(trainer: Trainer) -> str:
    """How many of which device: `8 x NVIDIA H100 80GB HBM3`, `1 x cpu (x86_64)`."""
    name = device_name(trainer)
    return f"{trainer.world_size} x {f'cpu ({platform.machine()})' if name == 'cpu' else name}"


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what the numbers rest on."""
    found = {"python": platform.python_version(), "llada_lightning": llada_lightning.__version__}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_result(record: Mapping[str, Any]) -> str:
    """The validation loss of a record; of a run that diverged, that it has none."""
    return DIVERGED if record["status"] == DIVERGED else describe_loss(record, record["val_kind"])


def describe_loss(values: Mapping[str, float | None], kind: str) -> str:
    """A validation loss with its standard error, its kind and both units, as far as it has bits per byte."""
    loss, stderr = values["val_nats_per_token"], values["val_stderr"]
    bits = values.get("val_bits_per_byte")
    in_bits = "" if bits is None else f", {bits:.4f} bits/byte"
    error = "n/a" if stderr is None or math.isnan(stderr) else f"{stderr:.4f}"  # of one document there is none
    return f"{math.nan if loss is None else loss:.4f} ± {error} nats/token ({kind}){in_bits}"


def describe_corpora(
    by_source: Mapping[str, Any] | None, held_out: Mapping[str, Any] | None, kind: str
) -> Iterator[str]:
    """A line for each source of a mixture, and for each held-out corpus: its loss, and the documents behind it."""
    for title, losses in (("source", by_source), ("held out", held_out)):
        for name, loss in (losses or {}).items():
            values = {f"val_{key}": loss[key] for key in ("nats_per_token", "stderr", "bits_per_byte")}
            documents = loss["documents"]
            count = f"{documents} document{'s' * (documents != 1)}"
            yield f"  {title} {name}: {describe_loss(values, kind)}, {count}"


def describe_policies(measured: Mapping[str, Any] | None) -> Iterator[str]:
    """A line for each decoding policy under which the validation sequences were measured."""
    for label, loss in (measured or {}).items():
        values = {f"val_{key}": loss[key] for key in ("nats_per_token", "stderr", "bits_per_byte")}
        yield f"  policy {label}: {describe_loss(values, 'exact')}"


def add_measured(folder: Path, steps: int, module: LanguageModule) -> str:
    """Add to the result of a run that is done what `validate` has measured beside the validation loss.

    That is the loss of held-out corpora, and the loss under decoding policies. The result is that of the same step
    whose documents and losses are those of this validation.

    Returns:
        A line for the user: where they are recorded, or why they are not.
    """
    try:
        records = read_records(folder)
        [record] = [known for known in records if known["steps"] == steps]
        table = read_validation(folder)
    except (UserError, ValueError):
        return f"not recorded: {folder} has no result of step {steps}"
    table = table[table["steps"] == steps].sort_values("document")
    ours = sorted(module.val_by_document)
    same = [tuple(row) for row in table[["document", "sequences"]].to_numpy().tolist()] == [own[:2] for own in ours]
    if not same or not all(
        math.isclose(loss, own[2], rel_tol=SAME_LOSS) for loss, own in zip(table["nats_per_token"], ours, strict=True)
    ):
        return (
            f"not recorded: the result of step {steps} in {folder} has other validation documents or losses than this "
            "checkpoint and these settings"
        )
    corpora = dict(record.get("val_held_out") or {})
    for name, loss in module.val_held_out.items():
        if name in corpora and corpora[name]["fingerprint"] != loss["fingerprint"]:
            return f"not recorded: the result of step {steps} in {folder} has another corpus '{name}'; rename this one"
    for name, documents in module.held_out_by_document.items():
        write_validation(folder, steps, documents, held_out=name)
    for name, documents in module.policy_losses.by_document.items():
        write_validation(folder, steps, documents, policy=name)
    record["val_held_out"] = {**corpora, **module.val_held_out} or None
    record["val_policies"] = {**(record.get("val_policies") or {}), **module.policy_losses.measured} or None
    return f"recorded: {write_records(folder, records)}"


def not_measured(
    records: Sequence[Mapping[str, Any]], held_out: Sequence[str], policies: Sequence[str], config: Path
) -> str | None:
    """A note for the user of a run that is done, where corpora or policies are asked for whose loss it lacks."""
    known = [record.get("val_held_out") or {} for record in records if record["status"] != DIVERGED]
    missing = [name for name in held_out if not all(name in losses for losses in known)]
    by_policy = [record.get("val_policies") or {} for record in records if record["status"] != DIVERGED]
    undecoded = [name for name in policies if not all(name in losses for losses in by_policy)]
    if undecoded:
        return (
            f"note: a run that is done measures no further policy ({', '.join(undecoded)}); `llada validate --config "
            f"{config} --run.policies …` does, from its last checkpoint, and records it"
        )
    if not missing:
        return None
    return (
        f"note: a run that is done measures no further corpus ({', '.join(missing)}); "
        f"`llada validate --config {config} --data.held_out …` does, from its last checkpoint, and records it"
    )


def few_documents(documents: int, of_dialogues: bool = False) -> str | None:
    """A note for the user where a standard error is of little use; None where it is of use.

    Args:
        documents: The number of documents, or dialogues, in which validation sequences begin.
        of_dialogues: Whether the data are dialogues, which no preparation divides.
    """
    if not 0 < documents < FEW_DOCUMENTS:
        return None
    if of_dialogues:
        few = f"{documents} validation dialogue{'s' * (documents > 1)} only"
        remedy = "more rows, or a larger --data.val_fraction"
    else:
        few = f"validation sequences begin in {documents} document{'s' * (documents > 1)} only"
        remedy = "more text, or prepare it with a larger --val-fraction"
    return f"note: {few}, so the standard error means little; give {remedy}"
