import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_dl.models.layers_attention import AdditiveAttention, SlotAttention, attention_masks
from hf_dl.models.slot_config import SlotAutoencoderConfig
from hf_dl.models.slot_encoders import SlotEncoder


def textbook(module, inputs, slots, num_iterations):
    """Algorithm 1 of Locatello et al. 2020, line by line, in the paper's (tokens, slots) layout."""
    inputs = module.norm_inputs(inputs)
    k, v = module.to_k(inputs), module.to_v(inputs)
    attentions = []
    for _ in range(num_iterations):
        slots_prev = slots
        q = module.to_q(module.norm_slots(slots))
        logits = torch.einsum("bnd,bkd->bnk", k, q) / q.shape[-1] ** 0.5
        attn = logits.softmax(dim=-1)
        attentions.append(attn.transpose(1, 2))
        attn = attn + module.epsilon
        weights = attn / attn.sum(dim=1, keepdim=True)
        updates = torch.einsum("bnk,bnd->bkd", weights, v)
        slots = torch.stack([module.gru(u, s) for u, s in zip(updates, slots_prev, strict=True)])
        slots = slots + module.mlp(module.norm_mlp(slots))
    return slots, attentions


@pytest.fixture(
    params=[(16, 16, 64, False), (24, 16, 64, True), (96, 8, 12, False), (96, 8, 12, True)],
    ids=["square", "wide-bias", "projected", "projected-bias"],
)
def case(request):
    """Module, tokens and slots in float64; the last two are where projecting the tokens is cheaper."""
    input_dim, slot_dim, tokens, qkv_bias = request.param
    torch.manual_seed(0)
    module = SlotAttention(input_dim, slot_dim, mlp_dim=20, qkv_bias=qkv_bias).double()
    for norm in (module.norm_inputs, module.norm_slots, module.norm_mlp):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return module, torch.randn(3, tokens, input_dim).double(), torch.randn(3, 5, slot_dim).double()


def test_equals_the_algorithm_of_the_paper(case):
    module, inputs, slots = case
    inputs.requires_grad_(), slots.requires_grad_()
    found, attentions = module(inputs, slots, num_iterations=3)
    found.square().sum().backward()
    gradients = [inputs.grad.clone(), slots.grad.clone(), *[p.grad.clone() for p in module.parameters()]]
    inputs.grad = slots.grad = None
    module.zero_grad()
    expected, expected_attentions = textbook(module, inputs, slots, 3)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(attentions, expected_attentions, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    others = [inputs.grad, slots.grad, *[p.grad for p in module.parameters()]]
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_both_ways_of_projecting_are_taken_and_agree():
    torch.manual_seed(0)
    module = SlotAttention(32, 32, mlp_dim=20)
    inputs, slots = torch.randn(2, 100, 32), torch.randn(2, 4, 32)
    assert module._absorbing_is_cheaper(100, 4, 3) and not module._absorbing_is_cheaper(4, 30, 5)
    keys = module.norm_inputs(inputs)
    absorbed, _ = module._iterate(keys, keys, slots, True)
    projected, _ = module._iterate(module.to_k(keys), module.to_v(keys), slots, False)
    torch.testing.assert_close(absorbed, projected, rtol=1e-5, atol=1e-5)


def test_implicit_gradient_is_that_of_the_last_iteration(case):
    module, inputs, slots = case
    slots.requires_grad_()
    found, _ = module(inputs, slots, num_iterations=3, gradient="implicit")
    full, _ = module(inputs, slots, num_iterations=3)
    torch.testing.assert_close(found, full)
    found.sum().backward()
    assert slots.grad is None
    found_gradients = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    with torch.no_grad():
        fixed, _ = textbook(module, inputs, slots, 2)
    textbook(module, inputs, fixed, 1)[0].sum().backward()
    for one, p in zip(found_gradients, module.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-8, atol=1e-8)


def test_bilevel_gradient_passes_straight_to_the_initial_slots(case):
    module, inputs, slots = case
    slots.requires_grad_()
    found, _ = module(inputs, slots, num_iterations=3, gradient="bilevel")
    found.sum().backward()
    with torch.no_grad():
        fixed, _ = textbook(module, inputs, slots, 2)
    fixed.requires_grad_()
    expected, _ = textbook(module, inputs, fixed, 1)
    expected.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(slots.grad, fixed.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradient", ["full", "implicit", "bilevel"])
def test_gradcheck(gradient):
    torch.manual_seed(0)
    module = SlotAttention(4, 4, mlp_dim=5).double()
    inputs = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    slots = torch.randn(1, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: module(x, slots, num_iterations=1, gradient=gradient)[0], inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_core_runs_in_float32_under_autocast(dtype):
    torch.manual_seed(0)
    module = SlotAttention(8, 8, mlp_dim=8)
    inputs, slots = torch.randn(2, 50, 8).to(dtype), torch.randn(2, 3, 8)
    # A slot that no token attends to: in half precision epsilon vanishes and its mean is 0 / 0.
    slots[:, 0] *= 1e4
    with torch.autocast("cpu", dtype=dtype):
        found, attentions = module(inputs, slots)
    assert found.dtype == torch.float32 and torch.isfinite(found).all()
    expected, _ = module(inputs.float(), slots)
    torch.testing.assert_close(found, expected)
    assert attentions[-1].dtype == torch.float32


def test_an_empty_slot_takes_the_mean_of_the_values():
    """With A = 0 for a slot, (A + epsilon) normalized over the tokens is uniform."""
    module = SlotAttention(4, 4, mlp_dim=4).double()
    values = torch.randn(1, 7, 4).double()
    attention = torch.zeros(1, 1, 7).double()
    weights = attention + module.epsilon
    torch.testing.assert_close((weights @ values / weights.sum(-1, keepdim=True))[0, 0], values[0].mean(0))
    assert F.softmax(torch.zeros(1, 2), dim=1).sum() == 1


def test_unknown_gradient_and_iterations_are_refused():
    module = SlotAttention(4, 4, mlp_dim=4)
    with pytest.raises(ValueError, match="gradient='implict' is unknown; choose one of full, implicit, bilevel"):
        module(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4), gradient="implict")
    with pytest.raises(ValueError, match="num_iterations=0 must be at least 1"):
        module(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4), num_iterations=0)


def test_additive_attention_is_its_formula():
    torch.manual_seed(0)
    attention = AdditiveAttention(5, 6, attention_dim=4).double()
    queries, memory = torch.randn(2, 3, 5).double(), torch.randn(2, 7, 6).double()
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, [0, 4, 6]] = False
    scores = attention(queries, attention.project(memory), keep)
    for row in range(2):
        for query in range(3):
            for position in range(7):
                w_q = attention.query.weight @ queries[row, query] + attention.query.bias
                u_m = attention.key.weight @ memory[row, position]
                expected = attention.energy.weight[0] @ torch.tanh(w_q + u_m)
                if not keep[row, position]:
                    expected = torch.tensor(float("-inf"), dtype=torch.double)
                torch.testing.assert_close(scores[row, query, position], expected, rtol=1e-12, atol=1e-12)
    weights = scores.softmax(-1)
    assert (weights[1, :, ~keep[1]] == 0).all()
    shorter = attention(queries[1:], attention.project(memory[1:, keep[1]])).softmax(-1)
    torch.testing.assert_close(weights[1:, :, keep[1]], shorter)


def test_queries_do_not_see_each_other():
    torch.manual_seed(0)
    attention = AdditiveAttention(5, 6, attention_dim=4)
    queries, keys = torch.randn(2, 3, 5), attention.project(torch.randn(2, 7, 6))
    together = attention(queries, keys)
    for query in range(3):
        torch.testing.assert_close(attention(queries[:, query : query + 1], keys)[:, 0], together[:, query])


# ------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize(
    "image_size, stride, size", [(16, 4, (16, 16)), (16, 1, (5, 7)), (24, 2, (40, 9)), (8, 8, (3, 4))]
)
def test_attention_masks_are_interpolated_between_the_pixels_that_tokens_are_centered_on(image_size, stride, size):
    side = image_size // stride
    attention = torch.rand(2, 3, side**2, dtype=torch.float64)
    found = attention_masks(attention, size, image_size=image_size)
    where = [(np.arange(n) + 0.5) / n * image_size - 0.5 for n in size]  # of the output's pixels, in the image's
    centers = np.arange(side) * stride
    for maps, masks in zip(attention.view(-1, side, side).numpy(), found.flatten(0, 1).numpy(), strict=True):
        along = np.stack([np.interp(where[1], centers, row) for row in maps])
        both = np.stack([np.interp(where[0], centers, column) for column in along.T], axis=1)
        np.testing.assert_allclose(masks, both, rtol=0, atol=1e-12)


@pytest.mark.parametrize("encoder", ["cnn", "resnet18"])
def test_tokens_are_centered_where_the_masks_put_them(encoder):
    backbone = SlotEncoder(SlotAutoencoderConfig(encoder_type=encoder)).backbone.double()
    for module in [*backbone.modules()]:
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):  # which is no sum over the receptive field
                setattr(module, name, torch.nn.Identity())
    for parameter in backbone.parameters():
        torch.nn.init.constant_(parameter, 1.0)
    image = torch.ones(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(backbone(image)[0, :, 8, 8].sum(), image)
    weight, places = gradient[0].sum(0), torch.arange(64, dtype=torch.float64)
    center = (weight.sum(1) * places).sum() / weight.sum(), (weight.sum(0) * places).sum() / weight.sum()
    masks = attention_masks(torch.eye(256)[None, 8 * 16 + 8 : 8 * 16 + 9], (64, 64), image_size=64)
    assert [round(float(place), 6) for place in center] == [*divmod(int(masks.argmax()), 64)] == [32, 32]


def test_attention_masks_keep_the_precision_and_refuse_what_is_no_grid():
    assert attention_masks(torch.rand(1, 2, 16).bfloat16(), (8, 8), image_size=8).dtype == torch.float32
    with pytest.raises(ValueError, match="has 15 tokens, expected a square number"):
        attention_masks(torch.rand(1, 2, 15), (8, 8), image_size=8)
