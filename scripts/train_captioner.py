r"""Train a model that describes images: a convolutional network and an LSTM that may attend to its feature map.

    scripts/run accelerate launch scripts/train_captioner.py
    scripts/run accelerate launch scripts/train_captioner.py --source data/coco --image_size 224 \
        --backbone timm/resnet18 --pretrained true --min_count 5
    scripts/run accelerate launch scripts/train_captioner.py --source data/coco --model runs/train_captioner \
        --learning_rate 5e-4 --output_dir runs/fine_tuned

The first command trains on generated scenes with new captions in each step. It takes eight minutes of CPU time, and
less with `--mixed_precision bf16` on a processor that has instructions for it. All scores are free-running. For
generated scenes, the captions are also parsed, and their objects, attributes and relations are compared with the
scene. scripts/experiments/captions.toml trains for longer. The second command trains on photographs. The third command
trains the model of the first one further. The words of the photographs are added to its vocabulary.
"""

from dataclasses import dataclass, field
from typing import Literal

from hf_dl.data.collate import as_is
from hf_dl.models.image_captioner import coverage_penalty
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import captioner
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(captioner.ModelFlags, captioner.CaptionFlags, TrainingArgs):
    """Flags of this script. The defaults train for about eight minutes on one CPU core."""

    captions_per_image: int = field(
        default=1, metadata={"help": "Captions per image and step. The backbone runs once for all of them."}
    )
    teacher_forcing_ratio: float = field(
        default=1.0, metadata={"help": "Probability that the decoder reads the true word, at the start."}
    )
    teacher_forcing_end: float = field(
        default=-1.0, metadata={"help": "The same at the end of the run. Below 0: no change (scheduled sampling)."}
    )
    coverage_weight: float = field(
        default=0.0, metadata={"help": "Weight of the doubly stochastic penalty of Xu et al. (1 there)."}
    )
    coverage_target: Literal["mean", "one"] = field(
        default="mean",
        metadata={"help": "Target of this penalty for each cell: words / cells, or one as in Xu et al."},
    )
    num_beams: int = field(default=1, metadata={"help": "Beam size of the test scores; 1 is greedy search."})
    max_steps: int = 2400
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    max_grad_norm: float = 5.0
    eval_every: int = 800
    log_every: int = 50

    def __post_init__(self):
        super().__post_init__()
        for flag in ("captions_per_image", "num_beams", "num_references", "min_count"):
            if getattr(self, flag) < 1:
                raise ValueError(f"{flag}={getattr(self, flag)} must be at least 1.")
        if not 0 <= self.teacher_forcing_ratio <= 1 or self.teacher_forcing_end > 1:
            raise ValueError(
                f"teacher_forcing_ratio={self.teacher_forcing_ratio} and teacher_forcing_end="
                f"{self.teacher_forcing_end} must be from 0 to 1, or below 0 for the end."
            )
        self.check_coverage()

    def check_coverage(self) -> None:
        """Check that the coverage penalty has an attention.

        Raises:
            ValueError: If the model has no attention.
        """
        if self.coverage_weight and self.conditioning not in captioner.ATTENTIONS:
            raise ValueError(
                f"coverage_weight={self.coverage_weight} needs attention, but conditioning={self.conditioning!r}."
            )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train a captioner and write its weights, scores, figures and report to `output_dir`.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores on the validation and test images, and of true captions for comparison.
    """
    args = parse_args(Args, argv)
    saved = captioner.load_saved(args)
    args.check_coverage()  # of the saved captioner, whose conditioning is known now
    # Training scenes get new captions in each step, so one reference is enough for their vocabulary.
    data = {"train": captioner.load_data(args, "train", num_references=1)}
    data |= {prefix: captioner.load_data(args, captioner.SPLITS[prefix]) for prefix in ("val", "test")}
    processor = captioner.make_processor(args, data["train"], saved)
    model = captioner.make_model(args, processor, saved)
    run = TrainingRun(args, model, data["train"], collate=as_is, processor=processor)

    # Teacher forcing: the decoder reads the true word with this probability, and its own prediction otherwise. The
    # probability changes linearly over the run.
    first, last = args.teacher_forcing_ratio, args.teacher_forcing_end
    last = first if last < 0 else last

    for batch in run:
        seed = args.seed * 1_000_003 + run.steps
        texts = data["train"].draw_captions(batch["index"], args.captions_per_image, seed=seed)
        labels = processor.make_labels(texts, max_length=captioner.longest(model)).to(run.device)
        output = run.model(
            captioner.to_pixel_values(batch["image"], processor, run.device),
            labels=labels,
            teacher_forcing_ratio=first + run.progress * (last - first),
            output_attentions=args.coverage_weight > 0,
        )
        loss = output.loss  # the mean of -log P(word) over the words of the captions
        logged = {"cross_entropy": output.loss.detach()}
        if args.coverage_weight:
            coverage = coverage_penalty(output.cross_attentions[0], labels, target=args.coverage_target)
            loss, logged = loss + args.coverage_weight * coverage, {**logged, "coverage": coverage.detach()}
        run.step(loss, **logged)

        if run.due(args.eval_every):
            run.log(**captioner.watch(run, processor, {"val": data["val"]}, complete=False))

    if args.monitor:
        run.load_best()
    metrics = captioner.watch(run, processor, {"val": data["val"]})
    metrics |= captioner.watch(run, processor, {"test": data["test"]}, num_beams=args.num_beams)
    metrics |= captioner.chance_scores("test", data["test"])
    metrics = run.finish(metrics | {"vocab_size": len(processor.tokenizer)})
    if run.is_main:
        captioner.draw_captions(run.unwrapped.eval(), processor, data["test"], run.folder / "captions.png")
        captioner.write_report(run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
