"""Turns noise into pictures with a trained network: python sample.py

python sample.py                    a grid of 16 pictures: samples.png
python sample.py --steps 50         the same in 50 steps instead of 1000
python sample.py --process          noise becoming pictures: process.png, process.gif
python sample.py --explain          every shape in the colour of its kind: explained.png
python sample.py --score --n 1000   how many of 1000 pictures are right, drawn in 50 steps
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch

os.environ["MPLBACKEND"] = "agg"  # a notebook may ask for a backend that is not installed
from matplotlib.figure import Figure
from tqdm import tqdm

import ddpm
import shapes

TRAINED = Path("checkpoints/best.pt")  # where train.py leaves its weights
PRETRAINED = Path(__file__).parent / "assets/pretrained.pt"  # until there are some
STRIP, GIF_FRAMES = 12, 32  # how many stops of the walk --process shows
LOSS_AT = (2, 20, 100, 300, 400, 500, 600, 700, 800, 1000)  # the t of --score


def parser():
    p = argparse.ArgumentParser(description="Draw pictures with a trained diffusion model.")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--process", "--show-process", action="store_true", help="draw the walk")
    what.add_argument("--explain", action="store_true", help="colour shapes by their kinds")
    what.add_argument("--score", action="store_true", help="print how many pictures are right")
    p.add_argument("--n", type=int, help="how many pictures (16; with --process 4, --score 500)")
    p.add_argument("--steps", type=int, help="1000 is Algorithm 2, fewer are DDIM (--score: 50)")
    p.add_argument("--eta", type=float, default=1.0, help="fresh noise, from 0 (none) to 1")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--checkpoint", metavar="PATH", help=f"default: {TRAINED}, else pretrained.pt")
    p.add_argument("--output", metavar="PATH", help="a .png; default: samples.png, process.png ...")
    there = ddpm.devices()
    p.add_argument("--device", choices=there, default=there[0], help="where to compute")
    return p


def parse(argv):
    """The flags, with the defaults that depend on other flags filled in."""
    flags = parser()
    args = flags.parse_args(argv)
    name, n = "samples.png", 16
    if args.process:
        name, n = "process.png", 4
    elif args.explain:
        name = "explained.png"
    elif args.score:
        n = 500
    args.n = n if args.n is None else args.n
    if args.steps is None:
        args.steps = 50 if args.score else ddpm.T
    args.output = Path(args.output or name)
    if not 1 <= args.n <= (16 if args.process else 10_000):
        flags.error("--n must be from 1 to 10000, with --process from 1 to 16")
    if not 1 <= args.steps <= ddpm.T or not 0 <= args.eta <= 1:
        flags.error("--steps must be from 1 to 1000, --eta from 0 to 1")
    if args.output.suffix.lower() != ".png" or not args.output.parent.is_dir():
        flags.error("--output must end in .png, and its folder must be there")
    return args


def evenly(walk, n):
    """n stops of a walk, evenly spaced, with both ends; all of them if there are fewer."""
    return [walk[i] for i in np.linspace(0, len(walk) - 1, min(n, len(walk))).astype(int)]


def save_process(path, walk):
    """Saves a strip of x_t with the guess of x_0 below each, and a GIF of the same. walk: list of
    (t, x_t, x_0), as the samplers yield them, on the CPU."""
    n = len(walk[0][1])
    stops = evenly(walk, STRIP)
    figure = Figure(figsize=(len(stops), 2.1 * n + 0.3), layout="constrained")
    grid = figure.subplots(2 * n, len(stops), squeeze=False)
    for column, (t, x_t, x_0) in enumerate(stops):
        grid[0, column].set_title(f"t = {t}", fontsize=9)
        for row in range(n):
            for axes, x in (grid[2 * row, column], x_t), (grid[2 * row + 1, column], x_0):
                axes.imshow(x[row, 0], cmap="gray", vmin=-1, vmax=1)
                axes.set(xticks=[], yticks=[])
    for row in range(n):
        grid[2 * row, 0].set_ylabel("$x_t$", fontsize=8)
        grid[2 * row + 1, 0].set_ylabel("guess of $x_0$", fontsize=8)
    figure.savefig(path, dpi=100)

    # The GIF: x_t above, the guess of x_0 below, and a bar as long as t. The end stands still.
    images = []
    for t, x_t, x_0 in evenly(walk, GIF_FRAMES) + walk[-1:] * 15:
        grid = shapes.tile(shapes.from_model(torch.cat([x_t, x_0])), columns=n)
        bar = np.full((6, grid.shape[1]), 0.3)  # neither black nor white: pages are
        bar[:, : grid.shape[1] * t // ddpm.T] = 0.7
        image = shapes.to_image(np.concatenate([bar, grid]))
        images.append(image.quantize(16))  # few greys, so a small file
    gif = path.with_suffix(".gif")
    images[0].save(gif, save_all=True, append_images=images[1:], duration=80, loop=0)


def print_score(x, flags):
    """Prints the score of x, (n, 1, 32, 32), beside that of real pictures and of noise. flags: of
    the training, from the checkpoint."""
    training = shapes.make_dataset(flags["samples"], flags["seed"])
    rows = {
        "these samples": x,
        "other real pictures": shapes.to_model(shapes.make_dataset(len(x), [flags["seed"], 2])),
        "pure noise": torch.randn(x.shape),
    }
    print(f"{'':<20}   right  copies distinct   circ rect  tri line    1    2    3")
    for name, pictures in rows.items():
        s = shapes.score(pictures, training)
        print(f"{name:<20}{s['right']:>8.1%}{s['copies']:>8.1%}{s['distinct']:>9.1%}  ", end="")
        print("".join(f"{count:>5}" for count in [*s["kinds"], *s["shapes"]]))


@torch.no_grad()
def print_loss_by_t(model, schedule, flags):
    """Prints the loss (Eq. 14) and the error in x_0 at several t, on 256 other real pictures."""
    device = schedule.beta.device
    x_0 = shapes.to_model(shapes.make_dataset(256, [flags["seed"], 2])).to(device)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(device)
    print("   t   loss (eps)   error in x_0")
    for t in LOSS_AT:
        times = torch.full((len(x_0),), t, device=device)
        loss = ddpm.loss_fn(model, schedule, x_0, times, eps)
        snr = schedule.alpha_bar[t] / schedule.one_minus_alpha_bar[t]
        print(f"{t:>4}{loss:>13.5f}{loss / snr:>15.5f}")


def main():
    args = parse(sys.argv[1:])
    checkpoint = args.checkpoint or (TRAINED if TRAINED.exists() else PRETRAINED)
    state, model = ddpm.load(checkpoint)
    schedule, model = ddpm.Schedule(args.device), model.to(args.device)
    print(f"{checkpoint}, epoch {state['epoch']}, on {args.device}")
    generator = torch.Generator().manual_seed(args.seed)
    x_T = torch.randn(args.n, 1, 32, 32, generator=generator).to(args.device)
    if args.steps == ddpm.T and args.eta == 1:
        walk = ddpm.algorithm_2(model, schedule, x_T, generator)
    else:
        walk = ddpm.ddim(model, schedule, x_T, args.steps, args.eta, generator)
    stops = []
    for t, x_t, x_0 in tqdm(walk, total=args.steps + 1, disable=None):
        if args.process or t == 0:
            stops.append((t, x_t.cpu(), x_0.cpu()))
    x = stops[-1][1]  # (n, 1, 32, 32)
    if args.score:
        print_score(x, state["flags"])
        print_loss_by_t(model, schedule, state["flags"])
        return
    if args.process:
        save_process(args.output, stops)
    elif args.explain:
        grid = shapes.tile(shapes.coloured((x[:, 0] > 0).numpy()))
        shapes.to_image(grid).save(args.output)
    else:
        grid = shapes.tile(shapes.from_model(x), columns=8 if args.n <= 16 else 16)
        shapes.to_image(grid).save(args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        sys.exit(f"error: {e}")
