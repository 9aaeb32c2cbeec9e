"""The report of a study: its verdict, its facts, and its pages."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pandas as pd
import pytest
from markdown_it import MarkdownIt
from rich.table import Table

from helpers.studies import CHINCHILLA, VALLEYS, record, simulated_study, study
from llada_lightning.compute.shapes import format_count
from llada_lightning.study.fits import Disagreement, StudyFits, fit_table
from llada_lightning.study.report import Report, Source, make_report
from llada_lightning.study.report.facts import (
    flops_counting,
    gathered,
    left_out_table,
    limits,
    loss_counting,
    provenance_table,
    settings_table,
)
from llada_lightning.study.report.figures import Drawing
from llada_lightning.study.report.page import Grid, html_page, markdown_page
from llada_lightning.study.report.verdict import verdict, verdict_without_fits
from llada_lightning.study.results import table_of_records
from llada_lightning.study.tables.study import notes_by
from llada_lightning.support.printing import listed

SOURCE = Source(
    title="A study", created="2025-01-02 03:04 UTC", versions={"llada-lightning": "0.1.0", "numpy": "2.1.0"},
    table="results.csv", hashes={"results.csv": "0" * 64}, command="llada curves results.csv --out DIR",
)  # fmt: skip
HOSTILE = "<script>alert('1')</script> & \"b\" *c* _d_ `e` [f](https://g.example) | # $\\h$"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text; tags are closed in the order in which they are opened."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data


def fitted(table: pd.DataFrame, **options: object) -> StudyFits:
    return fit_table(table, samples=100, **options)  # type: ignore[arg-type]


def report(table: pd.DataFrame, fits: StudyFits | None, source: Source = SOURCE) -> Report:
    return make_report(table, fits, "6nd", source)


@pytest.fixture(scope="module")
def valleys() -> tuple[pd.DataFrame, StudyFits]:
    """Both objectives over budgets that have losses in common, with a multiplier by every method."""
    table = simulated_study(VALLEYS, noise=0.001)[0]
    return table, fitted(table)


@pytest.fixture(scope="module")
def whole(valleys: tuple[pd.DataFrame, StudyFits]) -> Report:
    """The report of that study, with every figure."""
    return report(*valleys)


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_the_verdict_tells_the_multiplier_its_interval_its_method_and_the_common_loss(
    valleys: tuple[pd.DataFrame, StudyFits],
) -> None:
    table, fits = valleys
    first, second, third = verdict(table, fits, "6nd")
    (own,) = (headline for headline in fits.headlines if headline.convention == "6nd")
    assert own.read_off is not None and own.reference_flops is not None
    numbers = f"{own.read_off.value:.3g} (95 % interval {own.read_off.low:.3g} to {own.read_off.high:.3g})"
    assert first.startswith(
        f"Read off the measured losses, llada needs {numbers} times the training FLOPs of arm (6ND)"
    )
    (line,) = re.findall(r"for the loss of ([\d.]+) nats/token that arm reaches with ([\d.e]+) FLOPs", first)
    assert float(line[1]) == pytest.approx(own.reference_flops, rel=0.01)
    read_off = fits.line("arm", "read-off", "6nd", "llada")
    assert read_off is not None
    assert float(line[0]) == pytest.approx(float(read_off.loss([own.reference_flops])[0]), abs=5e-4)
    assert "counted as 6ND + attention + head, it is " in first
    assert "the methods that are relied on at that loss (read-off, " in second.lower()
    assert "not measured is how much of this is the gap between the bound of llada and the likelihood itself" in second
    assert re.match(r"Compared are \d+ finished results of arm \(\d budgets, ", third)
    assert third.endswith(
        "on the same data, one tokenizer and one sequence length, by validation losses in nats/token, with FLOPs "
        "counted by 6ND and 6ND + attention + head."
    )
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in (first, second, third))


def test_methods_that_differ_are_named(valleys: tuple[pd.DataFrame, StudyFits]) -> None:
    table, fits = valleys
    (own,) = (headline for headline in fits.headlines if headline.convention == "6nd")
    what = ("compute multiplier", "llada", "arm", "6nd", own.reference_flops, ("read-off", "isoflop"))
    differ = Disagreement(*what, (1.5, 3.5), ((1.0, 2.0), (3.0, 4.0)))
    second = verdict(table, replace(fits, disagreements=[differ]), "6nd")[1]
    assert "of which read-off and isoflop differ by more than their errors" in second
    assert "and do not differ" in verdict(table, replace(fits, disagreements=[]), "6nd")[1]


def test_losses_without_a_common_value_are_told_in_the_first_sentence() -> None:
    table = study(budgets=(3e11, 1e12))
    first, second, _ = verdict(table, fitted(table), "6nd")
    assert first.startswith(
        "The compute multiplier of llada over arm is not measured: their best losses have no value in common "
        "(the best losses of arm go from "
    )
    assert "gap" not in second


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("arm", "because arm is the only objective of the results."),
        ("llada", "because the results hold no runs of arm to divide by."),
    ],
)
def test_one_objective_has_no_multiplier(objective: str, words: str) -> None:
    table = study()
    table = table[table["objective"] == objective].reset_index(drop=True)
    fits = fitted(table)
    first, second = verdict(table, fits, "6nd")
    assert first == f"No compute multiplier is measured, {words}"
    assert second.startswith(f"Compared are 6 finished results of {objective} ")
    assert report(table, fits).multipliers == []


def test_of_many_variants_the_ends_are_told() -> None:
    table = simulated_study(VALLEYS, noise=0.001, budgets=(1e17, 1e18, 1e19))[0]
    own = table[table["objective"] == "llada"]
    others = [
        own.assign(variant=f"dropout={n}", val_nats_per_token=own["val_nats_per_token"] * (1 + n / 400))
        for n in range(1, 4)
    ]
    table = pd.concat([table, *others], ignore_index=True)
    fits = fitted(table, conventions=("6nd",))
    first, second, third = verdict(table, fits, "6nd")
    assert first.startswith(
        "Read off the measured losses, 4 of 4 objectives and variants have a compute multiplier over"
    )
    assert " for llada to " in first and " for llada [dropout=3], each at the common loss" in first
    assert "methods differ by more than their errors at " in second.lower()
    assert "5 objectives and variants (" in third


def test_a_table_without_a_finished_run_has_a_verdict_too() -> None:
    records = [record("arm", "107k", 1e12, 4.0, status="running"), record("llada", "107k", 1e12, 4.0, status=None)]
    first, second = verdict_without_fits(table_of_records(records))
    assert first == "No compute multiplier is measured, because no run is finished with a finite loss."
    assert second == "The table holds 2 results of arm and llada: 1 with status running, 1 with status no status."


def test_names_are_listed_as_in_a_sentence() -> None:
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


# --- the facts -------------------------------------------------------------------------------------------------------


def rows(table: Table) -> dict[str, list[str]]:
    grid = Grid.of(table)
    return {row[0]: row[1:] for row in grid.rows}


def test_each_result_that_no_fit_sees_has_a_reason() -> None:
    found = table_of_records([
        record("arm", "107k", 1e12, 4.0, run="sound"),
        record("arm", "107k", 1e12, 4.0, run="sound"),
        record("arm", "107k", 1e12, 4.0, run="open", status="running"),
        record("arm", "107k", 1e12, float("nan"), run="lost"),
    ])  # fmt: skip
    reasons = {run: cells[-1] for run, cells in rows(left_out_table(found)).items()}
    assert reasons == {
        "sound": "the same result is there before", "open": "it is not done", "lost": "its loss is not finite",
    }  # fmt: skip
    assert left_out_table(study()).row_count == 0


def test_notes_that_say_the_same_of_several_objectives_are_one() -> None:
    names = ["arm", "llada", "llada [x=1]", "llada [x=2]", "block"]
    notes = ["arm: few", *(f"{name}, isoflop: no fit" for name in names), "llada [x=1]: few", "covariance: none"]
    assert gathered(notes, names) == [
        "arm and llada [x=1]: few",
        "all 5 objectives, isoflop: no fit",
        "covariance: none",
    ]
    some = [f"{name}, isoflop: no fit" for name in names[:4]]
    assert gathered(some, names) == ["4 objectives (arm, llada, …), isoflop: no fit"]


def test_how_flops_and_losses_are_counted_is_said_of_the_objectives_of_the_table() -> None:
    table = study()
    flops = dict(flops_counting(table))
    assert flops["output head"].endswith("all positions for arm, and for llada the masked ones, in expectation.")
    assert flops["6ND + attention + head"] == "The sum of these three."
    ratio = (table["flops_total"] / table["flops_6nd"])[table["objective"] == "arm"]
    assert flops["total over 6ND"].startswith(f"{ratio.min():.2f} to {ratio.max():.2f} for arm; ")
    assert "source FLOPs" not in flops
    assert "source FLOPs" in dict(flops_counting(table.assign(source_flops=1e12)))
    losses = dict(loss_counting(table, fitted(table)))
    assert losses["bound (llada)"].startswith("An upper bound")
    assert losses["exact (arm)"].startswith("The negative log-likelihood")
    assert losses["interval"].startswith("95 % of 100 bootstrap draws (seed 0)")
    assert "interval" not in dict(loss_counting(table, None))


def test_settings_and_versions_are_told_with_how_often_they_are_there() -> None:
    table = table_of_records([
        record("arm", "107k", 1e12, 4.0, lr=1e-3, device="cpu", git_commit=None),
        record("arm", "443k", 1e12, 4.0, lr=2e-3, device="gpu", versions={"torch": "2.9.0"}),
        record("llada", "443k", 1e12, 4.0, lr=3e-3, device="gpu", versions=None),
    ])  # fmt: skip
    settings = rows(settings_table(table))
    assert settings["peak learning rate"] == ["0.001, 0.002", "0.003"]
    assert settings["shapes"] == ["107k (1 result), 443k (1 result)", "443k"]
    assert settings["decay steps"] == ["not known", "not known"]
    found = rows(provenance_table(table))
    assert found["device"] == ["cpu (1 result), gpu (2 results)"]
    assert found["git commit"] == ["0123abc; not known of 1"]
    assert found["version of torch"] == ["2.13.0 (1 result), 2.9.0 (1 result)"]
    many = table_of_records([record("arm", "107k", 1e12, 4.0, steps=n * 1000) for n in range(1, 20)])
    assert rows(settings_table(many))["optimizer steps"] == ["1,000 to 19,000 (19 values)"]
    assert rows(provenance_table(many.assign(versions="damaged")))["version of all"] == ["damaged"]


def test_limits_name_repeated_data_and_what_is_not_known() -> None:
    table = study().assign(epochs=6.0)
    found = limits(table, fitted(table), collected=False)
    assert found[0].startswith("A bound is compared with an exact loss.")
    assert "Runs of arm read their training data up to 6 times; passes beyond 4 are worth less than new data." in found
    assert "Runs of llada read their training data up to 6 times; how little that costs is not known for it." in found
    assert any(line.startswith("The table is all that this page knows") for line in found)
    assert any("planned and never started" in line for line in limits(table, None, collected=True))


# --- the pages -------------------------------------------------------------------------------------------------------


def test_a_column_without_a_name_belongs_to_the_one_on_its_left() -> None:
    table = Table(title="T", caption="one\ntwo")
    for name, justify in (("what", "left"), ("N", "right"), ("", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_row("a", "1 ", " (0–2)")
    table.add_row("a word of more than sixteen letters", "2", "")
    grid = Grid.of(table)
    assert (grid.title, grid.header, grid.caption) == ("T", ["what", "N"], ["one", "two"])
    assert grid.rows == [["a", "1 (0–2)"], ["a word of more than sixteen letters", "2"]]
    assert grid.kinds == ["long", "number"]


def test_a_page_needs_nothing_beside_itself(whole: Report) -> None:
    text = html_page(whole)
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "img", "image", "base")]
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"):
                assert value is not None and value.startswith(("#", "data:,")), (tag, name, value)
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "://" not in text
    assert ("meta", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in [
        (tag, attributes.get("content")) for tag, attributes in page.tags
    ]


def test_every_figure_is_drawn_in_the_page_with_a_text(valleys: tuple[pd.DataFrame, StudyFits], whole: Report) -> None:
    assert [figure.name for figure in whole.figures] == ["scaling", "isoflop", "optimum", "multiplier", "parametric"]
    page = Page(html_page(whole))
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(drawn) == len(whole.figures) and len(set(identities)) == len(identities)
    for attributes in drawn:
        assert attributes["role"] == "img" and set(str(attributes["aria-labelledby"]).split()) <= set(identities)
    used = {str(value)[1:] for _, each in page.tags for name, value in each.items() if name in ("href", "xlink:href")}
    assert used - {"ata:,"} <= set(identities)
    clips = {value for _, each in page.tags for value in re.findall(r"url\(#(.+?)\)", str(each.get("clip-path")))}
    assert clips and clips <= set(identities)
    ends = [point.loss for point in valleys[1].envelopes("6nd")["arm"].points]
    assert f"for arm from {ends[0]:.3f} at " in whole.figures[0].text and f"to {ends[-1]:.3f} at " in page.text


def test_comments_of_a_figure_are_not_in_the_page() -> None:
    inner = '<!-- <b>name</b> --><g id="a"><use xlink:href="#b"/></g>'
    drawing = Drawing("one", "", "", f'<?xml?><svg viewBox="0 0 1 2" xmlns="http://x">{inner}</svg>\n')
    assert drawing.view_box == "0 0 1 2"
    assert drawing.shapes == '<g id="one-a"><use xlink:href="#one-b"/></g>'


@pytest.fixture(scope="module")
def hostile() -> Report:
    """A study in which every name is markup."""
    table = simulated_study(CHINCHILLA)[0]
    names = [f"{HOSTILE} {number}" for number in range(len(table))]
    variants = [HOSTILE if objective == "llada" else None for objective in table["objective"]]
    table = table.assign(
        run=names, variant=variants, tokenizer=HOSTILE, device=HOSTILE, git_commit=HOSTILE, data_fingerprint=HOSTILE
    )
    table = table.assign(status=["running", *table["status"][1:]], shape=[HOSTILE, HOSTILE, *table["shape"][2:]])
    source = replace(SOURCE, title=HOSTILE, table=HOSTILE, hashes={HOSTILE: "0"}, command=HOSTILE, collected=[HOSTILE])
    return report(table, fitted(table, conventions=("6nd",)), source)


def test_markup_in_names_is_text_in_the_page(hostile: Report) -> None:
    page = Page(html_page(hostile))
    assert not [tag for tag, _ in page.tags if tag in ("script", "b")]
    assert page.text.count(HOSTILE) > 50
    assert page.text.count("<script>") == page.text.count(HOSTILE)


def test_markup_in_names_is_text_in_markdown(hostile: Report) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown_page(hostile, "figures"))
    inline = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in tokens} | {child.type for child in inline}
    assert not kinds & {"html_block", "html_inline", "link_open", "code_inline", "em_open", "code_block", "fence"}
    images = [child.attrs["src"] for child in inline if child.type == "image"]
    assert images == [f"figures/{figure.name}.svg" for figure in hostile.figures]
    texts = [
        "".join(child.content for child in token.children or [] if child.type.startswith("text"))
        for token in tokens
        if token.type == "inline"
    ]
    assert sum(HOSTILE in text for text in texts) > 50
    widths = [text for text in texts if text == f"{HOSTILE} 1"]
    assert len(widths) == 1  # a name with a bar is one cell


def test_control_characters_do_not_act(whole: Report) -> None:
    found = replace(whole, source=replace(SOURCE, title="a\x1b[31m\x00b\u202ec"))
    for text in (html_page(found), markdown_page(found, "figures")):
        assert "\x1b" not in text and "\x00" not in text and "\u202e" not in text and "a␛" in text


def test_the_pages_have_the_same_content(whole: Report) -> None:
    page, tokens = Page(html_page(whole)), MarkdownIt("commonmark").enable("table").parse(markdown_page(whole, "f"))
    cells = [
        "".join(child.content for child in after.children or [])
        for token, after in pairwise(tokens)
        if token.type in ("td_open", "th_open")
    ]
    assert sorted(cells) == sorted(page.cells)
    assert len(page.cells) > 500
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    for heading in headings:
        assert heading in page.text or heading == "Verdict"


def test_a_page_without_fits_says_what_there_is() -> None:
    table = table_of_records([record("arm", "107k", 1e12, 4.0, run="a", status="running")])
    found = report(table, None, replace(SOURCE, collected=["unfinished: a (status running)"]))
    assert found.figures == [] and found.runs is None
    for text in (Page(html_page(found)).text, markdown_page(found, "f")):
        for words in (
            "No compute multiplier is measured, because no run is finished", "There is no figure", "it is not done",
            "unfinished: a (status running)", "No multiplier is shown", "No run is finished with a finite loss",
        ):  # fmt: skip
            assert words in text, words


def test_one_result_is_told_in_the_singular() -> None:
    table = table_of_records([record("arm", "107k", 9.7e8, 5.545)])
    fits = fitted(table, conventions=("6nd",))
    sentences = verdict(table, fits, "6nd")
    assert sentences[-1].startswith("Compared is 1 finished result of arm (1 budget, ")
    drawing = report(table, fits).figures[0]
    assert re.search(r"for arm to 5\.545 at [\d.e]+ FLOPs, its one budget\.$", drawing.text)


def test_limits_tell_the_sizes_of_the_models() -> None:
    table = study()
    found = limits(table, fitted(table), collected=False)
    least, most = (format_count(float(end)) for end in table["params_nonembedding"].agg(["min", "max"]))
    words = f"Models of this size ({least} to {most} non-embedding parameters) say nothing about large ones."
    assert words in found


def test_the_page_writes_flops_in_one_way_and_escapes_no_exclamation_mark(
    valleys: tuple[pd.DataFrame, StudyFits], whole: Report
) -> None:
    assert re.search(r"\d\.?\d*e\+\d", " ".join(own.words for own in valleys[1].headlines))  # as files have them
    page = markdown_page(whole, "report_files").partition("## How it was counted")[0]
    assert not re.search(r"\d\.?\d*e\\?\+\d", page) and "\\!" not in page


def test_notes_are_those_of_the_convention_that_is_shown(valleys: tuple[pd.DataFrame, StudyFits]) -> None:
    notes = ["arm, isoflop, 6nd: no fit", "arm, envelope, total: no fit at 1e+12 FLOPs", "arm: few"]
    fits = replace(valleys[1], notes=notes)
    assert notes_by(fits, "6nd") == ["arm, isoflop, 6nd: no fit", "arm: few"]
    assert notes_by(fits, "total") == ["arm, envelope, total: no fit at 1e12 FLOPs", "arm: few"]
