"""Optimizers: AdamW, Muon for the matrices of the blocks beside AdamW for the rest, and any other of torch by its name.

The base rate of each is 1, so that the schedule speaks in rates.

The guard against bad steps (``training.guard``) gives an optimizer ``found_inf``: 1 where the step is not to be made.
Torch's fused AdamW reads it on the device. Every other optimizer is held by :class:`GuardedOptimizer`, which reads it
on the host, as a ``GradScaler`` does for such optimizers.
"""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from llada_lightning.model.sharding import gathered, own_part
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened
from llada_lightning.support.security import is_trusted, not_trusted

EMBEDDING = "model.embedding.weight"
"""The name of the input embedding among the parameters of a module."""
BLOCKS = "model.blocks."
"""The beginning of the names of the blocks' parameters."""

NamedParameters = Sequence[tuple[str, nn.Parameter]]

ADAMW, MUON = "adamw", "muon"


@dataclass
class Muon:
    """What Muon (Jordan et al. 2024) has beside AdamW's settings.

    The iteration that makes an update orthogonal is computed in bf16, whatever the precision of the run.

    Args:
        momentum: The decay rate of the momentum.
        nesterov: Whether Nesterov's momentum is used.
        ns_steps: The number of Newton-Schulz steps.
        adjust_lr: The factor of the rate by the dimensions of a matrix. `match_rms_adamw` gives an update the root mean
            square of one of AdamW, so that one schedule serves both (Liu et al. 2025, arXiv:2502.16982); `original` is
            Jordan's, whose rates are higher.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"


@dataclass
class OptimizerSettings:
    """Which optimizer, and its settings.

    Args:
        betas: AdamW's decay rates of the moments (Loshchilov & Hutter 2019); (0.9, 0.95) as GPT-3 and Llama.
        eps: The number that AdamW adds to the root of the second moment.
        weight_decay: The weight decay, on matrices only (paper, B.2: 0.1); norms' gains get none.
        decay_embeddings: Whether the input embedding is decayed as the other matrices are. The output head always is.
        name: `adamw`; `muon`: Muon for the matrices of the blocks, AdamW for embedding, output head and gains; or the
            path of the class of another optimizer, such as `torch.optim.NAdam`, which updates all parameters alike.
        muon: The further settings of Muon.
        arguments: The arguments of another optimizer that are not at their defaults.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    name: str = ADAMW
    muon: Muon = field(default_factory=Muon)
    arguments: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse values that are out of range, of another optimizer than the named one, or that its class refuses."""
        if not (all(0 <= beta < 1 for beta in self.betas) and self.eps > 0 <= self.weight_decay):
            given = f"betas {self.betas}, eps {self.eps}, weight_decay {self.weight_decay} given"
            raise UserError(f"model.optimizer: {given}; betas must lie in [0, 1), eps above 0, weight_decay from 0")
        muon = self.muon
        if not (0 <= muon.momentum < 1 and 1 <= muon.ns_steps < 100):
            raise UserError(f"model.optimizer.muon: {muon}; momentum must lie in [0, 1), ns_steps in 1..99")
        if self.name != MUON and muon != Muon():
            raise UserError(
                f"model.optimizer.muon: {muon} given, but the optimizer is {self.name}; give its name, muon"
            )
        if self.name in (ADAMW, MUON):
            if self.arguments:
                raise UserError(
                    f"model.optimizer.arguments: {self.arguments} given, but {self.name} has settings of its own; give "
                    "--model.optimizer.betas and its like"
                )
            return
        unread = OptimizerSettings(name=self.name, arguments=self.arguments)
        if replace(self, betas=(self.betas[0], self.betas[1])) != unread:
            raise UserError(
                f"model.optimizer: {self} given, but {self.name} reads nothing but its arguments; give "
                "--model.optimizer.arguments"
            )
        self._check_other()

    def _check_other(self) -> None:
        """A step is made on a small matrix and a vector, because optimizers refuse settings in ways of their own."""
        kind = self._kind()
        if "lr" in self.arguments:
            raise UserError(f"model.optimizer.arguments: lr {self.arguments['lr']} given; give --model.schedule.lr")
        if kind is torch.optim.Muon:
            raise UserError(f"model.optimizer.name: {self.name} updates matrices only; give muon, which adds AdamW")
        closure = inspect.signature(kind.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UserError(f"model.optimizer.name: {self.name} computes the loss several times a step; choose another")
        parameters = [("matrix", nn.Parameter(torch.ones(2, 2))), ("vector", nn.Parameter(torch.ones(2)))]
        for _, parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        try:
            self._other(kind, parameters).step()
        except Exception as error:  # whatever a class refuses
            reason = shortened(" ".join(str(error).split()).rstrip("."), 200)
            given = f"{self.name} fails with {self.arguments} ({reason})"
            raise UserError(f"model.optimizer: {given}; correct name or arguments") from error

    def build(self, parameters: NamedParameters) -> Optimizer:
        """The optimizer of a module's parameters, which are given with their names."""
        if self.name == ADAMW:
            return self._adamw(parameters)
        if self.name != MUON:
            return GuardedOptimizer([self._other(self._kind(), parameters)])
        inner = {name: name.startswith(BLOCKS) and p.ndim == 2 for name, p in parameters}
        muon = ShardedMuon(
            [p for name, p in parameters if inner[name]],
            lr=1.0,
            weight_decay=self.weight_decay,
            momentum=self.muon.momentum,
            nesterov=self.muon.nesterov,
            ns_steps=self.muon.ns_steps,
            adjust_lr_fn=self.muon.adjust_lr,
        )
        return GuardedOptimizer([muon, self._adamw([(name, p) for name, p in parameters if not inner[name]])])

    def _adamw(self, parameters: NamedParameters) -> Optimizer:
        decayed = {name: p.ndim >= 2 and (self.decay_embeddings or name != EMBEDDING) for name, p in parameters}
        groups = [
            {"params": [p for name, p in parameters if decayed[name]], "weight_decay": self.weight_decay},
            {"params": [p for name, p in parameters if not decayed[name]], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1.0, betas=self.betas, eps=self.eps, fused=True)

    def _other(self, kind: type[Optimizer], parameters: NamedParameters) -> Optimizer:
        make: Callable[..., Optimizer] = kind
        return make([p for _, p in parameters], lr=1.0, **self.arguments)

    def _kind(self) -> type[Optimizer]:
        fix = "give adamw, muon, or the path of a class, such as torch.optim.NAdam"
        if "." not in self.name:
            raise UserError(f"model.optimizer.name: '{self.name}' is not known; {fix}")
        if not is_trusted(self.name):
            raise UserError(f"model.optimizer.name: {not_trusted(self.name)}")
        try:
            found = pydoc.locate(self.name)
        except pydoc.ErrorDuringImport as error:
            raise UserError(f"model.optimizer.name: {self.name} cannot be imported ({shortened(error)})") from error
        if not (isinstance(found, type) and issubclass(found, Optimizer)):
            raise UserError(f"model.optimizer.name: {self.name} is no optimizer; {fix}")
        return found


class ShardedMuon(torch.optim.Muon):
    """Torch's Muon, whose update of a matrix in shards is that of the whole matrix.

    Each process gathers one gradient at a time, computes the whole update, and keeps its part. Momentum is in shards.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make a step."""
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        assert closure is None, "the loss is computed before"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return None

    def _update(self, parameter: DTensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert isinstance(grad, DTensor)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer: DTensor = state["momentum_buffer"]
        buffer.to_local().lerp_(grad.to_local(), 1 - group["momentum"])
        update: Any = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        # Torch's own step of a whole matrix of zeros, whose momentum is in its gradient already, is the change.
        change = nn.Parameter(torch.zeros(parameter.shape, dtype=grad.dtype, device=grad.device))
        change.grad = gathered(update)
        same = {key: group[key] for key in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, nesterov=False, **same).step()
        part = parameter.to_local()
        part.mul_(1 - group["lr"] * group["weight_decay"]).add_(own_part(change, parameter))


def hold_back(optimizer: Optimizer, verdict: Tensor) -> None:
    """Have an optimizer leave weights, moments and step counts as they are in its next step, where the verdict is 1.

    Those that take ``found_inf``, as from a GradScaler, are given the verdict. The others, of a module that builds its
    own, skip parameters without a gradient; for them the host waits for the device.
    """
    if isinstance(optimizer, GuardedOptimizer) or getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = verdict  # type: ignore[attr-defined]
    elif bool(verdict):
        optimizer.zero_grad(set_to_none=True)


class GuardedOptimizer(Optimizer):
    """One or several optimizers as one, whose step is not made where ``found_inf`` is 1.

    Weights, moments and step counts then stay as they are. Reading ``found_inf`` waits for the device once a step. Its
    groups and states are those of its parts.

    Args:
        parts: The optimizers, each of other parameters.
    """

    found_inf: Tensor | None = None

    def __init__(self, parts: Iterable[Optimizer]) -> None:
        self._parts = list(parts)
        self._groups = [len(part.param_groups) for part in self._parts]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by ``load_state_dict``, which puts new groups and states in place of the old ones."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        start = 0
        for part, count in zip(self._parts, self._groups, strict=True):
            part.state = self.state
            part.param_groups = self.param_groups[start : start + count]
            start += count

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Compute the loss by ``closure``, which sets ``found_inf``, and make a step of each part if it may be made."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        verdict, self.found_inf = self.found_inf, None  # it is of this step
        if verdict is None or not bool(verdict):
            for part in self._parts:
                part.step()
        return loss
