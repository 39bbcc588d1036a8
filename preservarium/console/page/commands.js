// Commands to devices: what was asked for and what became of it, asking for one, and cancelling. It polls /api/commands,
// which is PostgreSQL's and a moment behind; asking waits for Kafka alone.
"use strict";

// A cancel is decided within a second; a worker that starts takes longer.
const CANCEL_S = 15;

// State -> the word, its mark, its colour; said by all three.
const STATES = {
  queued: ["queued", "…", ""], sent: ["sent", "→", "busy"], delivered: ["delivered", "⇥", "busy"], successful: ["successful", "✓", "good"],
  timeout: ["timeout", "!", "bad"], expired: ["expired", "◌", "warn"], failed: ["failed", "✕", "bad"], cancelled: ["cancelled", "⊘", ""],
};
const OPEN = ["queued", "sent", "delivered"];
const TABS = [["All", []], ["Under way", OPEN], ["Successful", ["successful"]], ["Not carried out", ["timeout", "expired", "failed"]], ["Cancelled", ["cancelled"]]];

let tab = 0;
let device = new URLSearchParams(location.search).get("device") || "";

const urlOf = (c) => `/api/devices/${encodeURIComponent(c.device_id)}/commands/${encodeURIComponent(c.command_id)}`;

// ---- rows ----------------------------------------------------------------------------------------------------------

function stateMark(name) {
  const [text, mark, cls] = STATES[name] || [name, "?", ""];
  return el("span", { class: `pill ${cls}` }, el("span", { "aria-hidden": "true", text: `${mark} ` }), text);
}

function contentText(command) {
  const { fields, payload, payload_b64, ...rest } = command.content || {};
  if (fields !== undefined) return JSON.stringify(fields);
  if (payload !== undefined) return typeof payload === "string" ? payload : JSON.stringify(payload);
  if (payload_b64 !== undefined) return `bytes, base64: ${payload_b64}`;
  return Object.keys(rest).length ? JSON.stringify(rest) : "";
}

function cancelButton(command, cls) {
  const node = el("button", { type: "button", class: cls, "data-action": "cancel", "aria-label": `Cancel: ${command.command || "command"} of ${command.device_id}`, text: "Cancel" });
  node.addEventListener("click", (event) => { event.stopPropagation(); askCancel(command); });
  return node;
}

function row(command) {
  const key = command.command_id;
  let entry = rows.get(key);
  if (!entry) {
    entry = newEntry(key, ["severity", "device", "what", "state", "value num", "age num", "do"]);
  }
  entry.command = command;
  const text = JSON.stringify(command) + (opened === key);
  if (entry.text !== text) {
    entry.text = text;
    const [state, where, what, who, tries, , act] = entry.cells;
    entry.row.className = `alarm ${OPEN.includes(command.state) ? "" : "silent"}`;
    state.replaceChildren(stateMark(command.state));
    where.replaceChildren(el("div", { class: "device-name", text: command.device_id }));
    const content = contentText(command);
    what.replaceChildren(el("div", { text: command.command || "content of its own" }), content ? el("div", { class: "device-address content", text: content }) : "",
      command.reason ? el("div", { class: "why", text: command.reason }) : "");
    who.replaceChildren(el("span", { text: command.requested_by || "" }), command.cause ? el("span", { class: "tag", text: "an alarm" }) : "");
    tries.replaceChildren(String(command.attempt), el("span", { class: "unit", text: command.attempt === 1 ? " try" : " tries" }));
    placeButtons(entry, act, `${command.command || "command"} of ${command.device_id}`, OPEN.includes(command.state) ? [cancelButton(command, "")] : []);
  }
  entry.cells[5].textContent = age(command.requested_at, nowUs);
  entry.cells[5].title = instant(command.requested_at) || "";
  return entry;
}

function draw(page) {
  shown = page;
  nowUs = Date.now() * 1000;
  const wanted = [];
  const kept = new Set();
  for (const command of page.commands) {
    const before = rows.get(command.command_id)?.command.updated_at;
    const entry = row(command);
    kept.add(entry.key);
    wanted.push(entry.row);
    if (opened === entry.key) {
      wanted.push(detail(entry));
      if (before !== command.updated_at) loadHistory(entry);
    }
  }
  place(wanted, kept);
  drawn(page, device ? "No command of this device is like that." : tab || $("state").value ? "No command is like that." : "Nobody has asked for a command yet. “New command” asks for one, where a device's type says how it takes them.");
  live("good", "from the database");
  note("");
}

// ---- details -------------------------------------------------------------------------------------------------------

function detail(entry) {
  if (!entry.detail) {
    entry.facts = el("dl", { class: "facts" });
    entry.history = el("ol", { class: "history" });
    entry.detail = el("tr", { class: "detail" }, el("td", { colspan: "7" }, entry.facts, el("h3", { text: "States" }), entry.history));
    loadHistory(entry);
  }
  const c = entry.command;
  const text = JSON.stringify(c);
  if (entry.detailText !== text) {
    entry.detailText = text;
    drawFacts(entry.facts, [
      ["Asked", instant(c.requested_at)], ["Expires", instant(c.expires_at)], ["Ended", instant(c.ended_at)], ["Priority", String(c.priority)],
      ["Content", JSON.stringify(c.content)], ["Confirmed by", typeof c.confirm === "string" ? c.confirm : JSON.stringify(c.confirm)],
      ["Alarm transition", c.cause], ["Id", c.command_id], ["Idempotency key", c.idempotency_key],
    ]);
  }
  return entry.detail;
}

async function loadHistory(entry) {
  if (!entry.history) return;
  try {
    const found = await get(urlOf(entry.command));
    entry.history.replaceChildren(...found.events.map((e) => el("li", {},
      el("time", { datetime: new Date(e.at / 1000).toISOString(), text: instant(e.at).slice(0, 19) }),
      el("span", {}, el("b", { text: e.state }), ` – ${e.event.replaceAll("_", " ")}${e.attempt ? `, try ${e.attempt}` : ""}${e.actor ? `, by ${e.actor}` : ""}`, e.reason ? el("q", { text: e.reason }) : null),
      el("span", { class: "quiet", text: `${age(e.at, nowUs)} ago` }))));
  } catch (e) { entry.history.replaceChildren(el("li", { class: "quiet", text: e.message })); }
}

// ---- asking for a command, and cancelling ----------------------------------------------------------------------------

let asked = null;
let before = null;  // where the focus was

function show(title, button) {
  before = document.activeElement?.dataset?.action ? document.activeElement.closest("tr") : document.activeElement;
  openDialog(title, button);
}

function askNew() {
  asked = { key: newId() };
  $("d-new").hidden = false;
  $("d-about").hidden = true;
  for (const id of ["expires", "timeout", "tries", "priority", "confirm", "content"]) $(`d-${id}`).value = "";
  $("d-device").value = device || rows.get(opened)?.command.device_id || "";
  choices = { commands: [] };
  drawChoices();
  show("New command", "Send");
  if ($("d-device").value) choose();
  $("d-device").focus();
}

function askCancel(command) {
  asked = { command };
  $("d-new").hidden = true;
  $("d-about").hidden = false;
  $("d-about").replaceChildren(stateMark(command.state), el("span", { text: `${command.command || "content of its own"} · ${command.device_id}` }),
    el("span", { class: "quiet", text: command.state === "queued" ? "" : "It was sent: the device may still carry it out." }));
  show("Cancel this command", "Cancel it");
  ($("d-actor").value ? $("d-do") : $("d-actor")).focus();
}

// What the registry gives the device to choose from.
let choices = { commands: [] };
let choosing = "";
async function choose() {
  const wanted = $("d-device").value.trim();
  choosing = wanted;
  fault("");
  $("d-registered").textContent = "";
  choices = { commands: [] };
  if (wanted) {
    try {
      const found = await get(`/api/devices/${encodeURIComponent(wanted)}/commands/choices`);
      if (choosing !== wanted) return;
      choices = found;
      $("d-registered").textContent = found.problem ? `It can take no command: ${found.problem}.`
        : `${found.name ? `${found.name}, ` : ""}${found.type}${found.sleeps ? "; it sleeps, and is sent to when it was heard" : ""}`;
    } catch (e) {
      if (choosing !== wanted) return;
      $("d-registered").textContent = e.message;
    }
  }
  drawChoices();
}

function drawChoices() {
  $("d-command").replaceChildren(...choices.commands.map((c) => el("option", { value: c.command, text: c.command })), el("option", { value: "", text: "content of its own" }));
  command();
}

function command() {
  const preset = choices.commands.find((c) => c.command === $("d-command").value);
  const given = { ...(choices.given || {}), ...(preset || {}) };
  const none = $("d-kind").options[0];
  none.disabled = !preset;
  $("d-kind").value = preset ? "" : "fields";
  none.textContent = preset && (preset.fields || preset.payload || preset.payload_b64) ? `as the registry says: ${JSON.stringify(preset.fields ?? preset.payload ?? preset.payload_b64)}` : "as the registry says";
  const [expires, timeout, tries, priority] = [given.expires_s ?? 86400, given.timeout_s ?? 300, given.tries ?? 1, given.priority ?? 0];
  Object.entries({ expires, timeout, tries, priority }).forEach(([id, value]) => { $(`d-${id}`).placeholder = String(value); });
  $("d-confirm").placeholder = typeof given.confirm === "object" ? JSON.stringify(given.confirm) : given.confirm || "published";
  kind(preset);
}

function kind(preset) {
  const value = $("d-kind").value;
  $("d-content").hidden = !value;
  $("d-content").placeholder = { fields: '{"name": value}', payload: "a text, or JSON", hex: "01 ff" }[value] || "";
  if (value === "fields" && !$("d-content").value && preset?.fields) $("d-content").value = JSON.stringify(preset.fields);
}

// A JSON value, or the text itself.
function value(text) { try { return JSON.parse(text); } catch { return text; } }

function line() {
  const made = { idempotency_key: asked.key };
  if ($("d-command").value) made.command = $("d-command").value;
  const [how, content] = [$("d-kind").value, $("d-content").value.trim()];
  if (how === "fields") {
    const fields = content ? value(content) : {};
    if (typeof fields !== "object" || fields === null || Array.isArray(fields)) throw new Error("Fields are a JSON object, like {\"relay\": 1}.");
    made.fields = fields;
  } else if (how === "payload") made.payload = value($("d-content").value);
  else if (how === "hex") {
    const digits = content.replace(/\s/g, "");
    if (!digits || digits.length % 2 || /[^0-9a-f]/i.test(digits)) throw new Error("Bytes are pairs of hexadecimal digits.");
    made.payload_b64 = btoa(String.fromCharCode(...digits.match(/../g).map((pair) => parseInt(pair, 16))));
  }
  for (const [id, name] of [["expires", "expires_s"], ["timeout", "timeout_s"], ["tries", "tries"], ["priority", "priority"]]) {
    const text = $(`d-${id}`).value.trim();
    if (!text) continue;
    if (!Number.isFinite(Number(text))) throw new Error(`${name}: ${text} is no number.`);
    made[name] = Number(text);
  }
  if ($("d-confirm").value.trim()) made.confirm = value($("d-confirm").value.trim());
  return made;
}

async function send() {
  const cancelled = asked.command;
  const [who, to] = [operator(), $("d-device").value.trim()];
  if (!cancelled && !to) { fault("Which device?"); $("d-device").focus(); return; }
  if (!isKnown(who, "command")) return;
  let body = {};
  if (!cancelled) { try { body = line(); } catch (e) { fault(e.message); return; } }
  if (who.actor) body.actor = who.actor;
  remember(who);
  const path = cancelled ? `${urlOf(cancelled)}/cancel` : `/api/devices/${encodeURIComponent(to)}/commands`;
  if (!await act(path, body)) return;
  $("dialog").close();
  if (cancelled) await wasCancelled(cancelled);
  else say(`${body.command || "Command"}: asked of ${to}.`, "good");
  askList();
}

// A cancel that could not be done changes nothing, so there is no event to wait for.
async function wasCancelled(command) {
  say("Cancel: asked …", "");
  const until = Date.now() + CANCEL_S * 1000;
  let state = command.state;
  while (Date.now() < until && OPEN.includes(state)) {
    await new Promise((resolve) => { setTimeout(resolve, 500); });
    try { ({ state } = await get(urlOf(command))); } catch { /* asked again */ }
  }
  if (state === "cancelled") say(`${command.command || "Command"} of ${command.device_id}: cancelled.`, "good");
  else if (OPEN.includes(state)) say("Not cancelled yet: what is being sent at this moment cannot be.", "warn");
  else say(`Not cancelled: the command is ${state}.`, "bad");
}

// ---- asking --------------------------------------------------------------------------------------------------------

async function list() {
  const parameters = new URLSearchParams();
  const states = $("state").value ? [$("state").value] : TABS[tab][1];
  if (states.length) parameters.set("state", states.join(","));
  if (device) parameters.set("device", device);
  await askPage("/api/commands", parameters);
}

function restart() {
  cursors.length = 1;
  opened = null;
  list();
}

// ---- the page ------------------------------------------------------------------------------------------------------

function drawTabs() {
  [...$("tabs").children].forEach((node, i) => node.setAttribute("aria-pressed", String(i === tab && !$("state").value)));
}
TABS.forEach(([text], i) => {
  const node = el("button", { type: "button", "data-tab": String(i), text });
  node.addEventListener("click", () => { tab = i; $("state").value = ""; drawTabs(); restart(); });
  $("tabs").append(node);
});
for (const [name, [text]] of Object.entries(STATES)) $("state").append(el("option", { value: name, text }));
drawTabs();
$("search").value = device;
const askList = poll(LIST_INTERVAL_MS, list);

$("state").addEventListener("change", () => { drawTabs(); restart(); });
onPage(list);
onSearch((text) => { device = text; restart(); }, 300);
$("new").addEventListener("click", askNew);
$("d-device").addEventListener("change", choose);
$("d-command").addEventListener("change", command);
$("d-kind").addEventListener("change", () => kind(choices.commands.find((c) => c.command === $("d-command").value)));
$("dialog").addEventListener("close", () => { if (before && document.contains(before)) before.focus(); });

onKeys((event) => {
  if (event.key !== "n") return false;
  event.preventDefault();
  askNew();
  return true;
}, (event, entry) => {
  if (event.key === "x" && OPEN.includes(entry.command.state)) { event.preventDefault(); askCancel(entry.command); }
});
