"""Record the points of the modality gap that spaces/phrase_segmentation shows, from finished runs.

    scripts/run python scripts/run_experiment.py scripts/experiments/clip_gap.toml --jobs 2
    scripts/run python scripts/make_gap_playground.py --runs runs/clip_gap
    scripts/run python scripts/make_gap_playground.py --only_scores

The second command takes about 10 seconds of one core per setting. It uses all settings that have a finished run, and
writes spaces/phrase_segmentation/gap.json. The third command needs no runs: it updates the scores of this file from
model_cards/clip_gap.json, and keeps its points.
"""

import argparse
import json
from pathlib import Path

import datasets

from hf_dl.recipes.gap_points import record_points, update_scores, write_points
from hf_dl.reporting.report import read_report
from hf_dl.training.errors import explain_errors


def main(argv: list[str] | None = None) -> None:
    """Record the points, or update their scores.

    Args:
        argv: The flags. Defaults to the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/clip_gap"), help="folder of runs of train_clip.py")
    parser.add_argument("--num_points", type=int, default=150, help="pairs of an image and a caption per setting")
    parser.add_argument(
        "--output", type=Path, default=Path("spaces/phrase_segmentation/gap.json"), help="file to write"
    )
    parser.add_argument(
        "--only_scores", action="store_true", help="update the scores of the file from the report, without runs"
    )
    parser.add_argument(
        "--report", type=Path, default=Path("model_cards/clip_gap.json"), help="report of the experiment"
    )
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    if args.only_scores:
        content = update_scores(json.loads(args.output.read_text(encoding="utf-8")), read_report(args.report))
    else:
        content = record_points(args.runs, num_points=args.num_points)
    path = write_points(content, args.output)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
