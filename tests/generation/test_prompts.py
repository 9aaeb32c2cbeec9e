"""Prompts as token ids: the pieces of a text around its gaps."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer

from helpers.small_models import random_model
from helpers.small_tokenizers import byte_level, sentence_piece
from llada_lightning.generation.prompts import prompt_ids


@pytest.mark.parametrize("tokenizer", [byte_level, sentence_piece])
def test_a_gap_moves_no_space_into_the_text_behind_it(tokenizer: Any) -> None:
    """SentencePiece's tokenizers put a space before a text, and behind a gap no text begins."""
    with_mask = Tokenizer.from_str(tokenizer().to_str())
    with_mask.add_special_tokens(["[MASK]"])
    mask = with_mask.token_to_id("[MASK]")
    lm = random_model(vocab_size=400, tokenizer=with_mask, mask_token_id=mask)
    (ids,) = prompt_ids(lm, "the boats[MASK] home[MASK]", infill=True)
    home = lm.encode("came home")[-1]
    assert ids == [*lm.encode("the boats"), mask, home, mask]
    assert lm.decode([token for token in ids if token != mask]) == "the boats home"
    (word,) = prompt_ids(lm, "[MASK]me", infill=True)
    assert word == [mask, lm.encode("me")[-1]]
