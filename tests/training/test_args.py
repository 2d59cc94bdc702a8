import os
from dataclasses import dataclass, field, fields
from typing import Literal

import pytest
import torch

from hf_dl.training import TrainingArgs, flag_names, parse_args


@dataclass
class ScriptArgs(TrainingArgs):
    learning_rate: float = field(default=4e-4, metadata={"help": "Peak learning rate."})
    num_slots: int = field(default=5, metadata={"help": "Slots per image."})
    sizes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Sizes."})
    shadows: bool = field(default=True, metadata={"help": "Shadows."})
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_defaults_overrides_and_types():
    args = parse_args(ScriptArgs, ["--num_slots=7", "--resume", "--no_shadows", "--sizes", "3", "4", "--seed", "3"])
    assert (args.num_slots, args.resume, args.shadows, args.sizes, args.seed) == (7, True, False, [3, 4], 3)
    assert args.learning_rate == 4e-4 and args.mixed_precision is None
    assert type(args) is ScriptArgs
    assert args.output_dir == "runs/test_args"


def test_every_flag_has_help_and_a_group():
    from hf_dl.training.args import _GROUPS

    grouped = " ".join(_GROUPS.values()).split()
    assert sorted(grouped) == sorted(flag_names(TrainingArgs))
    assert all(f.metadata["help"].endswith(".") or "..." in f.metadata["help"] for f in fields(TrainingArgs))


def test_help_shows_groups_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(ScriptArgs, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        *("this script:", "optimization:", "--num_slots INT Slots per image. (default: 5)", "(default: 0.0004)"),
        *("--sizes INT [INT ...] Sizes. (default: 1 2)", "(default: true; --no_shadows sets false)"),
        *("--seed INT Seed for weights", "--monitor TEXT Logged metric", "early stopping. (default: not set)"),
        "--optimizer {adam,adamw,sgd} Update rule: adam, adamw, sgd, or timm:NAME",  # the inherited text
        "such as timm:lamb. (default: sgd)",  # its own default
    ):
        assert words in text


@dataclass
class EpochArgs(TrainingArgs):
    max_steps: int = 0
    epochs: float = 5.0


@pytest.mark.parametrize(
    ("cls", "argv", "steps", "epochs"),
    [
        (EpochArgs, [], 0, 5.0),
        (EpochArgs, ["--max_steps=60"], 60, 0.0),
        (EpochArgs, ["--max-steps", "60", "--epochs", "2"], 60, 0.0),  # as in transformers
        (EpochArgs, ["--max_steps=60", "--epochs=0"], 60, 0.0),
        (EpochArgs, ["--epochs=2", "--max_steps=0"], 0, 2.0),
        (TrainingArgs, [], 1000, 0.0),
        (TrainingArgs, ["--epochs=2"], 0, 2.0),
        (TrainingArgs, ["--epochs=2", "--max_steps=1000"], 1000, 0.0),
        (TrainingArgs, ["--epochs=0"], 1000, 0.0),
    ],
)
def test_given_steps_replace_epochs(cls, argv, steps, epochs):
    args = parse_args(cls, argv)
    assert (args.max_steps, args.epochs) == (steps, epochs)


def test_the_length_is_also_clear_without_a_command_line():
    assert TrainingArgs(epochs=2).max_steps == 0
    assert EpochArgs(max_steps=60).max_steps == 60  # more than 0, so epochs does not count
    with pytest.raises(ValueError, match="epochs=0.0 train nothing"):
        EpochArgs(epochs=0.0)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--learning_rat", "1"], "--learning_rat is an unknown flag. Did you mean --learning_rate?"),
        (["--num-slot=3"], "--num_slot is an unknown flag. Did you mean --num_slots?"),
        (["--lr", "3"], "--lr is an unknown flag. Did you mean --learning_rate?"),
        (["--bs=3"], "Did you mean --batch_size?"),
        (["--wd", "3"], "Did you mean --weight_decay?"),
        (["--out", "runs"], "Did you mean --output_dir?"),
        (["--num-epochs", "3"], "Did you mean --epochs?"),
        (["--steps", "3"], "Did you mean --max_steps?"),
        (["--qqqq"], "--qqqq is an unknown flag. --help lists all."),
        (["stray"], "'stray' is not a flag"),
        (["--schedule", "cos"], "invalid choice: 'cos'"),
        (["--max_steps", "0"], "max_steps=0 and epochs=0.0 train nothing; one of them must be above 0."),
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--batch_size", "10", "--accumulation", "4"], "batch_size=10 must be a multiple of accumulation=4"),
    ],
)
def test_what_is_refused(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(ScriptArgs, argv)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1 must be 0 or above"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0"),
        ({"momentum": 1.0}, "momentum=1.0 must be at least 0 and below 1"),
        ({"optimizer": "adm"}, "optimizer='adm' is unknown; choose one of adam, adamw, sgd"),
        ({"mixed_precision": "half"}, "mixed_precision='half' is unknown; choose one of no, fp16, bf16"),
        ({"schedule": "halving"}, "needs half_life"),
        ({"patience": 3}, "patience=3 needs monitor"),
        ({"monitor": "val_loss"}, "monitor='val_loss' needs eval_every or eval_epochs"),
        ({"decay_at": [0.5, 1.0]}, "must be fractions of the run, each above 0 and below 1"),
        ({"decay_factor": 0.0}, "decay_factor=0.0 must be above 0 and at most 1"),
        ({"eval_epochs": -1.0}, "eval_epochs=-1.0 must be 0 or above"),
    ],
)
def test_values_are_checked_without_a_command_line_too(values, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        TrainingArgs(**values)


def test_flag_names():
    names = flag_names(ScriptArgs)
    assert set(names) - set(flag_names(TrainingArgs)) == {"num_slots", "sizes", "shadows"}
    assert len(names) == len(set(names))


def test_the_seed_is_set():
    parse_args(ScriptArgs, ["--seed", "5"])
    first = torch.rand(3)
    parse_args(ScriptArgs, ["--seed", "5"])
    assert torch.equal(first, torch.rand(3))


def test_threads_are_set_although_the_launcher_asks_for_one(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 of `accelerate launch` does
    parse_args(TrainingArgs, [])
    assert torch.get_num_threads() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    parse_args(TrainingArgs, [])
    assert torch.get_num_threads() == 1
    parse_args(TrainingArgs, ["--cpu_threads", "2"])
    assert torch.get_num_threads() == 2


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run" / "a"):
        with pytest.raises(SystemExit):
            parse_args(TrainingArgs, [f"--output_dir={folder}"])
        assert f"output_dir='{folder}' cannot be written: '{tmp_path}/file' is a file." in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(SystemExit):
        parse_args(TrainingArgs, [f"--output_dir={tmp_path}/new/run"])
    assert f"cannot be written: '{tmp_path}' is not writable. Choose another folder." in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
