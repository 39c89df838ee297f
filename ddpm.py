"""Denoising diffusion, from the idea to the code. Read it from top to bottom.

THE IDEA. Take a picture and add a little Gaussian noise, a thousand times, until almost nothing of
it is left. That direction is easy. For the way back, train a network: it sees a noisy picture and
the number of steps, and guesses all the noise in it. To draw a new picture, start from pure noise,
take away a little of the guessed noise, add some fresh noise, and guess again.

    x_0  ->  x_1  ->  x_2  ->  ...  ->  x_T      forward process q: fixed, adds noise
    x_0  <-  x_1  <-  x_2  <-  ...  <-  x_T      reverse process p: learned, removes noise

That is two algorithms, printed here as in the paper:

    Algorithm 1: training
    1  repeat
    2    x_0 ~ q(x_0)
    3    t ~ Uniform({1, ..., T})
    4    ε ~ N(0, I)
    5    take a gradient descent step on  ∇_θ ‖ε - ε_θ(√ᾱ_t x_0 + √(1 - ᾱ_t) ε, t)‖²
    6  until converged

    Algorithm 2: sampling
    1  x_T ~ N(0, I)
    2  for t = T, ..., 1 do
    3    z ~ N(0, I) if t > 1, else z = 0
    4    x_{t-1} = 1/√α_t (x_t - (1 - α_t)/√(1 - ᾱ_t) ε_θ(x_t, t)) + σ_t z
    5  end for
    6  return x_0

    letter   in code              meaning
    x_0      x_0                  a picture, drawn (~) from the distribution of the data, q(x_0)
    x_t      x_t                  the picture after t of T = 1000 noising steps
    ε        eps                  the noise in x_t before scaling: independent Gaussian numbers with
                                  mean 0 and variance 1, from N(0, I)
    ε_θ      eps_theta            the noise that the network guesses, with its weights θ
    x̂_0      x_0_hat              the picture that this guess amounts to
    β_t      beta                 the variance of the noise that step t adds
    α_t, ᾱ_t alpha, alpha_bar     1 - β_t, and the product α_1 α_2 ... α_t
    1 - ᾱ_t  one_minus_alpha_bar  the variance of all noise in x_t
    z, σ_t   z, sigma             the fresh noise of a step back, and its standard deviation

The paper is Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv
2006.11239); equations are numbered as there. Pictures are float32 (B, C, H, W) in [-1, 1]: B
pictures, C channels, H x W pixels. A line that changes a tensor's shape ends with the new shape.
`python ddpm.py` runs both algorithms on a single pixel, and saves pixel.png and forward.png.
"""

import os
from itertools import pairwise
from math import log

import torch
import torch.nn.functional as F
from torch import nn

# ######## PART I, THE METHOD: all that training and sampling need #################################
# ==== 1. Noise: from x_0 to x_t ===================================================================
# One noising step shrinks a picture a little and adds a little noise:
#
#     q(x_t | x_{t-1}) = N(x_t; √(1 - β_t) x_{t-1}, β_t I)                                   (Eq. 2)
#
# where N(x; mean, variance) is the density of a Gaussian at x. Why shrink? So that x_0 fades and
# nothing grows: our pixels are -1 or +1, and their mean square, 1, becomes (1 - β_t) + β_t = 1.
#
# To reach x_t we need not walk. A sum of independent Gaussians is a Gaussian, and their variances
# add up. So, with α_t = 1 - β_t, two steps are one:
#
#     x_2 = √α_2 x_1 + √(1 - α_2) ε_2                                       ε_1, ε_2, ε ~ N(0, I)
#         = √α_2 (√α_1 x_0 + √(1 - α_1) ε_1) + √(1 - α_2) ε_2
#         = √(α_2 α_1) x_0 + √(1 - α_2 α_1) ε            as α_2 (1 - α_1) + (1 - α_2) = 1 - α_2 α_1
#
# After t steps the product ᾱ_t = α_1 α_2 ... α_t has taken the place of α_2 α_1:
#
#     x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε                                                          (Eq. 4)
#
# where ε mixes ε_1, ..., ε_t. At t = T less than a hundredth of x_0 is left, so sampling can start
# from pure noise; at t = 500 it could not (forward.png, upper row). The β_t are chosen by hand:
# small at first, so that the last steps back are short.
BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # β_1, ..., β_T of the paper: (T,)


class Schedule:
    """Holds T and the tables beta, alpha, alpha_bar, one_minus_alpha_bar: float32 (T + 1,), indexed
    by the paper's t, with alpha_bar[0] = 1. Takes β_1, ..., β_T: float (T,), between 0 and 1.
    Computed in float64: float32 loses digits of 1 - alpha_bar near 0."""

    def __init__(self, beta=BETA, device="cpu"):
        self.T = len(beta)
        beta = F.pad(beta.double(), (1, 0))  # (T + 1,), with beta[0] = 0
        alpha_bar = (1 - beta).cumprod(0)
        self.beta = beta.float().to(device)
        self.alpha = (1 - beta).float().to(device)
        self.alpha_bar = alpha_bar.float().to(device)
        self.one_minus_alpha_bar = (1 - alpha_bar).float().to(device)

    def signal_and_noise(self, t):
        """√ᾱ_t and √(1 - ᾱ_t), the two factors of Eq. 4, (B, 1, 1, 1) each, for t: int64 (B,)."""
        signal, noise = self.alpha_bar[t].sqrt(), self.one_minus_alpha_bar[t].sqrt()  # (B,) each
        return signal.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)  # (B, 1, 1, 1) each


def q_sample(schedule, x_0, t, eps):
    """x_t by Eq. 4. x_0, eps, x_t: float32 (B, C, H, W). t: int64 (B,), each from 0 to T."""
    signal, noise = schedule.signal_and_noise(t)
    return signal * x_0 + noise * eps


# ==== 2. Training: Algorithm 1 ====================================================================
# The network sees x_t and t, and guesses ε (noise prediction). Its loss is the squared error of the
# guess (Eq. 14), averaged over all t: each picture gets one t, drawn at random. Our U-Net at first
# guesses 0, so the loss begins at 1, the variance of ε.
#
# Many pictures could be behind the same x_t, and the network cannot know which one it was. The
# guess with the least squared error, its goal, is an average: the mean of ε over all of these
# pictures, each counted by its probability. (Section 5 proves it.)
#
# BEYOND THE PAPER, our one change to the algorithms: there, all t are equally likely. Here middle t
# come more often: at small t, what a picture shows is plain to see in x_t, and at large t it is
# lost. The best guess at each t stays the same.
def draw_t(n, T, generator=None):
    """Line 3 of Algorithm 1: int64 (n,), each from 1 to T. generator: on the CPU."""
    a, b = torch.randint(1, T + 1, (2, n), generator=generator)  # (n,) each
    t = (a + b) // 2
    t[::16] = a[::16]  # or else the smallest t would hardly be trained
    return t  # in the paper: return a


def algorithm_1(model, schedule, optimizer, x_0, generator=None):
    """Lines 3 to 5 for a batch x_0: changes the weights, returns the loss, 0-d. x_0: float32
    (B, C, H, W) in [-1, 1]. model(x_t, t), with t int64 (B,), guesses eps. optimizer: of its
    weights. generator: on the CPU, so that a seed means the same on every device."""
    t = draw_t(len(x_0), schedule.T, generator).to(x_0.device)  # line 3, one for each picture: (B,)
    eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)  # line 4: (B, C, H, W)
    x_t = q_sample(schedule, x_0, t, eps)
    loss = F.mse_loss(model(x_t, t), eps)  # line 5: ‖ε - ε_θ‖², as a mean over all numbers in ε
    optimizer.zero_grad()
    loss.backward()  # line 5: ∇_θ
    optimizer.step()  # line 5: the step
    return loss.detach()


# ==== 3. Sampling: Algorithm 2 ====================================================================
# Now back, from x_t to x_{t-1}. Suppose for a moment that x_0 is known. Then we know two things
# about x_{t-1}: it was made from x_0 (Eq. 4), and x_t was made from it (Eq. 2), by a step that
# looks only at x_{t-1} and not at x_0 (the Markov property). Bayes' rule puts the two together:
#
#     q(x_{t-1} | x_t, x_0)  ∝  q(x_{t-1} | x_0)  q(x_t | x_{t-1})
#
#     factor, for t > 1    its centre, as a function of x_{t-1}   its variance
#     q(x_{t-1} | x_0)     √ᾱ_{t-1} x_0                           1 - ᾱ_{t-1}
#     q(x_t | x_{t-1})     x_t / √α_t                             β_t / α_t   (Eq. 2 over √α_t)
#
# Multiply them: exponents add up, so this is a Gaussian again. Its 1/variance is the sum of theirs,
# its centre is their average, weighted by 1/variance. With β_t + α_t (1 - ᾱ_{t-1}) = 1 - ᾱ_t this
# gives the posterior mean and variance of x_{t-1}:
#
#     μ̃_t(x_t, x_0) = √ᾱ_{t-1} β_t/(1 - ᾱ_t) x_0 + √α_t (1 - ᾱ_{t-1})/(1 - ᾱ_t) x_t          (Eq. 7)
#     β̃_t = (1 - ᾱ_{t-1})/(1 - ᾱ_t) β_t
#
# At t = 1 they are x_0 and 0. But x_0 is not known. The network's guess takes its place, by Eq. 4:
def predict_x_0(schedule, x_t, t, eps_theta):
    """x_0_hat = (x_t - √(1 - ᾱ_t) ε_θ)/√ᾱ_t, (B, C, H, W), as x_t and eps_theta. t: int64 (B,)."""
    signal, noise = schedule.signal_and_noise(t)
    return (x_t - noise * eps_theta) / signal


# Such a guess is a mean of many pictures, and may look like none of them. But μ̃_t is linear in x_0:
# it takes the mean of x_0 to the mean of x_{t-1}. Put x̂_0 in, and μ̃_t has the factors
#
#     of ε_θ:  - √ᾱ_{t-1} β_t/(1 - ᾱ_t) √(1 - ᾱ_t)/√ᾱ_t  =  - β_t/√(1 - ᾱ_t) / √α_t
#     of x_t:  (β_t/√α_t + √α_t (1 - ᾱ_{t-1})) / (1 - ᾱ_t)  =  1/√α_t
#
#     μ_θ(x_t, t) = 1/√α_t (x_t - β_t/√(1 - ᾱ_t) ε_θ(x_t, t))                               (Eq. 11)
#
# A step back draws from a Gaussian around this mean: without z, x_{t-1} would vary too little. A
# Gaussian is exact if x_0 is known, else (no proof) nearly so for short steps: hence a large T.
#
# How wide? σ_t² = β̃_t is right if there is only one picture, σ_t² = β_t if the data is N(0, I).
# They differ mainly at small t, and did similarly well in the paper (Section 3.2). We take β̃_t.
@torch.no_grad()
def algorithm_2(model, schedule, x_T, generator=None):
    """Algorithm 2. Yields (t, x_t) for t = T, ..., 0: first x_T as given, last the samples x_0.
    x_T: from N(0, I), float32 (B, C, H, W). model, generator: as for algorithm_1."""
    beta, alpha, one_minus = schedule.beta, schedule.alpha, schedule.one_minus_alpha_bar
    x_t = x_T  # line 1
    yield schedule.T, x_t
    for t in range(schedule.T, 0, -1):  # line 2
        z = torch.randn(x_T.shape, generator=generator).to(x_T.device) if t > 1 else 0  # line 3
        eps_theta = model(x_t, torch.full((len(x_T),), t, device=x_T.device))  # t: (B,)
        mu_theta = (x_t - beta[t] / one_minus[t].sqrt() * eps_theta) / alpha[t].sqrt()  # Eq. 11
        sigma = (one_minus[t - 1] / one_minus[t] * beta[t]).sqrt()  # √β̃_t
        x_t = mu_theta + sigma * z  # line 4: x_t becomes x_{t-1}
        yield t - 1, x_t  # line 6, when t is 1


# ==== 4. The network ==============================================================================
# TIME. Any network will do that maps x_t and t to a tensor of x_t's shape. It must know t: a bright
# speck is noise at t = 900 and part of the picture at t = 5. Sines and cosines of t are like the
# hands of a clock: fast ones tell t from t + 1, slow ones early from late. (arXiv 1706.03762)
def time_embedding(t, dim):
    """Sines and cosines of t, float32 (B, dim) in [-1, 1]. t: int64 (B,); dim: even."""
    share = torch.arange(dim // 2, device=t.device) / (dim // 2)  # (dim / 2,), from 0 to almost 1
    frequency = 10_000**-share  # from 1 radian per step down to almost 1/10000
    angle = t[:, None].float() * frequency  # (B, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)  # (B, dim)


def zero_init(layer):
    """Starts a last layer at 0: the block adds nothing at first, and training is easier."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """The residual block: (B, c_in, H, W) and a time vector (B, time_dim) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, time_dim, c_mid=None):
        super().__init__()
        c_mid = c_mid or c_out
        self.norm1 = nn.GroupNorm(c_in // 8, c_in)  # over all pixels of 8 channels of one picture
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, padding=1)
        self.time = nn.Linear(time_dim, c_mid)
        self.norm2 = nn.GroupNorm(c_mid // 8, c_mid)
        self.conv2 = zero_init(nn.Conv2d(c_mid, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_mid, H, W)
        h = h + self.time(time)[:, :, None, None]  # (B, c_mid, H, W), the same for all pixels
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))  # (B, c_out, H, W)


# ATTENTION lets distant places talk, where a convolution sees neighbours. Every place has a query,
# a key and a value, vectors of d numbers, and receives a mean of all values, weighted by how well
# its query matches their keys: softmax(q k^T / √d) v. Without √d, products would be so large that
# nearly all weight falls on one place. (In the code, places are columns of q, k and v, not rows.) M
# places cost M² weights, so larger pictures are averaged to 8x8 first.
class Attention(nn.Module):
    """Self-attention with one head, added to its input: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, d):
        super().__init__()
        self.norm = nn.GroupNorm(channels // 8, channels)
        self.qkv = nn.Conv2d(channels, 3 * d, 1)
        self.out = zero_init(nn.Conv2d(d, channels, 1))

    def forward(self, x):
        size = [min(8, n) for n in x.shape[2:]]  # h and w
        y = self.norm(F.adaptive_avg_pool2d(x, size))  # (B, C, h, w)
        q, k, v = self.qkv(y).flatten(2).chunk(3, dim=1)  # (B, d, M) each, M = h w places
        weights = (q.mT @ k / q.shape[1] ** 0.5).softmax(2)  # (B, M, M), a row for each query
        y = (v @ weights.mT).unflatten(2, size)  # (B, d, h, w)
        return x + F.interpolate(self.out(y), x.shape[2:])  # (B, C, H, W)


# THE U-NET, smaller and simpler than the paper's, goes down to an eighth of the size, where it sees
# the whole picture, and up again. Going up, skip connections hand each level what it had going
# down: the bottom tells what is in the picture, the skips exactly where.
#
#     32x32  stem -- down ------------------------------- up -- out
#     16x16            down ----------------------- up
#      8x8               down --------------- up        3 blocks up: the data lies on 8x8 cells
#      4x4                  middle (512 channels)        attention here and in each up
class Up(nn.Module):
    """One level on the way up: (B, c_below, h, w) and a skip (B, c, 2h, 2w) -> (B, c, 2h, 2w)."""

    def __init__(self, c_below, c, time_dim, blocks):
        super().__init__()
        self.below = nn.Conv2d(c_below, c, 1)
        self.attention = Attention(c, c)
        self.blocks = nn.ModuleList([ResBlock(c, c, time_dim) for _ in range(blocks)])

    def forward(self, x, skip, time):
        x = F.interpolate(self.below(x), scale_factor=2.0)  # (B, c, 2h, 2w), each pixel becomes 2x2
        x = self.attention(x + skip)
        for block in self.blocks:
            x = block(x, time)
        return x


class UNet(nn.Module):
    """The network: x_t, (B, channels, H, W), and t, int64 (B,) -> eps_theta, as x_t. H, W and all
    inner channels are multiples of 8: widths (at full, half, quarter size), bottleneck (at an
    eighth), narrow (inside its blocks)."""

    def __init__(self, channels=1, widths=(16, 32, 128), bottleneck=512, narrow=64, time_dim=128):
        super().__init__()
        (c1, c2, c3), c4, d = widths, bottleneck, time_dim
        self.time_dim = time_dim
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.stem = nn.Conv2d(channels, c1, 3, padding=1)
        self.down = nn.ModuleList([ResBlock(c1, c1, d), ResBlock(c1, c2, d), ResBlock(c2, c3, d)])
        self.middle1 = ResBlock(c3, c4, d, c_mid=narrow)
        self.attention = Attention(c4, narrow)
        self.middle2 = ResBlock(c4, c4, d, c_mid=narrow)
        self.up = nn.ModuleList([Up(c4, c3, d, 3), Up(c3, c2, d, 1), Up(c2, c1, d, 1)])
        self.norm = nn.GroupNorm(c1 // 8, c1)
        self.out = zero_init(nn.Conv2d(c1, channels, 3, padding=1))

    def forward(self, x_t, t):
        time = self.time(time_embedding(t, self.time_dim))  # (B, time_dim)
        x = self.stem(x_t)  # (B, c1, h, w), where h, w = H, W
        skips = []
        for block in self.down:
            x = block(x, time)  # (B, c, h, w), with c = c1, c2, c3
            skips.append(x)
            x = F.avg_pool2d(x, 2)  # (B, c, h/2, w/2), h and w of the next block
        x = self.attention(self.middle1(x, time))  # (B, c4, h, w)
        x = self.middle2(x, time)
        for level in self.up:
            x = level(x, skips.pop(), time)  # (B, c, 2h, 2w)
        return self.out(F.silu(self.norm(x)))  # eps_theta: (B, channels, H, W)


# This is the whole method. (train.py draws samples with an average of the weights, in fewer steps,
# by ddim of section 6.) Go and train, and come back to ask why it works.


# ######## PART II, LOOKING DEEPER: why it works, fewer steps, and where the loss comes from #######
# ==== 5. A perfect network, and one pixel =========================================================
# What is the best guess? By Eq. 4, given x_t, the errors of ε_θ and x̂_0 are proportional:
#
#     ‖ε - ε_θ‖² = SNR(t) ‖x_0 - x̂_0‖²       with the signal-to-noise ratio SNR(t) = ᾱ_t/(1 - ᾱ_t)
#
# So look at x_0. Let E be the mean over all pictures that could be behind x_t, each counted by its
# probability, and m = E[x_0]. A guess c has the expected squared error
#
#     E[‖x_0 - c‖²] = E[‖x_0 - m‖²] + 2 E[x_0 - m]·(m - c) + ‖m - c‖²
#
# The middle term vanishes, as E[x_0 - m] = m - m = 0, and the first does not depend on c. So the
# best guess is c = m: at large t a grey blur, the smaller t, the sharper (forward.png).
#
# If the data is a list of equally likely pictures, Bayes' rule gives w_i, the probability of each:
#
#     w_i  ∝  q(x_t | picture_i)  ∝  exp(-‖x_t - √ᾱ_t picture_i‖² / (2 (1 - ᾱ_t)))
#     m = Σ_i w_i picture_i                                   with Σ_i w_i = 1: that is the softmax
def perfect_model(schedule, pictures):
    """The model(x_t, t), for t > 0, with the least loss on pictures, float32 (N, C, H, W)."""
    rows = pictures.flatten(1)  # (N, D), with D = C H W

    def model(x_t, t):
        signal, noise = schedule.signal_and_noise(t)
        a, b = signal.flatten(1), noise.flatten(1)  # (B, 1) each
        distance = a * torch.cdist(x_t.flatten(1) / a, rows)  # ‖x_t - √ᾱ_t picture‖: (B, N)
        m = (-(distance**2) / (2 * b**2)).softmax(1) @ rows  # (B, D)
        return (x_t - signal * m.view(x_t.shape)) / noise  # Eq. 4 solved for ε: (B, C, H, W)

    return model


# ONE PIXEL. `python ddpm.py` trains a tiny network on one pixel, -1 or +1. Its loss comes near that
# of the perfect network (pixel.png, left), but for the smallest t, which are rare and show little
# of ε. Both have a hump: at small t the pixel is clear, at large t ε is, in between neither.
# Algorithm 2 leads x_t to -1 or +1 (middle), and chance decides to which: at first x̂_0 is near 0,
# then z pushes x_t to one side, and x̂_0 follows.
#
# MANY PIXELS together outlast more noise than one: a shape is decided at larger t (forward.png).
# If the data is the list of training pictures, the perfect network draws nothing else: least
# training loss means memorising. A trained network draws new ones only as far as it is imperfect.


# ==== 6. Fewer steps, and the score ===============================================================
# Song, Meng & Ermon, "Denoising Diffusion Implicit Models" (DDIM, 2021, arXiv 2010.02502), noticed
# that the loss knows q(x_t | x_0) and nothing of the path between. So the same network can jump
# from t to any earlier s: guess x_0 and ε, and mix them anew as Eq. 4 does at s. A part, of
# variance σ², may be fresh noise (their Eq. 12 and 16; their α is ᾱ):
#
#     x_s = √ᾱ_s x̂_0 + √(1 - ᾱ_s - σ²) ε_θ + σ z
#     σ²  = η² (1 - ᾱ_s)/(1 - ᾱ_t) (1 - ᾱ_t/ᾱ_s)
#
# The squared factors of ε_θ and z add up to 1 - ᾱ_s, as in Eq. 4. With η = 1 and s = t - 1, σ² is
# β̃_t and this is Algorithm 2. At t = T an error of ε_θ is 157 times as large in x̂_0, on which a
# long step relies. So ddim clips x̂_0 to [-1, 1]: unlike Algorithm 2, but as Ho's program does.
#
# With η = 0 only x_T is random: a step is an Euler step of an ordinary differential equation (ODE),
# d(x_t/√ᾱ_t) = ε_θ d(1/√SNR(t)). One pixel mostly keeps its sign (pixel.png, right).
@torch.no_grad()
def ddim(model, schedule, x_T, steps, eta, generator=None):
    """DDIM in 1 to T steps, with eta from 0 (no fresh noise) to 1. For the rest see algorithm_2."""
    alpha_bar, one_minus = schedule.alpha_bar, schedule.one_minus_alpha_bar
    visited = torch.linspace(schedule.T, 1, steps, dtype=torch.float64).round().int().tolist()
    x_t = x_T
    yield schedule.T, x_t
    for t, s in pairwise([*visited, 0]):
        times = torch.full((len(x_T),), t, device=x_T.device)  # (B,)
        x_0_hat = predict_x_0(schedule, x_t, times, model(x_t, times)).clamp(-1, 1)
        eps_theta = (x_t - alpha_bar[t].sqrt() * x_0_hat) / one_minus[t].sqrt()  # after the clip
        variance = eta**2 * one_minus[s] / one_minus[t] * (1 - alpha_bar[t] / alpha_bar[s])  # σ²
        x_t = alpha_bar[s].sqrt() * x_0_hat + (one_minus[s] - variance).sqrt() * eps_theta
        z = torch.randn(x_T.shape, generator=generator).to(x_T.device)  # (B, C, H, W)
        x_t = x_t + variance.sqrt() * z  # x_t has become x_s
        yield s, x_t


# THE SCORE ∇ log q(x_t) points to where x_t would be more likely. Other papers learn it, and follow
# it in small noisy steps (Langevin dynamics). It is the best guess of ε times a factor: take ∇ of
# q(x_t) = ∫ q(x_t | x_0) q(x_0), with ∇q = q ∇ log q,
#
#     ∇ log q(x_t) = E[∇ log q(x_t | x_0)] = -E[ε] / √(1 - ᾱ_t)            with the E of section 5


# ==== 7. Where the loss comes from: the variational bound =========================================
# The aim is maximum likelihood: a large p_θ(x_0) for the pictures of the data, where the model is
#
#     p_θ(x_0, ..., x_T) = p(x_T) Π_t p_θ(x_{t-1} | x_t)                  with p(x_T) = N(0, I)
#     p_θ(x_{t-1} | x_t) = N(x_{t-1}; μ_θ(x_t, t), σ_t² I)                                   (Eq. 1)
#
# p_θ(x_0) is an integral over all paths x_1, ..., x_T, and has no formula. But -log of a mean is at
# most the mean of -log (Jensen's inequality). So, with E_q over the paths that q makes from x_0,
#
#     -log p_θ(x_0) = -log E_q[ p_θ(x_0, ..., x_T) / q(x_1, ..., x_T | x_0) ]
#                  <= E_q[ -log( p_θ(x_0, ..., x_T) / q(x_1, ..., x_T | x_0) ) ] = L         (Eq. 3)
#
# L is the variational bound, and -L the evidence lower bound (ELBO). To pair the factors of q with
# those of p_θ, turn q around. By Bayes' rule, as in section 3,
#
#     q(x_t | x_{t-1}) = q(x_{t-1} | x_t, x_0) q(x_t | x_0) / q(x_{t-1} | x_0)         for t > 1
#
# In the product over t > 1 the fractions leave q(x_T | x_0) / q(x_1 | x_0). Times q(x_1 | x_0),
#
#     q(x_1, ..., x_T | x_0) = q(x_T | x_0) Π_{t>1} q(x_{t-1} | x_t, x_0)
#     L = E_q[ KL(q(x_T | x_0) ‖ p(x_T))                                        L_T
#            + Σ_{t>1} KL(q(x_{t-1} | x_t, x_0) ‖ p_θ(x_{t-1} | x_t))           L_{t-1}
#            - log p_θ(x_0 | x_1) ]                                             L_0          (Eq. 5)
#
# KL(q ‖ p) is the mean of log q - log p under q. For Gaussians with means a, b and one variance σ²
# it is E[‖x - b‖² - ‖x - a‖²]/(2σ²), and x - b = (x - a) + (a - b), so ‖a - b‖²/(2σ²) is left:
#
#     L_{t-1} = E_q[ ‖μ̃_t(x_t, x_0) - μ_θ(x_t, t)‖² / (2 β̃_t) ]             with σ_t² = β̃_t  (Eq. 8)
#             = E_q[ ᾱ_{t-1} β_t / (2 (1 - ᾱ_{t-1}) (1 - ᾱ_t)) ‖x_0 - x̂_0‖² ]          by Eq. 7
#             = E_q[ (SNR(t-1) - SNR(t))/2 ‖x_0 - x̂_0‖² ]     as ᾱ_{t-1} β_t = ᾱ_{t-1} - ᾱ_t
#
# So by section 5, L_{t-1} is the loss of section 2 at t, times a weight, largest at small t.
# Algorithm 1 drops the weight. The best guess remains the same, but the effort goes to where
# pictures take shape. The bound gets worse and the samples better (Ho, Table 1).
#
# With pixels of ±1 the two other terms are almost 0, and bound() omits both: L_T has q ≈ p, and L_0
# asks only for the signs of x_0 (Eq. 13: their probability under N(μ_θ, β_1 I); not β̃_1, which is
# 0). In bits, the mean of L is at least the entropy of the data (KL >= 0): for one pixel, 1.
@torch.no_grad()
def bound(model, schedule, x_0, generator=None):
    """L_{t-1} (Eq. 8) at index t > 1, in bits a picture: float32 (T + 1,). x_0: (n, C, H, W); n: a
    multiple of T - 1, so all t come equally often, else RuntimeError. The rest: algorithm_1."""
    t = 2 + torch.arange(len(x_0), device=x_0.device) % (schedule.T - 1)  # (n,): 2, ..., T, 2, ...
    x_t = q_sample(schedule, x_0, t, torch.randn(x_0.shape, generator=generator).to(x_0.device))
    x_0_hat = predict_x_0(schedule, x_t, t, model(x_t, t))
    snr = schedule.alpha_bar / schedule.one_minus_alpha_bar  # (T + 1,), infinite at 0
    nats = (snr[t - 1] - snr[t]) / 2 * (x_0 - x_0_hat).square().sum((1, 2, 3))  # (n,)
    return F.pad(nats.view(-1, schedule.T - 1).mean(0) / log(2), (2, 0))  # (T + 1,)


# ==== Look at it: python ddpm.py ==================================================================
if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # a notebook may ask for a backend that is not installed
    from matplotlib.figure import Figure

    import shapes

    # One pixel: a tiny network learns it by Algorithm 1 and draws it by Algorithm 2.
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more threads slow so small a network down
    schedule, T, pixel = Schedule(), len(BETA), torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    layers = nn.Linear(33, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
    net = nn.Sequential(*layers)

    def tiny(x_t, t):
        x = torch.cat([x_t.flatten(1), time_embedding(t, 32)], dim=1)  # (B, 33)
        return net(x).view(x_t.shape)  # (B, 1, 1, 1)

    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(2000):
        x_0 = pixel[torch.randint(2, (1024,))]  # line 2: (1024, 1, 1, 1)
        algorithm_1(tiny, schedule, optimizer, x_0)

    figure = Figure(figsize=(12, 3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    x_0, eps = pixel.repeat(1000, 1, 1, 1), torch.randn(2000, 1, 1, 1)  # (2000, 1, 1, 1) each
    times = torch.arange(1, T + 1)[:, None].expand(-1, 2000)  # (T, 2000)
    for name, model in (("tiny", tiny), ("perfect", perfect_model(schedule, pixel))):
        loss = [F.mse_loss(model(q_sample(schedule, x_0, t, eps), t), eps).item() for t in times]
        left.plot(times[:, 0], loss, label=f"{name} network, {sum(loss) / T:.2f} on average")
    left.set(xlabel="t", ylabel="loss")
    left.legend()
    x_T = torch.randn(40, 1, 1, 1)
    walks = algorithm_2(tiny, schedule, x_T), ddim(tiny, schedule, x_T, T, eta=0)
    for axes, title, walk in zip((middle, right), ("Algorithm 2", "η = 0"), walks):
        t, x = zip(*walk)
        axes.plot(t, torch.stack(x).flatten(1), linewidth=0.6)  # (T + 1, 40): a line for each walk
        axes.set(xlabel="t", ylabel="$x_t$", title=title, xlim=(T, -T / 66), yticks=[-1, 1])
    figure.savefig("pixel.png", dpi=100)

    # A picture: with noise, and the best guess of it, if the data is 2,000 pictures.
    training = shapes.make_dataset(2000, seed=0)  # (2000, 1, 32, 32)
    t = torch.tensor([10, 200, 400, 500, 600, 700, 800, 1000]) * T // 1000  # (8,)
    x_t = q_sample(schedule, training[[3]], t, torch.randn(1, 1, 32, 32))  # (8, 1, 32, 32)
    eps_theta = perfect_model(schedule, training)(x_t, t)  # (8, 1, 32, 32)
    rows = torch.cat([x_t, predict_x_0(schedule, x_t, t, eps_theta)])  # (16, 1, 32, 32)
    shapes.tile(rows, columns=8, titles=[f"t = {n}" for n in t]).save("forward.png")
