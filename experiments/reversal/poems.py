"""Poems that a small model can hold, with their pairs of lines.

    python experiments/reversal/poems.py POEMS.jsonl PAIRS.json OUT [LONGEST [OTHERS]]

POEMS holds `text`, a poem a line (compressed or not); PAIRS the `first` and `second` lines to be asked for.
OUT/poems.jsonl gets the poems of at most LONGEST characters (default: any) in which a pair's lines stand next to each
other, and OTHERS more (default 0); OUT/pairs.json those pairs.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import islice
from pathlib import Path

from llada_lightning.data.text_files import Meter, json_records
from llada_lightning.evaluation.protocols import read_halves

JOINER = "，"


def main(poems: Path, pairs: str, out: Path, longest: float = math.inf, others: int = 0) -> None:
    wanted = {pair.first + JOINER + pair.second: pair for pair in read_halves(pairs)}
    texts = [str(record["text"]) for _, record in json_records(poems, Meter())]
    texts = [text for text in texts if len(text) <= longest]
    holding = {line: next((text for text in texts if line in text), None) for line in wanted}
    kept = list(dict.fromkeys(text for text in holding.values() if text is not None))
    kept += list(islice((text for text in texts if text not in set(kept)), others))
    found = [vars(pair) for line, pair in wanted.items() if holding[line] is not None]
    out.mkdir(parents=True, exist_ok=True)
    (out / "poems.jsonl").write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept))
    (out / "pairs.json").write_text(json.dumps(found, ensure_ascii=False, indent=1))
    print(f"{len(kept)} poems, {sum(map(len, kept)):,} characters, {len(found)} pairs in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))
