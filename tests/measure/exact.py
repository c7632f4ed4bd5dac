"""What 32 modes can do at best: least squares for a delay, with 300 digits.

    python tests/measure/exact.py          write assets/exact.json, some ten minutes
    python tests/measure/exact.py --quick  the shortest delay alone; writes nothing

Part 13 asks how near a weighted sum of the modes of a start comes to a bump, a delay by
half the length. The modes are so alike that double precision does not find the best
weights. Here the normal equations are solved with as many digits as it takes: those of
the Gram matrix of the modes are lost twice over, and still more than enough are left.
"""

import decimal

import jax
import numpy as np
import record  # it puts the article on the path
from flax import nnx

# isort: split
import evidence

import annotated_s4d as s4d

DIGITS = 300
Number = decimal.Decimal


def exponential(real, imag):
    """e^z for z = real + i imag: its real and imaginary part, by the power series."""
    term = total = (Number(1), Number(0))
    k = 0
    while k < 8 or max(map(abs, term)) > Number(10) ** -DIGITS:
        k += 1
        term = (
            (term[0] * real - term[1] * imag) / k,
            (term[0] * imag + term[1] * real) / k,
        )
        total = total[0] + term[0], total[1] + term[1]
    return total


def modes(A, L):
    """Real and imaginary parts of e^{A l 2/L}, rows of L numbers; A complex (N/2,)."""
    rows = []
    for pole in A:
        step = exponential(*(Number(float(v)) * 2 / L for v in (pole.real, pole.imag)))
        row = [(Number(1), Number(0))]
        for _ in range(L - 1):
            x, y = row[-1]
            row.append((x * step[0] - y * step[1], x * step[1] + y * step[0]))
        parts = list(zip(*row))
        rows += parts if pole.imag else parts[:1]  # a real mode has one part
    return rows


def dot(one, other):
    return sum(x * y for x, y in zip(one, other))


def best_error(A, L):
    """The error that the best weights leave, relative. A complex (N/2,), dt = 2 / L."""
    with decimal.localcontext() as context:
        context.prec = DIGITS
        bump = [Number(float(v)) for v in evidence.bump(L)]
        rows = [*modes(A, L), bump]
        n = len(rows)
        gram = [[dot(rows[i], rows[j]) for j in range(i + 1)] for i in range(n)]
        for j in range(n):  # Cholesky, in place; the last pivot is the rest
            for k in range(j):
                gram[j][j] -= gram[j][k] ** 2
            if j == n - 1:
                break
            assert gram[j][j] > 0, "too few digits"
            gram[j][j] = gram[j][j].sqrt()
            for i in range(j + 1, n):
                rest = gram[i][j] - dot(gram[i][:j], gram[j][:j])
                gram[i][j] = rest / gram[j][j]
        return float((gram[-1][-1] / dot(bump, bump)).sqrt())


def run(name, L, seed):
    """The errors of a start: exact, in double precision, and as float32 could hold."""
    A = s4d.s4d_init(name, 64, nnx.Rngs(seed).params())
    A = np.asarray(A, np.complex64).astype(complex)  # as a layer holds it
    double = evidence.fitted(A, 2 / L, L, None)
    found = dict(seed=seed, in_double=double, fitted=evidence.fitted(A, 2 / L, L))
    return found | dict(exact=best_error(A, L))


def main():
    quick = "the shortest delay, seed 0"
    options = record.begin(
        record.parser("the best weights for a delay", "exact", quick)
    )
    lengths = evidence.LENGTHS[:1] if options.quick else evidence.LENGTHS
    jax.config.update("jax_platforms", "cpu")
    found = {}
    for L in lengths:
        found[str(L)] = {}
        for name in evidence.INITS:
            seeds = evidence.SEEDS if name == "rand" and not options.quick else (0,)
            runs = [
                record.once(options, f"{name}, {L}, seed {seed}", run, name, L, seed)
                for seed in seeds
            ]
            found[str(L)][name] = runs
            record.log("  " + " ".join(f"{r['exact']:.4f}" for r in runs))
    record.keep(options, digits=DIGITS, delay=found)


if __name__ == "__main__":
    main()
