// The alarm list: what is not normal, of the whole system, and what an operator does about it. It polls /api/alarms,
// sends actions, and says what became of them: the machine decides, and its answer is waited for.
"use strict";

const HISTORY_INTERVAL_MS = 5000;
// The machine answers within a second; a worker that starts takes longer.
const ANSWER_S = 20;

// What has returned, of the database, newest first.
const PAST = "cleared";
const TABS = [
  ["waiting", "Needs somebody"], ["standing", "All"], ["active", "Condition true"], ["shelved", "Shelved"], ["out-of-service,suppressed", "Out of service"],
  [PAST, "Past"],
];
const SHELVE = [[900, "15 min"], [3600, "1 h"], [8 * 3600, "8 h"], [86400, "1 day"], [7 * 86400, "1 week"]];
const ACTIONS = {
  acknowledge: ["Acknowledge", "Acknowledge this alarm"], clear: ["Reset", "Reset this latched alarm"], comment: ["Comment", "Add a comment"],
  shelve: ["Shelve", "Shelve this alarm"], unshelve: ["Unshelve", "Bring this alarm back"],
  suppress: ["Suppress", "Suppress this alarm"], unsuppress: ["End suppression", "End the suppression"],
  out_of_service: ["Out of service", "Take this alarm out of service"], return_to_service: ["Return to service", "Bring this alarm back into service"],
};
// What the machine's table allows in a state; the first one is the one at hand.
const ALLOWED = {
  unacknowledged: ["acknowledge", "shelve", "comment", "out_of_service"],
  acknowledged: ["shelve", "comment", "out_of_service"],
  returned_unacknowledged: ["acknowledge", "shelve", "comment", "out_of_service"],
  latched_unacknowledged: ["acknowledge", "shelve", "comment", "out_of_service"],
  latched: ["clear", "shelve", "comment", "out_of_service"],
  shelved: ["unshelve", "shelve", "comment", "out_of_service"],
  suppressed: ["unsuppress", "comment", "out_of_service"],
  out_of_service: ["return_to_service", "comment"],
  normal: ["shelve", "out_of_service"],
};

let state = "standing";
let order = "priority";
let query = new URLSearchParams(location.search).get("q") || "";
const severities = new Set();
const pending = new Set();  // keys of alarms with an action under way
const chosen = new Map();  // keys of the alarms with a check mark -> each as it was when it got it
// What may be done to several alarms at once.
const BULK = ["acknowledge", "shelve", "unshelve", "comment"];
// The dialog stays open so long for the answers of several.
const BULK_WAIT_S = 10;

const keyOf = (a) => JSON.stringify([a.device_id, a.rule, a.pin_position, state === PAST ? a.alarm_id : ""]);
const pinOf = (a) => (a.pin_position && a.pin_position !== "-1" ? ` [${a.pin_position}]` : "");

// ---- rows ----------------------------------------------------------------------------------------------------------

function button(action, alarm, cls) {
  const [text, title] = ACTIONS[action];
  const node = el("button", { type: "button", class: cls, "data-action": action, "aria-label": `${text}: ${alarm.device_name || alarm.device_id}, ${alarm.rule}` }, text);
  node.addEventListener("click", (event) => { event.stopPropagation(); ask(action, alarm); });
  node.title = title;
  return node;
}

function marks(alarm) {
  const found = [];
  if (alarm.first_out) found.push(["first out", "The first of its group: what came after may follow from it"]);
  if (alarm.chattering) found.push(["chattering", "Raised three times a minute or more"]);
  if (alarm.group) found.push([alarm.group, "Suppression group"]);
  return found.map(([text, title]) => el("span", { class: "tag", title, text }));
}

function stateText(alarm) {
  const nodes = [el("span", { class: "statename", text: STATE_TEXT[alarm.state] || alarm.state })];
  if (alarm.state === "shelved") {
    nodes.push(el("span", { class: "quiet", text: alarm.shelved_until ? `${span(Math.max(0, Math.round((alarm.shelved_until - nowUs) / 1e6)))} left` : "" }));
    if (alarm.one_shot) nodes.push(el("span", { class: "quiet", text: "one shot" }));
  }
  if (alarm.active === true && ["shelved", "suppressed", "out_of_service"].includes(alarm.state)) nodes.push(el("span", { class: "tag", text: "condition is true" }));
  if (alarm.actor) nodes.push(el("span", { class: "quiet", text: `${alarm.actor}${alarm.comment ? `: ${alarm.comment}` : ""}` }));
  return nodes;
}

function row(alarm) {
  const key = keyOf(alarm);
  let entry = rows.get(key);
  if (!entry) {
    entry = newEntry(key, ["check", "severity", "state", "device", "what", "value num", "limit num", "age num", "do"]);
    entry.check = el("input", { type: "checkbox", tabindex: "-1", "aria-label": `Select: ${alarm.device_name || alarm.device_id}, ${alarm.rule}` });
    entry.check.addEventListener("change", () => choose(entry, entry.check.checked));
    entry.cells[0].append(el("label", {}, entry.check));
  }
  const text = JSON.stringify(alarm) + pending.has(key) + (opened === key);
  entry.alarm = alarm;
  if (entry.text !== text) {
    entry.text = text;
    const [, severity, st, device, what, value, limit, , act] = entry.cells;
    const silent = ["shelved", "suppressed", "out_of_service"].includes(alarm.state);
    entry.row.className = `alarm ${alarm.severity} ${WAITING.has(alarm.state) ? "waiting" : silent ? "silent" : "answered"}${pending.has(key) ? " pending" : ""}`;
    severity.replaceChildren(severityMark(alarm.severity, alarm.state));
    device.replaceChildren(el("div", { class: "device-name", text: alarm.device_name || alarm.device_id }),
      el("div", { class: "device-address", text: alarm.device_name ? alarm.device_id : "" }));
    what.replaceChildren(alarm.message ? el("div", { text: alarm.message }) : "", el("div", { class: alarm.message ? "device-address" : "", text: `${alarm.rule}${pinOf(alarm)}` }), ...marks(alarm));
    value.textContent = measured(alarm.value, alarm.unit);
    limit.textContent = measured(alarm.threshold, alarm.unit);
    const first = (ALLOWED[alarm.state] || [])[0];
    const second = first === "acknowledge" ? "shelve" : null;
    const buttons = state === PAST ? [] : [first && button(first, alarm, first === "acknowledge" ? "primary" : ""), second && button(second, alarm, "")].filter(Boolean);
    placeButtons(entry, act, `${alarm.device_name || alarm.device_id}, ${alarm.rule}`, buttons);
  }
  const since = alarm.occurred_at || alarm.transition_at;
  entry.cells[2].replaceChildren(...stateText(alarm));
  entry.cells[7].textContent = age(since, nowUs);
  entry.cells[7].title = since ? new Date(since / 1000).toISOString() : "";
  return entry;
}

function draw(page) {
  shown = page;
  nowUs = page.at || Date.now() * 1000;
  const wanted = [];
  const kept = new Set();
  for (const alarm of page.alarms) {
    const entry = row(alarm);
    kept.add(entry.key);
    wanted.push(entry.row);
    if (opened === entry.key) wanted.push(detail(entry));
  }
  place(wanted, kept);
  // What is no longer shown, or is another occurrence by now, is not what was chosen.
  for (const [key, alarm] of chosen) if (rows.get(key)?.alarm.alarm_id !== alarm.alarm_id) chosen.delete(key);
  drawChosen();
  $("total").textContent = page.total === null || page.total === undefined ? "" : count(page.total);
  drawn(page, query || severities.size ? "No alarm is like that." : state === "waiting" ? "Nothing waits for anybody." : "No alarm stands. One is raised when a reading meets a rule that watches its device; rules are in the registry.");
  if (page.counts) drawCounts(page);
  live(...(state === PAST ? ["", "from the database"] : page.source !== "kafka" ? ["warn", "from the database"] : page.complete === false ? ["warn", "may be old"] : ["good", "live"]));
  note(page.note || "");
}

function drawCounts(page) {
  for (const name of SEVERITIES) {
    const node = $(`count-${name}`);
    const [waits, all] = [page.counts.waiting[name], page.counts.severity[name]];
    node.querySelector("b").textContent = count(all);
    node.querySelector("small").textContent = waits ? `${count(waits)} open` : "";
    node.classList.toggle("zero", !all);
  }
  const flood = page.flood;
  const text = flood && flood.on ? `Alarm flood: ${count(flood.raised)} alarms in ten minutes, more than anybody can work through (${flood.limit}). The most severe come first.` : "";
  if ($("flood").textContent !== text) $("flood").textContent = text;
  $("flood").hidden = !text;
  const waiting = Object.values(page.counts.waiting).reduce((a, b) => a + b, 0);
  document.title = `${waiting ? `(${count(waiting)}) ` : ""}Alarms · Preservarium`;
}

// ---- several at once -----------------------------------------------------------------------------------------------

function choose(entry, on) {
  on ? chosen.set(entry.key, entry.alarm) : chosen.delete(entry.key);
  drawChosen();
}

// Those of the chosen that an action may be done to, as they stand now.
const fit = (action) => [...chosen.keys()].map((key) => rows.get(key).alarm).filter((alarm) => (ALLOWED[alarm.state] || []).includes(action));

function drawChosen() {
  for (const entry of rows.values()) {
    entry.check.checked = chosen.has(entry.key);
    entry.row.setAttribute("aria-selected", String(entry.check.checked));
  }
  $("selection").hidden = state === PAST || !rows.size;
  $("selection").classList.toggle("on", chosen.size > 0);
  $("all").checked = chosen.size > 0 && chosen.size === rows.size;
  $("all").indeterminate = chosen.size > 0 && chosen.size < rows.size;
  const text = chosen.size ? `${chosen.size} of ${rows.size} selected` : "";
  if ($("chosen").textContent !== text) $("chosen").textContent = text;
  $("bulk").hidden = !chosen.size;
  for (const node of $("bulk").children) {
    const many = node.dataset.bulk ? fit(node.dataset.bulk).length : chosen.size;
    node.disabled = !many;
    if (node.dataset.bulk) node.textContent = `${ACTIONS[node.dataset.bulk][0]} ${many}`;
  }
}

function showRefusals(action, results) {
  const refused = results.filter((result) => result.outcome === "refused");
  $("results").hidden = !refused.length;
  $("r-title").textContent = `${ACTIONS[action][0]}: ${refused.length} of ${results.length} refused`;
  const names = new Map([...rows.values()].map(({ alarm }) => [JSON.stringify([alarm.device_id, alarm.rule, alarm.pin_position]), alarm]));
  $("r-list").replaceChildren(...refused.map((result) => {
    const alarm = names.get(JSON.stringify([result.device_id, result.rule, result.pin_position])) || result;
    return el("li", {}, el("b", { text: `${alarm.device_name || result.device_id} · ${result.rule}${pinOf(result)}` }), ` – ${result.reason}`);
  }));
}

// ---- details -------------------------------------------------------------------------------------------------------

function detail(entry) {
  if (!entry.detail) {
    entry.facts = el("dl", { class: "facts" });
    entry.history = el("ol", { class: "history" });
    entry.all = el("div", { class: "buttons left" });
    entry.detail = el("tr", { class: "detail" }, el("td", { colspan: "9" },
      entry.all, entry.facts, el("h3", { text: "History" }), entry.history));
    loadHistory(entry);
  }
  const alarm = entry.alarm;
  const text = JSON.stringify(alarm);
  if (entry.detailText !== text) {
    entry.detailText = text;
    entry.all.replaceChildren(...(state === PAST ? [] : (ALLOWED[alarm.state] || []).map((action, i) => button(action, alarm, i ? "" : "primary"))));
    drawFacts(entry.facts, [
      ["Raised", instant(alarm.occurred_at)], ["Noticed", instant(alarm.detected_at)], ["Returned", instant(alarm.cleared_at)], ["Shelved until", instant(alarm.shelved_until)],
      ["Quantity", alarm.component_type], ["Kind", alarm.kind], ["Severity", alarm.severity], ["Occurrence", alarm.alarm_id],
    ]);
  }
  return entry.detail;
}

async function loadHistory(entry) {
  const a = entry.alarm;
  try {
    const page = await get(`/api/alarms/${[a.device_id, a.rule, a.pin_position].map(encodeURIComponent).join("/")}?limit=50`);
    entry.history.replaceChildren(...(page.history && page.history.length ? page.history.map((h) => el("li", { class: h.reason ? "refused" : "" },
      el("time", { datetime: new Date(h.at / 1000).toISOString(), text: instant(h.at).slice(0, 19) }),
      el("span", {}, el("b", { text: h.name.replaceAll("_", " ") }), h.value !== null && h.value !== undefined && h.what === "transition" && h.name === "raised" ? ` at ${number(h.value)}` : "",
        h.actor ? ` by ${h.actor}` : "", h.reason ? ` – refused: ${h.reason}` : "", h.comment ? el("q", { text: h.comment }) : null),
      el("span", { class: "quiet", text: `${age(h.at, nowUs)} ago` })))
      : [el("li", { class: "quiet", text: page.history_note || "nothing is stored of it yet" })]));
  } catch (e) { entry.history.replaceChildren(el("li", { class: "quiet", text: e.message })); }
}

// ---- acting --------------------------------------------------------------------------------------------------------

let asked = null;
let before = null;

// Asks what is to be known before an action on one alarm, or on several.
function ask(action, alarm, several = null) {
  asked = { action, alarm, several };
  before = { key: several ? null : keyOf(alarm), action };
  const words = (a) => [severityMark(a.severity, a.state), el("span", { text: `${a.device_name || a.device_id} · ${a.message || a.rule}` })];
  $("d-about").classList.toggle("several", !!several);
  $("d-about").tabIndex = several ? 0 : -1;
  $("d-about").replaceChildren(...(several ? several.map((a) => el("div", {}, ...words(a))) : words(alarm)));
  $("d-times").hidden = action !== "shelve";
  $("d-oneshot").checked = false;
  $("d-comment").value = "";
  $("d-optional").hidden = action === "comment";
  openDialog(several ? `${ACTIONS[action][0]} ${several.length} ${several.length === 1 ? "alarm" : "alarms"}` : ACTIONS[action][1], ACTIONS[action][0]);
  const first = action === "comment" ? $("d-comment") : action === "shelve" ? document.querySelector("#d-choices input:checked") : $("d-actor").value ? $("d-do") : $("d-actor");
  first.focus();
}

async function send() {
  const { action, alarm, several } = asked;
  const [who, comment] = [operator(), $("d-comment").value.trim()];
  if (!isKnown(who, "action")) return;
  if (action === "comment" && !comment) { fault("A comment needs a text."); $("d-comment").focus(); return; }
  remember(who);
  const id = asked.id ||= newId();
  const point = (a) => ({ device_id: a.device_id, rule: a.rule, pin_position: a.pin_position, ...(a.alarm_id ? { alarm_id: a.alarm_id } : {}) });
  const line = several ? { request_id: id, action, alarms: several.map(point), wait_s: BULK_WAIT_S } : { action_id: id, action, ...point(alarm) };
  if (who.actor) line.actor = who.actor;
  if (comment) line.comment = comment;
  if (action === "shelve") {
    line.duration_s = Number(document.querySelector("#d-choices input:checked").value);
    line.one_shot = $("d-oneshot").checked;
  }
  const said = await act(several ? "/api/alarms/bulk" : "/api/alarms/actions", line);
  if (!said) return;
  if (several) for (const key of [...chosen.keys()]) chosen.delete(key);
  $("dialog").close();
  if (several) {
    const words = [said.done && `${count(said.done)} done`, said.refused && `${count(said.refused)} refused`, said.pending && `${count(said.pending)} without an answer yet`];
    say(`${ACTIONS[action][0]}: ${words.filter(Boolean).join(", ")}.`, said.refused ? "bad" : said.pending ? "warn" : "good");
    showRefusals(action, said.results);
    drawChosen();
    askList();
    return;
  }
  const key = keyOf(alarm);
  pending.add(key);
  say(`${ACTIONS[action][0]}: sent …`, "");
  askList();
  try {
    const response = await fetch(`${said.answer}?wait_s=${ANSWER_S}`, { signal: AbortSignal.timeout((ANSWER_S + 5) * 1000) });
    const answer = await response.json();
    const name = alarm.device_name || alarm.device_id;
    if (response.status === 404) say(`${ACTIONS[action][0]}: no answer yet; the list will show it.`, "warn");
    else if (answer.outcome === "done") say(`${name}: ${STATE_TEXT[answer.state] || answer.state}.`, "good");
    else say(`${name}: refused: ${answer.reason}.`, "bad");
  } catch (e) { say(`The answer is not known: ${e.message}`, "warn"); }
  pending.delete(key);
  askList();
  const entry = rows.get(key);
  if (entry && entry.detail) setTimeout(() => loadHistory(entry), 1500);
}

// ---- asking --------------------------------------------------------------------------------------------------------

async function list() {
  const parameters = new URLSearchParams({ state });
  if (state !== PAST) parameters.set("sort", order);
  if (query) parameters.set("q", query);
  if (severities.size) parameters.set("severity", [...severities].join(","));
  await askPage("/api/alarms", parameters);
}

function restart() {
  cursors.length = 1;
  chosen.clear();
  opened = null;
  list();
}

// ---- the page ------------------------------------------------------------------------------------------------------

for (const [value, text] of TABS) {
  const node = el("button", { type: "button", "aria-pressed": String(value === state), "data-state": value, text });
  node.addEventListener("click", () => {
    state = value;
    for (const other of $("tabs").children) other.setAttribute("aria-pressed", String(other === node));
    $("sort").disabled = state === PAST;
    restart();
  });
  $("tabs").append(node);
}
for (const name of SEVERITIES) {
  const node = el("button", { type: "button", id: `count-${name}`, class: `severity ${name} zero`, "aria-pressed": "false" }, shape(name), el("b", { text: "0" }), el("span", { text: name }), el("small"));
  node.addEventListener("click", () => {
    severities.has(name) ? severities.delete(name) : severities.add(name);
    node.setAttribute("aria-pressed", String(severities.has(name)));
    restart();
  });
  $("severities").append(el("li", {}, node));
}
for (const [seconds, text] of SHELVE) {
  $("d-choices").append(el("label", {}, el("input", { type: "radio", name: "duration", value: String(seconds), checked: seconds === 3600 }), el("span", { text })));
}
for (const action of BULK) {
  const node = el("button", { type: "button", "data-bulk": action, class: action === "acknowledge" ? "primary" : "" });
  node.addEventListener("click", () => ask(action, null, fit(action)));
  $("bulk").append(node);
}
$("all").addEventListener("change", () => {
  for (const entry of rows.values()) $("all").checked ? chosen.set(entry.key, entry.alarm) : chosen.delete(entry.key);
  drawChosen();
});
$("r-close").addEventListener("click", () => { $("results").hidden = true; $("list").focus(); });
const askList = poll(LIST_INTERVAL_MS, list);
poll(HISTORY_INTERVAL_MS, async () => { const entry = rows.get(opened); if (entry && entry.detail) await loadHistory(entry); });

$("sort").addEventListener("change", () => { order = $("sort").value; restart(); });
onPage(() => { chosen.clear(); list(); });
$("search").value = query;
onSearch((text) => { query = text; restart(); });
$("dialog").addEventListener("close", () => {
  const entry = before && rows.get(before.key);
  if (before && before.key === null) ($("bulk").hidden ? $("all") : document.querySelector(`[data-bulk="${before.action}"]`)).focus();
  if (entry) (entry.row.querySelector(`[data-action="${before.action}"]`) || entry.row).focus();
});

const KEYS = { a: ["acknowledge"], s: ["shelve", "unshelve"], c: ["comment"], o: ["out_of_service", "return_to_service"] };
onKeys((event) => {
  if (event.key === "Escape" && chosen.size) { chosen.clear(); drawChosen(); return true; }
  // With a selection, the keys mean all of it, wherever the focus is.
  if (!chosen.size || !KEYS[event.key]) return false;
  const action = KEYS[event.key].find((name) => BULK.includes(name) && fit(name).length);
  if (action) { event.preventDefault(); ask(action, null, fit(action)); }
  return true;
}, (event, entry) => {
  if (event.key === " " && document.activeElement === entry.row && state !== PAST) { event.preventDefault(); choose(entry, !chosen.has(entry.key)); return; }
  const allowed = state === PAST ? [] : ALLOWED[entry.alarm.state] || [];
  const action = (KEYS[event.key] || []).find((name) => allowed.includes(name));
  if (action) { event.preventDefault(); ask(action, entry.alarm); }
});
