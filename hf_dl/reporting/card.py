"""Model cards: of a run from its results.json, of an experiment from its report.

Every number of a card is read from those files. The metadata at the top is for the Hub: license, library, tags, and
the model-index with the exact value of each result.
"""

import json
import math
import re
import shlex
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from .experiment import portable, read_results
from .reading import fill_reading
from .report import OWN_NUMBERS, Report
from .tables import SPLITS, claims_table, results_table, split_of

TEMPLATE = Path(__file__).with_name("card.md")
LICENSE = "apache-2.0"  # of weights and results, as the Hub names it
LOCAL_ID = "."  # usage snippets load from here; a card has the path of the folder, or the id of a repository
TRUST = "# After `import hf_dl`, trust_remote_code is not needed."
COUNTS = ("images", "examples", "problems", "sentences", "tokens")
PICTURES = (".png", ".svg", ".jpg", ".jpeg", ".webp", ".gif")
# Tasks whose pipeline of transformers loads the model, by the ending of the model's class
TASKS = {
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForCausalLM": "text-generation",
}
EXAMPLES = {  # arguments of an example call of the pipeline
    "image-classification": '"image.png"',
    "image-segmentation": '"image.png"',
    "object-detection": '"image.png"',
    "text-generation": '"the", max_new_tokens=20',
}
# flags of a person's own run
NOT_REPRODUCED = ("output_dir", "resume", "accept_changed_data", "push_to_hub", "hub_model_id", "hub_strategy")
# The Hub's name of a metric, for parts of our names that are not the Hub's name already.
METRIC_TYPES = {"macro_f1": "f1", "micro_f1": "f1", "macro_precision": "precision", "macro_recall": "recall"}
METRIC_TYPES |= {"miou": "mean_iou", "fid": "fid", "mse": "mse", "perplexity": "perplexity"}
MAX_HEIGHT = 0.65  # of a leading picture, relative to its width
INDEXED = 3  # metrics per setting in the model-index of an experiment


def metric_type(metric: str) -> str:
    """Return the Hub's name of a metric, such as "f1"; our own name without its split if the Hub has none.

    Example:
        >>> metric_type("test_macro_f1"), metric_type("composition_fid"), metric_type("val_fg_ari")
        ('f1', 'fid', 'fg_ari')
    """
    name = _without_split(metric)
    if "random_conv" in name:  # FID with features other than Inception's is not the Hub's FID
        return name
    found = [kind for part, kind in METRIC_TYPES.items() if f"_{part}_" in f"_{name}_"]
    return found[0] if found else name


def results_key(result: EvalResult) -> str:
    """Return the key in results.json of a result in the model-index of a run's card."""
    return result.metric_name.replace(" ", "_")


def _without_split(metric: str) -> str:
    split = split_of(metric)
    return metric.removeprefix(f"{split}_") if split else metric


def _test_first(metrics: Sequence[str]) -> list[str]:
    """Sort metrics by split: test, new situations, no split, validation, training."""
    order = ["test", "situations", "", "val", "train"]
    return sorted(metrics, key=lambda metric: order.index(split_of(metric)))


def _indexed(metrics: Sequence[str]) -> list[str]:
    """Return the metrics for a model-index: test metrics first, no training metrics, no counts."""
    return [metric for metric in _test_first(metrics) if split_of(metric) != "train" and not _is_count(metric)]


def _count(metrics: Mapping[str, float], metric: str) -> int | None:
    """Return the number of examples of a metric: `<split>_images` - `<split>_images_without_<end of the metric>`."""
    prefix = f"{split_of(metric)}_" if split_of(metric) else ""
    for name in COUNTS:
        if prefix + name in metrics:
            without = f"{prefix}{name}_without_"
            left_out = [
                count
                for key, count in metrics.items()
                if key.startswith(without) and f"_{metric}".endswith(f"_{key.removeprefix(without)}")
            ]
            return int(metrics[prefix + name] - sum(left_out))
    return None


def _is_count(metric: str) -> bool:
    return _without_split(metric).split("_without_")[0] in COUNTS


def format_metric(value: float) -> str:
    """Format a metric for a card: four significant digits, but whole numbers in full.

    Args:
        value: The metric.

    Returns:
        The text.

    Example:
        >>> format_metric(0.9), format_metric(1000), format_metric(12345.67)
        ('0.9000', '1000', '12346')
    """
    if abs(value) >= 1000 or math.isfinite(value) and float(value).is_integer():
        return f"{value:.0f}"
    return f"{value:#.4g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _flag_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(_flag_value, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _flags(args: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _flag_value(value)) for name, value in args.items() if value is not None]


def _metrics_table(metrics: Mapping[str, float]) -> str:
    rows = []
    for metric in _test_first([*metrics]):
        if not _is_count(metric):
            count = _count(metrics, metric)
            split = SPLITS.get(split_of(metric), "–")
            rows.append([f"`{metric}`", split, "–" if count is None else str(count), format_metric(metrics[metric])])
    return _rows(["metric", "split", "n", "value"], rows)


def _task(model_class: str) -> str | None:
    """Return the task of a class."""
    return next((task for ending, task in TASKS.items() if model_class.endswith(ending)), None)


def _hub_dataset(results: Mapping[str, Any]) -> str | None:
    """Return the id of the dataset on the Hub that a run has used, or None for all other data.

    Results of a run that did not save "local_paths" cannot tell an id from a folder such as data/birds.
    """
    source = results["args"].get("source")
    is_id = isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source)
    return source if is_id and "source" not in results.get("local_paths", ["source"]) else None


def _dataset(results: Mapping[str, Any]) -> dict[str, Any]:
    args = results["args"]
    return {
        "dataset_type": args["source"],
        "dataset_name": args["source"],
        "dataset_config": args.get("config") or None,
    }


def _data_sentence(args: Mapping[str, Any]) -> str:
    source = portable(args.get("source"))
    if source == "synthetic":
        return (
            "The data is synthetic and generated by hf_dl, so nothing was downloaded. It has the license of the "
            "project, Apache-2.0."
        )
    if source is None and "source" not in args:  # the script has no such flag
        return (
            "The script generates its data, so nothing was downloaded. The data has the license of the project, "
            "Apache-2.0."
        )
    if source:
        return f"The data is `{source}`, from the flag `--source`. The license of that data applies."
    return "The file results.json does not name the data; see the script."


def _local_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}). Save the model again.") from error


def with_repository(text: str, repo_id: str | Path, *, names: Collection[str] = ()) -> str:
    """Let the Python code of a card load the model from a repository or folder instead of `LOCAL_ID`.

    Args:
        text: The card, or its code.
        repo_id: The repository or folder.
        names: Names of the run's folder. Paths that end in one of them are also replaced.

    Example:
        >>> with_repository('AutoModel.from_pretrained(".")', "me/slots")
        'AutoModel.from_pretrained("me/slots")'
        >>> with_repository('AutoModel.from_pretrained("runs/train_slots")', "me/slots", names=["train_slots"])
        'AutoModel.from_pretrained("me/slots")'
    """

    def replace(match: re.Match) -> str:
        is_local = match[2] == LOCAL_ID or PurePosixPath(match[2]).name in names
        return f'{match[1]}"{repo_id}"' if is_local else match[0]

    return re.sub(r'(from_pretrained\(|pipeline\("[a-z-]+", )"([^"]+)"', replace, text)


def _shown_path(folder: Path) -> str:
    """Return the path of a folder from the current one; `LOCAL_ID` if it is elsewhere, on this machine only."""
    path, here = folder.resolve(), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else LOCAL_ID


def usage_snippet(folder: str | Path, model_class: str, *, calls: str | None = None, task: str | None = None) -> str:
    """Write Python code that loads a saved model and uses it.

    Args:
        folder: The folder with config.json and the files of the processor or tokenizer.
        model_class: The name of the saved class.
        calls: Code that uses `model`, and `processor` or `tokenizer` if its name occurs. Defaults to a pipeline of
            transformers for the classes in `TASKS`, and else to one call of the model.
        task: Task whose pipeline of transformers also loads the model, if the class is not in `TASKS`. The code then
            calls this pipeline first.

    Returns:
        Python source that loads from `LOCAL_ID`. `run_card` and publishing replace this, see `with_repository`.
    """
    folder = Path(folder)
    auto_map = _local_json(folder / "config.json").get("auto_map", {})
    autos = [name for name, target in auto_map.items() if str(target).endswith(f".{model_class}")]
    model = max((name for name in autos if name.startswith("AutoModel")), key=len, default=model_class)
    trust = ", trust_remote_code=True" if auto_map else ""
    note = [TRUST] if auto_map else []
    task = task or (_task(model_class) if calls is None else None)
    piped = []
    if task:
        piped = [f'pipe = pipeline("{task}", "{LOCAL_ID}"{trust})', f"print(pipe({EXAMPLES[task]}))"]
    if task and calls is None:
        return "\n".join(["from transformers import pipeline", "", *note, *piped])
    loader, name, call = None, "", ""
    if (folder / "preprocessor_config.json").is_file():
        loader, name, call = "AutoImageProcessor", "processor", 'processor(Image.open("image.png"), '
    elif (folder / "processor_config.json").is_file():
        loader, name, call = "AutoProcessor", "processor", 'processor(images=Image.open("image.png"), '
    elif (folder / "tokenizer_config.json").is_file():
        loader, name, call = "AutoTokenizer", "tokenizer", 'tokenizer("a sentence", '
    if calls is None:
        calls = f'outputs = model(**{call}return_tensors="pt"))' if call else ""
    loads = {name: loader} if name and name in calls else {}
    loads["model"] = model
    lines = ["from PIL import Image"] if "Image.open" in calls else []
    lines += [f"from transformers import {', '.join([*sorted(loads.values()), *(['pipeline'] if task else [])])}"]
    lines += ["", *note, *piped, *([""] if task else [])]
    lines += [f'{name} = {auto}.from_pretrained("{LOCAL_ID}"{trust})' for name, auto in loads.items()]
    return "\n".join([*lines, *calls.splitlines()])


def _training_facts(results: Mapping[str, Any]) -> list[str]:
    facts = []
    if results.get("num_parameters"):
        facts.append(f"Model: `{results.get('model_class')}`, {results['num_parameters']:,} parameters")
    if results.get("steps") is not None:
        seed = f", seed {results['seed']}" if results.get("seed") is not None else ""
        facts.append(f"Length: {results['steps']:,} steps{seed}")
    if results.get("seconds") is not None:
        computed = results.get("cpu_seconds")
        of_that = f" ({_duration(computed)} of CPU time)" if computed is not None else ""
        facts.append(f"Time: {_duration(results['seconds'])}{of_that}")
    if results.get("device"):
        processes, precision = results.get("num_processes", 1), results.get("mixed_precision", "no")
        number = f"{processes} processes" if processes and processes > 1 else "one process"
        mixed = "no mixed precision" if precision in ("no", None) else f"mixed precision {precision}"
        facts.append(f"Hardware: {results['device']}, {number}, {mixed}")
    if results.get("commit"):
        facts.append(
            f"Code: commit `{results['commit']}`" + (" with uncommitted changes" if results.get("dirty") else "")
        )
    if results.get("versions"):
        facts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    if results.get("date"):
        facts.append(f"Date: {results['date']}")
    return facts


def _limits(results: Sequence[Mapping[str, Any]], seeds: int) -> list[str]:
    limits = []
    if seeds == 1:
        limits.append("One seed: another run has different scores, and this card cannot show by how much.")
    elif seeds < 5:
        limits.append(f"{seeds} seeds: this shows large differences, but cannot rank settings with similar scores.")
    if any(result["args"].get("source") == "synthetic" for result in results):
        limits.append("Training and test data are synthetic. Scores on other data, such as photographs, may differ.")
    splits = {split_of(metric) for result in results for metric in result["metrics"]}
    if "val" in splits and "test" not in splits:
        limits.append("All scores are on the validation split, which may also have selected the checkpoint.")
    restarts = sum(result.get("restarts") or 0 for result in results)
    if restarts:
        times = "once" if restarts == 1 else f"{restarts} times"
        limits.append(f"Training collapsed and was restarted {times}, so this recipe does not always converge.")
    if any(result.get("dirty") for result in results):
        limits.append("Trained with uncommitted changes, so the commit does not contain the exact code.")
    return limits


def _pictures(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the leading picture of a card and the others.

    The leading picture is low enough to leave room for the table on the first screen. Learning curves and confusion
    matrices lead only if no other picture can.
    """
    pictures = [{"file": path.name, "alt": path.stem.replace("_", " ")} for path in paths]
    low = [picture for picture, path in zip(pictures, paths, strict=True) if _height_to_width(path) <= MAX_HEIGHT]
    lead = next((p for p in low if not p["alt"].endswith(("curves", "confusion"))), low[0] if low else None)
    return {"lead": lead, "figures": [picture for picture in pictures if picture is not lead]}


def _height_to_width(path: Path) -> float:
    """Return the height of a picture divided by its width, or 0 if it cannot be read."""
    try:
        if path.suffix.lower() == ".svg":
            size = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', path.read_text(encoding="utf-8"))
            width, height = (float(size[1]), float(size[2])) if size else (1, 0)
        else:
            with Image.open(path) as image:
                width, height = image.size
    except OSError:
        return 0.0
    return height / width


def _card(metadata: ModelCardData, **texts: Any) -> ModelCard:
    # `from_template` also passes the fields of the metadata, so the names in the template differ from these fields.
    return ModelCard.from_template(metadata, template_path=str(TEMPLATE), metadata=metadata.to_yaml(), **texts)


def run_card(
    folder: str | Path,
    *,
    name: str | None = None,
    summary: str | None = None,
    usage: str | None = None,
    library: str = "transformers",
    tags: Sequence[str] = (),
    limits: Sequence[str] = (),
    task: str | None = None,
    notes: str | None = None,
) -> ModelCard:
    """Make the model card of a run from the files in its folder.

    Args:
        folder: The folder of the run with results.json and, if they exist, config.json, the processor and pictures.
        name: The name of the model; defaults to the name of the folder.
        summary: A few sentences about the model; defaults to one sentence from results.json.
        usage: Python code that loads the model from `LOCAL_ID` and uses it; defaults to `usage_snippet`. The card
            loads it from the path of the folder, if that is below the current folder.
        library: The Hub's name of the library that loads the model.
        tags: More tags; "hf_dl" is always there.
        limits: Limits of the model, one sentence each. Limits that follow from results.json are added.
        task: Task whose pipeline of transformers loads the model. Defaults to the task in `TASKS`.
        notes: Markdown below the table of results. Defaults to none.

    Returns:
        The card; `card.save(path)` writes it. Its `pipeline_tag` is set only if the pipeline of transformers for that
        task loads the model. It has a model-index only for data from the Hub, because the Hub rejects a
        model-index without the id of a dataset.

    Raises:
        FileNotFoundError: If results.json does not exist.
        ValueError: If results.json is cut short, or a metric is not finite.

    Example:
        >>> run_card("runs/train_slots").save("runs/train_slots/README.md")  # doctest: +SKIP
    """
    folder = Path(folder)
    results = read_results(folder)
    args, metrics = portable(results["args"]), results["metrics"]
    for metric, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{folder / 'results.json'}: the metric {metric!r} is {value}. A card needs finite numbers."
            )
    name = name or folder.resolve().name
    model_class, script = str(results.get("model_class") or "model"), Path(str(results["script"])).name
    task, dataset = task or _task(model_class), _hub_dataset(results)
    evaluations = [
        EvalResult(
            task_type=task or "other",
            metric_type=metric_type(metric),
            metric_name=metric.replace("_", " "),
            metric_value=metrics[metric],
            dataset_split=SPLITS.get(split_of(metric)),
            **_dataset(results),
        )
        for metric in (_indexed([*metrics]) if dataset else [])
    ]
    card_data = ModelCardData(
        license=LICENSE,
        library_name=library,
        pipeline_tag=task,
        datasets=[dataset] if dataset else None,
        tags=["hf_dl", *tags],
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
    )
    parameters = f" with {results['num_parameters']:,} parameters" if results.get("num_parameters") else ""
    flags = _flags({k: v for k, v in args.items() if k not in ("output_dir", "resume") and v != ""})
    given = results.get("given_args")
    given = {k: v for k, v in portable(args if given is None else given).items() if k not in NOT_REPRODUCED}
    words = ["scripts/run accelerate launch", f"scripts/{script}"]
    words += [
        shlex.join([f"--{k}", *(v.split() if isinstance(given[k], list) else [v])])
        for k, v in _flags({k: v for k, v in given.items() if v != ""})
    ]
    commit = f"git checkout {results['commit']}\n" if results.get("commit") else ""
    return _card(
        card_data,
        title=name,
        summary=summary or f"`{model_class}`{parameters}, trained with `scripts/{script}` of hf_dl.",
        results=_metrics_table(metrics) if metrics else None,
        notes=notes,
        **_pictures(sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)),
        usage=with_repository(usage or usage_snippet(folder, model_class), _shown_path(folder)),
        training="\n".join(f"- {fact}" for fact in _training_facts(results)),
        settings=_details("All flags", _rows(["flag", "value"], [[f"`{k}`", f"`{v}`"] for k, v in flags])),
        data=_data_sentence(args),
        limits=[*limits, *_limits([results], seeds=1)],
        reproduce_note="Run this in a clone of hf_dl:",
        reproduce=commit + _wrapped(words),
    )


def _wrapped(words: Sequence[str], width: int = 100) -> str:
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def experiment_card(report: Report, *, figures: Sequence[str | Path] = ()) -> ModelCard:
    """Make the card of an experiment from its report.

    Args:
        report: The report.
        figures: Figures in the folder of the card; the first one that is wide enough leads the card.

    Returns:
        The card. For each setting with a dataset of the Hub, its model-index has the means of the first `INDEXED`
        metrics of the table. Test metrics come first. Training metrics, times and sizes are left out.

    Raises:
        ValueError: If the table, a claim or the reading names something that the report does not have.
    """
    experiment, finished, shown = report.experiment, report.finished, report.shown_flags()
    failed = [cell for cell in report.cells if cell["status"] == "failed"]
    name = experiment.name
    evaluations = []
    metrics = _indexed([metric for metric in report.table.value if metric not in OWN_NUMBERS])[:INDEXED]
    for metric in metrics:
        for group in report.groups():
            values = group.values(metric)
            if not values or not all(map(math.isfinite, values)) or not _hub_dataset(group.finished[0]):
                continue
            setting = _setting(dict(zip(shown, group.key, strict=True)))
            evaluations.append(
                EvalResult(
                    task_type=_task(str(group.finished[0].get("model_class"))) or "other",
                    metric_type=metric_type(metric),
                    metric_name=f"mean {report.label(metric)} ({setting})",
                    metric_value=math.fsum(values) / len(values),
                    metric_args={"seeds": len(values)}
                    | ({"standard_deviation": statistics.stdev(values)} if len(values) > 1 else {}),
                    dataset_split=SPLITS.get(split_of(metric)),
                    **_dataset(group.finished[0]),
                )
            )
    card_data = ModelCardData(
        license=LICENSE,
        library_name="transformers",
        tags=["hf_dl", "experiment"],
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
    )
    limits = _limits(finished, seeds=max((len(group.finished) for group in report.groups()), default=0))
    unfinished = len(report.cells) - len(finished)
    if unfinished:
        limits.insert(0, f"{unfinished} of {len(report.cells)} runs have no result; the table shows which ones.")
    limits += [
        f"The run with {_setting(cell['flags'])} failed: {cell.get('error', 'no error message')}" for cell in failed
    ]
    sources = dict.fromkeys(_data_sentence(cell["args"]) for cell in finished)
    flags = [[f"`{key}`", f"`{value}`"] for key, value in _flags(experiment.fixed)]
    flags += [
        [f"`{key}`", ", ".join(f"`{_flag_value(v)}`" for v in values)] for key, values in experiment.grid.items()
    ]
    flags.append(["`seed`", ", ".join(f"`{seed}`" for seed in experiment.seeds)])
    for key, variants in experiment.variants.items():
        for value, variant in variants.items():
            script = variant.get("script", experiment.script)
            words = [f"--{flag} {_flag_value(own)}" for flag, own in variant.get("flags", {}).items()]
            other = "<the run of " + " ".join(f"{k}={v}" for k, v in variant.get("after", {}).items()) + ">"
            words = [word.replace("{after}", other) for word in words]
            left_out = ", ".join(f"`{flag}`" for flag in variant.get("without", []))
            text = f"`{' '.join([script, *words])}`" + (f" without {left_out}" if left_out else "")
            flags.append([f"`{key}` = `{value}`", text])
    scripts = dict.fromkeys(cell["script"] for cell in finished) or [experiment.script]
    return _card(
        card_data,
        title=f"Experiment: {name}",
        summary=experiment.question,
        results=results_table(report),
        reading=fill_reading(report),
        notes="\n".join(f"- **{report.value_label(key)}**: {text}" for key, text in experiment.notes.items()),
        expect=experiment.expect,
        claims=claims_table(report),
        samples=_samples(report),
        **_pictures([Path(figure) for figure in figures]),
        training="\n".join(f"- {fact}" for fact in _experiment_facts(report, [*scripts])),
        settings=_details("All flags", _rows(["flag", "values"], flags)),
        data=" ".join(sources) or "No run has finished.",
        limits=limits or ["None known."],
        reproduce_note="Run this in a clone of hf_dl. It skips runs that have finished:",
        reproduce=f"scripts/run python scripts/run_experiment.py scripts/experiments/{name}.toml",
    )


def _samples(report: Report) -> str:
    """Write the texts of each setting, every one in a fence that it cannot close."""
    parts = []
    for group in report.groups():
        for cell in group.finished:
            if cell.get("samples"):
                seed = cell["flags"]["seed"]
                parts.append(f"**{report.setting_label(report.shown_flags(), group.key)}**, seed {seed}")
                parts += [f"After step {each['step']:,}:\n\n{_fenced(each['text'])}" for each in cell["samples"]]
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _setting(flags: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {_flag_value(value)}" for key, value in flags.items())


def _experiment_facts(report: Report, scripts: Sequence[str]) -> list[str]:
    finished = report.finished
    names = " and ".join(f"`scripts/{script}`" for script in scripts)
    facts = [f"Runs: {len(report.cells)} of {names}, {len(finished)} of them finished"]
    classes = sorted({str(cell["model_class"]) for cell in finished if cell.get("model_class")})
    sizes = sorted({cell["num_parameters"] for cell in finished if cell.get("num_parameters")})
    if classes and sizes:
        span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        facts.append(f"Model: {', '.join(f'`{name}`' for name in classes)}, {span} parameters")
    seconds = [cell["seconds"] for cell in finished if cell.get("seconds") is not None]
    if seconds:
        facts.append(
            f"Time: {_duration(sum(seconds))} in total, {_duration(statistics.median(seconds))} per run (median)"
        )
    computed = [cell["cpu_seconds"] for cell in finished if cell.get("cpu_seconds") is not None]
    if computed:
        facts.append(f"CPU time: {_duration(statistics.median(computed))} per run (median)")
    devices = dict.fromkeys(str(cell["device"]) for cell in finished if cell.get("device"))
    if devices:
        facts.append(f"Hardware: {'; '.join(devices)}")
    commits = dict.fromkeys(str(cell["commit"]) for cell in finished if cell.get("commit"))
    if commits:
        facts.append(f"Code: commit{'s' * (len(commits) > 1)} {', '.join(f'`{commit}`' for commit in commits)}")
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in cell["versions"].items())
        for cell in finished
        if cell.get("versions")
    )
    return facts + [f"Versions: {each}" for each in versions]


def read_card(path: str | Path) -> ModelCard:
    """Read a model card and check its metadata, as far as possible without the Hub.

    Args:
        path: The README.md.

    Returns:
        The card; `card.data.eval_results` are the results of its model-index.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the metadata is missing, is not YAML, or has no license or an invalid model-index.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Write a model card, or make one from results.json with run_card."
        )
    text = path.read_text(encoding="utf-8-sig")
    if not text.startswith("---"):
        raise ValueError(f"{path} has no metadata. It must begin with a block of YAML between two lines '---'.")
    try:
        card = ModelCard(text)
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} has metadata that the Hub would reject ({reason}). Correct it.") from error
    if not card.data.license:
        raise ValueError(f"{path} has no license in its metadata. Add a line such as 'license: {LICENSE}'.")
    return card
