"""Fit the SVMs and the boxes of R-CNN to the feature vectors of a fine-tuned network.

    scripts/run accelerate launch scripts/train_detector.py --method rcnn --epochs 4 --output_dir runs/rcnn_network
    scripts/run python scripts/fit_rcnn.py --model runs/rcnn_network --output_dir runs/rcnn

The first command fine-tunes the network as a classifier of proposals. The second one computes the feature vectors of
all proposals once, fits a linear SVM and a box regression per class, and scores the test images. It takes a few
minutes on one CPU core, mostly for the feature vectors. The method is from Girshick et al. 2014. Scores to expect:
model_cards/detection_ladder.md.
"""

import time
from dataclasses import asdict, dataclass, field

import torch

from hf_dl.models.detection_processor import DetectionImageProcessor
from hf_dl.models.rcnn import RcnnForObjectDetection
from hf_dl.recipes import detection, detection_report, rcnn
from hf_dl.recipes.evaluation import load_model, make_output_folder, use_training_data, write_evaluation
from hf_dl.training.args import parse_flags
from hf_dl.training.provenance import write_results


@dataclass
class Args(detection.DetectionFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_detector", metadata={"help": "Folder or Hub id of the fine-tuned network."})
    seed: int = field(default=0, metadata={"help": "Seed of the solver of the SVMs."})
    output_dir: str = field(default="runs/fit_rcnn", metadata={"help": "Folder for the model and its scores."})
    cpu_threads: int = field(default=1, metadata={"help": "Number of CPU threads."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Fit, score the test images, and write the model, its scores and the pictures."""
    args = parse_flags(Args, argv)
    torch.set_num_threads(args.cpu_threads)
    use_training_data(args, args.model, detection.DetectionFlags, argv)
    model, processor = (
        load_model(RcnnForObjectDetection, args.model),
        DetectionImageProcessor.from_pretrained(args.model),
    )
    folder = make_output_folder(args)
    train, test = (
        detection.DetectionImages(detection.load_rows(args, split, size=detection.scene_size(processor)), processor)
        for split in ("train", "test")
    )
    detection.check_classes(model, train.names, source=args.source)
    begin, computed = time.monotonic(), time.process_time()

    # The loss of an SVM: |w|^2 / 2 + 0.001 * sum of weight * max(0, 1 - y (w x + b)), weight 2 for objects, else 1.
    # The boxes: |Xw - t|^2 + 1000 |w|^2, where t are the whitened codes of the boxes.
    counts = rcnn.fit(model, rcnn.cache_features(model, train), seed=args.seed)
    print(f"Fitted {counts['positives']} objects, {counts['negatives']} hard negatives and {counts['boxes']} boxes.")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

    method = detection.METHODS["rcnn"]
    scores, found = detection.evaluate(model, processor, test, threshold=method.score_threshold, stages=method.stages)
    detection_report.write_pictures(test, found, folder)
    metrics = {f"test_{name}": value for name, value in scores.items()}
    write_evaluation(folder, args, metrics)
    seconds, cpu_seconds = time.monotonic() - begin, time.process_time() - computed
    write_results(folder, __file__, asdict(args), metrics, model, seconds=seconds, cpu_seconds=cpu_seconds)
    return scores


if __name__ == "__main__":
    main()
