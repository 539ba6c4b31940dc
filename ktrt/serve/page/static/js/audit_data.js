// The audit's answer as a grid: a cell per layer and projection.

// The order of the data flow through a layer.
const FLOW = ["q", "q_a", "q_b", "kv_a", "kv_b", "k", "v", "o", "gate", "up", "down"];

/** {layers, kinds, cells, low, high, relative}: `cells` by "layer/kind"; layer null is last. */
export function gridOf(audit) {
  const { changes } = audit;
  const relative = changes.some((change) => change.ratio !== null);
  const cells = new Map();
  for (const change of changes) {
    const value = relative ? change.ratio : change.delta;
    cells.set(`${change.layer}/${change.kind}`, { ...change, value });
  }
  const values = Array.from(cells.values(), (cell) => cell.value).filter((value) => value > 0);
  return {
    cells,
    relative,
    layers: layersOf(changes),
    kinds: [...new Set(changes.map((change) => change.kind))].sort(byFlow),
    low: values.length ? Math.min(...values) : 0,
    high: values.length ? Math.max(...values) : 0,
  };
}

/** All layers between the first and the last, so that an untuned one shows as a gap. */
function layersOf(changes) {
  const numbers = changes.map((change) => change.layer).filter((layer) => layer !== null);
  const found = [];
  if (numbers.length) {
    for (let each = Math.min(...numbers); each <= Math.max(...numbers); each++) found.push(each);
  }
  if (changes.some((change) => change.layer === null)) found.push(null);
  return found;
}

export function shortName(kind) {
  return kind.slice(kind.lastIndexOf(".") + 1).replace("_with_mqa", "").replace("_proj", "");
}

function byFlow(one, other) {
  const group = (kind) => kind.slice(0, Math.max(0, kind.lastIndexOf(".")));
  const place = (kind) => {
    const at = FLOW.indexOf(shortName(kind));
    return at < 0 ? FLOW.length : at;
  };
  const later = (kind) => (group(kind).includes("attn") ? 0 : 1);
  return later(one) - later(other) || group(one).localeCompare(group(other)) || place(one) - place(other);
}

/** 0 … 1 between the grid's lowest and highest value, on a logarithmic scale: norms spread wide. */
export function shadeOf(grid, value) {
  if (!(value > 0)) return 0;
  if (grid.high <= grid.low) return 1;
  return Math.log(value / grid.low) / Math.log(grid.high / grid.low);
}

export function expertSummary(experts) {
  const sorted = [...experts].sort((one, other) => one - other);
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  return { low: sorted[0], high: sorted.at(-1), median,
    zero: sorted.filter((value) => value === 0).length };
}
