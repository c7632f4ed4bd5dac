"""Sample and hold (Part 14): S4D of two layers and of four, and one selective layer.

    python tests/measure/selective.py          write assets/selective.json, for Part 14
    python tests/measure/selective.py --quick  30 steps, one seed; writes nothing

Each is trained with seeds 0, 1 and 2: 1,500 steps of Adam, 16 rows of 128 samples, new
ones at every step, width 32. The rates are those of Part 11, without weight decay; no
setting was searched, for any of them. What is left is the mean squared error as a share
of the answer's mean square, on rows that no training has seen.
"""

import functools
import time

import jax.numpy as jnp
import numpy as np
import record  # it puts the article on the path
from flax import nnx

# isort: split
from render.memory import keep_memory

import annotated_s4d as s4d

MODELS = {  # the blocks of S4D have an FFN, the selective one has none
    "S4D, two layers": dict(n_layers=2, d_state=64),
    "S4D, four layers": dict(n_layers=4, d_state=64),
    "selective, one layer": dict(n_layers=1, d_state=16, kernel="selective", expand=0),
}
LENGTHS = 128, 1024  # trained at the first
EXAMPLE = 8  # the seed of the row that is drawn


def error(model, u, held):
    """The mean squared error."""
    return jnp.mean((model(u) - held) ** 2)


@nnx.jit
def train_step(model, optimizer, u, held):
    loss, grads = nnx.value_and_grad(error)(model, u, held)
    optimizer.update(model, grads)
    return loss


def left(model, L):
    """The error on 64 new rows of L samples, as a share of the answer's mean square."""
    u, held = s4d.sample_and_hold(np.random.default_rng(1000), 64, L)
    return float(error(functools.partial(s4d.call, model), u, held) / np.mean(held**2))


def example(model):
    """One new row: value, marks, answer, what the model says, and dt of the four
    channels where a mark changes it most. `open` counts those of at least tenfold."""
    u, held = s4d.sample_and_hold(np.random.default_rng(EXAMPLE), 1, LENGTHS[0])
    block = model.stack.blocks[0]
    dt = block.ssm.system(block.norm(model.encoder(jnp.asarray(u))))[-1][0].T
    mark = u[0, :, 1] == 1
    ratio = np.median(dt[:, mark], 1) / np.median(dt[:, ~mark], 1)
    most = np.argsort(-ratio)[:4]
    row = dict(value=u[0, :, 0], answer=held[0, :, 0], said=s4d.call(model, u)[0, :, 0])
    return {
        name: np.round(np.float64(v), 3).tolist() for name, v in row.items()
    } | dict(
        marks=np.flatnonzero(mark).tolist(),
        dt=[[float(f"{v:.2g}") for v in channel] for channel in np.asarray(dt)[most]],
        open=int((ratio >= 10).sum()),
    )


def run(name, seed, steps):
    """Train one model and ask it. Returns its number of parameters, and the rest."""
    options = dict(d_model=32, pooling="none") | MODELS[name]
    model = s4d.S4DModel(2, 1, **options, rngs=nnx.Rngs(seed))
    optimizer = s4d.make_optimizer(model, steps, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = train_step(model, optimizer, *s4d.sample_and_hold(rng))
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            record.log(
                f"{name}, seed {seed} step {step:5d} {seconds:4.0f} s {loss:.4f}"
            )
    seconds = time.perf_counter() - start
    result = dict(seed=seed, seconds=seconds)
    result |= {f"left at {L}": left(model, L) for L in LENGTHS}
    if "selective" in name:
        result["example"] = example(model)
    return learned(model), result


def learned(model):
    """How many numbers a model learns."""
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return sum(p[...].size for _, p in leaves)


def main():
    what = "sample and hold: S4D with two and four layers, one selective layer"
    quick = "30 steps, seed 0"
    options = record.begin(record.parser(what, "selective", quick))
    steps, seeds = (30, [0]) if options.quick else (1500, [0, 1, 2])
    keep_memory()  # as the script does
    models = {}
    for name in MODELS:
        runs = []
        for seed in seeds:
            piece = f"{name}, seed {seed}"
            parameters, result = record.once(options, piece, run, name, seed, steps)
            runs.append(result)
        found = models[name] = dict(
            parameters=parameters, seconds=np.mean([r["seconds"] for r in runs])
        )
        for L in LENGTHS:
            shares = [result[f"left at {L}"] for result in runs]
            spread = np.std(shares, ddof=1) if len(shares) > 1 else 0.0
            found[f"left at {L}"] = dict(mean=np.mean(shares), spread=spread)
            print(
                f"{name}: {parameters:,} parameters, {np.mean(shares):.2%} left at {L}"
            )
        found["runs"] = runs
    record.keep(options, steps=steps, seeds=seeds, models=models)


if __name__ == "__main__":
    main()
