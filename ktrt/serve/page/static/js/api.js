// Requests to the server that sent this page, with the key if there is one.

import { askKey, currentKey } from "./key.js";
import { t } from "./i18n.js";
import { events } from "./sse.js";

export class ApiFailure extends Error {
  constructor(status, message, { param = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.retryAfter = retryAfter;
  }
}

export function getJson(path, options) {
  return request(path, options).then((response) => response.json());
}

/** Yields the chunks of a streamed chat completion. */
export async function* streamChat(body, signal) {
  const options = { method: "POST", body: JSON.stringify(body), signal };
  const response = await request("v1/chat/completions", options);
  for await (const data of events(response.body)) {
    // The server ends the stream; leaving before would close a connection that can be used again.
    if (data === "[DONE]") continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiFailure(500, chunk.error.message, chunk.error);
    yield chunk;
  }
}

async function request(path, { quiet = false, ...options } = {}) {
  const key = currentKey();
  const response = await send(path, options, key);
  if (response.ok) return response;
  const failure = await failureOf(response);
  // A key that another request was given meanwhile counts as an answer.
  if (response.status === 401 && !quiet && (currentKey() !== key || (await askKey(Boolean(key))))) {
    return request(path, options);
  }
  throw failure;
}

async function send(path, options, key) {
  const headers = options.body ? { "Content-Type": "application/json" } : {};
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    return await fetch(new URL(path, document.baseURI), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFailure(0, t("error.unreachable"));
  }
}

async function failureOf(response) {
  const body = await response.json().catch(() => null);
  const found = body?.error ?? {};
  const message = found.message ?? body?.detail ?? `HTTP ${response.status} ${response.statusText}`;
  const wait = Number(response.headers.get("Retry-After"));
  return new ApiFailure(response.status, String(message), {
    param: found.param ?? null,
    retryAfter: wait > 0 ? wait : null,
  });
}
