"""Evaluate an object detector: scores of COCO and PASCAL VOC, kinds of errors, times per stage, and pictures.

    scripts/run python scripts/evaluate_detector.py --model runs/train_detector
    scripts/run python scripts/evaluate_detector.py --model runs/train_detector --style textured

Evaluation takes about 10 seconds on one CPU core. The script writes evaluation.json, classes.csv, examples.png and
precision_recall.png into the folder of the model. `--model` is the folder or Hub id of any
`AutoModelForObjectDetection` with the classes of the data. By default, the data is the data of the training run, and
the scores should match the test scores in the model card.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import AutoImageProcessor, AutoModelForObjectDetection

from hf_dl.recipes import detection as recipe
from hf_dl.recipes import detection_report
from hf_dl.recipes.evaluation import load_model, make_output_folder, use_training_data, write_evaluation
from hf_dl.training.args import parse_flags


@dataclass
class Args(recipe.DetectionFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_detector", metadata={"help": "Folder or Hub id of the model."})
    split: Literal["train", "validation", "test"] = field(default="test", metadata={"help": "Split to evaluate on."})
    threshold: float | None = field(
        default=None,
        metadata={"help": "Lowest score of a box. Defaults to the threshold of the method, 0.001 to 0.01."},
    )
    output_dir: str = field(
        default="", metadata={"help": "Folder for the results. Defaults to the folder of the model."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate a detector and write the results.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores, with keys such as `test_map`.

    Raises:
        ValueError: If the threshold is not from 0 to 1, or the classes of the data are not the classes of the model.
    """
    args = parse_flags(Args, argv)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"threshold={args.threshold} must be from 0 to 1.")
    use_training_data(args, args.model, recipe.DetectionFlags, argv)
    model = load_model(AutoModelForObjectDetection, args.model)
    processor = load_model(AutoImageProcessor, args.model)
    folder = make_output_folder(args)

    data = recipe.DetectionImages(recipe.load_rows(args, args.split, size=recipe.scene_size(processor)), processor)
    recipe.check_classes(model, data.names, source=args.source)
    method = recipe.method_of(model)
    threshold = args.threshold if args.threshold is not None else method.score_threshold if method else 0.01
    scores, found = recipe.evaluate(
        model, processor, data, threshold=threshold, stages=method.stages if method else None
    )
    prefix = "val" if args.split == "validation" else args.split
    metrics = {f"{prefix}_{name}": value for name, value in scores.items()}

    detection_report.write_pictures(data, found, folder)
    write_evaluation(folder, args, metrics)
    print(f"examples.png, precision_recall.png, classes.csv and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
