"""Evaluate an image classifier: scores, confusion matrix, and precision and recall per class.

    scripts/run python scripts/evaluate_classifier.py --model runs/train_classifier

Evaluation takes a few seconds on two CPU cores. The script writes evaluation.json, classes.csv and confusion.png into
the folder of the model, and the scores should match the test scores in its model card. `--model` is the folder or Hub
id of any `AutoModelForImageClassification` with the classes of the data. By default, the data is the data of the
training run. In `classes.csv`, "mistaken for" is the class that was predicted most often for the wrong images of a
class.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_dl.data.collate import as_is
from hf_dl.recipes import classifier
from hf_dl.recipes.evaluation import load_model, make_output_folder, use_training_data, write_evaluation
from hf_dl.training.args import parse_flags


@dataclass
class Args(classifier.ImageFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_classifier", metadata={"help": "Folder or Hub id of the model."})
    split: Literal["train", "validation", "test"] = field(default="test", metadata={"help": "Split to evaluate on."})
    output_dir: str = field(
        default="", metadata={"help": "Folder for the results. Defaults to the folder of the model."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate a classifier and write the results.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores, with keys such as `test_accuracy`.

    Raises:
        ValueError: If the classes of the data are not the classes of the model.
    """
    args = parse_flags(Args, argv)
    use_training_data(args, args.model, classifier.ImageFlags, argv)
    model = load_model(AutoModelForImageClassification, args.model)
    processor = load_model(AutoImageProcessor, args.model)
    folder = make_output_folder(args)

    args.image_size = getattr(model.config, "image_size", args.image_size)
    data = classifier.load_images(args, args.split)
    known = [model.config.id2label[label] for label in range(model.config.num_labels)]
    if known != data.names:
        raise ValueError(
            f"source={args.source!r} has {len(data.names)} classes ({', '.join(data.names[:3])}, ...), but the model "
            f"has {len(known)} classes ({', '.join(known[:3])}, ...). Use data with the classes of the model."
        )

    batches = DataLoader(data, classifier.BATCH_SIZE, collate_fn=as_is)
    scores, confusion = classifier.evaluate(model, batches, processor)
    prefix = "val" if args.split == "validation" else args.split
    metrics = {f"{prefix}_{name}": value for name, value in scores.items()}

    classifier.write_classes(confusion, data.names, folder)
    write_evaluation(folder, args, metrics)
    print(f"confusion.png, classes.csv and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
