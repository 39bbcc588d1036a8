// Devices that nobody registered, each with one click to change that.
"use strict";

const LIMIT = 50;
const FITS_SHOWN = 3;
const parameters = new URLSearchParams(location.search);
let device = parameters.get("device") || "";
const registered = new Map();  // address -> what was done: the list is some seconds old

// YAML that means this text, whatever is in it: a JSON text is one.
const quoted = (text) => JSON.stringify(text);

function payloadText(one) {
  if (one.hex !== undefined) return one.hex.replace(/(..)(?=.)/g, "$1 ");
  return one.payload === undefined ? "no payload is kept" : JSON.stringify(one.payload);
}

function fitNode(fit) {
  const fields = Object.entries(fit.fields).map(([k, v]) => `${k} ${typeof v === "object" ? JSON.stringify(v) : v}`).join(", ");
  return el("li", {}, el("b", { text: fit.parser }), el("span", { class: "quiet", text: ` takes ${fit.taken} of ${fit.tried}, ${fit.plausible} of ${fit.readings} readings plausible` }), el("div", { class: "fields-found", text: fields }));
}

function card(one, types, nowUs) {
  const best = one.parsers[0];
  const proposed = one.parsers.flatMap((fit) => fit.types)[0] || "";
  const id = `u-${one.device.replace(/[^a-z0-9]+/gi, "-")}`;
  const kind = el("select", { id: `${id}-type` }, el("option", { value: "", text: "choose a type" }), ...types.map((t) => el("option", { value: t, text: t, selected: t === proposed })));
  const name = el("input", { id: `${id}-name`, maxlength: "200", autocomplete: "off", spellcheck: "false" });
  const button = el("button", { type: "submit", class: "primary", text: "Register" });
  const said = el("p", { class: "fault", role: "alert", hidden: true });
  const form = el("form", { class: "filters" }, el("div", {}, el("label", { for: `${id}-type`, text: "Type" }), kind), el("div", {}, el("label", { for: `${id}-name` }, "Name ", el("span", { class: "quiet", text: "if it has one" })), name), button);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    said.hidden = true;
    if (!kind.value) { said.hidden = false; said.textContent = "Choose its type first; where none fits, it needs a parser: see Registry."; kind.focus(); return; }
    button.disabled = true;
    try {
      const text = `devices:\n  - device_id: ${quoted(one.device)}\n    type: ${quoted(kind.value)}\n${name.value.trim() ? `    name: ${quoted(name.value.trim())}\n` : ""}    enabled: true\n`;
      const found = await post("/api/registry/save", { yaml: text, actor: actorOf($("actor")), expected: { [`device/${one.device}`]: 0 } });
      if (!found.ok) throw new Error(found.problems.map((p) => p.message).join("; "));
      registered.set(one.device, { type: kind.value });
      say(`${one.device} is registered as ${kind.value}.`, "good");
      item.replaceWith(card(one, types, nowUs));
    } catch (e) {
      said.hidden = false;
      said.textContent = e.message;
      if (!$("actor").value.trim()) $("actor").focus();
    } finally { button.disabled = false; }
  });
  const done = registered.get(one.device);
  const again = el("button", { type: "button", class: "primary", text: "Bring in what it sent" });
  again.addEventListener("click", async () => {
    again.disabled = true;
    try {
      const found = await post("/api/refusals/redrive", { code: "unknown_device", device: one.device, dry_run: false, actor: actorOf($("actor")) });
      done.sent = (done.sent || 0) + found.sent;
      done.more = found.more;
      say(`${count(found.sent)} messages of ${one.device} are sent through again${found.unusable ? `, ${count(found.unusable)} are not to be had any more` : ""}${found.more ? "; there are more: bring them in, too" : ""}.`, "good");
      item.replaceWith(card(one, types, nowUs));
    } catch (e) { say(e.message, "bad"); again.disabled = false; }
  });
  const item = el("li", {}, el("div", { class: "line" }, el("b", { class: "key", text: one.device }), el("span", { class: "quiet", text: `${count(one.count)} ${one.count === 1 ? "message" : "messages"}, the last ${age(one.last_seen, nowUs)} ago${one.mode || one.connector ? ` by ${one.mode || one.connector}` : ""}${one.port !== undefined && one.port !== null ? `, port ${one.port}` : ""}` })),
    el("pre", { tabindex: "0", "aria-label": `Last payload of ${one.device}`, text: payloadText(one) }),
    best ? el("ul", { class: "fits" }, ...one.parsers.slice(0, FITS_SHOWN).map(fitNode)) : el("p", { class: "quiet", text: "No parser of the registry understands it." }),
    done ? el("p", { class: "done" }, el("span", { class: "pill good", text: `registered as ${done.type}` }), " ", el("a", { href: deviceUrl(one.device), text: "Look at it" }), " ", done.sent === undefined || done.more ? again : el("span", { class: "quiet", text: `${count(done.sent)} messages brought in` })) : form, done ? null : said);
  return item;
}

function draw(found) {
  $("total").textContent = found.addresses ? `${count(found.addresses)}${found.addresses > found.unknown.length ? `, the ${found.unknown.length} busiest are shown` : ""}` : "";
  $("unknown").replaceChildren(...found.unknown.map((one) => card(one, found.types, found.at)));
  $("empty").hidden = found.unknown.length > 0;
  $("note").hidden = !found.note && !found.others;
  $("note").textContent = [found.note, found.others ? `${count(found.others)} messages are of still other addresses.` : ""].filter(Boolean).join(" ");
  $("live").className = "pill good";
  $("live").textContent = `looked ${found.age_s < 2 ? "now" : `${Math.round(found.age_s)} s ago`}`;
  $("clock").textContent = instant(found.at);
}

const LOOK_TIMEOUT_MS = 60000;
async function list() {
  $("live").className = "pill";
  $("live").textContent = "looking …";
  $("again").disabled = true;
  const query = new URLSearchParams({ limit: String(LIMIT), ...(device ? { device } : {}) });
  try {
    // All parsers are tried: longer than other questions may take.
    const response = await fetch(`/api/unknown-devices?${query}`, { signal: AbortSignal.timeout(LOOK_TIMEOUT_MS), headers: authorized({ Accept: "application/json" }) });
    const found = await response.json();
    $("login").hidden = response.status !== 401;
    if (!response.ok) throw Object.assign(new Error(found.error), { status: response.status });
    draw(found);
  } catch (e) {
    $("live").className = "pill bad";
    $("live").textContent = e.status === 401 ? "for operators" : "no answer";
    $("note").hidden = e.status === 401;
    $("note").textContent = `They cannot be had now: ${e.message}.`;
  } finally { $("again").disabled = false; }
}

actorInto($("actor"));
$("acting").addEventListener("submit", (event) => event.preventDefault());
$("search").value = device;
onSearch((text) => { device = text; history.replaceState(null, "", device ? `?device=${encodeURIComponent(device)}` : location.pathname); list(); }, 500);
$("again").addEventListener("click", list);
polls.push(list);
list();
