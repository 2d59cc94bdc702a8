"""Evaluate slot diffusion: segmentation scores, images that are redrawn from their slots, edits, and compositions.

    scripts/run python scripts/evaluate_slot_diffusion.py --model runs/train_slot_diffusion

Takes a few minutes on two cores, most of them for drawing with DPM-Solver++. Writes reconstructions.png, edits.png,
compositions.png, slot_library/ and evaluation.json into the pipeline's folder. Scores to expect:
model_cards/slot_diffusion.md.
"""

from dataclasses import dataclass, field

from torch.utils.data import DataLoader

from hf_dl.data.collate import as_is
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.recipes import slot_diffusion
from hf_dl.recipes.evaluation import load_model, make_output_folder, use_training_data, write_evaluation
from hf_dl.recipes.scene_images import SceneFlags, load_images
from hf_dl.recipes.slot_denoiser import SceneLatents, SlotDenoiser
from hf_dl.training.args import parse_flags


@dataclass
class Args(slot_diffusion.DrawFlags, SceneFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_slot_diffusion", metadata={"help": "Folder or Hub id of the pipeline."})
    output_dir: str = field(default="", metadata={"help": "Folder for the results; default: the pipeline's folder."})

    def __post_init__(self):
        slot_diffusion.check_draw_flags(self)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Score the attention masks, draw images, and write the results."""
    args = parse_flags(Args, argv)
    use_training_data(args, args.model, SceneFlags, argv)
    pipe = load_model(SlotDiffusionPipeline, args.model)
    pipe.set_progress_bar_config(disable=True)
    folder = make_output_folder(args)
    args.image_size = pipe.slot_encoder.config.image_size
    train, test = load_images(args, "train"), load_images(args, "test")

    parts = (pipe.slot_encoder, pipe.unet, pipe.autoencoder, pipe.scheduler)
    model = SlotDenoiser(*parts, train_slots=not hasattr(pipe.slot_encoder, "paint"))
    batches = DataLoader(SceneLatents(test, model), 50, collate_fn=as_is)
    scores = slot_diffusion.evaluate(model, batches, pipe.scheduler)
    metrics = {f"test_{name}": value for name, value in scores.items()}
    metrics |= slot_diffusion.draw_and_measure(pipe, train, test, folder, args)

    write_evaluation(folder, args, metrics)
    print(f"The pictures, the slot library and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
