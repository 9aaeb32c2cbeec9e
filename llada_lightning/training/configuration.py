"""From the configuration that a user wrote to a resolved one: vocabulary, precision, batch, steps, schedule, name.

The parser's namespaces are translated here into what ``run.resolve`` takes, and its answer is written back, so that the
run's config.yaml holds it. A value that the user gave and that disagrees is refused, never replaced in silence.

A plain ``Trainer(max_steps=100).fit(LladaModule("107k"), TokenDataModule("data/books"))`` resolves the same, so the
checkpoints of such a run can be loaded, scored and resumed like any other. Budgets, run folders, results and branches
are those of `llada fit`, which :func:`llada_lightning.fit` starts from Python.
"""

from __future__ import annotations

import pydoc
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any, TypeVar

from jsonargparse import Namespace
from lightning import Trainer

from llada_lightning.compute.flops import check_budgets, flops_6nd
from llada_lightning.compute.rules import Rules
from llada_lightning.compute.schedule import WSD, schedule_from
from llada_lightning.compute.shapes import check_vocabulary, get_shape
from llada_lightning.data import TOKENIZER_NAME
from llada_lightning.data.loading import LanguageDataModule
from llada_lightning.data.sft import SftDataModule
from llada_lightning.identity import run_name as name_of
from llada_lightning.identity import with_stable_names
from llada_lightning.model.transformer import NORM_EPS
from llada_lightning.objectives import get_objective, uniform
from llada_lightning.objectives.llada import LossWeight
from llada_lightning.run import Length, Run, Spec, check_block_length, resolve
from llada_lightning.settings import Budget, check_folder_name, check_seed
from llada_lightning.support.errors import UserError
from llada_lightning.support.reading import read_yaml
from llada_lightning.training.first_weights import fit_vocabulary, source_objective, take_over, weights_hash
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.lightning_internals import replaces_samplers
from llada_lightning.training.machine import native_precision
from llada_lightning.training.optimizers import ADAMW, Muon

T = TypeVar("T")


def resolve_data(config: Namespace) -> LanguageDataModule:
    """Fill in, in place, what follows from the data and the device: seeds, vocabulary, precision.

    Args:
        config: The parsed configuration of `fit`, `validate`, `test` or `predict`.

    Returns:
        A data module that knows its manifests, checked.
    """
    if isinstance(config.seed_everything, bool):
        raise UserError(f"seed_everything: {config.seed_everything} given; a run that can be repeated needs a number")
    check_seed("seed_everything", config.seed_everything)
    for name, arguments in {"model": config.model.init_args, "data": config.data.init_args}.items():
        _fill(arguments, "seed", config.seed_everything)
        for key in ("seed", "val_seed"):
            check_seed(f"{name}.{key}", arguments.get(key))
    if config.model.init_args.get("weights") is not None:
        take_over(config, module_class(config).objective)
    data = _located(config.data.class_path, LanguageDataModule)(**config.data.init_args.as_dict())  # type: ignore[type-abstract]
    _check_blocks(config.model.init_args, data)
    data.check()
    _check_weight(config.model.init_args, data, module_class(config).objective)
    if config.trainer.precision is None:
        config.trainer.precision = native_precision(str(config.trainer.accelerator))
    elif str(config.trainer.precision).startswith("16"):
        raise UserError(f"trainer.precision: {config.trainer.precision} needs loss scaling; use bf16-mixed or 32-true")
    _fill_vocabulary(config, data)
    return data


def resolve_fit(config: Namespace, data: LanguageDataModule) -> Run:
    """Fill in, in place, what follows from the budget: batch, steps, schedule, intervals.

    Returns:
        The resolved run. With one budget its schedule is in the configuration, too; with several budgets the
        configuration holds what they share.
    """
    _refuse_what_breaks_the_contract(config)
    resolved = _resolve_length(config, data)
    steps, trainer = list(resolved.steps), config.trainer
    if (len(steps) > 1 or resolved.milestones) and trainer.enable_checkpointing is False:
        why = "several budgets branch" if len(steps) > 1 else "a run with milestones continues"
        raise UserError(f"trainer.enable_checkpointing: false given, but {why} from checkpoints")
    # Three validations on the way (the end is validated anyway); logs and checkpoints at a pace that fits the length.
    _fill(trainer, "val_check_interval", (steps[-1] // 4 + 1) * trainer.accumulate_grad_batches)
    _fill(trainer, "log_every_n_steps", max(1, min(50, steps[0] // 100)))
    _fill(config.run, "checkpoint_every_steps", max(1, min(1000, steps[-1] // 10)))
    return resolved


def resolve_from_python(module: LanguageModule, trainer: Trainer) -> None:
    """Fill in what follows from the data and the trainer, before the Transformer is built.

    Args:
        module: The LightningModule, of which vocabulary, schedule and identity are set.
        trainer: The plain Trainer that it is attached to, with a data module of this package.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, LanguageDataModule):
        raise UserError(
            "trainer: fit without a data module; give datamodule=TokenDataModule(...) or SftDataModule(...)"
        )
    config = _configuration(module, data, trainer)
    arguments = config.model.init_args
    if arguments.get("weights") is not None:
        take_over(config, module.objective)
    _check_blocks(arguments, data)
    _check_weight(arguments, data, module.objective)
    _fill_vocabulary(config, data)
    if trainer.training:
        if trainer.max_steps < 1 and data.wanted_steps is None:
            raise UserError("trainer: nothing says how long to train; give Trainer(max_steps=...)")
        if trainer.world_size > 1 and replaces_samplers(trainer):
            raise UserError("trainer: the data module divides its batches itself; give use_distributed_sampler=False")
        module.schedule = _resolve_length(config, data).schedules[0]
        trainer.fit_loop.epoch_loop.max_steps = config.trainer.max_steps
    module.shape = get_shape(arguments.shape)
    for name in (
        "vocab_size",
        "mask_token_id",
        "eos_token_id",
        "compat",
        "rope_theta",
        "norm_eps",
        "text_prefix_ids",
        "qk_norm",
        "shift_targets",
    ):
        setattr(module, name, arguments[name])
    module.identity = identity(config, data)


def _configuration(module: LanguageModule, data: LanguageDataModule, trainer: Trainer) -> Namespace:
    """The configuration that `llada fit` would have of these objects."""

    def part(made: LanguageModule | LanguageDataModule) -> Namespace:
        arguments = Namespace(**{name: as_parsed(value) for name, value in made.arguments.items()})
        arguments.seed = made.seed
        return Namespace(class_path=f"{type(made).__module__}.{type(made).__qualname__}", init_args=arguments)

    return Namespace(
        seed_everything=module.seed,
        model=part(module),
        data=part(data),
        trainer=Namespace(**{key: getattr(trainer, key) for key in _TRAINER_IDENTITY}),
        budget=as_parsed(Budget()),
        rules=as_parsed(Rules()),
    )


def _resolve_length(config: Namespace, data: LanguageDataModule) -> Run:
    """Fill in, in place, batch, steps and schedule."""
    arguments = config.model.init_args
    given = schedule_from(_plain(arguments.schedule))
    rules = Rules(**vars(config.rules))
    rules.check()
    spec = Spec(
        objective=get_objective(module_class(config).objective),
        shape=get_shape(_plain(arguments.shape)),
        stream=data.stream_facts(arguments.vocab_size),
        length=_length(config, data),
        global_batch=data.global_batch,
        schedule=given,
        rules=rules,
    )
    resolved = resolve(spec)
    steps = list(resolved.steps)
    if config.trainer.max_steps not in (-1, steps[-1]):
        raise UserError(
            f"trainer.max_steps: {config.trainer.max_steps} given, but the budget makes {steps[-1]} steps; leave one "
            "of them out"
        )
    if given.total_steps is not None and [given.total_steps] != steps:
        raise UserError(
            f"model.schedule.total_steps: {given.total_steps} given, but the run has {steps} steps; leave it out"
        )
    first_result = min(schedule.total_steps or 0 for schedule in (*resolved.schedules, *resolved.milestones))
    if arguments.get("open_attention_steps", 0) > first_result:
        raise UserError(
            f"model.open_attention_steps: {arguments.open_attention_steps} given, but the first result is that of step "
            f"{first_result}, and is measured with full attention; lower it"
        )
    config.trainer.max_steps = steps[-1]
    data.global_batch = config.data.init_args.global_batch = resolved.global_batch
    schedules = resolved.schedules
    alike = replace(schedules[-1], total_steps=None, decay_steps=given.decay_steps)
    arguments.schedule = as_parsed(schedules[0] if len(schedules) == 1 else alike)
    return resolved


def _length(config: Namespace, data: LanguageDataModule) -> Length:
    """How long the run is to train: by its budget, else by the data module's epochs, else by `trainer.max_steps`."""
    budget, given, milestones = config.budget, config.trainer.max_steps, tuple(config.budget.milestones)
    if budget.flops is not None and budget.tokens is not None:
        raise UserError(f"budget: flops {budget.flops} and tokens {budget.tokens:g} are both given; give one")
    if data.wanted_steps is not None and (budget.flops, budget.tokens) != (None, None):
        raise UserError("budget: given beside data.epochs; leave one of them out")
    if budget.flops is not None:
        budgets = budget.flops if isinstance(budget.flops, list) else [budget.flops]
        if not budgets:
            raise UserError("budget.flops: [] holds no budget; give one, such as 1e12")
        check_budgets("budget.flops", budgets)
        return Length(flops=tuple(budgets), convention=budget.convention, milestones=milestones)
    if budget.tokens is not None:
        return Length(tokens=budget.tokens, setting="budget.tokens", milestones=milestones)
    if data.wanted_steps is not None and given in (-1, data.wanted_steps):
        return Length(steps=data.wanted_steps, setting="data.epochs", milestones=milestones)
    if given < 1:
        raise UserError("budget.flops: nothing says how long to train; give --budget.flops, such as 1e12")
    return Length(steps=given, setting="trainer.max_steps", milestones=milestones)


def _check_blocks(model: Namespace, data: LanguageDataModule) -> None:
    """Tell the data the blocks that have mask ratios of their own; refuse those that do not divide the sequences."""
    data.block_length = model.get("block_length")
    if data.block_length is not None and not isinstance(data, SftDataModule):
        check_block_length("model.block_length", data.block_length, data.sequence_length)


def _check_weight(model: Namespace, data: LanguageDataModule, objective: str) -> None:
    """Refuse a weight of the loss that does not fit the density of the mask ratios."""
    if "loss_weight" in model:
        LossWeight(model["loss_weight"], model["loss_weight_limit"]).check(data.density_setting)
    elif get_objective(objective).replaces:
        uniform.check_density(data.density_setting)


_OURS = {
    "fast_dev_run": False,
    "limit_train_batches": None,
    "limit_val_batches": None,
    "overfit_batches": 0.0,
    "max_epochs": -1,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "check_val_every_n_epoch": None,
    "use_distributed_sampler": False,
    "reload_dataloaders_every_n_epochs": 0,
}
"""Settings of the trainer that would change a run's data or length behind its budget and identity."""


def _refuse_what_breaks_the_contract(config: Namespace) -> None:
    trainer, place = config.trainer, config.run
    if place.name is not None:
        check_folder_name("run.name", place.name)
    check_folder_name("run.study", place.study, nested=True)
    for key, value in _OURS.items():
        if trainer[key] != value:
            raise UserError(
                f"trainer.{key}: {trainer[key]} would change a run's data or length behind its budget; leave it "
                f"at {'null' if value is None else value}"
            )
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        raise UserError(f"trainer.gradient_clip_algorithm: {trainer.gradient_clip_algorithm} given; only norm is known")
    if (trainer.gradient_clip_val or 0) < 0:
        raise UserError(f"trainer.gradient_clip_val: {trainer.gradient_clip_val} must be above 0; null clips nothing")
    counts = {
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.log_every_n_steps": trainer.log_every_n_steps,
        "run.checkpoint_every_steps": place.checkpoint_every_steps,
        "trainer.val_check_interval": trainer.val_check_interval,
        "run.keep_checkpoints": place.keep_checkpoints,
        "guard.patience": config.guard.patience,
    }
    for key, count in counts.items():
        if count is not None and not (isinstance(count, int) and count >= 1):
            raise UserError(f"{key}: {count} given; it must be a whole number of at least 1")
    if place.checkpoint_every_minutes is not None and not place.checkpoint_every_minutes > 0:
        raise UserError(f"run.checkpoint_every_minutes: {place.checkpoint_every_minutes} must lie above 0")
    if not config.guard.spike_zscore > 0:
        raise UserError(f"guard.spike_zscore: {config.guard.spike_zscore} must be above 0")


def _fill(config: Namespace, key: str, value: Any) -> None:
    if config.get(key) is None:
        config[key] = value


def _fill_vocabulary(config: Namespace, data: LanguageDataModule) -> None:
    """Fill in, in place, what the model takes from the data's tokenizer: the vocabulary and the special tokens."""
    tokenizer, arguments = data.tokenizer, config.model.init_args
    objective = get_objective(module_class(config).objective)
    masks = objective.masks
    if masks and tokenizer.mask_id is None:
        raise UserError(
            f"data.tokenizer: '{config.data.init_args.tokenizer}' has no [MASK], which {objective.name} needs; name "
            "one of its tokens with --data.mask_token, or as mask_token in its tokenizer_config.json"
        )
    if arguments.get("weights") is not None and source_objective(arguments.weights) != objective.name:
        fit_vocabulary(arguments, tokenizer, data.tokenizer_files()[TOKENIZER_NAME])
    # An `arm` that starts from weights without [MASK] has none, also where the data's tokenizer has one: no text holds
    # it, and the weights need not have a row for it.
    without = not masks and arguments.get("weights") is not None and arguments.mask_token_id is None
    mask_id = None if without else tokenizer.mask_id
    entries = tokenizer.vocab_size - (without and tokenizer.mask_id == tokenizer.vocab_size - 1)
    _fill(arguments, "vocab_size", entries)
    check_vocabulary("model.vocab_size", arguments.vocab_size)
    if arguments.vocab_size < entries:
        raise UserError(
            f"model.vocab_size: {arguments.vocab_size} is below the {entries} tokens of the data's tokenizer; leave it "
            "out (a larger one pads)"
        )
    for key, value in {"mask_token_id": mask_id, "eos_token_id": tokenizer.eos_id}.items():
        _fill(arguments, key, value)
        if arguments[key] != value:
            raise UserError(f"model.{key}: {arguments[key]} given, but the data's tokenizer has {value}; leave it out")


_TRAINER_IDENTITY = ("max_steps", "precision", "gradient_clip_val", "gradient_clip_algorithm")
_NOT_IN_IDENTITY = (
    "path", "tokenizer", "chat_template", "workers", "micro_batch", "val_batch",
    "mask_token", "eos_token", "vocab_size", "text_prefix_ids", "held_out",
)  # fmt: skip
"""Settings of the data: the machine's, what is read of the tokenizer, which is in fingerprints, and corpora that are
measured only."""
_DATA_OPTIONS = {"document_mask": False, "train_tokens": None, "density": None}
_MODEL_OPTIONS = {
    "norm_eps": NORM_EPS, "text_prefix_ids": None, "loss_weight": "elbo", "loss_weight_limit": None,
    "qk_norm": False, "z_loss": 0.0, "dropout": 0.0, "token_noise": 0.0, "shift_targets": False,
    "open_attention_steps": 0,
}  # fmt: skip
_OPTIMIZER_OPTIONS = {"decay_embeddings": True, "name": ADAMW, "muon": asdict(Muon()), "arguments": {}}
"""Options that came later. At its default, none is in an identity, so that older runs keep theirs."""


def identity(config: Namespace, data: LanguageDataModule, schedule: WSD | None = None) -> dict[str, Any]:
    """What makes a run this run: its resolved settings without paths and without the machine's.

    Args:
        config: The resolved configuration.
        data: The data module.
        schedule: The schedule of one budget of several; None: the one of the configuration.
    """
    plain, model = _plain(config), module_class(config)
    if schedule is not None:
        plain["model"]["init_args"]["schedule"] = asdict(schedule)
        plain["trainer"]["max_steps"] = schedule.total_steps
    # Only skipped spikes make another run: what is reported changes nothing.
    guard = plain.get("guard", {})
    skipping = {"guard": {"spike_zscore": guard["spike_zscore"]}} if guard.get("spikes") == "skip" else {}
    eight_bits = {"fp8": True} if plain.get("speed", {}).get("fp8") else {}
    data_arguments = {k: v for k, v in plain["data"]["init_args"].items() if k not in _NOT_IN_IDENTITY}
    model_arguments = plain["model"]["init_args"]
    density = data.density_setting  # the same, however it was written
    data_arguments["density"] = None if density is None else _plain(density.settings)
    with_options = (
        (data_arguments, _DATA_OPTIONS),
        (model_arguments, _MODEL_OPTIONS),
        (model_arguments.get("optimizer", {}), _OPTIMIZER_OPTIONS),
    )
    for arguments, options in with_options:
        for option, default in options.items():
            if option in arguments and arguments[option] == default:
                del arguments[option]
    weights = model_arguments.pop("weights", None)
    start = {} if weights is None else {"weights": weights_hash(weights)}
    found = {
        "model": {**plain["model"], "class_path": f"{model.__module__}.{model.__qualname__}"},
        "data": {**data_arguments, "class_path": plain["data"]["class_path"], "fingerprint": data.fingerprint},
        "trainer": {key: plain["trainer"].get(key) for key in _TRAINER_IDENTITY},
        "seed": plain["seed_everything"],
        "tokenizer": data.tokenizer.fingerprint,
        **start,
        **skipping,
        **eight_bits,
    }
    return with_stable_names(found)


def run_name(config: Namespace, data: LanguageDataModule, schedules: Sequence[WSD]) -> str:
    """The name (:func:`identity.run_name`) of a resolved configuration's run."""
    shape = get_shape(_plain(config.model.init_args.shape))
    per_step = flops_6nd(shape.params_nonembedding, data.expected_tokens_per_step)
    flops = [per_step * schedule.total_steps for schedule in schedules if schedule.total_steps]
    identities = [identity(config, data, schedule) for schedule in schedules]
    return name_of(module_class(config).objective, shape, flops, identities)


def module_class(config: Namespace) -> type[LanguageModule]:
    """The LightningModule that `--model` names."""
    return _located(config.model.class_path, LanguageModule)  # type: ignore[type-abstract]


def _located(class_path: str, base: type[T]) -> type[T]:
    """The class of a dotted path, which the parser has found to be a subclass of ``base``."""
    found = pydoc.locate(class_path)
    assert isinstance(found, type) and issubclass(found, base)
    return found


def reject_unknown_keys(config: Namespace) -> None:
    """Refuse keys of the given files that no setting has.

    The parser refuses those that hold a value by itself, and lets pass those that hold an empty mapping. A
    configuration given inline, as a planned sweep gives it, leaves no path.
    """
    for path in filter(None, config.get("config") or []):
        for key in _empty_mappings(read_yaml(str(path)) or {}):
            if key not in config:
                raise UserError(f"{path}: '{key}' is not a known key; see llada fit --help")


def _empty_mappings(mapping: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in mapping.items():
        if value == {}:
            found.append(f"{prefix}{key}")
        elif isinstance(value, dict):
            found += _empty_mappings(value, f"{prefix}{key}.")
    return found


def as_parsed(value: Any) -> Any:
    """A value as the parser holds it: dataclasses are namespaces."""
    if is_dataclass(value) and not isinstance(value, type):
        return Namespace(**{key: as_parsed(item) for key, item in vars(value).items()})
    if isinstance(value, (list, tuple)):
        return [as_parsed(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
