"""The article's classifier with each kernel: S4D, DSS and S4, under one budget.

    python tests/measure_kernels.py
    python tests/measure_kernels.py --epochs 1 --seeds 0    a rehearsal

Both write assets/kernels.json, which the table of Appendix B reads; delete it after a
rehearsal.

The recipe is that of `train_digits`, with fewer epochs; seeds 0, 1 and 2. Nothing is
chosen, so the validation images are only watched.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import flax
import jax
import numpy as np
from flax import nnx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
from render.memory import keep_memory  # noqa: E402

import annotated_s4d as s4d  # noqa: E402


def run(kernel, seed, epochs):
    """Train one model and test it."""
    data, validation, test = s4d.load_digits()
    model, start = s4d.digit_model(seed, kernel=kernel), time.perf_counter()

    def watch(history):
        step, loss, _, accuracy = history[-1]
        seconds = time.perf_counter() - start
        print(
            f"{kernel:4s} seed {seed} step {step:5d} {seconds:5.0f} s"
            f"   loss {loss:.3f}   validation {accuracy:.1%}",
            flush=True,
        )

    options = dict(epochs=epochs, seed=seed, augment=s4d.nudged, watch=watch)
    history = s4d.train(model, data, validation, **options)
    return model, dict(
        seed=seed,
        seconds=time.perf_counter() - start,
        validation=history[-1][3],
        test=s4d.evaluate(model, test)[1],
    )


def measure(kernel, seeds, epochs):
    """Train with each seed. Returns what the article reads: mean, spread, all runs."""
    runs = []
    for seed in seeds:
        model, result = run(kernel, seed, epochs)
        runs.append(result)
    test = [result["test"] for result in runs]
    return dict(
        parameters=sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))),
        runs=runs,
        mean=np.mean(test),
        spread=np.std(test, ddof=1) if len(test) > 1 else 0.0,
        seconds=np.mean([result["seconds"] for result in runs]),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    keep_memory()  # as the script does
    result = dict(
        command=" ".join(["python tests/measure_kernels.py", *sys.argv[1:]]),
        versions=dict(
            python=platform.python_version(), jax=jax.__version__, flax=flax.__version__
        ),
        device=str(jax.devices()[0]),
        epochs=arguments.epochs,
        seeds=arguments.seeds,
    )
    for kernel in ("s4d", "dss", "s4"):
        r = result[kernel] = measure(kernel, arguments.seeds, arguments.epochs)
        accuracy = f"{r['mean']:.2%} ± {r['spread']:.2%}"
        print(f"{kernel}: {r['parameters']:,} parameters, {accuracy}")
    path = ROOT / "assets" / "kernels.json"
    path.write_text(json.dumps(result, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
