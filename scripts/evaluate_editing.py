"""Compare edits of slot models with the rendered truth: remove an object, replace it, or insert an object.

    scripts/run python scripts/evaluate_editing.py --broadcast runs/train_slots --diffusion runs/train_slot_diffusion
    scripts/run python scripts/evaluate_editing.py --methods truth copy broadcast

Takes about a minute per method on one core, and five minutes for diffusion. The scores are described in
hf_dl/metrics/editing.py, and `hf_dl.recipes.editing` shows how to score another model. The first run trains the probe
that reads the color and shape of objects, which takes four more minutes. Scores to expect:
model_cards/slot_editing.md.

The script writes edits.png and evaluation.json. With `--output_dir`, it also writes results.json, so that it can be
the script of an experiment. `--run style=plain --seed 0` then selects runs in folders of runs.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hf_dl.data.editing_tasks import KINDS
from hf_dl.metrics import perceptual
from hf_dl.recipes import editing
from hf_dl.recipes.evaluation import write_evaluation
from hf_dl.recipes.object_probe import find_probe
from hf_dl.reporting.experiment import portable
from hf_dl.training.args import parse_flags
from hf_dl.training.provenance import write_results


@dataclass
class Args(editing.EditorFlags, editing.EditFlags):
    """Flags of this script."""

    probe: str = field(
        default="", metadata={"help": "Folder or Hub id of the probe; default: runs/train_probe, trained if missing."}
    )
    cpu_threads: int = field(default=0, metadata={"help": "Number of CPU threads. 0 uses the default of torch."})
    output_dir: str = field(
        default="", metadata={"help": "Folder for the results. Defaults to runs/evaluate_editing."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Edit test scenes with each method, score the results, and write the picture and the scores.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores, with keys such as `remove_success`, and with the method in front if there are several methods.
    """
    args = parse_flags(Args, argv)
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    probe = find_probe(args.probe, Path(__file__).parent)
    started = time.monotonic()
    distance = perceptual.load(args.perceptual)
    if not distance.name.startswith("lpips"):
        distance.name = f"perceptual_{Path(distance.name).name}"
    edits = {kind: editing.load_edits(args, kind) for kind in KINDS}

    metrics, edited = {}, {}
    for method in args.methods:
        editor = editing.METHODS[method](args)
        found = {kind: editing.evaluate(editor, each, distance=distance, probe=probe) for kind, each in edits.items()}
        scores = editing.summarize({kind: scores for kind, (scores, _) in found.items()})
        prefix = f"{method}_" if len(args.methods) > 1 else ""
        metrics |= {f"{prefix}{name}": value for name, value in scores.items()}
        edited[method] = [images for _, images in found.values()]

    folder = Path(args.output_dir or "runs/evaluate_editing")
    folder.mkdir(parents=True, exist_ok=True)
    shown = {method: images for method, images in edited.items() if method not in ("truth", "copy")}
    editing.draw_edits(edits, shown, folder / "edits.png")
    write_evaluation(folder, args, metrics)
    if args.output_dir:
        write_results(folder, __file__, portable(asdict(args)), metrics, seconds=time.monotonic() - started)
    print(f"edits.png and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
