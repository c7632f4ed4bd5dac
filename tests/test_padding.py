"""What stands around a row, or is silent in it, must not matter to its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import error, noise

import annotated_s4d as s4d

SHORT, LONG, CHANNELS = 7, 12, 4
# a benchmark may add its own
LAYERS = ("s4d", "general", "s5", "selective", "dss", "s4", "split")
FILLS = (0.0, 1e6, np.nan, np.inf)

MAKERS = {  # every layer; what is built of layers treats all of them alike
    **{
        name: lambda name=name: s4d.LAYERS[name](CHANNELS, 8, rngs=nnx.Rngs(0))
        for name in LAYERS
    },
    "gated": lambda: s4d.GeneralS4D(
        CHANNELS, 8, gate=2, bottleneck=2, channels=2, rngs=nnx.Rngs(0)
    ),
    "two directions": lambda: s4d.GeneralS4D(
        CHANNELS, 8, bidirectional=True, rngs=nnx.Rngs(0)
    ),
    "stack": lambda: s4d.S4DStack(CHANNELS, 8, 1, rngs=nnx.Rngs(0)),
    "mean": lambda: model(1, pooling="mean"),
    "none": lambda: model(1, pooling="none", kernel="s4"),
    "backbone": lambda: s4d.build(CHANNELS, 6, 8, 1, 0.0, None, rngs=nnx.Rngs(0)),
}


def model(n_layers, **options):
    return s4d.S4DModel(CHANNELS, 3, 8, 8, n_layers, **options, rngs=nnx.Rngs(0))


def learning(module, run):
    """The parameters, and a compiled function of them, u and lengths: the output, and
    the gradients of a sum of its squares, each channel with another weight."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params, u, lengths):
        y = run(nnx.merge(graph, params, rest), u, lengths)
        return (y**2 * jnp.arange(1.0, 1 + y.shape[-1])).sum(), y

    @jax.jit
    def both(params, u, lengths):
        slopes = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, y), (by_params, by_u) = slopes(params, u, lengths)
        return y, jax.tree.leaves(by_params), by_u

    return params, both


def moved(params):
    """As after training: every parameter, each bias too, is somewhere else."""
    return jax.tree.map(lambda p: p + 0.3 * noise(*p.shape, seed=5), params)


def compare(module, run):
    """Padded rows against the rows by themselves, whatever the padding holds."""
    (params, both), u = learning(module, run), noise(2, SHORT, CHANNELS)
    lengths = np.full(2, SHORT)
    for values in (params, moved(params)):
        alone = both(values, u, lengths)
        for fill in FILLS:
            same(both(values, padded(u, fill), lengths), alone)


def padded(u, fill):
    """u (batch, SHORT, ...) and what fills it up to LONG."""
    ends = [(0, 0)] * u.ndim
    ends[1] = (0, LONG - SHORT)
    return np.pad(u, ends, constant_values=fill)


def called(module, u, lengths):
    return module(u, lengths)


def same(found, alone, tolerance=1e-5):
    """Outputs and gradients of padded rows are those of the rows by themselves."""
    (y, grads, du), (y_alone, grads_alone, du_alone) = found, alone
    if y.ndim == 3:  # one output for each sample
        assert (y[:, SHORT:] == 0).all()
        y = y[:, :SHORT]
    assert error(y, y_alone) < tolerance
    assert (du[:, SHORT:] == 0).all()
    assert error(du[:, :SHORT], du_alone) < tolerance
    largest = max(jnp.abs(g).max() for g in grads_alone)
    assert len(grads) == len(grads_alone) > 4
    for g, g_alone in zip(grads, grads_alone):
        assert jnp.abs(g - g_alone).max() < tolerance * largest


@pytest.mark.parametrize("name", MAKERS)
def test_a_padded_row_is_the_row_alone(name):
    compare(MAKERS[name](), called)


@pytest.mark.parametrize("name", LAYERS)
def test_padding_in_chunks(name):
    """States and outputs of `advance`, with a chunk that has only padding."""
    layer, u = MAKERS[name](), noise(1, SHORT, CHANNELS)
    x_alone, y_alone = s4d.run_steps(layer, u)
    for fill in FILLS:
        x, y, v = layer.init_state(1), [], padded(u, fill)
        for chunk in (v[:, :4], v[:, 4:8], v[:, 8:]):
            inside = np.clip(SHORT - sum(part.shape[1] for part in y), 0, 4)
            x, part = s4d.advance(layer, x, chunk, np.array([inside]))
            y.append(part)
        y = jnp.concatenate(y, 1)
        assert error(x, x_alone) < 1e-5
        assert error(y[:, :SHORT], y_alone) < 1e-5
        assert (y[:, SHORT:] == 0).all()


def by_chunks(module, u, lengths):
    return s4d.advance_in_chunks(module, module.init_state(2), u, 5, lengths)[1]


def advanced(module, u, lengths):
    """In two chunks, from state to state."""
    first = jnp.minimum(lengths, 4)
    x, y = module.advance(module.init_state(2), u[:, :4], first)
    return jnp.concatenate([y, module.advance(x, u[:, 4:], lengths - first)[1]], 1)


@pytest.mark.parametrize("run", [by_chunks, advanced])
def test_gradients_of_padded_rows_in_chunks(run):
    """In chunks that the gradient computes once more, and from state to state."""
    compare(model(1), run)


def test_a_deep_model_of_padded_rows():
    compare(model(8, pooling="mean"), called)


def test_rows_of_different_length():
    """Each row of a batch against itself alone, down to a row of one sample."""
    net, lengths = model(2, pooling="mean"), np.array([1, LONG, SHORT])
    u = np.array(noise(3, LONG, CHANNELS))
    for i, n in enumerate(lengths):
        u[i, n:] = np.nan
    together = s4d.call(net, u, lengths)
    for i, n in enumerate(lengths):
        assert error(together[i], s4d.call(net, u[i : i + 1, :n])[0]) < 1e-5


# -- silence --------------------------------------------------------------------------


def silent(where, channels):
    return np.array(noise(2, 60, channels).at[:, where].set(0))


def test_long_silence():
    """Call, steps and gradients of a silent row in float32 are those of float64.

    At a silent sample LayerNorm would magnify rounding, block by block, if the biases
    began at zero: then called and stepped outputs share no digit.
    """
    net = s4d.S4DModel(3, 5, 8, 8, 3, pooling="none", rngs=nnx.Rngs(0))
    found, works = {}, learning(net, lambda m, u, _: m(u))
    for x64 in (False, True):
        with jax.enable_x64(x64):
            for where in (slice(0, 30), slice(15, 45)):  # before a signal, and within
                u = jnp.asarray(silent(where, 3))
                params, both = works
                y, grads, _ = both(params, u, None)
                slopes = np.concatenate([np.ravel(g) for g in grads])
                parts = y, s4d.run_steps(net, u)[1], slopes
                found[x64, where.start] = parts
    for start in (0, 15):
        for a, b in zip(found[False, start], found[True, start]):
            assert error(a, b) < 1e-5


def test_silence_without_biases_is_lost():
    """What the random biases are for: the same model without them fails."""
    net = s4d.S4DModel(3, 5, 8, 8, 6, pooling="none", rngs=nnx.Rngs(0))
    u = silent(slice(0, 30), 3)
    assert error(s4d.run_steps(net, u)[1], s4d.call(net, u)) < 1e-5
    for path, p in nnx.to_flat_state(nnx.state(net, nnx.Param)):
        if path[-1] == "bias":
            p[...] = jnp.zeros_like(p[...])
    assert error(s4d.run_steps(net, u)[1], s4d.call(net, u)) > 1e-3


def test_slope_of_the_norm_at_silence():
    """At the zero vector its derivative is (I - 1/H) / sqrt(eps), thirtyfold."""
    norm = s4d.S4DBlock(4, 8, rngs=nnx.Rngs(0)).norm
    slope = jax.jacobian(norm)(jnp.zeros(4))
    assert np.allclose(slope, (np.eye(4) - 1 / 4) / 1e-3**0.5, rtol=1e-5)
