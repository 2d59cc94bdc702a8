r"""Train a recurrent language model with a choice of output layers.

    scripts/run accelerate launch scripts/train_language_model.py
    scripts/run accelerate launch scripts/train_language_model.py --head hierarchical:huffman --sparse true \
        --source Salesforce/wikitext --config wikitext-2-v1
    scripts/run accelerate launch scripts/train_language_model.py --level char --source shakespeare.txt --cell gru \
        --num_hidden_layers 2 --window 50 --batch_size 50 --epochs 4

The first command trains on generated documents and takes a few minutes on two CPU cores. The report in its output
folder compares the perplexity with the perplexity of a perfect model, which is known for generated text. It also has
texts that the model wrote during training. Times and scores on WikiText-2, for each output layer, are in
model_cards/word_lm.md. scripts/experiments/char_rnn.toml compares the recurrent cells on characters.
"""

from dataclasses import dataclass, field

from hf_dl.data.text import TokenStream, encode
from hf_dl.models.layers_heads import make_optimizers
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import language_model
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(language_model.ModelFlags, language_model.TextFlags, TrainingArgs):
    """Flags of this script. The defaults train for a few minutes on two CPU cores."""

    max_steps: int = 0
    epochs: float = 1.0
    batch_size: int = field(
        default=32, metadata={"help": "Number of tracks that the text is cut into, for all processes together."}
    )
    learning_rate: float = 4e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 50
    eval_epochs: float = 0.5
    monitor: str = "val_loss"


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train a language model and write the best model, its tokenizer, its scores and a report to `output_dir`.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores of the best weights on the training, validation and test text.
    """
    args = parse_args(Args, argv)
    data, tokenizer = language_model.load_splits(args)
    ids = {split: encode(rows, tokenizer) for split, rows in data.items()}
    train = TokenStream(ids["train"], rows=args.batch_size, length=args.window, drop_rest=True)
    streams = language_model.make_streams(args, ids)

    # TrainingRun cannot count the epochs of a stream, which has no length, so they are converted to steps here.
    args.max_steps = args.max_steps or max(1, round(args.epochs * train.windows))
    args.eval_every = max(1, round(args.eval_epochs * train.windows)) if args.eval_epochs else args.eval_every
    args.epochs = args.eval_epochs = 0.0

    def optimizers(model):
        """Make AdamW for the dense gradients and SparseAdam for the sparse ones."""
        betas = (args.momentum, args.beta2)
        return make_optimizers(model, learning_rate=args.learning_rate, weight_decay=args.weight_decay, betas=betas)

    model = language_model.make_model(args, train, len(tokenizer))
    run = TrainingRun(args, model, train, processor=tokenizer, make_optimizers=optimizers if args.sparse else None)
    pace = language_model.Pace(run.device)
    samples = language_model.sample_steps(args.max_steps, args.samples)

    for batch in run:
        with pace.step(batch["input_ids"].numel()):
            # Truncated backpropagation through time: the state continues from the last window, without its gradient.
            state = None if batch["begins"].all() else tuple(run.carried[k] for k in "hc" if k in run.carried)

            # head=gumbel adds noise whose temperature falls from 1 to args.temperature. Other heads ignore it.
            temperature = 1 + (args.temperature - 1) * run.progress
            noise = {"temperature": temperature, "generator": run.generator}
            output = run.model(batch["input_ids"], state=state, shift_labels=batch["shift_labels"], **noise)

            run.step(output.loss, temperature=temperature)  # the mean of -log P(next token) over the batch
            run.carried = dict(zip("hc", (values.detach() for values in output.state), strict=False))  # c of an LSTM

        if run.steps in samples and run.is_main:
            language_model.write_sample(run, tokenizer, args.sample_tokens)
        if run.evaluation_due:
            run.log(**language_model.evaluate_splits(run, {"val": streams["val"]}))

    if args.monitor:
        run.load_best()
    metrics = language_model.evaluate_splits(run, streams)
    metrics |= {**pace.scores(args.level), "vocab_size": len(tokenizer)}
    for split in ("val", "test"):
        metrics |= language_model.perplexity_floor(split, data[split], tokenizer)
    metrics = run.finish(metrics)
    if run.is_main:
        language_model.write_report(run.folder, args.level)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
