"""``llada curves``: a results table -> fits, figures and tables for people."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from llada_lightning.commands.fitting import PUBLISHED, add_fit_options, fits_of, read_table, unfinished
from llada_lightning.commands.plan import sweep_that_grows
from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.compute.rules import significant
from llada_lightning.support.command_line import CommandParser, add_json, check_draws, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, file_sha256, write_json
from llada_lightning.support.printing import people_console, shortened

if TYPE_CHECKING:
    import pandas as pd

    from llada_lightning.study.fits import StudyFits
    from llada_lightning.study.forecast import Scored


def main(argv: list[str]) -> int:
    """``llada curves results.csv --out DIR``: a results table -> ``fits.json``, figures, and printed tables."""
    parser = CommandParser(prog="llada curves", description="Fit and draw loss against training FLOPs.")
    parser.add_argument(
        "results",
        type=str,
        metavar="RESULTS",
        help="table that `llada collect` wrote, or `published`: the isoFLOP study that ships with the package; with "
        "--by-level the folder of a run, or of one of its branches",
    )
    parser.add_argument("--out", type=str, required=True, metavar="DIR", help="folder of fits.json and the figures")
    add_fit_options(parser)
    parser.add_argument(
        "--rules",
        action="store_true",
        help="fit the learning rate and batch of a tuning study (llada plan --tune) to a file for llada plan --rule",
    )
    parser.add_argument(
        "--paper", action="store_true", help="also draw the scores of tasks over those of the paper's Tables 18 and 19"
    )
    parser.add_argument(
        "--forecast",
        type=str,
        nargs="+",
        default=[],
        metavar="FILE",
        help="forecasts that `llada forecast` wrote, to be compared with the measured losses",
    )
    parser.add_argument(
        "--by-level",
        action="store_true",
        help="draw the loss of one run by noise level, over its training and its validations",
    )
    add_json(parser)
    options = parser.parse_args(argv)
    check_draws("curves", options)
    if options.by_level:
        return _by_level(options)
    if options.rules:
        return _rules(options)
    from llada_lightning.study.fits import usable_runs  # after the parser: --help answers at once
    from llada_lightning.study.tables.study import print_study

    read = read_table(options.results, options.yardstick, options.source_flops)
    table, fits = read.table, _with_next_budget(fits_of("curves", read, options), options)
    runs = usable_runs(table)
    forecasts = _forecasts(options.forecast, fits, runs)
    left_out = list((Counter(table["run"]) - Counter(runs["run"])).elements())
    if left_out:
        people_console(stderr=True).print(
            f"{len(left_out)} of {len(table)} rows left out: not done, no finite loss, or a result twice "
            f"({shortened(', '.join(map(str, left_out)))})"
        )
    content = fits.as_dict() | ({"forecasts": [own.as_dict() for own in forecasts]} if forecasts else {})
    files = _write(table, fits, content, expanded(options.out), options.convention, options.paper)
    if options.json:
        names = {"fits": files[0], "figures": dict(files[1])}
        print_json({**names, "convention": options.convention, "left_out": len(left_out), **content})
    else:
        printed = [files[0], *files[1].values()]
        print_study(table, fits, options.convention, printed, forecasts, unfinished(options.results))
    return 0


def _with_next_budget(fits: StudyFits, options: Namespace) -> StudyFits:
    """The fits with the command that adds a budget, where losses share no value and the study's sweep is known."""
    from llada_lightning.study.fits import NO_COMMON_LOSS, loss_gap

    lines = (fits.objectives, fits.compute_multiplier)
    of_pairs = (loss_gap(name, fits.reference or "", options.convention, *lines) for name in fits.compared)
    gaps = [gap for gap in of_pairs if gap is not None]
    sweep = sweep_that_grows(Path(options.results).parent) if gaps and options.results != PUBLISHED else None
    if sweep is None:
        return fits
    file, budgets = sweep
    budget = significant(min(budgets) / (1.2 * max(gap.factor or 2.0 for gap in gaps)), 2)
    command = f"llada plan --append {shlex.quote(file)} --flops {budget:g}"
    apart = f"{NO_COMMON_LOSS} by {CONVENTION_NAMES[options.convention]}:"
    notes = [f"{note}. A smaller one: {command}" if note.startswith(apart) else note for note in fits.notes]
    return replace(fits, notes=notes)


def _rules(options: Namespace) -> int:
    """``llada curves --rules``: a tuning study -> ``rules.json``, a figure, and a printed table."""
    from llada_lightning.study.fits.rules import fit_rules
    from llada_lightning.study.plots import write_figure
    from llada_lightning.study.plots.rules import tuning_figure
    from llada_lightning.study.rule_file import RULE_FILE, write_rule_file
    from llada_lightning.study.tables.rules import print_rules

    if options.yardstick is not None:
        raise UserError("curves: --rules fits the validation loss, by which runs are tuned; leave --yardstick out")
    if options.source_flops:
        raise UserError("curves: --rules fits rates and batches by a run's own FLOPs; leave --source-flops out")
    if options.forecast:
        raise UserError("curves: --rules fits rates and batches; leave --forecast out")
    if options.results == PUBLISHED:
        raise UserError(f"curves: --rules fits a tuning study; {PUBLISHED} has one rate and batch at each budget")
    read = read_table(options.results)
    fits = fit_rules(read.table, covariance=read.covariance, samples=options.samples, seed=options.seed)
    results, folder = Path(options.results), expanded(options.out)
    rules = fits.rule_file(results.name, file_sha256(results))
    files = {"rules": str(folder / RULE_FILE)} if rules is not None else {}
    try:
        if rules is not None:
            write_rule_file(folder / RULE_FILE, rules)
        files["figure"] = str(write_figure(tuning_figure(fits), folder, "rules"))
    except OSError as error:
        raise UserError(f"curves: --out {folder} cannot be written ({error.strerror}); choose a folder") from error
    if options.json:
        objectives = {name: own.as_dict() for name, own in fits.objectives.items()}
        print_json({"rules": None, **files, "objectives": objectives, "notes": fits.notes})
    else:
        print_rules(fits, list(files.values()))
    return 0


def _by_level(options: Namespace) -> int:
    """``llada curves RUN --by-level``: the log of a run -> a figure, and a printed table."""
    others = {"--rules": options.rules, "--paper": options.paper, "--reference": options.reference}
    others |= {"--yardstick": options.yardstick, "--forecast": options.forecast}
    if given := [name for name, value in others.items() if value]:
        raise UserError(f"curves: {given[0]} belongs to a table of results, and --by-level to one run; leave one out")
    from llada_lightning.study.levels import read_levels
    from llada_lightning.study.plots import write_figure
    from llada_lightning.study.plots.levels import loss_by_level
    from llada_lightning.study.tables.levels import print_levels

    levels, folder = read_levels(expanded(options.results)), expanded(options.out)
    try:
        figure = str(write_figure(loss_by_level(levels), folder, "levels"))
    except OSError as error:
        raise UserError(f"curves: --out {folder} cannot be written ({error.strerror}); choose a folder") from error
    if options.json:
        print_json({"figure": figure, **levels.as_dict()})
    else:
        print_levels(levels, [figure])
    return 0


def _forecasts(files: list[str], fits: StudyFits, runs: pd.DataFrame) -> list[Scored]:
    """The predictions of some forecasts, each beside what was measured since."""
    from llada_lightning.study.forecast import read_forecast, score

    return [own for file in files for own in score(read_forecast(expanded(file)), fits, runs)]


def _write(
    table: pd.DataFrame,
    fits: StudyFits,
    content: dict[str, Any],
    folder: Path,
    convention: Convention,
    over_paper: bool,
) -> tuple[str, dict[str, str]]:
    from llada_lightning.study.plots import draw_study  # matplotlib takes a second to import

    path = folder / "fits.json"
    try:
        write_json(path, content)
        return str(path), draw_study(table, fits, folder, convention, over_paper)
    except OSError as error:
        raise UserError(f"curves: --out {folder} cannot be written ({error.strerror}); choose a folder") from error
