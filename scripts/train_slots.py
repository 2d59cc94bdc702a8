"""Train a slot autoencoder, which learns to find the objects of images without labels.

    scripts/run accelerate launch scripts/train_slots.py
    scripts/run accelerate launch scripts/train_slots.py --source photos --num_slots 7

The second command trains on a folder of images. Masks in it are only used for scores, see hf_dl.data.mask_folders. The
default run takes 6 minutes of CPU time and reaches a foreground ARI of about 0.92 on test scenes:
model_cards/slots_default.md. Slot attention is from Locatello et al. 2020, "Object-Centric Learning with Slot
Attention", and slot-centric frames are from Biza et al. 2023, "Invariant Slot Attention". The color term, the area
penalty and the restarts of runs without objects are ours.
"""

from dataclasses import dataclass, field
from typing import Literal

from hf_dl.data.collate import as_is
from hf_dl.metrics.binding import ADVICE, failure_to_bind
from hf_dl.models.slot_autoencoder import SlotAutoencoderModel, SlotImageProcessor
from hf_dl.models.slot_losses import area_penalty, color_error, matching_error, mixture_error
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import slots
from hf_dl.recipes.scene_images import SceneFlags, load_images, to_pixel_values
from hf_dl.training.args import TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(slots.SlotFlags, SceneFlags, TrainingArgs):
    """Flags of this script."""

    color_weight: float = field(
        default=0.3, metadata={"help": "Initial weight of the color term, which fades to 0 in the first half."}
    )
    area_weight: float = field(
        default=0.05, metadata={"help": "Final weight of the area penalty, in units of the variance of the pixels."}
    )
    matching_weight: float = field(
        default=0.25, metadata={"help": "Final weight of the matching term, in units of the variance of the pixels."}
    )
    mixture_weight: float = field(
        default=0.3, metadata={"help": "Weight of the mixture error, which makes the masks sharp."}
    )
    prune_from: float = field(
        default=0.6,
        metadata={"help": "Fraction of the run after which spare slots are removed in training too; 1: never."},
    )
    binding_step: int = field(
        default=800, metadata={"help": "Step after which the slots must follow the objects; 0: no check."}
    )
    max_restarts: int = field(
        default=3, metadata={"help": "Most restarts with new weights if the check at binding_step fails."}
    )
    stop_after_binding: bool = field(
        default=False, metadata={"help": "End the run at binding_step, to count how many runs find the objects."}
    )
    max_steps: int = 2800
    batch_size: int = 16
    optimizer: str = "adam"
    learning_rate: float = 2e-3
    schedule: Literal["constant", "linear", "cosine", "halving"] = "cosine"
    warmup_steps: int = 200
    max_grad_norm: float = 0.1
    eval_every: int = 1000

    def __post_init__(self):
        super().__post_init__()
        self.config = slots.make_config(self)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate on the test split, and write the model, the report and the pictures into `output_dir`."""
    args = parse_args(Args, argv)
    train, validation, test = (load_images(args, split) for split in ("train", "validation", "test"))
    processor = SlotImageProcessor(size={"height": args.image_size, "width": args.image_size})
    model = SlotAutoencoderModel(args.config)
    run = TrainingRun(args, model, train, collate=as_is, processor=processor, shown=slots.SHOWN)
    validation_batches, test_batches = run.shard(validation, 64), run.shard(test, 64)
    bound: dict[str, float] = {}  # the result of the check at binding_step, if the run ends there

    for batch in run:
        pixel_values = to_pixel_values(batch["image"], run.device)  # (batch, 3, height, width), in [-1, 1]
        output = run.model(pixel_values, prune=run.progress >= args.prune_from, generator=run.generator)

        # Reconstruction error: mean of (reconstruction - pixel_values)^2 over images, channels and pixels.
        reconstruction_error = output.loss

        # Color term: the error of the image that the attention paints with the mean color of each slot. It makes the
        # slots bind to objects, and fades to 0 in the first half of the run.
        color_weight = args.color_weight * max(0.0, 1 - run.progress / 0.5)
        color_term = color_error(output.attentions[-1], pixel_values)

        # Mixture error: negative log-likelihood of the pixels if each comes from one slot. Blending does not lower it.
        mixture_term = mixture_error(pixel_values, output.contents, output.masks, pixel_std=args.config.pixel_std)

        # The next terms have no unit. The variance of the pixels gives them the unit of the errors.
        variance = pixel_values.flatten(2).var(dim=2).mean()

        # Area penalty: sum of sqrt(mean_xy mask_k) over all masks except the largest. It gives shadows to the ground,
        # and each object to one slot. Its weight rises between 20 % and 40 % of the run.
        area_weight = args.area_weight * min(1.0, max(0.0, (run.progress - 0.2) / 0.2))
        area_term = area_penalty(output.masks)

        # Matching term: cross-entropy between the attention and the masks, which the attention learns from. Its weight
        # rises between 20 % and 50 % of the run, after the masks have found the objects.
        matching_weight = args.matching_weight * min(1.0, max(0.0, (run.progress - 0.2) / 0.3))
        matching_term = matching_error(output.attentions[-1], output.masks)

        loss = reconstruction_error + args.mixture_weight * mixture_term
        loss = loss + color_weight * color_term
        loss = loss + variance * (area_weight * area_term + matching_weight * matching_term)
        run.step(loss, mse=reconstruction_error)

        check_binding = run.due(args.binding_step) and run.steps == args.binding_step
        if run.due(args.eval_every) or check_binding:
            with run.averaged():
                scores, masks = slots.evaluate(run.model, validation_batches, gather=run.gather, num_draws=1)
            run.log(**{f"val_{name}": scores[name] for name in slots.WATCHED if name in scores})
            if check_binding:
                reason = failure_to_bind(masks, explained_variance=scores["explained_variance"])
                if args.stop_after_binding:
                    bound = {"bound": float(reason is None)}
                    break
                if reason and run.restarts < args.max_restarts:
                    run.restart(SlotAutoencoderModel(args.config), reason=f"{reason} {ADVICE}")
                elif reason:
                    run.say(f"The slots do not follow the objects: {reason} {ADVICE}")

    if args.monitor and not bound:
        run.load_best()
    with run.averaged():
        scores, _ = slots.evaluate(run.model, test_batches, gather=run.gather)
        metrics = {f"test_{name}": value for name, value in scores.items()} | bound
        if run.is_main and not bound:
            metrics |= slots.draw_and_compose(run.unwrapped, train, test, run.folder)
    metrics = run.finish(metrics)
    if run.is_main:
        slots.write_report(run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
