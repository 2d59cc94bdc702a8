"""Evaluate a slot autoencoder: segmentation scores, pictures, and new images composed of known slots.

    scripts/run python scripts/evaluate_slots.py --model runs/train_slots

Takes half a minute on two cores. Writes slots.png, compositions.png, slot_library/ and evaluation.json into the
model's folder. Scores to expect: model_cards/slots_default.md.
"""

from dataclasses import dataclass, field

from torch.utils.data import DataLoader

from hf_dl.data.collate import as_is
from hf_dl.models.slot_autoencoder import SlotAutoencoderModel
from hf_dl.recipes import slots
from hf_dl.recipes.evaluation import load_model, make_output_folder, use_training_data, write_evaluation
from hf_dl.recipes.scene_images import PERCEPTUAL_HELP, SceneFlags, load_images
from hf_dl.training.args import parse_flags


@dataclass
class Args(SceneFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_slots", metadata={"help": "Folder or Hub id of the model."})
    num_slots: list[int] = field(
        default_factory=list, metadata={"help": "Numbers of slots K to try; default: as in the model's config."}
    )
    num_iterations: list[int] = field(
        default_factory=list, metadata={"help": "Numbers of iterations T to try; default: as in the model's config."}
    )
    perceptual: str = field(default="random", metadata={"help": PERCEPTUAL_HELP})
    output_dir: str = field(default="", metadata={"help": "Folder for the results; default: the model's folder."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Score the model for each number of slots and iterations, compose images, and write the results."""
    args = parse_flags(Args, argv)
    use_training_data(args, args.model, SceneFlags, argv)
    model = load_model(SlotAutoencoderModel, args.model).eval()
    folder = make_output_folder(args)
    args.image_size = model.config.image_size
    train, test = load_images(args, "train"), load_images(args, "test")

    metrics = {}
    for num_slots in args.num_slots or [model.config.num_slots]:
        for num_iterations in args.num_iterations or [model.config.num_iterations]:
            batches = DataLoader(test, 50, collate_fn=as_is)
            scores, _ = slots.evaluate(model, batches, num_slots=num_slots, num_iterations=num_iterations)
            prefix = f"k{num_slots}_t{num_iterations}_" if args.num_slots or args.num_iterations else ""
            metrics |= {f"{prefix}test_{name}": value for name, value in scores.items()}
    metrics |= slots.draw_and_compose(model, train, test, folder, measure=args.perceptual)

    write_evaluation(folder, args, metrics)
    print(f"The pictures, the slot library and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
