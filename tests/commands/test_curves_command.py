"""``llada curves``, called as the command calls it."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from helpers.studies import CHINCHILLA, VALLEYS, Chinchilla, simulated_study, study, true_multiplier
from helpers.tuning_studies import BOWLS, tuning_study
from llada_lightning.commands.curves import main as curves
from llada_lightning.commands.main import main
from llada_lightning.study.fits import fit_table
from llada_lightning.study.fits.held_out import HeldOut
from llada_lightning.study.results import write_results
from llada_lightning.study.tables.study import held_out_table
from llada_lightning.support.errors import UserError

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _drawn_where_it_matters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are laid out, and are rendered in the tests that are marked so: a study's take three seconds."""
    if request.node.get_closest_marker("rendered") is None:
        monkeypatch.setattr("llada_lightning.study.plots.write_figure", written_empty)


def written_empty(figure: Figure, folder: Path | str, name: str) -> Path:
    path = Path(folder) / f"{name}.png"
    path.touch()
    return path


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(write_results(study(), tmp_path / "results.csv"))


@pytest.mark.rendered
def test_curves_writes_fits_and_figure_and_prints_every_run(table: str, tmp_path: Path, capsys: Captured) -> None:
    assert curves([table, "--out", str(tmp_path / "out"), "--samples", "200"]) == 0
    assert {"fits.json", "scaling.png", "scaling.svg"} <= {path.name for path in (tmp_path / "out").iterdir()}
    fits = json.loads((tmp_path / "out/fits.json").read_text())
    assert fits["settings"]["samples"] == 200
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith(("arm  ", "llada  "))]
    runs = [row for row in rows if row[1] in ("107k", "443k")]
    assert len(runs) == 12
    assert runs[0][:5] == ["arm", "107k", "3.0e11", "107k", "469k"]
    assert sum(row[-1] == "best" for row in runs) == 6
    words = ("exact", "bound", "(6ND)", "Compute multiplier", "at least 3 shapes", "standard error", "scaling.png")
    assert all(each in out for each in words)


def test_a_study_is_told_in_80_columns(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = write_results(simulated_study(CHINCHILLA)[0], tmp_path / "r.csv")
    assert curves([str(path), "--out", str(tmp_path), "--samples", "300"]) == 0
    out = capsys.readouterr().out
    tables, _, notes = out.partition("To note:")
    assert all(len(line.rstrip()) <= 80 for line in tables.splitlines())
    assert "…" not in tables
    assert "the best of each budget (60 runs)" in tables
    for words in (
        "Optimum by isoFLOP", "tokens/N", "a of N_opt ~ C^a", "alpha of L(N, D)", "predicted by fits without it",
        "Compute multiplier at equal loss", "* beyond the budgets of one of the fits",
    ):  # fmt: skip
        assert words in tables, words
    fits = json.loads((tmp_path / "fits.json").read_text())
    for name, begins, flops in (
        ("compute_multiplier", "llada over arm (6ND) ", "reference_flops"),
        ("multiplier_at_own_budgets", "at llada's budgets", "objective_flops"),
    ):
        shown = [e for e in fits[name] if (e["convention"], e["withheld"]) == ("6nd", None)]
        entry = next(e for e in shown if e["method"] == "parametric" and not e["extrapolated"])
        table = tables.partition(begins)[2].partition("the losses that are held equal")[0]
        budget = f"{entry[flops]:.1e}".replace("+", "")
        (row,) = (line for line in table.splitlines() if line.startswith(budget))
        assert f"{entry['multiplier']:.2g} ({entry['low']:.2g}–{entry['high']:.2g})" in row
    assert "planned to be equal by it" not in notes  # which is a note on the other convention


def test_a_method_whose_fit_is_rejected_is_marked_and_says_why(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where losses are valleys of one width in log N, they are no sum of powers of N and D."""
    monkeypatch.setenv("COLUMNS", "80")
    path = write_results(simulated_study(VALLEYS, noise=0.0005)[0], tmp_path / "r.csv")
    assert curves([str(path), "--out", str(tmp_path), "--samples", "300"]) == 0
    out = capsys.readouterr().out
    table = out.partition("Compute multiplier")[2].partition("The largest budget")[0]
    fits = json.loads((tmp_path / "fits.json").read_text())
    entries = [entry for entry in fits["compute_multiplier"] if entry["convention"] == "6nd"]
    for entry in entries:
        of_law = entry["method"] in ("joint", "parametric")
        assert entry["trusted"] is not of_law
        assert ("fit is rejected (p < 0.001)" in entry["doubt"]) if of_law else entry["doubt"] is None
        if entry["withheld"] is None:
            marks = "†" * of_law + "*" * entry["extrapolated"]
            assert f"{entry['multiplier']:.2g}{marks:1}({entry['low']:.2g}" in table
    assert {entry["method"] for entry in entries if entry["trusted"]} == {"read-off", "isoflop", "envelope"}
    assert "† do not rely on it: a fit is rejected, or fails its held-out test" in table
    assert "- † compute multiplier of llada, parametric, 6nd: " in out


def test_a_held_out_budget_outside_of_its_interval_marks_its_method(tmp_path: Path, capsys: Captured) -> None:
    assert curves(["published", "--out", str(tmp_path), "--samples", "300"]) == 0
    fits = json.loads((tmp_path / "fits.json").read_text())
    missed = {(entry["method"], entry["objective"]) for entry in fits["held_out"] if entry["inside"] is False}
    assert missed >= {("parametric", "arm"), ("parametric", "llada"), ("joint", "arm"), ("joint", "llada")}
    assert ("isoflop", "arm") not in missed
    for entry in fits["compute_multiplier"] + fits["multiplier_curve"]:
        for objective in ("arm", "llada"):
            held_out = f"{objective}'s largest budget, held out, is outside of its interval"
            assert (held_out in (entry["doubt"] or "")) is ((entry["method"], objective) in missed)


def test_no_prediction_is_printed_whose_interval_tells_nothing() -> None:
    """A law that a few budgets do not fix predicts anything: a number for it would be read as one."""
    known = HeldOut("arm", "6nd", "isoflop", 1e12, 2.0, 2.1, 1.9, 2.3, 0.05, True)
    unknown = replace(known, method="parametric", predicted=2e-5, low=0.0, relative_error=-1.0, inside=None)
    columns = held_out_table(replace(fit_table(study(), samples=100), held_out=[known, unknown]), "6nd").columns
    cells = {str(column.header): list(column.cells) for column in columns}
    assert (cells["predicted"], cells["error"], cells["inside"]) == (["2.100", "?"], ["+5.0%", ""], ["yes", "?"])


def test_budgets_without_a_common_loss_are_told_first(tmp_path: Path, capsys: Captured) -> None:
    """Both objectives at the same budgets, over a smaller factor than `llada` needs: nothing is measured."""
    laws = {"arm": Chinchilla(1.7, 400.0, 0.34, 1200.0, 0.28), "llada": Chinchilla(1.7, 641.0, 0.34, 1769.0, 0.28)}
    path = write_results(simulated_study(laws, budgets=(1e17, 2e17, 4e17))[0], tmp_path / "r.csv")
    assert curves([str(path), "--out", str(tmp_path), "--samples", "300"]) == 0
    first = capsys.readouterr().out.partition("To note:\n")[2].splitlines()
    (note,) = (line for line in first[:2] if "no common loss by 6ND:" in line)
    assert "so no multiplier is measured" in note
    assert "add smaller budgets for arm or larger ones for llada, by a factor of about" in note
    needed = true_multiplier(laws, 1e17) / 4
    assert float(note.partition("about ")[2].split()[0]) == pytest.approx(needed, rel=0.3)
    entries = json.loads((tmp_path / "fits.json").read_text())["compute_multiplier"]
    assert entries and all(entry["extrapolated"] for entry in entries)


def test_the_command_that_adds_a_budget_is_told_where_the_sweep_is_known(
    prepared: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    laws = {"arm": Chinchilla(1.7, 400.0, 0.34, 1200.0, 0.28), "llada": Chinchilla(1.7, 641.0, 0.34, 1769.0, 0.28)}
    write_results(simulated_study(laws, budgets=(1e17, 2e17, 4e17))[0], tmp_path / "runs" / "r.csv")
    command = ["runs/r.csv", "--out", "runs", "--samples", "100"]
    assert curves(command) == 0
    assert "A smaller one: " not in capsys.readouterr().out  # no sweep is known
    planned = ["--flops", "1e17", "2e17", "4e17", "--data", str(prepared), "--sequence-length", "16"]
    assert main(["plan", *planned, "--out", "my sweep.yaml"]) == 0
    shutil.copy("my sweep.yaml", tmp_path / "runs" / "my sweep.sweep.yaml")
    capsys.readouterr()
    assert curves(command) == 0
    notes = capsys.readouterr().out.partition("To note:\n")[2].splitlines()
    (line,) = (line for line in notes[:2] if "no common loss by 6ND:" in line)
    added = shlex.split(line.partition(". A smaller one: llada ")[2])
    assert added[:3] == ["plan", "--append", "my sweep.yaml"]
    assert float(added[-1]) == pytest.approx(1e17 / (1.2 * true_multiplier(laws, 1e17) / 4), rel=0.4)
    assert main(added) == 0
    assert curves([*command, "--json"]) == 0


def test_a_flagged_optimum_is_told_in_80_columns(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = write_results(simulated_study(CHINCHILLA, drift=2.0)[0], tmp_path / "r.csv")
    assert curves([str(path), "--out", str(tmp_path), "--samples", "200"]) == 0
    tables = capsys.readouterr().out.partition("To note:")[0]
    assert "…" not in tables
    assert "arm       1.0e17!" in tables
    assert "! optimum outside of the grid" in tables


def test_curves_as_json_under_the_other_convention(table: str, tmp_path: Path, capsys: Captured) -> None:
    options = ["--convention", "total", "--unit", "bits_per_byte", "--json"]
    assert curves([table, "--out", str(tmp_path), *options]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    written = json.loads(line)
    assert written["convention"] == "total"
    assert written["settings"]["conventions"] == ["6nd", "total"]
    assert written["settings"]["unit"] == "bits_per_byte"
    assert written["left_out"] == 0
    assert written["fits"] == str(tmp_path / "fits.json")
    assert all(Path(path).is_file() for path in written["figures"].values())


def test_the_covariance_beside_a_table_is_read(tmp_path: Path, capsys: Captured) -> None:
    table, covariance = simulated_study(VALLEYS, noise=0.002, shared=0.01)
    path = str(write_results(table, tmp_path / "r.csv"))
    options = [path, "--out", str(tmp_path), "--samples", "300"]
    curves(options)
    assert "each run's own standard error" in capsys.readouterr().out
    alone = json.loads((tmp_path / "fits.json").read_text())
    covariance.to_csv(tmp_path / "r.covariance.csv")
    curves(options)
    assert "errors: covariance of the runs' validation errors" in capsys.readouterr().out
    joint = json.loads((tmp_path / "fits.json").read_text())
    found = [written["compute_multiplier"][0] for written in (alone, joint)]
    assert found[0]["high"] != found[1]["high"]
    assert found[0]["multiplier"] == pytest.approx(found[1]["multiplier"], rel=0.02)
    missing = [
        [note for note in written["notes"] if "llada collect writes beside a table" in note]
        for written in (alone, joint)
    ]
    assert (len(missing[0]), len(missing[1])) == (1, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a table of numbers"),
        ("name,a@1\na@1,red\n", "not a table of numbers"),
        ("name,a@1\nb@1,1.0\n", "not of the same runs"),
        ("name,a@1\na@1,1.0\n", "none of the table's 12 runs is in it"),
    ],
)
def test_a_damaged_covariance_is_refused(table: str, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "results.covariance.csv").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        curves([table, "--out", str(tmp_path)])
    assert "\n" not in str(caught.value)


def test_the_published_study_is_fitted_by_6nd(tmp_path: Path, capsys: Captured) -> None:
    assert curves(["published", "--out", str(tmp_path), "--samples", "200"]) == 0
    out = capsys.readouterr().out
    assert "the best of each budget (133 runs)" in out
    assert "not counted by 6ND + attention + head" in out
    with pytest.raises(UserError, match="--convention total: the table lacks FLOPs"):
        curves(["published", "--out", str(tmp_path), "--samples", "200", "--convention", "total"])


def test_two_budgets_are_drawn_without_a_fit(tmp_path: Path, capsys: Captured) -> None:
    path = write_results(study(budgets=(3e11, 1e12)), tmp_path / "r.csv")
    assert curves([str(path), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "arm, envelope, 6nd: no fit, budgets on the envelope: 2; at least 3 are needed" in out
    assert "arm, parametric: no fit: 4 runs of 2 N and 4 D; at least 6 runs of 3 N and 3 D are needed" in out
    assert "no common loss by 6ND: arm's best losses go from" in out
    assert (tmp_path / "scaling.png").exists()


def test_rows_that_are_left_out_are_counted(tmp_path: Path, capsys: Captured) -> None:
    table = study()
    table.loc[0, "status"] = "diverged"
    path = write_results(table, tmp_path / "r.csv")
    assert curves([str(path), "--out", str(tmp_path)]) == 0
    left_out = capsys.readouterr().err
    assert "1 of 12 rows left out" in left_out and str(table.loc[0, "run"]) in left_out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--convention", "8nd"], "convention"),
        (["--samples", "3"], "--samples is 3"),
        (["--colour", "red"], "--colour"),
        (["--seed", "-1"], "--seed is -1"),
        (["--out", __file__], "cannot be written"),
    ],
)
def test_wrong_options_are_one_line(table: str, tmp_path: Path, options: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        curves([table, "--out", str(tmp_path), *options])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("objective", None, "objective <NA> of "),
        ("val_kind", None, "val_kind of arm is <NA>; it must be 'exact'"),
        ("val_stderr", -0.01, "val_stderr of arm-107k-3e.11 is negative"),
        ("val_nats_per_token", 3.0, "all 6 losses of arm are 3"),
        ("task_piqa", "red", "task_piqa holds values that are no numbers"),
    ],
)
def test_a_table_that_no_fit_can_read_is_one_line(tmp_path: Path, column: str, value: object, words: str) -> None:
    path = tmp_path / "r.csv"
    study().assign(**{column: value}).to_csv(path, index=False)
    with pytest.raises(UserError, match=words) as caught:
        curves([str(path), "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)


def test_a_table_that_counts_the_total_alone_is_drawn_by_it(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    simulated_study(CHINCHILLA)[0].assign(flops_6nd=None).to_csv(path, index=False)
    options = [str(path), "--out", str(tmp_path), "--samples", "200", "--convention", "total"]
    assert curves(options) == 0
    assert {"scaling.png", "parametric.png"} <= {file.name for file in tmp_path.iterdir()}


# --- tuning studies --------------------------------------------------------------------------------------------------


@pytest.mark.rendered
def test_the_rules_of_a_tuning_study_are_printed_drawn_and_written(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = write_results(tuning_study()[0], tmp_path / "results.csv")
    assert curves([str(path), "--rules", "--out", str(tmp_path / "out"), "--samples", "200"]) == 0
    out = capsys.readouterr().out
    assert {own.name for own in (tmp_path / "out").iterdir()} == {"rules.json", "rules.png", "rules.svg"}
    rows = [line for line in out.splitlines() if line.startswith(("arm  ", "llada  "))]
    assert len(rows) == 6 and all(len(line.rstrip()) <= 80 for line in rows)
    laws = [line for line in out.splitlines() if " = " in line and not line.startswith("-")]
    assert [line.split(" = ")[0] for line in laws] == ["arm: rate", "arm: batch", "llada: rate", "llada: batch"]
    rules = json.loads((tmp_path / "out/rules.json").read_text())
    assert rules["table"] == "results.csv" and rules["table_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"× (C / {rules['objectives']['arm']['lr']['c0']:.1e}".replace("e+", "e") in laws[0]


def test_an_optimum_at_an_edge_is_marked_and_leaves_no_rule_file(tmp_path: Path, capsys: Captured) -> None:
    off = tuning_study({"arm": BOWLS["arm"]}, noise=0.0, off=(8.0, 1.0))[0]
    path = write_results(off, tmp_path / "results.csv")
    (tmp_path / "out").mkdir()
    assert curves([str(path), "--rules", "--out", str(tmp_path / "out"), "--samples", "200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rules"] is None and not (tmp_path / "out" / "rules.json").exists()
    assert all(own["continue_with"] for own in found["objectives"]["arm"]["optima"])
    assert curves([str(path), "--rules", "--out", str(tmp_path / "out"), "--samples", "200"]) == 0
    out = capsys.readouterr().out
    assert out.count("‡") == 4 and "go on with rates below" in out


def test_what_is_no_tuning_study_has_no_rules(table: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no budget has 3 rates"):
        curves([table, "--rules", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="published has one rate and batch at each budget"):
        curves(["published", "--rules", "--out", str(tmp_path)])


def test_what_runs_started_from_is_noted_or_counted(tmp_path: Path, capsys: Captured) -> None:
    begun = study()
    own = (begun["objective"] == "llada").to_numpy(bool)
    begun = begun.assign(source_flops=[1e12 if each else float("nan") for each in own])
    table = str(write_results(begun, tmp_path / "results.csv"))
    found = {}
    for name, words in {"own": [], "all": ["--source-flops"]}.items():
        assert curves([table, "--out", str(tmp_path / name), "--samples", "100", "--json", *words]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert "6 runs start from are not counted; --source-flops adds them" in found["own"]["notes"][0]
    assert "6 runs start from are counted, by 6ND" in found["all"]["notes"][0]
    first = {name: fits["llada"]["envelope"]["6nd"] for name, fits in found.items()}
    assert first["own"] != first["all"] and found["own"]["arm"] == found["all"]["arm"]
    with pytest.raises(
        UserError, match=r"^curves: --rules fits rates and batches by a run's own FLOPs; leave --source"
    ):
        curves([table, "--out", str(tmp_path), "--rules", "--source-flops"])
