"""Appendix A: every option of GeneralS4D by itself, against NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx
from general_oracle import gelu, general, kernel, parameters, shapes, system
from oracle import error, noise

import annotated_s4d as s4d


def make(H=4, N=4, seed=0, **options):
    layer = s4d.GeneralS4D(H, N, rngs=nnx.Rngs(seed), **options)
    layer.eval()
    return layer


def scramble(layer, seed):
    """Move every parameter far from where it started, across zero too.

    The more inputs a linear map has, the smaller its weights, as at the start. Else a
    gated output is a large number times the sigmoid of another, and the rounding of
    that other counts a hundred times.
    """
    rng, state = np.random.default_rng(seed), nnx.state(layer, nnx.Param)

    def draw(path, p):
        low, high = {"log_dt": (-3, -1)}.get(path[0].key, (-2, 2))
        inputs = p.shape[0] if "kernel" in str(path) else 1
        return jnp.asarray(rng.uniform(low, high, p.shape) / inputs**0.5, p.dtype)

    nnx.update(layer, jax.tree.map_with_path(draw, state))


def turned(u, options):
    """u or y (batch, L, H) as a layer with these options takes or gives it."""
    return u.swapaxes(1, 2) if options.get("transposed") else u


def steps_apart(system):
    """dt A (h, modes), the same whether dt (h,) or A holds a dt of each mode."""
    A, _, _, dt = system
    return A * (dt if dt.ndim == 2 else dt[:, None])


def streams(options):
    return not (options.get("bidirectional") or options.get("l_max"))


def scanned(layer, x, u):
    """Step through u (batch, L, H) from state x."""
    x, y = jax.lax.scan(layer.step, x, u.swapaxes(0, 1))
    return x, y.swapaxes(0, 1)


def looped(layer, x, u):
    y = []
    for now in np.asarray(u).swapaxes(0, 1):
        x, y_now = layer.step(x, now)
        y.append(np.asarray(y_now))
    return x, np.stack(y, 1)


def views(layer, x0, u, lengths, options, cuts=(), stepped=looped):
    """The system, state of rest, kernel, a call, steps from x0 and chunks from x0."""
    found = dict(system=layer.system(), rest=layer.init_state(len(u)))
    found["kernel"] = layer.kernel(u.shape[1])
    found["call"] = turned(layer(turned(u, options), lengths), options)
    if streams(options):
        found["steps"], x, y, start = stepped(layer, x0, u), x0, [], 0
        for n in cuts or u.shape[1:2]:
            chunk, left = u[:, start : start + n], jnp.clip(lengths - start, 0, n)
            x, part = layer.advance(x, turned(chunk, options), left)
            y, start = [*y, turned(part, options)], start + n
        found["chunks"] = x, jnp.concatenate(y, 1)
    return found


def close(a, b, tol):
    """Within tol of the largest value; of a tenth, should all be smaller."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return np.abs(a - b).max() <= tol * max(np.abs(b).max(), 0.1)


def check(run, layer, options, u, lengths, x64, seed=0):
    """Each view of a layer against the oracle: values, shapes, types, zeros."""
    p, real = parameters(layer), options.get("is_real", False)
    H, N = u.shape[2], p["log_A_real"].shape[1] * (1 if real else 2)
    assert {name: value.shape for name, value in p.items()} == shapes(H, N, options)
    tol = 5e-5 if options.get("discretization") == "bilinear" else 1e-5
    tol = 1e-10 if x64 else tol
    A, B, C, dt = system(p, options)
    rng = np.random.default_rng(seed + 1)
    x0 = rng.standard_normal((len(u), *A.shape))
    x0 = jnp.asarray(x0 if real else x0 + 1j * rng.standard_normal(x0.shape))

    found = run(layer, x0, u, np.array(lengths))
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype in (u.dtype, jnp.result_type(u.dtype, 1j))
    found = jax.tree.map(np.asarray, found)
    rest = found["rest"]
    assert (rest == 0).all() and (rest.shape, rest.dtype) == (x0.shape, x0.dtype)
    z = steps_apart(found["system"])
    assert z.shape == A.shape and np.allclose(z, dt * A, tol, 0)
    assert close(found["kernel"], kernel(p, options, u.shape[1]), tol)
    assert close(found["call"], general(p, options, u, lengths)[1], tol)
    ends = [found["call"]]
    if streams(options):
        for ours, exact in zip(found["steps"], general(p, options, u, x0=x0)):
            assert close(ours, exact, tol)
        for ours, exact in zip(found["chunks"], general(p, options, u, lengths, x0)):
            assert close(ours, exact, tol)
        ends.append(found["chunks"][1])
    for y in ends:
        assert all((y[row, n:] == 0).all() for row, n in enumerate(lengths))


# -- every option ---------------------------------------------------------------------


def nothing(p):
    return {}


def first_channel(p):
    keep = np.array([1, 0, 0])
    return dict(C=p["C"] * keep[:, None, None, None], D=p["D"] * keep[:, None])


def dealt_out(p):
    """Channel i reads system i % 2, not i // 2."""
    names = ("log_A_real", "A_imag", "B")
    return {name: np.concatenate([p[name], p[name]]) for name in names}


def one_dt(p):
    """The two channels of a system share a dt."""
    return dict(log_dt=p["log_dt"][[0, 0, 2, 2]])


# The option; what a layer that overlooked it would take, options and parameters.
ROWS = [
    (dict(discretization="bilinear"), dict(discretization="zoh"), nothing),
    (dict(final_act="gelu"), dict(final_act="id"), nothing),
    (dict(final_act="relu"), dict(final_act="id"), nothing),
    (dict(final_act="id"), dict(final_act="gelu"), nothing),
    (
        dict(final_act=None),
        dict(final_act="id"),
        lambda p: {"mixer.linear.kernel": np.eye(4)[::-1], "mixer.linear.bias": 0},
    ),
    (dict(bidirectional=True), dict(bidirectional=False), lambda p: dict(C=p["C"][0])),
    (dict(channels=3), {}, first_channel),
    (dict(n_ssm=2), {}, dealt_out),
    (dict(n_ssm=2, rate=0.5), {}, one_dt),
    (dict(dt_fast=True), dict(dt_fast=False), nothing),
    (dict(bandlimit=0.03), dict(bandlimit=None), nothing),
    (dict(bandlimit=0.06, rate=2.0), dict(bandlimit=0.12), nothing),
    (dict(dt_tie=False), {}, lambda p: dict(log_dt=p["log_dt"][:, 0])),
    (dict(dt_transform="softplus"), dict(dt_transform="exp"), nothing),
    (dict(real_transform="none"), dict(real_transform="exp"), nothing),
    (dict(real_transform="relu"), dict(real_transform="exp"), nothing),
    (dict(real_transform="sigmoid"), dict(real_transform="exp"), nothing),
    (dict(real_transform="softplus"), dict(real_transform="exp"), nothing),
    (dict(imag_transform="exp"), dict(imag_transform="none"), nothing),
    (dict(imag_transform="relu"), dict(imag_transform="none"), nothing),
    (dict(imag_transform="softplus"), dict(imag_transform="none"), nothing),
    (dict(is_real=True, init="real"), {}, lambda p: dict(C=2 * p["C"])),
    (
        dict(bottleneck=2),
        {},
        lambda p: {"narrow.kernel": np.eye(8, 4), "narrow.bias": np.zeros(4)},
    ),
    (dict(gate=3), {}, lambda p: {"mixer.branch.kernel": np.zeros((4, 12))}),
    (dict(l_max=5), dict(l_max=None), nothing),
    (dict(rate=2.0), dict(rate=1.0), nothing),
    (dict(transposed=True), {}, lambda p: dict(D=p["D"][::-1])),
]


@pytest.mark.parametrize("options, ignored, blind", ROWS, ids=[str(r[0]) for r in ROWS])
def test_each_option(x64, options, ignored, blind):
    """It matters, and each view does what it says, before and after an update."""
    H = 4 * options.get("bottleneck", 1)
    layer, lengths = make(H, 2 if "is_real" in options else 4, **options), [12, 7]
    u, run = noise(2, 12, H), functools.partial(views, options=options)
    if not {"channels", "discretization"}.isdisjoint(options):
        # The others run on what is compiled already.
        run = nnx.jit(functools.partial(run, stepped=scanned))
    for seed in (0, 1):
        scramble(layer, seed)
        p = parameters(layer)
        overlooked = general(p | blind(p), options | ignored, u, lengths)[1]
        assert error(overlooked, general(p, options, u, lengths)[1]) > 0.01
        check(run, layer, options, u, lengths, x64)


def test_defaults_are_those_of_s4d(x64):
    """Same names and shapes; with the same parameters the same outputs."""
    plain, layer = s4d.S4D(4, 4, rngs=nnx.Rngs(0)), make(seed=1)
    assert isinstance(layer, s4d.S4D)
    u, state = noise(2, 12, 4), nnx.state(plain, nnx.Param)
    a, b = parameters(plain), parameters(layer)
    assert list(a) == list(b)
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    nnx.update(layer, state)
    tol = 1e-12 if x64 else 1e-6
    assert error(layer(u), plain(u)) < tol  # not compiled either
    x = noise(2, 4, 2) + 1j
    for ours, exact in zip(layer.step(x, u[:, 0]), plain.step(x, u[:, 0])):
        assert error(ours, exact) < tol
    for ours, exact in zip(layer.advance(x, u), plain.advance(x, u)):
        assert error(ours, exact) < tol


# -- where it starts ------------------------------------------------------------------


@pytest.mark.parametrize("init", ["legs", "lin", "quad", "rand", "real"])
def test_transforms_start_at_the_same_system(x64, init):
    tol = 1e-10 if x64 else 1e-5
    A, *_, dt = make(init=init).system()
    if init != "rand":
        assert error(A[3], s4d.s4d_init(init, 4)) < tol
    for name in ("none", "relu", "softplus", "sigmoid"):
        if (init, name) != ("real", "sigmoid"):
            layer = make(init=init, real_transform=name, dt_transform="softplus")
            same, *_, same_dt = layer.system()
            assert error(same, A) < tol and np.allclose(same_dt / dt, 1, 0, tol)
    for name in ("exp", "relu", "softplus"):
        same, *_ = make(init=init, imag_transform=name).system()
        still = A.imag == 0
        assert np.allclose(same[~still], A[~still], tol, 0)
        assert np.allclose(same[still].real, A[still].real, tol, 0)
        low, high = (0, 0) if name == "relu" else (1e-12, 1e-3 * (1 + 1e-5))
        assert ((low <= same[still].imag) & (same[still].imag <= high)).all()


def test_range_of_dt_and_real_poles():
    for transform in ("exp", "softplus"):
        for tie, shape in ((True, (4,)), (False, (4, 2))):
            options = dict(dt_min=0.5, dt_max=2.0, dt_transform=transform, dt_tie=tie)
            layer = make(**options)
            dt = -2 * steps_apart(layer.system()).real  # all Re A are -1/2
            assert layer.log_dt.shape == shape and len(np.unique(dt)) == math.prod(
                shape
            )
            assert (0.5 <= dt * 1.0001).all() and (dt <= 2.0002).all()
            double = -2 * steps_apart(make(**options, rate=2.0).system()).real
            assert error(double, 2 * dt) < 1e-6
    A, *_ = make(is_real=True, init="real").system()
    assert error(A, np.tile([-1.0, -2, -3, -4], (4, 1))) < 1e-6


@pytest.mark.parametrize("options", [{}, dict(init="real", is_real=True)], ids=str)
def test_deterministic(options):
    """No chance in any parameter of the systems; dt evenly spaced in the logarithm."""
    options = options | dict(deterministic=True, channels=2)
    layer, other = (make(seed=seed, **options) for seed in (0, 1))
    for name in ("log_dt", "log_A_real", "A_imag", "B", "C", "D"):
        if hasattr(layer, name):
            assert (getattr(layer, name)[...] == getattr(other, name)[...]).all()
    _, _, C, dt = layer.system()
    assert np.allclose(dt, np.geomspace(1e-3, 1e-1, 4), 1e-5)
    assert C[0, 0, 0] != 0 and (C == C[0, 0, 0]).all() and (layer.D[...] == 1).all()
    *_, dt = make(**options, n_ssm=2).system()
    assert np.allclose(dt, np.geomspace(1e-3, 1e-1, 4), 1e-5)
    options |= dict(dt_tie=False, n_ssm=2, dt_transform="softplus")
    z = steps_apart(make(**options).system()).real
    decay = np.arange(1, 5) if "is_real" in options else np.full(2, 0.5)
    spread = np.geomspace(1e-3, 1e-1, 4 * len(decay)).reshape(4, -1)
    assert np.allclose(z, -decay * spread, 1e-5)


def test_each_system_draws_its_own_poles():
    for layer in (
        s4d.S4D(4, 16, init="rand", rngs=nnx.Rngs(0)),
        make(4, 16, init="rand"),
    ):
        A, *_ = layer.system()
        assert len(np.unique(A.imag)) == 4 * 8 and np.allclose(A.real, -0.5)
    A, *_ = make(4, 16, init="rand", n_ssm=2).system()
    assert len(np.unique(A.imag)) == 2 * 8 and (A[0] == A[1]).all()


def test_fast_dt_starts_as_the_slow_and_moves_faster(x64):
    slow, fast = make(), make(dt_fast=True)
    assert error(fast.system()[3], slow.system()[3]) < (1e-10 if x64 else 1e-5)
    pace = [
        np.asarray(nnx.grad(lambda m: jnp.log(m.system()[3]).sum())(layer).log_dt)
        for layer in (slow, fast)
    ]
    steep = np.cosh(np.arcsinh(np.asarray(slow.log_dt[...], float)))
    assert error(pace[1], pace[0] * steep) < 1e-5 and (steep > 2).all()


def test_b_of_hippo(x64):
    """With V as C the modes are those of x' = (A + B B^T / 2) x + B u."""
    N, dt = 8, 0.01
    layer = make(1, N, B_init="legs", dt_min=dt, dt_max=dt, final_act=None)
    (A,), (B,), *_ = layer.system()
    dense, b = s4d.hippo_legs(N)
    dense = dense + np.outer(b, b) / 2
    V = s4d.legs_normal(N)[1][:, N // 2 :]
    exact = [scipy.linalg.expm(l * dt * dense) @ b for l in range(20)]
    modes = np.exp(np.outer(np.arange(20) * dt, np.asarray(A))) * np.asarray(B)
    assert error(2 * (modes @ V.T).real, np.array(exact)) < (1e-10 if x64 else 1e-5)


def test_names_of_the_authors():
    layer = make(8, 4, bottleneck=2, channels=2)
    assert layer.d_output == 8
    x = layer.default_state(2, 3)
    assert x.shape == (2, 3, 4, 2) and (x == 0).all() and x.dtype == jnp.complex64
    assert make(is_real=True, init="real").default_state(2).dtype == jnp.float32


def test_every_raw_value_is_allowed():
    """Far out too, the poles stay left, and values and slopes finite."""
    raw = jnp.array([-50.0, -20, -3, 0, 3, 20, 50, 0.5])

    def total(layer, name):
        A, *_, dt = layer.system()
        value = {"log_dt": dt, "log_A_real": -A.real, "A_imag": A.imag}[name]
        return value.sum(), value

    cases = [("log_dt", "dt_transform", ("exp", "softplus"))]
    reals = ("exp", "none", "relu", "sigmoid", "softplus")
    cases += [("log_A_real", "real_transform", reals)]
    cases += [("A_imag", "imag_transform", ("none", "exp", "relu", "softplus"))]
    for name, option, choices in cases:
        for choice in choices:
            layer, grad = make(8, 2, **{option: choice}), nnx.grad(total, has_aux=True)
            param = getattr(layer, name)
            param[...] = raw.reshape(param.shape)
            slopes, value = grad(layer, name)
            slope, value = np.ravel(slopes[name][...]), np.asarray(value)
            assert np.isfinite(value).all() and np.isfinite(slope).all()
            assert slope[-1] > 0 and (name == "A_imag" or (value > 0).all())


# -- the options that act in training and in time -------------------------------------


@pytest.mark.parametrize(
    "tie, transposed", [(False, False), (True, False), (True, True)]
)
def test_dropout_mask(tie, transposed):
    """Tied, each row and channel is kept or not for the whole sequence."""
    options = dict(transposed=transposed, tie_dropout=tie)
    layer = make(16, 4, final_act=None, dropout=0.5, **options)
    u = turned(noise(3, 10, 16), options) / 4  # no GELU is exactly zero
    layer.train()
    a, b = (np.asarray(turned(s4d.call(layer, u), options)) for _ in "ab")
    layer.eval()
    whole = turned(s4d.call(layer, u), options)
    kept = a != 0
    assert error(a, np.where(kept, 2 * whole, 0)) < 1e-5
    assert 0.3 < kept.mean() < 0.7
    assert (kept == kept[:, :1]).all() == tie
    assert (kept[0] != kept[1]).any() and (kept != (b != 0)).any()


def test_rate_is_another_sampling_of_the_same_system():
    options = dict(final_act=None, dt_min=0.01, dt_max=0.05)
    slow, fast = make(**options), make(**options, rate=2.0)
    t = jnp.arange(200) / 100
    u = jnp.sin(jnp.outer(t, jnp.arange(2.0, 6.0)) + 1)[None]
    y, half = s4d.call(slow, u)[:, 1::2], u[:, ::2]
    assert error(s4d.call(fast, half), y) < 0.06
    assert error(s4d.call(slow, half), y) > 0.2


def test_formulas_by_hand():
    """One channel, one mode, three samples: the oracle itself, put to the test."""
    options = dict(is_real=True, init="real", final_act=None, bidirectional=True)
    p = dict(log_dt=np.log([2.0]), log_A_real=np.log([[0.5] * 2]), B=np.ones((1, 2)))
    p |= dict(C=np.array([[[1.0, 0]], [[0, 3.0]]]), D=np.array([10.0]))
    u = np.array([1.0, 2, 4]).reshape(1, 3, 1)
    a, b = np.exp(-1), (1 - np.exp(-1)) / 0.5  # z = -1
    future = 3 * b * np.array([2 + 4 * a, 4, 0])
    y = b * np.array([1, 2 + a, 4 + 2 * a + a * a]) + future + [10, 20, 40]
    assert error(general(p, options, u)[1][0, :, 0], gelu(y)) < 1e-14
    K = np.array([[[1, a, a * a]], [[3, 3 * a, 3 * a * a]]]) * b
    assert error(kernel(p, options, 3), K) < 1e-14
    assert error(kernel(p, options | dict(l_max=2), 3), K * [1, 1, 0]) < 1e-14
    y = b * np.array([1, 2 + a, 4 + 2 * a]) + 3 * b * np.array([2 + 4 * a, 4, 0])
    found = general(p, options | dict(l_max=2), u)[1][0, :, 0]
    assert error(found, gelu(y + [10, 20, 40])) < 1e-14


# -- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(init="hippo"),
        dict(discretization="euler"),
        dict(final_act="swish"),
        dict(dt_transform="relu"),
        dict(real_transform="tanh"),
        dict(imag_transform="sigmoid"),
        dict(channels=0),
        dict(channels=-1),
        dict(channels=1.5),
        dict(n_ssm=3),
        dict(n_ssm=0),
        dict(n_ssm=4, bottleneck=2),
        dict(bottleneck=3),
        dict(bottleneck=0),
        dict(bottleneck=2.0),
        dict(gate=0),
        dict(gate=1.5),
        dict(l_max=0),
        dict(l_max=2.5),
        dict(rate=0.0),
        dict(rate=-1.0),
        dict(rate=np.inf),
        dict(rate=np.nan),
        dict(dt_min=0.2, dt_max=0.1),
        dict(dt_max=np.inf),
        dict(dt_min=0.0),
        dict(dropout=1.0),
        dict(dropout=-0.1),
        dict(d_state=7),
        dict(d_model=0),
        dict(bidirectional=1),
        dict(dt_tie="no"),
        dict(is_real=1, init="real"),
        dict(deterministic=None),
        dict(tie_dropout="yes"),
        dict(transposed=0),
        dict(deterministic=True, init="rand"),
        dict(dt_fast=1),
        dict(B_init="hippo"),
        dict(B_init="legs", init="lin"),
        dict(bandlimit=0.0),
        dict(bandlimit=np.nan),
        dict(bandlimit=0.5, is_real=True, init="real"),
        dict(is_real=True),
        dict(is_real=True, init="lin"),
        dict(real_transform="sigmoid", init="real"),
        dict(final_act=None, channels=2),
        dict(final_act=None, bottleneck=2),
        dict(final_act=None, gate=2),
    ],
    ids=str,
)
def test_construction_refuses(options):
    """By the name of the first option given, and with what is allowed."""
    with pytest.raises(ValueError, match=rf"\b{next(iter(options))}\b.*allowed"):
        options = dict(d_model=4, d_state=4) | options
        s4d.GeneralS4D(**options, rngs=nnx.Rngs(0))


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="bidirektional"):
        make(bidirektional=True)


@pytest.mark.parametrize("options", [dict(bidirectional=True), dict(l_max=4)], ids=str)
def test_what_cannot_stream_says_why(options):
    layer, x, u = make(**options), jnp.zeros((2, 4, 2)) + 0j, noise(2, 6, 4)
    (name,) = options
    with pytest.raises(ValueError, match=name):
        layer.step(x, u[:, 0])
    with pytest.raises(ValueError, match=name):
        layer.advance(x, u)


def test_layer_refuses_shapes():
    layer = make(bottleneck=2, transposed=True)
    x, u = layer.init_state(2), noise(2, 4, 7)
    for view in (layer, functools.partial(layer.advance, x)):
        for wrong in (u.swapaxes(1, 2), u[:, :2], u[0]):
            with pytest.raises(ValueError, match="allowed"):
                view(wrong)
        for lengths in ([7], [1.0, 2.0], [-1, 3], [2, 8]):
            with pytest.raises(ValueError, match="allowed"):
                view(u, jnp.array(lengths))
    for state, now in [(x[:1], u[..., 0]), (x[..., :1], u[..., 0]), (x, u[:, :2, 0])]:
        with pytest.raises(ValueError, match="allowed"):
            layer.step(state, now)
