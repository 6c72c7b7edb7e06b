"use strict";
/* The profile's data: figures from JSON, instructions from packed columns. */

const ENGINE_HUES = {
  tensor: [217, 80], vector: [152, 58], scalar: [28, 84], gpsimd: [271, 62], sync: [215, 12],
  dma: [187, 68],
};
const dark = matchMedia("(prefers-color-scheme: dark)").matches;

function engineColour(engine, shade = 0) {
  const [hue, saturation] = ENGINE_HUES[engine] || [0, 0];
  return `hsl(${hue} ${saturation}% ${(dark ? 58 : 50) + shade}%)`;
}

/** Undo what page.py packed: base64, deflate, byte planes, differences. */
async function unpack(text, index) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const all = new Uint8Array(await new Response(stream).arrayBuffer());
  const columns = {};
  let at = 0;
  for (const [name, count] of index) {
    const column = new Uint32Array(count);
    let sum = 0;
    for (let i = 0; i < count; i++) {
      const step = all[at + i] | (all[at + count + i] << 8) | (all[at + 2 * count + i] << 16) |
        (all[at + 3 * count + i] << 24);
      sum = (sum + step) >>> 0;
      column[i] = sum;
    }
    at += 4 * count;
    columns[name] = column;
  }
  return columns;
}

/** First index from `low` on whose value is greater than `wanted`, in a sorted array. */
function above(values, wanted, low = 0) {
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (values[middle] > wanted) high = middle; else low = middle + 1;
  }
  return low;
}

/** First index from `low` on whose value is at least `wanted`. */
function from(values, wanted, low = 0) {
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (values[middle] >= wanted) high = middle; else low = middle + 1;
  }
  return low;
}

/** Boxes in order of time that do not overlap, with the busy time before each of them. */
class Boxes {
  constructor(events, starts, ends) {
    this.events = events; this.starts = starts; this.ends = ends;
    this.busy = new Float64Array(events.length + 1);
    for (let i = 0; i < events.length; i++) this.busy[i + 1] = this.busy[i] + ends[i] - starts[i];
  }

  /** The boxes whose event is flagged. */
  only(flags) {
    const kept = [];
    for (let i = 0; i < this.events.length; i++) if (flags[this.events[i]]) kept.push(i);
    return new Boxes(Uint32Array.from(kept, (i) => this.events[i]),
      Float64Array.from(kept, (i) => this.starts[i]), Float64Array.from(kept, (i) => this.ends[i]));
  }

  /** Index of the box at time `t`, or within `slack` of it, or -1. */
  at(t, slack) {
    const i = above(this.ends, t);
    if (i < this.events.length && this.starts[i] <= t) return i;
    const after = i < this.events.length ? this.starts[i] - t : Infinity;
    const before = i > 0 ? t - this.ends[i - 1] : Infinity;
    if (Math.min(after, before) > slack) return -1;
    return after < before ? i : i - 1;
  }
}

class Data {
  constructor(meta, columns) {
    this.meta = meta;
    this.c = columns;
    this.count = columns.start.length;
    this.unit = meta.tick_ns / 1000;
    this.end = Math.max(meta.makespan_us, 1e-3);
    this.colours = meta.opcodes.map(([engine], i) => {
      const same = meta.opcodes.slice(0, i).filter(([other]) => other === engine).length;
      return engineColour(engine, [0, 14, -12, 22, -20][same % 5]);
    });
    this.lanes = meta.lanes.map((lane, i) => this.lane(lane, columns["lane" + i]));
    this.path = this.pathBoxes();
    this.waiters = null;
  }

  start(e) { return this.c.start[e] * this.unit; }
  moment(name, e) { return (this.c.start[e] + (this.c[name][e] | 0)) * this.unit; }
  opcode(e) { return this.meta.opcodes[this.c.opcode[e]][1]; }
  engine(e) { return this.meta.opcodes[this.c.opcode[e]][0]; }
  place(e) { return this.meta.places[this.meta.stacks[this.c.stack[e]][0]]; }
  waitedFor(e) { return this.c.back[e] ? e - (this.c.back[e] | 0) : -1; }

  lane(lane, events) {
    const payload = lane.kind === "payload";
    const starts = new Float64Array(events.length), ends = new Float64Array(events.length);
    let last = 0;
    for (let i = 0; i < events.length; i++) {
      const e = events[i];
      starts[i] = Math.max(last, payload ? this.moment("service", e) : this.start(e));
      last = ends[i] = Math.max(starts[i], this.moment(payload ? "service_end" : "issue", e));
    }
    const core = this.meta.lnc > 1 ? `core ${lane.core} · ` : "";
    const name = { engine: lane.name, trigger: `${lane.name} queue`, payload: `DMA ${lane.name}` };
    return { ...lane, title: core + name[lane.kind], boxes: new Boxes(events, starts, ends) };
  }

  pathBoxes() {
    const c = this.c, scale = (column) => Float64Array.from(column, (t) => t * this.unit);
    return new Boxes(c.path_event, scale(c.path_start), scale(c.path_end));
  }

  /** Flags of the events that match words: opcode, engine, place, source text, operands, #number. */
  search(words) {
    const needle = words.trim().toLowerCase();
    const flags = new Uint8Array(this.count);
    if (!needle) return null;
    const hit = (text) => text.toLowerCase().includes(needle);
    const number = /^#(\d+)$/.exec(needle);
    if (number) {
      if (+number[1] < this.count) flags[+number[1]] = 1;
      return flags;
    }
    const opcodes = this.meta.opcodes.map(([engine, name]) => hit(name) || hit(engine));
    const details = this.meta.details.map(hit);
    const places = this.meta.places.map((p) => hit(placeName(p)) || hit(p.text) || hit(p.function));
    const stacks = this.meta.stacks.map((stack) => stack.some((p) => places[p]));
    for (let e = 0; e < this.count; e++) {
      flags[e] = opcodes[this.c.opcode[e]] || details[this.c.detail[e]] || stacks[this.c.stack[e]];
    }
    return flags;
  }

  /** Flags of the events issued at a place or by something it called. */
  atPlace(index) {
    const stacks = this.meta.stacks.map((stack) => stack.includes(index));
    return Uint8Array.from(this.c.stack, (stack) => stacks[stack]);
  }
}

function placeName(place) {
  return place.line ? `${place.file.split(/[\\/]/).pop()}:${place.line}` : "outside a kernel";
}

function time(us) {
  if (Math.abs(us) < 1) return `${(us * 1000).toFixed(us < 0.1 ? 1 : 0)} ns`;
  return us >= 1e4 ? `${(us / 1e3).toFixed(2)} ms` : `${us.toFixed(us < 100 ? 2 : 1)} µs`;
}

function size(bytes) {
  for (const [unit, scale] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (bytes >= scale) return `${(bytes / scale).toFixed(bytes < 10 * scale ? 2 : 1)} ${unit}`;
  }
  return `${bytes} B`;
}
