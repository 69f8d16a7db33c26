// Ranks answers by keyboard: their letters from best to worst, "=" between equals. All text goes in as text, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const token = location.hash.slice(1);
const POLL_MS = 1500;

/** The item on show, and the places typed so far: tiers from best to worst, each a list of places. */
let item = null;
let tiers = [];
let tieNext = false;
let busy = false;
let timer = null;
let retrying = false;

async function ask(path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers };
  if (body) {
    options.method = "POST";
    headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || `the server says ${response.status}`);
  return answer;
}

const labeller = () => $("name").value.trim();
const letter = (at) => String.fromCharCode(65 + at);
const draftKey = () => `draft/${labeller()}/${item.id}`;

function element(tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.textContent = text;
  return made;
}

function show(found, live) {
  const same = item && found && item.id === found.id;
  item = found;
  $("item").hidden = !item;
  $("idle").hidden = Boolean(item);
  if (!item) {
    $("idle-text").textContent = live
      ? "Nothing to judge just now. The job is at work; this page waits for it."
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
      box.append(element("span", "letter", letter(at)), element("span", "said", text), element("span", "rank", ""));
      box.addEventListener("click", (event) => choose(at, event.shiftKey));
      return box;
    }),
  );
  $("text").hidden = !writes;
  $("keys").textContent = writes
    ? "Ctrl+Enter sends."
    : "Type the letters from best to worst, with = before an answer as good as the last one. " +
      "Backspace takes the last letter back, Enter sends, S skips, U takes your last verdict back. " +
      "Or click; with Shift, for a tie.";
  const draft = JSON.parse(sessionStorage.getItem(draftKey()) || "null");
  tiers = draft && draft.tiers ? draft.tiers : [];
  $("text").value = draft && draft.text ? draft.text : "";
  tieNext = false;
  ranking();
  if (writes) $("text").focus();
}

const notation = () => tiers.map((tied) => tied.map(letter).join(" = ")).join(" > ");

function ranking() {
  const placed = tiers.flat().length;
  const whole = placed === item.completions.length;
  $("ranking").textContent = notation() + (tieNext ? " = …" : placed > 0 && !whole ? " > …" : "");
  [...$("answers").children].forEach((box, at) => {
    const rank = tiers.findIndex((tied) => tied.includes(at));
    box.classList.toggle("ranked", rank >= 0);
    box.querySelector(".rank").textContent = rank >= 0 ? `#${rank + 1}` : "";
  });
  $("send").disabled = busy || (item.completions.length > 0 && !whole);
}

function keep() {
  sessionStorage.setItem(draftKey(), JSON.stringify({ tiers, text: $("text").value }));
}

function choose(at, tie) {
  if (!item || at >= item.completions.length || tiers.flat().includes(at)) return;
  if ((tie || tieNext) && tiers.length > 0) tiers[tiers.length - 1].push(at);
  else tiers.push([at]);
  tieNext = false;
  keep();
  ranking();
}

function back() {
  if (tieNext) tieNext = false;
  else if (tiers.length > 0) {
    tiers[tiers.length - 1].pop();
    if (tiers[tiers.length - 1].length === 0) tiers.pop();
  }
  keep();
  ranking();
}

async function during(work) {
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
  const said = { labeller: labeller(), item: item.id };
  if (item.completions.length > 0) {
    if (tiers.flat().length !== item.completions.length) return;
    said.ranks = new Array(item.completions.length);
    // A rank is one more than the number of better answers; the server knows answers by their places in the item.
    let better = 0;
    for (const tied of tiers) {
      for (const at of tied) said.ranks[item.completions[at][0]] = better + 1;
      better += tied.length;
    }
  } else {
    said.text = $("text").value;
  }
  during(async () => {
    await ask("api/say", said);
    sessionStorage.removeItem(draftKey());
  });
}

const skip = () => item && during(() => ask("api/say", { labeller: labeller(), item: item.id }));
const undo = () =>
  during(async () => {
    await ask("api/undo", { labeller: labeller() });
    item = null;
  });

async function refresh() {
  clearTimeout(timer);
  if (!labeller()) {
    $("message").textContent = "Say who you are, and it begins.";
    $("name").focus();
    return;
  }
  try {
    const found = await ask(`api/next?labeller=${encodeURIComponent(labeller())}`);
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
  if (item) ranking();
}

async function progress() {
  const now = await ask("api/progress");
  const parts = [`${now.done} of ${now.items} done`, `${now.labellers[labeller()] || 0} by you`];
  for (const [a, b, pairs, kappa] of now.agreement.cohen) parts.push(`κ ${a}/${b} ${kappa.toFixed(2)} on ${pairs} pairs`);
  if (now.agreement.cohen.length > 1 && now.agreement.fleiss !== null) parts.push(`Fleiss' κ ${now.agreement.fleiss.toFixed(2)}`);
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
  if (key === "backspace") back();
  else if (key === "=" && tiers.length > 0) {
    tieNext = true;
    ranking();
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
$("text").addEventListener("input", keep);
$("send").addEventListener("click", send);
$("skip").addEventListener("click", skip);
$("undo").addEventListener("click", undo);
$("undo-idle").addEventListener("click", undo);
$("clear").addEventListener("click", () => {
  tiers = [];
  $("text").value = "";
  keep();
  ranking();
});
$("name").value = localStorage.getItem("labeller") || "";
refresh();
