"""A sweep of many short fits, of which some are killed: neither its process nor its folders grow."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from helpers.run_state import differences, read_state
from llada_lightning.checkpoints.run_folder import PARTIAL
from processes import child_environment, finish, parent_of, start
from small_fits import Corpora, write_sweep

MINUTES, KILLED_SHARE, COMPARED = 5.0, 0.35, 4
ALLOWED_MIB = 8.0
FIT = ("--trainer.max_steps=60", "--data.workers=1")

Sample = dict[str, float]


def look(pid: int, study: Path, temporary: Path) -> Sample | None:
    """What a process holds, and what its work has left on disk; None where the process has ended.

    Running fits hold some of the files: `half` checkpoints, `hidden` files, entries of ``temporary``.
    """
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files, memory = len(os.listdir(f"/proc/{pid}/fd")), int(status["VmRSS"].split()[0]) / 1024
    except (OSError, KeyError):
        return None
    names = [path.name for path in study.rglob("*")]
    return {
        "rss_mib": memory,
        "open_files": files,
        "threads": int(status["Threads"]),
        "zombies": list(children(pid).values()).count("Z"),
        "half": sum(name.endswith(PARTIAL) for name in names),
        "hidden": sum(name.startswith(".") for name in names),
        "temporary": len(list(temporary.iterdir())),
    }


def children(pid: int) -> dict[int, str]:
    """Process id -> state (`R`, `S`, `Z`, ...) of a process's children."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and parent_of(int(folder.name)) == pid:
            with suppress(OSError, IndexError):
                found[int(folder.name)] = (folder / "stat").read_text().rpartition(")")[2].split()[0]
    return found


def grown(samples: Sequence[Sample]) -> list[str]:
    """Measures whose least value of the last fifth is above that of the first: what leaks never falls.

    Memory may grow by ``ALLOWED_MIB``; of files and processes one more is a leak.
    """
    fifth = max(1, len(samples) // 5)
    found = []
    for name in samples[0]:
        first, last = (min(sample[name] for sample in part) for part in (samples[:fifth], samples[-fifth:]))
        if last - first >= (ALLOWED_MIB if name == "rss_mib" else 1):
            found.append(f"{name}: {first:g} -> {last:g}")
    return found


def samples(**leaks: float) -> list[Sample]:
    """A hundred samples over which a measure grows by so much; running fits hold up to two temporary files."""
    flat = {"rss_mib": 3.0, "open_files": 3.0, "zombies": 0.0}
    return [
        {"temporary": i % 3, **{name: value + leaks.get(name, 0.0) * i / 100 for name, value in flat.items()}}
        for i in range(101)
    ]


def test_a_leak_is_named() -> None:
    assert grown(samples()) == grown(samples(rss_mib=9.0)) == []
    assert grown(samples(rss_mib=40.0, open_files=2.0)) == ["rss_mib: 3 -> 35.4", "open_files: 3 -> 4.62"]


def test_a_look_counts_files_children_and_what_is_half_written(tmp_path: Path) -> None:
    study, temporary = tmp_path / "study", tmp_path / "tmp"
    temporary.mkdir()

    def sample() -> Sample:
        found = look(os.getpid(), study, temporary)
        assert found is not None
        return found

    before = sample()
    half = study / "a" / "checkpoints" / "step=00000005.ckpt.partial"
    half.mkdir(parents=True)
    (study / "a" / ".metrics.0123.csv").write_text("x")
    (temporary / "left").touch()
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"])
    with (tmp_path / "open").open("w"):
        after = sample()
    assert child.pid in children(os.getpid())
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert sample()["zombies"] == before["zombies"] + 1
    child.wait()
    for name in ("open_files", "half", "hidden", "temporary"):
        assert after[name] == before[name] + 1
    assert look(child.pid, study, temporary) is None


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_whose_fits_are_killed_does_not_grow(jobs: int, corpora: Corpora, tmp_path: Path) -> None:
    """A second sweep finishes what was killed, and some of it is compared with undisturbed runs."""
    log, rng, environment = tmp_path / "log", random.Random(jobs), child_environment(tmp_path / "tmp")
    seen: list[Sample] = []
    killed: list[list[str]] = []
    ends: dict[int, float] = {}
    points = int(MINUTES * 60 * jobs / 5)  # no fit takes less than 5 s
    file = write_sweep(tmp_path / "soak.yaml", corpora.first, tmp_path, *FIT, seeds=points)
    run = start(["sweep", "run", str(file), "--jobs", str(jobs)], log, environment)
    try:
        while run.seconds < MINUTES * 60 and not run.ended:
            for pid in [pid for pid, state in children(run.process.pid).items() if state != "Z"]:
                if pid not in ends:
                    ends[pid] = run.seconds + 10 * rng.random() if rng.random() < KILLED_SHARE else float("inf")
                if ends[pid] < run.seconds:
                    with suppress(OSError):
                        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
                        if "fit" in words:  # else it is forked, and not yet the fit
                            os.kill(pid, signal.SIGKILL)
                            killed.append(words[words.index("fit") :])
                            ends[pid] = float("inf")
            if ends and (sample := look(run.process.pid, tmp_path / "kills", tmp_path / "tmp")):
                seen.append(sample)
            time.sleep(0.1)
        run.process.terminate()
        assert run.process.wait(90) in (1, 130), run.last_line()
    finally:
        run.kill()
    assert grown(seen) == []
    begun = log.read_text(errors="replace").count("\nstarted  ")
    write_sweep(file, corpora.first, tmp_path, *FIT, seeds=-(-begun // 2))
    finish(["sweep", "run", str(file), "--jobs", "2", "--edited"], log, environment, timeout=3600)
    assert killed and not list((tmp_path / "kills").rglob(f"*{PARTIAL}"))
    for number, words in enumerate(rng.sample(killed, min(COMPARED, len(killed)))):
        root = tmp_path / f"undisturbed{number}"
        finish([*words, f"--run.root={root}"], log, environment)
        [folder] = root.glob("kills/*")
        assert differences(read_state(tmp_path / "kills" / folder.name), read_state(folder)) == {}
