import { element, svg } from "./dom";
import type { Arm, Chart } from "./spec";

/** The arms that a chart shows, each with its colour, its dash and, where there is one, its band. */
export function legend(chart: Chart, arms: Arm[]): HTMLElement {
  const shown = new Set(chart.panels.flatMap((panel) => panel.lines.map((line) => line.arm)));
  const lines = chart.panels.flatMap((panel) => panel.lines);
  const band = lines.some((line) => line.low);
  const list = element("ul", { class: "bn-legend" });
  for (const [index, arm] of arms.entries()) {
    if (!shown.has(index)) continue;
    const swatch = svg("svg", { width: 34, height: 14, "aria-hidden": "true" });
    if (band) swatch.append(svg("rect", { width: 34, height: 14, fill: arm.color, "fill-opacity": 0.2 }));
    swatch.append(
      svg("line", { x1: 0, x2: 34, y1: 7, y2: 7, stroke: arm.color, "stroke-width": 2, "stroke-dasharray": arm.dash }),
    );
    list.append(element("li", {}, swatch, arm.label));
  }
  if (band) list.append(element("li", { class: "bn-muted" }, `band: ${chart.band}`));
  if (lines.some((line) => line.ends?.length))
    list.append(element("li", { class: "bn-muted" }, "✕ a seed diverged"));
  return list;
}
