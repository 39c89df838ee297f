"""Turns noise into pictures with a trained network: python sample.py

python sample.py                    a grid of 16 pictures: samples.png
python sample.py --steps 50         the same in 50 DDIM steps instead of 1000
python sample.py --process          noise becoming pictures: process.png, process.gif
python sample.py --explain          which shapes the pictures hold: explained.png
python sample.py --score --steps 50 how many of 500 pictures are clean, as a table
python sample.py --curve            how many are clean after 5, 10, ... steps: steps.png
python sample.py --inside           what the U-Net and its attention do: inside.png
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

import ddpm
import shapes
from shapes import fail, number
from train import export_weights, load_checkpoint, pick_device

TRAINED = Path("checkpoints/best.pt")  # where train.py leaves its weights
PRETRAINED = Path(__file__).parent / "assets/pretrained.pt"  # until there are some

STRIP = (1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 50, 0)  # the t of --process
GIF_FRAMES = 50
INSIDE = 300  # the t of --inside: the picture is there, but hard to see
CURVE = (5, 10, 20, 50, 100, 200)  # the numbers of steps of --curve


def parser():
    """The flags of sample.py."""
    p = argparse.ArgumentParser(
        description="Draw pictures with a trained diffusion model."
    )

    def add(*names, **how):
        how["help"] += (
            " (default: %(default)s)" if how.get("default") is not None else ""
        )
        p.add_argument(*names, **how)

    add(
        "--checkpoint",
        metavar="PATH",
        help="the weights; default: checkpoints/best.pt, or assets/pretrained.pt "
        "as long as there is none",
    )
    add(
        "--output",
        metavar="PATH",
        help="default: samples.png, process.png, explained.png, steps.png or inside.png",
    )
    add(
        "--process",
        "--show-process",
        action="store_true",
        help="draw noise becoming pictures",
    )
    add(
        "--explain",
        action="store_true",
        help="outline the shapes found in each picture",
    )
    add(
        "--curve",
        action="store_true",
        help="draw how many pictures are clean after few and after many steps",
    )
    add(
        "--inside",
        action="store_true",
        help="draw what goes on in the network, for one noisy picture",
    )
    add(
        "--export",
        metavar="PATH",
        help="save the weights alone, in half precision, and draw nothing",
    )
    add("--score", action="store_true", help="print how many pictures are clean")
    add(
        "--n",
        type=number(int, 1, 2000),
        help="how many pictures; default: 16, with --process 4, with --inside 1, "
        "with --score 500, with --curve 200",
    )
    add(
        "--steps",
        type=number(int, 1, ddpm.T),
        default=ddpm.T,
        help="1000 is Algorithm 2, fewer steps are DDIM",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the noise")
    add(
        "--device",
        default="auto",
        help="cuda, mps, cpu, or auto for the first there is",
    )
    return p


def show_process(walk, path):
    """Saves a strip of x_t, with the guessed x_0 below each, and a GIF of the same.

    walk: list of (t, x_t, x_0) as ddpm.reverse_process yields them.
    """
    times = [t for t, _, _ in walk]
    nearest = {min(range(len(times)), key=lambda i: abs(times[i] - t)) for t in STRIP}
    frames = [walk[i] for i in sorted(nearest)]
    n = len(frames[0][1])
    figure = Figure(figsize=(len(frames), 2.1 * n + 0.3), layout="constrained")
    grid = figure.subplots(2 * n, len(frames), squeeze=False)
    for column, (t, x_t, x_0) in zip(grid.T, frames):
        column[0].set_title(f"t = {t}", fontsize=9)
        for i, pictures in enumerate((x_t, x_0)):
            for axes, picture in zip(column[i::2], shapes.from_model(pictures)):
                axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
    for i, axes in enumerate(grid[:, 0]):
        axes.set_ylabel(("$x_t$", "$x_0$ guessed")[i % 2], fontsize=8)
    figure.savefig(path, dpi=100)

    figure = Figure(figsize=(1.5 * n, 3.4))
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1)
    writer = PillowWriter(fps=12)
    every = max(1, len(walk) // GIF_FRAMES)
    shown = walk[:-1:every] + walk[-1:] * 15  # the end stands still for a moment
    with writer.saving(figure, path.with_suffix(".gif"), dpi=60):
        for t, x_t, x_0 in shown:
            for axes, pictures, name in (
                (top, x_t, f"$x_t$, t = {t}"),
                (bottom, x_0, "$x_0$ guessed"),
            ):
                axes.clear()
                axes.axis("off")
                axes.set_title(name, fontsize=9)
                axes.imshow(
                    shapes.tile(shapes.from_model(pictures), columns=n),
                    cmap="gray",
                    vmin=0,
                    vmax=1,
                )
            writer.grab_frame()


def draw_pictures(model, schedule, n, steps, seed, every=False, eta=None):
    """Walks from noise to n pictures, with a progress bar.

    eta: as in ddpm.reverse_process. Returns a list of (t, x_t, x_0) on the CPU: the whole
    walk if every, else just its end.
    """
    device = schedule.beta.device
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(n, 1, shapes.SIZE, shapes.SIZE, generator=generator).to(device)
    walk, start = [], time.perf_counter()
    process = ddpm.reverse_process(model, schedule, x_T, steps, eta, generator)
    for t, x_t, x_0 in tqdm(process, total=steps + 1, unit="step"):
        if not every:
            walk.clear()
        walk.append((t, x_t.cpu(), x_0.cpu()))
    seconds = time.perf_counter() - start
    print(f"{n} pictures in {seconds:.1f} s, {n / seconds:.2g} pictures per second")
    return walk


def print_score(x, run, schedule, steps, seed):
    """Prints the score of x beside real pictures, an untrained network and pure noise."""
    training = shapes.make_dataset(run["samples"], seed=run["seed"])
    # With all mirror images, of which training has seen some.
    training = np.concatenate([training, training[:, :, ::-1]])
    training = np.concatenate([training, training[:, ::-1]])
    training = np.concatenate([training, training.transpose(0, 2, 1)])  # (8 n, 32, 32)
    held_out = shapes.to_model(shapes.make_dataset(len(x), seed=[run["seed"], 2]))
    print("the same with an untrained network, to compare:")
    untrained = ddpm.UNet().requires_grad_(False).to(schedule.beta.device)
    ((_, never, _),) = draw_pictures(untrained, schedule, len(x), min(steps, 20), seed)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    rows = {
        "these samples": x,
        "held-out real pictures": torch.from_numpy(held_out),
        "an untrained network": never,
        "pure noise": noise,
    }
    print(
        shapes.score_table(
            {k: shapes.score(v.clamp(-1, 1), training) for k, v in rows.items()}
        )
    )


def save_steps_curve(path, model, schedule, n, seed):
    """Draws the share of clean pictures against the number of steps, from the same noise.

    eta = 0 is DDIM; eta = 1 adds as much noise on the way as Algorithm 2 does.
    """
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for eta in (0.0, 1.0):
        shares = []
        for steps in CURVE:
            ((_, x, _),) = draw_pictures(model, schedule, n, steps, seed, eta=eta)
            shares.append(shapes.score(x.clamp(-1, 1))["clean"])
            print(f"{steps} steps, eta = {eta:g}: {shares[-1]:.1%} of {n} clean")
        axes.plot(CURVE, shares, "o-", label=f"$\\eta$ = {eta:g}")
    axes.set(xlabel="steps", ylabel="share of clean samples", xscale="log", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)


def attention_weights(attention, seen):
    """How much each pixel takes from each key, (N, M), the mean over all heads.

    seen: what attention.query and attention.key_value returned for one picture.
    """
    q = attention.split(seen[attention.query])  # (1, heads, N, d)
    k = attention.split(seen[attention.key_value].chunk(2, dim=2)[0])
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
    return weights.mean(1)[0]


def save_inside(path, model, schedule, seed):
    """Draws one pass through the network: what leaves each level, where attention looks.

    The picture is one of the data, with noise added. Of the many channels of a level those
    two are shown that differ most from pixel to pixel. Each panel has its own scale.
    """
    levels = [*model.down, model.middle3, *model.up]
    attentions = [model.middle2, *(level.attention for level in model.up)]
    layers = [layer for a in attentions for layer in (a.query, a.key_value)]
    seen = {}  # what each of these returned
    for module in levels + layers:
        module.register_forward_hook(lambda m, _, y: seen.__setitem__(m, y.cpu()))
    device, t = schedule.beta.device, torch.tensor([INSIDE])
    x_0 = torch.from_numpy(shapes.to_model(shapes.make_dataset(1, seed=[seed, 3])))
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    x_t, t = ddpm.q_sample(schedule, x_0.to(device), t, eps.to(device)), t.to(device)
    found = ddpm.eps_theta(model, schedule, x_t, t)
    guess = ddpm.predict_x_0(schedule, x_t, t, found)

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    columns = top.subplots(2, len(levels) + 2).T
    pairs = [torch.cat([x_t.cpu(), x_0])[:, 0]]  # 2 pictures (32, 32) a column
    titles = [f"$x_t$, t = {INSIDE}; $x_0$"]
    for place, level in zip(("down",) * 3 + ("middle",) + ("up",) * 3, levels):
        channels = seen[level][0].float()  # (C, H, W)
        pairs.append(channels[channels.var((1, 2)).topk(2).indices])  # (2, H, W)
        titles.append(
            f"{place}\n{len(channels)} of {channels.shape[1]}x{channels.shape[2]}"
        )
    pairs.append(torch.cat([guess, found])[:, 0].cpu())
    titles.append("guessed\n$x_0$; $\\epsilon$")
    for column, pair, title in zip(columns, pairs, titles):
        column[0].set_title(title, fontsize=9)
        for axes, picture in zip(column, pair):
            axes.imshow(picture.numpy(), cmap="gray")
            axes.set(xticks=[], yticks=[])

    # From one white pixel in the middle of those there are: its weights for all keys.
    white = (x_0[0, 0] > 0).nonzero()
    pixel = white[len(white) // 2]  # (2,), row and column
    corner = (-0.5, shapes.SIZE - 0.5, shapes.SIZE - 0.5, -0.5)
    panels = bottom.subplots(1, len(attentions) + 1)
    panels[0].imshow(x_0[0, 0].numpy(), cmap="gray")
    panels[0].set_title("the query", fontsize=9)
    for axes, attention in zip(panels[1:], attentions):
        weights = attention_weights(attention, seen)  # (N, M)
        queries, keys = (math.isqrt(length) for length in weights.shape)  # sides
        row, column = (pixel * queries // shapes.SIZE).tolist()
        picture = weights[row * queries + column].view(keys, keys)
        axes.imshow(picture.numpy(), cmap="gray", vmin=0, extent=corner)
        title = f"attention at {queries}x{queries}\n{keys}x{keys} keys"
        axes.set_title(title, fontsize=9)
    for axes in panels:
        axes.plot(*pixel.flip(0).tolist(), "o", color="red", markersize=5)
        axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def save_samples(path, args, model, schedule, run, n):
    """Draws n pictures from noise; saves them, how they came about, or what they show."""
    walk = draw_pictures(model, schedule, n, args.steps, args.seed, every=args.process)
    x = walk[-1][1]  # (n, 1, 32, 32)
    if args.score:
        print_score(x, run, schedule, args.steps, args.seed)
    if args.process:
        show_process(walk, path)
    elif args.explain:
        shapes.save_explained(path, x[:64])
    else:
        shapes.save_picture(
            path, shapes.tile(shapes.from_model(x), columns=8 if n <= 64 else 32)
        )


def export(path, state):
    """Saves the weights of a checkpoint alone, where there is no file yet."""
    if path.suffix != ".pt":
        fail(f"--export {path} should end in .pt")
    if path.exists():
        fail(f"--export {path} is there already; choose another name or move it")
    path.parent.mkdir(parents=True, exist_ok=True)
    export_weights(path, state)
    print(f"saved {path}")


def main():
    try:
        draw_and_save(parser().parse_args())
    except OSError as e:
        fail(
            f"{e.strerror or e}: {e.filename or 'the picture'}; "
            "make room or choose another place"
        )
    except (MemoryError, RuntimeError) as e:
        if "memory" not in str(e) and not isinstance(e, MemoryError):
            raise
        fail("not enough memory; take a smaller --n")


def draw_and_save(args):
    """All that sample.py does, with the flags as parser returns them."""
    # What is drawn: the name of the file, how many pictures, and how many fit into one.
    name, n, most = "samples.png", 16, 2000
    chosen = [
        ("process", ("process.png", 4, 32)),
        ("explain", ("explained.png", 16, 64)),
        ("curve", ("steps.png", 200, 2000)),
        ("inside", ("inside.png", 1, 1)),
    ]
    chosen = [(flag, what) for flag, what in chosen if getattr(args, flag)]
    if len(chosen) > 1:
        fail(f"--{chosen[0][0]} and --{chosen[1][0]} are two pictures: take one by one")
    if args.score and any(flag != "explain" for flag, _ in chosen):
        fail(f"--score and --{chosen[0][0]} do not go together: take one by one")
    if chosen:
        name, n, most = chosen[0][1]
    if args.score:  # of all; --explain shows the first 64
        n, most = 500, 2000
    path, n = Path(args.output or name), args.n or n
    if path.suffix.lower() != ".png":
        fail(f"--output {path} should end in .png")
    if n > most:
        fail(f"--n {n} is more than one picture can show; take fewer")
    device = pick_device(args.device)
    checkpoint = args.checkpoint or (TRAINED if TRAINED.exists() else PRETRAINED)
    state, model = load_checkpoint(checkpoint)
    if checkpoint == PRETRAINED:
        print(f"there is no {TRAINED} yet: these are the weights that came along")
    print(f"{checkpoint}: {state['epoch']} epochs, device {device}")
    if args.export is not None:
        export(Path(args.export), state)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        fail(f"--output {path} cannot be written; choose another")
    schedule, model = ddpm.Schedule(device), model.to(device)
    if args.curve:
        save_steps_curve(path, model, schedule, n, args.seed)
    elif args.inside:
        save_inside(path, model, schedule, args.seed)
    else:
        save_samples(path, args, model, schedule, state["run"], n)
    print(
        f"saved {path}" + (f" and {path.with_suffix('.gif')}" if args.process else "")
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped before the end")
        sys.exit(130)
