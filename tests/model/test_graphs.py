"""Passes through graphs, by a stand-in for CUDA's that records operations: the same numbers, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.recorded_operations import RecordedOperations
from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer
from llada_lightning.model.graphs import KINDS, REPEATS, PassGraphs, passes_as_graphs
from llada_lightning.model.patterns import block_diffusion

SHAPE = Shape(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
PADDED = torch.tensor([[False, False, *[True] * 6], [True] * 8])
OF_ALL_KINDS: list[dict[str, Any]] = [
    {"causal": False},
    {"causal": True},
    {"causal": False, "queries": slice(2, 6)},
    {"causal": False, "attention_mask_BL": PADDED},
    {"causal": False, "positions_BL": (PADDED.cumsum(1) - 1).clamp(min=0)},
    {"causal": True, "documents_BL": torch.tensor([[0] * 3 + [1] * 5, [2] * 8])},
    {"causal": False, "pattern": block_diffusion(4, 2)},
]


def model(graphs: bool = True) -> Transformer:
    made = Transformer(SHAPE, 24).eval()
    made.initialise(torch.Generator().manual_seed(3))
    made.pass_graphs = PassGraphs(RecordedOperations) if graphs else None
    return made


def tokens(seed: int, rows: int = 2) -> Tensor:
    return torch.randint(24, (rows, 8), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arguments", OF_ALL_KINDS, ids=lambda given: next(reversed(given)))
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_pass_is_the_same(arguments: dict[str, Any], context: Any) -> None:
    mine, plain = model(), model(graphs=False)
    assert mine.pass_graphs is not None
    with context():
        for seed in range(REPEATS + 3):
            found = mine.hidden(tokens(seed), **arguments)
            torch.testing.assert_close(found, plain.hidden(tokens(seed), **arguments), rtol=0, atol=0)
            assert mine.pass_graphs.replayed == max(0, seed + 2 - REPEATS)


@torch.no_grad()
def test_a_recording_reads_the_tensors_that_it_is_given() -> None:
    """Other masks of one shape, and weights that an optimizer changes in place; results stay as they were."""
    mine, plain = model(), model(graphs=False)
    before = None
    for seed in range(REPEATS + 3):
        for changed in (mine, plain):
            changed.blocks[0].attention.q_proj.weight.mul_(1.5)  # type: ignore[union-attr, operator]
        given = {"causal": False, "attention_mask_BL": PADDED.roll(seed, 0)}
        found = mine.hidden(tokens(seed), **given)
        torch.testing.assert_close(found, plain.hidden(tokens(seed), **given), rtol=0, atol=0)
        if before is not None:
            torch.testing.assert_close(*before, rtol=0, atol=0)
        before = (found, found.clone())


def test_what_has_gradients_or_a_place_of_its_own_goes_the_ordinary_way() -> None:
    mine = model()
    assert mine.pass_graphs is not None
    for seed in range(REPEATS + 2):
        assert mine.hidden(tokens(seed), causal=False).requires_grad
        with torch.no_grad():
            mine.hidden(tokens(seed), causal=False, rows_M=torch.tensor([1, 5]))
    assert mine.pass_graphs.replayed == 0


@torch.no_grad()
def test_more_kinds_than_are_recorded() -> None:
    mine, plain = model(), model(graphs=False)
    assert mine.pass_graphs is not None
    for rows in range(1, KINDS + 3):
        for seed in range(REPEATS):
            found = mine.hidden(tokens(seed, rows), causal=False)
            torch.testing.assert_close(found, plain.hidden(tokens(seed, rows), causal=False), rtol=0, atol=0)
    assert mine.pass_graphs.replayed == KINDS


@torch.no_grad()
def test_a_pass_that_waits_for_the_device_goes_the_ordinary_way() -> None:
    calls = []

    def waits(x: Tensor) -> Tensor:
        calls.append(float(x.sum()))
        return x

    graphs = PassGraphs(RecordedOperations)
    for _ in range(REPEATS + 2):
        assert graphs(waits, x=torch.ones(2)) is None
    assert len(calls) == 1  # the trial; the recording broke off, and is not tried again


def test_a_cpu_has_no_graphs() -> None:
    made = model(graphs=False)
    with passes_as_graphs(made):
        assert made.pass_graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", OF_ALL_KINDS, ids=lambda given: next(reversed(given)))
@torch.no_grad()
def test_a_pass_on_a_gpu(arguments: dict[str, Any]) -> None:
    made = model(graphs=False).to("cuda")
    given = {name: value.to("cuda") if isinstance(value, Tensor) else value for name, value in arguments.items()}
    expected = [made.hidden(tokens(seed).to("cuda"), **given) for seed in range(REPEATS + 3)]
    with passes_as_graphs(made):
        found = [made.hidden(tokens(seed).to("cuda"), **given) for seed in range(REPEATS + 3)]
        assert made.pass_graphs is not None and made.pass_graphs.replayed == 4
    torch.testing.assert_close(found, expected)
    assert made.pass_graphs is None
