// The patch explorer: one example at every token and layer. No dependencies, no request to anywhere.
// `mount(el, data, options)` for pages; `export default { render }` for anywidget. Data: explorer/exploration.py.

const KINDS = { image: "image", question: "question", system: "system", separator: "separator", answer_prompt: "answer prompt", other: "" };
const NOTHING = -32768;
const TYPES = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int16: Int16Array };
const MOST_LISTED = 6; // tokens in a list of attention
const WIDEST = 460; // pixels of a picture on the page
const KEY = "explore="; // before the view in the address

const STYLE = `
.vx { --ground:#fff; --raised:#f3f4f6; --text:#1b1d21; --soft:#555b63; --line:#c9cdd3; --mark:#0057a3;
  container-type:inline-size; background:var(--ground); color:var(--text); padding:12px;
  font:15px/1.45 system-ui,"Segoe UI",Helvetica,Arial,sans-serif; color-scheme:light; overflow-wrap:anywhere; }
@media (prefers-color-scheme:dark) { .vx { --ground:#15171a; --raised:#20242a; --text:#e7e8ea; --soft:#a9afb8;
  --line:#424852; --mark:#7cc4ff; color-scheme:dark; } }
.vx * { box-sizing:border-box; }
.vx :focus-visible { outline:3px solid var(--mark); outline-offset:2px; }
.vx p { margin:0 0 6px; }
.vx .headline { font-size:1.2rem; line-height:1.3; font-weight:600; }
.vx .soft { color:var(--soft); font-size:.86rem; }
.vx details { margin:6px 0 10px; }
.vx summary { cursor:pointer; }
.vx details ul { margin:6px 0; padding-left:1.2rem; max-width:62rem; }
.vx .controls { display:flex; flex-wrap:wrap; gap:8px 18px; align-items:end; padding:8px 10px; margin:8px 0 14px;
  background:var(--raised); border-radius:6px; }
.vx .controls label { display:grid; gap:2px; font-size:.86rem; color:var(--soft); max-width:100%; }
.vx select, .vx button, .vx input { font:inherit; color:var(--text); max-width:100%; }
.vx select { background:var(--ground); border:1px solid var(--soft); border-radius:4px; padding:3px 4px; }
.vx input[type=range] { width:190px; height:26px; margin:0; accent-color:var(--mark); }
.vx .panes { display:grid; gap:26px; }
.vx .panes.two { gap:18px 34px; }
.vx .pane { min-width:0; container-type:inline-size; }
.vx .body { display:grid; gap:16px 28px; grid-template:"shown" "told" "rest" / minmax(0,1fr); }
.vx .shown { grid-area:shown; }
.vx .panel { grid-area:told; }
.vx .rest { grid-area:rest; }
.vx .body > * { min-width:0; }
.vx .stages { display:grid; gap:14px 18px; align-items:start; }
.vx .stages.beside { grid-template-columns:minmax(0,max-content) minmax(0,max-content); row-gap:0; }
.vx .stages.beside figure { display:grid; grid-row:span 3; grid-template-rows:subgrid; align-items:end; }
.vx figure { margin:0; min-width:0; }
.vx figcaption { color:var(--soft); font-size:.86rem; margin-bottom:4px; }
.vx canvas { display:block; max-width:none; }
.vx .stage, .vx .map { cursor:crosshair; touch-action:manipulation; }
.vx .bar { display:grid; grid-template-columns:auto minmax(60px,1fr) auto; gap:6px; align-items:center; margin-top:6px;
  font-size:.8rem; color:var(--soft); max-width:460px; font-variant-numeric:tabular-nums; }
.vx .bar canvas { width:100%; height:12px; border:1px solid var(--line); }
.vx .bar .unit { grid-column:1 / -1; }
.vx .tokens { display:flex; flex-wrap:wrap; gap:4px; margin:4px 0 12px; max-height:170px; overflow:auto; padding:3px; }
.vx .token { border:1px solid var(--line); border-radius:4px; background:var(--ground); padding:1px 6px 3px; cursor:pointer;
  display:grid; gap:2px; white-space:pre; max-width:100%; overflow:hidden; }
.vx .token i { height:5px; border:1px solid var(--line); display:block; min-width:14px; }
.vx .token[aria-selected=true] { outline:3px solid var(--text); outline-offset:-1px; }
.vx .token.seen { outline:2px dashed var(--text); outline-offset:-1px; }
.vx .region { overflow:auto; max-width:100%; }
.vx .rows { max-height:340px; border:1px solid var(--line); border-radius:4px; }
.vx .title { font-weight:600; font-size:1.02rem; }
.vx .here { margin:6px 0; padding:8px 10px; border:1px solid var(--line); border-radius:6px; display:grid; gap:3px; }
.vx .here b { font-weight:600; }
.vx table { border-collapse:collapse; width:100%; font-size:.84rem; font-variant-numeric:tabular-nums; }
.vx th, .vx td { padding:2px 7px; text-align:left; vertical-align:top; }
.vx th { position:sticky; top:0; background:var(--ground); color:var(--soft); font-weight:500; border-bottom:1px solid var(--line); }
.vx td.n, .vx th.n { text-align:right; }
.vx td.n, .vx th, .vx td:first-child { white-space:nowrap; }
.vx tbody tr { cursor:pointer; }
.vx tbody tr:nth-child(even) { background:var(--raised); }
.vx tbody tr.now { outline:2px solid var(--text); outline-offset:-2px; }
.vx .looks { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,210px),1fr)); gap:8px 18px; margin-top:10px; }
.vx .looks ol { list-style:none; margin:2px 0 0; padding:0; font-size:.86rem; }
.vx .looks button { display:grid; grid-template-columns:1fr auto; gap:8px; width:100%; text-align:left; border:0;
  border-radius:3px; background:none; padding:2px 4px; cursor:pointer; }
.vx .looks button:hover { background:var(--raised); }
.vx .looks button span:first-child { overflow:hidden; text-overflow:ellipsis; white-space:nowrap; }
.vx .others { display:flex; gap:8px; align-items:center; margin:6px 0; }
.vx .others img { width:64px; height:auto; border:1px solid var(--line); }
.vx .quiet { position:absolute; width:1px; height:1px; overflow:hidden; clip-path:inset(50%); white-space:nowrap; }
.vx a { color:var(--mark); }
@container (min-width:900px) { .vx .panes.two { grid-template-columns:minmax(0,1fr) minmax(0,1fr); } }
@container (min-width:860px) {
  .vx .body { grid-template:"shown told" auto "rest told" 1fr / minmax(0,3fr) minmax(330px,2fr); }
}
`;

// Small helpers

function make(tag, attributes = {}, ...inside) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) found.setAttribute(name, value);
  }
  found.append(...inside.filter((each) => each !== null && each !== undefined));
  return found;
}

function signed(value, digits = 2) {
  if (Number.isNaN(value)) return "–";
  const size = Math.abs(value).toFixed(digits);
  return Number(size) === 0 ? size : (value < 0 ? "−" : "+") + size;
}
const plain = (value, digits = 2) => (Number.isNaN(value) ? "–" : value.toFixed(digits).replace("-", "−"));
const share = (value) => (value > 0 && value < 0.005 ? "<0.01" : plain(value));
const quoted = (text) => `“${text}”`;
const inFrame = (value, low, high) => Math.min(high, Math.max(low, value));

// The data

async function unpacked(packed) {
  if (packed.format !== "vlm_mech.exploration" || packed.version !== 1)
    throw new Error(`this explorer reads version 1 of vlm_mech.exploration, not ${packed.format} ${packed.version}`);
  const signs = atob(packed.data), bytes = new Uint8Array(signs.length);
  for (let at = 0; at < signs.length; at++) bytes[at] = signs.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const block = await new Response(stream).arrayBuffer();
  const arrays = {};
  for (const [name, each] of Object.entries(packed.arrays)) {
    const size = each.shape.reduce((all, n) => all * n, 1);
    arrays[name] = { ...each, stored: new TYPES[each.dtype](block, each.offset, size) };
  }
  return new Example(packed, arrays);
}

class Example {
  constructor(about, arrays) {
    this.about = about;
    this.arrays = arrays;
    this.n = about.tokens.length;
    this.layers = about.model.n_layers;
    this.places = this.layers + 1;
    this.heads = arrays.attention ? arrays.attention.shape[1] : 1;
    this.views = [];
    this.patch = new Map(); // of a token: the views and cells that show it
    about.images.forEach((image, at) => image.views.forEach((view) => {
      const number = this.views.length;
      this.views.push({ ...view, image, name: about.images.length > 1 ? `picture ${at + 1}: ${view.name}` : view.name });
      view.tokens.forEach((token, cell) => {
        if (!this.patch.has(token)) this.patch.set(token, []);
        this.patch.get(token).push([number, cell]);
      });
    }));
  }

  // A number of an array, NaN where nothing was measured or this example has no such array.
  value(name, ...at) {
    const held = this.arrays[name];
    if (!held) return NaN;
    let index = 0;
    at.forEach((each, axis) => { index = index * held.shape[axis] + each; });
    const stored = held.stored[index];
    if (held.dtype === "int16" && stored === NOTHING) return NaN;
    const value = stored * held.scale;
    return held.power === 2 ? value * value : value;
  }

  words(place, token) {
    const held = this.arrays.lens_words;
    if (!held) return [];
    const best = held.shape[2];
    return Array.from({ length: best }, (_, k) => [
      this.about.words[held.stored[(place * this.n + token) * best + k]], this.value("lens_shares", place, token, k)]);
  }

  // Attention at a layer from a token to another; head -1 is the mean. NaN where only larger weights were kept.
  attention(layer, head, query, key) {
    if (this.arrays.attention) {
      if (head >= 0 && this.heads > 1) return this.value("attention", layer, head, query, key);
      let sum = 0;
      for (let each = 0; each < this.heads; each++) sum += this.value("attention", layer, each, query, key);
      return sum / this.heads;
    }
    if (!this.arrays.attention_last) return NaN;
    if (query === this.n - 1) return this.value("attention_last", layer, key);
    return this.kept("looks_at", layer, query).get(key) ?? this.kept("seen_by", layer, key).get(query) ?? (key > query ? 0 : NaN);
  }

  kept(name, layer, token) {
    const best = this.arrays[name].shape[2], found = new Map();
    for (let k = 0; k < best; k++) {
      const weight = this.value(`${name}_weights`, layer, token, k);
      if (weight > 0) found.set(this.arrays[name].stored[(layer * this.n + token) * best + k], weight);
    }
    return found;
  }

  // The tokens of the largest attention from (or to) a token: [token, weight], largest first.
  most(direction, layer, head, token) {
    let found;
    if (this.arrays.attention) {
      found = Array.from({ length: this.n }, (_, other) =>
        [other, direction === "from" ? this.attention(layer, head, token, other) : this.attention(layer, head, other, token)]);
    } else if (this.arrays.looks_at) found = [...this.kept(direction === "from" ? "looks_at" : "seen_by", layer, token)];
    else return [];
    return found.filter(([, weight]) => weight > 0).sort((one, other) => other[1] - one[1]).slice(0, MOST_LISTED);
  }

  name(token) {
    const found = this.patch.get(token);
    if (!found) return `${quoted(this.about.tokens[token])}`;
    const [number, cell] = found[0], columns = this.views[number].grid[1];
    const where = this.views.length > 1 ? `, ${this.views[number].name}` : "";
    return `patch row ${Math.floor(cell / columns)}, column ${cell % columns}${where}`;
  }

  sink(token) {
    const mark = this.arrays.sinks?.stored[token] ?? 0;
    return ["", "a sink of the decoder by its state", "a sink of the vision tower by its state", "a sink by its state, in decoder and tower"][mark];
  }
}

// What maps can show

function measures(example) {
  const { unit, short: said } = example.about.measure, prob = "probability", weight = "attention weight";
  const last = example.n - 1;
  const found = [
    { id: "swap", label: "effect of swapping its state", unit: `change of ${said} (${unit})`, signed: true,
      at: (place, token) => example.value("swap", place, token) },
    { id: "cut", label: "effect of cutting last ← this", unit: `change of ${said} (${unit})`, signed: true, blocks: true,
      at: (place, token) => example.value("cut", place - 1, token) },
    { id: "last", label: "attention from the last token", unit: weight, blocks: true, heads: true,
      at: (place, token, state) => example.attention(place - 1, state.head, last, token) },
    { id: "from", label: "attention from the chosen token", unit: weight, blocks: true, heads: true, own: true,
      at: (place, token, state) => example.attention(place - 1, state.head, state.token, token) },
    { id: "to", label: "attention to the chosen token", unit: weight, blocks: true, heads: true, own: true,
      at: (place, token, state) => example.attention(place - 1, state.head, token, state.token) },
    { id: "lens", label: "likeliest word of the lens", unit: prob, words: true,
      at: (place, token) => example.value("lens_shares", place, token, 0) },
    { id: "probe", label: "what the probe says", unit: prob, at: (place, token) => example.value("probe", place, token) },
  ];
  const needs = { swap: "swap", cut: "cut", lens: "lens_words", probe: "probe" };
  const looks = example.arrays.attention || example.arrays.attention_last;
  return found.filter(({ id }) => (needs[id] ? example.arrays[needs[id]] : looks));
}

// Colours: blue and orange are told apart by colour-blind readers; the middle is the colour of the page.

const dark = matchMedia("(prefers-color-scheme: dark)");
const scales = () => (dark.matches
  ? { low: [104, 178, 245], middle: [38, 42, 48], high: [247, 164, 66], none: "#15171a", line: "#8a919c", ink: "#e7e8ea" }
  : { low: [33, 102, 172], middle: [244, 244, 244], high: [179, 88, 6], none: "#ffffff", line: "#8a9099", ink: "#1b1d21" });

function colour(value, most, isSigned, theme) {
  const t = most > 0 ? inFrame(value / most, isSigned ? -1 : 0, 1) : 0;
  const end = isSigned && t < 0 ? theme.low : isSigned ? theme.high : theme.low;
  return theme.middle.map((from, at) => Math.round(from + (end[at] - from) * Math.abs(t)));
}
const css = (rgb) => `rgb(${rgb.join(",")})`;
const inkOn = (rgb) => (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 ? "#000" : "#fff");

function sized(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}

// A frame that is seen on any picture: black around white.
function framed(pen, [left, top, right, bottom], thick = 2, dash = []) {
  for (const [style, width] of [["#000", thick + 2], ["#fff", thick]]) {
    pen.strokeStyle = style;
    pen.lineWidth = width;
    pen.setLineDash(style === "#fff" ? dash : []);
    pen.strokeRect(left, top, Math.max(1, right - left), Math.max(1, bottom - top));
  }
  pen.setLineDash([]);
}

function crossed(pen, [left, top, right, bottom]) {
  const x = (left + right) / 2, y = (top + bottom) / 2, arm = inFrame((right - left) / 4, 2, 7);
  for (const [style, width] of [["#000", 4], ["#fff", 1.6]]) {
    pen.strokeStyle = style;
    pen.lineWidth = width;
    pen.beginPath();
    pen.moveTo(x - arm, y - arm); pen.lineTo(x + arm, y + arm);
    pen.moveTo(x + arm, y - arm); pen.lineTo(x - arm, y + arm);
    pen.stroke();
  }
}

// One example (of one model): picture, heat map, tokens, map of all layers, and what is told of one token.

class Pane {
  constructor(example, explorer, alone) {
    this.example = example;
    this.explorer = explorer;
    this.hover = null;
    this.state = { token: example.n - 1, place: example.places - 1, head: -1, view: 0, measure: "swap" };
    this.measures = measures(example);
    this.element = make("section", { class: "pane", "aria-label": `${example.about.model.name}` });
    if (!alone) this.element.append(...headline(example, "h3"));
    this.build();
  }

  build() {
    const { example } = this, body = make("div", { class: "body" }), shown = make("div", { class: "shown" }), rest = make("div", { class: "rest" });
    this.element.append(body);
    this.picture = new Image();
    this.picture.addEventListener("load", () => this.draw());
    if (example.views.length) shown.append(this.stages());
    else if (example.about.images.length)
      shown.append(make("img", { src: example.about.images[0].source, alt: "The picture of the prompt", style: "max-width:100%" }));
    rest.append(this.chips(), this.overview());
    body.append(shown, this.told(), rest);
  }

  stages() {
    this.photo = make("canvas", { "aria-hidden": "true" });
    this.heat = make("canvas", { "aria-hidden": "true" });
    this.stage = make("div", { class: "stage", tabindex: "0", role: "application", "aria-roledescription": "patch grid",
      "aria-label": "Picture in patches. Arrow keys choose a patch, Page Up and Page Down a layer." }, this.photo);
    this.heatBox = make("div", { class: "stage", role: "img" }, this.heat);
    this.heatBar = bar();
    this.heatName = make("figcaption");
    for (const box of [this.stage, this.heatBox]) this.pointed(box, (event) => this.patchAt(event, box));
    this.stage.addEventListener("keydown", (event) => this.keyOnPicture(event));
    this.stagesBox = make("div", { class: "stages" },
      make("figure", {}, make("figcaption", {}, "the picture in patches; choose one"), this.stage),
      make("figure", {}, this.heatName, this.heatBox, this.heatBar.element));
    return this.stagesBox;
  }

  chips() {
    const { example } = this, { tokens, kinds } = example.about;
    this.chipOf = new Map();
    this.list = make("div", { class: "tokens", role: "listbox", "aria-label": "Tokens of the prompt", "aria-orientation": "horizontal" });
    let first = -1;
    tokens.forEach((text, token) => {
      const patch = example.patch.has(token) || kinds[token] === "image";
      if (patch && first >= 0 && token > 0 && kinds[token - 1] === kinds[token]) {
        this.chipOf.set(token, this.chipOf.get(first));
        return;
      }
      first = patch ? token : -1;
      const n = patch ? run(kinds, token) : 0;
      const said = patch ? `▦ ${n} image token${n > 1 ? "s" : ""}` : text.replaceAll("\n", "⏎");
      const stripe = make("i", { "aria-hidden": "true" });
      const chip = make("div", { class: "token", role: "option", tabindex: "-1", "aria-selected": "false", title: KINDS[kinds[token]] },
        make("span", {}, said), stripe);
      Object.assign(chip, { token, stripe, isPatches: patch });
      chip.addEventListener("click", () => { this.choose({ token }); if (patch) this.stage?.focus(); });
      chip.addEventListener("pointerenter", () => !patch && this.peek(token));
      chip.addEventListener("pointerleave", () => this.peek(null));
      this.list.append(chip);
      this.chipOf.set(token, chip);
    });
    this.list.addEventListener("keydown", (event) => this.keyOnTokens(event));
    return make("div", {}, make("p", { class: "soft", style: "margin-top:12px" },
      "the prompt's tokens; under each the measure, in the colours of the map below"), this.list);
  }

  overview() {
    this.mapCanvas = make("canvas", { "aria-hidden": "true" });
    this.map = make("div", { class: "map", tabindex: "0", role: "application", "aria-roledescription": "map of tokens and layers",
      "aria-label": "Map of all tokens and layers. Left and right choose a token, up and down a layer." }, this.mapCanvas);
    this.mapName = make("p", { class: "soft" });
    this.mapBar = bar();
    this.small = document.createElement("canvas");
    this.pointed(this.map, (event) => this.cellAt(event));
    this.map.addEventListener("keydown", (event) => this.keyOnMap(event));
    this.mapBox = make("div", { class: "region" }, this.map);
    return make("div", {}, this.mapName, this.mapBox, this.mapBar.element);
  }

  told() {
    const { example } = this, said = example.about.measure.short;
    this.title = make("p", { class: "title" });
    this.under = make("p", { class: "soft" });
    this.here = make("div", { class: "here" });
    const head = make("tr", {}, ...["layer", "lens words", "swap", "cut", "att."].map((name, at) =>
      make("th", { scope: "col", class: at > 1 ? "n" : null }, name)));
    const rows = make("tbody");
    this.rows = Array.from({ length: example.places }, (_, place) => {
      const cells = Array.from({ length: 5 }, (_, at) => make("td", { class: at > 1 ? "n" : null }));
      cells[0].textContent = place ? `${place - 1}` : "input";
      const row = make("tr", {}, ...cells);
      row.addEventListener("click", () => this.choose({ place }));
      rows.append(row);
      return { row, cells };
    });
    this.region = make("div", { class: "region rows", tabindex: "0", role: "region", "aria-label": "The chosen token at every layer" },
      make("table", {}, make("caption", { class: "quiet" }, "The chosen token at every layer"), make("thead", {}, head), rows));
    this.looks = make("div", { class: "looks" });
    return make("div", { class: "panel" }, this.title, this.under, this.here,
      make("p", { class: "soft" }, `at every layer: swap and cut change the ${said} by so much (${example.about.measure.unit}); att. is attention from the last token`),
      this.region, this.looks);
  }

  // Mouse: a look while it hovers, a choice when it clicks.

  pointed(box, where) {
    box.addEventListener("pointermove", (event) => {
      const found = event.pointerType === "touch" ? null : where(event);
      this.peek(found?.token ?? null, found?.place);
    });
    box.addEventListener("pointerleave", () => this.peek(null));
    box.addEventListener("click", (event) => { const found = where(event); if (found) this.choose(found); });
  }

  patchAt(event, box) {
    const canvas = box.firstElementChild.getBoundingClientRect(), view = this.example.views[this.state.view];
    const x = (event.clientX - canvas.left) / canvas.width * view.image.size[0];
    const y = (event.clientY - canvas.top) / canvas.height * view.image.size[1];
    const cell = view.boxes.findIndex(([left, top, right, bottom]) => x >= left && x < right && y >= top && y < bottom);
    return cell < 0 ? null : { token: view.tokens[cell] };
  }

  cellAt(event) {
    const box = this.mapCanvas.getBoundingClientRect(), { left, column, row } = this.mapSizes;
    const token = Math.floor((event.clientX - box.left - left) / column), place = Math.floor((event.clientY - box.top) / row);
    const inside = token >= 0 && token < this.example.n && place >= 0 && place < this.example.places;
    return inside ? { token, place } : null;
  }

  // Keyboard

  key(event, moves) {
    const steps = { PageUp: -1, PageDown: 1 };
    if (event.key in steps) this.choose({ place: inFrame(this.state.place + steps[event.key], 0, this.example.places - 1) });
    else if (event.key in moves && !event.altKey && !event.ctrlKey && !event.metaKey) moves[event.key]();
    else return;
    event.preventDefault();
  }

  keyOnPicture(event) {
    const view = this.example.views[this.state.view], [rows, columns] = view.grid;
    const at = Math.max(0, view.tokens.indexOf(this.state.token)), row = Math.floor(at / columns), column = at % columns;
    const there = view.tokens.includes(this.state.token);
    const go = (r, c) => this.choose({ token: view.tokens[there ? inFrame(r, 0, rows - 1) * columns + inFrame(c, 0, columns - 1) : 0] });
    this.key(event, { ArrowLeft: () => go(row, column - 1), ArrowRight: () => go(row, column + 1), ArrowUp: () => go(row - 1, column),
      ArrowDown: () => go(row + 1, column), Home: () => go(row, 0), End: () => go(row, columns - 1) });
  }

  keyOnTokens(event) {
    const chips = [...this.list.children], at = chips.indexOf(this.chipOf.get(this.state.token));
    const go = (number) => { const chip = chips[inFrame(number, 0, chips.length - 1)]; this.choose({ token: chip.token }); chip.focus(); };
    this.key(event, { ArrowLeft: () => go(at - 1), ArrowRight: () => go(at + 1), Home: () => go(0), End: () => go(chips.length - 1) });
  }

  keyOnMap(event) {
    const { token, place } = this.state, go = (t, p) =>
      this.choose({ token: inFrame(t, 0, this.example.n - 1), place: inFrame(p, 0, this.example.places - 1) });
    this.key(event, { ArrowLeft: () => go(token - 1, place), ArrowRight: () => go(token + 1, place), ArrowUp: () => go(token, place - 1),
      ArrowDown: () => go(token, place + 1), Home: () => go(0, place), End: () => go(this.example.n - 1, place) });
  }

  choose(change) {
    this.hover = null;
    this.explorer.change(this, change);
  }

  peek(token, place) {
    const now = token === null ? null : { token, place: place ?? this.state.place };
    if (now?.token === this.hover?.token && now?.place === this.hover?.place) return;
    this.hover = now;
    this.explorer.soon(this);
  }

  // Where a token's view is not the one shown, that view is shown.
  settle() {
    const found = this.example.patch.get(this.state.token);
    if (found && !found.some(([view]) => view === this.state.view)) this.state.view = found[0][0];
    if (!this.measures.some(({ id }) => id === this.state.measure)) this.state.measure = this.measures[0].id;
  }

  // Drawing

  draw() {
    if (!this.element.clientWidth) return;
    this.measure = this.measures.find(({ id }) => id === this.state.measure) ?? this.measures[0];
    this.theme = scales();
    this.coloured(this.explorer.ends(this.state.measure));
    if (this.example.views.length) this.drawStages();
    this.drawMap();
    this.drawChips();
    this.tell();
  }

  // What the maps show at every place and token, and the largest sizes: of the patches in view, and of all tokens (but
  // the last one where effects are shown, whose state is the answer). Kept as long as nothing changes them.
  valued() {
    const { state, example } = this, measure = this.measures.find(({ id }) => id === state.measure) ?? this.measures[0];
    const key = [measure.id, measure.heads && state.head, measure.own && state.token, state.view].join();
    if (this.known === key) return;
    this.known = key;
    const { n, places } = example, shown = new Set(example.views[state.view]?.tokens ?? []);
    this.values = new Float32Array(n * places).fill(NaN);
    this.most = this.mostShown = 0;
    for (let place = measure.blocks ? 1 : 0; place < places; place++) for (let token = 0; token < n; token++) {
      const value = measure.at(place, token, state), size = Math.abs(value);
      this.values[place * n + token] = value;
      if (size > this.most && !(measure.signed && token === n - 1)) this.most = size;
      if (size > this.mostShown && shown.has(token)) this.mostShown = size;
    }
  }

  // The map of all layers, a pixel a cell; it is enlarged when it is drawn.
  coloured([ofPatches, ofTokens]) {
    const key = [this.known, dark.matches, ofPatches, ofTokens].join();
    if (this.painted === key) return;
    this.painted = key;
    this.ends = { ofPatches, ofTokens };
    const { n, places } = this.example, { signed: isSigned } = this.measure;
    Object.assign(this.small, { width: n, height: places });
    const pen = this.small.getContext("2d"), pixels = pen.createImageData(n, places);
    this.values.forEach((value, at) => {
      if (Number.isNaN(value)) return;
      const rgb = colour(value, ofTokens, isSigned, this.theme);
      for (let part = 0; part < 3; part++) pixels.data[at * 4 + part] = rgb[part];
      pixels.data[at * 4 + 3] = 255;
    });
    pen.putImageData(pixels, 0, 0);
  }

  at(token, place = this.state.place) { return this.values[place * this.example.n + token]; }

  drawStages() {
    const view = this.example.views[this.state.view], [wide, high] = view.image.size, room = this.stagesBox.clientWidth;
    if (this.picture.src !== view.image.source) this.picture.src = view.image.source;
    this.stagesBox.classList.toggle("beside", room >= 420);
    const width = Math.floor(Math.min(room >= 420 ? (room - 18) / 2 : room, WIDEST)), scale = width / wide, height = Math.round(high * scale);
    const boxes = this.boxes = view.boxes.map((box) => box.map((edge) => edge * scale));
    const photo = sized(this.photo, width, height), heat = sized(this.heat, width, height);
    const { theme, measure } = this, step = boxes.length ? boxes[0][2] - boxes[0][0] : 0;
    photo.imageSmoothingEnabled = scale < 1;
    if (this.picture.complete && this.picture.naturalWidth) photo.drawImage(this.picture, 0, 0, width, height);
    photo.lineWidth = 1;
    if (step >= 4) for (const [style, shift] of [["rgba(0,0,0,.55)", .5], ["rgba(255,255,255,.55)", -.5]]) {
      photo.strokeStyle = style;
      photo.beginPath();
      for (const [left, top, right, bottom] of boxes) photo.rect(left + shift, top + shift, right - left, bottom - top);
      photo.stroke();
    }
    heat.textAlign = "center";
    heat.textBaseline = "middle";
    boxes.forEach((box, cell) => {
      const token = view.tokens[cell], value = this.at(token), [left, top, right, bottom] = box, gap = step >= 6 ? 1 : 0;
      if (Number.isNaN(value)) {
        heat.strokeStyle = theme.line;
        heat.lineWidth = .5;
        heat.strokeRect(left + 1, top + 1, right - left - 2, bottom - top - 2);
      } else {
        const rgb = colour(value, this.ends.ofPatches, measure.signed, theme);
        heat.fillStyle = css(rgb);
        heat.fillRect(left, top, right - left - gap, bottom - top - gap);
        if (measure.words && step >= 30) {
          heat.fillStyle = inkOn(rgb);
          heat.font = "11px system-ui,sans-serif";
          heat.fillText(this.example.words(this.state.place, token)[0][0].slice(0, 9), (left + right) / 2, (top + bottom) / 2, right - left - 3);
        }
      }
      if (this.example.arrays.sinks?.stored[token]) for (const pen of [photo, heat]) crossed(pen, box);
    });
    for (const [token, thick, dash] of [[this.hover?.token, 1.5, [4, 3]], [this.state.token, 2.5, []]]) {
      const cell = view.tokens.indexOf(token);
      if (cell >= 0) for (const pen of [photo, heat]) framed(pen, boxes[cell], thick, dash);
    }
    const where = this.named(this.state.place);
    this.heatName.textContent = `${measure.label}: ${where}`;
    this.heatBox.setAttribute("aria-label", `Heat map of the same patches: ${measure.label}, ${where}. The panel has the numbers.`);
    this.heatBar.show(this.ends.ofPatches, measure, theme, "ends: the largest of these patches over all layers");
  }

  named(place) {
    if (this.measure.blocks) return place ? `block ${place - 1}` : "none at the input; choose a block";
    return place ? `after block ${place - 1}` : "at the input";
  }

  drawMap() {
    const { n, places } = this.example, room = this.mapBox.clientWidth, left = 44, under = 22;
    const column = Math.max(2, Math.min(24, (room - left - 4) / n)), row = inFrame(Math.floor(230 / places), 7, 24);
    const width = left + column * n + 2, height = row * places + under, pen = sized(this.mapCanvas, width, height);
    this.mapSizes = { left, column, row };
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.small, left, 0, column * n, row * places);
    pen.fillStyle = pen.strokeStyle = this.theme.ink;
    pen.font = "11px system-ui,sans-serif";
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const every = Math.ceil(13 / row);
    for (let place = 0; place < places; place++)
      if (!place || (place - 1) % every === 0) if (place === 0 || place * row >= 10) pen.fillText(place ? place - 1 : "input", left - 6, place * row + row / 2);
    this.spans(pen, row * places + 4);
    pen.lineWidth = 1;
    pen.strokeStyle = this.theme.line;
    pen.strokeRect(left - .5, -.5, column * n + 1, row * places + 1);
    for (const [cell, thick, dash] of [[this.hover, 1.5, [4, 3]], [this.state, 2, []]])
      if (cell) framed(pen, [left + cell.token * column, cell.place * row, left + (cell.token + 1) * column, (cell.place + 1) * row], thick, dash);
    this.mapName.textContent = `all tokens (left to right) and layers (top to bottom): ${this.measure.label}`;
    this.mapBar.show(this.ends.ofTokens, this.measure, this.theme, this.measure.signed
      ? "ends: the largest before the last token, which may go beyond" : "ends: the largest over all tokens and layers");
  }

  // Which tokens are of the picture, the question, ...: a line under each run, with its name where there is room.
  spans(pen, top) {
    const { kinds } = this.example.about, { left, column } = this.mapSizes;
    pen.textAlign = "center";
    pen.strokeStyle = this.theme.ink;
    pen.lineWidth = 1.5;
    for (let token = 0; token < kinds.length; ) {
      const n = run(kinds, token), name = KINDS[kinds[token]], from = left + token * column + 1, to = left + (token + n) * column - 1;
      pen.beginPath();
      pen.moveTo(from, top);
      pen.lineTo(Math.max(to, from + 1), top);
      pen.stroke();
      if (pen.measureText(name).width < to - from) pen.fillText(name, (from + to) / 2, top + 9);
      token += n;
    }
  }

  drawChips() {
    const now = this.chipOf.get(this.state.token), over = this.hover && this.chipOf.get(this.hover.token);
    for (const chip of this.list.children) {
      chip.setAttribute("aria-selected", String(chip === now));
      chip.tabIndex = chip === now ? 0 : -1;
      chip.classList.toggle("seen", chip === over && chip !== now);
      const value = this.at(chip.token);
      chip.stripe.style.background = chip.isPatches || Number.isNaN(value) ? "none" : css(colour(value, this.ends.ofTokens, this.measure.signed, this.theme));
      chip.stripe.style.visibility = chip.isPatches ? "hidden" : "";
    }
  }

  // What is known of one token.

  tell() {
    const { example, state } = this, { token, place } = this.hover ?? state, layer = place - 1, { measure } = example.about;
    const name = example.name(token), sink = example.sink(token), kind = KINDS[example.about.kinds[token]];
    this.title.textContent = name[0].toUpperCase() + name.slice(1);
    this.under.textContent = [`token ${token + 1} of ${example.n}${kind ? `, ${kind}` : ""}${token === example.n - 1 ? ": the last one, where the answer begins" : ""}`, sink].filter(Boolean).join("; ");
    const change = example.value("swap", place, token), cut = place ? example.value("cut", layer, token) : NaN;
    const lines = [["Lens here: ", example.words(place, token).map(([word, p]) => `${word} ${share(p)}`).join(" · ") || "not shown"],
      [`Swapped ${place ? `after block ${layer}` : "at the input"}: `, this.effect(change)],
      [`Cut last ← this${place ? ` in block ${layer}` : ""}: `, place ? this.effect(cut) : "blocks alone have attention"]];
    if (example.arrays.probe) lines.push(["Probe: ", plain(example.value("probe", place, token))]);
    this.here.replaceChildren(...lines.map(([what, text]) => make("div", {}, make("b", {}, what), text)));
    this.rows.forEach(({ row, cells }, number) => {
      row.className = number === place ? "now" : "";
      cells[1].textContent = example.words(number, token).map(([word, p], at) => (at ? word : `${word} ${share(p)}`)).join(" · ");
      cells[2].textContent = signed(example.value("swap", number, token));
      cells[3].textContent = number ? signed(example.value("cut", number - 1, token)) : "";
      cells[4].textContent = number ? share(example.attention(number - 1, state.head, example.n - 1, token)) : "";
    });
    const shown = this.rows[place].row, top = shown.offsetTop - 26, { region } = this;
    if (top < region.scrollTop || top + 2 * shown.offsetHeight > region.scrollTop + region.clientHeight) region.scrollTop = top - 60;
    this.spoken = `${name}, ${place ? `after block ${layer}` : "at the input"}. ${lines.map((each) => each.join("")).join(". ")}${sink ? `. ${sink}` : ""}`;
    this.drawLooks(token, place);
  }

  effect(change) {
    const { unit, baseline, short } = this.example.about.measure;
    if (Number.isNaN(change)) return "not measured";
    return `${short} ${plain(baseline)} → ${plain(baseline + change)} (${signed(change)} ${unit})`;
  }

  drawLooks(token, place) {
    const { example, state } = this, of = example.heads > 1 && state.head >= 0 ? `head ${state.head}` : "mean over heads";
    const listed = (title, direction) => {
      const most = place ? example.most(direction, place - 1, state.head, token) : [];
      const items = most.map(([other, weight]) => make("li", {}, make("button", { type: "button", onclick: () => this.choose({ token: other }) },
        make("span", {}, example.name(other)), make("span", {}, share(weight)))));
      return make("div", {}, make("p", { class: "soft", style: "margin:0" }, title), items.length ? make("ol", {}, ...items) : make("p", { class: "soft" }, "none"));
    };
    if (!example.arrays.attention && !example.arrays.looks_at) return;
    const where = place ? `block ${place - 1}, ${of}` : "blocks alone have attention";
    this.looks.replaceChildren(listed(`attends most to (${where})`, "from"), listed(`attended to most by (${where})`, "to"));
  }
}

// How many tokens from one on are of the same kind.
function run(kinds, from) {
  let to = from;
  while (to < kinds.length && kinds[to] === kinds[from]) to++;
  return to - from;
}

function bar() {
  const low = make("span"), high = make("span"), canvas = make("canvas", { width: 128, height: 1, "aria-hidden": "true" });
  const unit = make("span", { class: "unit" });
  const show = (most, measure, theme, ends) => {
    const pen = canvas.getContext("2d");
    for (let x = 0; x < 128; x++) {
      const t = x / 127;
      pen.fillStyle = css(colour(measure.signed ? 2 * t - 1 : t, 1, measure.signed, theme));
      pen.fillRect(x, 0, 1, 1);
    }
    low.textContent = measure.signed ? signed(-most) : "0";
    high.textContent = measure.signed ? signed(most) : share(most);
    unit.textContent = `${measure.unit}; ${ends}`;
  };
  return { element: make("div", { class: "bar" }, low, canvas, high, unit), show };
}

// What was asked, said and measured.

function headline(example, tag = "p") {
  const { model, question, says, answer, counterfactual, measure, exchanged } = example.about;
  const found = [make(tag, { class: "headline", style: "margin:0 0 4px" }, `Asked ${quoted(question)}, ${model.name} says ${quoted(says)}.`)];
  const right = answer === null ? "" : `The right answer is ${quoted(answer)}. `;
  found.push(make("p", { class: "soft" }, `${right}Measured: ${measure.says}; ${plain(measure.baseline)} ${measure.unit} without an edit.`));
  if (counterfactual) {
    const asked = counterfactual.question === question ? "" : `, asked ${quoted(counterfactual.question)}`;
    found.push(make("div", { class: "others soft" }, ...counterfactual.images.map((source) => make("img", { src: source, alt: "The counterfactual picture" })),
      make("span", {}, `Swapped in: states of this counterfactual${asked}, whose answer is ${quoted(counterfactual.answer)}; the model says ${quoted(counterfactual.says)}.`)));
  } else found.push(make("p", { class: "soft" }, `Swapped in: ${exchanged}.`));
  return found;
}

function howToRead() {
  const items = [
    "Choose a patch, a token or a layer: click, hover, or Tab to the picture, the tokens or the map and use the arrow keys (Page Up and Page Down change the layer). The panel then tells everything about this token.",
    "Lens words: what the model's own last layer would read from this token's state at this layer (logit lens).",
    "Swap: this one token's state is exchanged at this layer, everything after it is computed again, and the measure changes by so much. Below zero (blue): the answer loses.",
    "Cut: in this one block the last token, where the answer begins, cannot attend to this token.",
    "Attention is where heads look, after the softmax. That a token is attended to does not say that it is used: compare it with cut.",
    "A cross marks a sink: a token that gathers attention whatever it shows, told by its state. Empty cells were not measured or not kept.",
    "Rows and columns count from 0, as in Patches(((2, 3),)). This is one example: it has no interval, and what it shows may be its own.",
  ];
  return make("details", {}, make("summary", {}, "How to read this"), make("ul", {}, ...items.map((each) => make("li", {}, each))));
}

// One or two panes with the controls that they share.

class Explorer {
  constructor(el, options) {
    this.el = el;
    this.options = options;
    this.panes = [];
    this.waiting = new Set();
  }

  async open(data) {
    const parts = data.explorations ?? [data], beside = data.arrange === "beside";
    this.packed = parts;
    this.beside = beside;
    this.root = make("div", { class: "vx", lang: "en" }, make("style", {}, STYLE));
    this.top = make("div");
    this.controls = make("div", { class: "controls", role: "group", "aria-label": "What is shown" });
    this.box = make("div", { class: beside ? "panes two" : "panes" });
    this.notes = make("div");
    this.live = make("p", { class: "quiet", role: "status", "aria-live": "polite" });
    this.root.append(this.top, howToRead(), this.controls, this.box, this.notes, this.live);
    this.el.replaceChildren(this.root);
    this.watch = new ResizeObserver(() => this.soon(...this.panes));
    this.watch.observe(this.root);
    this.repaint = () => this.soon(...this.panes);
    dark.addEventListener("change", this.repaint);
    this.follow = () => { const view = linked(); if (view) this.restore(view); };
    if (this.options.linked) addEventListener("hashchange", this.follow);
    const view = this.options.linked ? linked() : null;
    await this.show(beside ? 0 : inFrame(view?.example ?? 0, 0, parts.length - 1), view);
  }

  async show(number, view) {
    this.number = number;
    const chosen = this.beside ? this.packed : [this.packed[number]];
    const examples = await Promise.all(chosen.map(unpacked));
    if (this.number !== number) return;
    this.panes = examples.map((example) => new Pane(example, this, examples.length === 1));
    this.top.replaceChildren(...(this.beside ? [] : headline(examples[0])));
    this.box.replaceChildren(...this.panes.map((pane) => pane.element));
    const notes = examples.flatMap((example) => example.about.notes);
    this.notes.replaceChildren(...notes.map((note) => make("p", { class: "soft" }, note)));
    this.fillControls();
    const first = this.panes[0], start = view ? within(first.example, view) : strongest(first);
    this.change(first, start, { quiet: true });
    for (const pane of this.panes) pane.draw();
  }

  fillControls() {
    const lead = this.panes[0], { example } = lead, select = (label, options, change) => {
      const box = make("select", {}, ...options.map(([value, text]) => make("option", { value }, text)));
      box.addEventListener("change", () => change(box.value));
      this.controls.append(make("label", {}, label, box));
      return box;
    };
    this.controls.replaceChildren();
    this.boxes = {};
    if (!this.beside && this.packed.length > 1) {
      const told = this.packed.map((each, at) => [at, `${at + 1}: ${each.question} ${each.answer ?? each.says}`.slice(0, 70)]);
      this.boxes.example = select("example", told, (value) => this.show(Number(value)));
      this.boxes.example.value = this.number;
    }
    this.boxes.measure = select("the maps show", lead.measures.map(({ id, label }) => [id, label]), (measure) => this.change(lead, { measure }));
    this.range = make("input", { type: "range", min: 0, max: example.places - 1, step: 1 });
    this.range.addEventListener("input", () => this.change(lead, { place: Number(this.range.value) }));
    this.layer = make("span");
    this.controls.append(make("label", {}, this.layer, this.range));
    const heads = Math.max(...this.panes.map((pane) => pane.example.heads));
    if (heads > 1) {
      const named = [[-1, "mean over heads"], ...Array.from({ length: heads }, (_, head) => [head, `head ${head}`])];
      this.boxes.head = select("attention of", named, (head) => this.change(lead, { head: Number(head) }));
    }
    if (example.views.length > 1)
      this.boxes.view = select("view", example.views.map(({ name }, at) => [at, name]), (view) => this.toView(lead, Number(view)));
    if (this.options.linked) {
      this.link = make("a", { href: "#" }, "link to this view");
      this.controls.append(this.link);
    }
  }

  toView(pane, view) {
    this.change(pane, { view, token: pane.example.views[view].tokens[0] });
  }

  // A choice in one pane is a choice in the other one too.
  change(from, change, { quiet = false } = {}) {
    for (const pane of this.panes) {
      const own = { ...change };
      if (pane !== from && "token" in own) own.token = counterpart(from.example, own.token, pane.example);
      if (pane !== from && "place" in own) own.place = Math.round(own.place * (pane.example.places - 1) / (from.example.places - 1));
      if (pane !== from) delete own.view;
      if (own.token === undefined || own.token === null) delete own.token;
      for (const [name, value] of Object.entries(own)) if (name in pane.state) pane.state[name] = value;
      pane.settle();
    }
    const { state, example } = this.panes[0];
    this.boxes.measure.value = state.measure;
    this.range.value = state.place;
    const where = state.place ? `after block ${state.place - 1} of ${example.layers}` : "the decoder's input";
    this.layer.textContent = `layer: ${where}`;
    this.range.setAttribute("aria-valuetext", where);
    if (this.boxes.head) this.boxes.head.value = state.head;
    if (this.boxes.view) this.boxes.view.value = state.view;
    this.soon(...this.panes);
    if (!quiet) this.say(from);
    this.remember(quiet);
  }

  // The ends of the scales, the same in all panes that show the measure.
  ends(measure) {
    const panes = this.panes.filter((pane) => pane.state.measure === measure);
    for (const pane of panes) pane.valued();
    return [Math.max(...panes.map((pane) => pane.mostShown)), Math.max(...panes.map((pane) => pane.most))];
  }

  soon(...panes) {
    for (const pane of panes) this.waiting.add(pane);
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      for (const pane of this.waiting) pane.draw();
      this.waiting.clear();
    });
  }

  // For screen readers, once choosing comes to rest.
  say(pane) {
    clearTimeout(this.pause);
    this.pause = setTimeout(() => { this.live.textContent = pane.spoken ?? ""; }, 150);
  }

  remember(quiet) {
    const { state } = this.panes[0];
    this.options.onState?.({ token: state.token, layer: state.place - 1, head: state.head, example: this.number });
    if (!this.link) return;
    const hash = `#${KEY}${[this.number, state.token, state.place, state.head, state.view, state.measure].join(".")}`;
    this.link.setAttribute("href", hash);
    if (!quiet) try { history.replaceState(null, "", hash); } catch { /* a frame without an address of its own */ }
  }

  restore(view) {
    if (!this.beside && view.example !== this.number && this.packed[view.example]) return this.show(view.example, view);
    this.change(this.panes[0], within(this.panes[0].example, view), { quiet: true });
  }

  close() {
    this.watch?.disconnect();
    dark.removeEventListener("change", this.repaint);
    removeEventListener("hashchange", this.follow);
  }
}

// The view that the address names.
function linked() {
  const found = new RegExp(`^#${KEY}(\\d+)\\.(\\d+)\\.(\\d+)\\.(-?\\d+)\\.(\\d+)\\.(\\w+)$`).exec(location.hash);
  if (!found) return null;
  const [example, token, place, head, view] = found.slice(1, 6).map(Number);
  return { example, token, place, head, view, measure: found[6] };
}

function within(example, view) {
  return { token: inFrame(view.token, 0, example.n - 1), place: inFrame(view.place, 0, example.places - 1),
    head: inFrame(view.head, -1, example.heads - 1), view: inFrame(view.view, 0, Math.max(0, example.views.length - 1)), measure: view.measure };
}

// Where a look begins: the patch (or token before the last) whose swap changes most.
function strongest({ example }) {
  let most = -1, found = { token: example.n - 1, place: Math.ceil(example.places / 2) };
  const tokens = example.views.length ? example.views[0].tokens : Array.from({ length: example.n - 1 }, (_, token) => token);
  for (let place = 1; place < example.places; place++) for (const token of tokens) {
    const size = Math.abs(example.value("swap", place, token));
    if (size > most) [most, found] = [size, { token, place }];
  }
  return found;
}

// The token of another example that shows the same: by number where the prompts have the same tokens, else the patch at
// the same place of the picture, or the same text.
function counterpart(from, token, to) {
  const same = from.n === to.n && from.about.tokens.every((text, at) => text === to.about.tokens[at]);
  if (same) return token;
  const found = from.patch.get(token);
  if (found && to.views.length) {
    const [number, cell] = found[0], view = from.views[number], [left, top, right, bottom] = view.boxes[cell];
    const x = (left + right) / 2 / view.image.size[0], y = (top + bottom) / 2 / view.image.size[1], other = to.views[0];
    const at = other.boxes.findIndex((box) => x >= box[0] / other.image.size[0] && x < box[2] / other.image.size[0] &&
      y >= box[1] / other.image.size[1] && y < box[3] / other.image.size[1]);
    return at < 0 ? null : other.tokens[at];
  }
  if (token === from.n - 1) return to.n - 1;
  const at = to.about.tokens.indexOf(from.about.tokens[token]);
  return at < 0 ? null : at;
}

export async function mount(el, data, options = {}) {
  if (!("DecompressionStream" in window)) {
    el.textContent = "A browser of 2023 or later shows this explorer.";
    return () => {};
  }
  const explorer = new Explorer(el, options);
  await explorer.open(data);
  return () => explorer.close();
}

export default {
  render({ model, el }) {
    let close = () => {};
    const onState = (state) => { model.set("state", state); model.save_changes(); };
    const open = async () => { close(); close = await mount(el, JSON.parse(model.get("data")), { onState }); };
    model.on("change:data", open);
    open();
    return () => close();
  },
};
