// The registry. Which document is open stands in the address: ?kind, ?name, ?q.
import { makeEditor } from "/console/editor.js";

const LIMIT = 50;
const CHECK_AFTER_MS = 350;
const NAMES = { manufacturer: "Manufacturers", datatype: "Datatypes", parser: "Parsers", recipient: "Recipients", rule: "Alarm rules", type: "Device types", experiment: "Experiments", device: "Devices" };
const TEMPLATES = {
  manufacturer: "manufacturers:\n  - name: Example\n    description: Who makes it\n",
  datatype: "datatypes:\n  - name: air-temperature\n    kind: number\n    unit: °C\n    fail_span: {min: -50, max: 85}\n    suspect_span: {min: -30, max: 50}\n",
  parser: "parsers:\n  - name: example\n    kind: javascript\n    status: draft\n    source: |\n      function decodeUplink(input) {\n        return {data: {temperature: ((input.bytes[0] << 8) | input.bytes[1]) / 10}};\n      }\n    examples:\n      - hex: \"00d7\"\n        port: 1\n        output: {data: {temperature: 21.5}}\n",
  recipient: "recipients:\n  - name: operators\n    channel: mail\n    address: operators@example.org\n",
  rule: "rules:\n  - name: too-hot\n    component_type: air-temperature\n    kind: high\n    threshold: 30\n    severity: major\n    enabled: true\n",
  type: "device_types:\n  - name: EX-1\n    manufacturer: Example\n    parser: example\n    mapping:\n      temperature: {component_type: air-temperature}\n",
  experiment: "experiments:\n  - name: north-field\n",
  device: "devices:\n  - device_id: \"0018B20000000001\"\n    type: EX-1\n    name: Example 1\n    enabled: true\n",
};

const parameters = new URLSearchParams(location.search);
const wanted = { kind: parameters.get("kind") || "device", name: parameters.get("name") || "", q: parameters.get("q") || "" };
if (!NAMES[wanted.kind]) wanted.kind = "device";
let editing = false;
let open = null;  // {kind, name, yaml, expected}
let checked = 0;
let waiting = 0;
const editor = makeEditor($("editor"), "The document as YAML", typed);

const dirty = () => open !== null && editor.text() !== open.yaml;
function keep() {
  const text = new URLSearchParams(Object.fromEntries(Object.entries(wanted).filter(([, v]) => v)));
  history.replaceState(null, "", `?${text}`);
}
const leaves = () => !dirty() || confirm("What was typed is not saved. Leave it?");

// ---- kinds and documents -------------------------------------------------------------------------------------------

async function kinds() {
  try {
    const found = await get("/api/registry");
    editing = found.editing;
    $("kinds").replaceChildren(...found.kinds.slice().reverse().map(({ kind, count: n }) => {
      const node = el("button", { type: "button", "data-kind": kind, "aria-pressed": String(kind === wanted.kind) }, NAMES[kind], el("b", { text: ` ${count(n)}` }));
      node.addEventListener("click", () => {
        wanted.kind = kind; wanted.q = ""; $("search").value = ""; cursors.length = 1;
        for (const other of $("kinds").children) other.setAttribute("aria-pressed", String(other === node));
        keep(); list();
      });
      return node;
    }));
    $("new").hidden = !editing;
    $("live").className = "pill good";
    $("live").textContent = editing ? "editing" : found.in_files ? "kept in files" : "changed by engineers";
    $("note").hidden = true;
    buttons();
  } catch (e) { failed(e); }
}
function failed(e) {
  $("live").className = "pill bad";
  $("live").textContent = e.status === 401 ? "for operators" : "no answer";
  $("note").hidden = e.status === 401;
  $("note").textContent = `The registry cannot be had: ${e.message}.`;
}

let listed = 0;
async function list() {
  const number_ = ++listed;
  const query = new URLSearchParams({ limit: String(LIMIT) });
  if (wanted.q) query.set("q", wanted.q);
  if (cursors.at(-1)) query.set("cursor", cursors.at(-1));
  $("h-list").textContent = NAMES[wanted.kind];
  try {
    const found = await get(`/api/registry/${wanted.kind}?${query}`);
    if (number_ !== listed) return;
    $("documents").replaceChildren(...found.documents.map((d) => {
      const link = el("a", { href: `?${new URLSearchParams({ kind: found.kind, name: d.name })}`, "aria-current": open && open.kind === found.kind && open.name === d.name ? "true" : null }, el("b", { text: d.name }),
        d.status && d.status !== "active" && d.status !== "on" ? el("span", { class: "tag", text: d.status }) : null, el("span", { class: "quiet", text: ` ${d.about || ""}` }));
      link.addEventListener("click", (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        if (leaves()) show(found.kind, d.name);
      });
      return el("li", {}, link);
    }));
    $("empty").hidden = found.documents.length > 0;
    $("empty").textContent = wanted.q ? "Nothing is called so." : `There are no ${NAMES[wanted.kind].toLowerCase()} yet. ${editing ? "“New” begins one; " : ""}preservarium registry apply FILE brings in a file of them.`;
    $("clock").textContent = instant(found.at);
    drawPager(found);
  } catch (e) { if (number_ === listed) failed(e); }
}

async function show(kind, name) {
  try {
    const found = await get(`/api/registry/${kind}/${encodeURIComponent(name)}`);
    editing = found.editing;
    Object.assign(wanted, { kind, name });
    keep();
    opened(kind, name, found.yaml, { [found.stream]: found.version });
    $("about").textContent = `${found.stream}, changed ${instant(found.updated_at)} by ${found.updated_by}, revision ${found.rev}`;
    drawVersions(found);
    for (const link of $("documents").querySelectorAll("a")) link.getAttribute("href") === `?${new URLSearchParams({ kind, name })}` ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  } catch (e) {
    if (e.status === 404) { $("note").hidden = false; $("note").textContent = `${e.message}: ${name}`; }
    else failed(e);
  }
}

function opened(kind, name, text, expected) {
  open = { kind, name, yaml: text, expected };
  $("h-document").replaceChildren(name || `New: ${NAMES[kind].toLowerCase()}`, el("span", { class: "quiet", text: name ? ` ${kind}` : "" }));
  $("plan").hidden = true;
  $("difference").replaceChildren();
  $("note").hidden = true;
  editor.set(text);
  editor.still(!editing);
  check();
}

// ---- checking ------------------------------------------------------------------------------------------------------

function typed() {
  $("plan").hidden = true;
  clearTimeout(waiting);
  $("status").className = "pill";
  $("status").textContent = "checking …";
  waiting = setTimeout(check, CHECK_AFTER_MS);
  buttons();
}

async function check() {
  const number_ = ++checked;
  const text = editor.text();
  if (!open || !text.trim()) { $("status").textContent = ""; buttons(); return; }
  try {
    const found = await post("/api/registry/check", { yaml: text }, 25000);
    if (number_ === checked) drawCheck(found);
  } catch (e) {
    if (number_ !== checked) return;
    // Who may only look is told nothing of what trying it would show.
    if (e.status === 403) { $("status").className = "pill"; $("status").textContent = "to look at"; return; }
    $("status").className = "pill bad";
    $("status").textContent = "not checked";
    drawProblems([{ level: "error", line: null, path: "", message: e.message }]);
  }
}

function drawProblems(problems) {
  $("problems").replaceChildren(...problems.map((p) => {
    const text = `${p.line ? `line ${p.line}: ` : ""}${p.path ? `${p.path}: ` : ""}${p.message}`;
    if (!p.line) return el("li", { class: p.level, text });
    const button = el("button", { type: "button", class: "cause", text });
    button.addEventListener("click", () => editor.go(p.line));
    return el("li", { class: p.level }, button);
  }));
}

function drawCheck(found) {
  const bad = found.problems.filter((p) => p.level === "error").length;
  const broken = found.examples.filter((e) => !e.ok);
  $("status").className = `pill ${bad || broken.length ? "bad" : "good"}`;
  $("status").textContent = bad ? `${bad} ${bad === 1 ? "error" : "errors"}` : broken.length ? `${broken.length} of ${found.examples.length} examples fail` : found.examples.length ? `right, ${found.examples.length} ${found.examples.length === 1 ? "example holds" : "examples hold"}` : "right";
  const ofExamples = broken.map((e) => ({ level: "error", line: e.line, message: e.differences.join("; ") }));
  editor.mark([...found.problems, ...ofExamples]);
  drawProblems(found.problems);
  $("examples").replaceChildren(...(found.examples.length ? [el("h3", {}, "Examples ", el("span", { class: "quiet", text: `run in ${number(found.took_ms)} ms` })), el("ul", { class: "examples" }, ...found.examples.map((e) => {
    const button = el("button", { type: "button", class: "cause", text: `${e.parser}, example ${e.index + 1}` });
    button.addEventListener("click", () => editor.go(e.line || 1));
    return el("li", { class: e.ok ? "good" : "bad" }, el("span", { "aria-hidden": "true", text: e.ok ? "✓ " : "✕ " }), el("span", { class: "hidden", text: e.ok ? "holds: " : "fails: " }), button,
      e.ok ? null : el("pre", { tabindex: "0", "aria-label": "How it differs", text: e.differences.join("\n") }));
  }))] : []));
  buttons(bad > 0);
}

function buttons(wrong = false) {
  $("revert").hidden = $("review").hidden = !editing;
  $("revert").disabled = !dirty();
  $("review").disabled = !open || wrong || (!dirty() && Boolean(open.name));
}

// ---- saving --------------------------------------------------------------------------------------------------------

// Lines of two texts: [mark, line], " " the same, "-" gone, "+" new. What both begin and end with is set aside first.
const DIFF_MAX = 1500;
function difference(before, after) {
  const [a, b] = [before, after].map((t) => t.replace(/\n$/, "").split("\n"));
  let first = 0;
  while (first < a.length && first < b.length && a[first] === b[first]) first += 1;
  let last = 0;
  while (last < a.length - first && last < b.length - first && a.at(-1 - last) === b.at(-1 - last)) last += 1;
  const [x, y] = [a.slice(first, a.length - last), b.slice(first, b.length - last)];
  const middle = [];
  if (x.length > DIFF_MAX || y.length > DIFF_MAX) middle.push(...x.map((l) => ["-", l]), ...y.map((l) => ["+", l]));
  else {
    const table = Array.from({ length: x.length + 1 }, () => new Uint16Array(y.length + 1));
    for (let i = x.length - 1; i >= 0; i -= 1) for (let j = y.length - 1; j >= 0; j -= 1) table[i][j] = x[i] === y[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
    let [i, j] = [0, 0];
    while (i < x.length || j < y.length) {
      if (i < x.length && j < y.length && x[i] === y[j]) { middle.push([" ", x[i]]); i += 1; j += 1; }
      else if (j >= y.length || (i < x.length && table[i + 1][j] >= table[i][j + 1])) { middle.push(["-", x[i]]); i += 1; }
      else { middle.push(["+", y[j]]); j += 1; }
    }
  }
  return [...a.slice(Math.max(0, first - 3), first).map((l) => [" ", l]), ...middle, ...a.slice(a.length - last, a.length - last + 3).map((l) => [" ", l])];
}
const SAID_OF = { "-": "taken away: ", "+": "added: ", " ": "" };
function diffNode(before, after, label) {
  return el("pre", { class: "diff", tabindex: "0", "aria-label": label }, ...difference(before || "", after || "").flatMap(([mark, line]) => [
    el("span", { class: mark === "+" ? "added" : mark === "-" ? "gone" : null }, el("span", { class: "hidden", text: SAID_OF[mark] }), el("span", { "aria-hidden": "true", text: `${mark} ` }), line), "\n"]));
}

async function review() {
  if ($("review").disabled) return;
  $("review").disabled = true;
  $("status").className = "pill";
  $("status").textContent = "comparing …";
  try {
    const found = await post("/api/registry/plan", { yaml: editor.text(), expected: open.expected });
    if (!found.ok) { drawProblems(found.problems); editor.mark(found.problems); $("status").className = "pill bad"; $("status").textContent = "cannot be saved"; return; }
    $("status").className = "pill good";
    $("status").textContent = found.changes.length ? `${found.changes.length} to change` : "nothing changes";
    $("changes").replaceChildren(...(found.changes.length ? found.changes.flatMap((c) => [el("h4", {}, { create: "New: ", change: "Changed: ", remove: "Removed: " }[c.action], c.stream), diffNode(c.before, c.after, `Difference of ${c.stream}`)])
      : [el("p", { class: "quiet", text: "The registry says so already." })]));
    drawProblems(found.problems);
    $("save").disabled = !found.changes.length;
    $("fault").hidden = true;
    actorInto($("actor"));
    $("plan").hidden = false;
    $("h-plan").focus();
    $("plan").scrollIntoView({ block: "nearest" });
  } catch (e) {
    $("status").className = "pill bad";
    $("status").textContent = "cannot be compared";
    drawProblems([{ level: "error", line: null, path: "", message: e.message }]);
  } finally { $("review").disabled = false; }
}

async function save_() {
  $("save").disabled = true;
  $("fault").hidden = true;
  try {
    const found = await post("/api/registry/save", { yaml: editor.text(), expected: open.expected, actor: actorOf($("actor")) });
    if (!found.ok) { drawProblems(found.problems); editor.mark(found.problems); throw new Error("it has errors meanwhile, see above"); }
    say(`Saved: ${found.changes.map((c) => c.stream).join(", ")}${found.records === "pending" ? ". The workers will hear of it when Kafka takes it" : ""}.`, "good");
    $("plan").hidden = true;
    const mine = found.changes.find((c) => c.stream.startsWith(`${open.kind}/`) && c.action !== "remove" && c.after && !/^ *status: retired$/m.test(c.after)) || found.changes[0];
    const [kind, ...rest] = mine.stream.split("/");
    open.yaml = editor.text();
    wanted.kind = kind;
    await Promise.all([kinds(), list()]);
    await show(kind, kind === "parser" ? rest.join("/").replace(/@\d+$/, "") : rest.join("/"));
  } catch (e) {
    $("fault").hidden = false;
    $("fault").textContent = e.message;
    $("save").disabled = false;
  }
}

// ---- versions ------------------------------------------------------------------------------------------------------

async function drawVersions(found) {
  $("versions-part").hidden = false;
  $("parser-versions").replaceChildren(...(found.parser_versions || []).map((v) => {
    const load = el("button", { type: "button", text: v.status === "active" ? "Open" : "Make active …", "aria-label": `${v.status === "active" ? "Open" : "Make active"}: version ${v.version}` });
    load.addEventListener("click", async () => {
      if (!leaves()) return;
      open.expected[v.stream] = undefined;
      editor.set(v.status === "active" ? found.yaml : v.yaml.replace(/^( *)status: .*$/m, "$1status: active"));
      await check();
      if (v.status !== "active" && editing) review();
    });
    const compare = el("button", { type: "button", text: "Compare", "aria-label": `Compare version ${v.version} with what is in the editor` });
    compare.addEventListener("click", () => $("difference").replaceChildren(el("h4", { text: `From version ${v.version} to what is in the editor` }), diffNode(v.yaml, editor.text(), "Difference")));
    return el("li", {}, el("b", { text: `version ${v.version}` }), el("span", { class: `pill ${v.status === "active" ? "good" : ""}`, text: v.status }), el("span", { class: "quiet", text: `${instant(v.updated_at)} by ${v.updated_by}` }), load, compare);
  }));
  const stream = found.stream;
  try {
    const { versions } = await get(`/api/registry/${found.kind}/${encodeURIComponent(found.name)}/versions?${new URLSearchParams({ stream })}`);
    if (!open || open.name !== found.name) return;
    $("versions").replaceChildren(...versions.map((v, i) => {
      const compare = el("button", { type: "button", text: "What changed", "aria-label": `What changed in ${v.version}` });
      compare.addEventListener("click", () => $("difference").replaceChildren(el("h4", { text: `${stream}, change ${v.version}` }), diffNode(versions[i + 1]?.yaml || "", v.yaml, "Difference")));
      return el("li", {}, el("b", { text: `${v.version}` }), el("span", { text: v.event }), el("span", { class: "quiet", text: `${instant(v.at)} by ${v.actor}` }), compare);
    }));
  } catch (e) { $("versions").replaceChildren(el("li", { class: "quiet", text: `not known: ${e.message}` })); }
}

// ---- the page ------------------------------------------------------------------------------------------------------

async function exported() {
  $("export").disabled = true;
  try {
    const response = await fetch("/api/registry.yaml", { headers: authorized({}) });
    if (!response.ok) throw new Error((await response.json()).error || `refused (${response.status})`);
    const link = el("a", { href: URL.createObjectURL(await response.blob()), download: "registry.yaml" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    say("The file says all that the registry holds, but for retired versions of parsers.", "good");
  } catch (e) { say(`The file cannot be had: ${e.message}`, "bad"); }
  finally { $("export").disabled = false; }
}

$("new").addEventListener("click", () => {
  if (!leaves()) return;
  wanted.name = "";
  keep();
  $("versions-part").hidden = true;
  $("about").textContent = "A registry file: more documents, of other kinds too, may stand in it.";
  opened(wanted.kind, "", TEMPLATES[wanted.kind], {});
  open.yaml = "";
  buttons();
  editor.focus();
});
$("revert").addEventListener("click", () => { editor.set(open.yaml || TEMPLATES[open.kind]); check(); });
$("review").addEventListener("click", review);
$("cancel").addEventListener("click", () => { $("plan").hidden = true; editor.focus(); });
$("save-form").addEventListener("submit", (event) => { event.preventDefault(); save_(); });
$("export").addEventListener("click", exported);
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "s" && open) { event.preventDefault(); review(); }
});
addEventListener("beforeunload", (event) => { if (dirty() && editing && open.name) event.preventDefault(); });
onPage(list);
$("search").value = wanted.q;
onSearch((q) => { wanted.q = q; cursors.length = 1; keep(); list(); });
polls.push(kinds, list);
kinds().then(() => { if (wanted.name) show(wanted.kind, wanted.name); else buttons(); });
list();
