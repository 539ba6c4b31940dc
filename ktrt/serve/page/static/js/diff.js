// The words in which two texts differ: a longest common subsequence over words.

// A Han character is a word: Chinese has no spaces.
const WORDS = /\p{Script=Han}|[\p{L}\p{N}_'’-]+|[^\s\p{L}\p{N}]/gu;
// Cells of the table; 4 million take 16 MB and about 20 ms.
const MOST_CELLS = 4_000_000;

export function wordsOf(text) {
  return Array.from(text.matchAll(WORDS), (match) => ({ word: match[0], at: match.index }));
}

/** Returns, for each text's words, whether the word differs: [flags of one, flags of other]. */
export function differing(one, other) {
  const marks = [one.map(() => false), other.map(() => false)];
  let start = 0;
  while (start < one.length && one[start]?.word === other[start]?.word) start++;
  let [end, otherEnd] = [one.length, other.length];
  while (end > start && otherEnd > start && one[end - 1].word === other[otherEnd - 1].word) {
    end--;
    otherEnd--;
  }
  const [middle, otherMiddle] = [one.slice(start, end), other.slice(start, otherEnd)];
  const common = commonWords(middle, otherMiddle);
  middle.forEach((_, i) => { marks[0][start + i] = !common[0].has(i); });
  otherMiddle.forEach((_, i) => { marks[1][start + i] = !common[1].has(i); });
  return marks;
}

/** Returns the indices of the common words; none for texts too long to be compared. */
function commonWords(one, other) {
  const found = [new Set(), new Set()];
  if (one.length * other.length > MOST_CELLS) return found;
  const table = lengths(one, other);
  const width = other.length + 1;
  let [i, j] = [0, 0];
  while (i < one.length && j < other.length) {
    if (one[i].word === other[j].word) {
      found[0].add(i++);
      found[1].add(j++);
    } else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) {
      i++;
    } else {
      j++;
    }
  }
  return found;
}

/** table[i, j]: the length of the longest common subsequence of the texts from i and j on. */
function lengths(one, other) {
  const width = other.length + 1;
  const table = new Uint32Array((one.length + 1) * width);
  for (let i = one.length - 1; i >= 0; i--) {
    for (let j = other.length - 1; j >= 0; j--) {
      table[i * width + j] = one[i].word === other[j].word
        ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  return table;
}
