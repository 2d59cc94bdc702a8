"""`Trainer` of transformers with the settings of the tests."""

from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments


def make_trainer(model, rows, folder, *, tokenizer=None, **options):
    """Return a `Trainer`, or a `Seq2SeqTrainer` with its collator if there is a tokenizer, on the CPU."""
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "sgd",
        "dataloader_pin_memory": False,
        **options,
    }
    data = {"train_dataset": rows, "eval_dataset": rows}
    if tokenizer is None:
        return Trainer(model, TrainingArguments(**options), **data)
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    return Seq2SeqTrainer(model, Seq2SeqTrainingArguments(**options), data_collator=collator, **data)


def rows_of(batch):
    """Split a batch of tensors into rows."""
    return [{name: tensor[row] for name, tensor in batch.items()} for row in range(len(next(iter(batch.values()))))]


def smoothed(logits, labels, epsilon):
    """Compute the loss of Szegedy et al. 2016: cross-entropy with (1 - epsilon) one_hot(label) + epsilon / classes."""
    kept = labels != -100
    log_probs, labels = logits[kept].log_softmax(-1), labels[kept]
    truth = log_probs.gather(-1, labels[:, None])[:, 0]
    return (-(1 - epsilon) * truth - epsilon * log_probs.mean(-1)).mean()
