"""Evaluate a model that segments images from phrases, by subset of the phrases, and draw examples.

    scripts/run python scripts/evaluate_phrase_segmentation.py --model runs/train_phrase_segmentation
    scripts/run python scripts/evaluate_phrase_segmentation.py --model CIDAS/clipseg-rd64-refined \
        --source VGPhraseCut_v0 --image_size 352 --choose_threshold

Writes evaluation.json, subsets.csv and examples.png into the model's folder. Scores to expect:
model_cards/phrase_segmentation.md. The images are resized to squares. Scores with the prefix "clipseg" follow Lüddecke
& Ecker 2022, and the others follow PhraseCut (Wu et al. 2020).
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import CLIPProcessor

from hf_dl.pipelines.phrase_segmentation import PhraseSegmentationPipeline
from hf_dl.recipes import phrase_segmentation as recipe
from hf_dl.recipes.evaluation import make_output_folder, use_training_data, write_evaluation
from hf_dl.training.args import parse_flags


@dataclass
class Args(recipe.PhraseFlags):
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
    output_dir: str = field(default="", metadata={"help": "Folder for the results; default: the model's folder."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Score the images of a split, and write the results.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores of all phrases and of each subset.
    """
    args = parse_flags(Args, argv)
    use_training_data(args, args.model, recipe.PhraseFlags, argv)
    pipeline = PhraseSegmentationPipeline.from_pretrained(args.model)
    model = pipeline.model
    processor = CLIPProcessor(image_processor=pipeline.image_processor, tokenizer=pipeline.tokenizer)
    folder = make_output_folder(args)
    if args.choose_threshold:
        validation = recipe.count_pixels(model, processor, recipe.load_phrases(args, "validation"))
        model.config.threshold = recipe.scores(validation)["threshold"]

    data = recipe.load_phrases(args, args.split)
    counts = recipe.count_pixels(model, processor, data)
    metrics = recipe.scores(counts, threshold=model.config.threshold, all_subsets=True)
    recipe.write_subsets(metrics, folder)
    recipe.draw_examples(model, processor, data, folder / "examples.png")

    write_evaluation(folder, args, metrics)
    print(f"evaluation.json, subsets.csv and examples.png are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
