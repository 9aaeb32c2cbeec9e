"""`faults.csv`: what is read is what was written, and what is damaged is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from llada_lightning.records import FAULT_COLUMNS, read_faults, skipped_updates, write_faults
from llada_lightning.support.errors import UserError


def fault(step: int, action: str) -> dict[str, str]:
    return dict.fromkeys(FAULT_COLUMNS, "") | {"step": str(step), "action": action}


def test_skipped_updates_are_those_of_the_run_and_its_branches(tmp_path: Path) -> None:
    assert read_faults(tmp_path) == [] and skipped_updates(tmp_path) == 0
    rows = [fault(4, "skipped"), fault(6, "reported"), fault(9, "skipped")]
    write_faults(tmp_path, rows)
    assert read_faults(tmp_path) == rows
    (tmp_path / "branches/20").mkdir(parents=True)
    write_faults(tmp_path / "branches/20", [fault(15, "skipped")])
    assert skipped_updates(tmp_path) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe", b"", b"step\n1\n", b"step,action\n1\n", b"step,action\n1,skipped,x\n",
        b"step,action\n-1,skipped\n",
        b'step,action\n"1,skipped\n', b"step,action\n" + b"9" * 19 + b",skipped\n", b"x" * 200_000,
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "faults.csv").write_bytes(content)
    for read in (read_faults, skipped_updates):
        with pytest.raises(UserError, match=r"faults\.csv") as raised:
            read(tmp_path)
        assert len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) < 400
