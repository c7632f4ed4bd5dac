// What the browser does for the live page. Streamlit's page is one document; its main
// column scrolls in an element of its own.
const main = document.querySelector(".stMain");

// Streamlit strips formulas from HTML, so they come inside an attribute.
function setFormulas() {
  for (const place of document.querySelectorAll(".math[data-math]")) {
    place.innerHTML = place.dataset.math;
    place.removeAttribute("data-math");
  }
}

// A knob says to which figure it belongs.
function nameKnobs() {
  for (const box of document.querySelectorAll("[class*=st-key-figure-]:not([role])")) {
    const name = /st-key-figure-(\w+)/.exec(box.className)[1];
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", name.replaceAll("_", " "));
  }
}

// light-dark() follows the root, and Streamlit's theme may differ from the system's.
function followTheme() {
  const app = document.querySelector(".stApp");
  const scheme = app && getComputedStyle(app).colorScheme;
  const root = document.documentElement.style;
  if (scheme && root.colorScheme !== scheme) root.colorScheme = scheme;
}

function arrive() {
  setFormulas();
  nameKnobs();
  followTheme();
}

arrive();
new MutationObserver(arrive).observe(document.body, { childList: true, subtree: true });

// -- places ---------------------------------------------------------------------------

// Where the address leads: to its #anchor, else to the last figure that it sets.
function place() {
  const anchor = decodeURIComponent(location.hash.slice(1));
  if (anchor) return document.getElementById(anchor);
  const keys = [...new URLSearchParams(location.search).keys()];
  const names = keys.filter((key) => key.includes(".")).map((key) => key.split(".")[0]);
  return names.length ? document.getElementById(names.at(-1)) : null;
}

// What is folded around a place, unfolded. The figures of a fold stand below its head.
function unfold(el) {
  for (let at = el; at; at = at.parentElement) {
    const below = at.matches("[class*=st-key-fold-]");
    const fold = below ? at.querySelector("details") : at.closest("details");
    if (fold) fold.open = true;
  }
}

// A figure begins with its knobs.
const start = (el) => el?.closest("[class*=st-key-figure-]") ?? el;

// Parts above a place may still grow: stay with it until nothing moves any more, or the
// reader does.
let staying = 0;
function stay(find) {
  const turn = ++staying;
  let still = 0, left = 900, found = false;
  const look = () => {
    if (turn !== staying || still > 60 || --left < 0) return;
    const before = main.scrollTop;
    const el = find();
    if (el && !found) unfold(el);
    found ||= Boolean(el);
    start(el)?.scrollIntoView();
    const complete = document.querySelector(".complete");
    still = complete && Math.abs(main.scrollTop - before) < 1 ? still + 1 : 0;
    requestAnimationFrame(look);
  };
  look();
}
for (const move of ["wheel", "touchstart", "keydown", "pointerdown"])
  addEventListener(move, () => { staying++; }, { capture: true, passive: true });
addEventListener("hashchange", () => stay(place));
document.addEventListener("click", ({ target }) => {
  const link = target.closest?.('a[href^="#"]');
  if (link) stay(() => document.getElementById(link.getAttribute("href").slice(1)));
});
if (location.hash || location.search.includes(".")) stay(place);

// -- the button that copies, the mark in the table of contents -------------------------

document.addEventListener("click", (event) => {
  const button = event.target.closest(".code button");
  if (!button) return;
  navigator.clipboard.writeText(button.parentElement.querySelector("pre").innerText);
  button.textContent = "copied";
  setTimeout(() => { button.textContent = "copy"; }, 1500);
});

let marked;
main.addEventListener("scroll", () => {
  const headings = [...main.querySelectorAll("h2[id], h3[id]")];
  const above = headings.filter((h) => h.getBoundingClientRect().top < 120);
  const here = above.length ? "#" + above.at(-1).id : "";
  if (here === marked) return;
  marked = here;
  for (const link of document.querySelectorAll("nav a")) {
    const is = link.getAttribute("href") === here;
    link.classList.toggle("here", is);
    if (is) link.scrollIntoView({ block: "nearest" });
  }
}, { passive: true });
