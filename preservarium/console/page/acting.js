// What pages share on which operators do something, or that are told what comes: asking by POST, and server-sent events.
"use strict";

const POST_TIMEOUT_MS = 130000;

// What a POST answers; where it is refused, an error with `status` and, where there are some, `problems`.
async function post(path, line, timeout_ms = POST_TIMEOUT_MS) {
  const headers = authorized({ "Content-Type": "application/json", Accept: "application/json" });
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(line), signal: AbortSignal.timeout(timeout_ms) });
  let said;
  try { said = await response.json(); } catch { said = { error: `${response.status} from ${path}` }; }
  $("login").hidden = response.status !== 401;
  if (!response.ok) throw Object.assign(new Error(said.error || `refused (${response.status})`), { status: response.status });
  return said;
}

// Server-sent events, read by fetch: an EventSource shows no token. Begins again by itself; `stop()` ends it. `onState(true)` while it runs.
const AGAIN_FIRST_MS = 500;
const AGAIN_MAX_MS = 15000;
function listen(path, onEvent, onState = () => {}) {
  const control = new AbortController();
  let pause_ms = AGAIN_FIRST_MS;
  const read = async () => {
    const response = await fetch(path, { headers: authorized({ Accept: "text/event-stream" }), signal: control.signal });
    if (!response.ok) throw new Error(`refused (${response.status})`);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    onState(true);
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      pause_ms = AGAIN_FIRST_MS;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) onEvent(JSON.parse(part.slice(6)));
    }
  };
  (async () => {
    while (!control.signal.aborted) {
      if (!document.hidden) { try { await read(); } catch { /* begun again below */ } }
      if (control.signal.aborted) return;
      onState(false);
      await new Promise((done) => { setTimeout(done, pause_ms); });
      pause_ms = Math.min(AGAIN_MAX_MS, pause_ms * 2);
    }
  })();
  return { stop: () => { control.abort(); onState(false); } };
}

// The name under which something is done: of who has logged in, else the one that is given, which is kept for the next time.
function actorInto(input) {
  input.value = visitor.name || stored.get(localStorage, "operator");
  input.readOnly = !!visitor.name;
  visitorKnown.then(() => { if (visitor.name) { input.value = visitor.name; input.readOnly = true; } });
}
function actorOf(input) {
  const name = visitor.name || input.value.trim();
  if (!visitor.name) stored.set(localStorage, "operator", name);
  return name;
}

// JSON for people: indented, with instants in words beside µs since the epoch.
const INSTANT_LEAST = 946684800000000;
const INSTANT_MOST = 4102444800000000;
function pretty(value, indent = "") {
  if (Array.isArray(value)) {
    if (!value.length) return "[]";
    if (value.every((v) => v === null || typeof v !== "object") && JSON.stringify(value).length < 100) return JSON.stringify(value);
    return `[\n${value.map((v) => `${indent}  ${pretty(v, `${indent}  `)}`).join(",\n")}\n${indent}]`;
  }
  if (value && typeof value === "object") {
    const entries = Object.entries(value);
    return entries.length ? `{\n${entries.map(([k, v]) => `${indent}  ${JSON.stringify(k)}: ${pretty(v, `${indent}  `)}`).join(",\n")}\n${indent}}` : "{}";
  }
  if (Number.isInteger(value) && value > INSTANT_LEAST && value < INSTANT_MOST) return `${value}  // ${instant(value)}`;
  return JSON.stringify(value) ?? "null";
}

const sizeText = (n) => (n === null || n === undefined ? "–" : n < 1024 ? `${n} B` : n < 1048576 ? `${(n / 1024).toFixed(1)} KiB` : n < 1073741824 ? `${(n / 1048576).toFixed(1)} MiB` : `${(n / 1073741824).toFixed(2)} GiB`);
