"""The sampler's noise: of each prompt its own, so that an answer does not depend on the rest of the batch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llada_lightning.objectives.noise import Stream, random_words


class Noise(Protocol):
    """What a sampler draws. Rows are numbers within the batch, in ascending order."""

    def gumbel(self, rows_M: Tensor, columns_M: Tensor, words: int) -> Tensor:
        """(M, words) float64, standard Gumbel, for M positions."""

    def uniform(self, rows_R: Tensor, begin: int, end: int) -> Tensor:
        """(R, end - begin), uniform on [0, 1), for columns of R rows."""


class NoiseByPrompt:
    """A generator for each prompt, keyed by (seed, number of the prompt).

    Args:
        seed: of the whole call.
        first: number of the batch's first prompt.
        batch: prompts.
        device: where the noise is drawn; other kinds of device draw other noise.
    """

    def __init__(self, seed: int, first: int, batch: int, device: torch.device) -> None:
        keys = [int(random_words(seed, Stream.GENERATION, first + row, 1)[0] >> 1) for row in range(batch)]
        self._generators = [torch.Generator(device).manual_seed(key) for key in keys]
        self._device = device

    def gumbel(self, rows_M: Tensor, columns_M: Tensor, words: int) -> Tensor:
        # Below float64 the tails of the noise are cut, which lowers the temperature (Zheng et al. 2024).
        noise_MV = torch.empty(len(rows_M), words, dtype=torch.float64, device=self._device)
        start = 0
        for row, count in zip(*(x.tolist() for x in rows_M.unique_consecutive(return_counts=True)), strict=True):
            noise_MV[start : start + count].exponential_(generator=self._generators[row])
            start += count
        return -noise_MV.log()

    def uniform(self, rows_R: Tensor, begin: int, end: int) -> Tensor:
        noise_RK = torch.empty(len(rows_R), end - begin, dtype=torch.float64, device=self._device)
        for place, row in enumerate(rows_R.tolist()):
            noise_RK[place].uniform_(generator=self._generators[row])
        return noise_RK


class ReleasedNoise:
    """The draws of the authors' released code: of the whole canvas, from torch's own generator, in its order."""

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        self._batch, self._length, self._device = batch, length, device

    def gumbel(self, rows_M: Tensor, columns_M: Tensor, words: int) -> Tensor:
        uniform_BLV = torch.rand(self._batch, self._length, words, dtype=torch.float64, device=self._device)
        return -torch.log(-torch.log(uniform_BLV[rows_M, columns_M]))

    def uniform(self, rows_R: Tensor, begin: int, end: int) -> Tensor:
        return torch.rand(self._batch, self._length, device=self._device)[rows_R, begin:end]
