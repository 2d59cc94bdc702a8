"""Write the tables of the case studies from LeNet-5 to ResNet-152, and the errata of the lecture, in Markdown.

    scripts/run python scripts/make_case_study_tables.py --output tables.md

All numbers are computed from the layers of the networks, without their weights. It takes 20 seconds.
"""

from dataclasses import dataclass, field
from pathlib import Path

from hf_dl.recipes.case_studies import write_tables
from hf_dl.training.args import parse_flags


@dataclass
class Args:
    """Flags of this script."""

    output: str = field(default="", metadata={"help": "File to write. By default, the tables are printed."})
    experiment: str = field(
        default=str(Path(__file__).parent / "experiments" / "case_studies.toml"),
        metadata={"help": "Experiment with the small networks."},
    )


def main(argv: list[str] | None = None) -> None:
    """Write the tables.

    Args:
        argv: The flags. Defaults to the command line.
    """
    args = parse_flags(Args, argv)
    text = write_tables(args.experiment)
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
