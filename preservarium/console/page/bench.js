// A refusal's payload through another parser, to be looked at.
"use strict";

let parserNames = null;
async function fillParsers() {
  if (parserNames) return;
  parserNames = [];
  try {
    let cursor = "";
    do {
      const page = await get(`/api/registry/parser?limit=200${cursor ? `&cursor=${cursor}` : ""}`);
      parserNames.push(...page.documents.map((d) => d.name));
      cursor = page.next_cursor;
    } while (cursor && parserNames.length < 2000);
    $("parsers").replaceChildren(...parserNames.map((name) => el("option", { value: name })));
  } catch { parserNames = null; }
}

function decodedNode(found) {
  const rows = found.readings.length ? found.readings.map((r) => [`${r.component_type}${pinText(r.pin_position)}`, r.value ?? r.value_text, r.unit, (r.flags || []).join(", ")]) : found.fields.map((f) => [f.name, f.value, f.unit, ""]);
  return el("div", { class: "decoded" }, el("p", {}, el("span", { class: `pill ${found.error ? "bad" : "good"}`, text: found.error ? "refused" : "decoded" }), ` ${found.parser}${found.type ? `, as ${found.type}` : ""}, ${number(found.took_ms)} ms`),
    found.error ? el("p", { class: "fault", text: `${found.error.code}: ${found.error.message}` }) : null,
    rows.length ? el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "What was decoded" }, el("table", { class: "plain-table" }, el("thead", {}, el("tr", {}, ...[found.readings.length ? "Reading" : "Field", "Value", "Unit", "Flags"].map((h) => el("th", { scope: "col", text: h })))),
      el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((c) => el("td", { text: c === null || c === undefined ? "" : typeof c === "object" ? JSON.stringify(c) : String(c) }))))))) : null,
    found.refused.length ? el("p", { class: "quiet", text: `Parts that cannot be used: ${found.refused.map((r) => r.message).join("; ")}` }) : null);
}

// Beside the bytes of a refusal: another parser for them.
function benchNode(refusal) {
  const id = `b-${refusal.id.replace(":", "-")}`;
  const parser = el("input", { id: `${id}-parser`, list: "parsers", maxlength: "120", autocomplete: "off", spellcheck: "false", value: (refusal.parser || "").split("@")[0] || null });
  const port = el("input", { id: `${id}-port`, type: "text", inputmode: "numeric", maxlength: "3", class: "short" });
  const out = el("div", { role: "status" });
  const line = () => ({ refusal: refusal.id, ...(port.value.trim() ? { port: Number(port.value.trim()) } : {}) });
  const all = el("button", { type: "button", text: "Which parser takes it?" });
  const run = async (path, asked, show) => {
    out.replaceChildren(el("p", { class: "quiet", text: "decoding …" }));
    try { out.replaceChildren(show(await post(path, asked, 30000))); }
    catch (e) { out.replaceChildren(el("p", { class: "fault", text: e.status === 401 || e.status === 403 ? `This is for operators: ${e.message}` : e.message })); }
  };
  all.addEventListener("click", () => run("/api/decode/all", line(), (found) => (found.parsers.length ? el("ul", { class: "fits" }, ...found.parsers.slice(0, 8).map((fit) => {
    const choose = el("button", { type: "button", class: "cause", text: fit.parser });
    choose.addEventListener("click", () => { parser.value = fit.parser; form.requestSubmit(); });
    return el("li", {}, choose, el("span", { class: "quiet", text: ` ${fit.plausible} of ${fit.readings} readings plausible${fit.types.length ? `, used by ${fit.types.join(", ")}` : ""}` }), el("div", { class: "fields-found", text: Object.entries(fit.fields).map(([k, v]) => `${k} ${typeof v === "object" ? JSON.stringify(v) : v}`).join(", ") }));
  })) : el("p", { class: "quiet", text: `None of the ${found.tried} parsers in force takes it.` }))));
  const form = el("form", { class: "filters bench" }, el("div", {}, el("label", { for: `${id}-parser`, text: "Decode again here with parser" }), parser), el("div", {}, el("label", { for: `${id}-port`, text: "Port" }), port), el("button", { type: "submit", text: "Decode" }), all);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!parser.value.trim()) { parser.focus(); return; }
    run("/api/decode", { ...line(), parser: parser.value.trim() }, decodedNode);
  });
  parser.addEventListener("focus", fillParsers);
  return el("div", { class: "bench-part" }, form, out);
}

const settledText = (s) => (s ? (s.how === "discarded" ? `discarded by ${s.actor || "somebody"}: ${s.reason}` : `redriven ${instant(s.at)}`) : "");
