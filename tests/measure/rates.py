"""Do the parameters of the memory need a rate of their own, and no weight decay?

    python tests/measure/rates.py          some four minutes
    python tests/measure/rates.py --quick  one seed; writes nothing

The small classifier of Part 13 on the digits of 64 pixels, trained with three seeds as
it is, with one rate for all parameters, with weight decay for all, and with both.
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


def reached(variant, seeds):
    """Train a variant with each seed. Returns the runs, mean and spread."""
    runs = [
        evidence.train_variant("digits", None, seed, rates=VARIANTS[variant])[1]
        for seed in seeds
    ]
    test = [run["test"] for run in runs]
    spread = float(np.std(test, ddof=1)) if len(test) > 1 else 0.0
    return dict(runs=runs, mean=float(np.mean(test)), spread=spread)


def main():
    what = "rates and decay of the parameters of the memory"
    options = record.begin(record.parser(what, "rates", "one seed"))
    keep_memory()
    seeds = (0,) if options.quick else evidence.SEEDS
    found = {}
    for variant in VARIANTS:
        name = f"digits, {variant}"
        found[variant] = record.once(options, name, reached, variant, seeds)
        record.log("  {mean:.3f} ± {spread:.3f}".format(**found[variant]))
    record.keep(options, seeds=seeds, lr=LR, decay=DECAY, digits=found)


if __name__ == "__main__":
    main()
