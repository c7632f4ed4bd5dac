"""Appendix A: options of GeneralS4D together, and gradients, in each view."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from general_oracle import parameters
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import error
from test_general import check, make, noise, scanned, scramble, streams, turned, views


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


@st.composite
def layers(draw):
    """H, N and options that are allowed together."""

    def pick(*values):
        return draw(st.sampled_from(values))

    H, N, real = pick(4, 2, 6), pick(4, 2, 8), pick(False, False, True)
    bottleneck = pick(None, *divisors(H))
    h, act = H // (bottleneck or 1), pick("glu", "gelu", "relu", "id", None)
    options = dict(
        final_act=act,
        discretization=pick("zoh", "bilinear"),
        n_ssm=pick(None, *divisors(h)),
        dt_tie=pick(True, False),
        dt_transform=pick("exp", "softplus"),
        real_transform=pick("exp", "none", "relu", "softplus", "sigmoid"),
        imag_transform=pick("none", "exp", "relu", "softplus"),
        deterministic=pick(False, True),
        dt_fast=pick(False, True),
        bandlimit=pick(None, 0.05),
        dropout=pick(0.0, 0.5),
        tie_dropout=pick(False, True),
        rate=pick(1.0, 0.5, 1.7),
    )
    if real:
        options |= dict(is_real=True, init="real", imag_transform="none")
        options["real_transform"] = pick("exp", "none", "relu", "softplus")
        options["bandlimit"] = None
    else:
        options["B_init"] = pick("constant", "legs")
    if act:
        options |= dict(channels=pick(2, 1, 3), bottleneck=bottleneck)
        options |= dict(gate=pick(None, 1, 2))
    else:
        options["n_ssm"] = pick(None, *divisors(H))
    options |= pick({}, dict(transposed=True))
    options |= pick({}, {}, {}, dict(bidirectional=True), dict(l_max=4))
    return H, N, options


@settings(max_examples=6, derandomize=True, deadline=None, phases=[Phase.generate])
@given(
    layer=layers(),
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=2).map(tuple),
    shares=st.lists(st.sampled_from([1, 0.6, 0.3, 0]), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    x64=st.booleans(),
)
def test_options_together(layer, cuts, shares, seed, x64):
    """Any valid combination, any parameters, chunks, lengths and first state."""
    H, N, options = layer
    with jax.enable_x64(x64):
        layer, L = make(H, N, **options), sum(cuts)
        scramble(layer, seed)
        u = noise(len(shares), L, H, seed=seed + 2)
        lengths = [round(share * L) for share in shares]
        run = functools.partial(views, options=options, cuts=cuts, stepped=scanned)
        check(nnx.jit(run), layer, options, u, lengths, x64, seed)


# -- gradients ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(channels=2, n_ssm=2, dt_tie=False, dt_transform="softplus", gate=2)
        | dict(dt_fast=True, bandlimit=1.0, B_init="legs")
        | dict(real_transform="softplus", imag_transform="softplus", bottleneck=2),
        dict(init="real", is_real=True, real_transform="none", transposed=True)
        | dict(rate=3.0, discretization="bilinear", final_act="id"),
        dict(bidirectional=True, real_transform="relu", imag_transform="relu", l_max=3),
    ],
    ids=lambda options: str(options)[:60],
)
def test_gradients(options):
    """Every number of every parameter learns, the same in each view."""
    with jax.enable_x64(True):
        H = 8 if "n_ssm" in options else 4
        layer, u, target = make(H, **options), noise(2, 6, H), noise(2, 6, H, seed=1)

        def called(layer):
            return turned(layer(turned(u, options)), options)

        def steps(layer):
            return scanned(layer, layer.init_state(2), u)[1]

        def advanced(layer):
            x, y = layer.step(layer.init_state(2), u[:, 0])
            _, rest = layer.advance(x, turned(u[:, 1:], options))
            return jnp.concatenate([y[:, None], turned(rest, options)], 1)

        @nnx.jit
        def gradients(layer):
            runs = (called, steps, advanced) if streams(options) else (called,)
            return [nnx.grad(lambda m, f=f: (f(m) * target).sum())(layer) for f in runs]

        first, *others = map(nnx.to_flat_state, gradients(layer))
        assert len(first) == len(parameters(layer))
        for path, g in first:
            assert jnp.isfinite(g[...]).all() and (g[...] != 0).all(), path
        for other in others:
            for (path, g), (_, same) in zip(first, other):
                assert error(same[...], g[...]) < 1e-8, path
