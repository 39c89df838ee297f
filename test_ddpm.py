"""Holds the program against computations made in another way: python -m pytest

Good samples do not prove correct code. Every test here says what it would catch.
"""

import hashlib
import io
import itertools
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import group_norm

import ddpm
import sample
import shapes
import train

HERE = Path(__file__).parent
T = ddpm.T
BETA = np.append(0, np.linspace(1e-4, 0.02, T))  # in float64, apart from ddpm.py
ALPHA_BAR = np.cumprod(1 - BETA)
SCHEDULE = ddpm.Schedule()
SMALL = ((8, 8, 8), 16, 8, 16)  # the arguments of a small UNet


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def awake(model):
    """Random numbers in all weights: zero-initialised layers would hide what is behind them."""
    for i, p in enumerate(model.parameters()):
        p.data = p.data + 0.05 * noise(*p.shape, seed=i)
    return model


@pytest.fixture
def tiny(monkeypatch):
    """Makes every new UNet a small one, and samples cheap."""
    monkeypatch.setattr(ddpm.UNet.__init__, "__defaults__", SMALL)
    for name, value in {"PICTURES": 2, "STEPS": 2}.items():
        monkeypatch.setattr(train, name, value)


# ==== The data and the score ======================================================================


def test_the_data_are_the_same_bytes_everywhere_and_closed_under_mirror_images():
    """Catches: any change to what is drawn; a mask that favours a side, or is there twice."""
    digest = hashlib.sha256(shapes.make_dataset(1000, seed=0).tobytes()).hexdigest()
    assert digest[:16] == "e7f317c0d3d21075"
    assert not np.array_equal(shapes.make_dataset(9, seed=0), shapes.make_dataset(9, seed=1))
    masks = [mask for kind in shapes.KINDS for mask in shapes.CATALOGUE[kind]]
    assert len(masks) == len(shapes.KIND_OF) == len(set(map(shapes.key, masks))) == 46
    for kind, mask in itertools.product(shapes.KINDS, masks):
        for turned in (np.rot90(mask), mask[:, ::-1]):  # these two generate all eight
            turned = shapes.key(np.ascontiguousarray(turned))
            assert (shapes.KIND_OF[turned] == kind) == (shapes.KIND_OF[shapes.key(mask)] == kind)


def test_every_mask_against_its_geometry():
    """Catches: half-open shapes, a wrong rounding, a lost edge, sizes out of range."""
    for mask in shapes.CATALOGUE["circle"]:
        d = len(mask)
        middle = (d - 1) / 2
        inside = [[math.hypot(x - middle, y - middle) <= d / 2 for x in range(d)] for y in range(d)]
        assert 8 <= d <= 16 and np.array_equal(mask, inside)
    for mask in shapes.CATALOGUE["triangle"]:
        # One of the four turns has its tip up: rows grow by 2 or stay, around the same middle.
        upright = [m for m in map(np.rot90, [mask] * 4, range(4)) if (np.diff(m.sum(1)) >= 0).all()]
        (m,) = [m for m in upright if m[0].sum() == 2]
        assert np.array_equal(m, m[:, ::-1]) and m[-1].all()
        assert set(np.diff(m.sum(1))) <= {0, 2} and (np.diff(m, axis=0) >= 0).all()
    for mask in shapes.CATALOGUE["line"]:
        low, high = sorted(mask.shape)
        if low == high:  # a diagonal or its mirror image: five pixels wide, but for its ends
            assert mask.sum(1).tolist() == [3, 4, *[5] * (low - 4), 4, 3] and 8 <= low <= 24
            assert mask.trace() == low or mask[::-1].trace() == low
        else:
            assert mask.all() and low == 4 and 12 <= high <= 32
    assert all(m.all() and {*m.shape} <= {8, 12, 16} for m in shapes.CATALOGUE["rectangle"])
    for mask in itertools.chain(*shapes.CATALOGUE.values()):
        assert len(shapes.find_blobs(mask)) == 1 and not any(n % 4 for n in mask.shape)


def test_a_data_set_holds_what_it_says():
    """Catches: uneven kinds or numbers, shapes that touch or leave the grid, unexplained blobs."""
    pictures = shapes.make_dataset(10_000, seed=3)
    assert pictures.shape == (10_000, 32, 32) and pictures.dtype == np.uint8
    found = [shapes.explain(picture) for picture in pictures[:3000]]
    count = np.bincount([len(blobs) for blobs in found])
    assert count[0] == 0 and np.abs(count[1:] - [1080, 1440, 480]).max() < 5 * math.sqrt(750)
    kinds = [kind for blobs in found for kind, _ in blobs]
    count = np.array([kinds.count(kind) for kind in shapes.KINDS])
    assert count.sum() == len(kinds) and np.ptp(count) < 5 * math.sqrt(1500)
    for picture, blobs in zip(pictures[:200], found):
        assert np.array_equal(sum(blob.astype(int) for _, blob in blobs), picture)
        boxes = [(np.argwhere(blob).min(0), np.argwhere(blob).max(0) + 1) for _, blob in blobs]
        assert not (np.array(boxes) % 4).any()
        for (low, high), (low_2, high_2) in itertools.combinations(boxes, 2):
            assert max((low - high_2).max(), (low_2 - high).max()) >= 4
    # Every size of circle, and every pixel, comes up.
    circles = [blob for blobs in found for kind, blob in blobs if kind == "circle"]
    widths = np.bincount([blob.any(0).sum() for blob in circles])
    assert min(widths[8:17:4]) > 20 and widths.sum() == widths[8:17:4].sum()
    used = pictures.mean(0)
    assert used.min() > 0.001 and np.abs(used - used[::-1, ::-1]).max() < 0.03


def test_model_range_and_back_and_pictures_for_people(tmp_path):
    """Catches: pictures scaled to [0, 1], a grid out of order, a wrong colour."""
    pictures = shapes.make_dataset(20, seed=0)
    x = shapes.to_model(pictures)
    assert x.shape == (20, 1, 32, 32) and x.dtype == torch.float32
    assert x.unique().tolist() == [-1, 1]
    assert np.array_equal(shapes.from_model(x), pictures)
    assert np.array_equal(shapes.from_model(3 * x), pictures)
    grid = np.asarray(shapes.to_image(shapes.tile(shapes.from_model(0.5 * x), columns=7)))
    assert grid.shape[:2] == (3 * 130, 7 * 130)
    eighth = grid[130 + 1 : 260 - 1 : 4, 130 + 1 : 260 - 1 : 4] / 255
    assert np.abs(eighth - (0.25 + 0.5 * pictures[8])).max() < 0.01
    picture, want = np.zeros((1, 32, 32)), np.zeros((32, 32, 3), dtype=np.float32)
    picture[0, 4:12, 4:12] = picture[0, 20, 20] = picture[0, 28:, :12] = 1
    want[4:12, 4:12], want[28:, :12], want[20, 20] = *shapes.COLOURS[1::2], (1, 0, 0)
    assert np.array_equal(shapes.coloured(picture)[0], want)


def right(pictures):
    """The share of right pictures among 0/1 pictures (n, 32, 32)."""
    return shapes.score(shapes.to_model(pictures))["right"]


def test_real_pictures_are_right_and_others_are_not():
    """Catches: a score that is too strict, or blind to one pixel, to touching or a fourth shape."""
    real, rng = shapes.make_dataset(2000, seed=99), np.random.default_rng(0)
    assert right(real) == 1
    flipped = real.copy()
    flipped[np.arange(2000), rng.integers(32, size=2000), rng.integers(32, size=2000)] ^= 1
    assert right(flipped) == right(rng.random((200, 32, 32)) < 0.5) == 0
    picture = np.zeros((1, 32, 32))
    assert right(picture) == 0
    picture[0, :8, :8] = 1
    assert right(picture) == 1
    picture[0, 8:16, 8:16] = 1  # touches the first at a corner
    assert right(picture) == 0
    picture[0, 8:16, 8:16] = 0
    picture[0, 12:20, :8] = picture[0, :8, 12:20] = 1
    assert right(picture) == 1
    picture[0, 12:20, 12:20] = 1  # the fourth
    assert right(picture) == 0


def test_the_score_counts():
    """Catches: shares of the wrong whole, copies that are missed, kinds mixed up."""
    pictures = shapes.make_dataset(80, seed=5)
    x = torch.cat([shapes.to_model(pictures), shapes.to_model(pictures[:20])])
    x[-10:] = noise(10, 1, 32, 32).clamp(-1, 1)
    s = shapes.score(x, training=pictures[40:, ::-1])  # mirror images count as copies
    found = [[kind for kind, _ in shapes.explain(p)] for p in [*pictures, *pictures[:10]]]
    assert s["right"] == pytest.approx(0.9)
    assert s["kinds"].tolist() == [sum(k.count(kind) for k in found) for kind in shapes.KINDS]
    assert s["shapes"].tolist() == [sum(len(k) == n for k in found) for n in (1, 2, 3)]
    assert s["copies"] == pytest.approx(0.4) and s["distinct"] == pytest.approx(0.9)
    one = np.zeros((1, 32, 32))
    one[0, 4:12, 4:12] = one[0, 20, 20] = 1  # a rectangle and a dot
    s = shapes.score(shapes.to_model(one))
    assert s["right"] == 0 and s["kinds"].sum() == 0


# ==== Noise and the network =======================================================================


def test_schedule_against_numpy():
    """Catches: a beta index off by one, alpha for alpha_bar, float32 in the product."""
    want = {"beta": BETA, "alpha": 1 - BETA, "alpha_bar": ALPHA_BAR}
    want["one_minus_alpha_bar"] = 1 - ALPHA_BAR
    assert T == 1000 and ALPHA_BAR[T] < 1e-4 and want.keys() == vars(SCHEDULE).keys()
    for name, numbers in want.items():
        assert getattr(SCHEDULE, name).dtype == torch.float32
        assert np.allclose(getattr(SCHEDULE, name).numpy(), numbers, rtol=1e-6, atol=0), name


def test_one_jump_equals_a_thousand_steps():
    """Catches: a wrong q(x_t | x_0). Eq. 2 is applied step by step, Eq. 4 is not used."""
    mean, variance = 1.0, 0.0  # of x_t for x_0 = 1, by the rules for sums of Gaussians
    one = torch.ones(1, 1, 1, 1)
    for t, beta in enumerate(BETA[1:], start=1):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        x_0_and_eps = (one, 0 * one), (0 * one, one)
        got = [ddpm.q_sample(SCHEDULE, x_0, torch.tensor([t]), eps) for x_0, eps in x_0_and_eps]
        assert [x.item() for x in got] == pytest.approx([mean, math.sqrt(variance)], rel=1e-5)
    # Every picture has a t of its own; and Eq. 4 solved for x_0 gives x_0 back.
    (x_0, eps), t = noise(2, 5, 1, 32, 32), torch.tensor([1, 9, 300, 700, T])
    x_t = ddpm.q_sample(SCHEDULE, x_0, t, eps)
    each = [ddpm.q_sample(SCHEDULE, x_0[[i]], t[[i]], eps[[i]]) for i in range(5)]
    assert torch.allclose(torch.cat(each), x_t)
    assert torch.allclose(ddpm.predict_x_0(SCHEDULE, x_t, t, eps), x_0, atol=2e-3)


def test_time_embedding():
    """Catches: two t that look the same, a wrong frequency."""
    e = ddpm.time_embedding(torch.arange(T + 1), 128)
    assert e.shape == (T + 1, 128) and e.abs().max() <= 1
    assert torch.cdist(e, e).fill_diagonal_(9).min() > 0.1
    for i in (0, 7, 63):
        assert e[500, i].item() == pytest.approx(math.sin(500 / 10_000 ** (i / 64)), abs=1e-4)
        assert e[500, 64 + i].item() == pytest.approx(math.cos(500 / 10_000 ** (i / 64)), abs=1e-4)


@pytest.mark.parametrize("channels, width, side", [(64, 64, 16), (96, 64, 4), (16, 16, 32)])
def test_attention_against_a_naive_loop(channels, width, side):
    """Catches: softmax over the wrong axis, a missing 1/sqrt(d), mixed up heads or pixels."""
    layer, x = awake(ddpm.Attention(channels, width)), noise(2, channels, side, side)
    block, heads, got = max(1, side // 8), max(1, width // 32), layer(x)
    grid = [(i, j) for i in range(0, side, block) for j in range(0, side, block)]
    means = [x[:, :, i : i + block, j : j + block].mean((2, 3)) for i, j in grid]
    means = group_norm(torch.stack(means, 2), channels // 8, layer.norm.weight, layer.norm.bias)
    rows = [(m @ layer.qkv.weight.T + layer.qkv.bias).split(width, 1) for m in means.unbind(2)]
    assert layer.heads == heads
    for (query, _, _), (i, j) in zip(rows, grid):
        parts = []
        for h in range(heads):
            s = slice(h * width // heads, (h + 1) * width // heads)
            scores = torch.stack([(query[:, s] * key[:, s]).sum(1) for _, key, _ in rows])
            weights = (scores / math.sqrt(width / heads)).exp()
            weights = weights / weights.sum(0)
            parts.append(sum(w[:, None] * value[:, s] for w, (_, _, value) in zip(weights, rows)))
        change = torch.cat(parts, 1) @ layer.out.weight.T + layer.out.bias
        for y, z in ((i, j), (i + block - 1, j + block - 1)):
            assert torch.allclose(got[:, :, y, z], x[:, :, y, z] + change, atol=1e-4)


def test_the_network_as_described():
    """Catches: a level without attention, a block without time, a bottleneck that shrank, a
    last layer that does not start at 0, a residual sum that is missing."""
    model, sides, channels, used = ddpm.UNet(), set(), {}, []
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    blocks = [m for m in model.modules() if isinstance(m, ddpm.ResBlock)]
    for m in model.modules():
        if isinstance(m, ddpm.Attention):
            m.register_forward_hook(lambda m, i, o: sides.add(o.shape[-1]))
    for block in blocks:
        block.register_forward_hook(lambda m, i, o: channels.update({o.shape[-1]: o.shape[1]}))
        block.time.register_forward_hook(lambda m, i, o: used.append(m))
    assert model(noise(2, 1, 32, 32), torch.tensor([1, T])).shape == (2, 1, 32, 32)
    assert sides == {32, 16, 8, 4}
    assert channels[32] < channels[16] < channels[8] < channels[4] == 512
    assert used == [block.time for block in blocks] and len(blocks) >= 8
    assert not list(model.buffers()), "what is not a weight must not be saved or averaged"
    # At first the network guesses 0, and its blocks pass on their input.
    assert model(noise(2, 1, 32, 32), torch.tensor([1, T])).abs().max() == 0
    vector, h = noise(2, 128), noise(2, 32, 8, 8)
    assert torch.equal(ddpm.ResBlock(32, 32, 128)(h, vector), h)
    assert torch.equal(ddpm.Attention(32, 32)(h), h)


def test_everything_is_used_and_pictures_of_a_batch_do_not_see_each_other():
    """Catches: t ignored, in one block or all; a norm built and never applied; a lost skip;
    BatchNorm, attention across the batch, a view that mixes up axes."""
    model, x, t = awake(ddpm.UNet()), noise(3, 1, 32, 32), torch.tensor([1, 500, T])
    with torch.no_grad():
        together, other = model(x, t), model(x, torch.tensor([2, 501, 100]))
        assert (together - other).abs().amax((1, 2, 3)).min() > 1e-3
        alone = torch.cat([model(x[[i]], t[[i]]) for i in range(3)])
        assert torch.allclose(together, alone, atol=1e-4)
        for block in (m for m in model.modules() if isinstance(m, ddpm.ResBlock)):
            block.time.weight.add_(1)
            assert not torch.equal(model(x, t), together)
            block.time.weight.sub_(1)
    model(x, t).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_a_skip_is_added():
    """Catches: skips that are not joined, or after a block or attention."""
    below, skip = noise(1, 512, 4, 4), noise(1, 128, 8, 8, seed=1)
    level = ddpm.UNet().up[0]  # a new one, whose attention and blocks pass on their input
    joined, alone = (level(below, s, noise(1, 128)) for s in (skip, 0 * skip))
    assert torch.allclose(joined - alone, skip, atol=1e-5)


def test_the_guess_is_the_same_in_bfloat16_and_compiled(monkeypatch):
    """Catches: a guess that leaves the network with 8 bits; autocast that is not used; code that
    torch.compile cannot follow."""
    model, x, t = awake(ddpm.UNet()), noise(3, 1, 32, 32), torch.tensor([1, 300, T])
    small, guesses = awake(ddpm.UNet(*SMALL)), []
    with torch.no_grad():
        for fast in (True, False):
            monkeypatch.setattr(ddpm, "fast_bfloat16", lambda device, fast=fast: fast)
            guesses.append(model(x, t))
        assert guesses[0].dtype == guesses[1].dtype == torch.float32
        assert torch.allclose(*guesses, atol=0.1) and not torch.equal(*guesses)
        if not (shutil.which("cc") and shutil.which("g++")):
            pytest.skip("torch.compile needs a C compiler")
        want = small(x, t)
        small.compile()
        assert torch.allclose(small(x, t), want, atol=1e-4)


# ==== Reverse process =============================================================================


def any_model(x, t):
    """A network that is quick and not quite right: depends on t, the pixel and a neighbour."""
    return SCHEDULE.signal_and_noise(t)[1] * (0.9 * x + 0.1 * x.roll(1, 3).tanh())


def x_0_of(x_t, t, eps):
    """Eq. 4 solved for x_0, in float64."""
    a = ALPHA_BAR[t]
    return (x_t.double() - math.sqrt(1 - a) * eps.double()) / math.sqrt(a)


def test_algorithm_2_is_eq_7_with_the_predicted_x_0():
    """Catches: a wrong coefficient or sigma, alpha for alpha_bar, noise at the end or noise that
    comes again, a clip, a walk that leaves out a t."""
    z, stops = seeded(4), list(ddpm.algorithm_2(any_model, SCHEDULE, noise(2, 1, 8, 8), seeded(4)))
    assert [t for t, _, _ in stops] == list(range(T, -1, -1))
    assert stops[0][2].abs().max() > 1, "nothing to clip"
    for (t, x_t, x_0), (_, got, _) in itertools.pairwise(stops):
        beta, now, before = BETA[t], ALPHA_BAR[t], ALPHA_BAR[t - 1]
        guess = x_0_of(x_t, t, any_model(x_t, torch.tensor([t])))
        mean = math.sqrt(before) * beta / (1 - now) * guess
        mean += math.sqrt(1 - beta) * (1 - before) / (1 - now) * x_t.double()
        x = mean + math.sqrt((1 - before) / (1 - now) * beta) * torch.randn(x_t.shape, generator=z)
        assert torch.allclose(x_0.double(), guess, atol=1e-3), t
        assert torch.allclose(got.double(), x, atol=1e-4), t
    assert torch.allclose(x, mean) and stops[-1][1] is stops[-1][2]


@pytest.mark.parametrize("steps, eta", [(T, 1.0), (T, 0.5), (7, 0.0), (7, 0.5), (7, 1.0)])
def test_ddim_by_hand(steps, eta):
    """Catches: eta for eta squared, sigma that is added but not taken from the rest, a missing
    clip, the eps of another guess; noise that the generator does not control."""
    z, x, a = seeded(4), noise(2, 1, 8, 8).double(), ALPHA_BAR
    stops = list(ddpm.ddim(any_model, SCHEDULE, x.float(), steps, eta, seeded(4)))
    for (t, x_t, x_0), (s, got, _) in itertools.pairwise(stops):
        whole = x_0_of(x_t, t, any_model(x_t, torch.tensor([t])))
        guess = whole.clamp(-1, 1)
        assert t < T or whole.abs().max() > 1, "nothing to clip"
        eps = (x_t.double() - math.sqrt(a[t]) * guess) / math.sqrt(1 - a[t])
        sigma = eta * math.sqrt((1 - a[s]) / (1 - a[t])) * math.sqrt(1 - a[t] / a[s])  # Eq. 16
        rest = math.sqrt(max(0, 1 - a[s] - sigma**2))
        x = math.sqrt(a[s]) * guess + rest * eps + sigma * torch.randn(x.shape, generator=z)
        assert torch.allclose(x_0.double(), guess, atol=1e-4), t
        assert torch.allclose(got.double(), x, atol=1e-4), t
    assert stops[-1][1] is stops[-1][2]


def test_both_ends_of_the_schedule_are_visited():
    """Catches: sampling that starts below T or never reaches t = 1, repeated steps."""
    for steps in (1, 2, 3, 20, 50, 999, T):
        stops = ddpm.ddim(lambda x, t: x, SCHEDULE, torch.zeros(1, 1, 1, 1), steps)
        times = [t for t, _, _ in stops]
        assert times[0] == T and times[-1] == 0 and len(times) == steps + 1
        gaps = -np.diff(times[:-1])
        assert steps == 1 or (times[-2] == 1 and gaps.min() >= 1 and np.ptp(gaps) <= 1)


def test_one_pixel_is_bayes_rule_and_ends_at_minus_or_plus_one():
    """Catches: a wrong tanh; a walk that ends elsewhere, fresh noise missing or too much."""
    model, x = ddpm.one_pixel(SCHEDULE), np.linspace(-3, 3, 61)
    for t in (1, 10, 100, 300, 500, 700, T):  # two Gaussian densities, in float64
        signal, variance = math.sqrt(ALPHA_BAR[t]), 1 - ALPHA_BAR[t]
        exponents = np.stack([-((x - x_0 * signal) ** 2) / (2 * variance) for x_0 in (1, -1)])
        densities = np.exp(exponents - exponents.max(0))
        plus, minus = densities / densities.sum(0)
        want = (x - signal * (plus - minus)) / math.sqrt(variance)
        got = model(torch.from_numpy(x).float().view(-1, 1, 1, 1), torch.full((61,), t))
        assert np.allclose(got.flatten().numpy(), want, rtol=1e-4, atol=1e-4), t
    x_T, half = noise(4, 1, 32, 32), pytest.approx(0.5, abs=0.03)
    for stops, on_the_side_of_x_T in (
        (ddpm.algorithm_2(model, SCHEDULE, x_T, seeded(1)), half),
        (ddpm.ddim(model, SCHEDULE, x_T, T, 1.0, seeded(1)), half),
        (ddpm.ddim(model, SCHEDULE, x_T, T, 0.0), 1),
    ):
        *_, (_, x, _) = stops
        assert (x.abs() - 1).abs().max() < 1e-2 and (x > 0).float().mean().item() == half
        assert ((x > 0) == (x_T > 0)).float().mean().item() == on_the_side_of_x_T


def test_the_loss_by_hand():
    """Catches: x_t for another t, a loss that is not Eq. 14."""
    x_0, eps = noise(4, 1, 32, 32).sign(), noise(4, 1, 32, 32, seed=1)
    t, seen = torch.tensor([1, 20, 500, T]), []
    a = torch.from_numpy(ALPHA_BAR)[t].view(-1, 1, 1, 1)
    network = lambda *inputs: seen.append(inputs) or any_model(*inputs)
    loss = ddpm.loss_fn(network, SCHEDULE, x_0, t, eps).item()
    ((x_t, times),) = seen
    assert torch.allclose(x_t.double(), a.sqrt() * x_0 + (1 - a).sqrt() * eps, atol=1e-5)
    assert torch.equal(times, t)
    want = (any_model(x_t, t) - eps).square().sum().item() / (4 * 32 * 32)
    assert loss == pytest.approx(want, rel=1e-5)


# ==== Training ====================================================================================


def test_times_are_the_mean_of_two_uniform_draws_and_every_16th_is_uniform():
    """Catches: t drawn from 0..T-1 or 1..T-1: sampling would start where nobody trained."""
    n, one = 4_000_000, np.arange(1, T + 1)
    pairs = np.bincount((one[:, None] + one).ravel() // 2) / T**2
    t = ddpm.draw_t(n, seeded(0)).view(-1, 16)
    assert t.dtype == torch.int64 and ddpm.draw_t(7, seeded(0)).shape == (7,)
    for column, want in (t[:, :1], np.full(T, 1 / T)), (t[:, 1:], pairs[1:]):
        count, want = np.bincount(column.flatten(), minlength=T + 1), want * column.numel()
        assert len(count) == T + 1 and count[0] == 0
        chi_square = ((count[1:] - want) ** 2 / want).sum()
        assert abs(chi_square - (T - 1)) < 4 * math.sqrt(2 * (T - 1))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (40, 4, 3, 3), (9, 5), (5, 9)])
def test_muon_by_hand(shape, fast, monkeypatch):
    """Catches: a tall matrix taken for a wide one, a lost momentum, a rate of the wrong kind, a
    wrong coefficient, too few rounds, a precision that is not enough."""
    monkeypatch.setattr(ddpm, "fast_bfloat16", lambda device: fast)
    p = torch.nn.Parameter(torch.zeros(shape))
    muon, average, want = train.Muon([p], {"lr": 1e-3}), 0, 0
    for step in range(1, 8):
        p.grad = noise(*shape, seed=step)
        muon.step()
        average = 0.95 * average + 0.05 * p.grad.double()
        x = (0.95 * average + 0.05 * p.grad.double()).flatten(1)
        u, lengths, v = torch.linalg.svd(x, full_matrices=False)
        lengths = lengths / lengths.norm()
        for _ in range(3):
            lengths = 3.4445 * lengths - 4.775 * lengths**3 + 2.0315 * lengths**5
        want = want - 1e-3 * math.sqrt(max(x.shape)) * (u * lengths @ v).view(shape)
        assert torch.allclose(p.double(), want, rtol=0, atol=5e-4 if fast else 1e-6), step


def test_muon_gets_the_matrices_and_adam_the_rest():
    """Catches: a weight in no group or in two; the first or last layer taken for a matrix."""
    model = ddpm.UNet()
    muon, adam = train.optimizers_for(model, 2e-4)
    groups = [{*o.param_groups[0]["params"]} for o in (muon, adam)]
    assert isinstance(muon, train.Muon) and isinstance(adam, torch.optim.Adam)
    assert muon.defaults["lr"] == 2e-4 and adam.defaults["lr"] == train.ADAM_RATE
    assert adam.defaults["betas"] == (0.9, 0.99) and adam.defaults["weight_decay"] == 0
    assert groups[0].isdisjoint(groups[1]) and groups[0] | groups[1] == {*model.parameters()}
    weights = {p for p in model.parameters() if p.ndim > 1}
    assert groups[0] == weights - {model.stem.weight, model.out.weight}


def test_mirror_gives_all_eight_mirror_images_alike():
    """Catches: pictures that are mixed up or lost, the same coin for a whole batch."""
    picture = noise(1, 1, 32, 32)
    eight = [p.rot90(k, (2, 3)) for k in range(4) for p in (picture, picture.flip(3))]
    x = shapes.mirror(picture.expand(4000, -1, -1, -1), seeded(0))
    counts = [(x == p).all((1, 2, 3)).sum().item() for p in eight]
    assert x.shape == (4000, 1, 32, 32) and sum(counts) == 4000
    assert all(400 < count < 600 for count in counts)


def run_train(folder, *flags, name="a_run"):
    """train.py in this process; returns what it left behind."""
    new = [] if "--resume" in flags else ["--samples=64", "--batch-size=16", "--lr=1e-3"]
    train.train(*train.parse([*new, *flags, "--device=cpu", f"--checkpoints={folder}"]), name)
    return read(folder / "latest.pt")


def read(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def same(a, b):
    """Whether two checkpoints are equal, bit for bit."""
    if isinstance(a, dict):
        a, b = list(a.items()), list(b.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


LEARNED = ("config", "flags", "model", "ema", "optimizers", "epoch")


def test_two_epochs_and_two_more_are_four(tiny, monkeypatch, tmp_path):
    """Catches: noise that repeats or differs, optimizer or EMA not restored, data replayed, a
    skipped epoch; a run that ends when a backup touches its checkpoint."""
    touch = lambda path, history: os.utime(path.parent / "latest.pt", (time.time() + 99,) * 2)
    monkeypatch.setattr(train, "save_curve", touch)
    whole = run_train(tmp_path / "a", "--epochs=4")
    run_train(tmp_path / "b", "--epochs=2")
    parts = run_train(tmp_path / "b", "--resume", "--epochs=4")
    other = run_train(tmp_path / "c", "--epochs=4", "--seed=1")
    for key in LEARNED:
        assert same(whole[key], parts[key]), key
    losses = [[(r["loss"], r["validation"]) for r in s["history"]] for s in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert not same(whole["model"], other["model"]) and not same(whole["model"], whole["ema"])
    assert whole["optimizers"][0]["param_groups"][0]["lr"] == pytest.approx(0.16 * 1e-3)
    # The command just typed works with --resume, too; with another --lr it would not.
    words = ["--samples=64", "--batch-size=16", "--lr=1e-3", "--resume", "--epochs=4"]
    assert same(run_train(tmp_path / "b", *words), parts)
    with pytest.raises(SystemExit):
        run_train(tmp_path / "b", "--resume", "--lr=1e-4")


def test_each_epoch_shuffles_anew_and_each_step_has_its_own_noise(tiny, monkeypatch, tmp_path):
    """Catches: data not reshuffled, not mirrored or used twice in an epoch; t or noise that comes
    again in another step, epoch or seed; noise not standard normal; a gradient not clipped; an
    average of the weights that never moves, or forgets too soon."""
    pictures, times, noises, mirrored, models, weights = [], [], [], [], [], []
    loss_fn, step = ddpm.loss_fn, train.Muon.step

    def spy_on_loss(model, schedule, x_0, t, eps):
        if torch.is_grad_enabled():  # not in validation
            pictures.append(x_0.clone())
            times.append(tuple(t.tolist()))
            noises.append(eps)
            models.append(model)
            weights.append(model.out.weight.detach().clone())
        return 1000 * loss_fn(model, schedule, x_0, t, eps)

    def spy_on_step(muon):
        gradient = torch.cat([p.grad.flatten() for p in models[-1].parameters()])
        assert gradient.norm().item() == pytest.approx(1, rel=1e-3)
        step(muon)

    monkeypatch.setattr(shapes, "mirror", lambda x_0, generator: mirrored.append(x_0) or x_0)
    monkeypatch.setattr(ddpm, "loss_fn", spy_on_loss)
    monkeypatch.setattr(train.Muon, "step", spy_on_step)
    monkeypatch.setattr(train, "DECAY_FROM", 2)
    monkeypatch.setattr(train, "WARMUP", 1)
    state = run_train(tmp_path / "a", "--epochs=2")
    average = weights[0]
    for k, weight in enumerate([*weights[1:], state["model"]["out.weight"]], start=1):
        average = average + 9 / (10 + k) * (weight - average)
    assert torch.allclose(average, state["ema"]["out.weight"]) and len(mirrored) == k == 8
    rates = [optimizer["param_groups"][0]["lr"] for optimizer in state["optimizers"]]
    assert rates == pytest.approx([0.5 * 1e-3, 0.5 * train.ADAM_RATE])  # sqrt(2 / 8) of the peak
    first, second = torch.cat(pictures[:4]), torch.cat(pictures[4:])
    data = shapes.to_model(shapes.make_dataset(64, seed=0))
    assert not torch.equal(first, second) and not torch.equal(first, data)
    keys = [sorted(p.numpy().tobytes() for p in x) for x in (first, second, data)]
    assert keys[0] == keys[1] == keys[2]
    run_train(tmp_path / "b", "--epochs=2", "--seed=1")
    eps = torch.cat(noises)
    assert len({*times}) == len({x.numpy().tobytes() for x in noises}) == len(times) == 16
    assert eps.shape == (256, 1, 32, 32) and abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01


def test_best_is_the_epoch_with_the_lowest_validation_loss(tiny, monkeypatch, tmp_path):
    """Catches: best saved as latest, raw weights in place of the average, half files left;
    a grid of other weights, or of other noise at each epoch."""
    losses, averages, grids, draw_samples = iter([0.5, 0.2, 0.9, 0.3]), [], [], train.draw_samples

    def spy(path, average, schedule):
        averages.append({name: p.clone() for name, p in average.named_parameters()})
        assert not any(p.requires_grad for p in average.parameters())
        return draw_samples(path, average, schedule)

    def ddim(model, schedule, x_T, steps, generator):
        grids.append([len(x_T), steps, x_T, torch.randn(9, generator=generator)])
        return [(0, x_T, x_T)]

    monkeypatch.setattr(train, "SAMPLE_EVERY", 1)
    monkeypatch.setattr(train, "validation_loss", lambda *a: next(losses))
    monkeypatch.setattr(train, "draw_samples", spy)
    monkeypatch.setattr(ddpm, "ddim", ddim)
    latest = run_train(tmp_path, "--epochs=4")
    best, model = ddpm.load(tmp_path / "best.pt")
    assert best["epoch"] == 2 and latest["epoch"] == 4 and not list(tmp_path.glob("*.tmp"))
    assert same(dict(latest["ema"]), averages[3]) and not same(latest["ema"], latest["model"])
    for name, weight in model.named_parameters():  # in 16 bits
        assert torch.allclose(weight, averages[1][name], rtol=1e-3, atol=1e-6)
    assert len(grids) == 4 and all(same(grid, grids[0]) for grid in grids)
    assert grids[0][:2] == [train.PICTURES, train.STEPS]


def test_a_loss_that_is_not_finite_is_never_saved(tiny, monkeypatch, tmp_path):
    """Catches: NaN weights in a checkpoint."""
    before = run_train(tmp_path, "--epochs=1")
    nan = lambda model, *a: sum(p.sum() for p in model.parameters()) * math.nan
    monkeypatch.setattr(ddpm, "loss_fn", nan)
    with pytest.raises(SystemExit, match="not finite"):
        run_train(tmp_path, "--resume", "--epochs=2")
    assert same(before, read(tmp_path / "latest.pt"))


@pytest.mark.parametrize("second", ["--seed=2", "--resume"])
def test_a_second_training_in_the_same_folder_loses_nothing(second, tiny, monkeypatch, tmp_path):
    """Catches: a forgotten --resume that destroys an hour; two runs that overwrite each other."""
    old, aside = run_train(tmp_path, "--epochs=1", name="old"), tmp_path / "before_first"
    # While the next run is in its second epoch, another one begins in the same folder.
    validation_loss, others = train.validation_loss, []

    def and_meanwhile(*args):
        if aside.exists() and not others:
            others.append(None)
            others[0] = run_train(tmp_path, "--epochs=3", second, name="other")
        return validation_loss(*args)

    monkeypatch.setattr(train, "validation_loss", and_meanwhile)
    with pytest.raises(SystemExit, match="another training"):
        run_train(tmp_path, "--epochs=3", "--seed=1", name="first")
    assert same(others[0], read(tmp_path / "latest.pt")) and others[0]["epoch"] == 3
    assert same(old, read(aside / "latest.pt"))
    names = {"latest.pt", "best.pt", "loss.png", "samples_0001.png"}
    assert {path.name for path in aside.iterdir()} == names
    if second == "--seed=2":
        first = read(tmp_path / "before_other/latest.pt")
        assert (first["name"], first["epoch"], first["flags"]["seed"]) == ("first", 1, 1)


# ==== The scripts, as a user runs them ============================================================


def test_training_leaves_what_it_promises(tiny, tmp_path, capsys):
    """Catches: a missing file, number or line of text; random state that another device lacks;
    fresh noise in every validation, validation of raw weights or of training pictures."""
    state, best = run_train(tmp_path, "--epochs=1"), read(tmp_path / "best.pt")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"latest.pt", "best.pt", "loss.png", "samples_0001.png", "logs"}
    for_sampling = {"config", "flags", "name", "epoch", "history", "ema"}
    assert {*state} == for_sampling | {"optimizers", "model"} and {*best} == for_sampling
    assert {p.dtype for p in best["ema"].values()} == {torch.float16}
    assert {*state["flags"]} == {*train.SAVED} and state["name"] == "a_run"
    (row,) = state["history"]
    assert list(row) == ["epoch", "loss", "validation", "right"] and row["epoch"] == 1
    model = ddpm.load(tmp_path / "latest.pt")[1]
    others = shapes.to_model(shapes.make_dataset(512, [0, 1]))
    losses = {train.validation_loss(model, SCHEDULE, others) for _ in range(2)}
    assert losses == {row["validation"]}
    out = capsys.readouterr().out
    assert "cpu, bfloat16" in out and f"validation {round(row['validation'], 4)}" in out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    for key, value in row.items():
        (event,) = events.Scalars(key)
        assert event.step == 1 and event.value == pytest.approx(value)


def test_sampling_from_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    """Catches: a flag that is not used, a file that is missing, a picture that cannot be drawn."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device=cpu", *flags])
        sample.main()
        return capsys.readouterr().out

    run_train(tmp_path / "checkpoints", "--epochs=1")
    monkeypatch.chdir(tmp_path)
    for name, flag in {"a": "--seed=1", "b": "--seed=1", "c": "--seed=2", "d": "--eta=0.5"}.items():
        run("--n=3", "--steps=3", "--seed=1", flag, f"--output={name}.png")
    a, b, c, d = ((tmp_path / f"{name}.png").read_bytes() for name in "abcd")
    assert a == b != c and a != d
    out = run("--score", "--n=8", "--steps=2")
    assert f"{Path('checkpoints/best.pt')}, epoch 1, " in out and "these samples" in out
    assert re.search(r"other real pictures +100.0%", out)
    for flag in ("--explain", "--show-process", "--process"):
        run(flag, "--steps=5")
    assert {"explained.png", "process.png", "process.gif"} <= {p.name for p in tmp_path.iterdir()}
    args = [sample.parse(words) for words in ([], ["--process"], ["--score"])]
    assert [(a.n, a.steps, a.eta) for a in args] == [(16, T, 1), (4, T, 1), (500, 50, 1)]
    used = []
    for name in ("algorithm_2", "ddim"):
        fake = lambda model, schedule, x_T, *a, name=name: used.append(name) or [(0, x_T, x_T)]
        monkeypatch.setattr(ddpm, name, fake)
    for flag in ("--steps=1000", "--eta=0.5", "--steps=999"):
        run("--n=1", flag)
    assert used == ["algorithm_2", "ddim", "ddim"]


def test_the_scripts_in_processes_of_their_own(tmp_path):
    """Catches: an error where a notebook has set MPLBACKEND to what is not installed here; a
    picture that is not saved, a table that does not add up, an error of more than one line."""
    inline = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = []
    for command in ("ddpm.py", "shapes.py", "train.py --resume", "sample.py --checkpoint no.pt"):
        name, *flags = command.split()
        words = [sys.executable, HERE / name, *flags]
        options = {"cwd": tmp_path, "env": inline, "capture_output": True, "text": True}
        done.append(subprocess.run(words, **options, check=False))
    assert [process.returncode for process in done] == [0, 0, 1, 1]
    assert "error: cannot load no.pt: " in done[3].stderr.strip().splitlines()[-1]
    assert not any("Traceback" in process.stderr for process in done)
    counts = re.findall(r"([\d,]+) parameters", done[0].stdout)
    *parts, whole = [int(count.replace(",", "")) for count in counts]
    assert sum(parts) == whole == sum(p.numel() for p in ddpm.UNet().parameters())
    names = {"forward.png", "pixel.png", "shapes.png", "catalogue.png"}
    assert {p.name for p in tmp_path.iterdir()} == names and "46 shapes" in done[1].stdout


# Starts train.py in a process of its own, with a small network.
TINY = f"""
import ddpm, runpy
ddpm.UNet.__init__.__defaults__ = {SMALL}
runpy.run_path({str(HERE / "train.py")!r}, run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_stopped_at_any_moment_the_last_epoch_is_kept(tiny, tmp_path):
    """Catches: a traceback on Ctrl-C, a checkpoint written in place, a run that cannot go on;
    lines that come late, a progress bar in a file; an older run that is moved too early."""
    log, folder, done = tmp_path / "log", tmp_path / "checkpoints", 0
    saving = lambda text: text.count("validation") >= 3 and [*folder.glob("*.tmp")]
    begun = lambda text: "bfloat16" in text
    new, slow = ["--samples=64", "--batch-size=16", "--epochs=9999"], ["--batch-size=1"]
    resume, kill, stop = ["--resume"], signal.SIGKILL, signal.SIGINT
    # The last is stopped in the first epoch of another run.
    for how, flags, enough in (kill, new, saving), (stop, resume, saving), (stop, slow, begun):
        for half in folder.glob("*.tmp"):  # a killed program may leave one
            half.unlink()
        before = {path: path.read_bytes() for path in folder.glob("*.*")}
        with log.open("w") as file:
            words = [sys.executable, "-c", TINY, "--device=cpu", *flags]
            env = {**os.environ, "PYTHONUNBUFFERED": "", "PYTHONPATH": str(HERE)}
            options = {"cwd": tmp_path, "env": env}
            process = subprocess.Popen(words, **options, stdout=file, stderr=subprocess.PIPE)
        deadline = time.time() + 120
        while not enough(log.read_text()):
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.0005)
        process.send_signal(how)
        err = process.communicate(timeout=60)[1].decode()
        assert process.returncode == (1 if how == stop else -how)
        assert "Traceback" not in err and "it/s" not in err
        assert how == kill or "--resume" in err
        epochs = re.findall(r"^epoch (\d+), loss .*validation", log.read_text(), re.MULTILINE)
        last, _ = ddpm.load(folder / "latest.pt")[0]["epoch"], ddpm.load(folder / "best.pt")
        assert epochs == [str(done + 1 + i) for i in range(len(epochs))]
        assert last - done - len(epochs) in (0, 1) and len(epochs) < 100, "lines come late"
        done = last
    assert not epochs and before == {path: path.read_bytes() for path in folder.glob("*.*")}
    assert run_train(folder, "--resume", f"--epochs={done + 1}")["epoch"] == done + 1


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    """Catches: writing in place; an error that train.py does not turn into one line."""
    resource = pytest.importorskip("resource")  # not on Windows
    ddpm.save(tmp_path / "a.pt", {"epoch": 1})
    before, limits = (tmp_path / "a.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):  # in place of "no space left"
            ddpm.save(tmp_path / "a.pt", {"x": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.pt").read_bytes() == before


# ==== Broken files and wrong flags ================================================================


class Evil:
    """Unpickling it makes a folder where the program runs."""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


def packed(state):
    """The bytes of a checkpoint."""
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def test_a_broken_checkpoint_gets_one_line(tmp_path, monkeypatch):
    """Catches: a traceback, code run from a file, weights loaded into the wrong network."""
    path, model = tmp_path / "broken.pt", ddpm.UNet(*SMALL)
    state = {"config": model.config, "flags": {}, "epoch": 1, "ema": awake(model).state_dict()}
    whole = packed(state)
    path.write_bytes(whole)
    assert ddpm.load(path)[0]["epoch"] == 1
    rotten = bytearray(whole)
    rotten[whole.index(model.time[0].weight.detach().numpy().tobytes()) + 99] ^= 1
    monkeypatch.chdir(tmp_path)
    others = {**state, "config": {"narrow": 16}}, {**state, "flags": Evil()}, {"epoch": 1}
    broken = [b"", b"not a checkpoint", whole[: len(whole) // 2], rotten]
    for content in [*broken, *map(packed, others)]:
        path.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            ddpm.load(path)
        message = stop.value.code
        assert message.startswith(f"error: cannot load {path}: ") and "\n" not in message
        assert not (tmp_path / "it ran").exists()


BAD = {
    "train.py": """--epochs 0, --lr nan, --seed -1, --samples 10, --device tpu, --resume,
        --samples 64 --checkpoints a_file""",
    "sample.py": """--steps 0, --steps 1001, --n 0, --process --n 33, --checkpoint nothing.pt,
        --checkpoint a_file, --checkpoint ., --output picture.docx, --eta 2,
        --output nowhere/x.png""",
}
COMMANDS = [(name, flags.split()) for name, text in BAD.items() for flags in text.split(",")]


@pytest.mark.parametrize("name, flags", COMMANDS)
def test_bad_input_gets_one_line_and_no_traceback(name, flags, tmp_path, monkeypatch, capsys):
    """Catches: a traceback for the user, exit code 0 after an error, files lost or made."""
    (tmp_path / "a_file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HERE / name), run_name="__main__")
    assert stop.value.code not in (0, None)
    message = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert "error: " in message.strip().splitlines()[-1]
    assert (tmp_path / "a_file").read_text() == "mine" and not list(tmp_path.glob("checkpoints/*"))


def test_the_weights_that_come_along():
    """Catches: a missing or outgrown assets/pretrained.pt, or one trained with other flags."""
    assert sample.PRETRAINED.stat().st_size <= 6e6
    state, model = ddpm.load(sample.PRETRAINED)
    args, _ = train.parse([])
    assert state["flags"] == {key: getattr(args, key) for key in train.SAVED}
    assert model.config == ddpm.UNet().config and state["epoch"] > 50
    # Started from pictures noised to t = 200, nearly all come back right.
    x_0 = shapes.to_model(shapes.make_dataset(16, [0, 3]))
    t = torch.full((16,), 200)
    x_t = ddpm.q_sample(SCHEDULE, x_0, t, noise(16, 1, 32, 32))
    with torch.no_grad():
        guess = ddpm.predict_x_0(SCHEDULE, x_t, t, model(x_t, t))
    assert (guess.sign() != x_0).float().sum((1, 2, 3)).mean() < 2


# ==== The cloud, and the README ===================================================================


def test_modal_asks_for_an_a100_and_passes_all_flags_on(monkeypatch):
    """Catches: another GPU or volume, a lost flag or exit code, an import of torch."""
    code = "import sys; sys.modules['torch'] = None; import modal_train"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, timeout=60)
    import modal_train

    spec = modal_train.train_in_cloud._spec_  # Modal has no public way to look at it
    assert spec.gpus == "A100" and list(spec.volumes) == [modal_train.FOLDER]
    assert "diffusion-checkpoints" in repr(spec.volumes[modal_train.FOLDER])
    cloud = types.SimpleNamespace(remote=lambda flags, name: flags)
    monkeypatch.setattr(modal_train, "train_in_cloud", cloud)
    with pytest.raises(SystemExit) as stop:
        modal_train.main.info.raw_f("--epochs", "3", "--compile")
    assert stop.value.code == ["--epochs", "3", "--compile"]


def test_modal_body_trains_and_goes_on_after_a_restart(tiny, tmp_path):
    """Catches: flags that do not arrive; a restart that begins again; a new run that resumes."""
    import modal_train

    run = modal_train.train_in_cloud.local
    flags = ["--samples=64", "--batch-size=16", "--lr=1e-3", "--device=cpu"]
    run([*flags, "--epochs=1"], "one", str(tmp_path))
    run([*flags, "--epochs=3"], "one", str(tmp_path))  # the same run, called again
    state = read(tmp_path / "latest.pt")
    assert state["epoch"] == 3 and not list(tmp_path.glob("before_*"))
    run([*flags, "--epochs=1"], "two", str(tmp_path))
    assert read(tmp_path / "latest.pt")["epoch"] == 1
    assert same(read(tmp_path / "before_two/latest.pt"), state)
    run(["--resume", "--epochs=2", "--device=cpu"], "three", str(tmp_path))
    state = read(tmp_path / "latest.pt")
    assert (state["name"], state["epoch"]) == ("two", 2)
    assert run(["--epochs=0"], "four", str(tmp_path)) == 2  # and not an error, to be tried again
    torch.save({"epoch": 9}, tmp_path / "latest.pt")  # left by an older version
    run([*flags, "--epochs=1"], "five", str(tmp_path))
    assert read(tmp_path / "before_five/latest.pt") == {"epoch": 9}


README = (HERE / "README.md").read_text(encoding="utf-8")


def test_readme_links_and_flags_exist():
    """Catches: a picture or a flag that was renamed; a folder that makes the clone slow."""
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (HERE / link).exists(), link
    flags = [*vars(train.parse([])[0]), *vars(sample.parse([]))]
    known = {"--help"} | {"--" + flag.replace("_", "-") for flag in flags}
    for command in re.findall(r"(?:train|sample|modal_train)\.py ([^`\n]*)", README):
        assert set(re.findall(r"--[a-z-]+", command)) <= known, command
    assert sum(p.stat().st_size for p in (HERE / "assets").iterdir()) <= 12e6
