"""The Transformer: counts, who sees whom, padding, precision, initialisation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llada_lightning.compute.shapes import PAPER_SHAPES, PAPER_VOCAB_SIZE, Shape, named_shapes
from llada_lightning.model import Transformer
from llada_lightning.model.attention import Attention
from llada_lightning.training.modules import ArmModule, LladaModule

WORDS = 23
GROUPED = Shape(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
MULTI_HEAD = replace(GROUPED, n_kv_heads=4)
SHAPES = pytest.mark.parametrize("shape", [GROUPED, MULTI_HEAD], ids=["grouped", "multi-head"])
MODES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


def build(shape: Shape = GROUPED, seed: int = 0, words: int = WORDS) -> Transformer:
    model = Transformer(shape, words)
    model.initialise(torch.Generator().manual_seed(seed))
    return model


def random_tokens(*size: int, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", named_shapes())
def test_parameters_are_as_many_as_the_shape_says(name: str) -> None:
    shape = named_shapes()[name]
    words = PAPER_VOCAB_SIZE if name in PAPER_SHAPES else 512
    with torch.device("meta"):
        model = Transformer(shape, words)
    total = sum(p.numel() for p in model.parameters())
    assert total == shape.params_total(words)
    assert total - model.embedding.weight.numel() - model.head.weight.numel() == shape.params_nonembedding


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 8), st.integers(1, 50))
def test_parameters_of_any_grouping(layers: int, kv_heads: int, group: int, half_head: int, d_ff: int) -> None:
    shape = Shape(layers, kv_heads * group * 2 * half_head, kv_heads * group, kv_heads, d_ff)
    with torch.device("meta"):
        model = Transformer(shape, WORDS)
    assert sum(p.numel() for p in model.parameters()) == shape.params_total(WORDS)
    assert all(not name.endswith("bias") for name, _ in model.named_parameters())


def influence(model: Transformer, tokens_BL: Tensor, causal: bool, attention_mask_BL: Tensor | None = None) -> Tensor:
    """(L, L): largest |d logits[i] / d embedding[j]| over batch, words and width."""
    leaves: list[Tensor] = []

    def make_leaf(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.embedding.register_forward_hook(make_leaf)
    logits_BLV = model(tokens_BL, causal=causal, attention_mask_BL=attention_mask_BL)
    handle.remove()
    logits_BLV = logits_BLV * torch.randn(WORDS, generator=torch.Generator().manual_seed(0))
    rows = [
        torch.autograd.grad(logits_BLV[:, i].sum(), leaves[0], retain_graph=True)[0] for i in range(tokens_BL.shape[1])
    ]
    return torch.stack([row_BLD.abs().amax(dim=(0, 2)) for row_BLD in rows])


@SHAPES
@pytest.mark.parametrize("masked", [False, True], ids=["is_causal", "as a mask"])
def test_causal_logits_depend_on_the_past_only(shape: Shape, masked: bool) -> None:
    tokens_BL = random_tokens(2, 9)
    attention_mask_BL = torch.ones(2, 9, dtype=torch.bool) if masked else None
    influence_LL = influence(build(shape), tokens_BL, True, attention_mask_BL)
    past_LL = torch.ones(9, 9, dtype=torch.bool).tril()
    assert (influence_LL[~past_LL] == 0).all()
    assert (influence_LL[past_LL] > 0).all()


@SHAPES
def test_full_logits_depend_on_everything(shape: Shape) -> None:
    assert (influence(build(shape), random_tokens(2, 9), causal=False) > 0).all()


def test_padding_influences_nothing() -> None:
    attention_mask_BL = torch.tensor([[True] * 6 + [False] * 3])
    influence_LL = influence(build(), random_tokens(1, 9), False, attention_mask_BL)
    assert (influence_LL[:6, 6:] == 0).all()
    assert (influence_LL[:6, :6] > 0).all()


@pytest.fixture(params=["arm", "llada"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    module = {"arm": ArmModule, "llada": LladaModule}[request.param](**MODULE_ARGUMENTS, seed=5)
    module.configure_model()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


MODULE_ARGUMENTS = {"shape": GROUPED.__dict__, "vocab_size": WORDS, "mask_token_id": WORDS - 1, "eos_token_id": 0}


@MODES
def test_both_modules_give_the_same_logits_from_one_checkpoint(checkpoint: Path, causal: bool) -> None:
    tokens_BL = random_tokens(3, 12)
    logits = []
    for module in (ArmModule(**MODULE_ARGUMENTS, seed=1), LladaModule(**MODULE_ARGUMENTS, seed=2)):
        module.configure_model()
        module.load_state_dict(torch.load(checkpoint)["state_dict"])
        logits.append(module.model(tokens_BL, causal=causal))
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], build(seed=1)(tokens_BL, causal=causal))


def test_the_head_gives_the_logits_of_any_selection() -> None:
    model, tokens_BL = build(), random_tokens(3, 12)
    chosen_BL = random_tokens(3, 12, seed=1) % 2 == 0
    hidden_BLD = model.hidden(tokens_BL, causal=False)
    torch.testing.assert_close(model.head(hidden_BLD[chosen_BL]), model(tokens_BL, causal=False)[chosen_BL])


@MODES
def test_grouped_queries_are_multi_head_with_repeated_keys_and_values(causal: bool) -> None:
    grouped, multi_head = build(GROUPED), build(MULTI_HEAD, seed=1)
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            heads = weights[name].unflatten(0, (GROUPED.n_kv_heads, GROUPED.head_dim))
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    multi_head.load_state_dict(weights)
    tokens_BL = random_tokens(2, 10)
    attention_mask_BL = torch.arange(10) < torch.tensor([[10], [7]])
    for mask in (None, attention_mask_BL):
        a, b = (model(tokens_BL, causal=causal, attention_mask_BL=mask) for model in (grouped, multi_head))
        torch.testing.assert_close(a, b)


@SHAPES
@MODES
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_leaves_logits_alone(shape: Shape, causal: bool, side: str, dtype: torch.dtype) -> None:
    lengths, width = (12, 7, 1), 12
    model = build(shape).to(dtype)
    sequences = [random_tokens(1, length, seed=length) for length in lengths]
    tokens_BL = random_tokens(len(lengths), width, seed=99)  # padding may be any token
    attention_mask_BL = torch.zeros(len(lengths), width, dtype=torch.bool)
    for b, sequence in enumerate(sequences):
        place = slice(width - lengths[b], None) if side == "left" else slice(lengths[b])
        tokens_BL[b, place], attention_mask_BL[b, place] = sequence[0], True
    logits_BLV = model(tokens_BL, causal=causal, attention_mask_BL=attention_mask_BL)
    assert logits_BLV.isfinite().all()
    for b, sequence in enumerate(sequences):
        alone_LV = model(sequence, causal=causal)[0]
        torch.testing.assert_close(logits_BLV[b, attention_mask_BL[b]], alone_LV, rtol=1e-4, atol=2e-5)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_gives_no_nan_to_values_or_gradients(causal: bool, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    attention_mask_BL = torch.arange(8) >= torch.tensor([[0], [7], [8]])  # the last row is padding throughout
    logits_BLV = model(random_tokens(3, 8), causal=causal, attention_mask_BL=attention_mask_BL)
    logits_BLV.float().square().mean().backward()
    assert logits_BLV.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_attention_is_the_formula() -> None:
    """Softmax of q k / sqrt(head dimension), head by head; positions all 0, so that nothing is rotated."""
    torch.manual_seed(0)
    attention, x_LD = Attention(GROUPED, layer=0).double(), torch.randn(6, 32, dtype=torch.float64)
    rope = (torch.ones(6, 8), torch.zeros(6, 8))
    q, k, v = (p(x_LD).unflatten(-1, (-1, 8)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = [(q[:, h] @ k[:, h // 2].T / math.sqrt(8)).softmax(-1) @ v[:, h // 2] for h in range(4)]
    expected = attention.out_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x_LD[None], rope, False, None)[0], expected, rtol=1e-5, atol=1e-6)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight.double()


@pytest.mark.parametrize("scale", [3e3, 1.0, 1e-3])  # at 1e-3 eps 1e-5 decides
def test_norms_are_fp32_inside(scale: float) -> None:
    model = build()
    norms = [module for module in model.modules() if isinstance(module, nn.RMSNorm)]
    assert len(norms) == 2 * GROUPED.n_layers + 1
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0)) * scale
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 2)
        torch.testing.assert_close(norm(x).double(), rms_norm(x, norm.weight), rtol=1e-5, atol=1e-7)
        half, x_half = norm.bfloat16(), x.bfloat16()
        # One rounding, at the end: half a unit in the last of bf16's 8 bits.
        torch.testing.assert_close(half(x_half).double(), rms_norm(x_half, half.weight), rtol=2**-8 * 1.001, atol=0)


def test_the_residual_stream_stays_fp32_under_mixed_precision() -> None:
    model, seen = build(), []
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_hook(lambda m, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        logits_BLV = model(random_tokens(2, 8), causal=False)
    assert seen == [(torch.float32, torch.float32)] * 5
    assert logits_BLV.dtype == torch.bfloat16
    torch.testing.assert_close(logits_BLV.float(), model(random_tokens(2, 8), causal=False), rtol=0.05, atol=0.05)


TRUNCATED = 0.98658  # standard deviation of a normal truncated at 3


def test_initial_weights_are_mitchells() -> None:
    """1/sqrt(fan-in); what writes to the residual stream of block i (from 1) is smaller by sqrt(2 i)."""
    shape = Shape(n_layers=3, d_model=128, n_heads=4, n_kv_heads=2, d_ff=320)
    model = build(shape, words=300)
    stated = {"embedding.weight": 1 / math.sqrt(128), "head.weight": 1 / math.sqrt(128)}
    for i in range(3):
        for name in ("attention.q_proj", "attention.k_proj", "attention.v_proj"):
            stated[f"blocks.{i}.{name}.weight"] = 1 / math.sqrt(128)
        for name in ("feed_forward.gate_proj", "feed_forward.up_proj"):
            stated[f"blocks.{i}.{name}.weight"] = 1 / math.sqrt(128)
        stated[f"blocks.{i}.attention.out_proj.weight"] = 1 / math.sqrt(128 * 2 * (i + 1))
        stated[f"blocks.{i}.feed_forward.down_proj.weight"] = 1 / math.sqrt(320 * 2 * (i + 1))
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
            continue
        std = stated.pop(name)
        assert weight.std().item() == pytest.approx(TRUNCATED * std, rel=4 / math.sqrt(2 * weight.numel())), name
        assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel()), name
        assert weight.abs().max() <= 3 * std
    assert not stated


def test_initial_weights_are_a_function_of_the_seed_and_not_of_the_objective() -> None:
    modules = [cls(**MODULE_ARGUMENTS, seed=seed) for cls, seed in ((ArmModule, 3), (LladaModule, 3), (LladaModule, 4))]
    for position, module in enumerate(modules):
        torch.manual_seed(position)  # the global generator has no say
        module.configure_model()
    first, same, other = (dict(module.model.named_parameters()) for module in modules)
    for name in first:
        assert torch.equal(first[name], same[name])
        assert first[name].ndim == 1 or not torch.equal(first[name], other[name])


def test_initial_predictions_are_near_uniform() -> None:
    model = build(replace(MULTI_HEAD, d_model=128, n_layers=4))
    logits_BLV = model(random_tokens(4, 32), causal=False)
    assert logits_BLV.std().item() == pytest.approx(1, rel=0.25)  # unit-variance states times 1/sqrt(d) weights


def test_normalised_queries_and_keys_change_no_initial_weight() -> None:
    """Gains are ones: nothing is drawn for them, and the other weights are drawn in the same order."""
    plain, normed = build(), Transformer(GROUPED, WORDS, qk_norm=True)
    normed.initialise(torch.Generator().manual_seed(0))
    gains = {name: value for name, value in normed.state_dict().items() if name not in plain.state_dict()}
    assert sorted(gains) == [f"blocks.{n}.attention.{part}_norm.weight" for n in range(2) for part in "kq"]
    assert all(torch.equal(gain, torch.ones(GROUPED.head_dim)) for gain in gains.values())
    assert all(torch.equal(normed.state_dict()[name], value) for name, value in plain.state_dict().items())
    total = sum(p.numel() for p in normed.parameters())
    assert total == GROUPED.params_total(WORDS) + 2 * GROUPED.n_layers * GROUPED.head_dim


def test_normalised_queries_and_keys_have_no_length() -> None:
    """Larger projections change nothing but the number within the root; gains do what the projections did."""
    model, tokens_BL = Transformer(GROUPED, WORDS, qk_norm=True), random_tokens(2, 9)
    model.initialise(torch.Generator().manual_seed(0))
    expected = model(tokens_BL, causal=False)
    with torch.no_grad():
        for block in model.blocks:
            attention = block.attention
            assert isinstance(attention, Attention) and attention.q_norm is not None
            attention.q_proj.weight *= 1000
            attention.k_proj.weight *= 100
    scaled = model(tokens_BL, causal=False)
    torch.testing.assert_close(scaled, expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.q_norm.weight *= 3  # type: ignore[union-attr, operator]
    assert float((model(tokens_BL, causal=False) - scaled).abs().max().detach()) > 1e-2
