"""docs/reliability.md: every fault has a test, and the test is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = re.findall(
    r"^\| (.+?) \| (.+?) \| `(tests/[\w/]+\.py)::(test_\w+)` \|$", (ROOT / "docs/reliability.md").read_text(), re.M
)


def test_every_named_test_is_there() -> None:
    missing = [(path, test) for _, _, path, test in ROWS if f"def {test}(" not in (ROOT / path).read_text()]
    assert not missing


def test_every_row_of_the_fault_table_is_read_here() -> None:
    lines = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if "`tests/" in line]
    assert len(ROWS) == len(lines)
    faults = [fault for fault, *_ in ROWS]
    assert len(set(faults)) == len(faults) >= 60
