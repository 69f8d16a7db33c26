// Curves of jobs over their steps, as SVG.

import { element, number } from "./api.js";

const WIDTH = 460;
const HEIGHT = 176;
const LEFT = 44;
const BOTTOM = 18;
const SVG = "http://www.w3.org/2000/svg";

/** The charts, by title: names of the history's numbers, with an optional band of two others. */
const CHARTS = [
  { title: "Reward", names: ["reward"], band: ["reward_p10", "reward_p90"], held: "reward" },
  { title: "KL to the reference (nats)", names: ["kl"], held: "kl" },
  { title: "Loss", names: ["loss"], held: "loss" },
  { title: "Preference accuracy", names: ["preference_accuracy"], held: "accuracy" },
  { title: "Implicit reward margin", names: ["margin"], held: "margin" },
  { title: "Gradient weight of pairs", names: ["gradient_weight"] },
  { title: "Likelihood of chosen and rejected (nats)", names: ["chosen_logprob", "rejected_logprob"] },
  { title: "Score margin of pairs", names: ["score_margin"] },
  { title: "Length of completions (tokens)", names: ["completion_tokens"], band: ["completion_tokens_p10", "completion_tokens_p90"] },
  { title: "Share truncated", names: ["truncated"] },
  { title: "Entropy (nats)", names: ["entropy"] },
  { title: "Negative log-likelihood (nats)", names: ["nll"] },
  { title: "Gradient norm", names: ["gradient_norm"] },
  { title: "Learning rate", names: ["learning_rate"] },
  { title: "Clipped share", names: ["clip_fraction"] },
  { title: "Explained variance of the critic", names: ["explained_variance"] },
  { title: "Critic's loss", names: ["value_loss"] },
  { title: "Mismatch of sampler and trainer (nats)", names: ["mismatch_kl"] },
  { title: "Seconds of a step", names: ["seconds.total", "seconds.generate", "seconds.forward", "seconds.backward", "seconds.reward"] },
];

const DASHES = ["", "5 3", "2 2", "8 3 2 3", "1 3"];

function value(line, name) {
  const found = name.split(".").reduce((at, key) => (at ? at[key] : undefined), line);
  return typeof found === "number" && Number.isFinite(found) ? found : null;
}

function svg(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, text] of Object.entries(attributes)) node.setAttribute(key, text);
  return node;
}

/** The points of a series, and the same smoothed by an exponential average that is corrected for its start. */
function series(lines, name, smoothing) {
  const points = [];
  let sum = 0;
  let weight = 0;
  for (const line of lines) {
    const y = value(line, name);
    if (y === null) continue;
    sum = smoothing * sum + (1 - smoothing) * y;
    weight = smoothing * weight + (1 - smoothing);
    points.push({ x: line.step, y, smooth: sum / weight });
  }
  return points;
}

/** At most one point for each pixel. */
function thin(points) {
  const every = Math.ceil(points.length / (WIDTH - LEFT));
  return every > 1 ? points.filter((_, at) => at % every === 0 || at === points.length - 1) : points;
}

function path(points, scale, key) {
  return points.map((p, at) => `${at ? "L" : "M"}${scale.x(p.x).toFixed(1)} ${scale.y(p[key]).toFixed(1)}`).join("");
}

/** Round values between two bounds. */
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const all = [];
  for (let y = Math.ceil(low / step) * step; y <= high + step * 1e-9; y += step) all.push(Math.abs(y) < step * 1e-9 ? 0 : y);
  return all;
}

function draw(chart, jobs, smoothing) {
  const drawn = [];
  for (const job of jobs) {
    chart.names.forEach((name, at) => {
      const points = series(job.lines, name, smoothing);
      if (points.length) drawn.push({ job, name, points, dash: DASHES[at] });
    });
    const held = (job.evaluations || []).map((e) => ({ x: e.step, y: value(e, chart.held || "") }));
    const points = held.filter((p) => p.y !== null);
    if (chart.held && points.length) drawn.push({ job, name: `held out: ${chart.held}`, points, dots: true });
  }
  if (!drawn.length) return null;
  const bands = chart.band
    ? jobs.map((job) => ({ job, low: series(job.lines, chart.band[0], smoothing), high: series(job.lines, chart.band[1], smoothing) }))
    : [];
  const xs = drawn.flatMap((d) => [d.points[0].x, d.points[d.points.length - 1].x]);
  let low = Infinity;
  let high = -Infinity;
  const reach = (y) => { low = Math.min(low, y); high = Math.max(high, y); };
  drawn.forEach((d) => d.points.forEach((p) => reach(p.smooth ?? p.y)));
  bands.forEach((b) => [...b.low, ...b.high].forEach((p) => reach(p.smooth)));
  if (low === high) { low -= Math.abs(low) * 0.1 || 1; high += Math.abs(high) * 0.1 || 1; }
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const scale = {
    x: (x) => LEFT + ((x - first) / (last - first || 1)) * (WIDTH - LEFT - 6),
    y: (y) => 6 + (1 - (y - low) / (high - low)) * (HEIGHT - BOTTOM - 8),
    step: (px) => first + ((px - LEFT) / (WIDTH - LEFT - 6)) * (last - first),
  };
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": chart.title });
  for (const y of ticks(low, high, 4)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH, y1: scale.y(y), y2: scale.y(y) }));
    const text = svg("text", { x: LEFT - 4, y: scale.y(y) + 3, "text-anchor": "end" });
    text.textContent = number(y);
    picture.append(text);
  }
  for (const [x, anchor] of [[first, "start"], [last, "end"]]) {
    const text = svg("text", { x: scale.x(x), y: HEIGHT - 4, "text-anchor": anchor });
    text.textContent = `step ${x}`;
    picture.append(text);
  }
  for (const band of bands) {
    if (!band.low.length) continue;
    const [lower, upper] = [thin(band.low), thin(band.high)];
    const d = `${path(upper, scale, "smooth")}${path(lower.slice().reverse(), scale, "smooth").replace("M", "L")}Z`;
    picture.append(svg("path", { class: "band", d, fill: band.job.colour }));
  }
  for (const { job, points, dash, dots } of drawn) {
    if (dots) {
      points.forEach((p) => picture.append(svg("circle", { cx: scale.x(p.x), cy: scale.y(p.y), r: 2.5, fill: job.colour })));
      continue;
    }
    const shown = thin(points);
    if (smoothing > 0) picture.append(svg("path", { class: "raw", d: path(shown, clamped(scale), "y"), stroke: job.colour }));
    picture.append(svg("path", { class: "line", d: path(shown, scale, "smooth"), stroke: job.colour, "stroke-dasharray": dash }));
  }
  const readings = element("span", "");
  const read = (step) => {
    const at = (points) => points.reduce((near, p) => (Math.abs(p.x - step) < Math.abs(near.x - step) ? p : near));
    const several = chart.names.length > 1 || drawn.some((d) => d.dots);
    readings.textContent = drawn.map((d) => {
      const p = at(d.points);
      const name = several ? `${d.name.replace("seconds.", "")} ` : "";
      return `${jobs.length > 1 ? `${d.job.name} ` : ""}${name}${number(p.y)}`;
    }).join(" · ");
  };
  read(last);
  const cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  picture.append(cursor);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * WIDTH;
    const step = Math.round(Math.min(Math.max(scale.step(px), first), last));
    cursor.setAttribute("x1", scale.x(step));
    cursor.setAttribute("x2", scale.x(step));
    read(step);
  });
  picture.addEventListener("pointerleave", () => { cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); read(last); });
  const caption = element("figcaption", "", element("b", "", chart.title), readings);
  return element("figure", "", caption, picture);
}

/** The raw line may leave the bounds of the smoothed one. */
function clamped(scale) {
  return { x: scale.x, y: (y) => Math.min(Math.max(scale.y(y), 2), HEIGHT - BOTTOM) };
}

/** Draws every chart that has numbers; returns how many there are. */
export function drawAll(into, jobs, smoothing) {
  const figures = CHARTS.map((chart) => draw(chart, jobs, smoothing)).filter(Boolean);
  into.replaceChildren(...figures);
  return figures.length;
}
