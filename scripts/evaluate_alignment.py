"""Align the image and text embeddings of a CLIP model, and score the alignment on its own images and on new ones.

    scripts/run python scripts/evaluate_alignment.py --model runs/train_clip
    scripts/run python scripts/evaluate_alignment.py --model runs/train_clip --fit_on test

Takes about 20 seconds on one core. The second command fits the alignment on test images, to show the effect of a leak.
The accuracy then rises on the images of the fit, and not on new images. The scores are means over 50 random choices of
the pairs to fit on. hf_dl/recipes/modality.py describes them, and model_cards/clip_alignment.md compares all methods.

The script writes alignment.png, its points in points.json, and evaluation.json. With `--output_dir`, it also writes
results.json, so that it can be the script of an experiment. `--run detail=rich --seed 0` selects a run in a folder of
runs.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hf_dl.recipes import modality, zero_shot_classifier
from hf_dl.recipes.evaluation import use_training_data, write_evaluation
from hf_dl.reporting.experiment import find_run, portable, read_results
from hf_dl.training.args import given_flags, parse_flags
from hf_dl.training.provenance import write_results


@dataclass
class Args(modality.AlignmentFlags, modality.LabeledFlags):
    """Flags of this script."""

    model: str = field(
        default="runs/train_clip", metadata={"help": "Folder or Hub id of a CLIP model, or a folder of runs."}
    )
    run: str = field(
        default="",
        metadata={"help": "Flags of the run to use in a folder of runs, such as detail=rich,temperature=None."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the run, and of the choice of the pairs."})
    cpu_threads: int = field(default=0, metadata={"help": "Number of CPU threads. 0 uses the default of torch."})
    output_dir: str = field(
        default="", metadata={"help": "Folder for the results. Defaults to runs/evaluate_alignment."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Fit and score alignments of a model, and write the picture and the scores.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores, with keys such as `accuracy_20` for the alignment that was fitted on 20 pairs.
    """
    args = parse_flags(Args, argv)
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    started = time.monotonic()
    folder = find_run(args.model, args.run, args.seed) if args.run else args.model
    use_training_data(args, folder, modality.LabeledFlags, argv)
    if args.source != "synthetic" and "source" not in given_flags(argv):  # the pairs of the training run
        args.source = read_results(folder)["args"].get("zero_shot") or ""
        if not args.source:
            raise ValueError(f"model={folder!r} was not trained on scenes. Name labeled images with --source.")
    metrics, panels = modality.evaluate(*zero_shot_classifier.load_clip(folder), args)

    folder = Path(args.output_dir or "runs/evaluate_alignment")
    folder.mkdir(parents=True, exist_ok=True)
    modality.draw_pairs(panels, folder / "alignment.png")
    modality.write_points(panels, folder / "points.json")
    write_evaluation(folder, args, metrics)
    if args.output_dir:
        write_results(folder, __file__, portable(asdict(args)), metrics, seconds=time.monotonic() - started)
    print(f"alignment.png, points.json and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
