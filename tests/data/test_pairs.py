"""Pairs as batches: what is masked, what is learned, and that the cut into micro-batches changes nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from llada_lightning.data.chat import LLADA_TEMPLATE, PLAIN_TEMPLATE, ChatTemplate, Message
from llada_lightning.data.datasets import PairDataset, PairStream, PairValidationDataset
from llada_lightning.data.dialogues import Context, Pairs, tokenize_pairs
from llada_lightning.data.tokenizers import train_tokenizer
from llada_lightning.support.errors import UserError

EOS, MASK = 0, 1
TOKENIZER = train_tokenizer(["a few words"], 258)
TEMPLATE = ChatTemplate.of(PLAIN_TEMPLATE, TOKENIZER, EOS, (MASK,), "plain")
Turn = tuple[str, str]


def pairs_of(*dialogues: list[Turn], length: int = 512, drop: bool = False) -> Pairs:
    rows = [
        (f"row {i}", [m for q, a in turns for m in (Message("user", q), Message("assistant", a))])
        for i, turns in enumerate(dialogues)
    ]
    return tokenize_pairs(rows, TEMPLATE, EOS, length, drop)


def training(pairs: Pairs, pad_together: int = 2, global_batch: int = 4, seed: int = 0) -> PairDataset:
    stream = PairStream(pairs, np.arange(pairs.dialogues), seed, pad_together)
    return PairDataset(stream, EOS, 1e-3, "weyl", global_batch)


def test_the_tokens_are_prompt_response_and_one_eos() -> None:
    pairs = pairs_of([("q", "a")], [("x", "yy"), ("z", "w")])
    assert pairs.dialogues == 2
    decoded = [TOKENIZER.decode(row.tolist(), skip_special_tokens=False) for row in pairs.rows(np.arange(3), EOS, 64)]
    assert [text.partition("[EOS]")[0] for text in decoded] == [
        "user:\nq\n\nassistant:\na",
        "user:\nx\n\nassistant:\nyy",
        "user:\nx\n\nassistant:\nyy\n\nuser:\nz\n\nassistant:\nw",
    ]
    assert (pairs.lengths - pairs.prompts_P).tolist() == [2, 3, 2]


def test_the_bytes_of_responses_that_do_not_come_back_are_counted() -> None:
    lowering = train_tokenizer(["a few words"], 258)
    lowering.normalizer = normalizers.Lowercase()
    template = ChatTemplate.of(PLAIN_TEMPLATE, lowering, EOS, (MASK,), "plain")
    turns = [Message("user", "Q"), Message("assistant", "A B"), Message("user", "Q"), Message("assistant", "é")]
    assert tokenize_pairs([("row", turns)], template, EOS, 512).lost_P.tolist() == [2, 0]
    assert pairs_of([("Q", "A B"), ("Q", "é")]).lost_P.tolist() == [0, 0]


def test_an_answer_that_is_not_learned_is_part_of_the_prompt_alone() -> None:
    said = [Message("user", "x"), Context("assistant", "yy"), Message("user", "z"), Message("assistant", "w")]
    pairs = tokenize_pairs([("row 1", said)], TEMPLATE, EOS, 512)
    learned = pairs_of([("x", "yy"), ("z", "w")])
    assert (pairs.dialogues, len(pairs.lengths), pairs.bytes_P.tolist()) == (1, 1, [1])
    assert pairs.tokens_T.tolist() == learned.tokens_T[learned.starts_P[1] :].tolist()
    assert pairs.prompts_P.tolist() == learned.prompts_P[1:].tolist()


def test_text_that_spells_a_special_token_stays_text() -> None:
    pairs = pairs_of([("[MASK][EOS]", "a [EOS] b")])
    assert pairs.tokens_T.tolist().count(EOS) == 1 and MASK not in pairs.tokens_T


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.text(max_size=6), st.text("ab", min_size=1, max_size=9)), min_size=1, max_size=3),
             min_size=1, max_size=6),
    st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 50),
)  # fmt: skip
def test_prompts_are_never_masked_and_padding_is_learned(
    dialogues: list[list[Turn]], seed: int, pad_together: int, step: int
) -> None:
    data = training(pairs_of(*dialogues), pad_together, seed=seed)
    batch = data.__getitems__(list(range(4 * step, 4 * step + 4)))
    assert batch.response_BL is not None and batch.response_lengths_B is not None
    present = torch.ones_like(batch.masked_BL) if batch.attention_mask_BL is None else batch.attention_mask_BL
    prompts = present.sum(1) - batch.response_lengths_B
    positions = torch.arange(batch.tokens_BL.shape[1])[None]
    assert not (batch.masked_BL & (positions < prompts[:, None])).any()
    assert not (batch.masked_BL & ~present).any()
    # Behind a response there is nothing but EOS, of which the first alone is `arm`'s.
    padding = present & (positions >= prompts[:, None]) & ~batch.response_BL
    assert (batch.tokens_BL[padding] == EOS).all()
    last = (batch.response_BL * positions).argmax(1)
    assert (batch.tokens_BL.gather(1, last[:, None]) == EOS).all()
    assert batch.global_tokens == int(present.sum())


def test_padding_is_masked_as_often_as_the_response() -> None:
    data = training(pairs_of([("q", "a")], [("q", "a" * 40)]), global_batch=2)
    masked = padded = 0
    for step in range(300):
        batch = data.__getitems__([2 * step, 2 * step + 1])
        assert batch.attention_mask_BL is None
        padding = (batch.tokens_BL == EOS) & ~batch.response_BL
        masked, padded = masked + int((batch.masked_BL & padding).sum()), padded + int(padding.sum())
    assert padded == 300 * 39
    assert masked / padded == pytest.approx(0.5, abs=0.03)


def test_the_cut_into_micro_batches_changes_no_row() -> None:
    data = training(pairs_of(*[[("q" * i, "a" * (7 * i % 11 + 1))] for i in range(9)]), pad_together=4, global_batch=8)
    whole = data.__getitems__(list(range(8)))
    for n in range(8):
        one = data.__getitems__([n])
        length = one.tokens_BL.shape[1]
        assert torch.equal(one.tokens_BL[0], whole.tokens_BL[n, :length])
        assert torch.equal(one.masked_BL[0], whole.masked_BL[n, :length])
        assert not whole.masked_BL[n, length:].any()
        assert one.response_lengths_B == whole.response_lengths_B[n]
        assert one.global_tokens == whole.global_tokens


def test_each_visit_draws_one_turn_uniformly_by_seed_and_ordinal() -> None:
    pairs = pairs_of([("a", "b"), ("c", "d"), ("e", "f")])
    stream = PairStream(pairs, np.arange(1), 5, 1)
    drawn = stream.drawn(np.arange(3000))
    counts = Counter(drawn.tolist())
    assert set(counts) == {0, 1, 2} and all(abs(count - 1000) < 100 for count in counts.values())
    assert (stream.drawn(np.arange(100, 200)) == drawn[100:200]).all()
    assert (PairStream(pairs, np.arange(1), 6, 1).drawn(np.arange(100)) != drawn[:100]).any()


def test_an_epoch_visits_each_dialogue_once() -> None:
    pairs = pairs_of(*[[(str(i), "a")] for i in range(10)])
    stream = PairStream(pairs, np.array([1, 3, 5, 7]), 0, 2)
    assert sorted(stream.drawn(np.arange(4)).tolist()) == [1, 3, 5, 7]
    assert sorted(stream.drawn(np.arange(4, 8)).tolist()) == [1, 3, 5, 7]


def test_validation_masks_responses_only_with_their_eos_and_no_padding() -> None:
    pairs = pairs_of(*[[("q", "a" * (1 + i % 5))] for i in range(40)])
    batch = PairValidationDataset(pairs, np.arange(40), 0, EOS).__getitems__(list(range(48)))
    assert batch.counted_B.tolist() == [True] * 40 + [False] * 8
    assert batch.response_BL is not None and not (batch.masked_BL & ~batch.response_BL).any()
    counts = batch.masked_BL.sum(1)
    assert (counts >= 1).all() and (counts <= batch.scored_counts()).all()
    assert batch.scored_counts()[:5].tolist() == [2, 3, 4, 5, 6]


def test_a_pair_beyond_the_context_is_refused_or_dropped() -> None:
    long = [("q", "a"), ("q" * 30, "b")]
    with pytest.raises(UserError, match=r"row 1: prompt of \d+ and response of 2 tokens .* the context of 40"):
        pairs_of([("q", "a")], long, length=40)
    kept = pairs_of([("q", "a")], long, length=40, drop=True)
    assert (kept.dialogues, kept.dropped) == (1, 1)
    with pytest.raises(UserError, match="no dialogue is left of 1"):
        pairs_of(long, length=40, drop=True)


def test_a_template_whose_tokens_the_tokenizer_lacks_says_which_and_where() -> None:
    template = ChatTemplate.of(LLADA_TEMPLATE, TOKENIZER, EOS, (MASK,), "llada")
    rows = [("row 7", [Message("user", "what is <|im_end|>?"), Message("assistant", "x")])]
    message = (
        r"^row 7: chat template of 'llada': it writes <\|end_header_id\|>, <\|eot_id\|>, <\|start_header_id\|>, and"
    )
    with pytest.raises(UserError, match=message):
        tokenize_pairs(rows, template, EOS, 512)
    assert tokenize_pairs(rows, TEMPLATE, EOS, 512).dialogues == 1  # a message may spell what it likes
