"""Trains the diffusion model: python train.py, on CUDA, on MPS or on a CPU.

After every epoch it writes checkpoints/latest.pt (all that --resume needs), checkpoints/best.pt if
the validation loss is the lowest so far (what sample.py needs) and loss.png; every five epochs, and
after the last, a grid of samples. TensorBoard shows the same: tensorboard --logdir logs.
"""

import argparse
import copy
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import ddpm
import shapes

ADAM_RATE = 1.6e-3  # peak rate of Adam, for biases, norms, and the first and last layer
WARMUP = 100  # steps in which the rates rise from 0: the first gradients say little
DECAY_FROM = 1000  # steps after which the rates fall as 1 / sqrt(step): BEYOND THE PAPER
CLIP = 1.0  # the largest norm of a gradient, all weights together
EMA_DECAY = 0.9995  # the average is over about the last 1 / (1 - 0.9995) = 2000 steps
SAMPLE_EVERY = 5  # epochs between two grids of samples
GRID_PICTURES, GRID_STEPS = 64, 20  # samples of a grid, and the sampling steps for it
VALIDATION = 512  # pictures for the validation loss
RUN = ("epochs", "samples", "batch_size", "lr", "seed")  # the flags that are saved with a run


def parser():
    """The flags."""
    p = argparse.ArgumentParser(
        description="Train a diffusion model on 32x32 pictures of shapes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--epochs", type=int, default=100, help="passes over the training pictures")
    p.add_argument("--samples", type=int, default=10_000, help="training pictures to draw")
    p.add_argument("--batch-size", type=int, default=64, help="training pictures per step")
    p.add_argument("--lr", type=float, default=2e-4, help="peak rate of the weight matrices")
    p.add_argument("--seed", type=int, default=0, help="of data, weights and noise")
    p.add_argument("--resume", action="store_true", help="go on from latest.pt, with its flags")
    p.add_argument("--compile", action="store_true", help="use torch.compile, for GPUs")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto for what is there")
    p.add_argument("--checkpoints", default="checkpoints", metavar="DIR", help="where to save")
    p.add_argument("--logs", default="logs", metavar="DIR", help="where TensorBoard looks")
    return p


def parse(argv):
    """Returns (args, checkpoint or None). With --resume, what is not given comes from latest.pt."""
    flags, saved = parser(), None
    args = flags.parse_args(argv)
    if args.resume:
        saved, _ = ddpm.load(Path(args.checkpoints) / "latest.pt")
        flags.set_defaults(**saved["flags"])
        args = flags.parse_args(argv)
        for name in RUN[1:]:
            if getattr(args, name) != saved["flags"][name]:
                flags.error(f"--resume takes all but --epochs from the run: {saved['flags']}")
    if not 1 <= args.batch_size <= args.samples:
        flags.error("--batch-size must be from 1 to --samples")
    if args.epochs < 1 or not 0 < args.lr < math.inf or not 0 <= args.seed < 2**32:
        flags.error("--epochs and --lr must be above 0, --seed from 0 to 4294967295")
    return args, saved


# ==== The optimizers ==============================================================================
#
# BEYOND THE PAPER, which takes Adam for all: Muon (Jordan et al. 2024,
# kellerjordan.github.io/posts/muon) for the weight matrices. The gradient of a matrix is large in a
# few directions and small in most. Adam scales each number on its own, so a few directions still
# win. Muon moves about equally far in all. To do without it, let `optimizers_for` return Adam only.


def orthogonal(x):
    """About U V^T, if the matrix x is U S V^T: all its singular values become about 1.

    Divided by the norm they are at most 1. Three rounds of a polynomial act on each of them, with
    no need to compute U, S and V: those above 0.03 end between 0.65 and 1.25. (Jordan et al. take
    five rounds.)
    """
    x = x / (x.norm() + 1e-7)
    if ddpm.fast_bfloat16(x.device.type):
        x = x.bfloat16()
    for _ in range(3):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.float()


class Muon(torch.optim.Optimizer):
    """Muon. lr: about the root mean square of what a step adds to a matrix."""

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for p in group["params"]:
            if "average" not in self.state[p]:
                self.state[p]["average"] = torch.zeros_like(p)
            average = self.state[p]["average"].lerp_(p.grad, 1 - group["momentum"])
            x = p.grad.lerp(average, group["momentum"])  # Nesterov: the newest gradient once more
            x = x.flatten(1)  # a convolution (c_out, c_in, 3, 3) as a matrix (c_out, 9 c_in)
            m, n = x.shape
            x = orthogonal(x) if m <= n else orthogonal(x.mT).mT  # its squares are then small
            # Rows or columns of length 1 hold numbers of about 1 / sqrt(max(m, n)). Times this root
            # they are about 1 in every matrix, so one lr fits all.
            p.add_(x.view_as(p), alpha=-group["lr"] * math.sqrt(max(m, n)))


def optimizers_for(model, lr):
    """Muon for the matrices; Adam for biases, norms, and the first and last layer."""
    ends = {model.stem.weight, model.out.weight}
    matrices = [p for p in model.parameters() if p.ndim > 1 and p not in ends]
    others = [p for p in model.parameters() if p.ndim == 1 or p in ends]
    return Muon(matrices, lr), torch.optim.Adam(others, ADAM_RATE, betas=(0.9, 0.99), fused=True)


@torch.no_grad()
def update_average(average, model, step):
    """Moves the exponential moving average (EMA) of the weights; call after step 1, 2, ...

    Each step follows the gradient of one small batch, which is noisy. The average is less so:
    samples come from it (Ho, Appendix B). Training goes on at the raw weights, since one step hardly
    moves the average: a gradient there would not see what the step has done. At first the average
    is over the last ninth of the steps only, without the random start.
    """
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_([*average.parameters()], [*model.parameters()], 1 - decay)


# ==== Once an epoch ===============================================================================


@torch.no_grad()
def validation_loss(model, schedule, x_0):
    """The training loss on other pictures, always with the same t and noise."""
    generator = torch.Generator().manual_seed(1)
    t = ddpm.draw_t(len(x_0), generator).to(x_0.device)
    eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
    return ddpm.loss_fn(model, schedule, x_0, t, eps).item()


def save_curve(path, history):
    """Draws the losses of every epoch, and the shares of right samples, against time."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    left = figure.subplots()
    left.set(xlabel="minutes", ylabel="loss (mean squared error)", yscale="log")
    right = left.twinx()
    right.set(ylabel="share of right samples", ylim=(0, 1))
    lines = (left, "loss", "C0-"), (left, "validation", "C1-"), (right, "right", "C2o-")
    for axes, key, style in lines:
        rows = [row for row in history if key in row]
        axes.plot([row["minutes"] for row in rows], [row[key] for row in rows], style, label=key)
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)


def claim(folder, name, epoch):
    """Makes sure, before epoch `epoch` of run `name` is saved, that the folder belongs to this run.

    An older run is moved into a folder of its own. If another one has saved since, this one ends.
    """
    latest = folder / "latest.pt"
    if epoch > 1 and latest.exists():
        last, _ = ddpm.load(latest)
        if (last["name"], last["epoch"]) != (name, epoch - 1):
            sys.exit(f"error: another training writes to {folder}; this one stops")
    elif latest.exists():
        aside = folder / f"before_{name}"
        aside.mkdir()
        for file in [*folder.glob("*.pt"), *folder.glob("*.png")]:
            file.rename(aside / file.name)
        tqdm.write(f"{folder} held an older run: moved to {aside}")


# ==== Training ====================================================================================


def train_epoch(model, average, optimizers, schedule, data, args, epoch, bar):
    """Algorithm 1, once through the data. Returns the mean loss."""
    # Every epoch has a seed of its own, so a resumed run is the same as one that never stopped.
    seed = np.random.SeedSequence([args.seed, epoch]).generate_state(1).item()
    generator = torch.Generator(data.device).manual_seed(seed)
    order = torch.randperm(len(data), generator=generator, device=data.device)
    batches = order.split(args.batch_size)[: len(data) // args.batch_size]  # only full ones
    losses = []
    for step, batch in enumerate(batches, start=(epoch - 1) * len(batches) + 1):
        x_0 = shapes.mirror(data[batch], generator)  # (B, 1, 32, 32)
        t = ddpm.draw_t(len(x_0), generator, x_0.device)  # (B,)
        eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        loss = ddpm.loss_fn(model, schedule, x_0, t, eps)  # Eq. 14
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        rate = min(1, step / WARMUP, math.sqrt(DECAY_FROM / step))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate
            optimizer.step()
        update_average(average, model, step)
        losses.append(loss.detach())
        bar.update()
    return torch.stack(losses).mean().item()


def train(args, saved, name, after_epoch=lambda: None):
    """Trains. args, saved: what parse returns. name: of a new run. after_epoch: called when the
    files of an epoch are written."""
    device, folder = ddpm.pick_device(args.device), Path(args.checkpoints)
    torch.manual_seed(args.seed)
    schedule, model, history = ddpm.Schedule(device), ddpm.UNet().to(device), []
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = optimizers_for(model, args.lr)
    if saved:
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        history = saved["history"]
    if args.compile:
        model.compile()
        average.compile()
    data = shapes.to_model(shapes.make_dataset(args.samples, args.seed)).to(device)
    validation = shapes.to_model(shapes.make_dataset(VALIDATION, [args.seed, 1])).to(device)
    folder.mkdir(parents=True, exist_ok=True)
    number_type = "bfloat16" if ddpm.fast_bfloat16(device) else "float32"
    print(f"{device}, {number_type}, {args.samples:,} pictures", flush=True)

    batches = args.samples // args.batch_size
    bar = tqdm(total=args.epochs * batches, initial=len(history) * batches, disable=None)
    writer = SummaryWriter(Path(args.logs) / name)
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        row = {"loss": train_epoch(model, average, optimizers, schedule, data, args, epoch, bar)}
        row["validation"] = validation_loss(average, schedule, validation)
        if not math.isfinite(row["loss"] + row["validation"]):
            sys.exit(f"error: the loss of epoch {epoch} is not finite; try a lower --lr")
        claim(folder, name, epoch)
        if epoch % SAMPLE_EVERY == 0 or epoch == args.epochs:
            x = ddpm.sample(average, schedule, GRID_PICTURES, GRID_STEPS).cpu()
            row["right"] = shapes.score(x)["right"]
            grid = shapes.tile(shapes.from_model(x), columns=16)
            shapes.save_picture(folder / f"samples_{epoch:04d}.png", grid)
            writer.add_image("samples", grid[None], epoch)
        for key, value in row.items():
            writer.add_scalar(key, value, epoch)
        text = ", ".join(f"{key} {value:.4f}" for key, value in row.items())
        minutes = (time.perf_counter() - start) / 60
        row["minutes"] = minutes + (history[-1]["minutes"] if history else 0)
        history.append(row)

        state = {"config": model.config, "flags": {flag: getattr(args, flag) for flag in RUN}}
        state.update(name=name, epoch=epoch, history=history, ema=average.state_dict())
        # best before latest: if the program is killed between the two, the epoch is done again.
        if row["validation"] == min(earlier["validation"] for earlier in history):
            half = {key: weight.half() for key, weight in state["ema"].items()}  # 16 bits
            ddpm.save(folder / "best.pt", {**state, "ema": half})
        state["model"] = model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        ddpm.save(folder / "latest.pt", state)
        save_curve(folder / "loss.png", history)
        after_epoch()
        tqdm.write(f"epoch {epoch}: {text}")
        sys.stdout.flush()
    bar.close()
    writer.close()


def main():
    args, saved = parse(sys.argv[1:])
    name = saved["name"] if saved else time.strftime(f"%Y-%m-%d_%H-%M-%S_{os.getpid()}")
    try:
        train(args, saved, name)
    except KeyboardInterrupt:
        latest = Path(args.checkpoints) / "latest.pt"
        if latest.exists() and ddpm.load(latest)[0]["name"] == name:
            print("\nstopped; the same command with --resume goes on after the last epoch")
        else:
            print("\nstopped in the first epoch: nothing was saved")
        sys.exit(130)
    except OSError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
