"""What an earlier version made is what this version makes: names, losses bit for bit, checkpoints, converted folders.

The fixtures are in ``golden_runs/``; ``golden_runs/make.py`` states how they were made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from golden_runs import workplace
from golden_runs.make import inference, prepare, run_names
from golden_runs.package import LONE_FIT_RULES, main, resolved
from golden_runs.workplace import CHECKPOINT_STEP, GOLDEN, OBJECTIVES, ROOT, RUNS, assert_same, outcome, restore
from llada_lightning import read_results

CASES = workplace.cases()
SWEEPS = [ROOT / "sweeps" / name for name in sorted(json.loads((GOLDEN / "sweeps.json").read_text()))]
TWINS = {name for name in CASES if name.startswith("arm-") and name.replace("arm-", "llada-", 1) in CASES} - set(RUNS)
"""Cases that a case of the other objective also shows."""
ONE_OBJECTIVE = [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("arm-") else []) for name in RUNS]
"""All runs, of which one objective's are fast: for what does not depend on the objective."""


def committed(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for tests that write nothing into it."""
    folder = tmp_path_factory.mktemp("laid_out")
    workplace.lay_out(folder)
    return folder


@pytest.fixture
def place(laid_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: what the commands read, and no run."""
    for path in laid_out.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draws_initial_weights_alike() -> bool:
    """Whether torch's truncated normal numbers are those of the fixtures: until 2.9 they were others."""
    [first] = torch.nn.init.trunc_normal_(torch.empty(1), generator=torch.Generator().manual_seed(7)).tolist()
    return bool(first == pytest.approx(-0.1468, abs=1e-4))


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_the_same_command_gives_the_same_name_and_the_same_numbers(place: Path, name: str) -> None:
    assert main(workplace.command(name)) == 0
    found = outcome(place / "runs" / "golden" / workplace.run_name(name))
    if RUNS[name][1] != "sft" and not draws_initial_weights_alike():
        pytest.skip("this torch draws other initial weights from the same seed")
    assert_same(found, outcome(GOLDEN / name))


@pytest.mark.parametrize("name", RUNS)
def test_an_old_configuration_resumes_from_an_old_checkpoint_to_the_same_numbers(
    place: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = restore(name, place, done=False)
    assert main(["fit", f"--config={run / 'config.yaml'}"]) == 0
    assert f"step={CHECKPOINT_STEP:08d}.ckpt" in capsys.readouterr().err, "the run must not start anew"
    assert_same(outcome(run), outcome(GOLDEN / name))


@pytest.mark.parametrize("name", ONE_OBJECTIVE)
def test_an_old_run_is_found_done(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = restore(name, place, done=True)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["fit", f"--config={run / 'config.yaml'}"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("name", ONE_OBJECTIVE)
def test_an_old_checkpoint_has_the_validation_loss_of_its_step(
    place: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = restore(name, place, done=True)
    assert main(["validate", f"--config={run / 'config.yaml'}", "--trainer.logger=false"]) == 0
    [row] = [row for row in outcome(run)["metrics"][""] if row["step"] == CHECKPOINT_STEP]
    printed = [float(number) for number in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
    keys = ("val_nats_per_token", "val_stderr", "val_bits_per_byte")
    assert printed == pytest.approx([row[key] for key in keys], abs=6e-5)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_old_checkpoint_converts_to_the_same_tensors(place: Path, objective: str) -> None:
    run = restore(f"{objective}-single", place, done=True)
    assert main(["convert", str(run / "checkpoints" / f"step={CHECKPOINT_STEP:08d}.ckpt"), "new"]) == 0
    new, old = (load_file(folder / "model.safetensors") for folder in (place / "new", GOLDEN / "converted" / objective))
    assert new.keys() == old.keys()
    assert all(torch.equal(new[key], old[key]) and new[key].dtype == old[key].dtype for key in old)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        texts = [(folder / file).read_text() for folder in (place / "new", GOLDEN / "converted" / objective)]
        assert json.loads(texts[0]) == json.loads(texts[1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_old_converted_folder_gives_the_same_logits_and_log_likelihoods(place: Path, objective: str) -> None:
    assert_same(inference(f"converted/{objective}"), committed("logits.json")[objective])


@pytest.mark.parametrize("name", RUNS)
def test_the_old_checkpoints_hold_what_the_old_version_wrote(name: str) -> None:
    """The fixtures prove something only as long as nobody makes them again with other class paths."""
    saved = torch.load(GOLDEN / name / f"step={CHECKPOINT_STEP:08d}.ckpt")
    assert saved["global_step"] == CHECKPOINT_STEP
    model = {"arm": "ArmModule", "llada": "LladaModule"}[RUNS[name][0]]
    data = "data.sft.SftDataModule" if RUNS[name][1] == "sft" else "data.datamodule.TokenDataModule"
    assert saved["identity"]["model"]["class_path"] == f"llada_lightning.training.modules.{model}"
    assert saved["identity"]["data"]["class_path"] == f"llada_lightning.{data}"
    assert f"class_path: llada_lightning.{data}" in (GOLDEN / name / "config.yaml").read_text()


def test_the_small_corpus_is_prepared_to_the_same_bytes(tmp_path: Path) -> None:
    prepare(tmp_path / "texts", str(GOLDEN / "corpus" / "tokenizer.json"), tmp_path / "corpus")
    for old in (path for path in (GOLDEN / "corpus").rglob("*") if path.suffix == ".bin"):
        assert (tmp_path / "corpus" / old.relative_to(GOLDEN / "corpus")).read_bytes() == old.read_bytes()
    new, old = (
        json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "corpus", GOLDEN / "corpus")
    )
    for key in ("fingerprint", "source", "splits", "tokenizer"):
        assert new[key] == old[key]


# --- names -----------------------------------------------------------------------------------------------------------


def digits_of(identities: Sequence[Any]) -> str:
    """The last part of a run's name, as the old version hashed its identities."""
    text = json.dumps(identities[0] if len(identities) == 1 else list(identities), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in TWINS else []) for name in CASES]
)
def test_a_command_has_the_same_identity_and_the_same_name(place: Path, name: str) -> None:
    found = resolved([*CASES[name], *(LONE_FIT_RULES if "-lone-" in name else ())])
    old = committed("identities.json")[name]
    assert json.loads(json.dumps(found.identities)) == old["identities"]
    assert (found.name, found.results) == (old["name"], old["results"])


def test_the_committed_names_end_in_the_hashes_of_the_committed_identities() -> None:
    cases = committed("identities.json")
    assert cases.keys() == CASES.keys()
    for old in cases.values():
        assert old["name"].rsplit("-", 1)[1] == digits_of(old["identities"])
        assert [result.rsplit("-", 1)[1] for result in old["results"]] == [digits_of([i]) for i in old["identities"]]
    names = [old["name"] for old in cases.values()]
    assert len(set(names)) == len(names), "each case is to show a difference"


@pytest.mark.parametrize("name", ["arm-single", "llada-sft"])
def test_the_settings_of_the_machine_change_no_name(place: Path, name: str) -> None:
    machine = ("--data.micro_batch=2", "--data.workers=3", "--trainer.log_every_n_steps=2", "--run.study=other")
    assert resolved([*workplace.command(name), *machine]).name == workplace.run_name(name)


def check_names_of_sweep(path: Path, which: slice) -> None:
    commands, old = workplace.sweep_commands(path), committed("sweeps.json")[path.name]
    assert len(commands) == len(old)
    for command, run in zip(commands[which], old[which], strict=True):
        found = resolved(command)
        assert {"name": found.name, "results": found.results} == run


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_last_run_of_a_committed_sweep_has_the_same_name(place: Path, path: Path) -> None:
    check_names_of_sweep(path, slice(-1, None))


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_committed_sweep_has_the_same_name(place: Path, path: Path) -> None:
    check_names_of_sweep(path, slice(None))


def test_the_command_lists_the_runs_of_a_sweep_by_the_same_names(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "show", "sweeps/study-gpu-seeds.yaml", "--json"]) == 0
    listed = [Path(run["folder"]).name for run in json.loads(capsys.readouterr().out)["runs"]]
    assert listed == [run["name"] for run in committed("sweeps.json")["study-gpu-seeds.yaml"]]


def test_all_committed_results_keep_their_names() -> None:
    old = committed("tables.json")
    tables = workplace.committed_tables()
    assert old.keys() <= tables.keys()
    for name, path in tables.items():
        table = read_results(path)
        names = run_names(path)
        assert table["run"].tolist() == names
        assert names == old.get(name, names)  # later tables have none
        for row in table.itertuples():
            flops = f"{row.flops_6nd:.1e}".split("e")[1]
            assert re.fullmatch(
                rf"{row.objective}-{row.shape}-[\d.]+e{re.escape(flops)}flops-[0-9a-f]{{10}}", row.run
            ), row.run


def test_all_committed_results_are_those_of_the_committed_sweeps() -> None:
    """The names that sweeps resolve to are the names in the tables: nothing that made a result is lost."""
    of_sweeps = {result for runs in committed("sweeps.json").values() for run in runs for result in run["results"]}
    lost = {name: sorted(set(runs) - of_sweeps) for name, runs in committed("tables.json").items()}
    assert not any(lost.values()), lost
