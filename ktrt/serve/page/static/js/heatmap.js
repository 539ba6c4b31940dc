// A heat map as SVG, with one tab stop: the arrow keys move its cursor.

import { shadeOf, shortName } from "./audit_data.js";
import { svg } from "./dom.js";
import { t } from "./i18n.js";

const SMALLEST = 18;
const LARGEST = { across: 34, down: 27 };
const GAP = 2;
const ABOVE = 22;

/** Draws `grid` into `room` pixels, layers `across` or down. `show(layer, kind)` is called for the
 * cursor. */
export function heatMap(grid, { across, room, show }) {
  const columns = across ? grid.layers : grid.kinds;
  const rows = across ? grid.kinds : grid.layers;
  const names = across ? longNames(grid.kinds) : grid.layers.map(layerName);
  const left = 14 + 7.2 * Math.max(...names.map((name) => name.length));
  const fitting = Math.floor((room - left) / columns.length);
  const cell = Math.max(SMALLEST, Math.min(LARGEST[across ? "across" : "down"], fitting));
  const frame = { grid, across, columns, rows, left, names, cell };
  const top = across ? ABOVE : headHeight(grid.kinds);
  const root = svg("svg", {
    class: "heat", role: "application", tabindex: "0",
    width: left + columns.length * cell + GAP, height: top + rows.length * cell + GAP,
    "aria-label": t("audit.map", { layers: grid.layers.length, kinds: grid.kinds.length }),
  }, ...headOf(frame, top), ...rows.flatMap((_, row) => rowOf(frame, row, top)));
  const cursor = svg("rect", { class: "cursor", width: cell, height: cell, rx: 5 });
  root.append(cursor);
  follow(root, frame, (row, column) => {
    cursor.setAttribute("x", left + column * cell - GAP / 2);
    cursor.setAttribute("y", top + row * cell - GAP / 2);
    root.classList.add("has-cursor");
    show(...placeOf(frame, row, column));
  });
  return root;
}

function placeOf({ across, rows, columns }, row, column) {
  return across ? [columns[column], rows[row]] : [rows[row], columns[column]];
}

export function layerName(layer) {
  return layer === null ? "–" : String(layer);
}

/** Short names, with their module where two projections would have the same one. */
export function longNames(kinds) {
  const short = kinds.map(shortName);
  return kinds.map((kind, index) => {
    const twice = short.filter((name) => name === short[index]).length > 1;
    return twice ? `${kind.split(".").at(-2)}.${short[index]}` : short[index];
  });
}

function headHeight(kinds) {
  return 16 + 6.8 * Math.max(...longNames(kinds).map((name) => name.length));
}

function headOf({ grid, across, columns, left, cell }, top) {
  const names = across ? grid.layers.map(layerName) : longNames(grid.kinds);
  // Every fifth number is enough where there are many.
  const every = across && columns.length > 16 ? 5 : 1;
  return names.map((name, column) => {
    if (column % every) return "";
    const x = left + column * cell + cell / 2 - GAP / 2;
    const turned = across ? {} : { transform: `rotate(-90 ${x} ${top - 6})`, class: "turned" };
    return svg("text", { x, y: top - 6, ...turned }, name);
  });
}

function rowOf(frame, row, top) {
  const { columns, left, names, cell } = frame;
  const y = top + row * cell;
  const label = svg("text", { x: left - 8, y: y + cell / 2 + 3, class: "row-name" }, names[row]);
  return [label, ...columns.map((_, column) => cellOf(frame, row, column, y))];
}

function cellOf(frame, row, column, y) {
  const [layer, kind] = placeOf(frame, row, column);
  const found = frame.grid.cells.get(`${layer}/${kind}`);
  const shade = found?.value > 0 ? 18 + 82 * shadeOf(frame.grid, found.value) : 0;
  return svg("rect", {
    x: frame.left + column * frame.cell, y, width: frame.cell - GAP, height: frame.cell - GAP, rx: 4,
    class: `cell ${stateOf(found)}`, "data-row": row, "data-column": column,
    style: { "--shade": `${shade.toFixed(1)}%` },
  });
}

export function stateOf(cell) {
  if (!cell) return "untouched";
  if (cell.value === null) return "unknown";
  return cell.value === 0 ? "unchanged" : "changed";
}

/** Moves the cursor with pointer and keys; `move(row, column)` shows it. */
function follow(root, { rows, columns }, move) {
  let at = [0, 0];
  const go = (row, column) => {
    at = [clamp(row, rows.length), clamp(column, columns.length)];
    move(...at);
  };
  root.addEventListener("pointerover", ({ target }) => {
    if (target.dataset.row) go(Number(target.dataset.row), Number(target.dataset.column));
  });
  root.addEventListener("focus", () => go(...at));
  root.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      Home: [0, -columns.length], End: [0, columns.length] }[event.key];
    if (!step) return;
    event.preventDefault();
    go(at[0] + step[0], at[1] + step[1]);
  });
}

function clamp(value, length) {
  return Math.max(0, Math.min(length - 1, value));
}
