"""How the libraries that a run imports are prepared."""

from __future__ import annotations

import logging
import os
import warnings

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
