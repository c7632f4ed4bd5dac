// A mass on a spring, as in Python: x_k = A_bar x_(k-1) + B_bar u_k, where x = (p, v).
// Its past is a row [u, p, v] for each step. Nothing moves before the reader acts, nor
// when the mass has come to rest.
const KEYS = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1,
               " ": 0, Escape: 0 };
const STILL = matchMedia("(prefers-reduced-motion: reduce)");

function step(el) {
  const { A_bar, B_bar, dt, seconds } = el.data, [, p, v] = el.past.at(-1);
  const u = el.pull + el.blow / dt; // a blow lasts for one step
  const x = A_bar.map(([a, b], n) => a * p + b * v + B_bar[n] * u);
  el.past.push([u, ...x]);
  el.blow = 0;
  if (el.past.length > seconds / dt + 1) el.past.shift();
}

// Where the force and the spring are equal, and so slow that nobody can see it.
function atRest({ past, pull, blow, data: { stiffness } }) {
  const [, p, v] = past.at(-1);
  return !blow && Math.abs(p - pull / stiffness) < 5e-4 && Math.abs(v) < 3e-3;
}

// As many steps as time has passed, but no more than a tenth of a second: a page that
// nobody looked at goes on where it was.
function frame(el, now) {
  const { dt } = el.data, before = el.time ?? now;
  const due = Math.round((now - before) / 1000 / dt);
  for (let k = Math.min(due, Math.round(0.1 / dt)); k > 0; k--) step(el);
  draw(el);
  const rests = atRest(el);
  el.time = rests ? undefined : before + 1000 * dt * due;
  el.frame = 0;
  if (!rests) ask(el);
  else if (el.moved) part(el, "says").textContent = `At rest: ${describe(el)}.`;
}

function ask(el) {
  el.frame ||= requestAnimationFrame((now) => frame(el, now));
}

// The reader has acted. Who wants no motion sees at once where it ends.
function go(el) {
  el.moved = true;
  part(el, "says").textContent = "";
  while (STILL.matches && !atRest(el)) step(el);
  ask(el);
}

function pull(el, force) {
  const most = el.data.limits.force;
  el.pull = Math.min(Math.max(force, -most), most);
  go(el);
}

function describe({ past, pull }) {
  const signed = (v, digits) => v.toFixed(digits).replace(/^-(?=0[.0]*$)/, "")
    .replace("-", "−");
  return `force ${signed(pull, 1)} N, position ${signed(past.at(-1)[1], 3)} m`;
}

function draw(el) {
  const { past, pull, axes, data: { dt, limits, stiffness } } = el;
  const [u, p, v] = past[0].map((_, n) => past.map((row) => row[n]));
  const t = past.map((_, k) => (k + 1 - past.length) * dt);
  const curve = (name, x, y) => part(el, name).querySelector(".curve")
    .setAttribute("d", through(axes[name], x, y));
  curve("force", t, u);
  curve("position", t, p);
  curve("plane", v, p);
  const { X, Y } = axes.plane, now = part(el, "now"), mass = part(el, "mass");
  now.setAttribute("cx", X(v.at(-1)));
  now.setAttribute("cy", Y(p.at(-1)));
  // The scene ends where the plot of the position ends.
  const lower = part(el, "scene").clientHeight - part(el, "position").clientHeight;
  const y = lower + axes.position.Y(p.at(-1)), x = 42;
  mass.setAttribute("transform", `translate(${x} ${y})`);
  mass.setAttribute("aria-valuetext", describe(el));
  mass.setAttribute("aria-valuenow", pull);
  const turns = Array.from({ length: 20 }, (_, n) => [n % 2 ? -9 : 9, (n + 1) / 21]);
  const way = y - 15 - 4;
  part(el, "ceiling").setAttribute("d", "M16,4H68");
  part(el, "coil").setAttribute("d", `M${x},4` + turns.map(([side, share]) =>
    `L${x + side},${4 + share * way}`).join("") + `L${x},${y - 15}`);
  // The arrow is as long as this force would move the mass.
  const up = axes.position.Y(0) - axes.position.Y(pull / stiffness);
  const head = 5 * Math.sign(up);
  part(el, "arrow").setAttribute("d",
    up ? `M29,0V${-up}m-5,${head}l5,${-head}l5,${head}` : "");
}

// The grids, which stay; at first and when the page has another width.
function rule(el) {
  const { seconds, limits: { force, position, velocity } } = el.data;
  const time = ticks(-seconds, 0), height = ticks(-position, position);
  el.axes = {
    force: view(el, "force", "", time, ticks(-force, force, 2)),
    position: view(el, "position", "time from now, s", time, height),
    plane: view(el, "plane", "velocity, m/s", ticks(-velocity, velocity, 2), height),
  };
  ask(el);
}

function listen(el) {
  const mass = part(el, "mass"), { stiffness, limits: { force } } = el.data;
  mass.setAttribute("aria-valuemin", -force);
  mass.setAttribute("aria-valuemax", force);
  // The hand pulls with the force that would hold the mass where the hand is.
  mass.onpointerdown = ({ clientY, pointerId }) => {
    const { Y } = el.axes.position, metre = Y(0) - Y(1), from = el.past.at(-1)[1];
    const move = (now) =>
      pull(el, stiffness * (from + (clientY - now.clientY) / metre));
    mass.setPointerCapture(pointerId);
    mass.onpointermove = move;
    move({ clientY });
  };
  mass.onlostpointercapture = () => { mass.onpointermove = null; pull(el, 0); };
  mass.onblur = () => { if (el.pull) pull(el, 0); };
  mass.onkeydown = (event) => {
    const change = KEYS[event.key];
    if (change === undefined) return;
    event.preventDefault();
    pull(el, change && el.pull + change);
  };
  part(el, "blow").onclick = () => { el.blow += 1; go(el); };
  el.observer = new ResizeObserver(() => rule(el));
}

export default function spring({ parentElement, data: [data] }) {
  const el = part(parentElement, "grabbed_spring");
  el.data = data;
  if (!el.observer) {
    Object.assign(el, { past: [[0, 0, 0]], pull: 0, blow: 0 });
    listen(el);
  }
  el.observer.observe(part(el, "position")); // rules now, and at every change of size
  return () => {
    el.observer.disconnect();
    cancelAnimationFrame(el.frame);
    Object.assign(el, { frame: 0, time: undefined });
  };
}
