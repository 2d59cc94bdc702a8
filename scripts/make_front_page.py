"""Write hf_dl/systems.json and the table of README.md from the reports in model_cards/.

scripts/run python scripts/make_front_page.py
"""

import json
import re
from pathlib import Path

from hf_dl.systems import RESULTS, read_systems, summarize
from hf_dl.training.errors import explain_errors

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- systems: made by scripts/make_front_page.py -->", "<!-- end of systems -->"


def make_results() -> dict[str, dict]:
    """Return the main result of each system, from its report."""
    return {
        system.name: summarize(system, json.loads((ROOT / f"model_cards/{system.experiment}.json").read_text()))
        for system in read_systems()
    }


def _join(text: str) -> str:
    """Keep numbers, units and signs on one line."""
    return re.sub(r"(?<!,) ", "&nbsp;", text)


def make_table(results: dict[str, dict]) -> str:
    """Return the table of the README."""
    lines = [
        "| what you can do | command | time per run | main result | card | Space | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in read_systems():
        found = results[system.name]
        cells = [
            system.title,
            f"`hf-dl {system.command}`",
            _join(found["time"]),
            f"{system.label} **{_join(found['result'])}** ({found['baseline']})",
            f"[card]({system.card})",
            f"[{system.space}](spaces/{system.space})" if system.space else "",
            f"[{system.paper}]({system.url})" if system.paper else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replace_table(readme: str, table: str) -> str:
    """Return the README with a new table between the two markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    """Write both files."""
    results = make_results()
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(replace_table(readme.read_text(encoding="utf-8"), make_table(results)), encoding="utf-8")


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
