"""How the libraries that a run imports are prepared, and what of them a process that prints help leaves out."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib.machinery import PathFinder
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

from llada_lightning.support.cluster import process_rank


def quiet_libraries() -> None:
    """Prepare the libraries that a run imports: which process this is, what they print, where they keep files.

    What they tell everyone at every start, and nobody can act upon, is silenced. torch keeps what it compiles in the
    user's cache folder, where later runs find it, instead of in /tmp.
    """
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(cache, "llada-lightning", "compiled"))
    import lightning  # noqa: F401  (sets the levels that follow)
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    # Lightning believes RANK and its like, whoever has set them.
    rank_zero_only.rank = process_rank()  # type: ignore[attr-defined]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*sync_dist=True.*",
        ".*torch.distributed is disabled, unavailable or uninitialized.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*custom batch sampler.*",
        ".*The dirpath has changed.*",
        ".*The given buffer is not writable.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def prepare_for_help() -> None:
    """Let Lightning be imported without what only a run needs, in a process that prints help and ends.

    TorchDynamo is a third of Lightning's import. Of it, Lightning asks for a class, to compare types with, and for a
    decorator. Seen with Lightning 2.6 and torch 2.13.
    """
    if "torch._dynamo" not in sys.modules:
        _unexecuted(
            "torch._dynamo", OptimizedModule=type("OptimizedModule", (), {}), disable=lambda call, *_, **__: call
        )
    _postpone_most_metrics()


def _postpone_most_metrics() -> None:
    """Import of torchmetrics the two classes that Lightning needs; the rest follows when it is asked for.

    The rest is a third of Lightning's import: it imports SciPy's signal processing, Matplotlib and, where it is
    installed, transformers. Seen with torchmetrics 1.9.
    """
    if "torchmetrics" in sys.modules:
        return
    logger = logging.getLogger("torchmetrics")
    metrics = _unexecuted("torchmetrics", _logger=logger, __version__=version("torchmetrics"))

    def draw(*args: Any, **options: Any) -> Any:
        if plot.plot_single_or_multi_val is draw:
            del plot.plot_single_or_multi_val
        return plot.plot_single_or_multi_val(*args, **options)

    utilities = os.path.join(metrics.__path__[0], "utilities")
    stubs: dict[str, Any] = {"_AX_TYPE": Any, "_PLOT_OUT_TYPE": Any, "plot_single_or_multi_val": draw}
    plot = _unexecuted("torchmetrics.utilities.plot", utilities, **stubs)
    import torchmetrics.utilities  # before the next: they import one another
    from torchmetrics.collections import MetricCollection
    from torchmetrics.metric import Metric

    torchmetrics.utilities.plot = plot
    vars(metrics).update(Metric=Metric, MetricCollection=MetricCollection)


def _unexecuted(name: str, folder: str | None = None, **attributes: Any) -> ModuleType:
    """A module that has some of its attributes only: whoever asks for another one has it executed.

    Args:
        name: The full name of the module.
        folder: The folder of its file, where its package is not to be imported to find it.
        attributes: The attributes, by their names.
    """
    spec = find_spec(name) if folder is None else PathFinder.find_spec(name, [folder])
    assert spec is not None and spec.loader is not None
    loader, module = spec.loader, module_from_spec(spec)

    def execute(attribute: str) -> Any:
        # Import statements ask for __path__, which a module that is no package does not have.
        if attribute.startswith("__") or vars(module).pop("__getattr__", None) is None:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        loader.exec_module(module)
        return getattr(module, attribute)

    vars(module).update(attributes, __getattr__=execute)
    sys.modules[name] = module
    return module
