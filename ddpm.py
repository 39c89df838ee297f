"""Denoising diffusion, from the idea to the code. Read it from top to bottom.

THE IDEA. Take a picture and add a little Gaussian noise. Repeat this a thousand times, until
nothing of the picture is left. This direction is easy. Then train a network for the way back: it
sees a noisy picture and guesses the noise in it. To draw a new picture, start from pure noise.
Remove a small part of the guessed noise, add a little less fresh noise, and guess again. After a
thousand such steps the noise has become a picture.

    x_0  ->  x_1  ->  x_2  ->  ...  ->  x_T      forward process q: fixed, adds noise
    x_0  <-  x_1  <-  x_2  <-  ...  <-  x_T      reverse process p: learned, removes noise

That is two algorithms. The rest of this file explains their letters and writes them in PyTorch:

    Algorithm 1: training                       Algorithm 2: sampling
    1  repeat                                   1  x_T ~ N(0, I)
    2    x_0 ~ the data                         2  for t = T, ..., 1:
    3    t ~ uniform in 1, ..., T               3    z ~ N(0, I) if t > 1, else z = 0
    4    eps ~ N(0, I)                          4    x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t)
    5    a gradient step on                              * eps_theta(x_t, t)) / sqrt(alpha_t)
           || eps - eps_theta(x_t, t) ||^2                + sigma_t z
    6  until converged                          6  return x_0

    with x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

eps_theta is the network, and theta its weights. ~ means "drawn from". N(0, I) is standard normal
noise: each pixel gets its own number, with mean 0 and variance 1.

The paper is Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv
2006.11239). "Eq. 4", "Algorithm 2" and "Ho, Section 4" refer to it, and the letters are the
paper's. The few things that are ours are marked BEYOND THE PAPER. A line that changes the shape of
a tensor ends with the new shape: B pictures in a batch, C channels, H x W pixels.

    python ddpm.py      prints the parts of the network, saves forward.png and pixel.png
"""

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

# ==== 1. Noise: from x_0 to x_t ===================================================================
#
# The pictures have 32x32 pixels, each -1 (background) or +1 (shape). The noise has variance 1, so
# the data should be of about this size. In 0...255 noise of variance 1 could not be seen. In 0...1
# shape and background would be only half as far apart, and would drown in the noise sooner.
#
# Step t mixes the picture with fresh noise of variance beta_t (Eq. 2; N(x; mean, variance) is the
# density of a Gaussian at x):
#
#     q(x_t | x_{t-1}) = N(x_t; sqrt(1 - beta_t) x_{t-1}, beta_t I)
#
# The factor sqrt(1 - beta_t) keeps a mean square of 1 at 1, since (1 - beta_t) + beta_t = 1. Without
# it the numbers would grow with every step. The betas are chosen by hand (Ho, Section 4): small at
# first, when little noise is enough to hide details, and larger later.
#
# We need not go through all steps to get x_t. A sum of independent Gaussians is a Gaussian, and
# variances add up. With alpha_t = 1 - beta_t, two steps are one:
#
#     x_2 = sqrt(alpha_2) x_1 + sqrt(1 - alpha_2) z'          with x_1 = sqrt(alpha_1) x_0 + ... z
#         = sqrt(alpha_2 alpha_1) x_0 + sqrt(alpha_2 (1 - alpha_1)) z + sqrt(1 - alpha_2) z'
#         = sqrt(alpha_2 alpha_1) x_0 + sqrt(1 - alpha_2 alpha_1) eps
#
# After t steps, alpha_bar_t = alpha_1 alpha_2 ... alpha_t takes the place of alpha_2 alpha_1 (Eq. 4):
#
#     x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
#
# Why a thousand small steps and not ten large ones? Because a small step can be undone by a
# Gaussian, which is easy to model. By Bayes' rule, as a function of x_{t-1},
#
#     log q(x_{t-1} | x_t) = - (x_t - sqrt(alpha_t) x_{t-1})^2 / (2 beta_t)  +  log q(x_{t-1})  + const
#
# If beta_t is small, the first term is a narrow parabola, and over its width the second is almost a
# straight line. A parabola plus a line is a parabola, so q(x_{t-1} | x_t) is almost a Gaussian. This
# holds for any data, also for pixels with two values. Only the single steps are Gaussian, not what
# a thousand of them lead to. (Section 4 shows it for one pixel.)

T = 1000


class Schedule:
    """beta; alpha = 1 - beta; alpha_bar, the product of all alphas up to t; one_minus_alpha_bar.

    All four are float32 (T + 1,), indexed by the paper's t: beta[1] belongs to the first step,
    beta[T] to the last, alpha_bar[0] = 1 to the clean picture.
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


def q_sample(schedule, x_0, t, eps):
    """Draws x_t from q(x_t | x_0), Eq. 4.

    x_0: float (B, 1, H, W) in [-1, 1]. t: int64 (B,), in 0..T. eps: standard normal float
    (B, 1, H, W). Returns x_t: float (B, 1, H, W).
    """
    signal, noise = schedule.signal_and_noise(t)
    return signal * x_0 + noise * eps


# At t = T nothing of the picture may be left, because sampling starts from pure noise. Here
# sqrt(alpha_bar_T) = 0.0064.

# ==== 2. What to learn ============================================================================
#
# Once x_t is given, Eq. 4 has two unknowns, x_0 and eps, and each gives the other:


def predict_x_0(schedule, x_t, t, eps):
    """Eq. 4 solved for x_0: the picture in x_t if eps is the noise. As q_sample, but t in 1..T."""
    signal, noise = schedule.signal_and_noise(t)
    return (x_t - noise * eps) / signal


# So a network that guesses the noise also guesses the picture. The paper lets it guess the noise
# (noise prediction). The loss is the mean squared error (Eq. 14, L_simple). Section 6 derives it.


def loss_fn(model, schedule, x_0, t, eps):
    """Eq. 14 for given t and eps, as a mean over pictures and pixels: a 0-d tensor.

    model: any function of x_t and t that guesses eps. x_0: float (B, 1, 32, 32) in [-1, 1].
    t: int64 (B,), in 1..T. eps: standard normal, (B, 1, 32, 32).
    """
    x_t = q_sample(schedule, x_0, t, eps)
    return F.mse_loss(model(x_t, t), eps)


# This is lines 2 to 5 of Algorithm 1, except for the draws of x_0, t and eps. The loop is in
# train.py.
#
# Which guess has the least squared error? Many pictures fit the same x_t. A single guess c for all
# of them has, with m for their mean, the error
#
#     E (x_0 - c)^2  =  E (x_0 - m)^2  +  (m - c)^2           E: the mean over all x_0 that fit x_t
#
# so c = m is best: the mean of all pictures that fit. At large t very many fit, and their mean is a
# grey blur. This is why we cannot go from noise to a picture in one step. A small step follows the
# guess only a little. Then fewer pictures fit, and the next guess is sharper. The same holds for
# eps, since it is a linear function of x_0 once x_t is given. An error in one is an error in the
# other:
#
#     (eps - eps_theta)^2  =  alpha_bar_t / (1 - alpha_bar_t) * (x_0 - guess of x_0)^2        (Eq. 4)
#
# The factor is the signal-to-noise ratio. So a loss in eps counts an error in x_0 much where the
# picture can be seen, and little where it can only be a blur.


def draw_t(n, generator, device="cpu"):
    """Draws n values of t for training: int64 (n,), in 1..T, mostly near T / 2.

    BEYOND THE PAPER: each is the mean of two uniform draws (rounded down). The picture is decided
    in the middle. The paper's uniform t is torch.randint(1, T + 1, (n,)).
    """
    two = torch.randint(1, T + 1, (2, n), generator=generator, device=device)
    return two.sum(0) // 2  # (n,)


# ==== 3. Back: from x_t to x_{t-1} ================================================================
#
# If x_0 were known, we would know two things about x_{t-1}: by Eq. 4 it lies around
# sqrt(alpha_bar_{t-1}) x_0, and by Eq. 2 x_t came from it. Bayes' rule multiplies the two:
#
#     q(x_{t-1} | x_t, x_0)  ~  q(x_{t-1} | x_0)  q(x_t | x_{t-1})                  (the posterior)
#
#     as functions of x_{t-1}        centre                            variance
#     q(x_{t-1} | x_0)               sqrt(alpha_bar_{t-1}) x_0         1 - alpha_bar_{t-1}
#     q(x_t | x_{t-1})               x_t / sqrt(alpha_t)               beta_t / alpha_t
#
# A product of Gaussians is a Gaussian. Its 1 / variance is the sum of theirs, and its centre is the
# mean of theirs, weighted by 1 / variance. This gives (Eq. 7)
#
#     mu = [ sqrt(alpha_bar_{t-1}) beta_t x_0
#          + sqrt(alpha_t) (1 - alpha_bar_{t-1}) x_t ] / (1 - alpha_bar_t)
#     beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
#
# We do not know x_0, but the network's guess of it is the mean of all x_0 that fit x_t. As mu is
# linear in x_0, this gives the mean of x_{t-1}. To write mu with eps, put x_0 of Eq. 4 into Eq. 7:
#
#     factor of eps:  - sqrt(alpha_bar_{t-1} / alpha_bar_t) beta_t / sqrt(1 - alpha_bar_t)
#                     = - beta_t / sqrt(1 - alpha_bar_t) / sqrt(alpha_t)
#     factor of x_t:  [ beta_t / sqrt(alpha_t) + sqrt(alpha_t) (1 - alpha_bar_{t-1}) ]
#                     / (1 - alpha_bar_t)  =  1 / sqrt(alpha_t)
#             since   beta_t + alpha_t (1 - alpha_bar_{t-1}) = 1 - alpha_bar_t
#
#     mu = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t)                       (Eq. 11)
#
# A step back takes this mean and adds noise: the mean of all x_{t-1} that fit has less noise in it
# than the network expects at t - 1. The step removes more noise than it adds.


def ddpm_step(schedule, x_t, t, eps, z):
    """Line 4 of Algorithm 2: x_{t-1} = mu(x_t, eps) + sigma_t z, with mu of Eq. 11.

    x_t, eps, z: float (B, 1, H, W); t: int in 1..T. Returns x_{t-1}: (B, 1, H, W).
    """
    beta, alpha = schedule.beta[t], schedule.alpha[t]
    var_t, var_before = schedule.one_minus_alpha_bar[t], schedule.one_minus_alpha_bar[t - 1]
    mu = (x_t - beta / var_t.sqrt() * eps) / alpha.sqrt()
    # The paper tries sigma_t^2 = beta_tilde_t (Eq. 7), right if the data is a single picture, and
    # sigma_t^2 = beta_t, right if the data is standard normal (Ho, Section 3.2). They differ only at
    # small t: beta_tilde_t / beta_t is 0.98 at t = 100 and 0.85 at t = 10. We take the first. At
    # t = 1 it is 0, so the last step adds no noise, as line 3 demands.
    beta_tilde = var_before / var_t * beta
    return mu + beta_tilde.sqrt() * z


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
        eps = model(x, times)
        yield t, x, predict_x_0(schedule, x, times, eps)
        z = torch.randn(x.shape, generator=generator).to(x.device)
        x = ddpm_step(schedule, x, t, eps, z)  # now x is x_{t-1}
    yield 0, x, x


# This is DDPM, complete. Everything below answers a question: does it work (4), must it be a
# thousand steps (5), why this loss (6), and what is the network (7)?

# ==== 4. One pixel, by hand =======================================================================
#
# Let the data be a single pixel: -1 or +1, each half of the time. Then no network is needed. Given
# x_t, Bayes' rule on Eq. 4 says how likely +1 is, and the mean of x_0 follows:
#
#     p(+1) / p(-1) = exp( 2 sqrt(alpha_bar_t) x_t / (1 - alpha_bar_t) )
#     mean of x_0 = p(+1) - p(-1) = tanh( sqrt(alpha_bar_t) x_t / (1 - alpha_bar_t) )


def one_pixel(schedule):
    """The perfect network for data of independent pixels, -1 or +1: a function of x_t and t.

    It takes x_t (B, 1, H, W) and t (B,), and returns its guess of eps, (B, 1, H, W).
    """

    def perfect(x_t, t):
        signal, noise = schedule.signal_and_noise(t)
        x_0 = torch.tanh(signal * x_t / noise**2)
        return (x_t - signal * x_0) / noise  # Eq. 4 solved for eps

    return perfect


# Put into Algorithm 2, it sends every walk to exactly -1 or +1, half of them to each: pixel.png
# (python ddpm.py) shows forty. A thousand Gaussian steps make a distribution with two values. Three
# things can be read off it.
#
# What decides between -1 and +1? The fresh noise z. At large t both fit x_t, and the guess is near
# 0. Then z moves x_t a little to one side, the guess follows, and that decides. Of the walks, 50 %
# end on the side where x_T was: Algorithm 2 forgets its starting noise.
#
# What can no network know? Even this perfect one has a loss, and no training can reduce it:
#
#     t                             100    200    300    400    500    600    700   1000
#     loss (Eq. 14)               0.044   0.47   0.38   0.19  0.079  0.026  0.007  0.00004
#     squared error of x_0        0.005   0.24   0.58   0.80   0.92   0.98   0.99   1.00
#
# At small t the pixel can be seen, and both errors are small. At large t it cannot be seen: the
# guess is 0 and its squared error 1. But there x_t is almost nothing but eps, so eps is easy, and
# the loss is small again: at t = T it is the signal-to-noise ratio, 0.00004. So the loss is never
# 0, and it is largest in the middle, where the picture is decided. That is why draw_t draws most t
# there. For a trained network and whole pictures (python train.py, 100 epochs):
#
#     TABLE
#
# May one start later, from pure noise at t = 500? START500

# ==== 5. Fewer steps ==============================================================================
#
# A thousand steps take time, but each has to be small for its Gaussian to be right (section 1).
# Song, Meng & Ermon, "Denoising Diffusion Implicit Models" (2021, arXiv 2010.02502; DDIM), noticed
# that Eq. 14 uses q(x_t | x_0) and never the path from x_0 to x_t. So the same trained network can
# jump from t to any smaller s: guess x_0 and eps, and mix them again as Eq. 4 does at s. Of the
# noise variance at s, 1 - alpha_bar_s, a part sigma^2 may be fresh (their Eq. 12 and Eq. 16; they
# write alpha for Ho's alpha_bar):
#
#     x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z
#     sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)
#
# With eta = 1 and s = t - 1, sigma^2 is beta_tilde_t, and this is Algorithm 2 again. With eta = 0
# nothing is random after x_T. Then x_T decides: of the one-pixel walks 100 % end on the side where
# x_T was, and pixel.png shows that they never cross.


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


# Why is the guess of x_0 clipped to [-1, 1] below? Eq. 4 divides by sqrt(alpha_bar_t), so at t = T
# an error in eps is 157 times as large in x_0. A small step takes little of that x_0: in Eq. 7 its
# factor at t = T is 0.0001. A long step takes much more. Ho's own program clips, too: it guesses
# x_0, clips it, and takes the mean of Eq. 7. Where the clip changes the guess, Eq. 7 and Eq. 11 no
# longer give the same mean. algorithm_2 above is Eq. 11, without a clip, as printed in the paper.


@torch.no_grad()
def ddim(model, schedule, x_T, steps, eta=1.0, generator=None):
    """DDIM in `steps` steps, 1..T, with eta from 0 to 1. Otherwise as algorithm_2.

    Raises ValueError, on the first next(), as timesteps does.
    """
    x = x_T
    for t, s in pairwise(timesteps(steps)):
        times = torch.full((len(x),), t, device=x.device)  # (B,)
        x_0 = predict_x_0(schedule, x, times, model(x, times)).clamp(-1, 1)
        yield t, x, x_0
        z = torch.randn(x.shape, generator=generator).to(x.device)
        x = ddim_step(schedule, x, t, s, x_0, z, eta)  # now x is x_s
    yield 0, x, x


def walk(model, schedule, x_T, steps=T, eta=1.0, generator=None):
    """Algorithm 2 if steps = T and eta = 1, otherwise DDIM: yields as they do."""
    if steps == T and eta == 1:
        return algorithm_2(model, schedule, x_T, generator)
    return ddim(model, schedule, x_T, steps, eta, generator)


def sample(model, schedule, x_T, steps=T, eta=1.0, generator=None):
    """The pictures at the end of the walk: (B, 1, H, W), close to -1 and +1."""
    for _, x, _ in walk(model, schedule, x_T, steps, eta, generator):
        pass
    return x


# ==== 6. Why this loss: the variational bound =====================================================
#
# The aim is maximum likelihood: p(x_0) should be large for the pictures that we have. The model is
# the reverse process (Eq. 1),
#
#     p(x_0, ..., x_T) = p(x_T) p(x_{T-1} | x_T) ... p(x_0 | x_1)
#     p(x_{t-1} | x_t) = N(x_{t-1}; mu_theta(x_t, t), sigma_t^2 I)
#
# and p(x_0) is its integral over all paths x_1, ..., x_T, which cannot be computed. A bound can.
# With E for the mean over the paths that q draws from x_0:
#
#     -log p(x_0) = -log E [ p(x_0, ..., x_T) / q(x_1, ..., x_T | x_0) ]
#                <= E [ -log p(x_0, ..., x_T) / q(x_1, ..., x_T | x_0) ] =: L               (Eq. 3)
#
# since -log of a mean is at most the mean of -log (Jensen's inequality). L is the variational
# bound; -L is called ELBO, the evidence lower bound. By Bayes' rule q can be written backwards,
#
#     q(x_1, ..., x_T | x_0) = q(x_T | x_0) q(x_{T-1} | x_T, x_0) ... q(x_1 | x_2, x_0)
#
# with the posterior of section 3 in each factor but the first. Now numerator and denominator match
# factor by factor, and the logarithm makes a sum of them (Eq. 5). KL(q || p), the mean of log q -
# log p over q, measures how far p is from q:
#
#     L = E [ KL(q(x_T | x_0) || p(x_T))                              L_T: nothing to learn
#             + sum over t > 1 of
#               KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))         L_{t-1}
#             - log p(x_0 | x_1) ]                                    L_0
#
# For two Gaussians with fixed variances only the distance of the means counts (Eq. 8):
#
#     L_{t-1} = E || mu - mu_theta ||^2 / (2 sigma_t^2) + const
#
# Both means follow from x_t and eps by Eq. 11, one with the true eps and one with the guess. So x_t
# cancels (Eq. 12):
#
#     L_{t-1} = w_t E || eps - eps_theta(x_t, t) ||^2 + const
#     w_t = beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t))
#         = beta_t / (2 alpha_t (1 - alpha_bar_{t-1}))                with sigma_t^2 = beta_tilde_t
#
# w_t falls from 0.6 at t = 2 to 0.005 at t = 350 and rises to 0.01 at T. And t = 1? The pixels have
# separate values, so L_0 is -log of the probability that N(mu_theta(x_1, 1), sigma_1^2) falls into
# the bin around the true value (Eq. 13). With a density times the width of the bin in place of the
# integral, this is again a squared error of the mean, so by Eq. 11 again || eps - eps_theta ||^2
# times a factor.
#
# Eq. 14 drops all factors and keeps the squares, for t = 1, ..., T. At each t the best guess is the
# same, whatever the factor: the factors only say where to try hardest. At small t, where w_t is
# large, the noise is too faint to be seen. Eq. 14 leaves more of the effort for larger t, where
# pictures take shape. The samples are better, the bound is worse (Ho, Section 3.4 and Table 2).
#
# One more name for the same thing: the score, the gradient of log q(x_t) with respect to x_t. It is
# -E[eps] / sqrt(1 - alpha_bar_t), so a network that predicts noise has learned the score (Ho,
# Section 3.2; Song & Ermon 2019, arXiv 1907.05600).

# ==== 7. The network ==============================================================================
#
# eps_theta is a U-Net: it goes down to 4x4 pixels, to see the whole picture, and up again to 32x32.
# The parts first.
#
# THE TIME. One network serves all t, so it must know t: a bright speck is noise at t = 900 and part
# of the picture at t = 5. A single input number would be hard to use, since t and t + 1 differ by a
# thousandth of its range. Instead t is encoded by sines and cosines of many frequencies (Vaswani et
# al. 2017, "Attention is all you need", Section 3.5). High frequencies tell t from t + 1, low ones
# tell early from late.


def time_embedding(t, dim):
    """Sines and cosines of t. t: int64 (B,); dim: even. Returns float32 (B, dim) in [-1, 1]."""
    # From 1 radian per step down to almost 1/10000, each a fixed factor below the one before.
    share = torch.arange(dim // 2, device=t.device) / (dim // 2)  # (dim / 2,), from 0 to almost 1
    frequency = torch.exp(-math.log(10_000) * share)
    angle = t[:, None].float() * frequency  # (B, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)  # (B, dim)


class Norm(nn.GroupNorm):
    """Normalises 8 channels at a time to mean 0 and variance 1, then scales and shifts (learned).

    Over one picture and not, as BatchNorm, over the batch: in training a batch mixes all t, in
    sampling all pictures have the same t. (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels):
        super().__init__(channels // 8, channels)

    def forward(self, x):
        # Sums over many pixels need 32 bits, also where the network computes in 16 (see UNet).
        return super().forward(x.float()).to(x.dtype)


def zero_init(layer):
    """Sets a layer to 0. Used for the last layer of each f in x + f(x) below, so that each block
    begins by passing on its input, and for the last layer of the network, so that its first guess
    is 0. A deep network that begins like a shallow one is easier to train.
    """
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ATTENTION. A 3x3 convolution sees only neighbours, but which shape a pixel belongs to is decided
# far away. With attention each pixel has a query, a key and a value, vectors of d numbers, and
# receives a mean of all values, weighted by how well its query matches their keys:
#
#     softmax(q k^T / sqrt(d)) v                              (Vaswani et al. 2017, Eq. 1)
#
# q k^T is a sum of d products and typically grows like sqrt(d). Without the division the softmax
# would put all weight on one key, and its gradient would be almost 0. Several "heads" do this side
# by side, so that a pixel can collect different things at once.
#
# The cost grows with the square of the number of places: 4096 pairs at 8x8, a million at 32x32. So
# at larger sizes blocks of pixels are averaged, and attention works on 8x8 places. (Here it brings
# no more right pictures: 4x4 is so small that convolutions see all of it. It stays because larger
# pictures need it, and the paper has it.)

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
        self.out = zero_init(nn.Linear(width, channels))

    def forward(self, x):
        block = max(1, x.shape[2] // ATTENTION_SIDE)
        y = self.norm(F.avg_pool2d(x, block))  # (B, C, h, w), h = H / block
        h, w = y.shape[2:]
        y = self.qkv(y.flatten(2).transpose(1, 2))  # (B, M, 3 width), M = h w places
        y = y.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, M, d)
        q, k, v = y  # each (B, heads, M, d)
        weights = self.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]))  # (B, heads, M, M)
        y = (weights @ v).transpose(1, 2).flatten(2)  # (B, M, width)
        y = self.out(y).transpose(1, 2).unflatten(2, (h, w))  # (B, C, h, w)
        return x + F.interpolate(y, scale_factor=float(block))  # (B, C, H, W)


# THE RESIDUAL BLOCK. Most of the work is done here: norm, SiLU (x * sigmoid(x)), 3x3 convolution,
# twice, and the result is added to the input. Between the two convolutions the time comes in, one
# number per channel, so that every block can act differently at each t.


class ResBlock(nn.Module):
    """(B, c_in, H, W) and a time vector (B, time_dim) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, time_dim, c_mid=None):
        super().__init__()
        c_mid = c_mid or c_out
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, padding=1)
        self.time = nn.Linear(time_dim, c_mid)
        self.norm2 = Norm(c_mid)
        self.conv2 = zero_init(nn.Conv2d(c_mid, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_mid, H, W)
        h = h + self.time(time)[:, :, None, None]  # time: (B, c_mid, 1, 1)
        h = self.conv2(F.silu(self.norm2(h)))  # (B, c_out, H, W)
        return self.skip(x) + h  # (B, c_out, H, W)


# THE U-NET. On the way down each level halves height and width and has more channels. On the way up
# each level also receives what the same level had on the way down, the skip connection. The two are
# added (Ho concatenates them, which takes more weights).
#
#     32x32  stem -- down ------------------------------- up -- out
#     16x16            down ----------------------- up
#      8x8               down --------------- up (three blocks)
#      4x4                  middle (512 channels)
#
# The bottom says what is in the picture, the skips say exactly where. The bottom cannot: it has
# 8,192 numbers for 1,024 pixels, which is enough, but to get there each level averaged 2x2 pixels,
# and which of the four had what is lost. And eps, the output, is different at every pixel.
# NOSKIP
#
# One place at 8x8 is 4x4 pixels of the picture. Sizes and positions of all shapes are multiples of
# 4 pixels, so a place at 8x8 is the unit of which shapes are made. Most of the work is done there.


class Middle(nn.Module):
    """The bottom: (B, c_in, 4, 4) -> (B, bottleneck, 4, 4).

    A 3x3 convolution from 512 to 512 channels has 2.4 million weights. So the blocks here have few
    channels inside: 512 -> 64 -> 512 takes 0.6 million.
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
        self.below = nn.Conv2d(c_below, c, 1)
        self.attention = Attention(c, c)
        self.blocks = nn.ModuleList([ResBlock(c, c, time_dim) for _ in range(blocks)])

    def forward(self, x, skip, time):
        x = F.interpolate(self.below(x), scale_factor=2.0)  # (B, c, 2H, 2W), each pixel becomes 2x2
        x = self.attention(x + skip)
        for block in self.blocks:
            x = block(x, time)
        return x


@torch.compiler.assume_constant_result
def fast_bfloat16(device):
    """Whether "cpu", "cuda" or "mps" computes quickly in bfloat16: 16 bits per number, with the
    range of float32 and 2 to 3 digits. (mps was not tried, so False; so is a CPU on old torch.)"""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        can = torch.cpu.get_capabilities()
        return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    return False


class UNet(nn.Module):
    """The network: it guesses eps.

    channels: at 32x32, 16x16 and 8x8. bottleneck: at 4x4. narrow: inside the parts of Middle.
    time_dim: size of the time vector, even. All numbers of channels are multiples of 8 and, above
    32, of 32.
    """

    def __init__(self, channels=(16, 32, 128), bottleneck=512, narrow=64, time_dim=128):
        super().__init__()
        self.config = dict(
            channels=tuple(channels), bottleneck=bottleneck, narrow=narrow, time_dim=time_dim
        )
        c1, c2, c3 = channels
        d = time_dim
        # Two layers turn the sines and cosines into what the blocks use.
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.stem = nn.Conv2d(1, c1, 3, padding=1)
        self.down = nn.ModuleList([ResBlock(c1, c1, d), ResBlock(c1, c2, d), ResBlock(c2, c3, d)])
        self.middle = Middle(c3, bottleneck, narrow, d)
        self.up = nn.ModuleList(
            [Up(bottleneck, c3, d, blocks=3), Up(c3, c2, d, blocks=1), Up(c2, c1, d, blocks=1)]
        )
        self.norm = Norm(c1)
        self.out = zero_init(nn.Conv2d(c1, 1, 3, padding=1))
        # Channels last: all channels of a pixel lie side by side in memory, which makes the
        # convolutions faster. Shapes are still written (B, C, H, W).
        self.to(memory_format=torch.channels_last)

    def forward(self, x_t, t):
        """x_t: float32 (B, 1, 32, 32). t: int64 (B,) in 1..T. Returns float32 (B, 1, 32, 32)."""
        device = x_t.device.type
        # autocast computes products and convolutions in 16 bits, which is faster. The weights stay
        # float32.
        with torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
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
            return self.out(F.silu(self.norm(x))).float()  # (B, 1, 32, 32)


# ==== 8. Files ====================================================================================


def pick_device(name):
    """The device of this name; for "auto" the first of cuda, mps and cpu that is there."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:  # AssertionError: torch was built without CUDA
        sys.exit(f"error: --device {name}: {str(e).splitlines()[0]}")
    return name


def save(path, state):
    """Writes a dictionary to a file: under another name first, so that the old file stays whole.

    Raises OSError if it cannot be written.
    """
    half = Path(f"{path}.tmp")
    with open(half, "wb") as file:
        torch.save(state, file)
    os.replace(half, path)


def load(path):
    """Reads what save wrote and runs no code in it; ends the program with one line if it cannot.

    Returns (state, model): the dictionary, and a UNet with the averaged weights, on the CPU.
    """
    try:
        with zipfile.ZipFile(path) as parts:  # what torch.save writes, with checksums
            if parts.testzip():
                raise ValueError("its checksums are wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = UNet(**state["config"])
        model.load_state_dict(state["ema"])
    except Exception as e:  # noqa: BLE001, a foreign file can be wrong in any way
        sys.exit(f"error: cannot load {path}: {type(e).__name__}: {str(e).splitlines()[0]}")
    return state, model.requires_grad_(False)


# ==== 9. What to change for something else ========================================================
#
# 64x64 pictures: SIZE in shapes.py and one more level in UNet (`channels`, `down`, `up`). Four times
#   the pixels cost four times as much at each level; attention stays at 8x8 places and costs the
#   same. A shape of twice the width remains visible under more noise: draw larger t.
# Colour: 3 channels in `stem`, in `out` and in x_T (train.py, sample.py), and pictures (B, 3, 32,
#   32) in [-1, 1]. Nothing in this file needs pixels to be -1 or +1, except section 4.
# Another schedule: `beta` in Schedule. For the cosine schedule of Nichol & Dhariwal 2021 (arXiv
#   2102.09672, Eq. 17) alpha_bar_t = f(t) / f(0), f(t) = cos((t / T + 0.008) / 1.008 * pi / 2)^2;
#   beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, at most 0.1. (Theirs is at most 0.999, which needs
#   Eq. 7 with a clipped x_0: at t = T predict_x_0 would magnify an error 20,000 times.)
# "A triangle, please": class conditioning. A vector for each kind, nn.Embedding(4 + 1, time_dim),
#   is added to `time` in UNet.forward. Draw one shape per picture and pass its kind to the network.
#   Train a tenth of the pictures with the fifth vector, "any kind". In sampling run the network
#   twice and use eps_any + w (eps_kind - eps_any) with w > 1, which exaggerates what the kind
#   changes: classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

# ==== Look at it: python ddpm.py ==================================================================


def count(module):
    """The number of parameters of a part of the network."""
    return sum(p.numel() for p in module.parameters())


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
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    for axes, t, picture in zip(top.subplots(1, len(times)), times.tolist(), pictures):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"t = {t}")
        axes.set_xlabel(f"$\\bar\\alpha_t$ = {schedule.alpha_bar[t]:.2g}")
    left, right = bottom.subplots(1, 2)
    left.plot(schedule.alpha_bar, label="$\\bar\\alpha_t$")
    left.plot(range(1, T + 1), schedule.snr(), label="signal-to-noise ratio")
    left.axhline(1, color="gray", linewidth=0.8)
    left.set(xlabel="t", yscale="log")
    left.legend()
    right.imshow(time_embedding(torch.arange(T + 1), 128).T, cmap="gray", aspect="auto")
    right.set(xlabel="t", title="time embedding", yticks=[32, 96], yticklabels=["sine", "cosine"])
    figure.savefig(path, dpi=100)


def save_one_pixel(path):
    """Draws forty walks of section 4, with all fresh noise and with none."""
    from matplotlib.figure import Figure

    schedule, generator = Schedule(), torch.Generator().manual_seed(0)
    x_T = torch.randn(40, 1, 1, 1, generator=generator)
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, eta in zip(figure.subplots(1, 2, sharey=True), (1, 0)):
        stops = list(walk(one_pixel(schedule), schedule, x_T, eta=eta, generator=generator))
        lines = torch.stack([x.flatten() for _, x, _ in stops])  # (T + 1, 40)
        axes.plot(range(T, -1, -1), lines, linewidth=0.6)
        axes.set(xlim=(T, 0), xlabel="t", title=f"one pixel, $\\eta$ = {eta}", yticks=[-1, 1])
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    network = UNet()
    for name, part in network.named_children():
        print(f"{name:<8}{count(part):>12,} parameters")
    print(f"{'all':<8}{count(network):>12,} parameters")
    save_forward_process("forward.png")
    save_one_pixel("pixel.png")
    print("saved forward.png and pixel.png")
