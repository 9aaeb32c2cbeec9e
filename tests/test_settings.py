"""What a user types or exports: values that no run has are refused by one line, before anything is built."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from llada_lightning.commands.main import main, refusal
from llada_lightning.data.loading import require_open_files
from llada_lightning.settings import MAX_SEED, NOT_RUNS, check_folder_name
from llada_lightning.study.plan import outputs as plan_files
from llada_lightning.study.sweep import MAX_RUNS, expand_grid
from llada_lightning.support.command_line import refuse_unusable
from llada_lightning.support.errors import UserError
from llada_lightning.training.callbacks.leaving import fault_of_a_callback

RUN = [
    "--model=ArmModule",
    "--model.shape=L1-d32-h1-kv1-ff64",
    "--model.schedule.warmup_steps=1",
    "--data.sequence_length=32",
    "--data.global_batch=4",
    "--data.val_sequences=8",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false",
]


@pytest.fixture
def refused(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A fit of six steps with further arguments; returns the one line that refuses it, before anything is written."""

    def run(*arguments: str, steps: int = 6) -> str:
        common = [*RUN, f"--data.path={prepared}", f"--run.root={tmp_path / 'runs'}", f"--trainer.max_steps={steps}"]
        assert main(["fit", *common, *arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "runs").exists()
        return line.removeprefix("error: ")

    return run


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.gradient_clip_val", "nan"),
        ("model.rope_theta", "inf"),
        ("model.optimizer.weight_decay", "inf"),
        ("budget.tokens", "nan"),
        ("run.checkpoint_every_minutes", "inf"),
    ],
)
def test_every_number_that_is_not_finite_is_refused_where_it_is(refused, key: str, value: str) -> None:
    assert refused(f"--{key}=.{value}") == f"{key}: {value} given; it must be a finite number"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner, max_size=3),
    )
)
def test_finite_settings_pass_and_one_infinite_value_among_them_does_not(value: Any) -> None:
    refuse_unusable(value, "x")
    for nested in ([value, float("nan")], {"a": {"b": [value, {"c": float("-inf")}]}}, (value, 2**63), [value, "a\0b"]):
        with pytest.raises(UserError, match=r"^x\S*: .* given; "):
            refuse_unusable(nested, "x")


def test_a_callback_may_wait_for_an_infinite_value() -> None:
    refuse_unusable({"callbacks": [{"class_path": "Mine", "init_args": {"best": float("inf")}}]}, "trainer")


@pytest.mark.parametrize(("option", "value"), [("--flops", "nan"), ("--lr", "inf"), ("--tokens-per-param", "inf")])
def test_a_plan_takes_finite_numbers_only(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--vocab-size", "500", "--flops", "1e12", option, value]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert value in line and option.strip("-").replace("-", "_") in line.replace("-", "_")


@pytest.mark.parametrize("theta", ["0", "-1"])
def test_rotary_frequencies_need_a_base_above_zero(refused, theta: str) -> None:
    assert refused(f"--model.rope_theta={theta}").startswith(f"model.rope_theta: {float(theta)} given; ")


def test_betas_are_refused_in_a_short_line(refused) -> None:
    assert refused("--model.optimizer.betas=[1.5,0.9]").startswith("model.optimizer: betas (1.5, 0.9), eps 1e-08, ")
    line = refused("--model.optimizer.betas=[1,2,3]")
    assert line.startswith("model.optimizer.betas: [1, 2, 3] given; expected tuple with 2 elements; see 'llada fit ")


@pytest.mark.parametrize("key", ["seed_everything", "model.seed", "data.val_seed"])
@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seeds_that_numpy_does_not_take(refused, key: str, seed: int) -> None:
    assert refused(f"--{key}={seed}") == f"{key}: {seed} given; it must lie between 0 and {MAX_SEED}"


def test_a_plan_writes_no_sweep_with_such_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (-1, MAX_SEED + 1):
        assert main(["plan", "--vocab-size", "500", "--flops", "1e12", "--seeds", str(seed)]) == 2
        assert f"plan: --seeds: {seed} given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--trainer.val_check_interval=0", "trainer.val_check_interval: 0 given; it must be a whole number"),
        ("--trainer.val_check_interval=00:01:00:00", "trainer.val_check_interval: 00:01:00:00 given"),
        ("--data.workers=100000", "data.workers: 100000 must be at most 256"),
        ("--trainer.devices=100000", "trainer.devices: 100000 given; 256 processes"),
        ("--data.global_batch=1099511627776", "data.global_batch: 1099511627776 must be at most"),
        ("--model.shape=L100000000-d64-h1-kv1-ff64", "shape: n_layers is 100000000; it must be at most"),
        ("--model.vocab_size=1000000000000", "model.vocab_size: 1000000000000 given; it must lie between"),
    ],
)
def test_sizes_that_no_machine_has(refused, argument: str, said: str) -> None:
    assert refused(argument).startswith(said)


def test_budgets_that_nobody_has(refused) -> None:
    assert refused("--budget.flops=1e300", steps=-1) == "budget.flops: 1e+300 FLOPs given; 1e+30 are the most"
    assert "makes a run of" in refused("--budget.flops=1e29", steps=-1)
    assert refused("--budget.tokens=1e300", steps=-1).startswith("budget.tokens: 1e+300 makes a run of")
    many = refused(f"--budget.flops={[1e9 + i for i in range(3000)]}", steps=-1)
    assert many.startswith("budget.flops: [1000000000.0") and len(many) < 400


def test_plans_that_nobody_makes(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["1e300"], ["1e12"] * 100_000):
        assert main(["plan", "--vocab-size", "500", "--flops", *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert len(line) < 200


def test_whole_numbers_stay_whole_whatever_was_imported_first(prepared: Path, tmp_path: Path) -> None:
    """The name of a run holds them: `1` must not become 1.0."""
    python = (
        "from typing import Optional, Union; Optional[Union[float, int]]\n"
        "import sys; from llada_lightning.training.cli import LladaCLI\n"
        "trainer = LladaCLI(sys.argv[1:], execute=False).settings.trainer\n"
        "print(repr([trainer.gradient_clip_val, trainer.val_check_interval, trainer.limit_predict_batches]))"
    )
    given = ["--trainer.gradient_clip_val=1", "--trainer.val_check_interval=3", "--trainer.limit_predict_batches=0.5"]
    arguments = ["fit", *RUN, f"--data.path={prepared}", "--trainer.max_steps=3", *given]
    done = subprocess.run([sys.executable, "-c", python, *arguments], capture_output=True, text=True, timeout=240)
    assert done.stdout == "[1, 3, 0.5]\n", done.stderr


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*sorted(NOT_RUNS), ".x", "", ".", "..", "a/b", "a\nb", "a\0b", "x" * 256, "a*b", "<b>"]
)
def test_a_run_that_nobody_would_find_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^run\.name: '.*' given; .*; choose another name$"):
        check_folder_name("run.name", name)


@pytest.mark.parametrize("name", ["arm-443k-1e+12flops-0a1b2c3d4e", "toy", "x" * 200, "Größe 2"])
def test_other_names_pass(name: str) -> None:
    check_folder_name("run.name", name)
    check_folder_name("run.study", f"{name}/{name}", nested=True)


@pytest.mark.parametrize("name", ["<b>x</b>", "a//b", "/a", "a/", "../a", 'a/"b"', "a\\b"])
def test_a_study_is_a_folder_or_a_relative_path_of_folders(name: str) -> None:
    with pytest.raises(UserError, match=r"^run\.study: '.*' given; .*; choose another name$"):
        check_folder_name("run.study", name, nested=True)


def test_a_sweep_with_such_a_study_makes_no_folder(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        f"command: [llada, fit, --model=ArmModule, --model.shape=L1-d8-h1-kv1-ff16, --data.path={prepared}, "
        f"--data.sequence_length=8, --trainer.max_steps=1, '--run.study=<b>x</b>', '--run.root={tmp_path / 'runs'}', "
        "'${args}']\nmethod: grid\nparameters:\n  seed_everything: {value: 0}\n"
    )
    (tmp_path / "sweep.yaml").write_text(text)
    assert main(["sweep", "run", str(tmp_path / "sweep.yaml"), "--jobs=1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "run.study: '<b>x</b>' given; the name of a folder must not contain < >; choose another name" in error
    assert not (tmp_path / "runs").exists()


def test_names_are_checked_by_fit_and_by_plan(refused, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("--run.name=logs").startswith("run.name: 'logs' given; such names are those of")
    assert refused("--run.study=a/.b").startswith("run.study: 'a/.b' given; ")
    assert refused("--run.study=<b>x</b>").startswith("run.study: '<b>x</b>' given; the name of a folder must not")
    assert main(["plan", "--vocab-size", "500", "--flops", "1e18", "--study", "wandb"]) == 2
    assert "plan: --study: 'wandb' given" in capsys.readouterr().err


def test_paths_too_long_for_the_file_system(refused, tmp_path: Path) -> None:
    long = "x" * 300
    for argument in (f"--model.weights={long}", f"--ckpt_path={long}", f"--data.path={long}"):
        line = refused(argument)
        assert "File name too long" in line or "cannot be read" in line


def test_a_line_break_of_a_path_does_not_cut_its_message(refused) -> None:
    assert refused("--data.path=first\nsecond").startswith("data folder 'first second' does not exist")


# --- files of settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"model: &a\n  class_path: ArmModule\n  init_args: *a\n", "the anchor 'a' refers to itself in line 3"),
        (b"model: " + b"{a: " * 3000 + b"1" + b"}" * 3000, "nested too deeply"),
        (b"run:\n  name: caf\xe9\n", "is not UTF-8: byte 0xe9 in line 2"),
        (
            b"run: {name: a}\nbudget: {flops: 1}\nrun: {name: b}\n",
            "the key 'run' is given in line 1 and again in line 3",
        ),
    ],
)
def test_configurations_that_no_parser_should_read(refused, tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    line = refused(f"--config={path}")
    assert said in line and f"'{path}'" in line


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({f"p{i}": {"values": list(range(10))} for i in range(9)}, "the grid has 1,000,000,000 runs"),
        ({"a": {"parameters": {n: {"values": list(range(400))} for n in "bc"}}}, "the grid has 160,000 runs"),
        ({"a": {"value": 1, "distribution": ["x"]}}, "distribution \\['x'\\] is no grid"),
    ],
)
def test_grids_that_nobody_runs(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        expand_grid(parameters)
    assert len(expand_grid({"a": {"values": list(range(MAX_RUNS))}})) == MAX_RUNS


@pytest.mark.parametrize("command", [5, {"a": 5}, "llada fit"])
def test_a_sweeps_command_is_a_list_of_words(tmp_path: Path, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"method": "grid", "command": command, "parameters": {"a": {"value": 1}}}))
    assert main(["sweep", "run", str(path)]) == 2
    assert "sweep: command must be a list of words, not " in capsys.readouterr().err


@pytest.mark.parametrize("path", [5, {"data": "x"}, {"data": -1}, {}])
def test_a_base_names_folders_and_weights(tmp_path: Path, path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"data": {"init_args": {"path": path}}}))
    assert main(["plan", "--flops", "1e12", "--base", str(base)]) == 2
    assert "base: data.init_args.path" in capsys.readouterr().err


def test_a_full_disk_leaves_neither_sweep_nor_table(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if path.suffix == ".csv":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(plan_files.Path, "write_text", full)
    out = tmp_path / "out" / "s.yaml"
    words = ["--sequence-length", "64", "--shapes", "107k", "214k", "443k", "--data", str(prepared), "--out", str(out)]
    assert main(["plan", "--flops", "1e11", "2e11", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"'{out.with_suffix('.csv')}' cannot be written (No space left on device)" in line
    assert list(out.parent.iterdir()) == []


# --- environment -----------------------------------------------------------------------------------------------------


def test_a_run_of_one_process_is_the_first_whatever_rank_the_environment_names(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning sets it when it is imported
    common = [*RUN, f"--data.path={prepared}", f"--run.root={tmp_path}", "--run.name=run", "--trainer.max_steps=3"]
    assert main(["fit", *common, "--trainer.log_every_n_steps=1"]) == 0
    folder = tmp_path / "default" / "run"
    assert {"config.yaml", "tokenizer.json", "result.json", "validation.csv"} <= {p.name for p in folder.iterdir()}
    assert len((folder / "metrics.csv").read_text().splitlines()) >= 4
    assert "result.json" in capsys.readouterr().err
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert main(["validate", f"--config={folder / 'config.yaml'}"]) == 0
    assert "nats/token" in capsys.readouterr().out
    assert main(["validate", f"--config={folder / 'config.yaml'}", "--trainer.limit_val_batches=0"]) == 2
    assert "no sequence to validate" in capsys.readouterr().err
    assert main(["fit", *common, "--run.name=logs"]) == 2
    assert "error: run.name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "first"}, "RANK: 'first' given"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' given"),
        ({"SLURM_NTASKS": "two"}, "SLURM_NTASKS: 'two' given"),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE: not set"),
    ],
)
def test_variables_of_launchers_are_numbers(
    refused, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert refused().startswith(said)


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--wandb.project=team/project"], {}, "Invalid project name 'team/project'"),
        (["--wandb.project=a#b", "--wandb.offline=true"], {}, "Invalid project name 'a#b'"),
        (["--wandb.project=p"], {"WANDB_RUN_ID": "a/b"}, "Run ID cannot contain"),
        (["--wandb.project=p"], {"WANDB_FINISH_TIMEOUT": "60s"}, "WANDB_FINISH_TIMEOUT: '60s' given; it must be"),
        (["--wandb.project=p"], {"WANDB_FINISH_TIMEOUT": ""}, "WANDB_FINISH_TIMEOUT: '' given; it must be"),
        (["--wandb.project=p"], {"WANDB_INIT_TIMEOUT": "nan"}, "WANDB_INIT_TIMEOUT: 'nan' given; it must be"),
    ],
)
def test_what_wandb_would_refuse_is_refused_before_the_run(
    refused, monkeypatch: pytest.MonkeyPatch, arguments: list[str], variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert said in refused(*arguments)
    if variables:  # without W&B they mean nothing: the next mistake is found
        assert refused("--run.name=logs").startswith("run.name")


def test_workers_need_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(32, 1024)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    require_open_files(0)
    require_open_files(2)
    assert limits[1:] == [(192, 1024)]

    def refuse(*_: Any) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, 32))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(UserError, match=r"data\.workers: 2 given, which needs 192 open files, but the limit is 32"):
        require_open_files(2)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOMEM, "free memory"),
        (errno.EAGAIN, "fewer workers"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.ENOSPC, "free space"),
    ],
)
def test_what_the_system_refuses_has_its_own_remedy(code: int, remedy: str) -> None:
    line = refusal(OSError(code, "reason", "p" * 5000))
    assert line is not None and remedy in line and len(line) < 500
    assert refusal(OSError(errno.EBADF, "reason")) is None


# --- callbacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callback", ["EarlyStopping", "ModelCheckpoint"])
def test_a_metric_that_nobody_logs_is_named_at_the_start(refused, callback: str) -> None:
    line = refused(f"--trainer.callbacks+={callback}", "--trainer.callbacks.monitor=val_loss")
    assert line == (
        f"trainer.callbacks: {callback} monitors 'val_loss', which is not logged; the metrics are "
        "val_nats_per_token, val_stderr, val_bits_per_byte"
    )


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--trainer.logger=CSVLogger", "trainer.logger: CSVLogger lacks save_dir; give --trainer.logger.save_dir"),
        (
            "--trainer.callbacks+=EarlyStopping",
            "trainer.callbacks: EarlyStopping lacks monitor; give --trainer.callbacks.monitor",
        ),
    ],
)
def test_an_argument_that_a_class_lacks_is_named(refused, option: str, line: str) -> None:
    assert refused(option) == f"{line}; see 'llada fit --help'"


def test_a_class_that_cannot_be_built_says_why(refused) -> None:
    line = refused("--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=-1.0")
    assert line.startswith("'lightning.pytorch.callbacks.StochasticWeightAveraging' cannot be built (")
    assert line.endswith("); correct its arguments, or install what it needs") and "Namespace" not in line


def test_a_callback_that_does_not_fit_is_the_users_mistake(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*RUN, f"--data.path={prepared}", f"--run.root={tmp_path}", "--trainer.max_steps=3"]
    assert main(["fit", *common, "--trainer.callbacks+=BackboneFinetuning"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "error: trainer.callbacks: BackboneFinetuning: 'ArmModule' object has no attribute 'backbone'"
    )


class Own(Callback):
    """A callback of a user's."""

    def setup(self, *_: Any) -> None:
        raise self.error

    error: Exception = RuntimeError("needs two\nGPUs")


def test_whose_error_it_is() -> None:
    def caught(error: Exception, callback: Any = None) -> Exception:
        callback = callback or Own()
        callback.error = error
        try:
            callback.setup()
        except Exception as raised:
            return raised
        raise AssertionError

    line = fault_of_a_callback(caught(RuntimeError("needs two\nGPUs")))
    assert line is not None and line.startswith("trainer.callbacks: Own (") and line.endswith(": needs two GPUs")
    assert fault_of_a_callback(caught(KeyError("a fault of its code"))) is None
    assert fault_of_a_callback(caught(UserError("ours"))) is None
    assert fault_of_a_callback(caught(RuntimeError("ours"), SimpleNamespace(setup=_raise))) is None


def _raise() -> None:
    raise RuntimeError("ours")
