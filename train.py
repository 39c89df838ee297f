"""Trains the diffusion model: python train.py, on CUDA, on MPS or on a CPU.

Writes checkpoints/latest.pt after every epoch, checkpoints/best.pt whenever the validation
loss is the lowest so far, and beside them samples_*.png and loss.png. The same curves and
samples are in TensorBoard: tensorboard --logdir logs. Ctrl-C stops, --resume goes on.
"""

import argparse
import errno
import math
import os
import shlex
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import ddpm
import shapes
from shapes import fail, number

FORMAT = 2  # of a checkpoint; raise it when old ones can no longer be read
RUN = ("epochs", "samples", "batch_size", "lr", "seed")  # the flags that define a run
WARMUP = 100  # steps in which the learning rate rises: Adam's averages are empty
CONSTANT = 1000  # steps after which it falls, as 1 / sqrt(step)
INPUTS = 512  # the layer for which --lr is meant, see parameter_groups
SAMPLE_EVERY = 5  # epochs between two grids of samples
HELD_OUT = 512  # pictures for the validation loss
GRID, GRID_STEPS = 64, 50  # pictures and DDIM steps of a grid


def parser():
    """The flags of train.py. modal_train.py has the same ones; a test compares them."""
    p = argparse.ArgumentParser(
        description="Train a diffusion model on 32x32 pictures of shapes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--epochs",
        type=number(int, 1, 10**6),
        default=100,
        help="passes over the pictures",
    )
    p.add_argument(
        "--samples",
        type=number(int, 1, 10**6),
        default=10_000,
        help="training pictures to draw",
    )
    p.add_argument(
        "--batch-size",
        type=number(int, 1, 10**6),
        default=64,
        help="pictures per training step",
    )
    p.add_argument(
        "--lr",
        type=number(float, 1e-12, 1e3),
        default=2e-4,
        help="learning rate after warm-up",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on from latest.pt, up to --epochs in all",
    )
    p.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=0,
        help="of data, weights and noise",
    )
    p.add_argument(
        "--device",
        default="auto",
        help="cuda, mps, cpu, or auto for the first there is",
    )
    p.add_argument(
        "--checkpoints", default="checkpoints", metavar="DIR", help="where to save"
    )
    p.add_argument(
        "--logs", default="logs", metavar="DIR", help="where TensorBoard looks"
    )
    return p


def pick_device(name):
    """A torch.device for cuda, mps, cpu or auto; ends the program if it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(d for d in there if there[d]))
    if not there.get(name.split(":")[0], False) or name.startswith("cpu:"):
        fail(
            f"--device {name} is not here; there is: {', '.join(d for d in there if there[d])}"
        )
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        fail(f"--device {name} is not here; without a number the first one is taken")
    return torch.device(name)


# --- Checkpoints -----------------------------------------------------------------------


def save_checkpoint(path, state):
    """Writes to a temporary file first: a crash half-way leaves the old checkpoint whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as e:  # what torch makes of a full disk
                raise OSError(errno.ENOSPC, "could not write", str(path)) from e
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


CHECKPOINT = {  # what must be in one, and of which type
    **dict.fromkeys(("format", "epoch", "step"), int),
    **dict.fromkeys(("config", "run", "model", "ema", "optimizer"), dict),
    **{"name": str, "generator": torch.Tensor, "history": list},
}


def reason(e):
    """The first line of what an exception says, for an error message of one line."""
    return (str(e).splitlines() or [type(e).__name__])[0][:80]


def load_checkpoint(path):
    """Reads a checkpoint without running anything in it; ends the program if it is broken.

    Returns (state, model): the saved dictionary and a UNet with the EMA weights, on the CPU.
    """
    path = Path(path)
    if not path.exists():
        fail(f"{path} does not exist; python train.py makes one")
    if path.is_dir():
        fail(f"{path} is a folder, not a checkpoint")
    try:
        with zipfile.ZipFile(
            path
        ) as parts:  # a small file must not unpack to a huge one
            if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                fail(f"{path} claims to be larger than it is; it was not opened")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a file from anywhere can break the reader in any way
        fail(f"{path} is not a checkpoint that can be read ({reason(e)})")
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        fail(f"{path} is not a checkpoint of this program")
    if state["format"] != FORMAT:
        fail(f"{path} has format {state['format']}, this program reads format {FORMAT}")
    for key, kind in CHECKPOINT.items():
        if not isinstance(state.get(key), kind):
            fail(
                f"{path} is incomplete: its {key!r} is missing or not a {kind.__name__}"
            )
    limits = {a.dest: a.type for a in parser()._actions}
    try:  # the run's flags obey the same limits as on the command line
        run = {flag: limits[flag](str(state["run"][flag])) for flag in RUN}
        losses = [row["train_loss"] + row["val_loss"] for row in state["history"]]
    except (argparse.ArgumentTypeError, KeyError, TypeError) as e:
        fail(
            f"{path} is damaged: its flags or its history are not those of a run ({reason(e)})"
        )
    if run != state["run"] or len(losses) != state["epoch"]:
        fail(f"{path} is damaged: its flags or its history are not those of a run")
    try:
        # Without memory behind it, until it is known that the weights of the file fit.
        with torch.device("meta"):
            model = ddpm.UNet(**state["config"])
        model.load_state_dict(state["ema"], assign=True)
        fits = all(
            p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters()
        )
    except Exception as e:
        fail(f"{path} does not hold the weights of this network ({reason(e)})")
    if not fits:
        fail(
            f"{path} holds weights that are not finite numbers; take another checkpoint"
        )
    return state, model.requires_grad_(False)


def set_aside(folder):
    """Moves the files of an earlier run into a folder of their own, so that none is lost."""
    names = ["samples_*.png", "loss.png", "best.pt", "latest.pt"]
    files = [file for name in names for file in sorted(folder.glob(name))]
    if files:
        aside, count = folder / time.strftime("run_%Y-%m-%d_%H-%M-%S"), 2
        while aside.exists():
            aside, count = aside.with_name(f"{aside.name}_{count}"), count + 1
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
        print(f"{folder} held an earlier run: moved to {aside}")


# --- Pictures and curves ---------------------------------------------------------------


def save_curve(path, history):
    """Draws the loss of every epoch so far, and the share of samples that are clean."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    axes.plot(epochs, [row["train_loss"] for row in history], label="training")
    axes.plot(
        epochs, [row["val_loss"] for row in history], label="validation (EMA weights)"
    )
    axes.set(xlabel="epoch", ylabel="loss (Eq. 14)", yscale="log")
    clean = [(row["epoch"], row["clean"]) for row in history if "clean" in row]
    if clean:
        right = axes.twinx()
        right.plot(
            *zip(*clean), "o-", color="tab:green", label="share of clean samples"
        )
        right.set(ylabel="share of clean samples", ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)


# --- Training --------------------------------------------------------------------------


def parameter_groups(model):
    """The weights, in groups that share a learning rate: "scale" times --lr.

    Adam moves each weight by about the learning rate, whatever its gradient. So a layer
    with 512 inputs moves its output 32 times as far as one with 16, and one rate is too
    high for the one or too low for the other. Divided by the number of inputs it suits
    both (muP: Yang et al. 2022, arXiv 2203.03466).
    """
    groups = {}
    for p in model.parameters():
        inputs = p.shape[1] if p.ndim > 1 and p.shape[1] > 1 else 64
        groups.setdefault(INPUTS / inputs, []).append(p)
    return [{"params": ps, "scale": scale} for scale, ps in groups.items()]


def new_run(args, device):
    """Model, EMA, optimizer and the generator of all training noise, before the first step."""
    torch.manual_seed(args.seed)
    model = ddpm.UNet().to(device)
    groups = parameter_groups(model)
    optimizer = torch.optim.AdamW(
        groups, args.lr, betas=(0.9, 0.99), weight_decay=0, fused=True
    )
    generator = torch.Generator(device).manual_seed(args.seed)
    return model, ddpm.EMA(model), optimizer, generator


def train_step(model, ema, optimizer, schedule, x_0, generator, step, lr):
    """Algorithm 1, one step: returns the loss, a 0-d tensor still on the device."""
    B, device = len(x_0), x_0.device
    t = torch.randint(1, ddpm.T + 1, (B,), device=device, generator=generator)
    eps = torch.randn(x_0.shape, device=device, generator=generator)
    shape = min(1, step / WARMUP, math.sqrt(CONSTANT / step))
    for group in optimizer.param_groups:
        group["lr"] = lr * shape * group["scale"]
    loss = ddpm.loss_fn(model, schedule, x_0, t, eps)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    ema.update(model, step)
    return loss.detach()


@torch.no_grad()
def validation_loss(model, schedule, x_0):
    """The loss on held-out pictures, always with the same noise and the same t."""
    t = torch.linspace(1, ddpm.T, len(x_0)).round().long().to(x_0.device)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)).to(
        x_0.device
    )
    parts = zip(x_0.split(64), t.split(64), eps.split(64))
    losses = [ddpm.loss_fn(model, schedule, *part) * len(part[0]) for part in parts]
    return (sum(losses) / len(x_0)).item()


def restore(path, saved, model, ema, optimizer, generator):
    """Puts what a checkpoint holds back in its place; ends the program if it does not fit."""
    try:
        model.load_state_dict(saved["model"])
        ema.model.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        for p in model.parameters():  # the optimizer itself does not look at shapes
            if any(
                optimizer.state[p][key].shape != p.shape
                for key in ("exp_avg", "exp_avg_sq")
            ):
                raise ValueError("averages and weights of different shapes")
    except Exception as e:
        fail(f"{path} cannot be resumed ({reason(e)})")
    try:
        generator.set_state(saved["generator"])
    except (RuntimeError, TypeError):
        fail(
            f"{path} comes from another kind of device than {generator.device}; go on there"
        )


def seconds_per_step(args, device, schedule, data, check):
    """Measures the speed on a network that is thrown away, the run is not touched."""
    model, ema, optimizer, generator = new_run(args, device)
    x_0 = data[: args.batch_size]
    for i in range(8):
        if i == 3:  # the first steps are slower
            start = time.perf_counter()
        train_step(model, ema, optimizer, schedule, x_0, generator, 1, args.lr).item()
        check()
    return (time.perf_counter() - start) / 5


def draw_grid(model, schedule, check):
    """The same noise each time, turned into pictures: (grid as an array, share clean)."""
    x_T = torch.randn(GRID, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    x_T = x_T.to(schedule.beta.device)
    for _, x_0, _ in ddpm.reverse_process(model, schedule, x_T, GRID_STEPS):
        check()
    x_0 = x_0.clamp(-1, 1).cpu()
    grid = shapes.tile(shapes.from_model(x_0), columns=16)
    return grid, float(shapes.score(x_0)["clean"])


def read_run(args, latest):
    """For --resume: the checkpoint, with the flags that were not given put into args."""
    if not latest.exists():
        fail(f"nothing to resume: {latest} does not exist; start without --resume")
    saved, _ = load_checkpoint(latest)
    for flag in RUN:
        given, was = getattr(args, flag), saved["run"][flag]
        if given is None:
            setattr(args, flag, was)
        elif flag != "epochs" and given != was:
            fail(
                f"this run was started with --{flag.replace('_', '-')} {was}, not {given}"
            )
    return saved


def train(args, name=None, after_epoch=lambda: None, check=lambda: None):
    """Trains as the flags say, args as parse returns them.

    name: of the run in TensorBoard, default: the time now. after_epoch: called without
    arguments when the files of an epoch are written. check: called often, between two
    steps; what it raises ends the training.
    """
    from torch.utils.tensorboard import (
        SummaryWriter,
    )  # slow to load, and only needed here

    # Build.
    device = pick_device(args.device)
    folder = Path(args.checkpoints)
    latest, best = folder / "latest.pt", folder / "best.pt"
    saved = read_run(args, latest) if args.resume else None
    if args.samples < args.batch_size:
        fail(
            f"--samples {args.samples} is less than one batch: --batch-size {args.batch_size}"
        )
    history, name = [], name or time.strftime("%Y-%m-%d_%H-%M-%S")
    model, ema, optimizer, generator = new_run(args, device)
    if saved:
        restore(latest, saved, model, ema, optimizer, generator)
        history, name = saved["history"], saved["name"]
    if len(history) >= args.epochs:
        print(f"{latest} has {len(history)} epochs already; a larger --epochs goes on")
        return
    schedule = ddpm.Schedule(device)
    data = shapes.to_model(shapes.make_dataset(args.samples, seed=args.seed))
    data = torch.from_numpy(data).to(
        device
    )  # (samples, 1, 32, 32), there for the whole run
    held_out = shapes.to_model(shapes.make_dataset(HELD_OUT, seed=[args.seed, 1]))
    held_out = torch.from_numpy(held_out).to(device)  # (HELD_OUT, 1, 32, 32)
    batches = (
        args.samples // args.batch_size
    )  # the rest of a shuffled epoch is left out
    step, to_go = len(history) * batches, args.epochs - len(history)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"device {device}: {parameters:,} parameters, {args.samples:,} pictures")
    seconds = seconds_per_step(args, device, schedule, data, check) * batches * to_go
    print(f"{to_go} epochs to go, about {seconds / 60:.1f} minutes at the speed now")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "cannot write here", str(folder))
    writer = SummaryWriter(Path(args.logs) / name, purge_step=step + 1)
    if not saved:
        set_aside(folder)

    # Loop.
    with writer, tqdm(total=args.epochs * batches, initial=step, unit="step") as bar:
        for epoch in range(len(history) + 1, args.epochs + 1):
            start, losses = time.perf_counter(), []
            order = torch.randperm(args.samples, generator=generator, device=device)
            for batch in order.split(args.batch_size)[:batches]:
                step += 1
                x_0 = data[batch]  # (B, 1, 32, 32)
                loss = train_step(
                    model, ema, optimizer, schedule, x_0, generator, step, args.lr
                )
                losses.append(loss)
                bar.update()
                check()
                if step % 20 == 0:  # .item() waits for the device, so not at every step
                    speed = (
                        len(losses) * args.batch_size / (time.perf_counter() - start)
                    )
                    words = f"loss {loss.item():.4f}, {speed:.0f} pictures/s"
                    bar.set_postfix_str(words, refresh=False)
            losses = torch.stack(losses).tolist()
            row = {"epoch": epoch, "train_loss": sum(losses) / batches}
            row["val_loss"] = validation_loss(ema.model, schedule, held_out)
            if not all(map(math.isfinite, [*losses, row["val_loss"]])):
                fail(
                    f"the loss is not finite in epoch {epoch}, which was not saved; lower --lr"
                )
            if epoch % SAMPLE_EVERY == 0 or epoch == args.epochs:
                grid, row["clean"] = draw_grid(ema.model, schedule, check)
                shapes.save_picture(folder / f"samples_{epoch:04d}.png", grid)
                writer.add_image("samples", grid[None], step)
                writer.add_scalar("clean share", row["clean"], step)
            for i, value in enumerate(losses):
                writer.add_scalar("loss/train", value, step - batches + i + 1)
            writer.add_scalar("loss/validation", row["val_loss"], step)
            row["seconds"] = time.perf_counter() - start
            history.append(row)

            # Save.
            state = {
                "format": FORMAT,
                "config": model.config,
                "run": {flag: getattr(args, flag) for flag in RUN},
                "name": name,
                "epoch": epoch,
                "step": step,
                "model": model.state_dict(),
                "ema": ema.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "history": history,
            }
            # best before latest: killed between the two, the epoch is simply done again.
            if row["val_loss"] <= min(r["val_loss"] for r in history):
                save_checkpoint(best, state)
            save_checkpoint(latest, state)
            save_curve(folder / "loss.png", history)
            after_epoch()
            line = f"epoch {epoch}: loss {row['train_loss']:.4f}, validation {row['val_loss']:.4f}"
            tqdm.write(
                line
                + (f", {row['clean']:.0%} of samples clean" if "clean" in row else "")
            )


def parse(argv=None):
    """The flags as an argparse.Namespace; with --resume those not given stay None."""
    # argparse leaves alone what is already there: so a flag that was given can be told from
    # a default, and a resumed run keeps its own values for the flags that were not given.
    flags = parser()
    args = flags.parse_args(argv, argparse.Namespace(**dict.fromkeys(RUN)))
    if not args.resume:
        for flag in RUN:
            if getattr(args, flag) is None:
                setattr(args, flag, flags.get_default(flag))
    return args


def how_to_resume(args):
    """The command line that goes on where this run was stopped."""
    words = ["python", "train.py", "--resume"]
    for flag in ("epochs", "device", "checkpoints", "logs"):
        if getattr(args, flag) not in (None, parser().get_default(flag)):
            words += [f"--{flag}", str(getattr(args, flag))]
    return shlex.join(words)


def main():
    args = parse()
    asked = []

    # Ctrl-C is noted and obeyed between two steps: an exception in the middle of saving or
    # drawing might be swallowed there. Whoever presses it twice is obeyed at once.
    def stop(*_):
        asked.append(True)
        if len(asked) > 1:
            raise KeyboardInterrupt
        tqdm.write("stopping after this step")

    def check():
        if asked:
            raise KeyboardInterrupt

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        train(args, check=check)
    except KeyboardInterrupt:
        if (Path(args.checkpoints) / "latest.pt").exists():
            print(
                f"\nstopped; the last complete epoch is kept. To go on: {how_to_resume(args)}"
            )
        else:
            print("\nstopped before the first epoch was complete: nothing was saved")
        sys.exit(130)
    except OSError as e:
        place = e.filename or f"{args.checkpoints} or {args.logs}"
        fail(f"{e.strerror or e}: {place}; make room there, or choose another folder")
    except (MemoryError, RuntimeError) as e:
        if "memory" not in str(e) and not isinstance(e, MemoryError):
            raise
        fail("not enough memory; take a smaller --batch-size or fewer --samples")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
