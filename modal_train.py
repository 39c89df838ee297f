"""Trains on an A100 at modal.com: modal run modal_train.py, with the flags of train.py.

With modal run --detach your machine may be switched off meanwhile.
"""

import sys
import time
from pathlib import Path

import modal

FOLDER = "/checkpoints"  # where the volume appears; Modal keeps what is written there

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

    latest = Path(folder) / "latest.pt"
    try:
        # After an interruption Modal calls this again; then the volume holds this very run.
        last = torch.load(latest, map_location="cpu", weights_only=True) if latest.exists() else {}
        if last.get("name") == name:
            flags = [*flags, "--resume"]
        train.train(*train.parse([*flags, "--checkpoints", folder]), name)
    except SystemExit as stop:  # a wrong flag, for example: Modal need not try again
        return stop.code


@app.local_entrypoint()
def main(*flags):
    """Takes the flags of train.py."""
    sys.exit(train_in_cloud.remote(list(flags), time.strftime("%Y-%m-%d_%H-%M-%S")))
