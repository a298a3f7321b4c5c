// Elements of the rollout browser. Text goes in as text and never as markup: it is the web's.

const MINUS = "\u2212";
const ROW = 62;

/** An element with attributes and children; a child that is no element becomes text. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function signed(value, digits = 3) {
  if (value === null || value === undefined) return "\u2013";
  const size = Math.abs(value);
  const text = size > 0 && size < 1e-3 ? size.toExponential(1).replace("-", MINUS) : size.toFixed(digits);
  return (value < 0 ? MINUS : "+") + text;
}

/** A sign beside the number, and a shape beside the colour. */
function badge(value, digits) {
  const up = (value ?? 0) >= 0;
  return element("b", { class: up ? "pos" : "neg" }, `${up ? "\u25b2" : "\u25bc"} ${signed(value, digits)}`);
}

/** A bar a thought, up or down from the middle, best first. */
function bars(group) {
  const values = group.thoughts.map((thought) => thought.gain ?? thought.reward ?? 0);
  const most = Math.max(...values.map(Math.abs)) || 1;
  const parts = values.slice(0, 24).map((value) => {
    const bar = element("i", { class: value >= 0 ? "over" : "under" });
    bar.style.height = `${Math.max(1, Math.round((11 * Math.abs(value)) / most))}px`;
    return bar;
  });
  return element("span", { class: "bars", "aria-hidden": "true" }, ...parts);
}

/** One line of the list. */
function listRow(item, index, total, name) {
  const { group, pick } = item;
  const thought = group.thoughts[pick];
  const where = [name, `step ${group.step}`, group.domain].filter(Boolean).join(" \u00b7 ");
  const row = element(
    "div",
    { role: "option", class: "row", id: `row-${index}`, "aria-setsize": total, "aria-posinset": index + 1 },
    element("span", { class: "what" }, where),
    badge(thought.gain ?? thought.reward),
    element("span", { class: "preview" }, group.tokens.join("").trim() || "(blank)"),
    bars(group),
  );
  row.style.top = `${index * ROW}px`;
  row.dataset.index = index;
  return row;
}

/** One token of held-out text. The square root: a quarter of the full gain should be found, too. */
function token(text, gain, without, scale) {
  const strength = gain === null ? 0 : Math.sqrt(Math.min(1, Math.abs(gain) / scale));
  const kind = gain >= 0 ? "up" : strength >= 0.5 ? "down strong" : "down";
  const made = element("span", { class: `t ${kind}` }, text.replaceAll("\n", "\u21b5\n"));
  made.style.setProperty("--s", strength.toFixed(2));
  if (gain === null) return made;
  const before = Math.exp(without).toFixed(3);
  const after = Math.exp(without + gain).toFixed(3);
  made.title = `p ${before} \u2192 ${after} (${signed(gain)} nats)`;
  return made;
}

/** The held-out text as one thought left it. */
function heldOut(group, gains, scale) {
  const tokens = group.tokens.map((text, i) => token(text, gains ? gains[i] : null, group.without?.[i], scale));
  return element("bdi", { class: "text" }, ...tokens);
}

/** One thought with what it did. */
function thoughtCard(group, index, scale, isHit) {
  const thought = group.thoughts[index];
  const length = thought.length === null ? "" : `${thought.length} token${thought.length === 1 ? "" : "s"}, `;
  const end = { closer: "ended itself", budget: "cut by the budget" }[thought.finish] ?? thought.finish;
  const card = element(
    "article",
    { class: isHit ? "one" : "one dim", "aria-label": `thought ${index + 1} of ${group.thoughts.length}` },
    element("p", { class: "score" }, badge(thought.gain ?? thought.reward), element("small", {}, `${index + 1} of ${group.thoughts.length}`)),
    element("p", { class: "small" }, `reward ${signed(thought.reward)} \u00b7 advantage ${signed(thought.advantage, 2)}`),
    element("p", { class: "small" }, length + end),
    element("h4", {}, "thought"),
    thought.text ? element("bdi", { class: "thought" }, thought.text) : element("i", { class: "none" }, "empty"),
    thought.prediction ? element("h4", {}, "prediction") : null,
    thought.prediction ? element("bdi", { class: "thought" }, thought.prediction) : null,
    element("h4", {}, "held-out text after it"),
    heldOut(group, thought.gains, scale),
  );
  card.dataset.thought = index;
  return card;
}

/** The prompt: where it is from, what the policy read, and what really follows. */
function promptCard(group, name, others) {
  const mean = group.without?.length ? group.without.reduce((a, b) => a + b, 0) / group.without.length : null;
  const where = [name, `step ${group.step}`, group.domain || "no domain"].filter(Boolean).join(" \u00b7 ");
  const links = others.map((other) => element("button", { type: "button", "data-jump": other.key }, `${other.name} ${signed(other.best)}`));
  return [
    element("p", { class: "where" }, where, " \u00b7 document ", element("span", { class: "mono" }, group.document), ` \u00b7 cut ${group.cut ?? "?"}`),
    links.length ? element("p", { class: "others" }, "same prompt: ", ...links) : null,
    element("p", { class: "context" }, element("bdi", {}, group.context), element("mark", {}, group.tokens.join(""))),
    element("p", { class: "small" }, mean === null ? "not scored without a thought" : `without a thought: log p ${signed(mean)} a token`),
  ].filter(Boolean);
}
