"""Denoising diffusion, from the idea to the code. Read from top to bottom.

THE IDEA. Take a picture and add a little Gaussian noise; repeat a thousand times, until
nothing of the picture is left. That direction is easy. Now learn the way back: given a
noisy picture, guess all the noise that is in it, but take only a little of it away, and
guess again. A thousand such steps lead from pure noise to a picture nobody has drawn.
Ours are 32x32 pixels, -1 or +1, and show circles, rectangles, triangles and lines.

    x_0  ->  x_1  ->  x_2  ->  ...  ->  x_T      forward process q: fixed, adds noise
    x_0  <-  x_1  <-  x_2  <-  ...  <-  x_T      reverse process p: learned, removes it

The paper is Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv
2006.11239). "Eq. 4" or "Algorithm 2" without a name is theirs, "Ho, Section 4" is a
section of theirs, and so are the letters. Tensors have their shapes at the end of the
line: B pictures in a batch, C channels, H x W pixels, N = H * W of them.

    python ddpm.py        prints the network as a table and saves forward.png
"""

import copy
import math
import sys
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# ==== 1. The schedule: how much noise, when ===========================================
#
# Step t mixes the picture with fresh noise of variance beta_t (Eq. 2):
#
#     q(x_t | x_{t-1}) = N(x_t; sqrt(1 - beta_t) x_{t-1}, beta_t I)
#
# The factor sqrt(1 - beta_t) shrinks the picture by just so much that a variance of 1
# stays 1; without it the numbers would grow with every step. The betas are chosen by
# hand, not learned (Ho, Section 4): small at first, when a little noise already hides
# detail, larger towards the end. Why a thousand small steps and not ten large ones? The
# true way back is a mixture over all the pictures that could have led here. Over a
# short step all of them agree on where to go, up to a little noise: one Gaussian, of
# which only the mean must be learned.

T = 1000


class Schedule:
    """beta, alpha = 1 - beta and alpha_bar, the product of all alphas up to t.

    All, and one_minus_alpha_bar, are float32 (T + 1,) and indexed by the paper's own t
    (Ho, Section 2): beta[1] is the first step, beta[T] the last, alpha_bar[0] = 1 the
    clean picture. No nn.Module: nothing in it is learned, saved or averaged.
    """

    def __init__(self, device="cpu"):
        # In float64, since alpha_bar multiplies a thousand numbers close to 1; kept in
        # float32, since Apple's GPUs have no float64.
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)  # (T,), Ho, Section 4
        beta = torch.cat([torch.zeros(1, dtype=torch.float64), beta])  # (T + 1,)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)
        self.beta = beta.float().to(device)
        self.alpha = alpha.float().to(device)
        self.alpha_bar = alpha_bar.float().to(device)
        # 1 - alpha_bar[1] is 1e-4: taken in float32 it would keep only 3 good digits.
        self.one_minus_alpha_bar = (1 - alpha_bar).float().to(device)

    def signal_and_noise(self, t):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), to multiply pictures with.

        t: int64 (B,), each in 0..T. Returns two float32 (B, 1, 1, 1).
        """
        signal, noise = self.alpha_bar[t].sqrt(), self.one_minus_alpha_bar[t].sqrt()
        return signal.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)  # (B, 1, 1, 1)

    def snr(self):
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) for t = 1..T: float32 (T,).

        It falls at every step: 9999 at t = 1, about 1 at t = 260, 0.00004 at T.
        """
        return self.alpha_bar[1:] / self.one_minus_alpha_bar[1:]  # (T,)


# ==== 2. The forward process: from a picture to noise, in one step ====================
# Nobody has to walk all t steps. A sum of independent Gaussians is a Gaussian, so with
# alpha = 1 - beta two steps make one (z, z' and eps are standard normal):
#
# x_2 = sqrt(alpha_2) x_1 + sqrt(1 - alpha_2) z'
#     = sqrt(alpha_2 alpha_1) x_0 + sqrt(alpha_2 (1 - alpha_1)) z + sqrt(1 - alpha_2) z'
#     = sqrt(alpha_2 alpha_1) x_0 + sqrt(1 - alpha_2 alpha_1) eps
#
# because the variances add up: alpha_2 - alpha_2 alpha_1 + 1 - alpha_2. Again and
# again, and the product of all alphas is alpha_bar_t. That is Eq. 4.


def q_sample(schedule, x_0, t, eps):
    """Draws x_t from q(x_t | x_0), Eq. 4.

    x_0: float (B, 1, H, W) in [-1, 1]. t: int64 (B,), in 0..T. eps: standard normal
    float (B, 1, H, W). Returns x_t: float (B, 1, H, W).
    """
    signal, noise = schedule.signal_and_noise(t)
    return signal * x_0 + noise * eps


# alpha_bar_T must be close to 0, and is: sqrt(alpha_bar_T) = 0.0064. Sampling starts
# from pure noise; a network trained at t = T on pictures with a trace of signal left
# would look for that trace and find it in noise where there is none.
#
# What is there to learn? Once x_t is given, Eq. 4 has two unknowns, x_0 and eps, and
# either gives the other. Which of them the training loss (section 7) compares decides
# how much each t counts: an error in eps is one in x_0 times sqrt(SNR). An x_0 loss
# counts all t alike and so is mostly about large t, where a guess can be no more than a
# blur; eps asks more where more of the picture can be seen. Ho et al. found x_0 worse
# (Ho, Section 3.2).


def predict_x_0(schedule, x_t, t, eps):
    """Eq. 4 solved for x_0: which picture is under the noise? Shapes as in q_sample."""
    signal, noise = schedule.signal_and_noise(t)
    return (x_t - noise * eps) / signal


# This jumps straight to a picture. Why then walk back in steps? At large t very many
# pictures fit x_t, and the guess of least squared error is their mean: grey fog. A
# small step commits to little of it, and the next guess, with less noise, is less
# foggy.

# ==== 3. Telling the network the time =================================================
#
# The same network serves all t, and must know which: a bold speckle is ordinary noise
# at t = 900 and part of the picture at t = 5. A bare number t would be a poor way to
# say it: a layer could only scale it, t = 1000 would shout and t = 1 whisper, and the
# gap between t = 5 and t = 10 would be hard to see. So t is read off hands of many
# speeds, as on a clock: the fast ones tell t from t + 1, the slow ones early from late
# (Vaswani et al. 2017, Section 3.5).


def time_embedding(t, dim):
    """Sinusoids of t. t: int64 (B,); dim: even. Returns float32 (B, dim) in [-1, 1]."""
    # Angular speeds from 1 per step down to almost 1/10000, evenly in the exponent.
    speed = torch.arange(dim // 2, device=t.device) / (dim // 2)  # (dim / 2,)
    speed = torch.exp(-math.log(10_000) * speed)
    angle = t[:, None].float() * speed  # (B, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)  # (B, dim)


# ==== 4. Attention: every pixel may look at every other ===============================
#
# A 3x3 convolution sees its neighbours. Whether this edge belongs to the triangle over
# there is decided by pixels far away, and attention reaches them in one layer: each
# pixel sends a query, all pixels offer a key and a value, vectors of d numbers, and a
# pixel takes the average of the values, weighted by how well their keys answer its
# query:
#
#     softmax(q k^T / sqrt(d)) v                              (Vaswani et al., Eq. 1)
#
# sqrt(d) keeps the scores of long vectors from growing. Several "heads" do this side by
# side, so that a pixel can ask for several things. The price is N queries times N keys:
# 256 pairs at 4x4, but over a million at 32x32. So every pixel keeps its query, but
# keys and values are averaged down to an 8x8 grid, M = 64 of them at most, and 65,536
# pairs: each pixel still sees the whole picture, only a little less sharply. Nobody
# says where a pixel is; that leaks in from the zeros with which convolutions pad the
# frame.

KEY_SIDE = 8


class Conv1x1(nn.Linear):
    """The same matrix for every pixel: (B, C_in, H, W) -> (B, C_out, H, W).

    That is a 1x1 convolution, as one matrix product: on a CPU the faster way.
    """

    def forward(self, x):
        x = super().forward(x.permute(0, 2, 3, 1))  # (B, H, W, C_out)
        return x.permute(0, 3, 1, 2)  # (B, C_out, H, W)


def norm(channels):
    """Mean 0 and variance 1 in each picture, for 8 channels at a time, then a learned
    scale and shift. Section 5 says why not BatchNorm."""
    return nn.GroupNorm(channels // 8, channels)


def zero(layer):
    """Sets a layer to 0: the last one of something that is added to something else.

    Such a block begins as (nearly) the identity, x + 0: the deep network starts as a
    shallow one, gradients pass unchanged, and each block joins in as it learns.
    """
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head self-attention over all pixels: (B, C, H, W) -> (B, C, H, W).

    width: of queries, keys and values, all heads together.
    """

    def __init__(self, channels, width):
        super().__init__()
        self.heads = max(1, width // 32)  # d = 32, or all of it below 64
        self.norm = norm(channels)
        self.query = nn.Linear(channels, width)
        self.key_value = nn.Linear(channels, 2 * width)
        self.out = zero(nn.Linear(width, channels))

    def forward(self, x):
        H, W = x.shape[2:]
        y = self.norm(x)
        pooled = F.avg_pool2d(y, max(1, H // KEY_SIDE))  # (B, C, <=8, <=8)
        y = y.flatten(2).transpose(1, 2)  # (B, N, C), a pixel is now a token
        pooled = pooled.flatten(2).transpose(1, 2)  # (B, M, C)
        q = self.split(self.query(y))  # (B, heads, N, d)
        k, v = self.key_value(pooled).chunk(2, dim=2)  # 2 times (B, M, width)
        k, v = self.split(k), self.split(v)  # 2 times (B, heads, M, d)
        # In float32: the backward pass of this line is slow in bfloat16 on a CPU.
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        y = self.out(y.transpose(1, 2).flatten(2))  # (B, N, C)
        return x + y.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W)

    def split(self, y):
        """(B, N, width) -> (B, heads, N, d), as float32."""
        return y.float().unflatten(2, (self.heads, -1)).transpose(1, 2)


# ==== 5. The residual block: where the work is done ===================================
#
# Twice norm, SiLU, 3x3 convolution, added to the input: a block only has to learn what
# to change, and through the sum gradients reach the first layers however deep the
# network. The time comes in between: one number per channel, added to every pixel.
# Every block is told, since every block has to behave differently at different t, and a
# time fed in once at the start would fade on the way. GroupNorm and not BatchNorm: a
# training batch mixes all t, in sampling all pictures have the same t, and statistics
# of the one do not fit the other; GroupNorm looks at one picture only.


class ResBlock(nn.Module):
    """(B, c_in, H, W) and a time vector (B, time_dim) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, time_dim, c_mid=None):
        super().__init__()
        c_mid = c_mid or c_out
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, padding=1)
        self.time = nn.Linear(time_dim, c_mid)
        self.norm2 = norm(c_mid)
        self.conv2 = zero(nn.Conv2d(c_mid, c_out, 3, padding=1))
        self.skip = Conv1x1(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_mid, H, W)
        h = h + self.time(time)[:, :, None, None]  # (B, c_mid, H, W), all pixels alike
        h = self.conv2(F.silu(self.norm2(h)))  # (B, c_out, H, W)
        return self.skip(x) + h  # (B, c_out, H, W)


# ==== 6. The U-Net ====================================================================
#
# Down: 32 -> 16 -> 8 -> 4 pixels wide, with more and more channels; at the bottom 16
# places of 512 numbers say what the picture is about. Up again: 4 -> 8 -> 16 -> 32. On
# the way up each level also gets what the same level knew on the way down. The bottom
# knows *that* there is a circle, the skip *where* its edge runs. They are put side by
# side and a learned matrix, `join`, says how much of each to take.
#
#     32x32  stem -- down ------------------------------- up -- out
#     16x16            down ----------------------- up
#      8x8               down --------------- up
#      4x4                  middle (512)
#
# Attention stands once at each resolution, in the middle and on the way up, where a
# level has both its own detail and the view from below.


class UpLevel(nn.Module):
    """Doubles the resolution, joins the skip; two residual blocks around attention."""

    def __init__(self, c_below, c_out, time_dim):
        super().__init__()
        self.shrink = Conv1x1(c_below, c_out)
        self.join = Conv1x1(2 * c_out, c_out)
        self.block1 = ResBlock(c_out, c_out, time_dim)
        self.attention = Attention(c_out, c_out)
        self.block2 = ResBlock(c_out, c_out, time_dim)

    def forward(self, x, skip, time):
        # Fewer channels first, then more pixels: a quarter of the work.
        x = self.shrink(x)  # (B, c_out, H/2, W/2)
        x = F.interpolate(x, scale_factor=2)  # (B, c_out, H, W), each pixel four times
        x = torch.cat([x, skip], dim=1)  # (B, 2 c_out, H, W)
        x = self.join(x)  # (B, c_out, H, W)
        x = self.attention(self.block1(x, time))
        return self.block2(x, time)


class UNet(nn.Module):
    """The network inside eps_theta(x_t, t); the next section says what it returns.

    channels: at 32x32, 16x16 and 8x8. bottleneck: at 4x4. narrow: inside it. time_dim:
    of the time vector, even. Channels are multiples of 8, from 64 on of 32.
    """

    def __init__(self, channels=(16, 48, 96), bottleneck=512, narrow=128, time_dim=128):
        super().__init__()
        self.config = {"channels": tuple(channels), "bottleneck": bottleneck}
        self.config |= {"narrow": narrow, "time_dim": time_dim}
        c1, c2, c3 = channels
        time = [nn.Linear(time_dim, time_dim), nn.SiLU()]
        self.time = nn.Sequential(*time, nn.Linear(time_dim, time_dim), nn.SiLU())
        self.stem = nn.Conv2d(1, c1, 3, padding=1)
        pairs = [(c1, c1), (c1, c2), (c2, c3)]
        self.down = nn.ModuleList([ResBlock(a, b, time_dim) for a, b in pairs])
        # One 3x3 convolution from 512 to 512 channels has 2.4 million weights. So what
        # stands at 4x4 is wide outside and narrow inside, 512 -> 128 -> 512: the second
        # block has 1.2 million for both its convolutions.
        self.middle1 = ResBlock(c3, bottleneck, time_dim, c_mid=narrow)
        self.middle2 = Attention(bottleneck, narrow)
        self.middle3 = ResBlock(bottleneck, bottleneck, time_dim, c_mid=narrow)
        pairs = [(bottleneck, c3), (c3, c2), (c2, c1)]
        self.up = nn.ModuleList([UpLevel(a, b, time_dim) for a, b in pairs])
        self.norm = norm(c1)
        self.out = zero(nn.Conv2d(c1, 1, 3, padding=1))
        # Channels last: the numbers of one pixel lie side by side in memory. A reader
        # sees no difference, the convolutions do.
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t):
        """x: float (B, 1, 32, 32). t: int64 (B,) in 1..T. Returns (B, 1, 32, 32)."""
        time = self.time(time_embedding(t, self.config["time_dim"]))  # (B, time_dim)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x)  # (B, c1, 32, 32)
        skips = []
        for block in self.down:
            x = block(x, time)  # (B, c, H, W)
            skips.append(x)
            x = F.avg_pool2d(x, 2)  # (B, c, H/2, W/2)
        x = self.middle1(x, time)  # (B, bottleneck, 4, 4)
        x = self.middle3(self.middle2(x), time)
        for level in self.up:
            x = level(x, skips.pop(), time)  # (B, c, 2H, 2W)
        return self.out(F.silu(self.norm(x)))  # (B, 1, 32, 32)


# ==== 7. The guess and the loss =======================================================
#
# The network could return eps itself, as in the paper. But close to t = 0 eps is a tiny
# difference, (x_t - 0.99995 x_0) / 0.01 at t = 1, and close to t = T so is the picture:
# x_0 = (x_t - eps) / 0.0064 magnifies an error of the network 157 times. What can be
# computed should not have to be learned, and here much can. Were each pixel the toss of
# a fair coin, Bayes' rule on Eq. 4 would give the odds that it is +1 and not -1,
#
#     exp(-(x_t - signal)^2 / (2 noise^2)) / exp(-(x_t + signal)^2 / (2 noise^2))
#         = exp(2 signal x_t / noise^2)
#
# with signal = sqrt(alpha_bar_t) and noise = sqrt(1 - alpha_bar_t). Something that is
# +1 or -1 at odds of exp(2a) has the mean tanh(a), and the mean is the guess of least
# squared error: one pixel alone says x_0 = tanh(signal x_t / noise^2). All else, the
# other pixels and how common +1 is here, multiplies its odds by some exp(2b), so b is
# added inside the tanh, and b is what the network returns: only what the pixel does not
# show itself, at first nothing (`out` starts at 0). From x_0 follows eps, by Eq. 4.
#
# For pictures in grey this does not hold. There ask for v = signal eps - noise x_0,
# which magnifies no error either: x_0 = signal x_t - noise v (Salimans & Ho 2022, arXiv
# 2202.00512).


@cache
def fast_bfloat16(device):
    """Whether "cpu", "cuda" or "mps" is quicker in bfloat16, for eps_theta; mps: no.

    It has the range of float32 and 8 bits of precision. Imitated, it is slower.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def eps_theta(model, schedule, x_t, t):
    """The noise that the network finds in x_t. Shapes as in q_sample, t in 1..T."""
    device = x_t.device.type
    with torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
        b = model(x_t, t)  # (B, 1, H, W)
    signal, noise = schedule.signal_and_noise(t)
    x_0 = torch.tanh(signal * x_t / noise**2 + b.float())
    return (x_t - signal * x_0) / noise


# Which loss? A step back is p(x_{t-1} | x_t) = N(mu_theta(x_t, t), sigma_t^2 I) (Eq. 1;
# sigma_t: section 8), the network gives its mean. Maximum likelihood wants -log p(x_0)
# small, an integral over all ways that lead to x_0, which nobody can compute. But it
# has a bound (Eq. 3), in essence a sum over t of KL divergences: how far the true step
# back q(x_{t-1} | x_t, x_0) is from that of p (Eq. 5; t = 1 and x_T have their own
# terms). With sigma_t fixed each is, up to a constant, the squared difference of the
# two means over 2 sigma_t^2 (Eq. 8). Both means are Eq. 11 (shown in section 8), with
# the true eps and with eps_theta, so each is (Eq. 12)
#
#   beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)) * || eps - eps_theta(x_t, t) ||^2
#
# averaged over x_0 and eps. The paper drops the factor in front and keeps the square
# (Eq. 14). With sigma_t^2 = beta_t the factor falls from 0.5 at t = 1 to its least,
# 0.005, at t = 349: it asks most where only a trace of noise is to be found. Without it
# more of the effort goes to the harder, larger t, where shapes are decided (Ho, Section
# 3.4).


def loss_fn(model, schedule, x_0, t, eps):
    """Eq. 14, the simple loss, as a mean over pixels too. Returns a 0-d tensor.

    x_0: float (B, 1, 32, 32), -1 or +1. t: int64 (B,), drawn uniformly from 1..T, both
    ends included (Algorithm 1). eps: standard normal, (B, 1, 32, 32).
    """
    x_t = q_sample(schedule, x_0, t, eps)
    return F.mse_loss(eps_theta(model, schedule, x_t, t), eps)


class EMA:
    """A running average of the weights, and the one to sample from (Ho, Appendix B).

    Each step pulls the weights towards one small batch and its accidents; the average
    over many steps is calmer. A decay of 0.9995 averages over about the last 1 / (1 -
    decay) = 2000 steps. Early on that would keep the random initial weights in, so the
    window grows with training: to about a ninth of the steps so far.
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


# ==== 8. The reverse process: from noise to a picture =================================
#
# If x_0 were known, the step back would be known too: q(x_{t-1} | x_t, x_0) is a
# Gaussian with mean (Eq. 7)
#
#     mu = [ sqrt(alpha_bar_{t-1}) beta_t x_0
#          + sqrt(alpha_t) (1 - alpha_bar_{t-1}) x_t ] / (1 - alpha_bar_t)
#
# and variance beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t): Bayes'
# rule on Eq. 2, which says how x_t came from x_{t-1}, and Eq. 4, which says where
# x_{t-1} was. We do not know x_0, but the network's guess of eps gives a guess of it.
# Put x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t) into Eq. 7. The factor
# of eps is
#
#     - sqrt(alpha_bar_{t-1} / alpha_bar_t) (beta_t / sqrt(1 - alpha_bar_t))
#         = - (1 / sqrt(alpha_t)) (beta_t / sqrt(1 - alpha_bar_t))
#
# and the factor of x_t, over the common denominator sqrt(alpha_t) (1 - alpha_bar_t), is
# beta_t + alpha_t (1 - alpha_bar_{t-1}) = 1 - alpha_bar_t: all that stays is 1 /
# sqrt(alpha_t). So Eq. 7 with a predicted x_0 is Eq. 11, and Eq. 11 is the shorter:
#
#     mu = (x_t - (beta_t / sqrt(1 - alpha_bar_t)) eps) / sqrt(alpha_t)


def ddpm_step(schedule, x_t, t, eps, z):
    """One line of Algorithm 2: x_{t-1} = mu(x_t, eps) + sigma_t z, with mu of Eq. 11.

    x_t, eps, z: float (B, 1, H, W); t: int in 1..T. Returns x_{t-1}: (B, 1, H, W).
    """
    beta, alpha = schedule.beta[t], schedule.alpha[t]
    var_s, var_t = schedule.one_minus_alpha_bar[t - 1 : t + 1]  # s = t - 1
    mu = (x_t - beta / var_t.sqrt() * eps) / alpha.sqrt()
    # The paper tries sigma^2 = beta_t, right if the data were Gaussian noise, and
    # sigma^2 = beta_tilde_t, right if the data were a single picture (Ho, Section 3.2).
    # The truth lies in between, and they differ only in the last steps: their ratio is
    # 0.98 at t = 100 and 0.85 at t = 10. We take the second, for it is 0 at t = 1: the
    # last step adds no noise, as Algorithm 2 asks. Noise added there would never be
    # taken away.
    variance = var_s / var_t * beta
    return mu + variance.sqrt() * z


# Another way to see this step: the gradient of log q(x_t) with respect to x_t, the
# *score*, points to where pictures are more likely. For one known x_0 it is -eps /
# sqrt(1 - alpha_bar_t), by Eq. 4; the mean of that over all x_0 that fit is the score,
# and squared error learns means. So eps_theta, up to that factor, is the score, Eq. 14
# is denoising score matching, and Algorithm 2 is like Langevin dynamics: a step uphill
# and some fresh noise, again and again, while the noise gets less (Ho, Section 3.2;
# Song & Ermon 2019).
#
# A thousand steps are slow. Song, Meng & Ermon, "Denoising Diffusion Implicit Models"
# (2021, arXiv 2010.02502) noticed that Eq. 14 never asks how x_t was reached: it needs
# only q(x_t | x_0), Eq. 4. So the same network also fits processes that jump from t to
# any earlier s: guess x_0, then put the right amount of noise for s back on it. Larger
# jumps trust a guess for longer, and that is their price. Their Eq. 12 (where they
# write alpha for Ho's alpha_bar):
#
#     x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z
#
# The middle term reuses the noise that was found, and with sigma = 0 nothing but it:
# then nothing is random after x_T. sigma is eta, from 0 to 1, times their Eq. 16; with
# eta = 1 and s = t - 1 this is ddpm_step again.


def ddim_step(schedule, x_t, t, s, eps, z, eta):
    """Eq. 12 of DDIM: from x_t to x_s, 0 <= s < t <= T.

    x_t, eps, z: float (B, 1, H, W), z may be 0 if eta is; t, s: int; eta: 0 to 1.
    Returns x_s: (B, 1, H, W).
    """
    x_0 = predict_x_0(schedule, x_t, torch.tensor([t]), eps)  # (B, 1, H, W)
    var_t, var_s = schedule.one_minus_alpha_bar[t], schedule.one_minus_alpha_bar[s]
    ratio = schedule.alpha_bar[t] / schedule.alpha_bar[s]
    variance = eta**2 * var_s / var_t * (1 - ratio)  # DDIM Eq. 16, squared
    rest = (var_s - variance).clamp(min=0)  # rounding may give -1e-9
    return schedule.alpha_bar[s].sqrt() * x_0 + rest.sqrt() * eps + variance.sqrt() * z


def timesteps(steps):
    """The t to visit: `steps` integers from T down to 1, evenly; then 0, the picture.

    Raises ValueError unless steps is in 1..T.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be between 1 and {T}, got {steps}")
    # From steps = 2 on both ends are in: T, the start, and 1, the last before a
    # picture.
    visited = torch.linspace(T, 1, steps, dtype=torch.float64)  # (steps,)
    return [*visited.round().int().tolist(), 0]


@torch.no_grad()
def reverse_process(model, schedule, x_T, steps=T, eta=None, generator=None):
    """Walks from noise to pictures and shows every stop on the way.

    x_T: standard normal float (B, 1, 32, 32). steps: 1..T; T means Algorithm 2, fewer
    mean DDIM. eta: None for these two (DDIM with 0), or a number for DDIM whatever the
    steps. generator: for z, on the CPU, so that a seed means the same z everywhere.
    Yields (t, x_t, x_0 as guessed from x_t), t falling from T; at the end
    (0, x_0, x_0). Raises ValueError, when first asked for a step, as timesteps does.
    """
    algorithm_2 = steps == T and eta is None
    x, z = x_T, 0
    for t, s in pairwise(timesteps(steps)):
        now = torch.full((len(x),), t, device=x.device)  # (B,)
        eps = eps_theta(model, schedule, x, now)
        yield t, x, predict_x_0(schedule, x, now, eps)
        if algorithm_2 or eta:
            z = torch.randn(x.shape, generator=generator).to(x.device)
        if algorithm_2:
            x = ddpm_step(schedule, x, t, eps, z)
        else:
            x = ddim_step(schedule, x, t, s, eps, z, eta or 0)
    yield 0, x, x


def sample(model, schedule, x_T, steps=T, eta=None, generator=None):
    """The pictures at the end of reverse_process: (B, 1, 32, 32), about in [-1, 1]."""
    for _, x, _ in reverse_process(model, schedule, x_T, steps, eta, generator):
        pass
    return x


# ==== 9. Look at it: python ddpm.py ===================================================


def stages(model):
    """Rows (stage, resolution, channels, parameters) of the U-Net, input to output."""
    levels = list(zip(("32x32", "16x16", "8x8"), model.config["channels"]))
    middle = nn.ModuleList([model.middle1, model.middle2, model.middle3])
    rows = [("time embedding", "", model.config["time_dim"], model.time)]
    rows += [("stem", *levels[0], model.stem)]
    rows += [("down", *level, block) for level, block in zip(levels, model.down)]
    rows += [("middle", "4x4", model.config["bottleneck"], middle)]
    rows += [("up", *level, block) for level, block in zip(levels[::-1], model.up)]
    rows += [("out", "32x32", 1, nn.ModuleList([model.norm, model.out]))]
    return [
        (*row, sum(p.numel() for p in module.parameters())) for *row, module in rows
    ]


def save_forward_process(path):
    """Draws a picture of shapes.py at several t; below, schedule and time embedding."""
    from matplotlib.figure import Figure  # not needed to train or sample

    import shapes

    schedule = Schedule()
    times = torch.tensor([0, 50, 100, 200, 300, 400, 600, 800, 1000])  # (9,)
    x_0 = shapes.to_model(shapes.make_dataset(2, seed=0)[:1])  # (1, 1, 32, 32)
    x_0 = torch.from_numpy(x_0).expand(len(times), -1, -1, -1)  # (9, 1, 32, 32)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    pictures = shapes.from_model(q_sample(schedule, x_0, times, eps))  # (9, 32, 32)
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    for axes, t, picture in zip(top.subplots(1, len(times)), times, pictures):
        snr = f"{schedule.snr()[t - 1]:.2g}" if t else "infinite"
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"t = {t}")
        axes.set_xlabel(f"$\\bar\\alpha_t$ = {schedule.alpha_bar[t]:.2g}\nSNR = {snr}")
    left, right = bottom.subplots(1, 2)
    left.plot(schedule.alpha_bar, label="$\\bar\\alpha_t$")
    left.plot(range(1, T + 1), schedule.snr(), label="signal-to-noise ratio")
    left.axhline(1, color="gray", linewidth=0.8)
    left.set(xlabel="t", yscale="log")
    left.legend()
    hands = time_embedding(torch.arange(T + 1), 128).T  # (128, T + 1)
    right.imshow(hands, cmap="gray", aspect="auto")
    right.set(xlabel="t", ylabel="time embedding")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    network = UNet()
    print(f"{'stage':<16}{'resolution':>10}{'channels':>10}{'parameters':>12}")
    table = stages(network)
    total = sum(p.numel() for p in network.parameters())
    for stage, resolution, channels, parameters in [*table, ("total", "", "", total)]:
        print(f"{stage:<16}{resolution:>10}{channels:>10}{parameters:>12,}")
    try:
        save_forward_process("forward.png")
    except OSError as e:
        sys.exit(f"error: {e.strerror or e}: forward.png; write to another folder")
    print("saved forward.png")
