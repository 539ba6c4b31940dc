// One reply as elements: thought, text, tool calls, probabilities, figures, error.

import { el } from "./dom.js";
import { number, t } from "./i18n.js";
import { toElements } from "./markdown.js";

/** `live`: it is being written; `both`: it stands next to another one of the same seed. `actions.retry` answers again. `folds` remembers open details. */
export function replyElements(reply, { live, both }, actions, folds) {
  return [
    thought(reply, live, folds),
    text(reply, live),
    ...reply.calls.map(call),
    probabilities(reply, folds),
    reply.error ? errorBox(reply.error, actions) : null,
    figures(reply, live, both),
  ].filter(Boolean);
}

/** A fold that stays as the reader left it while the reply is drawn again. */
function fold(name, open, folds, summary, ...content) {
  const box = el("details", { class: name }, el("summary", {}, summary), ...content);
  box.open = folds[name] ?? open;
  box.querySelector("summary").addEventListener("click", () => { folds[name] = !box.open; });
  return box;
}

function thought(reply, live, folds) {
  if (!reply.reasoning) return null;
  const thinking = live && !reply.text && !reply.calls.length;
  const body = el("div", { class: "markdown" });
  body.append(toElements(reply.reasoning));
  return fold("thought", thinking, folds, t(thinking ? "thinking" : "thought"), body);
}

function text(reply, live) {
  if (reply.text) {
    const body = el("div", { class: live ? "markdown live" : "markdown" });
    body.append(toElements(reply.text));
    return body;
  }
  const waiting = live && !reply.reasoning && !reply.calls.length;
  return waiting ? el("p", { class: "waiting" }, t("waiting")) : null;
}

function call({ name, arguments: args }) {
  return el("div", { class: "call" },
    el("p", {}, t("calls", { name })), el("pre", { tabindex: "0" }, el("code", {}, pretty(args))));
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

function probabilities(reply, folds) {
  if (!reply.tokens.length) return null;
  const tokens = el("p", { class: "tokens" }, ...reply.tokens.map(tokenMark));
  return fold("probabilities", false, folds, t("probabilities"), tokens);
}

/** A token with a shade by its probability; its title lists the alternatives. */
function tokenMark([token, logprob, others]) {
  const line = ([each, value]) =>
    t("probabilities.token", { token: each, percent: number(100 * Math.exp(value), 1) });
  const own = line([token, logprob]);
  const rest = others.filter(([each]) => each !== token);
  const doubt = Math.round(70 * (1 - Math.exp(logprob)));
  return el("span", { title: [own, ...rest.map(line)].join("\n"),
    style: { "--doubt": `${doubt}%` } }, token);
}

function errorBox(error, actions) {
  const wait = error.retryAfter ? ` ${t("error.wait", { n: error.retryAfter })}` : "";
  const again = el("button", { type: "button", on: { click: actions.retry } }, t("error.retry"));
  return el("div", { class: "error", role: "alert" },
    el("p", {}, error.message, wait), again);
}

function figures(reply, live, both) {
  const { stats } = reply;
  const parts = [];
  if (stats) {
    parts.push(t("stats.tokens", { n: stats.tokens }));
    if (stats.rate !== null) parts.push(t("stats.rate", { n: number(stats.rate) }));
    parts.push(t("stats.first", { n: number(stats.first, 2) }));
  }
  if (stats && stats.prompt !== null && !live) {
    parts.push(t("stats.prompt", { n: stats.prompt, reused: stats.reused }));
  }
  if (reply.seed !== null && !live && !both) parts.push(t("stats.seed", { n: reply.seed }));
  const ending = { length: "finish.length", stopped: "finish.stopped" }[reply.finish];
  if (ending) parts.push(t(ending));
  return parts.length ? el("p", { class: "figures" }, parts.join(" · ")) : null;
}
