"""Sequential MNIST from the command line: one run, its time, its test accuracy.

    python tests/measure/mnist.py                     fetches MNIST
    python tests/measure/mnist.py --data-dir DIR      reads its four files from a folder
    python tests/measure/mnist.py --quick             one epoch; writes nothing

Starts `notebooks/training.py` and keeps what that reports in assets/mnist.json, which
Part 13 reads. A run that was stopped goes on where it was: its checkpoints are in
--folder until it has ended.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import record  # it puts the article on the path

# isort: split
import training

SETTINGS = (
    "--dataset mnist --d-model 64 --d-state 64 --n-layers 3 --expand 0 "
    "--lr 0.01 --dropout 0 --seed 0"
)


def reported(settings, images, metrics, said):
    """What a run has reported: its settings, its lines of JSON, its last words."""
    return dict(
        command="python notebooks/training.py " + settings,
        images=images,
        epochs=[json.loads(line) for line in metrics.splitlines()],
        test=float(re.search(r"test: .*accuracy (\S+)%", said)[1]) / 100,
    )


def main():
    what = "one run of sequential MNIST, its time and its test accuracy"
    flags = record.parser(what, "mnist", "one epoch")
    flags.add_argument("--data-dir", help="folder with MNIST's four files")
    flags.add_argument("--folder", type=Path, help="for checkpoints (a temporary one)")
    options = record.begin(flags, same=("data_dir", "folder"))
    epochs = 1 if options.quick else 27
    settings = f"{SETTINGS} --epochs {epochs}"
    place = Path(tempfile.gettempdir()) / f"annotated_s4d_mnist_{epochs}"
    folder = options.folder or place
    folder.mkdir(parents=True, exist_ok=True)
    words = [*shlex.split(settings), "--checkpoint-dir", folder / "run"]
    words += ["--metrics", folder / "run.jsonl"]
    if options.data_dir:
        words += ["--data-dir", options.data_dir]
    words += ["--resume"] * (folder / "run").exists()
    command, said = [sys.executable, training.__file__, *words], ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends itself, and saves
        for line in run.stdout:
            print(line, end="", flush=True)
            said = line
    if run.returncode:
        return run.returncode
    metrics = (folder / "run.jsonl").read_text(encoding="utf-8")
    images = [len(part[0]) for part in training.load_mnist(options.data_dir)]
    record.keep(options, **reported(settings, images, metrics, said))
    shutil.rmtree(folder / "run")
    (folder / "run.jsonl").unlink()


if __name__ == "__main__":
    sys.exit(main())
