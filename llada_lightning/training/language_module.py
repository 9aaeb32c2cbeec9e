"""`LanguageModule`: the LightningModule that all objectives share, on one Transformer and one data module.

An objective adds its loss (``training/modules.py``). The validation loss has a standard error, over sequences,
documents and ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from llada_lightning.checkpoints.description import excluded_token_id
from llada_lightning.compute.flops import TrainingFlops
from llada_lightning.compute.schedule import WSD
from llada_lightning.compute.shapes import MAX_PARAMETERS, Shape, check_vocabulary, get_shape
from llada_lightning.identity import check_history, check_identity, model_identity, with_stable_names
from llada_lightning.model import Transformer
from llada_lightning.model.attention import ALL
from llada_lightning.model.dropout import check_dropout
from llada_lightning.model.head import RowLoss, token_nll, with_z_loss
from llada_lightning.model.patterns import Pattern, ahead, and_masks, window_ahead
from llada_lightning.model.transformer import NORM_EPS, POSITIVE, ROPE_THETA, is_positive
from llada_lightning.objectives import Objective, TrainingKind, get_objective
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch, bucketed
from llada_lightning.objectives.density_settings import DensitySetting
from llada_lightning.objectives.forward_process import noisy_tokens
from llada_lightning.support.arguments import KeepsArguments
from llada_lightning.support.errors import UserError
from llada_lightning.training.first_weights import check_opening, check_shift, fill_weights, inherited, source_flops
from llada_lightning.training.guard import UpdateGuard
from llada_lightning.training.lightning_internals import call_before_optimizer_step
from llada_lightning.training.machine import Speed, apply_speed
from llada_lightning.training.noise_levels import LevelLosses
from llada_lightning.training.optimizers import OptimizerSettings, hold_back
from llada_lightning.training.parallel import shard, total_norm
from llada_lightning.training.step_graphs import StepGraphs, recorded_steps
from llada_lightning.training.validation import (
    DocumentLosses,
    PolicyLosses,
    ValidationLoss,
    as_metrics,
    corpus_loss,
    losses_by_source,
)

VALIDATION_METRICS = ("val_nats_per_token", "val_stderr", "val_bits_per_byte")
"""The metrics that a module logs for callbacks, at each validation. It logs nothing else."""


class LanguageModule(KeepsArguments, LightningModule, ABC):
    """What all objectives share.

    Args:
        shape: The name of a shape (`llada-8b`, `443k`) or its five dimensions, `L2-d64-h2-kv2-ff192`:
            blocks, width, attention heads, heads for keys and values, and the inner width of the feed-forward layers.
        vocab_size: The number of vocabulary entries of embedding and head; null: that of the data's tokenizer.
        mask_token_id: The id of [MASK]; null: that of the data's tokenizer.
        eos_token_id: The id of EOS; null: that of the data's tokenizer.
        rope_theta: The base of the rotary frequencies.
        norm_eps: The number that is added within the root of every RMSNorm.
        text_prefix_ids: The token ids before a text, such as the BOS of a Llama, in place of the EOS that our `arm` has
            before every sequence. A dialogue begins as its template writes it. null: those of `weights`, else as in our
            own runs.
        optimizer: Which optimizer, and its settings.
        schedule: The schedule of the learning rate.
        compat: The objective whose released code is followed: with `llada`, [MASK] has a logit.
        weights: The path of a checkpoint of any kind to start from, whose shape and vocabulary are taken; null: weights
            are drawn.
        seed: The seed of the initial weights; null: the run's seed.
        qk_norm: Whether an RMSNorm with a gain normalises each query and each key before they are rotated.
        z_loss: The coefficient of the z-loss, such as 1e-4, which is in the gradient and not in the reported loss.
        dropout: The probability with which a value of the outputs of attention and feed-forward is dropped in training.
        token_noise: The share of the input tokens that are replaced by random ones in training; the targets stay. For
            an objective that predicts the next token.
        shift_targets: Whether a masked token is predicted from the position before it, as an `arm` predicts it, behind
            a start token (Gong et al. 2025, arXiv:2410.17891). For masked diffusion that starts from an `arm`; a
            checkpoint with it passes it on.
        open_attention_steps: The number of optimizer steps over which attention is opened: after s of N steps, position
            i sees the positions up to i + floor(L s / N), with L the length of a sequence, or of a block. 0: it is full
            from the start. Validation always has full attention.
    """

    objective: ClassVar[str]
    """The name of the objective in the table of ``objectives``."""
    block_length: int | None = None
    """The number of tokens that are predicted together, of an objective that predicts in blocks."""
    by_noise_level: ClassVar[bool] = False
    """Whether the losses hand their values to ``train_levels`` and ``val_levels``, which are then logged."""

    def __init__(
        self,
        shape: str | dict[str, int] = "443k",
        vocab_size: int | None = None,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        rope_theta: float = ROPE_THETA,
        norm_eps: float = NORM_EPS,
        text_prefix_ids: list[int] | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 (read only; the parser shows its defaults)
        schedule: WSD = WSD(),  # noqa: B008
        compat: Literal["llada"] | None = None,
        weights: str | None = None,
        seed: int | None = None,
        qk_norm: bool = False,
        z_loss: float = 0.0,
        dropout: float = 0.0,
        token_noise: float = 0.0,
        shift_targets: bool = False,
        open_attention_steps: int = 0,
    ) -> None:
        super().__init__()
        self.shape: Shape = get_shape(shape)
        self.vocab_size, self.mask_token_id, self.eos_token_id = vocab_size, mask_token_id, eos_token_id
        if vocab_size is not None:
            check_vocabulary("model.vocab_size", vocab_size)
        if (count := self.shape.params_total(vocab_size or 1)) > MAX_PARAMETERS:
            raise UserError(f"model.shape: {count:.2g} parameters; no memory could hold such a model, correct it")
        outside = [i for i in text_prefix_ids or () if not 0 <= i < (vocab_size or 2**31)]
        if outside:
            raise UserError(f"model.text_prefix_ids: {outside[0]} is no id of the vocabulary of {vocab_size}")
        for name, number in {"rope_theta": rope_theta, "norm_eps": norm_eps}.items():
            if not is_positive(number):
                raise UserError(f"model.{name}: {number} given; {POSITIVE}")
        self.rope_theta, self.norm_eps, self.text_prefix_ids = rope_theta, norm_eps, text_prefix_ids
        self.compat, self.weights, self.seed = compat, weights, seed or 0
        if not 0 <= z_loss <= 1:
            raise UserError(f"model.z_loss: {z_loss} given; it must lie in [0, 1], such as 1e-4")
        check_dropout(dropout)
        if not 0 <= token_noise < 1:
            raise UserError(f"model.token_noise: {token_noise} given; it must lie in [0, 1), such as 0.1")
        if token_noise and not self.facts.causal:
            raise UserError(
                f"model.token_noise: {token_noise} given, but {self.objective} corrupts its inputs itself; leave it out"
            )
        self.qk_norm, self.z_loss, self.dropout, self.token_noise = qk_norm, z_loss, dropout, token_noise
        if shift_targets:
            check_shift(self.facts)
        check_opening(open_attention_steps, self.facts)
        self.shift_targets, self.open_attention_steps = shift_targets, open_attention_steps
        optimizer.check()
        self.optimizer_settings, self.schedule = optimizer, schedule
        self.identity: dict[str, Any] = {}
        self.guard = UpdateGuard()
        self.speed = Speed()
        self.grad_norm: Tensor | None = None
        self.step_loss: Tensor | None = None
        self.step_graphs: StepGraphs | None = None
        self._micro_losses: list[Tensor] = []
        self.train_levels, self.val_levels = LevelLosses("train"), LevelLosses("val")
        self.val_by_level: dict[str, float] = {}
        self.val_loss, self.held_out_losses = ValidationLoss(), nn.ModuleList()
        self.validation: dict[str, float] = {}
        self.val_by_document: DocumentLosses = []
        self.val_by_source: dict[str, dict[str, Any]] = {}
        self.val_held_out: dict[str, dict[str, Any]] = {}
        self.held_out_by_document: dict[str, DocumentLosses] = {}
        self.policy_losses = PolicyLosses()
        self.model: Transformer = None  # type: ignore[assignment]  # configure_model builds it

    def setup(self, stage: str) -> None:
        """Resolve what the command has not resolved: a plain Trainer was started from Python."""
        if not self.identity:
            from llada_lightning.training.configuration import resolve_from_python

            assert self.trainer is not None
            resolve_from_python(self, self.trainer)

    def configure_model(self) -> None:
        """Build and initialise the Transformer, inside the strategy's context; shard it where that has a mesh."""
        if self.model is not None:
            return
        assert self.vocab_size is not None, "the command fills in the vocabulary from the data"
        mesh = self.device_mesh
        with nullcontext() if mesh is None else torch.device("meta"):
            self.model = Transformer(self.shape, self.vocab_size, self.rope_theta, self.norm_eps, self.qk_norm)
        self.model.drop(self.dropout, self.seed)
        apply_speed(self.model, self.speed, whole_blocks=mesh is None or mesh["tensor_parallel"].size() == 1)
        if mesh is not None:
            assert self.trainer is not None
            shard(self.model, mesh, str(self.trainer.precision))
            self.val_loss.process_group = mesh.get_group("data_parallel")  # the others have the same sequences
        device = self.model.head.weight.device
        if device.type != "meta":
            self.model.initialise(torch.Generator(device).manual_seed(self.seed))
            if self.weights is not None and self.trainer is not None and self.trainer.training:
                fill_weights(self.model, self.weights, self.mask_token_id if self.facts.masks else None)

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule by step."""
        optimizer = self.optimizer_settings.build([(n, p) for n, p in self.named_parameters() if p.requires_grad])
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.at(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def builds_own_optimizer(self) -> bool:
        """Whether a subclass builds the optimizer in another way than by ``optimizer_settings``."""
        return type(self).configure_optimizers is not LanguageModule.configure_optimizers

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by norm, over all shards, and have the guard judge the step."""
        if self.step_graphs is not None:
            return  # its graph does it
        assert self.trainer is not None
        losses_A = torch.stack(self._micro_losses)
        self._micro_losses.clear()
        verdict = self.judged(losses_A, gradient_clip_val)
        self.guard.note(self.trainer.global_step + 1, verdict)
        hold_back(optimizer, verdict[-1])

    def judged(self, losses_A: Tensor, clip: float | None) -> Tensor:
        """Clip the gradients, and judge the global batch, the same on all ranks; both figures are kept for the log.

        Args:
            losses_A: (A,) of the micro-batches of this rank.
            clip: The largest norm; None or 0: none.

        Returns:
            (5,) what the guard's verdict holds.
        """
        assert self.trainer is not None
        parameters = [p for p in self.parameters() if p.grad is not None]
        self.grad_norm = norm = judged = total_norm([p.grad for p in parameters if p.grad is not None])
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, float(clip), norm)
            # The guard judges what goes into the update: the gradients times at most clip / norm. Both are finite
            # together with the product, since the factor is 1 at most; so the norm tells, where the clip is a number.
            judged = norm if math.isfinite(clip) else torch.full_like(norm, math.nan)
        figures = torch.stack([losses_A.mean(), judged])
        if self.trainer.world_size > 1:
            dist.all_reduce(figures)  # not Lightning's reduction, whose barrier would wait for the device
            figures /= self.trainer.world_size
        self.step_loss = figures[0]
        return self.guard.verdict(*figures)

    def on_train_start(self) -> None:
        self._micro_losses.clear()  # of a step that an interrupt broke off
        self.step_graphs = self.model.pass_graphs = None
        if self.speed.graph:
            assert self.trainer is not None
            data, trainer = self.trainer.datamodule, self.trainer  # type: ignore[attr-defined]
            rows = data.micro_batch
            all_positions = bucketed(rows * data.sequence_length)
            most = data.most_scored(rows, trainer.max_steps) if self.facts.masks else all_positions
            sizes = (trainer.gradient_clip_val, trainer.accumulate_grad_batches, most)
            self.step_graphs = recorded_steps(self, trainer.optimizers[0], *sizes)

    def on_train_end(self) -> None:
        if self.step_graphs is not None:
            self.step_graphs.end()
            self.step_graphs = None

    # While steps are graphs, gradients stay at their place; `training_step` adds to them, and one hook clips, judges
    # and updates.

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if self.step_graphs is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_validation_model_zero_grad(self) -> None:
        if self.step_graphs is None:
            super().on_validation_model_zero_grad()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        if self.step_graphs is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        assert self.trainer is not None and optimizer_closure is not None
        optimizer_closure()
        call_before_optimizer_step(self.trainer, optimizer)
        losses, self._micro_losses = self._micro_losses, []
        self.step_graphs.update(losses, self.trainer.global_step + 1)

    def with_noise(self, batch: TrainingBatch | ValidationBatch) -> TrainingBatch | ValidationBatch:
        """A batch on the host, where the noise of ordinals is made, with what the model sees of it."""
        if not self.token_noise or isinstance(batch, ValidationBatch):
            return batch
        assert self.trainer is not None
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        special = tuple(i for i in (tokenizer.eos_id, tokenizer.mask_id) if i is not None)
        tokens_BL, ordinals_B = batch.tokens_BL.numpy(), batch.ordinals_B.numpy()
        noisy_BL = noisy_tokens(self.seed, ordinals_B, tokens_BL, self.token_noise, tokenizer.vocab_size, special)
        return batch._replace(noisy_BL=torch.from_numpy(noisy_BL))

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        loss = None if self.step_graphs is None else self.step_graphs.loss(batch)
        if loss is None:
            loss = self.training_loss(batch)
        self._micro_losses.append(loss.detach())
        return loss

    def validation_step(self, batch: ValidationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add up the losses of the run's own validation (the first loader), or of a held-out corpus (a later one)."""
        while len(self.held_out_losses) < dataloader_idx:
            made = ValidationLoss().to(self.device)
            made.process_group = self.val_loss.process_group
            self.held_out_losses.append(made)
        loss = self.val_loss if dataloader_idx == 0 else self.held_out_losses[dataloader_idx - 1]
        assert isinstance(loss, ValidationLoss)
        self.val_levels.paused = dataloader_idx > 0
        nats_per_token_B = self.sequence_nll(batch) / batch.scored_counts()
        loss.update(nats_per_token_B[batch.counted_B], batch.documents_B[batch.counted_B])
        assert self.trainer is not None
        if dataloader_idx == 0 and self.trainer.state.fn != "fit":  # a policy takes as many passes as it has steps
            self.policy_losses.update(self, batch)

    def on_validation_epoch_end(self) -> None:
        mean, stderr, self.val_by_document = self.val_loss.compute()
        self.val_loss.reset()
        self.validation = {"val_nats_per_token": mean, "val_stderr": stderr}
        assert self.trainer is not None
        data = getattr(self.trainer, "datamodule", None)
        bits = None if data is None else data.bits_per_byte(mean)
        if bits is not None:
            self.validation["val_bits_per_byte"] = bits
        # For callbacks; the accounting logs them, by step. Every rank has the same values: they are gathered.
        self.log_dict(self.validation, logger=False, rank_zero_only=True)
        self.val_by_level = self.val_levels.take(self.device) if self.by_noise_level else {}
        self.policy_losses.compute(lambda nats: None if data is None else data.bits_per_byte(nats))
        sources = [] if data is None else data.val_sources
        self.val_by_source = losses_by_source(sources, self.val_by_document) if sources else {}
        self.held_out_by_document, self.val_held_out = {}, {}
        for corpus, loss in zip([] if data is None else data.held_out_corpora, self.held_out_losses, strict=False):
            assert isinstance(loss, ValidationLoss)
            if loss.update_called:  # not in a validation during training
                *_, documents = loss.compute()
                loss.reset()
                self.held_out_by_document[corpus.name] = documents
                self.val_held_out[corpus.name] = corpus_loss(corpus, documents)

    def corpus_metrics(self) -> dict[str, float]:
        """What is logged of each source, of each held-out corpus, under each policy, and at each noise level, at the
        last validation."""
        by_corpus = as_metrics("val", self.val_by_source) | as_metrics("held_out", self.val_held_out)
        return by_corpus | as_metrics("policy", self.policy_losses.measured) | self.val_by_level

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: ValidationBatch, batch_idx: int) -> Tensor:
        """(B,) nats per sequence: exact for `arm`, one sample of the bound for `llada`."""
        return self.sequence_nll(batch)[batch.counted_B]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint knows its run: every setting that makes it this run, and the fingerprints of its data."""
        checkpoint["identity"], checkpoint["objective"] = self.identity, self.objective
        checkpoint["guard"] = self.guard.state_dict()
        if self.device.type == "cpu":
            checkpoint["threads"] = torch.get_num_threads()
        if self.by_noise_level:  # what was summed up since the last row of the log
            checkpoint["train_levels"] = self.train_levels.totals(self.device)
        checkpoint["source_flops"] = 0.0 if self.weights is None else source_flops(self.weights)
        if self.weights is not None:
            checkpoint["inherited"] = inherited(self.weights)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another run's checkpoint; to validate, another model's or tokenizer's."""
        assert self.trainer is not None
        saved = with_stable_names(checkpoint.get("identity", {}))
        fix = "restore these settings, or give another ckpt_path"
        if not self.trainer.training:
            check_identity(model_identity(saved), model_identity(self.identity), self.trainer.ckpt_path, fix)
            return
        check_history(saved, self.identity, checkpoint["global_step"], self.trainer.ckpt_path, fix)
        if "guard" in checkpoint:  # older ones have none
            self.guard.load_state_dict(checkpoint["guard"])
        if "train_levels" in checkpoint:
            self.train_levels.go_on_from(checkpoint["train_levels"], first=self.trainer.global_rank == 0)
        # Lightning counts micro-batches and steps where the count divides by the accumulation. A run may resume with
        # another accumulation, so the count is what it would be had the run had it from the start.
        batches = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for name in ("total", "current"):
            progress[name].update(ready=batches, started=batches, processed=batches, completed=batches - 1)
        # A validation that a signal cut short begins anew.
        validated = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        for name in ("total", "current"):
            validated[name].update(ready=0, started=0, processed=0, completed=0)

    @abstractmethod
    def training_loss(self, batch: TrainingBatch) -> Tensor:
        """The objective's loss of a micro-batch, in nats per token of the global batch (see ``TrainingBatch``)."""

    @abstractmethod
    def sequence_nll(self, batch: ValidationBatch) -> Tensor:
        """(B,) negative log-likelihood of each sequence, or a sample of its bound, in nats."""

    @property
    def facts(self) -> Objective:
        """What the table of objectives knows of this one."""
        return get_objective(self.objective)

    def training_kind(self, density: DensitySetting | None = None) -> TrainingKind:
        """What the expectation of the training loss is, with a density of the mask ratios; None: the uniform one.

        A surrogate loss is logged as ``train_surrogate``, and is not shown as nats per token. A module of one's own
        whose loss is one says so here.
        """
        return self.facts.val_kind

    def flops_per_token(
        self, sequence_length: int, mask_eps: float, response_share: float = 1.0, mean_ratio: float | None = None
    ) -> TrainingFlops:
        """The expected training FLOPs of a token, by the three counts; arguments as of ``Objective``."""
        assert self.vocab_size is not None
        sizes = (self.shape, self.vocab_size, sequence_length)
        return self.facts.flops_per_token(*sizes, mask_eps, response_share, mean_ratio, self.block_length)

    def head_nll(
        self,
        hidden_MD: Tensor,
        targets_M: Tensor,
        weights_M: Tensor,
        loss: RowLoss | None = None,
        rows: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of negative log-likelihoods with a gradient, and each of them (M,) in nats.

        Another loss takes further tensors of the positions, ``rows``. The gradient of the z-loss is in that of the sum,
        whose value does not hold it.
        """
        excluded = excluded_token_id(self.compat, self.mask_token_id)
        if self.speed.loss == "chunked":
            return self.model.head.nll(hidden_MD, targets_M, weights_M, excluded, self.z_loss, loss, rows)
        logits_MV = self.model.head(hidden_MD)
        if loss is not None and excluded is not None:
            logits_MV[:, excluded] = float("-inf")
        nll_M = token_nll(logits_MV, targets_M, excluded) if loss is None else loss.values(logits_MV, targets_M, *rows)
        total = (nll_M * weights_M).sum()
        return with_z_loss(total, logits_MV, weights_M, self.z_loss) if self.z_loss else total, nll_M

    def start_ids(self, batch: TrainingBatch | ValidationBatch) -> tuple[int, ...]:
        """The token ids before the sequences of a batch, none of which is predicted."""
        own: tuple[int, ...] = ()
        if self.facts.starts_with_eos or self.shift_targets:
            assert self.eos_token_id is not None
            own = (self.eos_token_id,)
        if self.text_prefix_ids is None:
            return own
        if batch.response_BL is not None:  # a dialogue, which begins as its template writes it
            return ()
        return tuple(self.text_prefix_ids) or own

    def hidden_after(
        self,
        start_ids: tuple[int, ...],
        inputs_BL: Tensor,
        documents_BL: Tensor | None,
        attention_mask_BL: Tensor | None = None,
        *,
        causal: bool,
        pattern: Pattern | None = None,
        positions_L: Tensor | None = None,
        queries: slice = ALL,
        ordinals_B: Tensor | None = None,
        rows_M: Tensor | None = None,
    ) -> Tensor:
        """The normalised residual stream of inputs that see the token ids before them: (B, L, D), or (M, D) of rows.

        With shifted targets it is that of the position before each input, from which the input's token is predicted.

        Args:
            start_ids: The token ids before every sequence.
            inputs_BL: (B, L) int64.
            documents_BL: (B, L) int64, the document of each input; None: attention crosses documents.
            attention_mask_BL: (B, L) bool, False where an input is padding.
            causal: Whether a position attends to earlier positions only.
            pattern: The inputs that each input sees; None: all of them, or those before it.
            positions_L: (L,) int64, the position of each input; None: one after the other.
            queries: The inputs whose result is wanted.
            ordinals_B: (B,) int64, the ordinals of a training batch, which decide what dropout drops; None: nothing.
            rows_M: (M,) int64, the rows of the flattened (B L) that are wanted; None: all.
        """
        if self.dropout and ordinals_B is None and self.training and torch.is_grad_enabled():
            raise UserError(
                f"model.dropout: {self.dropout} given, but the training loss of {self.objective} gives hidden_after no "
                "ordinals_B; leave it out, or correct the objective"
            )
        if self.open_attention_steps and not causal:
            pattern = self._opening(pattern, positions_L, ordinals_B, inputs_BL.device)
        count, shifted = len(start_ids), self.shift_targets and not causal
        assert not (count or shifted) or (positions_L is None and queries == ALL)
        if count:
            before = [inputs_BL.new_full((len(inputs_BL), 1), token_id) for token_id in start_ids]
            inputs_BL = torch.cat([*before, inputs_BL], dim=1)
            documents_BL, attention_mask_BL = (  # they belong to the first token, which is never padding
                None if own is None else torch.cat([own[:, :1].expand(-1, count), own], dim=1)
                for own in (documents_BL, attention_mask_BL)
            )
        if shifted and documents_BL is not None:  # each belongs to the document of the token that it predicts
            documents_BL = torch.cat([documents_BL[:, 1:], documents_BL[:, -1:]], dim=1)
        alone = self.speed.last_block == "scored" and not (self.dropout or count or shifted)
        hidden_BLD = self.model.hidden(
            inputs_BL,
            causal=causal,
            attention_mask_BL=attention_mask_BL,
            documents_BL=documents_BL,
            pattern=pattern,
            positions_BL=None if positions_L is None else positions_L[None],
            queries=queries,
            dropped_ordinals_B=ordinals_B if self.dropout else None,
            rows_M=rows_M if alone else None,
        )
        if alone and rows_M is not None:
            return hidden_BLD
        if not shifted:
            hidden_BLD = hidden_BLD[:, count:]
        elif count:
            hidden_BLD = hidden_BLD[:, count - 1 : -1]
        else:  # the first token is given: what is put at its place does not matter
            hidden_BLD = hidden_BLD.roll(1, dims=1)
        return hidden_BLD if rows_M is None else hidden_BLD.flatten(0, 1).index_select(0, rows_M)

    def _opening(
        self, pattern: Pattern | None, positions_L: Tensor | None, ordinals_B: Tensor | None, device: torch.device
    ) -> Pattern | None:
        """What the inputs of a training batch may see at this step, of what they see in the end."""
        if ordinals_B is None:  # a validation batch
            if self.training and torch.is_grad_enabled():
                raise UserError(
                    f"model.open_attention_steps: {self.open_attention_steps} given, but the training loss of "
                    f"{self.objective} gives hidden_after no ordinals_B; leave it out, or correct the objective"
                )
            return pattern
        assert self.trainer is not None
        together = self.block_length or self.trainer.datamodule.sequence_length  # type: ignore[attr-defined]
        window = window_ahead(self.trainer.global_step, self.open_attention_steps, together)
        if window is None:
            return pattern
        near = ahead(torch.full((), window, device=device), positions_L)  # filled there: nothing waits for a copy
        return near if pattern is None else and_masks(pattern, near)
