"""Grouped-query attention, and the back ends that compute it, by name.

- ``sdpa``: torch's ``scaled_dot_product_attention``, which picks a kernel by itself. On Hopper and Blackwell this is
  cuDNN's kernel from torch 2.13 on.
- ``flash``: the package flash-attn 2 (Dao 2023). It takes no masks. Its layout, its values and its gradients are tested
  against a stand-in; the package itself has not been seen to run yet.
- ``flex``: torch's ``flex_attention``, compiled: it skips the blocks of keys that a pattern forbids.

What a back end does not serve goes through SDPA: for ``flash`` every pass with a mask (padding, a pattern), for all of
them passes with a cache or for a part of the queries. A kernel takes q (B, H, L, D), k and v (B, K, S, D), where K
divides H, whether attention is causal, and a mask; it returns (B, H, L, D).

SDPA on CUDA makes a boolean mask additive in the queries' type, in each call, and its own flash kernel takes none: a
masked pass costs memory and time that ``flex`` saves.

Here, too: rotary position embedding (Su et al. 2021), half-split as in Llama and LLaDA and computed in fp32, and the
cache of keys and values of positions that need not be computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llada_lightning.compute.shapes import Shape
from llada_lightning.support.errors import UserError
from llada_lightning.support.torch_internals import sdpa_backend

Backend = Literal["sdpa", "flash", "flex"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Mask = Tensor | BlockMask | None
Kernel = Callable[[Tensor, Tensor, Tensor, bool, Mask], Tensor]
ALL = slice(None)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask) -> Tensor:
    """Through torch's ``scaled_dot_product_attention``; the mask is dense."""
    assert not isinstance(mask, BlockMask)
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None:
        # On CUDA, before torch 2.13, no kernel but the plain one takes groups and a mask together, and that one keeps
        # all L x L scores.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    # SDPA takes a mask or is_causal, not both: a mask already holds the causal part.
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped
    )


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask) -> Tensor:
    """Through flash-attn, which keeps heads behind positions and takes groups as they are; masks through SDPA."""
    if mask is not None:
        return sdpa(q, k, v, causal, mask)
    from flash_attn import flash_attn_func

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal).transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask) -> Tensor:
    """Through ``flex_attention``; a block-sparse mask holds the causal part, a dense one goes through SDPA.

    On CUDA it is compiled, once a process: by itself, or within what is being compiled around it. On the CPU it is
    torch's plain formula, which has no gradients.
    """
    if isinstance(mask, Tensor):
        return sdpa(q, k, v, causal, mask)
    assert mask is not None or not causal
    attend: Any = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        attend = _compiled_flex_attention()
    return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


KERNELS: dict[Backend, Kernel] = {"sdpa": sdpa, "flash": flash, "flex": flex}


class Attention(nn.Module):
    """Grouped-query attention.

    Args:
        shape: The dimensions.
        layer: The number of the block.
        qk_norm_eps: The number added within the root of an RMSNorm, with a gain, over the dimensions of each query and
            of each key before they are rotated (Dehghani et al. 2023, arXiv:2302.05442); None: there is none.

    Attributes:
        kernel: The kernel of the back end; ``Transformer.attend_with`` sets it.
    """

    def __init__(self, shape: Shape, layer: int, qk_norm_eps: float | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = shape.head_dim
        kv_width = shape.n_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.k_proj = nn.Linear(shape.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.d_model, kv_width, bias=False)
        self.out_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm, self.k_norm = (nn.RMSNorm(shape.head_dim, eps=qk_norm_eps) for _ in range(2))
        self.kernel: Kernel = sdpa

    def forward(
        self,
        x_BLD: Tensor,
        rope: tuple[Tensor, Tensor],
        causal: bool,
        mask: Mask,
        cache: KeyValueCache | None = None,
        queries: slice = ALL,
        rows_M: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) of the positions that ``queries`` are, or (M, D) of the rows of the flattened (B L)."""
        k, v = (self._heads(projection(x_BLD)) for projection in (self.k_proj, self.v_proj))
        # Not cut where nothing is: torch 2.9 cannot cut what tensor parallelism hands over.
        q = self._heads(self.q_proj(x_BLD if queries == ALL else x_BLD[:, queries]))
        q, k = _normed(q, self.q_norm), _normed(k, self.k_norm)
        q, k = apply_rope(q, *(table[..., queries, :] for table in rope)), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        kernel = self.kernel if isinstance(mask, BlockMask) or (cache is None and queries == ALL) else sdpa
        x_BLD = kernel(q, k, v, causal, mask).transpose(1, 2).flatten(2)
        return self.out_proj(x_BLD if rows_M is None else x_BLD.flatten(0, 1).index_select(0, rows_M))

    def _heads(self, x_BLE: Tensor) -> Tensor:
        return x_BLE.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _normed(x_BHLD: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """In fp32; the result has the input's type."""
    return x_BHLD if norm is None else norm(x_BHLD.float()).to(x_BHLD.dtype)


def check_backend(
    name: str, device: torch.device, training: bool, head_dim: int, dtype: torch.dtype, grouped: bool = False
) -> str:
    """What a back end is on this device, for people: `sdpa (flash kernel, with a mask memory-efficient kernel)`.

    Torch's choice is asked for; `flash` is tried on a small input.

    Args:
        name: The name that the user gave.
        device: The device of the model.
        training: Whether gradients are wanted.
        head_dim: The number of dimensions of a head.
        dtype: The type of queries, keys and values: bf16 under `bf16-mixed`.
        grouped: Whether several query heads share keys and values.

    Raises:
        UserError: There is no such back end, it is not installed, or it does not fit.
    """
    if name not in BACKENDS:
        raise UserError(f"speed.attention: {name} given; use one of {', '.join(BACKENDS)}")
    name = cast(Backend, name)
    unfit = _unfit(name, device, training, head_dim, dtype)
    if unfit is not None:
        raise UserError(f"speed.attention: {name} given, but {unfit}")
    if name == "flex":
        return "flex (compiled, block-sparse)" if device.type == "cuda" else "flex (torch's plain formula)"
    plain, masked = (sdpa_kernel(device, training, head_dim, dtype, grouped, masked) for masked in (False, True))
    if name == "sdpa":
        return f"sdpa ({plain} kernel)" if plain == masked else f"sdpa ({plain} kernel, with a mask {masked} kernel)"
    failure = _try_flash(device, training, head_dim, dtype)
    if failure is not None:
        raise UserError(f"speed.attention: {name} given, but {failure}; use sdpa")
    return f"flash ({_flash_version()}, with a mask sdpa's {masked} kernel)"


def sdpa_kernel(
    device: torch.device, training: bool, head_dim: int, dtype: torch.dtype, grouped: bool, masked: bool
) -> str:
    """The kernel that torch's SDPA picks: flash, memory-efficient, cuDNN, plain (all scores in memory), or unknown."""
    q = torch.zeros(1, 2, 128, head_dim, device=device, dtype=dtype, requires_grad=training)
    k = q[:, :1] if grouped and not masked else q  # with a mask, ``sdpa`` repeats them
    mask = torch.ones(1, 1, 1, 128, dtype=torch.bool, device=device) if masked else None
    backend = sdpa_backend(q, k, k, mask, grouped=k is not q)
    return "unknown" if backend is None else _KERNEL_NAMES.get(backend.name, backend.name.lower())


_KERNEL_NAMES = {
    "MATH": "plain",
    "FLASH_ATTENTION": "flash",
    "EFFICIENT_ATTENTION": "memory-efficient",
    "CUDNN_ATTENTION": "cuDNN",
}

_LEAST_CAPABILITY = {"flash": (8, 0), "flex": (7, 0)}
"""The least compute capability of a GPU: 7.0 is Volta (V100), 8.0 Ampere (A100)."""


def _unfit(name: Backend, device: torch.device, training: bool, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why a back end does not serve here, with the fix; None: nothing speaks against it."""
    if name == "sdpa" or (name == "flex" and device.type == "cpu" and not training):
        return None
    if name == "flex" and device.type == "cpu":
        return "torch has no gradients of it on the CPU; use sdpa"
    if device.type != "cuda":
        return f"it needs a CUDA device, and this is {device.type}; use sdpa"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here; use sdpa"
    capability, least = torch.cuda.get_device_capability(device), _LEAST_CAPABILITY[name]
    if capability < least:
        return "it needs compute capability {}.{}, and this GPU has {}.{}; use sdpa".format(*least, *capability)
    if name == "flex":
        if find_spec("triton") is None:
            return "triton is not installed; pip install triton, or use sdpa"
        return f"it needs heads of 16 dimensions, and these have {head_dim}; use sdpa" if head_dim < 16 else None
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bf16 or fp16, not {str(dtype)[6:]}; use --trainer.precision=bf16-mixed, or sdpa"
    try:
        from flash_attn import flash_attn_func  # noqa: F401
    except (ImportError, RuntimeError) as error:
        fix = "pip install flash-attn --no-build-isolation, or use sdpa"
        return f"its package does not load ({_first_line(error)}); {fix}"
    return None


def _try_flash(device: torch.device, training: bool, head_dim: int, dtype: torch.dtype) -> str | None:
    """What goes wrong on a small causal input, values and gradients compared with SDPA's; None: nothing."""
    # A generator of its own: the run's noise must not move.
    qkv = torch.randn(3, 1, 2, 128, head_dim, device=device, generator=torch.Generator(device).manual_seed(0))
    expected = _results(sdpa, qkv.to(dtype), training)
    try:
        found = _results(flash, qkv.to(dtype), training)
    except Exception as error:  # the package refuses in ways of its own
        return f"it fails on this device ({_first_line(error)})"
    if all(torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05) for a, b in zip(found, expected, strict=True)):
        return None
    return "its results differ from sdpa's"


def _results(kernel: Kernel, qkv: Tensor, training: bool) -> list[Tensor]:
    with torch.set_grad_enabled(training):
        qkv.requires_grad_(training)
        q, k, v = qkv.unbind()
        out = kernel(q, k, v, True, None)
    return [out, *torch.autograd.grad(out.float().square().sum(), qkv)] if training else [out]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _flash_version() -> str:
    try:
        return f"flash-attn {version('flash-attn')}"
    except PackageNotFoundError:
        return "flash-attn"


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions 0..length-1: each (length, head_dim) float32."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x_BHLD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Rotate queries or keys by their positions, in fp32; the result has the input's type."""
    x = x_BHLD.float()
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x * cos_LD + rotated * sin_LD).to(x_BHLD.dtype)


class KeyValueCache:
    """Rotated keys and values of each block, by position.

    A forward pass writes those of its tokens from ``position`` on, over what stood there, and attends to all that are
    held. So one class serves three ways: `arm` writes one token behind the others and moves on; a `llada` block with
    a prefix cache writes itself and all that follows, again and again; with a dual cache only itself.

    Args:
        capacity: The number of positions that fit into it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.position = 0
        self.held = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def keys_after(self, length: int) -> int:
        """Keys that are held once ``length`` tokens have been written at ``position``."""
        assert self.position + length <= self.capacity
        return max(self.held, self.position + length)

    def update(self, layer: int, k_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one block's keys and values; returns all that are held, each (B, H, S, D)."""
        end = self.position + k_BHLD.shape[2]
        if layer not in self._layers:
            batch, heads, _, dim = k_BHLD.shape
            self._layers[layer] = (
                k_BHLD.new_empty(batch, heads, self.capacity, dim),
                v_BHLD.new_empty(batch, heads, self.capacity, dim),
            )
        keys, values = self._layers[layer]
        keys[:, :, self.position : end] = k_BHLD
        values[:, :, self.position : end] = v_BHLD
        held = max(self.held, end)
        return keys[:, :, :held], values[:, :, :held]

    def advance(self, length: int) -> None:
        """Keep the tokens of the last pass; the next ones follow them."""
        self.position += length
        self.held = max(self.held, self.position)

    def keep_rows(self, rows_R: Tensor) -> None:
        """Goes on with some rows of the batch."""
        self._layers = {
            layer: (torch.index_select(keys, 0, rows_R), torch.index_select(values, 0, rows_R))
            for layer, (keys, values) in self._layers.items()
        }
