"""A checkpoint of any kind, recognised and checked before its weights are read. Nothing in it is ever run."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import torch
from tokenizers import Tokenizer

from llada_lightning.checkpoints import hugging_face
from llada_lightning.checkpoints.description import CONFIG_NAME, MODEL_TYPE, ConfigFile, Description, read_config
from llada_lightning.checkpoints.run_folder import (
    CONFIG,
    META,
    ShardedCheckpointReader,
    final_checkpoint,
    is_sharded,
    last_checkpoint,
    require_whole,
    run_folder_of,
    whole_neighbour,
)
from llada_lightning.checkpoints.stored_tensors import (
    HF_LLADA,
    HF_LLAMA,
    OURS,
    TRAINING,
    Layout,
    StoredTensor,
    is_usual,
    of_tensor,
    read_folder,
    refuse_adapter,
    weights_in,
    weights_of,
)
from llada_lightning.compute.flops import flops_6nd
from llada_lightning.compute.shapes import Shape
from llada_lightning.data import TOKENIZER_NAME, tokenizer_fingerprint
from llada_lightning.data.manifest import read_tokenizer_text
from llada_lightning.data.tokenizers import TokenizerFiles, as_special, without_special_beyond
from llada_lightning.identity import identity_hash, with_stable_names
from llada_lightning.model import Transformer
from llada_lightning.model.transformer import NORM_EPS
from llada_lightning.objectives import OBJECTIVES
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, local_path
from llada_lightning.support.printing import warn
from llada_lightning.support.reading import read_yaml

Kind = Literal["training", "llada", "hf-llada", "hf-llama"]

_LAYOUTS: dict[str, tuple[Kind, Layout]] = {
    MODEL_TYPE: ("llada", OURS),
    "llada": ("hf-llada", HF_LLADA),
    "llama": ("hf-llama", HF_LLAMA),
}
"""The kind of a checkpoint by the ``model_type`` of its ``config.json``."""


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint that is whole and fits its description.

    Args:
        path: The path of the checkpoint; of a run's folder, that of the chosen checkpoint.
        kind: The kind of the checkpoint: of `llada fit`, or a folder by the names of `llada convert --to`.
        description: The description: everything but weights and tokenizer.
        weights: The weights by our names.
        tokenizer: The tokenizer; None where there is none.
        auto_map: The ``auto_map`` of a Hugging Face folder that names modelling code: the place of each class.
        trained: The identity, the steps and the tokens of the run that wrote a training checkpoint; {} of a folder.
    """

    path: Path
    kind: Kind
    description: Description
    weights: dict[str, StoredTensor]
    tokenizer: TokenizerFiles | None
    auto_map: dict[str, Any] = field(default_factory=dict)
    trained: dict[str, Any] = field(default_factory=dict)

    @property
    def text_prefix_ids(self) -> tuple[int, ...]:
        """The token ids before a text: those of the model, else those of its tokenizer."""
        if self.description.text_prefix_ids is not None or self.tokenizer is None:
            return self.description.text_prefix_ids or ()
        prefix, vocab_size = self.tokenizer.prefix_ids, self.description.vocab_size
        if any(token_id >= vocab_size for token_id in prefix):
            raise UserError(
                f"tokenizer '{self.tokenizer.name}' puts the ids {list(prefix)} before a text, and the model has only "
                f"{vocab_size}; give the model's own with --tokenizer"
            )
        return prefix

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: those of the model, then those that only its tokenizer's files name."""
        named = () if self.tokenizer is None else self.tokenizer.end_ids
        return tuple(dict.fromkeys((*self.description.end_token_ids, *named)))


def open_checkpoint(path: str | Path, tokenizer: str | Path | None = None) -> StoredModel:
    """Recognises the checkpoint at a path, and checks that it is whole; arguments as of ``load_model``.

    Raises:
        UserError: It is none of the known kinds, is not whole, or its parts do not fit together.
    """
    path = expanded(path)
    given = None if tokenizer is None else TokenizerFiles.of_path(tokenizer)
    if not path.exists():
        fix = "give a run's folder, a checkpoint, or a converted folder"
        if len(path.parts) == 2 and not path.parent.exists():  # owner/name
            fix += f"; a model of the Hugging Face hub is fetched first: hf download {path} --local-dir {path.name}"
        raise UserError(f"checkpoint '{path}' does not exist; {fix}")
    if path.is_file() and path.suffix == ".safetensors":
        raise UserError(f"'{path}' holds weights only; give the folder, with its {CONFIG_NAME}")
    if path.is_file() or is_sharded(path):
        return _training(path, given)
    if (path / CONFIG_NAME).is_file():
        return _folder(path, given)
    checkpoint = last_checkpoint(path) or final_checkpoint(path)
    if checkpoint is not None:
        return _training(checkpoint, given)
    refuse_adapter(path)
    if any(is_usual(name) for name in weights_in(path)):
        raise UserError(f"'{path}' holds weights and no {CONFIG_NAME}: it is half-written; copy it again")
    if names := weights_in(path):
        raise UserError(f"'{path}' holds {names[0]} and no {CONFIG_NAME}; give a folder in transformers' layout")
    raise UserError(
        f"'{path}' is no checkpoint: it has no {CONFIG_NAME} and no checkpoints/step=….ckpt; give a run's folder, a "
        "checkpoint, or a converted folder"
    )


def _training(path: Path, given: TokenizerFiles | None) -> StoredModel:
    description, stored, trained = _read_training(path)
    weights = weights_of(stored, TRAINING, _on_meta(description, path), str(path))
    found = given or _run_tokenizer(path, description, trained["identity"]["tokenizer"])
    files = None if found is None else fitted_tokenizer(found, description, given is not None, known=given is None)
    return StoredModel(path, "training", description, weights, files, trained=trained)


def _read_training(path: Path) -> tuple[Description, dict[str, StoredTensor], dict[str, Any]]:
    """Description, weights by their names in the file, and identity, steps and tokens, of a checkpoint of `llada fit`.

    No optimizer is read; all bytes are checked.
    """
    try:
        sharded = is_sharded(path)
        content = torch.load(path / META if sharded else path, mmap=True, weights_only=True, map_location="cpu")
        if sharded:
            reader = ShardedCheckpointReader(path)
            weights = {
                key.removeprefix("state_dict."): StoredTensor(
                    tuple(stored.size), stored.properties.dtype, partial(reader.read_tensor, key)
                )
                for key, stored in reader.tensors().items()
                if key.startswith("state_dict.")
            }
        else:
            weights = {name: of_tensor(tensor) for name, tensor in content["state_dict"].items()}
        require_whole(path)
        trained = {
            "identity": {**with_stable_names(content["identity"]), "tokenizer": content["identity"]["tokenizer"]},
            "steps": content["global_step"],
            "tokens": _training_tokens(content),
        }
        return _description(content, path), weights, trained
    except pickle.UnpicklingError as error:
        raise UserError(
            f"'{path}' is refused: it holds other things than weights, which may run code when they are read; give a "
            "checkpoint of llada fit, or a folder with safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, ValueError, BadZipFile) as error:
        whole = whole_neighbour(path)
        usual = "give a run's folder, one of its checkpoints, or a folder with config.json and safetensors"
        fix = usual if whole is None else f"give '{whole}', which is whole"
        raise UserError(f"'{path}' is not a checkpoint of llada fit, or is damaged; {fix}") from error


def _description(content: Mapping[str, Any], path: Path) -> Description:
    identity = with_stable_names(content["identity"])
    model, data = identity["model"], identity["data"]
    arguments = model["init_args"]
    objective = content.get("objective", model.get("objective"))
    if objective is None:
        raise UserError(f"'{path}' is of {model['class_path']}, whose objective it does not name; train it again")
    run = run_folder_of(path)
    inherited = content.get("inherited", {})  # from the weights that it started from
    length, before = data.get("sequence_length") or data["context_length"], inherited.get("context_length")
    if isinstance(length, int) and isinstance(before, int):
        length = max(length, before)
    prefix = arguments.get("text_prefix_ids")  # None: prepared data holds nothing but text and EOS
    known = OBJECTIVES.get(objective)  # the description refuses an unknown one
    shift_targets = arguments.get("shift_targets", False)
    starts_with_eos = known is not None and (known.starts_with_eos or shift_targets) and prefix is None
    start = arguments["eos_token_id"] if starts_with_eos else None
    found = Description.of(
        path,
        arguments["shape"],
        objective=objective,
        vocab_size=arguments["vocab_size"],
        eos_token_id=arguments["eos_token_id"],
        mask_token_id=arguments["mask_token_id"],
        context_length=length,
        rope_theta=arguments["rope_theta"],
        norm_eps=arguments.get("norm_eps", NORM_EPS),
        end_token_ids=tuple(inherited.get("end_token_ids", ())),
        start_token_id=start,
        text_prefix_ids=tuple(prefix or ()),
        compat=arguments["compat"],
        qk_norm=arguments.get("qk_norm", False),
        shift_targets=shift_targets,
        bos_token_id=inherited.get("bos_token_id", start),
        pad_token_id=inherited.get("pad_token_id"),
        block_length=arguments.get("block_length"),
        source={
            "run": None if run is None else run.name,
            "step": content["global_step"],
            "identity": identity_hash(identity),
        },
    )
    return replace(found, source={**found.source, **_training_flops(content, found.shape)})


def _training_flops(content: Mapping[str, Any], shape: Shape) -> dict[str, float]:
    """The training FLOPs by 6ND of a checkpoint, and of the weights that its run started from.

    {} where they are not known: of weights of others, without `llada fit`, and of checkpoints of earlier versions.
    """
    tokens, before = _training_tokens(content), content.get("source_flops")
    if tokens is None or before is None:
        return {}
    return {"flops_6nd": before + flops_6nd(shape.params_nonembedding, tokens)}


def _training_tokens(content: Mapping[str, Any]) -> int | None:
    tokens: int | None = content.get("callbacks", {}).get("Accounting", {}).get("tokens")
    return tokens


def _run_tokenizer(checkpoint: Path, description: Description, fingerprint: str) -> TokenizerFiles | None:
    """The tokenizer that a run was trained with: that beside the checkpoint, in the run's folder, or of its data.

    None where there is none, or only others; of the others, a line on stderr names the first.
    """
    run = run_folder_of(checkpoint)
    folders = [checkpoint.parent, *([] if run is None else [run, *_data_folders(run)])]
    others = []
    for folder in map(str, folders):
        name = f"{folder}/{TOKENIZER_NAME}"
        try:
            text = read_tokenizer_text(folder)
        except (UserError, ValueError):  # not there; token ids suffice
            continue
        with contextlib.suppress(UserError):  # a damaged file is no tokenizer
            files = TokenizerFiles.of_text(text, name)
            if _is_tokenizer(files, description, fingerprint):
                return files.with_template_of(folder)
        others.append(name)
    if others:
        warn(
            f"warning: '{others[0]}' is not the tokenizer that '{checkpoint}' was trained with, and is left out; give "
            "the run's own with --tokenizer"
        )
    return None


def _is_tokenizer(files: TokenizerFiles, description: Description, fingerprint: str) -> bool:
    """Whether a fingerprint is of this tokenizer with the model's special tokens.

    An `arm` without [MASK] may have been trained on data whose tokenizer has one.
    """
    eos, mask = description.eos_token_id, description.mask_token_id
    masks = [mask] if mask is not None else [None, files.named_ids.get("mask_token")]
    text = files.tokenizer.to_str()
    return fingerprint in {tokenizer_fingerprint(text, eos, each) for each in masks}


def _data_folders(run: Path) -> list[str]:
    """The data that a run's config.yaml names; as there, relative to where the run was started.

    Only data on this machine count: reading a stranger's run must not open connections to addresses that it names.
    """
    try:
        path = read_yaml(run / CONFIG)["data"]["init_args"]["path"]
    except (UserError, KeyError, TypeError):
        return []
    paths = path if isinstance(path, dict) else [path]
    return [folder for folder in paths if isinstance(folder, str) and local_path(folder) is not None]


def _folder(folder: Path, given: TokenizerFiles | None) -> StoredModel:
    refuse_adapter(folder)
    config = ConfigFile.read(folder / CONFIG_NAME)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _LAYOUTS:
        raise config.mistake("model_type", f"an unknown architecture; these are known: {', '.join(_LAYOUTS)}")
    kind, layout = _LAYOUTS[model_type]
    files = given or (TokenizerFiles.of_path(folder) if (folder / TOKENIZER_NAME).is_file() else None)
    named = {} if files is None else files.named_ids
    if kind == "llada":
        description = read_config(config)
    else:
        description = (hugging_face.read_llada if kind == "hf-llada" else hugging_face.read_llama)(config, named)
    stored = read_folder(folder)
    head = layout.names(description.shape.n_layers)["head.weight"]
    tied = kind != "llada" and hugging_face.is_tied(config, has_head=head in stored)
    weights = weights_of(stored, layout, _on_meta(description, config.path), str(folder), tied)
    if head in stored and kind != "llada" and hugging_face.is_tied(config, has_head=False):
        _note_two_heads(stored[head], weights, folder, tied)
    auto_map = config.get("auto_map")
    code = auto_map if isinstance(auto_map, dict) else {}
    files = None if files is None else fitted_tokenizer(files, description, given=given is not None)
    return StoredModel(folder, kind, description, weights, files, code)


def _note_two_heads(head: StoredTensor, weights: dict[str, StoredTensor], folder: Path, tied: bool) -> None:
    """Prints which output head counts where ``config.json`` ties it and a head other than the embedding is stored."""
    if head.shape == weights["embedding.weight"].shape and torch.equal(head.read(), weights["embedding.weight"].read()):
        return
    counts = "the embedding is the head, as in the released code" if tied else "the stored head counts"
    warn(
        f"note: '{folder}': {CONFIG_NAME} ties the output head to the embedding, and the weights hold another head; "
        f"{counts}"
    )


def _on_meta(description: Description, where: Path) -> Transformer:
    try:
        with torch.device("meta"):
            return description.transformer()
    except (RuntimeError, TypeError) as error:
        raise UserError(f"'{where}': no memory could hold a model of these dimensions; correct them") from error


def fitted_tokenizer(
    files: TokenizerFiles, description: Description, given: bool, known: bool = False
) -> TokenizerFiles:
    """Returns the tokenizer of a model, whose special tokens no text becomes.

    Args:
        files: The tokenizer with its files.
        description: The description of the model.
        given: Whether the user gave the tokenizer. That of the model's own folder may name another EOS (of a turn).
        known: Whether the fingerprint says that it is the tokenizer of the model.
    """
    fix = "give the model's own with --tokenizer"
    tokenizer, left_out = without_special_beyond(files.tokenizer, description.vocab_size)
    if not known and not set(description.end_token_ids) & set(files.candidates("eos_token")):
        tokenizer, left_out = files.tokenizer, []  # nothing says that it is the model's
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= description.vocab_size:
        raise UserError(
            f"tokenizer '{files.name}' has ids up to {largest}, the model only {description.vocab_size}; {fix}"
        )
    ids = {"eos_token": description.eos_token_id, "mask_token": description.mask_token_id}
    for key, token_id in ids.items():
        if token_id is None:
            continue
        title = {"eos_token": "EOS", "mask_token": "[MASK]"}[key]
        if tokenizer.id_to_token(token_id) is None:
            raise UserError(
                f"tokenizer '{files.name}' has {largest + 1} ids and no {token_id}, the model's {title}; {fix}"
            )
        alike = {token_id} if key == "mask_token" else set(description.end_token_ids)
        others = files.candidates(key)
        if (given or key == "mask_token") and others and not alike & set(others):
            raise UserError(f"tokenizer '{files.name}' has {title} as {others[0]}, the model as {token_id}; {fix}")
    if left_out:
        warn(
            f"note: tokenizer '{files.name}': {', '.join(left_out)} is left out, because the model has no embedding "
            f"for ids from {description.vocab_size} on; text is encoded as before"
        )
    special = [i for i in (*description.end_token_ids, description.mask_token_id) if i is not None]
    return replace(files, tokenizer=_with_special(tokenizer, special))


def _with_special(tokenizer: Tokenizer, ids: list[int]) -> Tokenizer:
    added = tokenizer.get_added_tokens_decoder()
    plain = [i for i in ids if not (i in added and added[i].special)]
    tokens = tuple(token for token in map(tokenizer.id_to_token, plain) if token is not None)
    return as_special(tokenizer, tokens) if tokens else tokenizer
