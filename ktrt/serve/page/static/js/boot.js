// Runs before the first paint, so that a chosen theme does not flash in the other one.
(() => {
  const read = (key) => {
    try {
      return localStorage.getItem(key);
    } catch {
      return null;
    }
  };
  const root = document.documentElement;
  root.dataset.theme = read("ktrt.theme") ?? "auto";
  const language = read("ktrt.language") ?? navigator.language;
  root.lang = language.toLowerCase().startsWith("zh") ? "zh" : "en";
})();
