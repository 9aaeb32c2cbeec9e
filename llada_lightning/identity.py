"""What makes a run this run, and the name that follows from it.

An identity is a dictionary of all resolved settings that decide what the weights of a run become, with the fingerprints
of its data and tokenizer. Paths and what belongs to the machine are left out. Its hash is in the name of the run; a
checkpoint holds it, so that no run resumes from the checkpoint of another.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llada_lightning.compute.schedule import schedule_from
from llada_lightning.compute.shapes import Shape, shape_name
from llada_lightning.objectives import OBJECTIVES
from llada_lightning.support.errors import UserError

_HASHED_AS = {
    "arm": "llada_lightning.training.modules.ArmModule",
    "llada": "llada_lightning.training.modules.LladaModule",
    "pretrain": "llada_lightning.data.datamodule.TokenDataModule",
    "sft": "llada_lightning.data.sft.SftDataModule",
}
"""What the hashed text holds in place of these names. It never changes: the first runs were named so."""


_KINDS = {"model": "objective", "data": "kind"}
"""The key of each part of an identity that holds the name."""


HASH_DIGITS = 10
"""The digits of an identity's hash that end the name of its run."""


_CLASSES = {path.rpartition(".")[2]: name for name, path in _HASHED_AS.items()}


def stable_name(class_path: Any) -> str | None:
    """The name by which an identity knows a class of ours: `arm`, `llada`, `pretrain`, `sft`, or of the table.

    Returns:
        None for other classes, which an identity knows by their class path.
    """
    by_table = {objective.module: name for name, objective in OBJECTIVES.items()}
    package, _, name = str(class_path).rpartition(".")
    ours = _CLASSES.get(name) if package.startswith("llada_lightning.") else None
    return ours or by_table.get(class_path)


def with_stable_names(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as it is written now, of one that may hold class paths of ours, as checkpoints up to 0.1 do."""
    found = dict(identity)
    for part, key in _KINDS.items():
        section = found.get(part)
        if isinstance(section, dict) and (name := stable_name(section.get("class_path"))) is not None:
            found[part] = {key: name, **{k: v for k, v in section.items() if k != "class_path"}}
    return found


def as_hashed(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity in the form whose hash names a run. It has been the same, byte by byte, since the first runs."""
    found = dict(identity)
    for part, key in _KINDS.items():
        section = found.get(part)
        if isinstance(section, dict) and section.get(key) in _HASHED_AS:
            found[part] = {"class_path": _HASHED_AS[section[key]], **{k: v for k, v in section.items() if k != key}}
    return found


def identity_hash(identity: Mapping[str, Any]) -> str:
    """The SHA-256 of an identity, in 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(as_hashed(identity), sort_keys=True).encode()).hexdigest()


def run_name(objective: str, shape: Shape, flops: Sequence[float], identities: Sequence[Mapping[str, Any]]) -> str:
    """`arm-443k-1e+12flops-0a1b2c3d4e`: objective, shape, training FLOPs by 6ND, ten digits of the identity's hash.

    A function of the identity: however the length was given, the same run has the same name. Of several budgets the
    first and the last are named: `arm-443k-1e+12-to-8e+12flops-5f6a7b8c9d`.

    Args:
        objective: The name of the objective.
        shape: The dimensions of the Transformer.
        flops: The training FLOPs of each budget by 6ND, ascending.
        identities: The identity of each budget's run.
    """
    ends = "-to-".join(f"{spent:.2g}" for spent in ([flops[0]] if len(flops) == 1 else [flops[0], flops[-1]]))
    hashed = [as_hashed(identity) for identity in identities]
    text = json.dumps(hashed[0] if len(hashed) == 1 else hashed, sort_keys=True)
    digits = hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]
    return f"{objective}-{shape_name(shape)}-{ends}flops-{digits}"


_MODEL_IDENTITY = (
    "shape", "vocab_size", "rope_theta", "norm_eps", "text_prefix_ids", "mask_token_id", "eos_token_id", "compat",
    "qk_norm", "block_length", "shift_targets",
)  # fmt: skip


def model_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """The part of an identity that says which model this is; any data of its tokenizer will do."""
    model = identity.get("model", {})
    arguments = {key: model.get("init_args", {}).get(key) for key in _MODEL_IDENTITY}
    kind = {key: model[key] for key in ("objective", "class_path") if key in model}
    return {"model": {**kind, **arguments}, "tokenizer": identity.get("tokenizer")}


def check_identity(saved: dict[str, Any], current: dict[str, Any], checkpoint: object, fix: str) -> None:
    """Refuse a checkpoint whose run (or whose model) is another one.

    Args:
        saved: The identity of the run that wrote it.
        current: The identity of the run that is to read it.
        checkpoint: Its path, for the message.
        fix: What the user can do, for the message.

    Raises:
        UserError: Names the checkpoint and every difference.
    """
    found = differences(saved, current)
    if found:
        raise UserError(f"checkpoint: '{checkpoint}' is of another run ({'; '.join(found)}); {fix}")


def check_history(saved: dict[str, Any], current: dict[str, Any], step: int, checkpoint: object, fix: str) -> None:
    """Refuse a checkpoint that the current run would not have reached by itself after ``step`` steps.

    Another length is allowed while both schedules still agree: so a branch starts from its trunk. The other arguments
    and the error are those of :func:`check_identity`.
    """
    if saved != current and not _same_history(saved, current, step):
        check_identity(saved, current, checkpoint, fix)


def _same_history(saved: dict[str, Any], current: dict[str, Any], step: int) -> bool:
    then, now = copy.deepcopy(saved), copy.deepcopy(current)
    try:
        rates = [schedule_from(identity["model"]["init_args"].pop("schedule")) for identity in (then, now)]
        del then["trainer"]["max_steps"], now["trainer"]["max_steps"]
    except (KeyError, TypeError):
        return False
    return not differences(then, now) and rates[0].agrees(rates[1], step)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys, dotted, in which two nested dictionaries differ, each with both values."""
    found: list[str] = []
    for key in sorted(set(old) | set(new)):
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key} was {left!r}, is {right!r}")
    return found
