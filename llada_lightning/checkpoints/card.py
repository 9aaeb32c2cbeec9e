"""The model card of a converted folder: what is known of the model, as a page for people and for the Hub.

Nothing is guessed: what neither the checkpoint nor its run says is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeGuard

import llada_lightning
from llada_lightning.checkpoints.description import excluded_token_id
from llada_lightning.checkpoints.run_folder import run_folder_of
from llada_lightning.checkpoints.stored_model import StoredModel
from llada_lightning.compute.flops import flops_6nd
from llada_lightning.compute.shapes import shape_name
from llada_lightning.identity import identity_hash
from llada_lightning.objectives import Objective, get_objective
from llada_lightning.records import read_records, read_validation
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import strict_json
from llada_lightning.support.markdown import markdown_environment, tidied
from llada_lightning.support.printing import counted, visible
from llada_lightning.support.reading import read_json
from llada_lightning.support.source import git_commit

CARD_NAME = "README.md"
TRAINING_NAME = "training.json"
"""The file, in a converted folder, with what is known of the run: its identity, steps, tokens, and result."""
CODE_REPOSITORY = "GSAI-ML/LLaDA-8B-Base"
CODE_FILES = ("configuration_llada.py", "modeling_llada.py")
"""The authors' code of the architecture ``llada``, by the names that ``auto_map`` of a folder gives."""
CODE_TRANSFORMERS = "4.38.2"
"""The version of transformers that the authors ask for. It does not read the ``tokenizer.json`` of newer libraries."""
TOKENIZER_TRANSFORMERS = "4.57.6"
"""A version of transformers that was seen to read the tokenizer of an exported ``llada``."""
_ANSWER = 64
"""The most tokens that the examples of a card sample."""

Row = tuple[str, str]


def code_command(folder: str) -> str:
    """The command that fetches the authors' code into a folder in the layout of Hugging Face LLaDA."""
    return f"hf download {CODE_REPOSITORY} {' '.join(CODE_FILES)} --local-dir {folder}"


def training_facts(model: StoredModel) -> dict[str, Any]:
    """What is known of the run that trained a model: its identity, steps and tokens, and its result at that step.

    Returns:
        ``identity``, ``steps``, ``tokens``, ``record`` (``records.RESULT_COLUMNS``) and ``validation``, the numbers of
        ``sequences`` and ``documents`` behind the record's loss; the last three None where they are not known; {} where
        nothing is. Of a folder they are those of its ``training.json``, if the identity in it is that of the model.
    """
    if model.trained:
        record = _record(model)
        return {**model.trained, "record": record, "validation": None if record is None else _validation(model)}
    source = model.description.source
    try:
        facts = read_json(model.path / TRAINING_NAME)
        known = isinstance(facts, dict) and identity_hash(facts["identity"]) == source["identity"]
        return facts if known and facts["steps"] == source["step"] else {}
    except (UserError, LookupError, TypeError, AttributeError):  # not there, damaged, or of someone else
        return {}


def _record(model: StoredModel) -> dict[str, Any] | None:
    run = run_folder_of(model.path)
    try:
        records = [] if run is None else read_records(run)
    except UserError:  # the model is whole without it
        return None
    return next((record for record in records if record["steps"] == model.trained["steps"]), None)


def _validation(model: StoredModel) -> dict[str, int] | None:
    run = run_folder_of(model.path)
    assert run is not None, "a record lies in the folder of a run"
    try:
        table = read_validation(run)
    except UserError:  # a run of fewer files
        return None
    own = table[table["steps"] == model.trained["steps"]]
    return {"sequences": int(own["sequences"].sum()), "documents": len(own)} if len(own) else None


def training_file(facts: Mapping[str, Any]) -> bytes:
    """The content of ``training.json``."""
    return (json.dumps(strict_json(dict(facts)), indent=2, allow_nan=False) + "\n").encode()


@dataclass(frozen=True)
class Card:
    """The values of the template ``card.md.jinja``: tables are rows of a name and a text."""

    metadata: str
    title: str
    summary: str
    layout: str
    model: list[Row]
    training: list[Row]
    objective: str
    recipe: list[Row] | None
    """The settings that differ from the objective's defaults; None where they are not known."""
    flops: list[Row]
    loss: list[Row]
    loss_meaning: str
    tokenizer: bool
    start_token: str | None
    excluded: str | None
    answer: int
    code_command: str
    code_transformers: str
    tokenizer_transformers: str
    other_layout: str | None
    """The layout, beside our own, that the model can have."""
    versions: list[Row]


def model_card(model: StoredModel, layout: str, dtype: str, facts: Mapping[str, Any]) -> str:
    """The card of a folder in Markdown, with the metadata of the Hub in front.

    Args:
        model: The opened model.
        layout: The layout of the folder, as ``llada convert --to`` names it.
        dtype: The type of the weights in the folder.
        facts: What :func:`training_facts` gives.
    """
    description = model.description
    objective = get_objective(description.objective)
    record, identity = _mapping(facts.get("record")), _mapping(facts.get("identity"))
    tuned = _mapping(identity.get("data")).get("kind") == "sft"
    title = _text(record.get("run") or description.source.get("run")) or (
        f"{description.objective} {shape_name(description.shape)}"
    )
    loss = _loss(record)
    own_alone = description.qk_norm or description.shift_targets
    excluded = excluded_token_id(description.compat, description.mask_token_id)
    card = Card(
        metadata=_metadata(title, layout, objective, record),
        title=title,
        summary=_summary(objective, description.block_length, tuned, bool(facts)),
        layout=layout,
        model=_model(model, dtype),
        training=_training(record, identity, facts),
        objective=objective.name,
        recipe=_recipe(record) if record else None,
        flops=_flops(record, model, facts),
        loss=loss,
        loss_meaning=_meaning(record, tuned, _mapping(facts.get("validation"))),
        tokenizer=model.tokenizer is not None,
        start_token=_token(model, description.start_token_id),
        excluded=_token(model, excluded),
        answer=max(1, min(_ANSWER, description.context_length // 2)),
        code_command=code_command("FOLDER"),
        code_transformers=CODE_TRANSFORMERS,
        tokenizer_transformers=TOKENIZER_TRANSFORMERS,
        other_layout=None if own_alone else next(iter(objective.layouts), None),
        versions=_versions(record),
    )
    template = markdown_environment("llada_lightning.checkpoints").get_template("card.md.jinja")
    return tidied(template.render(card=card))


# --- the parts --------------------------------------------------------------------------------------------------------


def _metadata(title: str, layout: str, objective: Objective, record: Mapping[str, Any]) -> str:
    """The YAML in front of the card. The licence is left out: nothing here knows it."""
    from huggingface_hub import EvalResult, ModelCardData  # here, so that other commands do not load it

    measured = {
        "nats_per_token": ("val_nats_per_token", f"nats per token ({record.get('val_kind')})"),
        "bits_per_byte": ("val_bits_per_byte", f"bits per byte ({record.get('val_kind')})"),
    }
    data = _text(record.get("data_fingerprint"))
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="validation",
            dataset_name=f"validation split of the data {data[:12]}",
            metric_type=metric,
            metric_name=visible(name),
            metric_value=float(record[key]),
        )
        for metric, (key, name) in measured.items()
        if _is_number(record.get(key))
    ]
    known = ModelCardData(
        library_name="llada-lightning" if layout == "llada" else "transformers",
        pipeline_tag="text-generation",
        tags=["llada-lightning", objective.name, *(["diffusion-language-model"] if objective.denoises else [])],
        model_name=visible(title) if results else None,
        eval_results=results or None,
    )
    return str(known.to_yaml())


def _summary(objective: Objective, block_length: int | None, tuned: bool, known: bool) -> str:
    if objective.in_blocks:
        how = f"block diffusion: blocks of {block_length} tokens, each by masked diffusion, one after the other"
    elif objective.masks:
        how = "masked diffusion: masked tokens are predicted from all the others"
    elif objective.replaces:
        how = "uniform-state diffusion: tokens that random ones have replaced are predicted from all the others"
    else:
        how = "autoregression: each token is predicted from those before it"
    what = f"A Transformer language model, trained by {how} (objective {objective.name})."
    ran = "It was fine-tuned on dialogues" if tuned else "The training ran"
    package = " with llada-lightning, a Python package for studies of diffusion language models" if known else ""
    return f"{what} {ran}{package}." if known or tuned else what


def _model(model: StoredModel, dtype: str) -> list[Row]:
    description, shape = model.description, model.description.shape
    total = sum(weight.elements for weight in model.weights.values())
    embeddings = 2 * description.vocab_size * shape.d_model
    ends = ", ".join(filter(None, (_token(model, i) for i in model.end_token_ids)))
    return [
        ("layers", f"{shape.n_layers}"),
        ("width", f"{shape.d_model}"),
        ("attention heads", f"{shape.n_heads}, with {shape.n_kv_heads} for keys and values"),
        ("inner width of the feed-forward layers", f"{shape.d_ff}"),
        ("parameters with embeddings", f"{total:,} (the output head is not tied to the embedding)"),
        ("parameters without embeddings", f"{total - embeddings:,}"),
        ("type of the weights", dtype),
        ("context length", f"{description.context_length:,} tokens"),
        ("rotary embedding", f"base {description.rope_theta:g}"),
        *([("queries and keys", "normalised (qk_norm)")] if description.qk_norm else []),
        *([("targets", "shifted: a masked token is predicted at the position before it")] * description.shift_targets),
        ("vocabulary", f"{description.vocab_size:,} tokens"),
        ("tokens that end an answer", ends),
        *([] if (mask := _token(model, description.mask_token_id)) is None else [("mask token", mask)]),
    ]


def _training(record: Mapping[str, Any], identity: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Row]:
    """The data and the settings of the run; {} where none is known."""
    settings = _mapping(_mapping(identity.get("model")).get("init_args"))
    schedule, data = _mapping(settings.get("schedule")), _mapping(identity.get("data"))
    lengths = ("sequence_length", "context_length")
    length = record.get("sequence_length") or next((data[key] for key in lengths if data.get(key)), None)
    rate, warmup = (record.get(key, schedule.get(key)) for key in ("lr", "warmup_steps"))
    decay = record.get("decay_steps", schedule.get("decay_steps"))
    trainer = _mapping(identity.get("trainer"))
    rows = {
        "training tokens": _tokens(record.get("tokens", facts.get("tokens")), record.get("unique_tokens")),
        "optimizer steps": _count(record.get("steps", facts.get("steps"))),
        "sequence length": _count(length),
        "batch": _with_unit(_count(record.get("global_batch_tokens")), "tokens"),
        "peak learning rate": _number(rate),
        "warm-up": _with_unit(_count(warmup), "steps"),
        "decay": _with_unit(_count(decay), "steps"),
        "schedule": _schedule(schedule, warmup, decay),
        "optimizer": _optimizer(_mapping(settings.get("optimizer"))),
        "clipping of the gradient": _clipped(trainer.get("gradient_clip_val")),
        "precision": _text(record.get("precision") or trainer.get("precision")),
        "seed": _count(record.get("seed", identity.get("seed"))),
        "device": _text(record.get("device")),
        "fingerprint of the data": _text(record.get("data_fingerprint") or data.get("fingerprint")),
        "fingerprint of the tokenizer": _text(record.get("tokenizer") or identity.get("tokenizer")),
        "status": _text(record.get("status")) if record.get("status") != "done" else None,
    }
    return [(name, value) for name, value in rows.items() if value]


def _tokens(tokens: Any, unique: Any) -> str | None:
    """The training tokens and, where some were repeated, how often: what the two numbers give."""
    told = _count(tokens)
    if told is None or not _count(unique) or not 0 < unique <= tokens:
        return told
    often = "each seen once" if unique == tokens else f"{unique:,} of them unique: {tokens / unique:.4g} epochs"
    return f"{told} ({often})"


def _schedule(schedule: Mapping[str, Any], warmup: Any, decay: Any) -> str | None:
    """How the rate goes, in words: the numbers of steps and the peak rate have rows of their own."""
    if not schedule:
        return None
    parts = ["linear warm-up from 0"] if warmup else []
    plateaus = schedule.get("plateaus")
    later = [_mapping(plateau) for plateau in plateaus] if isinstance(plateaus, list) else []
    rates = [f"{_number(own.get('lr'))} from {_number(own.get('from_tokens'))} tokens on" for own in later]
    parts.append("constant rate" + (f" ({', '.join(rates)})" if rates else ""))
    if decay:
        final = _number(schedule.get("final_lr"))
        parts.append("linear decay" + (f" to {final}" if final else ""))
    return ", ".join(parts)


def _optimizer(settings: Mapping[str, Any]) -> str | None:
    if not settings:
        return None
    name = settings.get("name", "adamw")  # an identity leaves out later settings at their defaults
    if name not in ("adamw", "muon"):
        return _text(name)
    kind = "AdamW" if name == "adamw" else "Muon for the matrices of the blocks, AdamW for the rest"
    betas = settings.get("betas")
    values = {
        "betas": " and ".join(f"{beta}" for beta in betas) if isinstance(betas, (list, tuple)) else None,
        "eps": _number(settings.get("eps")),
        "weight decay": _number(settings.get("weight_decay")),
    }
    return ", ".join([kind, *(f"{key} {value}" for key, value in values.items() if value)])


def _clipped(norm: Any) -> str | None:
    return f"to a norm of {norm:g}" if _is_number(norm) and norm > 0 else None


def _recipe(record: Mapping[str, Any]) -> list[Row]:
    pairs = (pair.partition("=") for pair in _text(record.get("variant")).split(";"))
    return [(name, value) for name, _, value in pairs if name]


def _flops(record: Mapping[str, Any], model: StoredModel, facts: Mapping[str, Any]) -> list[Row]:
    tokens = facts.get("tokens")
    by_tokens = flops_6nd(model.description.shape.params_nonembedding, tokens) if _is_number(tokens) else None
    names = {
        "flops_6nd": "6ND: 6 × parameters without embeddings × tokens",
        "flops_attention": "attention",
        "flops_head": "output head",
        "flops_total": "total of the three",
        "source_flops": "of the weights that the run started from, by 6ND, not in the counts above",
    }
    values = {key: record.get(key) for key in names}
    values["flops_6nd"] = values["flops_6nd"] or by_tokens
    return [(names[key], f"{value:.4g}") for key, value in values.items() if _is_number(value)]


def _loss(record: Mapping[str, Any]) -> list[Row]:
    nats, kind = record.get("val_nats_per_token"), record.get("val_kind")
    if not _is_number(nats):
        return []
    rows = [("nats per token", _measured(nats, record.get("val_stderr"))), ("kind", _text(kind))]
    if _is_number(record.get("val_bits_per_byte")):
        rows.append(("bits per byte", _measured(record["val_bits_per_byte"], None)))
    for key, what, how in (
        ("val_by_source", "source", kind),
        ("val_held_out", "held-out corpus", kind),
        ("val_policies", "decoding policy", "exact"),
    ):
        for name, values in _mapping(record.get(key)).items():
            found = _mapping(values)
            if _is_number(found.get("nats_per_token")):
                told = _measured(found["nats_per_token"], found.get("stderr"))
                counts = _measured_on(found, None)
                rows.append((f"nats per token, {what} {name}", f"{told} ({_text(how)}{counts and f', on {counts}'})"))
    return rows


def _meaning(record: Mapping[str, Any], tuned: bool, validation: Mapping[str, Any]) -> str:
    exact = "The exact negative log-likelihood"
    bound = "An upper bound on the negative log-likelihood, which is not known itself,"
    what = exact if record.get("val_kind") == "exact" else bound
    where = "held-out responses, given their prompts" if tuned else "the validation split"
    counts = _measured_on(validation, None if tuned else record.get("sequence_length"))
    by = "responses" if tuned else "documents"
    error = f" Behind ± is one standard error, over {by}." if _is_number(record.get("val_stderr")) else ""
    measured = f" It was measured on {counts}." if counts and not tuned else ""
    return f"{what} of {where}.{measured}{error}"


def _measured_on(counts: Mapping[str, Any], length: Any) -> str:
    """The sequences, documents and tokens behind a loss; '' where they are not known."""
    sequences, documents = (counts.get(key) for key in ("sequences", "documents"))
    if not (isinstance(sequences, int) and isinstance(documents, int)):
        return ""
    tokens = f" of {length:,} tokens ({sequences * length:,} in all)" if _count(length) else ""
    return f"{counted(sequences, 'sequence')}{tokens} from {counted(documents, 'document')}"


def _versions(record: Mapping[str, Any]) -> list[Row]:
    of_run = _mapping(record.get("versions"))
    trained, commit = _text(of_run.get("llada_lightning")), _text(record.get("git_commit"))
    others = ", ".join(f"{name} {_text(value)}" for name, value in of_run.items() if name != "llada_lightning")
    rows = {
        "trained with": trained and f"llada-lightning {trained}" + (f", commit {commit}" if commit else ""),
        "beside": others,
        "converted with": _this_version(),
    }
    return [(name, value) for name, value in rows.items() if value]


@cache
def _this_version() -> str:
    commit = git_commit()
    return f"llada-lightning {llada_lightning.__version__}" + ("" if commit is None else f", commit {commit}")


# --- values that may be missing, or of a stranger ---------------------------------------------------------------------


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> str | None:
    return f"{value:.4g}" if _is_number(value) else None


def _with_unit(text: str | None, unit: str) -> str | None:
    return None if text is None else f"{text} {unit}"


def _measured(value: float, error: Any) -> str:
    return f"{value:.4f} ± {error:.4f}" if _is_number(error) else f"{value:.4f}"


def _token(model: StoredModel, token_id: int | None) -> str | None:
    """A token as the card shows it: by its name, where there is a tokenizer, and its id."""
    if token_id is None:
        return None
    name = None if model.tokenizer is None else model.tokenizer.tokenizer.id_to_token(token_id)
    return f"id {token_id}" if name is None else f"{name} (id {token_id})"
