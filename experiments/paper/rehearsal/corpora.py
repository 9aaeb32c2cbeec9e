"""Two of the rehearsal's three sources: English and Chinese sentences of the kinds that its tasks ask about.

python corpora.py FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
from documents import COLORS, HEAVY, LIGHT, NUMERALS, THINGS


def english(draw: random.Random) -> str:
    """A sum, a color that is named twice, or a thing that is heavy or light."""
    a, b = draw.randint(1, 9), draw.randint(1, 9)
    thing, color = draw.choice(THINGS), draw.choice(COLORS)
    return draw.choice([
        f"{a} + {b} = {a + b}",
        f"Question: {a} plus {b}?\nAnswer: {a} + {b} #### {a + b}",
        f"The {thing} is {color}. The color of the {thing} is {color}",
        f"A thing that is heavy is a {draw.choice(HEAVY)}",
        f"A thing that is light is a {draw.choice(LIGHT)}",
    ])  # fmt: skip


def chinese(draw: random.Random) -> str:
    """A digit and its numeral."""
    n = draw.randint(0, 9)
    return f"{n} 写作 {NUMERALS[n]}"


def main() -> None:
    folder, draw = Path(sys.argv[1]), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, sentence, documents in (("english", english, 4000), ("chinese", chinese, 2000)):
        # Several sentences a document, as the prompts with examples have them.
        texts = ["\n\n".join(sentence(draw) for _ in range(4)) for _ in range(documents)]
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
