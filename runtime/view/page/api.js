// Requests to the viewer's server.

const token = location.hash.slice(1);

/** Whether the page may ask for changes: it was opened by its full URL. */
export const mayChange = token !== "";

/** Sends a GET, or a POST if there is a body, and returns the response's JSON. */
export async function request(path, body) {
  const options = { headers: token ? { Authorization: `Bearer ${token}` } : {} };
  if (body) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  const value = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(value.error || `the server answered with status ${response.status}`);
  return value;
}

export const $ = (id) => document.getElementById(id);

/** An element. Texts become text nodes: markup in a completion stays text. */
export function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function number(x) {
  if (x === null || x === undefined || !Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return x.toExponential(2);
  return String(Number(x.toPrecision(4)));
}

/** Shows a failure, or nothing. */
export function say(text) {
  $("message").textContent = text;
}

/** Runs something and shows its failure. */
export async function attempt(work) {
  try {
    const value = await work();
    say("");
    return value;
  } catch (error) {
    say(error.message);
    return null;
  }
}
