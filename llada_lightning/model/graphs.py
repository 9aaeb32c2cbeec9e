"""CUDA graphs: pieces of work that are recorded once and launched at once, and the passes that go through them.

A small model's pass takes as long as its hundreds of launches, whatever the device could compute meanwhile. A CUDA
graph is a recording of all kernels of a piece of work with the addresses that they read and write. It is launched at
once, so every tensor that changes is copied to a fixed place first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llada_lightning.model.transformer import Transformer

_WARM_UP = 3
"""How often a piece of work is done before it is recorded: libraries and compilers prepare themselves then."""

REPEATS = 4
"""The pass of a kind at which it is recorded. Recording costs about as many passes."""

KINDS = 8
"""The largest number of kinds of pass that are recorded: each keeps its result in memory."""


class Graph(Protocol):
    """A piece of work that is recorded once and then done as often as it is asked for."""

    def record(self, work: Callable[[], Tensor], trial: Callable[[], Any]) -> None:
        """Record work on fixed tensors; ``trial`` does it for good beforehand, and leaves no trace."""

    def replay(self) -> Tensor:
        """Do the work; returns what it returned, at a fixed place."""


class CudaGraph:
    """A CUDA graph. All that share a pool share their memory, since they are replayed one after the other.

    Args:
        pool: The memory that they share.
    """

    def __init__(self, pool: Any) -> None:
        self._pool, self._graph, self._result = pool, torch.cuda.CUDAGraph(), torch.empty(0)

    def record(self, work: Callable[[], Tensor], trial: Callable[[], Any]) -> None:
        beside = torch.cuda.Stream()  # where the default stream's work is not seen as part of the recording
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                trial()
        torch.cuda.current_stream().wait_stream(beside)
        # Weights that autocast has cast and kept would be recorded as they are now.
        torch.clear_autocast_cache()
        # The threads of loader and checkpoints may go on meanwhile.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            self._result = work()
        torch.clear_autocast_cache()

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._result


def new_graphs() -> Callable[[], Graph]:
    """What makes graphs that share their memory."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


class PassGraphs:
    """Passes of a Transformer without gradients, each kind recorded when it has repeated.

    A kind is the shapes of the tensors and the values of everything else. A recording reads the weights where they are,
    so it follows their updates. A pass of another kind goes the ordinary way.

    Args:
        new_graph: What makes a graph.

    Attributes:
        replayed: The number of passes that a graph made.
    """

    def __init__(self, new_graph: Callable[[], Graph]) -> None:
        self._new_graph = new_graph
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._kinds: dict[tuple[Any, ...], tuple[dict[str, Tensor], Graph] | None] = {}
        self.replayed = 0

    def __call__(self, make: Callable[..., Tensor], **arguments: Any) -> Tensor | None:
        """The result of ``make(**arguments)`` on tensors of its own; None where no graph holds this kind of call.

        The arguments beside tensors must be hashable, and mean the same whenever they are equal.
        """
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in arguments.items() if name not in tensors}
        device, *_ = {value.device.type for value in tensors.values()}
        kind = (
            *((name, tuple(value.shape)) for name, value in tensors.items()),
            *((name, str(value) if isinstance(value, slice) else value) for name, value in others.items()),
            torch.is_autocast_enabled(device),
        )
        if kind not in self._kinds:
            self._seen[kind] += 1
            if self._seen[kind] < REPEATS or len(self._kinds) == KINDS:
                return None
            self._kinds[kind] = self._recorded(make, tensors, others)
        held = self._kinds[kind]
        if held is None:
            return None
        self.replayed += 1
        places, graph = held
        for name, value in tensors.items():
            places[name].copy_(value)
        return graph.replay().clone()

    def _recorded(
        self, make: Callable[..., Tensor], tensors: dict[str, Tensor], others: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Graph] | None:
        """The fixed places and the graph of a kind; None where it cannot be recorded."""
        places = {name: value.clone() for name, value in tensors.items()}
        graph = self._new_graph()

        def work() -> Tensor:
            return make(**places, **others)

        try:
            graph.record(work, work)
        except RuntimeError:  # an operation that waits for the device, or no memory for a second set of activations
            return None
        return places, graph


@contextmanager
def passes_as_graphs(model: Transformer) -> Iterator[None]:
    """Within, the passes of a model on a CUDA device that repeat go through graphs. They are freed afterwards."""
    if model.head.weight.device.type != "cuda":
        yield
        return
    model.pass_graphs = PassGraphs(new_graphs())
    try:
        yield
    finally:
        model.pass_graphs = None
