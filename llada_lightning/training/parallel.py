"""Several processes: fully sharded data parallelism (FSDP2), tensor parallelism, and what processes decide together.

`--trainer.strategy=fsdp2` shards over all processes, as `--trainer.strategy=ddp` replicates over all.
`--trainer.strategy=fsdp2_tp8` shards over groups of 8 processes that compute one micro-batch together, each with its
part of every matrix: columns, then rows (Shoeybi et al. 2019), so some of the heads, of the inner width and of the
vocabulary. Between such pairs of matrices a process has some positions of each sequence, so that norms and residual
stream are divided, too (sequence parallelism; Korthikanti et al. 2022).
"""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable
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
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

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

_SEQUENCE = 1
"""The dimension of (B, L, D) along which positions are divided."""
_HEADS = 1
"""The dimension of (B, H, L, D) along which heads are divided."""


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
    """Processes that compute one micro-batch together, of a strategy, its name, or its class path with arguments."""
    if isinstance(strategy, FullySharded):
        return strategy.tensor_parallel
    if isinstance(strategy, str) and strategy in StrategyRegistry:
        return int(StrategyRegistry[strategy]["init_params"].get("tensor_parallel", 1))
    return int(strategy.get("init_args", {}).get("tensor_parallel", 1)) if isinstance(strategy, dict) else 1


def launched_settings(launch: Launch | None, devices: Any, plugins: list[Any]) -> dict[str, Any]:
    """The trainer's settings that follow from how the run's processes were launched; None: by a person."""
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
    """
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FullySharded)):
        raise UserError(f"trainer.strategy: {type(strategy).__name__} given; use --trainer.strategy=fsdp2 (or ddp)")
    if forks_processes(strategy):
        raise UserError("trainer.strategy: spawned or forked processes keep what they train to themselves; use ddp")


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
    """Refuse a strategy (:func:`check_strategy`) or a degree of tensor parallelism (:func:`check_degree`)."""
    check_strategy(trainer.strategy)
    degree = tensor_parallel(trainer.strategy)
    check_degree(degree, trainer.world_size, shape, vocab_size, sequence_length)
    if trainer.num_devices % degree:
        say(f"note: groups of {degree} processes lie across nodes of {trainer.num_devices}, and wait for the network")


def check_degree(degree: int, processes: int, shape: Shape, vocab_size: int, sequence_length: int) -> None:
    """Refuse a degree of tensor parallelism that does not cut everything, the processes included, into equal parts."""
    divided = {
        "the number of processes": processes,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "d_ff": shape.d_ff,
        "data.sequence_length": sequence_length,
        "model.vocab_size": vocab_size,
    }
    fitting = [d for d in range(1, processes + 1) if all(value % d == 0 for value in divided.values())]
    for name, value in divided.items():
        if degree < 1 or value % degree:
            fix = f"degrees that fit here: {', '.join(map(str, fitting))}"
            if name == "model.vocab_size":
                fix += f"; or pad it: --model.vocab_size={-(-value // degree) * degree}"
            raise UserError(f"trainer.strategy: tensor_parallel {degree} does not divide {name} {value}; {fix}")


def shard(model: Transformer, mesh: DeviceMesh, precision: str) -> None:
    """Shard, in place, a model on the meta device; its weights then lie, uninitialised, on the mesh's devices.

    Master weights and the reduction of gradients are fp32. Under `bf16-mixed` the matrices of the blocks travel as
    bf16, rounded once before they are gathered instead of once after, by autocast. Embedding and gains travel as fp32,
    because autocast does not round them either, and so does the output head, whose gradient is summed in fp32 and would
    take the type of the gathered weight. So a sharded run computes what an unsharded one does.

    Args:
        mesh: The device mesh, whose `tensor_parallel` dimension divides the matrices before `data_parallel` shards.
        precision: Lightning's name, such as `bf16-mixed` or `32-true`.
    """
    if mesh["tensor_parallel"].size() > 1:
        _parallelise(model, mesh["tensor_parallel"])
    mesh = mesh["data_parallel"]
    matrices = torch.bfloat16 if precision == "bf16-mixed" else None
    rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=matrices, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        assert isinstance(block, Block)
        norms = (block.attention.q_norm, block.attention.k_norm)
        gains: list[nn.Module] = [norm for norm in norms if norm is not None]
        if gains:
            fully_shard(gains, mesh=mesh, mp_policy=rest)
        fully_shard([block.attention, block.feed_forward], mesh=mesh, mp_policy=policy)
    fully_shard(model.head, mesh=mesh, mp_policy=rest)
    fully_shard(model, mesh=mesh, mp_policy=rest)
    register_fsdp_forward_method(model.head, "nll")
    register_fsdp_forward_method(model, "hidden")  # `llada` needs the logits of few positions only
    model.to_empty(device=mesh.device_type)


def _parallelise(model: Transformer, mesh: DeviceMesh) -> None:
    """Divide, in place, the matrices of a model, which may be on the meta device, over a group of processes.

    Tokens go in, and hidden states and logits come out, whole and the same in every process of the group. Where the
    head is compiled, so are the parts of the blocks.
    """
    norm, columns = SequenceParallel(use_local_output=True), ColwiseParallel()
    rows = RowwiseParallel(output_layouts=Shard(_SEQUENCE))
    of_a_block: dict[str, ParallelStyle] = {
        "attention_norm": norm,
        "attention.q_proj": columns,
        "attention.k_proj": columns,
        "attention.v_proj": columns,
        "attention.out_proj": rows,
        "feed_forward_norm": norm,
        "feed_forward.gate_proj": columns,
        "feed_forward.up_proj": columns,
        "feed_forward.down_proj": rows,
    }
    if model.qk_norm:  # each process has some of the heads
        heads = SequenceParallel(sequence_dim=_HEADS, use_local_output=True)
        of_a_block |= {"attention.q_norm": heads, "attention.k_norm": heads}
    plan = {f"blocks.*.{name}": style for name, style in of_a_block.items()}
    plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(_SEQUENCE))
    plan["norm"], plan["head"] = norm, ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    # FSDP2 warns of what the plan returns; the model writes to none of it in place.
    warnings.filterwarnings("ignore", ".*returned a view tensor")

    def gather_output(module: nn.Module, inputs: tuple[Any, ...], x_BLD: Tensor) -> Tensor:
        return _gathered(x_BLD, mesh).to_local()

    def owned_output(module: nn.Module, inputs: tuple[Any, ...], logits_NV: Tensor) -> Tensor:
        return logits_NV.clone()  # as it comes out of the plan it may not be written to

    for block in model.blocks:
        block.sequence_rank = mesh.get_local_rank()  # type: ignore[assignment]
        for name in ("attention", "feed_forward"):
            part = block.get_submodule(name)
            part.forward = _gathering(part.forward, mesh)
            if model.head.compiled:
                # What passes between graphs must be a plain tensor, so none may be cut, as FSDP2's hooks would a block.
                part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False)
    model.norm.register_forward_hook(gather_output)
    model.head.register_forward_hook(owned_output)


def _gathering(forward: Callable[..., Tensor], mesh: DeviceMesh) -> Callable[..., Tensor]:
    def gathering(x_BLD: Tensor, *arguments: Any) -> Tensor:
        return forward(_gathered(x_BLD, mesh), *arguments)

    return gathering


def _gathered(x_BLD: Tensor, mesh: DeviceMesh) -> DTensor:
    """All positions, of which each process has some; the gradients of all processes are added up on the way back.

    Under autocast in the type in which the matrix that follows computes: half as much travels, rounded alike.
    """
    device = x_BLD.device.type
    if torch.is_autocast_enabled(device):
        x_BLD = x_BLD.to(torch.get_autocast_dtype(device))
    return DTensor.from_local(x_BLD, mesh, [Shard(_SEQUENCE)]).redistribute(placements=[Replicate()])


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
