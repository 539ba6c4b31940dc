// The server's line: requests, and its speed as a share of what the memory allows.

import { getJson } from "./api.js";
import { $ } from "./dom.js";
import { listen } from "./events.js";
import { number, t } from "./i18n.js";

// Milliseconds between two looks, while something runs and while nothing does.
const BUSY = 1000;
const IDLE = 10_000;
const SOON = 200;

let last = null;

let timer = null;

export async function watchServer() {
  listen("answering", () => look(SOON));
  await watch();
}

function look(wait) {
  clearTimeout(timer);
  timer = setTimeout(watch, wait);
}

async function watch() {
  let wait = IDLE;
  if (!document.hidden) {
    const status = await getJson("v1/page/status", { quiet: true }).catch(() => null);
    draw(status);
    if (status?.running || status?.waiting) wait = BUSY;
  }
  look(wait);
}

/** All requests' tokens per second since the last look. */
function rateOf({ generated_tokens: tokens }) {
  const now = performance.now();
  const rate = last ? (1000 * (tokens - last.tokens)) / (now - last.at) : 0;
  last = { tokens, at: now };
  return rate;
}

function draw(status) {
  const parts = [];
  if (status) {
    const { running, waiting } = status;
    const busy = running || waiting;
    parts.push(busy ? t("live.running", { running, waiting }) : t("live.idle"));
    const rate = rateOf(status);
    if (busy && rate > 0) parts.push(t("stats.rate", { n: number(rate) }));
  }
  $("live-text").textContent = parts.join(" · ");
  const share = status?.limit_share ?? null;
  $("live-limit").hidden = share === null;
  if (share === null) return;
  $("live-meter").value = Math.min(1, share);
  const text = t("live.limit", { n: number(100 * share, share < 0.1 ? 1 : 0) });
  $("live-share").textContent = text;
  $("live-meter").setAttribute("aria-label", text);
  $("live-limit").title = t("live.limit.why");
}
