"""Layers and models under the transformations and modes of JAX and Flax."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from oracle import error, noise

import annotated_s4d as s4d

H, L = 4, 10
# a benchmark may add its own
LAYERS = ("s4d", "general", "s5", "selective", "dss", "s4", "split")
NAMES = [*LAYERS, "s4d model", "general model"]
# Where one name stands for all, the values are compared. The others are traced, which
# is where a transformation fails that fails: to compile each would take minutes.
VALUED = {"s4d", "s4 model"}
# JAX cannot take forward derivatives of what has a gradient of its own (`in_double`).
REVERSE_ONLY = {"dss", "s4"}
# Nor a second derivative of what `s4d_scan` holds in double precision, outside of it.
ONCE_ONLY = {"s5"}


@functools.cache
def made(name):
    """A layer or, as "name model", a model of one block."""
    kernel, *model = name.split()
    if model:
        options = dict(kernel=kernel, pooling="mean")
        module = s4d.S4DModel(H, 3, H, 8, 1, **options, rngs=nnx.Rngs(0))
    else:
        module = s4d.LAYERS[kernel](H, 8, rngs=nnx.Rngs(0))
    module.eval()
    return module


@functools.cache
def answer(name):
    return s4d.call(made(name), noise(3, L, H))


every = pytest.mark.parametrize("name", NAMES)


def apart(name):
    graph, params, rest = nnx.split(made(name), nnx.Param, ...)
    return params, lambda params, u: nnx.merge(graph, params, rest)(u)


def loss(f, params, u):
    return (f(params, u) ** 2).mean()


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# -- transformations: each gives two results that must agree --------------------------


def vmap_over_rows(f, params, u):
    return jax.vmap(lambda row: f(params, row[None])[0])(u), f(params, u)


def gradients_of_single_examples(f, params, u):
    slope = jax.grad(functools.partial(loss, f))
    singles = jax.vmap(slope, (None, 0))(params, u[:, None])
    return jax.tree.map(lambda g: g.mean(0), singles), slope(params, u)


def remat(f, params, u):
    again = functools.partial(loss, jax.checkpoint(f))
    return jax.grad(again)(params, u), jax.grad(functools.partial(loss, f))(params, u)


def an_ensemble(f, params, u):
    return jax.vmap(f, (0, None))(stacked(params, params), u)[1], f(params, u)


def a_scan_over_layers(f, params, u):
    y, _ = jax.lax.scan(lambda u, p: (f(p, u), None), u, stacked(params, params))
    return y, f(params, f(params, u))


def forward_derivatives(f, params, u):
    ones = jax.tree.map(jnp.ones_like, params)
    _, dy = jax.jvp(lambda p: f(p, u), (params,), (ones,))
    back = jax.grad(lambda p: f(p, u).sum())(params)
    return dy.sum(), sum(g.sum() for g in jax.tree.leaves(back))


def gradient_of_gradient(f, params, u):
    """Along a direction, against the reverse derivative of the squared gradient."""

    def steep(params):
        slope = jax.grad(lambda p: (f(p, u) ** 3).sum())(params)
        return sum((g**2).sum() for g in jax.tree.leaves(slope)) / 2

    once = jax.grad(lambda p: (f(p, u) ** 3).sum())
    _, pull = jax.vjp(once, params)
    return jax.grad(steep)(params), pull(once(params))[0]  # H g, twice


def a_batch_divided_by_shard_map(f, params, u):
    mesh, rows = jax.sharding.Mesh(jax.devices()[:1], "b"), jax.P("b")
    share = functools.partial(f, params)
    return jax.shard_map(share, mesh=mesh, in_specs=rows, out_specs=rows)(u), share(u)


TRANSFORMATIONS = (
    vmap_over_rows,
    gradients_of_single_examples,
    remat,
    an_ensemble,
    a_scan_over_layers,
    forward_derivatives,
    gradient_of_gradient,
    a_batch_divided_by_shard_map,
)


@every
@pytest.mark.parametrize("transform", TRANSFORMATIONS, ids=lambda t: t.__name__)
def test_transformation(transform, name):
    (params, f), u = apart(name), noise(3, L, H)
    kernel, *model = name.split()
    both = jax.jit(lambda params, u: transform(f, params, u))
    if transform is a_scan_over_layers and model:
        pytest.skip("a model's output is no input of it")
    if transform is forward_derivatives and kernel in REVERSE_ONLY:
        with pytest.raises(TypeError, match="forward-mode"):
            both.lower(params, u)
        return
    if transform is gradient_of_gradient and kernel in ONCE_ONLY:
        with pytest.raises(TypeError, match="complex128 and complex64"):
            both.lower(params, u)
        return
    found, expected = (both if name in VALUED else functools.partial(
        jax.eval_shape, both))(params, u)  # fmt: skip
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert a.shape == b.shape and a.dtype == b.dtype
        if name in VALUED:
            assert error(a, b) < 1e-4


def test_an_ensemble_of_flax():
    module, u = made("general"), noise(2, L, H)
    graph, state = nnx.split(module)
    members = nnx.merge(graph, stacked(state, state))
    y = nnx.vmap(lambda m, u: m(u), in_axes=(0, None))(members, u)
    assert error(y[1], module(u)) < 1e-5


def test_second_derivatives_in_double():
    """Of 1/a and irfft, whose own derivatives lose their precision outside."""
    f = s4d.in_double(lambda a: jnp.fft.irfft(jnp.fft.rfft(1 / a), 4)[1])
    slope = jax.grad(f)
    a = jnp.array([3.0, 2.0, 5.0, 4.0])
    second = jax.jit(jax.vmap(jax.grad(lambda a: slope(a)[1])))(a[None])
    assert error(second[0], np.array([0, 2 / 2.0**3, 0, 0])) < 1e-6


@every
def test_steps_and_chunks_in_shard_map(name):
    """The state of rest varies over the devices as the input does."""
    module, mesh = made(name), jax.sharding.Mesh(jax.devices()[:1], "b")

    def both(u):
        _, advanced = module.advance(module.init_state(u.shape[0]), u)
        return advanced, s4d.run_steps(module, u)[1]

    rows = jax.P("b")
    divided = jax.shard_map(both, mesh=mesh, in_specs=rows, out_specs=rows)
    advanced, stepped = jax.eval_shape(divided, noise(3, L, H))
    assert advanced.shape == stepped.shape


@every
def test_export(name):
    """With a batch of a given size and with any."""
    f, u = made(name), noise(3, L, H)
    for batch in (3, *export.symbolic_shape("b")):
        shape = jax.ShapeDtypeStruct((batch, L, H), jnp.float32)
        program = export.export(jax.jit(lambda u: f(u)))(shape)
        assert str(program.out_avals[0].shape[0]) == str(batch)
    if name in VALUED:
        assert error(program.call(u), answer(name)) < 1e-5
        assert program.call(u[:1]).shape[0] == 1


def test_export_with_an_open_length_is_refused():
    (length,) = export.symbolic_shape("l")
    shape = jax.ShapeDtypeStruct((3, length, H), jnp.float32)
    with pytest.raises(ValueError, match="u has shape .3, l, 4.; .* L a number"):
        export.export(jax.jit(lambda u: made("s4d")(u)))(shape)


MODES = {
    "types": lambda: jax.numpy_dtype_promotion("strict"),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
}


@every
@pytest.mark.parametrize("mode", MODES)
def test_strict_modes(name, mode):
    """Construction, the three ways to run, every state, and a gradient."""
    u, lengths = noise(3, L, H), np.array([L, 4, L])
    params, f = apart(name)

    def all_ways(u):
        module = made.__wrapped__(name)
        x, y = module.advance(module.init_state(3), u, lengths)
        x, last = module.step(x, u[:, 0])
        states, _ = module.advance(x, u, lengths, every=True)
        return module(u), y, last, states, jax.grad(loss, 1)(f, params, u)

    with MODES[mode]():
        assert jax.eval_shape(all_ways, u)[0].shape == answer(name).shape


@pytest.mark.parametrize("name", sorted(VALUED))
def test_no_number_on_the_way_is_nan(name):
    params, f = apart(name)
    with jax.debug_nans(True):
        slopes = jax.jit(jax.grad(functools.partial(loss, f)))(params, noise(3, L, H))
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(slopes))


@every
def test_copies(name):
    """Cloned, taken apart and put together, pickled: the same answers."""
    module, u = made(name), noise(3, L, H)
    for copy in (
        nnx.clone(module),
        nnx.merge(*nnx.split(module)),
        pickle.loads(pickle.dumps(module)),
    ):
        assert copy is not module
        assert error(copy(u), answer(name)) < 1e-6


@pytest.mark.parametrize("act", s4d.FINAL_ACTS)
def test_pickle_with_each_activation(act):
    layer = s4d.S4D(H, 8, final_act=act, rngs=nnx.Rngs(0))
    copy = pickle.loads(pickle.dumps(layer))
    assert (copy(noise(1, 5, H)) == layer(noise(1, 5, H))).all()


# -- precision ------------------------------------------------------------------------


@every
def test_made_in_32_bits_run_in_64(name):
    """All ways to run, and by chunks, from a state that was kept in 32 bits."""
    module = made(name)
    x32 = module.init_state(2)

    def all_ways(u):
        chunks = s4d.advance_in_chunks(module, x32, u, 4)
        return module.advance(x32, u), s4d.run_steps(module, u), chunks, module(u)

    with jax.enable_x64(True):
        u = noise(2, L, H)
        ways = jax.jit(all_ways) if name in VALUED else functools.partial(
            jax.eval_shape, all_ways)  # fmt: skip
        (x, advanced), (_, stepped), (_, chunks), called = ways(u)
        assert called.dtype == chunks.dtype == stepped.dtype == jnp.float64
        assert all(a.dtype.itemsize in (8, 16) for a in jax.tree.leaves(x))
        if name not in VALUED:
            return
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        double = nnx.merge(graph, jax.tree.map(lambda p: p.astype(float), params), rest)
        assert error(stepped, advanced) < 1e-10 and error(chunks, advanced) < 1e-10
        assert error(called, s4d.call(double, u)) < 1e-10


@every
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_is_cast_up(name, kind):
    """Parameters and inputs of half precision: computed in full, close to full."""
    module, u = made(name), noise(3, L, H)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    half = nnx.merge(graph, jax.tree.map(lambda p: p.astype(kind), params), rest)
    ways = jax.eval_shape(
        lambda u: (half(u), s4d.run_steps(half, u)[1]), u.astype(kind)
    )
    assert all(y.dtype == jnp.float32 for y in ways)
    if name in VALUED:
        assert error(s4d.call(half, u), answer(name)) < 0.1


# -- arguments ------------------------------------------------------------------------


@every
def test_an_empty_batch(name):
    module, u = made(name), jnp.zeros((0, L, H))

    def all_ways(u):
        x, y = module.advance(module.init_state(0), u)
        return module(u), module(u, jnp.zeros(0, int)), y, s4d.run_steps(module, u)[1]

    for y in jax.eval_shape(all_ways, u):
        assert y.shape[0] == 0
    assert s4d.call(module, u).shape[0] == 0


@pytest.mark.parametrize("signed", ["int", "uint"])
def test_lengths_of_any_integer(signed):
    """Even 8 bits, with sequences longer than they can say."""
    layer, u = made("s4d"), noise(2, 200, H)
    n = np.array([3, 100])
    right, _ = s4d.advance(layer, layer.init_state(2), u, n)
    for bits in (8, 16, 32, 64):
        few = n.astype(f"{signed}{bits}")
        assert error(s4d.advance(layer, layer.init_state(2), u, few)[0], right) < 1e-6
        assert (s4d.check_sequence(u, H, few) == n).all()
        assert (s4d.check_sequence(u, H, jnp.asarray(few)) == n).all()


@pytest.mark.parametrize("lengths", [np.array([2**40, 3]), np.uint32([2**32 - 1, 3])])
def test_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match="allowed: 0 to 10"):
        made("s4d")(noise(2, L, H), lengths)


def test_complex_input_is_refused():
    with pytest.raises(ValueError, match="complex64; allowed: .* real"):
        made("s4d")(noise(2, L, H) + 1j)


def test_small_integers_as_sizes():
    layer = s4d.GeneralS4D(
        np.int8(4), np.int8(100), init="real", is_real=True, rngs=nnx.Rngs(0)
    )
    assert layer.init_state(1).shape == (1, 4, 100)
    A = jnp.full(2, -0.5 + 1j)
    assert s4d.s4d_kernel(A, A, A, 0.1, np.int8(127)).shape == (127,)
