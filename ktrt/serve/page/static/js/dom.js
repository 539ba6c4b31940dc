// Elements without markup in strings: a text is never parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") {
      for (const [type, handler] of Object.entries(value)) element.addEventListener(type, handler);
    } else if (name === "style") {
      for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    } else {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

export function $(id) {
  return document.getElementById(id);
}

const FOCUSABLE = "a[href], summary, button, textarea, input, [tabindex]";

/** Runs `draw`, which makes `root()` again; the control in the focused one's place gets the focus. */
export function keepFocus(root, draw) {
  const controls = () => Array.from(root()?.querySelectorAll(FOCUSABLE) ?? []);
  const at = controls().indexOf(document.activeElement);
  draw();
  if (at < 0) return;
  const next = controls().slice(at).find((each) => !each.disabled);
  (next ?? $("message")).focus();
}

const ICONS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  sliders: "M4 7h10M18 7h2M4 17h2M10 17h10M16 4.5v5M8 14.5v5",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  retry: "M19 12a7 7 0 1 1-2.05-4.95M19 4v4h-4",
  edit: "M4 20h4L19 9l-4-4L4 16zM13.5 6.5l4 4",
  copy: "M9 9h10v11H9zM5 15V4h10",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l1 13h8l1-13",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  close: "M6 6l12 12M18 6L6 18",
  columns: "M4 5h7v14H4zM13 5h7v14h-7z",
  grid: "M4 4h6v6H4zM14 4h6v6h-6zM4 14h6v6H4zM14 14h6v6h-6z",
  chat: "M5 5h14v11H11l-4 4v-4H5z",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  upload: "M12 16V5M7 9l5-5 5 5M5 20h14",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  language: "M4 12h16M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16zM12 4c-5 5-5 11 0 16M12 4c5 5 5 11 0 16",
  check: "M5 12.5l4.5 4.5L19 7.5",
};

export function icon(name) {
  const path = svg("path", { d: ICONS[name] });
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, path);
}

/** A button with an icon; `label` is its name, and its text with `shown`. */
export function iconButton(name, label, onClick, { shown = false, ...props } = {}) {
  const text = shown ? el("span", {}, label) : null;
  const names = shown ? {} : { "aria-label": label, title: label };
  return el(
    "button",
    { type: "button", class: "quiet", on: { click: onClick }, ...names, ...props },
    icon(name),
    text,
  );
}
