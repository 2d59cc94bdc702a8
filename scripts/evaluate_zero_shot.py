r"""Classify images with a CLIP or SigLIP model and text prompts, without training on the classes.

    scripts/run python scripts/evaluate_zero_shot.py --model runs/train_clip
    scripts/run python scripts/evaluate_zero_shot.py --model openai/clip-vit-base-patch32 --source tanganke/stl10 \
        --prompts plain photo openai photo+openai "a drawing of {a}"

Each prompt style has an accuracy. "+" joins styles and templates to an ensemble. Each pair of styles is compared on
the same images, with McNemar's exact test and a bootstrap interval. A sentence says whether a difference is noise.
`classes.csv` has the accuracy of each class. The first command takes about 15 seconds.
"""

from dataclasses import dataclass, field
from typing import Literal

from hf_dl.data import zero_shot
from hf_dl.metrics.paired import compare
from hf_dl.recipes import zero_shot_classifier
from hf_dl.recipes.evaluation import hide_progress_bars, make_output_folder, report_data, write_evaluation
from hf_dl.training.args import parse_flags


@dataclass
class Args:
    """Flags of this script."""

    model: str = field(default="runs/train_clip", metadata={"help": "Folder or Hub id of a CLIP or SigLIP model."})
    source: str = field(
        default="synthetic",
        metadata={"help": "synthetic (scenes with one object), a Hub dataset id, or a folder of labeled images."},
    )
    split: Literal["train", "validation", "test"] = field(default="test", metadata={"help": "Split to evaluate on."})
    num_images: int = field(default=0, metadata={"help": "Number of images. 0 uses all, 1600 for source=synthetic."})
    style: Literal["plain", "textured"] = field(default="plain", metadata={"help": "Look of the synthetic scenes."})
    corrupt: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"help": "Damaged images: refuse stops with an error, skip leaves them out."}
    )
    prompts: list[str] = field(
        default_factory=lambda: list(zero_shot_classifier.STYLES),
        metadata={
            "help": f"Prompt styles to compare: {', '.join(zero_shot.PROMPTS)}, or templates such as "
            "'a drawing of {a}'. Join several by + for an ensemble."
        },
    )
    confidence: float = field(default=0.95, metadata={"help": "Confidence level of the intervals and tests."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})
    output_dir: str = field(
        default="", metadata={"help": "Folder for the results. Defaults to the folder of the model."}
    )

    def __post_init__(self):
        for style in self.prompts:
            zero_shot_classifier.find_templates(style)
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise ValueError(f"prompts={self.prompts} must be different prompt styles, at least one.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence} must be between 0 and 1, such as 0.95.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate a model, and write evaluation.json and classes.csv.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores, with keys such as `test_photo_accuracy`.
    """
    args = parse_flags(Args, argv)
    model, processor, tokenizer = zero_shot_classifier.load_clip(args.model)
    folder = make_output_folder(args)
    hide_progress_bars()
    # Generated images are rendered at the size of the model. The processor resizes all others.
    size = zero_shot_classifier.scene_size(model) if args.source == "synthetic" else None
    options = {"num_images": args.num_images or None, "style": args.style, "corrupt": args.corrupt}
    data = zero_shot.load(args.split, args.source, size=size, **options)
    report_data(data, args.split)

    result = zero_shot_classifier.classify(model, processor, data, args.prompts, tokenizer=tokenizer)
    comparisons = compare(result.correct, confidence=args.confidence, seed=args.seed)
    prefix = "val" if args.split == "validation" else args.split
    metrics = {f"{prefix}_{name}": value for name, value in result.scores().items()}

    rows = zero_shot_classifier.write_classes(result, folder)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    write_evaluation(folder, args, metrics, comparisons=[each.to_dict() for each in comparisons])
    for each in comparisons:
        print(each.sentence)
    print(f"classes.csv and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
