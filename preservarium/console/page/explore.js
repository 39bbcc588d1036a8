// Series of any devices in one picture. The address has all of it: ?series, ?span (s), ?to (µs; none: now), ?view, and what was looked for.
"use strict";

const CURVES_S_MIN = 5;
const CURVES_S_MAX = 60;
const LINES_MAX = 24;
const MAP_MAX = 60;
const MAP_COLUMNS = 160;
const HOUR = 3600;
const DAY = 86400;
const SPANS = [["1 h", HOUR], ["6 h", 6 * HOUR], ["1 d", DAY], ["7 d", 7 * DAY], ["30 d", 30 * DAY], ["1 y", 365 * DAY], ["5 y", 5 * 365 * DAY]];
const SPAN_S_MIN = 60;
const SPAN_S_MAX = 5 * 365 * DAY;
const LEVELS = { raw: "readings", "1m": "minutes", "1h": "hours", "1d": "days" };
// Dark to light, told apart by lightness alone too.
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

const parameters = new URLSearchParams(location.search);
const wanted = {
  q: parameters.get("q") || "", component: parameters.get("component") || "", type: parameters.get("type") || "", label: parameters.get("label") || "",
  view: parameters.get("view") === "map" ? "map" : "lines", span_s: Math.min(SPAN_S_MAX, Math.max(SPAN_S_MIN, Number(parameters.get("span")) || DAY)), to: Number(parameters.get("to")) || 0,
  series: (parameters.get("series") || "").split(",").map(Number).filter((n) => n > 0).slice(0, MAP_MAX),
};
const known = new Map();  // series id -> what was found of it
const plots = new Map();
let drawn = null;

const nameOf = (s) => `${s.name || s.device_id} · ${s.component_type}${pinText(s.pin_position)}`;
const most = () => (wanted.view === "map" ? MAP_MAX : LINES_MAX);

function keep() {
  const query = new URLSearchParams({ span: String(Math.round(wanted.span_s)) });
  if (wanted.series.length) query.set("series", wanted.series.join(","));
  if (wanted.to) query.set("to", String(Math.round(wanted.to)));
  if (wanted.view === "map") query.set("view", "map");
  for (const name of ["q", "component", "type", "label"]) if (wanted[name]) query.set(name, wanted[name]);
  history.replaceState(null, "", `?${query}`);
}

// ---- finding -------------------------------------------------------------------------------------------------------

let findings = 0;
let further = null;
let shownSeries = [];
async function find(more) {
  const number_ = ++findings;
  keep();
  const query = new URLSearchParams({ limit: "60" });
  for (const name of ["q", "component", "type", "label"]) if (wanted[name]) query.set(name, wanted[name]);
  if (more && further) query.set("cursor", further);
  try {
    const found = await get(`/api/series?${query}`);
    if (number_ !== findings) return;
    shownSeries = more ? [...shownSeries, ...found.series] : found.series;
    further = found.next_cursor;
    found.series.forEach((s) => known.set(s.series_id, s));
    drawResults(found.at);
    $("note").hidden = true;
  } catch (e) {
    if (number_ !== findings) return;
    $("note").hidden = e.status === 401;
    $("note").textContent = e.status === 400 ? e.message : `Series cannot be found now: ${e.message}`;
  }
}

function drawResults(nowUs) {
  $("results").replaceChildren(...shownSeries.map((s) => {
    const box = el("input", { type: "checkbox", value: String(s.series_id), checked: wanted.series.includes(s.series_id) });
    box.addEventListener("change", () => { box.checked ? add([s.series_id]) : remove(s.series_id); });
    return el("li", {}, el("label", {}, box, el("span", {}, el("b", { text: s.component_type + pinText(s.pin_position) }), el("span", { class: "quiet", text: ` ${s.name || s.device_id}` })),
      el("span", { class: "num", text: s.value === null ? "–" : `${number(s.value)} ${s.unit || ""}`, title: s.timestamp ? `${age(s.timestamp, nowUs)} ago` : "nothing yet" })));
  }));
  $("found").textContent = shownSeries.length ? `${shownSeries.length}${further ? " and more" : ""} found` : "";
  $("add-all").hidden = !shownSeries.length;
  $("more-results").hidden = !further;
  $("nothing").hidden = shownSeries.length > 0;
  $("nothing").textContent = wanted.q || wanted.component || wanted.type || wanted.label ? "No series is like that." : "No series is stored yet: the first reading of a device makes one.";
}

function add(ids) {
  const all = [...new Set([...wanted.series, ...ids])];
  const room = all.slice(0, most());
  if (room.length < all.length) $("note").textContent = `At most ${most()} series ${wanted.view === "map" ? "in a heat map" : "as lines; a heat map has room for more"}.`;
  $("note").hidden = room.length === all.length;
  wanted.series = room;
  for (const box of $("results").querySelectorAll("input")) box.checked = room.includes(Number(box.value));
  ask();
}
function remove(id) {
  wanted.series = wanted.series.filter((each) => each !== id);
  for (const box of $("results").querySelectorAll("input")) if (Number(box.value) === id) box.checked = false;
  ask();
}

// ---- curves --------------------------------------------------------------------------------------------------------

function shownSpan() {
  const to = wanted.to || Date.now() * 1000;
  return { from: Math.round(to - wanted.span_s * 1e6), to: Math.round(to) };
}

let asked = 0;
let askedAt = 0;
async function ask() {
  keep();
  drawSpan();
  const number_ = ++asked;
  askedAt = Date.now();
  $("start").hidden = wanted.series.length > 0;
  for (const id of ["csv", "png"]) $(id).disabled = !wanted.series.length;
  if (!wanted.series.length) { draw({ series: [] }, shownSpan()); return; }
  const shown = shownSpan();
  const points = wanted.view === "map" ? MAP_COLUMNS : Math.min(1500, Math.max(200, Math.round($("plots").clientWidth || 800)));
  try {
    const found = await get(`/api/series/curves?series=${wanted.series.slice(0, most()).join(",")}&from=${shown.from}&to=${shown.to}&points=${points}`);
    if (number_ !== asked) return;
    draw(found, shown);
    $("live").className = "pill good";
    $("live").textContent = wanted.to ? "a span" : "live";
    $("clock").textContent = instant(found.at);
  } catch (e) {
    if (number_ !== asked) return;
    if (e.status === 404) draw({ series: [] }, shown);
    $("curves-note").textContent = `The curves cannot be had now: ${e.message}`;
    $("live").className = "pill bad";
    $("live").textContent = e.status === 401 ? "for operators" : "no answer";
  }
}

function draw(found, shown) {
  drawn = { found, shown };
  found.series.forEach((curve, i) => { curve.place = i; curve.label = nameOf(curve); known.set(curve.series_id, { ...known.get(curve.series_id), ...curve, at: undefined, mean: undefined }); });
  drawChosen(found);
  const groups = new Map();
  for (const curve of found.series) {
    const unit = `${curve.unit || curve.component_type}|${curve.circular ?? ""}`;
    groups.set(unit, [...(groups.get(unit) || []), curve]);
  }
  const nodes = [];
  const kept = new Set();
  for (const [unit, members] of groups) {
    const key = `${wanted.view} ${unit} ${members.map((c) => c.series_id)}`;
    kept.add(key);
    let plot = plots.get(key);
    if (plot) plot.set(members, [], [], shown);
    else { plot = wanted.view === "map" ? new HeatMap(members, shown) : new Plot(members, [], [], shown, look, groups.size === 1 ? 380 : 260); plots.set(key, plot); }
    nodes.push(plot.root);
  }
  for (const [key, plot] of plots) if (!kept.has(key)) { plot.destroy(); plots.delete(key); }
  const there = $("plots").children;
  if (nodes.length !== there.length || nodes.some((n, i) => there[i] !== n)) $("plots").replaceChildren(...nodes);
  plots.forEach((plot) => plot.resize());
  const levels = new Set(found.series.map((c) => (c.level === "raw" && !c.width_us ? "single readings" : `points of ${span(Math.max(1, Math.round(c.width_us / 1e6)))}, from ${LEVELS[c.level] || c.level}`)));
  const empty = found.series.filter((c) => !c.at.length).length;
  $("curves-note").textContent = [[...levels].join("; "), empty ? `${empty} of ${found.series.length} without readings in this span` : ""].filter(Boolean).join(" · ");
}

function drawChosen(found) {
  $("chosen").replaceChildren(...found.series.map((c, i) => {
    const off = el("button", { type: "button", "aria-label": `Take away ${nameOf(c)}`, text: "×" });
    off.addEventListener("click", () => remove(c.series_id));
    return el("li", {}, wanted.view === "lines" ? el("span", { class: `swatch line-${i % LINES.length}${i >= LINES.length ? " dashed" : ""}`, "aria-hidden": "true" }) : null,
      el("a", { href: deviceUrl(c.device_id), text: c.name || c.device_id }), ` ${c.component_type}${pinText(c.pin_position)} `, off);
  }));
}

// ---- heat map ------------------------------------------------------------------------------------------------------

function heat(share) {
  const at = Math.min(0.9999, Math.max(0, share)) * (RAMP.length - 1);
  const [low, high] = [RAMP[Math.floor(at)], RAMP[Math.floor(at) + 1]];
  return `rgb(${low.map((c, i) => Math.round(c + (high[i] - c) * (at % 1))).join(" ")})`;
}

// Rows of one unit. A cell is the mean of what fell into its piece of time.
class HeatMap {
  constructor(curves, shown) {
    this.canvas = el("canvas", { role: "img" });
    this.read = el("span", { class: "quiet readout" });
    this.legend = el("span", { class: "legend" });
    this.names = el("ol", { class: "map-names", "aria-hidden": "true" });
    this.body = el("tbody");
    this.table = el("details", { class: "words" }, el("summary", { text: "The same as numbers" }), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "The same as numbers" },
      el("table", {}, el("thead", {}, el("tr", {}, ...["Series", "Least", "Mean", "Greatest"].map((t, i) => el("th", { scope: "col", class: i ? "num" : null, text: t })))), this.body)));
    this.root = el("figure", { class: "map" }, el("figcaption", {}, this.legend, this.read), el("div", { class: "map-grid" }, this.names, this.canvas), el("div", { class: "map-axis quiet", "aria-hidden": "true" }, el("span"), el("span"), el("span")), this.table);
    this.canvas.addEventListener("pointermove", (event) => this.say(event));
    this.canvas.addEventListener("pointerleave", () => { this.read.textContent = ""; });
    this.set(curves, null, null, shown);
  }

  set(curves, _bands, _bounds, shown) {
    this.curves = curves;
    this.shown = shown;
    const width = (shown.to - shown.from) / MAP_COLUMNS;
    this.cells = curves.map((curve) => {
      const sums = new Float64Array(MAP_COLUMNS);
      const counts = new Uint32Array(MAP_COLUMNS);
      // A point stands for its whole width, and until the next one, where nothing is missing between them.
      curve.at.forEach((at, i) => {
        if (curve.mean[i] === null) return;
        const next_ = curve.at[i + 1];
        const until = next_ !== undefined && (!curve.gap_us || next_ - at <= curve.gap_us) ? next_ : at + (curve.width_us || 1);
        const first = Math.floor((at - shown.from) / width);
        const end = Math.max(first + 1, Math.ceil((until - shown.from) / width));
        for (let c = Math.max(0, first); c < Math.min(MAP_COLUMNS, end); c += 1) { sums[c] += curve.mean[i]; counts[c] += 1; }
      });
      return Array.from(sums, (sum, i) => (counts[i] ? sum / counts[i] : null));
    });
    const all = this.cells.flat().filter((v) => v !== null);
    [this.least, this.greatest] = all.length ? [all.reduce((a, b) => Math.min(a, b)), all.reduce((a, b) => Math.max(a, b))] : [0, 1];
    const unit = curves[0].unit || "";
    this.legend.replaceChildren(`${number(this.least)} `, el("span", { class: "ramp", "aria-hidden": "true" }), ` ${number(this.greatest)} ${unit}`);
    this.names.replaceChildren(...curves.map((c) => el("li", { title: c.label, text: c.label })));
    const [left, middle, right] = this.root.querySelectorAll(".map-axis span");
    [[left, shown.from], [middle, (shown.from + shown.to) / 2], [right, shown.to]].forEach(([node, at]) => { node.textContent = instant(at).slice(5, 16); });
    this.canvas.setAttribute("aria-label", `Heat map of ${curves.length} series from ${instant(shown.from)} to ${instant(shown.to)}, from ${number(this.least)} to ${number(this.greatest)} ${unit}`);
    this.body.replaceChildren(...curves.map((c, i) => {
      const values = this.cells[i].filter((v) => v !== null);
      const facts = values.length ? [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => a + b, 0) / values.length, values.reduce((a, b) => Math.max(a, b))].map(number) : ["–", "–", "–"];
      return el("tr", {}, el("th", { scope: "row", text: c.label }), ...facts.map((text) => el("td", { class: "num", text })));
    }));
    this.resize();
  }

  resize() {
    const wide = this.canvas.clientWidth;
    if (!wide) { requestAnimationFrame(() => { if (this.canvas.isConnected && this.canvas.clientWidth) this.resize(); }); return; }
    const row = this.curves.length > 20 ? 16 : 24;
    const scale = devicePixelRatio || 1;
    this.canvas.style.height = `${row * this.curves.length}px`;
    this.canvas.width = Math.round(wide * scale);
    this.canvas.height = Math.round(row * this.curves.length * scale);
    this.root.style.setProperty("--row", `${row}px`);
    const ctx = this.canvas.getContext("2d");
    const step = this.canvas.width / MAP_COLUMNS;
    const range = this.greatest - this.least || 1;
    this.cells.forEach((cells, r) => cells.forEach((v, c) => {
      if (v === null) return;
      ctx.fillStyle = heat((v - this.least) / range);
      ctx.fillRect(Math.floor(c * step), Math.round(r * row * scale), Math.ceil(step) + 0.5, Math.round((row - 1) * scale));
    }));
  }

  say(event) {
    const box = this.canvas.getBoundingClientRect();
    const [r, c] = [Math.floor(((event.clientY - box.top) / box.height) * this.curves.length), Math.floor(((event.clientX - box.left) / box.width) * MAP_COLUMNS)];
    const curve = this.curves[r];
    if (!curve || c < 0 || c >= MAP_COLUMNS) return;
    const at = this.shown.from + ((c + 0.5) / MAP_COLUMNS) * (this.shown.to - this.shown.from);
    const value = this.cells[r][c];
    this.read.textContent = `${curve.label} · ${instant(at).slice(0, 16)} UTC · ${value === null ? "nothing" : `${number(value)} ${curve.unit || ""}`}`;
  }

  recolour() { this.resize(); }
  picture() { return this.canvas; }
  destroy() {}
}

// ---- moving, taking away -------------------------------------------------------------------------------------------

function drawSpan() {
  const { from, to } = shownSpan();
  $("span-text").textContent = wanted.to ? `${instant(from).slice(0, 16)} to ${instant(to).slice(0, 16)} UTC` : `the last ${span(Math.round(wanted.span_s))}`;
  for (const node of $("spans").children) node.setAttribute("aria-pressed", String(Number(node.dataset.span) === wanted.span_s));
  for (const node of $("views").children) node.setAttribute("aria-pressed", String(node.dataset.view === wanted.view));
  $("now").setAttribute("aria-pressed", String(!wanted.to));
}
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
  ask();
}
function zoom(factor) {
  const { from, to } = shownSpan();
  const width = (to - from) * factor;
  const middle = (from + to) / 2;
  if (wanted.to) look({ from: middle - width / 2, to: middle + width / 2 });
  else look({ from: to - width, to });
}

function file() {
  const cell = (text) => (/^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `"'${text.replaceAll('"', '""')}"` : /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const rows = ["instant,device,component_type,pin_position,unit,mean,min,max"];
  for (const c of drawn.found.series) {
    c.at.forEach((at, i) => rows.push([new Date(at / 1000).toISOString(), c.device_id, c.component_type, c.pin_position, c.unit || "", c.mean[i] ?? "", c.min?.[i] ?? "", c.max?.[i] ?? ""].map((v) => cell(String(v))).join(",")));
  }
  save(new Blob([rows.join("\r\n")], { type: "text/csv" }), "series.csv");
  $("curves-note").textContent = "The file has the points that are shown; the readings themselves are on each device's page.";
}

$("share").addEventListener("click", async () => {
  keep();
  try { await navigator.clipboard.writeText(location.href); $("curves-note").textContent = "The link is copied."; }
  catch { $("curves-note").textContent = `The link is in the address bar: ${location.href}`; }
});
$("csv").addEventListener("click", file);
$("png").addEventListener("click", () => savePicture([...plots.values()].map((p) => p.picture()), "series.png"));

for (const [text, seconds] of SPANS) {
  const node = el("button", { type: "button", "data-span": String(seconds), text });
  node.addEventListener("click", () => { wanted.span_s = seconds; ask(); });
  $("spans").append(node);
}
for (const node of $("views").children) node.addEventListener("click", () => { wanted.view = node.dataset.view; wanted.series = wanted.series.slice(0, most()); ask(); });
$("back").addEventListener("click", () => look({ moved_us: -wanted.span_s * 5e5 }));
$("forth").addEventListener("click", () => look({ moved_us: wanted.span_s * 5e5 }));
$("closer").addEventListener("click", () => zoom(0.5));
$("wider").addEventListener("click", () => zoom(2));
$("now").addEventListener("click", () => { wanted.to = 0; ask(); });
$("add-all").addEventListener("click", () => add(shownSeries.map((s) => s.series_id)));
$("more-results").addEventListener("click", () => find(true));
$("search").value = wanted.q;
$("label").value = wanted.label;
onSearch((q) => { wanted.q = q; find(); });
let labelling = 0;
$("label").addEventListener("input", () => {
  clearTimeout(labelling);
  labelling = setTimeout(() => { const text = $("label").value.trim(); if (!text || /^[^=]+=/.test(text)) { wanted.label = text; find(); } }, 300);
});
for (const name of ["component", "type"]) $(name).addEventListener("change", () => { wanted[name] = $(name).value; find(); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping()) return;
  const button = { ArrowLeft: "back", ArrowRight: "forth", "+": "closer", "-": "wider", "−": "wider", n: "now" }[event.key];
  if (!button || (event.key.startsWith("Arrow") && document.activeElement?.matches(".scroll, pre"))) return;
  event.preventDefault();
  $(button).click();
});
const recolour = () => setTimeout(() => plots.forEach((plot) => plot.recolour()));
$("theme").addEventListener("click", recolour);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
new ResizeObserver(() => plots.forEach((plot) => plot.resize())).observe($("plots"));

async function choices() {
  try {
    const [kinds, fleet] = await Promise.all([get("/api/series/components"), get("/api/fleet")]);
    const names = new Map();
    kinds.components.forEach((c) => names.set(c.component_type, (names.get(c.component_type) || 0) + c.series));
    const fill = (node, first, all, chosen) => {
      if (chosen && !all.some(([v]) => v === chosen)) all.unshift([chosen, ""]);
      node.replaceChildren(el("option", { value: "", text: first }), ...all.map(([v, n]) => el("option", { value: v, text: n ? `${v} (${count(n)})` : v })));
      node.value = chosen;
    };
    fill($("component"), "everything", [...names], wanted.component);
    fill($("type"), "all types", fleet.types.map((t) => [t.type, t.devices]), wanted.type);
  } catch { /* the list says what is wrong */ }
}
polls.push(choices, () => find());
choices();
find();
drawSpan();
$("live").textContent = "ready";
poll(2000, async () => {
  const due_s = Math.min(CURVES_S_MAX, Math.max(CURVES_S_MIN, wanted.span_s / 300));
  if (wanted.series.length && !wanted.to && Date.now() - askedAt > due_s * 1000) await ask();
});
ask();
