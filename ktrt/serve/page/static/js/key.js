// The API key: asked for when the server answers 401.

import { $ } from "./dom.js";
import { emit } from "./events.js";
import { readPref, writePref } from "./prefs.js";

let key = readPref("key", "");
let asking = null;

export function currentKey() {
  return key;
}

/** Shows the key's dialog; resolves to whether a key was given. Requests that wait share it. */
export function askKey(refused) {
  asking ??= ask(refused).finally(() => {
    asking = null;
  });
  return asking;
}

function ask(refused) {
  const dialog = $("key-dialog");
  const input = $("key");
  $("key-refused").hidden = !refused;
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    const closed = () => {
      const given = dialog.returnValue === "ok" && input.value.trim() !== "";
      if (given) take(input.value.trim(), $("key-keep").checked);
      resolve(given);
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}

function take(value, keep) {
  key = value;
  writePref("key", keep ? value : "");
  emit("key");
}
