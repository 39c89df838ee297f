"""Denoising diffusion, from the idea to the code. Read it from top to bottom.

THE IDEA. Take a picture and add a little Gaussian noise. Repeat this a thousand times, until
nothing of the picture is left. This direction is easy. Then train a network for the way back: it
sees a noisy picture and guesses the noise in it. To draw a new picture, start from pure noise.
Remove a little of the guessed noise, add a little fresh noise, and guess again. Each step leaves a
little less noise, and after a thousand of them there is a picture.

    x_0  ->  x_1  ->  x_2  ->  ...  ->  x_T      forward process q: fixed, adds noise
    x_0  <-  x_1  <-  x_2  <-  ...  <-  x_T      reverse process p: learned, removes noise

That is two algorithms. Sections 1 to 3 explain their letters and write them in PyTorch:

    Algorithm 1: training                      Algorithm 2: sampling
    1  repeat                                  1  x_T ~ N(0, I)
    2    x_0 ~ the data                        2  for t = T, ..., 1:
    3    t ~ uniform in 1, ..., T              3    z ~ N(0, I) if t > 1, else z = 0
    4    eps ~ N(0, I)                         4    x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t)
    5    a gradient step on                               * eps_theta(x_t, t)) / sqrt(alpha_t)
           || eps - eps_theta(x_t, t) ||^2               + sigma_t z
         x_t = sqrt(alpha_bar_t) x_0           5  return x_0
               + sqrt(1 - alpha_bar_t) eps

eps_theta is the network, and theta its weights. ~ means "drawn from". N(0, I) is standard normal
noise: every pixel gets its own number, with mean 0 and variance 1.

The paper is Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv
2006.11239). "Eq. 4", "Algorithm 2" and "Ho, Section 4" refer to it, and the letters are the
paper's. The few things that are ours are marked BEYOND THE PAPER. A line that changes the shape of
a tensor ends with the new shape: B pictures in a batch, C channels, H x W pixels.

    python ddpm.py      prints the parts of the network, saves forward.png and pixel.png
"""

import io
import os
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ==== 1. Noise: from x_0 to x_t ===================================================================
#
# The pictures show one to three shapes (shapes.py) on 32x32 pixels, each -1 (background) or +1
# (shape). So the data has the size of the noise, whose variance is 1. In 0...255 such noise could
# not be seen. In 0...1 the two values would be half as far apart, and drown in the noise sooner.
#
# Step t mixes the picture with fresh noise of variance beta_t (Eq. 2; N(x; mean, variance) is the
# density of a Gaussian at x):
#
#     q(x_t | x_{t-1}) = N(x_t; sqrt(1 - beta_t) x_{t-1}, beta_t I)
#
# The factor sqrt(1 - beta_t) keeps the size: a mean square of 1 becomes (1 - beta_t) + beta_t = 1.
# The betas are chosen by hand (Ho, Section 4): small at first, when little noise is enough to hide
# details, and larger later.
#
# We need not go through all steps to get x_t. A sum of independent Gaussians is a Gaussian, and
# variances add up. With alpha_t = 1 - beta_t, two steps become one:
#
#     x_1 = sqrt(alpha_1) x_0 + sqrt(1 - alpha_1) z                     z, z', eps ~ N(0, I)
#     x_2 = sqrt(alpha_2) x_1 + sqrt(1 - alpha_2) z'
#         = sqrt(alpha_2 alpha_1) x_0 + sqrt(alpha_2 (1 - alpha_1)) z + sqrt(1 - alpha_2) z'
#         = sqrt(alpha_2 alpha_1) x_0 + sqrt(1 - alpha_2 alpha_1) eps
#           since alpha_2 (1 - alpha_1) + (1 - alpha_2) = 1 - alpha_2 alpha_1
#
# After t steps alpha_bar_t = alpha_1 alpha_2 ... alpha_t takes the place of alpha_2 alpha_1:
#
#     x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps                                (Eq. 4)
#
# At t = T the factor of x_0 is 0.0064: nothing is left, so sampling can start from pure noise.
#
# Why a thousand small steps and not ten large ones? Because the way back from a small step is a
# Gaussian, which is easy to model. By Bayes' rule, as a function of x_{t-1},
#
#     log q(x_{t-1} | x_t) = -(x_t - sqrt(alpha_t) x_{t-1})^2 / (2 beta_t) + log q(x_{t-1}) + const
#
# If beta_t is small, the first term is a narrow parabola, and over its width the second is almost
# a straight line. A parabola plus a line is a parabola, so q(x_{t-1} | x_t) is almost a Gaussian.
# This holds for any data, also for pixels with two values: each step is a Gaussian, but what a
# thousand of them lead to need not be one (section 4). In the last few steps (t near 1) this fails,
# but there x_t leaves little doubt about x_0, and given x_0 it is a Gaussian (section 3).

T = 1000


class Schedule:
    """beta; alpha = 1 - beta; alpha_bar, the product of all alphas up to t; one_minus_alpha_bar.

    All four are float32 (T + 1,), indexed by the paper's t: beta[1] belongs to the first step,
    beta[T] to the last, alpha_bar[0] = 1 to the clean picture. They are computed in float64: in
    float32 1 - alpha_bar[1] = 0.0001 would have only 3 correct digits.
    """

    def __init__(self, device="cpu"):
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)  # (T,), Ho, Section 4
        beta = F.pad(beta, (1, 0))  # (T + 1,), with beta[0] = 0
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)
        self.beta = beta.float().to(device)
        self.alpha = alpha.float().to(device)
        self.alpha_bar = alpha_bar.float().to(device)
        self.one_minus_alpha_bar = (1 - alpha_bar).float().to(device)

    def signal_and_noise(self, t):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), for t (B,) in 0..T: two (B, 1, 1, 1)."""
        signal, noise = self.alpha_bar[t].sqrt(), self.one_minus_alpha_bar[t].sqrt()  # (B,) each
        return signal.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)  # (B, 1, 1, 1)


def q_sample(schedule, x_0, t, eps):
    """Draws x_t from q(x_t | x_0), Eq. 4: float (B, 1, H, W).

    x_0: float (B, 1, H, W) in [-1, 1]. t: int64 (B,), in 0..T. eps: standard normal, same shape.
    """
    signal, noise = schedule.signal_and_noise(t)
    return signal * x_0 + noise * eps


# ==== 2. What to learn ============================================================================
#
# Once x_t is given, Eq. 4 has two unknowns, x_0 and eps, and each gives the other:


def predict_x_0(schedule, x_t, t, eps):
    """Eq. 4 solved for x_0: the picture in x_t if eps is the noise. As q_sample, but t in 1..T."""
    signal, noise = schedule.signal_and_noise(t)
    return (x_t - noise * eps) / signal


# So a network that guesses the noise also guesses the picture. The paper lets it guess the noise
# (noise prediction), which gave the best samples (Ho, Table 2), with the mean squared error as the
# loss. Section 6 says where this loss comes from.


def loss_fn(model, schedule, x_0, t, eps):
    """L_simple (Eq. 14) for given t and eps, as a mean over pictures and pixels: a 0-d tensor.

    model: any function of x_t and t that guesses eps. x_0: float (B, 1, 32, 32) in [-1, 1].
    t: int64 (B,), in 1..T. eps: standard normal, (B, 1, 32, 32).
    """
    x_t = q_sample(schedule, x_0, t, eps)
    return F.mse_loss(model(x_t, t), eps)


# Its gradient is line 5 of Algorithm 1; the whole loop is `train_epoch` in train.py. There, samples
# come from a moving average of the weights, as noisy gradients shake them. Gradients are taken at
# the raw weights: the average lags by many steps, so its gradient would be out of date.
#
# Which guess has the least squared error? Many pictures fit the same x_t. Let E be the mean over
# them, weighted by how well they fit, and m = E x_0. A guess c of x_0 has the error
#
#     E (x_0 - c)^2 = E (x_0 - m)^2 + (m - c)^2
#
# so c = m is best: the mean of all pictures that fit. At large t very many fit, and their mean is a
# grey blur. This is why one cannot go from noise to a picture in one step. A small step follows the
# guess only a little. Then fewer pictures fit, and the next guess is sharper (section 4 shows how).
#
# By Eq. 4, the error of eps is the error of x_0 times a factor, the signal-to-noise ratio:
#
#     (eps - guess of eps)^2 = alpha_bar_t / (1 - alpha_bar_t) * (x_0 - guess of x_0)^2
#
# This ratio falls from 9999 at t = 1 to 1 at t = 259 and 0.00004 at T. So an error of x_0 counts
# much where the picture can be seen, and little where it can only be a blur.


def draw_t(n, generator, device="cpu"):
    """Draws n values of t for training: int64 (n,), in 1..T.

    BEYOND THE PAPER, where t is uniform. Here it is the mean of two uniform draws (rounded down),
    so most t lie near T / 2, where pictures are decided (section 4). Every 16th t is uniform: small
    t would hardly ever be drawn otherwise, and the last steps would leave some pixels grey. After
    20 epochs 90 % of the samples are right, with uniform t 85 %.
    """
    a, b = torch.randint(1, T + 1, (2, n), generator=generator, device=device)  # (n,) each
    t = (a + b) // 2
    t[::16] = a[::16]
    return t


# ==== 3. Back: from x_t to x_{t-1} ================================================================
#
# If x_0 were known, we would know two things about x_{t-1}: by Eq. 4 it lies near
# sqrt(alpha_bar_{t-1}) x_0, and by Eq. 2 x_t came from it. Bayes' rule multiplies the two and gives
# the posterior, as a function of x_{t-1}:
#
#     q(x_{t-1} | x_t, x_0)  =  q(x_{t-1} | x_0)  q(x_t | x_{t-1})  const
#
#     Gaussian                       centre                            variance
#     q(x_{t-1} | x_0)               sqrt(alpha_bar_{t-1}) x_0         1 - alpha_bar_{t-1}
#     q(x_t | x_{t-1})               x_t / sqrt(alpha_t)               beta_t / alpha_t
#
# A product of Gaussians is a Gaussian. Its 1 / variance is the sum of theirs, and its centre is the
# mean of theirs, weighted by 1 / variance:
#
#     mu = [ sqrt(alpha_bar_{t-1}) beta_t x_0
#          + sqrt(alpha_t) (1 - alpha_bar_{t-1}) x_t ] / (1 - alpha_bar_t)                   (Eq. 7)
#     beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
#     since beta_t + alpha_t (1 - alpha_bar_{t-1}) = 1 - alpha_bar_t
#
# We do not know x_0, but the network guesses the mean of all x_0 that fit x_t. mu is linear in x_0,
# so with this mean for x_0 it is the mean of x_{t-1}. To write mu with eps, put x_0 of Eq. 4 into
# Eq. 7:
#
#     factor of eps:  - sqrt(alpha_bar_{t-1} / alpha_bar_t) beta_t / sqrt(1 - alpha_bar_t)
#                     = - beta_t / sqrt(1 - alpha_bar_t) / sqrt(alpha_t)
#     factor of x_t:  [ beta_t / sqrt(alpha_t) + sqrt(alpha_t) (1 - alpha_bar_{t-1}) ]
#                     / (1 - alpha_bar_t) = 1 / sqrt(alpha_t)
#
#     mu = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t)                       (Eq. 11)
#
# A step back takes this mean and adds noise, because the mean of all x_{t-1} that fit has less
# noise in it than the network expects at t - 1.


@torch.no_grad()
def algorithm_2(model, schedule, x_T, generator=None):
    """Algorithm 2: walks from noise to pictures and yields every stop on the way.

    model: any function of x_t and t that guesses eps. x_T: standard normal float (B, 1, H, W).
    generator: draws z, on the CPU, so that a seed means the same z on every device. Yields
    (t, x_t, guess of x_0) for t = T..1; at the end (0, x_0, x_0).
    """
    x = x_T
    for t in range(T, 0, -1):
        times = torch.full((len(x),), t, device=x.device)  # (B,)
        eps_theta = model(x, times)
        yield t, x, predict_x_0(schedule, x, times, eps_theta)
        z = torch.randn(x.shape, generator=generator).to(x.device)
        beta, alpha = schedule.beta[t], schedule.alpha[t]
        var_t, var_before = schedule.one_minus_alpha_bar[t], schedule.one_minus_alpha_bar[t - 1]
        mu = (x - beta / var_t.sqrt() * eps_theta) / alpha.sqrt()  # Eq. 11
        # The paper tries sigma_t^2 = beta_tilde_t, right if the data is a single picture, and
        # sigma_t^2 = beta_t, right if it is standard normal (Ho, Section 3.2). They differ only at
        # small t: the ratio is 0.98 at t = 100 and 0.85 at t = 10. We take the first. At t = 1 it
        # is 0, so the last step adds no noise, as line 3 of Algorithm 2 says.
        sigma = (beta * var_before / var_t).sqrt()
        x = mu + sigma * z  # x_t becomes x_{t-1}
    yield 0, x, x


# This is DDPM, complete. Does it work (section 4)? Why this loss (6)? What is the network (7)?

# ==== 4. One pixel, by hand =======================================================================
#
# Let the data be a single pixel, -1 or +1, each half of the time. Then no network is needed. Given
# x_t, Bayes' rule on Eq. 4 says how likely each value is, and from this follows the mean of x_0:
#
#     p(+1) / p(-1) = exp(2 sqrt(alpha_bar_t) x_t / (1 - alpha_bar_t))
#     mean of x_0 = p(+1) - p(-1) = tanh(sqrt(alpha_bar_t) x_t / (1 - alpha_bar_t))


def one_pixel(schedule):
    """The perfect network for pixels of -1 and +1: a function of x_t, t (B,) -> guess of eps."""

    def perfect(x_t, t):
        signal, noise = schedule.signal_and_noise(t)
        x_0 = torch.tanh(signal * x_t / noise**2)
        return (x_t - signal * x_0) / noise  # Eq. 4 solved for eps

    return perfect


# Put into Algorithm 2, it leads every walk to -1 or +1, half of them to each. `python ddpm.py`
# draws forty (pixel.png, left): a bundle that splits in two. So a thousand Gaussian steps end in
# two values, because the mean of a step, with its tanh, is not linear in x_t.
#
# What decides, when both values fit x_t? The fresh noise z. The guess is near 0 and favours
# neither. By chance z moves x_t to one side, and the guess follows. Of 4,000 walks 50 % end on the
# side where x_T was: Algorithm 2 forgets the noise it starts from.
#
# What can no network know? Even this perfect one has a loss that no training can reduce:
#
#     t                                  100    200    300    400    500    600    700    1000
#     squared error of eps, Eq. 14     0.042   0.47   0.38   0.19  0.079  0.026  0.007  0.00004
#     squared error of x_0             0.005   0.24   0.58   0.80   0.92   0.97   0.99     1.00
#
# At small t the pixel can be seen, and both errors are small. At large t it cannot: the guess is 0
# and its squared error 1. But x_t is then almost nothing but eps, so eps is easy: the least
# possible loss at T is 1 times the signal-to-noise ratio, 0.00004. In between the pixel is decided,
# and the loss is largest. The pixels of a shape agree, so it is decided at larger t. Here is the
# error of x_0 of the supplied network after 10 and after 100 epochs (sample.py --score):
#
#     t               2     100     300     400     500     600     700     800
#     epoch 10  0.00005  0.0004  0.0012   0.009   0.102    0.33    0.50    0.63
#     epoch 100 0.00001 0.00004  0.0002   0.004   0.085    0.31    0.48    0.56
#
# From 500 on little changes: what is left is probably doubt. Up to 400 the error at least halves.
# Right pictures (no wrong pixel) rise from 85 to 97 %, the loss falls from 0.0054 to 0.0037.
#
# Could one start later, with pure noise at t = 500? No: it lacks the 0.28 x_0 of a true x_500, and
# the network finds shapes by chance: of 200 pictures half were right, most with 3 shapes.

# ==== 5. Fewer steps ==============================================================================
#
# A thousand steps take time, and Algorithm 2 needs them: each has to be small (section 1). Song,
# Meng & Ermon, "Denoising Diffusion Implicit Models" (DDIM, 2021, arXiv 2010.02502), noticed that
# Eq. 14 uses q(x_t | x_0) and never the path from x_0 to x_t. So the same trained network can jump
# from t to any smaller s: guess x_0 and eps, and mix them again as Eq. 4 does at s. Of the noise
# variance at s, 1 - alpha_bar_s, a part sigma^2 may be fresh (their Eq. 12 and Eq. 16; they write
# alpha for alpha_bar):
#
#     x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z
#     sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)
#
# With eta = 1 and s = t - 1, sigma^2 is beta_tilde_t: Algorithm 2 (without a clip). With
# eta = 0 nothing is random after x_T: all one-pixel walks end on the side where they began.
#
# Below, the guess of x_0 is clipped to [-1, 1]. Why? To get it, predict_x_0 divides by
# sqrt(alpha_bar_t), so at t = T an error of eps is 157 times as large in x_0. A small step takes
# little of this x_0: its factor in Eq. 7 is 0.0001 at t = T. A long step takes much more. Ho's own
# program clips in Algorithm 2, too, and as Eq. 11 has no x_0 to clip, it uses Eq. 7. The two means
# are the same only as long as the clip changes nothing.


@torch.no_grad()
def ddim(model, schedule, x_T, steps, eta=1.0, generator=None):
    """DDIM in 1 to T steps, with eta from 0 to 1. Otherwise as algorithm_2."""
    visited = [round(t) for t in np.linspace(T, 1, steps)] + [0]  # evenly spaced
    x = x_T
    for t, s in pairwise(visited):
        times = torch.full((len(x),), t, device=x.device)  # (B,)
        x_0 = predict_x_0(schedule, x, times, model(x, times)).clamp(-1, 1)
        yield t, x, x_0
        z = torch.randn(x.shape, generator=generator).to(x.device)
        a_t, a_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
        var_t, var_s = schedule.one_minus_alpha_bar[t], schedule.one_minus_alpha_bar[s]
        eps = (x - a_t.sqrt() * x_0) / var_t.sqrt()  # Eq. 4, as the clip may have changed x_0
        sigma_2 = eta**2 * var_s / var_t * (1 - a_t / a_s)
        rest = (var_s - sigma_2).clamp(min=0)  # rounding may give less than 0
        x = a_s.sqrt() * x_0 + rest.sqrt() * eps + sigma_2.sqrt() * z  # x_t becomes x_s
    yield 0, x, x


# ==== 6. Why this loss: the variational bound =====================================================
#
# The aim is maximum likelihood: p(x_0) should be large for the pictures that we have. The model is
# the reverse process (Eq. 1)
#
#     p(x_0, ..., x_T) = p(x_T) p(x_{T-1} | x_T) ... p(x_0 | x_1)
#     p(x_{t-1} | x_t) = N(x_{t-1}; mu_theta(x_t, t), sigma_t^2 I)
#
# Its integral over all paths x_1, ..., x_T is p(x_0), and cannot be computed. A bound can. With E
# for the mean over the paths that q draws from x_0,
#
#     -log p(x_0) = -log E [ p(x_0, ..., x_T) / q(x_1, ..., x_T | x_0) ]
#                <= E [ -log( p(x_0, ..., x_T) / q(x_1, ..., x_T | x_0) ) ] = L              (Eq. 3)
#
# since -log of a mean is at most the mean of -log (Jensen's inequality). L is the variational
# bound, and -L the evidence lower bound (ELBO). By Bayes' rule q can be written backwards,
#
#     q(x_1, ..., x_T | x_0) = q(x_T | x_0) q(x_{T-1} | x_T, x_0) ... q(x_1 | x_2, x_0)
#
# with posteriors as in section 3. Now each factor of q pairs with one of p, and p(x_0 | x_1) is
# left over. The logarithm makes a sum of them. KL(q || p), the mean of log q - log p over q,
# measures how far p is from q:
#
#     L = E [ KL(q(x_T | x_0) || p(x_T))                                L_T: nothing to learn
#             + sum over t > 1 of
#               KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))           L_{t-1}
#             - log p(x_0 | x_1) ]                                      L_0                  (Eq. 5)
#
# The variances are fixed, so between two Gaussians only the distance of the means counts (Eq. 8).
# By Eq. 11 it is a distance in eps, since both means have the same x_t (Eq. 12):
#
#     L_{t-1} = E || mu - mu_theta ||^2 / (2 sigma_t^2) + const
#             = w_t E || eps - eps_theta(x_t, t) ||^2 + const
#     w_t     = beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t))
#             = beta_t / (2 alpha_t (1 - alpha_bar_{t-1}))              for sigma_t^2 = beta_tilde_t
#
# And t = 1? Ho's pixels have 256 values. L_0 is -log of the probability of a bin around the true
# one, 2 / 255 wide (at -1 and +1 open to one side), under N(mu_theta(x_1, 1), beta_1 I), as
# beta_tilde_1 is 0 (Eq. 13). Take the density times a width instead (a rough approximation; Ho,
# Section 3.4). Then L_0, too, is a squared error of the mean, and by Eq. 11 one of eps.
#
# So every term is a squared error of eps, times a factor. Eq. 14 drops the factors. At each t the
# best guess is the same: the factors only say where to try hardest. w_t falls from 0.6 at t = 2 to
# 0.005 at t = 350 and rises to 0.01 at T. Without w_t less of the effort goes to small t, whose
# noise cannot be seen, and more to large t, where pictures take shape (Ho, Section 3.4). The bound
# gets worse and the samples better (Ho, Table 1). Our draw_t takes effort from both ends of t.

# ==== 7. The network ==============================================================================
#
# eps_theta is a U-Net: down from 32x32 to 4x4 pixels, to see the whole picture, and up again.
#
# TIME. One network serves all t, so it must know t: a bright speck is noise at t = 900 and part of
# the picture at t = 5. Sines and cosines of many frequencies tell both t from t + 1 and early from
# late (Vaswani et al. 2017, "Attention is all you need", Section 3.5).


def time_embedding(t, dim):
    """Sines and cosines of t. t: int64 (B,); dim: even. Returns float32 (B, dim) in [-1, 1]."""
    share = torch.arange(dim // 2, device=t.device) / (dim // 2)  # (dim / 2,), from 0 to almost 1
    frequency = 10_000**-share  # from 1 radian per step down to almost 1/10000
    angle = t[:, None].float() * frequency  # (B, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)  # (B, dim)


def norm(channels):
    """Normalises 8 channels of a picture at a time to mean 0 and variance 1; scales and shifts.

    BatchNorm, over the whole batch, would mix pictures at many different t.
    """
    return nn.GroupNorm(channels // 8, channels)


def zero_init(layer):
    """Sets a layer to 0: the last one of each block below, and the last one of the network. So a
    block at first adds nothing: the network begins shallow, which is easier to train."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ATTENTION. A 3x3 convolution sees only neighbours. In attention every pixel has a query, a key and
# a value, vectors of d numbers. It receives a mean of all values, weighted by how well its query
# matches their keys:
#
#     softmax(q k^T / sqrt(d)) v                                      (Vaswani et al. 2017, Eq. 1)
#
# q k^T, a sum of d products, grows like sqrt(d). Without the division the softmax would put all
# weight on one key, and its gradient would be almost 0. Several heads do this side by side, so that
# a pixel can collect different things at once.
#
# The cost grows with the square of the number of places: 4096 pairs at 8x8, a million at 32x32. So
# larger sizes are first averaged to 8x8. (Without attention 92 % are right after 20 epochs, with it
# 90 %: at 4x4 convolutions see the whole picture, too. It stays because the paper has it.)


class Attention(nn.Module):
    """Multi-head self-attention, a residual block: (B, C, H, W) -> (B, C, H, W). width: size of
    queries, keys and values, all heads together."""

    def __init__(self, channels, width):
        super().__init__()
        self.heads = max(1, width // 32)  # so d = 32, or 16 at 32x32, where width is 16
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * width)
        self.out = zero_init(nn.Linear(width, channels))

    def forward(self, x):
        factor = max(1, x.shape[2] // 8)
        y = self.norm(F.avg_pool2d(x, factor))  # (B, C, h, w), h = H / factor
        h, w = y.shape[2:]
        y = self.qkv(y.flatten(2).transpose(1, 2))  # (B, M, 3 width), M = h w places
        y = y.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, M, d)
        q, k, v = y  # each (B, heads, M, d)
        weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)  # (B, heads, M, M)
        y = (weights @ v).transpose(1, 2).flatten(2)  # (B, M, width)
        y = self.out(y).transpose(1, 2).unflatten(2, (h, w))  # (B, C, h, w)
        return x + F.interpolate(y, scale_factor=float(factor))  # (B, C, H, W)


class ResBlock(nn.Module):
    """The residual block: (B, c_in, H, W) and a time vector (B, time_dim) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, time_dim, c_mid=None):
        super().__init__()
        c_mid = c_mid or c_out
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, padding=1)
        self.time = nn.Linear(time_dim, c_mid)
        self.norm2 = norm(c_mid)
        self.conv2 = zero_init(nn.Conv2d(c_mid, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_mid, H, W)
        h = h + self.time(time)[:, :, None, None]  # time: (B, c_mid, 1, 1)
        h = self.conv2(F.silu(self.norm2(h)))  # (B, c_out, H, W)
        return self.skip(x) + h  # (B, c_out, H, W)


class Up(nn.Module):
    """One level on the way up: (B, c_below, H, W) and a skip (B, c, 2H, 2W) -> (B, c, 2H, 2W)."""

    def __init__(self, c_below, c, time_dim, blocks):
        super().__init__()
        self.below = nn.Conv2d(c_below, c, 1)
        self.attention = Attention(c, c)
        self.blocks = nn.ModuleList([ResBlock(c, c, time_dim) for _ in range(blocks)])

    def forward(self, x, skip, time):
        x = F.interpolate(self.below(x), scale_factor=2.0)  # (B, c, 2H, 2W), each pixel becomes 2x2
        x = self.attention(x + skip)
        for block in self.blocks:
            x = block(x, time)
        return x


# THE U-NET. On the way down, height and width are halved and the channels grow. On the way up, each
# level also receives what the same level had on the way down, the skip connection. The two are
# added (Ho concatenates them). The sizes are ours: 2.5 million weights, where Ho has 35.7 million.
#
#     32x32  stem -- down ------------------------------- up -- out
#     16x16            down ----------------------- up
#      8x8               down --------------- up (three blocks: corners of shapes lie on this grid)
#      4x4                  middle (512 channels)
#
# The bottom tells what is in the picture, the skips exactly where. This is no question of size: the
# bottom has 8,192 numbers for 1,024 pixels. But each halving takes the mean of four pixels, in
# which edges and noise blur, and on the way up each pixel is only copied four times. To send every
# edge and the noise of every pixel through is more than the network learns: with the skips set to
# 0, no sample was right after 20 epochs, and three of four pixels were still grey.


def fast_bfloat16(device):
    """Whether "cpu" or "cuda" is fast in bfloat16: 16 bits, the range of float32, 2 to 3 digits."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # not in older torch
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


class UNet(nn.Module):
    """The network. channels: at 32x32, 16x16 and 8x8. bottleneck: at 4x4. narrow: inside the blocks
    and the attention there, as one conv from 512 to 512 has 2.4 million weights. time_dim: of the
    time vector, even. All numbers of channels are multiples of 8 and, above 32, of 32.
    """

    def __init__(self, channels=(16, 32, 128), bottleneck=512, narrow=64, time_dim=128):
        super().__init__()
        self.config = {"channels": tuple(channels), "bottleneck": bottleneck}
        self.config.update(narrow=narrow, time_dim=time_dim)
        (c1, c2, c3), c4, d = channels, bottleneck, time_dim
        # Two layers turn the sines and cosines into what the blocks use.
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.stem = nn.Conv2d(1, c1, 3, padding=1)
        self.down = nn.ModuleList([ResBlock(c1, c1, d), ResBlock(c1, c2, d), ResBlock(c2, c3, d)])
        self.middle1 = ResBlock(c3, c4, d, c_mid=narrow)
        self.attention = Attention(c4, narrow)
        self.middle2 = ResBlock(c4, c4, d, c_mid=narrow)
        self.up = nn.ModuleList([Up(c4, c3, d, 3), Up(c3, c2, d, 1), Up(c2, c1, d, 1)])
        self.norm = norm(c1)
        self.out = zero_init(nn.Conv2d(c1, 1, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # faster; shapes are still (B, C, H, W)

    def forward(self, x_t, t):
        """x_t: float32 (B, 1, 32, 32). t: int64 (B,) in 1..T. Returns float32 (B, 1, 32, 32)."""
        device = x_t.device.type
        # autocast: convolutions and matrix products in 16 bits, if that is fast.
        with torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
            time = self.time(time_embedding(t, self.config["time_dim"]))  # (B, time_dim)
            x = self.stem(x_t)  # (B, c1, 32, 32)
            skips = []
            for block in self.down:
                x = block(x, time)  # (B, c, H, W)
                skips.append(x)
                x = F.avg_pool2d(x, 2)  # (B, c, H/2, W/2)
            x = self.attention(self.middle1(x, time))  # (B, bottleneck, 4, 4)
            x = self.middle2(x, time)
            for level in self.up:
                x = level(x, skips.pop(), time)  # (B, c, 2H, 2W)
            return self.out(F.silu(self.norm(x))).float()  # (B, 1, 32, 32)


# ==== 8. Files ====================================================================================


def devices():
    """The names of the devices that are there, the best one first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name in there if there[name]] + ["cpu"]


def save(path, state):
    """Writes a dictionary to a file; raises OSError if it cannot, and the old file stays whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    Path(f"{path}.tmp").write_bytes(buffer.getbuffer())
    os.replace(f"{path}.tmp", path)


def load(path):
    """Reads what save wrote and runs no code in it; ends the program with one line if it cannot.
    Returns (state, model): the dictionary, and a UNet with the averaged weights, on the CPU."""
    try:
        with zipfile.ZipFile(path) as parts:  # what torch.save writes, with checksums
            if parts.testzip():
                raise ValueError("its checksums are wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = UNet(**state["config"])
        model.load_state_dict(state["ema"])
    except Exception as e:  # noqa: BLE001, a foreign file can be wrong in any way
        sys.exit(f"error: cannot load {path}: {repr(e)[:120]}")
    return state, model.requires_grad_(False)


# ==== 9. What to change for something else ========================================================
#
# 64x64 pictures: SIZE in shapes.py, 32 where x_T is drawn, a level on top in UNet. Its blocks
#   cost 4 times those at 32x32, its attention no more, as it works at 8x8. A shape of twice the
#   width remains visible under more noise: draw larger t.
# Colour: 3 channels in x_T, `stem` and `out`, and pictures (B, 3, 32, 32) in [-1, 1].
# Another schedule: `beta` in Schedule. For the cosine schedule (Nichol & Dhariwal 2021, arXiv
#   2102.09672, Eq. 17) alpha_bar_t = f(t) / f(0), f(t) = cos((t / T + 0.008) / 1.008 * pi / 2)^2;
#   beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, at most 0.1 (theirs: 0.999).
# "A triangle, please": class conditioning. nn.Embedding(4 + 1, time_dim) has a vector for each kind
#   and one for "any": mixed pictures, and a tenth of the rest. Add it to `time` in UNet.forward.
#   Sample with eps_any + w (eps_kind - eps_any), w > 1, which exaggerates what the kind changes:
#   classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

# ==== Look at it: python ddpm.py ==================================================================

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # a notebook may ask for a backend that is not installed
    from matplotlib.figure import Figure

    import shapes

    network = UNet()
    for name, part in [*network.named_children(), ("all", network)]:
        print(f"{name:<10}{sum(p.numel() for p in part.parameters()):>10,} parameters")

    schedule, generator = Schedule(), torch.Generator().manual_seed(0)
    x_0 = shapes.to_model(shapes.make_dataset(4, seed=0)[3:])  # (1, 1, 32, 32)
    eps = torch.randn(x_0.shape, generator=generator)
    times = (0, 50, 100, 200, 300, 400, 600, 800, 1000)
    figure = Figure(figsize=(12, 2), layout="constrained")
    for axes, t in zip(figure.subplots(1, len(times)), times):
        x_t = q_sample(schedule, x_0, torch.tensor([t]), eps)
        axes.imshow(x_t[0, 0], cmap="gray", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"t = {t}")
    figure.savefig("forward.png", dpi=100)

    # Forty walks of one pixel, with fresh noise (as Algorithm 2: nothing to clip) and without.
    x_T = torch.randn(40, 1, 1, 1, generator=generator)
    figure = Figure(figsize=(12, 3), layout="constrained")
    for axes, eta in zip(figure.subplots(1, 2, sharey=True), (1, 0)):
        stops = [*ddim(one_pixel(schedule), schedule, x_T, T, eta, generator)]
        walks = torch.stack([x.flatten() for _, x, _ in stops])  # (T + 1, 40)
        axes.plot([t for t, _, _ in stops], walks, linewidth=0.6)
        axes.set(xlim=(T, 0), xlabel="t", yticks=[-1, 1], title=f"$\\eta$ = {eta}")
    figure.savefig("pixel.png", dpi=100)
