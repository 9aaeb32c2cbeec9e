"""Which source code runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import llada_lightning


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, `+` where it has changes; None outside one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(llada_lightning.__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", llada_lightning.__file__)  # else the checkout is someone else's
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
