// Runs answers: requests in, replies that grow as the stream comes.

import { ApiFailure, streamChat } from "./api.js";
import { messagesTo, parentOf } from "./conversation.js";
import { t } from "./i18n.js";

const running = new Map();

export function isRunning(node) {
  return running.has(node.id);
}

export function stop(node) {
  running.get(node.id)?.abort();
}

export function newSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
}

/** Fills the node's replies, all at once; calls `changed` after every piece. */
export async function answer(conversation, node, body, changed) {
  const control = new AbortController();
  running.set(node.id, control);
  const messages = messagesTo(conversation, parentOf(conversation, node));
  const run = (reply) => {
    const asked = { ...body, messages, model: reply.model };
    if (reply.seed !== null) asked.seed = reply.seed;
    return fillReply(reply, asked, control.signal, changed);
  };
  await Promise.all(node.replies.map(run));
  running.delete(node.id);
  changed();
}

async function fillReply(reply, body, signal, changed) {
  const clock = new Clock();
  try {
    const options = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of streamChat({ ...body, ...options }, signal)) {
      take(reply, chunk, clock);
      changed();
    }
    if (reply.finish === null) throw new ApiFailure(0, t("error.cut"));
  } catch (error) {
    fail(reply, error);
  }
  reply.stats = clock.stats();
}

function fail(reply, error) {
  if (error.name === "AbortError") {
    reply.finish = "stopped";
    return;
  }
  const broken = error instanceof ApiFailure ? error.message : t("error.cut");
  const { status = 0, param = null, retryAfter = null } = error;
  reply.error = { message: broken, status, param, retryAfter };
}

function take(reply, chunk, clock) {
  if (chunk.usage) clock.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? {};
  clock.last = performance.now();
  reply.text += delta.content ?? "";
  reply.reasoning += delta.reasoning_content ?? "";
  for (const call of delta.tool_calls ?? []) takeCall(reply.calls, call);
  if (delta.content || delta.reasoning_content || delta.tool_calls) clock.token();
  for (const each of choice.logprobs?.content ?? []) {
    const others = (each.top_logprobs ?? []).map(({ token, logprob }) => [token, logprob]);
    reply.tokens.push([each.token, each.logprob, others]);
  }
  reply.finish = choice.finish_reason ?? reply.finish;
  reply.stats = clock.stats();
}

function takeCall(calls, piece) {
  const call = (calls[piece.index ?? 0] ??= { id: "", name: "", arguments: "" });
  call.id = piece.id ?? call.id;
  call.name += piece.function?.name ?? "";
  call.arguments += piece.function?.arguments ?? "";
}

/** Counts tokens by pieces until the server's own count comes with the end. */
class Clock {
  start = performance.now();
  first = null;
  last = null;
  pieces = 0;
  usage = null;

  token() {
    this.first ??= this.last;
    this.pieces++;
  }

  stats() {
    if (this.first === null) return null;
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    const seconds = (this.last - this.first) / 1000;
    return {
      tokens,
      first: (this.first - this.start) / 1000,
      rate: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
      prompt: this.usage?.prompt_tokens ?? null,
      reused: this.usage?.prompt_tokens_details?.cached_tokens ?? 0,
    };
  }
}
