// The list of a job's answers, and one of them with its verdicts.

import { $, attempt, element, mayChange, number, request } from "./api.js";

const PAGE = 100;
/** Log-ratio, in nats, at which a token has its full colour. */
const FULL_COLOUR = 2;

/** Listed records, the chosen one's place in them, and the id of their job. */
const state = { job: null, records: [], matched: 0, chosen: -1, generation: 0 };

const letter = (at) => String.fromCharCode(65 + at);

function query(offset) {
  const form = new FormData($("filter"));
  const parameters = new URLSearchParams();
  for (const [key, text] of form) if (text !== "") parameters.set(key, text);
  parameters.set("offset", offset);
  parameters.set("limit", PAGE);
  return parameters;
}

/** Lists a job's answers from the start; keeps the list if nothing has changed. */
export async function list(job, { quiet = false } = {}) {
  // A search reads the whole ledger, so it is not repeated by itself.
  if (quiet && query(0).get("text") && state.job === job) return;
  const generation = ++state.generation;
  const page = await attempt(() => request(`/api/jobs/${job}/answers?${query(0)}`));
  if (!page || generation !== state.generation) return;
  const same = state.job === job && quiet && state.matched === page.matched;
  const more = page.complete ? "" : query(0).get("text") ? ", the first that match" : ", more are being read";
  $("found").textContent = `${page.matched} of ${page.records} comparisons${more}`;
  if (!page.complete && !query(0).get("text")) setTimeout(() => state.generation === generation && list(job, { quiet: true }), 200);
  if (same) return;
  const before = state.records[state.chosen];
  Object.assign(state, { job, records: page.answers, matched: page.matched, chosen: -1 });
  $("list").replaceChildren(...page.answers.map(row));
  const kept = before && page.answers.findIndex((r) => r.step === before.step && r.index === before.index);
  if (quiet && kept >= 0) mark(kept);
  else if (page.answers.length && (!quiet || !before)) choose(0);
  if (!page.answers.length && page.complete) {
    $("answer").replaceChildren(element("p", "quiet", page.records
      ? "No answer passes the filter."
      : "The ledger is empty: the job compares no completions, or has not begun."));
  }
}

/** Lists the next page, when the end of the list is seen. */
async function extend() {
  if (state.records.length >= state.matched || state.extending) return;
  state.extending = true;
  const { job, generation } = state;
  const page = await attempt(() => request(`/api/jobs/${job}/answers?${query(state.records.length)}`));
  state.extending = false;
  if (!page || generation !== state.generation) return;
  const from = state.records.length;
  state.records.push(...page.answers);
  $("list").append(...page.answers.map((record, at) => row(record, from + at)));
}

function row(record, at) {
  const scores = record.scores[0] === record.scores[1]
    ? number(record.scores[1])
    : `${number(record.scores[1])} / ${number(record.scores[0])}`;
  const meta = element("div", "meta", element("span", "", `step ${record.step} #${record.index}`), element("span", "", scores));
  if (record.tie) meta.append(element("span", "bad", "tie"));
  if (record.disagreement > 0) meta.append(element("span", "", `disagreement ${number(record.disagreement)}`));
  if (record.overruled_by) meta.append(element("span", "good", `overruled by ${record.overruled_by}`));
  const item = element("li", "", element("div", "prompt", record.prompt), meta);
  item.addEventListener("click", () => choose(at));
  return item;
}

function mark(at) {
  const items = $("list").children;
  items[state.chosen]?.classList.remove("chosen");
  state.chosen = at;
  items[at]?.classList.add("chosen");
  items[at]?.scrollIntoView({ block: "nearest" });
}

async function choose(at) {
  mark(at);
  const record = state.records[at];
  const whole = await attempt(() => request(`/api/jobs/${state.job}/answers/${record.step}/${record.index}`));
  if (whole && state.records[state.chosen] === record) $("answer").replaceChildren(...detail(whole));
}

/** Chooses the next answer, or the one before. */
export function move(by) {
  const at = Math.min(Math.max(state.chosen + by, 0), state.records.length - 1);
  if (at >= 0 && at !== state.chosen) choose(at);
  if (at > state.records.length - 10) extend();
}

export function turns(messages) {
  return messages.map((turn) => element("div", "turn", element("b", "", turn.role), turn.content));
}

function detail(record) {
  const date = new Date(record.time_ms).toLocaleString();
  const about = `step ${record.step} #${record.index} · row ${record.row} · policy version ${record.policy_version} · ${record.judge} · ${date}`;
  const completions = element("div", "completions", ...record.completions.map((text, at) => completion(record, text, at)));
  const parts = [element("p", "quiet", about), ...turns(record.prompt), completions];
  const colour = element("button", "", "Colour tokens (t)");
  colour.type = "button";
  colour.id = "colour";
  colour.disabled = !mayChange;
  colour.addEventListener("click", () => record.completions.forEach((_, at) => tokens(record, at)));
  parts.push(element("p", "quiet", colour, " log-probability under the policy of now, against the reference: green is likelier than it was, red less likely."));
  parts.push(...record.exchanges.map(exchange));
  if (record.completions.length > 1) parts.push(overruling(record));
  return parts;
}

function completion(record, text, at) {
  const [chosen, rejected] = record.pair || [];
  const verdict = { [chosen]: "chosen", [rejected]: "rejected" }[at];
  const heading = element("h3", "", letter(at), element("span", "", number(record.scores[at])));
  if (verdict) heading.append(element("span", verdict === "chosen" ? "good" : "bad", verdict));
  if (!record.pair && record.completions.length > 1 && at === 0) heading.append(element("span", "quiet", "tie: no pair"));
  const body = element("div", "text", text);
  body.id = `text-${at}`;
  return element("section", `completion ${verdict || ""}`, heading, body, element("p", "reason", record.reasons[at] || ""));
}

/** Colours the tokens of a completion by the log-ratio of policy and reference. */
async function tokens(record, at) {
  const where = { step: record.step, index: record.index, completion: at };
  const scored = await attempt(() => request(`/api/jobs/${state.job}/score`, where));
  const body = $(`text-${at}`);
  if (!scored || !body) return;
  body.replaceChildren(...scored.tokens.map((token) => {
    const node = element("span", "token", token.text);
    const ratio = token.reference === null ? 0 : token.policy - token.reference;
    const strength = Math.min(Math.abs(ratio) / FULL_COLOUR, 1) * 0.55;
    node.style.backgroundColor = `rgb(${ratio >= 0 ? "40 160 90" : "210 60 50"} / ${strength})`;
    const reference = token.reference === null ? "" : `, reference ${number(token.reference)}, ratio ${number(ratio)}`;
    node.title = `policy ${number(token.policy)}${reference} nats`;
    return node;
  }));
}

function exchange(e) {
  const shown = e.shown.map(letter).join(", ");
  const verdict = e.first === null ? "" : ` · p(the first is better) = ${number(e.first)}`;
  return element("div", "exchange",
    element("div", "quiet", `${e.judge} was shown ${shown || "it"}${verdict}`),
    element("pre", "", e.reply));
}

function overruling(record) {
  const form = element("form", "overrule", element("span", "", record.overruled
    ? `${record.overruled.judge} ranks ${record.overruled.ranks.map((r, at) => `${letter(at)} ${r}`).join(", ")}. Rank again:`
    : "Overrule, rank 1 is best:"));
  const ranks = record.completions.map((_, at) => {
    const input = element("input", "");
    Object.assign(input, { type: "number", min: 1, max: record.completions.length, required: true });
    input.value = record.overruled ? record.overruled.ranks[at] : "";
    form.append(element("label", "", `${letter(at)} `, input));
    return input;
  });
  const name = element("input", "");
  Object.assign(name, { placeholder: "your name", maxLength: 40, required: true, value: localStorage.getItem("name") || "" });
  name.autocomplete = "username";
  const send = element("button", "", "Keep in the ledger");
  send.disabled = !mayChange;
  if (!mayChange) send.title = "open the page by its full URL, with the part after #";
  form.append(name, send);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    localStorage.setItem("name", name.value.trim());
    const body = { step: record.step, index: record.index, person: name.value.trim(), ranks: ranks.map((r) => Number(r.value)) };
    if (await attempt(() => request(`/api/jobs/${state.job}/overrule`, body))) {
      await list(state.job);
      const at = state.records.findIndex((r) => r.step === record.step && r.index === record.index);
      if (at >= 0) choose(at);
    }
  });
  return form;
}

/** The held-out prompts with the first answer and the newest one. */
export function heldOut(evaluations, sort) {
  const first = new Map();
  const newest = new Map();
  for (const evaluation of evaluations) {
    for (const sample of evaluation.samples || []) {
      const known = { ...sample, step: evaluation.step };
      if (!first.has(sample.prompt)) first.set(sample.prompt, known);
      newest.set(sample.prompt, known);
    }
  }
  const pairs = [...newest.values()].map((now) => ({ now, before: first.get(now.prompt) }));
  const change = (pair) => Math.abs(pair.now.score - pair.before.score);
  pairs.sort((a, b) => ({
    best: b.now.score - a.now.score,
    worst: a.now.score - b.now.score,
    changed: change(b) - change(a),
  })[sort]);
  const side = (answer) => element("section", "completion",
    element("h3", "", `step ${answer.step}`, element("span", "", number(answer.score))),
    element("div", "text", answer.completion));
  return pairs.flatMap(({ now, before }) => [
    element("div", "turn", element("b", "", "prompt"), now.prompt),
    element("div", "pair", side(before), side(now)),
  ]);
}

export function begin() {
  let timer = null;
  $("filter").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => state.job !== null && list(state.job), 200);
  });
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  $("list").addEventListener("scroll", () => {
    const { scrollTop, clientHeight, scrollHeight } = $("list");
    if (scrollTop + clientHeight > scrollHeight - 400) extend();
  });
}
