// Draws the figures of the page, in the colors of the theme that is in force, and again when it changes.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { displayModeBar: false, responsive: true };

  // "@chosen" becomes the value of --chosen in page.css, wherever it stands in a figure.
  function colored(value, style) {
    if (typeof value === "string") {
      return value.startsWith("@") ? style.getPropertyValue(`--${value.slice(1)}`).trim() || value : value;
    }
    if (Array.isArray(value)) return value.map((item) => colored(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, colored(item, style)]));
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    for (const figure of figures) {
      const { data, layout } = colored(figure, style);
      Plotly.react(`plot-${figure.name}`, data, layout, config);
    }
  }

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
