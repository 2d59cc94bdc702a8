"""Record the points of the modality gap that spaces/phrase_segmentation shows, from finished runs.

    scripts/run python scripts/run_experiment.py scripts/experiments/clip_gap.toml --jobs 2
    scripts/run python scripts/make_gap_playground.py --runs runs/clip_gap

The second command takes about 10 seconds of one core per setting. It uses all settings that have a finished run, and
writes spaces/phrase_segmentation/gap.json.
"""

import argparse
from pathlib import Path

import datasets

from hf_dl.recipes.gap_points import record_points, write_points
from hf_dl.training.errors import explain_errors


def main(argv: list[str] | None = None) -> None:
    """Record the points.

    Args:
        argv: The flags. Defaults to the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/clip_gap"), help="folder of runs of train_clip.py")
    parser.add_argument("--num_points", type=int, default=150, help="pairs of an image and a caption per setting")
    parser.add_argument(
        "--output", type=Path, default=Path("spaces/phrase_segmentation/gap.json"), help="file to write"
    )
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    path = write_points(record_points(args.runs, num_points=args.num_points), args.output)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
