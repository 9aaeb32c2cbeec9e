"""How fast `llada prepare` writes tokens, and whether its memory grows with the corpus.

The corpus is the running interpreter's library as JSONL, once and four times over; the tokenizer is trained before
and given. Each measurement runs in a process of its own. Run: python benchmarks/prepare_speed.py [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COPIES = (1, 4)

# litdata (and with it torch) is imported first: the rate is that of the work, not of the start.
MEASURE = """
import json, resource, sys, time
import litdata.streaming.writer
from llada_lightning.data.prepare import prepare
source, tokenizer, out = sys.argv[1:]
start_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
begin = time.perf_counter()
manifest = prepare(source, out, tokenizer=tokenizer, progress=False)
seconds = time.perf_counter() - begin
splits = manifest.splits.values()
print(json.dumps({
    "documents": sum(split.documents for split in splits),
    "bytes": sum(split.bytes for split in splits),
    "tokens": sum(split.tokens for split in splits),
    "seconds": seconds,
    "start_mib": start_mib,
    "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""

# In a process of its own as well: a child's peak begins at its parent's.
TRAIN = """
import sys
from llada_lightning.data.corpora import documents
from llada_lightning.data.tokenizers import train_tokenizer
train_tokenizer(documents("python-stdlib"), 4096).save(sys.argv[1])
"""

WRITE = """
import json, sys
from llada_lightning.data.corpora import documents
with open(sys.argv[1], "w", encoding="utf-8") as file:
    for copy in range(int(sys.argv[2])):
        for number, text in enumerate(documents("python-stdlib")):
            print(json.dumps({"text": f"# copy {copy}, file {number}\\n{text}"}), file=file)
"""


def run(script: str, *arguments: str) -> str:
    """Runs a script in a fresh interpreter; returns what it printed."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, text=True, stdout=subprocess.PIPE
    ).stdout


def measure(folder: Path, tokenizer: Path, copies: int, repeats: int) -> dict[str, Any]:
    """Prepares the corpus ``copies`` times over; the fastest of the repeats, and the largest memory."""
    source = folder / f"corpus{copies}.jsonl"
    run(WRITE, str(source), str(copies))
    rows = []
    for _ in range(repeats):
        out = folder / "out"
        rows.append(json.loads(run(MEASURE, str(source), str(tokenizer), str(out))))
        shutil.rmtree(out)
    source.unlink()
    best = min(rows, key=lambda row: row["seconds"])
    peak = max(row["max_rss_mib"] for row in rows)
    rate = best["tokens"] / best["seconds"]
    return {"copies": copies, **best, "max_rss_mib": peak, "tokens_per_second": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each size")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(TRAIN, str(folder / "tokenizer.json"))
        rows = [measure(folder, folder / "tokenizer.json", copies, options.repeats) for copies in COPIES]
    growth = rows[-1]["max_rss_mib"] / rows[0]["max_rss_mib"]
    hardware = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    print(
        f"{'corpus':>7} {'MB':>7} {'M tokens':>9} {'seconds':>8} {'M tokens/s':>11} {'RSS start':>10} {'RSS peak':>9}"
    )
    for row in rows:
        print(
            f"{row['copies']:>6}x {row['bytes'] / 1e6:>7.1f} {row['tokens'] / 1e6:>9.2f} {row['seconds']:>8.2f} "
            f"{row['tokens_per_second'] / 1e6:>11.2f} {row['start_mib']:>6.0f} MiB {row['max_rss_mib']:>5.0f} MiB"
        )
    print(f"peak memory at {COPIES[-1]}x over {COPIES[0]}x the corpus: {growth:.2f}; {hardware}")
    if options.json:
        content = {"rows": rows, "memory_ratio": growth, **hardware}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
