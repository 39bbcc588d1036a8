// Refusals that are sent through again, or set aside with a reason: each is counted before it is done.
"use strict";

let doing = null;
async function openDoing(what, selection, words) {
  doing = { what, selection };
  $("d-title").textContent = what === "redrive" ? "Send through again" : "Set aside";
  $("d-about").textContent = words;
  $("d-reason-part").hidden = what === "redrive";
  $("d-reason").value = "";
  $("d-do").textContent = what === "redrive" ? "Send" : "Set aside";
  $("d-do").disabled = true;
  actorInto($("d-actor"));
  $("d-preview").textContent = "counting …";
  $("d-fault").hidden = true;
  $("dialog").showModal();
  try {
    const found = await post(`/api/refusals/${what}`, { ...selection, dry_run: true });
    if (doing?.selection !== selection) return;
    const n = what === "redrive" ? found.sent : found.discarded;
    $("d-preview").textContent = `${count(found.matched)} match; ${count(n)} would be ${what === "redrive" ? "sent" : "set aside"}, ${count(found.already)} were redriven or set aside before${found.unusable ? `, ${count(found.unusable)} are not to be had any more` : ""}${found.more ? ". There are more: repeat it for the rest" : ""}.`;
    $("d-do").disabled = !n;
  } catch (e) { if (doing?.selection === selection) { $("d-preview").textContent = ""; $("d-fault").hidden = false; $("d-fault").textContent = e.message; } }
}
async function carryOut() {
  const { what, selection } = doing;
  const reason = $("d-reason").value.trim();
  if (what === "discard" && !reason) { $("d-reason").focus(); $("d-fault").hidden = false; $("d-fault").textContent = "Say why nobody wants them: it is kept."; return; }
  $("d-do").disabled = true;
  $("d-fault").hidden = true;
  try {
    const found = await post(`/api/refusals/${what}`, { ...selection, dry_run: false, actor: actorOf($("d-actor")), ...(what === "discard" ? { reason } : {}) });
    $("dialog").close();
    say(`${what === "redrive" ? `${count(found.sent)} are sent through again` : `${count(found.discarded)} are set aside`}${found.more ? "; there are more: repeat it for the rest" : ""}.`, "good");
    polls.forEach((run) => run());
  } catch (e) { $("d-fault").hidden = false; $("d-fault").textContent = e.message; $("d-do").disabled = false; }
}
$("d-cancel").addEventListener("click", () => $("dialog").close());
$("dialog").addEventListener("close", () => { doing = null; });
$("d-form").addEventListener("submit", (event) => { event.preventDefault(); if (!$("d-do").disabled) carryOut(); });
