// Elements of the page. Text from the data becomes text nodes only, never markup.
const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in made && typeof value !== "string") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const number = (value, digits = 2) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
// Formats a number with three significant digits, or with all digits before the point if there are more.
const rounded = (value) => (value >= 100 ? whole(value) : value.toLocaleString("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 }));
const whole = (value) => Math.round(value).toLocaleString("en");
const percent = (share) => (share > 0 && share < 0.005 ? "<1 %" : `${Math.round(100 * share)} %`);

// Returns a token's text with invisible characters made visible; inside a text, spaces stay spaces.
function visible(text, isInText = false) {
  if (text === "") return "·"; // a part of a character that the token before shows
  if (!isInText && /^ +$/.test(text)) return "␣".repeat(text.length);
  return text.replaceAll("\n", "⏎").replaceAll("\r", "␍").replaceAll("\t", "⇥");
}

// The text of a single token: "dog" begins a word and "‑ing" continues one, if the tokenizer marks this.
const hasWordStarts = DATA.vocabulary.texts.some((text) => /^ \S/.test(text));
const hasWordParts = DATA.vocabulary.texts.some((text) => /^\p{L}/u.test(text));
function wordLabel(text) {
  const mark = hasWordStarts && hasWordParts && /^\p{L}/u.test(text) ? "\u2011" : "";
  return mark + visible(/\S/.test(text) ? text.trim() : text);
}

// A span instead of a button, because a line could break beside a button inside a word.
function tokenButton(place, text = state.layer.side.text(place), kind = "") {
  const side = state.layer.side, shown = visible(text, kind === "");
  const special = SPECIAL.has(side.tokens[place]) ? " special" : "";
  const made = element("span", { role: "button", class: `token${special}${kind}`, "data-place": String(place), tabIndex: -1 }, shown);
  if (!/\S/.test(shown)) made.setAttribute("aria-label", "space");
  return made;
}

// Each row of tokens is one stop of the tab key, and the arrow keys move inside the row.
function oneTabStop(row, token = row.querySelector(".token")) {
  row.setAttribute("data-tokens", "");
  if (token) token.tabIndex = 0;
  return row;
}

document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!event.target.matches?.(".token")) return;
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    event.target.click();
  }
  if (!step) return;
  const tokens = [...event.target.closest("[data-tokens]").querySelectorAll(".token")];
  const next = tokens[tokens.indexOf(event.target) + step];
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  event.preventDefault();
});

function expertName(layer, expert) {
  const group = layer.groupOf(expert);
  return group === null ? `${expert}` : `${expert} (group ${group})`;
}

function expertButton(expert, note, kind = "chip") {
  const button = element("button", { type: "button", class: kind, "data-expert": String(expert) }, note === null ? `${expert}` : `expert ${expert}`);
  if (note) button.append(" ", element("small", {}, note));
  return button;
}

// Builds cells from [name, value, remark].
function cellList(cells) {
  return element("dl", { class: "cells" }, ...cells.map(([name, value, remark]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value), element("dd", { class: "extra" }, remark))));
}

// Returns a background whose strength grows with the gate value.
function markToken(token, gate) {
  token.style.background = gate ? `rgb(var(--mark) / ${0.15 + 0.6 * gate})` : "";
  token.classList.toggle("marked", gate > 0);
}

function meter(share) {
  const bar = element("i");
  bar.style.width = `${Math.min(100, 100 * share)}%`;
  return element("span", { class: "meter", "aria-hidden": "true" }, bar);
}
