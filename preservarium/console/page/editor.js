// An editor of YAML: CodeMirror in the colours of the page. It stands in a shadow root, where it brings its styles as a style sheet made
// by script: as an element they would be refused by the policy of the page, which lets nothing in but files of ours.
import { EditorState, Compartment, EditorView, keymap, lineNumbers, highlightActiveLine, drawSelection, defaultKeymap, history, historyKeymap,
  HighlightStyle, syntaxHighlighting, indentOnInput, bracketMatching, indentUnit, tags, yaml, lintGutter, setDiagnostics } from "/console/codemirror.js";

const colours = HighlightStyle.define([
  { tag: [tags.propertyName, tags.definition(tags.propertyName)], color: "var(--line-3)" },
  { tag: [tags.string, tags.special(tags.string), tags.content], color: "var(--ink)" },
  { tag: [tags.number, tags.bool, tags.null, tags.keyword, tags.atom], color: "var(--line-2)" },
  { tag: [tags.comment, tags.lineComment], color: "var(--quiet)", fontStyle: "italic" },
  { tag: [tags.punctuation, tags.separator, tags.meta], color: "var(--quiet)" },
]);
const look = EditorView.theme({
  "&": { color: "var(--ink)", backgroundColor: "var(--ground)", border: "1px solid var(--line)", borderRadius: ".5rem", fontSize: "13px", maxHeight: "34rem", minHeight: "14rem" },
  "&.cm-focused": { outline: "2px solid var(--accent)", outlineOffset: "2px" },
  ".cm-scroller": { fontFamily: "ui-monospace, monospace", lineHeight: "1.5", overflow: "auto" },
  ".cm-content": { caretColor: "var(--ink)" },
  ".cm-cursor": { borderLeftColor: "var(--ink)" },
  ".cm-gutters": { backgroundColor: "var(--sheet)", color: "var(--quiet)", border: "0", borderRight: "1px solid var(--line)" },
  ".cm-activeLine, .cm-activeLineGutter": { backgroundColor: "color-mix(in srgb, var(--accent) 7%, transparent)" },
  "&.cm-focused .cm-selectionBackground, .cm-selectionBackground": { backgroundColor: "color-mix(in srgb, var(--accent) 28%, transparent) !important" },
  ".cm-tooltip": { backgroundColor: "var(--sheet)", color: "var(--ink)", border: "1px solid var(--line)", borderRadius: ".4rem" },
  ".cm-matchingBracket": { backgroundColor: "var(--accent-soft) !important" },
});

// `onChange` is told when somebody typed, and not when `set` changed it.
export function makeEditor(host, label, onChange) {
  const root = host.attachShadow({ mode: "open" });
  const still = new Compartment();
  let setting = false;
  // Tab leaves the editor, as everywhere: whoever has no mouse must not be caught in it.
  const view = new EditorView({
    root, parent: root,
    state: EditorState.create({
      doc: "",
      extensions: [lineNumbers(), history(), drawSelection(), indentOnInput(), bracketMatching(), highlightActiveLine(), indentUnit.of("  "), EditorView.lineWrapping, yaml(), lintGutter(),
        syntaxHighlighting(colours), look, keymap.of([...defaultKeymap, ...historyKeymap]), still.of([]), EditorView.contentAttributes.of({ "aria-label": label, spellcheck: "false" }),
        EditorView.updateListener.of((update) => { if (update.docChanged && !setting) onChange(); })],
    }),
  });
  return {
    text: () => view.state.doc.toString(),
    set(text) {
      setting = true;
      view.dispatch({ changes: { from: 0, to: view.state.doc.length, insert: text }, selection: { anchor: 0 } });
      view.dispatch(setDiagnostics(view.state, []));
      setting = false;
    },
    // Problems with `line`, `message` and `level`, each marked at its line.
    mark(problems) {
      const found = problems.filter((p) => p.line).map((p) => {
        const line = view.state.doc.line(Math.min(Math.max(1, p.line), view.state.doc.lines));
        const from = Math.min(line.to, line.from + (line.text.length - line.text.trimStart().length));
        return { from, to: line.to, severity: p.level === "warning" ? "warning" : "error", message: p.message };
      }).sort((a, b) => a.from - b.from);
      view.dispatch(setDiagnostics(view.state, found));
    },
    go(line) {
      const at = view.state.doc.line(Math.min(Math.max(1, line), view.state.doc.lines));
      view.dispatch({ selection: { anchor: at.from }, effects: EditorView.scrollIntoView(at.from, { y: "center" }) });
      view.focus();
    },
    still: (is) => view.dispatch({ effects: still.reconfigure(is ? [EditorState.readOnly.of(true)] : []) }),
    focus: () => view.focus(),
  };
}
