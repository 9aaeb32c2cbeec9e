"""Small fits of some seconds, whose checkpoints and validations are frequent: there is much to fall into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from llada_lightning.compute.shapes import Shape
from llada_lightning.data.prepare import prepare
from llada_lightning.objectives import get_objective

MODELS = {"arm": "ArmModule", "llada": "LladaModule"}
SHAPE = Shape(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64)
LENGTH, BATCH = 32, 12
STEPS, CHECKPOINT_STEPS, VALIDATION_STEPS = 200, 5, 20
STEPS_OF_TWO = 80
"""Length of a run on two processes, whose steps take longer."""
BUDGET_STEPS = (80, 140, 200)
"""Lengths of a run of several budgets."""


@dataclass(frozen=True)
class Corpora:
    """Two prepared folders with one tokenizer."""

    first: Path
    second: Path

    @property
    def mixture(self) -> str:
        """For `data.path`."""
        return f"{{{self.first}: 3.0, {self.second}: 1.0}}"


def prepare_corpora(folder: Path) -> Corpora:
    """Arithmetic sentences: the first corpus is read more than once by a fit of this module's length."""
    corpora = Corpora(folder / "first", folder / "second")
    write_text(folder / "text" / "first", 60)
    write_text(folder / "text" / "second", 60, first=1000)
    common = {"val_fraction": 0.3, "shard_tokens": 2048, "progress": False}
    if not corpora.first.exists():
        prepare(str(folder / "text" / "first"), str(corpora.first), vocab_size=384, **common)  # type: ignore[arg-type]
    if not corpora.second.exists():
        tokenizer = str(corpora.first / "tokenizer.json")
        prepare(str(folder / "text" / "second"), str(corpora.second), tokenizer=tokenizer, **common)  # type: ignore[arg-type]
    return corpora


def write_text(folder: Path, documents: int, first: int = 0) -> Path:
    """Writes a folder of text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(first, first + documents):
        lines = [f"{n} plus {k} is {n + k}, and {n} times {k} is {n * k}." for k in range(25)]
        (folder / f"{n:05d}.txt").write_text("\n".join(lines))
    return folder


def fit_words(objective: str, path: Path | str, root: Path, *extra: str, accumulation: int = 1) -> list[str]:
    """`fit` and its arguments: 200 steps of 12 sequences of 32 tokens in fp32, in ``root/kills/run``.

    Args:
        objective: `arm` or `llada`.
        path: of the data, or a mixture.
        root: of the runs.
        extra: further arguments, which overrule.
        accumulation: micro-batches of a step.
    """
    words = {
        "model": get_objective(objective).module.rpartition(".")[2],
        "model.shape": f"{{{', '.join(f'{key}: {value}' for key, value in vars(SHAPE).items())}}}",
        "model.schedule.lr": 0.01,
        "data.path": path,
        "data.sequence_length": LENGTH,
        "data.global_batch": BATCH,
        "data.val_sequences": 96,
        "data.random_length_share": 0.1,
        "trainer.max_steps": STEPS,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.accumulate_grad_batches": accumulation,
        "trainer.val_check_interval": VALIDATION_STEPS * accumulation,
        "run.root": root,
        "run.study": "kills",
        "run.name": "run",
        "run.checkpoint_every_steps": CHECKPOINT_STEPS,
    }
    return ["fit", *(f"--{key}={value}" for key, value in words.items()), *extra]


def run_folder(root: Path) -> Path:
    """The folder of the run that :func:`fit_words` describes."""
    return root / "kills" / "run"


def write_sweep(path: Path, data: Path, root: Path, *extra: str, seeds: int = 1) -> Path:
    """Writes a W&B sweep file: :func:`fit_words` of both objectives with the seeds 0, 1, ... in ``root/kills``."""
    own = ("--model=", "--run.name=")
    words = [word for word in fit_words("arm", data, root, *extra) if not word.startswith(own)]
    sweep = {
        "name": path.stem,
        "program": "llada",
        "method": "grid",
        "command": ["llada", *words, "${args}"],
        "parameters": {"seed_everything": {"values": list(range(seeds))}, "model": {"values": list(MODELS.values())}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


def budget_words() -> list[str]:
    """Arguments for :func:`fit_words` that make it a trunk with a branch for each of ``BUDGET_STEPS``."""
    flops = [6.0 * SHAPE.params_nonembedding * BATCH * LENGTH * steps for steps in BUDGET_STEPS]
    budget = [f"--budget.flops={flops}", "--trainer.max_steps=-1"]
    return [*budget, "--data.random_length_share=0", "--model.schedule.warmup_steps=4"]
