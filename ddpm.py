"""Denoising diffusion, from the idea to the code. Read it from top to bottom.

THE IDEA. Take a picture and add a little Gaussian noise. Repeat this a thousand times, until
nothing of the picture is left. This direction is easy. Now train a network for the way back: given
a noisy picture, it guesses the noise in it. Remove a small part of that noise and guess again.
After a thousand such steps, pure noise has become a new picture.

    x_0  ->  x_1  ->  x_2  ->  ...  ->  x_T      forward process q: fixed, adds noise
    x_0  <-  x_1  <-  x_2  <-  ...  <-  x_T      reverse process p: learned, removes noise

The pictures here have 32x32 pixels and show circles, rectangles, triangles and lines. Every
pixel is -1 (background) or +1 (shape). This range puts the data on the scale of the noise, which
has mean 0 and variance 1: with pixels in 0...255, noise of variance 1 could not be seen.

The paper is Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv
2006.11239). "Eq. 4", "Algorithm 2" and "Ho, Section 4" refer to it, and the letters are the
paper's. A tensor line that changes a shape ends with the new shape: B pictures in a batch, C
channels, H x W pixels.

    python ddpm.py        prints the network as a table and saves forward.png
"""

import copy
import io
import math
import os
import sys
import zipfile
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ==== 1. The schedule: how much noise at which step ===============================================
#
# Step t mixes the picture with fresh noise of variance beta_t (Eq. 2; N(x; mean, variance) is a
# Gaussian, and I, the identity matrix, means that every pixel gets its own noise):
#
#     q(x_t | x_{t-1}) = N(x_t; sqrt(1 - beta_t) x_{t-1}, beta_t I)
#
# The factor sqrt(1 - beta_t) shrinks the picture just enough for a mean square of 1 to stay 1.
# Without it the numbers would grow with every step. The betas are chosen by hand (Ho, Section 4):
# small at first, when little noise is enough to hide details, and larger later.
#
# Why a thousand small steps and not ten large ones? Many x_{t-1} could have led to x_t. If the step
# is small, they all lie near x_t. Over this short range log q(x_{t-1}), the log-density before x_t
# is known, is almost linear (at small t, a parabola). Bayes' rule, in logarithms, adds the parabola
# of Eq. 2. The sum is a parabola again, which means a Gaussian. That is easy to model: the network
# has to learn only its mean. (Section 10 shows how to use fewer.)

T = 1000


class Schedule:
    """beta; alpha = 1 - beta; alpha_bar, the product of all alphas up to t; one_minus_alpha_bar.

    All four are float32 (T + 1,), indexed by the paper's t (Ho, Section 2): beta[1] belongs to the
    first step, beta[T] to the last, alpha_bar[0] = 1 to the clean picture.
    """

    def __init__(self, device="cpu"):
        # Computed in float64, because alpha_bar is a product of a thousand numbers close to 1.
        # Kept in float32, because Apple's GPUs have no float64.
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)  # (T,), Ho, Section 4
        beta = F.pad(beta, (1, 0))  # (T + 1,), with beta[0] = 0
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)
        self.beta = beta.float().to(device)
        self.alpha = alpha.float().to(device)
        self.alpha_bar = alpha_bar.float().to(device)
        # 1 - alpha_bar[1] is 1e-4. Subtracted in float32, it would have only 3 correct digits.
        self.one_minus_alpha_bar = (1 - alpha_bar).float().to(device)

    def signal_and_noise(self, t):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), the factors of picture and noise.

        t: int64 (B,), each in 0..T. Returns two float32 (B, 1, 1, 1).
        """
        signal, noise = self.alpha_bar[t].sqrt(), self.one_minus_alpha_bar[t].sqrt()
        return signal.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)  # (B, 1, 1, 1)

    def snr(self):
        """The signal-to-noise ratio alpha_bar / (1 - alpha_bar) for t = 1..T: float32 (T,).

        It falls at every step: 9999 at t = 1, about 1 at t = 260, 0.00004 at T.
        """
        return self.alpha_bar[1:] / self.one_minus_alpha_bar[1:]  # (T,)


# ==== 2. The forward process: from a picture to noise in one step =================================
#
# We do not have to go through all steps to get x_t. A sum of independent Gaussians is again a
# Gaussian, so two steps can be written as one (z, z' and eps are standard normal noise):
#
#     x_1 = sqrt(alpha_1) x_0 + sqrt(1 - alpha_1) z
#     x_2 = sqrt(alpha_2) x_1 + sqrt(1 - alpha_2) z'
#         = sqrt(alpha_2 alpha_1) x_0 + sqrt(alpha_2 (1 - alpha_1)) z + sqrt(1 - alpha_2) z'
#         = sqrt(alpha_2 alpha_1) x_0 + sqrt(1 - alpha_2 alpha_1) eps
#
# because the variances add up: alpha_2 (1 - alpha_1) + (1 - alpha_2) = 1 - alpha_2 alpha_1. After t
# steps, the product of alpha_1 to alpha_t, called alpha_bar_t, takes the place of alpha_2 alpha_1
# (Eq. 4):
#
#     x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps


def q_sample(schedule, x_0, t, eps):
    """Draws x_t from q(x_t | x_0), Eq. 4.

    x_0: float (B, 1, H, W) in [-1, 1]. t: int64 (B,), in 0..T. eps: standard normal float
    (B, 1, H, W). Returns x_t: float (B, 1, H, W).
    """
    signal, noise = schedule.signal_and_noise(t)
    return signal * x_0 + noise * eps


# alpha_bar_T must be close to 0; here sqrt(alpha_bar_T) = 0.0064. If a trace of the picture were
# left at t = T, the network would learn to use it, and would miss it in sampling, which starts from
# pure noise.
#
# Once x_t is given, Eq. 4 has two unknowns, x_0 and eps, and each determines the other:


def predict_x_0(schedule, x_t, t, eps):
    """Eq. 4 solved for x_0: the picture in x_t if eps is the noise. As q_sample, but t in 1..T."""
    signal, noise = schedule.signal_and_noise(t)
    return (x_t - noise * eps) / signal


# So a network that guesses eps also guesses x_0. Why not go straight from noise to this guess? At
# large t very many pictures fit the same x_t. Training (section 9) looks for the guess c of least
# squared error. That is their mean: on average (c - x_0)^2 is (c - mean)^2 plus the variance of
# x_0. But the mean of many pictures is a grey blur. A small step follows this guess only a little.
# Then there is less noise, fewer pictures fit, and the next guess is sharper.

# ==== 3. Telling the network the time =============================================================
#
# One network serves all t, so it must know t: a pattern of bright specks is noise at t = 900 and
# part of the picture at t = 5. A single input number t would be hard to use: a layer only scales
# and shifts it, and then t and t + 1 differ by a thousandth of the whole range. Instead t is
# encoded by sines and cosines of many frequencies (Vaswani et al. 2017, "Attention is all you
# need", Section 3.5). High frequencies tell t from t + 1, low frequencies tell early from late. The
# frequencies form a geometric series, each a fixed factor below the one before. So differences of 1
# to 10 steps, of 10 to 100 and of 100 to 1000 are covered by equally many of them.


def time_embedding(t, dim):
    """Sines and cosines of t. t: int64 (B,); dim: even. Returns float32 (B, dim) in [-1, 1]."""
    # From 1 radian per step down to almost 1/10000, as in that paper.
    share = torch.arange(dim // 2, device=t.device) / (dim // 2)  # (dim / 2,), from 0 to almost 1
    frequency = torch.exp(-math.log(10_000) * share)
    angle = t[:, None].float() * frequency  # (B, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)  # (B, dim)


# ==== 4. Three small parts ========================================================================


class Norm(nn.GroupNorm):
    """Normalises 8 channels at a time to mean 0 and variance 1, then scales and shifts (learned).

    The statistics are taken over one picture, not over the batch as in BatchNorm: a training
    batch mixes all t, but in sampling all pictures have the same t, so that their statistics differ
    from those of a training batch. (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels):
        super().__init__(channels // 8, channels)

    def forward(self, x):
        # The network may compute in 16-bit numbers (section 8). Sums over many pixels need 32 bits,
        # and on a CPU this norm is also faster in 32 bits.
        return super().forward(x.float()).to(x.dtype)


class Conv1x1(nn.Linear):
    """A 1x1 convolution, as one matrix product: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def forward(self, x):
        x = super().forward(x.permute(0, 2, 3, 1))  # (B, H, W, C_out)
        return x.permute(0, 3, 1, 2)  # (B, C_out, H, W)


def zero(layer):
    """Zero-initialises a layer. Used for the last layer of the network and, in each residual block
    x + f(x) (sections 5 and 6), for the last layer of f.

    Each block then begins as if f were absent, so the deep network begins like a shallow one, which
    is easier to train. In the first step only the last layer of the network gets a gradient. In the
    second the time layers and the earlier layers of each f still get none. Then all do.
    """
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ==== 5. Attention: every pixel can use every other ===============================================
#
# A 3x3 convolution sees only neighbours. But whether a pixel belongs to a triangle depends on
# pixels far away. Attention reaches them in one layer. Every pixel (or block of pixels, see below)
# has a query, a key and a value, vectors of d numbers. Each pixel receives an average of all
# values, with weights that say how well its query matches their keys:
#
#     softmax(q k^T / sqrt(d)) v                              (Vaswani et al. 2017, Eq. 1)
#
# q k^T is the attention score of a query and a key, a sum of d products; such a sum typically grows
# like sqrt(d). With large scores, the softmax would put all weight on one key and its gradient
# would be almost 0; the division prevents this. Where a level has many channels, several "heads" do
# this side by side with vectors of their own, so that a pixel can collect different things at once.
#
# The cost is the number of queries times the number of keys: 256 scores at 4x4, but a million at
# 32x32. So attention works on at most 8x8 places: each block of pixels is averaged into one place,
# and all its pixels get the same result. That makes at most M = 64 places and 4096 scores. The
# convolutions that follow work out details. Attention itself does not know where a place is. It
# learns that from the convolutions before it, which see the zero padding at the edge.

ATTENTION_SIDE = 8


class Attention(nn.Module):
    """Multi-head self-attention, a residual block: (B, C, H, W) -> (B, C, H, W).

    width: size of queries, keys and values, all heads together.
    """

    def __init__(self, channels, width):
        super().__init__()
        self.heads = max(1, width // 32)  # so d = 32, or 16 at 32x32, where width is 16
        self.norm = Norm(channels)
        self.qkv = nn.Linear(channels, 3 * width)
        self.softmax = nn.Softmax(dim=3)  # a module, so that sample.py --inside can watch it
        self.out = zero(nn.Linear(width, channels))

    def forward(self, x):
        block = max(1, x.shape[2] // ATTENTION_SIDE)
        y = self.norm(F.avg_pool2d(x, block))  # (B, C, h, w), h = H / block
        h, w = y.shape[2:]
        y = self.qkv(y.flatten(2).transpose(1, 2))  # (B, M, 3 width), M = h w
        y = y.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, M, d)
        q, k, v = y  # each (B, heads, M, d)
        weights = self.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]))  # (B, heads, M, M)
        y = (weights @ v).transpose(1, 2).flatten(2)  # (B, M, width)
        y = self.out(y).transpose(1, 2).unflatten(2, (h, w))  # (B, C, h, w)
        return x + F.interpolate(y, scale_factor=float(block))  # (B, C, H, W)


# ==== 6. The residual block =======================================================================
#
# Most of the work is done here: norm, SiLU (x * sigmoid(x)), 3x3 convolution, twice, and the result
# is added to the input (which first goes through a 1x1 convolution if the number of channels
# changes). The block only has to learn what to change, and gradients reach the first layers through
# the sums, however deep the network is. Between the two convolutions the time comes in: one number
# per channel, added at every pixel. Every block gets it, so that every block can act differently at
# each t.


class ResBlock(nn.Module):
    """(B, c_in, H, W) and a time vector (B, time_dim) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, time_dim, c_mid=None):
        super().__init__()
        c_mid = c_mid or c_out
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, padding=1)
        self.time = nn.Linear(time_dim, c_mid)
        self.norm2 = Norm(c_mid)
        self.conv2 = zero(nn.Conv2d(c_mid, c_out, 3, padding=1))
        self.skip = Conv1x1(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_mid, H, W)
        h = h + self.time(time)[:, :, None, None]  # time: (B, c_mid, 1, 1)
        h = self.conv2(F.silu(self.norm2(h)))  # (B, c_out, H, W)
        return self.skip(x) + h  # (B, c_out, H, W)


# ==== 7. The U-Net ================================================================================
#
# Down: 32 -> 16 -> 8 -> 4 pixels wide, with more and more channels. At the bottom, 16 places with
# 512 numbers each describe what is in the picture. A 3x3 convolution there spans three of the four
# places across, so a few layers suffice to see the whole picture. Up again: 4 -> 8 -> 16 -> 32. On
# the way up each level also receives the output of the same level on the way down, the skip
# connection. The bottom knows that there is a circle, the skip knows exactly where its edge is. The
# two are added. (Ho concatenates them, which takes more weights.)
#
#     32x32  stem -- down ------------------------------- up -- out
#     16x16            down ----------------------- up
#      8x8               down --------------- up (three blocks)
#      4x4                  middle (512)
#
# There is attention at every level (on 8x8 places at most): in the middle, and on the way up, where
# a level has both its own detail and the view from below. (Without attention the samples were as
# good after 20 epochs: pictures of 32x32 are small enough for the convolutions at 4x4 to see all of
# one.)
#
# Sizes and positions of all shapes are multiples of 4 pixels, and one place at 8x8 is 4x4 pixels.
# So at 8x8 there are three blocks on the way up. `python ddpm.py` prints the parameters and the
# multiplications of each part: this level (down.2 and up.0) has 50 % of the parameters and 66 % of
# the multiplications. The middle has 46 % and 16 %: almost every weight is used at only 16 places.
# At 32x32 most weights are used at 1024 places, and 0.6 % of the parameters account for 9 % of the
# multiplications. The tensors are largest there, too, and reading and writing them takes time. So
# this level has only 16 channels.


class Middle(nn.Module):
    """The bottom: (B, c_in, 4, 4) -> (B, bottleneck, 4, 4).

    A 3x3 convolution from 512 to 512 channels has 2.4 million weights, and a block has two. So the
    blocks here have few channels inside: block2, 512 -> 64 -> 512, has 0.6 million in both.
    """

    def __init__(self, c_in, bottleneck, narrow, time_dim):
        super().__init__()
        self.block1 = ResBlock(c_in, bottleneck, time_dim, c_mid=narrow)
        self.attention = Attention(bottleneck, narrow)
        self.block2 = ResBlock(bottleneck, bottleneck, time_dim, c_mid=narrow)

    def forward(self, x, time):
        x = self.attention(self.block1(x, time))  # (B, bottleneck, 4, 4)
        return self.block2(x, time)


class Up(nn.Module):
    """One level on the way up: (B, c_below, H, W) and a skip (B, c, 2H, 2W) -> (B, c, 2H, 2W)."""

    def __init__(self, c_below, c, time_dim, blocks):
        super().__init__()
        self.below = Conv1x1(c_below, c)
        self.attention = Attention(c, c)
        self.blocks = nn.ModuleList([ResBlock(c, c, time_dim) for _ in range(blocks)])

    def forward(self, x, skip, time):
        x = F.interpolate(self.below(x), scale_factor=2.0)  # (B, c, 2H, 2W), each pixel becomes 2x2
        x = self.attention(x + skip)
        for block in self.blocks:
            x = block(x, time)
        return x


class UNet(nn.Module):
    """The network. Section 8 says what it returns.

    channels: at 32x32, 16x16 and 8x8. bottleneck: at 4x4. narrow: inside the parts of Middle.
    time_dim: size of the time vector, even. All numbers of channels are multiples of 8 and, above
    32, of 32.
    """

    def __init__(self, channels=(16, 32, 128), bottleneck=512, narrow=64, time_dim=128):
        super().__init__()
        self.config = {"channels": tuple(channels), "bottleneck": bottleneck}
        self.config |= {"narrow": narrow, "time_dim": time_dim}
        c1, c2, c3 = channels
        d = time_dim
        # Two layers turn the sines and cosines into what the blocks use.
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.stem = nn.Conv2d(1, c1, 3, padding=1)
        pairs = [(c1, c1), (c1, c2), (c2, c3)]
        self.down = nn.ModuleList([ResBlock(a, b, time_dim) for a, b in pairs])
        self.middle = Middle(c3, bottleneck, narrow, time_dim)
        levels = [(bottleneck, c3, 3), (c3, c2, 1), (c2, c1, 1)]  # three blocks at 8x8
        self.up = nn.ModuleList([Up(a, b, time_dim, blocks) for a, b, blocks in levels])
        self.norm = Norm(c1)
        self.out = zero(nn.Conv2d(c1, 1, 3, padding=1))
        # Channels last: all channels of a pixel lie side by side in memory, which makes the
        # convolutions faster. Shapes are still written (B, C, H, W).
        self.to(memory_format=torch.channels_last)

    def forward(self, x_t, t):
        """x_t: float (B, 1, 32, 32). t: int64 (B,) in 1..T. Returns (B, 1, 32, 32)."""
        time = self.time(time_embedding(t, self.config["time_dim"]))  # (B, time_dim)
        x = self.stem(x_t)  # (B, c1, 32, 32)
        skips = []
        for block in self.down:
            x = block(x, time)  # (B, c, H, W)
            skips.append(x)
            x = F.avg_pool2d(x, 2)  # (B, c, H/2, W/2)
        x = self.middle(x, time)  # (B, bottleneck, 4, 4)
        for level in self.up:
            x = level(x, skips.pop(), time)  # (B, c, 2H, 2W)
        return self.out(F.silu(self.norm(x)))  # (B, 1, 32, 32)


# ==== 8. The guess ================================================================================
#
# The network returns its guess of eps, called eps_theta(x_t, t); theta stands for its weights.
# Before any training the guess is 0 (the last layer is zero-initialised), and its mean squared
# error is the variance of eps, 1.
#
# It could just as well guess x_0, since each gives the other (Eq. 4). What differs is how errors
# count: the squared error in eps is that in x_0 times alpha_bar / (1 - alpha_bar), the
# signal-to-noise ratio. So an error in x_0 counts much where the picture can be seen, and little
# where it can only be a grey blur.
#
# Conversely, predict_x_0 magnifies an error in eps, 157 times at t = T. But a small step back takes
# little of this x_0: at t = T Eq. 7 (section 9) multiplies it by 0.0001. At t = 1 an error in eps
# is a hundred times smaller in x_0, and the last step returns this x_0. At small t all pictures
# that fit x_t agree on almost every pixel, so x_0, their mean, is near -1 or +1. So Algorithm 2
# (section 10) needs no clipping: of the pixels of 16 samples 99.99 % were within 0.05 of -1 or +1.


@cache
def fast_bfloat16(device):
    """Whether "cpu", "cuda" or "mps" computes quickly in bfloat16: 16 bits per number, with the
    range of float32 and 2 to 3 digits. mps has not been tried, so it counts as False."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def predict_eps(model, x_t, t):
    """eps_theta(x_t, t), the network's guess of eps: float32 (B, 1, 32, 32).

    x_t: float (B, 1, 32, 32). t: int64 (B,), in 1..T.
    """
    device = x_t.device.type
    # autocast computes products and convolutions in bfloat16, which is faster. The weights, and
    # everything outside the network, stay float32.
    with torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
        return model(x_t, t).float()


# ==== 9. The step back, the loss and Algorithm 1 ==================================================
#
# If x_0 were known, we would know two things about x_{t-1}. By Eq. 4, x_{t-1} is Gaussian around
# sqrt(alpha_bar_{t-1}) x_0 with variance 1 - alpha_bar_{t-1}. And x_t came from it: Eq. 2, read as
# a function of x_{t-1}, is a Gaussian around x_t / sqrt(alpha_t) with variance beta_t / alpha_t.
# Bayes' rule multiplies the two. The product of two Gaussians is again one: their precisions
# (1 / variance) add up, here to (1 - alpha_bar_t) / (beta_t (1 - alpha_bar_{t-1})), and its centre
# is the average of theirs, weighted by precision. So q(x_{t-1} | x_t, x_0) has this mean and
# variance (Eq. 7):
#
#     mu = [ sqrt(alpha_bar_{t-1}) beta_t x_0
#          + sqrt(alpha_t) (1 - alpha_bar_{t-1}) x_t ] / (1 - alpha_bar_t)
#     beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
#
# In sampling we do not know x_0, but we have a guess of it, the mean of all x_0 that fit x_t. That
# is enough: mu is linear in x_0, so the mean x_0 gives the mean x_{t-1}. To get mu from eps, put
# x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t) into Eq. 7. The factor of eps becomes
#
#     - sqrt(alpha_bar_{t-1} / alpha_bar_t) beta_t / sqrt(1 - alpha_bar_t)
#         = - (1 / sqrt(alpha_t)) beta_t / sqrt(1 - alpha_bar_t)
#
# and the factor of x_t, over the common denominator sqrt(alpha_t) (1 - alpha_bar_t), has the
# numerator beta_t + alpha_t (1 - alpha_bar_{t-1}) = 1 - alpha_bar_t, so 1 / sqrt(alpha_t) remains.
# Together:
#
#     mu = (x_t - (beta_t / sqrt(1 - alpha_bar_t)) eps) / sqrt(alpha_t)               (Eq. 11)
#
# Which loss? A reverse step is p(x_{t-1} | x_t) = N(mu_theta(x_t, t), sigma_t^2 I) (Eq. 1; Ho,
# Section 3.2, fixes the variance; section 10 chooses it). We would like to make p(x_0) large for
# the pictures that we have (maximum likelihood). But p(x_0) is an integral over all paths x_1, ...,
# x_T that end in x_0, and cannot be computed. What can be computed is an upper bound of -log
# p(x_0). For p(x_0) is the mean of p(x_0, ..., x_T) / q(x_1, ..., x_T | x_0) over the paths that q
# draws, and -log of a mean is at most the mean of -log (Jensen's inequality). By Bayes' rule q can
# be written backwards, from x_T on, and so the bound falls into steps (Eq. 3, Eq. 5): one KL
# divergence for each t above 1, another term for t = 1, and a term without the network. A KL
# divergence measures how far one distribution, q, is from another, p: it is the mean of log q - log
# p over q. Here p is the reverse step, and q is q(x_{t-1} | x_t, x_0), the step back if x_0 is
# known, as it is in training. Both are Gaussian, and their variances are not learned. With x for
# x_{t-1}, log p is a constant minus (x - mu_theta)^2 / (2 sigma_t^2). The mean of (x - mu_theta)^2
# over q is (mu - mu_theta)^2 plus the variance of q, on which the network has no influence. So what
# counts is the squared difference of the two means, divided by 2 sigma_t^2 (Eq. 8).
#
# Both means follow from x_t and eps in the same way (Eq. 11), one with the true eps and one with
# the guess eps_theta. So the term for t becomes (Eq. 12)
#
#   beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)) * || eps - eps_theta(x_t, t) ||^2
#
# averaged over x_0 and eps. The paper drops the factor in front and keeps the square, for all t
# (Eq. 14). At each t the best guess is the same, whatever the factor. The factors only say where to
# try hardest. With sigma_t^2 = beta_t, the first of the paper's two choices (section 10), the
# factor falls from 0.27 at t = 2 to 0.005 at t = 349 and rises again to 0.01 at t = T. At t = 2 the
# noise is 1.5 % of the picture and hard for a network to measure exactly: after training the error
# is 0.042 there, and 0.007 at t = 500. With the factor, t = 2 counts 300 times as much as t = 500;
# without it, 6 times. Errors at such small t cannot be seen. Eq. 14 leaves more of the effort for
# larger t, where pictures take shape (Ho, Section 3.4).


def loss_fn(model, schedule, x_0, t, eps):
    """Eq. 14, the simple loss, for given t, as a mean over pictures and pixels: a 0-d tensor.

    x_0: float (B, 1, 32, 32) in [-1, 1]. t: int64 (B,), in 1..T. eps: standard normal,
    (B, 1, 32, 32).
    """
    x_t = q_sample(schedule, x_0, t, eps)
    return F.mse_loss(predict_eps(model, x_t, t), eps)


# Algorithm 1 repeats: take pictures x_0, draw t and eps, take a gradient step on Eq. 14. (The loop
# is in train.py.) Which t are hard? The table shows the loss, times 10,000, after 10 and after all
# 100 epochs (passes over the data) of `python train.py` (sample.py --score prints one):
#
#     t               2     20    100    300    400    500    600    700    800   1000
#     epoch 10     1731    277     66     14     24     87     87     35     10    2.5
#     epoch 100     420     32    8.9    2.2     11     70     82     34    8.6    0.6
#
# At small t x_0 can be seen, so the error could be almost 0; training brings it closer. At large t
# x_0 cannot be known, but hardly counts (section 8). In between x_0 counts, and is just becoming
# clear. Most of the error there is doubt that no network can remove. So the mean over all t goes
# flat well above 0, and late in training it falls mostly at small t, where nobody sees it.
# Meanwhile the samples improve: from the first row to the second, the share of right ones (pixel
# for pixel, see shapes.py), drawn in 50 steps, rose from 85 to 96 %. Most likely this comes from
# t = 300 to 500, where the fall adds little to the mean, but a wrong guess leads to a wrong
# picture.
#
# The paper draws t uniformly from 1..T. We draw four out of five t from 350..750, where the picture
# is decided, and the rest uniformly, so that no t is forgotten. A t in 350..750 then counts 11
# times as much in the training loss as any other t. In the end 97.3 % of 3000 samples in 50 steps
# were right, and with t uniform in training 94.9 %. The validation loss, the loss on pictures that
# are not trained on, keeps t uniform, as in Eq. 14; the two losses cannot be compared.

FOCUS, FOCUS_SHARE = (350, 750), 0.8


def draw_t(n, generator, device="cpu"):
    """Draws n values of t for training: int64 (n,), in 1..T."""
    t = torch.randint(1, T + 1, (n,), generator=generator, device=device)  # (n,), Algorithm 1
    focused = torch.randint(FOCUS[0], FOCUS[1] + 1, (n,), generator=generator, device=device)
    coin = torch.rand(n, generator=generator, device=device)
    return torch.where(coin < FOCUS_SHARE, focused, t)


def training_loss(model, schedule, x_0, generator):
    """Lines 3 to 5 of Algorithm 1, with t from draw_t: draws t and eps, returns the loss.

    x_0: float (B, 1, 32, 32) in [-1, 1]. generator: draws both, on the device of x_0.
    """
    t = draw_t(len(x_0), generator, x_0.device)  # (B,)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    return loss_fn(model, schedule, x_0, t, eps)


class EMA:
    """Exponential moving average (EMA) of the weights, used for samples (Ho, Appendix B).

    Each step follows the gradient of one small batch, which is noisy; the average over many steps
    is less so. A decay of 0.9995 averages over about the last 1 / (1 - decay) = 2000 steps. Early
    in training such an average would still contain the random initial weights. So at first a
    smaller decay averages over only about the last ninth of the steps so far.
    """

    def __init__(self, model, decay=0.9995):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model, step):
        """Call after each optimizer step; step counts from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = list(self.model.parameters()), list(model.parameters())
        # average = average + (1 - decay) (weight - average), for all of them at once
        torch._foreach_lerp_(averages, weights, 1 - decay)


# ==== 10. The reverse process: from noise to a picture ============================================
#
# Sampling follows p(x_{t-1} | x_t) = N(mu, sigma_t^2 I) from t = T down to 1, with mu of Eq. 11.
# Each step takes the mean and adds noise, because the mean of all x_{t-1} that fit x_t has less
# noise than the network expects at t - 1.


def ddpm_step(schedule, x_t, t, eps, z):
    """Line 4 of Algorithm 2: x_{t-1} = mu(x_t, eps) + sigma_t z, with mu of Eq. 11.

    x_t, eps, z: float (B, 1, H, W); t: int in 1..T. Returns x_{t-1}: (B, 1, H, W).
    """
    beta, alpha = schedule.beta[t], schedule.alpha[t]
    var_t, var_before = schedule.one_minus_alpha_bar[t], schedule.one_minus_alpha_bar[t - 1]
    mu = (x_t - beta / var_t.sqrt() * eps) / alpha.sqrt()
    # The paper tries sigma_t^2 = beta_t, which is best if the data is standard normal, and
    # sigma_t^2 = beta_tilde_t (Eq. 7), best if the data is a single picture (Ho, Section 3.2). The
    # best choice lies between. Only at small t do they differ much: beta_tilde_t / beta_t is 0.98
    # at t = 100 and 0.85 at t = 10. We take the second. It is 0 at t = 1, so the last step adds no
    # noise, as Algorithm 2 demands (it sets z = 0 there): no step would come after it to remove
    # that noise.
    beta_tilde = var_before / var_t * beta
    return mu + beta_tilde.sqrt() * z


# There is another view of this step. The gradient of log q(x_t) with respect to x_t is called the
# score; it points to where pictures are more likely. For one known x_0 it is, by Eq. 4,
# -eps / sqrt(1 - alpha_bar_t). q(x_t) is the mean of q(x_t | x_0) over all pictures, so its score
# is the mean of this over all x_0 that fit x_t; and a network trained with squared error learns the
# mean of eps. So -eps_theta / sqrt(1 - alpha_bar_t) is the score, and Algorithm 2 resembles
# Langevin dynamics: a step uphill, a little fresh noise, and again (Ho, Section 3.2; Song & Ermon
# 2019).
#
# A thousand steps take time. Algorithm 2 needs them, since each is to be Gaussian (section 1).
# Song, Meng & Ermon, "Denoising Diffusion Implicit Models" (2021, arXiv 2010.02502), noticed that
# Eq. 14 uses only Eq. 4, q(x_t | x_0), and never the path from x_0 to x_t. So the same trained
# network can jump from t to any smaller s: guess x_0 and eps, and mix them again as Eq. 4 does at
# s. Of the noise variance at s, 1 - alpha_bar_s, a part sigma^2 may be fresh. Their Eq. 12 and Eq.
# 16 (they write alpha for Ho's alpha_bar) are
#
#     x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z
#     sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)
#
# with eta from 0 to 1. At eta = 0 nothing is random after x_T: all the noise that x_s needs is the
# guessed one. At eta = 1 sigma^2 is Eq. 7's variance, for a single step from t to s, whose beta is
# 1 - alpha_bar_t / alpha_bar_s. So with s = t - 1 this is ddpm_step again.


def ddim_step(schedule, x_t, t, s, x_0, z, eta):
    """Eq. 12 of DDIM: from x_t to x_s, 0 <= s < t <= T, with the eps that fits x_t and x_0 (Eq. 4).

    x_t, x_0 (the guess), z (fresh noise): float (B, 1, H, W). t, s: int. eta: 0 to 1. Returns x_s:
    (B, 1, H, W).
    """
    var_t, var_s = schedule.one_minus_alpha_bar[t], schedule.one_minus_alpha_bar[s]
    ratio = schedule.alpha_bar[t] / schedule.alpha_bar[s]
    variance = eta**2 * var_s / var_t * (1 - ratio)  # sigma^2
    rest = (var_s - variance).clamp(min=0)  # rounding may give less than 0
    eps = (x_t - schedule.alpha_bar[t].sqrt() * x_0) / var_t.sqrt()
    return schedule.alpha_bar[s].sqrt() * x_0 + rest.sqrt() * eps + variance.sqrt() * z


def timesteps(steps):
    """The t to visit: `steps` integers from T down to 1, evenly spaced up to rounding; then 0.

    With steps = T these are all t, with one step only T. Raises ValueError unless steps is in 1..T.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be between 1 and {T}, got {steps}")
    return [round(t) for t in np.linspace(T, 1, steps)] + [0]


# The price of fewer steps: each guess is followed further before it is corrected. A guess from the
# middle of the step would be better than the one from its start, because the guess keeps moving.
# The last two guesses say roughly where it will be: half a step further in the same direction.
# (DPM-Solver++ does this too, but measures steps in log SNR and not in t: Lu et al. 2022, arXiv
# 2211.01095, their Algorithm 2.) In 20 steps, 36 % of the right samples have one shape, as in the
# data; without this, 44 %. The result is clipped to [-1, 1]: with 5 steps, 2 % of all pixels end
# more than 0.05 away from -1 and +1; unclipped, 32 %.


@torch.no_grad()
def reverse_process(model, schedule, x_T, steps=T, eta=1.0, generator=None):
    """Walks from noise to pictures and yields every stop on the way.

    x_T: standard normal float (B, 1, 32, 32). steps: 1..T. eta: 0 to 1. With steps = T and eta = 1
    this is Algorithm 2, otherwise DDIM with the guess extrapolated and clipped. generator: draws z,
    on the CPU, so that a seed means the same z on every device. Yields (t, x_t, guess of x_0 from
    x_t), t falling from T; at the end (0, x_0, x_0). Raises ValueError, on the first next(), as
    timesteps does.
    """
    x, before = x_T, None
    for t, s in pairwise(timesteps(steps)):
        now = torch.full((len(x),), t, device=x.device)  # (B,)
        eps = predict_eps(model, x, now)
        x_0 = predict_x_0(schedule, x, now, eps)
        yield t, x, x_0
        z = torch.randn(x.shape, generator=generator).to(x.device)
        if steps == T and eta == 1:
            x = ddpm_step(schedule, x, t, eps, z)
        else:
            # Half a step ahead. (With few steps, all but the one to s = 0 are about equally long.)
            middle = x_0 if before is None or s == 0 else x_0 + (x_0 - before) / 2
            x = ddim_step(schedule, x, t, s, middle.clamp(-1, 1), z, eta)
        before = x_0
    yield 0, x, x


def sample(model, schedule, x_T, steps=T, eta=1.0, generator=None):
    """The pictures at the end of reverse_process: (B, 1, 32, 32), close to -1 and +1."""
    for _, x, _ in reverse_process(model, schedule, x_T, steps, eta, generator):
        pass
    return x


# ==== 11. What to change for something else =======================================================
#
# 64x64 pictures: SIZE in shapes.py, and one more level in UNet (`channels` and what depends on it,
#   the names and the input in `table`, 32 in train.py, and the levels in `save_inside` of
#   sample.py). With more pixels a shape remains visible under more noise: shift FOCUS to larger t.
# Colour: 3 input channels in `stem` and `table`, 3 output channels in `out`, 3 channels in x_T
#   (train.py, sample.py), and pictures (B, 3, 32, 32), scaled to [-1, 1]. Nothing here needs pixels
#   to be -1 or +1, except shapes.py and its score. Clip the samples to [-1, 1]. `optimizers_for` in
#   train.py recognises the first and last layer by their one channel.
# Another schedule: `beta` in Schedule. For the cosine schedule of Nichol & Dhariwal 2021 (arXiv
#   2102.09672, Eq. 17) alpha_bar_t = f(t) / f(0), f(t) = cos((t / T + 0.008) / 1.008 * pi / 2)^2;
#   beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, at most 0.1. (Theirs is at most 0.999; then
#   predict_x_0 magnifies an error at t = T 20,000 times, and each step must use Eq. 7 with x_0
#   clipped.) FOCUS should then cover the same signal-to-noise ratios as before.
# "A triangle, please": class conditioning. A vector for each kind, nn.Embedding(4 + 1, time_dim),
#   is added to `time` in UNet.forward. make_dataset must draw one shape per picture and return its
#   kind, and every call on the way to the network must pass it on. Train a tenth of the
#   pictures with the fifth vector, "any kind". In sampling run the network twice and use
#   eps_any + w (eps_kind - eps_any) with w > 1, which exaggerates what the kind changes:
#   classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

# ==== 12. Weights to and from a file ==============================================================


def pick_device(name):
    """Returns name if this device is available, or the first of cuda, mps and cpu for "auto".

    Ends the program with one line if it is not.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    there = [device for device, available in found.items() if available]
    if name not in ("auto", *there):
        sys.exit(f"error: --device {name} is not available; choose from: {', '.join(there)}")
    return there[0] if name == "auto" else name


def save(path, state):
    """Writes a dictionary to a file: under another name first, so that the old file stays whole.

    Raises OSError if it cannot be written; no half file is left behind then.
    """
    buffer, half = io.BytesIO(), Path(f"{path}.tmp")
    torch.save(state, buffer)
    try:
        half.write_bytes(buffer.getbuffer())
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def load(path):
    """Reads what save wrote and runs no code in it; ends the program with one line if it cannot.

    Returns (state, model): the dictionary, and a UNet with the averaged weights, on the CPU.
    """
    try:
        if not Path(path).is_file():  # a folder, or a pipe that would never end
            raise FileNotFoundError("there is no such file")
        with zipfile.ZipFile(path) as parts:  # the format of torch.save, with checksums
            if any(part.compress_size != part.file_size for part in parts.infolist()):
                raise ValueError("it is compressed: a small file could fill the memory")
            if parts.testzip():
                raise ValueError("its checksums are wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"config", "run", "epoch", "ema"} - set(state)
        if missing := missing or {"samples", "seed"} - set(state["run"]):
            raise ValueError(f"it lacks {sorted(missing)}")
        with torch.device("meta"):  # no memory until it is known that the weights fit
            model = UNet(**state["config"])
        model.load_state_dict(state["ema"], assign=True)
        model = model.float().to(memory_format=torch.channels_last).requires_grad_(False)
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise ValueError("its weights are not all finite")
    except Exception as e:  # noqa: BLE001, a foreign file can be wrong in any way
        reason = (str(e) or type(e).__name__).splitlines()[0][:90]
        sys.exit(f"error: {path} is not a checkpoint of this program: {reason}")
    return state, model


def exit_with(e):
    """Ends the program with one line for what the user can mend; raises other errors again.

    e: an OSError, a MemoryError, or a RuntimeError, which is what PyTorch may raise in its place.
    """
    if isinstance(e, RuntimeError) and "memory" not in str(e):
        raise e
    sys.exit(f"error: {e}" if isinstance(e, OSError) else "error: not enough memory")


# ==== 13. Look at it: python ddpm.py ==============================================================


def table(model):
    """The parts of the network as text: what each returns, C x H x W, its parameters, and the
    multiplications in it for one picture."""
    from torch.utils.flop_counter import FlopCounterMode

    names = ["time", "stem", "down.0", "down.1", "down.2", "middle"]
    names += ["up.0", "up.1", "up.2", "norm", "out", ""]  # "" is the whole network
    sizes = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda part, inputs, y, name=name: sizes.update({name: y.shape[1:]})
        )
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 32, 32), torch.ones(1).long())
    counts = counter.get_flop_counts()  # a multiplication and an addition count as two
    lines = ["part        output           parameters  multiplications"]
    for name in names:
        size = " x ".join(map(str, sizes[name]))
        parameters = sum(p.numel() for p in model.get_submodule(name).parameters())
        products = sum(counts.get(f"UNet.{name}".strip("."), {}).values()) // 2
        lines += [f"{name or 'all':<12}{size:<15}{parameters:>12,}{products:>17,}"]
    return "\n".join(lines)


def save_forward_process(path):
    """Draws a picture at several t; below it the schedule and the time embedding."""
    from matplotlib.figure import Figure

    import shapes

    schedule = Schedule()
    times = torch.tensor([0, 50, 100, 200, 300, 400, 600, 800, 1000])  # (9,)
    x_0 = shapes.to_model(shapes.make_dataset(4, seed=0)[3:])  # (1, 1, 32, 32)
    x_0 = torch.from_numpy(x_0).expand(len(times), -1, -1, -1)  # (9, 1, 32, 32)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    pictures = shapes.from_model(q_sample(schedule, x_0, times, eps))  # (9, 32, 32)
    snr = [math.inf, *schedule.snr().tolist()]
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    for axes, t, picture in zip(top.subplots(1, len(times)), times.tolist(), pictures):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"t = {t}")
        axes.set_xlabel(f"$\\bar\\alpha_t$ = {schedule.alpha_bar[t]:.2g}\nSNR = {snr[t]:.2g}")
    left, right = bottom.subplots(1, 2)
    left.plot(schedule.alpha_bar, label="$\\bar\\alpha_t$")
    left.plot(range(1, T + 1), snr[1:], label="signal-to-noise ratio (SNR)")
    left.axhline(1, color="gray", linewidth=0.8)
    left.set(xlabel="t", yscale="log")
    left.legend()
    right.imshow(time_embedding(torch.arange(T + 1), 128).T, cmap="gray", aspect="auto")
    right.set(xlabel="t", title="time embedding", yticks=[32, 96], yticklabels=["sine", "cosine"])
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    print(table(UNet()))
    try:
        save_forward_process("forward.png")
    except OSError as e:
        sys.exit(f"error: {e.strerror}: {e.filename}")
    print("saved forward.png")
