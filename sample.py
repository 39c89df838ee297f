"""Turns noise into pictures with a trained network: python sample.py. With --process it shows how,
with --explain or --score whether they are right."""

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import ddpm
import shapes

DEVICE = str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
TRAINED = Path("checkpoints/best.pt")  # where train.py leaves its weights
PRETRAINED = Path(__file__).parent / "assets/pretrained.pt"  # until there are some


def parse(argv):
    p = argparse.ArgumentParser(description="Draw pictures with a trained diffusion model.")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--process", "--show-process", action="store_true", help="draw the walk")
    what.add_argument("--explain", action="store_true", help="colour shapes by their kinds")
    what.add_argument("--score", action="store_true", help="print right ones, copies and bound")
    p.add_argument("--n", type=int, help="how many pictures (16; --process: 4; --score: 500)")
    p.add_argument("--steps", type=int, help="of a walk, up to T (T = 1000; --score: 50)")
    p.add_argument("--eta", type=float, default=1.0, help="fresh noise, from 0 (none) to 1 (1)")
    p.add_argument("--seed", type=int, default=0, help="of the noise, for the same --n (0)")
    p.add_argument("--checkpoint", help=f"of train.py ({TRAINED}, else the supplied weights)")
    p.add_argument("--output", type=Path, help="a .png (samples.png, process.png, explained.png)")
    p.add_argument("--device", choices={"cpu", DEVICE}, default=DEVICE)
    args = p.parse_args(argv)
    kind = "process" if args.process else "explained" if args.explain else "samples"
    args.output = args.output or Path(f"{kind}.png")
    if args.n is None:
        args.n = 4 if args.process else 500 if args.score else 16
    possible = args.n > 0 and 0 <= args.eta <= 1 and 0 <= args.seed < 2**32
    if not possible or args.output.suffix != ".png" or not args.output.parent.is_dir():
        p.error("want --n > 0, --eta from 0 to 1, 0 <= --seed < 2**32, a .png in a folder there is")
    return args


@contextmanager
def reading(path):
    """Whatever is wrong with the checkpoint at path ends the program with one line."""
    try:
        yield
    except Exception as e:  # noqa: BLE001, a foreign file can be wrong in any way
        sys.exit(f"error: cannot use {path} as a checkpoint of train.py: {e!r:.200}")


def save_process(path, stops):
    """Saves the stops of a walk, each (t, x_t, x_0_hat): all as a GIF, a third as a strip."""
    frames = []
    for t, x_t, x_0_hat in stops:  # x_t in the upper row, the guess of x_0 in the lower one
        frames.append(shapes.tile(torch.cat([x_t, x_0_hat]), len(x_t), [f"t = {t}"]))
    colours = 16 if x_t.shape[1] == 1 else 256  # few greys make a small file
    first, *others = [frame.quantize(colours) for frame in frames + 15 * frames[-1:]]
    first.save(path.with_suffix(".gif"), save_all=True, append_images=others, duration=80, loop=0)
    some = stops[:-1:3] + stops[-1:]
    rows = torch.stack([torch.stack(pair, 1) for _, *pair in some], 2)  # (n, 2, columns, C, H, W)
    shapes.tile(rows.flatten(0, 2), len(some), [f"t = {t}" for t, *_ in some]).save(path)


def print_score(x, model, schedule, flags):
    """Prints how many of the samples x, and of new pictures, are right or copies; the bound."""
    training = shapes.make_dataset(flags["samples"], flags["seed"])
    new = shapes.make_dataset(4 * (schedule.T - 1), [flags["seed"], 2])
    for name, some in (("samples", x), ("new pictures", new[: len(x)])):
        right, copies = shapes.score(some, training)
        print(f"{len(some)} {name}: {right:.1%} right, {copies:.1%} copies of training pictures")
    torch.manual_seed(0)
    parts = new.to(schedule.beta.device).split(schedule.T - 1)
    bits = torch.stack([ddpm.bound(model, schedule, part).sum() for part in parts])  # (4,)
    print(f"bound: {bits.mean():.0f} ± {bits.std() / 2:.0f} bits a picture ({len(new)} new ones)")


def main(argv, network=ddpm.UNet):
    args = parse(argv)
    path = args.checkpoint or (TRAINED if TRAINED.exists() else PRETRAINED)
    with reading(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        shape, flags, epoch = saved["shape"], saved["flags"], len(saved["losses"])
        schedule = ddpm.Schedule(saved["beta"], args.device)
        model = network(channels=shape[0]).requires_grad_(False).eval()
        model.load_state_dict(saved["average"])
    model.to(args.device)
    print(f"{path}, epoch {epoch}, on {args.device}")
    if flags["data"] and (args.explain or args.score):
        sys.exit(f"error: {path} learned from {flags['data']}; --explain, --score are for shapes")
    if args.steps is None:
        args.steps = min(50, schedule.T) if args.score else schedule.T
    if not 1 <= args.steps <= schedule.T:
        sys.exit(f"error: --steps must be from 1 to {schedule.T}")

    generator = torch.Generator().manual_seed(args.seed)
    x_T = torch.randn(args.n, *shape, generator=generator).to(args.device)
    if args.steps == schedule.T and args.eta == 1:
        walk = ddpm.algorithm_2(model, schedule, x_T, generator)
    else:
        walk = ddpm.ddim(model, schedule, x_T, args.steps, args.eta, generator)
    shown, stops = {round(args.steps * i / 33) for i in range(34)}, []  # for --process
    for i, (t, x) in enumerate(tqdm(walk, total=args.steps + 1, disable=None)):
        if args.process and i in shown:
            times = torch.full((args.n,), t, device=x.device)  # (n,)
            x_0_hat = ddpm.predict_x_0(schedule, x, times, model(x, times)) if t else x
            stops.append((t, x, x_0_hat))
    if args.score:
        return print_score(x, model, schedule, flags)
    if args.process:
        save_process(args.output, stops)
    else:
        x = shapes.coloured(x) if args.explain else x
        shapes.tile(x, columns=8 if args.n <= 16 else 16).save(args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, torch.OutOfMemoryError, KeyboardInterrupt) as e:
        sys.exit(f"error: {str(e) or 'stopped'}")
