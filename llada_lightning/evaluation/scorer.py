"""The rows that scoring gives to the model, and the log-probabilities that it gives back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.bound import BoolArray, NoisyTokens
from llada_lightning.evaluation.requests import FloatArray, Request
from llada_lightning.generation.predictor import guide
from llada_lightning.model.head import token_nll
from llada_lightning.objectives.forward_process import Alphabet
from llada_lightning.objectives.uniform import integrand, levels
from llada_lightning.support.printing import people_console

IntArray = npt.NDArray[np.int64]

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, 65_536
_LOGITS_AT_ONCE = 2**25  # 128 MiB in fp32


@dataclass(frozen=True)
class ScoredInput:
    """One sequence through the model, and the tokens whose log-probability is wanted.

    Args:
        tokens: (T,) The input ids.
        positions, targets: (M,) The positions in ``tokens`` of the wanted logits, and the ids wanted there.
        prompt: The part of the tokens that guidance replaces by [MASK].
        level: The noise level of tokens of which some are replaced by random ones. What is wanted at each position is
            the integrand of their bound, with its sign changed.
    """

    tokens: IntArray
    positions: IntArray
    targets: IntArray
    prompt: slice = field(default_factory=lambda: slice(0, 0))
    level: float | None = None


def noisy_input(request: Request, noise: NoisyTokens) -> ScoredInput:
    """The continuation with some tokens replaced by random ones; the targets are all true ones."""
    prompt, continuation = (np.array(ids, dtype=np.int64) for ids in (request.prompt, request.continuation))
    return ScoredInput(
        tokens=np.concatenate([prompt, noise.tokens_L]),
        positions=len(prompt) + np.arange(len(continuation)),
        targets=continuation,
        prompt=slice(0, len(prompt)),
        level=noise.level,
    )


def masked_input(lm: LanguageModel, request: Request, mask_L: BoolArray) -> ScoredInput:
    """The continuation with its masked tokens, which are the targets."""
    assert lm.mask_token_id is not None
    whole = whole_input(lm, request)
    tokens, positions = whole.tokens.copy(), whole.positions[mask_L]
    tokens[positions] = lm.mask_token_id
    return ScoredInput(tokens, positions - lm.shift_targets, whole.targets[mask_L], whole.prompt)


def whole_input(lm: LanguageModel, request: Request) -> ScoredInput:
    """The true tokens, nothing masked yet; the positions are those of the tokens of the continuation."""
    start = _start(lm, request) if lm.shift_targets else ()
    tokens = np.array((*start, *request.prompt, *request.continuation), dtype=np.int64)
    first = len(tokens) - len(request.continuation)
    return ScoredInput(tokens, np.arange(first, len(tokens)), tokens[first:], slice(len(start), first))


def _start(lm: LanguageModel, request: Request) -> tuple[int, ...]:
    """What stands before a prompt where a token is predicted from the one before it."""
    if lm.start_token_id is not None:
        return (lm.start_token_id,)
    return () if request.prompt else (*lm.text_prefix_ids, lm.eos_token_id)[:1]  # the first token needs one before it


def causal_input(lm: LanguageModel, request: Request) -> ScoredInput:
    """The true tokens but the last, each of which predicts the next one."""
    start = _start(lm, request)
    tokens = np.array((*start, *request.prompt, *request.continuation[:-1]), dtype=np.int64)
    length = len(request.continuation)
    return ScoredInput(tokens, np.arange(len(tokens) - length, len(tokens)), np.array(request.continuation))


class Scorer:
    """Runs inputs through a model; for its settings see ``likelihood.log_likelihood``."""

    def __init__(
        self, lm: LanguageModel, cfg_scale: float, batch_tokens: int | None, progress: ScoringProgress
    ) -> None:
        self.lm, self.cfg_scale, self.progress = lm, cfg_scale, progress
        self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if lm.device.type == "cpu" else GPU_BATCH_TOKENS)

    def log_probs(self, inputs: Sequence[ScoredInput]) -> list[FloatArray]:
        """(M,) float64 nats for each input, in their order. What an input gives does not depend on the others."""
        results: list[FloatArray] = [np.empty(0)] * len(inputs)
        self.progress.expect(len(inputs))
        for batch in self.batches(inputs):
            values = self._batch([inputs[i] for i in batch])
            ends = np.cumsum([len(inputs[i].positions) for i in batch])
            for i, value in zip(batch, np.split(values, ends[:-1]), strict=True):
                results[i] = value
            self.progress.advance(len(batch))
        return results

    def padded(self, rows: Sequence[ScoredInput]) -> tuple[IntArray, Tensor | None]:
        """(B, T) tokens of rows of which the first is the longest, and (B, T) bool: no padding; None where none is."""
        width = len(rows[0].tokens)
        lengths_B = np.array([len(row.tokens) for row in rows])
        tokens_BT = np.full((len(rows), width), self.lm.eos_token_id, dtype=np.int64)
        for b, row in enumerate(rows):
            tokens_BT[b, : len(row.tokens)] = row.tokens
        padded = bool((lengths_B < width).any())
        real_BT = torch.from_numpy(np.arange(width) < lengths_B[:, None]).to(self.lm.device) if padded else None
        return tokens_BT, real_BT

    def batches(self, inputs: Sequence[ScoredInput]) -> Iterator[list[int]]:
        """Indices of inputs that go together, longest first: so what does not fit into memory fails at once."""
        tokens_each = self.batch_tokens // (2 if self.cfg_scale else 1)
        batch: list[int] = []
        for i in sorted(range(len(inputs)), key=lambda i: -len(inputs[i].tokens)):
            if batch and (len(batch) + 1) * len(inputs[batch[0]].tokens) > tokens_each:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def _batch(self, rows: list[ScoredInput]) -> FloatArray:
        """The log-probabilities of the rows' targets, one row behind the other; the first row is the longest."""
        device, width = self.lm.device, len(rows[0].tokens)
        tokens_BT, real_BT = self.padded(rows)
        at_M = torch.from_numpy(np.concatenate([b * width + row.positions for b, row in enumerate(rows)])).to(device)
        targets_M = torch.from_numpy(np.concatenate([row.targets for row in rows])).to(device)
        branches = [tokens_BT]
        if self.cfg_scale:
            assert self.lm.mask_token_id is not None
            without_BT = tokens_BT.copy()
            for without_T, row in zip(without_BT, rows, strict=True):
                without_T[row.prompt] = self.lm.mask_token_id
            branches.append(without_BT)
        hidden_BTD = self.lm.model.hidden(
            torch.from_numpy(np.concatenate(branches)).to(device),
            causal=self.lm.causal,
            attention_mask_BL=None if real_BT is None else real_BT.repeat(len(branches), 1),
            pattern=self.lm.pattern(),
        )
        hidden_NMD = hidden_BTD.unflatten(0, (len(branches), -1)).flatten(1, 2)[:, at_M]
        step = max(1, _LOGITS_AT_ONCE // self.lm.model.vocab_size // len(branches))
        given: tuple[Tensor, ...] = ()
        if self.lm.facts.replaces:
            levels_M = np.concatenate([np.full(len(row.positions), row.level) for row in rows])
            entries = Alphabet(self.lm.model.vocab_size, self.lm.mask_token_id).size
            noisy_M = torch.from_numpy(tokens_BT).flatten().to(device)[at_M]
            given = noisy_M, *levels(torch.from_numpy(levels_M).to(device), entries)
        parts = [
            self._losses(hidden_NMD[:, m : m + step], targets_M[m : m + step], *(x[m : m + step] for x in given))
            for m in range(0, len(targets_M), step)
        ]
        return -torch.cat(parts).double().cpu().numpy()

    def _losses(self, hidden_NMD: Tensor, targets_M: Tensor, *given: Tensor) -> Tensor:
        """(M,) the negative log-likelihoods, or the integrands of the bound of noisy tokens."""
        logits_MV, excluded = self.logits(hidden_NMD), self.lm.excluded_token_id
        if not given:
            return token_nll(logits_MV, targets_M, excluded)
        if excluded is not None:
            logits_MV[:, excluded] = -torch.inf
        return integrand(logits_MV, targets_M, *given)

    def logits(self, hidden_NMD: Tensor) -> Tensor:
        """(M, V) float32; of two branches the guided ones (Eq. 16)."""
        logits_NMV = self.lm.model.head(hidden_NMD).float()
        if len(logits_NMV) == 1:
            return logits_NMV[0]
        return guide(logits_NMV[0], logits_NMV[1], self.cfg_scale)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} rows/s", style="progress.data.speed")


class ScoringProgress:
    """Rows done and to do, their rate and the time left, on stderr (by default where that is a terminal)."""

    def __init__(self, enabled: bool | None = False, what: str = "scoring") -> None:
        console = people_console(stderr=True)
        shown = console.is_terminal if enabled is None else enabled
        columns = ("{task.description}", BarColumn(bar_width=24), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not shown)
        self._task, self._total = self._bar.add_task(what, total=0), 0

    def __enter__(self) -> ScoringProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, rows: int) -> None:
        self._total += rows
        self._bar.update(self._task, total=self._total)

    def advance(self, rows: int) -> None:
        self._bar.advance(self._task, rows)
