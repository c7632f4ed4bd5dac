"""Sequential MNIST from the command line: one run, its time, its test accuracy.

    python tests/measure_mnist.py                     fetches MNIST
    python tests/measure_mnist.py --data-dir DIR      reads its four files from a folder

Starts `annotated_s4d.py train` and keeps what that reports in assets/mnist.json, which
Part 13 reads. A run that was stopped goes on where it was if --folder and --resume are
given.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import flax
import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import annotated_s4d as s4d  # noqa: E402

SETTINGS = "--dataset mnist --d-model 64 --d-state 64 --n-layers 3 --seed 0"


def record(settings, images, metrics, said):
    """What a run has reported: its settings, its lines of JSON, its last words."""
    return dict(
        command="python annotated_s4d.py train " + settings,
        versions=dict(
            python=platform.python_version(), jax=jax.__version__, flax=flax.__version__
        ),
        cores=os.cpu_count(),
        images=images,
        epochs=[json.loads(line) for line in metrics.splitlines()],
        test=float(re.search(r"test: .*accuracy (\S+)%", said)[1]) / 100,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with MNIST's four files")
    parser.add_argument("--folder", help="for checkpoints (a temporary one)")
    parser.add_argument("--resume", action="store_true", help="go on in that folder")
    parser.add_argument("--epochs", type=int, default=14, help="(14)")
    options = parser.parse_args()
    settings = f"{SETTINGS} --epochs {options.epochs}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        words = [*shlex.split(settings), "--checkpoint-dir", folder / "run"]
        words += ["--metrics", folder / "run.jsonl"]
        if options.data_dir:
            words += ["--data-dir", options.data_dir]
        words += ["--resume"] * options.resume
        command = [sys.executable, ROOT / "annotated_s4d.py", "train", *words]
        said = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            for line in run.stdout:
                print(line, end="", flush=True)
                said = line
        if run.returncode:
            return run.returncode
        metrics = (folder / "run.jsonl").read_text(encoding="utf-8")
    images = [len(part[0]) for part in s4d.load_mnist(options.data_dir)]
    text = json.dumps(record(settings, images, metrics, said), indent=1)
    (ROOT / "assets" / "mnist.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
