"""Part 12: a stream read step by step, and sequences sampled from a model."""

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx

import annotated_s4d as s4d

ROOT = Path(__file__).resolve().parent.parent
V = 5  # levels of the tiny models here; one shape, 3 rows of 4, compiles once


@functools.cache
def made(x64, **options):
    """The model, made by compiled code, which is seconds faster."""
    sizes = dict(d_model=8, d_state=8, n_layers=2, pooling="none")
    make = nnx.jit(lambda: s4d.S4DModel(V + 1, V, **sizes, **options, rngs=nnx.Rngs(0)))
    model = make()
    model.eval()
    return model


def tiny(**options):
    """An untrained model of V levels."""
    return nnx.clone(made(jax.config.jax_enable_x64, **options))


def some_levels(batch, L, seed=0):
    return np.random.default_rng(seed).integers(0, V, (batch, L))


def one_hot(levels):
    """The start sign, then levels (batch, L), by NumPy: (batch, L + 1, V + 1)."""
    rows = np.pad(levels, ((0, 0), (1, 0)), constant_values=V)
    return np.eye(V + 1)[rows]


def scores_after(model, levels, L=None):
    """Scores of the level after each row, from one call on the whole row. (batch, V)

    With L, rows are filled up to L levels of no meaning, so that calls have one shape.
    """
    n = levels.shape[1]
    u = one_hot(np.pad(levels, ((0, 0), (0, (L or n) - n)), constant_values=1))
    return np.asarray(s4d.call(model, jnp.asarray(u, float)))[:, n].astype(float)


# -- likelihood -----------------------------------------------------------------------


@pytest.mark.parametrize("L", [0, 4])
def test_convolution_gives_the_samplers_likelihood(x64, L):
    model, prefix = tiny(), some_levels(3, L)
    levels, log_p = s4d.generate(model, prefix, 10, jax.random.key(1))
    assert levels.shape == (3, L + 10) and log_p.shape == (3, 10)
    assert log_p.dtype == (jnp.float64 if x64 else jnp.float32)
    convolved = s4d.log_likelihood(model, levels)
    error = np.abs(log_p.sum(1) - convolved[:, L:].sum(1)).max()
    assert error < (1e-9 if x64 else 1e-4)
    # and SciPy's softmax of a call on rows made by NumPy
    scores = np.asarray(s4d.call(model, jnp.asarray(one_hot(np.asarray(levels)))))
    wanted = scipy.special.log_softmax(scores[:, :-1].astype(float), -1)
    wanted = np.take_along_axis(wanted, np.asarray(levels)[..., None], -1)[..., 0]
    np.testing.assert_allclose(convolved, wanted, atol=1e-9 if x64 else 1e-5)


def test_likelihoods_of_all_sequences_sum_to_one(x64):
    every = np.stack(np.meshgrid(*[np.arange(V)] * 3), -1).reshape(-1, 3)
    total = np.exp(np.asarray(s4d.log_likelihood(tiny(), every), float).sum(1)).sum()
    assert total == pytest.approx(1, abs=1e-12 if x64 else 1e-5)


def test_a_level_does_not_see_itself():
    """Its probability depends on the levels before it alone."""
    model, levels = tiny(), some_levels(1, 20)
    other = levels.copy()
    other[0, 12] = (levels[0, 12] + 1) % V
    a, b = (np.asarray(s4d.log_likelihood(model, v))[0] for v in (levels, other))
    np.testing.assert_allclose(a[:12], b[:12], atol=1e-6)
    assert (np.abs(a - b)[12:] > 1e-4).all()
    scores = scores_after(model, levels[:, :12])
    p = scipy.special.softmax(scores)[0]
    np.testing.assert_allclose(
        np.exp([a[12], b[12]]), p[[levels[0, 12], other[0, 12]]], rtol=1e-4
    )


# -- sampling -------------------------------------------------------------------------


def test_prefix_is_kept_and_samples_are_levels():
    model = tiny()
    for dtype in (np.int64, np.uint8):
        prefix = some_levels(3, 4).astype(dtype)
        levels, log_p = s4d.generate(model, prefix, 10, jax.random.key(0))
        assert (levels[:, :4] == prefix).all()
        assert 0 <= levels.min() and levels.max() < V and (log_p <= 0).all()
        assert len(np.unique(levels[:, 4:])) > 1


def test_same_key_same_sample():
    model, prefix = tiny(), np.repeat(some_levels(1, 4), 3, 0)
    first, log_p = s4d.generate(model, prefix, 10, jax.random.key(7))
    again, log_q = s4d.generate(model, prefix, 10, jax.random.key(7))
    assert (first == again).all() and (log_p == log_q).all()
    other, _ = s4d.generate(model, prefix, 10, jax.random.key(8))
    assert (first != other).any()
    short, _ = s4d.generate(model, prefix, 6, jax.random.key(7))
    assert (short == first[:, :10]).all()
    assert len(np.unique(first, axis=0)) == 3  # one key, yet rows of their own


def test_dropout_is_off():
    model, prefix = tiny(dropout=0.5), some_levels(3, 4)
    wanted, log_p = s4d.generate(model, prefix, 10, jax.random.key(0))
    model.train()
    got, log_q = s4d.generate(model, prefix, 10, jax.random.key(0))
    assert (wanted == got).all() and (log_p == log_q).all()
    assert not model.stack.blocks[0].dropout.deterministic  # the model is as it was


def test_temperature_zero_is_the_likeliest(x64):
    """Against calls of the model on prefixes that grow, without a state."""
    model, prefix = tiny(), some_levels(3, 4)
    levels, log_p = s4d.generate(model, prefix, 10, jax.random.key(0), temperature=0)
    rows = prefix
    for k in range(10):
        scores = scores_after(model, rows, L=14)
        if k == 7:  # what stands after the prefix had no effect
            alone = scores_after(model, rows)
            np.testing.assert_allclose(scores, alone, atol=1e-12 if x64 else 1e-5)
        rows = np.concatenate([rows, scores.argmax(-1)[:, None]], 1)
    assert (levels == rows).all() and (log_p == 0).all()
    close, _ = s4d.generate(model, prefix, 10, jax.random.key(0), temperature=1e-6)
    assert (close == rows).all()
    for top_p in (1e-9, 1e-39, 5e-324):  # the last two are 0 in float32
        narrow, log_p = s4d.generate(model, prefix, 10, jax.random.key(0), top_p=top_p)
        assert (narrow == rows).all() and (log_p == 0).all()


def test_log_probabilities_are_those_drawn_from():
    """With a temperature and a nucleus, step by step, by NumPy."""
    model, prefix, T, top_p = tiny(), some_levels(3, 4), 1.7, 0.8
    key = jax.random.key(3)
    levels, log_p = s4d.generate(model, prefix, 10, key, T, top_p)
    for k in range(10):
        scores = scores_after(model, np.asarray(levels)[:, : 4 + k], L=14)
        for row in range(3):
            p = nucleus(scores[row] / T, top_p)
            wanted = math.log(p[levels[row, 4 + k]])
            assert log_p[row, k] == pytest.approx(wanted, abs=1e-4)


# -- temperature and nucleus ----------------------------------------------------------


def nucleus(scores, top_p):
    """The probabilities of the smallest set that reaches top_p, by a loop."""
    p, kept, total = scipy.special.softmax(scores), [], 0.0
    for level in np.argsort(-p, kind="stable"):
        kept.append(level)
        total += p[level]
        if total >= top_p < 1:  # the sum of all may be rounded to 1 too early
            break
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("T", [0.3, 1.0, 2.5])
def test_nucleus_by_numpy(x64, T, top_p):
    scores = 2 * np.random.default_rng(0).standard_normal((50, 17))
    scores = np.asarray(jnp.asarray(scores), float)  # as the model has them
    got = np.exp(s4d.tempered(jnp.asarray(scores, float), T, top_p))
    wanted = np.stack([nucleus(row / T, top_p) for row in scores])
    assert ((got > 0) == (wanted > 0)).all()
    np.testing.assert_allclose(got, wanted, atol=1e-12 if x64 else 1e-6)


def test_nothing_is_cut_off_at_one():
    """Levels whose probability is lost in the rounding of a sum stay possible."""
    scores = jnp.array([0.0, -1.0, -20.0, -25.0, -60.0])
    log_p = s4d.tempered(scores, 1.0, 1.0)
    np.testing.assert_allclose(log_p, jax.nn.log_softmax(scores), rtol=1e-6)


@pytest.mark.parametrize("T", [0.0, 1e-50, 1e-38, 1e-30, 1e-3, 1e30])
def test_no_temperature_is_too_low_or_too_high(x64, T):
    scores = jnp.array([[1.0, 3.0, 2.0], [-500.0, 0.0, 500.0], [2.0, 2.0, 1.0]])
    p = np.exp(s4d.tempered(scores, T, 1.0))
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    if T < 1e-2:
        assert (p[:2].argmax(-1) == [1, 2]).all() and (p[:2].max(-1) == 1).all()
    if T == 0:
        assert (p[2] == [1, 0, 0]).all()  # a tie: the first
    if T > 1:
        np.testing.assert_allclose(p, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("T, top_p", [(1.0, 1.0), (2.0, 0.9)])
def test_frequencies_of_many_samples(T, top_p):
    """Chi-square of 20,000 draws of one step against probabilities by NumPy."""
    n, model, row = 20_000, tiny(), some_levels(1, 6)
    wanted = nucleus(scores_after(model, row)[0] / T, top_p)
    levels, _ = s4d.generate(
        model, np.repeat(row, n, 0), 1, jax.random.key(0), T, top_p
    )
    counts = np.bincount(np.asarray(levels)[:, -1], minlength=V)
    assert (counts[wanted == 0] == 0).all()
    there = wanted > 0
    assert there.sum() > 2
    assert scipy.stats.chisquare(counts[there], n * wanted[there]).pvalue > 0.01
    wrong = np.roll(wanted[there], 1)  # the test can fail
    assert scipy.stats.chisquare(counts[there], n * wrong).pvalue < 1e-6


def test_two_steps_have_their_joint_distribution():
    """The second level is drawn given the first, with a chance of its own."""
    n, model = 20_000, tiny()
    levels, _ = s4d.generate(model, np.zeros((n, 0), int), 2, jax.random.key(0))
    pairs = np.stack(np.meshgrid(range(V), range(V), indexing="ij"), -1).reshape(-1, 2)
    p = np.exp(np.asarray(s4d.log_likelihood(model, pairs), float).sum(1))
    counts = np.bincount(np.asarray(levels) @ [V, 1], minlength=V * V)
    assert scipy.stats.chisquare(counts, n * p / p.sum()).pvalue > 0.01


def test_knobs_compile_nothing():
    traced, step = [], s4d.S4DModel.step

    class Counting(s4d.S4DModel):
        def step(self, x, u):
            traced.append(1)
            return step(self, x, u)

    model = Counting(V + 1, V, 8, 8, 1, pooling="none", rngs=nnx.Rngs(0))
    prefix = some_levels(2, 3)
    s4d.generate(model, prefix, 4, jax.random.key(0))
    first = len(traced)
    for T, top_p in ((0, 1), (0.5, 0.3), (np.float32(2), 1.0)):
        s4d.generate(model, prefix, 4, jax.random.key(1), T, top_p)
    assert len(traced) == first > 0


# -- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"temperature": -0.1}, "temperature is -0.1; allowed: 0 <= temperature"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0; allowed: 0 < top_p <= 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"steps": 0}, "steps is 0; allowed: positive"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"prefix": np.zeros(4, int)}, r"shape \(4,\); allowed: integers of shape"),
        ({"prefix": np.zeros((2, 4, 1), int)}, r"shape \(2, 4, 1\)"),
        ({"prefix": np.zeros((0, 4), int)}, r"shape \(0, 4\)"),
        ({"prefix": np.zeros((2, 4))}, "prefix is float64"),
        (
            {"prefix": np.full((2, 4), V)},
            "prefix holds .5 5 5.; allowed: levels 0 to 4",
        ),
        ({"prefix": np.full((2, 4), -1)}, "prefix holds .-1"),
    ],
)
def test_refused(change, complaint):
    given = dict(prefix=some_levels(2, 4), steps=3, key=jax.random.key(0)) | change
    with pytest.raises(ValueError, match=complaint):
        s4d.generate(tiny(), **given)


def test_a_model_without_start_sign_is_refused():
    model = s4d.S4DModel(V, V, 8, 8, 1, pooling="none", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="5 inputs and 5 outputs; allowed: one input"):
        s4d.generate(model, some_levels(1, 2), 1, jax.random.key(0))


# -- the digits -----------------------------------------------------------------------


def test_grey_levels_are_those_of_the_images():
    (images, _), _, _ = s4d.load_digits()
    levels = s4d.grey_levels(images)
    assert levels.shape == (1257, 64) and (levels.min(), levels.max()) == (0, 16)
    assert (levels / np.float32(8) - 1 == images[..., 0]).all()
    u, said = s4d.next_pixel((images[:5], None))
    assert (
        u.shape == (5, 64, 18) and (u.sum(-1) == 1).all() and (said == levels[:5]).all()
    )
    assert (u[:, 0].argmax(-1) == 17).all()
    assert (u[:, 1:].argmax(-1) == levels[:5, :-1]).all()


def test_neighbours():
    v = np.arange(64)[None] % 16
    image = v.reshape(8, 8)
    above, left = s4d.neighbour(v, 1, 0), s4d.neighbour(v, 0, 1)
    assert (above.reshape(8, 8)[1:] == image[:-1]).all() and (above[0, :8] == 17).all()
    assert (left.reshape(8, 8)[:, 1:] == image[:, :-1]).all()
    assert (left.reshape(8, 8)[:, 0] == 17).all()


@pytest.mark.parametrize("name", list(s4d.CONTEXTS))
def test_histograms_by_counting(name):
    """Bits of each table against a dictionary of counts."""
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 17, (30, 64)), rng.integers(0, 17, (4, 64))

    def context(row, k):
        i, j = divmod(k, 8)
        above = row[k - 8] if i else None
        left = row[k - 1] if j else None
        return {
            "nothing": 0,
            "its place": k,
            "the pixel to the left": left,
            "the pixel above": above,
            "its place and the pixel above": (k, above),
            "the pixels above and to the left": (above, left),
        }[name]

    counts = {}
    for row in train:
        for k in range(64):
            counts.setdefault(context(row, k), []).append(row[k])
    bits = s4d.histogram_bits(s4d.CONTEXTS[name], train, test)
    for row, ours in zip(test, bits):
        for k in range(64):
            seen = counts.get(context(row, k), [])
            p = (1 + seen.count(row[k])) / (17 + len(seen))
            assert ours[k] == pytest.approx(-math.log2(p))


def test_recorded_generator_gives_the_printed_bits():
    """The parameters in assets load, and give the numbers that the notebook printed."""
    saved = ROOT / "assets" / "generator.npz"
    if not saved.exists():
        pytest.skip("not recorded yet: python notebooks/render/build.py")
    assert saved.stat().st_size < 500_000
    model, history, (u, levels) = s4d.trained_generator()
    loss, _ = s4d.evaluate(model, (u, levels))
    bits = {name: b.mean() for name, b in s4d.all_bits().items()}
    ours = bits.pop("all pixels before: S4D")
    assert ours == pytest.approx(loss / math.log(2), abs=1e-4)
    assert ours < min(bits.values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    size = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    for number in (f"{size:,}", f"{ours:.2f} bits", f"needs {min(bits.values()):.2f}."):
        assert number in readme, number
    notebook = (ROOT / "notebooks" / "annotated_s4d.ipynb").read_text(encoding="utf-8")
    if "all pixels before: S4D" not in notebook:
        pytest.skip(
            "the notebook is of an older edition: python notebooks/render/build.py"
        )
    printed = re.search(r"all pixels before: S4D +([\d.]+) bits", notebook)[1]
    assert f"{ours:.3f}" == printed


def test_stepping_reads_what_the_picture_shows():
    """The beliefs of Part 12, from advance, are those of the steps."""
    model, _, (images, _) = s4d.trained()
    _, stepped = s4d.run_steps(model, images[1:2])
    wanted = scipy.special.softmax(np.asarray(stepped[0], float), -1)
    np.testing.assert_allclose(s4d.beliefs(1), wanted, atol=1e-5)


def test_a_model_read_from_its_file_can_go_on_learning():
    model, _, (images, labels) = s4d.trained()
    model = nnx.clone(model)
    model.train()
    one, other = s4d.call(model, images[:4]), s4d.call(model, images[:4])
    assert jnp.abs(one - other).max() > 1e-3  # dropout draws anew
    optimizer = s4d.make_optimizer(model, 100)
    assert np.isfinite(s4d.train_step(model, optimizer, images[:8], labels[:8]))
