import type * as Plot from "@observablehq/plot";
import { element, svg } from "./dom";
import { onAxis, withBand } from "./format";
import type { Arm, Chart, Line, Panel } from "./spec";

const KEYS: Record<string, (i: number, last: number) => number> = {
  ArrowLeft: (i) => i - 1,
  ArrowRight: (i) => i + 1,
  PageUp: (i) => i - 10,
  PageDown: (i) => i + 10,
  Home: () => 0,
  End: (_, last) => last,
};

function nearest(sorted: number[], distance: (x: number) => number): number {
  let best = 0;
  sorted.forEach((x, i) => {
    if (distance(x) < distance(sorted[best] ?? x)) best = i;
  });
  return best;
}

/** A line is read at x only where it has a point there, or between two points. */
function at(line: Line, x: number): number {
  const first = line.x[0] ?? Infinity;
  const last = line.x[line.x.length - 1] ?? -Infinity;
  return x < first || x > last ? -1 : nearest(line.x, (other) => Math.abs(other - x));
}

/**
 * Read values off a panel: with the pointer, or with the arrow keys once the chart has the focus.
 * `say` receives the same text for screen readers, from the keyboard only.
 */
export function readout(
  holder: HTMLElement,
  plot: SVGSVGElement,
  chart: Chart,
  panel: Panel,
  arms: Arm[],
  say: (text: string) => void,
): void {
  const scale = (plot as unknown as Plot.Plot).scale("x");
  const places = [...new Set(panel.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  if (!scale || places.length === 0) return;
  const pixel = (x: number) => Number(scale.apply(x));
  const tip = element("div", { class: "bn-tip", hidden: "" });
  const height = Number(plot.getAttribute("height"));
  const cross = svg("line", { class: "bn-cross", y1: 14, y2: height - 38, visibility: "hidden" });
  plot.append(cross);
  holder.append(tip);
  let current = -1;

  const hide = () => {
    tip.hidden = true;
    cross.setAttribute("visibility", "hidden");
  };
  const show = (index: number, aloud: boolean) => {
    current = Math.min(Math.max(index, 0), places.length - 1);
    const x = places[current] as number;
    const left = pixel(x);
    const where = `${chart.x.names ? "layer" : chart.x.label} ${onAxis(chart.x, x)}`;
    const rows = panel.lines.flatMap((line) => {
      const i = at(line, x);
      const arm = arms[line.arm];
      if (!arm) return [];
      if (i >= 0) return [{ arm, text: withBand(chart.y, line.y?.[i], line.low?.[i], line.high?.[i]) }];
      return line.ends?.some((end) => end.x <= x) ? [{ arm, text: "diverged" }] : [];
    });
    tip.replaceChildren(
      element("strong", {}, where),
      ...rows.map(({ arm, text }) => {
        const key = element("span", { class: "bn-key" });
        key.style.background = arm.color;
        return element("div", {}, key, `${arm.label}: ${text}`);
      }),
    );
    tip.hidden = false;
    const room = holder.clientWidth - tip.offsetWidth;
    // Beside the place where there is room, otherwise in the half that the place is not in.
    const before = left - tip.offsetWidth - 12;
    const away = left < holder.clientWidth / 2 ? room : 0;
    const beside = left + 12 <= room ? left + 12 : before >= 0 ? before : away;
    tip.style.top = `${plot.getBoundingClientRect().top - holder.getBoundingClientRect().top + 6}px`;
    tip.style.left = `${beside}px`;
    for (const end of ["x1", "x2"]) cross.setAttribute(end, String(left));
    cross.setAttribute("visibility", "visible");
    if (aloud) say(`${where}: ${rows.map(({ arm, text }) => `${arm.label} ${text}`).join("; ")}`);
  };

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const pointer = ((event.clientX - box.left) / box.width) * Number(plot.getAttribute("width"));
    show(
      nearest(places, (x) => Math.abs(pixel(x) - pointer)),
      false,
    );
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const move = KEYS[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    show(current < 0 && event.key !== "End" ? 0 : move(current, places.length - 1), true);
  });
}
