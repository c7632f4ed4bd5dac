// What the figures that the browser draws have in common. It stands before the script
// of each.
const largest = (values) => Math.max(1e-6, ...values.map(Math.abs));
const label = (v) => String(Number(v.toPrecision(3))).replace("-", "−");
const part = (el, name) => el.querySelector("." + name);
const text = (x, y, anchor, words) =>
  `<text x="${x}" y="${y}" text-anchor="${anchor}">${words}</text>`;
const ticks = (from, to, n = 4) =>
  Array.from({ length: n + 1 }, (_, i) => from + (i / n) * (to - from));
// The place of v on an axis whose ticks run from one place to another.
const scale = (ticks, from, to) => (v) =>
  from + ((v - ticks[0]) / (ticks.at(-1) - ticks[0])) * (to - from);

// An axis about zero, up to the first of 1, 2, 5, 10, 20, ... that holds the values.
function about(values) {
  const v = largest(values), ten = 10 ** Math.floor(Math.log10(v));
  const end = [1, 2, 5, 10].map((m) => m * ten).find((m) => m >= v);
  return [-end, 0, end];
}

// The line through points, as the d of a path.
const through = ({ X, Y }, xs, ys) =>
  "M" + xs.map((x, k) => `${X(x).toFixed(1)},${Y(ys[k]).toFixed(1)}`).join("L");

// A view: a grid with numbers, and curves [xs, ys, kind, colour] in it.
function view(el, which, name, xs, ys, curves = [], labelY = label) {
  const svg = part(el, which);
  const left = 46, right = svg.clientWidth - 12, bottom = svg.clientHeight - 36;
  const X = scale(xs, left, right), Y = scale(ys, bottom, 12);
  const line = ([x, y, kind, colour = "currentColor"]) =>
    `<path class="${kind}" stroke="${colour}" d="${through({ X, Y }, x, y)}"/>`;
  const across = ys.map((y) => line([[xs[0], xs.at(-1)], [y, y], y ? "grid" : "axis"])
    + text(left - 8, Y(y) + 4, "end", labelY(y)));
  const down = xs.map((x) => line([[x, x], [ys[0], ys.at(-1)], x ? "grid" : "axis"])
    + text(X(x), bottom + 16, "middle", label(x)));
  svg.firstElementChild.innerHTML = [...across, ...down, ...curves.map(line),
    text(right, bottom + 32, "end", name)].join("");
  return { X, Y };
}
