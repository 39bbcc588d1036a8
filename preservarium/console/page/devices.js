// All devices: found as you type, put in order and filtered by the server, one page at a time. What is chosen stands in the address.
"use strict";

const LIST_INTERVAL_MS = 5000;
const FLEET_INTERVAL_MS = 15000;
const LIMIT = 50;
const VALUES_SHOWN = 4;

const TABS = [["", "All"], ["sending", "Sending"], ["failing", "Failing"], ["silent", "Silent"], ["never", "Never seen"], ["off", "Off"]];
// Column -> word of the order that it stands for; null: none.
const COLUMNS = [["Device", "name"], ["Address", "device"], ["Type", "type"], ["Last values", null], ["State", "quality"], ["Age", "seen"]];
const NEWEST_FIRST = new Set(["seen", "quality"]);

const parameters = new URLSearchParams(location.search);
const wanted = {
  q: parameters.get("q") || "", state: parameters.get("state") || "", type: parameters.get("type") || "",
  sort: parameters.get("sort") || "device", order: parameters.get("order") || "",
};
let nowUs = Date.now() * 1000;
const rows = new Map();  // address -> row and its parts
let page = null;

// ---- what is chosen ------------------------------------------------------------------------------------------------

const wayOf = (sort) => (NEWEST_FIRST.has(sort) ? "desc" : "asc");
const chosen = () => Object.fromEntries(Object.entries(wanted).filter(([name, value]) => value && !(name === "sort" && value === "device")
  && !(name === "order" && value === wayOf(wanted.sort))));

function change(changes) {
  Object.assign(wanted, changes);
  cursors.length = 1;
  const text = new URLSearchParams(chosen()).toString();
  history.replaceState(null, "", text ? `?${text}` : location.pathname);
  drawChoices();
  return list();
}

function drawChoices() {
  for (const node of $("tabs").children) node.setAttribute("aria-pressed", String(node.dataset.state === wanted.state));
  $("type").value = wanted.type;
  const way = wanted.order || wayOf(wanted.sort);
  for (const cell of $("heads").children) {
    const mine = cell.dataset.sort === wanted.sort;
    if (mine) cell.setAttribute("aria-sort", way === "desc" ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
    const mark = cell.querySelector(".way");
    if (mark) mark.textContent = mine ? (way === "desc" ? "▼" : "▲") : "";
  }
  $("order").value = `${wanted.sort} ${way}`;
}

function sortBy(sort) {
  const way = wanted.order || wayOf(wanted.sort);
  change({ sort, order: sort === wanted.sort ? (way === "desc" ? "asc" : "desc") : "" });
}

// ---- rows ----------------------------------------------------------------------------------------------------------

function newRow(device) {
  const parts = {
    row: el("tr"), link: el("a", { class: "device-name", href: deviceUrl(device.device_id) }), address: el("td", { class: "c-address device-address" }),
    type: el("td", { class: "c-type" }), values: el("td", { class: "c-values" }), state: el("td", { class: "c-state" }), age: el("td", { class: "num c-age" }),
  };
  parts.row.append(el("td", { class: "c-device" }, parts.link), parts.address, parts.type, parts.values, parts.state, parts.age);
  rows.set(device.device_id, parts);
  return parts;
}

function draw(found) {
  page = found;
  nowUs = found.at;
  const kept = new Set(found.devices.map((d) => d.device_id));
  for (const id of rows.keys()) if (!kept.has(id)) rows.delete(id);
  const nodes = found.devices.map((device) => {
    const parts = rows.get(device.device_id) || newRow(device);
    const text = JSON.stringify([device.name, device.type, device.state, device.values]);
    if (parts.text !== text) {
      parts.text = text;
      parts.link.textContent = device.name || device.device_id;
      parts.address.textContent = device.device_id;
      parts.type.textContent = device.type || "";
      const shown = device.values.slice(0, VALUES_SHOWN);
      parts.values.replaceChildren(el("div", { class: "values" }, ...shown.map((v) => chip(v, nowUs)),
        device.values.length > shown.length ? el("a", { class: "more", href: deviceUrl(device.device_id), text: `+${device.values.length - shown.length}` }) : null,
        device.values.length ? null : el("span", { class: "quiet", text: device.enabled ? "nothing yet" : "switched off" })));
      parts.state.replaceChildren(statePill(device.state), ...worst(device.values));
    }
    parts.age.textContent = device.last_seen ? age(device.last_seen, nowUs) : "never";
    parts.age.title = instant(device.last_seen) || "";
    return parts.row;
  });
  const body = $("rows");
  // Rows are replaced only when the list changed, so that focus and selection stay where they are.
  if (nodes.length !== body.children.length || nodes.some((row, i) => body.children[i] !== row)) body.replaceChildren(...nodes);
  $("total").textContent = found.total === null ? "" : count(found.total);
  $("empty").hidden = nodes.length > 0;
  if (!nodes.length) $("empty").replaceChildren(...nothing());
  $("note").hidden = !found.note;
  $("note").textContent = found.note || "";
  $("live").className = `pill ${found.note ? "warn" : "good"}`;
  $("live").textContent = found.note ? "without the database" : "live";
  $("clock").textContent = instant(found.at);
  drawPager(found);
}

// The worst flag among the last values; good says nothing.
function worst(values) {
  const found = [4, 3].find((flag) => values.some((v) => v.quality === flag));
  return found ? [" ", el("span", { class: `pill ${found === 4 ? "bad" : "warn"}`, text: found === 4 ? "quality: fail" : "quality: suspect" })] : [];
}

function nothing() {
  if (wanted.q || wanted.state || wanted.type) {
    const all = el("button", { type: "button", text: "Show all devices" });
    all.addEventListener("click", () => { $("search").value = ""; change({ q: "", state: "", type: "" }); });
    return [el("p", { text: "No device is like that." }), all];
  }
  return [el("p", { text: "No device is registered yet. A registry file names devices, their types and how they are decoded:" }),
    el("p", {}, el("code", { text: "preservarium registry apply examples/registry.yaml" })),
    el("p", {}, "What devices send that are in no registry is kept on ", el("a", { href: "/refusals?code=unknown_device", text: "Refusals" }), ", with its bytes.")];
}

// ---- asking --------------------------------------------------------------------------------------------------------

let asked = 0;
async function list() {
  const number = ++asked;
  const query = new URLSearchParams({ ...chosen(), limit: String(LIMIT) });
  if (cursors.at(-1)) query.set("cursor", cursors.at(-1));
  try {
    const found = await get(`/api/devices?${query}`);
    // An answer to an earlier question would undo what was typed since.
    if (number === asked) draw(found);
  } catch (e) {
    if (number !== asked) return;
    $("live").className = "pill bad";
    $("live").textContent = e.status === 401 ? "for operators" : "no answer";
    $("note").hidden = e.status === 401;
    $("note").textContent = `The list cannot be had: ${e.message}. What is shown may be old.`;
  }
}

async function fleet() {
  try {
    const found = await get("/api/fleet");
    for (const node of $("tabs").children) {
      const n = node.dataset.state ? found.states[node.dataset.state] : found.devices;
      node.querySelector("b").textContent = ` ${count(n)}`;
    }
    const names = found.types.map((t) => t.type);
    if ($("type").dataset.shown !== names.join("\n")) {
      $("type").dataset.shown = names.join("\n");
      $("type").replaceChildren(el("option", { value: "", text: "all types" }),
        ...(wanted.type && !names.includes(wanted.type) ? [el("option", { value: wanted.type, text: wanted.type })] : []),
        ...found.types.map((t) => el("option", { value: t.type, text: `${t.type} (${count(t.devices)})` })));
      $("type").value = wanted.type;
    }
  } catch { /* the list says what is wrong */ }
}

// ---- the page ------------------------------------------------------------------------------------------------------

for (const [state, text] of TABS) {
  const node = el("button", { type: "button", "data-state": state }, text, el("b"));
  node.addEventListener("click", () => change({ state }));
  $("tabs").append(node);
}
for (const [text, sort] of COLUMNS) {
  const cell = el("th", { scope: "col", class: sort === "seen" ? "num" : null, "data-sort": sort });
  if (sort) {
    const button = el("button", { type: "button", class: "head" }, text, " ", el("span", { class: "way", "aria-hidden": "true" }));
    button.addEventListener("click", () => sortBy(sort));
    cell.append(button);
    for (const way of ["asc", "desc"]) $("order").append(el("option", { value: `${sort} ${way}`, text: `${text.toLowerCase()} ${way === "asc" ? "▲" : "▼"}` }));
  } else cell.textContent = text;
  $("heads").append(cell);
}
$("search").value = wanted.q;
drawChoices();
poll(FLEET_INTERVAL_MS, fleet);
poll(LIST_INTERVAL_MS, list);

$("type").addEventListener("change", () => change({ type: $("type").value }));
$("order").addEventListener("change", () => { const [sort, order] = $("order").value.split(" "); change({ sort, order }); });
onPage(list);
onSearch((q) => change({ q }), 150);
$("search").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !page?.devices.length || $("search").value.trim() !== wanted.q) return;
  location.href = deviceUrl(page.devices[0].device_id);
});
