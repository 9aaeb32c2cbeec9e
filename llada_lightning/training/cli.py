"""`llada fit`, `validate`, `test` and `predict`: a LightningCLI that resolves its configuration before building."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from llada_lightning.checkpoints.run_folder import (
    CHECKPOINTS,
    CONFIG,
    final_checkpoint,
    require_whole,
    run_folder_of,
    saved_identity,
    saved_step,
    saved_threads,
)
from llada_lightning.compute.rules import Rules
from llada_lightning.compute.shapes import shape_name
from llada_lightning.data.loading import LanguageDataModule, require_open_files
from llada_lightning.data.manifest import loss_note
from llada_lightning.data.sft import SftDataModule
from llada_lightning.evaluation.policy import Policy, policies_of
from llada_lightning.identity import check_identity, model_identity
from llada_lightning.records import read_records
from llada_lightning.settings import Budget, Guard, Place, Profile, Wandb, check_seed
from llada_lightning.support.cluster import agreed_launch
from llada_lightning.support.command_line import refuse_unusable, unbuilt
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import written_atomically
from llada_lightning.support.jsonargparse_internals import whole_numbers_first
from llada_lightning.support.locks import run_lock
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import MAX_YAML_BYTES, check_yaml, read_text
from llada_lightning.support.security import refuse_secrets, trust_known_modules
from llada_lightning.support.signals import LeaveRequest, leaving_at_a_steps_end, say
from llada_lightning.training.callbacks.accounting import Accounting, BudgetProgress, EvaluationProgress
from llada_lightning.training.callbacks.checkpoints import AtomicCheckpointIO, StepCheckpoints
from llada_lightning.training.callbacks.leaving import LeaveTogether, MemoryAdvice, check_monitors, fault_of_a_callback
from llada_lightning.training.callbacks.loggers import MetricsCSV, check_wandb, wandb_logger
from llada_lightning.training.callbacks.profile import StepProfiler
from llada_lightning.training.configuration import identity, reject_unknown_keys, resolve_data, resolve_fit, run_name
from llada_lightning.training.guard import BadNumbers, DivergedError, UpdateGuard
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.lightning_internals import HookedCLI, OneLineParser, class_first, writes_shards
from llada_lightning.training.machine import Speed, check_devices, resolve_speed, set_threads
from llada_lightning.training.parallel import check_parallel, launched_settings, tensor_parallel
from llada_lightning.training.phases import Phase, RunIsDone, check_run, phases_of, trunk_checkpoint
from llada_lightning.training.record import (
    add_measured,
    add_record,
    describe_corpora,
    describe_loss,
    describe_policies,
    few_documents,
    not_measured,
    result_record,
    without_validation,
)
from llada_lightning.training.step_graphs import why_not_graphed, with_graphs
from llada_lightning.training.validation import PolicyLosses

TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "use_distributed_sampler": False,  # the sampler knows its rank
    "max_epochs": -1,
    "check_val_every_n_epoch": None,  # the training stream has no end
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "logger": False,  # metrics.csv always, W&B by --wandb.project
}


class LladaCLI(HookedCLI):
    """Adds budget, run folder and W&B; resolves the configuration before anything is built.

    Args:
        args: The command line from the subcommand on.
        execute: Whether to build and run. If not, the configuration is resolved and is in ``settings``.
    """

    def __init__(self, args: list[str], execute: bool = True) -> None:
        self._execute, self._asked = execute, args[0]
        self.leave = LeaveRequest()
        self._warned_of_lost_text = self._warned_of_few_documents = False
        trust_known_modules()
        super().__init__(
            model_class=LanguageModule,
            datamodule_class=LanguageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=OneLineParser,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is asked for: a fit does not wait until the parsers of the other three are built."""
        return {self._asked: super().subcommands()[self._asked]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--budget", type=Budget, default=Budget(), help="What the run may spend.")
        parser.add_argument("--rules", type=Rules, default=Rules(), help="Which rules give what is not set.")
        parser.add_argument("--run", type=Place, default=Place(), help="Where the run lives.")
        parser.add_argument("--speed", type=Speed, default=Speed(), help="How the same is computed faster.")
        parser.add_argument("--guard", type=Guard, default=Guard(), help="What to do about bad numbers.")
        parser.add_argument("--profile", type=Profile, default=Profile(), help="Where a step's time goes.")
        parser.add_argument("--wandb", type=Wandb, default=Wandb(), help="Weights & Biases.")
        whole_numbers_first(parser)
        data = {"class_path": "llada_lightning.data.datamodule.TokenDataModule"}
        parser.set_defaults({"data": {**data, "init_args": {"path": "data/python-stdlib"}}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        words = [word.removeprefix("--config=") for word in args]
        for path in filter(os.path.isfile, words):  # the parser's own errors do not name the file
            if path.endswith((".yaml", ".yml")):
                check_yaml(read_text(path, MAX_YAML_BYTES), f"'{shortened(path)}'")
        self.config = parser.parse_args(class_first(args))
        refuse_unusable(self.config[self.config["subcommand"]], "")

    def set_seed(self) -> None:
        if self._execute:
            check_seed("seed_everything", self.settings.seed_everything)
            seed_everything(self.settings.seed_everything, workers=True, verbose=False)

    @property
    def settings(self) -> Namespace:
        """The configuration of the subcommand."""
        return self.config[self.subcommand]

    @property
    def folder(self) -> Path:
        return Place(**vars(self.settings.run)).folder

    def before_instantiate_classes(self) -> None:
        trainer = self.settings.trainer
        self.launch = agreed_launch(trainer.devices, trainer.num_nodes) if self._execute else None
        reject_unknown_keys(self.settings)
        if self.subcommand == "fit" and self._execute:
            w = self.settings.wandb
            check_wandb(w.project, w.entity, w.group)
        refuse_secrets(self.settings.as_dict())
        data = resolve_data(self.settings)
        if self.subcommand == "fit":
            run = resolve_fit(self.settings, data)
            self.described, schedules = run.described(), run.schedules
            self.run_name = run_name(self.settings, data, schedules)
            if self.settings.run.name is None:
                self.settings.run.name = self.run_name
            if self.settings.budget.trunks:
                parent = trunk_checkpoint(self.settings, data, run, self.folder)
                self.settings.run.parent = None if parent is None else str(parent)
            self.phases = phases_of(self.settings, data, schedules, self.folder, run.milestones)
            self.resolved = self._dump()
            if self._execute:
                self.check_folder()
                self._enter(self.phases[0])
        else:
            self.identity = identity(self.settings, data)

    def _enter(self, phase: Phase) -> None:
        """Make the configuration that of a phase."""
        self.phase, self.identity = phase, phase.identity
        phase.apply(self.settings)

    def instantiate_classes(self) -> None:
        if not self._execute:
            return
        check_devices(self.settings.trainer)
        try:
            super().instantiate_classes()
        except (MisconfigurationException, ValueError, ImportError) as error:  # Lightning, of the trainer's settings
            raise _own_cause(error) or UserError(unbuilt(str(error))) from error
        # Of a single process Lightning keeps what RANK and its like say, whoever has set them.
        rank_zero_only.rank = self.trainer.global_rank  # type: ignore[attr-defined]
        check_monitors(self.trainer, self.model)
        require_open_files(self.datamodule.loader_workers(self.trainer))
        check_parallel(self.trainer, self.model.shape, self.model.vocab_size, self.datamodule.sequence_length)
        facts, shifted = self.model.facts, self.model.shift_targets
        if (facts.in_blocks or facts.replaces or shifted) and tensor_parallel(self.trainer.strategy) > 1:
            who = f"{self.model.objective}{' with shift_targets' if shifted else ''}"
            fix = f"{who} needs whole {'logits' if facts.replaces else 'sequences'} on each device; use fsdp2"
            raise UserError(f"trainer.strategy: {self.settings.trainer.strategy} given, but {fix}")
        longest = self.model.block_length or self.datamodule.sequence_length
        policies = policies_of(self.settings.run.policies, self.model.facts, longest)
        self.model.policy_losses = PolicyLosses(policies)
        self.model.identity, self.datamodule.block_length = self.identity, self.model.block_length
        given, fits = Speed(**vars(self.settings.speed)), self.subcommand == "fit"
        speed, self.speed_lines = resolve_speed(given, self.model.shape, self.trainer, training=fits)
        reason = why_not_graphed(self.model, self.datamodule, self.trainer, bool(self.settings.profile.steps))
        self.model.speed = with_graphs(speed, reason, training=fits)
        if self.model.speed.graph:
            self.speed_lines[-1] += ", steps as CUDA graphs"
        elif fits and self.trainer.strategy.root_device.type == "cuda" and speed.graph is None:
            self.speed_lines[-1] += f", steps not as graphs ({reason})"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run, trainer = self.settings.run, self.config_init[self.subcommand].trainer
        checkpoint_io = AsyncCheckpointIO(AtomicCheckpointIO()) if run.async_checkpoints else AtomicCheckpointIO()
        kwargs |= launched_settings(self.launch, trainer.devices, [checkpoint_io, *_as_list(trainer.plugins)])
        self.memory = MemoryAdvice()
        if self.subcommand != "fit":
            progress = [] if trainer.enable_progress_bar is False else [EvaluationProgress()]
            return super().instantiate_trainer(callbacks=[*progress, self.memory], **kwargs)
        phase = self.phase
        data, model = self.datamodule, self.model
        stream = data.stream_facts(model.vocab_size)
        counted = (data.attended_length, data.mask_eps, data.response_share)
        self.accounting = Accounting(lambda steps: model.flops_per_token(*counted, stream.mean_ratio(steps)))
        guard = self.settings.guard
        model.guard = UpdateGuard(guard.spikes, guard.spike_zscore)
        bad_numbers = BadNumbers(phase.folder, data.batch, guard.patience)
        own_callbacks: list[Callback] = [self.accounting, bad_numbers, LeaveTogether(self.leave), self.memory]
        if trainer.enable_progress_bar is not False:
            title = f"{model.objective} {shape_name(model.shape)} {phase.title}".rstrip()
            own_callbacks.append(BudgetProgress(title, self.accounting))
        if trainer.enable_checkpointing is not False:
            minutes = run.checkpoint_every_minutes
            seconds = None if minutes is None else 60 * minutes
            kept = (run.keep_checkpoints, run.keep_best, phase.forks)
            own_callbacks.append(StepCheckpoints(phase.checkpoints, run.checkpoint_every_steps, seconds, *kept))
        profile = self.settings.profile
        if profile.steps and phase is self.phases[0]:
            where = phase.folder / "profile"
            own_callbacks.append(StepProfiler(profile, where, self.accounting, phase.last_step, trainer.profiler))
        return super().instantiate_trainer(callbacks=[*own_callbacks, *_as_list(trainer.callbacks)], **kwargs)

    def before_fit(self) -> None:
        """Everything is known to fit together: only now write into the run's folder, and start W&B."""
        try:
            self._write_files()
        except OSError as error:
            raise UserError(f"run.root: {self.folder} cannot be written ({error.strerror}); choose another") from error
        run, w = self.settings.run, self.settings.wandb
        group = w.group or run.study
        self.wandb = wandb_logger(self.folder, self.run_name, run.name, w.project, w.entity, group, w.offline)
        if self.wandb is not None:
            self.wandb.log_hyperparams(yaml.safe_load(self.resolved))

    @rank_zero_only
    def _write_files(self) -> None:
        """The configuration, and the data's tokenizer beside it, so that the folder can be moved away from its data."""
        with written_atomically(self.folder / CONFIG) as path:
            path.write_text(self.resolved)
        for name, text in self.datamodule.tokenizer_files().items():
            if not (self.folder / name).exists():
                with written_atomically(self.folder / name) as path:
                    path.write_text(text, encoding="utf-8")

    def subcommand_arguments(self, subcommand: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("ckpt_path") is not None:
            given = Path(kwargs["ckpt_path"])
            own = run_folder_of(given)
            known = own is not None and (own / CONFIG).is_file()
            config = f"'{own}/{CONFIG}'" if known else f"the {CONFIG} of its run"
            otherwise = "give another one" if self.settings.run.name is None else "leave --ckpt_path out"
            fix = f"give --config {config} to {subcommand} it, or {otherwise}"
            check_identity(model_identity(saved_identity(given)), model_identity(self.identity), given, fix)
            require_whole(given)
            self.read = given
            return kwargs
        # A given config.yaml may lie in a copy of the folder that it names.
        given_files = [Path(str(path)).absolute() for path in filter(None, self.settings.get("config") or [])]
        copies = [file.parent for file in given_files if file.name == CONFIG and (file.parent / CHECKPOINTS).is_dir()]
        checkpoint = None if self.settings.run.name is None else final_checkpoint((copies or [self.folder])[0])
        if checkpoint is None:
            raise UserError(f"ckpt_path: nothing to {subcommand}; give --ckpt_path, or a run's config.yaml")
        require_whole(checkpoint)
        say(f"reading {checkpoint}")
        self.read = checkpoint
        return {**kwargs, "ckpt_path": str(checkpoint)}

    def run_subcommand(self, subcommand: str) -> None:
        if not self._execute:
            return
        try:
            self._run_resolved(subcommand)
        except Exception as error:
            refused = self.memory.advice or fault_of_a_callback(error)
            if refused is None:
                raise
            raise UserError(refused) from error

    def _run_resolved(self, subcommand: str) -> None:
        if subcommand != "fit":
            super().run_subcommand(subcommand)
            return
        replicas = self.trainer.world_size // tensor_parallel(self.trainer.strategy)  # they read different sequences
        self.datamodule.exact_micro_batch(replicas, self.trainer.accumulate_grad_batches)
        if self.settings.run.async_checkpoints and writes_shards(self.trainer.strategy):
            raise UserError("run.async_checkpoints: true given, but this strategy writes shards; leave it out")
        with run_lock(self.folder, self.launch, self.trainer.is_global_zero):
            with leaving_at_a_steps_end(self.leave):
                self.before_fit()
                done = {record["run"] for record in read_records(self.folder)}
                for phase in self.phases:
                    if phase.run in done:
                        continue
                    try:
                        self._fit(phase)
                    except DivergedError as stop:
                        self._give_up(phase, stop)
                        if phase.continues:
                            break
            if self.wandb is not None:
                self.wandb.finish()

    def _fit(self, phase: Phase) -> None:
        """Train a phase to its end; if a budget ends there, validate, write the record, say where it is."""
        if phase.is_passed():
            return
        if phase is not self.phases[0]:
            self._enter(phase)
            self.instantiate_classes()
        # W&B's steps only rise, and a branch's last steps are beyond those with which the trunk continues.
        kind = self.model.training_kind(self.datamodule.density_setting)
        own = [MetricsCSV(phase.folder, kind, self.model.by_noise_level)]
        wandb = _as_list(self.wandb if phase.folder == self.folder else None)
        self.trainer.loggers = [*own, *wandb, *self.trainer.loggers]
        start = phase.start()
        if start is not None:
            say(f"{'branching off' if start == phase.parent else 'going on'} from {start}")
        replicas = self.trainer.world_size // tensor_parallel(self.trainer.strategy)
        sequences = self.datamodule.exact_micro_batch(replicas, self.trainer.accumulate_grad_batches)
        before = None if start is None else saved_threads(start)
        threads = set_threads(self.trainer, self.model.shape, sequences, self.datamodule.sequence_length, before)
        *notes, live = self.speed_lines
        for line in [self.described, *notes, live + threads] if self.trainer.is_global_zero else []:
            say(line)
        self._warn_of_lost_text()
        self._warn_of_few_documents(self.datamodule.val_documents)
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=start)
        if self.trainer.global_step < phase.last_step:
            raise UserError(f"stopped at step {self.trainer.global_step}; the same command resumes from there")
        if phase.run is None:
            return
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        self._write_records(phase, [phase.run])

    def _give_up(self, phase: Phase, stop: DivergedError) -> None:
        """Record that a budget, or with its trunk every budget from here on, has no loss: once is enough."""
        say(str(stop))
        without_validation(self.model)
        lost = self.phases[self.phases.index(phase) :] if phase.continues else [phase]
        self._write_records(phase, [other.run for other in lost if other.run])

    @rank_zero_only
    def after_validate(self) -> None:
        """The figure, with its error bar, on stdout."""
        if not self.model.validation:
            raise UserError(f"trainer: its limits leave no sequence to {self.subcommand}; leave them out")
        kind = self.model.facts.val_kind
        print(describe_loss(self.model.validation, kind))
        for line in describe_corpora(self.model.val_by_source, self.model.val_held_out, kind):
            print(line)
        for line in describe_policies(self.model.policy_losses.measured):
            print(line)
        if self.model.policy_losses.measured or self.model.val_held_out:
            self._record_measured()
        self._warn_of_few_documents(len(self.model.val_by_document))
        self._warn_of_lost_text()

    after_test = after_validate

    def _record_measured(self) -> None:
        """Of a run's own checkpoint, its record gets what was measured of held-out corpora and under policies."""
        own = run_folder_of(self.read)
        if own is not None:
            say(add_measured(own, saved_step(self.read), self.model))

    def predict(self, **kwargs: Any) -> None:
        """The nats of each validation sequence, one line each, on stdout."""
        found = self.trainer.predict(**kwargs)
        if not found:
            raise UserError("trainer: its limits leave no sequence to predict; leave them out")
        if self.trainer.global_rank % tensor_parallel(self.trainer.strategy):
            return  # another process speaks for those that compute the same micro-batch
        for nats_B in found:
            assert isinstance(nats_B, Tensor)
            print("\n".join(f"{nats:.6f}" for nats in nats_B.tolist()))

    @rank_zero_only
    def _warn_of_few_documents(self, documents: int) -> None:
        note = few_documents(documents, isinstance(self.datamodule, SftDataModule))
        if note is not None and not self._warned_of_few_documents:
            self._warned_of_few_documents = True
            say(note)

    @rank_zero_only
    def _warn_of_lost_text(self) -> None:
        note = None if self._warned_of_lost_text else loss_note(self.datamodule.lost_share)
        self._warned_of_lost_text = True
        if note is not None:
            say(note)

    @rank_zero_only
    def _write_records(self, phase: Phase, runs: list[str]) -> None:
        parent = phase.parent_hash()
        for run in runs:
            parts = (self.trainer, self.model, self.datamodule, self.accounting)
            record = result_record(run, *parts, phase.result.decay_steps, parent)
            by_policy = self.model.policy_losses.by_document
            documents = (self.model.val_by_document, self.model.held_out_by_document, by_policy)
            add_record(self.folder, record, *documents, self.wandb, several=len(self.phases) > 1)
            self._warn_of_few_documents(len(self.model.val_by_document))

    def check_folder(self) -> None:
        """Leave if the run is done; refuse the folder of another run. Nothing is written here."""
        try:
            check_run(self.phases, self.folder, self.run_name, never=self.settings.run.resume == "never")
        except RunIsDone:
            held_out = self.settings.data.init_args.get("held_out") or {}
            labels = [Policy(*given).label for given in self.settings.run.policies.items()]
            note = not_measured(read_records(self.folder), list(held_out), labels, self.folder / CONFIG)
            if note is not None:
                say(note)
            raise
        given = self.settings.ckpt_path
        if given is not None and self.phases[0].foreign_parent is None:
            say(f"--ckpt_path {given} is this run's own; it resumes from its last one (to go back, remove later ones)")

    def _dump(self) -> str:
        """The resolved configuration as YAML."""
        settings = self.settings.clone()
        settings.pop("config", None)
        try:
            return self._parser(self.subcommand).dump(settings, skip_none=False, skip_validation=True)
        except yaml.YAMLError as error:
            raise UserError(f"trainer: a setting cannot be written to config.yaml ({shortened(error)})") from error


def _own_cause(error: BaseException | None) -> UserError | None:
    """The UserError that the parser has wrapped in an error of its own, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _as_list(value: Any) -> list[Any]:
    """Lightning's arguments that take nothing, one thing or a list."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
