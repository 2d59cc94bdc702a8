"""The flags that all training scripts share, and a strict parser.

A script adds its own flags in a subclass of `TrainingArgs` and calls `parse_args` once, before anything else:

    @dataclass
    class SlotArgs(TrainingArgs):
        batch_size: int = field(default=16, metadata={"help": "Examples per optimizer step."})
        num_slots: int = field(default=5, metadata={"help": "Slots per image."})

    args = parse_args(SlotArgs)

This file imports torch and transformers only to parse, so that `hf-dl train slots --help` does not wait for them.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import explain_errors
from .schedules import SCHEDULES

_GROUPS = {
    "run": "output_dir seed max_steps epochs batch_size accumulation num_workers",
    "optimization": "optimizer learning_rate weight_decay momentum beta2 schedule warmup_steps half_life decay_at "
    "decay_factor max_grad_norm ema_decay",
    "evaluation": "eval_every eval_epochs monitor higher_is_better patience",
    "logging and checkpoints": "log_every report_to save_every keep_last resume accept_changed_data",
    "Hub": "push_to_hub hub_model_id hub_strategy",
    "hardware": "mixed_precision compile cpu_threads",
}

Schedule = Literal[tuple(SCHEDULES)]
OPTIMIZERS = ("adam", "adamw", "sgd")
# Other words for flags: abbreviations, and the names in other libraries.
SYNONYMS = {
    "output_dir": "out output output_folder out_dir save_dir",
    "max_steps": "steps num_steps max_iters iterations max_train_steps",
    "epochs": "epoch num_epochs max_epochs num_train_epochs",
    "batch_size": "bs batch train_batch_size per_device_train_batch_size",
    "accumulation": "grad_accum gradient_accumulation_steps accumulate_grad_batches",
    "num_workers": "workers dataloader_num_workers",
    "optimizer": "opt optim",
    "learning_rate": "lr",
    "weight_decay": "wd",
    "schedule": "scheduler lr_scheduler lr_scheduler_type",
    "warmup_steps": "warmup num_warmup_steps lr_warmup_steps",
    "max_grad_norm": "clip grad_clip gradient_clip_val",
    "ema_decay": "ema",
    "mixed_precision": "amp fp16 bf16 precision",
    "source": "data dataset dataset_name data_dir train_data_dir",
    "model": "checkpoint ckpt weights model_name_or_path",
    "image_size": "size img_size resolution",
    "cpu_threads": "threads",
}


@dataclass
class TrainingArgs:
    """Flags shared by all training scripts. Scripts add flags and override defaults in a subclass.

    If a subclass defines `__post_init__`, it must call `super().__post_init__()`, which validates the values.

    Attributes:
        given: The flags on the command line with their values, which a script may change later. None without
            `parse_args`.

    Raises:
        ValueError: If a value is out of its range, or two values contradict each other.

    Example:
        >>> TrainingArgs(max_steps=100, batch_size=32, accumulation=2).batch_size
        32
    """

    output_dir: str = field(default="", metadata={"help": "Folder of the run; defaults to runs/<name of the script>."})
    seed: int = field(default=0, metadata={"help": "Seed for weights, data order, dropout and augmentation."})
    max_steps: int = field(
        default=1000, metadata={"help": "Number of optimizer steps; if above 0, replaces epochs, as in transformers."}
    )
    epochs: float = field(
        default=0.0, metadata={"help": "Passes over the data. Replaces a max_steps that is not on the command line."}
    )
    batch_size: int = field(
        default=32, metadata={"help": "Examples per optimizer step, summed over processes and accumulation."}
    )
    accumulation: int = field(
        default=1, metadata={"help": "Number of pieces to compute a batch in; saves memory, same result."}
    )
    num_workers: int = field(
        default=0, metadata={"help": "Number of processes that load data; 0 loads in the main process."}
    )

    optimizer: str = field(
        default="adamw",
        metadata={"help": f"Update rule: {', '.join(OPTIMIZERS)}, or timm:NAME for one of timm, such as timm:lamb."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(
        default=0.0, metadata={"help": "Weight decay for weights with two or more dimensions; decoupled in adamw."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of sgd; first beta of adam and adamw."})
    beta2: float = field(default=0.999, metadata={"help": "Second beta of adam and adamw."})
    schedule: Schedule = field(
        default="constant",
        metadata={
            "help": "Learning-rate schedule after the warm-up. "
            + " ".join(f"{name}: {inspect.getdoc(function).splitlines()[0]}" for name, function in SCHEDULES.items())
        },
    )
    warmup_steps: int = field(
        default=0, metadata={"help": "Steps in which the learning rate rises from 0 to its peak."}
    )
    half_life: int = field(default=0, metadata={"help": "Steps in which schedule=halving halves the learning rate."})
    decay_at: list[float] = field(
        default_factory=lambda: [0.5, 0.75],
        metadata={"help": "Fractions of the run after which schedule=step decays, such as 0.5 0.75."},
    )
    decay_factor: float = field(
        default=0.1, metadata={"help": "Factor of schedule=step at each fraction in decay_at."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Maximum norm of the gradients; 0 disables clipping."})
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay d of the averaged weights (EMA): min(d, (1 + step) / (10 + step)); 0 disables averaging."
        },
    )

    eval_every: int = field(default=0, metadata={"help": "Steps between evaluations; 0 disables them."})
    eval_epochs: float = field(
        default=0.0,
        metadata={"help": "Passes over the data between evaluations; if above 0, replaces eval_every."},
    )
    monitor: str = field(
        default="", metadata={"help": "Logged metric that selects best/ and decides about early stopping."}
    )
    higher_is_better: bool = field(default=False, metadata={"help": "Whether a higher monitor is better."})
    patience: int = field(
        default=0,
        metadata={"help": "Stop after this many evaluations without a better monitor; 0 disables early stopping."},
    )

    log_every: int = field(default=50, metadata={"help": "Steps between lines of log.jsonl."})
    report_to: str = field(
        default="none", metadata={"help": "none, or trackers separated by commas: tensorboard, trackio, wandb, ..."}
    )
    save_every: int = field(default=500, metadata={"help": "Steps between checkpoints; 0 disables them."})
    keep_last: int = field(default=2, metadata={"help": "Number of newest checkpoints to keep; 0 keeps all."})
    resume: bool = field(
        default=False, metadata={"help": "Continue from the newest complete checkpoint in output_dir, if any."}
    )
    accept_changed_data: bool = field(
        default=False, metadata={"help": "With resume: go on although the training data or the classes changed."}
    )

    push_to_hub: bool = field(default=False, metadata={"help": "Push the model to the Hub at the end of the run."})
    hub_model_id: str = field(
        default="",
        metadata={"help": "Repository, as owner/name or name. Defaults to the name of output_dir."},
    )
    hub_strategy: Literal["end", "checkpoint"] = field(
        default="end",
        metadata={
            "help": "end: push at the end. checkpoint: also push the model and last-checkpoint/ with each "
            "checkpoint. `hf download <id> --include 'last-checkpoint/*' --local-dir <output_dir>/checkpoints` "
            "gets it back for --resume."
        },
    )

    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None,
        metadata={"help": "Precision of the forward pass; defaults to the setting of `accelerate config`."},
    )
    compile: bool = field(default=False, metadata={"help": "Compile the model with torch.compile."})
    cpu_threads: int = field(
        default=0, metadata={"help": "CPU threads per process; 0 divides the cores by the processes."}
    )

    given: ClassVar[dict[str, Any] | None] = None

    def __post_init__(self):
        if not self.output_dir:
            self.output_dir = f"runs/{script_path(type(self)).stem}"
        default_steps, default_epochs = type(self).max_steps, type(self).epochs
        if self.epochs != default_epochs and self.epochs > 0 and self.max_steps == default_steps:
            self.max_steps = 0
        positive = "batch_size accumulation learning_rate log_every"
        not_negative = (
            "max_steps epochs num_workers weight_decay warmup_steps half_life max_grad_norm eval_every eval_epochs "
            "patience save_every keep_last cpu_threads"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        for name in not_negative.split():
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or above.")
        if not (self.max_steps or self.epochs):
            raise ValueError(f"max_steps=0 and epochs={self.epochs} train nothing; one of them must be above 0.")
        for name in ("momentum", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        for name, known in get_type_hints(type(self)).items():
            choices = _choices(known)
            if choices and getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(filter(None, choices))}."
                )
        if self.optimizer not in OPTIMIZERS and not self.optimizer.startswith("timm:"):
            raise ValueError(
                f"optimizer={self.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}, or timm:NAME for an "
                "optimizer of timm, such as timm:lamb."
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulation={self.accumulation}, so that all "
                "pieces have the same size."
            )
        if self.schedule == "halving" and not self.half_life:
            raise ValueError(
                "schedule='halving' needs half_life, the number of steps in which the learning rate halves."
            )
        if not all(0 < part < 1 for part in self.decay_at):
            raise ValueError(f"decay_at={self.decay_at} must be fractions of the run, each above 0 and below 1.")
        if not 0 < self.decay_factor <= 1:
            raise ValueError(f"decay_factor={self.decay_factor} must be above 0 and at most 1.")
        for name in ("hub_model_id", "hub_strategy"):
            if getattr(self, name) != getattr(TrainingArgs, name) and not self.push_to_hub:
                raise ValueError(f"{name}={getattr(self, name)!r} needs push_to_hub.")
        if self.hub_strategy == "checkpoint" and not self.save_every:
            raise ValueError("hub_strategy='checkpoint' needs save_every above 0.")
        if self.patience and not self.monitor:
            raise ValueError(f"patience={self.patience} needs monitor, the name of a logged metric.")
        if self.monitor and not (self.eval_every or self.eval_epochs):
            raise ValueError(
                f"monitor={self.monitor!r} needs eval_every or eval_epochs, which set how often to evaluate."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the flags as JSON can hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


ArgsT = TypeVar("ArgsT", bound=TrainingArgs)
FlagsT = TypeVar("FlagsT")


def flag_names(cls: type) -> list[str]:
    """List the names of a script's flags, to validate the keys of an experiment file.

    Args:
        cls: The script's dataclass of flags.

    Returns:
        The names without dashes, shared flags first.

    Example:
        >>> "learning_rate" in flag_names(TrainingArgs)
        True
    """
    return [f.name for f in dataclasses.fields(cls) if f.init]


def suggest_flag(name: str, known: Sequence[str]) -> str | None:
    """Return the flag that an unknown name probably means: a synonym, or else the closest spelling.

    Args:
        name: The unknown name, without dashes.
        known: The flags of the script.

    Returns:
        A flag, or None if none is similar.

    Example:
        >>> suggest_flag("lr", ["color", "learning_rate"]), suggest_flag("colour", ["color", "learning_rate"])
        ('learning_rate', 'color')
    """
    synonyms = [flag for flag in known if name in SYNONYMS.get(flag, "").split()]
    close = synonyms or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return close[0] if close else None


def script_path(cls: type) -> Path:
    """Return the file that defines a script's flags, which is the script, even if a test imports it."""
    if cls is not TrainingArgs:
        path = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if path:
            return Path(path)
    return Path(sys.argv[0] or "python")


def parse_args(cls: type[ArgsT], argv: list[str] | None = None) -> ArgsT:
    """Parse the flags of a training script, seed every generator, and set the number of CPU threads.

    An unknown flag or an invalid value ends the program with one sentence and exit status 2. Flags cannot be
    abbreviated. Threads are set here because `accelerate launch` starts each process with a single one.

    Args:
        cls: `TrainingArgs` or a dataclass derived from it.
        argv: The command line without the program's name. Defaults to `sys.argv[1:]`.

    Returns:
        The parsed flags.

    Raises:
        SystemExit: If a flag is unknown or its value is invalid.

    Example:
        >>> parse_args(TrainingArgs, ["--batch_size", "64", "--cpu_threads", "1"]).batch_size
        64
    """
    args = parse_flags(cls, argv)
    given = given_flags(argv)
    args.given = {name: value for name, value in args.to_dict().items() if {name, f"no_{name}"} & given}
    import torch
    from accelerate.utils import set_seed

    set_seed(args.seed)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(args.cpu_threads or max(1, _num_cores() // processes))
    return args


def parse_flags(cls: type[FlagsT], argv: list[str] | None = None) -> FlagsT:
    """Parse the flags of a script that does not train; nothing is seeded.

    An unknown flag or an invalid value ends the program with one sentence and exit status 2. Flags cannot be
    abbreviated. In a program that reads `sys.argv`, later errors about the input, such as a missing file, end the
    program with one sentence and exit status 1, see `explain_errors`.

    Args:
        cls: A dataclass of flags. Its `__post_init__` may raise ValueError for invalid values.
        argv: The command line without the program's name. Defaults to `sys.argv[1:]`.

    Returns:
        The parsed flags.

    Raises:
        SystemExit: If a flag is unknown or its value is invalid.

    Example:
        >>> @dataclass
        ... class Args:
        ...     model: str = field(default="runs/train_slots", metadata={"help": "Folder of the model."})
        >>> parse_flags(Args, ["--model", "runs/mine"]).model
        'runs/mine'
    """
    path = script_path(cls)
    if argv is None:
        explain_errors(path.name)
    words = sys.argv[1:] if argv is None else argv
    doc = getattr(sys.modules.get(cls.__module__), "__doc__", None) if cls is not TrainingArgs else None
    if {"-h", "--help"} & set(words):
        print(format_help(cls, path.name, doc), end="")
        raise SystemExit(0)
    from transformers import HfArgumentParser

    # the list of all flags would hide an error message below it
    usage = f"{path.name} [--name value ...]"
    parser = HfArgumentParser(_argument_groups(cls), prog=path.name, usage=usage, add_help=False, allow_abbrev=False)
    *groups, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(_unknown_flag(unknown[0], flag_names(cls)))
    if argv is None:
        from ..progress import activity

        contextlib.ExitStack().enter_context(activity(f"{path.name} is running"))  # until the program ends
    values = {name: value for group in groups for name, value in vars(group).items()}
    given = given_flags(words)
    if "max_steps" in given and "epochs" in values and values["max_steps"] > 0:
        values["epochs"] = 0.0
    elif "epochs" in given and "max_steps" in values and values["epochs"] > 0:
        values["max_steps"] = 0
    try:
        args = cls(**values)
        check_output_dir(getattr(args, "output_dir", ""))
    except ValueError as error:
        parser.error(str(error))
    return args


def check_output_dir(output_dir: str) -> None:
    """Check that a folder exists or can be created, without creating it. An empty name passes.

    Args:
        output_dir: The folder.

    Raises:
        ValueError: If the folder, or the nearest folder above it that exists, is a file or is not writable.

    Example:
        >>> check_output_dir("runs/a_new_run")
    """
    if not output_dir:
        return
    folder = Path(output_dir)
    above = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    problem = "is a file" if not above.is_dir() else "is not writable" if not os.access(above, os.W_OK) else ""
    if problem:
        raise ValueError(
            f"output_dir={output_dir!r} cannot be written: {str(above)!r} {problem}. Choose another folder."
        )


def format_help(cls: type, program: str, doc: str | None = None) -> str:
    """Format the help of a script: type, default and text of each flag, also of the inherited ones.

    Args:
        cls: The script's dataclass of flags.
        program: Name of the script.
        doc: Docstring of the script. Its first paragraph is shown.

    Example:
        >>> "--batch_size INT" in format_help(TrainingArgs, "train.py")
        True
    """
    parser = argparse.ArgumentParser(
        program, usage="%(prog)s [--name value ...]", description=(doc or "").strip().split("\n\n")[0]
    )
    for group in _argument_groups(cls):
        shown = parser.add_argument_group(group._argument_group_name)
        hints = get_type_hints(group)
        for each in dataclasses.fields(group):
            default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            text = f"{each.metadata.get('help', '')} ({_describe_default(each.name, default)})".strip()
            kind, is_list = _type_name(hints[each.name])
            nargs = "?" if kind == "{true,false}" else "+" if is_list else None
            shown.add_argument(f"--{each.name}", metavar=kind, nargs=nargs, help=text.replace("%", "%%"))
    return parser.format_help()


def _describe_default(name: str, default: Any) -> str:
    if default is dataclasses.MISSING:
        return "required"
    if isinstance(default, bool):
        return f"default: true; --no_{name} sets false" if default else "default: false"
    if isinstance(default, list | tuple):
        return f"default: {' '.join(map(str, default)) or 'not set'}"
    return "default: not set" if default in (None, "") else f"default: {default}"


def _type_name(annotation: Any) -> tuple[str, bool]:
    """Return the name of a type for the help, such as INT or {a,b}, and whether the flag is a list of them."""
    choices = [str(choice) for choice in _choices(annotation) if choice is not None]
    if choices:
        return f"{{{','.join(choices)}}}", False
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(member for member in get_args(annotation) if member is not type(None))
    if get_origin(annotation) is list:
        return _type_name(get_args(annotation)[0])[0], True
    if annotation is bool:
        return "{true,false}", False
    return {int: "INT", float: "FLOAT"}.get(annotation, "TEXT"), False


def given_flags(argv: list[str] | None = None) -> set[str]:
    """Return the names of the flags on a command line.

    Args:
        argv: The command line without the program's name. Defaults to `sys.argv[1:]`.

    Example:
        >>> sorted(given_flags(["--source", "photos", "--num-test=5"]))
        ['num_test', 'source']
    """
    words = sys.argv[1:] if argv is None else argv
    return {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def _argument_groups(cls: type) -> list[type]:
    """Split the dataclass into one per group, because HfArgumentParser shows one group of flags per dataclass."""
    fields, hints = {f.name: f for f in dataclasses.fields(cls) if f.init}, get_type_hints(cls)
    titles = {name: title for title, names in _GROUPS.items() for name in names.split()}
    groups = []
    for title in ("this script", *_GROUPS):
        members = [name for name in fields if titles.get(name, "this script") == title]
        if members:
            group = dataclasses.make_dataclass(
                title.replace(" ", "_"),
                [(name, hints[name], _copy(cls, fields[name])) for name in members],
                namespace={"_argument_group_name": title},
                kw_only=True,
            )
            groups.append(group)
    return groups


def _copy(cls: type, source: dataclasses.Field) -> Any:
    """Copy a field. A field without help, as in `max_steps: int = 3000`, gets the help of the field it overrides."""
    bases = [vars(base).get("__dataclass_fields__", {}) for base in cls.__mro__]
    metadata = next((b[source.name].metadata for b in bases if source.name in b and b[source.name].metadata), {})
    return field(default=source.default, default_factory=source.default_factory, metadata=metadata)


def _choices(annotation: Any) -> tuple:
    """Return the values of `Literal[...]` or `Literal[...] | None`, or () for other annotations."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    values = [value for member in members if get_origin(member) is Literal for value in get_args(member)]
    return (*values, None) if values and type(None) in members else tuple(values)


def _unknown_flag(flag: str, known: list[str]) -> str:
    name = flag.split("=")[0].lstrip("-").replace("-", "_")
    if not flag.startswith("--"):
        return f"{flag!r} is not a flag. Write flags as --name value; --help lists them."
    close = suggest_flag(name, known)
    hint = f" Did you mean --{close}?" if close else ""
    return f"--{name} is an unknown flag.{hint} --help lists all."


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
