"""A stand-in for CUDA graphs that runs on the CPU: it records operations, and replays them without the Python code.

As a CUDA graph it knows nothing but the operations, the places of their tensors and the numbers that they were given.
Whatever else the work reads - a number of the host, a tensor put in place of another one - is as it was when the
work was recorded. To wait for a value is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedOperations(TorchDispatchMode):
    """A ``model.graphs.Graph``."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._result = torch.empty(0)
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def record(self, work: Callable[[], Tensor], trial: Callable[[], Any]) -> None:
        trial()
        torch.clear_autocast_cache()
        with self:
            self._result = work()
        torch.clear_autocast_cache()
        for storage, before in self._before.values():  # what is recorded is not done
            storage.copy_(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} waits for the device")
        named = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(named.get(argument.name)):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in self._made | self._before.keys():
                        self._before[storage.data_ptr()] = (storage, storage.clone())
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        self._made |= {t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, Tensor)} - {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        return out

    @torch.no_grad()
    def replay(self) -> Tensor:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)
        return self._result
