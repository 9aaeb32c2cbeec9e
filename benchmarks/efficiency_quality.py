"""Prompts of the efficiency study, and how good the answers are without a benchmark at hand.

A judge, an `arm`, tells how likely an answer is: nats a token, also known as generative perplexity. It is lowest for
texts that repeat themselves, so the entropy of each answer's words stands beside it: repetition has little of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.data.datasets import TokenStream
from llada_lightning.data.manifest import check_sequence_length, read_manifest, read_tokenizer_text
from llada_lightning.data.order import WINDOW_SHARDS
from llada_lightning.data.shards import check_shards
from llada_lightning.data.tokenizers import tokenizer_from_text
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.objectives.standard_errors import ratio_and_stderr
from llada_lightning.support.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """What answers are written to.

    Args:
        source: for people.
        prompts: ids or texts.
        continuations: ids of what follows each prompt where it comes from; None where nothing is known of it.
    """

    source: str
    prompts: list[Any]
    continuations: list[list[int]] | None = None


@dataclass(frozen=True)
class Quality:
    """How good answers are. All counts are of the judge's tokens, up to and with the one that ends an answer.

    Args:
        nats_per_token: of the answers given their prompts under the judge; errors are over prompts.
        entropy: nats, of the words of one answer; mean over the answers.
        mean_length: tokens of an answer.
    """

    nats_per_token: float
    nats_stderr: float
    entropy: float
    entropy_stderr: float
    mean_length: float

    def record(self) -> dict[str, float]:
        return asdict(self)


def prompts_of_file(path: Path, count: int) -> Prompts:
    """The first lines of a text file, empty ones left out.

    Raises:
        UserError: the file cannot be read, or has too few lines.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts: '{path}' cannot be read as text ({error}); give one with a prompt a line"
        ) from error
    if len(lines) < count:
        raise UserError(f"--prompts: '{path}' has {len(lines)} prompts; set --prompts-count to no more")
    return Prompts(f"{path.name}, one prompt a line", list(lines[:count]))


def prompts_of_data(
    folder: str, count: int, prompt_length: int, length: int, models: Iterable[LanguageModel], seed: int
) -> Prompts:
    """Sequences of a prepared folder's validation split: prompts, and what truly follows them.

    Raises:
        UserError: the folder has too few sequences, or other tokens than one of the models.
    """
    manifest, tokenizer = read_manifest(folder), tokenizer_from_text(read_tokenizer_text(folder), folder)
    for lm in models:
        if not same_words(lm, tokenizer, manifest.tokenizer.vocab_size):
            raise UserError(f"--data: '{folder}' has other tokens than '{lm.name}'; give --prompts with texts instead")
    whole = prompt_length + length
    check_shards(folder, manifest)
    check_sequence_length(manifest, whole)
    split = manifest.splits["val"]
    if split.items(whole) < count:
        raise UserError(
            f"--data: '{folder}' has {split.items(whole)} validation sequences of {whole} tokens; set --prompts-count "
            "to no more"
        )
    stream = TokenStream([folder.rstrip("/")], [manifest], "val", [1.0], whole, seed, WINDOW_SHARDS)
    rows = stream.tokens(range(count)).tolist()
    source = f"{prompt_length} tokens of validation text each ({manifest.fingerprint[:12]})"
    return Prompts(source, [row[:prompt_length] for row in rows], [row[prompt_length:] for row in rows])


def same_words(lm: LanguageModel, tokenizer: Tokenizer | None, vocab_size: int) -> bool:
    """Whether a token id means the same to a model and to others; by the vocabulary's size where one has no words."""
    if lm.tokenizer is None or tokenizer is None:
        return lm.model.vocab_size == vocab_size
    return bool(lm.tokenizer.get_vocab() == tokenizer.get_vocab())


def judged(
    judge: LanguageModel, lm: LanguageModel, prompts: Sequence[Any], answers: Sequence[Sequence[int]]
) -> Quality:
    """The quality of answers of a model, in the judge's words.

    Args:
        judge: an `arm`.
        lm: who wrote the answers; where its words are not the judge's, texts are read anew.
        prompts: ids or texts.
        answers: ids, each cut behind its first end.
    """
    shared = same_words(judge, lm.tokenizer, lm.model.vocab_size)
    read = [ended(answer, lm.end_token_ids) for answer in answers]
    read = read if shared else [judge.encode(lm.decode(answer)) for answer in read]
    given = [judge.encode_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    scores = log_likelihood(judge, list(zip(given, read, strict=True)), truncate="left")
    lengths = [len(answer) for answer in read]
    nats, nats_stderr = ratio_and_stderr([-score.mean for score in scores], lengths)
    entropies_N = np.array([unigram_entropy(answer) for answer in read])
    stderr = float(entropies_N.std(ddof=1)) / math.sqrt(len(read)) if len(read) > 1 else math.nan
    return Quality(nats, nats_stderr, float(entropies_N.mean()), stderr, sum(lengths) / len(lengths))


def ended(answer: Sequence[int], end_token_ids: Sequence[int]) -> list[int]:
    """An answer up to and with its first end token."""
    end = next((i + 1 for i, token in enumerate(answer) if token in end_token_ids), len(answer))
    return list(answer[:end])


def unigram_entropy(answer: Sequence[int]) -> float:
    """Entropy of the words' frequencies within an answer, nats: 0 for one word again and again, at most ln(length)."""
    shares_N = np.array(list(Counter(answer).values())) / max(1, len(answer))
    return float(-(shares_N * np.log(shares_N)).sum()) + 0.0
