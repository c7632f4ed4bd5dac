"""Independent answers in double precision: NumPy and SciPy, none of the article.
And what several tests need: an input, an error, its limit.
"""

import jax.numpy as jnp
import numpy as np
from scipy.signal import lfilter


def discretize(A, B, dt, method):
    """Discretize diagonal systems A, B (..., N/2), dt (...) in complex128."""
    A, B = np.asarray(A, complex), np.asarray(B, complex)
    dt = np.asarray(dt, float)[..., None]
    z = dt * A
    if method == "bilinear":
        return (1 + z / 2) / (1 - z / 2), dt / (1 - z / 2) * B
    safe = np.where(z == 0, 1, z)
    return np.exp(z), np.where(z == 0, dt, dt * np.expm1(safe) / safe) * B


def run(A, B, C, dt, u, method="zoh", x0=None):
    """States (..., L, N/2) and outputs (..., L) of diagonal systems, mode by mode.

    A, B, C (..., N/2), dt (...), u (..., L) of the same leading axes.
    """
    A_bar, B_bar = discretize(A, B, dt, method)
    u, C, shape = np.asarray(u, complex), np.asarray(C, complex), A_bar.shape
    x0 = np.zeros(shape, complex) if x0 is None else np.asarray(x0, complex)
    x, y = np.empty((*shape, u.shape[-1]), complex), np.zeros(u.shape)
    for i in np.ndindex(shape):
        a, b = A_bar[i], B_bar[i]
        x[i], _ = lfilter([b], [1, -a], u[i[:-1]], zi=[a * x0[i]])
        y[i[:-1]] += 2 * (C[i] * x[i]).real
    return x.swapaxes(-1, -2), y


def kernel(A, B, C, dt, L, method="zoh"):
    """The kernel (..., L), as the answer to a single blow."""
    A_bar, B_bar = discretize(A, B, dt, method)
    C, blow, K = np.asarray(C, complex), np.eye(1, L)[0], np.zeros((*C.shape[:-1], L))
    for i in np.ndindex(A_bar.shape):
        # Below 1e-250 it counts as zero: numbers near 1e-308 take a processor long.
        fading = max(-np.log(abs(A_bar[i]) + 1e-300), 1e-9)  # in each step
        n = int(min(L, 1 + 250 * np.log(10) / fading))
        x = lfilter([B_bar[i]], [1, -A_bar[i]], blow[:n])
        K[(*i[:-1], slice(n))] += 2 * (C[i] * x).real
    return K


def noise(*shape, seed=0):
    """A random input, the same each time, in the precision that JAX has just now."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def error(a, b):
    """Largest difference as a share of the largest value of b; NaN is infinite."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    if (a == b).all():
        return 0.0  # where both are zeros, too
    e = np.abs(a - b).max() / np.abs(b).max()
    return e if np.isfinite(e) else np.inf


def tolerance(x64, L, method="zoh"):
    """The numbers that must hold."""
    if x64:
        return 1e-10
    return 5e-5 if method == "bilinear" else 2e-5 if L >= 65536 else 1e-5
