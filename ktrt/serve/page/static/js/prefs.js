// Small settings in localStorage, which a browser may refuse: then they last as long as the page.

const memory = new Map();

export function readPref(key, otherwise = null) {
  try {
    const text = localStorage.getItem(`ktrt.${key}`) ?? memory.get(key);
    return text === undefined || text === null ? otherwise : JSON.parse(text);
  } catch {
    return memory.has(key) ? JSON.parse(memory.get(key)) : otherwise;
  }
}

export function writePref(key, value) {
  memory.set(key, JSON.stringify(value));
  try {
    localStorage.setItem(`ktrt.${key}`, JSON.stringify(value));
  } catch {
    // Kept in memory.
  }
}

/** Theme and language are plain strings: boot.js reads them without a parser. */
export function readPlain(key, otherwise) {
  try {
    return localStorage.getItem(`ktrt.${key}`) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function writePlain(key, value) {
  try {
    localStorage.setItem(`ktrt.${key}`, value);
  } catch {
    // The choice lasts as long as the page.
  }
}
