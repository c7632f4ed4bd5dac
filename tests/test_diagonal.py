"""Parts 5 to 7: hold, kernel, convolution, recurrence, scan and initializations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import discretize, error, kernel, run, tolerance

import annotated_s4d as s4d

DTS = np.float32([1e-4, 1e-3, 1e-2, 1e-1])


def systems(init, N=64, seed=0):
    """The same poles at four steps from 1e-4 to 1e-1: A, B, C (4, N/2) and dt (4,)."""
    rng = np.random.default_rng(seed)
    A = jnp.tile(s4d.s4d_init(init, N, jax.random.key(seed)), (4, 1))
    B, C = (
        jnp.asarray(rng.standard_normal((2, 4, N // 2)).T @ [1, 1j]).T for _ in "BC"
    )
    return A, B.astype(A.dtype), C.astype(A.dtype), jnp.asarray(DTS, A.real.dtype)


def each_error(a, b):
    """The largest error of any channel."""
    return max(error(x, y) for x, y in zip(np.asarray(a), np.asarray(b)))


# -- the numbers that must hold -------------------------------------------------------


EVERY_INIT = [(init, L) for init in s4d.INITS for L in (1, 100, 65536)]
EVERY_LENGTH = [("legs", L) for L in (2, 3, 7, 64, 1000, 4096)]


@pytest.mark.parametrize("init, L", EVERY_INIT + EVERY_LENGTH)
@pytest.mark.parametrize("method", s4d.METHODS)
def test_kernel_and_convolution(x64, init, method, L):
    """Kernel and output against SciPy, each at dt from 1e-4 to 1e-1."""
    A, B, C, dt = systems(init)
    u = np.random.default_rng(L).standard_normal((4, L)).astype(A.real.dtype)
    K = s4d.s4d_kernel(A, B, C, dt, L, method)
    assert K.dtype == A.real.dtype
    tol = tolerance(x64, L, method)
    assert each_error(K, kernel(A, B, C, dt, L, method)) < tol
    _, y = run(A, B, C, dt, u, method)
    assert each_error(s4d.causal_conv(jnp.asarray(u), K), y) < tol


@pytest.mark.parametrize("L", [100, 65536])
@pytest.mark.parametrize("method", s4d.METHODS)
@pytest.mark.parametrize("init", s4d.INITS)
def test_recurrence(x64, init, method, L):
    """With the rest of its poles the recurrence is as exact as the convolution."""
    A, B, C, dt = systems(init)
    u = np.random.default_rng(L).standard_normal((4, L)).astype(A.real.dtype)
    A_bar, B_bar = s4d.s4d_discretize(A, B, dt, method)
    rest = s4d.pole_rest(A, dt, A_bar, method)
    x0 = jnp.ones_like(A)
    y, x = s4d.s4d_recurrence(A_bar, B_bar, C, jnp.asarray(u), x0, rest)
    x_exact, y_exact = run(A, B, C, dt, u, method, x0)
    assert each_error(y, y_exact) < tolerance(x64, L, method)
    assert each_error(x, x_exact[:, -1]) < 2 * tolerance(x64, L, method)


@pytest.mark.parametrize("L", [1, 100, 65536])
@pytest.mark.parametrize("method", s4d.METHODS)
@pytest.mark.parametrize("init", ["legs", "real"])
def test_scan(x64, init, method, L):
    """Every state of the parallel scan, from a state, with a batch in front."""
    A, B, C, dt = systems(init, N=8)
    u = np.random.default_rng(L).standard_normal((2, 4, L)).astype(A.real.dtype)
    A_bar, B_bar = s4d.s4d_discretize(A, B, dt, method)
    rest = s4d.pole_rest(A, dt, A_bar, method)
    x0 = jnp.ones((2, *A.shape), A.dtype)
    y, x = s4d.s4d_scan(A_bar, B_bar, C, jnp.asarray(u), x0, rest)
    for row in range(2):
        x_exact, y_exact = run(A, B, C, dt, u[row], method, x0[row])
        assert each_error(y[row], y_exact) < tolerance(x64, L, method)
        assert each_error(x[row], x_exact) < tolerance(x64, L, method)


def test_without_the_rest_float32_drifts():
    """What Part 6 says: rounding the pole costs a hundred times the error."""
    A, B, C, dt = systems("lin")
    u = np.random.default_rng(0).standard_normal((4, 65536)).astype(np.float32)
    A_bar, B_bar = s4d.s4d_discretize(A, B, dt)
    y, _ = s4d.s4d_recurrence(A_bar, B_bar, C, jnp.asarray(u))
    _, exact = run(A, B, C, dt, u)
    assert error(y[0], exact[0]) > 2e-5  # dt = 1e-4
    assert error(y[3], exact[3]) < 1e-5  # dt = 1e-1


# -- irregular times ------------------------------------------------------------------


def numpy_timed(A, B, C, dt, u, x0):
    """States (..., L, N/2) and outputs (..., L): the held input, one step at a time.

    A, B, C (..., N/2), dt and u (..., L), x0 (..., N/2) broadcast, all to complex128.
    """
    A, B, C, x = (np.asarray(v, complex) for v in (A, B, C, x0))
    states, outputs = [], []
    for l in range(u.shape[-1]):
        A_bar, B_bar = discretize(A, B, np.float64(dt)[..., l], "zoh")
        x = A_bar * x + B_bar * np.float64(u)[..., l, None]
        states.append(x)
        outputs.append(2 * (C * x).sum(-1).real)
    return np.stack(states, -2), np.stack(outputs, -1)


def timed_views(A, B, C, dt, u, x0=None):
    """Outputs and last states, by the recurrence and by the scan."""
    A, B = A[..., None, :], B[..., None, :]
    A_bar, B_bar = s4d.s4d_discretize(A, B, dt)
    args = A_bar, B_bar, C, u, x0, s4d.pole_rest(A, dt, A_bar)
    y_scan, x = s4d.s4d_scan(*args, timed=True)
    return s4d.s4d_recurrence(*args, timed=True), (y_scan, x[..., -1, :]), x


@pytest.mark.parametrize("L", [1, 2, 100, 4096])
@pytest.mark.parametrize("rows", [(), (2,)], ids=str)
def test_irregular_times(x64, L, rows):
    """Recurrence and scan against NumPy; one clock for all, or one for each channel."""
    A, B, C, _ = systems("legs", N=8)
    rng = np.random.default_rng(L)
    u = jnp.asarray(rng.standard_normal((*rows, 4, L)))
    x0 = jnp.ones((*rows, *A.shape), A.dtype)
    for clocks in ((L,), (4, L), *([(*rows, 1, L)] if rows else [])):
        dt = jnp.asarray(10 ** rng.uniform(-4, -1, clocks))
        exact = numpy_timed(A, B, C, np.broadcast_to(dt, u.shape), u, x0)
        *views, x = timed_views(A, B, C, dt, u, x0)
        assert error(x, exact[0]) < tolerance(x64, L)
        for y, last in views:
            assert error(y, exact[1]) < tolerance(x64, L)
            assert error(last, exact[0][..., -1, :]) < tolerance(x64, L)


def test_irregular_times_from_rest_without_the_rest_of_the_poles(x64):
    A, B, C, _ = systems("lin", N=8)
    u, dt = np.random.default_rng(0).standard_normal((2, 4, 60))
    dt = jnp.asarray(np.abs(dt) / 100)
    timed = s4d.s4d_discretize(A[:, None], B[:, None], dt)
    _, exact = numpy_timed(A, B, C, dt, u, jnp.zeros_like(A))
    for view in (s4d.s4d_recurrence, s4d.s4d_scan):
        assert error(view(*timed, C, jnp.asarray(u), timed=True)[0], exact) < (
            1e-10 if x64 else 1e-5
        )


def test_equal_gaps_are_the_plain_form(x64):
    A, B, C, dt = systems("inv", N=8)
    u = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 90)))
    A_bar, B_bar = s4d.s4d_discretize(A, B, dt)
    plain, x = s4d.s4d_recurrence(
        A_bar, B_bar, C, u, A_rest=s4d.pole_rest(A, dt, A_bar)
    )
    *views, _ = timed_views(A, B, C, jnp.tile(dt[:, None], 90), u)
    for y, last in views:
        assert error(y, plain) < (1e-13 if x64 else 1e-6)
        assert error(last, x) < (1e-13 if x64 else 1e-6)


def test_a_gap_may_be_cut_in_two(x64):
    """To hold an input for a second is to hold it twice, for parts of the second."""
    A, B, C, _ = systems("legs", N=8)
    u = jnp.asarray(np.random.default_rng(0).standard_normal((4, 30)))
    (y, x), *_ = timed_views(A, B, C, jnp.full(30, 0.05), u)
    (twice, last), *_ = timed_views(
        A, B, C, jnp.tile(jnp.array([0.02, 0.03]), 30), jnp.repeat(u, 2, -1)
    )
    assert error(twice[:, 1::2], y) < (1e-12 if x64 else 1e-5)
    assert error(last, x) < (1e-12 if x64 else 1e-5)


def test_irregular_times_differentiate(x64):
    """The gradient to the gaps, by both views and against differences."""
    A, B, C, _ = systems("legs", N=8)
    u = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)))

    def loss(view, dt):
        timed = s4d.s4d_discretize(A[:, None], B[:, None], dt)
        return (view(*timed, C, u, timed=True)[0] ** 2).sum()

    dt = jnp.linspace(0.01, 0.05, 16)
    views = (s4d.s4d_recurrence, s4d.s4d_scan)
    a, b = (jax.jit(jax.grad(lambda dt, f=f: loss(f, dt)))(dt) for f in views)
    assert error(a, b) < (1e-10 if x64 else 1e-4)
    if x64:
        up, down = (loss(views[0], dt.at[7].add(h)) for h in (1e-6, -1e-6))
        assert float(a[7]) == pytest.approx(float(up - down) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("view", ["s4d_recurrence", "s4d_scan"])
def test_timed_refuses(view):
    """No axis of time, another length, a rest without time."""
    run = functools.partial(getattr(s4d, view), timed=True)
    ones, u = functools.partial(jnp.ones, dtype=complex), jnp.ones(5)
    for A_bar, rest in [((2,), 0.0), ((4, 2), 0.0), ((1, 2), 0.0), ((5, 2), ones(2))]:
        with pytest.raises(ValueError, match=r"shapes .*; allowed: \(..., 5, N/2\)"):
            run(ones(A_bar), ones(A_bar), ones(2), u, None, rest)


# -- discretization -------------------------------------------------------------------


@pytest.mark.parametrize("method", s4d.METHODS)
def test_discretize(x64, method):
    rng = np.random.default_rng(0)
    A = -rng.uniform(0, 50, 1000) + 1j * rng.uniform(-300, 300, 1000)
    A = jnp.asarray(A)[:, None]
    dt = jnp.asarray(10 ** rng.uniform(-9, 0, 1000))
    B = jnp.full_like(A, 0.5 - 2j)
    ours, exact = s4d.s4d_discretize(A, B, dt, method), discretize(A, B, dt, method)
    for a, b in zip(ours, exact):
        # An angle of up to 300 radians is rounded to 24 bits before its sine is taken.
        assert (np.abs(a - b) <= (1e-12 if x64 else 4e-5) * np.abs(b)).all()


def test_phi_keeps_all_digits(x64):
    """Value and derivative on a grid around the place where the series takes over."""
    sizes = 10.0 ** np.arange(-30, 1.0, 0.125)
    z = np.concatenate([sizes * np.exp(1j * a) for a in np.linspace(1.6, 4.7, 9)])
    z = jnp.asarray(z)
    exact = np.asarray(z, complex)
    # Independent: phi(z) is the integral of e^(sz) over s from 0 to 1, phi'(z) that of
    # s e^(sz), here by Gauss-Legendre quadrature.
    nodes, weights = np.polynomial.legendre.leggauss(40)
    s, w = (nodes + 1) / 2, weights / 2
    value, slope = (np.exp(np.outer(exact, s)) @ (w * f) for f in (1, s))
    eps = 1e-14 if x64 else 5e-7
    assert error(s4d.phi(z), value) < eps
    ours = jax.vmap(jax.grad(s4d.phi, holomorphic=True))(z)
    assert error(ours, slope) < 10 * eps
    assert s4d.phi(jnp.zeros(1)) == 1


def test_integrator(x64):
    """A pole at zero sums its input, in every view, and its gradient is right."""
    A, one = jnp.zeros((1, 1), complex), jnp.ones((1, 1), complex)
    dt, L = jnp.array([0.5]), 50
    u = jnp.asarray(np.random.default_rng(0).standard_normal((1, L)))
    sums = 2 * 0.5 * np.cumsum(u, -1)
    for method in s4d.METHODS:
        K = s4d.s4d_kernel(A, one, one, dt, L, method)
        assert error(s4d.causal_conv(u, K), sums) < 1e-6
        A_bar, B_bar = s4d.s4d_discretize(A, one, dt, method)
        assert error(s4d.s4d_recurrence(A_bar, B_bar, one, u)[0], sums) < 1e-6
        grad = jax.grad(
            lambda a, m=method: s4d.s4d_kernel(a + 0j, one, one, dt, L, m).sum()
        )
        # K_l = 2 dt (1 + A dt (l + 1/2) + ...), by either rule
        assert grad(A.real) == pytest.approx(2 * 0.25 * L**2 / 2, rel=1e-5)


# -- gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("method", s4d.METHODS)
@pytest.mark.parametrize("init", ["legs", "rand", "real"])
def test_kernel_gradient_is_that_of_the_definition(init, method):
    """The hand-written derivative against autodiff of the Vandermonde product."""
    with jax.enable_x64(True):
        A, B, C, dt = systems(init, N=16)
        target = np.random.default_rng(0).standard_normal((4, 100))

        def loss(f, re, im, B, C, log_dt):
            K = f(jax.lax.complex(re, im), B, C, jnp.exp(log_dt), 100, method)
            return (K * target).sum()

        args = A.real, A.imag, B, C, jnp.log(dt)
        ours = jax.jit(jax.grad(lambda *a: loss(s4d.s4d_kernel, *a), range(5)))(*args)

        def definition(A, B, C, dt, L, method):  # powers by products, no logarithm
            A_bar, B_bar = s4d.s4d_discretize(A, B, dt, method)
            one = jnp.ones_like(A_bar)
            _, powers = jax.lax.scan(lambda p, _: (p * A_bar, p), one, None, L)
            return 2 * jnp.einsum("hn,lhn->hl", C * B_bar, powers).real

        plain = jax.jit(jax.grad(lambda *a: loss(definition, *a), range(5)))(*args)
        for a, b in zip(ours, plain):
            assert error(a, b) < 1e-9
    halves = [np.asarray(a).astype("F" if np.iscomplexobj(a) else "f") for a in args]
    single = jax.jit(jax.grad(lambda *a: loss(s4d.s4d_kernel, *a), range(5)))(*halves)
    for a, b in zip(single, ours):
        assert a.dtype in (jnp.float32, jnp.complex64)
        assert error(a, b) < 1e-4


@pytest.mark.parametrize("method", s4d.METHODS)
def test_gradients_stay_finite(x64, method):
    """Poles at 0, at -2/dt (where bilinear A_bar is 0), fast, slow, and tiny steps."""
    poles = jnp.array([0, -2, -20, -2e3, -1e-6, -0.5 + 1e4j, 1e-3j, -1e6 + 1e6j])
    A = jnp.tile(poles, (3, 1))
    dt, one = jnp.array([1.0, 0.1, 1e-8]), jnp.ones_like(A)

    def loss(re, im, dt):
        K = s4d.s4d_kernel(jax.lax.complex(re, im), one, one, dt, 40, method)
        return (K**2).sum()

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(A.real, A.imag, dt)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in grads)


def test_gradient_at_a_vanishing_bilinear_pole(x64):
    """At dt A = -2 the kernel is B_bar, 0, 0, ...; its slope is that of A_bar."""
    one = jnp.ones((1, 1), complex)

    def K(a):
        return s4d.s4d_kernel(
            jnp.full((1, 1), a + 0j), one, one, jnp.ones(1), 4, "bilinear"
        )

    # A_bar' = 1 / (1 - z/2)^2 = 1/4 and B_bar = 1/2, B_bar' = 1/8 at z = -2
    assert np.allclose(K(-2.0), [[1, 0, 0, 0]], atol=1e-6)
    slope = jax.jacfwd(K)(-2.0)
    assert np.allclose(slope, [[0.25, 0.25, 0, 0]], atol=1e-5)


def test_scan_and_recurrence_differentiate(x64):
    A, B, C, dt = systems("legs", N=8)
    u = jnp.asarray(np.random.default_rng(0).standard_normal((4, 24)))

    def loss(run, re, im):
        discrete = s4d.s4d_discretize(jax.lax.complex(re, im), B, dt)
        return (run(*discrete, C, u)[0] ** 2).sum()

    def convolve(re, im):
        K = s4d.s4d_kernel(jax.lax.complex(re, im), B, C, dt, 24)
        return (s4d.causal_conv(u, K) ** 2).sum()

    expected = jax.jit(jax.grad(convolve, (0, 1)))(A.real, A.imag)
    for view in (s4d.s4d_recurrence, s4d.s4d_scan):
        grad = jax.jit(jax.grad(lambda *a, view=view: loss(view, *a), (0, 1)))
        grads = grad(A.real, A.imag)
        for a, b in zip(grads, expected):
            assert error(a, b) < (1e-10 if x64 else 1e-4)


# -- convolution ----------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(L=st.sampled_from([1, 2, 3, 4, 5, 17, 64, 333]), seed=st.integers(0, 2**32 - 1))
def test_convolutions_against_numpy(L, seed):
    rng = np.random.default_rng(seed)
    u, K = rng.standard_normal((2, 3, L)) * 10 ** rng.uniform(-3, 3, (2, 1, 1))
    exact = np.array([np.convolve(a, b)[:L] for a, b in zip(u, K)])
    assert error(s4d.causal_conv(jnp.asarray(u), jnp.asarray(K)), exact) < 1e-5
    assert error(s4d.padded_conv(jnp.asarray(u), jnp.asarray(K)), exact) < 1e-5
    circle = np.fft.ifft(np.fft.fft(u) * np.fft.fft(K)).real
    assert error(s4d.wrapped_conv(jnp.asarray(u), jnp.asarray(K)), circle) < 1e-5


def test_convolution_is_causal(x64):
    u, K = jnp.asarray(np.random.default_rng(0).standard_normal((2, 200)))
    change = s4d.causal_conv(u.at[120].add(1.0), K) - s4d.causal_conv(u, K)
    assert jnp.abs(change[:120]).max() < (1e-13 if x64 else 1e-5)
    assert error(change[120:], K[:80]) < (1e-12 if x64 else 1e-5)


def test_convolution_broadcasts():
    u, K = jnp.ones((5, 3, 16)), jnp.ones((3, 16))
    assert error(s4d.causal_conv(u, K), np.tile(np.arange(1, 17), (5, 3, 1))) < 1e-6


@pytest.mark.parametrize("L, M", [(4, 5), (0, 0)])
def test_convolution_refuses(L, M):
    with pytest.raises(ValueError, match=f"u has length {L}, K {M}"):
        s4d.causal_conv(jnp.ones(L), jnp.ones(M))


# -- initializations ------------------------------------------------------------------


@pytest.mark.parametrize("N", [2, 4, 64, 256])
def test_initializations_by_formula(x64, N):
    n = np.arange(N // 2)
    exact = {
        "lin": -0.5 + 1j * np.pi * n,
        "inv": -0.5 + 1j * N / np.pi * (N / (2 * n + 1) - 1),
        "inv2": -0.5 + 1j * N / np.pi * (N / (n + 1) - 1),
        "quad": -0.5 + 1j * (1 + 2 * n) ** 2 / np.pi,
        "real": -(n + 1.0) + 0j,
    }
    for name, A in exact.items():
        assert error(s4d.s4d_init(name, N), A) < 1e-6, name


@pytest.mark.parametrize("N", [2, 4, 64])
def test_legs_are_the_eigenvalues_of_the_normal_part(x64, N):
    """Against SciPy's general eigenvalues of A + P P^T, written out entry by entry."""
    S = np.empty((N, N))
    for n in range(N):
        for k in range(N):
            a = -np.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1) * (n == k)
            S[n, k] = a + np.sqrt((n + 0.5) * (k + 0.5))
    poles = scipy.linalg.eigvals(S)
    poles = np.sort_complex(poles[poles.imag > 0])
    ours = np.asarray(s4d.s4d_init("legs", N), complex)
    assert len(ours) == N // 2
    assert error(np.sort(ours.imag), np.sort(poles.imag)) < (1e-10 if x64 else 1e-6)
    assert np.allclose(ours.real, -0.5) and np.allclose(poles.real, -0.5)


def test_random_initialization_needs_and_uses_its_key(x64):
    a, b, c = (s4d.s4d_init("rand", 64, jax.random.key(k)) for k in (0, 0, 1))
    assert (a == b).all() and not (a == c).any()
    assert (a.real == -0.5).all() and (a.imag > 0).all()
    with pytest.raises(ValueError, match="key is None"):
        s4d.s4d_init("rand", 64)


def test_hippo_kernels_are_legendre_polynomials():
    A, B = s4d.hippo_legs(20)
    n = np.arange(20)
    for t in (0.05, 0.7, 2.5):
        P = scipy.special.eval_legendre(n, 2 * np.exp(-t) - 1)
        exact = np.sqrt(2 * n + 1) * np.exp(-t) * P
        assert error(scipy.linalg.expm(t * A) @ B, exact) < 1e-11


def dense_four_states(A, B, omega):
    """Kernels and responses to a sine, (4, 500) each, by powers of one exponential.

    The sine is made by two more states that turn, so that nothing is approximated.
    """
    N = len(B)
    M = np.zeros((N + 2, N + 2))
    M[:N, :N], M[:N, N] = A, B
    M[N:, N:] = [[0, omega], [-omega, 0]]  # (sin, cos)
    step = scipy.linalg.expm(M / 100)
    starts = np.zeros((N + 2, 2))
    starts[:N, 0], starts[N + 1, 1] = B, 1
    states = []
    for _ in range(500):
        starts = step @ starts
        states.append(starts[:4])
    return np.moveaxis(np.array(states), 0, -1).swapaxes(0, 1)


@pytest.mark.parametrize("omega", [2.0, 9.0])
def test_what_dropping_the_rank_one_term_costs(omega):
    """Responses of LegS and of its diagonal part meet, their kernels stay apart."""
    far = []
    for N in (4, 8, 32, 64):
        A, B = s4d.hippo_legs(N)
        legs = dense_four_states(A, B, omega)
        diagonal = dense_four_states(A + np.outer(B, B) / 2, B / 2, omega)
        pairs = zip(legs, diagonal)
        far.append([np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in pairs])
        ours = s4d.what_dropping_costs(N, omega)
        assert ours == pytest.approx(far[-1], rel=1e-5, abs=1e-8)
    kernels, responses = zip(*far)
    assert min(kernels) > 0.9
    assert all(b < a for a, b in zip(responses, responses[1:]))
    assert responses[-1] < (0.003 if omega == 2 else 0.06)


@pytest.mark.parametrize("kind", ["shuffled", "Gaussian"])
def test_dropping_another_term_costs_more(kind):
    for N in (16, 64):
        A, B = s4d.hippo_legs(N)
        normal, costs = A + np.outer(B, B) / 2, []
        for seed in range(3):
            P = s4d.rank_one(kind, N, seed)
            assert P @ P == pytest.approx(B @ B / 2)
            with_term = dense_four_states(normal - np.outer(P, P), B, 2.0)[1]
            without = dense_four_states(normal, B, 2.0)[1]
            best = np.linalg.lstsq(without.reshape(-1, 1), with_term.ravel())[0]
            apart = np.linalg.norm(with_term - best * without)
            costs.append(apart / np.linalg.norm(with_term))
            _, ours = s4d.what_dropping_costs(N, 2.0, P)
            assert ours == pytest.approx(costs[-1], rel=1e-5)
        assert np.mean(costs) > 5 * s4d.what_dropping_costs(N)[1]


def test_delay_fit_orders_the_initializations():
    left = {name: s4d.delay_fit(name)[2] for name in s4d.INITS}
    assert left["lin"] < 0.01 < left["legs"] < left["inv"] < 0.2 < left["rand"]
    assert left["real"] > 0.5


@pytest.mark.parametrize(
    "name, N",
    [
        ("hippo", 64),
        ("legs", 63),
        ("lin", 0),
        ("inv", -2),
        ("lin", 2.0),
        ("lin", True),
        (None, 4),
    ],
)
def test_initialization_refuses(name, N):
    with pytest.raises(ValueError, match="allowed"):
        s4d.s4d_init(name, N, jax.random.key(0))


@pytest.mark.parametrize("L", [0, -1, 2.5])
def test_kernel_refuses_a_length(L):
    one = jnp.ones((1, 1)) + 0j
    with pytest.raises(ValueError, match=f"L is {L}"):
        s4d.s4d_kernel(-one, one, one, jnp.ones(1), L)


def test_kernel_refuses_a_method():
    one = jnp.ones((1, 1)) + 0j
    with pytest.raises(ValueError, match="'zoh', 'bilinear'"):
        s4d.s4d_kernel(-one, one, one, jnp.ones(1), 4, "tustin")
