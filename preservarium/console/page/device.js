// One device. What is shown of its curves stands in the address: ?span (seconds), ?to (µs; none: now), ?series.
"use strict";

const DEVICE_INTERVAL_MS = 5000;
const LISTS_INTERVAL_MS = 10000;
// Curves that follow now are asked for again when a three-hundredth of the span has passed, within these bounds.
const CURVES_S_MIN = 5;
const CURVES_S_MAX = 60;
const SERIES_MAX = 8;
const SERIES_FIRST = 4;
const READINGS = 25;
const HOUR = 3600;
const DAY = 86400;
const SPANS = [["1 h", HOUR], ["6 h", 6 * HOUR], ["1 d", DAY], ["7 d", 7 * DAY], ["30 d", 30 * DAY], ["1 y", 365 * DAY], ["5 y", 5 * 365 * DAY]];
const SPAN_S_MIN = 60;
const SPAN_S_MAX = 5 * 365 * DAY;
const POINTS_MAX = 2000;
const LEVELS = { raw: "readings", "1m": "minutes", "1h": "hours", "1d": "days" };

const ID = decodeURIComponent(location.pathname.split("/")[2] || "");
const URL_OF = `/api/devices/${encodeURIComponent(ID)}`;
const parameters = new URLSearchParams(location.search);
const wanted = { span_s: Math.min(SPAN_S_MAX, Math.max(SPAN_S_MIN, Number(parameters.get("span")) || DAY)), to: Number(parameters.get("to")) || 0, series: null };
if (parameters.get("series")) wanted.series = parameters.get("series").split(",").map(Number).filter((n) => n > 0).slice(0, SERIES_MAX);

let nowUs = Date.now() * 1000;
let device = null;
let curves = null;
const plots = new Map();  // unit and series -> plot
const keys = new Map();  // what a part of the page shows -> so that it is not drawn again

const changed = (name, value) => { const text = JSON.stringify(value); if (keys.get(name) === text) return false; keys.set(name, text); return true; };

// ---- the device ----------------------------------------------------------------------------------------------------

function drawDevice(d) {
  device = d;
  nowUs = d.at;
  document.title = `${d.name || d.device_id} · Preservarium`;
  if (changed("head", [d.name, d.type, d.parser, d.state, d.registered])) {
    $("h-device").replaceChildren(d.name || d.device_id, d.name ? el("span", { class: "quiet", text: ` ${d.device_id}` }) : "");
    const pill = statePill(d.registered ? d.state : "unknown");
    $("state").className = pill.className;
    $("state").textContent = d.registered ? pill.textContent : "not registered";
    $("what").replaceChildren(...(d.registered ? [[d.manufacturer, d.type].filter(Boolean).join(" "), d.parser ? `, decoded by ${d.parser}` : "", d.description ? ` – ${d.description}` : ""]
      : ["The registry does not know it any more; what was stored of it is below."]));
  }
  $("state").title = d.last_seen ? `last reading received ${age(d.last_seen, nowUs)} ago` : "no reading was ever received";
  drawSeries(d.series);
  if (changed("registry", [d.rev, d.meta, d.updated_at])) {
    const facts = [["Type", d.type], ["Parser", [d.parser, d.parser_kind].filter(Boolean).join(", ")], ["Manufacturer", d.manufacturer],
      ...Object.entries(d.meta || {}).slice(0, 20).map(([k, v]) => [k, typeof v === "string" ? v : JSON.stringify(v)]), ["Revision", d.rev === null ? "" : String(d.rev)],
      ["Changed", d.updated_at ? `${instant(d.updated_at)} by ${d.updated_by}` : ""]];
    $("registry").replaceChildren(...facts.filter(([, v]) => v).flatMap(([k, v]) => [el("dt", { text: k }), el("dd", { text: v })]));
  }
  if (changed("rules", d.rules)) {
    $("rules").replaceChildren(...(d.rules.length ? d.rules.map((r) => el("li", {}, severityMark(r.severity, ""), ` ${r.name}: `,
      el("span", { class: "quiet", text: [r.component_type, r.kind, r.threshold ?? "", r.enabled ? "" : "(off)"].filter((t) => t !== "").join(" ") })))
      : [el("li", { class: "quiet", text: "None. Rules are named in the registry, by the device's type or by the device itself." })]));
  }
}

function bound(span) {
  if (!span) return "";
  const [low, high] = [span.min ?? null, span.max ?? null];
  return low === null && high === null ? "" : low === null ? `≤ ${number(high)}` : high === null ? `≥ ${number(low)}` : `${number(low)} … ${number(high)}`;
}

function drawSeries(series) {
  if (changed("series", series.map((s) => [s.series_id, s.value, s.value_text, s.quality, s.timestamp, s.datatype]))) {
    $("series").replaceChildren(...(series.length ? series.map((s) => {
      const [cls, word, mark] = QUALITY[s.quality] || ["unknown", "–", ""];
      const t = s.datatype || {};
      const bounds = [bound(t.suspect_span) ? `usual ${bound(t.suspect_span)}` : "", bound(t.fail_span) ? `possible ${bound(t.fail_span)}` : "", s.circular ? `circular, ${number(s.circular)}` : "",
        Object.keys(t.tests || {}).map((n) => n.replaceAll("_", " ")).join(", ")].filter(Boolean).join("; ");
      return el("tr", { "data-at": String(s.received_at || "") }, el("th", { scope: "row", text: `${s.component_type}${pinText(s.pin_position)}` }),
        el("td", { class: "num" }, el("b", { text: valueText(s) }), s.unit ? ` ${s.unit}` : ""), el("td", { class: `flag ${cls}`, text: `${mark} ${word}` }), el("td", { class: "num ago" }), el("td", { class: "quiet", text: bounds || "none" }));
    }) : [el("tr", {}, el("td", { colspan: "5", class: "quiet", text: "Nothing was stored of it yet. What it sends appears here within a second of being decoded; what is refused stands under “Refused”." }))]));
  }
  for (const row of $("series").children) { const cell = row.querySelector(".ago"); if (cell) cell.textContent = row.dataset.at ? age(Number(row.dataset.at), nowUs) : "never"; }
  const numbers = series.filter((s) => s.datatype?.kind !== "text" && !(s.value === null && s.value_text !== null));
  if (changed("choose", numbers.map((s) => s.series_id))) {
    if (wanted.series === null) wanted.series = numbers.slice(0, SERIES_FIRST).map((s) => s.series_id);
    $("chosen").replaceChildren(...numbers.map((s, i) => {
      const box = el("input", { type: "checkbox", value: String(s.series_id), checked: wanted.series.includes(s.series_id) });
      box.addEventListener("change", choose);
      return el("label", {}, box, el("span", { class: `swatch line-${i % LINES.length}`, "aria-hidden": "true" }), `${s.component_type}${pinText(s.pin_position)}`);
    }));
    if (!numbers.length) { $("curves-note").textContent = series.length ? "It has no series of numbers; texts stand under “Readings”." : "There is nothing to draw yet: no reading of this device was stored."; }
    askCurves();
  }
}

function choose() {
  const ids = [...$("chosen").querySelectorAll("input:checked")].map((b) => Number(b.value));
  for (const box of $("chosen").querySelectorAll("input")) box.disabled = !box.checked && ids.length >= SERIES_MAX;
  wanted.series = ids;
  askCurves();
}

// ---- curves --------------------------------------------------------------------------------------------------------

function shownSpan() {
  const to = wanted.to || Date.now() * 1000;
  return { from: Math.round(to - wanted.span_s * 1e6), to: Math.round(to) };
}

function keep() {
  const query = new URLSearchParams({ span: String(Math.round(wanted.span_s)) });
  if (wanted.to) query.set("to", String(Math.round(wanted.to)));
  if (wanted.series?.length) query.set("series", wanted.series.join(","));
  history.replaceState(null, "", `?${query}`);
}

let curvesAsked = 0;
let curvesAt = 0;
async function askCurves() {
  if (!device) return;
  keep();
  drawSpan();
  const number_ = ++curvesAsked;
  if (!wanted.series?.length) { drawCurves({ series: [], alarms: [] }, shownSpan()); return; }
  const shown = shownSpan();
  const points = Math.min(POINTS_MAX, Math.max(200, Math.round($("plots").clientWidth || 800)));
  curvesAt = Date.now();
  try {
    const found = await get(`${URL_OF}/series?series=${wanted.series.join(",")}&from=${shown.from}&to=${shown.to}&points=${points}`);
    if (number_ !== curvesAsked) return;
    curves = found;
    drawCurves(found, shown);
  } catch (e) {
    if (number_ === curvesAsked) $("curves-note").textContent = `The curves cannot be had now: ${e.message}`;
  }
}

function boundsOf(curve) {
  const series = device.series.find((s) => s.series_id === curve.series_id);
  const lines = [];
  for (const [name, colour_] of [["suspect_span", "--warn"], ["fail_span", "--bad"]]) {
    const found = series?.datatype?.[name];
    for (const side of ["min", "max"]) if (typeof found?.[side] === "number") lines.push([found[side], colour_]);
  }
  for (const rule of device.rules) {
    const pin = rule.pin_position ?? null;
    if (rule.enabled && rule.component_type === curve.component_type && (pin === null || pin === curve.pin_position) && ["high", "low"].includes(rule.kind) && typeof rule.threshold === "number") lines.push([rule.threshold, `--${rule.severity}`]);
  }
  return lines;
}

function drawCurves(found, shown) {
  const places = [...$("chosen").querySelectorAll("input")].map((b) => Number(b.value));
  const groups = new Map();
  for (const curve of found.series) {
    curve.place = Math.max(0, places.indexOf(curve.series_id));
    const unit = `${curve.unit || curve.component_type}|${curve.circular ?? ""}`;
    groups.set(unit, [...(groups.get(unit) || []), curve]);
  }
  const nodes = [];
  const kept = new Set();
  for (const [unit, members] of groups) {
    const key = `${unit} ${members.map((c) => c.series_id)}`;
    kept.add(key);
    // The bounds of several datatypes in one plot would be anybody's.
    const bounds = new Set(members.map((c) => c.component_type)).size === 1 ? boundsOf(members[0]) : [];
    let plot = plots.get(key);
    if (plot) plot.set(members, found.alarms, bounds, shown);
    else { plot = new Plot(members, found.alarms, bounds, shown, look); plots.set(key, plot); }
    nodes.push(plot.root);
  }
  for (const [key, plot] of plots) if (!kept.has(key)) { plot.destroy(); plots.delete(key); }
  const there = $("plots").children;
  if (nodes.length !== there.length || nodes.some((n, i) => there[i] !== n)) $("plots").replaceChildren(...nodes);
  plots.forEach((plot) => plot.resize());
  $("curves-note").textContent = found.series.length ? said(found) : (wanted.series?.length ? "" : "Choose a series to draw.");
}

// What a point of these curves is, in words; and where there is none, why.
function said(found) {
  const levels = new Map();
  for (const c of found.series) {
    const text = c.level === "raw" && !c.width_us ? "single readings" : `points of ${span_(c.width_us / 1e6)}, from ${LEVELS[c.level] || c.level}`;
    levels.set(text, (levels.get(text) || 0) + 1);
  }
  const empty = found.series.filter((c) => !c.at.length).map((c) => c.component_type);
  const parts = [[...levels.keys()].join("; ")];
  if (empty.length) parts.push(`no readings in this span: ${empty.join(", ")}`);
  if (found.alarms.length) parts.push(`${found.alarms.length} ${found.alarms.length === 1 ? "alarm" : "alarms"} in this span`);
  return parts.join(" · ");
}
const span_ = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : span_of(Math.round(s)));
const span_of = (s) => (s < 120 ? `${s} s` : s < 7200 ? `${Math.round(s / 60)} min` : s < 2 * DAY ? `${Math.round(s / HOUR)} h` : `${Math.round(s / DAY)} d`);

function drawSpan() {
  const { from, to } = shownSpan();
  $("span-text").textContent = wanted.to ? `${instant(from).slice(0, 16)} to ${instant(to).slice(0, 16)} UTC` : `the last ${span_of(Math.round(wanted.span_s))}`;
  for (const node of $("spans").children) node.setAttribute("aria-pressed", String(Number(node.dataset.span) === wanted.span_s));
  $("now").setAttribute("aria-pressed", String(!wanted.to));
}

// Show another span: what is later than now follows now.
function look({ from, to, moved_us: moved, whole: all }) {
  const now = Date.now() * 1000;
  if (all) { wanted.span_s = DAY; wanted.to = 0; }
  else if (moved !== undefined) { const end = shownSpan().to + moved; wanted.to = end >= now ? 0 : Math.round(end); }
  else {
    const width = Math.min(SPAN_S_MAX, Math.max(SPAN_S_MIN, (to - from) / 1e6));
    const end = Math.min(now, (from + to) / 2 + width * 5e5);
    wanted.span_s = Math.round(width);
    wanted.to = end >= now - width * 1e4 ? 0 : Math.round(end);
  }
  askCurves();
}
function zoom(factor) {
  const { from, to } = shownSpan();
  // What follows now stays there.
  const middle = wanted.to ? (from + to) / 2 : to;
  const width = (to - from) * factor;
  if (wanted.to) look({ from: middle - width / 2, to: middle + width / 2 });
  else look({ from: to - width, to });
}

async function file() {
  const shown = shownSpan();
  $("csv").disabled = true;
  try {
    const ids = wanted.series?.length ? `series=${wanted.series.join(",")}&` : "";
    const response = await fetch(`${URL_OF}/readings.csv?${ids}from=${shown.from}&to=${shown.to}`, { headers: authorized({}) });
    if (!response.ok) throw new Error((await response.json()).error || `refused (${response.status})`);
    const link = el("a", { href: URL.createObjectURL(await response.blob()), download: `${ID.replace(/[^a-z0-9]+/gi, "-")}.csv` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    $("curves-note").textContent = "The file has the readings themselves, of the series and the span that are shown.";
  } catch (e) { $("curves-note").textContent = `The file cannot be had: ${e.message}`; }
  finally { $("csv").disabled = false; }
}

// ---- readings, alarms, refusals, commands --------------------------------------------------------------------------

function drawReadings(page) {
  if (changed("readings", page.readings)) {
    $("readings").replaceChildren(...(page.readings.length ? page.readings.map((r) => {
      const [cls, word, mark] = QUALITY[r.quality] || ["unknown", String(r.quality), ""];
      const flags = [cls === "good" ? "" : word, ...(r.flags || []), r.revised ? "revised" : ""].filter(Boolean).join(", ");
      return el("tr", {}, el("td", {}, el("time", { datetime: new Date(r.timestamp / 1000).toISOString(), title: `received ${instant(r.received_at)}`, text: instant(r.timestamp) })),
        el("td", { text: `${r.component_type}${pinText(r.pin_position)}` }), el("td", { class: "num" }, el("b", { text: valueText(r) }), r.unit ? ` ${r.unit}` : ""),
        el("td", { class: `flag ${cls}`, text: flags ? `${mark} ${flags}` : "" }), el("td", { class: "quiet", text: r.parser || "" }),
        el("td", { class: "quiet coordinates", text: r.raw_partition === null ? "" : `${r.raw_partition}:${r.raw_offset}` }));
    }) : [el("tr", {}, el("td", { colspan: "6", class: "quiet", text: "No reading is stored. Each message that its parser understands makes a line here for each value." }))]));
  }
  drawPager(page);
}

async function readings() {
  const query = new URLSearchParams({ limit: String(READINGS) });
  if (cursors.at(-1)) query.set("cursor", cursors.at(-1));
  try { drawReadings(await get(`${URL_OF}/readings?${query}`)); }
  catch (e) { if (e.status === 404) drawReadings({ readings: [], next_cursor: null }); }
}

async function alarms() {
  try {
    const query = new URLSearchParams({ device: ID, limit: "10" });
    const [now, past] = await Promise.all([get(`/api/alarms?state=standing&${query}`), get(`/api/alarms?state=cleared&${query}`).catch(() => ({ alarms: [] }))]);
    const all = [...now.alarms, ...past.alarms.filter((p) => !now.alarms.some((a) => a.alarm_id === p.alarm_id))].slice(0, 12);
    if (!changed("alarms", [all, Math.floor(nowUs / 6e7)])) return;
    refill($("alarms"), ...(all.length ? all.map((a) => el("li", { class: a.cleared_at ? "indeterminate" : a.severity },
      el("div", { class: "line" }, severityMark(a.severity, a.state), el("span", { class: "quiet", text: a.occurred_at ? `${age(a.occurred_at, nowUs)} ago` : "" })),
      el("div", {}, el("b", { text: a.rule }), " ", el("span", { class: "quiet", text: a.cleared_at ? `cleared after ${span_of(Math.max(0, Math.round((a.cleared_at - a.occurred_at) / 1e6)))}` : STATE_TEXT[a.state] || a.state })),
      a.message ? el("div", { text: a.message }) : null)) : [el("li", { class: "none", text: "None, now or in the past. An alarm is raised when a reading meets a rule that watches this device." })]));
  } catch (e) { $("alarms").replaceChildren(el("li", { class: "none", text: `not known: ${e.message}` })); keys.delete("alarms"); }
}

async function refusals() {
  try {
    const found = await get(`/api/refusals?${new URLSearchParams({ device: ID, limit: "10" })}`);
    $("refusals-note").replaceChildren(...worded(found.note || (found.refusals.length ? "" : "Nothing of the last day. What cannot be used of its messages would stand here, with its bytes and the reason.")));
    if (!changed("refusals", found.refusals.map((r) => r.id))) return;
    const open = new Set([...$("refusals").querySelectorAll("details[open]")].map((d) => d.dataset.id));
    $("refusals").replaceChildren(...found.refusals.map((r) => refusalItem(r, found.at, open.has(r.id))));
  } catch (e) { $("refusals-note").textContent = `not known: ${e.message}`; }
}

async function commands() {
  try {
    const found = await get(`${URL_OF}/commands?limit=5`);
    if (!changed("commands", [found.commands, Math.floor(nowUs / 6e7)])) return;
    $("commands").replaceChildren(...(found.commands.length ? found.commands.map((c) => el("li", { class: "indeterminate" },
      el("div", { class: "line" }, el("b", { text: c.command || "content of its own" }), el("span", { class: "quiet", text: `${age(c.requested_at, nowUs)} ago` })),
      el("div", {}, c.state, c.requested_by ? ` · ${c.requested_by}` : "", c.reason ? ` · ${c.reason}` : ""))) : [el("li", { class: "none", text: "None was asked of it. Ask for one on the page of commands." })]));
  } catch (e) {
    $("commands").replaceChildren(el("li", { class: "none", text: e.status === 401 || e.status === 403 ? "Commands are shown to operators." : `not known: ${e.message}` }));
    keys.delete("commands");
  }
}

// ---- asking --------------------------------------------------------------------------------------------------------

async function ask() {
  try {
    drawDevice(await get(URL_OF));
    $("live").className = "pill good";
    $("live").textContent = "live";
    $("note").hidden = true;
    $("clock").textContent = instant(nowUs);
  } catch (e) {
    $("live").className = "pill bad";
    $("live").textContent = e.status === 401 ? "for operators" : e.status === 404 ? "not known" : "no answer";
    $("note").hidden = e.status === 401;
    $("note").textContent = e.status === 404 ? `${e.message}. If it sends, what it sends is refused, and stands below.` : `The device cannot be shown: ${e.message}. What is shown may be old.`;
    if (e.status === 404) { $("h-device").textContent = ID; $("what").textContent = "Register it: a registry file names its address and its type (preservarium registry apply FILE)."; }
  }
  const due_s = Math.min(CURVES_S_MAX, Math.max(CURVES_S_MIN, wanted.span_s / 300));
  if (device && !wanted.to && Date.now() - curvesAt > due_s * 1000) askCurves();
}

async function lists() {
  await Promise.all([cursors.length === 1 ? readings() : null, alarms(), refusals(), commands()]);
}

// ---- the page ------------------------------------------------------------------------------------------------------

for (const [text, seconds] of SPANS) {
  const node = el("button", { type: "button", "data-span": String(seconds), text });
  node.addEventListener("click", () => {
    // The end stays where it is.
    wanted.span_s = seconds;
    askCurves();
  });
  $("spans").append(node);
}
$("back").addEventListener("click", () => look({ moved_us: -wanted.span_s * 5e5 }));
$("forth").addEventListener("click", () => look({ moved_us: wanted.span_s * 5e5 }));
$("closer").addEventListener("click", () => zoom(0.5));
$("wider").addEventListener("click", () => zoom(2));
$("now").addEventListener("click", () => { wanted.to = 0; askCurves(); });
$("csv").addEventListener("click", file);
$("alarms-more").href = `/alarms?q=${encodeURIComponent(ID)}`;
$("refusals-more").href = `/refusals?device=${encodeURIComponent(ID)}`;
$("commands-more").href = `/commands?device=${encodeURIComponent(ID)}`;
drawSpan();
onPage(readings);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping()) return;
  const button = { ArrowLeft: "back", ArrowRight: "forth", "+": "closer", "-": "wider", "−": "wider", n: "now" }[event.key];
  // Regions that scroll sideways keep their arrows.
  if (!button || (event.key.startsWith("Arrow") && document.activeElement?.matches(".scroll, pre"))) return;
  event.preventDefault();
  $(button).click();
});
const recolour = () => setTimeout(() => plots.forEach((plot) => plot.recolour()));
$("theme").addEventListener("click", recolour);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
new ResizeObserver(() => plots.forEach((plot) => plot.resize())).observe($("plots"));
poll(DEVICE_INTERVAL_MS, ask);
poll(LISTS_INTERVAL_MS, lists);
