"""Appendix B: DSS and S4, against NumPy in float64 and against dense systems."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import error, noise, run
from scipy.special import erf

import annotated_s4d as s4d

DTS = np.array([1e-4, 1e-3, 1e-2, 1e-1])
LENGTHS = [1, 2, 75, 1000]


def random_complex(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def rounded(x64, *values):
    """What a system of this precision holds of some numbers, in float64."""
    if x64:
        return values
    return tuple(
        np.complex128(np.complex64(v))
        if np.iscomplexobj(v)
        else np.float64(np.float32(v))
        for v in values
    )


def both(v):
    return np.concatenate([v, v.conj()], -1)


def dense_dplr(A, P, B, C, dt):
    """A_bar (N, N), B_bar, C (N,) of a DPLR system, bilinear, both of each pair."""
    A, P, B, C = map(both, (A, P, B, C))
    A, I = np.diag(A) - np.outer(P, P.conj()), np.eye(len(A))
    inverse = np.linalg.inv(I - dt / 2 * A)
    return inverse @ (I + dt / 2 * A), dt * inverse @ B, C


def run_dense(A_bar, B_bar, C, u, x0=None):
    """States (L, N) and outputs (L,) by the plain loop."""
    x, states = np.zeros(len(B_bar), complex) if x0 is None else x0, []
    for u_k in u:
        x = A_bar @ x + B_bar * u_k
        states.append(x)
    return np.array(states), (np.array(states) @ C).real


def blow(L):
    return np.eye(1, L)[0]


def softmax_kernel(A, W, dt, L):
    """The definition of DSS for one channel: a softmax in time, shifted."""
    z = np.outer(A * dt, np.arange(L))
    z = np.exp(z - z.real.max(1, keepdims=True))
    return 2 * ((W / A) @ (z / z.sum(1, keepdims=True))).real


# -- the kernels ----------------------------------------------------------------------


@pytest.mark.parametrize("L", [*LENGTHS, 4096])
def test_dss_kernel_is_the_softmax(x64, L):
    """Four steps at once; modes that fade, that grow, fast ones and slow ones."""
    A = np.array(
        [-0.5 + 3j, -0.5 + 100j, -2.0, 0.3 + 20j, 3 - 1j, -1e-3 + 1j, -40 + 7j]
    )
    A, W, dt = rounded(x64, A, random_complex(4, 7), DTS)
    K = s4d.dss_kernel(jnp.asarray(A), jnp.asarray(W), jnp.asarray(dt), L)
    assert K.shape == (4, L) and K.dtype == (jnp.float64 if x64 else jnp.float32)
    for h in range(4):
        exact = softmax_kernel(A, W[h], dt[h], L)
        assert error(K[h], exact) < (1e-10 if x64 else 1e-5), dt[h]


def test_each_mode_of_dss_sums_to_one():
    A = jnp.asarray([[-0.5 + 3j], [0.2 + 30j]])
    K = s4d.dss_kernel(A, A, jnp.full(2, 0.01), 500)
    assert K.sum(-1) == pytest.approx(2, rel=1e-5)


def test_dss_kernel_against_the_dense_system():
    """A real matrix of 2 x 2 blocks, its exponential by SciPy."""
    A, W, dt, L = np.asarray(s4d.s4d_init("legs", 8)), random_complex(4), 0.02, 300
    A = np.complex128(A)
    C = W / (np.exp(A * dt * L) - 1)
    M, B, C = s4d.dense_pairs(A, np.ones(4), C)
    A_bar = s4d.scipy.linalg.expm(dt * M)
    B_bar = np.linalg.solve(M, (A_bar - np.eye(8)) @ B)
    _, exact = run_dense(A_bar, B_bar, C, blow(L))
    assert error(s4d.dss_kernel(A, W, dt, L), exact) < 1e-5


@pytest.mark.parametrize("L", [*LENGTHS, 4096])
def test_s4_kernel_is_that_of_legs(x64, L):
    """The real lower triangular matrix, written out once more, for a state of 64."""
    N, C = 64, np.random.default_rng(1).standard_normal(64)
    A = np.array(
        [
            [-math.sqrt((2 * n + 1) * (2 * k + 1)) * (n > k) - (n + 1) * (n == k)]
            for n in range(N)
            for k in range(N)
        ]
    ).reshape(N, N)
    B, I = np.sqrt(2 * np.arange(N) + 1), np.eye(N)
    poles, P, B_eig, V = s4d.legs_dplr(N)
    K = s4d.s4_kernel(poles, P, B_eig, C @ V, jnp.asarray(DTS), L)
    assert K.shape == (4, L) and K.dtype == (jnp.float64 if x64 else jnp.float32)
    for h, dt in enumerate(DTS):
        inverse = np.linalg.inv(I - dt / 2 * A)
        system = inverse @ (I + dt / 2 * A), dt * inverse @ B, C
        assert error(K[h], run_dense(*system, blow(L))[1]) < (1e-10 if x64 else 2e-6), (
            dt
        )


@pytest.mark.parametrize("L", LENGTHS)
def test_s4_kernel_for_any_parameters(x64, L):
    """Random poles, feedback and weights, two leading axes, dt for each."""
    A = -np.exp(random_complex(2, 4, 5).real) + 1j * random_complex(2, 4, 5).imag * 20
    P, B, C = (random_complex(2, 4, 5, seed=i) for i in (1, 2, 3))
    A, P, B, C, dt = rounded(x64, A, P, B, C, np.tile(DTS, (2, 1)))
    K = s4d.s4_kernel(A, P, B, C, dt, L)
    for i in np.ndindex(2, 4):
        system = dense_dplr(A[i], P[i], B[i], C[i], dt[i])
        exact = run_dense(*system, blow(L))[1]
        assert error(K[i], exact) < (1e-10 if x64 else 1e-6), dt[i]


def test_s4_without_feedback_is_s4d():
    """P = 0: the bilinear kernel of S4D, which comes from another computation."""
    A, B, C = s4d.s4d_init("lin", 16), random_complex(8), random_complex(8, seed=1)
    K = s4d.s4_kernel(A, jnp.zeros(8), B, C, 0.01, 200)
    exact = s4d.s4d_kernel(A, jnp.asarray(B), jnp.asarray(C), 0.01, 200, "bilinear")
    assert error(K, exact) < 1e-5


def test_legs_dplr_puts_legs_together_again():
    for N in (2, 16, 64):
        poles, P, B, V = s4d.legs_dplr(N)
        A = 2 * (V * poles @ V.conj().T).real
        P, B = 2 * (V @ P).real, 2 * (V @ B).real
        exact = s4d.hippo_legs(N)
        assert error(A - np.outer(P, P), exact[0]) < 1e-12
        assert error(B, exact[1]) < 1e-12


@pytest.mark.parametrize("L", [0, -3, 2.5])
def test_kernels_refuse_a_length(L):
    v = jnp.full(2, -1 + 1j)
    with pytest.raises(ValueError, match="L is .*; allowed: positive multiples of 1"):
        s4d.dss_kernel(v, v, 0.1, L)
    with pytest.raises(ValueError, match="L is .*; allowed: positive multiples of 1"):
        s4d.s4_kernel(v, v, v, v, 0.1, L)


# -- double precision in between ------------------------------------------------------


def test_in_double_computes_in_double(x64):
    """1e-9 added to 1 and taken away again: nothing is left in float32."""
    f = s4d.in_double(lambda a, c: (((1 + a) - 1) * 3, c * a))
    a, c = jnp.asarray(1e-9), jnp.asarray(2 - 1j)
    for g in (f, jax.jit(f)):
        y, z = g(a, c)
        assert y == pytest.approx(3e-9, rel=1e-6) and z.dtype == c.dtype
        assert y.dtype == a.dtype == (jnp.float64 if x64 else jnp.float32)
    f = s4d.in_double(lambda a: jnp.log(1 + a) * 1e9 - a * 1e9)
    assert jax.grad(f)(a) == pytest.approx(-1, rel=1e-3)  # 1e9 (1 / (1 + a) - 1)
    assert jax.jit(jax.grad(f))(a).dtype == a.dtype
    with pytest.raises(TypeError):
        jax.jvp(f, (a,), (a,))


# -- the layers -----------------------------------------------------------------------


def make(kernel, H=3, N=8, seed=0, **options):
    layer = s4d.LAYERS[kernel](H, N, rngs=nnx.Rngs(seed), **options)
    layer.eval()
    return layer


CASES = [
    ("dss", dict(l_max=50, init="lin", dt_min=1e-4, dt_max=0.1)),
    ("s4", dict(dt_min=1e-4, dt_max=0.1)),
]


def numpy_layer(layer, u, x0=None):
    """States (batch, L, H, N/2) and outputs in float64, final_act None."""
    pairs = [np.float64(p[...]) @ [1, 1j] for p in (layer.B, layer.C)]
    A = -np.exp(np.float64(layer.log_A_real[...])) + 1j * np.float64(layer.A_imag[...])
    dt, u, (B, C) = np.exp(np.float64(layer.log_dt[...])), np.float64(u), pairs
    H, half = A.shape
    x0 = np.zeros((len(u), H, half)) if x0 is None else np.asarray(x0, complex)
    x, y = np.empty((*u.shape, half), complex), np.empty(u.shape)
    for i, h in np.ndindex(len(u), H):
        if isinstance(layer, s4d.S4):
            P = np.float64(layer.P[h]) @ [1, 1j]
            system = dense_dplr(A[h], P, B[h], C[h], dt[h])
            states, y[i, :, h] = run_dense(*system, u[i, :, h], both(x0[i, h]))
            x[i, :, h] = states[:, :half]
        else:
            divided = C[h] / (np.exp(A[h] * dt[h] * layer.l_max) - 1)
            x[i, :, h], y[i, :, h] = run(
                A[h], B[h], divided, dt[h], u[i, :, h], x0=x0[i, h]
            )
    y = y + np.float64(layer.D[...]) * u
    return x, y * 0.5 * (1 + erf(y / math.sqrt(2)))


@pytest.mark.parametrize("kernel, options", CASES, ids=str)
def test_layer_against_numpy(x64, kernel, options):
    """Call, step and advance from any state, each against float64."""
    layer, u = make(kernel, final_act=None, **options), noise(2, 75, 3)
    x0, tol = jnp.asarray(random_complex(2, 3, 4)), 1e-10 if x64 else 1e-5
    x_exact, y_exact = numpy_layer(layer, u)
    assert error(s4d.call(layer, u), y_exact) < tol
    x, y = s4d.run_steps(layer, u)
    assert y.dtype == u.dtype and x.dtype == x0.dtype
    assert error(y, y_exact) < tol and error(x, x_exact[:, -1]) < tol
    x_exact, y_exact = numpy_layer(layer, u, x0)
    x, y = s4d.advance(layer, x0, u)
    assert error(y, y_exact) < tol and error(x, x_exact[:, -1]) < tol


@pytest.mark.parametrize("kernel", ["dss", "s4"])
def test_long_sequences(kernel):
    """At the defaults of the layer, a state of 64, both views meet at 4,096."""
    layer, u = make(kernel, 2, 64), noise(1, 4096, 2)
    assert error(s4d.run_steps(layer, u)[1], s4d.call(layer, u)) < 1e-5


@pytest.mark.parametrize("kernel", ["dss", "s4"])
def test_a_single_sample(kernel):
    layer, u = make(kernel, final_act=None), noise(2, 1, 3)
    x, y = numpy_layer(layer, u)
    assert error(s4d.call(layer, u), y) < 1e-5
    x_step, y_step = nnx.jit(lambda m, x, u: m.step(x, u))(
        layer, layer.init_state(2), u[:, 0]
    )
    assert error(y_step, y[:, 0]) < 1e-5 and error(x_step, x[:, 0]) < 1e-5


@pytest.mark.parametrize("kernel", ["dss", "s4"])
def test_lengths(kernel):
    """Each row ends on its own: outputs, zeros behind them, and the state."""
    layer, u = make(kernel, final_act=None, dt_min=0.01), noise(5, 40, 3)
    lengths, x0 = jnp.array([0, 1, 17, 39, 40]), jnp.asarray(random_complex(5, 3, 4))
    x_exact, y_exact = numpy_layer(layer, u, x0)
    padded = jnp.where(jnp.arange(40)[:, None] >= lengths[:, None, None], 9.0, u)
    x, y = s4d.advance(layer, x0, padded, lengths)
    assert error(x[0], x0[0]) < 1e-6
    for i, n in enumerate(lengths.tolist()):
        assert (y[i, n:] == 0).all()
        if n:
            assert error(x[i], x_exact[i, n - 1]) < 1e-5
            assert error(y[i, :n], y_exact[i, :n]) < 1e-5


def losses(layer, u, target):
    """A loss by each view, as a function of the parameters, and the parameters."""
    graph, params, other = nnx.split(layer, nnx.Param, ...)

    def stepped(m):
        return jax.lax.scan(m.step, m.init_state(len(u)), u.swapaxes(0, 1))[1]

    views = {
        "call": lambda m: m(u),
        "step": lambda m: stepped(m).swapaxes(0, 1),
    }

    def loss(view, params):
        return (views[view](nnx.merge(graph, params, other)) * target).sum()

    return {view: functools.partial(loss, view) for view in views}, params


@pytest.mark.parametrize("kernel", ["dss", "s4"])
def test_gradients(kernel):
    """Finite and not zero; float64 against differences; both views; float32."""
    u, target = (np.random.default_rng(i).standard_normal((2, 20, 3)) for i in (0, 9))

    def gradient(loss, params):
        g = nnx.to_flat_state(jax.jit(jax.grad(loss))(params))
        return {path: np.asarray(p[...]) for path, p in g}

    views, params = losses(
        make(kernel, dt_min=0.01), jnp.asarray(u), jnp.asarray(target)
    )
    single = gradient(views["call"], params)
    with jax.enable_x64(True):
        views, _ = losses(make(kernel, dt_min=0.01), u, target)
        params = jax.tree.map(lambda p: jnp.asarray(p, float), params)  # the same
        exact, stepped = (gradient(views[view], params) for view in ("call", "step"))
        for path, g in exact.items():
            assert g.dtype == np.float64 and np.isfinite(g).all() and (g != 0).all()
            assert error(stepped[path], g) < 1e-10, path
            assert error(single[path], g) < 1e-5, path
        loss = jax.jit(views["call"])
        for path, g in exact.items():
            direction = np.random.default_rng(3).standard_normal(g.shape)

            def moved(h, path=path, direction=direction):
                flat = nnx.to_flat_state(params)
                move = {path: h * direction}
                flat = [(k, p.replace(p[...] + move.get(k, 0))) for k, p in flat]
                return float(loss(nnx.from_flat_state(flat)))

            slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
            assert (g * direction).sum() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_the_softmax_has_the_length_of_the_layer():
    """Not of the call: a shorter call sees the same kernel, cut off."""
    layer = make("dss", l_max=100)
    A, B, W, dt = super(s4d.DSS, layer).system()
    exact = s4d.dss_kernel(A, W * B, dt, 100)
    assert error(layer.kernel(100), exact) < 1e-6
    assert error(layer.kernel(30), exact[:, :30]) < 1e-6
    assert error(make("dss", l_max=30).kernel(30), exact[:, :30]) > 0.1


def test_s4_begins_at_legs():
    """Its four kernels with C = the rows of V are the states of LegS."""
    layer = make("s4", 4, 16, dt_min=0.01, dt_max=0.01)
    A, P, B, C, dt = layer.system()
    V = s4d.legs_dplr(16)[3]
    system = s4d.ssm_discretize(*s4d.hippo_legs(16), 0.01, "bilinear")
    for n in (0, 1, 15):
        K = s4d.s4_kernel(A[0], P[0], B[0], V[n], dt[0], 100)
        _, exact = run_dense(*map(np.float64, system), np.eye(16)[n], blow(100))
        assert error(K, exact) < 1e-4  # the dense system is in float32


def test_s4_is_stable_whatever_it_learns():
    """Any P, even a huge one: no eigenvalue leaves the circle, and the kernel fades."""
    layer = make("s4", 2)
    layer.A_imag[...] = 50 * noise(*layer.A_imag.shape, seed=6)
    start = layer.P[...]
    for size in (0.1, 1.0, 30.0):
        layer.P[...] = size * noise(*start.shape, seed=5)
        K = layer.kernel(99)
        for h in range(2):
            system = dense_dplr(*(np.complex128(v[h]) for v in layer.system()))
            assert abs(np.linalg.eigvals(system[0])).max() < 1
            assert error(K[h], run_dense(*system, blow(99))[1]) < 1e-5


# -- models by name -------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["dss", "s4"])
def test_models_by_name(kernel):
    model = s4d.S4DModel(2, 5, 6, 8, 1, kernel=kernel, rngs=nnx.Rngs(0))
    assert type(model.stack.blocks[0].ssm) is s4d.LAYERS[kernel]
    u, lengths = noise(2, 30, 2), jnp.array([30, 11])
    _, answers = s4d.advance(model, model.init_state(2), u, lengths)
    y = s4d.call(model, u, lengths)
    assert error(y[0], answers[0, 29]) < 1e-5
    assert error(y[1], answers[1, 10]) < 1e-5


def test_s4d_is_the_default():
    assert type(s4d.S4DBlock(4, 8, rngs=nnx.Rngs(0)).ssm) is s4d.S4D
    assert set(s4d.LAYERS) >= {"s4d", "dss", "s4"}


@pytest.mark.parametrize("kernel, extra", [("s4d", 0), ("dss", 0), ("s4", 1)])
def test_param_count_is_exact(kernel, extra):
    """S4 has N numbers a channel more, its P; the rest is the formula of S4D."""
    H, N = 16, 8
    ssm = 2 * H + (3 + extra) * H * N
    block = ssm + 2 * H * (H + 1) + 2 * H * (H + 1) + H * (2 * H + 1) + 4 * H
    count = s4d.param_count(3, 16, 8, 2, kernel=kernel)
    assert count == 4 * H + 2 * block + 2 * H


@pytest.mark.parametrize("kernel", ["dss", "s4"])
def test_ssm_parameters_are_labelled(kernel):
    params = nnx.state(s4d.S4DBlock(4, 8, kernel=kernel, rngs=nnx.Rngs(0)), nnx.Param)
    labels = nnx.to_flat_state(s4d.parameter_labels(params))
    ssm = {path[-1] for path, label in labels if label.get_value() == "ssm"}
    rest = {path[-1] for path, label in labels if label.get_value() == "rest"}
    learned = {"log_dt", "log_A_real", "A_imag", "B"}
    assert ssm == learned | ({"P"} if kernel == "s4" else set())
    assert rest == {"C", "D", "kernel", "bias", "scale"}


# -- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel, options, message",
    [
        ("dss", dict(l_max=0), "l_max is 0; allowed: positive"),
        ("dss", dict(l_max=None), "l_max is None"),
        ("dss", dict(discretization="bilinear"), "'bilinear'; allowed: 'zoh'"),
        ("s4", dict(discretization="zoh"), "'zoh'; allowed: 'bilinear'"),
        ("s4", dict(init="lin"), "init is 'lin'; allowed: 'legs'"),
        ("s4", dict(d_state=7), "d_state is 7; allowed: positive multiples of 2"),
        ("s4", dict(dropout=1.0), "dropout is 1.0"),
        ("dss", dict(final_act="swish"), "final_act is 'swish'"),
        ("s4", dict(dt_min=0.0), "dt_min is 0.0"),
        ("s6", {}, "kernel is 's6'; allowed: 's4d', "),
        (None, {}, "kernel is None; allowed: 's4d'"),
    ],
)
def test_construction_refuses(kernel, options, message):
    options = dict(d_state=8, kernel=kernel) | options
    for maker in (s4d.S4DBlock, functools.partial(s4d.S4DModel, 1, 2)):
        with pytest.raises(ValueError, match=message):
            maker(4, **options, rngs=nnx.Rngs(0))
    options["state_size"] = options.pop("d_state")
    with pytest.raises(ValueError, match=message):
        s4d.build(3, 4, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kernel", ["s4d", "s4"])
def test_a_softmax_has_no_place_elsewhere(kernel):
    with pytest.raises(TypeError, match="l_max"):
        s4d.S4DBlock(4, 8, kernel=kernel, l_max=64, rngs=nnx.Rngs(0))


def test_s4_refuses_states_and_lengths():
    layer = make("s4")
    x, u = layer.init_state(2), jnp.ones((2, 5, 3))
    with pytest.raises(ValueError, match=r"allowed: x \(batch, 3, 4\), u \(batch, 3\)"):
        layer.step(x[..., :1], u[:, 0])
    with pytest.raises(ValueError, match="x has shape"):
        layer.advance(x[:1], u)
    with pytest.raises(ValueError, match="allowed: 0 to 5"):
        layer.advance(x, u, jnp.array([2, 6]))
    with pytest.raises(ValueError, match="u has shape"):
        layer(jnp.ones((2, 5, 4)))


# -- the table ------------------------------------------------------------------------


def test_code_lines():
    def five(a):
        """A docstring
        of two lines."""
        # a comment

        text = "a # that is none"
        b = [a,
             text]  # fmt: skip
        return b

    assert s4d.code_lines([five]) == 5
    assert s4d.code_lines([five, five]) == 10


def test_errors_against_legs():
    """S4 is LegS; S4D, and with it DSS, is near it."""
    errors = {name: s4d.legs_error(name, 32, 2000, 2e-3) for name in ("s4d", "s4")}
    assert errors["s4"] < 1e-5
    assert 5e-3 < errors["s4d"] < 0.2


@pytest.mark.parametrize("folder", ["", "assets"])
def test_accuracies_come_from_the_file(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(s4d, "__file__", str(tmp_path / "annotated_s4d.py"))
    assert s4d.measurements("kernels") == {}
    (tmp_path / folder).mkdir(exist_ok=True)
    recorded = {"s4": {"mean": 0.9, "spread": 0.01}}
    (tmp_path / folder / "kernels.json").write_text(json.dumps(recorded))
    assert s4d.measurements("kernels") == recorded
