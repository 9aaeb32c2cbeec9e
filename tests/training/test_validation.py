"""Losses of the sources of a mixture and of held-out corpora: beside the total, which they do not change."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from helpers.small_corpora import write_corpus
from helpers.tiny_runs import fit, fit_arguments, fit_process, losses, metrics, timeless
from llada_lightning.commands.main import main
from llada_lightning.data.manifest import Manifest, read_manifest
from llada_lightning.data.prepare import prepare
from llada_lightning.data.validation import ValidationCorpus
from llada_lightning.records import CORPUS_KEYS, read_records, read_validation
from llada_lightning.study.collect import collect
from llada_lightning.training.fit import _words, run_folder
from llada_lightning.training.validation import as_metrics, corpus_loss, losses_by_source

BUDGETS = ("--trainer.max_steps=-1", "--budget.flops=[3e8, 6e8]", "--data.val_sequences=20")


def mixture(prepared: Path, prepared_second: Path) -> str:
    return f"--data.path={{{prepared}: 1, {prepared_second}: 2}}"


@pytest.fixture(scope="module")
def run(prepared: Path, prepared_second: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two budgets on a mixture, with its second source held out as well: all of that one's validation sequences."""
    held_out = f"--data.held_out={{more: {prepared_second}}}"
    root = tmp_path_factory.mktemp("mixture")
    return fit("llada", prepared, root, mixture(prepared, prepared_second), held_out, *BUDGETS)


def mean_and_stderr(table: pd.DataFrame) -> tuple[float, float]:
    """Of documents as units (Cochran 1977, Sec. 11), written out."""
    count, values = table["sequences"].to_numpy(), table["nats_per_token"].to_numpy()
    mean = float((count * values).sum() / count.sum())
    deviations = count * (values - mean) / count.sum()
    return mean, math.sqrt(len(table) / (len(table) - 1) * float((deviations**2).sum()))


def names(prepared: Path, prepared_second: Path) -> tuple[str, str]:
    """Of the sources: both folders are called `data`, so that they go by their whole paths."""
    return str(prepared), str(prepared_second)


def test_the_losses_of_the_sources_are_parts_of_the_total(run: Path, prepared: Path, prepared_second: Path) -> None:
    one, two = names(prepared, prepared_second)
    table = read_validation(run)
    for record in read_records(run):
        by_source, rows = record["val_by_source"], table[table["steps"] == record["steps"]]
        assert list(by_source) == [one, two]
        assert all(tuple(loss) == CORPUS_KEYS for loss in by_source.values())
        assert [loss["sequences"] for loss in by_source.values()] == [7, 13]  # 1 to 2
        whole = sum(loss["nats_per_token"] * loss["sequences"] for loss in by_source.values()) / 20
        assert whole == pytest.approx(record["val_nats_per_token"], rel=1e-12)
        border = by_source[two]["first_document"]
        assert border == read_manifest(str(prepared)).splits["val"].items(32) * 32
        for name, own in ((one, rows[rows["document"] < border]), (two, rows[rows["document"] >= border])):
            loss = by_source[name]
            expected = mean_and_stderr(own)
            assert (loss["nats_per_token"], loss["stderr"]) == pytest.approx(expected, rel=1e-12)
            assert (loss["documents"], loss["sequences"]) == (len(own), own["sequences"].sum())
            manifest = read_manifest(name)
            bits = expected[0] / math.log(2) / manifest.splits["val"].bytes_per_token
            assert loss["bits_per_byte"] == pytest.approx(bits) and loss["fingerprint"] == manifest.fingerprint


def test_a_held_out_corpus_is_measured_at_each_budget(run: Path, prepared_second: Path) -> None:
    table = read_validation(run, "more")
    records = read_records(run)
    assert len(records) == 2 and sorted(set(table["steps"])) == [record["steps"] for record in records]
    for record in records:
        rows, loss = table[table["steps"] == record["steps"]], record["val_held_out"]["more"]
        assert (loss["nats_per_token"], loss["stderr"]) == pytest.approx(mean_and_stderr(rows), rel=1e-12)
        assert loss["sequences"] == rows["sequences"].sum() == 20
        assert loss["fingerprint"] == read_manifest(str(prepared_second)).fingerprint


def test_its_loss_is_that_of_a_validation_on_it_alone(
    run: Path, prepared_second: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = f"--config={run / 'config.yaml'}"
    assert main(["validate", config]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [re.match(r" *(source|held out)?", line)[1] for line in said] == [None, "source", "source", "held out"]  # type: ignore[index]
    assert main(["validate", config, f"--data.path={prepared_second}", "--data.held_out=null"]) == 0
    [alone] = capsys.readouterr().out.splitlines()
    assert re.search(rf"held out more: {re.escape(alone)}, \d+ documents$", said[-1])


def test_the_log_has_each_source_at_each_validation_and_what_is_held_out_at_the_end(run: Path, prepared: Path) -> None:
    [first, last] = read_records(run)
    trunk = [row for row in metrics(run) if row["val_nats_per_token"]]
    assert trunk and all(row[f"val_nats_per_token/{prepared}"] for row in trunk)
    assert not any(name.startswith("held_out") for name in trunk[0])
    for record in (first, last):
        row = metrics(run / "branches" / str(record["steps"]))[-1]
        for key in ("nats_per_token", "stderr", "bits_per_byte"):
            assert float(row[f"val_{key}/{prepared}"]) == record["val_by_source"][str(prepared)][key]
            assert float(row[f"held_out_{key}/more"]) == record["val_held_out"]["more"][key]
        assert float(row["val_nats_per_token"]) == record["val_nats_per_token"]


def test_a_table_holds_them_as_json(run: Path) -> None:
    table, report = collect([run])
    assert report.unfinished == {} and len(table) == 2
    for text, record in zip(table["val_held_out"], read_records(run), strict=True):
        assert yaml.safe_load(text) == record["val_held_out"]


def test_what_is_held_out_changes_neither_the_run_nor_its_numbers(
    run: Path, prepared: Path, prepared_second: Path, tmp_path: Path
) -> None:
    without = fit("llada", prepared, tmp_path, mixture(prepared, prepared_second), *BUDGETS)
    assert losses(without) == losses(run)
    plain, measured = timeless(without), timeless(run)
    assert [record.pop("val_held_out") for record in plain] == [None, None]
    assert all(record.pop("val_held_out") for record in measured)
    assert plain == measured  # the names with their hashes, too
    assert not (without / "held_out").exists()
    assert (without / "validation.csv").read_bytes() == (run / "validation.csv").read_bytes()


def test_a_run_that_is_done_measures_no_further_corpus(
    run: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    config = f"--config={run / 'config.yaml'}"
    assert main(["fit", config, f"--data.held_out={{more: {prepared}, other: {prepared}}}"]) == 0
    said = capsys.readouterr().err
    assert "nothing to do" in said and said.splitlines()[-1] == (
        f"note: a run that is done measures no further corpus (other); `llada validate --config {run / 'config.yaml'} "
        "--data.held_out …` does, from its last checkpoint, and records it"
    )
    assert main(["fit", config]) == 0
    assert "note:" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_validate_adds_a_held_out_corpus_to_the_record_of_a_run_that_is_done(
    prepared: Path, prepared_second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit("llada", prepared, tmp_path, "--trainer.max_steps=2", f"--data.held_out={{more: {prepared_second}}}")
    config, before = f"--config={folder / 'config.yaml'}", read_records(folder)
    capsys.readouterr()
    assert main(["validate", config, f"--data.held_out={{other: {prepared}}}"]) == 0
    out, err = capsys.readouterr()
    assert "held out other: " in out and f"recorded: {folder / 'result.json'}" in err
    [after], [known] = read_records(folder), before
    assert list(after["val_held_out"]) == ["more", "other"]
    # The corpus is the run's own validation data, so that its loss is, too.
    assert after["val_held_out"]["other"]["nats_per_token"] == pytest.approx(after["val_nats_per_token"], rel=1e-6)
    assert len(read_validation(folder, held_out="other")) == after["val_held_out"]["other"]["documents"]
    assert {**after, "val_held_out": {"more": after["val_held_out"]["more"]}} == known
    assert main(["validate", config, f"--data.held_out={{more: {prepared}}}"]) == 0
    assert "has another corpus 'more'; rename this one" in capsys.readouterr().err
    assert read_records(folder) == [after]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_find_what_one_does(prepared: Path, prepared_second: Path, tmp_path: Path, strategy: str) -> None:
    """The last batches are filled up with sequences that do not count: 21 are no multiple of two times eight."""
    given = (
        mixture(prepared, prepared_second), f"--data.held_out={{more: {prepared_second}}}", "--trainer.max_steps=2",
        "--data.val_sequences=21",
    )  # fmt: skip
    one = fit("llada", prepared, tmp_path / "one", *given)
    devices = ("--trainer.devices=2", f"--trainer.strategy={strategy}")
    done = fit_process("llada", prepared, tmp_path / "two", *given, *devices)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two" / "test" / "run"
    [mine], [theirs] = read_records(two), read_records(one)
    for column in ("val_by_source", "val_held_out"):
        assert mine[column].keys() == theirs[column].keys()
        for name, loss in theirs[column].items():
            assert mine[column][name] == pytest.approx(loss, abs=1e-5), name
    for corpus in (None, "more"):
        pd.testing.assert_frame_equal(read_validation(two, corpus), read_validation(one, corpus), atol=1e-5)
    assert done.stderr.count("held out more") == 1


def test_a_corpus_that_cannot_be_measured_is_one_line(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_corpus(tmp_path / "text", first=500)
    prepare(str(other), str(tmp_path / "other"), vocab_size=300, val_fraction=0.2, progress=False)
    capsys.readouterr()
    for given, words in (
        (
            f"{{wiki: {tmp_path / 'other'}}}",
            r"wiki \('.*other'\) was prepared with another tokenizer than the training",
        ),
        (f"{{'a/b': {prepared}}}", "'a/b' cannot name a corpus; a name has letters"),
        (
            f"{{wiki: {tmp_path / 'none'}}}",
            "wiki: data folder '.*none' does not exist; .* --out .*none --tokenizer DATA \\(the training data\\)$",
        ),
        (str(prepared), ".* given; expected dict or null"),
    ):
        assert main(fit_arguments("arm", prepared, tmp_path, f"--data.held_out={given}")) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert re.match(rf"error: (data\.held_out: )?{words}", line), line
    assert not (tmp_path / "test").exists()


def test_python_gives_it_as_a_mapping(prepared: Path, tmp_path: Path) -> None:
    held_out = {"a.b": str(prepared)}
    [word] = _words("data.held_out", held_out)
    base = [a for a in fit_arguments("arm", prepared, tmp_path) if not a.startswith("--run.name")]
    assert run_folder([*base, word]) == run_folder(base)


# --- without a run ----------------------------------------------------------------------------------------------------


def corpora(prepared: Path, **first_documents: int) -> list[ValidationCorpus]:
    manifest: Manifest = read_manifest(str(prepared))
    return [ValidationCorpus(name, "", manifest, first) for name, first in first_documents.items()]


def test_a_source_without_sequences_has_no_loss(prepared: Path) -> None:
    sources = corpora(prepared, a=0, b=100, c=200)
    found = losses_by_source(sources, [(0, 1, 2.0), (99, 3, 4.0), (200, 1, 7.0)])
    assert {name: (loss["nats_per_token"], loss["documents"]) for name, loss in found.items()} == {
        "a": (3.5, 2), "c": (7.0, 1),
    }  # fmt: skip
    assert found["a"]["stderr"] == pytest.approx(math.sqrt(2 * (0.375**2 + 0.375**2)))
    assert math.isnan(found["c"]["stderr"])


def test_what_is_not_known_is_not_logged(prepared: Path) -> None:
    [corpus] = corpora(prepared, a=0)
    loss: dict[str, Any] = {**corpus_loss(corpus, [(0, 1, 2.0), (9, 1, 4.0)]), "bits_per_byte": None}
    assert as_metrics("val", {"web": loss}) == {"val_nats_per_token/web": 3.0, "val_stderr/web": pytest.approx(1.0)}
