// State tables. Which table and key are shown stands in the address.
"use strict";

const LIST_INTERVAL_MS = 5000;
const LIMIT = 25;

const parameters = new URLSearchParams(location.search);
const wanted = { table: parameters.get("table") || "", key: parameters.get("key") || "" };
let tables = [];
let drawnText = "";

function keep() {
  const text = new URLSearchParams(Object.fromEntries(Object.entries(wanted).filter(([, v]) => v))).toString();
  history.replaceState(null, "", text ? `?${text}` : location.pathname);
}

function partitionMark(p, me) {
  const here = p.owned ? ["owned", "■", "owned here"] : p.bytes !== null ? ["copy", "▤", "a copy here"] : ["away", "□", "elsewhere"];
  const told = [`partition ${p.partition}: ${here[2]}`, p.owned ? "" : p.owner ? `owned by ${p.owner}` : "nobody says that it owns it", p.keys ? `${count(p.keys)} keys, ${sizeText(p.bytes)}` : "",
    p.copies.filter((w) => w !== me).length ? `copy: ${p.copies.filter((w) => w !== me).join(", ")}` : ""].filter(Boolean).join(", ");
  return el("li", { class: here[0], title: told }, el("span", { "aria-hidden": "true", text: `${here[1]} ${p.partition}` }), el("span", { class: "hidden", text: told }));
}

function draw(found) {
  tables = found.tables;
  $("clock").textContent = instant(found.at);
  $("live").className = "pill good";
  $("live").textContent = "live";
  $("note").hidden = !found.note;
  $("note").textContent = found.note ? `What the other workers have is not heard now: ${found.note}.` : "";
  $("workers").textContent = `${found.workers} ${found.workers === 1 ? "worker" : "workers"}, this is ${found.worker}`;
  $("empty").hidden = tables.length > 0;
  $("empty").textContent = "This worker declares no table: none of the stages with a memory runs in it.";
  const text = JSON.stringify(tables);
  if (text === drawnText) return;
  drawnText = text;
  $("rows").replaceChildren(...tables.map((t) => {
    const here = t.partitions.filter((p) => p.bytes !== null);
    const button = el("button", { type: "button", class: "cause", "aria-pressed": String(t.name === wanted.table), text: t.name });
    button.addEventListener("click", () => choose(t.name));
    return el("tr", { class: t.name === wanted.table ? "chosen" : null }, el("td", {}, button), el("td", { class: "quiet", text: t.key }), el("td", { class: "num", text: count(here.reduce((s, p) => s + p.keys, 0)) }),
      el("td", { class: "num", text: sizeText(here.reduce((s, p) => s + p.bytes, 0)) }),
      el("td", {}, t.partitions.length ? el("ul", { class: "partitions", "aria-label": `Partitions of ${t.name}` }, ...t.partitions.map((p) => partitionMark(p, found.worker))) : el("span", { class: "quiet", text: "none is open yet" })));
  }));
  if (!wanted.table && tables.length) wanted.table = tables.some((t) => t.name === "device_configs") ? "device_configs" : tables[0].name;
  if ($("table").dataset.shown !== tables.map((t) => t.name).join()) {
    $("table").dataset.shown = tables.map((t) => t.name).join();
    $("table").replaceChildren(...tables.map((t) => el("option", { value: t.name, text: t.name })));
    choose(wanted.table);
    if (wanted.key) ask();
  }
}

function choose(name) {
  wanted.table = name;
  $("table").value = name;
  const key = tables.find((t) => t.name === name)?.key;
  $("key-is").textContent = key ? `(${key})` : "";
  for (const button of $("rows").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.textContent === name));
    button.closest("tr").className = button.textContent === name ? "chosen" : "";
  }
  cursors.length = 1;
  keep();
  browse();
}

async function ask() {
  wanted.key = $("search").value.trim();
  keep();
  if (!wanted.key || !wanted.table) return;
  try {
    const found = await get(`/api/state/${encodeURIComponent(wanted.table)}/${encodeURIComponent(wanted.key)}`);
    $("where").textContent = `${found.key}, partition ${found.partition}, ${sizeText(found.bytes)}, ${found.copy ? `a copy of ${found.worker}` : `owned by ${found.worker}`}${found.note ? `. ${found.note}` : ""}`;
    $("value").hidden = false;
    $("value").textContent = typeof found.value === "string" ? found.value : pretty(found.value);
  } catch (e) {
    $("value").hidden = true;
    $("where").textContent = e.status === 404 ? `${wanted.key}: ${e.message}. A device that has not sent since the table was made has no state in it.` : `It cannot be had now: ${e.message}`;
  }
}

async function browse() {
  if (!wanted.table) return;
  const query = new URLSearchParams({ limit: String(LIMIT) });
  if (cursors.at(-1)) query.set("cursor", cursors.at(-1));
  try {
    const found = await get(`/api/tables/${encodeURIComponent(wanted.table)}?${query}`);
    $("browsed").textContent = wanted.table;
    $("entries").replaceChildren(...(found.entries.length ? found.entries.map((e) => {
      const body = el("div");
      const item = el("details", { class: "record" }, el("summary", {}, el("span", { class: "line" }, el("b", { class: "key", text: e.key }), el("span", { class: "quiet", text: `partition ${e.partition} · ${sizeText(e.bytes)}` }))), body);
      item.addEventListener("toggle", () => { if (item.open && !body.childElementCount) body.replaceChildren(el("pre", { tabindex: "0", "aria-label": `Value of ${e.key}`, text: typeof e.value === "string" ? e.value : pretty(e.value) })); });
      return item;
    }) : [el("p", { class: "quiet empty", text: "This worker has no key of it now." })]));
    drawPager(found);
  } catch (e) { $("entries").replaceChildren(el("p", { class: "quiet empty", text: `not known: ${e.message}` })); }
}

async function list() {
  try { draw(await get("/api/state")); }
  catch (e) {
    $("live").className = "pill bad";
    $("live").textContent = e.status === 401 ? "for operators" : "no answer";
    $("note").hidden = e.status === 401;
    $("note").textContent = `The tables cannot be had: ${e.message}.`;
  }
}

$("search").value = wanted.key;
$("search-form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("table").addEventListener("change", () => { choose($("table").value); ask(); });
onPage(browse);
onSlash();
poll(LIST_INTERVAL_MS, list);
