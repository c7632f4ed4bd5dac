"""Weights from elsewhere: the minimal PyTorch S4D of state-spaces/s4."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import error

import annotated_s4d as s4d

H, HALF, L = 3, 4, 20
SHAPES = {
    "D": (H,),
    "kernel.C": (H, HALF, 2),
    "kernel.log_dt": (H,),
    "kernel.log_A_real": (H, HALF),
    "kernel.A_imag": (H, HALF),
    "output_linear.0.weight": (2 * H, H, 1),
    "output_linear.0.bias": (2 * H,),
}


def random_weights(seed=0):
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    weights["kernel.log_dt"] = rng.uniform(math.log(1e-3), math.log(0.1), H)
    weights["kernel.A_imag"] *= 20
    return weights


def make(**options):
    layer = s4d.S4D(H, 2 * HALF, rngs=nnx.Rngs(0), **options)
    layer.eval()
    return layer


def by_the_formulas(w, u):
    """Their layer in float64, one number at a time: u and y (H, L)."""
    z = [[0.0] * L for _ in range(H)]
    for h in range(H):
        dt, K = math.exp(w["kernel.log_dt"][h]), [0.0] * L
        for n in range(HALF):
            A = complex(
                -math.exp(w["kernel.log_A_real"][h, n]), w["kernel.A_imag"][h, n]
            )
            C = complex(*w["kernel.C"][h, n])
            weight = C * complex(np.expm1(dt * A)) / A
            for l in range(L):
                K[l] += 2 * (weight * np.exp(l * dt * A)).real
        for l in range(L):
            y = sum(K[j] * u[h, l - j] for j in range(l + 1)) + w["D"][h] * u[h, l]
            z[h][l] = y * 0.5 * (1 + math.erf(y / math.sqrt(2)))
    y = np.zeros((H, L))
    W, b = w["output_linear.0.weight"], w["output_linear.0.bias"]
    for l in range(L):
        v = [sum(W[o, h, 0] * z[h][l] for h in range(H)) + b[o] for o in range(2 * H)]
        for h in range(H):
            y[h, l] = v[h] / (1 + math.exp(-v[H + h]))
    return y


def everything(layer):
    return [np.asarray(p) for p in jax.tree.leaves(nnx.state(layer, nnx.Param))]


@pytest.mark.parametrize("given", [np.float32, np.float64])
def test_same_outputs(x64, given):
    """Called, stepped and advanced, from a layer that was something else before."""
    layer, weights = make(init="inv", dropout=0.5), random_weights()
    weights = {name: w.astype(given) for name, w in weights.items()}
    u = np.random.default_rng(1).standard_normal((2, H, L))
    exact = np.stack([by_the_formulas(weights, row) for row in u])
    s4d.load_pytorch_s4d(layer, weights)
    tol, v = 1e-10 if x64 else 1e-5, jnp.asarray(u.swapaxes(1, 2))
    for y in (
        s4d.call(layer, v),
        s4d.run_steps(layer, v)[1],
        s4d.advance(layer, layer.init_state(2), v)[1],
    ):
        assert error(y.swapaxes(1, 2), exact) < tol
    real = jnp.float64 if x64 else jnp.float32
    params = jax.tree.leaves(nnx.state(layer, nnx.Param))
    assert all(p.dtype == real for p in params)


def test_the_article_states_their_formulas():
    weights, u = random_weights(), np.random.default_rng(1).standard_normal((2, H, L))
    exact = np.stack([by_the_formulas(weights, row) for row in u])
    assert error(s4d.pytorch_s4d(weights, u), exact) < 1e-12


def test_the_weights_are_copied():
    layer, weights = make(), random_weights()
    s4d.load_pytorch_s4d(layer, weights)
    before = everything(layer)
    for w in weights.values():
        w *= 0
    assert all((a == b).all() for a, b in zip(everything(layer), before))


def test_integers_are_numbers():
    weights = random_weights()
    weights["kernel.A_imag"] = np.arange(H * HALF).reshape(H, HALF)
    layer = make()
    s4d.load_pytorch_s4d(layer, weights)
    assert (layer.A_imag[...] == weights["kernel.A_imag"]).all()


def refused(layer, weights, message):
    before = everything(layer)
    with pytest.raises(ValueError, match=message):
        s4d.load_pytorch_s4d(layer, weights)
    assert all((a == b).all() for a, b in zip(everything(layer), before))


@pytest.mark.parametrize("name", SHAPES)
def test_a_bad_array_is_refused(name):
    """Missing, of another shape, not finite (given, or once cast), not real."""
    layer, good = make(), random_weights()
    escaped, shape = name.replace(".", r"\."), SHAPES[name]
    refused(layer, {k: v for k, v in good.items() if k != name}, f"missing.*{escaped}")
    for other in (good[name][1:], good[name][None], good[name].ravel()[:1][0]):
        given, allowed = (
            repr(s).replace("(", r"\(").replace(")", r"\)")
            for s in (np.shape(other), shape)
        )
        message = f"{escaped} has shape {given}; allowed: shape {allowed}"
        refused(layer, good | {name: other}, message)
    for value in (np.nan, np.inf, -np.inf, 1e300):
        bad = good[name].copy()
        bad.flat[-1] = value
        refused(layer, good | {name: bad}, f"{escaped} holds NaN or infinity")
    refused(layer, good | {name: good[name] + 1j}, f"{escaped} is complex128")
    refused(layer, good | {name: np.full(shape, "a")}, f"{escaped} is <U1")


def test_unknown_names_are_refused():
    layer, good = make(), random_weights()
    for name in ("kernel.B", "norm.weight", "kernel.c", 3):
        refused(layer, good | {name: np.ones(H)}, f"unknown: {name}; allowed")
    refused(layer, {}, "missing or unknown: D, kernel.A_imag")
    renamed = {f"layers.0.{name}": w for name, w in good.items()}
    refused(layer, renamed, "layers.0.D")


@pytest.mark.parametrize(
    "options",
    [dict(discretization="bilinear")]
    + [dict(final_act=act) for act in ("gelu", "relu", "id", None)],
    ids=str,
)
def test_another_layer_is_refused(options):
    refused(make(**options), random_weights(), 'allowed: an S4D with "zoh" and final')


def test_what_is_no_layer_is_refused():
    refused(s4d.S4DBlock(H, 2 * HALF, rngs=nnx.Rngs(0)), random_weights(), "an S4D")
    for layer in (make().mixer, None):
        with pytest.raises(ValueError, match="allowed: an S4D"):
            s4d.load_pytorch_s4d(layer, random_weights())


@pytest.mark.parametrize("size", [(H + 1, 2 * HALF), (H, 2 * HALF + 2)])
def test_another_size_is_refused(size):
    refused(s4d.S4D(*size, rngs=nnx.Rngs(0)), random_weights(), "has shape")
