"""Four processes with a model in shards, 2 data-parallel x 2 tensor-parallel.

Rows that the processes of one dimension divide evenly and those of the other do not: the embedding has 394 rows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer
from llada_lightning.model.sharding import fill, gathered
from llada_lightning.training.parallel import shard, total_norm

SHAPE, WORDS, MASK = Shape(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=66), 394, 1


def initialised() -> Transformer:
    """The model on one process."""
    model = Transformer(SHAPE, WORDS)
    model.initialise(torch.Generator().manual_seed(3))
    return model


def tokens(replica: int) -> Tensor:
    return torch.randint(2, WORDS, (2, 16), generator=torch.Generator().manual_seed(replica))


def loss(model: Transformer, tokens_BL: Tensor) -> Tensor:
    hidden_ND = model.hidden(tokens_BL, causal=False).flatten(0, 1)
    return model.head.nll(hidden_ND, tokens_BL.flatten(), torch.ones(tokens_BL.numel()), MASK)[0]


def work(rank: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    with torch.device("meta"):
        model = Transformer(SHAPE, WORDS)
    shard(model, mesh, "32-true")
    model.initialise(torch.Generator().manual_seed(3))
    parts: dict[str, Any] = dict(model.named_parameters())
    dcp.save({"initial": parts}, checkpoint_id=folder / "initial")
    model.zero_grad()
    loss(model, tokens(mesh.get_local_rank("data_parallel"))).backward()
    gradients = {name: part.grad for name, part in parts.items()}
    dcp.save({"gradients": gradients}, checkpoint_id=folder / "gradients")
    norm = total_norm(list(gradients.values()))
    optimizer = torch.optim.AdamW(parts.values(), lr=0.1, fused=True)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    dcp.save({"skipped": parts}, checkpoint_id=folder / "skipped")
    for name, whole in initialised().state_dict().items():
        fill(parts[name], 2 * whole)
        assert torch.equal(gathered(parts[name]), 2 * whole)
    dcp.save({"filled": parts}, checkpoint_id=folder / "filled")
    if rank == 0:
        layouts = {name: [str(placement) for placement in part.placements] for name, part in parts.items()}
        (folder / "figures.json").write_text(json.dumps({"norm": float(norm), "layouts": layouts}))
    dist.destroy_process_group()
