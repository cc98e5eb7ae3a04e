// The table of experts, the card of one expert, the box of one token.
const ROWS = 25;

function findExperts() {
  const layer = state.layer, query = byId("search").value.trim().toLowerCase();
  let found = Array.from(layer.load, (_, expert) => expert);
  const key = { id: (e) => e, load: (e) => layer.load[e], importance: (e) => layer.importance[e], gate: (e) => layer.meanGate(e) }[byId("sort").value];
  const sign = byId("descending").checked ? -1 : 1;
  const byNumber = query.match(/^#?(\d+)$/), byGroup = layer.group_size && query.match(/^g(?:roup)?\s*(\d+)$/);
  if (byGroup) found = found.filter((expert) => layer.groupOf(expert) === +byGroup[1]);
  else if (query.startsWith("#") && byNumber) found = found.filter((expert) => expert === +byNumber[1]);
  else if (query) {
    const texts = layer.searchTexts();
    found = found.filter((expert) => texts[expert].includes(query) || (byNumber && expert === +byNumber[1]));
  }
  found.sort((a, b) => sign * (key(a) - key(b)) || a - b);
  if (byNumber && found.includes(+byNumber[1])) found = [+byNumber[1], ...found.filter((expert) => expert !== +byNumber[1])];
  state.found = found;
  byId("found").textContent = found.length === layer.num_experts ? `${whole(found.length)} experts` : `${whole(found.length)} of ${whole(layer.num_experts)} experts`;
  showPage(0);
}

function showPage(page) {
  const layer = state.layer, pages = Math.max(1, Math.ceil(state.found.length / ROWS));
  state.page = Math.max(0, Math.min(page, pages - 1));
  byId("page").value = state.page + 1;
  byId("page").max = pages;
  byId("pages").textContent = whole(pages);
  byId("previous-page").disabled = state.page === 0;
  byId("next-page").disabled = state.page === pages - 1;
  const highest = largest(layer.load, 1) / layer.meanLoad;
  const rows = state.found.slice(state.page * ROWS, (state.page + 1) * ROWS).map((expert) => {
    const load = layer.load[expert] / layer.meanLoad;
    const words = layer.typical(expert).map((found) => element("span", {}, wordLabel(DATA.vocabulary.texts[found.words])));
    const name = element("th", { scope: "row" }, expertButton(expert, null, "link"));
    if (layer.group_size) name.append(element("small", {}, ` g${layer.groupOf(expert)}`));
    return element(
      "tr", { "data-expert": String(expert), class: expert === state.expert ? "chosen" : "" }, name,
      element("td", {}, `${number(load)}×`, meter(load / highest)),
      element("td", {}, `${number(layer.importance[expert] / layer.meanImportance)}×`),
      element("td", {}, number(layer.meanGate(expert))),
      element("td", { class: "words tokens" }, ...words),
    );
  });
  if (!rows.length) rows.push(element("tr", {}, element("td", { colSpan: 5 }, "No expert has this in its contexts or typical tokens.")));
  byId("table").tBodies[0].replaceChildren(...rows);
}

function chooseExpert(expert, { reveal = false } = {}) {
  state.expert = expert;
  closeToken(false);
  showExpert();
  markPassage();
  for (const row of byId("table").tBodies[0].rows) row.classList.toggle("chosen", row.dataset.expert === String(expert));
  for (const link of document.querySelectorAll("svg a[data-expert]")) link.querySelector(".bar").classList.toggle("chosen", link.dataset.expert === String(expert));
  history.replaceState(null, "", `#${encodeURIComponent(state.layer.name)}/${expert}`);
  if (!reveal) return;
  const card = byId("expert"), box = card.getBoundingClientRect();
  if (box.top > 0.7 * innerHeight || box.bottom < 0.3 * innerHeight) card.scrollIntoView({ block: "start" });
  card.focus({ preventScroll: true });
}

function contextLine({ place, gate }) {
  const [first, last] = state.layer.side.context(place);
  const left = element("span"), right = element("span", { class: "right" });
  for (let i = first; i < place; i++) left.append(tokenButton(i));
  for (let i = place + 1; i <= last; i++) right.append(tokenButton(i));
  const text = state.layer.side.text(place), space = /^ +\S/.test(text) ? text.match(/^ +/)[0] : "";
  left.append(space); // so that only the word is marked
  const middle = tokenButton(place, text.slice(space.length), " middle");
  markToken(middle, gate);
  const gateLabel = element("span", { class: "gate", title: "gate value G(x)" }, number(gate));
  return oneTabStop(element("li", { class: "tokens" }, gateLabel, element("span", { class: "left" }, left), middle, right), middle);
}

function showExpert() {
  const layer = state.layer, expert = state.expert, contexts = layer.contextsOf(expert);
  const step = (by, label, text) => element("button", { type: "button", class: "step", "data-expert": String((expert + by + layer.num_experts) % layer.num_experts), "aria-label": label }, text);
  const parts = [
    element("div", { class: "heading" }, element("h3", { id: "expert-title" }, `Expert ${expertName(layer, expert)}`), step(-1, "previous expert", "‹"), step(1, "next expert", "›")),
    element("p", { class: "note" }, `Load: ${whole(layer.load[expert])} tokens, ${number(layer.load[expert] / layer.meanLoad)} times the mean. Importance: ${number(layer.importance[expert])}, ${number(layer.importance[expert] / layer.meanImportance)} times the mean. Mean gate value: ${number(layer.meanGate(expert))}.`),
    element("h4", {}, "Where its gate value is highest"),
  ];
  parts.push(contexts.length ? element("ul", { class: "contexts" }, ...contexts.map(contextLine)) : element("p", {}, "This expert got no token of the text."));
  const typical = layer.typical(expert).map(({ words, hits }) =>
    element("span", { class: "chip tokens" }, wordLabel(DATA.vocabulary.texts[words]), " ", element("small", {}, `${whole(hits)} of ${whole(layer.wordCounts[words])}`)));
  if (typical.length) parts.push(element("h4", {}, "Typical tokens: how many of each came to this expert"), element("div", { class: "chips" }, ...typical));
  const partners = layer.partners(expert).map(({ experts, lifts }) => expertButton(experts, `${number(lifts, 1)}×`));
  if (partners.length) parts.push(element("h4", {}, "Shares tokens more often than by chance with"), element("div", { class: "chips" }, ...partners));
  byId("expert").replaceChildren(...parts);
}

// The box with a token's experts, placed at the token.
function showToken(button) {
  const layer = state.layer, place = +button.dataset.place, word = layer.side.tokens[place];
  const found = layer.expertsAt(place), more = layer.numUsed[place] - found.length;
  const close = element("button", { type: "button", class: "close", "aria-label": "close" }, "×");
  close.onclick = () => closeToken(true);
  const rows = found.map(({ expert, gate }) => element("li", {}, expertButton(expert, layer.group_size ? `g${layer.groupOf(expert)}` : "", "link"), meter(gate), element("span", {}, number(gate, 3))));
  const where = layer.favourites(word).map(({ experts, hits }) => expertButton(experts, percent(hits / layer.wordCounts[word])));
  const box = byId("token");
  const parts = [
    close,
    element("h3", { id: "token-title", class: "tokens" }, `“${wordLabel(layer.side.text(place))}”`),
    element("p", {}, `Token ${whole(layer.side.positions[place])} of the text. Its experts, with their gate values:`),
    found.length ? element("ul", {}, ...rows) : element("p", {}, "It has no expert: its score is below every expert's threshold."),
    more > 0 ? element("p", {}, `and ${more} more experts with lower gate values`) : null,
    element("h4", {}, `${whole(layer.wordCounts[word])} times in the text; the experts that got it most often`),
    element("div", { class: "chips" }, ...where),
  ];
  box.replaceChildren(...parts.filter((part) => part !== null));
  for (const token of document.querySelectorAll(".token.chosen")) token.classList.remove("chosen");
  button.classList.add("chosen");
  box.hidden = false;
  // Below the token, or above it if there is not enough room, or else wherever there is room.
  const at = button.getBoundingClientRect(), height = box.offsetHeight;
  let top = at.bottom + 8;
  if (top + height > innerHeight - 8) top = at.top - height - 8;
  if (top < 8) top = Math.max(8, innerHeight - height - 8);
  box.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - box.offsetWidth - 8)) + scrollX}px`;
  box.style.top = `${top + scrollY}px`;
  state.opener = button;
  box.focus({ preventScroll: true });
}

function closeToken(giveFocusBack) {
  if (byId("token").hidden) return;
  byId("token").hidden = true;
  state.opener?.classList.remove("chosen");
  if (giveFocusBack && state.opener?.isConnected) state.opener.focus({ preventScroll: true });
}
