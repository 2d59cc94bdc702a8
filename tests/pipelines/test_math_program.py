import json
import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_dl.pipelines.math_program import (
    Candidate,
    MathProgramPipeline,
    choose,
    format_number,
    solve_steps,
)
from hf_dl.programs import OPERATIONS, ProgramError, check

from .tiny_solver import LEARNED, PENS, TRAIN, make_solver


@pytest.fixture(scope="module")
def solver():
    return make_solver()


@pytest.fixture(scope="module")
def untrained():
    return make_solver(steps=0, attention=False)


class TestSolve:
    @pytest.mark.parametrize("problem, answer", [(TRAIN, 300), (PENS, 28)])
    def test_what_was_learned(self, solver, problem, answer):
        solution = solver(problem)
        assert solution.program == LEARNED[problem] == solution.candidates[0].program
        assert solution.answer == answer == solution.steps[-1].value
        assert solution.problem == problem and solution.error == "" and solution.option is None

    def test_the_answer_follows_a_number(self, solver):
        assert solver(TRAIN.replace("120", "1,500")).answer == 1500 / 2 * 5
        assert solver(TRAIN.replace("2 hours", "2.5 hours")).answer == 240

    def test_numbers_as_people_write_them(self, solver):
        solution = solver(
            TRAIN.replace("120", "1 000 000").replace("2 hours", "2½ hours"), options=["½", "２ ０００ ０００"]
        )
        assert solution.numbers == [1000000, 2.5, 5] and solution.answer == 2000000 and solution.option == "b"
        assert solution.words[:6] == ["a", "train", "runs", "<n0>", "km", "in"]

    def test_steps_in_words(self, solver):
        first, second = solver(TRAIN).steps
        assert (first.text, first.arguments, first.value) == ("divide(n0,n1)", (("n0", 120), ("n1", 2)), 60)
        assert first.sentence == "120 divided by 2 is 60."
        assert second.arguments == (("#0", 60), ("n2", 5)) and second.sentence == "60 (step 1) times 5 is 300."

    def test_attention_over_the_words(self, solver):
        solution = solver(TRAIN)
        assert solution.words[:4] == ["a", "train", "runs", "<n0>"]
        assert solution.symbols == ["divide", "n0", "n1", "multiply", "#0", "n2"]
        assert solution.attention.shape == (6, len(solution.words))
        assert torch.allclose(solution.attention.sum(1), torch.ones(6), atol=1e-5)
        # the attention of a symbol is computed in the step that writes it
        words = solver.pad(solver.encode([" ".join(solution.words)])["input_ids"])
        start = torch.tensor([[solver.config.decoder_start_token_id]])
        expected = solver.model(**words, decoder_input_ids=start, output_attentions=True).cross_attentions[0][0, 0, 0]
        assert torch.allclose(solution.attention[0], expected, atol=1e-6)

    def test_a_model_without_attention(self, untrained):
        assert untrained(TRAIN, num_beams=2).attention is None

    @pytest.mark.parametrize("num_beams", [1, 4])
    def test_as_many_candidates_as_beams_best_first(self, solver, num_beams):
        found = solver(TRAIN, num_beams=num_beams, length_penalty=0.5).candidates
        assert len(found) == num_beams == len({each.program for each in found})
        assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
        length = len(found[0].symbols) + 1
        assert found[0].log_probability == pytest.approx(found[0].score * length**0.5)
        assert math.exp(found[0].log_probability) > 0.5

    def test_with_the_grammar_every_program_fits_the_problem(self, untrained):
        for each in untrained(TRAIN, num_beams=20).candidates:
            check(each.program, 3)

    def test_without_it_what_cannot_run_says_why(self, untrained):
        solution = untrained(TRAIN, grammar=False, rerank=False, num_beams=3)
        assert solution.answer is None and solution.steps == [] and solution.error
        assert solution.error == solution.candidates[0].error

    @pytest.mark.parametrize(
        "options", ["a ) 60 , b ) 12 , c ) 300 km", ["60", "12", "300 km"], {"a": 60, "c": 300.0}, [60, 12, 301]]
    )
    def test_the_letter_of_the_option(self, solver, options):
        assert solver(TRAIN, options=options).option == "c" or isinstance(options, dict)
        assert solver(TRAIN, options=options).answer == 300

    def test_an_option_decides(self, solver):
        found = solver(TRAIN, num_beams=20).candidates
        other = next(each for each in found if each.value is not None and abs(each.value - 300) > 50)
        solution = solver(TRAIN, num_beams=20, options=[other.value, None])
        assert solution.answer == pytest.approx(other.value, rel=0.02) and solution.option == "a"

    def test_raw_numbers(self):
        raw = make_solver(steps=1, mask_numbers=False)
        assert raw.read(TRAIN) == (TRAIN, [120, 2, 5])
        assert raw.read(TRAIN.replace("2 hours", "２½ hours"))[0] == TRAIN.replace("2 hours", "2.5 hours")

    def test_the_numbers_of_the_course(self):
        course = make_solver(steps=1, number_convention="course", semantics="course")
        assert course.read("a train runs 2,3 km in 4 hours")[1] == [2, 3, 4]
        assert course._read_options(["1,785", "2½"]) == {"a": 1785, "b": 2.5}


class TestHostile:
    @pytest.mark.parametrize(
        "problem, sentence",
        [
            ("", "The problem is empty; enter one such as 'a train"),
            (" \n\t ", "The problem is empty"),
            ("how far does a train run in two hours ?", "no numbers .* write numbers in digits"),
            ("how far " * 2500 + "3", "The problem has 5001 words and 20001 characters; the limits are 400 words"),
            ("a" * 5000 + " 3", "the limits are 400 words and 4000 characters"),
            ("поезд проходит 120 км за 2 часа", "not in Latin letters"),
            ("一列火车2小时行驶120公里", "not in Latin letters"),
            ("٣ قطارات", "not in Latin letters"),
            ("ein zug fährt 120 km weit , 2 stunden lang", "The model knows 1 of the 7 words"),
            ("<script>alert(1)</script>", "The model knows 0 of the 3 words"),
            ("__import__('os').system('rm -rf 1')", "which is not enough"),
            ("5 7", "knows 0 of the 0 words"),
            ("\x00\x01 1 \ud83d\ude00", "knows 0 of the"),
            ("a train runs " + "1 " * 27 + "km", "has 27 numbers; the limit is 26"),
            ("a train runs 1" + "0" * 400 + " km in 2 hours", "numbers of a problem must be below 1e308"),
            (3, "A problem must be a string; got int"),
        ],
    )
    def test_it_gets_a_sentence(self, solver, problem, sentence):
        with pytest.raises(ValueError, match=sentence) as caught:
            solver(problem)
        assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 400

    @pytest.mark.parametrize(
        "options, sentence",
        [
            ({"num_beams": 0}, "num_beams=0 must be from 1 to 100"),
            ({"num_beams": 10**9}, "must be from 1 to 100"),
            ({"length_penalty": float("nan")}, "length_penalty=nan must be from -5 to 5"),
            ({"options": "none of these"}, "has no options"),
            ({"options": "a ) none , b ) all"}, "have no number; pass options such as"),
        ],
    )
    def test_arguments_out_of_range(self, solver, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            solver(TRAIN, **options)

    def test_huge_values_are_written_shortly(self, solver):
        big = TRAIN.replace("120", "9" * 300)
        solution = solver(big)
        assert all(len(step.sentence) < 80 for step in solution.steps)


class TestChoose:
    def make(self, *values, probabilities=None):
        probabilities = probabilities or [2.0**-i for i in range(1, len(values) + 1)]
        return [Candidate((), "", math.log(p), math.log(p), v) for v, p in zip(values, probabilities, strict=True)]

    def test_the_best(self):
        assert choose(self.make(None, 3.0)) == 0

    def test_the_first_that_runs(self):
        assert choose(self.make(None, None, 3.0), rerank=True) == 2
        assert choose(self.make(None, None), rerank=True) == 0

    def test_options_first_then_the_rest(self):
        assert choose(self.make(7.0, None, 5.05, 5.0), options=[9, 5]) == 2
        assert choose(self.make(None, 7.0), options=[9, 5]) == 1
        assert choose(self.make(7.0, 5.0), options=[None]) == 0

    def test_a_vote_adds_probabilities_up(self):
        found = self.make(7.0, 5.0, 5.05, None, probabilities=[0.4, 0.3, 0.2, 0.1])
        assert choose(found, vote=True) == 1
        found = self.make(7.0, 5.0, 5.05, None, probabilities=[0.6, 0.3, 0.2, 0.1])
        assert choose(found, vote=True) == 0
        assert choose(found, vote=True, options=[5.1]) == 1


class TestSteps:
    @pytest.mark.parametrize("name, arity", OPERATIONS.items())
    def test_every_operation_has_a_sentence(self, name, arity):
        numbers = {"triangle_area_three_edges": [3, 4, 5], "permutation": [5, 3], "choose": [5, 3]}.get(name, [2] * 3)
        numbers = [0.5] if name in ("sine", "cosine", "tangent") else numbers[:arity]
        (step,) = solve_steps(f"{name}({','.join(f'n{i}' for i in range(arity))})", numbers)
        assert step.sentence[0].isupper() or step.sentence[0].isdigit()
        assert step.sentence.endswith(f" is {format_number(step.value)}.") and "{" not in step.sentence
        assert all(format_number(number) in step.sentence for number in numbers)

    def test_constants_have_their_values(self):
        (step,) = solve_steps("multiply(n0,const_0_2778)", [36])
        assert (
            step.arguments == (("n0", 36), ("const_0_2778", 0.2778)) and step.sentence == "36 times 0.2778 is 10.0008."
        )

    def test_a_step_without_a_value(self):
        with pytest.raises(ProgramError, match="#0 = divide\\(n0,n1\\) divides by zero"):
            solve_steps("divide(n0,n1)", [1, 0])

    def test_numbers(self):
        assert [format_number(v) for v in (60, 60.0, -2.5, 1e15, 2**5000)] == [
            "60", "60", "-2.5", "1e+15", "a number of 1506 digits",
        ]  # fmt: skip


class TestLoading:
    def test_saved_and_loaded_it_says_the_same(self, solver, tmp_path):
        solver.save_pretrained(tmp_path)
        again = MathProgramPipeline.from_pretrained(tmp_path)
        assert not again.model.training and again.read(TRAIN) == solver.read(TRAIN)
        for one, other in zip(again(TRAIN).candidates, solver(TRAIN).candidates, strict=True):
            assert one.program == other.program and one.score == pytest.approx(other.score, abs=1e-5)

    def test_what_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="The model '.*nowhere' was not found|cannot be used"):
            MathProgramPipeline.from_pretrained(str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match="'nobody/nothing' was not found. Expected a folder"):
            MathProgramPipeline.from_pretrained("nobody/nothing")
        with pytest.raises(ValueError, match="cannot be used"):
            MathProgramPipeline.from_pretrained(tmp_path)

    def test_another_kind_of_model(self, tmp_path):
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        BertForSequenceClassification(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is a 'bert'; expected a 'program_seq2seq'"):
            MathProgramPipeline.from_pretrained(tmp_path)

    def test_damaged(self, solver, tmp_path):
        solver.save_pretrained(tmp_path)
        weights = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        with pytest.raises(ValueError, match="cannot be loaded"):
            MathProgramPipeline.from_pretrained(tmp_path)

    def test_a_tokenizer_of_another_model(self, solver, untrained, tmp_path):
        solver.save_pretrained(tmp_path)
        file = tmp_path / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"] |= {f"more{i}": 100 + i for i in range(99)}
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="words, but the model only .*; use the tokenizer that was saved with"):
            MathProgramPipeline.from_pretrained(tmp_path)
