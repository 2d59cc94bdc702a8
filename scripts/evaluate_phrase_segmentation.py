"""Evaluate a model that segments images from phrases, by subset of the phrases, and draw examples.

    scripts/run python scripts/evaluate_phrase_segmentation.py --model runs/train_phrase_segmentation
    scripts/run python scripts/evaluate_phrase_segmentation.py --model CIDAS/clipseg-rd64-refined \
        --source VGPhraseCut_v0 --image_size 352 --choose_threshold

Writes evaluation.json, subsets.csv and examples.png into the model's folder. Scores to expect:
model_cards/phrase_segmentation.md.

The scores follow PhraseCut (Wu et al. 2020), and those with the prefix "clipseg" follow Lüddecke & Ecker 2022. Images
and masks are resized to squares, as in the latter. PhraseCut scores the original pixels, which needs --original_size.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import CLIPProcessor

from hf_dl.metrics.phrase_segmentation import PhraseCounts
from hf_dl.pipelines.phrase_segmentation import PhraseSegmentationPipeline
from hf_dl.recipes import phrase_images
from hf_dl.recipes import phrase_segmentation as recipe
from hf_dl.recipes.evaluation import make_output_folder, use_training_data, write_evaluation
from hf_dl.training.args import parse_flags


@dataclass
class Args(phrase_images.PhraseFlags):
    """Flags of this script."""

    model: str = field(
        default="runs/train_phrase_segmentation",
        metadata={"help": "Folder or Hub id of the model, or of a CLIPSeg of transformers."},
    )
    split: Literal["test", "validation", "train", "miniv"] = field(
        default="test", metadata={"help": "Split to evaluate. miniv is a part of PhraseCut only."}
    )
    choose_threshold: bool = field(
        default=False,
        metadata={"help": "Choose the threshold on the validation images, instead of using the model's threshold."},
    )
    original_size: bool = field(
        default=False,
        metadata={"help": "Score the pixels at the original size of each image, as PhraseCut does. This is slower."},
    )
    output_dir: str = field(default="", metadata={"help": "Folder for the results; default: the model's folder."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Score the images of a split, and write the results.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores of all phrases and of each subset.
    """
    args = parse_flags(Args, argv)
    use_training_data(args, args.model, phrase_images.PhraseFlags, argv)
    pipeline = PhraseSegmentationPipeline.from_pretrained(args.model)
    model = pipeline.model
    processor = CLIPProcessor(image_processor=pipeline.image_processor, tokenizer=pipeline.tokenizer)
    folder = make_output_folder(args)

    def count(split: str) -> PhraseCounts:
        if args.original_size:
            return recipe.count_original_pixels(
                pipeline, phrase_images.load_rows(args, split, size=None), args.image_size
            )
        return recipe.count_pixels(model, processor, phrase_images.load_phrases(args, split))

    if args.choose_threshold:
        model.config.threshold = recipe.scores(count("validation"))["threshold"]

    metrics = recipe.scores(count(args.split), threshold=model.config.threshold, all_subsets=True)
    recipe.write_subsets(metrics, folder)
    recipe.draw_examples(model, processor, phrase_images.load_phrases(args, args.split), folder / "examples.png")

    write_evaluation(folder, args, metrics)
    print(f"evaluation.json, subsets.csv and examples.png are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
