// Curves drawn with uPlot: series of one unit in one plot, all plots with one span and one cursor. Colours are the page's own.
"use strict";

const PLOT_HEIGHT = 200;
const LINES = ["--line-1", "--line-2", "--line-3", "--line-4", "--line-5", "--line-6", "--line-7", "--line-8"];
const SUSPECT = 3;
const FAIL = 4;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Points of a curve with nothing where a line must not go: [seconds, mean, least, greatest].
function gapped(curve) {
  const table = [[], [], [], []];
  curve.at.forEach((at, i) => {
    if (i && curve.gap_us && at - curve.at[i - 1] > curve.gap_us) {
      table[0].push((curve.at[i - 1] + 1) / 1e6);
      [1, 2, 3].forEach((n) => table[n].push(null));
    }
    table[0].push(at / 1e6);
    table[1].push(curve.mean[i]);
    table[2].push(curve.min ? curve.min[i] : null);
    table[3].push(curve.max ? curve.max[i] : null);
  });
  return table;
}

// Directions jump from 359° to 1°: a line there would go round the wrong way.
function broken(curve) {
  if (!curve.circular) return curve;
  const out = { ...curve, at: [], mean: [], min: null, max: null, quality: curve.quality ? [] : null };
  curve.at.forEach((at, i) => {
    if (i && Math.abs(curve.mean[i] - curve.mean[i - 1]) > curve.circular / 2) {
      out.at.push(at - 1);
      out.mean.push(null);
      out.quality?.push(null);
    }
    out.at.push(at);
    out.mean.push(curve.mean[i]);
    out.quality?.push(curve.quality[i]);
  });
  return out;
}

// A tick of the axis of time, UTC as everywhere: the day where it changes, and as much of the time as the step needs.
function tick(at_s, step_s, before_s) {
  const text = new Date(at_s * 1000).toISOString();
  const day = step_s >= 28 * 86400 ? text.slice(0, 7) : text.slice(0, 10);
  if (step_s >= 86400) return day;
  const time = text.slice(11, step_s < 60 ? 19 : 16);
  const isNew = before_s === undefined || new Date(before_s * 1000).toISOString().slice(0, 10) !== text.slice(0, 10);
  return isNew ? `${time}\n${text.slice(5, 10)}` : time;
}

// A plot of the curves of one unit. `look` is told what was chosen by dragging: {from, to} or {moved_s}.
class Plot {
  constructor(curves, bands, bounds, span, look) {
    this.curves = curves;
    this.unit = curves[0].unit || "";
    this.values = curves.map(() => el("b"));
    this.at = el("span", { class: "quiet" });
    this.canvas = el("div", { class: "canvas", role: "img" });
    this.root = el("figure", { class: "plot" }, el("figcaption", {}, ...curves.map((c, i) => el("span", { class: "key" },
      el("span", { class: `swatch line-${c.place % LINES.length}`, "aria-hidden": "true" }), `${c.component_type}${pinText(c.pin_position)} `, this.values[i], c.unit ? ` ${c.unit}` : "")), this.at), this.canvas);
    this.look = look;
    this.set(curves, bands, bounds, span);
  }

  // New points, with the plot as it is otherwise.
  set(curves, bands, bounds, span) {
    this.curves = curves;
    this.bands = bands;
    this.bounds = bounds;
    this.span = span;
    const shown = curves.map((c) => broken(c));
    const data = uPlot.join(shown.map(gapped), shown.map(() => [1, 1, 1, 1]));
    if (this.plot) this.plot.setData(data, false);
    else this.make(data);
    this.plot.setScale("x", { min: span.from / 1e6, max: span.to / 1e6 });
    this.canvas.setAttribute("aria-label", this.told());
    this.say(null);
  }

  // What the picture shows, in words.
  told() {
    return this.curves.map((c) => {
      const known = c.mean.filter((v) => v !== null);
      const name = `${c.component_type}${pinText(c.pin_position)}`;
      if (!known.length) return `${name}: no readings in this span`;
      const least = Math.min(...(c.min || c.mean).filter((v) => v !== null));
      const greatest = Math.max(...(c.max || c.mean).filter((v) => v !== null));
      return `${name}: ${known.length} points from ${instant(c.at[0])} to ${instant(c.at.at(-1))}, least ${number(least)}, greatest ${number(greatest)} ${c.unit || ""}`;
    }).join("; ");
  }

  make(data) {
    const series = [{}];
    const bands = [];
    this.curves.forEach((curve) => {
      const line = colour(LINES[curve.place % LINES.length]);
      const at = series.length;
      series.push({ stroke: line, width: 1.6, spanGaps: false, points: { show: (u, i, from, to) => to - from < 120, size: 4, fill: line } },
        { stroke: "transparent", points: { show: false } }, { stroke: "transparent", points: { show: false } });
      bands.push({ series: [at + 2, at + 1], fill: `${line}33` });
    });
    const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    let pressed = null;
    this.plot = new uPlot({
      tzDate: (s) => uPlot.tzDate(new Date(s * 1000), "UTC"), width: this.width(), height: PLOT_HEIGHT, legend: { show: false }, series, bands,
      scales: { x: { time: true }, y: { range: (u, least, greatest) => this.range(least, greatest) } },
      axes: [{ ...axis, size: 48, space: 70, values: (u, ticks, at, space, step) => ticks.map((t, i) => tick(t, step, ticks[i - 1])) }, { ...axis, size: 62, values: (u, ticks) => ticks.map((v) => number(v)) }],
      cursor: {
        sync: { key: "curves", setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 7 },
        bind: {
          // With Shift a drag moves; uPlot draws no selection then.
          mousedown: (u, target, handler) => (event) => {
            if (event.shiftKey && event.button === 0) { pressed = event.clientX; return null; }
            return handler(event);
          },
          mouseup: (u, target, handler) => (event) => {
            if (pressed !== null) {
              const width = u.over.clientWidth || 1;
              const moved = ((pressed - event.clientX) / width) * (u.scales.x.max - u.scales.x.min);
              pressed = null;
              if (Math.abs(moved) > 0) this.look({ moved_us: Math.round(moved * 1e6) });
              return null;
            }
            return handler(event);
          },
          dblclick: () => () => { this.look({ whole: true }); return null; },
        },
      },
      hooks: {
        setSelect: [(u) => {
          if (u.select.width < 5) return;
          const [from, to] = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          this.look({ from: Math.round(from * 1e6), to: Math.round(to * 1e6) });
        }],
        setCursor: [(u) => this.say(u.cursor.idx ?? null)],
        drawClear: [(u) => this.drawBands(u)],
        draw: [(u) => { this.drawBounds(u); this.drawFlags(u); }],
      },
    }, data, this.canvas);
  }

  width() { return Math.max(240, this.canvas.clientWidth || 600); }

  resize() { if (this.plot && this.plot.width !== this.width()) this.plot.setSize({ width: this.width(), height: PLOT_HEIGHT }); }

  // Colours are taken when a plot is made, so it is made anew where they changed.
  recolour() {
    const data = this.plot.data;
    this.plot.destroy();
    this.make(data);
    this.plot.setScale("x", { min: this.span.from / 1e6, max: this.span.to / 1e6 });
  }

  // Some room above and below, also where all is the same. Of directions the whole circle.
  range(least, greatest) {
    const period = this.curves.every((c) => c.circular) ? this.curves[0].circular : 0;
    if (period) return [0, period];
    if (least === null || least === undefined) return [0, 1];
    const room = (greatest - least) * 0.08 || Math.abs(greatest) * 0.05 || 1;
    return [least - room, greatest + room];
  }

  // What is at the cursor; without one, what came last.
  say(index) {
    const data = this.plot.data;
    this.at.textContent = index === null ? "" : instant(data[0][index] * 1e6);
    this.values.forEach((node, i) => {
      let [value, more] = [null, ""];
      if (index === null) value = this.curves[i].mean.findLast((v) => v !== null) ?? null;
      else {
        // The nearest point of this curve: others of the plot have other instants.
        const column = data[1 + 3 * i];
        for (let off = 0; off < 40 && value === null; off += 1) {
          const found = [index - off, index + off].find((at) => typeof column[at] === "number");
          if (found !== undefined) {
            value = column[found];
            const [low, high] = [data[2 + 3 * i][found], data[3 + 3 * i][found]];
            if (typeof low === "number" && low !== high) more = ` (${number(low)} … ${number(high)})`;
          }
        }
      }
      node.textContent = value === null || value === undefined ? "–" : `${number(value)}${more}`;
    });
  }

  drawBands(u) {
    const { ctx, bbox } = u;
    ctx.save();
    for (const band of this.bands) {
      const mine = this.curves.some((c) => c.component_type === band.component_type && (band.pin_position === "-1" || c.pin_position === band.pin_position));
      if (!mine) continue;
      const left = Math.max(bbox.left, u.valToPos(band.occurred_at / 1e6, "x", true));
      const right = Math.min(bbox.left + bbox.width, u.valToPos((band.cleared_at || Date.now() * 1000) / 1e6, "x", true));
      if (right < bbox.left || left > bbox.left + bbox.width) continue;
      ctx.fillStyle = colour(`--${SEVERITIES.includes(band.severity) ? band.severity : "indeterminate"}`);
      ctx.globalAlpha = 0.14;
      ctx.fillRect(left, bbox.top, Math.max(right - left, 2), bbox.height);
      ctx.globalAlpha = 1;
      ctx.fillRect(left, bbox.top, Math.max(right - left, 2), 3);
    }
    ctx.restore();
  }

  drawBounds(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.lineWidth = 1;
    ctx.setLineDash([6, 5]);
    for (const [value, name] of this.bounds) {
      const y = u.valToPos(value, "y", true);
      if (!(y >= bbox.top && y <= bbox.top + bbox.height)) continue;
      ctx.strokeStyle = colour(name);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
    }
    ctx.restore();
  }

  // Suspect is a triangle, fail a cross.
  drawFlags(u) {
    const { ctx, bbox } = u;
    const size = 5 * devicePixelRatio;
    ctx.save();
    ctx.lineWidth = 2 * devicePixelRatio;
    for (const curve of this.curves) {
      (curve.quality || []).forEach((flag, i) => {
        if ((flag !== SUSPECT && flag !== FAIL) || curve.mean[i] === null) return;
        const [x, y] = [u.valToPos(curve.at[i] / 1e6, "x", true), u.valToPos(curve.mean[i], "y", true)];
        if (x < bbox.left || x > bbox.left + bbox.width) return;
        ctx.strokeStyle = ctx.fillStyle = colour(flag === FAIL ? "--bad" : "--warn");
        ctx.beginPath();
        if (flag === FAIL) {
          ctx.moveTo(x - size, y - size); ctx.lineTo(x + size, y + size);
          ctx.moveTo(x + size, y - size); ctx.lineTo(x - size, y + size);
          ctx.stroke();
        } else {
          ctx.moveTo(x, y - size * 1.2); ctx.lineTo(x + size, y + size * 0.8); ctx.lineTo(x - size, y + size * 0.8);
          ctx.closePath(); ctx.fill();
        }
      });
    }
    ctx.restore();
  }

  destroy() { this.plot.destroy(); }
}
