// What the page does by itself: theme, keys, and the rollouts once they are inflated.

const THEMES = ["auto", "light", "dark"];

/** Kept where the browser lets a file keep anything. */
function remembered(value) {
  try {
    if (value) localStorage.setItem("rlpt-theme", value);
    return localStorage.getItem("rlpt-theme") ?? "auto";
  } catch {
    return value ?? "auto";
  }
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  button.textContent = { auto: "\u25d0 auto", light: "\u25cb light", dark: "\u25cf dark" }[name];
  button.setAttribute("aria-label", `colours: ${name}; press for the next`);
}

function startTheme() {
  setTheme(remembered());
  document.getElementById("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme;
    setTheme(remembered(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]));
  });
}

/** j k next and previous prompt, arrows between thoughts, / search, ? help, Escape out of a field. */
function startKeys(browser) {
  const help = document.getElementById("help");
  document.getElementById("help-open").addEventListener("click", () => help.showModal());
  const search = browser.part("form").elements.q;
  const keys = {
    j: () => browser.move(1),
    k: () => browser.move(-1),
    ArrowRight: () => browser.turn(1),
    ArrowLeft: () => browser.turn(-1),
    "/": () => search.focus(),
    "?": () => help.showModal(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const inField = event.target.matches("input, select, textarea");
    if (event.key === "Escape" && inField) return leave(event.target, browser);
    const inList = event.target.closest("[data-part=list]");
    const key = inList ? ({ ArrowDown: "j", ArrowUp: "k" }[event.key] ?? event.key) : event.key;
    if (inField || !keys[key]) return;
    event.preventDefault();
    keys[key]();
  });
}

/** Escape empties a search that holds something, and leaves the field. */
function leave(field, browser) {
  if (field.name === "q" && field.value) browser.restart("");
  field.blur();
}

async function startRollouts() {
  const root = document.getElementById("rollouts");
  if (!root) return;
  const said = root.querySelector("[data-part=count]");
  if (typeof DecompressionStream === "undefined" || !Map.groupBy) {
    said.textContent = "This browser cannot unpack the rollouts; one of 2024 or later can.";
    return;
  }
  const data = await inflate(document.getElementById("rollouts-data").textContent.trim());
  const browser = new Browser(data, root);
  startKeys(browser);
  // On a phone the filters would hide what they filter.
  root.querySelector(".filters").open = matchMedia("(min-width: 821px)").matches;
  root.removeAttribute("aria-busy");
  if (location.hash.includes("=")) root.scrollIntoView();
  browser.touched = true;
  // Read by tests and benchmarks: milliseconds until the first prompt could be seen.
  requestAnimationFrame(() => (document.documentElement.dataset.ready = performance.now().toFixed(0)));
}

startTheme();
startRollouts().catch((error) => {
  document.querySelector("#rollouts [data-part=count]").textContent = `The rollouts cannot be shown: ${error}`;
});
