"""Compare the segmentation of one image by ten phrases in one call with one call per phrase.

    scripts/run python scripts/benchmarks/phrases.py [--output model_cards/benchmark_phrases.json]

Takes about 80 seconds. For each decoder, it segments one image with random weights and ten phrases at two sizes: the
default of scripts/train_clip.py, and CLIP ViT-B/16 at the image size of CLIPSeg. Calls use one thread. The benchmark
reports:

- CPU milliseconds of ten phrases together and one by one. They are the median of interleaved repetitions, and of a
  single one at the large size;
- the ratio of both. Expected: at least 5 at the large size;
- the same ratio of the multiplications in matrix products and convolutions, which does not depend on the machine;
- CPU milliseconds of the parts of the call for ten phrases: the image, and the decoder;
- the largest difference between the logits of both.

`--output` names the JSON file. A card with the same name and the suffix .md is written next to it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_dl.models import ClipSegmenterConfig, ClipSegmenterForImageSegmentation
from hf_dl.models.clip_segmenter import SMALL_CLIP
from hf_dl.training.errors import explain_errors

NUM_PHRASES, LENGTH = 10, 6  # tokens of a phrase, with its start and its end
EXPECTED_RATIO = 5.0
DECODERS = {
    "unet": {"decoder_type": "unet"},
    "clipseg": {"decoder_type": "clipseg"},
    "clipseg refined": {"decoder_type": "clipseg", "refined": True},
    "deconv": {"decoder_type": "deconv"},
}
TOWER = {"num_hidden_layers": 12, "bos_token_id": 510, "eos_token_id": 511, "vocab_size": 512}
VIT_B_16 = {
    "projection_dim": 512,
    "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, **TOWER},
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 352,
        "patch_size": 16,
    },
}


@dataclass(frozen=True)
class Setting:
    """A size of CLIP, the blocks that the decoders read, and their hidden units."""

    clip: dict
    layers: list[int]
    intermediate_size: int
    repeated: bool  # whether to repeat the measurement

    @property
    def size(self) -> int:
        """Height and width of the image in pixels."""
        return self.clip["vision_config"]["image_size"]


SETTINGS = {
    "64 px, default CLIP": Setting(SMALL_CLIP, [0, 1, 3], 256, True),
    "352 px, ViT-B/16": Setting(VIT_B_16, [3, 7, 9], 2048, False),  # as in the paper
}


class Calls:
    """The calls of one decoder at one size, with random weights and inputs.

    Args:
        setting: The size.
        fields: Fields of the config that select the decoder.
    """

    def __init__(self, setting: Setting, fields: dict):
        torch.manual_seed(0)
        options = {"layers": setting.layers, "intermediate_size": setting.intermediate_size, **fields}
        self.model = ClipSegmenterForImageSegmentation(ClipSegmenterConfig(clip=setting.clip, **options)).eval()
        self.pixels = torch.randn(1, 3, setting.size, setting.size)
        self.ids = torch.randint(1, 510, (NUM_PHRASES, LENGTH))
        self.ids[:, 0], self.ids[:, -1] = 510, 511
        self.size = (setting.size, setting.size)

    def together(self) -> torch.Tensor:
        """Segment all phrases in one call."""
        return self.model(self.pixels, self.ids).logits

    def one_by_one(self) -> torch.Tensor:
        """Segment each phrase in its own call."""
        return torch.cat([self.one(row) for row in range(NUM_PHRASES)])

    def one(self, row: int = 0) -> torch.Tensor:
        """Segment a single phrase."""
        return self.model(self.pixels, self.ids[row : row + 1]).logits

    def parts(self) -> dict[str, Callable[[], object]]:
        """Return the two largest parts of the call for all phrases."""
        features, embeds = self.model.encode_images(self.pixels), self.model.encode_prompts(self.ids)
        inputs = {"vision_features": features, "prompt_embeds": embeds, "image_size": self.size}
        return {"image": lambda: self.model.encode_images(self.pixels), "decoder": lambda: self.model(**inputs)}


def time_calls(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Return the median CPU milliseconds of each call. Several repetitions are interleaved, after two others."""
    warmup, milliseconds = 2 if repetitions > 1 else 0, {name: [] for name in calls}
    for repetition in range(repetitions + warmup):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if repetition >= warmup:
                milliseconds[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in milliseconds.items()}


def count_operations(call: Callable[[], object]) -> int:
    """Return the operations of the matrix products and convolutions of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def measure(setting: Setting, fields: dict, repetitions: int) -> dict[str, float]:
    """Measure one decoder at one size."""
    calls = Calls(setting, fields)
    calls.together()  # the first call is slower
    results: dict[str, torch.Tensor] = {}
    named = {
        "together": lambda: results.update(together=calls.together()),
        "one by one": lambda: results.update(apart=calls.one_by_one()),
    }
    found = time_calls(named | calls.parts(), repetitions if setting.repeated else 1)
    difference = (results["together"] - results["apart"]).abs().max().item()
    operations = NUM_PHRASES * count_operations(calls.one) / count_operations(calls.together)
    return {
        "together_cpu_ms": round(found["together"], 2),
        "one_by_one_cpu_ms": round(found["one by one"], 2),
        "ratio": round(found["one by one"] / found["together"], 2),
        "ratio_of_operations": round(operations, 2),
        "image_cpu_ms": round(found["image"], 2),
        "decoder_cpu_ms": round(found["decoder"], 2),
        "largest_difference": difference,
    }


def make_card(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Write the card: one table per size, and the decoders for which the expected ratio holds."""
    tables = []
    for size, rows in results.items():
        lines = [
            f"| {size} | together, ms | one by one, ms | ratio | ratio of operations | image, ms | decoder, ms |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for decoder, row in rows.items():
            keys = ("together_cpu_ms", "one_by_one_cpu_ms", "ratio", "ratio_of_operations", "image_cpu_ms")
            values = [row[key] for key in (*keys, "decoder_cpu_ms")]
            lines.append(f"| {decoder} | {' | '.join(f'{value:,.1f}' for value in values)} |")
        holds = ", ".join(name for name, row in rows.items() if row["ratio"] >= EXPECTED_RATIO)
        lines += ["", f"Ten phrases together are at least {EXPECTED_RATIO:g} times as fast: {holds or 'none'}."]
        tables.append("\n".join(lines))
    newline = "\n\n"
    return f"""# Ten phrases of one image, together and one by one

`ClipSegmenterForImageSegmentation` encodes an image once for all of its phrases. `scripts/benchmarks/phrases.py` made
this card. It measures the CPU time of one thread, with random weights.

{newline.join(tables)}

The last two columns are parts of the call for ten phrases. The ratio of operations counts multiplications in matrix
products and convolutions only.

In the large CLIP, the image takes most of the time, so ten phrases cost little more than one. In the small one, the
decoder takes most of it. All layers of a decoder after the phrase enters depend on the phrase, so they run once per
phrase. This limits the ratio. The ratio of times is higher than the ratio of operations there, because every call has
a fixed cost. The U-Net runs the convolutions of its shallow tokens once per image.
"""


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run all measurements and print them. Write a JSON file and a card if `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repetitions", type=int, default=20, help="repetitions at the small size")
    parser.add_argument("--output", type=Path, help="JSON file to write; the card is next to it")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    results: dict[str, dict] = {}
    for name, setting in SETTINGS.items():
        results[name] = {}
        for decoder, fields in DECODERS.items():
            results[name][decoder] = measure(setting, fields, args.repetitions)
            print(f"{name:20s} {decoder:16s}", results[name][decoder], flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
        args.output.with_suffix(".md").write_text(make_card(results))
    return results


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
