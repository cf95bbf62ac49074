import type { Axis, Value } from "./spec";

const MINUS = "\u2212";

/** Up to `digits` significant digits, without a needless exponent. */
export function number(value: number, digits = 3): string {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e") as [string, string];
    return `${Number(mantissa)}e${Number(exponent)}`.replaceAll("-", MINUS);
  }
  const shown = Math.round(size) >= 10 ** digits ? Math.round(value) : Number(value.toPrecision(digits));
  return shown.toLocaleString("en", { maximumSignificantDigits: 17 }).replaceAll("-", MINUS);
}

/** A value as its axis reads it. */
export function onAxis(axis: Axis, value: number, digits = 3): string {
  if (axis.names) return axis.names[value - 1] ?? "";
  return axis.percent ? `${number(value * 100, digits)}%` : number(value, digits);
}

/** A value with its band, where there is one. */
export function withBand(axis: Axis, y: Value | undefined, low?: Value, high?: Value): string {
  const band =
    low !== undefined || high !== undefined
      ? `${low == null ? "–" : onAxis(axis, low)} to ${high == null ? "–" : onAxis(axis, high)}`
      : "";
  if (y === undefined) return band;
  const middle = y === null ? "not finite" : onAxis(axis, y);
  return band && y !== null ? `${middle} (${band})` : middle;
}
