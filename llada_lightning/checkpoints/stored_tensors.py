"""Tensors that lie in a file: their shapes are known, and each is read when it is wanted.

The names that each layout gives to the weights of our Transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from math import prod

import torch
from torch import Tensor

from llada_lightning.model import Transformer
from llada_lightning.support.errors import UserError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The types that weights are stored in, by torch's names."""


_COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into the names of a model's weights."""


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
        UserError: tensors are missing, are too many, have another shape, or hold other than floating-point numbers.
    """
    names = layout.names(len(model.blocks))
    wanted = {ours: tuple(weight.shape) for ours, weight in model.state_dict().items()}
    assert names.keys() == wanted.keys()
    head = names["head.weight"]
    if tied:
        names["head.weight"] = names["embedding.weight"]
    found = {name for name in stored if not name.endswith(layout.ignored or ("\0",))}
    missing, extra = set(names.values()) - found, found - set(names.values()) - ({head} if tied else set())
    fix = "config.json and weights do not belong together, or the copy is incomplete"
    if missing and (wrapped := _wrapped(found, set(names.values()))) is not None:
        raise UserError(f"'{where}' as {layout.title}: {wrapped}")
    if missing or extra:
        both = [f"{len(missing)} missing: {_some(missing)}"] * bool(missing)
        both += [f"{len(extra)} too many: {_some(extra)}"] * bool(extra)
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


def common_dtype(weights: Iterable[StoredTensor]) -> torch.dtype:
    """The smallest type that holds all of them without rounding; theirs, where they have the same."""
    return reduce(torch.promote_types, (weight.dtype for weight in weights))


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type of a name; None stays None.

    Raises:
        UserError: there is no such type for weights.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"dtype: '{dtype}' is not known; choose from {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """torch's name of a type: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _wrapped(found: set[str], wanted: set[str]) -> str | None:
    """What a model was wrapped in when it was saved, by the names of its tensors; None: nothing that is known.

    Either all names share a prefix, or ``torch.compile`` left its own within them.
    """
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


def _some(names: set[str], most: int = 4) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f", and {len(listed) - most} more" if len(listed) > most else "")


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names its weights.

    Args:
        title: The name of the layout, for messages.
        whole_model: The map from our names to theirs, without `.weight`, of the weights outside the blocks.
        block: The map from our names to theirs, without `.weight`, of the weights within a block.
        blocks: The part of a name before a block's number.
        ignored: The ends of names that hold no weights, such as tables that follow from the configuration.
    """

    title: str
    whole_model: dict[str, str]
    block: dict[str, str]
    blocks: str
    ignored: tuple[str, ...] = field(default=())

    def names(self, n_layers: int) -> dict[str, str]:
        """Our name -> theirs of each weight of a model, in the model's order."""
        embedding, *last = self.whole_model.items()
        blocks = [
            (f"blocks.{i}.{ours}", f"{self.blocks}.{i}.{theirs}")
            for i in range(n_layers)
            for ours, theirs in self.block.items()
        ]
        return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in [embedding, *blocks, *last]}


_WHOLE_MODEL = ("embedding", "norm", "head")
_BLOCK = (
    "attention_norm",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.out_proj",
    "feed_forward_norm",
    "feed_forward.gate_proj",
    "feed_forward.up_proj",
    "feed_forward.down_proj",
)

OURS = Layout("llada-lightning", {name: name for name in _WHOLE_MODEL}, {name: name for name in _BLOCK}, "blocks")

TRAINING = Layout(
    "training checkpoint",
    {name: f"model.{name}" for name in _WHOLE_MODEL},
    {name: name for name in _BLOCK},
    "model.blocks",
)

HF_LLADA = Layout(
    "Hugging Face LLaDA",
    {
        "embedding": "model.transformer.wte",
        "norm": "model.transformer.ln_f",
        "head": "model.transformer.ff_out",
    },
    {
        "attention_norm": "attn_norm",
        "attention.q_proj": "q_proj",
        "attention.k_proj": "k_proj",
        "attention.v_proj": "v_proj",
        "attention.out_proj": "attn_out",
        "feed_forward_norm": "ff_norm",
        "feed_forward.gate_proj": "ff_proj",  # theirs: ff_out(silu(ff_proj(x)) * up_proj(x))
        "feed_forward.up_proj": "up_proj",
        "feed_forward.down_proj": "ff_out",
    },
    "model.transformer.blocks",
)

HF_LLAMA = Layout(
    "Hugging Face Llama",
    {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    {
        "attention_norm": "input_layernorm",
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.out_proj": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate_proj": "mlp.gate_proj",
        "feed_forward.up_proj": "mlp.up_proj",
        "feed_forward.down_proj": "mlp.down_proj",
    },
    "model.layers",
    ignored=("rotary_emb.inv_freq",),
)
