"""Trains the network: python train.py, on CUDA, MPS or a CPU, whatever is there. It saves
checkpoints/latest.pt, best.pt and a curve, loss.png; tensorboard --logdir logs shows more."""

import argparse
import copy
import io
import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import ddpm
import shapes


def parse(argv):
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    p = argparse.ArgumentParser(description="Train the diffusion model.")
    p.add_argument("--epochs", type=int, help="passes over the training pictures (100)")
    p.add_argument("--samples", type=int, default=10_000, help="training pictures to draw (10000)")
    p.add_argument("--batch-size", type=int, default=64, help="pictures in a step (64)")
    p.add_argument("--lr", type=float, default=2e-4, help="learning rate at step 16000 (2e-4)")
    p.add_argument("--seed", type=int, default=0, help="of data, weights and noise (0)")
    p.add_argument("--resume", action="store_true", help="go on; of the above only --epochs counts")
    p.add_argument("--device", choices=sorted({"cpu", str(best)}), default=str(best))
    p.add_argument("--bf16", action="store_true", help="for processors that are fast in bfloat16")
    p.add_argument("--checkpoints", type=Path, default="checkpoints", help="(checkpoints)")
    p.add_argument("--logs", type=Path, default="logs", help="for TensorBoard (logs)")
    args = p.parse_args(argv)
    if not 1 <= args.batch_size <= args.samples or args.lr <= 0 or args.seed < 0:
        p.error("--batch-size must be from 1 to --samples, --lr above 0, --seed not below")
    return args


def rate(step):
    """BEYOND THE PAPER, where it is 1: the learning rate in units of --lr. It rises for 500 steps,
    as the first gradients say little (bits above t = 100 after ten epochs: 35.7, else 43.5), and
    falls from step 2,000 on, to 1 at step 16,000 (after twenty: 27.1, if it stays at 8 28.1)."""
    return min(8 * (step + 1) / 500, 8, 16_000 / (step + 1))


def triangle_t(n, generator):
    """BEYOND THE PAPER, where t is uniform: n values of t, int64 (n,), most of them near T / 2,
    where pictures are decided. Bits after ten epochs: 35.7 (757 below), else 41.7 (233 below)."""
    a, b = torch.randint(1, ddpm.T + 1, (2, n), generator=generator)  # (n,) each
    t = (a + b) // 2
    t[::16] = a[::16]  # uniform, or else the last steps would hardly be trained
    return t


def save(path, state):
    """Writes a file beside the old one, then replaces it: there is always a whole one."""
    buffer = io.BytesIO()  # a full disk is then an OSError; torch.save would make it another
    torch.save(state, buffer)
    path.with_suffix(".tmp").write_bytes(buffer.getbuffer())
    path.with_suffix(".tmp").replace(path)


def main(argv, network=ddpm.UNet):
    args = parse(argv)
    latest, best = args.checkpoints / "latest.pt", args.checkpoints / "best.pt"
    torch.manual_seed(args.seed)
    schedule = ddpm.Schedule(args.device)
    model = network().to(args.device, memory_format=torch.channels_last)  # the faster layout
    average = copy.deepcopy(model).requires_grad_(False)
    # BEYOND THE PAPER, where betas[1] is 0.999: after ten epochs 35.7 bits, with 0.999 38.8.
    optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.99), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    parts = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler}
    flags = {key: getattr(args, key) for key in ("samples", "batch_size", "lr", "seed")}
    history, run = [], time.strftime("%Y-%m-%d_%H-%M-%S")
    if args.resume:
        try:
            saved = torch.load(latest, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            flags, history, run = saved["flags"], saved["history"], saved["run"]
        except Exception as e:  # noqa: BLE001, a foreign file can be wrong in any way
            sys.exit(f"error: cannot go on from {latest}: {e!r}")
    flags["epochs"] = flags.get("epochs", 100) if args.epochs is None else args.epochs
    print(f"on {args.device}, {flags}, {len(history)} epochs are done", flush=True)
    if len(history) >= flags["epochs"]:
        return
    data = shapes.to_model(shapes.make_dataset(flags["samples"], flags["seed"]))
    others = shapes.to_model(shapes.make_dataset(999, [flags["seed"], 1])).to(args.device)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(args.logs / run)
    net = torch.autocast(args.device, torch.bfloat16)(model.forward) if args.bf16 else model

    for epoch in range(len(history) + 1, flags["epochs"] + 1):
        generator = torch.Generator().manual_seed(1000 * flags["seed"] + epoch)
        order = torch.randperm(len(data), generator=generator)
        losses = []
        batches = order.split(flags["batch_size"])[: len(data) // flags["batch_size"]]  # full ones
        for batch in tqdm(batches, f"epoch {epoch}", leave=False, disable=None):
            x_0 = shapes.mirror(data[batch], generator).to(args.device)  # (B, 1, 32, 32)
            losses.append(ddpm.algorithm_1(net, schedule, optimizer, x_0, generator, triangle_t))
            scheduler.step()
            # Samples use an average (Ho, Appendix B). BEYOND THE PAPER: mainly of the last ninth of
            # steps. Bits after ten epochs: 35.7, with Ho's decay of 0.9999 7,300, without any 48.3.
            for mean, p in zip(average.parameters(), model.parameters()):
                mean.lerp_(p.detach(), 9 / (10 + scheduler.last_epoch))

        # The bound above t = 100 tells how well the network knows which shapes stand where.
        bits = ddpm.bound(average, schedule, others, torch.Generator().manual_seed(0))[101:].sum()
        row = {"loss": torch.stack(losses).mean().item(), "bits": bits.item()}
        if not torch.tensor([*row.values()]).isfinite().all():
            sys.exit(f"error: the loss of epoch {epoch} is not finite; begin anew, with less --lr")
        if epoch == 1 and (latest.exists() or best.exists()):  # --resume forgotten? Keep that run
            aside = args.checkpoints / f"before_{run}"
            aside.mkdir()
            for name in ("best.pt", "loss.png", "samples_*.png", "latest.pt"):
                for file in args.checkpoints.glob(name):
                    file.rename(aside / file.name)
        history.append(row)
        state = {"flags": flags, "run": run, "history": history}
        if row["bits"] == min(past["bits"] for past in history):
            half = {name: weight.half() for name, weight in average.state_dict().items()}
            save(best, {**state, "average": half})
        save(latest, {**state, **{name: part.state_dict() for name, part in parts.items()}})

        if epoch % 5 == 0 or epoch == flags["epochs"]:
            generator = torch.Generator().manual_seed(0)
            x_T = torch.randn(64, 1, 32, 32, generator=generator).to(args.device)
            *_, (_, x_0) = ddpm.ddim(average, schedule, x_T, 20, 1, generator)
            pictures = shapes.from_model(x_0.cpu())  # (64, 32, 32)
            shapes.tile(pictures, columns=16).save(args.checkpoints / f"samples_{epoch:04d}.png")
            writer.add_images("samples", pictures[:, None], epoch)
            row = {**row, "right": shapes.score(x_0.cpu())["right"]}
        for name, value in row.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()
        figure = shapes.figure(8, 3)
        for axes, name in zip(figure.subplots(1, 2), ("loss", "bits")):
            axes.plot(range(1, epoch + 1), [past[name] for past in history], ".-")
            axes.set(xlabel="epoch", ylabel=name, yscale="log")
        figure.savefig(args.checkpoints / "loss.png", dpi=120)
        print(f"epoch {epoch}:", ", ".join(f"{name} {row[name]:.4g}" for name in row), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on after the last epoch that was saved")
    except (OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")
