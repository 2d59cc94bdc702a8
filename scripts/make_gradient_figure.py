"""Draw the figure of the experiment gradient_flow: the gradient over the lag, before and after training.

    scripts/run python scripts/make_gradient_figure.py --output model_cards/gradient_flow_norms.png

It reads the runs of scripts/experiments/gradient_flow.toml with one length and one seed. The weights before training
are drawn again from the seed of the run. The script checks that their flow at a lag of 10 equals the report.
"""

from dataclasses import dataclass, field
from pathlib import Path

from hf_dl.recipes.gradient_flow import draw_experiment
from hf_dl.training.args import parse_flags


@dataclass
class Args:
    """Flags of this script."""

    output: str = field(default="gradient_flow_norms.png", metadata={"help": "Picture to write."})
    report: str = field(
        default=str(Path(__file__).parents[1] / "model_cards" / "gradient_flow.json"),
        metadata={"help": "Report of the experiment, which names the runs."},
    )
    length: int = field(default=100, metadata={"help": "Length of the sequences."})
    seed: int = field(default=0, metadata={"help": "Seed of the runs."})


def main(argv: list[str] | None = None) -> None:
    """Draw the figure.

    Args:
        argv: The flags. Defaults to the command line.
    """
    args = parse_flags(Args, argv)
    draw_experiment(args.report, args.output, length=args.length, seed=args.seed)


if __name__ == "__main__":
    main()
