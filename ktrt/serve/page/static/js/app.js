// Starts the page and wires its frame: panels, views, theme and language.

import { getJson } from "./api.js";
import { showAudit, startAudit } from "./audit.js";
import { notice, startChat } from "./chat.js";
import { $, icon } from "./dom.js";
import { emit, listen } from "./events.js";
import { startHistory } from "./history.js";
import { applyLanguage, switchLanguage, t } from "./i18n.js";
import { watchServer } from "./live.js";
import { loadModels, startModels } from "./models.js";
import { readPref, writePlain, writePref } from "./prefs.js";
import { startSettings } from "./settings.js";

const THEMES = ["auto", "light", "dark"];
// Below this width the panels lie over the page, one at a time.
const OVERLAY = matchMedia("(max-width: 900px)");

function startFrame() {
  for (const each of document.querySelectorAll("[data-icon]")) each.prepend(icon(each.dataset.icon));
  applyLanguage();
  $("language").addEventListener("click", switchLanguage);
  $("theme").addEventListener("click", nextTheme);
  listen("language", nameTheme);
  nameTheme();
  for (const panel of ["history", "settings"]) startPanel(panel);
  listen("open-settings", () => setPanel("settings", true));
  $("view-chat").addEventListener("click", () => showView("chat"));
  $("view-audit").addEventListener("click", () => showView("audit"));
  listen("to-chat", () => {
    closeOverlays();
    showView("chat");
  });
  // Not submit buttons: Enter would press the first one of a form.
  for (const each of document.querySelectorAll("[data-close]")) {
    each.addEventListener("click", () => each.closest("dialog").close(""));
  }
  $("shade").addEventListener("click", closeOverlays);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && OVERLAY.matches) closeOverlays();
  });
}

function nextTheme() {
  const root = document.documentElement;
  root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
  writePlain("theme", root.dataset.theme);
  nameTheme();
}

function nameTheme() {
  const theme = t(`theme.${document.documentElement.dataset.theme}`);
  $("theme-name").textContent = theme;
  $("theme").setAttribute("aria-label", t("theme", { theme }));
}

function startPanel(name) {
  const open = !OVERLAY.matches && readPref(`panel.${name}`, name === "history");
  setPanel(name, open);
  $(`${name}-toggle`).addEventListener("click", () => {
    const next = !document.body.classList.contains(`show-${name}`);
    if (OVERLAY.matches && next) closeOverlays();
    setPanel(name, next);
    if (!OVERLAY.matches) writePref(`panel.${name}`, next);
    else if (next) $(`${name}-close`).focus();
  });
  $(`${name}-close`).addEventListener("click", () => {
    setPanel(name, false);
    $(`${name}-toggle`).focus();
  });
}

function setPanel(name, open) {
  document.body.classList.toggle(`show-${name}`, open);
  $(`${name}-toggle`).setAttribute("aria-expanded", String(open));
}

function closeOverlays() {
  if (!OVERLAY.matches) return;
  for (const name of ["history", "settings"]) setPanel(name, false);
}

function showView(name) {
  for (const each of ["chat", "audit"]) {
    $(`${each}-view`).hidden = each !== name;
    $(`view-${each}`).setAttribute("aria-pressed", String(each === name));
  }
  document.body.classList.toggle("auditing", name === "audit");
  if (name === "audit") showAudit();
  else if (!OVERLAY.matches) $("message").focus();
}

async function start() {
  startFrame();
  startModels();
  startSettings();
  startAudit();
  startChat();
  await startHistory();
  if (!OVERLAY.matches) $("message").focus();
  listen("key", load);
  await load();
  watchServer();
}

/** Reads what the server has; with a key it may be more. */
async function load() {
  try {
    emit("info", await getJson("v1/page/info"));
    await loadModels();
  } catch (error) {
    notice(t("error.models", { why: error.message }));
  }
}

start();
