"""GeneralS4D once more, in NumPy and float64: a recurrence over time, row by row."""

import numpy as np
from flax import nnx
from oracle import discretize
from scipy.special import erf, expit

# What the formulas need of the options; the rest is seen in the parameters' shapes.
DEFAULTS = dict(discretization="zoh", final_act="glu", bidirectional=False, channels=1)
DEFAULTS |= dict(dt_transform="exp", real_transform="exp", imag_transform="none")
DEFAULTS |= dict(is_real=False, l_max=None, rate=1.0, dt_fast=False, bandlimit=None)


def gelu(y):
    return y * 0.5 * (1 + erf(y / np.sqrt(2)))


def relu(raw):
    return np.maximum(raw, 0)


def softplus(raw):
    return np.logaddexp(0, raw)


def same(raw):
    return raw


DT = {"exp": np.exp, "softplus": softplus}
REAL = DT | {
    "sigmoid": expit,
    "relu": lambda raw: relu(raw) + 1e-4,
    "none": lambda raw: np.maximum(raw, 1e-4),
}
IMAG = DT | {"relu": relu, "none": same}
ACT = {"gelu": gelu, "relu": relu, "id": same}


def parameters(layer):
    """Every parameter in float64, by its name, such as "mixer.linear.kernel"."""
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    return {".".join(path): np.float64(p[...]) for path, p in flat}


def shapes(H, N, o):
    """The shape of every parameter of a layer with options o."""
    h, channels = H // (o.get("bottleneck") or 1), o.get("channels", 1)
    n_ssm, real = o.get("n_ssm") or h, o.get("is_real", False)
    act, gate = o.get("final_act", "glu"), o.get("gate")
    modes, pair = (N, ()) if real else (N // 2, (2,))
    heads = (channels,) if channels > 1 else ()
    both = (2,) if o.get("bidirectional") else ()
    found = dict(log_dt=(h,) if o.get("dt_tie", True) else (h, modes))
    found |= dict(log_A_real=(n_ssm, modes), B=(n_ssm, modes, *pair))
    found |= {} if real else dict(A_imag=(n_ssm, modes))
    found |= dict(C=(*both, *heads, h, modes, *pair), D=(*heads, h))
    maps, width = {}, channels * h
    if o.get("bottleneck"):
        maps["narrow"] = H, h
    if gate:
        maps |= {"mixer.gate": (width, gate * H), "mixer.branch": (H, gate * H)}
        width = gate * H
    if act:
        maps["mixer.linear"] = width, H * (2 if act == "glu" else 1)
    for name, shape in maps.items():
        found |= {f"{name}.kernel": shape, f"{name}.bias": shape[1:]}
    return found


def linear(p, name, y):
    return y @ p[f"{name}.kernel"] + p[f"{name}.bias"]


def system(p, o):
    """A, B and dt (h, modes), C (*heads, h, modes): one system for each channel."""
    o = DEFAULTS | o
    A = -REAL[o["real_transform"]](p["log_A_real"])
    B, C = p["B"], p["C"]
    if not o["is_real"]:
        A = A + 1j * IMAG[o["imag_transform"]](p["A_imag"])
        B, C = B @ [1, 1j], C @ [1, 1j]
    owner = [i // (C.shape[-2] // len(A)) for i in range(C.shape[-2])]
    A, B = A[owner], B[owner]
    raw = np.sinh(p["log_dt"]) if o["dt_fast"] else p["log_dt"]
    dt = DT[o["dt_transform"]](raw) * o["rate"]
    dt = np.broadcast_to(dt.reshape(len(A), -1), A.shape)
    if o["bandlimit"]:
        turns = np.abs(A.imag) * dt / (2 * np.pi)  # 1/2 is half the sampling rate
        C = C * (turns / 0.5 < o["bandlimit"])
    return A, B, C, dt


def respond(p, o, C, v, x):
    """From state x (h, modes) read v (L, h). Returns the last x, and y (L, h)."""
    A, B, _, dt = system(p, o)
    A_bar, B_bar = discretize(A[..., None], B[..., None], dt, o["discretization"])
    A_bar, B_bar, twice = A_bar[..., 0], B_bar[..., 0], 1 if o["is_real"] else 2
    states, y = [x], []
    for now in v:
        states.append(A_bar * states[-1] + B_bar * now[:, None])
        y.append(twice * (C * states[-1]).sum(-1).real)
        if o["l_max"] and len(y) > o["l_max"]:  # forget what is l_max steps old
            old = A_bar ** o["l_max"] * states[-1 - o["l_max"]]
            y[-1] -= twice * (C * old).sum(-1).real
    return states[-1], np.reshape(y, v.shape)


def kernel(p, o, L):
    """K (*heads, h, L): the answers to a single blow."""
    o, (*_, C, _) = DEFAULTS | o, system(p, o)
    blow, K = np.eye(L)[:, :1] * np.ones(C.shape[-2]), np.empty((*C.shape[:-1], L))
    for head in np.ndindex(C.shape[:-2]):
        K[head] = respond(p, o, C[head], blow, np.zeros(C.shape[-2:]))[1].T
    return K


def mix(p, o, y, u):
    """The layer's output for outputs y (L, width) of the systems and its input u."""
    g = gelu(y)
    if "mixer.gate.kernel" in p:
        g = linear(p, "mixer.gate", g) * gelu(linear(p, "mixer.branch", u))
    if o["final_act"] is None:
        return g
    g = linear(p, "mixer.linear", g)
    if o["final_act"] == "glu":
        first, second = np.split(g, 2, -1)
        return first * expit(second)
    return ACT[o["final_act"]](g)


def general(p, o, u, lengths=None, x0=None):
    """The state after each row's length, and y (batch, L, H). u (batch, L, H)."""
    o, (*_, C, _), u = DEFAULTS | o, system(p, o), np.float64(u)
    h, modes = C.shape[-2:]
    C, D = C.reshape(-1, o["channels"], h, modes), p["D"].reshape(-1, h)
    lengths = [u.shape[1]] * len(u) if lengths is None else lengths
    x0 = np.zeros((len(u), h, modes)) if x0 is None else np.asarray(x0)
    states, outputs = [], []
    for row, n, x in zip(u, lengths, x0):
        row = row[:n]
        v, heads = linear(p, "narrow", row) if "narrow.kernel" in p else row, []
        for c in range(o["channels"]):
            last, y = respond(p, o, C[0, c], v, x)
            y += D[c] * v
            if o["bidirectional"]:  # from the end of the row; l hears l + 1, l + 2, ...
                y[:-1] += respond(p, o, C[1, c], v[::-1], x)[1][::-1][1:]
            heads.append(y)
        y = mix(p, o, np.concatenate(heads, -1), row)
        states.append(last.real if o["is_real"] else last)
        outputs.append(np.concatenate([y, np.zeros((u.shape[1] - n, y.shape[-1]))]))
    return np.stack(states), np.stack(outputs)
