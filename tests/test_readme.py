"""The README says what the committed results say, and its commands exist."""

import re
from pathlib import Path

from hf_dl.reporting.report import read_report
from hf_dl.reporting.tables import results_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_results_tables_are_made_from_the_committed_results():
    found = re.findall(r"<!-- results of (\S+) -->\n(.*?)\n<!-- end -->", README, re.S)
    assert len(found) == README.count("<!-- results of") > 0
    for name, table in found:
        assert table.strip() == results_table(read_report(ROOT / "model_cards" / f"{name}.json")).strip()


def test_files_that_it_names_exist():
    named = [*re.findall(r"\]\(([^)#]+)\)", README), *re.findall(r"scripts/[\w/.]+|spaces/[\w/.]+", README)]
    missing = [path for path in named if "://" not in path and not (ROOT / path).exists()]
    assert len(named) > 10 and not missing
