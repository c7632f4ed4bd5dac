"""How fast the kernel, a training step and generation are, beside the plain forms.

    python tests/measure/speed.py            measure; write assets/speed.json and .md
    python tests/measure/speed.py --quick    five turns of each form; writes nothing

The plain form is the same model written the obvious way in JAX: the Vandermonde sum
with one complex exponential for each mode and step, a real FFT padded to twice the
length, and the GELU (in the FFN ours) and linear maps that JAX and Flax have. Where
PyTorch is installed, the authors' minimal layer stands beside it, written once more
below. A training step is measured on the authors' minimal model, and with the FFN that
our blocks have besides. The forms take turns in one run, after warming up. A ratio is
the quotient of two medians; where the turns of a form differ by more than a quarter
(from the first to the third quartile, as a share of the median) the machine was
disturbed, and no ratio is printed.
"""

import functools
import os
import platform
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
import record  # it puts the article on the path
from flax import nnx

# isort: split
from render.memory import keep_memory

import annotated_s4d as s4d

try:
    import torch
except ImportError:
    torch = None


# -- the plain forms ------------------------------------------------------------------


def plain_kernel(A, B, C, dt, L):
    """The Vandermonde sum as it is usually written."""
    A_bar, B_bar = s4d.s4d_discretize(A, B, dt)
    powers = jnp.exp((dt[..., None] * A)[..., None] * jnp.arange(L))  # (H, N/2, L)
    return 2 * jnp.einsum("hn,hnl->hl", C * B_bar, powers).real


class PlainS4D(s4d.S4D):
    """The layer with the plain kernel, the padded FFT, and the linear maps and the GELU
    that Flax and JAX have."""

    linear = nnx.Linear

    def __call__(self, u, lengths=None):
        K = plain_kernel(*self.system(), u.shape[1])
        y = s4d.padded_conv(u.swapaxes(1, 2), K).swapaxes(1, 2)
        y = jax.nn.gelu(y + self.D[...] * u, approximate=False)
        return self.mixer.act(self.mixer.linear(self.mixer.dropout(y)))


s4d.LAYERS["plain"] = PlainS4D


def torch_model(d_input, d_output, H, N, layers, expand):
    """The same classifier in PyTorch, after the authors' minimal S4D."""
    nn = torch.nn

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_dt = nn.Parameter(torch.empty(H).uniform_(-6.9, -2.3))
            self.C = nn.Parameter(torch.randn(H, N // 2, 2) * 0.5**0.5)
            self.log_A_real = nn.Parameter(torch.full((H, N // 2), -0.693))
            imag = torch.pi * torch.arange(N // 2).float()
            self.A_imag = nn.Parameter(imag.repeat(H, 1))
            self.D = nn.Parameter(torch.randn(H))
            self.mix = nn.Sequential(nn.Conv1d(H, 2 * H, 1), nn.GLU(-2))

        def system(self):  # log(A_bar), and C with B_bar in it
            A = -torch.exp(self.log_A_real) + 1j * self.A_imag
            dtA = A * torch.exp(self.log_dt)[:, None]
            return dtA, torch.view_as_complex(self.C) * (torch.exp(dtA) - 1) / A

        def step(self, x, u, A_bar, C):  # (batch, H, N/2), (batch, H)
            x = A_bar * x + u[..., None]
            y = nn.functional.gelu(2 * (C * x).sum(-1).real + self.D * u)
            return x, self.mix(y[..., None])[..., 0]

        def forward(self, u):  # (batch, H, L)
            L, (dtA, C) = u.shape[-1], self.system()
            powers = torch.exp(dtA[..., None] * torch.arange(L))
            K = 2 * torch.einsum("hn,hnl->hl", C, powers).real
            Y = torch.fft.rfft(u, 2 * L) * torch.fft.rfft(K, 2 * L)
            y = torch.fft.irfft(Y, 2 * L)[..., :L] + self.D[:, None] * u
            return self.mix(nn.functional.gelu(y))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ssm, self.norm, width = Layer(), nn.LayerNorm(H), expand * H
            self.ffn = None
            if expand:
                maps = nn.Linear(H, width), nn.GELU(), nn.Linear(width, H)
                self.ffn = nn.Sequential(nn.LayerNorm(H), *maps)

        def forward(self, u):  # (batch, L, H)
            u = u + self.ssm(self.norm(u).transpose(1, 2)).transpose(1, 2)
            return u + self.ffn(u) if self.ffn else u

        def step(self, x, u, *system):
            x, y = self.ssm.step(x, self.norm(u), *system)
            return x, u + y + (self.ffn(u + y) if self.ffn else 0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            blocks = [Block() for _ in range(layers)]
            ends = nn.Linear(d_input, H), nn.LayerNorm(H)
            self.body = nn.Sequential(ends[0], *blocks, ends[1])
            self.decoder = nn.Linear(H, d_output)

        def forward(self, u):
            return self.decoder(self.body(u).mean(1))

        @torch.no_grad()
        def stream(self, u):  # (batch, L, d_input) to (batch, L, d_output)
            first, *blocks, last = self.body
            systems = [block.ssm.system() for block in blocks]
            systems = [(torch.exp(dtA), C) for dtA, C in systems]
            x, y = [torch.zeros(len(u), H, N // 2) + 0j] * layers, []
            for sample in u.unbind(1):
                h = first(sample)
                for i, block in enumerate(blocks):
                    x[i], h = block.step(x[i], h, *systems[i])
                y.append(self.decoder(last(h)))
            return torch.stack(y, 1)

    return Model()


# -- measuring ------------------------------------------------------------------------


def take_turns(forms, turns):
    """Seconds of each form, which take turns. Returns {name: (median, spread)}."""
    for run in forms.values():
        run(), run()
    seconds = {name: [] for name in forms}
    for _ in range(turns):
        for name, run in forms.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    quartiles = {name: np.quantile(s, [0.25, 0.5, 0.75]) for name, s in seconds.items()}
    return {name: (q[1], (q[2] - q[0]) / q[1]) for name, q in quartiles.items()}


def short(value):
    """A number with three digits that count."""
    return f"{float(f'{value:.3g}'):,g}"


def rows(what, forms, turns, scale=1e3, unit="ms"):
    """Measure forms, ours first. Yields the rows of the table."""
    results = take_turns(forms, turns)
    (ours, calm), *_ = results.values()
    for name, (median, spread) in results.items():
        ratio = f"{median / ours:.1f}"
        if max(spread, calm) > 0.25:
            ratio = "disturbed"
        yield what, name, f"{short(scale * median)} {unit} ± {spread:.0%}", ratio


def blocked(f, *args):
    return lambda: jax.block_until_ready(f(*args))


def system(H=256, N=64):
    """A, B, C, dt of H channels, as a layer starts."""
    layer = s4d.S4D(H, N, init="lin", rngs=nnx.Rngs(0))
    return layer.system()


def kernels(L, turns):
    """The kernel, forward and with its gradient."""
    parts = system()
    forms = {"ours": s4d.s4d_kernel, "plain sum": plain_kernel}
    forward = {k: jax.jit(functools.partial(f, L=L)) for k, f in forms.items()}
    calls = {name: blocked(f, *parts) for name, f in forward.items()}
    yield from rows(f"kernel, L = {L:,}", calls, turns)
    calls = {
        name: blocked(jax.jit(gradient_of(f)), *parts) for name, f in forward.items()
    }
    yield from rows(f"kernel and gradient, L = {L:,}", calls, turns)


def gradient_of(f):
    def loss(*args):
        return (f(*args) ** 2).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))


def memory(L=65536):
    """What XLA sets aside for a kernel with its gradient, beside the plain sum."""
    sizes = {}
    for name, f in {"ours": s4d.s4d_kernel, "plain sum": plain_kernel}.items():
        step = jax.jit(gradient_of(functools.partial(f, L=L)))
        analysis = step.lower(*system()).compile().memory_analysis()
        sizes[name] = analysis.temp_size_in_bytes
    for name, size in sizes.items():
        what = f"memory of kernel and gradient, L = {L:,}"
        yield what, name, f"{size / 2**20:,.0f} MB", f"{size / sizes['ours']:.1f}"


def training(turns, expand, H=128, N=64, L=784, batch=32, layers=4):
    """A training step of a classifier with four layers, with an FFN or without."""
    rng = np.random.default_rng(0)
    u = rng.standard_normal((batch, L, 1)).astype(np.float32)
    labels = rng.integers(0, 10, batch)
    forms = {}
    for name, kernel in (("ours", "s4d"), ("plain JAX", "plain")):
        model = s4d.S4DModel(
            1, 10, H, N, layers, init="lin", kernel=kernel, expand=expand,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        optimizer = s4d.make_optimizer(model, 1000)
        update = nnx.cached_partial(s4d.train_step, model, optimizer)
        forms[name] = lambda update=update: float(update(u, labels))
    if torch:
        model = torch_model(1, 10, H, N, layers, expand)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        inputs, wanted = torch.tensor(u), torch.tensor(labels)

        def step():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), wanted)
            loss.backward()
            optimizer.step()
            return loss.item()

        forms["PyTorch"] = step
    what = f"training step, {batch} x {L}, {layers} layers"
    yield from rows(what + " with FFN" * bool(expand), forms, turns)


def parts(turns, rates, H=128, N=64, L=784, batch=32):
    """Where such a step goes: the parts of a block, forward and back, and how much of
    that time this machine's own matrix product, FFT or copying would need."""
    block = s4d.S4DBlock(H, N, init="lin", rngs=nnx.Rngs(0))
    layer, shape = block.ssm, (batch, L, H)
    u = jax.random.normal(jax.random.key(0), shape)

    def convolve(u):
        return layer.convolve(u.swapaxes(1, 2), K).swapaxes(1, 2)

    K = layer.kernel(L)
    rows, fft = batch * H, 5 * L * np.log2(L)
    linear = 3 * 2 * batch * L * H * 2 * H  # forward, and back to input and weights
    works = {  # what, how often in a block, its work, of which kind
        "convolution": (convolve, 1, 4 * rows * fft, "FFT"),
        "linear": (block.ffn.up, 3, linear, "product"),
        "GELU": (s4d.gelu, 3, 4 * u.nbytes, "copying"),
        "LayerNorm": (block.norm, 2, 4 * u.nbytes, "copying"),
        "all of it": (block, 1, None, None),
    }
    calls = {}
    for name, (f, *_) in works.items():
        graph, state = nnx.split(f) if isinstance(f, nnx.Module) else (f, ())

        @jax.jit
        def both(state, u, graph=graph):
            def run(state, u):
                return (nnx.merge(graph, state) if state else graph)(u)

            y, back = jax.vjp(run, state, u)
            return y, back(y)  # reads u and y, writes y and the gradient, at the least

        calls[name] = blocked(both, state, u)
    for name, (median, spread) in take_turns(calls, turns).items():
        _, times, work, kind = works[name]
        share = f"{work / rates[kind] / median:.0%} {kind}" if kind else ""
        said = f"{times} x {short(1e3 * median)} ms ± {spread:.0%}"
        yield "in a block, forward and back", name, said, share


def generation(turns, H=256, N=64, layers=4, steps=256):
    """Steps of a stream inside one compiled scan, early and late in it, and PyTorch's
    in a loop."""
    for batch in (1, 16):
        model = s4d.S4DModel(
            1, 17, H, N, layers, init="lin", pooling="none", rngs=nnx.Rngs(0)
        )
        u = jnp.ones((batch, steps, 1))
        late, _ = s4d.advance(
            model, model.init_state(batch), jnp.ones((batch, 2048, 1))
        )
        states = {"at the start": model.init_state(batch), "after 2,048 steps": late}

        @nnx.jit
        def stream(model, x, u):
            return jax.lax.scan(model.step, x, u.swapaxes(0, 1))[1]

        forms = {
            name: blocked(functools.partial(stream, model), x, u)
            for name, x in states.items()
        }
        if torch:
            plain = torch_model(1, 17, H, N, layers, expand=2)
            forms["PyTorch"] = functools.partial(plain.stream, torch.ones(u.shape))
        what = f"one step, batch {batch}, {layers} layers, H = {H}"
        yield from rows(what, forms, turns, 1e6 / steps, "µs")


def prefix(turns, H=64, N=64, L=16384):
    """A prefix through a layer: the answers alone, and with the state after it."""
    layer = s4d.S4D(H, N, rngs=nnx.Rngs(0))
    u, x = jnp.ones((1, L, H)), layer.init_state(1)
    forms = {
        "called": blocked(s4d.call, layer, u),
        "advanced": blocked(s4d.advance, layer, x, u),
    }
    yield from rows(f"a prefix of {L:,}, H = {H}, N = {N}", forms, turns)


def sampling(turns, steps=512):
    """Levels that the article's generator draws, one after the other, compiled."""
    model = s4d.generator_model()
    model.eval()
    for batch in (1, 16):
        start = np.zeros((batch, 0), int)
        draw = blocked(s4d.generate, model, start, steps, jax.random.key(0))
        seconds, spread = take_turns({"": draw}, turns)[""]
        rate = f"{batch * steps / seconds:,.0f} levels/s ± {spread:.0%}"
        yield f"generate {steps} levels, batch {batch}", "ours", rate, ""


def limits(turns):
    """What this machine can do, in operations or bytes a second."""
    a, b = jnp.ones((2048, 2048)), jnp.ones((4096, 784))
    works = {
        "product": (jnp.matmul, (a, a), 2 * 2048**3),
        "FFT": (jnp.fft.fft, (b + 0j,), 5 * 784 * np.log2(784) * 4096),
        "copying": (jnp.negative, (b,), 2 * b.nbytes),
    }
    calls = {k: blocked(jax.jit(f), *args) for k, (f, args, _) in works.items()}
    times = take_turns(calls, turns)
    return {kind: work / times[kind][0] for kind, (*_, work) in works.items()}


def main():
    what = "how fast kernel, training step and generation are, beside the plain forms"
    options = record.begin(record.parser(what, "speed", "five turns of each form"))
    turns = 5 if options.quick else 15
    keep_memory()
    versions = f"jax {jax.__version__}, flax {flax.__version__}"
    versions += f", torch {torch.__version__}" if torch else ", PyTorch not installed"
    said = (
        "Measured with `python tests/measure/speed.py` on "
        f"{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores; "
        f"Python {platform.python_version()}, {versions}; glibc keeps its pages; "
        f"medians of {turns} turns ± quartiles):"
    )
    print(said)
    few = max(5, turns // 2)
    rates = record.once(options, "what this machine can do", limits, turns)
    units = {"product": "GFLOP/s", "FFT": "GFLOP/s", "copying": "GB/s"}
    machine = (
        ("this machine", kind, f"{rate / 1e9:.0f} {units[kind]}", "")
        for kind, rate in rates.items()
    )
    table = []
    pieces = (
        machine,
        kernels(1024, turns),
        kernels(4096, few),
        memory(),
        training(few, expand=0),
        training(few, expand=2),
        parts(turns, rates),
        prefix(turns),
        generation(turns),
        sampling(few),
    )
    for i, piece in enumerate(pieces, 1):
        for row in record.once(options, f"piece {i} of {len(pieces)}", list, piece):
            print("{:44s} {:18s} {:>20s} {:>18s}".format(*row), flush=True)
            table.append(row)
    record.keep(options, said=said, table=table)
    lines = ["| what | form | measured | by ours |", "|:--|:--|--:|--:|"]
    lines += [f"| {' | '.join(row)} |" for row in table]
    record.keep_table(options, "\n".join([said, "", *lines]))


if __name__ == "__main__":
    main()
