// A list whose rows open, and the dialog in which an operator acts: what the pages of alarms and of commands share. Rows are kept by
// their key and moved only when the list changed, so that focus and selection stay where they are.
"use strict";

const LIST_INTERVAL_MS = 2000;
const LIMIT = 50;

let nowUs = Date.now() * 1000;
const rows = new Map();  // key -> entry: row, cells, what is shown, details
let opened = null;  // key of the row whose details are shown
let shown = null;  // the page that is drawn

// ---- rows ----------------------------------------------------------------------------------------------------------

function newEntry(key, cells) {
  const entry = { row: el("tr", { class: "alarm", tabindex: "0" }), detail: null, key };
  entry.cells = cells.map((c) => el("td", { class: `c-${c}` }));
  entry.row.append(...entry.cells);
  entry.row.addEventListener("click", (event) => { if (!event.target.closest("button, a, label") && !String(getSelection())) toggle(entry); });
  rows.set(key, entry);
  return entry;
}

// The buttons of a row, and the one that opens it; the one that has the focus keeps it.
function placeButtons(entry, cell, about, buttons) {
  const focused = cell.contains(document.activeElement) ? document.activeElement.dataset.action || "details" : null;
  const open = opened === entry.key;
  const more = el("button", { type: "button", class: "details", "aria-expanded": String(open), "aria-label": `Details: ${about}`, text: open ? "Less" : "More" });
  more.addEventListener("click", () => toggle(entry));
  cell.replaceChildren(...buttons, more);
  if (focused) (cell.querySelector(focused === "details" ? ".details" : `[data-action="${focused}"]`) || more).focus();
}

function toggle(entry) {
  opened = opened === entry.key ? null : entry.key;
  if (shown) draw(shown);
}

function drawFacts(node, facts) {
  node.replaceChildren(...facts.filter(([, v]) => v).flatMap(([k, v]) => [el("dt", { text: k }), el("dd", { text: v })]));
}

const rowNodes = () => [...$("rows").querySelectorAll("tr.alarm")];

// The rows that are wanted now, those of the keys that are kept and their details; where the row with the focus is gone, the next one has it.
function place(wanted, kept) {
  const body = $("rows");
  const at = rowNodes().indexOf(document.activeElement?.closest?.("tr.alarm"));
  for (const key of [...rows.keys()].filter((k) => !kept.has(k))) { rows.delete(key); if (opened === key) opened = null; }
  if (wanted.length === body.children.length && wanted.every((r, i) => body.children[i] === r)) return;
  const focused = document.activeElement;
  body.replaceChildren(...wanted);
  if (focused && focused !== document.body && !document.contains(focused)) (rowNodes()[Math.min(Math.max(at, 0), kept.size - 1)] || $("list")).focus();
  else if (focused && focused !== document.activeElement && document.contains(focused)) focused.focus();
}

// What is said of a page that was drawn.
function drawn(page, nothing) {
  $("empty").hidden = rows.size > 0;
  $("empty").textContent = nothing;
  drawPager(page);
  $("clock").textContent = instant(nowUs);
}

function live(cls, text) {
  if ($("live").textContent !== text) $("live").textContent = text;
  $("live").className = `pill ${cls}`;
}

function note(text) {
  $("note").hidden = !text;
  $("note").textContent = text;
}

// ---- asking --------------------------------------------------------------------------------------------------------

let lastAsked = "";

// Draws the page that was asked for last, and drops answers to earlier questions; says what went wrong.
async function askPage(path, parameters) {
  parameters.set("limit", String(LIMIT));
  if (cursors.at(-1)) parameters.set("cursor", cursors.at(-1));
  const text = parameters.toString();
  lastAsked = text;
  try {
    const page = await get(`${path}?${text}`);
    if (text === lastAsked) draw(page);
  } catch (e) {
    live("bad", "no answer");
    const what = $("h-list").firstChild.textContent.trim();
    note(e.status === 401 ? `${what} are shown to operators.` : `The list cannot be had: ${e.message}. What is shown may be old.`);
  }
}

// ---- the dialog ----------------------------------------------------------------------------------------------------

function openDialog(title, button) {
  $("d-title").textContent = title;
  $("d-do").textContent = button;
  $("d-do").disabled = false;
  $("d-actor").value = stored.get(localStorage, "operator");
  $("d-token").value = stored.get(sessionStorage, "operator-token");
  fault("");
  $("dialog").showModal();
}

// Who acts, as the dialog says: a name or a token. The token is kept for the tab, the name for the next time.
function operator() {
  return { actor: $("d-actor").value.trim(), token: $("d-token").value.trim() };
}
function isKnown({ actor, token }, what) {
  if (actor || token) return true;
  fault(`Who are you? The name is kept with the ${what}.`);
  $("d-actor").focus();
  return false;
}
function remember({ actor, token }) {
  stored.set(localStorage, "operator", actor);
  stored.set(sessionStorage, "operator-token", token);
}

// The sender's, so that a second try is the same action.
const newId = () => crypto.randomUUID?.() || `${Date.now()}-${Math.random().toString(36).slice(2)}`;

// ---- the page ------------------------------------------------------------------------------------------------------

// Keys of the page (`ofPage` says whether it took one) and of the row that has the focus.
function onKeys(ofPage, ofRow) {
  document.addEventListener("keydown", (event) => {
    if ($("dialog").open || event.ctrlKey || event.metaKey || event.altKey || isTyping()) return;
    const all = rowNodes();
    const at = all.indexOf(document.activeElement?.closest("tr.alarm"));
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const target = all[at < 0 ? 0 : at + (event.key === "ArrowDown" ? 1 : -1)];
      if (target) { event.preventDefault(); target.focus(); }
      return;
    }
    if (ofPage(event)) return;
    const entry = at >= 0 && [...rows.values()].find((e) => e.row === all[at]);
    if (!entry) return;
    if (event.key === "Enter" && document.activeElement === entry.row) { event.preventDefault(); toggle(entry); return; }
    ofRow(event, entry);
  });
}

$("d-cancel").addEventListener("click", () => $("dialog").close());
$("d-form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
if (stored.get(sessionStorage, "operator-token")) $("d-login").hidden = false;
