"use strict";
/* Everything around the canvas, and the wiring. */

const $ = (id) => document.getElementById(id);

/** An element with text and children; text never becomes markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.onclick = value;
    else if (name === "style") element.style.cssText = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const percent = (value) => `${value.toFixed(value < 10 ? 1 : 0)} %`;
const grouped = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 2 });

function figures(meta) {
  const s = meta.summary;
  $("kernel").textContent = `${meta.kernel} on ${meta.target}`;
  $("label").textContent = meta.label;
  $("verdict").textContent = meta.verdict;
  const memory = (name) => meta.memory.filter((m) => m.memory === name);
  const most = (name) => Math.max(0, ...memory(name).map((m) => 100 * m.peak / m.capacity));
  const tiles = [
    [time(s.total_time_us), `total, launch ${time(meta.launch_us)}`],
    [s.limiting_engine, "limiting engine"],
    [percent(s.mfu_estimated_percent), `MFU, ${percent(s.mfu_max_achievable_estimated_percent)} achievable`],
    [percent(s.mbu_estimated_percent), "MBU"],
    [size(s.hbm_read_bytes), "read from HBM"],
    [size(s.hbm_write_bytes), "written to HBM"],
    [percent(most("sbuf")), "of SBUF at its peak"],
    [percent(most("psum")), "of PSUM at its peak"],
    [grouped(s.instructions), "instructions"],
  ];
  $("tiles").append(...tiles.map(([value, name]) =>
    make("div", { class: "tile" }, make("b", {}, value), make("span", {}, name))));
  const shown = (v) => (typeof v === "number" ? grouped(v) : String(v));
  $("figures").append(...Object.entries(s).map(([name, value]) =>
    make("div", {}, make("span", {}, name), make("span", {}, shown(value)))));
  const total = s.total_time_us;
  $("engines").append(...Object.entries(meta.busy_us).map(([name, busy]) => make("div", { class: "engine" },
    make("span", {}, name),
    make("span", { class: "track" },
      make("i", { style: `width:${100 * busy / total}%;background:${engineColour(name)}` })),
    make("span", { class: "value" }, percent(100 * busy / total)))));
}

function advice(meta, act) {
  if (!meta.advice.length) {
    $("advice").append(make("li", { class: "none" }, make("b", {}, "No fault found"),
      make("p", {}, "None of the performance faults this profiler knows.")));
  }
  meta.advice.forEach((item, i) => $("advice").append(make("li", { onclick: () => act(i) },
    make("span", { class: "share" }, `${percent(item.at_stake_percent)} at stake`),
    make("b", {}, item.name), make("p", {}, item.text))));
}

/** The total time, cut into what the critical path spends it on. */
function pathShares(data) {
  const c = data.c, sums = new Map(), total = data.meta.summary.total_time_us;
  const add = (name, colour, us) => {
    const known = sums.get(name) || { colour, us: 0 };
    known.us += us;
    sums.set(name, known);
  };
  const words = { trigger: "triggers", transfer: "latency and payload", bandwidth: "bandwidth", notify: "completion" };
  for (let i = 0; i < c.path_event.length; i++) {
    const e = c.path_event[i], engine = data.engine(e), part = data.meta.parts[c.path_part[i]];
    const us = (c.path_end[i] - c.path_start[i]) * data.unit;
    if (part === "handoff") add("handoffs", engineColour("sync", 10), us);
    else if (engine === "dma") add(`DMA ${words[part]}`, engineColour("dma", { trigger: 18, transfer: 0, bandwidth: -14, notify: 28 }[part]), us);
    else add(engine, engineColour(engine), us);
  }
  const shares = [...sums].sort((a, b) => b[1].us - a[1].us);
  const known = shares.reduce((sum, [, { us }]) => sum + us, 0);
  shares.push(["launch and end", { colour: "var(--line)", us: Math.max(0, total - known) }]);
  $("path").append(
    make("div", { class: "stack" }, ...shares.map(([name, { colour, us }]) =>
      make("i", { style: `width:${100 * us / total}%;background:${colour}`, title: `${name} ${time(us)}` }))),
    make("div", { class: "legend" }, ...shares.map(([name, { colour, us }]) => make("span", {},
      make("i", { style: `background:${colour}` }), `${name} `, make("span", { class: "dim" },
        `${time(us)}, ${percent(100 * us / total)}`)))));
}

/** The lines with the most time on the critical path. */
function hottest(meta, act) {
  const top = meta.lines.filter((line) => line.path_us > 0).slice(0, 6);
  const total = meta.summary.total_time_us;
  $("lines").append(...top.map((line) => make("div", { class: "hot", onclick: () => act(line) },
    make("span", { class: "us" }, time(line.path_us)),
    make("span", { class: "track" }, make("i", { style: `width:${100 * line.path_us / total}%` })),
    make("span", { class: "dim" }, `line ${line.line}`),
    make("span", { class: "mono", title: placeName(line) }, line.text))));
}

/** Log-log roofline as SVG. */
function roofline({ peak_tflops, hbm_gb_s, intensity, tflops, gb_s }) {
  const W = 460, H = 168, left = 46, bottom = 26, ridge = peak_tflops * 1e3 / hbm_gb_s;
  if (!(tflops > 0)) {
    const share = 100 * gb_s / hbm_gb_s;
    $("roofline").append(make("div", { class: "engine" }, make("span", {}, "HBM"),
      make("span", { class: "track" },
        make("i", { style: `width:${share}%;background:${engineColour("dma")}` })),
      make("span", { class: "value" }, percent(share))),
    make("p", { class: "dim" }, `No matmul FLOPs: the only roof is HBM, ${gb_s.toFixed(0)} of ` +
      `${hbm_gb_s.toFixed(0)} GB/s over the total time.`));
    return;
  }
  const low = Math.log10(Math.min(intensity, ridge)) - 1, high = Math.log10(Math.max(intensity, ridge)) + 1;
  const top = Math.log10(peak_tflops) + 0.3;
  const floor = Math.min(Math.log10(tflops) - 0.5, top - 2);
  const x = (v) => left + (Math.log10(v) - low) / (high - low) * (W - left - 8);
  const y = (v) => 8 + (top - Math.log10(v)) / (top - floor) * (H - bottom - 8);
  const roof = (v) => Math.min(peak_tflops, v * hbm_gb_s / 1e3);
  const line = [10 ** low, ridge, 10 ** high].map((v) => `${x(v)},${Math.min(y(roof(v)), 10 * H)}`).join(" ");
  const ticks = [];
  for (let e = Math.ceil(low); e <= high; e++) ticks.push([`<text x="${x(10 ** e)}" y="${H - 8}" text-anchor="middle">${10 ** e}</text>`,
    `<line x1="${x(10 ** e)}" x2="${x(10 ** e)}" y1="8" y2="${H - bottom}"/>`]);
  for (let e = Math.ceil(floor); e <= top; e++) ticks.push([`<text x="${left - 6}" y="${y(10 ** e) + 4}" text-anchor="end">${+(10 ** e).toPrecision(3)}</text>`,
    `<line x1="${left}" x2="${W - 8}" y1="${y(10 ** e)}" y2="${y(10 ** e)}"/>`]);
  const reached = 100 * tflops / roof(intensity);
  $("roofline").innerHTML = `<svg viewBox="0 0 ${W} ${H}" role="img" aria-label="Roofline">
    <defs><clipPath id="area"><rect x="${left}" y="0" width="${W - left}" height="${H - bottom}"/></clipPath></defs>
    <g stroke="var(--line)">${ticks.map((t) => t[1]).join("")}</g>
    <g fill="var(--dim)" font-size="11">${ticks.map((t) => t[0]).join("")}</g>
    <g clip-path="url(#area)"><polyline points="${line}" fill="none" stroke="var(--accent)" stroke-width="2"/>
    <line x1="${x(intensity)}" x2="${x(intensity)}" y1="${y(roof(intensity))}" y2="${y(tflops)}"
      stroke="var(--warn)" stroke-dasharray="3 3"/></g>
    <circle cx="${x(intensity)}" cy="${y(tflops)}" r="5.5" fill="var(--warn)"/></svg>
    <p class="dim">${tflops.toFixed(1)} TFLOP/s at ${intensity.toFixed(0)} FLOPs per HBM byte:
    ${percent(reached)} of the roof there (${roof(intensity).toFixed(1)} TFLOP/s).</p>`;
}

function table(heads, rows) {
  const cells = (tag, row) => row.map((cell, i) =>
    make(tag, heads[i].endsWith("#") ? { class: "num" } : {}, cell));
  const head = heads.map((h) => h.replace("#", ""));
  return make("table", {}, make("thead", {}, make("tr", {}, ...cells("th", head))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row)))));
}

function gaps(data, act) {
  const meta = data.meta, { engine, count, idle_us } = meta.gaps;
  $("gaps-title").textContent = `Idle gaps of ${engine}: ${time(idle_us)} in ${grouped(count)}`;
  $("gaps").append(table(["idle#", "at#", "why", ""], meta.page_gaps.map(([start, end, why, event, other]) => {
    const link = other < 0 ? "" : make("a", { onclick: () => act(start, end, other) },
      `${data.opcode(other)} ${placeName(data.place(other))}`);
    const go = make("a", { onclick: () => act(start, end, event) }, time(end - start));
    return [go, time(start), why, link];
  })));
}

function memory(meta) {
  for (const m of meta.memory) {
    const core = meta.lnc > 1 ? ` of core ${m.core}` : "";
    $("memory").append(make("p", { class: "dim" },
      `${m.memory.toUpperCase()}${core}: ${grouped(m.peak)} of ${grouped(m.capacity)} ${m.unit} at ${time(m.peak_us)}`));
    $("memory").append(table(["tiles#", "each#", "shape", "allocated at"], m.residents.map((r) => [
      grouped(r.tiles), grouped(r.each), `${r.name ? `${r.name} ` : ""}[${r.shape.join(", ")}] ${r.dtype}`,
      placeName(r)])));
  }
}

/** One file with the cost of every line; a click highlights the line's instructions. */
class Source {
  constructor(data, act) {
    this.data = data; this.act = act; this.rows = new Map();
    this.costs = new Map(data.meta.lines.map((line) => [`${line.file}:${line.line}`, line]));
    this.places = new Map(data.meta.places.map((p, i) => [`${p.file}:${p.line}`, i]));
    data.meta.sources.forEach((source, i) => {
      const name = source.file.split(/[\\/]/).pop() || "outside a kernel";
      $("files").append(make("button", { title: source.file, onclick: () => this.open(i) }, name));
    });
    const hottest = data.meta.lines.find((line) => line.instructions);
    if (hottest) this.show(this.places.get(`${hottest.file}:${hottest.line}`), false);
  }

  open(index) {
    if (this.current === index) return;
    this.current = index;
    [...$("files").children].forEach((b, i) => b.classList.toggle("on", i === index));
    const { file, rows } = this.data.meta.sources[index];
    const most = Math.max(1e-9, ...this.data.meta.lines.map((line) => line.path_us));
    const parts = [make("div", { class: "row head" }, ...["path", "engine", "bytes", "count", "", "line"]
      .map((text) => make("span", {}, text)))];
    let last = rows.length ? rows[0][0] - 1 : 0;
    this.rows.clear();
    for (const [number, text] of rows) {
      if (number !== last + 1) parts.push(make("div", { class: "row cut" }, "⋯"));
      last = number;
      parts.push(this.row(file, number, text, most));
    }
    $("source").replaceChildren(...parts);
  }

  row(file, number, text, most) {
    const cost = this.costs.get(`${file}:${number}`), place = this.places.get(`${file}:${number}`);
    const spans = (values) => values.map((v) => make("span", {}, v));
    if (!cost) {
      return make("div", { class: "row" }, ...spans(["", "", "", ""]),
        make("span", { class: "no" }, number), make("span", {}, text));
    }
    const own = cost.instructions > 0;
    const heat = Math.sqrt(cost.path_us / most);
    const row = make("div", { class: "row cost", onclick: () => this.act(place),
      style: `background:rgba(var(--hot),${(0.32 * heat).toFixed(3)})`,
      title: `${time(cost.path_us)} on the critical path; with what it calls ${time(cost.total_us)} of engine time` },
    ...spans([own ? time(cost.path_us) : "", own ? time(cost.self_us) : `(${time(cost.total_us)})`,
      cost.bytes ? size(cost.bytes) : "", own ? grouped(cost.instructions) : ""]),
    make("span", { class: "no" }, number), make("span", {}, text));
    this.rows.set(place, row);
    return row;
  }

  show(place, marked = true) {
    const file = this.data.meta.places[place].file;
    const index = this.data.meta.sources.findIndex((source) => source.file === file);
    if (index < 0) return;
    this.open(index);
    for (const row of this.rows.values()) row.classList.remove("on");
    const row = this.rows.get(place), box = $("source");
    if (!row) return;
    if (marked) row.classList.add("on");
    box.scrollTop = row.offsetTop - box.clientHeight / 2;
  }
}

class Page {
  constructor(data) {
    this.data = data;
    this.matches = [];
    figures(data.meta);
    advice(data.meta, (i) => this.follow(i));
    pathShares(data);
    roofline(data.meta.roofline);
    gaps(data, (start, end, event) => this.visit(start, end, event));
    memory(data.meta);
    this.timeline = new Timeline(data, $("canvas"), $("overview"),
      { hover: (found, e) => this.hover(found, e), select: (event) => this.select(event) });
    hottest(data.meta, (line) => {
      const place = this.source.places.get(`${line.file}:${line.line}`);
      this.mark(data.atPlace(place), place);
    });
    this.source = new Source(data, (place) => this.mark(data.atPlace(place), place));
    this.timeline.fit();
    this.controls();
  }

  controls() {
    const timeline = this.timeline;
    $("in").onclick = () => timeline.zoom(0.5);
    $("out").onclick = () => timeline.zoom(2);
    $("fit").onclick = () => timeline.fit();
    $("next").onclick = () => this.step(1);
    $("previous").onclick = () => this.step(-1);
    $("search").oninput = () => this.mark(this.data.search($("search").value));
    $("search").onkeydown = (e) => { if (e.key === "Enter") this.step(e.shiftKey ? -1 : 1); };
    const keys = {
      w: () => timeline.zoom(0.6), s: () => timeline.zoom(1 / 0.6), f: () => timeline.fit(),
      a: () => timeline.pan(-0.15 * timeline.width), d: () => timeline.pan(0.15 * timeline.width),
      "/": () => $("search").focus(), Escape: () => this.clear(),
    };
    addEventListener("keydown", (e) => {
      const typing = e.target === $("search") && e.key !== "Escape";
      if (typing || e.ctrlKey || e.metaKey || e.altKey || !keys[e.key]) return;
      e.preventDefault();
      keys[e.key]();
    });
  }

  clear() {
    $("search").value = "";
    this.mark(null);
    this.select(-1);
  }

  mark(flags, place = -1) {
    this.timeline.highlight(flags);
    this.matches = [];
    if (flags) for (let e = 0; e < flags.length; e++) if (flags[e]) this.matches.push(e);
    this.matches.sort((a, b) => this.data.c.start[a] - this.data.c.start[b]);
    this.position = -1;
    if (place >= 0) {
      $("search").value = placeName(this.data.meta.places[place]);
      this.source.show(place);
    }
    $("matches").textContent = flags ? `${grouped(this.matches.length)} instructions` : "";
  }

  step(by) {
    if (!this.matches.length) return;
    const n = this.matches.length;
    this.position = this.position < 0 && by < 0 ? n - 1 : (this.position + by + n) % n;
    this.select(this.matches[this.position]);
    this.timeline.reveal(this.matches[this.position]);
    $("matches").textContent = `${grouped(this.position + 1)} of ${grouped(n)}`;
  }

  follow(i) {
    const [place] = this.data.meta.advice_places[i], [event] = this.data.meta.advice_events[i];
    if (place !== undefined) this.mark(this.data.atPlace(place), place);
    if (event !== undefined) { this.select(event); this.timeline.reveal(event); }
    $("stage").scrollIntoView({ block: "nearest" });
  }

  visit(start, end, event) {
    const room = Math.max(end - start, 40 * this.data.unit);
    this.timeline.show(start - room, end + room);
    if (event >= 0) this.select(event);
    $("stage").scrollIntoView({ block: "nearest" });
  }

  select(event) {
    const d = this.data, box = $("details");
    this.timeline.select(event);
    if (event < 0) {
      box.replaceChildren(make("span", { class: "dim" }, "Click an instruction to see what it waited for."));
      return;
    }
    const place = d.place(event), other = d.waitedFor(event);
    const stack = d.meta.stacks[d.c.stack[event]];
    const link = other < 0 ? "" : make("a", { onclick: () => { this.select(other); this.timeline.reveal(other); } },
      `${d.opcode(other)} #${other} (${placeName(d.place(other))})`);
    const dma = d.engine(event) === "dma";
    const rows = [
      make("div", {}, make("b", {}, `${d.opcode(event)} #${event}`), ` on ${d.engine(event)}`,
        d.c.bytes[event] ? `, ${size(d.c.bytes[event])}` : ""),
      make("div", {}, make("span", { class: "dim" }, "starts "), time(d.start(event)), make("span", { class: "dim" },
        dma ? ", payload " : ", takes "), time(dma ? d.moment("service_end", event) - d.moment("service", event)
        : d.moment("issue", event) - d.start(event)), make("span", { class: "dim" }, ", result at "), time(d.moment("result", event))),
      make("div", {}, make("span", { class: "dim" }, `${d.meta.causes[d.c.cause[event]]} `), link),
      make("div", {}, make("a", { onclick: () => this.source.show(stack[0]) }, placeName(place)),
        make("span", { class: "dim" }, stack.length > 1 ? ` called from ${stack.slice(1).map((p) => placeName(d.meta.places[p])).join(", ")}` : "")),
      make("div", { class: "mono" }, d.meta.details[d.c.detail[event]]),
      make("div", { class: "mono" }, place.text),
    ];
    box.replaceChildren(...rows);
    this.source.show(stack[0]);
  }

  hover(found, e) {
    const tip = $("tip"), d = this.data;
    tip.hidden = !found;
    if (!found) return;
    if (found.row.curve) {
      const { times, used, unit, capacity } = found.row.curve;
      const i = above(times, found.t) - 1;
      tip.replaceChildren(make("b", {}, `${grouped(i < 0 ? 0 : used[i])} of ${grouped(capacity)} ${unit}`), ` at ${time(found.t)}`);
    } else {
      const { event, box, row } = found, boxes = row.boxes;
      const part = row.kind === "path" ? ` (${d.meta.parts[d.c.path_part[box]]})` : "";
      tip.replaceChildren(make("b", {}, `${d.opcode(event)} #${event}${part}`),
        ` ${time(boxes.ends[box] - boxes.starts[box])} from ${time(boxes.starts[box])}`, make("br"),
        make("span", { class: "mono" }, d.meta.details[d.c.detail[event]]), make("br"),
        make("span", { class: "dim" }, `${placeName(d.place(event))}  ${d.place(event).text}`));
    }
    const stage = $("stage").getBoundingClientRect();
    const x = e.clientX - stage.left, y = e.clientY - stage.top;
    tip.style.left = `${Math.min(x + 14, stage.width - tip.offsetWidth - 4)}px`;
    tip.style.top = `${y + 16}px`;
  }
}

(async () => {
  const meta = JSON.parse($("meta").textContent);
  const columns = await unpack($("columns").textContent, meta.columns);
  window.profilePage = new Page(new Data(meta, columns));
  requestAnimationFrame(() => requestAnimationFrame(() => {
    document.documentElement.dataset.readyMs = performance.now().toFixed(0);
  }));
})().catch((error) => {
  document.documentElement.dataset.error = String(error);
  $("verdict").textContent = `This page cannot be shown by this browser: ${error}`;
});
