"""Compare the slot U-Net with `UNet2DConditionModel` of diffusers, and cached latents with recomputed latents.

    scripts/run python scripts/benchmarks/slot_diffusion.py [--architecture small] [--output json]

Both networks have the same widths, layers per level and attention resolutions, and each is also measured as
channels_last. The benchmark uses one thread and reports, for training steps (forward, backward, Adam) and sampling
steps (forward):

- CPU milliseconds, the median of interleaved repetitions;
- the peak memory of the tensors in a step, without weights and optimizer state;
- the increase of the peak memory of a fresh process by two steps, the median of five processes.

Then it measures a training step of slot diffusion in time and in floating-point operations, with cached latents and
with images that are encoded in each step. It uses the default sizes and the published sizes. The goals are
at most the time and the memory of diffusers, and 0.8 of the time with cached latents.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hf_dl.models.latent_autoencoder import encode_latents, make_autoencoder
from hf_dl.models.slot_autoencoder import SlotAutoencoderModel
from hf_dl.models.slot_config import SlotAutoencoderConfig
from hf_dl.models.slot_unet import ARCHITECTURES
from hf_dl.recipes import slot_diffusion
from hf_dl.recipes.scene_images import SceneFlags
from hf_dl.training.errors import explain_errors

SLOTS = 5
NETWORKS = {  # name: kind of the network, memory format
    "diffusers": ("unet2d", torch.contiguous_format),
    "diffusers, channels last": ("unet2d", torch.channels_last),
    "ours": ("slot_unet", torch.contiguous_format),
    "ours, channels last": ("slot_unet", torch.channels_last),
}
Steps = dict[str, Callable[[], object]]


def read_fields(architecture: str) -> dict[str, Any]:
    """Return the sizes of an architecture for latents in patches, because the network of diffusers cuts no patches."""
    fields = {"in_channels": 3, "patch_size": 1} | ARCHITECTURES[architecture]
    patch = fields["patch_size"]
    channels, size = fields["in_channels"] * patch**2, fields["sample_size"] // patch
    return fields | {"in_channels": channels, "sample_size": size, "patch_size": 1}


def make_network(name: str, architecture: str) -> torch.nn.Module:
    """Create one of `NETWORKS` with a fixed seed."""
    torch.manual_seed(0)
    kind, memory_format = NETWORKS[name]
    return slot_diffusion.make_unet(kind, read_fields(architecture)).to(memory_format=memory_format)


def make_steps(name: str, architecture: str, batch: int) -> Steps:
    """Return a training step and a sampling step of a network, on random inputs."""
    network, fields = make_network(name, architecture), read_fields(architecture)
    size, generator = fields["sample_size"], torch.Generator().manual_seed(1)
    noisy = torch.randn(batch, fields["in_channels"], size, size, generator=generator).to(
        memory_format=NETWORKS[name][1]
    )
    slots = torch.randn(batch, SLOTS, fields["cross_attention_dim"], generator=generator)
    times = torch.randint(1000, (batch,), generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def train() -> None:
        network.train()
        optimizer.zero_grad()
        F.mse_loss(network(noisy, times, slots).sample, noisy).backward()
        optimizer.step()

    @torch.no_grad()
    def sample() -> None:
        network.eval()
        network(noisy, torch.tensor(500), slots)

    return {"training": train, "sampling": sample}


def time_steps(steps: Steps, repetitions: int) -> dict[str, float]:
    """Return the median CPU milliseconds of each step. The repetitions are interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 2):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if repetition >= 2:
                seconds[name].append(time.process_time() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def tensor_memory(step: Callable[[], object]) -> float:
    """Return the peak memory of the tensors that a step allocates, in megabytes."""
    step()  # allocates the optimizer state and the gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes, key=lambda change: change[0]))) / 2**20


def count_operations(step: Callable[[], object]) -> int:
    """Count the floating-point operations of a step in matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_megabytes() -> float:
    """Return the largest resident memory of this process so far, in megabytes (Linux)."""
    # resource.getrusage does not work here: a child process inherits the peak of its parent.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def put_memory(name: str, what: str, architecture: str, batch: int, queue: multiprocessing.Queue) -> None:
    """Put the increase of the peak memory of this process by two steps (the second has Adam's state), in MB."""
    torch.set_num_threads(1)
    for warm_up in ("diffusers", "ours"):  # the first steps of a process load code
        make_steps(warm_up, architecture, 1)[what]()
    step = make_steps(name, architecture, batch)[what]
    before = peak_megabytes()
    step()
    step()
    queue.put(peak_megabytes() - before)


def memory_of(name: str, what: str, architecture: str, batch: int, processes: int = 5) -> float:
    """Return the median of `put_memory` over several fresh processes."""
    context, found = multiprocessing.get_context("spawn"), []
    for _ in range(processes):
        queue = context.Queue()
        process = context.Process(target=put_memory, args=(name, what, architecture, batch, queue))
        process.start()
        process.join()
        if process.exitcode:  # its queue is empty, and waiting for it would take forever
            raise RuntimeError(f"The process that measures the memory ended with exit status {process.exitcode}.")
        found.append(queue.get())
    return statistics.median(found)


@dataclass
class Flags(slot_diffusion.DiffusionFlags, SceneFlags):
    """The flags of train_slot_diffusion.py that decide about its model."""


def make_latent_steps(architecture: str, batch: int) -> Steps:
    """Return the training step of slot diffusion with cached latents, and with latents that are computed each time.

    Slots and U-Net are trained together, as published. The loss has the terms of train_slot_diffusion.py that need a
    forward pass: the error of the denoiser, and the error of the broadcast decoder. The other terms cost less than one
    percent of the step.
    """
    torch.manual_seed(0)
    published = {"image_size": 128, "unet": "clevrtex", "architecture": "resnet18", "num_slots": 11}
    published |= {"prediction_type": "epsilon", "slot_encoder": "none"}
    together = {"train_slots": True, "sketch": False, "layout_channels": 0}
    autoencoder = make_autoencoder(architecture, kind={"small": "kl", "clevrtex": "vq"}[architecture])
    with tempfile.TemporaryDirectory() as slots:
        SlotAutoencoderModel(SlotAutoencoderConfig()).save_pretrained(slots)
        flags = Flags(**together, **{"small": {"slot_encoder": slots}, "clevrtex": published}[architecture])
        model = slot_diffusion.make_model(flags, autoencoder.eval().requires_grad_(False)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    pixel_values = torch.rand(batch, 3, flags.image_size, flags.image_size) * 2 - 1
    with torch.no_grad():
        cached = encode_latents(autoencoder, pixel_values)

    def step(latents: torch.Tensor) -> None:
        optimizer.zero_grad()
        noise, times = torch.randn_like(latents), torch.randint(1000, (batch,))
        output = model(model.scheduler.add_noise(latents, noise, times), times, pixel_values=pixel_values)
        target = slot_diffusion.denoising_target(model.scheduler, latents, noise, times)
        loss = F.mse_loss(output.predicted, target)
        if output.reconstruction is not None:
            loss = loss + flags.broadcast_weight * F.mse_loss(output.reconstruction, pixel_values)
        loss.backward()
        optimizer.step()

    def encode_and_step() -> None:
        with torch.no_grad():
            latents = encode_latents(autoencoder, pixel_values)
        step(latents)

    return {"cached": lambda: step(cached), "encoded each time": encode_and_step}


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run all measurements, print a table, and write it as JSON if `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="small", help="sizes of the U-Nets")
    parser.add_argument("--batch", type=int, default=16, help="batch size")
    parser.add_argument("--repetitions", type=int, default=15, help="repetitions of each step")
    parser.add_argument("--no_published", action="store_true", help="skip the latents in the published sizes")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    results: dict[str, dict] = {"sizes": {"architecture": args.architecture, "batch": args.batch}}
    for what in ("training", "sampling"):
        steps = {name: make_steps(name, args.architecture, args.batch)[what] for name in NETWORKS}
        milliseconds, results[what] = time_steps(steps, args.repetitions), {}
        tensors = {name: tensor_memory(step) for name, step in steps.items()}
        for name in NETWORKS:
            results[what][name] = {
                "cpu_ms": round(milliseconds[name], 1),
                "speed": round(milliseconds["diffusers"] / milliseconds[name], 2),
                "tensors_mb": round(tensors[name], 1),
                "process_mb": round(memory_of(name, what, args.architecture, args.batch), 1),
                "parameters": sum(p.numel() for p in make_network(name, args.architecture).parameters()),
            }
            print(f"{what:9s} {name:26s}", results[what][name], flush=True)
        del steps
    results["latents"] = {}
    for architecture, batch, repetitions in (("small", args.batch, args.repetitions), ("clevrtex", 2, 5)):
        if architecture == "clevrtex" and args.no_published:
            continue
        steps = make_latent_steps(architecture, batch)
        milliseconds = time_steps(steps, min(repetitions, args.repetitions))
        found = {"batch": batch} | {name: round(value, 1) for name, value in milliseconds.items()}
        found["ratio"] = round(milliseconds["cached"] / milliseconds["encoded each time"], 3)
        operations = {name: count_operations(step) for name, step in steps.items()}
        found["ratio_of_operations"] = round(operations["cached"] / operations["encoded each time"], 3)
        results["latents"][architecture] = found
        print(f"latents   {architecture:26s}", found, flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
