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
import shutil
import signal
import sys
import threading
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import ddpm
import shapes
from shapes import fail, number

FORMAT = 3  # of a checkpoint; raise it when old ones can no longer be read
RUN = ("epochs", "samples", "batch_size", "lr", "seed")  # the flags that define a run
WARMUP = 100  # steps in which the learning rate rises: the first gradients mislead
CONSTANT = 1000  # steps after which it falls, as 1 / sqrt(step)
MATRICES, OTHERS = 40, 8  # what --lr is multiplied with, see optimizers_for
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
        help="learning rate; at its peak 40 times this for matrices, 8 times for the rest",
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
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# What must be in a checkpoint, and of which type: to sample from it, and to go on with it.
TO_SAMPLE = {"format": int, "epoch": int, "config": dict, "run": dict, "ema": dict}
TO_RESUME = {
    "step": int,
    "name": str,
    "model": dict,
    "optimizers": list,
    "history": list,
    "generator": torch.Tensor,
}


def export_weights(path, state):
    """Writes what is needed to sample, in half precision: a sixth of a checkpoint."""
    small = {key: state[key] for key in TO_SAMPLE}
    small["ema"] = {name: p.half() for name, p in state["ema"].items()}
    save_checkpoint(path, small)


def reason(e):
    """The first line of what an exception says, for an error message of one line."""
    return (str(e).splitlines() or [type(e).__name__])[0][:80]


def load_checkpoint(path, resume=False):
    """Reads a checkpoint without running anything in it; ends the program if it is broken.

    resume: whether all that training needs must be in it. Returns (state, model): the
    saved dictionary and a UNet with the EMA weights, in float32 and on the CPU.
    """
    path = Path(path)
    state = read_safely(path)
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        fail(f"{path} is not a checkpoint of this program")
    if state["format"] != FORMAT:
        fail(f"{path} has format {state['format']}, this program reads format {FORMAT}")
    for key, kind in (TO_SAMPLE | TO_RESUME if resume else TO_SAMPLE).items():
        if not isinstance(state.get(key), kind):
            fail(
                f"{path} is incomplete: its {key!r} is missing or not a {kind.__name__}"
            )
    try:
        check_run(state, resume)
    except Exception as e:  # noqa: BLE001, as below
        fail(f"{path} is damaged: {reason(e)}")
    try:
        # Without memory behind it, until it is known that the weights of the file fit.
        with torch.device("meta"):
            model = ddpm.UNet(**state["config"])
        if sum(p.nbytes for p in state["ema"].values()) > path.stat().st_size:
            raise ValueError("more numbers than the file is long")
        model.load_state_dict(state["ema"], assign=True)
        model = model.float().to(memory_format=torch.channels_last)
        with torch.no_grad():  # some wrong configurations show only in use
            output = model(torch.zeros(1, 1, 32, 32), torch.ones(1, dtype=torch.long))
        finite = all(p.isfinite().all() for p in [output, *model.parameters()])
    except Exception as e:  # noqa: BLE001, as below
        fail(f"{path} does not hold the weights of this network ({reason(e)})")
    if not finite:
        fail(
            f"{path} holds weights that are not finite numbers; take another checkpoint"
        )
    return state, model.requires_grad_(False)


def check_run(state, resume):
    """Raises an exception if flags, name or history are not such as a run leaves behind."""
    limits = {a.dest: a.type for a in parser()._actions}
    run = {flag: limits[flag](str(state["run"][flag])) for flag in RUN}
    if run != state["run"]:
        raise ValueError("its flags are not those of a run")
    if not resume:
        return
    if Path(state["name"]).name != state["name"] or state["name"] in ("", ".."):
        raise ValueError("its name is not that of a folder")
    rows = state["history"]
    if len(rows) != state["epoch"]:
        raise ValueError("its history is not as long as it says")
    for i, row in enumerate(rows, start=1):
        numbers = [row["epoch"], row["train_loss"], row["val_loss"], row["seconds"]]
        numbers += [row.get("clean", 0)]
        if row["epoch"] != i or not all(map(math.isfinite, numbers)):
            raise ValueError(f"its history is wrong in epoch {i}")


def read_safely(path):
    """What torch.save wrote into a file; ends the program if it cannot be read."""
    if not path.exists():
        fail(f"{path} does not exist; python train.py makes one")
    if path.is_dir():
        fail(f"{path} is a folder, not a checkpoint")
    try:
        # A small file must not unpack to a huge one.
        with zipfile.ZipFile(path) as parts:
            if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                fail(f"{path} claims to be larger than it is; it was not opened")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # noqa: BLE001, a stranger's file can break it in any way
        fail(f"{path} is not a checkpoint that can be read ({reason(e)})")


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
    """Draws, against time, the loss of every epoch and the share of clean samples."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    minutes, total = [], 0.0
    for row in history:
        total += row["seconds"] / 60
        minutes.append(total)
    for key, label in (("train_loss", "training"), ("val_loss", "validation (EMA)")):
        axes.plot(minutes, [row[key] for row in history], label=label)
    axes.set(xlabel="minutes", ylabel="loss (Eq. 14)", ylim=(0, None))
    clean = [(m, row["clean"]) for m, row in zip(minutes, history) if "clean" in row]
    if clean:
        right = axes.twinx()
        right.plot(
            *zip(*clean), "o-", color="tab:green", label="share of clean samples"
        )
        right.set(ylabel="share of clean samples", ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)


# --- Training --------------------------------------------------------------------------


def orthogonal(matrix):
    """About U V^T, where U S V^T is the matrix: all its singular values become about 1.

    Divided by the norm they are at most 1. Then three rounds of an odd polynomial, which
    acts on each of them and needs no decomposition, bring those above 0.03 to between 0.65
    and 1.25; smaller ones grow 41 times at most. (Jordan et al. take five rounds.)
    """
    dtype = torch.bfloat16 if ddpm.fast_bfloat16(matrix.device.type) else torch.float32
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    for _ in range(3):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """An optimizer for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    The gradient of a matrix is large in a few directions and small in most. Adam scales
    each number alone and largely keeps it so; Muon moves about equally far in all of them.
    torch.optim.Muon takes no convolutions, and computes in bfloat16 everywhere, also where
    that is slow.
    """

    def __init__(self, groups):
        super().__init__(groups, {"momentum": 0.95})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                state["average"].lerp_(p.grad, 1 - group["momentum"])
                # The newest gradient once more: Nesterov's momentum.
                x = p.grad.lerp(state["average"], group["momentum"])
                # A convolution (c_out, c_in, 3, 3) becomes a matrix whose rows are the
                # channels of the narrower side; the more rows, the more work.
                c_out, c_in = p.shape[:2]
                if c_out > c_in:
                    x = x.transpose(0, 1)  # (c_in, c_out, ...)
                x = orthogonal(x.flatten(1)).view(x.shape)
                if c_out > c_in:
                    x = x.transpose(0, 1)  # (c_out, c_in, ...)
                # With more outputs than inputs each output gets less: make up for that.
                p.add_(x, alpha=-group["lr"] * math.sqrt(max(1, c_out / c_in)))


def optimizers_for(model, lr):
    """Muon for the matrices; Adam for biases, norms, and the first and last layer.

    Those two have a single channel on one side, and would be matrices of a single row. The
    "scale" of a group is what train_step multiplies --lr with: the numbers in a step of
    Muon are far below 1, those in one of Adam about 1.
    """
    is_matrix = {p: p.ndim > 1 and min(p.shape[:2]) > 1 for p in model.parameters()}
    matrices = {"params": [p for p in is_matrix if is_matrix[p]], "scale": MATRICES}
    others = {"params": [p for p in is_matrix if not is_matrix[p]], "scale": OTHERS}
    adam = torch.optim.Adam([others], lr, betas=(0.9, 0.99), fused=True)
    return Muon([matrices]), adam


def new_run(args, device):
    """Model, EMA, optimizers and the generator of all training noise, before the first step."""
    torch.manual_seed(args.seed)
    model = ddpm.UNet().to(device)
    optimizers = optimizers_for(model, args.lr)
    generator = torch.Generator(device).manual_seed(args.seed)
    ema = ddpm.EMA(model)
    # So small a network leaves a GPU waiting for the next kernel to be launched; compiled,
    # it launches a fraction of them. That takes Triton and a C compiler.
    tools = find_spec("triton") and (shutil.which("cc") or shutil.which("gcc"))
    if device.type == "cuda" and tools:
        # Where that fails all the same, as without Python's headers, it goes on uncompiled.
        torch._dynamo.config.suppress_errors = True
        model.compile()
        ema.model.compile()
    return model, ema, optimizers, generator


def mirror(x_0, generator):
    """Mirrors each picture at random: left to right, top to bottom, at the main diagonal.

    The mirror image of a shape is a shape, but for a few pixels on an edge in one of a
    hundred pictures: eight pictures for one, and nobody has to draw them. (Ho, Appendix B,
    mirrors left to right.) x_0: float (B, 1, 32, 32), returns the same shape.
    """
    size, device = (3, len(x_0), 1, 1, 1), x_0.device
    coins = torch.rand(size, generator=generator, device=device) < 0.5
    x_0 = torch.where(coins[0], x_0.flip(3), x_0)
    x_0 = torch.where(coins[1], x_0.flip(2), x_0)
    return torch.where(coins[2], x_0.transpose(2, 3), x_0)


def train_step(model, ema, optimizers, schedule, x_0, generator, step, lr):
    """Algorithm 1, one step, with clipped gradients; then the EMA.

    step: counts from 1. lr: --lr. Returns the loss, a 0-d tensor still on the device.
    """
    B, device = len(x_0), x_0.device
    t = torch.randint(1, ddpm.T + 1, (B,), device=device, generator=generator)
    eps = torch.randn(x_0.shape, device=device, generator=generator)
    factor = min(1, step / WARMUP, math.sqrt(CONSTANT / step))
    loss = ddpm.loss_fn(model, schedule, x_0, t, eps)
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * factor * group["scale"]
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


def restore(path, saved, model, ema, optimizers, generator):
    """Puts what a checkpoint holds back in its place; ends the program if it does not fit."""
    if saved["config"] != model.config:
        fail(f"{path} cannot be resumed: its network is {saved['config']}")
    try:
        model.load_state_dict(saved["model"])
        ema.model.load_state_dict(saved["ema"])
        for optimizer, old in zip(optimizers, saved["optimizers"], strict=True):
            groups = [dict(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(old)
            muon = isinstance(optimizer, Muon)
            averages = ("average",) if muon else ("exp_avg", "exp_avg_sq")
            for group, was in zip(optimizer.param_groups, groups):
                settings = set(was) - {"lr", "params"}
                if any(group[key] != was[key] for key in settings):
                    raise ValueError("an optimizer with other settings")
                # load_state_dict does not compare shapes; a step might read beyond a tensor.
                for p in group["params"]:
                    if any(
                        optimizer.state[p][key].shape != p.shape for key in averages
                    ):
                        raise ValueError("averages and weights of different shapes")
    except Exception as e:  # noqa: BLE001, as above
        fail(f"{path} cannot be resumed ({reason(e)})")
    try:
        generator.set_state(saved["generator"])
    except (RuntimeError, TypeError):
        fail(
            f"{path} was saved on another kind of device than {generator.device}; "
            "resume it on that kind"
        )


def seconds_per_step(args, device, schedule, data, check):
    """Measures the speed on a network that is thrown away, the run is not touched."""
    model, ema, optimizers, generator = new_run(args, device)
    x_0 = data[: args.batch_size]
    for i in range(8):
        if i == 3:  # the first steps are slower
            start = time.perf_counter()
        train_step(model, ema, optimizers, schedule, x_0, generator, 1, args.lr).item()
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
    saved, _ = load_checkpoint(latest, resume=True)
    for flag in RUN:
        given, was = getattr(args, flag), saved["run"][flag]
        if given is None:
            setattr(args, flag, was)
        elif flag != "epochs" and given != was:
            fail(
                f"this run was started with --{flag.replace('_', '-')} {was}, not {given}"
            )
    return saved


def load_data(args, device):
    """Pictures to train on and to validate with, (n, 1, 32, 32), on the device to stay."""

    def draw(n, seed):
        pictures = shapes.to_model(shapes.make_dataset(n, seed))
        return torch.from_numpy(pictures).to(device)

    return draw(args.samples, args.seed), draw(HELD_OUT, [args.seed, 1])


def open_folders(args, name, step, new):
    """Makes the folders, empties the one for checkpoints of an earlier run if this is new.

    Returns the writer for TensorBoard. Raises OSError where nothing can be written.
    """
    # Slow to load, and only needed here.
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(args.checkpoints)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "cannot write here", str(folder))
    # TensorBoard writes in a thread of its own. What fails there it raises here once more,
    # where it becomes one line; the thread itself need not print it too.
    threading.excepthook = lambda hook: (
        None if issubclass(hook.exc_type, OSError) else threading.__excepthook__(hook)
    )
    writer = SummaryWriter(Path(args.logs) / name, purge_step=step + 1)
    for half in ("best.tmp", "latest.tmp"):  # left by a run that was killed
        (folder / half).unlink(missing_ok=True)
    if new:
        set_aside(folder)
    return writer


def train_epoch(learner, schedule, data, args, step, bar, check):
    """The pictures once, in a new order. Returns the losses of the steps, a list."""
    model, ema, optimizers, generator = learner
    losses, start = [], time.perf_counter()
    order = torch.randperm(len(data), generator=generator, device=data.device)
    # The rest of a shuffled epoch, less than a batch, is left out.
    for batch in order.split(args.batch_size)[: len(data) // args.batch_size]:
        step += 1
        x_0 = mirror(data[batch], generator)  # (B, 1, 32, 32)
        losses.append(
            train_step(model, ema, optimizers, schedule, x_0, generator, step, args.lr)
        )
        bar.update()
        check()
        if step % 20 == 0:  # .item() waits for the device, so not at every step
            speed = len(losses) * args.batch_size / (time.perf_counter() - start)
            words = f"loss {losses[-1].item():.4f}, {speed:.0f} pictures/s"
            bar.set_postfix_str(words, refresh=False)
    return torch.stack(losses).tolist()


def log_epoch(writer, row, losses, step):
    """Writes the numbers of an epoch, whose last step this was, for TensorBoard."""
    for i, value in enumerate(losses):
        writer.add_scalar("loss/train", value, step - len(losses) + i + 1)
    writer.add_scalar("loss/validation", row["val_loss"], step)
    if "clean" in row:
        writer.add_scalar("clean share", row["clean"], step)


def save_epoch(folder, learner, args, name, history, step):
    """Writes latest.pt, best.pt if the validation loss is the lowest so far, loss.png."""
    model, ema, optimizers, generator = learner
    state = {
        "format": FORMAT,
        "config": model.config,
        "run": {flag: getattr(args, flag) for flag in RUN},
        "name": name,
        "epoch": len(history),
        "step": step,
        "model": model.state_dict(),
        "ema": ema.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "generator": generator.get_state(),
        "history": history,
    }
    # best before latest: killed between the two, the epoch is simply done again.
    if history[-1]["val_loss"] <= min(row["val_loss"] for row in history):
        save_checkpoint(folder / "best.pt", state)
    save_checkpoint(folder / "latest.pt", state)
    save_curve(folder / "loss.png", history)


def train(args, name=None, after_epoch=lambda: None, check=lambda: None):
    """Trains as the flags say, args as parse returns them.

    name: of the run in TensorBoard, default: the time now. after_epoch: called without
    arguments when the files of an epoch are written. check: called often, between two
    steps; what it raises ends the training.
    """
    device, folder = pick_device(args.device), Path(args.checkpoints)
    latest = folder / "latest.pt"
    saved = read_run(args, latest) if args.resume else None
    if args.samples < args.batch_size:
        fail(
            f"--samples {args.samples} is less than one batch: "
            f"--batch-size {args.batch_size}"
        )
    history, name = [], name or time.strftime("%Y-%m-%d_%H-%M-%S")
    learner = model, ema, optimizers, generator = new_run(args, device)
    if saved:
        restore(latest, saved, model, ema, optimizers, generator)
        history, name = saved["history"], saved["name"]
    if len(history) >= args.epochs:
        print(f"{latest} has {len(history)} epochs already; a larger --epochs goes on")
        return
    schedule = ddpm.Schedule(device)
    data, held_out = load_data(args, device)
    batches = args.samples // args.batch_size
    step, to_go = len(history) * batches, args.epochs - len(history)
    number_type = "bfloat16" if ddpm.fast_bfloat16(device.type) else "float32"
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"device {device} ({number_type}): {parameters:,} parameters, {args.samples:,} pictures"
    )
    seconds = seconds_per_step(args, device, schedule, data, check) * batches * to_go
    print(f"{to_go} epochs to go, about {seconds / 60:.1f} minutes at the speed now")
    writer = open_folders(args, name, step, new=not saved)

    bar = tqdm(total=args.epochs * batches, initial=step, unit="step")
    with writer, bar:
        for epoch in range(len(history) + 1, args.epochs + 1):
            start = time.perf_counter()
            losses = train_epoch(learner, schedule, data, args, step, bar, check)
            step += batches
            row = {"epoch": epoch, "train_loss": sum(losses) / batches}
            row["val_loss"] = validation_loss(ema.model, schedule, held_out)
            if not all(map(math.isfinite, [*losses, row["val_loss"]])):
                fail(
                    f"the loss is not finite in epoch {epoch}, which was not saved; "
                    "start again with a lower --lr"
                )
            line = f"epoch {epoch}: loss {row['train_loss']:.4f}, validation {row['val_loss']:.4f}"
            if epoch % SAMPLE_EVERY == 0 or epoch == args.epochs:
                grid, row["clean"] = draw_grid(ema.model, schedule, check)
                shapes.save_picture(folder / f"samples_{epoch:04d}.png", grid)
                writer.add_image("samples", grid[None], step)
                line += f", {row['clean']:.0%} of samples clean"
            log_epoch(writer, row, losses, step)
            row["seconds"] = time.perf_counter() - start
            history.append(row)
            save_epoch(folder, learner, args, name, history, step)
            after_epoch()
            tqdm.write(line)


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
        # A resumed run may have been meant to be longer than the default.
        default = (
            None if args.resume and flag == "epochs" else parser().get_default(flag)
        )
        if getattr(args, flag) not in (None, default):
            words += [f"--{flag}", str(getattr(args, flag))]
    return shlex.join(words)


def main():
    args, started, asked = parse(), time.time(), []

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
        latest = Path(args.checkpoints) / "latest.pt"
        if args.resume or (latest.exists() and latest.stat().st_mtime >= started):
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
        for which, handler in before.items():
            signal.signal(which, handler)


if __name__ == "__main__":
    main()
