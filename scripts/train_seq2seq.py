r"""Train a model that reads a math word problem and writes the program that solves it.

    scripts/run accelerate launch scripts/train_seq2seq.py
    scripts/run accelerate launch scripts/train_seq2seq.py --source data/mathqa --subset course \
        --model bert --epochs 10

The first command trains on generated problems. It takes about four minutes on one CPU core, and
model_cards/seq2seq_default.md lists the scores to expect. Test problems with seen templates, with unseen templates and
with new situations are scored separately. The second command trains one of the models that
model_cards/seq2seq_architectures.md compares on MathQA.
"""

from dataclasses import dataclass, field

from torch.utils.data import Subset

from hf_dl.data.collate import as_is
from hf_dl.pipelines.math_program import MathProgramPipeline
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import seq2seq, seq2seq_evaluation
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(seq2seq.ModelFlags, seq2seq.DecodingFlags, seq2seq.ProblemFlags, TrainingArgs):
    """Flags of this script. The defaults train for a few minutes on one CPU core."""

    eval_train: int = field(
        default=1000, metadata={"help": "Number of training problems whose loss is computed after each epoch."}
    )
    max_steps: int = 0
    epochs: float = 5.0
    batch_size: int = 32
    optimizer: str = "adam"
    learning_rate: float = 5e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    eval_epochs: float = 1.0
    monitor: str = "val_execution_accuracy"
    higher_is_better: bool = True
    patience: int = 5


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train a model and write the best weights, their scores, the predictions and a report to `output_dir`.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores of the best epoch on the validation and test splits, and of two baselines on the test splits.
    """
    args = parse_args(Args, argv)
    data = seq2seq.load_splits(args)
    tokenizers = seq2seq.make_tokenizers(args, data["train"])
    pipeline = MathProgramPipeline(seq2seq.make_model(args, tokenizers), tokenizers.problems)
    examples = {
        split: seq2seq.Examples(problems, pipeline, tokenizers.symbols, trainable=split == "train")
        for split, problems in data.items()
    }
    train = examples["train"]
    run = TrainingRun(
        args,
        pipeline.model,
        train,
        collate=as_is,
        processor=tokenizers,
        lengths=train.lengths,  # a batch has programs of similar length, which saves padding
        learning_rates={"encoder.": args.encoder_learning_rate} if args.encoder_learning_rate else None,
    )
    scored = examples | {"train": Subset(train, range(min(args.eval_train, len(train))))}
    loaders = {split: run.shard(part, seq2seq.BATCH_SIZE) for split, part in scored.items()}

    # Teacher forcing: in training, the decoder reads the correct previous token with this probability, and its own
    # prediction otherwise. The probability changes linearly over the run, from `first_ratio` to `last_ratio`.
    first_ratio = args.teacher_forcing_ratio
    last_ratio = first_ratio if args.teacher_forcing_end < 0 else args.teacher_forcing_end

    for batch in run:
        ratio = first_ratio + run.progress * (last_ratio - first_ratio)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        output = run.model(**inputs, teacher_forcing_ratio=ratio)
        run.step(output.loss, teacher_forcing=ratio)  # the loss is the mean of -log P(token) over the program tokens

        if run.evaluation_due:
            run.log(**seq2seq_evaluation.watch(run, pipeline, loaders, data))

    if args.monitor:
        run.load_best()
    metrics = seq2seq_evaluation.watch(run, pipeline, loaders, data)
    seen = seq2seq_evaluation.find_seen(data["train"], data["val"])
    metrics |= seq2seq_evaluation.problem_counts("val_", seen)
    for split in [name for name in data if name not in ("train", "val")]:
        metrics |= seq2seq_evaluation.evaluate_test_split(run, pipeline, loaders[split], data, split)
    metrics = run.finish(metrics)
    if run.is_main:
        seq2seq_evaluation.write_report(run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
