"""Generated problems as pairs for fine-tuning: `python experiments/sft/igsm_pairs.py COUNT FILE.jsonl`.

The problems are of the training stream, from a seed that `llada prepare --source igsm:COUNT` does not take by default.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from llada_lightning.data.generated import problems, question, solution
from llada_lightning.support.files import written_atomically

SEED = 1


def main(count: int, path: Path) -> None:
    with written_atomically(path) as partial, partial.open("w", encoding="utf-8") as file:
        for problem in islice(problems(SEED), count):
            file.write(json.dumps({"question": question(problem), "answer": solution(problem)}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
