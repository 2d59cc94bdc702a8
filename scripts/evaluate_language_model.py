"""Evaluate a recurrent language model: its perplexity on a text, and what it writes itself.

    scripts/run python scripts/evaluate_language_model.py --model runs/train_language_model

Prints the scores and a text, and writes evaluation.json into the model's folder; some seconds on two cores.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_dl.data import text
from hf_dl.data.text import TokenStream, build_tokenizer, encode, floor_perplexity
from hf_dl.models.recurrent_lm import RecurrentLMConfig, RecurrentLMForCausalLM
from hf_dl.reporting.card import run_card
from hf_dl.reporting.experiment import portable
from hf_dl.reporting.plots import plot_run

TREES = ("huffman", "balanced", "two_level")
SUMMARY = (
    "A recurrent language model with a choice of output layers (softmax, Gumbel, hierarchical, adaptive): it says "
    "which {unit} comes next."
)
LIMITS = ("It knows the {unit}s of its training text; every other is the same to it, <unk>.",)
CURVES = {"loss": {"training": "loss", "validation": "val_loss"}, "perplexity": {"validation": "val_perplexity"}}


@dataclass
class TextData:
    """Flags that say which text, shared with the training script."""

    source: str = field(
        default="synthetic", metadata={"help": "synthetic, a Hub id, or a file or folder of text or parquet."}
    )
    config: str = field(default="", metadata={"help": "Configuration of a Hub dataset that has several."})
    level: Literal["word", "char"] = field(default="word", metadata={"help": "What the tokens are."})
    num_train: int = field(default=0, metadata={"help": "Training rows; 0: all, which is 24000 synthetic documents."})
    num_test: int = field(default=0, metadata={"help": "Validation and test rows, at most, each; 0: all."})
    holdout: float = field(default=0.1, metadata={"help": "Part of the training rows that a missing split takes."})
    eval_rows: int = field(default=10, metadata={"help": "Tracks that a text is cut into to be scored."})
    eval_train: int = field(default=100_000, metadata={"help": "Training tokens that are scored, the first; 0: all."})
    window: int = field(default=35, metadata={"help": "Tokens that are read, and learned from, at a time."})


@dataclass
class ModelFlags:
    """Flags that say which network."""

    embedding_size: int = field(default=128, metadata={"help": "Channels of the embedded tokens."})
    hidden_size: int = field(default=128, metadata={"help": "Channels of the LSTM."})
    num_hidden_layers: int = field(default=1, metadata={"help": "Layers of the LSTM."})
    dropout: float = field(default=0.2, metadata={"help": "Part that is dropped between layers in training."})
    tie_word_embeddings: bool = field(
        default=False, metadata={"help": "head=softmax or gumbel: the output layer has the embedding's weights."}
    )
    head: str = field(
        default="softmax",
        metadata={
            "help": "Output layer: softmax, gumbel, hierarchical or adaptive; hierarchical:TREE sets the tree, "
            f"{', '.join(TREES)}."
        },
    )
    cutoffs: list[int] | None = field(
        default=None, metadata={"help": "head=adaptive: tokens up to each cutoff; those that cost least by default."}
    )
    div_value: float = field(default=4.0, metadata={"help": "head=adaptive: how much smaller each tail is."})
    temperature: float = field(
        default=0.5, metadata={"help": "head=gumbel: what the temperature of the noise falls to, from 1."}
    )
    sparse: bool = field(
        default=False,
        metadata={"help": "Sparse gradients of the embedding and of head=hierarchical, stepped by SparseAdam."},
    )
    max_tokens: int = field(
        default=0, metadata={"help": "Most tokens of the vocabulary; 0: all of the training text."}
    )
    min_count: int = field(default=1, metadata={"help": "How often a token must occur to be in the vocabulary."})

    def __post_init__(self):
        super().__post_init__()
        name, _, tree = self.head.partition(":")
        if tree and (name != "hierarchical" or tree not in TREES):
            raise ValueError(f"head={self.head!r} is unknown; trees are hierarchical: and one of {', '.join(TREES)}.")
        for flag in ("window", "eval_rows", "min_count"):
            if getattr(self, flag) < 1:
                raise ValueError(f"{flag}={getattr(self, flag)} must be at least 1.")
        if self.accumulation != 1:
            raise ValueError(f"accumulation={self.accumulation} must be 1: the state goes on from batch to batch.")
        if self.optimizer != "adamw" and self.sparse:
            raise ValueError(f"optimizer={self.optimizer!r} does not go with sparse=True; choose adamw.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        _config(self, vocab_size=100, class_counts=None)


@dataclass
class Args(TextData):
    """Flags of the evaluation."""

    model: str = field(default="runs/train_language_model", metadata={"help": "Folder or Hub id of the model."})
    split: Literal["train", "validation", "test"] = field(default="test", metadata={"help": "Which rows."})
    prompt: str = field(default="", metadata={"help": "What the text that it writes begins with."})
    max_new_tokens: int = field(default=60, metadata={"help": "Tokens that it writes at most; 0: none."})
    seed: int = field(default=0, metadata={"help": "Seed of what it writes."})
    output_dir: str = field(default="", metadata={"help": "Where to write; default: the model's folder."})


def load_text(args: TextData, split: str) -> datasets.Dataset:
    """Load a split of the source that the flags name."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    count = (args.num_train if split == "train" else args.num_test) or None
    options = {"config": args.config or None, "holdout": args.holdout, "num_rows": count}
    return text.load(split, args.source, level=args.level, **options)


def load_all(args: Any) -> tuple[dict[str, datasets.Dataset], Any]:
    """Load all splits and make the tokenizer of the training rows."""
    data = {name: load_text(args, split) for name, split in text_splits().items()}
    limits = {"max_tokens": args.max_tokens or None, "min_count": args.min_count}
    return data, build_tokenizer(data["train"], level=args.level, **limits)


def text_splits() -> dict[str, str]:
    """Names of metrics, and the splits that they are of."""
    return {"train": "train", "val": "validation", "test": "test"}


def _config(args: Any, vocab_size: int, class_counts: Sequence[int] | None) -> RecurrentLMConfig:
    head, _, tree = args.head.partition(":")
    options: dict[str, Any] = {}
    if head == "hierarchical":
        options = {"tree": tree or "huffman", "class_counts": class_counts, "sparse": args.sparse}
    elif head == "adaptive":
        options = {"cutoffs": args.cutoffs, "div_value": args.div_value, "class_counts": class_counts}
    own = "embedding_size hidden_size num_hidden_layers dropout tie_word_embeddings".split()
    try:
        return RecurrentLMConfig(
            vocab_size=vocab_size,
            head=head,
            head_options=options,
            sparse_embedding=args.sparse,
            **{name: getattr(args, name) for name in own},
        )
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def make_streams(args: Any, ids: dict[str, torch.Tensor]) -> dict[str, TokenStream]:
    """Cut the tokens of each split into the windows in which they are scored."""
    parts = {**ids, "train": ids["train"][: args.eval_train or None]}
    return {split: TokenStream(part, rows=args.eval_rows, length=args.window) for split, part in parts.items()}


def make_model(args: Any, stream: TokenStream, vocab_size: int) -> RecurrentLMForCausalLM:
    """Make the model that the flags name; its output layer knows how often each token is in the training text."""
    counts = stream.ids.bincount(minlength=vocab_size).tolist()
    return RecurrentLMForCausalLM(_config(args, vocab_size, counts))


class Pace:
    """How many tokens a second the training steps take, in seconds on the clock and of the CPU, and nothing else."""

    def __init__(self, device: torch.device):
        self.device, self.tokens, self.seconds, self.cpu_seconds = device, 0, 0.0, 0.0

    @contextlib.contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Time one step over so many tokens."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.tokens += tokens
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu

    def scores(self, level: str) -> dict[str, float]:
        """`words_per_second` and `words_per_cpu_second`, or of characters."""
        unit = {"word": "words", "char": "characters"}[level]
        seconds = {"second": self.seconds, "cpu_second": self.cpu_seconds}
        return {f"{unit}_per_{name}": self.tokens / value for name, value in seconds.items() if value > 0}


@torch.no_grad()
def evaluate(model: torch.nn.Module, stream: TokenStream) -> dict[str, float]:
    """Score a language model on every token of a text once.

    Args:
        model: The model.
        stream: The text; each track begins with a fresh state.

    Returns:
        `loss`, the mean of -log P over the tokens, in nats; `perplexity`, exp of it; and `tokens`, how many there are.
    """
    model.eval()
    device, state, total, tokens = next(model.parameters()).device, None, 0.0, 0
    for batch in stream.batches():
        labels = batch["shift_labels"].to(device)
        output = model(batch["input_ids"].to(device), state=state, shift_labels=labels, skip_logits=True)
        counted = int((labels >= 0).sum())
        state, total, tokens = output.state, total + output.loss.item() * counted, tokens + counted
    return {"loss": total / tokens, "perplexity": math.exp(min(total / tokens, 700)), "tokens": tokens}


def watch(run: Any, streams: dict[str, TokenStream]) -> dict[str, float]:
    """Score several texts; keys are such as `val_perplexity`."""
    metrics = {}
    with run.averaged():
        for split, stream in streams.items():
            metrics |= {f"{split}_{name}": value for name, value in evaluate(run.unwrapped, stream).items()}
    return metrics


def conclude(
    run: Any, streams: dict[str, TokenStream], data: dict[str, datasets.Dataset], tokenizer: Any, pace: Pace
) -> dict[str, float]:
    """Score the best weights on several texts, beside the perplexity that a perfect model has, where it is known."""
    if run.args.monitor:
        run.load_best()
    metrics = {**watch(run, streams), **pace.scores(run.args.level), "vocab_size": len(tokenizer)}
    for split in ("val", "test"):
        floor = floor_perplexity(data[split], tokenizer)
        metrics |= {} if floor is None else {f"{split}_perplexity_floor": floor}
    return metrics


def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, seed: int) -> str:
    """Let a model go on from a prompt, drawing each token from its probabilities."""
    torch.manual_seed(seed)
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    inputs = torch.tensor([ids], device=model.device)
    written = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=True,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=None,
    )
    return tokenizer.decode(written[0, 1:])


def write_report(folder: Path, level: str) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and say where everything is."""
    unit = {"word": "word", "char": "character"}[level]
    plot_run(folder, folder / "curves.png", CURVES)
    limits = [limit.format(unit=unit) for limit in LIMITS]
    run_card(folder, summary=SUMMARY.format(unit=unit), limits=limits, tags=["recurrent_lm", "language-model"]).save(
        folder / "README.md"
    )
    print(f"checkpoint  {folder}  (AutoModelForCausalLM.from_pretrained)")
    print(f"report      {folder / 'README.md'}")


def main(argv: Iterable[str] | None = None) -> dict[str, float]:
    """Evaluate the model that the flags name, and write what was found beside it."""
    args = Args(**vars(HfArgumentParser(Args, allow_abbrev=False).parse_args(argv)))
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    args.level = "word" if tokenizer.eos_token == "<eos>" else "char"
    folder = Path(args.output_dir or args.model)
    folder.mkdir(parents=True, exist_ok=True)
    data = load_text(args, args.split)
    stream = TokenStream(
        encode(data, tokenizer), rows=args.eval_rows, length=args.window, first=tokenizer.bos_token_id
    )
    prefix = next(name for name, split in text_splits().items() if split == args.split)
    metrics = {f"{prefix}_{name}": value for name, value in evaluate(model, stream).items()}
    floor = floor_perplexity(data, tokenizer)
    metrics |= {} if floor is None else {f"{prefix}_perplexity_floor": floor}
    found = {"args": portable(asdict(args)), "metrics": metrics}
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in metrics.items():
        print(f"{name:40s} {value:.4f}")
    if args.max_new_tokens:
        print(generate(model, tokenizer, args.prompt, args.max_new_tokens, args.seed))
    return metrics


if __name__ == "__main__":
    main()
