"""Parts 1 to 5: the oscillator, the hold, the recurrence, the kernel, the diagonal."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.signal
from oracle import error

import annotated_s4d as s4d

SYSTEMS = [(1.0, 40.0, 2.0), (0.5, 80.0, 0.0), (2.0, 5.0, 20.0), (1.0, 1e-3, 1e-3)]


@pytest.mark.parametrize("parameters", SYSTEMS)
def test_oscillator_obeys_newton(parameters):
    """The energy of mass and spring falls by what friction takes."""
    mass, spring, damping = parameters
    A, B, C = s4d.oscillator(*parameters)
    p, v, u = 0.3, -0.7, 1.9
    dp, dv = A @ [p, v] + B * u
    power = spring * p * dp + mass * v * dv
    assert power == pytest.approx(u * v - damping * v**2)
    assert C @ [p, v] == p


@pytest.mark.parametrize("parameters", SYSTEMS)
@pytest.mark.parametrize("dt", [1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("method", s4d.METHODS)
def test_discretize_against_scipy(x64, parameters, dt, method):
    A, B, C = s4d.oscillator(*parameters)
    ours = s4d.ssm_discretize(A, B, dt, method)
    theirs = scipy.signal.cont2discrete((A, B[:, None], C[None], 0), dt, method=method)
    assert error(ours[0], theirs[0]) < (1e-12 if x64 else 1e-5)
    assert error(ours[1], theirs[1][:, 0]) < (1e-12 if x64 else 1e-5)


def test_discretize_an_integrator(x64):
    """A = 0 has no inverse and an exact hold."""
    A_bar, B_bar = s4d.ssm_discretize(np.zeros((1, 1)), np.ones(1), 0.25)
    assert A_bar == 1 and B_bar == 0.25


def test_hold_is_exact_in_continuous_time(x64):
    """SciPy integrates the held input interval by interval."""
    A, B, C = s4d.oscillator()
    u = np.random.default_rng(0).standard_normal(20)
    x, y = np.zeros(2), []
    for u_k in u:

        def slope(t, x, u_k=u_k):
            return A @ x + B * u_k

        x = scipy.integrate.solve_ivp(slope, (0, 0.3), x, rtol=1e-12, atol=1e-12).y[
            :, -1
        ]
        y.append(C @ x)
    ours, _ = s4d.ssm_recurrence(*s4d.ssm_discretize(A, B, 0.3), C, jnp.asarray(u))
    assert error(ours, y) < (1e-10 if x64 else 1e-5)


@pytest.mark.parametrize("L", [1, 2, 57, 1000])
@pytest.mark.parametrize("method", s4d.METHODS)
def test_recurrence_and_kernel_against_dlsim(x64, L, method):
    A, B, C = s4d.oscillator()
    A_bar, B_bar, *_ = scipy.signal.cont2discrete(
        (A, B[:, None], C[None], 0), 0.04, method=method
    )
    u = np.random.default_rng(1).standard_normal(L + 1)
    late = (A_bar, B_bar, C[None], 0, 0.04)  # dlsim's output comes one sample later
    _, y, _ = scipy.signal.dlsim(late, u[:, None])
    discrete = *s4d.ssm_discretize(A, B, 0.04, method), C
    ours, x = s4d.ssm_recurrence(*discrete, u[:L])
    tol = 1e-10 if x64 else 1e-5
    assert error(ours, y[1:, 0]) < tol
    assert error(C @ np.asarray(x), y[-1, 0]) < 10 * tol
    K = s4d.ssm_kernel(*discrete, L)
    assert error(s4d.direct_conv(u[:L], K), y[1:, 0]) < tol


def test_recurrence_goes_on_from_its_state(x64):
    system = *s4d.ssm_discretize(*s4d.oscillator()[:2], 0.04), s4d.oscillator()[2]
    u = np.random.default_rng(2).standard_normal(100)
    whole, last = s4d.ssm_recurrence(*system, u)
    first, x = s4d.ssm_recurrence(*system, u[:31])
    rest, x = s4d.ssm_recurrence(*system, u[31:], x)
    assert error(np.append(first, rest), whole) < 1e-6
    assert error(x, last) < 1e-6


def test_half_oscillator_is_the_oscillator(x64):
    """One mode of a conjugate pair has the impulse response of the dense system."""
    A, B, C = s4d.oscillator()
    t = np.linspace(0, 3, 50)
    h = [C @ scipy.linalg.expm(s * A) @ B for s in t]
    pole, b, c = (np.asarray(v, complex) for v in s4d.half_oscillator())
    half = 2 * (c * b * np.exp(np.outer(t, pole))).sum(-1).real
    assert error(half, h) < (1e-12 if x64 else 1e-6)


def test_refusals():
    A, B, _ = s4d.oscillator()
    with pytest.raises(
        ValueError, match="method is 'euler'; allowed: 'zoh', 'bilinear'"
    ):
        s4d.ssm_discretize(A, B, 0.1, "euler")
    with pytest.raises(ValueError, match=r"A has shape \(2, 1\)"):
        s4d.ssm_discretize(A[:, :1], B, 0.1)
