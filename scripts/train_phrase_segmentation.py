r"""Train a decoder that segments images from phrases, on top of a frozen CLIP.

    scripts/run accelerate launch scripts/train_clip.py
    scripts/run accelerate launch scripts/train_phrase_segmentation.py
    scripts/run accelerate launch scripts/train_phrase_segmentation.py --source VGPhraseCut_v0 --image_size 352 \
        --clip openai/clip-vit-base-patch16 --decoder_type clipseg --layers 3 7 9 --learning_rate 1e-3 \
        --intermediate_size 2048 --num_train 0 --max_steps 20000 --phrases_per_image 4 --num_workers 8 \
        --mixed_precision bf16

The first command trains a small CLIP on generated scenes, and the second one a decoder for it. The third one is the
setting of Lüddecke & Ecker 2022, "Image Segmentation Using Text and Image Prompts" (CLIPSeg), for a GPU. Scores and
times of all decoders: model_cards/phrase_segmentation.md.

The published scores are from the simple head and the blocks 3, 7 and 9. The published checkpoint
CIDAS/clipseg-rd64-refined has the refined head (--refined), the blocks 3, 6 and 9, and 50000 steps.

Differences from the paper: images are resized to squares instead of cropped at random, phrases have no templates, and
the false phrases are checked against the annotation. Support images are optional (--support 1), and their weight is
drawn per phrase. The learning rate has a warmup and falls to 0 instead of 1e-4.
"""

from dataclasses import dataclass

import torch.nn.functional as F

from hf_dl.data.collate import as_is
from hf_dl.models.clip_segmenter import dice_loss
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import phrase_images
from hf_dl.recipes import phrase_segmentation as recipe
from hf_dl.recipes.clip_data import draw_for_batch
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(recipe.ModelFlags, phrase_images.PhraseFlags, recipe.SegmentationFlags, TrainingArgs):
    """Flags of this script. A batch has `batch_size` images, and `phrases_per_image` phrases of each."""

    max_steps: int = 1500
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    schedule: Schedule = "cosine"
    warmup_steps: int = 50
    max_grad_norm: float = 1.0
    eval_every: int = 500


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train a decoder, and write the model, its processor, its scores and a report to `output_dir`.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores on the validation and the test split.
    """
    args = parse_args(Args, argv)
    model, processor = recipe.make_model(args)
    data = {split: phrase_images.load_phrases(args, split) for split in ("train", "validation", "test")}
    train = data["train"]
    run = TrainingRun(args, model, train, collate=as_is, processor=processor)
    prompt_embeds = recipe.embed_phrases(model, processor.tokenizer, train.phrases)
    support = phrase_images.SupportImages(model, processor, train) if args.support else None
    for each in data.values():  # CLIP is frozen, so its tokens never change
        each.cache(model, processor, max_gb=args.cache_gb)

    def evaluate(split: str, threshold: float | None = None) -> dict[str, float]:
        with run.averaged():
            counts = recipe.count_pixels(run.unwrapped, processor, data[split])
        return recipe.scores(counts, threshold=threshold)

    latest: dict[str, float] = {}
    for batch in run:
        # Phrases c of each image, and their masks y, (phrases, height, width). False phrases have empty masks.
        draws = draw_for_batch(run, 1 + 3 * args.phrases_per_image if support else 1)
        phrases, image_index, masks = train.pick(batch, draws[:, 0], args.phrases_per_image)
        embeds = prompt_embeds[phrases]
        if support:  # some phrases become a mixture of the phrase and an object that it describes
            embeds = support.mix(embeds, phrases, draws[:, 1:].reshape(-1, 3), args.support)
        images = train.vision_inputs(batch, processor, run.device)
        output = run.model(prompt_embeds=embeds, image_index=image_index, **images)
        logits = output.logits.float()

        # Binary cross-entropy of each pixel: -y log p - (1 - y) log(1 - p), p = sigmoid(logits).
        cross_entropy = F.binary_cross_entropy_with_logits(logits, masks)

        # Dice loss of each mask: 1 - (2 sum(p y) + 1) / (sum(p) + sum(y) + 1).
        dice = dice_loss(logits, masks)

        loss = cross_entropy + args.dice_weight * dice
        run.step(loss, cross_entropy=cross_entropy, dice=dice)

        if run.evaluation_due:  # also after the last step
            latest = evaluate("validation")
            run.log(**{f"val_{name}": value for name, value in latest.items()})

    if args.monitor:
        run.load_best()
    validation = evaluate("validation") if args.monitor or not latest else latest
    model.config.threshold = validation["threshold"]  # the test images have no influence on it
    found = {f"val_{name}": value for name, value in validation.items()}
    found |= {f"test_{name}": value for name, value in evaluate("test", model.config.threshold).items()}
    if run.is_main:
        with run.averaged():
            recipe.draw_examples(run.unwrapped, processor, data["test"], run.folder / "examples.png")
    metrics = run.finish(found)
    if run.is_main:
        recipe.write_report(run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
