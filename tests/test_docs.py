"""The pages of docs/: their links, with anchors, lead somewhere, and the site's navigation holds all of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
PAGES = sorted({*DOCS.rglob("*.md"), *(ROOT / name for name in TRACKED if name.endswith(".md") and "/_" not in name)})
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a page, as GitHub and the site derive them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M), re.M):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading).strip().lower())
        found.add(re.sub(r"\s", "-", words))
    return found


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in LINK.findall(re.sub(r"^```.*?^```", "", text_of(path), flags=re.DOTALL | re.M)):
        if ":" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(text_of(target)), f"{link}: there is no such heading"


def test_no_document_of_docs_is_named_that_is_not_there() -> None:
    """In docstrings, messages, comments and scripts, where a name stands without a link."""
    for name in TRACKED:
        if (
            name.endswith((".py", ".yaml", ".sh", ".sbatch", ".md", ".ipynb", ".jinja", "Makefile"))
            and (ROOT / name).is_file()
        ):
            for page in re.findall(r"\bdocs/([\w-]+\.md)\b", (ROOT / name).read_text(encoding="utf-8")):
                assert (DOCS / page).exists(), f"{name} names docs/{page}"


def test_the_navigation_of_the_site_holds_every_page() -> None:
    navigation = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(navigation) == sorted([*pages, "repository/EXPERIMENTS.md"])


def test_the_table_of_the_entry_page_names_every_job() -> None:
    """Each page of the navigation's first group is in the table of docs/index.md, in the same order."""
    linked = LINK.findall(re.search(r"^\| job .*?\n\n", (DOCS / "index.md").read_text(), re.M | re.S)[0])  # type: ignore[index]
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    group = re.findall(r"^      - .+: (\S+\.md)$", text.partition("- Use:")[2].partition("\n  - ")[0], re.M)
    assert linked == group


def test_the_pins_of_the_site_are_plain() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yaml").read_text())
    assert {"mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python"} <= pins.keys()
    assert any("make docs" in str(step.get("run")) for step in workflow["jobs"]["docs"]["steps"])


def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    """Where the extra `docs` is installed: CI builds the site in any case."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    for page, text in texts.items():
        assert not re.search(r"<(?:script|img|iframe)[^>]* src=\"?https?:|<link[^>]* href=\"?https?:", text), page
    assert (tmp_path / "repository" / "experiments" / "study" / "gpu" / "scaling.png").exists()
    assert "repository/experiments/inference/sampling.png" in texts[tmp_path / "sampling.html"]
    assert "Reads a checkpoint of any kind" in texts[tmp_path / "api" / "inference.html"]
    assert ":func:" not in "".join(text for page, text in texts.items() if page.parent.name == "api")
