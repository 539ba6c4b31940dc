// The models of /v1/models, their picker, and weighted sums of adapters.

import { getJson } from "./api.js";
import { $, el } from "./dom.js";
import { emit, listen } from "./events.js";
import { t } from "./i18n.js";
import { readPref, writePref } from "./prefs.js";

const SUM = "\u0000sum";

let base = "";
let adapters = [];
let sums = [];
let chosen = "";
let other = "";

export const models = {
  get base() { return base; },
  get adapters() { return adapters; },
  get chosen() { return chosen; },
  get other() { return other; },
};

export async function loadModels() {
  const { data } = await getJson("v1/models");
  base = data.find((each) => !each.parent)?.id ?? "";
  adapters = data.filter((each) => each.parent).map((each) => each.id);
  const known = new Set([base, ...adapters]);
  sums = readPref("sums", []).filter((sum) => partsOf(sum).every(([name]) => known.has(name)));
  chosen = firstKnown(readPref("model"), adapters[0], base);
  other = firstKnown(readPref("other"), base, adapters[1]);
  draw();
}

function firstKnown(...names) {
  const known = [base, ...adapters, ...sums];
  return names.find((name) => known.includes(name)) ?? base;
}

/** The adapters and weights of `a*0.5+b*0.3`. */
function partsOf(sum) {
  return sum.split("+").map((part) => {
    const at = part.lastIndexOf("*");
    return [part.slice(0, at), Number(part.slice(at + 1))];
  });
}

export function startModels() {
  $("model").addEventListener("change", () => choose("model"));
  $("other").addEventListener("change", () => choose("other"));
  $("sum-dialog").addEventListener("close", takeSum);
  $("sum-form").addEventListener("submit", checkSum);
  listen("language", draw);
}

function draw() {
  fillSelect($("model"), chosen);
  fillSelect($("other"), other);
  emit("models");
}

function fillSelect(select, value) {
  const group = (label, names) => names.length
    ? el("optgroup", { label: t(label) }, ...names.map((name) => el("option", { value: name }, name)))
    : null;
  const more = adapters.length ? el("option", { value: SUM }, t("model.sum")) : null;
  select.replaceChildren(...[
    group("model.group.base", base ? [base] : []),
    group("model.group.adapters", adapters),
    group("model.group.sums", sums),
    more,
  ].filter(Boolean));
  select.value = value;
}

let asking = null;

function choose(id) {
  const { value } = $(id);
  if (value === SUM) {
    asking = id;
    askSum();
    return;
  }
  take(id, value);
}

function take(id, value) {
  if (id === "model") chosen = value;
  else other = value;
  writePref(id, value);
  draw();
}

function askSum() {
  const before = Object.fromEntries(sums.length ? partsOf(sums.at(-1)) : []);
  const rows = adapters.map((name, index) => {
    const id = `weight-${index}`;
    const input = el("input", { id, type: "number", step: "any", "data-name": name });
    input.value = before[name] ?? (index < 2 ? 0.5 : "");
    return el("div", { class: "field" }, el("label", { for: id }, name), input);
  });
  $("sum-weights").replaceChildren(...rows);
  $("sum-bad").hidden = true;
  $("sum-dialog").returnValue = "";
  $("sum-dialog").showModal();
}

function typedSum() {
  const inputs = Array.from($("sum-weights").querySelectorAll("input"));
  const parts = inputs.filter((input) => Number(input.value) !== 0);
  return parts.map((input) => `${input.dataset.name}*${Number(input.value)}`).join("+");
}

function checkSum(event) {
  if (typedSum()) return;
  event.preventDefault();
  $("sum-bad").hidden = false;
}

function takeSum() {
  const sum = $("sum-dialog").returnValue === "ok" ? typedSum() : "";
  if (sum) {
    // A handful is kept: the newest ones.
    sums = [...sums.filter((each) => each !== sum), sum].slice(-5);
    writePref("sums", sums);
    take(asking, sum);
  } else {
    draw();
  }
}
