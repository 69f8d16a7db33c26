// The viewer: jobs, their curves, answers and held-out answers. Texts are inserted as text nodes, never as HTML.

import { $, attempt, element, mayChange, number, request } from "./api.js";
import { begin, heldOut, list, move } from "./answers.js";
import { drawAll } from "./charts.js";

/** Interval of requests in milliseconds. */
const POLL_MS = 1500;
const COLOURS = ["#2f6fde", "#d9822b", "#2a9d5c", "#b0479a", "#c23b3b", "#5f6b7a", "#8a6d1d", "#1f9aa8"];
const TABS = ["curves", "answers", "evaluations"];

/** Jobs by id: what the server says of them, their lines and evaluations, and whether their curves are drawn. */
const jobs = [];
let chosen = 0;
let tab = "curves";

async function refresh() {
  const found = await attempt(() => request("/api/jobs"));
  if (!found) return;
  found.forEach((job, id) => {
    const known = jobs[id] || { lines: [], stride: 1, evaluations: [], drawn: true, colour: COLOURS[id % COLOURS.length] };
    jobs[id] = Object.assign(known, job, { id });
  });
  showJobs();
  if (tab === "answers") await list(chosen, { quiet: true });
  else await numbers();
}

/** Fetches what is new of the curves and evaluations, and draws them. */
async function numbers() {
  const shown = jobs.filter((job) => job.drawn && !job.error);
  await Promise.all(shown.map(async (job) => {
    const last = job.lines.length ? job.lines[job.lines.length - 1].step : 0;
    let news = await attempt(() => request(`/api/jobs/${job.id}/curves?after=${last}`));
    // A thinned history, or one that went back to a checkpoint, is fetched again.
    if (news && last && (news.stride !== job.stride || (job.status.step < last))) {
      job.lines = [];
      news = await attempt(() => request(`/api/jobs/${job.id}/curves`));
    }
    if (news) {
      job.lines.push(...news.lines);
      job.stride = news.stride;
    }
    job.evaluations = (await attempt(() => request(`/api/jobs/${job.id}/evaluations`))) || [];
  }));
  if (tab === "curves") draw();
  if (tab === "evaluations") evaluations();
}

function draw() {
  const count = drawAll($("charts"), jobs.filter((job) => job.drawn && !job.error), Number($("smooth").value));
  $("no-curves").hidden = count > 0;
}

function evaluations() {
  const of = heldOut(jobs[chosen]?.evaluations || [], $("evaluation-sort").value);
  const none = element("p", "quiet", "There are no held-out answers; `evaluation.every_steps` asks for them.");
  $("held-out").replaceChildren(...(of.length ? of : [none]));
}

function condition(job) {
  const { done, step, steps } = job.status;
  if (!job.running) return done || (steps && step >= steps) ? "done" : "does not run";
  if (job.status.paused) return "paused";
  const wait = (job.status.waiting || [])[0];
  return wait ? `waits ${Math.round(wait.seconds)} s for ${wait.wait}` : "runs";
}

function showJobs() {
  $("jobs").replaceChildren(...jobs.map((job) => {
    const item = element("li", `${job.id === chosen ? "chosen" : ""} ${job.drawn ? "" : "hidden-job"}`);
    item.style.setProperty("--job", job.colour);
    const name = element("button", "name", job.name || job.directory);
    name.type = "button";
    name.title = job.directory;
    name.addEventListener("click", () => choose(job.id));
    item.append(name);
    if (job.error) {
      item.append(element("p", "bad", job.error));
      return item;
    }
    const { step, steps, algorithm, last, checkpoint, memory } = job.status;
    const progress = element("progress", "");
    Object.assign(progress, { value: step, max: steps || 1 });
    const seconds = last?.seconds?.total;
    const left = job.running && seconds ? `, ${duration((steps - step) * seconds)} left` : "";
    const peak = memory?.measured_peak ? ` · ${Math.round(memory.measured_peak / 2 ** 20)} MiB` : "";
    const saved = checkpoint === null || checkpoint === undefined ? "no checkpoint" : `checkpoint ${checkpoint}`;
    item.append(progress,
      element("p", "", `${algorithm} · step ${step} of ${steps} · ${condition(job)}${left}`),
      element("p", "", `reward ${number(last?.reward)} · KL ${number(last?.kl)} · ${saved}${peak}`));
    item.append(buttons(job));
    return item;
  }));
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function buttons(job) {
  const bar = element("div", "buttons");
  const add = (text, act, enabled = true) => {
    const button = element("button", "", text);
    button.type = "button";
    button.disabled = !enabled;
    button.addEventListener("click", act);
    bar.append(button);
  };
  if (jobs.length > 1) {
    add(job.drawn ? "Hide curves" : "Show curves", () => { job.drawn = !job.drawn; showJobs(); numbers(); });
  }
  if (job.running) {
    const pause = job.status.paused ? "unpause" : "pause";
    add(job.status.paused ? "Go on" : "Pause", () => control(job, pause), mayChange);
    add("Checkpoint now", () => control(job, "checkpoint"), mayChange);
    add("Stop", () => confirm(`Stop ${job.name} with a checkpoint?`) && control(job, "stop"), mayChange);
  }
  return bar;
}

async function control(job, action) {
  if (!mayChange || !job?.running) return;
  if (await attempt(() => request(`/api/jobs/${job.id}/control`, { action }))) await refresh();
}

function choose(id) {
  chosen = id;
  showJobs();
  show(tab);
}

function show(which) {
  tab = which;
  for (const name of TABS) {
    $(name).hidden = name !== which;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === which));
  }
  if (which === "answers") list(chosen);
  else numbers();
}

const KEYS = {
  1: () => show("curves"),
  2: () => show("answers"),
  3: () => show("evaluations"),
  j: () => move(1),
  k: () => move(-1),
  t: () => $("colour")?.click(),
  J: () => choose((chosen + 1) % jobs.length),
  p: () => control(jobs[chosen], jobs[chosen]?.status?.paused ? "unpause" : "pause"),
  c: () => control(jobs[chosen], "checkpoint"),
  "/": () => { show("answers"); $("search").focus(); },
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.key === "Escape") document.activeElement.blur();
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const act = KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

for (const name of TABS) $(`tab-${name}`).addEventListener("click", () => show(name));
$("help").addEventListener("click", () => $("keys").showModal());
$("smooth").addEventListener("input", draw);
$("evaluation-sort").addEventListener("change", evaluations);
begin();

async function poll() {
  if (!document.hidden) await refresh();
  setTimeout(poll, POLL_MS);
}
await refresh();
show("curves");
setTimeout(poll, POLL_MS);
