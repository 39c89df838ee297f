"""Trains the network on CUDA, MPS or a CPU, whatever is there: python train.py. With --data FOLDER
it learns from your pictures, with --resume it goes on after the last epoch that was saved."""

import argparse
import copy
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import ddpm
import sample
import shapes


def parse(argv):
    p = argparse.ArgumentParser(description="Train the diffusion model.")
    p.add_argument("--data", type=os.path.abspath, help="a folder of pictures (else: shapes)")
    p.add_argument("--epochs", type=int, help="passes over the pictures (100)")
    p.add_argument("--samples", type=int, default=10_000, help="fewest pictures an epoch (10000)")
    p.add_argument("--batch-size", type=int, default=64, help="pictures in a step (64)")
    p.add_argument("--lr", type=float, default=1.6e-3, help="highest learning rate (1.6e-3)")
    p.add_argument("--seed", type=int, default=0, help="of shapes, weights and noise (0)")
    p.add_argument("--resume", action="store_true", help="go on; of the above only --epochs counts")
    p.add_argument("--device", choices={"cpu", sample.DEVICE}, default=sample.DEVICE)
    p.add_argument("--checkpoints", type=Path, default="checkpoints", help="(checkpoints)")
    p.add_argument("--logs", type=Path, default="logs", help="for TensorBoard (logs)")
    args = p.parse_args(argv)
    possible = 1 <= args.batch_size <= args.samples and args.lr > 0 and 0 <= args.seed < 2**32
    if not (possible or args.resume) or (args.epochs is not None and args.epochs < 1):
        p.error("want --epochs > 0, 0 < --batch-size <= --samples, --lr > 0, 0 <= --seed < 2**32")
    return args


def rate(step):
    """The learning rate as a share of --lr: reached after 500 steps, falls as 1/step from step
    2,000 on. BEYOND THE PAPER, where it is constant: in a short run, first fast, then fine."""
    return min((step + 1) / 500, 1, 2000 / (step + 1))


def set_aside(folder, run):
    """Moves the files of an older run, if there is one, to a folder named after the new run."""
    if (folder / "latest.pt").exists() or (folder / "best.pt").exists():
        aside = folder / f"before_{run}"
        aside.mkdir(exist_ok=True)  # Modal may repeat a call that was interrupted here
        for name in ("best.pt", "loss.png", "data.png", "samples_*.png", "latest.pt"):
            for file in folder.glob(name):
                file.rename(aside / file.name)
        print(f"the files of an older run are now in {aside}", flush=True)


def save(path, state):
    """Writes a file beside the old one, then replaces it: there is always a whole one."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(state, file)
    path.with_suffix(".tmp").replace(path)


def train_epoch(model, average, optimizer, scheduler, schedule, data, flags, epoch):
    """Algorithm 1 on the pictures data, (n, C, H, W), in random order. Returns the mean loss."""
    torch.manual_seed(1000 * flags["seed"] + epoch)  # of order, noise and, if any, dropout
    order = torch.randperm(max(flags["samples"], len(data))) % len(data)
    full = order.unfold(0, flags["batch_size"], flags["batch_size"])  # (batches, batch size)
    losses = []
    for chosen in tqdm(full, f"epoch {epoch}", leave=False, disable=None):
        x_0 = data[chosen] if flags["data"] else shapes.mirror(data[chosen])
        losses.append(ddpm.algorithm_1(model, schedule, optimizer, x_0.to(schedule.beta.device)))
        scheduler.step()
        # Samples use an average of the weights (Ho, Appendix B). BEYOND THE PAPER: mainly of the
        # last ninth of the steps. Ho's decay of 0.9999 would long remember the random start.
        for mean, p in zip(average.parameters(), model.parameters()):
            mean.lerp_(p.detach(), 9 / (10 + scheduler.last_epoch))
    for kept, buffer in zip(average.buffers(), model.buffers()):  # those of a batch norm, say
        kept.copy_(buffer)
    return torch.stack(losses).mean().item()


def main(argv, network=ddpm.UNet):
    from matplotlib.figure import Figure  # not above: it looks at MPLBACKEND, see below

    args = parse(argv)
    latest = args.checkpoints / "latest.pt"
    run = time.strftime(f"%Y-%m-%d_%H-%M-%S_{os.getpid()}")  # two may begin in one second
    flags = {key: getattr(args, key) for key in ("data", "samples", "batch_size", "lr", "seed")}
    state = {"flags": flags, "run": run, "losses": [], "beta": ddpm.BETA}
    if args.resume:
        with sample.reading(latest):
            saved = torch.load(latest, map_location="cpu", weights_only=True)
            state = {key: saved[key] for key in (*state, "shape")}
    flags, losses = state["flags"], state["losses"]
    flags["epochs"] = args.epochs or flags.get("epochs", 100)
    if len(losses) >= flags["epochs"]:
        return print(f"all {len(losses)} epochs are done; --epochs asks for more")
    if flags["data"]:
        data = shapes.load_pictures(flags["data"])
    else:
        data = shapes.make_dataset(flags["samples"], flags["seed"])
    if args.resume and data.shape != (flags["pictures"], *state["shape"]):
        sys.exit(f"error: {flags['data']} has other pictures than {latest} has seen")
    flags["pictures"], state["shape"] = len(data), tuple(data.shape[1:])

    torch.manual_seed(flags["seed"])
    schedule = ddpm.Schedule(state["beta"], args.device)
    model = network(channels=data.shape[1]).to(args.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    # BEYOND THE PAPER, where betas[1] is 0.999: Adam forgets large gradients sooner.
    optimizer = torch.optim.Adam(model.parameters(), flags["lr"], betas=(0.9, 0.99), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    parts = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler}
    if args.resume:
        with sample.reading(latest):
            for name, part in parts.items():
                part.load_state_dict(saved[name])

    args.checkpoints.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(args.logs / state["run"])
    if not args.resume:
        set_aside(args.checkpoints, run)
    shapes.tile(data[:64], columns=16).save(args.checkpoints / "data.png")
    print(f"{len(losses)} epochs are done, on {args.device}, {flags}", flush=True)
    for epoch in range(len(losses) + 1, flags["epochs"] + 1):
        losses.append(train_epoch(*parts.values(), schedule, data, flags, epoch))
        if not np.isfinite(losses[-1]):
            sys.exit(f"error: the loss of epoch {epoch} is not finite; begin anew, with less --lr")
        if losses[-1] == min(losses):
            half = copy.deepcopy(average).half().state_dict()
            save(args.checkpoints / "best.pt", {**state, "average": half})
        save(latest, {**state, **{name: part.state_dict() for name, part in parts.items()}})
        print(f"epoch {epoch}: loss {losses[-1]:.4g}", flush=True)
        writer.add_scalar("loss", losses[-1], epoch)
        if epoch % 5 == 0 or epoch == flags["epochs"]:
            torch.manual_seed(0)  # so that the same noise becomes better pictures
            x_T = torch.randn(64, *state["shape"]).to(args.device)
            *_, (_, x_0) = ddpm.ddim(average, schedule, x_T, min(20, schedule.T), eta=1)
            sheet = shapes.tile(x_0, columns=16)
            sheet.save(args.checkpoints / f"samples_{epoch:04d}.png")
            writer.add_image("samples", np.asarray(sheet), epoch, dataformats="HWC")
            if not flags["data"]:
                print(f"of 64 samples {shapes.score(x_0, data)[0]:.0%} are right", flush=True)
        writer.flush()
        axes = Figure(figsize=(6, 3), layout="constrained").subplots()
        axes.semilogy(range(1, epoch + 1), losses, ".-")
        axes.set(xlabel="epoch", ylabel="loss")
        axes.figure.savefig(args.checkpoints / "loss.png", dpi=120)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # a notebook may ask for a backend that is not installed
    try:
        main(sys.argv[1:])
    except (OSError, torch.OutOfMemoryError, KeyboardInterrupt) as e:
        sys.exit(f"error: {str(e) or 'stopped; --resume goes on after the last saved epoch'}")
