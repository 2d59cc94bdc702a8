"""Evaluate a variational autoencoder of images in all conventions, and draw reconstructions and new images.

    scripts/run python scripts/evaluate_vae.py --model runs/train_vae --source synthetic

Takes about a minute on two cores. Writes reconstructions.png, samples.png, interpolations.png, latent_map.png and
evaluation.json into the model's folder. Scores to expect: model_cards/vae.md.
"""

import sys
from dataclasses import dataclass, field

from torch.utils.data import DataLoader

from hf_dl.data.collate import as_is
from hf_dl.metrics.latents import posterior_collapse
from hf_dl.models.image_vae import ImageVaeModel
from hf_dl.recipes import vae
from hf_dl.recipes.evaluation import load_model, make_output_folder, use_training_data, write_evaluation
from hf_dl.training.args import parse_flags


@dataclass
class Args(vae.ImageFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_vae", metadata={"help": "Folder or Hub id of the model."})
    importance_samples: int = field(
        default=50, metadata={"help": "Codes K per image for the importance-weighted bound; 0: no bound."}
    )
    output_dir: str = field(default="", metadata={"help": "Folder for the results; default: the model's folder."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Score training and test images, draw figures, and write the results."""
    args = parse_flags(Args, argv)
    use_training_data(args, args.model, vae.ImageFlags, argv)
    model = load_model(ImageVaeModel, args.model)
    folder = make_output_folder(args)
    args.image_size, args.num_channels = model.config.image_size, model.config.num_channels
    train, test = vae.load_images(args, "train"), vae.load_images(args, "test")

    metrics = {}
    for split, data in (("train", vae.first_images(train, test)), ("test", test)):
        batches = DataLoader(data, 250, collate_fn=as_is)
        scores = vae.evaluate(model, batches, importance_samples=args.importance_samples)
        metrics |= {f"{split}_{name}": value for name, value in scores.items()}
    vae.draw(model, test, folder)

    write_evaluation(folder, args, metrics)
    if warning := posterior_collapse(int(metrics["test_active_units"]), model.config.latent_size):
        print(warning, file=sys.stderr)
    print(f"The pictures and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
