"""A user's mistake: one line on stderr, exit code 2, nothing half-written; and a stdout that takes no more."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, models

from helpers.small_corpora import seal
from llada_lightning.commands import main as cli
from llada_lightning.commands.main import main
from llada_lightning.support.command_line import print_json
from llada_lightning.support.printing import people_console

SMALL = ["--model.shape=107k", "--data.sequence_length=32", "--data.global_batch=8", "--trainer.accelerator=cpu"]


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail as a user's mistake; returns its one line."""

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(list(arguments)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert "Traceback" not in lines[0]
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return lines[0]

    return run


@pytest.fixture
def fit(fails, prepared: Path, tmp_path: Path):
    """`llada fit` on the small corpus with further arguments; must fail."""

    def run(*arguments: str, data: str | None = None) -> str:
        common = [f"--data.path={data or prepared}", f"--run.root={tmp_path / 'runs'}", *SMALL]
        return fails("fit", "--model=LladaModule", *common, "--budget.flops=1e10", *arguments)

    return run


def test_an_unknown_command(fails) -> None:
    assert "'train' is not a command; choose from prepare, fit" in fails("train")


SEE = "; see 'llada fit --help'"
SEE_DATA, SEE_MODEL = "; see 'llada fit --data.help TokenDataModule'", "; see 'llada fit --model.help LladaModule'"
MISTAKES = [
    ("budget.flop=1e9", f"unrecognized arguments: --budget.flop=1e9; the nearest is --budget.flops{SEE}"),
    ("modell.shape=3", f"unrecognized arguments: --modell.shape=3; the nearest is --model.shape{SEE}"),
    ("model.init_args.shapee=3", f"model: Option 'shapee' is not accepted; the nearest is --model.shape{SEE_MODEL}"),
    ("model.schedule.lrr=3", f"arguments: --model.schedule.lrr=3; the nearest is --model.schedule.lr{SEE_MODEL}"),
    ("model.optimizer={beta: 3}", f"does not accept option 'beta'; the nearest is --model.optimizer.betas{SEE}"),
    (
        "data.valsequences=3",
        f"data: Option 'valsequences' is not accepted; the nearest is --data.val_sequences{SEE_DATA}",
    ),
    ("trainer.max_step=3", f"the nearest is --trainer.max_steps{SEE}"),
    ("zzz=3", f"error: unrecognized arguments: --zzz=3{SEE}"),
    ("budget.flops=much", f"error: budget.flops: much given; expected float or list or null{SEE}"),
    ("data.sequence_length=long", f"error: data.sequence_length: long given; expected int{SEE_DATA}"),
    ("model.rope_theta=big", f"error: model.rope_theta: big given; expected float{SEE_MODEL}"),
    ("trainer.precision=half", "trainer.precision: half given; expected"),
    ("model.shape=9z", "shape: '9z' is not known; choose from arm-1b"),
    ("data.sequence_length=4096", "4096"),  # longer than a shard
    ("budget.flops=1000", "1000 is below one step of llada 107k, which costs"),
    ("budget.flops=null", "nothing says how long to train"),
    ("trainer.max_steps=7", "trainer.max_steps: 7 given, but the budget makes"),
    ("data.micro_batch=3", "data.global_batch: 8 is not micro-batch 3 x 1 device(s) x accumulation 1"),
    ("data.micro_batch=3", "nearest global batches: 6 or 9"),
    ("model.vocab_size=10", "model.vocab_size: 10 is below the"),
    ("model.mask_token_id=77", "model.mask_token_id: 77 given"),
    ("data.val_sequences=0", "error: data.val_sequences: "),
    ("data.workers=-1", "error: data.workers: "),
    ("run.keep_checkpoints=0", "error: run.keep_checkpoints: "),
    ("model.optimizer.betas=[0.9, 2.0]", "betas must lie in [0, 1)"),
    ("seed_everything=true", "seed_everything: True given"),
    ("model.schedule.warmup_steps=5000", "warmup ends at step 5000"),
]


@pytest.mark.parametrize(("setting", "words"), MISTAKES)
def test_a_setting_of_a_fit_that_cannot_be(fit, setting: str, words: str) -> None:
    assert words in fit(f"--{setting}")


def test_no_module(fails) -> None:
    assert "give --model ArmModule or LladaModule" in fails("fit", "--budget.flops=1e9")
    assert "--config of a run" in fails("validate")


def test_shards_with_foreign_tokens(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found when they are read, by a worker too, also where the checksums are those of the damage."""
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    for shard in (copy / "train").glob("*.bin"):
        content = bytearray(shard.read_bytes())
        content[100:] = b"\xff" * len(content[100:])
        shard.write_bytes(bytes(content))
    seal(copy)
    for workers in (0, 1):
        arguments = [f"--data.path={copy}", f"--run.root={tmp_path / 'runs'}", f"--data.workers={workers}", *SMALL]
        assert main(["fit", "--model=ArmModule", *arguments, "--budget.flops=1e10"]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: data.path: sequence")
        assert line.endswith("the shards are damaged: prepare the corpus again")


@pytest.mark.parametrize(
    "config",
    [{"modell": {}}, {"modell": {"shape": "107k"}}, {"trainer": {"max_stepps": 3}}, {"trainer": {"max_stepps": {}}}],
)
def test_an_unknown_key_of_a_file(fails, tmp_path: Path, config: dict) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    line = fails("fit", f"--config={path}", "--model=ArmModule")
    assert "modell" in line or "max_stepps" in line
    if {} not in config.values() and {} not in config.get("trainer", {}).values():
        assert line.endswith(("; the nearest is --model.shape" + SEE, "; the nearest is --trainer.max_steps" + SEE))


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["validate", "--ckptpath=x", "--model=ArmModule"], "--ckpt_path"),
        (["generate", "x", "--lenght=4"], "--length"),
        (["plan", "--flops=1e9", "--centre-amr=3"], "--centre-arm"),
        (["collect", "a", "--outt", "x"], "--out"),
        (["launch", "--lanucher=x", "--", "fit"], "--launcher"),
    ],
)
def test_a_misspelt_option_of_any_verb_is_told_the_nearest(fails, words: list[str], near: str) -> None:
    assert f"; the nearest is {near}; see 'llada " in fails(*words)


def test_a_configuration_that_is_not_there(fails, tmp_path: Path) -> None:
    fix = "give the path of a configuration, such as a run's config.yaml"
    assert fails("validate", f"--config={tmp_path}/none.yaml").endswith(f"none.yaml' does not exist; {fix}")
    assert fails("fit", f"--config={tmp_path}").endswith(f"' is no file; {fix}")


def test_an_unknown_module(fails) -> None:
    assert "LladaModul given; expected ArmModule, LladaModule" in fails("fit", "--model=LladaModul")
    assert "which one is not said; expected ArmModule" in fails("fit", "--model.init_args.shape=107k")


def test_an_agent_may_hand_over_arguments_in_any_order(prepared: Path, tmp_path: Path) -> None:
    from llada_lightning.training.fit import run_folder

    common = [f"--data.path={prepared}", "--data.sequence_length=32", f"--run.root={tmp_path}", "--budget.flops=1e10"]
    settings = ["--model.init_args.shape=107k", "--model.rope_theta=500"]
    first = run_folder(["fit", "--model=ArmModule", *settings, *common])
    assert run_folder(["fit", *settings, *common, "--model=ArmModule"]) == first


def test_a_missing_data_folder(fit, tmp_path: Path) -> None:
    assert "llada prepare" in fit(data=str(tmp_path / "absent"))


def test_a_foreign_data_folder(fit, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    assert "llada prepare" in fit(data=str(tmp_path / "foreign"))


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_shard(fit, prepared: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = sorted((copy / "train").glob("*.bin"))[1]
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:100])
    assert shard.name in fit(data=str(copy))


@pytest.mark.parametrize(
    "setting",
    [
        "fast_dev_run=true", "limit_train_batches=4", "limit_val_batches=0", "overfit_batches=1", "max_epochs=2",
        "min_steps=100", "gradient_clip_algorithm=value", "accumulate_grad_batches=0", "log_every_n_steps=0",
        "precision=16-mixed", "devices=0", "strategy=none_such", "accelerator=none_such",
    ],
)  # fmt: skip
def test_a_trainer_setting_that_breaks_the_contract(fit, setting: str) -> None:
    assert setting.split("=")[0].split("_")[0] in fit(f"--trainer.{setting}").lower()


def test_a_runs_folder_that_cannot_be(fit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in fit(f"--run.root={tmp_path / 'file'}")


def test_prepare_into_a_foreign_folder(fails, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    line = fails("prepare", "--source=python-stdlib", f"--out={tmp_path / 'mine'}")
    assert "is not a prepared data folder; choose another --out" in line


def test_validation_without_a_checkpoint(fails, prepared: Path) -> None:
    line = fails("validate", "--model=ArmModule", f"--data.path={prepared}", "--trainer.accelerator=cpu")
    assert "ckpt_path: nothing to validate" in line


def test_an_empty_corpus(fails, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails("prepare", f"--source={tmp_path / 'empty'}", f"--out={tmp_path / 'out'}")


def test_a_vocabulary_without_mask(fails, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "[EOS]": 2}, merges=[]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b a b")
    line = fails(
        "prepare", f"--source={tmp_path / 'text.txt'}", f"--out={tmp_path / 'out'}",
        f"--tokenizer={tmp_path / 'tokenizer.json'}",
    )  # fmt: skip
    assert "--add-mask-token" in line


def test_a_sweep_file_that_is_not_there(fails, tmp_path: Path) -> None:
    fails("sweep", "run", str(tmp_path / "absent.yaml"))


# --- a stdout that is closed by its reader, or full -------------------------------------------------------------------

Captured = pytest.CaptureFixture[str]
PRINTERS: list[Callable[[], object]] = [
    lambda: print("left in the buffer"),
    lambda: print("at once", flush=True),
    lambda: print_json({"long": "x" * 100_000}),
    lambda: people_console().print("a table"),
    lambda: sys.exit(print("help")),  # type: ignore[func-returns-value]
]


@pytest.fixture(params=range(len(PRINTERS)))
def printer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that prints in one of the ways there are, and ends well."""
    monkeypatch.setattr(cli, "_dispatch", lambda _: 0 if PRINTERS[request.param]() is None else 1)


def test_a_pipe_that_nobody_reads_ends_the_command_quietly(
    printer: None, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert cli.main([]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
def test_a_full_disk_behind_stdout_is_one_line(
    printer: None, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert cli.main([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "No space left on device" in err and err.count("\n") == 1


def test_a_broken_pipe_that_is_not_stdout_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_dispatch", breaks)
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        with pytest.raises(BrokenPipeError):
            cli.main([])
