"""The data stream alone against what a 1M-parameter model consumes on one core: a ratio in one process.

The stream is the one that training reads, noise and all, in the training process (no workers), on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from lightning import Trainer

from llada_lightning.compute.schedule import WSD
from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.data.prepare import prepare
from llada_lightning.support.libraries import quiet_libraries
from llada_lightning.training import ArmModule, LladaModule
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.machine import native_precision


def stream_tokens_per_second(data: TokenDataModule, batches: int) -> float:
    loader = iter(data.train_dataloader())
    next(loader)
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return batches * data.global_batch * data.sequence_length / (time.perf_counter() - start)


def training_tokens_per_second(module: LanguageModule, data: TokenDataModule, steps: int, precision: str) -> float:
    module.configure_model()
    optimizer = module.configure_optimizers()["optimizer"]
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(steps + 1)]
    start = 0.0
    for i, batch in enumerate(batches):
        if i == 1:
            start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module.training_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return steps * data.global_batch * data.sequence_length / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1.28m")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    precision = native_precision("cpu")
    with tempfile.TemporaryDirectory() as folder:
        prepare("python-stdlib", f"{folder}/data", vocab_size=2048, max_bytes=8_000_000, progress=False)
        data = TokenDataModule(f"{folder}/data", sequence_length=256, global_batch=16)
        data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        ids = data.tokenizer
        schedule = WSD(lr=1e-3).resolve(100, data.expected_tokens_per_step, 1e-3)
        result: dict[str, float] = {"stream": stream_tokens_per_second(data, 400)}
        for module_class in (ArmModule, LladaModule):
            module = module_class(arguments.shape, ids.vocab_size, ids.mask_id, ids.eos_id, schedule=schedule)
            result[module.objective] = training_tokens_per_second(module, data, 8, precision)
    result["ratio"] = result["stream"] / max(result["arm"], result["llada"])
    print(
        f"stream {result['stream']:,.0f} tokens/s; {arguments.shape} on one core ({precision}): arm "
        f"{result['arm']:,.0f}, llada {result['llada']:,.0f} tokens/s; "
        f"the stream is {result['ratio']:.0f} times as fast"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
