import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from hf_dl.pipelines.math_program import MathProgramPipeline
from hf_dl.programs import is_close
from hf_dl.reporting.card import read_card
from hf_dl.reporting.experiment import read_results
from scripts import evaluate_seq2seq, run_experiment, train_seq2seq
from tests.scripts.runs import reset
from tests.snippets import run_snippet

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--num_train=48 --num_test=10 --batch_size=16 --cpu_threads=1 --warmup_steps=0 --eval_train=20 --embedding_size=8 "
    "--encoder_hidden_size=8 --program_embedding_size=8 --decoder_hidden_size=16 --attention_size=8 --min_count=1"
).split()
ROWS = [  # in the schema of MathQA; written for this test
    {
        "Problem": f"{name} buys {a} {item} for {b} rs each . how much is paid ?",
        "options": f"a ) {a * b} , b ) {a + b + 1} , c ) 7777 , d ) none , e ) 5555",
        "correct": "a",
        "linear_formula": "multiply(n0,n1)|",
    }
    for name in ("ann", "bob", "cid", "dan")
    for item in ("pens", "books", "cups")
    for a, b in ((3, 17), (12, 25), (30, 41))
]


def train(folder, *flags):
    metrics = train_seq2seq.main([f"--output_dir={folder}", *SMALL, *flags])
    reset()
    return metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("train") / "run"
    metrics = train(folder, "--epochs=3", "--log_every=1", "--num_beams", "1", "4", "--save_every=4")
    torch.set_num_threads(threads)
    return folder, metrics


@pytest.fixture(scope="module")
def mathqa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mathqa")
    for name, rows in (("train", ROWS[:27]), ("dev", ROWS[20:30]), ("test", ROWS[24:36])):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A small BERT with a vocabulary of the letters and some words."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "how", "much", "is", "km", ".", "?"]
    words += [f"{mark}{chr(letter)}" for letter in range(97, 123) for mark in ("", "##")]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=200, **sizes)).save_pretrained(folder)
    return folder


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_folder_is_all_that_a_person_needs(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "program_tokenizer", "program_seq2seq.py", "README.md",
        "curves.png", "results.json", "log.jsonl", "predictions_test.jsonl", "predictions_situations.jsonl", "best",
    }  # fmt: skip
    solve = MathProgramPipeline.from_pretrained(folder)
    assert solve.config.mask_numbers and solve.config.semantics == "data"
    solution = solve("a train covers 60 km in 2 hours . how far does it go in 5 hours ?", num_beams=3)
    assert len(solution.candidates) == 3
    symbols = AutoTokenizer.from_pretrained(folder / "program_tokenizer")
    assert symbols.convert_ids_to_tokens(list(range(len(symbols)))) == solve.config.program_tokens
    assert AutoModelForSeq2SeqLM.from_pretrained(folder).config.vocab_size == len(symbols)
    card = read_card(folder / "README.md")
    assert card.data.pipeline_tag is None and "curves.png" in card.text
    assert len(run_snippet(folder)["solution"].candidates) == 10


def test_metrics(finished):
    folder, metrics = finished
    scores = ("exact_match", "token_match", "execution_accuracy", "executes")
    for split in ("test", "situations"):
        for way in ("k1", "k4", "lookup", "nearest"):
            for part in ("", "_unseen"):
                assert {f"{split}_{way}_{score}{part}" for score in scores} <= metrics.keys()
    # of so few training problems, no test problem has a template
    assert metrics["test_problems"] == metrics["test_problems_without_seen"] == 20
    assert metrics["situations_problems"] == metrics["situations_problems_without_seen"] == 10
    assert metrics["test_lookup_executes_unseen"] == 0 and metrics["test_k4_reachable"] >= 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert json.loads((folder / "results.json").read_text())["metrics"] == metrics
    # of the card: how many problems each score is over
    table = read_card(folder / "README.md").text
    assert "| `test_k1_exact_match` | test | 20 |" in table and "| `test_k1_exact_match_unseen` | test | 20 |" in table
    assert "`situations_k1_exact_match` | new situations | 10 |" in table


def test_predictions_are_what_was_scored(finished):
    folder, metrics = finished
    rows = [json.loads(line) for line in (folder / "predictions_test.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and not any(row["seen"] for row in rows)
    right = [row["right"] for row in rows]
    assert right == [is_close(row["value"], row["answer"]) for row in rows]
    assert sum(right) / 20 == metrics["test_k4_execution_accuracy"]


def test_each_epoch_is_scored_on_validation_and_the_loss_falls(finished):
    lines = [line for line in read_log(finished[0]) if "val_loss" in line]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] and lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert {"val_exact_match", "val_token_match", "val_execution_accuracy", "val_executes"} <= lines[0].keys()


def test_evaluating_the_folder_gives_the_same_scores(finished, tmp_path, capsys):
    folder, metrics = finished
    flags = [f"--model={folder}", "--num_train=48", "--num_test=10", f"--output_dir={tmp_path}"]
    scores = evaluate_seq2seq.main([*flags, "--num_beams", "1", "4"])
    for name, value in scores.items():
        assert metrics[name] == pytest.approx(value), name
    assert len(scores) > 30
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == scores
    assert (tmp_path / "predictions_test.jsonl").read_text() == (folder / "predictions_test.jsonl").read_text()
    alone = evaluate_seq2seq.main([*flags, "--num_beams=4", "--no_baselines", "--decoding=grammar+options"])
    assert alone.keys() >= {"test_execution_accuracy", "test_reachable"} and alone["test_executes"] > 0.5
    assert not any("nearest" in name for name in alone)
    with pytest.raises(ValueError, match="subset='course' does not fit the model, .* number convention 'mathqa'"):
        evaluate_seq2seq.main([*flags, "--subset=course"])


def test_an_experiment_can_evaluate_a_run_of_another(finished, tmp_path):
    folder, _ = finished
    for seed in (0, 3):
        (tmp_path / f"run{seed}").symlink_to(folder) if seed == 0 else shutil.copytree(folder, tmp_path / f"run{seed}")
    results = json.loads((folder / "results.json").read_text())
    results["args"] |= {"model": "bilstm_attention", "seed": 3}
    (tmp_path / "run3" / "results.json").write_text(json.dumps(results))
    flags = ["--num_train=48", "--num_test=4", "--no_baselines", f"--model={tmp_path}", "--run=model=bilstm_attention"]
    metrics = evaluate_seq2seq.main([*flags, "--seed=3", f"--output_dir={tmp_path / 'cell'}"])
    results = read_results(tmp_path / "cell")
    assert results["metrics"] == metrics and results["seed"] == 3 and results["seconds"] > 0
    assert results["script"] == "evaluate_seq2seq.py" and results["num_parameters"] > 0
    with pytest.raises(ValueError, match="contains no finished run with --model bilstm_attention --seed 4. Run its"):
        evaluate_seq2seq.main([*flags, "--seed=4"])


@pytest.mark.parametrize("name", ["architectures", "teacher_forcing", "beam", "decoding"])
def test_the_flags_of_the_experiments(name, capsys):
    path = ROOT / "scripts" / "experiments" / f"seq2seq_{name}.toml"
    assert run_experiment.main([str(path), "--dry_run"]) == 0, capsys.readouterr().err
    assert " to run now." in capsys.readouterr().out


def test_flags_of_an_evaluation_are_checked_before_it_runs(tmp_path, capsys):
    toml = (
        'script = "evaluate_seq2seq.py"\nquestion = "?"\nexpect = "!"\nseeds = [0]\n'
        'grid = { decoding = ["plain", "greedy"] }\ntable = { rows = "decoding", value = "test_exact_match" }\n'
    )
    folder = tmp_path / "experiments"
    folder.mkdir()
    (tmp_path / "evaluate_seq2seq.py").symlink_to(ROOT / "scripts" / "evaluate_seq2seq.py")
    (folder / "bad.toml").write_text(toml)
    assert run_experiment.main([str(folder / "bad.toml"), "--dry_run"]) == 1
    assert "evaluate_seq2seq.py rejects decoding=greedy: decoding='greedy' is unknown" in capsys.readouterr().err
    (folder / "bad.toml").write_text(toml + "[fixed]\nnum_beam = 3\n")
    assert run_experiment.main([str(folder / "bad.toml"), "--dry_run"]) == 1
    assert "'num_beam' is not a flag of evaluate_seq2seq.py. Did you mean 'num_beams'?" in capsys.readouterr().err


def test_killed_and_resumed_it_ends_the_same(tmp_path, monkeypatch):
    flags = ["--epochs=2", "--save_every=2", "--teacher_forcing_end=0.2"]
    metrics = train(tmp_path / "whole", *flags)
    watch = train_seq2seq.seq2seq_evaluation.watch

    def die(run, *given):
        if run.steps == 3:
            raise MemoryError("killed")
        return watch(run, *given)

    with monkeypatch.context() as patch:
        patch.setattr(train_seq2seq.seq2seq_evaluation, "watch", die)
        with pytest.raises(MemoryError, match="killed"):
            train(tmp_path / "cut", *flags)
    reset()
    assert train(tmp_path / "cut", *flags, "--resume") == metrics
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    ratios = [line["teacher_forcing"] for line in read_log(tmp_path / "cut") if "teacher_forcing" in line]
    assert ratios == [pytest.approx(0.6 - 0.4 * 2.5 / 6)]  # the mean over the six steps


def test_it_stops_when_the_validation_does_not_improve(tmp_path):
    train(tmp_path, "--epochs=9", "--learning_rate=1e-12", "--patience=2", "--save_every=0")
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 9
    assert any(line.get("event") == "early_stop" for line in read_log(tmp_path))


def test_a_small_model_learns_mathqa(mathqa, tmp_path):
    wide = ["--decoder_hidden_size=32", "--program_embedding_size=32", "--embedding_size=16", "--dropout=0"]
    flags = [f"--source={mathqa}", "--epochs=80", "--learning_rate=0.02", "--schedule=constant", "--save_every=0"]
    metrics = train(tmp_path, *flags, *wide, "--eval_epochs=20", "--decoding=grammar+options")
    assert metrics["test_execution_accuracy"] == metrics["test_exact_match_unseen"] == 1
    assert metrics["test_problems"] == 10 and metrics["test_nearest_execution_accuracy"] == 1
    assert metrics["test_lookup_exact_match_seen"] == 1 and metrics["test_lookup_executes_unseen"] == 0
    assert metrics["test_problems_without_seen"] == 7 and metrics["test_problems_without_unseen"] == 3
    table = read_card(tmp_path / "README.md").text
    assert "| `test_exact_match_seen` | test | 3 |" in table and "| `test_exact_match_unseen` | test | 7 |" in table


@pytest.mark.parametrize("flags", [["--model=bilstm"], ["--no_mask_numbers"], ["--number_embeddings=pointer"]])
def test_other_models_of_the_bilstm(mathqa, tmp_path, flags):
    metrics = train(tmp_path, f"--source={mathqa}", *flags, "--epochs=1", "--subset=course")
    config = MathProgramPipeline.from_pretrained(tmp_path).config
    assert config.attention == ("--model=bilstm" not in flags)
    assert config.mask_numbers == ("--no_mask_numbers" not in flags)
    assert config.semantics == config.number_convention == "course"
    assert 0 <= metrics["test_execution_accuracy"] <= 1


@pytest.mark.parametrize("frozen", [True, False])
def test_the_models_of_bert(mathqa, bert, tmp_path, frozen):
    flags = [f"--source={mathqa}", f"--bert={bert}", "--epochs=1", "--encoder_learning_rate=1e-3"]
    train(tmp_path, *flags, f"--model={'bert_frozen' if frozen else 'bert'}")
    solve = MathProgramPipeline.from_pretrained(tmp_path)
    before = BertModel.from_pretrained(bert).state_dict()
    after = solve.model.encoder.bert.state_dict()
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(before[name], after[name]) == frozen
    words = solve.tokenizer.convert_ids_to_tokens(solve.encode(["how much is <n0> km"])["input_ids"][0])
    assert words == ["[CLS]", "how", "much", "is", "<n0>", "km", "[SEP]"]
    assert solve("how much is 3 km ?", num_beams=2).words[4] == "<n0>"
    assert solve.max_tokens == 200


def test_word_vectors(tmp_path):
    (tmp_path / "glove.txt").write_text("how 1 2 3 4 5 6 7 8\n")
    train(tmp_path / "run", "--epochs=1", f"--glove={tmp_path / 'glove.txt'}", "--learning_rate=1e-12")
    solve = MathProgramPipeline.from_pretrained(tmp_path / "run")
    (row,) = solve.model.get_input_embeddings().weight[solve.tokenizer.convert_tokens_to_ids(["how"])].tolist()
    assert row == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8], abs=1e-4)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--attenshun"], "--attenshun is an unknown flag. Did you mean --attention?"),
        (["--model=gpt"], "model='gpt' is unknown. Choose one of: bilstm, bilstm_attention"),
        (["--encoder=gpt"], "encoder='gpt' is unknown"),
        (["--teacher_forcing_ratio=1.5"], "teacher_forcing_ratio=1.5 must be from 0 to 1"),
        (["--teacher_forcing_end=2"], "teacher_forcing_end=2.0 must be at most 1"),
        (["--decoding=greedy"], "decoding='greedy' is unknown. Use plain, or one or more of grammar"),
        (["--num_beams", "1", "1"], "num_beams=[1, 1] must be distinct numbers, each at least 1"),
        (["--num_beams=0"], "num_beams=[0] must be distinct numbers"),
        (["--freeze_encoder"], "freeze_encoder would leave encoder='bilstm' untrained"),
        (["--encoder=bert", "--glove=a.txt"], "glove='a.txt' works only with encoder='bilstm'"),
        (["--encoder_learning_rate=-1"], "encoder_learning_rate=-1.0 must be 0 or greater"),
        (["--dropout=1"], "dropout=1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", *flags)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
