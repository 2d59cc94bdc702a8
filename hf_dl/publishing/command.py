"""The command line of scripts/publish.py and `hf-dl publish`."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..metrics.spaces import METRICS, metric_files
from .files import Files, check_files, collect_files, human_size, one_line, size_of
from .hub import push
from .models import check_model
from .spaces import add_model, add_package, check_space

NAMES = {"model": "run", "space": "Space"}
DATASETS = ("scenes",)
# Options that belong to one kind of content, with the kind.
OPTIONS = {
    "space": ("model", "package"),
    "dataset": ("style", "num_scenes", "image_size", "num_objects", "seed"),
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        "publish",
        description="Check a model, a Space or a metric, or render a dataset, and push it to the Hub.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder",
        help=f"folder of a run or of a Space; or a metric: {', '.join(METRICS)}; or a dataset: {', '.join(DATASETS)}",
    )
    parser.add_argument("repo_id", help="repository to push to, as owner/name")
    parser.add_argument(
        "--type",
        choices=["model", "space", "metric", "dataset"],
        default="model",
        help="kind of content; default: model",
    )
    parser.add_argument("--model", type=Path, help="folder of a run that is copied into the Space, for --type space")
    parser.add_argument(
        "--package", help="requirement that installs hf_dl in the Space; default: copy the package into the Space"
    )
    scene = parser.add_argument_group("options of --type dataset")
    scene.add_argument("--style", help="look of the scenes: plain or textured; default: plain")
    scene.add_argument(
        "--num_scenes", type=int, help="training scenes; validation and test have a tenth each; default: 8000"
    )
    scene.add_argument("--image_size", type=int, help="width and height of the images in pixels; default: 64")
    scene.add_argument(
        "--num_objects", type=int, nargs=2, help="smallest and largest number of objects per scene; default: 2 4"
    )
    scene.add_argument("--seed", type=int, help="seed of the scenes; default: 0")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--dry_run", action="store_true", help="check and list the files; do not contact the Hub")
    parser.add_argument("--revision", help="branch to push to, created if it does not exist; default: main")
    parser.add_argument("--tag", help="tag of the commit, such as v1.0")
    parser.add_argument("--message", help="message of the commit")
    return parser


def prepare(args: argparse.Namespace) -> tuple[Files, list[str]]:
    """Return the files that will be pushed, and a sentence for each problem."""
    if args.type == "metric":
        try:
            return dict(metric_files(args.folder, args.repo_id)), []
        except ValueError as error:
            return {}, [str(error)]
    folder = Path(args.folder)
    if not folder.is_dir():
        return {}, [f"folder={args.folder!r} does not exist. Name the folder of a {NAMES[args.type]}."]
    files = collect_files(folder)
    if args.type == "model":
        problems = [*check_model(folder, args.repo_id, files)]
    else:
        problems = [*check_space(folder), *(add_model(files, args.model) if args.model else [])]
    problems += check_files(files)
    if args.type == "space":
        add_package(files, args.package)
    return files, problems


def main(argv: list[str] | None = None) -> int:
    """Check and publish a folder.

    Args:
        argv: The command line. Defaults to `sys.argv`.

    Returns:
        The exit status: 0, or 1 if there is a problem.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    for kind, names in OPTIONS.items():
        if args.type != kind and any(getattr(args, name) is not None for name in names):
            parser.error(f"{', '.join(f'--{name}' for name in names)} need --type {kind}.")
    try:
        if not re.fullmatch(r"[^/]+/[^/]+", args.repo_id):
            raise HFValidationError("it must have the form owner/name")
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        print(f"publish: repo_id={args.repo_id!r} is invalid: {one_line(error)}", file=sys.stderr)
        return 1
    if args.type == "dataset":
        return _publish_dataset(args)
    files, problems = prepare(args)
    if problems:
        print(f"publish: {args.folder} is not ready to be published:", file=sys.stderr)
        print("\n".join(f"- {problem}" for problem in problems), file=sys.stderr)
        return 1
    prefix = "" if args.type == "model" else "spaces/"
    print(f"{args.type} {constants.ENDPOINT}/{prefix}{args.repo_id}, branch {args.revision or 'main'}")
    for name in sorted(files):
        print(f"  {human_size(size_of(files[name])):>9}  {name}")
    print(f"  {human_size(sum(map(size_of, files.values()))):>9}  in {len(files)} files")
    if args.dry_run:
        print("All checks passed. Nothing was sent (--dry_run).")
        return 0
    kind = "model" if args.type == "model" else "space"
    return _report(lambda options: push(files, args.repo_id, repo_type=kind, **options), args)


def _publish_dataset(args: argparse.Namespace) -> int:
    """Render and push a dataset, and return the exit status."""
    if args.folder not in DATASETS:
        print(f"publish: dataset={args.folder!r} is unknown. Choose one of: {', '.join(DATASETS)}.", file=sys.stderr)
        return 1
    from .scenes import SceneRecipe, estimate, push_scenes  # imports torch, which takes seconds

    given = {name: getattr(args, name) for name in OPTIONS["dataset"] if getattr(args, name) is not None}
    try:
        recipe = SceneRecipe(**given)
    except ValueError as error:
        print(f"publish: {error}", file=sys.stderr)
        return 1
    print(f"dataset {constants.ENDPOINT}/datasets/{args.repo_id}, branch {args.revision or 'main'}")
    if args.dry_run:
        for line in estimate(recipe):
            print(line)
        print("Nothing was sent (--dry_run).")
        return 0
    hint = " Run the same command again to continue. It skips the shards that are on the Hub."
    return _report(lambda options: push_scenes(recipe, args.repo_id, **options), args, hint)


def _report(action: Callable[[dict[str, Any]], str], args: argparse.Namespace, hint: str = "") -> int:
    """Push with the options of the command line, print the result or the error, and return the exit status."""
    options = {name: getattr(args, name) for name in ("private", "revision", "tag", "message")}
    try:
        url = action(options)
    except ValueError as error:
        print(f"publish: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # the errors of the HTTP client have no base class that huggingface_hub exports
        print(f"publish: the Hub returned an error or could not be reached: {one_line(error)}{hint}", file=sys.stderr)
        return 1
    print(f"Published: {url}")
    return 0
