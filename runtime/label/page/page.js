// Ranking by keyboard: the letters of the answers from best to worst, "=" before a tie. Texts of prompts and answers are
// inserted as text nodes, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const token = location.hash.slice(1);

/** Interval, in milliseconds, of requests while there is nothing to label or the server does not answer. */
const POLL_MS = 1500;

/** The item on show, as the server sent it. */
let item = null;
/** The ranking typed so far: tiers from best to worst, each a list of display positions. */
let tiers = [];
/** Whether the next letter joins the last tier. */
let tieNext = false;
/** Whether a request that changes something is in flight. */
let busy = false;
let timer = null;
/** Whether the last refresh failed. */
let retrying = false;

/** Sends a GET, or a POST if there is a body, and returns the response's JSON. */
async function request(path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers };
  if (body) {
    options.method = "POST";
    headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  const value = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(value.error || `the server answered with status ${response.status}`);
  return value;
}

const labeller = () => $("name").value.trim();
const letter = (at) => String.fromCharCode(65 + at);
const draftKey = () => `draft/${labeller()}/${item.id}`;

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.textContent = text;
  return node;
}

/** Shows an item, or that there is none. `live`: items may be added later. */
function show(found, live) {
  const same = item && found && item.id === found.id;
  item = found;
  $("item").hidden = !item;
  $("idle").hidden = Boolean(item);
  if (!item) {
    $("idle-text").textContent = live
      ? "There is nothing to label now. This page shows the next item when the job has one."
      : "That was all. Thank you!";
    return;
  }
  if (same) return;
  const writes = item.completions.length === 0;
  $("task").textContent = writes ? "Write the answer that the model should have given." : "Which answers are better?";
  const turns = item.prompt.Text !== undefined ? [{ role: "", content: item.prompt.Text }] : item.prompt.Conversation;
  $("prompt").replaceChildren(
    ...turns.map((turn) => {
      const box = element("div", "turn", "");
      if (turn.role) box.append(element("b", "", turn.role));
      box.append(document.createTextNode(turn.content));
      return box;
    }),
  );
  $("answers").replaceChildren(
    ...item.completions.map(([, text], at) => {
      const box = element("li", "", "");
      box.tabIndex = 0;
      box.append(element("span", "letter", letter(at)), element("span", "text", text), element("span", "rank", ""));
      box.addEventListener("click", (event) => choose(at, event.shiftKey));
      return box;
    }),
  );
  $("text").hidden = !writes;
  $("keys").textContent = writes
    ? "Ctrl+Enter sends."
    : "Type the letters of the answers from best to worst, and = before an answer that ties with the one before it. " +
      "Backspace removes the last letter, Enter sends, S skips, U undoes your last label. " +
      "Or click the answers; hold Shift for a tie.";
  const draft = JSON.parse(sessionStorage.getItem(draftKey()) || "null");
  tiers = draft && draft.tiers ? draft.tiers : [];
  $("text").value = draft && draft.text ? draft.text : "";
  tieNext = false;
  showRanking();
  if (writes) $("text").focus();
}

const notation = () => tiers.map((tied) => tied.map(letter).join(" = ")).join(" > ");

/** Shows the ranking typed so far and whether it can be sent. */
function showRanking() {
  const placed = tiers.flat().length;
  const complete = placed === item.completions.length;
  $("ranking").textContent = notation() + (tieNext ? " = …" : placed > 0 && !complete ? " > …" : "");
  [...$("answers").children].forEach((box, at) => {
    const rank = tiers.findIndex((tied) => tied.includes(at));
    box.classList.toggle("ranked", rank >= 0);
    box.querySelector(".rank").textContent = rank >= 0 ? `#${rank + 1}` : "";
  });
  $("send").disabled = busy || (item.completions.length > 0 && !complete);
}

/** Keeps the draft over a reload of the page. */
function saveDraft() {
  sessionStorage.setItem(draftKey(), JSON.stringify({ tiers, text: $("text").value }));
}

/** Appends an answer to the ranking, by display position. */
function choose(at, tie) {
  if (!item || at >= item.completions.length || tiers.flat().includes(at)) return;
  if ((tie || tieNext) && tiers.length > 0) tiers[tiers.length - 1].push(at);
  else tiers.push([at]);
  tieNext = false;
  saveDraft();
  showRanking();
}

/** Removes what was typed last. */
function removeLast() {
  if (tieNext) tieNext = false;
  else if (tiers.length > 0) {
    tiers[tiers.length - 1].pop();
    if (tiers[tiers.length - 1].length === 0) tiers.pop();
  }
  saveDraft();
  showRanking();
}

/** Runs a request that changes something, unless one is in flight, and refreshes the page. */
async function change(work) {
  if (busy) return;
  busy = true;
  $("message").textContent = "";
  try {
    await work();
  } catch (error) {
    $("message").textContent = error.message;
  }
  busy = false;
  await refresh();
}

function send() {
  if (!item) return;
  const label = { labeller: labeller(), item: item.id };
  if (item.completions.length > 0) {
    if (tiers.flat().length !== item.completions.length) return;
    label.ranks = new Array(item.completions.length);
    // An answer's rank is one more than the number of better answers. The server wants ranks in the item's order, not in
    // display order.
    let better = 0;
    for (const tied of tiers) {
      for (const at of tied) label.ranks[item.completions[at][0]] = better + 1;
      better += tied.length;
    }
  } else {
    label.text = $("text").value;
  }
  change(async () => {
    await request("api/label", label);
    sessionStorage.removeItem(draftKey());
  });
}

const skip = () => item && change(() => request("api/label", { labeller: labeller(), item: item.id }));
const undo = () =>
  change(async () => {
    await request("api/undo", { labeller: labeller() });
    item = null;
  });

/** Fetches and shows the next item. */
async function refresh() {
  clearTimeout(timer);
  if (!labeller()) {
    $("message").textContent = "Say who you are: type your name above and press Enter.";
    $("name").focus();
    return;
  }
  try {
    const found = await request(`api/next?labeller=${encodeURIComponent(labeller())}`);
    if (retrying) $("message").textContent = "";
    retrying = false;
    show(found.item, found.live);
    await progress();
    if (!found.item && found.live) timer = setTimeout(refresh, POLL_MS);
  } catch (error) {
    $("message").textContent = `${error.message}; trying again`;
    retrying = true;
    timer = setTimeout(refresh, POLL_MS);
    return;
  }
  if (item) showRanking();
}

/** Fetches and shows counts and agreement. */
async function progress() {
  const now = await request("api/progress");
  const parts = [`${now.done} of ${now.items} done`, `${now.labellers[labeller()] || 0} by you`];
  const { cohen, fleiss } = now.agreement;
  for (const [a, b, pairs, kappa] of cohen) parts.push(`κ ${a}/${b} ${kappa.toFixed(2)} on ${pairs} pairs`);
  if (cohen.length > 1 && fleiss !== null) parts.push(`Fleiss' κ ${fleiss.toFixed(2)}`);
  $("progress").textContent = parts.join(" · ");
}

document.addEventListener("keydown", (event) => {
  const typing = event.target === $("name") || event.target === $("text");
  if (event.target === $("text") && event.key === "Enter" && (event.ctrlKey || event.metaKey)) return send();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "u") return undo();
  if (!item) return;
  if (key === "enter" && event.target.tagName !== "BUTTON") return send();
  if (key === "s") return skip();
  if (item.completions.length === 0) return;
  if (key === "backspace") removeLast();
  else if (key === "=" && tiers.length > 0) {
    tieNext = true;
    showRanking();
  } else if (/^[a-z]$/.test(key)) choose(key.charCodeAt(0) - 97, false);
});
$("who").addEventListener("submit", (event) => {
  event.preventDefault();
  $("name").blur();
});
$("name").addEventListener("change", () => {
  localStorage.setItem("labeller", labeller());
  $("message").textContent = "";
  item = null;
  refresh();
});
$("text").addEventListener("input", saveDraft);
$("send").addEventListener("click", send);
$("skip").addEventListener("click", skip);
$("undo").addEventListener("click", undo);
$("undo-idle").addEventListener("click", undo);
$("clear").addEventListener("click", () => {
  tiers = [];
  $("text").value = "";
  saveDraft();
  showRanking();
});
$("name").value = localStorage.getItem("labeller") || "";
refresh();
