"""Turns noise into pictures with a trained network: python sample.py

python sample.py                    a grid of 16 pictures: samples.png
python sample.py --steps 50         the same in 50 steps instead of 1000
python sample.py --process          noise becoming pictures: process.png, process.gif
python sample.py --explain          every shape in the colour of its kind: explained.png
python sample.py --score --steps 50 how many of 500 pictures are right, as a table
python sample.py --curve            how many are right after 5, 10, ... steps: steps.png
python sample.py --inside           what the U-Net and its attention do: inside.png
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image  # comes with matplotlib
from tqdm import tqdm

import ddpm
import shapes

TRAINED = Path("checkpoints/best.pt")  # where train.py leaves its weights
PRETRAINED = Path(__file__).parent / "assets/pretrained.pt"  # until there are some

# What can be drawn: the file, how many pictures if --n is not given, how many at most, and --help.
DRAWN = {
    "grid": ("samples.png", 16, 2000, "draw a grid of pictures (the default)"),
    "process": ("process.png", 4, 16, "draw noise becoming pictures"),
    "explain": ("explained.png", 16, 256, "draw every shape in the colour of its kind"),
    "score": ("", 500, 10_000, "print how many pictures are right"),
    "curve": ("steps.png", 200, 2000, "draw how many are right after few and after many steps"),
    "inside": ("inside.png", 1, 1, "draw what goes on in the network, for one noisy picture"),
}
STRIP, GIF_FRAMES = 12, 50  # how many stops of the walk --process shows
CURVE = (5, 10, 20, 50, 100, 200)  # the numbers of steps of --curve
INSIDE = 300  # the t of --inside: the picture is there, but hard to see
COLOURS = {"circle": "orange", "rectangle": "deepskyblue", "triangle": "limegreen"}
COLOURS |= {"line": "violet", None: "red"}


def parser():
    """The flags of sample.py."""
    p = argparse.ArgumentParser(description="Draw pictures with a trained diffusion model.")
    what = p.add_mutually_exclusive_group()
    for name, (*_, text) in DRAWN.items():
        names = [f"--{name}", *(["--show-process"] if name == "process" else [])]
        what.add_argument(*names, dest="what", action="store_const", const=name, help=text)
    p.set_defaults(what="grid")
    p.add_argument("--checkpoint", metavar="PATH", help=f"default: {TRAINED}, else pretrained.pt")
    p.add_argument("--output", metavar="PATH", help="a .png; default: samples.png, process.png ...")
    p.add_argument("--n", type=int, help="how many pictures")
    p.add_argument("--steps", type=int, default=ddpm.T, help="1000 is Algorithm 2, fewer are DDIM")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto for what is there")
    return p


def draw(model, schedule, n, steps, seed, eta=1.0, every=False):
    """Walks from noise to n pictures, with a progress bar.

    Returns a list of (t, x_t, guess of x_0) on the CPU: the whole walk if every, else its end.
    """
    device = schedule.beta.device
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(n, 1, shapes.SIZE, shapes.SIZE, generator=generator).to(device)
    walk = []
    process = ddpm.reverse_process(model, schedule, x_T, steps, eta, generator)
    for t, x_t, x_0 in tqdm(process, total=steps + 1, unit="step"):
        if every or t == 0:
            walk.append((t, x_t.cpu(), x_0.cpu()))
    return walk


def save_process(path, walk):
    """Saves a strip of x_t with the guessed x_0 below each, and a GIF of the same.

    walk: list of (t, x_t, x_0) as ddpm.reverse_process yields them.
    """
    frames = [walk[i] for i in sorted({*np.linspace(0, len(walk) - 1, STRIP).astype(int)})]
    n = len(frames[0][1])
    figure = Figure(figsize=(len(frames), 2.1 * n + 0.3), layout="constrained")
    grid = figure.subplots(2 * n, len(frames), squeeze=False)
    for column, (t, x_t, x_0) in zip(grid.T, frames):
        column[0].set_title(f"t = {t}", fontsize=9)
        pictures = torch.stack([x_t, x_0], dim=1).flatten(0, 1)  # (2 n, 1, 32, 32)
        for axes, picture in zip(column, shapes.from_model(pictures)):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
    for axes, text in zip(grid[:, 0], ("$x_t$", "guess of $x_0$") * n):
        axes.set_ylabel(text, fontsize=8)
    figure.savefig(path, dpi=100)

    # The GIF: x_t above, the guess of x_0 below, and a bar as long as t. The end stands still.
    images = []
    for t, x_t, x_0 in walk[:: max(1, len(walk) // GIF_FRAMES)] + walk[-1:] * 15:
        pictures = np.concatenate([shapes.from_model(x_t), shapes.from_model(x_0)])
        grid = shapes.tile(pictures, columns=n, scale=5)
        bar = np.zeros((6, grid.shape[1]), dtype=np.float32)
        bar[:, : grid.shape[1] * t // ddpm.T] = 1
        images.append(Image.fromarray((np.concatenate([bar, grid]) * 255).astype(np.uint8)))
    images[0].save(
        path.with_suffix(".gif"), save_all=True, append_images=images[1:], duration=80, loop=0
    )


def save_explained(path, x):
    """Saves pictures in which every blob has the colour of its kind, red if it is none."""
    coloured = np.zeros((len(x), shapes.SIZE, shapes.SIZE, 3))
    for picture, white in zip(coloured, x[:, 0] > 0):
        for kind, blob in shapes.explain(white):
            picture[blob] = to_rgb(COLOURS[kind])
    grid = shapes.tile(coloured)
    height, width = grid.shape[:2]
    figure = Figure(figsize=(max(width, 560) / 100, height / 100 + 0.35), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid)
    axes.axis("off")
    for kind, colour in COLOURS.items():
        axes.plot([], [], color=colour, linewidth=5, label=kind or "not in the catalogue")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=100)


def print_score(x, run):
    """Prints the score of x, (n, 1, 32, 32), beside that of real pictures and of noise.

    run: the flags of the training, from the checkpoint.
    """
    training = shapes.make_dataset(run["samples"], run["seed"])
    rows = {
        "these samples": x,
        "held-out real pictures": shapes.to_model(shapes.make_dataset(len(x), [run["seed"], 2])),
        "pure noise": np.random.default_rng(0).uniform(-1, 1, x.shape),
    }
    shares = ("right", "right shapes", "copies", "distinct")
    head = "".join(f"{name:>13}" for name in shares)
    print(f"{'':<22}{head}   circ rect  tri line    1    2    3")
    for name, pictures in rows.items():
        s = shapes.score(pictures, training)
        counts = "".join(f"{count:>5}" for count in [*s["kinds"], *s["shapes"]])
        print(f"{name:<22}" + "".join(f"{s[share]:>13.1%}" for share in shares) + f"  {counts}")


@torch.no_grad()
def print_loss_by_t(model, schedule, run):
    """Prints the loss (Eq. 14) at several t, on 256 held-out pictures."""
    x_0 = torch.from_numpy(shapes.to_model(shapes.make_dataset(256, [run["seed"], 2])))
    x_0 = x_0.to(schedule.beta.device)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0.device)
    times, losses = (2, 20, 100, 300, 400, 500, 600, 700, 800, 1000), []
    for now in times:
        t = torch.full((len(x_0),), now, device=x_0.device)
        losses.append(ddpm.loss_fn(model, schedule, x_0, t, eps).item())
    print("t                " + "".join(f"{t:>8}" for t in times))
    print("loss times 10,000" + "".join(f"{1e4 * loss:>8.1f}" for loss in losses))


def save_steps_curve(path, model, schedule, n, seed):
    """Draws the share of right pictures against the number of steps, from the same noise."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for eta, text in ((0.0, "no fresh noise"), (1.0, "as much as Algorithm 2")):
        shares = []
        for steps in CURVE:
            x = draw(model, schedule, n, steps, seed, eta)[-1][1]
            shares.append(shapes.score(x)["right"])
            print(f"{steps} steps, eta = {eta:g}: {shares[-1]:.1%} of {n} right")
        axes.plot(CURVE, shares, "o-", label=f"$\\eta$ = {eta:g}: {text}")
    axes.set(xlabel="steps", ylabel=f"share of right pictures ({n})", xscale="log", ylim=(0, 1))
    axes.set_xticks(CURVE, CURVE)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def save_inside(path, model, schedule, seed):
    """Draws one pass through the network: what leaves each level, and where attention looks.

    The picture is one of the data, noised. Of each level it shows the two channels that vary most
    from pixel to pixel. Each panel has its own grey scale.
    """
    levels = [*model.down, model.middle, *model.up]
    seen = {}  # what each level and each softmax returned
    for module in [*levels, *(level.attention.softmax for level in levels[3:])]:
        module.register_forward_hook(lambda m, _, y: seen.__setitem__(m, y.float().cpu()))
    device = schedule.beta.device
    t = torch.tensor([INSIDE], device=device)
    x_0 = torch.from_numpy(shapes.to_model(shapes.make_dataset(1, [seed, 3])))  # (1, 1, 32, 32)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    x_t = ddpm.q_sample(schedule, x_0.to(device), t, eps.to(device))
    found = ddpm.predict_eps(model, x_t, t)
    guess = ddpm.predict_x_0(schedule, x_t, t, found)

    columns = [(f"$x_t$, t = {INSIDE}\n$x_0$", torch.cat([x_t.cpu(), x_0])[:, 0])]
    for place, level in zip(("down",) * 3 + ("middle",) + ("up",) * 3, levels):
        channels = seen[level][0]  # (C, H, W)
        two = channels[channels.var((1, 2)).topk(2).indices]  # (2, H, W)
        size = "x".join(map(str, channels.shape[1:]))
        columns.append((f"{place} {size}\n{len(channels)} channels", two))
    columns.append(("guess of $x_0$\nguess of $\\epsilon$", torch.cat([guess, found])[:, 0].cpu()))
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    grid = figure.subplots(3, len(columns))
    for axes in grid.flat:
        axes.axis("off")
    for column, (title, pictures) in zip(grid.T, columns):
        column[0].set_title(title, fontsize=9)
        for axes, picture in zip(column, pictures):
            axes.imshow(picture.numpy(), cmap="gray")

    # Below: the attention weights of one white pixel, the middle one in reading order.
    white = (x_0[0, 0] > 0).nonzero()  # (number of white pixels, 2)
    y, x = white[len(white) // 2].tolist()
    grid[2, 0].imshow(x_0[0, 0].numpy(), cmap="gray")
    grid[2, 0].plot(x, y, "o", color="red", markersize=4)
    for axes, level in zip(grid[2, 4:], levels[3:]):
        weights = seen[level.attention.softmax][0].mean(0)  # (M, M), the mean of all heads
        side = math.isqrt(len(weights))  # attention works on side x side places
        row, column = y * side // shapes.SIZE, x * side // shapes.SIZE  # the place of the pixel
        axes.imshow(weights[row * side + column].view(side, side).numpy(), cmap="gray", vmin=0)
        axes.plot(column, row, "o", color="red", markersize=4)
        axes.set_title("attention", fontsize=9)
    figure.savefig(path, dpi=100)


def main():
    flags = parser()
    args = flags.parse_args()
    what = args.what
    name, default, most, _ = DRAWN[what]
    n = default if args.n is None else args.n
    path = Path(args.output or name)
    if not 1 <= n <= most:
        flags.error(f"--n must be from 1 to {most} here")
    if not 1 <= args.steps <= ddpm.T or not 0 <= args.seed < 2**32:
        flags.error("--steps must be from 1 to 1000, --seed from 0 to 4294967295")
    if name and (path.suffix.lower() != ".png" or not path.parent.is_dir()):
        flags.error(f"--output {path} should be a .png in a folder that is there")
    checkpoint = args.checkpoint or (TRAINED if TRAINED.exists() else PRETRAINED)
    state, model = ddpm.load(checkpoint)
    device = ddpm.pick_device(args.device)
    schedule, model = ddpm.Schedule(device), model.to(device)
    print(f"{checkpoint}, {state['epoch']} epochs, on {device}")
    if what == "curve":
        save_steps_curve(path, model, schedule, n, args.seed)
    elif what == "inside":
        save_inside(path, model, schedule, args.seed)
    else:
        walk = draw(model, schedule, n, args.steps, args.seed, every=what == "process")
        x = walk[-1][1]  # (n, 1, 32, 32)
        if what == "score":
            print_score(x, state["run"])
            print_loss_by_t(model, schedule, state["run"])
            return
        if what == "process":
            save_process(path, walk)
            print(f"saved {path.with_suffix('.gif')}")
        elif what == "explain":
            save_explained(path, x)
        else:
            shapes.save_picture(path, shapes.tile(shapes.from_model(x), 8 if n <= 64 else 32))
    print(f"saved {path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, MemoryError, RuntimeError) as e:
        ddpm.exit_with(e)
