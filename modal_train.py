"""Trains on an A100 at modal.com: modal run modal_train.py, with the flags of train.py."""

import subprocess
import sys
import time
from pathlib import Path

import modal

app = modal.App("toy-diffusion")
volume = modal.Volume.from_name("diffusion-checkpoints", create_if_missing=True)
packages = ("torch", "numpy", "matplotlib", "pillow", "tensorboard", "tqdm")
image = modal.Image.debian_slim(python_version="3.12").uv_pip_install(*packages)
image = image.add_local_python_source("ddpm", "shapes", "sample", "train")


@app.function(image=image, gpu="A100", volumes={"/volume": volume}, timeout=24 * 3600, retries=3)
def train(flags, run, folder="/volume", script="/root/train.py"):
    """Runs train.py with these flags, a list of words. run: names the call. Returns the status."""
    from train import set_aside

    folder, call = Path(folder), Path(folder, "run.txt")
    if not call.exists() or call.read_text() != run:
        if "--resume" not in flags:
            set_aside(folder, run)
        call.write_text(run)
    elif (folder / "latest.pt").exists():  # Modal repeats a call that was interrupted
        flags = [*flags, "--resume"]
    return subprocess.call([sys.executable, script, *flags, "--checkpoints", "."], cwd=folder)


@app.local_entrypoint()
def main(*flags):
    if any(flag.startswith("--data") for flag in flags):
        sys.exit("error: --data does not reach the cloud")
    if status := train.spawn(list(flags), time.strftime("%Y-%m-%d_%H-%M-%S")).get():
        sys.exit(status)
