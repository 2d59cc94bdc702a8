"""Compare our beam search with the beam search of transformers, and with one forward pass per hypothesis.

    scripts/run python scripts/benchmarks/beam_search.py [--output json]

Takes two minutes. All searches use one thread and the same model: a BiLSTM with attention in the default sizes, with
random weights and 170 symbols. They decode 64 problems of 20 to 40 words with 10 hypotheses and 40 steps. The end
token is never chosen. The benchmark reports:

- CPU seconds, the median of interleaved repetitions;
- the ratio to our search. Expected: at least 5 for one pass per hypothesis, and at least 1 for transformers;
- the megabytes that one search adds to the peak memory of a fresh process (Linux);
- "same", the fraction of problems with the same program as ours. A few differ because two hypotheses tie in float32.

The last row is our search with the grammar, which masks invalid programs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch

from hf_dl.models import ProgramSeq2SeqConfig, ProgramSeq2SeqForConditionalGeneration
from hf_dl.models.beam_search import Constraint
from hf_dl.models.program_config import program_vocabulary
from hf_dl.training.errors import explain_errors

EXPECTED = {"one by one": 5.0, "transformers": 1.0}  # smallest expected CPU time relative to our search
EXPECTED_SAME = 0.9


def make_model() -> ProgramSeq2SeqForConditionalGeneration:
    """Create a model with random weights that never ends a program."""
    torch.manual_seed(0)
    arities = {f"operation_{i}": 1 + i % 3 for i in range(53)}
    tokens = program_vocabulary(list(arities), [f"const_{i}" for i in range(31)])
    config = ProgramSeq2SeqConfig(encoder_vocab_size=8000, program_tokens=tokens, operations=arities)
    model = ProgramSeq2SeqForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.decoder.output.weight.mul_(3)
        model.decoder.output.bias[config.eos_token_id] = -1e4
    return model


@torch.no_grad()
def one_by_one(
    model: ProgramSeq2SeqForConditionalGeneration, inputs: dict[str, torch.Tensor], k: int, steps: int
) -> list[list[int]]:
    """Return the best sequence per problem by a beam search with one forward pass per hypothesis."""
    found = []
    for words, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        words = words[None, mask.bool()]
        state, context = model.decoder.start(model.encoder(words))
        live, finished = [([model.config.decoder_start_token_id], 0.0, state)], []
        for _ in range(steps):
            candidates = []
            for tokens, score, state in live:
                features, state, _ = model.decoder.step(torch.tensor([[tokens[-1]]]), state, context)
                log_probs = model.decoder.classify(features, context)[0, 0].log_softmax(-1)
                best, symbols = log_probs.topk(2 * k)
                for log_prob, symbol in zip(best.tolist(), symbols.tolist(), strict=True):
                    candidates.append(([*tokens, symbol], score + log_prob, state))
            candidates = sorted(candidates, key=lambda each: -each[1])[: 2 * k]
            finished += [each for each in candidates[:k] if each[0][-1] == model.config.eos_token_id]
            live = [each for each in candidates if each[0][-1] != model.config.eos_token_id][:k]
        found.append(max(finished + live, key=lambda each: each[1])[0][1:])
    return found


def make_calls(problems: int, k: int, steps: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Return the searches to compare. Each one returns the best program per problem."""
    model = make_model()
    lengths = torch.randint(20, 41, (problems,))
    inputs = {
        "input_ids": torch.randint(model.config.encoder_vocab_size, (problems, 40)),
        "attention_mask": (torch.arange(40) < lengths[:, None]).long(),
    }
    options = {"num_beams": k, "length_penalty": 0.0, "early_stopping": "never"}
    grammar = model.config.make_grammar(num_numbers=torch.randint(1, 5, (problems,)))

    def ours(**constraint: Constraint) -> list[list[int]]:
        return model.beam_search(**inputs, **options, **constraint, max_length=steps).sequences[:, 0].tolist()

    return {
        "ours": ours,
        "transformers": lambda: model.generate(**inputs, **options, max_length=steps + 1)[:, 1:].tolist(),
        "one by one": lambda: one_by_one(model, inputs, k, steps),
        "ours, by the grammar": lambda: ours(constraint=grammar),
    }


def resident(field: str) -> float:
    """Return VmRSS (current) or VmHWM (peak) memory of this process in megabytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def peak_of(name: str, problems: int, k: int, steps: int) -> float:
    """Return the increase of the peak memory of this process by a search, in megabytes. Use a fresh process."""
    torch.set_num_threads(1)
    make_calls(1, 2, 2)[name]()  # the first call loads code
    call = make_calls(problems, k, steps)[name]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run all measurements, print a table, and write it as JSON if `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--repetitions", type=int, default=5, help="repetitions of each search; one by one has two")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--num_beams", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args(argv)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    size = (args.problems, args.num_beams, args.steps)
    calls = make_calls(*size)
    found = {name: call() for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(args.repetitions):
        for name, call in calls.items():
            if name != "one by one" or repetition < 2:
                start = time.process_time()
                call()
                seconds[name].append(time.process_time() - start)
    results: dict[str, dict] = {}
    for name in calls:
        median = statistics.median(seconds[name])
        ratio = median / statistics.median(seconds["ours"])
        with get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_of, (name, *size))
        result = {"cpu_seconds": round(median, 3), "ratio": round(ratio, 2), "peak_mb": round(peak, 1)}
        missed = False
        if name in EXPECTED:
            same = sum(one == other for one, other in zip(found["ours"], found[name], strict=True)) / args.problems
            result["same"] = round(same, 3)
            missed = ratio < EXPECTED[name] or same < EXPECTED_SAME
        results[name] = result | {"as_expected": not missed}
        print(f"{name:21s}", result, "MISSED" if missed else "", flush=True)
    torch.set_num_threads(threads)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
