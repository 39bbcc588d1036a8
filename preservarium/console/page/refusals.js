// What was refused of late: causes over time, what to do about each, and the newest with their bytes. What is chosen stands in the address.
"use strict";

const LIST_INTERVAL_MS = 5000;
const LIMIT = 20;

const parameters = new URLSearchParams(location.search);
const wanted = { stage: parameters.get("stage") || "", code: parameters.get("code") || "", device: parameters.get("device") || "" };
let shown = "";

function change(changes) {
  Object.assign(wanted, changes);
  cursors.length = 1;
  const text = new URLSearchParams(Object.fromEntries(Object.entries(wanted).filter(([, v]) => v))).toString();
  history.replaceState(null, "", text ? `?${text}` : location.pathname);
  return list();
}

function causeRow(cause, nowUs) {
  const mine = wanted.code === cause.code && (!wanted.stage || wanted.stage === cause.stage);
  const button = el("button", { type: "button", class: "cause", "aria-pressed": String(mine), "data-cause": `${cause.stage} ${cause.code}` }, el("b", { text: cause.code }));
  button.addEventListener("click", () => change(mine ? { stage: "", code: "" } : { stage: cause.stage, code: cause.code }));
  const told = `${count(cause.day)} in the last day, ${count(cause.hour)} of them in the last hour`;
  return el("tr", { class: mine ? "chosen" : null }, el("td", {}, button, el("div", { class: "quiet", text: cause.meaning })), el("td", { text: cause.stage }),
    el("td", { class: "over-time", title: told }, bars(cause.counts), el("span", { class: "hidden", text: told })),
    el("td", { class: "num", text: count(cause.hour) }), el("td", { class: "num", text: count(cause.day) }), el("td", { class: "num", text: `${age(cause.last_at, nowUs)} ago` }));
}

function draw(found) {
  const focused = document.activeElement?.dataset?.cause;
  $("causes").replaceChildren(...found.causes.map((c) => causeRow(c, found.at)));
  if (focused) [...$("causes").querySelectorAll("button")].find((b) => b.dataset.cause === focused)?.focus();
  $("none").hidden = found.causes.length > 0 || !found.complete;
  $("causes").closest("table").hidden = !found.causes.length;
  $("since").textContent = found.since ? `of the last ${span(Math.min(found.span_s, Math.max(0, Math.round((found.at - found.since) / 1e6))))}` : "";
  $("unknown").textContent = found.unknown_devices ? `${count(found.unknown_devices)} ${found.unknown_devices === 1 ? "device" : "devices"} in no registry` : "";
  const cause = wanted.code ? found.causes.find((c) => c.code === wanted.code && (!wanted.stage || c.stage === wanted.stage)) : null;
  $("remedy").hidden = !cause;
  if (cause) {
    const text = `${cause.code} ${cause.remedy}`;
    if ($("remedy").dataset.shown !== text) {
      $("remedy").dataset.shown = text;
      $("remedy").replaceChildren(el("p", {}, el("b", { text: "Why: " }), `${cause.meaning}.`), el("p", {}, el("b", { text: "What to do: " }), ...worded(cause.remedy)));
    }
  }
  $("which").textContent = [wanted.code, wanted.stage ? `at ${wanted.stage}` : "", wanted.device ? `of ${wanted.device}` : ""].filter(Boolean).join(" ");
  $("all").hidden = !wanted.code;
  const text = JSON.stringify(found.refusals.map((r) => r.id));
  if (text !== shown) {
    shown = text;
    const open = new Set([...$("refusals").querySelectorAll("details[open]")].map((d) => d.dataset.id));
    const before = document.activeElement?.closest?.("details.refusal")?.dataset.id;
    $("refusals").replaceChildren(...found.refusals.map((r) => refusalItem(r, found.at, open.has(r.id))));
    if (before) $("refusals").querySelector(`details[data-id="${CSS.escape(before)}"] summary`)?.focus();
  }
  $("empty").hidden = found.refusals.length > 0 || !found.complete;
  $("empty").textContent = wanted.device ? "Nothing of this device was refused within the last day." : wanted.code ? "Nothing of this cause is kept here any more." : "Nothing to show.";
  $("note").hidden = !found.note;
  $("note").replaceChildren(...worded(found.note || ""));
  $("live").className = `pill ${found.complete ? "good" : "warn"}`;
  $("live").textContent = found.complete ? "live" : "not all";
  $("clock").textContent = instant(found.at);
  drawPager(found);
}

let asked = 0;
async function list() {
  const number = ++asked;
  const query = new URLSearchParams({ ...Object.fromEntries(Object.entries(wanted).filter(([, v]) => v)), limit: String(LIMIT) });
  if (cursors.at(-1)) query.set("cursor", cursors.at(-1));
  try {
    const found = await get(`/api/refusals?${query}`);
    if (number === asked) draw(found);
  } catch (e) {
    if (number !== asked) return;
    $("live").className = "pill bad";
    $("live").textContent = e.status === 401 ? "for operators" : "no answer";
    $("note").hidden = e.status === 401;
    $("note").textContent = `The refusals cannot be had: ${e.message}.`;
  }
}

$("search").value = wanted.device;
$("all").addEventListener("click", () => change({ stage: "", code: "" }));
poll(LIST_INTERVAL_MS, list);
onPage(list);
onSearch((device) => change({ device }), 300);
