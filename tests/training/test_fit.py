"""`llada fit`: a run's folder, its accounting, and what it does when started again."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import yaml

from helpers.small_corpora import forgetful_tokenizer, write_corpus
from helpers.tiny_runs import MODELS, fit, fit_arguments, fit_process, losses, metrics, record, weights
from llada_lightning.checkpoints.run_folder import saved_identity
from llada_lightning.commands.main import main
from llada_lightning.compute.schedule import WSD
from llada_lightning.compute.shapes import Shape
from llada_lightning.data.manifest import read_manifest
from llada_lightning.data.prepare import prepare
from llada_lightning.records import RESULT_COLUMNS
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.modules import ArmModule, LladaModule

SHAPE = Shape(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64)


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(request.param, prepared, tmp_path_factory.mktemp(request.param))


def test_the_run_folder_holds_what_the_design_lists(run: Path) -> None:
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "metrics.csv", "checkpoints", "result.json", "validation.csv", "tokenizer.json",
    }  # fmt: skip
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step=00000020.ckpt", "step=00000024.ckpt"]


def test_the_record_is_complete_and_adds_up(run: Path, prepared: Path) -> None:
    found = record(run)
    assert tuple(found) == RESULT_COLUMNS
    manifest = read_manifest(str(prepared))
    n, vocabulary = SHAPE.params_nonembedding, manifest.tokenizer.vocab_size
    causal = found["objective"] == "arm"
    assert found["params_nonembedding"] == n
    assert found["params_total"] == n + 2 * vocabulary * 32
    assert found["steps"] == 24
    assert 0.8 * 24 * 256 < found["tokens"] < 24 * 256  # a tenth of the sequences are short
    assert found["flops_6nd"] == 6 * n * found["tokens"]
    assert found["flops_attention"] == 12 * 2 * 32 * 32 * found["tokens"] / (2 if causal else 1)
    share = 1 if causal else (1 + 1e-3) / 2
    assert found["flops_head"] == pytest.approx(6 * 32 * vocabulary * found["tokens"] * share)
    parts = found["flops_6nd"] + found["flops_attention"] + found["flops_head"]
    assert found["flops_total"] == pytest.approx(parts)
    assert found["val_kind"] == ("exact" if causal else "bound")
    assert found["val_stderr"] > 0
    bytes_per_token = manifest.splits["val"].bytes / manifest.splits["val"].tokens
    assert found["val_bits_per_byte"] == pytest.approx(found["val_nats_per_token"] / math.log(2) / bytes_per_token)
    assert found["data_fingerprint"] == manifest.fingerprint
    assert found["status"] == "done"
    assert found["mfu"] is None  # a CPU's peak is not known


def test_metrics_have_one_row_a_step_and_the_validation(run: Path) -> None:
    rows = metrics(run)
    assert [int(row["step"]) for row in rows] == list(range(1, 25))
    assert float(rows[-1]["val_nats_per_token"]) == pytest.approx(record(run)["val_nats_per_token"])
    assert [int(row["step"]) for row in rows if row["val_nats_per_token"]] == [7, 14, 21, 24]
    assert float(rows[0]["lr"]) == 0
    assert float(rows[1]["lr"]) == 0.01  # 5 % of 24 steps: one step of warmup
    assert int(rows[-1]["tokens"]) == record(run)["tokens"]


def test_the_loss_falls(run: Path) -> None:
    curve = losses(run)
    assert sum(curve[-4:]) < sum(curve[:4])


def test_started_again_a_finished_run_does_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.csv").read_bytes()
    assert main(["fit", f"--config={run / 'config.yaml'}"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (run / "metrics.csv").read_bytes() == before


def test_the_resolved_configuration_says_everything(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    schedule = config["model"]["init_args"]["schedule"]
    assert config["trainer"]["max_steps"] == schedule["total_steps"] == 24
    assert schedule["warmup_steps"] == 1
    assert schedule["decay_steps"] == 5
    assert config["model"]["init_args"]["mask_token_id"] is not None
    assert config["model"]["init_args"]["seed"] == config["data"]["init_args"]["seed"] == 0


def test_a_checkpoint_is_validated_to_the_same_figure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = [f"--ckpt_path={run / 'checkpoints' / 'step=00000024.ckpt'}"]
    for extra in ([], named):
        assert main(["validate", f"--config={run / 'config.yaml'}", *extra]) == 0
        assert f"{record(run)['val_nats_per_token']:.4f}" in capsys.readouterr().out


def test_predictions_average_to_the_validation_loss(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["predict", f"--config={run / 'config.yaml'}"]) == 0
    nats = [float(line) for line in capsys.readouterr().out.splitlines() if line.replace(".", "").isdigit()]
    assert len(nats) == 24
    assert sum(nats) / 24 / 32 == pytest.approx(record(run)["val_nats_per_token"], abs=1e-5)


@pytest.mark.parametrize(("convention", "key"), [("6nd", "flops_6nd"), ("total", "flops_total")])
def test_a_budget_is_spent_by_its_convention(prepared: Path, tmp_path: Path, convention: str, key: str) -> None:
    arguments = [a for a in fit_arguments("llada", prepared, tmp_path) if "max_steps" not in a]
    budget = ["--budget.flops=2e9", f"--budget.convention={convention}", "--data.random_length_share=0"]
    assert main([*arguments, *budget]) == 0
    found = record(tmp_path / "test" / "run")
    assert found[key] == pytest.approx(2e9, rel=0.5 / found["steps"] + 1e-9)


def test_a_run_is_named_by_its_configuration(prepared: Path, tmp_path: Path) -> None:
    from llada_lightning.training.fit import run_folder

    base = [a for a in fit_arguments("arm", prepared, tmp_path) if not a.startswith("--run.name")]
    name = run_folder(base).name
    machine = ["--data.workers=1", "--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=3"]
    machine.append("--data.document_mask=false")  # as older runs have it, whose identity lacks the option
    assert run_folder([*base, *machine]).name == name
    assert name.startswith("arm-L2-d32-h2-kv1-ff64-6.5e+08flops-")
    for change in ("--seed_everything=1", "--data.global_batch=4", "--model.schedule.lr=0.02", "--trainer.max_steps=9"):
        assert run_folder([*base, change]).name != name
    assert run_folder([*base, "--data.document_mask=true"]).name != name


def test_a_run_within_documents_is_another_run(run: Path, prepared: Path, tmp_path: Path) -> None:
    folder = fit(str(record(run)["objective"]), prepared, tmp_path, "--data.document_mask=true")
    assert record(folder)["flops_total"] == record(run)["flops_total"]
    assert losses(folder) != losses(run)
    assert record(folder)["val_nats_per_token"] == pytest.approx(record(run)["val_nats_per_token"], abs=0.3)
    options = [saved_identity(one / "checkpoints" / "step=00000024.ckpt")["data"] for one in (folder, run)]
    assert options[0] == {**options[1], "document_mask": True} and "document_mask" not in options[1]


def test_the_same_length_by_flops_or_steps_is_the_same_run(prepared: Path, tmp_path: Path) -> None:
    from llada_lightning.training.fit import run_folder

    base = [a for a in fit_arguments("arm", prepared, tmp_path) if "run.name" not in a and "max_steps" not in a]
    names = {run_folder([*base, how]).name for how in ("--budget.flops=6.40e8", "--budget.flops=6.41e8")}
    assert len(names) == 1


def test_seconds_of_training_leave_none_out(prepared: Path, tmp_path: Path) -> None:
    """Validations off the log's grid must not swallow the steps before them."""
    folder = fit("arm", prepared, tmp_path, "--trainer.log_every_n_steps=24", "--trainer.val_check_interval=2")
    state = torch.load(folder / "checkpoints" / "step=00000024.ckpt")["callbacks"]["Accounting"]
    assert 0.2 * state["wall_seconds"] < state["train_seconds"] < state["wall_seconds"]
    assert record(folder)["tokens_per_second"] == pytest.approx(state["tokens"] / state["train_seconds"], rel=0.2)


@pytest.mark.parametrize("change", ["--model=LladaModule", "--model.rope_theta=500"])
def test_another_models_checkpoint_is_not_validated(
    prepared: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit("arm", prepared, tmp_path, "--trainer.max_steps=4")
    capsys.readouterr()
    model = change if change.startswith("--model=") else "--model=ArmModule"
    arguments = [a for a in fit_arguments("arm", prepared, tmp_path) if a.startswith("--data")]
    shape = "--model.shape={n_layers: 2, d_model: 32, n_heads: 2, n_kv_heads: 1, d_ff: 64}"
    checkpoint = folder / "checkpoints" / "step=00000004.ckpt"
    settings = [model, shape, *([] if change == model else [change]), *arguments, "--trainer.accelerator=cpu"]
    config = folder / "config.yaml"
    for verb, extra, otherwise in [
        ("validate", [], "give another one"),
        ("test", ["--run.name=other"], "leave --ckpt_path out"),
        ("predict", [], "give another one"),
    ]:
        assert main([verb, *settings, f"--ckpt_path={checkpoint}", *extra]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: checkpoint: '{checkpoint}' is of another run (model.")
        assert said.endswith(f"; give --config '{config}' to {verb} it, or {otherwise}\n")
    assert main(["validate", "--config", str(config), f"--ckpt_path={checkpoint}"]) == 0  # as it says


def test_both_objectives_share_initial_weights_and_data(prepared: Path, tmp_path: Path) -> None:
    """The first step's rate is 0, so after it the weights are the initial ones."""
    one_step = ("--trainer.max_steps=1", "--model.schedule.warmup_steps=1", "--model.schedule.decay_steps=0")
    folders = {o: fit(o, prepared, tmp_path / o, *one_step) for o in MODELS}
    arm, llada = (weights(folders[o], step=1) for o in MODELS)
    assert arm.keys() == llada.keys()
    assert all(torch.equal(arm[key], llada[key]) for key in arm)
    assert record(folders["arm"])["tokens"] == record(folders["llada"])["tokens"]


@pytest.mark.parametrize("module_class", [ArmModule, LladaModule])
def test_weight_decay_is_on_matrices_only(module_class: type[LanguageModule]) -> None:
    module = module_class(shape=vars(SHAPE), vocab_size=64, schedule=WSD(lr=1.0).resolve(10, 100.0, 1.0))
    module.configure_model()
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim == 2 for p in groups[0]["params"])
    assert all(p.ndim == 1 for p in groups[1]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(module.parameters()))


def test_bits_per_byte_are_left_out_where_tokens_do_not_give_the_text_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, tokenizer = write_corpus(tmp_path / "text"), forgetful_tokenizer(tmp_path / "tokenizer")
    prepare(
        str(source), tmp_path / "data", tokenizer=tokenizer, eos_token="[SEP]", val_fraction=0.15, progress=False
    )  # arithmetic in lines, which the tokenizer joins
    folder = fit("llada", tmp_path / "data", tmp_path, "--trainer.max_steps=4")
    said = capsys.readouterr().err
    assert said.count("of the text's bytes do not come back from its tokens; bits per byte are left out") == 1
    assert "bits/byte" not in said
    found = record(folder)
    assert found["val_bits_per_byte"] is None
    assert found["val_nats_per_token"] > 0
    assert {row["val_bits_per_byte"] for row in metrics(folder)} == {""}


def test_wandb_offline_logs_beside_the_csv(prepared: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = fit("arm", prepared, tmp_path, "--wandb.project=test", "--wandb.offline=true", "--trainer.max_steps=4")
    assert list((folder / "wandb").glob("offline-run-*"))
    assert len(metrics(folder)) == 4


def test_wandb_out_of_reach_does_not_stop_the_run(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for leftover in [name for name in os.environ if "WANDB" in name]:  # of an offline run in this process
        monkeypatch.delenv(leftover)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    done = fit_process("arm", prepared, tmp_path, "--wandb.project=test", "--trainer.max_steps=4")
    assert done.returncode == 0, done.stderr
    assert "this run is logged offline" in done.stderr
    assert record(tmp_path / "test" / "run")["status"] == "done"


def test_a_run_that_diverges_says_so(prepared: Path, tmp_path: Path) -> None:
    settings = {"--model.schedule.lr": "1e30", "--trainer.gradient_clip_val": "null", "--guard.patience": "3"}
    folder = fit("arm", prepared, tmp_path, *(f"{k}={v}" for k, v in settings.items()), "--trainer.max_steps=6")
    found = json.loads((folder / "result.json").read_text())[0]
    assert found["status"] == "diverged"
    assert found["val_nats_per_token"] is None
    assert found["val_stderr"] is None
