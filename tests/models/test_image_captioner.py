"""The captioner: the model contract, both searches, the state, the processor and the pipeline."""

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, ViTImageProcessor, pipeline

from hf_dl.data.caption_tokenizer import build_caption_tokenizer
from hf_dl.models import ImageCaptionerConfig, ImageCaptionerForConditionalGeneration, ImageCaptionerProcessor
from hf_dl.models.caption_decoder import ATTENTIONS, CONDITIONINGS
from hf_dl.models.image_captioner import CaptionEncoder, coverage_penalty, word_maps
from hf_dl.models.layers_recurrent import CELLS
from tests.models.contract import SAME_CODE, ModelContract

SIZES = {
    "image_size": 16,
    "feature_size": 8,
    "vocab_size": 14,
    "embedding_size": 6,
    "decoder_hidden_size": 12,
    "attention_size": 5,
    "max_caption_length": 8,
}
OTHERS = {name: reason for name, reason in SAME_CODE.items() if name != "exports_with_any_batch_size"} | dict.fromkeys(
    (
        "runs_in_half_precision",
        "adapters_and_quantization_reach_every_linear_layer",
        "auto_classes_load_it",
        "exports_with_any_batch_size",
        "overfits_eight_examples",
    ),
    "another class tests the same code",
)


def tiny(**fields):
    return ImageCaptionerConfig(**{**SIZES, **fields})


def make(seed=0, scale=1.0, **fields):
    torch.manual_seed(seed)
    model = ImageCaptionerForConditionalGeneration(tiny(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero, which would hide a wrong one
            parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in (model.decoder.embedding, model.decoder.output):  # words that depend more on the last words
            layer.weight.mul_(scale)
    return model


def draw(batch, *, seed=0):
    generator = torch.Generator().manual_seed(100 * seed + batch)
    labels = torch.randint(4, 14, (batch, 6), generator=generator)
    for row, size in enumerate(torch.randint(2, 7, (batch,), generator=generator).tolist()):
        labels[row, size - 1] = 2
        labels[row, size:] = -100
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator), "labels": labels}


class TestCaptioner(ModelContract):
    model_class = ImageCaptionerForConditionalGeneration
    auto_classes = ("AutoModelForImageTextToText",)
    overfit_steps = 150
    overfit_learning_rate = 1e-2

    def config(self):
        return tiny()

    def inputs(self, batch):
        return draw(batch)

    def exported_inputs(self, batch):
        inputs = self.inputs(batch)
        inputs["decoder_input_ids"] = inputs.pop("labels").clamp(min=1)
        return inputs


class TestPreviousAttention(TestCaptioner):
    test_compiles_to_the_same_numbers = None
    skipped = OTHERS

    def config(self):
        return tiny(conditioning="previous_attention", fused_lstm=False)


class TestFirstStep(TestPreviousAttention):
    def config(self):
        return tiny(conditioning="first_step")


class TestEveryStep(TestPreviousAttention):
    def config(self):
        return tiny(conditioning="every_step", backbone="norm_resnet", backbone_options={"n": 1})


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_beam_search_equals_generate(conditioning):
    for seed in range(4):
        model, images = make(seed, scale=5.0, conditioning=conditioning), draw(3, seed=seed)["pixel_values"]
        for beams in (1, 3):
            own = model.beam_search(images, num_beams=beams, num_return_sequences=beams)
            options = {"num_beams": beams, "num_return_sequences": beams, "do_sample": False}
            found = model.generate(images, **options, output_scores=True, return_dict_in_generate=True)
            sequences = found.sequences[:, 1:].unflatten(0, (3, beams))
            own_sequences = F.pad(own.sequences, (0, sequences.shape[-1] - own.sequences.shape[-1]), value=1)
            assert torch.equal(own_sequences, sequences), (seed, beams)
            if beams > 1:
                torch.testing.assert_close(own.scores.flatten(), found.sequences_scores)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("conditioning", ["first_step", "attention"])
def test_each_cell_continues_captions_and_searches_as_generate(cell, conditioning, tmp_path):
    model, inputs = make(scale=5.0, cell=cell, conditioning=conditioning), draw(2)
    assert (model.decoder.cell.weight_hh.shape[0], model.config.cell) == (CELLS[cell].gates * 12, cell)
    ids = inputs["labels"].clamp(min=1)
    whole = model(inputs["pixel_values"], ids).logits
    first = model(inputs["pixel_values"], ids[:, :2])
    second = model(decoder_input_ids=ids[:, 2:], decoder_state=first.decoder_state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole)
    own = model.beam_search(inputs["pixel_values"], num_beams=3).sequences[:, 0]
    found = model.generate(inputs["pixel_values"], num_beams=3)[:, 1:]
    assert torch.equal(own, found)
    model(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    model.save_pretrained(tmp_path)
    loaded = ImageCaptionerForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(inputs["pixel_values"], ids).logits, whole)


def test_the_vanilla_rnn_reads_the_image_at_the_first_step_as_in_the_formula():
    """h = tanh(W_x e(y) + W_h h + W_i v), with the image v in the first step only."""
    model, images = make(cell="rnn", conditioning="first_step"), draw(2)["pixel_values"]
    decoder, words = model.decoder, torch.tensor([[0, 5, 9], [0, 7, 4]])
    (_, _, image), _ = decoder.start(model.encoder(images).last_hidden_state)
    weight_x, weight_i = decoder.cell.weight_ih.split([6, 6], dim=1)
    bias, h = decoder.cell.bias_ih + decoder.cell.bias_hh, torch.zeros(2, 12)
    found = model(images, words, output_hidden_states=True).decoder_hidden_states[0]
    for step in range(3):
        h = decoder.embedding(words[:, step]) @ weight_x.T + h @ decoder.cell.weight_hh.T + bias
        h = (h + image[:, 0] @ weight_i.T if step == 0 else h).tanh()
        torch.testing.assert_close(found[:, step], h)


def test_the_default_cell_has_the_weights_of_earlier_checkpoints():
    state = make().decoder.state_dict()
    assert {name: tuple(state[f"cell.{name}"].shape) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")} == {
        "weight_ih": (48, 14), "weight_hh": (48, 12), "bias_ih": (48,), "bias_hh": (48,)
    }  # fmt: skip
    assert state["bridge.weight"].shape == (24, 8)
    fields = tiny().to_dict()
    del fields["cell"]  # a config that was saved before the field existed
    assert ImageCaptionerConfig(**fields).cell == "lstm"


def test_the_encoder_runs_once(monkeypatch):
    calls, forward = [], CaptionEncoder.forward
    monkeypatch.setattr(CaptionEncoder, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    make().generate(draw(2)["pixel_values"], num_beams=3)
    assert len(calls) == 1


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_state_continues_a_caption(conditioning):
    model, inputs = make(conditioning=conditioning), draw(2)
    ids = inputs["labels"].clamp(min=1)
    whole = model(inputs["pixel_values"], ids).logits
    first = model(inputs["pixel_values"], ids[:, :2])
    second = model(decoder_input_ids=ids[:, 2:], decoder_state=first.decoder_state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole)
    assert second.decoder_state.get_seq_length() == 6


def test_what_each_conditioning_reads():
    """Change the image after the first step: only some decoders notice."""
    images = draw(2)["pixel_values"]
    for conditioning in CONDITIONINGS:
        model = make(conditioning=conditioning)
        state, context = model.decoder.start(model.encoder(images).last_hidden_state)
        token = torch.ones(2, 1, dtype=torch.long)
        _, (_, _, read), weights = model.decoder.step(token, state, context)
        assert (weights is not None) == (conditioning in ATTENTIONS)
        assert bool((read == 0).all()) == (conditioning == "first_step")
        assert torch.equal(read, state[2]) == (conditioning == "every_step")


def test_the_query_of_attention_knows_the_last_word_only_with_attention():
    images = draw(1)["pixel_values"].expand(2, -1, -1, -1)
    for conditioning in ATTENTIONS:
        words = torch.tensor([[1, 5], [1, 6]])
        weights = make(conditioning=conditioning)(images, words, output_attentions=True).cross_attentions[0][:, 0]
        assert torch.equal(weights[0, 1], weights[1, 1]) == (conditioning == "previous_attention")


def test_attention_of_generate_is_that_of_forward():
    model, images = make(scale=5.0), draw(2)["pixel_values"]
    found = model.generate(images, output_attentions=True, return_dict_in_generate=True)
    steps = torch.cat([step[0] for step in found.cross_attentions], dim=2)
    whole = model(images, found.sequences[:, :-1], output_attentions=True).cross_attentions[0]
    torch.testing.assert_close(steps, whole)
    torch.testing.assert_close(steps.sum(-1), torch.ones_like(steps[..., 0]))


def test_several_captions_per_image_share_the_encoder():
    model, inputs = make(), draw(4)
    images = inputs["pixel_values"][:2]
    found = model(images, labels=inputs["labels"])
    expected = model(images.repeat_interleave(2, dim=0), labels=inputs["labels"])
    torch.testing.assert_close(found.logits, expected.logits)
    with pytest.raises(ValueError, match="Got 3 captions for 2 images. Expected the same number"):
        model(images, labels=inputs["labels"][:3])


def test_teacher_forcing_reads_its_own_words():
    model, inputs = make(scale=5.0), draw(4)
    forced = model(**inputs, teacher_forcing_ratio=1.0).logits
    free = model(**inputs, teacher_forcing_ratio=0.0).logits
    own = model.beam_search(inputs["pixel_values"], num_beams=1, max_length=6)
    assert not torch.equal(forced, free)
    assert torch.equal(free[:, 0].argmax(-1), own.sequences[:, 0, 0])
    with pytest.raises(ValueError, match="teacher_forcing_ratio=2 must be from 0 to 1"):
        model(**inputs, teacher_forcing_ratio=2)


def test_coverage_penalty_is_zero_for_equal_attention_and_skips_padding():
    attention = torch.zeros(1, 1, 4, 4)
    attention[0, 0, range(4), range(4)] = 1
    labels = torch.tensor([[5, 6, 7, 2]])
    assert coverage_penalty(attention, labels) == 0
    labels[0, 2:] = -100
    assert coverage_penalty(attention, labels) == 0.25  # 1, 1, 0 and 0, where 0.5 is expected
    assert coverage_penalty(attention, labels, target="one") == 0.5  # where 1 is expected
    with pytest.raises(ValueError, match="target='two' is unknown. Choose one of: mean, one"):
        coverage_penalty(attention, labels, target="two")


def test_frozen_backbone_stays_as_it_is():
    model = make(freeze_encoder=True).train()
    model(**draw(2)).loss.backward()
    assert all(parameter.grad is None for parameter in model.encoder.backbone.parameters())
    assert model.decoder.output.weight.grad is not None and not model.encoder.backbone.training


def test_resized_vocabulary():
    model = make()
    model.resize_token_embeddings(17)
    assert model(**draw(2)).logits.shape[-1] == 17 == model.config.vocab_size


def test_saved_model_runs_in_the_pipeline(tmp_path):
    tokenizer = build_caption_tokenizer(["A red cube, and a blue cone.", "Two red cubes."])
    images = ViTImageProcessor(size={"height": 16, "width": 16})
    processor = ImageCaptionerProcessor(images, tokenizer)
    model = make(scale=5.0, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is ImageCaptionerForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path)) is ImageCaptionerProcessor
    assert (tmp_path / "caption_processor.py").is_file()  # for trust_remote_code
    pipe = pipeline("image-text-to-text", str(tmp_path), device="cpu")
    pictures = [Image.new("RGB", (20, 30), color) for color in ("red", "blue")]
    for start in ("", "a red"):
        inputs = processor(pictures, start)
        assert inputs["decoder_input_ids"].shape == (2, 1 + len(start.split()))
        expected = processor.batch_decode(model.generate(**inputs, num_beams=2), skip_special_tokens=True)
        found = [pipe(picture, text=start, generate_kwargs={"num_beams": 2}) for picture in pictures]
        assert [row[0]["generated_text"].split() for row in found] == [text.split() for text in expected]


def test_processor():
    tokenizer = build_caption_tokenizer(["A red cube, alone.", "A cone."], min_count=1)
    processor = ImageCaptionerProcessor(ViTImageProcessor(size={"height": 16, "width": 16}), tokenizer)
    labels = processor.make_labels(["a cone", "a red würfel, alone."])
    assert labels[0].tolist()[2:] == [2, -100, -100, -100, -100] and labels[1, 2] == tokenizer.unk_token_id
    assert processor.make_labels(["a red cube"], max_length=2).shape == (1, 2)
    picture = Image.new("RGB", (16, 16))
    with pytest.raises(ValueError, match="text has starts of 1, 2 words"):
        processor([picture] * 2, ["a", "a red"])
    with pytest.raises(ValueError, match="Got 3 texts for 2 images"):
        processor([picture] * 2, ["a"] * 3)
    with pytest.raises(ValueError, match="images is missing.*; a pipeline needs text='' as well"):
        processor(text="a")
    with pytest.raises(ValueError, match="No word occurs min_count=9 times"):
        build_caption_tokenizer(["a cone"], min_count=9)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"conditioning": "last_step"}, "conditioning='last_step' is unknown. Choose one of: first_step"),
        ({"image_size": 20}, "image_size=20 must be a multiple of 8"),
        ({"eos_token_id": 99}, "eos_token_id=99 must be at least 0 and below vocab_size=14"),
        ({"backbone": "huge"}, "backbone='huge' is unknown"),
        ({"dropout": 1.0}, "dropout=1.0 must be"),
        ({"cell": "lstn"}, "cell='lstn' is unknown. Choose one of: rnn, rnn_relu, gru, lstm"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(StrictDataclassError) as error:
        tiny(**fields)
    assert message in str(error.value)


def test_wrong_inputs():
    model = make()
    with pytest.raises(ValueError, match=r"pixel_values has shape \(2, 3, 8, 8\), expected \(batch, 3, 16, 16\)"):
        model(torch.zeros(2, 3, 8, 8), torch.ones(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="labels and decoder_input_ids are missing"):
        model(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="pixel_values and encoder_outputs are missing"):
        model(decoder_input_ids=torch.ones(2, 1, dtype=torch.long))


def test_cells_are_in_the_middle_of_their_pixels():
    attention = torch.rand(2, 3, 64, dtype=torch.float64)
    maps = word_maps(attention, (64, 64))
    assert maps.shape == (2, 3, 64, 64) and maps.dtype == torch.float32
    # Along an axis, the mean of the middle pixels of a cell has 1/32 of each neighboring cell.
    middle = maps.unflatten(-1, (8, 8)).unflatten(-3, (8, 8))[..., 3:5, :, 3:5].mean((-3, -1))
    grid = attention.float().unflatten(-1, (8, 8))
    expected = F.pad(grid, (1, 1, 1, 1), mode="replicate")
    for axis in (-2, -1):
        first, second, third = (expected.narrow(axis, k, 8) for k in range(3))
        expected = first / 32 + second * 15 / 16 + third / 32
    torch.testing.assert_close(middle, expected)


@pytest.mark.parametrize(("backbone", "offset"), [("small_captioner", 0.0), ("conv_classifier", 3.5)])
def test_receptive_fields_are_in_the_middle_of_the_pixels_only_with_pooling(backbone, offset):
    """`word_maps` explains why it places all cells in the middle."""
    torch.manual_seed(0)
    network = make(backbone=backbone, image_size=64, feature_size=32).encoder.backbone
    images = torch.randn(16, 3, 64, 64, requires_grad=True)
    network(images)[:, :, 4, 4].sum().backward()
    weights = images.grad.square().sum(dim=(0, 1))
    pixels = torch.arange(64.0)
    for axis in (0, 1):
        center = (weights.sum(1 - axis) * pixels).sum() / weights.sum()
        assert center - 8 * 4 == pytest.approx(offset, abs=1)
