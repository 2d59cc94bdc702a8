"""Evaluate a model that writes programs for word problems: exact match, token match, execution accuracy.

    scripts/run python scripts/evaluate_seq2seq.py --model runs/train_seq2seq --num_beams 1 10 --decoding grammar

Decodes through the pipeline that a person uses. Every score also stands for the problems whose template was trained on
(`_seen`) and for the others (`_unseen`), beside two baselines that only retrieve. Writes predictions.jsonl and
evaluation.json into the model's folder, and results.json as well into an `output_dir` of its own.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from hf_dl import programs
from hf_dl.data import math_programs
from hf_dl.data.collate import as_is
from hf_dl.metrics.program_baselines import lookup_baseline, nearest_baseline
from hf_dl.metrics.programs import program_scores
from hf_dl.models.beam_search import BeamSearchOutput
from hf_dl.models.program_seq2seq import ProgramSeq2SeqConfig, ProgramSeq2SeqForConditionalGeneration
from hf_dl.pipelines.math_program import MathProgramPipeline, choose
from hf_dl.programs import is_close
from hf_dl.reporting.card import run_card
from hf_dl.reporting.experiment import find_run, portable
from hf_dl.reporting.plots import plot_run
from hf_dl.training.provenance import write_results

SUMMARY = (
    "It reads a word problem in English and writes the program that solves it, in the language of MathQA (Amini et "
    "al. 2019); the program is then run for the answer."
)
USAGE = """from hf_dl.pipelines.math_program import MathProgramPipeline

solve = MathProgramPipeline.from_pretrained(".")
solution = solve("A train runs 120 km in 2 hours. How far does it run in 5 hours?", num_beams=10)
print(solution.program, solution.answer)
for step in solution.steps:
    print(step.sentence)"""
LIMITS = (
    "It knows the kinds of problems that it was trained on: compare the scores of templates that training has seen "
    "with the others, and both with the baselines, which only look up a training problem.",
    "It gives every problem a program, also one that it did not understand; that a program runs does not make it "
    "right.",
)
CURVES = {
    "loss": {"training problems": "train_loss", "validation problems": "val_loss"},
    "validation problems": {
        "exact match": "val_exact_match", "token match": "val_token_match",
        "execution accuracy": "val_execution_accuracy",
    },
}  # fmt: skip
MODELS = {  # the four that are compared: encoder, attention, freeze_encoder
    "bilstm": ("bilstm", False, False),
    "bilstm_attention": ("bilstm", True, False),
    "bert_frozen": ("bert", True, True),
    "bert": ("bert", True, False),
}
SWITCHES = ("grammar", "rerank", "vote", "options")
WATCHED = ("exact_match", "token_match", "execution_accuracy", "executes")  # while it trains
BATCH = 64
BERT_LEARNING_RATE = 3e-5  # the middle of the three that Devlin et al. 2019 fine-tune with


@dataclass
class ProblemData:
    """Flags that say which problems, shared with the training script."""

    source: str = field(default="synthetic", metadata={"help": "synthetic, a folder or file of MathQA, or a Hub id."})
    subset: Literal["all", "course"] = field(
        default="all", metadata={"help": "All rows, or those that the assignment COL775 A1.2 kept, read as it did."}
    )
    resplit: Literal["none", "template"] = field(
        default="none", metadata={"help": "template: deal problems out anew, so that no template is in two splits."}
    )
    num_train: int = field(default=0, metadata={"help": "Training problems; 0: all, which is 20000 synthetic ones."})
    num_test: int = field(default=0, metadata={"help": "Problems of each other split, at most; 0: all."})


@dataclass
class Decoding:
    """Flags that say how programs are searched for, shared with the training script."""

    num_beams: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Programs that the search keeps; several: all are scored."}
    )
    length_penalty: float = field(default=1.0, metadata={"help": "Power of the length that scores are divided by."})
    decoding: str = field(
        default="plain",
        metadata={"help": f"plain, or {', '.join(SWITCHES)} with + between; see hf_dl.pipelines.math_program."},
    )

    def __post_init__(self):
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        if not self.num_beams or min(self.num_beams) < 1 or len(set(self.num_beams)) < len(self.num_beams):
            raise ValueError(f"num_beams={self.num_beams} must be different numbers, each at least 1.")
        unknown = [each for each in self.decoding.split("+") if each not in ("plain", *SWITCHES)]
        if unknown:
            raise ValueError(
                f"decoding={self.decoding!r} is unknown; choose plain, or some of {', '.join(SWITCHES)} with + "
                "between."
            )


@dataclass
class ModelFlags:
    """Flags that say which model; the defaults are for synthetic problems on two cores."""

    model: Literal["", "bilstm", "bilstm_attention", "bert_frozen", "bert"] = field(
        default="", metadata={"help": "One of the four models, instead of encoder, attention and freeze_encoder."}
    )
    encoder: Literal["bilstm", "bert"] = field(default="bilstm", metadata={"help": "What reads problems."})
    attention: bool = field(default=True, metadata={"help": "Whether the decoder attends to what was read."})
    bert: str = field(default="bert-base-cased", metadata={"help": "encoder=bert: its Hub id or folder."})
    freeze_encoder: bool = field(default=False, metadata={"help": "Leave the encoder as it is."})
    encoder_learning_rate: float = field(
        default=0.0, metadata={"help": "Peak learning rate of the encoder; 0: that of all, or 3e-5 for BERT."}
    )
    mask_numbers: bool = field(default=True, metadata={"help": "Read <n0>, <n1>, ... instead of the numbers."})
    min_count: int = field(default=2, metadata={"help": "encoder=bilstm: rarer words are unknown."})
    glove: str = field(default="", metadata={"help": "encoder=bilstm: file of word vectors to start from."})
    number_embeddings: Literal["free", "tied", "pointer"] = field(
        default="free", metadata={"help": "What stands for n_i in the decoder; see the config of the model."}
    )
    embedding_size: int = field(default=64, metadata={"help": "encoder=bilstm: channels of a word."})
    encoder_hidden_size: int = field(default=64, metadata={"help": "encoder=bilstm: channels of a direction."})
    encoder_layers: int = field(default=1, metadata={"help": "encoder=bilstm: layers."})
    program_embedding_size: int = field(default=64, metadata={"help": "Channels of a symbol of programs."})
    decoder_hidden_size: int = field(default=128, metadata={"help": "Channels of the decoder."})
    attention_size: int = field(default=64, metadata={"help": "Channels in which the attention compares."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout."})
    max_program_length: int = field(
        default=64, metadata={"help": "Symbols of a program, the end included; longer ones are not trained on."}
    )
    teacher_forcing_ratio: float = field(
        default=0.6, metadata={"help": "Probability with which the decoder reads the true symbol in training."}
    )
    teacher_forcing_end: float = field(
        default=-1.0, metadata={"help": "What it goes to, linearly over the run; below 0: it stays."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model:
            self.encoder, self.attention, self.freeze_encoder = MODELS[self.model]
        if self.teacher_forcing_end > 1:
            raise ValueError(f"teacher_forcing_end={self.teacher_forcing_end} must be at most 1.")
        if self.encoder_learning_rate < 0:
            raise ValueError(f"encoder_learning_rate={self.encoder_learning_rate} must be 0 or above.")
        if self.freeze_encoder:
            self.encoder_learning_rate = 0.0
        elif self.encoder == "bert":
            self.encoder_learning_rate = self.encoder_learning_rate or BERT_LEARNING_RATE
        if self.encoder == "bert" and self.glove:
            raise ValueError(f"glove={self.glove!r} is for encoder='bilstm'; leave it out.")
        if self.encoder == "bilstm" and self.freeze_encoder and not self.glove:
            raise ValueError("freeze_encoder would leave encoder='bilstm' untrained; it is for encoder='bert'.")
        checked(ProgramSeq2SeqConfig, **config_fields(self))


@dataclass
class Args(Decoding, ProblemData):
    """Flags of the evaluation."""

    model: str = field(default="runs/train_seq2seq", metadata={"help": "Folder or Hub id of the model."})
    run: str = field(
        default="",
        metadata={"help": "Where --model is a folder of runs: a flag of the one to take, as model=bilstm_attention."},
    )
    split: str = field(default="test", metadata={"help": "validation or test; of synthetic problems also others."})
    baselines: bool = field(default=True, metadata={"help": "Score the two that retrieve from training as well."})
    seed: int = field(default=0, metadata={"help": "With --run: that of the run."})
    output_dir: str = field(default="", metadata={"help": "Where to write; default: the model's folder."})
    cpu_threads: int = field(default=1, metadata={"help": "CPU threads; the steps are too small for more to help."})


def checked(make: Callable[..., Any], **fields: Any) -> Any:
    """Make a config, and turn its refusal into a ValueError of one sentence."""
    try:
        return make(**fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def load_problems(args: ProblemData, split: str, *, mask_numbers: bool = True) -> datasets.Dataset:
    """Load a split of the source that the flags name; "test" of synthetic problems is "test_seen" and "test"."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    options = {"subset": args.subset, "resplit": args.resplit, "mask_numbers": mask_numbers}
    count = (args.num_train if split == "train" else args.num_test) or None
    names = ("test_seen", "test") if args.source == "synthetic" and split == "test" else (split,)
    parts = [math_programs.load(name, args.source, num_problems=count, **options) for name in names]
    return datasets.concatenate_datasets(parts, info=parts[0].info, split=parts[0].split)


def load_splits(args: Any) -> dict[str, datasets.Dataset]:
    """Load "train", "val" and "test", and of synthetic problems "situations" too, which training knows nothing of."""
    names = {"train": "train", "val": "validation", "test": "test"}
    if args.source == "synthetic":
        names["situations"] = "test_situations"
    return {key: load_problems(args, split, mask_numbers=args.mask_numbers) for key, split in names.items()}


class Examples(torch.utils.data.Dataset):
    """Problems and programs as tokens; `__getitems__` makes a batch, padded to its longest.

    Attributes:
        problems: The rows; with `trainable`, those that can be trained on.
        lengths: Symbols of the program and words of the problem of each: what makes a step long.

    Args:
        problems: As of `load_problems`.
        pipeline: Knows how problems become tokens.
        symbols: The tokenizer of programs.
        trainable: Leave out programs that are too long, or name what the model does not know.
    """

    def __init__(
        self,
        problems: datasets.Dataset,
        pipeline: MathProgramPipeline,
        symbols: PreTrainedTokenizerBase,
        *,
        trainable: bool = False,
    ):
        labels, unknown = symbols(problems["program"][:])["input_ids"], symbols.unk_token_id
        if trainable:
            longest = pipeline.config.max_program_length
            kept = [i for i, row in enumerate(labels) if len(row) <= longest and unknown not in row]
            if len(kept) < len(labels):
                print(f"{len(labels) - len(kept)} training programs are left out: too long, or with unknown symbols.")
            problems, labels = problems.select(kept), [labels[i] for i in kept]
        self.problems, self.labels, self.pipeline = problems, labels, pipeline
        self.input_ids = pipeline.encode(problems["text"][:])["input_ids"]
        self.num_numbers = [len(numbers) for numbers in problems["numbers"][:]]
        self.lengths = [(len(row), len(words)) for row, words in zip(self.labels, self.input_ids, strict=True)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Several examples: `input_ids`, `attention_mask`, `labels` (-100 where there is none), `num_numbers`."""
        rows = [torch.tensor(self.labels[i]) for i in indices]
        return {
            **self.pipeline.pad([self.input_ids[i] for i in indices]),
            "labels": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100),
            "num_numbers": torch.tensor([self.num_numbers[i] for i in indices]),
        }


# ---------------------------------------------------------------------------------------------------------------------
# The model


@dataclass
class Tokenizers:
    """The tokenizer of problems, which is saved beside the weights, and that of programs, in a folder there."""

    problems: PreTrainedTokenizerBase
    symbols: PreTrainedTokenizerBase

    def save_pretrained(self, folder: str | Path) -> None:
        """Save both."""
        self.problems.save_pretrained(folder)
        self.symbols.save_pretrained(Path(folder) / "program_tokenizer")


def make_tokenizers(args: ModelFlags, train: datasets.Dataset) -> Tokenizers:
    """Make the tokenizers for the training problems; that of BERT learns the number tokens."""
    if args.encoder == "bilstm":
        words = math_programs.problem_tokenizer(train["text"][:], min_count=args.min_count)
    else:
        words = AutoTokenizer.from_pretrained(args.bert)
        math_programs.add_number_tokens(words)
    return Tokenizers(words, math_programs.program_tokenizer())


def config_fields(args: ModelFlags) -> dict[str, Any]:
    """Pick the flags that are fields of the config, and what follows from the others."""
    symbols = math_programs.program_tokenizer()
    names = (
        "encoder attention freeze_encoder mask_numbers number_embeddings embedding_size encoder_hidden_size "
        "encoder_layers program_embedding_size decoder_hidden_size attention_size dropout max_program_length "
        "teacher_forcing_ratio"
    )
    fields = {name: getattr(args, name) for name in names.split()}
    course = getattr(args, "subset", "all") == "course"
    return fields | {
        "program_tokens": symbols.convert_ids_to_tokens(list(range(len(symbols)))),
        "operations": dict(programs.OPERATIONS),
        "number_token_ids": list(range(math_programs.NUM_NUMBERS)),  # until the tokenizer is known
        "number_convention": "course" if course else "mathqa",
        "semantics": "course" if course else "data",
        "pad_token_id": symbols.pad_token_id,
        "bos_token_id": symbols.bos_token_id,
        "eos_token_id": symbols.eos_token_id,
        "decoder_start_token_id": symbols.bos_token_id,
    }


def make_model(args: ModelFlags, tokenizers: Tokenizers) -> ProgramSeq2SeqForConditionalGeneration:
    """Make the model that the flags name."""
    words = tokenizers.problems
    fields = config_fields(args) | {
        "encoder_vocab_size": len(words),
        "number_token_ids": words.convert_tokens_to_ids(list(math_programs.NUMBER_TOKENS)),
    }
    if args.encoder == "bert":
        checked(ProgramSeq2SeqConfig, **fields)  # `from_encoder_pretrained` knows the encoder
        del fields["encoder"]
        return ProgramSeq2SeqForConditionalGeneration.from_encoder_pretrained(args.bert, **fields)
    model = ProgramSeq2SeqForConditionalGeneration(checked(ProgramSeq2SeqConfig, **fields))
    if args.glove:
        vectors, coverage = math_programs.word_vectors(words, args.glove, dim=args.embedding_size, seed=args.seed)
        print(f"{args.glove} has {coverage:.1%} of the words; the others start from random vectors.")
        model.load_word_embeddings(vectors)
    return model


def teacher_forcing(args: ModelFlags, progress: float) -> float:
    """The ratio of teacher forcing when a part of the run, from 0 to 1, is done."""
    end = args.teacher_forcing_ratio if args.teacher_forcing_end < 0 else args.teacher_forcing_end
    return args.teacher_forcing_ratio + progress * (end - args.teacher_forcing_ratio)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of -log P over the symbols of each program, given those before it, and how many these are."""
    device = next(model.parameters()).device
    labels = batch["labels"].to(device)
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, labels=labels, teacher_forcing_ratio=1.0).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1), (labels != -100).sum(1)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batches: Iterable[dict], gather: Callable[[Any], Any]) -> float:
    """The mean of -log P over all symbols of the programs of some batches."""
    model.eval()
    sums, counts = zip(*(gather(losses(model, batch)) for batch in batches), strict=True)
    return (torch.cat(sums).double().sum() / torch.cat(counts).sum()).item()


def decode(
    pipeline: MathProgramPipeline,
    batches: Iterable[dict],
    problems: datasets.Dataset,
    *,
    num_beams: int,
    decoding: str = "plain",
    length_penalty: float = 1.0,
    gather: Callable[[Any], Any] = lambda values: values,
) -> tuple[list[str], float]:
    """Write a program for each problem.

    Args:
        pipeline: The model with its tokenizer.
        batches: As of `Examples`, of all the problems in order.
        problems: The problems.
        num_beams: Programs that the search keeps.
        decoding: As of `Decoding`.
        length_penalty: Of the search.
        gather: Joins what several processes computed.

    Returns:
        The programs, "" where none was found; and for which part of the problems one of all that the search kept gives
        the answer.
    """
    switches = decoding.split("+")
    pipeline.model.eval()
    columns, longest = [], pipeline.config.max_program_length
    for batch in batches:
        found: BeamSearchOutput = pipeline.search(
            **{name: batch[name] for name in ("input_ids", "attention_mask", "num_numbers")},
            num_beams=num_beams,
            length_penalty=length_penalty,
            grammar="grammar" in switches,
        )
        sequences = F.pad(found.sequences, (0, longest - found.sequences.shape[-1]))
        columns.append(gather((sequences, found.lengths, found.scores)))
    columns = [torch.cat(column).tolist() for column in zip(*columns, strict=True)]
    written, reachable = [], 0
    wanted = zip(problems["numbers"][:], problems["answer"][:], problems["options"][:], strict=True)
    for *rows, (numbers, answer, options) in zip(*columns, wanted, strict=True):
        candidates = pipeline.candidates(*rows, numbers, length_penalty=length_penalty)
        options = options if "options" in switches else None
        best = choose(candidates, rerank="rerank" in switches, vote="vote" in switches, options=options)
        written.append(candidates[best].program)
        reachable += any(is_close(each.value, answer) for each in candidates)
    return written, reachable / len(problems)


def score(
    written: Sequence[str], problems: datasets.Dataset, seen: Sequence[bool], semantics: str
) -> dict[str, float]:
    """All scores of programs; without the counts."""
    columns = (problems[name][:] for name in ("program", "numbers", "answer"))
    scores = program_scores(written, *columns, seen=seen, semantics=semantics)
    return {name: value for name, value in scores.items() if not name.startswith("problems")}


def find_seen(train: datasets.Dataset, problems: datasets.Dataset) -> list[bool]:
    """Whether each problem has a template of training."""
    known = set(train["template"][:])
    return [template in known for template in problems["template"][:]]


def counts(prefix: str, seen: Sequence[bool]) -> dict[str, float]:
    """How many problems there are; and, so that a card finds it, how many are left out of `_seen` and `_unseen`."""
    found = {"": len(seen), "_without_seen": len(seen) - sum(seen), "_without_unseen": sum(seen)}
    return {f"{prefix}problems{name}": float(number) for name, number in found.items()}


def baselines(
    prefix: str, train: datasets.Dataset, problems: datasets.Dataset, seen: Sequence[bool], semantics: str
) -> dict[str, float]:
    """The scores of the two baselines that retrieve from training."""
    metrics = {}
    for name, predict in (("lookup", lookup_baseline), ("nearest", nearest_baseline)):
        scores = score(predict(train, problems), problems, seen, semantics)
        metrics |= {f"{prefix}{name}_{key}": value for key, value in scores.items()}
    return metrics


def decode_and_score(
    pipeline: MathProgramPipeline,
    batches: Iterable[dict],
    problems: datasets.Dataset,
    seen: Sequence[bool],
    args: Decoding,
    prefix: str,
    gather: Callable[[Any], Any] = lambda values: values,
) -> tuple[dict[str, float], list[str]]:
    """Score a split with each size of the beam; the programs are those of the last."""
    metrics = {}
    for num_beams in args.num_beams:
        options = {"decoding": args.decoding, "length_penalty": args.length_penalty, "gather": gather}
        written, reachable = decode(pipeline, batches, problems, num_beams=num_beams, **options)
        scores = score(written, problems, seen, pipeline.config.semantics)
        if num_beams > 1:
            scores["reachable"] = reachable
        name = f"{prefix}k{num_beams}_" if len(args.num_beams) > 1 else prefix
        metrics |= {f"{name}{key}": value for key, value in scores.items()}
    return metrics | counts(prefix, seen), written


def watch(run: Any, pipeline: MathProgramPipeline, loaders: dict[str, DataLoader], data: dict) -> dict[str, float]:
    """Losses of training and validation problems, and scores of the latter by greedy search, while a run goes on."""
    with run.averaged():
        metrics = {f"{split}_loss": mean_loss(run.model, loaders[split], run.gather) for split in ("train", "val")}
        problems = data["val"]
        written, _ = decode(pipeline, loaders["val"], problems, num_beams=1, gather=run.gather)
    scores = score(written, problems, find_seen(data["train"], problems), pipeline.config.semantics)
    return metrics | {f"val_{name}": scores[name] for name in WATCHED}


def conclude(run: Any, pipeline: MathProgramPipeline, loaders: dict[str, DataLoader], data: dict) -> dict[str, float]:
    """Score the best weights on the test splits, beside the baselines; write what they wrote, and end."""
    if run.args.monitor:
        run.load_best()
    metrics = watch(run, pipeline, loaders, data) | counts("val_", find_seen(data["train"], data["val"]))
    for split in [name for name in data if name not in ("train", "val")]:
        problems, seen = data[split], find_seen(data["train"], data[split])
        scores, written = decode_and_score(
            pipeline, loaders[split], problems, seen, run.args, f"{split}_", run.gather
        )  # fmt: skip
        metrics |= scores
        if run.is_main:
            metrics |= baselines(f"{split}_", data["train"], problems, seen, pipeline.config.semantics)
            write_predictions(written, problems, seen, pipeline.config.semantics, run.folder, split)
    return run.finish(metrics)


def write_predictions(
    written: Sequence[str],
    problems: datasets.Dataset,
    seen: Sequence[bool],
    semantics: str,
    folder: Path,
    split: str,
) -> None:
    """Write what was predicted for each problem, with its value, into predictions_<split>.jsonl."""
    with open(folder / f"predictions_{split}.jsonl", "w", encoding="utf-8") as file:
        for program, row, known in zip(written, problems, seen, strict=True):
            try:
                value = programs.execute(program, row["numbers"], semantics=semantics)
            except programs.ProgramError:
                value = None
            line = {"problem": row["problem"], "predicted": program, "program": row["program"], "value": value}
            line |= {"answer": row["answer"], "right": is_close(value, row["answer"]), "seen": known}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and say where everything is."""
    plot_run(folder, folder / "curves.png", CURVES)
    tags = ["program-synthesis", "math-word-problems", "mathqa"]
    card = run_card(
        folder, summary=SUMMARY, usage=USAGE, limits=LIMITS, pipeline_tag="text-generation", tags=tags
    )  # fmt: skip
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (MathProgramPipeline.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"programs    {folder / 'predictions_test.jsonl'}")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate the model that the flags name, and write what was found beside it."""
    args = Args(**vars(HfArgumentParser(Args, allow_abbrev=False).parse_args(argv)))
    torch.set_num_threads(args.cpu_threads)
    started = time.monotonic()
    name = str(find_run(args.model, args.run, args.seed)) if args.run else args.model
    pipeline = MathProgramPipeline.from_pretrained(name)
    folder = Path(args.output_dir or name)
    folder.mkdir(parents=True, exist_ok=True)
    config = pipeline.config
    if config.number_convention != ("course" if args.subset == "course" else "mathqa"):
        raise ValueError(
            f"subset={args.subset!r} does not fit the model, which was trained on numbers as read by "
            f"{config.number_convention!r}; evaluate it on the kind of problems that it was trained on."
        )
    train = load_problems(args, "train")
    problems = load_problems(args, args.split, mask_numbers=config.mask_numbers)
    examples = Examples(problems, pipeline, math_programs.program_tokenizer())
    seen, prefix = find_seen(train, problems), f"{args.split}_".replace("validation", "val")
    batches = DataLoader(examples, BATCH, collate_fn=as_is)
    metrics, written = decode_and_score(pipeline, batches, problems, seen, args, prefix)
    if args.baselines:
        metrics |= baselines(prefix, train, problems, seen, config.semantics)
    write_predictions(written, problems, seen, config.semantics, folder, args.split)
    found = {"args": portable(asdict(args)), "metrics": metrics}
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
    if args.output_dir:  # a cell of an experiment; the model's own folder has the results of its training
        seconds = time.monotonic() - started
        write_results(folder, __file__, found["args"], metrics, pipeline.model, seconds=seconds)
    for name, value in metrics.items():
        print(f"{name:45s} {value:.4f}")
    print(f"predictions_{args.split}.jsonl and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
