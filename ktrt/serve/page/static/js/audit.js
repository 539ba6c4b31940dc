// The audit as a picture: where an adapter changes the base, and by how much.

import { getJson } from "./api.js";
import { expertSummary, gridOf } from "./audit_data.js";
import { $, el } from "./dom.js";
import { listen } from "./events.js";
import { heatMap, layerName, longNames, stateOf } from "./heatmap.js";
import { number, t } from "./i18n.js";
import { models } from "./models.js";

// Narrower than this, layers run down the page.
const NARROW = 720;

let shown = null;
let asked = "";
let width = 0;

export function startAudit() {
  $("audit-model").addEventListener("change", (event) => load(event.target.value));
  listen("models", fillPicker);
  listen("language", () => shown && draw());
  new ResizeObserver(resized).observe($("audit-view"));
}

export function showAudit() {
  const name = models.adapters.includes(models.chosen) ? models.chosen : models.adapters[0];
  if (!name) {
    $("audit-body").replaceChildren(el("p", { class: "hint" }, t("audit.none")));
    return;
  }
  $("audit-model").value = name;
  if (name !== asked || !shown) load(name);
}

function fillPicker() {
  const options = models.adapters.map((name) => el("option", { value: name }, name));
  $("audit-model").replaceChildren(...options);
  if (asked) $("audit-model").value = asked;
  $("audit-field").hidden = options.length === 0;
}

async function load(name) {
  asked = name;
  shown = null;
  $("audit-body").replaceChildren(el("p", { class: "hint" }, t("audit.loading")));
  try {
    const found = await getJson(`v1/adapters/${encodeURIComponent(name)}/audit`);
    if (asked !== name) return;
    shown = { audit: found, grid: gridOf(found) };
    draw();
  } catch (error) {
    if (asked === name) showError(name, error);
  }
}

function showError(name, error) {
  const again = el("button", { type: "button", on: { click: () => load(name) } }, t("error.retry"));
  $("audit-body").replaceChildren(
    el("div", { class: "error", role: "alert" }, el("p", {}, error.message), again));
}

function resized([{ contentRect }]) {
  if (!contentRect.width || width === contentRect.width) return;
  width = contentRect.width;
  if (shown) draw();
}

function draw() {
  const { audit, grid } = shown;
  const readout = el("div", { id: "readout", "aria-live": "polite" },
    el("p", { class: "hint" }, t("audit.pick")));
  const show = (layer, kind) => readout.replaceChildren(...details(layer, kind));
  const picture = grid.kinds.length
    ? heatMap(grid, { across: width >= NARROW, room: width - 70, show })
    : null;
  $("audit-body").replaceChildren(...[
    el("p", { class: "hint" }, t(grid.relative ? "audit.hint" : "audit.hint.delta")),
    el("div", { class: "picture" },
      el("div", { class: "map" }, el("div", { class: "scroll" }, picture), legend(grid)), readout),
    summary(audit),
    el("details", {}, el("summary", {}, t("audit.table")), table(grid)),
  ].filter(Boolean));
}

export function shownValue(grid, value) {
  if (value === null || value === undefined) return "?";
  return grid.relative ? `${precise(100 * value)} %` : precise(value);
}

function precise(value) {
  return value === 0 ? "0" : Number(value.toPrecision(3)).toString();
}

function legend(grid) {
  const state = (name) => el("span", { class: "state" },
    el("span", { class: `swatch ${name}` }), t(`audit.${name}`));
  const states = ["unchanged", "untouched", "unknown"].filter((name) => occurs(grid, name));
  return el("div", { class: "legend" },
    el("span", {}, shownValue(grid, grid.low)), el("span", { class: "ramp" }),
    el("span", {}, shownValue(grid, grid.high)), el("span", {}, t("audit.scale")), ...states.map(state));
}

function occurs(grid, state) {
  return grid.layers.some((layer) =>
    grid.kinds.some((kind) => stateOf(grid.cells.get(`${layer}/${kind}`)) === state));
}

function placeName(layer) {
  return layer === null ? t("audit.other") : t("audit.layers", { layer });
}

/** The text of a cell: its place, value, ranks, and its experts. */
function details(layer, kind) {
  const { grid } = shown;
  const cell = grid.cells.get(`${layer}/${kind}`);
  const state = stateOf(cell);
  const value = state === "changed" ? shownValue(grid, cell.value) : t(`audit.${state}`);
  const parts = [el("p", { class: "place" }, `${placeName(layer)} · ${kind}`),
    el("p", { class: "value" }, value)];
  if (!cell) return parts;
  const facts = [];
  if (cell.ranks.length) facts.push(t("audit.rank", { n: cell.ranks.join(", ") }));
  if (cell.scalings.length) {
    facts.push(t("audit.scaling", { n: cell.scalings.map(precise).join(", ") }));
  }
  if (facts.length) parts.push(el("p", { class: "hint" }, facts.join(" · ")));
  return cell.experts?.length ? [...parts, ...expertParts(cell.experts)] : parts;
}

function expertText(experts) {
  const { low, high, median, zero } = expertSummary(experts);
  const values = { low: precise(low), high: precise(high), median: precise(median) };
  const texts = [t("audit.experts", { n: experts.length }), t("audit.experts.span", values)];
  if (zero) texts.push(t("audit.experts.zero", { n: zero }));
  return texts.join(" · ");
}

/** The experts as bars: one that is not tuned, or overly much, stands out. */
function expertParts(experts) {
  const { high } = expertSummary(experts);
  const bars = experts.map((value, n) =>
    el("span", { class: value === 0 ? "bar zero" : "bar",
      title: t("audit.expert", { n, value: precise(value) }),
      style: { "--height": `${high ? (100 * value) / high : 0}%` } }));
  return [el("p", { class: "hint" }, expertText(experts)),
    el("div", { class: "bars", "aria-hidden": "true" }, ...bars)];
}

function summary({ tensors, saved_whole: whole, warnings }) {
  const { found, on_experts: experts, on_other_modules: others } = tensors;
  const texts = [t("audit.tensors", { found, experts, others })];
  if (tensors.without_effect) texts.push(t("audit.no_effect", { n: tensors.without_effect }));
  if (tensors.not_applied) texts.push(t("audit.not_applied", { n: tensors.not_applied }));
  if (whole.length) texts.push(t("audit.whole", { names: whole.join(", ") }));
  return el("div", {}, el("p", { class: "hint" }, texts.join(" · ")),
    ...warnings.map((text) => el("p", { class: "bad" }, text)));
}

function table(grid) {
  const names = longNames(grid.kinds);
  const head = el("tr", {}, el("th", { scope: "col" }, t("audit.layer")),
    ...names.map((name, index) => el("th", { scope: "col", title: grid.kinds[index] }, name)));
  const rows = grid.layers.map((layer) => el("tr", {},
    el("th", { scope: "row" }, layerName(layer)),
    ...grid.kinds.map((kind) => tableCell(grid, grid.cells.get(`${layer}/${kind}`)))));
  return el("div", { class: "scroll", tabindex: "0" },
    el("table", {}, el("caption", {}, t(grid.relative ? "audit.hint" : "audit.hint.delta")),
      el("thead", {}, head), el("tbody", {}, ...rows)));
}

function tableCell(grid, cell) {
  const text = cell ? shownValue(grid, cell.value) : "·";
  const title = cell?.experts?.length ? expertText(cell.experts) : null;
  return el("td", { title }, text);
}
