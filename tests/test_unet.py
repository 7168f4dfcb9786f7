"""Chapter 4: the network and its promises. Outputs are compared with diffusers' in test_convert.py."""

from collections import Counter

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DModel

import diffuser
from diffuser import UNet, build_unet, configure

HO2020 = configure(**{"dataset": "cifar10", "recipe": "ho2020"})


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
    block.apply(UNet.init_weights)
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
