"""Show the arithmetic of a network: sizes, parameters, multiply-adds, memory and receptive fields, with formulas.

    hf-dl arithmetic vgg16
    hf-dl arithmetic resnet50 --stages
    hf-dl arithmetic google/vit-base-patch16-224 --format markdown --chart vit.svg
    scripts/run python scripts/show_arithmetic.py --model runs/train_classifier --image_size 64

Each layer has one line and, below it, its formulas with the numbers put in. `--no_formulas` leaves them out.

- window: kernel, stride (/) and padding (+)
- saved: memory for the backward pass
- field: receptive field in pixels
- jump, offset: distance of neighboring fields, and center of the first field, in pixels

The weights of the network are not loaded. The command takes some seconds.
"""

from dataclasses import dataclass, field
from typing import Literal

from hf_dl.recipes.arithmetic import compute, draw, write
from hf_dl.training.args import parse_flags


@dataclass
class Args:
    """Flags of this script."""

    model: str = field(
        default="vgg16",
        metadata={"help": "Name of a classic network such as vgg16, or folder or Hub id of an image classifier."},
    )
    image_size: int = field(
        default=0, metadata={"help": "Height and width of the images in pixels. 0 uses the size of the model."}
    )
    batch_size: int = field(default=1, metadata={"help": "Number of images."})
    format: Literal["table", "markdown", "json"] = field(default="table", metadata={"help": "Format of the output."})
    stages: bool = field(default=False, metadata={"help": "Show one line per stage instead of one per layer."})
    formulas: bool = field(default=True, metadata={"help": "Show the formulas below each layer."})
    chart: str = field(
        default="", metadata={"help": "File for a chart of memory and parameters per layer, .svg or .png."}
    )

    def __post_init__(self):
        for name, smallest in (("image_size", 0), ("batch_size", 1)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {smallest}.")
        if self.chart and not self.chart.endswith((".svg", ".png")):
            raise ValueError(f"chart={self.chart!r} must end with .svg or .png.")


def main(argv: list[str] | None = None) -> None:
    """Print the arithmetic of a network, and draw its chart if requested.

    Args:
        argv: The flags. Defaults to the command line.
    """
    args = parse_flags(Args, argv)
    result = compute(args.model, args.image_size or None, batch_size=args.batch_size)
    print(write(result, style=args.format, stages=args.stages, formulas=args.formulas))
    if args.chart:
        draw(args.chart, result)


if __name__ == "__main__":
    main()
