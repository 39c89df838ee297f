"""Trains on a cloud GPU: modal run modal_train.py --epochs 200 --batch-size 128

The training is train.py's own, only elsewhere: on an A100 at modal.com, with a volume named
diffusion-checkpoints in place of the folder checkpoints/. Your own machine needs nothing
but modal. Fetch the result with

    modal volume get diffusion-checkpoints best.pt ./checkpoints/
    modal volume get diffusion-checkpoints latest.pt ./checkpoints/
"""

import time

import modal

FOLDER = "/checkpoints"  # where the volume appears in the cloud

app = modal.App("toy-diffusion")
volume = modal.Volume.from_name("diffusion-checkpoints", create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("gcc", "libc6-dev")  # for torch.compile
    .pip_install("torch", "numpy", "matplotlib", "tensorboard", "tqdm")
    .add_local_python_source("ddpm", "shapes", "train")
)


@app.function(
    image=image, gpu="A100", volumes={FOLDER: volume}, timeout=24 * 3600, retries=3
)
def train_in_cloud(flags, resume, name, folder=FOLDER):
    """Trains with train.py's flags, a dictionary; name tells this run from others.

    Modal may stop a machine at any time and start the function again with the same
    arguments. If the volume then holds a checkpoint of this very run, it goes on from it.
    """
    from pathlib import Path

    import train

    # Only flags that differ from the default count as given, as on a command line.
    default = train.parser().get_default
    given = [
        f"--{f.replace('_', '-')}={v}" for f, v in flags.items() if v != default(f)
    ]
    given += ["--resume"] * resume + [
        "--checkpoints",
        folder,
        "--logs",
        f"{folder}/logs",
    ]
    args = train.parse(given)
    latest = Path(folder) / "latest.pt"
    try:
        if train.load_checkpoint(latest, resume=True)[0]["name"] == name:
            args.resume = True
    except SystemExit:  # none, or one that this program cannot read: not of this run
        pass
    commit = (lambda: None) if modal.is_local() else volume.commit
    train.train(args, name, after_epoch=commit)


@app.local_entrypoint()
def main(
    epochs: int = 100,
    samples: int = 10_000,
    batch_size: int = 64,
    lr: float = 2e-4,
    resume: bool = False,
    seed: int = 0,
    device: str = "auto",
):
    """Train a diffusion model on 32x32 pictures of shapes on an A100 at modal.com."""
    flags = {"epochs": epochs, "samples": samples, "batch_size": batch_size}
    flags |= {"lr": lr, "seed": seed, "device": device}
    train_in_cloud.remote(flags, resume, time.strftime("%Y-%m-%d_%H-%M-%S"))
