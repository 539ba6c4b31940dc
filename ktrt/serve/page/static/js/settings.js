// The settings panel: system prompt and sampling. An empty field leaves the server's value.

import { $, el } from "./dom.js";
import { emit, listen } from "./events.js";
import { t } from "./i18n.js";
import { readPref, writePref } from "./prefs.js";

// Names are the API's; `own` is the server's name of the same setting, where it differs.
const FIELDS = [
  { key: "temperature", kind: "number", min: 0, max: 10, step: 0.05 },
  { key: "top_p", kind: "number", min: 0, max: 1, step: 0.05 },
  { key: "top_k", kind: "integer", min: 0, max: 2 ** 31 - 1 },
  { key: "min_p", kind: "number", min: 0, max: 1, step: 0.01 },
  { key: "max_tokens", own: "max_new_tokens", kind: "integer", min: 1, max: 2 ** 31 - 1 },
  { key: "seed", kind: "integer", min: 0, max: Number.MAX_SAFE_INTEGER },
  { key: "repetition_penalty", kind: "number", min: 0.01, max: 100, step: 0.05 },
  { key: "presence_penalty", kind: "number", min: -2, max: 2, step: 0.1 },
  { key: "frequency_penalty", kind: "number", min: -2, max: 2, step: 0.1 },
  { key: "top_logprobs", kind: "integer", min: 0, max: 20 },
  { key: "stop_token_ids", kind: "ids" },
  { key: "stop", own: "stop_strings", kind: "lines" },
];
const SWITCHES = ["greedy", "logprobs", "special"];

const values = readPref("sampling", {});
const problems = {};
let info = {};

export function startSettings() {
  draw();
  listen("language", draw);
  listen("info", (found) => {
    info = found;
    draw();
  });
  $("settings-reset").addEventListener("click", reset);
  $("settings-extra").addEventListener("input", (event) => set("extra", event.target.value));
  $("settings-extra").value = values.extra ?? "";
}

function draw() {
  const boxes = SWITCHES.map(switchRow);
  if (typeof info.thinking === "boolean") boxes.push(thinkingRow());
  $("settings-fields").replaceChildren(...FIELDS.map(fieldRow), ...boxes);
  for (const key of ["extra", ...FIELDS.map((field) => field.key)]) check(key);
}

function reset() {
  for (const key of Object.keys(values)) delete values[key];
  writePref("sampling", values);
  $("settings-extra").value = "";
  draw();
}

function set(key, value) {
  if (value === "" || value === false) delete values[key];
  else values[key] = value;
  writePref("sampling", values);
  check(key);
}

function fieldRow(field) {
  const id = `field-${field.key}`;
  const props = { id, placeholder: placeholderOf(field), "aria-describedby": `${id}-bad`,
    autocomplete: "off", spellcheck: "false",
    on: { input: (event) => set(field.key, event.target.value) } };
  const input = field.kind === "lines"
    ? el("textarea", { ...props, rows: 2 })
    : el("input", { ...props, type: "text", inputmode: field.kind === "ids" ? "text" : "decimal" });
  input.value = values[field.key] ?? "";
  return el("div", { class: `field ${field.kind}` },
    el("label", { for: id }, t(`field.${field.key}`)), input,
    el("p", { id: `${id}-bad`, class: "bad", hidden: true }));
}

function placeholderOf(field) {
  if (field.key === "seed" && (info.sampling?.seed ?? null) === null) return t("seed.random");
  const value = info.sampling?.[field.own ?? field.key];
  if (Array.isArray(value)) return value.join(field.kind === "ids" ? ", " : "\n");
  return value === undefined || value === null ? "" : String(value);
}

function switchRow(key) {
  const box = el("input", { type: "checkbox", id: `field-${key}`,
    on: { change: (event) => set(key, event.target.checked) } });
  box.checked = Boolean(values[key]);
  return el("label", { class: "switch" }, box, t(`field.${key}`));
}

function thinkingRow() {
  const choices = ["default", "on", "off"].map((each) =>
    el("option", { value: each === "default" ? "" : each }, t(`thinking.${each}`)));
  const select = el("select", { id: "field-thinking",
    on: { change: (event) => set("thinking", event.target.value) } }, ...choices);
  select.value = values.thinking ?? "";
  return el("div", { class: "field" },
    el("label", { for: "field-thinking" }, t("field.thinking")), select);
}

/** Shows or hides what is wrong with a field's text. */
function check(key) {
  const field = FIELDS.find((each) => each.key === key);
  if (!field && key !== "extra") return;
  const text = String(values[key] ?? "").trim();
  const problem = field ? problemOf(field, text) : problemOfExtra(text);
  if (problem) problems[key] = problem;
  else delete problems[key];
  showProblem(key, problem);
}

/** Marks a field of the panel with a message; returns whether there is such a field. */
export function showProblem(key, problem) {
  const known = { extra: "settings-extra", max_completion_tokens: "field-max_tokens" };
  const input = $(known[key] ?? `field-${key}`);
  const line = input && $(`${input.id}-bad`);
  if (!line) return false;
  line.hidden = !problem;
  line.textContent = problem ?? "";
  if (problem) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
  return true;
}

function problemOf(field, text) {
  if (text === "" || field.kind === "lines") return null;
  if (field.kind === "ids") {
    return /^\d+(\s*,\s*\d+)*$/.test(text) ? null : t("bad.ids", { found: text });
  }
  const value = Number(text);
  const fits = Number.isFinite(value) && value >= field.min && value <= field.max;
  const whole = field.kind === "number" || Number.isInteger(value);
  const range = { min: field.min, max: field.max, found: text };
  return fits && whole ? null : t("bad.number", range);
}

function problemOfExtra(text) {
  if (text === "") return null;
  try {
    const value = JSON.parse(text);
    const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
    return isObject ? null : t("bad.json", { why: text.slice(0, 20) });
  } catch (error) {
    return t("bad.json", { why: error.message });
  }
}

/** Returns the request's fields; null if one is wrong, which is then in view. */
export function requestFields() {
  const [wrong] = Object.keys(problems);
  if (wrong) {
    emit("open-settings");
    (wrong === "extra" ? $("settings-extra") : $(`field-${wrong}`)).focus();
    return null;
  }
  const found = {};
  for (const field of FIELDS) {
    const value = String(values[field.key] ?? "");
    if (value.trim() !== "") found[field.key] = typed(field, value);
  }
  if (values.greedy) found.temperature = 0;
  if (values.special) found.skip_special_tokens = false;
  if (values.thinking) found.chat_template_kwargs = { enable_thinking: values.thinking === "on" };
  // Alternatives are refused while probabilities are off.
  if (values.logprobs) found.logprobs = true;
  else delete found.top_logprobs;
  return values.extra ? { ...found, ...JSON.parse(values.extra) } : found;
}

function typed(field, value) {
  if (field.kind === "lines") return value.split("\n").filter((line) => line !== "");
  if (field.kind === "ids") return value.split(",").map(Number);
  return Number(value);
}
