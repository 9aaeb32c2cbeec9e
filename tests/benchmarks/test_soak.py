"""The soak: what is counted, what counts as growth, and which fits are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from soak import Killer
from soak_watch import MEASURES, Sample, children, grown, look, soak_figure, summarise, table

FLAT = Sample(0.0, 1, *([3.0] * len(MEASURES)))  # type: ignore[arg-type]


def samples(**leaks: float) -> list[Sample]:
    """An hour of samples in which a measure grows by so much."""
    return [
        replace(FLAT, seconds=36.0 * i, **{name: 3.0 + leak * i / 100 for name, leak in leaks.items()})  # type: ignore[arg-type]
        for i in range(101)
    ]


def test_a_leak_has_a_slope_and_is_named() -> None:
    summary = summarise(samples(rss_mib=40.0, done=70.0))
    assert summary["rss_mib"] == pytest.approx({"first": 3.0, "last": 35.4, "most": 43.0, "slope_per_hour": 40.0})
    assert grown(summary, allowed_mib=8.0) == ["rss_mib: 3 -> 35.4"]
    assert grown(summary, allowed_mib=50.0) == []
    assert grown(summarise(samples(open_files=2.0)), allowed_mib=8.0) == ["open_files: 3 -> 4.62"]
    assert "| rss_mib | 3 | 35.4 | 43 | 40 |" in table({"1 at once": summary})


def test_what_running_fits_hold_for_a_while_is_no_leak() -> None:
    busy = [replace(sample, temporary=3 + i % 3) for i, sample in enumerate(samples())]
    assert grown(summarise(busy), allowed_mib=0.0) == []


def test_a_look_counts_files_children_and_what_is_half_written(tmp_path: Path) -> None:
    study, temporary = tmp_path / "study", tmp_path / "tmp"
    (study / "a" / "checkpoints").mkdir(parents=True)
    temporary.mkdir()

    def sample() -> Sample:
        found = look(os.getpid(), study, temporary, 0.0, 1)
        assert found is not None
        return found

    before = sample()
    (study / "a" / "result.json").write_text("[]")
    (study / "a" / ".metrics.0123.csv").write_text("x")
    half = study / "a" / "checkpoints" / "step=00000005.ckpt.partial"
    half.mkdir()
    (half / "shard").write_bytes(bytes(1 << 20))
    (temporary / "left").touch()
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"])
    with (tmp_path / "open").open("w"):
        after = sample()
    assert child.pid in children(os.getpid())
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert sample().zombies == before.zombies + 1
    child.wait()
    grew = {name: getattr(after, name) - getattr(before, name) for name in ("open_files", "children", "done", "half")}
    assert grew == {"open_files": 1, "children": 1, "done": 1, "half": 1}
    assert (after.hidden, after.temporary) == (1, 1)
    assert 1.0 <= after.surplus_mib - before.surplus_mib < 1.1
    assert look(child.pid, study, temporary, 0.0, 1) is None


def test_the_killer_ends_a_share_of_the_fits_and_remembers_their_words() -> None:
    wait = "import signal; print('here', flush=True); signal.pause()"
    command = [sys.executable, "-I", "-S", "-c", wait, "fit", "--seed_everything=7"]
    fits = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    for fit in fits:
        assert fit.stdout is not None and fit.stdout.readline() == b"here\n"
    killer = Killer(random.Random(4), life=0.0)
    draws = random.Random(4)
    try:
        chosen = []
        for _ in fits:  # as the killer draws: whether, and if so when
            chosen.append(draws.random() < 0.35)
            if chosen[-1]:
                draws.random()
        for _look in range(2):
            killer.tend([fit.pid for fit in fits])
        expected = [-signal.SIGKILL if kill else None for kill in chosen]
        assert [fit.wait(30) if kill else fit.poll() for fit, kill in zip(fits, chosen, strict=True)] == expected
        assert killer.killed == [["fit", "--seed_everything=7"]] * sum(chosen)
        assert 0 < sum(chosen) < 3
    finally:
        for fit in fits:
            fit.kill()
            fit.communicate()


def test_the_figure_has_a_panel_for_each_kind() -> None:
    figure = soak_figure([*samples(), *(replace(s, jobs=2, seconds=s.seconds + 3600) for s in samples())])
    assert len(figure.axes) == 4
    assert [len(ax.lines) for ax in figure.axes] == [3, 7, 7, 3]  # both parts of each measure, and where they meet
