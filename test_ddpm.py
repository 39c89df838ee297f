"""Holds the program against computations made in another way: python -m pytest

Good samples do not prove correct code. Every test here says what it would catch.
"""

import hashlib
import inspect
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm
import sample
import shapes
import train

HERE = Path(__file__).parent
T = ddpm.T
SCHEDULE = ddpm.Schedule()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awake(model):
    """Random numbers in all weights: the layers that start at 0 would hide what is behind."""
    for i, p in enumerate(model.parameters()):
        p.data = p.data + 0.05 * noise(*p.shape, seed=i)
    return model


@pytest.fixture
def tiny(monkeypatch):
    """Makes every new UNet a small one, and validation and samples cheap."""
    monkeypatch.setattr(ddpm.UNet.__init__, "__defaults__", ((8, 8, 8), 16, 8, 16))
    monkeypatch.setattr(train, "HELD_OUT", 32)
    monkeypatch.setattr(train, "GRID", 2)
    monkeypatch.setattr(train, "GRID_STEPS", 2)


# --- The data --------------------------------------------------------------------------


def test_pictures_are_the_same_bytes_everywhere():
    """Catches: any change to what is drawn or in which order random numbers are used."""
    digest = hashlib.sha256(shapes.make_dataset(1000, seed=0).tobytes()).hexdigest()
    assert digest[:16] == "a52eaee108dc2deb"
    assert not np.array_equal(
        shapes.make_dataset(9, seed=0), shapes.make_dataset(9, seed=1)
    )


def slowly(kind, p):
    """Draws a shape pixel by pixel, by another definition than shapes.py where there is one."""
    picture = np.zeros((32, 32), dtype=bool)
    for y in range(32):
        for x in range(32):
            if kind == "circle":
                inside = math.hypot(x - p[0], y - p[1]) < p[2] + 0.5
            elif kind == "rectangle":
                inside = x in range(p[0], p[2] + 1) and y in range(p[1], p[3] + 1)
            elif kind == "triangle":
                inside = square_meets_triangle(
                    x, y, np.array(p, dtype=float).reshape(3, 2)
                )
            else:
                if (p[2], p[3]) < (p[0], p[1]):
                    p = (p[2], p[3], p[0], p[1], p[4])
                length = math.hypot(p[2] - p[0], p[3] - p[1])
                u = ((p[2] - p[0]) / length, (p[3] - p[1]) / length)
                along = (x - p[0]) * u[0] + (y - p[1]) * u[1]
                across = (y - p[1]) * u[0] - (x - p[0]) * u[1]
                inside = -1e-9 <= along <= length + 1e-9
                inside &= -p[4] / 2 + 1e-9 < across <= p[4] / 2 + 1e-9
            picture[y, x] = inside
    return picture


def square_meets_triangle(x, y, corners):
    """Clips the triangle to the pixel's square (Sutherland-Hodgman): is any area left?"""
    polygon = [tuple(c) for c in corners]
    for axis, sign, limit in (
        (0, 1, x - 0.5),
        (0, -1, -x - 0.5),
        (1, 1, y - 0.5),
        (1, -1, -y - 0.5),
    ):
        clipped = []
        for a, b in zip(polygon, polygon[1:] + polygon[:1]):
            da, db = sign * a[axis] - limit, sign * b[axis] - limit
            if da >= 0:
                clipped.append(a)
            if da * db < 0:
                s = da / (da - db)
                clipped.append((a[0] + s * (b[0] - a[0]), a[1] + s * (b[1] - a[1])))
        polygon = clipped
    area = sum(
        a[0] * b[1] - b[0] * a[1] for a, b in zip(polygon, polygon[1:] + polygon[:1])
    )
    return abs(area) > 1e-9


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_each_shape_against_a_slow_drawing(kind):
    """Catches: mirrored, shifted or half-open shapes; a wrong rounding; a lost edge."""
    params = shapes.random_shapes(kind, 12, np.random.default_rng(5)).astype(int)
    masks = shapes.DRAW[kind](*params.T)
    for p, mask in zip(params.tolist(), masks):
        assert np.array_equal(mask, slowly(kind, p)), (kind, p)


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_every_shape_keeps_its_limits_and_stays_inside(kind):
    """Catches: a limit that is not enforced, a shape that the frame cuts off."""
    p = shapes.random_shapes(kind, 3000, np.random.default_rng(1)).astype(int)
    masks = np.pad(shapes.DRAW[kind](*p.T), ((0, 0), (0, 1), (0, 1)))
    columns, rows = masks.any(1).sum(1), masks.any(2).sum(1)
    if kind == "circle":
        assert set(p[:, 2]) == set(range(shapes.RADIUS[0], shapes.RADIUS[1] + 1))
        assert np.array_equal(columns, 2 * p[:, 2] + 1) and np.array_equal(
            rows, columns
        )
    elif kind == "rectangle":
        low, high = shapes.SIDE
        assert {columns.min(), rows.min()} == {low} and {columns.max(), rows.max()} == {
            high
        }
        assert np.array_equal(masks.sum((1, 2)), columns * rows)
    elif kind == "triangle":
        assert max(columns.max(), rows.max()) == shapes.SPAN
        v = p.reshape(-1, 3, 2)
        sides = np.stack(
            [np.linalg.norm(v[:, i] - v[:, i - 1], axis=1) for i in range(3)]
        )
        s = sides.sum(0) / 2  # Heron's formula
        area = np.sqrt(s * (s - sides[0]) * (s - sides[1]) * (s - sides[2]))
        height = 2 * area / sides.max(0)
        assert shapes.HEIGHT - 1e-6 <= height.min() < shapes.HEIGHT + 0.1
        assert np.array_equal(columns, np.ptp(v[..., 0], axis=1) + 1)
    else:
        length = np.hypot(p[:, 2] - p[:, 0], p[:, 3] - p[:, 1])
        assert length.min() >= shapes.LENGTH[0] and length.max() <= shapes.LENGTH[1]
        # As much area as a line of this length and width has: nothing is cut off.
        assert np.abs(masks.sum((1, 2)) / ((length + 1) * p[:, 4]) - 1).max() < 0.2


def test_a_data_set_holds_what_it_says():
    """Catches: uneven kinds or numbers, shapes that touch, labels that are not the picture's."""
    pictures, kinds, params = shapes.make_scenes(6000, seed=3)
    assert pictures.shape == (6000, 32, 32) and pictures.dtype == np.uint8
    assert set(np.unique(pictures)) == {0, 1}
    count = np.bincount((kinds >= 0).sum(1), minlength=4)
    assert count[0] == 0 and np.abs(count[1:] - 2000).max() < 5 * math.sqrt(2000)
    kind = np.bincount(kinds[kinds >= 0], minlength=4)
    assert np.abs(kind - kind.mean()).max() < 5 * math.sqrt(kind.mean())
    for picture, ks, ps in list(zip(pictures, kinds, params))[:300]:
        drawn = [
            shapes.DRAW[shapes.KINDS[k]](*p[: len(shapes.PARAMETERS[shapes.KINDS[k]])])
            for k, p in zip(ks, ps)
            if k >= 0
        ]
        assert np.array_equal(np.any(drawn, axis=0), picture)
        for i, a in enumerate(drawn):
            for b in drawn[:i]:
                pa, pb = np.argwhere(a), np.argwhere(b)
                apart = np.abs(pa[:, None] - pb[None]).max(2).min()
                assert apart >= 2


def test_ten_thousand_pictures_take_well_under_a_second_or_two():
    """Catches: a loop over pictures. The bound is loose, since test machines are busy."""
    start = time.process_time()
    assert len(shapes.make_dataset(10_000, seed=0)) == 10_000
    assert time.process_time() - start < 5


def test_model_range_and_back():
    """Catches: pictures scaled to [0, 1], a missing channel, float64."""
    pictures = shapes.make_dataset(20, seed=0)
    x = shapes.to_model(pictures)
    assert x.shape == (20, 1, 32, 32) and x.dtype == np.float32
    assert set(np.unique(x)) == {-1, 1}
    assert np.array_equal(shapes.from_model(x), pictures)
    assert shapes.tile(pictures, columns=7, scale=2).shape == (3 * 66, 7 * 66)


# --- The score -------------------------------------------------------------------------


def clean_share(pictures):
    return shapes.score(shapes.to_model(pictures))["clean"]


def defect(kind, rng):
    """A picture with one planted defect, bool (32, 32)."""
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    if kind == "empty":
        return np.zeros((32, 32), dtype=bool)
    if kind == "four or five shapes":
        while True:
            picture = np.zeros((1, 32, 32), dtype=bool)
            for _ in range(rng.integers(4, 6)):
                for _ in range(100):
                    name = shapes.KINDS[rng.integers(4)]
                    mask = shapes.DRAW[name](*shapes.random_shapes(name, 1, rng).T)
                    if not shapes.touches(shapes.pack(mask), shapes.pack(picture))[0]:
                        picture |= mask
                        break
            if len(blobs(picture[0])) >= 4:
                return picture[0]
    if kind == "bitten rectangle":
        w, h = rng.integers(8, 17, 2)
        x0, y0, bw, bh = (
            rng.integers(0, 33 - w),
            rng.integers(0, 33 - h),
            *rng.integers(4, 7, 2),
        )
        picture = shapes.rectangle(x0, y0, x0 + w - 1, y0 + h - 1).copy()
        left, top = rng.choice([x0, x0 + w - bw]), rng.choice([y0, y0 + h - bh])
        picture[top : top + bh, left : left + bw] = False
        return picture
    cx, cy, angle = *rng.uniform(11, 20, 2), rng.uniform(0, 2 * math.pi)
    u = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
    v = (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)
    if kind == "ellipse":
        a = rng.uniform(4, 7)
        return (u / a) ** 2 + (v / (1.5 * a)) ** 2 <= 1
    if kind == "pentagon":
        corners = [angle + 2 * math.pi * k / 5 for k in range(5)]
        reach = rng.uniform(6, 10) * math.cos(math.pi / 5)
        return np.all(
            [(x - cx) * math.cos(c) + (y - cy) * math.sin(c) <= reach for c in corners],
            axis=0,
        )
    radius = rng.uniform(5, 9)
    if kind == "ring":
        return (np.hypot(u, v) <= radius) & (np.hypot(u, v) >= radius / 2)
    assert kind == "arc"
    return (np.abs(np.hypot(u, v) - radius) <= 1.2) & (v > 0)


def blobs(picture):
    """Connected sets of pixels, by a flood fill."""
    left, found = {tuple(p) for p in np.argwhere(picture)}, []
    while left:
        blob, edge = set(), [left.pop()]
        while edge:
            i, j = edge.pop()
            blob.add((i, j))
            near = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            edge += near
        found.append(blob)
    return found


DEFECTS = (
    "ellipse",
    "pentagon",
    "ring",
    "arc",
    "bitten rectangle",
    "four or five shapes",
    "empty",
)


# PICTURES=500 python -m pytest -k "defect or real_pictures" -rP    gives the README's table
PICTURES = int(os.environ.get("PICTURES", "100"))


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_planted_defect_is_not_clean(kind):
    """Catches: a score that is too kind. At most 5 % may pass."""
    rng = np.random.default_rng(4)
    share = clean_share(np.stack([defect(kind, rng) for _ in range(PICTURES)]))
    print(f"{kind}: {share:.1%} of {PICTURES} clean")
    assert share <= 0.05


def test_real_pictures_are_clean_noise_and_flipped_pixels_are_not():
    """Catches: a score that is too strict, or blind. Also its speed: 500 pictures in 60 s."""
    real, rng = shapes.make_dataset(500, seed=99), np.random.default_rng(0)
    start = time.perf_counter()
    shares = [clean_share(real)]
    seconds = time.perf_counter() - start
    shares.append(clean_share(real ^ (rng.random(real.shape) < 0.01)))
    shares.append(shapes.score(noise(PICTURES, 1, 32, 32).clamp(-1, 1))["clean"])
    print("real {:.1%}, flipped {:.1%}, noise {:.1%}".format(*shares))
    print(f"{seconds:.1f} s for 500 real pictures")
    assert shares[0] >= 0.99 and shares[1] <= 0.05 and shares[2] == 0 and seconds < 60


def test_explain_gives_back_what_was_drawn():
    """Catches: a wrong guess, a move that is not tried, parameters in the wrong order."""
    pictures, kinds, _ = shapes.make_scenes(600, seed=41)
    found, numbers, differ = shapes.explain_all(pictures)
    assert (differ == 0).mean() > 0.99
    exact = differ == 0
    assert np.array_equal(
        shapes.draw(found, numbers)[exact], pictures[exact].astype(bool)
    )
    assert np.mean(np.sort(found, 1) == np.sort(kinds, 1)) > 0.99
    for k, kind in enumerate(shapes.KINDS):
        integers = numbers[found == k][:, : len(shapes.PARAMETERS[kind])]
        assert shapes.is_legal(kind, integers).all()
    (shape,), pixels = shapes.explain(shapes.circle(9, 12, 5))
    assert shape == ("circle", (9, 12, 5)) and pixels == 0


def test_small_blemishes_are_counted_pixel_by_pixel():
    """Catches: a tolerance that is not what it says."""
    for wrong in (1, 3, 4, 5, 8):
        picture = shapes.rectangle(4, 4, 15, 15) | shapes.circle(24, 24, 5)
        picture[20 : 20 + wrong, 1] = True  # a stroke in an empty corner
        assert shapes.explain(picture)[1] == wrong
        assert clean_share(picture[None]) == (wrong <= shapes.TOLERANCE)


def test_the_score_counts():
    """Catches: shares of the wrong whole, copies that are missed, kinds mixed up."""
    pictures, kinds, _ = shapes.make_scenes(80, seed=7)
    x = np.concatenate([shapes.to_model(pictures), shapes.to_model(pictures[:20])])
    x[-10:] = noise(10, 1, 32, 32).clamp(-1, 1)
    s = shapes.score(x, training=pictures[40:])
    both = np.concatenate([kinds, kinds[:10]])
    assert s["clean"] == pytest.approx(0.9)
    assert s["kinds"].tolist() == np.bincount(both[both >= 0], minlength=4).tolist()
    assert (
        s["shapes"].tolist()
        == np.bincount((both >= 0).sum(1), minlength=4)[1:].tolist()
    )
    assert s["copies"] == pytest.approx(0.4) and s["distinct"] == pytest.approx(0.9)
    assert 0.9 < s["decided"] < 0.96
    lines = shapes.score_table({"a": s, "b": s}).splitlines()
    assert len(lines) == 3 and "90.0%" in lines[1] and "40.0%" in lines[1]


def test_bad_input_to_the_score():
    good = shapes.to_model(shapes.make_dataset(2, seed=0))
    for bad, word in [
        (good[:, 0], "expected pictures"),
        (good[:, :, :31], "expected pictures"),
        (good[:0], "expected pictures"),
        (good * 255, "in \\[-1, 1\\]"),
        (good * np.nan, "finite"),
    ]:
        with pytest.raises(ValueError, match=word):
            shapes.score(bad)
    for bad in (good[0, 0], np.zeros((31, 32)), np.full((32, 32), np.nan)):
        with pytest.raises(ValueError, match="expected a picture"):
            shapes.explain(bad)


# --- Schedule and forward process ------------------------------------------------------


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
        assert SCHEDULE.one_minus_alpha_bar[t].item() == pytest.approx(
            1 - product, rel=1e-6
        )
    assert T == 1000 and product < 1e-4
    assert all(
        getattr(SCHEDULE, name).dtype == torch.float32 for name in vars(SCHEDULE)
    )
    assert (SCHEDULE.snr().diff() < 0).all() and len(SCHEDULE.snr()) == T


def test_one_jump_equals_a_thousand_steps():
    """Catches: a wrong q(x_t | x_0). Eq. 2 is applied step by step, Eq. 4 is not used."""
    mean, variance = 1.0, 0.0  # of x_t for x_0 = 1, by the rules for sums of Gaussians
    x, generator = torch.full((20_000,), 0.7), torch.Generator().manual_seed(0)
    for t in range(1, T + 1):
        beta = 1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(
            x.shape, generator=generator
        )
        one, at = torch.ones(1, 1, 1, 1), torch.tensor([t])
        assert ddpm.q_sample(SCHEDULE, one, at, 0 * one).item() == pytest.approx(
            mean, rel=1e-5
        )
        std = ddpm.q_sample(SCHEDULE, 0 * one, at, one).item()
        assert std == pytest.approx(math.sqrt(variance), rel=1e-5)
        if t in (1, 10, 300, T):  # and once with real noise
            jump = ddpm.q_sample(
                SCHEDULE, 0.7 * one, at, noise(20_000, 1, 1, 1, seed=t)
            )
            assert x.mean().item() == pytest.approx(jump.mean().item(), abs=0.03)
            assert x.std().item() == pytest.approx(jump.std().item(), rel=0.03)


def test_x_0_and_eps_give_each_other():
    """Catches: a lost square root, t that is not used per picture."""
    x_0, eps, t = (
        noise(5, 1, 32, 32),
        noise(5, 1, 32, 32, seed=1),
        torch.tensor([1, 9, 300, 700, T]),
    )
    x_t = ddpm.q_sample(SCHEDULE, x_0, t, eps)
    assert torch.allclose(ddpm.predict_x_0(SCHEDULE, x_t, t, eps), x_0, atol=2e-3)
    each = [
        ddpm.q_sample(SCHEDULE, x_0[i : i + 1], t[i : i + 1], eps[i : i + 1])
        for i in range(5)
    ]
    assert torch.allclose(torch.cat(each), x_t)


# --- The network -----------------------------------------------------------------------


def test_time_embedding():
    """Catches: two t that look the same, degrees of the wrong size."""
    e = ddpm.time_embedding(torch.arange(T + 1), 128)
    assert e.shape == (T + 1, 128) and e.abs().max() <= 1
    assert torch.cdist(e, e).fill_diagonal_(9).min() > 0.1
    for i in (0, 7, 63):
        assert e[500, i].item() == pytest.approx(
            math.sin(500 / 10_000 ** (i / 64)), abs=1e-4
        )
        assert e[500, 64 + i].item() == pytest.approx(
            math.cos(500 / 10_000 ** (i / 64)), abs=1e-4
        )


@pytest.mark.parametrize(
    "channels, width, side", [(64, 64, 16), (96, 64, 4), (16, 16, 32)]
)
def test_attention_against_a_naive_loop(channels, width, side):
    """Catches: softmax over the wrong axis, a missing 1/sqrt(d), mixed up heads or pixels."""
    attention = awake(ddpm.Attention(channels, width))
    x = noise(2, channels, side, side)
    got = attention(x)
    y = torch.nn.functional.group_norm(
        x, channels // 8, attention.norm.weight, attention.norm.bias
    )
    block = max(1, side // 8)
    grid = [(i, j) for i in range(0, side, block) for j in range(0, side, block)]
    pooled = torch.stack(
        [y[:, :, i : i + block, j : j + block].mean((2, 3)) for i, j in grid], 1
    )
    w, b = attention.key_value.weight, attention.key_value.bias
    keys, values = (
        pooled @ w[:width].T + b[:width],
        pooled @ w[width:].T + b[width:],
    )
    assert attention.heads == max(1, width // 32)
    d = width // attention.heads
    for i, j in [(0, 0), (1, 3), (side - 1, 0), (side - 1, side - 1)]:
        query = y[:, :, i, j] @ attention.query.weight.T + attention.query.bias
        parts = []
        for h in range(attention.heads):
            s = slice(h * d, (h + 1) * d)
            scores = torch.stack(
                [(query[:, s] * keys[:, m, s]).sum(1) for m in range(len(grid))], 1
            )
            weights = (scores / math.sqrt(d)).exp()
            weights = weights / weights.sum(1, keepdim=True)
            parts.append(
                sum(weights[:, m, None] * values[:, m, s] for m in range(len(grid)))
            )
        want = (
            x[:, :, i, j]
            + torch.cat(parts, 1) @ attention.out.weight.T
            + attention.out.bias
        )
        assert torch.allclose(got[:, :, i, j], want, atol=1e-4)


def test_the_network_as_described():
    """Catches: a level without attention, a block without time, a bottleneck that shrank."""
    model, seen = ddpm.UNet(), {"attention": set(), "channels": {}}
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    assert sum(row[3] for row in ddpm.stages(model)) == sum(
        p.numel() for p in model.parameters()
    )
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
    assert not list(model.buffers()), (
        "what is not a weight must not be saved or averaged"
    )


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
    below, skip = noise(1, 512, 4, 4), noise(1, 96, 8, 8, seed=1)
    a, b = (model.up[0](below, s, noise(1, 128)) for s in (skip, -skip))
    assert (a - b).abs().min() > 0, "what is joined is not the skip"


def test_a_new_network_says_nothing_and_its_blocks_pass_on_their_input():
    """Catches: a last layer that does not start at 0, a residual sum that is missing."""
    model, x = ddpm.UNet(), noise(2, 1, 32, 32)
    assert model(x, torch.tensor([1, T])).abs().max() == 0
    time_vector, h = noise(2, 128), noise(2, 32, 8, 8)
    assert torch.equal(ddpm.ResBlock(32, 32, 128)(h, time_vector), h)
    assert torch.equal(ddpm.Attention(32, 32)(h), h)


def test_pictures_of_a_batch_do_not_see_each_other():
    """Catches: BatchNorm, attention across the batch, a view that mixes up axes."""
    model, x, t = awake(ddpm.UNet()), noise(3, 1, 32, 32), torch.tensor([1, 500, T])
    with torch.no_grad():
        together = model(x, t)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)


# --- Reverse process -------------------------------------------------------------------


def any_model(x, t):
    """A network that is quick and right about nothing: depends on x, neighbours and t."""
    return x.tanh() + 0.3 * x.roll(1, 3) + (t / 300).sin()[:, None, None, None]


def test_eq_11_is_eq_7_with_the_predicted_x_0():
    """Catches: a wrong coefficient in Algorithm 2, alpha for alpha_bar, noise at the end."""
    a_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
    x_t, eps, z = (
        noise(1, 1, 4, 4),
        noise(1, 1, 4, 4, seed=1),
        noise(1, 1, 4, 4, seed=2),
    )
    for t in range(1, T + 1):
        beta, now = 1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1), a_bar[t - 1]
        before = a_bar[t - 2] if t > 1 else 1.0
        x_0 = (x_t.double() - math.sqrt(1 - now) * eps.double()) / math.sqrt(now)
        mean = math.sqrt(before) * beta / (1 - now) * x_0
        mean += math.sqrt(1 - beta) * (1 - before) / (1 - now) * x_t.double()
        std = math.sqrt((1 - before) / (1 - now) * beta)
        got = ddpm.ddpm_step(SCHEDULE, x_t, t, eps, 0 * z)
        assert torch.allclose(got.double(), mean, atol=1e-4), t
        got = ddpm.ddpm_step(SCHEDULE, x_t, t, eps, z)
        assert torch.allclose(got.double(), mean + std * z.double(), atol=1e-4), t
        if t == 1:
            assert std == 0 and torch.equal(
                got, ddpm.ddpm_step(SCHEDULE, x_t, 1, eps, 100 * z)
            )


def test_ddim_at_eta_1_is_algorithm_2():
    """Catches: a wrong sigma, a missing square root, the wrong alpha_bar in DDIM."""
    x_t, eps, z = (
        noise(2, 1, 8, 8),
        noise(2, 1, 8, 8, seed=1),
        noise(2, 1, 8, 8, seed=2),
    )
    for t in range(1, T + 1):
        one = ddpm.ddpm_step(SCHEDULE, x_t, t, eps, z)
        two = ddpm.ddim_step(SCHEDULE, x_t, t, t - 1, eps, z, eta=1)
        assert torch.allclose(one, two, atol=2e-4), t
    x_T = noise(2, 1, 32, 32)
    one, two = (
        ddpm.sample(any_model, SCHEDULE, x_T, T, eta, torch.Generator().manual_seed(3))
        for eta in (None, 1)
    )
    assert torch.allclose(one, two, atol=1e-2) and not torch.equal(one, x_T)


def test_ddim_without_noise_lands_where_q_puts_it():
    """Catches: DDIM's step landing on the wrong alpha_bar."""
    x_0, eps = noise(1, 1, 8, 8), noise(1, 1, 8, 8, seed=1)
    for t, s in [(T, 500), (500, 499), (300, 1), (1, 0), (T, 0)]:
        x_t = ddpm.q_sample(SCHEDULE, x_0, torch.tensor([t]), eps)
        x_s = ddpm.q_sample(SCHEDULE, x_0, torch.tensor([s]), eps)
        assert torch.allclose(
            ddpm.ddim_step(SCHEDULE, x_t, t, s, eps, 0, eta=0), x_s, atol=1e-2
        )


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_variance_that_eq_4_wants(eta):
    """Catches: eta for eta squared, sigma that is added but not taken from the rest."""
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
    x_t, eps = noise(1, 1, 8, 8), noise(1, 1, 8, 8, seed=1)
    for t, s in [(T, 500), (500, 499), (300, 20), (20, 1)]:
        # With z = 1 less z = 0 only sigma is left: DDIM, Eq. 16.
        plain, noisy = (
            ddpm.ddim_step(SCHEDULE, x_t, t, s, eps, z, eta) for z in (0, 1)
        )
        sigma = eta * math.sqrt((1 - a[s - 1]) / (1 - a[t - 1]))
        sigma *= math.sqrt(1 - a[t - 1] / a[s - 1])
        assert torch.allclose(noisy - plain, torch.tensor(sigma).float(), atol=1e-4)
        # With x_t = eps the guess of x_0 is known, and what is left is the middle term.
        x_0 = (1 - math.sqrt(1 - a[t - 1])) / math.sqrt(a[t - 1])
        rest = math.sqrt(1 - a[s - 1] - sigma**2)
        got = ddpm.ddim_step(SCHEDULE, eps, t, s, eps, 0, eta)
        want = (math.sqrt(a[s - 1]) * x_0 + rest) * eps
        assert torch.allclose(got, want, atol=1e-3), (t, s)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50, 999, 1000])
def test_both_ends_of_the_schedule_are_visited(steps):
    """Catches: sampling that starts below T or never reaches t = 1, repeated steps."""
    times = ddpm.timesteps(steps)
    assert times[0] == T and times[-1] == 0 and len(times) == steps + 1
    assert all(a > b for a, b in itertools.pairwise(times))
    assert steps == 1 or times[-2] == 1
    assert steps < T or times == list(range(T, -1, -1))


def test_steps_out_of_range():
    for steps in (0, -1, T + 1):
        with pytest.raises(ValueError, match="steps must be between 1 and 1000"):
            ddpm.timesteps(steps)


@pytest.mark.parametrize("steps", [T, 100])
def test_the_perfect_network_gives_the_distribution_back(steps):
    """Catches: nearly any mistake in the reverse process.

    Every pixel is +1 with probability 0.3 and else -1, and knows nothing of the others.
    Then the best network returns half the log of these odds everywhere (Bayes' rule on
    Eq. 4), and the sampler must find 30 % again, with values of +-1.
    """

    def best(x, t):
        return torch.full_like(x, 0.5 * math.log(0.3 / 0.7))

    x = ddpm.sample(
        best,
        SCHEDULE,
        noise(10, 1, 32, 32),
        steps,
        generator=torch.Generator().manual_seed(1),
    )
    assert (x > 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (x.abs() - 1).abs().max() < 0.05


def test_the_perfect_network_gives_a_spread_back():
    """Catches: a wrong sigma. The data is Gaussian, mean 0.1 and deviation 0.2."""

    def best(x, t):
        a, n = SCHEDULE.alpha_bar[t[0]], SCHEDULE.one_minus_alpha_bar[t[0]]
        x_0 = 0.1 + a.sqrt() * 0.2**2 / (a * 0.2**2 + n) * (x - a.sqrt() * 0.1)
        return torch.atanh(x_0) - a.sqrt() * x / n

    x = ddpm.sample(
        best, SCHEDULE, noise(10, 1, 32, 32), generator=torch.Generator().manual_seed(1)
    )
    assert x.mean().item() == pytest.approx(0.1, abs=0.005)
    assert x.std().item() == pytest.approx(0.2, rel=0.03)


def test_a_seed_means_the_same_picture():
    """Catches: noise that the generator does not control, a guess that does not fit x_t."""
    for steps, eta in [(T, None), (5, None), (5, 1.0)]:
        a, b, c = (
            ddpm.sample(
                any_model,
                SCHEDULE,
                noise(1, 1, 32, 32),
                steps,
                eta,
                torch.Generator().manual_seed(s),
            )
            for s in (1, 1, 2)
        )
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (steps == 5 and eta is None)
    walk = list(ddpm.reverse_process(any_model, SCHEDULE, noise(1, 1, 32, 32), 5))
    assert [t for t, _, _ in walk] == ddpm.timesteps(5)
    for t, x, x_0 in walk[:-1]:
        now = torch.tensor([t])
        eps = ddpm.eps_theta(any_model, SCHEDULE, x, now)
        assert torch.allclose(ddpm.q_sample(SCHEDULE, x_0, now, eps), x, atol=1e-3)
    assert torch.equal(walk[-1][1], walk[-1][2])


def test_the_guess_of_eps_against_bayes():
    """Catches: a lost root or factor between the network and eps; a loss that is not Eq. 14.

    A pixel that is +1 with probability p is asked for its mean, given x_t, by Bayes' rule
    with the two densities written out; the network's part in it is half the log odds of p.
    """
    x_0 = noise(4, 1, 32, 32).sign()
    eps, t = noise(4, 1, 32, 32, seed=1), torch.tensor([1, 20, 500, T])
    a = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, T)))[t - 1]
    a = a.view(-1, 1, 1, 1)
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    p = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(2)).double()
    plus = p.log() - (x_t - a.sqrt()) ** 2 / (2 * (1 - a))
    minus = (1 - p).log() - (x_t + a.sqrt()) ** 2 / (2 * (1 - a))
    mean = 2 * torch.softmax(torch.stack([plus, minus]), 0)[0] - 1
    want = (x_t - a.sqrt() * mean) / (1 - a).sqrt()
    seen = []

    def network(x_t, times):
        seen.append((x_t, times))
        return (0.5 * (p / (1 - p)).log()).float()

    got = ddpm.eps_theta(network, SCHEDULE, x_t.float(), t)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, atol=1e-3)
    loss = ddpm.loss_fn(network, SCHEDULE, x_0, t, eps).item()
    assert loss == pytest.approx((want - eps).square().mean().item(), rel=1e-3)
    for x, times in seen:
        assert torch.allclose(x, x_t.float(), atol=1e-5) and torch.equal(times, t)


def test_eps_theta_is_the_same_in_bfloat16_but_for_rounding(monkeypatch):
    """Catches: what must be exact (the schedule, x_0, eps) computed with 8 bits."""
    model, x_t, t = awake(ddpm.UNet()), noise(3, 1, 32, 32), torch.tensor([1, 300, T])
    with torch.no_grad():
        guesses = []
        for fast in (False, True):
            monkeypatch.setattr(ddpm, "fast_bfloat16", lambda device, fast=fast: fast)
            guesses.append(ddpm.eps_theta(model, SCHEDULE, x_t, t))
    assert guesses[0].dtype == guesses[1].dtype == torch.float32
    # t = 1 is left out: there an error of x_0 is 100 times as large in eps.
    assert torch.allclose(guesses[0][1:], guesses[1][1:], atol=0.1)
    assert not torch.equal(*guesses)


# --- Training --------------------------------------------------------------------------


def test_a_small_network_learns_a_few_pictures_by_heart():
    """Catches: a loss without a minimum at the noise, gradients that do not arrive."""
    torch.manual_seed(0)
    model = ddpm.UNet((8, 16, 16), 32, 16, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    x_0 = torch.from_numpy(shapes.to_model(shapes.make_dataset(4, seed=0)))
    t, eps = torch.tensor([50, 200, 400, 700]), noise(4, 1, 32, 32)
    first = ddpm.loss_fn(model, SCHEDULE, x_0, t, eps).item()
    for _ in range(150):
        loss = ddpm.loss_fn(model, SCHEDULE, x_0, t, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first


def test_training_visits_every_t_from_1_to_T(monkeypatch):
    """Catches: t drawn from 0..T-1 or 1..T-1: sampling would start where nobody trained."""
    seen = []
    monkeypatch.setattr(
        ddpm,
        "loss_fn",
        lambda m, s, x, t, e: seen.append(t) or sum(p.sum() for p in m.parameters()),
    )
    model = torch.nn.Linear(1, 1)
    groups = [{"params": list(model.parameters()), "scale": 1.0}]
    optimizers, ema = [torch.optim.SGD(groups, lr=0.0)], ddpm.EMA(model)
    for step in range(1, 11):
        train.train_step(
            model,
            ema,
            optimizers,
            SCHEDULE,
            torch.zeros(4000, 1, 1, 1),
            torch.Generator().manual_seed(step),
            step,
            0.0,
        )
    t = torch.cat(seen)
    assert set(t.tolist()) == set(range(1, T + 1))
    assert torch.bincount(t)[1:].float().std() < 3 * math.sqrt(40)


def stretched(x):
    """What Muon makes of a matrix, by its singular values: float64 in, float64 out."""
    u, lengths, v = torch.linalg.svd(x, full_matrices=False)
    lengths = lengths / lengths.norm()
    for _ in range(3):
        lengths = 3.4445 * lengths - 4.775 * lengths**3 + 2.0315 * lengths**5
    return u * lengths @ v


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 6, 3, 3), (9, 5), (5, 9)])
def test_train_step_is_muon_and_adam_by_hand(shape, monkeypatch):
    """Catches: gradients that add up, no clipping, no warm-up, a rate of the wrong kind,

    a tall matrix taken for a wide one. A matrix, a vector, and a loss with known gradient.
    """
    monkeypatch.setattr(ddpm, "fast_bfloat16", lambda device: False)
    model = torch.nn.Module()
    model.matrix = torch.nn.Parameter(2 * noise(*shape, seed=2))
    model.vector = torch.nn.Parameter(2 * noise(1, 8, seed=3))
    weights = [p.detach().double().clone() for p in model.parameters()]
    slopes = [noise(*shape).double(), noise(1, 8, seed=1).double()]
    monkeypatch.setattr(ddpm, "UNet", lambda: model)
    args = train.parse(["--lr", "1e-3"])
    _, ema, optimizers, generator = train.new_run(args, torch.device("cpu"))
    # The loss is 0.5 sum slope w^2, so that its gradient changes from step to step.
    monkeypatch.setattr(
        ddpm,
        "loss_fn",
        lambda *a: sum(
            (s.float() * p**2).sum() / 2 for s, p in zip(slopes, model.parameters())
        ),
    )
    average, first, second = 0 * weights[0], 0 * weights[1], 0 * weights[1]
    averages = [w.clone() for w in weights]
    c_out, c_in = shape[:2]
    for count, step in enumerate((1, 2, 3, 4, 5, 90, 150, 4000), start=1):
        gradients = [s * w for s, w in zip(slopes, weights)]
        length = math.sqrt(sum((g**2).sum().item() for g in gradients))
        matrix, vector = (g * min(1.0, 1 / (length + 1e-6)) for g in gradients)
        rate = 1e-3 * min(1, step / 100, math.sqrt(1000 / step))
        average = 0.95 * average + 0.05 * matrix
        x = 0.95 * average + 0.05 * matrix
        if c_out > c_in:
            x = x.transpose(0, 1)
        x = stretched(x.reshape(len(x), -1)).view(x.shape)
        if c_out > c_in:
            x = x.transpose(0, 1) * math.sqrt(c_out / c_in)
        weights[0] = weights[0] - 40 * rate * x
        first = 0.9 * first + 0.1 * vector
        second = 0.99 * second + 0.01 * vector**2
        mean = first / (1 - 0.9**count)
        spread = (second / (1 - 0.99**count)).sqrt()
        weights[1] = weights[1] - 8 * rate * mean / (spread + 1e-8)
        decay = min(0.9995, (1 + step) / (10 + step))
        averages = [decay * a + (1 - decay) * w for a, w in zip(averages, weights)]
        x_0 = torch.zeros(4, 1, 1, 1)
        train.train_step(model, ema, optimizers, SCHEDULE, x_0, generator, step, 1e-3)
        got = [*model.parameters(), *ema.model.parameters()]
        for p, w in zip(got, weights + averages):
            assert torch.allclose(p.double(), w, rtol=1e-3, atol=1e-4), step


def test_muon_gets_the_matrices_and_adam_the_rest():
    """Catches: a weight in no group or in two; the first or last layer taken for a matrix."""
    model = ddpm.UNet()
    muon, adam = train.optimizers_for(model, 2e-4)
    assert isinstance(muon, train.Muon) and isinstance(adam, torch.optim.Adam)
    groups = [o.param_groups[0]["params"] for o in (muon, adam)]
    names = [
        {n for n, p in model.named_parameters() for q in g if p is q} for g in groups
    ]
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == {n for n, _ in model.named_parameters()}
    weights = {n for n, p in model.named_parameters() if p.ndim > 1}
    assert names[0] == weights - {"stem.weight", "out.weight"}


@pytest.mark.parametrize("fast", [False, True])
def test_orthogonal_makes_all_lengths_about_one(fast, monkeypatch):
    """Catches: a wrong coefficient, too few rounds, a precision that does not do."""
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
    x = train.mirror(picture.expand(4000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert x.shape == (4000, 1, 32, 32)
    for y in x:
        eight[y.contiguous().numpy().tobytes()] += 1
    assert len(eight) == 8 and all(400 < n < 600 for n in eight.values())


def test_a_mirrored_picture_is_still_one_of_shapes():
    """Catches: a drawing rule that favours a side.

    A few lines and triangles, one in a hundred pictures, differ from their mirror image by
    pixels that lie just on the edge.
    """
    x = torch.from_numpy(shapes.to_model(shapes.make_dataset(500, seed=4)))
    x = train.mirror(x, torch.Generator().manual_seed(0))
    kinds, _, differ = shapes.explain_all(x[:, 0] > 0)
    assert (differ == 0).mean() > 0.98
    assert shapes.is_clean(kinds, differ).mean() > 0.99


def test_ema_by_hand_and_the_schedule_is_left_alone():
    """Catches: an average without warm-up, of buffers, or one that never moves."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema, average = ddpm.EMA(model, decay=0.9), 1.0
    for step in range(1, 200):
        model.weight.data.fill_(float(step))
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * step
        assert ema.model.weight.item() == pytest.approx(average, rel=1e-4)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not isinstance(SCHEDULE, torch.nn.Module)


def run_train(monkeypatch, folder, *flags):
    """train.py in this process, with a tiny network; returns the state it left behind."""
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--samples",
            "64",
            "--batch-size",
            "16",
            "--lr",
            "1e-3",
            "--device",
            "cpu",
            *flags,
            "--checkpoints",
            str(folder),
            "--logs",
            str(folder / "logs"),
        ],
    )
    if "--resume" in flags:
        del sys.argv[1:7]
    train.main()
    return torch.load(folder / "latest.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


LEARNED = ("model", "ema", "optimizers", "generator", "epoch", "step")


def test_two_epochs_and_two_more_are_four(tiny, monkeypatch, tmp_path):
    """Catches: random state, optimizer or EMA not restored, data replayed, a skipped epoch."""
    whole = run_train(monkeypatch, tmp_path / "a", "--epochs", "4")
    run_train(monkeypatch, tmp_path / "b", "--epochs", "2")
    parts = run_train(monkeypatch, tmp_path / "b", "--resume", "--epochs", "4")
    other = run_train(monkeypatch, tmp_path / "c", "--epochs", "4", "--seed", "1")
    for key in LEARNED:
        assert same(whole[key], parts[key]), key
    losses = [
        [(r["train_loss"], r["val_loss"]) for r in s["history"]] for s in (whole, parts)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert not same(whole["model"], other["model"])
    assert not same(whole["model"], whole["ema"])


def test_each_epoch_shuffles_anew(tiny, monkeypatch, tmp_path):
    """Catches: data that is not reshuffled, or pictures used twice in an epoch."""
    batches = []
    original = train.train_step
    monkeypatch.setattr(train, "seconds_per_step", lambda *a: 1.0)
    monkeypatch.setattr(train, "mirror", lambda x_0, generator: x_0)

    def spy(model, ema, optimizers, schedule, x_0, *rest):
        batches.append(x_0.clone())
        return original(model, ema, optimizers, schedule, x_0, *rest)

    monkeypatch.setattr(train, "train_step", spy)
    run_train(monkeypatch, tmp_path, "--epochs", "2")
    first, second = torch.cat(batches[:4]), torch.cat(batches[4:])
    data = torch.from_numpy(shapes.to_model(shapes.make_dataset(64, seed=0)))
    assert not torch.equal(first, second) and not torch.equal(first, data)
    keys = [sorted(p.numpy().tobytes() for p in x) for x in (first, second, data)]
    assert keys[0] == keys[1] == keys[2]


def test_best_is_the_epoch_with_the_lowest_validation_loss(tiny, monkeypatch, tmp_path):
    """Catches: best saved as latest; a validation loss of the wrong weights."""
    losses = iter([0.5, 0.2, 0.9, 0.3])
    monkeypatch.setattr(train, "validation_loss", lambda *a: next(losses))
    latest = run_train(monkeypatch, tmp_path, "--epochs", "4")
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["epoch"] == 2 and latest["epoch"] == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_validation_is_of_the_ema_weights_and_repeatable(tiny, monkeypatch, tmp_path):
    """Catches: fresh noise in every validation, held-out pictures that were trained on."""
    state = run_train(monkeypatch, tmp_path, "--epochs", "1")
    model = ddpm.UNet(**state["config"])
    model.load_state_dict(state["ema"])
    held_out = torch.from_numpy(
        shapes.to_model(shapes.make_dataset(train.HELD_OUT, seed=[0, 1]))
    )
    losses = {train.validation_loss(model, SCHEDULE, held_out) for _ in range(2)}
    assert losses == {state["history"][0]["val_loss"]}


def test_a_loss_that_is_not_finite_is_never_saved(tiny, monkeypatch, tmp_path, capsys):
    """Catches: NaN weights in a checkpoint."""
    before = run_train(monkeypatch, tmp_path, "--epochs", "1")
    monkeypatch.setattr(
        ddpm,
        "loss_fn",
        lambda m, s, x, t, e: sum(p.sum() for p in m.parameters()) * math.nan,
    )
    with pytest.raises(SystemExit, match="not finite"):
        run_train(monkeypatch, tmp_path, "--resume", "--epochs", "2")
    assert same(before, torch.load(tmp_path / "latest.pt", weights_only=True))


def test_a_new_run_moves_an_old_one_aside(tiny, monkeypatch, tmp_path):
    """Catches: a forgotten --resume that destroys an hour of training."""
    old = run_train(monkeypatch, tmp_path, "--epochs", "1")
    run_train(monkeypatch, tmp_path, "--epochs", "1", "--seed", "1")
    (aside,) = tmp_path.glob("run_*")
    assert same(old, torch.load(aside / "latest.pt", weights_only=True))


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    """Catches: writing in place, temporary files left behind. The disk holds 100,000 bytes."""
    path = tmp_path / "latest.pt"
    train.save_checkpoint(path, {"a": 1})
    code = f"""
import resource, signal, sys, torch, train, pathlib
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    train.save_checkpoint(pathlib.Path({str(path)!r}), {{"a": torch.zeros(100_000)}})
except OSError:
    sys.exit(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, check=False, timeout=100
    )
    assert done.returncode == 7
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["latest.pt"]


@pytest.mark.parametrize(
    "what",
    [
        "run",
        "history",
        "muon",
        "adam",
        "forgotten",
        "settings",
        "one",
        "generator",
        "model",
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_says_so(what, tiny, monkeypatch, tmp_path):
    """Catches: a traceback, or worse: an optimizer that reads beyond its tensors."""
    state = run_train(monkeypatch, tmp_path, "--epochs", "1")
    if what == "run":
        state["run"]["batch_size"] = 0
    elif what == "history":
        state["history"] = [{"epoch": 1}]
    elif what == "muon":
        for average in state["optimizers"][0]["state"].values():
            average["average"] = torch.zeros(1)
    elif what == "adam":
        for average in state["optimizers"][1]["state"].values():
            average["exp_avg"] = torch.zeros(1)
    elif what == "forgotten":
        state["optimizers"][0]["state"].clear()
    elif what == "settings":
        state["optimizers"][0]["param_groups"][0].pop("scale")
    elif what == "one":
        state["optimizers"].pop()
    elif what == "generator":
        state["generator"] = torch.zeros(3)
    else:
        state["model"].popitem()
    torch.save(state, tmp_path / "latest.pt")
    before = (tmp_path / "latest.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run_train(monkeypatch, tmp_path, "--resume", "--epochs", "2")
    message = str(stop.value.code)
    assert (
        message.startswith("error: ") and "latest.pt" in message and "\n" not in message
    )
    assert (tmp_path / "latest.pt").read_bytes() == before


# --- The scripts, as a user runs them --------------------------------------------------


def script(*words, cwd, check=True):
    """Runs a script in a folder of its own; returns the finished process."""
    environment = dict(os.environ, PYTHONPATH=str(HERE))
    command = [sys.executable, str(HERE / words[0]), *map(str, words[1:])]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which train.py has run for an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    out = script(
        "train.py", "--epochs", 1, "--samples", 128, "--device", "cpu", cwd=folder
    ).stdout
    assert "device cpu" in out and "minutes" in out and "validation" in out
    return folder


def test_training_leaves_what_it_promises(trained):
    """Catches: a missing file; a checkpoint from which nobody can sample or resume."""
    names = {p.name for p in (trained / "checkpoints").iterdir()}
    assert names == {"latest.pt", "best.pt", "loss.png", "samples_0001.png"}
    assert list((trained / "logs").glob("*/events.out.tfevents.*"))
    state = torch.load(trained / "checkpoints/latest.pt", weights_only=True)
    assert set(LEARNED) | {"format", "config", "run", "name", "history"} == set(state)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (trained / "logs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    assert (
        len(events.Scalars("loss/train")) == 2
        and len(events.Scalars("loss/validation")) == 1
    )
    assert len(events.Images("samples")) == 1


def test_sampling_from_the_command_line(trained, monkeypatch, capsys):
    """Catches: a seed that is not used, missing files, raw weights in place of the EMA."""

    def run(*flags):
        monkeypatch.setattr(
            sys, "argv", ["sample.py", "--device", "cpu", *map(str, flags)]
        )
        sample.main()

    monkeypatch.chdir(trained)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--n", 3, "--steps", 3, "--seed", seed, "--output", f"{name}.png")
    a, b, c = ((trained / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    capsys.readouterr()
    run("--score", "--explain", "--n", 8, "--steps", 2)
    out = capsys.readouterr().out
    for row in (
        "these samples",
        "held-out real pictures",
        "an untrained network",
        "pure noise",
    ):
        assert row in out
    assert (trained / "explained.png").exists()
    run("--inside")
    assert (trained / "inside.png").read_bytes()[:4] == b"\x89PNG"
    state, model = train.load_checkpoint(trained / "checkpoints/best.pt")
    assert same(dict(model.state_dict()), state["ema"])
    # And once as a process of its own.
    out = script(
        "sample.py", "--show-process", "--n", 2, "--steps", 5, cwd=trained
    ).stdout
    assert "pictures per second" in out
    assert (trained / "process.png").read_bytes()[:4] == b"\x89PNG"
    assert (trained / "process.gif").read_bytes()[:4] == b"GIF8"


def test_attention_is_drawn_as_the_network_computes_it():
    """Catches: weights over the wrong axis, queries taken for keys, a wrong scale."""
    torch.manual_seed(0)
    attention = ddpm.Attention(16, 16).requires_grad_(False)
    torch.nn.init.normal_(attention.out.weight)
    seen, x = {}, noise(1, 16, 16, 16)
    for layer in (attention.query, attention.key_value):
        layer.register_forward_hook(lambda m, _, y: seen.__setitem__(m, y))
    y = attention(x) - x
    weights = sample.attention_weights(attention, seen)
    assert weights.shape == (256, 64)
    assert torch.allclose(weights.sum(1), torch.ones(256))
    values = seen[attention.key_value][0, :, 16:]  # (64, 16), one head
    again = attention.out(weights @ values)  # (256, 16)
    assert torch.allclose(y[0].flatten(1).T, again, atol=1e-5)


def test_the_other_scripts_run(trained):
    """Catches: a picture that is not saved, a table that does not add up."""
    assert "total" in script("ddpm.py", cwd=trained).stdout
    script("shapes.py", "--n", 9, cwd=trained)
    assert (trained / "forward.png").exists() and (trained / "shapes.png").exists()


@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM"])
def test_ctrl_c_keeps_the_last_epoch_and_says_how_to_go_on(
    which, tmp_path, monkeypatch
):
    """Catches: a traceback on Ctrl-C, a checkpoint that is lost or cannot be resumed."""
    flags = ["--samples", "64", "--epochs", "99", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "train.py"), *flags],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    latest, deadline = tmp_path / "checkpoints/latest.pt", time.time() + 120
    try:
        while not latest.exists() and time.time() < deadline:
            time.sleep(0.2)
        process.send_signal(getattr(signal, which))
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    (line,) = [x for x in out.splitlines() if "To go on: " in x]
    words = line.split("To go on: ")[1].split()
    assert " ".join(words) == "python train.py --resume --epochs 99 --device cpu"
    done = torch.load(latest, weights_only=True)["epoch"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "GRID", 2)
    monkeypatch.setattr(train, "GRID_STEPS", 2)
    monkeypatch.setattr(
        sys, "argv", [*words[1:3], "--epochs", str(done + 1), "--device", "cpu"]
    )
    train.main()
    assert torch.load(latest, weights_only=True)["epoch"] == done + 1


# KILLS=100 python -m pytest -k killed -rP    kills a hundred times
KILLS = int(os.environ.get("KILLS", "4"))

KILLER = """
import os, random, signal, sys, time
import torch.utils.tensorboard  # now, so that a child need not
import ddpm, train
from pathlib import Path

ddpm.UNet.__init__.__defaults__ = ((8, 8, 8), 16, 8, 16)
train.HELD_OUT, train.GRID, train.GRID_STEPS, train.SAMPLE_EVERY = 16, 1, 1, 10**6
torch.set_num_threads(1)
latest = Path("parts/latest.pt")

def start(folder, *flags):
    process = os.fork()
    if process == 0:
        sys.stdout = open(os.devnull, "w")
        sys.argv = ["train.py", *flags, "--checkpoints", folder, "--logs", "logs"]
        train.main()
        os._exit(0)
    return process

new = ["--samples=64", "--batch-size=16", "--device=cpu"]
assert os.waitpid(start("parts", "--epochs=1", *new), 0)[1] == 0
kills, lucky, in_a_save = int(sys.argv[1]), random.Random(0), 0
for kill in range(kills):
    child = start("parts", "--epochs=1000000", "--resume")
    if kill % 2:  # in the middle of a save, as soon as there is a half file
        end = time.time() + 60
        while not list(Path("parts").glob("*.tmp")) and time.time() < end:
            time.sleep(0.001)
    else:
        time.sleep(lucky.uniform(0.5, 2.5))
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    in_a_save += any(Path("parts").glob("*.tmp"))
    train.load_checkpoint(latest, resume=True)
    train.load_checkpoint(Path("parts/best.pt"), resume=True)
epochs = f"--epochs={torch.load(latest, weights_only=True)['epoch'] + 1}"
assert os.waitpid(start("parts", "--resume", epochs), 0)[1] == 0
assert os.waitpid(start("whole", epochs, *new), 0)[1] == 0
print(kills, "kills,", in_a_save, "in the middle of a save;", epochs)
assert in_a_save > 0
"""


def test_killed_at_any_moment_nothing_is_lost(tmp_path):
    """Catches: a checkpoint written in place, an epoch lost, done twice or not repeated."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(KILLS)],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(HERE)),
        capture_output=True,
        text=True,
        check=False,
        timeout=100 + 10 * KILLS,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    whole, parts = (
        torch.load(tmp_path / folder / "latest.pt", weights_only=True)
        for folder in ("whole", "parts")
    )
    for key in LEARNED:
        assert same(whole[key], parts[key]), key
    assert not list((tmp_path / "parts").glob("*.tmp"))


def test_a_full_disk_ends_training_with_one_line(tmp_path):
    """Catches: a traceback, a half checkpoint, a temporary file. A million bytes fit a file."""
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
sys.argv = ["train.py", "--epochs=1", "--samples=64", "--device=cpu"]
sys.path.insert(0, {str(HERE)!r})
import train
train.GRID = train.GRID_STEPS = 2
train.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "make room" in last
    assert not list(tmp_path.glob("checkpoints/*.pt"))
    assert not list(tmp_path.glob("checkpoints/*.tmp"))


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


SMALL = {"channels": (8, 8, 8), "bottleneck": 16, "narrow": 8, "time_dim": 16}


def whole_checkpoint():
    """A small checkpoint in which nothing is wrong."""
    model = ddpm.UNet(**SMALL)
    return {
        "format": train.FORMAT,
        "config": model.config,
        "run": {"epochs": 1, "samples": 1, "batch_size": 1, "lr": 1.0, "seed": 1},
        "epoch": 0,
        "step": 0,
        "name": "x",
        "model": model.state_dict(),
        "ema": model.state_dict(),
        "optimizers": [],
        "generator": torch.zeros(1),
        "history": [],
    }


def changed(**changes):
    """Writes a checkpoint in which some entries have been replaced."""
    return lambda path, state: torch.save({**state, **changes}, path)


def each_weight(change):
    """Writes a checkpoint in which every EMA weight has been replaced."""

    def write(path, state):
        weights = {name: change(p) for name, p in state["ema"].items()}
        torch.save({**state, "ema": weights}, path)

    return write


def truncated(share):
    """Writes only this share of a checkpoint's bytes."""

    def write(path, state):
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


def bomb(path, state):
    """A small file that says it is a large one."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("archive/data.pkl", bytes(10**7))


def huge_weights(path, state):
    """Weights of a huge network which are all the same number, stored once."""
    config = {**state["config"], "bottleneck": 2**14}
    with torch.device("meta"):
        shapes_of = ddpm.UNet(**config).state_dict()
    weights = {n: torch.zeros(()).expand(p.shape) for n, p in shapes_of.items()}
    torch.save({**state, "config": config, "ema": weights}, path)


def odd_time_vector():
    """A configuration that can be built but not used, and weights for it."""
    model = ddpm.UNet(**{**SMALL, "time_dim": 17})
    return {"config": model.config, "ema": model.state_dict()}


def one_epoch(**changes):
    """Writes a checkpoint of one epoch in which numbers have been replaced."""
    row = {"epoch": 1, "train_loss": 0.1, "val_loss": 0.1, "seconds": 1.0}
    return changed(epoch=1, history=[{**row, **changes}])


BROKEN = {
    "absent": lambda path, state: None,
    "empty": lambda path, state: path.write_bytes(b""),
    "text": lambda path, state: path.write_text("not a checkpoint"),
    "random bytes": lambda path, state: path.write_bytes(
        np.random.default_rng(0).bytes(5000)
    ),
    "folder": lambda path, state: path.mkdir(),
    "one byte": lambda path, state: path.write_bytes(b"P"),
    "truncated early": truncated(0.01),
    "truncated": truncated(0.5),
    "truncated late": truncated(0.999),
    "code": lambda path, state: torch.save(
        {**state, "name": Evil(path.with_name("it ran"))}, path
    ),
    "bomb": bomb,
    "only a format": lambda path, state: torch.save({"format": train.FORMAT}, path),
    "list": lambda path, state: torch.save([1, 2], path),
    "a tensor": lambda path, state: torch.save(torch.zeros(3), path),
    "older format": changed(format=train.FORMAT - 1),
    "newer format": changed(format=train.FORMAT + 1),
    "format in words": changed(format="two"),
    "nan": each_weight(lambda p: p * math.nan),
    "infinity": each_weight(lambda p: p + math.inf),
    "integers": each_weight(lambda p: p.long()),
    "words for weights": each_weight(lambda p: "heavy"),
    "transposed": each_weight(lambda p: p.transpose(0, -1)[None]),
    "other configuration": changed(config={**SMALL, "narrow": 16}),
    "huge network": changed(config={**SMALL, "bottleneck": 2**20}),
    "huge weights": huge_weights,
    "strange configuration": changed(config={"layers": "many"}),
    "negative channels": changed(config={**SMALL, "channels": (-8, 8, 8)}),
    "missing weight": lambda path, state: torch.save(
        {**state, "ema": dict(list(state["ema"].items())[1:])}, path
    ),
    "surplus weight": lambda path, state: torch.save(
        {**state, "ema": {**state["ema"], "more": torch.zeros(1)}}, path
    ),
    "wrong type": changed(history="none"),
    "epochs without history": changed(epoch=10**9),
    "history that says nothing": changed(epoch=1, history=[torch.zeros(3)]),
    "history of words": one_epoch(train_loss="low"),
    "history of a huge number": one_epoch(val_loss=10**400),
    "history not finite": one_epoch(val_loss=math.nan),
    "history of another epoch": one_epoch(epoch=2),
    "share of words": one_epoch(clean="much"),
    "a name that climbs": changed(name="../../x"),
    "odd time vector": lambda path, state: torch.save(
        {**state, **odd_time_vector()}, path
    ),
    "weights out of range": each_weight(lambda p: p + 1e38),
    "complex weights": each_weight(lambda p: p.to(torch.complex64)),
    "flags of another type": changed(
        run={"epochs": "1", "samples": 1, "batch_size": 1, "lr": 1.0, "seed": 1}
    ),
    "flags of text": changed(run={"epochs": "many"}),
    "flags out of range": changed(
        run={"epochs": 1, "samples": 1, "batch_size": 0, "lr": 1.0, "seed": 1}
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_gets_one_line(kind, tmp_path):
    """Catches: a traceback, code run from a file, weights loaded into the wrong network."""
    path = tmp_path / "broken.pt"
    BROKEN[kind](path, whole_checkpoint())
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(SystemExit) as stop:
        train.load_checkpoint(path, resume=True)
    message = str(stop.value.code)
    assert message.startswith("error: ") and "broken.pt" in message
    assert "\n" not in message
    assert not (tmp_path / "it ran").exists()
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_whole_checkpoint_loads_and_a_small_one_comes_from_it(tmp_path):
    """Catches: tests above that pass since nothing loads; an export that loses weights."""
    torch.save(whole_checkpoint(), tmp_path / "whole.pt")
    state, model = train.load_checkpoint(tmp_path / "whole.pt", resume=True)
    train.export_weights(tmp_path / "small.pt", state)
    _, half = train.load_checkpoint(tmp_path / "small.pt")
    for a, b in zip(model.parameters(), half.parameters()):
        assert b.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-3, atol=1e-6)
    with pytest.raises(SystemExit, match="incomplete"):
        train.load_checkpoint(tmp_path / "small.pt", resume=True)


def test_the_weights_that_come_along(tmp_path):
    """Catches: a missing or outgrown assets/pretrained.pt, or one that is used in silence."""
    assert sample.PRETRAINED.stat().st_size <= 8e6
    done = script("sample.py", "--export", "x.pt", cwd=tmp_path)
    assert "weights that came along" in done.stdout
    assert (tmp_path / "x.pt").stat().st_size <= 8e6
    state, model = train.load_checkpoint(sample.PRETRAINED)
    assert state["run"] == {f: train.parser().get_default(f) for f in train.RUN}
    assert model.config == ddpm.UNet().config
    # The guess of x_0 at t = 200 has hardly a wrong pixel; without a network it has 80.
    x_0 = torch.from_numpy(shapes.to_model(shapes.make_dataset(32, seed=[0, 3])))
    t, eps = torch.full((32,), 200), noise(32, 1, 32, 32)
    x_t = ddpm.q_sample(SCHEDULE, x_0, t, eps)
    with torch.no_grad():
        guess = ddpm.eps_theta(model, SCHEDULE, x_t, t)
    guess = ddpm.predict_x_0(SCHEDULE, x_t, t, guess)
    assert (guess.sign() != x_0).float().sum((1, 2, 3)).mean() < 4


BAD = [
    ("train.py", "--epochs", "0"),
    ("train.py", "--epochs", "ten"),
    ("train.py", "--samples", "0"),
    ("train.py", "--batch-size", "0"),
    ("train.py", "--samples", "10", "--batch-size", "64"),
    ("train.py", "--batch-size", "1e3"),
    ("train.py", "--lr", "0"),
    ("train.py", "--device", "tpu"),
    ("train.py", "--resume"),
    ("train.py", "--epoch-count", "3"),
    ("train.py", "--samples", "64", "--checkpoints", "a_file"),
    ("train.py", "--samples", "64", "--logs", "a_file/logs"),
    ("sample.py", "--steps", "1001"),
    ("sample.py", "--steps", "0"),
    ("sample.py", "--n", "0"),
    ("sample.py", "--process", "--n", "33"),
    ("sample.py", "--checkpoint", "nothing.pt"),
    ("sample.py", "--checkpoint", "a_file"),
    ("sample.py", "--output", "picture.docx"),
    ("sample.py", "--process", "--explain"),
    ("sample.py", "--curve", "--score"),
    ("sample.py", "--inside", "--score"),
    ("sample.py", "--inside", "--n", "2"),
    ("sample.py", "--export", "a_file"),
    ("sample.py", "--export", "a_file.pt"),
    ("sample.py", "--export", ""),
    ("sample.py", "--export", "a_file/x.pt"),
    ("shapes.py", "--n", "0"),
]


# Every flag that takes a number, with values that are none, or far out of range.
BAD += [
    (name, action.option_strings[0], value)
    for name, module in (("train.py", train), ("sample.py", sample))
    for action in module.parser()._actions
    if action.type is not None
    for value in (
        "-1",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "9" * 30,
        "",
        "many",
        "0x10",
        "1;2",
    )
]


@pytest.mark.parametrize("command", BAD, ids=" ".join)
def test_bad_input_gets_one_line_and_no_traceback(
    command, tmp_path, monkeypatch, capsys
):
    """Catches: a traceback for the user, exit code 0 after an error, files lost or made."""
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "a_file.pt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(command))
    module = {"train.py": train, "sample.py": sample, "shapes.py": shapes}[command[0]]
    with pytest.raises(SystemExit) as stop:
        module.main()
    error = capsys.readouterr().err.strip().splitlines()
    message = stop.value.code if isinstance(stop.value.code, str) else error[-1]
    assert stop.value.code not in (0, None)
    assert "error: " in message and "\n" not in message
    for name in ("a_file", "a_file.pt"):
        assert (tmp_path / name).read_text() == "mine"
    assert not list(tmp_path.glob("checkpoints/*"))


def test_an_error_leaves_the_process_with_one_line(tmp_path):
    """Catches: what the tests above cannot see, the process itself."""
    done = script("sample.py", "--checkpoint", "nothing.pt", cwd=tmp_path, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert (
        "nothing.pt" in done.stderr.strip().splitlines()[-1]
        and "Traceback" not in done.stderr
    )


# --- The cloud -------------------------------------------------------------------------


def test_modal_asks_for_an_a100_and_mounts_the_volume():
    """Catches: the wrong GPU, a volume of another name, a place that train.py does not use."""
    import modal_train

    spec = modal_train.train_in_cloud._spec_  # Modal has no public way to look at it
    assert spec.gpus == "A100"
    assert list(spec.volumes) == [modal_train.FOLDER]
    assert "diffusion-checkpoints" in repr(spec.volumes[modal_train.FOLDER])


def test_modal_flags_are_those_of_train():
    """Catches: a flag or a default that was changed in one place only."""
    import modal_train

    theirs = {
        n: p.default
        for n, p in inspect.signature(modal_train.main.info.raw_f).parameters.items()
    }
    ours = {a.dest: a.default for a in train.parser()._actions if a.dest != "help"}
    places = {"checkpoints", "logs"}  # the volume takes their place
    assert theirs == {
        flag: default for flag, default in ours.items() if flag not in places
    }


def test_modal_help_needs_no_account_and_no_torch(tmp_path):
    """Catches: an import of torch on a laptop that has only modal."""
    code = "import sys; sys.modules['torch'] = None; import modal_train"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, timeout=60)
    command = [
        sys.executable,
        "-m",
        "modal",
        "run",
        str(HERE / "modal_train.py"),
        "--help",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    for flag in (
        "--epochs",
        "--samples",
        "--batch-size",
        "--lr",
        "--resume",
        "--seed",
        "--device",
    ):
        assert flag in done.stdout


def test_modal_body_trains_and_goes_on_after_a_restart(tiny, tmp_path):
    """Catches: flags that do not arrive; a restart that begins again; a new run that resumes."""
    import modal_train

    flags = {"epochs": 2, "samples": 64, "batch_size": 16, "lr": 1e-3, "seed": 0}
    flags["device"] = "cpu"
    first = {**flags, "epochs": 1}
    modal_train.train_in_cloud.local(first, False, "one", str(tmp_path))
    modal_train.train_in_cloud.local(flags, False, "one", str(tmp_path))
    state = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert state["epoch"] == 2 and state["run"] == {k: flags[k] for k in train.RUN}
    assert not list(tmp_path.glob("run_*"))
    # A checkpoint of an older program in the volume does not stand in a new run's way.
    old = torch.load(tmp_path / "latest.pt", weights_only=True)
    torch.save({**old, "format": 1}, tmp_path / "latest.pt")
    modal_train.train_in_cloud.local(first, False, "two", str(tmp_path))
    assert torch.load(tmp_path / "latest.pt", weights_only=True)["epoch"] == 1
    assert len(list(tmp_path.glob("run_*"))) == 1


# --- The README ------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def test_readme_shows_the_network_as_it_is():
    """Catches: a table of an older network, a count that is no longer true."""
    model = ddpm.UNet()
    for stage, resolution, channels, parameters in ddpm.stages(model):
        row = f"{stage:<16}{resolution:>10}{channels:>10}{parameters:>12,}"
        assert row in README, row
    total = sum(p.numel() for p in model.parameters())
    assert f"total{total:>43,}" in README


def test_readme_has_every_flag_with_its_default():
    """Catches: a flag or a default that was changed in one place only."""
    for script_name, module in (("train.py", train), ("sample.py", sample)):
        table = README.split(f"| `{script_name}` | default | |")[1].split("\n\n")[0]
        rows = [
            line.split("|") for line in table.splitlines() if line.startswith("| `--")
        ]
        told = {row[1].strip(" `"): row[2].strip(" `") for row in rows}
        flags = {a.option_strings[0]: a for a in module.parser()._actions[1:]}
        assert told.keys() == flags.keys()
        for flag, action in flags.items():
            if action.nargs == 0:
                assert told[flag] == "off"
            elif action.default is not None:
                assert type(action.default)(told[flag]) == action.default, flag


def test_readme_links_lead_somewhere_and_assets_stay_small():
    """Catches: a picture that was renamed; a folder that makes the clone slow."""
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (HERE / link).exists(), link
    assert sum(p.stat().st_size for p in (HERE / "assets").iterdir()) <= 12e6
