"""The article's classifier with each kernel: S4D, DSS and S4, under one budget.

    python tests/measure/kernels.py          write assets/kernels.json, for Appendix B
    python tests/measure/kernels.py --quick  one epoch, one seed; writes nothing

The recipe is that of `train_digits`, with fewer epochs; seeds 0, 1 and 2. Nothing is
chosen, so the validation images are only watched.
"""

import time

import jax
import numpy as np
import record  # it puts the article on the path
from flax import nnx

# isort: split
from render.memory import keep_memory

import annotated_s4d as s4d


def run(kernel, seed, epochs):
    """Train one model and test it. Returns its number of parameters, and the rest."""
    data, validation, test = s4d.load_digits()
    model, start = s4d.digit_model(seed, kernel=kernel), time.perf_counter()

    def watch(history):
        step, loss, _, accuracy = history[-1]
        seconds = time.perf_counter() - start
        record.log(
            f"{kernel:4s} seed {seed} step {step:5d} {seconds:5.0f} s"
            f"   loss {loss:.3f}   validation {accuracy:.1%}"
        )

    options = dict(epochs=epochs, seed=seed, augment=s4d.nudged, watch=watch)
    history = s4d.train(model, data, validation, **options)
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(p.size for p in params), dict(
        seed=seed,
        seconds=time.perf_counter() - start,
        validation=history[-1][3],
        test=s4d.evaluate(model, test)[1],
    )


def measure(options, kernel, seeds, epochs):
    """Train with each seed. Returns what the article reads: mean, spread, all runs."""
    runs = []
    for seed in seeds:
        name = f"{kernel}, seed {seed}"
        parameters, result = record.once(options, name, run, kernel, seed, epochs)
        runs.append(result)
    test = [result["test"] for result in runs]
    return dict(
        parameters=parameters,
        runs=runs,
        mean=np.mean(test),
        spread=np.std(test, ddof=1) if len(test) > 1 else 0.0,
        seconds=np.mean([result["seconds"] for result in runs]),
    )


def main():
    what = "the article's classifier with S4D, DSS and S4, under one budget"
    quick = "one epoch, seed 0"
    options = record.begin(record.parser(what, "kernels", quick))
    epochs, seeds = (1, [0]) if options.quick else (15, [0, 1, 2])
    keep_memory()  # as the script does
    result = dict(epochs=epochs, seeds=seeds)
    for kernel in ("s4d", "dss", "s4"):
        r = result[kernel] = measure(options, kernel, seeds, epochs)
        accuracy = f"{r['mean']:.2%} ± {r['spread']:.2%}"
        print(f"{kernel}: {r['parameters']:,} parameters, {accuracy}")
    record.keep(options, **result)


if __name__ == "__main__":
    main()
