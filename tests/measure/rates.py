"""Do the parameters of the memory need a rate of their own, and no weight decay?

    python tests/measure/rates.py --data-dir DIR      some ten minutes

The small classifiers of Part 13, each trained with three seeds as it is, with one rate
for all parameters, with weight decay for all, and with both. DIR holds MNIST's four
files; without it they are fetched.
"""

import numpy as np
import record  # it puts the article on the path

# isort: split
import evidence
from render.memory import keep_memory

LR = evidence.SCHEDULE["digits"]["lr"]
DECAY = 0.05  # what the other parameters get
VARIANTS = {
    "as it is": {},
    "one rate": dict(ssm_lr=LR),
    "decay": dict(ssm_decay=DECAY),
    "one rate, decay": dict(ssm_lr=LR, ssm_decay=DECAY),
}
TASKS = "digits", "small"


def reached(task, folder, variant, seeds):
    """Train a variant with each seed. Returns the runs, mean and spread."""
    runs = [
        evidence.train_variant(task, folder, seed, rates=VARIANTS[variant])[1]
        for seed in seeds
    ]
    test = [run["test"] for run in runs]
    spread = float(np.std(test, ddof=1)) if len(test) > 1 else 0.0
    return dict(runs=runs, mean=float(np.mean(test)), spread=spread)


def main():
    quick = "one seed, the digits of 64 pixels alone"
    flags = record.parser("rates and decay of the memory", "rates", quick)
    flags.add_argument("--data-dir", help="the folder with MNIST's four files")
    options = record.begin(flags, same=("data_dir",))
    keep_memory()
    seeds = (0,) if options.quick else evidence.SEEDS
    found = {}
    for task in TASKS[:1] if options.quick else TASKS:
        found[task] = {}
        for variant in VARIANTS:
            pieces = task, options.data_dir, variant, seeds
            found[task][variant] = record.once(
                options, f"{task}, {variant}", reached, *pieces
            )
            record.log(f"  {found[task][variant]['mean']:.3f}")
    record.keep(options, seeds=seeds, lr=LR, decay=DECAY, **found)


if __name__ == "__main__":
    main()
