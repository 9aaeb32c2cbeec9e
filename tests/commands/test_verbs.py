"""The table of verbs, and how little the command imports before it answers."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from itertools import groupby
from pathlib import Path

import pytest

from llada_lightning import __version__
from llada_lightning.commands import FORMER_VERBS, VERBS
from llada_lightning.commands.main import main

NO_VERBS = {"__init__", "fitting", "main", "shared"}
"""The files of commands/ that are no verbs."""

HEAVY = ("torch", "lightning", "pandas", "scipy", "matplotlib", "wandb", "litdata", "tokenizers")


def test_each_verb_has_a_file_and_each_file_a_verb() -> None:
    import llada_lightning.commands as package

    files = {path.stem for path in Path(str(package.__file__)).parent.glob("*.py")}
    assert files - NO_VERBS == {verb.file for verb in VERBS}
    for verb in VERBS:
        assert callable(import_module(f"llada_lightning.commands.{verb.file}").main)
    names = [verb.name for verb in VERBS]
    assert len(set(names)) == len(names) and not set(names) & set(FORMER_VERBS)


def test_help_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  (\w+) +(.+)$", text, re.MULTILINE) == [(verb.name, verb.help) for verb in VERBS]
    assert max(map(len, text.splitlines())) <= 100
    groups = [group for group, _ in groupby(VERBS, lambda verb: verb.group)]
    assert re.findall(r"^([a-z ]+):$", text, re.MULTILINE) == groups and len(set(groups)) == len(groups)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_each_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "usage:" in capsys.readouterr().out.lower()


def test_help_waits_for_no_heavy_library() -> None:
    """That of every verb but Lightning's own; one process asks them all, one after another."""
    asked = [["--help"], ["--version"], *([verb.name, "--help"] for verb in VERBS if verb.file != "fit")]
    script = (
        "import sys\nfrom llada_lightning.commands.main import main\n"
        f"for arguments in {asked}:\n"
        "    assert main(arguments) == 0\n"
        f"    print('imported:', *arguments, *(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert said == asked


def test_help_of_fit_waits_for_torch_and_lightning_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """And it lists the options that a process lists which has imported everything."""
    done = _in_a_new_process(
        'heavy = ("torch._dynamo.utils", "torchmetrics.functional", "matplotlib", "pandas", "scipy", "litdata")\n'
        "print('imported:', *(name for name in heavy if name in sys.modules), file=sys.stderr)"
    )
    assert done.stderr == "imported:\n"
    assert main(["fit", "--help"]) == 0
    listed = [re.findall(r"^  (--[\w.]+)", text, re.MULTILINE) for text in (done.stdout, capsys.readouterr().out)]
    assert listed[0] == listed[1] and "--budget.flops" in listed[0]


@pytest.mark.slow
def test_what_help_leaves_out_is_there_when_it_is_asked_for() -> None:
    _in_a_new_process(
        "import torch, torchmetrics\n"
        "mean = torchmetrics.MeanMetric()\n"
        "mean.update(torch.tensor([1.0, 2.0]))\n"
        "assert mean.compute() == 1.5 and isinstance(mean, torchmetrics.metric.Metric)\n"
        "assert mean.plot() and torchmetrics.utilities.plot.plot_curve and not hasattr(torchmetrics, 'nothing')\n"
        "assert not isinstance(mean, torch._dynamo.OptimizedModule) and torch._dynamo.config.recompile_limit\n"
    )


def _in_a_new_process(code: str) -> subprocess.CompletedProcess[str]:
    """Run code after `llada fit --help` in a process that does nothing else."""
    script = (
        "import sys\nfrom llada_lightning.commands.main import entry_point\n"
        "sys.argv = ['llada', 'fit', '--help']\n"
        "try:\n    entry_point()\nexcept SystemExit as leave:\n    assert leave.code == 0\n"
    )
    return subprocess.run([sys.executable, "-c", script + code], capture_output=True, text=True, check=True)


def test_a_class_that_is_not_trusted_is_refused_before_torch_is_imported() -> None:
    words = ["--model=mine.Module", "--model mine.Module", "--data mine.Data", "--trainer.callbacks+ mine.Hello"]
    asked = [["fit", "--data.path=data", *option.split()] for option in [*words, "--trainer.callbacks+=mine.Hello"]]
    script = (
        "import sys\nfrom llada_lightning.commands.main import main\n"
        f"for arguments in {asked}:\n"
        "    assert main(arguments) == 2 and not {'torch', 'lightning', 'mine'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    refused = [line.partition(" is not of llada_lightning")[0] for line in done.stderr.splitlines()]
    classes = [("model", "Module"), ("model", "Module"), ("data", "Data"), *[("trainer.callbacks", "Hello")] * 2]
    assert refused == [f"error: {name}: 'mine.{kind}'" for name, kind in classes]


ABBREVIATED = [
    ("plan", "--dat", "data"),
    ("plan", "--append=s.yaml --flop", "1"),
    ("sweep", "run s.yaml --job", "2"),
    ("sweep", "run s.yaml --inde", "2"),
    ("collect", "runs --ou", "t.csv"),
    ("curves", "t.csv --sampl", "100"),
    ("generate", "run --lengt", "8"),
    ("prepare", "--sourc", "python-stdlib"),
]


@pytest.mark.parametrize(("verb", "words", "value"), ABBREVIATED)
def test_an_abbreviated_option_is_refused_and_the_option_is_named(
    verb: str, words: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, *words.split(), value]) == 2
    error = capsys.readouterr().err
    short = words.split()[-1]
    assert short in error and "; the nearest is --" in error and error.count("\n") == 1


def test_no_parser_of_the_package_takes_abbreviations(monkeypatch: pytest.MonkeyPatch) -> None:
    from llada_lightning.support.command_line import CommandParser

    made: list[CommandParser] = []
    init = CommandParser.__init__

    def noted(self: CommandParser, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(CommandParser, "__init__", noted)
    siblings = [verb for verb in VERBS if verb.file != "fit"]
    for verb in siblings:
        assert main([verb.name, "--help"]) == 0
    assert len(made) >= len(siblings) and not any(parser.allow_abbrev for parser in made)
