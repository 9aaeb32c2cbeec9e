"""`llada fit`, `validate`, `test` and `predict`: a LightningCLI that resolves its configuration before building."""

from __future__ import annotations

import json
import os
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from llada_lightning.checkpoints.run_folder import CHECKPOINTS, CONFIG, final_checkpoint, require_whole, saved_identity
from llada_lightning.compute.rules import Rules
from llada_lightning.compute.shapes import shape_name
from llada_lightning.data.language_datamodule import LanguageDataModule, require_open_files
from llada_lightning.data.manifest import loss_note
from llada_lightning.data.sft import SftDataModule
from llada_lightning.identity import check_identity, model_identity
from llada_lightning.records import read_records, write_records, write_validation
from llada_lightning.settings import Budget, Guard, Place, Profile, Wandb, check_seed
from llada_lightning.support.cluster import agreed_launch
from llada_lightning.support.command_line import one_line, refuse_unusable
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import strict_json, written_atomically
from llada_lightning.support.jsonargparse_internals import whole_numbers_first
from llada_lightning.support.locks import check_unlocked, run_lock
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import MAX_YAML_BYTES, check_yaml, read_text
from llada_lightning.support.security import refuse_secrets, trust_known_modules
from llada_lightning.support.signals import LeaveRequest, leaving_at_a_steps_end, say
from llada_lightning.training.callbacks.accounting import Accounting
from llada_lightning.training.callbacks.checkpoints import AtomicCheckpointIO, CheckpointPlan, StepCheckpoints
from llada_lightning.training.callbacks.leaving import LeaveTogether
from llada_lightning.training.callbacks.loggers import MetricsCSV, check_wandb, wandb_logger
from llada_lightning.training.callbacks.others import check_monitors, fault_of_a_callback
from llada_lightning.training.callbacks.profile import profiling
from llada_lightning.training.callbacks.progress import BudgetProgress, EvaluationProgress
from llada_lightning.training.configuration import identity, reject_unknown_keys, resolve_data, resolve_fit, run_name
from llada_lightning.training.devices import check_devices
from llada_lightning.training.guard import BadNumbers, DivergedError, UpdateGuard
from llada_lightning.training.lightning_internals import HookedCLI, writes_shards
from llada_lightning.training.memory import MemoryAdvice
from llada_lightning.training.modules import LanguageModule
from llada_lightning.training.parallel import check_parallel, launched_settings, leads_its_group, replicas
from llada_lightning.training.phases import Phase, phases_of
from llada_lightning.training.record import (
    describe_loss,
    describe_result,
    few_documents,
    result_record,
    without_validation,
)
from llada_lightning.training.speed import Speed, resolve_speed

TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "use_distributed_sampler": False,  # the sampler knows its rank
    "max_epochs": -1,
    "check_val_every_n_epoch": None,  # the training stream has no end
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "logger": False,  # metrics.csv always, W&B by --wandb.project
}


class RunIsDone(SystemExit):
    """The run of a command is done: there is nothing to do, and the command ends with exit code 0.

    Args:
        folder: The folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(0)
        self.folder = folder


class LladaCLI(HookedCLI):
    """Adds budget, run folder and W&B; resolves the configuration before anything is built.

    Args:
        args: The command line from the subcommand on.
        execute: Whether to build and run. If not, the configuration is resolved and is in ``settings``.
    """

    def __init__(self, args: list[str], execute: bool = True) -> None:
        self._execute, self._asked = execute, args[0]
        self.leave = LeaveRequest()
        self._warned_of_lost_text = False
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
        """The run's folder."""
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
            schedules = resolve_fit(self.settings, data).schedules
            self.run_name = run_name(self.settings, data, schedules)
            self.phases = phases_of(self.settings, data, schedules, self.folder)
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
            raise _own_cause(error) or UserError(" ".join(str(error).split())) from error
        # Of a single process Lightning keeps what RANK and its like say, whoever has set them.
        rank_zero_only.rank = self.trainer.global_rank  # type: ignore[attr-defined]
        check_monitors(self.trainer, self.model)
        require_open_files(self.datamodule.loader_workers(self.trainer))
        check_parallel(self.trainer, self.model.shape, self.model.vocab_size, self.datamodule.sequence_length)
        self.model.identity = self.identity
        given, fits = Speed(**vars(self.settings.speed)), self.subcommand == "fit"
        self.model.speed, self.speed_lines = resolve_speed(given, self.model.shape, self.trainer, training=fits)

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
        self.accounting = Accounting(model.flops_per_token(data.attended_length, data.mask_eps, data.response_share))
        guard = self.settings.guard
        model.guard = UpdateGuard(guard.spikes, guard.spike_zscore)
        bad_numbers = BadNumbers(phase.folder, data.batch, guard.patience)
        own_callbacks: list[Callback] = [self.accounting, bad_numbers, LeaveTogether(self.leave), self.memory]
        if trainer.enable_progress_bar is not False:
            title = f"{model.objective} {shape_name(model.shape)} {phase.title}".rstrip()
            own_callbacks.append(BudgetProgress(title, self.accounting))
        if trainer.enable_checkpointing is not False:
            minutes = run.checkpoint_every_minutes
            plan = CheckpointPlan(
                every_steps=run.checkpoint_every_steps,
                every_seconds=None if minutes is None else 60 * minutes,
                keep=run.keep_checkpoints,
                keep_best=run.keep_best,
                forks=phase.forks,
            )
            own_callbacks.append(StepCheckpoints(phase.checkpoints, plan))
        if phase is self.phases[0]:
            where = (phase.folder, phase.last_step, self.accounting, trainer.profiler)
            own_callbacks += profiling(self.settings.profile, *where)
        return super().instantiate_trainer(callbacks=[*own_callbacks, *_as_list(trainer.callbacks)], **kwargs)

    def before_fit(self) -> None:
        """Everything is known to fit together: only now write into the run's folder, and start W&B."""
        try:
            self._write_config()
            self._write_tokenizer()
        except OSError as error:
            raise UserError(f"run.root: {self.folder} cannot be written ({error.strerror}); choose another") from error
        run, w = self.settings.run, self.settings.wandb
        group = w.group or run.study
        self.wandb = wandb_logger(self.folder, self.run_name, run.name, w.project, w.entity, group, w.offline)
        if self.wandb is not None:
            self.wandb.log_hyperparams(yaml.safe_load(self.resolved))

    def subcommand_arguments(self, subcommand: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("ckpt_path") is not None:
            given = Path(kwargs["ckpt_path"])
            check_identity(model_identity(saved_identity(given)), model_identity(self.identity))
            require_whole(given)
            return kwargs
        checkpoint = None if self.settings.run.name is None else final_checkpoint(self._config_folder() or self.folder)
        if checkpoint is None:
            raise UserError(f"ckpt_path: nothing to {subcommand}; give --ckpt_path, or a run's config.yaml")
        require_whole(checkpoint)
        say(f"reading {checkpoint}")
        return {**kwargs, "ckpt_path": str(checkpoint)}

    def _config_folder(self) -> Path | None:
        """The run's folder that a given config.yaml lies in: it may be a copy of the one that it names."""
        given = [Path(str(path)).absolute() for path in filter(None, self.settings.get("config") or [])]
        return next(
            (path.parent for path in given if path.name == CONFIG and (path.parent / CHECKPOINTS).is_dir()), None
        )

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
        self.datamodule.exact_micro_batch(replicas(self.trainer), self.trainer.accumulate_grad_batches)
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
                        if phase.run is None:
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
        own = [MetricsCSV(phase.folder), *_as_list(self.wandb if phase.folder == self.folder else None)]
        self.trainer.loggers = [*own, *self.trainer.loggers]
        start = phase.start()
        if start is not None:
            say(f"{'branching off' if start == phase.parent else 'going on'} from {start}")
        for line in self.speed_lines if self.trainer.is_global_zero else []:
            say(line)
        self._warn_of_lost_text()
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=start)
        if self.trainer.global_step < phase.last_step:
            raise UserError(f"stopped at step {self.trainer.global_step}; the same command resumes from there")
        if phase.run is None:
            return
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        parent = phase.parent_hash() if self.trainer.is_global_zero else None
        self._write(result_record(phase.run, self.trainer, self.model, self.datamodule, self.accounting, parent))

    def _give_up(self, phase: Phase, stop: DivergedError) -> None:
        """Record that a budget, or with its trunk every budget from here on, has no loss: once is enough."""
        say(str(stop))
        without_validation(self.model)
        lost = [phase] if phase.run else self.phases[self.phases.index(phase) :]
        parent = phase.parent_hash() if self.trainer.is_global_zero else None
        for run in [other.run for other in lost if other.run]:
            self._write(result_record(run, self.trainer, self.model, self.datamodule, self.accounting, parent))

    @rank_zero_only
    def after_validate(self) -> None:
        """The figure, with its error bar, on stdout."""
        if not self.model.validation:
            raise UserError(f"trainer: its limits leave no sequence to {self.subcommand}; leave them out")
        print(describe_loss(self.model.validation, self.model.facts.val_kind))
        self._warn_of_few_documents()
        self._warn_of_lost_text()

    after_test = after_validate

    def predict(self, **kwargs: Any) -> None:
        """The nats of each validation sequence, one line each, on stdout."""
        found = self.trainer.predict(**kwargs)
        if not found:
            raise UserError("trainer: its limits leave no sequence to predict; leave them out")
        for nats_B in found:
            assert isinstance(nats_B, Tensor)
            if leads_its_group(self.trainer):
                print("\n".join(f"{nats:.6f}" for nats in nats_B.tolist()))

    def _warn_of_few_documents(self) -> None:
        note = few_documents(self.model.val_documents, of_dialogues=isinstance(self.datamodule, SftDataModule))
        if note is not None:
            say(note)

    @rank_zero_only
    def _warn_of_lost_text(self) -> None:
        note = None if self._warned_of_lost_text else loss_note(self.datamodule.lost_share)
        self._warned_of_lost_text = True
        if note is not None:
            say(note)

    @rank_zero_only
    def _write(self, record: dict[str, Any]) -> None:
        write_validation(self.folder, record["steps"], self.model.val_by_document)
        records = sorted([*read_records(self.folder), record], key=lambda known: int(known["steps"]))
        if self.wandb is not None:
            # Of several budgets, the summary holds the figures of the largest one, and all of them below one key.
            everything = {"records": json.dumps(strict_json(records))} if len(self.phases) > 1 else {}
            self.wandb.update_summary({**records[-1], **everything})
        path = write_records(self.folder, records)  # last: from here on the budget counts as reached
        say(
            f"{record['run']}: {describe_result(record)}, {record['flops_6nd']:.3g} FLOPs (6ND), "
            f"{record['wall_seconds']:.0f} s; {path}"
        )
        self._warn_of_few_documents()

    def check_folder(self) -> None:
        """Leave if the run is done; refuse the folder of another run. Nothing is written here."""
        records = read_records(self.folder)
        names = {phase.run for phase in self.phases if phase.run is not None}
        for record in records:
            if record.get("run") not in names:
                raise UserError(
                    f"run.name: {self.folder} holds the finished run {record.get('run')}, not {self.run_name}; "
                    "choose another --run.name, or leave it out"
                )
        if len(records) == len(names):
            for record in records:
                say(f"{self.folder} is done ({describe_result(record)}); nothing to do")
            raise RunIsDone(self.folder)
        done = {record["run"] for record in records}
        damaged: dict[Path, str] = {}
        for phase, following in zip_longest(self.phases, self.phases[1:]):
            if phase.run in done or (phase.run is None and following.run in done):
                continue
            phase.check_start(never=self.settings.run.resume == "never")
            damaged |= phase.damaged()
        for checkpoint, found in damaged.items():
            say(f"warning: {checkpoint} is damaged ({found}); the run resumes from before it")
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

    @rank_zero_only
    def _write_config(self) -> None:
        with written_atomically(self.folder / "config.yaml") as path:
            path.write_text(self.resolved)

    @rank_zero_only
    def _write_tokenizer(self) -> None:
        """The data's tokenizer beside the configuration, so that the folder can be moved away from its data."""
        for name, text in self.datamodule.tokenizer_files().items():
            if not (self.folder / name).exists():
                with written_atomically(self.folder / name) as path:
                    path.write_text(text, encoding="utf-8")


def run_folder(args: list[str]) -> Path:
    """The folder that `llada ARGS` (from `fit` on) would run in; builds and starts nothing."""
    return LladaCLI(args, execute=False).folder


def resolved_run(args: list[str]) -> tuple[Path, str]:
    """The folder that `llada ARGS` (from `fit` on) would run in, and its resolved configuration as YAML."""
    cli = LladaCLI(args, execute=False)
    cli.check_folder()
    check_unlocked(cli.folder)
    return cli.folder, cli.resolved


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


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are UserErrors of one line, and that takes no abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(one_line(message, "llada fit")) from ex


def class_first(args: list[str]) -> list[str]:
    """The arguments with each `--model=NAME` before its `--model.…`: the parser needs the class before its settings,
    and a sweep's agent hands arguments over in an order of its own."""
    args = list(args)
    for key in ("--model", "--data"):
        named = next((i for i, arg in enumerate(args) if arg.startswith(f"{key}=")), None)
        setting = next((i for i, arg in enumerate(args) if arg.startswith(f"{key}.")), None)
        if named is not None and setting is not None and setting < named:
            args.insert(setting, args.pop(named))
    return args
