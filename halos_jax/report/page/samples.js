// The browser of samples: search, sort, columns to compare, a card a prompt.

const FLAG_NAMES = { c: "chosen", r: "rejected", t: "cut", d: "desirable", u: "undesirable" };
const AT_ONCE = 10;
const [TEXT, REWARD, FLAGS, TOKENS, SCORES] = [0, 1, 2, 3, 4];

function average(cell, entry) {
  const known = (cell || []).map((sample) => sample[entry]).filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function lastKnown(prompt, entry) {
  for (let at = prompt.cells.length - 1; at >= 0; at--) {
    const value = average(prompt.cells[at], entry);
    if (value !== null) return value;
  }
  return null;
}

function gain(prompt) {
  const known = prompt.cells.map((cell) => average(cell, REWARD)).filter((value) => value !== null);
  return known.length > 1 ? known[known.length - 1] - known[0] : null;
}

// Say by how much the reward has changed, and between which columns.
function describeGain(prompt, columns) {
  const change = gain(prompt);
  if (change === null) return null;
  const known = columns.filter((_, at) => average(prompt.cells[at], REWARD) !== null);
  const amount = showNumber(Math.abs(change));
  const said = amount === "0" ? "reward unchanged" : `reward ${change > 0 ? "+" : "−"}${amount}`;
  return `${said} from ${known[0]} to ${known[known.length - 1]}`;
}

function gap(prompt) {
  const cell = prompt.cells[prompt.cells.length - 1] || [];
  const known = cell.map((sample) => sample[REWARD]).filter((value) => value !== null);
  return known.length ? Math.max(...known) - Math.min(...known) : null;
}

const SORTS = {
  "unsorted": null,
  "largest gain": [gain, -1],
  "largest loss": [gain, 1],
  "highest reward now": [(prompt) => lastKnown(prompt, REWARD), -1],
  "lowest reward now": [(prompt) => lastKnown(prompt, REWARD), 1],
  "longest now": [(prompt) => lastKnown(prompt, TOKENS), -1],
  "shortest now": [(prompt) => lastKnown(prompt, TOKENS), 1],
  "largest gap of rewards": [gap, -1],
  "newest round": [(prompt) => prompt.round, -1],
};

function sortPrompts(prompts, name) {
  if (!SORTS[name]) return prompts;
  const [read, sign] = SORTS[name];
  const keyed = prompts.map((prompt) => [read(prompt), prompt]);
  keyed.sort((one, other) => {
    if (one[0] === null || other[0] === null) return (one[0] === null) - (other[0] === null);
    return sign * (one[0] - other[0]);
  });
  return keyed.map((pair) => pair[1]);
}

function listTexts(prompt, shown) {
  const samples = prompt.cells.flatMap((cell, at) => (shown.has(at) && cell) || []).map((sample) => sample[TEXT]);
  return [prompt.id, ...prompt.turns.map((turn) => turn[1]), ...samples];
}

// Find prompts by what is on the page: a response of a column that is not shown would not be seen.
function searchPrompts(prompts, wanted, shown) {
  if (!wanted) return prompts;
  return prompts.filter((prompt) => listTexts(prompt, shown).some((text) => text.toLowerCase().includes(wanted)));
}

// Which columns stand side by side at first: the first, the middle one if there is room, the last.
function chooseColumns(count, width) {
  if (count < 3 || width < 700) return new Set([0, count - 1]);
  return new Set([0, Math.floor((count - 1) / 2), count - 1]);
}

// Append a text with what is searched for marked in it; return where it is found first, or -1.
function markFound(body, text, wanted) {
  const low = text.toLowerCase();
  // A few letters change their length with their case: places do not fit the text then.
  const first = wanted && low.length === text.length ? low.indexOf(wanted) : -1;
  let from = 0;
  for (let at = first; at >= 0; at = low.indexOf(wanted, from)) {
    body.append(text.slice(from, at), make("mark", "", text.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  body.append(text.slice(from));
  return first;
}

function makeText(text, limit, wanted) {
  const box = make("div");
  const body = make("div", "text");
  const first = markFound(body, text, wanted);
  box.append(body);
  if (text.length > limit || text.split("\n").length > 9) {
    const isBelow = first > limit / 2 || text.slice(0, Math.max(first, 0)).split("\n").length > 5;
    body.classList.toggle("folded", !isBelow);
    const button = make("button", "unfold", isBelow ? "Show less" : "Show all");
    button.type = "button";
    button.addEventListener("click", () => {
      const isFolded = body.classList.toggle("folded");
      button.textContent = isFolded ? "Show all" : "Show less";
    });
    box.append(button);
  }
  return box;
}

function makeSample(sample, wanted) {
  const names = [...sample[FLAGS]].map((flag) => FLAG_NAMES[flag]);
  const box = make("div", ["sample", ...names].join(" "));
  const labels = make("div", "labels");
  labels.append(make("b", "", `reward ${showNumber(sample[REWARD])}`));
  for (const [name, value] of Object.entries(sample[SCORES])) labels.append(make("span", "", `${name} ${showNumber(value)}`));
  if (sample[TOKENS]) labels.append(make("span", "", `${sample[TOKENS]} tokens`));
  const signs = { chosen: "▲ chosen", rejected: "▼ rejected", cut: "✂ cut", desirable: "▲ desirable", undesirable: "▼ undesirable" };
  for (const name of names) labels.append(make("span", name, signs[name]));
  box.append(labels, sample[TEXT] ? makeText(sample[TEXT], 420, wanted) : make("div", "quiet", "(empty)"));
  return box;
}

function makePrompt(prompt, columns, shown, wanted) {
  const card = make("article", "prompt");
  const head = make("div", "head");
  if (prompt.round !== undefined) head.append(make("span", "", `round ${prompt.round}`));
  const change = describeGain(prompt, columns);
  if (change !== null) head.append(make("span", "", change));
  head.append(make("span", "", `prompt ${prompt.id.slice(0, 12)}`));
  card.append(head);
  for (const [role, text] of prompt.turns) {
    const turn = make("div", "turn");
    if (prompt.turns.length > 1 || role !== "user") turn.append(make("span", "role", role));
    turn.append(makeText(text, 700, wanted));
    card.append(turn);
  }
  for (const [name, text] of Object.entries(prompt.extra)) {
    const box = make("details", "extra");
    box.append(make("summary", "", name), make("div", "text", text));
    card.append(box);
  }
  const cells = make("div", columns.length > 1 ? "cells" : "cells alone");
  columns.forEach((label, at) => {
    if (!shown.has(at) || !prompt.cells[at]) return;
    const cell = make("div", "cell");
    const mean = average(prompt.cells[at], REWARD);
    const title = columns.length > 1 ? label : `${prompt.cells[at].length} samples`;
    cell.append(make("h4", "", mean === null ? title : `${title} · mean reward ${showNumber(mean)}`));
    const group = make("div", "group");
    group.append(...prompt.cells[at].map((sample) => makeSample(sample, wanted)));
    cell.append(group);
    cells.append(cell);
  });
  card.append(cells);
  return card;
}

function makeChips(columns, shown, refresh) {
  const chips = make("div", "chips");
  chips.append(make("span", "", "Side by side:"));
  columns.forEach((label, at) => {
    const chip = make("button", "", label);
    chip.type = "button";
    chip.setAttribute("aria-pressed", String(shown.has(at)));
    chip.addEventListener("click", () => {
      if (shown.has(at)) shown.delete(at); else shown.add(at);
      chip.setAttribute("aria-pressed", String(shown.has(at)));
      refresh();
    });
    chips.append(chip);
  });
  return chips;
}

function makeSelect(label, names) {
  const select = make("select");
  select.setAttribute("aria-label", label);
  for (const name of names) select.append(make("option", "", name));
  return select;
}

function listSorts(data) {
  const isTrained = data.prompts.some((prompt) => prompt.round !== undefined);
  const compares = data.columns.length > 1;
  return Object.keys(SORTS).filter((name) => {
    if (name.endsWith("gain") || name.endsWith("loss")) return compares;
    if (name.endsWith("round")) return isTrained;
    return true;
  });
}

async function showBrowser(name) {
  const room = document.getElementById("browser-" + name);
  if (room.dataset.ready) return;
  room.dataset.ready = "yes";
  const data = await unpackJson(name);
  const shown = chooseColumns(data.columns.length, room.clientWidth || innerWidth);
  const tools = make("div", "tools");
  const search = make("input");
  search.type = "search";
  search.placeholder = "Search prompts and responses shown";
  search.setAttribute("aria-label", search.placeholder);
  const sorts = makeSelect("Order", listSorts(data));
  const rounds = [...new Set(data.prompts.map((prompt) => prompt.round))].filter((round) => round !== undefined);
  const round = makeSelect("Round", ["all rounds", ...rounds.map((one) => `round ${one}`)]);
  tools.append(search, sorts);
  if (rounds.length > 1) tools.append(round);
  const said = make("p", "quiet"), list = make("div"), more = make("button", "", "Show more");
  more.type = "button";
  let limit = AT_ONCE;
  const refresh = () => {
    const asked = round.value === "all rounds" ? data.prompts : data.prompts.filter((prompt) => `round ${prompt.round}` === round.value);
    const wanted = search.value.trim().toLowerCase();
    const found = sortPrompts(searchPrompts(asked, wanted, shown), sorts.value);
    list.replaceChildren(...found.slice(0, limit).map((prompt) => makePrompt(prompt, data.columns, shown, wanted)));
    said.textContent = found.length ? `${Math.min(limit, found.length)} of ${found.length} prompts` : "Nothing found.";
    more.hidden = found.length <= limit;
  };
  const restart = () => { limit = AT_ONCE; refresh(); };
  let timer = 0;
  search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(restart, 150); });
  sorts.addEventListener("change", restart);
  round.addEventListener("change", restart);
  more.addEventListener("click", () => { limit += 2 * AT_ONCE; refresh(); });
  room.append(tools);
  if (data.columns.length > 1) room.append(makeChips(data.columns, shown, refresh));
  room.append(said, list, more);
  refresh();
}

function showSamples() {
  const tabs = [...document.querySelectorAll("[data-browser]")];
  for (const tab of tabs) {
    tab.addEventListener("click", () => {
      for (const one of tabs) {
        one.setAttribute("aria-selected", String(one === tab));
        document.getElementById("browser-" + one.dataset.browser).hidden = one !== tab;
      }
      showBrowser(tab.dataset.browser);
    });
  }
  if (!tabs.length) return;
  // Unpacking takes a while: only once they are about to be seen.
  const watcher = new IntersectionObserver((seen) => {
    if (!seen.some((entry) => entry.isIntersecting)) return;
    watcher.disconnect();
    showBrowser(tabs.find((tab) => tab.getAttribute("aria-selected") === "true").dataset.browser);
  }, { rootMargin: "800px" });
  watcher.observe(document.getElementById("samples"));
}

async function showAll() {
  if (typeof DecompressionStream === "undefined") {
    const note = document.getElementById("chart-note");
    if (note) note.textContent = "Curves and samples need a browser of 2023 or newer.";
    return;
  }
  showSamples();
  await showCharts();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

showAll();
