"""Evaluate an image captioner: BLEU, ROUGE-L and CIDEr-D, and for generated scenes the objects of its captions.

    scripts/run python scripts/evaluate_captioner.py --model runs/train_captioner --num_beams 1 3

The model reads its own words, as it does for new images. For generated scenes, the captions are parsed: attributes,
relations and hallucinated objects are counted. With attention, the pointing game tests whether the attention of each
word falls on its object. Evaluation takes about 20 seconds per beam size on one CPU core. The script writes
captions.png and evaluation.json into the folder of the model.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import AutoProcessor

from hf_dl.models.image_captioner import ImageCaptionerForConditionalGeneration
from hf_dl.recipes import captioner
from hf_dl.recipes.evaluation import load_model, make_output_folder, use_training_data, write_evaluation
from hf_dl.training.args import parse_flags


@dataclass
class Args(captioner.CaptionFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_captioner", metadata={"help": "Folder or Hub id of the model."})
    split: Literal["train", "validation", "test"] = field(default="test", metadata={"help": "Split to evaluate on."})
    num_beams: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Beam sizes; 1 is greedy search. Each size is scored."}
    )
    num_pictures: int = field(default=4, metadata={"help": "Number of images in captions.png. 0 draws none."})
    output_dir: str = field(
        default="", metadata={"help": "Folder for the results. Defaults to the folder of the model."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate a captioner and write the results.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores, with keys such as `test_bleu_4`. Larger beams add their size: `test_bleu_4_beam_3`.

    Raises:
        ValueError: If the model cannot be loaded, or a beam size or the number of pictures is too small.
    """
    args = parse_flags(Args, argv)
    if not args.num_beams or min(args.num_beams) < 1:
        raise ValueError(f"num_beams={args.num_beams} must be numbers of at least 1.")
    if args.num_pictures < 0:
        raise ValueError(f"num_pictures={args.num_pictures} must be at least 0. 0 draws none.")
    use_training_data(args, args.model, captioner.CaptionFlags, argv)
    model = load_model(ImageCaptionerForConditionalGeneration, args.model).eval()
    processor = load_model(AutoProcessor, args.model)
    args.image_size = model.config.image_size
    folder = make_output_folder(args)
    data = captioner.load_data(args, args.split)

    prefix = next(prefix for prefix, split in captioner.SPLITS.items() if split == args.split)
    metrics = {f"{prefix}_loss": captioner.caption_loss(model, processor, data)}
    for beams in args.num_beams:
        scores = captioner.evaluate(model, processor, data, num_beams=beams)
        suffix = f"_beam_{beams}" if beams > 1 else ""
        metrics |= {f"{prefix}_{name}{suffix}": value for name, value in scores.items()}
    metrics |= captioner.chance_scores(prefix, data)

    if args.num_pictures:
        path = folder / "captions.png"
        captioner.draw_captions(model, processor, data, path, count=args.num_pictures)
        print(f"pictures  {path}")
    write_evaluation(folder, args, metrics)
    return metrics


if __name__ == "__main__":
    main()
