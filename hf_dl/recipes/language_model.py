"""Language modeling: the flags, data, model, evaluation and report that the scripts share.

scripts/train_language_model.py trains a recurrent language model with one of the output layers in `HEADS`, and
scripts/evaluate_language_model.py scores a saved model.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import PreTrainedTokenizerFast

from hf_dl.data import nested_text, text
from hf_dl.data.text import TokenStream, build_tokenizer, floor_perplexity
from hf_dl.models.layers_recurrent import CELLS
from hf_dl.models.recurrent_lm import RecurrentLMConfig, RecurrentLMForCausalLM
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card
from hf_dl.reporting.experiment import SAMPLES, read_samples
from hf_dl.reporting.plots import plot_run

from .evaluation import checked_config, hide_progress_bars, split_size
from .output_heads import HEADS, HeadFlags, accepted_options, split_head

SPLITS = {"train": "train", "val": "validation", "test": "test"}  # from the prefix of the metrics to the split
TREES = ("huffman", "balanced", "two_level")
SUMMARY = (
    "A recurrent language model with a choice of output layers (softmax, Gumbel, hierarchical, adaptive). It predicts "
    "the next {unit}."
)
LIMITS = ("It knows the {unit}s of its training text. All other {unit}s become the same token, <unk>.",)
CURVES = {"loss": {"training": "loss", "validation": "val_loss"}, "perplexity": {"validation": "val_perplexity"}}


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@dataclass
class TextFlags:
    """Flags that select the text, for training and for evaluation."""

    source: str = field(
        default="synthetic",
        metadata={
            "help": "synthetic (generated), nested (generated, with quotes and brackets), a Hub dataset id, or a file "
            "or folder of text or parquet."
        },
    )
    config: str = field(default="", metadata={"help": "Configuration name of a Hub dataset with several of them."})
    level: Literal["word", "char"] = field(default="word", metadata={"help": "Tokens: words or characters."})
    num_train: int = field(
        default=0,
        metadata={"help": "Number of training rows. 0 uses all: 24000 for source=synthetic, 8000 for source=nested."},
    )
    num_test: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of validation rows, and of test rows. 0 uses all rows. Defaults to all, and to at "
            "most half of num_train."
        },
    )
    holdout: float = field(
        default=0.1, metadata={"help": "Fraction of the training rows that replaces a missing split."}
    )
    eval_rows: int = field(
        default=10, metadata={"help": "Number of parallel tracks that a text is cut into for evaluation."}
    )
    eval_train: int = field(
        default=100_000, metadata={"help": "Number of training tokens to score, from the start. 0 scores all."}
    )
    window: int = field(default=35, metadata={"help": "Number of tokens per step and track (truncated BPTT)."})


@dataclass
class ModelFlags(HeadFlags):
    """Flags that select the network."""

    embedding_size: int = field(default=128, metadata={"help": "Channels of the token embeddings."})
    embedding_range: float = field(
        default=0.1,
        metadata={"help": "Largest absolute value of the initial embeddings. For characters, 1.7 learns faster."},
    )
    cell: str = field(default="lstm", metadata={"help": f"Recurrent cell. Choose one of: {', '.join(CELLS)}."})
    hidden_size: int = field(default=128, metadata={"help": "Channels of the recurrent layers."})
    num_hidden_layers: int = field(default=1, metadata={"help": "Number of recurrent layers."})
    forget_bias: float | None = field(
        default=None, metadata={"help": "cell=lstm: initial bias of the forget gate. Defaults to a random one near 0."}
    )
    dropout: float = field(default=0.2, metadata={"help": "Dropout probability between layers."})
    tie_word_embeddings: bool = field(
        default=False, metadata={"help": "head=softmax or gumbel: share the weights of embedding and output layer."}
    )
    head: str = field(
        default="softmax",
        metadata={
            "help": f"Output layer. Choose one of: {', '.join(HEADS)}. hierarchical:TREE also sets the tree: "
            f"{', '.join(TREES)}."
        },
    )
    sparse: bool = field(
        default=False,
        metadata={"help": "Use sparse gradients and SparseAdam for the embedding and for head=hierarchical."},
    )
    max_tokens: int = field(
        default=0, metadata={"help": "Maximum size of the vocabulary. 0 keeps all tokens of the training text."}
    )
    min_count: int = field(default=1, metadata={"help": "Minimum number of occurrences of a token in the vocabulary."})
    samples: int = field(
        default=5,
        metadata={
            "help": "Number of texts for the card that the model writes during training: after the first step, the "
            "last step and steps between. 0 writes none."
        },
    )
    sample_tokens: int = field(default=200, metadata={"help": "Number of tokens per such text."})

    def __post_init__(self):
        super().__post_init__()
        for flag in ("window", "eval_rows", "min_count", "sample_tokens"):
            if getattr(self, flag) < 1:
                raise ValueError(f"{flag}={getattr(self, flag)} must be at least 1.")
        if self.samples < 0:
            raise ValueError(f"samples={self.samples} must be 0 or above.")
        if self.accumulation != 1:
            raise ValueError(
                f"accumulation={self.accumulation} must be 1, because the state continues from batch to batch."
            )
        if self.optimizer != "adamw" and self.sparse:
            raise ValueError(f"optimizer={self.optimizer!r} does not support sparse=True. Use optimizer=adamw.")
        make_config(self, vocab_size=100, class_counts=None)


def make_config(args: Any, vocab_size: int, class_counts: Sequence[int] | None) -> RecurrentLMConfig:
    """Create the config that the flags select.

    Args:
        args: Flags with the fields of `ModelFlags`.
        vocab_size: Number of tokens in the vocabulary.
        class_counts: Number of occurrences of each token in the training text, or None if unknown.

    Returns:
        The config.

    Raises:
        ValueError: If a flag has an invalid value.
    """
    name, tree = split_head(args.head)
    has_tree = "tree" in HEADS[name].option_names({})
    if tree and (not has_tree or tree not in TREES):
        use = f"{name}:TREE with a tree of: {', '.join(TREES)}" if has_tree else name
        raise ValueError(f"head={args.head!r} is unknown. Use {use}.")
    if has_tree:
        options = {"tree": tree or "huffman", "class_counts": class_counts, "sparse": args.sparse}
    else:
        options = accepted_options(
            name,
            {
                "straight_through": args.straight_through,
                "cutoffs": args.cutoffs,
                "div_value": args.div_value,
                "class_counts": class_counts,
            },
        )
    return checked_config(
        RecurrentLMConfig,
        vocab_size=vocab_size,
        embedding_size=args.embedding_size,
        embedding_range=args.embedding_range,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        cell=args.cell,
        forget_bias=args.forget_bias,
        dropout=args.dropout,
        tie_word_embeddings=args.tie_word_embeddings,
        head=name,
        head_options=options,
        sparse_embedding=args.sparse,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Data and model


def load_text(args: TextFlags, split: str) -> datasets.Dataset:
    """Load one split of the text that the flags select.

    Args:
        args: The flags.
        split: "train", "validation" or "test".

    Returns:
        Rows with the column `text`.
    """
    hide_progress_bars()
    generated = {"synthetic": text.SPLITS, "nested": nested_text.SPLITS}.get(args.source)
    count = split_size(args, split, generated and generated[split])
    options = {"config": args.config or None, "holdout": args.holdout, "num_rows": count}
    return text.load(split, args.source, level=args.level, **options)


def load_splits(args: Any) -> tuple[dict[str, datasets.Dataset], PreTrainedTokenizerFast]:
    """Load the training, validation and test text, and build the tokenizer from the training text.

    Args:
        args: Flags with the fields of `ModelFlags` and `TextFlags`.

    Returns:
        The rows by key of `SPLITS`, and the tokenizer.
    """
    data = {prefix: load_text(args, split) for prefix, split in SPLITS.items()}
    limits = {"max_tokens": args.max_tokens or None, "min_count": args.min_count}
    return data, build_tokenizer(data["train"], level=args.level, **limits)


def make_streams(args: Any, ids: Mapping[str, torch.Tensor]) -> dict[str, TokenStream]:
    """Cut the tokens of each split into the windows for evaluation.

    Args:
        args: Flags with the fields of `TextFlags`.
        ids: Token ids, int (tokens,), by key of `SPLITS`.

    Returns:
        The streams by split. The training stream has the first `eval_train` tokens.
    """
    parts = {**ids, "train": ids["train"][: args.eval_train or None]}
    return {split: TokenStream(part, rows=args.eval_rows, length=args.window) for split, part in parts.items()}


def make_model(args: Any, stream: TokenStream, vocab_size: int) -> RecurrentLMForCausalLM:
    """Create the model that the flags select.

    Args:
        args: Flags with the fields of `ModelFlags`.
        stream: The training text. Some output layers depend on the frequency of each token.
        vocab_size: Number of tokens in the vocabulary.

    Returns:
        The model.
    """
    counts = stream.ids.bincount(minlength=vocab_size).tolist()
    return RecurrentLMForCausalLM(make_config(args, vocab_size, counts))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


class Pace:
    """Measure the speed of the training steps in tokens per second, without data loading and evaluation.

    Args:
        device: Device of the model.
    """

    def __init__(self, device: torch.device):
        self.device, self.tokens, self.seconds, self.cpu_seconds = device, 0, 0.0, 0.0

    @contextlib.contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Measure one step.

        Args:
            tokens: Number of tokens in the batch.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.tokens += tokens
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu

    def scores(self, level: str) -> dict[str, float]:
        """Return the speed by wall clock and by CPU time.

        Args:
            level: "word" or "char".

        Returns:
            `words_per_second` and `words_per_cpu_second`, or the same for characters.
        """
        unit = {"word": "words", "char": "characters"}[level]
        seconds = {"second": self.seconds, "cpu_second": self.cpu_seconds}
        return {f"{unit}_per_{name}": self.tokens / value for name, value in seconds.items() if value > 0}


@torch.no_grad()
def evaluate(model: torch.nn.Module, stream: TokenStream) -> dict[str, float]:
    """Compute the loss of a language model on every token of a text.

    Args:
        model: The model. It is set to evaluation mode.
        stream: The text. Each track starts with a zero state.

    Returns:
        `loss`, the mean of -log P per token in nats; `perplexity`, exp(loss); and `tokens`, the number of tokens.
    """
    model.eval()
    device, state, total, tokens = next(model.parameters()).device, None, 0.0, 0
    for batch in stream.batches():
        labels = batch["shift_labels"].to(device)
        output = model(batch["input_ids"].to(device), state=state, shift_labels=labels, skip_logits=True)
        counted = int((labels >= 0).sum())
        state, total, tokens = output.state, total + output.loss.item() * counted, tokens + counted
    return {"loss": total / tokens, "perplexity": math.exp(min(total / tokens, 700)), "tokens": tokens}


def evaluate_splits(run: Any, streams: Mapping[str, TokenStream]) -> dict[str, float]:
    """Compute the scores of the model of a training run on several splits.

    Args:
        run: The `TrainingRun`. Its averaged weights are used if it has them.
        streams: The text of each split.

    Returns:
        The scores, with keys such as `val_perplexity`.
    """
    metrics = {}
    with run.averaged():
        for split, stream in streams.items():
            metrics |= {f"{split}_{name}": value for name, value in evaluate(run.unwrapped, stream).items()}
    return metrics


def perplexity_floor(prefix: str, data: datasets.Dataset, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Return the perplexity of a perfect model as a metric, or no metric if it is unknown.

    Args:
        prefix: Prefix of the metric, a key of `SPLITS`.
        data: The rows. Only generated text has a known floor.
        tokenizer: The tokenizer of the model.

    Returns:
        `{prefix}_perplexity_floor`, or an empty dict.
    """
    floor = floor_perplexity(data, tokenizer)
    return {} if floor is None else {f"{prefix}_perplexity_floor": floor}


def encode_characters(tokenizer: PreTrainedTokenizerFast, text: str, *, name: str = "prompt") -> list[int]:
    """Convert a text to one token per character.

    Args:
        tokenizer: Tokenizer of a model of characters. "<unk>" is five characters here.
        text: The text.
        name: Name of the text in the error.

    Returns:
        The token ids.

    Raises:
        ValueError: If the training text of the tokenizer does not have one of the characters.
    """
    ids = tokenizer.convert_tokens_to_ids(list(text))
    if tokenizer.unk_token_id in ids:
        unknown = {letter for letter, token in zip(text, ids, strict=True) if token == tokenizer.unk_token_id}
        shown = ", ".join(map(repr, sorted(unknown)[:10])) + (", ..." if len(unknown) > 10 else "")
        raise ValueError(f"{name} has characters that the training text does not have: {shown}. Remove them.")
    return ids


def generate(
    model: RecurrentLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> str:
    """Continue a prompt with tokens sampled from the model. The global random state does not change.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: Start of the text; "" starts a new document.
        max_new_tokens: Number of tokens to sample.
        seed: Seed of the samples.
        temperature: Divides the log-probabilities. Below 1 prefers probable tokens; 0 takes the most probable one.
        top_k: Sample from this number of most probable tokens. 0 for all tokens.
        top_p: Sample from the most probable tokens whose probabilities sum up to this value. 1 for all tokens.

    Returns:
        The prompt and its continuation.

    Raises:
        ValueError: If an option is out of range, or a model of characters does not know one of the prompt.
    """
    for name, value, valid, range_ in (
        ("temperature", temperature, temperature >= 0, "0 or above"),
        ("top_k", top_k, top_k >= 0, "0 or above"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not valid:
            raise ValueError(f"{name}={value} must be {range_}.")
    characters = tokenizer.eos_token != "<eos>"
    ids = (
        encode_characters(tokenizer, prompt)
        if characters
        else tokenizer(prompt, add_special_tokens=False)["input_ids"]
    )
    inputs = torch.tensor([[tokenizer.bos_token_id, *ids]], device=model.device)
    choice = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            eos_token_id=None,
            suppress_tokens=[tokenizer.unk_token_id] if characters else None,
            **(choice if temperature else {"do_sample": False}),
        )
    return tokenizer.decode(written[0, 1:])


# ---------------------------------------------------------------------------------------------------------------------
# Texts from several steps of training


def sample_steps(total: int, count: int) -> list[int]:
    """List the steps after which the model writes a text: the first, the last, and others in equal ratios.

    Args:
        total: Number of training steps.
        count: Number of texts.

    Returns:
        Rising steps, at most `count`.

    Example:
        >>> sample_steps(1000, 4)
        [1, 10, 100, 1000]
    """
    if count < 2:
        return [total] * count
    return sorted({round(total ** (number / (count - 1))) for number in range(count)})


def write_sample(run: Any, tokenizer: PreTrainedTokenizerFast, tokens: int) -> None:
    """Let the model of a training run write a text, and keep it in samples.json of the run.

    Args:
        run: The `TrainingRun`. Texts from later steps, of an earlier run or before a resume, are deleted.
        tokenizer: The tokenizer of the model.
        tokens: Number of tokens to write.
    """
    model = run.unwrapped.eval()
    text = generate(model, tokenizer, "", max_new_tokens=tokens, seed=run.args.seed)
    model.train()
    kept = [sample for sample in read_samples(run.folder) if sample["step"] < run.steps]
    content = json.dumps([*kept, {"step": run.steps, "text": text}], indent=1, ensure_ascii=False)
    (run.folder / SAMPLES).write_text(content + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Report


@activity("Writing the report")
def write_report(folder: Path, level: str) -> None:
    """Write the learning curves and the model card of a finished run, and print where they are.

    Args:
        folder: The folder of the run.
        level: "word" or "char".
    """
    unit = {"word": "word", "char": "character"}[level]
    plot_run(folder, folder / "curves.png", CURVES)
    limits = [limit.format(unit=unit) for limit in LIMITS]
    samples = "\n\n".join(
        f"After step {each['step']}:\n\n````text\n{each['text']}\n````" for each in read_samples(folder)
    )
    run_card(
        folder,
        summary=SUMMARY.format(unit=unit),
        limits=limits,
        tags=["recurrent_lm", "language-model"],
        notes=f"The model wrote these texts during training.\n\n{samples}" if samples else None,
    ).save(folder / "README.md")
    print(f"checkpoint  {folder}  (AutoModelForCausalLM.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
