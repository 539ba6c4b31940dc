// Marks the words in which two answers differ.

import { differing, wordsOf } from "./diff.js";
import { el } from "./dom.js";

/** Marks the words of two sides' texts; returns the differing words and the longer text's words. */
export function markDifferences(sides) {
  const bodies = sides.map((side) => side.querySelector(":scope > .markdown"));
  const nodes = bodies.map(textNodes);
  const words = nodes.map((each) => wordsOf(each.map((node) => node.data).join("")));
  const flags = differing(words[0], words[1]);
  nodes.forEach((each, side) => mark(each, spans(words[side], flags[side])));
  const counts = flags.map((each) => each.filter(Boolean).length);
  const total = Math.max(words[0].length, words[1].length);
  return { differing: Math.max(...counts), total };
}

function textNodes(body) {
  if (!body) return [];
  const walker = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    if (!walker.currentNode.parentElement.closest("button")) found.push(walker.currentNode);
  }
  return found;
}

/** The [start, end) of differing words; neighbours with only a gap of one character join. */
function spans(words, flags) {
  const found = [];
  words.forEach(({ word, at }, index) => {
    if (!flags[index]) return;
    const last = found.at(-1);
    if (last && flags[index - 1] && at - last[1] <= 1) last[1] = at + word.length;
    else found.push([at, at + word.length]);
  });
  return found;
}

function mark(nodes, ranges) {
  let offset = 0;
  for (const node of nodes) {
    const end = offset + node.data.length;
    const inside = ranges.filter(([from, to]) => from < end && to > offset);
    if (inside.length) node.replaceWith(...pieces(node.data, inside, offset));
    offset = end;
  }
}

function pieces(text, ranges, offset) {
  const found = [];
  let at = 0;
  for (const [from, to] of ranges) {
    const start = Math.max(0, from - offset);
    const end = Math.min(text.length, to - offset);
    found.push(text.slice(at, start), el("mark", {}, text.slice(start, end)));
    at = end;
  }
  found.push(text.slice(at));
  return found;
}
