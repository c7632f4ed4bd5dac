"""Part 14: S5 and the selective step, against NumPy and SciPy in float64."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import error, noise
from scipy.linalg import block_diag, expm
from scipy.special import erf

import annotated_s4d as s4d

H, N, L = 3, 8, 12
NAMES = ("s5", "selective")
names = pytest.mark.parametrize("name", NAMES)
RECORD = Path(s4d.__file__).parent / "assets" / "selective.json"


def make(name, seed=0, **options):
    return s4d.LAYERS[name](H, N, rngs=nnx.Rngs(seed), **options)


def plain(p):
    return np.float64(p[...])


def limit(x64):
    return 1e-10 if x64 else 1e-5


# -- independent answers --------------------------------------------------------------


def dense_s5(layer, u):
    """States (L, N/2) and outputs (L, H): the matrix exponential of the dense real
    system, the input held inside it."""
    A = -np.exp(plain(layer.log_A_real)) + 1j * plain(layer.A_imag)
    B, C = (plain(p) @ [1, 1j] for p in (layer.B, layer.C))
    dt = np.exp(plain(layer.log_dt))
    M = block_diag(*([[a.real, -a.imag], [a.imag, a.real]] for a in dt * A))
    enters = np.stack([(dt[:, None] * B).real, (dt[:, None] * B).imag], 1)
    whole = np.zeros((N + H, N + H))  # the state, and the input that is held
    whole[:N, :N], whole[:N, N:] = M, enters.reshape(N, H)
    step, x, states = expm(whole), np.zeros(N), []
    for u_k in np.float64(u):
        x = (step @ np.concatenate([x, u_k]))[:N]
        states.append(x[::2] + 1j * x[1::2])
    states = np.array(states)
    return states, 2 * (states @ C.T).real


def looped_selective(layer, u):
    """States (L, H, N) and outputs (L, H), number by number."""
    A = -np.exp(plain(layer.log_A_real))
    weights = (plain(m.kernel) for m in (layer.to_dt, layer.to_B, layer.to_C))
    to_dt, to_B, to_C = weights
    x, states, y = np.zeros((H, N)), [], []
    for u_k in np.float64(u):
        dt = np.log1p(np.exp(u_k @ to_dt + plain(layer.log_dt)))
        B, C = u_k @ to_B + plain(layer.to_B.bias), u_k @ to_C + plain(layer.to_C.bias)
        for h in range(H):
            for n in range(N):
                z = dt[h] * A[h, n]
                held = np.expm1(z) / A[h, n] * B[n] * u_k[h]
                x[h, n] = np.exp(z) * x[h, n] + held
        states.append(x.copy())
        y.append(x @ C)
    return np.array(states), np.array(y)


def oracle(layer, u):
    """States and the layer's outputs for one row u (L, H)."""
    kind = dense_s5 if type(layer) is s4d.S5 else looped_selective
    states, y = kind(layer, u)
    y = y + plain(layer.D) * np.float64(u)
    y = y * 0.5 * (1 + erf(y / 2**0.5))
    y = y @ plain(layer.mixer.linear.kernel) + plain(layer.mixer.linear.bias)
    first, second = np.split(y, 2, -1)
    return states, first / (1 + np.exp(-second))


@functools.cache
def answers(name, x64):
    """What the contract's ways find for two rows of L and of 5 samples."""
    layer, u = make(name), noise(2, L, H)
    lengths = np.array([L, 5])
    u_nan = u.at[1, 5:].set(jnp.nan)
    rest = layer.init_state(2)
    return (
        layer,
        u,
        dict(
            called=s4d.call(layer, u),
            stepped=s4d.run_steps(layer, u),
            every=s4d.advance(layer, rest, u_nan, lengths, every=True),
            chunk=s4d.advance(layer, rest, u_nan, lengths),
        ),
    )


@names
def test_one_contract(name, x64):
    """Call, steps, a chunk and every state, against the oracle, in both precisions;
    a row of 5 filled up with NaN, and on from the state in the middle."""
    layer, u, found = answers(name, x64)
    states, y = map(np.stack, zip(*(oracle(layer, row) for row in u)))
    close = limit(x64)
    assert found["called"].dtype == (jnp.float64 if x64 else jnp.float32)
    assert error(found["called"], y) < close
    x, stepped = found["stepped"]
    assert error(stepped, y) < close and error(x, states[:, -1]) < close
    every, padded = found["every"]
    assert error(every[0], states[0]) < close and error(padded[0], y[0]) < close
    assert error(every[1, :5], states[1, :5]) < close
    assert (every[1, 5:] == every[1, 4]).all() and (padded[1, 5:] == 0).all()
    last, padded = found["chunk"]
    assert error(last[0], states[0, -1]) < close and error(last[1], every[1, 4]) < close
    assert error(padded[1, :5], y[1, :5]) < close
    on, rest = layer.advance(every[:, 4], u[:, 5:])
    assert error(on, states[:, -1]) < close and error(rest, y[:, 5:]) < close


@pytest.mark.parametrize("dt", [1e-4, 1e-1])
@names
def test_slow_and_fast_over_a_long_sequence(name, dt):
    """2,000 steps in float32, at both ends of the range of dt."""
    layer, u = make(name, dt_min=dt, dt_max=dt), noise(1, 2000, H)
    states, y = oracle(layer, u[0])
    x, found = s4d.advance(layer, layer.init_state(1), u)
    assert error(found[0], y) < 1e-5 and error(x[0], states[-1]) < 1e-5


@pytest.mark.parametrize(
    "init, method", [("legs", "bilinear"), ("real", "zoh"), ("rand", "zoh")]
)
def test_s5_is_s4d_side_by_side(init, method):
    """From several starts, by both rules: H systems of S4D as one of S5."""
    options = dict(init=init, discretization=method, final_act=None)
    many = s4d.S4D(H, 4, rngs=nnx.Rngs(1), **options)
    one = s4d.S5(H, 4 * H, rngs=nnx.Rngs(2), **options)
    one.log_dt[...] = jnp.repeat(many.log_dt[...], 2)
    for name in ("log_A_real", "A_imag"):
        getattr(one, name)[...] = getattr(many, name)[...].ravel()
    parts = [[block_diag(*p[:, None]) for p in np.moveaxis(np.asarray(v), -1, 0)]
             for v in (many.B[...], many.C[...])]  # fmt: skip
    one.B[...] = jnp.stack(parts[0], -1).swapaxes(0, 1)
    one.C[...] = jnp.stack(parts[1], -1)
    one.D[...] = many.D[...]
    u = noise(1, 20, H)
    assert error(s4d.call(one, u), s4d.call(many, u)) < 1e-5


def test_the_gate_is_a_sigmoid():
    """Theorem 1 of the Mamba paper: A = -1, B = 1 make a gated unit."""
    s, u = noise(1, 30, 1), noise(1, 30, 1, seed=1)
    one = jnp.ones((1, 30, 1))
    dt, rest = jax.nn.softplus(s), jnp.zeros((1, 1, 1))
    _, y = s4d.selective_every(-one[:1, 0], one, one, dt, rest, u)
    x, states = 0.0, []
    for s_k, u_k in zip(np.float64(s).ravel(), np.float64(u).ravel()):
        gate = 1 / (1 + np.exp(-s_k))
        x = (1 - gate) * x + gate * u_k
        states.append(x)
    assert error(y.ravel(), states) < 1e-6


def test_no_time_passes_where_dt_is_zero():
    A, B = -jnp.ones((2, 3)), jnp.ones((1, 4, 3))
    x, still = noise(1, 2, 3), jnp.zeros((1, 4, 2))
    states, _ = s4d.selective_every(A, B, B, still, x, noise(1, 4, 2))
    assert (states == x[:, None]).all()


@names
def test_every_parameter_learns(name):
    grads = nnx.grad(lambda layer: (s4d.call(layer, noise(1, L, H)) ** 2).sum())
    for path, grad in nnx.to_flat_state(grads(make(name))):
        assert (grad[...] != 0).any(), path


@names
def test_in_a_backbone_and_an_optimizer(name):
    """`build` takes it; its memory gets the lower rate, its maps the other."""
    model = s4d.build(2, H, N, 1, kernel=name, rngs=nnx.Rngs(0))
    assert type(model.stack.blocks[0].ssm) is s4d.LAYERS[name]
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert s4d.param_count(2, H, N, 1, kernel=name) == sum(p.size for p in leaves)
    labels = s4d.parameter_labels(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    ssm = labels["stack"]["blocks"][0]["ssm"]
    slow = {key for key, label in ssm.items() if label == "ssm"}
    both = {"log_dt", "log_A_real"}
    assert slow == (both | {"A_imag", "B"} if name == "s5" else both)


def test_dt_at_rest_is_drawn_from_its_range():
    layer = s4d.Selective(500, 2, dt_min=0.01, dt_max=0.1, rngs=nnx.Rngs(0))
    *_, dt = layer.system(jnp.zeros((1, 1, 500)))
    assert 0.01 - 1e-6 < dt.min() < 0.011 and 0.095 < dt.max() < 0.1 + 1e-6
    assert abs(jnp.log(dt).mean() - np.log(0.1**1.5)) < 0.1


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("selective", dict(init="legs"), "init is 'legs'; allowed: 'real', as dt"),
        (
            "selective",
            dict(discretization="bilinear"),
            "'bilinear'; allowed: 'zoh', as",
        ),
        ("selective", dict(dt_min=0.0), "dt_min is 0.0"),
        ("s5", dict(init="LegS"), "init is 'LegS'; allowed: 'legs', "),
        ("s5", dict(discretization="euler"), "discretization is 'euler'; allowed: "),
        ("s5", dict(dt_max=1e-5), "0 < dt_min <= dt_max, 1e-05"),
        ("s5", dict(dropout=1.0), "dropout is 1.0; allowed: 0 <= dropout < 1"),
        ("s5", dict(final_act="silu"), "final_act is 'silu'; allowed: 'glu', "),
    ],
)
def test_a_refusal_says_what_is_allowed(name, options, says):
    with pytest.raises(ValueError, match=says):
        make(name, **options)


@names
def test_refused_sizes_states_and_options(name):
    with pytest.raises(TypeError, match="l_max"):
        make(name, l_max=4)
    with pytest.raises(ValueError, match="d_model is 0; allowed: positive"):
        s4d.LAYERS[name](0, N, rngs=nnx.Rngs(0))
    layer, u = make(name), noise(2, L, H)
    with pytest.raises(ValueError, match=r"x has shape \(3, .*allowed: \(2, "):
        layer.advance(layer.init_state(3), u)
    with pytest.raises(ValueError, match=r"u has shape \(2, 12, 2\), .* 3\), real"):
        layer(u[..., :2])
    with pytest.raises(ValueError, match="lengths is .*allowed: 0 to 12"):
        layer(u, np.array([1, 13]))


def test_odd_states_are_for_the_selective_layer_alone():
    assert s4d.Selective(2, 3, rngs=nnx.Rngs(0)).init_state(1).shape == (1, 2, 3)
    with pytest.raises(
        ValueError, match="d_state is 3; allowed: positive multiples of 2"
    ):
        s4d.S5(2, 3, rngs=nnx.Rngs(0))


def test_a_selective_layer_has_no_kernel():
    with pytest.raises(ValueError, match="kernel; allowed: call, step and advance, as"):
        make("selective").kernel(10)
    assert not hasattr(make("s5"), "kernel")


# -- sample and hold ------------------------------------------------------------------


def test_sample_and_hold_is_what_it_says():
    u, held = s4d.sample_and_hold(np.random.default_rng(0), 20, 300)
    for (value, mark), answers in zip(u.swapaxes(1, 2), held[..., 0]):
        last = 0.0
        for v, m, answer in zip(value, mark, answers):
            last = v if m else last
            assert answer == last
    assert set(np.unique(u[..., 1])) == {0, 1} and abs(u[..., 1].mean() - 0.04) < 0.01


def test_the_record_is_what_the_page_says():
    """Means and spreads are those of the runs; the prose has their numbers."""
    record = json.loads(RECORD.read_text())
    assert record["command"] == "python tests/measure/selective.py"
    assert (record["steps"], record["seeds"]) == (1500, [0, 1, 2])
    text = " ".join(Path(s4d.__file__).read_text().replace("\n# ", " ").split())
    for name, found in record["models"].items():
        assert [run["seed"] for run in found["runs"]] == [0, 1, 2]
        for length in (128, 1024):
            shares = [run[f"left at {length}"] for run in found["runs"]]
            kept = found[f"left at {length}"]
            assert kept["mean"] == pytest.approx(np.mean(shares))
            assert kept["spread"] == pytest.approx(np.std(shares, ddof=1))
            digits = 2 if name.startswith("selective") else 0
            assert f"{kept['mean']:.{digits}%}" in text, (name, length)
    for run in record["models"]["selective, one layer"]["runs"]:
        u, held = s4d.sample_and_hold(np.random.default_rng(8), 1)
        row = run["example"]
        assert np.allclose(row["value"], u[0, :, 0], atol=1e-3)
        assert np.allclose(row["answer"], held[0, :, 0], atol=1e-3)
        assert row["marks"] == np.flatnonzero(u[0, :, 1]).tolist()
        mark, dt = u[0, :, 1] == 1, np.array(row["dt"])
        assert (np.median(dt[:, mark], 1) > 10 * np.median(dt[:, ~mark], 1)).all()
