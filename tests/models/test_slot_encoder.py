"""The encoder and the decoder of the slot autoencoder on their own."""

import pytest
import torch

from hf_dl.models import SlotAutoencoderConfig, SlotAutoencoderModel, SlotDecoderModel, SlotEncoderModel
from hf_dl.models.slot_decoders import DECODERS, blend_slots
from hf_dl.models.slot_inits import SLOT_INITS
from tests.models.contract import ModelContract

TINY = {
    "image_size": 16,
    "decoder_size": 8,
    "encoder_channels": (8, 12),
    "token_dim": 12,
    "slot_dim": 12,
    "slot_mlp_dim": 16,
    "num_slots": 3,
    "decoder_channels": (8,),
    "canvas_size": 16,
    "num_iterations": 3,
}


class TestSlotEncoder(ModelContract):
    model_class = SlotEncoderModel
    output_key = "slots"
    row_tolerance = 2e-3
    half_tolerance = 0.1
    checkpoints = ("slot_attention.mlp.0",)
    skipped = {
        "forward_takes_main_input_first_and_puts_the_loss_first": "has no loss; its slots train with a decoder",
        "trainer_trains_and_evaluates": "has no loss; its slots train with a decoder",
        "overfits_eight_examples": "has no loss; its slots train with a decoder",
        "loads_in_a_fresh_process_without_the_package": "a part of SlotAutoencoderModel, without an Auto class",
        "compiles_to_the_same_numbers": "SlotAutoencoderModel compiles the same code",
    }

    def config(self):
        return SlotAutoencoderConfig(**TINY, gradient="full", seeds="random")

    def inputs(self, batch):
        return {"pixel_values": torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch)) * 2 - 1}

    def loss(self, model, inputs):
        return getattr(model(**inputs), self.output_key).square().mean()


class TestSlotDecoder(TestSlotEncoder):
    model_class = SlotDecoderModel
    output_key = "reconstruction"
    checkpoints = ("canvas.mix",)
    skipped = TestSlotEncoder.skipped | {
        "adapters_train_with_gradient_checkpointing": "reentrant checkpoints need slots with a gradient as input"
    }

    def inputs(self, batch):
        slots = torch.randn(batch, 3, 12, generator=torch.Generator().manual_seed(batch))
        slots[..., 9:] = slots[..., 9:].sigmoid()  # the frames
        return {"slots": slots}


def make_encoder(**fields):
    torch.manual_seed(0)
    return SlotEncoderModel(SlotAutoencoderConfig(**TINY, **fields)).eval()


@pytest.mark.parametrize("slot_init", SLOT_INITS)
def test_it_is_the_encoder_of_the_autoencoder(slot_init, tmp_path):
    torch.manual_seed(0)
    autoencoder = SlotAutoencoderModel(SlotAutoencoderConfig(**TINY, slot_init=slot_init)).eval()
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    encoder, report = SlotEncoderModel.from_pretrained(tmp_path / "autoencoder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not encoder.training
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    expected, found = autoencoder(pixel_values, num_draws=1), encoder(pixel_values)
    assert torch.equal(found.slots, expected.slots)
    assert len(found.attentions) == 3 and all(map(torch.equal, found.attentions, expected.attentions))
    assert set(encoder.state_dict()) == {name for name in autoencoder.state_dict() if not name.startswith("decoder.")}
    encoder.save_pretrained(tmp_path / "encoder")
    again = SlotEncoderModel.from_pretrained(tmp_path / "encoder")
    assert torch.equal(again(pixel_values, return_dict=False)[0], found.slots)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_decoder_is_that_of_the_autoencoder(kind, tmp_path):
    torch.manual_seed(0)
    autoencoder = SlotAutoencoderModel(SlotAutoencoderConfig(**TINY, decoder_type=kind)).eval()
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    decoder, report = SlotDecoderModel.from_pretrained(tmp_path / "autoencoder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not decoder.training
    slots, keep = torch.rand(2, 3, 12), torch.tensor([[True, False, True], [True, True, True]])
    for kept in (None, keep):
        _, contents, masks = blend_slots(autoencoder.decoder, autoencoder.config, slots, kept)
        found = decoder(slots, kept)
        assert torch.equal(found.contents, contents) and torch.equal(found.masks, masks)
        mixed = (contents * masks[:, :, None]).sum(1)
        torch.testing.assert_close(found.reconstruction, mixed)
    decoder.save_pretrained(tmp_path / "decoder")
    again = SlotDecoderModel.from_pretrained(tmp_path / "decoder")
    assert torch.equal(again(slots, return_dict=False)[0], decoder(slots).reconstruction)
    with pytest.raises(ValueError, match=r"slots has shape \(2, 3, 11\), expected \(batch, slots, 12\)"):
        decoder(slots[..., 1:])


def test_every_parameter_that_trains_gets_a_gradient():
    encoder = make_encoder(gradient="full").train()
    encoder(torch.randn(4, 3, 16, 16)).slots.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "slot_init, gradient", [("gaussian", "implicit"), ("learned", "implicit"), ("gaussian", "full")]
)
@pytest.mark.parametrize("kind", [SlotEncoderModel, SlotAutoencoderModel])
def test_what_no_gradient_reaches_stays_frozen_in_a_loaded_model(kind, slot_init, gradient, tmp_path):
    model = kind(SlotAutoencoderConfig(**TINY, slot_init=slot_init, gradient=gradient))
    model.save_pretrained(tmp_path)
    loaded, _ = kind.from_pretrained(tmp_path, output_loading_info=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for again in (loaded, kind.from_pretrained(tmp_path)):
        assert [name for name, parameter in again.named_parameters() if parameter.requires_grad] == trained
    assert any(name.startswith("slot_") and "attention" not in name for name in trained) == (gradient == "full")


def test_slots_repeat_in_evaluation_and_vary_in_training():
    encoder, pixel_values = make_encoder(), torch.zeros(2, 3, 16, 16)
    assert torch.equal(encoder(pixel_values).slots, encoder(pixel_values).slots)
    output = encoder(pixel_values, num_slots=7, num_iterations=5)
    assert output.slots.shape == (2, 7, 12) and [tuple(a.shape) for a in output.attentions] == [(2, 7, 16)] * 5
    encoder.train()
    assert not torch.equal(encoder(pixel_values).slots, encoder(pixel_values).slots)


def test_wrong_images_are_refused():
    with pytest.raises(ValueError, match=r"pixel_values has shape \(1, 3, 8, 8\), expected \(batch, 3, 16, 16\)"):
        make_encoder()(torch.zeros(1, 3, 8, 8))
