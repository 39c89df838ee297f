"""Trains on a cloud GPU: modal run modal_train.py --epochs 200 --batch-size 128

The training is train.py's own, with its flags, on an A100 at modal.com, with a volume named
diffusion-checkpoints in place of the folder checkpoints/. Your machine needs nothing but modal, and
may be switched off after modal run --detach modal_train.py.
"""

import sys
import time
from pathlib import Path

import modal

FOLDER = "/checkpoints"  # where the volume appears in the cloud

app = modal.App("toy-diffusion")
volume = modal.Volume.from_name("diffusion-checkpoints", create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("gcc", "libc6-dev")  # for --compile
    .pip_install("torch", "numpy", "matplotlib", "tensorboard", "tqdm")
    .add_local_python_source("ddpm", "shapes", "train")
)


@app.function(image=image, gpu="A100", volumes={FOLDER: volume}, timeout=24 * 3600, retries=3)
def train_in_cloud(flags, name, folder=FOLDER):
    """Runs train.py with these flags, a list of words. name: tells this run from others."""
    import torch

    import train

    # Modal may stop a machine at any time and call the function again with the same arguments. If
    # the volume then holds a checkpoint of this very run, the run goes on from there.
    latest = Path(folder) / "latest.pt"
    last = torch.load(latest, map_location="cpu", weights_only=True) if latest.exists() else {}
    if last.get("name") == name and "--resume" not in flags:
        flags = [*flags, "--resume"]
    try:
        args, saved = train.parse([*flags, "--checkpoints", folder, "--logs", f"{folder}/logs"])
        after_epoch = (lambda: None) if modal.is_local() else volume.commit
        train.train(args, saved, name, after_epoch)
    except SystemExit as stop:  # a wrong flag, for example: Modal need not try again
        return stop.code


@app.local_entrypoint()
def main(*flags):
    """Takes the flags of train.py."""
    sys.exit(train_in_cloud.remote(list(flags), time.strftime("%Y-%m-%d_%H-%M-%S")))
