// Texts in English and Chinese; elements with data-i18n… follow the language.

import en from "./lang/en.js";
import zh from "./lang/zh.js";
import { emit } from "./events.js";
import { writePlain } from "./prefs.js";

const LANGUAGES = { en, zh };

export function language() {
  return document.documentElement.lang in LANGUAGES ? document.documentElement.lang : "en";
}

/** The text of a key, with {names} filled in. */
export function t(key, values = {}) {
  const text = LANGUAGES[language()][key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

export function number(value, digits = 1) {
  const options = { maximumFractionDigits: digits };
  return new Intl.NumberFormat(language(), options).format(value);
}

export function applyLanguage(root = document) {
  for (const each of root.querySelectorAll("[data-i18n]")) each.textContent = t(each.dataset.i18n);
  for (const each of root.querySelectorAll("[data-i18n-label]")) {
    each.setAttribute("aria-label", t(each.dataset.i18nLabel));
    if (each.localName === "button") each.title = t(each.dataset.i18nLabel);
  }
  for (const each of root.querySelectorAll("[data-i18n-placeholder]")) {
    each.placeholder = t(each.dataset.i18nPlaceholder);
  }
}

export function switchLanguage() {
  const next = language() === "en" ? "zh" : "en";
  document.documentElement.lang = next;
  writePlain("language", next);
  applyLanguage();
  emit("language");
}
