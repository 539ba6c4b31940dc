// Markdown to elements. HTML in an answer is text, an image is a link: nothing runs, and nothing is
// fetched before the reader asks for it. The sanitiser checks the result.

import { Marked } from "../vendor/marked.esm.js";
import DOMPurify from "../vendor/purify.es.mjs";
import { el, icon } from "./dom.js";
import { t } from "./i18n.js";

// Made by marked from Markdown; everything else is left out.
const CLEAN = {
  ALLOWED_TAGS: ["a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr",
    "li", "ol", "p", "pre", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul", "#text"],
  ALLOWED_ATTR: ["align", "href", "start", "title"],
  RETURN_DOM_FRAGMENT: true,
};

const escaped = (text) =>
  text.replace(/[&<>"']/g, (character) => `&#${character.codePointAt(0)};`);

const markdown = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

export function toElements(text) {
  const fragment = DOMPurify.sanitize(markdown.parse(text), CLEAN);
  for (const link of fragment.querySelectorAll("a[href]")) guard(link);
  for (const code of fragment.querySelectorAll("pre")) code.replaceWith(codeBlock(code));
  for (const table of fragment.querySelectorAll("table")) scrollable(table);
  return fragment;
}

function guard(link) {
  link.rel = "noopener noreferrer nofollow";
  link.target = "_blank";
}

function scrollable(table) {
  const box = el("div", { class: "scroll", tabindex: "0" });
  table.replaceWith(box);
  box.append(table);
}

function codeBlock(pre) {
  const text = pre.textContent;
  const copy = el("button", { type: "button", class: "quiet copy" }, icon("copy"), t("copy"));
  copy.addEventListener("click", () => copyText(text, copy));
  const code = el("pre", { tabindex: "0" }, el("code", {}, text));
  return el("div", { class: "code" }, copy, code);
}

export async function copyText(text, button) {
  await write(text);
  if (button.classList.contains("done")) return;
  const before = Array.from(button.childNodes);
  button.classList.add("done");
  button.replaceChildren(icon("check"), t("copied"));
  setTimeout(() => {
    button.classList.remove("done");
    button.replaceChildren(...before);
  }, 1500);
}

/** The clipboard's API exists in secure contexts only, not over plain HTTP from another machine. */
async function write(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { class: "visually-hidden" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
