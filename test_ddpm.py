"""Checks the program against independent computations, and says what each test would catch:
python -m pytest. The first half also grades exercises: python -m pytest -k algorithm_2"""

import copy
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
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ddpm
import modal_train
import sample
import shapes
import train

T, BETA = 1000, np.linspace(1e-4, 0.02, 1000)
OTHER_BETA = np.linspace(0.01, 0.6, 50)  # of another schedule, with T = 50
SCHEDULE, OTHER = ddpm.Schedule(), ddpm.Schedule(torch.from_numpy(OTHER_BETA))
both = pytest.mark.parametrize("schedule", [SCHEDULE, OTHER], ids=["paper", "other"])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def awake(model, size=0.05):
    """Random numbers in all weights: zero-initialised layers would hide what is behind them."""
    for i, p in enumerate(model.parameters()):
        p.data = p.data + size * noise(*p.shape, seed=i)
    return model


# ######## THE METHOD: lessons, and exercises to grade #############################################


def test_schedule_of_other_beta():
    """Catches: a beta index off by one, alpha for alpha_bar, a fixed T."""
    beta, a = np.append(0, OTHER_BETA), np.cumprod(np.append(1, 1 - OTHER_BETA))
    want = {"T": 50, "beta": beta, "alpha": 1 - beta, "alpha_bar": a, "one_minus_alpha_bar": 1 - a}
    for name, numbers in want.items():
        assert np.allclose(getattr(OTHER, name), numbers, rtol=1e-6, atol=0), name


def test_q_sample_is_a_thousand_steps():
    """Catches: a wrong q(x_t | x_0), float32 in ᾱ. Eq. 2 is applied step by step, not Eq. 4."""
    x_0, eps = torch.eye(2).view(2, 2, 1, 1, 1)
    mean, variance = 1.0, 0.0  # of x_t for x_0 = 1, by the rules for sums of Gaussians
    for t, beta in enumerate(BETA, start=1):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        x_t = ddpm.q_sample(SCHEDULE, x_0, torch.tensor([t, t]), eps).flatten().tolist()
        assert x_t == pytest.approx([mean, math.sqrt(variance)], rel=1e-5), f"mean or σ of x_{t}"


def test_draw_t_by_its_histogram():
    """Catches: t from 0 to T - 1, t uniform, no single draws among the means, another T."""
    n, one = 1_600_000, np.arange(1, 51)
    t = ddpm.draw_t(n, 50, seeded(0))
    assert torch.equal(t, ddpm.draw_t(n, 50, seeded(0))), "t is not from the generator"
    assert t.dtype == torch.int64 and t.min() >= 1 and t.max() <= 50, "t is not from 1 to T"
    means = np.bincount((one[:, None] + one).ravel() // 2)[1:] / 50**2
    count, want = np.bincount(t, minlength=51)[1:], n * (15 / 16 * means + 1 / 16 / 50)
    assert ((count - want) ** 2 / want).sum() < 100, "histogram: is every 16th t a single draw?"


@both
def test_algorithm_1_by_hand(schedule):
    """Catches: a wrong x_t or loss, a step uphill, gradients that add up. y is a label."""
    w, y, seen = torch.nn.Parameter(torch.tensor(0.5)), noise(512, 1, 1, 1), []
    sgd, x_0 = torch.optim.SGD([w], lr=0.1), noise(512, 1, 4, 4).sign()
    model = lambda x_t, t: seen.append((x_t, t)) or w * y * x_t
    for _ in range(2):
        old = w.item()
        loss = ddpm.algorithm_1(model, schedule, sgd, x_0, seeded(1)).item()
        x_t, t = seen[-1]
        assert t.min() >= 1 and t.max() <= schedule.T, "t is not from 1 to T"
        assert len(t.unique()) > schedule.T / 4, "each picture needs a t of its own"
        signal, deviation = schedule.signal_and_noise(t)
        eps = (x_t - signal * x_0) / deviation  # as it must have been, by Eq. 4
        assert max(eps.mean().abs(), (eps * x_0).mean().abs()) < 0.06, "the mean of x_t is off"
        assert abs(eps.var(0).mean() - 1) < 0.1, "the variance of x_t is off"
        error = old * y * x_t - eps
        assert loss == pytest.approx(error.square().mean().item(), rel=1e-4), "not Eq. 14's loss"
        want = old - 0.1 * (2 * error * y * x_t).mean().item()
        assert w.item() == pytest.approx(want, abs=1e-5), "not a step against the gradient"
    assert torch.equal(x_t, seen[0][0]), "t and eps are not from the generator"


@both
def test_algorithm_2_is_bayes_rule(schedule):
    """Catches: a wrong coefficient or sigma, noise at the end, anything clipped, in-place changes.
    If x_0 is always 2, a step back draws from q(x_{t-1} | x_t, x_0 = 2). Here that density comes
    from Eq. 2 and Eq. 4 on a grid of x_{t-1}, without Eq. 7 or Eq. 11."""
    x_T, generator = torch.tensor([6.0, -1.0]).view(2, 1, 1, 1), seeded(4)
    factors, x = schedule.signal_and_noise, np.linspace(-15, 15, 60_001)[:, None]
    model = lambda x_t, t: (x_t - 2 * factors(t)[0]) / factors(t)[1]
    walk = [*ddpm.algorithm_2(model, schedule, x_T, seeded(4))]
    assert [t for t, _ in walk] == [*range(schedule.T, -1, -1)], "t is not T, ..., 0"
    assert walk[0][1].flatten().tolist() == [6, -1], "the first x_t is not x_T as given"
    for (t, x_t), (s, got) in itertools.pairwise(walk[:-1]):
        z = torch.randn(x_T.shape, generator=generator).flatten().numpy()
        if t in (2, 10, schedule.T // 2, schedule.T):
            beta = schedule.beta[t].item()
            log = -((x - 2 * factors(s)[0].item()) ** 2) / (2 * factors(s)[1].item() ** 2)
            log = log - (x_t.view(2).numpy() - x * math.sqrt(1 - beta)) ** 2 / (2 * beta)
            q = np.exp(log - log.max(0)) / np.exp(log - log.max(0)).sum(0)  # (60001, 2)
            mean, got = (q * x).sum(0), got.view(2).numpy()
            want = mean + np.sqrt((q * (x - mean) ** 2).sum(0)) * z
            part = "σ" if np.ptp((got - mean) / z) < 1e-2 else "the mean"  # the same σ for both?
            assert np.allclose(got, want, atol=5e-4), f"{part} of x_{s} is off"
    assert np.allclose(walk[-1][1], 2, atol=1e-4), "x_0 is off: is there noise in the last step?"


def test_attention_against_a_loop():
    """Catches: softmax over the wrong axis, a missing 1/√d, mixed up places, a lost skip."""
    layer, x = awake(ddpm.Attention(64, 32)), noise(2, 64, 16, 4)
    got, averaged = layer(x), x.unflatten(2, (8, 2)).mean(3)  # to 8x4
    q, k, v = layer.qkv(layer.norm(averaged)).flatten(2).split(32, 1)  # (2, 32, 32 places) each
    for i in range(32):
        match = [(q[..., i] * k[..., j]).sum(1, keepdim=True) / math.sqrt(32) for j in range(32)]
        weights = [m.exp() / sum(n.exp() for n in match) for m in match]
        mean = sum(weight * v[..., j] for j, weight in enumerate(weights))  # (2, 32)
        row, column = divmod(i, 4)
        here = (..., slice(2 * row, 2 * row + 2), slice(column, column + 1))
        want = x[here] + layer.out(mean[..., None, None])
        assert torch.allclose(got[here], want, atol=1e-4), f"place {row}, {column} is off"


def test_unet_uses_everything():
    """Catches: a first guess that is not 0, t or a layer that is not used."""
    model, x, t = ddpm.UNet(), noise(3, 1, 32, 32), torch.tensor([1, 500, T])
    assert not model(x, t).any(), "the first guess is not 0"
    eps_theta = awake(model)(x, t)
    assert (eps_theta - model(x, t + 1)).abs().amax((1, 2, 3)).min() > 1e-3, "t is ignored"
    eps_theta.square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused, "layers are not used"


def test_perfect_model_is_bayes_rule():
    """Catches: a wrong weight or mean, pictures taken to be equally bright, exp that overflows."""
    data, t = noise(20, 3, 8, 16), torch.tensor([1, 300, 500, 700, T])
    signal, deviation = SCHEDULE.signal_and_noise(t)
    x_t = signal * data[:5] + deviation * noise(5, 3, 8, 16, seed=1)
    distance = (x_t[:, None] - signal[:, None] * data).double().square().sum((2, 3, 4))  # (5, 20)
    weights = (-distance / (2 * deviation.flatten(1) ** 2)).softmax(1)
    mean = (weights @ data.flatten(1).double()).view(x_t.shape)
    off = ddpm.perfect_model(SCHEDULE, data)(x_t, t) - (x_t - signal * mean) / deviation
    assert off.abs().max() < 1e-3, f"eps at t = {t.tolist()}: {off.abs().amax((1, 2, 3)).tolist()}"


@both
@pytest.mark.parametrize("steps, eta", [(T, 1.0), (8, 0.0), (8, 0.5), (2, 1.0), (1, 1.0)])
def test_ddim_by_hand(schedule, steps, eta):
    """Catches: eta for eta squared, sigma not taken from the rest, no clip, t not rounded."""
    a, b = schedule.alpha_bar.tolist(), schedule.one_minus_alpha_bar.tolist()
    steps, label, generator = min(steps, schedule.T), torch.tensor([0.9, 0.8]), seeded(4)
    model = lambda x_t, t: (label + t / 9999).view(2, 1, 1, 1) * x_t - 0.1 * x_t.roll(1, 3)
    walk = [*ddpm.ddim(model, schedule, noise(2, 1, 4, 8), steps, eta, seeded(4))]
    visited = [*np.linspace(schedule.T, 1, steps), 0]
    assert [t for t, _ in walk] == pytest.approx(visited, abs=0.5), "t is not evenly spread"
    for (t, x_t), (s, got) in itertools.pairwise(walk):
        eps = model(x_t, torch.tensor([t, t])).double()
        guess = ((x_t - math.sqrt(b[t]) * eps) / math.sqrt(a[t])).clamp(-1, 1)  # of x_0, by Eq. 4
        eps = (x_t - math.sqrt(a[t]) * guess) / math.sqrt(b[t])
        variance = eta**2 * b[s] / b[t] * (1 - a[t] / a[s])  # the square of DDIM's Eq. 16
        want = math.sqrt(a[s]) * guess + math.sqrt(max(0, b[s] - variance)) * eps
        want = want + math.sqrt(variance) * torch.randn(x_t.shape, generator=generator)
        assert torch.allclose(got.double(), want, atol=5e-4), f"the jump from {t} to {s} is off"


def test_bound_of_one_pixel_is_one_bit():
    """Catches: a wrong weight, nats for bits, a mean for a sum. (1.007: by quadrature.)"""
    perfect = ddpm.perfect_model(SCHEDULE, torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
    terms = ddpm.bound(perfect, SCHEDULE, noise(2000 * (T - 1), 1, 1, 1).sign(), seeded(1))
    assert terms.sum().item() == pytest.approx(1.007, abs=0.03), "bits"


def test_bound_is_eq_12():
    """Catches: terms at another t, SNR for its difference, a mean over pixels, terms left out."""
    seen, beta, b = [], OTHER.beta, OTHER.one_minus_alpha_bar
    model = lambda x_t, t: seen.append((x_t, t)) or 0.5 * x_t
    x_0 = noise(49, 1, 4, 4).sign()  # as many as there are terms
    terms = ddpm.bound(model, OTHER, x_0, seeded(1))
    (x_t, t), (signal, deviation) = seen[0], OTHER.signal_and_noise(seen[0][1])
    error = ((x_t - signal * x_0) / deviation - 0.5 * x_t).square().sum((1, 2, 3))
    variance = b[t - 1] / b[t] * beta[t]  # of a step back from t
    want = beta[t] ** 2 / (2 * variance * (1 - beta[t]) * b[t]) * error / math.log(2)  # Eq. 12
    assert torch.allclose(terms[t], want, rtol=2e-3), "a term is off"
    with pytest.raises(RuntimeError):
        ddpm.bound(model, OTHER, x_0[1:])


# ######## THE PROGRAM: what a user does ###########################################################
HERE = Path(ddpm.__file__).parent


def Net(channels=1):
    """A small network, with dropout and a batch norm."""
    model = ddpm.UNet(channels, (8, 8, 8), 16, 8, 16)
    first = torch.nn.BatchNorm2d(channels), torch.nn.Dropout(0.1)
    model.stem = torch.nn.Sequential(*first, model.stem)
    wrong = lambda net: net.training and not torch.is_grad_enabled()  # dropout in samples
    model.register_forward_pre_hook(lambda net, x: pytest.fail("dropout") if wrong(net) else x)
    return awake(model)


def run_train(folder, *flags, network=Net):
    """train.py in this process; returns the latest.pt that it left."""
    new = [] if "--resume" in flags else ["--samples=64", "--batch-size=16"]
    places = ["--device=cpu", f"--checkpoints={folder}", f"--logs={folder}/logs"]
    train.main([*new, *flags, *places], network)
    return torch.load(folder / "latest.pt", weights_only=True)


def test_data_mirror_and_score():
    """Catches: other data, a mirror up-down, a score blind to a pixel, touching, a 4th, copies."""
    x = shapes.make_dataset(1000, seed=0)
    digest = hashlib.sha256((x > 0).byte().numpy().tobytes()).hexdigest()
    assert digest[:16] == "e7f317c0d3d21075"
    y = noise(200, 3, 4, 8)
    same, turned = (shapes.mirror(y) == torch.stack([y, y.flip(3)])).flatten(2).all(2)
    assert (same ^ turned).all() and 50 < turned.sum() < 150
    training = torch.cat([x[:5].flip(2), x[5:10].mT.flip(3), x[10:15]])
    some = torch.cat([0.3 * x[:40], -x[:10].abs()])  # the last ten are empty
    assert shapes.score(some, training) == (0.8, 0.3)
    right = lambda x: shapes.score(x, training)[0]
    assert right(x) == 1
    assert torch.equal(shapes.coloured(x[:40]).amax(1) > -1, x[:40, 0] > 0)
    x[np.arange(1000), 0, np.arange(1000) % 32, np.arange(1000) // 32] *= -1
    assert right(x) == 0
    x = -torch.ones(1, 1, 32, 32)
    for (i, j), want in (((0, 0), 1), ((12, 0), 1), ((0, 12), 1), ((12, 12), 0)):
        x[..., i : i + 8, j : j + 8] = 1  # the fourth square is too many
        assert right(x) == want
    x[..., 8:, :], x[..., 8:], x[..., 8:16, 8:16] = -1, -1, 1  # two touch at a corner
    assert right(x) == 0
    assert shapes.coloured(x)[0, :, 0, 0].tolist() == [1, -1, -1], "what is wrong is not red"
    assert shapes.tile(1.1 * x).getpixel((5, 5)) == (255, 255, 255), "not clipped"


def test_load_pictures(tmp_path):
    """Catches: another order, a page that is not white, a useless file that is not named."""
    for name, mode, colour in (("a.JPG", "L", 0), ("b.png", "RGBA", 0), ("c.jpeg", "RGB", "gray")):
        Image.new(mode, (24, 16), colour).save(tmp_path / name)
    x = shapes.load_pictures(tmp_path)
    assert x.shape == (3, 1, 16, 24) and x.dtype == torch.float32
    assert x[:, 0, 0, 0].tolist() == pytest.approx([-1, 1, 0], abs=0.01)
    cut = (tmp_path / "b.png").read_bytes()[:-30]
    bad = ("d", cut), ("d", ("I;16", (24, 16))), ("d", ("L", (24, 24))), ("0", ("L", (28, 28)))
    for name, wrong in bad:
        file = tmp_path / f"{name}.png"
        file.write_bytes(wrong) if wrong is cut else Image.new(*wrong).save(file)
        with pytest.raises(OSError, match=re.escape(str(file))):
            shapes.load_pictures(tmp_path)


def test_own_pictures_from_a_folder_to_samples(tmp_path, monkeypatch):
    """Catches: letters that are mirrored; colour or size lost; a folder that is lost or changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "mirror", None)  # letters have a side
    folder, checkpoints = tmp_path / "letters", tmp_path / "checkpoints"
    folder.mkdir()
    for words, error in (("--data=letters", OSError), ("--epochs=1", TypeError)):
        with pytest.raises(error):  # nothing is in letters; shapes are mirrored
            run_train(checkpoints, words)
    pixels = np.random.default_rng(0).integers(256, size=(3, 16, 24, 3))
    for i, picture in enumerate(pixels):
        Image.fromarray(np.uint8(picture)).save(folder / f"{i}.png")
    run_train(checkpoints, "--data=letters", "--epochs=1")
    second = np.asarray(Image.open(checkpoints / "data.png"))[1:81:5, 123:243:5]  # (16, 24, 3)
    assert np.array_equal(second, pixels[1])
    sample.main(["--device=cpu", "--steps=3"], Net)
    assert Image.open("samples.png").size == (8 * 122, 2 * 82)
    monkeypatch.chdir(folder)  # from here "letters" would be another folder
    (folder / "1.png").unlink()
    with pytest.raises(SystemExit, match="^error: .*letters has other pictures than .*latest.pt"):
        run_train(checkpoints, "--resume", "--epochs=2")


def test_train_one_epoch_and_one_more_are_two(tmp_path, monkeypatch):
    """Catches: noise that differs; optimizer, rate, average, flags or beta not restored."""
    whole = run_train(tmp_path / "a", "--epochs=2", "--seed=1", "--lr=1e-2")
    run_train(tmp_path / "b", "--epochs=1", "--seed=1", "--lr=1e-2")
    monkeypatch.setattr(ddpm, "BETA", ddpm.BETA / 2)  # a run keeps its own
    parts = run_train(tmp_path / "b", "--resume", "--epochs=2")
    assert not [*tmp_path.glob("b/before_*")], "its files are set aside"
    for key in whole.keys() - {"run"}:
        torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=0)


def test_train_the_first_steps_and_their_average(tmp_path, monkeypatch):
    """Catches: an average that stands still or forgets too soon, a rate without --lr or warm-up."""
    before, step = [], ddpm.algorithm_1
    watched = lambda model, *rest: before.append(copy.deepcopy(model)) or step(model, *rest)
    monkeypatch.setattr(ddpm, "algorithm_1", watched)
    state = run_train(tmp_path, "--epochs=1", "--samples=32", "--lr=0.1", "--seed=1")
    best = torch.load(tmp_path / "best.pt", weights_only=True)["average"]
    torch.manual_seed(1)
    for name, first in Net().named_parameters():
        one, two = before[1].get_parameter(name), state["model"][name]
        average = first.lerp(one, 9 / 11).lerp(two, 9 / 12)
        assert torch.allclose(state["average"][name], average, atol=1e-6), name
        assert torch.equal(best[name], state["average"][name].half()), name
        assert (one - first).abs().max() < 0.1 * train.rate(0) * 1.05, "Adam's first step"
    mean = "stem.0.running_mean"  # of the batch norm: it is no weight, so it is not averaged
    assert state["average"][mean] == state["model"][mean] != 0
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1 * train.rate(2))
    rates = [train.rate(step) for step in range(4000)]
    assert rates[0] == 1 / 500 and rates[499] == max(rates) == 1 and rates[3999] == 0.5


def test_train_leaves_its_files_and_those_of_others(tmp_path):
    """Catches: a missing file or curve, a wrong best.pt, an older run or others' files lost."""
    folder = tmp_path / "checkpoints"
    files = lambda folder: {path.name: path.read_bytes() for path in folder.glob("*.*")}
    losses = run_train(folder, "--epochs=6", "--samples=16", "--lr=1e-9")["losses"]
    assert np.std(losses) > 1e-3, "the noise is the same in each epoch"
    best = torch.load(folder / "best.pt", weights_only=True)["losses"]
    assert best == losses[: losses.index(min(losses)) + 1] and 1 < len(best) < 6
    (run,) = (folder / "logs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Images("samples")] == [5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    old = files(folder)
    assert old.keys() > {"latest.pt", "best.pt", "loss.png", "data.png", "samples_0006.png"}
    (folder / "mine.png").write_text("mine")
    with pytest.raises(OSError):
        run_train(folder, "--data=no")
    run_train(folder, "--resume")  # all its epochs are done
    assert files(folder) == {**old, "mine.png": b"mine"}
    with pytest.raises(SystemExit, match="not finite"):
        run_train(folder, network=lambda channels: awake(Net(channels), math.nan))
    (aside,) = folder.glob("before_*")
    assert files(aside) == old and files(folder).keys() == {"mine.png", "data.png"}


def test_sample_uses_every_flag(tmp_path, monkeypatch):
    """Catches: a flag, weights or a beta not used; dropout that stays on; a missing picture."""
    monkeypatch.chdir(tmp_path)
    beta, pictures = torch.linspace(0.01, 0.5, 12), []  # so T = 12
    state = {**run_train(Path("checkpoints"), "--epochs=1"), "beta": beta}
    torch.save(state, "checkpoints/best.pt")
    torch.save({**state, "beta": beta / 2}, "beta.pt")
    torch.save({**state, "average": awake(Net()).state_dict()}, "weights.pt")
    flags = ",,--n=2,--seed=2,--eta=0.9999999,--eta=0,--steps=4,--steps=4 --eta=0"
    for words in f"{flags},--checkpoint=beta.pt,--checkpoint=weights.pt".split(","):
        sample.main(["--device=cpu", "--n=1", "--output=a.png", *words.split()], Net)
        pictures.append(Path("a.png").read_bytes())
    assert pictures[0] == pictures[1] and len({*pictures}) == 9  # with eta < 1, ddim clips
    for words in ("", "--explain", "--process", "--score --n=8 --steps=5"):
        sample.main(["--device=cpu", *words.split()], Net)
    names = ("samples.png", "explained.png", "process.png", "process.gif")
    assert len({Path(name).read_bytes() for name in names}) == 4


@pytest.mark.parametrize("main, flag", [(train.main, "--resume"), (sample.main, "--checkpoint={}")])
def test_a_broken_checkpoint_gets_one_line(main, flag, tmp_path, monkeypatch):
    """Catches: a traceback, code run from a file, weights loaded into the wrong network."""
    monkeypatch.chdir(tmp_path)
    path, large = Path("checkpoints/latest.pt"), ddpm.UNet().state_dict()
    state, cut = run_train(path.parent, "--epochs=1"), path.read_bytes()[:9999]
    foreign = {**state, "losses": [], "model": large, "average": large}
    partial = {key: state[key] for key in state.keys() - {"beta", "scheduler"}}
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, ("it ran",))})()
    for broken in (b"text", cut, {"epoch": 1}, partial, foreign, evil):
        path.write_bytes(broken) if isinstance(broken, bytes) else torch.save(broken, path)
        with pytest.raises(SystemExit, match=f"^error: cannot use {re.escape(str(path))}") as stop:
            main([flag.format(path), "--device=cpu"], Net)
        assert "\n" not in stop.value.code and len(stop.value.code) < 400
    assert not Path("it ran").exists()


@pytest.mark.filterwarnings("ignore:The train function is executing locally")
def test_modal_trains_and_goes_on_after_a_restart(tmp_path):
    """Catches: flags that do not arrive, a restart that begins again, a new run that resumes."""
    latest, script = tmp_path / "latest.pt", tmp_path / "script.py"
    latest.write_text("of an older run")
    script.write_text("raise SystemExit(3)")  # interrupted before train.py did anything
    assert modal_train.train.local(["--epochs=9"], "a", tmp_path, script) == 3
    # The next calls end after an epoch; their latest.pt is the flags that train.py was given.
    script.write_text("import sys; open('latest.pt', 'w').write('\\n'.join(sys.argv[1:]))")
    calls = ("a", [], False), ("a", [], True), ("b", [], False), ("c", ["--resume"], True)
    for run, flag, resumes in calls:
        assert modal_train.train.local(["--epochs=9", *flag], run, tmp_path, script) == 0
        args = train.parse(latest.read_text().splitlines())
        assert (args.epochs, args.resume, args.checkpoints) == (9, resumes, Path())
    aside = [path.read_text() for path in tmp_path.glob("before_*/latest.pt")]
    assert len(aside) == 2 and "of an older run" in aside


def test_scripts_and_imports_in_a_process_of_their_own(tmp_path):
    """Catches: a traceback, also where a notebook has set MPLBACKEND; an import that changes it."""
    backend = "module://matplotlib_inline.backend_inline"  # matplotlib does not look up others
    env = {**os.environ, "PYTHONPATH": str(HERE), "MPLBACKEND": backend}
    for words in (
        ["-c", f"import os, shapes; assert os.environ['MPLBACKEND'] == {backend!r}"],
        *([HERE / "ddpm.py"], [HERE / "shapes.py"]),
        [HERE / "train.py", "--samples=64", "--logs=shapes.png"],  # which is no folder
    ):
        options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, *words], check=False, **options)
        assert done.returncode == ("--logs=shapes.png" in words), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert {"forward.png", "pixel.png", "shapes.png"} <= {p.name for p in tmp_path.iterdir()}


def test_readme_and_assets():
    """Catches: a picture or a flag that was renamed; a command that has changed."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)]+)\)", readme):
        assert (HERE / link).exists(), link
    flags = {"help", *vars(train.parse([])), *vars(sample.parse([]))}
    for command in re.findall(r"(?:train|sample|modal_train)\.py ([^`\n]*)", readme):
        used = {flag.replace("-", "_") for flag in re.findall(r"--([a-z0-9-]+)", command)}
        assert used <= flags, command


def test_the_supplied_weights_guess_well():
    """Catches: a missing assets/pretrained.pt, or one of another network or version."""
    state, model = torch.load(sample.PRETRAINED, weights_only=True), ddpm.UNet()
    model.load_state_dict(state["average"])
    x_0, t = shapes.make_dataset(16, [0, 3]), torch.full((16,), 300)
    x_t = ddpm.q_sample(SCHEDULE, x_0, t, noise(16, 1, 32, 32))
    guess = ddpm.predict_x_0(SCHEDULE, x_t, t, model(x_t, t))
    assert (guess.sign() != x_0).float().sum((1, 2, 3)).mean() < 2
