"use strict";
/* The canvas: lanes, memory curves, axis. What is drawn per frame depends on the pixels, not on the
   number of instructions: boxes narrower than a pixel are drawn column by column, as tall as the
   column is busy, and found by bisection. */

const GUTTER = 118, AXIS = 22, PAD = 5;
const HEIGHTS = { path: 16, engine: 24, trigger: 11, payload: 15, curve: 46 };

class Timeline {
  constructor(data, canvas, overview, hooks) {
    this.data = data; this.canvas = canvas; this.overview = overview; this.hooks = hooks;
    this.t0 = 0; this.t1 = data.end; this.selected = -1; this.flags = null; this.frames = 0;
    this.rows = this.layout();
    this.height = this.rows.reduce((sum, row) => sum + row.height + PAD, AXIS);
    this.theme = {};
    for (const name of ["ink", "dim", "line", "soft", "card", "accent", "warn", "track"]) {
      this.theme[name] = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
    }
    this.listen();
    this.resize();
  }

  layout() {
    const rows = [{ kind: "path", title: "critical path", boxes: this.data.path }];
    for (const lane of this.data.lanes) rows.push(lane);
    for (const curve of this.data.meta.curves) {
      const core = this.data.meta.lnc > 1 ? `core ${curve.core} · ` : "";
      rows.push({ kind: "curve", title: core + curve.memory.toUpperCase(), curve });
    }
    const payloads = this.data.lanes.filter((lane) => lane.kind === "payload").length;
    let y = AXIS;
    return rows.map((row) => {
      const height = row.kind === "payload" && payloads > 4 ? 6 : HEIGHTS[row.kind];
      const placed = { ...row, y, height };
      y += height + PAD;
      return placed;
    });
  }

  get width() { return this.canvas.clientWidth - GUTTER; }
  x(t) { return GUTTER + (t - this.t0) / (this.t1 - this.t0) * this.width; }
  t(x) { return this.t0 + (x - GUTTER) / this.width * (this.t1 - this.t0); }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    this.canvas.style.height = `${this.height}px`;
    for (const [canvas, height] of [[this.canvas, this.height], [this.overview, 34]]) {
      canvas.width = Math.round(canvas.clientWidth * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    }
    this.drawn = null;
    this.strips = null;
    this.redraw();
  }

  show(t0, t1) {
    const least = Math.min(this.data.end, 20 * this.data.unit);
    const span = Math.min(Math.max(t1 - t0, least), this.data.end * 1.02);
    const slack = 0.01 * this.data.end;
    this.t0 = Math.min(Math.max((t0 + t1 - span) / 2, -slack), this.data.end + slack - span);
    this.t1 = this.t0 + span;
    this.redraw();
  }

  fit() { this.show(-0.005 * this.data.end, this.data.end * 1.005); }

  zoom(factor, x = GUTTER + this.width / 2) {
    const t = this.t(x);
    this.show(t - (t - this.t0) * factor, t + (this.t1 - t) * factor);
  }

  pan(pixels) {
    const move = pixels / this.width * (this.t1 - this.t0);
    this.show(this.t0 + move, this.t1 + move);
  }

  /** Bring an event into view, with room around it. */
  reveal(event) {
    const d = this.data, end = d.moment("result", event), start = d.start(event);
    const span = Math.max(40 * (d.moment("issue", event) - start), end - start, 200 * d.unit) * 1.5;
    if (start < this.t0 || end > this.t1 || this.t1 - this.t0 > 4 * span) {
      this.show((start + end - span) / 2, (start + end + span) / 2);
    }
  }

  select(event) { this.selected = event; this.redraw(); }

  highlight(flags) {
    this.flags = flags;
    for (const row of this.rows) if (row.boxes) row.marked = flags ? row.boxes.only(flags) : null;
    this.redraw();
  }

  redraw() {
    if (this.drawn) return;
    this.drawn = requestAnimationFrame(() => { this.drawn = null; this.draw(); });
  }

  draw() {
    const began = performance.now(), g = this.canvas.getContext("2d");
    g.clearRect(0, 0, this.canvas.clientWidth, this.height);
    this.axis(g);
    for (const row of this.rows) {
      this.title(g, row);
      g.save();
      g.beginPath();
      g.rect(GUTTER, row.y, this.width, row.height);
      g.clip();
      g.fillStyle = this.theme.track;
      g.globalAlpha = 0.55;
      g.fillRect(GUTTER, row.y, this.width, row.height);
      g.globalAlpha = 1;
      if (row.curve) this.curve(g, row);
      else {
        g.globalAlpha = row.marked ? 0.16 : 1;
        this.boxes(g, row, row.boxes, !row.marked);
        g.globalAlpha = 1;
        if (row.marked) this.boxes(g, row, row.marked, true);
      }
      g.restore();
    }
    this.mark(g);
    this.drawOverview();
    this.frames += 1;
    this.drawMs = performance.now() - began;
  }

  title(g, row) {
    g.font = `${row.height < 14 ? 10 : 12}px system-ui, "DejaVu Sans", sans-serif`;
    g.textBaseline = "middle";
    g.textAlign = "right";
    g.fillStyle = row.height < 8 ? "transparent" : row.kind === "engine" ? this.theme.ink : this.theme.dim;
    g.fillText(row.title, GUTTER - 8, row.y + row.height / 2 + 0.5);
  }

  boxes(g, row, boxes, labels) {
    const { starts, ends, events, busy } = boxes, d = this.data;
    const px = (this.t1 - this.t0) / this.width, n = events.length, alpha = g.globalAlpha;
    let i = above(ends, this.t0);
    g.font = "11px system-ui, \"DejaVu Sans\", sans-serif";
    g.textAlign = "left";
    while (i < n && starts[i] < this.t1) {
      const x = this.x(starts[i]), w = (ends[i] - starts[i]) / px;
      g.fillStyle = d.colours[d.c.opcode[events[i]]];
      if (w >= 1.5) {
        g.fillRect(x, row.y, Math.max(w - (w > 4 ? 1 : 0), 1), row.height);
        if (labels && w > 46 && row.height > 12) this.boxLabel(g, row, events[i], x, w);
        i += 1;
        continue;
      }
      // Everything that starts in this column of pixels, as tall as the column is busy.
      const column = Math.floor(x), next = this.t(column + 1);
      const j = Math.max(i + 1, from(starts, next, i + 1));
      const share = Math.min(1, (busy[j] - busy[i]) / px);
      g.globalAlpha = alpha * (0.35 + 0.65 * share);
      const h = Math.max(2, row.height * Math.sqrt(share));
      // One colour for a mixture, or the choice of the first would draw stripes.
      if (j - i > 1 && row.kind === "engine") g.fillStyle = engineColour(row.name.split(" ")[0]);
      g.fillRect(column, row.y + row.height - h, 1, h);
      g.globalAlpha = alpha;
      i = j;
    }
  }

  boxLabel(g, row, event, x, w) {
    const left = Math.max(x, GUTTER), room = x + w - left - 8;
    if (room < 40) return;
    g.save();
    g.beginPath();
    g.rect(left, row.y, room + 6, row.height);
    g.clip();
    g.fillStyle = "#fff";
    g.fillText(this.data.opcode(event), left + 5, row.y + row.height / 2 + 0.5);
    g.restore();
  }

  curve(g, row) {
    const { times, used, capacity } = row.curve;
    const scale = (row.height - 4) / Math.max(capacity, 1);
    const bottom = row.y + row.height;
    g.beginPath();
    g.moveTo(GUTTER, bottom);
    let i = Math.max(0, above(times, this.t0) - 1);
    for (let column = GUTTER; column < GUTTER + this.width; column++) {
      const t = this.t(column), next = this.t(column + 1);
      if (t > this.data.end) { g.lineTo(column, bottom); break; }
      let most = times.length && times[i] <= next ? used[i] : 0;
      while (i + 1 < times.length && times[i + 1] <= next) most = Math.max(most, used[++i]);
      g.lineTo(column, bottom - most * scale);
    }
    g.lineTo(GUTTER + this.width, bottom);
    g.closePath();
    g.fillStyle = this.theme.accent;
    g.globalAlpha = 0.3;
    g.fill();
    g.globalAlpha = 1;
    g.strokeStyle = this.theme.accent;
    g.lineWidth = 1;
    g.stroke();
    g.strokeStyle = this.theme.warn;
    g.setLineDash([4, 4]);
    g.beginPath();
    g.moveTo(GUTTER, row.y + 3.5);
    g.lineTo(GUTTER + this.width, row.y + 3.5);
    g.stroke();
    g.setLineDash([]);
  }

  axis(g) {
    const span = this.t1 - this.t0, rough = span / Math.max(2, this.width / 110);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    g.font = "11px system-ui, \"DejaVu Sans\", sans-serif";
    g.textBaseline = "middle";
    g.textAlign = "center";
    const [unit, scale] = step >= 1000 ? ["ms", 1000] : ["µs", 1];
    const digits = Math.max(0, -Math.floor(Math.log10(step / scale)));
    for (let t = Math.ceil(this.t0 / step) * step; t <= this.t1; t += step) {
      const x = Math.round(this.x(t)) + 0.5;
      g.fillStyle = this.theme.line;
      g.fillRect(x, AXIS - 6, 1, this.height);
      g.fillStyle = this.theme.dim;
      g.fillText(`${(t / scale).toFixed(digits)} ${unit}`, x, 8);
    }
  }

  /** Outline the selected instruction and point at it from what it waited for. */
  mark(g) {
    if (this.selected < 0) return;
    const spot = (event) => {
      for (const row of this.rows) {
        if (!row.boxes || row.kind === "path") continue;
        const i = row.boxes.events.indexOf(event);
        if (i >= 0) return { row, x0: this.x(row.boxes.starts[i]), x1: this.x(row.boxes.ends[i]) };
      }
      return null;
    };
    g.save();
    g.beginPath();
    g.rect(GUTTER, 0, this.width, this.height);
    g.clip();
    g.strokeStyle = this.theme.ink;
    g.lineWidth = 2;
    for (const row of this.rows) {
      if (!row.boxes) continue;
      const i = row.boxes.events.indexOf(this.selected);
      if (i < 0 || row.kind === "path") continue;
      const x = this.x(row.boxes.starts[i]);
      g.strokeRect(x - 1, row.y - 1, Math.max(this.x(row.boxes.ends[i]) - x, 2) + 1, row.height + 2);
    }
    const waited = this.data.waitedFor(this.selected);
    const source = waited < 0 ? null : spot(waited), target = spot(this.selected);
    if (source && target) {
      const y0 = source.row.y + source.row.height / 2, y1 = target.row.y + target.row.height / 2;
      const bend = Math.max(24, Math.abs(target.x0 - source.x1) / 2);
      g.strokeStyle = this.theme.warn;
      g.beginPath();
      g.moveTo(source.x1, y0);
      g.bezierCurveTo(source.x1 + bend, y0, target.x0 - bend, y1, target.x0 - 3, y1);
      g.stroke();
      g.fillStyle = this.theme.warn;
      g.beginPath();
      g.moveTo(target.x0, y1);
      g.lineTo(target.x0 - 8, y1 - 4);
      g.lineTo(target.x0 - 8, y1 + 4);
      g.fill();
    }
    g.restore();
  }

  /** The whole run in small, drawn once. */
  drawStrips() {
    const strips = document.createElement("canvas"), g = strips.getContext("2d");
    const rows = this.rows.filter((row) => row.kind === "engine" || row.kind === "payload");
    const height = 28 / Math.max(rows.length, 1), [t0, t1] = [this.t0, this.t1];
    strips.width = this.overview.width;
    strips.height = this.overview.height;
    g.setTransform(this.overview.getContext("2d").getTransform());
    [this.t0, this.t1] = [0, this.data.end];
    rows.forEach((row, i) => {
      const strip = { ...row, y: 3 + i * height, height: Math.max(1.5, height - 1) };
      this.boxes(g, strip, row.boxes, false);
    });
    [this.t0, this.t1] = [t0, t1];
    return strips;
  }

  drawOverview() {
    const g = this.overview.getContext("2d"), width = this.overview.clientWidth - GUTTER;
    const [t0, t1] = [this.t0, this.t1];
    this.strips = this.strips || this.drawStrips();
    g.clearRect(0, 0, this.overview.clientWidth, 34);
    g.drawImage(this.strips, 0, 0, this.overview.clientWidth, 34);
    const left = GUTTER + Math.max(0, t0 / this.data.end) * width;
    const right = GUTTER + Math.min(1, t1 / this.data.end) * width;
    g.fillStyle = this.theme.ink;
    g.globalAlpha = 0.14;
    g.fillRect(GUTTER, 0, left - GUTTER, 34);
    g.fillRect(right, 0, GUTTER + width - right, 34);
    g.globalAlpha = 1;
    g.strokeStyle = this.theme.accent;
    g.lineWidth = 1.5;
    g.strokeRect(left + 0.5, 1, Math.max(2, right - left - 1), 32);
  }

  /** What is under a point of the canvas: {row, event} or {row, t}. */
  under(x, y) {
    const row = this.rows.find((r) => y >= r.y - 2 && y < r.y + r.height + 3);
    if (!row || x < GUTTER) return null;
    const t = this.t(x);
    if (row.curve) return { row, t };
    const i = row.boxes.at(t, 2 * (this.t1 - this.t0) / this.width);
    return i < 0 ? null : { row, t, event: row.boxes.events[i], box: i };
  }

  listen() {
    const canvas = this.canvas, point = (e) => [e.offsetX, e.offsetY];
    let drag = null;
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      if (Math.abs(e.deltaX) > Math.abs(e.deltaY)) this.pan(e.deltaX);
      else this.zoom(Math.exp(Math.max(-400, Math.min(400, e.deltaY)) * 0.0025), e.offsetX);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (e) => {
      canvas.setPointerCapture(e.pointerId);
      drag = { x: e.offsetX, from: e.offsetX, moved: false, range: e.shiftKey };
    });
    canvas.addEventListener("pointermove", (e) => {
      if (drag) {
        drag.moved = drag.moved || Math.abs(e.offsetX - drag.from) > 3;
        if (drag.moved && !drag.range) {
          canvas.classList.add("panning");
          this.pan(drag.x - e.offsetX);
          drag.x = e.offsetX;
        }
      }
      this.hooks.hover(drag && drag.moved ? null : this.under(...point(e)), e);
    });
    canvas.addEventListener("pointerup", (e) => {
      canvas.classList.remove("panning");
      if (drag && drag.moved && drag.range) {
        const [low, high] = [this.t(drag.from), this.t(e.offsetX)].sort((a, b) => a - b);
        this.show(low, high);
      } else if (drag && !drag.moved) {
        const found = this.under(...point(e));
        this.hooks.select(found && found.event !== undefined ? found.event : -1);
      }
      drag = null;
    });
    canvas.addEventListener("pointerleave", (e) => this.hooks.hover(null, e));
    canvas.addEventListener("dblclick", (e) => {
      const found = this.under(...point(e));
      if (found && found.event !== undefined) this.reveal(found.event); else this.fit();
    });
    const jump = (e) => {
      if (!(e.buttons & 1)) return;
      const middle = (e.offsetX - GUTTER) / (this.overview.clientWidth - GUTTER) * this.data.end;
      const half = (this.t1 - this.t0) / 2;
      this.show(middle - half, middle + half);
    };
    this.overview.addEventListener("pointerdown", jump);
    this.overview.addEventListener("pointermove", jump);
    window.addEventListener("resize", () => this.resize());
  }
}
