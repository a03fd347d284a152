"""The documents stay short, no link is dead, and every file that they name is there."""

import re
from pathlib import Path

import pytest

import report
from commands import CODE, COMPARISON, DOCUMENTS, LOG, README, files
from comparison.pictures import FIGURES
from conftest import ROOT
from results.ablation import ablation_table, read_costs
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


# --- numbers: each from kept rows, or from one run ---

SHOWN = [  # the reports of kept rows that a document shows, and what each prints and draws
    (document, command, path, metric or "test/exact_match")
    for document in (README, LOG, ROOT / "docs" / "tasks.md")
    for command, path, metric in re.findall(
        r"python src/report\.py (\w+) (report/results/\S+?)(?: --(?:metric|costs) (\S+))?(?: --output|[`\n])",
        document.read_text(),
    )
]
TABLES = {
    "tables": lambda path, metric: summary_table(read_summaries(path), metric),
    "ablation": lambda path, cost: ablation_table(read_costs(path), costs=[cost]),
}


@pytest.mark.parametrize(("document", "command", "path", "metric"), [shown for shown in SHOWN if shown[1] in TABLES])
def test_a_table_of_kept_rows_is_as_its_command_prints_it(document, command, path, metric):
    assert TABLES[command](ROOT / path, metric) in document.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("document", "command", "path"), [shown[:3] for shown in SHOWN if shown[1] != "tables"])
def test_a_figure_of_kept_rows_is_drawn_by_its_command(document, command, path, tmp_path):
    report.main([command, str(ROOT / path), "--output", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").stat().st_size > 10_000


def test_the_kept_curves_are_those_of_the_sweeps_named_beside_them():
    runs = read_runs(ROOT / "report/results/parity.csv.gz").groupby("optimizer").run.nunique()
    assert runs.to_dict() == {"adam": 3, "pattern_search": 10, "pattern_search_nodes": 10}


def test_all_that_is_kept_is_shown_and_every_figure_has_its_command():
    kept = {path.relative_to(ROOT).as_posix() for path in (ROOT / "report" / "results").iterdir()}
    text = LOG.read_text() + COMPARISON.read_text()
    drawn = set(re.findall(r"python src/(?:report|benchmark)\.py .*--output (report/\S+)\n", text))
    compared = set()
    for name in set(re.findall(r"python src/report\.py compare report/(\w+)\.yaml", text)):
        compared |= {f"report/results/{name}.csv", f"report/results/{name}_curves.csv.gz"}
        drawn |= {f"report/{name}_{figure}.png" for figure in FIGURES}
    assert kept == {path for _, _, path, _ in SHOWN} | compared
    assert drawn == {path.relative_to(ROOT).as_posix() for path in (ROOT / "report").glob("*.png")}


def test_the_log_is_short_and_its_numbers_stand_in_tables_of_kept_rows():
    text = LOG.read_text()
    assert len(text.splitlines()) < 250
    prose = CODE.sub("", text)
    for _, command, path, metric in SHOWN:
        prose = prose.replace(TABLES[command](ROOT / path, metric), "") if command in TABLES else prose
    assert re.findall(r"\d ?%|\d,\d{3} (?:evaluations|seconds)|\b[01]?\.\d{2,}|\b\d+ of \d+\b", prose) == []
