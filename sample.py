"""Turns noise into pictures with a trained network: python sample.py

python sample.py                    a grid of 16 pictures: samples.png
python sample.py --steps 50         the same in 50 steps instead of 1000
python sample.py --process          noise becoming pictures: process.png, process.gif
python sample.py --explain          every shape in the colour of its kind: explained.png
python sample.py --score --n 1000   how many of 1000 pictures are right, and the bound in bits
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import ddpm
import shapes

TRAINED = Path("checkpoints/best.pt")  # where train.py leaves its weights
PRETRAINED = Path(__file__).parent / "assets/pretrained.pt"  # until there are some


def parse(argv):
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    p = argparse.ArgumentParser(description="Draw pictures with a trained diffusion model.")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--process", "--show-process", action="store_true", help="draw the walk")
    what.add_argument("--explain", action="store_true", help="colour shapes by their kinds")
    what.add_argument("--score", action="store_true", help="print how many pictures are right")
    p.add_argument("--n", type=int, help="how many pictures (16; with --process 4, --score 500)")
    p.add_argument("--steps", type=int, help="1000 is Algorithm 2, fewer are DDIM (--score: 50)")
    p.add_argument("--eta", type=float, default=1.0, help="fresh noise, from 0 (none) to 1 (1)")
    p.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    p.add_argument("--checkpoint", metavar="PATH", help=f"({TRAINED}, else the supplied weights)")
    p.add_argument("--output", type=Path, help="a .png (samples.png, process.png, explained.png)")
    p.add_argument("--device", choices=sorted({"cpu", str(best)}), default=str(best))
    args = p.parse_args(argv)
    name, n, steps = "samples.png", 16, ddpm.T
    if args.process:
        name, n = "process.png", 4
    elif args.explain:
        name = "explained.png"
    elif args.score:
        n, steps = 500, 50
    args.n = n if args.n is None else args.n
    args.steps = steps if args.steps is None else args.steps
    args.output = Path(name) if args.output is None else args.output
    if not 1 <= args.n <= (16 if args.process else 10_000):
        p.error("--n must be from 1 to 10000, with --process from 1 to 16")
    if not 1 <= args.steps <= ddpm.T or not 0 <= args.eta <= 1:
        p.error("--steps must be from 1 to 1000, --eta from 0 to 1")
    if args.output.suffix.lower() != ".png" or not args.output.parent.is_dir():
        p.error("--output must end in .png, and its folder must be there")
    return args


def save_process(path, stops):
    """Saves a GIF of the stops, each (t, x_t, x_0_hat), and a strip of every third and the last."""
    n, strip = len(stops[0][1]), stops[:-1:3] + stops[-1:]
    figure = shapes.figure(len(strip), 2.1 * n + 0.3)
    grid = figure.subplots(2 * n, len(strip), squeeze=False)
    for column, (t, x_t, x_0_hat) in zip(grid.T, strip):
        column[0].set_title(f"t = {t}", fontsize=9)
        pictures = torch.cat([x_t, x_0_hat], dim=1).flatten(0, 1).numpy()  # (2 n, 32, 32)
        for axes, picture in zip(column, pictures):
            axes.imshow(picture, cmap="gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[])
    for row in range(0, 2 * n, 2):
        grid[row, 0].set_ylabel("$x_t$", fontsize=8)
        grid[row + 1, 0].set_ylabel("guess of $x_0$", fontsize=8)
    figure.savefig(path, dpi=100)

    frames = []  # x_t above, the guess of x_0 below, and a bar as long as t
    for t, x_t, x_0_hat in stops:
        sheet = shapes.tile(shapes.from_model(torch.cat([x_t, x_0_hat])), columns=n)
        frame = Image.new("RGB", (sheet.width, sheet.height + 6), (77, 77, 77))
        frame.paste((179, 179, 179), (0, 0, sheet.width * t // ddpm.T, 6))
        frame.paste(sheet, (0, 6))
        frames.append(frame.quantize(16))  # few greys, so a small file
    frames += 15 * [frames[-1]]  # the end stands still
    gif = path.with_suffix(".gif")
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=80, loop=0)


def print_score(x, model, schedule, flags):
    """Prints the score of samples x, (n, 1, 32, 32), beside that of real pictures, and the bound of
    the model. flags: of the training, from the checkpoint."""
    training = shapes.make_dataset(flags["samples"], flags["seed"])
    real = shapes.to_model(shapes.make_dataset(max(len(x), 3996), [flags["seed"], 2]))
    print(f"{'':<20}   right  copies distinct   circ rect  tri line    1    2    3")
    for name, pictures in (("these samples", x), ("other real pictures", real[: len(x)])):
        s = shapes.score(pictures, training)
        print(f"{name:<20}{s['right']:>8.1%}{s['copies']:>8.1%}{s['distinct']:>9.1%}  ", end="")
        print("".join(f"{count:>5}" for count in s["kinds"] + s["numbers"]))
    bits, generator = 0, torch.Generator().manual_seed(0)
    for x_0 in real[:3996].to(schedule.beta.device).split(999):  # four for each term
        bits += ddpm.bound(model, schedule, x_0, generator) / 4  # (T + 1,)
    print(f"bound: {bits[101:].sum():.1f} bits above t = 100 (entropy of the data: 17.3), ", end="")
    print(f"{bits[:101].sum():.1f} below; mean of 3,996 other real pictures")


def main(argv, network=ddpm.UNet):
    args = parse(argv)
    path = args.checkpoint or (TRAINED if TRAINED.exists() else PRETRAINED)
    schedule, model = ddpm.Schedule(args.device), network().requires_grad_(False)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["average"])
        flags, epochs = state["flags"], len(state["history"])
    except Exception as e:  # noqa: BLE001, a foreign file can be wrong in any way
        sys.exit(f"error: cannot load {path}: {e!r}")
    model.to(args.device)
    print(f"{path}, epoch {epochs}, on {args.device}")
    generator = torch.Generator().manual_seed(args.seed)
    x_T = torch.randn(args.n, 1, 32, 32, generator=generator).to(args.device)
    if args.steps == ddpm.T and args.eta == 1:
        walk = ddpm.algorithm_2(model, schedule, x_T, generator)
    else:
        walk = ddpm.ddim(model, schedule, x_T, args.steps, args.eta, generator)
    shown = [round(args.steps * i / 33) for i in range(34)]  # for --process
    stops = []
    for i, (t, x) in enumerate(tqdm(walk, total=args.steps + 1, disable=None)):
        if args.process and i in shown:
            times = torch.full((args.n,), t, device=x.device)  # (n,)
            x_0_hat = ddpm.predict_x_0(schedule, x, times, model(x, times))  # x itself at t = 0
            stops.append((t, x.cpu(), x_0_hat.cpu()))
    x = x.cpu()  # x_0
    if args.score:
        return print_score(x, model, schedule, flags)
    if args.process:
        save_process(args.output, stops)
    elif args.explain:
        shapes.tile(shapes.coloured((x[:, 0] > 0).numpy())).save(args.output)
    else:
        shapes.tile(shapes.from_model(x), columns=8 if args.n <= 16 else 16).save(args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")
