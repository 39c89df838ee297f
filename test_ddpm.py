"""Holds the program against computations made in another way: python -m pytest

Good samples do not prove correct code. Every test here says what it would catch.
"""

import hashlib
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
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

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
    """Makes every new UNet a small one, and validation and samples cheap."""
    monkeypatch.setattr(ddpm.UNet.__init__, "__defaults__", SMALL)
    monkeypatch.setattr(train, "VALIDATION", 32)
    monkeypatch.setattr(train, "PICTURES", 2)
    monkeypatch.setattr(train, "STEPS", 2)


# ==== The data ====================================================================================


def test_pictures_are_the_same_bytes_everywhere():
    """Catches: any change to what is drawn, or to the order in which random numbers are used."""
    digest = hashlib.sha256(shapes.make_dataset(1000, seed=0).tobytes()).hexdigest()
    assert digest[:16] == "e7f317c0d3d21075"
    assert not np.array_equal(shapes.make_dataset(9, seed=0), shapes.make_dataset(9, seed=1))


def test_the_catalogue_is_closed_under_mirror_images():
    """Catches: a drawing rule that favours a side; a mask that is in two kinds, or twice."""
    masks = [mask for kind in shapes.KINDS for mask in shapes.CATALOGUE[kind]]
    assert len(masks) == len(shapes.KIND_OF) == len(set(map(shapes.key, masks))) == 46
    for kind in shapes.KINDS:
        for mask in shapes.CATALOGUE[kind]:
            for turned in (np.rot90(mask), mask[:, ::-1]):  # these two generate all eight
                assert shapes.KIND_OF[shapes.key(np.ascontiguousarray(turned))] == kind


def test_every_mask_against_its_geometry():
    """Catches: half-open shapes, a wrong rounding, a lost edge, sizes out of range."""
    for mask in shapes.CATALOGUE["circle"]:
        d = len(mask)
        middle = (d - 1) / 2
        inside = [[math.hypot(x - middle, y - middle) <= d / 2 for x in range(d)] for y in range(d)]
        assert 8 <= d <= 16 and np.array_equal(mask, inside)
    for mask in shapes.CATALOGUE["rectangle"]:
        assert mask.all() and 8 <= min(mask.shape) and max(mask.shape) <= 16
    for mask in shapes.CATALOGUE["triangle"]:
        # One of the four turns has its tip up: rows grow by 2 or stay, around the same middle.
        upright = [m for m in map(np.rot90, [mask] * 4, range(4)) if (np.diff(m.sum(1)) >= 0).all()]
        (m,) = [m for m in upright if m[0].sum() == 2]
        assert np.array_equal(m, m[:, ::-1]) and m[-1].all()
        assert set(np.diff(m.sum(1))) <= {0, 2} and (np.diff(m, axis=0) >= 0).all()
    for mask in shapes.CATALOGUE["line"]:
        h, w = mask.shape
        if h == w:  # a diagonal or its mirror image: five pixels wide, but for its ends
            assert mask.sum(1).tolist() == [3, 4, *[5] * (h - 4), 4, 3] and 8 <= h <= 24
            assert mask.trace() == h or mask[::-1].trace() == h
        else:
            assert mask.all() and min(h, w) == 4 and 12 <= max(h, w) <= 32
    for mask in itertools.chain(*shapes.CATALOGUE.values()):
        assert len(blobs(mask)) == 1 and not any(n % 4 for n in mask.shape)


def blobs(picture):
    """Connected sets of pixels by repeated growing, another way than in shapes.py."""
    left, found = np.pad(picture, 1).astype(bool), []
    while left.any():
        blob = np.zeros_like(left)
        blob[tuple(np.argwhere(left)[0])] = True
        size = 0
        while blob.sum() > size:
            size = blob.sum()
            moved = [np.roll(blob, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            blob = np.any(moved, axis=0) & left
        left &= ~blob
        found.append(blob[1:-1, 1:-1])
    return found


def test_a_data_set_holds_what_it_says():
    """Catches: uneven kinds or numbers, shapes that touch or leave the grid, unexplained blobs."""
    pictures = shapes.make_dataset(10_000, seed=3)
    assert pictures.shape == (10_000, 32, 32) and pictures.dtype == np.uint8
    found = [[kind for kind, _ in shapes.explain(picture)] for picture in pictures[:3000]]
    count = np.bincount([len(kinds) for kinds in found], minlength=4)
    assert count[0] == 0 and len(count) == 4
    assert np.abs(count[1:] - [1080, 1440, 480]).max() < 5 * math.sqrt(750)
    kinds = np.array([sum(k.count(kind) for k in found) for kind in shapes.KINDS])
    assert kinds.sum() == sum(map(len, found))
    assert np.abs(kinds - kinds.mean()).max() < 5 * math.sqrt(1500)
    for picture in pictures[:200]:
        a, b = blobs(picture), [blob for _, blob in shapes.explain(picture)]
        assert {x.tobytes() for x in a} == {x.tobytes() for x in b}
        boxes = []
        for blob in a:
            (top, left), (bottom, right) = np.argwhere(blob).min(0), np.argwhere(blob).max(0) + 1
            assert not any(n % 4 for n in (top, left, bottom, right))
            boxes.append((top, left, bottom, right))
        for one, two in itertools.combinations(boxes, 2):
            assert max(one[0] - two[2], two[0] - one[2], one[1] - two[3], two[1] - one[3]) >= 4
    # Every size of circle, and every pixel, comes up.
    alone = [p for p, k in zip(pictures, found) if k == ["circle"]]
    widths = np.bincount([p.any(0).sum() for p in alone])
    assert min(widths[8:17:4]) > 20 and widths.sum() == widths[8:17:4].sum()
    used = pictures.mean(0)
    assert used.min() > 0.001 and np.abs(used - used[::-1, ::-1]).max() < 0.03


def test_model_range_and_back():
    """Catches: pictures scaled to [0, 1], a missing channel, float64, a grid out of order."""
    pictures = shapes.make_dataset(20, seed=0)
    x = shapes.to_model(pictures)
    assert x.shape == (20, 1, 32, 32) and x.dtype == torch.float32
    assert x.unique().tolist() == [-1, 1]
    assert np.array_equal(shapes.from_model(x), pictures)
    assert np.array_equal(shapes.from_model(3 * x), pictures)
    grid = shapes.tile(pictures, columns=7, scale=2)
    assert grid.shape == (3 * 66, 7 * 66)
    assert np.array_equal(grid[66 + 1 : 132 - 1 : 2, 66 + 1 : 132 - 1 : 2], pictures[8])


def test_pictures_for_people(tmp_path):
    """Catches: rows or shades that are mixed up in a file, a kind in the colour of another."""
    x = torch.linspace(-1.2, 1.2, 3 * 32 * 32).view(3, 1, 32, 32)
    shapes.save_grid(tmp_path / "grid.png", x, columns=2)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L")) / 255
    assert pixels.shape == (2 * 130, 2 * 130)
    for picture, (top, left) in zip(x, ((1, 1), (1, 131), (131, 1))):
        want = ((picture[0] + 1) / 2).clamp(0, 1).numpy()
        for part in (pixels[top:, left:], pixels[top + 3 :, left + 3 :]):
            assert np.abs(part[:128:4, :128:4] - want).max() < 0.01
    picture = np.zeros((1, 32, 32))
    picture[0, 4:12, 4:12] = picture[0, 20, 20] = picture[0, 28:, :12] = 1
    (image,) = shapes.coloured(picture)
    assert image[20, 20].tolist() == [1, 0, 0] and not image[picture[0] == 0].any()
    assert np.ptp(image[4:12, 4:12], (0, 1)).max() == np.ptp(image[28:, :12], (0, 1)).max() == 0
    for place, colour in (((5, 5), "deepskyblue"), ((29, 5), "violet")):  # rectangle and line
        assert image[place].tolist() == pytest.approx(to_rgb(colour))


# ==== The score ===================================================================================


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
    assert s["right"] == pytest.approx(0.9) and 0 < s["right shapes"] < 1
    assert s["kinds"].tolist() == [sum(k.count(kind) for k in found) for kind in shapes.KINDS]
    assert s["shapes"].tolist() == [sum(len(k) == n for k in found) for n in (1, 2, 3)]
    assert s["copies"] == pytest.approx(0.4) and s["distinct"] == pytest.approx(0.9)
    one = np.zeros((1, 32, 32))
    one[0, 4:12, 4:12] = one[0, 20, 20] = 1  # a rectangle and a dot
    s = shapes.score(shapes.to_model(one))
    assert s["right"] == 0 and s["right shapes"] == 0.5 and s["kinds"].sum() == 0


def test_bad_input_to_the_score():
    """Catches: a wrong answer in place of an error."""
    good = shapes.to_model(shapes.make_dataset(2, seed=0))
    for bad in (good[:, 0], good[:, :, :31], good[:0]):
        with pytest.raises(ValueError, match="expected"):
            shapes.score(bad)
    for bad in (good[0, 0], np.zeros((31, 32)), np.full((32, 32), np.nan)):
        with pytest.raises(ValueError, match="expected a picture"):
            shapes.explain(bad)


# ==== Schedule and forward process ================================================================


def test_schedule_against_a_plain_loop():
    """Catches: a beta index off by one, alpha for alpha_bar, float32 in the product."""
    product = 1.0
    assert SCHEDULE.alpha_bar[0] == 1 and SCHEDULE.one_minus_alpha_bar[0] == 0
    for t in range(1, T + 1):
        beta = 1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)
        product *= 1 - beta
        assert SCHEDULE.beta[t].item() == pytest.approx(beta, rel=1e-6)
        assert SCHEDULE.alpha[t].item() == pytest.approx(1 - beta, rel=1e-6)
        assert SCHEDULE.alpha_bar[t].item() == pytest.approx(product, rel=1e-6)
        assert SCHEDULE.one_minus_alpha_bar[t].item() == pytest.approx(1 - product, rel=1e-6)
    assert T == 1000 and product < 1e-4
    assert all(getattr(SCHEDULE, name).dtype == torch.float32 for name in vars(SCHEDULE))


def test_one_jump_equals_a_thousand_steps():
    """Catches: a wrong q(x_t | x_0). Eq. 2 is applied step by step, Eq. 4 is not used."""
    mean, variance = 1.0, 0.0  # of x_t for x_0 = 1, by the rules for sums of Gaussians
    x, generator = torch.full((20_000,), 0.7), seeded(0)
    for t, beta in enumerate(BETA[1:], start=1):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(x.shape, generator=generator)
        one, at = torch.ones(1, 1, 1, 1), torch.tensor([t])
        assert ddpm.q_sample(SCHEDULE, one, at, 0 * one).item() == pytest.approx(mean, rel=1e-5)
        std = ddpm.q_sample(SCHEDULE, 0 * one, at, one).item()
        assert std == pytest.approx(math.sqrt(variance), rel=1e-5)
        if t in (1, 10, 300, T):  # and once with real noise
            jump = ddpm.q_sample(SCHEDULE, 0.7 * one, at, noise(20_000, 1, 1, 1, seed=t))
            assert x.mean().item() == pytest.approx(jump.mean().item(), abs=0.03)
            assert x.std().item() == pytest.approx(jump.std().item(), rel=0.03)


def test_x_0_and_eps_give_each_other():
    """Catches: a lost square root, t that is not used per picture."""
    (x_0, eps), t = noise(2, 5, 1, 32, 32), torch.tensor([1, 9, 300, 700, T])
    x_t = ddpm.q_sample(SCHEDULE, x_0, t, eps)
    assert torch.allclose(ddpm.predict_x_0(SCHEDULE, x_t, t, eps), x_0, atol=2e-3)
    each = [ddpm.q_sample(SCHEDULE, x_0[i : i + 1], t[i : i + 1], eps[i : i + 1]) for i in range(5)]
    assert torch.allclose(torch.cat(each), x_t)


# ==== The network =================================================================================


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
    attention = awake(ddpm.Attention(channels, width))
    x, block = noise(2, channels, side, side), max(1, side // 8)
    got = attention(x)
    grid = [(i, j) for i in range(0, side, block) for j in range(0, side, block)]
    means = [x[:, :, i : i + block, j : j + block].mean((2, 3)) for i, j in grid]
    w, b = attention.norm.weight, attention.norm.bias
    means = torch.nn.functional.group_norm(torch.stack(means, 2), channels // 8, w, b).unbind(2)
    w, b = attention.qkv.weight, attention.qkv.bias
    queries, keys, values = (
        [mean @ w[part].T + b[part] for mean in means]
        for part in (slice(0, width), slice(width, 2 * width), slice(2 * width, 3 * width))
    )
    assert attention.heads == max(1, width // 32)
    d = width // attention.heads
    for n, (i, j) in enumerate(grid):
        parts = []
        for h in range(attention.heads):
            s = slice(h * d, (h + 1) * d)
            scores = torch.stack([(queries[n][:, s] * key[:, s]).sum(1) for key in keys], 1)
            weights = (scores / math.sqrt(d)).exp()
            weights = weights / weights.sum(1, keepdim=True)
            parts.append(sum(weights[:, m, None] * value[:, s] for m, value in enumerate(values)))
        change = torch.cat(parts, 1) @ attention.out.weight.T + attention.out.bias
        for di, dj in ((0, 0), (block - 1, block - 1)):
            want = x[:, :, i + di, j + dj] + change
            assert torch.allclose(got[:, :, i + di, j + dj], want, atol=1e-4)


def test_the_network_as_described():
    """Catches: a level without attention, a block without time, a bottleneck that shrank."""
    model, seen = ddpm.UNet(), {"attention": set(), "channels": {}}
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    blocks = [m for m in model.modules() if isinstance(m, ddpm.ResBlock)]
    used = []
    for m in model.modules():
        if isinstance(m, ddpm.Attention):
            m.register_forward_hook(lambda m, i, o: seen["attention"].add(o.shape[-1]))
        if isinstance(m, ddpm.ResBlock):
            m.register_forward_hook(
                lambda m, i, o: seen["channels"].update({o.shape[-1]: o.shape[1]})
            )
            m.time.register_forward_hook(lambda m, i, o: used.append(m))
    out = model(noise(2, 1, 32, 32), torch.tensor([1, T]))
    assert out.shape == (2, 1, 32, 32)
    assert seen["attention"] == {32, 16, 8, 4}
    assert seen["channels"][4] == 512
    assert seen["channels"][32] < seen["channels"][16] < seen["channels"][8] < 512
    assert used == [b.time for b in blocks] and len(blocks) >= 8
    assert not list(model.buffers()), "what is not a weight must not be saved or averaged"


def test_every_block_listens_to_the_time_and_every_norm_and_skip_is_used():
    """Catches: t ignored, in one block or all; a norm built and never applied; a lost skip."""
    model = awake(ddpm.UNet())
    x = noise(2, 1, 32, 32)
    with torch.no_grad():
        a, b = model(x, torch.tensor([10, 10])), model(x, torch.tensor([11, 900]))
        assert (a - b).abs().amax((1, 2, 3)).min() > 1e-3
        for block in (m for m in model.modules() if isinstance(m, ddpm.ResBlock)):
            block.time.weight.add_(1)
            assert not torch.equal(model(x, torch.tensor([10, 10])), a)
            block.time.weight.sub_(1)
    model(x, torch.tensor([3, 700])).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_skips_join_the_level_of_their_own_resolution():
    """Catches: skips in the wrong order, taken after the pooling, or not joined at all."""
    model, down, up = awake(ddpm.UNet()), [], []
    for level in model.down:
        level.register_forward_hook(lambda m, i, o: down.append(o))
    for level in model.up:
        level.register_forward_hook(lambda m, i, o: up.append(i[1]))
    model(noise(1, 1, 32, 32), torch.tensor([5]))
    assert [x.shape[-1] for x in down] == [32, 16, 8]
    assert all(a is b for a, b in zip(up, reversed(down)))
    below, skip = noise(1, 512, 4, 4), noise(1, 128, 8, 8, seed=1)
    a, b = (model.up[0](below, s, noise(1, 128)) for s in (skip, -skip))
    assert (a - b).abs().min() > 0, "what is joined is not the skip"


def test_a_new_network_says_nothing_and_its_blocks_pass_on_their_input():
    """Catches: a last layer that does not start at 0, a residual sum that is missing."""
    assert ddpm.UNet()(noise(2, 1, 32, 32), torch.tensor([1, T])).abs().max() == 0
    time_vector, h = noise(2, 128), noise(2, 32, 8, 8)
    assert torch.equal(ddpm.ResBlock(32, 32, 128)(h, time_vector), h)
    assert torch.equal(ddpm.Attention(32, 32)(h), h)


def test_pictures_of_a_batch_do_not_see_each_other():
    """Catches: BatchNorm, attention across the batch, a view that mixes up axes."""
    model, x, t = awake(ddpm.UNet()), noise(3, 1, 32, 32), torch.tensor([1, 500, T])
    with torch.no_grad():
        together = model(x, t)
        alone = torch.cat([model(x[[i]], t[[i]]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_the_guess_is_the_same_in_bfloat16_but_for_rounding(monkeypatch):
    """Catches: a guess that leaves the network with 8 bits; autocast that is not used."""
    model, x, t = awake(ddpm.UNet()), noise(3, 1, 32, 32), torch.tensor([1, 300, T])
    with torch.no_grad():
        guesses = []
        for fast in (False, True):
            monkeypatch.setattr(ddpm, "fast_bfloat16", lambda device, fast=fast: fast)
            guesses.append(model(x, t))
    assert guesses[0].dtype == guesses[1].dtype == torch.float32
    assert torch.allclose(*guesses, atol=0.1) and not torch.equal(*guesses)


def test_the_compiled_network_computes_the_same():
    """Catches: code that torch.compile cannot follow; this is the path that CUDA takes."""
    if not (shutil.which("cc") and shutil.which("g++")):
        pytest.skip("torch.compile needs a C compiler")
    model, x, t = awake(ddpm.UNet(*SMALL)), noise(2, 1, 32, 32), torch.tensor([5, 900])
    with torch.no_grad():
        want = model(x, t)
        model.compile()
        assert torch.allclose(model(x, t), want, atol=1e-4)


# ==== Reverse process =============================================================================


def any_model(x, t):
    """A network that is quick and not quite right: depends on t, the pixel and a neighbour."""
    return SCHEDULE.signal_and_noise(t)[1] * (0.9 * x + 0.1 * x.roll(1, 3).tanh())


def best_for_a_gaussian(x, t):
    """The best guess of eps if pixels are Gaussian, with mean 0.1 and deviation 0.2."""
    a, n = SCHEDULE.alpha_bar[t[0]], SCHEDULE.one_minus_alpha_bar[t[0]]
    x_0 = 0.1 + a.sqrt() * 0.2**2 / (a * 0.2**2 + n) * (x - a.sqrt() * 0.1)
    return (x - a.sqrt() * x_0) / n.sqrt()


def x_0_of(x_t, t, eps):
    """Eq. 4 solved for x_0, in float64."""
    a = ALPHA_BAR[t]
    return (x_t.double() - math.sqrt(1 - a) * eps.double()) / math.sqrt(a)


def test_eq_11_is_eq_7_with_the_predicted_x_0():
    """Catches: a wrong coefficient in Algorithm 2, alpha for alpha_bar, noise at the end."""
    x_t, eps, z = (noise(1, 1, 4, 4), noise(1, 1, 4, 4, seed=1), noise(1, 1, 4, 4, seed=2))
    for t in range(1, T + 1):
        beta, now, before = BETA[t], ALPHA_BAR[t], ALPHA_BAR[t - 1]
        mean = math.sqrt(before) * beta / (1 - now) * x_0_of(x_t, t, eps)
        mean += math.sqrt(1 - beta) * (1 - before) / (1 - now) * x_t.double()
        std = math.sqrt((1 - before) / (1 - now) * beta)
        got = ddpm.ddpm_step(SCHEDULE, x_t, t, eps, 0 * z)
        assert torch.allclose(got.double(), mean, atol=1e-4), t
        got = ddpm.ddpm_step(SCHEDULE, x_t, t, eps, z)
        assert torch.allclose(got.double(), mean + std * z.double(), atol=1e-4), t
        if t == 1:
            assert std == 0 and torch.equal(got, ddpm.ddpm_step(SCHEDULE, x_t, 1, eps, 100 * z))


def test_ddim_at_eta_1_is_algorithm_2():
    """Catches: a wrong sigma, a missing square root, the wrong alpha_bar in DDIM."""
    x_t, eps, z = (noise(2, 1, 8, 8), noise(2, 1, 8, 8, seed=1), noise(2, 1, 8, 8, seed=2))
    for t in range(1, T + 1):
        one = ddpm.ddpm_step(SCHEDULE, x_t, t, eps, z)
        two = ddpm.ddim_step(SCHEDULE, x_t, t, t - 1, x_0_of(x_t, t, eps).float(), z, eta=1)
        assert torch.allclose(one, two, atol=2e-4), t


def test_a_thousand_steps_at_eta_1_are_algorithm_2():
    """Catches: DDIM in its place; x_T that comes again as the first z; noise of another seed."""
    generator = seeded(3)
    x = torch.randn(2, 1, 32, 32, generator=generator)
    got, other = (ddpm.sample(any_model, SCHEDULE, 2, T, eta, seed=3) for eta in (1, 0.5))
    start = x
    for t in range(T, 0, -1):
        z = torch.randn(x.shape, generator=generator)
        x = ddpm.ddpm_step(SCHEDULE, x, t, any_model(x, torch.tensor([t])), z)
    assert torch.equal(got, x) and not torch.allclose(got, other, atol=1e-2)
    assert torch.equal(ddpm.sample(any_model, SCHEDULE, 2, seed=3), x)
    *_, (_, x, _) = ddpm.algorithm_2(any_model, SCHEDULE, start, seeded(4))
    assert not torch.allclose(got, x, atol=1e-2)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_variance_that_eq_4_wants(eta):
    """Catches: eta for eta squared, sigma that is added but not taken from the rest."""
    a = ALPHA_BAR
    x_0, eps = noise(1, 1, 8, 8), noise(1, 1, 8, 8, seed=1)
    for t, s in [(T, 500), (500, 499), (300, 20), (20, 1), (T, 0)]:
        # With z = 1 less z = 0 only sigma is left: DDIM, Eq. 16.
        x_t = math.sqrt(a[t]) * x_0 + math.sqrt(1 - a[t]) * eps
        plain, noisy = (ddpm.ddim_step(SCHEDULE, x_t, t, s, x_0, z, eta) for z in (0, 1))
        sigma = eta * math.sqrt((1 - a[s]) / (1 - a[t])) * math.sqrt(1 - a[t] / a[s])
        assert torch.allclose(noisy - plain, torch.tensor(sigma).float(), atol=1e-4)
        rest = math.sqrt(1 - a[s] - sigma**2)
        assert torch.allclose(plain, math.sqrt(a[s]) * x_0 + rest * eps, atol=1e-4), (t, s)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_by_step(eta):
    """Catches: a guess that is not clipped, or not the one in use; steps or noise mixed up."""
    generator = seeded(4)
    x_T = torch.randn(2, 1, 32, 32, generator=generator)
    stops = list(ddpm.walk(any_model, SCHEDULE, 2, 7, eta, seed=4))
    assert [t for t, _, _ in stops] == ddpm.timesteps(7) and torch.equal(stops[0][1], x_T)
    for (t, x_t, x_0), (s, x_s, _) in itertools.pairwise(stops):
        guess = x_0_of(x_t, t, any_model(x_t, torch.tensor([t])))
        assert torch.allclose(x_0.double(), guess.clamp(-1, 1), atol=1e-3)
        assert t < T or guess.abs().max() > 1, "nothing to clip"
        z = torch.randn(x_t.shape, generator=generator)
        assert torch.equal(x_s, ddpm.ddim_step(SCHEDULE, x_t, t, s, x_0, z, eta))
    assert torch.equal(stops[-1][1], stops[-1][2])


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50, 999, 1000])
def test_both_ends_of_the_schedule_are_visited(steps):
    """Catches: sampling that starts below T or never reaches t = 1, repeated steps."""
    times = ddpm.timesteps(steps)
    assert times[0] == T and times[-1] == 0 and len(times) == steps + 1
    assert all(a > b for a, b in itertools.pairwise(times))
    assert steps == 1 or times[-2] == 1
    assert steps < T or times == list(range(T, -1, -1))


def test_steps_out_of_range():
    """Catches: a walk that never ends or visits t = 0 twice."""
    for steps in (0, -1, T + 1):
        with pytest.raises(ValueError, match="steps must be between 1 and 1000"):
            ddpm.timesteps(steps)


def end(stops):
    """The picture at the end of a walk."""
    *_, (_, x, _) = stops
    return x


@pytest.mark.parametrize("steps", [T, 100])
def test_the_perfect_network_gives_the_distribution_back(steps):
    """Catches: nearly any mistake in the reverse process.

    Every pixel is +1 with probability 0.3 and else -1, and knows nothing of the others. Bayes'
    rule on Eq. 4 gives its mean, and so the best guess of eps. The sampler must find 30 % again,
    with values of +-1.
    """

    def best(x, t):
        a, n = SCHEDULE.alpha_bar[t[0]], SCHEDULE.one_minus_alpha_bar[t[0]]
        log_odds = math.log(0.3 / 0.7) + 2 * a.sqrt() * x / n
        return (x - a.sqrt() * (2 * log_odds.sigmoid() - 1)) / n.sqrt()

    x = ddpm.sample(best, SCHEDULE, 10, steps)
    assert (x > 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (x.abs() - 1).abs().max() < 0.05


def test_the_perfect_network_for_one_pixel_is_bayes_rule():
    """Catches: a wrong tanh. The two Gaussian densities of x_t are compared, in float64."""
    x = np.linspace(-3, 3, 61)
    for t in (1, 10, 100, 300, 500, 700, T):
        signal, noise_variance = math.sqrt(ALPHA_BAR[t]), 1 - ALPHA_BAR[t]
        exponents = np.stack([-((x - s * signal) ** 2) / (2 * noise_variance) for s in (1, -1)])
        densities = np.exp(exponents - exponents.max(0))
        plus, minus = densities / densities.sum(0)
        want = (x - signal * (plus - minus)) / math.sqrt(noise_variance)
        x_t = torch.from_numpy(x).float().view(-1, 1, 1, 1)
        got = ddpm.one_pixel(SCHEDULE)(x_t, torch.full((61,), t))
        assert np.allclose(got.flatten().numpy(), want, rtol=1e-4, atol=1e-4), t


def test_pixels_split_in_two_and_only_ddim_remembers_the_start():
    """Catches: a walk that does not end at -1 or +1, fresh noise that is missing or too much."""
    model, x_T = ddpm.one_pixel(SCHEDULE), noise(4, 1, 32, 32)
    for stops, same_side in (
        (ddpm.algorithm_2(model, SCHEDULE, x_T, seeded(1)), 0.5),
        (ddpm.ddim(model, SCHEDULE, x_T, T, 1.0, seeded(1)), 0.5),
        (ddpm.ddim(model, SCHEDULE, x_T, T, 0.0), 1),
    ):
        x = end(stops)
        assert (x.abs() - 1).abs().max() < 1e-2
        assert (x > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
        agree = ((x > 0) == (x_T > 0)).float().mean().item()
        assert agree == pytest.approx(same_side, abs=0.03 if same_side < 1 else 0)


def test_the_perfect_network_gives_a_spread_back():
    """Catches: a wrong sigma."""
    x = ddpm.sample(best_for_a_gaussian, SCHEDULE, 10, seed=1)
    assert x.mean().item() == pytest.approx(0.1, abs=0.005)
    assert x.std().item() == pytest.approx(0.2, rel=0.03)


def test_a_seed_means_the_same_picture():
    """Catches: noise that the seed does not control, a guess that does not fit x_t."""
    for steps, eta in [(T, 1), (5, 0), (5, 1)]:
        a, b, c = (ddpm.sample(any_model, SCHEDULE, 1, steps, eta, seed) for seed in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
        x_T = noise(1, 1, 32, 32)
        walks = [ddpm.ddim(any_model, SCHEDULE, x_T, 5, eta, seeded(seed)) for seed in (1, 1, 2)]
        a, b, c = map(end, walks)
        assert torch.equal(a, b) and torch.equal(a, c) == (eta == 0)
    walk = list(ddpm.algorithm_2(any_model, SCHEDULE, noise(1, 1, 32, 32)))
    assert [t for t, _, _ in walk] == list(range(T, -1, -1))
    for t, x, x_0 in walk[:-1]:
        now = torch.tensor([t])
        assert torch.equal(ddpm.predict_x_0(SCHEDULE, x, now, any_model(x, now)), x_0)
    assert torch.equal(walk[-1][1], walk[-1][2])


def test_the_loss_by_hand():
    """Catches: x_t for another t, a loss that is not Eq. 14."""
    x_0, eps = noise(4, 1, 32, 32).sign(), noise(4, 1, 32, 32, seed=1)
    t, seen = torch.tensor([1, 20, 500, T]), []
    a = torch.from_numpy(ALPHA_BAR)[t].view(-1, 1, 1, 1)

    def network(x_t, times):
        seen.append((x_t, times))
        return any_model(x_t, times)

    loss = ddpm.loss_fn(network, SCHEDULE, x_0, t, eps).item()
    ((x_t, times),) = seen
    assert torch.allclose(x_t.double(), a.sqrt() * x_0 + (1 - a).sqrt() * eps, atol=1e-5)
    assert torch.equal(times, t)
    want = (any_model(x_t, t) - eps).square().sum().item() / (4 * 32 * 32)
    assert loss == pytest.approx(want, rel=1e-5)


# ==== Training ====================================================================================


def test_a_small_network_learns_a_few_pictures_by_heart():
    """Catches: a loss without a minimum at the noise, gradients that do not arrive."""
    torch.manual_seed(0)
    model = ddpm.UNet((8, 16, 16), 32, 16, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    x_0 = shapes.to_model(shapes.make_dataset(4, seed=0))
    t, eps = torch.tensor([50, 200, 400, 700]), noise(4, 1, 32, 32)
    first = ddpm.loss_fn(model, SCHEDULE, x_0, t, eps).item()
    for _ in range(150):
        loss = ddpm.loss_fn(model, SCHEDULE, x_0, t, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first


def test_times_are_the_mean_of_two_uniform_draws():
    """Catches: t drawn from 0..T-1 or 1..T-1: sampling would start where nobody trained."""
    one = np.arange(1, T + 1)
    pairs = np.bincount((one[:, None] + one).ravel() // 2, minlength=T + 1)  # of T^2
    want = 4_000_000 * pairs / T**2
    t = ddpm.draw_t(4_000_000, seeded(0))
    count = np.bincount(t.numpy(), minlength=T + 1)
    assert t.shape == (4_000_000,) and t.dtype == torch.int64
    assert len(count) == T + 1 and count[0] == 0 and count[T] > 0
    chi_square = ((count - want)[1:] ** 2 / want[1:]).sum()
    assert abs(chi_square - (T - 1)) < 4 * math.sqrt(2 * (T - 1))


def stretched(x):
    """What Muon makes of a matrix, by its singular values: float64 in, float64 out."""
    u, lengths, v = torch.linalg.svd(x, full_matrices=False)
    lengths = lengths / lengths.norm()
    for _ in range(3):
        lengths = 3.4445 * lengths - 4.775 * lengths**3 + 2.0315 * lengths**5
    return u * lengths @ v


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (40, 4, 3, 3), (9, 5), (5, 9)])
def test_the_optimizers_are_muon_and_adam_by_hand(shape, monkeypatch):
    """Catches: a tall matrix taken for a wide one, a lost momentum, a rate of the wrong kind."""
    monkeypatch.setattr(ddpm, "fast_bfloat16", lambda device: False)
    model = torch.nn.Module()
    model.matrix = torch.nn.Parameter(2 * noise(*shape, seed=2))
    model.vector = torch.nn.Parameter(2 * noise(8, seed=3))
    model.stem, model.out = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(3, 2, bias=False)
    matrix, *others = [p.detach().double().clone() for p in model.parameters()]
    slopes = [noise(*p.shape, seed=i).double() for i, p in enumerate(model.parameters())]
    optimizers = train.optimizers_for(model, 1e-3)
    average = 0 * matrix
    firsts, seconds = [0 * p for p in others], [0 * p for p in others]
    for step in range(1, 8):
        # The loss is 0.5 sum slope w^2, so that its gradient changes from step to step.
        for p, slope in zip(model.parameters(), slopes):
            p.grad = slope.float() * p.detach()
        for optimizer in optimizers:
            optimizer.step()
        gradient = slopes[0] * matrix
        average = 0.95 * average + 0.05 * gradient
        x = (0.95 * average + 0.05 * gradient).flatten(1)
        change = stretched(x) * math.sqrt(max(x.shape))
        matrix = matrix - 1e-3 * change.view(shape)
        for i, slope in enumerate(slopes[1:]):  # Adam (Kingma & Ba 2015, Algorithm 1)
            gradient = slope * others[i]
            firsts[i] = 0.9 * firsts[i] + 0.1 * gradient
            seconds[i] = 0.99 * seconds[i] + 0.01 * gradient**2
            mean, spread = firsts[i] / (1 - 0.9**step), (seconds[i] / (1 - 0.99**step)).sqrt()
            others[i] = others[i] - train.ADAM_RATE * mean / (spread + 1e-8)
        for p, want in zip(model.parameters(), (matrix, *others)):
            assert torch.allclose(p.double(), want, rtol=0, atol=3e-5), step


def test_muon_gets_the_matrices_and_adam_the_rest():
    """Catches: a weight in no group or in two; the first or last layer taken for a matrix."""
    model = ddpm.UNet()
    muon, adam = train.optimizers_for(model, 2e-4)
    groups = [{*o.param_groups[0]["params"]} for o in (muon, adam)]
    assert isinstance(muon, train.Muon) and isinstance(adam, torch.optim.Adam)
    assert groups[0].isdisjoint(groups[1]) and groups[0] | groups[1] == {*model.parameters()}
    weights = {p for p in model.parameters() if p.ndim > 1}
    assert groups[0] == weights - {model.stem.weight, model.out.weight}


@pytest.mark.parametrize("fast", [False, True])
def test_orthogonal_makes_all_lengths_about_one(fast, monkeypatch):
    """Catches: a wrong coefficient, too few rounds, a precision that is not enough."""
    monkeypatch.setattr(ddpm, "fast_bfloat16", lambda device: fast)
    u, _, v = torch.linalg.svd(noise(8, 30), full_matrices=False)
    matrix = u * torch.linspace(0.1, 2, 8) @ v
    x = train.orthogonal(1000 * matrix)
    assert x.dtype == torch.float32
    assert torch.allclose(x, train.orthogonal(matrix), atol=0.02)
    lengths = torch.linalg.svdvals(x)
    assert lengths.min() > 0.6 and lengths.max() < 1.3
    assert (u.T @ x @ v.T).diagonal().min() > 0.6
    assert torch.equal(train.orthogonal(0 * matrix), 0 * matrix)


def test_mirror_gives_all_eight_mirror_images_alike():
    """Catches: pictures that are mixed up or lost, the same coin for a whole batch."""
    picture = noise(1, 1, 32, 32)
    eight = {}
    for k in range(4):
        for turned in (picture.rot90(k, (2, 3)), picture.flip(3).rot90(k, (2, 3))):
            eight[turned.contiguous().numpy().tobytes()] = 0
    x = shapes.mirror(picture.expand(4000, -1, -1, -1), seeded(0))
    assert x.shape == (4000, 1, 32, 32)
    for y in x:
        eight[y.contiguous().numpy().tobytes()] += 1
    assert len(eight) == 8 and all(400 < n < 600 for n in eight.values())


def test_ema_by_hand(monkeypatch):
    """Catches: an average without warm-up, or one that never moves."""
    monkeypatch.setattr(train, "EMA_DECAY", 0.9)
    model, average = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    average.weight.data.fill_(1.0)
    want = 1.0
    for step in range(1, 200):
        model.weight.data.fill_(float(step))
        train.update_average(average, model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * step
        assert average.weight.item() == pytest.approx(want, rel=1e-4)
        assert model.weight.item() == step


def run_train(folder, *flags, name="a_run", after_epoch=lambda: None):
    """train.py in this process; returns what it left behind."""
    new = [] if "--resume" in flags else ["--samples=64", "--batch-size=16", "--lr=1e-3"]
    places = ["--device=cpu", f"--checkpoints={folder}", f"--logs={folder}/logs"]
    args, saved = train.parse([*new, *flags, *places])
    train.train(args, saved, saved["name"] if saved else name, after_epoch)
    return read(folder / "latest.pt")


def read(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


LEARNED = ("config", "flags", "model", "ema", "optimizers", "epoch")


def test_two_epochs_and_two_more_are_four(tiny, tmp_path):
    """Catches: noise that repeats or differs, optimizer or EMA not restored, data replayed, a skipped epoch."""
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
    """Catches: data not reshuffled or used twice in an epoch; t or noise that comes again, in
    the next step, epoch or seed; noise that is not standard normal; pictures not mirrored."""
    pictures, times, noises, steps, mirrored = [], [], [], [], []
    loss_fn, update_average = ddpm.loss_fn, train.update_average

    def spy_on_loss(model, schedule, x_0, t, eps):
        if torch.is_grad_enabled():  # not in validation
            pictures.append(x_0.clone())
            times.append(t)
            noises.append(eps)
        return loss_fn(model, schedule, x_0, t, eps)

    def spy_on_average(average, model, step):
        steps.append(step)
        assert not any(p.requires_grad for p in average.parameters())
        update_average(average, model, step)

    def spy_on_mirror(x_0, generator):
        mirrored.append(x_0)
        return x_0

    monkeypatch.setattr(shapes, "mirror", spy_on_mirror)
    monkeypatch.setattr(ddpm, "loss_fn", spy_on_loss)
    monkeypatch.setattr(train, "update_average", spy_on_average)
    monkeypatch.setattr(train, "DECAY_FROM", 2)
    monkeypatch.setattr(train, "WARMUP", 1)
    state = run_train(tmp_path / "a", "--epochs=2")
    assert steps == list(range(1, 9)) and len(mirrored) == 8
    rates = [optimizer["param_groups"][0]["lr"] for optimizer in state["optimizers"]]
    assert rates == pytest.approx([0.5 * 1e-3, 0.5 * train.ADAM_RATE])  # sqrt(2 / 8) of the peak
    first, second = torch.cat(pictures[:4]), torch.cat(pictures[4:])
    data = shapes.to_model(shapes.make_dataset(64, seed=0))
    assert not torch.equal(first, second) and not torch.equal(first, data)
    keys = [sorted(p.numpy().tobytes() for p in x) for x in (first, second, data)]
    assert keys[0] == keys[1] == keys[2]
    run_train(tmp_path / "b", "--epochs=2", "--seed=1")
    assert len({tuple(t.tolist()) for t in times}) == len(times) == 16
    assert len({tuple(eps.flatten().tolist()) for eps in noises}) == 16
    eps = torch.cat(noises)
    assert eps.shape == (256, 1, 32, 32)
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01


def test_a_large_gradient_is_clipped(tiny, monkeypatch, tmp_path):
    """Catches: gradients that are not clipped, not set back, or come from another loss."""
    sizes, step, loss_fn = [], torch.optim.Adam.step, ddpm.loss_fn

    def spy(optimizer, *args):
        groups = [o.param_groups[0]["params"] for o in (optimizer, others[0])]
        squares = [p.grad.square().sum() for group in groups for p in group]
        sizes.append(sum(squares).sqrt().item())
        return step(optimizer, *args)

    others, muon = [], train.Muon.step

    def spy_on_muon(optimizer):
        others[:] = [optimizer]
        muon(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    monkeypatch.setattr(train.Muon, "step", spy_on_muon)
    monkeypatch.setattr(ddpm, "loss_fn", lambda *args: 1000 * loss_fn(*args))
    run_train(tmp_path, "--epochs=1")
    assert sizes == pytest.approx([train.CLIP] * 4, rel=1e-3)


def test_best_is_the_epoch_with_the_lowest_validation_loss(tiny, monkeypatch, tmp_path):
    """Catches: best saved as latest, raw weights in place of the average, half files left."""
    losses = iter([0.5, 0.2, 0.9, 0.3])
    averages, save = {}, ddpm.save

    def spy(path, state):
        averages.setdefault(state["epoch"], state["ema"])  # of an epoch, the first is best.pt
        save(path, state)

    monkeypatch.setattr(train, "validation_loss", lambda *a: next(losses))
    monkeypatch.setattr(ddpm, "save", spy)
    latest = run_train(tmp_path, "--epochs=4")
    best, model = ddpm.load(tmp_path / "best.pt")
    assert best["epoch"] == 2 and latest["epoch"] == 4 and not list(tmp_path.glob("*.tmp"))
    for name, weight in model.named_parameters():
        assert torch.allclose(weight, averages[2][name].float(), rtol=1e-3, atol=1e-6)


def test_the_samples_are_of_the_average_and_their_noise_is_the_same(tiny, monkeypatch, tmp_path):
    """Catches: a grid of raw weights; a grid of other noise at each epoch."""
    seen, averages, sample_, save = [], [], ddpm.sample, ddpm.save

    def spy(model, schedule, *arguments, **options):
        seen.append((arguments, options))
        averages.append({name: p.clone() for name, p in model.named_parameters()})
        return sample_(model, schedule, *arguments, **options)

    def spy_on_save(path, state):
        assert same(state["model"] if "x" in state else averages[-1], averages[-1])
        if path.name == "latest.pt":
            assert same(dict(state["ema"]), averages[-1])
        save(path, state)

    monkeypatch.setattr(train, "SAMPLE_EVERY", 1)
    monkeypatch.setattr(ddpm, "sample", spy)
    monkeypatch.setattr(ddpm, "save", spy_on_save)
    run_train(tmp_path, "--epochs=2")
    assert seen == [((train.PICTURES, train.STEPS), {})] * 2


def test_validation_is_of_the_average_and_repeatable(tiny, tmp_path):
    """Catches: fresh noise in every validation, validation pictures that were trained on."""
    state = run_train(tmp_path, "--epochs=1")
    model = ddpm.UNet(**state["config"])
    model.load_state_dict(state["ema"])
    others = shapes.to_model(shapes.make_dataset(train.VALIDATION, [0, 1]))
    losses = {train.validation_loss(model, SCHEDULE, others) for _ in range(2)}
    assert losses == {state["history"][0]["validation"]}


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
    old = run_train(tmp_path, "--epochs=1", name="old")
    # While the next run is in its second epoch, another one begins in the same folder.
    validation_loss, others = train.validation_loss, []

    def and_meanwhile(*args):
        held = (tmp_path / "before_first").exists()
        if held and not others:
            others.append(None)
            others.append(run_train(tmp_path, "--epochs=3", second, name="other"))
        return validation_loss(*args)

    monkeypatch.setattr(train, "validation_loss", and_meanwhile)
    with pytest.raises(SystemExit, match="another training"):
        run_train(tmp_path, "--epochs=3", "--seed=1", name="first")
    assert same(others[1], read(tmp_path / "latest.pt")) and others[1]["epoch"] == 3
    assert same(old, read(tmp_path / "before_first/latest.pt"))
    aside = {path.name for path in (tmp_path / "before_first").iterdir()}
    assert aside == {"latest.pt", "best.pt", "loss.png", "samples_0001.png"}
    if second == "--seed=2":
        first = read(tmp_path / "before_other/latest.pt")
        assert (first["name"], first["epoch"], first["flags"]["seed"]) == ("first", 1, 1)


def test_a_checkpoint_that_is_touched_is_still_our_own(tiny, tmp_path):
    """Catches: another run that is recognised by the time of a file, as a backup changes it."""
    latest = tmp_path / "latest.pt"
    touch = lambda: os.utime(latest, (time.time() + 99, time.time() + 99))
    assert run_train(tmp_path, "--epochs=3", after_epoch=touch)["epoch"] == 3


# ==== The scripts, as a user runs them ============================================================


def test_training_leaves_what_it_promises(tiny, tmp_path, capsys):
    """Catches: a missing file, number or line of text; random state that another device lacks."""
    state = run_train(tmp_path, "--epochs=1")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"latest.pt", "best.pt", "loss.png", "samples_0001.png", "logs"}
    for_sampling = {"config", "flags", "name", "epoch", "history", "ema"}
    assert {*state} == for_sampling | {"optimizers", "model"}
    best = read(tmp_path / "best.pt")
    assert {*best} == for_sampling and {p.dtype for p in best["ema"].values()} == {torch.float16}
    assert {*state["flags"]} == {*train.SAVED} and state["name"] == "a_run"
    (row,) = state["history"]
    assert {*row} == {"epoch", "loss", "validation", "right"} and row["epoch"] == state[
        "epoch"
    ] == 1
    out = capsys.readouterr().out
    assert "cpu, bfloat16" in out and f"validation {round(row['validation'], 4)}" in out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    for key, value in row.items():
        (event,) = events.Scalars(key)
        assert event.step == 1 and event.value == pytest.approx(value)


def test_sampling_from_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    """Catches: a seed that is not used, a file that is missing, a picture that cannot be drawn."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device=cpu", *flags])
        sample.main()
        return capsys.readouterr().out

    run_train(tmp_path / "checkpoints", "--epochs=1")
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--n=3", "--steps=3", f"--seed={seed}", f"--output={name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    out = run("--score", "--n=8", "--steps=2")
    assert f"{Path('checkpoints/best.pt')}, epoch 1, " in out and "these samples" in out
    assert re.search(r"other real pictures +100.0% +100.0%", out)
    for flag, name in (
        ("explain", "explained"),
        ("show-process", "process"),
        ("process", "process"),
    ):
        run(f"--{flag}", "--steps=5")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "process.gif").read_bytes()[:4] == b"GIF8"
    run("--n=3", "--steps=3", "--seed=1", "--eta=0.5", "--output=d.png")
    assert (tmp_path / "d.png").read_bytes() != a


def test_the_table_of_losses(capsys):
    """Catches: a loss at the wrong t, an error in x_0 that does not belong to the loss."""
    sample.print_loss_by_t(ddpm.one_pixel(SCHEDULE), SCHEDULE, {"seed": 0})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [int(t) for t, _, _ in rows] == list(sample.LOSS_AT)
    table = {int(t): (float(loss), float(error)) for t, loss, error in rows}
    x_0 = shapes.to_model(shapes.make_dataset(256, [0, 2])).double().numpy()
    eps = noise(256, 1, 32, 32, seed=5).double().numpy()
    for t in (100, 300, 500):  # tanh(...) is the mean of x_0, by Bayes' rule
        signal, deviation = math.sqrt(ALPHA_BAR[t]), math.sqrt(1 - ALPHA_BAR[t])
        guess = np.tanh(signal * (signal * x_0 + deviation * eps) / deviation**2)
        error = ((guess - x_0) ** 2).mean()
        assert table[t][1] == pytest.approx(error, rel=0.02)
        assert table[t][0] == pytest.approx(error * (signal / deviation) ** 2, rel=0.02)


def test_defaults_that_depend_on_other_flags():
    """Catches: a score of 16 pictures, or one that takes 1000 steps; a file of the wrong name."""
    for flags, n, steps, output in (
        ([], 16, T, "samples.png"),
        (["--process"], 4, T, "process.png"),
        (["--explain"], 16, T, "explained.png"),
        (["--score"], 500, 50, "samples.png"),
        (["--score", "--n=7", "--steps=9"], 7, 9, "samples.png"),
    ):
        args = sample.parse(flags)
        assert (args.n, args.steps, args.output) == (n, steps, Path(output))
        assert args.eta == 1 and args.seed == 0


def test_the_other_scripts_run(tmp_path, monkeypatch, capsys):
    """Catches: a picture that is not saved, a table that does not add up."""
    monkeypatch.chdir(tmp_path)
    for name in ("ddpm.py", "shapes.py"):
        runpy.run_path(str(HERE / name), run_name="__main__")
    out = capsys.readouterr().out
    *parts, whole = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters", out)]
    assert sum(parts) == whole == sum(p.numel() for p in ddpm.UNet().parameters())
    assert "46 shapes" in out
    names = {"forward.png", "pixel.png", "shapes.png", "catalogue.png"}
    assert {p.name for p in tmp_path.iterdir()} == names


@pytest.mark.parametrize("name", ["ddpm", "shapes", "train", "sample"])
def test_a_notebook_may_have_set_how_matplotlib_draws(name, tmp_path):
    """Catches: an end at once where MPLBACKEND names a module that is not installed here."""
    code = f"import {name}, matplotlib.figure"
    inline = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", code], cwd=HERE, env=inline, check=True, timeout=120)


# Starts train.py in a process of its own, with a small network.
TINY = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import ddpm, train
ddpm.UNet.__init__.__defaults__ = {SMALL}
train.VALIDATION, train.PICTURES, train.STEPS = 32, 2, 2
train.main()
"""
HAS_SIGNALS = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


@HAS_SIGNALS
def test_ctrl_c_in_the_first_epoch_and_later(tiny, tmp_path):
    """Catches: a traceback; a progress bar in a file, or lines that come late; an older run that
    is moved before the new one has saved anything; a stopped run that cannot go on."""
    log, folder = tmp_path / "log", tmp_path / "checkpoints"

    def stop_when(enough, *flags):
        with log.open("w") as file:
            words = [sys.executable, "-c", TINY, "--device=cpu", *flags]
            process = subprocess.Popen(
                words, cwd=tmp_path, stdout=file, stderr=subprocess.PIPE, text=True
            )
            deadline = time.time() + 120
            while not enough(log.read_text()) and time.time() < deadline:
                time.sleep(0.01)
            assert process.poll() is None, "it has ended by itself"
            process.send_signal(signal.SIGINT)
            err = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and "Traceback" not in err and "it/s" not in err
        return log.read_text()

    flags = ["--samples=64", "--batch-size=16", "--epochs=9999"]
    out = stop_when(lambda text: text.count("validation") >= 3, *flags)
    lines = re.findall(r"^epoch (\d+), loss .*, validation .*$", out, re.MULTILINE)
    done = ddpm.load(folder / "latest.pt")[0]["epoch"]
    assert lines == [str(i + 1) for i in range(len(lines))] and done - len(lines) in (0, 1)
    assert "--resume" in out
    before = {path: path.read_bytes() for path in folder.iterdir()}
    out = stop_when(lambda text: "bfloat16" in text, "--samples=20000", "--batch-size=1")
    assert "epoch 1" not in out
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert run_train(folder, "--resume", f"--epochs={done + 1}")["epoch"] == done + 1


@HAS_SIGNALS
def test_stopped_at_any_moment_the_last_epoch_is_kept(tmp_path):
    """Catches: a traceback on Ctrl-C, a checkpoint written in place, a run that cannot go on."""
    latest, flags = tmp_path / "checkpoints/latest.pt", ["--samples=64", "--epochs=999"]
    epochs = [0]
    for how in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, HERE / "train.py", "--device=cpu", *flags],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # When an epoch has been saved, in the middle of the next save.
        before = latest.stat().st_mtime_ns if latest.exists() else 0
        deadline = time.time() + 120
        while time.time() < deadline:
            saved = latest.exists() and latest.stat().st_mtime_ns > before
            if saved and [*latest.parent.glob("*.tmp")]:
                break
            time.sleep(0.0005)
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
        epochs.append(ddpm.load(latest)[0]["epoch"])
        assert epochs[-1] > epochs[-2]
        ddpm.load(latest.with_name("best.pt"))
        flags = ["--resume"]
        for half in latest.parent.glob("*.tmp"):  # a killed program may leave one
            half.unlink()
    assert process.returncode == 130 and "Traceback" not in err and "--resume" in out


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    """Catches: writing in place."""
    resource = pytest.importorskip("resource")  # not on Windows
    ddpm.save(tmp_path / "a.pt", {"epoch": 1})
    before, limits = (tmp_path / "a.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):  # in place of "no space left"
            ddpm.save(tmp_path / "a.pt", {"x": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.pt").read_bytes() == before


# ==== Broken files and wrong flags ================================================================


class Evil:
    """Unpickling it makes a folder where the program runs."""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


def rotten(path, state):
    """Writes a checkpoint with one wrong byte in its largest weight."""
    torch.save(state, path)
    bytes_ = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as parts:
        weights = [part for part in parts.infolist() if "/data/" in part.filename]
        part = max(weights, key=lambda part: part.file_size)
    bytes_[part.header_offset + 200] ^= 1
    path.write_bytes(bytes_)


def truncated(path, state):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def hollow(path, state):
    """Writes what torch.save does, but with nothing in it."""
    with zipfile.ZipFile(path, "w") as parts:
        parts.writestr("archive/data.pkl", b"")
        parts.writestr("archive/version", b"3\n")


BROKEN = {
    "absent": lambda path, state: None,
    "text": lambda path, state: path.write_text("not a checkpoint"),
    "folder": lambda path, state: path.mkdir(),
    "truncated": truncated,
    "bit rot": rotten,
    "empty inside": hollow,
    "code": lambda path, state: torch.save({**state, "flags": Evil()}, path),
    "other network": lambda path, state: torch.save({**state, "config": {"narrow": 16}}, path),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_gets_one_line(kind, tmp_path, monkeypatch):
    """Catches: a traceback, code run from a file, weights loaded into the wrong network."""
    path, model = tmp_path / "broken.pt", ddpm.UNet(*SMALL)
    state = {"config": model.config, "flags": {"samples": 64, "seed": 0}, "epoch": 1}
    state["ema"] = model.state_dict()
    torch.save(state, tmp_path / "whole.pt")
    assert ddpm.load(tmp_path / "whole.pt")[0]["epoch"] == 1
    BROKEN[kind](path, state)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ddpm.load(path)
    message = str(stop.value.code)
    assert message.startswith(f"error: cannot load {path}: ") and "\n" not in message
    assert not (tmp_path / "it ran").exists()


BAD = [
    "train.py --epochs 0",
    "train.py --lr nan",
    "train.py --seed -1",
    "train.py --samples 10",
    "train.py --device tpu",
    "train.py --resume",
    "train.py --resume --checkpoints a_file",
    "train.py --samples 64 --checkpoints a_file",
    "train.py --samples 64 --logs a_file/logs",
    "sample.py --steps 1001",
    "sample.py --steps 0",
    "sample.py --n 0",
    "sample.py --eta 1.5",
    "sample.py --explain --score",
    "sample.py --process --n 17",
    "sample.py --checkpoint nothing.pt",
    "sample.py --checkpoint a_file",
    "sample.py --output picture.docx",
    "sample.py --steps 1 --output nowhere/x.png",
]


@pytest.mark.parametrize("command", BAD)
def test_bad_input_gets_one_line_and_no_traceback(command, tmp_path, monkeypatch, capsys):
    """Catches: a traceback for the user, exit code 0 after an error, files lost or made."""
    (tmp_path / "a_file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    name, *flags = command.split()
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HERE / name), run_name="__main__")
    assert stop.value.code not in (0, None)
    message = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert "error: " in message.strip().splitlines()[-1]
    assert (tmp_path / "a_file").read_text() == "mine" and not list(tmp_path.glob("checkpoints/*"))


def test_an_error_leaves_the_process_with_one_line(tmp_path):
    """Catches: what the tests above cannot see, the process itself."""
    words = [sys.executable, HERE / "sample.py", "--checkpoint", "nothing.pt"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode not in (0, 130) and "Traceback" not in done.stderr
    assert "error: cannot load nothing.pt: " in done.stderr.strip().splitlines()[-1]


def test_the_weights_that_come_along():
    """Catches: a missing or outgrown assets/pretrained.pt, or one trained with other flags."""
    assert sample.PRETRAINED.stat().st_size <= 6e6
    state, model = ddpm.load(sample.PRETRAINED)
    assert state["flags"] == {f: train.parser().get_default(f) for f in train.SAVED}
    assert model.config == ddpm.UNet().config and state["epoch"] > 50
    # Started from pictures noised to t = 200, nearly all come back right.
    x_0 = shapes.to_model(shapes.make_dataset(16, [0, 3]))
    t = torch.full((16,), 200)
    x_t = ddpm.q_sample(SCHEDULE, x_0, t, noise(16, 1, 32, 32))
    with torch.no_grad():
        guess = ddpm.predict_x_0(SCHEDULE, x_t, t, model(x_t, t))
    assert (guess.sign() != x_0).float().sum((1, 2, 3)).mean() < 2


# ==== The cloud ===================================================================================


def test_modal_asks_for_an_a100_and_mounts_the_volume():
    """Catches: the wrong GPU, a volume of another name, a place that train.py does not use."""
    import modal_train

    spec = modal_train.train_in_cloud._spec_  # Modal has no public way to look at it
    assert spec.gpus == "A100" and list(spec.volumes) == [modal_train.FOLDER]
    assert "diffusion-checkpoints" in repr(spec.volumes[modal_train.FOLDER])


def test_modal_passes_all_flags_on(monkeypatch):
    """Catches: a flag that is lost, an exit code that is lost, an import of torch."""
    import modal_train

    calls = []
    cloud = types.SimpleNamespace(remote=lambda flags, name: calls.append((flags, name)) or 7)
    monkeypatch.setattr(modal_train, "train_in_cloud", cloud)
    with pytest.raises(SystemExit) as stop:
        modal_train.main.info.raw_f("--epochs", "3", "--compile")
    ((flags, name),) = calls
    assert stop.value.code == 7 and flags == ["--epochs", "3", "--compile"]
    assert re.fullmatch(r"[\d_-]{19}", name)
    code = "import sys; sys.modules['torch'] = None; import modal_train"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, timeout=60)


def test_modal_body_trains_and_goes_on_after_a_restart(tiny, monkeypatch, tmp_path):
    """Catches: flags that do not arrive; a restart that begins again; a new run that resumes; a
    volume that is not committed after every epoch."""
    import modal_train

    commits, run = [], modal_train.train_in_cloud.local
    volume = types.SimpleNamespace(commit=lambda: commits.append(read(tmp_path / "latest.pt")))
    monkeypatch.setattr(modal_train, "volume", volume)
    flags = ["--samples=64", "--batch-size=16", "--lr=1e-3", "--device=cpu"]
    run([*flags, "--epochs=1"], "one", str(tmp_path))
    monkeypatch.setattr(modal_train.modal, "is_local", lambda: False)
    run([*flags, "--epochs=3"], "one", str(tmp_path))  # the same run, called again
    state = read(tmp_path / "latest.pt")
    assert state["epoch"] == 3 and not list(tmp_path.glob("before_*"))
    assert [commit["epoch"] for commit in commits] == [2, 3]
    run([*flags, "--epochs=1"], "two", str(tmp_path))
    assert read(tmp_path / "latest.pt")["epoch"] == 1
    assert same(read(tmp_path / "before_two/latest.pt"), state)
    run(["--resume", "--epochs=2", "--device=cpu"], "three", str(tmp_path))
    state = read(tmp_path / "latest.pt")
    assert (state["name"], state["epoch"]) == ("two", 2)
    assert run(["--epochs=0"], "four", str(tmp_path)) == 2  # and not an error, to be tried again


# ==== The README ==================================================================================

README = (HERE / "README.md").read_text(encoding="utf-8")


def test_readme_links_and_flags_exist():
    """Catches: a picture or a flag that was renamed; a folder that makes the clone slow."""
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (HERE / link).exists(), link
    known = {
        name for m in (train, sample) for a in m.parser()._actions for name in a.option_strings
    }
    for command in re.findall(r"(?:train|sample|modal_train)\.py ([^`\n]*)", README):
        assert set(re.findall(r"--[a-z-]+", command)) <= known, command
    assert sum(p.stat().st_size for p in (HERE / "assets").iterdir()) <= 12e6
