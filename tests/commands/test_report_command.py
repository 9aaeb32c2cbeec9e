"""``llada report``, called as the command calls it, and its page in a browser."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from helpers.studies import VALLEYS, record, simulated_study, study
from llada_lightning.commands.curves import main as curves
from llada_lightning.commands.report import main as report
from llada_lightning.records import write_records, write_validation
from llada_lightning.study.results import write_results
from llada_lightning.study.tables.style import with_short_powers
from llada_lightning.support.errors import UserError

Captured = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def runs(folder: Path, count: int = 2) -> Path:
    """A folder of finished runs of both objectives, each with its losses by document."""
    for objective, loss in (("arm", 4.0), ("llada", 4.5)):
        for number in range(count):
            own = record(objective, "107k", 1e12 * 2**number, loss - 0.2 * number, run=f"{objective}-{number}")
            steps = int(own["steps"])
            write_validation(folder / own["run"], steps, [(0, 2, loss - 0.1), (7, 1, loss + 0.1 + number)])
            write_records(folder / own["run"], [own])
    return folder


# --- from a table ----------------------------------------------------------------------------------------------------


def test_a_table_becomes_a_page_beside_it(tmp_path: Path, capsys: Captured) -> None:
    shutil.copy(ROOT / "experiments/quickstart/results.csv", tmp_path)
    assert report([str(tmp_path / "results.csv"), "--samples", "100"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "report.html", "report.md", "report_files"}
    assert [path.name for path in (tmp_path / "report_files").iterdir()] == ["scaling.svg"]
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"-> {tmp_path}/report.html, {tmp_path}/report.md"
    assert "The compute multiplier of llada over arm is not measured" in " ".join(out.split())
    digest = hashlib.sha256((tmp_path / "results.csv").read_bytes()).hexdigest()
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert digest in text and "Scaling study: " in text
        assert "70ade13c80a36afc8091a5fc715d69a93833c014" in text  # the commit of the runs
        assert str(tmp_path) not in text  # paths of this machine are nobody's business


def test_the_values_are_those_of_curves(tmp_path: Path, capsys: Captured) -> None:
    table, covariance = simulated_study(VALLEYS, noise=0.002, shared=0.01)
    path = write_results(table, tmp_path / "results.csv")
    covariance.to_csv(tmp_path / "results.covariance.csv")
    how = [str(path), "--samples", "200", "--seed", "3", "--convention", "total", "--unit", "bits_per_byte"]
    assert curves([*how, "--out", str(tmp_path / "curves")]) == 0
    printed = capsys.readouterr().out
    assert report([*how, "--out", str(tmp_path / "page"), "--title", "Two objectives"]) == 0
    text = html.unescape((tmp_path / "page" / "report.html").read_text(encoding="utf-8"))
    cells = set(re.findall(r"<td[^>]*>(.*?)</td>", text))
    fits = json.loads((tmp_path / "curves" / "fits.json").read_text())
    shown = [entry for entry in fits["compute_multiplier"] if entry["withheld"] is None]
    assert {entry["convention"] for entry in shown} == {"6nd", "total"} and len(shown) > 10
    for entry in shown:
        marks = "†" * (not entry["trusted"]) + "*" * entry["extrapolated"]
        value, low, high = (f"{entry[name]:.2g}" for name in ("multiplier", "low", "high"))
        if max(entry["multiplier"], entry["high"]) < 99.5:
            assert f"{value}{marks:1}({low}–{high})" in cells
    notes = [note for note in fits["notes"] if not re.search(r", (isoflop|envelope), 6nd: ", note)]
    for note in map(with_short_powers, (*notes, *(own["words"] for own in fits["headlines"]))):
        assert note in text or note.partition(",")[2] in text  # those of both objectives are one
    for words in re.findall(r"^- (compute multiplier .*|† .*)$", printed, re.MULTILINE):
        assert words in text
    assert "Two objectives</h1>" in text and "<dt>results.covariance.csv</dt>" in text
    assert "llada curves results.csv --out DIR --convention total --unit bits_per_byte --samples 200 --seed 3" in text
    figures = {path.name for path in (tmp_path / "page" / "report_files").iterdir()}
    assert figures == {path.name for path in (tmp_path / "curves").glob("*.svg")}


def test_the_paths_and_the_verdict_as_json(tmp_path: Path, capsys: Captured) -> None:
    table = study()
    table.loc[0, "status"] = "running"
    path = write_results(table, tmp_path / "own.csv")
    assert report([str(path), "--samples", "100", "--json", "--out", str(tmp_path / "out")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["html"] == str(tmp_path / "out" / "report.html") and len(found["verdict"]) == 3
    assert found["left_out"] == 1 and found["convention"] == "6nd"
    assert all(Path(figure).is_file() for figure in found["figures"].values())
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<summary>1 result that no fit sees</summary>" in text and "Scaling study: own<" in text


def test_the_published_study_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="published has no folder of its own; give the folder of the report with --out"):
        report(["published"])
    assert report(["published", "--samples", "100", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "from the published isoFLOP study" in text
    assert "not counted by 6ND + attention + head" in text


# --- from a folder of runs -------------------------------------------------------------------------------------------


def test_a_folder_of_runs_is_collected_beside_the_report(tmp_path: Path) -> None:
    folder = runs(tmp_path / "small")
    (folder / "half").mkdir()
    (folder / "half" / "config.yaml").touch()
    assert report([str(folder), "--samples", "100"]) == 0
    files = folder / "report_files"
    assert {path.name for path in files.iterdir()} == {"results.csv", "results.covariance.csv", "scaling.svg"}
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<li>unfinished: half (no result.json)</li>" in text
    assert "covariance of the runs&#39; validation errors" in text
    assert hashlib.sha256((files / "results.csv").read_bytes()).hexdigest() in text
    assert "A run that was planned and never started" in text and str(tmp_path) not in text
    assert report([str(folder), "--samples", "100"]) == 0  # again: the report is no run


def test_the_verdict_begins_with_how_much_is_missing(tmp_path: Path, capsys: Captured) -> None:
    """Of 7 runs that the sweep's file knows, 4 are done and 1 is under way; a table beside it knows so, too."""
    folder = runs(tmp_path / "small")
    (folder / "half").mkdir()
    (folder / "half" / "config.yaml").touch()
    sweep = {"program": "llada", "method": "grid", "parameters": {"seed_everything": {"values": list(range(7))}}}
    (folder / "small.sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    first = "Unfinished: 4 of 7 runs are done."
    assert report([str(folder), "--samples", "100"]) == 0
    assert capsys.readouterr().out.startswith(first)
    assert f"<p>{first}</p>" in (folder / "report.html").read_text(encoding="utf-8")
    table = shutil.copy(folder / "report_files" / "results.csv", folder)
    assert report([str(table), "--samples", "100"]) == 0
    assert capsys.readouterr().out.startswith(first)
    assert curves([str(table), "--out", str(tmp_path / "out"), "--samples", "100"]) == 0
    assert f"\n{first}\n\nThe compute multiplier" in capsys.readouterr().out
    shutil.rmtree(folder / "half")
    (folder / "small.sweep.yaml").unlink()
    assert report([str(folder), "--samples", "100"]) == 0
    assert "Unfinished" not in capsys.readouterr().out


def test_an_unfinished_study_has_a_page_that_says_so(tmp_path: Path, capsys: Captured) -> None:
    write_records(tmp_path / "a", [record("arm", "107k", 1e12, 4.0, status="running")])
    assert report([str(tmp_path)]) == 0
    assert "no run is finished" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "unfinished: a (status running)" in text and "<svg" not in text


def test_a_study_without_a_result_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match=r"holds no result \(1 run, none has a record yet\); finish a run$"):
        report([str(tmp_path)])
    write_results(study(), tmp_path / "results.csv")
    with pytest.raises(UserError, match=r"or give a table in it, such as results\.csv$"):
        report([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["{tmp}/none"], "no such folder or table"),
        (["{tmp}/none.csv"], "no such file"),
        (["{tmp}/results.txt"], "must be named .csv or .parquet"),
        (["{tmp}/results.csv", "--out", "{tmp}/results.txt"], "report: --out .* cannot be written"),
        (["{tmp}/results.csv", "--samples", "3"], "report: --samples is 3"),
        (["{tmp}/results.csv", "--reference", "block"], "the results hold no runs of 'block'"),
        (["{tmp}/results.csv", "--yardstick", "confidence@1"], "llada has no loss by 'confidence@1'"),
        (["wandb:me/project"], "wandb:me/project has no folder of its own"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, options: list[str], words: str) -> None:
    write_results(study(budgets=(1e12,), shapes=("107k",)), tmp_path / "results.csv")
    (tmp_path / "results.txt").touch()
    with pytest.raises(UserError, match=words) as caught:
        report([option.format(tmp=tmp_path) for option in options])
    assert "\n" not in str(caught.value)


# --- in a browser ----------------------------------------------------------------------------------------------------


def browse(page: Path, *options: str) -> str:
    """Opens a page in Chromium, and returns what it prints."""
    assert BROWSER is not None
    profile = page.parent / "profile"
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *quiet]
    done = subprocess.run(
        [*command, f"--user-data-dir={profile}", *options, page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a study with every figure."""
    folder = tmp_path_factory.mktemp("page")
    path = write_results(simulated_study(VALLEYS, noise=0.002)[0], folder / "results.csv")
    assert report([str(path), "--samples", "100"]) == 0
    return folder / "report.html"


@in_a_browser
def test_a_browser_draws_the_page(page: Path) -> None:
    picture = page.parent / "page.png"
    browse(page, "--window-size=1100,2400", f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB"), dtype=int)
    assert pixels.shape == (2400, 1100, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # those of arm and llada, in the figures
        assert np.sum(np.abs(pixels - colour).sum(axis=2) < 12) > 300
    assert np.mean(pixels.min(axis=2) < 128) > 0.01  # text


@in_a_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_not_wider_than_the_screen(page: Path, width: int) -> None:
    """Measured from outside, in a frame, because the page runs no script."""
    opened = page.read_text(encoding="utf-8").replace("<details", "<details open")
    frame = page.parent / f"frame{width}.html"
    frame.write_text(
        f'<iframe id="page" width="{width}" height="800" style="border: 0" srcdoc="{html.escape(opened)}"></iframe>'
        "<script>onload = () => { const inner = document.getElementById('page').contentDocument;"
        "const wide = [...inner.querySelectorAll('.scroll')].filter(own => own.scrollWidth > own.clientWidth);"
        "document.title = `${inner.documentElement.scrollWidth} ${wide.length} ${inner.querySelectorAll('svg').length}`"
        "}</script>",
        encoding="utf-8",
    )
    (title,) = re.findall(r"<title>([\d ]+)</title>", browse(frame, "--virtual-time-budget=20000", "--dump-dom"))
    measured, scrolled, figures = map(int, title.split())
    assert measured == width and figures == 5
    assert (scrolled > 5) is (width == 360)  # there tables and figures scroll within themselves


@in_a_browser
def test_the_page_is_printed_with_its_runs(page: Path) -> None:
    printed = page.parent / "page.pdf"
    browse(page, "--no-pdf-header-footer", f"--print-to-pdf={printed}")
    content = printed.read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 4
