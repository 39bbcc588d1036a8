// The chain of one reading, or of one raw message.
"use strict";

const TRACE_TIMEOUT_MS = 20000;
const parameters = new URLSearchParams(location.search);
const hexOf = (base64) => Array.from(atob(base64), (c) => c.charCodeAt(0).toString(16).padStart(2, "0")).join("");

const shownValue = (v) => (v === null || v === undefined || v === "" ? null : typeof v === "object" ? JSON.stringify(v) : typeof v === "boolean" ? (v ? "yes" : "no") : String(v));
function facts(rows) {
  const there = rows.map(([k, v]) => [k, v instanceof Node ? v : shownValue(v)]).filter(([, v]) => v !== null);
  return there.length ? el("dl", { class: "facts" }, ...there.flatMap(([k, v]) => [el("dt", { text: k }), el("dd", {}, v)])) : null;
}
function step(title, about, ...children) {
  return el("li", {}, el("h3", {}, title, about ? el("span", { class: "quiet", text: ` ${about}` }) : null), ...children.filter(Boolean));
}
function grid(label, heads, rows) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, el("table", { class: "plain-table" }, el("thead", {}, el("tr", {}, ...heads.map((h) => el("th", { scope: "col", text: h })))),
    el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((c) => el("td", {}, c instanceof Node ? c : shownValue(c) ?? "–")))))));
}
function bytesOf(raw) {
  if (raw.text === undefined && raw.b64 === undefined) return null;
  return el("div", { class: "original" }, raw.text !== undefined ? el("pre", { tabindex: "0", "aria-label": "As text", text: raw.text }) : null,
    el("details", { open: raw.text === undefined }, el("summary", { class: "quiet", text: `as ${count(raw.bytes)} bytes` }), el("pre", { class: "hex", tabindex: "0", "aria-label": "As bytes", text: hexDump(raw.b64 !== undefined ? hexOf(raw.b64) : Array.from(new TextEncoder().encode(raw.text), (b) => b.toString(16).padStart(2, "0")).join("")) })));
}
const place = (raw) => `${raw.topic} ${raw.partition}:${raw.offset}${raw.line === null || raw.line === undefined ? "" : `, line ${raw.line}`}`;

function rawStep(raw) {
  return step("Raw message", place(raw), raw.gone ? el("p", { class: "note", text: `Its bytes are not to be had: ${raw.gone}.` }) : null,
    facts([["Received", instant(raw.received_at)], ["Connector", [raw.connector, raw.mode].filter(Boolean).join(", ")], ["MQTT topic", raw.mqtt_topic], ["Port", raw.port], ["Device as it was named", raw.device], ["Try", raw.attempt > 1 ? raw.attempt : null], ["SHA-256", raw.sha256]]), bytesOf(raw));
}

function alarmSteps(d) {
  return [
    d.alarms?.length ? step("Alarms", "raised or changed by it", grid("Alarms", ["When", "Rule", "What", "Severity"], d.alarms.map((a) => [instant(a.occurred_at || a.detected_at), a.rule, a.transition, a.severity]))) : step("Alarms", "none was raised or changed by it"),
    d.notices?.length ? step("Notices", "that went to people", el("pre", { tabindex: "0", "aria-label": "Notices", text: pretty(d.notices) })) : null,
  ].filter(Boolean);
}

function drawReading(d) {
  const r = d.reading;
  const v = d.validated;
  const again = d.rederivation;
  const cls = { identical: "good", different: "bad" }[again.status] || "warn";
  $("h-chain").replaceChildren(`${r.component_type}${pinText(r.pin_position)} `, el("span", { class: "quiet", text: `of ${r.device_id} at ${instant(r.timestamp)}` }));
  const row = d.stored.postgres;
  $("steps").replaceChildren(
    rawStep(d.raw),
    step("Decoded", `by ${d.parser.parser}${d.parser.kind ? `, ${d.parser.kind}` : ""}`, el("p", { class: "links" }, el("a", { href: `/registry?kind=parser&name=${encodeURIComponent(d.parser.parser.split("@")[0])}`, text: "The parser →" })),
      d.decoded ? grid("Decoded fields", ["Field", "Value", "Unit", "Pin"], d.decoded.fields.map((f) => [d.mapping?.field === f.name ? el("b", { text: f.name }) : f.name, f.value, f.unit, f.pin])) : el("p", { class: "quiet", text: "What its parser found is not known any more." }),
      d.decoded?.refused.length ? el("p", { class: "note", text: `Refused: ${d.decoded.refused.join("; ")}` }) : null),
    step("Mapped", d.mapping ? `by ${d.mapping.by}` : "", d.mapping ? facts([["Field", d.mapping.field], ["Becomes", `${d.mapping.component_type}${pinText(d.mapping.pin_position)}`], ["Value before", [d.mapping.value_before, d.mapping.unit_before].filter((x) => x !== null && x !== undefined).join(" ")], ["Unit", d.mapping.unit],
      ["Calculated", d.mapping.conversion && (d.mapping.conversion.factor !== "1" || d.mapping.conversion.offset !== "0") ? `× ${d.mapping.conversion.factor} + ${d.mapping.conversion.offset}` : ""]]) : el("p", { class: "quiet", text: "Which field became it is not known any more." })),
    step("Judged", "", el("p", {}, el("span", { class: `pill ${{ good: "good", suspect: "warn", fail: "bad" }[v.quality_name] || ""}`, text: v.quality_name }), v.flags.length ? ` ${v.flags.join(", ")}` : "", v.revised ? " · revised later" : ""), facts([["Bounds", v.bounds]]),
      v.tests ? el("details", {}, el("summary", { class: "quiet", text: "each test" }), el("pre", { tabindex: "0", "aria-label": "Tests", text: pretty(v.tests) })) : null),
    step("Stored", "", grid("Stored", ["Where", "Value", "Unit", "Quality", "Generation", "Stored at"], [["PostgreSQL", row.value ?? row.value_text, row.unit, row.quality, row.generation, instant(row.ingested_at)],
      ...(d.stored.clickhouse && d.stored.clickhouse.row ? [["ClickHouse", d.stored.clickhouse.row.value ?? d.stored.clickhouse.row.value_text, d.stored.clickhouse.row.unit, d.stored.clickhouse.row.quality, d.stored.clickhouse.row.generation, ""]] : [])]),
      el("details", {}, el("summary", { class: "quiet", text: "as it is stored" }), el("pre", { tabindex: "0", "aria-label": "As it is stored", text: pretty(d.stored) }))),
    step("Comes out again", "", el("p", {}, el("span", { class: `pill ${cls}`, text: again.status }), ` ${again.text}`), again.differences.length ? grid("Differences", ["Field", "Stored", "Comes out"], again.differences.map((x) => [x.field, x.stored, x.derived])) : null),
    d.windows.length || d.rollups.length ? step("Went into", `${d.windows.length} windows, ${d.rollups.length} roll-ups`, el("details", {}, el("summary", { class: "quiet", text: "which" }), el("pre", { tabindex: "0", "aria-label": "Windows and roll-ups", text: pretty({ windows: d.windows, rollups: d.rollups }) }))) : null,
    ...alarmSteps(d));
  for (const empty of [...$("steps").childNodes].filter((n) => n.nodeType === 3)) empty.remove();
}

function drawRaw(d) {
  $("h-chain").replaceChildren("Raw message ", el("span", { class: "quiet", text: `${d.raw.partition}:${d.raw.offset}, ${d.messages.length} of ${d.raw.lines} ${d.raw.lines === 1 ? "line" : "lines"}` }));
  const nodes = [step("Record", place(d.raw), facts([["Key", d.raw.key], ["Kafka's time", instant(d.raw.kafka_time)], ["Bytes", d.raw.bytes], ["Try", d.raw.attempt > 1 ? d.raw.attempt : null], ["Generation", d.raw.generation || null]]))];
  d.messages.forEach((m) => {
    nodes.push(step("Message", `of ${m.device_id}`, el("p", { class: "links" }, el("a", { href: deviceUrl(m.device_id), text: "The device →" })), bytesOf(m.raw), m.refused ? el("p", { class: "note", text: m.refused }) : null,
      m.readings.length ? grid("Readings", ["Reading", "At", "Value", "Unit", "Quality", ""], m.readings.map((r) => [`${r.component_type}${pinText(r.pin_position)}`, instant(r.timestamp), r.value ?? r.value_text, r.unit, [QUALITY[r.quality]?.[1] || r.quality, ...r.flags].join(", "),
        el("a", { href: `?${new URLSearchParams({ device: r.device_id, type: r.component_type, at: String(r.timestamp), pin: r.pin_position, mode: r.connector_mode })}`, "aria-label": `Trace ${r.component_type}`, text: "Trace" })])) : el("p", { class: "quiet", text: "No reading of it is stored." }),
      m.not_stored.length ? el("details", {}, el("summary", { class: "quiet", text: `${m.not_stored.length} not stored` }), el("pre", { tabindex: "0", "aria-label": "Not stored", text: pretty(m.not_stored) })) : null));
    nodes.push(...alarmSteps(m).filter(() => m.alarms?.length));
  });
  if (d.errors.length) nodes.push(step("Refused", `${d.errors.length} ${d.errors.length === 1 ? "part" : "parts"} of it`, grid("Refused", ["Stage", "Code", "Why"], d.errors.map((e) => [e.stage, el("a", { href: `/refusals?code=${encodeURIComponent(e.code)}`, text: e.code }), e.message]))));
  $("steps").replaceChildren(...nodes);
}

let asked = 0;
async function trace(query) {
  const number_ = ++asked;
  history.replaceState(null, "", `?${query}`);
  $("empty").hidden = true;
  $("note").hidden = true;
  $("live").className = "pill";
  $("live").textContent = "tracing …";
  try {
    const response = await fetch(`/api/trace?${query}`, { signal: AbortSignal.timeout(TRACE_TIMEOUT_MS), headers: authorized({ Accept: "application/json" }) });
    const found = await response.json();
    if (number_ !== asked) return;
    $("login").hidden = response.status !== 401;
    if (!response.ok) throw Object.assign(new Error(found.error), { status: response.status });
    query.has("raw") ? drawRaw(found) : drawReading(found);
    $("live").className = "pill good";
    $("live").textContent = "traced";
    $("clock").textContent = instant(Date.now() * 1000);
  } catch (e) {
    if (number_ !== asked) return;
    $("steps").replaceChildren();
    $("live").className = "pill bad";
    $("live").textContent = e.status === 401 ? "for operators" : e.status === 404 ? "not found" : "no answer";
    $("note").hidden = e.status === 401;
    $("note").textContent = `${e.message}.`;
  }
}

function begin() {
  if (parameters.get("raw")) { $("raw").value = parameters.get("raw"); trace(new URLSearchParams({ raw: parameters.get("raw") })); return; }
  for (const name of ["device", "type", "at"]) $(name).value = parameters.get(name) || "";
  if (["device", "type", "at"].every((name) => parameters.get(name))) trace(new URLSearchParams([...parameters].filter(([k]) => ["device", "type", "at", "pin", "mode"].includes(k))));
}
$("of-reading").addEventListener("submit", (event) => {
  event.preventDefault();
  const said = Object.fromEntries(["device", "type", "at"].map((name) => [name, $(name).value.trim()]));
  const missing = ["device", "type", "at"].find((name) => !said[name]);
  if (missing) { $(missing).focus(); return; }
  trace(new URLSearchParams(said));
});
$("of-raw").addEventListener("submit", (event) => {
  event.preventDefault();
  const raw = $("raw").value.trim();
  if (raw) trace(new URLSearchParams({ raw })); else $("raw").focus();
});
$("live").textContent = "ready";
polls.push(begin);
begin();
