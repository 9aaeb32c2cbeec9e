"""Dialogues as tokens: prompts with their responses, and batches of them for training and validation (Sec. 2.3)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llada_lightning.data.chat import ChatTemplate, Message
from llada_lightning.data.dialogues import answered_turns
from llada_lightning.data.order import EpochOrder
from llada_lightning.objectives import forward_process, noise
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch, scored_positions
from llada_lightning.objectives.forward_process import TimeSampling
from llada_lightning.objectives.noise import Stream
from llada_lightning.support.errors import UserError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """All P single-turn pairs of N dialogues, one behind the other, in memory.

    Args:
        tokens_T: (T,) int32: The prompt and response of each pair, and the EOS that ends it.
        starts_P: (P + 1,) int64: The position of each pair's beginning in ``tokens_T``.
        prompts_P: (P,) int64: The number of tokens of each prompt.
        first_N: (N + 1,) int64: The first pair of each dialogue.
        bytes_P: (P,) int64: The UTF-8 bytes of each response.
        lost_P: (P,) int64: The number of these bytes that the response's tokens do not decode to.
        dropped: The number of dialogues that were left out because they do not fit.
    """

    tokens_T: npt.NDArray[np.int32]
    starts_P: Ints
    prompts_P: Ints
    first_N: Ints
    bytes_P: Ints
    lost_P: Ints
    dropped: int = 0

    @property
    def dialogues(self) -> int:
        """The number of dialogues (N)."""
        return len(self.first_N) - 1

    @property
    def lengths(self) -> Ints:
        """The number of tokens of each pair, its EOS included: (P,) int64."""
        return np.diff(self.starts_P)

    def drawn(self, dialogues: Ints, seed: int, ordinals: Ints) -> Ints:
        """Returns one pair of each dialogue, drawn uniformly by seed and ordinal (paper, App. B.1): (B,) int64.

        Args:
            dialogues: (B,) int64: The dialogues.
            seed: The seed of the draw.
            ordinals: (B,) int64: The ordinals of the draw.
        """
        u = noise.uniform_by_ordinal(seed, Stream.TURN, ordinals)[:, 0]
        first, turns = self.first_N[dialogues], self.first_N[dialogues + 1] - self.first_N[dialogues]
        return first + np.floor(u * turns).astype(np.int64)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the tokens and of their division into pairs."""
        digest = hashlib.sha256()
        for array in (self.tokens_T, self.starts_P, self.prompts_P, self.first_N):
            digest.update(np.ascontiguousarray(array).tobytes() + b"|")
        return digest.hexdigest()

    def rows(self, pairs: Ints, eos_id: int, length: int) -> Tensor:
        """Returns the tokens of pairs, padded with EOS: (B, length) int64."""
        tokens_BL = torch.full((len(pairs), length), eos_id)
        for row, pair in zip(tokens_BL, pairs, strict=True):
            own = self.tokens_T[self.starts_P[pair] : self.starts_P[pair + 1]]
            row[: len(own)] = torch.from_numpy(own.astype(np.int64))
        return tokens_BL


def tokenize_pairs(
    dialogues: Iterable[tuple[str, Sequence[Message]]],
    template: ChatTemplate,
    eos_id: int,
    sequence_length: int,
    drop_long: bool = False,
) -> Pairs:
    """Returns the pairs of dialogues, each no longer than a context.

    Args:
        dialogues: The dialogues behind the place of each, which messages name.
        template: The chat template.
        eos_id: The id of the token that ends each response.
        sequence_length: The largest number of tokens of a pair.
        drop_long: Whether dialogues with a longer pair are left out instead of refused.

    Raises:
        UserError: the template refuses a dialogue, a pair is too long, or no dialogue is left.
    """
    tokens: list[npt.NDArray[np.int32]] = []
    prompts, sizes, losses, turns = [], [], [], []
    dropped = 0
    for where, messages in dialogues:
        try:
            answered = answered_turns(messages)
            encoded = [template.turn_ids(turn) for turn in answered]
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        pairs = [(prompt, answer if answer[-1:] == [eos_id] else [*answer, eos_id]) for prompt, answer in encoded]
        longest = max(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        if len(longest[0]) + len(longest[1]) > sequence_length:
            if not drop_long:
                raise UserError(
                    f"{where}: prompt of {len(longest[0])} and response of {len(longest[1])} tokens are longer than "
                    f"the context of {sequence_length}; raise --data.context_length, or leave such rows out with "
                    "--data.drop_long true"
                )
            dropped += 1
            continue
        tokens += [np.array(prompt + answer, dtype=np.int32) for prompt, answer in pairs]
        prompts += [len(prompt) for prompt, _ in pairs]
        responses = [turn[-1].content for turn in answered]
        losses += template.lost_bytes(responses)
        sizes += [len(response.encode()) for response in responses]
        turns.append(len(pairs))
    if not turns:
        raise UserError(f"data.path: no dialogue is left of {dropped}; give others, or raise --data.context_length")
    lengths = [len(own) for own in tokens]
    return Pairs(
        np.concatenate(tokens),
        np.cumsum([0, *lengths]),
        np.array(prompts, dtype=np.int64),
        np.cumsum([0, *turns]),
        np.array(sizes, dtype=np.int64),
        np.array(losses, dtype=np.int64),
        dropped,
    )


@dataclass(frozen=True)
class PairStream:
    """The pair of each ordinal: an epoch reads each dialogue once, in an order by the seed, and draws one of its pairs.

    Args:
        pairs: All pairs.
        dialogues_N: (N,) int64: The dialogues of the split.
        seed: The seed of the order and of the drawn turns.
        pad_together: The number of ordinals, from a multiple of it on, that are padded to the longest pair of them.
    """

    pairs: Pairs
    dialogues_N: Ints
    seed: int
    pad_together: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", EpochOrder([len(self.dialogues_N)], self.seed))

    def drawn(self, ordinals: Ints) -> Ints:
        """Returns the pair of each ordinal: (B,) int64."""
        items = [self._order.item(int(n)) for n in ordinals]  # type: ignore[attr-defined]
        return self.pairs.drawn(self.dialogues_N[items], self.seed, ordinals)

    def padded_lengths(self, ordinals: Ints) -> Ints:
        """Returns the number of tokens of each ordinal's pair with its padding EOS: (B,) int64.

        Groups are formed by ordinals, not by micro-batches, so that devices and accumulation change nothing.
        """
        first = ordinals - ordinals % self.pad_together
        groups = np.unique(first)
        members = (groups[:, None] + np.arange(self.pad_together)).ravel()
        lengths = self.pairs.lengths[self.drawn(members)].reshape(len(groups), -1).max(axis=1)
        return lengths[np.searchsorted(groups, first)]


class PairDataset(Dataset[TrainingBatch]):
    """The micro-batch of a list of ordinals. Prompts are never masked; padding EOS is response (Algorithm 2).

    Args:
        stream: The pairs of the training split.
        eos_id: The id of EOS.
        mask_eps: The smallest mask probability of the forward process.
        time_sampling: How the mask ratios are drawn.
        global_batch: The number of pairs of an optimizer step.
    """

    def __init__(
        self,
        stream: PairStream,
        eos_id: int,
        mask_eps: float,
        time_sampling: TimeSampling,
        global_batch: int,
    ) -> None:
        self.stream, self.eos_id, self.global_batch = stream, eos_id, global_batch
        self.mask_eps, self.time_sampling = mask_eps, time_sampling
        self._global_tokens = lru_cache(maxsize=2)(self._tokens_of_step)  # the micro-batches of a step ask the same

    def __getitems__(self, ordinals: list[int]) -> TrainingBatch:
        n_B = np.asarray(ordinals, dtype=np.int64)
        stream, seed = self.stream, self.stream.seed
        pairs_B, padded_B = stream.drawn(n_B), stream.padded_lengths(n_B)
        prompts_B, lengths_B = stream.pairs.prompts_P[pairs_B], stream.pairs.lengths[pairs_B]
        length = int(padded_B.max())
        p_B = forward_process.mask_probability(forward_process.mask_ratio(seed, n_B, self.time_sampling), self.mask_eps)
        masked_BL = torch.from_numpy(forward_process.random_mask(seed, n_B, p_B, length))
        masked_BL &= _between(prompts_B, padded_B, length)
        scored_M, scored = scored_positions(masked_BL)
        return TrainingBatch(
            tokens_BL=stream.pairs.rows(pairs_B, self.eos_id, length),
            attention_mask_BL=None if (padded_B == length).all() else _between(0 * padded_B, padded_B, length),
            masked_BL=masked_BL,
            p_B=torch.from_numpy(p_B).float(),
            ordinals_B=torch.from_numpy(n_B),
            scored_M=scored_M,
            scored=scored,
            denominator=float(len(n_B)),
            global_tokens=self._global_tokens(int(n_B[0]) // self.global_batch),
            response_BL=_between(prompts_B, lengths_B, length),
            response_lengths_B=torch.from_numpy(padded_B - prompts_B),
        )

    def _tokens_of_step(self, step: int) -> int:
        ordinals = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        return int(self.stream.padded_lengths(ordinals).sum())

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_global_tokens"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._global_tokens = lru_cache(maxsize=2)(self._tokens_of_step)


class PairValidationDataset(Dataset[ValidationBatch]):
    """The validation batch of a list of ordinals: each response with its EOS, unpadded, masked as in Eq. 6.

    So a masked objective knows the length of the response, as in the paper's likelihoods, and autoregression does not.

    Args:
        pairs: All pairs.
        dialogues_N: (N,) int64: The dialogues of the split.
        seed: The seed of the drawn turns and of the masks.
        eos_id: The id of EOS.
    """

    def __init__(self, pairs: Pairs, dialogues_N: Ints, seed: int, eos_id: int) -> None:
        self.pairs, self.dialogues_N, self.seed, self.eos_id = pairs, dialogues_N, seed, eos_id

    def __getitems__(self, ordinals: list[int]) -> ValidationBatch:
        n_B = np.asarray(ordinals, dtype=np.int64)
        counted_B = n_B < len(self.dialogues_N)
        n_B = np.where(counted_B, n_B, 0)
        pairs_B = self.pairs.drawn(self.dialogues_N[n_B], self.seed, n_B)
        prompts_B, lengths_B = self.pairs.prompts_P[pairs_B], self.pairs.lengths[pairs_B]
        length = int(lengths_B.max())
        masked_BL = torch.zeros(len(n_B), length, dtype=torch.bool)
        for row, n, begin, end in zip(masked_BL, n_B, prompts_B, lengths_B, strict=True):
            count = forward_process.stratified_mask_counts(self.seed, n[None], int(end - begin))
            own = forward_process.fixed_count_mask(self.seed, n[None], count, int(end - begin))
            row[begin:end] = torch.from_numpy(own[0])
        return ValidationBatch(
            tokens_BL=self.pairs.rows(pairs_B, self.eos_id, length),
            masked_BL=masked_BL,
            counted_B=torch.from_numpy(counted_B),
            documents_B=torch.from_numpy(self.dialogues_N[n_B]),
            attention_mask_BL=_between(0 * lengths_B, lengths_B, length),
            response_BL=_between(prompts_B, lengths_B, length),
        )


def _between(begin_B: Ints, end_B: Ints, length: int) -> Tensor:
    """(B, length) bool: begin <= position < end."""
    positions_L = np.arange(length)[None]
    return torch.from_numpy((positions_L >= begin_B[:, None]) & (positions_L < end_B[:, None]))
