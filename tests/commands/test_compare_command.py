"""`llada compare`: two run folders, what is printed of them, and how little is imported for it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.studies import record
from llada_lightning.commands.main import main
from llada_lightning.records import write_records, write_validation

LOSSES = {"arm": [2.0, 3.0, 4.0], "llada": [2.5, 3.25, 5.0]}


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """A run of each objective, validated on three documents of a sequence each."""
    for objective, losses in LOSSES.items():
        made = record(objective, "107k", 1e12, sum(losses) / 3, run=objective)
        write_records(tmp_path / objective, [made])
        write_validation(tmp_path / objective, made["steps"], [(128 * n, 1, loss) for n, loss in enumerate(losses)])
    return [str(tmp_path / objective) for objective in LOSSES]


def test_the_table_holds_both_units_and_what_the_pairing_is_worth(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *runs]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^A: \S+arm, 762 steps of arm 107k, 1e\+12 FLOPs \(6ND\), loss exact$", said, re.MULTILINE)
    assert "B's loss is a bound and the other one exact" in said
    assert re.search(r"^total +nats/token +3\.0000 +3\.5833 +-0\.5833 ± 0\.2205 +-1\.5320 to \+0\.3653$", said, re.M)
    assert re.search(r"^ +bits/byte +1\.3500 +1\.6125 +-0\.2625 ± 0\.0992 +-0\.6894 to \+0\.1644$", said, re.M)
    assert said.splitlines()[-1] == (
        "total: the same 3 documents (3 sequences); unpaired, the error would be 0.9391 nats/token, 4.3 times as much; "
        "so few documents tell little of the error"
    )
    assert max(map(len, [line for line in said.splitlines() if "±" in line])) <= 80


def test_json_has_the_same_numbers_and_the_swapped_runs_their_negatives(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for order in (runs, runs[::-1]):
        assert main(["compare", *order, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    forth, back = found
    assert (forth["a"]["run"], forth["b"]["val_kind"], forth["same_kind"]) == ("arm", "bound", False)
    [total], [swapped] = forth["corpora"], back["corpora"]
    assert (total["of"], total["documents"]) == ("total", 3)
    for unit in ("nats_per_token", "bits_per_byte"):
        assert swapped[unit]["difference"] == -total[unit]["difference"]
        assert swapped[unit]["interval"] == pytest.approx([-end for end in total[unit]["interval"][::-1]])
        assert swapped[unit]["stderr"] == pytest.approx(total[unit]["stderr"])


def test_a_mistake_is_one_line(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", runs[0], f"{runs[0]}x"]) == 2
    assert capsys.readouterr().err.startswith("error: compare: ")
    assert main(["compare", runs[0]]) == 2
    assert capsys.readouterr().err == "error: compare: 1 result given; give two\n"


def test_neither_torch_nor_lightning_is_imported(runs: list[str]) -> None:
    script = (
        "import sys\nfrom llada_lightning.commands.main import main\n"
        f"assert main({['compare', *runs]}) == 0\n"
        "assert not {'torch', 'lightning', 'litdata'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
