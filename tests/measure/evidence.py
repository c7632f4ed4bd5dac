"""What Part 13 reports: initializations, ablations, memory, other kinds of model.

    python tests/measure/evidence.py --data-dir DIR         everything, some two hours
    python tests/measure/evidence.py delay ablations        some experiments only

Experiments: initializations, delay, ablations, baselines, cost, steps. Each run is
written to assets/evidence.json when it ends, and not run again: a measurement that was
stopped goes on where it was. Progress is on stderr. DIR holds MNIST's four files;
without it they are fetched.

All models are small and their trainings short, so that three seeds of each fit into
two hours on two CPU cores. Nothing is chosen but the learning rates of the GRU and of
the Transformer, on the validation images, with seed 0.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record  # it puts the article on the path
from flax import nnx

# isort: split
import training
from digits import GRU, size
from render.memory import keep_memory

import annotated_s4d as s4d

COMMAND = "python tests/measure/evidence.py --data-dir DIR"
FILE = record.ASSETS / "evidence.json"
SEEDS = (0, 1, 2)
INITS = ("legs", "inv", "lin", "quad", "rand", "real")
SIZES = dict(digits=(64, 32, 2), small=(32, 32, 2), whole=(32, 32, 2))
SCHEDULE = dict(
    digits=dict(epochs=10, batch_size=32, lr=1e-2, augment=s4d.nudged),
    small=dict(epochs=3, batch_size=16, lr=1e-2),
    whole=dict(epochs=3, batch_size=16, lr=1e-2),
)
IMAGES = 4000, 500, 1000  # of MNIST at most: to train, to choose, to test
LENGTHS = (512, 1024, 2048, 4096)
ABLATIONS = {
    "bilinear": dict(discretization="bilinear"),
    "softplus": dict(real_transform="softplus"),
    "relu": dict(real_transform="relu"),
    "none": dict(real_transform="none"),
    "dt / 10": dict(dt_min=0.0001, dt_max=0.01),
    "dt * 10": dict(dt_min=0.01, dt_max=1.0),
    "B frozen": dict(frozen=("B",)),
    "A frozen": dict(frozen=("log_A_real", "A_imag")),
}


# -- data -----------------------------------------------------------------------------


@functools.cache
def load(task, folder=None):
    """Train, validation and test of a task: "digits", 8 x 8; "whole", images of MNIST;
    "small", the same at 14 x 14, each pixel the mean of four."""
    if task == "digits":
        return s4d.load_digits()
    parts = [
        [array[:n] for array in part]
        for part, n in zip(training.load_mnist(folder), IMAGES)
    ]
    if task == "whole":
        return parts
    return [(quartered(u), labels) for u, labels in parts]


def quartered(u):
    """Square images (n, L, 1) at half the resolution, (n, L / 4, 1)."""
    half = round(u.shape[1] ** 0.5) // 2
    return u.reshape(-1, half, 2, half, 2).mean((2, 4)).reshape(-1, half**2, 1)


# -- training -------------------------------------------------------------------------


def freeze(optimizer, model, names):
    """The same optimizer, whose updates of these parameters are zero."""

    def mask(params):
        def frozen(path, _):
            return any(getattr(part, "key", None) in names for part in path)

        return jax.tree.map_with_path(frozen, params)

    still = optax.masked(optax.set_to_zero(), mask)
    return nnx.Optimizer(model, optax.chain(optimizer.tx, still), wrt=nnx.Param)


def fit(model, task, seed, data, validation, frozen=(), **rates):
    """Train on a task; returns the last validation accuracy. No times: see `cost`."""
    options = SCHEDULE[task] | rates
    run = training.TrainingRun(model, data, validation, seed=seed, **options)
    if frozen:
        run.optimizer = freeze(run.optimizer, model, frozen)
    for ended in training.run_training(run):
        if ended:
            step, loss, _, accuracy = run.history[-1]
            record.log(f"  step {step} loss {loss:.3f} validation {accuracy:.1%}")
    return dict(seed=seed, validation=run.history[-1][3])


def train_variant(task, folder, seed, frozen=(), rates=None, **options):
    """Train the small classifier with some options. Returns the model and results."""
    data, validation, test = load(task, folder)
    options = dict(kernel="general") | options
    model = s4d.digit_model(seed, *SIZES[task], **options)
    result = fit(model, task, seed, data, validation, frozen, **rates or {})
    return model, result | dict(test=s4d.evaluate(model, test)[1])


def set_rate(model, rate):
    """The same model at another sampling rate."""
    model = nnx.clone(model)
    for block in model.stack.blocks:
        block.ssm.rate = rate
    return model


def every_second(model, test):
    """Accuracy on every second pixel of (images, labels), at two rates."""
    second = test[0][:, ::2], test[1]
    return {
        f"rate {rate:.0f}": s4d.evaluate(set_rate(model, rate), second)[1]
        for rate in (1.0, 2.0)
    }


def classify(task, variant, options, folder):
    """Three runs of a variant of the classifier, to be called with a seed."""
    return variant, lambda seed: train_variant(task, folder, seed, **options)[1]


# -- experiments: each yields groups of (name, run), run(seed) is a dict ---------------


def initializations(folder):
    """On all tasks. What has learned the small images is shown every second pixel."""
    yield "digits", [classify("digits", n, dict(init=n), folder) for n in INITS]

    def run(seed, init):
        model, result = train_variant("small", folder, seed, init=init)
        return result | every_second(model, load("small", folder)[2])

    yield "small", [(n, functools.partial(run, init=n)) for n in INITS]
    yield "whole", [classify("whole", n, dict(init=n), folder) for n in INITS]


def ablations(folder, tasks=("digits", "small")):
    for task in tasks:
        yield task, [classify(task, *pair, folder) for pair in ABLATIONS.items()]


def bump(L, width=16):
    """What the kernel of a smoothing delay by L / 2 is: a bump there, its sum 1."""
    K = np.exp(-0.5 * ((np.arange(L) - L // 2) / width) ** 2)
    return K / K.sum()


def fitted(A, dt, L, rcond=1e-6):
    """The error that remains when C alone is fitted, relative. A (N/2,), dt ().

    Directions weaker than rcond of the strongest are left out: without that, weights of
    a billion cancel each other, which float32 cannot hold. None is double precision's.
    """
    modes = np.exp(np.outer(np.arange(L), np.asarray(A, complex) * float(dt)))
    modes, K = np.concatenate([modes.real, -modes.imag], 1), bump(L)
    rest = modes @ np.linalg.lstsq(modes, K, rcond)[0] - K
    return float(np.linalg.norm(rest) / np.linalg.norm(K))


@functools.partial(nnx.jit, static_argnames="steps")
def delay_steps(layer, optimizer, K, steps):
    """So many steps on the relative squared error of the layer's kernel; the errors."""

    def loss_fn(layer):
        return jnp.sum((layer.kernel(K.size)[0] - K) ** 2) / jnp.sum(K**2)

    def step(carry, _):
        layer, optimizer = carry
        loss, grads = nnx.value_and_grad(loss_fn)(layer)
        optimizer.update(layer, grads)
        return (layer, optimizer), loss**0.5

    return nnx.scan(step, length=steps)((layer, optimizer), None)[1]


def train_delay(init, L, seed, N=64, steps=2000, lr=0.1, ssm_lr=0.02):
    """Train one bare kernel to be a smoothing delay; before and after, fit C alone.

    For white noise at the input, the mean squared error of the output is that of the
    kernel, so training needs no signal.
    """
    options = dict(init=init, dt_min=2 / L, dt_max=2 / L, final_act=None)
    layer = s4d.S4D(1, N, **options, rngs=nnx.Rngs(seed))
    rates = dict(lr=lr, ssm_lr=ssm_lr, weight_decay=0.0)
    optimizer = s4d.make_optimizer(layer, steps, **rates)
    A, _, _, dt = layer.system()
    result = dict(seed=seed, fitted=fitted(A[0], dt[0], L))
    result |= dict(in_double=fitted(A[0], dt[0], L, None))
    errors = delay_steps(layer, optimizer, jnp.asarray(bump(L), jnp.float32), steps)
    A, _, _, dt = layer.system()
    result |= dict(trained=float(errors[-1]))
    return result | dict(refitted=fitted(A[0], dt[0], L))


def delay(folder, lengths=LENGTHS):
    for L in lengths:
        runs = [(name, functools.partial(train_delay, name, L)) for name in INITS]
        yield str(L), runs


# -- other kinds of model --------------------------------------------------------------


class Attention(nnx.Module):
    """Causal attention of 4 heads: h (batch, L, H) to the same shape."""

    def __init__(self, width, heads=4, *, rngs):
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.heads = heads

    def split(self, h):
        shape = (*h.shape[:2], 3, self.heads, h.shape[-1] // self.heads)
        return jnp.moveaxis(self.qkv(h).reshape(shape), 2, 0)  # (3, batch, L, ...)

    def __call__(self, h):
        y = jax.nn.dot_product_attention(*self.split(h), is_causal=True)
        return self.out(y.reshape(h.shape))

    def step(self, cache, h, at):
        """One more sample h (batch, H); cache (2, batch, length, heads, H / heads)."""
        q, k, v = self.split(h[:, None])
        cache = jax.lax.dynamic_update_slice_in_dim(cache, jnp.stack([k, v]), at, 2)
        seen = (jnp.arange(cache.shape[2]) <= at)[None, None, None]
        y = jax.nn.dot_product_attention(q, *cache, mask=seen)
        return cache, self.out(y.reshape(h.shape))


class Transformer(nnx.Module):
    """Encoder, sines and cosines of the place, blocks of attention and FFN with
    LayerNorm before and residual around each, mean over time, decoder."""

    def __init__(self, width=32, layers=2, inner=80, dropout=0.1, *, rngs):
        self.encoder = nnx.Linear(1, width, rngs=rngs)
        self.attention = nnx.List([Attention(width, rngs=rngs) for _ in range(layers)])
        self.up = nnx.List([nnx.Linear(width, inner, rngs=rngs) for _ in range(layers)])
        self.down = nnx.List(
            [nnx.Linear(inner, width, rngs=rngs) for _ in range(layers)]
        )
        norms = [nnx.LayerNorm(width, rngs=rngs) for _ in range(2 * layers + 1)]
        self.norms, self.dropout = nnx.List(norms), nnx.Dropout(dropout, rngs=rngs)
        self.decoder = nnx.Linear(width, 10, rngs=rngs)

    def enter(self, u, places):
        h = self.encoder(u)
        slow = 10000.0 ** -jnp.linspace(0, 1, h.shape[-1] // 2)
        angles = places[:, None] * slow  # (L, width / 2)
        return h + jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)

    def around(self, i, h, y):
        h = h + self.dropout(y)
        inner = jax.nn.gelu(self.up[i](self.norms[2 * i + 1](h)))
        return h + self.dropout(self.down[i](inner))

    def __call__(self, u):
        h = self.enter(u, jnp.arange(u.shape[1]))
        for i, attention in enumerate(self.attention):
            h = self.around(i, h, attention(self.norms[2 * i](h)))
        return self.decoder(self.norms[-1](h).mean(1))

    def step(self, caches, u, at):
        """One more sample u (batch, 1), the at-th: the new caches, and scores."""
        h, caches = self.enter(u, jnp.full(1, at)), list(caches)
        for i, attention in enumerate(self.attention):
            caches[i], y = attention.step(caches[i], self.norms[2 * i](h), at)
            h = self.around(i, h, y)
        return caches, self.decoder(self.norms[-1](h))


def gru_step(model, x, u):
    """One more sample u (batch, 1) for a GRU: the new state of each layer, scores."""
    h, x = model.encoder(u), list(x)
    for i, (norm, layer) in enumerate(zip(model.norms, model.layers)):
        x[i], y = layer.cell(x[i], norm(h))
        h = h + y
    return x, model.decoder(model.norms[-1](h))


KINDS = {
    "s4d": lambda seed: s4d.digit_model(seed, *SIZES["small"]),
    "gru": lambda seed: GRU(width=39, rngs=dropout_rngs(seed)),
    "transformer": lambda seed: Transformer(rngs=dropout_rngs(seed)),
}
RATES = {"gru": (1e-3, 4e-3, 1e-2), "transformer": (1e-3, 2e-3, 4e-3)}


def dropout_rngs(seed):
    return nnx.Rngs(seed, dropout=jax.random.key(seed, impl="rbg"))


def train_kind(kind, task, folder, seed, **rates):
    """Train and test a kind of model."""
    data, validation, test = load(task, folder)
    model = KINDS[kind](seed)
    result = fit(model, task, seed, data, validation, **rates)
    return result | rates | dict(test=s4d.evaluate(model, test)[1])


def baselines(folder, task="small"):
    """Learning rates are tried with seed 0. The one that is best on the validation
    images is kept, and trained with the other seeds. (S4D on the same images is among
    the initializations.)"""

    def tried(kind, lr):
        train = functools.partial(train_kind, kind, task, folder, lr=lr)
        return f"{kind} {lr:g}", train

    def chosen(kind):
        def run(seed):
            trials = record.read(FILE)["baselines"]["tried"]
            runs = [trials[f"{kind} {lr:g}"][0] for lr in RATES[kind]]
            best = max(runs, key=lambda run: run["validation"])
            if seed == best["seed"]:
                return best
            return train_kind(kind, task, folder, seed, lr=best["lr"])

        return kind, run

    yield "tried", [tried(kind, lr) for kind in RATES for lr in RATES[kind]]
    yield task, [chosen(kind) for kind in RATES]


def peak_memory():
    """The most memory that this process has held so far, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def train_cost(kind, L, batch=16, repeats=10):
    """Seconds of a training step, the best of some, since the machine is shared; and
    the peak of this process, in MB."""
    model, rng = KINDS[kind](0), np.random.default_rng(0)
    u, labels = rng.normal(size=(batch, L, 1)).astype(np.float32), np.arange(batch) % 10
    optimizer, before, times = s4d.make_optimizer(model, 100), peak_memory(), []
    for _ in range(repeats + 1):  # the first compiles
        start = time.perf_counter()
        float(s4d.train_step(model, optimizer, u, labels))
        times.append(time.perf_counter() - start)
    memory = dict(before=before, peak=peak_memory())
    return dict(step=min(times[1:]), parameters=size(model)) | memory


def cost(folder, lengths=(196, 784)):
    """Time and memory of training steps, each in a process of its own."""

    def apart(kind, L):
        def run(seed):
            command = [sys.executable, __file__, "--cost", kind, str(L)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            return dict(seed=seed) | json.loads(done.stdout)

        return kind, run

    for L in lengths:
        yield str(L), [apart(kind, L) for kind in KINDS]


@functools.cache
def stepper(kind, n, many):
    """A model that has read n - many samples, and a function that reads many more."""
    model = nnx.view(KINDS[kind](0), deterministic=True)
    u = jax.random.normal(jax.random.key(0), (n, 1, 1))
    if kind == "transformer":
        shape = (2, 1, n, 4, 8)
        x = [jax.random.normal(jax.random.key(i), shape) for i in range(2)]
        step, at = model.step, jnp.arange(n - many, n)
    else:
        move = model.step if kind == "s4d" else functools.partial(gru_step, model)
        step, at = (lambda x, u, at: move(x, u)), jnp.arange(many)
        rest = [jnp.zeros((1, 39))] * 2 if kind == "gru" else model.init_state(1)
        x = jax.jit(lambda x, u: jax.lax.scan(lambda x, u: move(x, u), x, u)[0])(
            rest, u[: n - many]
        )
    return jax.jit(
        lambda x, u: jax.lax.scan(lambda x, p: step(x, *p), x, (u, at))[1]
    ), (x, u[-many:])


def steps(folder, lengths=(256, 512, 1024, 2048, 4096), many=64):
    """Microseconds of one more sample after a past of each length. Sixty-four of them
    run in one compiled scan; the best of many scans, since the machine is shared."""

    def after(kind, n):
        def run(seed):
            f, args = stepper(kind, n, many)
            jax.block_until_ready(f(*args))
            times = []
            for _ in range(20):
                start = time.perf_counter()
                jax.block_until_ready(f(*args))
                times.append(time.perf_counter() - start)
            times = 1e6 * np.array(times) / many
            return dict(seed=seed, best=times.min(), median=np.median(times))

        return kind, run

    for n in lengths:
        yield str(n), [after(kind, n) for kind in KINDS]


EXPERIMENTS = {
    f.__name__: f for f in (initializations, delay, ablations, baselines, cost, steps)
}


# -- the record ------------------------------------------------------------------------


def add(experiment, group, variant, result):
    """Add a run to the file."""
    with record.changed(FILE, COMMAND) as everything:
        everything["seeds"] = SEEDS
        place = everything.setdefault(experiment, {}).setdefault(group, {})
        runs = place.setdefault(variant, [])
        if result["seed"] not in [run["seed"] for run in runs]:  # the first one counts
            runs.append({k: rounded(v) for k, v in result.items()})
        runs.sort(key=lambda run: run["seed"])


def rounded(value):
    return float(f"{value:.6g}") if isinstance(value, (float, np.floating)) else value


def settings(folder):
    """Sizes of data and models, as run."""
    tasks = {}
    for task, sizes in SIZES.items():
        parts = load(task, folder)
        tasks[task] = dict(
            images=[len(labels) for _, labels in parts],
            length=parts[0][0].shape[1],
            sizes=sizes,
            parameters=size(s4d.digit_model(0, *sizes)),
            epochs=SCHEDULE[task]["epochs"],
            batch_size=SCHEDULE[task]["batch_size"],
        )
    return tasks


def measure(name, folder, seeds=SEEDS):
    """Do what is missing of an experiment."""
    for group, runs in EXPERIMENTS[name](folder):
        for seed in seeds[:1] if group == "tried" else seeds:
            for variant, run in runs:
                done = record.read(FILE).get(name, {}).get(group, {}).get(variant, [])
                if seed in [result["seed"] for result in done]:
                    continue
                record.log(f"{name}, {group}: {variant}, seed {seed}")
                result = run(seed)
                record.log(f"  {result}")
                add(name, group, variant, result)


def main():
    global FILE
    flags = record.parser("what Part 13 reports", "evidence")
    flags.add_argument(
        "names", nargs="*", metavar="experiment", help=str([*EXPERIMENTS])
    )
    flags.add_argument("--data-dir", help="the folder with MNIST's four files")
    flags.add_argument("--cost", nargs=2, help=argparse.SUPPRESS)
    arguments = record.begin(flags, same=("names", "data_dir"))
    keep_memory()  # as the script does
    if arguments.cost:
        kind, L = arguments.cost
        return print(json.dumps(train_cost(kind, int(L))))
    odd = set(arguments.names) - set(EXPERIMENTS)
    FILE = arguments.output or FILE
    if odd:
        flags.error(f"unknown: {sorted(odd)}; allowed: {[*EXPERIMENTS]}")
    if not set(arguments.names) or set(arguments.names) - {"delay", "cost", "steps"}:
        with record.changed(FILE, COMMAND) as everything:
            everything["settings"] = settings(arguments.data_dir)
    for name in arguments.names or EXPERIMENTS:
        measure(name, arguments.data_dir)


if __name__ == "__main__":
    main()
