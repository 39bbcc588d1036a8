// The overview, on one screen: flow, fleet, and what needs somebody. It polls the JSON views of its own origin.
"use strict";

const STATUS_INTERVAL_MS = 1000;
const LIST_INTERVAL_MS = 2000;
const FLEET_INTERVAL_MS = 10000;
const REFUSALS_INTERVAL_MS = 5000;
const ALARMS_SHOWN = 3;
const REFUSALS_SHOWN = 3;
// Lag above which a stage is drawn as behind: some seconds of a busy pipeline.
const LAG_WARN_RECORDS = 20000;
const STAGES = {
  connectors: "Connectors", normalize: "normalize", validate: "validate", alarm: "alarm", notify: "notify",
  sink: "sink", sync: "sync", postgres: "PostgreSQL", clickhouse: "ClickHouse",
};
// Stage that helps -> the one that it stands behind: by its name up to the first dash, or as here.
const HELPS = { route: "notify", group: "notify", registry: "normalize", employees: "sync" };
const OTHERS = "others";
const mainOf = (name) => HELPS[name] || (STAGES[name.split("-")[0]] ? name.split("-")[0] : OTHERS);

// ---- flow ----------------------------------------------------------------------------------------------------------

const boxes = new Map();

function box(name) {
  const [svg, path] = drawing("0 0 60 22", { preserveAspectRatio: "none" });
  const parts = {
    root: el("div", { class: "stage" }), mark: el("span", { class: "mark" }), rate: el("span"), unit: el("small"),
    detail: el("div", { class: "detail" }), path, svg, loud: el("ul", { class: "loud" }), calm: helpersOf(name),
  };
  parts.root.append(
    el("h3", {}, el("span", { text: STAGES[name] || name }), parts.mark),
    el("div", { class: "rate" }, parts.rate, " ", parts.unit), parts.detail, svg, parts.loud, parts.calm.root,
  );
  boxes.set(name, parts);
  return parts.root;
}

// The helpers of a stage that are well: counted, and shown when opened.
function helpersOf() {
  const parts = { summary: el("summary", { class: "quiet" }), list: el("ul") };
  parts.root = el("details", { class: "helpers", hidden: true }, parts.summary, parts.list);
  return parts;
}

function helperLine({ stage, state, mark, details }) {
  const said = [`${rate(stage.received_per_s)} records/s`, ...details.map(([text]) => text)].join(" · ");
  return el("li", { class: state }, el("b", { text: stage.name }), " ", el("span", { class: "mark", text: mark }), " ", el("span", { class: "quiet", text: said }));
}

// Those that have something to say show; of the others, how many there are.
function drawHelpers(loud, calm, helpers) {
  const saying = helpers.filter((h) => h.state === "bad" || h.state === "warn" || h.stage.errors_per_s > 0);
  const well = helpers.filter((h) => !saying.includes(h));
  loud.replaceChildren(...saying.map(helperLine));
  calm.root.hidden = !well.length;
  calm.summary.textContent = `${well.length} ${well.length === 1 ? "helper" : "helpers"}, ${well.some((h) => h.state === "good") ? "well" : "idle"}`;
  if (calm.root.open) calm.list.replaceChildren(...well.map(helperLine));
}
const others = { loud: el("ul", { class: "loud" }), calm: helpersOf() };

function layFlow() {
  const step = (name, first) => el("div", { class: first ? "step first" : "step" }, box(name));
  $("flow").replaceChildren(
    step("connectors", true), step("normalize"), step("validate"),
    el("div", { class: "branches" },
      el("div", { class: "branch" }, step("alarm"), step("notify")),
      el("div", { class: "branch" }, step("sink"), step("postgres")),
      el("div", { class: "branch" }, step("sync"), step("clickhouse"))),
  );
  $("others").replaceChildren(others.loud, others.calm.root);
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

function judged(stage) {
  let [state, mark] = ["good", "running"];
  if (stage.fuse_blown) [state, mark] = ["bad", "fuse blown"];
  else if (stage.stalled) [state, mark] = ["bad", "no progress"];
  else if (stage.paused > 0) [state, mark] = ["warn", `${stage.paused} paused`];
  else if (stage.lag > LAG_WARN_RECORDS) [state, mark] = ["warn", "behind"];
  else if (!stage.received_total) [state, mark] = ["", "idle"];
  const details = [[`lag ${count(stage.lag)}`, stage.lag > LAG_WARN_RECORDS], [`pending ${count(stage.pending)}`, false]];
  details.push([`errors ${count(stage.errors_total)}${stage.errors_per_s ? ` (${rate(stage.errors_per_s)}/s)` : ""}`, stage.errors_per_s > 0]);
  if (stage.commit_age_s > 5) details.push([`commit ${span(Math.round(stage.commit_age_s))} ago`, stage.commit_age_s > 30]);
  return { stage, state, mark, details };
}

function drawStages(stages) {
  const helpers = new Map();
  for (const found of stages.map(judged)) {
    const { stage, state, mark, details } = found;
    if (boxes.has(stage.name)) drawBox(stage.name, { state, mark, rate: stage.received_per_s, unit: "records/s", details, points: stage.curve });
    else helpers.set(mainOf(stage.name), [...(helpers.get(mainOf(stage.name)) || []), found]);
  }
  for (const [name, parts] of boxes) drawHelpers(parts.loud, parts.calm, helpers.get(name) || []);
  drawHelpers(others.loud, others.calm, helpers.get(OTHERS) || []);
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
  drawStages(s.stages);
  const dependency = (name) => s.dependencies.find((d) => d.name === name);
  drawStore("postgres", s.stores.postgres, dependency("postgres"));
  drawStore("clickhouse", s.stores.clickhouse, dependency("clickhouse"));

  const down = s.dependencies.filter((d) => d.state === "down" || d.state === "trying");
  $("dependencies").replaceChildren(...down.map((d) => el("li", {},
    el("span", { text: d.name }),
    el("span", { class: `pill ${d.state === "up" ? "good" : d.state === "down" ? "bad" : d.state === "trying" ? "warn" : ""}`, text: d.detail ? `${d.state}: ${d.detail}` : d.state }))));

  drawGuards(s.guards, s.dependencies, down);
  drawWorkers(s.workers || [], s.workers_note);
  $("clock").textContent = instant(s.at);
}

// ---- fleet ---------------------------------------------------------------------------------------------------------

const FLEET = [["sending", "sending", "good"], ["failing", "failing quality", "bad"], ["silent", "silent for an hour", "warn"], ["never", "never seen", ""], ["off", "off", ""]];
let unknown = null;  // devices in no registry, as far as refusals were read
function drawFleet(f) {
  $("fig-devices").textContent = count(f.devices);
  const items = FLEET.filter(([name]) => f.states[name] || name !== "off").map(([name, text, cls]) => [`/devices?state=${name}`, f.states[name], text, cls]);
  items.push(["/refusals?code=unknown_device", unknown, "in no registry", unknown ? "warn" : ""]);
  const text = JSON.stringify(items);
  if ($("fleet").dataset.shown !== text) {
    $("fleet").dataset.shown = text;
    refill($("fleet"), ...items.map(([href, n, what, cls]) => el("li", {}, el("a", { href, class: n ? cls : "" }, el("b", { text: count(n) }), ` ${what}`))));
  }
  $("fleet-note").hidden = f.devices > 0;
  $("fleet-note").textContent = "No device is registered yet: preservarium registry apply examples/registry.yaml";
}

// ---- refusals ------------------------------------------------------------------------------------------------------

function drawRefused(page) {
  unknown = page.unknown_devices;
  $("refused-note").hidden = !page.note;
  $("refused-note").replaceChildren(...worded(page.note || ""));
  refill($("refused"), ...(page.refusals.length ? page.refusals.map((r) => el("li", { class: "indeterminate" },
    el("div", { class: "line" }, el("a", { href: `/refusals?code=${encodeURIComponent(r.code)}`, text: r.code }), el("span", { class: "quiet", text: age(r.at, nowUs) })),
    r.device_id ? el("div", {}, el("a", { class: "device-address", href: deviceUrl(r.device_id), text: r.device_id })) : null,
    el("div", { class: "clip", title: r.message, text: r.message })))
    : [el("li", { class: "none", text: page.complete ? "Nothing within the last day. What cannot be used stands here, with its bytes and the reason." : "not known yet" })]));
}

// ---- alarms --------------------------------------------------------------------------------------------------------

function drawAlarms(page) {
  $("fig-alarms").textContent = count(page.counts ? page.counts.total - silent(page.counts.state) : null);
  $("alarm-counts").replaceChildren(...(page.counts ? SEVERITIES.filter((s) => page.counts.severity[s]).map((s) =>
    el("li", { class: `severity ${s}` }, shape(s), el("b", { text: count(page.counts.severity[s]) }), el("span", { text: s }))) : []));
  $("flood").hidden = !(page.flood && page.flood.on);
  if (page.flood && page.flood.on) $("flood").textContent = `Alarm flood: ${count(page.flood.raised)} in ten minutes`;
  $("alarms-note").hidden = !page.note;
  $("alarms-note").textContent = page.note || "";
  refill($("alarms"), ...(page.alarms.length ? page.alarms.map((a) => el("li", { class: a.severity },
    el("div", { class: "line" }, severityMark(a.severity, a.state), el("span", { class: "quiet", text: age(a.occurred_at, nowUs) })),
    el("div", { class: "clip" }, el("a", { href: deviceUrl(a.device_id) }, el("b", { text: a.device_name || a.device_id })), " ", el("span", { class: "quiet", text: STATE_TEXT[a.state] || a.state })),
    el("div", { class: "clip", text: a.message || `${a.rule}: ${a.component_type ?? ""}` })))
    : [el("li", { class: "none", text: page.counts ? "None: no reading meets a rule now. Rules are in the registry." : "not known" })]));
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

function drawGuards(guards, dependencies, down) {
  const items = guardItems(guards, true);
  const wrong = items.filter(([bad]) => bad).map(([, item]) => item);
  // Redrawn only when something changed, so that a button keeps its focus.
  const text = JSON.stringify(guards);
  if ($("guards").dataset.shown !== text) {
    $("guards").dataset.shown = text;
    $("guards").replaceChildren(...wrong);
  }
  const [breakers, fuses] = [guards.breakers, guards.fuses].map((each) => Object.keys(each).length);
  $("well").textContent = wrong.length || down.length ? "" : `Nothing: ${dependencies.map((d) => d.name).join(", ") || "all servers"} answer, ${count(breakers)} breakers are closed, ${count(fuses)} fuses are whole.`;
}

// The other workers, as they said last. What is well is counted and can be opened, what is not is shown.
const openWorkers = new Set();
let calmOpen = false;
function drawWorkers(workers, note) {
  $("workers-note").textContent = note ? `What the others say is not heard now: ${note}.` : workers.length ? "" : "There are none.";
  const [loud, calm] = [false, true].map((well) => workers.filter((w) => (judgedWorker(w)[1] === "well") === well));
  // Redrawn only when something changed, so that focus stays; what grows with time is written into what is there.
  const text = JSON.stringify([loud, calm], (name, value) => (["at", "age_s", "tried_again_in_s"].includes(name) ? undefined : value));
  if ($("workers").dataset.shown !== text) {
    $("workers").dataset.shown = text;
    const rest = el("details", { class: "helpers", open: calmOpen }, el("summary", { class: "quiet", text: `${calm.length} well` }), ...calm.map(workerCard));
    rest.addEventListener("toggle", () => { calmOpen = rest.open; });
    $("workers").replaceChildren(...loud.map(workerCard), ...(calm.length ? [rest] : []));
  }
  const cards = $("workers").querySelectorAll("article");
  [...loud, ...calm].forEach((w, i) => {
    const ago = span(Math.round(w.age_s));
    cards[i].querySelector(".ago").textContent = w.gone ? `said nothing for ${ago}; what it said last:` : `${ago} ago · console at ${w.console}`;
  });
}

function judgedWorker(w) {
  const wrong = Object.values(w.guards.breakers).some((b) => b.state !== "closed") || Object.values(w.guards.fuses).some((f) => f.blown);
  return w.gone ? ["bad", "gone"] : !w.alive ? ["bad", "not healthy"] : wrong ? ["warn", "trouble"] : !w.ready ? ["warn", "not ready"] : ["good", "well"];
}

function workerCard(w) {
  const items = guardItems(w.guards, false);
  const [wrong, well] = [true, false].map((bad) => items.filter(([b]) => b === bad).map(([, item]) => item));
  const [cls, text] = judgedWorker(w);
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

async function fleet() {
  try { drawFleet(await get("/api/fleet")); }
  catch (e) {
    $("fleet-note").hidden = e.status === 401;
    $("fleet-note").textContent = `How many devices send is not known now: ${e.message}`;
  }
}

async function refused() {
  try { drawRefused(await get(`/api/refusals?limit=${REFUSALS_SHOWN}`)); }
  catch (e) { drawRefused({ refusals: [], unknown_devices: null, complete: false, note: e.status === 401 ? "" : e.message }); }
}

async function alarms() {
  try { drawAlarms(await get(`/api/alarms?state=annunciated&limit=${ALARMS_SHOWN}`)); }
  catch (e) { drawAlarms({ alarms: [], total: 0, counts: null, note: e.message }); }
}

layFlow();
poll(STATUS_INTERVAL_MS, status);
poll(LIST_INTERVAL_MS, alarms);
poll(REFUSALS_INTERVAL_MS, refused);
poll(FLEET_INTERVAL_MS, fleet);
onSlash();
// By this script, since the policy lets no form go anywhere.
$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  location.href = `/devices?${new URLSearchParams({ q: $("search").value.trim() })}`;
});
