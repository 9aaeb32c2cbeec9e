"""The floor below everything: a table can be fitted and drawn on a machine without torch."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import llada_lightning.scaling


def test_scaling_imports_neither_torch_nor_lightning() -> None:
    package = llada_lightning.scaling
    modules = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    assert {"llada_lightning.scaling.sweep_command", "llada_lightning.scaling.fits.parametric"} <= set(modules)
    script = f"import sys, {', '.join(modules)}\nprint(*sorted({{'torch', 'lightning'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
