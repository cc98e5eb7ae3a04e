// Charts as SVG. The matrix of pairs is a canvas, because it has many cells.
const WIDTH = 400, HEIGHT = 215, LEFT = 40, BOTTOM = 38, TOP = 22;

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function ticks(high, count = 4) {
  const rough = high / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((value) => value >= rough);
  return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, i) => i * step);
}

const short = (value) => (value >= 1e6 ? `${+(value / 1e6).toPrecision(3)}M` : value >= 1e4 ? `${+(value / 1e3).toPrecision(3)}k` : `${+value.toPrecision(3)}`);

// Axes from 0 to `right` and 0 to `high`, named `xName` and `yName`; returns the drawing and the scales.
function axes(right, high, label, xName, yName, { xTicks = null, width = WIDTH, height = HEIGHT } = {}) {
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const x = (value) => LEFT + (value / (right || 1)) * (width - LEFT - 8);
  const y = (value) => height - BOTTOM - (value / (high || 1)) * (height - BOTTOM - TOP);
  for (const value of ticks(high)) {
    drawing.append(svg("line", { class: "grid", x1: LEFT, x2: width - 8, y1: y(value), y2: y(value) }));
    drawing.append(svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of xTicks ?? ticks(right))
    drawing.append(xTick(x(value), value, height));
  drawing.append(svg("text", { class: "axis", x: (LEFT + width - 8) / 2, y: height - 4, "text-anchor": "middle" }, xName));
  drawing.append(svg("text", { class: "axis", x: 0, y: 11 }, yName));
  return { drawing, x, y };
}

const xTick = (x, value, height = HEIGHT) => svg("text", { x, y: height - BOTTOM + 16, "text-anchor": "middle" }, short(value));
const path = (xs, ys) => xs.map((x, i) => `${i ? "L" : "M"}${x.toFixed(1)} ${ys[i].toFixed(1)}`).join("");
const largest = (values, least = 0) => values.reduce((a, b) => Math.max(a, b), least);

function figure(title, note, ...contents) {
  const caption = element("figcaption", {}, title, ...(note ? [element("small", {}, note)] : []));
  return element("figure", {}, caption, ...contents);
}

function balanceFigure(layer) {
  const load = Array.from(layer.load, (value) => value / layer.meanLoad);
  const importance = Array.from(layer.importance, (value) => value / layer.meanImportance);
  const few = layer.num_experts <= 128;
  const high = 1.05 * largest(importance, largest(load, 1));
  const label = `Load and importance of ${layer.num_experts} experts in multiples of their mean; the busiest has ${number(largest(load))} times the mean load.`;
  const xTicks = ticks(layer.num_experts - 1).map(Math.floor);
  const middle = few ? 0.5 : 0;
  const { drawing, x, y } = axes(layer.num_experts, high, label, few ? "expert" : "rank of the expert", "times the mean", { xTicks: [] });
  for (const value of new Set(xTicks)) drawing.append(xTick(x(value + middle), value));
  if (few) {
    const wide = x(1) - x(0), bar = Math.max(1, wide * 0.72);
    for (let expert = 0; expert < layer.num_experts; expert++) {
      const link = svg("a", { "data-expert": expert });
      link.append(svg("title", {}, `expert ${expert}: load ${number(load[expert])}, importance ${number(importance[expert])} times the mean`));
      link.append(svg("rect", { x: x(expert), y: TOP, width: wide, height: y(0) - TOP, fill: "transparent" }));
      link.append(svg("rect", { class: "bar", x: x(expert) + (wide - bar) / 2, y: y(load[expert]), width: bar, height: Math.max(0, y(0) - y(load[expert])) }));
      link.append(svg("circle", { cx: x(expert + 0.5), cy: y(importance[expert]), r: Math.min(3.5, 1 + wide / 4) }));
      drawing.append(link);
    }
  } else {
    for (const [values, kind] of [[load, "load"], [importance, "importance"]]) {
      const sorted = values.toSorted((a, b) => b - a);
      drawing.append(svg("path", { class: kind, d: path(sorted.map((_, i) => x(i)), sorted.map(y)) }));
    }
  }
  drawing.append(svg("line", { class: "mean", x1: LEFT, x2: WIDTH - 8, y1: y(1), y2: y(1) }));
  const key = element("div", { class: "key" }, element("span", {}, element("i"), "load"), element("span", { class: "importance" }, element("i"), "importance"));
  return figure("Load and importance", few ? "of each expert, in multiples of the mean; click a bar to choose its expert" : "in multiples of the mean; each curve is sorted separately, the highest first", drawing, key);
}

function barsFigure(title, note, label, xName, counts, right, xTicks = null, mean = null) {
  const { drawing, x, y } = axes(right, 1.05 * largest(counts, 1), label, xName, "tokens", { xTicks });
  const wide = (x(right) - x(0)) / counts.length;
  counts.forEach((count, i) => {
    if (count) drawing.append(svg("rect", { class: "bar", x: x(0) + i * wide + 0.5, y: y(count), width: Math.max(1, wide - 1), height: y(0) - y(count) }, svg("title", {}, whole(count))));
  });
  if (mean !== null) drawing.append(svg("line", { class: "mean", x1: x(mean), x2: x(mean), y1: TOP, y2: y(0) }));
  return figure(title, note, drawing);
}

function entropyFigure(layer) {
  const mean = layer.summary.gate_entropy;
  const note = `0 bits: one expert has all of a token's weight; the dashed line is the mean, ${number(mean)} bits`;
  return barsFigure("Gate entropy", note, `Histogram of gate entropy, mean ${number(mean)} bits.`, "entropy of a token's gate values, in bits", layer.entropy.counts, layer.entropy.high, null, mean);
}

function expertsOfTokenFigure(layer) {
  const last = layer.experts_of_token.at(-1)[0];
  const counts = new Array(last + 1).fill(0);
  for (const [size, count] of layer.experts_of_token) counts[size] = count;
  const places = last <= 16 ? counts.map((_, i) => i) : ticks(last);
  const built = barsFigure("Experts per token", `${number(layer.summary.experts_per_token)} on average`, `Histogram of the number of experts per token, from 0 to ${last}.`, "experts of a token", counts, last + 1, []);
  const drawing = built.querySelector("svg");
  for (const value of places) drawing.append(xTick(LEFT + ((value + 0.5) / (last + 1)) * (WIDTH - LEFT - 8), value));
  return built;
}

function specialisationFigure(layer) {
  const rows = [["read", "about the token that the layer reads"], ["next", "about the token that follows"]].map(([name, title]) => [title, layer.specialisation[name]]);
  const high = 1.05 * Math.max(0.1, ...rows.map(([, found]) => found.bits));
  const label = rows.map(([title, found]) => `${title}: ${number(found.bits)} bits, ${number(found.control_mean)} with permuted experts.`).join(" ");
  const drawing = svg("svg", { class: "specialisation", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  const x = (value) => 6 + (value / high) * (WIDTH - 12);
  rows.forEach(([title, found], i) => {
    const top = 10 + i * 86;
    drawing.append(svg("text", { x: 6, y: top + 8 }, title));
    for (const [value, y, what] of [[found.bits, top + 16, "counted"], [found.control_mean, top + 38, "permuted"]]) {
      drawing.append(svg("rect", { class: what, x: x(0), y, width: Math.max(1, x(value) - x(0)), height: 18 }));
      const spread = what === "permuted" ? ` ± ${number(found.control_std, 4)}` : "";
      const inside = x(value) > WIDTH * 0.55;
      drawing.append(svg("text", { x: inside ? x(value) - 6 : x(value) + 6, y: y + 13, "text-anchor": inside ? "end" : "start", class: inside ? "inside" : "" }, `${what} ${number(value, 3)}${spread}`));
    }
  });
  return figure("What a token's expert tells about the token", "mutual information in bits; permuted: what chance alone would give", drawing);
}

const HISTORY_UNITS = { cv_importance: "standard deviation / mean", cv_load: "standard deviation / mean", max_over_mean_load: "times the mean", dead_experts: "experts" };

// Returns the finite points of each curve of a training.
function historyCurves(layer) {
  const { step, ...curves } = layer.history;
  return Object.entries(curves).map(([name, values]) => ({
    name, title: DATA.history_names[name], digits: name === "dead_experts" ? 0 : 2,
    points: values.map((value, i) => [step[i], value]).filter(([, value]) => value !== null),
  }));
}

// Draws a chart for each curve with at least two points, and shows only the number for other curves.
function historyFigures(layer) {
  const curves = historyCurves(layer), isDrawn = ({ points }) => points.length > 1;
  const charts = curves.filter(isDrawn).map(({ name, title, digits, points }) => {
    const last = points.at(-1)[1], high = 1.08 * (largest(points.map(([, value]) => value)) || 1);
    const { drawing, x, y } = axes(points.at(-1)[0], high, `${title} over the training, ${number(last, digits)} at the end.`, "training step", HISTORY_UNITS[name], { width: 280, height: 160 });
    drawing.append(svg("path", { class: name === "cv_importance" ? "importance" : "load", d: path(points.map(([at]) => x(at)), points.map(([, value]) => y(value))) }));
    return figure(title, `${number(last, digits)} at the end`, drawing);
  });
  const cells = curves.filter((curve) => !isDrawn(curve)).map(({ title, digits, points }) => [title, points.length ? number(points[0][1], digits) : "not finite", ""]);
  return [
    ...(charts.length ? [element("div", { class: "charts small" }, ...charts)] : []),
    ...(cells.length ? [cellList(cells)] : []),
  ];
}

// Returns [red, green, blue] for a multiple of chance, in steps of doublings up to 8 times.
function pairColour(lift) {
  const style = getComputedStyle(document.documentElement);
  const [from, to] = ["--same", lift > 1 ? "--more" : "--less"].map((name) => style.getPropertyValue(name).trim().split(" ").map(Number));
  const strength = Math.min(1, Math.abs(Math.log2(Math.max(lift, 1 / 64))) / 3);
  return from.map((start, i) => Math.round(start + strength * (to[i] - start)));
}

// Draws numbers of experts along an axis of the matrix, and the name of the axis.
function matrixAxis(size, kind, property) {
  const shown = new Set(ticks(size - 1, 10).filter(Number.isInteger));
  return element("div", { class: kind, "aria-hidden": "true" }, ...[...shown].map((expert) => {
    const tick = element("span", { class: "tick" }, `${expert}`);
    tick.style[property] = `${(100 * (expert + 0.5)) / size}%`;
    return tick;
  }));
}

function pairScale() {
  const swatches = [["⅛", 1 / 8], ["¼", 1 / 4], ["½", 1 / 2], ["1", 1], ["2", 2], ["4", 4], ["8×", 8]].map(([name, lift]) => {
    const swatch = element("i");
    swatch.style.backgroundColor = `rgb(${pairColour(lift)})`;
    return element("span", {}, swatch, name);
  });
  return element("div", { class: "scale", role: "img", "aria-label": "Colours from an eighth to 8 times as often as by chance." }, ...swatches);
}

function matrixFigure(layer) {
  const lifts = unpack(layer.coactivation.matrix), size = layer.num_experts;
  const cell = Math.max(3, Math.floor(520 / size));
  const canvas = element("canvas", { width: size * cell, height: size * cell, role: "img", "aria-label": `Matrix of ${size} by ${size} experts: how much more often than by chance two of them get the same token. The table beside it lists the strongest pairs.` });
  const told = element("p", { class: "note", role: "status" }, "Point at a cell to read its number; click it to choose its row's expert.");
  const scale = element("div");
  const draw = () => {
    const context = canvas.getContext("2d");
    const empty = getComputedStyle(document.documentElement).getPropertyValue("--card").trim();
    scale.replaceChildren(pairScale());
    for (let i = 0; i < size; i++)
      for (let j = 0; j < size; j++) {
        const lift = lifts[i * size + j];
        context.fillStyle = i === j || Number.isNaN(lift) ? empty : `rgb(${pairColour(lift)})`;
        context.fillRect(j * cell, i * cell, cell, cell);
      }
  };
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const place = (value, extent) => Math.max(0, Math.min(size - 1, Math.floor((value / extent) * size)));
    return [place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width)];
  };
  canvas.addEventListener("mousemove", (event) => {
    const [i, j] = at(event), lift = lifts[i * size + j];
    told.textContent = i === j ? `expert ${i}` : Number.isNaN(lift) ? `experts ${i} and ${j}: none expected` : `experts ${i} and ${j}: ${number(lift)} times as often as by chance`;
  });
  canvas.addEventListener("click", (event) => chooseExpert(at(event)[0], { reveal: true }));
  matchMedia("(prefers-color-scheme: dark)").onchange = draw;
  draw();
  const matrix = element("div", { class: "matrix" },
    element("span", { class: "axis upright" }, "expert"), matrixAxis(size, "rows-axis", "top"), canvas,
    matrixAxis(size, "columns-axis", "left"), element("span", { class: "axis level" }, "expert"));
  return figure("All pairs", "tokens that two experts share, as a multiple of what chance gives: green is more, purple is less", matrix, scale, told);
}
