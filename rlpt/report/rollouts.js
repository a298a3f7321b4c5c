"use strict";
// The data of the rollout browser: inflated once, then filtered and ordered without touching the page.

const READS = ["q", "run", "step", "domain", "finish", "by", "low", "high", "order"];

/** base64 of gzip of JSON -> the table that rlpt/report/rollouts.py wrote. */
async function inflate(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** What best and worst are by: the gain, else the reward. */
function rank(thought) {
  return thought.gain ?? thought.reward ?? -Infinity;
}

/** Names a prompt of a step of a run: what a link to it says. */
function keyOf(group) {
  return [group.run, group.step, group.document, group.cut].join("/");
}

/** The same prompt in the same step, whatever the run. */
function promptOf(group) {
  return keyOf(group).slice(keyOf(group).indexOf("/"));
}

/** Lower case once a group, and only where somebody searches. */
function haystack(group) {
  group.found ??= {
    prompt: [group.document, group.domain, group.tokens.join("")].join("\n").toLowerCase(),
    thoughts: group.thoughts.map((thought) => `${thought.text}\n${thought.prediction}`.toLowerCase()),
  };
  return group.found;
}

/** Indices of the thoughts of a group that a reader asked for. */
function hits(group, wanted) {
  const q = wanted.q.toLowerCase();
  const all = !q || haystack(group).prompt.includes(q);
  return group.thoughts.flatMap((thought, index) => {
    const value = thought[wanted.by];
    const inside =
      (wanted.low === "" || (value !== null && value >= Number(wanted.low))) &&
      (wanted.high === "" || (value !== null && value <= Number(wanted.high)));
    const finished = !wanted.finish || thought.finish === wanted.finish;
    return inside && finished && (all || group.found.thoughts[index].includes(q)) ? [index] : [];
  });
}

/** [{group, hits, pick}] of the groups with a wanted thought, in the wanted order. */
function select(groups, wanted) {
  const found = [];
  for (const group of groups) {
    if (wanted.run !== "" && group.run !== Number(wanted.run)) continue;
    if (wanted.step !== "" && group.step !== Number(wanted.step)) continue;
    if (wanted.domain !== "" && group.domain !== wanted.domain) continue;
    const found_here = hits(group, wanted);
    if (found_here.length) found.push({ group, hits: found_here, pick: found_here[0] });
  }
  return ordered(found, wanted.order);
}

/** Thoughts of a group are best first: its best hit is the first, its worst the last. */
function ordered(items, order) {
  const value = (item) => rank(item.group.thoughts[item.pick]);
  if (order === "best") return items.sort((a, b) => value(b) - value(a));
  if (order === "worst") {
    for (const item of items) item.pick = item.hits.at(-1);
    return items.sort((a, b) => value(a) - value(b));
  }
  return order.startsWith("each") ? ofEachStep(items, order) : items;
}

/** One thought a run and step: its best, median or worst. */
function ofEachStep(items, order) {
  const steps = new Map();
  for (const item of items) {
    const name = `${item.group.run}/${item.group.step}`;
    if (!steps.has(name)) steps.set(name, []);
    for (const index of item.hits) steps.get(name).push({ ...item, pick: index });
  }
  const share = { "each-best": 0, "each-median": 0.5, "each-worst": 1 }[order];
  return [...steps.values()].map((list) => {
    const sorted = list.sort((a, b) => rank(b.group.thoughts[b.pick]) - rank(a.group.thoughts[a.pick]));
    return sorted[Math.floor(share * (sorted.length - 1))];
  });
}

/** What the part of the address after # asks for; everything else stands as it is by default. */
function readFragment(fragment) {
  const given = new URLSearchParams(fragment.includes("=") ? fragment.replace(/^#/, "") : "");
  const wanted = Object.fromEntries(READS.map((name) => [name, given.get(name) ?? ""]));
  return { ...wanted, by: wanted.by || "reward", at: given.get("at") ?? "", thought: Number(given.get("thought") ?? 0) };
}

function writeFragment(wanted) {
  const given = new URLSearchParams();
  for (const name of [...READS, "at"]) if (wanted[name] && !(name === "by" && wanted.by === "reward")) given.set(name, wanted[name]);
  if (wanted.thought) given.set("thought", wanted.thought);
  return `#${given}`;
}
