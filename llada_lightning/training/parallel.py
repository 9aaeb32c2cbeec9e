"""Fully sharded data parallelism (FSDP2): which parts of the Transformer are gathered together, and in which type.

`--trainer.strategy=fsdp2` shards over all processes, as `--trainer.strategy=ddp` replicates over all.
`--trainer.strategy=fsdp2_tp8` shards over groups of 8, whose processes compute together (tensor parallelism).

What all processes of a run decide together, without the accelerators, whose queues it therefore does not drain.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from llada_lightning.checkpoints.run_folder import (
    META,
    ShardedCheckpointReader,
    is_sharded,
    refusing_strangers,
)
from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer
from llada_lightning.model.sharding import fill
from llada_lightning.model.transformer import Block
from llada_lightning.support.cluster import Launch, device_count
from llada_lightning.support.errors import UserError
from llada_lightning.support.signals import say
from llada_lightning.training.lightning_internals import forks_processes
from llada_lightning.training.tensor_parallel import check_degree, parallelise


class FullySharded(ModelParallelStrategy):
    """Weights, gradients and moments in shards over all processes of all nodes (FSDP2; Zhao et al. 2023).

    Args:
        tensor_parallel: The number of processes, neighbours by rank, that compute the same micro-batch together.
        save_distributed_checkpoint: Whether each process writes its shard into a folder. False: the first process
            gathers everything into one file.
        process_group_backend: The back end of the process group; null: nccl for GPUs, gloo for CPUs.
    """

    def __init__(
        self,
        tensor_parallel: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=tensor_parallel,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )
        self.tensor_parallel = tensor_parallel

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes // self.tensor_parallel
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process takes its shards, of a checkpoint in shards or of a file; nothing in either is run.

        Lightning's own method would read the index and the settings of the optimizer as pickles that may run code.
        """
        path = Path(self.broadcast(checkpoint_path))
        with refusing_strangers(path):
            return self._load_shards(path) if is_sharded(path) else self._load_file(path)

    def _load_shards(self, folder: Path) -> dict[str, Any]:
        assert self.model is not None
        reader = ShardedCheckpointReader(folder)
        reader.read_metadata()  # fails here, in each process alone, before they read together
        weights = {"state_dict": get_model_state_dict(self.model)}
        reader.fill(weights, together=True)
        self.model.load_state_dict(weights["state_dict"])
        for number, optimizer in enumerate(self.optimizers):
            state: dict[str, Any] = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
            reader.fill(state, together=True)
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{number}"])
        return torch.load(folder / META, map_location="cpu", weights_only=True)

    def _load_file(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        _fill_by_name(get_model_state_dict(self.model), checkpoint.pop("state_dict"))
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint.pop("optimizer_states"), strict=False):
            ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            whole, own = _by_name(saved, ordered), get_optimizer_state_dict(self.model, optimizer)
            states: dict[str, Any] = own["state"]  # type: ignore[assignment]
            for name, state in states.items():
                _fill_by_name(state, whole["state"][name])
            own["param_groups"] = whole["param_groups"]
            set_optimizer_state_dict(self.model, optimizer, own)
        return checkpoint


def _by_name(saved: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's state keyed by its parameters' names, which are in the order of the optimizer's groups."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    named = dict(zip(numbers, names, strict=True))
    return {
        "state": {named[number]: values for number, values in saved["state"].items()},
        "param_groups": [{**group, "params": [named[n] for n in group["params"]]} for group in saved["param_groups"]],
    }


def _fill_by_name(own: dict[str, Any], whole: dict[str, Any]) -> None:
    if own.keys() != whole.keys():
        raise KeyError(f"{sorted(own.keys() ^ whole.keys())} in one of the two only")
    for name, tensor in own.items():
        if isinstance(tensor, DTensor):
            fill(tensor, whole[name])
        else:
            tensor.copy_(whole[name])


StrategyRegistry.register("fsdp2", FullySharded, description="fully sharded data parallelism over all processes")
for _degree in (2, 4, 8):
    StrategyRegistry.register(
        f"fsdp2_tp{_degree}",
        FullySharded,
        description=f"fully sharded data parallelism over groups of {_degree} tensor-parallel processes",
        tensor_parallel=_degree,
    )


def tensor_parallel(strategy: Any) -> int:
    """Processes that compute one micro-batch together.

    Args:
        strategy: A strategy, or its name, or a class path with arguments.
    """
    if isinstance(strategy, FullySharded):
        return strategy.tensor_parallel
    if isinstance(strategy, str) and strategy in StrategyRegistry:
        return int(StrategyRegistry[strategy]["init_params"].get("tensor_parallel", 1))
    return int(strategy.get("init_args", {}).get("tensor_parallel", 1)) if isinstance(strategy, dict) else 1


def launched_settings(launch: Launch | None, devices: Any, plugins: list[Any]) -> dict[str, Any]:
    """The trainer's settings that follow from how the run's processes were launched.

    Args:
        launch: None: a person started this process; the settings stay as they are.
        devices: The devices of the trainer; named ones are kept.
        plugins: The plugins of the trainer.
    """
    if launch is None:
        return {"plugins": plugins}
    sizes: dict[str, Any] = {"num_nodes": launch.nodes}
    if device_count(devices) is None:
        sizes["devices"] = launch.per_node
    if launch.launcher != "srun":
        return {**sizes, "plugins": plugins}
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.per_node))  # Lightning insists on it
    # Lightning's own handling of SLURM's signals saves in the middle of a step.
    return {**sizes, "plugins": [*plugins, SLURMEnvironment(auto_requeue=False)]}


def check_strategy(strategy: Strategy) -> None:
    """Refuse another strategy than one device, replicas, and our sharding.

    Lightning's own sharding would split single matrices over a node, for which the model has no plan, and give the
    moments of a checkpoint file to the wrong parameters (2.6, where an optimizer's groups are not in the model's
    order). And other strategies read checkpoints by themselves, as pickles that may run code.

    Raises:
        UserError: it is another one.
    """
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FullySharded)):
        raise UserError(f"trainer.strategy: {type(strategy).__name__} given; use --trainer.strategy=fsdp2 (or ddp)")
    if forks_processes(strategy):
        raise UserError("trainer.strategy: spawned or forked processes keep what they train to themselves; use ddp")


def replicas(trainer: Trainer) -> int:
    """Parts of the run's processes that read different sequences."""
    return trainer.world_size // tensor_parallel(trainer.strategy)


def leads_its_group(trainer: Trainer) -> bool:
    """Whether this process speaks for those that compute the same micro-batch."""
    return trainer.global_rank % tensor_parallel(trainer.strategy) == 0


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, the same in all processes, () float32.

    In shards, one sum over all processes; torch's own would make one for each dimension of the mesh.
    """
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return torch.nn.utils.get_total_norm(gradients)
    assert len(sharded) == len(gradients)
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for gradient in sharded:
        sizes = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
        by_copies[math.prod(size for placement, size in sizes if placement.is_replicate())].append(gradient.to_local())
    squares = [torch.nn.utils.get_total_norm(parts).square() / copies for copies, parts in by_copies.items()]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    return total.sqrt()


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every number of every tensor is finite, in whole tensors or shards, the same in all processes."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    finite = [torch.ones((), dtype=torch.bool, device=parts[0].device)]
    # aminmax gives NaN where one is. A norm would be taken for the optimizer's in a profile.
    finite += [extreme.isfinite() for part in parts if part.numel() for extreme in part.aminmax()]
    bad = (~torch.stack(finite).all()).int()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(bad)
    return not bad


def check_parallel(trainer: Trainer, shape: Shape, vocab_size: int, sequence_length: int) -> None:
    """:func:`check_strategy`, and whether its degree of tensor parallelism divides the processes and the model.

    Raises:
        UserError: another strategy, or another degree is needed.
    """
    check_strategy(trainer.strategy)
    degree = tensor_parallel(trainer.strategy)
    check_degree(degree, trainer.world_size, shape, vocab_size, sequence_length)
    if trainer.num_devices % degree:
        say(f"note: groups of {degree} processes lie across nodes of {trainer.num_devices}, and wait for the network")


def sharding_mesh(strategy: Strategy) -> DeviceMesh:
    """The run's processes: `data_parallel` x `tensor_parallel`."""
    assert isinstance(strategy, FullySharded)
    return strategy.device_mesh


def shard(model: Transformer, mesh: DeviceMesh, precision: str) -> None:
    """Shard, in place, a model on the meta device; its weights then lie, uninitialised, on the mesh's devices.

    Master weights and the reduction of gradients are fp32. Under `bf16-mixed` the matrices travel as bf16, rounded
    once before they are gathered instead of once after, by autocast; embedding and gains travel as fp32, because
    autocast does not round them either. So a sharded run computes what an unsharded one does.

    Args:
        mesh: The device mesh, whose `tensor_parallel` dimension divides the matrices before `data_parallel` shards.
        precision: Lightning's name, such as `bf16-mixed` or `32-true`.
    """
    if mesh["tensor_parallel"].size() > 1:
        parallelise(model, mesh["tensor_parallel"])
    mesh = mesh["data_parallel"]
    matrices = torch.bfloat16 if precision == "bf16-mixed" else None
    policy = MixedPrecisionPolicy(param_dtype=matrices, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        assert isinstance(block, Block)
        fully_shard([block.attention, block.feed_forward], mesh=mesh, mp_policy=policy)
    fully_shard(model.head, mesh=mesh, mp_policy=policy)
    rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=rest)
    register_fsdp_forward_method(model.head, "nll")
    register_fsdp_forward_method(model, "hidden")  # `llada` needs the logits of few positions only
    model.to_empty(device=mesh.device_type)


class Agreement:
    """The largest of the processes' values, over the network; in one process its own."""

    def __init__(self) -> None:
        self._group: Any = None

    def begin(self, trainer: Trainer) -> None:
        """To be called by all processes, before the first :meth:`maximum`."""
        if trainer.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def maximum(self, value: int) -> int:
        """The largest value of all processes, each of which gives its own."""
        if self._group is None:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)
