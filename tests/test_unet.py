"""Chapter 4: the network and its promises. Outputs are compared with diffusers' in test_convert.py."""

from collections import Counter

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DModel

import diffuser
from diffuser import UNet, build_unet, configure

HO2020 = configure(**diffuser.given_values({"dataset": "cifar10", "recipe": "ho2020"}))


def shapes(module):
    return Counter(tuple(p.shape) for p in module.parameters())


def test_ho2020_has_the_parameters_of_diffusers():
    """The ho2020 network has 35,746,307 parameters, of the same shapes as UNet2DModel's."""
    ours = build_unet(HO2020, 3, 0)
    theirs = UNet2DModel(sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, attention_head_dim=None,
                         down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                         up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307
    assert shapes(ours) == shapes(theirs)


def test_null_class_stands_for_no_label():
    """y = None is the null class, and a real class gives another output."""
    network, x, t = tiny_unet(), torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    with torch.no_grad():
        nothing, null, first = (network(x, t, y) for y in (None, torch.tensor([3, 3]), torch.tensor([0, 0])))
    assert torch.equal(nothing, null) and not torch.allclose(nothing, first)


@pytest.mark.parametrize("conditioning", ["scale_shift", "add", "concat"])
def test_every_conditioning_tells_times_and_classes_apart(conditioning):
    """Time and class reach the output in all three ways of conditioning."""
    network, x = tiny_unet(conditioning=conditioning), torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        a = network(x, torch.tensor([1]), torch.tensor([0]))
        assert not torch.allclose(a, network(x, torch.tensor([9]), torch.tensor([0])))
        assert not torch.allclose(a, network(x, torch.tensor([1]), torch.tensor([1])))


def test_concat_feeds_both_embeddings_as_input_channels():
    """--conditioning concat: the first convolution sees the image and 2 x emb_dim planes, blocks see nothing."""
    network = UNet(3, 10, base_channels=8, emb_dim=16, conditioning="concat")
    assert network.conv_in.in_channels == 3 + 2 * 16
    assert all(m.condition is None for m in network.modules() if isinstance(m, diffuser.ResBlock))


def test_untrained_network_predicts_zero_and_blocks_are_the_identity():
    """Zero initialisation of the last convolutions."""
    network = UNet(1, 0, base_channels=8)
    x = torch.randn(2, 1, 8, 8)
    assert network(x, torch.tensor([0, 5])).abs().max() == 0
    block = diffuser.ResBlock(8, 8, 0, 4, 0.0, False)
    block.apply(UNet.initialise)
    h = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(h, None), h)


@pytest.mark.parametrize("use_attention, levels, expected", [(True, (), 1), (True, (1,), 1 + 1 + 2), (False, (1,), 0)])
def test_attention_is_where_it_was_asked_for(use_attention, levels, expected):
    """Attention stands in the bottleneck and at the levels named, or nowhere."""
    network = UNet(1, base_channels=8, channel_mults=(1, 2), num_res_blocks=1, use_attention=use_attention,
                   attention_levels=levels)
    assert sum(isinstance(m, diffuser.Attention) for m in network.modules()) == expected


@pytest.mark.parametrize("size, levels", [((28, 28), 3), ((8, 20), 3), ((3, 5), 1)])
def test_sizes_that_can_be_halved_work(size, levels):
    """Any size that the levels can halve, square or not, comes back as it went in."""
    network = UNet(1, base_channels=8, channel_mults=(1,) * levels, num_res_blocks=1)
    assert network(torch.zeros(1, 1, *size), torch.tensor([0])).shape[2:] == size


def test_sizes_that_cannot_are_refused_with_the_nearest():
    """30 x 33 at three levels: the error names 28, 32 and 36."""
    with pytest.raises(diffuser.UserError, match="height 28 or 32, width 32 or 36"):
        diffuser.check_image_size(30, 33, 3)


def test_groups_are_lowered_to_fit():
    """32 groups and 48 channels: 16 groups, for every width of the network."""
    network = UNet(1, base_channels=48, channel_mults=(1, 2))
    assert {m.num_groups for m in network.modules() if isinstance(m, torch.nn.GroupNorm)} == {16}


def test_parameter_names_are_plain():
    """Names are the checkpoint's interface: no wrapper's prefix in them."""
    assert not [n for n in tiny_unet().state_dict() if n.startswith(("module.", "_orig_mod."))]


# bf16 on a CPU has functions of its own: each against torch's in float32

@pytest.fixture
def images():
    """bf16 images [4, 32, 7, 6] whose groups have means of their own, a gradient for them, and scales and shifts."""
    torch.manual_seed(1)
    layout = dict(memory_format=torch.channels_last)
    x = (2 * torch.randn(4, 32, 7, 6) + 3 * torch.randn(4, 32, 1, 1)).bfloat16().contiguous(**layout)
    return x, torch.randn(4, 32, 7, 6).bfloat16().contiguous(**layout), torch.randn(4, 32), torch.randn(4, 32)


def close(a, b, tolerance=0.01):
    """Whether they differ by no more than bf16 rounds, in the mean square."""
    return (a.float() - b.float()).norm() < tolerance * b.float().norm()


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_hand_tuned_normalisation_equals_torch(images, conditioned, silu):
    """Group norm, scale, shift and SiLU in one: values and all gradients are those of float32 within bf16's rounding."""
    x, g, scale, shift = images
    norm = torch.nn.GroupNorm(8, 32)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        norm.zero_grad()
        inputs = [v.to(d, copy=True).requires_grad_() for v, d in ((x, dtype), (scale, None), (shift, None))]
        assert diffuser.hand_tuned(inputs[0]) == (dtype == torch.bfloat16)
        out = diffuser.normalise(norm, inputs[0], *(inputs[1:] if conditioned else (None, None)), silu=silu)
        out.backward(g.to(dtype))
        leaves = inputs if conditioned else inputs[:1]
        results.append([out, *(v.grad.clone() for v in (*leaves, norm.weight, norm.bias))])
    assert all(close(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mean", [3, 8, 50])
def test_hand_tuned_normalisation_keeps_its_accuracy_off_centre(mean):
    """Sums are rounded to bf16, but a group whose mean is far above its spread is normalised as well as any."""
    torch.manual_seed(0)
    x = (torch.randn(2, 16, 32, 32) + mean).bfloat16().contiguous(memory_format=torch.channels_last)
    norm = torch.nn.GroupNorm(4, 16)
    assert close(diffuser.normalise(norm, x, silu=False), norm(x.float()))


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (4, 4)])
def test_hand_tuned_convolution_equals_torch(size):
    """Small maps: output, and gradients of input, weight and bias."""
    torch.manual_seed(0)
    convolution, results = diffuser.Convolution(128, 20), []
    x, g = torch.randn(3, 128, *size), torch.randn(3, 20, *size)
    for dtype in (torch.bfloat16, torch.float32):
        convolution.zero_grad()
        inputs = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = convolution(inputs)
        assert ("SmallMap" in type(out.grad_fn).__name__) == (dtype == torch.bfloat16)
        out.backward(g.to(dtype))
        results.append([out, inputs.grad, convolution.weight.grad, convolution.bias.grad])
    assert all(close(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("tokens", [49, 256])
def test_hand_tuned_attention_equals_torch(tokens):
    """softmax(q k^T / sqrt(d)) v written out: output and gradients are those of torch's kernel."""
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, 2, 3, tokens, 16)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [u.to(dtype).requires_grad_() for u in (q, k, v)]
        out = diffuser.attend(*inputs)
        out.backward(g.to(dtype))
        results.append([out, *(u.grad for u in inputs)])
    assert all(close(a, b) for a, b in zip(*results, strict=True))


def test_hand_tuned_dropout_drops_as_often_as_asked():
    """The share dropped is p, the mean stays, and torch's seed decides which."""
    dropout, x = diffuser.Dropout(0.3), torch.ones(4, 8, 50, 51, dtype=torch.bfloat16)
    torch.manual_seed(5)
    a = dropout(x)
    assert (a == 0).float().mean() == pytest.approx(0.3, abs=0.01) and a.float().mean() == pytest.approx(1, abs=0.02)
    assert set(a.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).bfloat16().item()}
    b = dropout(x)
    torch.manual_seed(5)
    assert torch.equal(dropout(x), a) and not torch.equal(a, b)
    assert torch.equal(dropout.eval()(x), x)


def test_a_network_in_bf16_is_near_its_float32(monkeypatch):
    """The whole network under autocast, with all of the above: output and gradients near those of float32, and nearer
    than torch's own bf16 or as near."""
    network = tiny_unet(classes=0, base_channels=32, channel_mults=(1, 2, 2), attention_levels=(1,)).train()
    network.to(memory_format=torch.channels_last)
    x, t = torch.randn(4, 1, 28, 28), torch.tensor([0, 3, 50, 999])
    results = []
    for enabled, tuned in ((False, True), (True, True), (True, False)):
        monkeypatch.setattr(diffuser, "hand_tuned", lambda x, tuned=tuned: tuned and x.dtype == torch.bfloat16)
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = network(x, t)
        out.float().square().mean().backward()
        results.append(torch.cat([out.detach().float().flatten(), *(p.grad.flatten() for p in network.parameters())]))
    exact, ours, theirs = results
    assert (ours - exact).norm() < 0.05 * exact.norm() and (ours - exact).norm() < 1.5 * (theirs - exact).norm()
