// What all pages share: elements made of text nodes only, numbers and times for people, asking the server, pages of a list, light and dark.
// Names, messages and values come from devices and registries, so nothing of them is ever parsed as HTML.
"use strict";

// A poll that takes longer is given up, so that a stuck server shows as one.
const TIMEOUT_MS = 8000;

const $ = (id) => document.getElementById(id);

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

// New children; the link that had the focus, or the one in its place, keeps it.
function refill(node, ...children) {
  const link = node.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  node.replaceChildren(...children);
  if (link) [...node.querySelectorAll("a")].find((a) => a.getAttribute("href") === link)?.focus();
}

// An SVG of one path, for those who see it.
function drawing(viewBox, attributes) {
  const [svg, path] = ["svg", "path"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  for (const [name, value] of Object.entries({ viewBox, ...attributes, "aria-hidden": "true" })) svg.setAttribute(name, value);
  svg.append(path);
  return [svg, path];
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
function count(n) {
  if (n === null || n === undefined || Number.isNaN(n)) return "–";
  return n >= 100000 ? short.format(n) : whole.format(n);
}
function rate(n) {
  if (n === null || n === undefined) return "–";
  return n > 0 && n < 10 ? n.toFixed(1) : count(n);
}
function number(v) {
  if (typeof v !== "number") return String(v ?? "–");
  if (Number.isInteger(v) && Math.abs(v) < 1e12) return whole.format(v).replaceAll(",", " ");
  return Number(v.toPrecision(6)).toString();
}
function age(us, now_us) {
  if (!us) return "never";
  const s = Math.round((now_us - us) / 1e6);
  if (s < -1) return `in ${span(-s)}`;
  return span(Math.max(0, s));
}
function span(s) {
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} d`;
}

// A text with commands between backticks, as nodes.
const worded = (text) => String(text).split("`").map((part, i) => (i % 2 ? el("code", { text: part }) : part));

function instant(us) {
  return us ? `${new Date(us / 1000).toISOString().replace("T", " ").slice(0, 19)} UTC` : null;
}

async function get(path) {
  const response = await fetch(path, { signal: AbortSignal.timeout(TIMEOUT_MS), headers: authorized({ Accept: "application/json" }) });
  const body = await response.json();
  $("login").hidden = response.status !== 401;
  if (!response.ok) throw Object.assign(new Error(body.error || `${response.status} from ${path}`), { status: response.status });
  return body;
}

// ---- operators: who acts, what is said of it ------------------------------------------------------------------------

const stored = {
  get(kind, name) { try { return kind.getItem(name) || ""; } catch { return ""; } },
  set(kind, name, value) { try { value ? kind.setItem(name, value) : kind.removeItem(name); } catch { /* storage is switched off: asked again next time */ } },
};

// The token is kept for the tab, the name for the next time.
function authorized(headers) {
  const token = stored.get(sessionStorage, "operator-token");
  return token ? { ...headers, Authorization: `Bearer ${token}` } : headers;
}
function fault(text) {
  $("d-fault").hidden = !text;
  $("d-fault").textContent = text;
}
// What an operator asks for in the dialog, nothing where it was refused, which the dialog says then.
const ACT_TIMEOUT_MS = 30000;
async function act(path, line) {
  $("d-do").disabled = true;
  fault("");
  // As it was typed: where storage is switched off, nothing is kept of it.
  const token = $("d-token").value.trim();
  const headers = { "Content-Type": "application/json", Accept: "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  try {
    const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(line), signal: AbortSignal.timeout(ACT_TIMEOUT_MS) });
    const said = await response.json();
    if (response.status === 401) {
      $("d-login").hidden = false;
      fault(token ? "The operator token is wrong." : "An operator token is needed.");
      $("d-token").focus();
      return null;
    }
    if (response.ok) return said;
    fault(said.error || `refused (${response.status})`);
  } catch (e) {
    fault(`The worker does not answer: ${e.message}. Trying again is safe.`);
  } finally { $("d-do").disabled = false; }
  return null;
}

const SAID_MS = 8000;
let saying = 0;
function say(text, cls) {
  clearTimeout(saying);
  $("said").textContent = text;
  $("said").className = `toast ${cls}`;
  $("said").hidden = false;
  saying = setTimeout(() => { $("said").hidden = true; }, SAID_MS);
}

// ---- alarms --------------------------------------------------------------------------------------------------------

const SEVERITIES = ["critical", "major", "minor", "warning", "indeterminate"];
// A shape of its own for each severity: colour alone says nothing to one man in twelve.
const SHAPES = {
  critical: "M2 2h12v12H2z", major: "M8 1.5 15 14H1z", minor: "M8 1 15 8 8 15 1 8z", warning: "M8 2a6 6 0 1 1 0 12A6 6 0 0 1 8 2z",
  indeterminate: "M4.5 2h7L15 8l-3.5 6h-7L1 8z",
};
const STATE_TEXT = {
  unacknowledged: "unacknowledged", acknowledged: "acknowledged", returned_unacknowledged: "returned, unacknowledged",
  latched_unacknowledged: "latched, unacknowledged", latched: "latched", shelved: "shelved", suppressed: "suppressed",
  out_of_service: "out of service", normal: "normal",
};
const WAITING = new Set(["unacknowledged", "returned_unacknowledged", "latched_unacknowledged"]);

// The shape: filled while nobody has answered, an outline once somebody has.
function shape(severity, state) {
  const [svg, path] = drawing("0 0 16 16", { class: `shape ${WAITING.has(state) || !state ? "filled" : ""}` });
  path.setAttribute("d", SHAPES[severity] || SHAPES.indeterminate);
  return svg;
}
function severityMark(severity, state) {
  return el("span", { class: `severity ${SEVERITIES.includes(severity) ? severity : "indeterminate"}` }, shape(severity, state), el("span", { text: severity }));
}
function measured(value, unit) {
  if (value === null || value === undefined) return "";
  return unit ? `${number(value)} ${unit}` : number(value);
}

// ---- devices -------------------------------------------------------------------------------------------------------

// Flag (QARTOD) -> class, word, and mark: colour alone says nothing to one man in twelve.
const QUALITY = {
  1: ["good", "good", "✓"], 2: ["unknown", "not evaluated", "○"], 3: ["suspect", "suspect", "⚑"], 4: ["fail", "fail", "✕"], 9: ["unknown", "missing", "○"],
};
const DEVICE_STATES = { sending: ["good", "sending"], failing: ["bad", "failing"], silent: ["warn", "silent"], never: ["", "never seen"], off: ["", "off"] };

const deviceUrl = (id) => `/devices/${encodeURIComponent(id)}`;
const pinText = (pin) => (pin && pin !== "-1" ? ` [${pin}]` : "");
const valueText = (v) => (v.value === null || v.value === undefined ? (v.value_text ?? "–") : number(v.value));

function statePill(state) {
  const [cls, text] = DEVICE_STATES[state] || ["", state];
  return el("span", { class: `pill ${cls}`, text });
}

// The last value of a series, with its flag where it is not good.
function chip(value, nowUs) {
  const [cls, word, mark] = QUALITY[value.quality] || ["unknown", "", ""];
  const said = cls === "good" ? "" : word;
  return el("span", { class: `value ${cls}`, title: `${age(value.timestamp, nowUs)} ago${said ? ` · ${said}` : ""}` },
    el("i", { text: `${value.component_type}${pinText(value.pin_position)} ` }), el("b", { text: valueText(value) }), value.unit ? ` ${value.unit}` : null,
    said ? el("span", { class: "flag", text: ` ${mark} ${said}` }) : null);
}

// ---- refusals ------------------------------------------------------------------------------------------------------

const HEX_ROW = 16;
// Bytes as people read them: offset, hexadecimal, text; a row each. `hex` is hexadecimal.
function hexDump(hex) {
  const lines = [];
  for (let at = 0; at < hex.length; at += 2 * HEX_ROW) {
    const pairs = hex.slice(at, at + 2 * HEX_ROW).match(/../g) || [];
    const text = pairs.map((p) => { const c = parseInt(p, 16); return c >= 32 && c < 127 ? String.fromCharCode(c) : "·"; }).join("");
    lines.push(`${(at / 2).toString(16).padStart(4, "0")}  ${pairs.join(" ").padEnd(3 * HEX_ROW - 1)}  ${text}`);
  }
  return lines.join("\n");
}

function originalBytes(original) {
  if (!original) return el("p", { class: "quiet", text: "Its bytes are not to be had any more." });
  const cut = original.cut ? `, the first ${count(original.hex.length / 2)} are shown` : "";
  return el("div", { class: "original" },
    el("h4", { text: `As text (${count(original.bytes)} bytes${cut})` }), el("pre", { tabindex: "0", text: original.text }),
    el("h4", { text: "As bytes" }), el("pre", { class: "hex", tabindex: "0", text: hexDump(original.hex) }));
}

// One refusal: what, when, whose; its bytes when it is opened, which are asked for where the list has none.
function refusalItem(refusal, nowUs, open) {
  const body = el("div");
  const item = el("details", { class: "refusal", "data-id": refusal.id }, el("summary", {},
    el("span", { class: "line" }, el("b", { text: refusal.code }), el("span", { class: "quiet", text: `${refusal.stage} · ${age(refusal.at, nowUs)} ago` })),
    el("span", { class: "said", text: refusal.message || "" }),
    refusal.device_id ? el("span", { class: "device-address", text: refusal.device_id }) : null), body);
  let asked = false;
  const show = async () => {
    if (!item.open || asked) return;
    asked = true;
    const facts = el("dl", { class: "facts" });
    const rows = [["Refused", instant(refusal.at)], ["Device", refusal.device_id], ["Parser", refusal.parser], ["Tries", refusal.attempt > 1 ? String(refusal.attempt) : ""],
      ["Raw message", refusal.raw_offset === undefined ? "" : `iot_raw_data ${refusal.raw_partition}:${refusal.raw_offset}, line ${refusal.raw_index ?? 0}`], ["Id", refusal.id]];
    facts.append(...rows.filter(([, v]) => v).flatMap(([k, v]) => [el("dt", { text: k }), el("dd", {}, k === "Device" ? el("a", { href: deviceUrl(v), text: v }) : v)]));
    body.replaceChildren(facts, refusal.original ? originalBytes(refusal.original) : el("p", { class: "quiet", text: "Its bytes are looked for in Kafka …" }));
    if (refusal.original && !refusal.original.cut) return;
    try { body.replaceChildren(facts, originalBytes((await get(`/api/refusals/${encodeURIComponent(refusal.id)}`)).original)); }
    catch (e) {
      asked = false;
      if (!refusal.original) body.replaceChildren(facts, el("p", { class: "quiet", text: `Its bytes cannot be had now: ${e.message}` }));
    }
  };
  item.addEventListener("toggle", show);
  item.open = open;
  return item;
}

// A bar for each count; for those who see it.
function bars(counts) {
  const top = Math.max(...counts, 1);
  const [svg, path] = drawing(`0 0 ${counts.length} 20`, { class: "bars", preserveAspectRatio: "none" });
  path.setAttribute("d", counts.map((n, i) => (n ? `M${i} 20h.8v${-Math.max(1.5, (n / top) * 20).toFixed(1)}h-.8z` : "")).join(""));
  return svg;
}

// ---- polling -------------------------------------------------------------------------------------------------------

const polls = [];
function poll(interval_ms, what) {
  let running = false;
  const run = async () => {
    // A hidden page asks for nothing; a slow answer is not overtaken by the next question.
    if (running || document.hidden) return;
    running = true;
    try { await what(); } finally { running = false; }
  };
  setInterval(run, interval_ms);
  document.addEventListener("visibilitychange", run);
  polls.push(run);
  run();
  return run;
}

// Where there are operators, what the page shows is for them: it asks for the token, and then for everything again.
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  stored.set(sessionStorage, "operator-token", $("l-token").value.trim());
  if ($("d-login")) $("d-login").hidden = false;
  polls.forEach((run) => run());
});
// ---- pages of a list, and finding in it ------------------------------------------------------------------------------

const cursors = [""];  // of the pages before the one shown, and of this one
let next = null;
function drawPager(page) {
  next = page.next_cursor;
  $("previous").disabled = cursors.length < 2;
  $("next").disabled = !next;
  $("page").textContent = cursors.length > 1 || next ? `page ${cursors.length}` : "";
}
function onPage(ask) {
  $("next").addEventListener("click", () => { if (next) { cursors.push(next); ask(); } });
  $("previous").addEventListener("click", () => { if (cursors.length > 1) { cursors.pop(); ask(); } });
}

// What is typed counts when nothing was typed for a moment.
function onSearch(ask, wait_ms = 200) {
  let typing = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => { ask($("search").value.trim()); }, wait_ms);
  });
  $("search-form").addEventListener("submit", (event) => event.preventDefault());
  onSlash();
}
function onSlash() {
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || isTyping() || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    $("search").focus();
  });
}
const isTyping = () => document.activeElement?.matches("textarea, select, input:not([type=checkbox])") ?? false;

// ---- light and dark ------------------------------------------------------------------------------------------------

function themed(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}
try { themed(localStorage.getItem("theme")); } catch { /* storage is switched off: the system's choice stands */ }
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  themed(dark ? "light" : "dark");
  try { localStorage.setItem("theme", dark ? "light" : "dark"); } catch { /* as above */ }
});
