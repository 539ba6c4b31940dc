// The audit's answer as a grid: a cell per layer and projection.

/** {layers, kinds, cells, low, high, relative}: `cells` by "layer/kind"; layer null, for modules
 * outside the layers, is last. */
export function gridOf(audit) {
  const { changes } = audit;
  const relative = changes.some((change) => change.ratio !== null);
  const cells = new Map();
  for (const change of changes) {
    const value = relative ? change.ratio : change.delta;
    cells.set(`${change.layer}/${change.kind}`, { ...change, value });
  }
  const values = Array.from(cells.values(), (cell) => cell.value).filter((value) => value > 0);
  const outside = changes.some((change) => change.layer === null);
  return {
    cells,
    relative,
    layers: outside ? [...audit.layers, null] : audit.layers,
    kinds: audit.kinds.filter(isShown).map(({ kind }) => kind),
    low: values.length ? Math.min(...values) : 0,
    high: values.length ? Math.max(...values) : 0,
  };
}

/** Not shown: untuned modules that the model has once, such as the output layer. */
function isShown({ changed, total }) {
  return changed > 0 || total > 1;
}

export function shortName(kind) {
  return kind.slice(kind.lastIndexOf(".") + 1).replace("_with_mqa", "").replace("_proj", "");
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
