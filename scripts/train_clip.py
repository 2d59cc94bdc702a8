r"""Train a small CLIP model on image-caption pairs.

    scripts/run accelerate launch scripts/train_clip.py
    scripts/run accelerate launch scripts/train_clip.py --source coco/val2017 \
        --annotations coco/annotations/captions_val2017.json --zero_shot tanganke/stl10

The first command trains on generated scenes with one or two objects. Six of 32 combinations of color and shape do not
occur in the training scenes. The zero-shot accuracy on these unseen combinations is reported apart. The run takes
about six minutes of CPU time. model_cards/zero_shot.md lists the scores.

Half of the training images have other hues, and their captions lose the color words (--recolor). The model then learns
shapes apart from colors. Without it, it recognizes few of the unseen combinations.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_dl.data.collate import as_is
from hf_dl.metrics.paired import Comparison
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import clip, clip_data
from hf_dl.recipes.classifier import to_pixel_values
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.batches import seed_everything
from hf_dl.training.run import TrainingRun


@dataclass
class Args(clip.ModelFlags, clip_data.PairFlags, clip.ContrastiveFlags, TrainingArgs):
    """Flags of this script. The defaults train for a few minutes on two CPU cores."""

    max_steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    beta2: float = 0.98
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    eval_every: int = 1000


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train a CLIP model, and write the model, its processor, its scores and a report to `output_dir`.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores on the validation and the test split.
    """
    args = parse_args(Args, argv)
    pairs = {split: clip_data.load_pairs(args, split) for split in ("train", "validation", "test")}
    labeled = {split: clip_data.load_labeled(args, split) for split in ("validation", "test")}
    train = pairs["train"]
    tokenizer = clip.make_tokenizer(
        (text for texts in train.captions for text in texts), vocab_size=args.vocab_size, max_length=args.max_length
    )
    processor = clip.make_processor(train, tokenizer)
    tokens = clip_data.CaptionTokens(train.captions, tokenizer)
    seed_everything(args.seed)  # rendering the data draws random numbers, and reading it from the cache does not
    model = clip.make_model(args, tokenizer)
    # Captions of similar length in a batch: an image with one object is compared with others of one object.
    run = TrainingRun(args, model, train, collate=as_is, processor=processor, lengths=train.num_words)

    def evaluate(split: str, prefix: str) -> tuple[dict[str, float], list[Comparison]]:
        with run.averaged():
            return clip.evaluate(run.unwrapped, processor, pairs[split], labeled[split], split=prefix)

    if run.steps == 0 and args.eval_every:
        run.log(**evaluate("validation", "val")[0])  # the modality gap before training
    for batch in run:
        # Random numbers of each example: seven for its image, two for its hue and its caption, the rest for its words.
        draws = clip_data.draw_for_batch(run, 9 + args.max_length)
        recolored = draws[:, 7] < args.recolor  # images with other hues, whose captions lose the color words
        options = {"shift": args.shift, "zoom": args.zoom, "jitter": args.jitter, "recolored": recolored}
        images = clip_data.vary_images(batch["image"], draws[:, :7], **options)
        texts = tokens.pick(batch["index"].cpu(), draws[:, 8])
        texts = tokens.drop_words(texts, args.word_dropout, draws[:, 9:], recolored=recolored)

        pixel_values = to_pixel_values(images, processor.image_processor, run.device)
        texts = {name: tensor.to(run.device) for name, tensor in texts.items()}
        output = run.model(pixel_values=pixel_values, **texts)

        # Contrastive loss (Radford et al. 2021, figure 3): image i and caption i of the whole batch belong together.
        # Each process has the rows of its own images and captions, and the columns of all processes.
        images, captions = output.image_embeds.float(), output.text_embeds.float()  # of length 1
        scale = model.logit_scale.exp()  # 1 / temperature
        logits_per_image = scale * images @ clip.gather_features(captions).T
        logits_per_caption = scale * captions @ clip.gather_features(images).T
        first = run.accelerator.process_index * len(images)
        targets = torch.arange(first, first + len(images), device=run.device)
        loss = (F.cross_entropy(logits_per_image, targets) + F.cross_entropy(logits_per_caption, targets)) / 2
        run.step(loss, temperature=1 / scale.detach())
        clip.clamp_temperature(model)

        if run.evaluation_due:
            run.log(**evaluate("validation", "val")[0])

    if args.monitor:
        run.load_best()
    validation, _ = evaluate("validation", "val")
    if "val_match_threshold" in validation:  # for hf_dl.pipelines.phrase_matching; the test images do not influence it
        model.config.match_threshold = validation["val_match_threshold"]
    test, comparisons = evaluate("test", "test")
    test |= clip.style_scores(comparisons, split="test")  # whether a difference between prompt styles is noise
    metrics = run.finish({**validation, **test}, comparisons=[each.to_dict() for each in comparisons])
    if run.is_main:
        clip.write_report(run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
