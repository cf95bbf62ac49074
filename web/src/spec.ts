/**
 * What a chart shows. Python builds this form once (report/charts/) and draws it twice: here, and
 * with matplotlib. A live page sends the same form again with new data.
 */

/** A number, or null where nothing finite was measured: a gap, never a zero. */
export type Value = number | null;

export interface Arm {
  label: string;
  /** Any CSS colour, `var(--…)` included. */
  color: string;
  /** SVG dash pattern; empty for a solid line. Tells the arms apart without colour. */
  dash: string;
}

export interface Axis {
  label: string;
  type: "linear" | "log";
  /** Ticks at exactly these places. */
  ticks?: number[];
  /** The places 1, 2, … stand for these names. */
  names?: string[];
  /** Values are shares: 0.5 reads 50 %. */
  percent?: boolean;
  domain?: [number, number];
}

export interface Line {
  /** Position in the list of arms. */
  arm: number;
  x: number[];
  y?: Value[];
  low?: Value[];
  high?: Value[];
  /** Where a seed diverged; without a last value, at the foot of the chart. */
  ends?: { x: number; y: Value }[];
}

export interface Rule {
  y: number;
  label: string;
}

export interface Panel {
  title: string;
  /** Shown only while this learning rate is selected. */
  rate?: number;
  /** Shown only while this layer is selected. */
  layer?: string;
  /** What the y axis covers; points beyond are cut off at the frame. */
  domain?: [number, number];
  rules?: Rule[];
  lines: Line[];
}

export interface Chart {
  id: string;
  title: string;
  x: Axis;
  y: Axis;
  shape: "line" | "step";
  /** Mark every point: for few points far apart. */
  dots?: boolean;
  /** What low and high are, for the table and the readout. */
  band: string;
  /** How many panels stand side by side where there is room. */
  columns: number;
  /** The layers shown at first; a menu offers the others. Absent: all of them, without a menu. */
  overview?: string[];
  /** What was found, by learning rate; under "" what holds for all. */
  findings: Record<string, string>;
  panels: Panel[];
}

export interface Page {
  arms: Arm[];
  rates: number[];
  charts: Chart[];
}
