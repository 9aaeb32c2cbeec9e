"""The private names of torch that the package relies on, all in this file. Seen in torch 2.13."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

ATTENTION_PRODUCTS = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""The operators that ``scaled_dot_product_attention`` becomes."""


def sdpa_backend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, grouped: bool) -> SDPBackend | None:
    """The kernel that ``scaled_dot_product_attention`` chooses for its arguments; None where torch does not tell."""
    try:
        return SDPBackend(torch._fused_sdp_choice(q, k, v, attn_mask=mask, enable_gqa=grouped))
    except (AttributeError, NotImplementedError):  # not every device has it
        return None


def default_store() -> Any:
    """The key-value store of the process group that is initialized."""
    return torch.distributed.distributed_c10d._get_default_store()


def has_triton() -> bool:
    """Whether Triton is installed and knows this GPU."""
    from torch.utils._triton import has_triton

    return bool(has_triton())


def has_cpp_compiler() -> bool:
    """Whether there is a C++ compiler, without which nothing can be compiled for a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # of no documented kind: InvalidCxxCompiler, CalledProcessError, ...
        return False
    return True


def set_nested(container: dict[str, Any], path: Any, value: Any) -> None:
    """Set an element of nested mappings and lists, by a path from the metadata of a sharded checkpoint."""
    from torch.distributed.checkpoint._nested_dict import set_element

    set_element(container, path, value)


def index_names() -> dict[tuple[str, str], Any]:
    """What the pickled index of a sharded checkpoint refers to, by module and name."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return {
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    }
