"""The documents stay short, no link is dead, and every file that they name is there."""

import re
from pathlib import Path

import pytest

from commands import CODE, DOCUMENTS, README, files
from conftest import ROOT
from results.figures import draw_runs
from results.runs import read_runs
from results.tables import read_summaries, summary_table


def test_the_readme_is_read_in_one_sitting():
    assert len(README.read_bytes()) <= 12 * 1024
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_paragraphs_are_short_and_lines_fit(document):
    text = CODE.sub("", document.read_text())
    lines = [line for line in text.splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in lines if len(line) > 120] == []
    paragraphs = re.split(r"\n\n|\n(?=- |\d+\. |\|)", text)
    assert [p for p in paragraphs if not p.startswith("|") and len(p.strip().splitlines()) > 8] == []


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_no_link_is_dead(document):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", document.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or not target.is_relative_to(ROOT):
            dead.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", CODE.sub("", target.read_text()), flags=re.MULTILINE)
            dead += [link] if anchor not in map(slug, headings) else []
    assert dead == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_file_that_is_named_is_there(document):
    examples = {path for doc in DOCUMENTS for path in files(doc)}
    examples |= set(re.findall(r"^\| `(configs/\S+)` \|", README.read_text(), flags=re.MULTILINE))
    named = re.findall(r"`((?:src|configs|tests|docs|report)/[\w./]+)`", document.read_text())
    assert [path for path in named if not Path(ROOT, path).exists() and path not in examples] == []


@pytest.mark.slow
def test_the_figure_of_kept_curves_is_drawn_by_its_command(tmp_path):
    command = "python src/report.py figures report/results/parity.csv.gz --output report/parity.png"
    assert command in (ROOT / "report" / "log.md").read_text()
    table = read_runs(ROOT / "report/results/parity.csv.gz")
    assert table.groupby("optimizer").run.nunique().to_dict() == {
        "adam": 3, "pattern_search": 10, "pattern_search_nodes": 10
    }  # fmt: skip
    draw_runs(table).savefig(tmp_path / "again.png")


@pytest.mark.parametrize(
    ("document", "rows"), [("README.md", "solved"), ("report/log.md", "tuning_nodes")], ids=lambda name: Path(name).stem
)
def test_tables_of_kept_rows_are_as_their_command_prints_them(document, rows):
    kept = f"report/results/{rows}.csv"
    text = (ROOT / document).read_text()
    assert f"python src/report.py tables {kept}" in text
    assert summary_table(read_summaries(ROOT / kept)) in text
