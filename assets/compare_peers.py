"""This project beside two libraries: how fast each trains, how soon samples are clean.

The same pictures, batches of 64, the same CPU threads, networks of the same size, each
library as its own documentation trains it:

    ours        train.py with its defaults
    diffusers   UNet2DModel and DDPMScheduler, the loop of its tutorial "Train a
                diffusion model", the weights averaged as in its train_unconditional.py
    ddp         denoising-diffusion-pytorch: Unet and GaussianDiffusion, trained as its
                Trainer does

Needs packages that are not in requirements.txt, since nothing else here uses them:

    pip install diffusers denoising-diffusion-pytorch ema-pytorch

    python assets/compare_peers.py --speed
    python assets/compare_peers.py --quality ours --minutes 40
    python assets/compare_peers.py --quality diffusers --minutes 40
    python assets/compare_peers.py --quality ddp --minutes 40
"""

import argparse
import copy
import importlib
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ["TQDM_DISABLE"] = "1"  # ddp draws a bar whenever it samples
os.environ["HF_HUB_OFFLINE"] = "1"  # only constructors are used, nothing is fetched
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import ddpm
import shapes
import train

BATCH = 64
DDIM_STEPS = 50
SIZE_MAY_DIFFER = 0.2  # in parameters, from ours
GOAL = 0.5  # share of clean samples at which --quality stops
UNTIMED = 2  # first steps of a turn: the caches are full of another network


# --- The three, each with model, step(x_0, step, share) and sample(n) -----------------
# step counts from 1; share is how much of the training time is over, 0 to 1.


def our_lr(args, step, share):
    """What to hand to train_step, which does the warm-up itself."""
    return args.lr


class Ours:
    packages = ()

    def __init__(self):
        self.args = train.parse(["--device", "cpu"])
        run = train.new_run(self.args, torch.device("cpu"))
        self.model, self.ema, self.optimizers, self.generator = run
        self.schedule = ddpm.Schedule()

    def step(self, x_0, step, share):
        return train.train_step(
            self.model,
            self.ema,
            self.optimizers,
            self.schedule,
            x_0,
            self.generator,
            step,
            our_lr(self.args, step, share),
        )

    def sample(self, n):
        x_T = torch.randn(n, 1, 32, 32)
        return ddpm.sample(self.ema.model, self.schedule, x_T, DDIM_STEPS)


# Widths of the peers: 16, 32 and 64 channels at 32x32, 16x16 and 8x8, as ours, and at
# 4x4 as many as bring the number of parameters close to ours. Networks that are wider
# above and narrower below have as many parameters, too, but are slower.


class Diffusers:
    packages = ("diffusers",)

    def __init__(self):
        names = ("UNet2DModel", "DDPMScheduler", "DDIMScheduler")
        UNet2DModel, DDPMScheduler, DDIMScheduler = load("diffusers", *names)
        (EMAModel,) = load("diffusers.training_utils", "EMAModel")
        torch.manual_seed(0)
        self.model = UNet2DModel(
            sample_size=32,
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(16, 32, 64, 112),
            norm_num_groups=16,  # its default, 32, does not divide 16 channels
            down_block_types=("AttnDownBlock2D",) * 4,
            up_block_types=("AttnUpBlock2D",) * 4,
        )
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        self.sampler = DDIMScheduler.from_config(self.scheduler.config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.ema = EMAModel(
            self.model.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            power=3 / 4,
            foreach=True,
        )

    def step(self, x_0, step, share):
        # The tutorial's schedule, but its cosine runs over a number of steps, and here
        # the time is given. Its warm-up of 500 steps is 16 % of its 3150; on a slow
        # machine 500 may be the whole run, so that it ends after 16 % of the time.
        warm_up = min(1, max(step / 500, share / 0.16))
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4 * warm_up * (1 + math.cos(math.pi * share)) / 2
        noise = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (len(x_0),))
        x_t = self.scheduler.add_noise(x_0, noise, t)
        loss = F.mse_loss(self.model(x_t, t, return_dict=False)[0], noise)
        descend(loss, self.model, self.optimizer)
        self.ema.step(self.model.parameters())
        return loss.detach()

    @torch.no_grad()
    def sample(self, n):
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model.parameters())
        self.sampler.set_timesteps(DDIM_STEPS)
        x = torch.randn(n, 1, 32, 32)
        for t in self.sampler.timesteps:
            x = self.sampler.step(model(x, t).sample, t, x).prev_sample
        return x


class DDP:
    packages = ("denoising-diffusion-pytorch", "ema-pytorch")

    def __init__(self):
        names = ("Unet", "GaussianDiffusion")
        Unet, GaussianDiffusion = load("denoising_diffusion_pytorch", *names)
        (EMA,) = load("ema_pytorch", "EMA")
        torch.manual_seed(0)
        net = Unet(dim=16, dim_mults=(1, 2, 4, 10), channels=1, flash_attn=True)
        self.model = GaussianDiffusion(
            net,
            image_size=32,
            timesteps=1000,
            sampling_timesteps=DDIM_STEPS,
            objective="pred_noise",
            beta_schedule="linear",  # the paper's; its own default is a sigmoid
            auto_normalize=False,  # our pictures are in [-1, 1] already
        )
        # The README's learning rate; it goes with 64 pictures per step there, too.
        parameters = self.model.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=8e-5, betas=(0.9, 0.99))
        self.ema = EMA(self.model, beta=0.995, update_every=10)

    def step(self, x_0, step, share):
        loss = self.model(x_0)
        descend(loss, self.model, self.optimizer)
        self.ema.update()
        return loss.detach()

    def sample(self, n):
        return self.ema.ema_model.sample(batch_size=n)


PEERS = {"diffusers": Diffusers, "ddp": DDP}


def descend(loss, model, optimizer):
    """Both peers clip at 1, in this order."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def load(module, *names):
    """These names of a peer's module; ends the program if it cannot be imported."""
    try:
        return [getattr(importlib.import_module(module), name) for name in names]
    except (ImportError, RuntimeError, AttributeError) as e:
        reason = str(e).splitlines()[0]
        packages = " ".join(p for peer in PEERS.values() for p in peer.packages)
        sys.exit(f"cannot import {module} ({reason}): pip install {packages}")


def declare_torchvision_operators():
    """Lets torchvision be imported where its compiled part cannot be loaded.

    Both peers import it, for reading picture files, which nobody does here. The wheel
    that pip takes may be built for CUDA; beside a CPU build of torch its operators are
    missing, and the import ends at the first it describes. Declaring these will do.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass  # whoever needs it will say so
    except RuntimeError:
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)


def build(names):
    """{name: run} of ours and these peers, all of about the same size."""
    if names:
        declare_torchvision_operators()
    runs = {"ours": Ours(), **{name: PEERS[name]() for name in names}}
    ours = size(runs["ours"])
    for name, run in runs.items():
        if abs(size(run) / ours - 1) > SIZE_MAY_DIFFER:
            sys.exit(
                f"{name} has {size(run):,} parameters and ours has {ours:,}: more than"
                f" {SIZE_MAY_DIFFER:.0%} apart, choose other channels for {name}"
            )
    return runs


def size(run):
    return sum(p.numel() for p in run.model.parameters())


# --- What both modes need -------------------------------------------------------------


def shuffled_batches():
    """The data of train.py, shuffled anew in each epoch, without end."""
    data = torch.from_numpy(shapes.to_model(shapes.make_dataset(10_000, seed=0)))
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for batch in order.split(BATCH)[: len(data) // BATCH]:
            yield data[batch]


def precision(run, x_0):
    """One step, and in which precision its convolutions and matrix products were."""
    seen = set()

    def note(module, inputs, output):
        seen.add(str(output.dtype).removeprefix("torch."))

    layers = [m for m in run.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    run.step(x_0, 1, 0.5)
    for hook in hooks:
        hook.remove()
    return "+".join(sorted(seen)) or "unknown"


def machine(runs):
    """Versions, threads and the CPU, as one line."""
    packages = ["torch", *(p for run in runs.values() for p in run.packages)]
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    versions = ", ".join(f"{p} {version(p)}" for p in packages)
    return f"{versions}; {torch.get_num_threads()} threads, {cpu}; batches of {BATCH}"


def say(line):
    print(line, flush=True)  # also into a file at once: --quality runs for long


# --- Modes ----------------------------------------------------------------------------


def speed(rounds, steps):
    """The three in turn, so that a machine that gets slower slows down all of them."""
    runs, batches = build(PEERS), shuffled_batches()
    say(machine(runs))
    precisions = {name: precision(run, next(batches)) for name, run in runs.items()}
    rates = {name: [] for name in runs}
    for i in range(1, rounds + 1):
        for name, run in runs.items():
            for step in range(1, UNTIMED + steps + 1):
                if step == UNTIMED + 1:
                    start = time.perf_counter()
                run.step(next(batches), step, 0.5)
            rates[name].append(steps * BATCH / (time.perf_counter() - start))
        now = ", ".join(f"{name} {rate[-1]:.1f}" for name, rate in rates.items())
        say(f"round {i} of {rounds}: {now} pictures/s")
    say(f"\n{'':<10} parameters   training pictures/s: median (min-max)   precision")
    for name, rate in rates.items():
        span = f"{median(rate):.1f} ({min(rate):.1f}-{max(rate):.1f})"
        say(f"{name:<10} {size(runs[name]):>10,}   {span:<37}  {precisions[name]}")
    better = [max(pair) for pair in zip(*(rates[name] for name in PEERS))]
    ratios = [ours / peer for ours, peer in zip(rates["ours"], better)]
    span = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    say(f"ours / the better peer of each round: median {span}")


def clean_share(run, n):
    """Share of clean pictures among n samples, from the same seed each time."""
    with torch.random.fork_rng(devices=[]):  # the training noise goes on as if unasked
        torch.manual_seed(1)
        parts = [run.sample(len(part)) for part in torch.arange(n).split(BATCH)]
    return float(shapes.score(torch.cat(parts).clamp(-1, 1))["clean"])


def quality(name, minutes, every, samples):
    """Trains one of them and scores it now and then, which does not count as time."""
    peers = [name] if name in PEERS else []
    batches = shuffled_batches()
    x_0 = next(batches)  # the data is drawn here, and not on the clock
    kind = precision(build(peers)[name], x_0)  # its step is not part of the run
    run = build(peers)[name]
    say(machine({name: run}))
    say(f"{name}: {size(run):,} parameters, {kind}, {samples} samples per score")
    spent, step, due, losses = 0.0, 0, min(every, minutes), []
    start = time.perf_counter()
    while True:
        step += 1
        loss = run.step(x_0, step, min(1, spent / (60 * minutes)))
        losses.append(loss.item())
        x_0 = next(batches)
        now = time.perf_counter()
        spent, start = spent + now - start, now
        if spent < 60 * due:
            continue
        clean = clean_share(run, samples)
        at, mean = f"{spent / 60:6.2f} minutes", sum(losses) / len(losses)
        say(f"{at}  {step:6} steps  loss {mean:.4f}  {clean:6.1%} clean")
        if clean >= GOAL:
            say(f"{name}: {GOAL:.0%} clean after {spent / 60:.2f} minutes")
            return
        if spent >= 60 * minutes:
            say(f"{name}: not {GOAL:.0%} clean within {minutes:g} minutes")
            return
        due, losses = min(due + every, minutes), []
        start = time.perf_counter()


def main():
    p = argparse.ArgumentParser(
        description="Compare training here with diffusers and with"
        " denoising-diffusion-pytorch: speed, and quality after a given time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    mode = p.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--speed",
        action="store_true",
        default=argparse.SUPPRESS,
        help="time training steps of all three",
    )
    mode.add_argument(
        "--quality",
        choices=("ours", *PEERS),
        default=argparse.SUPPRESS,
        help="train this one and score its samples",
    )
    for flag, kind, default, words in (
        ("--rounds", int, 5, "turns of each, for --speed"),
        ("--steps", int, 10, "timed steps of a turn, for --speed"),
        ("--minutes", float, 40, "training time, without scoring, for --quality"),
        ("--every", float, 5, "minutes between two scores, for --quality"),
        ("--samples-per-score", int, 256, "pictures to score, for --quality"),
        ("--threads", int, 2, "CPU threads"),
    ):
        p.add_argument(flag, type=kind, default=default, metavar="N", help=words)
    args = p.parse_args()
    numbers = (args.rounds, args.steps, args.minutes, args.every)
    if not min(*numbers, args.samples_per_score, args.threads) > 0:
        p.error("all numbers must be above 0")
    torch.set_num_threads(args.threads)
    if "quality" in args:
        quality(args.quality, args.minutes, args.every, args.samples_per_score)
    else:
        speed(args.rounds, args.steps)


if __name__ == "__main__":
    main()
