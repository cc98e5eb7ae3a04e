// What is shown, and what a click or a key does.
const state = { layer: null, expert: 0, found: [], page: 0, opener: null };
const PASSAGE_ROW = 200; // tokens that are put on the page at once

const TERMS = {
  "Importance": "The sum of the gate values G(x) that an expert got, over all tokens read (equation 6 of the paper).",
  "Load": "The number of tokens that came to an expert, those with a gate value above 0.",
  "CV": "Coefficient of variation: the standard deviation of the importance (or load) over the experts, divided by its mean. 0 is perfect balance. Here it is taken over the whole text at once, in the training's log batch by batch.",
  "Max/mean load": "The tokens of the busiest expert over those of the average one: what the slowest device would wait for.",
  "Gate entropy": "Of a token's gate values, −Σ G log₂ G, in bits: 0 if one expert has all the weight, log₂ k if k experts share it evenly. The mean is over the tokens that have experts.",
  "Effective experts": "2 to the entropy of the experts' shares of the importance: how many equally used experts would be as varied. In perfect balance it is the number of experts.",
  "Mean gate": "An expert's importance over its load: the weight it has on average where it is used.",
  "Specialisation": "Mutual information, in bits, between the strongest expert of a token and the token that the layer reads, or the one that follows it. The 255 most frequent tokens are a class each, all others are one. Such a count is above 0 by chance, so the experts are permuted among the tokens ten times and counted again (mean ± standard deviation); the difference of the two is what the experts really tell, and the number at the top of the page. Gates with random weights part the tokens too, as they read them: what the training added is the difference to an untrained model.",
  "Pairs by chance": "How often two experts would get the same token if pairs formed at random in proportion to the experts' loads, as many pairs in all as there were. A hierarchical gate takes several experts of one group by construction, so pairs inside a group and pairs across groups are compared separately.",
  "Contexts": "The places of the text where the expert's gate value is highest, as in table 9 of the paper; the token in the middle is the one that the layer reads there. Places with the same words around them are shown once, and of equal values (a token's only expert has 1) the first of the text.",
  "Typical tokens": "Those that come to an expert more often than its load would give, sorted by (observed − expected) / √expected; “3 of 5” means that 3 of its 5 occurrences came to this expert.",
};

function showSummary() {
  const { summary, num_experts, experts_per_token, group_size, specialisation } = state.layer;
  const told = specialisation.read.bits - specialisation.read.control_mean;
  const gate = { noisy_top_k: "noisy top-k", softmax_top_k: "softmax top-k", softmax: "dense softmax", strictly_balanced: "strictly balanced" }[DATA.facts.gating];
  const cells = [
    ["tokens read", whole(summary.tokens), summary.without_expert ? `${whole(summary.without_expert)} without an expert` : ""],
    ["experts", whole(num_experts), group_size ? `in ${num_experts / group_size} groups, ${gate}` : gate],
    ["experts of a token", number(summary.experts_per_token, Number.isInteger(summary.experts_per_token) ? 0 : 2), `k = ${experts_per_token}`],
    ["CV(Importance)", number(summary.cv_importance), "0 is perfect balance"],
    ["CV(Load)", number(summary.cv_load ?? 0), "0 is perfect balance"],
    ["max/mean load", number(summary.max_over_mean_load ?? 0), "1 is perfect balance"],
    ["without a token", whole(summary.dead_experts ?? num_experts), `of ${whole(num_experts)} experts`],
    ["gate entropy", `${number(summary.gate_entropy)} bits`, `at most ${number(Math.log2(experts_per_token))} for k experts`],
    ["effective experts", number(summary.effective_experts, 1), `of ${whole(num_experts)}`],
    ["specialisation", `${number(told)} bits`, `of ${number(specialisation.read.class_entropy)} that a token has`],
  ];
  byId("summary").replaceChildren(...cells.map(([name, value, extra]) => element("div", {}, element("dt", {}, name), element("dd", {}, value), element("dd", { class: "extra" }, extra))));
}

function showPairs() {
  const pairs = state.layer.coactivation;
  byId("pairs-section").hidden = !pairs;
  if (!pairs) return;
  const missed = pairs.missed ? ` Rare pairs were forgotten for want of memory: a count may be too low by up to ${whole(pairs.missed)}.` : "";
  byId("pairs-note").textContent = `How often two experts got the same token, against pairs formed by chance.${missed}`;
  const head = ["experts", "tokens shared", "by chance", "ratio"].map((name) => element("th", { scope: "col" }, name));
  const rows = pairs.top.map(([first, second, count, expected]) => element("tr", {},
    element("td", {}, expertButton(first, null, "link"), " + ", expertButton(second, null, "link")),
    element("td", {}, whole(count)), element("td", {}, rounded(expected)), element("td", {}, `${rounded(count / expected)}×`)));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  const scroll = element("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "pairs of experts furthest above chance" }, table);
  scroll.style.maxHeight = "38rem";
  scroll.style.overflowY = "auto";
  const contents = rows.length ? [scroll] : [element("p", {}, "No two experts share more tokens than by chance.")];
  byId("pairs").classList.toggle("single", !pairs.matrix);
  byId("pairs").replaceChildren(...(pairs.matrix ? [matrixFigure(state.layer)] : []), ...contents);
}

function showPassage() {
  const side = state.layer.side, passage = byId("passage");
  const rows = [];
  for (let start = 0; start < side.passage; start += PASSAGE_ROW) {
    const row = element("span");
    for (let place = start; place < Math.min(start + PASSAGE_ROW, side.passage); place++) {
      if (place && side.isStart[place]) row.append(element("br"));
      row.append(tokenButton(place));
      if (side === sides[""] && SPECIAL.has(side.tokens[place])) row.append(element("br")); // the end of a line
    }
    rows.push(row);
  }
  passage.replaceChildren(...rows);
  oneTabStop(passage);
}

// Colours the tokens of the passage that come to the chosen expert, the stronger the higher the gate value.
function markPassage() {
  let hits = 0;
  for (const token of byId("passage").querySelectorAll(".token")) {
    const gate = state.layer.gateAt(+token.dataset.place, state.expert);
    token.style.background = gate ? `rgb(var(--mark) / ${0.15 + 0.6 * gate})` : "";
    hits += gate > 0;
  }
  const side = state.layer.side, what = { encoder: "sources", decoder: "targets, as the decoder reads them", "": "text" }[DATA.layers[state.number].side];
  byId("passage-note").textContent = `The first ${whole(side.passage)} of ${whole(side.length)} tokens of the ${what}. Coloured: the ${whole(hits)} that come to expert ${state.expert}. A click on a token shows its experts; the arrow keys move between tokens.`;
}

function chooseLayer(index, expert = null) {
  state.number = index;
  state.layer = layerNumber(index);
  byId("layers").querySelectorAll("input")[index].checked = true;
  const busiest = state.layer.load.indexOf(largest(state.layer.load));
  showSummary();
  const charts = [balanceFigure(state.layer), entropyFigure(state.layer), specialisationFigure(state.layer)];
  if (state.layer.experts_of_token.length > 1) charts.push(expertsOfTokenFigure(state.layer));
  byId("balance").replaceChildren(...charts);
  byId("history-section").hidden = !state.layer.history;
  if (state.layer.history) byId("history").replaceChildren(...historyFigures(state.layer));
  showPairs();
  showPassage();
  state.expert = expert ?? busiest;
  findExperts();
  chooseExpert(state.expert);
}

// "#encoder.layers.1/17", which a link to this page may have.
function fromAddress() {
  const [name, expert] = decodeURIComponent(location.hash.slice(1)).split("/");
  const found = DATA.layers.findIndex((layer) => layer.name === name);
  const known = found >= 0 && /^\d+$/.test(expert ?? "") && +expert < DATA.layers[found].num_experts;
  return [Math.max(0, found), known ? +expert : null];
}

function start() {
  const { model, files, version } = DATA.facts;
  byId("facts").textContent = `${model} on ${files.join(", ")} — moe_hf ${version}`;
  document.title = `Routing report: ${model}`;
  byId("layers").replaceChildren(...DATA.layers.map((layer, i) => element("label", {}, element("input", { type: "radio", name: "layer", value: String(i) }), layer.name)));
  byId("terms").replaceChildren(...Object.entries(TERMS).flatMap(([term, meaning]) => [element("dt", {}, term), element("dd", {}, meaning)]));
  chooseLayer(...fromAddress());
}

byId("layers").addEventListener("change", (event) => chooseLayer(+event.target.value));
let waiting = 0;
byId("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(findExperts, 120);
});
byId("sort").addEventListener("change", (event) => {
  byId("descending").checked = event.target.value !== "id";
  findExperts();
});
byId("descending").addEventListener("change", findExperts);
byId("previous-page").addEventListener("click", () => showPage(state.page - 1));
byId("next-page").addEventListener("click", () => showPage(state.page + 1));
byId("page").addEventListener("change", (event) => showPage(+event.target.value - 1 || 0));
document.addEventListener("click", (event) => {
  const token = event.target.closest(".token"), expert = event.target.closest("[data-expert]");
  if (token) showToken(token);
  else if (expert) {
    const step = expert.matches(".step") ? expert.getAttribute("aria-label") : null;
    chooseExpert(+expert.dataset.expert, { reveal: !step && (!expert.closest("#table") || innerWidth <= 1120) });
    if (step) byId("expert").querySelector(`.step[aria-label="${step}"]`).focus(); // the button was drawn anew
  }
  else if (!event.target.closest("#token")) closeToken(false);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeToken(true);
});
window.addEventListener("hashchange", () => chooseLayer(...fromAddress()));
start();
