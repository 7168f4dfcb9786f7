"""What torch is slow at in bf16 on a CPU, written anew and swapped into a finished network.

    install(network)            modules that have a faster twin here become that twin, in place

A twin is found by the name of a module's class (SWAPS), so this file imports nothing of the project; any network made
of modules with these names and signatures will do:

    Norm(nn.GroupNorm)          forward(x, scale=None, shift=None), attribute `silu`
    Conv3x3(nn.Conv2d)          forward(x), kernel 3x3
    Dropout(nn.Dropout)         forward(x)
    Concat(nn.Module)           forward(a, b): along the channels
    DotProduct(nn.Module)       forward(q, k, v): softmax(q k^T / sqrt(d)) v

Parameters, their names and, to rounding, all numbers stay. A twin hands anything but bf16 to the module it stands for.
keep_freed_memory() is for float32 as well. benchmarks/README.md has the times.
"""

from __future__ import annotations

import ctypes
import math
import sys
from contextlib import suppress
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Twin:
    """A mixin before a plain module's class. Pickled by the name of that class, since the mixed one has none."""

    plain: type[nn.Module]

    def __reduce_ex__(self, protocol):
        return rebuild, (self.plain,), self.__dict__


def is_ours(x: Tensor) -> bool:
    """Whether x is what the twins are for; anything else goes to the plain module."""
    return x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()


# ---- Group norm, scale and shift, SiLU in one --------------------------------------------------


class FusedGroupNormSiLU(torch.autograd.Function):
    """Group norm of x [N, C, H, W], times weight plus bias (float [N or 1, C]), then SiLU where `silu`.

    torch's own takes up to four times as long. Statistics are float32; the maps stay bf16.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups: int, eps: float, silu: bool):
        n, c, h, w = x.shape
        size = x[0].numel() // groups                            # numbers in a group

        def group_mean(v: Tensor) -> Tensor:                     # float [N, groups, 1]
            parts = math.gcd(4, h * w)                           # a bf16 sum is rounded: several even that out
            sums = v.permute(0, 2, 3, 1).reshape(n * parts, -1, c).sum(1).float()
            return sums.view(n, parts, groups, -1).sum((1, 3)).view(n, groups, 1) / size

        def per_channel(v: Tensor) -> Tensor:                    # [N, groups, 1 or C/groups] -> [N, C, 1, 1]
            return v.to(x.dtype).expand(n, groups, c // groups).reshape(n, c, 1, 1)

        mean, square = group_mean(x), group_mean(x.square())
        if (mean**2 > 16 * (square - mean**2)).any():            # so far from 0 the squares lose the variance
            x = x - per_channel(mean)
            mean, square = group_mean(x), group_mean(x.square())
        rstd = (square - mean**2).clamp_(min=0).add_(eps).rsqrt_()

        # The whole of it is a x + b, channel by channel.
        a = per_channel(weight.view(-1, groups, c // groups) * rstd)
        b = per_channel(bias.view(-1, groups, c // groups) - mean * a.view(n, groups, -1))
        z = torch.addcmul(b, x, a)
        ctx.save_for_backward(x, weight, mean, rstd, a, b)
        ctx.silu = silu
        return F.silu(z, inplace=True) if silu else z

    @staticmethod
    def backward(ctx, g):
        x, weight, mean, rstd, a, b = ctx.saved_tensors
        n, c, h, w = x.shape
        groups = mean.shape[1]
        per_group = c // groups
        if ctx.silu:
            z = torch.addcmul(b, x, a)
            g = torch.ops.aten.silu_backward.grad_input(g, z, grad_input=z)

        def channel_sum(v: Tensor) -> Tensor:                    # float [N, groups, C/groups]
            return v.sum((2, 3)).view(n, groups, -1).float()

        def group_mean(v: Tensor) -> Tensor:                     # of the gradient of the normalized x: [N, groups, 1]
            weighted = weight.view(-1, groups, per_group) * v
            return weighted.sum(2, keepdim=True) / (per_group * h * w)

        def per_channel(v: Tensor) -> Tensor:                    # [N, groups, 1] -> [N, C, 1, 1]
            return v.to(x.dtype).expand(n, groups, per_group).reshape(n, c, 1, 1)

        db = channel_sum(g)
        dw = (channel_sum(g * x) - mean * db) * rstd

        # dx = a g + p x + q
        p = -group_mean(dw) * rstd**2
        q = -group_mean(db) * rstd - p * mean
        dx = torch.addcmul(per_channel(q), x, per_channel(p)).addcmul_(g, a)

        dw, db = dw.view(n, c), db.view(n, c)
        if len(weight) != n:                                     # one weight for all images
            dw, db = dw.sum(0, keepdim=True), db.sum(0, keepdim=True)
        return dx, dw, db, None, None, None


class FastNorm(Twin):
    """Norm by FusedGroupNormSiLU, on maps of more than 16 pixels."""

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if not is_ours(x) or x.shape[2] * x.shape[3] <= 16:
            return super().forward(x, scale, shift)
        weight = self.weight[None]
        bias = self.bias[None]
        if scale is not None:
            weight = weight * (1 + scale.float())
            bias = bias * (1 + scale.float()) + shift.float()
        return FusedGroupNormSiLU.apply(x, weight, bias, self.num_groups, self.eps, self.silu)


# ---- Convolution of small maps -----------------------------------------------------------------


class Conv3x3SmallSpatial(torch.autograd.Function):
    """3x3 convolution with padding 1, the gradient of its weight by one matrix product.

    For maps of a few pixels, where torch's own gradient takes up to four times as long.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        n, cin, h, w = x.shape
        cout = len(weight)
        dx, _, _ = torch.ops.aten.convolution_backward(
            g, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False])

        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))                # [N, H + 2, W + 2, cin]
        image, row, column, _ = padded.stride()
        windows = padded.as_strided((n, h, w, 3, 3, cin), (image, row, column, row, column, 1))
        g_rows = g.permute(1, 0, 2, 3).reshape(cout, -1)         # [cout, N H W]
        dw = g_rows @ windows.reshape(n * h * w, -1)             # [cout, 9 cin]
        return dx, dw.view(cout, 3, 3, cin).permute(0, 3, 1, 2), g.sum((0, 2, 3))


class FastConv3x3(Twin):
    """Conv3x3 by Conv3x3SmallSpatial, on maps of at most 64 pixels and 128 channels or more."""

    def forward(self, x: Tensor) -> Tensor:
        small = x.shape[2] * x.shape[3] <= 64 and x.shape[1] >= 128
        plain = self.stride == (1, 1) and self.padding == (1, 1)
        if not (is_ours(x) and small and plain) or self.bias is None:
            return super().forward(x)
        return Conv3x3SmallSpatial.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


# ---- Dropout, concatenation, attention ---------------------------------------------------------


class FastDropout(Twin):
    """Dropout with random bits from numpy: torch's take ten times as long. p is rounded to a multiple of 2^-16."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_ours(x) or not self.training or self.p < 2**-16:
            return super().forward(x)
        seed = int(torch.randint(2**62, ()))
        words = math.ceil(x.numel() / 4)                         # of 64 bits: four numbers of 16
        bits = np.random.SFC64(seed).random_raw(words).view(np.int16)

        # Numbers below the limit drop: 0 for these, 1 for the others, then the scale that keeps the mean.
        limit = round(self.p * 2**16) - 2**15
        kept = torch.from_numpy(bits[: x.numel()]).clamp_(limit - 1, limit).sub_(limit - 1)
        kept = kept.to(x.dtype).mul_(2**16 / (2**15 - limit))
        return x * kept.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


class Concatenation(torch.autograd.Function):
    """torch.cat along the channels, the parts of the gradient laid out in memory like images.

    As views of the whole they would slow every convolution behind them.
    """

    @staticmethod
    def forward(ctx, a, b):
        ctx.widths = a.shape[1], b.shape[1]
        return torch.cat([a, b], dim=1)

    @staticmethod
    def backward(ctx, g):
        channels_last = g.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return tuple(part.contiguous(memory_format=memory_format) for part in g.split(ctx.widths, dim=1))


class FastConcat(Twin):
    """Concat by Concatenation."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return Concatenation.apply(a, b) if is_ours(a) else super().forward(a, b)


class FastDotProduct(Twin):
    """DotProduct written out, in training and for up to 256 tokens: torch's own backward takes three times as long.

    More tokens than that would take much memory.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not is_ours(q) or not q.requires_grad or q.shape[2] > 256:
            return super().forward(q, k, v)
        weights = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        return weights.softmax(3) @ v


# ---- Installing --------------------------------------------------------------------------------

SWAPS = {"Norm": FastNorm, "Conv3x3": FastConv3x3, "Dropout": FastDropout, "Concat": FastConcat,
         "DotProduct": FastDotProduct}


@cache
def twin_of(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of modules of that class with the twin's forward."""
    return type(f"{plain.__name__}Twin", (SWAPS[plain.__name__], plain), {"plain": plain})


def install(network: nn.Module) -> None:
    """Give each module of the network that has a faster twin the twin's forward, in place."""
    for module in network.modules():
        if type(module).__name__ in SWAPS:
            module.__class__ = twin_of(type(module))


def rebuild(plain: type[nn.Module]) -> nn.Module:
    """An empty module with a twin's forward, for unpickling."""
    twin = twin_of(plain)
    return twin.__new__(twin)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed.

    Each step asks for the same memory again, and what is new to the process is mapped in page by page, which took a
    third of a step.
    """
    if sys.platform != "linux":
        return
    options = {-4: 0, -1: -1, -2: 2**26}                         # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    with suppress(AttributeError, OSError):                      # another C library
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)
