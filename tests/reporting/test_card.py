import json
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from hf_dl.reporting.card import (
    experiment_card,
    format_metric,
    metric_type,
    read_card,
    results_key,
    run_card,
    usage_snippet,
    with_repository,
)
from hf_dl.reporting.experiment import read_experiment
from hf_dl.reporting.report import collect
from tests.reporting.fake_runs import CLAIMS, TOML, write_run, write_runs

METRICS = {"val_fg_ari": 0.87654321, "test_accuracy": 0.5, "val_images": 320.0, "seconds_per_step": 0.0123}
METRICS |= {"train_accuracy": 0.75, "test_macro_f1": 0.25}


@pytest.fixture
def folder(tmp_path):
    write_run(
        tmp_path / "run",
        {"style": "plain", "seed": 3, "deep": False, "unset": None, "note": "", "sizes": [2, 4]},
        METRICS,
    )
    return tmp_path / "run"


def saved(card, path):
    card.save(path)
    return read_card(path)


def test_metadata_are_those_that_huggingface_hub_reads(folder, tmp_path):
    changes = {"model_class": "FakeForImageClassification"}
    write_run(folder, {"source": "me/birds", "config": "small", "style": "plain"}, METRICS, **changes)
    card = saved(run_card(folder, name="slots", tags=["slots"]), tmp_path / "a.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "transformers"
    assert (
        data["pipeline_tag"] == "image-classification"
        and data["datasets"] == ["me/birds"]
        and data["tags"] == ["hf_dl", "slots"]
    )
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "slots"
    by_metric = {results_key(result): result for result in results}
    assert [*by_metric] == ["test_accuracy", "test_macro_f1", "seconds_per_step", "val_fg_ari"]
    assert all(result.metric_value == METRICS[key] for key, result in by_metric.items())
    assert [result.metric_type for result in results] == ["accuracy", "f1", "seconds_per_step", "fg_ari"]
    assert by_metric["val_fg_ari"].dataset_split == "validation"
    assert by_metric["test_accuracy"].dataset_split == "test"
    assert by_metric["seconds_per_step"].dataset_split is None
    assert {result.task_type for result in results} == {"image-classification"}
    assert {(result.dataset_type, result.dataset_config) for result in results} == {("me/birds", "small")}
    # Read again and written again, nothing changes.
    assert ModelCardData(**data).to_dict() == data and str(ModelCard(str(card))) == str(card)


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("synthetic", {}),
        ("birds", {}),  # a folder whose path was cut
        ("/data/me/birds", {}),
        ("data/birds", {"local_paths": ["output_dir", "source"]}),
        (None, {}),
    ],
)
def test_data_that_is_not_on_the_hub_has_no_place_in_the_index(folder, tmp_path, source, changes):
    write_run(folder, {"source": source}, METRICS, **changes)
    data = saved(run_card(folder), tmp_path / "a.md").data.to_dict()
    assert not {"model-index", "datasets", "pipeline_tag"} & set(data)
    assert "| `test_accuracy` | test |" in run_card(folder).text


def test_the_command_has_the_flags_that_were_given(folder):
    results = write_run(
        folder, {"source": "photos", "num_classes": 25, "epochs": 0.0, "seed": 3, "deep": True}, METRICS
    )
    given = {"output_dir": "runs/mine", "source": "/data/photos", "epochs": 2.0, "resume": True, "sizes": [2, 4]}
    given |= {"push_to_hub": True, "hub_model_id": "me/mine", "deep": False, "note": ""}

    def command():
        text = re.search(r"```bash\n(.*?)```", run_card(folder).text, re.DOTALL)[1].split("\n", 1)[1]
        return " ".join(text.replace("\\\n", " ").split())

    write_run(folder, results["args"], METRICS, given_args=given)
    script = "scripts/run accelerate launch scripts/train_fake.py"
    assert command() == f"{script} --source photos --epochs 2.0 --sizes 2 4 --deep false"
    write_run(folder, results["args"], METRICS, given_args={})
    assert command() == script
    assert "| `num_classes` | `25` |" in run_card(folder).text  # the table lists all


def test_sections_and_numbers_come_from_the_files(folder):
    text = str(run_card(folder, name="slots"))
    for heading in ("# slots", "## Results", "## How to use", "## Training", "## Data", "## Limits", "## How to"):
        assert heading in text
    assert "| `val_fg_ari` | validation | 320 | 0.8765 |" in text
    assert "| `test_accuracy` | test | – | 0.5000 |" in text
    for fact in (
        "1,234 parameters", "100 steps, seed 3", "12 seconds", "CPU, 2 cores, one process, no mixed precision",
        "commit `0123456789abcdef`", "torch 2.15.0, transformers 5.23.0", "2030-01-02T03:04:05+00:00",
    ):  # fmt: skip
        assert fact in text
    assert "More information needed" not in text and "{{" not in text and "None" not in text
    assert str(folder.parent) not in text
    command = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1]
    assert command.startswith("git checkout 0123456789abcdef\nscripts/run accelerate launch scripts/train_fake.py ")
    assert max(map(len, command.splitlines())) <= 102
    words = command.replace("\\\n", " ").split()
    assert words[words.index("--sizes") + 1 :] == ["2", "4"]
    assert words[words.index("--deep") + 1] == "false" and words[words.index("--seed") + 1] == "3"
    for absent in ("output_dir", "unset", "note"):
        assert absent not in command
    # A number that is not in the files is nowhere in the card.
    write_run(folder, {"seed": 3}, METRICS | {"val_fg_ari": 0.1111})
    assert "0.8765" not in str(run_card(folder)) and "0.1111" in str(run_card(folder))


def test_n_is_the_number_of_examples_that_a_metric_is_over(folder):
    counts = {"test_images": 500.0, "test_images_without_fg_ari": 7.0, "val_images": 320.0}
    scores = {"test_decoder_ari": 0.5, "test_decoder_fg_ari": 0.25, "test_loss": 0.1, "val_loss": 0.2, "fid": 30.0}
    write_run(folder, {}, scores | counts)
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \|", run_card(folder).text, re.MULTILINE)
    assert rows == [
        ("test_decoder_ari", "test", "500"),
        ("test_decoder_fg_ari", "test", "493"),
        ("test_loss", "test", "500"),
        ("fid", "–", "–"),
        ("val_loss", "validation", "320"),
    ]


def test_limits_follow_from_the_results(folder):
    limits = str(run_card(folder, limits=["It sees only cubes."])).split("## Limits")[1].split("##")[0]
    assert limits.strip().startswith("- It sees only cubes.\n- One seed:")
    assert "are synthetic" in limits and "on the validation split" not in limits and "collapsed" not in limits
    changes = {"restarts": 2, "dirty": True}
    write_run(folder, {"source": "me/birds"}, {"val_accuracy": 0.5}, **changes)
    card = str(run_card(folder))
    limits = card.split("## Limits")[1].split("##")[0]
    assert "restarted 2 times" in limits and "uncommitted changes" in limits and "on the validation split" in limits
    assert "synthetic" not in card and "`me/birds`, from the flag `--source`" in card
    write_run(folder, {"source": "/mnt/secret/birds"}, {"val_accuracy": 0.5})
    assert "/mnt" not in str(run_card(folder)) and "`birds`" in str(run_card(folder))


def test_pictures_of_the_folder_are_shown(folder):
    assert "![" not in str(run_card(folder))
    (folder / "slot_masks.png").write_bytes(b"")
    (folder / "curves.svg").write_text("")
    text = str(run_card(folder))
    places = [text.index(part) for part in ("![slot masks](slot_masks.png)", "## Results", "![curves](curves.svg)")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("auto_map", "file", "expected"),
    [
        (
            {"AutoConfig": "m.C", "AutoModel": "m.FakeModel"},
            "preprocessor_config.json",
            ["from transformers import AutoImageProcessor, AutoModel", 'AutoModel.from_pretrained(".", trust_remote'],
        ),
        (
            {"AutoModel": "m.FakeModel", "AutoModelForSeq2SeqLM": "m.FakeModel"},
            "processor_config.json",
            ["AutoProcessor", "model = AutoModelForSeq2SeqLM.from_pretrained"],
        ),
        ({}, "tokenizer_config.json", ["import AutoTokenizer, FakeModel", 'FakeModel.from_pretrained(".")']),
        ({}, None, ["from transformers import FakeModel"]),
    ],
)
def test_usage_is_what_the_folder_needs(folder, auto_map, file, expected):
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    if file:
        (folder / file).write_text("{}")
    usage = usage_snippet(folder, "FakeModel")
    compile(usage, "usage", "exec")
    assert all(part in usage for part in expected) and ("trust_remote_code" in usage) == bool(auto_map)
    assert usage in str(run_card(folder))
    if file:
        own = usage_snippet(folder, "FakeModel", calls='image = Image.open("a.png")\nmodel(image)')
        assert own.startswith("from PIL import Image\n") and own.endswith('image = Image.open("a.png")\nmodel(image)')
        assert "Processor" not in own and "Tokenizer" not in own


def test_the_code_of_a_local_card_runs_where_the_script_ran(folder, tmp_path, monkeypatch):
    (folder / "config.json").write_text("{}")
    assert 'FakeModel.from_pretrained(".")' in str(run_card(folder, usage=usage_snippet(folder, "FakeModel")))
    monkeypatch.chdir(tmp_path)
    usage = f'{usage_snippet(folder, "FakeModel")}\npipe = pipeline("image-segmentation", ".")'
    text = str(run_card(folder, usage=usage))
    assert 'FakeModel.from_pretrained("run")' in text and 'pipeline("image-segmentation", "run")' in text
    monkeypatch.chdir(tmp_path.parent)
    assert f'FakeModel.from_pretrained("{tmp_path.name}/run")' in str(run_card(folder, usage=usage))


@pytest.mark.parametrize("auto_map", [{}, {"AutoModelForCausalLM": "m.FakeForCausalLM"}])
def test_a_task_of_transformers_is_used_through_its_pipeline(folder, auto_map):
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    usage = usage_snippet(folder, "FakeForCausalLM")
    assert ('pipeline("text-generation", ".", trust_remote_code=True)' in usage) == bool(auto_map)
    assert 'pipeline("text-generation", "me/lm"' in with_repository(usage, "me/lm")
    compile(usage, "usage", "exec")


def test_a_pipeline_comes_before_the_calls_of_a_class_without_a_task(folder):
    usage = usage_snippet(folder, "FakeModel", calls="model.segment()", task="image-segmentation")
    compile(usage, "usage", "exec")
    assert "from transformers import FakeModel, pipeline\n" in usage
    assert usage.index('print(pipe("image.png"))') < usage.index("model = FakeModel") < usage.index("model.segment()")
    assert run_card(folder, usage=usage, task="image-segmentation").data.pipeline_tag == "image-segmentation"


def test_damaged_files_are_one_sentence(folder, tmp_path):
    (folder / "config.json").write_text('{"auto')
    with pytest.raises(ValueError, match="config.json is cut short"):
        run_card(folder)
    (folder / "config.json").unlink()
    write_run(folder, {}, {"val_accuracy": float("nan")})
    with pytest.raises(ValueError, match="the metric 'val_accuracy' is nan. A card needs finite numbers"):
        run_card(folder)
    (folder / "results.json").write_text('{"metrics": {"a"')
    with pytest.raises(ValueError, match="cut short or damaged") as error:
        run_card(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="the run has not finished"):
        run_card(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Title\n", "has no metadata"),
        ("---\nlicense: [a\n---\n", "metadata that the Hub would reject"),
        ("---\n- a\n---\n", "metadata that the Hub would reject"),
        (
            "---\nlicense: mit\nmodel-index:\n- name: a\n  results:\n  - x: 1\n---\n",
            "metadata that the Hub would reject",
        ),
        ("---\ntags: [a]\n---\n", "has no license"),
    ],
)
def test_cards_that_the_hub_would_refuse(tmp_path, text, message):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_card(tmp_path / "README.md")
    with pytest.raises(FileNotFoundError, match="Write a model card"):
        read_card(tmp_path / "none.md")


def test_card_of_an_experiment(tmp_path):
    (tmp_path / "fake.toml").write_text(TOML.replace('"synthetic"', '"me/birds"'))
    experiment = read_experiment(tmp_path / "fake.toml")
    write_runs(experiment, tmp_path / "runs", skip=lambda flags: flags["width"] == 8 and flags["norm"] == "batch")
    report = collect(experiment, tmp_path / "runs")
    report.cells[6] |= {"status": "failed", "error": "ValueError: loss is nan"}
    card = saved(experiment_card(report, figures=["fake.svg"]), tmp_path / "fake.md")
    text = str(card)
    for part in (
        "# Experiment: fake", "Runs: 12 of `scripts/train_fake.py`, 9 of them finished", "Does more help?",
        "More is better.", "![fake](fake.svg)", "3 of 12 runs have no result", "ValueError: loss is nan",
        "scripts/run_experiment.py scripts/experiments/fake.toml", "| `width` | `4`, `8` |", "3 seeds:",
    ):  # fmt: skip
        assert part in text
    body = card.text
    places = [body.index(part) for part in ("# Experiment", "Does more help?", "![fake]", "| W ", "More is better.")]
    assert places == sorted(places)
    results = card.data.eval_results
    assert [result.metric_type for result in results] == ["accuracy"] * 3 + ["loss"] * 3
    values = [cell["metrics"]["val_accuracy"] for cell in report.cells[:3]]
    assert results[0].metric_value == pytest.approx(sum(values) / 3, rel=1e-12)
    assert results[0].metric_args["seeds"] == 3 and results[0].metric_name == "mean accuracy (width = 4, norm = batch)"


def test_claims_and_notes_stand_in_the_card(tmp_path):
    (tmp_path / "fake.toml").write_text(TOML + CLAIMS)
    experiment = read_experiment(tmp_path / "fake.toml")
    write_runs(experiment, tmp_path / "runs")
    text = str(experiment_card(collect(experiment, tmp_path / "runs")))
    assert "- **4**: A narrow one.\n" in text
    assert "\n\n## Expected and measured\n\nMore is better.\n\n| expected" in text and "| Group beats batch" in text
    (tmp_path / "fake.toml").write_text(TOML)
    card = experiment_card(collect(read_experiment(tmp_path / "fake.toml"), tmp_path / "runs"))
    assert not card.data.eval_results  # the data is synthetic
    text = str(card)
    assert "More is better." in text and "| expected" not in text and "The measured value" not in text


def test_samples_stand_in_fences_that_they_cannot_close(tmp_path):
    (tmp_path / "fake.toml").write_text("samples = true\n" + TOML)
    experiment = read_experiment(tmp_path / "fake.toml")
    write_runs(experiment, tmp_path / "runs")
    report = collect(experiment, tmp_path / "runs")
    assert "Texts from several steps" not in experiment_card(report).text
    hostile = "```\n# Title {{ x }}\n<script>"
    report.cells[3]["samples"] = [{"step": 1, "text": ""}, {"step": 1200, "text": hostile}]
    text = saved(experiment_card(report), tmp_path / "fake.md").text
    assert "**W = 4, group**, seed 0\n\nAfter step 1:\n\n```text\n\n```\n" in text
    assert f"After step 1,200:\n\n````text\n{hostile}\n````\n" in text
    assert text.index("## Expected and measured") < text.index("## Texts from several") < text.index("## Training")


def test_card_of_an_experiment_without_results(tmp_path):
    (tmp_path / "fake.toml").write_text(TOML)
    card = experiment_card(collect(read_experiment(tmp_path / "fake.toml"), tmp_path / "runs"))
    assert not card.data.eval_results and "No run has finished." in card.text and "missing" in card.text


def test_format_metric():
    numbers = {0.5: "0.5000", 320.0: "320", 0.00012345: "0.0001234", 12345.6: "12346", -1.0: "-1", 99.95: "99.95"}
    assert {number: format_metric(number) for number in numbers} == numbers
    assert format_metric(float("inf")) == "inf"


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("test_accuracy", "accuracy"),
        ("test_micro_f1", "f1"),
        ("val_macro_precision", "precision"),
        ("situations_macro_recall", "recall"),
        ("test_perplexity", "perplexity"),
        ("reconstruction_mse", "mse"),
        ("composition_fid", "fid"),
        ("composition_fid_random_conv_v1", "composition_fid_random_conv_v1"),  # features that are not Inception's
        ("test_top_5_accuracy", "top_5_accuracy"),
        ("test_posterior_fg_ari", "posterior_fg_ari"),
    ],
)
def test_metric_types_are_the_names_of_the_hub(metric, expected):
    assert metric_type(metric) == expected


def test_an_experiment_indexes_test_metrics_first_and_no_training_metrics_or_times(tmp_path):
    names = ["train_accuracy", "val_accuracy", "test_accuracy", "seconds", "test_macro_f1", "test_loss"]
    text = TOML.replace('["val_accuracy", "val_loss"]', str(names))
    (tmp_path / "fake.toml").write_text(text.replace('"synthetic"', '"me/birds"'))
    experiment = read_experiment(tmp_path / "fake.toml")
    for cell in experiment.cells(tmp_path / "runs"):
        write_run(cell.folder, cell.flags, dict.fromkeys(names, 0.5) | {"val_loss": 0.5})
    card = saved(experiment_card(collect(experiment, tmp_path / "runs")), tmp_path / "fake.md")
    kinds = [result.metric_type for result in card.data.eval_results]
    assert kinds == ["accuracy"] * 4 + ["f1"] * 4 + ["loss"] * 4
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}


def test_a_wide_picture_leads_and_curves_lead_only_if_no_other_can(folder):
    sizes = {"curves.png": (100, 40), "tall.png": (100, 90), "wide.png": (100, 50)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(folder / name)
    (folder / "square.svg").write_text('<svg viewBox="0 0 10 10"></svg>')

    def pictures():
        text = run_card(folder).text
        return re.findall(r"\]\((\S+?\.(?:png|svg))\)|(## Results)", text)

    assert pictures() == [
        ("wide.png", ""),
        ("", "## Results"),
        *[(n, "") for n in ("curves.png", "square.svg", "tall.png")],
    ]
    (folder / "wide.png").unlink()
    assert pictures()[:2] == [("curves.png", ""), ("", "## Results")]
    (folder / "curves.png").unlink()
    assert pictures()[0] == ("", "## Results")
