// The shown branch of a conversation as elements, drawn again message by message.

import { isRunning } from "./answer.js";
import { pickSibling, shownPath, siblings } from "./conversation.js";
import { markDifferences } from "./compare.js";
import { $, el, iconButton, keepFocus } from "./dom.js";
import { number, t } from "./i18n.js";
import { copyText } from "./markdown.js";
import { models } from "./models.js";
import { replyElements } from "./reply.js";

const folds = new Map();
let shown = null;
let actions = null;
let editing = null;

/** `given`: edit(node, text), retry(node), changed(), sendResults(node, results). */
export function startMessages(given) {
  actions = given;
}

export function drawMessages(conversation, info) {
  shown = conversation;
  const nodes = shownPath(conversation).map(nodeElement);
  const all = nodes.length ? nodes : [emptyState(info)];
  keepFocus(() => $("log"), () => $("log").replaceChildren(...all));
}

/** Draws one message again, and keeps the view at the end if it was there. */
export function redrawNode(node) {
  const find = () => document.getElementById(`node-${node.id}`);
  if (!find()) return;
  const log = $("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  keepFocus(find, () => find().replaceWith(nodeElement(node)));
  if (follows) log.scrollTop = log.scrollHeight;
}

function emptyState(info) {
  const n = models.adapters.length;
  const facts = [];
  if (n) facts.push(t(n === 1 ? "empty.adapter" : "empty.adapters", { n }));
  if (info.context_limit) facts.push(t("empty.context", { n: number(info.context_limit, 0) }));
  return el("div", { class: "empty" },
    el("h1", {}, t("empty.title")), el("p", {}, facts.join(" · ")));
}

function nodeElement(node) {
  const content = node.role === "assistant" ? answerElements(node) : saidElements(node);
  return el("article", { id: `node-${node.id}`, class: `node ${node.role}` }, ...content);
}

function saidElements(node) {
  if (node.id === editing) return [editForm(node)];
  const label = el("h2", { class: "visually-hidden" }, t(node.role === "user" ? "you" : "tool"));
  const edit = iconButton("edit", t("edit"), () => startEdit(node));
  const tools = el("div", { class: "tools" }, ...branchButtons(node), edit);
  return [label, el("div", { class: "said" }, node.text), tools];
}

function startEdit(node) {
  editing = node.id;
  redrawNode(node);
  const area = document.getElementById("edit");
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function editForm(node) {
  const area = el("textarea", { id: "edit", "aria-label": t("edit.label"), rows: 3 });
  area.value = node.text;
  const finish = (send) => {
    editing = null;
    redrawNode(node);
    if (send && area.value.trim()) actions.edit(node, area.value);
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      finish(false);
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      finish(true);
    }
  });
  const cancel = el("button", { type: "button", on: { click: () => finish(false) } }, t("cancel"));
  const send = el("button", { type: "button", class: "primary",
    on: { click: () => finish(true) } }, t("edit.send"));
  return el("div", { class: "edit" }, area, el("div", { class: "row" }, cancel, send));
}

function answerElements(node) {
  const live = isRunning(node);
  const sides = node.replies.map((reply, index) => side(node, reply, index, live));
  const box = el("div", { class: sides.length > 1 ? "sides" : "side-only" }, ...sides);
  const parts = [box];
  if (sides.length > 1) parts.push(el("p", { class: "figures" }, comparison(node, sides, live)));
  if (!live && node.replies[node.picked].calls.length) parts.push(...resultForm(node));
  if (!live) parts.push(answerTools(node));
  return parts;
}

function side(node, reply, index, live) {
  const remembered = foldsOf(`${node.id}/${index}`);
  const again = { retry: () => actions.retry(node) };
  const both = node.replies.length > 1;
  const writing = live && reply.finish === null && reply.error === null;
  const parts = replyElements(reply, { live: writing, both }, again, remembered);
  const pick = both && !live && reply.text ? pickButton(node, index) : null;
  return el("section", { class: "side", "aria-label": reply.model },
    el("h2", { class: "model" }, reply.model), ...parts, pick);
}

function foldsOf(key) {
  if (!folds.has(key)) folds.set(key, {});
  return folds.get(key);
}

function pickButton(node, index) {
  const picked = node.picked === index;
  const choose = () => {
    node.picked = index;
    actions.changed();
    redrawNode(node);
  };
  return el("button", { type: "button", class: "pick", "aria-pressed": String(picked),
    on: { click: choose } }, t(picked ? "compare.picked" : "compare.pick"));
}

function comparison(node, sides, live) {
  const value = node.replies[0].seed;
  const seed = value === null ? t("compare.greedy") : t("compare.seed", { seed: value });
  if (live || node.replies.some((reply) => reply.error)) return seed;
  const { differing, total } = markDifferences(sides);
  const result = differing
    ? t("compare.differs", { n: differing, total })
    : t("compare.equal");
  return `${result} · ${seed}`;
}

function answerTools(node) {
  const copy = iconButton("copy", t("copy"), () =>
    copyText(node.replies[node.picked].text, copy));
  const retry = iconButton("retry", t("retry"), () => actions.retry(node));
  return el("div", { class: "tools" }, ...branchButtons(node), copy, retry);
}

function branchButtons(node) {
  const all = siblings(shown, node);
  if (all.length < 2) return [];
  const at = all.indexOf(node);
  const step = (offset) => () => {
    pickSibling(shown, node, offset);
    actions.changed();
    actions.redraw();
  };
  const count = t("branch.of", { n: at + 1, total: all.length });
  return [
    iconButton("left", t("branch.previous"), step(-1), { disabled: at === 0 }),
    el("span", { class: "count" }, el("span", { "aria-hidden": "true" }, `${at + 1}/${all.length}`),
      el("span", { class: "visually-hidden" }, count)),
    iconButton("right", t("branch.next"), step(1), { disabled: at === all.length - 1 }),
  ];
}

/** Fields for the results of the reply's tool calls; none once they were given. */
function resultForm(node) {
  if (shown.pick[node.id] !== undefined) return [];
  const { calls } = node.replies[node.picked];
  const areas = calls.map(({ name }) =>
    el("textarea", { rows: 2, "aria-label": t("calls.result", { name }),
      placeholder: t("calls.result", { name }) }));
  const send = () => actions.sendResults(node, areas.map((area) => area.value));
  const button = el("button", { type: "button", on: { click: send } }, t("calls.send"));
  return [el("div", { class: "edit" }, ...areas, el("div", { class: "row" }, button))];
}
