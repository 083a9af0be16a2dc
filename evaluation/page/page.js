"use strict";
/*
What the page does. `data` is what evaluation/page/build.py put into the page; `state` is what the
reader has chosen, and is kept in the address. Every change goes through `change`, which draws anew.
Text comes onto the page through `make` alone, as text nodes: nothing in an output can act.
*/

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const withOutputs = data.checkpoints.filter((checkpoint) => checkpoint.outputs.length > 0);
const measured = data.checkpoints.filter(({ outputs, nll }) => outputs.length || nll !== null);
const sections = [...new Set(data.prompts.map((prompt) => prompt.section))];
const flagLabels = Object.entries(data.rates).filter(([key]) => key !== "check_strict");
const failures = [
  ["", "all answers"],
  ["any", "any failure"],
  ...flagLabels,
  ["check failed", "check failed"],
  ["check passed loosely", "check passed only loosely"],
  ["check passed", "check passed"],
];
const NO_FILTERS = { section: "", failure: "", query: "" };
const state = { show: [], decoding: "", seed: "", prompt: "", ...NO_FILTERS };

// ------------------------------------------------------------------------------- building elements

function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function setOptions(select, options, chosen) {
  select.replaceChildren(...options.map(([value, label]) => make("option", { value }, label)));
  select.value = chosen;
  select.disabled = options.length < 2;
}

// ------------------------------------------------------------------------------- state and address

/* The first base and what recovers least, second most and most of what full fine-tuning gains. */
function firstShown() {
  const family = withOutputs.filter((checkpoint) => checkpoint.base === withOutputs[0].base);
  const tuned = family.filter((checkpoint) => checkpoint.recovery !== null);
  if (tuned.length < 3) return family.slice(0, 4);
  tuned.sort((a, b) => a.recovery[0] - b.recovery[0]);
  return [family[0], tuned[0], ...tuned.slice(-2)];
}

function defaults() {
  return {
    show: withOutputs.length ? firstShown().map((checkpoint) => checkpoint.name) : [],
    decoding: data.decodings[0] ?? "",
    seed: "",
    prompt: "",
    ...NO_FILTERS,
  };
}

function addressOf(chosen) {
  const normal = defaults();
  const fields = new URLSearchParams();
  for (const [name, value] of Object.entries(chosen)) {
    if (String(value) !== String(normal[name])) fields.set(name, String(value));
  }
  return `#${fields}`;
}

/* Takes over what the address says; what it names and the page does not have is told. */
function readAddress() {
  const fields = new URLSearchParams(location.hash.slice(1));
  const known = {
    show: data.checkpoints.map((checkpoint) => checkpoint.name),
    decoding: data.decodings,
    section: sections,
    failure: failures.map(([value]) => value),
    prompt: data.prompts.map((prompt) => prompt.id),
  };
  Object.assign(state, defaults());
  const missing = [];
  for (const name of Object.keys(state)) {
    if (!fields.has(name)) continue;
    const value = fields.get(name);
    const parts = name === "show" ? value.split(",").filter(Boolean) : [value];
    const there = name in known ? parts.filter((part) => known[name].includes(part)) : parts;
    missing.push(...parts.filter((part) => !there.includes(part)));
    if (name === "show") state.show = there;
    else if (there.length) state[name] = value;
  }
  byId("missing").textContent = missing.length ? `Not on this page: ${missing.join(", ")}.` : "";
}

function change(changes) {
  Object.assign(state, changes);
  history.replaceState(null, "", addressOf(state));
  render();
}

const shownCheckpoints = () =>
  data.checkpoints.filter((checkpoint) => state.show.includes(checkpoint.name));

/* The color and the dashes of a compared checkpoint: 20 can be told apart. */
function lineClass(checkpoint) {
  const place = shownCheckpoints().indexOf(checkpoint);
  return `s${place % 5} dash${Math.floor(place / 5) % 4}`;
}

// ---------------------------------------------------------------------------------------- controls

function seedsOf(decoding) {
  const seeds = new Set();
  for (const checkpoint of withOutputs) {
    for (const output of checkpoint.outputs) {
      if (output.decoding === decoding && "seed" in output) seeds.add(output.seed);
    }
  }
  return [...seeds].sort((a, b) => a - b);
}

function renderControls() {
  const seeds = seedsOf(state.decoding).map((seed) => [String(seed), `seed ${seed}`]);
  if (!seeds.some(([value]) => value === state.seed)) state.seed = "";
  setOptions(byId("decoding"), data.decodings.map((name) => [name, name]), state.decoding);
  setOptions(byId("seed"), [["", seeds.length ? "all seeds" : "none drawn"], ...seeds], state.seed);
  setOptions(byId("section"), [["", "all sections"], ...sections.map((s) => [s, s])], state.section);
  setOptions(byId("failure"), failures, state.failure);
  if (byId("query").value !== state.query) byId("query").value = state.query;
  byId("picked").textContent = `${state.show.length} of ${data.checkpoints.length}`;
  for (const box of byId("choices").querySelectorAll("input")) {
    box.checked = state.show.includes(box.value);
  }
}

function buildPicker() {
  const families = new Map();
  for (const checkpoint of data.checkpoints) {
    const place = withOutputs.indexOf(checkpoint) + 1;
    const box = make("input", { type: "checkbox", value: checkpoint.name });
    const key = place > 0 && place < 10 ? `${place} ` : "";
    const notes = [checkpoint.ending, checkpoint.outputs.length ? "" : "(no outputs)"];
    const words = [`${key}${checkpoint.name}`, ...notes.filter(Boolean)];
    const label = make("label", {}, box, words.join(" "));
    if (!families.has(checkpoint.base)) {
      const legend = make("legend", {}, `From ${checkpoint.base}`);
      families.set(checkpoint.base, make("fieldset", {}, legend));
    }
    families.get(checkpoint.base).append(label);
  }
  byId("choices").replaceChildren(...families.values());
}

function toggle(name) {
  const others = state.show.filter((shown) => shown !== name);
  change({ show: others.length < state.show.length ? others : [...others, name] });
}

// ------------------------------------------------------------------------------------------- table

const percent = (share) => `${Math.round(100 * share)}%`;

function rateCell(rate) {
  if (!rate) return make("td", {}, "–");
  const [k, n, low, high] = rate;
  const bar = draw("svg", { width: 88, height: 14, "aria-hidden": "true" });
  const at = (share) => 4 + 80 * share;
  bar.append(
    draw("line", { class: "grid", x1: at(0), x2: at(1), y1: 7, y2: 7 }),
    draw("line", { class: "whisker", x1: at(low), x2: at(high), y1: 7, y2: 7 }),
    draw("circle", { cx: at(k / n), cy: 7, r: 3.5, fill: "currentColor" }),
  );
  const interval = make("span", { class: "interval" }, `${percent(low)}–${percent(high)}`);
  return make("td", {}, `${percent(k / n)} `, interval, bar);
}

function swatch(checkpoint) {
  const line = draw("line", { class: `curve ${lineClass(checkpoint)}`, x1: 0, x2: 28, y1: 5, y2: 5 });
  return draw("svg", { class: "key", width: 28, height: 10, "aria-hidden": "true" }, line);
}

function nameCell(checkpoint) {
  const compared = state.show.includes(checkpoint.name);
  const ending = checkpoint.ending && make("span", { class: "ending" }, ` ${checkpoint.ending}`);
  return make(
    "th",
    { scope: "row" },
    compared ? swatch(checkpoint) : null,
    make("b", {}, checkpoint.name),
    ending || null,
    make("br"),
    checkpoint.method,
  );
}

function shareWithInterval([share, ...interval]) {
  const ends = interval.map((end) => end.toFixed(2)).join("–");
  return ends ? `${share.toFixed(2)} (${ends})` : share.toFixed(2);
}

/* What is told of a checkpoint by numbers: title and text. */
const NUMBERS = [
  ["Trainable", ({ trainable }) => trainable?.toLocaleString("en")],
  ["Learning rate", ({ rate }) => rate],
  ["Steps", ({ steps }) => steps?.toLocaleString("en")],
  ["NLL", ({ nll }) => nll?.toFixed(3)],
  ["R", ({ recovery }) => recovery && shareWithInterval(recovery)],
  ["Text NLL", ({ text_nll: nll }) => nll?.toFixed(3)],
].filter(([, tell]) => data.checkpoints.some(tell));

function resultRow(checkpoint) {
  const rates = checkpoint.rates[state.decoding] ?? {};
  return make(
    "tr",
    {},
    nameCell(checkpoint),
    make("td", { class: "method" }, checkpoint.data || "–"),
    ...NUMBERS.map(([, tell]) => make("td", { class: "number" }, tell(checkpoint) ?? "–")),
    ...Object.keys(data.rates).map((key) => rateCell(rates[key])),
  );
}

function referenceRow() {
  const known = withOutputs.find((checkpoint) => "references" in checkpoint.rates);
  if (!known) return "";
  const head = make("th", { scope: "row" }, make("b", {}, "reference answers"));
  const empty = ["", ...NUMBERS].map(() => make("td", { class: "number" }, "–"));
  const rates = known.rates.references;
  return make("tr", {}, head, ...empty, ...Object.keys(data.rates).map((key) => rateCell(rates[key])));
}

function headRow() {
  return make(
    "tr",
    {},
    ...["Checkpoint", "Trained on"].map((title) => make("th", { scope: "col" }, title)),
    ...NUMBERS.map(([title]) => make("th", { scope: "col", class: "number" }, title)),
    ...Object.values(data.rates).map((title) => make("th", { scope: "col" }, title)),
  );
}

function renderTable() {
  const head = headRow();
  const body = make("tbody");
  let family = null;
  for (const checkpoint of measured) {
    if (checkpoint.base !== family) {
      family = checkpoint.base;
      const title = make("th", { colspan: head.cells.length, scope: "rowgroup" }, `From ${family}`);
      body.append(make("tr", { class: "family" }, title));
    }
    body.append(resultRow(checkpoint));
  }
  body.append(referenceRow());
  byId("table").replaceChildren(make("thead", {}, head), body);
}

// ------------------------------------------------------------------------------------------ charts

/* Round numbers between low and high, about as many as asked. */
function linearTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= rough);
  const first = Math.ceil(low / step);
  const last = Math.floor(high / step);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(6)));
}

/* 1, 2 and 5 times the powers of ten between low and high, the powers alone when those suffice; round
   numbers where the range is too narrow for these. */
function logTicks(low, high) {
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const digits = last - first > 2 ? [1] : [1, 2, 5];
  const powers = Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
  const ticks = powers.flatMap((power) => digits.map((digit) => digit * power));
  const inside = ticks.map((tick) => Number(tick.toPrecision(6))).filter((t) => t >= low && t <= high);
  return inside.length > 1 ? inside : linearTicks(low, high, 4);
}

function scaleOf(values, from, to, log) {
  const measure = log ? Math.log10 : (value) => value;
  const low = measure(Math.min(...values));
  const span = measure(Math.max(...values)) - low || 1;
  return (value) => from + ((measure(value) - low) / span) * (to - from);
}

/* A chart of series {checkpoint, line, dots}; lines are named at their right end where there is room. */
function lineChart(title, series, axes) {
  const points = series.flatMap(({ line, dots }) => [...line, ...dots]);
  const room = byId("results").clientWidth;
  const width = Math.max(280, room > 1000 ? room / 2 - 12 : room);
  const height = 270;
  const roomy = width > 480;
  const longest = Math.max(...series.map(({ checkpoint }) => checkpoint.name.length));
  const right = width - (roomy ? 14 + 7 * longest : 10);
  const xs = points.map(([x]) => x);
  const ys = points.map(([, y]) => y);
  const x = scaleOf(axes.log ? xs : [0, ...xs], 48, right, axes.log);
  const y = scaleOf(ys, height - 42, 10, axes.log);
  const name = `${title}: ${series.map(axes.tell).join("; ")}`;
  const chart = draw("svg", { width, height, role: "img", "aria-label": name });
  const ticks = axes.log ? logTicks : linearTicks;
  for (const tick of ticks(Math.min(...ys), Math.max(...ys), 5)) {
    const text = { class: "axis", x: 42, y: y(tick) + 4, "text-anchor": "end" };
    chart.append(draw("line", { class: "grid", x1: 48, x2: right, y1: y(tick), y2: y(tick) }));
    chart.append(draw("text", text, String(tick)));
  }
  for (const tick of ticks(axes.log ? Math.min(...xs) : 0, Math.max(...xs), roomy ? 6 : 4)) {
    const text = { class: "axis", x: x(tick), y: height - 24, "text-anchor": "middle" };
    chart.append(draw("text", text, tick.toLocaleString("en")));
  }
  const middle = { class: "axis", x: (48 + right) / 2, y: height - 6, "text-anchor": "middle" };
  chart.append(draw("text", middle, axes.label));
  for (const { checkpoint, line, dots } of series) {
    const style = lineClass(checkpoint);
    const path = line.map((point) => `${x(point[0])},${y(point[1])}`).join(" ");
    chart.append(draw("polyline", { class: `curve ${style}`, points: path }));
    for (const [at, value] of dots) {
      chart.append(draw("circle", { class: `dot ${style}`, cx: x(at), cy: y(value), r: 3.5 }));
    }
  }
  if (roomy) chart.append(...endLabels(series, x, y, height));
  const key = roomy ? [] : series.map(({ checkpoint }) => make("div", {}, swatch(checkpoint), checkpoint.name));
  return make("div", { class: "chart" }, make("h3", {}, title), chart, ...key);
}

/* Names at the lines' right ends, pushed upward where they would stand on each other. */
function endLabels(series, x, y, height) {
  const ends = series.map(({ checkpoint, line, dots }) => {
    const [at, value] = line.at(-1) ?? dots.at(-1);
    return { name: checkpoint.name, x: x(at) + 7, y: y(value) + 4 };
  });
  ends.sort((a, b) => b.y - a.y);
  let above = height;
  for (const end of ends) {
    end.y = Math.min(end.y, above - 13);
    above = end.y;
  }
  return ends.map((end) => draw("text", { x: end.x, y: end.y }, end.name));
}

function renderCurves() {
  const groups = new Map();
  for (const checkpoint of shownCheckpoints()) {
    const { train: line, valid: dots } = checkpoint.curve;
    if (line.length + dots.length === 0) continue;
    const title = checkpoint.data || "training data not recorded";
    groups.set(title, [...(groups.get(title) ?? []), { checkpoint, line, dots }]);
  }
  const tell = ({ checkpoint, line, dots }) =>
    `${checkpoint.name} ends at ${(dots.at(-1) ?? line.at(-1))[1]}`;
  const axes = { label: "step", log: false, tell };
  const charts = [...groups].map(([title, series]) => lineChart(title, series, axes));
  const none = make("p", { class: "note" }, "No curve of a compared checkpoint is recorded.");
  byId("curve-charts").replaceChildren(...(charts.length ? charts : [none]));
}

function renderSpectra() {
  const analyzed = shownCheckpoints().filter(({ spectra }) => Object.keys(spectra).length > 0);
  const names = [...new Set(analyzed.flatMap(({ spectra }) => Object.keys(spectra)))];
  const chosen = names.includes(byId("matrix").value) ? byId("matrix").value : names[0];
  byId("matrix-label").hidden = names.length === 0;
  setOptions(byId("matrix"), names.map((name) => [name, name]), chosen ?? "");
  const series = analyzed
    .filter(({ spectra }) => chosen in spectra)
    .map((checkpoint) => ({ checkpoint, line: checkpoint.spectra[chosen].values, dots: [] }));
  const tell = ({ checkpoint }) => {
    const { r90, effective, stable, relative } = checkpoint.spectra[chosen];
    const norm = `${(100 * relative).toPrecision(3)}% of the base's norm`;
    return `${checkpoint.name}: r90 ${r90}, effective rank ${effective}, stable rank ${stable}, ${norm}`;
  };
  if (series.length === 0) {
    const none = "No update of a compared checkpoint was analyzed.";
    byId("spectrum-chart").replaceChildren(make("p", { class: "note" }, none));
    return;
  }
  const chart = lineChart(chosen, series, { label: "rank", log: true, tell });
  const facts = series.map((one) => make("li", {}, tell(one)));
  byId("spectrum-chart").replaceChildren(chart, make("ul", { class: "note" }, ...facts));
}

// ----------------------------------------------------------------------------------------- outputs

function answersOf(checkpoint, number) {
  return checkpoint.outputs.filter(
    (output) =>
      output.prompt === number &&
      output.decoding === state.decoding &&
      (state.seed === "" || String(output.seed) === state.seed),
  );
}

function fails(output, failure) {
  if (failure === "any") return output.flags !== undefined || output.check === "failed";
  if (failure.startsWith("check ")) return failure === `check ${output.check}`;
  return (output.flags ?? []).includes(failure);
}

/* What finds the search in a text, in any case; null without a search. */
function pattern() {
  const words = state.query.trim();
  return words && new RegExp(words.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "giu");
}

function meetsSearch(prompt, answers, wanted) {
  const texts = [prompt.id, prompt.text, prompt.translation ?? ""];
  for (const output of answers) texts.push(output.text.join(""), output.translation ?? "");
  return texts.some((text) => text.search(wanted) >= 0);
}

function visiblePrompts() {
  const wanted = pattern();
  const columns = shownCheckpoints().filter((checkpoint) => checkpoint.outputs.length > 0);
  const found = [];
  data.prompts.forEach((prompt, number) => {
    if (state.section && prompt.section !== state.section) return;
    const cells = columns.map((checkpoint) => [checkpoint, answersOf(checkpoint, number)]);
    const answers = cells.flatMap(([, outputs]) => outputs);
    if (state.failure && !answers.some((output) => fails(output, state.failure))) return;
    if (wanted && !meetsSearch(prompt, answers, wanted)) return;
    found.push([prompt, cells]);
  });
  return found;
}

function facts(output) {
  const words = [make("span", {}, `${output.tokens} tokens`)];
  for (const [key, label] of flagLabels) {
    if (fails(output, key)) words.push(make("span", { class: "bad" }, label));
  }
  if (output.check) {
    const kind = output.check === "failed" ? "bad" : "good";
    words.push(make("span", { class: kind }, `check ${output.check}`));
  }
  if ("seed" in output) words.push(make("span", {}, `seed ${output.seed}`));
  return make("p", { class: "facts" }, ...words.flatMap((word, i) => (i ? [" · ", word] : [word])));
}

function said(output) {
  const [before, loop, after] = output.text;
  if (!output.text.join("").trim()) return make("p", { class: "translation" }, "(nothing)");
  if (loop === undefined) return make("p", { class: "said" }, before);
  const mark = make("mark", { title: "the loop that it ends in" }, loop);
  return make("p", { class: "said" }, before, mark, after);
}

function answer(checkpoint, outputs) {
  const match = state.failure && outputs.some((output) => fails(output, state.failure));
  const parts = outputs.flatMap((output) => [
    facts(output),
    said(output),
    output.translation ? make("p", { class: "translation" }, `In English: ${output.translation}`) : null,
  ]);
  if (parts.length === 0) parts.push(make("p", { class: "facts" }, "not asked"));
  const head = make("h4", {}, swatch(checkpoint), checkpoint.name);
  return make("div", { class: match ? "answer match" : "answer" }, head, ...parts);
}

function promptCard(prompt, cells) {
  const link = make("a", { href: addressOf({ ...state, prompt: prompt.id }) }, "link");
  link.setAttribute("aria-label", `Link to prompt ${prompt.id} and this comparison`);
  const section = make("span", { class: "section" }, prompt.section);
  const small = (label, text) => (text ? make("p", { class: "translation" }, `${label}: ${text}`) : null);
  return make(
    "article",
    { class: "prompt", "data-id": prompt.id, tabindex: "-1", "aria-label": `Prompt ${prompt.id}` },
    make("header", {}, make("h3", {}, prompt.id), section, link),
    make("p", { class: "question" }, prompt.text),
    small("In English", prompt.translation),
    small("Check", prompt.check),
    make("div", { class: "answers" }, ...cells.map(([checkpoint, outputs]) => answer(checkpoint, outputs))),
  );
}

function renderOutputs() {
  const visible = visiblePrompts();
  byId("prompts").replaceChildren(...visible.map(([prompt, cells]) => promptCard(prompt, cells)));
  byId("count").textContent = `${visible.length} of ${data.prompts.length} prompts`;
  markCurrent();
  markFound();
}

/* Marks what the search found without touching the text, where the browser can. */
function markFound() {
  if (!("highlights" in CSS)) return;
  CSS.highlights.clear();
  const wanted = pattern();
  if (!wanted) return;
  const ranges = [];
  const walker = document.createTreeWalker(byId("prompts"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    if (!walker.currentNode.parentElement.closest("h3, .question, .said, .translation")) continue;
    for (const match of walker.currentNode.data.matchAll(wanted)) {
      const range = new Range();
      range.setStart(walker.currentNode, match.index);
      range.setEnd(walker.currentNode, match.index + match[0].length);
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

// -------------------------------------------------------------------------------- moving and keys

const cards = () => [...byId("prompts").children];

function markCurrent() {
  for (const card of cards()) card.classList.toggle("current", card.dataset.id === state.prompt);
}

function goTo(card) {
  state.prompt = card.dataset.id;
  history.replaceState(null, "", addressOf(state));
  markCurrent();
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "start", behavior: "instant" });
}

function step(by) {
  const all = cards();
  const now = all.findIndex((card) => card.dataset.id === state.prompt);
  const next = all[now < 0 ? 0 : now + by];
  if (next) goTo(next);
}

function following(values, value) {
  return values[(values.indexOf(value) + 1) % values.length];
}

function setTheme() {
  const root = document.documentElement;
  const dark = isDark();
  root.dataset.theme = dark ? "light" : "dark";
  nameTheme();
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function nameTheme() {
  byId("theme").textContent = isDark() ? "Light" : "Dark";
}

const KEYS = {
  j: () => step(1),
  k: () => step(-1),
  d: () => change({ decoding: following(data.decodings, state.decoding) }),
  f: () => change({ failure: following(failures.map(([value]) => value), state.failure) }),
  x: () => change(NO_FILTERS),
  t: setTheme,
  "?": () => byId("help").showModal(),
  "/": () => byId("query").focus(),
  c: () => {
    byId("picker").open = true;
    byId("choices").querySelector("input").focus();
  },
};

function onKey(event) {
  if (event.key === "Escape" && byId("picker").open) closePicker();
  const typing = event.target.closest("input:not([type=checkbox]), select, textarea, dialog");
  const held = event.ctrlKey || event.metaKey || event.altKey;
  if (typing || held || !byId("shortcuts").checked) return;
  const place = "123456789".indexOf(event.key);
  const action = place >= 0 ? () => togglePlace(place) : KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function togglePlace(place) {
  if (place < withOutputs.length) toggle(withOutputs[place].name);
}

function closePicker() {
  byId("picker").open = false;
  byId("picker").querySelector("summary").focus();
}

// ------------------------------------------------------------------------------------------- start

function render() {
  renderControls();
  renderTable();
  renderCurves();
  renderSpectra();
  renderOutputs();
}

function openAddress() {
  readAddress();
  render();
  const card = cards().find((one) => one.dataset.id === state.prompt);
  if (card) goTo(card);
}

function listen() {
  for (const name of ["decoding", "seed", "section", "failure"]) {
    byId(name).addEventListener("change", (event) => change({ [name]: event.target.value }));
  }
  byId("query").addEventListener("input", (event) => change({ query: event.target.value }));
  byId("choices").addEventListener("change", (event) => toggle(event.target.value));
  byId("clear").addEventListener("click", () => change(NO_FILTERS));
  byId("matrix").addEventListener("change", renderSpectra);
  byId("theme").addEventListener("click", setTheme);
  byId("help-open").addEventListener("click", () => byId("help").showModal());
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const link of document.querySelectorAll("nav a, .skip")) {
    link.addEventListener("click", (event) => {
      event.preventDefault(); // the address holds the state
      const part = document.querySelector(link.getAttribute("href"));
      part.scrollIntoView();
      part.focus();
    });
  }
  document.addEventListener("keydown", onKey);
  document.addEventListener("click", (event) => {
    if (!byId("picker").contains(event.target)) byId("picker").open = false;
  });
  addEventListener("hashchange", openAddress);
  addEventListener("resize", () => {
    renderCurves();
    renderSpectra();
  });
}

buildPicker();
nameTheme();
listen();
openAddress();
