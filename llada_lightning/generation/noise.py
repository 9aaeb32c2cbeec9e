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

    def uniform(self, rows_R: Tensor, candidates_RK: Tensor, begin: int) -> Tensor:
        """(R, K), uniform on [0, 1) where ``candidates_RK`` is, for the columns from ``begin`` on of R rows."""


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
        for place, row in enumerate(rows_M.tolist()):  # one by one: however many are asked for at a time
            noise_MV[place].exponential_(generator=self._generators[row])
        return -noise_MV.log()

    def uniform(self, rows_R: Tensor, candidates_RK: Tensor, begin: int) -> Tensor:
        noise_RK = torch.zeros(candidates_RK.shape, dtype=torch.float64, device=self._device)
        counts = candidates_RK.sum(dim=1).tolist()
        noise_RK[candidates_RK] = torch.cat(
            [
                torch.empty(count, dtype=torch.float64, device=self._device).uniform_(generator=self._generators[row])
                for row, count in zip(rows_R.tolist(), counts, strict=True)
            ]
        )
        return noise_RK


class ReleasedNoise:
    """The draws of the authors' released code: of the whole canvas, from torch's own generator, in its order."""

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        self._batch, self._length, self._device = batch, length, device

    def gumbel(self, rows_M: Tensor, columns_M: Tensor, words: int) -> Tensor:
        uniform_BLV = torch.rand(self._batch, self._length, words, dtype=torch.float64, device=self._device)
        return -torch.log(-torch.log(uniform_BLV[rows_M, columns_M]))

    def uniform(self, rows_R: Tensor, candidates_RK: Tensor, begin: int) -> Tensor:
        end = begin + candidates_RK.shape[1]
        return torch.rand(self._batch, self._length, device=self._device)[rows_R, begin:end]
