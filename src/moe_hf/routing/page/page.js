// The state of the page, and the actions of clicks and keys.
const state = { layer: null, expert: 0, found: [], page: 0, opener: null };
const PASSAGE_ROW = 200; // number of tokens added to the page at once

const TERMS = {
  "Gate value": "The weight G(x) that the gate gives to an expert for a token. It is 0 for the experts that the gate did not pick, and the gate values of a token that has experts add up to 1.",
  "Load": "The number of tokens for which an expert has a gate value above 0.",
  "Importance": "The sum of an expert's gate values over all tokens read (equation 6 of the paper).",
  "Mean gate value": "An expert's importance divided by its load: the average weight of the expert where it is used.",
  "CV": "Coefficient of variation: the standard deviation over the experts, divided by the mean. 0 is perfect balance. At the top of the page CV is taken over the whole text at once; in the training's history it is taken batch by batch.",
  "Max/mean load": "The load of the busiest expert, divided by the mean load. With experts on several devices, the others wait for the busiest.",
  "Gate entropy": "−Σ G log₂ G of a token's gate values, in bits. It is 0 if one expert has all the weight, and log₂ k if k experts share the weight evenly. The mean is over the tokens that have experts.",
  "Effective experts": "2 to the power of the entropy of the experts' shares of the importance. In perfect balance this equals the number of experts; the fewer experts do most of the work, the lower it is.",
  "Specialisation": "Mutual information, in bits, between a token's strongest expert and the token that the layer reads, or the one that follows. Each of the 255 most frequent tokens is a class, and all other tokens together are one more. Mutual information counted in a finite text is above 0 even by chance. So the experts are permuted among the tokens ten times and counted again, which gives a mean ± standard deviation. The number at the top of the page is the count minus that mean. Gates with random weights separate tokens too. To see what the training added, compare with an untrained model.",
  "Pairs by chance": "How often two experts would get the same token if pairs formed at random in proportion to the experts' loads, with as many pairs in all as there were. A hierarchical gate picks several experts of one group by design. Pairs inside a group and pairs across groups are therefore compared separately.",
  "Where the gate value is highest": "The places with the highest gate values of an expert, as in table 9 of the paper. The marked token is the one that the layer reads there. Places with the same words around them are shown once. Of equal gate values the earlier place comes first.",
  "Typical tokens": "Tokens that come to an expert more often than the expert's load would give by chance, sorted by (observed − expected) / √expected. “3 of 5” means that 3 of the token's 5 occurrences came to this expert.",
};

// Describes the number of experts of a token, such as "2 of 16 experts".
function expertsOfToken({ summary, num_experts, experts_per_token }) {
  if (experts_per_token === num_experts && DATA.facts.gating !== "strictly_balanced") return `all ${whole(num_experts)} experts`;
  const mean = summary.experts_per_token, isWhole = Number.isInteger(mean);
  if (DATA.facts.gating === "strictly_balanced") return `on average ${whole(experts_per_token)} of ${whole(num_experts)} experts in training, and ${number(mean, isWhole ? 0 : 2)} in this text`;
  return `${whole(experts_per_token)} of ${whole(num_experts)} experts`;
}

function showLayerFacts() {
  const { side, num_experts, group_size } = state.layer;
  const place = { encoder: " of the encoder, which reads the sources", decoder: " of the decoder, which reads the translations", "": "" }[side.name];
  const groups = group_size ? ` The gate is hierarchical: it first picks among ${whole(num_experts / group_size)} groups of experts.` : "";
  const choice = DATA.layers.length > 1 ? " Another layer can be chosen here:" : "";
  byId("layer-facts").textContent = `All figures are of layer ${state.layer.name}${place}. The gate gives each token ${expertsOfToken(state.layer)}.${groups}${choice}`;
}

function showSummary() {
  const { summary, num_experts, experts_per_token, group_size, specialisation } = state.layer;
  const told = specialisation.read.bits - specialisation.read.control_mean;
  const gate = { noisy_top_k: "noisy top-k", softmax_top_k: "softmax top-k", softmax: "dense softmax", strictly_balanced: "strictly balanced" }[DATA.facts.gating];
  const cells = [
    ["tokens read", whole(summary.tokens), summary.without_expert ? `${whole(summary.without_expert)} without an expert` : ""],
    ["experts", whole(num_experts), group_size ? `in ${num_experts / group_size} groups, ${gate} gate` : `${gate} gate`],
    ["experts per token", number(summary.experts_per_token, Number.isInteger(summary.experts_per_token) ? 0 : 2), `mean; k = ${experts_per_token}`],
    ["CV(Importance)", number(summary.cv_importance), "0 is perfect balance"],
    ["CV(Load)", number(summary.cv_load ?? 0), "0 is perfect balance"],
    ["max/mean load", number(summary.max_over_mean_load ?? 0), "1 is perfect balance"],
    ["experts without a token", whole(summary.dead_experts ?? num_experts), `of ${whole(num_experts)}`],
    ["gate entropy", `${number(summary.gate_entropy)} bits`, `${number(Math.log2(experts_per_token))} if k experts share evenly`],
    ["effective experts", number(summary.effective_experts, 1), `of ${whole(num_experts)}`],
    ["specialisation", `${number(told)} bits`, `the token itself has ${number(specialisation.read.class_entropy)} bits`],
  ];
  byId("summary").replaceChildren(cellList(cells));
}

function showPairs() {
  const pairs = state.layer.coactivation;
  byId("pairs-section").hidden = !pairs;
  if (!pairs) return;
  const missed = pairs.missed ? ` Rare pairs were dropped to save memory, so a count may be too low by up to ${whole(pairs.missed)}.` : "";
  byId("pairs-note").textContent = `How often two experts got the same token, compared with pairs formed by chance.${missed}`;
  const head = ["experts", "tokens shared", "by chance", "ratio"].map((name) => element("th", { scope: "col" }, name));
  const rows = pairs.top.map(([first, second, count, expected]) => element("tr", {},
    element("td", {}, expertButton(first, null, "link"), " + ", expertButton(second, null, "link")),
    element("td", {}, whole(count)), element("td", {}, rounded(expected)), element("td", {}, `${rounded(count / expected)}×`)));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  const scroll = element("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "pairs of experts furthest above chance" }, table);
  scroll.style.maxHeight = "38rem";
  scroll.style.overflowY = "auto";
  const contents = rows.length ? [scroll] : [element("p", {}, "No two experts share more tokens than chance gives.")];
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

// Colours the passage's tokens that came to the chosen expert, more strongly for higher gate values.
function markPassage() {
  let hits = 0;
  for (const token of byId("passage").querySelectorAll(".token")) {
    const gate = state.layer.gateAt(+token.dataset.place, state.expert);
    markToken(token, gate);
    hits += gate > 0;
  }
  const side = state.layer.side, what = { encoder: "sources", decoder: "translations, as the decoder reads them", "": "text" }[side.name];
  byId("passage-note").textContent = `The first ${whole(side.passage)} of ${whole(side.length)} tokens of the ${what}. The ${whole(hits)} tokens that came to expert ${state.expert} are orange, the stronger the higher the gate value. Click a token to see its experts; the arrow keys move between tokens.`;
}

function chooseLayer(index, expert = null) {
  state.number = index;
  state.layer = layerNumber(index);
  byId("layers").querySelectorAll("input")[index].checked = true;
  const busiest = state.layer.load.indexOf(largest(state.layer.load));
  showLayerFacts();
  showSummary();
  const charts = [balanceFigure(state.layer), entropyFigure(state.layer), specialisationFigure(state.layer)];
  if (state.layer.experts_of_token.length > 1) charts.push(expertsOfTokenFigure(state.layer));
  byId("balance").replaceChildren(...charts);
  showHistory();
  showPairs();
  showPassage();
  state.expert = expert ?? busiest;
  findExperts();
  chooseExpert(state.expert);
}

function showHistory() {
  const { history } = state.layer;
  byId("history-section").hidden = !history;
  if (!history) return;
  const when = history.step.length > 1 ? "Each point is the mean over the training batches since the last log" : `The training logged once, at step ${whole(history.step[0])}. Each number is the mean over the batches up to there`;
  byId("history-note").textContent = `${when}, with gating noise (from expert_history.csv).`;
  byId("history").replaceChildren(...historyFigures(state.layer));
}

// Reads a fragment such as "#encoder.layers.1/17" of a link to this page.
function fromAddress() {
  const [name, expert] = decodeURIComponent(location.hash.slice(1)).split("/");
  const found = DATA.layers.findIndex((layer) => layer.name === name);
  const known = found >= 0 && /^\d+$/.test(expert ?? "") && +expert < DATA.layers[found].num_experts;
  return [Math.max(0, found), known ? +expert : null];
}

function start() {
  const { model, files, version } = DATA.facts;
  byId("facts").textContent = `Model: ${model}. Text: ${files.join(", ")}. Written by moe_hf ${version}.`;
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
    if (step) byId("expert").querySelector(`.step[aria-label="${step}"]`).focus(); // the button was drawn again
  }
  else if (!event.target.closest("#token")) closeToken(false);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeToken(true);
});
window.addEventListener("hashchange", () => chooseLayer(...fromAddress()));
start();
