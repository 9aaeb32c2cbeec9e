"""Log-probabilities of chosen tokens of many sequences: packed by length, logits only where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.requests import FloatArray
from llada_lightning.generation.predictor import guide
from llada_lightning.model.head import token_nll
from llada_lightning.support.printing import people_console

IntArray = npt.NDArray[np.int64]

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, 65_536
_LOGITS_AT_ONCE = 2**25  # 128 MiB in fp32


@dataclass(frozen=True)
class Row:
    """One sequence through the model, and the tokens whose log-probability is wanted.

    Args:
        tokens: (T,) input ids.
        positions: (M,) where in ``tokens`` the wanted logits are.
        targets: (M,) ids whose log-probability is wanted there.
        prompt_length: tokens at the left that guidance replaces by [MASK].
    """

    tokens: IntArray
    positions: IntArray
    targets: IntArray
    prompt_length: int = 0


class Scorer:
    """Runs rows through a model.

    Args:
        lm: the model.
        cfg_scale: w of Eq. 16; 0: no guidance.
        batch_tokens: tokens, padding and the unguided branch included, of one pass; by default what suits the device.
        progress: told of every row done.
    """

    def __init__(
        self, lm: LanguageModel, cfg_scale: float, batch_tokens: int | None, progress: ScoringProgress
    ) -> None:
        self.lm, self.cfg_scale, self.progress = lm, cfg_scale, progress
        self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if lm.device.type == "cpu" else GPU_BATCH_TOKENS)

    def log_probs(self, rows: Sequence[Row]) -> list[FloatArray]:
        """(M,) float64 nats for each row, in the order of ``rows``. What a row gives does not depend on the others."""
        results: list[FloatArray] = [np.empty(0)] * len(rows)
        self.progress.expect(len(rows))
        for batch in self._batches(rows):
            values = self._batch([rows[i] for i in batch])
            ends = np.cumsum([len(rows[i].positions) for i in batch])
            for i, value in zip(batch, np.split(values, ends[:-1]), strict=True):
                results[i] = value
            self.progress.advance(len(batch))
        return results

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Indices of rows that go together, longest first: so what does not fit into memory fails at once."""
        tokens_each = self.batch_tokens // (2 if self.cfg_scale else 1)
        batch: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens)):
            if batch and (len(batch) + 1) * len(rows[batch[0]].tokens) > tokens_each:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def _batch(self, rows: list[Row]) -> FloatArray:
        """The log-probabilities of the rows' targets, one row behind the other; the first row is the longest."""
        device, width = self.lm.device, len(rows[0].tokens)
        lengths_B = np.array([len(row.tokens) for row in rows])
        padded = bool((lengths_B < width).any())
        tokens_BT = np.full((len(rows), width), self.lm.eos_token_id, dtype=np.int64)
        for b, row in enumerate(rows):
            tokens_BT[b, : len(row.tokens)] = row.tokens
        real_BT = torch.from_numpy(np.arange(width) < lengths_B[:, None]).to(device) if padded else None
        at_M = torch.from_numpy(np.concatenate([b * width + row.positions for b, row in enumerate(rows)])).to(device)
        targets_M = torch.from_numpy(np.concatenate([row.targets for row in rows])).to(device)
        branches = [tokens_BT]
        if self.cfg_scale:
            assert self.lm.mask_token_id is not None
            prompts_B = np.array([row.prompt_length for row in rows])
            branches.append(np.where(np.arange(width) < prompts_B[:, None], self.lm.mask_token_id, tokens_BT))
        hidden_BTD = self.lm.model.hidden(
            torch.from_numpy(np.concatenate(branches)).to(device),
            causal=self.lm.causal,
            attention_mask_BL=None if real_BT is None else real_BT.repeat(len(branches), 1),
        )
        hidden_NMD = hidden_BTD.unflatten(0, (len(branches), -1)).flatten(1, 2)[:, at_M]
        step = max(1, _LOGITS_AT_ONCE // self.lm.model.vocab_size // len(branches))
        parts = [
            token_nll(self._logits(hidden_NMD[:, m : m + step]), targets_M[m : m + step], self.lm.excluded_token_id)
            for m in range(0, len(targets_M), step)
        ]
        return -torch.cat(parts).double().cpu().numpy()

    def _logits(self, hidden_NMD: Tensor) -> Tensor:
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
    """Rows done and to do, their rate and the time left, on stderr; a context manager.

    Args:
        enabled: None: where stderr is a terminal.
        what: is done.
    """

    def __init__(self, enabled: bool | None = False, what: str = "scoring") -> None:
        console = people_console(stderr=True)
        shown = console.is_terminal if enabled is None else enabled
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not shown)
        self._task = self._bar.add_task(what, total=0)
        self._total = 0

    def __enter__(self) -> ScoringProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, rows: int) -> None:
        """More rows are to be done."""
        self._total += rows
        self._bar.update(self._task, total=self._total)

    def advance(self, rows: int) -> None:
        """Rows are done."""
        self._bar.advance(self._task, rows)
