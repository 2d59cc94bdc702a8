"""Compare slot attention with the PyPI package `slot-attention`, and measure the speed of scene rendering.

    scripts/run --group benchmark python scripts/benchmarks/slots.py [--output json]

Takes two minutes on two cores. Each step is forward and backward (inputs and all weights) at batch size 16, with 1,024
tokens of 64 channels, 7 slots and 3 iterations, on one thread. The benchmark reports CPU milliseconds (median of
interleaved repetitions) and the ratio to the package. Expected: at least 1.3 with the full gradient and 2.5 with
implicit differentiation. It also reports the largest difference between the results with equal weights, the peak
memory, and rendered scenes per second.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_dl.data import scenes
from hf_dl.models.layers_attention import SlotAttention
from hf_dl.training.errors import explain_errors

BATCH, TOKENS, DIM, SLOTS, ITERATIONS = 16, 1024, 64, 7, 3


def make_pair() -> tuple[torch.nn.Module, SlotAttention]:
    """Return the module of the package, and ours with the same weights."""
    try:
        from slot_attention import SlotAttention as PeerSlotAttention
    except ModuleNotFoundError:
        command = "scripts/run --group benchmark python scripts/benchmarks/slots.py"
        raise ImportError(f"The package slot-attention is missing. Run `{command}`.") from None
    torch.manual_seed(0)
    peer = PeerSlotAttention(num_slots=SLOTS, dim=DIM, iters=ITERATIONS, hidden_dim=2 * DIM)
    ours = SlotAttention(DIM, DIM, mlp_dim=2 * DIM, qkv_bias=True)
    names = {"norm_input": "norm_inputs", "norm_pre_ff": "norm_mlp"}
    weights = {}
    for name, tensor in peer.state_dict().items():
        module, _, rest = name.partition(".")
        if rest:  # the other two are the Gaussian of the initial slots
            weights[f"{names.get(module, module)}.{rest}"] = tensor
    ours.load_state_dict(weights)
    return peer, ours


def make_steps() -> dict[str, Callable[[], torch.Tensor]]:
    """Return a forward and backward step per module. The steps start from equal slots and return the final slots."""
    peer, ours = make_pair()
    inputs = torch.randn(BATCH, TOKENS, DIM, generator=torch.Generator().manual_seed(1))

    def initial() -> torch.Tensor:
        torch.manual_seed(2)  # the package draws from the global generator
        sigma = peer.slots_logsigma.exp().expand(BATCH, SLOTS, -1)
        return peer.slots_mu.expand(BATCH, SLOTS, -1) + sigma * torch.randn(BATCH, SLOTS, DIM)

    def backward(module: torch.nn.Module, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = inputs.clone().requires_grad_()
        module.zero_grad()
        slots = run(x)
        slots.square().mean().backward()
        return slots.detach()

    def run_peer(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)
        return peer(x)

    def run_ours(gradient: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: ours(x, initial(), num_iterations=ITERATIONS, gradient=gradient)[0]

    return {
        "slot-attention": lambda: backward(peer, run_peer),
        "ours, full": lambda: backward(ours, run_ours("full")),
        "ours, implicit": lambda: backward(ours, run_ours("implicit")),
    }


def time_steps(repetitions: int) -> dict[str, float]:
    """Return the median CPU milliseconds of each step. The repetitions are interleaved."""
    steps = make_steps()
    seconds = {name: [] for name in steps}
    for repetition in range(repetitions + 3):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if repetition >= 3:
                seconds[name].append(time.process_time() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def peak_megabytes() -> float:
    """Return the largest resident memory of this process so far, in megabytes (Linux)."""
    # resource.getrusage does not work here: a child process inherits the peak of its parent.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def put_memory(name: str, queue: multiprocessing.Queue) -> None:
    """Put the increase of the peak memory of this process by one step, in megabytes."""
    torch.set_num_threads(1)
    step = make_steps()[name]
    before = peak_megabytes()
    step()
    queue.put(peak_megabytes() - before)


def memory_of(name: str) -> float:
    """Return the result of `put_memory` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=put_memory, args=(name, queue))
    process.start()
    megabytes = queue.get()
    process.join()
    return megabytes


def scenes_per_second(style: str, size: int, count: int = 256) -> float:
    """Return how many scenes per second are drawn, rendered and described on all threads."""
    list(scenes.load("test", style=style, size=size, num_scenes=32, seed=1, streaming=True))
    start = time.perf_counter()
    list(scenes.load("test", style=style, size=size, num_scenes=count, streaming=True))
    return count / (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run all measurements, print a table, and write it as JSON if `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--repetitions", type=int, default=40, help="repetitions of each step")
    args = parser.parse_args(argv)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = make_steps()
    expected = steps["slot-attention"]()
    milliseconds = time_steps(args.repetitions)
    results: dict[str, dict] = {"slot attention": {}}
    for name, step in steps.items():
        results["slot attention"][name] = {
            "cpu_ms": round(milliseconds[name], 2),
            "speed": round(milliseconds["slot-attention"] / milliseconds[name], 2),
            "largest_difference": (step() - expected).abs().max().item(),
            "peak_mb": round(memory_of(name), 1),
        }
        print(f"{name:16s}", results["slot attention"][name], flush=True)
    torch.set_num_threads(max(threads, 2))
    results["scenes per second"] = {
        f"{style} {size}": round(scenes_per_second(style, size), 1)
        for style, size in (("plain", 64), ("plain", 128), ("textured", 64), ("textured", 128))
    }
    print("scenes per second", results["scenes per second"], flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
