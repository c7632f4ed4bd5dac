"""Part 13: its experiments in miniature, its record, and what it says about both."""

import json
import math
import re
import sys
from pathlib import Path

import evidence as m
import exact
import jax
import jax.numpy as jnp
import mnist
import numpy as np
import pytest
import scipy.stats
from flax import nnx

import annotated_s4d as s4d

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "annotated_s4d.py").read_text(encoding="utf-8")
PART = TEXT[TEXT.index("# ## Part 13") : TEXT.index("# ## Closing")]
WORDS = " ".join(re.sub(r"^# ?", "", PART, flags=re.M).split())
PAGE = (ROOT / "assets" / "evidence.md").read_text(encoding="utf-8")
RECORD = json.loads((ROOT / "assets" / "evidence.json").read_text())


def values(experiment, group, variant, key="test"):
    return np.array([run[key] for run in RECORD[experiment][group][variant]])


def mean(*path, key="test"):
    return values(*path, key=key).mean()


def apart(one, other):
    """The rule of Part 13, by SciPy: the statistic of Welch's test is two or more."""
    with np.errstate(all="ignore"):
        return abs(scipy.stats.ttest_ind(one, other, equal_var=False).statistic) >= 2


# -- the experiments, tiny ------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """Small digits, a small model, ten steps."""
    rng = np.random.default_rng(0)
    part = rng.normal(size=(40, 16, 1)).astype(np.float32), np.arange(40) % 10
    monkeypatch.setattr(m, "load", lambda task, folder=None: [part] * 3)
    monkeypatch.setitem(m.SIZES, "digits", (4, 4, 1))
    schedule = dict(epochs=1, batch_size=4, lr=1e-2)
    monkeypatch.setitem(m.SCHEDULE, "digits", schedule)
    return part


def test_what_is_frozen_stays_and_the_rest_moves(tiny):
    frozen = m.ABLATIONS["A frozen"]["frozen"]
    model, result = m.train_variant("digits", None, 0, frozen)
    start = s4d.digit_model(0, 4, 4, 1, kernel="general")
    before, after = (
        dict(nnx.to_flat_state(nnx.state(v, nnx.Param))) for v in (start, model)
    )
    for path, p in before.items():
        same = bool((p[...] == after[path][...]).all())
        assert same == (path[-1] in frozen), path
    assert set(result) == {"seed", "validation", "test"}


def test_variants_are_what_they_are_called():
    layers = {
        name: s4d.GeneralS4D(
            4, 8, rngs=nnx.Rngs(0), **{k: v for k, v in o.items() if k != "frozen"}
        )
        for name, o in m.ABLATIONS.items()
    }
    assert layers["bilinear"].method == "bilinear"
    base = s4d.GeneralS4D(4, 8, rngs=nnx.Rngs(0)).system()
    for name in ("softplus", "relu", "none"):  # the same system, stored differently
        assert layers[name].real_transform == name
        for ours, theirs in zip(layers[name].system(), base):
            assert np.allclose(ours, theirs, rtol=1e-5)
    for name, factor in {"dt / 10": 0.1, "dt * 10": 10}.items():
        assert np.allclose(layers[name].system()[3], factor * base[3], rtol=1e-5)
    for options in m.ABLATIONS.values():
        assert set(options.get("frozen", ())) <= set(s4d.SSM_PARAMETERS)


def test_half_the_resolution_is_the_mean_of_four():
    u = np.random.default_rng(0).normal(size=(3, 784, 1))
    image, half = u[1, :, 0].reshape(28, 28), m.quartered(u)[1, :, 0].reshape(14, 14)
    assert half[5, 9] == pytest.approx(image[10:12, 18:20].mean())
    assert m.quartered(u).shape == (3, 196, 1)


def test_the_other_rate_is_that_of_a_layer_made_so(tiny):
    make = [
        s4d.S4DModel(1, 10, 4, 4, 2, kernel="general", rate=r, rngs=nnx.Rngs(0))
        for r in (1.0, 2.0)
    ]
    changed = m.set_rate(make[0], 2.0)
    u = tiny[0][:2]
    assert (s4d.call(changed, u) == s4d.call(make[1], u)).all()
    assert not np.allclose(s4d.call(changed, u), s4d.call(make[0], u))


def test_every_second_pixel_is_read_at_two_rates(tiny):
    model = s4d.digit_model(0, 4, 4, 1, kernel="general")
    result = m.every_second(model, tiny)
    for name, rate in {"rate 1": 1.0, "rate 2": 2.0}.items():
        view = nnx.view(m.set_rate(model, rate), deterministic=True)
        right = s4d.call(view, tiny[0][:, ::2]).argmax(-1) == tiny[1]
        assert result[name] == pytest.approx(float(right.mean()))


def test_fitted_is_the_formula_of_the_page_for_lin():
    """A bump of width 16 without its harmonics from 32 on, by Gauss's integral."""
    A = s4d.s4d_init("lin", 64)
    for L in (1024, 2048, 4096):
        formula = math.sqrt(math.erfc(16 * math.pi * 63 / L))
        assert m.fitted(A, 2 / L, L) == pytest.approx(formula, rel=0.05)
    assert m.fitted(A, 2 / 1024, 1024, None) == pytest.approx(
        s4d.delay_fit("lin")[2], rel=1e-6
    )


def test_white_noise_sees_the_error_of_the_kernel():
    rng, L = np.random.default_rng(0), 128
    K, noise = m.bump(L, 4) + rng.normal(size=L) * 0.01, rng.normal(size=100_000)
    out, target = (np.convolve(noise, k)[L:-L] for k in (K, m.bump(L, 4)))
    error = np.linalg.norm(out - target) / np.linalg.norm(target)
    kernel = np.linalg.norm(K - m.bump(L, 4)) / np.linalg.norm(m.bump(L, 4))
    assert error == pytest.approx(kernel, rel=0.02)


def test_training_a_delay_learns_and_reports_its_own_error():
    few, more = (m.train_delay("lin", 64, 0, N=8, steps=n) for n in (10, 60))
    assert set(few) == {
        "seed",
        "fitted",
        "in_double",
        "trained",
        "refitted",
    }
    assert more["trained"] < few["trained"]
    assert more["refitted"] <= more["trained"] * (1 + 1e-6)  # the best C there is
    assert few["in_double"] <= few["fitted"] * (1 + 1e-9)


@pytest.fixture(scope="module")
def kinds():
    return {kind: nnx.view(m.KINDS[kind](0), deterministic=True) for kind in m.KINDS}


def test_kinds_have_about_the_same_number_of_parameters(kinds):
    sizes = [m.size(model) for model in kinds.values()]
    assert max(sizes) < 1.05 * min(sizes)


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_a_baseline_steps_as_it_reads(kinds, kind):
    """The decoder is linear, so the mean of its answers is its answer to the mean."""
    model, u = kinds[kind], jax.random.normal(jax.random.key(0), (12, 2, 1))
    if kind == "gru":
        x, step = [jnp.zeros((2, 39))] * 2, lambda x, p: m.gru_step(model, x, p[0])
    else:
        x = [jnp.zeros((2, 2, 12, 4, 8))] * 2

        def step(x, p):
            return model.step(x, *p)

    _, scores = jax.jit(lambda: jax.lax.scan(step, x, (u, jnp.arange(12))))()
    whole = s4d.call(model, u.swapaxes(0, 1))
    assert np.abs(scores.mean(0) - whole).max() < 1e-5 * np.abs(whole).max() + 1e-6


def test_time_and_memory_are_taken():
    cost = m.train_cost("gru", 8, batch=2, repeats=1)
    assert cost["step"] > 0 and 50 < cost["before"] <= cost["peak"] < 1e5
    ((n, runs),) = m.steps(None, lengths=(8,), many=4)
    assert n == "8" and [name for name, _ in runs] == ["s4d", "gru", "transformer"]
    for _, run in runs:
        result = run(0)
        assert 0 < result["best"] <= result["median"]


# -- the record -----------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(m, "FILE", tmp_path / "evidence.json")
    return tmp_path / "evidence.json"


def test_a_measurement_goes_on_where_it_was(elsewhere, monkeypatch):
    calls = []

    def experiment(folder):
        def run(seed, name):
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append((name, seed))
            return dict(seed=seed, test=np.float32(1 / 3))

        names = ("a", "b")
        yield "group", [(name, lambda s, n=name: run(s, n)) for name in names]

    monkeypatch.setitem(m.EXPERIMENTS, "trial", experiment)
    with pytest.raises(KeyboardInterrupt):
        m.measure("trial", None)
    assert calls == [("a", 0), ("b", 0)]
    saved = json.loads(elsewhere.read_text())
    assert saved["trial"]["group"]["a"] == [dict(seed=0, test=0.333333)]
    calls.clear()
    m.measure("trial", None, seeds=(0, 1))
    assert calls == [("a", 1), ("b", 1)]
    assert [p.name for p in elsewhere.parent.iterdir()] == ["evidence.json"]


def test_the_rate_that_is_best_on_validation_is_kept(elsewhere, tiny, monkeypatch):
    monkeypatch.setattr(m, "RATES", {"gru": (1e-3, 1e-2)})
    monkeypatch.setattr(
        m, "train_kind", lambda *_, lr=None, **o: dict(lr=lr) | o | dict(seed=_[3:])
    )
    trials = {"gru 0.001": [0.5, 0.9], "gru 0.01": [0.6, 0.1]}  # validation, test
    for name, (validation, test) in trials.items():
        run = dict(seed=0, lr=float(name[4:]), validation=validation, test=test)
        m.add("baselines", "tried", name, run)
    _, (_, [(_, run)]) = m.baselines(None, "digits")
    assert run(0)["lr"] == 0.01 and run(1)["lr"] == 0.01


def test_an_unknown_experiment_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [m.__file__, "delays"])
    with pytest.raises(SystemExit) as ended:
        m.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "delays" in said
    assert "allowed" in said and "'delay'" in said


def test_the_record_says_where_it_comes_from_and_is_whole():
    for key in ("command", "date", "device", "settings"):
        assert RECORD[key], key
    assert set(RECORD["versions"]) == {"python", "jax", "flax"}
    assert RECORD["seeds"] == [0, 1, 2]
    for task, length in {"small": 196, "whole": 784}.items():
        assert RECORD["settings"][task]["images"] == [4000, 500, 1000]
        assert RECORD["settings"][task]["length"] == length
    for name in m.EXPERIMENTS:
        for group, variants in RECORD[name].items():
            for variant, runs in variants.items():
                seeds = [run["seed"] for run in runs]
                assert seeds == ([0] if group == "tried" else [0, 1, 2]), variant
                for run in runs:
                    assert all(math.isfinite(v) for v in run.values()), run
                    assert 0 <= run.get("test", 0) <= 1


def test_nothing_that_is_asked_is_missing():
    for name, groups in RECORD.items():
        if name in m.EXPERIMENTS:
            planned = dict(m.EXPERIMENTS[name](None))
            assert set(groups) == set(planned), name
            for group, runs in planned.items():
                assert set(groups[group]) == {variant for variant, _ in runs}
    for kind, rates in m.RATES.items():
        trials = [RECORD["baselines"]["tried"][f"{kind} {lr:g}"][0] for lr in rates]
        best = max(trials, key=lambda run: run["validation"])
        assert {r["lr"] for r in RECORD["baselines"]["small"][kind]} == {best["lr"]}


# -- what Part 13 says ----------------------------------------------------------------

STARTS = ("lin", "legs", "inv", "quad", "rand", "real")  # by what they remember


def test_the_rule_is_that_of_welch():
    rng = np.random.default_rng(0)
    verdicts = []
    for shift in np.linspace(0, 3, 40):
        one, other = rng.normal(size=3), rng.normal(size=3) + shift
        runs = ([dict(test=v) for v in group] for group in (one, other))
        verdicts.append(s4d.told_apart(*runs))
        assert verdicts[-1] == apart(one, other)
    assert set(verdicts) == {True, False}
    chance = 2 * scipy.stats.t.sf(2, 4)
    assert "of nine comparisons of equal things one" in WORDS
    assert 1 / chance == pytest.approx(9, abs=0.5)


def test_the_table_says_what_the_record_says():
    for experiment, task in s4d.QUESTIONS.values():
        lines = s4d.verdicts(experiment, task)
        assert len(lines) == len(RECORD[experiment][task])
        base = values("initializations", task, "legs")
        for line, name in zip(lines, RECORD[experiment][task]):
            ours = values(experiment, task, name)
            assert line.startswith(name)
            numbers = re.findall(r"[-+]?\d+\.\d(?=%)", line)
            expected = ours.mean(), ours.std(ddof=1), ours.mean() - base.mean()
            for number, right in zip(numbers, expected):
                assert float(number) == pytest.approx(100 * right, abs=0.0501)
            itself = experiment == "initializations" and name == "legs"
            assert ("noise" in line) == (not itself and not apart(ours, base))


@pytest.mark.parametrize("question", s4d.QUESTIONS)
def test_every_training_is_a_point(question):
    experiment, task = s4d.QUESTIONS[question]
    (ax,) = s4d.choices_measured(question).axes
    names = [label.get_text() for label in ax.get_xticklabels()]
    for place, (name, points, line) in enumerate(
        zip(names, ax.lines[::2], ax.lines[1::2])
    ):
        key = ("initializations", task, "legs")
        key = key if name == "base" else (experiment, task, name)
        assert np.allclose(points.get_ydata(), 100 * values(*key))
        assert np.allclose(line.get_ydata(), 100 * mean(*key))
        assert (points.get_xdata() == place).all()
    asked = RECORD[experiment][task]
    assert [name for name in names if name != "base"] == list(asked)


def test_the_delays_drawn_are_the_recorded_ones():
    axes = s4d.delay_against_length().axes
    assert sorted(ax.get_title() for ax in axes) == sorted(STARTS)
    for ax in axes:
        curves = {v.get_label(): v.get_xydata() for v in ax.lines}
        for key in ("fitted", "trained", "refitted"):
            expected = [
                mean("delay", L, ax.get_title(), key=key) for L in RECORD["delay"]
            ]
            assert np.allclose(curves[key][:, 0], [int(L) for L in RECORD["delay"]])
            assert np.allclose(curves[key][:, 1], expected)


def test_the_steps_drawn_are_the_recorded_ones():
    (ax,) = s4d.next_sample().axes
    for line in ax.lines:
        expected = [
            mean("steps", n, line.get_label(), key="best") for n in RECORD["steps"]
        ]
        assert np.allclose(line.get_ydata(), expected)
        assert np.allclose(line.get_xdata(), [int(n) for n in RECORD["steps"]])
    assert [line.get_label() for line in ax.lines] == list(m.KINDS)


def test_long_memory_is_as_the_words_say():
    error = {
        key: {
            L: {name: mean("delay", L, name, key=key) for name in STARTS}
            for L in RECORD["delay"]
        }
        for key in ("fitted", "trained", "refitted")
    }
    assert "is the same before as after: `lin`, `legs`, `inv`, `quad`, `rand`," in WORDS
    for L in ("1024", "2048", "4096"):
        before, after = error["fitted"][L], error["trained"][L]
        assert sorted(STARTS, key=before.get) == list(STARTS)
        assert sorted(STARTS, key=after.get) == list(STARTS)
        assert all(after[name] < before[name] for name in STARTS)
        formula = math.sqrt(math.erfc(16 * 63 * math.pi / int(L)))
        assert "to a percent" in WORDS
        assert before["lin"] == pytest.approx(formula, rel=0.01)
    assert min(error["trained"]["4096"].values()) > 0.4  # too few for every start
    assert "At 512 steps we were surprised" in WORDS
    before, after = error["fitted"]["512"], error["trained"]["512"]
    for name in ("lin", "legs", "inv"):
        assert before[name] < after[name]
    for name in ("real", "rand"):
        assert error["refitted"]["512"][name] < 0.95 * after[name]


def test_what_modes_can_do_is_as_the_words_say():
    """With 300 digits, against double precision; one start is tried again here."""
    record = json.loads((ROOT / "assets" / "exact.json").read_text())
    assert record["digits"] == 300 and "With 300 digits" in WORDS
    error = {
        (L, name, key): np.mean([run[key] for run in runs])
        for L, starts in record["delay"].items()
        for name, runs in starts.items()
        for key in ("exact", "in_double")
    }
    assert set(error) == {(L, n, k) for L in RECORD["delay"] for n in STARTS
                          for k in ("exact", "in_double")}  # fmt: skip
    for L in ("512", "1024"):
        assert error[L, "rand", "exact"] < error[L, "legs", "exact"]
        assert error[L, "rand", "in_double"] > 3 * error[L, "rand", "exact"]
    assert error["1024", "real", "exact"] > 0.4 and error["1024", "quad", "exact"] > 0.7
    for (L, name, key), found in error.items():  # no weights do better, and lin's do
        assert key == "exact" or found >= 0.999 * error[L, name, "exact"]
        assert name != "lin" or found == pytest.approx(error[L, name, "exact"], 1e-3)
    real = np.asarray(s4d.s4d_init("real", 64), complex)[:8]
    modes = np.exp(np.outer(np.arange(64), real * 2 / 64)).real
    rest = modes @ np.linalg.lstsq(modes, m.bump(64))[0] - m.bump(64)
    relative = np.linalg.norm(rest) / np.linalg.norm(m.bump(64))
    assert exact.best_error(real, 64) == pytest.approx(relative, rel=1e-6)


def test_weights_of_the_fit_in_double_are_enormous():
    for name in ("legs", "inv", "rand", "real"):
        A = np.asarray(s4d.s4d_init(name, 64, jax.random.key(0)), complex)
        modes = np.exp(np.outer(np.arange(1024) / 512, A))
        modes = np.concatenate([modes.real, -modes.imag], 1)
        weights = [np.linalg.lstsq(modes, m.bump(1024), c)[0] for c in (None, 1e-6)]
        assert np.abs(weights[0]).max() > 1e6 and np.abs(weights[1]).max() < 1e3


def test_starts_and_ablations_are_as_the_words_say():
    starts = {name: values("initializations", "digits", name) for name in m.INITS}
    good = ("legs", "inv", "lin")
    assert "`legs`, `inv` and `lin` are inside each other's noise" in WORDS
    assert not any(apart(starts[a], starts[b]) for a in good for b in good if a != b)
    assert "told apart from all before them" in WORDS
    order = [*good, "quad", "rand", "real"]
    for place, name in enumerate(order[3:], 3):
        for before in order[:place]:
            assert starts[name].mean() < starts[before].mean()
            assert apart(starts[name], starts[before])
    assert "On MNIST, at both lengths, `real` is as far behind and `quad` is" in WORDS
    assert "inside the noise at 196 pixels, behind it by little at 784" in WORDS
    for task, odd in {"small": "inv", "whole": "rand"}.items():
        mnist = {name: values("initializations", task, name) for name in m.INITS}
        base = mnist.pop("legs")
        assert {n for n, v in mnist.items() if apart(v, base)} == {"quad", "real", odd}
        gain = {name: v.mean() - base.mean() for name, v in mnist.items()}
        assert gain["real"] < -0.3 and gain["quad"] < -0.05
        assert gain[odd] > 0 if odd == "inv" else -0.02 < gain[odd] < 0
    assert "At 196 pixels `inv` is better than `legs`, and told apart, at 784" in WORDS
    assert starts["legs"].mean() - starts["real"].mean() > 0.3
    assert "only the range of $\\Delta$ matters" in WORDS
    for task, others in {
        "digits": {"dt / 10", "dt * 10"},
        "small": {"dt / 10"},
    }.items():
        base = values("initializations", task, "legs")
        changed = {name: values("ablations", task, name) for name in m.ABLATIONS}
        told = {name for name, v in changed.items() if apart(v, base)}
        assert told == others
        gain = {name: v.mean() - base.mean() for name, v in changed.items()}
        assert gain["dt / 10"] < -0.2
        assert 0 < gain["dt * 10"] < 0.02


def test_rates_are_as_the_words_say():
    recipes = json.loads((ROOT / "assets" / "rates.json").read_text())["digits"]
    test = {k: np.array([run["test"] for run in r["runs"]]) for k, r in recipes.items()}
    assert all(len(values) == 3 for values in test.values())
    for name, values in test.items():
        assert recipes[name]["mean"] == pytest.approx(values.mean())
        assert recipes[name]["spread"] == pytest.approx(values.std(ddof=1))
        assert "| {mean:.1%} ± {spread:.1%} |".format(**recipes[name]) in PAGE
    base = test.pop("as it is")
    told = {name for name, values in test.items() if apart(values, base)}
    assert told == {"one rate", "one rate, decay"}
    assert "it costs two points" in WORDS and "Decay is inside the noise" in WORDS
    assert test["one rate"].mean() - base.mean() == pytest.approx(0.02, abs=0.005)


def test_another_resolution_is_as_the_words_say():
    for name in ("legs", "lin"):
        whole, wrong, right = (
            mean("initializations", "small", name, key=key)
            for key in ("test", "rate 1", "rate 2")
        )
        assert "keep most of their accuracy" in WORDS
        assert whole / 2 < right < whole and wrong < whole / 2


def test_other_kinds_are_as_the_words_say():
    ours = values("initializations", "small", "legs")
    for kind in ("gru", "transformer"):
        theirs = values("baselines", "small", kind)
        assert theirs.mean() < ours.mean() and apart(ours, theirs)
    assert RECORD["baselines"]["small"]["gru"][0]["lr"] == max(m.RATES["gru"])
    step = {
        k: [mean("cost", L, k, key="step") for L in ("196", "784")] for k in m.KINDS
    }
    memory = [
        mean("cost", L, "transformer", key="peak")
        - mean("cost", L, "transformer", key="before")
        for L in ("196", "784")
    ]
    assert step["transformer"][1] > 10 * step["transformer"][0]
    assert memory[1] > 4 * memory[0]
    assert all(step[kind][1] < 4 * step[kind][0] for kind in ("s4d", "gru"))
    assert step["gru"][0] == pytest.approx(step["s4d"][0], rel=0.15)
    assert 1.3 < step["gru"][1] / step["s4d"][1] < 1.7


def test_the_next_sample_costs_what_the_words_say():
    took = {
        k: [mean("steps", n, k, key="best") for n in RECORD["steps"]] for k in m.KINDS
    }
    assert list(RECORD["steps"]) == ["256", "512", "1024", "2048", "4096"]
    assert "no more time for the next sample after 4,096 than after 256" in WORDS
    for kind in ("s4d", "gru"):  # as far as the machine's noise can tell
        runs = [values("steps", n, kind, key="best") for n in ("256", "4096")]
        assert not apart(*runs) or took[kind][-1] < took[kind][0]
    assert "more than sixteen times the time" in WORDS
    assert took["transformer"][-1] > 16 * took["transformer"][0]
    assert all(g < min(s, t) for s, g, t in zip(*took.values()))


# -- assets/evidence.md ---------------------------------------------------------------


def reached(*path):
    ours = values(*path)
    return f"{ours.mean():.1%} ± {ours.std(ddof=1):.1%}"


def rows():
    """The rows of its tables."""
    for name in m.INITS:
        accuracy = [
            reached("initializations", task, name)
            for task in ("digits", "small", "whole")
        ]
        errors = [
            f"{mean('delay', '1024', name, key=key):.3f}"
            for key in ("fitted", "trained")
        ]
        yield f"| {' | '.join([f'`{name}`', *accuracy, *errors])} |"
    for kind, title in zip(m.KINDS, ("S4D", "GRU", "Transformer")):
        path = ("baselines", "small", kind)
        path = ("initializations", "small", "legs") if kind == "s4d" else path
        cost = [RECORD["cost"][L][kind] for L in ("196", "784")]
        times = [f"{1e3 * np.mean([r['step'] for r in runs]):,.0f} ms" for runs in cost]
        more = np.mean([run["peak"] - run["before"] for run in cost[1]])
        size = f"{cost[0][0]['parameters']:,}"
        row = [title, size, reached(*path), *times, f"{more:,.0f} MB"]
        yield f"| {' | '.join(row)} |"


def test_the_tables_say_what_the_record_says():
    for row in rows():
        assert row in PAGE, row


# -- sequential MNIST -----------------------------------------------------------------


def test_a_run_is_recorded():
    row = dict(epoch=1, step=3, seconds=2.5)
    said = "test: loss 0.041, accuracy 98.70%\n"
    found = mnist.reported("--epochs 1", [8, 1, 1], json.dumps(row) + "\n", said)
    assert found["epochs"] == [row] and found["test"] == pytest.approx(0.987)
    assert found["command"] == "python notebooks/training.py --epochs 1"


def test_mnist_is_as_the_words_say():
    run = json.loads((ROOT / "assets" / "mnist.json").read_text())
    rows, (learned, watched, n) = run["epochs"], run["images"]
    assert learned + watched == 9000 and round(60000 / learned) == 7
    assert "Ours saw a seventh of those images" in WORDS
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert f"for {len(rows)} epochs" in WORDS
    for words in ("--n-layers 3", "--d-model 64", "--expand 0", "--dropout 0 ", "0.01"):
        assert words in run["command"]  # "no FFN, no dropout, a rate of 0.01"
    assert rows[-1]["step"] == math.ceil(len(rows) * learned / 32)
    minutes = rows[-1]["seconds"] / 60
    sentence = f"{run['test']:.1%} of {n:,} test images after {len(rows)} epochs"
    assert f"{sentence}, {minutes:.0f} minutes" in " ".join(PAGE.split())


# -- without the record ---------------------------------------------------------------


def test_alone_in_a_folder_it_says_that_nothing_was_measured(tmp_path, capsys):
    """The whole file and then its Part 13 once more, as where nothing else is."""
    code = PART[: PART.rindex("# %% [markdown]")]
    alone = {"__name__": "alone", "__file__": str(tmp_path / "annotated_s4d.py")}
    exec(compile(TEXT, "annotated_s4d.py", "exec"), alone)
    alone |= {"RUN": True, "show": lambda draw, promise: draw()}
    exec(compile(PART, "annotated_s4d.py", "exec"), alone)
    said = capsys.readouterr()
    assert alone["evidence"]() == {} and not said.err
    assert "not measured here" in said.out
    assert "measured" in code
