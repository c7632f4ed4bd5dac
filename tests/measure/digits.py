"""Three seeds of the article's classifier, and a GRU of the same size and budget.

    python tests/measure/digits.py           train everything, write assets/digits.json
    python tests/measure/digits.py --quick   a minute's rehearsal; writes nothing

The GRU has two layers between the same encoder and decoder, with about as many
parameters as the S4D model, and trains for about as many seconds. Its learning rate is
chosen on the validation images, with seed 0.
"""

import time

import jax
import numpy as np
import record  # it puts the article on the path
from flax import nnx

# isort: split
from render.memory import keep_memory

import annotated_s4d as s4d


class GRU(nnx.Module):
    """Encoder, residual GRU layers, mean over time, decoder: to logits (batch, 10)."""

    def __init__(self, width=95, layers=2, dropout=0.1, *, rngs):
        self.encoder = nnx.Linear(1, width, rngs=rngs)
        self.norms = nnx.List(
            [nnx.LayerNorm(width, rngs=rngs) for _ in range(layers + 1)]
        )
        cells = [nnx.GRUCell(width, width, rngs=rngs) for _ in range(layers)]
        self.layers = nnx.List([nnx.RNN(cell) for cell in cells])
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.decoder = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, u):
        h = self.encoder(u)
        for norm, layer in zip(self.norms, self.layers):
            h = h + self.dropout(layer(norm(h)))
        return self.decoder(self.norms[-1](h).mean(1))


def size(model):
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def make_gru(seed):
    return GRU(rngs=nnx.Rngs(seed, dropout=jax.random.key(seed, impl="rbg")))


def seconds_per_epoch(model, data, batch_size=32):
    """Time a few steps, after compilation."""
    optimizer = s4d.make_optimizer(model, 100)
    u, labels = data[0][:batch_size], data[1][:batch_size]
    float(s4d.train_step(model, optimizer, u, labels))
    start = time.perf_counter()
    for _ in range(10):
        float(s4d.train_step(model, optimizer, u, labels))
    return (time.perf_counter() - start) / 10 * len(data[0]) / batch_size


def run_gru(seed, epochs, lr):
    data, validation, test = s4d.load_digits()
    model, start = make_gru(seed), time.perf_counter()
    history = s4d.train(
        model, data, validation, epochs=epochs, seed=seed, augment=s4d.nudged, lr=lr
    )
    return dict(
        seed=seed,
        seconds=time.perf_counter() - start,
        lr=lr,
        epochs=epochs,
        validation=history[-1][3],
        test=s4d.evaluate(model, test)[1],
    )


def run_s4d(seed):
    start = time.perf_counter()
    model, history, test = s4d.train_digits(seed)
    return dict(
        seed=seed,
        seconds=time.perf_counter() - start,
        validation=history[-1][3],
        test=s4d.evaluate(model, test)[1],
    )


def summary(runs, parameters):
    test = [run["test"] for run in runs]
    return dict(
        parameters=parameters,
        runs=runs,
        mean=np.mean(test),
        spread=np.std(test, ddof=1),
        seconds=np.mean([r["seconds"] for r in runs]),
    )


def main():
    what = "three seeds of the article's classifier, and a GRU as large"
    quick = "two epochs of the GRU, nothing written"
    options = record.begin(record.parser(what, "digits", quick))
    keep_memory()  # as the script does
    data, *_ = s4d.load_digits()
    epoch = record.once(options, "an epoch", seconds_per_epoch, make_gru(0), data)
    if options.quick:
        print(f"GRU: {size(make_gru(0)):,} parameters, {epoch:.1f} s an epoch")
        found = run_gru(0, 2, 4e-3)
        record.keep(options, gru_tried=[found])
        return print(found)

    def gru_runs(epochs, *runs):
        for seed, lr in runs:
            name = f"GRU, seed {seed}, rate {lr:g}"
            yield record.once(options, name, run_gru, seed, epochs, lr)

    ours = [
        record.once(options, f"S4D, seed {seed}", run_s4d, seed) for seed in (0, 1, 2)
    ]
    epochs = round(np.mean([run["seconds"] for run in ours]) / epoch)
    tried = list(gru_runs(epochs, (0, 1e-3), (0, 4e-3), (0, 1e-2)))
    best = max(tried, key=lambda run: run["validation"])
    gru = [best, *gru_runs(epochs, (1, best["lr"]), (2, best["lr"]))]
    result = dict(
        s4d=summary(ours, size(s4d.digit_model(0))),
        gru=summary(gru, size(make_gru(0))),
        gru_tried=tried,
    )
    record.keep(options, **result)
    for name in ("s4d", "gru"):
        r = result[name]
        print(
            f"{name}: {r['parameters']:,} weights, {r['mean']:.2%} ± {r['spread']:.2%}"
        )


if __name__ == "__main__":
    main()
