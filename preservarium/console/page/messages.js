// What is in a topic. What is looked for stands in the address.
"use strict";

const LIMIT = 50;
const LIVE_SHOWN = 200;
const FIRST_TOPIC = "iot_raw_data";

const parameters = new URLSearchParams(location.search);
const wanted = Object.fromEntries(["topic", "partition", "key", "text", "from", "offset"].map((name) => [name, parameters.get(name) || ""]));
wanted.topic = wanted.topic || FIRST_TOPIC;
let topics = [];
let following = null;

const topicPath = (what) => `/api/topics/${encodeURIComponent(wanted.topic)}/${what}`;
function query() {
  const found = new URLSearchParams();
  for (const name of ["partition", "key", "text", "offset"]) if (wanted[name]) found.set(name, wanted[name]);
  if (wanted.from) found.set("from", `${wanted.from}Z`);
  return found;
}
function keep() {
  const text = new URLSearchParams(Object.fromEntries(Object.entries(wanted).filter(([, v]) => v)));
  history.replaceState(null, "", `?${text}`);
}

// ---- records -------------------------------------------------------------------------------------------------------

function summary(record) {
  if (record.kind === "tombstone") return "tombstone";
  if (record.kind === "base64") return `${record.bytes} bytes, no text`;
  const text = record.kind === "lines" ? record.value.map((v) => JSON.stringify(v)).join(" ⏎ ") : record.value;
  return text.length > 400 ? `${text.slice(0, 400)}…` : text;
}
const hexOf = (base64) => Array.from(atob(base64), (c) => c.charCodeAt(0).toString(16).padStart(2, "0")).join("");

function recordItem(record, open) {
  const id = `${record.partition}:${record.offset}`;
  const body = el("div");
  const item = el("details", { class: "record", "data-id": id }, el("summary", {}, el("span", { class: "line" }, el("time", { datetime: new Date(record.at / 1000).toISOString(), text: instant(record.at) }), el("span", { class: "coordinates quiet", text: id }),
    el("b", { class: "key", text: record.key ?? "no key" }), el("span", { class: "quiet num", text: sizeText(record.bytes) })), el("span", { class: "said", text: summary(record) })), body);
  const show = () => {
    if (!item.open || body.childElementCount) return;
    const links = [];
    if (wanted.topic === FIRST_TOPIC) links.push(el("a", { href: `/lineage?raw=${id}`, text: "What became of it →" }));
    const device = record.kind === "lines" ? record.value[0]?.device_id : null;
    if (device || (record.key && wanted.topic.startsWith("iot_"))) links.push(el("a", { href: deviceUrl(device || record.key), text: "The device →" }));
    const headers = Object.entries(record.headers);
    body.replaceChildren(...[links.length ? el("p", { class: "links" }, ...links) : null,
      headers.length ? el("dl", { class: "facts" }, ...headers.flatMap(([k, v]) => [el("dt", { text: k }), el("dd", { text: v })])) : null,
      record.value === null ? el("p", { class: "quiet", text: "No value." }) : el("pre", { tabindex: "0", "aria-label": `Value of ${id}`,
        text: record.kind === "lines" ? record.value.map((v) => pretty(v)).join("\n") : record.kind === "base64" ? hexDump(hexOf(record.value)) : record.value }),
      record.cut ? el("p", { class: "quiet", text: "There is more than is shown; preservarium topics read has all of it." }) : null].filter(Boolean));
  };
  item.addEventListener("toggle", show);
  item.open = open;
  return item;
}

function drawPage(found) {
  $("records").replaceChildren(...found.records.map((r) => recordItem(r, false)));
  $("empty").hidden = found.records.length > 0;
  $("empty").textContent = found.next_cursor ? "Nothing in what was looked through; look further with “Next”." : query().size ? "Nothing is like that." : "The topic is empty: nothing was sent into it for as long as it keeps anything.";
  const looking = wanted.key || wanted.text;
  $("said-page").textContent = [found.onward ? "going on in time" : "newest first", looking ? `${count(found.scanned)} records looked through in ${found.partitions} ${found.partitions === 1 ? "partition" : "partitions"}` : ""].filter(Boolean).join(" · ");
  $("clock").textContent = instant(found.at);
  $("live").className = "pill good";
  $("live").textContent = "read";
  $("note").hidden = true;
  drawPager(found);
}

let asked = 0;
async function look() {
  stop();
  keep();
  const number_ = ++asked;
  const text = query();
  text.set("limit", String(LIMIT));
  if (cursors.at(-1)) text.set("cursor", cursors.at(-1));
  $("live").className = "pill";
  $("live").textContent = "reading …";
  try {
    const found = await get(`${topicPath("messages")}?${text}`);
    if (number_ === asked) drawPage(found);
  } catch (e) { if (number_ === asked) failed(e); }
}
function failed(e) {
  $("live").className = "pill bad";
  $("live").textContent = e.status === 401 ? "for operators" : "no answer";
  $("note").hidden = e.status === 401;
  $("note").textContent = `${e.status === 404 || e.status === 400 ? "" : "The messages cannot be had: "}${e.message}.`;
}

// ---- what comes ----------------------------------------------------------------------------------------------------

function stop() {
  following?.stop();
  following = null;
  $("follow").setAttribute("aria-pressed", "false");
  $("follow").textContent = "Follow live";
}
function follow() {
  if (following) { stop(); return; }
  asked += 1;
  let came = 0;
  let left = 0;
  $("records").replaceChildren();
  $("empty").hidden = false;
  $("empty").textContent = "Nothing has come yet …";
  drawPager({ next_cursor: null });
  $("follow").setAttribute("aria-pressed", "true");
  $("follow").textContent = "Stop";
  const text = query();
  text.delete("from");
  text.delete("offset");
  following = listen(`${topicPath("live")}?${text}`, (event) => {
    came += event.records.length + event.left_out;
    left += event.left_out;
    $("said-page").textContent = `${count(came)} came since${left ? `, of which ${count(left)} are not shown` : ""}`;
    if (!event.records.length) return;
    $("empty").hidden = true;
    $("records").prepend(...event.records.reverse().map((r) => recordItem(r, false)));
    // What is open stays; of the rest the newest.
    [...$("records").children].slice(LIVE_SHOWN).filter((n) => !n.open).forEach((n) => n.remove());
  }, (isOn) => { $("live").className = `pill ${isOn ? "good" : "warn"}`; $("live").textContent = isOn ? "following" : "connecting …"; });
}

// ---- the page ------------------------------------------------------------------------------------------------------

function drawTopics() {
  const group = (label, all) => el("optgroup", { label }, ...all.map((t) => el("option", { value: t.name, text: `${t.name} (${count(t.records)})` })));
  const [ours, logs] = [false, true].map((log) => topics.filter((t) => t.name.endsWith("-changelog") === log));
  $("topic").replaceChildren(group("Topics", ours), group("State tables", logs));
  $("topic").value = wanted.topic;
  drawTopic();
}
function drawTopic() {
  const topic = topics.find((t) => t.name === wanted.topic);
  $("what").textContent = topic ? `${topic.record}; key: ${topic.key}` : "";
  $("partition").replaceChildren(el("option", { value: "", text: "all" }), ...(topic?.spans || []).map((s) => el("option", { value: String(s.partition), text: `${s.partition} (${s.begin} … ${s.end})` })));
  $("partition").value = wanted.partition;
}
async function askTopics() {
  try { topics = (await get("/api/topics")).topics; drawTopics(); } catch (e) { failed(e); }
}

function changed() {
  Object.assign(wanted, { partition: $("partition").value, key: $("search").value.trim(), text: $("text").value.trim(), from: $("from").value, offset: $("offset").value.trim() });
  cursors.length = 1;
  look();
}
$("search-form").addEventListener("submit", (event) => { event.preventDefault(); changed(); });
$("topic").addEventListener("change", () => { wanted.topic = $("topic").value; $("partition").value = ""; $("offset").value = ""; drawTopic(); changed(); });
$("partition").addEventListener("change", changed);
$("from").addEventListener("change", () => { if ($("from").value) $("offset").value = ""; });
$("offset").addEventListener("input", () => { if ($("offset").value) $("from").value = ""; });
$("follow").addEventListener("click", () => { Object.assign(wanted, { key: $("search").value.trim(), text: $("text").value.trim() }); follow(); });
Object.entries({ search: "key", text: "text", from: "from", offset: "offset" }).forEach(([id, name]) => { $(id).value = wanted[name]; });
onPage(look);
onSlash();
$("topic").replaceChildren(el("option", { value: wanted.topic, text: wanted.topic }));
polls.push(askTopics, look);
askTopics();
look();
