import { element, svg } from "./dom";
import type { Arm, Chart, Panel } from "./spec";

/** The arms in these panels, each with its colour, its dash and, where there is one, its band. */
export function legend(chart: Chart, panels: Panel[], arms: Arm[]): HTMLElement {
  const lines = panels.flatMap((panel) => panel.lines);
  const shown = new Set(lines.map((line) => line.arm));
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
