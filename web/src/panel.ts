import * as Plot from "@observablehq/plot";
import { onAxis } from "./format";
import type { Arm, Chart, Line, Panel, Value } from "./spec";

interface Point {
  x: number;
  y: Value;
  low: Value;
  high: Value;
}

/** Wide panels may be taller, within what fits on a screen together. */
const height = (width: number) => Math.round(Math.min(Math.max(width * 0.5, 200), 260));

/** Log axes have no place for zero and below: a gap, while the table shows the number. */
function drawable(value: Value | undefined, log: boolean): number {
  return value == null || (log && value <= 0) ? NaN : value;
}

function points(line: Line, log: boolean): Point[] {
  return line.x.map((x, i) => ({
    x,
    y: drawable(line.y?.[i], log),
    low: drawable(line.low?.[i], log),
    high: drawable(line.high?.[i], log),
  }));
}

/** Neighbourless points, which a line would not show. */
function alone(data: Point[]): Point[] {
  const there = (i: number) => Number.isFinite(data[i]?.y);
  return data.filter((_, i) => there(i) && !there(i - 1) && !there(i + 1));
}

/** Whether something lies beyond the frame, for instance of an arm that runs away. */
export function cutOff(panel: Panel): boolean {
  const [low, high] = panel.domain ?? [-Infinity, Infinity];
  const beyond = (value: Value) => value !== null && (value < low || value > high);
  return panel.lines.some((line) => [line.y, line.low, line.high].some((part) => part?.some(beyond)));
}

function extent(panel: Panel, log: boolean): [number, number] {
  const all = panel.lines
    .flatMap((line) => [...(line.y ?? []), ...(line.low ?? []), ...(line.high ?? [])])
    .filter((value): value is number => value !== null && (!log || value > 0));
  return all.length ? [Math.min(...all), Math.max(...all)] : [log ? 0.1 : 0, 1];
}

function marks(line: Line, arm: Arm, chart: Chart, log: boolean, domain: [number, number]): Plot.Markish[] {
  const data = points(line, log);
  const curve = chart.shape === "step" ? "step-after" : "linear";
  const made: Plot.Markish[] = [];
  const stroke = { stroke: arm.color, strokeDasharray: arm.dash || undefined, curve, clip: true } as const;
  if (line.low && line.high) {
    made.push(
      Plot.areaY(data, { x: "x", y1: "low", y2: "high", fill: arm.color, fillOpacity: 0.17, curve, clip: true }),
    );
    if (!line.y)
      made.push(
        Plot.lineY(data, { x: "x", y: "low", strokeWidth: 1.5, ...stroke }),
        Plot.lineY(data, { x: "x", y: "high", strokeWidth: 1.5, ...stroke }),
      );
  }
  if (line.y) {
    if (chart.shape === "step")
      made.push(Plot.areaY(data, { x: "x", y: "y", fill: arm.color, fillOpacity: 0.17, curve, clip: true }));
    made.push(Plot.lineY(data, { x: "x", y: "y", strokeWidth: 2, ...stroke }));
    const dots = (chart.dots ? data : alone(data)).filter(
      ({ y }) => y !== null && y >= domain[0] && y <= domain[1],
    );
    made.push(Plot.dot(dots, { x: "x", y: "y", r: 3, fill: arm.color }));
    if (chart.dots && line.low && line.high)
      made.push(Plot.ruleX(data, { x: "x", y1: "low", y2: "high", stroke: arm.color, strokeWidth: 1.5, clip: true }));
  }
  const inside = (y: number) => Math.min(Math.max(y, domain[0]), domain[1]);
  const ends = (line.ends ?? []).map(({ x, y }) => ({ x, y: inside(y ?? domain[0]), foot: y === null }));
  for (const foot of [false, true])
    made.push(
      Plot.dot(
        ends.filter((end) => end.foot === foot),
        { x: "x", y: "y", dy: foot ? -8 : 0, symbol: "times", r: 5, stroke: arm.color, strokeWidth: 2.5 },
      ),
    );
  return made;
}

/** Names along the axis where they fit, otherwise only their positions. */
function xTicks(chart: Chart, width: number): { ticks?: number[]; tickFormat: (value: number) => string } {
  const { names, ticks } = chart.x;
  if (!names) return { ticks, tickFormat: (value) => onAxis(chart.x, value) };
  const places = names.map((_, i) => i + 1);
  const fits = names.reduce((sum, name) => sum + name.length + 2, 0) * 6.2 < width;
  if (fits) return { ticks: places, tickFormat: (value) => names[value - 1] ?? "" };
  const every = Math.ceil((places.length * 22) / width);
  return { ticks: places.filter((_, i) => i % every === 0), tickFormat: String };
}

/** Few enough places on a log axis to label them all: powers of ten, some of each, or even steps. */
function logTicks([low, high]: [number, number]): number[] {
  const decades = Math.log10(high / low);
  if (decades < 0.3) {
    const size = 10 ** Math.floor(Math.log10(high - low));
    const step = size * ((high - low) / size > 4 ? 2 : (high - low) / size > 2 ? 1 : 0.5);
    const first = Math.ceil(low / step);
    return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
  }
  const steps = decades >= 2.5 ? [1] : decades >= 0.8 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7];
  const every = Math.ceil(decades / 6);
  const ticks: number[] = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    if (power % every === 0) ticks.push(...steps.map((step) => step * 10 ** power));
  return ticks.filter((tick) => tick >= low && tick <= high);
}

/** Draw one panel as SVG of the given width. */
export function draw(chart: Chart, panel: Panel, arms: Arm[], width: number, description: string): SVGSVGElement {
  const log = chart.y.type === "log";
  const domain = panel.domain ?? extent(panel, log);
  const xDomain = chart.x.domain ?? (chart.x.names && [0.7, chart.x.names.length + 0.3]);
  const zero = chart.shape !== "step" && !log && domain[0] < 0 && domain[1] > 0;
  const made = Plot.plot({
    width,
    height: height(width),
    marginLeft: 52,
    marginRight: 14,
    marginTop: 14,
    marginBottom: 38,
    className: "bn-plot",
    style: { fontSize: "11.5px", overflow: "visible" },
    x: {
      type: chart.x.type,
      domain: xDomain,
      label: chart.x.label,
      labelAnchor: "right",
      labelArrow: false,
      ...(chart.x.ticks || chart.x.names ? {} : { ticks: Math.max(3, Math.round(width / 80)) }),
    },
    y: {
      type: chart.y.type,
      domain,
      label: null,
      grid: true,
      ticks: log ? logTicks(domain) : 5,
      tickFormat: (value: number) => onAxis(chart.y, value, 5),
    },
    marks: [
      Plot.axisX({ ...xTicks(chart, width - 66), tickSize: 4, labelArrow: "none", label: chart.x.label }),
      zero ? Plot.ruleY([0], { stroke: "currentColor", strokeOpacity: 0.35 }) : null,
      Plot.ruleY(panel.rules ?? [], {
        y: "y",
        stroke: "currentColor",
        strokeOpacity: 0.6,
        strokeDasharray: "2 3",
        clip: true,
      }),
      panel.lines.map((line) => {
        const arm = arms[line.arm];
        return arm ? marks(line, arm, chart, log, domain) : null;
      }),
      // Last, and with a rim of paper, to be read on top of the lines.
      Plot.text(panel.rules ?? [], {
        y: "y",
        text: "label",
        frameAnchor: "right",
        dx: -3,
        dy: -8,
        fill: "currentColor",
        stroke: "var(--paper, Canvas)",
        strokeWidth: 4,
        clip: true,
      }),
    ],
  }) as SVGSVGElement;
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", panel.title ? `${chart.title}: ${panel.title}` : chart.title);
  made.setAttribute("aria-description", description);
  made.setAttribute("tabindex", "0");
  return made;
}
