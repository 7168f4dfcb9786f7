"""diffuser_lib/cpu_kernels.py: every kernel against torch in float32, values and gradients; swapping them in."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_unet
from torch import nn

from diffuser_lib.cpu_kernels import SWAPS, install

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# ---- The modules that have a faster twin, as plain as they can be written ----------------------


class Norm(nn.GroupNorm):
    """Group norm, scale and shift, SiLU."""

    def __init__(self, groups, channels, silu=True):
        super().__init__(groups, channels)
        self.silu = silu

    def forward(self, x, scale=None, shift=None):
        x = super().forward(x)
        if scale is not None:
            x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(x) if self.silu else x


class Conv3x3(nn.Conv2d):
    """3x3 convolution."""

    def __init__(self, cin, cout, stride=1, padding=1):
        super().__init__(cin, cout, 3, stride, padding)


class Dropout(nn.Dropout):
    """Dropout."""


class Concat(nn.Module):
    """Concatenation along the channels."""

    def forward(self, a, b):
        return torch.cat([a, b], dim=1)


class DotProduct(nn.Module):
    """Attention by torch's kernel."""

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Network(nn.Module):
    """All of them, one after another."""

    def __init__(self):
        super().__init__()
        self.conv_in = Conv3x3(1, 64)
        self.norm = Norm(8, 64)
        self.down = Conv3x3(64, 128, stride=2)
        self.concat = Concat()
        self.dropout = Dropout(0.2)
        self.inner = nn.Sequential(Norm(8, 256, silu=False), Conv3x3(256, 32))
        self.attend = DotProduct()
        self.emb_proj = nn.Linear(4, 2 * 64)

    def forward(self, x, emb):
        scale, shift = self.emb_proj(emb).float().chunk(2, dim=1)
        h = self.down(self.norm(self.conv_in(x), scale, shift))
        h = self.inner(self.dropout(self.concat(h, h.flip(2))))
        tokens = h.flatten(2).transpose(1, 2)[:, None]
        return self.attend(tokens, tokens, tokens)


def fast(module):
    """A copy of a module with its twins in place."""
    module = copy.deepcopy(module)
    install(module)
    return module


def leaf(values, dtype=torch.float32, layout="channels_last"):
    """A tensor to take the gradient of; images in a layout."""
    values = values.to(dtype, copy=True)
    if values.dim() == 4:
        values = values.contiguous(memory_format=LAYOUTS[layout])
    return values.requires_grad_()


def close(a, b, tolerance=0.01):
    """Whether they differ by no more than bf16 rounds, in the mean square."""
    return (a.float() - b.float()).norm() < tolerance * b.float().norm()


def require_close(ours, theirs, tolerance=0.01):
    """Values and gradients, one by one."""
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert a.shape == b.shape, i
        assert close(a, b, tolerance), i


# ---- Norm --------------------------------------------------------------------------------------


def normalized(norm, x, g, scale, shift, dtype, layout):
    """The output of a norm and all gradients."""
    norm.zero_grad()
    leaves = [leaf(x, dtype, layout)]
    if scale is not None:
        leaves += [leaf(scale), leaf(shift)]
    out = norm(*leaves)
    out.backward(g.to(dtype))
    return out, [out, *(v.grad for v in leaves), norm.weight.grad.clone(), norm.bias.grad.clone()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_the_norm_equals_torch(conditioned, silu, layout):
    """Group norm, scale, shift and SiLU in one: values and all gradients are those of float32 within bf16's rounding,
    where groups have means of their own."""
    torch.manual_seed(1)
    x = 2 * torch.randn(4, 32, 7, 6) + 3 * torch.randn(4, 32, 1, 1)
    x = x.bfloat16().float()
    g = torch.randn(4, 32, 7, 6).bfloat16().float()
    scale = torch.randn(4, 32) if conditioned else None
    shift = torch.randn(4, 32) if conditioned else None
    norm = Norm(8, 32, silu)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)

    out, ours = normalized(fast(norm), x, g, scale, shift, torch.bfloat16, layout)
    assert "FusedGroupNormSiLU" in type(out.grad_fn).__name__
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=LAYOUTS[layout])
    _, theirs = normalized(norm, x, g, scale, shift, torch.float32, layout)
    require_close(ours, theirs)


@pytest.mark.parametrize("mean", [3, 8, 50, -50, 200])
def test_the_norm_keeps_its_accuracy_far_from_zero(mean):
    """Sums are rounded to bf16, but a group whose mean is far above its spread is normalized as well as any, and so is
    its gradient."""
    torch.manual_seed(0)
    x = (torch.randn(2, 16, 32, 32) + mean).bfloat16().float()
    g = torch.randn(2, 16, 32, 32).bfloat16().float()
    norm = Norm(4, 16, silu=False)
    _, ours = normalized(fast(norm), x, g, None, None, torch.bfloat16, "channels_last")
    _, theirs = normalized(norm, x, g, None, None, torch.float32, "contiguous")         # in channels_last torch fails
    require_close(ours, theirs, tolerance=0.02)
    assert close(ours[0], theirs[0])


def test_the_norm_of_a_constant_is_its_bias():
    """No variance at all: no division by zero, and none of what rounding leaves."""
    norm = Norm(4, 16, silu=False)
    nn.init.normal_(norm.bias)
    x = torch.full((2, 16, 8, 8), 3.0).bfloat16()
    out = fast(norm)(x)
    assert close(out, norm.bias[None, :, None, None].expand(out.shape))


def test_the_norm_of_tiny_maps_is_left_to_torch():
    """Up to 16 pixels torch is as fast, and no sums need to be evened out."""
    norm = fast(Norm(4, 16).bfloat16())
    for side, own in ((4, False), (5, True)):
        out = norm(torch.randn(2, 16, side, side).bfloat16().requires_grad_())
        name = type(out.grad_fn).__name__
        assert ("FusedGroupNormSiLU" in name) == own


# ---- Convolution -------------------------------------------------------------------------------


def convolved(convolution, x, g, dtype, layout):
    """The output of a convolution and all gradients, under autocast as in training."""
    convolution.zero_grad()
    x = leaf(x, dtype, layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = convolution(x)
    out.backward(g.to(dtype))
    return out, [out, x.grad, convolution.weight.grad, convolution.bias.grad]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (4, 4), (1, 3), (1, 1)])
def test_the_convolution_of_small_maps_equals_torch(size, layout):
    """Output, and gradients of input, weight and bias."""
    torch.manual_seed(0)
    convolution = Conv3x3(128, 20)
    x = torch.randn(3, 128, *size)
    g = torch.randn(3, 20, *size)
    out, ours = convolved(fast(convolution), x, g, torch.bfloat16, layout)
    assert "Conv3x3SmallSpatial" in type(out.grad_fn).__name__
    _, theirs = convolved(convolution, x, g, torch.float32, layout)
    require_close(ours, theirs)


@pytest.mark.parametrize("channels, side, options", [
    (64, 8, {}), (128, 9, {}), (128, 8, dict(stride=2)), (128, 8, dict(padding=0))])
def test_other_convolutions_are_left_to_torch(channels, side, options):
    """Narrow or large maps, where torch is as fast, and other strides and paddings: the very numbers of torch."""
    torch.manual_seed(0)
    convolution = Conv3x3(channels, 20, **options)
    x = torch.randn(2, channels, side, side).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        plain = convolution(x)
        out = fast(convolution)(x)
    assert torch.equal(out, plain)
    assert "Conv3x3SmallSpatial" not in type(out.grad_fn).__name__


def test_a_convolution_without_a_bias_is_left_to_torch():
    """As a network of one's own may have it."""
    convolution = Conv3x3(128, 20)
    convolution.bias = None
    x = torch.randn(2, 128, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(convolution)(x), convolution(x))


# ---- Attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 49, 256])
def test_attention_equals_torch(tokens):
    """softmax(q k^T / sqrt(d)) v written out: output and gradients are those of torch's kernel."""
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, 2, 3, tokens, 16)
    results = []
    for attend, dtype in ((fast(DotProduct()), torch.bfloat16), (DotProduct(), torch.float32)):
        leaves = [leaf(values, dtype, "contiguous") for values in (q, k, v)]
        out = attend(*leaves)
        out.backward(g.to(dtype))
        results.append([out, *(each.grad for each in leaves)])
    ours, theirs = results
    if tokens == 1:                                              # of one token the weight is 1, whatever q and k are
        assert ours[1].abs().max() < 0.01
        assert ours[2].abs().max() < 0.01
        ours, theirs = ours[0::3], theirs[0::3]
    require_close(ours, theirs, tolerance=0.015)


@pytest.mark.parametrize("tokens, needs_gradient", [(257, True), (49, False)])
def test_attention_of_many_tokens_or_without_a_gradient_is_left_to_torch(tokens, needs_gradient):
    """It would take much memory, or torch is faster: the very numbers of torch."""
    torch.manual_seed(0)
    q, k, v = (values.bfloat16() for values in torch.randn(3, 1, 2, tokens, 8))
    q.requires_grad_(needs_gradient)
    assert torch.equal(fast(DotProduct())(q, k, v), DotProduct()(q, k, v))


# ---- Dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_drops_as_often_as_asked(p):
    """The share dropped is p and the mean stays: all else is scaled by 1 / (1 - p)."""
    torch.manual_seed(5)
    dropout = fast(Dropout(p))
    x = torch.ones(4, 8, 50, 51).bfloat16()
    out = dropout(x)
    assert (out == 0).float().mean() == pytest.approx(p, abs=0.01)
    assert out.float().mean() == pytest.approx(1, abs=0.05)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).bfloat16().item()}


def test_dropout_follows_torchs_seed():
    """The same seed drops the same, two draws differ, and no draw is like its neighbour."""
    dropout = fast(Dropout(0.5))
    x = torch.ones(2, 8, 50, 51).bfloat16()
    torch.manual_seed(5)
    first = dropout(x)
    second = dropout(x)
    torch.manual_seed(5)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)

    kept = (first != 0).float()
    for a, b in ((kept[0], kept[1]), (kept[:, 0], kept[:, 1]), (kept[..., 1:], kept[..., :-1])):
        assert (a * b).mean() == pytest.approx(0.25, abs=0.02)   # independent


def test_dropout_is_the_same_in_every_layout():
    """What is dropped depends on the place in the image, not on the order in memory; the gradient is dropped alike."""
    dropout = fast(Dropout(0.3))
    values = torch.randn(2, 6, 5, 7).bfloat16()
    results = []
    for layout in LAYOUTS:
        torch.manual_seed(5)
        x = leaf(values, torch.bfloat16, layout)
        out = dropout(x)
        out.backward(torch.ones_like(out))
        results.append((out.detach(), x.grad))
        assert out.is_contiguous(memory_format=LAYOUTS[layout])
        assert torch.equal(out.detach(), x.detach() * x.grad)
    (out, grad), (other_out, other_grad) = results
    assert torch.equal(out, other_out)
    assert torch.equal(grad, other_grad)


def test_dropout_rests_when_it_should():
    """In evaluation, and where p is 0 or next to it."""
    x = torch.randn(2, 6, 5, 7).bfloat16()
    assert torch.equal(fast(Dropout(0.3)).eval()(x), x)
    assert torch.equal(fast(Dropout(0.0))(x), x)


# ---- Concatenation -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_concatenation_equals_torch(layout):
    """The same numbers, bit for bit, and gradients that lie in memory as images do."""
    torch.manual_seed(0)
    a = torch.randn(2, 6, 5, 7)
    b = torch.randn(2, 3, 5, 7)
    g = torch.randn(2, 9, 5, 7).bfloat16().contiguous(memory_format=LAYOUTS[layout])
    results = []
    for concat in (fast(Concat()), Concat()):
        leaves = [leaf(a, torch.bfloat16, layout), leaf(b, torch.bfloat16, layout)]
        out = concat(*leaves)
        out.backward(g)
        results.append([out, *(each.grad for each in leaves)])
    ours, theirs = results
    assert "Concatenation" in type(ours[0].grad_fn).__name__
    for x, y in zip(ours, theirs):
        assert torch.equal(x, y)
        assert x.is_contiguous(memory_format=LAYOUTS[layout])


def test_the_parts_of_a_gradient_are_no_views():
    """As views of the whole they would slow every convolution behind them."""
    seen = []
    parts = [leaf(torch.randn(2, channels, 5, 7), torch.bfloat16) * 1 for channels in (6, 3)]
    for part in parts:
        part.register_hook(seen.append)
    g = torch.ones(2, 9, 5, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    fast(Concat())(*parts).backward(g)
    assert [part.is_contiguous(memory_format=torch.channels_last) for part in seen] == [True, True]


# ---- Installing --------------------------------------------------------------------------------


def test_installing_changes_nothing_but_the_speed():
    """Parameters, their names, the classes that other code asks for, and what is no module of ours."""
    network = Network()
    before = {name: value.data_ptr() for name, value in network.state_dict().items()}
    names = [name for name, _ in network.named_modules()]
    install(network)
    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == before
    assert [name for name, _ in network.named_modules()] == names

    assert isinstance(network.norm, Norm)
    assert isinstance(network.norm, nn.GroupNorm)
    assert isinstance(network.conv_in, nn.Conv2d)
    assert isinstance(network.inner[0], Norm)
    assert isinstance(network.dropout, nn.Dropout)
    assert isinstance(network.attend, DotProduct)
    assert type(network.emb_proj) is nn.Linear
    assert type(network) is Network
    swapped = {type(module).__name__ for module in network.modules() if type(module).__name__.endswith("Twin")}
    assert swapped == {f"{name}Twin" for name in SWAPS}

    network.load_state_dict(Network().state_dict())


def test_installing_twice_is_installing_once():
    """A twin has no twin."""
    network = Network()
    install(network)
    classes = [type(module) for module in network.modules()]
    install(network)
    assert [type(module) for module in network.modules()] == classes


def test_a_copy_is_as_fast_and_apart():
    """deepcopy, by which averages are made, keeps the twins, and the weights of the copy are its own."""
    network = Network()
    install(network)
    twin = copy.deepcopy(network)
    assert [type(module) for module in twin.modules()] == [type(module) for module in network.modules()]
    with torch.no_grad():
        twin.norm.weight.add_(1)
    assert not torch.equal(twin.norm.weight, network.norm.weight)


def trained_once(network, enabled):
    """Output and all gradients, in bf16 under autocast or in float32, always with the same dropout."""
    torch.manual_seed(3)
    x = torch.randn(4, 1, 12, 12)
    emb = torch.randn(4, 4)
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        out = network(x, emb)
    out.float().square().mean().backward()
    gradients = [p.grad.flatten() for p in network.parameters()]
    return torch.cat([out.detach().float().flatten(), *gradients])


def test_a_network_with_twins_can_be_pickled():
    """For other processes and torch.save: what comes back computes the same, with its twins."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(4, 4))
    install(network)
    again = pickle.loads(pickle.dumps(network))
    assert type(again[0]) is type(network[0]) is not torch.nn.Dropout
    x = torch.ones(2, 3, 5, 4, dtype=torch.bfloat16)
    torch.manual_seed(1)
    dropped = network[0](x)
    torch.manual_seed(1)
    assert torch.equal(again[0](x), dropped)
    assert torch.equal(again[1].weight, network[1].weight)


def test_float32_is_left_to_torch():
    """Bit for bit the same output and gradients, dropout included."""
    network = Network()
    assert torch.equal(trained_once(fast(network), False), trained_once(network, False))


def test_a_network_in_bf16_is_near_its_float32():
    """All of them in a row under autocast: near float32, and as near as torch's own bf16."""
    torch.manual_seed(0)
    network = Network().to(memory_format=torch.channels_last)
    network.dropout.p = 0.0                                      # bf16 draws other numbers
    exact = trained_once(network, False)
    ours = trained_once(fast(network), True)
    theirs = trained_once(network, True)
    assert (ours - exact).norm() < 0.05 * exact.norm()
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()
    assert not torch.equal(ours, theirs)


def test_every_twin_is_of_a_module_of_the_unet():
    """A class renamed in diffuser.py would silently lose its kernel."""
    import diffuser

    network = diffuser.UNet(1, base_channels=8, channel_mults=(1, 2), dropout=0.1)
    classes = {type(module).__name__ for module in network.modules()}
    assert set(SWAPS) <= classes
    install(network)
    classes = {type(module).__name__ for module in network.modules()}
    assert {f"{name}Twin" for name in SWAPS} <= classes
    assert not set(SWAPS) & classes


def test_the_unet_in_bf16_is_near_its_float32():
    """The whole U-Net under autocast with all kernels: output and gradients near those of float32, and as near as torch's
    own bf16."""
    network = tiny_unet(classes=0, base_channels=32, channel_mults=(1, 2, 2), attention_levels=(1,)).train()
    network.to(memory_format=torch.channels_last)
    x = torch.randn(4, 1, 28, 28)
    t = torch.tensor([0, 3, 50, 999])
    results = []
    for each, enabled in ((network, False), (fast(network), True), (network, True)):
        each.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = each(x, t)
        out.float().square().mean().backward()
        gradients = [p.grad.flatten() for p in each.parameters()]
        results.append(torch.cat([out.detach().float().flatten(), *gradients]))
    exact, ours, theirs = results
    assert not torch.equal(ours, theirs)
    assert (ours - exact).norm() < 0.05 * exact.norm()
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


# ---- Memory ------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept():
    """A tensor as large as the last one gets its memory again, without a page fault for each page of it."""
    program = ("import resource, sys, torch\n"
               "from diffuser_lib.cpu_kernels import keep_freed_memory\n"
               "if sys.argv[1] == 'keep': keep_freed_memory()\n"
               "def faults():\n"
               "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
               "    torch.ones(2**24)\n"
               "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
               "print([faults() for _ in range(10)][-1])\n")
    counts = {}
    for choice in ("plain", "keep"):
        done = subprocess.run([sys.executable, "-c", program, choice], capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
        counts[choice] = int(done.stdout)
    assert counts["keep"] < 100
    assert counts["plain"] == 0 or counts["keep"] < counts["plain"]


def test_another_c_library_is_no_error(monkeypatch):
    """Where there is no mallopt, nothing happens."""
    from diffuser_lib import cpu_kernels

    monkeypatch.setattr(cpu_kernels.ctypes, "CDLL", lambda name: object())
    cpu_kernels.keep_freed_memory()
