// A conversation as a tree: an edited message or a second answer is a sibling, nothing is lost.

export function newConversation() {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? randomId(), title: "", created: now, updated: now,
    system: null, nodes: {}, pick: {} };
}

/** `crypto.randomUUID` is missing where the page comes over plain HTTP from another machine. */
function randomId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
    byte.toString(16).padStart(2, "0")).join("");
}

/** Adds a message after `parent` (null: the first one) and shows its branch. */
export function addNode(conversation, parent, fields) {
  const node = { id: randomId(), parent: parent?.id ?? "", ...fields };
  conversation.nodes[node.id] = node;
  conversation.pick[node.parent] = node.id;
  conversation.updated = Date.now();
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node.text);
  return node;
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

/** The messages of the branch that is shown, from the first to the last. */
export function shownPath(conversation) {
  const path = [];
  let next = conversation.pick[""];
  while (next !== undefined) {
    path.push(conversation.nodes[next]);
    next = conversation.pick[next];
  }
  return path;
}

export function siblings(conversation, node) {
  return Object.values(conversation.nodes).filter((each) => each.parent === node.parent);
}

export function pickSibling(conversation, node, offset) {
  const all = siblings(conversation, node);
  const next = all[all.indexOf(node) + offset];
  if (next) conversation.pick[node.parent] = next.id;
}

export function parentOf(conversation, node) {
  return conversation.nodes[node.parent] ?? null;
}

/** The messages up to `node`, as the API takes them; without questions that got no answer. */
export function messagesTo(conversation, node) {
  const found = [];
  for (let each = node; each; each = parentOf(conversation, each)) {
    if (isSilent(each)) each = parentOf(conversation, each);
    else found.push(toMessage(each));
  }
  if (conversation.system !== null) found.push({ role: "system", content: conversation.system });
  return found.reverse();
}

function isSilent(node) {
  return node.role === "assistant" && !pickedReply(node).text && !pickedReply(node).calls.length;
}

function toMessage(node) {
  if (node.role === "user") return { role: "user", content: node.text };
  if (node.role === "tool") {
    return { role: "tool", tool_call_id: node.callId, content: node.text };
  }
  const reply = pickedReply(node);
  if (!reply.calls.length) return { role: "assistant", content: reply.text };
  const calls = reply.calls.map(({ id, name, arguments: args }) => ({
    id, type: "function", function: { name, arguments: args },
  }));
  return { role: "assistant", content: reply.text || null, tool_calls: calls };
}

export function pickedReply(node) {
  return node.replies[node.picked];
}

export function newReply(model, seed) {
  return { model, seed, text: "", reasoning: "", calls: [], tokens: [], finish: null, error: null,
    stats: null };
}

/** Returns why `value` is no conversation of this page; null if it is one. */
export function problemOf(value) {
  if (typeof value?.id !== "string") return "a conversation without id";
  if (typeof value.nodes !== "object" || typeof value.pick !== "object") return "no messages";
  for (const node of Object.values(value.nodes ?? {})) {
    const known = ["user", "assistant", "tool"].includes(node?.role);
    const whole = node?.role === "assistant" ? isAnswer(node) : typeof node?.text === "string";
    const linked = node?.parent === "" || node?.parent in value.nodes;
    if (!known || !whole || !linked) return "a message of another form";
  }
  return Object.values(value.pick ?? {}).every((id) => id in value.nodes) ? null : "no such branch";
}

function isAnswer(node) {
  const isReply = (reply) =>
    typeof reply?.text === "string" && typeof reply.model === "string" &&
    Array.isArray(reply.calls) && Array.isArray(reply.tokens);
  return Array.isArray(node.replies) && node.replies.every(isReply) && node.picked in node.replies;
}
