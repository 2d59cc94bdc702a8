import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from hf_dl.models.slot_unet import ARCHITECTURES, SlotUNetModel
from tests.memory import aligned
from tests.models.contract import ModelContract
from tests.models.diffusers_weights import copy_unet

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_resolutions": (4,),
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}


def make_unet(**fields):
    """A tiny U-Net away from its initial values, at which most of it has no effect."""
    torch.manual_seed(0)
    unet = SlotUNetModel(**{**TINY, **fields}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return unet


def make_inputs(batch=2, slots=3, *, dtype=torch.float32):
    draw = torch.Generator().manual_seed(batch)
    sample = torch.randn(batch, 3, 8, 8, generator=draw).to(dtype)
    return sample, torch.arange(batch) * 300, torch.randn(batch, slots, 12, generator=draw).to(dtype)


@pytest.fixture
def unet():
    return make_unet()


class TestContract(ModelContract):
    """The parts of the contract that apply to a model of diffusers."""

    model_class = SlotUNetModel
    output_key = "sample"
    skipped = {
        "forward_takes_main_input_first_and_puts_the_loss_first": "a denoiser of diffusers has no loss",
        "trainer_trains_and_evaluates": "a denoiser of diffusers has no loss",
        "overfits_eight_examples": "test_learns_what_the_slots_say trains it",
        "save_and_load_give_every_parameter_and_buffer_back": "tested below in the format of diffusers",
        "auto_classes_load_it": "transformers has no Auto class for it",
        "loads_in_a_fresh_process_without_the_package": "diffusers loads it by its class",
        "the_config_can_ask_for_tuples": "a config of diffusers has no return_dict",
        "compiles_to_the_same_numbers": "tested below with a fixed number of graphs",
        "adapters_train_with_gradient_checkpointing": "diffusers has no enable_input_require_grads",
        "gradient_checkpointing_keeps_the_gradients": "tested below with enable_gradient_checkpointing of diffusers",
    }

    @pytest.fixture
    def model(self):
        return make_unet(sketch_channels=3, layout_channels=5, patch_size=2, position_frequencies=2)

    def inputs(self, batch):
        sample, timestep, slots = make_inputs(batch)
        draw = torch.Generator().manual_seed(batch)
        painting = {
            "sketch": torch.randn(sample.shape, generator=draw),
            "masks": torch.rand(batch, 3, 8, 8, generator=draw),
        }
        return {"sample": sample, "timestep": timestep % 1000, "encoder_hidden_states": slots, **painting}

    def loss(self, model, inputs):
        return model(**inputs).sample.square().mean()

    def load(self, folder, dtype):
        return SlotUNetModel.from_pretrained(folder, torch_dtype=dtype).eval()


# ------------------------------------------------------------------------------------------------ what it computes


def test_one_level_gives_the_numbers_of_diffusers():
    fields = {
        "sample_size": 8,
        "block_out_channels": (16,),
        "layers_per_block": 2,
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    ours = SlotUNetModel(**fields, attention_resolutions=(8,), attention_head_dim=4).double().eval()
    theirs = UNet2DConditionModel(
        **fields,
        in_channels=3,
        out_channels=3,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=4,  # heads, in spite of its name
        use_linear_projection=True,
    )
    theirs = theirs.double().eval()
    copy_unet(ours, theirs)
    inputs = make_inputs(dtype=torch.float64)
    torch.testing.assert_close(ours(*inputs).sample, theirs(*inputs).sample, rtol=0, atol=1e-10)
    keep = torch.tensor([[True, False, True], [False, True, True]])
    found, expected = (net(*inputs, encoder_attention_mask=keep).sample for net in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_new_network_predicts_no_noise():
    assert not SlotUNetModel(**TINY)(*make_inputs()).sample.any()


def test_the_call(unet):
    sample, _, slots = make_inputs()
    expected = unet(sample, torch.tensor([7, 7]), slots).sample
    assert expected.shape == sample.shape
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7, dtype=torch.int32)):
        torch.testing.assert_close(unet(sample, timestep, encoder_hidden_states=slots).sample, expected)
    found = unet(sample, 7, slots, return_dict=False)
    assert isinstance(found, tuple) and torch.equal(found[0], unet(sample, 7, slots)[0])
    assert not torch.allclose(unet(sample, 8, slots).sample, expected, atol=1e-5)


def test_slots_are_a_set_of_any_size(unet):
    sample, times, slots = make_inputs(slots=5)
    expected = unet(sample, times, slots).sample
    torch.testing.assert_close(unet(sample, times, slots.flip(1)).sample, expected, rtol=1e-4, atol=1e-5)
    keep = torch.tensor([[True, True, False, True, False]] * 2)
    fewer = unet(sample, times, slots[:, [0, 1, 3]]).sample
    assert not torch.allclose(fewer, expected, atol=1e-3)
    torch.testing.assert_close(
        unet(sample, times, slots, encoder_attention_mask=keep).sample, fewer, rtol=1e-4, atol=1e-5
    )


def test_rows_of_a_batch_are_independent(unet):
    sample, times, slots = make_inputs(3)
    together = unet(sample, times, slots).sample
    for row in range(3):
        alone = unet(sample[row : row + 1], times[row], slots[row : row + 1]).sample
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_channels_last_gives_the_same_numbers(unet):
    sample, times, slots = make_inputs()
    expected = unet(sample, times, slots).sample
    unet.to(memory_format=torch.channels_last)
    found = unet(sample.to(memory_format=torch.channels_last), times, slots).sample
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiles_to_the_same_numbers():
    # One level suffices: every kind of layer but the resampling ones, and those are functions of torch alone.
    unet, inputs = make_unet(block_out_channels=(8,), attention_resolutions=()), make_inputs()
    expected = unet(*inputs).sample
    try:
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    finally:
        torch.compiler.reset()


# ------------------------------------------------------------------------------------------------ training


def gradients(unet):
    unet.zero_grad()
    sample, times, slots = make_inputs()
    slots.requires_grad_()
    unet(sample, times, slots).sample.square().mean().backward()
    return {"slots": slots.grad} | {name: p.grad for name, p in unet.named_parameters()}


def test_everything_gets_a_gradient_with_and_without_checkpointing(unet):
    expected = gradients(unet.train())
    for name, gradient in expected.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
    calls = []
    unet.enable_gradient_checkpointing(lambda layer, *args: calls.append(layer) or layer(*args))
    gradients(unet)
    assert len(calls) == len([*unet.down_layers, *unet.middle_layers, *unet.up_layers])
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    for name, gradient in gradients(unet).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_is_finite_under_bfloat16_autocast(unet):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = unet(*make_inputs()).sample.float().square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in unet.parameters())


def test_learns_what_the_slots_say():
    """From the noisy latents alone the mean noise is all that can be said here: only the slots know more."""
    torch.manual_seed(0)
    unet, target = SlotUNetModel(**TINY), torch.randn(8, 3, 1, 1).expand(-1, -1, 8, 8)
    sample, times, slots = torch.randn(1, 3, 8, 8).expand(8, -1, -1, -1), torch.full((8,), 10), torch.randn(8, 2, 12)
    optimizer = torch.optim.Adam(unet.parameters(), 1e-2)
    for _ in range(60):
        loss = F.mse_loss(unet(sample, times, slots).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * (target - target.mean(0)).square().mean()


def test_patches_are_a_rearrangement():
    """With patches of size 2, the network is the one for latents that pixel_unshuffle made."""
    cut, whole = make_unet(patch_size=2, sample_size=16), make_unet(in_channels=12)
    whole.load_state_dict(cut.state_dict())
    sample, times, slots = torch.randn(2, 3, 16, 16), torch.tensor([5, 700]), torch.randn(2, 3, 12)
    expected = F.pixel_shuffle(whole(F.pixel_unshuffle(sample, 2), times, slots).sample, 2)
    torch.testing.assert_close(cut(sample, times, slots).sample, expected)


def test_a_sketch_is_more_channels_of_the_input():
    sketching, plain = make_unet(sketch_channels=2), make_unet(in_channels=5)
    weights = sketching.state_dict()
    wider = {"conv_out.weight": plain.conv_out.weight, "conv_out.bias": plain.conv_out.bias}
    with torch.no_grad():
        for name, value in wider.items():
            value[:3] = weights[name]
    plain.load_state_dict(weights | wider)
    sample, times, slots = make_inputs()
    sketch = torch.randn(2, 2, 8, 8)
    expected = plain(torch.cat([sample, sketch], 1), times, slots).sample[:, :3]
    torch.testing.assert_close(sketching(sample, times, slots, sketch=sketch).sample, expected)


def test_the_residual_is_the_scaled_difference_from_the_sketch():
    unet = make_unet(sketch_channels=3, residual_scale=0.25)
    latents, sketch = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    residual = unet.to_residual(latents, sketch)
    torch.testing.assert_close(residual, (latents - sketch) * 4)
    torch.testing.assert_close(unet.from_residual(residual, sketch), latents)
    plain = make_unet()
    assert plain.to_residual(latents, None) is latents and plain.from_residual(latents, None) is latents


def test_the_ground_has_a_smaller_scale():
    unet = make_unet(sketch_channels=3, layout_channels=2, patch_size=2, residual_scale=0.5, residual_power=0.5)
    masks = torch.zeros(2, 3, 16, 16)
    masks[0, 1], masks[1, 2] = 1, 1  # the ground is slot 1 in the first image, and slot 2 in the second
    masks[:, 0, :4, :4] = 1  # an object
    masks[:, 1:, :4, :4] = 0
    masks[0, :2, 12:, 12:] = 0.5  # half an object
    scales = unet.residual_scales(masks)
    assert scales.shape == (2, 1, 8, 8)
    expected = torch.full((2, 1, 8, 8), 0.5 * 0.001**0.5)
    expected[:, :, :2, :2] = 0.5 * 1.001**0.5
    expected[0, :, 6:, 6:] = 0.5 * 0.501**0.5
    torch.testing.assert_close(scales, expected)
    latents, sketch = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    residual = unet.to_residual(latents, sketch, masks)
    torch.testing.assert_close(residual, (latents - sketch) / expected)
    torch.testing.assert_close(unet.from_residual(residual, sketch, masks), latents)
    half = unet.to_residual(latents, sketch.bfloat16(), masks)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="masks is missing, but residual_power=0.5 needs it; pass the masks"):
        unet.to_residual(latents, sketch)


def test_slots_are_painted_where_their_masks_are():
    unet = make_unet(layout_channels=5)
    inputs = []
    unet.conv_in.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    sample, times, slots = make_inputs()
    masks = torch.randn(2, 3, 16, 16).softmax(1)
    unet(sample, times, slots, masks=masks)
    small, vectors = F.avg_pool2d(masks, 2), F.linear(slots, unet.layout.weight, unet.layout.bias)
    painted = sum(small[:, slot, None] * vectors[:, slot, :, None, None] for slot in range(3))
    torch.testing.assert_close(inputs[0], torch.cat([sample, painted], 1))
    order = torch.tensor([2, 0, 1])  # slots with their masks are a set
    torch.testing.assert_close(
        unet(sample, times, slots[:, order], masks=masks[:, order]).sample,
        unet(sample, times, slots, masks=masks).sample,
    )


# ------------------------------------------------------------------------------------------------ saving


def test_save_and_load_give_every_parameter_back(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = SlotUNetModel.from_pretrained(tmp_path)
    assert not loaded.training
    expected, found = unet.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in unet.config.items() if name[0] != "_"} == {
        name: v for name, v in loaded.config.items() if name[0] != "_"
    }
    inputs = make_inputs()
    assert torch.equal(aligned(loaded)(*inputs).sample, unet(*inputs).sample)


def test_weights_of_another_shape_are_refused(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    make_unet(cross_attention_dim=20).save_config(tmp_path)
    with pytest.raises(ValueError, match=r"to_kv"):
        SlotUNetModel.from_pretrained(tmp_path)


def test_named_networks_are_what_they_say():
    sizes = {}
    for name, fields in ARCHITECTURES.items():
        with torch.device("meta"):
            unet = SlotUNetModel(**fields)
        sizes[name] = sum(parameter.numel() for parameter in unet.parameters())
        inputs = torch.empty(1, unet.config.in_channels, *2 * [unet.config.sample_size], device="meta")
        slots = torch.empty(1, 5, unet.config.cross_attention_dim, device="meta")
        assert unet(inputs, torch.empty(1, device="meta"), slots).sample.shape == inputs.shape
    assert sizes["small"] < 5e6 and 1.0e8 < sizes["clevrtex"] < 1.5e8


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sample_size": 9}, "sample_size=9 must be a multiple of 2"),
        ({"layers_per_block": 0}, "layers_per_block=0 must be at least 1"),
        ({"block_out_channels": ()}, r"block_out_channels=\(\) must have at least one level"),
        ({"block_out_channels": (8, 18)}, r"block_out_channels=\(8, 18\) must be multiples of norm_num_groups=4"),
        ({"block_out_channels": (3, 16), "norm_num_groups": 1}, "must begin with an even number"),
        ({"attention_resolutions": (2,)}, r"attention_resolutions=\(2,\) has 2, .* choose from 8, 4"),
        ({"attention_head_dim": 5}, "must be multiples of attention_head_dim=5 where"),
        ({"position_frequencies": -1}, "position_frequencies=-1 must be None or at least 0"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"patch_size": 8}, "sample_size=8 must be a multiple of 16, .* with patches of size 8"),
        ({"patch_size": 2, "attention_resolutions": (8,)}, r"attention_resolutions=\(8,\) has 8, .* from 4, 2"),
        ({"sketch_channels": -1}, "sketch_channels=-1 must be 0 or above"),
        ({"layout_channels": -1}, "layout_channels=-1 must be 0 or above"),
        ({"residual_scale": -0.5}, "residual_scale=-0.5 must be 0 or above"),
        ({"temperature": -0.5}, "temperature=-0.5 must be 0 or above"),
        ({"residual_scale": 0.5, "sketch_channels": 2}, "sketch_channels=2 must be in_channels=3"),
        (
            {"residual_power": 0.5},
            "residual_power=0.5 needs masks of the slots: layout_channels=0 must be above 0",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SlotUNetModel(**{**TINY, **fields})


def test_a_misspelled_field_is_rejected():
    with pytest.raises(TypeError, match="layer_per_block"):
        SlotUNetModel(**TINY, layer_per_block=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sample": torch.zeros(2, 3, 16, 16)}, r"sample has shape \(2, 3, 16, 16\), expected \(batch, 3, 8, 8\)"),
        ({"sample": torch.zeros(2, 4, 8, 8)}, r"sample has shape \(2, 4, 8, 8\)"),
        ({"sample": torch.zeros(3, 8, 8)}, r"sample has shape \(3, 8, 8\)"),
        ({"encoder_hidden_states": torch.zeros(2, 3, 64)}, r"shape \(2, 3, 64\), expected \(2, slots, 12\)"),
        ({"encoder_hidden_states": torch.zeros(1, 3, 12)}, r"shape \(1, 3, 12\), expected \(2, slots, 12\)"),
        ({"encoder_hidden_states": torch.zeros(2, 0, 12)}, "has no slots"),
        ({"encoder_attention_mask": torch.ones(2, 4, dtype=torch.bool)}, r"expected torch.bool of shape \(2, 3\)"),
        ({"encoder_attention_mask": torch.ones(2, 3)}, "encoder_attention_mask is torch.float32"),
        (
            {"sketch": torch.zeros(2, 3, 8, 8)},
            r"sketch is of shape \(2, 3, 8, 8\), expected none, as sketch_channels=0",
        ),
        ({"masks": torch.zeros(2, 3, 8, 8)}, r"masks is of shape \(2, 3, 8, 8\), expected none, as layout_channels=0"),
        ({"timestep": 1000}, "timestep has values from 1000 to 1000, expected 0 to 999"),
        ({"timestep": torch.tensor([3, -1])}, "timestep has values from -1 to 3, expected 0 to 999"),
        ({"timestep": float("nan")}, "timestep has values from nan"),
        ({"timestep": torch.tensor([1, 2, 3])}, r"timestep has shape \(3,\), expected one number, or one for each"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(unet, change, message):
    sample, times, slots = make_inputs()
    inputs = {"sample": sample, "timestep": times, "encoder_hidden_states": slots}
    with pytest.raises(ValueError, match=message):
        unet(**{**inputs, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sketch": None}, r"sketch is missing, expected a tensor of shape \(2, 3, 8, 8\)"),
        ({"sketch": torch.zeros(2, 3, 4, 4)}, r"sketch is of shape \(2, 3, 4, 4\), expected .* \(2, 3, 8, 8\)"),
        ({"masks": None}, r"masks is missing, expected \(batch, 3, height, width\), one mask per slot"),
        ({"masks": torch.zeros(2, 4, 8, 8)}, r"masks is of shape \(2, 4, 8, 8\), expected \(batch, 3, height"),
    ],
)
def test_paintings_that_do_not_fit_are_refused(change, message):
    sample, times, slots = make_inputs()
    painting = {"sketch": torch.zeros(2, 3, 8, 8), "masks": torch.zeros(2, 3, 8, 8)}
    with pytest.raises(ValueError, match=message):
        make_unet(sketch_channels=3, layout_channels=5)(sample, times, slots, **{**painting, **change})
