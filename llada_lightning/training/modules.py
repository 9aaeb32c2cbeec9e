"""`ArmModule`, `LladaModule` and the others: a LightningModule for each objective, of a few lines each.

What differs between objectives is in ``objectives/``: the facts of each in its table, the loss of each in its file.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llada_lightning.objectives import BLOCK_LENGTH, TrainingKind, arm, block, llada, uniform
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch
from llada_lightning.objectives.densities import covers_all_ratios
from llada_lightning.objectives.density_settings import DensitySetting
from llada_lightning.objectives.forward_process import Alphabet
from llada_lightning.support.errors import UserError
from llada_lightning.training.language_module import LanguageModule


class ArmModule(LanguageModule):
    """Autoregression, see ``objectives.arm``."""

    objective = "arm"
    training_loss = arm.training_loss
    sequence_nll = arm.sequence_nll


class LladaModule(LanguageModule):
    """Masked diffusion, see ``objectives.llada``.

    Args:
        settings: The settings of :class:`LanguageModule`, by position.
        loss_weight: The weight of a masked token in the training loss: `elbo`, 1/(p q(t)), whose expectation is the
            bound for every density q of the mask ratios (`data.density`); `ce`, 1; `clipped`, that of `elbo` up to a
            limit; or `per_masked_token`, which gives the mean over the masked tokens of a sequence. The validation
            loss is the bound in any case.
        loss_weight_limit: The largest weight of `clipped`.
        named: The settings of :class:`LanguageModule`, by name.
    """

    objective = "llada"
    by_noise_level = True

    def __init__(
        self,
        *settings: Any,
        loss_weight: llada.WeightName = "elbo",
        loss_weight_limit: float | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*settings, **named)
        self.loss_weight = llada.LossWeight(loss_weight, loss_weight_limit)

    def training_loss(self, batch: TrainingBatch) -> Tensor:
        """The loss of Eq. 3 (Eq. 5 of responses) of a micro-batch, or a surrogate of it, in nats per token."""
        return llada.training_loss(self, batch, self.loss_weight, self.train_levels)

    def sequence_nll(self, batch: ValidationBatch) -> Tensor:
        """(B,) float64: a sample of the bound of each sequence (Eq. 14) or response (Eq. 6), in nats."""
        return llada.sequence_nll(self, batch, self.val_levels)

    def training_kind(self, density: DensitySetting | None = None) -> TrainingKind:
        return self.loss_weight.kind(density)


class BlockDiffusionModule(LladaModule):
    """Block diffusion, see ``objectives.block``.

    Args:
        settings: The settings of :class:`LladaModule`, by position.
        block_length: The number of tokens of a block, a divisor of `data.sequence_length`. With the whole sequence the
            run is that of `llada`; with 1 the bound is exact.
        named: The settings of :class:`LladaModule`, by name.
    """

    objective = "block"
    block_length: int

    def __init__(self, *settings: Any, block_length: int = BLOCK_LENGTH, **named: Any) -> None:
        super().__init__(*settings, **named)
        if block_length < 1:
            raise UserError(f"model.block_length: {block_length} given; it must be at least 1")
        if self.text_prefix_ids is not None:
            raise UserError(
                f"model.text_prefix_ids: {self.text_prefix_ids} given, but {self.objective} begins with the text; "
                "leave it out"
            )
        self.block_length = block_length

    def training_loss(self, batch: TrainingBatch) -> Tensor:
        """The loss of Eq. 3 within each block of a micro-batch, or a surrogate of it, in nats per token."""
        return block.training_loss(self, batch, self.block_length, self.loss_weight, self.train_levels)

    def sequence_nll(self, batch: ValidationBatch) -> Tensor:
        """(B,) float64: a sample of the bound of each sequence or response, summed over its blocks, in nats."""
        return block.sequence_nll(self, batch, self.block_length, self.val_levels)


class UniformDiffusionModule(LanguageModule):
    """Uniform-state diffusion, see ``objectives.uniform``.

    Args:
        settings: The settings of :class:`LanguageModule`, by position.
        named: The settings of :class:`LanguageModule`, by name.
    """

    objective = "uniform"
    by_noise_level = True

    def __init__(self, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        if self.compat is not None:
            raise UserError(
                f"model.compat: {self.compat} given, but {self.objective} has no released code here; leave it out"
            )

    @property
    def alphabet(self) -> Alphabet:
        """The entries of the vocabulary that noise is drawn from."""
        assert self.vocab_size is not None
        return Alphabet(self.vocab_size, self.mask_token_id)

    def with_noise(self, batch: TrainingBatch | ValidationBatch) -> TrainingBatch | ValidationBatch:
        if isinstance(batch, ValidationBatch):
            return uniform.with_validation_noise(batch, self.alphabet)
        assert self.trainer is not None
        return uniform.with_training_noise(batch, self.trainer.datamodule.seed, self.alphabet)  # type: ignore[attr-defined]

    def training_loss(self, batch: TrainingBatch) -> Tensor:
        """A sample of the bound of a micro-batch, in nats per token of the global batch."""
        return uniform.training_loss(self, batch, self.alphabet.size, self.train_levels)

    def sequence_nll(self, batch: ValidationBatch) -> Tensor:
        """(B,) float64: a sample of the bound of each sequence or response, in nats."""
        return uniform.sequence_nll(self, batch, self.alphabet.size, self.val_levels)

    def training_kind(self, density: DensitySetting | None = None) -> TrainingKind:
        return "bound" if covers_all_ratios(None if density is None else density.density) else "surrogate"
