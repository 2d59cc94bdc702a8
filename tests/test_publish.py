import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_dl.models import (
    SlotAutoencoderConfig,
    SlotAutoencoderModel,
    SlotEncoderModel,
    SlotImageProcessor,
    SlotUNetModel,
    make_autoencoder,
)
from hf_dl.pipelines.diffusion_sampling import noise_schedule
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.publishing.command import main, make_parser, prepare
from hf_dl.publishing.models import check_model
from hf_dl.reporting.card import LOCAL_ID, run_card
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.reporting.fake_runs import write_run

ROOT = Path(__file__).resolve().parents[1]
METRICS = {"val_fg_ari": 0.876543, "val_loss": 0.0123, "val_images": 320.0}


@pytest.fixture(scope="module")
def slots_run(tmp_path_factory):
    """A run folder as training leaves it, with a model that was never trained."""
    folder = tmp_path_factory.mktemp("runs") / "train_slots"
    torch.manual_seed(0)
    model = SlotAutoencoderModel(SlotAutoencoderConfig(image_size=32, num_slots=3, decoder_size=8))
    model.save_pretrained(folder)
    SlotImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    changes = {"model_class": "SlotAutoencoderModel", "script": "train_slots.py"}
    write_run(folder, {"style": "plain", "num_slots": 3, "seed": 0}, METRICS, **changes)
    for ignored in (
        "checkpoints/step_1/state.bin",
        "checkpoints_old/x.json",
        "best/model.safetensors",
        ".cache/x.txt",
    ):
        (folder / ignored).parent.mkdir(parents=True, exist_ok=True)
        (folder / ignored).write_text("/home/me")
    Image.new("RGB", (8, 8), "red").save(folder / "slots.png")
    return folder


@pytest.fixture
def vit_run(tmp_path):
    folder = tmp_path / "vit"
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    write_run(folder, {"source": "me/birds"}, {"test_accuracy": 0.9}, model_class="ViTForImageClassification")
    return folder


@pytest.fixture
def space(tmp_path):
    folder = tmp_path / "space"
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\ntitle: Slots\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\ncolorFrom: blue\n---\n# Slots\n"
    )
    (folder / "app.py").write_text("import gradio\n")
    (folder / "requirements.txt").write_text("torch\n")
    return folder


@pytest.fixture
def publish(start_fresh, tmp_path):
    """Run scripts/publish.py with its arguments."""

    def run(*args, env):
        code = f"import runpy; runpy.run_path({str(ROOT / 'scripts' / 'publish.py')!r}, run_name='__main__')"
        return start_fresh(code, *map(str, args), cwd=tmp_path, env={**env, "PYTHONPATH": str(ROOT)})

    return run


LOAD = """
import sys
sys.modules["hf_dl"] = None  # `import hf_dl` raises ImportError: the checkpoint's own code must do
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel


def load(file, **trust):
    model = AutoModel.from_pretrained("me/slots", revision="v1.0", **trust)
    processor = AutoImageProcessor.from_pretrained("me/slots", revision="v1.0", **trust)
    save_file(model.state_dict(), file)
    print(type(model).__module__.split(".")[0], type(processor).__name__, model.training)


load("without.safetensors", trust_remote_code=True)
del sys.modules["hf_dl"]
import hf_dl.models
load("with.safetensors")
"""


def test_published_slots_load_with_and_without_hf_dl(slots_run, tmp_path, publish, start_fresh):
    with LoopbackHub() as hub:
        done = publish(slots_run, "me/slots", "--tag", "v1.0", env=hub.env(tmp_path / "push"))
        assert done.returncode == 0, done.stderr
        assert f"Published: {hub.endpoint}/me/slots/commit/" in done.stdout
        repo = hub.repos["model", "me/slots"]
        assert repo.messages == ["initial commit", "Publish slots"]  # one commit
        files = hub.files("me/slots", "v1.0")
        code = {path.name for path in slots_run.glob("*.py")}
        assert code and set(files) == code | {
            ".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
            "results.json", "slots.png",
        }  # fmt: skip
        assert repo.commits[repo.tags["v1.0"]]["model.safetensors"].lfs
        assert files["model.safetensors"] == (slots_run / "model.safetensors").read_bytes()
        assert json.loads(files["results.json"])["metrics"] == METRICS
        card = files["README.md"].decode()
        assert (
            'AutoModel.from_pretrained("me/slots", trust_remote_code=True)' in card and "![slots](slots.png)" in card
        )
        assert str(slots_run.parent) not in card + files["results.json"].decode()
        env = hub.env(tmp_path / "load", token=None) | {"PYTHONPATH": str(ROOT)}
        done = start_fresh(LOAD, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines() == [
            "transformers_modules SlotImageProcessor False",
            "hf_dl SlotImageProcessor False",
        ]
        expected = load_file(slots_run / "model.safetensors")
        for how in ("with", "without"):
            found = load_file(tmp_path / f"{how}.safetensors")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert any(method == "GET" and path.startswith("/lfs/objects/") for method, path in hub.requests)


# One process for many calls: huggingface_hub takes a second to import, and each call reads HF_TOKEN again.
CALLS = """
import json, os, sys
from hf_dl.publishing.command import main, make_parser, prepare
for token, argv in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    print("status", main(argv), file=sys.stderr, flush=True)
"""


def test_published_space_and_what_the_hub_refuses(space, tmp_path):
    def publish_many(*calls):
        argv = [[token, [str(space), repo_id, "--type", "space", *rest]] for token, repo_id, *rest in calls]
        env = {**hub.env(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CALLS, json.dumps(argv)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()

    me, name = TOKEN, "me/explorer"
    with LoopbackHub() as hub:
        said = publish_many(
            (me, name, "--private", "--message", "First"),
            (None, name),
            ("hf_wrong", name),
            (me, "you/explorer"),
            (me, name, "--tag", "v1"),  # nothing has changed, but the tag is new
            (me, name, "--tag", "v1"),
        )
        assert [line for line in said if line.startswith("status")] == [f"status {n}" for n in (0, 1, 1, 1, 0, 1)]
        sentences = [line for line in said if line.startswith("publish: ")]
        assert len(sentences) == 4
        assert "You are not logged in. Run `hf auth login`" in sentences[0]
        assert "does not accept your token" in sentences[1]
        assert "me may not write to 'you/explorer'" in sentences[2]
        assert "tag='v1' already exists" in sentences[3]
        repo = hub.repos["space", name]
        assert repo.sdk == "gradio" and repo.private and repo.messages == ["initial commit", "First"]
        files = hub.files(name, "v1", type="space")
        assert {path: files[path] for path in files if path != ".gitattributes"} == {
            path.name: path.read_bytes() for path in space.iterdir()
        }
        (space / "app.py").write_text("import gradio as gr\n")
        asked = len(hub.requests)
        assert publish_many((me, name, "--dry_run"))[-1] == "status 0"
        assert len(hub.requests) == asked  # a dry run contacts nothing
        assert publish_many((me, name, "--revision", "next"))[-1] == "status 0"
        assert hub.files(name, type="space")["app.py"] == b"import gradio\n"
        assert hub.files(name, "next", type="space")["app.py"] == b"import gradio as gr\n"
    said = publish_many((me, name))
    assert said[-1] == "status 1" and "could not be reached" in said[-2]


def test_client_round_trip_of_other_endpoints(tmp_path):
    """Test the endpoints of the loopback hub that other tests use."""
    program = """
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
api = HfApi()
big = bytes(range(256)) * 60000
assert api.whoami()["name"] == "me"
api.create_repo("me/data", repo_type="dataset")
api.upload_file(path_or_fileobj=big, path_in_repo="a/big.txt", repo_id="me/data", repo_type="dataset")
api.upload_file(path_or_fileobj=b"small", path_in_repo="a/b/small.txt", repo_id="me/data", repo_type="dataset")
folder = snapshot_download("me/data", repo_type="dataset")
assert open(folder + "/a/big.txt", "rb").read() == big
info = {entry.path: entry for entry in api.list_repo_tree("me/data", "a", repo_type="dataset", recursive=True)}
assert info["a/big.txt"].lfs.size == len(big) and info["a/b/small.txt"].lfs is None and "a/b" in info
assert [e.path for e in api.get_paths_info("me/data", ["a/big.txt", "no"], repo_type="dataset")] == ["a/big.txt"]
with open(hf_hub_download("me/data", "a/b/small.txt", repo_type="dataset")) as file:
    assert file.read() == "small"
for error, call in (
    (EntryNotFoundError, lambda: hf_hub_download("me/data", "no.txt", repo_type="dataset")),
    (RevisionNotFoundError, lambda: hf_hub_download("me/data", "a/big.txt", repo_type="dataset", revision="no")),
    (RepositoryNotFoundError, lambda: api.model_info("me/none")),
):
    try:
        call()
    except error:
        continue
    raise AssertionError(error)
from huggingface_hub import HfFileSystem
with HfFileSystem().open("datasets/me/data/a/big.txt", "rb") as file:
    file.seek(1000)
    assert file.read(10) == big[1000:1010]
ModelCard("---\\nlicense: mit\\n---\\n").validate()
try:
    ModelCard("---\\nlicense: [1, {a: b\\n---\\n").validate()
except Exception as error:
    print(type(error).__name__)
api.delete_file("a/b/small.txt", "me/data", repo_type="dataset")
assert api.list_repo_files("me/data", repo_type="dataset") == [".gitattributes", "a/big.txt"]
api.delete_repo("me/data", repo_type="dataset")
assert not api.repo_exists("me/data", repo_type="dataset")
"""
    with LoopbackHub() as hub:
        done = subprocess.run(
            [sys.executable, "-c", program], env=hub.env(tmp_path), capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]


def test_cards_pass_the_check_of_the_hub(slots_run, vit_run, tmp_path):
    cards = {name: str(run_card(folder)) for name, folder in (("slots", slots_run), ("vit", vit_run))}
    cards["bad"] = cards["vit"].replace("  - task:\n      type: image-classification\n    dataset", "  - dataset")
    assert cards["bad"] != cards["vit"]
    for name, text in cards.items():
        (tmp_path / f"{name}.md").write_text(text)
    program = """
from huggingface_hub import HfApi
for name in ("slots", "vit", "bad"):
    try:
        HfApi()._validate_yaml(open(name + ".md").read())
        print(name)
    except ValueError as error:
        print(error)
"""
    with LoopbackHub() as hub:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=hub.env(tmp_path), capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[:2] == ["slots", "vit"], done.stderr
    assert "task.type" in done.stdout


def test_dry_run_lists_what_would_go(slots_run, capsys):
    assert main([str(slots_run), "me/slots", "--dry_run", "--revision", "next"]) == 0
    out = capsys.readouterr().out
    assert "/me/slots, branch next" in out and "model.safetensors" in out and "Nothing was sent" in out
    assert "checkpoints" not in out and "log.jsonl" not in out and "best" not in out
    assert not (slots_run / "README.md").exists()


def problems_of(capsys, *args):
    assert main([*map(str, args), "--dry_run"]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


def test_stock_model_with_a_head(vit_run, capsys):
    assert main([str(vit_run), "me/vit", "--dry_run"]) == 0
    run_card(vit_run).save(vit_run / "README.md")
    assert main([str(vit_run), "me/vit", "--dry_run"]) == 0
    capsys.readouterr()
    # The card must agree with the results: its metadata and its table.
    results = json.loads((vit_run / "results.json").read_text())
    results["metrics"]["test_accuracy"] = 0.8
    (vit_run / "results.json").write_text(json.dumps(results))
    error = problems_of(capsys, vit_run, "me/vit")
    assert "README.md says test_accuracy = 0.9, but results.json says 0.8" in error
    assert "The table of README.md says test_accuracy = 0.9000, but results.json says 0.8000" in error


def test_the_code_of_a_published_card_names_the_repository(vit_run, monkeypatch):
    monkeypatch.chdir(vit_run.parent.parent)
    local = f'pipeline("image-classification", "{vit_run.parent.name}/vit")'
    run_card(vit_run).save(vit_run / "README.md")
    assert local in (vit_run / "README.md").read_text()
    renamed, published = vit_run.rename(vit_run.with_name("renamed")), {}
    assert list(check_model(renamed, "me/birds", published)) == []
    text = published["README.md"].decode()
    assert 'pipeline("image-classification", "me/birds")' in text and local not in text


def damage_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damage_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damage_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 16}))


def damage_class(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Nothing"]}))


def damage_results(folder):
    path = folder / "results.json"
    path.write_text(path.read_text()[:50])


def damage_card(folder):
    (folder / "README.md").write_text("---\nlicense: [a\n---\n")


def _write_pipeline(folder):
    encoder = {"image_size": 32, "num_slots": 3, "slot_dim": 8, "slot_mlp_dim": 8, "token_dim": 8}
    torch.manual_seed(0)
    SlotDiffusionPipeline(
        SlotEncoderModel(SlotAutoencoderConfig(**encoder, encoder_channels=[8, 8])),
        SlotUNetModel(
            sample_size=8, block_out_channels=(8,), attention_resolutions=(), attention_head_dim=4,
            cross_attention_dim=8, norm_num_groups=4, layers_per_block=1,
        ),
        make_autoencoder("small", sample_size=32, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3),
        noise_schedule(),
    ).save_pretrained(folder)  # fmt: skip
    write_run(folder, {"seed": 0}, {"test_loss": 0.9}, model_class="SlotDenoiser", script="train_slot_diffusion.py")
    usage = f'pipe = SlotDiffusionPipeline.from_pretrained("{LOCAL_ID}")'
    run_card(folder, usage=usage, library="diffusers").save(folder / "README.md")


def test_a_pipeline_and_a_model_of_diffusers(tmp_path, capsys):
    folder = tmp_path / "pipeline"
    _write_pipeline(folder)
    assert main([str(folder), "me/pipeline", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    for name in ("model_index.json", "unet/diffusion_pytorch_model.safetensors", "slot_encoder/model.safetensors"):
        assert name in shown
    assert "library_name: diffusers" in (folder / "README.md").read_text()

    alone = folder / "autoencoder"
    write_run(alone, {"seed": 0}, {"test_loss": 0.9}, model_class="AutoencoderKL", script="train_autoencoder.py")
    assert main([str(alone), "me/autoencoder", "--dry_run"]) == 0

    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert main([str(folder), "me/pipeline", "--dry_run"]) == 1
    assert "diffusion_pytorch_model.safetensors is incomplete or damaged" in capsys.readouterr().err
    weights.write_bytes(whole)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    assert main([str(folder), "me/pipeline", "--dry_run"]) == 1
    assert "has no model_index.json of a SlotDiffusionPipeline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "model.safetensors is incomplete or damaged"),
        (damage_nan, "classifier.bias has values that are not finite"),
        (damage_missing, r"The weights lack 1 tensors of the model in config.json (classifier.bias"),
        (damage_config, "from_pretrained cannot load"),
        (damage_class, "config.json names the class 'Nothing', which neither"),
        (damage_results, "results.json is cut short or damaged"),
        (damage_card, "README.md has metadata that the Hub would reject"),
        (lambda folder: (folder / "README.md").write_text("# Hello\n"), "README.md has no metadata"),
        (lambda folder: (folder / "README.md").write_text("---\ntags: [a]\n---\n"), "has no license"),
        (lambda folder: (folder / "results.json").unlink(), "results.json does not exist"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "from_pretrained cannot load"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "has no processor or tokenizer"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "preprocessor_config.json cannot be"),
        (lambda folder: (folder / "extra.bin").write_bytes(b""), "extra.bin is a pickle"),
        (
            lambda folder: (folder / "a.py").write_text(f'T = "hf_{"a" * 34}"'),
            "a.py contains what looks like",
        ),
        (
            lambda folder: (folder / "a.txt").write_text("in /home/me/data/x.png"),
            "a.txt contains the path '/home/me/data",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_fault_is_a_sentence(vit_run, capsys, damage, message):
    damage(vit_run)
    error = problems_of(capsys, vit_run, "me/vit")
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("- ")]) == len(error.splitlines()) - 1


def test_a_file_above_the_limit(space, capsys, monkeypatch):
    monkeypatch.setattr("hf_dl.publishing.files.MAX_GIGABYTES", 1e-9)
    assert "the limit is 1e-09 GB" in problems_of(capsys, space, "me/space", "--type", "space")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("README.md", "sdk: gradio", "sdk: docker", "sdk='docker'. Write 'sdk: gradio'"),
        ("README.md", "title: Slots\n", "", "has no 'title'"),
        ("README.md", "app_file: app.py", "app_file: main.py", "app_file='main.py' does not exist"),
        ("README.md", "title: Slots", "title: [", "invalid metadata"),
        ("README.md", "---\ntitle", "title", "sdk=None"),
        ("app.py", "import gradio", "import gradio as", "app.py is not valid Python: "),
        ("requirements.txt", None, None, "has no requirements.txt"),
        ("README.md", None, None, "has no README.md"),
    ],
)
def test_each_fault_of_a_space_is_a_sentence(space, capsys, file, old, new, message):
    text = (space / file).read_text()
    if old is None:
        (space / file).unlink()
    else:
        assert old in text
        (space / file).write_text(text.replace(old, new))
    assert message in problems_of(capsys, space, "me/space", "--type", "space")


@pytest.mark.parametrize("repo_id", ["slots", "a/b/c", "me/", "me/sl ots", "me/--x", "me/x.git"])
def test_malformed_repository_ids(space, capsys, repo_id):
    assert f"repo_id={repo_id!r} is invalid" in problems_of(capsys, space, repo_id, "--type", "space")


def test_missing_folder(tmp_path, capsys):
    assert "does not exist. Name the folder of a run" in problems_of(capsys, tmp_path / "no", "me/slots")


def test_spaces_of_the_project_are_ready(capsys):
    for folder in (ROOT / "spaces").iterdir():
        if (folder / "app.py").is_file():
            assert main([str(folder), f"me/{folder.name}", "--type", "space", "--dry_run"]) == 0, capsys.readouterr()


def test_token_is_no_secret():
    assert len(TOKEN) < 30  # so that publish.py's own check does not take it for a real one


# ------------------------------------------------------------------------------------------------ what a Space needs


@pytest.fixture
def space_with_package(space):
    (space / "requirements.txt").write_text("# for the page\nhf-dl>=0.1,<1\ntorch>=2.11,<3\neinops\n")
    return space


def prepare_space(*args):
    return prepare(make_parser().parse_args([*map(str, args), "--type", "space"]))


def test_the_package_is_copied_into_a_space(space_with_package):
    files, problems = prepare_space(space_with_package, "me/space")
    assert not problems
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_dl").rglob("*.py") if "bundle" not in path.parts}
    assert code == {name for name in files if name.startswith("hf_dl/") and name.endswith(".py")}
    assert not [name for name in files if "__pycache__" in name or name.startswith("hf_dl/bundle")]
    lines = files["requirements.txt"].decode().splitlines()
    names = [re.match(r"[\w.-]+", line)[0] for line in lines]
    assert {"torch", "transformers", "diffusers", "einops"} <= set(names) and len(set(names)) == len(names)
    assert not {"hf_dl", "hf-dl", "gradio", "tensorboard"} & set(names)


@pytest.mark.parametrize(
    ("package", "line"),
    [("hf_dl>=0.1,<1", "hf_dl>=0.1,<1"), ("git+https://x.org/hf_dl", "hf_dl @ git+https://x.org/hf_dl")],
)
def test_the_package_of_a_space_can_come_from_elsewhere(space_with_package, package, line):
    files, problems = prepare_space(space_with_package, "me/space", "--package", package)
    assert not problems and not [name for name in files if name.startswith("hf_dl/")]
    assert files["requirements.txt"].decode().splitlines() == [line, "torch>=2.11,<3", "einops"]


def test_a_space_without_the_package_stays_as_it_is(space):
    files, _ = prepare_space(space, "me/space")
    assert files == {path.name: path for path in space.iterdir()}


def test_a_model_is_copied_into_a_space(space, slots_run):
    files, problems = prepare_space(space, "me/space", "--model", slots_run)
    assert not problems
    found = {name for name in files if name.startswith("model/")}
    assert found == {f"model/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")}


def test_a_pipeline_is_copied_into_a_space(space, tmp_path):
    _write_pipeline(tmp_path / "pipeline")
    files, problems = prepare_space(space, "me/space", "--model", tmp_path / "pipeline")
    assert not problems
    copy = tmp_path / "copy"
    for name, path in files.items():
        if name.startswith("model/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(path.read_bytes())
    assert SlotDiffusionPipeline.from_pretrained(copy / "model").unet.config.sample_size == 8


def test_faults_of_a_copied_model_are_sentences(space, vit_run, capsys, monkeypatch):
    options = (space, "me/space", "--type", "space", "--model")
    assert "model='no-run' does not exist. Name the folder of a run" in problems_of(capsys, *options, "no-run")
    damage_truncate(vit_run)
    assert "model.safetensors is incomplete" in problems_of(capsys, *options, vit_run)
    monkeypatch.setattr("hf_dl.publishing.spaces.MAX_MODEL_MEGABYTES", 1e-3)
    assert "the limit is 0.001 MB. Publish it as a model" in problems_of(capsys, *options, vit_run)


def test_a_model_takes_no_options_of_a_space(vit_run, capsys):
    with pytest.raises(SystemExit):
        main([str(vit_run), "me/vit", "--package", "hf_dl"])
    assert "--model, --package need --type space" in capsys.readouterr().err


def test_old_files_of_the_package_are_deleted(space_with_package, tmp_path, publish):
    words = [str(space_with_package), "me/space", "--type", "space"]
    with LoopbackHub() as hub:
        assert publish(*words, env=hub.env(tmp_path / "home")).returncode == 0
        assert "hf_dl/cli.py" in hub.files("me/space", type="space")
        repo = hub.repos["space", "me/space"]
        assert len(repo.messages) == 2  # one commit after the first one of the Hub
        done = publish(*words, "--package", "hf_dl>=0.1,<1", env=hub.env(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        assert not [name for name in hub.files("me/space", type="space") if name.startswith("hf_dl/")]


def test_a_metric_is_pushed_as_a_space(tmp_path, publish, start_fresh):
    with LoopbackHub() as hub:
        done = publish("segmentation", "me/scores", "--type", "metric", env=hub.env(tmp_path / "push"))
        assert done.returncode == 0, done.stderr
        assert hub.repos["space", "me/scores"].sdk == "gradio"
        code = """
import sys
sys.modules["hf_dl"] = None
import evaluate
metric = evaluate.load("me/scores")
print(metric.compute(predictions=[[[5, 5, 0], [3, 3, 0]]], references=[[[0, 0, 1], [2, 2, 1]]])["decoder_ari"])
"""
        env = {**hub.env(tmp_path / "load", token=None), "HF_EVALUATE_OFFLINE": "0"}
        done = start_fresh(code, cwd=tmp_path, env=env)
        assert done.stdout.strip() == "1.0", done.stderr[-3000:]


def test_faults_of_a_metric_are_sentences(capsys):
    assert "metric='segments' is unknown" in problems_of(capsys, "segments", "me/segments", "--type", "metric")
    assert "cannot name a metric" in problems_of(capsys, "segmentation", "me/app", "--type", "metric")
