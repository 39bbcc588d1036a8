// The overview: flow, devices, and what needs somebody. It polls the JSON views of its own origin.
"use strict";

const STATUS_INTERVAL_MS = 1000;
const LIST_INTERVAL_MS = 2000;
const DEVICES_LIMIT = 25;
const VALUES_SHOWN = 6;
// Lag above which a stage is drawn as behind: some seconds of a busy pipeline.
const LAG_WARN_RECORDS = 20000;
// A value older than this is drawn as old.
const AGE_WARN_S = 3600;

const QUALITY = {
  1: ["good", ""], 2: ["unknown", "not evaluated"], 3: ["suspect", "suspect"], 4: ["fail", "fail"], 9: ["unknown", "missing"],
};
const STAGES = {
  connectors: "Connectors", normalize: "normalize", validate: "validate", alarm: "alarm", notify: "notify",
  sink: "sink", sync: "sync", postgres: "PostgreSQL", clickhouse: "ClickHouse",
};

// ---- flow ----------------------------------------------------------------------------------------------------------

const boxes = new Map();

function box(name) {
  const [svg, path] = drawing("0 0 60 22", { preserveAspectRatio: "none" });
  const parts = {
    root: el("div", { class: "stage" }), mark: el("span", { class: "mark" }), rate: el("span"), unit: el("small"),
    detail: el("div", { class: "detail" }), path, svg,
  };
  parts.root.append(
    el("h3", {}, el("span", { text: STAGES[name] || name }), parts.mark),
    el("div", { class: "rate" }, parts.rate, " ", parts.unit), parts.detail, svg,
  );
  boxes.set(name, parts);
  return parts.root;
}

function layFlow() {
  const step = (name, first) => el("div", { class: first ? "step first" : "step" }, box(name));
  $("flow").replaceChildren(
    step("connectors", true), step("normalize"), step("validate"),
    el("div", { class: "branches" },
      el("div", { class: "branch" }, step("alarm"), step("notify")),
      el("div", { class: "branch" }, step("sink"), step("postgres")),
      el("div", { class: "branch" }, step("sync"), step("clickhouse"))),
  );
}

function curve(points) {
  if (!points || points.length < 2) return "";
  const top = Math.max(...points, 1);
  const step = 60 / (points.length - 1);
  return points.map((p, i) => `${i ? "L" : "M"}${(i * step).toFixed(1)} ${(21 - (p / top) * 20).toFixed(1)}`).join("");
}

function drawBox(name, { state, mark, rate: r, unit, details, points }) {
  const parts = boxes.get(name);
  if (!parts) return;
  parts.root.className = `stage ${state}`;
  parts.mark.textContent = mark;
  parts.rate.textContent = rate(r);
  parts.unit.textContent = unit;
  parts.detail.replaceChildren(...details.map(([text, over]) => el("span", { text, class: over ? "over" : null })));
  parts.svg.style.display = points ? "" : "none";
  if (points) parts.path.setAttribute("d", curve(points));
}

function drawStage(stage) {
  let [state, mark] = ["good", "running"];
  if (stage.fuse_blown) [state, mark] = ["bad", "fuse blown"];
  else if (stage.stalled) [state, mark] = ["bad", "no progress"];
  else if (stage.paused > 0) [state, mark] = ["warn", `${stage.paused} paused`];
  else if (stage.lag > LAG_WARN_RECORDS) [state, mark] = ["warn", "behind"];
  else if (!stage.received_total) [state, mark] = ["", "idle"];
  const details = [[`lag ${count(stage.lag)}`, stage.lag > LAG_WARN_RECORDS], [`pending ${count(stage.pending)}`, false]];
  details.push([`errors ${count(stage.errors_total)}${stage.errors_per_s ? ` (${rate(stage.errors_per_s)}/s)` : ""}`, stage.errors_per_s > 0]);
  if (stage.commit_age_s > 5) details.push([`commit ${span(Math.round(stage.commit_age_s))} ago`, stage.commit_age_s > 30]);
  drawBox(stage.name, { state, mark, rate: stage.received_per_s, unit: "records/s", details, points: stage.curve });
}

function drawStore(name, store, dependency) {
  const open = dependency && dependency.state === "down";
  drawBox(name, {
    state: open ? "bad" : store ? "good" : "", mark: open ? "down" : dependency ? dependency.state : "",
    rate: store ? store.per_s : 0, unit: "rows/s",
    details: store ? Object.entries(store.rows).map(([k, v]) => [`${k} ${count(v)}`, k === "rejected" && v > 0]) : [["no rows yet", false]],
    points: null,
  });
}

// ---- status --------------------------------------------------------------------------------------------------------

let nowUs = Date.now() * 1000;

function drawStatus(s) {
  nowUs = s.at;
  $("fig-rate").textContent = rate(s.readings_per_s);
  $("fig-lag").textContent = count(s.lag);
  $("fig-errors").textContent = rate(s.errors_per_s);
  $("worker").textContent = `${s.worker.id} · up ${span(Math.round(s.worker.uptime_s))} · ${s.version}`;
  const pill = $("health");
  const [cls, text] = !s.health.alive ? ["bad", "not healthy"] : !s.health.ready ? ["warn", "not ready"] : ["good", "healthy"];
  if (pill.textContent !== text) pill.textContent = text;
  pill.className = `pill ${cls}`;
  const reasons = [...s.health.reasons];
  $("banner").hidden = reasons.length === 0;
  $("banner").textContent = reasons.join(" · ");

  // Connectors may be processes of their own, so what arrives is read off the raw topic and not off counters here.
  const connectors = Object.entries(s.connectors);
  const details = connectors.map(([name, c]) => [`${name}: ${count(c.taken)} taken here`, false]);
  const refused = connectors.reduce((sum, [, c]) => sum + c.refused, 0);
  if (refused) details.push([`refused ${count(refused)}`, true]);
  drawBox("connectors", {
    state: s.arriving_per_s > 0 ? "good" : "", mark: s.arriving_per_s > 0 ? "sending" : "silent",
    rate: s.arriving_per_s, unit: "records/s", details: details.length ? details : [["MQTT, HTTP, files", false]], points: null,
  });
  for (const stage of s.stages) {
    if (!boxes.has(stage.name)) $("others").append(box(stage.name));
    drawStage(stage);
  }
  $("others").hidden = !$("others").children.length;
  const dependency = (name) => s.dependencies.find((d) => d.name === name);
  drawStore("postgres", s.stores.postgres, dependency("postgres"));
  drawStore("clickhouse", s.stores.clickhouse, dependency("clickhouse"));

  $("dependencies").replaceChildren(...s.dependencies.map((d) => el("li", {},
    el("span", { text: d.name }),
    el("span", { class: `pill ${d.state === "up" ? "good" : d.state === "down" ? "bad" : d.state === "trying" ? "warn" : ""}`, text: d.detail ? `${d.state}: ${d.detail}` : d.state }))));

  drawGuards(s.guards);
  drawWorkers(s.workers || [], s.workers_note);
  $("errors-span").textContent = s.errors.length ? `of late: ${span(Math.round(s.errors_span_s))}` : "";
  $("error-rows").replaceChildren(...(s.errors.length ? s.errors.slice(0, 12).map((e) => el("tr", {},
    el("td", { text: e.code }), el("td", { text: e.stage }),
    el("td", { class: "num", text: count(e.recent) }), el("td", { class: "num", text: count(e.total) })))
    : [el("tr", {}, el("td", { colspan: "4", class: "quiet", text: "none" }))]));
  $("clock").textContent = instant(s.at);
}

// ---- devices -------------------------------------------------------------------------------------------------------

const rows = new Map();
const expanded = new Set();
let query = "";

function chip(value) {
  const [cls, flag] = QUALITY[value.quality] || ["unknown", ""];
  const pin = value.pin_position && value.pin_position !== "-1" ? ` [${value.pin_position}]` : "";
  const why = [flag, ...(value.flags || [])].filter(Boolean).join(", ");
  return el("span", { class: `value ${cls}`, title: `${age(value.timestamp, nowUs)} ago${why ? ` · ${why}` : ""}` },
    el("i", { text: `${value.component_type}${pin} ` }),
    el("b", { text: value.value === null || value.value === undefined ? (value.value_text ?? "–") : number(value.value) }),
    value.unit ? ` ${value.unit}` : null,
    why && cls !== "good" ? el("span", { class: "flag", text: ` ⚑ ${why}` }) : null);
}

function drawValues(entry) {
  const { device, cell } = entry;
  const all = device.values;
  const open = expanded.has(device.device_id);
  const list = el("div", { class: "values" }, ...all.slice(0, open ? all.length : VALUES_SHOWN).map(chip));
  if (!all.length) list.append(el("span", { class: "quiet", text: device.enabled ? "nothing yet" : "switched off" }));
  const focused = cell.contains(document.activeElement);
  if (all.length > VALUES_SHOWN) {
    const more = el("button", { type: "button", class: "more", "aria-expanded": String(open), text: open ? "fewer" : `+${all.length - VALUES_SHOWN}` });
    more.addEventListener("click", () => { open ? expanded.delete(device.device_id) : expanded.add(device.device_id); drawValues(entry); });
    list.append(more);
    queueMicrotask(() => { if (focused) more.focus(); });
  }
  cell.replaceChildren(list);
}

function deviceRow(device) {
  let entry = rows.get(device.device_id);
  const text = JSON.stringify(device.values) + device.enabled;
  if (!entry) {
    entry = { row: el("tr"), cell: el("td"), age: el("td", { class: "num" }), name: el("div", { class: "device-name" }), address: el("div", { class: "device-address" }) };
    entry.row.append(el("td", {}, entry.name, entry.address), entry.cell, entry.age);
    rows.set(device.device_id, entry);
  }
  entry.device = device;
  entry.name.textContent = device.name || device.device_id;
  entry.address.textContent = [device.name ? device.device_id : null, device.type].filter(Boolean).join(" · ");
  if (entry.text !== text) { entry.text = text; drawValues(entry); }
  entry.age.textContent = age(device.last_seen, nowUs);
  entry.age.className = `num${device.last_seen && nowUs - device.last_seen > AGE_WARN_S * 1e6 ? " old" : ""}`;
  return entry.row;
}

function drawDevices(page) {
  const kept = new Set(page.devices.map((d) => d.device_id));
  for (const id of rows.keys()) if (!kept.has(id)) { rows.delete(id); expanded.delete(id); }
  const wanted = page.devices.map(deviceRow);
  const body = $("device-rows");
  // Rows are replaced only when the list changed, so that focus and selection stay where they are.
  if (wanted.length !== body.children.length || wanted.some((row, i) => body.children[i] !== row)) body.replaceChildren(...wanted);
  if (!wanted.length) body.replaceChildren(el("tr", {}, el("td", { colspan: "3", class: "quiet", text: query ? "no device matches" : "no devices yet" })));
  if (page.total !== null && page.total !== undefined) $("fig-devices").textContent = count(page.total);
  $("devices-note").hidden = !page.note;
  $("devices-note").textContent = page.note || "";
  drawPager(page);
}

function drawAlarms(page) {
  $("fig-alarms").textContent = count(page.counts ? page.counts.total - silent(page.counts.state) : null);
  $("alarm-counts").replaceChildren(...(page.counts ? SEVERITIES.filter((s) => page.counts.severity[s]).map((s) =>
    el("li", { class: `severity ${s}` }, shape(s), el("b", { text: count(page.counts.severity[s]) }), el("span", { text: s }))) : []));
  $("flood").hidden = !(page.flood && page.flood.on);
  if (page.flood && page.flood.on) $("flood").textContent = `Alarm flood: ${count(page.flood.raised)} in ten minutes`;
  $("alarms-note").hidden = !page.note;
  $("alarms-note").textContent = page.note || "";
  $("alarms").replaceChildren(...(page.alarms.length ? page.alarms.map((a) => el("li", { class: a.severity },
    el("div", { class: "line" }, severityMark(a.severity, a.state), el("span", { class: "quiet", text: age(a.occurred_at, nowUs) })),
    el("div", {}, el("b", { text: a.device_name || a.device_id }), " ", el("span", { class: "quiet", text: STATE_TEXT[a.state] || a.state })),
    el("div", { text: a.message || `${a.rule}: ${a.component_type ?? ""}` })))
    : [el("li", { class: "none", text: page.counts ? "none" : "not known" })]));
  const more = page.total - page.alarms.length;
  $("alarms-more").textContent = more > 0 ? `All alarms, and ${count(more)} more →` : "All alarms →";
}

function silent(states) {
  return (states.shelved || 0) + (states.suppressed || 0) + (states.out_of_service || 0);
}

// ---- breakers and fuses --------------------------------------------------------------------------------------------

const BREAKERS = { closed: ["good", "closed"], half_open: ["warn", "being tried"], open: ["bad", "open"] };

// Closing a fuse is an operator's.
async function resetFuse(name) {
  const headers = authorized({ "Content-Type": "application/json" });
  let text = `${name}: the fuse is closed again.`;
  try {
    const response = await fetch(`/api/fuses/${encodeURIComponent(name)}/reset`, { method: "POST", headers, body: "{}", signal: AbortSignal.timeout(TIMEOUT_MS) });
    const said = await response.json();
    if (response.status === 401) text = "An operator token is needed.";
    else if (!response.ok) text = said.error || `refused (${response.status})`;
  } catch (e) { text = `The worker does not answer: ${e.message}`; }
  $("guards-note").hidden = false;
  $("guards-note").textContent = text;
}

function guard(name, what, cls, text, detail, blown) {
  const again = blown ? el("button", { type: "button", "aria-label": `Close the fuse of ${name} again`, text: "Close again" }) : null;
  if (again) again.addEventListener("click", () => resetFuse(name));
  return el("li", {}, el("span", {}, el("b", { text: name }), " ", el("span", { class: "quiet", text: what })),
    el("span", { class: `pill ${cls}`, text }), detail ? el("span", { class: "why", text: detail }) : null, again);
}

function guardItems(guards, mine) {
  const breakers = Object.entries(guards.breakers).map(([name, b]) => {
    const [cls, text] = BREAKERS[b.state] || ["", b.state];
    // When it is tried again is a thing of now, which another worker's word is not.
    const again = mine && b.tried_again_in_s ? `tried again in ${Math.ceil(b.tried_again_in_s)} s` : "";
    const failed = b.state === "closed" && b.failures ? `${b.failures} failures in a row` : "";
    return [b.state !== "closed", guard(name, "breaker", cls, text, [again, failed, b.reason].filter(Boolean).join(" · "))];
  });
  const fuses = Object.entries(guards.fuses).map(([name, f]) => [f.blown, guard(name, "fuse", f.blown ? "bad" : f.refused ? "warn" : "good",
    f.blown ? "blown" : "whole",
    [f.blown ? f.reason : "", f.refused ? `${count(f.refused)} of the last ${count(f.records)} records refused, blows above ${count(f.refused_max)}` : ""].filter(Boolean).join(" · "), mine && f.blown)]);
  return [...breakers, ...fuses];
}

function drawGuards(guards) {
  // Redrawn only when something changed, so that a button keeps its focus.
  const text = JSON.stringify(guards);
  if ($("guards").dataset.shown === text) return;
  $("guards").dataset.shown = text;
  $("guards").replaceChildren(...guardItems(guards, true).map(([, item]) => item));
}

// The other workers, as they said last. What is well is counted and can be opened, what is not is shown.
const openWorkers = new Set();
function drawWorkers(workers, note) {
  $("workers-note").textContent = note ? `What the others say is not heard now: ${note}.` : workers.length ? "" : "There are none.";
  // Redrawn only when something changed, so that focus stays; what grows with time is written into what is there.
  const text = JSON.stringify(workers, (name, value) => (["at", "age_s", "tried_again_in_s"].includes(name) ? undefined : value));
  if ($("workers").dataset.shown !== text) {
    $("workers").dataset.shown = text;
    $("workers").replaceChildren(...workers.map(workerCard));
  }
  workers.forEach((w, i) => {
    const ago = span(Math.round(w.age_s));
    $("workers").children[i].querySelector(".ago").textContent = w.gone ? `said nothing for ${ago}; what it said last:` : `${ago} ago · console at ${w.console}`;
  });
}

function workerCard(w) {
  const items = guardItems(w.guards, false);
  const [wrong, well] = [true, false].map((bad) => items.filter(([b]) => b === bad).map(([, item]) => item));
  const [cls, text] = w.gone ? ["bad", "gone"] : !w.alive ? ["bad", "not healthy"] : wrong.length ? ["warn", "trouble"] : !w.ready ? ["warn", "not ready"] : ["good", "well"];
  const rest = el("details", { open: openWorkers.has(w.worker) }, el("summary", { class: "quiet", text: `${well.length} closed or whole` }), el("ul", { class: "deps guards" }, ...well));
  rest.addEventListener("toggle", () => { rest.open ? openWorkers.add(w.worker) : openWorkers.delete(w.worker); });
  return el("article", { class: `worker${w.gone ? " gone" : ""}` },
    el("div", { class: "line" }, el("b", { text: w.worker }), el("span", { class: `pill ${cls}`, text })),
    el("div", { class: "quiet ago" }),
    (w.reasons || []).length ? el("div", { class: "quiet", text: w.reasons.join("; ") }) : null,
    wrong.length ? el("ul", { class: "deps guards" }, ...wrong) : null,
    well.length ? rest : null);
}

// ---- asking --------------------------------------------------------------------------------------------------------

async function status() {
  try { drawStatus(await get("/api/status")); }
  catch (e) {
    $("health").className = "pill bad";
    $("health").textContent = e.status === 401 ? "for operators" : "no answer";
    $("banner").hidden = e.status === 401;
    $("banner").textContent = `The worker does not answer: ${e.message}. What is shown may be old.`;
  }
}

async function devices() {
  const parameters = new URLSearchParams({ limit: String(DEVICES_LIMIT) });
  if (query) parameters.set("q", query);
  const asked = `${query} ${cursors.at(-1)}`;
  if (cursors.at(-1)) parameters.set("cursor", cursors.at(-1));
  try {
    const page = await get(`/api/devices?${parameters}`);
    if (asked === `${query} ${cursors.at(-1)}`) drawDevices(page);
  } catch (e) { $("devices-note").hidden = false; $("devices-note").textContent = e.message; }
}

async function alarms() {
  try { drawAlarms(await get("/api/alarms?state=annunciated&limit=8")); }
  catch (e) { drawAlarms({ alarms: [], total: 0, counts: null, note: e.message }); }
}

layFlow();
poll(STATUS_INTERVAL_MS, status);
const askDevices = poll(LIST_INTERVAL_MS, devices);
poll(LIST_INTERVAL_MS, alarms);

onPage(askDevices);
onSearch((text) => { query = text; cursors.length = 1; devices(); });
