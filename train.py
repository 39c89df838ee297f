"""Trains the network: python train.py, on CUDA, MPS or a CPU, whatever is there.

Each epoch it saves checkpoints/latest.pt (for --resume), if it is the best so far also best.pt (for
sample.py), and the curve loss.png. To watch it in TensorBoard: tensorboard --logdir logs
"""

import argparse
import copy
import io
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import ddpm
import shapes

FLAGS = ("epochs", "samples", "batch_size", "lr", "seed")  # those that a checkpoint keeps


def parse(argv):
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    p = argparse.ArgumentParser(description="Train the diffusion model.")
    p.add_argument("--epochs", type=int, help="passes over the training pictures (100)")
    p.add_argument("--samples", type=int, default=10_000, help="training pictures to draw (10000)")
    p.add_argument("--batch-size", type=int, default=64, help="pictures in a step (64)")
    p.add_argument("--lr", type=float, default=2e-4, help="learning rate at step 16000 (2e-4)")
    p.add_argument("--seed", type=int, default=0, help="of data, weights and noise (0)")
    again = "go on from latest.pt, with its flags; of those above only --epochs may be new"
    p.add_argument("--resume", action="store_true", help=again)
    p.add_argument("--device", choices=sorted({"cpu", str(best)}), default=str(best))
    p.add_argument("--bf16", action="store_true", help="for processors that are fast in bfloat16")
    p.add_argument("--checkpoints", default="checkpoints", metavar="DIR", help="(checkpoints)")
    p.add_argument("--logs", default="logs", metavar="DIR", help="for TensorBoard (logs)")
    args = p.parse_args(argv)
    if not 1 <= args.batch_size <= args.samples:
        p.error("--batch-size must be from 1 to --samples")
    if args.epochs == 0 or not 0 < args.lr < 1 or args.seed < 0:
        p.error("--epochs and --lr must be above 0, --seed not below")
    return args


def rate(step):
    """BEYOND THE PAPER, where it is 1: the learning rate in units of --lr. It rises for 500 steps, as
    the first gradients say little, and falls until step 16,000, for small corrections. Price: @@"""
    return min(8 * (step + 1) / 500, 8, 16_000 / (step + 1))


def triangle_t(n, generator):
    """BEYOND THE PAPER, where t is uniform: n values of t, int64 (n,), in 1..T. As the mean of two
    uniform draws, most lie near T / 2, where pictures are decided. Every 16th is uniform: otherwise
    the last steps would hardly be trained and leave grey pixels. Price: @@"""
    a, b = torch.randint(1, ddpm.T + 1, (2, n), generator=generator)  # (n,) each
    t = (a + b) // 2
    t[::16] = a[::16]
    return t


def save(path, state):
    """Writes a new file, then puts it in place of the old one, so that a whole one is always there."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    Path(f"{path}.tmp").write_bytes(buffer.getbuffer())
    os.replace(f"{path}.tmp", path)


def save_curve(path, history):
    figure = shapes.figure(8, 3)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "bits")):
        axes.plot(range(1, len(history) + 1), [row[name] for row in history], ".-")
        axes.set(xlabel="epoch", ylabel=name, yscale="log")
    figure.savefig(path, dpi=120)


def main(argv, network=ddpm.UNet):
    args = parse(argv)
    folder, latest = Path(args.checkpoints), Path(args.checkpoints) / "latest.pt"
    torch.manual_seed(args.seed)
    schedule = ddpm.Schedule(args.device)
    model = network().to(args.device, memory_format=torch.channels_last)  # the faster layout
    average = copy.deepcopy(model).requires_grad_(False)
    # BEYOND THE PAPER, where betas[1] is 0.999. Price: @@
    optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.99), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    parts = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler}
    history, run = [], time.strftime("%Y-%m-%d_%H-%M-%S")
    if args.resume:
        try:
            saved = torch.load(latest, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            history, run = saved["history"], saved["run"]
            vars(args).update(saved["flags"], epochs=args.epochs or saved["flags"]["epochs"])
        except Exception as e:  # noqa: BLE001, a foreign file can be wrong in any way
            sys.exit(f"error: cannot go on from {latest}: {e!r}")
    args.epochs = args.epochs or 100
    flags = {name: getattr(args, name) for name in FLAGS}
    print(f"on {args.device}: {flags}", flush=True)
    if len(history) >= args.epochs:
        print(f"{latest} has all {len(history)} epochs; more --epochs go on")
        return
    data = shapes.to_model(shapes.make_dataset(args.samples, args.seed))  # (samples, 1, 32, 32)
    others = shapes.to_model(shapes.make_dataset(999, [args.seed, 1])).to(args.device)
    net = torch.autocast(args.device, torch.bfloat16)(model.forward) if args.bf16 else model
    writer = SummaryWriter(Path(args.logs) / run)

    for epoch in range(len(history) + 1, args.epochs + 1):
        generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
        batches = torch.randperm(len(data), generator=generator).split(args.batch_size)
        full = batches[: len(data) // args.batch_size]
        losses = []
        for batch in tqdm(full, desc=f"epoch {epoch}", leave=False, disable=None):
            x_0 = shapes.mirror(data[batch], generator).to(args.device)  # (B, 1, 32, 32)
            losses.append(ddpm.algorithm_1(net, schedule, optimizer, x_0, generator, triangle_t))
            scheduler.step()
            # Samples come from an average of the weights, as noisy gradients shake them (Ho, Appendix
            # B). BEYOND THE PAPER it is over the last ninth of all steps, not over the last 10,000,
            # which in a short run would still be mostly the random weights of the start.
            with torch.no_grad():
                for mean, p in zip(average.parameters(), model.parameters()):
                    mean.lerp_(p, 9 / (10 + scheduler.last_epoch))

        # The bound above t = 100 says which shapes stand where. It chooses best.pt.
        bits = ddpm.bound(average, schedule, others, torch.Generator().manual_seed(0))[101:].sum()
        row = {"loss": torch.stack(losses).mean().item(), "bits": bits.item()}
        if not math.isfinite(sum(row.values())):
            sys.exit(f"error: the loss of epoch {epoch} is not finite; try a lower --lr")
        folder.mkdir(parents=True, exist_ok=True)
        if epoch == 1 and latest.exists():  # --resume was forgotten: keep the older run's files
            aside = folder / f"before_{run}"
            aside.mkdir()
            for name in ("latest.pt", "best.pt", "loss.png", "samples_*.png"):
                for file in folder.glob(name):
                    file.rename(aside / file.name)
        if epoch % 5 == 0 or epoch == args.epochs:
            generator = torch.Generator().manual_seed(0)
            x_T = torch.randn(64, 1, 32, 32, generator=generator).to(args.device)
            *_, (_, x_0) = ddpm.ddim(average, schedule, x_T, 20, 1, generator)
            row["right"] = shapes.score(x_0.cpu())["right"]
            grid = shapes.tile(shapes.from_model(x_0.cpu()), columns=16)
            grid.save(folder / f"samples_{epoch:04d}.png")
            writer.add_image("samples", np.asarray(grid), epoch, dataformats="HWC")
        for name, value in row.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()
        history.append(row)
        state = {"flags": flags, "run": run, "history": history}
        # best before latest: if the program is killed between the two, the epoch is done again.
        if row["bits"] == min(past["bits"] for past in history):
            half = {name: weight.half() for name, weight in average.state_dict().items()}
            save(folder / "best.pt", {**state, "average": half})
        save(latest, {**state, **{name: part.state_dict() for name, part in parts.items()}})
        save_curve(folder / "loss.png", history)
        print(f"epoch {epoch}:", ", ".join(f"{name} {row[name]:.4g}" for name in row), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on after the last finished epoch")
    except OSError as e:
        sys.exit(f"error: {e}")
