"""Evaluate the autoencoder for latent diffusion: the error of its reconstructions and the scale of its latents.

    scripts/run python scripts/evaluate_autoencoder.py --model runs/train_autoencoder

Takes less than a minute on two cores. The model is an `AutoencoderKL` or a `VQModel` of diffusers. Writes
reconstructions.png and evaluation.json into its folder.
"""

from dataclasses import dataclass, field

from torch.utils.data import DataLoader

from hf_dl.data.collate import as_is
from hf_dl.metrics import perceptual
from hf_dl.recipes import latent_autoencoder
from hf_dl.recipes.evaluation import make_output_folder, use_training_data, write_evaluation
from hf_dl.recipes.scene_images import SceneFlags, load_images
from hf_dl.training.args import parse_flags


@dataclass
class Args(SceneFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_autoencoder", metadata={"help": "Folder or Hub id of the autoencoder."})
    output_dir: str = field(default="", metadata={"help": "Folder for the results; default: the model's folder."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Score the reconstructions of the test images, and write the results."""
    args = parse_flags(Args, argv)
    use_training_data(args, args.model, SceneFlags, argv)
    autoencoder = latent_autoencoder.load_autoencoder(args.model)
    folder = make_output_folder(args)
    args.image_size = autoencoder.config.sample_size
    test = load_images(args, "test")

    model, distance = latent_autoencoder.LatentAutoencoder(autoencoder), perceptual.load("random")
    scores = latent_autoencoder.evaluate(model, DataLoader(test, 50, collate_fn=as_is), distance)
    metrics = {f"test_{name}": value for name, value in scores.items()}
    metrics |= latent_autoencoder.draw_and_measure(autoencoder, test, folder)

    write_evaluation(folder, args, metrics)
    print(f"reconstructions.png and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
