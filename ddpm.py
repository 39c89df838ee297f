"""Denoising diffusion, from the idea to the code. Read it from top to bottom.

THE IDEA. Take a picture and add a little Gaussian noise, a thousand times, until nothing of the
picture is left. That direction is easy. For the way back, train a network: it sees a noisy picture
and how many times noise was added, and guesses the noise. To draw a new picture, start from pure
noise, take away a little of the guessed noise, add some fresh noise, and guess again.

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
    ε        eps                  the noise in x_t before it is scaled: from N(0, I), so each pixel
                                  has a Gaussian number of its own, with mean 0 and variance 1
    ε_θ      eps_theta            the noise that the network guesses, with its weights θ
    β_t      beta                 the variance of the noise that step t adds
    α_t, ᾱ_t alpha, alpha_bar     1 - β_t, and the product α_1 α_2 ... α_t
    1 - ᾱ_t  one_minus_alpha_bar  the variance of all noise in x_t
    z, σ_t   z, sigma             the fresh noise of a step back, and its standard deviation

The paper is Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv
2006.11239); the numbers of equations are its own. A line that changes the shape of a tensor ends
with the new shape: B pictures in a batch, C channels, H x W pixels.

    python ddpm.py      prints numbers of sections 4 and 5, saves forward.png and pixel.png
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# ==== 1. Noise: from x_0 to x_t ===================================================================
# Our pictures show one to three shapes (shapes.py) on 32x32 pixels, each of them -1 (background) or
# +1 (shape). A pixel's mean square is then 1, the variance of the noise.
#
# Step t shrinks the picture a little and adds noise of variance β_t:
#
#     q(x_t | x_{t-1}) = N(x_t; √(1 - β_t) x_{t-1}, β_t I)                                   (Eq. 2)
#
# where N(x; mean, variance) is the density of a Gaussian at x. The factor √(1 - β_t) keeps the
# size: a mean square of 1 becomes (1 - β_t) + β_t = 1. The β_t are chosen by hand (Ho, Section 4):
# small at first, when a little noise hides a detail, and larger later.
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
# At t = T the factor of x_0 is 0.0064, so sampling can start from pure noise. Another β with this
# end changes no formula below, only how steps and training are spread over the levels of noise.

T = 1000


class Schedule:
    """beta, alpha, alpha_bar, one_minus_alpha_bar; snr = alpha_bar / one_minus_alpha_bar, inf at 0.

    All float32 (T + 1,), indexed by the paper's t: beta[1] is of the first step, alpha_bar[0] = 1
    of the clean picture. Computed in float64: float32 would make 1 - alpha_bar[1] wrong by 0.02 %.
    """

    def __init__(self, device="cpu"):
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)  # (T,)
        beta = F.pad(beta, (1, 0))  # (T + 1,), with beta[0] = 0
        alpha_bar = (1 - beta).cumprod(0)
        self.beta = beta.float().to(device)
        self.alpha = (1 - beta).float().to(device)
        self.alpha_bar = alpha_bar.float().to(device)
        self.one_minus_alpha_bar = (1 - alpha_bar).float().to(device)
        self.snr = (alpha_bar / (1 - alpha_bar)).float().to(device)

    def signal_and_noise(self, t):
        """√ᾱ_t and √(1 - ᾱ_t), the factors of Eq. 4. t: int64 (B,), in 0..T. Two (B, 1, 1, 1)."""
        signal, noise = self.alpha_bar[t].sqrt(), self.one_minus_alpha_bar[t].sqrt()  # (B,) each
        return signal.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)  # (B, 1, 1, 1) each


def q_sample(schedule, x_0, t, eps):
    """Draws x_t from q(x_t | x_0), Eq. 4: float32 (B, C, H, W).

    x_0: float32 (B, C, H, W) in [-1, 1]. t: int64 (B,), in 0..T. eps: from N(0, I), as large.
    """
    signal, noise = schedule.signal_and_noise(t)
    return signal * x_0 + noise * eps


# ==== 2. What to learn, and Algorithm 1 ===========================================================
# Once x_t is given, each of x_0 and ε gives the other. So a network that guesses the noise (noise
# prediction) guesses the picture, too. Guessing the noise gave the paper's best samples (Ho, Table
# 2 and Section 3.2). The loss is the squared error of the guess; section 5 says why.
def predict_x_0(schedule, x_t, t, eps_theta):
    """Eq. 4 solved for x_0: x_0_hat, float32 (B, C, H, W), as x_t and eps_theta. t: (B,), 0..T."""
    signal, noise = schedule.signal_and_noise(t)
    return (x_t - noise * eps_theta) / signal


def loss_fn(model, schedule, x_0, t, eps):
    """L_simple (Eq. 14) for given t and ε, as a mean over pictures and pixels: a 0-d tensor.

    model: anything that is called as model(x_t, t) and returns a guess of eps.
    x_0: float32 (B, C, H, W) in [-1, 1]. t: int64 (B,), in 1..T. eps: from N(0, I), as large.
    """
    x_t = q_sample(schedule, x_0, t, eps)
    return F.mse_loss(model(x_t, t), eps)


# What does a network learn from this loss? At each t the errors of ε and x_0 are proportional (Eq.
# 4), so look at x_0. Many pictures could be behind the same x_t, some more likely than others. A
# guess c has the expected squared error
#
#     E[ ‖x_0 - c‖² | x_t ] = E[ ‖x_0 - m‖² | x_t ] + ‖m - c‖²           with m = E[ x_0 | x_t ]
#
# and is best at c = m, the posterior mean: the average of all pictures that could be behind x_t, by
# their probability. At large t that is a grey blur, so a single step from noise is not enough.
#
# The loss is meant for every t, but no picture needs all thousand at once. One t for each, drawn at
# random, gives the same gradient on average, and many more pictures in the same time.
def uniform_t(n, generator):
    """Line 3 of Algorithm 1: n independent t, int64 (n,), uniform in 1..T."""
    return torch.randint(1, T + 1, (n,), generator=generator)  # (n,)


def algorithm_1(model, schedule, optimizer, x_0, generator, draw_t=uniform_t):
    """One round of Algorithm 1, with x_0 of line 2: changes the weights. Returns the loss, 0-d.

    model, x_0: as for loss_fn. optimizer: of the weights of model. generator: on the CPU, so that a
    seed means the same noise on every device. draw_t: called as draw_t(n, generator).
    """
    t = draw_t(len(x_0), generator).to(x_0.device)  # line 3: (B,)
    eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)  # line 4
    loss = loss_fn(model, schedule, x_0, t, eps)  # line 5: ‖ε - ε_θ‖²
    optimizer.zero_grad()  # line 5
    loss.backward()  # line 5: ∇_θ
    optimizer.step()  # line 5: the step
    return loss.detach()


# ==== 3. Back: from x_t to x_{t-1}, and Algorithm 2 ===============================================
# If x_0 were known, we would know two things about x_{t-1}: it was made from x_0 (Eq. 4), and x_t
# was made from it (Eq. 2). By Bayes' rule, and as step t does not look at x_0 (the Markov property:
# q(x_t | x_{t-1}, x_0) = q(x_t | x_{t-1})), the posterior of x_{t-1} is, up to a constant,
#
#     q(x_{t-1} | x_t, x_0)  ∝  q(x_{t-1} | x_0)  q(x_t | x_{t-1})
#
#     factor               its centre, as a function of x_{t-1}   its variance
#     q(x_{t-1} | x_0)     √ᾱ_{t-1} x_0                           1 - ᾱ_{t-1}
#     q(x_t | x_{t-1})     x_t / √α_t                             β_t / α_t
#
# A product of two Gaussians is a Gaussian. Its 1/variance is the sum of theirs, and its centre, the
# posterior mean of x_{t-1}, is the average of theirs, weighted by 1/variance. With
# β_t + α_t (1 - ᾱ_{t-1}) = 1 - ᾱ_t this gives
#
#     μ̃_t(x_t, x_0) = √ᾱ_{t-1} β_t/(1 - ᾱ_t) x_0 + √α_t (1 - ᾱ_{t-1})/(1 - ᾱ_t) x_t          (Eq. 7)
#     β̃_t = (1 - ᾱ_{t-1})/(1 - ᾱ_t) β_t
#
# We do not know x_0. But μ̃_t is linear in it, so putting in E[x_0 | x_t] gives E[x_{t-1} | x_t].
# So the network's guess goes there. As x_0 = (x_t - √(1 - ᾱ_t) ε)/√ᾱ_t by Eq. 4, the factors become
#
#     of ε:    - √ᾱ_{t-1} β_t/(1 - ᾱ_t) √(1 - ᾱ_t)/√ᾱ_t  =  - β_t/√(1 - ᾱ_t) / √α_t
#     of x_t:  (β_t/√α_t + √α_t (1 - ᾱ_{t-1})) / (1 - ᾱ_t)  =  1/√α_t
#
#     μ_θ(x_t, t) = 1/√α_t (x_t - β_t/√(1 - ᾱ_t) ε_θ(x_t, t))                               (Eq. 11)
#
# A step back draws from a Gaussian around this mean. Why does it not just take the mean? In a mean
# noise averages out, but the network was trained on x_{t-1} with all of its noise. So the step puts
# back noise that the average lost, as fresh noise σ_t z. Without it samples are empty (README,
# exercise 2). The paper tries σ_t² = β_t, right if the data is N(0, I), and σ_t² = β̃_t, right if it
# is one single picture (Ho, Section 3.2). They differ mainly at small t: β̃_t/β_t is 0.98 at
# t = 100, 0.85 at t = 10, and 0 at t = 1. We take β̃_t: the last step adds no noise, as line 3 says.
@torch.no_grad()
def algorithm_2(model, schedule, x_T, generator):
    """Algorithm 2. Yields (t, x_t) for t = T, ..., 0: first x_T as given, last the samples x_0.

    model: as for loss_fn. x_T: standard normal, float32 (B, C, H, W). generator: on the CPU.
    """
    one_minus = schedule.one_minus_alpha_bar  # (T + 1,)
    x_t = x_T  # line 1
    yield T, x_t
    for t in range(T, 0, -1):  # line 2
        z = torch.randn(x_T.shape, generator=generator).to(x_T.device)  # line 3
        eps_theta = model(x_t, torch.full((len(x_T),), t, device=x_T.device))  # line 4
        beta, alpha = schedule.beta[t], schedule.alpha[t]
        mu_theta = (x_t - beta / one_minus[t].sqrt() * eps_theta) / alpha.sqrt()  # line 4, Eq. 11
        sigma = (one_minus[t - 1] / one_minus[t] * beta).sqrt()  # √β̃_t; 0 at t = 1 (line 3)
        x_t = mu_theta + sigma * z  # line 4: x_t becomes x_{t-1}
        yield t - 1, x_t  # line 6, when t is 1


# ==== 4. A perfect network ========================================================================
# If the data is a list of N pictures x_0^1, ..., x_0^N, the best guess needs no training. Bayes'
# rule on Eq. 4 gives the probability w_i that picture i is behind x_t, and with it E[x_0 | x_t]:
#
#     w_i  ∝  q(x_t | x_0^i)  ∝  exp(-‖x_t - √ᾱ_t x_0^i‖² / (2 (1 - ᾱ_t)))
#     E[x_0 | x_t] = Σ_i w_i x_0^i
def perfect_model(schedule, data):
    """The network with the least possible loss on data, float32 (N, C, H, W): a model(x_t, t)."""
    x_0 = data.flatten(1)  # (N, D), with D = C H W
    squares = x_0.square().sum(1)  # (N,)

    def model(x_t, t):
        signal, noise = schedule.signal_and_noise(t)
        a, b = signal.flatten(1), noise.flatten(1)  # (B, 1) each
        # -‖x_t - a x_0‖² / 2, without ‖x_t‖², which is the same for all pictures:
        fit = a * (x_t.flatten(1) @ x_0.mT) - a**2 * squares / 2  # (B, N)
        w = (fit / b**2).softmax(1)  # (B, N)
        x_0_hat = (w @ x_0).view(x_t.shape)  # (B, C, H, W)
        return (x_t - signal * x_0_hat) / noise  # Eq. 4 solved for ε

    return model


# ONE PIXEL. Let the data be two pictures of a single pixel, -1 and +1. Then E[x_0 | x_t] is
# tanh(√ᾱ_t x_t / (1 - ᾱ_t)), and Algorithm 2 leads every walk to -1 or +1, half of them to each
# (pixel.png, left: a bundle that splits in two). What decides where a walk ends? Chance: at first
# the guess is near 0 and favours neither side, then z moves x_t to one side and the guess follows.
#
# Even this network has a loss that no training can lower: 0.04 at t = 100, 0.47 at t = 200, 0.08 at
# t = 500 and 0.00004 at T. At small t the pixel can be seen. At large t it cannot, and the guess of
# x_0 has the squared error 1. But then x_t is nearly all noise, so ε is easy to guess. By Eq. 4,
#
#     ‖ε - ε_θ‖² = SNR(t) ‖x_0 - x̂_0‖²       with the signal-to-noise ratio SNR(t) = ᾱ_t/(1 - ᾱ_t)
#
# which falls from 9999 at t = 1 to 1 at t = 259 and 0.00004 at T. The loss is largest near t = 220,
# where the pixel is decided. (The pixels of a shape agree, so shapes are decided at larger t.)
#
# A PICTURE. With 2,000 training pictures as the data, E[x_0 | x_t] is a blur that becomes sharp as
# t falls (forward.png, lower row), and Algorithm 2 returns training pictures: of 16 samples 16 are
# copies to the last pixel. So the least training loss is memory, and what is new in the samples of
# a trained network comes from what it cannot do. One that memorises shows it: its loss on other
# pictures rises, and more of its samples than of new real pictures are copies (sample.py --score).


# ==== 5. Why this loss: the variational bound =====================================================
# The aim is maximum likelihood: a large p_θ(x_0) for the pictures of the data. The model is
#
#     p_θ(x_0, ..., x_T) = p(x_T) Π_t p_θ(x_{t-1} | x_t)                  with p(x_T) = N(0, I)
#     p_θ(x_{t-1} | x_t) = N(x_{t-1}; μ_θ(x_t, t), σ_t² I)                                   (Eq. 1)
#
# p_θ(x_0), the integral of the first line over x_1, ..., x_T, cannot be computed, but it has a
# bound. With E_q for the mean over the x_1, ..., x_T that q makes from x_0,
#
#     -log p_θ(x_0) = -log E_q[ p_θ(x_0, ..., x_T) / q(x_1, ..., x_T | x_0) ]
#                  <= E_q[ -log( p_θ(x_0, ..., x_T) / q(x_1, ..., x_T | x_0) ) ] = L         (Eq. 3)
#
# since -log of a mean is at most the mean of -log (Jensen's inequality). L is the variational
# bound, and -L the evidence lower bound (ELBO). By section 3, q can be written backwards, as
# q(x_T | x_0) Π_{t>1} q(x_{t-1} | x_t, x_0). So every factor of q has its partner in p_θ:
#
#     L = E_q[ KL(q(x_T | x_0) ‖ p(x_T))                                        L_T
#            + Σ_{t>1} KL(q(x_{t-1} | x_t, x_0) ‖ p_θ(x_{t-1} | x_t))           L_{t-1}
#            - log p_θ(x_0 | x_1) ]                                             L_0          (Eq. 5)
#
# KL(q ‖ p), the mean of log q - log p under q, says how far p is from q. For two Gaussians of the
# same variance, σ_t² = β̃_t, only the means count, and by Eq. 7 these differ in x_0 alone:
#
#     L_{t-1} = E_q[ ‖μ̃_t(x_t, x_0) - μ_θ(x_t, t)‖² / (2 σ_t²) ]                             (Eq. 8)
#             = E_q[ (SNR(t-1) - SNR(t))/2 ‖x_0 - x̂_0‖² ]
#             = E_q[ β_t²/(2 σ_t² α_t (1 - ᾱ_t)) ‖ε - ε_θ(x_t, t)‖² ]                       (Eq. 12)
#
# The two other terms are next to nothing. L_T has no weights in it and is -log(1 - ᾱ_T)/2 for a
# pixel of ±1: 0.03 bits a picture. In L_0 only the sign of a pixel counts, and with σ_1² = β_1,
# say (Eq. 13), it is certain unless μ_θ(x_1, 1) is within a few σ_1 = 0.01 of 0.
# In bits (log to the base of 2), L is the mean length of a code for the picture, by this model.
# No code is on average shorter than the entropy of the data.
def visited_steps(steps):
    """The t of a walk, evenly spaced: int64 (steps,), from T down to 1; T alone for one step."""
    return torch.linspace(T, 1, steps, dtype=torch.float64).round().long()  # (steps,)


@torch.no_grad()
def bound(model, schedule, x_0, generator, steps=T):
    """The terms L_{t-1} of the variational bound (Eq. 5) in bits a picture: float32 (T + 1,).

    At index t stands the cost of the step from t to the next, in Eq. 12 always t - 1. x_0: float32
    (n, C, H, W), of -1 and +1, n at least steps - 1: picture i is used for one term only, number
    i mod (steps - 1). model, generator: as for algorithm_1. steps: 2 to T.
    """
    visited = visited_steps(steps).to(x_0.device)
    term = torch.arange(len(x_0), device=x_0.device) % (steps - 1)  # (n,)
    t, s = visited[term], visited[term + 1]  # (n,) each
    eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
    x_t = q_sample(schedule, x_0, t, eps)
    x_0_hat = predict_x_0(schedule, x_t, t, model(x_t, t))
    nats = (schedule.snr[s] - schedule.snr[t]) / 2 * (x_0 - x_0_hat).square().sum((1, 2, 3))  # (n,)
    total = torch.zeros_like(schedule.snr).index_add(0, t, nats / math.log(2))  # (T + 1,)
    return total / t.bincount(minlength=T + 1).clamp(min=1)  # each term is a mean


# For one pixel and its perfect network L is 1.007 bits, where a coin has 1: a true step back is
# wider than β̃_t, by the doubt about x_0. Longer steps cost more: in 100, 50 and 20 of them about
# 1.07, 1.16 and 1.55 bits. So T is large, and even a perfect network does not sample exactly.
#
# Our pictures have an entropy of 17.3 bits (computed in test_ddpm.py). The supplied network pays
# 20.4 bits above t = 100 and 109 below (3,996 pictures; sample.py --score). The first part says
# which shapes there are, and where. It may be compared with the entropy: for any network it is at
# least what x_100 tells about x_0, and that is nearly all. The second part pays for differences
# from ±1 that nobody sees. At the smallest t the factor in Eq. 12 is large: 0.6 at t = 2, but 0.005
# at t = 350 and 0.01 at T. Eq. 14 drops it. The best guess at each t remains the same, but the
# effort goes to where pictures take shape. The bound gets worse and the samples better (Ho, Table
# 1): a code must tell every step of the path, a sample only needs its end.


# ==== 6. Fewer steps, and the score ===============================================================
# Song, Meng & Ermon, "Denoising Diffusion Implicit Models" (DDIM, 2021, arXiv 2010.02502), noticed
# that Eq. 14 knows q(x_t | x_0) and nothing of the path between. So the same network can jump from
# t to any earlier s: guess x_0 and ε, and mix them anew as Eq. 4 does at s. A part σ² of the noise
# may be fresh (their Eq. 12 and 16; they write α for ᾱ):
#
#     x_s = √ᾱ_s x̂_0 + √(1 - ᾱ_s - σ²) ε_θ + σ z
#     σ² = η² (1 - ᾱ_s)/(1 - ᾱ_t) (1 - ᾱ_t/ᾱ_s) = η² (1 - ᾱ_s) (1 - SNR(t)/SNR(s))
#
# With η = 1 and s = t - 1, σ² is β̃_t and this is Algorithm 2, but for one thing: a long step trusts
# x̂_0 more than a short one, and at t = T an error of ε is 157 times as large in x_0. So x̂_0 is
# clipped to [-1, 1], as always in Ho's program, but not in Song's. With η = 0, which alone Song
# calls DDIM, nothing is random but x_T: all walks of one pixel end on the side where they began.
#
# THE SCORE ∇ log q(x_t) points to where x_t would be more likely. Other texts learn it. At each t,
# ε_θ is a guess of a multiple: ∇ log q(x_t) = E[∇ log q(x_t | x_0) | x_t] = -E[ε | x_t]/√(1 - ᾱ_t).
# To follow it in small steps with noise is Langevin dynamics, which Algorithm 2 resembles. With
# η = 0 the walk approximates an ordinary differential equation (ODE): the number of steps matters
# little. Of 32 samples 25 are the same in 20 and in 50 steps, 31 in 50 and in 100.
@torch.no_grad()
def ddim(model, schedule, x_T, steps, eta, generator):
    """DDIM in 1 to T steps, with eta from 0 (no fresh noise) to 1. For the rest see algorithm_2."""
    alpha_bar, one_minus, snr = schedule.alpha_bar, schedule.one_minus_alpha_bar, schedule.snr
    x_t = x_T
    yield T, x_t
    for t, s in pairwise([*visited_steps(steps).tolist(), 0]):
        z = torch.randn(x_T.shape, generator=generator).to(x_T.device)
        times = torch.full((len(x_T),), t, device=x_T.device)  # (B,)
        x_0_hat = predict_x_0(schedule, x_t, times, model(x_t, times)).clamp(-1, 1)
        eps_theta = (x_t - alpha_bar[t].sqrt() * x_0_hat) / one_minus[t].sqrt()  # after the clip
        variance = eta**2 * one_minus[s] * (1 - snr[t] / snr[s])  # σ²
        x_t = alpha_bar[s].sqrt() * x_0_hat + (one_minus[s] - variance).sqrt() * eps_theta
        x_t = x_t + variance.sqrt() * z  # x_t has become x_s
        yield s, x_t


# ==== 7. The network ==============================================================================
# ε_θ is a U-Net: from 32x32 pixels down to 4x4, to see the whole picture, and up again.
#
# TIME. One network serves all t and must know which: a bright speck is noise at t = 900 and part of
# the picture at t = 5. As bare numbers, t = 1 and t = 2 would look alike, though √(1 - ᾱ_t) grows
# by half. Sines and cosines tell t like the hands of a clock: the fast ones t from t + 1, the slow
# ones early from late, and as the frequencies are geometric, no scale between is left out (Vaswani
# et al. 2017, arXiv 1706.03762, Section 3.5).
def time_embedding(t, dim):
    """Sines and cosines of t. t: int64 (B,); dim: even. Returns float32 (B, dim) in [-1, 1]."""
    share = torch.arange(dim // 2, device=t.device) / (dim // 2)  # (dim / 2,), from 0 to almost 1
    frequency = 10_000**-share  # from 1 radian per step down to almost 1/10000
    angle = t[:, None].float() * frequency  # (B, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)  # (B, dim)


def zero_init(layer):
    """Starts a last layer at 0: a block then adds nothing at first, which is easier to train."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """The residual block: (B, c_in, H, W) and a time vector (B, time_dim) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, time_dim, c_mid=None):
        super().__init__()
        c_mid = c_mid or c_out
        self.norm1 = nn.GroupNorm(c_in // 8, c_in)  # groups of 8; BatchNorm would mix different t
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, padding=1)
        self.time = nn.Linear(time_dim, c_mid)
        self.norm2 = nn.GroupNorm(c_mid // 8, c_mid)
        self.conv2 = zero_init(nn.Conv2d(c_mid, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_mid, H, W)
        h = h + self.time(time)[:, :, None, None]  # time: (B, c_mid, 1, 1)
        h = self.conv2(F.silu(self.norm2(h)))  # (B, c_out, H, W)
        return self.skip(x) + h  # (B, c_out, H, W)


# ATTENTION. A 3x3 convolution sees only neighbours. In self-attention every place has a query, a
# key and a value, vectors of d numbers, and receives a mean of all values, weighted by how well its
# query matches their keys: softmax(q k^T / √d) v (Vaswani et al. 2017, Eq. 1). Without √d, the size
# of a sum of d products, the softmax would soon be near 0 or 1, with hardly any gradient. The cost
# grows with the square of the number of places, so larger pictures are averaged to 8x8.
class Attention(nn.Module):
    """Self-attention with one head, a residual block: (B, C, H, W) -> (B, C, H, W)."""

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


# THE U-NET. On the way up each level also receives what it had on the way down, by a skip
# connection: the bottom tells what is in the picture, the skips exactly where.
#
#     32x32  stem -- down ------------------------------- up -- out
#     16x16            down ----------------------- up
#      8x8               down --------------- up (three blocks: corners of shapes lie on this grid)
#      4x4                  middle (512 channels)
#
# Not as in Ho (in brackets what Ho has): 2.5 million weights (35.7 million); 16, 32, 128 and 512
# channels, 64 inside the blocks at 4x4 (128, then 256); one block a level on the way down (2),
# three, one and one on the way up (3), two at 4x4 (7); one skip a level, added (one a block,
# concatenated); no dropout; attention at 4x4 and once a level on the way up, above 8x8 on means
# (after each block at 16x16, once at 4x4); halving is a mean, doubling a copy (with a 3x3
# convolution); norms over 8 channels (a 32nd); a time vector of 128 (512); default initialisation.
class UNet(nn.Module):
    """The network. channels: at 32x32, 16x16 and 8x8. bottleneck: at 4x4. narrow: inside the blocks
    and the attention there. time_dim: of the time vector, even. All others: multiples of 8."""

    def __init__(self, channels=(16, 32, 128), bottleneck=512, narrow=64, time_dim=128):
        super().__init__()
        (c1, c2, c3), c4, d = channels, bottleneck, time_dim
        self.time_dim = time_dim
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.stem = nn.Conv2d(1, c1, 3, padding=1)
        self.down = nn.ModuleList([ResBlock(c1, c1, d), ResBlock(c1, c2, d), ResBlock(c2, c3, d)])
        self.middle1 = ResBlock(c3, c4, d, c_mid=narrow)
        self.attention = Attention(c4, narrow)
        self.middle2 = ResBlock(c4, c4, d, c_mid=narrow)
        self.up = nn.ModuleList([Up(c4, c3, d, 3), Up(c3, c2, d, 1), Up(c2, c1, d, 1)])
        self.norm = nn.GroupNorm(c1 // 8, c1)
        self.out = zero_init(nn.Conv2d(c1, 1, 3, padding=1))

    def forward(self, x_t, t):
        """eps_theta, float32 (B, 1, H, W), as x_t. H, W: multiples of 8. t: int64 (B,), in 1..T."""
        time = self.time(time_embedding(t, self.time_dim))  # (B, time_dim)
        x = self.stem(x_t)  # (B, c1, H, W)
        skips = []
        for block in self.down:
            x = block(x, time)  # (B, c, H, W)
            skips.append(x)
            x = F.avg_pool2d(x, 2)  # (B, c, H/2, W/2)
        x = self.attention(self.middle1(x, time))  # (B, bottleneck, H/8, W/8)
        x = self.middle2(x, time)
        for level in self.up:
            x = level(x, skips.pop(), time)  # (B, c, 2H, 2W)
        return self.out(F.silu(self.norm(x))).float()  # (B, 1, H, W), float32 under autocast, too


# ==== Look at it: python ddpm.py ==================================================================

if __name__ == "__main__":
    import shapes

    schedule, generator = Schedule(), torch.Generator().manual_seed(0)
    pixel = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    model = perfect_model(schedule, pixel)
    for steps in (1000, 100, 50, 20):
        x_0 = pixel[torch.randint(2, (3_000_000,), generator=generator)]  # (n, 1, 1, 1)
        bits = bound(model, schedule, x_0, generator, steps).sum()
        print(f"one pixel in {steps} steps: a bound of {bits:.2f} bits")
    figure, x_T = shapes.figure(12, 3), torch.randn(40, 1, 1, 1, generator=generator)
    for axes, eta in zip(figure.subplots(1, 2, sharey=True), (1, 0)):
        walk = [*ddim(model, schedule, x_T, T, eta, generator)]
        axes.plot([t for t, _ in walk], torch.stack([x.flatten() for _, x in walk]), linewidth=0.6)
        axes.set(xlim=(T, -15), xlabel="t", yticks=[-1, 1], title=f"$\\eta$ = {eta}")
    figure.savefig("pixel.png", dpi=100)

    training = shapes.make_dataset(2000, seed=0)
    model = perfect_model(schedule, shapes.to_model(training))
    *_, (_, x) = algorithm_2(model, schedule, torch.randn(16, 1, 32, 32), generator)
    copies = shapes.score(x, training)["copies"]
    print(f"2,000 pictures: {copies:.0%} of 16 samples of their perfect network are copies")
    t = torch.tensor([1, 200, 400, 500, 600, 700, 800, 1000])
    x_0 = shapes.to_model(training[[3]]).expand(8, -1, -1, -1)  # (8, 1, 32, 32)
    x_t = q_sample(schedule, x_0, t, torch.randn(1, 1, 32, 32, generator=generator))
    x_0_hat = predict_x_0(schedule, x_t, t, model(x_t, t))
    shapes.tile(shapes.from_model(torch.cat([x_t, x_0_hat])), columns=8).save("forward.png")
