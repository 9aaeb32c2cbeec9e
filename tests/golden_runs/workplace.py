"""A folder in which the commands of the fixtures run, and what their outcomes are compared by."""

from __future__ import annotations

import csv
import json
import lzma
import math
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

GOLDEN = Path(__file__).parent
ROOT = GOLDEN.parents[1]
OBJECTIVES = ("arm", "llada")
MODELS = {"arm": "ArmModule", "llada": "LladaModule"}
STAND_INS = ("quickstart", "books", "study", "study-gpu")
"""Prepared folders that the committed sweeps read, by their names in ``data/``."""
DOCUMENTS = 40


def texts() -> list[str]:
    """The documents of the small corpus."""
    return [
        "\n".join(f"{n} plus {k} is {n + k}, and {n} times {k} is {n * k}." for k in range(3 + n % 5))
        for n in range(DOCUMENTS)
    ]


def dialogues() -> list[dict[str, Any]]:
    """Rows for supervised fine-tuning: questions with answers, and dialogues of two turns."""
    rows: list[dict[str, Any]] = [
        {"question": f"{a} plus {b}", "answer": f"{a + b}."} for a in range(5) for b in (1, 2)
    ]
    for a in range(4):
        turns = (f"{a} plus 3", f"{a + 3}.", f"{a} times 2", f"is {2 * a}.")
        roles = ("user", "assistant") * 2
        rows.append({"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]})
    return rows


# --- runs ------------------------------------------------------------------------------------------------------------

RUNS = {f"{objective}-{kind}": (objective, kind) for objective in OBJECTIVES for kind in ("single", "branches", "sft")}
"""Name of a fixture -> objective and kind of run."""
CHECKPOINT_STEP = 5
"""The committed checkpoint of each run is that of this step."""
SHAPE = "L2-d8-h2-kv1-ff16"
_SHARED = (
    "--seed_everything=7",
    "--model.schedule.lr=0.02",
    "--model.schedule.warmup_steps=2",
    "--data.workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.precision=32-true",
    "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=5",
    "--run.root=runs",
    "--run.study=golden",
    "--run.checkpoint_every_steps=5",
    "--run.keep_checkpoints=9",
)


def pretraining(objective: str, *more: str) -> list[str]:
    """``fit`` on the small corpus, without a budget; ``more`` overrides."""
    return [
        "fit",
        f"--model={MODELS[objective]}",
        f"--model.shape={SHAPE}",
        "--data.path=corpus",
        "--data.sequence_length=32",
        "--data.global_batch=4",
        "--data.val_sequences=12",
        "--data.random_length_share=0.25",
        *_SHARED,
        *more,
    ]


def fine_tuning(objective: str, *more: str) -> list[str]:
    """``fit`` of the converted folder of an objective on the dialogues; ``more`` overrides."""
    return [
        "fit",
        f"--model={MODELS[objective]}",
        f"--model.weights=converted/{objective}",
        "--data=SftDataModule",
        "--data.path=dialogues.jsonl",
        "--data.context_length=64",
        "--data.global_batch=4",
        "--data.val_fraction=0.2",
        *_SHARED,
        *more,
    ]


def command(name: str) -> list[str]:
    """The command of a fixture: the arguments after ``llada``."""
    objective, kind = RUNS[name]
    if kind == "sft":
        return fine_tuning(objective, "--data.epochs=4")
    flops = {"single": "1.8e+7", "branches": "[1.1e+7, 1.8e+7]"}[kind]
    return pretraining(objective, f"--budget.flops={flops}", "--model.schedule.decay_fraction=0.25")


def lay_out(folder: Path) -> None:
    """Put everything that the commands name by relative paths into a folder, except runs."""
    shutil.copytree(GOLDEN / "corpus", folder / "corpus")
    shutil.copytree(GOLDEN / "corpus", folder / "second")  # of a mixture
    shutil.copytree(GOLDEN / "converted", folder / "converted")
    shutil.copy(GOLDEN / "dialogues.jsonl", folder)
    for name in ("experiments", "sweeps"):
        (folder / name).symlink_to(ROOT / name)
    for name in STAND_INS:
        lay_out_stand_in(name, folder / "data" / name)
    for name in ("chinese", "english", "code"):  # of the paper's configurations
        lay_out_stand_in("study", folder / "data" / name)


def lay_out_stand_in(name: str, folder: Path) -> None:
    """A prepared folder with the manifest and the tokenizer of a corpus, and shards of zeros: enough to resolve a
    run, whose identity holds the corpus's real fingerprint."""
    folder.mkdir(parents=True)
    stored = GOLDEN / "stand_ins" / name
    shutil.copy(stored / "manifest.json", folder)
    (folder / "tokenizer.json").write_bytes(lzma.decompress((stored / "tokenizer.json.xz").read_bytes()))
    manifest = json.loads((stored / "manifest.json").read_text())
    assert manifest["dtype"] == "uint16"
    for split, content in manifest["splits"].items():
        (folder / split).mkdir()
        chunks = []
        for shard in content["shards"]:
            with (folder / shard["file"]).open("wb") as file:
                file.truncate(shard["size"])  # sparse: takes no space
            name_in_split = Path(shard["file"]).name
            chunks.append({
                "filename": name_in_split, "chunk_bytes": shard["size"], "dim": shard["tokens"], "chunk_size": 1
            })  # fmt: skip
        config = {"data_format": ["no_header_tensor:20"], "compression": None, "encryption": None}
        (folder / split / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))


def restore(name: str, folder: Path, *, done: bool) -> Path:
    """Put a committed run into ``runs/golden``, whole, or as a signal after its checkpoint would have left it.

    Args:
        name: The name of the fixture.
        folder: The folder that :func:`lay_out` has filled.
        done: Whether the run has its results. Without them it also has no rows of later steps and no branches.

    Returns:
        The folder of the run.
    """
    stored = GOLDEN / name
    run = folder / "runs" / "golden" / run_name(name)
    shutil.copytree(stored, run)
    (run / "checkpoints").mkdir()
    checkpoint = f"step={CHECKPOINT_STEP:08d}.ckpt"
    (run / checkpoint).rename(run / "checkpoints" / checkpoint)
    if not done:
        for path in (run / "result.json", run / "validation.csv"):
            path.unlink()
        shutil.rmtree(run / "branches", ignore_errors=True)
        header, *rows = (run / "metrics.csv").read_text().splitlines(keepends=True)
        kept = [row for row in rows if int(row.split(",")[0]) <= CHECKPOINT_STEP]
        (run / "metrics.csv").write_text("".join([header, *kept]))
    return run


def run_name(name: str) -> str:
    """The name of the run's folder of a fixture."""
    return str(yaml.safe_load((GOLDEN / name / "config.yaml").read_text())["run"]["name"])


# --- names -----------------------------------------------------------------------------------------------------------


def cases() -> dict[str, list[str]]:
    """Commands of ``llada fit`` whose names and identities are committed: one for each way in which they come about.

    Those with ``lone`` in their names leave the rate or the warmup to the rules.
    """
    single, steps = "--budget.flops=1.8e+7", "--trainer.max_steps=20"
    found = {name: command(name) for name in RUNS}
    for objective in OBJECTIVES:
        own = {
            "tokens": ("--budget.tokens=5e+4",),
            "steps": (steps,),
            "total-flops": (single, "--budget.convention=total"),
            "weights": (f"--model.weights=converted/{objective}", "--model.shape=443k", steps),
            "mixture": ("--data.path={corpus: 2, second: 1}", steps),
            "document-mask": ("--data.document_mask=true", steps),
            "train-tokens": ("--data.train_tokens=1024", steps),
            "independent-times": ("--data.time_sampling=iid", "--data.mask_eps=0.01", steps),
            "seeds": ("--seed_everything=0", "--model.seed=3", "--data.seed=4", "--data.val_seed=5", steps),
            "spikes-skipped": ("--guard.spikes=skip", "--guard.spike_zscore=12", steps),
            "fp8": ("--speed.fp8=true", steps),
            "bf16": ("--trainer.precision=bf16-mixed", steps),
            "no-clipping": ("--trainer.gradient_clip_val=null", steps),
            "optimizer": ("--model.optimizer.betas=[0.9, 0.99]", "--model.optimizer.weight_decay=0.05", steps),
            "plateaus": (
                "--model.schedule.plateaus=[{lr: 0.01, from_tokens: 1000}]",
                "--model.schedule.decay_tokens=600",
                "--model.schedule.final_lr=0.001",
                steps,
            ),
            "model": ("--model.vocab_size=128", "--model.rope_theta=50000", "--model.norm_eps=1e-6", steps),
            "shape-of-dimensions": (
                "--model.shape={n_layers: 1, d_model: 16, n_heads: 2, n_kv_heads: 2, d_ff: 24}",
                steps,
            ),
        }
        found |= {f"{objective}-{name}": pretraining(objective, *more) for name, more in own.items()}
        lone = {
            "warmup-of-8-steps": (("warmup_steps",), "--trainer.max_steps=8"),
            "warmup-of-100000-steps": (("warmup_steps",), "--trainer.max_steps=100000"),
            "rate": (("lr",), single),
            "rate-and-warmup": (("lr", "warmup_steps"), "--budget.flops=1e+12"),
            "budgets": (("lr", "warmup_steps"), "--budget.flops=[1.0e+11, 4.0e+11, 1.0e+12]"),
        }
        for name, (left_out, length) in lone.items():
            given = tuple(f"--model.schedule.{key}=" for key in left_out)
            words = [word for word in pretraining(objective, length) if not word.startswith(given)]
            found[f"{objective}-lone-{name}"] = words
        found[f"{objective}-sft-tokens"] = fine_tuning(objective, "--budget.tokens=4000", "--data.pad_together=4")
        for path in (f"experiments/paper/{objective}_1b.yaml", f"experiments/sft/{objective}.yaml"):
            found[f"{objective}-{Path(path).parent.name}"] = configured(path, objective)
    found["arm-paper-7b"] = configured("experiments/paper/arm_7b.yaml", "arm")
    found["llada-paper-8b"] = configured("experiments/paper/llada_8b.yaml", "llada")
    found["llada-compat"] = pretraining("llada", "--model.compat=llada", steps)
    return found


def configured(path: str, objective: str) -> list[str]:
    """``fit`` of a committed configuration, with what it leaves to the user."""
    if "paper" in path:
        return ["fit", f"--config={path}"]
    given = (f"--model.weights=converted/{objective}", "--data.path=dialogues.jsonl", "--data.context_length=64")
    small = ("--data.global_batch=4", "--model.schedule.warmup_steps=2", "--trainer.precision=32-true")
    return ["fit", f"--config={path}", *given, *small]


def sweep_commands(path: Path) -> list[list[str]]:
    """The command of ``llada fit`` of each run of a committed sweep, with the precision of its committed results.

    The files are grids of plain values, so that these lines do without the package.
    """
    sweep = yaml.safe_load(path.read_text())
    words = sweep["command"]
    assert words[:2] == ["llada", "fit"] and words[-1] == "${args}"
    points: list[list[str]] = [[]]
    for name, spec in sweep["parameters"].items():
        values = [spec["value"]] if "value" in spec else spec["values"]
        points = [[*point, f"--{name}={value}"] for point in points for value in values]
    # Where neither the sweep nor its base names one, it would follow from the machine.
    precision = [] if path.stem.startswith("study") else ["--trainer.precision=bf16-mixed"]
    return [[*words[1:-1], *point, *precision] for point in points]


def committed_tables() -> dict[str, Path]:
    """Every committed table of results, by its path in the repository."""
    tables = {}
    for path in sorted((ROOT / "experiments").rglob("*.csv")):
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if {"run", "objective", "shape", "versions"} <= set(header):
            tables[path.relative_to(ROOT).as_posix()] = path
    return tables


# --- outcomes --------------------------------------------------------------------------------------------------------

OF_THE_MOMENT = frozenset({
    "tokens_per_second", "mfu", "seconds", "wall_seconds", "peak_memory_bytes", "flops_6nd_per_second",
    "flops_attention_per_second", "flops_head_per_second", "flops_total_per_second", "device", "versions", "git_commit",
})  # fmt: skip
"""Columns and keys that depend on the clock, the machine and the version."""
OF_ALL_BITS = frozenset({"parent_checkpoint"})
"""Keys that are hashes of weights: the same where every bit is."""


def this_platform() -> dict[str, str]:
    """What the last bits of a sum of floats depend on.

    MKL takes other kernels on processors of other vendors than Intel. The fixtures were made without the vendor noted;
    a machine of another vendor gave their bits once MKL was told that it was an Intel processor.
    """
    described = Path("/proc/cpuinfo")  # Linux has it
    lines = described.read_text().splitlines() if described.exists() else []
    vendors = [line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")]
    return {
        "torch": torch.__version__,
        "cpu_vendor": vendors[0] if vendors else "unknown",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def same_platform() -> bool:
    """Whether numbers must be equal bit for bit to the committed ones."""
    return bool(json.loads((GOLDEN / "platform.json").read_text()) == this_platform())


def assert_same(found: Any, committed: Any, where: str = "") -> None:
    """Compare nested values, of which a later version may have more keys.

    Numbers must be equal bit for bit on the platform of the fixtures, and to one part in 100,000 elsewhere.

    Args:
        found: The values of this version.
        committed: The values of the fixtures.
        where: The place of the values, for messages.
    """
    if isinstance(committed, Mapping):
        assert committed.keys() <= found.keys(), f"{where}: {committed.keys() - found.keys()} missing"
        for key in committed.keys() - (frozenset() if same_platform() else OF_ALL_BITS):
            assert_same(found[key], committed[key], f"{where}.{key}")
    elif isinstance(committed, list):
        assert len(found) == len(committed), where
        for n, (one, other) in enumerate(zip(found, committed, strict=True)):
            assert_same(one, other, f"{where}[{n}]")
    elif isinstance(committed, float) and not same_platform():
        assert math.isclose(found, committed, rel_tol=1e-5, abs_tol=1e-7), f"{where}: {found}, not {committed}"
    else:
        assert found == committed, where


def outcome(run: Path) -> dict[str, Any]:
    """Everything in a run's folder that the same command gives again: metrics, validation losses and results.

    Args:
        run: The folder of the run, or of its fixture.
    """
    branches = {f"branches/{path.name}": path for path in sorted((run / "branches").glob("*"))}
    tables = {place: list(_rows(folder / "metrics.csv")) for place, folder in {"": run, **branches}.items()}
    records = json.loads((run / "result.json").read_text())
    return {
        "metrics": tables,
        "validation": list(_rows(run / "validation.csv")),
        "results": [{key: value for key, value in each.items() if key not in OF_THE_MOMENT} for each in records],
    }


def _rows(path: Path) -> Iterator[dict[str, float | None]]:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            yield {k: None if v == "" else float(v) for k, v in row.items() if k not in OF_THE_MOMENT}
