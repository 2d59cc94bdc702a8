"""Train a slot autoencoder, which finds the objects of images by itself.

scripts/run accelerate launch scripts/train_slots.py
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent))  # evaluate_slots is found also when a test imports this file
import evaluate_slots as slots

from hf_dl.data.collate import as_is
from hf_dl.metrics.binding import failure_to_bind
from hf_dl.models.slot_autoencoder import SlotAutoencoderModel, SlotImageProcessor
from hf_dl.models.slot_config import ARCHITECTURES
from hf_dl.training.args import TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(slots.SlotData, TrainingArgs):
    """Flags of this script; the defaults are the run that two CPU cores end within five minutes."""

    architecture: Literal["small", "paper", "resnet18"] = field(default="small", metadata={"help": "Kind of network."})
    num_slots: int = field(default=5, metadata={"help": "Slots K: most objects, and one for the background."})
    num_iterations: int = field(default=3, metadata={"help": "Iterations T of slot attention."})
    area_penalty: float = field(default=6e-3, metadata={"help": "Price that all masks but the largest rise to."})
    binding_step: int = field(default=800, metadata={"help": "Step at which slots must have bound; 0: no check."})
    max_restarts: int = field(default=3, metadata={"help": "Fresh starts after slots that did not bind."})
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
        sizes = {"image_size": self.image_size, "num_slots": self.num_slots, "num_iterations": self.num_iterations}
        self.config = slots.checked(ARCHITECTURES[self.architecture], **sizes)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate on the test split, and leave model, report and pictures in `output_dir`."""
    args = parse_args(Args, argv)
    train, validation, test = (slots.load_images(args, split) for split in ("train", "validation", "test"))
    processor = SlotImageProcessor(size={"height": args.image_size, "width": args.image_size})
    run = TrainingRun(args, SlotAutoencoderModel(args.config), train, collate=as_is, processor=processor)
    validation_batches, test_batches = run.shard(validation, 64), run.shard(test, 64)

    for batch in run:
        output = run.model(slots.to_pixel_values(batch["image"], run.device), generator=run.generator)
        # Several slots paint the ground as well as one. Once they have bound, all but the largest mask cost a little.
        rest = 1 - output.masks.mean(dim=(2, 3)).amax(dim=1).mean()
        weight = args.area_penalty * min(1.0, max(0.0, (run.progress - 0.4) / 0.2))
        run.step(output.loss + weight * rest, mse=output.loss)
        if run.due(args.eval_every) or (run.due(args.binding_step) and run.steps == args.binding_step):
            with run.averaged():
                scores, masks = slots.evaluate(run.model, validation_batches, gather=run.gather)
            run.log(**{f"val_{name}": scores[name] for name in slots.WATCHED})
            if run.steps == args.binding_step and run.restarts < args.max_restarts:
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
