"""Explain an image classifier: draw the evidence in an image, and test it by masking parts of the image.

    scripts/run python scripts/explain_image.py --model runs/train_classifier
    scripts/run python scripts/explain_image.py --model google/vit-base-patch16-224 --images cat.jpg --mask_counts 16

With `--images`, the script draws one figure per image: the original, the map, the overlay and the most probable
classes. Files that cannot be read are listed and skipped. With `--mask_counts`, it masks patches and reports the
change of the predictions.

Without `--images`, the script studies validation images. It draws five correct and five wrong images for several
classes. The generated images have masks of the objects. For them it also measures the fraction of each map that is on
the object, and how often the maximum of the map is on the object. A study takes about a minute on two CPU cores.
model_cards/explain_resnet.md and model_cards/explain_vit.md list the scores to expect.

With `--methods`, it draws one page for each way to look inside the network, such as filters, patches, class models and
adversarial examples:

    scripts/run python scripts/explain_image.py --model runs/train_classifier --methods filters guided_backprop pgd

The script writes the figures and explanations.json. With `--output_dir`, a study also writes results.json, so that it
can be the script of an experiment. `--run norm=batch --seed 0` then selects the model in a folder of runs.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hf_dl.data.class_folders import is_flat
from hf_dl.recipes.classifier import ImageFlags
from hf_dl.recipes.evaluation import use_training_data
from hf_dl.recipes.explanation import Explainer, ExplanationFlags, explain_files, explain_study
from hf_dl.recipes.inside import draw_pages
from hf_dl.reporting.experiment import find_run, portable
from hf_dl.training.args import parse_flags
from hf_dl.training.provenance import write_results


@dataclass
class Args(ExplanationFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_classifier", metadata={"help": "Folder or Hub id of the classifier."})
    run: str = field(
        default="",
        metadata={"help": "Flag that selects a run, such as norm=batch, if --model is a folder of runs."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the run that --run selects."})
    cpu_threads: int = field(default=0, metadata={"help": "Number of CPU threads. 0 uses the default of torch."})
    output_dir: str = field(
        default="", metadata={"help": "Folder for the results. Defaults to runs/explain_image/<name of the model>."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Explain images and write the figures and explanations.json.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The metrics.
    """
    args = parse_flags(Args, argv)
    started = time.monotonic()
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    model = find_run(args.model, args.run, args.seed) if args.run else args.model
    explainer = Explainer(args, model)
    use_training_data(args, model, ImageFlags, argv)
    folder = Path(args.output_dir or Path("runs/explain_image") / Path(args.model).name)
    folder.mkdir(parents=True, exist_ok=True)

    named = bool(args.images) or is_flat(args.source)
    if args.methods:
        metrics, entries = draw_pages(explainer, folder)
    elif named:
        metrics, entries = explain_files(explainer, folder)
    else:
        metrics, entries = explain_study(explainer, folder)

    flags = portable(asdict(args))
    found = {"args": flags, "layers": explainer.layers, "metrics": metrics, "images": entries}
    (folder / "explanations.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if args.output_dir and not named:
        write_results(folder, __file__, flags, metrics, explainer.model, seconds=time.monotonic() - started)
    for name, value in metrics.items():
        print(f"{name:40s} {value:.4f}")
    print(f"Figures and explanations.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
