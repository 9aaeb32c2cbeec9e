"""Makes the fixtures of this folder. They were made once, and are not to be made again: a change that they show is one.

    export OMP_NUM_THREADS=1
    cd REPOSITORY && PYTHONPATH=tests python -m golden_runs.make PREPARED

``PREPARED`` is a folder with the prepared folders of the committed studies, of which manifests and tokenizers are kept
(the commands are in the Makefile, for ``books`` in EXPERIMENTS.md); their fingerprints are those of the committed
tables. Everything else is made here: the small corpus and its tokenizer, the dialogues, and for each objective a run of
one budget, a run of two budgets (a trunk with two branches) and a run of supervised fine-tuning, each in one process
with one thread in float32 on a CPU. Of each run's checkpoints the one of step 5 is kept. ``platform.json`` states on
which CPU and with which torch the numbers were computed; the ``versions`` and ``git_commit`` of the others are in
each ``result.json``. Code of the commit that the fixtures in the repository were made with:
98c5c73b435e996b1cc960f5f600379ce6b1b118.
"""

from __future__ import annotations

import csv
import json
import lzma
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from golden_runs import workplace
from golden_runs.package import main, resolved
from golden_runs.workplace import CHECKPOINT_STEP, GOLDEN, OBJECTIVES, ROOT, STAND_INS
from llada_lightning import load_model, log_likelihood

KEPT = ("config.yaml", "metrics.csv", "validation.csv", "result.json", "tokenizer.json", "chat_template.jinja")


def make(prepared: Path) -> None:
    """Write every fixture.

    Args:
        prepared: The folder of the prepared corpora of the studies.
    """
    assert torch.get_num_threads() == 1, "set OMP_NUM_THREADS=1"
    write("platform.json", workplace.this_platform())
    for name in STAND_INS:
        keep_manifest(prepared / name, GOLDEN / "stand_ins" / name)
    make_data()
    with tempfile.TemporaryDirectory() as place:
        (GOLDEN / "converted").mkdir()
        workplace.lay_out(Path(place))
        os.chdir(place)
        for objective in OBJECTIVES:  # fine-tuning starts from what the run of one budget leaves
            keep_run(f"{objective}-single")
            convert(objective)
            keep_run(f"{objective}-branches")
            keep_run(f"{objective}-sft")
        write("logits.json", {objective: inference(f"converted/{objective}") for objective in OBJECTIVES})
        write("identities.json", {name: vars(resolved(arguments)) for name, arguments in workplace.cases().items()})
        write("sweeps.json", {path.name: sweep_names(path) for path in sorted((ROOT / "sweeps").glob("*.yaml"))})
    write("tables.json", {name: run_names(path) for name, path in workplace.committed_tables().items()})


def keep_manifest(source: Path, target: Path) -> None:
    """Keep of a prepared folder what :func:`workplace.lay_out_stand_in` needs."""
    target.mkdir(parents=True)
    shutil.copy(source / "manifest.json", target)
    (target / "tokenizer.json.xz").write_bytes(lzma.compress((source / "tokenizer.json").read_bytes()))


def make_data() -> None:
    """The small corpus with its tokenizer of 96 entries, and the dialogues."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    turns = "\n".join(f"user:\n{n}\n\nassistant:\n{n}\n" for n in range(10))
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["[EOS]", "[MASK]"], show_progress=False)
    tokenizer.train_from_iterator([*workplace.texts(), turns], trainer)
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(f"{place}/tokenizer.json")
        prepare(Path(place) / "texts", f"{place}/tokenizer.json", GOLDEN / "corpus")
    rows = "".join(json.dumps(row) + "\n" for row in workplace.dialogues())
    (GOLDEN / "dialogues.jsonl").write_text(rows)


def prepare(folder: Path, tokenizer: str, out: Path) -> None:
    """Prepare the small corpus.

    Args:
        folder: The folder to write the documents to.
        tokenizer: The path of the tokenizer.
        out: The prepared folder.
    """
    folder.mkdir()
    for n, text in enumerate(workplace.texts()):
        (folder / f"{n:02d}.txt").write_text(text)
    cut = ["--val-fraction", "0.25", "--shard-tokens", "1024", "--quiet"]
    assert main(["prepare", "--source", str(folder), "--tokenizer", tokenizer, "--out", str(out), *cut]) == 0


def keep_run(name: str) -> None:
    """Run the command of a fixture, and keep of its folder what the tests compare."""
    arguments = workplace.command(name)
    assert main(arguments) == 0
    run, target = Path("runs/golden") / resolved(arguments).name, GOLDEN / name
    target.mkdir()
    for file in [*map(run.joinpath, KEPT), *run.glob("*roles*")]:
        if file.exists():
            shutil.copy(file, target)
    shutil.copy(run / "checkpoints" / f"step={CHECKPOINT_STEP:08d}.ckpt", target)
    for branch in run.glob("branches/*"):
        (target / "branches" / branch.name).mkdir(parents=True)
        shutil.copy(branch / "metrics.csv", target / "branches" / branch.name)


def convert(objective: str) -> None:
    """Convert the kept checkpoint of the run of one budget, here and among the fixtures."""
    run = Path("runs/golden") / workplace.run_name(f"{objective}-single")
    checkpoint = run / "checkpoints" / f"step={CHECKPOINT_STEP:08d}.ckpt"
    assert main(["convert", str(checkpoint), f"converted/{objective}"]) == 0
    shutil.copytree(f"converted/{objective}", GOLDEN / "converted" / objective)


def inference(path: str) -> dict[str, Any]:
    """A few logits of a model, and the log-likelihoods of two answers."""
    lm = load_model(path, device="cpu")
    prompt, *answers = ([*lm.encode(text)] for text in ("3 plus 4 is", " 7", " 8."))
    logits_LV = lm.logits(torch.tensor([[*prompt, *answers[0]]]))[0]
    scores = log_likelihood(lm, [(prompt, answer) for answer in answers], samples=16)
    return {
        "tokens": [*prompt, *answers[0]],
        "logits": logits_LV[:, :6].tolist(),
        "log_likelihoods": [score.mean for score in scores],
    }


def sweep_names(path: Path) -> list[dict[str, Any]]:
    """For each run of a sweep the name of its folder, and those of its results."""
    found = [resolved(arguments) for arguments in workplace.sweep_commands(path)]
    return [{"name": run.name, "results": run.results} for run in found]


def run_names(path: Path) -> list[str]:
    """The names of the runs of a table, in its order."""
    with path.open(newline="") as file:
        return [row["run"] for row in csv.DictReader(file)]


def write(name: str, value: Any) -> None:
    """Write a fixture of plain values."""
    (GOLDEN / name).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
