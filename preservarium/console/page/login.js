// The page to log in. It goes back to where somebody came from, which is a page of ours or none.
"use strict";

const $ = (id) => document.getElementById(id);
const TIMEOUT_MS = 15000;

// Where to go: a path of this server. The address may have been made by anybody.
function target() {
  const wanted = new URLSearchParams(location.search).get("next") || "/";
  try {
    const url = new URL(wanted, location.origin);
    return url.origin === location.origin && url.pathname !== "/login" ? url.pathname + url.search + url.hash : "/";
  } catch { return "/"; }
}

function fault(text) {
  $("fault").hidden = !text;
  $("fault").textContent = text;
}

async function enter(event) {
  event.preventDefault();
  fault("");
  $("enter").disabled = true;
  try {
    const response = await fetch("/api/v1/session", {
      method: "POST", headers: { "Content-Type": "application/json", Accept: "application/json" },
      body: JSON.stringify({ name: $("name").value.trim(), password: $("password").value }), signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    if (response.ok) {
      // A token that was given to a page would be shown in the place of the log-in.
      try { sessionStorage.removeItem("operator-token"); } catch { /* storage is switched off */ }
      location.replace(target());
      return;
    }
    const said = await response.json();
    fault(said.error || `refused (${response.status})`);
    $("password").value = "";
    $("password").focus();
  } catch (e) { fault(`The worker does not answer: ${e.message}`); }
  finally { $("enter").disabled = false; }
}

async function offer() {
  try {
    const response = await fetch("/api/v1/session", { headers: { Accept: "application/json" }, signal: AbortSignal.timeout(TIMEOUT_MS) });
    const found = await response.json();
    if (found.name && !$("said").textContent) { location.replace(target()); return; }
    $("by-password").hidden = !found.ways.includes("password");
    $("by-oidc").hidden = !found.ways.includes("oidc");
    $("by-token").hidden = !found.ways.includes("token");
    $("nobody").hidden = found.ways.length > 0;
    $("oidc").href = `/login/oidc?${new URLSearchParams({ next: target() })}`;
    if (!$("by-password").hidden) $("name").focus();
  } catch (e) {
    $("said").hidden = false;
    $("said").textContent = `The worker does not answer: ${e.message}`;
  }
}

$("by-password").addEventListener("submit", enter);
try { const theme = localStorage.getItem("theme"); if (theme) document.documentElement.dataset.theme = theme; } catch { /* storage is switched off */ }
offer();
