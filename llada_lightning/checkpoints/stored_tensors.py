"""Tensors in a file, read one at a time, and the names that each layout gives to the weights of our Transformer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llada_lightning.model import Transformer
from llada_lightning.support.errors import LibraryPanicError, UserError, panics_as_exceptions
from llada_lightning.support.reading import read_json

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The types of stored weights, by torch's names."""

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_USUAL = re.compile(r"(model(-\d+-of-\d+)?\.safetensors)|(pytorch_model(-\d+-of-\d+)?\.bin)")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "consolidated*.pth")
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_COMPILED = "_orig_mod."
"""The part that ``torch.compile`` puts into the names of a model's weights."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Args:
        shape: The dimensions of the tensor.
        dtype: The type in which it is stored.
        read: The function that returns it, on the CPU; as a view of the file where its format allows that, so not to be
            written to.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def elements(self) -> int:
        return prod(self.shape)


def of_tensor(tensor: Tensor) -> StoredTensor:
    """A tensor that is there already, such as a view of a file."""
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder of safetensors, by the names in its files; views of them: nothing is in memory yet."""
    if (folder / WEIGHTS_NAME).is_file():
        return _read_file(folder / WEIGHTS_NAME)
    if (folder / INDEX_NAME).is_file():
        return _read_shards(folder)
    raise UserError(f"'{folder}' {_instead_of_weights(folder)}")


def _read_file(path: Path) -> dict[str, StoredTensor]:
    try:
        with panics_as_exceptions():
            file = safe_open(str(path), framework="pt")
            return {name: _stored(file, name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, LibraryPanicError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' is damaged or half-written ({reason}); copy it again") from error


def _stored(file: safe_open, name: str) -> StoredTensor:
    view = file.get_slice(name)
    dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
    if dtype is None:  # refused by name when the weights are found to be such
        dtype = file.get_tensor(name).dtype
    return StoredTensor(tuple(view.get_shape()), dtype, partial(file.get_tensor, name))


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    index = read_json(folder / INDEX_NAME)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not places or not isinstance(places, dict) or any(Path(str(file)).name != file for file in places.values()):
        raise UserError(f"'{folder / INDEX_NAME}' names no files of its folder; copy the folder again")
    files = sorted(set(places.values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise UserError(
            f"'{folder}' lacks {absent[0]}, one of {len(absent)} missing of the {len(files)} files that its index "
            "names: it is half-written; copy it again"
        )
    return {name: tensor for file in files for name, tensor in _read_file(folder / file).items()}


def weights_in(folder: Path) -> list[str]:
    """The names of the files in a folder that hold weights by their names, of whatever layout."""
    return sorted({path.name for pattern in ("*.safetensors", *_PICKLES) for path in folder.glob(pattern)})


def is_usual(name: str) -> bool:
    """Whether a file of weights is named as transformers names a whole model's, in one file or in shards."""
    return _USUAL.fullmatch(name) is not None


def _instead_of_weights(folder: Path) -> str:
    """The contents of a folder without readable weights, and the advice for it."""
    names = weights_in(folder)
    shown = _some(names)
    others = [name for name in names if name.endswith(".safetensors")]
    if any(is_usual(name) for name in others):
        return f"holds {shown} and no {INDEX_NAME}: it is half-written; copy it again"
    if others and all(name.startswith("consolidated") for name in others):
        return f"holds no {WEIGHTS_NAME}, but {shown}, which is its authors' layout; take the model in transformers'"
    if others:
        return (
            f"holds no {WEIGHTS_NAME}, but {shown}; if that is the whole model, such as in another precision, rename "
            f"it to {WEIGHTS_NAME}, or save it again without a variant"
        )
    if names:
        return (
            "holds its weights as pickles only, and to read one may run its code; save it as safetensors: "
            "save_pretrained(..., safe_serialization=True) where it comes from"
        )
    return f"holds no {WEIGHTS_NAME}: it is half-written; copy it again"


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter, such as LoRA's: it is no model, and a model beside it is another one with it."""
    names = [name for name in _ADAPTER if (folder / name).is_file()]
    if names:
        raise UserError(
            f"'{folder}' holds an adapter ({', '.join(names)}), which changes a model and is none by itself; merge it "
            "into its base model first (peft: merge_and_unload, then save_pretrained), or remove its files"
        )


def weights_of(
    stored: Mapping[str, StoredTensor], layout: Layout, model: Transformer, where: str, tied: bool = False
) -> dict[str, StoredTensor]:
    """The weights of a Transformer by our names, after all of them are found to be there and to fit.

    Reading one that holds NaN or infinite numbers raises UserError: a model with such weights would still sample.

    Args:
        stored: The stored tensors by the layout's names.
        layout: The layout of the names.
        model: The Transformer, on the meta device, whose weights they are.
        where: The place of the weights, for messages.
        tied: Whether the output head is the embedding; a head that is stored as well is left out.

    Raises:
        UserError: Tensors are missing, are too many, have another shape, or hold other than floating-point numbers.
    """
    names = layout.names(len(model.blocks), model.qk_norm)
    wanted = {ours: tuple(weight.shape) for ours, weight in model.state_dict().items()}
    assert names.keys() == wanted.keys()
    head = names["head.weight"]
    if tied:
        names["head.weight"] = names["embedding.weight"]
    theirs_all = set(names.values())
    found = {name for name in stored if not name.endswith(layout.ignored)}
    missing, extra = theirs_all - found, found - theirs_all - ({head} if tied else set())
    fix = "config.json and weights do not belong together, or the copy is incomplete"
    if missing and (wrapped := _wrapped(found, theirs_all)) is not None:
        raise UserError(f"'{where}' as {layout.title}: {wrapped}")
    if missing or extra:
        counted = {"missing": missing, "too many": extra}
        both = [f"{len(some)} {what}: {_some(sorted(some))}" for what, some in counted.items() if some]
        raise UserError(f"'{where}' as {layout.title}: tensors {'; '.join(both)}; {fix}")
    for ours, theirs in names.items():
        tensor = stored[theirs]
        if tensor.shape != wanted[ours]:
            raise UserError(f"'{where}': {theirs} has shape {list(tensor.shape)}, expected {list(wanted[ours])}; {fix}")
        if tensor.dtype not in DTYPES.values():
            raise UserError(
                f"'{where}': {theirs} is stored as {name_of(tensor.dtype)}; save it as {' or '.join(DTYPES)}"
            )
    weights = {ours: _finite(stored[theirs], f"'{where}': {theirs}") for ours, theirs in names.items()}
    if tied:
        embedding = weights["embedding.weight"]
        weights["head.weight"] = replace(embedding, read=lambda: embedding.read().clone())
    return weights


def _finite(tensor: StoredTensor, name: str) -> StoredTensor:
    def read() -> Tensor:
        values = tensor.read()
        least, most = values.aminmax()  # NaN where one is; without a copy of the tensor
        if not (least.isfinite() and most.isfinite()):
            raise UserError(f"{name} holds NaN or infinite numbers; take another checkpoint")
        return values

    return replace(tensor, read=read)


def _wrapped(found: set[str], wanted: set[str]) -> str | None:
    """The wrapper that a model was saved in: all names share a prefix, or hold that of ``torch.compile``."""
    if wanted <= {name.replace(_COMPILED, "") for name in found}:
        return (
            f"the names of its tensors hold '{_COMPILED}', which torch.compile puts there; save the model that was "
            "compiled, model._orig_mod"
        )
    last = max(wanted)
    for prefix in {name.removesuffix(last) for name in found if name.endswith(last)}:
        if {prefix + name for name in wanted} <= found:
            return f"the names of its tensors begin with '{prefix}'; save the model without what it was wrapped in"
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")


def common_dtype(weights: Iterable[StoredTensor]) -> torch.dtype:
    """The smallest type that holds all of them without rounding; theirs, where they have the same."""
    return reduce(torch.promote_types, (weight.dtype for weight in weights))


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type of a name, which must be one for weights; None stays None."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"dtype: '{dtype}' is not known; choose from {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """torch's name of a type: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


_WHOLE_MODEL = ("embedding", "norm", "head")
_BLOCK = (
    "attention_norm", "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj",
    "feed_forward_norm", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj",
)  # fmt: skip
_QK_NORM = ("attention.q_norm", "attention.k_norm")
"""Our names, without `.weight`, of the weights outside and within a block, and of those that few models have."""


@dataclass(frozen=True)
class Layout:
    """The names that a checkpoint gives to its weights.

    Args:
        title: The name of the layout, for messages.
        whole_model: Its names, without `.weight`, of the weights outside the blocks, in the order of ours.
        blocks: The part of a name before a block's number.
        block: Its names, without `.weight`, of the weights within a block, in the order of ours.
        qk_norm: Its names, without `.weight`, of the gains of queries and keys; None: its models have no such norm.
        ignored: The ends of names that hold no weights, such as tables that follow from the configuration.
    """

    title: str
    whole_model: tuple[str, ...]
    blocks: str
    block: tuple[str, ...]
    qk_norm: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()

    def names(self, n_layers: int, qk_norm: bool = False) -> dict[str, str]:
        """Our name -> theirs of each weight of a model."""
        assert not qk_norm or self.qk_norm is not None
        ours_of_block = (*_BLOCK, *(_QK_NORM if qk_norm else ()))
        theirs_of_block = (*self.block, *((qk_norm and self.qk_norm) or ()))
        embedding, *last = zip(_WHOLE_MODEL, self.whole_model, strict=True)
        blocks = [
            (f"blocks.{i}.{ours}", f"{self.blocks}.{i}.{theirs}")
            for i in range(n_layers)
            for ours, theirs in zip(ours_of_block, theirs_of_block, strict=True)
        ]
        return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in [embedding, *blocks, *last]}


OURS = Layout("llada-lightning", _WHOLE_MODEL, "blocks", _BLOCK, _QK_NORM)
TRAINING = Layout(
    "training checkpoint", tuple(f"model.{name}" for name in _WHOLE_MODEL), "model.blocks", _BLOCK, _QK_NORM
)
HF_LLADA = Layout(
    "Hugging Face LLaDA",
    ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out"),
    "model.transformer.blocks",
    # Their feed-forward part: ff_out(silu(ff_proj(x)) * up_proj(x)).
    ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"),
)
HF_LLAMA = Layout(
    "Hugging Face Llama",
    ("model.embed_tokens", "model.norm", "lm_head"),
    "model.layers",
    (
        "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ),
    ignored=("rotary_emb.inv_freq",),
)  # fmt: skip
