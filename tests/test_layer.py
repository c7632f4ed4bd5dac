"""Parts 8 to 10: layer, block, model, backbone."""

import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import error, noise, run, tolerance
from scipy.special import erf

import annotated_s4d as s4d

OPTIONS = [
    dict(),
    dict(init="real", final_act="gelu"),
    dict(init="rand", discretization="bilinear", final_act="relu"),
    dict(init="inv", dt_min=1e-4, dt_max=1e-4, final_act="id"),
    dict(init="quad", dt_min=0.1, dt_max=0.1, final_act=None),
    dict(init="lin", discretization="bilinear", dt_min=1e-4, dt_max=1.0),
    dict(init="inv2", dropout=0.5),
]


def make(H=3, N=8, seed=0, **options):
    layer = s4d.S4D(H, N, rngs=nnx.Rngs(seed), **options)
    layer.eval()
    return layer


def numpy_layer(layer, u, final_act="glu", x0=None):
    """The layer's formulas once more, in NumPy and float64: states and outputs."""
    A = -np.exp(np.float64(layer.log_A_real[...])) + 1j * np.float64(layer.A_imag[...])
    B, C = (np.float64(p[...]) @ [1, 1j] for p in (layer.B, layer.C))
    dt, D = np.exp(np.float64(layer.log_dt[...])), np.float64(layer.D[...])
    u = np.float64(u)
    rows = [
        run(A, B, C, dt, row.T, layer.method, x0 if x0 is None else x0[i])
        for i, row in enumerate(u)
    ]
    x, y = (np.stack(part) for part in zip(*rows))
    y = y.swapaxes(1, 2) + D * u
    y = y * 0.5 * (1 + erf(y / math.sqrt(2)))
    if final_act is None:
        return x, y
    linear = layer.mixer.linear
    y = y @ np.float64(linear.kernel[...]) + np.float64(linear.bias[...])
    if final_act == "glu":
        first, second = np.split(y, 2, -1)
        return x, first / (1 + np.exp(-second))
    return x, {
        "gelu": lambda y: y * 0.5 * (1 + erf(y / math.sqrt(2))),
        "relu": lambda y: np.maximum(y, 0),
        "id": lambda y: y,
    }[final_act](y)


# -- the contract ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "L, options", [(1, OPTIONS[0]), (1, OPTIONS[2]), *((75, o) for o in OPTIONS)]
)
def test_layer_against_numpy(x64, L, options):
    """Call, step and advance, each against float64, outputs and states."""
    layer, u = make(**options), noise(2, L, 3)
    x_exact, y_exact = numpy_layer(layer, u, options.get("final_act", "glu"))
    tol = 1e-10 if x64 else 1e-5
    assert error(s4d.call(layer, u), y_exact) < tol
    x, y = s4d.run_steps(layer, u)
    assert error(y, y_exact) < tol
    assert error(x, x_exact[:, :, -1]) < tol
    x, y = s4d.advance(layer, layer.init_state(2), u)
    assert error(y, y_exact) < tol
    assert error(x, x_exact[:, :, -1]) < tol


@settings(max_examples=5, deadline=None)
@given(
    cuts=st.lists(st.sampled_from([1, 2, 5, 16, 33]), min_size=1, max_size=5),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 1000),
)
def test_any_chunking_is_the_same(cuts, options, seed):
    """Chunks of any size, from any state, equal the float64 recurrence."""
    layer, u = make(seed=seed, **options), noise(2, sum(cuts), 3, seed=seed)
    x0 = noise(2, 3, 4, seed=seed + 1) + 1j * noise(2, 3, 4, seed=seed + 2)
    exact = numpy_layer(layer, u, options.get("final_act", "glu"), x0)
    x, chunks, start = x0, [], 0
    for n in cuts:
        x, y = s4d.advance(layer, x, u[:, start : start + n])
        chunks.append(y)
        start += n
    assert error(jnp.concatenate(chunks, 1), exact[1]) < 1e-5
    assert error(x, exact[0][:, :, -1]) < 1e-5


@pytest.mark.parametrize("L", [4096, 65536])
def test_long_sequences(L):
    """At its defaults a layer steps and advances as it convolves, at length 65,536."""
    layer, u = make(2, 64), noise(1, L, 2)
    y = s4d.call(layer, u)
    _, exact = numpy_layer(layer, u)
    tol = 2e-5 if L == 65536 else 1e-5
    assert error(y, exact) < tol
    assert error(s4d.run_steps(layer, u)[1], exact) < tol
    assert error(s4d.advance(layer, layer.init_state(1), u)[1], exact) < tol


def test_lengths(x64):
    """Each row ends on its own: outputs, zeros behind them, and the state."""
    layer, u = make(), noise(5, 40, 3)
    lengths = jnp.array([0, 1, 17, 39, 40])
    x0 = noise(5, 3, 4) + 1j
    x, y = s4d.advance(layer, x0, u, lengths)
    whole = s4d.call(layer, u, lengths)
    for i, n in enumerate(lengths.tolist()):
        assert (y[i, n:] == 0).all() and (whole[i, n:] == 0).all()
        if n == 0:
            assert error(x[i], x0[i]) < 1e-6
            continue
        x_exact, y_exact = numpy_layer(layer, u[i : i + 1, :n], x0=x0[i : i + 1])
        assert error(y[i, :n], y_exact[0]) < 1e-5
        assert error(x[i], x_exact[0, :, -1]) < 1e-5
        assert error(whole[i, :n], numpy_layer(layer, u[i : i + 1, :n])[1][0]) < 1e-5
    changed = jnp.where(jnp.arange(40)[:, None] >= lengths[:, None, None], 1e3, u)
    assert error(s4d.advance(layer, x0, changed, lengths)[0], x) < 1e-6


def test_everything_is_float64(x64):
    """Parameters, states and outputs take the precision of JAX; nothing falls back."""
    model = s4d.S4DModel(2, 3, 4, 8, 1, rngs=nnx.Rngs(0))
    real = jnp.float64 if x64 else jnp.float32
    for p in jax.tree.leaves(nnx.state(model, nnx.Param)):
        assert p.dtype == real
    x, y = s4d.advance(model, model.init_state(1), noise(1, 9, 2))
    assert y.dtype == real and x["stack"][0].dtype == jnp.result_type(real, 1j)
    assert s4d.call(model, noise(1, 9, 2)).dtype == real


def test_layer_and_block_are_causal():
    u = noise(1, 80, 3)
    for module in (make(), s4d.S4DBlock(3, 8, rngs=nnx.Rngs(0))):
        change = s4d.call(module, u.at[:, 50, 1].add(1.0)) - s4d.call(module, u)
        assert jnp.abs(change[:, :50]).max() < 1e-5
        assert jnp.abs(change[:, 50]).max() > 1e-2


def test_dropout_masks_are_fresh_and_off_in_eval():
    layer, u = make(dropout=0.5), noise(1, 20, 3)
    assert (layer(u) == layer(u)).all()
    layer.train()
    a, b = s4d.call(layer, u), s4d.call(layer, u)
    assert not np.allclose(a, b)


# -- gradients ------------------------------------------------------------------------


def views(layer, u):
    """The three ways to run, as functions of the layer."""

    def advanced(layer):
        x, first = layer.advance(layer.init_state(len(u)), u[:, :7])
        return jnp.concatenate([first, layer.advance(x, u[:, 7:])[1]], 1)

    def stepped(layer):
        _, y = jax.lax.scan(layer.step, layer.init_state(len(u)), u.swapaxes(0, 1))
        return y.swapaxes(0, 1)

    return {"call": lambda layer: layer(u), "step": stepped, "advance": advanced}


@pytest.mark.parametrize("options", OPTIONS[1:3], ids=str)
@pytest.mark.parametrize("view", ["call", "step", "advance"])
def test_gradients_against_differences(options, view):
    """Every parameter, in float64, along a random direction and one by one in size."""
    with jax.enable_x64(True):
        layer, u = make(**options), noise(2, 20, 3)
        target, f = noise(2, 20, 3, seed=9), views(layer, u)[view]
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        @jax.jit
        def loss(params):
            return (f(nnx.merge(graph, params, rest)) * target).sum()

        grads = jax.jit(jax.grad(loss))(params)
        for path, grad in nnx.to_flat_state(grads):
            g = grad[...]
            assert jnp.isfinite(g).all() and jnp.abs(g).max() > 0, path
            direction = noise(*g.shape, seed=3)

            def moved(h, path=path, direction=direction):
                def move(p, leaf):
                    names = tuple(part.key for part in p if hasattr(part, "key"))
                    return leaf + h * direction if names == path else leaf

                return loss(jax.tree.map_with_path(move, params))

            slope = float(moved(1e-6) - moved(-1e-6)) / 2e-6
            assert float((g * direction).sum()) == pytest.approx(
                slope, rel=1e-5, abs=1e-8
            )


def test_gradients_of_the_three_views_agree():
    layer, u = make(), noise(2, 20, 3)
    grads = {}
    for name, f in views(layer, u).items():
        grads[name] = nnx.jit(nnx.grad(lambda m, f=f: (f(m) ** 2).sum()))(layer)
    for name in ("step", "advance"):
        for a, b in zip(jax.tree.leaves(grads[name]), jax.tree.leaves(grads["call"])):
            assert error(a, b) < 1e-4


def test_gradient_through_the_state(x64):
    layer, u, x = make(), noise(1, 6, 3), noise(1, 3, 4) + 0j

    def by_steps(x):
        for l in range(6):
            x, y = layer.step(x, u[:, l])
        return (y**2).sum()

    def by_chunk(x):
        return (layer.advance(x, u)[1][:, -1] ** 2).sum()

    a, b = jax.jit(jax.grad(by_steps))(x), jax.jit(jax.grad(by_chunk))(x)
    assert jnp.abs(a).max() > 0
    assert error(a, b) < 1e-4


# -- model and backbone ---------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
def test_model_contract(pooling):
    """Streamed answers are the answers for each prefix; padding changes nothing."""
    model, u = (
        s4d.S4DModel(2, 5, 6, 8, 2, pooling=pooling, rngs=nnx.Rngs(0)),
        noise(2, 30, 2),
    )
    x_steps, answers = s4d.run_steps(model, u)
    assert answers.shape == (2, 30, 5)
    lengths = jnp.array([30, 11])
    x, streamed = s4d.advance(model, model.init_state(2), u, lengths)
    x11, alone_advanced = s4d.advance(model, model.init_state(2), u[:, :11])
    y, alone = s4d.call(model, u, lengths), s4d.call(model, u[:, :11])
    assert error(streamed[0], answers[0]) < 1e-5
    assert error(streamed[1, :11], answers[1, :11]) < 1e-5
    assert (streamed[1, 11:] == 0).all()
    assert error(alone_advanced, answers[:, :11]) < 1e-5
    for a, b, c in zip(*map(jax.tree.leaves, (x, x_steps, x11))):
        assert error(a[0], b[0]) < 1e-5  # the full row: the state after all steps
        assert error(a[1], c[1]) < 1e-5  # the padded row: the state after 11
    if pooling == "none":
        assert y.shape == (2, 30, 5) and (y[1, 11:] == 0).all()
        assert error(y[0], answers[0]) < 1e-5
        assert error(y[1, :11], alone[1]) < 1e-5
    else:
        assert y.shape == (2, 5)
        assert error(y[0], answers[0, -1]) < 1e-5
        assert error(y[1], alone[1]) < 1e-5
        assert error(alone, answers[:, 10]) < 1e-5


def test_build_defaults():
    model = s4d.build(7, rngs=nnx.Rngs(0))
    model.eval()
    y = s4d.call(model, noise(2, 60, 7))
    assert y.shape == (2, 256) and s4d.output_size(7) == 256
    assert (len(model.stack.blocks), model.stack.blocks[0].ssm.A_imag.shape) == (
        4,
        (256, 32),
    )
    assert model.stack.blocks[0].dropout.rate == 0.1
    with pytest.raises(ValueError, match="u has 61 samples; allowed: window_size, 60"):
        model(noise(2, 61, 7))


def test_build_returns_the_last_position():
    model = s4d.build(3, 8, 4, 2, 0.0, None, rngs=nnx.Rngs(0))
    u = noise(2, 33, 3)
    whole = nnx.jit(lambda model, u: model.stack(model.encoder(u)))(model, u)
    assert error(s4d.call(model, u)[1], whole[1, -1]) < 1e-6
    assert s4d.call(model, u[:, :5]).shape == (2, 8)


@pytest.mark.parametrize(
    "args, options",
    [
        ((7,), {}),
        ((3, 16, 8, 2), {}),
        ((3, 16, 8, 2), dict(final_act="gelu", expand=3, window_size=None)),
        ((3, 16, 8, 2), dict(expand=0)),
        ((1, 8), dict(num_layers=1, final_act=None)),
    ],
)
def test_param_count_is_exact(args, options):
    """Against the parameters of the model and against the closed formula."""
    model = s4d.build(*args, **options, rngs=nnx.Rngs(0))
    real = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    full = s4d.recommended_defaults(*args, **options)
    E, H, N, layers = (
        full[k] for k in ("embed_dim", "hidden_size", "state_size", "num_layers")
    )
    act, expand = full.get("final_act", "glu"), full.get("expand", 2)
    ssm = 2 * H + H * N + 2 * H * N  # dt and D; A; B and C
    mixer = {None: 0, "glu": 2 * H * (H + 1)}.get(act, H * (H + 1))
    ffn = 2 * H + expand * H * (H + 1) + H * (expand * H + 1) if expand else 0
    assert real == (E + 1) * H + layers * (ssm + mixer + ffn + 2 * H) + 2 * H
    assert s4d.param_count(*args, **options) == real


def test_recommended_defaults_build():
    assert s4d.recommended_defaults() == dict(
        hidden_size=256, state_size=64, num_layers=4, dropout=0.1, window_size=60
    )
    options = s4d.recommended_defaults(5, hidden_size=8, num_layers=1, init="lin")
    assert options["init"] == "lin" and options["embed_dim"] == 5
    s4d.build(**options, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError):
        s4d.build(5, hiden_size=8, rngs=nnx.Rngs(0))


# -- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(d_model=0), "d_model is 0; allowed: positive"),
        (dict(d_model=2.0), "d_model is 2.0"),
        (dict(d_state=7), "d_state is 7; allowed: positive multiples of 2"),
        (dict(d_state=0), "d_state is 0"),
        (dict(d_state=-2), "d_state is -2"),
        (dict(init="hippo"), "init is 'hippo'; allowed: 'legs', 'inv'"),
        (
            dict(discretization="euler"),
            "discretization is 'euler'; allowed: 'zoh', 'bilinear'",
        ),
        (
            dict(dt_min=0.2, dt_max=0.1),
            "dt_min is 0.2; allowed: 0 < dt_min <= dt_max, 0.1",
        ),
        (dict(dt_min=math.inf), "dt_min is inf"),
        (dict(dt_min=0.0), "dt_min is 0.0"),
        (dict(dt_max=math.nan), "dt_max is nan"),
        (dict(dt_max=math.inf), "dt_max is inf"),
        (dict(dropout=1.0), "dropout is 1.0; allowed: 0 <= dropout < 1"),
        (dict(dropout=-0.1), "dropout is -0.1"),
        (dict(final_act="swish"), "final_act is 'swish'; allowed: 'glu', 'gelu'"),
    ],
)
def test_construction_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        s4d.S4D(**dict(d_model=4, d_state=8) | options, rngs=nnx.Rngs(0))


def with_number(name, value):
    """Give a number to what takes it. Return how many arrays a layer then has."""
    if name in ("lr", "ssm_lr", "weight_decay"):
        return s4d.make_optimizer(None, 10, **{name: value})
    if name in ("temperature", "top_p"):
        model = s4d.S4DModel(3, 2, 2, 2, 1, pooling="none", rngs=nnx.Rngs(0))
        with mock.patch.object(s4d, "sample", lambda *_, steps: None):
            return s4d.generate(model, [[0]], 1, jax.random.key(0), **{name: value})
    layer = s4d.GeneralS4D(4, 4, **{name: value}, rngs=nnx.Rngs(0))
    return len(jax.tree.leaves(nnx.state(layer)))


@pytest.mark.parametrize(
    "name",
    ["dt_min", "dt_max", "dropout", "rate", "bandlimit"]
    + ["lr", "ssm_lr", "weight_decay", "temperature", "top_p"],
)
def test_a_number_is_a_number(name):
    """Not a text, a truth value, nothing, several, imaginary, or NaN. Those of NumPy
    and JAX are, and become Python's."""
    wrong = ["0.05", "a", True, np.True_, [0.05], np.ones(2), 0.05j, math.nan]
    for value in wrong if name == "bandlimit" else [None, *wrong]:
        said = rf"{name} is {re.escape(repr(value))}; allowed: .*, a number"
        with pytest.raises(ValueError, match=said):
            with_number(name, value)
    for kind in (np.float32, np.float64, np.array, jnp.float32, jnp.bfloat16):
        arrays = with_number(name, kind(0.05))
        assert name.endswith(("lr", "decay")) or arrays == with_number(name, 0.05)


@pytest.mark.parametrize(
    "make", [s4d.S4D, s4d.S4DBlock, s4d.S4DStack, functools.partial(s4d.S4DModel, 1, 2)]
)
def test_a_misspelt_option_is_refused(make):
    with pytest.raises(TypeError, match="dropuot"):
        make(4, 8, dropuot=0.1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((0, 2), {}, "d_input is 0"),
        ((1, 0), {}, "d_output is 0"),
        ((1, 2), dict(n_layers=0), "n_layers is 0"),
        ((1, 2), dict(expand=-1), "expand is -1"),
        ((1, 2), dict(expand=None), "expand is None"),
        (
            (1, 2),
            dict(pooling="max"),
            "pooling is 'max'; allowed: 'mean', 'last', 'none'",
        ),
    ],
)
def test_model_refuses(args, options, message):
    with pytest.raises(ValueError, match=message):
        s4d.S4DModel(*args, **dict(d_model=4, d_state=8) | options, rngs=nnx.Rngs(0))


def test_a_block_without_ffn_is_a_residual_layer():
    block = s4d.S4DBlock(3, 8, expand=0, rngs=nnx.Rngs(0))
    u = jnp.asarray(noise(2, 9, 3))
    y = u + s4d.call(block.ssm, block.norm(u))
    assert error(s4d.call(block, u), y) < 1e-6
    x, y = s4d.run_steps(block, u)
    assert error(y, s4d.call(block, u)) < 1e-5
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(block, nnx.Param))}
    assert names == {"ssm", "norm"}


def test_gelu_against_scipy_and_its_slope():
    y = np.linspace(-12, 12, 4001)
    density = np.exp(-(y**2) / 2) / np.sqrt(2 * np.pi)
    below = (1 + erf(y / np.sqrt(2))) / 2
    slope = jax.vmap(jax.grad(s4d.gelu))(jnp.float32(y))
    assert np.abs(s4d.gelu(jnp.float32(y)) - y * below).max() < 2e-6
    assert np.abs(slope - (below + y * density)).max() < 2e-6
    with jax.enable_x64(True):
        assert np.abs(s4d.gelu(jnp.asarray(y)) - y * below).max() < 1e-14


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3), (2, 2, 5, 3), (0, 3)])
def test_linear_is_that_of_flax(shape):
    ours, flax = (k(3, 4, rngs=nnx.Rngs(0)) for k in (s4d.Linear, nnx.Linear))
    u = jnp.asarray(noise(*shape))

    def loss(layer, u):
        return jnp.sin(layer(u)).sum()

    assert ours(u).shape == flax(u).shape == (*shape[:-1], 4)
    assert np.allclose(ours(u), flax(u), atol=1e-6)
    for a, b in zip(*(jax.tree.leaves(nnx.grad(loss)(k, u)) for k in (ours, flax))):
        assert a.shape == b.shape and jnp.abs(a - b).max() < 1e-5


@pytest.mark.parametrize("window", [0, -1, 2.5])
def test_build_refuses_a_window(window):
    with pytest.raises(ValueError, match="window_size is"):
        s4d.build(3, 8, 4, window_size=window, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 4), (2, 0, 3), (1, 2, 5, 3)])
def test_layer_refuses_a_shape(shape):
    layer = make()
    with pytest.raises(
        ValueError, match=r"u has shape .*; allowed: \(batch, L >= 1, 3\)"
    ):
        layer(jnp.ones(shape))


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([3], "shape .1,.; allowed: one integer for each of 2 rows"),
        ([3, 3, 3], "one integer for each of 2 rows"),
        ([1.0, 2.0], "lengths is float"),
        ([-1, 3], "allowed: 0 to 5"),
        ([2, 6], "allowed: 0 to 5"),
    ],
)
def test_layer_refuses_lengths(lengths, message):
    layer, u = make(), jnp.ones((2, 5, 3))
    for view in (layer, functools.partial(layer.advance, layer.init_state(2))):
        with pytest.raises(ValueError, match=message):
            view(u, jnp.array(lengths))


def test_model_refuses_an_empty_row():
    model = s4d.S4DModel(3, 2, 4, 8, 1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="allowed: 1 to 5"):
        model(jnp.ones((2, 5, 3)), jnp.array([0, 5]))


def test_layer_refuses_a_state():
    layer = make()
    x = layer.init_state(2)
    for state, u in [
        (x[:1], jnp.ones((2, 3))),
        (x[..., :1], jnp.ones((2, 3))),
        (x, jnp.ones((2, 4))),
    ]:
        with pytest.raises(
            ValueError, match=r"allowed: x \(batch, 3, 4\), u \(batch, 3\)"
        ):
            layer.step(state, u)
    with pytest.raises(ValueError, match="x has shape"):
        layer.advance(x[:1], jnp.ones((2, 5, 3)))


# -- every state ----------------------------------------------------------------------


def test_every_state_of_the_layer(x64):
    """advance(every=True) against the states of the oracle, from any state."""
    layer, u = make(init="lin", dt_min=1e-4), noise(2, 40, 3)
    x0 = noise(2, 3, 4, seed=1) + 1j * noise(2, 3, 4, seed=2)
    states, y = layer.advance(x0, u, every=True)
    exact, y_exact = numpy_layer(layer, u, x0=x0)
    tol = tolerance(x64, 40)
    assert error(states, exact.swapaxes(1, 2)) < tol and error(y, y_exact) < tol
    assert states.dtype == layer.init_state(1).dtype
    ended, _ = layer.advance(x0, u, jnp.array([0, 7]), every=True)
    assert (ended[0] == x0[0]).all()  # a row without samples stays where it is
    assert (ended[1, 6:] == ended[1, 6]).all()
    assert error(ended[1, :7], states[1, :7]) < tol


@pytest.mark.parametrize(
    "kernel, pooling",
    [("s4d", "mean"), ("s4", "last")],
)
def test_a_rollout_from_any_state(kernel, pooling):
    """A model goes on from any of its states as if it had never stopped."""
    model = s4d.S4DModel(
        2, 3, 4, 8, 2, kernel=kernel, pooling=pooling, rngs=nnx.Rngs(0)
    )
    v, rest = noise(2, 24, 2), model.init_state(2)
    whole_states, answers = s4d.advance(model, rest, v, every=True)
    x, whole = s4d.advance(model, rest, v)
    assert error(answers, whole) < 1e-5
    after, on = s4d.advance(
        model, jax.tree.map(lambda x: x[:, 10], whole_states), v[:, 11:]
    )
    assert error(on, whole[:, 11:]) < 1e-5
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(x)):
        assert error(a, b) < 1e-5
