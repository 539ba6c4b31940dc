// The conversation that is open: what is said in it, answered, edited and compared.

import { answer, isRunning, newSeed, stop } from "./answer.js";
import { $ } from "./dom.js";
import { addNode, newConversation, newReply, parentOf, pickedReply, shownPath } from
  "./conversation.js";
import { emit, listen } from "./events.js";
import { t } from "./i18n.js";
import { drawMessages, redrawNode, startMessages } from "./messages.js";
import { models } from "./models.js";
import { readPref, writePref } from "./prefs.js";
import { requestFields, showProblem } from "./settings.js";

// Milliseconds.
const SAVE_EVERY = 3000;

let conversation = newConversation();
let info = {};
let comparing = false;

export function startChat() {
  startMessages({ edit, retry, sendResults, changed: save, redraw });
  $("composer").addEventListener("submit", submit);
  $("message").addEventListener("keydown", typed);
  $("message").addEventListener("input", fitMessage);
  $("compare").addEventListener("click", () => setComparing(!comparing));
  $("system").addEventListener("input", takeSystem);
  $("stop").addEventListener("click", stopAll);
  document.addEventListener("keydown", escape);
  listen("language", redraw);
  listen("info", (found) => {
    info = found;
  });
  listen("models", () => {
    setComparing(readPref("comparing", false));
    redraw();
  });
  openConversation(conversation);
}

export function openConversation(next) {
  conversation = next;
  $("system").value = conversation.system ?? "";
  redraw();
  $("log").scrollTop = $("log").scrollHeight;
  emit("opened", conversation);
}

export function currentConversation() {
  return conversation;
}

function redraw() {
  drawMessages(conversation, info);
  drawButtons();
}

function takeSystem(event) {
  conversation.system = event.target.value === "" ? null : event.target.value;
  if (shownPath(conversation).length) save();
}

function save() {
  conversation.updated = Date.now();
  emit("changed", conversation);
}

function setComparing(value) {
  comparing = value && models.adapters.length > 0;
  $("compare").hidden = models.adapters.length === 0;
  writePref("comparing", value);
  $("compare").setAttribute("aria-pressed", String(comparing));
  $("other-field").hidden = !comparing;
}

function runningNodes() {
  return shownPath(conversation).filter(isRunning);
}

function drawButtons() {
  const busy = runningNodes().length > 0;
  // A hidden button has no focus to give on.
  if ([$("send"), $("stop")].includes(document.activeElement)) $("message").focus();
  $("send").hidden = busy;
  $("stop").hidden = !busy;
}

function submit(event) {
  event.preventDefault();
  const text = $("message").value;
  if (!text.trim() || runningNodes().length) return;
  const path = shownPath(conversation);
  if (!say(path.at(-1) ?? null, { role: "user", text })) return;
  $("message").value = "";
  fitMessage();
}

function typed(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
}

/** The field grows with its text; CSS bounds it. */
function fitMessage() {
  const area = $("message");
  area.style.setProperty("height", "auto");
  area.style.setProperty("height", `${area.scrollHeight + 2}px`);
}

function escape(event) {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stopAll();
}

function stopAll() {
  for (const node of runningNodes()) stop(node);
}

/** Says something after `parent` and answers it; returns whether the request could be made. */
function say(parent, fields) {
  const request = prepare();
  if (!request) return false;
  start(addNode(conversation, parent, fields), request);
  return true;
}

function edit(node, text) {
  stopAll();
  say(parentOf(conversation, node), { role: node.role, text, callId: node.callId });
}

function retry(node) {
  const request = prepare();
  if (request && !runningNodes().length) start(parentOf(conversation, node), request);
}

function sendResults(node, results) {
  const request = prepare();
  if (!request) return;
  let last = node;
  pickedReply(node).calls.forEach((call, index) => {
    last = addNode(conversation, last, { role: "tool", callId: call.id, text: results[index] });
  });
  start(last, request);
}

/** The request's fields and the models to ask; null if a setting is wrong. */
function prepare() {
  const fields = requestFields();
  if (!fields) return null;
  const names = comparing ? [models.other, models.chosen] : [models.chosen];
  if (comparing && names[0] === names[1]) {
    notice(t("compare.same"));
    return null;
  }
  notice("");
  const greedy = (fields.temperature ?? info.sampling?.temperature) === 0;
  // Shown with the answer, so that it can be had again.
  return { fields, names, seed: fields.seed ?? (greedy ? null : newSeed()) };
}

export function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

async function start(said, { fields, names, seed }) {
  const replies = names.map((name) => newReply(name, seed));
  const owner = conversation;
  const node = addNode(owner, said, { role: "assistant", replies, picked: replies.length - 1 });
  const work = answer(owner, node, fields, throttled(node));
  redraw();
  $("log").scrollTop = $("log").scrollHeight;
  announce(t("announce.answering"));
  emit("answering");
  save();
  // A closed page loses the last seconds of an answer at most.
  const saving = setInterval(() => emit("changed", owner), SAVE_EVERY);
  await work;
  clearInterval(saving);
  finished(owner, node);
}

function finished(owner, node) {
  redrawNode(node);
  drawButtons();
  owner.updated = Date.now();
  emit("changed", owner);
  const { error, finish, text } = pickedReply(node);
  if (error?.param) showProblem(error.param, error.message);
  if (error) announce(t("announce.failed", { text: error.message }));
  else announce(finish === "stopped" ? t("announce.stopped") : t("announce.done", { text }));
}

function announce(text) {
  $("announce").textContent = text;
}

/** Draws a node at most once per frame, and at most a quarter of the time. */
function throttled(node) {
  let due = false;
  let cost = 0;
  const draw = () => {
    due = false;
    if (!isRunning(node)) return;
    const start = performance.now();
    redrawNode(node);
    cost = performance.now() - start;
  };
  return () => {
    if (due) return;
    due = true;
    setTimeout(() => requestAnimationFrame(draw), 3 * cost);
  };
}
