"""Train a slot autoencoder, which learns to find the objects of images without labels.

    scripts/run accelerate launch scripts/train_slots.py

The default run takes about 5 minutes on two CPU cores and reaches a foreground ARI of about 0.91 on test scenes:
model_cards/slots_default.md. Slot attention is from Locatello et al. 2020, "Object-Centric Learning with Slot
Attention". The area penalty and the restarts of runs without objects are ours.
"""

from dataclasses import dataclass, field
from typing import Literal

from hf_dl.data.collate import as_is
from hf_dl.metrics.binding import failure_to_bind
from hf_dl.models.slot_autoencoder import SlotAutoencoderModel, SlotImageProcessor
from hf_dl.recipes import slots
from hf_dl.recipes.scene_images import SceneFlags, load_images, to_pixel_values
from hf_dl.training.args import TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(slots.SlotFlags, SceneFlags, TrainingArgs):
    """Flags of this script."""

    area_penalty: float = field(
        default=6e-3, metadata={"help": "Final weight of the area penalty, applied to all masks except the largest."}
    )
    binding_step: int = field(
        default=800, metadata={"help": "Step after which the slots must follow the objects; 0: no check."}
    )
    max_restarts: int = field(
        default=3, metadata={"help": "Most restarts with new weights if the check at binding_step fails."}
    )
    max_steps: int = 5000
    batch_size: int = 16
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
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
    run = TrainingRun(args, SlotAutoencoderModel(args.config), train, collate=as_is, processor=processor)
    validation_batches, test_batches = run.shard(validation, 64), run.shard(test, 64)

    for batch in run:
        pixel_values = to_pixel_values(batch["image"], run.device)  # (batch, 3, height, width), in [-1, 1]
        output = run.model(pixel_values, generator=run.generator)

        # Reconstruction error: mean of (reconstruction - pixel_values)^2 over images, channels and pixels.
        reconstruction_error = output.loss

        # Area penalty: the part of the image that all masks except the largest cover, 1 - max_k mean_xy mask_k.
        # Several slots can paint the ground as well as one slot. The penalty makes one slot cheaper. Its weight rises
        # from 0 to its final value between 40 % and 60 % of the run, after the slots have found the objects.
        areas = output.masks.mean(dim=(2, 3))  # (batch, slots)
        area_penalty = 1 - areas.amax(dim=1).mean()
        area_weight = args.area_penalty * min(1.0, max(0.0, (run.progress - 0.4) / 0.2))

        run.step(reconstruction_error + area_weight * area_penalty, mse=reconstruction_error)

        check_binding = run.due(args.binding_step) and run.steps == args.binding_step
        if run.due(args.eval_every) or check_binding:
            with run.averaged():
                scores, masks = slots.evaluate(run.model, validation_batches, gather=run.gather)
            run.log(**{f"val_{name}": scores[name] for name in slots.WATCHED})
            if check_binding and run.restarts < args.max_restarts:
                if reason := failure_to_bind(masks, explained_variance=scores["explained_variance"]):
                    run.restart(SlotAutoencoderModel(args.config), reason=reason)

    with run.averaged():
        scores, _ = slots.evaluate(run.model, test_batches, gather=run.gather)
        metrics = {f"test_{name}": value for name, value in scores.items()}
        if run.is_main:
            metrics |= slots.draw_and_compose(run.unwrapped, train, test, run.folder)
    metrics = run.finish(metrics)
    if run.is_main:
        slots.write_report(run.folder)
    return metrics


if __name__ == "__main__":
    main()
