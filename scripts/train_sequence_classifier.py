"""Train a recurrent network that labels sequences: one label per text, per frame of a video, or per letter to write.

    scripts/run accelerate launch scripts/train_sequence_classifier.py
    scripts/run accelerate launch scripts/train_sequence_classifier.py --source ag_news.csv --epochs 5
    scripts/run accelerate launch scripts/train_sequence_classifier.py --embeddings glove.txt --embedding_size 25
    scripts/run accelerate launch scripts/train_sequence_classifier.py --task frames --cell gru --epochs 15
    scripts/run accelerate launch scripts/train_sequence_classifier.py --task dates --epochs 10

The first command reads generated reviews and takes less than a minute on one core. A review is positive or negative,
and the order of its words decides. scripts/experiments/sequence_shapes.toml compares the shapes of sequence problems.
"""

from dataclasses import dataclass

from hf_dl.publishing.runs import push_run
from hf_dl.recipes import sequence_classifier
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(sequence_classifier.SequenceFlags, TrainingArgs):
    """Flags of this script. The defaults train for less than a minute on one core."""

    max_steps: int = 0
    epochs: float = 5.0
    batch_size: int = 32
    learning_rate: float = 3e-3
    schedule: Schedule = "cosine"
    max_grad_norm: float = 1.0
    eval_epochs: float = 1.0
    monitor: str = "val_accuracy"
    higher_is_better: bool = True


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train a model and write the best weights, the tokenizer, scores and a report to `output_dir`.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores of the best weights on validation and test sequences.
    """
    args = parse_args(Args, argv)
    splits = sequence_classifier.load_splits(args)
    train = splits["train"]
    model = sequence_classifier.make_model(args, train)
    known = sequence_classifier.copy_vectors(args, model, train)
    lengths = train.lengths if args.group_by_length else None
    run = TrainingRun(
        args, model, train, collate=sequence_classifier.collate, processor=train.tokenizer, lengths=lengths
    )

    for batch in run:
        output = run.model(**batch)
        run.step(output.loss)  # the mean cross-entropy over the labels, without the ones to ignore

        if run.evaluation_due:
            run.log(**sequence_classifier.evaluate_splits(run, {"val": splits["val"]}))

    if args.monitor:
        run.load_best()
    metrics = sequence_classifier.evaluate_splits(run, {split: splits[split] for split in ("val", "test")})
    metrics |= known
    metrics["test_majority_accuracy"] = sequence_classifier.majority_accuracy(splits["test"], train)
    metrics = run.finish(metrics)
    if run.is_main:
        sequence_classifier.write_report(args, run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
