// A pole is [Re A, Im A, Re C, Im C], as in Python. Its conjugate is understood; B = 1.
const COLOURS = [210, 25, 150, 270, 330, 85, 185, 0].map((h) => `hsl(${h} 65% 55%)`);
const ARROWS = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0],
                 ArrowUp: [0, 0.5], ArrowDown: [0, -0.5] };

const add = ([a, b], [c, d]) => [a + c, b + d];
const multiply = ([a, b], [c, d]) => [a * c - b * d, a * d + b * c];
const divide = (p, [c, d]) => multiply(p, [c, -d].map((v) => v / (c * c + d * d)));

// A pole's share of the output: x_k = A_bar x_(k-1) + B_bar u_k, y_k = 2 Re(C x_k).
function respond([re, im, ...C], dt, u) {
  // Zero-order hold: A_bar = exp(dt A), B_bar = (A_bar - 1) / A, or dt where A = 0.
  const size = Math.exp(dt * re);
  const A_bar = [size * Math.cos(dt * im), size * Math.sin(dt * im)];
  const B_bar = re || im ? divide(add(A_bar, [-1, 0]), [re, im]) : [dt, 0];
  let x = [0, 0];
  return u.map((u_k) => {
    x = add(multiply(A_bar, x), multiply(B_bar, [u_k, 0]));
    return 2 * multiply(C, x)[0];
  });
}

// |G(iw)|, where G sums C / (iw - A) over the poles and their conjugates.
function magnitude(poles, w) {
  const G = poles.map(([re, im, c, d]) => {
    const decay = Math.max(-re, 1e-3); // on the axis itself G has no bound
    return add(divide([c, d], [decay, w - im]), divide([c, -d], [decay, w + im]));
  });
  return Math.hypot(...G.reduce(add));
}

const sum = (shares) => shares[0].map((_, k) => shares.reduce((s, y) => s + y[k], 0));

function draw(el) {
  const { poles, data: { dt, u } } = el;
  const t = u.map((_, k) => k * dt), time = ticks(0, u.length * dt);
  const impulse = u.map((_, k) => (k === 0 ? 1 : 0));
  const shares = poles.map((pole) => respond(pole, dt, impulse));
  const K = el.kernel = sum(shares);
  const y = el.output = sum(poles.map((pole) => respond(pole, dt, u)));
  const ends = about(y), force = u.map((u_k) => (0.9 * ends[2] * u_k) / largest(u));
  const faint = shares.map((share, n) => [t, share, "share", COLOURS[n]]);
  view(el, "kernel", "age of the input, s", time, about([...shares, K].flat()),
    [...faint, [t, K, "sum"]]);
  view(el, "response", "time, s", time, ends, [[t, force, "force"], [t, y, "sum"]]);
  drawFrequency(el);
  drawPoles(el);
}

function drawFrequency(el) {
  const last = el.data.limits.im[1];
  // The poles' own frequencies are on the grid, lest a narrow peak be missed.
  const w = [...ticks(0, last, 200), ...el.poles.map((pole) => pole[1])];
  const G = w.sort((a, b) => a - b).map((v) => Math.log10(magnitude(el.poles, v)));
  const order = [...G].sort((a, b) => a - b), peak = order.at(-1);
  // Up to four decades, from below nearly all of it. What is outside leaves the plot:
  // a narrow peak is cut and its height written down, and nothing else moves for it.
  const bottom = Math.floor(order[Math.floor(0.05 * order.length)]);
  const top = Math.min(Math.max(Math.ceil(peak), bottom + 1), bottom + 4);
  const inside = (h) => Math.min(Math.max(h, bottom - 0.1), top + 0.1);
  const cut = peak > top ? `, peak ${label(10 ** peak)}` : "";
  el.response = { w, height: G.map(inside), bottom, top };
  view(el, "frequency", `frequency, rad/s${cut}`, ticks(0, last),
    ticks(bottom, top, top - bottom), [[w, el.response.height, "sum"]],
    (v) => label(10 ** v));
}

// A weight is a size with the sign of its larger part; its phase stays when it changes.
function weight([, , c, d]) {
  const sign = Math.abs(c) >= Math.abs(d) ? Math.sign(c) : Math.sign(d);
  return sign * Math.hypot(c, d);
}
function weigh([re, im, ...C], value) {
  const old = weight([re, im, ...C]);
  return [re, im, ...(old ? C.map((v) => (v * value) / old) : [value, 0])];
}

function describe([re, im], n) {
  const fades = re < 0 ? `fades to 1/e in ${label(-1 / re)} s` : "never fades";
  const turns = im > 0 ? `turns ${im.toFixed(1)} rad/s` : "does not turn";
  return `pole ${n + 1}: ${fades}, ${turns}`;
}

function drawPoles(el) {
  const { poles, chosen, data: { limits } } = el, C = weight(poles[chosen]);
  const name = "Re A: fades faster ←, Im A: turns faster ↑", top = limits.im[1];
  el.plane = view(el, "plane", name, ticks(...limits.re), ticks(-top, top));
  const { X, Y } = el.plane;
  el.querySelectorAll(".pole").forEach((handle, n) => {
    const [re, im] = poles[n] ?? [0, 0];
    handle.style.display = n < poles.length ? "" : "none";
    handle.setAttribute("transform", `translate(${X(re)} ${Y(im)})`);
    handle.setAttribute("aria-label", describe([re, im], n));
    handle.classList.toggle("chosen", n === chosen);
    handle.querySelector(".conjugate").setAttribute("cy", Y(-im) - Y(im));
  });
  part(el, "says").textContent = describe(poles[chosen], chosen);
  part(el, "value").textContent = C.toFixed(2).replace("-", "−");
  part(el, "weight").value = C;
  part(el, "weight").style.accentColor = COLOURS[chosen];
  part(el, "add").disabled = poles.length >= COLOURS.length;
  part(el, "remove").disabled = poles.length <= 1;
}

// Poles from anywhere: eight at most, within limits, finite, with three decimals.
function take(el, poles, chosen = 0) {
  const { re, im } = el.data.limits, limits = [re, im, [-2, 2], [-2, 2]];
  const permit = (v, [low, high]) =>
    Math.round(1e3 * Math.min(Math.max(v, low), high)) / 1e3 || 0;
  el.poles = poles.slice(0, COLOURS.length).map((pole) =>
    limits.map((limit, i) => permit(pole[i], limit)));
  el.chosen = chosen;
  draw(el);
}

const replace = (el, n, pole) => take(el, el.poles.with(n, pole), n);

// Python hears of a change when it is finished, not on the way.
function finish(el, wait = 0) {
  clearTimeout(el.timer);
  el.timer = setTimeout(() => el.setStateValue("poles", el.poles), wait);
}

function listenToPole(el, handle, n) {
  const move = ([re, im, ...C], dx, dy) => replace(el, n, [re + dx, im + dy, ...C]);
  handle.onfocus = () => take(el, el.poles, n);
  handle.onpointerdown = ({ clientX, clientY, pointerId }) => {
    const pole = el.poles[n], { X, Y } = el.plane;
    handle.setPointerCapture(pointerId);
    handle.onpointermove = (now) => move(pole, (now.clientX - clientX) / (X(1) - X(0)),
      (now.clientY - clientY) / (Y(1) - Y(0)));
  };
  handle.onlostpointercapture = () => { handle.onpointermove = null; finish(el); };
  handle.onkeydown = (event) => {
    const arrow = ARROWS[event.key], size = event.shiftKey ? 0.1 : 1;
    if (!arrow) return;
    event.preventDefault();
    move(el.poles[n], size * arrow[0], size * arrow[1]);
    finish(el, 300);
  };
}

function listen(el) {
  const set = (poles, chosen) => { take(el, poles, chosen); finish(el); };
  part(el, "handles").innerHTML = COLOURS.map((colour, n) =>
    `<g class="pole" tabindex="0" role="button" fill="${colour}">
       <circle class="conjugate" r="6"/><circle class="hit" r="16"/>
       <circle class="dot" r="9"/><text y="4">${n + 1}</text></g>`).join("");
  el.querySelectorAll(".pole").forEach((handle, n) => listenToPole(el, handle, n));
  part(el, "weight").oninput = ({ target }) =>
    replace(el, el.chosen, weigh(el.poles[el.chosen], Number(target.value)));
  part(el, "weight").onchange = () => finish(el);
  part(el, "add").onclick = () =>
    set([...el.poles, [-1, 2.5 * el.poles.length, 1, 0]], el.poles.length);
  part(el, "remove").onclick = () =>
    set(el.poles.filter((_, n) => n !== el.chosen), Math.max(el.chosen - 1, 0));
  const preset = ([name, poles]) => Object.assign(document.createElement("button"),
    { textContent: name, onclick: () => set(poles) });
  part(el, "presets").append(...Object.entries(el.data.presets).map(preset));
  el.observer = new ResizeObserver(() => draw(el));
}

export default function explore({ parentElement, data: [data], setStateValue }) {
  const el = part(parentElement, "explorer"), before = el.data?.poles;
  Object.assign(el, { data, setStateValue });
  if (!el.observer) listen(el);
  // The reader's poles outlive reruns, unless Python's own have changed.
  if (JSON.stringify(data.poles) !== JSON.stringify(before)) take(el, data.poles);
  el.observer.observe(part(el, "plane")); // draws now, and at every change of size
  return () => el.observer.disconnect();
}
