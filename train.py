"""Trains the diffusion model: python train.py, on CUDA, on MPS or on a CPU.

After every epoch it writes checkpoints/latest.pt (all that --resume needs), checkpoints/best.pt if
the validation loss is the lowest so far (what sample.py needs) and loss.png; every five epochs, and
after the last, a grid of samples. TensorBoard shows the same: tensorboard --logdir logs. Ctrl-C is
safe at any time.
"""

import argparse
import ctypes
import math
import shutil
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import ddpm
import shapes

OTHER_RATE = 1.6e-3  # peak rate of Adam, for biases, norms, and the first and last layer
WARMUP = 100  # steps in which the rates rise from 0: the first gradients say little
DECAY_FROM = 1000  # steps after which the rates fall as 1 / sqrt(step), however long the run is
CLIP = 1.0  # the largest norm of a gradient, all weights together
SAMPLE_EVERY = 5  # epochs between two grids of samples
GRID_PICTURES, GRID_STEPS = 64, 20  # samples of a grid, and the sampling steps for it
HELD_OUT = 512  # pictures for the validation loss


def parser():
    """The flags of train.py. modal_train.py has the same ones; a test compares them."""
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
    p.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto for what is there")
    p.add_argument("--checkpoints", default="checkpoints", metavar="DIR", help="where to save")
    p.add_argument("--logs", default="logs", metavar="DIR", help="where TensorBoard looks")
    return p


RUN = ("epochs", "samples", "batch_size", "lr", "seed")  # the flags that are saved with a run


def parse(argv):
    """Returns (args, checkpoint or None). With --resume, what is not given comes from latest.pt."""
    flags, saved = parser(), None
    args = flags.parse_args(argv)
    if args.resume:
        latest = Path(args.checkpoints) / "latest.pt"
        saved, _ = ddpm.load(latest)
        if "optimizers" not in saved or set(saved["run"]) != set(RUN):
            flags.error(f"{latest} holds no run of this program that can be resumed")
        flags.set_defaults(**saved["run"])
        args = flags.parse_args(argv)
        if any(getattr(args, flag) != saved["run"][flag] for flag in RUN[1:]):
            flags.error(f"only --epochs can change; this run was started with {saved['run']}")
    if not 1 <= args.batch_size <= args.samples:
        flags.error("--batch-size must be from 1 to --samples")
    if args.epochs < 1 or not 0 < args.lr < math.inf or not 0 <= args.seed < 2**32:
        flags.error("--epochs and --lr must be above 0, --seed from 0 to 4294967295")
    return args, saved


# ==== The optimizer ===============================================================================


def orthogonal(matrix):
    """About U V^T, if the matrix (..., m, n) is U S V^T: all its singular values become about 1.

    Divided by the norm they are at most 1. Three rounds of a polynomial act on each of them, with
    no need to compute U, S and V. Those above 0.03 end between 0.65 and 1.25; smaller ones grow at
    most 41 times. (Jordan et al. take five rounds.)
    """
    dtype = torch.bfloat16 if ddpm.fast_bfloat16(matrix.device.type) else torch.float32
    x = (matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(3):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """An optimizer for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    The gradient of a matrix is large in a few directions and small in most. Adam scales each number
    on its own, so a few directions still win. Muon moves about equally far in all directions.
    lr is the size of a step: about the root mean square of what it adds to a matrix.
    (torch.optim.Muon takes no convolutions, and computes in bfloat16 even where that is slow.)
    """

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        alike = {}  # matrices of one shape are stacked: a few large products, not many small ones
        for p in group["params"]:
            if p.grad is None:
                continue
            if "average" not in self.state[p]:
                self.state[p]["average"] = torch.zeros_like(p)
            average = self.state[p]["average"].lerp_(p.grad, 1 - group["momentum"])
            x = p.grad.lerp(average, group["momentum"])  # Nesterov: the newest gradient once more
            # A convolution (c_out, c_in, 3, 3) becomes a matrix with the smaller of c_out and c_in
            # as rows: the number of rows decides how long it takes.
            if len(x) > x.shape[1]:
                x = x.transpose(0, 1)  # (c_in, c_out, ...)
            alike.setdefault(x.shape, []).append((p, x.flatten(1)))
        for shape, pairs in alike.items():
            # A row of length 1 has k numbers, each about 1 / sqrt(k). Times sqrt(k) they are about
            # 1 in every matrix, so one lr fits all (Liu et al. 2025, arXiv 2502.16982).
            lr = group["lr"] * math.sqrt(math.prod(shape[1:]))
            for (p, _), x in zip(pairs, orthogonal(torch.stack([x for _, x in pairs]))):
                x = x.view(shape)
                p.add_(x.transpose(0, 1) if len(p) > p.shape[1] else x, alpha=-lr)


def optimizers_for(model, lr):
    """Muon for the matrices; Adam for biases, norms, and the first and last layer, which have only
    one channel on one side."""
    matrices = [p for p in model.parameters() if p.ndim > 1 and min(p.shape[:2]) > 1]
    others = [p for p in model.parameters() if p.ndim == 1 or min(p.shape[:2]) == 1]
    return Muon(matrices, lr), torch.optim.Adam(others, OTHER_RATE, betas=(0.9, 0.99), fused=True)


# ==== Small parts of the loop =====================================================================


def draw_data(n, seed, device):
    """n pictures for training, float (n, 1, 32, 32), on the device, where they stay."""
    return torch.from_numpy(shapes.to_model(shapes.make_dataset(n, seed))).to(device)


def mirror(x_0, generator):
    """Mirrors each picture at random, left-right, up-down and along the diagonal: (B, 1, 32, 32).

    The mirror image of a legal shape is legal, so this makes eight pictures of one. (Ho, Appendix
    B, mirrors left to right.)
    """
    coins = torch.rand(3, len(x_0), 1, 1, 1, generator=generator, device=x_0.device) < 0.5
    x_0 = torch.where(coins[0], x_0.flip(3), x_0)
    x_0 = torch.where(coins[1], x_0.flip(2), x_0)
    return torch.where(coins[2], x_0.transpose(2, 3), x_0)


@torch.no_grad()
def validation_loss(model, schedule, x_0):
    """Eq. 14 on held-out pictures, with t uniform and always the same noise."""
    t = torch.linspace(1, ddpm.T, len(x_0)).round().long().to(x_0.device)  # (n,)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)).to(x_0.device)
    parts = zip(x_0.split(64), t.split(64), eps.split(64))
    losses = [ddpm.loss_fn(model, schedule, *part) * len(part[0]) for part in parts]
    return (sum(losses) / len(x_0)).item()


def save_curve(path, history):
    """Draws the losses of every epoch, and the shares of right samples, against time."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    for axes, key, label, style in (
        (left, "train_loss", "training loss", "C0.-"),
        (left, "val_loss", "validation loss", "C1.-"),
        (right, "right", "right pictures", "C2o-"),
        (right, "right shapes", "right shapes", "C3o-"),
    ):
        rows = [row for row in history if key in row]
        axes.plot([row["minutes"] for row in rows], [row[key] for row in rows], style, label=label)
    left.set(xlabel="minutes", ylabel="loss (mean squared error)", yscale="log")
    right.set(ylabel="share of samples", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


def set_aside(folder):
    """Moves the files of an earlier run into a folder of their own, so that none is lost."""
    names = ("samples_*.png", "loss.png", "best.pt", "latest.pt")
    if files := [file for name in names for file in sorted(folder.glob(name))]:
        aside = folder / time.strftime("run_%Y-%m-%d_%H-%M-%S")
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
        print(f"{folder} held an earlier run: moved to {aside}")


# ==== Training ====================================================================================


def train(argv=None, name=None, after_epoch=lambda: None):
    """Trains. argv: the flags, default: those of the command line. name: of the run in
    TensorBoard, default: the time. after_epoch: called when the files of an epoch are written."""
    args, saved = parse(argv)
    device, folder = ddpm.pick_device(args.device), Path(args.checkpoints)
    torch.manual_seed(args.seed)
    schedule = ddpm.Schedule(device)
    model = ddpm.UNet(**saved["config"] if saved else {}).to(device)
    ema, optimizers = ddpm.EMA(model), optimizers_for(model, args.lr)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator = torch.Generator(device).manual_seed(args.seed)  # of everything random in training
    history, name = [], name or time.strftime("%Y-%m-%d_%H-%M-%S")
    if saved:
        try:
            model.load_state_dict(saved["model"])
            ema.model.load_state_dict(saved["ema"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            generator.set_state(saved["generator"])
            history, name = saved["history"], saved["name"]
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            reason = str(e).splitlines()[0]
            sys.exit(f"error: {folder / 'latest.pt'} cannot be resumed on {device}: {reason}")
    # A small network leaves a GPU waiting for its next kernel, a small program, to be launched.
    # Compiled, it needs far fewer. That takes Triton, a C compiler and Python's headers.
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if device == "cuda" and find_spec("triton") and shutil.which("cc") and headers.exists():
        model.compile()
        ema.model.compile()
    data = draw_data(args.samples, args.seed, device)
    held_out = draw_data(HELD_OUT, [args.seed, 1], device)
    batches = args.samples // args.batch_size  # the rest, less than a batch, is left out
    step = len(history) * batches

    folder.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(Path(args.logs) / name, purge_step=step + 1)
    if not saved:
        set_aside(folder)
    latest = folder / "latest.pt"
    written = latest.stat().st_mtime_ns if saved else None  # when this run wrote latest.pt
    number_type = "bfloat16" if ddpm.fast_bfloat16(device) else "float32"
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{device}, {number_type}: {parameters:,} parameters, {args.samples:,} pictures")
    if len(history) >= args.epochs:
        print(f"{latest} has {len(history)} epochs already; a larger --epochs goes on")
    bar = tqdm(total=args.epochs * batches, initial=step, unit="step")
    with writer, bar:
        for epoch in range(len(history) + 1, args.epochs + 1):
            start, losses = time.perf_counter(), []
            order = torch.randperm(len(data), generator=generator, device=device)
            for batch in order.split(args.batch_size)[:batches]:
                step += 1
                x_0 = mirror(data[batch], generator)  # (B, 1, 32, 32)
                loss = ddpm.training_loss(model, schedule, x_0, generator)
                model.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                factor = min(1, step / WARMUP, math.sqrt(DECAY_FROM / step))
                for optimizer, peak in zip(optimizers, peaks):
                    optimizer.param_groups[0]["lr"] = peak * factor
                    optimizer.step()
                ema.update(model, step)
                losses.append(loss.detach())
                bar.update()
                if step % 20 == 0:  # .item() waits for the GPU, so not at every step
                    bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)

            losses = torch.stack(losses).tolist()
            row = {"epoch": epoch, "train_loss": sum(losses) / batches}
            row["val_loss"] = validation_loss(ema.model, schedule, held_out)
            if not math.isfinite(sum(losses) + row["val_loss"]):
                sys.exit(f"error: the loss of epoch {epoch} is not finite; try a lower --lr")
            line = f"epoch {epoch}: loss {row['train_loss']:.4f}, validation {row['val_loss']:.4f}"
            if epoch % SAMPLE_EVERY == 0 or epoch == args.epochs:
                bar.set_postfix_str(f"drawing {GRID_PICTURES} samples")
                z = torch.Generator().manual_seed(0)  # draws the same noise every time
                x_T = torch.randn(GRID_PICTURES, 1, 32, 32, generator=z).to(device)
                x = ddpm.sample(ema.model, schedule, x_T, GRID_STEPS, generator=z).cpu()
                grid = shapes.tile(shapes.from_model(x), columns=16)
                shapes.save_picture(folder / f"samples_{epoch:04d}.png", grid)
                writer.add_image("samples", grid[None], step)
                counts = shapes.score(x)
                row |= {key: float(counts[key]) for key in ("right", "right shapes")}
                line += f", right: {row['right']:.0%} of pictures, "
                line += f"{row['right shapes']:.0%} of shapes"
                bar.set_postfix_str("")
            for i, value in enumerate(losses, start=step - batches + 1):
                writer.add_scalar("loss/train", value, i)
            for key in row.keys() & {"val_loss", "right", "right shapes"}:
                writer.add_scalar(key, row[key], step)
            minutes = (time.perf_counter() - start) / 60
            row["minutes"] = minutes + (history[-1]["minutes"] if history else 0)
            history.append(row)

            if written != (latest.stat().st_mtime_ns if latest.exists() else None):
                sys.exit(f"error: another training writes to {folder}; this one stops")
            state = {"config": model.config, "run": {flag: getattr(args, flag) for flag in RUN}}
            state |= {"epoch": epoch, "ema": ema.model.state_dict()}
            # best before latest: if the program is killed between the two, the epoch is done again.
            if row["val_loss"] == min(r["val_loss"] for r in history):
                small = {key: weight.half() for key, weight in state["ema"].items()}  # 16 bits
                ddpm.save(folder / "best.pt", state | {"ema": small})
            state |= {"model": model.state_dict(), "generator": generator.get_state()}
            state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            ddpm.save(latest, state | {"history": history, "name": name})
            save_curve(folder / "loss.png", history)
            after_epoch()
            written = latest.stat().st_mtime_ns
            bar.write(line)


def main():
    # Each step frees its tensors, and glibc gives their memory back to Linux, which hands it out
    # again page by page. Keeping it makes a step 17 % faster.
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, 32 MB
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    try:
        train()
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on after the last finished epoch")
        sys.exit(130)
    except (OSError, MemoryError, RuntimeError) as e:
        ddpm.exit_with(e)


if __name__ == "__main__":
    main()
