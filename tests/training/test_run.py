"""Tests of `TrainingRun`. The file is long because resume, faults, processes and the loop share its toy runs."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import nn

from hf_dl.training import TrainingArgs, TrainingRun, checkpoint
from hf_dl.training.batches import Share, batches

from . import toy_train

ROOT = Path(__file__).parents[2]
# dropout also turns on noise from run.generator and augmentation from every global generator
EVERYTHING = (
    "--max_steps=40 --dropout=0.2 --ema_decay=0.9 --accumulation=2 --schedule=cosine --warmup_steps=5 --momentum=0.8 "
    "--optimizer=sgd --learning_rate=0.05 --max_grad_norm=1 --save_every=10 --log_every=3 --eval_every=8 "
    "--monitor=val_loss"
).split()


@pytest.fixture(autouse=True)
def _fresh_state():
    """One thread, and no Accelerate state from another test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train(folder, *flags):
    return toy_train.main(argv(folder, *flags))


def argv(folder, *flags):
    return [f"--output_dir={folder}", "--cpu_threads=1", *flags]


@pytest.fixture(scope="module")
def spawn():
    """Start the toy script in a process of its own; the server has imported everything, so it takes no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.training.toy_train"])
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # the server starts without pytest's sys.path

    def start(folder, *flags, rank=None, port=None, stderr=None):
        environment = {} if rank is None else variables_of(rank, port)
        process = context.Process(target=toy_train.main_as_rank, args=(environment, argv(folder, *flags), stderr))
        process.start()
        return process

    yield start
    os.environ.pop("PYTHONPATH")
    if former is not None:
        os.environ["PYTHONPATH"] = former


def variables_of(rank, port):
    """Return the environment variables of one of two CPU processes."""
    variables = {"ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return variables | {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def read_log(folder, key=None):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return lines if key is None else [line[key] for line in lines if key in line]


def assert_same_run(left, right):
    """The weights and the log, except for times, are the same to the bit."""
    for name in ("model.safetensors", "best/model.safetensors"):
        if not (Path(left) / name).exists():
            assert not (Path(right) / name).exists()
            continue
        a, b = load_file(Path(left) / name), load_file(Path(right) / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    logs = [[{**line, "seconds": 0} for line in read_log(folder) if "event" not in line] for folder in (left, right)]
    assert logs[0] == logs[1]


def newest(folder):
    return sorted((Path(folder) / "checkpoints").iterdir())[-1]


# ------------------------------------------------------------------------------------------ one process = two = 4x


@pytest.fixture(scope="module")
def spawn_two(spawn):
    def run(folder, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        errors = Path(f"{folder}.txt")
        errors.write_text("")
        options = {"port": port, "stderr": str(errors)}
        processes = [spawn(folder, "--expect_processes=2", *flags, rank=rank, **options) for rank in range(2)]
        for process in processes:
            process.join(300)
        sys.stderr.write(errors.read_text())  # the server has the standard error of the test that started it
        return [process.exitcode for process in processes]

    return run


def test_the_shipped_configuration_starts_two_such_processes(start_fresh, tmp_path):
    (tmp_path / "show.py").write_text("import json, os\nos.write(1, json.dumps(dict(os.environ)).encode() + b'\\n')")
    words = ["--main_process_port", "0", "--config_file", str(ROOT / "scripts/accelerate/two_cpu_processes.yaml")]
    code = "import runpy; runpy.run_module('accelerate.commands.launch', run_name='__main__')"
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = start_fresh(code, *words, "show.py", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    found = sorted(map(json.loads, done.stdout.splitlines()), key=lambda variables: variables["RANK"])
    assert len(found) == 2
    for rank, variables in enumerate(found):
        expected = variables_of(rank, variables["MASTER_PORT"])
        assert {name: variables.get(name) for name in expected} == expected


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, spawn_two):
    folder = tmp_path_factory.mktemp("two") / "run"
    assert spawn_two(folder, *PARITY) == [0, 0]
    return folder


PARITY = (
    "--max_steps=24 --ema_decay=0.9 --schedule=cosine --warmup_steps=4 --learning_rate=0.02 --max_grad_norm=0.5 "
    "--eval_every=12 --weight_decay=0.1"
).split()


def test_two_processes_and_accumulation_give_the_same_run(two_processes, tmp_path):
    train(tmp_path / "one", *PARITY)
    train(tmp_path / "four", *PARITY, "--accumulation=4")
    for key in ("loss", "twice", "grad_norm", "learning_rate", "val_loss"):
        one = torch.tensor(read_log(tmp_path / "one", key))
        assert len(one) == (2 if key == "val_loss" else 24)
        assert one.std() > 1e-3
        for other in (two_processes, tmp_path / "four"):
            torch.testing.assert_close(torch.tensor(read_log(other, key)), one, atol=1e-5, rtol=0)
    one = load_file(tmp_path / "one/model.safetensors")
    for other in (two_processes, tmp_path / "four"):
        weights = load_file(other / "model.safetensors")
        for name in weights.keys() - {"calls"}:  # counts pieces
            torch.testing.assert_close(weights[name], one[name], atol=1e-5, rtol=0)
    results = json.loads((two_processes / "results.json").read_text())
    assert results["num_processes"] == 2


def test_two_processes_evaluate_each_example_once(two_processes):
    assert read_log(two_processes, "val_examples") == [101, 101]  # 101 is no multiple of 2 or 12


def test_the_cosine_is_at_half_at_half_time_under_two_processes(two_processes):
    rates = read_log(two_processes, "learning_rate")
    expected = [0.02 * (s + 1) / 4 for s in range(4)]
    expected += [0.02 * 0.5 * (1 + math.cos(math.pi * (s - 4) / 20)) for s in range(4, 24)]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert rates[14] == pytest.approx(0.01)


def test_two_processes_interrupted_stop_at_one_step_and_resume_to_the_bit(spawn_two, tmp_path, capfd):
    assert spawn_two(tmp_path / "whole", *EVERYTHING) == [0, 0]
    # the signal comes after step 17, and the processes agree on it in step 18
    assert spawn_two(tmp_path / "cut", *EVERYTHING, "--interrupt_at=17") == [128 + signal.SIGTERM] * 2
    assert "Interrupted at step 18. Continue" in capfd.readouterr().err
    assert spawn_two(tmp_path / "cut", *EVERYTHING, "--resume") == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(newest(tmp_path / "cut"))  # as if killed before the last checkpoint
    assert spawn_two(tmp_path / "cut", *EVERYTHING, "--resume") == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_two_processes_restart_and_share_a_stream(spawn_two, tmp_path):
    assert spawn_two(tmp_path, *EVERYTHING, "--restart_at=16", "--stream", "--dropout=0") == [0, 0]
    train(tmp_path / "one", *EVERYTHING, "--restart_at=16", "--stream", "--dropout=0")
    losses = [read_log(folder, "loss") for folder in (tmp_path, tmp_path / "one")]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-5, rtol=0)
    assert read_log(tmp_path, "event") == ["restart"]


# ----------------------------------------------------------------------------------------------- killed and resumed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, spawn):
    def run(*flags):
        folder = tmp_path_factory.mktemp("whole") / "run"
        process = spawn(folder, *EVERYTHING, *flags)
        process.join(300)
        assert process.exitcode == 0
        return folder

    return run


@pytest.mark.parametrize("flags", [[], ["--restart_at=16"], ["--stream"]], ids=["plain", "restart", "stream"])
def test_killed_at_random_moments_it_ends_with_the_same_weights(flags, uninterrupted, spawn, tmp_path):
    whole = uninterrupted(*flags)
    moments, kills = random.Random(0), 0
    for _ in range(20):
        process = spawn(tmp_path / "cut", *EVERYTHING, *flags, "--resume", "--pause=0.05")
        process.join(moments.uniform(0.3, 1.5) if kills < 4 else 300)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills >= 1
    assert_same_run(whole, tmp_path / "cut")
    if flags == ["--restart_at=16"]:
        results = json.loads((tmp_path / "cut/results.json").read_text())
        assert (results["restarts"], results["steps"]) == (1, 40)


def test_killed_while_writing_checkpoints_it_ends_with_the_same_weights(uninterrupted, spawn, tmp_path):
    whole = uninterrupted()
    for number in (1, 2, 7, 4, 5):  # model, optimizer, ..., of the first or second checkpoint this process writes
        process = spawn(tmp_path, *EVERYTHING, "--resume", f"--kill_in_write={number}")
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
        assert list((tmp_path / "checkpoints").glob(".writing-step_*"))
    process = spawn(tmp_path, *EVERYTHING, "--resume")
    process.join(300)
    assert process.exitcode == 0
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert_same_run(whole, tmp_path)


def test_workers_draw_the_same_augmentation(tmp_path):
    flags = ("--max_steps=6", "--dropout=0.2", "--accumulation=2", "--save_every=0")
    train(tmp_path / "none", *flags)
    train(tmp_path / "two", *flags, "--num_workers=2")
    assert_same_run(tmp_path / "none", tmp_path / "two")


def test_interrupted_it_saves_and_says_how_to_go_on(tmp_path, capfd):
    train(tmp_path / "whole", *EVERYTHING)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "cut", *EVERYTHING, "--interrupt_at=17")
    assert stop.value.code == 128 + signal.SIGTERM
    assert "Interrupted at step 17. Continue with the same command and --resume." in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    train(tmp_path / "cut", *EVERYTHING, "--resume")
    assert "at step 17" in capfd.readouterr().err
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_resumes_to_the_same_end_and_can_be_extended(tmp_path):
    train(tmp_path / "run", *EVERYTHING)
    before = load_file(tmp_path / "run/model.safetensors")
    computed = json.loads((tmp_path / "run/results.json").read_text())["cpu_seconds"]
    train(tmp_path / "run", *EVERYTHING, "--resume")
    assert json.loads((tmp_path / "run/results.json").read_text())["cpu_seconds"] > 0.5 * computed > 0
    after = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(tmp_path / "run", *EVERYTHING, "--resume", "--max_steps=44")
    assert json.loads((tmp_path / "run/results.json").read_text())["steps"] == 44


# ---------------------------------------------------------------------------------------- damaged files, full disks


def cut_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip_bit(folder):
    data = bytearray((folder / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "optimizer.safetensors").write_bytes(data)


def drop_manifest(folder):
    (folder / "manifest.json").unlink()


def drop_file(folder):
    (folder / "average.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_file, r"model.safetensors has \d+ of \d+ bytes"),
        (flip_bit, "optimizer.safetensors has a wrong checksum"),
        (drop_manifest, "manifest.json is missing or unreadable"),
        (drop_file, "average.safetensors is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_last_good_one_used(damage, words, tmp_path, capfd):
    train(tmp_path, *EVERYTHING)
    before = load_file(tmp_path / "model.safetensors")
    damage(newest(tmp_path))
    train(tmp_path, *EVERYTHING, "--resume")
    err = capfd.readouterr().err
    assert re.search(rf"step_00000040 is damaged \({words}\) and was skipped\.", err)
    assert "Resuming from" in err and "at step 30" in err
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_with_no_good_checkpoint_it_starts_at_zero_and_says_so(tmp_path, capfd):
    train(tmp_path, "--max_steps=4", "--save_every=2")
    for folder in (tmp_path / "checkpoints").iterdir():
        drop_manifest(folder)
    train(tmp_path, "--max_steps=4", "--save_every=2", "--resume")
    err = capfd.readouterr().err
    assert err.count("is damaged") == 2
    assert "no checkpoint to resume from. Starting at step 0" in err
    assert read_log(tmp_path, "step") == [1, 2, 3, 4]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path, "--max_steps=2", "--save_every=2")
    with pytest.raises(ValueError, match="does not fit this model. Resume with the flags of the original run"):
        train(tmp_path, "--max_steps=2", "--save_every=2", "--resume", "--width=9")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_checkpoint_of_another_optimizer_is_refused(optimizer, tmp_path):
    train(tmp_path, "--max_steps=2", "--save_every=2")
    kind = "SGD" if optimizer == "sgd" else "Adam"
    with pytest.raises(
        ValueError, match=f"has the state of AdamW, but the flags select {kind}. Resume with the flags"
    ):
        train(tmp_path, "--max_steps=3", "--save_every=2", "--resume", f"--optimizer={optimizer}")


def test_changed_data_is_refused_unless_a_flag_accepts_it(tmp_path, capfd, monkeypatch):
    train(tmp_path, "--max_steps=2", "--save_every=2")
    more = ("--max_steps=3", "--save_every=2", "--resume")
    with pytest.raises(
        ValueError, match=r"102 training examples instead of 101. Changed flags: num_examples. Restore"
    ):
        train(tmp_path, *more, "--num_examples=102")
    make = toy_train.make_data
    monkeypatch.setattr(toy_train, "make_data", lambda number: make(number)[::-1])
    with pytest.raises(ValueError, match="other content or another order of the training examples.* go on with --acc"):
        train(tmp_path, *more)
    train(tmp_path, *more, "--accept_changed_data")
    err = capfd.readouterr().err
    assert "was written: other content or another order of the training examples. The run goes on." in err
    assert "Resuming from" in err and "Changed flags" not in err


def test_changed_flags_are_named(tmp_path, capfd):
    train(tmp_path, "--max_steps=2", "--save_every=2")
    train(tmp_path, "--max_steps=3", "--save_every=2", "--resume", "--learning_rate=0.5")
    assert "Changed flags: learning_rate. The result will differ from an uninterrupted run." in capfd.readouterr().err


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, capfd, monkeypatch):
    write, calls = checkpoint.write_file, itertools.count(1)

    def full(path, data):
        if next(calls) in (6, 7):  # the first files of the second and third checkpoint
            path.write_bytes(data[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_file", full)
    kept = []
    monkeypatch.setattr(checkpoint, "keep_newest", lambda root, n: kept.append(sorted(p.name for p in root.iterdir())))
    train(tmp_path / "full", "--max_steps=40", "--save_every=10", "--keep_last=0")
    err = capfd.readouterr().err
    for step in (20, 30):
        assert (
            f"checkpoint of step {step} could not be written (No space left on device); the last good checkpoint is"
            in err
        )
    assert kept == [["step_00000010"], ["step_00000010", "step_00000040"]]
    events = [line for line in read_log(tmp_path / "full") if line.get("event") == "checkpoint_failed"]
    assert [line["step"] for line in events] == [20, 30]
    monkeypatch.undo()
    train(tmp_path / "whole", "--max_steps=40", "--save_every=10")
    assert read_log(tmp_path / "full", "loss") == read_log(tmp_path / "whole", "loss")


def test_a_full_disk_of_the_log_is_told_once(tmp_path, capfd, monkeypatch):
    def full(self, line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hf_dl.training.progress.LogFile.append", full)
    train(tmp_path, "--max_steps=4", "--save_every=2")
    assert capfd.readouterr().err.count("could not be written (No space left on device); the run continues.") == 1


def test_a_full_disk_at_the_end_is_a_sentence_and_resume_finishes(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(toy_train.ToyModel, "save_pretrained", full)
    with pytest.raises(OSError, match="could not be saved to .*No space left.*Free some disk space .* --resume"):
        train(tmp_path, "--max_steps=4", "--save_every=4")
    assert not (tmp_path / "results.json").exists()
    monkeypatch.undo()
    train(tmp_path, "--max_steps=4", "--save_every=4", "--resume")
    assert (tmp_path / "results.json").exists() and (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(OSError, match="Free some disk space"):
            train(disk, "--max_steps=600", "--save_every=100", "--keep_last=0")  # the log fills it first
        err = capfd.readouterr().err
        assert "could not be written (No space left on device)" in err
        assert not list((disk / "checkpoints").glob(".*"))
        good, _ = checkpoint.newest_good(disk / "checkpoints")
        assert good is not None
        for line in (disk / "log.jsonl").read_text().splitlines():
            json.loads(line)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_starting_over_keeps_the_former_checkpoints_aside(tmp_path, capfd):
    train(tmp_path, "--max_steps=4", "--save_every=2")
    train(tmp_path, "--max_steps=2", "--save_every=1", "--log_every=2")
    assert "contains an earlier run. Starting over" in capfd.readouterr().err
    assert sorted(p.name for p in (tmp_path / "checkpoints_old").iterdir()) == ["step_00000002", "step_00000004"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
    assert read_log(tmp_path, "step") == [2]


def test_a_folder_replaced_by_halves_comes_back(tmp_path):
    (tmp_path / ".former-best").mkdir()
    (tmp_path / ".writing-best").mkdir()
    checkpoint.tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_the_optimizer_state_survives_packing():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors, rest = checkpoint.pack_optimizer(optimizer.state_dict())
    again = torch.optim.AdamW(model.parameters(), lr=9.0)
    again.load_state_dict(checkpoint.unpack_optimizer(tensors, json.loads(json.dumps(rest))))
    for old, new in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


# --------------------------------------------------------------------------------------------------- the loop itself


class Line(nn.Module):
    """One weight; its loss has the gradient of the batch's mean."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[weight]]))

    def forward(self, x):
        return (self.weight * x).mean()


def make_run(folder, data=(2.0,), model=None, **flags):
    flags = {"max_steps": 6, "batch_size": 1, "log_every": 1, "save_every": 0, **flags}
    return TrainingRun(
        TrainingArgs(output_dir=str(folder), **flags), model or Line(), [torch.tensor([v]) for v in data]
    )


def test_sgd_ema_and_clipping_against_a_hand_computation(tmp_path):
    run = make_run(tmp_path, optimizer="sgd", learning_rate=0.1, momentum=0.5, ema_decay=0.3, max_grad_norm=0.5)
    weight = average = 1.0
    velocity = 0.0
    for step, batch in enumerate(run, start=1):
        run.step(run.model(batch))
        velocity = 0.5 * velocity + 0.5  # the gradient 2 is clipped to 0.5
        weight -= 0.1 * velocity
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
        assert run.unwrapped.weight.item() == pytest.approx(weight, rel=1e-4)
        with run.averaged():
            assert run.unwrapped.weight.item() == pytest.approx(average, rel=1e-4)
        assert run.unwrapped.weight.item() == pytest.approx(weight, rel=1e-4)
    run.finish()
    assert load_file(tmp_path / "model.safetensors")["weight"].item() == pytest.approx(average, rel=1e-4)
    assert read_log(tmp_path, "grad_norm") == pytest.approx([2.0] * 6)


def test_weight_decay_spares_vectors(tmp_path):
    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return 0 * (self.matrix.sum() + self.vector.sum())

    run = make_run(tmp_path, model=Zero(), learning_rate=0.1, weight_decay=0.5, max_steps=1)
    for batch in run:
        run.step(run.model(batch))
    assert run.unwrapped.matrix[0, 0].item() == pytest.approx(1 - 0.1 * 0.5)
    assert run.unwrapped.vector[0].item() == 1


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(value, tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(FloatingPointError, match=rf"loss at step 4 is {value}\. Lower learning_rate=0.001"):
        for batch in run:
            before = run.unwrapped.weight.item()
            run.step(run.model(batch) * (value if run.steps == 3 else 1))
    assert run.unwrapped.weight.item() == before
    assert run.steps == 3


def test_misuse_is_a_sentence(tmp_path):
    with pytest.raises(RuntimeError, match="was not called for this batch"):
        for _ in make_run(tmp_path):
            pass
    run = make_run(tmp_path)
    with pytest.raises(RuntimeError, match="called twice for one batch"):
        for batch in run:
            run.step(run.model(batch))
            run.step(run.model(batch))
    with pytest.raises(ValueError, match="no examples"):
        list(make_run(tmp_path, data=[]))
    with pytest.raises(ValueError, match="nothing to train"):
        make_run(tmp_path, model=nn.Tanh())
    with pytest.raises(ValueError, match="monitor='x' must name a logged metric"):
        make_run(tmp_path, monitor="x", eval_every=1).load_best()
    with pytest.raises(ValueError, match="epochs=2 needs a dataset with a length"):
        TrainingRun(TrainingArgs(output_dir=str(tmp_path), epochs=2), Line(), toy_train.Stream([1]))
    with pytest.raises(ValueError, match="eval_epochs=1 needs a dataset with a length.* Set eval_every instead"):
        TrainingRun(TrainingArgs(output_dir=str(tmp_path), eval_epochs=1), Line(), toy_train.Stream([1]))
    with pytest.raises(ValueError, match="report_to='nothere' is not installed. Install it, or choose one of: none"):
        make_run(tmp_path, report_to="nothere")


def test_due_progress_and_epochs(tmp_path):
    run = make_run(tmp_path, data=[1.0, 2.0, 3.0], epochs=3.5, batch_size=2, accumulation=2)
    assert run.max_steps == 6  # 10.5 examples in twos
    seen, progress, pieces = [], [], 0
    for batch in run:
        assert not run.due(1)
        progress.append(run.progress)
        run.step(run.model(batch))
        pieces += 1
        if run.due(4):
            seen.append(run.steps)
        assert not run.due(0)
    assert seen == [4, 6] and pieces == 12
    assert progress == [s / 6 for s in range(6) for _ in range(2)]
    assert run.progress == 1
    assert read_log(tmp_path, "epoch") == pytest.approx([2 / 3, 4 / 3, 2, 8 / 3, 10 / 3, 4], abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"eval_epochs": 1}, [2, 3, 5, 6, 7]),  # 3 examples in twos: the epochs end within these steps
        ({"eval_epochs": 2, "accumulation": 2}, [3, 6, 7]),
        ({"eval_epochs": 0.5}, [1, 2, 3, 4, 5, 6, 7]),
        ({"eval_every": 4}, [4, 7]),
        ({}, []),
    ],
)
def test_evaluation_due(tmp_path, flags, expected):
    run = make_run(tmp_path, data=[1.0, 2.0, 3.0], max_steps=7, batch_size=2, **flags)
    seen = []
    for batch in run:
        assert not run.evaluation_due
        run.step(run.model(batch))
        if run.evaluation_due:
            seen.append(run.steps)
    assert seen == expected


def test_best_early_stopping_and_keep_last(tmp_path, capfd):
    flags = {"monitor": "score", "higher_is_better": True, "patience": 2, "eval_every": 1, "save_every": 1}
    run = make_run(tmp_path, max_steps=20, keep_last=3, **flags)
    scores = [0.1, 0.5, math.nan, 0.7, 0.2, 0.7, 0.9]
    weights = []
    for batch in run:
        run.step(run.model(batch))
        weights.append(run.unwrapped.weight.item())
        run.log(score=scores[run.steps - 1])
    assert run.steps == 6
    assert "score has not improved for 2 evaluations (best: 0.7 at step 4)" in capfd.readouterr().err
    assert load_file(tmp_path / "best/model.safetensors")["weight"].item() == weights[3]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step_0000000{i}" for i in (4, 5, 6)]
    assert run.unwrapped.weight.item() == weights[5]
    run.load_best()
    assert run.unwrapped.weight.item() == weights[3]
    run.finish({"score": 0.7})
    assert load_file(tmp_path / "model.safetensors")["weight"].item() == weights[3]
    # a run that has stopped early takes no further step after a resume
    assert list(make_run(tmp_path, max_steps=20, resume=True, **flags)) == []


def test_log_lines_hold_means(tmp_path):
    run = make_run(tmp_path, max_steps=5, log_every=2)
    for number, batch in enumerate(run):
        run.step(run.model(batch) * 0 + number, number=number)
    assert read_log(tmp_path, "step") == [2, 4, 5]
    assert read_log(tmp_path, "loss") == read_log(tmp_path, "number") == [0.5, 2.5, 4]


def test_results(tmp_path):
    metrics = train(tmp_path, "--max_steps=3", "--seed=4", "--save_every=0")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["script"] == "toy_train.py"
    assert results["args"]["seed"] == results["seed"] == 4 and results["args"]["dropout"] == 0.0
    assert results["metrics"] == metrics and metrics["val_examples"] == 101
    assert (results["steps"], results["restarts"], results["num_processes"]) == (3, 0, 1)
    assert results["num_parameters"] == 4 * 8 + 8 + 8 + 1
    assert results["model_class"] == "ToyModel" and results["mixed_precision"] == "no"
    assert "1 thread" in results["device"] and results["seconds"] > 0
    assert 0 < results["cpu_seconds"] < 2 * results["seconds"] + 1  # one thread, and other work of the process
    assert {"torch", "python", "accelerate"} <= set(results["versions"])
    assert len(results["commit"]) == 40 and isinstance(results["dirty"], bool)
    assert not (tmp_path / "checkpoints").exists()
    assert toy_train.ToyModel.from_pretrained(tmp_path).config.width == 8


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "--max_steps=4", "--report_to=tensorboard", "--eval_every=2")
    (file,) = (tmp_path / "toy_train").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [e.value for e in events.Scalars("val_loss")] == pytest.approx(read_log(tmp_path, "val_loss"))


def test_bf16(tmp_path):
    train(tmp_path, "--max_steps=30", "--mixed_precision=bf16", "--learning_rate=0.03")
    losses = read_log(tmp_path, "loss")
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "results.json").read_text())["mixed_precision"] == "bf16"
    assert load_file(tmp_path / "model.safetensors")["body.0.weight"].dtype == torch.float32


def test_off_a_terminal_progress_is_a_line_now_and_then(tmp_path, capfd, monkeypatch):
    clock = itertools.count(0, 4)
    monkeypatch.setattr("hf_dl.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("hf_dl.progress._last_line", -100)
    train(tmp_path, "--max_steps=6")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert 1 <= len(lines) <= 6
    assert "/6 loss " in lines[0]


# -------------------------------------------------------------------------------------------------- order of the data


def visited(data, share, steps, **options):
    options = {"seed": 3, "collate": list, "max_steps": steps, **options}
    loader = batches(data, share, **options)
    return [[int(x) for x in batch] for _, batch in itertools.islice(loader, steps * share.accumulation)]


def test_every_example_is_seen_once_an_epoch_and_orders_differ():
    flat = sum(visited(range(10), Share(4), 10), [])
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert flat == sum(visited(range(10), Share(4), 10), [])
    assert flat != sum(visited(range(10), Share(4), 10, seed=4), [])


def test_shares_join_to_the_batches_of_one_process():
    whole = visited(range(10), Share(8), 5)
    parts = [visited(range(10), Share(8, 2, 2, rank), 5) for rank in range(2)]
    for step in range(5):
        assert whole[step] == sum((parts[rank][2 * step + i] for rank in range(2) for i in range(2)), [])
    with pytest.raises(ValueError, match="batch_size=8 must be a multiple of accumulation x processes = 1 x 3"):
        Share(8, 1, 3, 0)


@pytest.mark.parametrize("kind", ["map", "torch stream", "datasets stream"])
def test_a_loader_opened_in_the_middle_goes_on_as_the_first_would_have(kind):
    data = {
        "map": lambda: range(10),
        "torch stream": lambda: toy_train.Stream(list(range(10))),
        "datasets stream": lambda: (
            datasets.Dataset.from_dict({"i": list(range(10))})
            .to_iterable_dataset(num_shards=2)
            .shuffle(seed=1, buffer_size=4)
        ),
    }[kind]
    collate = (lambda rows: [row["i"] for row in rows]) if kind == "datasets stream" else list
    first = batches(data(), Share(4), seed=3, collate=collate, max_steps=12)
    first = list(itertools.islice(first, 12))
    assert sorted(sum((b for _, b in first[:5]), [])) == sorted([*range(10)] * 2)
    assert [b for _, b in first[:5]] != [b for _, b in first[5:10]]
    for step in range(1, 12):
        rest = batches(data(), Share(4), seed=3, collate=collate, max_steps=12, step=step, position=first[step - 1][0])
        assert list(itertools.islice(rest, 12 - step)) == first[step:]


def test_datasets_are_fetched_by_the_batch():
    data = datasets.Dataset.from_dict({"i": list(range(10))}).with_format("torch")
    (_, batch), *_ = batches(data, Share(4), seed=0, collate=torch.utils.data.default_collate, max_steps=1)
    assert batch["i"].shape == (4,)


def test_an_empty_stream_is_a_sentence():
    with pytest.raises(ValueError, match=r"train_data \(Stream\) yielded no example in epoch 0"):
        next(iter(batches(toy_train.Stream([]), Share(4), seed=0, collate=list, max_steps=1)))
