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


def reported(images, metrics, said):
    """What a run has reported: its lines of JSON, its last words."""
    return dict(
        images=images,
        epochs=[json.loads(line) for line in metrics.splitlines()],
        test=float(re.search(r"test: .*accuracy (\S+)%", said)[1]) / 100,
    )


def main():
    parser = record.parser("one run of sequential MNIST, its time and test", "mnist")
    parser.add_argument("--data-dir", help="folder with MNIST's four files")
    place = Path(tempfile.gettempdir()) / "annotated_s4d_mnist"
    parser.add_argument(
        "--folder", type=Path, default=place, help=f"for checkpoints ({place})"
    )
    options = parser.parse_args()
    settings = f"{SETTINGS} --epochs {1 if options.quick else 27}"
    folder = options.folder
    folder.mkdir(exist_ok=True)
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
    command = "python notebooks/training.py " + settings
    file = record.place(options, "mnist")
    record.keep(file, command, **reported(images, metrics, said))
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
