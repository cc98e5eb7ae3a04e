"use strict";
// Decodes the report's data. A "place" is an index into the tokens that the page keeps of one side of the model.
const DATA = JSON.parse(document.getElementById("data").textContent);
const NONE = 0xffffffff;
const KINDS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };

function unpack(packed) {
  const text = atob(packed.bytes);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new KINDS[packed.type](bytes.buffer);
}

// Returns one owner's row of every property of a table {width, name: packed array}, without NONE.
function unpackTable(table, key) {
  const columns = Object.keys(table).filter((name) => name !== "width");
  const arrays = Object.fromEntries(columns.map((name) => [name, unpack(table[name])]));
  return (owner) => {
    const rows = [];
    for (let i = owner * table.width; i < (owner + 1) * table.width && arrays[key][i] !== NONE; i++)
      rows.push(Object.fromEntries(columns.map((name) => [name, arrays[name][i]])));
    return rows;
  };
}

class Side {
  constructor(name, data) {
    this.name = name; // "encoder" or "decoder"; "" for a language model
    this.tokens = unpack(data.tokens);
    this.positions = unpack(data.positions);
    this.passage = data.passage;
    this.length = data.length;
    this.isStart = new Uint8Array(this.tokens.length);
    for (const place of unpack(data.starts)) this.isStart[place] = 1;
    this.whole = new Map(data.whole); // texts of tokens that are parts of characters
  }

  // Returns the first and last place of the context around a place. A context stops at the start of a text.
  context(place) {
    const width = DATA.context_width;
    let first = place, last = place;
    while (place - first < width && first > 0 && !this.isStart[first] && this.positions[first - 1] === this.positions[first] - 1) first--;
    while (last - place < width && last + 1 < this.tokens.length && !this.isStart[last + 1] && this.positions[last + 1] === this.positions[last] + 1) last++;
    return [first, last];
  }

  text(place) {
    return this.whole.get(place) ?? DATA.vocabulary.texts[this.tokens[place]];
  }
}

class Layer {
  constructor(data) {
    Object.assign(this, data);
    this.side = sideNamed(data.side);
    this.load = unpack(data.load);
    this.importance = unpack(data.importance);
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    this.meanLoad = sum(this.load) / data.num_experts || 1;
    this.meanImportance = sum(this.importance) / data.num_experts || 1;
    this.offsets = unpack(data.contexts.offsets);
    this.places = unpack(data.contexts.places);
    this.gates = unpack(data.contexts.gates);
    this.numUsed = unpack(data.routing.num_used);
    this.routedTo = unpack(data.routing.experts);
    this.routedGates = unpack(data.routing.gates);
    this.wordCounts = unpack(data.words.counts);
    this.favourites = unpackTable(data.words.favourites, "experts");
    this.typical = unpackTable(data.words.typical, "words");
    this.partners = data.coactivation ? unpackTable(data.coactivation.partners, "experts") : () => [];
  }

  meanGate(expert) {
    return this.load[expert] ? this.importance[expert] / this.load[expert] : 0;
  }

  // Returns the places with an expert's highest gate values: [{place, gate}].
  contextsOf(expert) {
    const found = [];
    for (let i = this.offsets[expert]; i < this.offsets[expert + 1]; i++)
      found.push({ place: this.places[i], gate: this.gates[i] });
    return found;
  }

  // Returns the strongest experts of the token at a place: [{expert, gate}].
  expertsAt(place) {
    const width = this.routing.width, found = [];
    for (let i = 0; i < Math.min(width, this.numUsed[place]); i++)
      found.push({ expert: this.routedTo[place * width + i], gate: this.routedGates[place * width + i] / 65535 });
    return found;
  }

  gateAt(place, expert) {
    const found = this.expertsAt(place).find((entry) => entry.expert === expert);
    return found ? found.gate : 0;
  }

  groupOf(expert) {
    return this.group_size ? Math.floor(expert / this.group_size) : null;
  }

  // Returns the words of each expert's contexts and typical tokens, in lower case; computed on the first search.
  searchTexts() {
    if (!this.searched) {
      this.searched = Array.from(this.load, (_, expert) => {
        const parts = this.contextsOf(expert).map(({ place }) => {
          const [first, last] = this.side.context(place);
          let words = "";
          for (let i = first; i <= last; i++) words += this.side.text(i);
          return words;
        });
        for (const { words } of this.typical(expert)) parts.push(DATA.vocabulary.texts[words]);
        return parts.join("\n").toLowerCase();
      });
    }
    return this.searched;
  }
}

const sides = {}, layers = {};
function sideNamed(name) {
  return (sides[name] ??= new Side(name, DATA.sides[name]));
}
function layerNumber(index) {
  return (layers[index] ??= new Layer(DATA.layers[index]));
}
const SPECIAL = new Set(DATA.vocabulary.special);
