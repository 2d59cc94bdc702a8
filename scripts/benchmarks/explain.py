"""Compare explanations with the PyPI packages `grad-cam` and `captum`, and recorded attention with eager attention.

    scripts/run --group benchmark python scripts/benchmarks/explain.py [--output json]

Takes two minutes on one core. The benchmark reports CPU milliseconds per image on one thread, the median of
interleaved repetitions:

- ResNet-50 with random weights at 224x224: the forward pass, Grad-CAM by the package, and Grad-CAM by hf_dl, for one
  layer and for the last four blocks. Expected: hf_dl is at least 2 times as fast, and the maps are equal up to 1e-4;
- a ViT of base width with six blocks and random weights at 224x224: the forward pass, CLS attention of all layers by
  hf_dl with SDPA, and CLS attention by the model with eager attention;
- occlusion in a residual network with 14 layers at 32x32, and in ResNet-18 at 96x96, both with random weights. By
  default, captum covers one window per forward pass, and hf_dl runs batches. Expected: the attributions are equal up
  to 1e-4, and hf_dl is at least 5 times as fast for the small network. In ResNet-18, multiply-adds dominate even for
  one window, and batches do not save any. `gigaflops` is the number of multiplications and additions per second in
  hf_dl, to compare with the peak of a core;
- gradient, guided backpropagation, deconvolution and integrated gradients in ResNet-18: captum and hf_dl. Expected:
  the attributions are equal up to rounding.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_dl.explain import (
    arithmetic,
    deconvolution,
    grad_cam,
    gradient,
    guided_backprop,
    integrated_gradients,
    occlusion,
    record_attention,
)
from hf_dl.models.norm_resnet import NormResNetConfig, NormResNetForImageClassification
from hf_dl.training.errors import explain_errors

CLASS = 3
COMMAND = "scripts/run --group benchmark python scripts/benchmarks/explain.py"


class Logits(nn.Module):
    """A network that returns logits as a tensor, as the package expects."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Call the network."""
        return self.model(pixel_values).logits


def time_steps(steps: dict[str, Callable[[], object]], repetitions: int, images: int) -> dict[str, float]:
    """Return the median CPU milliseconds per image of each step. The repetitions are interleaved."""
    seconds = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if repetition:
                seconds[name].append(time.process_time() - start)
    return {name: 1000 * statistics.median(values) / images for name, values in seconds.items()}


def compare_grad_cam(layers: int, repetitions: int, batch: int) -> dict[str, float]:
    """Measure Grad-CAM for the last blocks of a network of the size of ResNet-50."""
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ModuleNotFoundError:
        raise ImportError(f"The package grad-cam is missing. Run `{COMMAND}`.") from None
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()
    images = torch.randn(batch, 3, 224, 224)
    stages = model.resnet.encoder.stages
    modules = [block for stage in stages for block in stage.layers][-layers:]
    package = GradCAM(Logits(model), modules)
    targets = [ClassifierOutputTarget(CLASS)] * batch

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(images).logits

    steps = {
        "forward": forward,
        "grad-cam": lambda: package(images, targets=targets),
        "ours": lambda: grad_cam(model, images, layers=modules, classes=CLASS).maps,
    }
    milliseconds = time_steps(steps, repetitions, batch)
    difference = (steps["ours"]() - torch.from_numpy(steps["grad-cam"]())).abs().max().item()
    return {
        **{f"{name}_ms": round(value, 1) for name, value in milliseconds.items()},
        "speed": round(milliseconds["grad-cam"] / milliseconds["ours"], 2),
        "largest_difference": difference,
    }


def compare_attention(repetitions: int, batch: int) -> dict[str, float]:
    """Measure the CLS attention of all layers of a vision transformer."""
    torch.manual_seed(0)
    config = ViTConfig(num_hidden_layers=6)
    model = ViTForImageClassification(config).eval()
    eager = ViTForImageClassification(ViTConfig(num_hidden_layers=6, attn_implementation="eager")).eval()
    eager.load_state_dict(model.state_dict())
    images = torch.randn(batch, 3, 224, 224)

    def run(step: Callable[[], object]) -> Callable[[], object]:
        def with_no_grad() -> object:
            with torch.no_grad():
                return step()

        return with_no_grad

    steps = {
        "forward": run(lambda: model(images).logits),
        "eager": run(lambda: [a[:, :, 0] for a in eager(images, output_attentions=True).attentions]),
        "ours": run(lambda: [a[:, :, 0] for a in record_attention(model, images, only_cls=True).attentions]),
    }
    milliseconds = time_steps(steps, repetitions, batch)
    pairs = zip(steps["ours"](), steps["eager"](), strict=True)
    return {
        **{f"{name}_ms": round(value, 1) for name, value in milliseconds.items()},
        "largest_difference": max((ours - theirs).abs().max().item() for ours, theirs in pairs),
    }


def make_resnet18() -> nn.Module:
    """Return a network of the size of ResNet-18 with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=100)).eval()


def compare_occlusion(model: nn.Module, side: int, repetitions: int) -> dict[str, float]:
    """Measure occlusion of one image, against captum."""
    try:
        from captum.attr import Occlusion
    except ModuleNotFoundError:
        raise ImportError(f"The package captum is missing. Run `{COMMAND}`.") from None
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    patch = round(side / 7)
    options = {"classes": CLASS, "patch": patch, "stride": patch // 2, "fill": "gray"}
    theirs = Occlusion(Logits(model))
    window = {"sliding_window_shapes": (3, patch, patch), "strides": (3, patch // 2, patch // 2)}
    steps = {
        # gray is 0 after normalization; captum repeats the value for each channel
        "captum": lambda: theirs.attribute(image, target=CLASS, baselines=0, **window)[:, 0],
        "ours": lambda: occlusion(model, image, **options).attributions,
    }
    milliseconds = time_steps(steps, repetitions, 1)
    windows = occlusion(model, image, **options).drops.numel()
    operations = 2 * arithmetic(model, image).multiply_adds * (windows + 1)
    return {
        **{f"{name}_ms": round(value, 1) for name, value in milliseconds.items()},
        "windows": windows,
        "gigaflops": round(operations / milliseconds["ours"] / 1e6, 1),
        "speed": round(milliseconds["captum"] / milliseconds["ours"], 2),
        "largest_difference": (steps["ours"]() - steps["captum"]()).abs().max().item(),
    }


def compare_gradients(repetitions: int, batch: int) -> dict[str, dict[str, float]]:
    """Measure methods by backpropagation in a network of the size of ResNet-18, against captum."""
    from captum.attr import Deconvolution, GuidedBackprop, IntegratedGradients, Saliency

    model, images = make_resnet18(), torch.randn(batch, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    wrapped = Logits(model).eval()
    pairs = {
        "gradient": (gradient, Saliency, {}, {"abs": False}),
        "guided backpropagation": (guided_backprop, GuidedBackprop, {}, {}),
        "deconvolution": (deconvolution, Deconvolution, {}, {}),
        "integrated gradients": (
            integrated_gradients,
            IntegratedGradients,
            {"baseline": "gray", "steps": 16},
            {"baselines": 0, "n_steps": 16},
        ),
    }
    results = {}
    for name, (function, package, ours, theirs) in pairs.items():
        made = package(wrapped)
        steps = {
            "captum": lambda made=made, theirs=theirs: made.attribute(
                images.clone().requires_grad_(), target=CLASS, **theirs
            ),
            "ours": lambda function=function, ours=ours: function(model, images, classes=CLASS, **ours).attributions,
        }
        milliseconds = time_steps(steps, repetitions, batch)
        expected = steps["captum"]().detach()
        results[name] = {
            **{f"{step}_ms": round(value, 1) for step, value in milliseconds.items()},
            "speed": round(milliseconds["captum"] / milliseconds["ours"], 2),
            "largest_value": expected.abs().max().item(),
            "largest_difference": (steps["ours"]() - expected).abs().max().item(),
        }
    return results


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run all measurements, print a table, and write it as JSON if `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--repetitions", type=int, default=7, help="repetitions of each step")
    parser.add_argument("--batch_size", type=int, default=4, help="batch size")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {
        f"Grad-CAM, {layers} layer{'s' * (layers > 1)}": compare_grad_cam(layers, args.repetitions, args.batch_size)
        for layers in (1, 4)
    }
    results["CLS attention"] = compare_attention(args.repetitions, args.batch_size)
    small = NormResNetForImageClassification(NormResNetConfig(num_labels=25)).eval()
    results["occlusion, 32x32"] = compare_occlusion(small, 32, args.repetitions)
    results["occlusion, 96x96"] = compare_occlusion(make_resnet18(), 96, args.repetitions)
    results |= compare_gradients(args.repetitions, args.batch_size)
    for name, values in results.items():
        print(f"{name:20s}", values, flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
