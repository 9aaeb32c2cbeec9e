"""Runs that a plain Lightning Trainer starts, in a script or a notebook.

``Trainer(max_steps=100).fit(LladaModule("107k"), TokenDataModule("data/books"))`` resolves what `llada fit` would have
resolved: vocabulary, batch, schedule and identity. So the checkpoints of such a run can be loaded, scored and resumed
like any other. Budgets, run folders, results and branches are those of `llada fit`, which
:func:`llada_lightning.fit` starts from Python.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from jsonargparse import Namespace
from lightning import Trainer

from llada_lightning.compute.rules import Rules
from llada_lightning.compute.shapes import get_shape
from llada_lightning.data.datamodule import LanguageDataModule
from llada_lightning.records import read_records
from llada_lightning.settings import Budget
from llada_lightning.support.errors import UserError
from llada_lightning.training.configuration import fill_vocabulary, identity, resolve_length
from llada_lightning.training.first_weights import take_over
from llada_lightning.training.lightning_internals import replaces_samplers
from llada_lightning.training.modules import LanguageModule


def fit(**settings: Any) -> list[dict[str, Any]]:
    """Do what `llada fit` does, with the same settings, and return what it writes into ``result.json``.

    ``fit(model="LladaModule", data={"path": "data/books"}, budget={"flops": 1e12}, run={"study": "mine"})`` is
    ``llada fit --model LladaModule --data.path data/books --budget.flops 1e12 --run.study mine``. A run that is done is
    not trained again, and one that was stopped resumes.

    Args:
        settings: The settings by their names, nested as in a configuration file. ``model`` and ``data`` may be the name
            of a class, a mapping of its arguments, or a mapping with ``class_path`` and ``init_args``.

    Returns:
        One record for each budget, smallest first, with the columns of a results table.

    Raises:
        UserError: a setting is wrong; the message says which, and how to correct it.
    """
    from llada_lightning.training.fit import LladaCLI, RunIsDone

    arguments = [word for name, value in settings.items() for word in _words(name, value)]
    try:
        folder = LladaCLI(["fit", *arguments]).folder
    except RunIsDone as done:
        folder = done.folder
    return read_records(folder)


def _words(name: str, value: Any) -> list[str]:
    """A setting as the command takes it."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping) and "class_path" in value:
        inner = value.get("init_args", {})
        return [f"--{name}={value['class_path']}", *(w for k, v in inner.items() for w in _words(f"{name}.{k}", v))]
    if isinstance(value, Mapping) and value and name != "data.path":
        return [word for key, item in value.items() for word in _words(f"{name}.{key}", item)]
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"]


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
        if trainer.world_size > 1 and replaces_samplers(trainer):
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
