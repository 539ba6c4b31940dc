// The list of saved conversations: open, delete, export, import.

import { stop } from "./answer.js";
import { currentConversation, notice, openConversation } from "./chat.js";
import { newConversation, problemOf } from "./conversation.js";
import { $, el, iconButton } from "./dom.js";
import { emit, listen } from "./events.js";
import { t } from "./i18n.js";
import { allConversations, deleteConversation, saveConversation } from "./store.js";

const FORMAT = "ktrt conversations";
let saved = [];

export async function startHistory() {
  $("new").addEventListener("click", startNew);
  $("export").addEventListener("click", exportAll);
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", importFile);
  listen("changed", keep);
  listen("opened", draw);
  listen("language", draw);
  await reload();
}

async function reload() {
  try {
    saved = await allConversations();
  } catch (error) {
    refused(error);
  }
  draw();
}

function refused(error) {
  notice(t("history.save.failed", { why: error?.message ?? String(error) }));
}

async function keep(conversation) {
  if (deleted.has(conversation.id)) return;
  if (saved[0] !== conversation) {
    saved = [conversation, ...saved.filter((each) => each.id !== conversation.id)];
    draw();
  }
  try {
    await saveConversation(conversation);
  } catch (error) {
    refused(error);
  }
}

function startNew() {
  openConversation(newConversation());
  emit("to-chat");
}

function draw() {
  $("history-empty").hidden = saved.length > 0;
  $("export").disabled = saved.length === 0;
  $("conversations").replaceChildren(...saved.map(row));
}

function row(conversation) {
  const title = conversation.title || t("history.untitled");
  const current = conversation.id === currentConversation().id;
  const open = () => {
    openConversation(conversation);
    emit("to-chat");
  };
  const button = el("button", { type: "button", class: "title",
    "aria-current": current ? "true" : null, on: { click: open } }, title);
  const label = t("history.delete", { title });
  return el("li", {}, button, iconButton("trash", label, () => askDelete(conversation)));
}

const deleted = new Set();

function askDelete(conversation) {
  const dialog = $("delete-dialog");
  $("delete-title").textContent = conversation.title;
  dialog.returnValue = "";
  dialog.showModal();
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "ok") remove(conversation);
  }, { once: true });
}

async function remove(conversation) {
  // An answer under way would save it again.
  deleted.add(conversation.id);
  Object.values(conversation.nodes).forEach(stop);
  saved = saved.filter((each) => each.id !== conversation.id);
  if (conversation.id === currentConversation().id) startNew();
  draw();
  await deleteConversation(conversation.id).catch(refused);
}

function exportAll() {
  const text = JSON.stringify({ format: FORMAT, version: 1, conversations: saved }, null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: url, download: "ktrt-conversations.json" }).click();
  // After the download has begun.
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function importFile(event) {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    const found = readExport(await file.text());
    for (const conversation of found) {
      deleted.delete(conversation.id);
      await saveConversation(conversation);
    }
    await reload();
    notice(t("history.import.done", { n: found.length }));
  } catch (error) {
    notice(t("history.import.bad", { file: file.name, found: error.message }));
  }
}

function readExport(text) {
  const value = JSON.parse(text);
  if (value?.format !== FORMAT || !Array.isArray(value.conversations)) {
    throw new Error(`format ${JSON.stringify(value?.format)}`);
  }
  const problem = value.conversations.map(problemOf).find(Boolean);
  if (problem) throw new Error(problem);
  return value.conversations;
}
