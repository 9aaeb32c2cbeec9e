"""The floor below everything: a table can be fitted and drawn on a machine without torch."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import llada_lightning.scaling


def test_scaling_imports_neither_torch_nor_lightning() -> None:
    modules = [
        f"llada_lightning.scaling.{module.name}" for module in pkgutil.iter_modules(llada_lightning.scaling.__path__)
    ]
    assert "llada_lightning.scaling.sweep_command" in modules
    script = f"import sys, {', '.join(modules)}\nprint(*sorted({{'torch', 'lightning'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
