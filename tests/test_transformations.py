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
# JAX cannot take forward derivatives of what has a gradient of its own (`in_double`).
REVERSE_ONLY = {"dss", "s4"}


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


every = pytest.mark.parametrize(
    "name", [*s4d.LAYERS, *(f"{name} model" for name in ("s4d", "general"))]
)


def apart(name):
    graph, params, rest = nnx.split(made(name), nnx.Param, ...)
    return params, lambda params, u: nnx.merge(graph, params, rest)(u)


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@every
def test_vmap_over_rows_and_jit(name):
    u, f = noise(3, L, H), made(name)
    rows = jax.jit(jax.vmap(lambda row: f(row[None])[0]))(u)
    assert error(rows, answer(name)) < 1e-5


@every
def test_gradients_of_single_examples(name):
    """Their mean is the gradient of the mean; remat changes nothing."""
    params, f = apart(name)
    u = noise(3, L, H)

    def loss(params, u):
        return (jax.checkpoint(f)(params, u) ** 2).mean()

    singles = jax.vmap(jax.grad(loss), (None, 0))(params, u[:, None])
    mean = jax.tree.map(lambda g: g.mean(0), singles)
    whole = jax.grad(lambda p: (f(p, u) ** 2).mean())(params)
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(whole)):
        assert error(a, b) < 1e-4


@every
def test_an_ensemble(name):
    """Three sets of parameters by nnx.vmap, and as layers of a scan."""
    module, u = made(name), noise(2, L, H)
    graph, state = nnx.split(module)
    members = nnx.merge(graph, stacked(state, state, state))
    y = nnx.vmap(lambda m, u: m(u), in_axes=(0, None))(members, u)
    assert y.shape[0] == 3
    assert error(y[2], module(u)) < 1e-5
    if y.shape[1:] == u.shape:
        depth = stacked(state, state)
        y, _ = jax.lax.scan(lambda u, p: (nnx.merge(graph, p)(u), None), u, depth)
        assert error(y, module(module(u))) < 1e-5


@every
@pytest.mark.parametrize("batch", [3, "b"])
def test_export(name, batch):
    """With a batch of a given size and with any."""
    f, u = made(name), noise(3, L, H)
    size = export.symbolic_shape(batch)[0] if batch == "b" else batch
    shape = jax.ShapeDtypeStruct((size, L, H), jnp.float32)
    program = export.deserialize(
        export.export(jax.jit(lambda u: f(u)))(shape).serialize()
    )
    assert error(program.call(u), answer(name)) < 1e-5
    if batch == "b":
        assert program.call(u[:1]).shape[0] == 1


def test_export_with_an_open_length_is_refused():
    (length,) = export.symbolic_shape("l")
    shape = jax.ShapeDtypeStruct((3, length, H), jnp.float32)
    with pytest.raises(ValueError, match="u has shape .3, l, 4.; .* L a number"):
        export.export(jax.jit(lambda u: made("s4d")(u)))(shape)


@every
def test_forward_derivatives(name):
    params, f = apart(name)
    u, du = noise(3, L, H), noise(3, L, H, seed=1)
    slope = functools.partial(jax.jvp, lambda u: f(params, u), (u,), (du,))
    dp = jax.tree.map(jnp.ones_like, params)
    if name.split()[0] in REVERSE_ONLY:
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(lambda p: f(p, u), (params,), (dp,))
    else:
        _, dy = jax.jvp(lambda p: f(p, u), (params,), (dp,))
        back = jax.grad(lambda p: f(p, u).sum())(params)
        assert float(dy.sum()) == pytest.approx(
            sum(float(g.sum()) for g in jax.tree.leaves(back)), rel=1e-3, abs=1e-3
        )
    assert error(slope()[0], answer(name)) < 1e-5


@every
def test_gradient_of_gradient(name):
    """Along a direction, against differences of the gradient in float64."""
    with jax.enable_x64(True):
        params, f = apart(name)
        params = jax.tree.map(lambda p: p.astype(float), params)
        u = noise(1, L, H)
        d = jax.tree.map(lambda p: noise(*p.shape, seed=2), params)

        def along(a, b):
            pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
            return sum((x * y).sum() for x, y in pairs)

        @jax.jit
        def slope(p):
            return along(jax.grad(lambda p: (f(p, u) ** 3).sum())(p), d)

        def at(h):
            return jax.tree.map(lambda p, v: p + h * v, params, d)

        second = along(jax.jit(jax.grad(slope))(params), d)
        differences = (slope(at(1e-5)) - slope(at(-1e-5))) / 2e-5
        assert float(second) == pytest.approx(float(differences), rel=1e-5)


@every
def test_strict_modes(name):
    """Construction, the three ways to run, and a gradient."""
    for mode in (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
    ):
        with mode:
            made.__wrapped__(name)
            module, u = made(name), noise(3, L, H)
            assert error(module(u, np.array([L, 4, L])), answer(name)) > 1e-3
            assert error(module(u), answer(name)) < 1e-5
            x, _ = module.advance(module.init_state(3), u)
            module.step(x, u[:, 0])
            params, f = apart(name)
            grads = jax.grad(lambda p, f=f, u=u: f(p, u).sum())(params)
            assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


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


@every
def test_a_batch_divided_by_shard_map(name):
    """Called, advanced and in steps, where the input varies over a mesh."""
    module, u = made(name), noise(3, L, H)
    mesh = jax.sharding.Mesh(jax.devices()[:1], "b")

    def three(u):
        _, advanced = module.advance(module.init_state(u.shape[0]), u)
        return module(u), advanced, s4d.run_steps(module, u)[1]

    rows = jax.P("b")
    y = jax.shard_map(three, mesh=mesh, in_specs=rows, out_specs=rows)(u)
    assert error(y[0], answer(name)) < 1e-5
    assert error(y[1], y[2]) < 1e-5


# -- precision ------------------------------------------------------------------------


@every
def test_made_in_32_bits_run_in_64(name):
    """All ways to run, and by chunks, as a module of the same numbers in 64 bits."""
    with jax.enable_x64(False):
        module = made.__wrapped__(name)
        x32 = module.init_state(2)
    with jax.enable_x64(True):
        u = noise(2, L, H)
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        double = nnx.merge(graph, jax.tree.map(lambda p: p.astype(float), params), rest)
        y, exact = module(u), double(u)
        assert y.dtype == jnp.float64 and error(y, exact) < 1e-10
        x, stepped = s4d.run_steps(module, u)
        x2, advanced = module.advance(x32, u)  # from a state that was kept in 32 bits
        _, chunks = s4d.advance_in_chunks(module, x32, u, 4)
        assert stepped.dtype == advanced.dtype == chunks.dtype == jnp.float64
        assert error(stepped, advanced) < 1e-10 and error(chunks, advanced) < 1e-10
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(x2)):
            assert a.dtype == b.dtype and error(a, b) < 1e-10


@every
@pytest.mark.parametrize(
    "kind", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"]
)
def test_half_precision_is_cast_up(name, kind):
    """Parameters and inputs of half precision: computed in full, close to full."""
    module, u = made(name), noise(3, L, H)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    half = nnx.merge(graph, jax.tree.map(lambda p: p.astype(kind), params), rest)
    _, steps = s4d.run_steps(half, u.astype(kind))
    assert half(u).dtype == steps.dtype == jnp.float32
    assert error(half(u), answer(name)) < 0.1


# -- arguments ------------------------------------------------------------------------


@every
def test_an_empty_batch(name):
    module, u = made(name), jnp.zeros((0, L, H))
    assert module(u).shape[0] == 0
    assert module(u, jnp.zeros(0, int)).shape[0] == 0
    assert module.advance(module.init_state(0), u)[1].shape[0] == 0
    assert s4d.run_steps(module, u)[1].shape[0] == 0


@pytest.mark.parametrize(
    "kind", "int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
)
def test_lengths_of_any_integer(kind):
    """Even 8 bits, with sequences longer than they can say."""
    layer, u = made("s4d"), noise(2, 200, H)
    n = np.array([3, 100])
    right, _ = s4d.advance(layer, layer.init_state(2), u, n)
    for lengths in (n.astype(kind), jnp.asarray(n.astype(kind))):
        for take in (layer.advance, functools.partial(s4d.advance, layer)):
            x, _ = take(layer.init_state(2), u, lengths)
            assert error(x, right) < 1e-6


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
