// Draws the figures of a report when they come into view, fits them to the page, and follows light, dark and print.
"use strict";
(() => {
  const NARROW = 700; // below it legends go under the panels
  const PANEL = 250; // pixels without which a panel is put into another row
  const ROW = 145; // pixels to which a row of panels may be pressed on the first screen
  const LETTER = 6.6, SYMBOL = 52; // pixels of a letter of a legend, and of the line before its text
  const BETWEEN = 92; // pixels between rows of panels: ticks, the title of the axis, the title of the next panel
  const PAPER = 980; // pixels of a page's width in print
  // Nothing may be sent to a server.
  const CONFIG = { displaylogo: false, showSendToCloud: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const darkness = matchMedia("(prefers-color-scheme: dark)");
  let plotly = null, printing = false;

  function library() {
    plotly ??= (async () => {
      const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()), (c) => c.charCodeAt(0));
      const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
      const script = document.createElement("script");
      script.textContent = await new Response(stream).text();
      document.head.append(script);
      return window.Plotly;
    })();
    return plotly;
  }

  const turns = new WeakMap(), seen = new WeakMap();

  // One drawing after the other, for plotly mixes up two of the same element.
  function draw(box) {
    turns.set(box, (turns.get(box) ?? Promise.resolve()).then(() => drawn(box)));
    return turns.get(box);
  }

  async function drawn(box) {
    if (!("DecompressionStream" in window)) {
      box.textContent = "A browser of 2023 or later draws this figure; every number in it is in a table.";
      return;
    }
    const Plotly = await library();
    const room = printing ? PAPER : box.parentElement.clientWidth, dark = darkness.matches && !printing;
    const most = limit(box, room), state = [room, dark, most].join();
    if (!room || seen.get(box) === state) return;
    seen.set(box, state);
    const spec = JSON.parse(document.getElementById(box.dataset.figure).textContent);
    coloured(spec, dark);
    fitted(spec, room, most);
    box.style.width = `${spec.layout.width}px`;
    // `react` keeps what was zoomed or hidden as long as uirevision stays.
    spec.layout.uirevision = "kept";
    const saved = { filename: box.dataset.figure.replace("data-figure-", ""), scale: 2 };
    await Plotly.react(box, spec.data, spec.layout, { ...CONFIG, toImageButtonOptions: saved });
    if (!named.has(box)) for (const what of ["plotly_update", "plotly_relayout"]) box.on(what, () => retitled(box));
    named.add(box);
  }

  // A title that a menu of the figure puts into it goes where titles are: above it.
  const named = new WeakSet();
  function retitled(box) {
    const title = box.layout.title?.text;
    if (!title) return;
    const text = new DOMParser().parseFromString(title, "text/html").body.textContent;
    box.closest("figure").querySelector("figcaption").textContent = text;
    box.setAttribute("aria-label", text);
    window.Plotly.relayout(box, { "title.text": "" });
  }

  function limit(box, room) {
    if (document.body.classList.contains("alone")) return innerHeight - 120;
    return "short" in box.dataset && room >= 560 && !printing ? Math.max(340, 0.6 * innerHeight) : Infinity;
  }

  // Fitting: no wider than the page where its panels can be put into more rows; otherwise its region scrolls.

  function fitted({ data, layout }, room, most) {
    const natural = { width: layout.width ?? 700, height: layout.height ?? 450 };
    delete layout.autosize;
    if (layout.images?.length) {
      // Pictures keep their shape.
      layout.width = Math.max(Math.min(room, natural.width), Math.min(natural.width, 340 * columnsOf(layout).length));
      layout.height = natural.height;
      return;
    }
    const authored = { t: 90, b: 80, ...layout.margin };
    const inside = Math.max(120, natural.height - authored.t - authored.b);
    layout.margin = { l: Math.min(layout.margin?.l ?? 60, 60), r: Math.min(layout.margin?.r ?? 20, 20), t: 56, b: 60 };
    for (const name of axes(layout)) layout[name].automargin = true;
    const under = legendUnder(data, layout, room);
    const columns = columnsOf(layout).length || 1;
    const beside = under || !data.some((trace) => trace.showlegend !== false && trace.name) ? 40 : longest(data) + 20;
    const fit = Math.max(1, Math.floor((room - 80 - beside) / PANEL));
    let height = inside;
    if (fit < columns) {
      const wrapped = rearranged(data, layout, fit, inside);
      if (wrapped) height = wrapped;
      else layout.width = 80 + beside + columns * PANEL;
    }
    layout.width = Math.max(room, layout.width && fit < columns && height === inside ? layout.width : 0);
    const legend = under ? below(data, layout.width) : 0, rows = rowsOf(layout);
    layout.height = Math.min(height + 116 + legend, Math.max(most, rows > 1 ? rows * ROW + 116 + legend : 0));
  }

  const axes = (layout) => Object.keys(layout).filter((name) => /^[xy]axis\d*$/.test(name));
  const short = (name) => name.replace("axis", "");
  const near = (one, other) => Math.abs(one - other) < 0.01;

  const startsOf = (layout, letter) => {
    const starts = axes(layout).filter((name) => name[0] === letter).map((name) => layout[name].domain?.[0] ?? 0);
    return starts.filter((start, at) => !starts.slice(0, at).some((other) => near(start, other)));
  };
  const columnsOf = (layout) => startsOf(layout, "x"), rowsOf = (layout) => startsOf(layout, "y").length;

  function names(data) {
    const shown = data.filter((trace) => trace.showlegend !== false && trace.name && trace.type !== "heatmap");
    return [...new Set(shown.map((trace) => String(trace.name).replace(/<br>/g, " ")))];
  }

  const longest = (data) => SYMBOL + LETTER * Math.max(0, ...names(data).map((name) => name.length));

  function below(data, width) {
    const each = Math.max(1, Math.floor(width / longest(data)));
    return 16 + 21 * Math.ceil(names(data).length / each);
  }

  function legendUnder(data, layout, room) {
    const many = Object.keys(layout).filter((name) => /^legend\d+$/.test(name));
    if (names(data).length < 2 && layout.showlegend !== true) return false;
    if (many.length ? room >= NARROW : room >= NARROW && longest(data) < 0.3 * room && layout.legend?.orientation !== "h")
      return false;
    for (const name of many) delete layout[name];
    for (const trace of data) {
      delete trace.legend;
      if (trace.name) trace.name = String(trace.name).replace(/<br>/g, " ");
    }
    layout.legend = {
      title: { text: "" }, orientation: "h", xref: "container", x: 0.01, xanchor: "left", yref: "container", y: 0.005,
      yanchor: "bottom", tracegroupgap: 0, traceorder: "normal",
    };
    return true;
  }

  // The panels of a grid in rows of so many; the height that they take, or nothing where this is no plain grid.
  function rearranged(data, layout, columns, inside) {
    const drawn = new Set(data.map((trace) => trace.xaxis ?? "x"));
    const every = axes(layout).filter((name) => name[0] === "x" && drawn.has(short(name))).map((name) => {
      const x = layout[name], other = `yaxis${(x.anchor ?? "y").slice(1)}`, y = layout[other];
      return { x, y, dx: x.domain, dy: y?.domain };
    });
    if (!every.every((each) => each.dx && each.dy) || layout.sliders || layout.updatemenus) return 0;
    every.sort((one, other) => (near(one.dy[1], other.dy[1]) ? one.dx[0] - other.dx[0] : other.dy[1] - one.dy[1]));
    const tall = inside * Math.min(...every.map((each) => each.dy[1] - each.dy[0]));
    const rows = Math.ceil(every.length / columns), height = rows * tall + (rows - 1) * BETWEEN;
    const titles = every.map(({ dx, dy }) => (layout.annotations ?? []).find((each) =>
      each.xref === "paper" && each.yref === "paper" && near(each.x, (dx[0] + dx[1]) / 2) && near(each.y, dy[1])));
    const xTitle = every.map((each) => each.x.title?.text).filter(Boolean).at(-1);
    const yTitle = every.map((each) => each.y.title?.text).find(Boolean);
    every.forEach(({ x, y }, number) => {
      const column = number % columns, top = Math.floor(number / columns) * (tall + BETWEEN);
      const gap = columns > 1 ? 0.09 : 0, wide = (1 - gap * (columns - 1)) / columns;
      x.domain = [column * (wide + gap), column * (wide + gap) + wide];
      y.domain = [Math.max(0, 1 - (top + tall) / height), 1 - top / height];
      x.showticklabels = y.showticklabels = true;
      if (xTitle) x.title = { ...x.title, text: x.title?.text || xTitle };
      if (yTitle && column === 0) y.title = { ...y.title, text: y.title?.text || yTitle };
      if (column > 0) y.title = {};
      if (titles[number]) Object.assign(titles[number], { x: (x.domain[0] + x.domain[1]) / 2, y: y.domain[1] });
    });
    return height;
  }

  // Light and dark: greys are turned over, hues stay.

  function coloured({ data, layout }, dark) {
    const clear = "rgba(0,0,0,0)", ink = dark ? "#e7e8ea" : "#1b1d21", line = dark ? "#3a3f47" : "#dfe3e8";
    layout.plot_bgcolor = clear;
    // Not clear: a picture saved from the tool bar must be readable anywhere.
    layout.paper_bgcolor = dark ? "#15171a" : "#ffffff";
    layout.font = { ...layout.font, color: ink };
    layout.modebar = { bgcolor: clear, color: dark ? "#8d949e" : "#8a9099", activecolor: ink };
    for (const name of axes(layout))
      Object.assign(layout[name], { gridcolor: line, zerolinecolor: line, linecolor: line });
    if (!dark) return;
    for (const each of [...(layout.updatemenus ?? []), ...(layout.sliders ?? [])])
      Object.assign(each, { bgcolor: "#2a2f36", bordercolor: line, activebgcolor: "#4a515b" });
    turned(data);
    turned([layout.shapes, layout.annotations]);
  }

  function turned(value) {
    if (value === null || typeof value !== "object") return;
    for (const [key, each] of Object.entries(value)) {
      if (typeof each === "object") turned(each);
      else if (typeof each === "string") value[key] = over(each);
    }
  }

  function over(text) {
    const hex = /^#([0-9a-f]{2})\1\1$/i.exec(text);
    if (hex) return `#${(255 - parseInt(hex[1], 16)).toString(16).padStart(2, "0").repeat(3)}`;
    const grey = /^rgba\((\d+), ?\1, ?\1, ?([\d.]+)\)$/.exec(text);
    return grey ? `rgba(${[255 - grey[1], 255 - grey[1], 255 - grey[1], grey[2]]})` : text;
  }

  // When: as a section is opened, the page changes its width, its colours, or goes to paper.

  const boxes = [...document.querySelectorAll("[data-figure]")];
  const redraw = () => Promise.all(boxes.filter((box) => box.offsetParent !== null).map(draw));

  const watch = new ResizeObserver((entries) => {
    for (const { target } of entries) if (target.clientWidth && !printing) draw(target.firstElementChild);
  });
  for (const box of boxes) watch.observe(box.parentElement);
  darkness.addEventListener("change", redraw);

  let opened = [];
  addEventListener("beforeprint", () => {
    printing = true;
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const each of opened) each.open = true;
    redraw();
  });
  addEventListener("afterprint", () => {
    printing = false;
    for (const each of opened) each.open = false;
    redraw();
  });

  function follow() {
    const [, only, anchor] = /^#(only-)?(.*)$/.exec(decodeURIComponent(location.hash)) ?? [];
    const target = anchor ? document.getElementById(anchor) : null;
    document.querySelector(".chosen")?.classList.remove("chosen");
    document.body.classList.toggle("alone", Boolean(only && target));
    for (let each = target; each; each = each.parentElement) if (each.tagName === "DETAILS") each.open = true;
    if (only) target?.classList.add("chosen");
    if (!only) target?.scrollIntoView();
    redraw();
  }
  addEventListener("hashchange", follow);
  if (location.hash) follow();
})();
