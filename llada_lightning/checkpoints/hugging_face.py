"""``config.json`` of Hugging Face LLaDA and Llama, read and written: one table of names, one of refused values.

The meaning of an absent key follows the code that reads it: LLaDA's ``ModelConfig``, transformers' ``LlamaConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llada_lightning.checkpoints.description import (
    NO_TOKEN,
    ConfigFile,
    Description,
    excluded_token_id,
    extra_key,
    read_extra_key,
    read_generation_ends,
)
from llada_lightning.model.transformer import is_positive

_LLADA: dict[str, Any] = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "scale_logits": False,
    "block_group_size": 1,
}
"""The values that make the released code our Transformer: written, and the only ones that are read."""
_LLADA_REQUIRED: dict[str, tuple[Any, ...]] = {
    "architectures": (None, ["LLaDAModelLM"]),
    **{key: (value,) for key, value in _LLADA.items()},
    **dict.fromkeys(("rope_scaling", "clip_qkv", "quantization_config"), (None,)),
}
_LLADA_ABSENT = {"activation_type": "swiglu", "layer_norm_type": "default", "rope": False}
_LLADA_WRITTEN: dict[str, Any] = {
    **_LLADA,
    "mlp_ratio": 4,
    "rope_full_precision": True,
    "flash_attention": False,
    "attention_dropout": 0.0,
    "multi_query_attention": None,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "attention_layer_norm_with_affine": True,
    "weight_tying": False,
    "init_device": "cpu",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
}
"""Every other key that the released code reads."""
LLADA_CODE = {
    "AutoConfig": "configuration_llada.LLaDAConfig",
    "AutoModel": "modeling_llada.LLaDAModelLM",
    "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
}
"""``auto_map`` of the published folders: where transformers finds the authors' classes, in files of the same folder."""
_LLADA_PRECISION = {"float32": "float32", "bfloat16": "amp_bf16", "float16": "amp_fp16"}


def read_llada(config: ConfigFile, named: Mapping[str, int]) -> Description:
    """The description of a Hugging Face LLaDA folder, which must be our Transformer.

    Args:
        config: The ``config.json`` of the model.
        named: The ids of ``mask_token`` and ``eos_token`` by its tokenizer, for a ``config.json`` without them.
    """
    config.refuse(_LLADA_REQUIRED, _LLADA_ABSENT)
    d_model, n_heads = config.whole("d_model"), config.whole("n_heads")
    _refuse_head_dim(config, d_model, n_heads)
    vocab_size = config.whole("embedding_size", absent=config.whole("vocab_size"))
    extra = read_extra_key(config) or {"compat": "llada"}
    mask_token_id = config.get("mask_token_id", NO_TOKEN)
    return Description.of(
        config.path,
        {
            "n_layers": config.whole("n_layers"),
            "d_model": d_model,
            "n_heads": n_heads,
            "n_kv_heads": _llada_kv_heads(config, n_heads),
            "d_ff": config.whole("mlp_hidden_size", absent=_llada_d_ff(config, d_model)),
        },
        objective="llada",
        vocab_size=vocab_size,
        context_length=config.whole("max_sequence_length", absent=1024),
        rope_theta=config.get("rope_theta", 10_000.0),
        norm_eps=config.number("rms_norm_eps", absent=1e-5),
        **_ids(config, named, vocab_size),
        **{**extra, "mask_token_id": named.get("mask_token") if mask_token_id == NO_TOKEN else mask_token_id},
    )


def _llada_d_ff(config: ConfigFile, d_model: int) -> int:
    ratio = config.get("mlp_ratio", 4)
    if not is_positive(ratio) or not is_positive(width := ratio * d_model):
        raise config.mistake("mlp_ratio", "it must be a number such as 4")
    return round(width)


def _llada_kv_heads(config: ConfigFile, n_heads: int) -> int:
    """The key-value heads; ``multi_query_attention`` and ``n_kv_heads`` must agree, as in the released code."""
    multi_query = config.get("multi_query_attention")
    if multi_query is None:
        return config.whole("n_kv_heads", absent=n_heads)
    by_flag = 1 if multi_query else n_heads
    if config.whole("n_kv_heads", absent=by_flag) != by_flag:
        raise config.mistake("n_kv_heads", f"but multi_query_attention means {by_flag}; correct one of them")
    return by_flag


def write_llada(description: Description, dtype: str) -> dict[str, Any]:
    """``config.json`` of the GSAI-ML/LLaDA-8B layout: every key that the released code reads."""
    shape = description.shape
    return {
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "n_layers": shape.n_layers,
        "mlp_hidden_size": shape.d_ff,
        **_LLADA_WRITTEN,
        "rms_norm_eps": description.norm_eps,
        "max_sequence_length": description.context_length,
        "rope_theta": description.rope_theta,
        "vocab_size": description.vocab_size,
        "embedding_size": description.vocab_size,
        "eos_token_id": _one_or_list(description.end_token_ids),
        "pad_token_id": description.eos_token_id if description.pad_token_id is None else description.pad_token_id,
        "mask_token_id": description.mask_token_id,
        "precision": _LLADA_PRECISION.get(dtype, "float32"),
        "torch_dtype": dtype,
        "auto_map": LLADA_CODE,
        **({} if description.bos_token_id is None else {"bos_token_id": description.bos_token_id}),
        **extra_key(description),
    }


_LLAMA_REQUIRED: dict[str, tuple[Any, ...]] = {
    "architectures": (None, ["LlamaForCausalLM"]),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}


def read_llama(config: ConfigFile, named: Mapping[str, int]) -> Description:
    """The description of a Hugging Face Llama folder; arguments as of :func:`read_llada`."""
    config.refuse(_LLAMA_REQUIRED, {})
    d_model, n_heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    _refuse_head_dim(config, d_model, n_heads)
    vocab_size = config.whole("vocab_size")
    extra = read_extra_key(config) or {"mask_token_id": None}
    return Description.of(
        config.path,
        {
            "n_layers": config.whole("num_hidden_layers"),
            "d_model": d_model,
            "n_heads": n_heads,
            "n_kv_heads": config.whole("num_key_value_heads", absent=n_heads),
            "d_ff": config.whole("intermediate_size"),
        },
        objective="arm",
        vocab_size=vocab_size,
        context_length=config.whole("max_position_embeddings", absent=2048),
        rope_theta=_llama_rope_theta(config),
        norm_eps=config.number("rms_norm_eps", absent=1e-6),
        **_ids(config, named, vocab_size),
        **extra,
    )


def _llama_rope_theta(config: ConfigFile) -> Any:
    """The base by ``rope_parameters`` (transformers 5), else by ``rope_theta`` beside ``rope_scaling`` (before)."""
    for key in ("rope_parameters", "rope_scaling"):
        values = config.get(key)
        if values is None:
            continue
        kind = values.get("rope_type", values.get("type", "default")) if isinstance(values, dict) else None
        if kind != "default" or values.get("partial_rotary_factor", 1.0) != 1.0:
            raise config.mistake(key, "only the default rotary embedding is supported")
        if "rope_theta" in values:
            return values["rope_theta"]
    return config.get("rope_theta", 10_000.0)


def write_llama(description: Description, dtype: str) -> dict[str, Any]:
    """``config.json`` of transformers' Llama, for its versions 4 and 5."""
    shape = description.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.d_model,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": shape.n_layers,
        "intermediate_size": shape.d_ff,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": description.norm_eps,
        "rope_theta": description.rope_theta,
        "rope_parameters": {"rope_theta": description.rope_theta, "rope_type": "default"},
        "max_position_embeddings": description.context_length,
        "vocab_size": description.vocab_size,
        "tie_word_embeddings": False,
        "bos_token_id": description.bos_token_id,
        "pad_token_id": description.pad_token_id,
        "eos_token_id": _one_or_list(description.end_token_ids),
        "torch_dtype": dtype,
        **extra_key(description),
    }


def llama_generation(description: Description) -> dict[str, Any] | None:
    """``generation_config.json`` of a Llama whose [MASK] is never drawn; None where there is nothing to keep out."""
    excluded = excluded_token_id(description.compat, description.mask_token_id)
    if excluded is None:
        return None
    return {
        **({} if description.bos_token_id is None else {"bos_token_id": description.bos_token_id}),
        "eos_token_id": _one_or_list(description.end_token_ids),
        "pad_token_id": description.eos_token_id if description.pad_token_id is None else description.pad_token_id,
        "suppress_tokens": [excluded],
    }


def is_tied(config: ConfigFile, has_head: bool) -> bool:
    """Whether the output head is the embedding: by ``config.json``, else by the weights.

    transformers does not tie a Llama's head that is stored and differs from the embedding, whatever ``config.json``
    holds. The released code of LLaDA has no head of its own where ``weight_tying`` is set, and leaves a stored one out.
    """
    if config.get("model_type") == "llama":
        return not has_head and bool(config.get("tie_word_embeddings", True))
    return bool(config.get("weight_tying", not has_head))


def _refuse_head_dim(config: ConfigFile, d_model: int, n_heads: int) -> None:
    if config.get("head_dim") is not None and config.whole("head_dim") * n_heads != d_model:
        raise config.mistake("head_dim", f"only d_model / n_heads = {d_model / n_heads:g} is supported")


def _ids(config: ConfigFile, named: Mapping[str, int], vocab_size: int) -> dict[str, Any]:
    """The ids of EOS, of every token that ends an answer, and of the tokens that other programs use."""
    ends = (*config.token_ids("eos_token_id"), *read_generation_ends(config.path.parent, vocab_size))
    if not ends and "eos_token" not in named:
        raise config.mistake("eos_token_id", "write the id of the token that ends a text")
    return {
        "eos_token_id": ends[0] if ends else named["eos_token"],
        "end_token_ids": ends,
        **{key: config.told_id(key, vocab_size) for key in ("bos_token_id", "pad_token_id")},
    }


def _one_or_list(ids: tuple[int, ...]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)
