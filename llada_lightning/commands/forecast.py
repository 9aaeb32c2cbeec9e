"""``llada forecast``: the loss at budgets that are not yet run, in a file that says when it was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llada_lightning.compute.flops import CONVENTION_NAMES, CONVENTIONS
from llada_lightning.objectives import REFERENCE
from llada_lightning.support.command_line import CommandParser, add_draws, add_json, check_draws, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, file_sha256
from llada_lightning.support.printing import people_console

if TYPE_CHECKING:
    from llada_lightning.study.forecast import Forecast


def main(argv: list[str]) -> int:
    """``llada forecast RESULTS --flops C ... --out FILE``: predicts, and writes the predictions with their hash."""
    parser = CommandParser(
        prog="llada forecast",
        description="Predict the best loss at budgets that are not yet run, by every method, before they are run. "
        "`llada curves --forecast FILE` scores the predictions when the results are there.",
    )
    parser.add_argument("results", type=str, metavar="RESULTS", help="table that `llada collect` wrote")
    parser.add_argument("--flops", type=float, nargs="+", required=True, help="budgets to predict, in training FLOPs")
    parser.add_argument("--out", type=str, required=True, metavar="FILE", help="file of the forecast; never replaced")
    parser.add_argument(
        "--convention",
        choices=CONVENTIONS,
        default="6nd",
        help="how the FLOPs are counted: 6ND, or with attention and head",
    )
    parser.add_argument(
        "--reference",
        type=str,
        metavar="OBJECTIVE",
        help=f"objective with which the joint law of each other one is fitted (default: {REFERENCE})",
    )
    parser.add_argument(
        "--unit", choices=("nats_per_token", "bits_per_byte"), default="nats_per_token", help="unit of the loss"
    )
    add_draws(parser)
    add_json(parser)
    options = parser.parse_args(argv)
    check_draws("forecast", options)
    if not all(0 < flops < 1e40 for flops in options.flops):
        raise UserError(f"forecast: --flops {options.flops}; budgets are positive, such as 1e13")
    from llada_lightning.study.fits import fit_table, usable_runs  # after the parser: --help answers at once
    from llada_lightning.study.forecast import make_forecast, write_forecast
    from llada_lightning.study.results import covariance_path, read_covariance, read_results

    results, out = Path(options.results), expanded(options.out)
    table, beside = read_results(results), covariance_path(results, None)
    covariance = read_covariance(beside) if beside.is_file() else None
    how = {name: options[name] for name in ("unit", "samples", "seed", "reference")}
    fits = fit_table(table, covariance=covariance, **how)
    source = {"file": results.name, "sha256": file_sha256(results)}
    forecast = make_forecast(fits, usable_runs(table), options.flops, options.convention, source)
    try:
        write_forecast(out, forecast)
    except OSError as error:
        raise UserError(f"forecast: --out {out} cannot be written ({error.strerror}); choose another") from error
    if options.json:
        from llada_lightning.support.reading import read_json

        print_json({"file": str(out), **read_json(out)})
    else:
        _print(forecast, out)
    return 0


def _print(forecast: Forecast, out: Path) -> None:
    from llada_lightning.study.forecast import Scored
    from llada_lightning.study.tables.study import forecast_table

    console = people_console()
    console.print(f"Budgets by {CONVENTION_NAMES[forecast.convention]}; intervals of 95 % for the measured loss")
    console.print(forecast_table(Scored(prediction, None) for prediction in forecast.predictions))
    console.print(f"-> {out}, {forecast.created}", soft_wrap=True)
