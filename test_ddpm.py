"""Checks the program against independent computations: python -m pytest

Good samples do not prove correct code. Every test here says what it would catch.
"""

import functools
import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import group_norm

import ddpm
import modal_train
import sample
import shapes
import train

HERE = Path(__file__).parent
T = ddpm.T
BETA = np.append(0, np.linspace(1e-4, 0.02, T))  # in float64, apart from ddpm.py
ALPHA_BAR = np.cumprod(1 - BETA)
SCHEDULE = ddpm.Schedule()
equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def awake(model, size=0.05):
    """Random numbers in all weights: zero-initialised layers would hide what is behind them."""
    for i, p in enumerate(model.parameters()):
        p.data = p.data + size * noise(*p.shape, seed=i)
    return model


def small():
    """A network of the same kind that trains in a moment."""
    return ddpm.UNet((8, 8, 8), 16, 8, 16)


def test_the_data_are_the_same_bytes_everywhere_and_closed_under_mirror_images():
    """Catches: any change to what is drawn; a mask that favours a side, or is there twice."""
    digest = hashlib.sha256(shapes.make_dataset(1000, seed=0).tobytes()).hexdigest()
    assert digest[:16] == "e7f317c0d3d21075"
    assert not np.array_equal(shapes.make_dataset(9, seed=0), shapes.make_dataset(9, seed=1))
    masks = [(kind, mask) for kind in shapes.KINDS for mask in shapes.CATALOGUE[kind]]
    assert len(masks) == len(shapes.KIND_OF) == len({shapes.key(mask) for _, mask in masks}) == 46
    for kind, mask in masks:
        for turned in (np.rot90(mask), mask[:, ::-1]):  # these two generate all eight
            assert shapes.KIND_OF[shapes.key(np.ascontiguousarray(turned))] == kind


def test_model_range_and_back_and_pictures_for_people():
    """Catches: pictures scaled to [0, 1], a grid out of order, wrong colours, up-down mirroring."""
    pictures = shapes.make_dataset(20, seed=0)
    x = shapes.to_model(pictures)  # (20, 1, 32, 32)
    assert x.dtype == torch.float32 and x.unique().tolist() == [-1, 1]
    assert np.array_equal(shapes.from_model(3 * x), pictures)
    sheet = np.asarray(shapes.tile(shapes.from_model(x), columns=7))
    ninth = sheet[130 + 1 : 260 - 1 : 4, 130 + 1 : 260 - 1 : 4, 0] / 255
    assert sheet.shape == (3 * 130, 7 * 130, 3) and np.array_equal(ninth, pictures[8])
    kind, blob = shapes.explain(pictures[0])[0]
    colour = shapes.COLOURS[shapes.KINDS.index(kind)]
    assert np.allclose(shapes.coloured(pictures)[0][blob], colour)
    mirrored = shapes.mirror(x.expand(-1, 9, -1, -1), seeded(0))[:, 0]
    turned = (mirrored == x[:, 0].flip(2)).all((1, 2))
    assert 4 < turned.sum() < 16 and torch.equal(mirrored[~turned], x[~turned, 0])


def test_real_pictures_are_right_and_others_are_not():
    """Catches: a score that is too strict, or blind to one pixel, to touching or a fourth shape."""
    right = lambda pictures: shapes.score(shapes.to_model(pictures))["right"]
    real, rng = shapes.make_dataset(500, seed=99), np.random.default_rng(0)
    assert right(real) == 1
    flipped = real.copy()
    flipped[np.arange(500), rng.integers(32, size=500), rng.integers(32, size=500)] ^= 1
    assert right(flipped) == right(rng.random((100, 32, 32)) < 0.5) == 0
    picture, corners = np.zeros((1, 32, 32)), [(0, 0), (12, 0), (0, 12), (12, 12)]
    for (y, x), want in zip(corners, (1, 1, 1, 0)):  # the fourth shape is too many
        picture[0, y : y + 8, x : x + 8] = 1
        assert right(picture) == want
    picture[0, 8:, :] = picture[0, :, 8:] = 0
    picture[0, 8:16, 8:16] = 1  # two, which touch at a corner
    assert right(picture) == 0


def test_the_score_counts():
    """Catches: shares of the wrong whole, copies that are missed, kinds mixed up."""
    pictures = shapes.make_dataset(80, seed=5)
    x = torch.cat([shapes.to_model(pictures), noise(20, 1, 32, 32)])
    s = shapes.score(torch.cat([x, x[:100:10]]), training=pictures[40:, ::-1])
    found = [[kind for kind, _ in shapes.explain(p)] for p in [*pictures, *pictures[::10]]]
    assert s["right"] == pytest.approx(88 / 110) and s["distinct"] == pytest.approx(100 / 110)
    assert s["copies"] == pytest.approx(44 / 110)  # mirror images count
    assert s["kinds"] == [sum(k.count(kind) for k in found) for kind in shapes.KINDS]
    assert s["numbers"] == [sum(len(k) == n for k in found) for n in (1, 2, 3)]


def chance(order):
    """Of drawing these boxes, each (kind, y, x, height, width), one after the other."""
    p, taken = 1, np.zeros((34, 34), dtype=bool)  # with a frame of one pixel
    for kind, y, x, h, w in order:
        places = itertools.product(range(0, 33 - h, 4), range(0, 33 - w, 4))
        free = [not taken[i : i + h + 2, j : j + w + 2].any() for i, j in places]
        p *= (1 - (1 - np.mean(free)) ** 30) / sum(free) / len(shapes.CATALOGUE[kind]) / 4
        taken[y + 1 : y + h + 1, x + 1 : x + w + 1] = True
    return p


def test_the_entropy_of_the_data_is_17_3_bits():
    """Catches: another data set. Every text that says 17.3 bits points here.

    It is the mean of -log2 p(picture), and p is the sum over all orders of its shapes, each divided
    by the chance that shapes of these kinds fit, as they are drawn until they do.
    """
    fits, rng, bits = {}, np.random.default_rng(0), {1: [], 2: [], 3: []}
    for picture in shapes.make_dataset(1500, seed=7):
        boxes, p = [], 0
        for kind, blob in shapes.explain(picture):
            low, high = np.argwhere(blob).min(0), np.argwhere(blob).max(0) + 1
            boxes.append((kind, *low, *(high - low)))
        for order in itertools.permutations(boxes):
            kinds = tuple(kind for kind, *_ in order)
            if kinds not in fits:
                drawn = [shapes.draw_picture(kinds, rng) is not None for _ in range(100)]
                fits[kinds] = np.mean(drawn)
            p += chance(order) / fits[kinds]
        bits[len(boxes)].append(-math.log2(p))
    numbers = {1: 0.36, 2: 0.48, 3: 0.16}  # with their probability
    entropy = sum(q * (np.mean(bits[n]) - math.log2(q)) for n, q in numbers.items())
    assert entropy == pytest.approx(17.3, abs=0.15)


def test_schedule_against_numpy():
    """Catches: a beta index off by one, alpha for alpha_bar, float32 in the product."""
    want = {"beta": BETA, "alpha": 1 - BETA, "alpha_bar": ALPHA_BAR}
    want["one_minus_alpha_bar"] = 1 - ALPHA_BAR
    want["snr"] = np.append(math.inf, ALPHA_BAR[1:] / (1 - ALPHA_BAR[1:]))
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
        signal = ddpm.q_sample(SCHEDULE, one, torch.tensor([t]), 0 * one).item()
        deviation = ddpm.q_sample(SCHEDULE, 0 * one, torch.tensor([t]), one).item()
        assert [signal, deviation] == pytest.approx([mean, math.sqrt(variance)], rel=1e-5)


@pytest.mark.parametrize("channels, d, side", [(64, 32, 16), (96, 64, 4), (16, 16, 32)])
def test_attention_against_a_naive_loop(channels, d, side):
    """Catches: softmax over the wrong axis, a missing 1/sqrt(d), mixed up pixels, a lost skip."""
    layer, x = awake(ddpm.Attention(channels, d)), noise(2, channels, side, side)
    block, got = max(1, side // 8), layer(x)
    places = [*itertools.product(range(0, side, block), repeat=2)]
    means = [x[:, :, i : i + block, j : j + block].mean((2, 3)) for i, j in places]
    means = group_norm(torch.stack(means, 2), channels // 8, layer.norm.weight, layer.norm.bias)
    matrix, out = layer.qkv.weight[:, :, 0, 0], layer.out.weight[:, :, 0, 0]
    rows = [(m @ matrix.T + layer.qkv.bias).split(d, 1) for m in means.unbind(2)]
    for (query, _, _), (i, j) in zip(rows, places):
        weights = [((query * key).sum(1) / math.sqrt(d)).exp() for _, key, _ in rows]
        mean = sum(w[:, None] * value for w, (_, _, value) in zip(weights, rows))
        change = mean / sum(weights)[:, None] @ out.T + layer.out.bias
        for y, z in ((i, j), (i + block - 1, j + block - 1)):
            assert torch.allclose(got[:, :, y, z], x[:, :, y, z] + change, atol=1e-4)


def test_the_network_as_described():
    """Catches: a level without attention, a bottleneck that shrank, sizes that do not work."""
    model, attends = ddpm.UNet(), set()
    for layer in model.modules():
        if isinstance(layer, ddpm.Attention):
            layer.register_forward_hook(lambda layer, inputs, y: attends.add(y.shape[-1]))
    assert model(noise(2, 1, 32, 32), torch.tensor([1, T])).abs().max() == 0  # at first
    assert attends == {32, 16, 8, 4} and model.middle2.conv2.out_channels == 512
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 4e6 and not [*model.buffers()]
    for size in ((24, 32), (56, 40), (64, 64)):
        assert small()(noise(1, 1, *size), torch.tensor([1])).shape[2:] == size


def test_skips_are_added_and_blocks_pass_on_their_input_at_first():
    """Catches: skips or residual sums that are missing, last layers that do not start at 0."""
    below, skip, level = noise(1, 512, 4, 4), noise(1, 128, 8, 8, seed=1), ddpm.UNet().up[0]
    joined, alone = (level(below, s, noise(1, 128)) for s in (skip, 0 * skip))
    assert torch.allclose(joined - alone, skip, atol=1e-5)


def test_everything_is_used_and_pictures_of_a_batch_do_not_see_each_other():
    """Catches: t ignored, in one block or all; a norm built and never applied; a lost skip;
    BatchNorm, attention across the batch, a view that mixes up axes."""
    model, x, t = awake(ddpm.UNet()), noise(3, 1, 32, 32), torch.tensor([1, 500, T])
    with torch.no_grad():
        together, other = model(x, t), model(x, torch.tensor([2, 501, 100]))
        assert (together - other).abs().amax((1, 2, 3)).min() > 1e-3
        alone = torch.cat([model(x[[i]], t[[i]]) for i in range(3)])
        assert torch.allclose(together, alone, atol=1e-4)
    model(x, t).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def any_model(x, t):
    """A network that is quick and not quite right: depends on t, the pixel and a neighbour."""
    return SCHEDULE.signal_and_noise(t)[1] * (0.9 * x + 0.1 * x.roll(1, 3).tanh())


def test_the_loss_by_hand():
    """Catches: x_t for another t, a loss that is not Eq. 14."""
    x_0, eps = noise(4, 1, 32, 32).sign(), noise(4, 1, 32, 32, seed=1)
    t = torch.tensor([1, 20, 500, T])
    a = torch.from_numpy(ALPHA_BAR)[t].view(-1, 1, 1, 1)
    x_t = (a.sqrt() * x_0 + (1 - a).sqrt() * eps).float()
    want = (any_model(x_t, t) - eps).square().sum().item() / (4 * 32 * 32)
    assert ddpm.loss_fn(any_model, SCHEDULE, x_0, t, eps).item() == pytest.approx(want, rel=1e-4)


def test_algorithm_1_by_hand():
    """Catches: a step uphill, gradients that add up over steps, t or noise that comes again."""
    w = torch.nn.Parameter(torch.tensor(0.5))
    sgd, x_0, z, want = torch.optim.SGD([w], lr=0.1), noise(8, 1, 4, 4).sign(), seeded(3), 0.5
    generator = seeded(3)
    for _ in range(3):
        loss = ddpm.algorithm_1(lambda x, t: w * x, SCHEDULE, sgd, x_0, generator)
        t, eps = torch.randint(1, T + 1, (8,), generator=z), torch.randn(x_0.shape, generator=z)
        a = torch.from_numpy(ALPHA_BAR)[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
        assert loss.item() == pytest.approx((want * x_t - eps).square().mean().item(), rel=1e-4)
        want -= 0.1 * (2 * (want * x_t - eps) * x_t).mean().item()
        assert w.item() == pytest.approx(want, rel=1e-4) and not loss.requires_grad


def test_both_ways_to_draw_t():
    """Catches: t drawn from 0..T-1 or 1..T-1: sampling would start where nobody trained."""
    n, one, even = 1_600_000, np.arange(1, T + 1), np.full(T, 1 / T)
    pairs = np.bincount((one[:, None] + one).ravel() // 2)[1:] / T**2
    triangle = train.triangle_t(n, seeded(0)).view(-1, 16)
    uniform = ddpm.uniform_t(n, seeded(0))
    for t, want in ((uniform, even), (triangle[:, 0], even), (triangle[:, 1:], pairs)):
        count, want = np.bincount(t.flatten(), minlength=T + 1), want * t.numel()
        assert t.dtype == torch.int64 and len(count) == T + 1 and count[0] == 0
        chi_square = ((count[1:] - want) ** 2 / want).sum()
        assert abs(chi_square - (T - 1)) < 4 * math.sqrt(2 * (T - 1))


def test_a_step_back_is_bayes_rule():
    """Catches: a wrong coefficient or sigma, alpha for alpha_bar, noise at the end.

    If the data is one picture x_0, a step back draws from q(x_{t-1} | x_t, x_0). Here that density
    comes from Eq. 2 and Eq. 4 on a grid of x_{t-1}, without Eq. 7 or Eq. 11.
    """
    model = ddpm.perfect_model(SCHEDULE, torch.ones(1, 1, 1, 1))
    walk = [*ddpm.algorithm_2(model, SCHEDULE, noise(1, 1, 1, 1), seeded(4))]
    assert [t for t, _ in walk] == [*range(T, -1, -1)] and walk[-1][1].item() == pytest.approx(1)
    x, z = np.linspace(-6, 6, 60_001), [torch.randn(1, generator=g).item() for g in [seeded(4)] * T]
    for t in (2, 10, 100, 500, T):
        (_, x_t), (_, got), a, beta = walk[T - t], walk[T - t + 1], ALPHA_BAR[t - 1], BETA[t]
        log = -((x - math.sqrt(a)) ** 2) / (2 * (1 - a))
        log = log - (x_t.item() - math.sqrt(1 - beta) * x) ** 2 / (2 * beta)
        q = np.exp(log - log.max()) / np.exp(log - log.max()).sum()
        mean, deviation = q @ x, math.sqrt(q @ x**2 - (q @ x) ** 2)
        assert got.item() == pytest.approx(mean + deviation * z[T - t], abs=3e-4), t


@pytest.mark.parametrize("steps, eta", [(T, 1.0), (T, 0.5), (7, 0.0), (7, 0.5), (7, 1.0)])
def test_ddim_by_hand(steps, eta):
    """Catches: eta for eta squared, sigma that is added but not taken from the rest, a missing
    clip, the eps of another guess, noise that the generator does not control, t = 1 left out."""
    z, a = seeded(4), ALPHA_BAR
    walk = [*ddpm.ddim(any_model, SCHEDULE, noise(2, 1, 8, 8), steps, eta, seeded(4))]
    assert len(walk) == steps + 1 and [t for t, _ in walk[-2:]] == [1, 0]
    for (t, x_t), (s, got) in itertools.pairwise(walk):
        noise_part = math.sqrt(1 - a[t]) * any_model(x_t, torch.tensor([t])).double()
        whole = (x_t.double() - noise_part) / math.sqrt(a[t])  # Eq. 4 solved for x_0
        guess = whole.clamp(-1, 1)
        assert t < T or whole.abs().max() > 1, "nothing to clip"
        eps = (x_t.double() - math.sqrt(a[t]) * guess) / math.sqrt(1 - a[t])
        sigma = eta * math.sqrt((1 - a[s]) / (1 - a[t])) * math.sqrt(1 - a[t] / a[s])  # Eq. 16
        rest = math.sqrt(max(0, 1 - a[s] - sigma**2))
        x = math.sqrt(a[s]) * guess + rest * eps + sigma * torch.randn(x_t.shape, generator=z)
        assert torch.allclose(got.double(), x, atol=1e-4), t


def test_the_perfect_network_is_bayes_rule_and_returns_its_data():
    """Catches: a wrong posterior mean; a walk that ends elsewhere, fresh noise missing."""
    data = shapes.to_model(shapes.make_dataset(20, seed=0))
    model, x_t = ddpm.perfect_model(SCHEDULE, data), noise(3, 1, 32, 32)
    for t in (100, 500, T):
        a = ALPHA_BAR[t]
        distance = (x_t.double()[:, None] - math.sqrt(a) * data).square().sum((2, 3, 4))
        w = (-distance / (2 * (1 - a))).softmax(1)  # (3, 20)
        want = torch.einsum("bn,nchw->bchw", w, data.double())
        times = torch.full((3,), t)
        got = ddpm.predict_x_0(SCHEDULE, x_t, times, model(x_t, times))
        assert torch.allclose(got.double(), want, atol=2e-3)
    *_, (_, x) = ddpm.algorithm_2(model, SCHEDULE, x_t, seeded(0))
    assert torch.cdist(x.flatten(1), data.flatten(1)).amin(1).max() < 0.1


def test_one_pixel_ends_at_minus_or_plus_one():
    """Catches: fresh noise missing or too much. With eta = 0 the start decides, with 1 not."""
    pixel = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    model, x_T = ddpm.perfect_model(SCHEDULE, pixel), noise(4096, 1, 1, 1)
    for walk, same_side in (
        (ddpm.algorithm_2(model, SCHEDULE, x_T, seeded(1)), 0.5),
        (ddpm.ddim(model, SCHEDULE, x_T, T, 0.0, None), 1),
    ):
        *_, (_, x) = walk
        assert (x.abs() - 1).abs().max() < 1e-2
        assert (x > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
        assert ((x > 0) == (x_T > 0)).float().mean().item() == pytest.approx(same_side, abs=0.03)


@pytest.mark.parametrize("steps, bits", [(T, 1.007), (100, 1.073), (50, 1.159), (20, 1.548)])
def test_the_bound_of_one_pixel_is_one_bit(steps, bits):
    """Catches: a wrong weight, nats for bits, a sum of terms that is a mean. (By quadrature.)"""
    pixel = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    x_0 = pixel[torch.randint(2, (2000 * (steps - 1),), generator=seeded(0))]
    terms = ddpm.bound(ddpm.perfect_model(SCHEDULE, pixel), SCHEDULE, x_0, seeded(1), steps)
    assert terms.shape == (T + 1,) and (terms > 0).sum() <= steps - 1
    assert terms.sum().item() == pytest.approx(bits, rel=0.03)


def test_a_term_of_the_bound_is_eq_12():
    """Catches: terms at another t, SNR for its difference, a mean over pixels."""
    x_0, eps = noise(T - 1, 1, 4, 4).sign(), torch.randn(T - 1, 1, 4, 4, generator=seeded(1))
    terms = ddpm.bound(any_model, SCHEDULE, x_0, seeded(1)) * math.log(2)
    for t in (2, 3, 100, T):
        i, variance = T - t, BETA[t] * (1 - ALPHA_BAR[t - 1]) / (1 - ALPHA_BAR[t])
        a = ALPHA_BAR[t]
        x_t = (math.sqrt(a) * x_0[[i]] + math.sqrt(1 - a) * eps[[i]]).float()
        error = (eps[i] - any_model(x_t, torch.tensor([t]))).square().sum().item()
        weight = BETA[t] ** 2 / (2 * variance * (1 - BETA[t]) * (1 - a))
        assert terms[t].item() == pytest.approx(weight * error, rel=2e-3), t
    assert terms[:2].sum() == 0


def run_train(folder, *flags, network=small):
    """train.py in this process, with a small network; returns the checkpoint that it left."""
    new = [] if "--resume" in flags else ["--samples=64", "--batch-size=16", "--lr=1e-3"]
    places = ["--device=cpu", f"--checkpoints={folder}", f"--logs={folder}/logs"]
    train.main([*new, *flags, *places], network)
    return torch.load(folder / "latest.pt", weights_only=True)


def test_one_epoch_and_one_more_are_two(tmp_path):
    """Catches: noise that repeats or differs, optimizer, rate, average or flags not restored."""
    seen = []

    def watched():
        model = small()
        model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[1].tolist())))
        return model

    whole = run_train(tmp_path / "a", "--epochs=2", "--seed=1", network=watched)
    steps = [t for t in seen if len(t) == 16]  # of 16 pictures, four in an epoch
    assert len(steps) == len({*steps}) == 8
    run_train(tmp_path / "b", "--epochs=1", "--seed=1")
    parts = run_train(tmp_path / "b", "--resume", "--epochs=2")
    for key in ("flags", "history", "model", "average", "optimizer", "scheduler"):
        equal(whole[key], parts[key])
    other = run_train(tmp_path / "c", "--epochs=2")
    raw, average = whole["model"]["stem.weight"], whole["average"]["stem.weight"]
    assert not torch.equal(raw, other["model"]["stem.weight"]) and not torch.equal(raw, average)


def test_the_first_step_and_the_average(tmp_path):
    """Catches: an average that stands still or forgets too soon, a rate without --lr or warm-up."""
    state = run_train(tmp_path, "--epochs=1", "--samples=16")
    best = torch.load(tmp_path / "best.pt", weights_only=True)["average"]
    torch.manual_seed(0)
    for name, first in small().state_dict().items():
        now, average = state["model"][name], state["average"][name]
        assert torch.allclose(average, first + 9 / 11 * (now - first)), name
        assert torch.equal(best[name], average.half()), name
        # Adam's first step is the rate, for each weight that has a gradient.
        assert (now - first).abs().max().item() < 1e-3 * train.rate(0) * 1.01
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3 * train.rate(1))
    assert train.rate(15_999) == pytest.approx(1) and train.rate(0) < train.rate(499) == 8


def test_what_training_leaves(tmp_path, capsys):
    """Catches: a missing file, curve or picture; best.pt of another epoch, bits of raw weights; a
    finished run that says nothing."""
    latest = run_train(tmp_path, "--epochs=5")
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    bits, model = [row["bits"] for row in latest["history"]], small()
    assert best["history"] == latest["history"][: bits.index(min(bits)) + 1]
    model.load_state_dict(latest["average"])
    others = shapes.to_model(shapes.make_dataset(999, [0, 1]))
    terms = ddpm.bound(model, SCHEDULE, others, seeded(0)).detach()
    assert bits[-1] == pytest.approx(terms[101:].sum().item(), rel=1e-4)
    names = {"latest.pt", "best.pt", "loss.png", "samples_0005.png", "logs"}
    assert {path.name for path in tmp_path.iterdir()} == names
    (run,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Images("samples")] == [5]
    assert [event.value for event in events.Scalars("bits")] == pytest.approx(bits)
    files = [*tmp_path.rglob("*")]
    run_train(tmp_path, "--resume")
    assert "5 epochs are done" in capsys.readouterr().out and files == [*tmp_path.rglob("*")]


def test_a_forgotten_resume_and_a_loss_that_is_not_finite_lose_nothing(tmp_path):
    """Catches: an older run or a user's picture overwritten, NaN saved over good weights."""
    run_train(tmp_path, "--epochs=1")
    old = (tmp_path / "latest.pt").read_bytes()
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(SystemExit, match="not finite"):
        run_train(tmp_path, "--epochs=1", network=lambda: awake(small(), math.nan))
    assert (tmp_path / "latest.pt").read_bytes() == old
    run_train(tmp_path, "--epochs=1", "--seed=1", "--bf16")
    (aside,) = tmp_path.glob("before_*")
    assert (aside / "latest.pt").read_bytes() == old
    names = {"latest.pt", "best.pt", "loss.png", "samples_0001.png"}
    assert {path.name for path in aside.iterdir()} == names
    assert (tmp_path / "mine.png").read_text() == "mine"


def test_sampling_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Catches: a flag or weights that are not used, a picture that is missing or not drawn."""
    state = run_train(tmp_path / "checkpoints", "--epochs=1")
    torch.save({**state, "average": awake(small()).state_dict()}, tmp_path / "other.pt")
    monkeypatch.chdir(tmp_path)
    pictures = []
    for flags in ("", "", "--seed=2", "--eta=0.5", "--steps=4", "--checkpoint=other.pt"):
        words = ["--device=cpu", "--n=1", "--steps=3", "--output=a.png", *flags.split()]
        sample.main(words, small)
        pictures.append(Path("a.png").read_bytes())
    assert pictures[0] == pictures[1] and len({*pictures}) == 5
    for flags in ("--explain", "--show-process", "--process", "--score --n=8"):
        sample.main(["--device=cpu", "--steps=5", *flags.split()], small)
    out = capsys.readouterr().out
    assert f"{Path('checkpoints/best.pt')}, epoch 1, " in out and "bits above t = 100" in out
    assert {"explained.png", "process.png", "process.gif"} <= {p.name for p in tmp_path.iterdir()}


def test_scripts_in_a_process_of_their_own(tmp_path):
    """Catches: numbers in the text of ddpm.py that the program does not print; a traceback; an
    error where a notebook has set MPLBACKEND."""
    (tmp_path / "a_file").write_text("mine")
    env, done = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}, []
    for command in ("ddpm.py", "shapes.py", "train.py --samples 64 --logs a_file"):
        script, *flags = command.split()
        options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
        done.append(subprocess.run([sys.executable, HERE / script, *flags], check=False, **options))
    assert [d.returncode for d in done] == [0, 0, 1] and done[2].stderr.startswith("error: ")
    assert "in 1000 steps: a bound of 1.0" in done[0].stdout and "100% of 16" in done[0].stdout
    assert {"forward.png", "pixel.png", "shapes.png"} < {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "a_file").read_text() == "mine"


class Evil:
    """Unpickling it makes a folder where the program runs."""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


@pytest.mark.parametrize("main, flag", [(train.main, "--resume"), (sample.main, "--checkpoint={}")])
def test_a_broken_checkpoint_gets_one_line(main, flag, tmp_path, monkeypatch):
    """Catches: a traceback, code run from a file, weights loaded into the wrong network."""
    monkeypatch.chdir(tmp_path)
    path = Path("checkpoints/latest.pt")
    state, cut = run_train(path.parent, "--epochs=1"), path.read_bytes()[:9999]
    foreign = {**state, "model": {}, "average": {}}
    for broken in (b"", b"text", cut, {"epoch": 1}, state["average"], foreign, {"flags": Evil()}):
        path.write_bytes(broken) if isinstance(broken, bytes) else torch.save(broken, path)
        with pytest.raises(SystemExit, match=f"^error: cannot .*{path}.*") as stop:
            main([flag.format(path), "--device=cpu"], small)
        assert "\n" not in stop.value.code and not Path("it ran").exists()


MISTAKES = """train.py --batch-size 0, train.py --samples 10, train.py --resume, train.py --lr 0,
    train.py --seed -1, sample.py --steps 0, sample.py --n 0, sample.py --process --n 17,
    sample.py --eta 2, sample.py --checkpoint no.pt, sample.py --output a.txt,
    sample.py --output no/a.png"""


@pytest.mark.parametrize("command", MISTAKES.split(","))
def test_a_mistake_gets_one_line(command, tmp_path, monkeypatch, capsys):
    """Catches: a traceback for the user, files lost or made."""
    monkeypatch.chdir(tmp_path)
    script, *flags = command.split()
    with pytest.raises(SystemExit) as stop:
        {"train.py": train, "sample.py": sample}[script].main(flags)
    assert "error: " in (capsys.readouterr().err.splitlines() or [stop.value.code])[-1]
    assert stop.value.code and not [*tmp_path.iterdir()]


def test_the_weights_that_come_along():
    """Catches: a missing or outgrown assets/pretrained.pt, or one of another network."""
    state, model = torch.load(sample.PRETRAINED, weights_only=True), ddpm.UNet()
    model.load_state_dict(state["average"])
    assert sample.PRETRAINED.stat().st_size <= 6e6 and state["flags"]["samples"] == 10_000
    x_0, t = shapes.to_model(shapes.make_dataset(16, [0, 3])), torch.full((16,), 200)
    x_t = ddpm.q_sample(SCHEDULE, x_0, t, noise(16, 1, 32, 32))
    with torch.no_grad():
        guess = ddpm.predict_x_0(SCHEDULE, x_t, t, model(x_t, t))
    assert (guess.sign() != x_0).float().sum((1, 2, 3)).mean() < 2


def test_modal_trains_and_goes_on_after_a_restart(tmp_path):
    """Catches: flags that do not arrive; a restart that begins again; a new run that resumes; an
    import of torch, which the user's machine may lack."""
    code = "import sys; sys.modules['torch'] = None; import modal_train"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)
    folder, script = tmp_path / "checkpoints", tmp_path / "small.py"
    folder.mkdir()
    small_net = "train.main(sys.argv[1:], lambda: train.ddpm.UNet((8, 8, 8), 16, 8, 16))"
    script.write_text(f"import sys; sys.path.append({str(HERE)!r}); import train; {small_net}")
    (folder / "latest.pt").write_text("of an older run")
    for epochs in (1, 2):
        words = ["--samples=16", "--batch-size=16", "--device=cpu", f"--epochs={epochs}"]
        assert modal_train.train.local(words, "a run", folder, script) == 0
        assert len(torch.load(folder / "latest.pt", weights_only=True)["history"]) == epochs
    (aside,) = folder.glob("before_*")
    assert (aside / "latest.pt").read_text() == "of an older run" and (folder / "logs").is_dir()
    assert modal_train.train.local([], "another", folder, "no.py") == 2


def test_readme_links_and_flags_exist():
    """Catches: a picture or a flag that was renamed; a folder that makes the clone slow."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)]+)\)", readme):
        assert (HERE / link).exists(), link
    flags = {"help", *vars(train.parse([])), *vars(sample.parse([]))}
    for command in re.findall(r"(?:train|sample|modal_train)\.py ([^`\n]*)", readme):
        used = {flag.replace("-", "_") for flag in re.findall(r"--([a-z0-9-]+)", command)}
        assert used <= flags, command
    assert sum(p.stat().st_size for p in (HERE / "assets").iterdir()) <= 9e6
