"""Every back end gives SDPA's figures, or says in one line why it does not serve here."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer, attention, patterns
from llada_lightning.model.attention import BACKENDS, Backend, KeyValueCache, check_backend
from llada_lightning.support.errors import UserError

WORDS, LENGTH = 23, 150  # more than one block of flex_attention's
GROUPED = Shape(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
SHAPES = pytest.mark.parametrize("shape", [GROUPED, replace(GROUPED, n_kv_heads=4)], ids=["grouped", "multi-head"])
MODES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOKENS_BL = torch.randint(WORDS, (3, LENGTH), generator=torch.Generator().manual_seed(0))
DOCUMENTS_BL = (TOKENS_BL == 0).long().cumsum(dim=1)
RIGHT_BL = torch.arange(LENGTH) < torch.tensor([[LENGTH], [100], [7]])
PASSES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {"causal": False},
    "causal, padded on the left": {"causal": True, "attention_mask_BL": RIGHT_BL.flip(1)},
    "full, padded": {"causal": False, "attention_mask_BL": RIGHT_BL},
    "causal, documents": {"causal": True, "documents_BL": DOCUMENTS_BL},
    "full, documents, padded": {"causal": False, "documents_BL": DOCUMENTS_BL, "attention_mask_BL": RIGHT_BL},
    "block-causal": {"causal": False, "pattern": patterns.block_causal(32)},
}
EACH_PASS = pytest.mark.parametrize("settings", PASSES.values(), ids=PASSES)


def build(shape: Shape = GROUPED) -> Transformer:
    model = Transformer(shape, WORDS)
    model.initialise(torch.Generator().manual_seed(0))
    return model


def real(states_BLD: Tensor, settings: dict[str, Any]) -> Tensor:
    """The states of tokens that are not padding."""
    mask_BL = settings.get("attention_mask_BL")
    return states_BLD.flatten(0, 1) if mask_BL is None else states_BLD[mask_BL.to(states_BLD.device)]


def values_and_gradients(model: Transformer, backend: Backend, settings: dict[str, Any]) -> list[Tensor]:
    """The states of a pass, and the gradients of a function of them."""
    model.attend_with(backend)
    device = model.norm.weight.device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in settings.items()}
    states_ND = real(model.hidden(TOKENS_BL.to(device), **moved), moved).float()
    weights = [parameter for parameter in model.blocks.parameters() if parameter.requires_grad]
    return [states_ND.detach(), *torch.autograd.grad(states_ND.sin().sum(), weights)]


@SHAPES
@EACH_PASS
def test_flex_on_the_cpu_is_sdpa(shape: Shape, settings: dict[str, Any]) -> None:
    model = build(shape)
    with torch.no_grad():
        expected = real(model.hidden(TOKENS_BL, **settings), settings)
        model.attend_with("flex")
        found = real(model.hidden(TOKENS_BL, **settings), settings)
    assert not torch.equal(found, expected)  # another formula rounds in another way
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_flex_in_bf16_is_sdpa_but_for_rounding() -> None:
    model = build().bfloat16()
    with torch.no_grad():
        expected = model.hidden(TOKENS_BL, **PASSES["causal, documents"])
        model.attend_with("flex")
        torch.testing.assert_close(model.hidden(TOKENS_BL, **PASSES["causal, documents"]), expected, rtol=0.1, atol=0.1)


def test_flex_serves_a_generation_through_sdpa() -> None:
    """Passes with a cache, or for a part of the queries, have no square pattern."""
    model = build()
    with torch.no_grad():
        whole_BLD = model.hidden(TOKENS_BL, causal=True)
        full_BLD = model.hidden(TOKENS_BL, causal=False, attention_mask_BL=RIGHT_BL)
        model.attend_with("flex")
        cache = KeyValueCache(LENGTH)
        model.hidden(TOKENS_BL[:, :-1], causal=True, cache=cache)
        cache.advance(LENGTH - 1)
        last_BD = model.hidden(TOKENS_BL[:, -1:], causal=True, cache=cache)[:, 0]
        part_BKD = model.hidden(TOKENS_BL, causal=False, attention_mask_BL=RIGHT_BL, queries=slice(3, 6))
    torch.testing.assert_close(last_BD, whole_BLD[:, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part_BKD, full_BLD[:, 3:6], rtol=1e-4, atol=1e-5)


@SHAPES
@MODES
def test_packed_documents_are_as_each_alone(shape: Shape, causal: bool) -> None:
    """Logits and gradients; positions that run on change nothing."""
    model, tokens_1L = build(shape), TOKENS_BL[:1, :40]
    documents_1L = (torch.arange(40) >= torch.tensor([[9], [10], [31]])).long().sum(dim=0)[None]
    packed_LV = model(tokens_1L, causal=causal, documents_BL=documents_1L)[0]
    alone_LV = torch.cat([model(tokens_1L[:, documents_1L[0] == d], causal=causal)[0] for d in range(4)])
    torch.testing.assert_close(packed_LV, alone_LV, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed_LV, model(tokens_1L, causal=causal)[0], atol=1e-2)
    found, expected = (torch.autograd.grad(x.sin().sum(), list(model.parameters())) for x in (packed_LV, alone_LV))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_block_causal_lies_between_causal_and_full() -> None:
    model, tokens_BL = build(), TOKENS_BL[:, :24]
    by_blocks_BLD = model.hidden(tokens_BL, causal=False, pattern=patterns.block_causal(8))
    for end in (8, 16):
        earlier_BLD = model.hidden(tokens_BL[:, :end], causal=False, pattern=patterns.block_causal(8))
        torch.testing.assert_close(by_blocks_BLD[:, :end], earlier_BLD, rtol=1e-4, atol=1e-5)
    for block_length, causal in ((24, False), (1, True)):
        found = model.hidden(tokens_BL, causal=False, pattern=patterns.block_causal(block_length))
        torch.testing.assert_close(found, model.hidden(tokens_BL, causal=causal), rtol=1e-4, atol=1e-5)


def test_block_causal_with_a_cache_is_block_causal() -> None:
    model, tokens_BL, cache, parts = build(), TOKENS_BL[:, :24], KeyValueCache(24), []
    for begin in (0, 8, 16):
        piece_BL = tokens_BL[:, begin : begin + 8]
        parts.append(model.hidden(piece_BL, causal=False, pattern=patterns.block_causal(8), cache=cache))
        cache.advance(8)
    whole_BLD = model.hidden(tokens_BL, causal=False, pattern=patterns.block_causal(8))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BLD, rtol=1e-4, atol=1e-5)


def test_one_pass_of_block_diffusion_trains_every_block_behind_its_clean_context() -> None:
    """As BD3-LM generates: block i, noisy, behind the clean blocks before it."""
    model, clean_BL, noisy_BL = build(), TOKENS_BL[:, :24], TOKENS_BL[:, 24:48]
    positions_BL = torch.arange(24).repeat(3, 2)
    pattern = patterns.block_diffusion(24, 8)
    both_BL = torch.cat([noisy_BL, clean_BL], dim=1)
    states_BLD = model.hidden(both_BL, causal=False, pattern=pattern, positions_BL=positions_BL)
    for begin in (0, 8, 16):
        behind_BL = torch.cat([clean_BL[:, :begin], noisy_BL[:, begin : begin + 8]], dim=1)
        alone_BLD = model.hidden(behind_BL, causal=False, pattern=patterns.block_causal(8))
        torch.testing.assert_close(states_BLD[:, begin : begin + 8], alone_BLD[:, begin:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_compiled_block_is_one_graph_that_new_documents_do_not_compile_again(backend: Backend) -> None:
    model, counter = build(), CompileCounter()
    expected, found = [], []
    batches = [(torch.randint(WORDS, (3, LENGTH)) == 0).long().cumsum(dim=1) for _ in range(3)]
    with torch.no_grad():
        expected = [model.hidden(TOKENS_BL, causal=True, documents_BL=documents_BL) for documents_BL in batches]
        model.attend_with(backend)
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
        found = [model.hidden(TOKENS_BL, causal=True, documents_BL=documents_BL) for documents_BL in batches]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def reference_flash(q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, causal: bool = False) -> Tensor:
    """The formula in flash-attn's layout, heads behind positions, groups as they are; it takes equal lengths only."""
    batch, length, heads, dim = q_BLHD.shape
    assert k_BSKD.shape[:2] == (batch, length) and heads % k_BSKD.shape[2] == 0
    k_BSHD, v_BSHD = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k_BSKD, v_BSKD))
    scores_BHLS = torch.einsum("blhd,bshd->bhls", q_BLHD, k_BSHD) / math.sqrt(dim)
    if causal:
        scores_BHLS = scores_BHLS.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhls,bshd->blhd", scores_BHLS.softmax(dim=-1), v_BSHD)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A stand-in for the package; what it was asked: whether causal."""
    calls: list[bool] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        calls.append(causal)
        return reference_flash(q, k, v, causal=causal)

    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return calls


@SHAPES
@EACH_PASS
def test_flash_gets_its_layout_and_leaves_masks_to_sdpa(
    shape: Shape, settings: dict[str, Any], flash_attn: list[bool]
) -> None:
    model = build(shape)
    expected = values_and_gradients(model, "sdpa", settings)
    assert not flash_attn
    found = values_and_gradients(model, "flash", settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert flash_attn == ([settings["causal"]] * 2 if len(settings) == 1 else [])


def test_flash_is_tried_before_it_is_taken(flash_attn: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_unfit", lambda *_: None)  # as on a GPU that it fits
    before = torch.random.get_rng_state()
    line = check_backend("flash", CPU, True, 8, torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert line.startswith("flash (flash-attn") and line.endswith("with a mask sdpa's flash kernel)")
    assert flash_attn == [True]
    package: Any = sys.modules["flash_attn"]
    package.flash_attn_func = lambda q, k, v, causal: reference_flash(q, k, v)
    with pytest.raises(UserError, match=r"flash given, but its results differ from sdpa's; use sdpa$"):
        check_backend("flash", CPU, True, 8, torch.bfloat16)
    package.flash_attn_func = lambda q, k, v, causal: q.no_such_method()
    with pytest.raises(
        UserError, match=r"but it fails on this device \('Tensor' object has no attribute .*\); use sdpa$"
    ):
        check_backend("flash", CPU, False, 8, torch.bfloat16)


def test_no_back_end_changes_a_checkpoint() -> None:
    model = build()
    keys = list(model.state_dict())
    for backend in BACKENDS:
        model.attend_with(backend)
        assert list(model.state_dict()) == keys


def test_what_serves_on_the_cpu() -> None:
    assert check_backend("sdpa", CPU, True, 64, torch.float32) == "sdpa (flash kernel)"
    assert check_backend("flex", CPU, False, 8, torch.float32) == "flex (torch's plain formula)"


def test_what_torch_chooses_is_asked_for() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        assert check_backend("sdpa", CPU, True, 64, torch.float32) == "sdpa (plain kernel)"


REFUSALS = {
    "an unknown name": ("triton", CPU, {}, "use one of sdpa, flash, flex"),
    "flash on the cpu": ("flash", CPU, {}, "it needs a CUDA device, and this is cpu; use sdpa"),
    "flash on a Mac": ("flash", torch.device("mps"), {}, "it needs a CUDA device, and this is mps; use sdpa"),
    "flex on a Mac": ("flex", torch.device("mps"), {}, "it needs a CUDA device, and this is mps; use sdpa"),
    "flex in training on the cpu": ("flex", CPU, {}, "torch has no gradients of it on the CPU; use sdpa"),
    "no device": ("flash", CUDA, {"there": False}, "finds no CUDA device here; use sdpa"),
    "an old GPU": ("flash", CUDA, {"capability": (7, 5)}, "it needs compute capability 8.0, and this GPU has 7.5"),
    "fp32": (
        "flash",
        CUDA,
        {"dtype": torch.float32},
        "it computes bf16 or fp16, not float32; use --trainer.pre",
    ),
    "no flash-attn": ("flash", CUDA, {}, "its package does not load (import of flash_attn halted"),
    "small heads": ("flex", CUDA, {"head_dim": 8, "triton": True}, "it needs heads of 16 dimensions, and these have 8"),
    "no triton": ("flex", CUDA, {"triton": False}, "triton is not installed; pip install triton, or use sdpa"),
}


@pytest.mark.parametrize(("name", "device", "machine", "expected"), REFUSALS.values(), ids=REFUSALS)
def test_what_does_not_serve_is_refused_in_one_line(
    name: str, device: torch.device, machine: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.get("there", True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: machine.get("capability", (9, 0)))
    monkeypatch.setattr(attention, "find_spec", lambda package: machine.get("triton") or None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it fails
    with pytest.raises(UserError) as error:
        check_backend(name, device, True, machine.get("head_dim", 64), machine.get("dtype", torch.bfloat16))
    line = str(error.value)
    assert line.startswith(f"speed.attention: {name} given") and expected in line and "\n" not in line


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@EACH_PASS
def test_every_back_end_of_this_gpu_is_sdpa(backend: Backend, compiled: bool, settings: dict[str, Any]) -> None:
    """States and gradients of heads of 64: in bf16 as near to SDPA's in fp32 as SDPA's own in bf16."""
    shape = Shape(n_layers=2, d_model=256, n_heads=4, n_kv_heads=2, d_ff=384)
    model = build(shape).cuda()
    try:
        check_backend(backend, CUDA, True, shape.head_dim, torch.bfloat16, grouped=True)
    except UserError as error:
        pytest.skip(str(error))
    exact = values_and_gradients(model, "sdpa", settings)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = values_and_gradients(model, "sdpa", settings)
        if compiled:
            for block in model.blocks:
                block.compile()
        found = values_and_gradients(model, backend, settings)
    for a, b, c in zip(found, rounded, exact, strict=True):
        assert (a.float() - c).norm() < 2 * (b.float() - c).norm() + 1e-3 * c.norm()
