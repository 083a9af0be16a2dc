"use strict";
/* Text comes onto the page through `make` alone, as text nodes: nothing in an output can act. */

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const unique = (values) => [...new Set(values)];
const answers = data.arms.flatMap((arm) => arm.answers);
const decodings = unique(answers.map((answer) => answer.decoding));
const kinds = unique(answers.flatMap((answer) => answer.kinds)).sort();
const label = (kind) => kind.replaceAll("_", " ");

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter(Boolean));
  return element;
}

const address = (prompt) => `#${encodeURIComponent(prompt.id)}`;
const isBad = (kind) => kind !== "correct";

/* What two models can differ in: the kinds of answer, or the text where nothing was checked. */
const signature = ({ said }) =>
  JSON.stringify(said.map((a) => (a.kinds.length ? a.kinds[0] : a.text.join(""))));

/* Whether the filters let a prompt through; columns are the chosen models with their answers. */
function isWanted(prompt, columns) {
  const [section, kind] = [byId("section").value, byId("kind").value];
  const query = byId("query").value.trim().toLowerCase();
  const asked = columns.filter((column) => column.said.length);
  const said = asked.flatMap((column) => column.said);
  const isKind = (a) => (kind === "wrong" ? a.kinds.some(isBad) : a.kinds.includes(kind));
  const texts = [prompt.id, prompt.prompt, prompt.prompt_translation];
  texts.push(...said.flatMap((a) => [a.text.join(""), a.translation]));
  return (
    said.length > 0 &&
    (!section || prompt.section === section) &&
    (!kind || said.some(isKind)) &&
    (!byId("differs").checked || unique(asked.map(signature)).length > 1) &&
    texts.some((text) => text.toLowerCase().includes(query))
  );
}

function drawAnswer(answer, isAlone) {
  const [before, loop, after] = answer.text;
  const verdict = answer.kinds.map((kind) =>
    make("span", { class: isBad(kind) ? "bad" : "good" }, `${label(kind)} `),
  );
  const seed = answer.seed === null ? "" : ` ${answer.seed}`;
  const origin = isAlone ? null : make("span", { class: "soft" }, `${answer.decoding}${seed} `);
  return [
    make("p", { class: "said" }, before, loop && make("mark", { title: "loop" }, loop), after),
    answer.text.join("") === "" && make("p", { class: "soft" }, "(nothing)"),
    answer.translation && make("p", { class: "soft" }, answer.translation),
    make("div", {}, origin, ...verdict),
  ];
}

function drawPrompt(prompt, columns) {
  const link = make("a", { href: address(prompt) }, prompt.id);
  const boxes = columns.map(({ arm, said }) =>
    make(
      "div",
      { class: "answer" },
      make("h3", { title: arm.name }, arm.title, make("span", { class: "soft" }, ` ${arm.note}`)),
      ...said.flatMap((answer) => drawAnswer(answer, said.length === 1)),
      said.length === 0 && make("p", { class: "soft" }, "not asked"),
    ),
  );
  return make(
    "article",
    { class: address(prompt) === location.hash ? "current" : "" },
    link,
    make("span", { class: "soft" }, ` ${prompt.section}`),
    make("h2", {}, prompt.prompt),
    prompt.prompt_translation && make("p", { class: "soft" }, prompt.prompt_translation),
    prompt.reference && make("p", { class: "soft" }, `Reference: ${prompt.reference}`),
    make("div", { class: "answers" }, ...boxes),
  );
}

function render() {
  const boxes = [...byId("arms").querySelectorAll("input:checked")];
  const arms = data.arms.filter((arm) => boxes.some((box) => box.value === arm.name));
  const decoding = byId("decoding").value;
  const isShown = (a) => decoding === "" || a.decoding === decoding;
  const cards = [];
  for (const prompt of data.prompts) {
    const isAnswer = (a) => a.prompt === prompt.number && isShown(a);
    const columns = arms.map((arm) => ({ arm, said: arm.answers.filter(isAnswer) }));
    if (isWanted(prompt, columns)) cards.push(drawPrompt(prompt, columns));
  }
  byId("prompts").replaceChildren(...cards);
  byId("count").textContent = `${cards.length} of ${data.prompts.length} prompts`;
}

/* Draws, and goes to the prompt that the address names; if it is hidden, filters are cleared and all
   models are shown. */
function follow() {
  render();
  if (location.hash && !document.querySelector(".current")) {
    byId("controls").reset();
    for (const box of byId("arms").querySelectorAll("input")) box.checked = true;
    render();
  }
  document.querySelector(".current")?.scrollIntoView();
}

function setOptions(select, first, values) {
  const options = values.map((value) => make("option", { value }, label(value)));
  select.replaceChildren(make("option", { value: "" }, first), ...options);
}

setOptions(byId("decoding"), "all decodings", decodings);
byId("decoding").options[decodings.length ? 1 : 0].defaultSelected = true;
setOptions(byId("section"), "all sections", unique(data.prompts.map((prompt) => prompt.section)));
setOptions(byId("kind"), "all kinds of answers", ["wrong", ...kinds]);
for (const arm of data.arms) {
  const box = make("input", { type: "checkbox", value: arm.name });
  box.defaultChecked = data.shown.includes(arm.name);
  const note = make("span", { class: "soft" }, ` ${arm.name}${arm.note && `, ${arm.note}`}`);
  byId("arms").append(make("label", {}, box, ` ${arm.title}`, note));
}
byId("filters").open = matchMedia("(min-width: 60rem)").matches;
byId("controls").addEventListener("input", render);
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("controls").addEventListener("reset", () => setTimeout(render));
addEventListener("hashchange", follow);
follow();
