"""Runs that a plain Lightning Trainer starts, in a script or a notebook.

``Trainer(max_steps=100).fit(LladaModule("107k"), TokenDataModule("data/books"))`` resolves what `llada fit` would have
resolved: vocabulary, batch, schedule and identity. So the checkpoints of such a run can be loaded, scored and resumed
like any other. Budgets, run folders, results and branches are those of `llada fit`, which
:func:`llada_lightning.fit` starts from Python.
"""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

from jsonargparse import Namespace
from lightning import Trainer

from llada_lightning.compute.rules import Rules
from llada_lightning.compute.shapes import get_shape
from llada_lightning.data.language_datamodule import LanguageDataModule
from llada_lightning.settings import Budget
from llada_lightning.support.errors import UserError
from llada_lightning.training.configuration import fill_vocabulary, identity, resolve_length
from llada_lightning.training.first_weights import take_over
from llada_lightning.training.modules import LanguageModule


def resolve_from_python(module: LanguageModule, trainer: Trainer) -> None:
    """Fill in what follows from the data and the trainer, before the Transformer is built.

    Args:
        module: The LightningModule, of which vocabulary, schedule and identity are set.
        trainer: The trainer that it is attached to, with the data module of this package.

    Raises:
        UserError: the trainer has no such data module, nothing says how long to train, or settings contradict one
            another.
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
    fill_vocabulary(config, data)
    if trainer.training:
        if trainer.max_steps < 1 and data.wanted_steps is None:
            raise UserError("trainer: nothing says how long to train; give Trainer(max_steps=...)")
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise UserError("trainer: the data module divides its batches itself; give use_distributed_sampler=False")
        schedule = resolve_length(config, data).schedules[0]
        trainer.fit_loop.epoch_loop.max_steps = config.trainer.max_steps
        module.schedule = schedule
    module.shape = get_shape(arguments.shape)
    for name in ("vocab_size", "mask_token_id", "eos_token_id", "compat", "rope_theta", "norm_eps", "text_prefix_ids"):
        setattr(module, name, arguments[name])
    module.identity = identity(config, data)


def _configuration(module: LanguageModule, data: LanguageDataModule, trainer: Trainer) -> Namespace:
    """The configuration that `llada fit` would have of these objects."""
    arguments = Namespace(**{name: _as_parsed(value) for name, value in module.arguments.items()})
    arguments.seed = module.seed
    data_arguments = Namespace(**{name: _as_parsed(value) for name, value in data.arguments.items()})
    data_arguments.seed = data.seed
    return Namespace(
        seed_everything=module.seed,
        model=Namespace(class_path=_class_path(module), init_args=arguments),
        data=Namespace(class_path=_class_path(data), init_args=data_arguments),
        trainer=Namespace(
            max_steps=trainer.max_steps,
            precision=str(trainer.precision),
            gradient_clip_val=trainer.gradient_clip_val,
            gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        ),
        budget=Namespace(**asdict(Budget())),
        rules=Namespace(**asdict(Rules())),
    )


def _class_path(made: Any) -> str:
    return f"{type(made).__module__}.{type(made).__qualname__}"


def _as_parsed(value: Any) -> Any:
    """A value as the parser holds it: dataclasses are namespaces."""
    if is_dataclass(value) and not isinstance(value, type):
        return Namespace(**{key: _as_parsed(item) for key, item in vars(value).items()})
    if isinstance(value, (list, tuple)):
        return [_as_parsed(item) for item in value]
    return value
