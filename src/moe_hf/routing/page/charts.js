// Charts as SVG; the matrix of pairs, which has many cells, as a canvas.
const WIDTH = 400, HEIGHT = 190, LEFT = 40, BOTTOM = 24, TOP = 8;

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

// Axes from 0 to `right` and 0 to `high`; returns the drawing and the scales.
function axes(right, high, label, { xTicks = null, width = WIDTH, height = HEIGHT } = {}) {
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const x = (value) => LEFT + (value / (right || 1)) * (width - LEFT - 8);
  const y = (value) => height - BOTTOM - (value / (high || 1)) * (height - BOTTOM - TOP);
  for (const value of ticks(high)) {
    drawing.append(svg("line", { class: "grid", x1: LEFT, x2: width - 8, y1: y(value), y2: y(value) }));
    drawing.append(svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of xTicks ?? ticks(right))
    drawing.append(svg("text", { x: x(value), y: height - 8, "text-anchor": "middle" }, short(value)));
  return { drawing, x, y };
}

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
  const { drawing, x, y } = axes(layer.num_experts, high, label, { xTicks: [] });
  for (const value of new Set(xTicks)) drawing.append(svg("text", { x: x(value + middle), y: HEIGHT - 8, "text-anchor": "middle" }, short(value)));
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
  return figure("Load and importance", few ? "times the mean, by expert number; a click shows the expert" : "times the mean, each sorted by itself, the highest first", drawing, key);
}

function barsFigure(title, note, label, counts, right, xTicks = null, mean = null) {
  const { drawing, x, y } = axes(right, 1.05 * largest(counts, 1), label, { xTicks });
  const wide = (x(right) - x(0)) / counts.length;
  counts.forEach((count, i) => {
    if (count) drawing.append(svg("rect", { class: "bar", x: x(0) + i * wide + 0.5, y: y(count), width: Math.max(1, wide - 1), height: y(0) - y(count) }, svg("title", {}, whole(count))));
  });
  if (mean !== null) drawing.append(svg("line", { class: "mean", x1: x(mean), x2: x(mean), y1: TOP, y2: y(0) }));
  return figure(title, note, drawing);
}

function entropyFigure(layer) {
  const mean = layer.summary.gate_entropy;
  const note = `tokens by the entropy of their gate values, in bits; the dashed line is the mean, ${number(mean)}`;
  return barsFigure("Gate entropy", note, `Histogram of gate entropy, mean ${number(mean)} bits.`, layer.entropy.counts, layer.entropy.high, null, mean);
}

function expertsOfTokenFigure(layer) {
  const last = layer.experts_of_token.at(-1)[0];
  const counts = new Array(last + 1).fill(0);
  for (const [size, count] of layer.experts_of_token) counts[size] = count;
  const places = last <= 16 ? counts.map((_, i) => i) : ticks(last);
  const built = barsFigure("Experts of a token", `tokens by their number of experts; ${number(layer.summary.experts_per_token)} on average`, `Histogram of the number of experts of a token, from 0 to ${last}.`, counts, last + 1, []);
  const drawing = built.querySelector("svg");
  for (const value of places) drawing.append(svg("text", { x: LEFT + ((value + 0.5) / (last + 1)) * (WIDTH - LEFT - 8), y: HEIGHT - 8, "text-anchor": "middle" }, short(value)));
  return built;
}

function specialisationFigure(layer) {
  const rows = [["read", "the token read"], ["next", "the token after it"]].map(([name, title]) => [title, layer.specialisation[name]]);
  const high = 1.05 * Math.max(0.1, ...rows.map(([, found]) => found.bits));
  const label = rows.map(([title, found]) => `${title}: ${number(found.bits)} bits, ${number(found.control_mean)} with permuted experts.`).join(" ");
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  const x = (value) => 6 + (value / high) * (WIDTH - 12);
  rows.forEach(([title, found], i) => {
    const top = 10 + i * 86;
    drawing.append(svg("text", { x: 6, y: top + 8 }, title));
    for (const [value, y, kind, what] of [[found.bits, top + 16, "var(--accent)", "counted"], [found.control_mean, top + 38, "var(--soft)", "permuted"]]) {
      drawing.append(svg("rect", { x: x(0), y, width: Math.max(1, x(value) - x(0)), height: 18, fill: kind }));
      const spread = what === "permuted" ? ` ± ${number(found.control_std, 4)}` : "";
      const inside = x(value) > WIDTH * 0.55;
      drawing.append(svg("text", { x: inside ? x(value) - 6 : x(value) + 6, y: y + 13, "text-anchor": inside ? "end" : "start", style: inside ? "fill: var(--card)" : "" }, `${what} ${number(value, 3)}${spread}`));
    }
  });
  return figure("What the expert tells about the token", "bits of mutual information, and what is left of them when the experts are permuted", drawing);
}

function historyFigures(layer) {
  const { step, ...curves } = layer.history;
  return Object.entries(curves).map(([name, values]) => {
    const known = values.map((value, i) => [step[i], value]).filter(([, value]) => value !== null);
    const last = known.length ? known.at(-1)[1] : NaN;
    const title = DATA.history_names[name];
    const high = 1.08 * (largest(known.map(([, value]) => value)) || 1);
    const { drawing, x, y } = axes(step.at(-1), high, `${title} over the training, ${number(last)} at the end.`, { width: 280, height: 140 });
    if (known.length === 1) drawing.append(svg("circle", { cx: x(known[0][0]), cy: y(known[0][1]), r: 3 }));
    drawing.append(svg("path", { class: "load", d: path(known.map(([at]) => x(at)), known.map(([, value]) => y(value))) }));
    return figure(title, `by training step; ${number(last, name === "dead_experts" ? 0 : 2)} at the end`, drawing);
  });
}

// More than by chance is orange, less is blue, in steps of doublings up to 8 times.
function pairColour(lift, dark) {
  const strength = Math.min(1, Math.abs(Math.log2(Math.max(lift, 1 / 64))) / 3);
  const [from, to] = dark ? [[35, 43, 55], lift > 1 ? [255, 157, 87] : [90, 150, 255]] : [[243, 244, 246], lift > 1 ? [180, 84, 10] : [31, 95, 191]];
  return from.map((start, i) => Math.round(start + strength * (to[i] - start)));
}

function matrixFigure(layer) {
  const lifts = unpack(layer.coactivation.matrix), size = layer.num_experts;
  const cell = Math.max(3, Math.floor(520 / size));
  const canvas = element("canvas", { width: size * cell, height: size * cell, role: "img", "aria-label": `Matrix of ${size} by ${size} experts: how much more often than by chance two of them get the same token. The table beside it lists the strongest pairs.` });
  const told = element("p", { class: "note", role: "status" }, "Point at a cell.");
  const draw = () => {
    const context = canvas.getContext("2d"), dark = matchMedia("(prefers-color-scheme: dark)").matches;
    for (let i = 0; i < size; i++)
      for (let j = 0; j < size; j++) {
        const lift = lifts[i * size + j];
        context.fillStyle = i === j || Number.isNaN(lift) ? (dark ? "#12161d" : "#ffffff") : `rgb(${pairColour(lift, dark)})`;
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
  return figure("All pairs", "orange: together more often than by chance, blue: less often; full colour from 8 times on", canvas, told);
}
