"""``llada curves``: a results table -> fits, figures and tables for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from llada_lightning.compute.flops import CONVENTION_NAMES, CONVENTIONS, Convention
from llada_lightning.objectives import REFERENCE
from llada_lightning.support.command_line import CommandParser, add_draws, add_json, check_draws, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, file_sha256, write_json
from llada_lightning.support.printing import people_console, shortened

if TYPE_CHECKING:
    import pandas as pd

    from llada_lightning.study.fits import StudyFits
    from llada_lightning.study.forecast import Scored

PUBLISHED = "published"
"""In place of a table's path: the published isoFLOP study that the package holds."""


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
    parser.add_argument(
        "--convention",
        choices=CONVENTIONS,
        default="6nd",
        help="FLOPs that are drawn and printed: 6ND, or with attention and head; fits.json holds both",
    )
    parser.add_argument(
        "--reference",
        type=str,
        metavar="OBJECTIVE",
        help=f"objective that compute multipliers divide by (default: {REFERENCE}); with its variant in brackets "
        "where the results hold several",
    )
    parser.add_argument(
        "--yardstick",
        type=str,
        metavar="NAME",
        help="loss that is held equal: that under a decoding policy which runs have measured, such as confidence@1 "
        "(default: the validation loss)",
    )
    parser.add_argument(
        "--source-flops",
        action="store_true",
        help="count the training FLOPs, by 6ND, of the weights that runs start from (model.weights), too",
    )
    parser.add_argument(
        "--unit", choices=("nats_per_token", "bits_per_byte"), default="nats_per_token", help="unit of the loss"
    )
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
    add_draws(parser)
    add_json(parser)
    options = parser.parse_args(argv)
    check_draws("curves", options)
    if options.by_level:
        return _by_level(options)
    if options.rules:
        return _rules(options)
    from llada_lightning.study.fits import fit_table, usable_runs  # after the parser: --help answers at once
    from llada_lightning.study.fits.runs import with_source_flops
    from llada_lightning.study.report import print_report

    table, covariance, notes = _read(options.results, options.yardstick)
    table, of_sources = with_source_flops(table, options.source_flops)
    notes += of_sources
    how = {name: options[name] for name in ("unit", "samples", "seed", "reference")}
    fits = fit_table(table, covariance=covariance, **how)
    fits = replace(fits, notes=[*notes, *fits.notes])
    forecasts = _forecasts(options.forecast, fits, usable_runs(table))
    if options.convention not in fits.conventions:
        counted = " and ".join(fits.conventions)
        name = CONVENTION_NAMES[options.convention]
        raise UserError(f"curves: --convention {options.convention}: the table lacks FLOPs by {name}; it has {counted}")
    left_out = list((Counter(table["run"]) - Counter(usable_runs(table)["run"])).elements())
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
        print_report(table, fits, options.convention, [files[0], *files[1].values()], forecasts)
    return 0


def _rules(options: Namespace) -> int:
    """``llada curves --rules``: a tuning study -> ``rules.json``, a figure, and a printed table."""
    from llada_lightning.study.fits.rules import fit_rules
    from llada_lightning.study.plots import write_figure
    from llada_lightning.study.plots.rules import tuning_figure
    from llada_lightning.study.report import print_rules
    from llada_lightning.study.rule_file import RULE_FILE, write_rule_file

    if options.yardstick is not None:
        raise UserError("curves: --rules fits the validation loss, by which runs are tuned; leave --yardstick out")
    if options.source_flops:
        raise UserError("curves: --rules fits rates and batches by a run's own FLOPs; leave --source-flops out")
    if options.forecast:
        raise UserError("curves: --rules fits rates and batches; leave --forecast out")
    if options.results == PUBLISHED:
        raise UserError(f"curves: --rules fits a tuning study; {PUBLISHED} has one rate and batch at each budget")
    table, covariance, _ = _read(options.results)
    fits = fit_rules(table, covariance=covariance, samples=options.samples, seed=options.seed)
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
    from llada_lightning.study.report import print_levels

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


def _read(results: str, yardstick: str | None = None) -> tuple[pd.DataFrame, pd.DataFrame | None, list[str]]:
    """The table with the losses by a yardstick, their covariance where a file beside it holds one, and notes."""
    from llada_lightning.study.results import covariance_path, read_covariance, read_results
    from llada_lightning.study.yardstick import with_yardstick

    published = results == PUBLISHED
    if published:
        from llada_lightning.study.reference import published_isoflop

        table = published_isoflop()
    else:
        table = _with_scores(read_results(results))
    table, notes = (table, []) if yardstick is None else with_yardstick(table, yardstick)
    path = covariance_path(Path(results), yardstick)
    return table, read_covariance(path) if not published and path.is_file() else None, notes


def _with_scores(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the scores of its ``task_`` columns as numbers."""
    import pandas as pd

    scores = {}
    for column in table.columns[table.columns.str.startswith("task_")]:
        try:
            scores[column] = pd.to_numeric(table[column]).astype(float)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"results: {column} holds values that are no numbers ({reason}); correct the table"
            ) from error
    return table.assign(**scores)


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
